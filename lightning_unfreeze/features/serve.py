"""Between a user's loader and the feature store: views of the images in, whole batches in the user's form out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_unfreeze.data.datasets import nested_datasets, transform_of
from lightning_unfreeze.data.loaders import EpochBatchSampler, EpochSampler, KeyedDataset, ResumableLoader
from lightning_unfreeze.features.batch_form import BatchForm, NoStoreError
from lightning_unfreeze.features.key import dataset_fingerprint, fingerprint_of, transform_fingerprint
from lightning_unfreeze.features.prefix import FrozenPrefix
from lightning_unfreeze.features.store import FeatureStore
from lightning_unfreeze.seeding import keyed_rng

_DRAWS = 4

# --- the user's loader -----------------------------------------------------------------------------------------------


def check_loader(loader: Any) -> DataLoader[Any]:
    """The loader, if its samples can be stored one by one and its batches made of stored rows.

    Raises:
        NoStoreError: For anything else, with the reason.
    """
    if not isinstance(loader, DataLoader):
        raise NoStoreError(f"the data is a {type(loader).__name__}, not a single DataLoader")
    if isinstance(loader.dataset, IterableDataset):
        raise NoStoreError(f"{type(loader.dataset).__name__} is an iterable dataset: its samples have no index")
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        own = type(loader.sampler if loader.batch_sampler is None else loader.batch_sampler).__name__
        raise NoStoreError(f"the loader's batches are made by its own {own}, not from a batch_size and a sampler")
    sampler = loader.sampler
    if isinstance(sampler, DistributedSampler) and type(sampler) not in (DistributedSampler, EpochSampler):
        raise NoStoreError(f"{type(sampler).__name__} shares the rows out among the ranks in a way of its own")
    if not len(loader.dataset):  # type: ignore[arg-type]
        raise NoStoreError("the data is empty")
    return loader


def plain_dataset(loader: DataLoader[Any]) -> Any:
    """The loader's dataset without what keys its random numbers by epoch."""
    return loader.dataset.dataset if isinstance(loader.dataset, KeyedDataset) else loader.dataset


def evaluation_transform(train: Any, val: Any) -> Callable[[Any], Any] | None:
    """The `transform` of the validation data, where the training data has one that it can take the place of; else None.

    Raises:
        NoStoreError: If the training data has a transform, and none to replace it is to be found.
    """
    if transform_of(train) is None:
        return None
    found = None if val is None else transform_of(val)
    if found is None:
        raise NoStoreError(
            "the training data has a transform that may be random, and the validation data has none to take its place; "
            "pass PrecomputeFeatures(eval_transform=...)"
        )
    return found


def probe_batch(loader: DataLoader[Any], view_0: Any, num_images: int) -> tuple[Any, BatchForm]:
    """A collated batch of the first images under the evaluation transform, and its form.

    Raises:
        NoStoreError: If a sample or the collate function draws at random, or samples are mixed.
    """
    rows = range(min(num_images, len(view_0)))
    with keyed_rng("probe"):
        samples = [view_0[row] for row in rows]
        raw = loader.collate_fn(samples)
    with keyed_rng("another draw"):
        again = [view_0[row] for row in rows]  # all of them: a coin may fall the same way twice
    if not _same(samples, again):
        raise NoStoreError(
            f"the images of {type(view_0).__name__} are drawn at random even under the evaluation transform, and "
            "stored features would keep one draw; augment in the dataset's `transform`, or pass "
            "PrecomputeFeatures(eval_transform=...)"
        )
    form = BatchForm(raw)
    together = form.split(raw)
    # a sample has to get the same row whatever else is in the batch, and each time: mixup may leave out a batch or two
    for draw in range(_DRAWS):
        with keyed_rng("collate", draw):
            same = _same(together, form.split(loader.collate_fn(samples)))
            i = draw % len(samples)
            images, beside = form.split(loader.collate_fn([samples[i]]))
        own = (together[0][i : i + 1], {name: value[i : i + 1] for name, value in together[1].items()})
        if not same or not _same(own, (images, beside)):
            raise NoStoreError("the collate function mixes the samples, or draws at random")
    return raw, form


def _same(one: Any, other: Any) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else np.array_equal(a, b) for a, b in pairs)


# --- what is stored ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViewedData:
    """What is stored: the views of a dataset, and how its samples are read and batched.

    Attributes:
        name: `"train"` or `"val"`.
        loader: Gives collate function, batch size and workers.
        views: The dataset with the transform of each view, view 0 first.
        raw: A collated batch.
        form: How a batch of the loader is built.
        step_form: How a batch is built that the step gets, after the transfer hooks.
        seed: Seed of random views.
        fingerprint: The user's own word for what the data is.
    """

    name: str
    loader: DataLoader[Any]
    views: Sequence[Any]
    raw: Any
    form: BatchForm
    step_form: BatchForm
    seed: int
    fingerprint: str | None = None

    def key(self) -> str:
        """Fingerprint of samples, transforms and views."""
        return fingerprint_of(
            data=dataset_fingerprint(self.views[0], fingerprint=self.fingerprint),
            transforms=[_callables_fingerprint(view) for view in self.views],
            collate=transform_fingerprint(self.loader.collate_fn),
            seed=self.seed if len(self.views) > 1 else None,
        )


