"""The verdict on the prediction: what stands first, and its sentences on every budget."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_unfreeze.study.judge import statistics as st
from lightning_unfreeze.study.judge import time_to_target as tt
from lightning_unfreeze.study.judge.analysis import (
    AXIS_LABEL,
    BUDGETS,
    COSTS,
    Analysis,
    Axis,
    Comparison,
    CostAxis,
    skip_arm,
)
from lightning_unfreeze.study.judge.caveats import changes_of, limits_of
from lightning_unfreeze.study.judge.words import (
    COST_LABEL,
    difference_words,
    interval_words,
    outcome_sentence,
    outcome_words,
    percent,
    ratio_words,
)

PREDICTION = (
    'Prediction under test (fast.ai forum, 2018): "skipping steps 3 and 4 will make training to convergence\n'
    "take longer, but won't affect accuracy significantly.\""
)
EXIT_CODES: dict[st.Outcome, int] = {"equal": 0, "better": 3, "worse": 3, "undecided": 4, "not zero": 5}
"""Exit status of `study run` and `study report`, by the outcome of the primary comparison."""


@dataclass(frozen=True)
class StudyVerdict:
    """The verdict of a study.

    Attributes:
        outcome: Of the primary test, accuracy at the matched budget; undecided where that arm is missing.
        accuracy: Verdict at each budget that was run.
        time: Outcome of the primary arm's cost ratio, per axis.
        headline: What stands first: the outcome, its size with the interval, and what it is about.
        note: What must be known before it, such as seeds that were added after a look; empty as a rule.
        text: What is printed.
        changes: What would change the verdict.
        limits: What the report cannot show.
    """

    outcome: st.Outcome
    accuracy: Mapping[Axis, st.AccuracyVerdict]
    time: Mapping[CostAxis, tt.TimeOutcome]
    headline: tuple[str, str, str]
    note: str
    text: str
    changes: tuple[str, ...]
    limits: tuple[str, ...]


def judge(analysis: Analysis) -> StudyVerdict:
    """Return the verdict of a study, on all three budgets, with what would change it and what it cannot show."""
    info = analysis.info
    at_budget = {axis: analysis.comparisons.get(skip_arm(axis)) for axis in BUDGETS}
    accuracy = {axis: comparison.verdict for axis, comparison in at_budget.items() if comparison is not None}
    primary = at_budget[info.match]
    time: dict[CostAxis, tt.TimeOutcome] = {}
    if primary is not None:
        time = {axis: analysis.time_outcome(primary.arm, axis) for axis in COSTS}
        if not analysis.seconds_comparable:
            del time["seconds"]
    outcome: st.Outcome = primary.verdict.outcome if primary is not None else "undecided"
    changes, limits = tuple(changes_of(analysis)), tuple(limits_of(analysis))
    headline = _headline(analysis, primary)
    lines = [*([textwrap.fill(analysis.look.note, 118)] if analysis.look.note else [])]
    lines += [f"Verdict: {headline[0]}", f"  {headline[1]}  ({headline[2]})", PREDICTION, _data_line(analysis)]
    for axis in BUDGETS:
        label = f"  accuracy, same {AXIS_LABEL[axis]}"
        comparison = at_budget[axis]
        said = "not run" if comparison is None else difference_words(comparison)
        lines.append(f"{label:<34}: {said}{'  (primary)' if axis == info.match else ''}")
    if primary is not None and math.isfinite(primary.robust.low):
        robust = f"{primary.robust.mean:+.2f} pt {interval_words(primary.robust)} (these images)"
        lines.append(f"{'  the primary, Hodges-Lehmann':<34}: {robust}")
    if primary is not None and primary.shifted is not None:
        lines.append(f"{'  on shifted images (secondary)':<34}: {_shifted_words(primary.shifted)}")
    lines.append(f"{_cost_label(analysis):<34}: {_cost_sentence(analysis, primary)}")
    summary = f"The accuracy half is {_plain(accuracy.get(info.match))}, the time half is {_time(time, info.match)}."
    lines += [textwrap.fill(f"{summary} {_axis_sentence(accuracy)}", 118), "What would change this verdict:"]
    lines += [
        textwrap.fill(change, 118, initial_indent="  - ", subsequent_indent="    ")
        for change in changes or ("nothing that these runs show.",)
    ]
    lines.append("This is one data set and one architecture; it does not generalise by itself.")
    return StudyVerdict(outcome, accuracy, time, headline, analysis.look.note, "\n".join(lines), changes, limits)


def exit_code(verdict: StudyVerdict) -> int:
    """Return 0 for equal within the margin, 3 for better or worse beyond it, 5 for not zero, 4 for undecided."""
    return EXIT_CODES[verdict.outcome]


def _headline(analysis: Analysis, primary: Comparison | None) -> tuple[str, str, str]:
    """Return what stands first: the outcome, its size with the interval, and what it is about."""
    info = analysis.info
    about = f"{info.primary} minus {info.reference}, test accuracy at the same {AXIS_LABEL[info.match]}"
    if primary is None:
        return "UNDECIDED", "", f"{info.primary} and {info.reference} have no seed in common."
    verdict = primary.verdict
    kind = "other seeds and new images" if primary.new_images else "other seeds"
    size = f"{verdict.interval.mean:+.2f} pt {interval_words(verdict.interval)}"
    return outcome_sentence(verdict), size, f"{about}; {percent(verdict.interval.level)} interval for {kind}"


def _shifted_words(verdict: st.AccuracyVerdict) -> str:
    return f"{verdict.interval.mean:+.2f} pt {interval_words(verdict.interval)} -> {outcome_words(verdict)}"


def _data_line(analysis: Analysis) -> str:
    info, primary = analysis.info, analysis.comparisons.get(analysis.info.primary)
    seeds = len(primary.seeds) if primary else 0
    return (
        f"Your data: {info.dataset}, {info.n_train} train / {info.n_test} test images, {info.architecture}, "
        f"pretrained on {info.pretrained_on}. {seeds} paired seeds."
    )


def _cost_label(analysis: Analysis) -> str:
    return f"  cost to reach (best - {analysis.info.target_below_best:g} pt)"


def _cost_sentence(analysis: Analysis, primary: Comparison | None) -> str:
    if primary is None:
        return f"not run ({analysis.info.primary} is missing)"
    parts = []
    shown: tuple[CostAxis, ...] = ("images", "flops", "seconds")
    for axis in shown:
        cost = primary.costs[axis]
        if axis == "seconds" and not analysis.seconds_comparable:
            parts.append("seconds omitted")
        elif analysis.time_outcome(primary.arm, axis) == "not testable":
            parts.append(f"{AXIS_LABEL[axis]} not testable")
        else:
            parts.append(f"{AXIS_LABEL[axis]} {ratio_words(cost.bracket)}")
    cost = primary.costs["flops"]
    reached = f"reached by {cost.reached_a}/{cost.runs} skipping, {cost.reached_b}/{cost.runs} full runs"
    return f"{', '.join(parts)}\n{'':36}({reached}; ranges that cycle ends allow)"


def _time(time: Mapping[CostAxis, tt.TimeOutcome], match: Axis) -> str:
    """Return the outcome on the matched axis, and the other axes' where they differ."""
    outcome = time.get(match, "not testable")
    others = [f"{said} on {COST_LABEL[axis]}" for axis, said in time.items() if said != outcome]
    return f"{outcome} on {COST_LABEL[match]}" + (f" ({', '.join(others)})" if others else "")


