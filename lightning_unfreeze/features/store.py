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
import mmap
import os
import random
import weakref
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np
import numpy.typing as npt
from torch import Tensor

from lightning_unfreeze.features.key import canonical_json
from lightning_unfreeze.features.layout import FORMAT, FORMAT_VERSION, StoreError, StoreLayout, TensorSpec

_CHUNK_BYTES = 4 * 2**20
# Mapped pages count as resident memory and the kernel maps megabytes for each row touched, so larger stores are read by
# position instead: no resident pages, for about 1 microsecond per row.
_MAX_MAPPED_BYTES = 512 * 2**20


# -------------------- the disk


def write_json(path: Path, content: dict[str, Any]) -> None:
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


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

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
    if (content.get("format"), content.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise StoreError(f"{path} is of another format: {content.get('format')} {content.get('format_version')}.")
    return content


def checksums(layout: StoreLayout, directory: Path) -> dict[str, Any]:
    """CRC-32 of each chunk of each file, for the manifest."""
    found = {}
    for name, path in layout.files(directory).items():
        with open(path, "rb") as file:
            found[name] = [zlib.crc32(chunk) for chunk in iter(lambda: file.read(_CHUNK_BYTES), b"")]
    return {"chunk_bytes": _CHUNK_BYTES, "chunk_checksums": found}


def gib(num_bytes: int) -> str:
    """A size for people."""
    return f"{num_bytes / 2**30:.2f} GiB"


def store_error(error: OSError, directory: Path, num_bytes: int) -> StoreError:
    """What an error of the disk means, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"The disk of {directory} is full: the feature store needs {gib(num_bytes)}. What was written is removed; "
            "free some space, choose another directory, fewer views, or a smaller dtype."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StoreError(
            f"{directory} cannot be written to ({error.strerror}); choose another directory for the feature store."
        )
    return StoreError(f"The feature store in {directory} could not be written: {error}.")


def remove_store(directory: Path) -> None:
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
        raise store_error(error, directory.parent, 0) from error
    try:
        yield
    finally:
        lock.release()


def prune(root: str | Path, max_bytes: int, keep: Collection[str | Path] = ()) -> list[Path]:
    """Remove the stores under `root` that were not used for longest, until those left hold at most `max_bytes`.

    Unfinished stores count and go like the others. Stores that are being written stay, those in
    `keep`, and what is no store.

    Returns:
        The directories removed, oldest first.
    """
    kept = {Path(path).absolute() for path in keep}
    stores: list[tuple[float, Path, int]] = []
    for directory in Path(root).absolute().glob("*"):
        for mark in (directory / "manifest.json", directory / "draft.json"):
            with suppress(StoreError, OSError):
                read_json(mark)
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
                remove_store(directory)
                removed.append(directory)
                total -= size
    return removed


# -------------------- read


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
        for name, path in layout.files(directory).items():
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
        manifest = read_json(directory / "manifest.json")
        if manifest["fingerprint"] != fingerprint:
            raise StoreError(
                f"{directory} holds features of something else: {manifest['fingerprint']}, not {fingerprint}."
            )
        layout = StoreLayout.from_json(manifest)
        try:
            for name, path in layout.files(directory).items():
                _verify(
                    path, layout.file_bytes(name), manifest["chunk_bytes"], manifest["chunk_checksums"][name], verify
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
            Name to `(B, *row)` in the stored dtype (a cast is the caller's): new, contiguous memory on the CPU.

        Raises:
            IndexError: A row or view is out of range.
            StoreError: A file was cut short after the store was opened.
        """
        flat = self.layout.flat_rows(rows, view)
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

    def __reduce__(self) -> tuple[Callable[..., FeatureStore], tuple[Path]]:
        return partial(FeatureStore.open, fingerprint=self.layout.fingerprint), (self.directory,)


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
