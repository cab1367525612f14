"""`export`: a checkpoint as ONNX or torch.export file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_unfreeze.cli.checkpoints import load_classifier
from lightning_unfreeze.module.export import Deployed, export
from lightning_unfreeze.module.tasks import MultiLabel
from lightning_unfreeze.reporting import show


def main(arguments: Sequence[str]) -> None:
    """Writes the file beside the checkpoint, or to `--output`.

    Raises:
        ValueError: For an option that there is not, or without a checkpoint.
    """
    parser = argparse.ArgumentParser(
        "lightning-unfreeze export",
        description="Writes a checkpoint as a file that runs without this package, and compares their probabilities.",
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt_path", metavar="FILE", help="a checkpoint of a fit")
    parser.add_argument("--format", metavar="{onnx,pt2}", default="onnx", help="onnx (the default) or torch.export")
    parser.add_argument("--output", metavar="FILE", help="default: beside the checkpoint")
    options, rest = parser.parse_known_args(list(arguments[1:]))
    if options.ckpt_path is None or rest or options.format not in ("onnx", "pt2"):
        raise ValueError(
            f"export {' '.join(arguments[1:])}: give --ckpt_path FILE, a checkpoint of a fit, and if you like "
            "--format onnx|pt2 and --output FILE."
        )
    classifier = load_classifier(options.ckpt_path)
    config = classifier.data_config
    several = isinstance(classifier.task, MultiLabel)
    path = Path(options.output or Path(options.ckpt_path).with_suffix(f".{options.format}"))
    facts: dict[str, Any] = {
        "class_names": classifier.class_names or [str(number) for number in range(classifier.task.size)],
        "task": classifier.task.name,
        "input": "images (N, channels, H, W) in [0, 1], not normalised",
        **{name: config[name] for name in ("input_size", "interpolation", "crop_pct") if name in config},
    }
    deployed = Deployed(classifier.model, config["mean"], config["std"], several)
    difference = export(deployed, path, options.format, config["input_size"], facts)
    show(f"{path}: probabilities equal to the checkpoint's within {difference:.1e}")