def _axis_sentence(accuracy: Mapping[Axis, st.AccuracyVerdict]) -> str:
    if len(accuracy) < 2:
        return "Other budget axes were not run."
    said = {axis: _plain(verdict) for axis, verdict in accuracy.items()}
    if set(said.values()) == {"undecided"}:
        return f"On none of the {len(said)} budget axes that were run is it decided."
    if len(set(said.values())) == 1:
        return f"It does not depend on the budget axis: {next(iter(said.values()))} on all {len(said)} that were run."
    parts = ", ".join(f"{outcome} at the same {AXIS_LABEL[axis]}" for axis, outcome in said.items())
    sentence = f"Outcomes by budget axis: {parts}."
    decided = {outcome for outcome in said.values() if outcome.startswith(("upheld", "refuted"))}
    if len(decided) > 1:
        sentence += " It depends on the budget axis."
    if said.get("epochs") == "refuted (worse)" and len(decided) > 1:
        sentence += " Deleting the steps without spending what they cost is a smaller budget, not a worse recipe."
    return sentence


def _plain(verdict: st.AccuracyVerdict | None) -> str:
    if verdict is None:
        return "undecided"
    side = "better" if verdict.interval.mean > 0 else "worse"
    return {
        "equal": "upheld",
        "undecided": "undecided",
        "not zero": f"not zero ({side}, size open)",
    }.get(verdict.outcome, f"refuted ({side})")
