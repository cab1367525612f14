"""What the reproductions share: CIFAR-10 at 16 px, a small network, and a source model from half of the classes."""

from __future__ import annotations

import csv
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_unfreeze import CosineRestarts, GradualUnfreeze, Stage
from lightning_unfreeze.data.loaders import EpochSampler, ResumableLoader
from lightning_unfreeze.seeding import keyed_rng
from lightning_unfreeze.study.design.shifts import SHIFTS

CHANNELS = (16, 32, 64, 64, 64)
DIGITS_NOTE = "digits: a smoke test of the script; it says nothing about the science"
Transform = Callable[[Tensor], Tensor]


# --- images ----------------------------------------------------------------------------------------------------------


class Images(Dataset[tuple[Tensor, int]]):
    """Normalised images `(C, H, W)` in memory, with their labels.

    Args:
        images: `(N, C, H, W)`.
        labels: `(N,)`.
        transform: Of each image.
    """

    def __init__(self, images: Tensor, labels: Sequence[int], transform: Transform) -> None:
        self.images, self.labels, self.transform = images, list(labels), transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]

    def __len__(self) -> int:
        return len(self.labels)


def as_is(image: Tensor) -> Tensor:
    """The evaluation transform: `PrecomputeFeatures` reads training images with it too."""
    return image


@dataclass(frozen=True)
class Data:
    """Images `(N, C, H, W)`, normalised per channel with the training images' statistics, and labels of ten classes."""

    images: Mapping[str, Tensor]
    labels: Mapping[str, np.ndarray]
    flip: bool

    def of_classes(
        self,
        part: str,
        classes: Sequence[int],
        per_class: int | None = None,
        skip: int = 0,
        transform: Transform = as_is,
    ) -> Images:
        """Return images of some classes, labelled by their place: of each all, or `per_class` after the first `skip`.

        Args:
            part: `train` or `test`.
            classes: The classes, in the order of their new labels.
            per_class: Images of a class; None takes all.
            skip: Images of a class that are left out.
            transform: As for `Images`.
        """
        found = [np.flatnonzero(self.labels[part] == label)[skip:][:per_class] for label in classes]
        places = np.repeat(np.arange(len(classes)), [len(indices) for indices in found])
        return Images(self.images[part][np.concatenate(found)], places.tolist(), transform)

    @property
    def num_channels(self) -> int:
        """Channels of an image."""
        return self.images["train"].shape[1]

    def augment(self, image: Tensor) -> Tensor:
        """Pad by 2 px, cut out at random, and mirror half of the images where a mirror image is one of the class."""
        height, width = image.shape[-2:]
        top, left, mirrored = torch.randint(10, (3,)).tolist()
        top, left = top % 5, left % 5
        image = nn.functional.pad(image, (2, 2, 2, 2))[..., top : top + height, left : left + width]
        return image.flip(-1) if self.flip and mirrored < 5 else image

    def augment_and_corrupt(self, image: Tensor) -> Tensor:
        """The same, and each of the study's shifts for a fifth of the images."""
        shift = [None, *SHIFTS.values()][int(torch.randint(len(SHIFTS) + 1, ()))]
        image = self.augment(image)
        return image if shift is None else shift(image[None])[0]


