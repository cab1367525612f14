"""What callbacks read as metrics: pinned to the weights that were put back, and found by a validation aside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from torch import Tensor

from lightning_unfreeze.seeding import rng_state, set_rng_state


class _Pinned(_LoggerConnector):
    """A connector whose `callback_metrics` are what they were set to."""

    pinned: dict[str, Tensor]

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        return self.pinned


def logged_scalars(trainer: pl.Trainer) -> dict[str, float]:
    """The metrics that callbacks read, of those the single numbers."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}


def mean_over_ranks(trainer: pl.Trainer, value: float | Tensor) -> float:
    """One value, and so one decision, on all ranks. A collective call."""
    on_device = torch.as_tensor(value).detach().float().to(trainer.strategy.root_device)
    return float(trainer.strategy.reduce(on_device, reduce_op="mean"))


def pin_callback_metrics(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """From here on `trainer.callback_metrics` is this, whatever the loops have logged of other weights.

    Lightning computes them anew from the results of the running loop at each look, and has no public way to set them;
    guarded by `test_metrics__stay_pinned_through_the_end_of_an_epoch` (Lightning 2.6).
    """
    connector: Any = trainer._logger_connector
    connector.pinned = {name: torch.tensor(value) for name, value in metrics.items()}
    connector.__class__ = _Pinned


def unpin_callback_metrics(trainer: pl.Trainer) -> None:
    """The metrics go on from what they were pinned to."""
    connector: Any = trainer._logger_connector
    if "pinned" in vars(connector):
        connector.__class__ = _LoggerConnector
        connector._callback_metrics.clear()
        connector._callback_metrics.update(vars(connector).pop("pinned"))


def validate_aside(trainer: pl.Trainer, heard_by: Sequence[Callback] = ()) -> dict[str, float]:
    """Runs the module's validation once and returns what it logged; no other callback and no logger hears of it.

    For the end of a fit, with whatever weights the module has. The random state and the Trainer's metrics are put back.
    A collective call. There is no public way to validate inside a fit; guarded by
    `test_metrics__a_validation_aside_is_that_of_the_trainer` (Lightning 2.6).
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    with _heard_by(trainer, list(heard_by)):
        loop.restarting = False
        trainer.validating = True
        loop.run()
        found = logged_scalars(trainer)
        trainer.training = True
    return found


@contextmanager
def _heard_by(trainer: pl.Trainer, hearers: list[Callback]) -> Iterator[None]:
    connector: Any = trainer._logger_connector
    names = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics", "_first_loop_iter", "_current_fx")
    before = {name: getattr(connector, name) for name in names}
    kind, pinned = type(connector), vars(connector).get("pinned")
    callbacks, loggers, random_state = trainer.callbacks, trainer.loggers, rng_state()  # type: ignore[attr-defined]
    connector.__class__ = _LoggerConnector
    connector.reset_metrics()
    trainer.callbacks, trainer.loggers = hearers, []  # type: ignore[attr-defined]
    try:
        yield
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]
        vars(connector).update(before)
        if pinned is not None:
            connector.pinned = pinned
        connector.__class__ = kind
        set_rng_state(random_state)
