"""The oracle throughout is plain PyTorch: the same network, the same seed, no prefix."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_unfreeze.features.key import prefix_fingerprint
from lightning_unfreeze.features.prefix import FrozenPrefix, advance
from lightning_unfreeze.features.search import find_prefix, verify


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def build(name: str, **kwargs: Any) -> nn.Module:
    """A model with random weights, none of them constant: layer scales of 1e-6 and zero biases would hide mistakes."""
    torch.manual_seed(1)
    maker = torchvision.models.get_model if name.startswith("tv:") else timm.create_model
    network: nn.Module = maker(name.removeprefix("tv:"), num_classes=3, **kwargs)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return network


def freeze(network: nn.Module, *prefixes: str) -> nn.Module:
    """Freeze the parameters under these names; modules all of whose parameters are frozen go to eval mode."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not f"{name}.".startswith(tuple(f"{prefix}." for prefix in prefixes)))
    network.train()
    for module in network.modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()
    return network


def find(network: nn.Module, images: Tensor, run: Callable[[Tensor], Any] | None = None) -> FrozenPrefix:
    prefix, reason = find_prefix(network, images, run)
    assert prefix is not None, reason
    assert reason == ""
    return prefix


def train(network: nn.Module, batches: list[Tensor], run: Callable[[Tensor], Any] | None = None) -> list[Tensor]:
    """Losses of a few steps of SGD with momentum, batch by batch."""
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    losses = []
    for i, batch in enumerate(batches):
        torch.manual_seed(i)
        loss = (run or network)(batch).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def train_from_store(network: nn.Module, prefix: FrozenPrefix, batches: list[Tensor]) -> list[Tensor]:
    features = [prefix.extract(batch) for batch in batches]  # all of them before the first step, like a store
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    losses = []
    for i, rows in enumerate(features):
        torch.manual_seed(i)
        with prefix.replay(rows) as x:
            loss = prefix._run(x).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def assert_same_training(network: nn.Module, images: Tensor, run: Any = None) -> FrozenPrefix:
    """Three steps from the store end bitwise where three plain ones end; ``run`` maps a network to a callable."""
    twin = copy.deepcopy(network)
    prefix = find(network, images[:3], run(network) if run else None)
    batches = [images[:3], images[3:7], images[5:7]]
    plain = train(twin, batches, run(twin) if run else None)
    stored = train_from_store(network, prefix, batches)
    assert all(loss.isfinite() for loss in plain)
    assert [a.item() for a in plain] == [b.item() for b in stored]
    expected = twin.state_dict()
    assert [name for name, tensor in network.state_dict().items() if not torch.equal(tensor, expected[name])] == []
    return prefix


VIT = ["patch_embed", "cls_token", "pos_embed", "reg_token"]
EFFICIENT = ["conv_stem", "bn1"]
FAMILIES: dict[str, tuple[dict[str, Any], int, tuple[list[str], list[str], list[str]]]] = {
    "tv:resnet18": (
        {},
        32,
        (
            ["conv1", "bn1"],
            ["conv1", "bn1", "layer1", "layer2"],
            ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"],
        ),
    ),
    "test_resnet": (
        {},
        32,
        (["conv1", "bn1"], ["conv1", "bn1", "layer1.0"], ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]),
    ),
    "test_convnext": (
        {},
        32,
        (["stem"], ["stem", "stages.0", "stages.1"], ["stem", "stages", "norm_pre", "head.norm"]),
    ),
    "test_vit": ({"img_size": 32}, 32, (VIT, [*VIT, "blocks.0", "blocks.1", "blocks.2"], [*VIT, "blocks", "norm"])),
    "test_efficientnet": (
        {},
        32,
        (EFFICIENT, [*EFFICIENT, "blocks.0", "blocks.1"], [*EFFICIENT, "blocks", "conv_head", "bn2"]),
    ),
    "mobilenetv2_035": (
        {},
        32,
        (EFFICIENT, [*EFFICIENT, "blocks.0", "blocks.1", "blocks.2"], [*EFFICIENT, "blocks", "conv_head", "bn2"]),
    ),
    "tv:mobilenet_v3_small": (
        {},
        32,
        (["features.0"], [f"features.{i}" for i in range(6)], ["features"]),
    ),
    "swin_s3_tiny_224": (
        {
            "img_size": 64,
            "embed_dim": 12,
            "depths": (1, 1, 2, 1),
            "num_heads": (1, 2, 2, 4),
            "window_size": (4, 4, 4, 2),
        },
        64,
        (["patch_embed"], ["patch_embed", "layers.0", "layers.1"], ["patch_embed", "layers", "norm"]),
    ),
    "densenet121": (
        {"growth_rate": 4, "block_config": (2, 2, 2, 2)},
        32,
        (
            ["features.conv0", "features.norm0"],
            [f"features.{n}" for n in ("conv0", "norm0", "denseblock1")],
            ["features"],
        ),
    ),
    "regnetx_002": ({}, 32, (["stem"], ["stem", "s1", "s2"], ["stem", "s1", "s2", "s3", "s4"])),
}


