"""The tables of a report: all their numbers for a CSV, and the fewer, rounded cells that are shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lightning_unfreeze.study.judge import statistics as st
from lightning_unfreeze.study.judge import time_to_target as tt
from lightning_unfreeze.study.judge.analysis import COSTS, Analysis, Comparison, CostAxis, converged_at
from lightning_unfreeze.study.judge.words import outcome_words, percent, ratio_words
from lightning_unfreeze.study.runs.records import RunRecord

_LONGER = {"upheld": "yes", "refuted": "no, shorter"} | {
    name: name for name in ("undecided", "not testable", "omitted")
}


@dataclass(frozen=True)
class Table:
    """One table of the report: all its numbers for the CSV, and the fewer, rounded cells that are shown."""

    name: str
    title: str
    note: str
    data: pd.DataFrame
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables_of(analysis: Analysis) -> list[Table]:
    """Return the tables of a report that its runs allow."""
    shifts = shift_table(analysis)
    first = [comparison_table(analysis), *([] if shifts is None else [shifts])]
    return [*first, arm_table(analysis), budget_table(analysis), cost_table(analysis), pairwise_table(analysis)]


def arm_table(analysis: Analysis) -> Table:
    """Return what each arm reached, means over its seeds."""
    data = pd.DataFrame([_arm_row(arm, list(analysis.runs[arm].values())) for arm in analysis.arms])
    rows = tuple(
        (
            row["arm"],
            str(row["runs"]),
            _with_sd(row["acc"], row["acc_sd"]),
            _number(row["acc_tta"], "{:.2f}"),
            _flips(row["tta_fixed"], row["tta_broken"]),
            _number(row["nll"], "{:.3f}"),
            _number(row["ece"], "{:.3f}"),
            _rate(row),
            f"{row['converged']}/{row['runs']}",
        )
        for row in data.to_dict("records")
    )
    columns = ("arm", "runs", "test acc % (SD)", "+ TTA", "fixed / broken", "NLL", "ECE", "rate", "converged")
    note = (
        "Means over seeds; SD over seeds. Fixed / broken: test images that test-time augmentation turned right / "
        "wrong. An asterisk marks a tuned rate at the edge of its grid. Converged: runs whose accuracy had stopped "
        "rising before their last cycle end."
    )
    return Table("arms", "Arms", note, data, columns, rows)


def comparison_table(analysis: Analysis) -> Table:
    """Return every arm against the reference, with all the statistics."""
    data = pd.DataFrame([_comparison_row(c) for c in analysis.comparisons.values()])
    rows = tuple(
        (
            row["arm"] + (" (primary)" if row["role"] == "primary" else ""),
            str(row["pairs"]),
            f"{row['difference']:+.2f}",
            _range(row["low"], row["high"]) + f" {percent(row['level'])}",
            row["said"],
            _range(row["these_low"], row["these_high"]),
            f"{row['robust']:+.2f} {_range(row['robust_low'], row['robust_high'])}",
            _p(row["p_zero"]),
            _p(row["p_equal"]),
            _p(row["p_sign_flip"]),
            _p(row["p_holm"]),
            f"{row['p_better']:.2f} {_range(row['p_better_low'], row['p_better_high'], sign='')}",
        )
        for row in data.to_dict("records")
    )
    columns = (
        *("arm", "pairs", "Δ pt", "for new images", "outcome", "these images", "Hodges-Lehmann"),
        *("p (0)", "p equal", "p flip", "p flip, Holm", "P(better)"),
    )
    note = (
        f"Test accuracy minus that of {analysis.info.reference}, same seeds. 'For new images' counts seeds and test "
        f"images, and the outcome follows it; it is a 95 % interval for the primary arm, and wider for the "
        f"{analysis.num_secondary} secondary ones, which share the level. 'These images' and Hodges-Lehmann are of the "
        "same level over seeds alone. p (0), p equal: for new images, no difference, and one within "
        f"±{analysis.info.margin:g} pt; corrected alike. p flip: sign-flip test over seeds. P(better): share of seeds, "
        "with Wilson's interval. 'Not significant' is never 'no difference': that is what p equal is for."
    )
    return Table("comparisons", f"Accuracy against {analysis.info.reference}", note, data, columns, rows)


def _comparison_row(c: Comparison) -> dict[str, Any]:
    verdict, effect = c.verdict, c.verdict.effect
    shared = verdict.comparisons
    return {
        "arm": c.arm,
        "role": "primary" if c.p_holm is None else "secondary",
        "pairs": len(c.seeds),
        "difference": effect.mean,
        "sd": verdict.sd,
        "level": verdict.interval.level,
        "low": verdict.interval.low,
        "high": verdict.interval.high,
        "equivalence_low": verdict.equivalence.low,
        "equivalence_high": verdict.equivalence.high,
        "these_low": c.these_images.low,
        "these_high": c.these_images.high,
        "robust": c.robust.mean,
        "robust_low": c.robust.low,
        "robust_high": c.robust.high,
        "image_error": math.sqrt(effect.image_variance) if c.new_images else math.nan,
        "disagreement": c.disagreement,
        "p_zero": min(1.0, shared * effect.p_zero()),
        "p_equal": min(1.0, shared * effect.p_equal(verdict.margin)),
        "p_sign_flip": c.p,
        "p_holm": c.p_holm,
        "p_better": c.better.mean,
        "p_better_low": c.better.low,
        "p_better_high": c.better.high,
        "outlying_seeds": " ".join(map(str, c.outliers)),
        "outcome": verdict.outcome,
        "said": outcome_words(verdict),
    }


def shift_table(analysis: Analysis) -> Table | None:
    """Return every arm against the reference on shifted test images, None where they were not scored."""
    found = [c for c in analysis.comparisons.values() if c.shifted is not None]
    data = pd.DataFrame(
        [
            {
                "arm": c.arm,
                "acc_ood": 100 * float(np.mean([analysis.runs[c.arm][seed].acc_ood for seed in c.seeds])),
                "difference": c.shifted.interval.mean,
                "low": c.shifted.interval.low,
                "high": c.shifted.interval.high,
                "level": c.shifted.interval.level,
                "outcome": c.shifted.outcome,
                "said": outcome_words(c.shifted),
            }
            for c in found
            if c.shifted is not None
        ]
    )
    if data.empty:
        return None
    rows = tuple(
        (
            row["arm"],
            f"{row['acc_ood']:.2f}",
            f"{row['difference']:+.2f}",
            f"{_range(row['low'], row['high'])} {percent(row['level'])}",
            row["said"],
        )
        for row in data.to_dict("records")
    )
    note = (
        "Mean over noise, low contrast, blur and brightness, the same images under each; a secondary question with a "
        f"level of its own, which its {len(found)} arms share. For other seeds and new images."
    )
    return Table(
        "shifts", "On shifted images", note, data, ("arm", "accuracy %", "Δ pt", "for new images", "outcome"), rows
    )


def budget_table(analysis: Analysis) -> Table:
    """Return what each arm's run and its tuning took."""
    data = pd.DataFrame(
        [
            {
                "arm": arm,
                **{
                    field: float(np.mean([getattr(run, field) for run in runs.values()]))
                    for field in ("images", "flops", "seconds", "tuning_images", "tuning_flops", "tuning_seconds")
                },
            }
            for arm, runs in analysis.runs.items()
        ]
    )
    reference = data[data.arm == analysis.info.reference]
    for field in ("images", "flops"):
        data[f"{field}_of_reference"] = data[field] / (reference[field].iloc[0] if len(reference) else math.nan)
    rows = tuple(
        (
            row["arm"],
            f"{_si(row['images'])} ({_number(row['images_of_reference'], 'x{:.2f}')})",
            f"{_si(row['flops'])} ({_number(row['flops_of_reference'], 'x{:.2f}')})",
            _number(row["seconds"], "{:.1f}"),
            _si(row["tuning_images"]) if row["tuning_images"] else "-",
            _si(row["tuning_flops"]) if row["tuning_images"] else "-",
            _number(row["tuning_seconds"] or math.nan, "{:.0f}"),
        )
        for row in data.to_dict("records")
    )
    charged = "is" if analysis.info.charge_tuning else "is not"
    note = f"Mean of a run, and all of an arm's tuning together, which {charged} part of the costs to the target below."
    columns = ("arm", "images", "FLOPs", "s", "tuning: images", "FLOPs", "s")
    return Table("budgets", "Budgets", note, data, columns, rows)


