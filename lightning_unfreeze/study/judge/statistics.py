"""What paired runs say about an accuracy difference: intervals, tests, power, and the rules of the verdict.

Pure functions of arrays, over scipy and statsmodels. Differences are in accuracy points (hundredths), one per seed,
because the two arms of a seed share subset, head initialisation, data order and augmentation.

Two questions have two intervals. *On new images*: seeds and test images are crossed random samples, and both count;
that is the headline. *On these test images*: the paired t interval over seeds alone, which gets narrower with every
seed while what the test images leave open stays. `benchmarks/study_calibration.py` simulates both.

The longest room: all arithmetic that a verdict rests on stands here and nowhere else, so that one reading checks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats
from statsmodels.stats.proportion import proportion_confint

MIN_SEEDS_SIGN_FLIP = 6
"""With n seeds the smallest two-sided sign-flip p is ``2 / 2**n``; below 6 seeds it cannot reach 0.05."""
ALPHA = 0.05
OUTLIER_SCORE = 3.5
EXACT_SEEDS = 16

Array = npt.NDArray[np.float64]
ArrayLike = Sequence[float] | npt.NDArray[Any]
Outcome = Literal["equal", "better", "worse", "not zero", "undecided"]


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

    def beyond(self, margin: float) -> bool:
        """Return whether the whole interval lies strictly outside ``[-margin, margin]``."""
        return self.low > margin or self.high < -margin


@dataclass(frozen=True)
class Effect:
    """A mean paired difference (points) with what is uncertain about it.

    Its variance is ``seed_variance / seeds + image_variance``, and its degrees of freedom are Satterthwaite's.

    Attributes:
        mean: Mean difference over seeds and test images.
        seeds: Number of pairs.
        seed_variance: Variance of one seed's difference.
        image_variance: Variance that the choice of the test images leaves, however many seeds there are; zero where
            the question is about these images alone.
        image_df: Degrees of freedom of the latter.
    """

    mean: float
    seeds: int
    seed_variance: float
    image_variance: float = 0.0
    image_df: float = math.inf

    @property
    def error(self) -> float:
        """Standard error; infinite with one pair, which carries no spread."""
        return math.sqrt(self.variance(self.seeds)) if self.seeds > 1 else math.inf

    @property
    def df(self) -> float:
        """Degrees of freedom: those of the seeds where images add nothing, more where images carry the variance."""
        return _degrees(self.seed_variance / self.seeds, self.seeds - 1, self.image_variance, self.image_df)

    def variance(self, seeds: int) -> float:
        """Return the variance of the mean over that many seeds."""
        return self.seed_variance / seeds + self.image_variance

    def interval(self, level: float = 0.95) -> Interval:
        """Return the confidence interval, from a t quantile."""
        if self.seeds < 2:
            return Interval(self.mean, -math.inf, math.inf, level)
        half = float(stats.t.ppf((1 + level) / 2, self.df)) * self.error
        return Interval(self.mean, self.mean - half, self.mean + half, level)

    def p_zero(self) -> float:
        """Return the two-sided p-value of no difference."""
        return min(1.0, 2 * self._tail(abs(self.mean)))

    def p_equal(self, margin: float) -> float:
        """Return the p-value of two one-sided tests for a difference within the margin (Schuirmann 1987)."""
        return self._tail(margin - abs(self.mean))

    def _tail(self, distance: float) -> float:
        if self.error == 0:
            return 0.0 if distance > 0 else 1.0
        return float(stats.t.sf(distance / self.error, self.df)) if math.isfinite(self.error) else 1.0


def seed_effect(differences: ArrayLike) -> Effect:
    """Return the effect over other seeds on the same test images: its intervals are the paired t intervals.

    >>> interval = seed_effect([1.0, 2.0, 3.0]).interval()
    >>> round(interval.low, 2), round(interval.high, 2)  # 2 -+ 4.303 / sqrt(3)
    (-0.48, 4.48)

    Raises:
        ValueError: There is no difference.
    """
    d = _finite(differences)
    return Effect(float(d.mean()), len(d), float(d.var(ddof=1)) if len(d) > 1 else math.nan)


def paired_t_interval(differences: ArrayLike, level: float = 0.95) -> Interval:
    """Return the paired t interval of the mean difference over seeds; infinite with one pair."""
    return seed_effect(differences).interval(level)


def crossed_effect(a: npt.ArrayLike, b: npt.ArrayLike) -> Effect:
    """Return the effect a - b over other seeds *and* new test images.

    Seeds and images are crossed random effects: ``d[s, i] = mean + seed[s] + image[i] + rest[s, i]``. From the mean
    squares of that table without replication, ``MS_seeds + MS_images - MS_rest`` over ``S N`` is an unbiased estimate
    of the variance of the grand mean, whatever the joint distribution of exchangeable seeds and images is. As in the
    analysis of readers and cases of Obuchowski, Rockette and Hillis (Hillis 2007), the images' part
    ``MS_images - MS_rest`` is never taken to be below zero, and the degrees of freedom are Satterthwaite's; those of
    the images follow from the kurtosis of their effects, because arms that differ on few images leave few.

    Args:
        a: Score of arm a on each test image, in [0, 1], `(S, N)`: seeds, test images. Correctness, as a rule.
        b: The same for arm b, same seeds and images.

    Raises:
        ValueError: The shapes differ or are not two-dimensional.
    """
    one, two = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if one.shape != two.shape or one.ndim != 2 or one.size == 0:
        raise ValueError(
            f"got scores of shapes {one.shape} and {two.shape}; pass two `(seeds, test images)` arrays of one shape."
        )
    d = 100 * (one - two)
    seeds, images = d.shape
    over_seeds = seed_effect(d.mean(axis=1))
    if seeds < 2 or images < 2:
        return over_seeds
    by_image = d.mean(axis=0) - d.mean()
    ms_images = seeds * float((by_image**2).sum()) / (images - 1)
    rest = d - d.mean(axis=1, keepdims=True) - by_image
    ms_rest = float((rest**2).sum()) / ((seeds - 1) * (images - 1))
    image_variance = max(ms_images - ms_rest, 0.0) / d.size
    return Effect(over_seeds.mean, seeds, over_seeds.seed_variance, image_variance, _variance_df(by_image))


def _variance_df(centred: Array) -> float:
    """Return the degrees of freedom of a sample variance: 2 / (kurtosis - 1) per observation."""
    second = float((centred**2).sum())
    if second == 0:
        return math.inf
    kurtosis = len(centred) * float((centred**4).sum()) / second**2
    return max(2 * len(centred) / (kurtosis - 1), 1.0) if kurtosis > 1 else float(len(centred) - 1)


def _degrees(seed_part: float, seed_df: float, image_part: float, image_df: float) -> float:
    parts = seed_part**2 / max(seed_df, 1) + (image_part**2 / image_df if image_part else 0.0)
    return (seed_part + image_part) ** 2 / parts if parts > 0 else math.inf


def sd_limit(differences: ArrayLike, confidence: float = 0.8) -> float:
    """Return the upper confidence limit of the standard deviation of normal differences (chi-squared).

    A number of seeds that takes a pilot's own SD for the truth has its power in about half of the studies; with the
    upper 80 % limit it has it in 80 % of them (Browne 1995).

    >>> round(sd_limit([1.0, 2.0, 3.0], 0.975), 3)  # SD 1, chi-squared of 2 degrees of freedom: 0.0506
    6.285

    Raises:
        ValueError: There are fewer than two differences.
    """
    d = _finite(differences)
    if len(d) < 2:
        raise ValueError(f"got {len(d)} difference: a spread takes two or more.")
    return float(math.sqrt((len(d) - 1) * d.var(ddof=1) / stats.chi2.ppf(1 - confidence, len(d) - 1)))


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
    if len(d) <= EXACT_SEEDS:
        test = stats.permutation_test(
            (d,), np.mean, permutation_type="samples", vectorized=True, n_resamples=100_000, batch=10_000, rng=0
        )
        return float(test.pvalue)
    # scipy draws permutations, which takes minutes for hundreds of seeds
    rng, seen, as_far = np.random.default_rng(0), abs(float(d.sum())) * (1 - 1e-12), 0
    for _ in range(10):
        signs = 2 * rng.integers(0, 2, (10_000, len(d)), np.int8) - 1
        as_far += int((np.abs(signs.astype(np.float64) @ d) >= seen).sum())
    return (as_far + 1) / 100_001


def fewest_seeds(comparisons: int = 1, alpha: float = ALPHA) -> int:
    """Return the seeds below which no sign-flip p can be under ``alpha`` after Holm over that many comparisons.

    >>> fewest_seeds(), fewest_seeds(4)
    (6, 8)
    """
    return math.ceil(math.log2(2 * max(comparisons, 1) / alpha) - 1e-12)


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


def hodges_lehmann(differences: ArrayLike, level: float = 0.95) -> Interval:
    """Return the Hodges-Lehmann estimate with its exact signed-rank interval: what a few wild pairs cannot move.

    The median of the means of all pairs of differences (each with itself too). The interval is the set of shifts that
    Wilcoxon's test does not refuse; it is infinite where there are too few differences for the level. Infinite
    differences of one sign are allowed, and stand for a bound that is not known.

    >>> hodges_lehmann([1.0, 2.0, 3.0, 4.0, 5.0, 60.0]).mean
    3.5
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or len(d) == 0 or np.isnan(d).any():
        raise ValueError(f"got differences {d.tolist()}; pass one number per pair, at least one.")
    first, second = np.triu_indices(len(d))
    means = np.sort((d[first] + d[second]) / 2)
    # distribution of the sum of positive ranks: every rank is in it or not
    share = np.ones(1)
    for rank in range(1, len(d) + 1):
        share = (np.pad(share, (0, rank)) + np.pad(share, (rank, 0))) / 2
    below = int(np.searchsorted(np.cumsum(share), (1 - level) / 2, side="right"))
    low, high = (means[below - 1], means[-below]) if below else (-math.inf, math.inf)
    return Interval(float(np.median(means)) if np.isfinite(means).all() else float(_middle(means)), low, high, level)