@pytest.mark.parametrize("boundary", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", FAMILIES)
def test_training__from_the_store_is_plain_training_bitwise(name: str, boundary: int) -> None:
    kwargs, px, frozen = FAMILIES[name]
    network = freeze(build(name, **kwargs), *frozen[boundary])
    assert_same_training(network, torch.randn(7, 3, px, px))


def test_boundary__is_behind_the_pool_when_the_backbone_is_frozen() -> None:
    network = freeze(build("tv:resnet18"), "conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
    prefix = find(network, torch.randn(3, 3, 64, 64))
    assert prefix.boundary == "avgpool"
    assert prefix.shapes == {"avgpool": (512, 1, 1)}
    assert prefix.bytes_per_image == 512 * 4


def test_boundary__is_never_behind_dropout() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    prefix = assert_same_training(freeze(network, "0"), torch.randn(7, 3, 8, 8))
    assert prefix.boundary == "0"


def test_boundary__looks_through_what_keeps_the_size() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Identity(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    assert assert_same_training(freeze(network, "0"), torch.randn(7, 3, 8, 8)).boundary == "3"


def test_dropout__behind_the_boundary_draws_what_it_draws_in_plain_training() -> None:
    network = freeze(
        build("test_vit", img_size=32, drop_rate=0.3, proj_drop_rate=0.2, drop_path_rate=0.3), *VIT, "blocks.0"
    )
    network.blocks[0].eval()
    assert_same_training(network, torch.randn(7, 3, 32, 32))


def test_hrnet__several_tensors_cross_in_one_packed_tensor() -> None:
    network = build("hrnet_w18_small")
    freeze(
        network,
        *(
            name
            for name, _ in network.named_children()
            if not name.startswith(("stage4", "incre", "down", "final", "class"))
        ),
    )
    images = torch.randn(7, 3, 32, 32)
    prefix = find(network, images[:3])
    assert len(prefix.shapes) > 1
    features = prefix.extract(images)
    packed = prefix.pack(features)
    assert packed.shape == (7, sum(rows[0].numel() for rows in features.values()))
    assert all(torch.equal(rows, prefix.unpack(packed)[key]) for key, rows in features.items())
    assert_same_training(network, images)


class Skip(nn.Module):
    """Reads the first activation behind the second layer; how is up to `read`."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Linear(4, 2),
        )
        self.read = read

    def forward(self, images: Tensor) -> Tensor:
        early = self.first(images)
        late = self.second(early.relu())
        return self.head((late + self.read(early, images)).mean((2, 3)))


def test_skip__over_the_boundary_is_stored_too() -> None:
    network = freeze(Skip(lambda early, images: early), "first", "second")
    prefix = assert_same_training(network, torch.randn(7, 3, 8, 8))
    assert prefix.shapes == {"first": (4, 8, 8), "second": (4, 8, 8)}


def test_skip__that_no_gradient_shows_walks_the_boundary_back() -> None:
    network = freeze(Skip(lambda early, images: early.detach()), "first", "second")
    images = torch.randn(7, 3, 8, 8)
    prefix, reason = find_prefix(network, images)
    assert prefix is not None
    assert prefix.boundary == "first"
    assert "'second' is no freeze boundary" in reason
    assert "NaN" in reason
    with prefix.replay(prefix.extract(images)) as x:
        assert torch.equal(network(x), network(images))


def test_skip__that_is_there_in_eval_mode_only_is_found() -> None:
    network = Skip(lambda early, images: early)
    network.read = lambda early, images: early if not network.training else torch.zeros(())
    prefix, reason = find_prefix(freeze(network, "first", "second"), torch.randn(3, 3, 8, 8))
    assert prefix is not None
    assert prefix.boundary == "first"
    assert "in eval mode is not that of the plain forward" in reason


def test_skip__from_the_images_is_refused() -> None:
    network = freeze(Skip(lambda early, images: images.mean(1, keepdim=True)), "first", "second")
    prefix, reason = find_prefix(network, torch.randn(3, 3, 8, 8))
    assert prefix is None
    assert "NaN" in reason


class Twice(nn.Module):
    """One module is called before, and again behind the boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.trained, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.shared(self.shared(images).tanh())
        return self.head(self.shared(self.trained(x)).mean((2, 3)))


def test_module__called_before_and_behind_the_boundary() -> None:
    network = freeze(Twice(), "shared")
    prefix = assert_same_training(network, torch.randn(7, 3, 8, 8))
    assert prefix.shapes == {"shared-call1": (3, 8, 8)}


def test_module__called_inside_another_one_of_the_prefix_too() -> None:
    activation = nn.Tanh()
    block = nn.Sequential(nn.Conv2d(3, 3, 3), activation)
    network = nn.Sequential(nn.Conv2d(3, 3, 3), activation, block, nn.Conv2d(3, 2, 3))
    assert assert_same_training(freeze(network, "0", "2"), torch.randn(7, 3, 9, 9)).boundary == "2"


class Scale(nn.Module):
    """A trainable parameter that belongs to no layer; ``gate`` hides from autograd that it depends on it."""

    class Gate(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sigmoid().detach()

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.first, self.gate, self.early = nn.Conv2d(3, 4, 3), self.Gate(4, 4, 1), early
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        x = x * self.scale if self.early else x
        return self.gate(x) * self.scale


@pytest.mark.parametrize(("early", "boundary"), [(True, "first"), (False, "gate")])
def test_prefix__ends_where_a_trainable_parameter_is_used(early: bool, boundary: str) -> None:
    network = freeze(Scale(early), "first", "gate")
    images = torch.randn(3, 3, 8, 8)
    assert find(network, images).boundary == boundary


class Containers(nn.Module):
    """The frozen part gives a dict with a tuple, a size, a constant table and something that nobody reads."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.register_buffer("table", torch.randn(4, 1, 1))

        def forward(self, images: Tensor) -> dict[str, Any]:
            x = self.conv(images)
            return {"pair": (x.mean(3), [x.amax(2)]), "size": x.shape[-2:], "table": self.table * 2, "unread": x}

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = self.Part(), nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        out = self.part(images)
        mean, (top,) = out["pair"]
        table = out["table"].add_(1)  # in place: the prefix has to keep its own
        return self.head((mean + top + table[..., 0] * out["size"][0]).mean(2))


def test_outputs__containers_keep_their_form() -> None:
    network = freeze(Containers(), "part")
    prefix = assert_same_training(network, torch.randn(7, 3, 8, 8))
    assert prefix.shapes == {"part-output0": (4, 8), "part-output1": (4, 8)}


class Windows(nn.Module):
    """Swin's trick: windows share the batch dimension. Attention's: tokens come first."""

    def __init__(self, tokens_first: bool) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(12, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.tokens_first = tokens_first

    def forward(self, images: Tensor) -> Tensor:
        batch = len(images)
        patches = images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(batch, 16, 12)
        tokens = patches.transpose(0, 1) if self.tokens_first else patches.reshape(batch * 4, 4, 12)
        tokens = self.mix(self.embed(tokens)).tanh()
        return self.head(tokens.mean(0) if self.tokens_first else tokens.reshape(batch, -1, 6).mean(1))


@pytest.mark.parametrize(("tokens_first", "shape"), [(False, (4, 4, 6)), (True, (16, 6))])
def test_features__are_one_row_per_image_wherever_the_batch_is(tokens_first: bool, shape: tuple[int, ...]) -> None:
    network = freeze(Windows(tokens_first), "embed")
    images = torch.randn(7, 3, 8, 8)
    prefix = assert_same_training(network, images)
    assert prefix.shapes == {"embed": shape}
    rows = prefix.extract(images)["embed"]
    assert torch.allclose(rows[4:5], prefix.extract(images[4:5])["embed"])
    assert rows.is_contiguous()


def test_batch_dimension__with_the_windows_outside_is_refused() -> None:
    """Rows ordered (window, image) instead of (image, window) are told by their values alone."""

    class WindowsOutside(Windows):
        def forward(self, images: Tensor) -> Tensor:
            tokens = images.reshape(len(images), 16, 12).reshape(-1, 4, 4, 12).transpose(0, 1).reshape(-1, 4, 12)
            return self.head(self.mix(self.embed(tokens)).reshape(4, len(images), 4, 6).mean((0, 2)))

    prefix, reason = find_prefix(freeze(WindowsOutside(False), "embed"), torch.randn(3, 3, 8, 8))
    assert prefix is None
    assert "'embed' of an image depend on the other images" in reason


@pytest.mark.parametrize("layout", ["conv", "network"])
def test_channels_last__is_kept(layout: str) -> None:
    network = freeze(build("test_resnet"), "conv1", "bn1", "layer1").to(memory_format=torch.channels_last)
    images = torch.randn(7, 3, 32, 32)
    if layout == "network":
        images = images.contiguous(memory_format=torch.channels_last)
    prefix = assert_same_training(network, images)
    seen: list[Tensor] = []
    network.layer2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with prefix.replay(prefix.extract(images)) as x:
        network(x)
    network(images)
    assert seen[0].stride() == seen[1].stride()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_autocast__features_are_bf16_and_training_is_the_same() -> None:
    network = freeze(build("test_vit", img_size=32), *VIT, "blocks.0")
    images = torch.randn(7, 3, 32, 32)

    def under_autocast(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)

        return run

    assert_same_training(network, images, under_autocast)


def test_autocast__around_the_search_loses_no_gradient() -> None:
    """Autocast keeps cast weights; those cast without a graph must not be there in the next forward."""
    network = freeze(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False)), "0")
    images = torch.randn(3, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            prefix = find(network, images)
            assert prefix.dtypes == {"0": torch.bfloat16}
            assert prefix.extract(images)["0"].dtype == torch.bfloat16
        network(images).sum().backward()
    assert network[1].weight.grad.abs().sum() > 0


def test_stored_dtype__is_cast_back_to_that_of_the_forward() -> None:
    network = freeze(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), "0")
    images = torch.randn(3, 3, 8, 8)
    prefix = find(network, images)
    rows = prefix.extract(images)["0"].half()
    with prefix.replay({"0": rows}) as x:
        output = network(x)
    assert torch.equal(output, network[1](rows.float()))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_validation__takes_any_batch_size_without_gradients(batch: int) -> None:
    kwargs, px, frozen = FAMILIES["swin_s3_tiny_224"]
    network = freeze(build("swin_s3_tiny_224", **kwargs), *frozen[1])
    images = torch.randn(5, 3, px, px)
    prefix = find(network, images[:2])
    network.eval()
    with torch.no_grad(), prefix.replay(prefix.extract(images[:batch])) as x:
        assert len(x) == batch
        assert torch.equal(network(x), network(images[:batch]))


def test_eval_caches__with_a_graph_do_not_break_the_search() -> None:
    """EfficientViT keeps its attention biases in eval mode, so a second backward would run through a freed graph."""
    network = freeze(build("efficientvit_m0", img_size=64), "patch_embed", "stages.0")
    network.eval()
    prefix = find(network, torch.randn(3, 3, 64, 64))
    assert prefix.boundary.startswith("stages.0")
    assert all(not getattr(module, "attention_bias_cache", None) for module in network.modules())


def test_checkpointing__recomputes_behind_the_boundary() -> None:
    network = freeze(build("test_vit", img_size=32), *VIT, "blocks.0", "blocks.1")
    network.set_grad_checkpointing()
    assert_same_training(network, torch.randn(7, 3, 32, 32))


class Module(pl.LightningModule):
    """Backbone and head, called in the ways people call them."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.backbone = build("test_resnet")
        self.head = nn.Linear(self.backbone.num_features, 2)

    def forward(self, images: Tensor) -> Tensor:
        if self.style == "forward_features":
            return self.head(self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True))
        if self.style == "no_grad":
            with torch.no_grad():
                features = self.backbone.forward_features(images)
            return self.head(features.mean((2, 3)))
        if self.style == "detached":
            return self.head(self.backbone.forward_features(images).detach().mean((2, 3)))
        if self.style == "normalised":
            images = (images - 0.5) / 0.2
        return self.head(self.backbone.forward_features(images).mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        x, y = batch
        if self.style == "normalised step":
            x = (x - 0.5) / 0.2
        return F.cross_entropy(self(x), y)


@pytest.mark.parametrize("style", ["forward_features", "plain", "normalised"])
@pytest.mark.parametrize("frozen", [["backbone"], ["backbone.conv1", "backbone.bn1", "backbone.layer1"]])
def test_lightning_module__is_a_network_too(style: str, frozen: list[str]) -> None:
    module = freeze(Module(style), *frozen)
    labels = torch.tensor([0, 1, 1, 0, 1, 1, 0])
    assert_same_training(module, torch.randn(7, 3, 32, 32), lambda m: lambda x: m.training_step((x, labels[: len(x)])))


@pytest.mark.parametrize("style", ["no_grad", "detached"])
def test_features__that_the_user_keeps_out_of_the_graph(style: str) -> None:
    assert_same_training(freeze(Module(style), "backbone"), torch.randn(7, 3, 32, 32))


def test_prefix__never_goes_past_a_trainable_layer_that_gets_no_gradient() -> None:
    """Not frozen is not constant: an average of weights, or weight decay, may still change it."""
    module = freeze(Module("no_grad"), *(f"backbone.layer{i}" for i in (1, 2, 3, 4)))
    module.backbone.bn1.eval()
    prefix, reason = find_prefix(module, torch.randn(3, 3, 32, 32))
    assert prefix is None
    assert "no module with frozen parameters finishes before" in reason


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "normalised": lambda x: (x - 0.45) / 0.225,
    "from bytes": lambda x: x.float() / 255,
    "smaller": lambda x: F.interpolate(x.float(), size=16),
}


@pytest.mark.parametrize("change", CHANGES)
def test_images__may_be_changed_on_their_way_in_the_same_way_each(change: str) -> None:
    network = freeze(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)), "0")
    images = torch.randint(0, 255, (7, 3, 24, 24), dtype=torch.uint8)
    images = images if change == "from bytes" else images.float()
    prefix, reason = find_prefix(network, images, lambda x: network(CHANGES[change](x)))
    assert prefix is not None, reason
    assert torch.equal(prefix.extract(images)[prefix.boundary], network[1](network[0](CHANGES[change](images))))
    with prefix.replay(prefix.extract(images)) as stand_in:
        assert stand_in.shape == images.shape and stand_in.dtype == images.dtype
        assert torch.equal(network(CHANGES[change](stand_in)), network(CHANGES[change](images)))
    for other in (lambda x: CHANGES[change](x).roll(1, 0), lambda x: CHANGES[change](x) * 0.5):
        with (
            pytest.raises(RuntimeError, match="changes the stored features on their way"),
            prefix.replay(prefix.extract(images)) as stand_in,
        ):
            network(other(stand_in))


@pytest.mark.parametrize(
    "change", [lambda x: x + torch.rand(1), lambda x: x - x.mean(), lambda x: 0.5 * (x + x.flip(0))]
)
def test_images__drawn_or_mixed_on_their_way_are_refused(change: Callable[[Tensor], Tensor]) -> None:
    network = freeze(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)), "0")
    prefix, reason = find_prefix(network, torch.randn(3, 3, 8, 8), lambda x: network(change(x)))
    assert prefix is None
    assert "no module is handed the images as they are: something changes them on their way" in reason


