"""What a plan or a callback of ours cannot run beside: each is a MisconfigurationException that says what to do."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_info

from lightning_unfreeze.layers.param_groups import undo_scheduled_rates
from lightning_unfreeze.reporting import report_dir

_LIGHTNING_DEFAULT_EPOCHS = 1000
_COLLAPSES_FROM = 1e-3  # measured: docs/recipes.md
_ADAMS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)


def refuse_clashing_callbacks(trainer: pl.Trainer, plan: Callback) -> None:
    """Refuses callbacks of Lightning's and of others that write what the owner of the plan writes."""
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        reason = None
        if isinstance(other, type(plan)) and other is not plan:
            reason = "a Trainer takes one plan; put all stages into one GradualUnfreeze"
        elif isinstance(other, BaseFinetuning) or type(other).__name__ == "FinetuningScheduler":
            reason = "it freezes and unfreezes too; express it as stages"
        elif isinstance(other, LearningRateFinder):
            reason = "it gives every param group one rate; use LRFinderPerStage and lr='find'"
        elif isinstance(other, StochasticWeightAveraging):
            reason = "it takes over the learning rates; use CosineRestarts(snapshots=True), or WeightAveraging"
        if reason:
            raise MisconfigurationException(f"GradualUnfreeze cannot run beside {type(other).__name__}: {reason}")


def refuse_foreign_trainer(trainer: object) -> None:
    """Refuses the Trainer of `pytorch_lightning`, whose classes are other ones."""
    if not isinstance(trainer, pl.Trainer):
        raise MisconfigurationException(
            f"GradualUnfreeze needs lightning.pytorch.Trainer, got {type(trainer).__module__}.Trainer; "
            "import both from `lightning.pytorch`"
        )


def refuse_manual_optimization(pl_module: pl.LightningModule) -> None:
    """Refuses a module that steps its optimizers itself."""
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "stages need automatic optimization; the module sets automatic_optimization=False"
        )


def refuse_search_on_resume(trainer: pl.Trainer) -> None:
    """Refuses `BatchSizeFinder` in a fit that goes on from a checkpoint: Lightning (2.6) forgets where it stood."""
    if any(isinstance(callback, BatchSizeFinder) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "BatchSizeFinder in a resumed fit has Lightning start from step 0; search in the first fit, set the size "
            "that it found, and resume without it"
        )


def refuse_clashing_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer that stages cannot drive."""
    if not optimizer.param_groups or not all("lr" in group for group in optimizer.param_groups):
        raise MisconfigurationException(
            f"stages set learning rates, and {type(optimizer).__name__} has none; `configure_optimizers` has to "
            "return one torch optimizer"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise MisconfigurationException(
            "LBFGS takes one param group, and stages need one per layer group; use another optimizer, e.g. AdamW"
        )


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
            "GradualUnfreeze(scheduler='replace'); nine_steps and fine_tune take scheduler='replace', too"
        )
    trainer.strategy.lr_scheduler_configs = []
    undo_scheduled_rates(trainer.optimizers[0])
    rank_zero_info(f"the module's scheduler {names} is replaced: the stages set the learning rates")


def refuse_scheduler_by_step(trainer: pl.Trainer, option: str) -> None:
    """Refuses a scheduler of the module's that counts steps, where `option` changes their number."""
    by_step = [config.scheduler for config in trainer.lr_scheduler_configs if config.interval == "step"]
    if by_step:
        raise MisconfigurationException(
            f"{option} changes the number of steps of an epoch, and `configure_optimizers` returned a "
            f"{type(by_step[0]).__name__} that counts steps; leave {option.split('=')[0]} out, or give the scheduler "
            '{"interval": "epoch"}'
        )


def refuse_other_max_epochs(trainer: pl.Trainer, num_stages: int, planned: int) -> None:
    """Refuses a `max_epochs` that was given and is not that of the plan."""
    if trainer.max_epochs not in (None, -1, _LIGHTNING_DEFAULT_EPOCHS, planned):
        raise MisconfigurationException(
            f"Trainer(max_epochs={trainer.max_epochs}), but the {num_stages} stages last {planned} epochs; leave "
            f"max_epochs out, or set it to {planned}"
        )


