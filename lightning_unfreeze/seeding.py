"""Random numbers as a function of a key: the same for the same key, whatever ran before and in whichever process."""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def key_to_seed(*key: int | str) -> int:
    """Hash a key to a seed, the same on every machine, Python version and process.

    Args:
        key: Integers and strings, in order; `1` and `"1"` are different.

    Returns:
        An integer in [0, 2**63).

    >>> key_to_seed("order", 0, 1) == key_to_seed("order", 0, 1)
    True
    >>> key_to_seed("order", 0, 1) == key_to_seed("order", 1, 0)
    False
    """
    # numpy integers print in their own way, so every number becomes a plain int first
    plain = tuple(part if isinstance(part, str) else operator.index(part) for part in key)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def keyed_rng(*key: int | str) -> Iterator[None]:
    """Seed Python's, numpy's global and torch's CPU generator from a key, and put their states back afterwards.

    CUDA generators are left alone, so that this may be used in worker processes. One use costs about 0.1 ms.

    >>> with keyed_rng("sample", 0, 7):
    ...     first = torch.rand(1)
    >>> with keyed_rng("sample", 0, 7):
    ...     print(bool(torch.rand(1) == first))
    True
    """
    seed = key_to_seed(*key)
    # the default generator itself: `torch.manual_seed` would seed the accelerators as well
    generator = torch.default_generator
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), generator.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # noqa: NPY002
    generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        generator.set_state(torch_state)


def rng_state() -> dict[str, Any]:
    """State of Python's, numpy's global, torch's CPU generator and, where CUDA is in use, of the current device.

    Returns:
        Tensors and primitives only, so that `torch.load(weights_only=True)` reads it.
    """
    version, words, gauss_next = random.getstate()
    name, keys, position, has_gauss, cached_gaussian = np.random.get_state(legacy=True)  # noqa: NPY002
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words), "gauss_next": gauss_next},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "rest": [int(position), int(has_gauss), float(cached_gaussian)],
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned, from tensors on any device.

    A CUDA state is set where CUDA is available and left out elsewhere, so that a run can go on on another machine.
    """
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss_next"]))
    np.random.set_state((numpy["name"], numpy["keys"].cpu().numpy().astype(np.uint32), *numpy["rest"]))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    cuda_state: Tensor | None = state.get("cuda")
    if cuda_state is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda_state.cpu())


@contextmanager
def kept_rng() -> Iterator[None]:
    """Whatever is drawn or seeded inside, afterwards the random state is that of before (see `rng_state`).

    >>> before = torch.get_rng_state()
    >>> with kept_rng():
    ...     number = torch.rand(1)
    >>> torch.equal(before, torch.get_rng_state())
    True
    """
    before = rng_state()
    try:
        yield
    finally:
        set_rng_state(before)


def seed_all(*key: int | str) -> None:
    """Seed Python's, numpy's global and torch's generators (accelerators too) from a key, for good."""
    seed = key_to_seed(*key)
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # noqa: NPY002
    torch.manual_seed(seed)
