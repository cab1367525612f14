"""What stages cost before they run: FLOPs counted on a step of each kind of stage, and seconds from a short timing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl

from lightning_unfreeze.callbacks.precompute import PrecomputeFeatures
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.recipe.costs import plan_costs
from lightning_unfreeze.stages.plan import Stage
from lightning_unfreeze.study.design.data import StudyData


@dataclass(frozen=True)
class StageCost:
    """Cost of one kind of stage: what is spent once at its start (the feature pass), and in each of its epochs."""

    once_flops: float
    epoch_flops: float
    once_seconds: float
    epoch_seconds: float


@dataclass(frozen=True)
class Costs:
    """Costs of every kind of stage of a study.

    Attributes:
        kinds: Cost by what trains and whether it does so on stored features; see `kind_of`.
        num_batches: Training batches of an epoch.
        num_images: Training images.
        find_steps: Steps of a range test, which a stage with `lr="find"` is charged with.
        evaluation_seconds: One pass over the validation images.
        test_seconds: The passes over the test images, with all views and shifts.
    """

    kinds: Mapping[str, StageCost]
    num_batches: int
    num_images: int
    find_steps: int
    evaluation_seconds: float
    test_seconds: float

    def of(self, stage: Stage) -> StageCost:
        """Return the cost of the stage's kind."""
        return self.kinds[kind_of(stage)]

    def flops(self, stages: Sequence[Stage]) -> float:
        """Return the training FLOPs of stages, range tests included (as if none stopped early)."""
        return sum(
            cost.once_flops + (stage.num_epochs + self._find_epochs(stage)) * cost.epoch_flops
            for stage in stages
            for cost in [self.of(stage)]
        )

    def images(self, stages: Sequence[Stage]) -> int:
        """Return the training images of stages, range tests apart."""
        return self.num_images * sum(stage.num_epochs for stage in stages)

    def seconds(self, stages: Sequence[Stage]) -> float:
        """Return about how long a run of the stages takes, with its evaluations."""
        training = sum(
            cost.once_seconds + (stage.num_epochs + self._find_epochs(stage)) * cost.epoch_seconds
            for stage in stages
            for cost in [self.of(stage)]
        )
        epochs = sum(stage.num_epochs for stage in stages)
        return training + epochs * self.evaluation_seconds + self.test_seconds

    def _find_epochs(self, stage: Stage) -> float:
        return self.find_steps / self.num_batches if stage.lr == "find" else 0.0


def kind_of(stage: Stage) -> str:
    """Return what decides the cost of an epoch: which layer groups train, and whether on stored features, or solved.

    >>> kind_of(Stage("a", "head", epochs=2, precompute=True)), kind_of(Stage("b", cycle_len=1))
    ('head, stored', 'all')
    """
    train = stage.train if isinstance(stage.train, str | int) else "+".join(stage.train)
    return f"{train}{', solved' if stage.solve is True else ', stored' if stage.precompute else ''}"


def measure_costs(
    stages: Iterable[Stage],
    module: pl.LightningModule,
    data: StudyData,
    trainer_options: Mapping[str, object],
    network: str | None,
    find_steps: int,
    test_passes: int,
) -> Costs:
    """Count FLOPs and time a few steps of every kind of stage; nothing is trained.

    Args:
        stages: All stages of the study; those of one kind are measured once.
        module: The module; it is left as it was.
        data: The data of any seed.
        trainer_options: Of the runs' Trainer.
        network: As for `GradualUnfreeze`.
        find_steps: Steps of a range test.
        test_passes: Over the test images: views of test-time augmentation, and shifts.
    """
    kinds = {kind_of(stage): stage for stage in stages}
    plain: dict[str, Any] = {"lr": None, "cycle_len": None, "cycle_mult": 1, "num_cycles": 1, "until": None}
    probes = [
        replace(stage, name=kind, **({} if stage.solve is True else {"epochs": 1, "solve": False, **plain}))
        for kind, stage in kinds.items()
    ]
    callbacks = [GradualUnfreeze(probes, network), PrecomputeFeatures()]
    trainer = pl.Trainer(**{**trainer_options, "callbacks": callbacks})  # type: ignore[arg-type]
    planned = {one.stage.name: one for one in plan_costs(trainer, module, data)}
    loader = data.train_dataloader()
    read_seconds = _reading_seconds(data)
    num_images = len(data.train_indices)

    measured = {}
    for kind, stage in kinds.items():
        one, reading = planned[kind], read_seconds * num_images
        measured[kind] = StageCost(
            one.once_flops,
            one.epoch_flops,
            one.once_seconds + (reading if stage.precompute else 0.0),
            one.epoch_seconds + (0.0 if stage.precompute else reading),
        )
    cheapest = min(cost.epoch_seconds + cost.once_seconds for cost in measured.values()) / num_images
    return Costs(
        kinds=measured,
        num_batches=len(loader),
        num_images=num_images,
        find_steps=find_steps,
        evaluation_seconds=cheapest * data.num_val,
        test_seconds=cheapest * data.num_test * test_passes,
    )


def _reading_seconds(data: StudyData) -> float:
    """Return the seconds that reading one training image takes, decoding and augmentation included."""
    dataset, count = data.train_dataloader().dataset, 8
    start = time.perf_counter()
    for index in range(count):
        dataset[index % len(data.train_indices)]
    return (time.perf_counter() - start) / count
