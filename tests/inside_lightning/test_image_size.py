"""Stages of other image sizes: loaders, range test, store, network and resume follow; what cannot be is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_unfreeze import GradualUnfreeze, LRFinderPerStage, PrecomputeFeatures, Stage
from lightning_unfreeze.inside_lightning.image_size import accept_any_image_size
from tests.zoo import SmallNet, UserModule, quiet_trainer, random_images, same_weights, weights_of


class Resizable(pl.LightningDataModule):
    """Images of 16 px unless told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.px = 16

    def set_image_size(self, px: int | None) -> None:
        self.px = px or 16

    def _loader(self) -> DataLoader[Any]:
        images, labels = random_images(12, 64).tensors
        small = nn.functional.interpolate(images, size=(self.px, self.px), mode="area")
        return DataLoader(TensorDataset(small, labels), batch_size=4)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader()


class Watching(UserModule):
    """Notes the side of the images of each training and validation step."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(net)
        self.sides: list[int] = []
        self.val_sides: list[int] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.sides.append(batch[0].shape[-1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_sides.append(batch[0].shape[-1])
        super().validation_step(batch, batch_idx)


PLAN = [
    Stage("small", train="head", epochs=1, image_size_px=12),
    Stage("own", epochs=1),
    Stage("large", epochs=2, image_size_px=24),
]


def test_image_size__is_that_of_the_stage_in_training_and_validation() -> None:
    module, data = Watching(), Resizable()
    quiet_trainer([GradualUnfreeze(PLAN)], num_sanity_val_steps=1).fit(module, datamodule=data)
    assert module.sides == [12] * 3 + [16] * 3 + [24] * 6
    assert module.val_sides == [12, *module.sides]  # the sanity validation, and one after each epoch
    assert data.px == 16  # for test and predict


def test_image_size__leaves_no_trace_where_it_is_that_of_the_data() -> None:
    """The network's step on two images of each size, before the fit, moves no weight, statistic or random number."""
    both = []
    for px in (None, 16):
        torch.manual_seed(0)
        module = Watching()
        quiet_trainer([GradualUnfreeze([Stage("full", epochs=2, image_size_px=px)])]).fit(
            module, datamodule=Resizable()
        )
        both.append(weights_of(module))
    assert same_weights(*both) == []


@pytest.mark.filterwarnings("ignore:stage .* no signal")
def test_image_size__is_followed_by_range_test_and_store(tmp_path: Path) -> None:
    module = Watching()
    finder, store = LRFinderPerStage(num_steps=20), PrecomputeFeatures(tmp_path, policy="always")
    tested: list[int] = []
    module.net.register_forward_pre_hook(lambda _, images: tested.append(images[0].shape[-1]))
    plan = [
        Stage("stored", train="head", epochs=2, precompute=True, image_size_px=20),
        Stage("found", epochs=1, lr="find", image_size_px=28),
    ]
    quiet_trainer([GradualUnfreeze(plan), finder, store]).fit(module, datamodule=Resizable())
    assert {20, 28} <= set(tested) and tested.count(28) > 20 and 16 not in tested
    assert len(list(tmp_path.glob("*-train"))) == 1


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_image_size__of_a_resumed_stage_is_its_own(tmp_path: Path) -> None:
    def fit(folder: str, ckpt_path: Path | None = None) -> Watching:
        torch.manual_seed(0)
        module, checkpoints = Watching(), ModelCheckpoint(tmp_path / folder, "{epoch}", save_top_k=-1)
        trainer = quiet_trainer([GradualUnfreeze(PLAN), checkpoints], enable_checkpointing=True)
        trainer.fit(module, datamodule=Resizable(), ckpt_path=ckpt_path)
        return module

    whole = fit("whole")
    for epoch, sides in ((0, [16] * 3 + [24] * 6), (1, [24] * 6), (2, [24] * 3)):
        resumed = fit(f"from_{epoch}", tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert resumed.sides == sides
        assert same_weights(weights_of(whole), weights_of(resumed)) == []


# --- networks with a position table ----------------------------------------------------------------------------------


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=3, img_size=32, **options)


def test_accept_any_image_size__is_timms_dynamic_img_size() -> None:
    ours, theirs = vit().eval(), vit(dynamic_img_size=True).eval()
    theirs.load_state_dict(ours.state_dict())
    at_32 = torch.randn(2, 3, 32, 32)
    before = ours(at_32)
    accept_any_image_size(ours)
    with torch.no_grad():
        assert torch.equal(ours(at_32), before)
        for px in (16, 48, 64):
            images = torch.randn(2, 3, px, px)
            assert torch.equal(ours(images), theirs(images))


def test_image_size__of_a_vit_resamples_its_positions_and_keeps_its_table() -> None:
    module = Watching(nn.Sequential(vit()))
    shape = module.net[0].pos_embed.shape
    plan = [Stage("small", epochs=1, image_size_px=16), Stage("large", epochs=1, image_size_px=48)]
    quiet_trainer([GradualUnfreeze(plan, network="net.0")]).fit(module, datamodule=Resizable())
    assert module.sides == [16] * 3 + [48] * 3
    assert module.net[0].pos_embed.shape == shape


# --- refused before anything is trained ------------------------------------------------------------------------------


class Fixed(Resizable):
    set_image_size = None  # type: ignore[assignment]


@pytest.mark.parametrize(("data", "words"), [(None, "plain loaders cannot"), (Fixed(), "Fixed cannot")])
def test_image_size__that_nobody_can_set_is_refused(data: Any, words: str) -> None:
    trainer, loaders = quiet_trainer([GradualUnfreeze(PLAN)]), [] if data else [DataLoader(random_images(), 4)] * 2
    with pytest.raises(
        MisconfigurationException, match=rf"stage 'small' has image_size_px=12, and {words}.*set_image_size"
    ):
        trainer.fit(Watching(), *loaders, datamodule=data)


@pytest.mark.parametrize(
    ("net", "px"),
    [
        (SmallNet(), 3),  # smaller than two convolutions with a stride
        (nn.Sequential(vit()), 20),  # no multiple of 16
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.Linear(8, 3)), 32),  # made for one size
    ],
)
def test_image_size__that_the_network_refuses_is_an_error_at_the_start(net: nn.Module, px: int) -> None:
    module = Watching(net)
    plan = [Stage("first", epochs=1), Stage("wrong", epochs=1, image_size_px=px)]
    network = (
        "net.0"
        if isinstance(net[0] if isinstance(net, nn.Sequential) else net, timm.models.VisionTransformer)
        else "net"
    )
    with pytest.raises(
        MisconfigurationException, match=rf"stage 'wrong': image_size_px={px} is a size that the network"
    ):
        quiet_trainer([GradualUnfreeze(plan, network=network)]).fit(module, datamodule=Resizable())
    assert module.sides == []
