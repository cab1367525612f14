"""Averages of weights: mixtures of several, and which of them belong into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def mix(points: Sequence[Mapping[str, Tensor]], shares: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The weighted mean of several sets of weights, in float32 or better; counts and the like are those of the last.

    Args:
        points: Tensors by name, of the same names and shapes.
        shares: One per point, with sum 1; None weighs all alike.

    >>> mix([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}], [0.25, 0.75])
    {'w': tensor([2.5000])}
    """
    weights = [1 / len(points)] * len(points) if shares is None else list(shares)
    mixed = {}
    for name, last in points[-1].items():
        if last.is_floating_point():
            wide = torch.promote_types(last.dtype, torch.float32)
            parts = [point[name].to(wide) * weight for point, weight in zip(points, weights, strict=True)]
            mixed[name] = torch.stack(parts).sum(0).to(last.dtype)
        else:
            mixed[name] = last.clone()
    return mixed


def greedy_soup(points: Sequence[dict[str, Tensor]], score: Callable[[dict[str, Tensor]], float]) -> list[int]:
    """Which points belong into the average: each in turn, where it makes the average no worse (Wortsman et al. 2022).

    Args:
        points: The best first.
        score: Of an average; more is better.

    Returns:
        Places of those taken, the first always among them.
    """
    chosen, best = [0], score(dict(points[0]))
    for place in range(1, len(points)):
        found = score(mix([points[taken] for taken in [*chosen, place]]))
        if found >= best:
            chosen, best = [*chosen, place], found
    return chosen
