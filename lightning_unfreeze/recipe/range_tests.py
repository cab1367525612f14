"""The range test of each stage on its own, for a look at the curves before anything is trained."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_unfreeze.callbacks.base import players
from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage, RangeTest
from lightning_unfreeze.recipe.costs import Probe


def range_tests(
    trainer: pl.Trainer, pl_module: pl.LightningModule, datamodule: pl.LightningDataModule | None
) -> dict[str, RangeTest]:
    """The curves of the stages with `lr="find"` (of all, where none has it); trains nothing.

    Every test starts from the weights as they are: a later stage is not preceded by the training of the earlier ones.
    In `fit` it is, and its curve may differ.

    Args:
        trainer: Gives the plan, the `LRFinderPerStage` with its options, and how a step is made; is not run itself.
        pl_module: The module; its weights are left as they were.
        datamodule: Gives the training batches.

    Raises:
        MisconfigurationException: Where the trainer has no `GradualUnfreeze`, or `fit` would refuse the plan.
    """
    probe = _RangeTestProbe(trainer, pl_module)
    probe.fit(
        datamodule,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm=trainer.gradient_clip_algorithm,
        enable_progress_bar=trainer.progress_bar_callback is not None,
    )
    return probe.results


class _RangeTestProbe(Probe):
    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().__init__(trainer, pl_module)
        finders = [player for player in players(trainer) if isinstance(player, LRFinderPerStage)]
        self.finder = finders[0] if finders else LRFinderPerStage()
        self._warmup_share = max((player.warmup_share for player in players(trainer)), default=0.0)
        self.results: dict[str, RangeTest] = {}

    def preflight(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves out what stages need of validation: a range test needs none."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the range tests, each as at the start of its stage."""
        self.finder.warmup_share = self._warmup_share  # who warms up is not of this Trainer
        asked = [stage for stage in self.stages if stage.lr == "find"] or self.stages
        for stage in asked:
            run = self.enter(trainer, stage)
            self.what_trains.set_rates(trainer.optimizers[0].param_groups, stage)
            self.finder.run = run  # the rule and the steps that it reads by are those of the stage
            with self.around_stage_start(trainer, run):
                self.results[stage.name] = self.finder.range_test(trainer, pl_module, stage.name)
        self.finder.run, self.finder.warmup_share = None, 0.0
        trainer.should_stop = True
