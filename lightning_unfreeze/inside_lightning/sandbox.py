"""Training steps that leave no trace: for the range test, for checking a shortcut, for timing a plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader, Dataset

from lightning_unfreeze.inside_lightning.distributed import rebuild_ddp
from lightning_unfreeze.layers.kept import kept
from lightning_unfreeze.seeding import kept_rng

# loops, counters, loggers and data hang on a module too, and no step is to touch them
_LEFT_ALONE = (pl.Trainer, pl.Callback, pl.LightningDataModule, Logger, Dataset, DataLoader)


@contextmanager
def sandbox(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Whatever training steps do inside, afterwards everything is bitwise as before.

    Kept and put back, in memory: whatever hangs on the module (parameters, gradients, buffers, modes, metrics, meters,
    lists that a step appends to, objects of any class; see `kept`), the optimizers with their state and param groups,
    the gradient scaler, the random state (Python, numpy, torch, CUDA). `self.log` does nothing inside and no callback
    is called; loops, counters, loggers and checkpoints are never touched. Under DDP the wrapper is built anew at the
    end, a collective call.

    Not covered: what a step does to the world outside (files, its own logger calls, globals) and to a dataset.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    with kept_rng(), kept(pl_module, *trainer.optimizers, trainer.precision_plugin, skip=_LEFT_ALONE):
        trainer.callbacks = []  # type: ignore[attr-defined]
        vars(pl_module).update(log=_log_nothing, log_dict=_log_nothing)
        try:
            yield
        finally:
            trainer.callbacks = callbacks  # type: ignore[attr-defined]
    rebuild_ddp(trainer)  # a collective call: not after an error, which may be that of one rank alone


def _log_nothing(*_: Any, **__: Any) -> None:
    return None
