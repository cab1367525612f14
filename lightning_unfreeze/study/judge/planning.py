"""What a study is going to run: its size, its time, what it can find, and how it is cut to a budget."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_unfreeze.study.judge import statistics as st
from lightning_unfreeze.study.judge.analysis import Analysis, StudyInfo

_POWER_SDS = (0.5, 0.7, 1.0, 1.5, 2.0)
_MIN_SEEDS = 2


@dataclass(frozen=True)
class StudyPlan:
    """What a study will run.

    Attributes:
        arms: Names of the arms.
        seeds: Paired seeds.
        tuning_runs: Runs of tuning.
        seconds: Predicted time of everything, tuning included.
        tuning_seconds: Of these, tuning.
        rows: One per arm, for a table.
        info: What the report says of the study.
        pilot: These are the runs from which the number of seeds will follow.
    """

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    tuning_runs: int
    seconds: float
    tuning_seconds: float
    rows: tuple[dict[str, Any], ...]
    info: StudyInfo
    pilot: bool = False

    @property
    def runs(self) -> int:
        """Runs in all, tuning included."""
        return len(self.arms) * len(self.seeds) + self.tuning_runs

    def power_rows(self) -> list[dict[str, Any]]:
        """Return what this many seeds can find, for several spreads of the paired differences (points).

        On these test images: what the choice of the images leaves open comes on top.
        """
        margin, seeds, level = self.info.margin, len(self.seeds), st.ALPHA / max(1, self.num_secondary)
        return [
            {
                "SD of the difference": sd,
                f"detectable with {seeds} seeds": round(st.detectable_difference(sd, seeds), 2),
                f"seeds to detect {margin:g} pt": st.seeds_to_detect(sd, margin),
                "in a secondary arm": st.seeds_to_detect(sd, margin, alpha=level),
                f"seeds to show equality within {margin:g} pt": st.seeds_for_equivalence(sd, margin),
            }
            for sd in _POWER_SDS
        ]

    @property
    def num_secondary(self) -> int:
        """Comparisons beside the primary one."""
        return max(0, len(self.arms) - 2)

    def sentences(self) -> list[str]:
        """Return what to know before starting."""
        error, seeds = st.image_standard_error(0.1, self.info.n_test), len(self.seeds)
        found = [
            f"{self.runs} runs: {len(self.arms)} arms x {seeds} seeds, {self.tuning_runs} to tune; "
            f"about {_duration(self.seconds)}, of which tuning {_duration(self.tuning_seconds)}.",
            f"Primary: {self.info.primary} against {self.info.reference}, margin ±{self.info.margin:g} pt, on new "
            "images.",
            f"{self.info.n_test} test images leave up to {error:.2f} pt of standard error on new images where two arms "
            "disagree on a tenth of them; no number of seeds removes that.",
        ]
        widest = st.smallest_margin(error)
        if widest > self.info.margin:
            enough = float(f"{self.info.n_test * (widest / self.info.margin) ** 2:.2g}")
            found.append(
                f"So they cannot be counted on to show equality within ±{self.info.margin:g} pt, however long the "
                f"study: about {enough:.0f} test images could, and these ±{math.ceil(widest)} pt (--margin)."
            )
        if self.info.overlap is not None and self.info.overlap > 0:
            found.append(
                f"Two seeds share {self.info.overlap:.0%} of their training images: the verdict is for other seeds "
                "that draw from these images, less so for other training images (train_size draws fewer)."
            )
        if self.pilot:
            found.append("This is the pilot: the number of seeds follows from the spread that it finds.")
        elif seeds < st.MIN_SEEDS_SIGN_FLIP:
            found.append(f"Fewer than {st.MIN_SEEDS_SIGN_FLIP} seeds: a sign-flip p cannot be below 0.05.")
        least = st.fewest_seeds(self.num_secondary)
        if self.num_secondary > 1 and seeds < least and not self.pilot:
            smallest = min(1.0, self.num_secondary * 2 / 2**seeds)
            found.append(
                f"With {seeds} seeds Holm's p of the {self.num_secondary} secondary arms cannot be below "
                f"{smallest:.2g}: all of them stay undecided whatever comes out; {least} seeds could decide "
                "them, or fewer arms."
            )
        if len(self.info.looks) > 1:
            levels = ", ".join(
                f"{alpha:.4f} at {look}"
                for look, alpha in zip(self.info.looks, st.spent_alpha(self.info.looks), strict=True)
            )
            found.append(f"Planned looks, and the level of each: {levels} seeds. It ends at the first that decides.")
        off = [row["arm"] for row in self.rows if "@flops" in row["arm"] and abs(row["of full"] - 1) > 0.05]
        if off:
            found.append(
                f"{', '.join(off)}: whole epochs do not come within 5 % of the reference's FLOPs; longer recipes do."
            )
        return found


def after_pilot(pilot: Analysis) -> tuple[int, list[str]]:
    """Return the number of seeds that the spread of the pilot's primary comparison asks for, and how it was found.

    That many detect a difference of the margin, and show equality within it where there is none, with 80 % power. The
    spread of five pairs is a rough one, so its upper 80 % confidence limit stands in for it. What the test images
    leave open counts too.

    Raises:
        ValueError: If no number of seeds would do with these test images.
    """
    margin, primary = pilot.info.margin, pilot.info.primary
    found, numbers = [], {}
    for arm, comparison in pilot.comparisons.items():
        sd, images = st.sd_limit(comparison.differences), comparison.verdict.effect.image_variance
        wanted = [
            st.seeds_to_detect(sd, margin, image_variance=images),
            st.seeds_for_equivalence(sd, margin, image_variance=images),
        ]
        known = [seeds for seeds in wanted if seeds is not None]
        numbers[arm] = max(*known, st.MIN_SEEDS_SIGN_FLIP) if len(known) == len(wanted) else None
        found.append(
            f"pilot, {arm}: {len(comparison.seeds)} pairs differ by {comparison.verdict.sd:.2f} pt (SD; upper 80 % "
            f"limit {sd:.2f}), test images leave {math.sqrt(images):.2f} pt of standard error; "
            f"{numbers[arm] or 'no number of'} seeds decide about ±{margin:g} pt."
        )
    number = numbers[primary]
    if number is None:
        raise ValueError(
            f"{found[0]} With {pilot.info.n_test} test images no number of seeds decides about ±{margin:g} pt: take a "
            "wider margin, more test images, or a number of seeds of your own."
        )
    found.append(f"The study takes {number} seeds, those of {primary}; the pilot's own are in no comparison.")
    return number, found


@dataclass(frozen=True)
class BudgetFit:
    """What of a study fits into a time budget.

    Attributes:
        arms: Arms that are run.
        seeds: Seeds per arm.
        seconds: Predicted time.
    """

    arms: tuple[str, ...]
    seeds: int
    seconds: float


def fit_budget(
    seconds: Mapping[str, float],
    tuning_seconds: Mapping[str, float],
    budget_seconds: float,
    seeds: int,
    keep: Sequence[str],
) -> BudgetFit:
    """Lower the seeds first, to no less than a sign-flip test needs, then drop arms from the last one, then seeds.

    Args:
        seconds: Predicted seconds of one run, by arm, in order of importance.
        tuning_seconds: Of tuning the arm.
        budget_seconds: What there is.
        seeds: Seeds that were asked for.
        keep: Arms that are never dropped: the two of the primary comparison.

    Raises:
        ValueError: If two seeds of the arms to keep do not fit.

    >>> fit_budget({"full9": 10, "skip34@flops": 10, "gradual": 10}, {}, 130, 10, ["full9", "skip34@flops"])
    BudgetFit(arms=('full9', 'skip34@flops'), seeds=6, seconds=120.0)
    """

    def needed(arms: Sequence[str], count: int) -> float:
        return sum(count * seconds[arm] + tuning_seconds.get(arm, 0.0) for arm in arms)

    arms, count = list(seconds), seeds
    while needed(arms, count) > budget_seconds:
        droppable = [arm for arm in arms if arm not in keep]
        if count > st.MIN_SEEDS_SIGN_FLIP or (not droppable and count > _MIN_SEEDS):
            count -= 1
        elif droppable:
            arms.remove(droppable[-1])
        else:
            raise ValueError(
                f"budget={budget_seconds:.0f} s: {count} seeds of {' and '.join(keep)} take about "
                f"{needed(arms, count):.0f} s; give more time, fewer epochs, images or tuning seeds."
            )
    if count < st.MIN_SEEDS_SIGN_FLIP < seeds:
        rank_zero_warn(f"the budget leaves {count} seeds: no sign-flip p can be below 0.05 with fewer than 6.")
    return BudgetFit(tuple(arms), count, needed(arms, count))


def parse_duration(text: str | float) -> float:
    """Return the seconds of `2h`, `30min`, `90s`, or of a number.

    >>> parse_duration("1.5h")
    5400.0

    Raises:
        ValueError: For anything else.
    """
    found = re.fullmatch(r"([0-9.]+)\s*(h|min|m|s|)", str(text).strip())
    try:
        seconds = float(found[1]) * {"h": 3600, "min": 60, "m": 60, "s": 1, "": 1}[found[2]] if found else 0.0
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"budget={text!r}: give a time as 2h, 30min or 90s.")
    return seconds


def _duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.0f} min"
        if seconds >= 60
        else f"{seconds:.0f} s"
    )
