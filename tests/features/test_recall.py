"""A second start searches again wherever something could make the answer another one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lightning_unfreeze.features import recall
from lightning_unfreeze.features.recall import recall_prefix, search_key

helper = SimpleNamespace(between=lambda x, stem: x)  # reached by an attribute, so its code is in no key
FACTOR = 1.0


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.BatchNorm2d(4), 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.block = nn.Conv2d(3, 4, 3), Norm(), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 2)
        self.register_buffer("way", torch.tensor(0))
        self.options = {"act": "relu"}
        for part in (self.stem, self.norm):
            part.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        x = helper.between(self.norm(stem), stem)
        return self.head(self.block(x).relu().mean((2, 3))) * FACTOR


@pytest.fixture
def searches(monkeypatch):
    """Counts the searches; nothing is remembered from other tests."""
    made = []
    search = recall.find_prefix

    def counted(*args):
        made.append(args)
        return search(*args)

    monkeypatch.setattr(recall, "find_prefix", counted)
    monkeypatch.setattr(recall, "_found", type(recall._found)())
    return made


def start(network: nn.Module, images: Tensor | None = None, conditions: object = "fp32", file: Path | None = None):
    images = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(1)) if images is None else images
    return recall_prefix(network, images, network, [images], conditions, file)


def test_recall__another_network_of_the_same_kind_is_not_searched_again(searches):
    first, second = Net(), Net()
    found, recalled = start(first), start(second)
    assert len(searches) == 1
    assert recalled.reason == found.reason
    assert recalled.prefix.network is second
    assert (recalled.prefix.boundary, recalled.prefix.shapes) == ("norm", {"norm": (4, 10, 10)})
    images = torch.rand(5, 3, 12, 12)
    plain = second(images)
    with recalled.prefix.replay(recalled.prefix.extract(images)) as x:
        assert torch.equal(second(x), plain)


def _hook(network):
    network.stem.register_forward_hook(lambda module, args, output: output + 1)


def _own_forward(network):
    network.block.forward = lambda x: nn.functional.conv2d(x.detach(), network.block.weight)


def _another_class(network):
    class Norm2(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.scale

    network.norm.__class__ = Norm2


def _tie(network):
    network.other = network.block


_CHANGES = {
    "frozen": lambda network: network.block.requires_grad_(False).eval(),
    "thawed": lambda network: network.norm.norm.weight.requires_grad_(True),
    "mode": lambda network: network.head.train(not network.head.training),
    "attribute": lambda network: setattr(network.norm, "scale", 3.0),
    "nested": lambda network: network.options.update(act="gelu"),
    "extra_repr": lambda network: setattr(network.stem, "stride", (2, 2)),
    "class": _another_class,
    "part": lambda network: setattr(network, "norm", nn.Identity()),
    "tied": _tie,
    "flag in a buffer": lambda network: network.way.add_(1),
    "memory format": lambda network: network.to(memory_format=torch.channels_last),
    "dtype of a part": lambda network: network.norm.norm.register_buffer("running_mean", torch.zeros(4).double()),
    "hook": _hook,
    "forward of its own": _own_forward,
}


@pytest.mark.parametrize("what", _CHANGES)
def test_search_key__sees_what_could_change_the_answer(what):
    images = [torch.rand(4, 3, 12, 12)]
    network = Net()
    before = search_key(network, images, "fp32")
    assert before
    assert search_key(network, images, "fp32") == before
    _CHANGES[what](network)
    assert search_key(network, images, "fp32") != before


def test_search_key__sees_batch_conditions_and_settings(monkeypatch):
    network, images = Net(), torch.rand(4, 3, 12, 12)
    keys = [
        search_key(network, [images], "fp32"),
        search_key(network, [images], "bf16"),
        search_key(network, [images[:3]], "fp32"),
        search_key(network, [images[..., :11]], "fp32"),
        search_key(network, [images.double()], "fp32"),
        search_key(network, [images.contiguous(memory_format=torch.channels_last)], "fp32"),
        search_key(network, [images.to("meta")], "fp32"),
        search_key(network, {"x": images}, "fp32"),
        search_key(network, [images, 3], "fp32"),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        keys.append(search_key(network, [images], "fp32"))
    monkeypatch.setitem(globals(), "FACTOR", 2.0)  # a global that `forward` names
    keys.append(search_key(network, [images], "fp32"))
    assert all(keys)
    assert len(set(keys)) == len(keys)


class _Opaque:
    __slots__ = ()


def _generator():
    yield 1


_UNKNOWN = {
    "no conditions": (lambda network: None, None),
    "hook": (_hook, "fp32"),
    "generator": (lambda network: setattr(network, "rest", _generator()), "fp32"),
    "object in C": (lambda network: setattr(network, "rest", torch._C.Graph()), "fp32"),
    "hidden module": (lambda network: setattr(network, "rest", [nn.Linear(1, 1)]), "fp32"),
    "data": (lambda network: setattr(network, "rest", torch.utils.data.TensorDataset(torch.ones(1))), "fp32"),
    "large tensor": (lambda network: setattr(network, "rest", torch.ones(2**19)), "fp32"),
    "hook of all modules": (None, "fp32"),
}


@pytest.mark.parametrize("what", _UNKNOWN)
def test_recall__searches_each_time_where_something_is_not_known(what, searches):
    change, conditions = _UNKNOWN[what]
    network = Net()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None) if change is None else None
    try:
        (change or (lambda network: None))(network)
        for _ in range(2):
            assert start(network, conditions=conditions).prefix is not None
    finally:
        if handle is not None:
            handle.remove()
    assert len(searches) == 2
    assert not recall._found


@pytest.mark.parametrize("between", [lambda x, _: x.detach() * 2, lambda x, _: x.relu(), lambda x, _: -x])
def test_recall__is_right_where_code_changed_that_no_key_sees(between, searches, monkeypatch):
    network, images = Net(), torch.rand(6, 3, 12, 12)
    start(network)
    monkeypatch.setattr(helper, "between", between)
    prefix = start(network).prefix
    torch.manual_seed(0)
    plain = network(images)
    torch.manual_seed(0)
    with prefix.replay(prefix.extract(images)) as x:
        assert torch.equal(network(x), plain)


def test_recall__searches_again_where_the_recalled_boundary_does_not_hold(searches, monkeypatch):
    network = Net()
    assert start(network).prefix.boundary == "norm"
    monkeypatch.setattr(helper, "between", torch.add)  # what is behind the boundary reads from before it
    monkeypatch.setattr(recall, "search_key", lambda *_: next(iter(recall._found)))  # a key that sees nothing
    found = start(network).prefix
    assert len(searches) == 2
    assert sorted(found.shapes) == ["norm", "stem"]
    assert start(network).prefix.shapes == found.shapes  # the new answer is the one that is kept
    assert len(searches) == 2


def test_recall__remembers_no_numbers_of_a_forward(searches):
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 4, 10, 10), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.table * 1  # the same for all images

    class Placed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.places = Places()

        def forward(self, x: Tensor) -> Tensor:
            places = self.places(x)
            x = self.norm(self.stem(x)) + places
            return self.head(self.block(x).relu().mean((2, 3)))

    for _ in range(2):  # of other weights each time
        network = Placed()
        network.places.eval()
        prefix = start(network).prefix
        assert prefix is not None
    assert len(searches) == 2
    assert not recall._found


def test_recall__forgets_the_oldest(searches, monkeypatch):
    monkeypatch.setattr(recall, "_MOST", 2)
    for conditions in ("a", "b", "c", "b", "c", "a"):
        start(Net(), conditions=conditions)
    assert len(searches) == 4
    assert len(recall._found) == 2


class Halves(Net):
    """What crosses its boundary is a mapping that holds a constant beside the features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Pair()

    def forward(self, x: Tensor) -> Tensor:
        halves = self.stem(x)
        return self.head(self.block(halves["two"][0] * halves["scale"]).relu().mean((2, 3)))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> dict[str, object]:
        return {"two": (self.conv(x), None), "scale": 2}


