"""Gradual unfreezing with stored features in each stage, against the same plan without: seconds and weights.

python benchmarks/gradual.py [--model resnet18] [--images 96] [--size-px 64] [--epochs 6]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import TensorDataset

from lightning_unfreeze import GradualUnfreeze, PrecomputeFeatures, Stage
from lightning_unfreeze.data.loaders import EpochSampler, ResumableLoader


class Whole(pl.LightningModule):
    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = timm.create_model(model, num_classes=2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class StageSeconds(Callback):
    """Seconds of each epoch, what comes before its first batch included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.last = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def run(options: argparse.Namespace, store: Path | None) -> tuple[float, list[float], Whole]:
    torch.manual_seed(0)
    module = Whole(options.model)
    generator = torch.Generator().manual_seed(0)
    shape = (options.images, 3, options.size_px, options.size_px)
    data = TensorDataset(torch.randn(shape, generator=generator), torch.randint(2, (options.images,)))
    plan = [
        Stage(f"top {train}", train=train, epochs=options.epochs, precompute=store is not None) for train in (1, 2, 3)
    ]
    watch = StageSeconds()
    precompute = PrecomputeFeatures(store, policy="always")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", devices=1, callbacks=[GradualUnfreeze(plan), precompute, watch], **quiet)
    start = time.perf_counter()
    trainer.fit(module, ResumableLoader(data, batch_size=32, sampler=EpochSampler(data, seed=0)))
    return time.perf_counter() - start, watch.seconds, module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--size-px", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    plain, stored = [], []
    for _ in range(options.rounds):
        plain.append(run(options, None))
        with tempfile.TemporaryDirectory() as folder:
            stored.append(run(options, Path(folder)))
    equal = all(
        torch.equal(one, other)
        for one, other in zip(plain[0][2].state_dict().values(), stored[0][2].state_dict().values(), strict=True)
    )
    print(f"{options.model}, {options.images} images of {options.size_px} px, 3 stages of {options.epochs} epochs")
    print("| stage | median epoch without | with stored features | ratio |\n|---|---|---|---|")
    for index, train in enumerate((1, 2, 3)):
        # the first epoch of a stage, in which the store is filled, is in the whole below
        part = slice(index * options.epochs + 1, (index + 1) * options.epochs)
        without, with_store = (statistics.median(s for r in rows for s in r[1][part]) for rows in (plain, stored))
        print(f"| top {train} | {without:.3g} s | {with_store:.3g} s | {without / with_store:.1f}x |")
    without, with_store = (statistics.median(row[0] for row in rows) for rows in (plain, stored))
    print(f"| whole fit, filling included | {without:.3g} s | {with_store:.3g} s | {without / with_store:.1f}x |")
    print(f"Weights bitwise equal: {equal}")


if __name__ == "__main__":
    main()
