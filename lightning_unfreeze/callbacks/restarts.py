"""`CosineRestarts`: the learning rate of every optimizer step, restarts, snapshots, and "until over-fitting"."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_unfreeze.callbacks.base import StageCallback
from lightning_unfreeze.reporting import report_dir
from lightning_unfreeze.schedules import (
    cosine_restarts,
    cycle_at,
    cycling_momentum,
    first_steps_warmup,
    one_cycle,
    slanted_triangle,
)
from lightning_unfreeze.stages import MAX_STAGE_EPOCHS, Stage, as_fraction


class CosineRestarts(StageCallback):
    """Writes `lr = peak_lr * multiplier(step)` before each optimizer step; a pure function of stage and step.

    Sole writer of the `lr` of the param groups during a stage. The peak of a group (`param_group["peak_lr"]`) comes from
    the stage's `lr` and `lr_mult`, from the range test, or, without stages, from the optimizer. A stage without
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
        monitor: Logged value that judges over-fitting.
        mode: Whether less or more of it is better; `"auto"` takes less for a name with "loss" or "error" in it.
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
        if min_delta < 0:
            raise ValueError(f"min_delta={min_delta} has to be 0 or more")
        if momentum is not None and not 0 <= momentum[0] <= momentum[1] < 1:
            raise ValueError(f"momentum={momentum} has to be (low, high) with 0 <= low <= high < 1")
        if ensemble and not snapshots:
            raise ValueError("ensemble=True averages over snapshots; set snapshots=True too")
        cosine_restarts(0, cycle_len or 1, cycle_mult, floor=floor, decay=decay, warmup=warmup)  # refuses what it cannot
        self.shape = shape
        self.cycle_len, self.cycle_mult = cycle_len, cycle_mult
        self.floor, self.decay, self.warmup, self.first_steps_warmup = floor, decay, warmup, first_steps_warmup
        self.momentum = momentum
        self.save_snapshots, self.ensemble = snapshots, ensemble
        self.monitor, self.min_delta = monitor, min_delta
        self.mode = mode if mode != "auto" else "min" if "loss" in monitor or "error" in monitor else "max"
        self.snapshots: list[Path] = []
        self.cycle_values: dict[str, list[float]] = {}
        self._best_weights: dict[str, Tensor] | None = None
        self._steps_per_epoch = 0
        self._last_step = -1
        self._forward_calls = 0

    # --- before training -------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses a second writer of the rates, and snapshots without a folder."""
        others = [type(c).__name__ for c in trainer.callbacks if c is not self and isinstance(c, CosineRestarts)]  # type: ignore[attr-defined]
        if others:
            raise MisconfigurationException("two CosineRestarts would both write the learning rates; keep one")
        if stage == "fit" and self.save_snapshots and report_dir(trainer) is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "CosineRestarts(snapshots=True) saves beside the checkpoints, and this Trainer has neither checkpoints "
                "nor a logger; set enable_checkpointing=True or snapshots=False"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a scheduler of the module, by name."""
        schedulers = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
        if schedulers:
            raise MisconfigurationException(
                f"`configure_optimizers` returned the scheduler {schedulers[0]}, and CosineRestarts writes the learning "
                "rates: two writers of one quantity; return the optimizer alone, or take CosineRestarts out"
            )

    def on_stage_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Counts the steps of an epoch, and writes the rates of the first step."""
        batches = trainer.num_training_batches
        if batches == float("inf"):
            raise MisconfigurationException(
                "the training data has no length, so cycles cannot be counted in epochs; set "
                "Trainer(limit_train_batches=...) to the number of batches of an epoch"
            )
        self._steps_per_epoch = -(-int(batches) // trainer.accumulate_grad_batches)
        self._last_step = trainer.global_step
        if stage.until and trainer.check_val_every_n_epoch != 1:
            raise MisconfigurationException(
                f"stage {stage.name!r}: until='overfit' needs a validation in every epoch, the Trainer has "
                f"check_val_every_n_epoch={trainer.check_val_every_n_epoch}"
            )
        if self.run is not None and not self.run.resumed:
            self.cycle_values.pop(stage.name, None)
            self._best_weights = None
        self._write(trainer)

    # --- the schedule ----------------------------------------------------------------------------------------------

    def _cycles(self) -> tuple[Fraction, Fraction, int] | None:
        """First cycle in optimizer steps, `cycle_mult`, number of cycles; None where the stage has no cycles."""
        if self.run is None:
            return None
        stage = self.run.stage
        if self.run.planned:
            if stage.cycle_len is None:
                return None
            return as_fraction(stage.cycle_len) * self._steps_per_epoch, as_fraction(stage.cycle_mult), stage.num_cycles
        length = stage.num_epochs if self.cycle_len is None else as_fraction(self.cycle_len)
        return Fraction(length) * self._steps_per_epoch, as_fraction(self.cycle_mult), MAX_STAGE_EPOCHS

    def cycle(self, step: int) -> tuple[int, float, float] | None:
        """The cycle of optimizer step `step` of the stage: index, first step, length in steps; None without cycles."""
        cycles = self._cycles()
        if cycles is None or self.run is None:
            return None
        length, mult, count = cycles
        index, start, span = cycle_at(step, length, mult)
        if self.run.planned and index >= count - 1:
            total_steps = self.run.stage.num_epochs * self._steps_per_epoch
            start = float(sum((length * mult**i for i in range(count - 1)), Fraction(0)))
            index, span = count - 1, total_steps - start
        return index, start, span

    def multiplier(self, step: int) -> float:
        """Multiplier of the peak rate at optimizer step `step` of the present stage, both from 0."""
        cycle = self.cycle(step)
        if cycle is None:
            return 1.0
        index, start, length = cycle
        t = float(step) - start
        if self.shape == "slanted_triangle":
            value = slanted_triangle(t, length)
        elif self.shape == "one_cycle":
            value = one_cycle(t, length)
        else:
            value = cosine_restarts(min(t, length * (1 - 1e-12)), length, floor=self.floor, warmup=self.warmup)
        if self.first_steps_warmup and index == 0:
            value = first_steps_warmup(t, value, length)
        return float(value * self.decay**index)

    def _write(self, trainer: pl.Trainer) -> None:
        if self.run is None:
            return
        step = trainer.global_step - self.run.start_step
        multiplier = self.multiplier(step)
        momentum = None if self.momentum is None else float(cycling_momentum(multiplier, *self.momentum))
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                # a group that was added late has its own rate as its peak
                rate = group.setdefault("peak_lr", float(group["lr"])) * multiplier
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
                if momentum is not None and "betas" in group:
                    group["betas"] = (momentum, *group["betas"][1:])
                elif momentum is not None and "momentum" in group:
                    group["momentum"] = momentum

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Writes the rates of the step that this batch belongs to."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._write(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves a snapshot after the last step of a cycle; writes the next rates, for callbacks that log them."""
        if self.run is None or trainer.global_step == self._last_step:  # inside an accumulation window
            return
        self._last_step = trainer.global_step
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log_progress(trainer)
        if self.save_snapshots and self._ends_cycle(trainer):
            self._save_snapshot(trainer)
        self._write(trainer)

    def _ends_cycle(self, trainer: pl.Trainer) -> bool:
        """Whether the optimizer step that was made last is the last one of its cycle."""
        if self.run is None:
            return False
        done = trainer.global_step - self.run.start_step
        now, before = self.cycle(done), self.cycle(done - 1) if done else None
        if now is None or before is None:
            return False
        return now[0] != before[0] or done >= before[1] + before[2]

    def _log_progress(self, trainer: pl.Trainer) -> None:
        cycle = self.cycle(trainer.global_step - 1 - self.run.start_step) if self.run else None
        if cycle is None or self.run is None:
            return
        index, start, length = cycle
        progress = (trainer.global_step - self.run.start_step - start) / length
        for logger in trainer.loggers:
            logger.log_metrics({"cycle": float(index), "cycle_progress": progress}, step=trainer.global_step)

    def _save_snapshot(self, trainer: pl.Trainer) -> None:
        folder = report_dir(trainer)
        if folder is None or self.run is None:
            return
        cycle = self.cycle(trainer.global_step - self.run.start_step - 1)
        path = folder / "snapshots" / f"{self.run.stage.name}-cycle{cycle[0] + 1 if cycle else 1}.ckpt"
        trainer.save_checkpoint(path, weights_only=True)
        if path not in self.snapshots:
            self.snapshots.append(path)

    # --- until over-fitting ----------------------------------------------------------------------------------------

    def wants_to_end_stage(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> bool:
        """At a cycle end: keeps the best weights, and says whether the last full cycle brought no improvement."""
        if stage.until is None or not self._ends_cycle(trainer):
            return False
        values = self.cycle_values.setdefault(stage.name, [])
        value = self._monitored(trainer, stage)
        best_before = (min if self.mode == "min" else max)(values) if values else None
        values.append(value)
        if best_before is None or self._gain(best_before, value) > 0:
            self._best_weights = {name: tensor.detach().cpu().clone() for name, tensor in pl_module.state_dict().items()}
        if best_before is None:
            return False
        ends = not self._gain(best_before, value) > self.min_delta
        if ends:
            rank_zero_info(
                f"stage {stage.name!r}: {self.monitor}={value:.5g} after cycle {len(values)} is no improvement over "
                f"{best_before:.5g} (min_delta={self.min_delta:g}); the stage ends, the best cycle end is restored"
            )
        return ends

    def _gain(self, before: float, now: float) -> float:
        return before - now if self.mode == "min" else now - before

    def _monitored(self, trainer: pl.Trainer, stage: Stage) -> float:
        logged = trainer.callback_metrics
        if self.monitor not in logged:
            raise MisconfigurationException(
                f"stage {stage.name!r}: until='overfit' looks at {self.monitor!r}, which was not logged; logged are "
                f"{sorted(logged)}; name one of them: CosineRestarts(monitor=...)"
            )
        # one value, so one decision, on all ranks, also where the module logs without `sync_dist`
        value = logged[self.monitor].detach().float().to(trainer.strategy.root_device)
        return float(trainer.strategy.reduce(value, reduce_op="mean"))

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
        """Snapshots, the values at the cycle ends so far, and the best weights of a stage with `until`."""
        return {
            "snapshots": [str(path) for path in self.snapshots],
            "cycle_values": {name: list(values) for name, values in self.cycle_values.items()},
            "best_weights": self._best_weights,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.snapshots = [Path(path) for path in state_dict["snapshots"]]
        self.cycle_values = {name: list(values) for name, values in state_dict["cycle_values"].items()}
        self._best_weights = state_dict["best_weights"]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the module's `forward` as it was, also after an error."""
        super().teardown(trainer, pl_module, stage)
        if self.ensemble and stage == "test":
            vars(pl_module).pop("forward", None)

