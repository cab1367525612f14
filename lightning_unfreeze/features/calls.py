"""What a call of a module returns, learned from two batches, so that it can be answered without the module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# torch 2.6 has no public pytree. Last seen to work: torch 2.15; guarded by `test_outputs__containers_keep_their_form`.
from torch.utils._pytree import TreeSpec

MISSING = object()


@dataclass(frozen=True)
class Leaf:
    """One leaf of what a call returns, learned from a batch of two images and one of three.

    ``constant`` is the value when it does not depend on the images; else it is a tensor whose dimension ``i`` has the
    size ``dims[i][0] + dims[i][1] * batch``, with its dimensions laid out in memory in ``order``.
    """

    constant: Any = MISSING
    dims: tuple[tuple[int, int], ...] = ()
    dtype: torch.dtype = torch.float32
    order: tuple[int, ...] = ()

    @cached_property
    def batch_dim(self) -> int | None:
        """The one dimension that is a multiple of the batch size; None where there is none: no features of an image."""
        growing = [i for i, (_, per_image) in enumerate(self.dims) if per_image]
        storable = len(growing) == 1 and self.dims[growing[0]][0] == 0 and self.dtype.is_floating_point
        return growing[0] if storable else None

    @cached_property
    def _rows_order(self) -> list[int]:
        return [dim for dim in self.order if dim == self.batch_dim] + [d for d in self.order if d != self.batch_dim]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image's features, in memory order; leads with the number of windows, where there are any."""
        first, *others = self._rows_order
        windows = self.dims[first][1]
        return ((windows,) if windows > 1 else ()) + tuple(self.dims[dim][0] for dim in others)

    def to_rows(self, tensor: Tensor) -> Tensor:
        """The call's tensor as contiguous rows, one per image: ``(B, *shape)``."""
        rows = tensor.detach().permute(self._rows_order).contiguous()
        return rows.reshape(-1, *self.shape)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Inverse of `to_rows`, with the memory layout (channels_last or not) that the network's own tensor has.

        Shares memory with the rows where their layouts agree.
        """
        order = self._rows_order
        windows = self.dims[order[0]][1]
        physical = rows.to(self.dtype).reshape(len(rows) * windows, *(self.dims[dim][0] for dim in order[1:]))
        tensor = physical.permute(_inverse(order))
        return tensor.permute(self.order).contiguous().permute(_inverse(self.order))

    def placeholder(self, batch: int, device: torch.device) -> Any:
        """What stands for it where nothing reads it."""
        if self.constant is not MISSING:
            return self.constant.to(device, copy=True) if isinstance(self.constant, Tensor) else self.constant
        return nothing([fixed + batch * per_image for fixed, per_image in self.dims], self.dtype, device)


@dataclass(frozen=True)
class Call:
    """One outermost call that finishes before anything trainable is used."""

    name: str
    tree: TreeSpec
    leaves: tuple[Leaf, ...]


def name_of_leaf(calls: Sequence[Call], call: int, leaf: int) -> str:
    """Name of a stored tensor: the module, then which call and which output where there is more than one."""
    name = calls[call].name
    repeat = sum(earlier.name == name for earlier in calls[:call])
    tensors = len(calls[call].leaves)
    return (name or "network") + (f"-call{repeat}" if repeat else "") + (f"-output{leaf}" if tensors > 1 else "")


def nothing(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this shape that takes the memory of one number: NaN, or zero where there is no NaN."""
    empty = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full((), empty, dtype=dtype, device=device).expand(*shape)


def numbered(batch: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Images ``(B, *shape)`` that are all 0 and all 1 in turn, in the memory of B numbers."""
    numbers = (torch.arange(batch, device=device) % 2).to(dtype)
    return numbers.reshape(-1, *[1] * len(shape)).expand(batch, *shape)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
