"""The feature store: activations of a frozen network on disk, one row per image and view, read back in whole batches.

A store is a directory: `manifest.json`, and one file per tensor of shape `(V, N, *row)`, view by view, so that an epoch
over one view reads one contiguous region. The manifest is written last; a directory without it is never read, only
resumed or thrown away. No pickle, and nothing of Lightning.

How two runs share a directory: whoever gets the lock writes, the other waits and then reads. A complete store, also one
in a folder that cannot be written to, is opened without the lock.

    try:
        store = FeatureStore.open(directory, fingerprint=key)
    except StoreError:                                    # absent, of something else, or damaged
        with store_lock(directory):
            try:
                store = FeatureStore.open(directory, fingerprint=key)     # somebody else wrote it meanwhile
            except StoreError:
                with FeatureWriter(directory, layout) as writer:
                    for rows in writer.missing_rows().split(256):
                        writer.write(rows, extract(rows))
                store = writer.finalize()

With several processes rank 0 holds the lock and makes its `FeatureWriter` first; after a barrier the others make theirs
with their `rank`; all write their own rows; after a second barrier rank 0 calls `finalize`.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import random
import shutil
import weakref
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_unfreeze.features.key import canonical_json, package_version

StoreDtype = Literal["auto", "float32", "bfloat16", "float16"]

_FORMAT = "lightning_unfreeze.features.store"
_FORMAT_VERSION = 1
_CHUNK_BYTES = 4 * 2**20
# what a crash of the machine can cost; also bounds the dirty pages a writer leaves to the kernel
_SYNC_BYTES = 64 * 2**20
# Mapped pages count as resident memory and the kernel maps megabytes for each row touched, so larger stores are read by
# position instead: no resident pages, for about 1 microsecond per row.
_MAX_MAPPED_BYTES = 512 * 2**20


class StoreError(RuntimeError):
    """The store cannot be read or written; the message says why. The caller computes again or goes without a store."""


# -------------------- layout


@dataclass(frozen=True)
class TensorSpec:
    """One row of one stored tensor.

    Args:
        shape: Shape of a row, without the batch dimension.
        dtype: Dtype on disk.
        dim_order: The row's dimensions from the outermost to the innermost in memory; `(1, 2, 0)` is channels_last for
            rows `(C, H, W)`. Kept so that what is read has the strides of what was written. Contiguous by default.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    dim_order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.shape):
            raise ValueError(f"shape={self.shape}: a stored tensor needs at least one element per row.")
        if not self.dim_order:
            object.__setattr__(self, "dim_order", tuple(range(len(self.shape))))
        if sorted(self.dim_order) != list(range(len(self.shape))):
            raise ValueError(
                f"dim_order={self.dim_order} is not a permutation of the dimensions of shape={self.shape}."
            )

    @classmethod
    def like(cls, batch: Tensor, dtype: StoreDtype = "auto") -> TensorSpec:
        """Spec for rows like those of `batch`.

        Args:
            batch: `(B, *row)`.
            dtype: `auto` keeps the batch's dtype; the others apply to floating point, integers stay as they are.

        >>> TensorSpec.like(torch.zeros(2, 8, 7, 7).to(memory_format=torch.channels_last), "float16")
        TensorSpec(shape=(8, 7, 7), dtype=torch.float16, dim_order=(1, 2, 0))
        """
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={dtype!r}: choose 'auto', 'float32', 'bfloat16' or 'float16'.")
        stored = getattr(torch, dtype) if dtype != "auto" and batch.is_floating_point() else batch.dtype
        strides = batch.stride()[1:]
        # a contiguous row stays so even where dimensions of size 1 make the strides ambiguous
        contiguous = batch.is_contiguous()
        order = sorted(range(len(strides)), key=lambda dim: 0 if contiguous else -strides[dim])
        return cls(tuple(batch.shape[1:]), stored, tuple(order))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * self.dtype.itemsize

    def to_bytes(self, batch: Tensor) -> npt.NDArray[np.uint8]:
        """Cast `(B, *row)` to the stored dtype and memory order, as `(B, row_bytes)` bytes on the CPU."""
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
        ordered = cast.permute(0, *(dim + 1 for dim in self.dim_order)).contiguous()
        # numpy has no bfloat16, so bytes are what passes between torch and numpy
        return ordered.reshape(-1).view(torch.uint8).numpy().reshape(len(batch), self.row_bytes)

    def from_bytes(self, rows: npt.NDArray[np.uint8]) -> Tensor:
        """Inverse of `to_bytes`: `(B, row_bytes)` bytes to `(B, *row)`, without a copy."""
        ordered = torch.from_numpy(rows.reshape(-1)).view(self.dtype)
        ordered = ordered.view(len(rows), *(self.shape[dim] for dim in self.dim_order))
        return ordered.permute(0, *(self.dim_order.index(dim) + 1 for dim in range(len(self.shape))))


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

    def _to_json(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "num_rows": self.num_rows,
            "num_views": self.num_views,
            "tensors": [
                {"name": name, "shape": spec.shape, "dtype": str(spec.dtype)[6:], "dim_order": spec.dim_order}
                for name, spec in sorted(self.tensors.items())
            ],
        }

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> StoreLayout:
        tensors = {
            entry["name"]: TensorSpec(tuple(entry["shape"]), getattr(torch, entry["dtype"]), tuple(entry["dim_order"]))
            for entry in content["tensors"]
        }
        return cls(content["fingerprint"], content["num_rows"], tensors, content["num_views"])

    def _files(self, directory: Path) -> dict[str, Path]:
        # numbered, for names may hold anything
        return {name: directory / f"tensor_{i:03d}.bin" for i, name in enumerate(sorted(self.tensors))}

    def _file_bytes(self, name: str) -> int:
        return self.num_views * self.num_rows * self.tensors[name].row_bytes

    def _flat_rows(self, rows: Tensor, view: int) -> npt.NDArray[np.int64]:
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


