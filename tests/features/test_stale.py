"""A store of other data, or of another network, is never read. The oracle is the loop without any store.

In each case the first run leaves a store behind, and the second asks for one in the same folder. What changed between
them gives other losses in the plain loop, so that the losses of a stale store could not be equal to those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from lightning_unfreeze.features import cached

NUM_IMAGES, NUM_CLASSES = 12, 3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """As many as there are images: where each is named, no item is looked into."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for index in range(NUM_IMAGES):
        np.save(folder / f"{index:02d}.npy", draw.normal(size=(3, 6, 6)).astype(np.float32))
    return sorted(folder.iterdir())


class Files(Dataset[Any]):
    """Reads images by their paths; where the labels are is up to `keep` and `label`."""

    def __init__(self, paths: list[Path], kept: Any, label: Callable[[Any, Path, int], Any]) -> None:
        self.paths, self.kept, self.label = paths, kept, label

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.paths[index]
        return torch.from_numpy(np.load(path)), int(self.label(self.kept, path, index))


class Labels:
    """An object of the user's own."""

    def __init__(self, labels: list[int]) -> None:
        self.table = {"fold 0": {"labels": tuple(labels)}}


class Relabels(Dataset[Any]):
    """A wrapper that calls what it wraps by a name of its own, and has the labels."""

    def __init__(self, photos: Dataset[Any], labels: list[int]) -> None:
        self.photos, self.labels = photos, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.photos[index][0], self.labels[index]


def by_index(kept: Any, path: Path, index: int) -> Any:
    return kept[index]


def unlabelled(files: list[Path]) -> Files:
    return Files(files, [0] * len(files), by_index)


# by where the labels are kept: from files and labels to a dataset
KEPT: dict[str, Callable[[list[Path], list[int]], Any]] = {
    "list": lambda files, y: Files(files, y, by_index),
    "array": lambda files, y: Files(files, np.array(y), by_index),
    "dict by name": lambda files, y: Files(
        files, {path.stem: label for path, label in zip(files, y, strict=True)}, lambda kept, path, _: kept[path.stem]
    ),
    "dict by path": lambda files, y: Files(files, dict(zip(files, y, strict=True)), lambda kept, path, _: kept[path]),
    "DataFrame": lambda files, y: Files(
        files,
        pd.DataFrame({"file": [path.name for path in files], "label": y}),
        lambda kept, _, i: kept["label"].iloc[i],
    ),
    "DataFrame, index": lambda files, y: Files(
        files, pd.DataFrame(index=pd.Index(y), data={"one": 1}), lambda kept, _, i: kept.index[i]
    ),
    "categorical": lambda files, y: Files(
        files, pd.Series(["abc"[label] for label in y], dtype="category"), lambda kept, _, i: kept.cat.codes[i]
    ),
    "Series": lambda files, y: Files(
        files, pd.Series(y, index=[path.stem for path in files]), lambda kept, path, _: kept[path.stem]
    ),
    "Series, index": lambda files, y: Files(
        files, pd.Series([0] * len(y), index=y), lambda kept, _, i: kept.index[i]
    ),
    "records": lambda files, y: Files(
        files, [{"file": path.name, "label": label} for path, label in zip(files, y, strict=True)],
        lambda kept, _, i: kept[i]["label"],
    ),
    "structured array": lambda files, y: Files(
        files, np.array([(label, 0.5) for label in y], [("label", "i4"), ("weight", "f4")]),
        lambda kept, _, i: kept["label"][i],
    ),
    "own object": lambda files, y: Files(
        files, Labels(y), lambda kept, _, i: kept.table["fold 0"]["labels"][i]
    ),
    "closure": lambda files, y: Files(files, None, lambda _, __, i: y[i]),
    "bound arguments": lambda files, y: Files(files, None, functools.partial(lambda _, __, i, y: y[i], y=y)),
    "inner dataset": lambda files, y: Subset(Files(files, y, by_index), range(len(files))),
    "inner dataset under any name": lambda files, y: Relabels(Files(files, y, by_index), y),
    "wrapper": lambda files, y: Relabels(unlabelled(files), y),
    "second of two": lambda files, y: ConcatDataset(
        [Files(files[:6], y[:6], by_index), Files(files[6:], y[6:], by_index)]
    ),
}  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        nn.Linear(16, NUM_CLASSES),
    )


def losses(model: nn.Module, data: Any, store: Path | None, head: str = "1", **options: Any) -> list[float]:
    """Of two epochs of the head: in a plain loop, or on what `store` holds."""

    def loop(batches: Any) -> list[float]:
        optimizer, found = torch.optim.SGD(model.get_submodule(head).parameters(), lr=0.5), []
        for _ in range(2):
            for images, labels in batches:
                loss = nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        return found

    batches = DataLoader(data, 4)
    if store is not None:
        with cached(model, batches, head, directory=store, **options) as served:
            return loop(served)
    model.requires_grad_(False).eval().get_submodule(head).requires_grad_(True)
    return loop(batches)


def num_stores(folder: Path) -> int:
    return len(list(folder.glob("*-train/manifest.json")))


