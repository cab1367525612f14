"""The same fine-tuning by this package, by Lightning's and finetuning-scheduler's callbacks, and by bare PyTorch loops.

    pip install finetuning-scheduler
    python benchmarks/recipe_vs_peers.py --data DATA/monkeys10 --weights DATA/weights/mobilenetv2_035.*.safetensors
    python benchmarks/recipe_vs_peers.py                    # the embedded digits and backbone: a check that all runs

Five epochs of the head on a frozen backbone, then seven of everything; AdamW, one rate, a validation after each epoch.
Nobody augments, so that stored features hold the same information; images are decoded whenever they are read, by one
process, in the order of the same seed. The arms run in turn (A B C ... A B C ...), each in a forked process of its own,
so that peaks of memory do not mix (Linux).

* `lightning_unfreeze`: stored features in the head epochs, the pass that makes them, the search for the boundary and
  the reports at the end included.
* `BackboneFinetuning` as shipped: BatchNorm trains in the head epochs, whatever `train_bn` says, so there is a backward
  pass through the backbone. `..., BatchNorm frozen` is a subclass of one line without that.
* `FinetuningScheduler`: a schedule of two phases, `epoch_transitions_only`, without checkpoints.
* `bare loop`: plain PyTorch, no Lightning, `no_grad` around the frozen backbone; `..., features kept` runs the backbone
  once and keeps its features in memory: the floor.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import platform
import resource
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import lightning_unfreeze.module.digits_resnet  # noqa: F401  (timm knows the demo's backbone from here on)
from lightning_unfreeze import GradualUnfreeze, ImageFolderData, PrecomputeFeatures, Stage
from lightning_unfreeze.data.digits import DigitsData

Loaders = tuple[DataLoader[Any], DataLoader[Any]]
RATE = 1e-3


class Classifier(pl.LightningModule):
    """A user's module, written without this package; every arm trains it, the bare loops without its Lightning part."""

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        accuracy = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_acc", accuracy, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=RATE)


class BatchNormFrozen(BackboneFinetuning):
    """Frozen means frozen."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.backbone, train_bn=False)


class EpochEnds(Callback):
    """When each epoch ended, its validation included."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch:
            self.times.append(time.perf_counter())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.times.append(time.perf_counter())


# --- the arms: (module, loaders, options, folder) -> seconds from the start to the end of each epoch, accuracy -------

Arm = Callable[[Classifier, Loaders, argparse.Namespace, Path], tuple[list[float], float]]


def by_lightning(module: Classifier, loaders: Loaders, callbacks: list[Callback], **trainer: Any) -> Any:
    ends = EpochEnds()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    quiet |= {"num_sanity_val_steps": 0, "accelerator": "cpu", "devices": 1, **trainer}
    start = time.perf_counter()
    fit = pl.Trainer(callbacks=[*callbacks, ends], **quiet)
    fit.fit(module, *loaders)
    times = [end - start for end in ends.times]
    times[-1] = time.perf_counter() - start  # reports at the end of the fit count too
    return times, float(fit.callback_metrics["val_acc"])


def package(module: Classifier, loaders: Loaders, options: argparse.Namespace, folder: Path) -> Any:
    stages = [
        Stage("head", train="head", epochs=options.head_epochs, precompute=True, lr=RATE),
        Stage("full", train="all", epochs=options.full_epochs, lr=RATE),
    ]
    return by_lightning(module, loaders, [GradualUnfreeze(stages), PrecomputeFeatures(folder / "store")])


def shipped(
    module: Classifier, loaders: Loaders, options: argparse.Namespace, folder: Path, kind: Any = BackboneFinetuning
) -> Any:
    callback = kind(options.head_epochs, lambda_func=lambda epoch: 1.0, backbone_initial_lr=RATE, should_align=False)
    return by_lightning(module, loaders, [callback], max_epochs=options.head_epochs + options.full_epochs)


def batch_norm_frozen(module: Classifier, loaders: Loaders, options: argparse.Namespace, folder: Path) -> Any:
    return shipped(module, loaders, options, folder, BatchNormFrozen)