def _callables_fingerprint(dataset: Any) -> str:
    """Fingerprint of the transforms, target transforms, image readers a dataset and those it wraps have."""
    return fingerprint_of(
        callables=[
            [level, name, transform_fingerprint(value)]
            for level, each in enumerate(nested_datasets(dataset))
            for name, value in sorted(getattr(each, "__dict__", {}).items())
            if callable(value) or (isinstance(value, list | tuple) and value and all(map(callable, value)))
        ]
    )


# --- the pass over the images ----------------------------------------------------------------------------------------


class ViewDataset(Dataset[tuple[int, Any]]):
    """Samples of one view with their row: a function of (seed, view, row), whatever runs beside or before.

    Args:
        dataset: The user's, without a `KeyedDataset` around it.
        seed: Seed of the augmentation.
        view: Number of the view.
        rows: The rows to read, in order.
    """

    def __init__(self, dataset: Any, seed: int, view: int, rows: Tensor) -> None:
        self.dataset, self.seed, self.view, self.rows = dataset, seed, view, rows

    def __getitem__(self, position: int) -> tuple[int, Any]:
        row = int(self.rows[position])
        with keyed_rng("view", self.seed, self.view, row):
            return row, self.dataset[row]

    def __getitems__(self, positions: list[int]) -> list[tuple[int, Any]]:
        """A batch at once, as a DataLoader asks where it can.

        View 0 was seen to draw nothing (`probe_batch`); seeding it once a batch saves 0.1 ms an image.
        """
        if self.view:
            return [self[position] for position in positions]
        rows = self.rows[positions].tolist()
        with keyed_rng("view", self.seed, 0, *rows):
            return [(row, self.dataset[row]) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class _WithRows:
    """The user's collate function on samples that carry their row."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, samples: list[tuple[int, Any]]) -> tuple[Tensor, Any]:
        return torch.tensor([row for row, _ in samples]), self.collate([sample for _, sample in samples])


def view_batches(loader: DataLoader[Any], dataset: Any, seed: int, view: int, rows: Tensor) -> Iterator[Any]:
    """Pairs of rows `(B,)` and the collated batch of those samples, read as `loader` reads."""
    size = loader.batch_size or 1
    few = len(rows) <= size  # not worth the start of worker processes
    return iter(
        DataLoader(
            ViewDataset(dataset, seed, view, rows),
            batch_size=size,
            collate_fn=_WithRows(loader.collate_fn),
            num_workers=0 if few else loader.num_workers,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=None if few else loader.multiprocessing_context,
            generator=torch.Generator(),  # so that nothing is drawn from the global one
        )
    )


# --- batches from the store ------------------------------------------------------------------------------------------


class FeatureDataset(Dataset[Any]):
    """Whole batches from a store, in the user's form: indexed by a list of rows.

    Args:
        store: Features and what lies beside the images.
        form: The user's batch.
        prefix: What the features are of.
    """

    def __init__(self, store: FeatureStore, form: BatchForm, prefix: FrozenPrefix) -> None:
        self.store, self.form, self.prefix = store, form, prefix
        self.view = 0

    def __getitem__(self, rows: list[int]) -> Any:
        beside = self.store.read(torch.tensor(rows, dtype=torch.int64), self.view)
        features = {name: beside.pop(name) for name in self.prefix.shapes}
        return self.form.join(self.prefix.pack(features), beside)

    def __len__(self) -> int:
        return self.store.layout.num_rows


class _RowBatches(BatchSampler):
    """Batches of the rows that a sampler of the user's chooses; told of the epoch if the sampler wants to be."""

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def feature_loader(
    loader: DataLoader[Any], dataset: FeatureDataset, batch_size: int | None, seed: int
) -> DataLoader[Any]:
    """A loader of stored batches in the order in which `loader` would have given them.

    The order of an `EpochSampler` is kept exactly; where the loader shuffles, the order is one of (seed, epoch); a
    sampler of the user's goes on choosing the rows.
    """
    size, sampler, drop_last = batch_size or loader.batch_size or 1, loader.sampler, loader.drop_last
    drop_tail, weights = False, getattr(sampler, "weights", None)
    if isinstance(sampler, DistributedSampler):
        shuffle, seed, drop_tail = sampler.shuffle, sampler.seed, sampler.drop_last
    elif isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == len(dataset):
        shuffle = True
    elif isinstance(sampler, SequentialSampler):
        shuffle = False
    else:
        rows = _RowBatches(sampler, size, drop_last)
        return DataLoader(dataset, batch_size=None, sampler=rows, pin_memory=loader.pin_memory)
    order = EpochBatchSampler(
        dataset, size, shuffle=shuffle, seed=seed, drop_last=drop_last, drop_tail=drop_tail, weights=weights
    )
    return ResumableLoader(dataset, batch_size=None, sampler=order, pin_memory=loader.pin_memory)