def cost_table(analysis: Analysis) -> Table:
    """Return the cost to the target of every arm over the reference's, per axis, with what censoring leaves."""
    reference = list(analysis.runs.get(analysis.info.reference, {}).values())
    data = pd.DataFrame(
        [
            _cost_row(analysis, c.arm, axis, c.costs[axis], reference)
            for c in analysis.comparisons.values()
            for axis in COSTS
        ]
    )
    rows = tuple(
        (
            row["arm"],
            row["axis"],
            f"{row['reached']}/{row['runs']} vs {row['reference_reached']}/{row['runs']}",
            ratio_words((row["bracket_low"], row["bracket_high"])),
            ratio_words((row["low"], row["high"])),
            _number(row["restricted_mean_ratio"], "x{:.2f}"),
            _si(row["median"]),
            _LONGER[row["outcome"]],
        )
        for row in data.to_dict("records")
    )
    target = (
        "no target" if analysis.target is None else f"{100 * analysis.target:.1f} % validation accuracy at a cycle end"
    )
    note = (
        f"Target: {target}. Mean ratio: what cycle ends allow, as the target was met between two of them. 95 %: limits "
        "that hold the sampling of seeds too. Restricted mean: all runs, each counted up to the cost at which the "
        "shorter arm ended. Median: Kaplan-Meier, all runs. The outcome answers 'takes longer': yes or no only where "
        "the limits lie on one side of 1; 'not testable' where they do not and fewer than 70 % of either arm's runs "
        "reached the target."
    )
    columns = ("arm", "cost", "reached", "mean ratio", "95 %", "restricted mean", "median", "takes longer?")
    return Table("costs", "Cost to the target", note, data, columns, rows)


