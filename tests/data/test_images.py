from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from lightning_unfreeze.data import images
from lightning_unfreeze.data.broken import broken_among, what_is_wrong
from lightning_unfreeze.data.datasets import ImageDataset
from lightning_unfreeze.data.images import Reading, decode
from lightning_unfreeze.data.transforms import make_transform
from lightning_unfreeze.features.key import dataset_fingerprint
from tests.data import odd_files


def pixels(image: Any) -> Any:
    return np.asarray(image, dtype=float)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp", ".tif"])
def test_decode__turns_a_picture_as_its_exif_says(orientation: int, ending: str, tmp_path: Path) -> None:
    picture = decode(odd_files.turned(tmp_path / f"photo{ending}", orientation))
    assert picture.size == (32, 48)
    assert np.abs(pixels(picture) - pixels(odd_files.sky())).mean() < 6  # JPEG and WebP lose some


@pytest.mark.parametrize(
    ("name", "write"), odd_files.RAMPS.items(), ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_decode__scales_greys_of_any_depth_to_8_bits(
    name: str, write: Callable[[Path], None], mode: Any, tmp_path: Path
) -> None:
    write(tmp_path / name)
    picture = decode(tmp_path / name, mode)
    assert picture.mode == mode
    grey = pixels(picture) if mode == "L" else pixels(picture)[..., 1]
    assert np.abs(grey - odd_files.RAMP).max() <= 1


def test_decode__dim_and_bright_16_bit_pictures_stay_dim_and_bright(tmp_path: Path) -> None:
    for name, value in (("dim", 2570), ("bright", 51400)):
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / f"{name}.png")
    assert [decode(tmp_path / f"{name}.png").getpixel((0, 0)) for name in ("dim", "bright")] == [(10,) * 3, (200,) * 3]


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (2048, 128), (4095, 255), (9000, 255)])
def test_reading__value_range_says_what_is_white(value: int, expected: int, tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / "scan.tif")
    assert Reading(1, value_range=(0, 4095))(tmp_path / "scan.tif").getpixel((0, 0)) == expected


def test_decode__values_that_are_no_numbers_are_black_or_white(tmp_path: Path) -> None:
    values = np.array([[0.0, 1.0, np.nan, np.inf, -np.inf]], dtype=np.float32)
    Image.fromarray(values).save(tmp_path / "f.tif")
    assert pixels(decode(tmp_path / "f.tif", "L")).tolist() == [[0, 255, 0, 255, 0]]


@pytest.mark.parametrize(
    ("background", "right"), [("white", (255, 255, 255)), ("black", (0, 0, 0)), (None, (0, 255, 0))]
)
@pytest.mark.parametrize("name", odd_files.TRANSPARENT)
def test_reading__transparent_pixels_show_the_background(
    name: str, background: str | None, right: Any, tmp_path: Path
) -> None:
    odd_files.TRANSPARENT[name](tmp_path / name)
    picture = Reading(background=background)(tmp_path / name)
    assert picture.mode == "RGB"
    assert [picture.getpixel((4, 20)), picture.getpixel((40, 20))] == [(255, 0, 0), right]


@pytest.mark.parametrize("name", odd_files.RED, ids=lambda name: name[:30])
def test_decode__odd_files_of_one_colour(name: str, tmp_path: Path) -> None:
    odd_files.RED[name](tmp_path / name)
    picture = decode(tmp_path / name)
    assert (picture.mode, picture.size) == ("RGB", (48, 40))
    assert np.abs(pixels(picture) - (255, 0, 0)).max() <= 6
    assert what_is_wrong(tmp_path / name, Reading()) is None


