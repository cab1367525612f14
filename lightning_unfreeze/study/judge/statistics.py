"""What a study may conclude from paired runs: intervals, tests, power, censored costs, and the rules of the verdict.

Pure functions of arrays, over scipy and statsmodels. Differences are in accuracy points (hundredths), one per seed,
because the two arms of a seed share subset, head initialisation, data order and augmentation. The interval to read
first is the paired t: for 3 to 10 seeds a percentile bootstrap of nominal 95 % covers 75 to 90 %, the t interval 94
to 96 %. With skewed differences all of them fall short (t: about 90 % at 5 to 10 seeds).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats
from statsmodels.duration.survfunc import SurvfuncRight
from statsmodels.stats.meta_analysis import combine_effects
from statsmodels.stats.proportion import proportion_confint

MIN_SEEDS_SIGN_FLIP = 6
"""With n seeds the smallest two-sided sign-flip p is ``2 / 2**n``; below 6 seeds it cannot reach 0.05."""
MIN_DATASETS_RANKING = 6
MIN_REACHED = 0.7
CONVERGED_POINTS = 0.2

Array = npt.NDArray[np.float64]
ArrayLike = Sequence[float] | npt.NDArray[Any]
Outcome = Literal["upheld", "small", "refuted-", "refuted+", "undecided"]
TimeOutcome = Literal["upheld", "refuted", "undecided", "not testable"]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    mean: float
    low: float
    high: float
    level: float = 0.95

    def excludes_zero(self) -> bool:
        """Return whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def within(self, margin: float) -> bool:
        """Return whether the whole interval lies strictly inside ``(-margin, margin)``."""
        return -margin < self.low and self.high < margin


def paired_t_interval(differences: ArrayLike, level: float = 0.95) -> Interval:
    """Return the paired t interval of the mean difference; infinite with one pair, which carries no spread.

    >>> interval = paired_t_interval([1.0, 2.0, 3.0])
    >>> round(interval.low, 2), round(interval.high, 2)  # 2 -+ 4.303 / sqrt(3)
    (-0.48, 4.48)

    Raises:
        ValueError: There is no difference.
    """
    d = _finite(differences)
    if len(d) == 1:
        return Interval(float(d[0]), -math.inf, math.inf, level)
    half = float(stats.t.ppf((1 + level) / 2, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d)))
    mean = float(d.mean())
    return Interval(mean, mean - half, mean + half, level)


