from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from lightning_unfreeze.data import cache as cache_module
from lightning_unfreeze.data.cache import DecodedImages
from lightning_unfreeze.data.images import Reading
from lightning_unfreeze.data.modules import ImageFolderData
from lightning_unfreeze.data.transforms import make_transform, needed_side
from tests.data import odd_files

SIZES = [(100, 80), (80, 100), (30, 40), (64, 64), (400, 20), (333, 77)]
CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.8, "interpolation": "bicubic"}


def photos(root: Path) -> list[Path]:
    files = []
    for i, size in enumerate(SIZES):
        files.append(root / "ab"[i % 2] / f"{i}.png")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        odd_files.noise(i, size).save(files[-1])
    return [*files, odd_files.turned(root / "a" / "turned.png", 6)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("on_disk", [False, True])
def test_cache__gives_the_pictures_shrunk_as_the_evaluation_resizes(
    channels: int, on_disk: bool, tmp_path: Path
) -> None:
    files, reading = photos(tmp_path), Reading(channels)
    config = CONFIG | {"input_size": (channels, 32, 32), "mean": (0.5,) * channels, "std": (0.5,) * channels}
    folder = tmp_path / "cache" if on_disk else None
    decoded = DecodedImages(files, reading, needed_side(config, "none"), "bicubic", folder)
    transform = make_transform(config)
    for copy in (decoded, pickle.loads(pickle.dumps(decoded))):
        for file in files:
            assert min(copy[file].size) <= 40
            if max(copy[file].size) < 4 * min(copy[file].size):  # strips are cropped before they are resized
                assert torch.equal(transform(copy[file]), transform(reading(file))), file
    assert decoded.num_bytes == sum(np.asarray(decoded[file]).size for file in files)


def test_cache__on_disk_is_read_again_and_follows_files_and_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, folder = photos(tmp_path), tmp_path / "cache"
    first = DecodedImages(files, Reading(), 40, "bicubic", folder)
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".pixels"]
    fill, decoded = DecodedImages._fill, []
    monkeypatch.setattr(DecodedImages, "_fill", lambda self, *args: (decoded.append(1), fill(self, *args))[1])
    again = DecodedImages(files, Reading(), 40, "bicubic", folder)
    assert all(again[file].tobytes() == first[file].tobytes() for file in files)
    assert decoded == []
    DecodedImages(files, Reading(background="black"), 40, "bicubic", folder)
    DecodedImages(files, Reading(), 39, "bicubic", folder)
    odd_files.noise(9, (100, 81)).save(files[0])
    DecodedImages(files, Reading(), 40, "bicubic", folder)
    assert decoded == [1, 1, 1]


def test_cache__a_pass_that_fails_leaves_no_file(tmp_path: Path) -> None:
    files = photos(tmp_path)
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"0\.png is not readable"):
        DecodedImages(files, Reading(), 40, "bicubic", tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def ready(root: Path, **kwargs: Any) -> ImageFolderData:
    data = ImageFolderData(str(root), data_config=CONFIG, batch_size=3, **kwargs)
    data.setup("fit")
    return data


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("where", ["ram", "disk"])
def test_module__files_are_decoded_once_and_augmentation_stays_random(
    where: Any, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    photos(root)
    plain = ready(root)
    data = ready(root, cache=where, cache_dir=str(tmp_path / "cache"), num_workers=workers)
    loader, val = data.train_dataloader(), data.val_dataloader()
    monkeypatch.setattr(Reading, "__call__", lambda self, source: pytest.fail(f"{source} is read again"))
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append(torch.cat([images for images, _ in loader]))
    assert epochs[0].shape[1:] == (3, 32, 32)
    assert not torch.equal(epochs[0].sum((1, 2, 3)).sort()[0], epochs[1].sum((1, 2, 3)).sort()[0])
    cached = torch.cat([images for images, _ in val])
    monkeypatch.undo()
    assert torch.equal(cached, torch.cat([images for images, _ in plain.val_dataloader()]))


def test_module__another_size_decodes_anew_and_a_broken_file_names_all(tmp_path: Path) -> None:
    photos(tmp_path)
    data = ready(tmp_path, cache="ram")
    sides = []
    for size_px in (16, 48, 16):
        data.set_image_size(size_px)
        pictures = data.dataset("train").cache
        sides.append(max(min(pictures[file].size) for file in data.dataset("train").images))
        assert data.dataset("train").cache is pictures
    assert sides[0] == sides[2] < sides[1]
    for name in ("a/0.png", "b/1.png"):
        whole = (tmp_path / name).read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 255  # header and end are whole
        (tmp_path / name).write_bytes(damaged)
    data = ready(tmp_path, cache="ram", val_fraction=0.01)
    with pytest.raises(MisconfigurationException, match=r"files cannot be read: .*\.png \("):
        data.train_dataloader(), data.val_dataloader()


def test_module__without_room_it_reads_as_usual_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path)
    monkeypatch.setattr(cache_module, "free_memory", lambda: 1000)
    data = ready(tmp_path, cache="ram")
    with pytest.warns(
        UserWarning, match=r"cache='ram': train photos are read anew in each epoch, as .* GiB are needed"
    ):
        loader = data.train_dataloader()
    assert len(list(loader)) > 0


def test_side__no_crop_is_ever_magnified() -> None:
    config = CONFIG | {"crop_pct": 1.0}
    side = needed_side(config, "side_on")
    torch.manual_seed(0)
    crop = next(part for part in make_transform(config, "side_on").transforms if hasattr(part, "scale"))
    image = Image.new("RGB", (side, side))
    least = min(min(crop.make_params([image])[name] for name in ("height", "width")) for _ in range(2000))
    assert 32 <= least <= 36
