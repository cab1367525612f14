"""Does a range test always answer, and how good is the rate that it gives? On real photos and real weights.

A cell is a data set, a backbone, a batch size, a stage ("head" on stored features, "full" with the head solved before
it, the statistics of BatchNorm those of the pretraining) and a seed. In each cell the range test of `LRFinderPerStage`
runs as in a fit, and the stage is trained from the same weights for a short budget (one cosine) at every rate of a
grid. A suggestion is scored by the accuracy at its rate, interpolated over the logarithm of the rate between the grid
rates around it, and compared with the grid's best.

    python benchmarks/finder.py DATA --out runs/finder        # measures the cells that the folder lacks, then reports
    python benchmarks/finder.py DATA --out runs/finder --report   # only reads the curves again, with today's rules

Curves and accuracies are kept one JSON file a cell, so that it goes on where it was, on any machine; rules are chosen
on monkeys10 and rsscn7, and confirmed on flowers5.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage, RangeTest
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.features.solve import HeadRows, solve_head
from lightning_unfreeze.layers.groups import layer_groups
from lightning_unfreeze.layers.param_groups import rate_ratios
from lightning_unfreeze.stages import range_test_rules
from lightning_unfreeze.stages.plan import Stage
from lightning_unfreeze.stages.range_test_rules import debiased_ema

SPAN = 1 / 9
CHOSEN_ON, CONFIRMED_ON = ("monkeys10", "rsscn7"), ("flowers5",)
WEIGHTS = {
    "mobilenetv2_035": ("mobilenetv2_035.keras_in1k.safetensors", {"pad_type": "same", "bn_eps": 1e-3}),
    "tf_efficientnet_lite0": ("tf_efficientnet_lite0.in1k.fp16.safetensors", {}),
}
GRID = {"head": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "full": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)}


class Network(pl.LightningModule):
    """A network on images in memory as bytes, or a head on features; flips are the only augmentation."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        if inputs.dtype == torch.uint8:
            flip = torch.rand(len(inputs), device=inputs.device) < 0.5
            inputs = scaled(torch.where(flip[:, None, None, None], inputs.flip(-1), inputs))
        return F.cross_entropy(self.network(inputs), labels)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=1e-2)


