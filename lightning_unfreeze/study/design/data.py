"""The images of one seed of a study: what trains, what validates, and the test images that all seeds share."""

from __future__ import annotations

from collections import ChainMap
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Subset

from lightning_unfreeze.data.base import ClassificationData
from lightning_unfreeze.data.datasets import ImageDataset, transform_of
from lightning_unfreeze.data.loaders import EpochSampler, KeyedDataset, ResumableLoader
from lightning_unfreeze.data.transforms import make_transform
from lightning_unfreeze.seeding import key_to_seed


class StudyData(pl.LightningDataModule):
    """Draws a seed's training and validation images from another data module's; the test images stay the same.

    With `ImageFolderData` or `DigitsData` each seed splits the images that are no test images anew, class by class.
    Where there is no `test/`, the validation folder is the test set, and nothing but the last look of a run sees it.
    Any other data module gives a train, a val and a test loader; a seed then draws from its training data alone.

    Order and augmentation are functions of (seed, epoch, index), so arms of one seed share them, however long their
    stages are.

    Args:
        base: The data module.
        seed: Of split, order and augmentation.
        train_size: Training images; None takes all.
        val_fraction: Share of the images that validate, where they are drawn here.
        augment: False for the arm without augmentation.

    Attributes:
        train_indices: Of the training images among those that are no test images.
        val_indices: Of the validation images, empty where the data module has its own.

    Raises:
        ValueError: For an impossible size.
    """

    def __init__(
        self,
        base: pl.LightningDataModule,
        seed: int,
        train_size: int | None = None,
        val_fraction: float = 0.2,
        augment: bool = True,
    ) -> None:
        super().__init__()
        if train_size is not None and train_size < 2:
            raise ValueError(f"train_size={train_size}: give 2 or more images, or nothing for all.")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction}: give a share between 0 and 1, both excluded.")
        self.base, self.seed, self.train_size = base, seed, train_size
        self.val_fraction, self.augment = val_fraction, augment
        self._is_ready = False
        self._collate: dict[str, dict[str, Any]] = {}
        self.train_indices: list[int] = []
        self.val_indices: list[int] = []

    def prepare_data(self) -> None:
        """Let the data module download what it needs."""
        self.base.prepare_data()

    def setup(self, stage: str) -> None:
        """Draw the seed's images.

        Raises:
            MisconfigurationException: Where there is no set that nothing but the last look sees.
        """
        if self._is_ready:
            return
        self.base.trainer = self.trainer
        self.base.setup("fit")
        if isinstance(self.base, ClassificationData):
            self._split_images()
        else:
            self._take_loaders()
        for name in ("num_classes", "class_names"):
            if hasattr(self.base, name):
                setattr(self, name, getattr(self.base, name))
        self._is_ready = True

    def _split_images(self) -> None:
        base: Any = self.base
        try:
            test, parts = base.dataset("test"), [base.dataset("train"), base.dataset("val")]
        except MisconfigurationException:
            test, parts = base.dataset("val"), [base.dataset("train")]
        images = [image for part in parts for image in part.images]
        targets = [target for part in parts for target in part.targets]
        rest, val = train_test_split(
            np.arange(len(images)), test_size=self.val_fraction, stratify=targets, random_state=self._draw("val")
        )
        if self.train_size is not None and self.train_size < len(rest):
            rest, _ = train_test_split(
                rest,
                train_size=self.train_size,
                stratify=[targets[index] for index in rest],
                random_state=self._draw("train"),
            )
        self.train_indices, self.val_indices = sorted(rest.tolist()), sorted(val.tolist())
        # not `dataset("train", ...)` itself: it holds the images of one split, and a seed mixes two
        augmented = make_transform(base.data_config, base.augmentation if self.augment else "none")

        def chosen(indices: list[int], transform: Any, cache: Any) -> ImageDataset:
            return ImageDataset(
                [images[index] for index in indices],
                [targets[index] for index in indices],
                transform,
                test.reading,
                cache,
            )

        self._num_drawn_from = len(images)
        # augmented, photos of a validation folder are read anew: they are kept smaller than a random crop needs
        self._train: Any = chosen(self.train_indices, augmented, parts[0].cache)
        decoded: list[Any] = [part.cache for part in parts if part.cache is not None]
        self._val: Any = chosen(self.val_indices, parts[0].transform, ChainMap(*decoded) if decoded else None)
        self._test: Any = test
        self._options = {"batch_size": base.batch_size, "num_workers": base.num_workers}

    def _take_loaders(self) -> None:
        if not self.augment:
            raise MisconfigurationException(
                f"the arm no_aug needs ImageFolderData or DigitsData, which know their training images without "
                f"augmentation; {type(self.base).__name__} does not. Leave no_aug out."
            )
        self.base.setup("test")
        loaders: dict[str, Any] = {
            split: getattr(self.base, f"{split}_dataloader")() for split in ("train", "val", "test")
        }
        missing = [split for split, loader in loaders.items() if not isinstance(loader, DataLoader)]
        if missing:
            raise MisconfigurationException(
                f"a study needs a train, a val and a test loader with a dataset, {type(self.base).__name__} lacks "
                f"{', '.join(missing)}: tuning and the time to the target use val, and test is looked at once."
            )
        train: Any = loaders["train"].dataset
        train = train.dataset if isinstance(train, KeyedDataset) else train
        order = np.random.default_rng(self._draw("train")).permutation(len(train))
        self.train_indices = sorted(order[: self.train_size].tolist())
        self._train = Subset(train, self.train_indices)
        self._num_drawn_from = len(train)
        self._val, self._test = loaders["val"].dataset, loaders["test"].dataset
        self._options = {
            "batch_size": _batch_size(loaders["train"]),
            "num_workers": loaders["train"].num_workers,
        }
        self._collate = {split: {"collate_fn": loader.collate_fn} for split, loader in loaders.items()}

    def _draw(self, what: str) -> int:
        return key_to_seed("study", what, self.seed) % 2**32

    @property
    def overlap(self) -> float:
        """Share of this seed's training images that another seed draws too, on average."""
        return len(self.train_indices) / self._num_drawn_from

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of the images that the network gets, without that of the batch; empty where there are none."""
        leaves = tree_leaves(next(iter(self.val_dataloader())))
        found = [tuple(leaf.shape[1:]) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim == 4]
        return found[0] if found else ()

    @property
    def num_val(self) -> int:
        """Validation images."""
        return len(self._val)

    @property
    def num_test(self) -> int:
        """Test images."""
        return len(self._test)

    @property
    def train_transform(self) -> Any:
        """What is done to a training image; None where the data does not say."""
        return transform_of(self._train)

    def train_dataloader(self) -> ResumableLoader:
        """Training images of the seed, in an order and under an augmentation keyed by (seed, epoch, index)."""
        data = KeyedDataset(self._train, seed=self.seed)
        sampler = EpochSampler(data, seed=self.seed)
        # BatchNorm cannot train on a last batch of one image
        alone = len(data) > 1 and len(data) % self._options["batch_size"] == 1
        return ResumableLoader(
            data, sampler=sampler, drop_last=alone, **self._options, **self._collate.get("train", {})
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation images in order."""
        return DataLoader(self._val, **self._options, **self._collate.get("val", {}))

    def test_dataloader(self) -> DataLoader[Any]:
        """The test images in order, the same for all seeds."""
        return DataLoader(self._test, **self._options, **self._collate.get("test", {}))


def _batch_size(loader: DataLoader[Any]) -> int:
    """Return the images of a batch, also of a loader with a batch sampler of its own.

    Raises:
        MisconfigurationException: Where it does not say.
    """
    found = loader.batch_size or getattr(loader.batch_sampler or loader.sampler, "batch_size", None)
    if not isinstance(found, int):
        raise MisconfigurationException(
            "a study draws its own batches, and the train loader does not say how large: give it a batch_size."
        )
    return found
