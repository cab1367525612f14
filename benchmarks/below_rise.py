"""How far below the rise of a range test does the best rate lie, and does a short trial of each rate find it?

    python benchmarks/below_rise.py --data DATA --out cells.jsonl           # measures the cells that the file lacks
    python benchmarks/below_rise.py --out cells.jsonl --report              # only the table, with today's rule
    python benchmarks/below_rise.py --data DATA --out warmed.jsonl --warmup 0 0.1 0.3 --rates 3e-4 1e-3 2e-3

A cell is a set, training images a class, a batch size and a seed. Its network starts from a head that is solved on
four views an image, with the statistics of BatchNorm kept and a span of 1/9 over the layer groups, as in the recipes. A
range test (100 steps from 1e-6 to 1) gives the rate at which the loss rises; then every rate of a grid is trained from
the same weights: for 12, 25 and 50 steps (a short trial) and for the epochs of a stage, each with one cosine to zero.
All is judged on validation images; no other set than monkeys10 and rsscn7 is read.

With `--warmup` only the long trainings are run, with so much of the cosine spent on a linear rise to each of `--rates`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import recipe_choice
import torch
from recipe_choice import augmented, centre, make_network, param_groups, scores, set_batch_norm
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_unfreeze.callbacks.lr_finder import RangeTest
from lightning_unfreeze.features.solve import HeadRows, solve_head
from lightning_unfreeze.stages.range_test_rules import debiased_ema, diverged, exponential_ramp
from lightning_unfreeze.stages.schedules import cosine_restarts

recipe_choice.SIZE, recipe_choice.STORED = 96, 112
SPAN, BACKBONE = 1 / 9, "mobilenetv2_035"
GRID, TRIALS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3), (12, 25, 50)
CELLS = [  # set, training images a class, batch, seed
    ("rsscn7", None, 32, 0),
    ("rsscn7", 20, 32, 0),
    ("monkeys10", 20, 32, 0),
    ("monkeys10", None, 32, 0),
    ("rsscn7", 20, 32, 1),
    ("monkeys10", 20, 32, 1),
    ("rsscn7", 20, 8, 0),
    ("monkeys10", 20, 8, 0),
]
Images = tuple[Tensor, Tensor]


def epochs_of(per_class: int | None) -> int:
    return 12 if per_class else 7


def steps(network: nn.Module, train: Images, batch: int, seed: int, rates: list[float]) -> Iterator[float]:
    """Trains the network by one step per rate; yields the loss before each."""
    set_batch_norm(network, "frozen")
    optimizer = torch.optim.AdamW(param_groups(network, 1.0, SPAN))
    order, draws = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    pixels, labels = train
    left: list[int] = []
    for rate in rates:
        if len(left) < batch:
            left += torch.randperm(len(pixels), generator=order).tolist()
        chosen, left = torch.tensor(left[:batch]), left[batch:]
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        loss = F.cross_entropy(network(augmented(pixels[chosen], draws)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield float(loss)


def range_test(network: nn.Module, train: Images, batch: int, seed: int) -> tuple[list[float], list[float]]:
    """Ends where that of `LRFinderPerStage` does."""
    rates, losses = exponential_ramp(1e-6, 1, 100).tolist(), []
    for loss in steps(copy.deepcopy(network), train, batch, seed + 7, rates):
        losses.append(loss)
        if not np.isfinite(loss) or diverged(debiased_ema(losses, 0.98)[10:]):
            break
    return rates[: len(losses)], losses


def trained(
    network: nn.Module,
    train: Images,
    val: Images,
    rate: float,
    num: int,
    batch: int,
    seed: int,
    warmup: float = 0.0,
) -> tuple[float, float]:
    """Validation accuracy and loss after so many steps."""
    network = copy.deepcopy(network)
    cosine = [rate * cosine_restarts(float(step), num, warmup=warmup) for step in range(num)]
    for _ in steps(network, train, batch, seed, cosine):
        pass
    return scores(network, *val)


def solved(network: Any, train: Images, val: Images, seed: int) -> None:
    """Gives the network a head that is solved on each image as it is and three draws of its augmentation."""
    network.eval()
    draws = torch.Generator().manual_seed(seed + 99)

    def rows(views: list[Tensor]) -> Tensor:
        with torch.no_grad():
            maps = [network.forward_features(view) for view in views]
            return torch.cat([network.forward_head(one, pre_logits=True) for one in maps])

    pixels, labels = train
    views = [rows([centre(part) for part in pixels.split(128)])]
    views += [rows([augmented(part, draws) for part in pixels.split(128)]) for _ in range(3)]
    judged = HeadRows(rows([centre(part) for part in val[0].split(128)]), val[1])
    found = solve_head(HeadRows(torch.cat(views), labels.repeat(4)), judged, num_classes=int(val[1].max()) + 1)
    head = network.get_classifier()
    with torch.no_grad():
        head.weight.copy_(found.weight)
        head.bias.copy_(found.bias)


Cell = tuple[str, "int | None", int, int]


def start_of(sets: recipe_choice.Sets, cell: Cell) -> tuple[nn.Module, Images, Images]:
    """The network with its solved head, the training images, the validation images."""
    name, per_class, _, seed = cell
    torch.manual_seed(seed)
    train, val = sets.train({"data": name, "per_class": per_class, "seed": seed}), sets.images(name, "val")
    network = make_network(sets.root, BACKBONE, int(val[1].max()) + 1)
    solved(network, train, val, seed)
    return network, train, val


def measure(sets: recipe_choice.Sets, cell: Cell) -> dict[str, Any]:
    _, per_class, batch, seed = cell
    start = time.perf_counter()
    network, train, val = start_of(sets, cell)
    row: dict[str, Any] = {"key": cell, "n": len(train[0]), "start": scores(network, *val)}
    row["ramp"] = range_test(network, train, batch, seed)
    row["trials"] = {
        f"{num},{rate:g}": trained(network, train, val, rate, num, batch, seed + 3) for num in TRIALS for rate in GRID
    }
    num = epochs_of(per_class) * (len(train[0]) // batch)
    row["grid"] = {f"{rate:g}": trained(network, train, val, rate, num, batch, seed) for rate in GRID}
    return row | {"seconds": time.perf_counter() - start}


def measure_warmed(sets: recipe_choice.Sets, cell: Cell, shares: list[float], rates: list[float]) -> dict[str, Any]:
    network, train, val = start_of(sets, cell)
    num = epochs_of(cell[1]) * (len(train[0]) // cell[2])
    scored = {
        f"{share:g},{rate:g}": trained(network, train, val, rate, num, cell[2], cell[3], share)
        for share in shares
        for rate in rates
    }
    return {"key": cell, "n": len(train[0]), "warmed": scored}


def report_warmed(rows: list[dict[str, Any]]) -> str:
    columns = sorted({tuple(map(float, name.split(","))) for row in rows for name in row["warmed"]})
    head = ["set", "images a class", "seed", *(f"{share:g}, {rate:g}" for share, rate in columns)]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row["warmed"].get(f"{share:g},{rate:g}") for share, rate in columns]
        shown = ["" if cell is None else f"{100 * cell[0]:.1f}, {cell[1]:.2f}" for cell in cells]
        lines.append([row["key"][0], str(row["key"][1] or "all"), str(row["key"][3]), *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


COLUMNS = (
    "set",
    "images a class",
    "batch",
    "seed",
    "steps",
    "start: accuracy, loss",
    "lowest loss of the grid",
    f"accuracy at {', '.join(f'{rate:g}' for rate in GRID)}",
    f"lowest loss after {', '.join(map(str, TRIALS))} steps",
    "rise",
    "suggested",
    "points short",
)


def report(rows: list[dict[str, Any]]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in rows:
        name, per_class, batch, seed = row["key"]
        losses = {float(rate): scored[1] for rate, scored in row["grid"].items()}
        accuracies = [row["grid"][f"{rate:g}"][0] for rate in GRID]
        best = min(losses, key=lambda rate: losses[rate])
        trials = [np.argmin([row["trials"][f"{num},{rate:g}"][1] for rate in GRID]) for num in TRIALS]
        num = epochs_of(per_class) * (row["n"] // batch)
        answer = RangeTest(*row["ramp"], "below_rise", num).answer()
        short = max(accuracies) - float(np.interp(np.log(answer.rate), np.log(GRID), accuracies))
        cells = [name, per_class or "all", batch, seed, num, f"{row['start'][0]:.3f}, {row['start'][1]:.2f}"]
        cells += [f"{losses[best]:.2f} at {best:g}", ", ".join(f"{100 * value:.1f}" for value in accuracies)]
        cells += [", ".join(f"at {GRID[index]:g}" for index in trials), f"{answer.rise:.1e}", f"{answer.rate:.1e}"]
        lines.append((*map(str, cells), f"{100 * short:.1f}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--most", type=int, help="cells at most, for a check of the script")
    parser.add_argument("--warmup", type=float, nargs="*", help="shares of the cosine; then no range test, no trials")
    parser.add_argument("--rates", type=float, nargs="*", default=GRID)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if not options.report:
        torch.set_num_threads(1)
        sets, done = recipe_choice.Sets(options.data, torch.device("cpu")), {tuple(row["key"]) for row in rows}
        for cell in [cell for cell in CELLS if cell not in done][: options.most]:
            warmed = options.warmup is not None
            rows.append(measure_warmed(sets, cell, options.warmup, options.rates) if warmed else measure(sets, cell))
            with options.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(report_warmed(rows) if rows and "warmed" in rows[0] else report(rows))


if __name__ == "__main__":
    main()