class Halve(nn.Module):
    """Writes in place; twice is not once."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5)


def test_step__may_enter_the_network_twice_with_one_batch() -> None:
    """Two passes with other dropout masks, as in R-Drop; in-place layers behind the boundary do not touch the batch."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Halve(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 2))
    assert_same_training(freeze(network, "0"), torch.randn(7, 3, 8, 8), lambda m: lambda x: m(x) - 2 * m(x))


@pytest.mark.parametrize("writes", [True, False], ids=["in place", "plain"])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "evaluation"])
def test_installed_batch__survives_what_writes_in_place_and_is_handed_on_uncopied_elsewhere(
    writes: bool, grad: bool
) -> None:
    """A batch of stored features is checked for changes, so it need not be copied where nothing behind writes."""
    network = freeze(nn.Sequential(nn.Conv2d(3, 4, 3), Halve() if writes else nn.ReLU(), nn.Conv2d(4, 2, 3)), "0")
    images = torch.randn(5, 3, 8, 8)
    prefix = find(network, images)
    expected, packed = network(images), prefix.pack(prefix.extract(images))
    before, seen = packed.clone(), []
    hook = network[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].data_ptr()))
    with torch.set_grad_enabled(grad):
        prefix.install(prefix.stand_in(packed))
        assert all(torch.equal(network(packed), expected) for _ in range(2))
        prefix.remove()
    hook.remove()
    assert torch.equal(packed, before)
    assert all((pointer == packed.data_ptr()) == (not writes) for pointer in seen)
    with prefix.replay({"0": packed}) as x:  # a user's own tensor, which nothing watches
        network(x)
    assert torch.equal(packed, before)


