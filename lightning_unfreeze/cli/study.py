"""`study`: which steps of the recipe pay on the user's data."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException


def main(arguments: Sequence[str]) -> None:
    """Runs `study plan|run|report|merge`."""
    try:
        from lightning_unfreeze.study.cli import run_command
    except ModuleNotFoundError as error:
        raise MisconfigurationException(
            f"the study needs {error.name}: python -m pip install 'lightning-unfreeze[study]' (in a clone: '.[study]')"
        ) from error
    run_command(list(arguments[1:]))
