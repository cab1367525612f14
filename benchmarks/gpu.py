"""Stored features, idle callbacks and whole recipes on a card, each row beside a bare PyTorch loop.

    python benchmarks/gpu.py                     # one CUDA card, a few minutes
    python benchmarks/gpu.py --small             # a check that all runs, on a CPU
    python benchmarks/gpu.py --only head profile # some sections

Networks have random weights and images are drawn, since neither changes a time. Sections run one after another, the
arms of a section in turn; each number is the median of the rounds. The table names the card.
"""

from __future__ import annotations

import argparse
import gc
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
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_unfreeze import CosineRestarts, GradualUnfreeze, LRFinderPerStage, PrecomputeFeatures, Stage, TTAEval

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
Options = argparse.Namespace


class Images(Dataset[Any]):
    """Images in memory as `uint8`, floats when they are read, as a decoded photo is."""

    def __init__(self, num: int, px: int, classes: int = 10) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(256, (num, 3, px, px), generator=generator, dtype=torch.uint8)
        self.labels = torch.randint(classes, (num,), generator=generator)
        self.transform = None

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pixels[index].float() / 127.5 - 1, self.labels[index]

    def __len__(self) -> int:
        return len(self.labels)


class Classifier(pl.LightningModule):
    def __init__(self, name: str, classes: int = 10) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, num_classes=0)
        self.head = nn.Linear(self.backbone.num_features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def synchronised() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


class Epochs(Callback):
    """Seconds from the start of the fit to the first batch, and of each epoch."""

    def __init__(self) -> None:
        self.start, self.first, self.seconds = time.perf_counter(), 0.0, []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.first:
            self.first = synchronised() - self.start

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._began = synchronised()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds.append(synchronised() - self._began)


def fit(module: Any, loader: Any, callbacks: list[Callback], folder: str, **trainer: Any) -> Epochs:
    epochs = Epochs()
    quiet = dict.fromkeys(("enable_checkpointing", "enable_model_summary"), False) | {"num_sanity_val_steps": 0}
    bar = {"enable_progress_bar": False, "logger": False}
    options = {**quiet, **bar, "accelerator": DEVICE.type, "devices": 1, "precision": precision(), **trainer}
    pl.Trainer(callbacks=[*callbacks, epochs], default_root_dir=folder, **options).fit(module, loader)
    return epochs


def precision() -> Any:
    return "bf16-mixed" if CUDA else "32-true"


def autocast() -> Any:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA)


def staged(train: Any, folder: str, epochs: int = 3, precompute: bool = True, **options: Any) -> list[Callback]:
    stage = Stage("stage", train=train, epochs=epochs, precompute=precompute)
    return [GradualUnfreeze([stage]), *([PrecomputeFeatures(folder, policy="always", **options)] if precompute else [])]


def median(values: Any) -> float:
    return statistics.median(list(values))


def loader_of(data: Any, options: Options, batch: int | None = None, shuffle: bool = True) -> DataLoader[Any]:
    workers = options.workers
    return DataLoader(
        data, batch or 64, shuffle=shuffle, num_workers=workers, persistent_workers=workers > 0, pin_memory=CUDA
    )


# --- sections --------------------------------------------------------------------------------------------------------


