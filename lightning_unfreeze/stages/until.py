"""When a stage with `until` has had enough: the value that it is judged by, what a gain is, and the two rules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["min", "max"]

_VALIDATION = {"val", "valid", "validation", "eval"}
_MORE_IS_BETTER, _LESS_IS_BETTER = ("acc", "f1", "auc", "auroc"), ("loss", "error")
_MORE_WORDS, _LESS_WORDS = {"iou", "miou", "map", "precision", "recall", "kappa"}, {"nll", "ce", "mse", "rmse", "mae"}


def direction(name: str) -> Mode | None:
    """Whether less or more of a metric is better, by its name; None where that does not tell.

    >>> direction("val/loss"), direction("valid_acc_top5"), direction("val_score")
    ('min', 'max', None)
    """
    words = set(_words(name))
    if any(part in name.lower() for part in _LESS_IS_BETTER) or words & _LESS_WORDS:
        return "min"
    return "max" if any(part in name.lower() for part in _MORE_IS_BETTER) or words & _MORE_WORDS else None


def find_monitor(logged: Iterable[str]) -> str | None:
    """The one to judge by among what is logged: the validation loss, else the one metric of known direction, else None.

    >>> find_monitor(["train/loss", "valid/loss", "valid/loss_box", "valid/acc"])
    'valid/loss'
    """
    names = [name for name in logged if _VALIDATION & set(_words(name))]
    losses = [name for name in names if "loss" in _words(name)]
    shortest = sorted(losses, key=lambda name: (name != "val_loss", len(_words(name)), name))
    if len(losses) == 1 or (losses and len(_words(shortest[0])) < len(_words(shortest[1]))) or "val_loss" in losses:
        return shortest[0]
    others = [name for name in names if direction(name) is not None]
    return others[0] if not losses and len(others) == 1 else None


def gain(before: float | None, now: float, mode: Mode) -> float:
    """How much better `now` is than `before`; infinite where nothing, or NaN, was before, and -inf for NaN.

    >>> gain(0.5, 0.25, "min"), gain(0.5, 0.25, "max"), gain(None, 0.25, "min")
    (0.25, -0.25, inf)
    """
    if math.isnan(now):
        return -math.inf
    if before is None or math.isnan(before):
        return math.inf
    return before - now if mode == "min" else now - before


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[/_.\- ]+", name.lower()) if word]


@dataclass
class Judge:
    """What has been seen of one stage with `until`; plain values, so a checkpoint holds it as a dict.

    Attributes:
        until: Of the stage.
        mode: Whether less or more is better.
        min_delta: Least improvement that counts.
        patience_epochs: Of the stage.
        values: At the cycle ends.
        best: Of all that may be gone back to; what the stage started from is one of them.
        reference: What patience is counted from, and after which epoch of the stage it was found.
        reference_epoch: The epoch.
        enough: Why the stage is to end; empty as long as it is not.
        concluded: Whether it has gone back to its best, or stands there.
    """

    until: str
    mode: Mode
    min_delta: float
    patience_epochs: int
    values: list[float] = field(default_factory=list)
    best: float | None = None
    reference: float | None = None
    reference_epoch: int = 0
    enough: str = ""
    concluded: bool = False

    def started_from(self, value: float) -> None:
        """What the weights scored that the stage starts from."""
        self.best = self.reference = value

    def validated(self, value: float, epoch: int, *, ends_cycle: bool) -> bool:
        """Takes the value of a validation; returns whether these weights are the best to go back to so far.

        Args:
            value: What the weights scored.
            epoch: Of the stage, from 1.
            ends_cycle: Whether a cycle ends with it.
        """
        before = None
        for earlier in self.values:
            before = earlier if gain(before, earlier, self.mode) > 0 else before
        if ends_cycle:
            self.values.append(value)
        if self.until == "overfit":
            if not ends_cycle:
                return False
            if len(self.values) > 1 and not gain(before, value, self.mode) > self.min_delta:
                was = "nothing" if before is None else f"{before:.5g}"
                self.enough = f"{value:.5g} after cycle {len(self.values)} is no gain of {self.min_delta:g} over {was}"
        elif gain(self.reference, value, self.mode) > self.min_delta:
            self.reference, self.reference_epoch = value, epoch
        is_best = self.best is None or gain(self.best, value, self.mode) > 0
        if is_best:
            self.best = value
        return is_best

    def epoch_ended(self, epoch: int) -> None:
        """Says `enough` where patience is over."""
        if self.until == "plateau" and epoch - self.reference_epoch >= self.patience_epochs and not self.enough:
            self.enough = f"no gain of {self.min_delta:g} in {self.patience_epochs} epochs"
