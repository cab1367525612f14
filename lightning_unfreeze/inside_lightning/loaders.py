"""The Trainer's loaders: read from the side, made early or anew, and answered for by somebody else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from lightning_unfreeze.layers.kept import kept

Answer = Callable[[Callable[[], Any]], Any]
_READ_ONLY_BYTES = 2**20  # what is larger than a list of indices is data, which reading does not change


@contextmanager
def fresh_batches(trainer: pl.Trainer) -> Iterator[Iterator[tuple[Any, int]]]:
    """Batches of the stage's training data without end, with their place in a pass, from iterators of their own.

    Each pass is that of another epoch, for samplers that are told: the same few batches again and again, augmented in
    the same way, would be learnt by heart. Batches that are None are left out, as Lightning skips them. The Trainer's
    loaders, their iterators and workers, samplers and datasets with their random generators and counters are afterwards
    as before.

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
        batches = _endless(fresh, limit, trainer.current_epoch)
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


def _endless(loader: CombinedLoader, limit: int | None, epoch: int) -> Iterator[tuple[Any, int]]:
    empty_passes = 0
    while empty_passes < 2:  # one may be: a loader that is its own iterator ends its pass when it is asked once more
        empty_passes += 1
        for one in loader.flattened:
            # as at the start of an epoch; no public name, guarded by `test_fresh_batches__each_pass_is_another_epoch`
            _set_sampler_epoch(one, epoch)
        epoch += 1
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


def answer_for_loaders(trainer: pl.Trainer, train: Answer, val: Answer) -> Callable[[], None]:
    """Has the requests of a fit for its loaders answered by these, each given what makes the user's own.

    Lightning asks a private source, and there is no public way to answer in its place; guarded by
    `test_precompute__lightning_asks_for_the_loaders_of_each_stage` (Lightning 2.6).

    Returns:
        What undoes it.
    """
    loops: list[Any] = [trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop]
    sources = [loop._data_source for loop in loops]
    for loop, answer in zip(loops, (train, val), strict=True):
        loop._data_source = _Answered(loop._data_source, answer)

    def undo() -> None:
        for loop, source in zip(loops, sources, strict=True):
            loop._data_source = source

    return undo


class _Answered(_DataLoaderSource):
    """Lightning's source of a loader, asked through somebody else."""

    def __init__(self, own: _DataLoaderSource, answer: Answer) -> None:
        super().__init__(own.instance, own.name)
        self.own, self.answer = own, answer

    def dataloader(self) -> Any:
        return self.answer(self.own.dataloader)


def own_validation_loader(trainer: pl.Trainer) -> Any:
    """The user's validation loader, whoever answers for it; None without one. Guarded as `answer_for_loaders`."""
    source: Any = trainer.fit_loop.epoch_loop.val_loop._data_source
    source = getattr(source, "own", source)
    return source.dataloader() if source.instance is not None and source.is_defined() else None


def own_batch_sampler(loader: DataLoader[Any]) -> Any:
    """The user's batch sampler, also in `predict`, where Lightning (2.6) puts one of its own around it.

    Iterating that one clears its record of what was predicted, and it has no public way to what it wraps; guarded by
    `test_own_batch_sampler__is_the_users_in_predict`.
    """
    return getattr(loader.batch_sampler, "_batch_sampler", loader.batch_sampler)


class _ThenSteps:
    """A strategy's `process_dataloader`, and what comes after it."""

    def __init__(self, process: Callable[[object], object]) -> None:
        self.process, self.steps = process, dict[object, Callable[[Any], Any]]()

    def __call__(self, loader: object) -> object:
        loader = self.process(loader)
        for step in self.steps.values():
            loader = step(loader)
        return loader


def process_loaders(trainer: pl.Trainer, owner: object, step: Callable[[Any], Any]) -> None:
    """Has loaders that are made from here on go through `step`, until `process_no_loaders` for the same owner.

    Lightning (2.6) hands each loader to the strategy last, with its distributed sampler in place around the user's
    sampler; there is no other way to reach in. Guarded by `test_ddp__a_sampler_of_the_users_is_drawn_once`.
    """
    then = vars(trainer.strategy).get("process_dataloader")
    if not isinstance(then, _ThenSteps):
        then = vars(trainer.strategy)["process_dataloader"] = _ThenSteps(trainer.strategy.process_dataloader)
    then.steps[owner] = step


def process_no_loaders(trainer: pl.Trainer, owner: object) -> None:
    """Undoes `process_loaders`; harmless without it."""
    then = vars(trainer.strategy).get("process_dataloader")
    if isinstance(then, _ThenSteps):
        then.steps.pop(owner, None)
        if not then.steps:
            del vars(trainer.strategy)["process_dataloader"]