def pairwise_table(analysis: Analysis) -> Table:
    """Return the mean accuracy difference of every two arms on the seeds both have, row minus column."""
    arms = analysis.arms
    cells = {(a, b): _pair(analysis, a, b) for a in arms for b in arms if a != b}
    data = pd.DataFrame(
        [
            {"arm": a, "minus": b, "pairs": pairs, "difference": i.mean, "low": i.low, "high": i.high}
            for (a, b), (pairs, i) in cells.items()
        ],
        columns=["arm", "minus", "pairs", "difference", "low", "high"],
    )

    def cell(a: str, b: str) -> str:
        if a == b or cells[a, b][0] == 0:
            return "·"
        interval = cells[a, b][1]
        return f"{interval.mean:+.2f}{'*' if interval.excludes_zero() else ''}"

    rows = tuple((a, *(cell(a, b) for b in arms)) for a in arms)
    note = (
        "Points, row minus column, on these test images; an asterisk where the interval over seeds excludes zero at a "
        "level that all pairs share (Bonferroni). With one data set there is no critical-difference diagram: seeds are "
        "not independent draws from a population of tasks."
    )
    return Table("pairwise", "All pairs", note, data, ("", *arms), rows)


def _arm_row(arm: str, runs: Sequence[RunRecord]) -> dict[str, Any]:
    def mean(field: str, scale: float = 1.0) -> float:
        values = [getattr(run, field) for run in runs if getattr(run, field) is not None]
        return scale * float(np.mean(values)) if values else math.nan

    accuracies = [100 * run.acc for run in runs]
    distortions = sorted({name for run in runs for name in run.distortion})
    return {
        "arm": arm,
        "runs": len(runs),
        "acc": float(np.mean(accuracies)),
        "acc_sd": float(np.std(accuracies, ddof=1)) if len(runs) > 1 else math.nan,
        "acc_tta": mean("acc_tta", 100),
        "acc_ood": mean("acc_ood", 100),
        **{
            field: mean(field)
            for field in (
                *("tta_fixed", "tta_broken", "nll", "ece"),
                *("images", "flops", "seconds", "train_seconds", "eval_seconds"),
                *("lr_find_seconds", "peak_memory_bytes", "tuned_lr", "tuning_images", "tuning_flops"),
            )
        },
        "lr_at_grid_edge": any(run.lr_at_grid_edge for run in runs),
        "converged": sum(converged_at(run) is not None for run in runs),
        **{name: float(np.mean([run.distortion.get(name, math.nan) for run in runs])) for name in distortions},
    }


