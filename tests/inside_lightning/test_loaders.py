"""Batches drawn on the side leave the training data as it was: the run with them equals the run without."""

from __future__ import annotations

from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, default_collate

from lightning_unfreeze.data.loaders import EpochSampler, KeyedDataset, ResumableLoader
from lightning_unfreeze.inside_lightning.loaders import (
    fresh_batches,
    own_batch_sampler,
    process_loaders,
    process_no_loaders,
)
from tests.zoo import loader, quiet_trainer, random_images


class Sees(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch)
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Draws(Callback):
    """Draws batches on the side at the start of each epoch."""

    def __init__(self, num: int) -> None:
        self.num, self.drawn = num, []  # type: ignore[var-annotated]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.num:
            with fresh_batches(trainer) as batches:
                self.drawn.append(list(islice(batches, self.num)))


def seen_by(data: Any, num_drawn: int, epochs: int = 2) -> tuple[list[Any], list[Any]]:
    torch.manual_seed(0)
    module, draws = Sees(), Draws(num_drawn)
    quiet_trainer([draws], max_epochs=epochs).fit(module, data)
    return [batch.tolist() if isinstance(batch, torch.Tensor) else batch for batch in module.seen], draws.drawn


class RestartingStream:
    """A loader that is its own iterator, and starts again when asked for one (as DALI's with `auto_reset`)."""

    def __init__(self) -> None:
        self.position, self.rng = 0, np.random.default_rng(0)

    def __iter__(self) -> Any:
        self.position = 0
        return self

    def __next__(self) -> torch.Tensor:
        if self.position == 4:
            raise StopIteration
        self.position += 1
        return torch.tensor([self.position + float(self.rng.random())])


class RewindsAtItsEnd(RestartingStream):
    """One that starts again when it has been asked for more than it has."""

    def __iter__(self) -> Any:
        return self

    def __len__(self) -> int:
        return 4

    def __next__(self) -> torch.Tensor:
        try:
            return super().__next__()
        except StopIteration:
            self.position = 0
            raise


class EndlessStream(RestartingStream):
    """One that goes on where it is, and is cut by its length."""

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> torch.Tensor:
        self.position += 1
        return torch.tensor([float(self.position)])

    def __len__(self) -> int:
        return 4


class Prefetcher:
    """Its own iterator over a loader, which it starts anew."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __iter__(self) -> Any:
        self.live = iter(self.inner)
        return self

    def __next__(self) -> Any:
        return next(self.live)


class OwnIteratorDataset(IterableDataset[Any]):
    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> float:
        self.position += 1
        if self.position % 9 == 0:
            raise StopIteration
        return float(self.position)


class DrawingDataset(Dataset[Any]):
    """Random numbers of its own, and a counter."""

    def __init__(self) -> None:
        self.rng, self.calls, self.order = np.random.default_rng(3), 0, np.arange(8)

    def __getitem__(self, index: int) -> float:
        self.calls += 1
        self.rng.shuffle(self.order)
        return self.calls + float(self.rng.random()) + float(self.order[index])

    def __len__(self) -> int:
        return 8


@pytest.mark.parametrize(
    "make",
    [
        RestartingStream,
        EndlessStream,
        lambda: Prefetcher(DataLoader(torch.arange(8.0), batch_size=2)),  # type: ignore[arg-type]
        lambda: DataLoader(OwnIteratorDataset(), batch_size=2),
        lambda: DataLoader(DrawingDataset(), batch_size=2),
        lambda: DataLoader(DrawingDataset(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(1)),
        lambda: DataLoader(torch.arange(8.0), batch_size=2, num_workers=1, persistent_workers=True),  # type: ignore[arg-type]
    ],
    ids=["restarting", "endless", "prefetcher", "dataset", "draws", "generator", "workers"],
)
@pytest.mark.filterwarnings("ignore:.*num_workers", "ignore:.*IterableDataset")
def test_fresh_batches__leave_the_training_data_where_it_was(make: Any) -> None:
    without, _ = seen_by(make(), 0)
    with_them, drawn = seen_by(make(), 6)
    assert with_them == without and len(without) == 8
    assert [len(batches) for batches in drawn] == [6, 6]
    assert all(0 <= index < 5 for batches in drawn for _, index in batches)


def test_fresh_batches__go_on_over_the_end_of_a_loader_that_rewinds_there() -> None:
    seen, ((*_, (last, _)),) = seen_by(RewindsAtItsEnd(), 6, epochs=1)
    assert int(last) == 2  # the sixth, of four in a pass
    assert [int(batch[0]) for batch in seen] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.tensor([float(value)]) for value in range(8)),
        lambda: map(torch.tensor, [[1.0], [2.0]]),
        lambda: Used(torch.tensor([float(value)]) for value in range(8)),
    ],
    ids=["generator", "map", "holds_a_generator"],
)
def test_fresh_batches__refuse_what_they_would_use_up(make: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"would use up training batches: \w+ is its own iterator"):
        seen_by(make(), 3)


class Used:
    def __init__(self, values: Any) -> None:
        self.values = values

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return next(self.values)


def none_for_3(samples: list[Any]) -> Any:
    return None if 3 in samples else default_collate(samples)


@pytest.mark.filterwarnings("ignore:.*train_dataloader yielded None")
def test_fresh_batches__leave_out_what_lightning_skips() -> None:
    data: Any = DataLoader(torch.arange(6), batch_size=2, collate_fn=none_for_3)  # type: ignore[arg-type]
    _, (drawn, _) = seen_by(data, 4)
    assert [(batch.tolist(), index) for batch, index in drawn] == [([0, 1], 0), ([4, 5], 2)] * 2
    with pytest.raises(MisconfigurationException, match="gives no batch"):
        seen_by(DataLoader(torch.full((4,), 3), batch_size=2, collate_fn=lambda _: None), 1)  # type: ignore[arg-type]


class Noisy(Dataset[Any]):
    """Ten samples, each drawn with noise of its own."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.rand(())

    def __len__(self) -> int:
        return 10


