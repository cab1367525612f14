"""Between a user's dataset and the feature store: views of the images in, whole batches in the user's form out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_unfreeze.feature_store import FeatureStore
from lightning_unfreeze.loaders import EpochBatchSampler, EpochSampler, KeyedDataset, ResumableLoader
from lightning_unfreeze.seeding import keyed_rng

_LEAST_TEXT_BYTES = 256


class NoStoreError(Exception):
    """The data cannot be served from a store; the message says why."""


# --- the user's dataset and loader -----------------------------------------------------------------------------------


def check_loader(loader: Any) -> DataLoader[Any]:
    """The loader, if its samples can be stored one by one.

    Raises:
        NoStoreError: For anything else, with the reason.
    """
    if not isinstance(loader, DataLoader):
        raise NoStoreError(f"the data is a {type(loader).__name__}, not a single DataLoader")
    if isinstance(loader.dataset, IterableDataset):
        raise NoStoreError(f"{type(loader.dataset).__name__} is an iterable dataset: its samples have no index")
    if loader.batch_size is None and not isinstance(loader.sampler, EpochBatchSampler):
        raise NoStoreError("the loader has batch_size=None or a batch_sampler of its own: its batches are not made of rows")
    if type(loader.batch_sampler) not in (BatchSampler, type(None)):
        raise NoStoreError(f"the loader has a batch sampler of its own ({type(loader.batch_sampler).__name__})")
    return loader


def innermost_dataset(dataset: Any) -> Any:
    """The dataset inside `Subset` and other wrappers that call what they hold `dataset`."""
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset


def with_transform(dataset: Any, transform: Callable[[Any], Any]) -> Any:
    """A copy of the dataset, and of those it wraps, that shares all but the innermost one's `transform`."""
    copied = copy.copy(dataset)
    if hasattr(dataset, "dataset"):
        copied.dataset = with_transform(dataset.dataset, transform)
    else:
        copied.transform = transform
    return copied


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

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class _WithRows:
    """The user's collate function on samples that carry their row."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, samples: list[tuple[int, Any]]) -> tuple[Tensor, Any]:
        return torch.tensor([row for row, _ in samples]), self.collate([sample for _, sample in samples])


def plain_dataset(loader: DataLoader[Any]) -> Any:
    """The loader's dataset without what keys its random numbers by epoch."""
    return loader.dataset.dataset if isinstance(loader.dataset, KeyedDataset) else loader.dataset


def view_batches(loader: DataLoader[Any], dataset: Any, seed: int, view: int, rows: Tensor) -> Iterator[Any]:
    """Pairs of rows `(B,)` and the collated batch of those samples, read as `loader` reads."""
    return iter(
        DataLoader(
            ViewDataset(dataset, seed, view, rows),
            batch_size=loader.batch_size or loader.sampler.batch_size,  # type: ignore[union-attr]
            collate_fn=_WithRows(loader.collate_fn),
            num_workers=loader.num_workers,
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator(),  # so that nothing is drawn from the global one
        )
    )


# --- the form of a batch ---------------------------------------------------------------------------------------------


