"""The picture of a run: rates and metric over the stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_stages(
    stages: Sequence[tuple[str, int, int]],
    rates: Sequence[tuple[int, Mapping[str, float]]],
    metric: Sequence[tuple[int, float]],
    metric_name: str,
) -> Figure:
    """Draws the learning rate of each layer group (log y) with a band per stage, and the validation metric below.

    Args:
        stages: Name, first step and last step of each stage.
        rates: Optimizer step and rate per layer group; groups that are frozen at a step are left out.
        metric: Optimizer step and value of the validation metric.
        metric_name: Label of the lower axis.
    """
    from matplotlib.figure import Figure  # takes most of a second to import

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    names = sorted({name for _, values in rates for name in values}, key=_last_seen(rates))
    colours = [f"C{index}" for index in range(10)] if len(names) <= 10 else None
    is_log = any(value > 0 for _, values in rates for value in values.values())
    for index, name in enumerate(names):
        points = [(step, values.get(name, math.nan)) for step, values in rates]
        if is_log:  # where a rate of 0 (a solved head's) has no place
            points = [(step, rate if rate > 0 else math.nan) for step, rate in points]
        colour = colours[index] if colours else (0.1, 0.3 + 0.6 * index / len(names), 1 - index / len(names))
        top.plot(
            *zip(*points, strict=True), label=name, color=colour, linewidth=1.5, marker="." if len(points) < 3 else ""
        )
    if is_log:
        top.set_yscale("log")
    top.set_ylabel("learning rate")
    if names:
        top.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), title="layer group", title_fontsize=8)
    if metric:
        bottom.plot(*zip(*metric, strict=True), color="black", marker="o", markersize=4, linewidth=1)
    bottom.set_ylabel(metric_name)
    bottom.set_xlabel("optimizer step")
    # a character of the names is about a hundredth of the axis wide
    span = max(stages[-1][2] - stages[0][1], 1) if stages else 1
    upright = all(len(name) < 100 * (last - first) / span for name, first, last in stages)
    for index, (name, first, last) in enumerate(stages):
        for axis in (top, bottom):
            axis.axvspan(first, last, color="0.92" if index % 2 else "0.97", zorder=0)
        top.annotate(
            name,
            ((first + last) / 2, 1.01),
            xycoords=("data", "axes fraction"),
            ha="center" if upright else "left",
            va="bottom",
            fontsize=9,
            rotation=0 if upright else 20,
        )
    return figure


def _last_seen(rates: Sequence[tuple[int, Mapping[str, float]]]) -> Any:
    order: dict[str, int] = {}
    for _, values in reversed(rates):
        for position, name in enumerate(values):
            order.setdefault(name, position)
    return lambda name: order[name]
