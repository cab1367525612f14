"""Fingerprints: what a dataset, a transform, a network or any setting is, as a short key, the same in every process."""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import os
import re
import types
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_unfreeze import __version__
from lightning_unfreeze.data.datasets import inner_datasets, nested_datasets
from lightning_unfreeze.features.describe import Description, NotUnderstoodError, digest
from lightning_unfreeze.features.prefix import FrozenPrefix
from lightning_unfreeze.seeding import keyed_rng

_MAX_SAMPLES = 64
_ROW_BYTES = 2048
_TRANSFORMS = ("transform", "transforms", "target_transform")
_MODULE_INTERNALS = frozenset({*vars(nn.Module()), "_trainer", "_fabric"})
_SETTINGS: tuple[type, ...] = (bool, int, float, complex, str, type(None), torch.dtype, torch.Size, enum.Enum, type)
_SETTINGS += (types.FunctionType, types.BuiltinFunctionType, functools.partial)


def canonical_json(content: object) -> bytes:
    """The one way to write `content` as JSON.

    >>> canonical_json({"b": 1, "a": [2, None]})
    b'{"a":[2,null],"b":1}'
    """
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def fingerprint_of(**parts: object) -> str:
    """Key of named parts, the same in every process; the version of this package is always one of them.

    Args:
        **parts: Anything JSON holds: strings, numbers, booleans, None, lists and dicts of them.

    Returns:
        32 hexadecimal digits.

    >>> fingerprint_of(weights="a1", views=4) == fingerprint_of(views=4, weights="a1")
    True
    >>> fingerprint_of(weights="a1", views=4) == fingerprint_of(weights="a1", views=5)
    False
    """
    return digest(canonical_json({"package_version": __version__, "parts": parts}))


def transform_fingerprint(transform: object, strict: bool = False) -> str:
    """Fingerprint of a transform, or of any object that acts on the data: what it is, its settings, and its code.

    Addresses in a `repr` do not count. Functions and classes outside of installed packages count with their bytecode,
    defaults, closures, and the globals they name (numbers, strings, arrays; functions and classes in turn); those of
    installed packages with name and version. Another version of Python makes another key.

    Limits: code reached in other ways (an attribute of a module, a file the transform reads, an environment variable)
    and what compiled objects hide do not count.
    """
    return fingerprint_of(transform=Description(strict).of(transform))


