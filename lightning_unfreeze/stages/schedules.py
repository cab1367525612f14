"""Learning-rate schedules: pure functions on numbers.

Every schedule returns a multiplier of the peak rate, so one schedule serves layer groups with different peaks and keeps
their ratios. `t` and the lengths share one unit (optimizer steps, or epochs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np

from lightning_unfreeze.stages.cycles import Course, as_fraction, cycle_at

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Time = TypeVar("Time", float, NDArray[Any])

_CUT_FRAC, _PCT_START = 0.1, 0.25  # shares that rise: Howard and Ruder 2018, and fastai


def cosine_restarts(
    t: Time, cycle_len: float, cycle_mult: float = 1, *, floor: float = 0.0, decay: float = 1.0, warmup: float = 0.0
) -> Time:
    """Cosine annealing with warm restarts, exact at every restart (SGDR, Loshchilov and Hutter 2017, eq. 5).

    Cycle `i` is `cycle_len * cycle_mult**i` long and its top is `decay**i`. The value at `t` is that of the cycle which
    begins at or before `t`, so a restart is the top of the new cycle.

    Args:
        t: time since the start of the first cycle, >= 0; a number or an array of them.
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
    if np.ndim(t):
        times = np.asarray(t, dtype=np.float64)
        values = [
            cosine_restarts(time, cycle_len, cycle_mult, floor=floor, decay=decay, warmup=warmup)
            for time in times.ravel().tolist()
        ]
        return cast("Time", np.array(values, dtype=np.float64).reshape(times.shape))
    time: float = t.item() if isinstance(t, np.ndarray) else t
    index, start, length = cycle_at(time, cycle_len, cycle_mult)
    position = min((time - start) / length, 1.0)
    if position < warmup:
        height = position / warmup
    else:
        height = (1 + math.cos(math.pi * (position - warmup) / (1 - warmup))) / 2
    value: Any = decay**index * _lerp(floor, 1, height)
    return cast("Time", value)


def first_steps_warmup(t: float, multiplier: float, cycle_len: float) -> float:
    """Hold the first twentieth of the first cycle at 1/100 of the peak, as fastai 0.7 did; `multiplier` after it.

    Args:
        t: time since the start of the first cycle.
        multiplier: what the schedule gives at `t`.
        cycle_len: length of the first cycle.

    >>> [first_steps_warmup(t, 0.9, cycle_len=25) for t in range(3)]
    [0.01, 0.01, 0.9]
    """
    return 0.01 if _time(t) * 20 < cycle_len else multiplier


def slanted_triangle(t: float, total: float, cut_frac: float = _CUT_FRAC, ratio: float = 32) -> float:
    """ULMFiT's slanted triangle: a short linear rise, a long linear fall (Howard and Ruder 2018, eq. 3).

    The fall ends at `1 / ratio` at `total`. The paper's own denominator gives that only where `total * cut_frac` is
    whole, and negative rates elsewhere.

    Args:
        t: time; from `total` on the last value is held.
        total: length of the triangle, > 0.
        cut_frac: share of the length that rises, in [0, 1).
        ratio: peak over lowest rate, >= 1.

    >>> [slanted_triangle(t, total=100, ratio=4) for t in (0, 10, 55, 100)]
    [0.25, 1.0, 0.625, 0.25]
    """
    check(0 <= cut_frac < 1, "cut_frac", cut_frac, "in [0, 1)")
    check(ratio >= 1, "ratio", ratio, "at least 1")
    check(0 < total < math.inf, "total", total, "a finite number above 0")
    cut = int(as_fraction(total) * Fraction(str(cut_frac)))  # as a fraction: 0.29 * 100 is 28.999... in floats
    time = min(_time(t), float(total))
    height = time / cut if time < cut else 1 - (time - cut) / (float(total) - cut)
    return _lerp(1 / ratio, 1, height)


