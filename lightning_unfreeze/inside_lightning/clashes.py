"""Callbacks and optimizers that a plan cannot run beside, each with what to do."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    StochasticWeightAveraging,
)

_COLLAPSES_FROM = 1e-3  # measured: docs/recipes.md
_ADAMS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)


def refuse_clashing_callbacks(trainer: pl.Trainer, plan: Callback) -> None:
    """Refuses callbacks of Lightning's and of others that write what the owner of the plan writes.

    Args:
        trainer: Its callbacks are looked at.
        plan: The owner of the plan.

    Raises:
        MisconfigurationException: Naming the callback, and what to do.
    """
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


def refuse_search_on_resume(trainer: pl.Trainer) -> None:
    """Refuses `BatchSizeFinder` in a fit that goes on from a checkpoint: Lightning (2.6) then forgets where it stood.

    Raises:
        MisconfigurationException: Saying where the search belongs.
    """
    if any(isinstance(callback, BatchSizeFinder) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "BatchSizeFinder in a resumed fit has Lightning start from step 0; search in the first fit, set the size "
            "that it found, and resume without it"
        )


def refuse_clashing_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer that stages cannot drive.

    Raises:
        MisconfigurationException: Naming its class.
    """
    if not optimizer.param_groups or not all("lr" in group for group in optimizer.param_groups):
        raise MisconfigurationException(
            f"stages set learning rates, and {type(optimizer).__name__} has none; `configure_optimizers` has to "
            "return one torch optimizer"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise MisconfigurationException(
            "LBFGS takes one param group, and stages need one per layer group; use another optimizer, e.g. AdamW"
        )


def refuse_frozen_statistics(optimizer: torch.optim.Optimizer, stage: str, lowest_rate: float) -> None:
    """Refuses a stage whose weights would run away from BatchNorm statistics that stay.

    Args:
        optimizer: The known collapses are those of Adam's kind.
        stage: Its name.
        lowest_rate: Of all layer groups with pretrained BatchNorm; 0 where one of them is frozen.

    Raises:
        MisconfigurationException: Saying which rates do.
    """
    if lowest_rate >= _COLLAPSES_FROM * (1 - 1e-9) and isinstance(optimizer, _ADAMS):
        raise MisconfigurationException(
            f"stage {stage!r}: train_bn=False keeps the statistics of the pretrained BatchNorm, and "
            f"{type(optimizer).__name__} at a rate of {lowest_rate:.2g} or more in every layer group moves the weights "
            "away from under them: such networks fell to chance; take lr=3e-4, lr_span=1/9 or train_bn=True"
        )