def sd_interval(differences: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of the standard deviation of normal differences, from the chi-squared distribution.

    >>> low, high = sd_interval([1.0, 2.0, 3.0])  # SD 1; chi-squared of 2 degrees of freedom: 0.0506 and 7.378
    >>> round(low, 3), round(high, 3)
    (0.521, 6.285)

    Raises:
        ValueError: There are fewer than two differences.
    """
    d = _finite(differences)
    if len(d) < 2:
        raise ValueError(f"got {len(d)} difference: a spread takes two or more.")
    tails = stats.chi2.ppf([(1 + level) / 2, (1 - level) / 2], len(d) - 1)
    low, high = (float(math.sqrt((len(d) - 1) * d.var(ddof=1) / tail)) for tail in tails)
    return low, high


def sign_flip_p(differences: ArrayLike) -> float:
    """Return the two-sided p-value of the sign-flip test of the mean.

    Exact (all ``2**n`` sign patterns) to 16 seeds, with 100 000 patterns drawn from a fixed stream above. The null
    hypothesis is that a difference is as likely as its negative, which holds when the two arms are exchangeable
    within a seed.

    >>> sign_flip_p([1.0, 2.0, 3.0])
    0.25
    """
    d = _finite(differences)
    if len(d) == 1:
        return 1.0
    test = stats.permutation_test(
        (d,), np.mean, permutation_type="samples", vectorized=True, n_resamples=100_000, batch=10_000, rng=0
    )
    return float(test.pvalue)


def holm(p_values: ArrayLike) -> Array:
    """Return Holm's adjusted p-values, in the given order (Holm 1979).

    >>> holm([0.04, 0.01]).tolist()
    [0.04, 0.02]
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    # Not statsmodels' multipletests: it runs a full garbage collection, seconds in a process that holds models.
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted


def tost_p(differences: ArrayLike, margin: float) -> float:
    """Return the p-value of two one-sided paired t tests for a mean difference within ``(-margin, margin)``.

    ``tost_p < 0.05`` exactly where the 90 % paired t interval lies inside the margin (Schuirmann 1987).
    """
    d = _finite(differences)
    if len(d) == 1:
        return 1.0
    error = d.std(ddof=1) / math.sqrt(len(d))
    if error == 0:
        return 0.0 if abs(d.mean()) < margin else 1.0
    return float(stats.t.sf((margin - abs(d.mean())) / error, len(d) - 1))


def total_interval(correct_a: npt.ArrayLike, correct_b: npt.ArrayLike, level: float = 0.95) -> Interval:
    """Return the interval of accuracy(a) - accuracy(b) in points over seeds *and* test images.

    The crossed bootstrap resamples seeds and test images independently (Owen 2007, *The pigeonhole bootstrap*). The
    variance of its infinitely many replicates has a closed form: with multinomial weights ``w`` over seeds, ``E[w
    w'] = (1 - 1/S) J + I``, and likewise over images, so nothing is drawn. On few seeds that variance is too small
    by ``(S - 1) / S`` and has no t quantile (86 % coverage at 3 seeds), so the interval is never narrower than the
    paired t interval over seeds.

    Args:
        correct_a: Whether arm a was right, `(S, N)`: seeds, test images.
        correct_b: The same for arm b, same seeds and images.
        level: Nominal coverage.

    Raises:
        ValueError: The shapes differ or are not two-dimensional.
    """
    a, b = np.asarray(correct_a, dtype=np.float64), np.asarray(correct_b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 2 or a.size == 0:
        raise ValueError(
            f"got correctness of shapes {a.shape} and {b.shape}; pass two `(seeds, test images)` arrays of one shape."
        )
    d = a - b
    seeds, images = d.shape
    shrink_seeds, shrink_images = 1 - 1 / seeds, 1 - 1 / images
    second_moment = (
        shrink_seeds * shrink_images * d.sum() ** 2
        + shrink_seeds * (d.sum(axis=0) ** 2).sum()
        + shrink_images * (d.sum(axis=1) ** 2).sum()
        + (d**2).sum()
    ) / d.size**2
    variance = max(second_moment - d.mean() ** 2, 0.0)
    over_seeds = paired_t_interval(100 * d.mean(axis=1), level)
    half = max(100 * math.sqrt(variance) * stats.norm.ppf((1 + level) / 2), over_seeds.high - over_seeds.mean)
    return Interval(over_seeds.mean, over_seeds.mean - half, over_seeds.mean + half, level)


def probability_better(differences: ArrayLike, level: float = 0.95) -> Interval:
    """Return P(A > B) over seeds, ties counted half, with its Wilson interval (Bouthillier et al. 2021).

    >>> probability_better([0.5, 0.2, -0.1, 0.0]).mean
    0.625
    """
    d = _finite(differences)
    wins = float((d > 0).sum() + 0.5 * (d == 0).sum())
    low, high = proportion_confint(wins, len(d), alpha=1 - level, method="wilson")
    return Interval(wins / len(d), float(low), float(high), level)


def paired_t_power(effect: float, seeds: int, alpha: float = 0.05) -> float:
    """Return the power of the two-sided paired t test.

    Averages the normal tail over the distribution of the sample spread: the non-central t of scipy (and with it
    statsmodels' ``TTestPower``) is NaN for the large effects and few seeds that a study meets.

    Args:
        effect: True difference over the standard deviation of the paired differences.
        seeds: Number of pairs.
        alpha: Two-sided level.
    """
    threshold, shift = stats.t.ppf(1 - alpha / 2, seeds - 1) * _spread(seeds), abs(effect) * math.sqrt(seeds)
    return float((stats.norm.sf(threshold - shift) + stats.norm.cdf(-threshold - shift)).mean())


def seeds_to_detect(sd: float, difference: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Return the seeds with which a paired two-sided t test detects `difference` (both in points).

    A sign-flip p below 0.05 needs `MIN_SEEDS_SIGN_FLIP` seeds whatever the spread.

    >>> seeds_to_detect(1.0, 0.5), seeds_to_detect(1.0, 1.0)
    (34, 10)
    """
    return _smallest(lambda n: sd == 0 or paired_t_power(difference / sd, n, alpha) >= power)


def seeds_for_equivalence(sd: float, margin: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Return the seeds with which equivalence within `margin` is shown when the true difference is zero.

    Exact power: for a given sample spread the mean must fall within ``margin - t * error``.
    """

    def enough(n: int) -> bool:
        room = margin * math.sqrt(n) / sd - stats.t.ppf(1 - alpha, n - 1) * _spread(n)
        return float(np.clip(2 * stats.norm.cdf(room) - 1, 0, None).mean()) >= power

    return _smallest(lambda n: sd == 0 or enough(n))


def detectable_difference(sd: float, seeds: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the smallest true difference (points) that `seeds` paired seeds detect with the given power.

    >>> round(detectable_difference(1.0, 10), 2)
    1.0
    """
    return float(sd * optimize.brentq(lambda effect: paired_t_power(effect, seeds, alpha) - power, 0, 1e4))


def image_standard_error(disagreement: float, n_test: int) -> float:
    """Return the standard error (points) that the test images alone leave on a difference between two runs.

    The difference of two accuracies is a mean of values in {-1, 0, 1}, non-zero on the share `disagreement` of the
    images, so its standard error is at most ``sqrt(disagreement / n_test)``. Seeds average away only the part that
    is not systematic.

    >>> round(image_standard_error(0.10, 1000), 2)
    1.0
    """
    return 100 * math.sqrt(disagreement / n_test)


# --- cost to a target -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CostRatio:
    """Cost of arm a over cost of arm b up to a target accuracy, on the pairs where both reached it.

    Attributes:
        ratio: Geometric mean ratio and its interval, or None with fewer than two such pairs.
        pairs: Pairs in which both arms reached the target.
        reached_a: Runs of arm a that reached it.
        reached_b: Runs of arm b that reached it.
        runs: Pairs in all.
    """

    ratio: Interval | None
    pairs: int
    reached_a: int
    reached_b: int
    runs: int

    @property
    def testable(self) -> bool:
        """Whether at least 70 % of the runs of each arm reached the target, so that censoring cannot decide."""
        return self.ratio is not None and min(self.reached_a, self.reached_b) >= MIN_REACHED * self.runs

    @property
    def same_in_all_pairs(self) -> bool:
        """Whether every pair gave one ratio: then its interval has no width, and is no measure of certainty."""
        return self.ratio is not None and math.isclose(self.ratio.low, self.ratio.high)


def cost_ratio(cost_a: ArrayLike, cost_b: ArrayLike, level: float = 0.95) -> CostRatio:
    """Return the paired ratio of costs to a target, by a t interval on the log scale.

    Args:
        cost_a: One cost per seed, NaN where the run never reached the target (censored).
        cost_b: The same for arm b, same seeds.
        level: Nominal coverage.

    >>> cost = cost_ratio([2.0, 8.0, math.nan], [1.0, 4.0, 3.0])
    >>> round(cost.ratio.mean, 6), cost.pairs, cost.testable
    (2.0, 2, False)
    """
    a, b = np.asarray(cost_a, dtype=np.float64), np.asarray(cost_b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"got {a.size} and {b.size} costs; pass one per seed and arm, NaN where the target was not reached."
        )
    both = ~np.isnan(a) & ~np.isnan(b)
    ratio = None
    if both.sum() >= 2:
        log = paired_t_interval(np.log(a[both]) - np.log(b[both]), level)
        ratio = Interval(math.exp(log.mean), math.exp(log.low), math.exp(log.high), level)
    return CostRatio(ratio, int(both.sum()), int((~np.isnan(a)).sum()), int((~np.isnan(b)).sum()), len(a))


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


# --- verdicts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AccuracyVerdict:
    """What the paired differences say about "skipping does not change accuracy".

    Attributes:
        outcome: ``small`` is a real difference inside the margin and counts as upheld.
        interval: 95 % paired t interval (points).
        equivalence: 90 % paired t interval (points), the one that is compared with the margin.
        sd: Standard deviation of the paired differences (points), NaN with one pair.
        seeds: Number of pairs.
        margin: Equivalence margin (points).
    """

    outcome: Outcome
    interval: Interval
    equivalence: Interval
    sd: float
    seeds: int
    margin: float

    @property
    def upheld(self) -> bool:
        """Whether equivalence within the margin was shown."""
        return self.outcome in ("upheld", "small")

    @property
    def seeds_needed(self) -> int | None:
        """Seeds that at this spread detect a difference of the margin and show equivalence when there is none.

        None where the spread is unknown (one pair).
        """
        if math.isnan(self.sd):
            return None
        detect, equivalence = seeds_to_detect(self.sd, self.margin), seeds_for_equivalence(self.sd, self.margin)
        return max(detect, equivalence, MIN_SEEDS_SIGN_FLIP)


def accuracy_verdict(differences: ArrayLike, margin: float) -> AccuracyVerdict:
    """Apply the rules to the paired accuracy differences (points) of one arm to the reference.

    ==========  ============================================================================
    upheld      the 90 % interval lies inside the margin (two one-sided tests at 5 %)
    small       the same, and the 95 % interval excludes zero: real, but below the margin
    refuted     the 95 % interval excludes zero (which puts the mean at half the margin or more)
    undecided   everything else, and fewer than 6 seeds; "not significant" is never "no difference"
    ==========  ============================================================================

    Equivalence comes first: a difference shown to be below what the user called negligible refutes nothing. A few
    seeds decide nothing: their intervals rest on normality alone, and two equal differences would have no width.

    >>> accuracy_verdict([-2.1, -2.6, -2.4, -2.2, -2.5, -2.3], margin=1.0).outcome
    'refuted-'

    Raises:
        ValueError: The margin is not positive or there is no difference.
    """
    if not margin > 0:
        raise ValueError(
            f"got margin={margin}; pass the largest accuracy difference (points, > 0) that does not matter to you."
        )
    d = _finite(differences)
    interval, equivalence = paired_t_interval(d), paired_t_interval(d, 0.90)
    sd = float(d.std(ddof=1)) if len(d) > 1 else math.nan
    outcome: Outcome = "undecided"
    if len(d) < MIN_SEEDS_SIGN_FLIP:
        pass
    elif equivalence.within(margin):
        outcome = "small" if interval.excludes_zero() else "upheld"
    elif interval.excludes_zero():
        # Here |mean| >= margin / 2 holds by itself: off zero and below that, the interval would lie inside the margin.
        outcome = "refuted+" if interval.mean > 0 else "refuted-"
    return AccuracyVerdict(outcome, interval, equivalence, sd, len(d), margin)


def time_verdict(cost: CostRatio) -> TimeOutcome:
    """Apply the rules to "skipping makes training take longer": the 95 % interval of the cost ratio against 1."""
    if not cost.testable or cost.ratio is None:
        return "not testable"
    if cost.ratio.low > 1:
        return "upheld"
    return "refuted" if cost.ratio.high < 1 else "undecided"


# --- across data sets -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergedEffect:
    """A random-effects mean over data sets.

    Attributes:
        effect: Mean difference (points) and its interval, by a t quantile with ``datasets - 1`` degrees of freedom.
        tau: Standard deviation (points) of the true effect between data sets.
        i2: Share of the observed variation that is more than sampling error.
        q_p: p-value of Cochran's test of homogeneity.
        datasets: Number of data sets.
    """

    effect: Interval
    tau: float
    i2: float
    q_p: float
    datasets: int


def merge_effects(effects: ArrayLike, standard_errors: ArrayLike, level: float = 0.95) -> MergedEffect:
    """Merge one effect per data set by a random-effects model (Paule-Mandel, with a t interval).

    The interval is never narrower than Hartung and Knapp's.

    Raises:
        ValueError: Fewer than two data sets, or a standard error that is not positive.
    """
    mean, error = np.asarray(effects, dtype=np.float64), np.asarray(standard_errors, dtype=np.float64)
    if len(mean) < 2 or mean.shape != error.shape or not (error > 0).all():
        raise ValueError(
            f"got effects {mean.tolist()} with standard errors {error.tolist()}; merging needs two or more data sets, "
            "each with a positive standard error (at least two seeds that differ)."
        )
    with np.errstate(divide="ignore"):  # identical effects: statsmodels divides by Q = 0 for an I2 that is not used
        merged = combine_effects(mean, error**2, method_re="iterated")
    t = float(stats.t.ppf((1 + level) / 2, len(mean) - 1))
    half = t * max(float(merged.sd_eff_w_re), float(merged.sd_eff_w_re_hksj))
    centre = float(merged.mean_effect_re)
    q = float((((mean - float(merged.mean_effect_fe)) / error) ** 2).sum())
    degrees = len(mean) - 1
    return MergedEffect(
        effect=Interval(centre, centre - half, centre + half, level),
        tau=math.sqrt(max(float(merged.tau2), 0.0)),
        i2=max(0.0, (q - degrees) / q) if q > 0 else 0.0,
        q_p=float(stats.chi2.sf(q, degrees)),
        datasets=len(mean),
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


def _finite(differences: ArrayLike) -> Array:
    """Return the differences as an array, refusing an empty or non-finite one."""
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or len(d) == 0 or not np.isfinite(d).all():
        raise ValueError(f"got differences {d.tolist()}; pass one finite number per pair, at least one.")
    return d


def _spread(seeds: int) -> Array:
    """Return equally likely values of (sample / true) standard deviation, the square root of a scaled chi-square."""
    quantiles = (np.arange(2000) + 0.5) / 2000
    return np.asarray(np.sqrt(stats.chi2.ppf(quantiles, seeds - 1) / (seeds - 1)), dtype=np.float64)


def _smallest(enough: Callable[[int], bool]) -> int:
    """Return the smallest n >= 2 for which the monotone predicate holds."""
    high = 2
    while not enough(high):
        high *= 2
    low = max(2, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low
