"""Where the files of a run go, and its bars: what needs to know the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_SAID: set[str] = set()


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


def shared_path(trainer: pl.Trainer, name: str) -> Path | None:
    """A path in the report folder, that of rank 0 on every rank: they may number the folders of their loggers apart.

    A collective call. None where the run keeps no files.
    """
    folder = report_dir(trainer)
    return None if folder is None else Path(trainer.strategy.broadcast(folder / name))


def is_due_to_log(trainer: pl.Trainer) -> bool:
    """Whether there are loggers, and the Trainer's own metrics would be logged at this step."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(trainer.loggers) and every > 0 and trainer.global_step % every == 0


def log_metrics(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    """Hands metrics of this step to the loggers. One that refuses them (a step that it has, say) ends no training."""
    _hand_to_loggers(trainer, metrics, lambda logger: logger.log_metrics(metrics, step=trainer.global_step))


def log_hyperparams(trainer: pl.Trainer, values: dict[str, Any]) -> None:
    """Hands hyperparameters to the loggers. One that refuses them (a second value of one, say) ends no training."""
    _hand_to_loggers(trainer, values, lambda logger: logger.log_hyperparams(values))


def _hand_to_loggers(trainer: pl.Trainer, names: Iterable[str], hand: Callable[[Any], None]) -> None:
    for logger in trainer.loggers:
        try:
            hand(logger)
        except Exception as refusal:
            # the type alone: the text may name the step, and be another one each time
            what = f"{type(logger).__name__} refused {', '.join(names)} ({type(refusal).__name__})"
            if what not in _SAID:
                _SAID.add(what)
                rank_zero_info(f"{what}; training goes on without")


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


def show_on_bar(trainer: pl.Trainer, name: str, text: Callable[[], str]) -> None:
    """Has the Trainer's own bar show `text()` under `name`, until `clear_bar`."""
    bar = trainer.progress_bar_callback
    if bar is None or "get_metrics" in vars(bar):
        return
    metrics_of = bar.get_metrics

    def with_text(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return {name: text(), **metrics_of(trainer, pl_module)}

    bar.get_metrics = with_text  # type: ignore[method-assign]


def clear_bar(trainer: pl.Trainer) -> None:
    """Undoes `show_on_bar`."""
    if trainer.progress_bar_callback is not None:
        vars(trainer.progress_bar_callback).pop("get_metrics", None)


@contextmanager
def progress_bar(trainer: pl.Trainer, text: str, total: int, unit: str = "step") -> Iterator[Callable[[int], Any]]:
    """A bar for work outside the Trainer's loop, shown where the Trainer shows its own; yields `advance(n)`."""
    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    with tqdm(total=total, desc=text, unit=unit, disable=not shown, leave=False) as bar:
        yield bar.update
