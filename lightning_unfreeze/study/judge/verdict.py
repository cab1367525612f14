"""The verdict on the prediction: its sentences on every budget, what would change it, and what it cannot show."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lightning_unfreeze.study.judge import statistics as st
from lightning_unfreeze.study.judge.analysis import (
    AXIS_LABEL,
    BUDGETS,
    COSTS,
    MAX_PROBE_CV,
    Analysis,
    Axis,
    Comparison,
    CostAxis,
    skip_arm,
)

PREDICTION = (
    'Prediction under test (fast.ai forum, 2018): "skipping steps 3 and 4 will make training to convergence\n'
    "take longer, but won't affect accuracy significantly.\""
)
BUDGET_TOLERANCE = 0.05
_COST_LABEL: dict[CostAxis, str] = {**AXIS_LABEL, "epochs": "epochs"}
UNTUNED_BY_DESIGN = ("no_lr_find",)


@dataclass(frozen=True)
class StudyVerdict:
    """The verdict of a study.

    Attributes:
        outcome: Of the primary test, accuracy at the matched budget; undecided where that arm is missing.
        accuracy: Verdict at each budget that was run.
        time: Outcome of the primary arm's cost ratio, per axis.
        text: What is printed.
        changes: What would change the verdict.
        limits: What the report cannot show.
    """

    outcome: st.Outcome
    accuracy: Mapping[Axis, st.AccuracyVerdict]
    time: Mapping[CostAxis, st.TimeOutcome]
    text: str
    changes: tuple[str, ...]
    limits: tuple[str, ...]


def judge(analysis: Analysis) -> StudyVerdict:
    """Return the verdict of a study, on all three budgets, with what would change it and what it cannot show."""
    info = analysis.info
    at_budget = {axis: analysis.comparisons.get(skip_arm(axis)) for axis in BUDGETS}
    accuracy = {axis: comparison.verdict for axis, comparison in at_budget.items() if comparison is not None}
    primary = at_budget[info.match]
    time: dict[CostAxis, st.TimeOutcome] = {}
    if primary is not None:
        time = {axis: analysis.time_outcome(primary.arm, axis) for axis in COSTS}
        if not analysis.seconds_comparable:
            del time["seconds"]
    outcome: st.Outcome = primary.verdict.outcome if primary is not None else "undecided"
    changes, limits = tuple(_changes(analysis)), tuple(_limits(analysis))
    lines = [PREDICTION, _data_line(analysis)]
    for axis in BUDGETS:
        label = f"  accuracy, same {AXIS_LABEL[axis]}"
        comparison = at_budget[axis]
        said = "not run" if comparison is None else accuracy_sentence(comparison.verdict) + _after_holm(comparison)
        lines.append(f"{label:<34}: {said}{'  (primary)' if axis == info.match else ''}")
    if primary is not None and primary.total is not None:
        lines.append(f"{'  the primary, on new images too':<34}: {_interval(primary.total)}")
    lines.append(f"{_cost_label(analysis):<34}: {_cost_sentence(analysis, primary)}")
    summary = f"Verdict: the accuracy half is {_plain(outcome)}, the time half is {_time_sentence(time, info.match)}."
    lines += [textwrap.fill(f"{summary} {_axis_sentence(accuracy)}", 118), "What would change this verdict:"]
    lines += [
        textwrap.fill(change, 118, initial_indent="  - ", subsequent_indent="    ")
        for change in changes or ("nothing that these runs show.",)
    ]
    lines.append("This is one data set and one architecture; it does not generalise by itself.")
    return StudyVerdict(outcome, accuracy, time, "\n".join(lines), changes, limits)


def exit_code(verdict: StudyVerdict) -> int:
    """Return 0 where the primary test upholds the prediction, 3 where it refutes it, 4 where it is undecided."""
    return {"upheld": 0, "small": 0, "refuted-": 3, "refuted+": 3, "undecided": 4}[verdict.outcome]


def accuracy_sentence(verdict: st.AccuracyVerdict) -> str:
    """Return difference, interval and outcome in one line."""
    if verdict.outcome == "undecided":
        said = f"UNDECIDED: {_seeds_sentence(verdict)}"
    else:
        said = {
            "upheld": f"UPHELD within ±{verdict.margin:g} pt",
            "small": f"UPHELD: real, but smaller than your margin of ±{verdict.margin:g} pt",
            "refuted-": "REFUTED: skipping is worse",
            "refuted+": "REFUTED: skipping is better",
        }[verdict.outcome]
    return f"{verdict.interval.mean:+.2f} pt {_interval(verdict.interval)} -> {said}"


def _after_holm(comparison: Comparison) -> str:
    """Return a warning where a secondary refutation does not survive the correction for the number of arms."""
    refuted = comparison.verdict.outcome.startswith("refuted")
    if not refuted or comparison.p_holm is None or comparison.p_holm <= 0.05:
        return ""
    return f" (before Holm; p = {comparison.p_holm:.2f} after)"


def _seeds_sentence(verdict: st.AccuracyVerdict) -> str:
    needed = verdict.seeds_needed
    if needed is None:
        return f"one pair of runs has no spread; at least {st.MIN_SEEDS_SIGN_FLIP} seeds are needed"
    if verdict.seeds < st.MIN_SEEDS_SIGN_FLIP == needed:
        return f"{verdict.seeds} seeds decide nothing; at least {st.MIN_SEEDS_SIGN_FLIP} are needed"
    if needed <= verdict.seeds:
        return "the difference lies near the margin, where more seeds decide slowly"
    return f"about {needed} seeds needed at the paired SD of {verdict.sd:.2f} pt seen here"


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
        elif cost.ratio is None or not cost.testable:
            parts.append(f"{AXIS_LABEL[axis]} not testable")
        else:
            parts.append(f"{AXIS_LABEL[axis]} x{cost.ratio.mean:.2f} [{cost.ratio.low:.2f}, {cost.ratio.high:.2f}]")
    cost = primary.costs["flops"]
    reached = f"reached by {cost.reached_a}/{cost.runs} skipping, {cost.reached_b}/{cost.runs} full runs"
    return f"{', '.join(parts)}\n{'':36}({reached})"


def _time_sentence(time: Mapping[CostAxis, st.TimeOutcome], match: Axis) -> str:
    """Return the outcome on the matched axis, and the other axes' where they differ."""
    outcome = time.get(match, "not testable")
    others = [f"{said} on {_COST_LABEL[axis]}" for axis, said in time.items() if said != outcome]
    return f"{outcome} on {_COST_LABEL[match]}" + (f" ({', '.join(others)})" if others else "")


