"""R0: why not skip to unfreezing all layers? The seed's question, on half of CIFAR-10's classes at 16 px.

A network learns five classes; the study then drops steps of the transfer to the other five, with 500 training images
of them and paired seeds. The prediction is that of the forum thread (see the README): without the two head-only steps
training takes longer, and ends at the same accuracy.

    python benchmarks/reproductions/skip_to_unfreezing.py --config benchmarks/reproductions/skip_to_unfreezing.yaml

A study that was interrupted goes on. `--data digits` is a smoke test, which proves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar import DIGITS_NOTE, Transfer, write_table
from jsonargparse import auto_cli

from lightning_unfreeze.study.design.arms import Recipe
from lightning_unfreeze.study.runner import Study
from lightning_unfreeze.study.show.result import StudyResult

PILOT = {
    "full9": (64.78, None),
    "skip3": (64.00, "-0.78 [-1.15, -0.41]"),
    "skip4": (63.60, "-1.18 [-1.56, -0.80]"),
    "skip34@epochs": (62.31, "-2.47 [-2.97, -1.97]"),
    "skip34@flops": (64.86, "+0.09 [-0.40, +0.58]"),
    "skip34@images": (65.76, "+0.99 [+0.67, +1.31]"),
    "uniform": (64.63, "-0.15 [-0.59, +0.29]"),
    "skip34+uniform@flops": (64.60, "-0.18 [-0.55, +0.19]"),
    "gradual": (64.30, "-0.48 [-0.89, -0.07]"),
    "lp_ft": (64.36, "-0.42 [-1.07, +0.23]"),
    "lp_only": (57.84, "-6.94 [-7.51, -6.37]"),
    "surgical_first": (59.6, "-5.17"),
    "surgical_middle": (64.9, "+0.14"),
    "surgical_last": (62.9, "-1.86"),
    "scratch@images": (59.1, "-5.64"),
    "scratch@5x": (62.4, "-2.37"),
}
"""Accuracy and difference to full9 of the pilot: 20 seeds, prototype code, rates up to 0.3."""


def reproduce(
    data: str = "digits",
    out: Path = Path("runs/skip_to_unfreezing"),
    arms: str = "core",
    seeds: int = 12,
    first_seed: int = 1000,
    tuning_seeds: int = 2,
    recipe: Recipe | None = None,
    lr_grid: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0),
    train_size: int = 500,
    val_per_class: int = 200,
    source_epochs: int = 15,
    source_per_class: int | None = None,
    threads: int = 1,
) -> StudyResult:
    """Run the study and write `arms.csv` and `arms.md` beside its report.

    Args:
        data: npz file, `cifar10`, or `digits` for a smoke test.
        out: Folder of the study.
        arms: As for `lightning-unfreeze study`.
        seeds: Number of paired seeds.
        first_seed: The first of them; the pilot had those from 0 on.
        tuning_seeds: Seeds of tuning.
        recipe: Lengths of the whole recipe; `--recipe.num_cycles 5` is a long schedule.
        lr_grid: Rates that are tried for every arm, and for the head.
        train_size: Training images of the target.
        val_per_class: Validation images.
        source_epochs: Epochs of the source model.
        source_per_class: Training images of the source model; null takes all.
        threads: Threads of torch.
    """
    torch.set_num_threads(threads)
    transfer = Transfer(data, out, source_epochs, source_per_class=source_per_class, val_per_class=val_per_class)
    study = Study(
        transfer.model_fn,
        transfer.datamodule_fn,
        arms=arms,
        seeds=range(first_seed, first_seed + seeds),
        out=out,
        recipe=recipe,
        lr_grid=lr_grid,
        head_lr_grid=lr_grid,
        tuning_seeds=tuning_seeds,
        train_size=train_size,
        dataset=f"{Path(data).stem}, five classes",
        pretrained_on="the other five classes",
        threads=threads,
        trainer={"accelerator": "cpu"},
        progress=False,
    )
    for sentence in study.plan().sentences():
        print(sentence, flush=True)
    result = study.run()
    note = DIGITS_NOTE if data == "digits" else ""
    print(write_table(rows_of(result), out / "arms.md", note))
    print(result.verdict().text)
    return result


def rows_of(result: StudyResult) -> list[dict[str, Any]]:
    """Return a row per arm, with the pilot's numbers beside it."""
    compared = {row["arm"]: row for row in result.table().to_dict("records")}
    rows = []
    for arm in result.info.arms:
        runs = [record for record in result.records if record.arm == arm]
        found = compared.get(arm)
        pilot = PILOT.get(arm, ("", ""))
        rows.append(
            {
                "arm": arm,
                "accuracy": f"{100 * np.mean([run.acc for run in runs]):.2f}",
                "vs full9": "-" if found is None else difference(found),
                "paired SD": "-" if found is None else f"{found['sd']:.2f}",
                "with TTA": f"{100 * np.mean([run.acc_tta for run in runs]):.2f}",
                "images": runs[0].images,
                "GFLOP": f"{runs[0].flops / 1e9:.1f}",
                "CKA": f"{np.mean([run.distortion['cka'] for run in runs]):.2f}",
                "peak LR": f"{runs[0].tuned_lr:g}{' (edge)' if runs[0].lr_at_grid_edge else ''}",
                "pilot": pilot[0],
                "pilot vs full9": pilot[1] or "-",
            }
        )
    return rows


def difference(row: dict[str, Any]) -> str:
    """Return a paired difference with its interval."""
    return f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"


if __name__ == "__main__":
    auto_cli(reproduce, as_positional=False)
