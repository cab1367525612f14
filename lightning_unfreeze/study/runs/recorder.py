"""What watches a run: costs and accuracy by validation, the time of range tests, how far the network moves."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import accumulate
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from lightning_unfreeze.callbacks.base import StageCallback
from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage, RangeTest
from lightning_unfreeze.features.serve import FeatureDataset
from lightning_unfreeze.layers.param_groups import layer_group_of
from lightning_unfreeze.stages.plan import Stage
from lightning_unfreeze.study.runs.costs import Costs
from lightning_unfreeze.study.runs.distortion import Snapshot, distortion, snapshot
from lightning_unfreeze.study.runs.records import CurvePoint

_RATES_PER_EPOCH = 8


class CountingFinder(LRFinderPerStage):
    """The range test, with its time."""

    seconds = 0.0

    def range_test(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> RangeTest:
        """Runs the test against the clock."""
        start = time.perf_counter()
        result = super().range_test(trainer, pl_module, name)
        self.seconds += time.perf_counter() - start
        return result


class DistortionWatch(Callback):
    """Compares the network with what the fit started from."""

    def __init__(self, num_images: int, network: str | None) -> None:
        self.num_images, self.network = num_images, network
        self.found: dict[str, float] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at the network before."""
        self._before = self._look(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks again, and compares."""
        self.found = distortion(self._before, self._look(trainer, pl_module))

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Snapshot:
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        return snapshot(trainer, pl_module, loader, self.num_images, self.network)


class RunRecorder(StageCallback):
    """Records a point per validation on all cost axes, and the rates of the layer groups.

    Costs are counted by the batches that were trained, however often validation looks. Sole writer of nothing: it only
    looks.

    Args:
        monitor: Accuracy that the module logs in validation.
        costs: Of the kinds of stages.

    Attributes:
        curve: The points.
        rates: (epoch, rate) pairs of each layer group.
        optimizer: Name and settings of the optimizer.
        train_seconds: Training so far, with range tests and feature passes.
        eval_seconds: Validation so far.
    """

    order: ClassVar[int] = 90

    def __init__(self, monitor: str, costs: Costs) -> None:
        self.monitor, self.costs = monitor, costs
        self.finder: LRFinderPerStage | None = None
        self.curve: list[CurvePoint] = []
        self.rates: dict[str, list[tuple[float, float]]] = {}
        self.optimizer = ""
        self.train_seconds = self.eval_seconds = 0.0
        self._clock = 0.0
        # spent before the stage's first epoch, and in the stages before
        self._images, self._flops = 0.0, 0.0
        self._stage_batches, self._epoch_flops = 0, 0.0

    @property
    def images(self) -> int:
        """Training images drawn so far, by range tests too."""
        return round(self._images + self._stage_epochs * self.costs.num_images)

    @property
    def flops(self) -> float:
        """Training FLOPs so far."""
        return self._flops + self._stage_epochs * self._epoch_flops

    @property
    def _stage_epochs(self) -> float:
        return self._stage_batches / self.costs.num_batches

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._clock = time.perf_counter()

    def on_stage_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Charges what the stage spends before its first epoch: the feature pass and the range test."""
        self._images, self._flops, self._stage_batches = self.images, self.flops, 0
        self.optimizer = _describe_optimizer(trainer.optimizers[0])
        served = isinstance(getattr(trainer.train_dataloader, "dataset", None), FeatureDataset)
        # where no features could be stored, the images are read and run as usual, and cost that
        cost = self.costs.of(stage if served else replace(stage, precompute=False, solve=False))
        self._flops += cost.once_flops
        self._epoch_flops = cost.epoch_flops
        if self.finder is not None and stage.lr == "find" and stage.name in self.finder.results:
            tested = len(self.finder.results[stage.name].lrs) / self.costs.num_batches
            self._flops += tested * cost.epoch_flops
            self._images += round(tested * self.costs.num_images)

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

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch."""
        self._stage_batches += 1

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the training clock."""
        now = time.perf_counter()
        self.train_seconds += now - self._clock
        self._clock = now

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the point of this validation.

        Raises:
            MisconfigurationException: Where the module logs no such accuracy.
        """
        now = time.perf_counter()
        self.eval_seconds += now - self._clock
        self._clock = now
        if self.run is None or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"a study follows {self.monitor!r}, which validation did not log; logged are "
                f"{sorted(trainer.callback_metrics)}; name the accuracy: monitor=..."
            )
        stage, done = self.run.stage, self._stage_batches / trainer.num_training_batches
        ends = {stage.num_epochs, *accumulate(stage.cycle_epochs)}
        point = CurvePoint(
            epoch=self.run.start_epoch + done,
            images=self.images,
            flops=self.flops,
            seconds=self.train_seconds,
            val_acc=float(trainer.callback_metrics[self.monitor]),
            stage=stage.name,
            cycle_end=done in ends,
        )
        self.curve.append(point)


def _describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Return the optimizer with the settings that people change."""
    told = ("weight_decay", "momentum", "betas")
    given = [f"{name}={optimizer.defaults[name]}" for name in told if optimizer.defaults.get(name)]
    return f"{type(optimizer).__name__}({', '.join(given)})"
