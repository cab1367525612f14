"""`LRFinderPerStage`: a range test at the start of a stage, on the stage's own data and with its own group ratios."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unfreeze.callbacks.base import StageCallback, players
from lightning_unfreeze.reporting import progress_bar, report_dir, save_figure, write_csv
from lightning_unfreeze.sandbox import batch_on_device, sandbox, training_loss
from lightning_unfreeze.schedules import SuggestionMethod, debiased_ema, diverged, exponential_ramp, suggest_lr
from lightning_unfreeze.stages import Stage

_METHODS: tuple[str, ...] = get_args(SuggestionMethod)
_SMOOTHING = 0.98


@dataclass(frozen=True)
class RangeTest:
    """The curve of a range test, and what was read off it.

    Attributes:
        lrs: Rate of the group with the highest peak, per step.
        losses: Mean loss over ranks and micro-batches, per step, as measured.
        method: Rule that suggested the rate.
        suggestion: The rate, or None where the curve has no signal.
    """

    lrs: list[float]
    losses: list[float]
    method: str
    suggestion: float | None
    smoothed: list[float] = field(init=False, repr=False, compare=False, default_factory=list)

    def __post_init__(self) -> None:
        self.smoothed.extend(debiased_ema(self.losses, _SMOOTHING).tolist() if self.losses else [])

    def suggestions(self) -> dict[str, float | None]:
        """The rate by each rule; rules read the smoothed curve without its first tenth and its last five points."""
        first, last = len(self.lrs) // 10, len(self.lrs) - 5
        curve = self.lrs[first:last], self.smoothed[first:last]
        return {method: suggest_lr(*curve, method=method) for method in _METHODS}  # type: ignore[arg-type]

    def plot(self) -> Figure:
        """Loss over rate (log x): measured, smoothed, and the suggestion of each rule."""
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axis = figure.subplots()
        axis.plot(self.lrs, self.losses, color="0.8", linewidth=1, label="loss")
        axis.plot(self.lrs, self.smoothed, color="black", linewidth=1.8, label="smoothed")
        axis.set_xscale("log")
        finite = [value for value in self.smoothed if value == value and abs(value) != float("inf")]
        if finite:
            low, first = min(finite), finite[0]
            reach = max(first - low, 0.05 * abs(first), 1e-9)
            axis.set_ylim(low - 0.15 * reach, first + 0.6 * reach)
        for index, (method, rate) in enumerate(self.suggestions().items()):
            if rate is not None:
                chosen = method == self.method
                label = f"{method}: {rate:.2g}{' (used)' if chosen else ''}"
                style = "-" if chosen else ":"
                axis.axvline(rate, color=f"C{index}", linestyle=style, linewidth=2 if chosen else 1.2, label=label)
        axis.set_xlabel("learning rate of the last layer group")
        axis.set_ylabel("training loss")
        if self.suggestion is None:
            axis.set_title("no signal: no rule suggests a rate", fontsize=10)
        axis.legend(fontsize=8)
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
        method: Rule that reads the curve, see `schedules.suggest_lr`.
        apply: Set the rate; False only shows the curve.
        on_no_signal: What to do with a flat or rising curve: keep the rate the stage would have had, or an error.

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
        method: SuggestionMethod = "valley",
        apply: bool = True,
        on_no_signal: Literal["keep", "error"] = "keep",
    ) -> None:
        if not 0 < min_lr < max_lr < float("inf"):
            raise ValueError(f"min_lr={min_lr}, max_lr={max_lr}: has to be 0 < min_lr < max_lr")
        if num_steps < 20:
            raise ValueError(f"num_steps={num_steps} is too few to read a curve from; give 20 or more (default 100)")
        if method not in _METHODS:
            raise ValueError(f"method={method!r} is not one of {list(_METHODS)}")
        if on_no_signal not in ("keep", "error"):
            raise ValueError(f"on_no_signal={on_no_signal!r} is not 'keep' or 'error'")
        self.min_lr, self.max_lr, self.num_steps = min_lr, max_lr, num_steps
        self.method = method
        self.apply = apply
        self.on_no_signal = on_no_signal
        self.results: dict[str, RangeTest] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses what a range test cannot drive."""
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"a range test needs automatic optimization with one optimizer, the module has {len(trainer.optimizers)} "
                f"and automatic_optimization={pl_module.automatic_optimization}"
            )
        if isinstance(trainer.optimizers[0], torch.optim.LBFGS):
            raise MisconfigurationException("a range test cannot drive LBFGS, which has its own line search")

    def on_stage_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Runs the range test, unless the stage has a rate, or a checkpoint brought the result."""
        if self.run is None or (self.run.planned and stage.lr != "find") or self.run.resumed:
            return
        result = self.results.get(stage.name)
        if result is None:
            result = self._test(trainer, pl_module, stage)
            self.results[stage.name] = result
            self._save(trainer, stage.name, result)
        if result.suggestion is None:
            message = f"stage {stage.name!r}: the range test has no signal (flat or rising loss from {self.min_lr:g} to "
            message += f"{result.lrs[-1]:g}); look at its curve, or give the stage an lr"
            if self.on_no_signal == "error":
                raise MisconfigurationException(message)
            rank_zero_warn(f"{message}; the rates stay as they are")
        elif self.apply:
            self._set_peak(trainer, result.suggestion)
            rank_zero_info(f"stage {stage.name!r}: learning rate {result.suggestion:.3g} by range test ({self.method})")

    def _test(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> RangeTest:
        optimizer = trainer.optimizers[0]
        ratios = _peak_ratios(optimizer)
        rates = exponential_ramp(self.min_lr, self.max_lr, self.num_steps).tolist()
        losses: list[float] = []
        with (
            _fresh_batches(trainer) as batches,
            progress_bar(trainer, f"range test of stage {stage.name!r}", self.num_steps) as advance,
        ):
            around = players(trainer)
            with sandbox(trainer, pl_module):
                for rate in rates:
                    for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
                        _set_lr(group, rate * ratio)
                    loss = self._step(trainer, pl_module, optimizer, batches, around)
                    losses.append(float(trainer.strategy.reduce(loss, reduce_op="mean")))
                    advance(1)
                    # the point that diverged stays in the curve: the rules leave out the last ones
                    if diverged([losses[-1]]) or diverged(debiased_ema(losses, _SMOOTHING)):
                        break
        result = RangeTest(rates[: len(losses)], losses, self.method, None)
        return RangeTest(result.lrs, losses, self.method, result.suggestions()[self.method])

    def _step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
        batches: Iterator[Any],
        around: list[StageCallback],
    ) -> Tensor:
        """One optimizer step as the Trainer makes it; returns the mean loss over its micro-batches."""
        strategy, num_micro = trainer.strategy, trainer.accumulate_grad_batches
        losses: list[Tensor] = []

        def forward_backward() -> Tensor | None:
            index, batch = next(batches)
            with ExitStack() as stack:
                for player in around:
                    stack.enter_context(player.around_step(trainer, pl_module, batch))
                batch = batch_on_device(trainer, pl_module, batch)
                loss = training_loss(trainer, pl_module, batch, index)
                if loss is None:
                    return None
                losses.append(loss.detach().float())
                strategy.backward(loss / num_micro, optimizer)
                return loss

        optimizer.zero_grad()
        for _ in range(num_micro - 1):
            with strategy.block_backward_sync() if hasattr(strategy, "block_backward_sync") else ExitStack():
                forward_backward()
        strategy.optimizer_step(optimizer, forward_backward, pl_module)
        return torch.stack(losses).mean() if losses else torch.zeros((), device=strategy.root_device)

    def _set_peak(self, trainer: pl.Trainer, rate: float) -> None:
        optimizer = trainer.optimizers[0]
        for group, ratio in zip(optimizer.param_groups, _peak_ratios(optimizer), strict=True):
            group["peak_lr"] = rate * ratio
            _set_lr(group, rate * ratio)

    def _save(self, trainer: pl.Trainer, name: str, result: RangeTest) -> None:
        if not trainer.is_global_zero:
            return
        if result.suggestion is not None:
            for logger in trainer.loggers:
                logger.log_metrics({f"lr_find/{name}": result.suggestion}, step=trainer.global_step)
        save_figure(trainer, result.plot(), f"lr_find_{name}")
        folder = report_dir(trainer)
        if folder is not None:
            columns = zip(result.lrs, result.losses, result.smoothed, strict=True)
            rows = [{"lr": lr, "loss": loss, "smoothed_loss": smoothed} for lr, loss, smoothed in columns]
            write_csv(folder / f"lr_find_{name}.csv", rows)

    def state_dict(self) -> dict[str, Any]:
        """The curves so far."""
        return {
            "results": {
                name: {key: value for key, value in asdict(result).items() if key != "smoothed"}
                for name, result in self.results.items()
            }
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the curves, so that a resumed run does not search again."""
        self.results = {name: RangeTest(**result) for name, result in state_dict["results"].items()}


