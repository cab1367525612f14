"""Where Lightning goes on from a checkpoint: what its loops' state says, and what it would lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException


@dataclass(frozen=True)
class ResumePoint:
    """Where the Trainer goes on.

    Attributes:
        next_epoch: The epoch of its next batch, or of the validation that comes before it.
        inside_epoch: Whether that epoch was begun before: then Lightning calls no `on_train_epoch_start` in it.
        epoch_end_lost: Whether the end of an epoch was not reached, and will not be.
    """

    next_epoch: int
    inside_epoch: bool
    epoch_end_lost: bool


def resume_point(trainer: pl.Trainer, fit_loop: dict[str, Any]) -> ResumePoint:
    """Reads the state of the loops in a checkpoint, and mends it where a validation would be lost.

    Lightning (2.6) takes for finished: an epoch whose checkpoint was saved in `on_train_batch_end` of its last batch,
    and a validation that was interrupted between two batches (by SIGTERM). Both become a validation that was begun; it
    is done from the start, and the end of the epoch follows by itself. The state has no public form; guarded by
    `test_resume__goes_on_as_if_never_stopped`, `test_resume__makes_up_for_the_end_of_an_epoch_that_a_checkpoint_lacks`
    and `test_sigterm__lightning_ends_the_run_and_it_goes_on_where_it_was`.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    inside = epochs["total"]["processed"] < epochs["total"]["started"]
    saved_at_batch_end = batches["total"]["completed"] == batches["total"]["processed"] - 1
    at_last_batch_end = saved_at_batch_end and batches["is_last_batch"]
    validates = at_last_batch_end and _validates_at_epoch_end(trainer, epochs["current"], batches["current"])
    done = validation["total"]
    interrupted = 0 < done["processed"] == done["started"] and not validation["is_last_batch"]
    if validates:
        for counters in (batches["total"], batches["current"]):
            counters["completed"] = counters["processed"]
    if inside and (validates or interrupted):
        validation["is_last_batch"] = False
        for counters in (done, validation["current"]):
            counters.update(ready=1, started=1, processed=0, completed=0)
    lost = bool(at_last_batch_end and not validates)
    return ResumePoint(int(epochs["current"]["processed"]) + lost, bool(inside), lost)


def _validates_at_epoch_end(trainer: pl.Trainer, epochs: Mapping[str, int], batches: Mapping[str, int]) -> bool:
    """Whether the Trainer validates after the last batch of the epoch that the counters stand in."""
    every_epochs, interval = trainer.check_val_every_n_epoch, trainer.val_check_interval
    if not trainer.enable_validation or not every_epochs or (epochs["processed"] + 1) % every_epochs:
        return False
    # a share of the epoch, or a number of batches
    every_batches = int(batches["ready"] * interval) if isinstance(interval, float) else interval
    return isinstance(every_batches, int) and every_batches > 0 and batches["ready"] % every_batches == 0


def staged_state(trainer: pl.Trainer, checkpoint: dict[str, Any], state_key: str) -> dict[str, Any] | None:
    """What the conductor kept in a checkpoint that a fit goes on from; None where there is nothing to go on with.

    Raises:
        MisconfigurationException: For a checkpoint that was not written by a staged run.
    """
    state: dict[str, Any] = checkpoint.get("callbacks", {}).get(state_key)
    if state:
        return state
    if checkpoint["global_step"] == trainer.global_step == 0:
        return None  # a tool tried steps before the fit began, and puts everything back
    raise MisconfigurationException(
        "the checkpoint was not written by a run with GradualUnfreeze, so its optimizer does not fit the "
        "stages; load its weights (`load_from_checkpoint`) and fit without ckpt_path"
    )
