"""What an object is, in JSON, the same in every process: data, settings, code, and the files it names."""

from __future__ import annotations

import enum
import functools
import hashlib
import io
import json
import logging
import os
import random
import re
import sys
import sysconfig
import threading
import types
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path, PurePath
from typing import Any, TypeGuard
from uuid import UUID

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_TEXTS = (str, PurePath)
_PLAIN = (str, PurePath, bool, int, float, complex, np.generic, type(None))
# their repr says all there is
_SAID_BY_REPR: tuple[type, ...] = (
    *_PLAIN,
    range,
    slice,
    types.EllipsisType,
    date,
    time,
    timedelta,
    Decimal,
    UUID,
    re.Pattern,
    np.dtype,
)
_SAID_BY_REPR += (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
# what they hold is not what the data is
_TOOLS: tuple[type, ...] = (
    logging.Logger,
    random.Random,
    np.random.Generator,
    np.random.RandomState,
    torch.Generator,
    threading.Event,
)
_TOOLS += (type(threading.Lock()), type(threading.RLock()), threading.local, types.ModuleType)
_CODE = (types.FunctionType, type)


class NotUnderstoodError(ValueError):
    """There is an object whose content cannot be told from that of another; the message says which."""


def digest(*buffers: bytes | memoryview) -> str:
    """32 hexadecimal digits."""
    blake = hashlib.blake2b(digest_size=16)
    for buffer in buffers:
        blake.update(buffer)
    return blake.hexdigest()


def array_digest(value: Tensor | npt.NDArray[Any]) -> str:
    """Digest of all numbers, with shape and dtype."""
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        array = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return digest(repr((str(value.dtype), tuple(value.shape))).encode(), array.data)


def _is_array(value: object) -> TypeGuard[Tensor | npt.NDArray[Any]]:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind not in "OSU")


def _is_data(value: object) -> bool:
    """Whether a global or a class attribute counts: numbers, texts, arrays, tables, and containers of them."""
    if isinstance(value, list | tuple | Set):
        return all(map(_is_data, list(value)[:3]))
    if isinstance(value, Mapping):
        return all(map(_is_data, list(value.values())[:3]))
    return isinstance(value, (*_PLAIN, bytes, Tensor, np.ndarray)) or _is_table(value)


def _is_table(value: object) -> bool:
    return type(value).__module__.partition(".")[0] in ("pandas", "polars") and hasattr(value, "to_numpy")


