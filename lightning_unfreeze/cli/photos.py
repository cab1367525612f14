"""`predict --ckpt_path FILE PHOTO...`: single photos or folders of them, without a config."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_unfreeze.cli.checkpoints import load_classifier
from lightning_unfreeze.reporting import show, table_of

_SHOWN_CLASSES = 3


def predict_photos(arguments: Sequence[str], photos: Sequence[Path], all_probabilities: bool) -> None:
    """Prints the most likely classes of each photo; one that cannot be read loses its own row alone.

    Raises:
        ValueError: Where there is nothing to predict, or an option that single photos do not have.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt_path")
    options, unknown = parser.parse_known_args(list(arguments))
    if options.ckpt_path is None:
        raise ValueError("photos on the command line need --ckpt_path FILE, a checkpoint of a fit.")
    if unknown:
        raise ValueError(
            f"{' '.join(unknown)}: photos on the command line need --ckpt_path alone, the checkpoint knows the rest; "
            "with a config give --data.predict_dir FOLDER."
        )
    classifier = load_classifier(options.ckpt_path)
    files = [file for photo in photos for file in (sorted(photo.rglob("*")) if photo.is_dir() else [photo])]
    rows, failed = [], 0
    for file in files:
        if file.is_dir():
            continue
        try:
            answers = classifier.predict_image(file)
        except OSError as error:
            sys.stderr.write(f"no prediction: {error}\n")
            failed += 1
            continue
        shown = list(answers.items())[: None if all_probabilities else _SHOWN_CLASSES]
        rows.append({"file": str(file), "most likely": ", ".join(f"{name} {prob:.1%}" for name, prob in shown)})
    if not rows:
        raise ValueError(f"none of {len(files)} files could be read.")
    counted = f"{len(rows)} photo{'s' * (len(rows) != 1)}"
    show(table_of(rows, title=counted + (f", {failed} not readable" if failed else "")))