def _cost_row(
    analysis: Analysis, arm: str, axis: CostAxis, cost: tt.CostRatio, reference: Sequence[RunRecord]
) -> dict[str, Any]:
    sides = [[analysis.cost(run, axis) for run in runs] for runs in (analysis.runs[arm].values(), reference)]
    columns = [([value for value, _ in side], [reached for _, reached in side]) for side in sides]
    horizon = min(max(values) for values, _ in columns)
    means = [tt.restricted_mean(values, reached, horizon) if horizon > 0 else math.nan for values, reached in columns]
    median = tt.kaplan_meier_median(*columns[0])
    omitted = axis == "seconds" and not analysis.seconds_comparable
    return {
        "arm": arm,
        "axis": axis,
        "runs": cost.runs,
        "reached": cost.reached_a,
        "reference_reached": cost.reached_b,
        "bracket_low": cost.bracket[0],
        "bracket_high": cost.bracket[1],
        "low": cost.interval[0],
        "high": cost.interval[1],
        "restricted_mean_ratio": means[0] / means[1],
        "median": math.nan if median is None else median,
        "outcome": "omitted" if omitted else analysis.time_outcome(arm, axis),
    }


def _pair(analysis: Analysis, a: str, b: str) -> tuple[int, st.Interval]:
    seeds = sorted(analysis.runs[a].keys() & analysis.runs[b].keys())
    if not seeds:
        return 0, st.Interval(math.nan, math.nan, math.nan)
    pairs = math.comb(len(analysis.arms), 2)
    return len(seeds), st.paired_t_interval(analysis.differences(a, b, seeds), 1 - st.ALPHA / pairs)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else form.format(value)


def _p(value: float | None) -> str:
    return "< 0.001" if value is not None and value < 0.001 else _number(value, "{:.3f}")


def _with_sd(value: float, sd: float) -> str:
    return f"{value:.2f}" if math.isnan(sd) else f"{value:.2f} ({sd:.2f})"


def _flips(fixed: float, broken: float) -> str:
    return "-" if math.isnan(fixed) or math.isnan(broken) else f"{fixed:.0f} / {broken:.0f}"


def _range(low: float, high: float, sign: str = "+") -> str:
    return "-" if math.isnan(low) else f"[{low:{sign}.2f}, {high:{sign}.2f}]"


def _rate(row: Mapping[str, Any]) -> str:
    return "-" if math.isnan(row["tuned_lr"]) else f"{row['tuned_lr']:.3g}{'*' if row['lr_at_grid_edge'] else ''}"


def _si(value: float) -> str:
    """Return a count with three digits and its power of a thousand."""
    if math.isnan(value):
        return "-"
    power = 0 if value < 1 else min(int(math.log10(value) // 3), 6)
    return f"{value / 1000**power:.3g}{('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}"