def test_installed_batch__that_is_written_to_only_after_the_search_is_not_read_again() -> None:
    class Late(nn.Module):
        late = False

        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(0.5) if self.late else x * 0.5

    network = freeze(nn.Sequential(nn.Conv2d(3, 4, 3), Late(), nn.Conv2d(4, 2, 3)), "0")
    images = torch.randn(5, 3, 8, 8)
    prefix = find(network, images)
    expected, features = network(images), prefix.extract(images)
    network[1].late = True
    packed = prefix.pack(features).clone()
    prefix.install(prefix.stand_in(packed))
    assert torch.equal(network(packed), expected)
    with pytest.raises(RuntimeError, match="changes the stored features"):
        network(packed)
    prefix.remove()
    with torch.inference_mode():  # no version to watch: a copy is handed on
        packed = prefix.pack(features).clone()
        prefix.install(prefix.stand_in(packed))
        assert all(torch.equal(network(packed), expected) for _ in range(2))
        prefix.remove()


def test_second_entry__before_the_features_were_read_raises() -> None:
    module = freeze(Module("forward_features"), "backbone")
    images = torch.randn(3, 3, 64, 64)
    prefix = find(module, images)
    assert prefix.boundary == "backbone.global_pool"
    with prefix.replay(prefix.extract(images)) as x:
        skipped = module.backbone.forward_features(x)  # without the head: the pool is never asked for the features
        assert skipped.isnan().all()
        with pytest.raises(RuntimeError, match="entered again before the features"):
            module(x)
        module.backbone.forward_head(skipped, pre_logits=True)
    assert_clean(module)


