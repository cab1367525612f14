"""R2b: does fine-tuning distort good features? (Kumar et al. 2022), on half of CIFAR-10's classes at 16 px.

The source model saw corrupted images too, so its features are good in and out of distribution. The target is clean:
linear probing (LP), fine-tuning (FT), or one after the other (LP-FT), with the learning rate and the BatchNorm policy
as factors. ID is the clean test set, OOD the mean over four corruptions of it.

    python benchmarks/reproductions/lp_ft.py --config benchmarks/reproductions/lp_ft.yaml

A study that was interrupted goes on. `--data digits` is a smoke test, which proves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from cifar import DIGITS_NOTE, Transfer, write_table
from jsonargparse import auto_cli

from lightning_unfreeze import Stage
from lightning_unfreeze.study.design.arms import Arm, Recipe
from lightning_unfreeze.study.judge.statistics import paired_t_interval
from lightning_unfreeze.study.runner import Study
from lightning_unfreeze.study.runs.records import RunRecord

BATCH_NORM = ("train", "frozen")
PILOT = {
    ("0.01", "train"): ("+5.3", "+2.4"),
    ("0.03", "train"): ("+2.2", "-0.6"),
    ("0.1", "train"): ("+0.2", "-1.0"),
    ("0.01", "frozen"): ("+3.9", "+2.3"),
    ("0.03", "frozen"): ("+1.3", "0.0"),
    ("0.1", "frozen"): ("diverges", "diverges"),
}
"""LP-FT minus FT, in and out of distribution, of the pilot: 4 seeds, 100 images a class, prototype code."""


def arms_of(
    lrs: Sequence[float], batch_norm: Sequence[str], head_lr: float, head_epochs: int, full_epochs: int
) -> list[Arm]:
    """Return LP, and FT and LP-FT for every rate and BatchNorm policy."""
    head = Stage("head", "head", cycle_len=head_epochs, precompute=True)
    full = Stage("full", cycle_len=full_epochs)
    return [
        Arm("LP", (head,), rate="fixed", fixed=(head_lr, head_lr)),
        *(
            Arm(
                f"{name} {lr:g} BN {policy}",
                stages,
                rate="fixed",
                fixed=(head_lr, lr),
                other_batch_norm=policy == "frozen",
            )
            for lr in lrs
            for policy in batch_norm
            for name, stages in (("FT", (full,)), ("LP-FT", (head, full)))
        ),
    ]


def reproduce(
    data: str = "digits",
    out: Path = Path("runs/lp_ft"),
    seeds: int = 6,
    first_seed: int = 1000,
    lrs: Sequence[float] = (0.01, 0.03, 0.1),
    batch_norm: Sequence[str] = BATCH_NORM,
    head_lr: float = 0.3,
    head_epochs: int = 30,
    full_epochs: int = 15,
    train_size: int = 500,
    val_per_class: int = 100,
    test_per_class: int | None = None,
    recipe: Recipe | None = None,
    source_epochs: int = 20,
    source_per_class: int | None = None,
    threads: int = 1,
) -> tuple[RunRecord, ...]:
    """Run the study, and write `arms.md` and `differences.md` beside its report.

    Args:
        data: npz file, `cifar10`, or `digits` for a smoke test.
        out: Folder of the study.
        seeds: Number of paired seeds.
        first_seed: The first of them; the pilot had those from 0 on.
        lrs: Peak rates of fine-tuning, the same for all layers.
        batch_norm: Policies of BatchNorm in fine-tuning: train, frozen.
        head_lr: Peak rate of the head alone.
        head_epochs: Epochs of the head alone, on stored features.
        full_epochs: Epochs of fine-tuning, one cosine cycle.
        train_size: Training images of the target.
        val_per_class: Validation images; features are compared on 128 of them.
        test_per_class: Test images; null takes all.
        recipe: Of the two arms that every study has beside these.
        source_epochs: Epochs of the source model.
        source_per_class: Training images of the source model; null takes all.
        threads: Threads of torch.
    """
    torch.set_num_threads(threads)
    transfer = Transfer(
        data,
        out,
        source_epochs,
        corruptions=True,
        source_per_class=source_per_class,
        val_per_class=val_per_class,
        test_per_class=test_per_class,
    )
    # every study has the two arms of the forum's question: here with one middle rate
    study = Study(
        transfer.model_fn,
        transfer.datamodule_fn,
        arms=arms_of(lrs, batch_norm, head_lr, head_epochs, full_epochs),
        seeds=range(first_seed, first_seed + seeds),
        out=out,
        lr_grid=[0.1],
        head_lr_grid=[head_lr],
        tuning_seeds=1,
        recipe=recipe,
        train_size=train_size,
        shifts=True,
        dataset=f"{Path(data).stem}, five classes",
        pretrained_on="the other five classes, corrupted too",
        threads=threads,
        trainer={"accelerator": "cpu"},
        progress=False,
    )
    result = study.run()
    note = DIGITS_NOTE if data == "digits" else ""
    runs: dict[str, dict[int, RunRecord]] = {}
    for record in result.records:
        runs.setdefault(record.arm, {})[record.seed] = record
    print(write_table([row_of(arm, list(runs[arm].values())) for arm in result.info.arms], out / "arms.md", note))
    rows = [difference_of(runs, f"{lr:g}", policy) for lr in lrs for policy in batch_norm]
    print(write_table(rows, out / "differences.md", note))
    return result.records


def row_of(arm: str, runs: Sequence[RunRecord]) -> dict[str, str]:
    """Return an arm's means."""

    def mean(values: Sequence[float | None], scale: float) -> str:
        return f"{scale * np.mean(values):.2f}"

    return {
        "arm": arm,
        "seeds": str(len(runs)),
        "ID": mean([run.acc for run in runs], 100),
        "OOD": mean([run.acc_ood for run in runs], 100),
        "displacement": mean([run.distortion["displacement"] for run in runs], 1),
        "CKA": mean([run.distortion["cka"] for run in runs], 1),
    }


def difference_of(runs: Mapping[str, Mapping[int, RunRecord]], lr: str, policy: str) -> dict[str, str]:
    """Return LP-FT minus FT at one rate and policy, with 95 % intervals over seeds and the pilot's numbers."""
    ft, lp_ft = (runs[f"{name} {lr} BN {policy}"] for name in ("FT", "LP-FT"))
    row = {"LR": lr, "BN": policy}
    for column, field in (("ID", "acc"), ("OOD", "acc_ood")):
        found = paired_t_interval([100 * (getattr(lp_ft[s], field) - getattr(ft[s], field)) for s in ft])
        row[f"{column}: LP-FT minus FT"] = f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
    moved = [run.distortion["displacement"] for run in (*ft.values(), *lp_ft.values())]
    row["displacement FT, LP-FT"] = f"{np.mean(moved[: len(ft)]):.2f}, {np.mean(moved[len(ft) :]):.2f}"
    row["pilot ID"], row["pilot OOD"] = PILOT.get((lr, policy), ("", ""))
    return row


if __name__ == "__main__":
    auto_cli(reproduce, as_positional=False)
