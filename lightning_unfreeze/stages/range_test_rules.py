"""The arithmetic of a range test: ramps, smoothing, and what a curve suggests. Pure functions, numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_unfreeze.stages.schedules import check

FloatArray: TypeAlias = NDArray[np.float64]
SuggestionMethod = Literal["valley", "slide", "minimum/10", "steep", "still_improving", "below_rise"]
End = Literal["fall", "rise", "none"]

_MIN_POINTS = 5  # fewer points than this are not a curve
_SLIDE_WIDTH, _SLIDE_THRESHOLD = 15, 0.005  # fastai's defaults
_STILL_CLEAR = 0.5  # share of the steepest slope that counts as clearly improving
# A fall is a signal above this many standard deviations of what noise alone would do on the way to the lowest loss.
# Measured on flat Gaussian noise of 100 steps: none of 500 curves passes raw, 3 to 6 in 100 after an EMA (0.98, 0.9).
_WANDERING, _WHITE = 2.5, 4.5
_WHITE_BELOW = -0.37  # lag-1 correlation of the differences: -0.5 for white noise, near -0.1 for smoothed noise
_FLOAT32_NOISE = 1e-6
_PLAIN_FALL, _PLAIN_RISE = 0.05, 0.25  # of the level: what anyone sees, whatever the noise
# what a rate from below the rise is divided by; all three measured: benchmarks/results/finder.md
_BELOW_RISE, _LEAST_BELOW_RISE, _BELOW_RISE_AT_ONE_STEP = 20.0, 3.0, 105.0
_WARMED_UP, _STEPS_THAT_WARM_UP = 3.0, 3.0
_CLEAR_NOISE = 4.0  # standard deviations of a mean of points


def exponential_ramp(start: float, end: float, num_steps: int) -> FloatArray:
    """`num_steps` rates from `start` to `end`, both included, each the same factor above the one before.

    >>> exponential_ramp(0.001, 1, 4).round(3).tolist()
    [0.001, 0.01, 0.1, 1.0]
    """
    check(0 < start < end < float("inf"), "(start, end)", (start, end), "rates with 0 < start < end")
    check(num_steps >= 2, "num_steps", num_steps, "at least 2")
    return np.geomspace(start, end, num_steps)


def debiased_ema(losses: Sequence[float] | NDArray[Any], beta: float = 0.98) -> FloatArray:
    """Exponential moving average, divided by its weights' sum so that it starts at the first loss and not at 0.

    Args:
        losses: one per step, shape `(N,)`; a NaN makes the rest NaN.
        beta: weight of the past, in [0, 1).

    >>> debiased_ema([1.0, 2.0], beta=0.5).round(3).tolist()
    [1.0, 1.667]
    """
    check(0 <= beta < 1, "beta", beta, "in [0, 1)")
    average, smoothed = 0.0, []
    for step, loss in enumerate(losses, start=1):
        average = beta * average + (1 - beta) * float(loss)
        smoothed.append(average / (1 - beta**step))
    return np.array(smoothed, dtype=np.float64)


def diverged(losses: Sequence[float] | NDArray[Any], factor: float = 4.0) -> bool:
    """Whether the last loss says that the rate has become too high.

    True if any loss is NaN or infinite, or if the last one is more than `factor - 1` units above the lowest. The unit
    is the size of the lowest loss or the fall down to it, whichever is more. For positive losses that is in general the
    usual "`factor` times the best", which fails where the best loss is negative or close to 0.

    Args:
        losses: smoothed losses so far, shape `(N,)`.
        factor: above 1.

    >>> diverged([2.3, 1.6, 6.3]), diverged([2.3, 1.6, 6.5]), diverged([-2.7, -3.0, -2.9])
    (False, True, False)
    """
    check(factor > 1, "factor", factor, "above 1")
    curve = np.asarray(losses, dtype=np.float64)
    if not curve.size:
        return False
    if not np.isfinite(curve).all():
        return True
    lowest = int(curve.argmin())
    best = curve[lowest]
    unit = max(abs(best), curve[: lowest + 1].max() - best)
    # unit 0: the first loss was exactly 0 and is the lowest, there is nothing yet to measure a rise with
    return bool(unit > 0 and curve[-1] - best > (factor - 1) * unit)


@dataclass(frozen=True)
class Answer:
    """A rate, and which end of the curve gave it.

    Attributes:
        rate: The suggestion; None where there is none.
        end: `"fall"`: a rule read it off where the loss falls; `"rise"`: a part of the rate at which the loss clearly
            rises (`below_rise`); `"none"`: the curve does neither.
        rise: Rate from which on the loss is clearly above its lowest; None where it never is.
    """

    rate: float | None
    end: End
    rise: float | None = None


def suggest_lr(lrs: ArrayLike, losses: ArrayLike, method: SuggestionMethod = "valley") -> float | None:
    """The learning rate that a range test suggests, or None if its curve neither falls nor rises.

    The curve is taken as given (smooth it and cut its ends first) up to its first loss that is not finite. Where it
    falls, the method says where to read it. The first four are fastai 2's rules.

    * `valley`: into the longest decreasing subsequence by a third and a sixth of its length, counted from its end.
    * `slide`: the lowest rate of the right end over which the slope differs from that 15 points higher by over 0.005.
    * `minimum/10`: a tenth of the rate of the lowest loss.
    * `steep`: the rate where the loss falls fastest per log rate.
    * `still_improving`: the highest rate, up to that of the lowest loss, at which the loss still falls at least half as
      fast per log rate as where it falls fastest. Slopes are least-squares lines through a point and a twentieth of
      the curve (at least one point) to each side.
    * `below_rise`: a twentieth of the rate at which the loss starts to rise, whatever it did before that; `valley`
      where it never rises. For weights that were trained for this loss before: what they still fall by is little, and
      a matter of few images learnt by heart.

    Where it does not fall, after a head has converged say, the information is where it starts to rise: a twentieth of
    the rate of that point (`rise_start`), by any method. A curve rises if, read backwards, it falls.

    A curve falls if the fall, from the median of the first tenth to the lowest loss behind it, is plain or more than
    noise alone would give. Plain: more than a twentieth of the level and a tenth of the rise that follows. Noise is
    read off the second differences on the way down, which a smooth fall hardly touches, so this holds for losses of any
    sign and scale. Smoothed noise wanders: N steps of size s reach `s * sqrt(N)`, and the fall must be above 2.5 times
    that. In a raw curve (differences that alternate: lag-1 correlation under -0.37) noise does not wander, a fall is
    never plain, and 4.5 standard deviations will do.

    Args:
        lrs: rates of the test, increasing, shape `(N,)`.
        losses: loss at each rate, shape `(N,)`; fewer than 5 (16 for `slide`) are no curve.
        method: the rule.

    Returns:
        A rate, or None.

    Raises:
        ValueError: if the shapes differ, the rates do not increase from above 0, or the method is unknown.

    >>> lrs = exponential_ramp(1e-6, 1, 61)
    >>> round(suggest_lr(lrs, 2 - np.exp(-((np.log10(lrs) + 2) ** 2)), "minimum/10"), 9)
    0.001
    """
    return read_curve(lrs, losses, method).rate


def below_rise(rise: float, steps: int | None = None, warmup_steps: float = 0.0) -> float:
    """The rate to train with, given the one at which a range test starts to destroy what was learnt.

    A high rate costs first and pays later: what it destroys has to be learnt again. How far below the rise the best
    rate lies therefore depends on the steps that are left. Measured: a twentieth for twelve steps, a sixth for seventy,
    a third for two hundred and more (`benchmarks/results/finder.md`). That few steps prefer low rates is the
    short-horizon bias of Wu et al. 2018. A warm-up keeps the first steps from destroying much, so after three steps of
    it or more the rate is three times as high: the rise itself for a long training.

    Args:
        rise: Rate at which the loss starts to rise.
        steps: Optimizer steps of the training to come; None divides by twenty.
        warmup_steps: Of them those in which the rate first rises to its peak.

    >>> [round(below_rise(6e-3, steps), 5) for steps in (None, 12, 72, 1000)]
    [0.0003, 0.0003, 0.00099, 0.002]
    >>> below_rise(6e-3, 1000, warmup_steps=100)
    0.006
    """
    part = _BELOW_RISE
    if steps is not None:
        part = max(_LEAST_BELOW_RISE, _BELOW_RISE_AT_ONE_STEP / max(1, steps) ** (2 / 3))
    return float(rise / part * (_WARMED_UP if warmup_steps >= _STEPS_THAT_WARM_UP else 1.0))


def read_curve(
    lrs: ArrayLike,
    losses: ArrayLike,
    method: SuggestionMethod = "valley",
    measured: ArrayLike | None = None,
    *,
    steps: int | None = None,
    warmup_steps: float = 0.0,
    clear: float = 0.0,
) -> Answer:
    """What `suggest_lr` says, and by which end of the curve.

    Args:
        lrs: see `suggest_lr`.
        losses: see `suggest_lr`.
        method: see `suggest_lr`.
        measured: The losses before they were smoothed, shape `(N,)`. Their noise is independent, so they tell a fall
            and a rise from noise better; the rule still reads `losses`.
        steps: Optimizer steps of the training to come, see `below_rise`.
        warmup_steps: See `below_rise`.
        clear: See `rise_start`.

    Raises:
        ValueError: as `suggest_lr`.
    """
    rates, curve = np.asarray(lrs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    points = curve if measured is None else np.asarray(measured, dtype=np.float64)
    if rates.ndim != 1 or not rates.shape == curve.shape == points.shape:
        raise ValueError(f"lrs and losses must be one-dimensional and of one length, got {rates.shape}, {curve.shape}")
    if not (np.isfinite(rates).all() and (rates > 0).all() and (np.diff(rates) > 0).all()):
        raise ValueError("lrs must be finite, above 0 and increasing: pass the rates of the range test in their order")
    if method not in _RULES:
        raise ValueError(f"method={method!r} is not accepted: it must be one of {', '.join(_RULES)}")
    bad = np.flatnonzero(~np.isfinite(curve + points))
    if bad.size:
        rates, curve, points = rates[: bad[0]], curve[: bad[0]], points[: bad[0]]
    if curve.size < (_SLIDE_WIDTH + 1 if method == "slide" else _MIN_POINTS):
        return Answer(None, "none")
    rise = rise_start(rates, points, clear) if measured is not None or _rises(curve) else None
    falls = _falls(curve) if measured is None else _clearly_falls(points)
    if falls and (rise is None or method != "below_rise"):
        return Answer(float(_RULES[method](rates, curve)), "fall", rise)
    if rise is not None:
        return Answer(below_rise(rise, steps, warmup_steps), "rise", rise)
    return Answer(None, "none")


def rise_start(lrs: ArrayLike, losses: ArrayLike, clear: float = 0.0) -> float | None:
    """The rate from which on the loss stays clearly above its lowest, or None.

    The last point is sought at which the median of five points around it is within reach of the lowest such median:
    four standard deviations of the noise, a tenth of the fall before it, a fiftieth of the whole rise, whichever is
    most. Single points and short bumps move nothing. At least three points have to lie behind it.

    Args:
        lrs: rates, increasing, shape `(N,)`.
        losses: finite, shape `(N,)`.
        clear: A rise that counts, in units of the loss, where the curve has one that large: little noise does not make
            a small one clear.

    >>> rise_start([1e-4, 1e-3, 1e-2, 1e-1, 1, 10, 100, 1000], [2, 2, 2, 2, 2, 4, 8, 16])
    10.0
    """
    rates, curve = np.asarray(lrs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if curve.size < _MIN_POINTS:
        return None
    middle = _running_median(curve)
    lowest = int(middle.argmin())
    before = middle[: lowest + 1]
    fall = float(np.median(before[: max(1, curve.size // 10)])) - middle[lowest]
    rise = float(middle[lowest:].max()) - middle[lowest]
    noise = _noise(curve[: max(lowest + 1, curve.size // 3, _MIN_POINTS)])
    reach = max(_CLEAR_NOISE * noise / np.sqrt(3), fall / 10, rise / 50, _FLOAT32_NOISE * np.abs(curve).max())
    if np.count_nonzero(middle[lowest:] > middle[lowest] + clear) >= 3:
        reach = max(reach, clear)
    last = int(np.flatnonzero(middle <= middle[lowest] + reach)[-1])
    return float(rates[last + 1]) if last + 3 < curve.size else None


def _running_median(curve: FloatArray) -> FloatArray:
    padded = np.pad(curve, 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 5), axis=1)


def _noise(points: FloatArray) -> float:
    """Standard deviation of independent noise around a smooth curve, whatever a few outliers say."""
    bends = np.diff(points, 2)
    return float(1.4826 * np.median(np.abs(bends)) / np.sqrt(6)) if bends.size else 0.0


def _clearly_falls(points: FloatArray) -> bool:
    """Whether, among losses with independent noise, the lowest tenth is below the first fifth by more than noise."""
    width = max(3, points.size // 10)
    if points.size < 4 * width:
        return False
    means = np.convolve(points, np.ones(width) / width, "valid")[2 * width :]
    lowest = int(means.argmin())
    fall = float(points[: 2 * width].mean() - means[lowest])
    noise = _noise(points[: lowest + 3 * width])
    error = noise * np.sqrt(1 / width + 1 / (2 * width))
    return bool(fall > max(_CLEAR_NOISE * error, _FLOAT32_NOISE * np.abs(points).max()))


def _falls(curve: FloatArray) -> bool:
    return _has_signal(curve) or _falls_plainly(curve, _PLAIN_FALL)


def _rises(curve: FloatArray) -> bool:
    backwards = curve[::-1]
    return _has_signal(backwards) or _falls_plainly(backwards, _PLAIN_RISE)


def _falls_plainly(curve: FloatArray, share: float) -> bool:
    head, lowest = max(1, curve.size // 10), int(curve.argmin())
    level = float(np.median(curve[:head]))
    fall, rise = level - curve[lowest], float(curve[lowest:].max() - curve[lowest])
    alternates = _lag_1_correlation(np.diff(curve)) < _WHITE_BELOW
    return bool(lowest >= head and fall > max(share * abs(level), rise / 10) and not alternates)


def _has_signal(curve: FloatArray) -> bool:
    head, lowest = max(1, curve.size // 10), int(curve.argmin())
    fall = float(np.median(curve[:head])) - curve[lowest]
    if lowest < max(3, head) or fall <= _FLOAT32_NOISE * np.abs(curve).max():
        return False
    steps = np.diff(curve[: lowest + 1])
    bends = np.diff(steps)
    power = float(bends @ bends)
    # white noise of deviation s has second differences of variance 6 s^2, a random walk of step s of variance 2 s^2
    if _lag_1_correlation(steps) < _WHITE_BELOW:
        return bool(fall > _WHITE * np.sqrt(power / bends.size / 6))
    return bool(fall > _WANDERING * np.sqrt(power / 2))


def _lag_1_correlation(steps: FloatArray) -> float:
    window = 9  # the trend goes out with a running mean, or with the mean where the curve is too short for one
    trend = np.convolve(steps, np.ones(window) / window, "same") if steps.size >= 2 * window else steps.mean()
    rest = steps - trend
    power = float(rest @ rest)
    return float(rest[1:] @ rest[:-1]) / power if power else 0.0


def _valley(rates: FloatArray, curve: FloatArray) -> float:
    longest = np.ones(curve.size, dtype=np.int64)  # decreasing subsequence that ends at each point
    for i in range(1, curve.size):
        longest[i] += longest[:i][curve[:i] > curve[i]].max(initial=0)
    end = int(longest.argmax())
    length = int(longest[end])
    return float(rates[end - length + length // 3 + length // 6])


def _slide(rates: FloatArray, curve: FloatArray) -> float:
    slope = np.gradient(curve)
    alike = np.flatnonzero(np.abs(slope[_SLIDE_WIDTH:] - slope[:-_SLIDE_WIDTH]) <= _SLIDE_THRESHOLD)
    right_end = rates[:-_SLIDE_WIDTH]
    return float(right_end[min(alike[-1] + 1, right_end.size - 1)] if alike.size else rates[0])


def _minimum_over_10(rates: FloatArray, curve: FloatArray) -> float:
    return float(rates[curve.argmin()] / 10)


def _steep(rates: FloatArray, curve: FloatArray) -> float:
    return float(rates[(np.diff(curve) / np.diff(np.log(rates))).argmin()])


def _still_improving(rates: FloatArray, curve: FloatArray) -> float:
    log_rates, reach, lowest = np.log(rates), max(1, curve.size // 20), int(curve.argmin())
    slopes = np.empty(lowest + 1)
    for i in range(lowest + 1):
        near = slice(max(0, i - reach), i + reach + 1)
        x = log_rates[near] - log_rates[near].mean()
        slopes[i] = x @ curve[near] / (x @ x)
    return float(rates[np.flatnonzero(slopes <= _STILL_CLEAR * slopes.min())[-1]])


_RULES: dict[str, Callable[[FloatArray, FloatArray], float]] = {
    "valley": _valley,
    "slide": _slide,
    "minimum/10": _minimum_over_10,
    "steep": _steep,
    "still_improving": _still_improving,
    "below_rise": _valley,  # of a curve that never rises
}
