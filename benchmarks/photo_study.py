"""The study on photos: data sets x backbones x BatchNorm policies x training sizes, then all of them together.

    python benchmarks/photo_study.py --data /path/to/sets --weights /path/to/weights --out runs/photos

`--data` holds one folder per set, in the form of `ImageFolderData`. Every study has a folder of its own: killed and
started again, this goes on; several machines may share `--out`, or take a part each (`--shard 1/2`). Arms come one
after the other, each over all sets before the next one, and after each the finished studies are merged in
`OUT/merged`; all sets come to a first look at half of the seeds, which is planned, before one goes on. So it leaves
whole answers when it is stopped.

With the defaults that is 288 runs and 72 of tuning; they took 20 to 27 s of a busy core each. The whole grid is
`--backbones '[mobilenetv2_035, tf_efficientnet_lite0]' --per_class '[20, null]' --arms '[core, layer_decay@flops]'
--shifts true --tuning_seeds 3`.
"""

from __future__ import annotations

import functools
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli

from lightning_unfreeze import ImageFolderData, TransferClassifier
from lightning_unfreeze.reporting import show
from lightning_unfreeze.study import Study, load_study, merge_studies
from lightning_unfreeze.study.design.arms import BatchNormPolicy
from lightning_unfreeze.study.show.report import facts_of
from lightning_unfreeze.study.show.tables import arm_table

WEIGHTS = {
    "mobilenetv2_035": "mobilenetv2_035.keras_in1k.safetensors",
    "tf_efficientnet_lite0": "tf_efficientnet_lite0.in1k.fp16.safetensors",
}
KERAS = {
    "model_kwargs": {"pad_type": "same", "bn_eps": 0.001},
    "data_config": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}
"""What Keras' weights of `mobilenetv2_035` want of timm's network."""
TOP_DOWN = ("rsscn7", "dtd10")
"""Photos from the air and textures have no upper side; the others are taken from the side."""


@dataclass(frozen=True)
class Cell:
    """One study of the grid; `per_class` training images of each class, None for all."""

    dataset: str
    backbone: str
    batch_norm: BatchNormPolicy
    per_class: int | None

    @property
    def condition(self) -> str:
        """What the merged report tells apart."""
        size = "all photos" if self.per_class is None else f"{self.per_class} a class"
        return f"{size}, BatchNorm {'trains' if self.batch_norm == 'train' else 'frozen'}"

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join((self.dataset, self.backbone, self.batch_norm, str(self.per_class or "all")))


def classifier(backbone: str, num_classes: int, weights: Path | None, pretrained: bool = True) -> TransferClassifier:
    """Return the network, its weights laid out by channels: 1.5 times the speed on a CPU, the same results."""
    file = str(weights / WEIGHTS[backbone]) if weights is not None and pretrained else pretrained
    options = KERAS if weights is not None and backbone == "mobilenetv2_035" else {}
    module = TransferClassifier(backbone, num_classes, pretrained=file, **options)
    return module.to(memory_format=torch.channels_last)


def photos(root: Path, image_size_px: int, pictures: Path) -> ImageFolderData:
    """Return the photos of a set, each decoded once."""
    return ImageFolderData(
        str(root),
        image_size_px=image_size_px,
        batch_size=32,
        augmentation="top_down" if root.name in TOP_DOWN else "side_on",
        cache="disk",
        cache_dir=str(pictures),
    )


