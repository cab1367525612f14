"""Pictures of several studies together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_unfreeze.study.judge.across import MergedEffect, Ranking
from lightning_unfreeze.study.judge.analysis import in_order
from lightning_unfreeze.study.show.style import COLOURS, MARKERS, MEDIUM, SMALL, WIDTH_INCHES, tidy


def merged_forest(
    effects: pd.DataFrame, merged: Mapping[str, Mapping[str, MergedEffect]], reference: str, margin: float
) -> Figure:
    """Draw every arm's merged effect as a bar, and its studies as marks around it: one panel per condition.

    Args:
        effects: Of all studies; colours tell data sets apart, markers backbones.
        merged: Merged effects by condition and arm.
        reference: Arm that the others are compared with.
        margin: In points.
    """
    plain = effects[~effects["shifted"]]
    arms = in_order(plain["arm"].unique())
    sets, backbones = (list(dict.fromkeys(plain[column])) for column in ("dataset", "architecture"))
    height = 1.8 + len(merged) * (0.5 + 0.62 * len(arms))
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    panels = figure.subplots(len(merged), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (condition, found) in zip(panels, merged.items(), strict=True):
        axes.axvspan(-margin, margin, color="#DDDDDD", lw=0, zorder=0)
        axes.axvline(0, color="black", lw=0.8)
        rows = plain[plain["condition"] == condition] if condition else plain
        for place, arm in enumerate(arms):
            studies = rows[rows["arm"] == arm]
            offsets = np.linspace(-0.3, 0.12, max(len(studies), 2))
            for offset, row in zip(offsets, studies.itertuples(), strict=False):
                colour = COLOURS[sets.index(row.dataset) % len(COLOURS)]
                marker = MARKERS[backbones.index(row.architecture) % len(MARKERS)]
                if np.isfinite([row.low, row.high]).all():
                    axes.plot([row.low, row.high], [place + offset] * 2, color=colour, lw=0.8, alpha=0.5)
                axes.plot(row.difference, place + offset, marker, color=colour, ms=4.5)
            if arm in found:
                effect = found[arm].effect
                axes.plot([effect.low, effect.high], [place + 0.3] * 2, color="black", lw=3.5, solid_capstyle="butt")
                axes.plot(effect.mean, place + 0.3, "D", color="black", ms=6)
        axes.set_yticks(range(len(arms)), arms, fontsize=SMALL)
        axes.set_ylim(len(arms) - 0.4, -0.6)
        if condition:
            axes.set_title(condition, loc="left", fontsize=MEDIUM)
        tidy(axes)
    panels[-1].set_xlabel(f"accuracy minus {reference} (points)", fontsize=MEDIUM)
    lines = [Line2D([], [], color=COLOURS[i % len(COLOURS)], lw=3, label=name) for i, name in enumerate(sets)]
    if len(backbones) > 1:
        lines += [
            Line2D([], [], color="0.4", marker=MARKERS[i % len(MARKERS)], ls="", label=name)
            for i, name in enumerate(backbones)
        ]
    lines.append(Line2D([], [], color="black", marker="D", lw=3.5, label="merged"))
    figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False, fontsize=SMALL)
    return figure


def critical_difference(arms: Sequence[str], ranking: Ranking) -> Figure:
    """Draw arms by mean rank, with a bar over those that do not differ (Demsar 2006)."""
    order = np.argsort(ranking.mean_ranks)
    ranks = ranking.mean_ranks[order]
    figure = Figure(figsize=(8, 1.5 + 0.32 * len(arms)), layout="constrained")
    axes = figure.subplots()
    for row, (index, rank) in enumerate(zip(order, ranks, strict=True)):
        axes.plot(rank, row, "o", color="black", ms=5)
        axes.annotate(arms[index], (rank, row), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9)
        # from each arm to the last one that it does not differ from
        last = int(np.flatnonzero(ranks - rank < ranking.critical_difference)[-1])
        if last > row:
            axes.plot([rank, ranks[last]], [row, row], color="0.6", lw=2.5, zorder=0)
    axes.set_xlim(0.8, len(arms) + 1.2)
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_xlabel("mean rank over data sets (1 is best)")
    axes.set_title(f"grey: not different at 5 %, critical difference {ranking.critical_difference:.2f}", fontsize=9)
    return figure