def scheduler(module: Classifier, loaders: Loaders, options: argparse.Namespace, folder: Path) -> Any:
    from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint

    epochs = options.head_epochs + options.full_epochs
    schedule = {
        0: {"params": ["head.*"], "max_transition_epoch": options.head_epochs},
        1: {"params": ["backbone.*"], "max_transition_epoch": epochs, "lr": RATE},
    }
    quiet = {"epoch_transitions_only": True, "restore_best": False, "logging_level": logging.ERROR}
    callback = FinetuningScheduler(ft_schedule=schedule, log_dir=str(folder), **quiet)
    kept_none = FTSCheckpoint(folder, monitor="val_acc", mode="max", save_top_k=0)  # it makes one if there is none
    callbacks = [callback, kept_none]
    return by_lightning(module, loaders, callbacks, max_epochs=epochs, enable_checkpointing=True)


def bare(
    module: Classifier, loaders: Loaders, options: argparse.Namespace, folder: Path, keep_features: bool = False
) -> Any:
    start, times = time.perf_counter(), []
    module.backbone.requires_grad_(False)
    head_loaders: Any = loaders
    if keep_features:
        head_loaders = tuple(features_of(module, loader) for loader in loaders)
    optimizer = torch.optim.AdamW(module.head.parameters(), lr=RATE)
    for _ in range(options.head_epochs):
        module.train()
        module.backbone.eval()
        accuracy = bare_epoch(module.head if keep_features else module, head_loaders, optimizer)
        times.append(time.perf_counter() - start)
    module.backbone.requires_grad_(True)
    optimizer.add_param_group({"params": list(module.backbone.parameters())})
    for _ in range(options.full_epochs):
        module.train()
        accuracy = bare_epoch(module, loaders, optimizer)
        times.append(time.perf_counter() - start)
    return times, accuracy


def bare_epoch(network: nn.Module, loaders: Any, optimizer: torch.optim.Optimizer) -> float:
    train, val = loaders
    for images, labels in train:
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.inference_mode():
        right = [float((network(images).argmax(1) == labels).sum()) for images, labels in val]
    return sum(right) / len(val.dataset)


def features_of(module: Classifier, loader: DataLoader[Any]) -> DataLoader[Any]:
    module.eval()
    shuffled = loader.generator is not None
    with torch.no_grad():
        parts = [(module.backbone(images), labels) for images, labels in DataLoader(loader.dataset, loader.batch_size)]
    data = TensorDataset(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return DataLoader(data, loader.batch_size, shuffle=shuffled, generator=loader.generator)


def bare_cached(module: Classifier, loaders: Loaders, options: argparse.Namespace, folder: Path) -> Any:
    return bare(module, loaders, options, folder, keep_features=True)


ARMS: dict[str, Arm] = {
    "lightning_unfreeze": package,
    "BackboneFinetuning": shipped,
    "BackboneFinetuning, BatchNorm frozen": batch_norm_frozen,
    "FinetuningScheduler": scheduler,
    "bare loop": bare,
    "bare loop, features kept": bare_cached,
}


# --- data and runs ---------------------------------------------------------------------------------------------------


def datasets(options: argparse.Namespace) -> tuple[Dataset[Any], Dataset[Any], int]:
    """Training and validation images under the same transform, drawn once from all there are."""
    common: dict[str, Any] = {"augmentation": "none", "data_config": make_backbone(options.weights).pretrained_cfg}
    data: Any = DigitsData(train_per_class=None, **common)
    if options.data:
        common["data_config"] |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        data = ImageFolderData(str(options.data), image_size_px=options.size_px, **common)
    data.setup("fit")
    parts = []
    for split, most in (("train", options.images), ("val", options.val_images)):
        whole = data.dataset(split)
        drawn = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:most]
        parts.append(Subset(whole, sorted(drawn.tolist())))
    return parts[0], parts[1], data.num_classes


def make_backbone(weights: Path | None) -> Any:
    if weights is None:
        return timm.create_model("digits_resnet", pretrained=True, num_classes=0)
    overlay = {"file": str(weights), "num_classes": 0}
    options: dict[str, Any] = {"pad_type": "same", "bn_eps": 1e-3, "pretrained_cfg_overlay": overlay}
    return timm.create_model("mobilenetv2_035", pretrained=True, num_classes=0, **options)


def run(name: str, seed: int, options: argparse.Namespace, found: Any) -> None:
    """One arm, in a process of its own."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    try:
        train, val, num_classes = datasets(options)
        torch.manual_seed(seed)
        module = Classifier(make_backbone(options.weights), num_classes)
        order = torch.Generator().manual_seed(seed)
        loaders = (
            DataLoader(train, options.batch_size, shuffle=True, generator=order),
            DataLoader(val, options.batch_size),
        )
        with tempfile.TemporaryDirectory() as folder:
            times, accuracy = ARMS[name](module, loaders, options, Path(folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        found.send((times, accuracy, peak, len(train)))
    except Exception:
        found.send(traceback.format_exc())


def median(values: Any) -> float:
    return statistics.median(list(values))


def parts(times: list[float], options: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds of the head epochs, of the full ones, and of all."""
    head = times[options.head_epochs - 1]
    return head, times[-1] - head, times[-1]