def _axis_sentence(accuracy: Mapping[Axis, st.AccuracyVerdict]) -> str:
    if len(accuracy) < 2:
        return "Other budget axes were not run."
    said = {axis: _plain(verdict.outcome) for axis, verdict in accuracy.items()}
    if set(said.values()) == {"undecided"}:
        return f"On none of the {len(said)} budget axes that were run is it decided."
    if len(set(said.values())) == 1:
        return f"It does not depend on the budget axis: {next(iter(said.values()))} on all {len(said)} that were run."
    parts = ", ".join(f"{outcome} at the same {AXIS_LABEL[axis]}" for axis, outcome in said.items())
    sentence = f"It depends on the budget axis: {parts}."
    if said.get("epochs") == "refuted (worse)" and len(set(said.values())) > 1:
        sentence += " Deleting the steps without spending what they cost is a smaller budget, not a worse recipe."
    return sentence


def _plain(outcome: st.Outcome) -> str:
    return {
        "upheld": "upheld",
        "small": "upheld (a real difference below the margin)",
        "refuted-": "refuted (worse)",
        "refuted+": "refuted (better)",
        "undecided": "undecided",
    }[outcome]


def _interval(interval: st.Interval) -> str:
    return f"[{interval.low:+.2f}, {interval.high:+.2f}]"


def _changes(analysis: Analysis) -> list[str]:
    """Return what would change the verdict, of what these runs show."""
    info, found = analysis.info, []
    primary = analysis.comparisons.get(info.primary)
    if primary is None:
        return [f"Running {info.reference} and {info.primary} with the same seeds: the primary comparison has no pair."]
    verdict, seeds = primary.verdict, len(primary.seeds)
    if verdict.outcome == "undecided":
        found.append(f"Seeds: {_seeds_sentence(verdict)} (fix the number before running; do not add until it fits).")
    if seeds < st.MIN_SEEDS_SIGN_FLIP:
        found.append(
            f"Seeds: with {seeds} the smallest possible sign-flip p is {2 / 2**seeds:g}, so only the t interval, "
            f"which assumes normal differences, would speak: {st.MIN_SEEDS_SIGN_FLIP} seeds are the least that decide."
        )
    if verdict.sd == 0:
        found.append("Seeds: every pair gave the same difference, so the interval has no width; that is no certainty.")
    if primary.total is not None and primary.disagreement is not None:
        error = st.image_standard_error(primary.disagreement, info.n_test)
        wide_upheld = verdict.upheld and not primary.total.within(info.margin)
        wide_refuted = verdict.outcome.startswith("refuted") and not primary.total.excludes_zero()
        if wide_upheld or wide_refuted:
            found.append(
                f"Test images: on new images the interval is {_interval(primary.total)}, which does not settle it. "
                f"Two runs disagree on {primary.disagreement:.0%} of {info.n_test} images, up to {error:.2f} pt of "
                "standard error that no number of seeds removes."
            )
    same = [_COST_LABEL[axis] for axis, cost in primary.costs.items() if cost.same_in_all_pairs]
    if same:
        found.append(
            f"Cost: on {', '.join(same)} every pair gave the same ratio, because costs are read at cycle ends; "
            "shorter cycles would resolve it, and its interval is no measure of certainty."
        )
    bracket = analysis.cost_bracket(info.primary, info.match)
    outcome = st.time_verdict(primary.costs[info.match])
    if bracket and ((outcome == "upheld" and bracket[0] <= 1) or (outcome == "refuted" and bracket[1] >= 1)):
        highest = f"x{bracket[1]:.2f}" if math.isfinite(bracket[1]) else "any"
        found.append(
            "Cost: the target may have been met between two cycle ends, which allows ratios of "
            f"{_COST_LABEL[info.match]} from x{bracket[0]:.2f} to {highest}; the verdict rests on where cycles end."
        )
    edges = [arm for arm in analysis.arms if any(run.lr_at_grid_edge for run in analysis.runs[arm].values())]
    named = [arm for arm in edges if arm in (info.reference, *map(skip_arm, BUDGETS))]
    if named:
        found.append(
            f"Learning rates: the best one lay at the edge of the grid for {', '.join(named)}; widen the grid."
        )
    for arm in (info.reference, info.primary):
        late, runs = analysis.not_converged(arm), len(analysis.runs[arm])
        if late:
            found.append(f"Length: {late} of {runs} runs of {arm} still improved at their last cycle end.")
    return found + _budget_mismatches(analysis)


