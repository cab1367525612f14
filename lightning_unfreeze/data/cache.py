"""Decoded pictures, each file read once, for stages that train on images."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from PIL import Image

from lightning_unfreeze.data.images import Bar, Reading, no_bar
from lightning_unfreeze.data.transforms import shrunk


class DecodedImages:
    """Pictures in 8 bits, upright, with a short side of at most `short_side`, in one array.

    Worker processes that are forked share an array in memory; one on disk is shared by all processes.

    Args:
        files: The photos; each is decoded once, in threads.
        reading: How; with 1 or 3 channels.
        short_side: In pixels; smaller photos stay as they are.
        interpolation: Of the resizing, in torchvision's words.
        folder: Keeps the pictures on disk, for the next run too; None keeps them in memory.
        bar: Shows the progress.

    Attributes:
        how_read: What the store's key has to know of the way images are read.

    Raises:
        MemoryError: Where neither memory nor disk has the room, with both numbers.
        OSError: For files that cannot be read.
    """

    def __init__(
        self,
        files: Sequence[Path],
        reading: Reading,
        short_side: int,
        interpolation: str,
        folder: Path | None = None,
        bar: Bar = no_bar,
    ) -> None:
        self._reading, self._short_side, self._interpolation = reading, short_side, interpolation
        self.how_read = f"at most {short_side} px, {interpolation}"
        self._rows = {file: i for i, file in enumerate(files)}
        with ThreadPoolExecutor() as pool:
            self._sizes = np.array(list(pool.map(self._size_of, files)), dtype=np.int64).reshape(-1, 2)
        self._ends = np.cumsum(self._sizes.prod(1) * reading.num_channels)
        self._path = None if folder is None else folder / f"{self._key(files)}.pixels"
        if self._path is None:
            _check_room(self.num_bytes, free_memory(), "memory")
            self._pixels = np.empty(self.num_bytes, dtype=np.uint8)
            self._fill(files, bar)
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self._path}.lock"):  # one process decodes, the others wait and read
            if not self._path.exists():
                _check_room(self.num_bytes, shutil.disk_usage(self._path.parent).free, str(self._path.parent))
                self._write(self._path, files, bar)
        self._map(self._path)

    @property
    def num_bytes(self) -> int:
        """Size of all pictures together."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, file: Path) -> Image.Image:
        """The picture of a file."""
        pixels = self._of(self._rows[file])
        return Image.fromarray(pixels[..., 0] if self._reading.num_channels == 1 else pixels)

    def __contains__(self, file: object) -> bool:
        return file in self._rows

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self._path is not None:  # another process maps the file itself
            del state["_pixels"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._path is not None:
            self._map(self._path)

    def _of(self, row: int) -> npt.NDArray[np.uint8]:
        height, width = self._sizes[row]
        end, length = self._ends[row], height * width * self._reading.num_channels
        return self._pixels[end - length : end].reshape(height, width, self._reading.num_channels)

    def _size_of(self, file: Path) -> tuple[int, int]:
        """Height and width by the header, before the picture is turned upright."""
        with self._reading.open(file) as image:
            width, height = image.size
        short = min(width, height)
        if short <= self._short_side:
            return height, width
        long = int(self._short_side * max(width, height) / short)  # as torchvision computes it
        return (self._short_side, long) if height == short else (long, self._short_side)

    def _fill(self, files: Sequence[Path], bar: Bar) -> None:
        def decode(row: int) -> None:
            picture = shrunk(self._reading(files[row]), self._short_side, self._interpolation)
            size = picture.size[::-1]
            if sorted(size) != sorted(self._sizes[row]):  # a header that does not say what the file holds
                picture = picture.resize(self._sizes[row].tolist()[::-1])
            self._sizes[row] = picture.size[::-1]  # upright
            self._of(row)[:] = np.asarray(picture).reshape(self._of(row).shape)

        with ThreadPoolExecutor() as pool:
            for _ in bar(pool.map(decode, range(len(files))), len(files), "decoding photos"):
                pass

    def _write(self, path: Path, files: Sequence[Path], bar: Bar) -> None:
        """A file of the sizes and, behind them, the pixels; there only when it is whole."""
        partial = path.with_suffix(".part")
        try:
            shape = (self._sizes.nbytes + self.num_bytes,)
            whole = np.memmap(partial, dtype=np.uint8, mode="w+", shape=shape)
            self._pixels = whole[self._sizes.nbytes :]
            self._fill(files, bar)
            whole[: self._sizes.nbytes] = self._sizes.view(np.uint8).reshape(-1)
            whole.flush()
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _map(self, path: Path) -> None:
        whole = np.memmap(path, dtype=np.uint8, mode="r")
        self._sizes = np.array(whole[: self._sizes.nbytes]).view(np.int64).reshape(-1, 2)
        self._pixels = whole[self._sizes.nbytes :]

    def _key(self, files: Sequence[Path]) -> str:
        digest = hashlib.blake2b(digest_size=12)
        digest.update(repr((self._reading, self._short_side, self._interpolation, self._sizes.tolist())).encode())
        for file in files:
            stat = file.stat()
            digest.update(f"{os.fsencode(file)!r} {stat.st_size} {stat.st_mtime_ns}".encode())
        return digest.hexdigest()


def _check_room(needed_bytes: int, free_bytes: int | None, where: str) -> None:
    if free_bytes is not None and needed_bytes > 0.8 * free_bytes:
        raise MemoryError(
            f"{needed_bytes / 2**30:.2g} GiB are needed, {free_bytes / 2**30:.2g} GiB are free in {where}"
        )


def free_memory() -> int | None:
    """Bytes that programs may still take, what the page cache would give back among them; None where not known."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return None
