"""How every arm finds its rates: the same number of trials with one knob, on the same tuning seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lightning_unfreeze.stages.plan import Stage
from lightning_unfreeze.study.design.arms import Arm
from lightning_unfreeze.study.runs.records import RunRecord


@dataclass(frozen=True)
class Grids:
    """Peak rates of head-only stages and of the others, as many of each.

    An arm's one knob is a place on both grids: its head's stages take that rate of the head's grid, its other stages
    that of the other grid. So an arm with a head-only stage has no knob more than one without, and has a head rate
    of its own.

    Args:
        full: Rates of stages that train more than the head, ascending.
        head: Rates of the head's stages, ascending.
        rates: `tune` tries them; `find` lets range tests set all rates.

    Raises:
        ValueError: For rates that are not ascending, not above 0, or not as many.
    """

    full: tuple[float, ...]
    head: tuple[float, ...]
    rates: Literal["tune", "find"] = "tune"

    def __post_init__(self) -> None:
        for name, grid in (("lr_grid", self.full), ("head_lr_grid", self.head)):
            if len(grid) < 1 or min(grid) <= 0 or list(grid) != sorted(set(grid)):
                raise ValueError(f"{name}={list(grid)}: give different rates above 0, the lowest first.")
        if len(self.full) != len(self.head):
            raise ValueError(
                f"lr_grid has {len(self.full)} rates, head_lr_grid {len(self.head)}: every arm gets the same effort."
            )

    def trials(self, arm: Arm) -> tuple[float, ...]:
        """Return the rates that name the arm's trials, none for an arm that is not tuned."""
        if self.rates == "find" or arm.rate == "fixed":
            return ()
        return self.head if arm.rate == "head" else self.full

    def stages(self, arm: Arm, rate: float | None) -> list[Stage]:
        """Return the arm's stages with the rates of one of its trials, the first one where `rate` is None."""
        if self.rates == "find" and arm.rate != "fixed":
            return arm.with_rates("find", "find")
        place = 0 if rate is None else self.trials(arm).index(rate)
        return arm.with_rates(self.head[place], self.full[place])


def best_rate(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the fields of a record that say which rate was best, and what it took to find it.

    The best mean validation accuracy decides, the lower rate of equals.
    """
    by_rate: dict[float, list[float]] = {}
    for record in records:
        by_rate.setdefault(float(record.tuned_lr or 0.0), []).append(record.acc)
    curve = tuple((rate, float(np.mean(by_rate[rate]))) for rate in sorted(by_rate))
    best = max(curve, key=lambda point: (point[1], -point[0]))[0]
    return {
        "tuned_lr": best,
        "lr_at_grid_edge": len(curve) > 1 and best in (curve[0][0], curve[-1][0]),
        "tuning_curve": curve,
        "tuning_images": sum(record.images for record in records),
        "tuning_flops": sum(record.flops for record in records),
        "tuning_seconds": sum(record.seconds for record in records),
    }


def tuned_rate(chosen: Mapping[str, Mapping[str, Any]], arm: Arm) -> float | None:
    """Return the arm's rate among the chosen ones, None for an arm that is not tuned."""
    rate: float | None = chosen.get(arm.name, {}).get("tuned_lr")
    return rate
