"""Learning-rate schedules: pure functions on numbers, numpy only.

Every schedule returns a multiplier of the peak rate, so one schedule serves layer groups with different peaks and keeps
their ratios. `t` and the lengths share one unit (optimizer steps, or epochs); `t` may be a number or an array.
"""

from __future__ import annotations

from fractions import Fraction
from numbers import Rational
from typing import Any, Literal, TypeAlias, TypeVar, cast, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray: TypeAlias = NDArray[np.float64]
Time = TypeVar("Time", float, NDArray[Any])
SuggestionMethod = Literal["valley", "slide", "minimum/10", "steep", "still_improving"]


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
    check(0 <= floor <= 1, "floor", floor, "a share of the peak in [0, 1], not a learning rate")
    check(0 < decay <= 1, "decay", decay, "in (0, 1]")
    check(0 <= warmup < 1, "warmup", warmup, "a share of the cycle in [0, 1)")
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
    check(0 <= cut_frac < 1, "cut_frac", cut_frac, "in [0, 1)")
    check(ratio >= 1, "ratio", ratio, "at least 1")
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
    check(0 < pct_start < 1, "pct_start", pct_start, "in (0, 1)")
    check(div >= 1, "div", div, "at least 1")
    check(div_final >= 1, "div_final", div_final, "at least 1")
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
    check(0 <= low <= high < 1, "(low, high)", (low, high), "momenta with 0 <= low <= high < 1")
    return _like(multiplier, _lerp(high, low, np.asarray(multiplier, dtype=np.float64)))


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
    check(0 < value < float("inf"), name, value, "a finite number above 0")
    if isinstance(value, Rational):
        return Fraction(int(value.numerator), int(value.denominator))
    near = Fraction(float(value)).limit_denominator(1_000_000)
    return near if float(near) == value else Fraction(str(float(value)))


def _times(t: ArrayLike) -> FloatArray:
    time = np.asarray(t, dtype=np.float64)
    check(bool((np.isfinite(time) & (time >= 0)).all()), "t", t, "finite and at least 0")
    return time


def _like(t: Time, values: FloatArray) -> Time:
    result: Any = values if np.ndim(t) else values.item()
    return cast(Time, result)


def _lerp(at_0: float, at_1: float, height: FloatArray) -> FloatArray:
    return at_0 * (1 - height) + at_1 * height  # exact at both ends


def check(holds: bool, name: str, value: object, accepted: str) -> None:
    """Refuses an argument, with what was passed and what is accepted."""
    if not holds:
        raise ValueError(f"{name}={value} is not accepted: it must be {accepted}")
