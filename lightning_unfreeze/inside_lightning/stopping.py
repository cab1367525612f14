"""`EarlyStopping` inside a plan: it may end its stage instead of the fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping


def early_stoppers(trainer: pl.Trainer) -> list[EarlyStopping]:
    """The `EarlyStopping` callbacks of `trainer`."""
    return [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]


def has_stopped(stopper: EarlyStopping, epoch: int) -> bool:
    """Whether it has asked for an end in `epoch`."""
    # the epoch alone says nothing in the first one, where it is 0 before
    return stopper.stopped_epoch == epoch and getattr(stopper, "stopping_reason_message", "") is not None


def start_afresh(stopper: EarlyStopping) -> None:
    """Has it judge the coming epochs as if the fit began there; its own options stay.

    By its state, which is public; guarded by `test_early_stopping__ends_its_stage_and_judges_the_next_one_afresh`.
    """
    worst = torch.tensor(torch.inf if stopper.mode == "min" else -torch.inf)
    fresh: dict[str, Any] = {"wait_count": 0, "stopped_epoch": 0, "best_score": worst}
    fresh |= {"stopping_reason": 0, "stopping_reason_message": None}
    state = stopper.state_dict()
    stopper.load_state_dict({name: fresh.get(name, value) for name, value in state.items()})


def follow(stopper: EarlyStopping, then: Callable[[EarlyStopping], None]) -> None:
    """Calls `then` right after its judgement of an epoch, and so before the checkpoint of that epoch.

    Lightning calls it after all other callbacks and after the module; checkpoints follow. On the object itself, until
    `unfollow`.
    """
    judge = stopper.on_train_epoch_end

    def judge_and_follow(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        judge(trainer, pl_module)
        then(stopper)

    vars(stopper)["on_train_epoch_end"] = judge_and_follow


def unfollow(stopper: EarlyStopping) -> None:
    """Undoes `follow`."""
    vars(stopper).pop("on_train_epoch_end", None)
