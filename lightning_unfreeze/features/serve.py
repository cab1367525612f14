"""Between a user's loader and the feature store: views of the images in, whole batches in the user's form out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from lightning_unfreeze.data.loaders import EpochBatchSampler, ResumableLoader
from lightning_unfreeze.features.batch_form import BatchForm
from lightning_unfreeze.features.prefix import FrozenPrefix
from lightning_unfreeze.features.resident import ResidentStore
from lightning_unfreeze.features.store import FeatureStore
from lightning_unfreeze.features.viewed import ViewedData, is_own_batching, pass_size
from lightning_unfreeze.seeding import keyed_rng

# --- images in -------------------------------------------------------------------------------------------------------


class ViewBatches(Dataset[Any]):
    """Collated batches of one view: each sample a function of (seed, view, row), whatever runs beside or before."""

    def __init__(self, loader: DataLoader[Any], views: Sequence[Any], seed: int, view: int = 0) -> None:
        self.collate, self.whole = loader.collate_fn, loader.batch_sampler is None
        self.views, self.seed, self.view, self.num_views = views, seed, view, len(views)

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


def as_it_is(batch: Any) -> Any:
    """The collate function of what comes in whole batches."""
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
        collate_fn=as_it_is,
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
    """Whole batches from a store, on disk or in memory: indexed by a list of rows."""

    def __init__(self, store: FeatureStore | ResidentStore, form: BatchForm, prefix: FrozenPrefix) -> None:
        self.store, self.form, self.prefix = store, form, prefix
        self.view, self.num_views = 0, store.layout.num_views

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
    reading: dict[str, Any] = {"pin_memory": loader.pin_memory and not in_memory, "collate_fn": as_it_is}
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
