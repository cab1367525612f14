"""What stored features are worth: ratios measured in one run, alternating (A B A B), medians.

    python benchmarks/precompute.py [--data FOLDER --weights FILE] [--out benchmarks/results/precompute.md]

1. An epoch of the head on stored features against Lightning's own `BackboneFinetuning` as shipped (synthetic images).
2. The same against a bare PyTorch loop and Lightning over a tensor in memory; with bar and logger, and without.
3. The pass that fills a store against a plain evaluation pass over the same loader.
4. With `--data`: accuracy and seconds of a head on real photos, without a store, with one view, with four.
"""

from __future__ import annotations

import argparse
import logging
import shutil
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
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from lightning_unfreeze import GradualUnfreeze, ImageFolderData, PrecomputeFeatures, Stage


class Classifier(pl.LightningModule):
    """A user's module, written without this package."""

    def __init__(self, model: str, num_classes: int = 2, lr: float = 1e-3, **options: Any) -> None:
        super().__init__()
        self.backbone = timm.create_model(model, num_classes=0, **options)
        with torch.no_grad():
            width = self.backbone.eval()(torch.zeros(1, 3, 64, 64)).shape[1]
        self.backbone.train()
        self.head = nn.Linear(width, num_classes)
        self.lr = lr

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class HeadAlone(Classifier):
    """What Lightning itself takes, on features in memory."""

    def __init__(self, width: int) -> None:
        pl.LightningModule.__init__(self)
        self.backbone, self.head, self.lr = nn.Identity(), nn.Linear(width, 2), 1e-3


class Rows(Dataset[Any]):
    """Whole batches of tensors in memory."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def __getitem__(self, rows: list[int]) -> Any:
        return [tensor[rows] for tensor in self.tensors]

    def __len__(self) -> int:
        return len(self.tensors[0])


class Stopwatch(Callback):
    """Seconds of each epoch, from its first batch to its last."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def images(num: int, size_px: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(num, 3, size_px, size_px, generator=generator), torch.randint(2, (num,), generator=generator)
    )


