# ruff: noqa: NPY002  (numpy's global generator is what is tested)
from __future__ import annotations

import hashlib
import io
import random

import numpy as np
import pytest
import torch

from lightning_unfreeze.seeding import key_to_seed, keyed_rng, rng_state, set_rng_state


def draw() -> list[float]:
    """One number of each kind that keeps state, Gaussian caches of Python and numpy included."""
    return [
        random.random(),
        random.gauss(0.0, 1.0),
        float(np.random.rand()),
        float(np.random.randn()),
        *torch.randn(3).tolist(),
    ]


def test_key_to_seed__is_the_hash_of_the_keys_repr() -> None:
    digest = hashlib.blake2b(b"('order', 0, 1)", digest_size=8).digest()
    assert key_to_seed("order", 0, 1) == sum(byte << (8 * i) for i, byte in enumerate(digest)) // 2


def test_key_to_seed__tells_types_order_and_lengths_apart_and_takes_numpy_integers() -> None:
    keys = [(1,), ("1",), (1, 2), (2, 1), (12,), ("a", "b"), ("ab",), (1, 2, 0), (-1,), ()]
    seeds = {key_to_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert key_to_seed(np.int64(3), "a") == key_to_seed(3, "a")  # type: ignore[arg-type]


def test_key_to_seed__refuses_floats() -> None:
    with pytest.raises(TypeError):
        key_to_seed(1.5)  # type: ignore[arg-type]


def test_keyed_rng__gives_the_same_numbers_for_the_same_key_only() -> None:
    with keyed_rng("sample", 0, 3):
        first = draw()
    draw()
    with keyed_rng("sample", 0, 3):
        second = draw()
    with keyed_rng("sample", 0, 4):
        other = draw()
    assert first == second
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_keyed_rng__leaves_all_three_generators_as_they_were(fails: bool) -> None:
    def seed_all() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        draw()  # leaves a cached Gaussian in Python's and numpy's generator

    seed_all()
    expected = draw()
    seed_all()
    try:
        with keyed_rng(5):
            draw()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert draw() == expected


def test_rng_state__survives_a_weights_only_checkpoint_and_restores_every_generator() -> None:
    draw()
    buffer = io.BytesIO()
    torch.save(rng_state(), buffer)
    expected = draw()
    buffer.seek(0)
    set_rng_state(torch.load(buffer, weights_only=True))
    assert draw() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rng_state__holds_the_cuda_generator_in_use() -> None:
    torch.zeros(1, device="cuda")
    state = rng_state()
    expected = torch.randn(3, device="cuda")
    set_rng_state({key: value.cuda() if torch.is_tensor(value) else value for key, value in state.items()})
    assert torch.equal(torch.randn(3, device="cuda"), expected)
