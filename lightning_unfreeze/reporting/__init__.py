"""What a run leaves to look at: where its files go, tables, pictures, and what it says when it ends."""

from lightning_unfreeze.reporting.closing import checkpoint_rows, how_to_go_on, row
from lightning_unfreeze.reporting.run_files import (
    clear_bar,
    is_due_to_log,
    log_hyperparams,
    log_metrics,
    progress_bar,
    report_dir,
    save_figure,
    shared_path,
    show_on_bar,
)
from lightning_unfreeze.reporting.stages import plot_stages
from lightning_unfreeze.reporting.tables import show, table_of, write_csv, write_whole

__all__ = [
    "checkpoint_rows",
    "clear_bar",
    "how_to_go_on",
    "is_due_to_log",
    "log_hyperparams",
    "log_metrics",
    "plot_stages",
    "progress_bar",
    "report_dir",
    "row",
    "save_figure",
    "shared_path",
    "show",
    "show_on_bar",
    "table_of",
    "write_csv",
    "write_whole",
]