def test_fresh_batches__each_pass_is_another_epoch() -> None:
    def data() -> ResumableLoader:
        keyed = KeyedDataset(Noisy(), seed=3)
        return ResumableLoader(keyed, batch_size=5, sampler=EpochSampler(keyed, seed=3))

    plain, _ = seen_by(data(), 0, epochs=3)
    same, drawn = seen_by(data(), 6, epochs=3)
    assert same == plain
    # six batches are three passes: those of the present epoch and of the next ones, as training will see them
    assert [batch.tolist() for batch, _ in drawn[0]] == plain
    assert len({tuple(batch) for batch in plain}) == 6
    # by batch sampler, told through the loader's `batch_sampler.sampler`
    sampler = DistributedSampler(range(10), num_replicas=1, rank=0, seed=1)  # type: ignore[arg-type]
    _, drawn = seen_by(DataLoader(range(10), batch_sampler=BatchSampler(sampler, 5, False)), 4)  # type: ignore[arg-type]
    orders = [batch.tolist() for batch, _ in drawn[0]]
    assert orders[0] + orders[1] != orders[2] + orders[3]
    assert sorted(orders[0] + orders[1]) == sorted(orders[2] + orders[3]) == list(range(10))


def test_fresh_batches__combine_as_in_training() -> None:
    loaders = {"left": loader(random_images(24)), "right": loader(random_images(16, seed=1))}
    seen, (drawn, _) = seen_by(CombinedLoader(loaders, "max_size_cycle"), 6)
    labels = [{side: part[1].tolist() for side, part in batch.items()} for batch in seen]
    assert [{side: part[1].tolist() for side, part in batch.items()} for batch, _ in drawn] == labels[:3] * 2


class KeepsBatchSampler(Sees):
    """Notes, in a `predict`, what Lightning has put in the place of the user's batch sampler."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        own = self.trainer.predict_dataloaders
        kinds = (type(own.batch_sampler).__name__, type(own_batch_sampler(own)).__name__)
        self.seen.append((*kinds, list(own_batch_sampler(own))))
        return batch


def test_own_batch_sampler__is_the_users_in_predict():
    module, data = KeepsBatchSampler(), DataLoader(random_images(5, seed=0), batch_size=2)
    quiet_trainer([]).predict(module, data)
    assert module.seen == [("_IndexBatchSamplerWrapper", "BatchSampler", [[0, 1], [2, 3], [4]])] * 3
    assert own_batch_sampler(data) is data.batch_sampler


def test_process_loaders__steps_of_several_owners_come_and_go_on_their_own():
    trainer, loaded = quiet_trainer([]), DataLoader(random_images(5, seed=0))
    before = trainer.strategy.process_dataloader(loaded)
    process_loaders(trainer, "one", lambda given: [given])
    process_loaders(trainer, "two", lambda given: (given, 2))
    assert trainer.strategy.process_dataloader(loaded) == ([before], 2)
    process_no_loaders(trainer, "one")
    process_no_loaders(trainer, "one")
    assert trainer.strategy.process_dataloader(loaded) == (before, 2)
    process_no_loaders(trainer, "two")
    assert "process_dataloader" not in vars(trainer.strategy)