def load(source: str) -> Data:
    """Return the data of an npz file, of torchvision's CIFAR-10, or the digits.

    The npz file holds `x_train` and `x_test` (N, H, W, 3) of uint8, `y_train` and `y_test`.

    Args:
        source: `digits` (for smoke tests), `cifar10` (downloaded to `~/.cache`, averaged to 16 px), or the npz file.
    """
    if source == "digits":
        print(DIGITS_NOTE)
        digits = load_digits()
        is_test = np.arange(len(digits.target)) % 3 == 0
        arrays = {"x_train": digits.images[~is_test, ..., None], "x_test": digits.images[is_test, ..., None]}
        arrays |= {"y_train": digits.target[~is_test], "y_test": digits.target[is_test]}
    elif source == "cifar10":
        arrays = _torchvision_cifar10()
    else:
        with np.load(source) as file:
            arrays = {name: file[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    mean, sd = (getattr(arrays["x_train"], f)((0, 1, 2)).astype(np.float32) for f in ("mean", "std"))
    images = {
        part: torch.from_numpy(((arrays[f"x_{part}"] - mean) / sd).astype(np.float32).transpose(0, 3, 1, 2).copy())
        for part in ("train", "test")
    }
    return Data(images, {part: arrays[f"y_{part}"] for part in ("train", "test")}, flip=source != "digits")


def _torchvision_cifar10() -> dict[str, np.ndarray]:
    from torchvision.datasets import CIFAR10

    arrays: dict[str, np.ndarray] = {}
    for part in ("train", "test"):
        found = CIFAR10(str(Path.home() / ".cache" / "cifar10"), train=part == "train", download=True)
        blocks = found.data.reshape(-1, 16, 2, 16, 2, 3).astype(np.float32)
        arrays[f"x_{part}"] = np.rint(blocks.mean((2, 4))).astype(np.uint8)
        arrays[f"y_{part}"] = np.asarray(found.targets)
    return arrays


def halves(split: int = 0) -> tuple[list[int], list[int]]:
    """Return two random halves of the ten classes."""
    order = np.random.RandomState(100 + split).permutation(10).tolist()
    return order[:5], order[5:]


# --- network ---------------------------------------------------------------------------------------------------------


class TinyCNN(pl.LightningModule):
    """Five blocks of convolution, BatchNorm and ReLU, pooled after the first three; SGD as the pilot study had it.

    Args:
        num_classes: Outputs.
        in_channels: Channels of an image.
        augment: Of each image of a training batch, where the dataset does not do it.
        peak_lr: Of the optimizer, where no stage gives a rate.
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, augment: Transform | None = None, peak_lr: float = 0.05
    ) -> None:
        super().__init__()
        sizes = (in_channels, *CHANNELS)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(sizes[i], sizes[i + 1], 3, padding=1, bias=False),
                    nn.BatchNorm2d(sizes[i + 1]),
                    nn.ReLU(),
                    nn.MaxPool2d(2) if i < 3 else nn.Identity(),
                )
                for i in range(5)
            )
        )
        self.head = nn.Linear(CHANNELS[-1], num_classes)
        self.augment, self.peak_lr = augment, peak_lr
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # up to twice as fast on a CPU

    def layer_groups(self) -> dict[str, nn.Module]:
        """The blocks, and the head."""
        return {**{f"block{i + 1}": block for i, block in enumerate(self.blocks)}, "head": self.head}

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.blocks(images).mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        images, labels = batch
        if self.augment is not None:
            images = torch.stack([self.augment(image) for image in images])
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD over all parameters."""
        return torch.optim.SGD(self.parameters(), self.peak_lr, momentum=0.9, weight_decay=1e-4)


def train(module: TinyCNN, images: Images, epochs: int, seed: int, batch_size: int, frozen: int = 0) -> None:
    """Train all but the first `frozen` blocks in one cosine cycle, a quarter of it warm-up."""
    stage = Stage("train", list(module.layer_groups())[frozen:], cycle_len=epochs)
    trainer = _quiet_trainer([GradualUnfreeze([stage]), CosineRestarts(warmup=0.25)])
    with keyed_rng("train", seed):
        sampler = EpochSampler(images, seed=seed)
        trainer.fit(module, ResumableLoader(images, batch_size=batch_size, sampler=sampler, drop_last=True))


def accuracy(module: TinyCNN, images: Images) -> float:
    """Return the accuracy in percent."""
    (found,) = _quiet_trainer([]).validate(module, DataLoader(images, batch_size=1000), verbose=False)
    return 100 * found["val_acc"]


def _quiet_trainer(callbacks: list[pl.Callback]) -> pl.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


# --- a study that starts from half of the classes ---------------------------------------------------------------------


@dataclass(frozen=True)
class Transfer:
    """A source model from half of the classes, and what a `Study` of the other half needs.

    Args:
        data: As for `load`.
        out: Folder; the source model is trained once and kept there.
        source_epochs: Epochs of the source model.
        corruptions: Corrupt the source's training images, so that its features are good under shifts too.
        source_per_class: Training images of the source model; None takes all.
        val_per_class: Validation images, the first of each class in the training set.
        test_per_class: Test images; None takes all.
        batch_size: Of the target's training.
    """

    data: str
    out: Path
    source_epochs: int = 15
    corruptions: bool = False
    source_per_class: int | None = None
    val_per_class: int = 200
    test_per_class: int | None = None
    batch_size: int = 64

    @cached_property
    def loaded(self) -> Data:
        """The images."""
        return load(self.data)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The source model's blocks."""
        name = "-".join(map(str, (self.source_epochs, self.source_per_class, self.corruptions)))
        path = self.out / f"source-{name}.safetensors"
        if not path.exists():
            classes = halves()[0]
            augment = self.loaded.augment_and_corrupt if self.corruptions else self.loaded.augment
            with keyed_rng("init", 0):
                module = TinyCNN(len(classes), self.loaded.num_channels, augment)
            source = self.loaded.of_classes("train", classes, self.source_per_class)
            train(module, source, self.source_epochs, seed=0, batch_size=2 * self.batch_size)
            print(f"source model: {accuracy(module, self.loaded.of_classes('test', classes)):.1f} %", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            state = module.state_dict()
            save_file({key: state[key].contiguous() for key in state if key.startswith("blocks")}, path)
        return load_file(path)

    @property
    def model_fn(self) -> Named:
        """Makes the module."""

        def make(pretrained: bool = True) -> TinyCNN:
            module = TinyCNN(len(halves()[1]), self.loaded.num_channels)
            if pretrained:
                module.load_state_dict(self.weights, strict=False)
            return module

        return Named("TinyCNN", vars(self), make)

    @property
    def datamodule_fn(self) -> Named:
        """Makes the data module."""

        def make() -> TargetData:
            return TargetData(self.loaded, self.val_per_class, self.test_per_class, self.batch_size)

        return Named("TargetData", vars(self), make)


class Named:
    """A function that a `Study` knows by what it was made from, so that it goes on only with the same one."""

    def __init__(self, name: str, arguments: Mapping[str, Any], function: Callable[..., Any]) -> None:
        self.spec = {
            name: {key: str(value) for key, value in arguments.items() if key not in ("out", "loaded", "weights")}
        }
        self.function = function

    def __call__(self, **options: Any) -> Any:
        return self.function(**options)


class TargetData(pl.LightningDataModule):
    """The second half of the classes: images to draw from, fixed validation images, and the whole test set."""

    def __init__(self, data: Data, val_per_class: int, test_per_class: int | None, batch_size: int) -> None:
        super().__init__()
        self.data, self.batch_size = data, batch_size
        self.val_per_class, self.test_per_class = val_per_class, test_per_class

    def train_dataloader(self) -> DataLoader[Any]:
        """All training images that do not validate; a seed of the study draws from them."""
        data = self.data.of_classes("train", halves()[1], skip=self.val_per_class, transform=self.data.augment)
        return DataLoader(data, self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """The first training images of each class, without augmentation."""
        return DataLoader(self.data.of_classes("train", halves()[1], self.val_per_class), self.batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test images."""
        return DataLoader(self.data.of_classes("test", halves()[1], self.test_per_class), self.batch_size)


# --- tables ----------------------------------------------------------------------------------------------------------


def write_table(rows: Sequence[Mapping[str, Any]], path: Path, note: str = "") -> str:
    """Write rows of one shape as `PATH.csv` and `PATH.md`, and return the latter's text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    text = "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), *(["", note] if note else [])]) + "\n"
    path.with_suffix(".md").write_text(text)
    return text
