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


def nested_datasets(dataset: Any) -> Iterator[Any]:
    """The dataset and all those that it wraps, in `dataset` or, as `ConcatDataset` does, in `datasets`."""
    yield dataset
    inner = [dataset.dataset] if hasattr(dataset, "dataset") else getattr(dataset, "datasets", [])
    for each in inner:
        yield from nested_datasets(each)


def transform_of(dataset: Any) -> Callable[[Any], Any] | None:
    """The `transform` of the innermost dataset; None where it has none that can be called."""
    transform = getattr(innermost_dataset(dataset), "transform", None)
    return transform if callable(transform) else None


def with_transform(dataset: Any, transform: Callable[[Any], Any]) -> Any:
    """A copy of the dataset, and of those it wraps, that shares all but the innermost one's `transform`."""
    copied = copy.copy(dataset)
    if hasattr(dataset, "dataset"):
        copied.dataset = with_transform(dataset.dataset, transform)
    else:
        copied.transform = transform
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
        return f"{first}{more}: repair or remove, or set corrupt='skip'."
