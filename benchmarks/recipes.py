"""Recipes as a user would type them, on real photos: accuracy, NLL and seconds, at equal numbers of images.

    python benchmarks/recipes.py --data DATA --out recipes.jsonl                       # goes on where it was
    python benchmarks/recipes.py --data DATA --out recipes.jsonl --sets dtd10 --backbones mobilenetv2_035 --processes 8
    python benchmarks/recipes.py --out recipes.jsonl --report                          # the tables alone

`DATA` holds sets of photos with `train/`, `val/` and perhaps `test/`, and `weights/`. Every arm sees each training
image twelve times at most (nine_steps and fine_tune may end earlier), with the same augmentation, transform and seeds;
what an arm chooses (rates, weights along the path) it chooses by validation. Test images are read once, at the end;
sets without any are scored on validation images, which the table says.

* `nine_steps`, `fine_tune`: this package's recipes at their defaults.
* `adamw`, `sgd`: everything from the first step, one cosine; the rate is the best of three by validation accuracy.
* `lp_ft`: the head to convergence on stored features, then everything at one rate (Kumar et al. 2022).
* `logistic`: scikit-learn's logistic regression on pooled features, C by validation.
* `BackboneFinetuning`, `FinetuningScheduler`: five head epochs, seven of everything, at the peers' defaults.
* `fastai`: `fine_tune(11)` at its defaults, where `--fastai PYTHON` names an interpreter that has fastai 2.8.

Each line of the output is one run. Rates, spans and rules of this package's recipes were chosen on monkeys10 and rsscn7
(`recipe_choice.py`); the other sets confirm them or do not.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import math
import platform
import statistics
import subprocess
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from grid import read, run_all
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from torch.nn import functional as F

from lightning_unfreeze import (
    BestWeights,
    CosineRestarts,
    GradualUnfreeze,
    ImageFolderData,
    LRFinderPerStage,
    PrecomputeFeatures,
    Stage,
    TransferClassifier,
)

SETS = ("monkeys10", "rsscn7", "ants_bees", "flowers5", "dtd10")
CHOSEN_ON = ("monkeys10", "rsscn7")
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "mobilenetv2_035": ("mobilenetv2_035.keras_in1k.safetensors", {"pad_type": "same", "bn_eps": 1e-3}),
    "tf_efficientnet_lite0": ("tf_efficientnet_lite0.in1k.fp16.safetensors", {}),
}
EPOCHS = 12
RATES = {"adamw": (3e-4, 1e-3, 3e-3), "sgd": (0.01, 0.03, 0.1)}
Job = dict[str, Any]


class Plain(TransferClassifier):
    """The same network and steps with an optimizer and one cosine over all steps, as most tutorials have it."""

    peak, kind = 1e-3, "adamw"

    def configure_optimizers(self) -> Any:
        if self.kind == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), lr=self.peak)
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=self.peak, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Peer(TransferClassifier):
    """The module that `BackboneFinetuning` asks for: a `backbone`, and an optimizer of what trains at first."""

    @property
    def backbone(self) -> Any:
        head = self.model.get_classifier()
        return torch.nn.ModuleList([part for part in self.model.children() if part is not head])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


# --- one run ---------------------------------------------------------------------------------------------------------


class Setting:
    """What a job needs: data, modules, a Trainer, scores."""

    def __init__(self, job: Job, options: argparse.Namespace, folder: str) -> None:
        self.job, self.options, self.folder = job, options, folder
        root = options.data / job["set"]
        if job["per_class"]:
            root = few(root, job["per_class"], job["seed"], Path(folder) / "few")
        self.root = root
        self.notes: dict[str, Any] = {}  # what the row says beside the scores

    def data(self, **changes: Any) -> ImageFolderData:
        common = {"image_size_px": self.options.size_px, "data_config": HALF, "batch_size": 32}
        workers = {"num_workers": self.options.workers, "cache": "ram"}
        return ImageFolderData(str(self.root), seed=self.job["seed"], **{**common, **workers, **changes})

    def module(self, kind: Any = TransferClassifier) -> Any:
        file, arguments = BACKBONES[self.job["backbone"]]
        weights = str(self.options.data / "weights" / file)
        classes = sum(entry.is_dir() for entry in (self.root / "train").iterdir())
        pl.seed_everything(self.job["seed"], verbose=False)
        options: dict[str, Any] = {"pretrained": weights, "model_kwargs": arguments, "data_config": HALF}
        return kind(self.job["backbone"], num_classes=classes, **options)

    def trainer(self, callbacks: list[Callback], **options: Any) -> pl.Trainer:
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        device = {"accelerator": self.options.accelerator, "devices": 1, "precision": self.options.precision}
        where = {"default_root_dir": self.folder, "num_sanity_val_steps": 0, "enable_checkpointing": False}
        return pl.Trainer(callbacks=callbacks, **{**quiet, **device, **where, **options})

    def scores(self, module: Any) -> dict[str, float]:
        """Accuracy and NLL on validation images, and on test images where there are any."""
        device = torch.device(self.options.accelerator_device)
        data = self.data(augmentation="none", data_config=module.data_config)
        module.to(device).eval()
        found = {}
        for split in ("val", "test"):
            if not (self.root / split).is_dir():
                continue
            data.setup("fit" if split == "val" else "test")
            logits, labels = [], []
            with torch.inference_mode():
                for images, targets in data.val_dataloader() if split == "val" else data.test_dataloader():
                    logits.append(module(images.to(device)).float().cpu())
                    labels.append(targets)
            out, target = torch.cat(logits), torch.cat(labels)
            found[f"{split}_acc"] = float((out.argmax(1) == target).float().mean())
            found[f"{split}_nll"] = float(F.cross_entropy(out, target))
        return found


def few(root: Path, per_class: int, seed: int, out: Path) -> Path:
    """A folder of links with so many training images a class; the other splits whole."""
    for split in sorted(entry.name for entry in root.iterdir() if entry.is_dir()):
        for folder in sorted((root / split).iterdir()):
            files = sorted(folder.iterdir())
            if split == "train":
                drawn = np.random.default_rng([seed, len(files)]).permutation(len(files))[:per_class]
                files = [files[i] for i in sorted(drawn)]
            (out / split / folder.name).mkdir(parents=True, exist_ok=True)
            for file in files:
                (out / split / folder.name / file.name).symlink_to(file.resolve())
    return out


def staged(setting: Setting, callbacks: list[Callback]) -> Any:
    module = setting.module()
    setting.trainer(callbacks, enable_checkpointing=True).fit(module, datamodule=setting.data())
    for callback in callbacks:
        if isinstance(callback, LRFinderPerStage):
            rates = {name: test.suggestion for name, test in callback.results.items()}
            setting.notes["rates"] = {name: rate and float(f"{rate:.2g}") for name, rate in rates.items()}
        if isinstance(callback, BestWeights):
            setting.notes["path"] = {name: round(value, 4) for name, value in callback.scores.items()}
    return module


def nine_steps_arm(setting: Setting) -> Any:
    from lightning_unfreeze import nine_steps

    return staged(setting, nine_steps())


def fine_tune_arm(setting: Setting) -> Any:
    from lightning_unfreeze import fine_tune

    return staged(setting, fine_tune(EPOCHS - 1))


def plain_arm(kind: str) -> Callable[[Setting], Any]:
    def arm(setting: Setting) -> Any:
        best: tuple[float, Any] = (-1.0, None)
        for rate in RATES[kind]:
            module = setting.module(Plain)
            module.peak, module.kind = rate, kind
            # scored once, at the end
            setting.trainer([], max_epochs=EPOCHS, limit_val_batches=0).fit(module, datamodule=setting.data())
            accuracy = setting.scores(module)["val_acc"]
            if accuracy > best[0]:
                best = (accuracy, module)
        return best[1]

    return arm


def lp_ft_arm(setting: Setting) -> Any:
    plan = [
        Stage("head", train="head", epochs=30, precompute=True, lr=1e-3),
        Stage("full", cycle_len=EPOCHS - 1, lr=1e-4),
    ]
    return staged(setting, [GradualUnfreeze(plan), PrecomputeFeatures(policy="always"), CosineRestarts()])


def backbone_finetuning_arm(setting: Setting) -> Any:
    module = setting.module(Peer)
    setting.trainer([BackboneFinetuning(5)], max_epochs=EPOCHS).fit(module, datamodule=setting.data())
    return module


def scheduler_arm(setting: Setting) -> Any:
    from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint

    module = setting.module(Peer)
    head = [
        name for name, p in module.named_parameters() if any(p is q for q in module.model.get_classifier().parameters())
    ]
    rest = [name for name, _ in module.named_parameters() if name not in head]
    schedule = {
        0: {"params": head, "max_transition_epoch": 5},
        1: {"params": rest, "max_transition_epoch": EPOCHS},
    }
    callback = FinetuningScheduler(ft_schedule=schedule, epoch_transitions_only=True, logging_level=logging.ERROR)
    keep = FTSCheckpoint(setting.folder, monitor="val_loss")
    options: dict[str, Any] = {"max_epochs": EPOCHS, "enable_checkpointing": True}
    setting.trainer([callback, keep], **options).fit(module, datamodule=setting.data())
    return module


def logistic_arm(setting: Setting) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    module = setting.module().eval()
    data = setting.data(augmentation="none", cache=None, data_config=module.data_config)
    device = torch.device(setting.options.accelerator_device)
    network = module.model.to(device)

    def features(loader: Any) -> tuple[Any, Any]:
        rows, labels = [], []
        with torch.inference_mode():
            for images, targets in loader:
                maps = network.forward_features(images.to(device))
                rows.append(network.forward_head(maps, pre_logits=True).float().cpu().numpy())
                labels.append(targets.numpy())
        return np.concatenate(rows), np.concatenate(labels)

    data.setup("fit")
    x, y = features(data.train_dataloader())
    scale = StandardScaler().fit(x)
    splits = {"val": features(data.val_dataloader())}
    if (setting.root / "test").is_dir():
        data.setup("test")
        splits["test"] = features(data.test_dataloader())
    fits = [LogisticRegression(C=c, max_iter=2000).fit(scale.transform(x), y) for c in (1e-3, 1e-2, 1e-1, 1.0)]
    best = max(fits, key=lambda fit: fit.score(scale.transform(splits["val"][0]), splits["val"][1]))
    found = {}
    for split, (rows, labels) in splits.items():
        probabilities = best.predict_proba(scale.transform(rows))
        found[f"{split}_acc"] = float((probabilities.argmax(1) == labels).mean())
        found[f"{split}_nll"] = float(-np.log(probabilities[np.arange(len(labels)), labels] + 1e-12).mean())
    return found


FASTAI = """
import json, sys
import timm, torch
from fastai.vision.all import *
root, backbone, weights, arguments, size, seed = sys.argv[1:7]
set_seed(int(seed), reproducible=True)
dls = ImageDataLoaders.from_folder(root, train='train', valid='val', item_tfms=Resize(int(size)),
    batch_tfms=[*aug_transforms(), Normalize.from_stats([.5]*3, [.5]*3)], bs=32, num_workers=0, seed=int(seed))
