"""From the path of a checkpoint to a classifier, or to the config of the run that wrote it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch

from lightning_unfreeze.module import TransferClassifier


def load_classifier(path: str | Path) -> TransferClassifier:
    """The trained classifier of a checkpoint, on the CPU, in eval mode.

    Raises:
        ValueError: For a file that is no checkpoint of a `TransferClassifier`.
    """
    if not Path(path).is_file():
        raise ValueError(f"ckpt_path={str(path)!r}: no such file; give a checkpoint of a fit.")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    options = checkpoint.get("hyper_parameters", {})
    module, _, name = options.get("_class_path", "lightning_unfreeze.TransferClassifier").rpartition(".")
    kind = getattr(import_module(module), name)
    if not issubclass(kind, TransferClassifier) or "backbone" not in options:
        raise ValueError(f"ckpt_path={str(path)!r} is of {module}.{name}: give one of a TransferClassifier.")
    classifier: TransferClassifier = kind.load_from_checkpoint(path, map_location="cpu")
    return classifier.eval()


def config_beside(path: str | Path) -> Path | None:
    """The `config.yaml` that a fit from the command line left beside its checkpoints, or a folder above."""
    return next((folder / "config.yaml" for folder in Path(path).parents if (folder / "config.yaml").is_file()), None)
