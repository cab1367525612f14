"""How all pictures look: arms keep their colour and marker, and nothing is smaller than a phone can show.

Colours are Okabe and Ito's set, safe for colour-blind readers, and always doubled by a marker or a label. Figures are
narrow, so that their letters stay readable at the width of a phone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_unfreeze.study.judge import statistics as st
from lightning_unfreeze.study.judge.analysis import BUDGETS, Analysis, skip_arm

Plot = tuple[Figure, pd.DataFrame]
WIDTH_INCHES = 5.6
SMALL, MEDIUM = 10.5, 11.5

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MAX_LINES = len(COLOURS)


def shown_arms(analysis: Analysis) -> list[str]:
    """Return the arms that fit into one picture: reference and skipping ones first."""
    first = [arm for arm in (analysis.info.reference, *map(skip_arm, BUDGETS)) if arm in analysis.arms]
    return [*first, *(arm for arm in analysis.arms if arm not in first)][:MAX_LINES]


def styles_of(analysis: Analysis) -> dict[str, tuple[str, str]]:
    """Return colour and marker of each arm, the same in every picture; past eight arms colours repeat."""
    shown = shown_arms(analysis)
    arms = [*shown, *(arm for arm in analysis.arms if arm not in shown)]
    n = len(COLOURS)
    return {arm: (COLOURS[i % n], MARKERS[(i + i // n) % n]) for i, arm in enumerate(arms)}


def band(values: Sequence[float]) -> dict[str, float]:
    """Return mean and 95 % t interval, without bounds where there is one run."""
    interval = st.paired_t_interval(values)
    bounded = np.isfinite(interval.low)
    return {
        "mean": interval.mean,
        "low": interval.low if bounded else np.nan,
        "high": interval.high if bounded else np.nan,
    }


def in_points(share: float | None) -> float:
    """Return a share in points, NaN for none."""
    return np.nan if share is None else 100 * share


def tidy(axes: Axes) -> None:
    """Take away what shows nothing."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)
    axes.grid(True, color="#EEEEEE", lw=0.6)
    axes.set_axisbelow(True)
