"""The pictures of a report: their names, how to draw them, and how to read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_unfreeze.study.judge.analysis import Analysis
from lightning_unfreeze.study.show.accuracy_plots import distortion, forest, lr_sensitivity, paired_slopes, pareto
from lightning_unfreeze.study.show.cost_plots import cost_curves, lr_traces, time_to_target
from lightning_unfreeze.study.show.style import Plot


@dataclass(frozen=True)
class PlotSpec:
    """One picture of the report: its file name, how to draw it, and how to read it."""

    name: str
    draw: Callable[[Analysis], Plot | None]
    caption: str


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
