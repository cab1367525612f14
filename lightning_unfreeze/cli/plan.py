"""`plan`: what each stage trains, at which rates and at what cost."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_unfreeze.cli.parser import UnfreezeCLI
from lightning_unfreeze.recipe.costs import plan_costs
from lightning_unfreeze.reporting import show, table_of


def main(arguments: Sequence[str]) -> None:
    """Prints the table; trains nothing."""
    cli = UnfreezeCLI(arguments[1:], run=False)
    planned = plan_costs(cli.trainer, cli.model, cli.datamodule)
    show(table_of([stage.row() for stage in planned], title="plan (nothing was trained)"))
    epochs, minutes = sum(one.stage.num_epochs for one in planned), sum(one.seconds for one in planned) / 60
    tests = sum(one.range_test_seconds for one in planned) / 60
    more = f", and range tests of at most {tests:.2g} minutes" if tests else ""
    show(f"together {epochs} epochs, {minutes:.2g} minutes{more}; reading images and validation are not counted")
    for line in (line for stage in planned for line in stage.advice()):
        show(line)
