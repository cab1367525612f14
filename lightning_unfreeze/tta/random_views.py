"""Random views of a sample by the training augmentation, each a function of seed, view and index."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from lightning_unfreeze.data.datasets import innermost_dataset, transform_of, with_transform
from lightning_unfreeze.seeding import keyed_rng


class DrawingLoader:
    """An evaluation loader that can draw random views beside its batches, from images that are decoded once.

    Its batches are those of the user's loader. Between `start` and `stop` they are read from a copy of that loader, in
    worker processes of its own, whose dataset also draws; the user's loader and dataset are not changed. Everything
    else is asked of the user's loader.

    Args:
        loader: The user's, with what Lightning has added.

    Attributes:
        loader: The same.
        current: While drawing, the batch that was handed out last and its draws `(N, V, channels, H, W)`; else None.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.current: tuple[Any, Tensor] | None = None
        self._drawing: DataLoader[Any] | None = None

    def start(self, augmentation: Callable[[Any], Tensor], num_views: int, seed: int) -> None:
        """Lets the next iteration draw `num_views` views of each sample.

        Raises:
            MisconfigurationException: For data without a `transform`.
        """
        drawing = copy.copy(self.loader)
        # a DataLoader refuses another dataset by assignment; workers that already run hold copies of the old one
        vars(drawing).update(
            dataset=_DrawingDataset(self.loader.dataset, augmentation, num_views, seed),
            collate_fn=_CollateBoth(self.loader.collate_fn),
            persistent_workers=False,
        )
        self._drawing = drawing

    def stop(self) -> None:
        """Lets the next iteration be of the user's loader alone."""
        self._drawing = self.current = None

    def __iter__(self) -> Iterator[Any]:
        # A generator: it starts at the first `next`. Lightning (2.6) calls `iter` before the epoch's start hooks.
        if self._drawing is None:
            yield from self.loader
        else:
            for batch, draws in self._drawing:
                self.current = batch, draws
                yield batch

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # of an object that is being copied
            raise AttributeError(name)
        return getattr(self.loader, name)


class _DrawingDataset(Dataset[tuple[Any, Tensor]]):
    """Pairs of a sample and its V draws `(V, channels, H, W)`."""

    def __init__(self, dataset: Any, augmentation: Callable[[Any], Tensor], num_views: int, seed: int) -> None:
        plain = transform_of(dataset)
        if plain is None:
            raise MisconfigurationException(
                "views='random' draws where the `transform` of the evaluated data is called, and "
                f"{type(innermost_dataset(dataset)).__name__} has none; use a torchvision dataset with a transform, "
                "give yours that attribute, or use deterministic views"
            )
        self.transform = _DrawingTransform(plain, augmentation, num_views, seed)
        self.dataset = with_transform(dataset, self.transform)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        self.transform.index, self.transform.draws = index, None
        sample = self.dataset[index]
        if self.transform.draws is None:
            raise MisconfigurationException(
                f"views='random': {type(innermost_dataset(self.dataset)).__name__} has a `transform` and does not call "
                "it on its images; use deterministic views"
            )
        return sample, self.transform.draws

    def __len__(self) -> int:
        return len(self.dataset)


class _DrawingTransform:
    """The evaluation transform, which keeps V draws of the same image aside."""

    def __init__(
        self, plain: Callable[[Any], Any], augmentation: Callable[[Any], Tensor], num_views: int, seed: int
    ) -> None:
        self.plain, self.augmentation, self.num_views, self.seed = plain, augmentation, num_views, seed
        self.index = 0
        self.draws: Tensor | None = None

    def __call__(self, image: Any) -> Any:
        output, draws = self.plain(image), []
        for view in range(self.num_views):
            with keyed_rng("tta", self.seed, view, self.index):
                draws.append(self.augmentation(image))
        self.draws = torch.stack(draws)
        return output


class _CollateBoth:
    """The user's collate function on the samples; draws are stacked."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[tuple[Any, Tensor]]) -> tuple[Any, Tensor]:
        return self.collate([sample for sample, _ in rows]), torch.stack([draws for _, draws in rows])


def start_drawing(loaders: Iterable[Any], augmentation: Callable[[Any], Tensor], num_views: int, seed: int) -> None:
    """Lets each loader draw beside its batches.

    Raises:
        MisconfigurationException: For a loader whose order is not known.
    """
    for loader in loaders:
        if not isinstance(loader, DrawingLoader):
            raise MisconfigurationException(
                "views='random' draws each sample by its index, and the order of this loader is not known; use a "
                "map-style dataset in a DataLoader without shuffling, or deterministic views"
            )
        loader.start(augmentation, num_views, seed)


def drawn_views(loader: DrawingLoader, images: Tensor, *, check: bool) -> list[Callable[[Tensor], Tensor]]:
    """The draws beside the batch that `loader` handed out last, as views of `images`, which the network was given.

    Raises:
        MisconfigurationException: With `check`, where `images` are not what the loader gave.
    """
    if loader.current is None:
        raise RuntimeError("the batch was read before the random draws were started")
    batch, draws = loader.current
    if check:
        given = [leaf.to(images) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        if not any(torch.equal(leaf, images) for leaf in given):
            raise MisconfigurationException(
                "views='random' draws in the dataset, and between the loader and the network the images are changed "
                "(in the step, or in a batch-transfer hook), which the draws would miss; move that into the dataset's "
                "transform or into the network's forward, or use deterministic views"
            )
    drawn = draws.to(images.device, images.dtype, non_blocking=True)
    return [functools.partial(_take, drawn[:, view]) for view in range(drawn.shape[1])]


def _take(drawn: Tensor, images: Tensor) -> Tensor:
    return drawn


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
