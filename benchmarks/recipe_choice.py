"""Which defaults the recipe should have: a grid of bare fine-tuning runs, many at a time on one card.

    python benchmarks/recipe_choice.py --data DATA --out results.jsonl --processes 12 --seconds 240

`DATA` holds the sets as folders (`monkeys10/train/...`, `rsscn7/...`) and `weights/`. Sets are read once, at 146 px,
and live as `uint8` on the device; a run is a plain PyTorch loop over them (random resized crop of 60 % and more and
mirroring, AdamW, no decay on vectors), so that hundreds of runs take minutes. All is judged on validation images; test
images are never read. Choices are made on monkeys10 (like ImageNet) and rsscn7 (unlike) alone.

Every line of the output is one run: its settings, validation accuracy per epoch, and of the weights along the path (the
model it started from, an average of the last epochs' ends, interpolations, BatchNorm estimated anew). A run whose line
is there is not run again; jobs are in an order in which an early stop leaves whole blocks.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from grid import read, run_all
from recipes import BACKBONES
from torch import Tensor, nn
from torch.nn import functional as F

SIZE, STORED = 128, 146


def jobs(block: str) -> list[dict[str, Any]]:
    """Settings of the runs of a block, the most telling first."""
    base = {"epochs": 8, "batch": 32, "lr": 1e-3, "span": 1 / 9, "bn": "train", "head": "solved", "schedule": "cosine"}
    cells = [
        {"data": data, "backbone": backbone, "per_class": per_class}
        for per_class in (20, None)
        for data in ("monkeys10", "rsscn7")
        for backbone in BACKBONES
    ]
    grids: dict[str, list[dict[str, Any]]] = {
        "rates": [
            {"bn": bn, "span": span, "lr": lr}
            for bn in ("train", "frozen", "slow")
            for span in (1.0, 1 / 9, 1 / 81)
            for lr in (3e-4, 1e-3, 3e-3)
        ],
        "heads": [
            {"head": head, "lr": lr}
            for head in ("small", "two_epochs", "five_epochs", "solved", "solved_early")
            for lr in (3e-4, 1e-3, 3e-3)
        ],
        "lengths": [
            {"schedule": schedule, "epochs": epochs, "lr": lr}
            for schedule, epochs in (("cosine", 7), ("cycles", 7), ("one_cycle", 7), ("cosine", 15), ("cycles", 15))
            for lr in (1e-3, 3e-3)
        ],
        "batches": [
            {"batch": batch, "bn": bn, "lr": lr}
            for batch in (8, 64)
            for bn in ("train", "frozen", "slow")
            for lr in (3e-4, 1e-3, 3e-3)
        ],
    }
    rows = []
    for seed in (0, 1):
        for setting, cell in itertools.product(grids[block], cells):
            rows.append({**base, **cell, **setting, "seed": seed})
    return rows


# --- one run ---------------------------------------------------------------------------------------------------------


class Sets:
    """Images of the sets on the device, and networks with their weights; one of each kind a process."""

    def __init__(self, root: Path, device: torch.device) -> None:
        self.root, self.device = root, device
        self._images: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def images(self, name: str, split: str) -> tuple[Tensor, Tensor]:
        if (name, split) not in self._images:
            packed = self.root / f"{name}.{split}.pt"
            pixels, labels = torch.load(packed) if packed.exists() else read_set(self.root / name / split)
            self._images[name, split] = pixels.to(self.device), labels.to(self.device)
        return self._images[name, split]

    def train(self, job: dict[str, Any]) -> tuple[Tensor, Tensor]:
        pixels, labels = self.images(job["data"], "train")
        if job["per_class"] is None:
            return pixels, labels
        generator = torch.Generator().manual_seed(job["seed"])
        drawn = []
        for label in range(int(labels.max()) + 1):
            where = (labels == label).nonzero().flatten().cpu()
            drawn.append(where[torch.randperm(len(where), generator=generator)[: job["per_class"]]])
        chosen = torch.cat(drawn).to(labels.device)
        return pixels[chosen], labels[chosen]


def read_set(folder: Path) -> tuple[Tensor, Tensor]:
    """All images of a split as `uint8` `(N, 3, 146, 146)`, and labels `(N,)`."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    shrink = v2.Compose([v2.Resize(STORED, antialias=True), v2.CenterCrop(STORED), v2.PILToTensor()])
    samples = ImageFolder(str(folder), shrink)
    pairs = [samples[i] for i in range(len(samples))]
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def normalised(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def centre(pixels: Tensor) -> Tensor:
    edge = (STORED - SIZE) // 2
    return normalised(pixels[..., edge : edge + SIZE, edge : edge + SIZE])


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Random resized crops (60 to 100 % of the area, aspect 3/4 to 4/3), half of them mirrored; one draw per image."""
    n, device = len(pixels), pixels.device
    uniform = torch.rand(5, n, generator=generator, device=device)
    area = 0.6 + 0.4 * uniform[0]
    aspect = torch.exp((2 * uniform[1] - 1) * math.log(4 / 3))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0] = width * torch.where(uniform[2] < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (2 * uniform[3] - 1) * (1 - width)
    theta[:, 1, 2] = (2 * uniform[4] - 1) * (1 - height)
    grid = F.affine_grid(theta, [n, 3, SIZE, SIZE], align_corners=False)
    return F.grid_sample(normalised(pixels), grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def make_network(root: Path, backbone: str, num_classes: int) -> Any:
    from lightning_unfreeze import TransferClassifier

    file, arguments = BACKBONES[backbone]
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    weights = str(root / "weights" / file)
    return TransferClassifier(backbone, num_classes, pretrained=weights, model_kwargs=arguments, data_config=half).model


@torch.no_grad()
def pooled(network: Any, pixels: Tensor) -> Tensor:
    network.eval()
    parts = [
        network.forward_head(network.forward_features(centre(part)), pre_logits=True) for part in pixels.split(256)
    ]
    return torch.cat(parts)


@torch.no_grad()
def scores(network: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy and mean negative log-likelihood."""
    network.eval()
    logits = torch.cat([network(centre(part)) for part in pixels.split(256)]).float()
    return float((logits.argmax(1) == labels).float().mean()), float(F.cross_entropy(logits, labels))


def solve_head(network: Any, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], stop_loss: float = 0.0) -> float:
    """Multinomial logistic regression on pooled features, the ridge by validation loss; returns its accuracy.

    With `stop_loss` the weakest regularised head is blended with zero until the training loss is that high
    (a head that is "stopped early", Ren et al. 2023).
    """
    x, y = pooled(network, train[0]), train[1]
    x_val, y_val = pooled(network, val[0]), val[1]
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    head, best = network.get_classifier(), None
    weight = torch.zeros_like(head.weight, requires_grad=True)
    bias = torch.zeros_like(head.bias, requires_grad=True)
    for ridge in (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001):
        solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

        def loss(ridge: float = ridge, solver: Any = solver) -> Tensor:
            solver.zero_grad()
            value = F.cross_entropy((x - mean) / spread @ weight.T + bias, y) + ridge / 2 * weight.square().sum() / len(
                weight
            )
            value.backward()
            return value

        solver.step(loss)
        with torch.no_grad():
            logits = (x_val - mean) / spread @ weight.T + bias
            nll = float(F.cross_entropy(logits, y_val))
            if best is None or nll < best[0]:
                accuracy = float((logits.argmax(1) == y_val).float().mean())
                best = (nll, accuracy, weight.detach().clone(), bias.detach().clone())
    _, accuracy, w, b = best
    with torch.no_grad():
        if stop_loss:
            scale = 1.0
            while scale > 0.01 and float(F.cross_entropy(((x - mean) / spread @ w.T + b) * scale, y)) < stop_loss:
                scale *= 0.8
            w, b = w * scale, b * scale
        head.weight.copy_(w / spread)
        head.bias.copy_(b - (w / spread) @ mean)
    return accuracy


