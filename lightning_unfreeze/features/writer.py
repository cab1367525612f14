"""Writing a feature store: resumed where it was cut short, and never half read."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from io import FileIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_unfreeze import __version__
from lightning_unfreeze.features.key import canonical_json
from lightning_unfreeze.features.layout import StoreError, StoreLayout
from lightning_unfreeze.features.store import (
    FeatureStore,
    checksums,
    gib,
    read_json,
    remove_store,
    store_error,
    write_json,
)

# what a crash of the machine can cost; also bounds the dirty pages a writer leaves to the kernel
_SYNC_BYTES = 64 * 2**20


class FeatureWriter:
    """Writes a store; resumes one of the same layout that was cut short, and throws away whatever else is in its place.

    As a context manager it removes the store when an `Exception` leaves the block, and leaves it to be resumed after an
    interrupt. Features go to their place in the files, so memory does not grow with N (but for one byte per row).

    Args:
        directory: Directory of the store.
        layout: What will be written.
        rank: Number of this process among those that fill the store; 0 prepares the directory and must come first.

    Raises:
        StoreError: Too little disk, a folder that cannot be written to, or (rank > 0) nothing prepared by rank 0.
    """

    def __init__(self, directory: str | Path, layout: StoreLayout, *, rank: int = 0) -> None:
        self.directory = Path(directory).absolute()
        self.layout = layout
        self._opened = ExitStack()
        self._files: dict[str, FileIO] = {}
        self._pending: list[list[int]] = []
        self._pending_bytes = 0
        if rank > 0 and not self._is_resumable():
            raise StoreError(f"Rank 0 has prepared no store of this layout in {self.directory}.")
        with self._removing_on_error():
            if rank == 0:
                self._prepare()
            # unbuffered, so that an error shows at the write it belongs to, and closing cannot fail
            for name, path in layout.files(self.directory).items():
                self._files[name] = self._opened.enter_context(FileIO(path, "r+"))
            self._journal = self._opened.enter_context(FileIO(self.directory / f"journal_{rank:04d}.txt", "a"))
            self._done = self._journaled_rows()

    def _is_resumable(self) -> bool:
        """Whether the draft is of this layout and no data file was cut short: extending it would read as zeros."""
        with suppress(StoreError, FileNotFoundError):
            same = read_json(self.directory / "draft.json") == json.loads(canonical_json(self.layout.to_json()))
            sizes = [
                path.stat().st_size == self.layout.file_bytes(name)
                for name, path in self.layout.files(self.directory).items()
            ]
            return same and all(sizes) and not (self.directory / "manifest.json").exists()
        return False

    def _prepare(self) -> None:
        resumable = self._is_resumable()
        if not resumable:
            remove_store(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        todo = int((~self._journaled_rows()).sum()) * self.layout.row_bytes
        free = shutil.disk_usage(self.directory).free
        if free < todo:
            self.discard()
            raise StoreError(
                f"The feature store needs {gib(todo)} and the disk of {self.directory} has {gib(free)} free: "
                "free some space, choose another directory, fewer views, or a smaller dtype."
            )
        if not resumable:
            for name, path in self.layout.files(self.directory).items():
                with open(path, "wb") as file:
                    file.truncate(self.layout.file_bytes(name))
            write_json(self.directory / "draft.json", self.layout.to_json())

    def _journaled_rows(self) -> npt.NDArray[np.bool_]:
        """Which flat rows are safely on disk, say the journals of all ranks."""
        done = np.zeros(self.layout.num_views * self.layout.num_rows, dtype=np.bool_)
        for path in self.directory.glob("journal_*.txt"):
            for line in path.read_bytes().splitlines():
                checksum, _, runs = line.partition(b" ")
                # the last line of a process that was killed may be cut short
                if checksum == b"%08x" % zlib.crc32(runs):
                    for start, stop in json.loads(runs):
                        done[start:stop] = True
        return done

    @contextmanager
    def _removing_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.discard()
            raise store_error(error, self.directory, self.layout.num_bytes) from error

    def missing_rows(self, view: int = 0) -> Tensor:
        """Rows of a view that were not on disk when this writer was made.

        The ranks' writers are made one after the other: share rows out by number (`rows[rows % world_size == rank]`),
        not by place in this list.
        """
        done = self._done.reshape(self.layout.num_views, self.layout.num_rows)[view]
        return torch.from_numpy(np.flatnonzero(~done))

    def write(self, rows: Tensor, tensors: Mapping[str, Tensor], view: int = 0) -> None:
        """Write rows of one view.

        Args:
            rows: int64 `(B,)`, in any order.
            tensors: Name to `(B, *row)`, on any device; cast to the stored dtype.
            view: Number of the view.

        Raises:
            StoreError: The disk is full or failed; the store is removed. Or finite features overflow float16.
            ValueError: Names, shapes or dtypes are not those of the layout.
            IndexError: A row or the view is out of range.
        """
        if tensors.keys() != self.layout.tensors.keys():
            raise ValueError(f"The store holds {sorted(self.layout.tensors)}, got {sorted(tensors)}.")
        for name, batch in tensors.items():
            if len(batch) != len(rows):
                raise ValueError(f"{len(rows)} rows but {len(batch)} features of {name!r} were given.")
        flat = self.layout.flat_rows(rows, view)
        order = np.argsort(flat, kind="stable")
        flat = flat[order]
        # neighbouring rows are written as one
        bounds = np.flatnonzero(np.diff(flat, prepend=-2, append=-2) != 1).tolist()
        with self._removing_on_error():
            for name, batch in tensors.items():
                spec = self.layout.tensors[name]
                data = spec.to_bytes(batch)[order]
                for start, stop in pairwise(bounds):
                    self._files[name].seek(int(flat[start]) * spec.row_bytes)
                    rest = data[start:stop].data.cast("B")
                    while rest:
                        rest = rest[self._files[name].write(rest) :]
            self._pending += [[int(flat[start]), int(flat[stop - 1]) + 1] for start, stop in pairwise(bounds)]
            self._pending_bytes += len(flat) * self.layout.row_bytes
            if self._pending_bytes >= _SYNC_BYTES:
                self._sync()

    def _sync(self) -> None:
        """Bring what was written to the disk, then say so in the journal."""
        if self._pending:
            for file in self._files.values():
                os.fsync(file.fileno())
            runs = json.dumps(self._pending, separators=(",", ":")).encode()
            # a line of its own, also after one that was cut short
            self._journal.write(b"\n%08x %s\n" % (zlib.crc32(runs), runs))
            os.fsync(self._journal.fileno())
        self._pending, self._pending_bytes = [], 0

    def close(self) -> None:
        """Bring everything to the disk and close the files; the store can still be finalized, or resumed later."""
        with self._removing_on_error():
            self._sync()
        self._opened.close()

    def discard(self) -> None:
        """Remove the store."""
        self._opened.close()
        self._pending = []
        with suppress(OSError):
            remove_store(self.directory)

    def finalize(self) -> FeatureStore:
        """Checksum what all ranks wrote, write the manifest, open the store. For one process, after all have closed.

        Raises:
            StoreError: Rows are missing (the store stays to be resumed), or the disk failed (it is removed).
        """
        self.close()
        done = self._journaled_rows()
        if not done.all():
            raise StoreError(f"{(~done).sum()} of {done.size} rows were not written to {self.directory}.")
        with self._removing_on_error():
            details = {
                "package_version": __version__,
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                **checksums(self.layout, self.directory),
            }
            write_json(self.directory / "manifest.json", self.layout.to_json() | details)
            for path in (self.directory / "draft.json", *self.directory.glob("journal_*.txt")):
                path.unlink()
        return FeatureStore.open(self.directory, fingerprint=self.layout.fingerprint)

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception):
            self.discard()
        else:
            self.close()
