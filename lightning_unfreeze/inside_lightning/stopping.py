"""`EarlyStopping` inside a plan: it may end its stage instead of the fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info

_ADVICE = "early_stopping='stage' of GradualUnfreeze lets it end its stage alone"


def early_stoppers(trainer: pl.Trainer) -> list[EarlyStopping]:
    """The `EarlyStopping` callbacks of `trainer`."""
    return [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]


def has_stopped(stopper: EarlyStopping, epoch: int) -> bool:
    """Whether it has asked for an end in `epoch`."""
    # the epoch alone says nothing in the first one, where it is 0 before
    return stopper.stopped_epoch == epoch and getattr(stopper, "stopping_reason_message", "") is not None


def how_ended(trainer: pl.Trainer, cut_short: str, left: list[str], early_stopping: str) -> str:
    """Where a fit ended before its plan, whether an `EarlyStopping` did it, and what to do then.

    Args:
        trainer: After the fit.
        cut_short: What the stage had that it ended in; empty where it ended between two stages.
        left: The stages that did not run.
        early_stopping: What an `EarlyStopping` ends, `"fit"` or `"stage"`.
    """
    by = [f"EarlyStopping on {stopper.monitor!r}" for stopper in early_stoppers(trainer) if stopper.stopped_epoch]
    advice = f" ({_ADVICE})" if by and early_stopping == "fit" else ""
    ended = f"the fit ended after {trainer.current_epoch} epochs{' by ' + ' and '.join(by) if by else ''}{advice}"
    not_run = f"stages that did not run: {', '.join(left)}" if left else ""
    return "; ".join(part for part in (ended, cut_short, not_run) if part)


def start_afresh(stopper: EarlyStopping) -> None:
    """Has it judge the coming epochs as if the fit began there; its own options stay.

    By its state, which is public; guarded by `test_early_stopping__ends_its_stage_and_judges_the_next_one_afresh`.
    """
    worst = torch.tensor(torch.inf if stopper.mode == "min" else -torch.inf)
    fresh: dict[str, Any] = {"wait_count": 0, "stopped_epoch": 0, "best_score": worst}
    fresh |= {"stopping_reason": 0, "stopping_reason_message": None}
    state = stopper.state_dict()
    stopper.load_state_dict({name: fresh.get(name, value) for name, value in state.items()})


def say_what_they_end(trainer: pl.Trainer, num_stages: int) -> None:
    """At the start of a plan: each `EarlyStopping` counts on from stage to stage, and what it ends is the fit."""
    if num_stages > 1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        for stopper in early_stoppers(trainer):
            rank_zero_info(
                f"EarlyStopping on {stopper.monitor!r}, patience {stopper.patience}, counts through all {num_stages} "
                f"stages and ends the whole fit ({_ADVICE})"
            )


def follow(trainer: pl.Trainer, then: Callable[[EarlyStopping], None]) -> None:
    """Calls `then` right after each one's judgement of an epoch, and so before the checkpoint of that epoch.

    Lightning calls them after all other callbacks and after the module; checkpoints follow. On the objects themselves,
    until `unfollow`.
    """
    for stopper in early_stoppers(trainer):
        vars(stopper)["on_train_epoch_end"] = partial(_judge_and_follow, stopper.on_train_epoch_end, then, stopper)


def _judge_and_follow(
    judge: Callable[..., None], then: Callable[[EarlyStopping], None], stopper: EarlyStopping, *arguments: Any
) -> None:
    judge(*arguments)
    then(stopper)


def unfollow(trainer: pl.Trainer) -> None:
    """Undoes `follow`."""
    for stopper in early_stoppers(trainer):
        vars(stopper).pop("on_train_epoch_end", None)
