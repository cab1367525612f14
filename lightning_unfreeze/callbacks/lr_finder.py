"""`LRFinderPerStage`: a range test at the start of a stage, on the stage's own data and with its own group ratios."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from matplotlib.figure import Figure

from lightning_unfreeze.callbacks.base import StageCallback, goes_on, players
from lightning_unfreeze.inside_lightning.loaders import fresh_batches
from lightning_unfreeze.inside_lightning.sandbox import sandbox
from lightning_unfreeze.inside_lightning.steps import optimizer_step, steps_of_epoch
from lightning_unfreeze.layers.param_groups import peak_lr, set_lr, set_peak_lr
from lightning_unfreeze.reporting import log_metrics, progress_bar, report_dir, save_figure, write_csv
from lightning_unfreeze.stages.cycles import as_fraction
from lightning_unfreeze.stages.plan import Stage
from lightning_unfreeze.stages.range_test_rules import (
    Answer,
    SuggestionMethod,
    debiased_ema,
    diverged,
    exponential_ramp,
    read_curve,
)

_METHODS: tuple[SuggestionMethod, ...] = get_args(SuggestionMethod)
_SMOOTHING = 0.9  # of what the rules read: with more the curve lags behind its rate, and what they say is too low
_DIVERGENCE_SMOOTHING = 0.98
_CLEAR_RISE = 0.5  # nats of a cross entropy: the right class has lost 40 % of its probability
_CUT_LAST = 5  # points at the end, where the loss already diverges, that no rule reads (fastai's number)


@dataclass(frozen=True)
class RangeTest:
    """The curve of a range test, and what the rules read off it.

    Attributes:
        lrs: Rate of the param group with the highest peak, per step.
        losses: Mean loss over ranks and micro-batches, per step, as measured.
        method: The rule that sets the rate.
        steps: Optimizer steps of the stage, which a rate from below the rise depends on; None where not known.
        warmup_steps: Those of its first cycle in which the rate rises to its peak.
        head_alone: Whether nothing but the head trains. It has one minimum and gains nothing from what a high rate
            destroys, so its rate from below the rise depends on neither.
    """

    lrs: list[float]
    losses: list[float]
    method: SuggestionMethod
    steps: int | None = None
    warmup_steps: float = 0.0
    head_alone: bool = False

    @property
    def smoothed(self) -> list[float]:
        """Debiased moving average of the losses: what the rules read."""
        return list(map(float, debiased_ema(self.losses, _SMOOTHING)))

    @property
    def suggestion(self) -> float | None:
        """The rate by `method`; None where the curve neither falls nor rises."""
        return self.answer().rate

    def answer(self, method: SuggestionMethod | None = None) -> Answer:
        """The rate by a rule, and which end of the curve gave it.

        The rule reads the smoothed curve without its first tenth and its last five points; whether it falls, and where
        it starts to rise, is told from the losses as measured, whose noise is independent.
        """
        read = slice(len(self.lrs) // 10, max(0, len(self.lrs) - _CUT_LAST))
        return read_curve(
            self.lrs[read],
            self.smoothed[read],
            method or self.method,
            self.losses[read],
            steps=None if self.head_alone else self.steps,
            warmup_steps=0.0 if self.head_alone else self.warmup_steps,
            clear=_CLEAR_RISE,
        )

    def suggestions(self) -> dict[str, float | None]:
        """The rate by each rule; they agree where the curve does not fall."""
        return {method: self.answer(method).rate for method in _METHODS}

    def rows(self) -> list[dict[str, float]]:
        """The curve as a table."""
        columns = zip(self.lrs, self.losses, self.smoothed, strict=True)
        return [{"lr": lr, "loss": loss, "smoothed_loss": smoothed} for lr, loss, smoothed in columns]

    def plot(self) -> Figure:
        """Loss over rate (log x): measured, smoothed, and the suggestion of each rule."""
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axis = figure.subplots()
        axis.plot(self.lrs, self.losses, ".", color="0.75", markersize=4, label="loss per step")
        axis.plot(self.lrs, self.smoothed, color="black", linewidth=1.8, label="smoothed")
        axis.set_xscale("log")
        axis.set_ylim(*_visible_range(self.losses, self.smoothed))
        answer = self.answer()
        if answer.rise is not None:
            axis.axvline(
                answer.rise, color="0.5", linestyle="--", linewidth=1, label=f"rises from {answer.rise:.2g} on"
            )
        shown = self.suggestions() if answer.end == "fall" else {self.method: answer.rate}
        for index, (method, rate) in enumerate(shown.items()):
            used = method == self.method
            label = f"{method}: {'no signal' if rate is None else f'{rate:.2g}'}{' (chosen)' if used else ''}"
            if answer.end == "rise":
                label = f"below the rise: {rate:.2g} (chosen)"
            style: dict[str, Any] = {"color": f"C{index}", "label": label, "linewidth": 2.5 if used else 1.2}
            if rate is None:
                axis.plot([], [], ":", **style)
            else:
                axis.axvline(rate, linestyle="-" if used else ":", **style)
        axis.set_xlabel("learning rate (of the layer group with the highest)")
        axis.set_ylabel("training loss")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        return figure


class LRFinderPerStage(StageCallback):
    """Sets the peak rate of each stage that has `lr="find"` by a range test (Smith 2017, section 3.3).

    The test raises the rate from `min_lr` to `max_lr` over `num_steps` optimizer steps on the stage's own training data
    (stored features where the stage has them), with the stage's ratios between layer groups: one multiplier over all
    groups. It goes through the module's own `training_step` and the Trainer's precision, gradient clipping and
    accumulation, and takes the mean loss over ranks and micro-batches. It stops where the loss diverges or is no longer
    finite. Afterwards everything is bitwise as before (see `sandbox`), so a run with a test whose result is not applied
    equals one without it. Results are kept in checkpoints; a resumed run does not search again.

    Sole writer of a stage's peak rate (`param_group["peak_lr"]`) where the stage has `lr="find"`. Without stages it
    tests once, at the start of the fit.

    Args:
        min_lr: First rate.
        max_lr: Last rate.
        num_steps: Optimizer steps of the test; the loader is started again where it is shorter.
        method: Rule that reads the curve, see `stages.range_test_rules.suggest_lr`. `"auto"`: `valley` in the first
            stage of a plan, whose head is new, and `below_rise` in those that go on from trained weights; how far below
            depends on the length of the stage, and on whether its cycles warm up.
        apply: Set the rate; False only shows the curve.
        on_no_signal: What to do with a curve that neither falls nor rises. `"ladder"`: the rate of the last stage that
            had one, a tenth of it where that stage trained the head alone and this one more; without such a stage as
            `"keep"`: the rate the stage would have had. `"error"`: stop.

    Attributes:
        results: The range test of each stage, by its name (`"fit"` without stages); `results[name].plot()`.

    Raises:
        ValueError: For a range, a number of steps or a choice that is impossible.
    """

    order: ClassVar[int] = 20
    writes_rates: ClassVar[bool] = True

    def __init__(
        self,
        min_lr: float = 1e-6,
        max_lr: float = 1.0,
        num_steps: int = 100,
        method: SuggestionMethod | Literal["auto"] = "auto",
        apply: bool = True,
        on_no_signal: Literal["ladder", "keep", "error"] = "ladder",
    ) -> None:
        if not 0 < min_lr < max_lr < float("inf"):
            raise ValueError(f"min_lr={min_lr}, max_lr={max_lr}: has to be 0 < min_lr < max_lr, both finite")
        if num_steps < 20:
            raise ValueError(f"num_steps={num_steps} is too few to read a curve from; give 20 or more (default 100)")
        if method not in ("auto", *_METHODS):
            raise ValueError(f"method={method!r} is not one of {['auto', *_METHODS]}")
        if on_no_signal not in ("ladder", "keep", "error"):
            raise ValueError(f"on_no_signal={on_no_signal!r} is not 'ladder', 'keep' or 'error'")
        self.min_lr, self.max_lr, self.num_steps = min_lr, max_lr, num_steps
        self.method: SuggestionMethod | Literal["auto"] = method
        self.apply = apply
        self.on_no_signal = on_no_signal
        self.results: dict[str, RangeTest] = {}
        self._ladder: list[tuple[float, bool]] = []  # rate of each stage that had one, and whether the head alone

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets the results of a fit that this one does not go on with; those of a checkpoint are loaded after it."""
        if stage == "fit" and not goes_on(trainer):
            self.results, self._ladder = {}, []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses what a range test cannot drive."""
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"a range test needs automatic optimization with one optimizer, this has {len(trainer.optimizers)} and "
                f"automatic_optimization={pl_module.automatic_optimization}; take LRFinderPerStage out"
            )
        if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
            raise MisconfigurationException(
                "a range test cannot drive LBFGS, which has its own line search; use another optimizer, e.g. AdamW"
            )

    def on_stage_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Runs the range test, unless the stage has a rate, as one that a checkpoint was written in."""
        if self.run is None or (self.run.resumed and trainer.ckpt_path):
            return
        head_alone = stage.train == "head"
        if self.run.planned and stage.lr != "find":
            if stage.lr is not None:
                self._ladder.append((float(stage.lr), head_alone))
            return
        # kept results are those of a checkpoint that was written after the test and before the first step, or of the
        # fit that this Trainer goes on with
        if self.run.restaged or stage.name not in self.results:
            self.results[stage.name] = self.range_test(trainer, pl_module, stage.name)
            if trainer.is_global_zero:
                self._show(trainer, stage.name)
        result = self.results[stage.name]
        answer = result.answer()
        if answer.rate is not None:
            self._ladder.append((answer.rate, head_alone))
            if self.apply:
                self._set(trainer, answer.rate)
                where = result.method if answer.end == "fall" else f"below the rise from {answer.rise:.3g} on"
                rank_zero_info(f"stage {stage.name!r}: learning rate {answer.rate:.3g} by range test ({where})")
            return
        message = (
            f"stage {stage.name!r}: no signal in the range test (the loss neither falls nor rises from "
            f"{result.lrs[0]:.2g} to {result.lrs[-1]:.2g})"
        )
        if self.on_no_signal == "error":
            raise MisconfigurationException(f"{message}; look at its curve, or give the stage an lr")
        if self.on_no_signal == "ladder" and self._ladder and self.apply:
            last, of_head = self._ladder[-1]
            rate = last / 10 if of_head and not head_alone else last
            self._set(trainer, rate)
            rank_zero_warn(
                f"{message}; it takes {rate:.3g}, {'a tenth of ' if rate < last else ''}the last stage's rate"
            )
        else:
            rank_zero_warn(f"{message}; look at its curve, or give the stage an lr; the rates stay as they are")

    def _set(self, trainer: pl.Trainer, rate: float) -> None:
        optimizer = trainer.optimizers[0]
        for group, ratio in zip(optimizer.param_groups, _peak_ratios(optimizer), strict=True):
            set_peak_lr(group, rate * ratio)

    def range_test(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> RangeTest:
        """The curve from the present weights, on the present training data; leaves no trace. A collective call.

        Args:
            trainer: In `fit`, before or between two optimizer steps.
            pl_module: Its module.
            name: What the progress bar calls it.

        Raises:
            MisconfigurationException: Where the training data gives no batch, or `training_step` no loss.
        """
        optimizer = trainer.optimizers[0]
        ratios = _peak_ratios(optimizer)
        lrs: list[float] = []
        losses: list[float] = []
        around_steps = [player.around_step for player in players(trainer)]  # the sandbox takes the callbacks away

        def around(batch: Any) -> ExitStack:
            with ExitStack() as stack:
                for around_step in around_steps:
                    stack.enter_context(around_step(trainer, pl_module, batch))
                return stack.pop_all()

        with (
            progress_bar(trainer, f"range test of stage {name!r}", self.num_steps) as advance,
            fresh_batches(trainer) as batches,
            sandbox(trainer, pl_module),
        ):
            for rate in exponential_ramp(self.min_lr, self.max_lr, self.num_steps).tolist():
                for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                    set_lr(group, rate * ratio)
                loss = optimizer_step(trainer, pl_module, batches, around)
                advance(1)
                if loss is None:
                    continue
                lrs.append(rate)
                # one value, so one decision, on all ranks
                losses.append(float(trainer.strategy.reduce(loss, reduce_op="mean")))
                # the first tenth averages few losses; a lucky low one there is not what later ones are measured by
                if not np.isfinite(losses[-1]) or diverged(
                    debiased_ema(losses, _DIVERGENCE_SMOOTHING)[self.num_steps // 10 :]
                ):
                    break
        if not losses:
            raise MisconfigurationException(f"stage {name!r}: `training_step` returned no loss, so there is no curve")
        method = self.method
        if method == "auto":
            method = "valley" if self.run is None or self.run.index == 0 else "below_rise"
        steps, warmup_steps = self._steps_to_come(trainer), self._warmup_steps(trainer)
        head_alone = self.run is not None and self.run.stage.train == "head"
        return RangeTest(lrs, losses, method, steps, warmup_steps, head_alone)

    def _steps_to_come(self, trainer: pl.Trainer) -> int | None:
        steps = steps_of_epoch(trainer)
        if steps is None or self.run is None:
            return None
        if self.run.planned:
            return steps * self.run.stage.num_epochs
        total = trainer.estimated_stepping_batches
        return None if np.isinf(total) else int(total)

    def _warmup_steps(self, trainer: pl.Trainer) -> float:
        steps = steps_of_epoch(trainer)
        if steps is None or self.run is None or not self.run.stage.cycle_epochs:
            return 0.0
        share = as_fraction(max(player.warmup_share for player in [self, *players(trainer)]))
        return float(share * steps * self.run.stage.cycle_epochs[0])

    def _show(self, trainer: pl.Trainer, name: str) -> None:
        result = self.results[name]
        if result.suggestion is not None:
            log_metrics(trainer, {f"lr_find/{name}": result.suggestion})
        save_figure(trainer, result.plot(), f"lr_find_{name}")
        folder = report_dir(trainer)
        if folder is not None:
            write_csv(folder / f"lr_find_{name}.csv", result.rows())

    def state_dict(self) -> dict[str, Any]:
        """The curves so far, and the rates of the stages."""
        return {"results": {name: asdict(result) for name, result in self.results.items()}, "ladder": self._ladder}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the curves, so that a resumed run does not search again."""
        self.results = {name: RangeTest(**result) for name, result in state_dict["results"].items()}
        self._ladder = [(rate, of_head) for rate, of_head in state_dict.get("ladder", [])]


def _peak_ratios(optimizer: torch.optim.Optimizer) -> list[float]:
    """Peak of each param group over the highest; 0 for a frozen group."""
    peaks = [peak_lr(group) for group in optimizer.param_groups]
    highest = max(peaks)
    return [peak / highest if highest > 0 else 1.0 for peak in peaks]


def _visible_range(losses: list[float], smoothed: list[float]) -> tuple[float, float]:
    """Limits of the loss axis: the whole smoothed curve before it diverges, and most of the measured points."""
    points = np.array([*losses, *smoothed])
    low, high = np.percentile(points[np.isfinite(points)], [1, 90]) if np.isfinite(points).any() else (0.0, 1.0)
    early = [value for value in smoothed[: len(smoothed) // 2] if np.isfinite(value)]
    low, high = min([low, *early]), max([high, *early])
    margin = 0.1 * (high - low) or 1e-6
    return low - margin, high + margin
