"""`PredictionsCSV`: what `Trainer.predict` found, as a table that a person can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_unfreeze.data.sample_names import are_names, class_names_of, sample_names
from lightning_unfreeze.inside_lightning.distributed import gather_objects
from lightning_unfreeze.reporting import write_csv

_NAME_KEYS = ("path", "file", "filename", "file_name", "image_path", "name")


class PredictionsCSV(BasePredictionWriter):
    """Writes `predictions.csv` after `Trainer.predict`: file, class and probability of each sample.

    Works with any module and data. The module's `predict_step` gives probabilities or logits `(N, C)`, or class indices
    `(N,)`; beside `TTAEval` the merged probabilities count. `file` is what comes with the batch (a list of paths as its
    second item, or under `"path"` or the like), else the dataset's own path, else the place in the dataset. For several
    labels per image `class` holds all labels from the module's threshold on, separated by semicolons. Under several
    processes rank 0 writes the rows of all.

    Args:
        path: The file; None for `predictions.csv` in the logger's folder.
        all_probabilities: A column `prob_NAME` for each class.

    >>> PredictionsCSV(all_probabilities=True).all_probabilities
    True
    """

    def __init__(self, path: str | None = None, all_probabilities: bool = False) -> None:
        super().__init__("batch")
        self.path, self.all_probabilities = path, all_probabilities
        self.written: Path | None = None
        self._rows: list[dict[str, Any]] = []
        self._refused: str | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets what an earlier run found."""
        self._rows, self._refused, self.written = [], None, None

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keeps the rows of a batch."""
        answers = prediction["probs"] if isinstance(prediction, Mapping) and "probs" in prediction else prediction
        if not isinstance(answers, Tensor) or answers.ndim not in (1, 2) or not answers.numel():
            shape = tuple(answers.shape) if isinstance(answers, Tensor) else type(answers).__name__
            self._refused = f"predict_step gives {shape}"
            return
        answers = answers.detach().cpu()
        spread = prediction.get("spread") if isinstance(prediction, Mapping) else None
        first = sum(row["loader"] == dataloader_idx for row in self._rows)
        indices = batch_indices or range(first, first + len(answers))
        names = _names_in(batch, len(answers))
        for row, index in enumerate(indices):
            self._rows.append(
                {
                    "loader": dataloader_idx,
                    "index": index,
                    "name": None if names is None else names[row],
                    "answer": answers[row],
                    "spread": None if spread is None else spread[row].cpu(),
                }
            )

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the file, on rank 0."""
        folder = trainer.log_dir or trainer.default_root_dir  # a collective call
        shards = gather_objects(trainer, self._rows)
        if not trainer.is_global_zero:
            return
        rows = [row for shard in shards for row in shard]
        if len(shards) > 1:
            rows.sort(key=lambda row: (row["loader"], row["index"]))
        if self._refused or not rows:
            rank_zero_warn(
                f"No predictions.csv: {self._refused or 'nothing was predicted'}; rows of probabilities or logits "
                "(N, C) are wanted, or class indices (N,)."
            )
            return
        self.written = Path(self.path) if self.path else Path(folder) / "predictions.csv"
        write_csv(self.written, self._table(trainer, pl_module, rows))
        rank_zero_info(f"{len(rows)} predictions: {self.written}")

    def _table(self, trainer: pl.Trainer, pl_module: pl.LightningModule, rows: list[dict[str, Any]]) -> list[Any]:
        files = _files_of(trainer, rows)
        answers = torch.stack([row["answer"] for row in rows])
        owners = pl_module, trainer.datamodule  # type: ignore[attr-defined]
        if answers.ndim == 1:
            labels, names = answers.tolist(), class_names_of(*owners)
            return [
                {"file": file, "class": names[label] if names else label}
                for file, label in zip(files, labels, strict=True)
            ]
        threshold = getattr(getattr(pl_module, "task", None), "threshold", None)
        probs, several = _as_probs(answers, threshold)
        names = class_names_of(*owners, num_classes=probs.shape[1]) or [str(i) for i in range(probs.shape[1])]
        table = []
        for row, file, prob in zip(rows, files, probs, strict=True):
            best = int(prob.argmax())
            chosen = [name for name, p in zip(names, prob, strict=True) if p >= (threshold or 0.5)]
            line: dict[str, Any] = {} if rows[-1]["loader"] == 0 else {"dataloader": row["loader"]}
            line |= {"file": file, "class": ";".join(chosen) if several else names[best]}
            line["probability"] = round(float(prob[best]), 6)
            if row["spread"] is not None:
                line["spread"] = round(float(row["spread"][best]), 6)
            if self.all_probabilities or several:
                line |= {f"prob_{name}": round(float(p), 6) for name, p in zip(names, prob, strict=True)}
            table.append(line)
        return table


def _as_probs(answers: Tensor, threshold: float | None) -> tuple[Tensor, bool]:
    """Probabilities, and whether an image may have several of the classes."""
    answers = answers.float()
    if bool(((answers < 0) | (answers > 1)).any()):
        rank_zero_info("predict_step gives logits: predictions.csv holds their softmax (or sigmoid, of a single one).")
        answers = answers.sigmoid() if answers.shape[1] == 1 else answers.softmax(-1)
    sums = answers.sum(-1)
    several = threshold is not None or not bool(torch.isclose(sums, torch.ones_like(sums), atol=1e-3).all())
    return answers, several


def _names_in(batch: Any, num_samples: int) -> list[str] | None:
    """Paths or names that come with a batch."""
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _NAME_KEYS if key in batch), None)
    else:
        found = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    is_list = isinstance(found, list | tuple) and len(found) == num_samples
    return [str(name) for name in found] if is_list and all(isinstance(name, str | Path) for name in found) else None  # type: ignore[union-attr]


def _files_of(trainer: pl.Trainer, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    given = [row["name"] for row in rows]
    if all(name is not None for name in given) and are_names(given):
        return given
    loaders: Any = trainer.predict_dataloaders
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    names = [sample_names(getattr(loader, "dataset", None)) for loader in loaders]
    files = []
    for row in rows:
        known = names[row["loader"]] if row["loader"] < len(names) else None
        index = row["index"]
        files.append(known[index] if known is not None and index < len(known) else str(index))
    return files
