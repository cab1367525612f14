"""Cycles counted exactly: with fractions, where floats and logarithms miss a restart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

MAX_STAGE_EPOCHS = 100_000
"""Longest stage that is taken for meant: a mistyped `cycle_mult` grows a stage beyond any budget."""


def as_fraction(value: float | Fraction) -> Fraction:
    """The rational number that `value` was written for, so that 0.1 is a tenth and 1/3 a third.

    >>> as_fraction(0.1) * 10 == 1, as_fraction(1 / 3) * 3 == 1
    (True, True)
    """
    if isinstance(value, int | Fraction):
        return Fraction(value)
    exact = Fraction(float(value))
    nearest = exact.limit_denominator(10_000)
    return nearest if float(nearest) == value else exact


def cycle_at(
    t: float | Fraction, cycle_len: float | Fraction, cycle_mult: float | Fraction = 1
) -> tuple[int, float, float]:
    """The cycle that `t` lies in: index from 0, start, length.

    Starts are exact and rounded once, so a `t` that is the nearest float to a start begins the new cycle. Step `t` is
    the last of its cycle if that of `t + 1` is another one.

    Args:
        t: Time since the start of the first cycle, at least 0.
        cycle_len: Length of the first cycle, above 0.
        cycle_mult: Each cycle is this many times as long as the one before it, above 0.

    Raises:
        ValueError: For a value out of range, or `cycle_mult < 1` and a `t` that the cycles, shrinking, never reach.

    >>> cycle_at(121, 1, 3)
    (5, 121.0, 243.0)
    """
    for name, value in (("cycle_len", cycle_len), ("cycle_mult", cycle_mult)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} is not accepted: it must be a finite number above 0")
    if not 0 <= t < math.inf:
        raise ValueError(f"t={t} is not accepted: it must be finite and at least 0")
    length, mult, time = as_fraction(cycle_len), as_fraction(cycle_mult), float(t)
    if mult == 1:
        index = math.floor(time / length)
        # the quotient may be rounded across a whole number: what decides is the start itself
        index += time >= float((index + 1) * length)
        index -= time < float(index * length)
        return index, float(index * length), float(length)
    if mult < 1 and time >= float(length / (1 - mult)):
        raise ValueError(
            f"t={t} is past the cycles: with cycle_len={cycle_len} and cycle_mult={cycle_mult} they end before "
            f"{float(length / (1 - mult))}. Use fewer cycles or a cycle_mult of at least 1"
        )
    # start, length and their common denominator as plain integers: a Fraction would search a divisor at each cycle
    index, start, extent, unit = 0, 0, length.numerator, length.denominator
    while (start + extent) / unit <= time:
        start, extent, unit = (start + extent) * mult.denominator, extent * mult.numerator, unit * mult.denominator
        index += 1
    return index, start / unit, extent / unit


def cycles_sum(cycle_len: float | Fraction, cycle_mult: float | Fraction, num_cycles: int) -> Fraction:
    """Sum of `num_cycles` cycle lengths, each `cycle_mult` times the one before it, exact.

    Raises:
        OverflowError: Where the last cycle alone would be longer than `MAX_STAGE_EPOCHS`.

    >>> cycles_sum(1, 2, 3)
    Fraction(7, 1)
    """
    if cycle_mult > 1 and (num_cycles - 1) * math.log(cycle_mult) > math.log(MAX_STAGE_EPOCHS / cycle_len) + 1:
        raise OverflowError(f"{num_cycles} cycles with cycle_mult={cycle_mult}")
    length, mult = as_fraction(cycle_len), as_fraction(cycle_mult)
    if mult == 1:
        return length * num_cycles
    return length * (mult**num_cycles - 1) / (mult - 1)


@dataclass(frozen=True)
class Course:
    """The cycles of one stage, in epochs from its start.

    Attributes:
        first: Length of the first cycle.
        mult: Length of a cycle over that of the one before it.
        total: End of the stage; infinite where a fit has none.
        last: Index and start of the last cycle, which is stretched to the end; None without one.

    >>> course = Course.planned(0.5, 1, 3)
    >>> course.at(1.5), course.running(1.25), course.running(2)
    ((2, 1.0, 1.0), 2, None)
    """

    first: Fraction
    mult: Fraction = Fraction(1)
    total: Fraction | float = math.inf
    last: tuple[int, Fraction] | None = None

    @classmethod
    def planned(cls, cycle_len: float, cycle_mult: float, num_cycles: int) -> Course:
        """Cycles that end with the epoch in which the last one does."""
        before_last = cycles_sum(cycle_len, cycle_mult, num_cycles - 1)
        total = Fraction(math.ceil(cycles_sum(cycle_len, cycle_mult, num_cycles)))
        return cls(as_fraction(cycle_len), as_fraction(cycle_mult), total, (num_cycles - 1, before_last))

    @classmethod
    def of_fit(cls, total: Fraction | float, cycle_len: float | None, cycle_mult: float) -> Course:
        """Cycles of a fit without stages; without a `cycle_len` the whole fit, which has to end, is one.

        Raises:
            ValueError: For cycles that shrink to nothing before the fit ends.
        """
        if cycle_len is None:
            return cls(Fraction(total), total=total, last=(0, Fraction(0)))
        course = cls(as_fraction(cycle_len), as_fraction(cycle_mult), total)
        if not math.isinf(total):
            course.at(total)
        return course

    def at(self, place: float | Fraction) -> tuple[int, float, float]:
        """The cycle that a place lies in: index, start, length."""
        if self.last is not None and place >= self.last[1]:
            return self.last[0], float(self.last[1]), float(self.total - self.last[1])
        return cycle_at(place, self.first, self.mult)

    def running(self, place: float | Fraction) -> int | None:
        """Index of the cycle that runs at a place; None at the end of the stage."""
        return None if place >= self.total else self.at(place)[0]