def param_groups(network: nn.Module, lr: float, span: float) -> list[dict[str, Any]]:
    """One group per layer group and kind; rates geometric from `lr * span` at the input to `lr` at the head."""
    from lightning_unfreeze import layer_groups

    groups = list(layer_groups(network).values())
    rows = []
    for place, group in enumerate(groups):
        rate = lr * span ** (1 - place / (len(groups) - 1))
        for vectors, decay in ((False, 0.01), (True, 0.0)):
            parameters = [p for p in group if (p.ndim < 2) is vectors]
            if parameters:
                rows.append({"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay})
    return rows


def multiplier(schedule: str, t: float, epochs: int) -> float:
    """`t` in epochs."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * t / epochs))
    if schedule == "one_cycle":
        rise = 0.25 * epochs
        if t < rise:
            return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * t / rise))
        return 0.5 * (1 + math.cos(math.pi * (t - rise) / (epochs - rise)))
    start, length = 0.0, 1.0
    while t >= start + length:
        start, length = start + length, 2 * length
    return 0.5 * (1 + math.cos(math.pi * (t - start) / length))


def set_batch_norm(network: nn.Module, policy: str) -> None:
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if policy == "frozen":
                module.eval()
            elif policy == "slow":
                module.momentum = 0.01


def fit(network: Any, job: dict[str, Any], train: Any, groups: Any, epochs: int, schedule: str, seed: int) -> Any:
    """Yields after each epoch."""
    pixels, labels = train
    optimizer = torch.optim.AdamW(groups, foreach=True)
    order = torch.Generator().manual_seed(seed)
    draws = torch.Generator(device=pixels.device).manual_seed(seed)
    steps = max(1, len(pixels) // job["batch"])
    for epoch in range(epochs):
        set_batch_norm(network, job["bn"])
        shuffled = torch.randperm(len(pixels), generator=order).to(pixels.device)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * multiplier(schedule, epoch + step / steps, epochs)
            chosen = shuffled[step * job["batch"] : (step + 1) * job["batch"]]
            loss = F.cross_entropy(network(augmented(pixels[chosen], draws)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield epoch


def averaged(states: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    return {
        name: sum(w * state[name] for w, state in zip(weights, states, strict=True))
        if states[0][name].is_floating_point()
        else states[-1][name]
        for name in states[0]
    }


@torch.no_grad()
def estimate_batch_norm(network: nn.Module, pixels: Tensor) -> None:
    layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    network.train()
    for part in pixels.split(64):
        if len(part) > 1:
            network(centre(part))


def run(job: dict[str, Any], sets: Sets) -> dict[str, Any]:
    start = time.perf_counter()
    torch.manual_seed(job["seed"])
    train, val = sets.train(job), sets.images(job["data"], "val")
    network = make_network(sets.root, job["backbone"], int(val[1].max()) + 1).to(sets.device)
    if job["head"].startswith("solved"):
        solve_head(network, train, val, stop_loss=0.5 if job["head"].endswith("early") else 0.0)
    elif job["head"] != "small":
        epochs = {"two_epochs": 2, "five_epochs": 5}[job["head"]]
        network.requires_grad_(False)
        head = network.get_classifier().requires_grad_(True)
        groups = [{"params": list(head.parameters()), "lr": 3e-3, "peak": 3e-3}]
        for _ in fit(network, {**job, "bn": "frozen"}, train, groups, epochs, "cosine", job["seed"] + 1000):
            pass
        network.requires_grad_(True)
    before = copy.deepcopy(network.state_dict())
    accuracy_before, nll_before = scores(network, *val)
    curve, ends = [], []
    groups = param_groups(network, job["lr"], job["span"])
    for _ in fit(network, job, train, groups, job["epochs"], job["schedule"], job["seed"]):
        curve.append(scores(network, *val))
        ends.append({name: value.clone() for name, value in network.state_dict().items()})
    path = {}
    probe = copy.deepcopy(network)
    estimate_batch_norm(probe, train[0])
    path["re-estimated"] = scores(probe, *val)
    for name, states, weights in (
        ("wise .5", [before, ends[-1]], [0.5, 0.5]),
        ("wise .75", [before, ends[-1]], [0.25, 0.75]),
        ("mean of 3", ends[-3:], [1 / len(ends[-3:])] * len(ends[-3:])),
    ):
        probe.load_state_dict(averaged(states, weights))
        path[name] = scores(probe, *val)
    return {
        **job,
        "before": (accuracy_before, nll_before),
        "curve": curve,
        "path": path,
        "seconds": round(time.perf_counter() - start, 2),
    }


def runner(root: Path, device: str) -> Any:
    return functools.partial(run, sets=Sets(root, torch.device(device)))


NAMES = ("data", "backbone", "per_class", "epochs", "batch", "lr", "span", "bn", "head", "schedule", "seed")


def key(row: dict[str, Any]) -> str:
    return json.dumps([row[name] for name in NAMES])


# --- the table -------------------------------------------------------------------------------------------------------


def report(rows: list[dict[str, Any]], factor: tuple[str, ...]) -> list[str]:
    """Mean validation accuracy over cells and seeds of each setting, and the worst distance below a cell's best."""
    cells: dict[Any, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["data"], row["backbone"], row["per_class"]][tuple(row[name] for name in factor)].append(
            row["curve"][-1][0]
        )
    settings = sorted({setting for cell in cells.values() for setting in cell}, key=str)
    lines = [
        f"| {' | '.join(factor)} | mean | worst below the best | " + " | ".join(map(str, cells)) + " |",
        "|---" * (len(factor) + 2 + len(cells)) + "|",
    ]
    table = []
    for setting in settings:
        means = [statistics.mean(cell[setting]) if setting in cell else math.nan for cell in cells.values()]
        best = [max(statistics.mean(values) for values in cell.values()) for cell in cells.values()]
        below = max(b - m for b, m in zip(best, means, strict=True))
        table.append((statistics.mean(means), below, setting, means))
    for mean, below, setting, means in sorted(table, reverse=True):
        words = " | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in setting)
        lines.append(
            f"| {words} | {100 * mean:.1f} | {100 * below:.1f} | " + " | ".join(f"{100 * m:.1f}" for m in means) + " |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("recipe_choice.jsonl"))
    parser.add_argument("--blocks", nargs="*", default=["rates", "heads", "lengths", "batches"])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=240, help="no run begins after that")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backbones", nargs="*", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--per-class", nargs="*", choices=["20", "None"], default=["20", "None"])
    parser.add_argument("--most", type=int, help="runs at most, for a check of the script")
    parser.add_argument("--pack", action="store_true", help="only read the sets, into DATA/NAME.SPLIT.pt")
    options = parser.parse_args()
    if options.pack:
        for name, split in itertools.product(("monkeys10", "rsscn7"), ("train", "val")):
            torch.save(read_set(options.data / name / split), options.data / f"{name}.{split}.pt")
        return
    known = {key(row) for row in read(options.out)}
    todo = sorted((job for block in options.blocks for job in jobs(block)), key=lambda job: job["seed"])
    todo = [job for job in todo if job["backbone"] in options.backbones and str(job["per_class"]) in options.per_class]
    todo = [job for job in {key(job): job for job in todo}.values() if key(job) not in known][: options.most]
    start = functools.partial(runner, options.data, options.device)
    done = run_all(todo, options.out, NAMES, start, options.processes, options.seconds)
    done = [row for row in done if "error" not in row]
    for block, factor in (
        ("rates", ("bn", "span", "lr")),
        ("heads", ("head", "lr")),
        ("lengths", ("schedule", "epochs", "lr")),
        ("batches", ("batch", "bn", "lr")),
    ):
        wanted = {key(job) for job in jobs(block)}
        rows = [row for row in done if key(row) in wanted]
        if rows:
            print("", f"## {block}", "", *report(rows, factor), sep="\n")


if __name__ == "__main__":
    main()
