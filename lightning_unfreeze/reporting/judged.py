"""Predictions against the truth: the numbers of a report, as plain arithmetic on arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_Z = 1.959963984540054  # of a two-sided interval of 95 %
_TINY = 1e-12


@dataclass(frozen=True)
class Judged:
    """What a model said of each sample of one set, and what is true.

    Attributes:
        names: `N` paths, or numbers where there are none.
        class_names: `C` names in the order of the columns.
        target: `(N,)` class indices, or `(N, C)` of 0 and 1 for several labels per sample.
        probs: `(N, C)` probabilities.
        probs_tta: `(N, C)` of test-time augmentation; None where there was none.
        threshold: Probability from which on a label counts, for several labels.
    """

    names: Sequence[str]
    class_names: Sequence[str]
    target: npt.NDArray[Any]
    probs: npt.NDArray[Any]
    probs_tta: npt.NDArray[Any] | None = None
    threshold: float = 0.5

    @property
    def several(self) -> bool:
        """Whether a sample may have several labels."""
        return self.target.ndim == 2

    @property
    def guess(self) -> npt.NDArray[Any]:
        """What is predicted, in the form of the target."""
        return self._guess_of(self.probs)

    def _guess_of(self, probs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        guess: npt.NDArray[Any] = (probs >= self.threshold).astype(int) if self.several else probs.argmax(1)
        return guess

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """`(N,)` whether all of a sample is right."""
        return self._right_of(self.probs)

    def _right_of(self, probs: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        same: npt.NDArray[np.bool_] = np.equal(self._guess_of(probs), self.target)
        return np.asarray(same.all(1)) if self.several else same

    @property
    def losses(self) -> npt.NDArray[Any]:
        """`(N,)` cross entropy in nats, for several labels the mean over them."""
        probs = np.clip(self.probs.astype(float), _TINY, 1.0)
        if not self.several:
            taken: npt.NDArray[Any] = -np.log(probs[np.arange(len(probs)), self.target])
            return taken
        others = np.clip(1.0 - self.probs.astype(float), _TINY, 1.0)
        mean: npt.NDArray[Any] = -np.where(self.target == 1, np.log(probs), np.log(others)).mean(1)
        return mean

    def confusion(self) -> npt.NDArray[np.int_]:
        """`(C, C)` samples by true class (row) and predicted class (column)."""
        size = len(self.class_names)
        counts = np.bincount(self.target * size + self.guess, minlength=size * size)
        return counts.reshape(size, size)

    def class_rows(self) -> list[dict[str, Any]]:
        """One row per class: support, accuracy (share of its samples that are found) with interval, precision, F1."""
        hot = self.target if self.several else np.eye(len(self.class_names), dtype=int)[self.target]
        guess = self.guess if self.several else np.eye(len(self.class_names), dtype=int)[self.guess]
        rows = []
        for column, name in enumerate(self.class_names):
            truth, said = hot[:, column] == 1, guess[:, column] == 1
            found = int((truth & said).sum())
            low, high = wilson(found, int(truth.sum()))
            row: dict[str, Any] = {
                "class": name,
                "images": int(truth.sum()),
                "right": found,
                "accuracy": _share(found, int(truth.sum())),
                "low": low,
                "high": high,
                "precision": _share(found, int(said.sum())),
                "f1": _share(2 * found, int(truth.sum() + said.sum())),
            }
            if self.several:
                row["best_threshold"], row["best_f1"] = best_threshold(self.probs[:, column], truth)
            else:
                row["taken_for"] = self._taken_for(column)
            rows.append(row)
        return rows

    def _taken_for(self, column: int) -> str:
        wrong = self.guess[(self.target == column) & (self.guess != column)]
        if not len(wrong):
            return ""
        other = int(np.bincount(wrong).argmax())
        return f"{self.class_names[other]} ({int((wrong == other).sum())})"

    def sample_rows(self) -> list[dict[str, Any]]:
        """One row per sample, the worst first."""
        losses, guess, right = self.losses, self.guess, self.right
        return [
            {
                "file": self.names[row],
                "truth": self.text_of(self.target[row]),
                "guess": self.text_of(guess[row]),
                "right": bool(right[row]),
                "loss": round(float(losses[row]), 6),
                "confidence": round(float(self.confidence[row]), 6),
            }
            for row in np.argsort(-losses, kind="stable")
        ]

    @property
    def confidence(self) -> npt.NDArray[Any]:
        """`(N,)` probability of the predicted class; for several labels of the least certain decision."""
        if not self.several:
            highest: npt.NDArray[Any] = self.probs.max(1)
            return highest
        least: npt.NDArray[Any] = np.where(self.guess == 1, self.probs, 1 - self.probs).min(1)
        return least

    def text_of(self, labels: Any) -> str:
        """Names of a target or a guess."""
        if not self.several:
            return str(self.class_names[int(labels)])
        return ";".join(str(name) for name, label in zip(self.class_names, labels, strict=True) if label)

    def calibration(self, num_bins: int = 10) -> list[dict[str, Any]]:
        """Confidence against accuracy in bins of equal width; for several labels probability against frequency."""
        scores = self.probs.ravel() if self.several else self.probs.max(1)
        hits = self.target.ravel() == 1 if self.several else self.right
        bins = np.minimum((scores * num_bins).astype(int), num_bins - 1)
        return [
            {
                "from": number / num_bins,
                "to": (number + 1) / num_bins,
                "count": int((bins == number).sum()),
                "confidence": _mean(scores[bins == number]),
                "accuracy": _mean(hits[bins == number]),
            }
            for number in range(num_bins)
        ]

    def tta_changes(self) -> dict[str, int] | None:
        """How many samples are right without and with augmentation, how many it corrected and how many it spoiled."""
        if self.probs_tta is None:
            return None
        before, after = self.right, self._right_of(self.probs_tta)
        return {
            "without": int(before.sum()),
            "with": int(after.sum()),
            "fixed": int((after & ~before).sum()),
            "broken": int((before & ~after).sum()),
        }


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Interval of 95 % of a share (Wilson 1927); (0, 1) without trials.

    >>> low, high = wilson(8, 10)
    >>> round(low, 3), round(high, 3)
    (0.49, 0.943)
    """
    if not trials:
        return 0.0, 1.0
    share, square = successes / trials, _Z**2 / trials
    centre = share + square / 2
    half = _Z * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))


def expected_calibration_error(bins: Sequence[dict[str, Any]]) -> float:
    """Mean distance between confidence and accuracy over the samples (Naeini et al. 2015)."""
    total = sum(row["count"] for row in bins)
    gaps = [row["count"] * abs(row["confidence"] - row["accuracy"]) for row in bins if row["count"]]
    return float(sum(gaps) / max(total, 1))


def best_threshold(scores: npt.NDArray[Any], truth: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """The threshold with the highest F1 on these samples, and that F1; (nan, 0) where none has the label."""
    if not truth.any():
        return float("nan"), 0.0
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(truth[order])
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + truth.sum())
    # a threshold cannot part equal scores
    f1[:-1][scores[order][:-1] == scores[order][1:]] = 0.0
    best = int(f1.argmax())
    return float(scores[order][best]), float(f1[best])


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else float("nan")


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else float("nan")
