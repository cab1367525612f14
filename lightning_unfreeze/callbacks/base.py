"""What every callback of a staged run shares: it is told when a stage starts and when it ends."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_unfreeze.stages.plan import MAX_STAGE_EPOCHS, Stage


@dataclass(frozen=True)
class StageRun:
    """Where a stage stands in the run: what a schedule needs to be a pure function of (stage, step).

    Attributes:
        index: Place of the stage in the plan, from 0.
        stage: The stage itself.
        start_epoch: The Trainer's `current_epoch` at the stage's first batch.
        start_step: The Trainer's `global_step` (optimizer steps) at the stage's first batch.
        resumed: True where the run was resumed inside the stage, so that its start lies in another process.
        restaged: True where another plan starts the stage anew, from a checkpoint that was written inside it.
        planned: False for the single stage of a fit without `GradualUnfreeze`: then `stage` asks for nothing, and a
            callback does what it was attached for.
        later: The stages after this one.
    """

    index: int
    stage: Stage
    start_epoch: int
    start_step: int
    resumed: bool = False
    restaged: bool = False
    planned: bool = True
    later: tuple[Stage, ...] = ()

    @property
    def end_epoch(self) -> int:
        """First epoch after the stage, if nothing ends it earlier."""
        return self.start_epoch + self.stage.num_epochs


class StageCallback(Callback):
    """A callback that is told of the stages of a run.

    The first of them in `order` leads: it knows the current stage and announces it to all. `GradualUnfreeze` always
    comes first; without it the whole fit is a single stage, announced in the same way, so that each callback also
    works alone. A subclass that overrides one of the hooks below calls `super()` first.

    Attributes:
        order: Place in the fixed order in which a stage start is announced (lower is earlier); the order of the
            Trainer's list of callbacks does not matter.
        writes_rates: Whether it sets learning rates, so that a scheduler of the module's would be a second writer.
        run: The stage that was announced last; None outside of fitting.
    """

    order: ClassVar[int] = 50
    writes_rates: ClassVar[bool] = False
    run: StageRun | None = None
    _ended = False

    def on_stage_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Called when `stage` starts, and once more when a run resumes inside it (then `self.run.resumed`)."""

    def on_stage_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Called after the last epoch of `stage`, before the checkpoint of that epoch is written.

        Where the fit is stopped inside the stage (early stopping, a time limit), it is called when the fit ends: a
        checkpoint written before that goes on inside the stage.
        """

    def on_cycle_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage, cycle: int, name: str
    ) -> None:
        """Called after the last optimizer step of a cycle (from 1), before its validation; `name` is of both."""

    def on_weights_kept(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Called after a validation of weights that the stage may go back to, the best so far."""

    def on_weights_restored(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Called when the weights that were kept last are in force again: what was found of others is void."""

    def wants_to_end_stage(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> bool:
        """Asked at the end of each epoch: True ends the stage early. Has to be the same on every rank."""
        return False

    def around_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any
    ) -> AbstractContextManager[Any]:
        """What a training step on a batch of the stage's loader needs around it, outside of the Trainer's own loop."""
        return nullcontext()

    def as_if_in(self, stage: Stage) -> AbstractContextManager[Any]:
        """The parameters require gradients as in another stage of the plan, for a look ahead; the leader's."""
        return nullcontext()

    def around_stage_start(self, trainer: pl.Trainer, run: StageRun) -> AbstractContextManager[Any]:
        """What holds while a stage start is announced; asked of the leader only."""
        return nullcontext()

    def current_run(self, trainer: pl.Trainer) -> StageRun:
        """The stage that the Trainer's current epoch belongs to; asked of the leader only."""
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else MAX_STAGE_EPOCHS
        return StageRun(0, Stage("fit", epochs=epochs), 0, 0, resumed=trainer.global_step > 0, planned=False)

    def enter_stage(self, trainer: pl.Trainer) -> StageRun:
        """Makes the module ready for the current stage, if it is not; asked of the leader only.

        Called before a stage is announced, and by whoever needs the module of the coming stage earlier than that (the
        request for a stage's data loader comes before `on_train_epoch_start`).
        """
        return self.current_run(trainer)

    def frozen_roots(self) -> list[nn.Module]:
        """Modules that the current stage keeps in eval mode; asked of the leader only."""
        return []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Announces a stage that starts with this epoch."""
        self._announce(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Announces the stage of a run that was resumed inside an epoch, where `on_train_epoch_start` is not called."""
        if self.run is None or batch_idx == 0:
            self._announce(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the stage after its last epoch."""
        if self is not leader(trainer):
            return
        if self.run is None:  # resumed from a checkpoint of this epoch's validation: no other hook came before
            self._announce(trainer, pl_module)
        self._end_epoch(trainer, pl_module, next_epoch=trainer.current_epoch + 1)

    def _end_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, next_epoch: int) -> None:
        if self.run is None:
            return
        # every player is asked, also after one that wants to: they may count epochs, or reduce over the ranks
        wishes = [player.wants_to_end_stage(trainer, pl_module, self.run.stage) for player in players(trainer)]
        asked_to = any(wishes)
        if asked_to or next_epoch >= self.run.end_epoch:
            self._finish_stage(trainer, pl_module, asked_to=asked_to, next_epoch=next_epoch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends a stage that the fit was stopped in."""
        if self is leader(trainer) and self.run is not None and not self._ended:
            self._end(trainer, pl_module, self.run)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets the stage of a fit that ended with an error, where Lightning calls no `teardown`."""
        self.run = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets the stage, so that the next fit starts afresh."""
        self.run = None

    def _announce(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self is not leader(trainer):
            return
        run = self.enter_stage(trainer)
        if self.run is not None and self.run.index == run.index:
            return
        self._ended = False
        with self.around_stage_start(trainer, run):
            for player in players(trainer):
                player.run = run
                player.on_stage_start(trainer, pl_module, run.stage)

    def _finish_stage(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, asked_to: bool, next_epoch: int
    ) -> None:
        if self.run is None:
            return
        self._end(trainer, pl_module, self.run)
        if asked_to:
            trainer.should_stop = True

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, run: StageRun) -> None:
        for player in reversed(players(trainer)):
            player.on_stage_end(trainer, pl_module, run.stage)
        self._ended = True


def players(trainer: pl.Trainer) -> list[StageCallback]:
    """The stage callbacks of `trainer` in the order in which a stage start is announced to them."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, StageCallback)]  # type: ignore[attr-defined]
    return sorted(found, key=lambda player: player.order)


def set_lr(group: dict[str, Any], rate: float) -> None:
    """Writes the rate of a param group; into a tensor in place, since a compiled optimizer holds it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def leader(trainer: pl.Trainer) -> StageCallback:
    """The stage callback that announces the stages."""
    return players(trainer)[0]
