from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lightning_unfreeze.data.transforms import CropStrip
from lightning_unfreeze.features import describe
from lightning_unfreeze.features import key as fingerprints
from lightning_unfreeze.features.key import (
    dataset_fingerprint,
    fingerprint_of,
    prefix_checksum,
    prefix_fingerprint,
    transform_fingerprint,
)
from lightning_unfreeze.features.search import find_prefix


def test_fingerprint_of__depends_on_names_values_and_package_version(monkeypatch):
    base = fingerprint_of(weights="a", views=4, sizes=[1, 2])
    assert len(base) == 32
    assert fingerprint_of(sizes=[1, 2], views=4, weights="a") == base
    others = [
        fingerprint_of(weights="b", views=4, sizes=[1, 2]),
        fingerprint_of(weights="a", views=5, sizes=[1, 2]),
        fingerprint_of(weights="a", views=4, sizes=[2, 1]),
        fingerprint_of(weights="a", views="4", sizes=[1, 2]),
        fingerprint_of(weight="a", views=4, sizes=[1, 2]),
    ]
    monkeypatch.setattr(fingerprints, "__version__", "another")
    others.append(fingerprint_of(weights="a", views=4, sizes=[1, 2]))
    assert len({base, *others}) == 7
    with pytest.raises(TypeError):
        fingerprint_of(weights=object())


def function_from(source):
    """A function of the user's own module, written anew."""
    module = types.ModuleType("user_transforms")
    exec(textwrap.dedent(source), module.__dict__)
    return module.transform


def same(source):
    return transform_fingerprint(function_from(source)), transform_fingerprint(function_from(source))


SOURCES = {
    "base": "def transform(x): return x + 1",
    "constant": "def transform(x): return x + 2",
    "operation": "def transform(x): return x - 1",
    "default": "def transform(x, y=1): return x + 1",
    "other default": "def transform(x, y=2): return x + 1",
    "global": "A = 1\ndef transform(x): return x + A",
    "other global": "A = 2\ndef transform(x): return x + A",
    "helper": "def helper(x): return x\ndef transform(x): return helper(x)",
    "other helper": "def helper(x): return -x\ndef transform(x): return helper(x)",
    "inner": "A = 1\ndef transform(x): return [A + y for y in x]",
    "other inner": "A = 2\ndef transform(x): return [A + y for y in x]",
    "closure": "def make(a): return lambda x: x + a\ntransform = make(1)",
    "other closure": "def make(a): return lambda x: x + a\ntransform = make(2)",
    "class": "class T:\n  def __call__(self, x): return x\ntransform = T()",
    "other method": "class T:\n  def __call__(self, x): return -x\ntransform = T()",
    "class constant": "class T:\n  a = 1\n  def __call__(self, x): return x\ntransform = T()",
    "other class constant": "class T:\n  a = 2\n  def __call__(self, x): return x\ntransform = T()",
    "attribute": "class T:\n  def __call__(self, x): return x\ntransform = T()\ntransform.a = 1",
    "bound": "class T:\n  def f(self, x): return x\nt = T()\nt.a = 1\ntransform = t.f",
    "other bound": "class T:\n  def f(self, x): return x\nt = T()\nt.a = 2\ntransform = t.f",
    "inherited": "class B:\n  def f(self): return 1\nclass T(B):\n  def __call__(self, x): return x\ntransform = T()",
    "other base": "class B:\n  def f(self): return 2\nclass T(B):\n  def __call__(self, x): return x\ntransform = T()",
    "recursive": "def transform(x): return transform(x - 1) if x else x",
    "cycle": "class T: pass\ntransform = T()\ntransform.me = [transform]",
    "set": "def transform(x): return x in {'a', 'b', 'c'}",
}


def test_transform_fingerprint__follows_the_code_of_the_users_functions():
    pairs = {name: same(source) for name, source in SOURCES.items()}
    assert [name for name, (one, two) in pairs.items() if one != two] == []
    assert len({one for one, _ in pairs.values()}) == len(SOURCES)


def scale(x, factor):
    return x * factor


class Identity:
    pass


def test_transform_fingerprint__of_own_transforms_follows_the_source_of_the_package(monkeypatch):
    transform = CropStrip()
    before = transform_fingerprint(transform)
    assert transform_fingerprint(transform) == before
    describe._package_of.cache_clear()
    monkeypatch.setattr(describe, "_own_source", lambda: "another")
    assert transform_fingerprint(transform) != before
    describe._package_of.cache_clear()