def head(options: Options) -> list[str]:
    """Epochs of the head on stored features, against a bare loop over features that lie on the device."""
    lines = [
        "| network, width, batch | stored, s | bare loop, s | ratio | stored, features/s | bar and logger on, ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name in options.head_models:
        data = Images(options.images, options.px)
        width = Classifier(name).backbone.num_features
        for batch in (64, 1024):
            stored, shown = [], []
            with tempfile.TemporaryDirectory() as folder:
                for seconds, extra in (
                    (stored, {}),
                    (shown, {"enable_progress_bar": True, "logger": True, "log_every_n_steps": 50}),
                ):
                    module, callbacks = Classifier(name), staged("head", folder, 4, cached_batch_size=batch)
                    seconds += fit(module, loader_of(data, options), callbacks, folder, **extra).seconds[1:]
            bare = bare_head(options.images, width, batch)
            lines.append(
                f"| {name}, {width}, {batch} | {median(stored):.4f} | {bare:.4f} | {median(stored) / bare:.2f}x "
                f"| {options.images / median(stored):,.0f} | {median(shown) / bare:.2f}x |"
            )
    return lines


def bare_head(num: int, width: int, batch: int) -> float:
    features = torch.randn(num, width, device=DEVICE, dtype=torch.bfloat16 if CUDA else torch.float32)
    labels = torch.randint(10, (num,), device=DEVICE)
    linear = nn.Linear(width, 10, device=DEVICE)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-3)
    seconds = []
    for _ in range(5):
        start = synchronised()
        for rows in torch.randperm(num).to(DEVICE).split(batch):
            with autocast():
                loss = F.cross_entropy(linear(features[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds.append(synchronised() - start)
    return median(seconds[1:])


def many(options: Options) -> list[str]:
    """Features a second where there are many, batch 1024, and where they lie."""
    from lightning_unfreeze.features.layout import StoreLayout, TensorSpec
    from lightning_unfreeze.features.resident import ResidentStore
    from lightning_unfreeze.features.store import FeatureStore
    from lightning_unfreeze.features.writer import FeatureWriter

    num, width = options.many, 2048
    lines = [f"| {num:,} x {width} bfloat16, shuffled batches of 1024 | rows/s | GB |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        tensors = {"features": TensorSpec((width,), torch.bfloat16), "label": TensorSpec((), torch.int64)}
        part = torch.randn(min(num, 65536), width).to(torch.bfloat16)
        with FeatureWriter(Path(folder) / "store", StoreLayout("key", num, tensors)) as writer:
            for rows in torch.arange(num).split(len(part)):
                writer.write(rows, {"features": part[: len(rows)], "label": rows})
        store = writer.finalize()
        sources: dict[str, Callable[[], Any]] = {"memory map or file": lambda: store}
        if CUDA:
            sources["pinned memory"] = lambda: ResidentStore(store, DEVICE, "pinned")
        sources[f"on the {DEVICE.type}"] = lambda: ResidentStore(store, DEVICE)
        for name, make in sources.items():
            start = time.perf_counter()
            source = make()
            loaded = synchronised() - start
            order = torch.randperm(num)[: num if name.startswith("on") else num // 4]
            order = order.to(DEVICE) if name.startswith("on") else order
            start = synchronised()
            parts = order.split(1024)
            reads = source.read_ahead(parts) if isinstance(source, ResidentStore) else map(source.read, parts)
            for batch in reads:
                batch["features"].to(DEVICE, non_blocking=True)
            rate = len(order) / (synchronised() - start)
            size = store.layout.num_bytes / 1e9
            lines.append(f"| {name} (made ready in {loaded:.1f} s) | {rate:,.0f} | {size:.2f} |")
            del source
            gc.collect()
        assert isinstance(store, FeatureStore)
    return lines


def fixed(options: Options) -> list[str]:
    """What a stored stage costs before its first step, beyond one evaluation pass over the same images."""
    lines = [
        "| network | evaluation pass, s | start to first step, s | beyond the pass, s | again, store there, s |",
        "|---|---|---|---|---|",
    ]
    for name in options.fixed_models:
        data = Images(options.images, options.px)
        passes, starts, again = [], [], []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as folder:
                module = Classifier(name)
                starts.append(fit(module, loader_of(data, options), staged("head", folder, 1), folder).first)
                again.append(fit(module, loader_of(data, options), staged("head", folder, 1), folder).first)
            plain = fit(Classifier(name), loader_of(data, options), staged("head", folder, 1, False), folder).first
            network = Classifier(name).backbone.to(DEVICE).eval()
            for _ in range(2):  # the second one is warm, as the pass is after the checks
                start = synchronised()
                with torch.inference_mode(), autocast():
                    for images, _ in loader_of(data, options, shuffle=False):
                        network(images.to(DEVICE, non_blocking=True))
                passed = synchronised() - start
            passes.append(passed)
            starts[-1] -= plain
            again[-1] -= plain
        lines.append(
            f"| {name} | {median(passes):.2f} | {median(starts):.2f} | {median(starts) - median(passes):.2f} "
            f"| {median(again):.2f} |"
        )
    return lines


def boundary(options: Options) -> list[str]:
    """Epochs in which the top two layer groups train, stored against on images."""
    lines = [
        "| network, what trains | on images, s | stored, s | faster | peak GiB on images / stored |",
        "|---|---|---|---|---|",
    ]
    for name, train in options.boundaries:
        data, seconds, peaks = Images(options.images, options.px), {}, {}
        for precompute in (False, True):
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            with tempfile.TemporaryDirectory() as folder:
                callbacks = staged(train, folder, 3, precompute)
                seconds[precompute] = median(
                    fit(Classifier(name), loader_of(data, options), callbacks, folder).seconds[1:]
                )
            peaks[precompute] = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
        lines.append(
            f"| {name}, top {train} | {seconds[False]:.3f} | {seconds[True]:.3f} "
            f"| {seconds[False] / seconds[True]:.2f}x | {peaks[False]:.2f} / {peaks[True]:.2f} |"
        )
    return lines


def idle(options: Options) -> list[str]:
    """What five callbacks with nothing to do add to a step, and how often each Trainer waits for the card."""
    lines = [
        "| step | without, ms | with all five, ms | added, ms | waits for the card, without / with |",
        "|---|---|---|---|---|",
    ]
    for name, px, batch in options.idle:
        data = TensorDataset(torch.randn(batch * 60, 3, px, px), torch.randint(10, (batch * 60,)))
        medians, waits = {}, {}
        for attached in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                plan = GradualUnfreeze([Stage("all", epochs=3)])
                callbacks = [plan, PrecomputeFeatures(folder), LRFinderPerStage(), CosineRestarts(), TTAEval()]
                seconds = []
                for _ in range(options.rounds):
                    made = fit(
                        Classifier(name), DataLoader(data, batch), callbacks if attached else [], folder, max_epochs=3
                    )
                    seconds.append(made.seconds[1] / 60)  # the last epoch ends the stage: its reports are not idle
                    callbacks = [
                        GradualUnfreeze([Stage("all", epochs=3)]),
                        PrecomputeFeatures(folder),
                        LRFinderPerStage(),
                        CosineRestarts(),
                        TTAEval(),
                    ]
                medians[attached] = 1e3 * median(seconds)
                waits[attached] = count_waits(name, data, batch, callbacks if attached else [], folder)
        lines.append(
            f"| {name}, {px} px, batch {batch} | {medians[False]:.3f} | {medians[True]:.3f} "
            f"| {medians[True] - medians[False]:+.3f} | {waits[False]} / {waits[True]} in 60 steps |"
        )
    return lines


def count_waits(name: str, data: Any, batch: int, callbacks: list[Callback], folder: str) -> int:
    if not CUDA:
        return 0
    seen = 0

    class Watch(Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("warn")

        def on_train_epoch_end(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(
            Classifier(name),
            DataLoader(data, batch),
            [*callbacks, Watch()],
            folder,
            max_epochs=1 if not callbacks else 2,
        )
        seen = sum("synchroniz" in str(one.message) for one in caught)
    return seen if not callbacks else seen // 3


def recipe(options: Options) -> list[str]:
    """Five epochs of the head and seven of everything, against `BackboneFinetuning` and a bare loop that freezes."""
    name, (head_epochs, full_epochs) = options.recipe, options.epochs
    data, seconds = Images(options.images, options.px), {}

    def timed(arm: str, callbacks: list[Callback], folder: str, **trainer: Any) -> None:
        start = synchronised()
        fit(Classifier(name), loader_of(data, options), callbacks, folder, **trainer)
        seconds.setdefault(arm, []).append(synchronised() - start)

    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for arm, below in (("lightning_unfreeze", None), ("lightning_unfreeze, freeze_below=0.15", 0.15)):
                plan = [
                    Stage("head", train="head", epochs=head_epochs, precompute=True),
                    Stage("full", train="all", epochs=full_epochs, lr_span=1 / 9, precompute=False),
                ]
                unfreeze = GradualUnfreeze(plan, **({} if below is None else {"freeze_below": below}))
                timed(arm, [unfreeze, PrecomputeFeatures(f"{folder}/{arm}", policy="always")], folder)
            peer = BackboneFinetuning(
                head_epochs, lambda_func=lambda epoch: 1.0, backbone_initial_lr=1e-3, should_align=False
            )
            timed("BackboneFinetuning", [peer], folder, max_epochs=head_epochs + full_epochs)
        start = synchronised()
        bare_recipe(Classifier(name).to(DEVICE), loader_of(data, options), head_epochs, full_epochs)
        seconds.setdefault("bare loop, `no_grad` around the frozen part", []).append(synchronised() - start)
    ours = median(seconds["lightning_unfreeze"])
    return [
        f"| {name}, {head_epochs} head and {full_epochs} full epochs | s | lightning_unfreeze takes |",
        "|---|---|---|",
        *[f"| {arm} | {median(values):.2f} | {ours / median(values):.2f}x |" for arm, values in seconds.items()],
    ]


def bare_recipe(module: Classifier, loader: Any, head_epochs: int, full_epochs: int) -> None:
    for trains, epochs in ((module.head, head_epochs), (module, full_epochs)):
        optimizer = torch.optim.AdamW(trains.parameters(), lr=1e-3)
        for _ in range(epochs):
            module.train(trains is module)
            for images, labels in loader:
                images, labels = images.to(DEVICE, non_blocking=True), labels.to(DEVICE, non_blocking=True)
                with autocast():
                    with torch.set_grad_enabled(trains is module):
                        features = module.backbone(images)
                    loss = F.cross_entropy(module.head(features), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def profile(options: Options) -> list[str]:
    """Fifty stored steps under torch's profiler: what the host did, by name."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    name, found = options.head_models[0], []

    class Window(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 60:
                activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
                self.profile = profiled(activities=activities)
                self.profile.__enter__()
                self.start = synchronised()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 110:
                self.seconds = synchronised() - self.start
                self.profile.__exit__(None, None, None)
                found.extend([self.seconds, self.profile.key_averages()])

    with tempfile.TemporaryDirectory() as folder:
        data = Images(options.images, options.px)
        epochs = 130 // max(1, options.images // 64) + 1
        fit(Classifier(name), loader_of(data, options), [*staged("head", folder, epochs), Window()], folder)
    seconds, averages = found
    rows = sorted(averages, key=lambda row: row.self_cpu_time_total, reverse=True)[:12]
    used = sum(row.self_cpu_time_total for row in averages) / 1e6
    device = sum(getattr(row, "self_device_time_total", 0) for row in averages) / 1e6
    return [
        f"50 steps of {name}'s head, batch 64: {1e3 * seconds / 50:.3f} ms a step under the profiler; operators of "
        f"torch on the host {1e3 * used / 50:.3f} ms, on the device {1e3 * device / 50:.3f} ms; the rest is Python "
        "(Lightning's loop and hooks, the module's own forward over placeholders).",
        "",
        "| operator | calls a step | host, us a step |",
        "|---|---|---|",
        *[f"| `{row.key[:50]}` | {row.count / 50:.1f} | {row.self_cpu_time_total / 50:.1f} |" for row in rows],
    ]


def equal(options: Options) -> list[str]:
    """Weights of the head after two epochs on stored features, against the same on images."""
    lines = ["| network | precision | largest difference of a weight | of largest weight |", "|---|---|---|---|"]
    for name in options.equal_models:
        for kind in ("32-true", "bf16-mixed", "16-mixed") if CUDA else ("32-true",):
            weights = {}
            for precompute in (False, True):
                torch.manual_seed(0)
                data = Images(128, options.equal_px)
                with tempfile.TemporaryDirectory() as folder:
                    module = Classifier(name)
                    fit(module, DataLoader(data, 32), staged("head", folder, 2, precompute), folder, precision=kind)
                weights[precompute] = module.head.weight.detach().float().cpu()
            apart = float((weights[True] - weights[False]).abs().max())
            lines.append(f"| {name} | {kind} | {apart:.2g} | {apart / float(weights[False].abs().max()):.2g} |")
    return lines


SECTIONS: dict[str, Callable[[Options], list[str]]] = {
    "head": head,
    "many": many,
    "fixed": fixed,
    "boundary": boundary,
    "idle": idle,
    "recipe": recipe,
    "profile": profile,
    "equal": equal,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes: a check that all runs")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=8 if CUDA else 0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.md")
    options = parser.parse_args()
    small = options.small
    vars(options).update(
        images=128 if small else 2048,
        px=32 if small else 224,
        many=4096 if small else 1_280_000,
        head_models=["resnet18"] if small else ["resnet18", "resnet50", "vit_small_patch16_224"],
        fixed_models=["resnet18"] if small else ["resnet50"],
        boundaries=[("resnet18", 2)] if small else [("resnet50", 2), ("vit_small_patch16_224", 4)],
        idle=[("resnet18", 32, 2)] if small else [("resnet18", 32, 8), ("resnet50", 224, 32)],
        recipe="resnet18" if small else "resnet50",
        epochs=(2, 1) if small else (5, 7),
        equal_models=["resnet18"]
        if small
        else ["resnet18", "convnext_atto", "vit_tiny_patch16_224", "efficientnet_b0"],
        equal_px=32 if small else 224,
        rounds=1 if small else options.rounds,
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_float32_matmul_precision("high")
    card = torch.cuda.get_device_name() if CUDA else f"not run on a card: {platform.machine()}, a check at small sizes"
    versions = f"torch {torch.__version__}, lightning {pl.__version__}, timm {timm.__version__}"
    lines = [
        "# On a card",
        "",
        f"`benchmarks/gpu.py{' --small' if small else ''}`: {card}; {versions}; {precision()}, {options.images} drawn "
        f"images of {options.px} px, random weights, {options.workers} workers; medians of {options.rounds} rounds or "
        "of the epochs after the first.",
    ]
    for name in options.only:
        start = time.perf_counter()
        try:
            rows = SECTIONS[name](options)
        except Exception as error:  # the other sections are worth having
            rows = [f"failed: {type(error).__name__}: {error}"]
        what = (SECTIONS[name].__doc__ or "").strip()
        lines += ["", f"## {name}", "", what, "", *rows]
        print(f"{name}: {time.perf_counter() - start:.0f} s", *rows, sep="\n", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