def _middle(ordered: Array) -> float:
    """Return the median where some values are infinite, of which one sign alone occurs."""
    half = len(ordered) // 2
    return float(ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2)


def outliers(differences: ArrayLike) -> list[int]:
    """Return the places of differences that lie far off the others (modified z-score, Iglewicz and Hoaglin 1993).

    >>> outliers([0.1, -0.3, 0.2, 0.0, -0.1, 9.0])
    [5]
    """
    d = _finite(differences)
    off = np.abs(d - np.median(d))
    scale = float(np.median(off)) / 0.6745 or 1.2533 * float(off.mean())
    return [int(index) for index in np.flatnonzero(off > OUTLIER_SCORE * scale)] if scale > 0 else []


def probability_better(differences: ArrayLike, level: float = 0.95) -> Interval:
    """Return P(A > B) over seeds, ties counted half, with its Wilson interval (Bouthillier et al. 2021).

    >>> probability_better([0.5, 0.2, -0.1, 0.0]).mean
    0.625
    """
    d = _finite(differences)
    wins = float((d > 0).sum() + 0.5 * (d == 0).sum())
    low, high = proportion_confint(wins, len(d), alpha=1 - level, method="wilson")
    return Interval(wins / len(d), float(low), float(high), level)


def overlap_factor(seeds: int, share: float) -> float:
    """Return by how much an interval over seeds can be too narrow where seeds share training images.

    Two seeds have the share ``share`` of their training images in common. If all the spread came from which images
    train, and each image added its own part, the mean of S seeds would have the variance ``(1/S + share / (1 -
    share))`` of one seed's, not ``1/S``: the correction of Nadeau and Bengio (2003) for resampled training sets,
    with the overlap in place of their test share. A bound, because the head, the order and the augmentation, which
    no two seeds share, spread too.

    >>> round(overlap_factor(10, 0.5), 2), overlap_factor(10, 1.0)
    (3.32, inf)
    """
    return math.sqrt(1 + seeds * share / (1 - share)) if share < 1 else math.inf


