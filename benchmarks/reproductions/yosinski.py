"""R1: how transferable are features? (Yosinski et al. 2014), on half of CIFAR-10's classes at 16 px.

A network is trained on classes A and one on classes B. Its first n blocks start a network for B: kept as they are
(AnB, BnB) or trained on (AnB+, BnB+); RnB keeps n random blocks. Numbers are accuracy minus that of training on B.

    python benchmarks/reproductions/yosinski.py --config benchmarks/reproductions/yosinski.yaml

Rows that are in the folder already are not made again. `--data digits` is a smoke test, which proves nothing.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from cifar import DIGITS_NOTE, Data, TinyCNN, accuracy, halves, load, train, write_table
from jsonargparse import auto_cli

from lightning_unfreeze.seeding import keyed_rng
from lightning_unfreeze.study.judge.statistics import paired_t_interval

TREATMENTS = ("AnB", "AnB+", "BnB", "BnB+", "RnB")
SPLITS = {"random 0": halves(0), "random 1": halves(1), "dissimilar": ([0, 1, 8, 9], [2, 3, 4, 5, 6, 7])}
"""Classes A and B: two random halves, and vehicles against animals."""
BATCH_SIZE = 64
PILOT = {
    "random": {
        "baseB": (68.8,),
        "AnB": (2.9, 2.5, 1.6, -1.3, -9.3),
        "AnB+": (2.9, 4.0, 4.1, 4.5, 4.1),
        "BnB": (1.4, 0.9, 0.3, 0.2, 0.1),
        "BnB+": (1.5, 1.4, 2.4, 2.3, 2.1),
        "RnB": (-2.3, -5.7, -10.1, -13.1, -20.5),
    },
    "dissimilar": {
        "baseB": (56.5,),
        "AnB": (1.3, 0.5, -3.2, -6.4, -14.9),
        "AnB+": (1.8, 2.9, 2.8, 2.3, 2.9),
    },
}
"""Differences to baseB of the pilot for n = 1 to 5: 2 seeds of each split, prototype code."""


def reproduce(
    data: str = "digits",
    out: Path = Path("runs/yosinski"),
    splits: Sequence[str] = ("random 0", "random 1"),
    seeds: int = 1,
    seed_base: int = 1000,
    depths: Sequence[int] = (1, 3, 5),
    treatments: Sequence[str] = TREATMENTS,
    epochs: tuple[int, int] = (12, 20),
    per_class: tuple[int | None, int | None] = (5000, 500),
    threads: int = 1,
) -> list[dict[str, str]]:
    """Train all networks; write a row per split and seed to `runs.csv`, and the means to `means.md`.

    Args:
        data: npz file, `cifar10`, or `digits` for a smoke test.
        out: Folder of the tables.
        splits: Of random 0, random 1, dissimilar.
        seeds: Seeds of each split.
        seed_base: The first of them; the pilot had those from 0 on.
        depths: Numbers n of blocks.
        treatments: Of AnB, AnB+, BnB, BnB+, RnB.
        epochs: Of a network for A, for B.
        per_class: Training images of A, of B.
        threads: Threads of torch.
    """
    torch.set_num_threads(threads)
    images, path = load(data), out / "runs.csv"
    rows: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    for seed in range(seed_base, seed_base + seeds):
        for split in splits:
            if any((row["split"], row["seed"]) == (split, str(seed)) for row in rows):
                continue
            row = {"split": split, "seed": str(seed)}
            for name, value in transfer(images, SPLITS[split], seed, depths, treatments, epochs, per_class):
                row[name] = f"{value:.2f}"
                print(split, seed, name, row[name], flush=True)
            rows.append(row)
            write_table(rows, path)
    note = DIGITS_NOTE if data == "digits" else "Points, difference to baseB; in brackets the pilot's."
    print(write_table(means(rows, depths, treatments), out / "means.md", note))
    return rows


def transfer(
    data: Data,
    classes: tuple[list[int], list[int]],
    seed: int,
    depths: Sequence[int],
    treatments: Sequence[str],
    epochs: tuple[int, int],
    per_class: tuple[int | None, int | None],
) -> Iterator[tuple[str, float]]:
    """Yield the accuracy of `baseB`, then each treatment's less that, e.g. of `AnB+ 3`."""
    a, b = classes

    def network(num_classes: int) -> TinyCNN:
        with keyed_rng("init", seed):
            return TinyCNN(num_classes, data.num_channels, data.augment)

    base_a, base_b = network(len(a)), network(len(b))
    target, test = data.of_classes("train", b, per_class[1]), data.of_classes("test", b)
    train(base_b, target, epochs[1], seed, BATCH_SIZE)
    base = accuracy(base_b, test)
    yield "baseB", base
    if any(name.startswith("A") for name in treatments):
        train(base_a, data.of_classes("train", a, per_class[0]), epochs[0], seed, 2 * BATCH_SIZE)
    for n in depths:
        for treatment in treatments:
            module = network(len(b))
            donor = {"A": base_a, "B": base_b, "R": module}[treatment[0]]
            module.blocks[:n].load_state_dict(donor.blocks[:n].state_dict())
            # the same order, crops and rest of the network in all treatments
            train(module, target, epochs[1], seed, BATCH_SIZE, frozen=0 if treatment.endswith("+") else n)
            yield f"{treatment} {n}", accuracy(module, test) - base


def means(rows: Sequence[dict[str, str]], depths: Sequence[int], treatments: Sequence[str]) -> list[dict[str, str]]:
    """Return a row per kind of split and treatment: means over splits and seeds, the pilot's, and 95 % intervals."""
    table = []
    for kind in ("random", "dissimilar"):
        of_kind = [row for row in rows if row["split"].startswith(kind)]
        for treatment in treatments if of_kind else ():
            base = np.mean([float(row["baseB"]) for row in of_kind])
            cells = {"split": kind, "networks": str(len(of_kind)), "baseB": f"{base:.1f}", "treatment": treatment}
            for n in depths:
                found = paired_t_interval([float(row[f"{treatment} {n}"]) for row in of_kind])
                spread = f" ±{found.high - found.mean:.1f}" if len(of_kind) > 1 else ""
                pilot = PILOT[kind].get(treatment)
                cells[f"n={n}"] = f"{found.mean:+.1f}{spread}" + (f" ({pilot[n - 1]:+.1f})" if pilot else "")
            table.append(cells)
    return table


if __name__ == "__main__":
    auto_cli(reproduce, as_positional=False)
