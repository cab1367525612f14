"""What every callback of a staged run shares: players are told of the stages, one conductor tells them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_unfreeze.stages.cycles import MAX_STAGE_EPOCHS
from lightning_unfreeze.stages.plan import Stage
from lightning_unfreeze.stages.progress import Progress


def _seating_a_conductor(setup: Callable[..., None]) -> Callable[..., None]:
    """A player's `setup`, before which its Trainer has a conductor: the only hook that this package stands before.

    Lightning calls `setup` of every callback first. So no player has to call `super()` for the stages to be announced.
    """

    @functools.wraps(setup)
    def wrapped(self: Any, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not any(isinstance(each, Conductor) for each in trainer.callbacks):  # type: ignore[attr-defined]
            whole_fit = _WholeFit()
            trainer.callbacks = [whole_fit, *trainer.callbacks]  # type: ignore[attr-defined]
            whole_fit.setup(trainer, pl_module, stage)  # Lightning goes through the old list
        setup(self, trainer, pl_module, stage)

    wrapped.seats_a_conductor = True  # type: ignore[attr-defined]
    return wrapped


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

    def epoch(self, trainer: pl.Trainer) -> int:
        """Number of the Trainer's epoch within the stage, from 1."""
        return trainer.current_epoch + 1 - self.start_epoch