def table(rows: dict[str, list[Any]], options: argparse.Namespace) -> list[str]:
    """A line per arm: medians over the rounds, and the spread of the whole."""
    lines = [
        "| | head s | full s | whole s [each] | images/s | peak MiB | accuracy [each] |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in rows.items():
        if any(isinstance(run, str) for run in runs):
            lines.append(f"| {name} | failed, see the output | | | | | |")
            continue
        times, accuracies, peaks, counts = (list(column) for column in zip(*runs, strict=True))
        head, full, whole = (list(column) for column in zip(*(parts(t, options) for t in times), strict=True))
        rate = counts[0] * (options.head_epochs + options.full_epochs) / median(whole)
        lines.append(
            f"| {name} | {median(head):.2f} | {median(full):.2f} | {median(whole):.2f} "
            f"[{' '.join(f'{value:.1f}' for value in whole)}] | {rate:.1f} | {median(peaks):.0f} "
            f"| {median(accuracies):.3f} [{' '.join(f'{value:.3f}' for value in accuracies)}] |"
        )
    return lines


def ratios(rows: dict[str, list[Any]], options: argparse.Namespace) -> list[str]:
    """This package's seconds over those of each other arm: medians of the rounds' pairs, smallest and largest."""
    lines = ["", "| lightning_unfreeze against | head | full | whole [smallest, largest] |", "|---|---|---|---|"]
    ours = rows.get("lightning_unfreeze", ["left out"])
    for name, runs in rows.items():
        if runs is ours or any(isinstance(run, str) for run in [*runs, *ours]):
            continue
        pairs = [
            [a / b for a, b in zip(parts(mine[0], options), parts(theirs[0], options), strict=True)]
            for mine, theirs in zip(ours, runs, strict=True)
        ]
        head, full, whole = zip(*pairs, strict=True)
        lines.append(
            f"| {name} | {median(head):.2f}x | {median(full):.2f}x "
            f"| {median(whole):.2f}x [{min(whole):.2f}, {max(whole):.2f}] |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of photos with train/ and val/; without it the digits")
    parser.add_argument("--weights", type=Path, help="ImageNet weights of timm's mobilenetv2_035 (Keras')")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--val-images", type=int, default=64)
    parser.add_argument("--size-px", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--head-epochs", type=int, default=5)
    parser.add_argument("--full-epochs", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "recipe.md")
    options = parser.parse_args()
    if (options.data is None) != (options.weights is None):
        parser.error("give --data and --weights together, or neither for the embedded digits")
    rows: dict[str, list[Any]] = {name: [] for name in options.arms}
    fork = multiprocessing.get_context("fork")
    for seed in range(options.rounds):
        for name in options.arms:
            receiving, sending = fork.Pipe(duplex=False)
            process = fork.Process(target=run, args=(name, seed, options, sending))
            process.start()
            sending.close()
            try:
                rows[name].append(receiving.recv())
            except EOFError:
                rows[name].append("the process died")
            process.join()
            print(f"seed {seed} {name}: {rows[name][-1]}", flush=True)
    what = f"{options.data.name}, mobilenetv2_035 at {options.size_px} px" if options.data else "digits, digits_resnet"
    versions = []
    for name in ("torch", "lightning", "finetuning-scheduler", "timm"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"no {name}")
    text = "\n".join(
        [
            "# A recipe by this package, its peers, and bare loops",
            "",
            f"`benchmarks/recipe_vs_peers.py --rounds {options.rounds} --images {options.images}`: {what}, "
            f"{options.images} training images at most, {options.head_epochs} epochs of the head and "
            f"{options.full_epochs} of everything, batch {options.batch_size}, AdamW {RATE:g}, no augmentation, no "
            f"worker processes; {options.threads} thread(s) of {platform.machine()}, Python "
            f"{platform.python_version()}, {', '.join(versions)}. Medians of {options.rounds} rounds, arms in turn.",
            "",
            *table(rows, options),
            *ratios(rows, options),
        ]
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
