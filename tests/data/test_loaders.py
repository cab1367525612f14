# ruff: noqa: NPY002  (numpy's global generator is what is tested)
from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.types import _Stateful
from torch.utils.data import BatchSampler, Dataset, DistributedSampler, RandomSampler

from lightning_unfreeze.data.loaders import EpochBatchSampler, EpochSampler, KeyedDataset, ResumableLoader
from tests.zoo import Does


class Noisy(Dataset[torch.Tensor]):
    """Row i is (i, Python's, numpy's and torch's next random number); counts what was loaded."""

    def __init__(self, size: int = 10) -> None:
        self.size, self.loaded = size, []

    def __getitem__(self, index: int) -> torch.Tensor:
        self.loaded.append(index)
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(1).item()], dtype=torch.float64)

    def __len__(self) -> int:
        return self.size


def keyed_loader(batch_size: int = 3, size: int = 10, seed: int = 0, **kwargs: Any) -> ResumableLoader:
    data = KeyedDataset(Noisy(size), seed=seed)
    return ResumableLoader(data, batch_size=batch_size, sampler=EpochSampler(data, seed=seed), **kwargs)


def epoch_of(loader: ResumableLoader, epoch: int) -> list[torch.Tensor]:
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def set_ranks(rank: int, world_size: int) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world_size)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)

    return set_ranks


def test_epoch_sampler__is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    orders = {}
    for seed in range(3):
        sampler = EpochSampler(Noisy(50), seed=seed)
        for epoch in (2, 0, 1):
            torch.manual_seed(epoch * 7)
            sampler.set_epoch(epoch)
            orders[seed, epoch] = list(sampler)
            assert sorted(orders[seed, epoch]) == list(range(50))
    assert len(set(map(tuple, orders.values()))) == 9  # (seed 0, epoch 1) is not (seed 1, epoch 0) either
    again = EpochSampler(Noisy(50), seed=1)
    again.set_epoch(2)
    assert list(again) == orders[1, 2]


def test_epoch_sampler__ranks_together_see_the_batches_of_one_process(ranks: Any) -> None:
    whole = list(EpochSampler(Noisy(12), seed=3))
    sampler, shards = EpochSampler(Noisy(12), seed=3), []  # made before the process group
    for rank in range(3):
        ranks(rank, 3)
        shards.append(list(sampler))
        assert len(sampler) == 4
    for batch in range(2):  # batches of 2 per rank are global batches of 6
        union = {index for shard in shards for index in shard[2 * batch : 2 * batch + 2]}
        assert union == set(whole[6 * batch : 6 * batch + 6])


@pytest.mark.parametrize(
    ("size", "drop_last", "expected"),
    [(7, False, [[0, 3, 6], [1, 4, 0], [2, 5, 1]]), (5, True, [[0], [1], [2]]), (2, False, [[0], [1], [0]])],
)
def test_epoch_sampler__fills_or_drops_the_uneven_tail(
    size: int, drop_last: bool, expected: list[list[int]], ranks: Any
) -> None:
    for rank in range(3):
        ranks(rank, 3)
        assert list(EpochSampler(Noisy(size), shuffle=False, drop_last=drop_last)) == expected[rank]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("drop_tail", [False, True])
@pytest.mark.parametrize("size", [17, 18, 19])
def test_epoch_batch_sampler__drops_what_torch_drops(size: int, drop_last: bool, drop_tail: bool, ranks: Any) -> None:
    """The tail that does not fill all ranks and the last batch of a rank are two things, as in torch."""
    data = Noisy(size)
    for rank in range(2):
        ranks(rank, 2)
        torchs = DistributedSampler(data, 2, rank, shuffle=False, drop_last=drop_tail)
        wanted = list(BatchSampler(torchs, 9, drop_last))
        ours = EpochBatchSampler(data, 9, shuffle=False, drop_last=drop_last, drop_tail=drop_tail)
        assert (list(ours), len(ours)) == (wanted, len(wanted))


def test_keyed_dataset__augments_by_seed_epoch_and_index_alone() -> None:
    first = {row[0].item(): row for batch in epoch_of(keyed_loader(3), 1) for row in batch}
    random.seed(9)
    torch.manual_seed(9)
    second = {row[0].item(): row for batch in epoch_of(keyed_loader(4), 1) for row in batch}
    other_epoch = {row[0].item(): row for batch in epoch_of(keyed_loader(3), 2) for row in batch}
    other_seed = {row[0].item(): row for batch in epoch_of(keyed_loader(3, seed=1), 1) for row in batch}
    for index in range(10):
        assert torch.equal(first[index], second[index])
        for other in (other_epoch, other_seed):
            assert (first[index][1:] != other[index][1:]).all()


