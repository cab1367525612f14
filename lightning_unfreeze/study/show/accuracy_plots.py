"""Pictures of accuracy: differences to the reference, seed by seed, against what was spent, moved and tried.

Every function takes an `Analysis` and returns the figure and its data, or None where the runs do not hold what it
shows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullLocator

from lightning_unfreeze.study.judge.analysis import AXIS_LABEL, BUDGETS, Analysis, skip_arm
from lightning_unfreeze.study.judge.words import outcome_words, percent
from lightning_unfreeze.study.show.style import (
    COLOURS,
    MEDIUM,
    SMALL,
    WIDTH_INCHES,
    Plot,
    band,
    in_points,
    shown_arms,
    styles_of,
    tidy,
)

_SLOPE_KEY = ((COLOURS[0], 1, "seed: skipping is better"), (COLOURS[1], 1, "seed: not better"), ("black", 3, "mean"))


def forest(analysis: Analysis) -> Plot | None:
    """Draw the paired differences to the reference: the interval for new images thick, that for these images thin."""
    blocks = {
        f"same {AXIS_LABEL[axis]}": [a for a in analysis.comparisons if a.endswith(f"@{axis}")] for axis in BUDGETS
    }
    blocks["other arms"] = [arm for arm in analysis.comparisons if not any(arm in arms for arms in blocks.values())]
    frame = pd.DataFrame(
        [{"block": block, **_effect_row(analysis, arm)} for block, arms in blocks.items() for arm in arms]
    )
    if frame.empty:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 1.6 + 0.62 * len(frame) + 0.3 * frame.block.nunique()), layout="constrained")
    axes = figure.subplots()
    margin, styles, y = analysis.info.margin, styles_of(analysis), 0.0
    axes.axvspan(-margin, margin, color="#DDDDDD", lw=0, zorder=0)
    axes.axvline(0, color="black", lw=0.8)
    across = axes.get_yaxis_transform()
    for block, rows in frame.groupby("block", sort=False):
        axes.text(0.01, y, str(block), transform=across, fontsize=MEDIUM, fontweight="bold", va="center")
        y -= 0.85
        for row in rows.itertuples():
            colour = styles[row.arm][0]
            primary = " (primary)" if row.arm == analysis.info.primary else f" ({percent(row.level)})"
            axes.text(0.01, y, f"{row.arm}{primary}", transform=across, fontsize=SMALL, va="center")
            said = f"{row.difference:+.2f}  {row.said}"
            axes.text(0.99, y, said, transform=across, fontsize=SMALL, va="center", ha="right")
            y -= 0.75
            # one pair has an infinite interval: draw only the point, and keep the view to what is finite
            for low, high, width, shade in (
                (row.low, row.high, 5.0, 0.75),
                (row.these_low, row.these_high, 1.2, 1.0),
            ):
                if np.isfinite([low, high]).all():
                    axes.plot([low, high], [y, y], color=colour if width > 2 else "black", lw=width, alpha=shade)
            axes.plot([row.difference], [y], "o", color=colour, mec="white", mew=0.8, ms=7, zorder=5)
            y -= 0.95
        y -= 0.2
    axes.set_yticks([])
    axes.set_ylim(y + 0.5, 0.7)
    axes.set_xlabel(f"points against {analysis.info.reference}; grey: margin of ±{margin:g}", fontsize=MEDIUM)
    axes.set_title("thick: new images (the verdict)\nthin: these images alone", fontsize=SMALL, loc="left")
    tidy(axes)
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
    figure = Figure(figsize=(WIDTH_INCHES, 2.9 * len(arms) + 0.7), layout="constrained")
    panels = figure.subplots(len(arms), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (arm, rows) in zip(panels, frame.groupby("arm", sort=False), strict=True):
        for row in rows.itertuples():
            better = row.skipped > row.reference
            axes.plot(
                [0, 1],
                [row.reference, row.skipped],
                color=COLOURS[0] if better else COLOURS[1],
                lw=1,
                marker="o",
                ms=3.5,
            )
        axes.plot([0, 1], [rows.reference.mean(), rows.skipped.mean()], color="black", lw=3, marker="o", ms=6)
        axes.set_xticks([0, 1], [reference, "skipping"])
        axes.set_xlim(-0.25, 1.25)
        wins = int((rows.skipped > rows.reference).sum())
        axes.set_title(f"{arm}: better in {wins} of {len(rows)}", fontsize=MEDIUM)
        tidy(axes)
    panels[0].set_ylabel("test accuracy (%)")
    lines = [Line2D([], [], color=c, lw=w, label=t) for c, w, t in _SLOPE_KEY]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False, fontsize=SMALL)
    return figure, frame


def pareto(analysis: Analysis) -> Plot | None:
    """Draw final test accuracy against FLOPs, with 95 % t intervals and the front of arms that none beats in both."""
    frame = pd.DataFrame(
        [
            {"arm": arm, "flops": float(np.mean([run.flops for run in runs])), **band([100 * run.acc for run in runs])}
            for arm in analysis.arms
            if (runs := list(analysis.runs[arm].values()))
        ]
    )
    figure = Figure(figsize=(WIDTH_INCHES, 5.6), layout="constrained")
    axes = figure.subplots()
    by_cost = frame.sort_values(["flops", "mean"], ascending=[True, False])
    front = by_cost[by_cost["mean"] > by_cost["mean"].cummax().shift(fill_value=-np.inf)]
    frame["on_front"] = frame.arm.isin(front.arm)
    axes.step(front.flops, front["mean"], where="post", color="#AAAAAA", ls="--", lw=1, zorder=0)
    styles = styles_of(analysis)
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
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=SMALL, title="dashed: front")
    return figure, frame


def distortion(analysis: Analysis) -> Plot | None:
    """Draw accuracy against how far the features moved, and shifted against plain accuracy where that was measured."""
    runs = [run for arm in shown_arms(analysis) for run in analysis.runs[arm].values()]
    names = [name for run in runs for name in run.distortion]
    if not names:
        return None
    measure = "displacement" if "displacement" in names else names[0]
    rows = [
        (run.arm, run.seed, run.distortion.get(measure, np.nan), 100 * run.acc, in_points(run.acc_ood)) for run in runs
    ]
    frame = pd.DataFrame(rows, columns=["arm", "seed", measure, "acc", "acc_ood"])
    shifted = bool(frame.acc_ood.notna().any())
    figure = Figure(figsize=(WIDTH_INCHES, 8.6 if shifted else 5.0), layout="constrained")
    panels = figure.subplots(2 if shifted else 1, 1, squeeze=False)[:, 0]
    styles = styles_of(analysis)
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
        tidy(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=SMALL)
    return figure, frame


def lr_sensitivity(analysis: Analysis) -> Plot | None:
    """Draw tuning accuracy against the peak learning rate; a ring marks a best rate at the edge of its grid."""
    frame = pd.DataFrame(
        [
            {"arm": arm, "lr": lr, "val_acc": 100 * accuracy, "at_edge": run.lr_at_grid_edge and lr == run.tuned_lr}
            for arm in shown_arms(analysis)
            for run in [next(iter(analysis.runs[arm].values()))]
            for lr, accuracy in sorted(run.tuning_curve)
        ]
    )
    if frame.empty:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 5.2), layout="constrained")
    axes = figure.subplots()
    for arm, rows in frame.groupby("arm", sort=False):
        colour, marker = styles_of(analysis)[str(arm)]
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
        axes.set_title("ring: best rate at the edge of the grid", fontsize=SMALL, loc="left")
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=SMALL)
    return figure, frame


def _effect_row(analysis: Analysis, arm: str) -> dict[str, Any]:
    comparison = analysis.comparisons[arm]
    verdict, these = comparison.verdict, comparison.these_images
    return {
        "arm": arm,
        "pairs": len(comparison.seeds),
        "difference": verdict.interval.mean,
        "level": verdict.interval.level,
        "low": verdict.interval.low,
        "high": verdict.interval.high,
        "these_low": these.low,
        "these_high": these.high,
        "outcome": verdict.outcome,
        "said": outcome_words(verdict),
    }
