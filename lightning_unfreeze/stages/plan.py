"""A stage of a transfer-learning run, and the arithmetic of its length: epochs, cycles, the plan."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from itertools import accumulate
from typing import Any, Literal

from lightning_unfreeze.stages.cycles import MAX_STAGE_EPOCHS, as_fraction, cycles_sum

_PATIENCE_EPOCHS = 3
_OF_TRAINING = ("lr", "lr_mult", "lr_span", "epochs", "cycle_len", "cycle_mult", "num_cycles", "until")


@dataclass(frozen=True)
class Stage:
    """One row of the plan: what trains, for how long, at which rates.

    Args:
        name: Unique within the plan; names the stage in logs, files and errors.
        train: `"head"` (the last layer group), `"all"`, an int (that many layer groups from the top, head included),
            `"adapters"` (every PEFT adapter, and the head), or a list of layer-group names or globs (surgical
            fine-tuning, e.g. `["stem", "layer1*"]`).
        epochs: Length in epochs (at most, with `until="plateau"`); or leave it out and give cycles.
        lr: Peak learning rate of the last layer group; `"find"` for a range test at the start of the stage; None for
            the rates that the optimizer was given.
        lr_mult: Factor from one layer group to the next one towards the input, in (0, 1]; or one factor per layer
            group, input first.
        precompute: Run the frozen part once and train the rest on its stored activations.
        cycle_len: Length of the first cosine cycle in epochs, may be a fraction. None: the rate stays constant.
        cycle_mult: Length of a cycle over the length of the one before it.
        num_cycles: Number of cycles; with `until` the most there can be.
        until: `"overfit"` ends the stage at the first cycle end that brought no improvement; `"plateau"` after
            `patience_epochs` epochs without one, with or without cycles.
        lr_span: Instead of `lr_mult`: rate of the first layer group over that of the last, in (0, 1], spread
            geometrically over the groups between, so that it means the same on networks of 6 and of 30 groups.
            `1/9` is fast.ai's `[lr/9, lr/3, lr]` for data unlike the pretraining data, `1/100` for data like it.
        solve: Solve the head on the stored features (multinomial logistic regression) instead of training it. Such a
            stage has no rate and no length of its own: in its one epoch the solved head is scored and nothing moves.
            `"auto"` solves it where that can be done, and trains it as the other options say where it cannot (a head
            or a loss of another kind, images that cannot be stored); which of the two is said when the stage starts.
        patience_epochs: Epochs without improvement that end a stage with `until="plateau"`.
        image_size_px: Side of the images in this stage (progressive resizing: small images first), for a data module
            with `set_image_size(px)`; None for the size that the data has.

    Raises:
        ValueError: For an impossible value, or options that disagree.

    Example:
        >>> Stage("full", train="all", lr_span=1 / 9, cycle_len=1, cycle_mult=2, num_cycles=3).num_epochs
        7
        >>> Stage("head", train="head", precompute=True, solve=True).num_epochs
        1
    """

    name: str
    train: int | str | list[str] = "all"
    epochs: int | None = None
    lr: float | Literal["find"] | None = None
    lr_mult: float | list[float] = 1.0
    precompute: bool = False
    cycle_len: float | None = None
    cycle_mult: float = 1
    num_cycles: int = 1
    until: Literal["overfit", "plateau"] | None = None
    lr_span: float | None = None
    solve: bool | Literal["auto"] = False
    patience_epochs: int = _PATIENCE_EPOCHS
    image_size_px: int | None = None

    def __post_init__(self) -> None:
        self._check_what_trains()
        self._check_rates()
        self._check_counts()
        if self.solve not in (True, False, "auto"):
            raise self._refuse(f"solve={self.solve!r} is not True, False or 'auto'")
        if self.solve:
            self._check_solved()
        if self.solve is not True:
            self._check_length()
            self._check_until()

    def _refuse(self, reason: str) -> ValueError:
        return ValueError(f"stage {self.name!r}: {reason}")

    def _check_what_trains(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or "/" in self.name:
            raise ValueError(f"a stage needs a name that is not empty and has no '/' in it, got name={self.name!r}")
        train = self.train
        if isinstance(train, bool) or not isinstance(train, str | int | list | tuple):
            raise self._refuse(
                f"train={train!r} is not 'head', 'all', 'adapters', a number of layer groups or a list of names"
            )
        if isinstance(train, str) and train not in ("head", "all", "adapters"):
            raise self._refuse(
                f"train={train!r} is not 'head', 'all' or 'adapters'; for layer groups by name write [{train!r}]"
            )
        if isinstance(train, int) and train < 1:
            instead = f"; they are counted from the head down: train={-train}" if train < 0 else ""
            raise self._refuse(f"train={train} layer groups; at least 1 has to train{instead}")
        if isinstance(train, list | tuple) and not (train and all(isinstance(name, str) for name in train)):
            raise self._refuse(f"train={train!r} has to list at least one layer-group name")
        if not isinstance(self.precompute, bool):
            raise self._refuse(f"precompute={self.precompute!r} is not True or False")
        if self.precompute and train == "all":
            raise self._refuse("precompute=True stores what the frozen part gives, but train='all' freezes nothing")

    def _check_rates(self) -> None:
        if isinstance(self.lr, str):
            if self.lr != "find":
                raise self._refuse(f"lr={self.lr!r} is not a number, 'find' or None")
        elif self.lr is not None and not _is_positive(self.lr):
            raise self._refuse(f"lr={self.lr!r} has to be one Python number, above 0 and finite{_instead(self.lr)}")
        factors = self.lr_mult if isinstance(self.lr_mult, list | tuple) else [self.lr_mult]
        if not factors or not all(_is_positive(factor) and factor <= 1 for factor in factors):
            instead = "; earlier layer groups never train faster"
            if _is_positive(self.lr_mult):  # fastai's fine_tune(lr_mult=100) means a hundredth
                instead += (
                    f", and a first one with 1/{self.lr_mult:g} of the last one's is lr_span=1 / {self.lr_mult:g}"
                )
            raise self._refuse(f"lr_mult={self.lr_mult!r} has to lie in (0, 1]{instead}")
        if self.lr_span is None:
            return
        if not (_is_positive(self.lr_span) and self.lr_span <= 1):
            raise self._refuse(
                f"lr_span={self.lr_span!r} has to lie in (0, 1]: the first layer group's rate over the last one's"
            )
        if self.lr_mult != 1:
            raise self._refuse(f"lr_span={self.lr_span!r} and lr_mult={self.lr_mult!r} say the same twice; give one")

    def _check_counts(self) -> None:
        for option in ("epochs", "num_cycles", "patience_epochs", "image_size_px"):
            value = getattr(self, option)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise self._refuse(f"{option}={value!r} has to be a whole number of at least 1")
        if not _is_positive(self.cycle_mult):
            raise self._refuse(f"cycle_mult={self.cycle_mult!r} has to be above 0 and finite")
        if self.patience_epochs != _PATIENCE_EPOCHS and self.until != "plateau":
            raise self._refuse(f"patience_epochs={self.patience_epochs} goes with until='plateau', got {self.until!r}")

    def _check_solved(self) -> None:
        if self.train != "head" or not self.precompute:
            raise self._refuse(
                f"solve={self.solve!r} solves the head on stored features and needs train='head', precompute=True; "
                f"got train={self.train!r}, precompute={self.precompute}"
            )
        if self.solve == "auto":
            return
        untouched = {field.name: field.default for field in fields(self)}
        for option in _OF_TRAINING:
            if getattr(self, option) != untouched[option]:
                raise self._refuse(
                    f"solve=True takes no rate and no length, got {option}={getattr(self, option)!r}; leave it out"
                )

    def _check_length(self) -> None:
        if self.cycle_len is None:
            if self.epochs is None:
                raise self._refuse("has no length; give epochs=..., or cycle_len=... with num_cycles=...")
            if self.num_cycles != 1 or self.cycle_mult != 1:
                raise self._refuse(f"num_cycles={self.num_cycles}, cycle_mult={self.cycle_mult} need a cycle_len")
            return
        if not _is_positive(self.cycle_len):
            raise self._refuse(f"cycle_len={self.cycle_len!r} epochs has to be above 0 and finite")
        if self.num_cycles > MAX_STAGE_EPOCHS:
            raise self._refuse(f"num_cycles={self.num_cycles} is above {MAX_STAGE_EPOCHS}")
        try:
            total_epochs = cycles_sum(self.cycle_len, self.cycle_mult, self.num_cycles)
        except OverflowError:
            total_epochs = Fraction(MAX_STAGE_EPOCHS + 1)
        if total_epochs > MAX_STAGE_EPOCHS:
            raise self._refuse(f"{self._cycles} last more than {MAX_STAGE_EPOCHS} epochs")
        if self.epochs is not None and self.epochs != math.ceil(total_epochs):
            raise self._refuse(
                f"epochs={self.epochs}, but {self._cycles} last {float(total_epochs):g} epochs; leave one of the two "
                "out"
            )

    def _check_until(self) -> None:
        if self.until not in (None, "overfit", "plateau"):
            raise self._refuse(f"until={self.until!r} is not 'overfit', 'plateau' or None")
        if self.until == "overfit":
            if self.cycle_len is None:
                raise self._refuse("until='overfit' is judged at cycle ends; give cycle_len=... and num_cycles=...")
            if self.num_cycles < 2:
                raise self._refuse("until='overfit' compares cycle ends and needs num_cycles of at least 2 (the most)")
            if any(length.denominator != 1 for length in self.cycle_epochs):
                raise self._refuse(f"until='overfit' needs cycles of whole epochs, {self._cycles} are not")
        if self.until == "plateau" and self.patience_epochs >= self.num_epochs:
            raise self._refuse(
                f"until='plateau' with patience_epochs={self.patience_epochs} never ends a stage of at most "
                f"{self.num_epochs} epochs; allow more epochs, or less patience"
            )

    def settled(self, *, solved: bool) -> Stage:
        """What `solve="auto"` comes to: a stage that solves its head, or one that trains it.

        >>> Stage("head", train="head", precompute=True, solve="auto", epochs=2).settled(solved=True).num_epochs
        1
        """
        untouched: dict[str, Any] = {field.name: field.default for field in fields(self) if field.name in _OF_TRAINING}
        return replace(self, solve=solved, **(untouched if solved else {}))

    @property
    def _cycles(self) -> str:
        return f"{self.num_cycles} cycles from cycle_len={self.cycle_len} with cycle_mult={self.cycle_mult}"

    @property
    def cycle_epochs(self) -> list[Fraction]:
        """Length of each cycle in epochs, exact; empty without `cycle_len`."""
        if self.cycle_len is None:
            return []
        length, mult = as_fraction(self.cycle_len), as_fraction(self.cycle_mult)
        return [length * mult**index for index in range(self.num_cycles)]

    @property
    def cycle_ends(self) -> list[Fraction]:
        """End of each cycle in epochs from the start of the stage, exact; empty without `cycle_len`."""
        return list(accumulate(self.cycle_epochs))

    @property
    def num_epochs(self) -> int:
        """Whole epochs of the stage (at most, with `until`); cycles that end inside an epoch round up to its end.

        1 for a solved stage: its head is validated, saved and reported as after any epoch, but nothing is trained.
        """
        if self.solve is True:
            return 1
        if self.epochs is not None:
            return self.epochs
        return math.ceil(sum(self.cycle_epochs))

    @property
    def needs(self) -> dict[str, str]:
        """What the stage asks of other callbacks: the option as written -> the callback that serves it."""
        needs = {}
        if self.precompute:
            needs["precompute=True"] = "PrecomputeFeatures"
        if self.lr == "find":
            needs["lr='find'"] = "LRFinderPerStage"
        if self.cycle_len is not None:
            needs[f"cycle_len={self.cycle_len}"] = "CosineRestarts"
        if self.until == "plateau":
            needs["until='plateau'"] = "CosineRestarts"
        if self.solve:
            needs[f"solve={self.solve!r}"] = "PrecomputeFeatures"
        return needs


def _instead(rates: Any) -> str:
    """What says the same as several rates, fastai's `slice(a, b)` or `[a, b, c]`, or as NumPy's and torch's number."""
    if getattr(rates, "shape", None) == ():
        return f": lr=float({rates!r})"
    ends = [rates.start, rates.stop] if isinstance(rates, slice) else rates
    if not isinstance(ends, Sequence) or not ends:
        return ""
    rise = all(_is_positive(end) for end in (ends[0], ends[-1])) and ends[0] <= ends[-1]
    first, last = (f"{ends[0]:g}", f"{ends[-1]:g}") if rise else ("FIRST", "LAST")
    return f", that of the last layer group: lr={last}, and for lower ones before it lr_span={first} / {last}"


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def check_plan(stages: Sequence[Stage]) -> None:
    """Refuses a plan that is empty, holds something else than stages, or uses a name twice.

    Raises:
        ValueError: With what was passed.
    """
    if isinstance(stages, Stage) or not stages or not all(isinstance(stage, Stage) for stage in stages):
        raise ValueError(f"a plan is a list of at least one Stage, got {stages!r}")
    names = [stage.name for stage in stages]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"stage names have to differ, {twice} are used more than once in {names}")


