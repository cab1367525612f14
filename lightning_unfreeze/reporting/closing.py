"""What a run says when it ends: which file holds which weights, and how to go on."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

_AT_ONCE = "ModelCheckpoint(save_on_exception=True) writes one at Ctrl-C"


def checkpoint_rows(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """One row per file that the Trainer's `ModelCheckpoint`s point to: what it is, where, and what it scores."""
    rows: list[dict[str, Any]] = []
    for saver in _savers(trainer):
        if saver.best_model_path and saver.monitor:
            score = float("nan") if saver.best_model_score is None else float(saver.best_model_score)
            rows.append(row(f"best {saver.monitor}", saver.best_model_path, f"{saver.monitor} = {score:.4g}"))
        elif saver.best_model_path:
            rows.append(row("newest checkpoint", saver.best_model_path))
        if saver.last_model_path:
            rows.append(row("last checkpoint", saver.last_model_path))
    return [each for each in rows if Path(each["file"]).exists()]


def row(weights: str, file: str | Path, scores: str = "") -> dict[str, Any]:
    """A line of the closing summary.

    >>> row("best val_acc", "best.ckpt", "val_acc = 0.91")
    {'weights': 'best val_acc', 'file': 'best.ckpt', 'scores': 'val_acc = 0.91'}
    """
    return {"weights": weights, "file": str(file), "scores": scores}


def how_to_go_on(trainer: pl.Trainer) -> str:
    """What to type to go on from the newest checkpoint of an interrupted fit."""
    whole = [saver for saver in _savers(trainer) if not saver.save_weights_only]
    files = [file for saver in whole for file in (saver.last_model_path, *saver.best_k_models, saver.best_model_path)]
    written = [file for file in files if file and os.path.exists(file)]
    later = any(saver.save_on_exception for saver in whole)
    if not written and not later:
        return f"no checkpoint was written to go on from; ModelCheckpoint() writes one per epoch, {_AT_ONCE}"
    newest = max(written, key=os.path.getmtime) if written else "the checkpoint that is saved now"
    note = " (or the newer one that is saved now)" if written and later else ""
    if not later:  # one with a monitor writes its best alone, `last.ckpt` included, and that may be long ago
        note = f" (written {time.time() - os.path.getmtime(newest):.0f} s ago; {_AT_ONCE})"
    if _from_the_command_line(trainer):
        return f"go on: {_command(newest)}{note}"
    return f"go on: trainer.fit(..., ckpt_path={newest!r}){note}"


def _savers(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]  # type: ignore[attr-defined]


def _from_the_command_line(trainer: pl.Trainer) -> bool:
    # by name: the class itself would import jsonargparse
    kinds = {kind.__name__ for callback in trainer.callbacks for kind in type(callback).__mro__}  # type: ignore[attr-defined]
    return "SaveConfigCallback" in kinds


def _command(checkpoint: str) -> str:
    program, arguments = sys.argv[0], list(sys.argv[1:])
    for index, argument in reversed(list(enumerate(arguments))):
        if argument == "--ckpt_path":
            del arguments[index : index + 2]
        elif argument.startswith("--ckpt_path="):
            del arguments[index]
    name = Path(program).name
    start = ["python", "-m", Path(program).parent.name] if name == "__main__.py" else [name]
    start = ["python", program] if name.endswith(".py") and name != "__main__.py" else start
    return shlex.join([*start, *arguments, "--ckpt_path", checkpoint])
