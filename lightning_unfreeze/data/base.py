"""What the data modules share: the network's input, the transforms, the loaders, and what a classifier asks them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from timm.data import resolve_data_config, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lightning_unfreeze.data.datasets import ImageDataset
from lightning_unfreeze.data.images import Reading
from lightning_unfreeze.data.labels import balanced_weights, counts_of
from lightning_unfreeze.data.loaders import EpochSampler, KeyedDataset, ResumableLoader
from lightning_unfreeze.data.transforms import Augmentation, make_transform

Split = Literal["train", "val", "test"]


class ClassificationData(pl.LightningDataModule):
    """What the data modules share: the backbone's data config, the transforms and the loaders.

    Attributes:
        multi_label: Whether an image may have several labels; after `setup`.
    """

    multi_label = False

    def __init__(
        self,
        batch_size: int,
        image_size_px: int | None,
        data_config: dict[str, Any] | None,
        augmentation: Augmentation,
        seed: int,
        num_workers: int,
        sampler: Literal["shuffle", "balanced"] = "shuffle",
        reading: Reading | None = None,
    ) -> None:
        super().__init__()
        check_least(batch_size=(batch_size, 1), image_size_px=(image_size_px, 1), num_workers=(num_workers, 0))
        check_choice("augmentation", augmentation, Augmentation)
        check_choice("sampler", sampler, Literal["shuffle", "balanced"])
        self.batch_size, self.image_size_px, self.augmentation = batch_size, image_size_px, augmentation
        self.seed, self.num_workers, self.sampler = seed, num_workers, sampler
        self._given = (image_size_px, batch_size)
        self._given_config, self._reading = data_config, reading or Reading()
        self._class_names: list[str] | None = None
        self._samples: dict[str, tuple[Sequence[Any], Any]] = {}

    # --- what a classifier asks --------------------------------------------------------------------------------------

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the labels.

        Raises:
            RuntimeError: Before `setup`.
        """
        if self._class_names is None:
            raise RuntimeError("The classes are known after setup('fit'): call it first.")
        return list(self._class_names)

    @property
    def num_classes(self) -> int:
        """Number of classes, or of labels where an image may have several, after `setup`."""
        return len(self.class_names)

    @property
    def num_labels(self) -> int | None:
        """Number of labels where an image may have several of them, else None; after `setup`."""
        return self.num_classes if self.multi_label else None

    def order_classes(self, names: Sequence[str]) -> None:
        """Number the classes as `names` does, e.g. in the order of a trained model's outputs; after `setup`.

        Args:
            names: All classes of the data, and others if need be.
        """
        place = {name: i for i, name in enumerate(names)}
        places = [place[name] for name in self.class_names]
        for split in self._samples.keys() - {"predict"}:
            images, targets = self._samples[split]
            if isinstance(targets, Tensor):
                moved = targets.new_zeros(len(targets), len(names))
                moved[:, places] = targets
                self._samples[split] = (images, moved)
            else:
                self._samples[split] = (images, [places[label] for label in targets])
        self._class_names = list(names)

    @property
    def class_counts(self) -> list[int]:
        """Training images of each class, in the order of the labels, after `setup`."""
        counts: list[int] = counts_of(self._of_split("train")[1], self.num_classes).tolist()
        return counts

    @property
    def num_train_images(self) -> int:
        """Training images, after `setup`."""
        return len(self._of_split("train")[0])

    def paths(self, split: Split | Literal["predict"]) -> list[str]:
        """The files of a split in the order of its loader (of the training data: in the order of the indices)."""
        return [str(image) for image in self._of_split(split)[0]]

    @property
    def data_config(self) -> dict[str, Any]:
        """Size and normalisation of the input: as given, else the module's, else its timm model's, else ImageNet's.

        The number of channels is that of the network; where mean and std are for another number, the mean of them
        stands for one channel, and they are repeated for more, as timm does with the weights.
        """
        config: dict[str, Any] = resolve_data_config({}, pretrained_cfg={"interpolation": "bilinear"})
        given = self._given_config or {}
        module = self.trainer.lightning_module if self.trainer is not None else None
        if module is not None:
            networks = [part for part in module.modules() if hasattr(part, "pretrained_cfg")]
            own = resolve_model_data_config(networks[0]) if networks else {}
            config |= getattr(module, "data_config", own)
        config |= given
        channels = config["input_size"][0]
        if module is not None and "input_size" not in given:
            channels = _channels_of(module) or channels
        size = config["input_size"][1:] if self.image_size_px is None else (self.image_size_px, self.image_size_px)
        config["input_size"] = (channels, *size)
        for name in ("mean", "std"):
            config[name] = _for_channels(config[name], channels)
        return config

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return int(self.data_config["input_size"][0])

    def prepared_for(self, data_config: dict[str, Any]) -> ClassificationData:
        """The same images for another network: a copy with its size and normalisation, after `setup`."""
        copied = copy.copy(self)
        copied._given_config = data_config
        return copied

    def set_image_size(self, px: int | None, batch_size: int | None = None) -> None:
        """Side of the square input, and images per batch, of the loaders that are asked for from now on.

        Args:
            px: In pixels; None for what was given at first.
            batch_size: None for what was given at first.

        Raises:
            ValueError: For an impossible number.
        """
        check_least(image_size_px=(px, 1), batch_size=(batch_size, 1))
        self.image_size_px, self.batch_size = px or self._given[0], batch_size or self._given[1]

    # --- the loaders -------------------------------------------------------------------------------------------------

    def dataset(self, split: Split | Literal["predict"], augmentation: Augmentation = "none") -> ImageDataset:
        """The images of a split, after `setup`, under the transform of `augmentation`.

        Args:
            split: `train`, `val`, `test`, or `predict`.
            augmentation: As for `make_transform`.

        Raises:
            MisconfigurationException: Where there is no such split.
        """
        images, targets = self._of_split(split)
        transform = make_transform(self.data_config, augmentation)
        return ImageDataset(images, targets, transform, self.reading, self._decoded_images(split))

    def _decoded_images(self, split: str) -> Any:
        return None

    @property
    def reading(self) -> Reading:
        """How files are read, in the channels of the network."""
        return self._reading.with_channels(self.in_chans)

    def _of_split(self, split: str) -> tuple[Sequence[Any], Any]:
        if split not in self._samples:
            raise MisconfigurationException(f"There is no {split} data: {self._how_to_get(split)}")
        return self._samples[split]

    def _how_to_get(self, split: str) -> str:
        return "call setup('fit') first."

    def train_dataloader(self) -> ResumableLoader:
        """Augmented images in an order that follows from (seed, epoch), resumable at any batch."""
        data = KeyedDataset(self.dataset("train", self.augmentation), seed=self.seed)
        weights = None
        if self.sampler == "balanced":
            weights = balanced_weights(self._of_split("train")[1], torch.tensor(self.class_counts))
        sampler = EpochSampler(data, seed=self.seed, weights=weights)
        # BatchNorm cannot train on a last batch of one image
        alone = len(sampler) > 1 and len(sampler) % self.batch_size == 1
        return ResumableLoader(data, sampler=sampler, drop_last=alone, **self._loader_arguments())

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation images in order."""
        return DataLoader(self.dataset("val"), **self._loader_arguments())

    def test_dataloader(self) -> DataLoader[Any]:
        """The test images in order."""
        return DataLoader(self.dataset("test"), **self._loader_arguments())

    def predict_dataloader(self) -> DataLoader[Any]:
        """The images to predict in order, as `(image, path)`."""
        return DataLoader(self.dataset("predict"), **self._loader_arguments())

    def _loader_arguments(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def _bar(self, found: Iterable[Any], total: int, text: str) -> Iterable[Any]:
        """A progress bar, where the Trainer shows its own, for passes that take longer than a second."""
        trainer = self.trainer
        hidden = trainer is not None and not (trainer.is_global_zero and trainer.progress_bar_callback is not None)
        bar: Iterable[Any] = tqdm(found, desc=text, total=total, unit="file", delay=1.0, leave=False, disable=hidden)
        return bar


def _channels_of(module: nn.Module) -> int | None:
    """Channels that the network's first convolution takes; None for a network without any."""
    first = next((layer for layer in module.modules() if isinstance(layer, nn.Conv2d)), None)
    return None if first is None else first.in_channels


def _for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) if channels == 1 else tuple(values[i % len(values)] for i in range(channels))


def check_least(**values: tuple[int | None, int]) -> None:
    """Raises a ValueError for the first number (None is no number) that is less than the least that goes with it."""
    for name, (value, least) in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value}: give {least} or more.")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises a ValueError for a value that is none of a `Literal`."""
    if value not in choices.__args__:
        raise ValueError(f"{name}={value!r}: give one of {', '.join(choices.__args__)}.")
