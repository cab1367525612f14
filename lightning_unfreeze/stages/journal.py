"""What happened in the stages of a run: the table, the rates and the validation metric, kept across a resume."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_unfreeze.layers.param_groups import trained_rates
from lightning_unfreeze.reporting import (
    checkpoint_rows,
    is_due_to_log,
    log_metrics,
    plot_stages,
    report_dir,
    row,
    save_figure,
    show,
    table_of,
    write_csv,
)
from lightning_unfreeze.stages.until import direction, of_validation

_CURVE_POINTS_PER_EPOCH = 50
_PREFERRED = ("acc", "f1", "auc", "loss")


class StageJournal:
    """Rows, rates and metric of the stages so far; only the conductor writes in it."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._rates: list[tuple[int, dict[str, float]]] = []
        self._metric: list[tuple[int, float]] = []
        self.start_clock()

    def start_clock(self) -> None:
        """Seconds of the next stage count from here; what another process did is not known."""
        self._clock = time.monotonic()

    def note_rates(self, trainer: pl.Trainer, stage_index: int, batch_idx: int) -> None:
        """Keeps the rates of what trains for the picture, and logs them with the stage as often as the Trainer logs."""
        step = trainer.global_step
        every = max(1, int(min(trainer.num_training_batches, 1e6)) // _CURVE_POINTS_PER_EPOCH)
        to_log = is_due_to_log(trainer)
        if batch_idx % every and not to_log:
            return
        rates = trained_rates(trainer.optimizers[0].param_groups)
        if batch_idx % every == 0:
            self._rates.append((step, rates))
        if to_log:
            metrics = {"stage": float(stage_index), **{f"lr/{name}": rate for name, rate in rates.items()}}
            log_metrics(trainer, metrics)

    def note_metric(self, trainer: pl.Trainer) -> None:
        """Keeps the validation metric."""
        name = metric_name(trainer)
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fitting and name in trainer.callback_metrics:
            self._metric.append((trainer.global_step, float(trainer.callback_metrics[name])))

    def close_stage(self, trainer: pl.Trainer, name: str, epochs: int, first_step: int) -> None:
        """Adds the row of a stage that has ended."""
        metric = metric_name(trainer)
        values = [value for step, value in self._metric if first_step < step <= trainer.global_step]
        lower_is_better = _lower_is_better(trainer, metric)
        self._rows.append(
            {
                "stage": name,
                "epochs": epochs,
                "seconds": round(time.monotonic() - self._clock, 3),
                "best": (min if lower_is_better else max)(values) if values else float("nan"),
                "first_step": first_step,
                "last_step": trainer.global_step,
            }
        )
        self.start_clock()

    def write(self, trainer: pl.Trainer) -> None:
        """Prints the table, and writes `stages.csv` and `stages.png` beside the checkpoints, on rank 0."""
        if not trainer.is_global_zero or not self._rows or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        metric = metric_name(trainer)
        rows = [
            {"stage": row["stage"], "epochs": row["epochs"], "seconds": row["seconds"], f"best_{metric}": row["best"]}
            for row in self._rows
        ]
        if trainer.progress_bar_callback is not None:
            show(table_of(rows, title="stages"))
        folder = report_dir(trainer)
        if folder is None:
            return
        write_csv(folder / "stages.csv", rows)
        bands = [(row["stage"], row["first_step"], row["last_step"]) for row in self._rows]
        save_figure(trainer, plot_stages(bands, self._rates, self._metric, metric), "stages")
        rank_zero_info(f"stages.csv and stages.png: {folder}")

    def write_summary(self, trainer: pl.Trainer, rows: list[dict[str, Any]]) -> None:
        """Prints which file holds which weights, and what they score: of `ModelCheckpoint`, and the rows given."""
        if not trainer.is_global_zero or trainer.fast_dev_run or trainer.progress_bar_callback is None:  # type: ignore[attr-defined]
            return
        if not (self._rows or trainer.global_step):  # a look at the plan alone
            return
        fresh, name = self._metric and self._metric[-1][0] == trainer.global_step, metric_name(trainer)
        # what callbacks read: after a stage that went back to its best it is of those weights, not of the last step's
        now = trainer.callback_metrics.get(name)
        scores = f"{name} = {float(now):.4g}" if fresh and now is not None else ""
        own = row(f"as trained, {trainer.global_step} steps", "in memory", scores)
        trained = [] if any(each["file"].startswith(own["file"]) for each in rows) else [own]
        show(table_of([*trained, *checkpoint_rows(trainer), *rows], title="weights"))

    def state_dict(self) -> dict[str, Any]:
        """All of it, in primitives."""
        return {"rows": self._rows, "rates": self._rates, "metric": self._metric}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self._rows, self._rates, self._metric = list(state["rows"]), list(state["rates"]), list(state["metric"])


def metric_name(trainer: pl.Trainer) -> str:
    """The validation metric to follow: what a checkpoint, a stage's end or the module watches, else what is logged.

    Of what is logged an accuracy comes before a loss, and both before the rest; names with a slash are as good as any.
    """
    logged = list(trainer.callback_metrics)
    watched = [name for name, _ in _watched(trainer)]
    known = next((name for name in watched if name in logged), None)
    best = min(of_validation(logged), key=_preference, default=None)
    return known or best or next(iter(watched), "val_acc")


def _watched(trainer: pl.Trainer) -> list[tuple[str, str | None]]:
    """(monitor, mode) of all that have one, the first `ModelCheckpoint` first, the module last."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    owners = [trainer.checkpoint_callback, *callbacks, trainer.lightning_module]
    found = [(getattr(owner, "monitor", None), getattr(owner, "mode", None)) for owner in owners]
    return [(monitor, mode) for monitor, mode in found if isinstance(monitor, str)]


def _preference(name: str) -> int:
    return next((place for place, part in enumerate(_PREFERRED) if part in name.lower()), len(_PREFERRED))


def _lower_is_better(trainer: pl.Trainer, metric: str) -> bool:
    modes = [mode for monitor, mode in _watched(trainer) if monitor == metric and mode in ("min", "max")]
    return modes[0] == "min" if modes else direction(metric) == "min"
