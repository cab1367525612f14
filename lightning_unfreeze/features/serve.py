"""Between a user's loader and the feature store: views of the images in, whole batches in the user's form out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
    Sampler,
    SequentialSampler,
)

from lightning_unfreeze.data.datasets import nested_datasets, transform_of
from lightning_unfreeze.data.loaders import EpochBatchSampler, EpochSampler, KeyedDataset, ResumableLoader
from lightning_unfreeze.features.batch_form import BatchForm, NoStoreError
from lightning_unfreeze.features.describe import NotUnderstoodError
from lightning_unfreeze.features.key import dataset_fingerprint, fingerprint_of, transform_fingerprint
from lightning_unfreeze.features.prefix import FrozenPrefix
from lightning_unfreeze.features.resident import ResidentStore
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
    if loader.batch_sampler is None and not isinstance(loader.sampler, BatchSampler | EpochBatchSampler):
        raise NoStoreError(
            f"with batch_size=None {type(loader.sampler).__name__} has to give lists of rows, as "
            "torch's BatchSampler does"
        )
    sampler = loader.sampler
    known = (DistributedSampler, EpochSampler, EpochBatchSampler)
    if isinstance(sampler, DistributedSampler) and type(sampler) not in known:
        raise NoStoreError(f"{type(sampler).__name__} shares the rows out among the ranks in a way of its own")
    if not len(loader.dataset):  # type: ignore[arg-type]
        raise NoStoreError("the data is empty")
    return loader


def is_own_batching(loader: DataLoader[Any]) -> bool:
    """Whether the user's own batch sampler chooses the rows of each batch, so that there is no one batch size."""
    return loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler


def pass_size(loader: DataLoader[Any]) -> int:
    """How many images the pass over the data takes at once."""
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    return int(loader.batch_size or getattr(sampler, "batch_size", None) or 32)


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
    rows = list(range(min(num_images, len(view_0))))
    read, collate = _reader(loader, view_0), loader.collate_fn
    with keyed_rng("probe"):
        samples = read(rows)
        raw = collate(samples)
    with keyed_rng("another draw"):
        again = read(rows)  # all of them: a coin may fall the same way twice
    if not _same(samples, again):
        raise NoStoreError(
            f"the images of {type(view_0).__name__} are drawn at random even under the evaluation transform, and "
            "stored features would keep one draw; augment in the dataset's `transform`, or pass "
            "PrecomputeFeatures(eval_transform=...)"
        )
    form = BatchForm(raw)
    # a sample has to get the same row whatever else is in the batch, and each time: mixup may leave out a batch or two
    for draw in range(_DRAWS):
        with keyed_rng("collate", draw):
            same = _holds(form, raw, collate(read(rows)))
            i = draw % len(rows)
            own = collate(read([i]))
        if not same or not _holds(form, raw, own, [i]):
            raise NoStoreError("the collate function mixes the samples, or draws at random")
    return raw, form


def probe_feed(
    loader: DataLoader[Any], view_0: Any, num_images: int, feed: Callable[[Any, bool], Any]
) -> tuple[Any, BatchForm, bool]:
    """The probe batch as the step gets it, its form, and whether images are augmented on their way in training.

    Raises:
        NoStoreError: If it depends on a draw or on the other images, or more than the images is changed in training.
    """
    rows = list(range(min(num_images, len(view_0))))
    read, collate = _reader(loader, view_0), loader.collate_fn

    def fed(rows: list[int], training: bool, draw: int) -> Any:
        with keyed_rng("feed", draw):
            return feed(collate(read(rows)), training)

    batch = fed(rows, False, 0)
    form = BatchForm(batch)
    for draw in range(_DRAWS):
        i = draw % len(rows)
        if not (_holds(form, batch, fed(rows, False, draw)) and _holds(form, batch, fed([i], False, draw), [i])):
            raise NoStoreError(
                "a batch-transfer hook draws at random or mixes images also in evaluation; let it do so only "
                "`if self.trainer.training`, or do it in the dataset's transform"
            )
    _, beside = form.split(batch)
    augmented = False
    for draw in range(_DRAWS):
        images, others = form.split(in_training := fed(rows, True, draw))
        if any(not torch.equal(value, others[name]) for name, value in beside.items()):
            raise NoStoreError("a batch-transfer hook changes more than the images in training (mixup?)")
        if images.shape != form.images(batch).shape:
            raise NoStoreError("a batch-transfer hook gives images of another size in training")
        augmented |= not _holds(form, batch, in_training)
    return batch, form, augmented


def _holds(form: BatchForm, batch: Any, other: Any, rows: list[int] | None = None) -> bool:
    """Whether `other` holds the batch, or these rows of it, as they are."""
    (images, beside), (other_images, others) = form.split(batch), form.split(other)
    index = list(range(len(images))) if rows is None else rows
    same = torch.equal(images[index], other_images)
    return same and all(torch.equal(value[index], others[name]) for name, value in beside.items())


