"""One run of the study: one `Trainer.fit` with the package's own callbacks, and one look at the images it is scored on.

A run is a function of its `Task` alone: in this process, in another one, today or after a kill.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_unfreeze.callbacks.base import StageCallback
from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage, RangeTest
from lightning_unfreeze.callbacks.precompute import PrecomputeFeatures
from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.tta import TTAEval
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.features.serve import FeatureDataset
from lightning_unfreeze.layers.param_groups import layer_group_of
from lightning_unfreeze.seeding import keyed_rng
from lightning_unfreeze.stages.plan import Stage
from lightning_unfreeze.study.design.arms import Arm, BatchNormPolicy
from lightning_unfreeze.study.design.data import StudyData
from lightning_unfreeze.study.design.shifts import shifted_accuracy
from lightning_unfreeze.study.runs.costs import Costs
from lightning_unfreeze.study.runs.distortion import distortion, snapshot
from lightning_unfreeze.study.runs.records import CurvePoint, RunRecord, pack_correct
from lightning_unfreeze.tta.result import TTAResult

_RATES_PER_EPOCH = 8
_PROBE_SECONDS = 0.05

ModelFn = Callable[..., pl.LightningModule]
DataModuleFn = Callable[[], pl.LightningDataModule]


@dataclass(frozen=True)
class Bench:
    """What all runs of a study share.

    Attributes:
        model_fn: Makes the module; called with `pretrained=False` for the arms from random weights.
        datamodule_fn: Makes the data module; the study draws each seed's images from it.
        dataset: Name of the data set.
        train_size: Training images; None takes all.
        val_fraction: Share of the images that validate.
        batch_norm: Policy of unfrozen BatchNorm: `train` moves its statistics, `frozen` keeps them.
        network: Attribute of the module that holds the network; None finds it.
        views: Views of test-time augmentation, as for `TTAEval`.
        monitor: Accuracy that the module logs in validation.
        find_steps: Steps of a range test.
        distortion_images: Validation images on which features are compared.
        shifts: Score the test images under shifts too.
        threads: Threads of torch in a run.
        trainer: Further arguments of every run's Trainer.
        code_version: Version of the code.
    """

    model_fn: ModelFn
    datamodule_fn: DataModuleFn
    dataset: str
    train_size: int | None
    val_fraction: float
    batch_norm: BatchNormPolicy
    network: str | None
    views: Any
    monitor: str
    find_steps: int
    distortion_images: int
    shifts: bool
    threads: int
    trainer: Mapping[str, Any]
    code_version: str

    def module(self, seed: int, pretrained: bool = True) -> pl.LightningModule:
        """Return the module of a seed: the head is drawn from it, whatever the arm."""
        with keyed_rng("model", seed):
            return self.model_fn() if pretrained else self.model_fn(pretrained=False)

    def data(self, seed: int, augment: bool = True) -> StudyData:
        """Return the images of a seed."""
        return StudyData(self.datamodule_fn(), seed, self.train_size, self.val_fraction, augment)

    @property
    def trainer_options(self) -> dict[str, Any]:
        """Arguments of a Trainer that leaves nothing behind."""
        return {
            "devices": 1,
            "max_epochs": -1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **self.trainer,
        }


@dataclass(frozen=True)
class Task:
    """One run that is to be made.

    Attributes:
        key: Its name, from `run_key`.
        arm: The arm.
        seed: The seed.
        stages: The arm's stages with their rates.
        scored_on: The images of the last look: `val` in tuning, which never sees the test images.
        label: Name of the arm in the record.
        rate: Tuned rate, or the one that tuning tries.
        tuning: Fields of the record that say how that rate was found.
    """

    key: str
    arm: Arm
    seed: int
    stages: tuple[Stage, ...]
    scored_on: Literal["val", "test"]
    label: str
    rate: float | None = None
    tuning: Mapping[str, Any] | None = None


def execute(task: Task, bench: Bench, costs: Costs) -> RunRecord:
    """Train, score once, and return the record; a function of its arguments, but for the seconds.

    Args:
        task: The run.
        bench: What all runs share.
        costs: Of the kinds of stages, for the axes of the curve.
    """
    torch.set_num_threads(bench.threads)
    probe = images_per_second()
    start = time.perf_counter()
    with _quiet(), keyed_rng("run", task.seed), tempfile.TemporaryDirectory() as folder:
        module = bench.module(task.seed, task.arm.pretrained)
        data = bench.data(task.seed, task.arm.augmentation)
        recorder = RunRecorder(bench.monitor, costs)
        finder = _CountingFinder(num_steps=bench.find_steps)
        callbacks = [
            GradualUnfreeze(
                list(task.stages),
                bench.network,
                train_bn=trains_batch_norm(bench.batch_norm, task.arm.other_batch_norm),
            ),
            # a store of its own: a run that found another one's features would not show what they cost
            PrecomputeFeatures(store_dir=folder, policy="always"),
            finder,
            CosineRestarts(),
            _Distortion(bench.distortion_images, bench.network),
            recorder,
        ]
        recorder.finder = finder
        trainer = pl.Trainer(**{**bench.trainer_options, "callbacks": callbacks})
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer.fit(module, datamodule=data)
        result, eval_seconds = _score(task.scored_on, module, data, bench)
        acc_ood = (
            shifted_accuracy(module, data.test_dataloader()) if bench.shifts and task.scored_on == "test" else None
        )
    measures = next(callback.found for callback in callbacks if isinstance(callback, _Distortion))
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
        eval_seconds=recorder.eval_seconds + eval_seconds,
        lr_find_seconds=finder.seconds,
        distortion=measures,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        probe_images_per_second=probe,
        tuned_lr=task.rate,
        acc_ood=acc_ood,
        code_version=bench.code_version,
        **(task.tuning or {}),
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


class _CountingFinder(LRFinderPerStage):
    """The range test, with its time."""

    seconds = 0.0

    def range_test(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> RangeTest:
        start = time.perf_counter()
        result = super().range_test(trainer, pl_module, name)
        self.seconds += time.perf_counter() - start
        return result


class _Distortion(Callback):
    """Compares the network with what the fit started from."""

    def __init__(self, num_images: int, network: str | None) -> None:
        self.num_images, self.network = num_images, network
        self.found: dict[str, float] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before = self._look(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found = distortion(self._before, self._look(trainer, pl_module))

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        return snapshot(pl_module, loader, self.num_images, self.network)


class RunRecorder(StageCallback):
    """Records a point per epoch on all cost axes, and the rates of the layer groups.

    Sole writer of nothing: it only looks.

    Args:
        monitor: Accuracy that the module logs in validation.
        costs: Of the kinds of stages.

    Attributes:
        curve: The points.
        rates: (epoch, rate) pairs of each layer group.
        images: Training images drawn so far, by range tests too.
        flops: Training FLOPs so far.
        train_seconds: Training so far, with range tests and feature passes.
        eval_seconds: Validation so far.
    """

    order: ClassVar[int] = 90

    def __init__(self, monitor: str, costs: Costs) -> None:
        self.monitor, self.costs = monitor, costs
        self.finder: LRFinderPerStage | None = None
        self.curve: list[CurvePoint] = []
        self.rates: dict[str, list[tuple[float, float]]] = {}
        self.images, self.flops = 0, 0.0
        self.train_seconds = self.eval_seconds = 0.0
        self._clock = 0.0
        self._epoch_flops = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._clock = time.perf_counter()

    def on_stage_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Charges what the stage spends before its first epoch: the feature pass and the range test."""
        served = isinstance(getattr(trainer.train_dataloader, "dataset", None), FeatureDataset)
        # where no features could be stored, the images are read and run as usual, and cost that
        cost = self.costs.of(stage if served else replace(stage, precompute=False))
        self.flops += cost.once_flops
        self._epoch_flops = cost.epoch_flops
        if self.finder is not None and stage.lr == "find" and stage.name in self.finder.results:
            steps = len(self.finder.results[stage.name].lrs)
            self.flops += steps / self.costs.num_batches * cost.epoch_flops
            self.images += round(steps / self.costs.num_batches * self.costs.num_images)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the rates a few times an epoch."""
        every = max(1, self.costs.num_batches // _RATES_PER_EPOCH)
        if batch_idx % every:
            return
        epoch = trainer.current_epoch + batch_idx / self.costs.num_batches
        found: dict[str, float] = {}
        for group in trainer.optimizers[0].param_groups:
            if group["lr"] > 0:
                found.setdefault(layer_group_of(group), float(group["lr"]))
        for name, rate in found.items():
            self.rates.setdefault(name, []).append((epoch, rate))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the training clock."""
        now = time.perf_counter()
        self.train_seconds += now - self._clock
        self._clock = now

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the point of this epoch.

        Raises:
            MisconfigurationException: Where the module logs no such accuracy.
        """
        now = time.perf_counter()
        self.eval_seconds += now - self._clock
        self._clock = now
        if self.run is None:
            return
        if self.monitor not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"a study follows {self.monitor!r}, which validation did not log; logged are "
                f"{sorted(trainer.callback_metrics)}; name the accuracy: monitor=..."
            )
        self.images += self.costs.num_images
        self.flops += self._epoch_flops
        done = trainer.current_epoch + 1 - self.run.start_epoch
        stage = self.run.stage
        ends = {stage.num_epochs, *accumulate(stage.cycle_epochs)}
        point = CurvePoint(
            epoch=trainer.current_epoch + 1,
            images=self.images,
            flops=self.flops,
            seconds=self.train_seconds,
            val_acc=float(trainer.callback_metrics[self.monitor]),
            stage=stage.name,
            cycle_end=done in ends,
        )
        self.curve.append(point)


def _score(
    split: Literal["val", "test"], module: pl.LightningModule, data: StudyData, bench: Bench
) -> tuple[TTAResult, float]:
    """Look once at a split, without and with test-time augmentation."""
    start = time.perf_counter()
    augmentation = data.train_transform if bench.views == "random" else None
    looking = TTAEval(views=bench.views, on=("validate",), figure=False, augmentation=augmentation)
    trainer = pl.Trainer(**{**bench.trainer_options, "callbacks": [looking]})
    # `validate` for both: any module that can be trained here has a validation step
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    trainer.validate(module, dataloaders=loader, verbose=False)
    return looking.results["val"], time.perf_counter() - start


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
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 on torch 2.15
)
