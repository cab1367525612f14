"""What a run leaves to look at: where its files go, tables, pictures, and what it says when it ends."""

from lightning_unfreeze.reporting.closing import checkpoint_rows as checkpoint_rows
from lightning_unfreeze.reporting.closing import how_to_go_on as how_to_go_on
from lightning_unfreeze.reporting.closing import row as row
from lightning_unfreeze.reporting.run_files import clear_bar as clear_bar
from lightning_unfreeze.reporting.run_files import is_due_to_log as is_due_to_log
from lightning_unfreeze.reporting.run_files import log_hyperparams as log_hyperparams
from lightning_unfreeze.reporting.run_files import log_metrics as log_metrics
from lightning_unfreeze.reporting.run_files import progress_bar as progress_bar
from lightning_unfreeze.reporting.run_files import report_dir as report_dir
from lightning_unfreeze.reporting.run_files import save_figure as save_figure
from lightning_unfreeze.reporting.run_files import shared_path as shared_path
from lightning_unfreeze.reporting.run_files import show_on_bar as show_on_bar
from lightning_unfreeze.reporting.stages import plot_stages as plot_stages
from lightning_unfreeze.reporting.tables import show as show
from lightning_unfreeze.reporting.tables import table_of as table_of
from lightning_unfreeze.reporting.tables import write_csv as write_csv
from lightning_unfreeze.reporting.tables import write_whole as write_whole
