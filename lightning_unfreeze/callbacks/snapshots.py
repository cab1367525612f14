"""`BestWeights`: weights along the path of the last stage, their averages, and the best of them as a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_unfreeze.callbacks.base import StageCallback, plan_to_tell, players
from lightning_unfreeze.inside_lightning.metrics import (
    mean_over_ranks,
    pin_callback_metrics,
    unpin_callback_metrics,
    validate_aside,
)
from lightning_unfreeze.inside_lightning.weights import average_of, save_weights, set_tensors, tensors_of
from lightning_unfreeze.reporting import report_dir, row, shared_path, show, table_of, write_csv
from lightning_unfreeze.stages.plan import Stage
from lightning_unfreeze.stages.soups import greedy_soup, mix
from lightning_unfreeze.stages.until import Mode, direction, find_monitor, gain

_SHARES = (0.25, 0.5, 0.75)
_LEFT = "as the fit left them"


class BestWeights(StageCallback):
    """At the end of a fit: which weights along its path are the best in validation, and a file of them.

    The candidates are those that the fit leaves; the cycle ends of the last stage and what it started from; the mean of
    the cycle ends and the greedy soup of them (Wortsman et al. 2022, "Model soups", section 2); points on the line
    between what the stage started from and what it ended with, or its last cycle end where it went back to its start
    (Wortsman et al. 2022, "Robust fine-tuning", section 3); and the average of Lightning's `WeightAveraging`, where
    there is one. Each is validated once, by the module's own `validation_step`. BatchNorm statistics are averaged like
    weights.

    The best, never worse in validation than what the fit left, are written to `best.ckpt` beside the checkpoints
    (`best-v1.ckpt` and so on, where there is such a file), the scores to `weights.csv`. They are chosen on the
    validation set, so their value there flatters them a little.

    Args:
        monitor: Value logged in validation that is compared. None takes the module's own attribute `monitor` where it
            has one, else the validation loss.
        mode: Whether less or more of it is better; `"auto"` tells by its name.
        restore: Whether the module gets the best, and with it `Trainer.callback_metrics` and what `TTAEval` says of the
            end of the fit. False keeps the weights that the fit left.

    Raises:
        ValueError: For a monitor whose name does not tell, with `mode="auto"`.
    """

    order: ClassVar[int] = 60

    def __init__(
        self, monitor: str | None = None, mode: Literal["auto", "min", "max"] = "auto", restore: bool = False
    ) -> None:
        if mode not in ("auto", "min", "max"):
            raise ValueError(f"mode={mode!r} is not 'auto', 'min' or 'max'")
        if monitor is not None and mode == "auto" and direction(monitor) is None:
            raise ValueError(f"monitor={monitor!r}: its name does not tell which is better; set mode='min' or 'max'")
        self.restore = restore
        self.monitor, self.mode = monitor, mode
        self.scores: dict[str, float] = {}
        self.best_path: Path | None = None
        self._best = _LEFT
        self._logged: dict[str, float] = {}  # what validation logged of it
        self._points: dict[str, dict[str, Tensor]] = {}
        self._files: dict[str, str] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets an earlier fit."""
        if stage == "fit":
            self.scores, self.best_path, self._points, self._files = {}, None, {}, {}
            self._best, self._logged = _LEFT, {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads the weights along the path again where the fit goes on; what is gone is left out, and said."""
        gone = [file for file in self._files.values() if not Path(file).is_file()]
        if gone:
            rank_zero_warn(f"BestWeights goes on without {', '.join(gone)}, which are no longer there")
        self._files = {name: file for name, file in self._files.items() if file not in gone}
        self._points = {name: torch.load(file, weights_only=True) for name, file in self._files.items()}

    def on_stage_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Keeps what the last stage starts from."""
        if self.run is not None and not self.run.later and not self.run.resumed:
            self._points, self._files = {}, {}
            self._keep(trainer, pl_module, "start")

    def on_cycle_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage, cycle: int, name: str
    ) -> None:
        """Keeps the cycle ends of the last stage."""
        if self.run is not None and not self.run.later:
            self._keep(trainer, pl_module, f"cycle {cycle}")

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> None:
        """In memory, and for a resumed run in a file, where the run keeps files; a checkpoint names it."""
        if self.run is not None and self.run.stage.precompute:
            return
        self._points[name] = tensors_of(pl_module)
        path = shared_path(trainer, f"path/{name.replace(' ', '')}.pt")
        if path is None:
            return
        self._files[name] = str(path)
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self._points[name], path)
        trainer.strategy.barrier("path")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Scores the candidates, writes the table and the best; gives the module one of them."""
        if not trainer.enable_validation or trainer.fast_dev_run or not self._points:  # type: ignore[attr-defined]
            return
        chosen = left = tensors_of(pl_module)
        try:
            candidates = self._compare(trainer, pl_module, left)
            if candidates:
                self._write(trainer, pl_module, candidates[self._best])
                chosen = candidates[self._best] if self.restore else left
        finally:
            set_tensors(pl_module, chosen)
            self._forget_files(trainer)
        if not self.restore or not self.scores:
            return
        if chosen is not left:
            pin_callback_metrics(trainer, self._logged)
        for player in players(trainer):
            player.on_weights_chosen(trainer, pl_module, are_new=chosen is not left)

    def _compare(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, left: dict[str, Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        """All candidates, `self._best` the best of them; none where nothing is logged to compare them by."""
        candidates: dict[str, dict[str, Tensor]] = {}

        def score(name: str, tensors: dict[str, Tensor]) -> float:
            alike = next((other for other, known in candidates.items() if _same(tensors, known)), None)
            if alike is None:
                found, logged = self._score(trainer, pl_module, tensors)
                if not candidates or gain(self.scores[self._best], found, self._direction) > 0:
                    self._best, self._logged = name, logged
            candidates[name], self.scores[name] = tensors, self.scores[alike] if alike is not None else found
            return self.scores[name]

        if math.isnan(score(_LEFT, left)):
            self.scores = {}
            rank_zero_warn(
                f"BestWeights compares nothing: validation did not log {self.monitor or 'a validation loss'!r}; name "
                "one that it logs: BestWeights(monitor=...)"
            )
            return {}
        ends = {name: tensors for name, tensors in self._points.items() if name != "start"}
        for name, tensors in self._points.items():
            score(name, tensors)
        if len(ends) > 1:
            score("mean of the cycle ends", mix(list(ends.values())))
            ranked = sorted(ends, key=lambda name: gain(0.0, self.scores[name], self._direction), reverse=True)
            chosen = greedy_soup(
                [ends[name] for name in ranked],
                lambda tensors: gain(0.0, self._score(trainer, pl_module, tensors)[0], self._direction),
            )
            if 1 < len(chosen) < len(ends):
                score(f"greedy soup of {len(chosen)}", mix([ends[ranked[place]] for place in chosen]))
        start = self._points.get("start")
        far = list(ends.values())[-1] if start is not None and ends and _same(start, left) else left
        for share in _SHARES if start is not None else ():
            score(f"{share:.0%} of the way", mix([start, far], [1 - share, share]))  # type: ignore[list-item]
        average = average_of(trainer)
        if average is not None:
            score("moving average", tensors_of(average))
        return candidates

    @property
    def _direction(self) -> Mode:
        return self.mode if self.mode != "auto" else direction(self.monitor or "loss") or "min"

    def _score(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, tensors: Mapping[str, Tensor]
    ) -> tuple[float, dict[str, float]]:
        """The monitored value, NaN without one, and all that was logged."""
        set_tensors(pl_module, tensors)
        logged = validate_aside(trainer)
        if self.monitor is None:
            own = getattr(pl_module, "monitor", None)
            self.monitor = own if isinstance(own, str) and own in logged else find_monitor(logged)
        return mean_over_ranks(trainer, logged.get(self.monitor or "", math.nan)), logged

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, tensors: Mapping[str, Tensor]) -> None:
        rows = [{"weights": name, str(self.monitor): value} for name, value in self.scores.items()]
        if trainer.is_global_zero and trainer.progress_bar_callback is not None:
            show(table_of(rows, title="weights along the path, in validation"))
        told = f"best in validation: {self._best}, {self.monitor}={self.scores[self._best]:.5g}"
        folder = report_dir(trainer)
        if folder is None:
            rank_zero_info(told)
            return
        if trainer.is_global_zero:
            write_csv(folder / "weights.csv", rows)
        path, version = folder / "best.ckpt", 0
        while path.exists():
            version += 1
            path = folder / f"best-v{version}.ckpt"
        self.best_path = Path(trainer.strategy.broadcast(path))
        set_tensors(pl_module, tensors)
        save_weights(trainer, self.best_path, stages=plan_to_tell(trainer))
        rank_zero_info(f"{told}, in {self.best_path}")

    def closing_rows(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[dict[str, Any]]:
        """The best, for the summary that closes the fit."""
        if not self.scores:
            return []
        in_memory = ["in memory"] if self.restore and self._best != _LEFT else []
        places = [*in_memory, *([] if self.best_path is None else [str(self.best_path)])]
        score = f"{self.monitor} = {self.scores[self._best]:.4g}"
        return [row(f"best along the path: {self._best}", ", ".join(places), score)] if places else []

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The Trainer's metrics are its own again."""
        if stage == "fit":
            unpin_callback_metrics(trainer)

    def _forget_files(self, trainer: pl.Trainer) -> None:
        files, self._files, self._points = list(self._files.values()), {}, {}
        if not trainer.is_global_zero or not files:
            return
        for file in files:
            Path(file).unlink(missing_ok=True)
        folder = Path(files[0]).parent
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def state_dict(self) -> dict[str, Any]:
        """Where the weights along the path lie."""
        return {"files": dict(self._files)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Where they lie; a fit that goes on reads them, and a test of the checkpoint needs none."""
        self._files = dict(state_dict["files"])


def _same(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in some.items())
