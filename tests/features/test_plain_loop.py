"""The oracle is the same loop over the user's own loader."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_unfreeze.features import cached
from tests.zoo import Images

DATA = TensorDataset(torch.randn(22, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(22) % 3)


def vit_with_a_head() -> nn.Module:
    torch.manual_seed(0)
    tower = timm.create_model("test_vit", img_size=32, num_classes=0)
    return nn.Sequential(tower, nn.Dropout(0.2), nn.Linear(tower.num_features, 3))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3, drop_rate=0.1)


def shuffled() -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=5, shuffle=True)


def with_generator() -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=5, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(3))


def by_batch_sampler() -> DataLoader[Any]:
    return DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 8, drop_last=False))


def loop(model: nn.Module, batches: Any, trains: list[nn.Parameter], epochs: int = 3) -> list[Tensor]:
    optimizer, losses = torch.optim.SGD(trains, lr=0.1, momentum=0.9), []
    torch.manual_seed(5)
    for _ in range(epochs):
        for x, y in batches:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("make", [shuffled, with_generator, by_batch_sampler])
@pytest.mark.parametrize(
    ("build", "train"), [(vit_with_a_head, "2"), (vit_with_a_head, ["2", "0.blocks.5.*"]), (resnet, ["layer4", "fc"])]
)
def test_cached__ends_with_the_weights_of_the_loop_without_it(make: Callable[[], Any], build: Any, train: Any) -> None:
    names = [train] if isinstance(train, str) else [name.removesuffix(".*") for name in train]
    plain, stored = build(), build()
    results = []
    for model in (plain, stored):
        trains = [p for name in names for p in model.get_submodule(name).parameters()]
        if model is plain:
            model.requires_grad_(False)
            for parameter in trains:
                parameter.requires_grad_(True)
            for module in model.modules():
                parameters = list(module.parameters())
                if parameters and not any(p.requires_grad for p in parameters):
                    module.eval()
            results.append(loop(model, make(), trains))
        else:
            modes = [module.training for module in model.modules()]
            with cached(model, make(), train=train) as batches:
                assert len(batches) == len(make())
                results.append(loop(model, batches, trains))
            assert [module.training for module in model.modules()] == modes
            assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True)) and len(results[0]) >= 9
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), stored.state_dict().values(), strict=True)
    )
    assert all("forward" not in vars(module) for module in stored.modules())


def test_cached__a_tower_frozen_as_a_whole_under_a_head_of_its_own() -> None:
    tower = vit_with_a_head()[0]
    with cached(tower, DataLoader(DATA, 8), train=()) as batches:
        outputs = torch.cat([tower(x) for x, _ in batches])
        assert next(tuple(x.shape) for x, _ in batches) == (8, tower.num_features)
        torch.testing.assert_close(tower(DATA.tensors[0][:8]), outputs[:8], rtol=0, atol=0)  # images are taken as ever
    torch.testing.assert_close(outputs, tower.eval()(DATA.tensors[0]), rtol=0, atol=1e-5)


def test_cached__validation_data_and_a_directory_that_keeps_the_store(tmp_path: Path) -> None:
    model = resnet()
    for _ in range(2):
        with cached(model, shuffled(), "fc", directory=tmp_path) as batches:
            val = batches.of(DataLoader(DATA, 11))
            assert torch.equal(torch.cat([y for _, y in val]), DATA.tensors[1])
        assert len(list(tmp_path.glob("*-train/manifest.json"))) == len(list(tmp_path.glob("*-val/manifest.json"))) == 1


def test_cached__what_it_refuses(tmp_path: Path) -> None:
    model, noisy = resnet(), DataLoader(Images(lambda image: image + torch.randn(3, 1, 1), DATA), 8)
    with pytest.raises(ValueError, match=re.escape("train='hed' names nothing of ResNet, which has conv1, ")):
        cached(model, shuffled(), "hed").__enter__()
    with pytest.raises(ValueError, match="views=0"):
        cached(model, shuffled(), "fc", views=0).__enter__()
    with pytest.raises(RuntimeError, match=r"no features can be stored: .*drawn at random"):
        cached(model, noisy, "fc").__enter__()
    with pytest.raises(RuntimeError, match="no features can be stored: no module with frozen parameters"):
        cached(model, shuffled()).__enter__()
    with cached(model, noisy, "fc", eval_transform=nn.Identity()) as batches:
        x, _ = next(iter(batches))
        with pytest.raises(RuntimeError, match="changes the stored features"):
            model(0.5 * x + 0.5 * x.flip(0))
    assert all("forward" not in vars(module) for module in model.modules())


def test_docs__example_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "features_without_lightning.md"
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    names: dict[str, Any] = {}
    exec(compile(code, str(page), "exec"), names)
    assert names["loss"].isfinite()