def spent_alpha(looks: Sequence[int], alpha: float = ALPHA) -> list[float]:
    """Return the level of each planned look so that all looks together err in at most ``alpha``.

    Lan and DeMets' spending function of O'Brien and Fleming's kind says how much is spent by then, and each look gets
    what has been added since the one before. By the union bound that holds for every test and needs no joint
    distribution; it costs the last look about a tenth of its level.

    Args:
        looks: Seeds at each look, ascending.
        alpha: Level of all of them together.

    >>> [round(level, 4) for level in spent_alpha([6, 12])], spent_alpha([10])
    ([0.0056, 0.0444], [0.05])
    """
    shares = np.asarray(looks, dtype=np.float64) / looks[-1]
    spent = [float(2 * stats.norm.sf(stats.norm.isf(alpha / 2) / math.sqrt(share))) for share in shares]
    return [round(now - before, 12) for before, now in zip([0.0, *spent], spent, strict=False)]


# --- power ------------------------------------------------------------------------------------------------------------


def power_to_detect(effect: Effect, difference: float, seeds: int, alpha: float = ALPHA) -> float:
    """Return the power to tell a true difference (points) from zero with that many seeds.

    Averages the normal tail over the distribution of the sample spread: the non-central t of scipy (and with it
    statsmodels' ``TTestPower``) is NaN for the large effects and few seeds that a study meets.

    Args:
        effect: Gives the variance of a seed's difference, and what the test images leave.
        difference: The true one.
        seeds: Number of pairs.
        alpha: Two-sided level.
    """
    half, error = _half_widths(effect, seeds, 1 - alpha / 2)
    shift = abs(difference) / error
    return float((stats.norm.sf(half - shift) + stats.norm.cdf(-half - shift)).mean())


