"""The report of a study on disk: Markdown, one self-contained HTML file, PNG and CSV per picture, CSV per table."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lightning_unfreeze.study.judge import statistics as st
from lightning_unfreeze.study.judge.analysis import COSTS, OUTCOME_WORDS, Analysis, CostAxis, StudyInfo, converged_at
from lightning_unfreeze.study.judge.verdict import StudyVerdict, exit_code, judge
from lightning_unfreeze.study.runs.records import RunRecord
from lightning_unfreeze.study.show.plots import PLOTS

DPI = 110
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


@dataclass(frozen=True)
class Picture:
    """One picture of the report."""

    name: str
    caption: str
    png: bytes
    data: pd.DataFrame

    @property
    def base64(self) -> str:
        """The PNG as text, for an image within the HTML."""
        return base64.b64encode(self.png).decode()


def write_report(records: Sequence[RunRecord], info: StudyInfo, folder: str | os.PathLike[str]) -> StudyVerdict:
    """Write the report of a study and return its verdict.

    Writes ``report.md``, ``report.html`` (nothing outside it is needed to read it), ``verdict.txt``,
    ``plots/NAME.png`` with ``plots/NAME.csv``, and ``tables/NAME.csv``. Missing arms and measurements are left out,
    and said to be.

    Args:
        records: Finished runs, as `RunLog.read` gives them.
        info: What the study was.
        folder: Where to write; made where it is missing.

    Raises:
        ValueError: There is no run, or the runs are of several data sets or settings.
    """
    analysis = Analysis(records, info)
    verdict = judge(analysis)
    tables = [arm_table(analysis), comparison_table(analysis), cost_table(analysis), pairwise_table(analysis)]
    pictures, absent = _pictures(analysis)
    root = Path(folder)
    for part in ("plots", "tables"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (root / "plots" / f"{picture.name}.png").write_bytes(picture.png)
        picture.data.to_csv(root / "plots" / f"{picture.name}.csv", index=False)
    for table in tables:
        table.data.to_csv(root / "tables" / f"{table.name}.csv", index=False)
    context = {
        "info": info,
        "verdict": verdict,
        "code": exit_code(verdict),
        "tables": tables,
        "pictures": pictures,
        "absent": absent,
        "runs": sum(len(runs) for runs in analysis.runs.values()),
    }
    (root / "report.md").write_text(_render("report.md.jinja", context), encoding="utf-8")
    (root / "report.html").write_text(_render("report.html.jinja", context), encoding="utf-8")
    (root / "verdict.txt").write_text(verdict.text + "\n", encoding="utf-8")
    return verdict


def arm_table(analysis: Analysis) -> Table:
    """Return what each arm reached and what it spent, means over its seeds."""
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
            _si(row["images"]),
            _si(row["flops"]),
            _number(row["seconds"], "{:.1f}"),
            _rate(row),
            f"{row['converged']}/{row['runs']}",
        )
        for row in data.to_dict("records")
    )
    columns = (
        "arm",
        "runs",
        "test acc % (SD)",
        "+ TTA",
        "fixed / broken",
        "NLL",
        "ECE",
        "images",
        "FLOPs",
        "s",
        "rate",
        "converged",
    )
    note = (
        "Means over seeds; SD over seeds. Fixed / broken: test images that test-time augmentation turned right / "
        "wrong. "
        "An asterisk marks a tuned rate at the edge of its grid. Converged: runs whose accuracy had stopped "
        "rising before "
        "their last cycle end."
    )
    return Table("arms", "Arms", note, data, columns, rows)


def comparison_table(analysis: Analysis) -> Table:
    """Return every arm against the reference, with all the statistics."""
    data = pd.DataFrame(
        [
            {
                "arm": c.arm,
                "role": "primary" if c.p_holm is None else "secondary",
                "pairs": len(c.seeds),
                "difference": c.verdict.interval.mean,
                "sd": c.verdict.sd,
                "ci95_low": c.verdict.interval.low,
                "ci95_high": c.verdict.interval.high,
                "ci90_low": c.verdict.equivalence.low,
                "ci90_high": c.verdict.equivalence.high,
                "total_low": c.total.low if c.total else math.nan,
                "total_high": c.total.high if c.total else math.nan,
                "disagreement": c.disagreement,
                "p_sign_flip": c.p,
                "p_holm": c.p_holm,
                "p_equivalence": st.tost_p(c.differences, analysis.info.margin),
                "p_better": c.better.mean,
                "p_better_low": c.better.low,
                "p_better_high": c.better.high,
                "outcome": c.verdict.outcome,
            }
            for c in analysis.comparisons.values()
        ]
    )
    rows = tuple(
        (
            row["arm"] + (" (primary)" if row["role"] == "primary" else ""),
            str(row["pairs"]),
            f"{row['difference']:+.2f}",
            _range(row["ci95_low"], row["ci95_high"]),
            _range(row["total_low"], row["total_high"]),
            _p(row["p_sign_flip"]),
            _p(row["p_holm"]),
            _p(row["p_equivalence"]),
            f"{row['p_better']:.2f} [{row['p_better_low']:.2f}, {row['p_better_high']:.2f}]",
            OUTCOME_WORDS[row["outcome"]],
        )
        for row in data.to_dict("records")
    )
    columns = (
        "arm",
        "pairs",
        "Δ pt",
        "95 % seeds",
        "95 % seeds + images",
        "p",
        "p Holm",
        "p equiv.",
        "P(better)",
        "outcome",
    )
    note = (
        f"Test accuracy minus that of {analysis.info.reference}, same seeds. p: sign-flip test. p equiv.: two "
        f"one-sided tests "
        f"against ±{analysis.info.margin:g} pt. P(better): share of seeds, with Wilson's interval. The intervals "
        f"are not "
        "adjusted for the number of arms. 'Not significant' is never 'no difference': that is what p equiv. is for."
    )
    return Table("comparisons", f"Accuracy against {analysis.info.reference}", note, data, columns, rows)


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
            "-" if math.isnan(row["ratio"]) else f"x{row['ratio']:.2f} {_range(row['low'], row['high'], sign='')}",
            "-" if math.isnan(row["bracket_low"]) else f"x{row['bracket_low']:.2f} to x{row['bracket_high']:.2f}",
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
        f"Target: {target}. Ratio: geometric mean over the pairs in which both arms reached it. Between cycle "
        f"ends: what it can be if the target was met before the cycle end at which that was seen. Restricted "
        f"mean: all runs, each "
        "counted up to the cost at which the shorter arm ended. Median: Kaplan-Meier, all runs. The outcome "
        "answers 'takes "
        "longer', and is 'not testable' where fewer than 70 % of either arm's runs reached the target."
    )
    columns = (
        "arm",
        "cost",
        "reached",
        "ratio, 95 %",
        "between cycle ends",
        "restricted mean",
        "median",
        "takes longer?",
    )
    return Table("costs", "Cost to the target", note, data, columns, rows)


def pairwise_table(analysis: Analysis) -> Table:
    """Return the mean accuracy difference of every two arms on the seeds both have, row minus column."""
    arms = analysis.arms
    cells = {(a, b): _pair(analysis, a, b) for a in arms for b in arms if a != b}
    data = pd.DataFrame(
        [
            {"arm": a, "minus": b, "pairs": pairs, "difference": i.mean, "ci95_low": i.low, "ci95_high": i.high}
            for (a, b), (pairs, i) in cells.items()
        ],
        columns=["arm", "minus", "pairs", "difference", "ci95_low", "ci95_high"],
    )

    def cell(a: str, b: str) -> str:
        if a == b or cells[a, b][0] == 0:
            return "·"
        interval = cells[a, b][1]
        return f"{interval.mean:+.2f}{'*' if interval.excludes_zero() else ''}"

    rows = tuple((a, *(cell(a, b) for b in arms)) for a in arms)
    note = (
        "Points, row minus column; an asterisk where the unadjusted 95 % paired interval excludes zero. With one "
        "data set there "
        "is no critical-difference diagram: seeds are not independent draws from a population of tasks."
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
    analysis: Analysis, arm: str, axis: CostAxis, cost: st.CostRatio, reference: Sequence[RunRecord]
) -> dict[str, Any]:
    sides = [[analysis.cost(run, axis) for run in runs] for runs in (analysis.runs[arm].values(), reference)]
    columns = [([value for value, _ in side], [reached for _, reached in side]) for side in sides]
    horizon = min(max(values) for values, _ in columns)
    means = [st.restricted_mean(values, reached, horizon) if horizon > 0 else math.nan for values, reached in columns]
    median = st.kaplan_meier_median(*columns[0])
    bracket = analysis.cost_bracket(arm, axis) or (math.nan, math.nan)
    omitted = axis == "seconds" and not analysis.seconds_comparable
    return {
        "arm": arm,
        "axis": axis,
        "runs": cost.runs,
        "reached": cost.reached_a,
        "reference_reached": cost.reached_b,
        "pairs": cost.pairs,
        "ratio": cost.ratio.mean if cost.ratio else math.nan,
        "low": cost.ratio.low if cost.ratio else math.nan,
        "high": cost.ratio.high if cost.ratio else math.nan,
        "bracket_low": bracket[0],
        "bracket_high": bracket[1],
        "restricted_mean_ratio": means[0] / means[1],
        "median": math.nan if median is None else median,
        "outcome": "omitted" if omitted else analysis.time_outcome(arm, axis),
    }


def _pair(analysis: Analysis, a: str, b: str) -> tuple[int, st.Interval]:
    seeds = sorted(analysis.runs[a].keys() & analysis.runs[b].keys())
    if not seeds:
        return 0, st.Interval(math.nan, math.nan, math.nan)
    return len(seeds), st.paired_t_interval(analysis.differences(a, b, seeds))


def _pictures(analysis: Analysis) -> tuple[list[Picture], list[str]]:
    """Draw every picture that the runs allow, and name the others."""
    drawn, absent = [], []
    for spec in PLOTS:
        plot = spec.draw(analysis)
        if plot is None:
            absent.append(spec.name)
        else:
            drawn.append(Picture(spec.name, spec.caption, _png(plot[0]), plot[1]))
    return drawn, absent


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _render(template: str, context: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lightning_unfreeze.study", "templates"),
        autoescape=template.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    return environment.get_template(template).render(**context)


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