def _reader(loader: DataLoader[Any], dataset: Any) -> Callable[[list[int]], Any]:
    """What the loader's workers hand to its collate function for some rows."""
    if loader.batch_sampler is None:  # the dataset is asked for a whole batch at once
        return lambda rows: dataset[rows]
    return lambda rows: [dataset[row] for row in rows]


def _same(one: Any, other: Any) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else np.array_equal(a, b) for a, b in pairs)


# --- what is stored --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViewedData:
    """What is stored: the views of a dataset, and how its samples are read and batched.

    Attributes:
        name: `"train"` or `"val"`.
        loader: Gives collate function, batch size and workers.
        views: The dataset with the transform of each view, view 0 first.
        raw: A collated batch of view 0.
        fed: The same batch as the step gets it, after the transfer hooks.
        form: How a batch is built that the step gets. What is stored beside the features is taken from there.
        raw_form: How a batch of the loader is built.
        augmented: Whether images are augmented between the loader and the step, in training.
        seed: Seed of random views.
        fingerprint: The user's own word for what the data is.
        feeding: Fingerprint of what lies between the loader and the step.
    """

    name: str
    loader: DataLoader[Any]
    views: Sequence[Any]
    raw: Any
    fed: Any
    form: BatchForm
    raw_form: BatchForm
    augmented: bool
    seed: int
    fingerprint: str | None = None
    feeding: str = ""

    def key(self) -> str:
        """Fingerprint of samples, transforms and views.

        Raises:
            NoStoreError: If something of the dataset cannot be told from another.
        """
        strict = self.fingerprint is None
        try:
            return fingerprint_of(
                data=dataset_fingerprint(self.views[0], fingerprint=self.fingerprint),
                transforms=[_callables_fingerprint(view, strict) for view in self.views],
                collate=transform_fingerprint(self.loader.collate_fn, strict),
                feeding=self.feeding,
                seed=self.seed if len(self.views) > 1 else None,
            )
        except NotUnderstoodError as error:
            raise NoStoreError(
                f"the data holds {error}" if "data_fingerprint" not in str(error) else f"{error}"
            ) from None


def _callables_fingerprint(dataset: Any, strict: bool = False) -> str:
    """Fingerprint of the transforms, target transforms, image readers a dataset and those it wraps have."""
    return fingerprint_of(
        callables=[
            [level, name, transform_fingerprint(value, strict)]
            for level, each in enumerate(nested_datasets(dataset))
            for name, value in sorted(getattr(each, "__dict__", {}).items())
            if callable(value) or (isinstance(value, list | tuple) and value and all(map(callable, value)))
        ]
    )


# --- images in -------------------------------------------------------------------------------------------------------


class ViewBatches(Dataset[Any]):
    """Collated batches of one view: each sample a function of (seed, view, row), whatever runs beside or before.

    Args:
        loader: Gives the collate function, and whether the dataset is asked for whole batches.
        views: The dataset of each view.
        seed: Seed of the augmentation.
        view: The view that is read.
    """

    def __init__(self, loader: DataLoader[Any], views: Sequence[Any], seed: int, view: int = 0) -> None:
        self.collate, self.whole = loader.collate_fn, loader.batch_sampler is None
        self.views, self.seed, self.view = views, seed, view

    def __getitem__(self, rows: list[int]) -> Any:
        dataset = self.views[self.view]
        if self.whole or not self.view:
            # view 0 was seen to draw nothing (`probe_batch`); seeding it once a batch saves 0.1 ms an image
            with keyed_rng("view", self.seed, self.view, *rows):
                return self.collate(dataset[rows] if self.whole else [dataset[row] for row in rows])
        samples = []
        for row in rows:
            with keyed_rng("view", self.seed, self.view, row):
                samples.append(dataset[row])
        with keyed_rng("view", self.seed, self.view, *rows):
            return self.collate(samples)

    def __len__(self) -> int:
        return len(self.views[0])


def _as_it_is(batch: Any) -> Any:
    return batch


def view_batches(data: ViewedData, view: int, rows: Tensor) -> Iterator[tuple[Tensor, Any]]:
    """Pairs of rows `(B,)` and the collated batch of those samples, read as the user's loader reads."""
    if not len(rows):  # torch splits nothing into one empty part
        return iter(())
    parts = torch.split(rows, pass_size(data.loader))
    few = len(parts) == 1  # not worth the start of worker processes
    batches = DataLoader(
        ViewBatches(data.loader, data.views, data.seed, view),
        batch_size=None,
        sampler=_Lists([part.tolist() for part in parts]),
        collate_fn=_as_it_is,
        num_workers=0 if few else data.loader.num_workers,
        worker_init_fn=data.loader.worker_init_fn,
        multiprocessing_context=None if few else data.loader.multiprocessing_context,
        generator=torch.Generator(),  # so that nothing is drawn from the global one
    )
    return zip(parts, batches, strict=True)


class _Lists(Sampler[list[int]]):
    def __init__(self, lists: list[list[int]]) -> None:
        self.lists = lists

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.lists)

    def __len__(self) -> int:
        return len(self.lists)


