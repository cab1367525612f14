"""Several studies together: a mean effect over data sets with backbones inside them, and a ranking of arms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import linalg, optimize, stats

from lightning_unfreeze.study.judge.statistics import Array, ArrayLike, Interval

MIN_DATASETS_RANKING = 6


@dataclass(frozen=True)
class MergedEffect:
    """A random-effects mean over data sets.

    Attributes:
        effect: Mean difference (points) and its interval, by a t quantile with ``datasets - 1`` degrees of freedom.
        tau: Standard deviation (points) of the true effect between data sets.
        tau_within: The same between studies of one data set (other backbones), zero where each has one.
        i2: Share of the observed variation that is more than sampling error.
        datasets: Number of data sets.
        studies: Number of studies.
    """

    effect: Interval
    tau: float
    tau_within: float
    i2: float
    datasets: int
    studies: int


def merge_effects(
    effects: ArrayLike, standard_errors: ArrayLike, datasets: Sequence[str] | None = None, level: float = 0.95
) -> MergedEffect:
    """Merge effects by a random-effects model: studies (one backbone each) within data sets, data sets at random.

    ``effect = mean + dataset + study + sampling error`` with known sampling variances, the two variances between by
    REML, and the mean by generalised least squares. Its standard error is never smaller than that from the data sets'
    own residuals (Knapp and Hartung 2003), with one degree of freedom less than there are data sets: more backbones
    on the same photos are no more data sets. What the photos of one set do to all its studies alike is part of the
    spread between sets.

    Args:
        effects: One per study (points).
        standard_errors: Theirs, seeds and test images included.
        datasets: Data set of each study; None counts every study as one of its own.
        level: Nominal coverage.

    Raises:
        ValueError: Fewer than two data sets, or a standard error that is not positive.
    """
    y, error = np.asarray(effects, dtype=np.float64), np.asarray(standard_errors, dtype=np.float64)
    names = list(datasets) if datasets is not None else [str(index) for index in range(len(y))]
    sets = sorted(set(names))
    if len(sets) < 2 or y.shape != error.shape or len(names) != len(y) or not (error > 0).all():
        raise ValueError(
            f"got effects {y.tolist()} with standard errors {error.tolist()} of {len(sets)} data sets; merging needs "
            "two or more data sets, each effect with a positive standard error (at least two seeds that differ)."
        )
    member = np.array([[name == one for one in sets] for name in names], dtype=np.float64)
    nested = len(sets) < len(y)

    def solve(tau2: Sequence[float]) -> tuple[float, float, float]:
        """Return the mean, its variance, and -2 times the restricted log likelihood."""
        covariance = np.diag(error**2 + (tau2[1] if nested else 0.0)) + tau2[0] * member @ member.T
        factor = linalg.cho_factor(covariance, lower=True)
        weights = linalg.cho_solve(factor, np.ones(len(y)))
        mean = float(weights @ y / weights.sum())
        off = y - mean
        deviance = 2 * np.log(np.diag(factor[0])).sum() + math.log(weights.sum()) + off @ linalg.cho_solve(factor, off)
        return mean, float(1 / weights.sum()), float(deviance)

    # several starts: the likelihood of few sets is flat, and has its best value at a bound as a rule
    scale = float(y.var()) + float((error**2).mean())
    starts = [(0.0, 0.0), (scale, 0.0), (scale / 2, scale / 2), (0.0, scale)]
    found = [
        optimize.minimize(lambda tau2: solve(tau2)[2], start, bounds=[(0, None)] * 2, method="L-BFGS-B")
        for start in (starts if nested else starts[:2])
    ]
    tau2 = min(found, key=lambda result: float(result.fun)).x
    mean, variance, _ = solve(tau2)
    # each data set's mean deviation, weighted as the model does
    total = error**2 + (tau2[1] if nested else 0.0)
    weight = member.T @ (1 / total)
    set_mean = member.T @ (y / total) / weight
    set_weight = 1 / (tau2[0] + 1 / weight)
    residual = float((set_weight * (set_mean - mean) ** 2).sum()) / (len(sets) - 1)
    half = float(stats.t.ppf((1 + level) / 2, len(sets) - 1)) * math.sqrt(variance * max(1.0, residual))
    fixed = float((y / error**2).sum() / (1 / error**2).sum())
    q, degrees = float((((y - fixed) / error) ** 2).sum()), len(y) - 1
    return MergedEffect(
        effect=Interval(mean, mean - half, mean + half, level),
        tau=math.sqrt(max(float(tau2[0]), 0.0)),
        tau_within=math.sqrt(max(float(tau2[1]), 0.0)) if nested else 0.0,
        i2=max(0.0, (q - degrees) / q) if q > 0 else 0.0,
        datasets=len(sets),
        studies=len(y),
    )


@dataclass(frozen=True)
class Ranking:
    """Friedman's test over data sets with Nemenyi's critical difference.

    Attributes:
        mean_ranks: Mean rank of each arm, 1 is best.
        p: p-value of Friedman's test.
        critical_difference: Mean ranks nearer than this do not differ at 5 %.
    """

    mean_ranks: Array
    p: float
    critical_difference: float


def rank_arms(scores: npt.ArrayLike, alpha: float = 0.05) -> Ranking:
    """Rank arms across data sets (Demsar 2006).

    Args:
        scores: Mean accuracy `(D, K)`: data sets, arms. Higher is better.
        alpha: Level of the critical difference.

    Raises:
        ValueError: Fewer than six data sets or three arms. Seeds of one data set are no substitute: they are not
            independent draws from a population of tasks, and would make the ranking look certain.
    """
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] < MIN_DATASETS_RANKING or table.shape[1] < 3:
        raise ValueError(
            f"got scores of shape {table.shape}; a critical-difference ranking needs at least {MIN_DATASETS_RANKING} "
            "data sets and 3 arms. Seeds are not data sets: read the pairwise table instead, or merge more studies."
        )
    datasets, arms = table.shape
    ranks = stats.rankdata(-table, axis=1)
    q = float(stats.studentized_range.ppf(1 - alpha, arms, np.inf)) / math.sqrt(2)
    return Ranking(
        mean_ranks=ranks.mean(axis=0),
        p=float(stats.friedmanchisquare(*table.T).pvalue),
        critical_difference=q * math.sqrt(arms * (arms + 1) / (6 * datasets)),
    )
