"""What a feature store holds: the rows of its tensors, as bytes and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

StoreDtype = Literal["auto", "float32", "bfloat16", "float16"]

FORMAT = "lightning_unfreeze.features.store"
FORMAT_VERSION = 2


class StoreError(RuntimeError):
    """The store cannot be read or written; the message says why. The caller computes again or goes without a store."""


@dataclass(frozen=True)
class TensorSpec:
    """One row of one stored tensor: its shape without the batch dimension, and its dtype on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.shape):
            raise ValueError(f"shape={self.shape}: a stored tensor needs at least one element per row.")

    @classmethod
    def like(cls, batch: Tensor, dtype: StoreDtype = "auto") -> TensorSpec:
        """Spec for rows like those of `batch`.

        Args:
            batch: `(B, *row)`.
            dtype: `auto` keeps the batch's dtype; the others apply to floating point, integers stay as they are.

        >>> TensorSpec.like(torch.zeros(2, 8, 7, 7), "float16")
        TensorSpec(shape=(8, 7, 7), dtype=torch.float16)
        """
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={dtype!r}: choose 'auto', 'float32', 'bfloat16' or 'float16'.")
        stored = getattr(torch, dtype) if dtype != "auto" and batch.is_floating_point() else batch.dtype
        return cls(tuple(batch.shape[1:]), stored)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * self.dtype.itemsize

    def to_bytes(self, batch: Tensor) -> npt.NDArray[np.uint8]:
        """Cast `(B, *row)` to the stored dtype, as `(B, row_bytes)` bytes on the CPU."""
        if tuple(batch.shape[1:]) != self.shape:
            raise ValueError(
                f"A batch of rows {tuple(batch.shape[1:])} was given for stored rows of shape {self.shape}."
            )
        floating = batch.is_floating_point() and self.dtype.is_floating_point
        if batch.dtype != self.dtype and not floating:
            raise ValueError(f"A {batch.dtype} batch was given for a tensor stored as {self.dtype}.")
        cast = batch.detach().to(device="cpu", dtype=self.dtype)
        if self.dtype == torch.float16 and bool((cast.isinf() & batch.detach().cpu().isfinite()).any()):
            raise StoreError(
                f"Features up to {batch.detach().abs().max().item():.3g} do not fit float16 (at most 65504); "
                "store them as bfloat16 or float32."
            )
        # numpy has no bfloat16, so bytes are what passes between torch and numpy
        return cast.reshape(-1).view(torch.uint8).numpy().reshape(len(batch), self.row_bytes)

    def from_bytes(self, rows: npt.NDArray[np.uint8]) -> Tensor:
        """Inverse of `to_bytes`: `(B, row_bytes)` bytes to `(B, *row)`, without a copy."""
        return torch.from_numpy(rows.reshape(-1)).view(self.dtype).view(len(rows), *self.shape)


@dataclass(frozen=True)
class StoreLayout:
    """What a store holds.

    Args:
        fingerprint: Key of everything the features depend on, from `fingerprint_of`.
        num_rows: Number of images N.
        tensors: Name to spec.
        num_views: Number of views V of each image.
    """

    fingerprint: str
    num_rows: int
    tensors: Mapping[str, TensorSpec]
    num_views: int = 1

    def __post_init__(self) -> None:
        if self.num_rows < 1 or self.num_views < 1 or not self.tensors:
            raise ValueError(
                f"A store needs rows, views and tensors; got num_rows={self.num_rows}, num_views={self.num_views}, "
                f"tensors={sorted(self.tensors)}."
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one view, all tensors together."""
        return sum(spec.row_bytes for spec in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole store."""
        return self.num_views * self.num_rows * self.row_bytes

    def to_json(self) -> dict[str, Any]:
        """What a manifest and a draft say of it."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "num_rows": self.num_rows,
            "num_views": self.num_views,
            "tensors": [
                {"name": name, "shape": spec.shape, "dtype": str(spec.dtype)[6:]}
                for name, spec in sorted(self.tensors.items())
            ],
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> StoreLayout:
        """Inverse of `to_json`."""
        tensors = {
            entry["name"]: TensorSpec(tuple(entry["shape"]), getattr(torch, entry["dtype"]))
            for entry in content["tensors"]
        }
        return cls(content["fingerprint"], content["num_rows"], tensors, content["num_views"])

    def files(self, directory: Path) -> dict[str, Path]:
        """The file of each tensor."""
        # numbered, for names may hold anything
        return {name: directory / f"tensor_{i:03d}.bin" for i, name in enumerate(sorted(self.tensors))}

    def file_bytes(self, name: str) -> int:
        """Size of the file of a tensor."""
        return self.num_views * self.num_rows * self.tensors[name].row_bytes

    def flat_rows(self, rows: Tensor, view: int) -> npt.NDArray[np.int64]:
        """Row numbers in the file, `view * N + row`, checked: a row past the end would lie in the next view."""
        if rows.ndim != 1 or rows.dtype != torch.int64:
            raise ValueError(
                f"rows must be a one-dimensional int64 tensor, got {rows.dtype} of shape {tuple(rows.shape)}."
            )
        for name, value, size in (("rows", rows, self.num_rows), ("view", torch.tensor([view]), self.num_views)):
            if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < size:
                raise IndexError(f"{name} {int(value.min())}..{int(value.max())} outside of 0..{size - 1}.")
        flat: npt.NDArray[np.int64] = (view * self.num_rows + rows).cpu().numpy()
        return flat