def _peak_ratios(optimizer: torch.optim.Optimizer) -> list[float]:
    """Peak of each param group over the highest; 0 for a frozen group."""
    peaks = [float(group.get("peak_lr", group["lr"])) for group in optimizer.param_groups]
    highest = max(peaks)
    return [peak / highest if highest > 0 else 1.0 for peak in peaks]


def _set_lr(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


class _fresh_batches(ExitStack):  # noqa: N801  (used as a context manager, like a function)
    """Numbered batches of the stage's training data without end, from an iterator of its own.

    The Trainer's loader, its iterator, its workers and the generators of its samplers stay as they are.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__()
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader):
            self._loader: Any = loader
            return
        self._loader = copy.copy(loader)
        # DataLoader refuses to change these by assignment; a copy must not reset the live iterator or its workers
        vars(self._loader).update(_iterator=None, persistent_workers=False)
        samplers = [loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
        for generator in {id(g): g for g in (getattr(s, "generator", None) for s in samplers) if g is not None}.values():
            self.callback(generator.set_state, generator.get_state())

    def __enter__(self) -> Iterator[tuple[int, Any]]:  # type: ignore[override]
        super().__enter__()
        return self._numbered()

    def _numbered(self) -> Iterator[tuple[int, Any]]:
        while True:
            empty = True
            for index, batch in enumerate(self._loader):
                empty = False
                yield index, batch
            if empty:
                raise MisconfigurationException("the training data gives no batch, so there is nothing to test on")
