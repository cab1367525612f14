"""Fingerprints: what a dataset, a transform or any setting is, as a short key that is the same in every process."""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_unfreeze.features.prefix import FrozenPrefix
from lightning_unfreeze.seeding import keyed_rng

_MAX_SAMPLES = 64


def canonical_json(content: object) -> bytes:
    """The one way to write `content` as JSON.

    >>> canonical_json({"b": 1, "a": [2, None]})
    b'{"a":[2,null],"b":1}'
    """
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def package_version() -> str:
    """Version of this package, as installed."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("lightning-unfreeze")
    return "unknown"


def _digest(*buffers: bytes | memoryview) -> str:
    blake = hashlib.blake2b(digest_size=16)
    for buffer in buffers:
        blake.update(buffer)
    return blake.hexdigest()


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
    return _digest(canonical_json({"package_version": package_version(), "parts": parts}))


def _array_digest(value: Tensor | npt.NDArray[Any]) -> str:
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        array = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return _digest(repr((str(value.dtype), tuple(value.shape))).encode(), array.data)


def transform_fingerprint(transform: object, strict: bool = False) -> str:
    """Fingerprint of a transform, or of any object that acts on the data: what it is, its settings, and its code.

    Addresses in a `repr` do not count. Functions and classes outside of installed packages count with their bytecode,
    defaults, closures, and the globals they name (numbers, strings, arrays; functions and classes in turn); those of
    installed packages with name and version. Another version of Python makes another key.

    Limits: code reached in other ways (an attribute of a module, a file the transform reads, an environment variable)
    and what compiled objects hide do not count.
    """
    return fingerprint_of(transform=_Description().of(transform))


def _installed(module_name: str) -> str | None:
    """Top-level package and version of what is installed; None for the user's own code."""
    package = module_name.partition(".")[0]
    file = getattr(sys.modules.get(module_name), "__file__", None)
    roots = [sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    if package in sys.builtin_module_names or (file and any(Path(file).is_relative_to(root) for root in roots)):
        return f"{package} {getattr(sys.modules.get(package), '__version__', sys.version_info[:2])}"
    return None


def _is_array(value: object) -> TypeGuard[Tensor | npt.NDArray[Any]]:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind != "O")


def _is_constant(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_constant(item) for item in value)
    return isinstance(value, (bool, int, float, str, Tensor, np.ndarray))