def power_to_equate(effect: Effect, margin: float, seeds: int, alpha: float = ALPHA) -> float:
    """Return the power to show a difference within the margin where it is zero; arguments as for `power_to_detect`."""
    half, error = _half_widths(effect, seeds, 1 - alpha)
    return float(np.clip(2 * stats.norm.cdf(margin / error - half) - 1, 0, None).mean())


def seeds_to_detect(
    sd: float, difference: float, *, alpha: float = ALPHA, power: float = 0.8, image_variance: float = 0.0
) -> int | None:
    """Return the seeds with which `difference` (points) is told from zero, None where the test images forbid it.

    A sign-flip p below 0.05 needs `MIN_SEEDS_SIGN_FLIP` seeds whatever the spread.

    Args:
        sd: Standard deviation of the paired differences (points).
        difference: The true one.
        alpha: Two-sided level.
        power: Wanted probability.
        image_variance: As in `Effect`.

    >>> seeds_to_detect(1.0, 0.5), seeds_to_detect(1.0, 1.0), seeds_to_detect(1.0, 1.0, image_variance=1.0)
    (34, 10, None)
    """
    effect = Effect(0.0, 2, sd**2, image_variance)
    return _smallest(lambda n: power_to_detect(effect, difference, n, alpha) >= power, sd, image_variance)


def seeds_for_equivalence(
    sd: float, margin: float, *, alpha: float = ALPHA, power: float = 0.8, image_variance: float = 0.0
) -> int | None:
    """Return the seeds with which equality within `margin` is shown where the true difference is zero, None likewise.

    Exact power: for a given sample spread the mean must fall within ``margin - t * error``.
    """
    effect = Effect(0.0, 2, sd**2, image_variance)
    return _smallest(lambda n: power_to_equate(effect, margin, n, alpha) >= power, sd, image_variance)


def detectable_difference(sd: float, seeds: int, *, alpha: float = ALPHA, power: float = 0.8) -> float:
    """Return the smallest true difference (points) that `seeds` paired seeds detect with the given power.

    >>> round(detectable_difference(1.0, 10), 2)
    1.0
    """
    unit = Effect(0.0, 2, 1.0)
    return float(sd * optimize.brentq(lambda d: power_to_detect(unit, d, seeds, alpha) - power, 0, 1e4))


def image_standard_error(disagreement: float, n_test: int) -> float:
    """Return the standard error (points) that the test images alone leave on a difference between two runs.

    The difference of two accuracies is a mean of values in {-1, 0, 1}, non-zero on the share `disagreement` of the
    images, so its standard error is at most ``sqrt(disagreement / n_test)``. Seeds average away only the part that
    is not systematic.

    >>> round(image_standard_error(0.10, 1000), 2)
    1.0
    """
    return 100 * math.sqrt(disagreement / n_test)


def smallest_margin(error: float, alpha: float = ALPHA, power: float = 0.8) -> float:
    """Return the least margin within which equal arms are shown equal with that power, by any number of seeds.

    Two one-sided tests of a difference whose standard error (points) is what the test images leave:
    ``(z(1 - alpha) + z((1 + power) / 2)) * error``.

    >>> round(smallest_margin(1.0), 2)
    2.93
    """
    return float(stats.norm.ppf(1 - alpha) + stats.norm.ppf((1 + power) / 2)) * error


