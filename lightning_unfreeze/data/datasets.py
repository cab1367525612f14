"""Datasets inside datasets: what a wrapper holds, and a copy of the whole under another transform."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any


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
