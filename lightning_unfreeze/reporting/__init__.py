"""What a run leaves to look at: where its files go, tables, and pictures."""

from lightning_unfreeze.reporting.run_files import is_due_to_log, progress_bar, report_dir, save_figure
from lightning_unfreeze.reporting.stages import plot_stages
from lightning_unfreeze.reporting.tables import show, table_of, write_csv

__all__ = [
    "is_due_to_log",
    "plot_stages",
    "progress_bar",
    "report_dir",
    "save_figure",
    "show",
    "table_of",
    "write_csv",
]
