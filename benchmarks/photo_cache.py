"""What `ImageFolderData(cache=...)` saves an epoch of photos: seconds of reading alone, arms in turn.

    python benchmarks/photo_cache.py [--data FOLDER] [--epochs 3] [--num_workers 0] [--out FILE.md]

Without `--data` 200 drawn JPEGs of 1024 x 768 px stand in for photos.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_unfreeze import ImageFolderData
from lightning_unfreeze.data.cache import DecodedImages

CONFIG = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 0.875}


def draw_photos(root: Path, number: int = 200, size: tuple[int, int] = (1024, 768)) -> Path:
    """Smooth noise, which JPEG packs about as well as photos."""
    for i in range(number):
        path = root / "ab"[i % 2] / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = np.random.default_rng(i).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return root


def seconds_of(data: ImageFolderData, epoch: int) -> float:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    start = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.data or draw_photos(Path(scratch) / "photos")
        rows = []
        for size_px in (128, 224):
            common = {"image_size_px": size_px, "data_config": CONFIG, "num_workers": options.num_workers}
            arms = {
                cache or "none": ImageFolderData(str(root), cache=cache, cache_dir=scratch, **common)
                for cache in (None, "ram", "disk")
            }
            fill, mebibytes = {"none": 0.0}, {"none": 0.0}
            for name, data in arms.items():
                data.setup("fit")
                start = time.perf_counter()
                decoded = data.dataset("train").cache
                if isinstance(decoded, DecodedImages):
                    fill[name], mebibytes[name] = time.perf_counter() - start, decoded.num_bytes / 2**20
            times: dict[str, list[float]] = {name: [] for name in arms}
            for epoch in range(options.epochs):
                for name, data in arms.items():
                    times[name].append(seconds_of(data, epoch))
            plain = statistics.median(times["none"])
            for name in arms:
                epoch_seconds = statistics.median(times[name])
                images = len(arms[name].paths("train")) / epoch_seconds
                rows.append(
                    f"| {size_px} | {name} | {fill[name]:.1f} | {mebibytes[name]:.0f} | {epoch_seconds:.2f} | "
                    f"{images:,.0f} | {plain / epoch_seconds:.1f}x |"
                )
        shown = options.data.name if options.data else "200 drawn JPEGs of 1024 x 768 px"
        lines = [
            f"{shown}, training photos with the augmentation `side_on`, batch 32, {options.num_workers} workers, "
            f"{os.cpu_count()} cores; median of {options.epochs} epochs of reading, no network. "
            "`python benchmarks/photo_cache.py`",
            "",
            "| image size, px | cache | decoding once, s | MiB | an epoch, s | photos/s | against none |",
            "|---|---|---|---|---|---|---|",
            *rows,
        ]
        print("\n".join(lines))
        if options.out:
            options.out.write_text("\n".join(["# Photos decoded once", "", *lines, ""]))


if __name__ == "__main__":
    main()
