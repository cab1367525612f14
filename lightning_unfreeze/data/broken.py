"""Files that are no images, found before anything is trained: all of them at once."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning_unfreeze.data.images import Bar, Reading, no_bar, reason_of


def _is_whole_tiff(image: Any, size: int) -> bool:
    for offsets, lengths in ((273, 279), (324, 325)):
        if offsets in image.tag_v2 and lengths in image.tag_v2:
            pairs = zip(image.tag_v2[offsets], image.tag_v2[lengths], strict=False)
            return all(offset + length <= size for offset, length in pairs)
    return False


_WHOLE: dict[str, Callable[[Any, bytes, int], bool]] = {
    "JPEG": lambda image, tail, size: tail.rstrip(b"\0\r\n ").endswith(b"\xff\xd9"),
    "PNG": lambda image, tail, size: tail.endswith(b"IEND\xaeB`\x82"),
    "GIF": lambda image, tail, size: tail.endswith(b";"),
    "WEBP": lambda image, tail, size: struct.unpack("<I", _head(image, 8)[4:8])[0] + 8 <= size,
    "BMP": lambda image, tail, size: struct.unpack("<I", _head(image, 6)[2:6])[0] <= size,
    "TIFF": lambda image, tail, size: _is_whole_tiff(image, size),
}
"""By format, whether header and end of a file say that nothing is missing."""


def _head(image: Any, length: int) -> bytes:
    with open(image.filename, "rb") as file:
        return file.read(length)


def what_is_wrong(path: Path, reading: Reading, in_full: bool = False) -> str | None:
    """Why a file is no image, or None; it is decoded `in_full`, or only where its header and its end leave a doubt."""
    try:
        if not in_full and reading.num_channels in (1, 3):
            size = os.path.getsize(path)
            with reading.open(path) as image, path.open("rb") as file:
                file.seek(max(size - 256, 0))
                whole = _WHOLE.get(image.format or "")
                if whole is not None and whole(image, file.read(), size):
                    return None
        reading(path)
    except Exception as error:
        return reason_of(path, error.__cause__ if isinstance(error.__cause__, Exception) else error)
    return None


def broken_among(
    files: Sequence[Path],
    reading: Reading,
    in_full: bool,
    bar: Bar = no_bar,
) -> dict[Path, str]:
    """Files that are no images, with the reason; all are looked at, in threads, as by `what_is_wrong`."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda file: what_is_wrong(file, reading, in_full), files)
        text = "decoding all files" if in_full else "checking files"
        reasons = list(bar(found, len(files), text))
    return {file: reason for file, reason in zip(files, reasons, strict=True) if reason is not None}
