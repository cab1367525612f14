"""When a run reached a target accuracy: a cost that is known between two looks at it, and sometimes not at all.

Pure functions of arrays. A run is seen to have reached the target at a cycle end, and not to have reached it at the one
before, so its cost is interval-censored; a run that never reached it is right-censored. The two arms look at other
shares of their budget, so the cost at the look itself would favour the arm that looks more often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from statsmodels.duration.survfunc import SurvfuncRight

from lightning_unfreeze.study.judge.statistics import Array, ArrayLike, hodges_lehmann

MIN_REACHED = 0.7
CONVERGED_POINTS = 0.2

TimeOutcome = Literal["upheld", "refuted", "undecided", "not testable"]
Bracket = tuple[float, float]


@dataclass(frozen=True)
class CostRatio:
    """Cost of arm a over cost of arm b up to a target accuracy.

    Attributes:
        bracket: Geometric mean ratio with arm a at its earliest and b at its latest, and the other way round: all
            that the looks allow. The true mean ratio lies between them.
        interval: Outer 95 % limits of the ratio: Hodges and Lehmann's lower limit of the lowest ratios and upper
            limit of the highest. They cover a ratio that is distributed evenly on the log scale at least so often.
        reached_a: Runs of arm a that reached the target.
        reached_b: Runs of arm b that reached it.
        runs: Pairs.
    """

    bracket: Bracket
    interval: Bracket
    reached_a: int
    reached_b: int
    runs: int

    @property
    def testable(self) -> bool:
        """Whether at least 70 % of the runs of each arm reached the target."""
        return self.runs > 0 and min(self.reached_a, self.reached_b) >= MIN_REACHED * self.runs


def cost_ratio(cost_a: Sequence[Bracket], cost_b: Sequence[Bracket], level: float = 0.95) -> CostRatio:
    """Return the paired ratio of costs to a target.

    Args:
        cost_a: Per seed the cost before which the target was not reached and the one at which it was, infinite where
            it never was.
        cost_b: The same for arm b, same seeds.
        level: Nominal coverage.

    >>> cost = cost_ratio([(4.0, 8.0)] * 6, [(1.0, 2.0)] * 6)
    >>> [round(limit, 6) for limit in (*cost.bracket, *cost.interval)]
    [2.0, 8.0, 2.0, 8.0]

    Raises:
        ValueError: There is not one cost of each arm per seed.
    """
    a, b = (np.asarray(cost, dtype=np.float64).reshape(-1, 2) for cost in (cost_a, cost_b))
    if a.shape != b.shape or len(a) == 0:
        raise ValueError(f"got {len(a)} and {len(b)} costs; pass one bracket (low, high) per seed and arm.")
    with np.errstate(divide="ignore"):
        lowest, highest = np.log(a[:, 0] / b[:, 1]), np.log(a[:, 1]) - np.log(b[:, 0])
    outer = math.exp(hodges_lehmann(lowest, level).low), _exp(hodges_lehmann(highest, level).high)
    bracket = math.exp(lowest.mean()), _exp(float(highest.mean()))
    reached = [int(np.isfinite(cost[:, 1]).sum()) for cost in (a, b)]
    return CostRatio(bracket, outer, reached[0], reached[1], len(a))


def time_verdict(cost: CostRatio) -> TimeOutcome:
    """Apply the rules to "skipping makes training take longer".

    A direction is named only where the outer 95 % limits lie on one side of 1 and the bracket of possible mean ratios
    does too. Fewer than six seeds give infinite limits and name none. A run that never reached the target speaks for
    its side: its cost is above all that it spent. Where neither direction holds and fewer than 70 % of the runs of an
    arm reached the target, there is nothing to read.
    """
    if min(cost.interval[0], cost.bracket[0]) > 1:
        return "upheld"
    if max(cost.interval[1], cost.bracket[1]) < 1:
        return "refuted"
    return "undecided" if cost.testable else "not testable"


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def kaplan_meier(cost: ArrayLike, reached: Sequence[bool] | npt.NDArray[np.bool_]) -> tuple[Array, Array]:
    """Return the costs at which runs reached the target and the share that has *not* reached it from there on.

    Args:
        cost: Cost to the target, or the whole cost of the run where the target was not reached.
        reached: Whether the target was reached; False is a right-censored run.
    """
    curve = SurvfuncRight(np.asarray(cost, dtype=np.float64), np.asarray(reached, dtype=np.int64))
    return np.asarray(curve.surv_times, dtype=np.float64), np.asarray(curve.surv_prob, dtype=np.float64)


def kaplan_meier_median(cost: ArrayLike, reached: Sequence[bool] | npt.NDArray[np.bool_]) -> float | None:
    """Return the cost by which half of the runs are estimated to have reached the target, None beyond the data.

    >>> kaplan_meier_median([3, 5, 5, 7, 9], [True, True, False, True, False])
    7.0
    """
    times, pending = kaplan_meier(cost, reached)
    half = np.flatnonzero(pending <= 0.5 + 1e-12)
    return float(times[half[0]]) if len(half) else None


def restricted_mean(cost: ArrayLike, reached: Sequence[bool] | npt.NDArray[np.bool_], horizon: float) -> float:
    """Return the mean cost to the target counted up to `horizon`: the area under the Kaplan-Meier curve.

    Unlike the ratio on pairs that reached the target, it does not leave the slow runs out.
    """
    times, pending = kaplan_meier(cost, reached)
    inside = times < horizon
    edges = np.concatenate([[0.0], times[inside], [horizon]])
    return float((np.diff(edges) * np.concatenate([[1.0], pending[inside]])).sum())


def epochs_to_converge(epochs: ArrayLike, accuracy: ArrayLike, tolerance: float = CONVERGED_POINTS) -> float | None:
    """Return the first cycle end that no later one beats by more than `tolerance` points, None if not converged.

    The last cycle end always fulfils that and shows nothing, so it does not count.

    Args:
        epochs: Epoch of each cycle end, ascending.
        accuracy: Validation accuracy (points) there.
        tolerance: Improvement (points) that still counts as none.

    >>> epochs_to_converge([1, 3, 7], [60.0, 64.0, 64.1])
    3.0
    """
    values = np.asarray(accuracy, dtype=np.float64)
    for i in range(len(values) - 1):
        if values[i + 1 :].max() <= values[i] + tolerance:
            return float(epochs[i])
    return None
