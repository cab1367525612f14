"""How a study says things: outcomes, intervals and budgets in words, the same ones in text, tables and pictures."""

from __future__ import annotations

import math

from lightning_unfreeze.study.judge import statistics as st
from lightning_unfreeze.study.judge import time_to_target as tt
from lightning_unfreeze.study.judge.analysis import AXIS_LABEL, Comparison, CostAxis

COST_LABEL: dict[CostAxis, str] = {**AXIS_LABEL, "epochs": "epochs"}


def interval_words(interval: st.Interval) -> str:
    """Return the limits of an interval.

    >>> interval_words(st.Interval(0.0, -0.5, 0.5))
    '[-0.50, +0.50]'
    """
    return f"[{interval.low:+.2f}, {interval.high:+.2f}]"


def outcome_words(verdict: st.AccuracyVerdict) -> str:
    """Return an outcome in a few words, as in a table."""
    if verdict.outcome == "not zero":
        return f"{'better' if verdict.interval.mean > 0 else 'worse'}, size open"
    return {"equal": "equal", "undecided": "undecided"}.get(
        verdict.outcome, f"{verdict.outcome} by more than {verdict.margin:g} pt"
    )


def outcome_sentence(verdict: st.AccuracyVerdict) -> str:
    """Return what an outcome says about the prediction that skipping costs no accuracy."""
    side = "better" if verdict.interval.mean > 0 else "worse"
    if verdict.outcome == "undecided":
        return f"UNDECIDED: {seeds_sentence(verdict)}"
    return {
        "equal": f"UPHELD: equal within ±{verdict.margin:g} pt"
        + (", though not zero" if verdict.interval.excludes_zero() else ""),
        "not zero": f"NOT ZERO: {side}; whether by more than {verdict.margin:g} pt is open",
    }.get(verdict.outcome, f"REFUTED: {side} by more than {verdict.margin:g} pt")


def seeds_sentence(verdict: st.AccuracyVerdict) -> str:
    """Return what would decide: so many seeds, or more test images."""
    needed, least = verdict.seeds_needed, st.fewest_seeds(verdict.comparisons)
    if verdict.seeds < 2:
        return f"one pair of runs has no spread; at least {least} seeds are needed"
    if verdict.seeds < least:
        among = f" where {verdict.comparisons} comparisons share the level" if verdict.comparisons > 1 else ""
        return f"{verdict.seeds} seeds decide nothing; at least {least} are needed{among}"
    if needed is None:
        return "no number of seeds would do with so few test images"
    if needed <= verdict.seeds:
        return "the difference lies near the margin, where more seeds decide slowly"
    return f"about {needed} seeds needed at the paired SD of {verdict.sd:.2f} pt seen here"


def difference_words(comparison: Comparison) -> str:
    """Return difference, both intervals and outcome in one line."""
    verdict = comparison.verdict
    beside = f" (these images: {interval_words(comparison.these_images)})" if comparison.new_images else ""
    level = f" {percent(verdict.interval.level)}" if verdict.comparisons > 1 else ""
    interval = f"{interval_words(verdict.interval)}{level}"
    return f"{verdict.interval.mean:+.2f} pt {interval}{beside} -> {outcome_sentence(verdict)}"


def percent(level: float) -> str:
    """Return a level.

    >>> percent(0.9875)
    '98.8 %'
    """
    return f"{100 * level:.3g} %"


def ratio_words(bracket: tt.Bracket) -> str:
    """Return a range of ratios.

    >>> ratio_words((0.4, 1.25)), ratio_words((2.0, math.inf)), ratio_words((0.0, math.inf))
    ('x0.40 to x1.25', 'x2.00 or more', 'any ratio')
    """
    if bracket[0] == 0:
        return f"up to x{bracket[1]:.2f}" if math.isfinite(bracket[1]) else "any ratio"
    if not math.isfinite(bracket[1]):
        return f"x{bracket[0]:.2f} or more"
    return f"x{bracket[0]:.2f} to x{bracket[1]:.2f}"