def test_replay__that_nobody_reads_raises() -> None:
    network = freeze(build("test_resnet"), "conv1", "bn1")
    images = torch.randn(3, 3, 32, 32)
    prefix = find(network, images)
    with pytest.raises(RuntimeError, match="never read"), prefix.replay(prefix.extract(images)):
        pass
    assert_clean(network)


def test_install__lets_images_pass() -> None:
    network = freeze(build("test_resnet"), "conv1", "bn1", "layer1").eval()
    images = torch.randn(3, 3, 32, 32)
    prefix = find(network, images)
    expected, features = network(images), prefix.pack(prefix.extract(images))
    prefix.install()
    assert all(torch.equal(network(x), expected) for x in (images, features, images, features))
    with pytest.raises(RuntimeError, match="installed already"):
        prefix.install()
    prefix.remove()
    prefix.remove()
    assert_clean(network)


def test_error__in_one_batch_does_not_spoil_the_next() -> None:
    network = freeze(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), "0")
    images = torch.randn(3, 3, 8, 8)
    prefix = find(network, images)
    packed, expected = prefix.pack(prefix.extract(images)), network(images)
    prefix.install()
    hook = network[0].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        network(packed)
    hook.remove()
    assert torch.equal(network(packed), expected)
    prefix.remove()


