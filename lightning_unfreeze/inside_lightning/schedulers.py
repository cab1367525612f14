"""A scheduler of the module's own, while stages set the rates: refused, or taken away."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info

from lightning_unfreeze.layers.param_groups import undo_scheduled_rates


def refuse_or_replace_schedulers(trainer: pl.Trainer, what: Literal["error", "replace"]) -> None:
    """Leaves the stages as the only writers of the learning rates, which go back to what a scheduler was built on.

    Lightning (2.6) keeps schedulers of `configure_optimizers` in the strategy, and has no public way to drop one;
    guarded by `test_scheduler_replace__trains_as_the_module_without_one`.

    Raises:
        MisconfigurationException: For `"error"`, where the module has any.
    """
    names = ", ".join(type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs)
    if not names:
        return
    if what == "error":
        raise MisconfigurationException(
            f"`configure_optimizers` returned the scheduler {names}, and the stages set the learning rates: two "
            "writers of one quantity; return the optimizer alone, or let the plan take its place by "
            "GradualUnfreeze(scheduler='replace')"
        )
    trainer.strategy.lr_scheduler_configs = []
    undo_scheduled_rates(trainer.optimizers[0])
    rank_zero_info(f"the module's scheduler {names} is replaced: the stages set the learning rates")