@pytest.mark.parametrize("kind", [Net, Halves])
def test_recall__another_process_finds_it_beside_the_store(kind, searches, tmp_path):
    file = tmp_path / "store" / "searches.pt"
    found = start(kind(), file=file)
    recall._found.clear()  # as another process starts
    network, images = kind(), torch.rand(5, 3, 12, 12)
    recalled = start(network, file=file)
    assert len(searches) == 1
    assert recalled.prefix.found == found.prefix.found
    plain = network(images)
    with recalled.prefix.replay(recalled.prefix.extract(images)) as x:
        assert torch.equal(network(x), plain)
    start(kind(), conditions="bf16", file=file)
    assert len(searches) == 2
    recall._found.clear()
    for conditions in ("fp32", "bf16"):
        start(kind(), conditions=conditions, file=file)
    assert len(searches) == 2
    assert list(file.parent.iterdir()) == [file]  # and no half one


@pytest.mark.parametrize("content", ["empty", "half", "cut", "of another version"])
def test_recall__a_file_that_cannot_be_read_costs_a_search(content, searches, tmp_path):
    file = tmp_path / "searches.pt"
    start(Net(), file=file)
    if content == "of another version":
        torch.save({"key": {"calls": []}}, file)
    else:
        file.write_bytes({"empty": b"", "half": b"half", "cut": file.read_bytes()[:-30]}[content])
    recall._found.clear()
    assert start(Net(), file=file).prefix.boundary == "norm"
    assert len(searches) == 2
    recall._found.clear()
    start(Net(), file=file)
    assert len(searches) == 2  # written anew


def test_recall__a_full_disk_costs_nothing_but_the_file(searches, monkeypatch, tmp_path):
    def fails(held, file):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(recall.torch, "save", fails)
    assert start(Net(), file=tmp_path / "searches.pt").prefix is not None
    assert list(tmp_path.iterdir()) == []


def test_recall__the_oldest_in_the_file_go(searches, monkeypatch, tmp_path):
    monkeypatch.setattr(recall, "_MOST", 2)
    for conditions in ("a", "b", "c"):
        recall._found.clear()
        start(Net(), conditions=conditions, file=tmp_path / "searches.pt")
    for conditions in ("c", "b", "a"):
        recall._found.clear()
        start(Net(), conditions=conditions, file=tmp_path / "searches.pt")
    assert len(searches) == 4
