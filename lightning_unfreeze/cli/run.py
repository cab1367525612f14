"""`fit`, `validate`, `test` and `predict`: LightningCLI's own commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_unfreeze.cli.parser import UnfreezeCLI
from lightning_unfreeze.reporting import show, write_csv


def main(arguments: Sequence[str]) -> None:
    """Runs the command."""
    cli = UnfreezeCLI(arguments)
    if cli.subcommand == "predict":
        _write_predictions(cli)


def _write_predictions(cli: UnfreezeCLI) -> None:
    """Writes `predictions.csv`: file, class, probability, for each image of the folder."""
    batches, dataset = (
        cli.trainer.predict_loop.predictions,
        getattr(cli.datamodule.predict_dataloader(), "dataset", None),
    )
    files = getattr(dataset, "targets", None)
    if not files or not batches:
        return
    if cli.trainer.world_size > 1:
        raise MisconfigurationException(
            f"each of {cli.trainer.world_size} processes predicted a share of the images, and predictions.csv takes "
            "all in their order; predict with --trainer.devices 1"
        )
    probs = torch.cat([batch["probs"] if isinstance(batch, dict) else batch for batch in batches])
    names = getattr(cli.model, "class_names", None) or [str(index) for index in range(probs.shape[1])]
    best, classes = probs.max(dim=1)
    rows = [
        {"file": str(file), "class": names[label], "probability": round(prob, 6)}
        # the first ones, under `limit_predict_batches`
        for file, label, prob in zip(files[: len(probs)], classes.tolist(), best.tolist(), strict=True)
    ]
    path = Path(cli.trainer.log_dir or cli.trainer.default_root_dir) / "predictions.csv"
    write_csv(path, rows)
    show(f"{len(rows)} predictions: {path}")
