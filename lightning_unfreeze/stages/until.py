"""When a stage with `until` has had enough: the value that it is judged by, what a gain is, and the two rules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

Mode = Literal["min", "max"]

_VALIDATION = {"val", "valid", "validation", "eval", "dev"}
_MORE_IS_BETTER, _LESS_IS_BETTER = ("acc", "f1", "auc", "auroc"), ("loss", "error", "perplexity")
_MORE_WORDS, _LESS_WORDS = (
    {"iou", "miou", "map", "precision", "recall", "kappa"},
    {"err", "nll", "ce", "ece", "mse", "rmse", "mae"},
)


def direction(name: str) -> Mode | None:
    """Whether less or more of a metric is better, by its name; None where that does not tell.

    >>> direction("val/loss"), direction("valid_acc_top5"), direction("val_score")
    ('min', 'max', None)
    """
    words = set(_words(name))
    if any(part in name.lower() for part in _LESS_IS_BETTER) or words & _LESS_WORDS:
        return "min"
    return "max" if any(part in name.lower() for part in _MORE_IS_BETTER) or words & _MORE_WORDS else None


def of_validation(logged: Iterable[str]) -> list[str]:
    """The names among what is logged that say that they are of a validation.

    >>> of_validation(["val_loss", "valid/acc", "Validation loss", "eval.loss", "train/loss", "value", "interval_acc"])
    ['val_loss', 'valid/acc', 'Validation loss', 'eval.loss']
    """
    return [name for name in logged if _VALIDATION & set(_words(name))]


def find_monitor(logged: Iterable[str]) -> str | None:
    """The one to judge by among what is logged: the validation loss, else the one metric of known direction, else None.

    >>> find_monitor(["train/loss", "valid/loss", "valid/loss_box", "valid/acc"])
    'valid/loss'
    """
    names = of_validation(logged)
    losses = [name for name in names if "loss" in _words(name)]
    shortest = sorted(losses, key=lambda name: (name != "val_loss", len(_words(name)), name))
    if len(losses) == 1 or (losses and len(_words(shortest[0])) < len(_words(shortest[1]))) or "val_loss" in losses:
        return shortest[0]
    others = [name for name in names if direction(name) is not None]
    return others[0] if not losses and len(others) == 1 else None


class Monitor:
    """The value that stages with `until` are judged by, as it was asked for or as it is found among what is logged.

    Attributes:
        name: Under which it is logged; None as long as it is not known.
        mode: Whether less or more of it is better.

    Args:
        name: As asked for; None to have it found.
        mode: As asked for; `"auto"` tells by the name.

    Raises:
        ValueError: For another mode, or a name that does not tell.
    """

    def __init__(self, name: str | None, mode: Mode | Literal["auto"]) -> None:
        if mode not in ("auto", "min", "max"):
            raise ValueError(f"mode={mode!r} is not 'auto', 'min' or 'max'")
        if name is not None and mode == "auto" and direction(name) is None:
            raise ValueError(
                f"monitor={name!r}: its name does not tell whether less is better; set mode='min' or 'max'"
            )
        self._asked, self._asked_mode = name, mode
        self.forget()

    def forget(self) -> None:
        """As it was asked for."""
        self.name: str | None = self._asked
        self.mode: Mode = self._mode_of(self._asked or "loss")

    def take(self, name: str, mode: object = None) -> None:
        """Judges by this, unless another one was asked for.

        Args:
            name: Of the value.
            mode: `"min"` or `"max"`; anything else leaves it to what was asked for.

        Raises:
            MisconfigurationException: Where neither tells whether less is better.
        """
        if self._asked is None:
            self.name = name
            self.mode = "min" if mode == "min" else "max" if mode == "max" else self._mode_of(name)

    def find(self, logged: Sequence[str]) -> str:
        """Looks for it in what a validation logged; what is to be said of what was found, `""` where nothing is.

        Raises:
            MisconfigurationException: Where it is not there.
        """
        if self.name in logged:
            return ""
        found = find_monitor(logged) if self.name is None else None
        if found is None:
            asked = "the validation loss" if self.name is None else repr(self.name)
            raise MisconfigurationException(
                f"until='overfit' and until='plateau' look at {asked}, which validation did not log; logged are "
                f"{list(logged)}; name one of them: CosineRestarts(monitor=...)"
            )
        self.take(found)
        return "" if found == "val_loss" else f"stages with `until` are judged by {found!r} ({self.mode} is better)"

    def _mode_of(self, name: str) -> Mode:
        found = direction(name) if self._asked_mode == "auto" else self._asked_mode
        if found is None:
            raise MisconfigurationException(
                f"stages with `until` are judged by {name!r}, whose name does not tell whether less is better; set "
                "CosineRestarts(mode='min') or 'max'"
            )
        return found


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
