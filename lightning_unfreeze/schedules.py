"""Learning-rate schedules and the arithmetic of a range test: pure functions on numbers, numpy only.

Every schedule returns a multiplier of the peak rate, so one schedule serves layer groups with different peaks and keeps
their ratios. `t` and the lengths share one unit (optimizer steps, or epochs); `t` may be a number or an array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from numbers import Rational
from typing import Any, Literal, TypeAlias, TypeVar, cast, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray: TypeAlias = NDArray[np.float64]
Time = TypeVar("Time", float, NDArray[Any])
SuggestionMethod = Literal["valley", "slide", "minimum/10", "steep", "still_improving"]

_MIN_POINTS = 5  # fewer points than this are not a curve
_SLIDE_WIDTH, _SLIDE_THRESHOLD = 15, 0.005  # fastai's defaults
_STILL_CLEAR = 0.5  # share of the steepest slope that counts as clearly improving
# A fall is a signal above this many standard deviations of what noise alone would do on the way to the lowest loss.
# Measured on flat Gaussian noise of 100 steps: none of 500 curves passes raw, 3 to 6 in 100 after an EMA (0.98, 0.9).
_WANDERING, _WHITE = 2.5, 4.5
_WHITE_BELOW = -0.37  # lag-1 correlation of the differences: -0.5 for white noise, near -0.1 for smoothed noise
_FLOAT32_NOISE = 1e-6


def cosine_restarts(
    t: Time, cycle_len: float, cycle_mult: float = 1, *, floor: float = 0.0, decay: float = 1.0, warmup: float = 0.0
) -> Time:
    """Cosine annealing with warm restarts, exact at every restart (SGDR, Loshchilov and Hutter 2017, eq. 5).

    Cycle `i` is `cycle_len * cycle_mult**i` long and its top is `decay**i`. The value at `t` is that of the cycle which
    begins at or before `t`, so a restart is the top of the new cycle.

    Args:
        t: time since the start of the first cycle, >= 0.
        cycle_len: length of the first cycle, > 0, may be fractional.
        cycle_mult: each cycle is this many times as long as the one before, > 0.
        floor: value at the end of a cycle as a share of that cycle's top, in [0, 1].
        decay: each cycle's top is this share of the one before, in (0, 1].
        warmup: share of each cycle that rises linearly from the floor to the top; the cosine takes the rest. In [0, 1).

    Returns:
        Multiplier of the peak rate, of the shape of `t`.

    Raises:
        ValueError: if an argument is out of range, or `cycle_mult < 1` and `t` is not before the time
            `cycle_len / (1 - cycle_mult)` which the cycles never reach.

    >>> cosine_restarts(np.arange(7), cycle_len=2, cycle_mult=2).round(3).tolist()
    [1.0, 0.5, 1.0, 0.854, 0.5, 0.146, 1.0]
    """
    _check(0 <= floor <= 1, "floor", floor, "a share of the peak in [0, 1], not a learning rate")
    _check(0 < decay <= 1, "decay", decay, "in (0, 1]")
    _check(0 <= warmup < 1, "warmup", warmup, "a share of the cycle in [0, 1)")
    time = _times(t)
    index, start, length = _cycles(time, cycle_len, cycle_mult)
    position = np.minimum((time - start) / length, 1.0)
    height = (1 + np.cos(np.pi * np.maximum(position - warmup, 0) / (1 - warmup))) / 2
    if warmup:
        height = np.where(position < warmup, position / warmup, height)
    return _like(t, decay**index * _lerp(floor, 1, height))


@overload
def cycle_at(t: float, cycle_len: float | Fraction, cycle_mult: float | Fraction = 1) -> tuple[int, float, float]: ...
@overload
def cycle_at(
    t: NDArray[Any], cycle_len: float | Fraction, cycle_mult: float | Fraction = 1
) -> tuple[NDArray[np.int64], FloatArray, FloatArray]: ...
def cycle_at(t: Any, cycle_len: float | Fraction, cycle_mult: float | Fraction = 1) -> Any:
    """The cycle that `t` lies in, as (index from 0, start, length).

    Starts are summed as fractions and rounded once, so a `t` that is the nearest float to a start begins the new cycle.
    Step `t` is the last of its cycle if `cycle_at(t + 1, ...)` has another index.

    Args:
        t: time since the start of the first cycle, >= 0.
        cycle_len: length of the first cycle, > 0.
        cycle_mult: each cycle is this many times as long as the one before, > 0.

    Raises:
        ValueError: as `cosine_restarts`.

    >>> cycle_at(121, 1, 3)
    (5, 121.0, 243.0)
    """
    found = _cycles(_times(t), cycle_len, cycle_mult)
    return found if np.ndim(t) else tuple(part.item() for part in found)


def first_steps_warmup(t: Time, multiplier: Time, cycle_len: float) -> Time:
    """Hold the first twentieth of the first cycle at 1/100 of the peak, as fastai 0.7 did; `multiplier` after it.

    Args:
        t: time since the start of the first cycle.
        multiplier: what the schedule gives at `t`.
        cycle_len: length of the first cycle.

    >>> first_steps_warmup(np.arange(3), np.array([1.0, 0.9, 0.8]), cycle_len=25).tolist()
    [0.01, 0.01, 0.8]
    """
    return _like(t, np.where(_times(t) * 20 < cycle_len, 0.01, multiplier))


def slanted_triangle(t: Time, total: float, cut_frac: float = 0.1, ratio: float = 32) -> Time:
    """ULMFiT's slanted triangle: a short linear rise, a long linear fall (Howard and Ruder 2018, eq. 3).

    The fall ends at `1 / ratio` at `total`. The paper's own denominator gives that only where `total * cut_frac` is
    whole, and negative rates elsewhere.

    Args:
        t: time; from `total` on the last value is held.
        total: length of the triangle, > 0.
        cut_frac: share of the length that rises, in [0, 1).
        ratio: peak over lowest rate, >= 1.

    >>> slanted_triangle(np.array([0, 10, 55, 100]), total=100, ratio=4).tolist()
    [0.25, 1.0, 0.625, 0.25]
    """
    _check(0 <= cut_frac < 1, "cut_frac", cut_frac, "in [0, 1)")
    _check(ratio >= 1, "ratio", ratio, "at least 1")
    length = _rational("total", total)
    cut = int(length * Fraction(str(cut_frac)))  # as a fraction: 0.29 * 100 is 28.999... in floats
    time = np.minimum(_times(t), float(length))
    height = 1 - (time - cut) / (float(length) - cut)
    if cut:
        height = np.where(time < cut, time / cut, height)
    return _like(t, _lerp(1 / ratio, 1, height))


def one_cycle(t: Time, total: float, pct_start: float = 0.25, div: float = 25, div_final: float = 1e5) -> Time:
    """One cosine rise and one cosine fall (Smith 2018, in fastai's shape).

    Args:
        t: time; from `total` on the last value is held.
        total: length of the whole schedule, > 0.
        pct_start: share of the length that rises, in (0, 1).
        div: peak over first rate; `math.inf` starts at 0.
        div_final: peak over last rate; `math.inf` ends at 0.

    >>> one_cycle(np.array([0, 1, 4]), total=4).tolist()
    [0.04, 1.0, 1e-05]
    """
    _check(0 < pct_start < 1, "pct_start", pct_start, "in (0, 1)")
    _check(div >= 1, "div", div, "at least 1")
    _check(div_final >= 1, "div_final", div_final, "at least 1")
    position = np.minimum(_times(t) / float(_rational("total", total)), 1.0)
    rise = (1 - np.cos(np.pi * position / pct_start)) / 2
    fall = (1 + np.cos(np.pi * (position - pct_start) / (1 - pct_start))) / 2
    return _like(t, np.where(position < pct_start, _lerp(1 / div, 1, rise), _lerp(1 / div_final, 1, fall)))


def cycling_momentum(multiplier: Time, low: float = 0.85, high: float = 0.95) -> Time:
    """Momentum that is `low` where the rate peaks and `high` where it rests (Smith 2018, section 4.2).

    Args:
        multiplier: a schedule between 0 and 1, e.g. `cosine_restarts` without floor, or `one_cycle` with `div=math.inf`
            and `div_final=math.inf`.
        low: momentum at the peak rate.
        high: momentum at rate 0.

    >>> cycling_momentum(1.0), cycling_momentum(0.0)
    (0.85, 0.95)
    """
    _check(0 <= low <= high < 1, "(low, high)", (low, high), "momenta with 0 <= low <= high < 1")
    return _like(multiplier, _lerp(high, low, np.asarray(multiplier, dtype=np.float64)))


def exponential_ramp(start: float, end: float, num_steps: int) -> FloatArray:
    """`num_steps` rates from `start` to `end`, both included, each the same factor above the one before.

    >>> exponential_ramp(0.001, 1, 4).round(3).tolist()
    [0.001, 0.01, 0.1, 1.0]
    """
    _check_ramp(start, end, num_steps)
    return np.geomspace(start, end, num_steps)


def linear_ramp(start: float, end: float, num_steps: int) -> FloatArray:
    """`num_steps` rates from `start` to `end`, both included, equally spaced.

    >>> linear_ramp(0.25, 1, 4).tolist()
    [0.25, 0.5, 0.75, 1.0]
    """
    _check_ramp(start, end, num_steps)
    return np.linspace(start, end, num_steps)


def debiased_ema(losses: Sequence[float] | NDArray[Any], beta: float = 0.98) -> FloatArray:
    """Exponential moving average, divided by its weights' sum so that it starts at the first loss and not at 0.

    Args:
        losses: one per step, shape `(N,)`; a NaN makes the rest NaN.
        beta: weight of the past, in [0, 1).

    >>> debiased_ema([1.0, 2.0], beta=0.5).round(3).tolist()
    [1.0, 1.667]
    """
    _check(0 <= beta < 1, "beta", beta, "in [0, 1)")
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
    _check(factor > 1, "factor", factor, "above 1")
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


def suggest_lr(lrs: ArrayLike, losses: ArrayLike, method: SuggestionMethod = "valley") -> float | None:
    """The learning rate that a range test suggests, or None if its curve carries no signal.

    The curve is taken as given (smooth it and cut its ends first) up to its first loss that is not finite. The first
    four methods are fastai 2's rules.

    * `valley`: into the longest decreasing subsequence by a third and a sixth of its length, counted from its end.
    * `slide`: the lowest rate of the right end over which the slope differs from that 15 points higher by over 0.005.
    * `minimum/10`: a tenth of the rate of the lowest loss.
    * `steep`: the rate where the loss falls fastest per log rate.
    * `still_improving`: the highest rate, up to that of the lowest loss, at which the loss still falls at least half as
      fast per log rate as where it falls fastest. Slopes are least-squares lines through a point and a twentieth of
      the curve (at least one point) to each side.

    No signal: fewer than 5 points (16 for `slide`); the lowest loss within the first tenth or the first 3 points (a
    rising curve); or a fall, from the median of the first tenth to the lowest loss, that noise alone would give. Noise
    is read off the second differences on the way down, which a smooth fall hardly touches, so the rule holds for losses
    of any sign and scale. Smoothed noise wanders: N steps of size s reach `s * sqrt(N)`, and the fall must be above 2.5
    times that. In a raw curve (differences that alternate: lag-1 correlation under -0.37) noise does not wander, and
    4.5 standard deviations will do.

    Args:
        lrs: rates of the test, increasing, shape `(N,)`.
        losses: loss at each rate, shape `(N,)`.
        method: the rule.

    Returns:
        A rate, or None.

    Raises:
        ValueError: if the shapes differ, the rates do not increase from above 0, or the method is unknown.

    >>> lrs = exponential_ramp(1e-6, 1, 61)
    >>> round(suggest_lr(lrs, 2 - np.exp(-((np.log10(lrs) + 2) ** 2)), "minimum/10"), 9)
    0.001
    """
    rates, curve = np.asarray(lrs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if rates.ndim != 1 or rates.shape != curve.shape:
        raise ValueError(f"lrs and losses must be one-dimensional and of one length, got {rates.shape}, {curve.shape}")
    if not (np.isfinite(rates).all() and (rates > 0).all() and (np.diff(rates) > 0).all()):
        raise ValueError("lrs must be finite, above 0 and increasing: pass the rates of the range test in their order")
    if method not in _RULES:
        raise ValueError(f"method={method!r} is not accepted: it must be one of {', '.join(_RULES)}")
    bad = np.flatnonzero(~np.isfinite(curve))
    if bad.size:
        rates, curve = rates[: bad[0]], curve[: bad[0]]
    if curve.size < (_SLIDE_WIDTH + 1 if method == "slide" else _MIN_POINTS) or not _has_signal(curve):
        return None
    return float(_RULES[method](rates, curve))


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
}


def _cycles(
    t: FloatArray, cycle_len: float | Fraction, cycle_mult: float | Fraction
) -> tuple[NDArray[np.int64], FloatArray, FloatArray]:
    """Index, start and length of the cycle of each time; no logarithm, which misses exact restarts."""
    length, mult = _rational("cycle_len", cycle_len), _rational("cycle_mult", cycle_mult)
    if mult == 1:
        above, below = length.numerator, length.denominator
        index = np.floor(t * below / above)
        # the quotient may be rounded across a whole number: what decides is the start itself
        index += t >= (index + 1) * above / below
        index -= t < index * above / below
        return index.astype(np.int64), index * above / below, np.full(t.shape, float(length))
    horizon = float(t.max(initial=0))
    if mult < 1 and horizon >= float(length / (1 - mult)):
        raise ValueError(
            f"t={horizon} is past the cycles: with cycle_len={cycle_len} and cycle_mult={cycle_mult} they end before "
            f"{float(length / (1 - mult))}. Use fewer cycles or a cycle_mult of at least 1"
        )
    # start, length and their common denominator as plain integers: a Fraction would search a divisor at each cycle
    start, extent, unit = 0, length.numerator, length.denominator
    starts, lengths = [0.0], [float(length)]
    while (following := (start + extent) / unit) <= horizon:
        start, extent, unit = (start + extent) * mult.denominator, extent * mult.numerator, unit * mult.denominator
        starts.append(following)
        lengths.append(extent / unit)
    found = np.searchsorted(starts, t, side="right") - 1
    return found.astype(np.int64), np.asarray(starts)[found], np.asarray(lengths)[found]


def _rational(name: str, value: float | Fraction) -> Fraction:
    """The fraction that was meant: 0.1 is 1/10 and 1/3 a third, though their floats are neither."""
    _check(0 < value < float("inf"), name, value, "a finite number above 0")
    if isinstance(value, Rational):
        return Fraction(int(value.numerator), int(value.denominator))
    near = Fraction(float(value)).limit_denominator(1_000_000)
    return near if float(near) == value else Fraction(str(float(value)))


def _times(t: ArrayLike) -> FloatArray:
    time = np.asarray(t, dtype=np.float64)
    _check(bool((np.isfinite(time) & (time >= 0)).all()), "t", t, "finite and at least 0")
    return time


def _like(t: Time, values: FloatArray) -> Time:
    result: Any = values if np.ndim(t) else values.item()
    return cast(Time, result)


def _lerp(at_0: float, at_1: float, height: FloatArray) -> FloatArray:
    return at_0 * (1 - height) + at_1 * height  # exact at both ends


def _check(holds: bool, name: str, value: object, accepted: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value} is not accepted: it must be {accepted}")


def _check_ramp(start: float, end: float, num_steps: int) -> None:
    _check(0 < start < end < float("inf"), "(start, end)", (start, end), "rates with 0 < start < end")
    _check(num_steps >= 2, "num_steps", num_steps, "at least 2")