class NotTrained(pl.Callback):
    """Ends the fit after the range test."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        raise KeyboardInterrupt


def scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1  # mean and std 0.5, as these weights want it


def photos(folder: Path, px: int) -> tuple[Tensor, Tensor]:
    """A whole split as bytes, decoded once and kept in the temporary folder."""
    cache = Path(tempfile.gettempdir()) / f"finder-{folder.parent.name}-{folder.name}-{px}.pt"
    if not cache.is_file():
        transform = v2.Compose([v2.PILToTensor(), v2.Resize(px, antialias=True), v2.CenterCrop(px)])
        data = ImageFolder(str(folder), transform)
        torch.save((torch.stack([image for image, _ in data]), torch.tensor(data.targets)), cache)
    images, labels = torch.load(cache)
    return images, labels


def split(options: argparse.Namespace, name: str, seed: int) -> tuple[TensorDataset, TensorDataset]:
    """So many training images per class, drawn by the seed; the rest and the validation split are for scoring."""
    images, labels = photos(options.data / name / "train", options.px)
    val_images, val_labels = photos(options.data / name / "val", options.px)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    num_classes = int(labels.max()) + 1
    per_class = options.images // num_classes
    chosen = torch.cat([order[labels[order] == label][:per_class] for label in range(num_classes)])
    rest = order[~torch.isin(order, chosen)]
    scoring = torch.cat([val_images, images[rest]]), torch.cat([val_labels, labels[rest]])
    return TensorDataset(images[chosen], labels[chosen]), TensorDataset(*(part[: options.scored] for part in scoring))


def pretrained(options: argparse.Namespace, backbone: str, num_classes: int) -> Any:
    file, arguments = WEIGHTS[backbone]
    overlay = {"file": str(options.data / "weights" / file), "num_classes": -1}
    return timm.create_model(
        backbone, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes, **arguments
    )


@torch.no_grad()
def in_parts(function: Any, inputs: Tensor, device: torch.device) -> Tensor:
    return torch.cat([function(part.to(device)).cpu() for part in inputs.split(128)])


def features_of(network: Any, data: TensorDataset, device: torch.device) -> TensorDataset:
    network.eval().to(device)

    def run(images: Tensor) -> Tensor:
        return network.forward_head(network.forward_features(scaled(images)), pre_logits=True)

    return TensorDataset(in_parts(run, data.tensors[0], device), data.tensors[1])


def accuracy(network: nn.Module, data: TensorDataset, device: torch.device) -> float:
    network.eval()
    inputs, labels = data.tensors
    logits = in_parts(lambda part: network(scaled(part) if part.dtype == torch.uint8 else part), inputs, device)
    return float((logits.argmax(1) == labels).float().mean())


def trained(network: nn.Module, train: TensorDataset, rate: float, batch: int, epochs: int, seed: int) -> nn.Module:
    """A copy of the network after one cosine, with the ratios between layer groups and the statistics of the stage."""
    module = Network(copy.deepcopy(network)).train()
    for part in module.modules():
        part.training &= not isinstance(part, nn.BatchNorm2d)
    device = next(module.parameters()).device
    torch.manual_seed(seed)
    groups = layer_groups(module) if isinstance(module.network, nn.Linear) is False else {}
    ratios = rate_ratios(list(groups), SPAN ** (1 / max(1, len(groups) - 1))) if groups else {}
    params: Any = [{"params": list(group.parameters()), "lr": rate * ratios[name]} for name, group in groups.items()]
    optimizer = torch.optim.AdamW(params or module.parameters(), lr=rate, weight_decay=1e-2)
    loader = DataLoader(train, batch, shuffle=True, drop_last=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for _ in range(epochs):
        for inputs, labels in loader:
            loss = module.loss(inputs.to(device), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return module.network


def range_test(network: nn.Module, train: TensorDataset, batch: int, seed: int, device: torch.device) -> RangeTest:
    """The range test as in a fit, of a stage that trains everything that is passed."""
    finder, module = LRFinderPerStage(apply=False), Network(copy.deepcopy(network))
    if isinstance(network, nn.Linear):
        module.network = nn.Sequential(nn.Identity(), module.network)
        plan = []
    else:
        plan = [GradualUnfreeze([Stage("full", lr="find", lr_span=SPAN, epochs=1)], train_bn=False)]
    torch.manual_seed(seed)
    trainer = pl.Trainer(
        accelerator=device.type,
        devices=1,
        max_epochs=-1 if plan else 1,
        callbacks=[*plan, finder, NotTrained()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        trainer.fit(module, DataLoader(train, batch, shuffle=True, drop_last=True))
    (result,) = finder.results.values()
    return result


def measure(options: argparse.Namespace, name: str, backbone: str, batch: int, seed: int) -> dict[str, Any]:
    device = torch.device(options.device)
    train, scored = split(options, name, seed)
    num_classes = int(train.tensors[1].max()) + 1
    torch.manual_seed(seed)
    network = pretrained(options, backbone, num_classes)
    head = network.get_classifier()
    head.reset_parameters()
    cell: dict[str, Any] = {"set": name, "backbone": backbone, "batch": batch, "seed": seed, "px": options.px}
    cell |= {"images": len(train), "scored": len(scored), "epochs": options.epochs, "device": str(device)}
    stored, stored_scored = (features_of(network, data, device) for data in (train, scored))
    stages = {"head": (head, stored, stored_scored, 10), "full": (network, train, scored, options.epochs)}
    for stage, (start, data, judged, epochs) in stages.items():
        if stage == "full":
            solved = solve_head(HeadRows(*stored.tensors), num_classes=num_classes)
            with torch.no_grad():
                head.weight.copy_(solved.weight)
                head.bias.copy_(solved.bias)
        curve = range_test(start, data, batch, seed, device)
        grid = {
            f"{rate:g}": accuracy(trained(start, data, rate, batch, epochs, seed), judged, device)
            for rate in GRID[stage]
        }
        cell[stage] = {
            "before": accuracy(start, judged, device),
            "grid": grid,
            "lrs": curve.lrs,
            "losses": curve.losses,
        }
    return cell


def curve_of(cell: dict[str, Any], stage: str) -> RangeTest:
    """The curve, read as `LRFinderPerStage` reads that of a stage: the full one goes on from a trained head."""
    steps = cell.get("epochs", 2) * (cell["images"] // cell["batch"])
    rule = ("below_rise", steps) if stage == "full" else ("valley", None)
    return RangeTest(cell[stage]["lrs"], cell[stage]["losses"], *rule)


def read(cell: dict[str, Any], stage: str) -> dict[str, Any]:
    """What the rules of today read off a stored curve, and what that rate is worth."""
    told = cell[stage]
    curve = curve_of(cell, stage)
    grid = {float(rate): value for rate, value in told["grid"].items()}
    rates = sorted(grid)
    best = max(grid, key=lambda rate: grid[rate])
    answer = curve.answer()
    row = {key: cell[key] for key in ("set", "backbone", "batch", "seed")} | {"stage": stage, "end": answer.end}
    row["answered_before"] = answered_in_0_1_0(curve)
    row |= {"lr": answer.rate, "best_lr": best, "best": grid[best], "before": told["before"]}
    if answer.rate is not None:
        row["acc"] = float(np.interp(np.log(answer.rate), np.log(rates), [grid[rate] for rate in rates]))
    return row


def answered_in_0_1_0(curve: RangeTest) -> bool:
    """Whether the test for a signal that version 0.1.0 made lets the curve through."""
    read = slice(len(curve.lrs) // 10, max(0, len(curve.lrs) - 5))
    return bool(range_test_rules._has_signal(debiased_ema(curve.losses, 0.98)[read]))


def picture(cells: list[dict[str, Any]], file: Path, num: int = 6) -> None:
    """Curves of the full stage that 0.1.0 gave no rate for, with the rate that they give now."""
    found = []
    for cell in cells:
        curve = curve_of(cell, "full")
        if not answered_in_0_1_0(curve):
            found.append((f"{cell['set']}, batch {cell['batch']}", curve))
    chosen = found[:: max(1, len(found) // num)][:num]
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    for axis, (title, curve) in zip(figure.subplots(2, 3, sharex=True).flat, chosen, strict=False):
        answer = curve.answer()
        axis.plot(curve.lrs, curve.losses, ".", color="0.75", markersize=3)
        axis.plot(curve.lrs, curve.smoothed, color="black", linewidth=1.2)
        axis.axvline(answer.rate, color="C0", linewidth=2)
        if answer.rise:
            axis.axvline(answer.rise, color="0.5", linestyle="--", linewidth=1)
        axis.set(xscale="log", ylim=(0, 5 * float(np.median(curve.losses[:30]))))
        axis.set_title(f"{title}: {answer.rate:.1e}, {answer.end}", fontsize=8)
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel("training loss", fontsize=9)
    figure.savefig(file, dpi=80)


def report(cells: list[dict[str, Any]]) -> str:
    rows = [read(cell, stage) for cell in cells for stage in ("head", "full")]
    lines = [
        "| set | backbone | batch | stage | before | grid's best | suggested | read off | accuracy | short | 0.1.0 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["stage"], row["set"], row["backbone"], row["batch"], row["seed"])):
        answered = f"{row['lr']:.1e} | {row['end']} | {row['acc']:.3f} | {100 * (row['best'] - row['acc']):.1f}"
        lines.append(
            f"| {row['set']} | {row['backbone']} | {row['batch']} | {row['stage']} | {row['before']:.3f} | "
            f"{row['best']:.3f} at {row['best_lr']:g} | {answered if row['lr'] else '- | none | - | -'} | "
            f"{'a rate' if row['answered_before'] else 'none'} |"
        )
    lines.append("")
    for names, stage in itertools.product((CHOSEN_ON, CONFIRMED_ON), ("head", "full")):
        of = [row for row in rows if row["set"] in names and row["stage"] == stage]
        short = [row["best"] - row["acc"] for row in of if row["lr"]]
        if short:
            lines.append(
                f"* {', '.join(names)}, {stage}: {len(short)} of {len(of)} answered; within 1 point of the best in "
                f"{np.mean(np.array(short) <= 0.01):.0%}, within 2 in {np.mean(np.array(short) <= 0.02):.0%}; "
                f"mean {100 * np.mean(short):.1f}, worst {100 * max(short):.1f} points short"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--sets", nargs="+", default=[*CHOSEN_ON, *CONFIRMED_ON])
    parser.add_argument("--backbones", nargs="+", default=["mobilenetv2_035"], choices=list(WEIGHTS))
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--px", type=int, default=64)
    parser.add_argument("--images", type=int, default=200, help="training images, the same number per class")
    parser.add_argument("--scored", type=int, default=400, help="at most so many other images give the accuracy")
    parser.add_argument("--epochs", type=int, default=2, help="of the full stage")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--picture", type=Path, help="a PNG of curves that version 0.1.0 gave no rate for")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    options.out.mkdir(parents=True, exist_ok=True)
    every = itertools.product(options.sets, options.backbones, options.seeds, options.batches)
    for name, backbone, seed, batch in every if not options.report else ():
        file = options.out / f"{name}-{backbone}-{options.px}px-b{batch}-s{seed}.json"
        if not file.is_file():
            cell = measure(options, name, backbone, batch, seed)
            file.write_text(json.dumps(cell))
            print(file.stem, {stage: cell[stage]["grid"] for stage in ("head", "full")}, flush=True)
    cells = [json.loads(file.read_text()) for file in sorted(options.out.glob("*.json"))]
    print(report(cells))
    if options.picture:
        picture(cells, options.picture)


if __name__ == "__main__":
    main()
