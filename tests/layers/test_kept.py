"""Whatever hangs on an object comes back: against copies made by hand."""

from __future__ import annotations

import functools
import random
import threading
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_unfreeze.layers.kept import kept


class Meter:
    def __init__(self) -> None:
        self.total, self.history = 0.0, [1.0]

    def update(self) -> None:
        self.total += 1
        self.history.append(self.total)
        self.new = True


class SlottedMeter:
    __slots__ = ("later", "total")

    def __init__(self) -> None:
        self.total = 0.0

    def update(self) -> None:
        self.total += 1
        self.later = [1]


@dataclass(frozen=True)
class FrozenMeter:
    counts: dict[str, int] = field(default_factory=dict)

    def update(self) -> None:
        self.counts["n"] = 1 + self.counts.get("n", 0)


@dataclass(slots=True)
class SlottedDataMeter:
    total: float = 0.0

    def update(self) -> None:
        self.total += 1


class ListMeter(list):  # type: ignore[type-arg]
    """A container with an attribute."""

    total = 0

    def update(self) -> None:
        self.append(1)
        self.total += 1


class Average(nn.Module):
    """A copy of a network on an object that is no module, as an EMA keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.BatchNorm1d(2)

    def update(self) -> None:
        self.net(torch.randn(3, 2))
        self.net.weight.data.add_(1)
        self.net.eval()


def state_of(value: Any) -> Any:
    if isinstance(value, nn.Module):
        modes = [part.training for part in value.modules()]
        return {name: tensor.tolist() for name, tensor in value.state_dict().items()}, modes
    slots = {name: getattr(value, name) for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)}
    return repr({**getattr(value, "__dict__", {}), **slots}), list(value) if isinstance(value, list) else None


@pytest.mark.parametrize("kind", [Meter, SlottedMeter, FrozenMeter, SlottedDataMeter, ListMeter, Average])
@pytest.mark.parametrize(
    "place",
    [
        lambda meter: meter,
        lambda meter: [meter],
        lambda meter: {"train": (meter, 1)},
        lambda meter: SimpleNamespace(inner=SimpleNamespace(meter=meter)),
        lambda meter: {meter.update: 1},
        lambda meter: functools.partial(print, meter),
    ],
    ids=["itself", "list", "dict-tuple", "namespace", "bound_method", "partial"],
)
def test_kept__puts_back_objects_of_users_classes(kind: Any, place: Any) -> None:
    meter = kind()
    before = state_of(meter)
    with kept(place(meter)):
        meter.update()
        meter.update()
        assert state_of(meter) != before
    assert state_of(meter) == before


def test_kept__containers_keep_their_identity_and_their_order() -> None:
    inner = [1]
    values: Any = [inner, {1}, deque([1], maxlen=2), Counter(a=1), OrderedDict(x=1, y=2), bytearray(b"ab")]
    with kept(values):
        values[1].add(2)
        values[2].extend([2, 3])
        values[3]["b"] += 1
        values[4].move_to_end("x")
        values[5].append(9)
        inner.append(2)
        values.reverse()
    assert values[0] is inner and inner == [1]
    assert values[1:] == [{1}, deque([1], maxlen=2), Counter(a=1), OrderedDict(x=1, y=2), bytearray(b"ab")]


def test_kept__follows_cycles_and_long_chains() -> None:
    root: dict[str, Any] = {"children": []}
    root["children"].append({"parent": root, "n": 0})
    chain: Any = None
    for _ in range(20_000):  # far deeper than the stack
        chain = SimpleNamespace(next=chain, n=0)
    chain.module = nn.Linear(1, 1)
    chain.module.owner = chain
    with kept(root, chain):
        root["children"][0]["n"] = 1
        chain.next.next.n = 1
        chain.module.weight.data.fill_(7)
    assert root["children"][0]["n"] == 0 and root["children"][0]["parent"] is root
    assert chain.next.next.n == 0 and chain.module.weight.item() != 7


@pytest.mark.parametrize(
    ("generator", "draw"),
    [
        (random.Random(0), lambda g: g.random()),
        (np.random.default_rng(0), lambda g: g.random()),
        (np.random.RandomState(0), lambda g: g.rand()),
        (torch.Generator().manual_seed(0), lambda g: float(torch.rand(1, generator=g))),
    ],
)
def test_kept__random_generators_draw_the_same_again(generator: Any, draw: Any) -> None:
    with kept([generator]):
        inside = [draw(generator) for _ in range(3)]
    assert [draw(generator) for _ in range(3)] == inside


def test_kept__tensors_of_every_kind() -> None:
    leaf = torch.ones(2, requires_grad=True)
    leaf.grad = gradient = torch.full((2,), 5.0)
    expanded, sparse = torch.zeros(1).expand(1000, 3), torch.eye(2).to_sparse()
    array, objects = np.zeros(2), np.array([[1], None], dtype=object)
    with kept(leaf, expanded, sparse, array, objects):
        assert leaf.grad is None
        (leaf * 2).sum().backward()
        leaf.data += 1
        leaf.requires_grad_(False)
        expanded.as_strided((1,), (1,)).fill_(3)
        sparse.mul_(4)
        array += 1
        objects[0].append(2)
    assert leaf.requires_grad and leaf.grad is gradient and gradient.tolist() == [5, 5] and leaf.tolist() == [1, 1]
    assert expanded.sum() == 0 and sparse.to_dense().tolist() == [[1, 0], [0, 1]]
    assert array.tolist() == [0, 0] and objects.tolist() == [[1], None]


def test_kept__leaves_alone_what_has_a_life_of_its_own_and_what_it_is_told_to() -> None:
    class Told:
        value = 0

    told, holder = Told(), SimpleNamespace(lock=threading.Lock(), large=torch.zeros(10), small=torch.zeros(1))
    holder.lines = (line for line in "abc")
    with kept(told, holder, skip=(Told,), max_bytes=8) as iterators:
        told.value = 1
        holder.large += 1
        holder.small += 1
        holder.lock.acquire()
        assert iterators == [holder.lines]
    assert told.value == 1 and holder.large.sum() == 10 and holder.small == 0 and holder.lock.locked()


def test_kept__puts_back_after_an_error() -> None:
    meter = Meter()

    def fails() -> None:
        with kept(meter):
            meter.update()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert vars(meter) == {"total": 0.0, "history": [1.0]}
