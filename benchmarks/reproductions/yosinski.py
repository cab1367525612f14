"""R1: how transferable are features? (Yosinski et al. 2014), on half of CIFAR-10's classes, with this package's stages.

A network is trained on classes A and one on classes B. Its first n blocks start a network for B: kept as they are
(AnB, BnB) or trained on (AnB+, BnB+); RnB keeps n random blocks. Numbers are accuracy minus that of training on B.

    python benchmarks/reproductions/yosinski.py --data cifar10_16px.npz --seeds 1
    python benchmarks/reproductions/yosinski.py --data digits --epochs 2 3     # a smoke test, which proves nothing

The npz file holds `x_train` and `x_test` (N, H, W, 3) of uint8, `y_train` and `y_test`. About 5 minutes a seed on one
core for n = 1, 3, 5 and three splits.
"""

from __future__ import annotations

import argparse
import csv
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_unfreeze import CosineRestarts, GradualUnfreeze, Stage
from lightning_unfreeze.loaders import EpochSampler, ResumableLoader
from lightning_unfreeze.seeding import keyed_rng

CHANNELS = (16, 32, 64, 64, 64)
TREATMENTS = ("AnB", "AnB+", "BnB", "BnB+", "RnB")
PEAK_LR, WARMUP, BATCH_SIZE = 0.05, 0.25, 64


class TinyCNN(pl.LightningModule):
    """Five blocks of convolution, BatchNorm and ReLU, pooled after the first three; crops and flips in the step."""

    def __init__(self, num_classes: int, in_channels: int = 3, flip: bool = True) -> None:
        super().__init__()
        sizes = (in_channels, *CHANNELS)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(sizes[i], sizes[i + 1], 3, padding=1, bias=False),
                nn.BatchNorm2d(sizes[i + 1]),
                nn.ReLU(),
                nn.MaxPool2d(2) if i < 3 else nn.Identity(),
            )
            for i in range(5)
        )
        self.head = nn.Linear(CHANNELS[-1], num_classes)
        self.flip = flip
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def layer_groups(self) -> dict[str, nn.Module]:
        return {**{f"block{i + 1}": block for i, block in enumerate(self.blocks)}, "head": self.head}

    def forward(self, images: Tensor) -> Tensor:
        for block in self.blocks:
            images = block(images)
        return self.head(images.mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        height, width = images.shape[-2:]
        top, left = torch.randint(5, (2,)).tolist()
        images = nn.functional.pad(images, (2, 2, 2, 2))[..., top : top + height, left : left + width]
        if self.flip and torch.rand(()) < 0.5:
            images = images.flip(-1)
        return nn.functional.cross_entropy(self(images), labels)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("acc", (self(images).argmax(1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), PEAK_LR, momentum=0.9, weight_decay=1e-4)


def load(source: str) -> dict[str, np.ndarray]:
    """Return images (N, C, H, W), float, and labels of both sets."""
    if source != "digits":
        with np.load(source) as file:
            arrays = {name: file[name] for name in ("x_train", "y_train", "x_test", "y_test")}
        return {n: a.transpose(0, 3, 1, 2).astype(np.float32) if n[0] == "x" else a for n, a in arrays.items()}
    digits = load_digits()
    images, test = digits.images[:, None].astype(np.float32), np.arange(len(digits.target)) % 3 == 0
    return {
        **{"x_train": images[~test], "y_train": digits.target[~test]},
        **{"x_test": images[test], "y_test": digits.target[test]},
    }


def of_classes(data: dict[str, np.ndarray], part: str, classes: Sequence[int], per_class: int | None) -> TensorDataset:
    """Return the first images of some classes, labelled by their place, normalised by the training images."""
    labels = data[f"y_{part}"]
    chosen = np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in classes])
    mean, sd = (getattr(data["x_train"], f)((0, 2, 3), keepdims=True) for f in ("mean", "std"))
    place = {c: i for i, c in enumerate(classes)}
    images = torch.from_numpy((data[f"x_{part}"][chosen] - mean) / sd)
    return TensorDataset(images, torch.tensor([place[int(c)] for c in labels[chosen]]))