@functools.cache
def _install_roots() -> tuple[str, ...]:
    return tuple(sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib"))


def _installed(module_name: str) -> str | None:
    """Top-level package and version of what is installed; None for the user's own code."""
    return _package_of(module_name, getattr(sys.modules.get(module_name), "__file__", None))


@functools.cache
def _package_of(module_name: str, file: str | None) -> str | None:
    package = module_name.partition(".")[0]
    if package == __name__.partition(".")[0]:
        return f"{package} {_own_source()}"  # its version does not tell, where it is installed to be worked on
    if package in sys.builtin_module_names or (file and any(map(Path(file).is_relative_to, _install_roots()))):
        return f"{package} {getattr(sys.modules.get(package), '__version__', sys.version_info[:2])}"
    return None


@functools.cache
def _own_source() -> str:
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return digest(*(file.read_bytes() for file in files))


class Description:
    """Describes objects; each once, so that cycles and shared lists do no harm.

    Args:
        strict: Refuse what cannot be told from another; else its `repr` has to do.
        skip: Classes whose instances do not count.

    Attributes:
        num_files: Files that were named so far; each counts with size and times.
        roots: Folders that names of files may be relative to.
    """

    def __init__(self, strict: bool = False, skip: tuple[type, ...] = ()) -> None:
        self.strict, self.skip = strict, skip
        self.num_files = 0
        self.roots: list[str] = []
        self._seen: dict[int, tuple[int, Any]] = {}  # the objects too, so that no id is used again
        self._code: set[int] = set()

    def of(self, value: Any) -> Any:
        """In JSON."""
        if isinstance(value, _TEXTS):
            return [repr(str(value)), *self._file_state(str(value), self._root_of(str(value)))]
        if isinstance(value, _SAID_BY_REPR):
            return [self.of(type(value)), value.name] if isinstance(value, enum.Enum) else repr(value)
        if isinstance(value, types.FunctionType):
            return self._of_code(value, self._of_function)
        if isinstance(value, type):
            return self._of_code(value, self._of_class)
        if isinstance(value, (*self.skip, *_TOOLS)):
            return type(value).__qualname__
        if id(value) in self._seen:
            return ["again", self._seen[id(value)][0]]
        self._seen[id(value)] = (len(self._seen), value)
        return [f"{type(value).__module__}.{type(value).__qualname__}", self._of_content(value)]

    def _of_content(self, value: Any) -> Any:
        for kinds, describe in self._KINDS:
            if isinstance(value, kinds):
                return describe(self, value)
        if _is_array(value):
            return array_digest(value)
        if isinstance(value, np.ndarray):
            return self.entries(value.reshape(-1).tolist())
        if _is_table(value):
            return [
                list(map(str, getattr(value, "columns", ()))),
                self.of(getattr(value, "index", None)),
                self.entries(value.to_numpy().reshape(-1).tolist()),
            ]
        if all(hasattr(value, name) for name in ("tobytes", "mode", "size")):  # an image of PIL
            return [value.mode, value.size, digest(value.tobytes())]
        if isinstance(getattr(value, "_fingerprint", None), str):  # data sets of Hugging Face know what they are
            return value._fingerprint
        slots = [name for kind in type(value).__mro__ for name in _names_in(kind, "__slots__")]
        if hasattr(value, "__dict__") or slots:
            held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
            held |= getattr(value, "__dict__", {})
            return [
                self.of(type(value)),
                [[name, self._of_attribute(value, name, held[name])] for name in sorted(held)],
            ]
        if self.strict:
            raise NotUnderstoodError(f"a {type(value).__module__}.{type(value).__qualname__}")
        return re.sub(r"\b0x[0-9a-fA-F]+", "", repr(value))

    def _of_attribute(self, owner: object, name: str, value: object) -> Any:
        try:
            return self.of(value)
        except NotUnderstoodError as error:
            where = f"{type(owner).__name__}.{name}"
            raise NotUnderstoodError(f"{where} is {error}" if " is " not in str(error) else f"{error}") from None

    def _of_builtin(self, value: types.BuiltinFunctionType) -> Any:
        held = value.__self__
        return [value.__qualname__, None if isinstance(held, types.ModuleType) else self.of(held)]

    def _of_file(self, value: Any) -> Any:
        name = str(getattr(value, "name", ""))
        return [name, *self._file_state(name, self._root_of(name))]

    _KINDS: tuple[tuple[Any, Callable[[Any, Any], Any]], ...] = (
        (Mapping, lambda self, value: [self.entries(list(value)), self.entries(list(value.values()))]),
        (Set, lambda self, value: sorted(json.dumps(self.of(item)) for item in value)),
        ((list, tuple), lambda self, value: self.entries(value)),
        ((bytes, bytearray), lambda self, value: digest(value)),
        (functools.partial, lambda self, value: [self.of(part) for part in (value.func, value.args, value.keywords)]),
        (types.MethodType, lambda self, value: [self.of(value.__func__), self.of(value.__self__)]),
        (types.BuiltinFunctionType, _of_builtin),
        (
            types.CodeType,
            lambda self, value: [value.co_code.hex(), value.co_names, [*map(self.of, value.co_consts)]],
        ),
        (types.MethodWrapperType, lambda self, value: [value.__name__, self.of(value.__self__)]),
        (enum.Enum, lambda self, value: value.name),
        (io.IOBase, _of_file),
    )

    # --- many values, files among them -----------------------------------------------------------------------------

    def entries(self, values: Iterable[Any]) -> Any:
        """Of a list: as one digest where its entries are plain, or rows of plain values, however long it is."""
        values = list(values)
        rows = [_row(value) for value in values]
        if any(row is None for row in rows) or not rows:
            return [self.of(value) for value in values]
        roots = [self._root_of(str(leaf)) if isinstance(leaf, _TEXTS) else None for leaf in rows[0] or ()]
        blake = hashlib.blake2b(digest_size=16)
        for row in rows:
            blake.update(repr([str(leaf) if isinstance(leaf, PurePath) else leaf for leaf in row or ()]).encode())
            for leaf, root in zip(row or (), roots, strict=False):
                if root is not None:
                    blake.update(repr(self._file_state(str(leaf), root)).encode())
        return [len(rows), blake.hexdigest()]

    def _root_of(self, name: str) -> str | None:
        """The folder that a file's name is relative to, empty for the present one; None where it names no file."""
        if 0 < len(name) < 4096 and "\0" not in name and "\n" not in name:
            return next((root for root in ("", *self.roots) if os.path.isfile(os.path.join(root, name))), None)
        return None

    def _file_state(self, name: str, root: str | None) -> list[int]:
        if root is None:
            return []
        with suppress(OSError):
            stat = os.stat(os.path.join(root, name))
            self.num_files += 1
            # the time of change too: a file may be replaced by one of equal size and modification time
            return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        return []

    # --- code ------------------------------------------------------------------------------------------------------

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
                if isinstance(function, types.FunctionType) or (not key.startswith("__") and _is_data(member)):
                    described.append([key, self.of(function)])
        return described

    def _of_function(self, function: types.FunctionType) -> Any:
        closure = []
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # a cell that is not filled yet
                closure.append(self.of(cell.cell_contents))
        if _installed(function.__module__) is not None:
            return closure
        used = {name: function.__globals__.get(name) for name in _names_used(function.__code__)}
        held = [[name, self.of(value)] for name, value in used.items() if isinstance(value, _CODE) or _is_data(value)]
        defaults = [function.__defaults__, function.__kwdefaults__]
        return [self.of(function.__code__), self.of(defaults), closure, held]


def _row(value: object) -> list[Any] | None:
    """The plain values of an entry of a list: itself, or those of a tuple or dict, nested or not; else None."""
    if isinstance(value, _PLAIN) and not isinstance(value, enum.Enum):
        return [value]
    if isinstance(value, Mapping):
        value = [part for item in value.items() for part in item]
    if not isinstance(value, list | tuple):
        return None
    parts = [_row(part) for part in value]
    return None if any(part is None for part in parts) else [leaf for part in parts for leaf in part or ()]


def _names_in(kind: type, name: str) -> list[str]:
    names = vars(kind).get(name, ())
    return [each for each in ((names,) if isinstance(names, str) else names) if each not in ("__dict__", "__weakref__")]


def _names_used(code: types.CodeType) -> list[str]:
    """Names a function looks up, its inner functions included."""
    inner = [_names_used(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return sorted({*code.co_names, *(name for names in inner for name in names)})
