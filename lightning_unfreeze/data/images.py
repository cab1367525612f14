"""From a file to a picture: turned upright, in 8 bits, without transparency, in the channels of the network."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from torchvision import tv_tensors

if find_spec("pillow_heif"):  # phones' photos: Pillow has to be told of it, in every process that reads
    import_module("pillow_heif").register_heif_opener()

MAX_PIXELS = 178_956_970
"""Pillow's own limit, above which it takes a file for an attack on the memory."""

_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each orientation of EXIF 2.32, tag 0x0112."""

HEIC = (".heic", ".heif")
HOW_TO_READ_HEIC = "for HEIC: pip install pillow-heif"

READING_VERSION = 2
"""Counts up whenever the same file becomes another picture, so that stored features of before are not taken."""

_ORIENTATION = 0x0112
_OPENING = threading.Lock()  # Pillow's limit is one for the process, and files are checked in threads


Bar = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""Shows the progress of a pass: yields what it is given, of which there are so many, under a text."""


def no_bar(found: Iterable[Any], total: int, text: str) -> Iterable[Any]:
    """Shows nothing."""
    return found


@dataclass(frozen=True)
class Reading:
    """How a file becomes the picture that the transform gets.

    A picture is turned as its EXIF orientation says; of an animation the first frame counts. Greys of more than 8 bits
    are scaled to 8: 16-bit ones by 65535, other ones by the smallest of 1, 255, 65535 and 2^31 - 1 that holds the
    picture's largest value, or from smallest to largest where there are negative values.

    Attributes:
        num_channels: 1 for grey, 3 for RGB, 4 for RGB and a fourth band (transparency, or the file's own); another
            number takes files of as many bands. From 2 and from 4 on the picture is a float tensor in [0, 1].
        background: Colour that shows through where a picture is transparent, in Pillow's words; None drops the
            transparency and shows what colour lies under it.
        value_range: Values of black and white for greys of more than 8 bits, e.g. `(0, 4095)`; None as said above.
        max_pixels: Larger pictures are refused.
    """

    num_channels: int = 3
    background: str | None = "white"
    value_range: tuple[float, float] | None = None
    max_pixels: int = MAX_PIXELS

    def __call__(self, source: Path | Image.Image) -> Any:
        """The picture of a file (or one in memory): `L` or `RGB` of Pillow, or a tensor `(C, H, W)`.

        Raises:
            OSError: For a file that cannot be read, with its name and the reason.
        """
        if isinstance(source, Image.Image):
            return self._convert(source)
        try:
            with self.open(source) as image:
                return self._convert(_upright(image))
        except Exception as error:  # Pillow raises nearly everything for broken files
            if (bands := _read_tiff(source, self.num_channels)) is not None:
                return bands
            raise OSError(f"{source} is not readable ({reason_of(source, error)})") from error

    def with_channels(self, num_channels: int) -> Reading:
        """The same for a network of other channels."""
        return replace(self, num_channels=num_channels)

    def open(self, path: Path) -> Image.Image:
        """The header of a file, whatever its number of pixels up to `max_pixels`."""
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF, which is no reason to stop
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(path)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        if image.width * image.height > self.max_pixels:
            size = f"{image.width} x {image.height}"
            image.close()
            raise OSError(f"{size} pixels, over the limit max_pixels={self.max_pixels}")
        return image

    def _convert(self, image: Image.Image) -> Any:
        if self.num_channels not in (1, 3):
            return _bands_of(image, self.num_channels)
        mode = "L" if self.num_channels == 1 else "RGB"
        if image.mode.startswith(("I", "F")):
            image = Image.fromarray(_in_8_bits(np.asarray(image), image, self.value_range))
        elif image.mode == "LAB":
            lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
        if not _is_transparent(image):
            return image.convert(mode)
        image = image.convert("RGBA")
        if self.background is None:
            return image.convert("RGB").convert(mode)
        below = Image.new("RGBA", image.size, self.background)
        return Image.alpha_composite(below, image).convert("RGB").convert(mode)