class StageCallback(Callback):
    """A callback that is told of the stages of a run.

    The hooks below do nothing until they are overridden, and none of them, nor any of Lightning's, needs a call of
    `super()`: the conductor announces the stages, and finds its players in the Trainer's list. `GradualUnfreeze` is the
    conductor; in a fit without it one takes its seat that announces the whole fit as a single stage, so that each
    callback also works alone.

    Attributes:
        order: Place in the fixed order in which a stage start is announced (lower is earlier, any number); the order of
            the Trainer's list of callbacks does not matter.
        writes_rates: Whether it sets learning rates, so that a scheduler of the module's would be a second writer.
        warmup_share: Share of each cycle in which its rates rise to their peaks; a range test asks for it.
        run: The stage that was announced last; None outside of fitting.
    """

    order: ClassVar[int] = 50
    writes_rates: ClassVar[bool] = False
    warmup_share: float = 0.0
    run: StageRun | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls.setup, "seats_a_conductor"):
            cls.setup = _seating_a_conductor(cls.setup)  # type: ignore[method-assign]

    @_seating_a_conductor
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lightning's own; does nothing."""

    def preflight(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stages: Sequence[Stage]) -> None:
        """Called once per fit with the whole plan, before the sanity validation and before anything trains.

        What will fail later fails here: raise a `MisconfigurationException`, the same on every rank. Module, optimizer
        and param groups are ready, the weights of a checkpoint are loaded, its loops are not. Loaders are not yet made;
        `trainer.estimated_stepping_batches` makes the one for training.
        """

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

    def on_weights_chosen(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, are_new: bool) -> None:
        """Called at the end of a fit whose module has its final weights; new ones were seen in no validation of it."""

    def wants_to_end_stage(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> bool:
        """Asked at the end of each epoch: True ends the stage early. Has to be the same on every rank."""
        return False

    def closing_rows(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[dict[str, Any]]:
        """Lines for the summary that closes a fit, each by `reporting.row`: weights, their file, their score."""
        return []

    def around_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any
    ) -> AbstractContextManager[Any]:
        """What a training step on a batch of the stage's loader needs around it, outside of the Trainer's own loop."""
        return nullcontext()


class Conductor(Callback):
    """Announces the stages to all `StageCallback`s of its Trainer; there is one, and it is found by its type.

    As it is, the whole fit is one stage, which asks for nothing. `GradualUnfreeze` has a plan. Sole writer of
    `progress`, whose docstring has the table of a stage's life, and of every player's `run`.

    Attributes:
        progress: Where the run stands.
        run: The stage that was announced last; None outside of fitting.
        ready: Whether the fit has begun: a tool that tries steps before it (a batch size, say) is served no stage.
    """

    def __init__(self) -> None:
        self.progress = Progress()
        self.run: StageRun | None = None
        self.ready = False

    # --- what the players ask ----------------------------------------------------------------------------------------

    def plan(self, trainer: pl.Trainer) -> list[Stage]:
        """All stages of the fit."""
        return [self.current_run(trainer).stage]

    def current_run(self, trainer: pl.Trainer) -> StageRun:
        """The stage that the Trainer's current epoch belongs to."""
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else MAX_STAGE_EPOCHS
        return StageRun(0, Stage("fit", epochs=epochs), 0, 0, resumed=trainer.global_step > 0, planned=False)

    def enter_stage(self, trainer: pl.Trainer) -> StageRun:
        """Makes the module ready for the current stage, if it is not.

        Called before a stage is announced, and by whoever needs the module of the coming stage earlier than that (the
        request for a stage's data loader comes before `on_train_epoch_start`).
        """
        run = self.current_run(trainer)
        if self.progress.phase == "idle":
            self.make_ready(trainer, run.stage)
            self.progress = self.progress.enter()
        return run

    def settle(self, trainer: pl.Trainer, *, solved: bool) -> StageRun:
        """Told what the `solve="auto"` of the current stage comes to, before the stage is announced."""
        return self.current_run(trainer)

    def make_ready(self, trainer: pl.Trainer, stage: Stage) -> None:
        """Sets what trains in `stage`."""

    def frozen_roots(self) -> list[nn.Module]:
        """The outermost modules that the current stage keeps in eval mode."""
        return []

    def around_stage_start(self, trainer: pl.Trainer, run: StageRun) -> AbstractContextManager[Any]:
        """What holds while a stage start is announced."""
        return nullcontext()

    # --- announcing --------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets the stage of a fit that ended with an error, where Lightning calls no `teardown`."""
        self._forget_run(trainer)
        self.progress = self.progress.restart()
        self.ready = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Has every player say what will fail later."""
        self.preflight(trainer, pl_module)

    def preflight(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Asks the players; their order is that of a stage's start."""
        self.ready = True
        for player in players(trainer):
            player.preflight(trainer, pl_module, self.plan(trainer))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Announces a stage that starts with this epoch."""
        self.announce(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Announces the stage of a run that was resumed inside an epoch, where `on_train_epoch_start` is not called."""
        self.announce(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the stage after its last epoch."""
        self.end_epoch(trainer, pl_module, next_epoch=trainer.current_epoch + 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends a stage that the fit was stopped in."""
        if self.progress.phase == "announced":
            self._tell_end(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets the stage, so that the next fit starts afresh."""
        self._forget_run(trainer)

    def announce(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells the players that the current stage starts, if they do not know."""
        if self.progress.phase not in ("idle", "entered"):
            return
        self.run = run = self.enter_stage(trainer)
        self.progress = self.progress.announce()
        told = players(trainer)
        for player in told:
            player.run = run
        with self.around_stage_start(trainer, run):
            self.start_stage(trainer, pl_module, run)
            for player in told:
                player.on_stage_start(trainer, pl_module, run.stage)

    def start_stage(self, trainer: pl.Trainer, pl_module: pl.LightningModule, run: StageRun) -> None:
        """What the conductor itself does first at the start of a stage."""

    def end_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, next_epoch: int) -> None:
        """Ends the stage where it was its last epoch, or a player wants to."""
        if self.run is None or self.progress.phase != "announced":
            return
        # every player is asked, also after one that wants to: they may count epochs, or reduce over the ranks
        wishes = [player.wants_to_end_stage(trainer, pl_module, self.run.stage) for player in players(trainer)]
        asked_to = any(wishes)
        if asked_to or next_epoch >= self.run.end_epoch:
            self.finish_stage(trainer, pl_module, asked_to=asked_to, next_epoch=next_epoch)

    def finish_stage(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, asked_to: bool, next_epoch: int
    ) -> None:
        """Ends the stage; without a plan the fit ends with it."""
        self._tell_end(trainer, pl_module)
        trainer.should_stop = trainer.should_stop or asked_to

    def _tell_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.run is not None:
            for player in reversed(players(trainer)):
                player.on_stage_end(trainer, pl_module, self.run.stage)
        self.progress = self.progress.end()

    def _forget_run(self, trainer: pl.Trainer) -> None:
        self.run = None
        for player in players(trainer):
            player.run = None


def players(trainer: pl.Trainer) -> list[StageCallback]:
    """The stage callbacks of `trainer` in the order in which a stage start is announced to them."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, StageCallback)]  # type: ignore[attr-defined]
    return sorted(found, key=lambda player: player.order)


def goes_on(trainer: pl.Trainer) -> bool:
    """Whether a fit goes on where the last one of its Trainer was stopped."""
    return trainer.current_epoch > 0 or trainer.global_step > 0


def plan_to_tell(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """The stages as a file of weights tells them; none in a fit without a plan."""
    conducting = conductor(trainer)
    return [asdict(stage) for stage in conducting.plan(trainer)] if conducting.current_run(trainer).planned else []


def conductor(trainer: pl.Trainer) -> Conductor:
    """Who announces the stages of the fit that `trainer` is in.

    Raises:
        RuntimeError: Outside of a fit with stage callbacks.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Conductor):
            return callback
    raise RuntimeError("there is no conductor: stages are announced in Trainer.fit only")


class _WholeFit(Conductor):
    """The conductor of a fit that has none in its list; it comes with the fit and goes with it."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves its seat; Lightning calls no `teardown` after an error."""
        self._leave(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves its seat."""
        super().teardown(trainer, pl_module, stage)
        self._leave(trainer)

    def _leave(self, trainer: pl.Trainer) -> None:
        # a new list: Lightning goes through the old one while it calls a hook
        trainer.callbacks = [each for each in trainer.callbacks if each is not self]  # type: ignore[attr-defined]