def _budget_mismatches(analysis: Analysis) -> list[str]:
    """Return the arms whose budget is not what their name says."""
    found = []
    for axis in ("flops", "images"):
        comparison = analysis.comparisons.get(f"skip34@{axis}")
        if comparison is None:
            continue
        spent = [
            np.mean([getattr(analysis.runs[arm][seed], axis) for seed in comparison.seeds])
            for arm in (comparison.arm, analysis.info.reference)
        ]
        if abs(spent[0] / spent[1] - 1) > BUDGET_TOLERANCE:
            found.append(
                f"Budget: {comparison.arm} spent x{spent[0] / spent[1]:.2f} the {axis} of {analysis.info.reference}, "
                f"more than {BUDGET_TOLERANCE:.0%} off; that comparison is not matched."
            )
    return found


def _limits(analysis: Analysis) -> list[str]:
    """Return what the report cannot show."""
    info, arms = analysis.info, analysis.arms
    found = [
        "One data set, one backbone, one recipe: a different one may give another verdict.",
        "The interval over seeds is for other seeds on these test images; the one over seeds and images for new "
        "images of the same kind. Neither speaks for other data.",
        "One comparison is primary. The others carry Holm's p-value, and their intervals are not adjusted.",
        "The t interval assumes about normal differences; with skewed ones it covers about 90 % instead of 95 % at "
        "5 to 10 seeds.",
        f"The cost target is read off {info.reference}'s own validation curves at cycle ends, so a cost ratio is no "
        "finer than the cycles. It leaves out pairs that did not reach the target; restricted means and "
        "Kaplan-Meier medians do not.",
        "Images and FLOPs of tuning are listed, but are in no arm's cost.",
        "Displacement and CKA say how far features moved, not whether they got worse.",
        f"Arms are not ranked with a critical difference: that takes {st.MIN_DATASETS_RANKING} data sets or "
        "more (`study merge`).",
    ]
    if not analysis.seconds_comparable:
        cv = analysis.probe_cv
        why = (
            "runs carry no throughput probe" if cv is None else f"the throughput probe varied by {cv:.0%} between runs"
        )
        found.append(f"No verdict on seconds: {why} (at most {MAX_PROBE_CV:.0%} is allowed).")
    missing = [arm for arm in (*info.arms, info.reference, *map(skip_arm, BUDGETS)) if arm not in arms]
    if missing:
        found.append(f"Not run, and so not in the tables: {', '.join(dict.fromkeys(missing))}.")
    alone = {arm: sorted(analysis.runs[arm].keys() ^ analysis.runs.get(info.reference, {}).keys()) for arm in arms}
    unpaired = [f"{arm} ({len(seeds)})" for arm, seeds in alone.items() if seeds]
    if unpaired:
        found.append(
            f"Seeds without a partner in {info.reference} were left out of comparisons: {', '.join(unpaired)}."
        )
    untuned = [arm for arm in arms if arm not in UNTUNED_BY_DESIGN and not _tuned(analysis, arm)]
    if untuned:
        found.append(f"Rates were not tuned per arm for {', '.join(untuned)}: a comparison may be one of rates.")
    versions = sorted({run.code_version for arm in arms for run in analysis.runs[arm].values()})
    if len(versions) > 1:
        found.append(f"Runs come from {len(versions)} versions of the code: {', '.join(versions)}.")
    return found


def _tuned(analysis: Analysis, arm: str) -> bool:
    return all(run.tuned_lr is not None and len(run.tuning_curve) > 1 for run in analysis.runs[arm].values())
