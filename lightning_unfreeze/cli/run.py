"""`fit`, `validate`, `test` and `predict`: LightningCLI's own commands."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_unfreeze.cli.options import take_flag, take_photos
from lightning_unfreeze.cli.parser import UnfreezeCLI


def main(arguments: Sequence[str]) -> None:
    """Runs the command."""
    left = list(arguments)
    all_probabilities = left[0] == "predict" and take_flag(left, "--all_probabilities")
    photos = take_photos(left) if left[0] == "predict" else []
    if photos:
        from lightning_unfreeze.cli.photos import predict_photos

        predict_photos(left[1:], photos, all_probabilities)
        return
    UnfreezeCLI(left, all_probabilities=all_probabilities)