def prefix_fingerprint(prefix: FrozenPrefix) -> str:
    """SHA-256 over what features depend on: names, shapes, dtypes, bytes of all parameters and buffers of the prefix.

    Parameters and buffers that the containers around the prefix own themselves (position embeddings, class tokens)
    count too, as far as they are frozen.
    """
    digest = hashlib.sha256(repr((prefix.module_names, prefix.shapes, prefix.dtypes)).encode())
    for name, tensor in _tensors(prefix):
        digest.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def prefix_checksum(prefix: FrozenPrefix) -> str:
    """What `prefix_fingerprint` is over, told from what it was a moment ago; for one process, and a third of the time.

    Every byte counts, a write past the version counter too (`.data`). Numbers are summed where they lie, as integers
    that wrap around, along rows and along columns: a card hands over the sums and not the weights.
    """
    parts: dict[torch.device, list[Tensor]] = {}
    said = []
    for name, tensor in _tensors(prefix):
        said.append((name, tuple(tensor.shape), tensor.dtype, str(tensor.device)))
        numbers = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        numbers = numbers.clone() if numbers.storage_offset() % 8 else numbers
        whole = len(numbers) // _ROW_BYTES * _ROW_BYTES
        rows = numbers[:whole].view(torch.int64).view(-1, _ROW_BYTES // 8)
        sums = [each.view(torch.uint8) for each in (rows.sum(0), rows.sum(1))] if whole else []
        parts.setdefault(tensor.device, []).extend([*sums, numbers[whole:]])
    return digest(repr(said).encode(), *(torch.cat(each).cpu().numpy().data for each in parts.values()))


def _tensors(prefix: FrozenPrefix) -> list[tuple[str, Tensor]]:
    """Parameters and buffers that features depend on, by name."""
    tensors: dict[str, Tensor] = {}
    for name in prefix.module_names:
        module = prefix.network.get_submodule(name)
        dot = f"{name}." if name else ""
        tensors |= {f"{dot}{key}": tensor for key, tensor in [*module.named_parameters(), *module.named_buffers()]}
        parts = name.split(".") if name else []
        for i in range(len(parts)):
            dot = "".join(f"{part}." for part in parts[:i])
            owner = prefix.network.get_submodule(dot[:-1])
            own = [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
            tensors |= {f"{dot}{key}": tensor for key, tensor in own if not tensor.requires_grad}
    return sorted(tensors.items())


def held_by(module: nn.Module) -> list[tuple[str, Any]]:
    """What hangs on a module besides what torch and Lightning keep there, by name."""
    return sorted((key, value) for key, value in vars(module).items() if key not in _MODULE_INTERNALS)


def hooks_of_others(hooks: Mapping[Any, Any]) -> list[Any]:
    """Hooks of one kind without ours, which change no output: they say where a stage freezes from."""
    return [
        hook for hook in hooks.values() if not str(getattr(hook, "__module__", "")).startswith("lightning_unfreeze.")
    ]


def function_fingerprint(prefix: FrozenPrefix) -> str:
    """Fingerprint of what the prefix computes, its weights apart: classes, their settings, code of the user's own.

    Modules of the prefix count with class, `extra_repr` and plain attributes (the variant of an activation, the epsilon
    of a norm); those around it, up to the network itself, with the code of `forward` and `training_step` and the
    attributes that these name. The precision of autocast and of matrix products counts, too.
    """
    describe, parts, around = Description(), [], {""}
    for name in prefix.module_names:
        around |= {".".join(name.split(".")[:i]) for i in range(len(name.split(".")))}
        for path, module in prefix.network.get_submodule(name).named_modules(prefix=name):
            said = re.sub(r"\b0x[0-9a-fA-F]+", "", module.extra_repr())
            hooks = [*hooks_of_others(module._forward_hooks), *hooks_of_others(module._forward_pre_hooks)]
            settings = [[key, describe.of(value)] for key, value in held_by(module) if _is_setting(value)]
            parts.append(
                [path, describe.of(type(module)), said, settings, [_of_hook(hook, describe) for hook in hooks]]
            )
    for path in sorted(around):
        module = prefix.network.get_submodule(path)
        methods = [getattr(type(module), name, None) for name in ("forward", "training_step")]
        functions = [method for method in methods if isinstance(method, types.FunctionType)]
        read = {name for function in functions for name in function.__code__.co_names} - _MODULE_INTERNALS
        settings = [
            [key, describe.of(vars(module)[key])]
            for key in sorted(read & set(vars(module)))
            if _is_setting(vars(module)[key])
        ]
        parts.append([path, *[describe.of(function) for function in functions], settings])
    return fingerprint_of(modules=parts, precision=prefix.precision)


def _is_setting(value: object) -> bool:
    return all(map(_is_setting, value)) if isinstance(value, list | tuple) else isinstance(value, _SETTINGS)


def _of_hook(hook: Any, describe: Description) -> Any:
    """Its code, and the settings and constant tensors in its closure; modules in there count where they are called."""
    function = getattr(hook, "__func__", hook)
    if not isinstance(function, types.FunctionType):
        return type(hook).__qualname__
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    held = [each for each in held if _is_setting(each) or (isinstance(each, Tensor) and not each.requires_grad)]
    return [describe.of(function.__code__), [describe.of(each) for each in held]]


def dataset_fingerprint(dataset: Any, fingerprint: str | None = None) -> str:
    """Fingerprint of what a dataset is, without reading all of it. Its transforms are not part of it.

    Looks at the class and at all that hangs on the dataset and on those it wraps, under whatever name: numbers, texts,
    arrays, lists, dicts, tables of pandas and polars, objects of any class with attributes. Names of files (also
    relative to a folder that the dataset names) count with size, modification and change time. Where fewer files are
    named than there are items, 64 items spread over the dataset are hashed as well, drawn with fixed random numbers.

    Limits: where the files are not named, a change of an item that hangs on nothing and is not in the sample is not
    seen. Give `fingerprint` then.

    Args:
        dataset: A map-style dataset.
        fingerprint: The user's own word for what the data is; nothing else is looked at then.

    Raises:
        ValueError: The dataset has no length, or something hangs on it that cannot be told from another (an open
            database, say), and no fingerprint is given.
    """
    if fingerprint is not None:
        return fingerprint_of(given=fingerprint)
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"{type(dataset).__name__} has no length and cannot be told from others: give a fingerprint.")
    nested = list(nested_datasets(dataset))
    describe = Description(strict=True, skip=(Dataset,))
    held = [value for each in nested for value in getattr(each, "__dict__", {}).values()]
    describe.roots = sorted(
        {str(value) for value in held if isinstance(value, str | PurePath) and os.path.isdir(value)}
    )
    try:
        parts = [_dataset_parts(each, describe) for each in nested]
    except NotUnderstoodError as error:
        raise NotUnderstoodError(
            f"{error}, whose content cannot be told from that of another: pass data_fingerprint=..., your own word for "
            "what the data is"
        ) from None
    if describe.num_files < len(dataset):
        spread = np.linspace(0, len(dataset) - 1, min(_MAX_SAMPLES, len(dataset))).round().astype(np.int64)
        for index in np.unique(spread).tolist():
            with keyed_rng("dataset_fingerprint", index):
                parts.append([index, Description().of(dataset[index])])
    return fingerprint_of(dataset=parts)


def _dataset_parts(dataset: Any, describe: Description) -> list[Any]:
    """What class and attributes say; wrapped datasets are looked at for themselves, transforms elsewhere."""
    wrapped = {id(each) for each in inner_datasets(dataset)}
    parts: list[Any] = [describe.of(type(dataset)), len(dataset)]
    for name, value in sorted(getattr(dataset, "__dict__", {}).items()):
        several = isinstance(value, list | tuple) and len(value) > 0
        if name in _TRANSFORMS or callable(value) or (several and all(map(callable, value))) or id(value) in wrapped:
            continue
        if several and id(value[0]) in wrapped:
            continue
        try:
            parts.append([name, describe.of(value)])
        except NotUnderstoodError as error:
            where = f"{type(dataset).__name__}.{name} is " if " is " not in str(error) else ""
            raise NotUnderstoodError(f"{where}{error}") from None
    return parts
