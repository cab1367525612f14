"""What a run is made from: what all runs of a study share, and the task of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl

from lightning_unfreeze.seeding import keyed_rng
from lightning_unfreeze.stages.plan import Stage
from lightning_unfreeze.study.design.arms import Arm, BatchNormPolicy
from lightning_unfreeze.study.design.data import StudyData

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
