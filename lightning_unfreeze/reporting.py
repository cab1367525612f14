"""What a run leaves to look at: where its files go, the table of its stages, the picture of its rates."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm


def report_dir(trainer: pl.Trainer) -> Path | None:
    """Folder for tables and pictures: beside the checkpoints, else the logger's folder, else None (write nothing).

    Not a collective call: `Trainer.log_dir` broadcasts, and would wait for ever on rank 0 alone.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    checkpoints = getattr(trainer.checkpoint_callback, "dirpath", None)
    if checkpoints is not None:
        return Path(checkpoints)
    for logger in trainer.loggers:
        folder = getattr(logger, "log_dir", None) or logger.save_dir
        if folder is not None:
            return Path(folder)
    return None


def is_due_to_log(trainer: pl.Trainer) -> bool:
    """Whether there are loggers, and the Trainer's own metrics would be logged at this step."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(trainer.loggers) and every > 0 and trainer.global_step % every == 0


def save_figure(trainer: pl.Trainer, figure: Figure, name: str) -> Path | None:
    """Saves `figure` as `{name}.png` in the report folder and hands it to loggers that take figures.

    Call it on rank 0 only. Returns the file, or None where the run keeps no files.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, global_step=trainer.global_step, close=False)
    folder = report_dir(trainer)
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of one shape as CSV, in one go, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def table_of(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """A console table of rows of one shape; numbers to four significant digits."""
    table = Table(title=title, title_justify="left")
    for column, value in rows[0].items():
        table.add_column(column, justify="right" if isinstance(value, int | float) else "left")
    for row in rows:
        table.add_row(*[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()])
    return table


def show(what: Table | str) -> None:
    """Prints a table or a line on the console, wide enough for a table where there is no terminal to fit into."""
    # not `Console.is_terminal`: FORCE_COLOR, which notebooks set, makes that true of a pipe
    (Console() if sys.stdout.isatty() else Console(width=140, soft_wrap=True)).print(what)


def plot_stages(
    stages: Sequence[tuple[str, int, int]],
    rates: Sequence[tuple[int, Mapping[str, float]]],
    metric: Sequence[tuple[int, float]],
    metric_name: str,
) -> Figure:
    """Draws the learning rate of each layer group (log y) with a band per stage, and the validation metric below.

    Args:
        stages: Name, first step and last step of each stage.
        rates: Optimizer step and rate per layer group; groups that are frozen at a step are left out.
        metric: Optimizer step and value of the validation metric.
        metric_name: Label of the lower axis.
    """
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    names = sorted({name for _, values in rates for name in values}, key=_last_seen(rates))
    colours = [f"C{index}" for index in range(10)] if len(names) <= 10 else None
    for index, name in enumerate(names):
        points = [(step, values.get(name, float("nan"))) for step, values in rates]
        colour = colours[index] if colours else (0.1, 0.3 + 0.6 * index / len(names), 1 - index / len(names))
        top.plot(
            *zip(*points, strict=True), label=name, color=colour, linewidth=1.5, marker="." if len(points) < 3 else ""
        )
    if any(value > 0 for _, values in rates for value in values.values()):
        top.set_yscale("log")
    top.set_ylabel("learning rate")
    if names:
        top.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), title="layer group", title_fontsize=8)
    if metric:
        bottom.plot(*zip(*metric, strict=True), color="black", marker="o", markersize=4, linewidth=1)
    bottom.set_ylabel(metric_name)
    bottom.set_xlabel("optimizer step")
    # a character of the names is about a hundredth of the axis wide
    span = max(stages[-1][2] - stages[0][1], 1) if stages else 1
    upright = all(len(name) < 100 * (last - first) / span for name, first, last in stages)
    for index, (name, first, last) in enumerate(stages):
        for axis in (top, bottom):
            axis.axvspan(first, last, color="0.92" if index % 2 else "0.97", zorder=0)
        top.annotate(
            name,
            ((first + last) / 2, 1.01),
            xycoords=("data", "axes fraction"),
            ha="center" if upright else "left",
            va="bottom",
            fontsize=9,
            rotation=0 if upright else 20,
        )
    return figure


def _last_seen(rates: Sequence[tuple[int, Mapping[str, float]]]) -> Any:
    order: dict[str, int] = {}
    for _, values in reversed(rates):
        for position, name in enumerate(values):
            order.setdefault(name, position)
    return lambda name: order[name]


@contextmanager
def progress_bar(trainer: pl.Trainer, text: str, total: int, unit: str = "step") -> Iterator[Callable[[int], Any]]:
    """A bar for work outside the Trainer's loop, shown where the Trainer shows its own; yields `advance(n)`."""
    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    with tqdm(total=total, desc=text, unit=unit, disable=not shown, leave=False) as bar:
        yield bar.update