def test_transform_fingerprint__tells_settings_of_transforms_apart():
    kinds = [
        lambda: None,
        lambda: v2.Compose([v2.Resize(32), v2.ToDtype(torch.float32, scale=True)]),
        lambda: v2.Compose([v2.Resize(33), v2.ToDtype(torch.float32, scale=True)]),
        lambda: v2.Compose([v2.Resize(32), v2.ToDtype(torch.float16, scale=True)]),
        lambda: v2.Compose([v2.Resize(32, interpolation=v2.InterpolationMode.NEAREST)]),
        lambda: v1.Compose([v1.Resize(32)]),
        lambda: v1.Compose([v1.Lambda(lambda x: x * 2)]),
        lambda: v1.Compose([v1.Lambda(lambda x: x * 3)]),
        lambda: functools.partial(scale, factor=2),
        lambda: functools.partial(scale, factor=3),
        lambda: v2.Normalize([0.5], [0.5]),
        lambda: v2.Normalize([0.5], [0.25]),
        lambda: torch.nn.BatchNorm2d(3),
        lambda: torch.nn.BatchNorm2d(3).eval(),
        lambda: {"image": Identity(), "seed": torch.Generator()},
        lambda: np.arange(3),
        lambda: np.arange(4),
        lambda: np.array([Identity()]),
    ]
    first, second = ([transform_fingerprint(kind()) for kind in kinds] for _ in range(2))
    assert first == second
    assert len(set(first)) == len(first)


def test_transform_fingerprint__is_the_same_in_another_process(tmp_path):
    code = f"""
        SOURCES = {SOURCES!r}
        parts = [function_from(SOURCES[name]) for name in sorted(SOURCES)]
        Path(sys.argv[1]).write_text(transform_fingerprint(parts))
    """
    prelude = f"import sys, textwrap, types\nsys.path[:0] = {sys.path!r}\nfrom pathlib import Path\n"
    prelude += "from lightning_unfreeze.features.key import transform_fingerprint\n"
    script = prelude + inspect.getsource(function_from) + textwrap.dedent(code)
    command = [sys.executable, "-c", script, str(tmp_path / "key")]
    subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "12345"}, check=True, timeout=300)
    here = transform_fingerprint([function_from(SOURCES[name]) for name in sorted(SOURCES)])
    assert (tmp_path / "key").read_text() == here


@pytest.fixture
def image_folder(tmp_path):
    for label in ("ants", "bees"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(tmp_path / "data" / label / f"{i}.bmp")
    return tmp_path / "data"


def touch(path, seconds):
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + seconds * 10**9))


def test_dataset_fingerprint__sees_files_by_size_time_and_name(image_folder):
    def key():
        return dataset_fingerprint(ImageFolder(image_folder))

    path = image_folder / "ants" / "0.bmp"
    keys = [key()]
    assert key() == keys[0]
    assert dataset_fingerprint(ImageFolder(image_folder, transform=lambda x: x)) == keys[0]
    touch(path, 1)  # equal size, other time: as an image written anew
    keys.append(key())
    touch(path, -1)  # equal size, equal time: as one replaced by a tool that keeps times
    keys.append(key())
    size = path.stat().st_size
    stat = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # equal time, other size
    assert path.stat().st_size == size + 1
    keys.append(key())
    path.rename(image_folder / "ants" / "9.bmp")  # equal number of files
    keys.append(key())
    (image_folder / "ants" / "9.bmp").rename(image_folder / "bees" / "9.bmp")  # other label
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_dataset_fingerprint__sees_through_wrappers(image_folder):
    data = ImageFolder(image_folder)
    keys = [
        dataset_fingerprint(data),
        dataset_fingerprint(Subset(data, [0, 1, 2])),
        dataset_fingerprint(Subset(data, [0, 1, 3])),  # another split of equal size
        dataset_fingerprint(Subset(data, [1, 0, 2])),
        dataset_fingerprint(Subset(Subset(data, [0, 1, 2]), [0, 1])),
        dataset_fingerprint(ConcatDataset([data, Subset(data, [0])])),
    ]
    assert len(set(keys)) == len(keys)
    assert dataset_fingerprint(Subset(ImageFolder(image_folder), [0, 1, 2])) == keys[1]
    touch(image_folder / "bees" / "3.bmp", 1)  # the last of eight, which no subset above but the last two sees
    assert dataset_fingerprint(Subset(data, [0, 1, 2])) != keys[1]
    assert dataset_fingerprint(ConcatDataset([data, Subset(data, [0])])) != keys[5]


class Items(Dataset):
    """No list of anything: just items, drawn at random with `noise`."""

    def __init__(self, values, noise=0.0):
        self.get = values.__getitem__
        self.size = len(values)
        self.noise = noise

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return {"x": torch.tensor(self.get(i)) + self.noise * torch.rand(1), "image": Image.new("L", (2, 2), i), "y": i}


def test_dataset_fingerprint__hashes_arrays_in_full():
    values = torch.arange(1000.0)
    base = dataset_fingerprint(TensorDataset(values))
    assert dataset_fingerprint(TensorDataset(values.clone())) == base
    for index in (0, 500, 999):
        changed = values.clone()
        changed[index] += 1
        assert dataset_fingerprint(TensorDataset(changed)) != base


