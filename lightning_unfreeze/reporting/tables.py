"""Tables: as CSV, and on the console."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of one shape as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def write_whole(path: Path, text: str) -> None:
    """Writes a file in one go, so that a reader never sees half of it; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8", newline="")
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
