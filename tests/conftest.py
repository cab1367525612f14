"""What the tests share: small modules as users write them, data, and a quiet Trainer."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_unfreeze.data.loaders import EpochSampler, KeyedDataset, ResumableLoader

torch.set_num_threads(1)

SHARED = Path(__file__).parents[1].resolve().parent / "shared"


@pytest.fixture
def shared_data() -> Path:
    """Real photos and real weights; absent on most machines."""
    folder = Path(os.environ.get("LIGHTNING_UNFREEZE_DATA", SHARED / "data"))
    if not folder.is_dir():
        pytest.skip(f"the real photos and weights are not at {folder}")
    return folder


@pytest.fixture(autouse=True)
def pictures_are_not_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit that saves its figures spends most of its time with them: they are drawn where a test looks at one."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr(Figure, "savefig", _save_no_picture)


def _save_no_picture(figure: Figure, file: Any, **options: Any) -> None:
    if hasattr(file, "write"):
        file.write(b"picture")
    else:
        Path(file).write_bytes(b"picture")


@pytest.fixture(autouse=True)
def no_process_group_stays() -> Iterator[None]:
    """A Trainer with one DDP process in this one leaves its process group to the end of the interpreter."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class SmallNet(nn.Module):
    """Convolution, BatchNorm and dropout in both parts, as in real backbones."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2)),
            nn.AdaptiveAvgPool2d(1),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(6, num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


class UserModule(pl.LightningModule):
    """A LightningModule written without this package: its own step, AdamW with decay and no-decay groups."""

    def __init__(self, net: nn.Module | None = None, optimizer: str = "adamw") -> None:
        super().__init__()
        self.net = SmallNet() if net is None else net
        self.backbone, self.head = getattr(self.net, "backbone", None), getattr(self.net, "head", None)
        self.optimizer = optimizer
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.net(x)
        self.log("val_loss", nn.functional.cross_entropy(logits, y))
        self.log("val_acc", (logits.argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        decay = [p for p in self.parameters() if p.ndim > 1]
        no_decay = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": no_decay, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-2)


def random_images(num: int = 24, size_px: int = 12, num_classes: int = 3, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num, 3, size_px, size_px, generator=generator)
    return TensorDataset(images, torch.randint(num_classes, (num,), generator=generator))


def loader(dataset: Any = None, batch_size: int = 8, shuffle: bool = False, **options: Any) -> DataLoader[Any]:
    return DataLoader(
        random_images() if dataset is None else dataset, batch_size=batch_size, shuffle=shuffle, **options
    )


def keyed_loader(dataset: Any = None, batch_size: int = 8, seed: int = 3) -> ResumableLoader:
    """Shuffled; order and augmentation are functions of the epoch, the same global batches on any number of ranks."""
    data = KeyedDataset(random_images() if dataset is None else dataset, seed=0)
    return ResumableLoader(data, batch_size=batch_size, sampler=EpochSampler(data, seed=seed))


def steady_module(train_bn: bool = False, kind: type[UserModule] = UserModule) -> UserModule:
    """Without draws, and without statistics of a batch: nothing that depends on how many ranks share a batch."""
    module = kind(SmallNet(), optimizer="sgd")
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.BatchNorm2d):
            part.train(train_bn)
    return module


def quiet_trainer(callbacks: list[Callback], **options: Any) -> pl.Trainer:
    """A Trainer on one CPU process that writes nothing."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "GPU available but not used")
        return pl.Trainer(callbacks=callbacks, **{**defaults, **options})


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names whose values are not bitwise equal; empty means equal."""
    return sorted(
        name
        for name in {*left, *right}
        if name not in left or name not in right or not torch.equal(left[name], right[name])
    )
