"""Odd files, as people have them: what they hold is known, so that a test can say how each has to be read."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATIONS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""What a camera does to an upright picture that it stores under each EXIF orientation."""


def noise(seed: int = 0, size: tuple[int, int] = (48, 40)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def sky() -> Image.Image:
    """A red left quarter on the top of a white picture, higher than wide: no turn leaves it as it is."""
    image = Image.new("RGB", (32, 48), "white")
    image.paste((255, 0, 0), (0, 0, 8, 16))
    return image


def turned(path: Path, orientation: int) -> Path:
    """`sky` as a camera stores it, with the orientation in its EXIF."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = ORIENTATIONS[orientation]
    stored = sky() if turn is None else sky().transpose(turn)
    stored.save(path, exif=exif, **({"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {}))
    return path


def _bytes(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises many pixels."""

    def chunk(tag: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


# name of the file -> its bytes, and a few words of the reason for which it is no image
BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.jpg": (lambda: b"", "0 bytes"),
    "page.jpg": (lambda: b"<!DOCTYPE html><html>404</html>", "HTML"),
    "page.png": (lambda: b"\n\n  <html>", "HTML"),
    "archive.jpg": (lambda: b"PK\x03\x04" + bytes(50), "ZIP"),
    "paper.jpg": (lambda: b"%PDF-1.7", "PDF"),
    "pointer.png": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "text.bmp": (lambda: b"no image at all", "no image that Pillow knows"),
    "zeros.png": (lambda: bytes(3000), "no image that Pillow knows"),
    "cut.jpg": (lambda: _bytes(noise(), "JPEG")[:-300], "truncated"),
    "cut.png": (lambda: _bytes(noise(), "PNG")[:-300], "truncated"),
    "cut.gif": (lambda: _bytes(noise(), "GIF")[:-300], "truncated"),
    "cut.webp": (lambda: _bytes(noise(), "WEBP", lossless=True)[:-300], ""),
    "cut.bmp": (lambda: _bytes(noise(), "BMP")[:-300], "truncated"),
    "cut.tif": (lambda: _bytes(noise(), "TIFF")[:-3000], ""),
    "cut_lzw.tif": (lambda: _bytes(noise(), "TIFF", compression="tiff_lzw")[:3000], ""),
    "cut.ppm": (lambda: _bytes(noise(), "PPM")[:-300], ""),
    "cut.tga": (lambda: _bytes(noise(), "TGA")[:-300], ""),
    "head_only.jpg": (lambda: _bytes(noise(), "JPEG")[:100], ""),
    "bomb.png": (lambda: bomb(20000, 20000), "20000 x 20000 pixels"),
}


def write_broken(folder: Path) -> dict[str, str]:
    """All broken files in a folder; what their reasons have to say."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (content, _) in BROKEN.items():
        (folder / name).write_bytes(content())
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    return {name: reason for name, (_, reason) in BROKEN.items()} | {"gone.jpg": "link to nothing"}


def _ramp(dtype: type, low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, 40 * 48).reshape(40, 48).astype(dtype)


def _tiff(array: np.ndarray) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(array).save(path)


def _half_transparent(mode: str) -> Image.Image:
    """Left half opaque red (grey 76), right half fully transparent over green."""
    image = Image.new("RGBA", (48, 40), (255, 0, 0, 255))
    image.paste((0, 255, 0, 0), (24, 0, 48, 40))
    return image.convert(mode)


def _palette_with_transparency(path: Path) -> None:
    image = Image.new("P", (48, 40), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.paste(1, (24, 0, 48, 40))
    image.save(path, transparency=1)


def _big_endian(path: Path) -> None:
    """A 16-bit TIFF of the other byte order, written by hand: one strip, no compression."""
    values = _ramp(np.uint16, 0, 65535).astype(">u2").tobytes()
    tags = [(256, 4, 48), (257, 4, 40), (258, 3, 16 << 16), (259, 3, 1 << 16), (262, 3, 1 << 16), (273, 4, 0)]
    tags += [(277, 3, 1 << 16), (278, 4, 40), (279, 4, len(values))]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack(">HHII", tag, kind, 1, start if tag == 273 else value) for tag, kind, value in tags)
    path.write_bytes(b"MM\0*" + struct.pack(">IH", 8, len(tags)) + entries + bytes(4) + values)


RAMP = np.linspace(0, 255, 40 * 48).reshape(40, 48)
"""What a grey ramp over the whole range has to look like, in 8 bits."""

# name of the file -> how it is written; each is a ramp from black to white
RAMPS: dict[str, Callable[[Path], None]] = {
    "grey_8.png": _tiff(_ramp(np.uint8, 0, 255)),
    "grey_16.png": _tiff(_ramp(np.uint16, 0, 65535)),
    "grey_16.tif": _tiff(_ramp(np.uint16, 0, 65535)),
    "grey_16_big_endian.tif": _big_endian,
    "grey_16.pgm": lambda path: path.write_bytes(
        b"P5 48 40 65535\n" + _ramp(np.uint16, 0, 65535).astype(">u2").tobytes()
    ),
    "grey_32.tif": _tiff(_ramp(np.int32, 0, 2**31 - 1)),
    "float_to_1.tif": _tiff(_ramp(np.float32, 0, 1)),
    "float_to_255.tif": _tiff(_ramp(np.float32, 0, 255)),
    "float_to_65535.tif": _tiff(_ramp(np.float32, 0, 65535)),
    "float_from_below_0.tif": _tiff(_ramp(np.float32, -1000, 3000)),
}

# name of the file -> how it is written; each is red on the left, and transparent over green on the right
TRANSPARENT: dict[str, Callable[[Path], None]] = {
    "rgba.png": lambda path: _half_transparent("RGBA").save(path),
    "rgba.webp": lambda path: _half_transparent("RGBA").save(path, lossless=True, exact=True),
    "rgba.tif": lambda path: _half_transparent("RGBA").save(path),
    "palette.png": _palette_with_transparency,
    "palette.gif": _palette_with_transparency,
}


def _animation(path: Path) -> None:
    frames = [Image.new("RGB", (48, 40), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(
        path, save_all=True, append_images=frames[1:], **({"lossless": True} if path.suffix == ".webp" else {})
    )


# name of the file -> how it is written; each is all red
RED: dict[str, Callable[[Path], None]] = {
    "rgb.png": lambda path: Image.new("RGB", (48, 40), "red").save(path),
    "palette.bmp": lambda path: Image.new("RGB", (48, 40), "red").quantize(4).save(path),
    "cmyk.tif": lambda path: Image.new("CMYK", (48, 40), (0, 255, 255, 0)).save(path),
    "ycbcr.jpg": lambda path: Image.new("RGB", (48, 40), "red").convert("YCbCr").save(path, quality=100),
    "animation.gif": _animation,
    "animation.webp": _animation,
    "animation.png": _animation,
    "CAPITALS.PNG": lambda path: Image.new("RGB", (48, 40), "red").save(path),
    "two.dots.in.name.png": lambda path: Image.new("RGB", (48, 40), "red").save(path),
    "a name, with 'commas' & \"quotes\".png": lambda path: Image.new("RGB", (48, 40), "red").save(path),
    "größe-写真-📷.png": lambda path: Image.new("RGB", (48, 40), "red").save(path),
    "n" * 240 + ".png": lambda path: Image.new("RGB", (48, 40), "red").save(path),
    "png_named.jpg": lambda path: Image.new("RGB", (48, 40), "red").save(path, "PNG"),
    "damaged_exif.jpg": lambda path: Image.new("RGB", (48, 40), "red").save(
        path, quality=100, subsampling=0, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"
    ),
    "trailing_zeros.jpg": lambda path: path.write_bytes(
        _bytes(Image.new("RGB", (48, 40), "red"), "JPEG", quality=100, subsampling=0) + bytes(500)
    ),
    "trailing_text.jpg": lambda path: path.write_bytes(
        _bytes(Image.new("RGB", (48, 40), "red"), "JPEG", quality=100, subsampling=0) + b"maker's notes" * 50
    ),
    "lab.tif": lambda path: Image.merge("LAB", [Image.new("L", (48, 40), value) for value in (138, 209, 198)]).save(
        path
    ),
}