def trainer(callbacks: list[Callback], **options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(accelerator="cpu", devices=1, callbacks=callbacks, **{**quiet, **options})


def head_plan(epochs: int) -> GradualUnfreeze:
    return GradualUnfreeze([Stage("head", train="head", epochs=epochs, precompute=True)])


def against_backbone_finetuning(model: str, num: int, batch_size: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Median seconds of an epoch, the first of each fit left out: it warms up."""
    data = images(num, 128)
    shipped, stored = [], []
    for _ in range(rounds):
        watch = Stopwatch()
        callbacks: list[Callback] = [BackboneFinetuning(unfreeze_backbone_at_epoch=1000), watch]
        trainer(callbacks, max_epochs=3).fit(Classifier(model), DataLoader(data, batch_size, shuffle=True))
        shipped += watch.seconds[1:]
        watch = Stopwatch()
        torch.manual_seed(0)
        precompute = PrecomputeFeatures(folder / model)
        trainer([head_plan(12), precompute, watch]).fit(Classifier(model), DataLoader(data, batch_size, shuffle=True))
        stored += watch.seconds[1:]
    return {"shipped": statistics.median(shipped), "stored": statistics.median(stored)}


class Silent(Stopwatch):
    """Takes `self.log` out of the steps."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        vars(pl_module)["log"] = lambda *_, **__: None


def against_bare_loop(
    num: int, batch_size: int, rounds: int, folder: Path, width: int = 512
) -> dict[str, tuple[float, float]]:
    """Epoch of a head on `num` stored features of `width` numbers, with less and less around it, and plain PyTorch.

    Returns:
        Median seconds of an epoch by Lightning over tensors in memory, and over stored features.
    """
    data = images(num, 8)
    bare: list[float] = []
    bar: dict[str, Any] = {"logger": CSVLogger(folder / "csv"), "enable_progress_bar": True}
    settings: dict[str, tuple[dict[str, Any], type[Stopwatch], list[Callback]]] = {
        "progress bar and CSV logger": (bar, Stopwatch, []),
        "the bar drawn every 20 steps": (bar, Stopwatch, [TQDMProgressBar(refresh_rate=20)]),
        "no bar, no logger": ({}, Stopwatch, []),
        "no `self.log` in the step either": ({}, Silent, []),
    }
    in_memory: dict[str, list[float]] = {name: [] for name in settings}
    stored: dict[str, list[float]] = {name: [] for name in settings}

    class Wide(Classifier):
        def __init__(self) -> None:
            pl.LightningModule.__init__(self)
            self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, width))
            self.head = nn.Linear(width, 2)
            self.lr = 1e-3

    torch.manual_seed(0)
    module, features = Wide(), torch.randn(num, width)
    start_weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    order = BatchSampler(RandomSampler(range(num)), batch_size, False)
    whole = DataLoader(Rows(features, data.tensors[1]), batch_size=None, sampler=order)
    for _ in range(rounds):
        optimizer = torch.optim.AdamW(module.head.parameters(), lr=1e-3)
        for epoch in range(6):
            start = time.perf_counter()
            for rows in torch.randperm(num).split(batch_size):
                loss = nn.functional.cross_entropy(module.head(features[rows]), data.tensors[1][rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if epoch:
                bare.append(time.perf_counter() - start)
        for name, (shown, watching, more) in settings.items():
            watch = watching()
            trainer([watch, *more], max_epochs=6, **shown).fit(HeadAlone(width), whole)
            in_memory[name] += watch.seconds[1:]
            watch = watching()
            user = Wide()
            user.load_state_dict(start_weights)  # so that one store serves every fit
            precompute = PrecomputeFeatures(folder / "wide", policy="always")
            loader = DataLoader(data, batch_size, shuffle=True)
            trainer([head_plan(6), precompute, watch, *more], **shown).fit(user, loader)
            stored[name] += watch.seconds[1:]
    found = {name: (statistics.median(in_memory[name]), statistics.median(stored[name])) for name in settings}
    return {"bare": (statistics.median(bare),) * 2, **found}


def pass_against_evaluation(model: str, num: int, batch_size: int, rounds: int, folder: Path) -> dict[str, float]:
    data = images(num, 128)
    plain, passed = [], []
    fill = pass_seconds(passed)
    with fill:
        for number in range(rounds):
            module = Classifier(model).eval()
            start = time.perf_counter()
            with torch.inference_mode():
                for x, _ in DataLoader(data, batch_size):
                    module.backbone(x)
            plain.append(time.perf_counter() - start)
            precompute = PrecomputeFeatures(folder / f"{model}-{number}", policy="always")
            trainer([head_plan(1), precompute]).fit(module, DataLoader(data, batch_size))
    return {"plain": statistics.median(plain), "pass": statistics.median(passed)}


def pass_seconds(found: list[float]) -> Any:
    """Times `FeaturePass.fill` wherever it is called."""
    from unittest.mock import patch

    from lightning_unfreeze.features.fill import FeaturePass

    original = FeaturePass.fill

    def timed(self: FeaturePass, *arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(self, *arguments)
        finally:
            found.append(time.perf_counter() - start)

    return patch.object(FeaturePass, "fill", timed)


def real_photos(options: argparse.Namespace, folder: Path) -> list[tuple[str, float, float]]:
    """Accuracy and seconds of `epochs` epochs of the head, medians over seeds; each run fills its own store."""
    model, epochs, weights = "mobilenetv2_035", options.epochs, options.weights
    arms: dict[str, Callable[[Path], list[Callback]]] = {
        "no store, augmented": lambda _: [GradualUnfreeze([Stage("head", train="head", epochs=epochs)])],
        "store, V=1": lambda f: [head_plan(epochs), PrecomputeFeatures(f, num_views=1, policy="always")],
        "store, V=4": lambda f: [head_plan(epochs), PrecomputeFeatures(f, num_views=4, policy="always")],
    }
    loaded: dict[str, Any] = {}
    if weights is not None:
        overlay = {"file": str(weights), "mean": (0.5,) * 3, "std": (0.5,) * 3}
        loaded = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for seed in range(options.rounds):
        for name, make in arms.items():
            torch.manual_seed(seed)
            module = Classifier(model, pad_type="same", bn_eps=1e-3, **loaded)
            data = ImageFolderData(str(options.data), batch_size=32, image_size_px=160, seed=seed, num_workers=0)
            start = time.perf_counter()
            fit = trainer(make(folder / f"{name}-{seed}"))
            fit.fit(module, datamodule=data)
            found[name].append((float(fit.callback_metrics["val_acc"]), time.perf_counter() - start))
    return [(name, *(statistics.median(column) for column in zip(*rows, strict=True))) for name, rows in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "precompute.md")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--only", nargs="*", default=["shipped", "bare", "pass", "photos"])
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    lines = [
        "# What stored features are worth",
        "",
        f"`benchmarks/precompute.py --rounds {options.rounds} --images {options.images}`, one thread, torch "
        f"{torch.__version__}, lightning {pl.__version__}. Medians; A and B alternate within one run.",
        "",
    ]
    try:
        if "shipped" in options.only:
            lines += [
                "| head epoch, 128 px, batch 64 | BackboneFinetuning | stored | ratio |",
                "|---|---|---|---|",
            ]
            for model in ("resnet18", "mobilenetv3_small_100"):
                row = against_backbone_finetuning(model, options.images, 64, options.rounds, folder)
                ratio = row["shipped"] / row["stored"]
                lines.append(f"| {model} | {row['shipped']:.3g} s | {row['stored']:.3g} s | {ratio:.0f}x |")
        if "bare" in options.only:
            rows = against_bare_loop(20_480, 256, options.rounds, folder)
            bare, _ = rows.pop("bare")
            lines += [
                "",
                "Epoch of a head on 20,480 x 512 features, batch 256; a bare PyTorch loop over a tensor in memory "
                f"takes {bare:.3g} s:",
                "",
                "| Lightning with | over tensors in memory | over stored features | stored, times bare | in memory |",
                "|---|---|---|---|---|",
            ]
            for name, (ram, ours) in rows.items():
                lines.append(f"| {name} | {ram:.3g} s | {ours:.3g} s | {ours / bare:.2f}x | {ours / ram:.2f}x |")
        if "pass" in options.only:
            lines += ["", "| feature pass, 128 px, batch 64 | plain evaluation | pass | ratio |", "|---|---|---|---|"]
            for model in ("resnet18", "mobilenetv3_small_100"):
                row = pass_against_evaluation(model, options.images, 64, options.rounds + 2, folder)
                lines.append(
                    f"| {model} | {row['plain']:.3g} s | {row['pass']:.3g} s | {row['pass'] / row['plain']:.2f}x |"
                )
        if "photos" in options.only and options.data:
            lines += [
                "",
                f"{options.data.name}, 160 px, head alone, {options.epochs} epochs:",
                "",
                "| | accuracy | seconds |",
                "|---|---|---|",
            ]
            for name, accuracy, duration in real_photos(options, folder):
                lines.append(f"| {name} | {accuracy:.3f} | {duration:.1f} |")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = "\n".join(lines) + "\n"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
