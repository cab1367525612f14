"""What it costs to wrap the module anew at a stage start, and two gloo ranks against one process. CPU, Linux.

    python benchmarks/ddp.py [--rounds 3] [--model resnet18] [--out benchmarks/results/ddp.md]

1. Milliseconds of `rebuild_ddp`, which a plan with `GradualUnfreeze` calls at each stage start, in a run on two ranks:
   once with the head alone training, once with everything.
2. Seconds of a step of the full stage: two ranks of one thread each, one process of one thread, and one of two threads,
   all with the same global batch and, checked, the same weights afterwards within 1e-5. Runs alternate (A B C A B C).

Each run is a forked process group; images are made, not read.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import platform
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
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_unfreeze import GradualUnfreeze, Stage
from lightning_unfreeze.data.loaders import EpochSampler
from lightning_unfreeze.inside_lightning.distributed import rebuild_ddp

ARMS = {"2 ranks, 1 thread each": (2, 1), "1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2)}


class Whole(pl.LightningModule):
    def __init__(self, model: str, **options: Any) -> None:
        super().__init__()
        self.model = timm.create_model(model, num_classes=2, **options)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class Watch(Callback):
    """Times the steps of the last stage, and some calls of `rebuild_ddp` at the start of each epoch."""

    def __init__(self, threads: int, wraps: int, result: Path) -> None:
        self.threads, self.wraps, self.result = threads, wraps, result
        self.ends: list[float] = []
        self.wrap_seconds: list[list[float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.set_num_threads(self.threads)
        self.before = [parameter.detach().clone() for parameter in pl_module.parameters()]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seconds = []
        for _ in range(self.wraps if trainer.world_size > 1 else 0):
            trainer.strategy.barrier()
            start = time.perf_counter()
            rebuild_ddp(trainer)
            seconds.append(time.perf_counter() - start)
        self.wrap_seconds.append(seconds)
        self.ends = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        steps = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        pairs = zip(pl_module.parameters(), self.before, strict=True)
        moved = max(float((after - before).abs().max()) for after, before in pairs)
        self.result.write_text(json.dumps({"steps": steps, "wraps": self.wrap_seconds, "moved": moved}))
        torch.save(pl_module.state_dict(), self.result.with_suffix(".pt"))


def run(arm: str, options: argparse.Namespace, result: Path) -> None:
    """A stage of the head, one epoch, and one of everything; batch statistics stay out, they are each rank's own."""
    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    ranks, threads = ARMS[arm]
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size * options.steps, 3, options.size_px, options.size_px)
    data = TensorDataset(torch.randn(shape, generator=generator), torch.randint(2, shape[:1], generator=generator))
    plan = [Stage("head", train="head", epochs=1), Stage("all", train="all", epochs=1)]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    strategy = "ddp_fork" if ranks > 1 else "auto"
    callbacks = [GradualUnfreeze(plan, train_bn=False), Watch(threads, options.wraps, result)]
    trainer = pl.Trainer(accelerator="cpu", devices=ranks, strategy=strategy, callbacks=callbacks, **quiet)
    trainer.fit(Whole(options.model), DataLoader(data, options.batch_size // ranks, sampler=EpochSampler(data, seed=0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size-px", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32, help="of all ranks together")
    parser.add_argument("--steps", type=int, default=12, help="per stage")
    parser.add_argument("--wraps", type=int, default=10, help="timed calls of rebuild_ddp at each stage start")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ddp.md")
    options = parser.parse_args()
    fork = multiprocessing.get_context("fork")
    steps: dict[str, list[float]] = {arm: [] for arm in ARMS}
    wraps: list[list[float]] = [[], []]
    apart = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            weights = []
            for arm in ARMS:
                result = Path(folder) / "result.json"
                process = fork.Process(target=run, args=(arm, options, result))
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(f"{arm}: ended with {process.exitcode}")
                found = json.loads(result.read_text())
                steps[arm].append(statistics.median(found["steps"]))
                weights.append(torch.load(result.with_suffix(".pt")))
                if ARMS[arm][0] > 1:
                    for stage, seconds in enumerate(found["wraps"]):
                        wraps[stage] += seconds
            for other in weights[1:]:
                apart = max(apart, *(float((weights[0][n].float() - t.float()).abs().max()) for n, t in other.items()))
    if apart > 1e-5:
        raise SystemExit(f"the arms end {apart:.2g} apart: they did not do the same work")
    one = "1 process, 1 thread"
    lines = [
        "# Several processes",
        "",
        f"`benchmarks/ddp.py --rounds {options.rounds}`: {options.model}, {options.size_px} px, global batch "
        f"{options.batch_size}, gloo on {platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, lightning {pl.__version__}. Medians; smallest and largest in brackets.",
        "",
        "| wrapping anew, 2 ranks | ms |",
        "|---|---|",
    ]
    for name, seconds in zip(("the head trains", "everything trains"), wraps, strict=True):
        ms = sorted(1e3 * value for value in seconds)
        lines.append(f"| {name} | {statistics.median(ms):.1f} [{ms[0]:.1f}, {ms[-1]:.1f}] |")
    lines += ["", f"| step of the full stage | s | times that of {one} |", "|---|---|---|"]
    for arm, seconds in steps.items():
        against = sorted(a / b for a, b in zip(seconds, steps[one], strict=True))
        lines.append(
            f"| {arm} | {statistics.median(seconds):.3g} [{min(seconds):.3g}, {max(seconds):.3g}] "
            f"| {statistics.median(against):.2f} [{against[0]:.2f}, {against[-1]:.2f}] |"
        )
    lines += ["", f"Weights of the three ways end at most {apart:.1e} apart, where they moved by {found['moved']:.1e}."]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
