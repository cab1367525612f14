from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_unfreeze.data.datasets import innermost_dataset, nested_datasets, transform_of, with_transform
from lightning_unfreeze.data.loaders import EpochSampler, KeyedDataset, ResumableLoader
from lightning_unfreeze.features.batch_form import BatchForm, NoStoreError
from lightning_unfreeze.features.layout import StoreLayout, TensorSpec
from lightning_unfreeze.features.search import find_prefix
from lightning_unfreeze.features.serve import FeatureDataset, feature_loader, view_batches
from lightning_unfreeze.features.store import FeatureStore
from lightning_unfreeze.features.viewed import (
    ViewedData,
    _callables_fingerprint,
    check_loader,
    evaluation_transform,
    plain_dataset,
    probe_batch,
)
from lightning_unfreeze.features.writer import FeatureWriter

Named = namedtuple("Named", ["picture", "label"])
IMAGES = torch.arange(4 * 3 * 2 * 2, dtype=torch.float32).reshape(4, 3, 2, 2)
LABELS = torch.tensor([1, 0, 2, 1])


class Pictures:
    """`(image, index)`; the transform is applied to the image."""

    def __init__(self, num: int = 10, transform: Any = None, seed: int = 0) -> None:
        self.images = torch.randn(num, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.transform = transform

    def __getitem__(self, index: int) -> Any:
        image = self.images[index]
        return image if self.transform is None else self.transform(image), index

    def __len__(self) -> int:
        return len(self.images)


def noise(image: torch.Tensor) -> torch.Tensor:
    return image + torch.randn(3, 8, 8)


def coin(image: torch.Tensor) -> torch.Tensor:
    return image.flip(-1) if torch.rand(1) < 0.5 else image


def draws_to_no_effect(image: torch.Tensor) -> torch.Tensor:
    return image + 0 * torch.rand(1)


def double(image: torch.Tensor) -> torch.Tensor:
    return 2 * image


# --- the form of a batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGES, LABELS),
        [IMAGES, LABELS],
        {"y": LABELS, "x": IMAGES},
        Named(IMAGES, LABELS),
        (("a", "b", "ü/ä", ""), IMAGES, [LABELS, LABELS.float()]),
        {"path": ["a", "b", "c", "d" * 60], "more": {"x": IMAGES, "mask": LABELS > 0}},
        [torch.zeros(4, 3, 2, 2, dtype=torch.uint8), IMAGES],  # an integer image beside the floating point one
        IMAGES,
    ],
    ids=["tuple", "list", "dict", "namedtuple", "texts", "nested", "uint8", "bare"],
)
def test_batch_form__keeps_the_form_of_the_users_batch(batch):
    form = BatchForm(batch)
    images, beside = form.split(batch)
    assert images is IMAGES and form.images(batch) is IMAGES
    assert all(isinstance(value, torch.Tensor) and len(value) == 4 for value in beside.values())
    joined = form.join(images, beside)
    assert repr(joined) == repr(batch)  # types, order, texts and numbers
    assert form.images(form.join(torch.ones(4, 5), beside)).shape == (4, 5)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ((LABELS, LABELS), "no floating point or uint8 tensor"),
        ((IMAGES.long(), LABELS), "no floating point or uint8 tensor"),
        ((IMAGES, torch.tensor(0.3)), r"shape \(\).*one per image"),
        ((IMAGES, LABELS[:3]), r"shape \(3,\).*one per image"),
        ((IMAGES, ["a", "b"]), r"\['a', 'b'\], which does not come one per image"),
        ((IMAGES, 0.5), "0.5, which does not come one per image"),
        ((IMAGES, [object()]), "does not come one per image"),
    ],
)
def test_batch_form__what_does_not_come_one_per_image_is_refused(batch, reason):
    with pytest.raises(NoStoreError, match=reason):
        BatchForm(batch)


def test_batch_form__other_batches_are_refused():
    form = BatchForm((IMAGES, ["a"] * 4))
    with pytest.raises(NoStoreError, match="differ in their form"):
        form.split([IMAGES, ["a"] * 4])
    _, beside = form.split((IMAGES, ["x" * 256] * 4))
    assert form.join(IMAGES, beside)[1] == ["x" * 256] * 4
    with pytest.raises(NoStoreError, match="257 bytes"):
        form.split((IMAGES, ["x" * 257] * 4))


# --- datasets --------------------------------------------------------------------------------------------------------


def test_with_transform__changes_a_copy_and_shares_the_rest():
    inner = Pictures(transform=noise)
    outer = Subset(Subset(inner, [3, 1, 2]), [2, 0])
    changed = with_transform(outer, double)
    assert torch.equal(changed[1][0], 2 * inner.images[3])
    assert inner.transform is noise and innermost_dataset(changed).images is inner.images
    assert transform_of(outer) is noise and transform_of(TensorDataset(IMAGES)) is None


