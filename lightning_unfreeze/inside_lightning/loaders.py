"""The Trainer's loaders, read from the side."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from lightning_unfreeze.layers.kept import kept

_READ_ONLY_BYTES = 2**20  # what is larger than a list of indices is data, which reading does not change


@contextmanager
def fresh_batches(trainer: pl.Trainer) -> Iterator[Iterator[tuple[Any, int]]]:
    """Batches of the stage's training data without end, with their place in a pass, from iterators of their own.

    Batches that are None are left out, as Lightning skips them. The Trainer's loaders, their iterators and workers,
    samplers and datasets with their random generators and counters are afterwards as before.

    Raises:
        MisconfigurationException: For a loader that is its own iterator and cannot be put back where it was, and for
            data without a batch.
    """
    # the mode has no public name; guarded by `test_fresh_batches__combine_as_in_training` (Lightning 2.6)
    fresh = CombinedLoader(trainer.train_dataloader, trainer.fit_loop._combined_loader._mode)  # type: ignore[union-attr]
    limit = None if trainer.num_training_batches == float("inf") else int(trainer.num_training_batches)
    with kept(fresh.flattened, skip=(pl.Trainer, pl.LightningModule), max_bytes=_READ_ONLY_BYTES) as iterators:
        for loader in fresh.flattened:
            _refuse_if_used_up(loader, iterators)
        fresh.flattened = [_twin(loader) for loader in fresh.flattened]
        batches = _endless(fresh, limit)
        try:
            yield batches
        finally:
            batches.close()  # type: ignore[attr-defined]
            fresh.reset()  # ends worker processes


def _refuse_if_used_up(loader: Any, iterators: list[Any]) -> None:
    """For a source that is its own iterator, and goes on where it is instead of starting again."""
    source = loader
    if isinstance(loader, DataLoader):
        if not isinstance(loader.dataset, IterableDataset) or loader.num_workers > 0:
            return
        source = loader.dataset
    if not isinstance(source, Iterator):
        return
    iter(source)  # many make a new inner iterator here, and then the old one is left as it is
    if any(used is held for used in iterators for held in [source, *getattr(source, "__dict__", {}).values()]):
        raise MisconfigurationException(
            f"the range test would use up training batches: {type(source).__name__} is its own iterator and "
            "cannot be put back where it is; pass data whose `__iter__` starts a new pass (a DataLoader, say), or give "
            "the stage a number as lr"
        )


def _twin(loader: Any) -> Any:
    if not isinstance(loader, DataLoader):
        return loader
    twin = copy.copy(loader)
    # else an iterator of the copy would reset the live one, where its workers are persistent
    vars(twin)["_iterator"] = None
    return twin


def _endless(loader: CombinedLoader, limit: int | None) -> Iterator[tuple[Any, int]]:
    empty_passes = 0
    while empty_passes < 2:  # one may be: a loader that is its own iterator ends its pass when it is asked once more
        empty_passes += 1
        for batch, batch_idx, _ in islice(iter(loader), limit):
            if batch is not None:
                empty_passes = 0
                yield batch, batch_idx
    raise MisconfigurationException("the training data gives no batch, so there is nothing to test on")


def load_validation(trainer: pl.Trainer) -> None:
    """Has the validation loaders of a fit made now, if there are to be any.

    Lightning does the same before the first epoch, and has no public way to do it later (guarded by
    `test_load_validation__makes_the_loaders_that_are_validated_on`, Lightning 2.6).
    """
    if trainer.enable_validation and trainer.val_dataloaders is None:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        trainer.training = True


def ask_for_loaders_again(trainer: pl.Trainer) -> None:
    """What `reload_dataloaders_every_n_epochs` does, at one point in time.

    There is no public way; guarded by `test_precompute__lightning_asks_for_the_loaders_of_each_stage` (Lightning 2.6).
    """
    trainer.fit_loop._combined_loader = None
    trainer.fit_loop.epoch_loop.val_loop._combined_loader = None