def photo_study(
    data: Path,
    weights: Path | None = None,
    out: Path = Path("runs/photos"),
    sets: Sequence[str] = ("rsscn7", "dtd10", "flowers5", "monkeys10"),
    backbones: Sequence[str] = ("mobilenetv2_035",),
    batch_norm: Sequence[BatchNormPolicy] = ("frozen", "train"),
    per_class: Sequence[int | None] = (20,),
    arms: Sequence[str] = ("skip34@flops", "layer_decay@flops"),
    looks: Sequence[int] = (6, 12),
    tuning_seeds: int = 1,
    lr_grid: Sequence[float] = (0.0001, 0.0003, 0.001),
    head_lr_grid: Sequence[float] = (0.001, 0.003, 0.01),
    image_size_px: int = 96,
    val_fraction: float = 0.1,
    shifts: bool = False,
    n_jobs: int = 1,
    command: Literal["run", "plan"] = "run",
    shard: str | None = None,
    page: Path = Path("benchmarks/results/photo_study.md"),
    picture: Path = Path("docs/img/photo_study.png"),
) -> None:
    """Run every study of the grid that is not finished, and merge them.

    Args:
        data: Folder of the sets.
        weights: Folder of the weights' files; None lets timm get its own.
        out: Where to write; a folder per study, and `merged`.
        sets: Names of the sets, folders in `data`.
        backbones: timm's names.
        batch_norm: Policies, one after the other.
        per_class: Training images of a class; null takes all.
        arms: What is compared with `full9`, one after the other.
        looks: Paired seeds at which the verdict is read; the last number is that of all. Every set comes to the first
            look before one goes on to the next.
        tuning_seeds: Seeds of the tuning.
        lr_grid: Rates of AdamW that are tried.
        head_lr_grid: Rates of the head's stages in the same trials.
        image_size_px: Side of the images.
        val_fraction: Share of the photos that validates, of those that are no test photos.
        shifts: Score the test photos also under noise, low contrast, blur and brightness.
        n_jobs: Runs at a time.
        command: `plan` says what it takes and runs nothing.
        shard: `1/2` makes the first half of the runs of each study, and merges nothing.
        page: Where the merged report goes.
        picture: Where its picture goes.
    """
    start = time.monotonic()
    # the small and quick ones first: there is a first answer early, whatever happens to the rest
    for size, backbone, policy in product(sorted(per_class, key=lambda size: size is None), backbones, batch_norm):
        for count, look in product(range(1, len(arms) + 1), looks):
            for dataset in sets:
                cell = Cell(dataset, backbone, policy, size)
                show(f"[{time.monotonic() - start:.0f} s] {cell.name}: {', '.join(arms[:count])} with {look} seeds")
                num_classes = sum(path.is_dir() for path in (data / dataset / "train").iterdir())
                study = Study(
                    functools.partial(classifier, backbone, num_classes, weights),
                    functools.partial(photos, data / dataset, image_size_px, out / "pictures"),
                    arms=arms[:count],
                    seeds=looks[-1],
                    looks=looks if len(looks) > 1 else None,
                    out=out / cell.name,
                    lr_grid=lr_grid,
                    head_lr_grid=head_lr_grid,
                    tuning_seeds=tuning_seeds,
                    train_size=None if size is None else size * num_classes,
                    val_fraction=val_fraction,
                    batch_norm=policy,
                    shifts=shifts,
                    dataset=dataset,
                    pretrained_on="ImageNet",
                    condition=cell.condition,
                    n_jobs=n_jobs,
                    shard=shard,
                )
                for sentence in study.plan().sentences():
                    show(sentence)
                if command == "run":
                    show(study.run(look if len(looks) > 1 else None).verdict().text)
                if command == "run" and shard is None:
                    finish(out, page, picture)


def finish(out: Path, page: Path, picture: Path) -> None:
    """Merge the studies that have a report, and write the page of results with its picture."""
    studies = [load_study(folder.parent) for folder in sorted(out.glob("*/report"))]
    if len({study.info.dataset for study in studies}) < 2:
        return
    merged = merge_studies([folder.parent for folder in sorted(out.glob("*/report"))], out / "merged")
    for path in (page, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(out / "merged" / "effects.png", picture)
    title, *rest = merged.text.replace("(effects.png)", f"({os.path.relpath(picture, page.parent)})").splitlines()
    lines = ["# The study on photos", "", f"By `benchmarks/photo_study.py`: {title.lstrip('# ')}.", *rest]
    for study in studies:
        arms, facts = arm_table(study.analysis), facts_of(study.analysis)
        lines += ["", f"## {study.info.dataset}, {study.info.architecture}, {study.info.condition}", ""]
        lines += [f"* {name}: {fact}" for name, fact in facts.items()]
        lines += ["", f"| {' | '.join(arms.columns)} |", f"|{'---|' * len(arms.columns)}"]
        lines += [f"| {' | '.join(row)} |" for row in arms.rows]
    page.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    auto_cli(photo_study, as_positional=False)