def test_nested_datasets__are_all_that_are_wrapped():
    one, two = Pictures(), Pictures()
    joined = ConcatDataset([one, Subset(two, [0])])
    assert list(nested_datasets(joined)) == [joined, one, joined.datasets[1], two]


def test_callables_fingerprint__sees_every_transform_of_what_is_wrapped():
    def of(*transforms: Any, **attributes: Any) -> str:
        parts = [Pictures(transform=transform) for transform in transforms]
        vars(parts[0]).update(attributes)
        return _callables_fingerprint(ConcatDataset(parts))

    assert of(double, None) == of(double, None)
    keys = [of(double, None), of(None, double), of(None, None), of(double, None, target_transform=str)]
    keys += [of(double, None, loader=double), of(None, None, steps=[double]), of(None, None, steps=[noise])]
    assert len(set(keys)) == len(keys)


def test_evaluation_transform__is_that_of_the_validation_data():
    assert evaluation_transform(Subset(Pictures(transform=noise), [0]), Pictures(transform=double)) is double
    assert evaluation_transform(Pictures(), Pictures(transform=double)) is None
    for val in (None, Pictures()):
        with pytest.raises(NoStoreError, match="eval_transform"):
            evaluation_transform(Pictures(transform=noise), val)


# --- loaders ---------------------------------------------------------------------------------------------------------


class OwnSampler(DistributedSampler[Any]):
    pass


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        ([1], "a list, not a single DataLoader"),
        (DataLoader(Pictures(), batch_size=None), "batch_size=None SequentialSampler has to give lists"),
        (DataLoader(Pictures(), sampler=OwnSampler(Pictures(), 1, 0)), "OwnSampler"),
        (DataLoader(Pictures(0)), "empty"),
    ],
)
def test_check_loader__says_why_it_refuses(loader, reason):
    with pytest.raises(NoStoreError, match=reason):
        check_loader(loader)


def collate_scaled_by_the_batch(samples: list[Any]) -> Any:
    images, labels = torch.utils.data.default_collate(samples)
    return images / images.std(), labels


def collate_that_draws(samples: list[Any]) -> Any:
    images, labels = torch.utils.data.default_collate(samples)
    return images * torch.rand(1), labels


def test_probe_batch__reads_in_order_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    data = Pictures(transform=double)
    raw, form = probe_batch(DataLoader(data, batch_size=4), data, 6)
    assert torch.equal(form.images(raw), 2 * data.images[:6])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("collate", [collate_scaled_by_the_batch, collate_that_draws])
def test_probe_batch__a_collate_function_that_mixes_is_refused(collate):
    with pytest.raises(NoStoreError, match="mixes the samples, or draws"):
        probe_batch(DataLoader(Pictures(), collate_fn=collate), Pictures(), 4)


def test_probe_batch__random_images_are_refused():
    with pytest.raises(NoStoreError, match="drawn at random"):
        probe_batch(DataLoader(Pictures()), Pictures(transform=noise), 4)
    with pytest.raises(NoStoreError, match="drawn at random"):  # each image has a coin, which may fall the same way
        probe_batch(DataLoader(Pictures()), Pictures(transform=coin), 8)
    arrays = [(torch.zeros(3, 2, 2), np.arange(3)) for _ in range(3)]
    probe_batch(DataLoader(arrays), arrays, 4)  # numpy beside the images is no draw


def viewed(loader: Any, dataset: Any, seed: int) -> ViewedData:
    raw, form = probe_batch(loader, Pictures(), 4)
    return ViewedData("train", loader, [dataset] * 3, raw, raw, form, form, False, seed)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_view_batches__are_a_function_of_seed_view_and_row(num_workers):
    data = Pictures(transform=noise)

    def read(rows: list[int], view: int = 1, seed: int = 5, workers: int = 0) -> dict[int, torch.Tensor]:
        loader = DataLoader(data, batch_size=3, num_workers=workers)
        batches = view_batches(viewed(loader, data, seed), view, torch.tensor(rows))
        return {int(row): image for part, (images, _) in batches for row, image in zip(part, images, strict=True)}

    state = torch.get_rng_state()
    whole = read(list(range(10)), workers=num_workers)
    assert torch.equal(torch.get_rng_state(), state)
    some = read([7, 2, 5, 9])
    assert list(some) == [7, 2, 5, 9] and all(torch.equal(some[row], whole[row]) for row in some)
    assert not torch.equal(read([7], view=2)[7], whole[7]) and not torch.equal(read([7], seed=6)[7], whole[7])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_view_batches__view_0_is_read_in_order_and_leaves_the_random_state_alone(num_workers):
    data = Pictures(transform=draws_to_no_effect)
    loader = DataLoader(data, batch_size=3, num_workers=num_workers)
    state = torch.get_rng_state()
    parts = list(view_batches(viewed(loader, data, 5), 0, torch.tensor([7, 2, 5, 9])))
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.tolist() for part, _ in parts] == [[7, 2, 5], [9]] == [batch[1].tolist() for _, batch in parts]
    assert torch.equal(torch.cat([images for _, (images, _) in parts]), data.images[[7, 2, 5, 9]])


