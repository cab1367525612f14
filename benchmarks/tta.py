"""Cost of V views through `TTAEval`, plain metrics included, against V bare forwards of the same images.

`PYTHONPATH=. python benchmarks/tta.py [--size-px 160] [--images 128] [--repeats 5]`. Both sides run in turn in one
process (A B A B ...); the ratio is the median of the pairs' ratios. The bare side draws no views, computes no metric
and has no Trainer.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_unfreeze.callbacks.tta import TTAEval


class Module(pl.LightningModule):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self.model(batch[0]), batch[1]))


def seconds(run: Callable[[], None]) -> float:
    """Wall-clock on a GPU; processor time on the CPU, which other processes on the machine do not stretch."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mobilenetv2_035")
    parser.add_argument("--size-px", type=int, default=160)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--chunk-size", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--views", nargs="+", default=["flip", "d4", "ten_crop"])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(args.model, num_classes=10).eval()
    images = torch.randn(args.images, 3, args.size_px, args.size_px)
    loader = DataLoader(TensorDataset(images, torch.randint(10, (args.images,))), batch_size=args.batch_size)
    module = Module(model)

    print(f"{args.model}, {args.images} images of {args.size_px} px, {device}, torch {torch.__version__}")
    print("views        V   V forwards (s)   TTAEval (s)   ratio [each pair]")
    for views in args.views:
        tta = TTAEval(views, chunk_size=args.chunk_size, figure=False)
        trainer = pl.Trainer(
            callbacks=[tta],
            accelerator=device,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

        def bare(num_views: int = tta.num_views) -> None:
            model.to(device)
            with torch.inference_mode():
                for batch, _ in loader:
                    on_device = batch.to(device)
                    for _ in range(num_views):
                        model(on_device)

        def augmented(trainer: pl.Trainer = trainer) -> None:
            trainer.test(module, loader, verbose=False)

        seconds(bare), seconds(augmented)
        pairs = [(seconds(bare), seconds(augmented)) for _ in range(args.repeats)]
        plain, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratios = sorted(b / a for a, b in pairs)
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        ratio = statistics.median(ratios)
        print(f"{views:10} {tta.num_views:3} {plain:16.2f} {ours:13.2f}   {ratio:.2f} [{each}]", flush=True)


if __name__ == "__main__":
    main()
