"""What a user's loader gives, looked at before anything is stored: views, batches, what the step gets of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from lightning_unfreeze.data.datasets import nested_datasets, transform_of, with_transform
from lightning_unfreeze.data.loaders import EpochBatchSampler, EpochSampler, KeyedDataset
from lightning_unfreeze.features.batch_form import BatchForm, NoStoreError
from lightning_unfreeze.features.describe import NotUnderstoodError
from lightning_unfreeze.features.host import Host
from lightning_unfreeze.features.key import dataset_fingerprint, fingerprint_of, transform_fingerprint
from lightning_unfreeze.seeding import keyed_rng

PROBE_IMAGES = 8
"""Images that are looked at before any is stored."""
_DRAWS = 4


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

    def holds_same_images(self, batch: Any) -> bool:
        """Whether a batch has the images of `fed`."""
        with suppress(NoStoreError):
            return torch.equal(self.form.images(batch), self.form.images(self.fed))
        return False

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


def view_data(
    host: Host,
    name: str,
    loader: DataLoader[Any],
    views: Sequence[Any],
    seed: int,
    fingerprint: str | None,
    feeding: str,
) -> ViewedData:
    """Looks at the first images of view 0, on their way to the step; see `ViewedData` for what is passed.

    Raises:
        NoStoreError: If samples or batches are not the same each time.
    """
    raw, raw_form = probe_batch(loader, views[0], PROBE_IMAGES)
    with host.aside():
        fed, form, augmented = probe_feed(loader, views[0], PROBE_IMAGES, host.feed)
    return ViewedData(name, loader, views, raw, fed, form, raw_form, augmented, seed, fingerprint, feeding)


def check_loader(loader: Any, *, in_order: bool = False) -> DataLoader[Any]:
    """The loader, if its samples can be stored one by one (and come `in_order`), and its batches made of stored rows.

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
    if in_order and (is_own_batching(loader) or not isinstance(sampler, SequentialSampler)):
        own = sampler if loader.batch_sampler is None else loader.batch_sampler
        own = sampler if type(own) is BatchSampler else own
        raise NoStoreError(f"the validation loader has a sampler of its own ({type(own).__name__})")
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


def training_views(
    dataset: Any, num_views: int, transform: Callable[[Any], Any] | None, validation_data: Callable[[], Any]
) -> list[Any]:
    """The dataset of each view: with the evaluation transform first, then as it is, for its random draws.

    Without a `transform` that of the validation data is taken, which is asked for only then.

    Raises:
        NoStoreError: If there is nothing to replace, or nothing to replace it with.
    """
    if transform is None:
        transform = evaluation_transform(dataset, validation_data())
    elif transform_of(dataset) is None:
        raise NoStoreError(f"{type(dataset).__name__} has no `transform` for eval_transform to replace")
    plain = dataset if transform is None else with_transform(dataset, transform)
    return [plain, *[dataset] * (num_views - 1)]


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
            "pass eval_transform=..."
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
            "stored features would keep one draw; augment in the dataset's `transform`, or pass eval_transform=..."
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