def test_keyed_dataset__persistent_workers_give_what_one_process_gives() -> None:
    here, there = keyed_loader(), keyed_loader(num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        assert same(epoch_of(here, epoch), epoch_of(there, epoch))


@pytest.mark.parametrize("k", [0, 1, 3, 4])
@pytest.mark.parametrize("workers", [0, 1])
def test_resumable_loader__goes_on_after_k_batches(k: int, workers: int) -> None:
    expected = epoch_of(keyed_loader(), 2)
    old = keyed_loader(num_workers=workers, persistent_workers=workers > 0)
    old.sampler.set_epoch(2)
    iterator = iter(old)
    for _ in range(k):
        next(iterator)
    state = old.state_dict()
    new = keyed_loader(num_workers=workers, persistent_workers=workers > 0)
    new.load_state_dict(state)
    assert new.state_dict() == state  # a checkpoint written before the first batch keeps the position
    assert same(epoch_of(new, 2), expected[k:])
    # the skip is used up, for the sampler as for the loader
    assert len(list(new.sampler)) == 10
    assert same(epoch_of(new, 2), expected)
    assert same(epoch_of(new, 3), epoch_of(keyed_loader(), 3))


def test_resumable_loader__loads_nothing_that_it_skips() -> None:
    loader = keyed_loader()
    expected = [int(row[0]) for batch in epoch_of(loader, 1)[2:] for row in batch]
    loader = keyed_loader()
    loader.load_state_dict({"epoch": 1, "batches": 2, "num_batches": 4})
    epoch_of(loader, 1)
    assert loader.dataset.dataset.loaded == expected


def test_resumable_loader__begins_anew_in_another_epoch() -> None:
    loader = keyed_loader()
    loader.load_state_dict({"epoch": 1, "batches": 4, "num_batches": 4})
    assert same(epoch_of(loader, 2), epoch_of(keyed_loader(), 2))


def test_resumable_loader__whole_batches_at_once_resume_too() -> None:
    class Rows(Dataset[torch.Tensor]):
        def __getitem__(self, indices: list[int]) -> torch.Tensor:
            return torch.arange(10)[indices]

        def __len__(self) -> int:
            return 10

    def loader() -> ResumableLoader:
        return ResumableLoader(Rows(), batch_size=None, sampler=EpochBatchSampler(Rows(), 3, seed=4))

    single = EpochSampler(Rows(), seed=4)
    single.set_epoch(1)
    order = list(single)
    expected = [torch.tensor(order[i : i + 3]) for i in (0, 3, 6, 9)]
    assert len(loader()) == 4
    assert same(epoch_of(loader(), 1), expected)
    resumed = loader()
    resumed.load_state_dict({"epoch": 1, "batches": 3, "num_batches": 4})
    assert same(epoch_of(resumed, 1), expected[3:])


def test_resumable_loader__a_copy_leaves_the_running_epoch_alone() -> None:
    loader = keyed_loader()
    loader.sampler.set_epoch(0)
    iterator = iter(loader)
    batches = [next(iterator), next(iterator)]
    list(copy.copy(loader))
    assert loader.state_dict()["batches"] == 2
    assert same([*batches, *iterator], epoch_of(keyed_loader(), 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_resumable_loader__draws_nothing_from_the_global_generator(workers: int) -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    epoch_of(keyed_loader(num_workers=workers), 0)
    assert torch.equal(torch.rand(2), expected)


def test_resumable_loader__refuses_what_has_no_order_by_epoch() -> None:
    data = Noisy()
    for sampler in (None, RandomSampler(data), BatchSampler(EpochSampler(data), 2, False)):
        with pytest.raises(ValueError, match="EpochSampler"):
            ResumableLoader(data, batch_size=None, sampler=sampler)
    with pytest.raises(ValueError, match="batch_size=0"):
        EpochBatchSampler(data, 0)


def test_resumable_loader__refuses_to_resume_inside_an_epoch_of_other_length() -> None:
    loader = keyed_loader(batch_size=5)
    loader.load_state_dict({"epoch": 1, "batches": 2, "num_batches": 4})
    with pytest.raises(MisconfigurationException, match=r"4 batches.* gives 2"):
        epoch_of(loader, 1)


class Net(pl.LightningModule):
    """A regression on the noisy rows, with dropout off so that the data alone is random; keeps the batches it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1, dtype=torch.float64)
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch.clone())
        return (self.layer(batch) ** 2).mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def saves_every_step(folder: Path) -> Does:
    return Does(
        on_train_batch_end=lambda trainer, *_: trainer.save_checkpoint(folder / f"{trainer.global_step}.ckpt"),
        on_train_epoch_end=lambda trainer, _: trainer.save_checkpoint(folder / f"epoch{trainer.current_epoch}.ckpt"),
    )


def fit(workers: int, whole_batches: bool, save_to: Path | None = None, ckpt: Path | None = None) -> Net:
    torch.manual_seed(0)
    net = Net()
    if whole_batches:
        rows = torch.randn(10, 4, dtype=torch.float64)
        data: Any = type("Rows", (), {"__getitem__": lambda _, i: rows[i], "__len__": lambda _: 10})()
        loader = ResumableLoader(data, batch_size=None, sampler=EpochBatchSampler(data, 3))
    else:
        loader = keyed_loader(num_workers=workers, persistent_workers=workers > 0)
    assert isinstance(loader, _Stateful)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=3,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        val_check_interval=0.5,
        num_sanity_val_steps=0,
        callbacks=[saves_every_step(save_to)] if save_to else [],
    )
    trainer.fit(net, loader, torch.utils.data.DataLoader(Noisy(2)), ckpt_path=ckpt)
    return net


@pytest.mark.parametrize(("workers", "whole_batches"), [(0, False), (1, False), (0, True)])
def test_resumable_loader__trainer_resumed_at_any_step_ends_bitwise_equal(
    tmp_path: Path, workers: int, whole_batches: bool
) -> None:
    whole = fit(workers, whole_batches, save_to=tmp_path)
    assert len(whole.seen) == 12  # 3 epochs of 4 batches, validated after 2 and 4
    names = {str(step): step for step in ((5, 6, 8) if workers else range(1, 12))} | {"epoch0": 4}
    for name, step in names.items():
        resumed = fit(workers, whole_batches, ckpt=tmp_path / f"{name}.ckpt")
        assert same(resumed.seen, whole.seen[step:]), name
        for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("num", [0, 3, 8, 9])
def test_epoch_batch_sampler__batches_are_its_lists_as_tensors(num, first, drop_last):
    sampler = EpochBatchSampler(range(num), 4, seed=1, drop_last=drop_last)
    sampler.set_epoch(2)
    sampler.first_sample = first
    lists = list(sampler)
    sampler.first_sample = first
    assert [batch.tolist() for batch in sampler.batches()] == lists
    assert sampler.first_sample == 0


# --- weights ----------------------------------------------------------------------------------------------------------


def weighted(num: int = 1000, **kwargs: Any) -> EpochSampler:
    weights = torch.ones(num, dtype=torch.float64)
    weights[: num // 10] = 9.0  # a tenth of the samples, half of the weight
    return EpochSampler(range(num), weights=weights, **kwargs)  # type: ignore[arg-type]


def test_weights__samples_are_drawn_in_their_proportion() -> None:
    shares = []
    sampler = weighted()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert len(drawn) == 1000
        shares.append(sum(index < 100 for index in drawn) / 1000)
    assert abs(sum(shares) / 20 - 0.5) < 4 * (0.25 / 20000) ** 0.5  # four standard errors
    assert len(set(shares)) > 1


def test_weights__a_weight_of_zero_is_never_drawn() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    sampler = EpochSampler(range(5), weights=weights)  # type: ignore[arg-type]
    drawn = set()
    for epoch in range(50):
        sampler.set_epoch(epoch)
        drawn |= set(sampler)
    assert drawn == {1, 3}


def test_weights__ranks_share_the_draws_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(weighted(99, seed=3))
    parts = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(list(weighted(99, seed=3)))
    assert [index for pair in zip(*parts, strict=True) for index in pair] == [*whole, whole[0]]


def test_weights__each_draw_of_a_sample_is_augmented_in_a_way_of_its_own() -> None:
    class Drawing(Dataset[Any]):
        def __getitem__(self, index: int) -> tuple[int, float]:
            return index, torch.rand(1).item()

        def __len__(self) -> int:
            return 50

    data = KeyedDataset(Drawing(), seed=0)
    loader = ResumableLoader(data, batch_size=10, sampler=EpochSampler(data, weights=torch.arange(50.0)))
    seen = [pair for indices, draws in loader for pair in zip(indices.tolist(), draws.tolist(), strict=True)]
    assert len({index for index, _ in seen}) < len(seen) == len(set(seen))
    state, rest = None, []
    for i, (indices, draws) in enumerate(loader):
        if i == 1:
            state = loader.state_dict()
        if i > 1:
            rest += list(zip(indices.tolist(), draws.tolist(), strict=True))
    resumed = ResumableLoader(data, batch_size=10, sampler=EpochSampler(data, weights=torch.arange(50.0)))
    resumed.load_state_dict(state)  # type: ignore[arg-type]
    assert [p for indices, draws in resumed for p in zip(indices.tolist(), draws.tolist(), strict=True)] == rest


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [1.0, float("nan"), 1.0]])
def test_weights__that_are_no_shares_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"weights of shape .*: give 3 numbers"):
        EpochSampler(range(3), weights=torch.tensor(weights))  # type: ignore[arg-type]
