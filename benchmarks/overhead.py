"""What the callbacks cost a training step when they have nothing to do, against a Trainer without them.

    python benchmarks/overhead.py [--rounds 8] [--out benchmarks/results/overhead.md]

Every callback of the package is attached, `GradualUnfreeze` with one stage that trains everything. Fits without and
with them alternate (A B A B), each on the same images in memory; a step is the time from the end of one batch to the
end of the next, so all that a batch costs is in it and the start of the fit is not. Of a fit's steps the lowest tenth
counts (its upper end), which other work on the machine moves least. Two steps: a tiny one, which shows the microseconds
that are added, and a realistic one (a ResNet-18, 128 px, batch 32), for which they are a share. Five `Callback()` that
override nothing show what of it Lightning spends on calling five callbacks, whatever they do.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_unfreeze import CosineRestarts, GradualUnfreeze, LRFinderPerStage, PrecomputeFeatures, Stage, TTAEval

CALLBACKS: dict[str, Callable[[Path], list[Callback]]] = {
    "five empty `Callback()`": lambda folder: [Callback() for _ in range(5)],
    "GradualUnfreeze": lambda folder: [GradualUnfreeze([Stage("all", train="all", epochs=1)])],
    "all five": lambda folder: [
        GradualUnfreeze([Stage("all", train="all", epochs=1)]),
        PrecomputeFeatures(folder),
        LRFinderPerStage(),
        CosineRestarts(),
        TTAEval(),
    ],
}


class Module(pl.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


class TinyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Steps(Callback):
    """When each batch ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


def steps_of(
    make: Callable[[], nn.Module], data: TensorDataset, batch_size: int, callbacks: list[Callback]
) -> list[float]:
    """Seconds of each step but the first few, which warm up."""
    torch.manual_seed(0)
    steps = Steps()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    fit = pl.Trainer(max_epochs=1, accelerator="cpu", devices=1, callbacks=[*callbacks, steps], **quiet)
    fit.fit(Module(make()), DataLoader(data, batch_size))
    seconds = [after - before for before, after in zip(steps.ends, steps.ends[1:], strict=False)]
    return seconds[max(1, len(seconds) // 10) :]


def quick(seconds: list[float]) -> float:
    """The upper end of the lowest tenth."""
    return statistics.quantiles(seconds, n=10)[0]


def images(num: int, px: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(num, 3, px, px, generator=generator), torch.randint(2, (num,), generator=generator)
    )


def measured(name: str, make: Callable[[], nn.Module], data: TensorDataset, size: int, rounds: int) -> list[str]:
    """Step of each round's fits, without callbacks and with them, and the medians of the rounds' pairs."""
    plain: list[float] = []
    found: dict[str, list[float]] = {kind: [] for kind in CALLBACKS}
    for _ in range(rounds):
        plain.append(quick(steps_of(make, data, size, [])))
        for kind, callbacks in CALLBACKS.items():
            with tempfile.TemporaryDirectory() as folder:
                found[kind].append(quick(steps_of(make, data, size, callbacks(Path(folder)))))
    lines = []
    for kind, seconds in found.items():
        added = sorted(1e6 * (with_them - without) for without, with_them in zip(plain, seconds, strict=True))
        share = sorted(with_them / without - 1 for without, with_them in zip(plain, seconds, strict=True))
        lines.append(
            f"| {name} | {kind} | {1e6 * statistics.median(plain):,.0f} | {1e6 * statistics.median(seconds):,.0f} "
            f"| {statistics.median(added):+,.0f} [{added[0]:+,.0f}, {added[-1]:+,.0f}] "
            f"| {statistics.median(share):+.2%} [{share[0]:+.2%}, {share[-1]:+.2%}] |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size-px", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=9, help="realistic steps per fit")
    parser.add_argument("--tiny-steps", type=int, default=400, help="tiny steps per fit")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "overhead.md")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    few = images(options.batch_size * options.steps, options.size_px)
    rows = measured("tiny network, batch 1", TinyNet, images(options.tiny_steps, 8), 1, 3 * options.rounds)
    what = f"{options.model}, {options.size_px} px, batch {options.batch_size}"
    rows += measured(
        what, lambda: timm.create_model(options.model, num_classes=2), few, options.batch_size, options.rounds
    )
    lines = [
        "# What idle callbacks cost a step",
        "",
        f"`benchmarks/overhead.py --rounds {options.rounds}`: {options.threads} thread(s) of {platform.machine()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, lightning {pl.__version__}. A fit counts with "
        "the lowest tenth of its steps; medians of the rounds' pairs, smallest and largest in brackets; no logger, no "
        "progress bar.",
        "",
        "| step | attached | without, us | with, us | added, us | share |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