def test_broken__all_are_found_with_their_reasons_before_they_are_decoded(tmp_path: Path) -> None:
    reasons = odd_files.write_broken(tmp_path)
    odd_files.noise().save(tmp_path / "good.jpg")
    for in_full in (False, True):
        found = broken_among(sorted(tmp_path.iterdir()), Reading(), in_full)
        assert {path.name for path in found} == set(reasons)
        wrong = {path.name: text for path, text in found.items() if reasons[path.name] not in text or "\n" in text}
        assert wrong == {}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_broken__whole_files_are_not_decoded_to_see_that_they_are_whole(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd_files.noise().save(tmp_path / "photo", form)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert what_is_wrong(tmp_path / "photo", Reading()) is None


def test_reading__max_pixels_is_a_limit_one_can_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd_files.noise(size=(50, 40)).save(tmp_path / "photo.png")
    with pytest.raises(OSError, match=r"photo\.png is not readable \(50 x 40 pixels, over the limit max_pixels=1999"):
        Reading(max_pixels=1999)(tmp_path / "photo.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own, which would raise an error from 200 on
    assert Reading(max_pixels=2000)(tmp_path / "photo.png").size == (50, 40)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_dataset__one_broken_file_names_all_the_others(tmp_path: Path) -> None:
    odd_files.write_broken(tmp_path)
    files = [tmp_path / name for name in ("cut.jpg", "page.png", "empty.jpg")]
    data = ImageDataset(files, [0, 0, 0], lambda picture: picture)
    with pytest.raises(OSError, match=r"cut\.jpg is not readable .*so are 2 others: .*page\.png .*empty\.jpg"):
        data[0]


def test_dataset__its_fingerprint_follows_the_way_files_are_read(tmp_path: Path) -> None:
    odd_files.noise().save(tmp_path / "photo.png")
    ways = [Reading(), Reading(), Reading(1), Reading(background="black"), Reading(value_range=(0, 1))]
    keys = [dataset_fingerprint(ImageDataset([tmp_path / "photo.png"], [0], None, way)) for way in ways]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


# --- channels ---------------------------------------------------------------------------------------------------------


def test_reading__two_and_four_channels_keep_the_files_own_bands(tmp_path: Path) -> None:
    bands = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    Image.fromarray(bands, "RGBA").save(tmp_path / "rgba.png")
    torch.testing.assert_close(
        torch.Tensor(Reading(4)(tmp_path / "rgba.png")), torch.from_numpy(bands).permute(2, 0, 1) / 255
    )
    Image.fromarray(bands[..., :2].copy(), "LA").save(tmp_path / "la.png")
    assert Reading(2)(tmp_path / "la.png").shape == (2, 6, 5)
    odd_files.noise().save(tmp_path / "rgb.png")
    opaque = Reading(4)(tmp_path / "rgb.png")
    assert opaque.shape == (4, 40, 48)
    assert bool((opaque[3] == 1).all())


def test_reading__pages_of_a_tiff_are_bands(tmp_path: Path) -> None:
    pages = [Image.fromarray(np.full((6, 5), 1000 * i, np.uint16)) for i in range(5)]
    pages[0].save(tmp_path / "scene.tif", save_all=True, append_images=pages[1:])
    scene = Reading(5)(tmp_path / "scene.tif")
    assert scene[:, 0, 0].tolist() == pytest.approx([1000 * i / 65535 for i in range(5)])
    with pytest.raises(OSError, match=r"scene\.tif is not readable \(1 channels, the network takes 7\)"):
        Reading(7)(tmp_path / "scene.tif")


def test_transform__takes_any_number_of_channels(tmp_path: Path) -> None:
    pages = [Image.fromarray(np.full((60, 50), 1000 * i, np.uint16)) for i in range(5)]
    pages[0].save(tmp_path / "scene.tif", save_all=True, append_images=pages[1:])
    config = {
        "input_size": (5, 32, 32),
        "mean": (0.0,) * 5,
        "std": (1.0,) * 5,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
    }
    for augmentation in ("none", "shift", "side_on", "top_down"):
        out = make_transform(config, augmentation)(Reading(5)(tmp_path / "scene.tif"))  # type: ignore[arg-type]
        assert (out.shape, type(out)) == ((5, 32, 32), torch.Tensor)
        assert out[4, 16, 16].item() == pytest.approx(4000 / 65535, rel=1e-4)


# --- strips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(10000, 20), (20, 10000)])
@pytest.mark.parametrize("augmentation", ["none", "shift", "side_on", "top_down", "randaugment"])
def test_transform__strips_never_become_giants(
    size: tuple[int, int], augmentation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    resize = Image.Image.resize

    def watched(self: Image.Image, size: Any, *args: Any, **kwargs: Any) -> Image.Image:
        sizes.append(size)
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    config = {
        "input_size": (3, 64, 64),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
    }
    assert make_transform(config, augmentation)(odd_files.noise(size=size)).shape == (3, 64, 64)
    assert sizes
    assert max(max(size) for size in sizes) <= 4 * 74


def test_transform__a_strip_gives_the_middle_that_timm_gives() -> None:
    config = {
        "input_size": (3, 32, 32),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "crop_pct": 0.8,
        "interpolation": "bicubic",
    }
    strip = odd_files.noise(size=(20, 2)).resize((800, 60))  # smooth: the two crops may lie half a pixel apart
    timms = timm.data.create_transform(**config, is_training=False)(strip)
    assert (make_transform(config)(strip) - timms).abs().mean() < 0.02
    assert timms.std() > 0.3


SETS = Path(__file__).parents[3] / "shared" / "data"


def test_decode__turned_copies_are_classified_like_the_upright_photos(tmp_path: Path) -> None:
    """Pooled features of real weights and a logistic head, ants and bees in all orientations."""
    weights = SETS / "weights" / "mobilenetv2_035.keras_in1k.safetensors"
    if not weights.is_file():
        pytest.skip("no photos and weights beside the project")
    from sklearn.linear_model import LogisticRegression

    overlay = {"file": str(weights), "num_classes": -1}
    network = timm.create_model(
        *("mobilenetv2_035", True), pretrained_cfg_overlay=overlay, num_classes=0, pad_type="same", bn_eps=1e-3
    ).eval()
    config = {
        "input_size": (3, 96, 96),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
    }
    transform = make_transform(config)

    def features(read: Callable[[Path], Image.Image], files: list[Path]) -> Any:
        with torch.inference_mode():
            return network(torch.stack([transform(read(file)) for file in files])).numpy()

    files = {split: sorted((SETS / "ants_bees" / split).rglob("*.jpg"))[::2] for split in ("train", "val")}
    labels = {split: [file.parent.name for file in some] for split, some in files.items()}
    head = LogisticRegression(max_iter=2000).fit(features(decode, files["train"]), labels["train"])
    upright = features(decode, files["val"])
    turned = []
    for i, file in enumerate(files["val"]):
        exif, turn = Image.Exif(), odd_files.ORIENTATIONS[1 + i % 8]
        exif[0x0112] = 1 + i % 8
        stored = decode(file) if turn is None else decode(file).transpose(turn)
        turned.append(tmp_path / f"{i}.png")
        stored.save(turned[-1], exif=exif, compress_level=0)
    accuracy = head.score(upright, labels["val"])
    assert head.score(features(decode, turned), labels["val"]) == accuracy > 0.7


def test_heic__is_read_wherever_its_library_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pillow_heif.py").write_text(
        "calls = 0\ndef register_heif_opener():\n    global calls\n    calls += 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pillow_heif", raising=False)
    runpy.run_path(images.__file__)  # as a process that starts with it installed
    assert importlib.import_module("pillow_heif").calls == 1
    monkeypatch.delitem(sys.modules, "pillow_heif")


def test_heic__without_its_library_the_reason_says_what_to_install(tmp_path: Path) -> None:
    if ".heic" in Image.registered_extensions():
        pytest.skip("pillow-heif is installed")
    path = tmp_path / "IMG_1.HEIC"
    path.write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(OSError, match=r"IMG_1\.HEIC is not readable \(for HEIC: pip install pillow-heif\)"):
        Reading()(path)
