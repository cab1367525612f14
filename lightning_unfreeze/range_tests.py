"""The range test of each stage on its own, for a look at the curves before anything is trained."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage, RangeTest
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.plan import probing_trainer


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
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    conductors = [callback for callback in callbacks if isinstance(callback, GradualUnfreeze)]
    if not conductors:
        raise MisconfigurationException("there are no stages: add GradualUnfreeze with them to trainer.callbacks")
    finders = [callback for callback in callbacks if isinstance(callback, LRFinderPerStage)]
    conductors[0].setup(trainer, pl_module, "fit")
    probe = _Probe(conductors[0], finders[0] if finders else LRFinderPerStage())
    probing = probing_trainer(
        trainer,
        probe,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm=trainer.gradient_clip_algorithm,
        enable_progress_bar=trainer.progress_bar_callback is not None,
    )
    probing.fit(pl_module, datamodule=datamodule)
    return probe.results


class _Probe(GradualUnfreeze):
    """Sets up a fit, makes the range test of each stage, and stops before the first batch is trained."""

    def __init__(self, conductor: GradualUnfreeze, finder: LRFinderPerStage) -> None:
        super().__init__(conductor.stages, conductor.network)
        self.finder = finder
        self.results: dict[str, RangeTest] = {}

    def _check_needs(self, trainer: pl.Trainer) -> None:
        """The players are the original trainer's, and were checked there."""

    def _sets_rates(self, trainer: pl.Trainer) -> bool:
        return True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the range tests, each as at the start of its stage."""
        asked = [stage for stage in self.stages if stage.lr == "find"] or self.stages
        for stage in asked:
            self._index, self._entered = self.stages.index(stage), None
            run = self.enter_stage(trainer)
            self._set_rates(trainer, run)
            with self.around_stage_start(trainer, run):
                self.results[stage.name] = self.finder.range_test(trainer, pl_module, stage.name)
        trainer.should_stop = True
