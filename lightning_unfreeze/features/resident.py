"""Stored rows in memory: where the step runs while they fit, else in pinned memory that is copied ahead of the step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from lightning_unfreeze.data.cache import free_memory
from lightning_unfreeze.features.store import FeatureStore

Place = Literal["device", "pinned", "disk"]
PLACES: tuple[Place, ...] = ("device", "pinned", "disk")

_CHUNK_BYTES = 64 * 2**20
_CPU_BYTES = 256 * 2**20  # above that the page cache holds a store as well, and gives it back when others need memory


def choose_place(num_bytes: int, device: torch.device, share: float = 0.5) -> Place:
    """Where the rows of a store go: the first place of which they take at most `share` of what is free.

    Returns:
        `"device"`, `"pinned"` (CUDA alone, in memory of the host) or `"disk"`. On a CPU rows of more than 256 MiB stay
        on disk, where a memory map reads them at nearly the speed of memory.
    """
    if device.type == "cpu":
        return "device" if num_bytes <= min(_CPU_BYTES, share * (free_memory() or 0)) else "disk"
    if num_bytes <= share * _free_on(device):
        return "device"
    return "pinned" if device.type == "cuda" and num_bytes <= share * (free_memory() or 0) else "disk"


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


def _free_on(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch's allocator keeps for itself and does not use is free, too
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return 0


class ResidentStore:
    """The rows of a store, read once into memory; reads like the store.

    Under several processes each holds all rows, since a shuffled epoch gives it any of them.

    Args:
        store: What is held.
        device: Where the step runs, and where `read` puts rows.
        place: `"device"`, or `"pinned"` for pinned memory of the host.
        on_host: Names of tensors that stay on the host (texts, which Python reads).

    Raises:
        torch.OutOfMemoryError: Where they do not fit.
    """

    def __init__(
        self,
        store: FeatureStore,
        device: torch.device,
        place: Literal["device", "pinned"] = "device",
        on_host: Collection[str] = (),
    ) -> None:
        self.store, self.device, self.place = store, device, place
        self.directory, self.layout = store.directory, store.layout
        self._on_host = frozenset(on_host)
        self._stream = _new_stream(device) if place == "pinned" and device.type == "cuda" else None
        num_rows, num_views = self.layout.num_rows, self.layout.num_views
        self._tensors: dict[str, Tensor] = {}
        for name, spec in self.layout.tensors.items():
            aside = place == "pinned" or name in self._on_host
            self._tensors[name] = torch.empty(
                num_views * num_rows,
                *spec.shape,
                dtype=spec.dtype,
                device="cpu" if aside else device,
                pin_memory=self._stream is not None and name not in self._on_host,
            )
        size = max(1, _CHUNK_BYTES // self.layout.row_bytes)
        for view in range(num_views):
            for rows in torch.split(torch.arange(num_rows), size):
                start = view * num_rows + int(rows[0])
                for name, part in store.read(rows, view).items():
                    self._tensors[name][start : start + len(rows)].copy_(part)

    def read(self, rows: Tensor, view: int = 0) -> dict[str, Tensor]:
        """A batch on the device, without a synchronisation where `rows` lie there too.

        Args:
            rows: int64 `(B,)`, in any order, repeats allowed; those outside of the store are an error of the device.
            view: Number of the view.

        Returns:
            Name to `(B, *row)`: new memory, on the device but for the names of `on_host`.
        """
        batch, copied = self._start(rows, view)
        return self._finish(batch, copied)

    def read_ahead(self, parts: Iterable[Tensor], view: int = 0) -> Iterator[dict[str, Tensor]]:
        """`read` of each part; from pinned memory the next part is on its way while one is worked on."""
        if self._stream is None:
            yield from (self.read(rows, view) for rows in parts)
            return
        waiting = None
        for rows in parts:
            started = self._start(rows, view)
            if waiting is not None:
                yield self._finish(*waiting)
            waiting = started
        if waiting is not None:
            yield self._finish(*waiting)

    def _start(self, rows: Tensor, view: int) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        flat = rows + view * self.layout.num_rows
        batch = {}
        for name, tensor in self._tensors.items():
            picked = flat.to(tensor.device, non_blocking=True)
            if tensor.is_pinned():
                row = torch.empty(len(flat), *tensor.shape[1:], dtype=tensor.dtype, pin_memory=True)
                batch[name] = torch.index_select(tensor, 0, picked, out=row)
            else:
                batch[name] = tensor.index_select(0, picked)
        if self._stream is None:
            return batch, None
        with torch.cuda.stream(self._stream):
            moved = {name: part.to(self.device, non_blocking=True) for name, part in batch.items() if part.is_pinned()}
            copied = self._stream.record_event()
        return {**batch, **moved}, copied

    def _finish(self, batch: dict[str, Tensor], copied: torch.cuda.Event | None) -> dict[str, Tensor]:
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for part in batch.values():
                if part.is_cuda:
                    part.record_stream(current)  # else its memory could be given away before the step has read it
        return batch


def resident(
    store: FeatureStore,
    device: torch.device,
    place: Place | Literal["auto"],
    on_host: Collection[str] = (),
    share: float = 0.5,
) -> tuple[FeatureStore | ResidentStore, str]:
    """The store in the place that was chosen (`"auto"`: by `choose_place`), or in the next one with room.

    Returns:
        What to read from, and a sentence where it is not where it was to be.
    """
    if place == "auto":
        place = choose_place(store.layout.num_bytes, device, share)
    for one in PLACES[PLACES.index(place) :]:
        if one == "disk":
            break
        if one == "pinned" and device.type != "cuda":
            continue
        try:
            held = ResidentStore(store, device, one, on_host)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, torch.OutOfMemoryError) and "memory" not in str(error):
                raise
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        return held, "" if one == place else f"no room on {device} for the features: they are read from {one} memory"
    return store, "" if place == "disk" else f"no room in memory for the features: they are read from {store.directory}"
