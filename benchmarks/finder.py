"""Which rule reads a range test best? Each rule's rate against a grid of fixed rates, on real photos and real weights.

Per seed: train a new head on frozen features, run the range test of the full stage with `lr_mult=1/3`, then train the
full network for a short fixed budget (one cosine cycle) at every rate of the grid and at every suggestion, always from
the same weights. The measure is validation accuracy and loss after the budget.

    python benchmarks/finder.py DATA/monkeys10 --weights DATA/weights/mobilenetv2_035.keras_in1k.safetensors
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage, RangeTest
from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.stages import Stage

LR_MULT = 1 / 3


class Photos(pl.LightningModule):
    """MobileNetV2 on images that are already in memory as bytes; flips are the only augmentation."""

    def __init__(self, model: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.model, self.optimizer = model, optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        flip = torch.rand(len(images)) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        return nn.functional.cross_entropy(self.model(scaled(images)), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.model(scaled(images))
        self.log("val_loss", nn.functional.cross_entropy(logits, labels), batch_size=len(labels))
        self.log("val_acc", (logits.argmax(1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=1e-2)


def scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1  # mean and std 0.5, as the weights want it


def tensors(folder: Path, px: int) -> TensorDataset:
    """The whole split as bytes, decoded once and kept in the temporary folder."""
    cache = Path("/tmp") / f"finder-{folder.parent.name}-{folder.name}-{px}.pt"
    if not cache.is_file():
        transform = v2.Compose([v2.PILToTensor(), v2.Resize(px, antialias=True), v2.CenterCrop(px)])
        data = ImageFolder(str(folder), transform)
        torch.save((torch.stack([image for image, _ in data]), torch.tensor(data.targets)), cache)
    return TensorDataset(*torch.load(cache))


def with_trained_head(weights: Path, train: TensorDataset, num_classes: int, seed: int) -> nn.Module:
    """The pretrained network with a new head, trained on features of the frozen rest."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "mobilenetv2_035",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(weights), "num_classes": -1},
        num_classes=num_classes,
        pad_type="same",
        bn_eps=1e-3,
    )
    model.eval()
    images, labels = train.tensors
    with torch.no_grad():
        parts = [model.forward_head(model.forward_features(scaled(part)), pre_logits=True) for part in images.split(64)]
        features = torch.cat(parts)
    head = model.get_classifier()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for _ in range(10):
        for index in torch.randperm(len(labels)).split(32):
            loss = nn.functional.cross_entropy(head(features[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.train()


def fit(model: nn.Module, stage: Stage, callbacks: list[pl.Callback], loaders: Any, optimizer: str, seed: int) -> Any:
    torch.manual_seed(seed)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        callbacks=[GradualUnfreeze([stage]), CosineRestarts(), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=stage.num_epochs,
    )
    trainer.fit(Photos(copy.deepcopy(model), optimizer), *loaders)
    return trainer.callback_metrics


class _StopBeforeTraining(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> int:
        return -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--px", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=480, help="training images per seed, drawn anew for each")
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument("--grid", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--out", type=Path, default=None, help="folder for the curves and the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    photos, val = tensors(options.data / "train", options.px), tensors(options.data / "val", options.px)
    num_classes = int(photos.tensors[1].max()) + 1
    rows = []
    for seed in range(options.seeds):
        drawn = torch.randperm(len(photos), generator=torch.Generator().manual_seed(seed))[: options.images]
        train = TensorDataset(*photos[drawn])
        loaders = DataLoader(train, 16, shuffle=True, drop_last=True), DataLoader(val, 128)
        model = with_trained_head(options.weights, train, num_classes, seed)
        finder = LRFinderPerStage(apply=False)
        start = time.perf_counter()
        found = Stage("full", lr="find", lr_mult=LR_MULT, epochs=1)
        fit(model, found, [finder, _StopBeforeTraining()], loaders, options.optimizer, seed)
        result: RangeTest = finder.results["full"]
        seconds = time.perf_counter() - start
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            name = f"{options.data.name}-{options.optimizer}-{seed}"
            result.plot().savefig(options.out / f"{name}.png", dpi=110)
            (options.out / f"{name}.json").write_text(json.dumps({"lrs": result.lrs, "losses": result.losses}))
        suggested = {rule: rate for rule, rate in result.suggestions().items() if rate is not None}
        print(f"seed {seed}: range test of {len(result.lrs)} steps, {seconds:.1f} s, {suggested}", flush=True)
        for label, rate in [*((f"{rate:g}", rate) for rate in options.grid), *suggested.items()]:
            stage = Stage("full", lr=rate, lr_mult=LR_MULT, cycle_len=options.epochs)
            metrics = fit(model, stage, [], loaders, options.optimizer, seed)
            row = {"seed": seed, "label": label, "lr": rate}
            rows.append(row | {name: float(metrics[f"val_{name}"]) for name in ("acc", "loss")})
            print(f"  {label:>16} lr {rate:.2e} acc {rows[-1]['acc']:.3f} loss {rows[-1]['loss']:.3f}", flush=True)
    if options.out:
        (options.out / f"{options.data.name}-{options.optimizer}.json").write_text(json.dumps(rows, indent=1))
    print(table(rows, options.grid))


def table(rows: list[dict[str, Any]], grid: list[float]) -> str:
    """Markdown: mean over seeds and its standard error; regret against the rate that is best on average."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    of = {label: {row["seed"]: row for row in rows if row["label"] == label} for label in labels}
    best = max((f"{rate:g}" for rate in grid), key=lambda label: np.mean([row["acc"] for row in of[label].values()]))
    lines = [
        f"best rate of the grid by mean accuracy: {best}",
        "",
        "| rate | lr, median [min, max] | accuracy | val loss | accuracy minus the best's (se, paired by seed) |",
        "|---|---|---|---|---|",
    ]
    for label in labels:
        seeds = of[label]
        lrs, accs, losses = ([row[key] for row in seeds.values()] for key in ("lr", "acc", "loss"))
        gaps = [row["acc"] - of[best][seed]["acc"] for seed, row in seeds.items()]
        error = np.std(gaps, ddof=1) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
        lines.append(
            f"| {label} | {np.median(lrs):.2g} [{min(lrs):.2g}, {max(lrs):.2g}] | {np.mean(accs):.3f} "
            f"[{min(accs):.3f}, {max(accs):.3f}] | {np.mean(losses):.3f} | {np.mean(gaps):+.3f} ({error:.3f}), n={len(gaps)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