def unserved(stages: Sequence[Stage], present: Collection[str]) -> str:
    """What the first stage asks for that no callback serves, and what to do; `""` where all is served.

    `present` are the names of the callbacks' classes and of their bases.
    """
    for stage in stages:
        for option, callback in stage.needs.items():
            if callback not in present:
                return (
                    f"stage {stage.name!r} has {option}, which {callback} serves, and the Trainer has none; "
                    f"add {callback}() to its callbacks or take the option out"
                )
    return ""


def sets_rates(stages: Sequence[Stage]) -> bool:
    """Whether a stage says anything of rates; else those of the optimizer and its scheduler hold.

    >>> sets_rates([Stage("head", train="head", epochs=1)]), sets_rates([Stage("full", epochs=1, lr_span=1 / 9)])
    (False, True)
    """
    return any(
        stage.lr is not None or stage.lr_mult != 1 or stage.lr_span is not None or bool(stage.solve) for stage in stages
    )


def image_sizes(stages: Sequence[Stage]) -> dict[str, int]:
    """Stage name -> side of its images in pixels, of the stages that want one.

    >>> image_sizes([Stage("small", epochs=1, image_size_px=96), Stage("full", epochs=1)])
    {'small': 96}
    """
    return {stage.name: stage.image_size_px for stage in stages if stage.image_size_px is not None}


def plan_epochs(stages: Sequence[Stage]) -> int:
    """Epochs of the whole plan (at most, where a stage has `until`).

    >>> plan_epochs([Stage("head", train="head", epochs=2), Stage("full", cycle_len=1, cycle_mult=2, num_cycles=3)])
    9
    """
    return sum(stage.num_epochs for stage in stages)
