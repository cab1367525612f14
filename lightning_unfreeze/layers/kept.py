"""What hangs on an object, kept and put back in place: weights, buffers, modes, meters, random generators."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data.dataloader import _BaseDataLoaderIter

_PutBack = Callable[[], None]
_MISSING = object()
_ATOMS = (type(None), bool, int, float, complex, str, bytes, range, slice, torch.dtype, torch.device, torch.Size)
# they have a life of their own (threads, files, processes), or are code
_ALIVE = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    threading.Thread,
    logging.Filterer,
    io.IOBase,
)
_STANDARD_HOLDERS = frozenset({"collections", "types", "argparse", "functools", "dataclasses"})


@contextlib.contextmanager
def kept(*roots: Any, skip: tuple[type, ...] = (), max_bytes: int | None = None) -> Iterator[list[Any]]:
    """Whatever happens to the objects inside, afterwards they and all that hangs on them are as they were.

    The graph of objects is walked once, cycles included: modules, optimizers, containers, tensors, arrays, random
    generators, and instances of any class with attributes or slots (meters, dataclasses, trees with parents). Each is
    put back in place, by identity, since others may hold it. Gradients are None inside; the old ones come back.

    Left alone: code, threads, files, loggers, worker processes, and instances of other classes of the standard library.

    Args:
        roots: Where the walk starts.
        skip: Classes whose instances are left alone, with all that hangs on them.
        max_bytes: Tensors and arrays above this size are taken for data that nobody writes into; None keeps all.

    Yields:
        The iterators that were met and cannot be put back where they were (generators, `zip`, those of data loaders).

    Example:
        >>> meter = types.SimpleNamespace(sums=[1.0])
        >>> with kept(meter):
        ...     meter.sums.append(2.0)
        >>> meter.sums
        [1.0]
    """
    put_back, iterators = _keep(roots, (*_ALIVE, *skip), max_bytes)
    try:
        yield iterators
    finally:
        for each in put_back:
            each()


def _keep(
    roots: Iterable[Any], skip: tuple[type, ...], max_bytes: int | None
) -> tuple[list[_PutBack], list[Iterator[Any]]]:
    put_back: list[_PutBack] = []
    iterators: list[Iterator[Any]] = []
    seen: dict[int, Any] = {}  # the objects too, so that no id is used again
    waiting = list(roots)  # no recursion: a linked list may be longer than the stack is deep
    while waiting:
        value = waiting.pop()
        if isinstance(value, _ATOMS) or id(value) in seen or isinstance(value, skip):
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            if max_bytes is None or value.numel() * value.element_size() <= max_bytes:
                put_back.append(_keep_tensor(value))
        elif isinstance(value, np.ndarray):
            if value.flags.writeable and (max_bytes is None or value.nbytes <= max_bytes):
                put_back.append(functools.partial(np.copyto, value, value.copy()))
            if value.dtype == object:
                waiting.extend(value.flat)
        elif isinstance(value, Iterator) and (isinstance(value, _BaseDataLoaderIter) or not _has_attributes(value)):
            iterators.append(value)
        else:
            for back, held in (_keep_contents(value), _keep_attributes(value)):
                put_back.extend(back)
                waiting.extend(held)
    return put_back, iterators


def _keep_contents(value: Any) -> tuple[list[_PutBack], list[Any]]:
    """For a container or a random generator: how to put its contents back, and what it holds."""
    if isinstance(value, list | deque | bytearray):
        members = list(value)
        return [functools.partial(_refill, value, value.extend, members)], members
    if isinstance(value, dict | set):
        entries: Any = dict(value) if isinstance(value, dict) else set(value)
        held = [*entries, *entries.values()] if isinstance(entries, dict) else list(entries)
        return [functools.partial(_refill, value, value.update, entries)], held
    if isinstance(value, tuple | frozenset):
        return [], list(value)
    if isinstance(value, random.Random):
        return [functools.partial(value.setstate, value.getstate())], []
    if isinstance(value, torch.Generator | np.random.RandomState):
        return [functools.partial(_set_state, value, value.get_state())], []
    if isinstance(value, np.random.Generator):
        return [functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)], []
    if isinstance(value, functools.partial):
        return [], [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [], [value.__self__]
    return [], []


def _set_state(generator: Any, state: Any) -> None:
    generator.set_state(state)


def _refill(container: Any, fill: Callable[[Any], None], members: Any) -> None:
    container.clear()
    fill(members)


def _has_attributes(value: Any) -> bool:
    return isinstance(getattr(value, "__dict__", None), dict) or any(_slots(type(value)))


def _slots(kind: type) -> Iterator[Any]:
    for base in kind.__mro__:
        if "__slots__" in vars(base):
            yield from (slot for slot in vars(base).values() if isinstance(slot, types.MemberDescriptorType))


def _keep_attributes(value: Any) -> tuple[list[_PutBack], list[Any]]:
    package = type(value).__module__.partition(".")[0]
    if package in sys.stdlib_module_names and package not in {*_STANDARD_HOLDERS, "__main__"}:
        return [], []
    back: list[_PutBack] = []
    held: list[Any] = []
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        before = dict(attributes)
        back.append(functools.partial(_refill, attributes, attributes.update, before))
        held.extend(before.values())
    for slot in _slots(type(value)):
        member = getattr(value, slot.__name__, _MISSING)
        back.append(functools.partial(_set_slot, slot, value, member))
        held.append(member)
    return back, held


def _set_slot(slot: Any, owner: Any, member: Any) -> None:
    # through the slot itself: a frozen dataclass refuses `setattr`
    if member is not _MISSING:
        slot.__set__(owner, member)
    elif hasattr(owner, slot.__name__):
        slot.__delete__(owner)


def _keep_tensor(tensor: Tensor) -> _PutBack:
    asks, gradient = tensor.requires_grad, tensor.grad if tensor.is_leaf else None
    if gradient is not None:
        tensor.grad = None  # a fresh gradient inside; the old one is put back by identity
    before = _once(tensor).detach().clone()
    # a loss that a list keeps may wait for its backward pass, which a write would break; nobody writes into it
    version = tensor._version if tensor.grad_fn is not None else None

    def put_back() -> None:
        if tensor.is_leaf and tensor.requires_grad != asks:
            tensor.requires_grad_(asks)
        if tensor.is_leaf and tensor.grad is not gradient:
            tensor.grad = gradient
        if version is not None and tensor._version == version:
            return
        with torch.no_grad():
            _once(tensor).copy_(before)

    return put_back


def _once(tensor: Tensor) -> Tensor:
    """The tensor without a graph, each number of an expanded one only once: those refuse a write.

    Through `detach`: a metric's state is an inference tensor where validation made it, and refuses a direct write.
    """
    if tensor.layout != torch.strided:
        return tensor  # a write to a detached sparse tensor gives that one other values
    detached = tensor.detach()
    if 0 not in tensor.stride():
        return detached
    shape = [1 if stride == 0 and size else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return detached.as_strided(shape, tensor.stride())
