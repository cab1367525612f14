"""`CosineRestarts`: the learning rate of every optimizer step, restarts, snapshots, and when a stage has had enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_unfreeze.callbacks.base import StageCallback, StageRun, conductor, plan_to_tell, players
from lightning_unfreeze.inside_lightning.best_so_far import BestSoFar
from lightning_unfreeze.inside_lightning.clashes import (
    refuse_other_optimizers,
    refuse_other_rate_writers,
    refuse_without_folder,
    refuse_without_validation,
    refuse_without_validation_at_epoch_end,
)
from lightning_unfreeze.inside_lightning.metrics import unpin_callback_metrics
from lightning_unfreeze.inside_lightning.steps import epochs_of_fit, steps_of_epoch
from lightning_unfreeze.inside_lightning.weights import save_weights
from lightning_unfreeze.inside_lightning.writers import check_rates
from lightning_unfreeze.layers.param_groups import scale_lr, set_momentum
from lightning_unfreeze.reporting import is_due_to_log, log_metrics, shared_path
from lightning_unfreeze.stages.cycles import Course, cycle_at
from lightning_unfreeze.stages.plan import Stage
from lightning_unfreeze.stages.schedules import Shape, cycling_momentum
from lightning_unfreeze.stages.until import Judge, Monitor
from lightning_unfreeze.tta.ensemble import AveragedForward


class CosineRestarts(StageCallback):
    """Writes `lr = peak_lr * multiplier` before each optimizer step; a pure function of the stage and the place in it.

    Sole writer of the `lr` of the param groups during a stage. The peak of a group (`param_group["peak_lr"]`) is that
    of the stage's `lr` and its ratios, of the range test, or, without stages, of the optimizer. A stage without
    `cycle_len` keeps its rates constant, as fast.ai's `fit` did. Restarts are exact (SGDR, Loshchilov & Hutter 2017,
    section 3): the place is counted in whole epochs, and within one in its optimizer steps, so a skipped batch or a
    loader that changes its length moves no later cycle. Every stage starts anew at its peak. The last cycle of a stage
    is stretched to the end of its epoch where the cycles end inside one.

    A stage with `until="overfit"` is judged at its cycle ends only, where rates are comparable: it ends when the
    monitored value did not improve by `min_delta` over the last full cycle (two cycles at least). One with
    `until="plateau"` is judged at every validation, and ends after `patience_epochs` epochs without improvement. Both
    go back to their best: weights, the optimizer's moments, Lightning's `WeightAveraging` beside them, and the metrics
    that other callbacks read, before a checkpoint of that epoch is written. Where the stage made nothing better than
    what it started from, that one is given back. The best weights are part of the checkpoint while such a stage runs.

    Args:
        shape: Of each cycle: `"cosine"`, ULMFiT's `"slanted_triangle"`, or `"one_cycle"` (a cosine rise and fall).
        cycle_len: Epochs of the first cycle, for a fit without stages; None makes the whole fit one cycle.
        cycle_mult: Length of a cycle over that of the one before, for a fit without stages.
        floor: Lowest rate as a share of the cycle's peak, in [0, 1].
        decay: Peak of a cycle over the peak of the one before, in (0, 1].
        warmup: Share of each cosine cycle that rises linearly to the peak, in [0, 1); none for one step or less.
        first_steps_warmup: Hold the first twentieth of a stage's first cycle at a hundredth, as fastai 0.7 did.
        momentum: Cycle the momentum (or Adam's beta1) between these two values, low where the rate is high.
        snapshots: Save the weights at each cycle end, as `snapshots/{stage}-cycle{n}.ckpt` beside the checkpoints.
        ensemble: In `test`, average the class probabilities over the snapshots; `forward` gives the log of the mean.
        monitor: Value logged in validation that `until` is judged by. None takes the module's own attribute `monitor`
            where it has one, else the validation loss under whatever name it is logged.
        mode: Whether less or more of it is better; `"auto"` tells by "loss", "error", "acc", "f1" in its name.
        min_delta: Least improvement that counts.

    Raises:
        ValueError: For a value outside of its range.
    """

    order: ClassVar[int] = 30
    writes_rates: ClassVar[bool] = True

    def __init__(
        self,
        shape: Literal["cosine", "slanted_triangle", "one_cycle"] = "cosine",
        cycle_len: float | None = None,
        cycle_mult: float = 1,
        floor: float = 0.0,
        decay: float = 1.0,
        warmup: float = 0.0,
        first_steps_warmup: bool = False,
        momentum: tuple[float, float] | None = None,
        snapshots: bool = False,
        ensemble: bool = False,
        monitor: str | None = None,
        mode: Literal["auto", "min", "max"] = "auto",
        min_delta: float = 0.0,
    ) -> None:
        self.shape = Shape(shape, floor, decay, warmup, first_steps_warmup)
        self.warmup_share, self._monitor = self.shape.warmup_share, Monitor(monitor, mode)
        if min_delta < 0:
            raise ValueError(f"min_delta={min_delta} has to be 0 or more")
        if momentum is not None and not 0 <= momentum[0] <= momentum[1] < 1:
            raise ValueError(f"momentum={momentum} has to be (low, high) with 0 <= low <= high < 1")
        if ensemble and not snapshots:
            raise ValueError("ensemble=True averages over snapshots; set snapshots=True too")
        cycle_at(0, 1 if cycle_len is None else cycle_len, cycle_mult)  # refuses what is no length
        self.cycle_len, self.cycle_mult = cycle_len, cycle_mult
        self.momentum, self.min_delta = momentum, min_delta
        self.save_snapshots, self.ensemble = snapshots, ensemble
        self._averaged: AveragedForward | None = None
        self._forget()

    def _forget(self) -> None:
        """As before any fit."""
        self._monitor.forget()
        self.snapshots: list[Path] = []
        self.cycle_values: dict[str, list[float]] = {}
        self._judges = False
        self._judge: Judge | None = None  # of the present stage, where it has `until`
        self._best = BestSoFar()
        self._course: Course | None = None  # of the present stage; None without cycles
        self._cycle: int | None = None  # that is running; None between the end of the last one and the next stage
        self._epoch_step = 0  # the optimizer step that the present epoch began with
        self._steps = 1  # optimizer steps of an epoch
        self._last_step = -1
        self._written: tuple[int, int, int] | None = None  # rates in force: (epoch, steps of it, param groups)

    # --- before training -------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses a second writer of the rates; forgets an earlier fit (a checkpoint's state is loaded after this)."""
        if stage != "fit":
            return
        self._forget()
        unpin_callback_metrics(trainer)
        refuse_other_rate_writers(trainer)
        callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
        # after all who look at a validation, before checkpoints are written; a new list: Lightning goes through the old
        place = next((i for i, other in enumerate(callbacks) if isinstance(other, Checkpoint)), len(callbacks))
        trainer.callbacks = [*callbacks[:place], _GoesBack(self), *callbacks[place:]]  # type: ignore[attr-defined]

    def preflight(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stages: Sequence[Stage]) -> None:
        """Refuses a scheduler of the module, what cannot be cycled or saved, and `until` without its validation."""
        refuse_other_optimizers(trainer, self.momentum)
        if self.save_snapshots:
            refuse_without_folder(trainer, "CosineRestarts(snapshots=True)")
        judged = [stage for stage in stages if stage.until is not None]
        self._judges = bool(judged)
        for stage in judged:
            refuse_without_validation(trainer, f"stage {stage.name!r}: until={stage.until!r}")
        if judged and isinstance(getattr(pl_module, "monitor", None), str):
            self._monitor.take(str(pl_module.monitor), getattr(pl_module, "mode", None))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses `until` without a validation where it is judged: the number of batches is known now."""
        for stage in conductor(trainer).plan(trainer):
            if stage.until == "overfit":
                refuse_without_validation_at_epoch_end(trainer, f"stage {stage.name!r}: until={stage.until!r}")

    def on_stage_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Lays out the cycles of the stage, and writes the rates of its first step."""
        if self.run is None:
            return
        self._last_step = trainer.global_step
        if trainer.global_step == self.run.start_step or self._epoch_step < self.run.start_step:
            self._epoch_step = trainer.global_step
        self._steps, self._written = steps_of_epoch(trainer) or self._steps, None
        self._course = course = self._cycles_of(trainer, self.run)
        if self.run.resumed and self._judge is not None:
            self._judge.values = self.cycle_values.setdefault(stage.name, self._judge.values)
        if not self.run.resumed:
            self._best.kept, self._judge = None, None
            self.cycle_values.pop(stage.name, None)  # of the plan before, where the stage was restaged
        if stage.until is not None and self._judge is None:  # it starts, or its Trainer's next fit goes on with it
            self._judge = Judge(stage.until, self._monitor.mode, self.min_delta, stage.patience_epochs)
            value = self._best.value_now(trainer)
            if value is not None:
                self._judge.started_from(value)
                self._keep(trainer, pl_module)
        self._cycle = None if course is None else course.running(self._place(trainer, self.run, to_come=True))
        self._write(trainer, to_come=True)

    # --- the schedule ----------------------------------------------------------------------------------------------

    def _cycles_of(self, trainer: pl.Trainer, run: StageRun) -> Course | None:
        stage = run.stage
        if run.planned and stage.cycle_len is None:
            return None
        if steps_of_epoch(trainer) is None:
            raise MisconfigurationException(
                "the training data has no length, so cycles cannot be counted in epochs; set "
                "Trainer(limit_train_batches=...) to the number of batches of an epoch"
            )
        if stage.cycle_len is not None:
            return Course.planned(stage.cycle_len, stage.cycle_mult, stage.num_cycles)
        total = epochs_of_fit(trainer, self._steps)
        if self.cycle_len is None and math.isinf(total):
            raise MisconfigurationException(
                "CosineRestarts() makes the whole fit one cycle, and this fit has no end; set "
                "Trainer(max_epochs=...), or CosineRestarts(cycle_len=...)"
            )
        return Course.of_fit(total, self.cycle_len, self.cycle_mult)

    def _done(self, trainer: pl.Trainer, *, to_come: bool) -> int:
        """Steps of the epoch that are done; of a step `to_come` never past the epoch that it belongs to."""
        return min(trainer.global_step - self._epoch_step, self._steps - 1 if to_come else self._steps)

    def _place(self, trainer: pl.Trainer, run: StageRun, *, to_come: bool) -> Fraction:
        """Epochs of the stage that are done."""
        done = self._done(trainer, to_come=to_come)
        return trainer.current_epoch - run.start_epoch + Fraction(done, self._steps)

    def multiplier(self, place: float | Fraction) -> float:
        """Multiplier of the peak rate at a place in the present stage, in epochs from its start."""
        return 1.0 if self._course is None else self.shape.at(self._course, place, self._steps)

    def _write(self, trainer: pl.Trainer, *, to_come: bool) -> None:
        if self.run is None:
            return
        check_rates(trainer, trainer.lightning_module, self.run.stage.name)  # before this overwrites another's
        groups = trainer.optimizers[0].param_groups
        at = trainer.current_epoch, self._done(trainer, to_come=to_come), len(groups)
        if at == self._written:  # asked for at both ends of a batch
            return
        self._written = at
        multiplier = self.multiplier(self._place(trainer, self.run, to_come=to_come))
        momentum = None if self.momentum is None else cycling_momentum(multiplier, *self.momentum)
        for group in groups:
            scale_lr(group, multiplier)
            if momentum is not None:
                set_momentum(group, momentum)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts the steps of the epoch from here; metrics are those of the loops again."""
        self._best.note_scores(trainer)
        unpin_callback_metrics(trainer)
        self._epoch_step = trainer.global_step
        self._steps, self._written = steps_of_epoch(trainer) or self._steps, None
        self._write(trainer, to_come=True)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Writes the rates of the step that this batch belongs to."""
        if batch_idx == 0:  # resumed at the end of an epoch's last batch, the next one starts without its own hook
            self._epoch_step = trainer.global_step
        self._write(trainer, to_come=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Says where a cycle ends; writes the next rates, for callbacks that log them."""
        if self.run is None:
            return
        if trainer.global_step != self._last_step:  # not inside an accumulation window
            self._last_step = trainer.global_step
            self._log_progress(trainer, self.run)
            self._write(trainer, to_come=False)
        if self._cycle is not None:
            # a batch of the epoch may have been skipped: its end is the end
            place = self.run.epoch(trainer) if trainer.is_last_batch else self._place(trainer, self.run, to_come=False)
            self._note_cycle(trainer, pl_module, place)

    def _log_progress(self, trainer: pl.Trainer, run: StageRun) -> None:
        if self._course is not None and is_due_to_log(trainer):
            place = self._place(trainer, run, to_come=False)
            # the cycle of the step that is done, not of the one to come
            index, start, length = self._course.at(place - Fraction(1, self._steps))
            log_metrics(trainer, {"cycle": float(index), "cycle_progress": (float(place) - start) / length})

    def _note_cycle(self, trainer: pl.Trainer, pl_module: pl.LightningModule, place: float | Fraction) -> None:
        """Tells of the end of the running cycle, where `place` is past it."""
        if self.run is None or self._cycle is None or self._course is None:
            return
        running = self._course.running(place)
        if running == self._cycle:
            return
        ended, self._cycle = self._cycle + 1, running
        name = f"{self.run.stage.name}-cycle{ended}"
        if self.save_snapshots:
            self._save_snapshot(trainer, f"{name}.ckpt")
        for player in players(trainer):
            player.on_cycle_end(trainer, pl_module, self.run.stage, ended, name)

    def _save_snapshot(self, trainer: pl.Trainer, name: str) -> None:
        path = shared_path(trainer, f"snapshots/{name}")
        if path is not None:
            save_weights(trainer, path, stages=plan_to_tell(trainer))
            self.snapshots = list(dict.fromkeys([*self.snapshots, path]))

    # --- until a stage has had enough ------------------------------------------------------------------------------

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judges, and keeps what is the best so far."""
        if not self._judges or trainer.state.fn != "fit":
            return
        self._find_monitor(trainer)
        if trainer.sanity_checking or self.run is None:
            return
        value = self._best.validated(trainer, self._monitor.name)
        stage, judge, epoch = self.run.stage, self._judge, self.run.epoch(trainer)
        if judge is None or value is None:
            return
        if judge.validated(value, epoch, ends_cycle=trainer.is_last_batch and epoch in stage.cycle_ends):
            self._keep(trainer, pl_module)
        self.cycle_values[stage.name] = judge.values

    def _end_epoch_of(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage, epoch: int) -> None:
        """After the last validation of an epoch: back to the best, where the stage ends."""
        if self._judge is None or self._judge.concluded:
            return
        self._judge.epoch_ended(epoch)
        if self._judge.enough:
            rank_zero_info(f"stage {stage.name!r} ends after {epoch} epochs: {self.monitor}: {self._judge.enough}")
        if self._judge.enough or epoch == stage.num_epochs:
            self._conclude(trainer, pl_module, stage)

    def after_validation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes back to the best of a stage that ends with this validation."""
        if self.run is not None and trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.is_last_batch:
            self._end_epoch_of(trainer, pl_module, self.run.stage, self.run.epoch(trainer))

    def wants_to_end_stage(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> bool:
        """Whether a stage with `until` has had enough."""
        if self.run is None:
            return False
        epoch = self.run.epoch(trainer)
        self._note_cycle(trainer, pl_module, epoch)  # where the epoch was cut short
        if self._judge is None:
            return False
        if stage.until == "overfit" and epoch in stage.cycle_ends and self._best.value_now(trainer) is None:
            rank_zero_warn(f"stage {stage.name!r}: the cycle end after {epoch} epochs was not validated")
        self._end_epoch_of(trainer, pl_module, stage, epoch)
        return bool(self._judge.enough)

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._best.keep(trainer, pl_module)
        if self.run is not None:
            for player in players(trainer):
                player.on_weights_kept(trainer, pl_module, self.run.stage)

    def _conclude(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Goes back to the best of the stage, if that is not what the module is."""
        best, judge = self._best, self._judge
        if judge is None or judge.concluded or self.run is None:
            return
        went = best.kept is not None and judge.best is not None and best.put_back(trainer, pl_module, judge.best)
        judge.concluded = True  # not before: what is saved on the way goes on with going back
        if not went or best.kept is None:
            return
        what = "is the model that it started from, as the stage made none better"
        if best.kept.step != self.run.start_step:
            what = f"is that of optimizer step {best.kept.step}"
        rank_zero_info(
            f"stage {stage.name!r}: its best, {self.monitor}={judge.best:.5g}, {what}; weights go back to it"
        )
        for player in players(trainer):
            player.on_weights_restored(trainer, pl_module, stage)

    def on_stage_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Goes back to the best of a stage with `until` that was stopped inside."""
        self._conclude(trainer, pl_module, stage)
        self._best.kept = self._judge = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last checkpoint is of the weights that the fit leaves."""
        self._best.renew_checkpoints(trainer)

    def _find_monitor(self, trainer: pl.Trainer) -> None:
        """At the first validation that logs anything, the sanity check if it does: what `until` is judged by."""
        logged, name = sorted(trainer.callback_metrics), self._monitor.name
        # TTAEval logs its numbers in validations of the fit alone
        later = trainer.sanity_checking and (not logged or (name or "").endswith(("_tta", "_plain")))
        if later or (name is not None and self._best.value_step >= 0):  # logged before, and not this time
            return
        said = self._monitor.find(logged)
        if said:
            rank_zero_info(said)

    @property
    def monitor(self) -> str | None:
        """Name of the value that `until` is judged by; None as long as it is not known."""
        return self._monitor.name

    @property
    def mode(self) -> str:
        """Whether less or more of it is better."""
        return self._monitor.mode

    # --- ensemble --------------------------------------------------------------------------------------------------

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets `forward` average over the snapshots."""
        if self.ensemble:
            self._averaged = AveragedForward.of_files(pl_module, self.snapshots, trainer.strategy.root_device)
            self._averaged.install()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the averaging out again."""
        averaged, self._averaged = self._averaged, None
        if averaged is not None:
            averaged.end()

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Snapshots, values, and the best of a stage with `until`: all that is not a function of stage and step."""
        return {
            "snapshots": [str(path) for path in self.snapshots],
            "cycle_values": {name: list(values) for name, values in self.cycle_values.items()},
            "judge": None if self._judge is None else asdict(self._judge),
            "monitor": self._monitor.name,
            "mode": self._monitor.mode,
            "_epoch_step": self._epoch_step,
            "_cycle": self._cycle,
            **self._best.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.snapshots = [Path(path) for path in state_dict["snapshots"]]
        self.cycle_values = {name: list(values) for name, values in state_dict["cycle_values"].items()}
        judge = state_dict["judge"]
        self._judge = None if judge is None else Judge(**judge)
        if state_dict["monitor"] is not None:
            self._monitor.take(state_dict["monitor"], state_dict["mode"])
        self._best = BestSoFar.from_state_dict(state_dict)
        self._epoch_step, self._cycle = state_dict["_epoch_step"], state_dict["_cycle"]

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the module's `forward` and the Trainer's metrics as they were."""
        self._leave(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the module's `forward` and the Trainer's metrics as they were."""
        self._leave(trainer)

    def _leave(self, trainer: pl.Trainer) -> None:
        trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, _GoesBack)]  # type: ignore[attr-defined]
        unpin_callback_metrics(trainer)
        if self._averaged is not None:
            self._averaged.remove()
            self._averaged = None


class _GoesBack(Callback):
    """At the end of a stage's last validation, when all others have looked at it, and none has saved it yet."""

    def __init__(self, restarts: CosineRestarts) -> None:
        self.restarts = restarts

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.restarts.after_validation(trainer, pl_module)
