"""Where files go, tables, and the picture of a run."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from rich.console import Console

from lightning_unfreeze.reporting import plot_stages, report_dir, save_figure, table_of, write_csv


def trainer_with(checkpoints: Any = None, loggers: Any = (), fast_dev_run: bool = False) -> Any:
    callback = None if checkpoints is None else ModelCheckpoint(checkpoints)
    log_dir = getattr(loggers[0], "log_dir", None) if checkpoints is None and loggers else None
    return SimpleNamespace(
        checkpoint_callback=callback,
        logger=loggers[0] if loggers else None,
        loggers=list(loggers),
        log_dir=log_dir,
        fast_dev_run=fast_dev_run,
        global_step=3,
    )


def test_report_dir__is_beside_the_checkpoints_else_with_the_logs_else_nowhere(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs", name="run", version=0)
    assert report_dir(trainer_with(tmp_path / "ckpt", [logger])) == tmp_path / "ckpt"
    assert report_dir(trainer_with(None, [logger])) == tmp_path / "logs" / "run" / "version_0"
    assert report_dir(trainer_with()) is None
    assert report_dir(trainer_with(tmp_path / "ckpt", [logger], fast_dev_run=True)) is None


def test_write_csv__writes_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    write_csv(path, [{"a": 1, "b": "x,y"}, {"a": 2.5, "b": ""}])
    with path.open() as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "x,y"}, {"a": "2.5", "b": ""}]
    before = path.read_text()
    with pytest.raises(ValueError):
        write_csv(path, [{"a": 1, "b": 2}, {"a": 1, "c": 2}])
    assert path.read_text() == before


def test_table_of__shows_four_significant_digits() -> None:
    table = table_of(
        [{"stage": "head", "epochs": 12, "best": 0.123456}, {"stage": "f", "epochs": 3, "best": 1e-7}], "t"
    )
    stream = io.StringIO()
    Console(file=stream, width=80).print(table)
    text = stream.getvalue()
    for part in ("stage", "epochs", "best", "head", "12", "0.1235", "1e-07"):
        assert part in text
    assert "0.12345" not in text


@pytest.mark.pictures
def test_save_figure__goes_to_the_folder_and_to_a_logger_that_takes_figures(tmp_path: Path) -> None:
    figures = []
    logger = object.__new__(TensorBoardLogger)  # its constructor wants tensorboard to be installed
    logger._experiment = SimpleNamespace(add_figure=lambda *args, **options: figures.append((args, options)))
    figure = Figure()
    path = save_figure(trainer_with(tmp_path / "ckpt", [logger]), figure, "rates")
    assert path == tmp_path / "ckpt" / "rates.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert figures == [(("rates", figure), {"global_step": 3, "close": False})]
    assert save_figure(trainer_with(), figure, "rates") is None


def test_plot_stages__has_a_line_per_group_and_a_band_per_stage() -> None:
    rates = [
        (1, {"head": 0.1}),
        (2, {"head": 0.2}),
        (3, {"stem": 0.001, "head": 0.01}),
        (4, {"stem": 0.002, "head": 0.02}),
    ]
    figure = plot_stages([("first", 0, 2), ("second", 2, 4)], rates, [(2, 0.5), (4, 0.75)], "val_acc")
    top, bottom = figure.axes
    lines = {line.get_label(): line for line in top.get_lines()}
    assert list(lines) == ["stem", "head"]  # input first, as in the last stage
    assert lines["head"].get_xdata().tolist() == [1, 2, 3, 4]
    assert lines["head"].get_ydata().tolist() == [0.1, 0.2, 0.01, 0.02]
    stem = lines["stem"].get_ydata().tolist()
    assert [value != value for value in stem] == [True, True, False, False]  # a gap where it is frozen
    assert top.get_yscale() == "log"
    assert [text.get_text() for text in top.texts] == ["first", "second"]
    # of polygons and of rectangles, as matplotlib before 3.9 and from then on draws bands
    bands = [p.get_patch_transform().transform_path(p.get_path()).get_extents() for p in bottom.patches]
    assert [(band.x0, band.x1) for band in bands] == [(0, 2), (2, 4)]
    assert bottom.get_lines()[0].get_ydata().tolist() == [0.5, 0.75]
    assert (bottom.get_xlabel(), bottom.get_ylabel()) == ("optimizer step", "val_acc")


def test_plot_stages__leaves_out_rates_of_zero_which_a_log_axis_cannot_hold() -> None:
    figure = plot_stages([("solved", 0, 2), ("full", 2, 3)], [(1, {"head": 0.0}), (3, {"head": 0.1})], [], "val_acc")
    assert [value != value for value in figure.axes[0].get_lines()[0].get_ydata()] == [True, False]


@pytest.mark.pictures
@pytest.mark.parametrize("num_groups", [0, 1, 25])
def test_plot_stages__draws_any_number_of_groups(num_groups: int, tmp_path: Path) -> None:
    rates = [(1, {f"g{index}": 0.1 for index in range(num_groups)})] if num_groups else []
    figure = plot_stages([("only", 0, 1)], rates, [], "val_acc")
    assert len(figure.axes[0].get_lines()) == num_groups
    assert len({str(line.get_color()) for line in figure.axes[0].get_lines()}) == num_groups
    figure.savefig(tmp_path / "x.png")