@pytest.fixture
def stored(tmp_path):
    """Ten rows whose feature is their number."""
    network = nn.Sequential(nn.Conv2d(3, 1, 8), nn.Flatten(), nn.Linear(1, 1))
    network[0].requires_grad_(False).eval()
    prefix, _ = find_prefix(network, torch.randn(3, 3, 8, 8))
    tensors = {name: TensorSpec(shape, torch.float32) for name, shape in prefix.shapes.items()}
    layout = StoreLayout("key", 10, {**tensors, "beside_1": TensorSpec((), torch.int64)}, num_views=2)
    rows = torch.arange(10)
    with FeatureWriter(tmp_path / "store", layout) as writer:
        for view in (0, 1):
            values = (rows + 100.0 * view).reshape(10, 1, 1, 1)
            writer.write(rows, {**dict.fromkeys(tensors, values), "beside_1": 2 * rows}, view)
    assert isinstance(writer.finalize(), FeatureStore)
    store = FeatureStore.open(tmp_path / "store", fingerprint="key")
    form = BatchForm((torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)))
    return FeatureDataset(store, form, prefix)


def rows_of(loader: Any) -> list[list[int]]:
    opened = [batch.opened() for batch in loader]
    batches = [(features.flatten().tolist(), labels.tolist()) for features, labels in opened]
    assert all(labels == [2 * row for row in rows] for rows, labels in batches)
    return [[int(row) for row in rows] for rows, _ in batches]


def user_rows(loader: Any) -> list[list[int]]:
    return [labels.tolist() for _, labels in loader]


def test_feature_dataset__reads_the_rows_of_its_view(stored):
    stored.view = 1
    features, labels = stored[[3, 0, 3]].opened()
    assert features.flatten().tolist() == [103, 100, 103] and labels.tolist() == [6, 0, 6]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_feature_loader__keeps_the_order_of_this_packages_loaders(stored, shuffle, drop_last):
    data = KeyedDataset(Pictures(), seed=0)
    sampler = EpochSampler(data, shuffle=shuffle, seed=11)
    user = ResumableLoader(data, batch_size=4, sampler=sampler, drop_last=drop_last)
    ours = feature_loader(user, stored, None, seed=99)
    for epoch in range(2):
        user.sampler.set_epoch(epoch)
        ours.sampler.set_epoch(epoch)
        assert rows_of(ours) == user_rows(user)
    assert len(ours) == len(user) == (2 if drop_last else 3)


def test_feature_loader__a_shuffling_loader_gets_an_order_of_seed_and_epoch(stored):
    user = DataLoader(Pictures(), batch_size=4, shuffle=True)
    state = torch.get_rng_state()
    orders = []
    for epoch in (0, 1, 0):
        ours = feature_loader(user, stored, 5, seed=3)
        ours.sampler.set_epoch(epoch)
        orders.append(rows_of(ours))
        assert sorted(orders[-1][0] + orders[-1][1]) == list(range(10)) and len(orders[-1][0]) == 5
    assert orders[0] == orders[2] != orders[1]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["subset", "replacement", "fewer"])
def test_feature_loader__another_sampler_goes_on_choosing_the_rows(stored, kind):
    def sampler() -> Any:
        generator = torch.Generator().manual_seed(4)
        if kind == "subset":
            return SubsetRandomSampler([1, 5, 7, 8], generator=generator)
        return RandomSampler(Pictures(), replacement=kind == "replacement", num_samples=7, generator=generator)

    user = DataLoader(Pictures(), batch_size=3, sampler=sampler())
    ours = feature_loader(DataLoader(Pictures(), batch_size=3, sampler=sampler()), stored, None, seed=0)
    assert rows_of(ours) == user_rows(user)


def test_feature_loader__tells_a_users_sampler_of_the_epoch(stored):
    class ByEpoch(SubsetRandomSampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Any:
            return iter([self.epoch, self.epoch + 1])

    ours = feature_loader(DataLoader(Pictures(), batch_size=2, sampler=ByEpoch([0, 1])), stored, None, seed=0)
    ours.sampler.set_epoch(6)
    assert rows_of(ours) == [[6, 7]]


def test_plain_dataset__is_without_the_key_of_the_epoch():
    data = Pictures()
    assert plain_dataset(DataLoader(KeyedDataset(data))) is data
    assert plain_dataset(DataLoader(data)) is data