def one_cycle(t: float, total: float, pct_start: float = _PCT_START, div: float = 25, div_final: float = 1e5) -> float:
    """One cosine rise and one cosine fall (Smith 2018, in fastai's shape).

    Args:
        t: time; from `total` on the last value is held.
        total: length of the whole schedule, > 0.
        pct_start: share of the length that rises, in (0, 1).
        div: peak over first rate; `math.inf` starts at 0.
        div_final: peak over last rate; `math.inf` ends at 0.

    >>> [one_cycle(t, total=4) for t in (0, 1, 4)]
    [0.04, 1.0, 1e-05]
    """
    check(0 < pct_start < 1, "pct_start", pct_start, "in (0, 1)")
    check(div >= 1, "div", div, "at least 1")
    check(div_final >= 1, "div_final", div_final, "at least 1")
    check(0 < total < math.inf, "total", total, "a finite number above 0")
    position = min(_time(t) / float(total), 1.0)
    if position < pct_start:
        return _lerp(1 / div, 1, (1 - math.cos(math.pi * position / pct_start)) / 2)
    return _lerp(1 / div_final, 1, (1 + math.cos(math.pi * (position - pct_start) / (1 - pct_start))) / 2)


def cycling_momentum(multiplier: float, low: float = 0.85, high: float = 0.95) -> float:
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
    return _lerp(high, low, multiplier)


@dataclass(frozen=True)
class Shape:
    """The rates within each cycle: what `CosineRestarts` is asked for.

    Raises:
        ValueError: For a value outside of its range.

    >>> Shape("cosine", decay=0.5).multiplier(index=1, t=5, length=10)
    0.25
    """

    kind: Literal["cosine", "slanted_triangle", "one_cycle"] = "cosine"
    floor: float = 0.0
    decay: float = 1.0
    warmup: float = 0.0
    first_steps_warmup: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "slanted_triangle", "one_cycle"):
            raise ValueError(f"shape={self.kind!r} is not 'cosine', 'slanted_triangle' or 'one_cycle'")
        if self.kind != "cosine" and (self.floor or self.warmup):
            raise ValueError(
                f"floor={self.floor} and warmup={self.warmup} shape cosine cycles; shape={self.kind!r} has its own"
            )
        cosine_restarts(0.0, 1, floor=self.floor, decay=self.decay, warmup=self.warmup)  # refuses what it cannot

    @property
    def warmup_share(self) -> float:
        """Share of a cycle in which the rate rises to its peak."""
        return {"cosine": self.warmup, "slanted_triangle": _CUT_FRAC, "one_cycle": _PCT_START}[self.kind]

    def multiplier(self, index: int, t: float, length: float) -> float:
        """Multiplier of the peak rate in cycle `index`, `t` optimizer steps after its start, of `length` steps."""
        if self.kind == "slanted_triangle":
            value = slanted_triangle(t, length)
        elif self.kind == "one_cycle":
            value = one_cycle(t, length)
        elif t >= length:  # the end of the last cycle is no restart
            value = self.floor
        else:
            # a rise within the first step would take that step from the cycle, and all of a cycle of one step
            warmup = self.warmup if self.warmup * length > 1 else 0.0
            value = cosine_restarts(t, length, floor=self.floor, warmup=warmup)
        if self.first_steps_warmup and index == 0:
            value = first_steps_warmup(t, value, length)
        return float(value * self.decay**index)

    def at(self, course: Course, place: float | Fraction, steps: int) -> float:
        """Multiplier of the peak rate at a place of a course, in epochs of so many optimizer steps."""
        index, start, length = course.at(place)
        # in steps: a triangle's cut is a whole number of them
        return self.multiplier(index, float((as_fraction(place) - as_fraction(start)) * steps), length * steps)


def _time(t: float) -> float:
    check(0 <= t < math.inf, "t", t, "finite and at least 0")
    return float(t)


def _lerp(at_0: float, at_1: float, height: float) -> float:
    return at_0 * (1 - height) + at_1 * height  # exact at both ends


def check(holds: bool, name: str, value: object, accepted: str) -> None:
    """Refuses an argument, with what was passed and what is accepted."""
    if not holds:
        raise ValueError(f"{name}={value} is not accepted: it must be {accepted}")
