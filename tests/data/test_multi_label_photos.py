"""Several labels per photo on real photos: from a table of collages to a solved head, against a sigmoid probe."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.multiclass import OneVsRestClassifier

from lightning_unfreeze import GradualUnfreeze, PrecomputeFeatures, Stage
from lightning_unfreeze.data.modules import ImageFolderData
from lightning_unfreeze.module import TransferClassifier

TILE_PX = 48
COLLAGES = {"train": 300, "val": 150}
AS_TRAINED = {"pad_type": "same", "bn_eps": 1e-3}  # Keras' padding and eps


def make_collages(flowers: Path, root: Path) -> None:
    """2 x 2 tiles of two or three photos of as many kinds; what is to be seen stands in `labels.csv`."""
    draw = random.Random(0)
    rows = ["file,label,split"]
    for split, number in COLLAGES.items():
        kinds = {folder.name: sorted(folder.glob("*.jpg")) for folder in sorted((flowers / split).iterdir())}
        for index in range(number):
            shown = draw.sample(sorted(kinds), draw.choice((2, 3)))
            photos = [draw.choice(kinds[kind]) for kind in shown]
            tiles = [*photos, *draw.choices(photos, k=4 - len(photos))]
            draw.shuffle(tiles)
            collage = Image.new("RGB", (2 * TILE_PX, 2 * TILE_PX))
            for place, tile in enumerate(tiles):
                with Image.open(tile) as photo:
                    photo.draft("RGB", (TILE_PX, TILE_PX))
                    small = photo.convert("RGB").resize((TILE_PX, TILE_PX))
                collage.paste(small, (TILE_PX * (place % 2), TILE_PX * (place // 2)))
            name = f"{split}_{index:03d}.png"
            collage.save(root / name)
            rows.append(f"{name},{';'.join(shown)},{split}")
    (root / "labels.csv").write_text("\n".join(rows))


def by_hand(root: Path, split: str, network: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features and zeros and ones, without anything of this package."""
    rows = [line.split(",") for line in (root / "labels.csv").read_text().splitlines()[1:]]
    rows = [row for row in rows if row[2] == split]
    pixels = np.stack([np.asarray(Image.open(root / name)) for name, _, _ in rows])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        features = torch.cat([network(part) for part in images.split(50)])
    names = sorted({label for _, labels, _ in rows for label in labels.split(";")})
    return features.numpy(), np.array([[name in labels.split(";") for name in names] for _, labels, _ in rows], int)


def test_collages__solved_labels_are_no_worse_than_a_sigmoid_probe(shared_data: Path, tmp_path: Path) -> None:
    weights = str(shared_data / "weights" / "mobilenetv2_035.keras_in1k.safetensors")
    photos = tmp_path / "collages"
    photos.mkdir()
    make_collages(shared_data / "flowers5", photos)

    data = ImageFolderData(
        str(photos), image_size_px=2 * TILE_PX, data_config={"crop_pct": 1.0}, augmentation="none", batch_size=50
    )
    module = TransferClassifier(
        "mobilenetv2_035",
        num_labels=5,
        pretrained=weights,
        model_kwargs=AS_TRAINED,
        data_config={"mean": [0.5] * 3, "std": [0.5] * 3},
    )
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_epochs=-1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[
            GradualUnfreeze([Stage("head", train="head", precompute=True, solve=True)]),
            PrecomputeFeatures(),
        ],
        **options,
    )
    trainer.fit(module, datamodule=data)
    assert module.class_names == ["daisy", "dandelion", "rose", "sunflower", "tulip"]
    ours = float(trainer.callback_metrics["val_map"])

    network = timm.create_model("mobilenetv2_035", num_classes=0, **AS_TRAINED).eval()
    network.load_state_dict(load_file(weights))
    features, targets = by_hand(photos, "train", network)
    val_features, val_targets = by_hand(photos, "val", network)
    scale = features.std(0).mean()  # of all features as one: the penalty of `solve_head` is relative to it, too
    probes = {
        C: OneVsRestClassifier(LogisticRegression(C=C, max_iter=2000)).fit(features / scale, targets)
        for C in (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 1.0)
    }
    scores = {
        C: average_precision_score(val_targets, probe.decision_function(val_features / scale), average="macro")
        for C, probe in probes.items()
    }
    chance = val_targets.mean()  # of an order at random, the share of photos with the label
    print(f"val_map {ours:.4f}; scikit-learn's probe {scores}; chance {chance:.3f}")
    assert ours > max(scores.values()) - 0.02
    assert ours > chance + 0.15
    logits = torch.cat([module.eval()(images) for images, _ in data.val_dataloader()]).detach()
    assert ours == pytest.approx(average_precision_score(val_targets, logits, average="macro"), abs=1e-6)
