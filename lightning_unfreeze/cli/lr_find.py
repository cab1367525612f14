"""`lr-find`: the range tests alone, with tables and curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_unfreeze.cli.parser import UnfreezeCLI
from lightning_unfreeze.recipe.range_tests import range_tests
from lightning_unfreeze.reporting import show, table_of, write_csv


def main(arguments: Sequence[str]) -> None:
    """Writes the curves and prints what each rule suggests; trains nothing."""
    cli = UnfreezeCLI(arguments[1:], run=False)
    results = range_tests(cli.trainer, cli.model, cli.datamodule)
    folder = Path(cli.trainer.default_root_dir) / "lr_find"
    for name, result in results.items():
        write_csv(folder / f"{name}.csv", result.rows())
        result.plot().savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
    rows = [
        {"stage": name, **{rule: rate or "no signal" for rule, rate in result.suggestions().items()}}
        for name, result in results.items()
    ]
    show(table_of(rows, title="learning rates by each rule (nothing was trained)"))
    show(f"curves: {folder}; each stage was tested on the weights as given, earlier stages had not trained them")