def refuse_other_rate_writers(trainer: pl.Trainer) -> None:
    """Refuses callbacks that write learning rates beside `CosineRestarts`, or change the steps that it counts."""
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(other, LearningRateFinder | StochasticWeightAveraging):
            raise MisconfigurationException(
                f"{type(other).__name__} and CosineRestarts would both write the learning rates; keep one of them"
            )
        if isinstance(other, GradientAccumulationScheduler):
            raise MisconfigurationException(
                "GradientAccumulationScheduler changes the number of optimizer steps of an epoch, and cycles are "
                "counted in steps; use Trainer(accumulate_grad_batches=...)"
            )


def refuse_other_optimizers(trainer: pl.Trainer, momentum: tuple[float, float] | None) -> None:
    """Refuses a scheduler of the module's, several optimizers, and a momentum that there is not to cycle."""
    schedulers = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
    if schedulers:
        raise MisconfigurationException(
            f"`configure_optimizers` returned the scheduler {schedulers[0]}, and CosineRestarts writes the "
            "learning rates: two writers of one quantity; return the optimizer alone, or take CosineRestarts out"
        )
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            f"CosineRestarts counts the steps of one optimizer, the module has {len(trainer.optimizers)}"
        )
    options = trainer.optimizers[0].defaults
    if momentum is not None and "betas" not in options and "momentum" not in options:
        raise MisconfigurationException(
            f"momentum={momentum}, but {type(trainer.optimizers[0]).__name__} has neither momentum nor betas"
        )


def refuse_without_folder(trainer: pl.Trainer, asked: str) -> None:
    """Refuses what is saved beside the checkpoints where there is no such place; `asked` begins the message."""
    if report_dir(trainer) is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise MisconfigurationException(
            f"{asked} saves beside the checkpoints, and this Trainer has neither checkpoints nor a logger; set "
            "enable_checkpointing=True or leave it out"
        )


def refuse_without_validation(trainer: pl.Trainer, asked: str) -> None:
    """Refuses what judges by validation where there is none; `asked` begins the message."""
    if trainer.barebones:
        raise MisconfigurationException(
            f"{asked} judges by validation, and Trainer(barebones=True) logs nothing; leave one of the two out"
        )
    if not trainer.enable_validation:
        raise MisconfigurationException(
            f"{asked} judges by validation, and there is none: give validation data and a `validation_step`, set "
            "limit_val_batches above 0, or leave `until` out"
        )


def refuse_without_validation_at_epoch_end(trainer: pl.Trainer, asked: str) -> None:
    """Refuses what judges at the end of every epoch where validation comes at other times, once batches are known."""
    every_epochs, every_batches = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if every_epochs != 1 or not every_batches or trainer.num_training_batches % every_batches:
        raise MisconfigurationException(
            f"{asked} judges by a validation at the end of every epoch; the Trainer has "
            f"check_val_every_n_epoch={every_epochs} and validates every {every_batches} of "
            f"{trainer.num_training_batches} batches (val_check_interval)"
        )


def refuse_frozen_statistics(optimizer: torch.optim.Optimizer, stage: str, lowest_rate: float) -> None:
    """Refuses a stage whose weights would run away from BatchNorm statistics that stay.

    The lowest rate is of all layer groups with pretrained BatchNorm; 0 where one of them is frozen.

    Raises:
        MisconfigurationException: Saying which rates do.
    """
    if lowest_rate >= _COLLAPSES_FROM * (1 - 1e-9) and isinstance(optimizer, _ADAMS):
        raise MisconfigurationException(
            f"stage {stage!r}: train_bn=False keeps the statistics of the pretrained BatchNorm, and "
            f"{type(optimizer).__name__} at a rate of {lowest_rate:.2g} or more in every layer group moves the weights "
            "away from under them: such networks fell to chance; take lr=3e-4, lr_span=1/9 or train_bn=True"
        )
