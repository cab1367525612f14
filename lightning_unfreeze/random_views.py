"""Random views of a sample by the training augmentation, each a function of seed, view and index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from lightning_unfreeze.datasets import innermost_dataset, transform_of, with_transform
from lightning_unfreeze.seeding import keyed_rng


class _Draws:
    """A transform that draws V views of one decoded image, each a function of seed, view and index."""

    def __init__(self, augmentation: Callable[[Any], Tensor], num_views: int, seed: int) -> None:
        self.augmentation, self.num_views, self.seed, self.index = augmentation, num_views, seed, 0

    def __call__(self, image: Any) -> Tensor:
        views = []
        for view in range(self.num_views):
            with keyed_rng("tta", self.seed, view, self.index):
                views.append(self.augmentation(image))
        return torch.stack(views)


class RandomViews(Dataset[Tensor]):
    """The V draws `(V, channels, H, W)` of each sample of a dataset with a `transform`; an image is decoded once."""

    def __init__(self, dataset: Any, augmentation: Callable[[Any], Tensor], num_views: int, seed: int) -> None:
        self.draws = _Draws(augmentation, num_views, seed)
        if transform_of(dataset) is None:
            raise MisconfigurationException(
                "views='random' swaps the `transform` of the evaluated data, and "
                f"{type(innermost_dataset(dataset)).__name__} has none; use a torchvision dataset with a transform, "
                "give yours that attribute, or use deterministic views"
            )
        self.dataset = with_transform(dataset, self.draws)

    def __getitem__(self, index: int) -> Tensor:
        self.draws.index = index
        leaves: list[Any] = tree_leaves(self.dataset[index])
        return next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim == 4)

    def __len__(self) -> int:
        return len(self.dataset)


def training_augmentation(trainer: pl.Trainer) -> Callable[[Any], Tensor]:
    """The `transform` of the training dataset.

    Raises:
        MisconfigurationException: Where there is no training data here, or it has no transform.
    """
    hint = "pass it: TTAEval(views='random', augmentation=train_transform)"
    loader: Any = trainer.train_dataloader
    datamodule: pl.LightningDataModule | None = getattr(trainer, "datamodule", None)
    if loader is None and datamodule is not None:
        try:
            loader = datamodule.train_dataloader()
        except Exception as error:
            raise MisconfigurationException(
                f"views='random' needs the training augmentation, and the datamodule gives no training data here "
                f"({error!r}); {hint}"
            ) from error
    transform = transform_of(getattr(loader, "dataset", None))
    if transform is None:
        raise MisconfigurationException(
            f"views='random' needs the training augmentation, and no training data with a `transform` is here; {hint}"
        )
    return transform
