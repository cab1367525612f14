"""`CosineRestarts`: the learning rate of every optimizer step, restarts, snapshots, and "until over-fitting"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_unfreeze.callbacks.base import StageCallback
from lightning_unfreeze.layers.param_groups import scale_lr
from lightning_unfreeze.reporting import is_due_to_log, report_dir
from lightning_unfreeze.stages.plan import Stage, as_fraction, cycles_sum
from lightning_unfreeze.stages.schedules import (
    cosine_restarts,
    cycle_at,
    cycling_momentum,
    first_steps_warmup,
    one_cycle,
    slanted_triangle,
)

_MORE_IS_BETTER, _LESS_IS_BETTER = ("acc", "f1", "auc", "auroc"), ("loss", "error")


class CosineRestarts(StageCallback):
    """Writes `lr = peak_lr * multiplier(step)` before each optimizer step; a pure function of stage and step.

    Sole writer of the `lr` of the param groups during a stage. The peak of a group (`param_group["peak_lr"]`) is that
    of the stage's `lr` and `lr_span`, of the range test, or, without stages, of the optimizer. A stage without
    `cycle_len` keeps its rates constant, as fast.ai's `fit` did. Cycles are counted in optimizer steps with fractions,
    so restarts are exact (SGDR, Loshchilov & Hutter 2017, section 3); every stage starts anew at its peak. The last
    cycle of a stage is stretched to the end of its epoch where the cycles end inside one.

    A stage with `until="overfit"` is judged at its cycle ends only, where rates are comparable: it ends when the
    monitored value did not improve by `min_delta` over the last full cycle (two cycles at least), and goes back to the
    weights of the best cycle end. The best weights are part of the checkpoint while such a stage runs.

    Args:
        shape: Of each cycle: `"cosine"`, ULMFiT's `"slanted_triangle"`, or `"one_cycle"` (a cosine rise and fall).
        cycle_len: Epochs of the first cycle, for a fit without stages; None makes the whole fit one cycle.
        cycle_mult: Length of a cycle over that of the one before, for a fit without stages.
        floor: Lowest rate as a share of the cycle's peak, in [0, 1].
        decay: Peak of a cycle over the peak of the one before, in (0, 1].
        warmup: Share of each cosine cycle that rises linearly to the peak, in [0, 1).
        first_steps_warmup: Hold the first twentieth of a stage's first cycle at a hundredth, as fastai 0.7 did.
        momentum: Cycle the momentum (or Adam's beta1) between these two values, low where the rate is high.
        snapshots: Save the weights at each cycle end, as `snapshots/{stage}-cycle{n}.ckpt` beside the checkpoints.
        ensemble: In `test`, average the class probabilities over the snapshots: `forward` of the module then returns
            the log of the mean probability.
        monitor: Value logged in validation that judges over-fitting.
        mode: Whether less or more of it is better; `"auto"` tells by "loss", "error", "acc", "f1" or "auc" in its name.
        min_delta: Least improvement over a cycle that counts.

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
        monitor: str = "val_loss",
        mode: Literal["auto", "min", "max"] = "auto",
        min_delta: float = 0.0,
    ) -> None:
        if shape not in ("cosine", "slanted_triangle", "one_cycle"):
            raise ValueError(f"shape={shape!r} is not 'cosine', 'slanted_triangle' or 'one_cycle'")
        if shape != "cosine" and (floor or warmup):
            raise ValueError(f"floor={floor} and warmup={warmup} shape cosine cycles; shape={shape!r} has its own")
        if mode not in ("auto", "min", "max"):
            raise ValueError(f"mode={mode!r} is not 'auto', 'min' or 'max'")
        known = any(part in monitor.lower() for part in (*_LESS_IS_BETTER, *_MORE_IS_BETTER))
        if mode == "auto" and not known:
            raise ValueError(
                f"monitor={monitor!r}: its name does not tell whether less is better; set mode='min' or 'max'"
            )
        if min_delta < 0:
            raise ValueError(f"min_delta={min_delta} has to be 0 or more")
        if momentum is not None and not 0 <= momentum[0] <= momentum[1] < 1:
            raise ValueError(f"momentum={momentum} has to be (low, high) with 0 <= low <= high < 1")
        if ensemble and not snapshots:
            raise ValueError("ensemble=True averages over snapshots; set snapshots=True too")
        first_len = 1.0 if cycle_len is None else cycle_len
        cosine_restarts(0.0, first_len, cycle_mult, floor=floor, decay=decay, warmup=warmup)  # refuses what it cannot
        self.shape = shape
        self.cycle_len, self.cycle_mult = cycle_len, cycle_mult
        self.floor, self.decay, self.warmup, self.first_steps_warmup = floor, decay, warmup, first_steps_warmup
        self.momentum = momentum
        self.save_snapshots, self.ensemble = snapshots, ensemble
        self.monitor, self.min_delta = monitor, min_delta
        falls = mode == "min" or (mode == "auto" and any(part in monitor.lower() for part in _LESS_IS_BETTER))
        self.mode: Literal["min", "max"] = "min" if falls else "max"
        self.snapshots: list[Path] = []
        self.cycle_values: dict[str, list[float]] = {}
        self._best_weights: dict[str, Tensor] | None = None
        self._value: float | None = None
        # of the present stage, in optimizer steps, exact: the first cycle (None: no cycles), the last one, the end
        self._first_len: Fraction | None = None
        self._mult = Fraction(1)
        self._last_start: tuple[int, Fraction] | None = None
        self._total_steps: float = math.inf
        self._last_step = -1
        self._factor: tuple[int, float] | None = None
        self._forward_calls = 0

    # --- before training -------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses a second writer of the rates; forgets an earlier fit (a checkpoint's state is loaded after this)."""
        if stage != "fit":
            return
        self.snapshots, self.cycle_values, self._best_weights, self._value = [], {}, None, None
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

    def preflight(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stages: Sequence[Stage]) -> None:
        """Refuses a scheduler of the module, by name, and what cannot be cycled or saved."""
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
        if self.momentum is not None and "betas" not in options and "momentum" not in options:
            raise MisconfigurationException(
                f"momentum={self.momentum}, but {type(trainer.optimizers[0]).__name__} has neither momentum nor betas"
            )
        if self.save_snapshots and report_dir(trainer) is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "CosineRestarts(snapshots=True) saves beside the checkpoints, and this Trainer has neither checkpoints "
                "nor a logger; set enable_checkpointing=True or snapshots=False"
            )

    def on_stage_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Lays out the cycles of the stage, and writes the rates of its first step."""
        if self.run is None:
            return
        self._last_step = trainer.global_step
        self._lay_out_cycles(trainer, stage)
        if stage.until is not None:
            _need_validation_at_epoch_end(trainer, stage)
        if not self.run.resumed:
            self._best_weights = self._value = None
            self.cycle_values.pop(stage.name, None)  # of the plan before, where the stage was restaged
        self._write(trainer)

    # --- the schedule ----------------------------------------------------------------------------------------------

    def _lay_out_cycles(self, trainer: pl.Trainer, stage: Stage) -> None:
        self._first_len, self._last_start, self._total_steps, self._factor = None, None, math.inf, None
        planned = self.run is not None and self.run.planned
        if planned and stage.cycle_len is None:
            return
        batches = trainer.num_training_batches
        if math.isinf(batches):
            raise MisconfigurationException(
                "the training data has no length, so cycles cannot be counted in epochs; set "
                "Trainer(limit_train_batches=...) to the number of batches of an epoch"
            )
        # Lightning also steps at the last batch of an epoch, where the accumulation window is not full
        epoch_steps = -(-int(batches) // trainer.accumulate_grad_batches)
        if planned:
            self._first_len, self._mult = as_fraction(stage.cycle_len or 1) * epoch_steps, as_fraction(stage.cycle_mult)
            before_last = cycles_sum(stage.cycle_len or 1, stage.cycle_mult, stage.num_cycles - 1)
            self._last_start = stage.num_cycles - 1, before_last * epoch_steps
            self._total_steps = stage.num_epochs * epoch_steps
            return
        self._total_steps = trainer.estimated_stepping_batches
        if self.cycle_len is None:
            if math.isinf(self._total_steps):
                raise MisconfigurationException(
                    "CosineRestarts() makes the whole fit one cycle, and this fit has no end; set "
                    "Trainer(max_epochs=...), or CosineRestarts(cycle_len=...)"
                )
            self._first_len, self._last_start = Fraction(int(self._total_steps)), (0, Fraction(0))
            return
        self._first_len, self._mult = as_fraction(self.cycle_len) * epoch_steps, as_fraction(self.cycle_mult)
        if not math.isinf(self._total_steps):
            self.cycle(int(self._total_steps))  # refuses cycles that shrink to nothing before the end of the fit

    def cycle(self, step: int) -> tuple[int, float, float] | None:
        """The cycle of optimizer step `step` of the stage: index, first step, length in steps; None without cycles."""
        if self._first_len is None:
            return None
        if self._last_start is not None and step >= self._last_start[1]:
            index, start = self._last_start
            return index, float(start), float(self._total_steps - start)
        return cycle_at(step, self._first_len, self._mult)

    def multiplier(self, step: int) -> float:
        """Multiplier of the peak rate at optimizer step `step` of the present stage, both from 0."""
        cycle = self.cycle(step)
        if cycle is None:
            return 1.0
        index, start, length = cycle
        t = step - start
        if self.shape == "slanted_triangle":
            value = slanted_triangle(t, length)
        elif self.shape == "one_cycle":
            value = one_cycle(t, length)
        else:
            # the end of the last cycle is no restart
            value = cosine_restarts(t, length, floor=self.floor, warmup=self.warmup) if t < length else self.floor
        if self.first_steps_warmup and index == 0:
            value = first_steps_warmup(t, value, length)
        return float(value * self.decay**index)

    def _write(self, trainer: pl.Trainer) -> None:
        if self.run is None:
            return
        step = trainer.global_step - self.run.start_step
        if self._factor is None or self._factor[0] != step:  # asked for at both ends of a batch
            self._factor = step, self.multiplier(step)
        multiplier = self._factor[1]
        momentum = None if self.momentum is None else cycling_momentum(multiplier, *self.momentum)
        for group in trainer.optimizers[0].param_groups:
            scale_lr(group, multiplier)
            if momentum is not None and "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            elif momentum is not None:
                group["momentum"] = momentum

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Writes the rates of the step that this batch belongs to."""
        self._write(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves a snapshot after the last step of a cycle; writes the next rates, for callbacks that log them."""
        if self.run is None or trainer.global_step == self._last_step:  # inside an accumulation window
            return
        self._last_step = trainer.global_step
        to_log = is_due_to_log(trainer)
        done = trainer.global_step - self.run.start_step
        cycle = self.cycle(done - 1) if to_log or self.save_snapshots else None
        if cycle is not None:
            index, start, length = cycle
            for logger in trainer.loggers if to_log else []:
                progress = {"cycle": float(index), "cycle_progress": (done - start) / length}
                logger.log_metrics(progress, step=trainer.global_step)
            if self.save_snapshots and self._ends_cycle(done):
                self._save_snapshot(trainer, f"{self.run.stage.name}-cycle{index + 1}.ckpt")
        self._write(trainer)

    def _ends_cycle(self, done: int) -> bool:
        """Whether the stage's optimizer step number `done` (from 1) is the last one of its cycle."""
        now, before = self.cycle(done), self.cycle(done - 1) if done else None
        return now is not None and before is not None and (now[0] != before[0] or done == self._total_steps)

    def _save_snapshot(self, trainer: pl.Trainer, name: str) -> None:
        folder = report_dir(trainer)
        if folder is None:
            return
        # rank 0's, since ranks may number the folders of their loggers differently
        path = Path(trainer.strategy.broadcast(folder / "snapshots" / name))
        trainer.save_checkpoint(path, weights_only=True)
        if path not in self.snapshots:
            self.snapshots.append(path)

    # --- until over-fitting ----------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the monitored value: a checkpoint of this validation is resumed without validating again."""
        if self.run is None or self.run.stage.until is None or trainer.sanity_checking:
            return
        value = self._logged_value(trainer, self.run.stage).detach().float().to(trainer.strategy.root_device)
        # one value, so one decision, on all ranks, also where the module logs without `sync_dist`
        self._value = float(trainer.strategy.reduce(value, reduce_op="mean"))

    def _logged_value(self, trainer: pl.Trainer, stage: Stage) -> Tensor:
        logged = trainer.callback_metrics
        if self.monitor not in logged:
            raise MisconfigurationException(
                f"stage {stage.name!r}: until='overfit' looks at {self.monitor!r}, which validation did not log; "
                f"logged are {sorted(logged)}; name one of them: CosineRestarts(monitor=...)"
            )
        return logged[self.monitor]

    def wants_to_end_stage(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> bool:
        """At a cycle end: keeps the best weights, and says whether the last full cycle brought no improvement."""
        if stage.until is None or self.run is None or not self._ends_cycle(trainer.global_step - self.run.start_step):
            return False
        value = float(self._logged_value(trainer, stage)) if self._value is None else self._value
        values = self.cycle_values.setdefault(stage.name, [])
        best_before = (min if self.mode == "min" else max)(values) if values else None
        values.append(value)
        if best_before is None or self._gain(best_before, value) > 0:
            self._best_weights = {
                name: tensor.detach().cpu().clone() for name, tensor in pl_module.state_dict().items()
            }
        if best_before is None or self._gain(best_before, value) > self.min_delta:
            return False
        rank_zero_info(
            f"stage {stage.name!r}: {self.monitor}={value:.5g} after cycle {len(values)} does not improve on "
            f"{best_before:.5g} by more than {self.min_delta:g}; the stage ends, the best cycle end is restored"
        )
        return True

    def _gain(self, before: float, now: float) -> float:
        return before - now if self.mode == "min" else now - before

    def on_stage_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Goes back to the best cycle end of a stage with `until`."""
        if self._best_weights is not None and stage.until is not None:
            pl_module.load_state_dict(self._best_weights)
        self._best_weights = None

    # --- ensemble --------------------------------------------------------------------------------------------------

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lets `forward` average over the snapshots."""
        if not self.ensemble:
            return
        missing = [str(path) for path in self.snapshots if not path.is_file()]
        if missing or not self.snapshots:
            raise MisconfigurationException(
                f"ensemble=True averages over snapshots, {'there are none' if not missing else f'missing: {missing}'}; "
                "fit with snapshots=True first, or test from a checkpoint of that run"
            )
        device = trainer.strategy.root_device
        states = [torch.load(path, map_location=device, weights_only=True)["state_dict"] for path in self.snapshots]
        self._forward_calls = 0

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            self._forward_calls += 1
            vars(pl_module).pop("forward")
            try:
                logits = [torch.func.functional_call(pl_module, state, args, kwargs) for state in states]
            finally:
                vars(pl_module)["forward"] = forward
            log_probs = torch.stack([torch.log_softmax(view.float(), dim=-1) for view in logits])
            return torch.logsumexp(log_probs, dim=0) - torch.log(torch.tensor(float(len(states)), device=device))

        vars(pl_module)["forward"] = forward

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the averaging out again."""
        if self.ensemble and vars(pl_module).pop("forward", None) and not self._forward_calls:
            raise MisconfigurationException(
                "ensemble=True averages what the module's `forward` returns, and test_step never called self(x)"
            )

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Snapshots; for a stage with `until` the values at the cycle ends, the best weights and the last value."""
        return {
            "snapshots": [str(path) for path in self.snapshots],
            "cycle_values": {name: list(values) for name, values in self.cycle_values.items()},
            "best_weights": self._best_weights,
            "value": self._value,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.snapshots = [Path(path) for path in state_dict["snapshots"]]
        self.cycle_values = {name: list(values) for name, values in state_dict["cycle_values"].items()}
        self._best_weights, self._value = state_dict["best_weights"], state_dict["value"]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the module's `forward` as it was, also after an error."""
        if self.ensemble and stage == "test":
            vars(pl_module).pop("forward", None)


def _need_validation_at_epoch_end(trainer: pl.Trainer, stage: Stage) -> None:
    every_epochs, every_batches = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if every_epochs != 1 or (every_batches and trainer.num_training_batches % every_batches):
        raise MisconfigurationException(
            f"stage {stage.name!r}: until='overfit' judges by a validation at the end of every epoch; the Trainer has "
            f"check_val_every_n_epoch={every_epochs} and validates every {every_batches} of "
            f"{trainer.num_training_batches} batches (val_check_interval)"
        )