def assert_clean(network: nn.Module) -> None:
    assert [name for name, module in network.named_modules() if "forward" in module.__dict__] == []
    assert [name for name, module in network.named_modules() if "forward_features" in module.__dict__] == []


def test_remove__leaves_nothing_behind() -> None:
    network = freeze(build("test_resnet"), "conv1", "bn1", "layer1")
    images = torch.randn(3, 3, 32, 32)
    keys = list(network.state_dict())
    prefix = find(network, images)
    with prefix.replay(prefix.extract(images)) as x:
        assert list(network.state_dict()) == keys
        network(x)
    assert_clean(network)
    pickle.dumps(network)
    torch.save(copy.deepcopy(network), io.BytesIO())
    with pytest.raises(ZeroDivisionError), prefix.replay(prefix.extract(images)) as x:
        raise ZeroDivisionError
    assert_clean(network)


def test_remove__puts_back_a_forward_that_was_there() -> None:
    network = freeze(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), "0")
    mine = network.forward = lambda x: network[1](network[0](x)) * 2  # as Lightning leaves one after a step
    prefix = assert_find_and_replay(network, torch.randn(3, 3, 8, 8))
    assert network.forward is mine
    assert prefix.boundary == "0"


def assert_find_and_replay(network: nn.Module, images: Tensor) -> FrozenPrefix:
    prefix = find(network, images)
    with prefix.replay(prefix.extract(images)) as x:
        assert torch.equal(network(x), network(images))
    return prefix


