"""The pictures of a report, each with the table that it shows.

Every function takes an `Analysis` and returns the figure and its data, or None where the runs do not hold what it
shows. Colours are fixed per arm (Okabe and Ito's set, safe for colour-blind readers) and always doubled by a marker
or a label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullLocator

from lightning_unfreeze.study.judge import statistics as st
from lightning_unfreeze.study.judge.analysis import AXIS_LABEL, BUDGETS, OUTCOME_WORDS, Analysis, CostAxis, skip_arm
from lightning_unfreeze.study.runs.records import RunRecord

Plot = tuple[Figure, pd.DataFrame]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C6D31")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_SHADES = ("#FFF3D6", "#E3F1E1", "#E1ECF7", "#F6E3EE", "#ECECEC", "#E8E3F3")
_AXIS_TITLE: dict[CostAxis, str] = {
    "images": "training images",
    "flops": "FLOPs",
    "seconds": "seconds",
    "epochs": "epochs",
}
_MAX_LINES = len(_COLOURS)


@dataclass(frozen=True)
class PlotSpec:
    """One picture of the report: its file name, how to draw it, and how to read it."""

    name: str
    draw: Callable[[Analysis], Plot | None]
    caption: str


def cost_curves(analysis: Analysis) -> Plot | None:
    """Draw validation accuracy against images, FLOPs and seconds, mean over seeds with a 95 % t band."""
    frame = pd.DataFrame(
        [
            {
                "arm": arm,
                "epoch": points[0].epoch,
                "cycle_end": all(p.cycle_end for p in points),
                "runs": len(points),
                **{
                    f"{axis}_mean": float(np.mean([getattr(p, axis) for p in points]))
                    for axis in ("images", "flops", "seconds")
                },
                **_band([100 * p.val_acc for p in points]),
            }
            for arm in _shown(analysis)
            for points in _aligned(list(analysis.runs[arm].values()))
        ]
    )
    if frame.empty:
        return None
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    styles = _styles(analysis)
    for axes, axis in zip(panels, ("images", "flops", "seconds"), strict=True):
        for arm, rows in frame.groupby("arm", sort=False):
            colour, marker = styles[str(arm)]
            ends, middle = rows[rows.cycle_end], rows[~rows.cycle_end]
            x = f"{axis}_mean"
            axes.plot(rows[x], rows["mean"], color=colour, lw=0.7, alpha=0.35)
            axes.plot(middle[x], middle["mean"], marker, ls="", mfc="none", mec=colour, ms=3.5, alpha=0.5, mew=0.8)
            axes.plot(ends[x], ends["mean"], marker=marker, color=colour, ms=5.5, lw=1.6, label=arm)
            axes.fill_between(ends[x], ends.low, ends.high, color=colour, alpha=0.13, lw=0)
        if analysis.target is not None:
            axes.axhline(100 * analysis.target, color="black", ls="--", lw=0.9)
        axes.set_xlabel(_AXIS_TITLE[axis])  # type: ignore[index]
        axes.set_xlim(left=0)
        if axis != "seconds":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        _tidy(axes)
    # Right after a restart accuracy falls; those hollow points may leave the picture, cycle ends may not.
    ends = frame[frame.cycle_end] if frame.cycle_end.any() else frame
    low, high = float(ends["low"].fillna(ends["mean"]).min()), float(ends["high"].fillna(ends["mean"]).max())
    panels[0].set_ylim(low - 0.05 * (high - low) - 0.5, high + 0.05 * (high - low) + 0.5)
    panels[0].set_ylabel("validation accuracy (%)")
    if not analysis.seconds_comparable:
        panels[2].set_title("not comparable: unsteady or unprobed machine", color="#B00020", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    if analysis.target is not None:
        handles, labels = [*handles, Line2D([], [], color="black", ls="--", lw=0.9)], [*labels, "target"]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False, fontsize=9)
    return figure, frame


def lr_traces(analysis: Analysis) -> Plot | None:
    """Draw the learning rate of every layer group of one run per arm, with bands for stages and ticks at restarts."""
    first = {arm: next(iter(analysis.runs[arm].values())) for arm in analysis.arms}
    first = {arm: run for arm, run in first.items() if any(run.lr_trace.values())}
    frame = pd.DataFrame(
        [
            {"arm": arm, "seed": run.seed, "group": group, "epoch": epoch, "lr": lr}
            for arm, run in first.items()
            for group, trace in run.lr_trace.items()
            for epoch, lr in trace
        ]
    )
    if frame.empty:
        return None
    figure = Figure(figsize=(11, 0.9 + 1.3 * len(first)), layout="constrained")
    rows = figure.subplots(len(first), 1, squeeze=False)[:, 0]
    groups = list(dict.fromkeys(frame.group))
    colours = {group: _COLOURS[i % len(_COLOURS)] for i, group in enumerate(reversed(groups))}
    stages = list(dict.fromkeys(point.stage for run in first.values() for point in run.curve))
    shades = {stage: _SHADES[i % len(_SHADES)] for i, stage in enumerate(stages)}
    # A cosine ends at zero, which a log axis cannot show: the view stops well below the lowest group's peak.
    bottom = 0.03 * float(frame[frame.lr > 0].groupby("group").lr.max().min())
    for axes, (arm, run) in zip(rows, first.items(), strict=True):
        _stage_bands(axes, run, shades)
        for group, trace in run.lr_trace.items():
            if trace:
                epochs, rates = zip(*trace, strict=True)
                axes.plot(epochs, np.maximum(rates, bottom), color=colours[group], lw=1.3)
        axes.set_yscale("log")
        axes.set_ylim(bottom, float(frame.lr.max()) * 1.8)
        axes.margins(x=0)
        axes.set_xlim(left=0)
        axes.set_title(arm, loc="left", fontsize=9, fontweight="bold", pad=3)
        axes.set_ylabel("rate", fontsize=8)
        _tidy(axes)
    rows[-1].set_xlabel("epoch (each row has its own scale)")
    handles = [Line2D([], [], color=colours[group], label=group) for group in groups]
    bands = [Patch(color=shades[stage], label=stage) for stage in stages]
    figure.legend(handles=[*handles, *bands], loc="outside upper center", ncols=6, frameon=False, fontsize=8.5)
    return figure, frame


def forest(analysis: Analysis) -> Plot | None:
    """Draw the paired differences to the reference: interval over seeds thick, over seeds and images thin."""
    blocks = {
        f"same {AXIS_LABEL[axis]}": [a for a in analysis.comparisons if a.endswith(f"@{axis}")] for axis in BUDGETS
    }
    blocks["other arms"] = [arm for arm in analysis.comparisons if not any(arm in arms for arms in blocks.values())]
    frame = pd.DataFrame(
        [{"block": block, **_effect_row(analysis, arm)} for block, arms in blocks.items() for arm in arms]
    )
    if frame.empty:
        return None
    figure = Figure(figsize=(9, 1.5 + 0.3 * len(frame) + 0.35 * frame.block.nunique()), layout="constrained")
    axes = figure.subplots()
    margin = analysis.info.margin
    axes.axvspan(-margin, margin, color="#DDDDDD", lw=0, zorder=0)
    axes.axvline(0, color="black", lw=0.8)
    y, ticks, labels = 0.0, [], []
    styles = _styles(analysis)
    # One pair has an infinite interval: draw only the point, and keep the view to what is finite.
    for block, rows in frame.groupby("block", sort=False):
        axes.text(0.01, y, str(block), transform=axes.get_yaxis_transform(), fontsize=9, fontweight="bold", va="center")
        y -= 1
        for row in rows.itertuples():
            colour = styles[row.arm][0]
            if np.isfinite([row.total_low, row.total_high]).all():
                axes.plot([row.total_low, row.total_high], [y, y], color=colour, lw=1.1, marker="|", ms=6)
            if np.isfinite([row.seed_low, row.seed_high]).all():
                axes.plot(
                    [row.seed_low, row.seed_high], [y, y], color=colour, lw=4.5, solid_capstyle="butt", alpha=0.75
                )
            axes.plot([row.difference], [y], "o", color=colour, mec="white", mew=0.8, ms=7, zorder=5)
            text = f"{row.difference:+.2f}  {OUTCOME_WORDS[row.outcome]}"
            axes.text(1.01, y, text, transform=axes.get_yaxis_transform(), fontsize=8.5, va="center", clip_on=False)
            ticks.append(y)
            labels.append(f"{row.arm}{' (primary)' if row.arm == analysis.info.primary else ''}")
            y -= 1
        y -= 0.35
    axes.set_yticks(ticks, labels)
    axes.set_ylim(y + 0.6, 0.7)
    axes.set_xlabel(f"accuracy difference to {analysis.info.reference} (points); grey: margin of ±{margin:g}")
    axes.set_title("thick: 95 % over seeds · thin: over seeds and test images", fontsize=9, loc="right")
    _tidy(axes)
    axes.tick_params(axis="y", length=0)
    return figure, frame


def paired_slopes(analysis: Analysis) -> Plot | None:
    """Draw each seed as a line from the reference to the arm that skips steps 3 and 4, one panel per budget."""
    arms = [skip_arm(axis) for axis in BUDGETS if skip_arm(axis) in analysis.comparisons]
    reference = analysis.info.reference
    frame = pd.DataFrame(
        [
            {"arm": arm, "seed": seed, "reference": 100 * analysis.runs[reference][seed].acc, "skipped": 100 * run.acc}
            for arm in arms
            for seed, run in analysis.runs[arm].items()
            if seed in analysis.comparisons[arm].seeds
        ]
    )
    if frame.empty:
        return None
    figure = Figure(figsize=(max(5.5, 3.1 * len(arms) + 0.6), 4.2), layout="constrained")
    panels = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
    for axes, (arm, rows) in zip(panels, frame.groupby("arm", sort=False), strict=True):
        for row in rows.itertuples():
            better = row.skipped > row.reference
            axes.plot(
                [0, 1],
                [row.reference, row.skipped],
                color=_COLOURS[0] if better else _COLOURS[1],
                lw=1,
                marker="o",
                ms=3.5,
            )
        axes.plot([0, 1], [rows.reference.mean(), rows.skipped.mean()], color="black", lw=3, marker="o", ms=6)
        axes.set_xticks([0, 1], [reference, arm])
        axes.set_xlim(-0.25, 1.25)
        wins = int((rows.skipped > rows.reference).sum())
        axes.set_title(f"{arm}: better in {wins} of {len(rows)}", fontsize=9)
        _tidy(axes)
    panels[0].set_ylabel("test accuracy (%)")
    lines = [Line2D([], [], color=c, lw=w, label=t) for c, w, t in _SLOPE_KEY]
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return figure, frame


def time_to_target(analysis: Analysis) -> Plot | None:
    """Draw the share of runs that reached the target against FLOPs (1 - Kaplan-Meier)."""
    if analysis.target is None:
        return None
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    styles, rows = _styles(analysis), []
    for i, arm in enumerate(_shown(analysis)[:6]):
        found = [analysis.cost(run, "flops") for run in analysis.runs[arm].values()]
        costs, reached = [c for c, _ in found], [r for _, r in found]
        times, pending = st.kaplan_meier(costs, reached)
        x, y = np.array([0.0, *times, max(costs)]), np.array([0.0, *(1 - pending)])
        y = np.append(y, y[-1])
        censored = [c for c, r in found if not r]
        rows += [{"arm": arm, "flops": c, "reached": r} for c, r in found]
        colour = styles[arm][0]
        # Lines of several arms lie on 0 and 1: shift each by a hair so that none hides another.
        label = f"{arm} ({sum(reached)}/{len(reached)})"
        axes.step(x, 100 * y + 1.2 * i, where="post", color=colour, lw=1.8, label=label)
        heights = [100 * float(y[np.searchsorted(x, c, side="right") - 1]) + 1.2 * i for c in censored]
        axes.plot(censored, heights, ls="", marker="x", ms=7, mew=1.8, color=colour)
    axes.set_xlabel(f"FLOPs until {100 * analysis.target:.1f} % validation accuracy at a cycle end")
    axes.set_ylabel("runs that reached it (%)")
    axes.set_ylim(-4, 110)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title(
        "cross: a run ended without reaching it; lines are shifted up slightly to tell them apart",
        fontsize=8.5,
        loc="left",
    )
    _tidy(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure, pd.DataFrame(rows)


def pareto(analysis: Analysis) -> Plot | None:
    """Draw final test accuracy against FLOPs, with 95 % t intervals and the front of arms that none beats in both."""
    frame = pd.DataFrame(
        [
            {"arm": arm, "flops": float(np.mean([run.flops for run in runs])), **_band([100 * run.acc for run in runs])}
            for arm in analysis.arms
            if (runs := list(analysis.runs[arm].values()))
        ]
    )
    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    axes = figure.subplots()
    by_cost = frame.sort_values(["flops", "mean"], ascending=[True, False])
    front = by_cost[by_cost["mean"] > by_cost["mean"].cummax().shift(fill_value=-np.inf)]
    frame["on_front"] = frame.arm.isin(front.arm)
    axes.step(front.flops, front["mean"], where="post", color="#AAAAAA", ls="--", lw=1, zorder=0)
    styles = _styles(analysis)
    for row in frame.itertuples():
        colour, marker = styles[row.arm]
        error = None if not np.isfinite(row.low) else [[row.mean - row.low], [row.high - row.mean]]
        axes.errorbar(
            row.flops, row.mean, error, color=colour, marker=marker, ms=7, capsize=3, lw=1.2, ls="", label=row.arm
        )
    axes.set_xlabel("FLOPs of training, tuning excluded")
    axes.set_ylabel("test accuracy (%)")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _tidy(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5, title="dashed: front", title_fontsize=8)
    return figure, frame


def distortion(analysis: Analysis) -> Plot | None:
    """Draw accuracy against how far the features moved, and shifted against plain accuracy where that was measured."""
    runs = [run for arm in _shown(analysis) for run in analysis.runs[arm].values()]
    names = [name for run in runs for name in run.distortion]
    if not names:
        return None
    measure = "displacement" if "displacement" in names else names[0]
    rows = [
        (run.arm, run.seed, run.distortion.get(measure, np.nan), 100 * run.acc, _points(run.acc_ood)) for run in runs
    ]
    frame = pd.DataFrame(rows, columns=["arm", "seed", measure, "acc", "acc_ood"])
    shifted = bool(frame.acc_ood.notna().any())
    figure = Figure(figsize=(10.5 if shifted else 6.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2 if shifted else 1, squeeze=False)[0]
    styles = _styles(analysis)
    sides = ((measure, "acc"), ("acc", "acc_ood"))[: len(panels)]
    titles = {
        measure: f"{measure} of features",
        "acc": "test accuracy (%)",
        "acc_ood": "accuracy on shifted images (%)",
    }
    for axes, (x, y) in zip(panels, sides, strict=True):
        for arm, group in frame.groupby("arm", sort=False):
            colour, marker = styles[str(arm)]
            axes.plot(group[x], group[y], ls="", marker=marker, color=colour, ms=5, alpha=0.75, mew=0, label=arm)
        axes.set_xlabel(titles[x])
        axes.set_ylabel(titles[y])
        _tidy(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure, frame


def lr_sensitivity(analysis: Analysis) -> Plot | None:
    """Draw tuning accuracy against the peak learning rate; a ring marks a best rate at the edge of its grid."""
    frame = pd.DataFrame(
        [
            {"arm": arm, "lr": lr, "val_acc": 100 * accuracy, "at_edge": run.lr_at_grid_edge and lr == run.tuned_lr}
            for arm in _shown(analysis)
            for run in [next(iter(analysis.runs[arm].values()))]
            for lr, accuracy in sorted(run.tuning_curve)
        ]
    )
    if frame.empty:
        return None
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for arm, rows in frame.groupby("arm", sort=False):
        colour, marker = _styles(analysis)[str(arm)]
        axes.plot(rows.lr, rows.val_acc, color=colour, marker=marker, ms=5, lw=1.5, label=arm)
        edge = rows[rows.at_edge]
        axes.plot(edge.lr, edge.val_acc, ls="", marker="o", ms=15, mfc="none", mec=colour, mew=1.6)
    axes.set_xscale("log")
    rates = sorted(set(frame.lr))
    axes.xaxis.set_major_locator(FixedLocator(rates))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("validation accuracy, tuning seeds (%)")
    if frame.at_edge.any():
        axes.set_title("ring: best rate at the edge of the grid", fontsize=9, loc="left")
    _tidy(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure, frame


PLOTS = (
    PlotSpec("forest", forest, "Accuracy difference of every arm to the reference, paired by seed."),
    PlotSpec("paired_slopes", paired_slopes, "The same runs one by one: each line is a seed."),
    PlotSpec(
        "cost_curves",
        cost_curves,
        "Validation accuracy against three costs, mean over seeds with a 95 % t band. Filled: cycle ends, where arms "
        "are comparable. Hollow: within a cycle; some lie below the picture.",
    ),
    PlotSpec("time_to_target", time_to_target, "Share of runs that reached the target, against FLOPs."),
    PlotSpec("pareto", pareto, "What each arm reaches and what it spends."),
    PlotSpec("lr_traces", lr_traces, "What ran: learning rate per layer group, stages as bands, restarts as ticks."),
    PlotSpec("lr_sensitivity", lr_sensitivity, "What tuning saw; a curve that still rises at an edge is under-tuned."),
    PlotSpec(
        "distortion",
        distortion,
        "How far the pretrained features moved, one point per run. Movement is not damage.",
    ),
)

_SLOPE_KEY = ((_COLOURS[0], 1, "seed: skipping is better"), (_COLOURS[1], 1, "seed: not better"), ("black", 3, "mean"))


def _shown(analysis: Analysis) -> list[str]:
    """Return the arms that fit into one picture: reference and skipping ones first."""
    first = [arm for arm in (analysis.info.reference, *map(skip_arm, BUDGETS)) if arm in analysis.arms]
    return [*first, *(arm for arm in analysis.arms if arm not in first)][:_MAX_LINES]


def _styles(analysis: Analysis) -> dict[str, tuple[str, str]]:
    """Return colour and marker of each arm, the same in every picture; past eight arms colours repeat."""
    shown = _shown(analysis)
    arms = [*shown, *(arm for arm in analysis.arms if arm not in shown)]
    n = len(_COLOURS)
    return {arm: (_COLOURS[i % n], _MARKERS[(i + i // n) % n]) for i, arm in enumerate(arms)}


def _band(values: Sequence[float]) -> dict[str, float]:
    """Return mean and 95 % t interval, without bounds where there is one run."""
    interval = st.paired_t_interval(values)
    bounded = np.isfinite(interval.low)
    return {
        "mean": interval.mean,
        "low": interval.low if bounded else np.nan,
        "high": interval.high if bounded else np.nan,
    }


def _aligned(runs: Sequence[RunRecord]) -> list[list[Any]]:
    """Return the points by epoch where most runs have one: the mean of the few longest is another mean."""
    by_epoch: dict[float, list[Any]] = {}
    for run in runs:
        for point in run.curve:
            by_epoch.setdefault(point.epoch, []).append(point)
    return [points for _, points in sorted(by_epoch.items()) if 2 * len(points) > len(runs)]


def _effect_row(analysis: Analysis, arm: str) -> dict[str, Any]:
    comparison = analysis.comparisons[arm]
    interval, total = comparison.verdict.interval, comparison.total
    return {
        "arm": arm,
        "pairs": len(comparison.seeds),
        "difference": interval.mean,
        "seed_low": interval.low,
        "seed_high": interval.high,
        "total_low": total.low if total else np.nan,
        "total_high": total.high if total else np.nan,
        "outcome": comparison.verdict.outcome,
    }


def _stage_bands(axes: Axes, run: RunRecord, shades: Mapping[str, str]) -> None:
    """Shade the stages of a run and mark the ends of its cycles."""
    start = 0.0
    for point in run.curve:
        axes.axvspan(start, point.epoch, color=shades[point.stage], lw=0, zorder=0)
        start = point.epoch
        if point.cycle_end:
            axes.axvline(point.epoch, ymax=0.1, color="black", lw=1.2)


def _points(share: float | None) -> float:
    return np.nan if share is None else 100 * share


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
    axes.grid(True, color="#EEEEEE", lw=0.6)
    axes.set_axisbelow(True)
