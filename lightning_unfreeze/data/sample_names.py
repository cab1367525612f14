"""What a dataset calls its samples and its classes: the paths of its files, however it keeps them, and names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch.utils.data import ConcatDataset, Subset

_LIKELY = ("samples", "imgs", "images", "paths", "files", "filenames", "filepaths", "image_paths", "file_names")
_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image_path", "image")


def sample_names(dataset: Any) -> list[str] | None:
    """The path of each sample in the order of the dataset's indices; None where it keeps none.

    Looked at are `Subset` and `ConcatDataset`, other wrappers that call what they hold `dataset` and are as long, and
    attributes that hold as many paths as there are samples: a list of paths, of tuples that start with one (as
    torchvision's `samples`), or a table with a column of them.

    >>> class Files:
    ...     paths = ["a.jpg", "b.jpg", "c.jpg"]
    ...     def __len__(self):
    ...         return len(self.paths)
    >>> sample_names(Subset(Files(), [2, 0]))
    ['c.jpg', 'a.jpg']
    """
    if isinstance(dataset, Subset):
        inner = sample_names(dataset.dataset)
        return None if inner is None else [inner[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [sample_names(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return [name for part in known for name in part] if len(known) == len(parts) else None
    try:
        num_samples = len(dataset)
    except (TypeError, NotImplementedError):
        return None
    held = getattr(dataset, "dataset", None)
    if held is not None and hasattr(held, "__len__") and len(held) == num_samples:
        return sample_names(held)
    own = getattr(dataset, "__dict__", {})
    likely = [getattr(dataset, name, None) for name in _LIKELY]
    for value in [*likely, *own.values()]:
        names = _paths_in(value, num_samples)
        if names is not None:
            return names
    return None


def class_names_of(*owners: Any, num_classes: int | None = None) -> list[str] | None:
    """Names of the classes, of the first module, data module or dataset that has so many; None where none has.

    Looked for under `class_names` and, as torchvision's datasets have them, `classes`.

    >>> class Data:
    ...     classes = ["cat", "dog"]
    >>> class_names_of(None, Data(), num_classes=2)
    ['cat', 'dog']
    """
    for owner in owners:
        for attribute in ("class_names", "classes"):
            with suppress(RuntimeError):  # a data module that was not set up for training
                found = getattr(owner, attribute, None)
                is_list = hasattr(found, "__len__") and not isinstance(found, str)
                if found is not None and is_list and num_classes in (None, len(found)):
                    return [str(name) for name in found]
    return None


def are_names(texts: Sequence[str]) -> bool:
    """Whether texts tell samples from each other, or only classes: files, or mostly different ones."""
    return all(map(_is_path, texts)) or len(set(texts)) > len(texts) / 2


def _paths_in(value: Any, num_samples: int) -> list[str] | None:
    columns = getattr(value, "columns", value if isinstance(value, dict) else None)
    if columns is not None:
        found = [_paths_in(list(value[name]), num_samples) for name in _COLUMNS if name in columns]
        return next((names for names in found if names is not None), None)
    if isinstance(value, str) or not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        return None
    if len(value) != num_samples or not num_samples:
        return None
    try:
        firsts = [item[0] if isinstance(item, tuple | list) and item else item for item in value]
    except (TypeError, KeyError):
        return None
    return [os.fspath(item) for item in firsts] if all(map(_is_path, firsts)) else None


def _is_path(item: Any) -> bool:
    if isinstance(item, str):
        return bool(os.path.splitext(item)[1]) or os.path.exists(item)
    return isinstance(item, os.PathLike)
