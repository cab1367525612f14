"""Which rule reads a range test best? Each rule's rate against a grid of fixed rates, on real photos and real weights.

Per seed: train a new head on frozen features, run the range test of the full stage with `lr_mult=1/3`, then train the
full network for a short fixed budget (one cosine cycle) at every rate of the grid, always from the same weights. The
measure is validation accuracy and loss after the budget; for a suggestion it is interpolated (linearly, over the
logarithm of the rate) between the two grid rates around it.

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
from lightning_unfreeze.stages import schedules as schedules
from lightning_unfreeze.stages.plan import Stage

LR_MULT = 1 / 3


class Photos(pl.LightningModule):
    """MobileNetV2 on images that are already in memory as bytes; flips are the only augmentation."""

    def __init__(self, model: nn.Module, optimizer: str, batch_norm: str) -> None:
        super().__init__()
        self.model, self.optimizer, self.batch_norm = model, optimizer, batch_norm

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        if self.batch_norm == "eval":
            for module in self.model.modules():
                module.training &= not isinstance(module, nn.BatchNorm2d)
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
    head.reset_parameters()  # timm's own start for few classes is so large that a short training only undoes it
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for _ in range(10):
        for index in torch.randperm(len(labels)).split(32):
            loss = nn.functional.cross_entropy(head(features[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.train()


def fit(
    model: nn.Module, stage: Stage, callbacks: list[pl.Callback], loaders: Any, options: argparse.Namespace, seed: int
) -> Any:
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
    trainer.fit(Photos(copy.deepcopy(model), options.optimizer, options.batch_norm), *loaders)
    return trainer.callback_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--px", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=480, help="training images per seed, drawn anew for each")
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument("--batch-norm", choices=["train", "eval"], default="train", help="mode in the full stage")
    parser.add_argument("--grid", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--out", type=Path, default=None, help="folder for the curves and the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    photos, val = tensors(options.data / "train", options.px), tensors(options.data / "val", options.px)
    num_classes = int(photos.tensors[1].max()) + 1
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        drawn = torch.randperm(len(photos), generator=torch.Generator().manual_seed(seed))[: options.images]
        train = TensorDataset(*photos[drawn])
        loaders = DataLoader(train, 16, shuffle=True, drop_last=True), DataLoader(val, 128)
        model = with_trained_head(options.weights, train, num_classes, seed)
        finder, measured = LRFinderPerStage(apply=False), {}
        for rate in options.grid:
            metrics = fit(
                model, Stage("full", lr=rate, lr_mult=LR_MULT, cycle_len=options.epochs), [], loaders, options, seed
            )
            measured[rate] = {name: float(metrics[f"val_{name}"]) for name in ("acc", "loss")}
            print(f"seed {seed}: lr {rate:.2e} {measured[rate]}", flush=True)
            rows.append({"seed": seed, "label": f"{rate:g}", "lr": rate, **measured[rate]})
        start = time.perf_counter()
        fit(model, Stage("full", lr="find", lr_mult=LR_MULT, epochs=1), [finder, _Once()], loaders, options, seed)
        result = finder.results["full"]
        print(
            f"seed {seed}: {len(result.lrs)} steps, {time.perf_counter() - start:.1f} s, {result.suggestions()}",
            flush=True,
        )
        rows += read_by_rules(result, measured, seed)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            name = f"{options.data.name}-{options.optimizer}-{options.batch_norm}"
            result.plot().savefig(options.out / f"{name}-{seed}.png", dpi=110)
            (options.out / f"{name}-{seed}.json").write_text(json.dumps({"lrs": result.lrs, "losses": result.losses}))
            (options.out / f"{name}.json").write_text(json.dumps(rows, indent=1))
    print(table(rows, options.grid))


class _Once(pl.Callback):
    """Ends the fit before its first step: the range test is over by then."""

    def on_train_batch_start(self, *_: Any) -> int:
        return -1


def read_by_rules(result: RangeTest, measured: dict[float, dict[str, float]], seed: int) -> list[dict[str, Any]]:
    """What each rule reads off the curve, also where `suggest_lr` answers "no signal" (then `signal` is False)."""
    read = slice(len(result.lrs) // 10, max(0, len(result.lrs) - 5))
    rates, curve = np.array(result.lrs[read]), np.array(result.smoothed[read])
    rows = []
    for rule, suggested in result.suggestions().items():
        try:
            rate = schedules._RULES[rule](rates, curve)
        except IndexError:  # a rule that finds nothing on a curve that only rises
            continue
        at = {name: interpolated(rate, measured, name) for name in ("acc", "loss")}
        rows.append({"seed": seed, "label": rule, "lr": rate, "signal": suggested is not None, **at})
    return rows


def interpolated(rate: float, measured: dict[float, dict[str, float]], name: str) -> float:
    rates = sorted(measured)
    return float(np.interp(np.log(rate), np.log(rates), [measured[grid][name] for grid in rates]))


def table(rows: list[dict[str, Any]], grid: list[float]) -> str:
    """Markdown: mean over seeds and its standard error; regret against the rate that is best on average."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    of = {label: {row["seed"]: row for row in rows if row["label"] == label} for label in labels}
    best = max((f"{rate:g}" for rate in grid), key=lambda label: np.mean([row["acc"] for row in of[label].values()]))
    lines = [
        f"best rate of the grid by mean accuracy: {best}",
        "",
        "| rate | lr, median [min, max] | accuracy, median [min, max] | val loss | minus the best's, mean (se) |",
        "|---|---|---|---|---|",
    ]
    for label in labels:
        seeds = of[label]
        lrs, accs, losses = ([row[key] for row in seeds.values()] for key in ("lr", "acc", "loss"))
        gaps = [row["acc"] - of[best][seed]["acc"] for seed, row in seeds.items()]
        error = np.std(gaps, ddof=1) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
        shown = [f"{middle} [{low}, {high}]" for middle, low, high in (spread(lrs, ".2g"), spread(accs, ".3f"))]
        signals = f", signal in {sum(row['signal'] for row in seeds.values())}" if "signal" in seeds[min(seeds)] else ""
        gap = f"{np.mean(gaps):+.3f} ({error:.3f}), n={len(gaps)}{signals}"
        lines.append(f"| {label} | {shown[0]} | {shown[1]} | {np.mean(losses):.3f} | {gap} |")
    return "\n".join(lines)


def spread(values: list[float], digits: str) -> tuple[str, str, str]:
    return format(np.median(values), digits), format(min(values), digits), format(max(values), digits)


if __name__ == "__main__":
    main()