class BatchForm:
    """How a batch is built: where the images are, and what lies beside them, one row per image.

    Args:
        batch: A collated batch; `images` is its first floating point tensor `(B, C, H, W)`.

    Raises:
        NoStoreError: If something in it does not come one per image.
    """

    def __init__(self, batch: Any) -> None:
        leaves, self._tree = _flatten(batch)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim == 4]
        floating = [i for i in places if leaves[i].is_floating_point()]
        if not floating:
            raise NoStoreError("the batch has no floating point tensor (B, C, H, W), so it is not seen where the images are")
        self._image = floating[0]
        self.batch_size = len(leaves[self._image])
        self._text_bytes: dict[int, int] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, _Texts) and len(leaf) == self.batch_size:
                longest = max(len(text.encode()) for text in leaf)
                self._text_bytes[i] = max(_LEAST_TEXT_BYTES, 4 * longest)
            elif not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != self.batch_size:
                what = f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)[:60]
                raise NoStoreError(f"the batch holds {what}, which does not come one per image")

    def split(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The images, and everything else as named tensors with one row per image."""
        leaves, tree = _flatten(batch)
        if tree != self._tree:
            raise NoStoreError("the batches differ in their form")
        rest = {}
        for i, leaf in enumerate(leaves):
            if i in self._text_bytes:
                rest[f"beside_{i}"] = _encode(leaf, self._text_bytes[i])
            elif i != self._image:
                rest[f"beside_{i}"] = leaf
        return leaves[self._image], rest

    def join(self, images: Tensor, rest: Mapping[str, Tensor]) -> Any:
        """A batch of the user's form with `images` (or features) where the images are."""
        leaves: list[Any] = []
        for i in range(len(rest) + 1):
            if i == self._image:
                leaves.append(images)
                continue
            value = rest[f"beside_{i}"]
            leaves.append(_decode(value) if i in self._text_bytes else value)
        return tree_unflatten(leaves, self._tree)

    def take(self, batch: Any, rows: Tensor) -> Any:
        """The samples `rows` (on the batch's device) of a batch."""
        images, rest = self.split(batch)
        rows = rows.to(images.device)
        return self.join(images[rows], {name: value[rows.to(value.device)] for name, value in rest.items()})


class _Texts(list[str]):
    """Strings that were collated to a list: one leaf, not one per string."""


def _flatten(batch: Any) -> tuple[list[Any], TreeSpec]:
    return tree_flatten(_mark_texts(batch))


def _mark_texts(value: Any) -> Any:
    if isinstance(value, list | tuple) and value and all(isinstance(part, str) for part in value):
        return _Texts(value)
    if type(value) in (list, tuple):
        return type(value)(_mark_texts(part) for part in value)
    if type(value) is dict:
        return {key: _mark_texts(part) for key, part in value.items()}
    return value


def _encode(texts: list[str], num_bytes: int) -> Tensor:
    rows = torch.zeros(len(texts), num_bytes, dtype=torch.uint8)
    for row, text in zip(rows, texts, strict=True):
        data = text.encode()
        if len(data) >= num_bytes:
            raise NoStoreError(f"a text of {len(data)} bytes in the batch is much longer than the first ones")
        row[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else row[:0]
    return rows


def _decode(rows: Tensor) -> list[str]:
    return [bytes(row.tolist()).rstrip(b"\0").decode() for row in rows]


def separable(loader: DataLoader[Any], samples: list[Any], form: BatchForm) -> bool:
    """Whether the collate function gives a sample the same row whatever else is in the batch (mixup does not)."""
    together = form.split(loader.collate_fn(samples))
    for i in (0, len(samples) - 1):
        alone = form.split(loader.collate_fn([samples[i]]))
        pairs = [(together[0], alone[0]), *((together[1][name], alone[1][name]) for name in alone[1])]
        if not all(torch.equal(whole[i : i + 1], single) for whole, single in pairs):
            return False
    return True


# --- batches from the store ------------------------------------------------------------------------------------------


class FeatureDataset(Dataset[Any]):
    """Whole batches from a store, in the user's form: indexed by a list of rows.

    Args:
        store: Features and what lies beside the images.
        form: The user's batch.
        pack: Features by name -> the one tensor that takes the images' place.
    """

    def __init__(self, store: FeatureStore, form: BatchForm, pack: Callable[[Mapping[str, Tensor]], Tensor]) -> None:
        self.store, self.form, self.pack = store, form, pack
        self.view = 0

    def __getitem__(self, rows: list[int]) -> Any:
        tensors = self.store.read(torch.as_tensor(rows), self.view)
        rest = {name: value for name, value in tensors.items() if name.startswith("beside_")}
        return self.form.join(self.pack({name: value for name, value in tensors.items() if name not in rest}), rest)

    def __len__(self) -> int:
        return self.store.layout.num_rows


def feature_loader(
    loader: DataLoader[Any], dataset: FeatureDataset, batch_size: int | None, seed: int
) -> DataLoader[Any]:
    """A loader of stored batches in the order in which `loader` would have given them.

    The orders of this package's loaders are kept exactly; a shuffling loader gets a seeded order of its own; a sampler
    of the user's goes on choosing the rows.
    """
    size = batch_size or loader.batch_size or loader.sampler.batch_size  # type: ignore[union-attr]
    sampler, drop_last = loader.sampler, loader.drop_last
    if isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples != len(dataset)):
        shuffle = None
    elif isinstance(sampler, EpochSampler | DistributedSampler):
        shuffle, seed, drop_last = sampler.shuffle, sampler.seed, loader.drop_last or sampler.drop_last
    elif isinstance(sampler, RandomSampler):
        shuffle = True
    elif isinstance(sampler, SequentialSampler):
        shuffle = False
    else:
        shuffle = None
    if shuffle is None:
        batches = BatchSampler(sampler, size, loader.drop_last)
        return DataLoader(dataset, batch_size=None, sampler=batches, pin_memory=loader.pin_memory)
    order = EpochBatchSampler(dataset, size, shuffle=shuffle, seed=seed, drop_last=drop_last)
    if isinstance(sampler, EpochSampler):
        order.set_epoch(sampler.epoch)
    return ResumableLoader(dataset, batch_size=None, sampler=order, pin_memory=loader.pin_memory)


def evaluation_transform(train: Any, val: Any) -> Callable[[Any], Any] | None:
    """The `transform` of the validation data, where the training data has one that it can take the place of; else None.

    Raises:
        NoStoreError: If the training data has a transform, and none to replace it is to be found.
    """
    own = getattr(innermost_dataset(train), "transform", None)
    if not callable(own):
        return None
    found = getattr(innermost_dataset(val), "transform", None) if val is not None else None
    if not callable(found):
        raise NoStoreError(
            "the training data has a transform that may be random, and the validation data has none to take its place; "
            "pass PrecomputeFeatures(eval_transform=...)"
        )
    return found  # type: ignore[no-any-return]