def test_search__changes_nothing() -> None:
    network = freeze(build("test_efficientnet", drop_rate=0.2), "conv_stem", "bn1", "blocks.0")
    state = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    rng = torch.get_rng_state()
    find(network, torch.ones(3, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "frozen", "module", "boundary", "expected"),
    [
        (
            "test_resnet",
            ["conv1", "bn1", "layer1"],
            "bn1",
            "conv1",
            "'bn1' (BatchNorm2d) is frozen but normalises with",
        ),
        (
            "test_resnet",
            ["conv1", "bn1", "layer1"],
            "layer1.0.conv1",
            "bn1",
            "'layer1.0.conv1' (Conv2d) is frozen but in train",
        ),
        ("test_vit", [*VIT, "blocks.0"], "pos_drop", "patch_embed", "'pos_drop' (Dropout) is frozen but in train mode"),
    ],
)
def test_train_mode__ends_the_prefix_before_it(
    name: str, frozen: list[str], module: str, boundary: str, expected: str
) -> None:
    kwargs = {"img_size": 32, "pos_drop_rate": 0.1} if name == "test_vit" else {}
    network = freeze(build(name, **kwargs), *frozen)
    images = torch.randn(3, 3, 32, 32)
    network.get_submodule(module).eval()
    prefix = find(network, images)
    network.get_submodule(module).train()
    earlier, reason = find_prefix(network, images)
    assert earlier is not None and earlier.boundary == boundary
    assert expected in reason
    with pytest.raises(RuntimeError, match="is frozen but"):
        prefix.extract(images)


def test_batch_statistics__without_running_ones_end_the_prefix_before_them() -> None:
    network = freeze(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 3)), "0", "1"
    )
    prefix, reason = find_prefix(network, torch.randn(3, 3, 8, 8))
    assert prefix is not None and prefix.boundary == "0"
    assert "'1' (BatchNorm2d)" in reason


class Hidden(nn.Module):
    """What no module's class betrays: functional dropout, or batch statistics."""

    def __init__(self, noise: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.noise = noise

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.noise(self.first(images), self.training))).mean((2, 3))


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        (lambda x, training: F.dropout(x, 0.5, training), "not the same in train and in eval mode"),
        (lambda x, training: x - x.mean(0, keepdim=True), "depend on the other images"),
    ],
)
def test_features__that_are_not_of_the_image_alone_walk_the_boundary_back(noise: Any, expected: str) -> None:
    prefix, reason = find_prefix(freeze(Hidden(noise), "first", "second"), torch.randn(3, 3, 8, 8))
    assert prefix is not None
    assert prefix.boundary == "first"
    assert expected in reason


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        (["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"], "depends on a trainable parameter"),
        (["layer1", "layer2", "layer3", "layer4"], "no module with frozen parameters finishes before"),
    ],
)
def test_nothing_to_store__is_said(frozen: list[str], expected: str) -> None:
    network = freeze(build("test_resnet"), *frozen)
    prefix, reason = find_prefix(network, torch.randn(3, 3, 32, 32), lambda x: network(x).mean())
    assert prefix is None
    assert expected in reason


def test_tower__that_is_frozen_as_a_whole_gives_its_output() -> None:
    tower = freeze(build("test_resnet"), "conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")
    images = torch.randn(5, 3, 32, 32)
    prefix, reason = find_prefix(tower, images)
    assert prefix is not None and prefix.boundary == "network", reason
    with prefix.replay(prefix.extract(images)) as features:
        assert torch.equal(tower(features), tower.eval()(images))


