"""A scheduler of the module's own, taken away while stages set the rates."""

from __future__ import annotations

import lightning.pytorch as pl


def take_schedulers_away(trainer: pl.Trainer) -> None:
    """Has the Trainer step no scheduler in this fit.

    Lightning (2.6) keeps those of `configure_optimizers` in the strategy, and has no public way to drop one; guarded by
    `test_scheduler_replace__trains_as_the_module_without_one`.
    """
    trainer.strategy.lr_scheduler_configs = []