def decode(path: Path, mode: Literal["L", "RGB"] = "RGB") -> Image.Image:
    """The picture of a file as `ImageFolderData` reads it with its defaults, e.g. to look at it."""
    image: Image.Image = Reading(1 if mode == "L" else 3)(Path(path))
    return image


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # first: a PNG may have its EXIF at the end
    if image.format == "TIFF":  # turned by Pillow while it loads; Pillow 10.0 leaves the orientation in its EXIF
        return image
    try:
        turn = _TURN.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF says nothing of the orientation
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.format = image.format
    return turned


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def _in_8_bits(
    values: npt.NDArray[Any], image: Image.Image, value_range: tuple[float, float] | None
) -> npt.NDArray[np.uint8]:
    grey = values.astype(np.float64)
    low, high = value_range or (0.0, 65535.0)
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if value_range is None and not is_16_bit:
        finite = grey[np.isfinite(grey)]
        least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        steps = (1.0,) * (image.mode == "F") + (255.0, 65535.0, 2.0**31 - 1)
        low, high = (least, most) if least < 0 else (0.0, next((step for step in steps if most <= step), most))
    grey = np.nan_to_num(grey, nan=low, posinf=high, neginf=low)
    scaled = (grey - low) / ((high - low) or 1.0) * 255.0
    levels: npt.NDArray[np.uint8] = scaled.clip(0, 255).round().astype(np.uint8)
    return levels


def _bands_of(image: Image.Image, num_channels: int) -> Any:
    frames = getattr(image, "n_frames", 1)
    if num_channels == 4 and len(image.getbands()) < 4:
        image = image.convert("RGBA")
    if len(image.getbands()) == num_channels:
        array = np.asarray(image)
    elif frames == num_channels and len(image.getbands()) == 1:
        pages = []
        for frame in range(frames):
            image.seek(frame)
            pages.append(np.asarray(image))
        array = np.stack(pages, axis=-1)
    else:
        raise OSError(f"{len(image.getbands())} channels, the network takes {num_channels}")
    return _as_tensor(array)


def _as_tensor(array: npt.NDArray[Any]) -> Any:
    whole = np.iinfo(array.dtype).max if array.dtype.kind in "iu" else 1.0
    scaled = torch.from_numpy(np.ascontiguousarray(array.astype(np.float32) / whole))
    return tv_tensors.Image(scaled.permute(2, 0, 1))


def _read_tiff(path: Path, num_channels: int) -> Any:
    """The bands of a TIFF that Pillow does not know, if tifffile is installed; else None."""
    if num_channels in (1, 3) or path.suffix.lower() not in (".tif", ".tiff"):
        return None
    try:
        import tifffile

        array = np.asarray(tifffile.imread(path))
    except Exception:  # not installed, or no TIFF at all: Pillow's reason is the better one
        return None
    if array.ndim == 3 and array.shape[0] == num_channels:
        array = np.moveaxis(array, 0, -1)
    return _as_tensor(array) if array.ndim == 3 and array.shape[-1] == num_channels else None


_OTHER_KINDS = (
    (b"PK\x03\x04", "a ZIP archive, no image"),
    (b"%PDF", "a PDF, no image"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the image: run git lfs pull"),
    (b"<", "HTML or XML, no image"),
)


def reason_of(path: Path, error: Exception) -> str:
    """Why a file is no image, in a few words."""
    if not os.path.exists(path):
        return "a link to nothing" if path.is_symlink() else "no such file"
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    if not head:
        return "0 bytes" if not os.path.getsize(path) else "no image"
    kind = next((text for start, text in _OTHER_KINDS if head.startswith(start)), None)
    if kind:
        return kind
    if isinstance(error, UnidentifiedImageError):
        return HOW_TO_READ_HEIC if path.suffix.lower() in HEIC else "no image that Pillow knows"
    return " ".join(str(error).split())[:120] or type(error).__name__