def test_adapters__in_the_top_blocks_end_the_prefix_below_them() -> None:
    """Low-rank adapters beside frozen layers: the norms of those blocks are frozen and in train mode."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    network = build("test_vit", img_size=32).requires_grad_(False)
    depth = len(network.blocks)
    network.head.requires_grad_(True)
    for block in network.blocks[-2:]:
        block.attn.qkv = Adapted(block.attn.qkv)
    for part in (network.patch_embed, network.pos_drop, *network.blocks[:-2]):
        part.eval()
    prefix, reason = find_prefix(network, torch.randn(7, 3, 32, 32))  # compared with the plain forward, bitwise
    assert prefix is not None and prefix.boundary == f"blocks.{depth - 3}"
    assert f"'blocks.{depth - 2}.norm1' (LayerNorm) is frozen but in train mode" in reason


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints__of_the_frozen_part_and_of_what_trains() -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self[0], x, use_reentrant=True).detach()
            return self[2](checkpoint(self[1], x.requires_grad_(torch.is_grad_enabled()), use_reentrant=True))

    parts = [nn.Conv2d(3, 4, 3), nn.Sequential(nn.Flatten(), nn.Linear(144, 8)), nn.Linear(8, 2)]
    network = freeze(Checkpointed(*parts), "0")
    assert find(network, torch.randn(7, 3, 8, 8)).boundary == "0"


def test_trainable_position_embedding__ends_the_prefix_before_it() -> None:
    network = freeze(build("test_vit", img_size=32), "patch_embed", "cls_token", "blocks", "norm")
    assert assert_same_training(network, torch.randn(7, 3, 32, 32)).boundary == "patch_embed"


def test_verify__sees_features_that_are_not_the_network_s() -> None:
    network = freeze(build("test_resnet"), "conv1", "bn1", "layer1")
    images = torch.randn(3, 3, 32, 32)
    prefix = find(network, images)
    assert verify(prefix, images) == ""
    extract = prefix.extract
    prefix.extract = lambda x: {key: rows + 1e-6 for key, rows in extract(x).items()}  # type: ignore[method-assign]
    assert "is not that of the plain forward (it is another one)" in verify(prefix, images)


def test_verify__sees_gradients_that_differ_where_the_output_does_not() -> None:
    """The rest reads an early activation in a way that only the gradient shows."""

    class ZeroWithAGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor, early: Tensor) -> Tensor:
            ctx.slope = torch.nan_to_num(early.detach()).mean()
            return weight.new_zeros(())

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            return gradient.sum() * ctx.slope.expand(2), None

    network = Skip(lambda early, images: early)
    network.read = lambda early, images: ZeroWithAGradient.apply(network.head.bias, early)
    prefix, reason = find_prefix(freeze(network, "first", "second"), torch.randn(3, 3, 8, 8))
    assert prefix is not None
    assert prefix.boundary == "first"
    assert "the gradient of head.bias in training is not that of the plain forward" in reason


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "hrnet_w18_small"])
def test_advance__equals_extract_at_the_later_boundary(name: str) -> None:
    stages = {
        "test_resnet": (["conv1", "bn1"], ["layer1", "layer2.0.conv1"], ["layer2", "layer3", "layer4"]),
        "test_vit": (VIT, ["blocks.0", "blocks.1"], ["blocks", "norm"]),
        "hrnet_w18_small": (
            ["conv1", "bn1", "conv2", "bn2", "layer1"],
            ["transition1", "stage2"],
            ["transition2", "stage3"],
        ),
    }[name]
    network = build(name, **({"img_size": 32} if name == "test_vit" else {}))
    images = torch.randn(4, 3, 32, 32)
    frozen: list[str] = []
    previous, features = None, {}
    for names in stages:
        frozen += names
        freeze(network, *frozen)
        prefix = find(network, images)
        expected = prefix.extract(images)
        features = advance(features, previous, prefix) if previous else expected
        assert features.keys() == expected.keys()
        assert all(torch.equal(features[key], rows) for key, rows in expected.items())
        previous = prefix
    assert_clean(network)


def test_extract__of_images_of_another_size_raises() -> None:
    network = freeze(build("test_resnet"), "conv1", "bn1", "layer1")
    prefix = find(network, torch.randn(3, 3, 32, 32))
    with pytest.raises(ValueError, match=r"found with images of \(3, 32, 32\)"):
        prefix.extract(torch.randn(3, 3, 64, 64))


def test_pack__of_other_features_raises() -> None:
    network = freeze(build("test_resnet"), "conv1", "bn1", "layer1")
    prefix = find(network, torch.randn(3, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\['layer2'\] were passed; this prefix has \['layer1'\]"):
        prefix.pack({"layer2": torch.zeros(1)})


def test_fingerprint__knows_parameters_buffers_and_position_embeddings_but_not_the_head() -> None:
    def of(network: nn.Module) -> str:
        return prefix_fingerprint(find(network, torch.ones(3, 3, 32, 32)))

    resnet = freeze(build("test_resnet"), "conv1", "bn1", "layer1")
    vit = freeze(build("test_vit", img_size=32), *VIT, "blocks.0")
    before, vit_before = of(resnet), of(vit)
    assert of(copy.deepcopy(resnet)) == before
    resnet.layer2[0].conv1.weight.data[0] += 1
    resnet.fc.weight.data[0] += 1
    vit.head.weight.data[0] += 1
    assert (of(resnet), of(vit)) == (before, vit_before)
    for tensor in (resnet.bn1.running_var, resnet.bn1.num_batches_tracked, resnet.layer1[0].conv1.weight.data):
        kept = tensor.clone()
        tensor.view(-1)[0] += 1
        assert of(resnet) != before
        tensor.copy_(kept)
    assert of(resnet) == before
    vit.pos_embed.data[0, 0, 0] += 1
    assert of(vit) != vit_before
    assert of(freeze(resnet, "conv1", "bn1")) != before