# -------------------- the disk


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write so that `path` is absent, as it was, or complete, also after a power cut."""
    sealed = {"checksum": zlib.crc32(canonical_json(content)), "content": content}
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(json.dumps(sealed, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read_json(path: Path) -> dict[str, Any]:
    """Read what `_write_json` wrote.

    Raises:
        StoreError: The file is absent or not as it was written, or of another format.
    """
    try:
        sealed = json.loads(path.read_bytes())
        content: dict[str, Any] = sealed["content"]
        intact = zlib.crc32(canonical_json(content)) == sealed["checksum"]
    except FileNotFoundError:
        raise StoreError(f"No finished feature store in {path.parent}: {path.name} is missing.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} cannot be read: {error!r}.") from error
    if not intact:
        raise StoreError(f"{path} is damaged: its checksum does not match.")
    if (content.get("format"), content.get("format_version")) != (_FORMAT, _FORMAT_VERSION):
        raise StoreError(f"{path} is of another format: {content.get('format')} {content.get('format_version')}.")
    return content


def _chunk_checksums(path: Path) -> list[int]:
    with open(path, "rb") as file:
        return [zlib.crc32(chunk) for chunk in iter(lambda: file.read(_CHUNK_BYTES), b"")]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _store_error(error: OSError, directory: Path, num_bytes: int) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"The disk of {directory} is full: the feature store needs {_gib(num_bytes)}. What was written is removed; "
            "free some space, choose another directory, fewer views, or a smaller dtype."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StoreError(
            f"{directory} cannot be written to ({error.strerror}); choose another directory for the feature store."
        )
    return StoreError(f"The feature store in {directory} could not be written: {error}.")


def _remove_store(directory: Path) -> None:
    """Remove the files of a store, and the directory if nothing else is in it."""
    # the manifest goes first, so that a half removed store is never read
    (directory / "manifest.json").unlink(missing_ok=True)
    for pattern in ("manifest.tmp", "draft.*", "journal_*.txt", "tensor_*.bin"):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        directory.rmdir()


@contextmanager
def store_lock(directory: str | Path, timeout_seconds: float = -1) -> Iterator[None]:
    """Hold the lock of a store directory, against other processes and other machines on a shared file system.

    The operating system frees the lock of a process that died. The empty file `.<name>.lock` beside the
    directory stays: removing it could give the lock to two processes.

    Args:
        directory: Directory of the store; it need not exist.
        timeout_seconds: How long to wait for another holder; negative waits for ever.

    Raises:
        StoreError: Another process held the lock for all that time, or the folder cannot be written to.
    """
    directory = Path(directory).absolute()
    lock = filelock.FileLock(directory.with_name(f".{directory.name}.lock"))
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=timeout_seconds)
    except filelock.Timeout:
        raise StoreError(f"Another process has been writing {directory} for {timeout_seconds:g} seconds.") from None
    except OSError as error:
        raise _store_error(error, directory.parent, 0) from error
    try:
        yield
    finally:
        lock.release()


def prune(root: str | Path, max_bytes: int, keep: Collection[str | Path] = ()) -> list[Path]:
    """Remove the stores under `root` that were not used for longest, until those left hold at most `max_bytes`.

    Unfinished stores count and go like the others. Stores that are being written stay, and so does what is no store.

    Args:
        root: The directory that holds the store directories.
        max_bytes: Bytes that may stay.
        keep: Store directories that stay in any case.

    Returns:
        The directories removed, oldest first.
    """
    kept = {Path(path).absolute() for path in keep}
    stores: list[tuple[float, Path, int]] = []
    for directory in Path(root).absolute().glob("*"):
        for mark in (directory / "manifest.json", directory / "draft.json"):
            with suppress(StoreError, OSError):
                _read_json(mark)
                size = sum(path.stat().st_size for path in directory.iterdir())
                # `FeatureStore.open` touches the manifest
                stores.append((mark.stat().st_mtime, directory, size))
                break
    total = sum(size for _, _, size in stores)
    removed = []
    for _, directory, size in sorted(stores):
        if total <= max_bytes:
            break
        if directory not in kept:
            with suppress(StoreError), store_lock(directory, timeout_seconds=0):
                _remove_store(directory)
                removed.append(directory)
                total -= size
    return removed


# -------------------- write and read


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
            for name, path in layout._files(self.directory).items():
                self._files[name] = self._opened.enter_context(FileIO(path, "r+"))
            self._journal = self._opened.enter_context(FileIO(self.directory / f"journal_{rank:04d}.txt", "a"))
            self._done = self._journaled_rows()

    def _is_resumable(self) -> bool:
        """Whether the draft is of this layout and no data file was cut short: extending it would read as zeros."""
        with suppress(StoreError, FileNotFoundError):
            same = _read_json(self.directory / "draft.json") == json.loads(canonical_json(self.layout._to_json()))
            sizes = [
                path.stat().st_size == self.layout._file_bytes(name)
                for name, path in self.layout._files(self.directory).items()
            ]
            return same and all(sizes) and not (self.directory / "manifest.json").exists()
        return False

    def _prepare(self) -> None:
        resumable = self._is_resumable()
        if not resumable:
            _remove_store(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        todo = int((~self._journaled_rows()).sum()) * self.layout.row_bytes
        free = shutil.disk_usage(self.directory).free
        if free < todo:
            self.discard()
            raise StoreError(
                f"The feature store needs {_gib(todo)} and the disk of {self.directory} has {_gib(free)} free: "
                "free some space, choose another directory, fewer views, or a smaller dtype."
            )
        if not resumable:
            for name, path in self.layout._files(self.directory).items():
                with open(path, "wb") as file:
                    file.truncate(self.layout._file_bytes(name))
            _write_json(self.directory / "draft.json", self.layout._to_json())

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
            raise _store_error(error, self.directory, self.layout.num_bytes) from error

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
        flat = self.layout._flat_rows(rows, view)
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
            _remove_store(self.directory)

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
            checksums = {name: _chunk_checksums(path) for name, path in self.layout._files(self.directory).items()}
            details = {
                "package_version": package_version(),
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "chunk_bytes": _CHUNK_BYTES,
                "chunk_checksums": checksums,
            }
            _write_json(self.directory / "manifest.json", self.layout._to_json() | details)
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


class FeatureStore:
    """A finished store, open for reading; made by `FeatureStore.open`.

    Attributes:
        directory: Where it lies.
        layout: What it holds.
    """

    def __init__(self, directory: Path, layout: StoreLayout) -> None:
        self.directory, self.layout = directory, layout
        self._mapped: dict[str, npt.NDArray[np.uint8]] = {}
        self._descriptors: dict[str, int] = {}
        for name, path in layout._files(directory).items():
            if layout.num_bytes <= _MAX_MAPPED_BYTES or not hasattr(os, "preadv"):
                with open(path, "rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._mapped[name] = np.frombuffer(mapped, np.uint8).reshape(-1, layout.tensors[name].row_bytes)
            else:
                self._descriptors[name] = os.open(path, os.O_RDONLY)
                weakref.finalize(self, os.close, self._descriptors[name])

    @classmethod
    def open(
        cls, directory: str | Path, *, fingerprint: str, verify: Literal["sampled", "full"] = "sampled"
    ) -> FeatureStore:
        """Open a finished store of the given fingerprint, and mark it as used.

        Args:
            directory: Directory of the store.
            fingerprint: What the store must have been made from.
            verify: `full` compares every checksum; `sampled` compares the file sizes, and the checksums of the last and
                four random chunks of 4 MiB of each tensor.

        Raises:
            StoreError: The store is absent, unfinished, of something else, or damaged.
            ValueError: For another `verify`.
        """
        if verify not in ("sampled", "full"):
            raise ValueError(f"verify={verify!r}: choose 'sampled' or 'full'.")
        directory = Path(directory).absolute()
        manifest = _read_json(directory / "manifest.json")
        if manifest["fingerprint"] != fingerprint:
            raise StoreError(
                f"{directory} holds features of something else: {manifest['fingerprint']}, not {fingerprint}."
            )
        layout = StoreLayout._from_json(manifest)
        try:
            for name, path in layout._files(directory).items():
                _verify(
                    path, layout._file_bytes(name), manifest["chunk_bytes"], manifest["chunk_checksums"][name], verify
                )
            store = cls(directory, layout)
        except OSError as error:
            raise StoreError(f"The feature store in {directory} cannot be read: {error}.") from error
        with suppress(OSError):  # a store in a folder that cannot be written to has no last use
            os.utime(directory / "manifest.json")
        return store

    def read(self, rows: Tensor, view: int = 0) -> dict[str, Tensor]:
        """Read a batch, at about the speed of RAM; larger stores than 512 MiB take about 1 microsecond per row more.

        Args:
            rows: int64 `(B,)`, in any order, repeats allowed.
            view: Number of the view.

        Returns:
            Name to `(B, *row)` in the stored dtype (a cast is the caller's): new memory on the CPU, in the memory
            order of what was written.

        Raises:
            IndexError: A row or view is out of range.
            StoreError: A file was cut short after the store was opened.
        """
        flat = self.layout._flat_rows(rows, view)
        return {name: spec.from_bytes(self._gather(name, spec, flat)) for name, spec in self.layout.tensors.items()}

    def _gather(self, name: str, spec: TensorSpec, flat: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        if name in self._mapped:
            return self._mapped[name].take(flat, axis=0)
        out = np.empty((len(flat), spec.row_bytes), np.uint8)
        descriptor, size, buffer = self._descriptors[name], spec.row_bytes, out.reshape(-1).data
        for i, row in enumerate(flat.tolist()):
            if os.preadv(descriptor, (buffer[i * size : (i + 1) * size],), row * size) != size:
                raise StoreError(f"A file of {self.directory} was cut short while it was in use.")
        return out

    def __reduce__(self) -> tuple[Callable[..., FeatureStore], tuple[Path, str]]:
        return _reopen, (self.directory, self.layout.fingerprint)


def _reopen(directory: Path, fingerprint: str) -> FeatureStore:
    return FeatureStore.open(directory, fingerprint=fingerprint)


def _verify(path: Path, num_bytes: int, chunk_bytes: int, checksums: Sequence[int], verify: str) -> None:
    if path.stat().st_size != num_bytes:
        raise StoreError(f"{path} has {path.stat().st_size} bytes where {num_bytes} were written.")
    chunks: Iterable[int] = range(len(checksums))
    if verify == "sampled":
        # from the system, so that the run's random numbers are left alone
        chunks = {len(checksums) - 1, *random.SystemRandom().sample(chunks, min(4, len(checksums)))}  # type: ignore[arg-type]
    with open(path, "rb") as file:
        for chunk in chunks:
            file.seek(chunk * chunk_bytes)
            if zlib.crc32(file.read(chunk_bytes)) != checksums[chunk]:
                raise StoreError(f"{path} is damaged: the checksum of chunk {chunk} does not match.")