@pytest.mark.parametrize("kept", KEPT)
def test_store__of_other_labels_is_not_read(kept: str, files: list[Path], tmp_path: Path) -> None:
    before = [index % NUM_CLASSES for index in range(NUM_IMAGES)]
    after = [*before[:7], (before[7] + 1) % NUM_CLASSES, *before[8:]]  # one label of twelve
    plain = [losses(network(), KEPT[kept](files, labels), None) for labels in (before, after)]
    assert plain[0] != plain[1]
    for labels, wanted in ((before, plain[0]), (after, plain[1]), (before, plain[0])):
        assert losses(network(), KEPT[kept](files, list(labels)), tmp_path) == wanted
    assert num_stores(tmp_path) == 2  # the third run read what the first had left


def test_store__of_another_subset_is_not_read(files: list[Path], tmp_path: Path) -> None:
    """Of equal size and with equal labels: nothing but the indices differs."""
    labels = [index % NUM_CLASSES for index in range(NUM_IMAGES)]
    rows: list[Any] = [[0, 1, 2, 3], [3, 1, 2, 0], [6, 1, 2, 3], np.array([0, 1, 5, 3]), torch.tensor([0, 4, 2, 3])]
    parts = [Subset(Files(files, labels, by_index), each) for each in rows]
    plain = [losses(network(), part, None) for part in parts]
    assert len(set(map(tuple, plain))) == len(rows)
    assert [losses(network(), part, tmp_path) for part in parts] == plain
    assert num_stores(tmp_path) == len(rows)


def test_store__of_labels_that_nobody_can_see_needs_the_users_word(files: list[Path], tmp_path: Path) -> None:
    """What cannot be told from another is refused; what the user says of it is taken, and counts."""

    def endless(labels: list[int]) -> Any:
        return Files(files, iter(labels), lambda kept, _, i: i % NUM_CLASSES)

    with pytest.raises(
        RuntimeError, match=r"no features can be stored: Files\.kept is a builtins\.list_iterator.*data_fingerprint"
    ):
        losses(network(), endless([0]), tmp_path)
    assert num_stores(tmp_path) == 0
    for word in ("v1", "v2", "v1"):
        losses(network(), endless([0]), tmp_path, data_fingerprint=word)
    assert num_stores(tmp_path) == 2


# --- another network -------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A module around backbone and head, as people write to normalise on the device."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.net, self.scale = network(), scale

    def forward(self, images: Tensor) -> Tensor:
        return self.net(self.scale * images)


class Flipped(Scaled):
    """The same weights under the same names; another forward."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.flip(1))


class Chosen(nn.Module):
    """The activation is a function, kept as an attribute."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.net, self.act = network(), act
        self.net[0][2] = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        convolution, norm, _, pool, flat = self.net[0]
        return self.net[1](flat(pool(self.act(norm(convolution(images))))))


def with_part(place: int, part: nn.Module) -> nn.Module:
    """The network with another part, which takes over the weights of the one that it replaces."""
    model = network()
    part.load_state_dict(model[0][place].state_dict())
    model[0][place] = part
    return model


def hooked(hook: Callable[..., Any]) -> nn.Module:
    model = network()
    model[0][0].register_forward_hook(hook)
    return model


def times(factor: Any) -> Callable[..., Any]:
    return lambda module, inputs, output: factor * output


# by what differs: two networks of equal weights
PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "variant of an activation": (network, lambda: with_part(2, nn.GELU(approximate="tanh"))),
    "activation": (network, lambda: with_part(2, nn.SiLU())),
    "epsilon of a norm": (network, lambda: with_part(1, nn.BatchNorm2d(4, eps=0.1))),
    "stride": (network, lambda: with_part(0, nn.Conv2d(3, 4, 3, stride=2))),
    "padding mode": (
        lambda: with_part(0, nn.Conv2d(3, 4, 3, padding=1)),
        lambda: with_part(0, nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")),
    ),
    "pooling": (network, lambda: with_part(3, nn.AdaptiveMaxPool2d(2))),
    "wrapper": (Scaled, Flipped),
    "setting of a wrapper": (Scaled, lambda: Scaled(0.5)),
    "function": (lambda: Chosen(nn.functional.gelu), lambda: Chosen(torch.tanh)),
    "lambda": (lambda: Chosen(lambda x: x.clamp(0, 6)), lambda: Chosen(lambda x: x.clamp(0, 1))),
    "hook": (lambda: hooked(lambda *args: args[2].relu()), lambda: hooked(lambda *args: args[2].tanh())),
    "constant in a hook": (lambda: hooked(lambda *args: 1.5 * args[2]), lambda: hooked(lambda *args: 2.5 * args[2])),
    "closure of a hook": (lambda: hooked(times(1.5)), lambda: hooked(times(2.5))),
    "tensor in a hook": (lambda: hooked(times(torch.tensor(1.5))), lambda: hooked(times(torch.tensor(2.5)))),
}


@pytest.mark.parametrize("what", PAIRS)
def test_store__of_another_network_is_not_read(what: str, files: list[Path], tmp_path: Path) -> None:
    data = Files(files, [index % NUM_CLASSES for index in range(NUM_IMAGES)], by_index)
    one, other = PAIRS[what]
    weights = [{name: value.tolist() for name, value in make().state_dict().items()} for make in (one, other)]
    assert weights[0] == weights[1]
    head = "1" if "1.weight" in weights[0] else "net.1"
    plain = [losses(make(), data, None, head) for make in (one, other)]
    assert plain[0] != plain[1]
    for make, wanted in ((one, plain[0]), (other, plain[1]), (one, plain[0])):
        assert losses(make(), data, tmp_path, head) == wanted
    assert num_stores(tmp_path) == 2
