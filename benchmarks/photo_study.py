"""The study on photos: data sets x backbones x BatchNorm policies x training sizes, then all of them together.

    python benchmarks/photo_study.py --data /path/to/sets --weights /path/to/weights --out runs/photos

`--data` holds one folder per set, in the form of `ImageFolderData`. Everything is a plain `study run` of
`configs/study_photos.yaml` in a folder of its own: killed and started again, it goes on; several machines may share
`--out`, or take a part each (`--shard 1/2`). At the end stands `study merge`, in `OUT/merged`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from jsonargparse import auto_cli

CONFIG = Path(__file__).parents[1] / "configs" / "study_photos.yaml"
SETS = ("rsscn7", "flowers5", "dtd10", "monkeys10")
WEIGHTS = {
    "mobilenetv2_035": "mobilenetv2_035.keras_in1k.safetensors",
    "tf_efficientnet_lite0": "tf_efficientnet_lite0.in1k.fp16.safetensors",
}
KERAS = {
    "model.model_kwargs": "{pad_type: same, bn_eps: 0.001}",
    "model.data_config": "{mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}",
}
"""What Keras' weights of `mobilenetv2_035` want of timm's network."""
AUGMENTATION = {"rsscn7": "top_down", "dtd10": "top_down"}
"""Photos from the air and textures have no upper side; the others are taken from the side."""


@dataclass(frozen=True)
class Cell:
    """One study of the grid; `per_class` training images of each class, None for all."""

    dataset: str
    backbone: str
    batch_norm: str
    per_class: int | None

    @property
    def condition(self) -> str:
        """What `study merge` tells apart."""
        size = "all photos" if self.per_class is None else f"{self.per_class} a class"
        return f"{size}, BatchNorm {'trains' if self.batch_norm == 'train' else 'frozen'}"

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join((self.dataset, self.backbone, self.batch_norm, str(self.per_class or "all")))


def classes_of(folder: Path) -> int:
    """Return the number of classes of an image folder."""
    return len([path for path in (folder / "train").iterdir() if path.is_dir()])


def photo_study(
    data: Path,
    weights: Path | None = None,
    out: Path = Path("runs/photos"),
    sets: Sequence[str] = SETS,
    backbones: Sequence[str] = tuple(WEIGHTS),
    batch_norm: Sequence[str] = ("train", "frozen"),
    per_class: Sequence[int | None] = (20, None),
    arguments: Sequence[str] = (),
    command: str = "run",
    shard: str | None = None,
) -> None:
    """Run every study of the grid that is not finished, and merge them.

    Args:
        data: Folder of the sets.
        weights: Folder of the weights' files; None lets timm get its own.
        out: Where to write; a folder per study, and `merged`.
        sets: Names of the sets, folders in `data`.
        backbones: timm's names.
        batch_norm: Policies.
        per_class: Training images of a class; null takes all.
        arguments: Further arguments of `lightning-unfreeze study run`, such as `--n_jobs=2`.
        command: `run`, or `plan` to see what it takes.
        shard: `1/2` makes the first half of the runs of each study, and merges nothing.
    """
    cells = [Cell(*values) for values in product(sets, backbones, batch_norm, per_class)]
    # the small ones first: there is a first answer early, whatever happens to the rest
    cells.sort(key=lambda cell: (cell.per_class is None, list(backbones).index(cell.backbone)))
    start = time.monotonic()
    for number, cell in enumerate(cells, start=1):
        print(f"[{time.monotonic() - start:.0f} s] {number}/{len(cells)}: {cell.name}", flush=True)
        classes = classes_of(data / cell.dataset)
        size = "null" if cell.per_class is None else str(cell.per_class * classes)
        pretrained = "true" if weights is None else str(weights / WEIGHTS[cell.backbone])
        options = {
            "dataset": cell.dataset,
            "condition": cell.condition,
            "batch_norm": cell.batch_norm,
            "train_size": size,
            "out": str(out / cell.name),
            "data.root": str(data / cell.dataset),
            "data.augmentation": AUGMENTATION.get(cell.dataset, "side_on"),
            "model.backbone": cell.backbone,
            "model.num_classes": str(classes),
            "model.pretrained": pretrained,
        }
        if weights is not None and cell.backbone == "mobilenetv2_035":
            options |= KERAS
        if shard is not None:
            options["shard"] = shard
        given = [f"--{name}={value}" for name, value in options.items()]
        study(command, "--config", str(CONFIG), *given, *arguments)
    if command == "run" and shard is None:
        study("merge", *(str(out / cell.name) for cell in cells), "--out", str(out / "merged"))


def study(*arguments: str) -> None:
    """Run a command of the study, which exits with its verdict.

    Raises:
        RuntimeError: If it failed; the same call goes on.
    """
    done = subprocess.run([sys.executable, "-m", "lightning_unfreeze", "study", *arguments])
    if done.returncode not in (0, 3, 4, 5):
        raise RuntimeError(f"study {arguments[0]} ended with {done.returncode}; started again, this goes on.")


if __name__ == "__main__":
    auto_cli(photo_study, as_positional=False)