overlay = {'file': weights, 'num_classes': 0}
body = lambda pretrained: timm.create_model(backbone, pretrained=True, num_classes=0, global_pool='',
    pretrained_cfg_overlay=overlay, **json.loads(arguments))
from fastai.vision.learner import create_head
network = body(True)
model = nn.Sequential(TimmBody(network), create_head(network.num_features, dls.c))
apply_init(model[1], nn.init.kaiming_normal_)
learn = Learner(dls, model, splitter=default_split, metrics=accuracy)
learn.fine_tune(11)
found = {}
import pathlib
for split in ('val', 'test'):
    if (pathlib.Path(root) / split).is_dir():
        dl = dls.test_dl(get_image_files(pathlib.Path(root) / split), with_labels=True)
        p, y = learn.get_preds(dl=dl)
        found[split + '_acc'] = float((p.argmax(1) == y).float().mean())
        found[split + '_nll'] = float(-p[range(len(y)), y].clamp_min(1e-12).log().mean())
print('FOUND ' + json.dumps(found))
"""


def fastai_arm(setting: Setting) -> dict[str, float]:
    file, arguments = BACKBONES[setting.job["backbone"]]
    weights = setting.options.data / "weights" / file
    words = [setting.root, setting.job["backbone"], weights, json.dumps(arguments), setting.options.size_px]
    command = [setting.options.fastai, "-c", FASTAI, *map(str, words), str(setting.job["seed"])]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in out.stdout.splitlines() if line.startswith("FOUND ")]
    if not lines:
        raise RuntimeError(out.stderr.strip()[-500:])
    found: dict[str, float] = json.loads(lines[0].removeprefix("FOUND "))
    return found


ARMS: dict[str, Callable[[Setting], Any]] = {
    "nine_steps": nine_steps_arm,
    "fine_tune": fine_tune_arm,
    "adamw": plain_arm("adamw"),
    "sgd": plain_arm("sgd"),
    "lp_ft": lp_ft_arm,
    "logistic": logistic_arm,
    "BackboneFinetuning": backbone_finetuning_arm,
    "FinetuningScheduler": scheduler_arm,
    "fastai": fastai_arm,
}
OURS = ("nine_steps", "fine_tune")


def run(job: Job, options: argparse.Namespace) -> Job:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(job, options, folder)
        made = ARMS[job["arm"]](setting)
        seconds = time.perf_counter() - start
        found = made if isinstance(made, dict) else setting.scores(made)
    where = torch.cuda.get_device_name() if options.accelerator_device == "cuda" else f"CPU, {platform.machine()}"
    tries = len(RATES.get(job["arm"], (0,)))
    return {
        **job,
        **found,
        **setting.notes,
        "seconds": round(seconds / tries, 2),
        "tries": tries,
        "on": where,
        "px": options.size_px,
    }


def runner(options: argparse.Namespace) -> Callable[[Job], Job]:
    return functools.partial(run, options=options)


NAMES = ("set", "backbone", "per_class", "arm", "seed")


def key(row: Job) -> str:
    return json.dumps([row[name] for name in NAMES])


# --- tables ----------------------------------------------------------------------------------------------------------


def report(rows: list[Job]) -> list[str]:
    """Accuracy by cell and arm; this package's rows against the best other one, with paired intervals over seeds."""
    score = {key(row): row.get("test_acc", row.get("val_acc")) for row in rows}
    cells = sorted({(row["set"], row["backbone"], row["per_class"] or 0) for row in rows})
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    seeds = sorted({row["seed"] for row in rows})
    on = sorted({row["on"] for row in rows})
    lines = [
        f"{len(rows)} runs, seeds {seeds}; {', '.join(on)}; {sorted({row['px'] for row in rows})} px, {EPOCHS} epochs "
        "of images, batch 32. Accuracy in percent, mean over the seeds; * scored on validation images (no others).",
        "",
        "| set, backbone, images a class | " + " | ".join(arms) + " |",
        "|---" * (len(arms) + 1) + "|",
    ]

    def values(cell: Any, arm: str) -> dict[int, float]:
        keyed = {
            seed: {"set": cell[0], "backbone": cell[1], "per_class": cell[2] or None, "arm": arm, "seed": seed}
            for seed in seeds
        }
        return {seed: score[key(job)] for seed, job in keyed.items() if key(job) in score}

    for cell in cells:
        tested = any("test_acc" in row for row in rows if row["set"] == cell[0])
        texts = []
        for arm in arms:
            found = values(cell, arm)
            texts.append(f"{100 * statistics.mean(found.values()):.1f}" if found else "")
        marks = ("" if tested else "*") + (" (chosen on)" if cell[0] in CHOSEN_ON else "")
        name = f"{cell[0]}{marks}, {cell[1]}, {cell[2] or 'all'}"
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    lines += ["", "| against | ours | mean difference, points [95 %] | cells | worst cell |", "|---|---|---|---|---|"]
    for ours, other in itertools.product(
        [arm for arm in OURS if arm in arms], [arm for arm in arms if arm not in OURS]
    ):
        means = []
        for cell in cells:
            mine, theirs = values(cell, ours), values(cell, other)
            both = sorted(mine.keys() & theirs.keys())
            if both:
                means.append(100 * statistics.mean(mine[seed] - theirs[seed] for seed in both))
        if not means:
            continue
        half = 1.96 * statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
        mean = statistics.mean(means)
        lines.append(
            f"| {other} | {ours} | {mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}] | {len(means)} "
            f"| {min(means):+.2f} |"
        )
    lines += ["", "| arm | seconds of a run, median (one rate) | NLL, mean |", "|---|---|---|"]
    by_arm: dict[str, list[Job]] = defaultdict(list)
    for row in rows:
        by_arm[row["arm"]].append(row)
    for arm in arms:
        losses = [row.get("test_nll", row.get("val_nll", math.nan)) for row in by_arm[arm]]
        seconds = statistics.median(row["seconds"] for row in by_arm[arm])
        lines.append(f"| {arm} | {seconds:.1f} | {statistics.mean(losses):.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("recipes.jsonl"))
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--backbones", nargs="*", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--per-class", nargs="*", type=int, default=[20, 0], help="training images a class, 0 for all")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=[arm for arm in ARMS if arm != "fastai"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--size-px", type=int, default=128)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no run begins after that")
    parser.add_argument("--fastai", help="an interpreter with fastai 2.8 and timm, for the arm of that name")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    options.accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    options.accelerator_device = options.accelerator
    options.precision = "bf16-mixed" if options.accelerator == "cuda" else "32-true"
    rows = read(options.out)
    if not options.report:
        if options.data is None:
            parser.error("give --data, or --report for the tables of what there is")
        names = ("seed", "per_class", "set", "backbone", "arm")
        grid = itertools.product(options.seeds, options.per_class, options.sets, options.backbones, options.arms)
        jobs = [dict(zip(names, values, strict=True)) for values in grid]
        jobs = [{**job, "per_class": job["per_class"] or None} for job in jobs]
        start = functools.partial(runner, options)
        rows = run_all(jobs, options.out, NAMES, start, options.processes, options.seconds)
    print("\n".join(report([row for row in rows if "error" not in row])))


if __name__ == "__main__":
    main()