def train(module: TinyCNN, images: TensorDataset, epochs: int, frozen: int, seed: int, batch_size: int) -> None:
    """Train all but the first `frozen` blocks in one cosine cycle."""
    names = list(module.layer_groups())[frozen:]
    callbacks = [GradualUnfreeze([Stage("train", names, cycle_len=epochs)]), CosineRestarts(warmup=WARMUP)]
    trainer = quiet_trainer(callbacks)
    with keyed_rng("train", seed):
        sampler = EpochSampler(images, seed=seed)
        trainer.fit(module, ResumableLoader(images, batch_size=batch_size, sampler=sampler, drop_last=True))


def accuracy(module: TinyCNN, images: TensorDataset) -> float:
    (found,) = quiet_trainer([]).test(module, DataLoader(images, batch_size=1000), verbose=False)
    return 100 * found["acc"]


def quiet_trainer(callbacks: list[pl.Callback]) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def splits(dissimilar: bool) -> dict[str, tuple[list[int], list[int]]]:
    """Return classes A and B: two random halves, and vehicles against animals."""
    found = {}
    for split in range(2):
        order = np.random.RandomState(100 + split).permutation(10).tolist()
        found[f"random {split}"] = order[:5], order[5:]
    return found | ({"dissimilar": ([0, 1, 8, 9], [2, 3, 4, 5, 6, 7])} if dissimilar else {})


def transfer(
    data: dict[str, np.ndarray],
    classes: tuple[list[int], list[int]],
    seed: int,
    epochs: tuple[int, int],
    per_class: tuple[int | None, int | None],
    depths: Sequence[int],
) -> dict[str, float]:
    """Return accuracies of `baseB` and of each treatment and n, e.g. `AnB+ 3`."""
    a, b = classes
    flip, channels = data["x_train"].shape[1] == 3, data["x_train"].shape[1]

    def network(num_classes: int) -> TinyCNN:
        with keyed_rng("init", seed):
            return TinyCNN(num_classes, channels, flip)

    base_a, base_b = network(len(a)), network(len(b))
    source = of_classes(data, "train", a, per_class[0])
    target, test = of_classes(data, "train", b, per_class[1]), of_classes(data, "test", b, None)
    train(base_a, source, epochs[0], 0, seed, 2 * BATCH_SIZE)
    train(base_b, target, epochs[1], 0, seed, BATCH_SIZE)
    found = {"baseB": accuracy(base_b, test)}
    for n in depths:
        for treatment in TREATMENTS:
            module = network(len(b))
            donor = {"A": base_a, "B": base_b, "R": module}[treatment[0]]
            for i in range(n):
                module.blocks[i].load_state_dict(donor.blocks[i].state_dict())
            # the same order, crops and rest of the network in all treatments
            train(module, target, epochs[1], 0 if treatment.endswith("+") else n, seed, BATCH_SIZE)
            found[f"{treatment} {n}"] = accuracy(module, test)
    return found


def main(arguments: Sequence[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="npz file, or digits")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, nargs=2, default=(12, 20), help="of A, of B")
    parser.add_argument("--per_class", type=int, nargs=2, default=(5000, 500), help="training images of A, of B")
    parser.add_argument("--depths", type=int, nargs="+", default=(1, 3, 5))
    parser.add_argument("--out", type=Path, help="CSV file")
    given = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    data, rows = load(given.data), []
    for split, classes in splits(dissimilar=given.data != "digits").items():
        for seed in range(given.seeds):
            found = transfer(data, classes, seed, tuple(given.epochs), tuple(given.per_class), given.depths)
            base = found.pop("baseB")
            rows.append({"split": split, "seed": seed, "baseB": round(base, 2)})
            rows[-1] |= {name: round(value - base, 2) for name, value in found.items()}
            print(rows[-1], flush=True)
    if given.out:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return rows


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        main()