# --- batches from the store ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredBatch:
    """A batch from the store on its way to the step: packed features, and what lies beside the images.

    It is what the step gets already, so it passes by whatever a module does to a batch on the way to the device.
    """

    source: FeatureDataset
    packed: Tensor
    beside: dict[str, Tensor]

    def to(self, device: torch.device) -> StoredBatch:
        """On the device."""
        beside = {name: value.to(device, non_blocking=True) for name, value in self.beside.items()}
        return replace(self, packed=self.packed.to(device, non_blocking=True), beside=beside)

    def pin_memory(self) -> StoredBatch:
        """In pinned memory; a DataLoader calls it."""
        beside = {name: value.pin_memory() for name, value in self.beside.items()}
        return replace(self, packed=self.packed.pin_memory(), beside=beside)

    def opened(self) -> Any:
        """In the user's form, with what stands in for the images."""
        return self.source.form.join(self.source.prefix.stand_in(self.packed), self.beside)


class FeatureDataset(Dataset[StoredBatch]):
    """Whole batches from a store: indexed by a list of rows.

    Args:
        store: Features and what lies beside the images, on disk or in memory.
        form: A batch as the step gets it.
        prefix: What the features are of.
    """

    def __init__(self, store: FeatureStore | ResidentStore, form: BatchForm, prefix: FrozenPrefix) -> None:
        self.store, self.form, self.prefix = store, form, prefix
        self.view = 0

    def __getitem__(self, rows: list[int]) -> StoredBatch:
        return self._batch(self.store.read(torch.tensor(rows, dtype=torch.int64), self.view))

    def batches(self, sampler: EpochBatchSampler) -> Iterator[StoredBatch]:
        """An epoch; from memory, the next batch is on its way to the device while one is worked on."""
        if isinstance(self.store, ResidentStore):
            parts = sampler.batches(self.store.device if self.store.place == "device" else None)
            yield from map(self._batch, self.store.read_ahead(parts, self.view))
        else:
            yield from (self._batch(self.store.read(part, self.view)) for part in sampler.batches())

    def _batch(self, tensors: dict[str, Tensor]) -> StoredBatch:
        features = {name: tensors.pop(name) for name in self.prefix.shapes}
        return StoredBatch(self, self.prefix.pack(features), tensors)

    def __len__(self) -> int:
        return self.store.layout.num_rows


class _FeatureLoader(ResumableLoader):
    """Reads a `FeatureDataset` in this process, without what a DataLoader does to samples."""

    def read(self) -> Iterator[StoredBatch]:
        return self.dataset.batches(self.sampler)  # type: ignore[attr-defined, no-any-return]


class _RowBatches(BatchSampler):
    """Batches of the rows that a sampler of the user's chooses; told of the epoch if the sampler wants to be."""

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def feature_loader(
    loader: DataLoader[Any], dataset: FeatureDataset | ViewBatches, batch_size: int | None, seed: int
) -> DataLoader[Any]:
    """A loader of whole batches of a dataset that is indexed by lists of rows, in the order of the user's `loader`.

    The order of an `EpochSampler` is kept exactly; where the loader shuffles, the order is one of (seed, epoch); a
    sampler of the user's, or a batch sampler, goes on choosing the rows. The same for features and for images, so that
    it is the same training.
    """
    in_memory = isinstance(dataset, FeatureDataset) and isinstance(dataset.store, ResidentStore)
    reading: dict[str, Any] = {"pin_memory": loader.pin_memory and not in_memory, "collate_fn": _as_it_is}
    if isinstance(dataset, ViewBatches):
        reading |= {
            "num_workers": loader.num_workers,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "prefetch_factor": loader.prefetch_factor,
        }
    weights = getattr(loader.sampler, "weights", None)
    sampler, drop_last, drop_tail, size = loader.sampler, loader.drop_last, False, batch_size or loader.batch_size
    if isinstance(sampler, EpochBatchSampler):
        size, drop_last = batch_size or sampler.batch_size, sampler.drop_last_batch
    elif is_own_batching(loader):
        rows: Any = sampler if loader.batch_sampler is None else loader.batch_sampler
        return DataLoader(dataset, batch_size=None, sampler=rows, **reading)
    if isinstance(sampler, DistributedSampler):
        shuffle, seed, drop_tail = sampler.shuffle, sampler.seed, sampler.drop_last
    elif isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == len(dataset):
        shuffle = True
    elif isinstance(sampler, SequentialSampler):
        shuffle = False
    else:
        rows = _RowBatches(sampler, size or 1, drop_last)
        return DataLoader(dataset, batch_size=None, sampler=rows, **reading)
    order = EpochBatchSampler(
        dataset, size or 1, shuffle=shuffle, seed=seed, drop_last=drop_last, drop_tail=drop_tail, weights=weights
    )
    kind = _FeatureLoader if isinstance(dataset, FeatureDataset) and not reading["pin_memory"] else ResumableLoader
    return kind(dataset, batch_size=None, sampler=order, **reading)
