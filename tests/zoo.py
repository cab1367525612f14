"""The zoo: small modules as users write them, data, callbacks, and a quiet Trainer, for all tests.

A class that shows one special fault stands beside its test.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_unfreeze.data.loaders import EpochSampler, KeyedDataset, ResumableLoader

# --- modules ---------------------------------------------------------------------------------------------------------


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

    backbone: Any
    head: Any

    def __init__(self, net: nn.Module | None = None, optimizer: str = "adamw") -> None:
        super().__init__()
        self.net = SmallNet() if net is None else net
        for name in ("backbone", "head"):
            if hasattr(self.net, name):
                setattr(self, name, getattr(self.net, name))
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


class Evaluated(UserModule):
    """One that can be tested, and predicts logits."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0])


class LogsByEpoch(UserModule):
    """Validation values by epoch, whatever the weights; after the last of them it stays. Counts its validations."""

    def __init__(self, values: Sequence[float], *names: str) -> None:
        super().__init__()
        self.values, self.names = values, names or ("val_loss",)
        self.validated: list[int] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict(dict.fromkeys(self.names, self.values[min(self.current_epoch, len(self.values) - 1)]))

    def on_validation_epoch_end(self) -> None:
        self.validated.append(self.current_epoch)


class TwoOptimizers(UserModule):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.backbone, self.head)]


class UsesLBFGS(UserModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


def steady_module(train_bn: bool = False, kind: type[UserModule] = UserModule) -> UserModule:
    """Without draws, and without statistics of a batch: nothing that depends on how many ranks share a batch."""
    module = kind(SmallNet(), optimizer="sgd")
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.BatchNorm2d):
            part.train(train_bn)
    return module


# --- data ------------------------------------------------------------------------------------------------------------


def random_images(num: int = 24, size_px: int = 12, num_classes: int = 3, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num, 3, size_px, size_px, generator=generator)
    return TensorDataset(images, torch.randint(num_classes, (num,), generator=generator))


class Images(Dataset[Any]):
    """A dataset with a transform, as torchvision's have."""

    def __init__(self, transform: Callable[[Any], Any] | None = None, tensors: TensorDataset | None = None) -> None:
        self.images, self.targets = (random_images() if tensors is None else tensors).tensors
        self.transform = transform

    def __getitem__(self, index: int) -> Any:
        image = self.images[index]
        return image if self.transform is None else self.transform(image), self.targets[index]

    def __len__(self) -> int:
        return len(self.images)


class Stream(IterableDataset[Any]):
    """Samples without a length."""

    def __init__(self, samples: Iterable[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


class TrainData(pl.LightningDataModule):
    """A data module of one loader."""

    def __init__(self, train: Any) -> None:
        super().__init__()
        self.train = train

    def train_dataloader(self) -> Any:
        return self.train


def loader(dataset: Any = None, batch_size: int = 8, shuffle: bool = False, **options: Any) -> DataLoader[Any]:
    return DataLoader(
        random_images() if dataset is None else dataset, batch_size=batch_size, shuffle=shuffle, **options
    )


def keyed_loader(dataset: Any = None, batch_size: int = 8, seed: int = 3) -> ResumableLoader:
    """Shuffled; order and augmentation are functions of the epoch, the same global batches on any number of ranks."""
    data = KeyedDataset(random_images() if dataset is None else dataset, seed=0)
    return ResumableLoader(data, batch_size=batch_size, sampler=EpochSampler(data, seed=seed))


# --- training --------------------------------------------------------------------------------------------------------


class Does(Callback):
    """A callback of the hooks that are given: `Does(on_train_end=lambda trainer, module: ...)`."""

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        for name, action in hooks.items():
            assert callable(getattr(self, name)), f"Lightning has no hook {name}"
            setattr(self, name, action)


class Saves(Callback):
    """Saves at the points that are asked for, into the file that `checkpoint_at` names: (hook, epoch, batch).

    The hook is `batch_end`, `epoch_end` or `validation_end`; None stands for every epoch, and every batch.
    """

    def __init__(self, folder: Path, *points: tuple[str, int | None, int | None]) -> None:
        self.folder, self.points = folder, points

    def save(self, trainer: pl.Trainer, hook: str, batch: int | None = None) -> None:
        here = (hook, trainer.current_epoch, batch)
        if any(all(asked in (None, one) for asked, one in zip(point, here, strict=True)) for point in self.points):
            trainer.save_checkpoint(checkpoint_at(self.folder, *here))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer, "epoch_end")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer, "validation_end")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.save(trainer, "batch_end", batch_idx)


def checkpoint_at(folder: Path, hook: str, epoch: int, batch: int | None = None) -> Path:
    return folder / f"{hook}-{epoch}-{batch}.ckpt"


class Raises(Callback):
    """Raises at the start of the training step with this number."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise self.error


class StopsAfter(Callback):
    """Stops the fit at the end of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or trainer.current_epoch == self.epoch


class KeepsWeights(Callback):
    """The weights at each call of a hook, e.g. `on_validation_end`."""

    def __init__(self, hook: str) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        assert callable(getattr(self, hook)), f"Lightning has no hook {hook}"
        setattr(self, hook, lambda trainer, module, *_: self.weights.append(weights_of(module)))


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
