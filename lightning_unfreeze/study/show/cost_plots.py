"""Pictures of costs and schedules: accuracy over images, FLOPs and seconds, the target, the rates that ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from lightning_unfreeze.study.judge import time_to_target as tt
from lightning_unfreeze.study.judge.analysis import Analysis, CostAxis
from lightning_unfreeze.study.runs.records import RunRecord
from lightning_unfreeze.study.show.style import COLOURS, SMALL, WIDTH_INCHES, Plot, band, shown_arms, styles_of, tidy

_SHADES = ("#FFF3D6", "#E3F1E1", "#E1ECF7", "#F6E3EE", "#ECECEC", "#E8E3F3")
_AXIS_TITLE: dict[CostAxis, str] = {
    "images": "training images",
    "flops": "FLOPs",
    "seconds": "seconds",
    "epochs": "epochs",
}


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
                **band([100 * p.val_acc for p in points]),
            }
            for arm in shown_arms(analysis)
            for points in _aligned(list(analysis.runs[arm].values()))
        ]
    )
    if frame.empty:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 9.5), layout="constrained")
    panels = figure.subplots(3, 1, sharey=True)
    styles = styles_of(analysis)
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
        tidy(axes)
    # Right after a restart accuracy falls; those hollow points may leave the picture, cycle ends may not.
    ends = frame[frame.cycle_end] if frame.cycle_end.any() else frame
    low, high = float(ends["low"].fillna(ends["mean"]).min()), float(ends["high"].fillna(ends["mean"]).max())
    panels[0].set_ylim(low - 0.05 * (high - low) - 0.5, high + 0.05 * (high - low) + 0.5)
    for axes in panels:
        axes.set_ylabel("validation accuracy (%)")
    if not analysis.seconds_comparable:
        panels[2].set_title("not comparable: unsteady or unprobed machine", color="#B00020", fontsize=SMALL)
    handles, labels = panels[0].get_legend_handles_labels()
    if analysis.target is not None:
        handles, labels = [*handles, Line2D([], [], color="black", ls="--", lw=0.9)], [*labels, "target"]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=SMALL)
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
    figure = Figure(figsize=(WIDTH_INCHES, 1.6 + 1.3 * len(first)), layout="constrained")
    rows = figure.subplots(len(first), 1, squeeze=False)[:, 0]
    groups = list(dict.fromkeys(frame.group))
    colours = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(reversed(groups))}
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
        axes.set_title(arm, loc="left", fontsize=SMALL, fontweight="bold", pad=3)
        axes.set_ylabel("rate", fontsize=SMALL)
        tidy(axes)
    rows[-1].set_xlabel("epoch (each row has its own scale)")
    handles = [Line2D([], [], color=colours[group], label=group) for group in groups]
    bands = [Patch(color=shades[stage], label=stage) for stage in stages]
    figure.legend(handles=[*handles, *bands], loc="outside upper center", ncols=2, frameon=False, fontsize=SMALL)
    return figure, frame


def time_to_target(analysis: Analysis) -> Plot | None:
    """Draw the share of runs that reached the target against FLOPs (1 - Kaplan-Meier)."""
    if analysis.target is None:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 5.2), layout="constrained")
    axes = figure.subplots()
    styles, rows = styles_of(analysis), []
    for i, arm in enumerate(shown_arms(analysis)[:6]):
        found = [analysis.cost(run, "flops") for run in analysis.runs[arm].values()]
        costs, reached = [c for c, _ in found], [r for _, r in found]
        times, pending = tt.kaplan_meier(costs, reached)
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
        "cross: a run ended without reaching it\nlines are shifted up slightly to tell them apart",
        fontsize=SMALL,
        loc="left",
    )
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=SMALL)
    return figure, pd.DataFrame(rows)


def _aligned(runs: Sequence[RunRecord]) -> list[list[Any]]:
    """Return the points by epoch where most runs have one: the mean of the few longest is another mean."""
    by_epoch: dict[float, list[Any]] = {}
    for run in runs:
        for point in run.curve:
            by_epoch.setdefault(point.epoch, []).append(point)
    return [points for _, points in sorted(by_epoch.items()) if 2 * len(points) > len(runs)]


def _stage_bands(axes: Axes, run: RunRecord, shades: Mapping[str, str]) -> None:
    """Shade the stages of a run and mark the ends of its cycles."""
    start = 0.0
    for point in run.curve:
        axes.axvspan(start, point.epoch, color=shades[point.stage], lw=0, zorder=0)
        start = point.epoch
        if point.cycle_end:
            axes.axvline(point.epoch, ymax=0.1, color="black", lw=1.2)
