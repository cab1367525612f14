"""Images as a dataset; and datasets inside datasets: what a wrapper holds, a copy under another transform."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from lightning_unfreeze.data.broken import what_is_wrong
from lightning_unfreeze.data.images import READING_VERSION, Reading

_SECONDS_FOR_THE_REST = 60.0  # of the search for further broken files, once one has stopped a run


def innermost_dataset(dataset: Any) -> Any:
    """The dataset inside `Subset` and other wrappers that call what they hold `dataset`."""
    while hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset


def inner_datasets(dataset: Any) -> list[Any]:
    """The datasets that one holds: in `dataset` or `datasets`, or, if they are of torch's kind, under any name."""
    found: list[Any] = []
    for name, value in getattr(dataset, "__dict__", {}).items():
        values = list(value) if isinstance(value, list | tuple) else [value]
        if name in ("dataset", "datasets") or (values and all(isinstance(each, Dataset) for each in values)):
            found += [each for each in values if hasattr(each, "__getitem__") and not isinstance(each, str)]
    return found


def nested_datasets(dataset: Any) -> Iterator[Any]:
    """The dataset and all those that it wraps."""
    yield dataset
    for each in inner_datasets(dataset):
        yield from nested_datasets(each)


def _own_transform(dataset: Any) -> Callable[[Any], Any] | None:
    named = (getattr(dataset, name, None) for name in ("transform", "transforms"))
    return next((transform for transform in named if callable(transform)), None)


def transform_of(dataset: Any) -> Callable[[Any], Any] | None:
    """The `transform` (or joint `transforms`) of the outermost dataset that has one; None where none has."""
    return next(filter(None, map(_own_transform, nested_datasets(dataset))), None)


def with_transform(dataset: Any, transform: Callable[[Any], Any]) -> Any:
    """A copy of the dataset, and of those it wraps, that shares all but the transform of the outermost that has one."""
    copied = copy.copy(dataset)
    inner = inner_datasets(dataset)
    if callable(getattr(dataset, "transform", None)) or not inner:
        copied.transform = transform
        joint: Any = copy.copy(getattr(dataset, "transforms", None))
        if hasattr(joint, "transform"):  # torchvision's datasets call this one
            joint.transform = transform
            copied.transforms = joint
        return copied
    if callable(getattr(dataset, "transforms", None)):
        copied.transforms = transform
        return copied
    replaced = {id(each): with_transform(each, transform) for each in inner}
    for name, value in vars(dataset).items():
        if id(value) in replaced:
            setattr(copied, name, replaced[id(value)])
        elif isinstance(value, list | tuple) and value and id(value[0]) in replaced:
            setattr(copied, name, type(value)(replaced.get(id(each), each) for each in value))
    return copied


class ImageDataset(Dataset[tuple[torch.Tensor, Any]]):
    """Images, from files or from memory, with a label (or the file's path) each.

    Args:
        images: Paths or PIL images.
        targets: What comes with each image: class indices, rows of zeros and ones, or paths in prediction.
        transform: From a picture to a tensor.
        reading: How files are read.
        cache: Pictures that are decoded already, by path; others are read.

    Attributes:
        how_read: What the store's key has to know of the way images are read.
    """

    def __init__(
        self,
        images: Sequence[Path | Image.Image],
        targets: Sequence[Any] | torch.Tensor,
        transform: Any,
        reading: Reading | None = None,
        cache: Any = None,
    ) -> None:
        self.images, self.targets, self.transform = images, targets, transform
        self.reading, self.cache = reading or Reading(), cache
        self.how_read = f"{READING_VERSION} {self.reading} {getattr(cache, 'how_read', '')}"

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        image = self.images[index]
        try:
            picture = self.cache[image] if self.cache is not None and image in self.cache else self.reading(image)
        except OSError as error:
            raise OSError(self._all_broken(index, str(error))) from error
        return self.transform(picture), self.targets[index]

    def __len__(self) -> int:
        return len(self.images)

    def _all_broken(self, index: int, first: str) -> str:
        """The message on the file that stopped a run, and on the others that would: the rest is looked at at once."""
        others, started = [], time.monotonic()
        for image in (*self.images[index + 1 :], *self.images[:index]):
            if isinstance(image, Path) and (reason := what_is_wrong(image, self.reading, in_full=True)):
                others.append(f"{image} ({reason})")
            if time.monotonic() - started > _SECONDS_FOR_THE_REST:
                others.append("not all files were looked at")
                break
        more = f"; so are {len(others)} others: {', '.join(others)}" if others else ""
        return f"{first}{more}: repair or remove, or leave out with corrupt='skip' (--data.corrupt skip)."