def _half_widths(effect: Effect, seeds: int, quantile: float) -> tuple[Array, float]:
    """Return equally likely half widths of the interval in standard errors, and the standard error."""
    part, images = effect.seed_variance / seeds, effect.image_variance
    error = math.sqrt(part + images) or 1e-300
    # equally likely sample variances: a scaled chi-square
    sample = part * stats.chi2.ppf((np.arange(2000) + 0.5) / 2000, seeds - 1) / (seeds - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        df = np.where(sample > 0, (seeds - 1) * ((sample + images) / sample) ** 2, np.inf)
    return np.asarray(stats.t.ppf(quantile, df) * np.sqrt(sample + images) / error), error


def _smallest(enough: Callable[[int], bool], sd: float, image_variance: float) -> int | None:
    """Return the smallest n >= 2 for which the monotone predicate holds, None where not even a million does."""
    if sd == 0 and image_variance == 0:
        return 2
    if image_variance and not enough(1_000_000):
        return None
    high = 2
    while not enough(high):
        high *= 2
    low = max(2, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


# --- the rules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AccuracyVerdict:
    """What the paired runs say about "skipping does not change accuracy".

    Attributes:
        outcome: One of the four of `accuracy_verdict`.
        effect: The effect that it is about.
        interval: The interval that is compared with zero and with the margin, 95 % for one comparison at one look.
        equivalence: The one that must lie inside the margin, 90 % likewise.
        margin: Equivalence margin (points).
        comparisons: Number of comparisons that share the level.
    """

    outcome: Outcome
    effect: Effect
    interval: Interval
    equivalence: Interval
    margin: float
    comparisons: int

    @property
    def seeds(self) -> int:
        """Number of pairs."""
        return self.effect.seeds

    @property
    def sd(self) -> float:
        """Standard deviation of the paired differences (points), NaN with one pair."""
        return math.sqrt(self.effect.seed_variance)

    @property
    def seeds_needed(self) -> int | None:
        """Seeds that tell a difference of the margin from zero and show equality where there is none; see below.

        None where the spread is unknown (one pair), and where the test images are too few for any number of seeds.
        """
        if math.isnan(self.sd):
            return None
        # of the whole study: an early look has a level that no later seed is held to
        alpha, images = ALPHA / max(self.comparisons, 1), self.effect.image_variance
        found = (
            seeds_to_detect(self.sd, self.margin, alpha=alpha, image_variance=images),
            seeds_for_equivalence(self.sd, self.margin, alpha=alpha, image_variance=images),
        )
        known = [seeds for seeds in found if seeds is not None]
        return max(*known, fewest_seeds(self.comparisons)) if len(known) == len(found) else None


def accuracy_verdict(
    effect: Effect | ArrayLike, margin: float, *, alpha: float = ALPHA, comparisons: int = 1
) -> AccuracyVerdict:
    """Apply the rules to the effect of one arm against the reference.

    =============  ==========================================================================================
    equal          the 90 % interval lies inside the margin (two one-sided tests at 5 %)
    better, worse  the 95 % interval lies beyond the margin
    not zero       the 95 % interval excludes zero, and neither of the above: there is a difference, and
                   whether it is larger than the margin is open
    undecided      everything else, and too few seeds; "not significant" is never "no difference"
    =============  ==========================================================================================

    A true difference of half the margin is thus called better or worse in far less than 2.5 % of studies, one of the
    margin in 2.5 %. With several comparisons the level is divided by their number (Bonferroni), for intervals and
    outcomes alike. Few seeds decide nothing: their intervals rest on normality alone, and fewer than `fewest_seeds`
    could not reach the level with a test that does not.

    Args:
        effect: The effect, or the paired differences (points) on these test images.
        margin: Largest difference (points) that does not matter.
        alpha: Level; less than 5 % at an early look.
        comparisons: Comparisons that share it.

    >>> accuracy_verdict([-2.1, -2.6, -2.4, -2.2, -2.5, -2.3], margin=1.0).outcome
    'worse'

    Raises:
        ValueError: The margin is not positive or there is no difference.
    """
    if not margin > 0:
        raise ValueError(
            f"got margin={margin}; pass the largest accuracy difference (points, > 0) that does not matter to you."
        )
    found = effect if isinstance(effect, Effect) else seed_effect(effect)
    level = alpha / comparisons
    interval, equivalence = found.interval(1 - level), found.interval(1 - 2 * level)
    outcome: Outcome = "undecided"
    if found.seeds < fewest_seeds(comparisons):
        pass
    elif equivalence.within(margin):
        outcome = "equal"
    elif interval.beyond(margin):
        outcome = "better" if interval.mean > 0 else "worse"
    elif interval.excludes_zero():
        outcome = "not zero"
    return AccuracyVerdict(outcome, found, interval, equivalence, margin, comparisons)


def _finite(differences: ArrayLike) -> Array:
    """Return the differences as an array, refusing an empty or non-finite one."""
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or len(d) == 0 or not np.isfinite(d).all():
        raise ValueError(f"got differences {d.tolist()}; pass one finite number per pair, at least one.")
    return d
