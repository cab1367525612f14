"""The recipe on a CUDA or MPS device: skipped, saying so, where there is none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torchvision.models import resnet18

from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage
from lightning_unfreeze.callbacks.precompute import PrecomputeFeatures
from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.tta import TTAEval
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.data.loaders import EpochSampler, KeyedDataset, ResumableLoader
from lightning_unfreeze.stages.plan import Stage
from tests.zoo import Does, UserModule, loader, quiet_trainer, random_images, same_weights, weights_of

CUDA, MPS = torch.cuda.is_available(), torch.backends.mps.is_available()
ACCELERATOR = "cuda" if CUDA else "mps"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CUDA or MPS), reason="no CUDA or MPS device here"),
    pytest.mark.filterwarnings("ignore:Found .* module:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:.*no signal in the range test"),
]
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed"] if CUDA else ["32-true"]


def resnet() -> UserModule:
    """The scaler of `16-mixed` sees finite and, now and then, infinite gradients."""
    return UserModule(resnet18(num_classes=3))


@pytest.fixture(autouse=True)
def deterministic() -> Any:
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def fit(
    stages: list[Stage], precision: str, *others: Callback, ckpt: Any = None, **options: Any
) -> tuple[UserModule, pl.Trainer]:
    torch.manual_seed(0)
    module = resnet()
    trainer = quiet_trainer([GradualUnfreeze(stages), *others], accelerator=ACCELERATOR, precision=precision, **options)
    data = KeyedDataset(random_images(24, size_px=64), seed=0)
    train = ResumableLoader(data, batch_size=8, sampler=EpochSampler(data, seed=3))
    trainer.fit(module, train, loader(random_images(16, size_px=64, seed=1)), ckpt_path=ckpt)
    return module, trainer


def close(left: nn.Module, right: nn.Module, precision: str) -> None:
    """Within what the precision rounds: kernels on a device may add in another order for another batch."""
    tolerance = {"32-true": 1e-4, "bf16-mixed": 2e-2, "16-mixed": 2e-2}[precision]
    for (name, value), other in zip(left.state_dict().items(), right.state_dict().values(), strict=True):
        if value.is_floating_point():
            scale = float(value.abs().max())
            torch.testing.assert_close(value, other, rtol=0, atol=tolerance * max(scale, 1e-2), msg=name)


def two_stages(precompute: bool) -> list[Stage]:
    return [
        Stage("head", train="head", epochs=2, precompute=precompute, lr=0.01),
        Stage("full", epochs=1, lr=1e-3, lr_mult=0.3),
    ]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_store__gives_the_weights_of_the_plain_run(precision: str, tmp_path: Path) -> None:
    plain, trainer = fit(two_stages(precompute=False), precision)
    store = PrecomputeFeatures(tmp_path / "feature_store", policy="always")
    stored, _ = fit(two_stages(precompute=True), precision, store)
    assert list((tmp_path / "feature_store").glob("*-train/manifest.json"))
    assert trainer.strategy.root_device.type == ACCELERATOR
    close(plain, stored, precision)
    torch.manual_seed(0)
    start = resnet()
    assert same_weights(weights_of(start), weights_of(stored)) != []


class NotApplied(LRFinderPerStage):
    """Runs beside stages that have rates of their own."""

    def on_stage_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        self.results[stage.name] = self.range_test(trainer, pl_module, stage.name)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_finder__a_run_with_it_is_the_run_without_it(precision: str) -> None:
    without, _ = fit(two_stages(precompute=False), precision)
    finder = NotApplied(num_steps=20)
    with_it, trainer = fit(two_stages(precompute=False), precision, finder)
    assert same_weights(weights_of(without), weights_of(with_it)) == []
    assert all(len(finder.results[name].lrs) > 5 for name in ("head", "full"))
    if precision == "16-mixed":
        scaler = trainer.precision_plugin.state_dict()
        _, other = fit(two_stages(precompute=False), precision)
        assert scaler == other.precision_plugin.state_dict()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_recipe__runs_whole_and_resumes_where_it_was(precision: str, tmp_path: Path) -> None:
    stages = [
        Stage("head", train="head", epochs=2, precompute=True, lr="find"),
        Stage("full", lr="find", lr_mult=1 / 3, cycle_len=1, num_cycles=2, until="overfit"),
    ]

    def save(trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in (2, 7):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    def players() -> list[Callback]:
        store = PrecomputeFeatures(tmp_path / "feature_store", policy="always", num_views=2)
        return [store, LRFinderPerStage(num_steps=20), CosineRestarts(), TTAEval()]

    whole, trainer = fit(stages, precision, *players(), Does(on_train_batch_end=save))
    assert trainer.current_epoch == 4
    for step in (2, 7):
        resumed, _ = fit(stages, precision, *players(), ckpt=tmp_path / f"{step}.ckpt")
        assert same_weights(weights_of(whole), weights_of(resumed)) == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tta__merges_the_views_of_the_module(precision: str) -> None:
    """Two views by hand: logits of the images and of their mirror image, mean of the log-probabilities."""

    class Module(UserModule):
        def __init__(self) -> None:
            super().__init__(resnet18(num_classes=3))
            self.logits: list[torch.Tensor] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    torch.manual_seed(0)
    module = Module()
    tta = TTAEval(views=["identity", "hflip"], merge="mean")
    trainer = quiet_trainer([tta], accelerator=ACCELERATOR, precision=precision)
    images = random_images(16, size_px=64, seed=1)
    (metrics,) = trainer.test(module, loader(images), verbose=False)
    by_hand = copy.deepcopy(module).eval().to(trainer.strategy.root_device)
    x, y = (tensor.to(trainer.strategy.root_device) for tensor in images.tensors)
    with torch.no_grad():
        probs = torch.stack([by_hand.net(view).softmax(1) for view in (x, x.flip(-1))]).mean(0)
    accuracy = float((probs.argmax(1) == y).float().mean())
    # one image on the edge between two classes may fall to either side in half precision
    allowed = 1e-6 if precision == "32-true" else 1.5 / len(y)
    found = [value for name, value in metrics.items() if "tta" in name and "acc" in name]
    assert found
    assert min(abs(value - accuracy) for value in found) <= allowed
