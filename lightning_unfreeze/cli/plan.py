"""`plan`: what each stage trains, at which rates and at what cost."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_unfreeze.cli.options import take_stage_options
from lightning_unfreeze.cli.parser import UnfreezeCLI
from lightning_unfreeze.preview.costs import plan_rows
from lightning_unfreeze.reporting import show, table_of


def main(arguments: Sequence[str]) -> None:
    """Prints the table; trains nothing."""
    left = list(arguments[1:])
    stage_options = take_stage_options(left)
    cli = UnfreezeCLI(left, run=False, stage_options=stage_options)
    rows = plan_rows(cli.trainer, cli.model, cli.datamodule)
    show(table_of(rows, title="plan (nothing was trained)"))
    epochs, minutes = (sum(row[name] for row in rows) for name in ("epochs", "minutes"))
    show(f"together {epochs} epochs, {minutes:.2g} minutes; range tests and validation are not counted")