@pytest.mark.parametrize(("num_items", "unseen"), [(64, []), (127, [31])])
def test_dataset_fingerprint__hashes_a_spread_of_items_where_there_is_nothing_else(num_items, unseen):
    # all of 64; of 127 every second one, the first and the last among them
    base = [float(i) for i in range(num_items)]
    for index in (0, 30, 31, num_items - 1):
        changed = base.copy()
        changed[index] += 1
        same = dataset_fingerprint(Items(base)) == dataset_fingerprint(Items(changed))
        assert same == (index in unseen)


def test_dataset_fingerprint__random_items_have_one_key():
    assert dataset_fingerprint(Items([1.0, 2.0], noise=1.0)) == dataset_fingerprint(Items([1.0, 2.0], noise=1.0))
    assert dataset_fingerprint(Items([1.0, 2.0], noise=1.0)) != dataset_fingerprint(Items([1.0, 3.0], noise=1.0))


class Archive(Dataset):
    """An array per item, and items that are read from somewhere else."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return 0


@pytest.mark.parametrize(
    "make",
    [list, np.array, torch.tensor, lambda values: [torch.full((2,), value) for value in values]],
    ids=["list", "numpy", "torch", "list of tensors"],
)
def test_dataset_fingerprint__sees_every_entry_of_lists_and_arrays(make):
    targets = [0] * 500
    changed = [0] * 250 + [1] + [0] * 249
    assert dataset_fingerprint(Archive(make(targets))) == dataset_fingerprint(Archive(make(targets)))
    assert dataset_fingerprint(Archive(make(targets))) != dataset_fingerprint(Archive(make(changed)))


def test_dataset_fingerprint__files_in_dicts_count(image_folder):
    files = sorted(image_folder.rglob("*.bmp"))
    entries = [{"image": str(path), "label": 0} for path in files]
    base = dataset_fingerprint(Archive(entries))
    touch(files[5], 1)
    assert dataset_fingerprint(Archive(entries)) != base


def test_dataset_fingerprint__the_users_own_word_is_enough():
    def stream():
        return (i for i in range(3))

    with pytest.raises(ValueError, match="give a fingerprint"):
        dataset_fingerprint(stream())
    assert dataset_fingerprint(stream(), fingerprint="v1") == dataset_fingerprint(Archive([1]), fingerprint="v1")
    assert dataset_fingerprint(stream(), fingerprint="v1") != dataset_fingerprint(stream(), fingerprint="v2")


def _flip(tensor):
    return tensor.flip(0)


def _swap_two(tensor):
    changed = tensor.clone().reshape(-1)
    changed[[3, -5]] = changed[[-5, 3]]
    return changed.view_as(tensor)


def _move_in_a_column(tensor):
    changed = tensor.clone().reshape(-1)
    changed[[3, 3 + 512]] = changed[[3 + 512, 3]]  # 512 floats, 2048 bytes, further: the sums along columns stay
    return changed.view_as(tensor)


def _last_bit(tensor):
    changed = tensor.clone()
    changed.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
    return changed


@pytest.mark.parametrize("change", [_flip, _swap_two, _move_in_a_column, _last_bit, torch.neg])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_mean", "1.num_batches_tracked"])
def test_prefix_checksum__sees_each_write_that_the_fingerprint_sees(change, name):
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 97, 5), torch.nn.BatchNorm2d(97), torch.nn.Flatten(), torch.nn.LazyLinear(2)
    )
    network(torch.rand(4, 3, 6, 6))
    network[:2].requires_grad_(False).eval()
    prefix = find_prefix(network, torch.rand(4, 3, 6, 6)).prefix
    before, key = prefix_checksum(prefix), prefix_fingerprint(prefix)
    assert prefix_checksum(prefix) == before
    tensor = dict(network.state_dict(keep_vars=True))[name]
    if tensor.numel() < 500 and change is not torch.neg:
        change = torch.neg
    version = tensor._version
    tensor.data.copy_(change(tensor.data))  # past the version counter
    assert tensor._version == version
    assert prefix_fingerprint(prefix) != key
    assert prefix_checksum(prefix) != before


def test_prefix_checksum__of_weights_that_lie_anywhere_in_memory():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 97, 5), torch.nn.Flatten(), torch.nn.Linear(97 * 4, 2))
    network[0].requires_grad_(False).eval()
    prefix = find_prefix(network, torch.rand(4, 3, 6, 6)).prefix
    before = prefix_checksum(prefix)
    weight = network[0].weight
    moved = torch.zeros(weight.numel() + 1)
    moved[1:] = weight.detach().view(-1)
    weight.data = moved[1:].view_as(weight)  # 4 bytes behind a multiple of 8
    assert prefix_checksum(prefix) == before
    moved[77] += 1
    assert prefix_checksum(prefix) != before