class _Description:
    """What can be said of an object in JSON, the same in every process."""

    def __init__(self) -> None:
        self._path: list[int] = []  # the objects being described, against cycles
        self._code: set[int] = set()  # functions and classes described already

    def of(self, value: object) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return repr(value)
        if _is_array(value):
            return [type(value).__name__, _array_digest(value)]
        if isinstance(value, types.FunctionType):
            return self._of_code(value, self._of_function)
        if isinstance(value, type):
            return self._of_code(value, self._of_class)
        if id(value) in self._path:
            return ["cycle", len(self._path) - self._path.index(id(value))]
        self._path.append(id(value))
        try:
            return [f"{type(value).__module__}.{type(value).__qualname__}", self._of_content(value)]
        finally:
            self._path.pop()

    def _of_content(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return [[self.of(key), self.of(item)] for key, item in value.items()]
        if isinstance(value, (set, frozenset)):
            return sorted(json.dumps(self.of(item)) for item in value)
        if isinstance(value, (list, tuple)):
            return [self.of(item) for item in value]
        if isinstance(value, functools.partial):
            return [self.of(part) for part in (value.func, value.args, value.keywords)]
        if isinstance(value, types.MethodType):
            return [self.of(value.__func__), self.of(value.__self__)]
        if isinstance(value, enum.Enum):
            return value.name
        if all(hasattr(value, name) for name in ("tobytes", "mode", "size")):  # an image of PIL
            return [value.mode, value.size, _digest(value.tobytes())]
        if hasattr(value, "__dict__"):
            return [self.of(type(value)), [[key, self.of(item)] for key, item in sorted(vars(value).items())]]
        return re.sub(r"\b0x[0-9a-fA-F]+", "", repr(value))

    def _of_code(self, value: Any, describe: Callable[[Any], Any]) -> Any:
        name = [value.__module__, value.__qualname__]
        if id(value) in self._code:
            return name
        self._code.add(id(value))
        return [*name, _installed(value.__module__), describe(value)]

    def _of_class(self, cls: type) -> Any:
        described = [self.of(base) for base in cls.__bases__ if base is not object]
        if _installed(cls.__module__) is None:
            for key, member in sorted(vars(cls).items()):
                function = getattr(member, "fget", None) or getattr(member, "__func__", member)
                if isinstance(function, types.FunctionType) or (not key.startswith("__") and _is_constant(member)):
                    described.append([key, self.of(function)])
        return described

    def _of_function(self, function: types.FunctionType) -> Any:
        closure = []
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # a cell that is not filled yet
                closure.append(self.of(cell.cell_contents))
        if _installed(function.__module__) is not None:
            return closure
        used = {name: function.__globals__.get(name) for name in _names(function.__code__)}
        constants = {
            name: value
            for name, value in used.items()
            if _is_constant(value) or isinstance(value, (types.FunctionType, type))
        }
        defaults = [function.__defaults__, function.__kwdefaults__]
        return [self._of_bytecode(function.__code__), self.of(defaults), closure, self.of(constants)]

    def _of_bytecode(self, code: types.CodeType) -> Any:
        constants = [
            self._of_bytecode(constant) if isinstance(constant, types.CodeType) else self.of(constant)
            for constant in code.co_consts
        ]
        return [code.co_code.hex(), code.co_names, constants]


def _names(code: types.CodeType) -> list[str]:
    """Names a function looks up, its inner functions included."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return sorted({*code.co_names, *(name for names in inner for name in names)})


def prefix_fingerprint(prefix: FrozenPrefix) -> str:
    """SHA-256 over what features depend on: names, shapes, dtypes, bytes of all parameters and buffers of the prefix.

    Parameters and buffers that the containers around the prefix own themselves (position embeddings, class tokens)
    count too, as far as they are frozen.
    """
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
    digest = hashlib.sha256(repr((prefix.module_names, prefix.shapes, prefix.dtypes)).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def dataset_fingerprint(dataset: Any, fingerprint: str | None = None) -> str:
    """Fingerprint of what a dataset is, without reading all of it. Its transforms are not part of it.

    Looks at the class and the attributes of the dataset and of those it wraps (`.dataset`, `.datasets`, `.reader`):
    numbers and strings; lists and arrays with one entry per item (targets, indices of a subset, arrays of images) and
    lists of arrays, in full; and where such a list names files (`.samples`, `.imgs`, ...), each file's size and
    modification time. Where no files are named, 64 items spread over the dataset are hashed as well, drawn with fixed
    random numbers.

    Limits: a file rewritten with equal size and time is not seen; nor is, where no files are named, a change of an item
    that is neither in an array nor in the sample. Give `fingerprint` then.

    Args:
        dataset: A map-style dataset.
        fingerprint: The user's own word for what the data is; nothing else is looked at then.

    Raises:
        ValueError: The dataset has no length, and no fingerprint is given.
    """
    if fingerprint is not None:
        return fingerprint_of(given=fingerprint)
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"{type(dataset).__name__} has no length and cannot be told from others: give a fingerprint.")
    parts, names_files = _dataset_parts(dataset)
    if not names_files:
        spread = np.linspace(0, len(dataset) - 1, min(_MAX_SAMPLES, len(dataset))).round().astype(np.int64)
        for index in np.unique(spread).tolist():
            with keyed_rng("dataset_fingerprint", index):
                parts.append([index, _Description().of(dataset[index])])
    return fingerprint_of(dataset=parts)


def _dataset_parts(dataset: Any) -> tuple[list[Any], bool]:
    """What class and attributes say, in JSON, and whether the dataset, or each one it wraps, names its files."""
    attributes = dict(sorted(getattr(dataset, "__dict__", {}).items()))
    parts: list[Any] = [_Description().of(type(dataset)), len(dataset)]
    names_files = False
    described: dict[int, list[Any]] = {}  # by identity: ImageFolder has one list as `samples` and as `imgs`
    for name, value in attributes.items():
        if isinstance(value, (bool, int, float, str)):
            parts.append([name, repr(value)])
        elif isinstance(value, (list, tuple)) and value and all(_is_array(array) for array in value):
            described[id(value)] = [name, [_array_digest(array) for array in value]]
        elif _num_entries(value) == len(dataset) > 0 and id(value) not in described:
            digest, has_files = _entries_digest(value)
            described[id(value)] = [name, digest]
            names_files |= has_files
    wrapped = [attributes[name] for name in ("dataset", "reader") if hasattr(attributes.get(name), "__len__")]
    wrapped += attributes["datasets"] if isinstance(attributes.get("datasets"), (list, tuple)) else []
    inner = [_dataset_parts(child) for child in wrapped]
    all_parts = [*parts, *described.values(), *(child for child, _ in inner)]
    return all_parts, names_files or (bool(inner) and all(has_files for _, has_files in inner))


def _num_entries(value: object) -> int | None:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.shape[0] if value.ndim else None
    return len(value) if isinstance(value, (list, tuple)) else None


def _entries_digest(entries: Any) -> tuple[str | None, bool]:
    """Digest of one entry per item, and whether the entries name files; no digest where they are objects."""
    if _is_array(entries) and not (isinstance(entries, np.ndarray) and entries.dtype.kind in "SU"):
        return _array_digest(entries), False
    leaves = [_leaves(entry) for entry in entries]
    plain = (str, Path, bool, int, float, np.generic, type(None))
    if not all(isinstance(leaf, plain) for entry in leaves for leaf in entry):
        return None, False
    files = [i for i, leaf in enumerate(leaves[0]) if isinstance(leaf, (str, Path)) and os.path.isfile(leaf)]
    blake = hashlib.blake2b(digest_size=16)
    for entry in leaves:
        blake.update(repr([str(leaf) for leaf in entry]).encode())
        for i in files:
            with suppress(OSError, IndexError):
                stat = os.stat(entry[i])
                blake.update(b"%d %d" % (stat.st_size, stat.st_mtime_ns))
    return blake.hexdigest(), bool(files)


def _leaves(entry: Any) -> list[Any]:
    if isinstance(entry, Mapping):
        entry = list(entry.items())
    if isinstance(entry, (list, tuple)):
        return [leaf for part in entry for leaf in _leaves(part)]
    return [entry]
