"""One run of the study: one `Trainer.fit` with the package's own callbacks, and one look at the images it is scored on.

A run is a function of its `Task` alone: in this process, in another one, today or after a kill.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_unfreeze.callbacks.precompute import PrecomputeFeatures
from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.tta import TTAEval
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.seeding import keyed_rng
from lightning_unfreeze.study.design.arms import BatchNormPolicy
from lightning_unfreeze.study.design.data import StudyData
from lightning_unfreeze.study.design.shifts import SHIFTS, ShiftImages
from lightning_unfreeze.study.runs.bench import Bench, Task
from lightning_unfreeze.study.runs.costs import Costs
from lightning_unfreeze.study.runs.recorder import CountingFinder, DistortionWatch, RunRecorder
from lightning_unfreeze.study.runs.records import RunRecord, pack_correct
from lightning_unfreeze.tta.result import TTAResult

VERSIONED = ("torch", "torchvision", "timm", "lightning")
"""Packages of which another version may give another result."""
_PROBE_SECONDS = 0.05


def execute(task: Task, bench: Bench, costs: Costs) -> RunRecord:
    """Train, score once, and return the record; a function of its arguments, but for the seconds.

    Args:
        task: The run.
        bench: What all runs share.
        costs: Of the kinds of stages, for the axes of the curve.
    """
    with _threads(bench.threads), _quiet(), keyed_rng("run", task.seed), tempfile.TemporaryDirectory() as folder:
        return _execute(task, bench, costs, folder)


def _execute(task: Task, bench: Bench, costs: Costs, folder: str) -> RunRecord:
    probe = images_per_second()
    start = time.perf_counter()
    module = bench.module(task.seed, task.arm.pretrained)
    data = bench.data(task.seed, task.arm.augmentation)
    recorder = RunRecorder(bench.monitor, costs)
    finder = recorder.finder = CountingFinder(num_steps=bench.find_steps)
    moved = DistortionWatch(bench.distortion_images, bench.network)
    policy = trains_batch_norm(bench.batch_norm, task.arm.other_batch_norm)
    callbacks: list[Callback] = [
        GradualUnfreeze(list(task.stages), bench.network, train_bn=policy),
        # a store of its own: a run that found another one's features would not show what they cost
        PrecomputeFeatures(store_dir=folder, policy="always"),
        finder,
        CosineRestarts(),
        moved,
        recorder,
    ]
    trainer = pl.Trainer(**{**bench.trainer_options, "callbacks": callbacks})
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(module, datamodule=data)
    looked = time.perf_counter()
    result = _score(task.scored_on, module, data, bench)
    shifted = (
        {name: _score("test", module, data, bench, name).correct_plain for name in SHIFTS}
        if bench.shifts and task.scored_on == "test"
        else {}
    )
    correct = result.correct_plain
    return RunRecord(
        key=task.key,
        arm=task.label,
        seed=task.seed,
        dataset=bench.dataset,
        acc=correct.double().mean().item(),
        n_test=len(correct),
        correct=pack_correct(correct.numpy()),
        images=recorder.images,
        flops=recorder.flops,
        seconds=time.perf_counter() - start,
        curve=tuple(recorder.curve),
        acc_tta=result.correct.double().mean().item(),
        tta_fixed=int((result.correct & ~correct).sum()),
        tta_broken=int((correct & ~result.correct).sum()),
        nll=_finite(result.metrics["val_nll_plain"]),
        ece=_finite(result.metrics["val_ece_plain"]),
        lr_trace={group: tuple(trace) for group, trace in recorder.rates.items()},
        train_seconds=recorder.train_seconds,
        eval_seconds=recorder.eval_seconds + time.perf_counter() - looked,
        lr_find_seconds=finder.seconds,
        distortion=moved.found,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        probe_images_per_second=probe,
        acc_ood=float(torch.stack(list(shifted.values())).double().mean()) if shifted else None,
        correct_shifted={name: pack_correct(right.numpy()) for name, right in shifted.items()},
        environment={"device": _device_name(trainer), "optimizer": recorder.optimizer, **versions()},
        code_version=bench.code_version,
        **({"tuned_lr": task.rate} | dict(task.tuning or {})),
    )


def images_per_second() -> float:
    """Return the throughput of a small convolution, forward and backward: how busy the machine is just now."""
    images, kernel = torch.ones(16, 8, 32, 32), torch.full((16, 8, 3, 3), 0.1, requires_grad=True)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < _PROBE_SECONDS:
        nn.functional.conv2d(images, kernel).sum().backward()  # type: ignore[no-untyped-call]
        done += len(images)
    return done / (time.perf_counter() - start)


def trains_batch_norm(policy: BatchNormPolicy, other: bool) -> bool:
    """Return whether unfrozen BatchNorm moves its statistics, under the policy or the other one.

    >>> trains_batch_norm("train", other=True)
    False
    """
    return (policy == "train") != other


def versions() -> dict[str, str]:
    """Return the versions of what a result may depend on."""
    return {name: version(name) for name in VERSIONED}


def _device_name(trainer: pl.Trainer) -> str:
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _score(
    split: Literal["val", "test"],
    module: pl.LightningModule,
    data: StudyData,
    bench: Bench,
    shift: str | None = None,
) -> TTAResult:
    """Look once at a split, without and with test-time augmentation, or at the plain images under a shift."""
    views = bench.views if shift is None else []
    augmentation = data.train_transform if views == "random" else None
    looking = TTAEval(views=views, on=("validate",), figure=False, augmentation=augmentation)
    callbacks: list[Callback] = [looking] if shift is None else [ShiftImages(shift), looking]
    trainer = pl.Trainer(**{**bench.trainer_options, "callbacks": callbacks})
    # `validate` for both: any module that can be trained here has a validation step
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    trainer.validate(module, dataloaders=loader, verbose=False)
    return looking.results["val"]


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Give torch that many threads, and the caller's again afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Hundreds of runs would each say what Lightning says of one."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_EXPECTED_WARNINGS: Sequence[str] = (
    r"The '\w+_dataloader' does not have many workers",
    r".*smaller than the logging interval",
    r"Skipped \d+ of \d+ files that are no images",  # said once, before the runs
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 on torch 2.15
)
