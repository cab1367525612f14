"""What happened in the stages of a run: the table, the rates and the validation metric, kept across a resume."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_unfreeze.layers.param_groups import trained_rates
from lightning_unfreeze.reporting import is_due_to_log, plot_stages, report_dir, save_figure, show, table_of, write_csv

_CURVE_POINTS_PER_EPOCH = 50


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
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)

    def note_metric(self, trainer: pl.Trainer) -> None:
        """Keeps the validation metric."""
        name = _metric_name(trainer)
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fitting and name in trainer.callback_metrics:
            self._metric.append((trainer.global_step, float(trainer.callback_metrics[name])))

    def close_stage(self, trainer: pl.Trainer, name: str, epochs: int, first_step: int) -> None:
        """Adds the row of a stage that has ended."""
        metric = _metric_name(trainer)
        values = [value for step, value in self._metric if first_step < step <= trainer.global_step]
        mode = getattr(trainer.checkpoint_callback, "mode", None) if metric == _monitored(trainer) else None
        lower_is_better = mode == "min" if mode else "loss" in metric
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
        metric = _metric_name(trainer)
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

    def state_dict(self) -> dict[str, Any]:
        """All of it, in primitives."""
        return {"rows": self._rows, "rates": self._rates, "metric": self._metric}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self._rows, self._rates, self._metric = list(state["rows"]), list(state["rates"]), list(state["metric"])


def _metric_name(trainer: pl.Trainer) -> str:
    logged = (name for name in ("val_acc", "val_loss") if name in trainer.callback_metrics)
    return _monitored(trainer) or next(logged, "val_acc")


def _monitored(trainer: pl.Trainer) -> str | None:
    return getattr(trainer.checkpoint_callback, "monitor", None)
