"""What a plan will cost before anything is trained: per stage what trains, at which rates, FLOPs and minutes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from lightning_unfreeze.callbacks.base import Conductor, StageRun
from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.features.shortcut import seconds
from lightning_unfreeze.inside_lightning.sandbox import sandbox
from lightning_unfreeze.inside_lightning.steps import batch_on_device, training_loss
from lightning_unfreeze.layers.param_groups import given_lr, layer_group_of
from lightning_unfreeze.stages.plan import Stage
from lightning_unfreeze.stages.progress import Progress

_HARDLY_TRAINS = 0.01  # of the last layer group's rate
_THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def _convolution_backward_flops(
    grad_out: Sequence[int], x: Sequence[int], weight: Sequence[int], *others: Any, out_shape: Any = None
) -> int:
    """FLOPs of a convolution's backward: each of the two gradients costs what the forward did.

    Torch's own formula (2.6 to 2.15) takes the weight's gradient for that of an ungrouped convolution, which is too
    much by the number of groups: 16 times the forward for a MobileNet's step instead of 3.
    """
    transposed, output_mask = others[4], others[7]
    return int(conv_flop_count(list(x), list(weight), list(grad_out), transposed) * sum(output_mask[:2]))


FLOP_FORMULAS: dict[Any, Any] = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
"""What `FlopCounterMode(custom_mapping=...)` needs to count grouped convolutions right."""


@dataclass(frozen=True)
class PlannedStage:
    """What a stage trains and costs. FLOPs and seconds are of the steps alone, without loading, validation, tests.

    Attributes:
        stage: The stage.
        trained: Names of the layer groups that train, input first.
        parameters: Number of parameters that train.
        rates: Layer group -> peak rate; the factor on it where the rate is to be found.
        images: Images read by all its epochs.
        once_flops: Spent once: with stored features, the pass of the frozen part.
        epoch_flops: Spent in each epoch.
        once_seconds: As `once_flops`.
        epoch_seconds: As `epoch_flops`.
        savings: Threshold -> share of a step's seconds that freezing the groups whose ratio to the head's rate lies
            below would save; only thresholds that freeze something, and something else than the one before.
        range_test_seconds: Of all steps of its range test, which may end earlier; 0 without one.
    """

    stage: Stage
    trained: tuple[str, ...]
    parameters: int
    rates: Mapping[str, float]
    images: int
    once_flops: float
    epoch_flops: float
    once_seconds: float
    epoch_seconds: float
    savings: Mapping[float, float]
    range_test_seconds: float = 0.0

    @property
    def flops(self) -> float:
        """Of the whole stage (at most, with `until`)."""
        return self.once_flops + self.stage.num_epochs * self.epoch_flops

    @property
    def seconds(self) -> float:
        """Of the whole stage (at most, with `until`)."""
        return self.once_seconds + self.stage.num_epochs * self.epoch_seconds

    def row(self) -> dict[str, Any]:
        """As a line of a table for people."""
        first, last = self.trained[0], self.trained[-1]
        shown = list(dict.fromkeys(self._rate(name) for name in (first, last)))
        return {
            "stage": self.stage.name,
            "trains": first if len(self.trained) == 1 else f"{first} ... {last} ({len(self.trained)})",
            "parameters": self.parameters,
            "rates": " ... ".join(shown),
            "epochs": self.stage.num_epochs,
            "schedule": _schedule(self.stage),
            "images": self.images,
            "GFLOPs": self.flops / 1e9,
            "minutes": self.seconds / 60,
        }

    def _rate(self, name: str) -> str:
        if self.stage.solve is True:
            return "solved"
        rate = f"{self.rates[name]:.3g}"
        if self.stage.lr == "find":
            rate = "found" if rate == "1" else f"found x {rate}"
        return f"solved, or {rate}" if self.stage.solve == "auto" else rate

    def advice(self) -> list[str]:
        """Lines about layer groups whose rate is so low that they hardly train, and what freezing them would save."""
        lines = []
        head = self.rates[self.trained[-1]]
        still = [name for name in self.trained if self.rates[name] < _HARDLY_TRAINS * head]
        if still:
            lines.append(
                f"stage {self.stage.name!r}: {', '.join(still)} get less than {_HARDLY_TRAINS:g} of the last layer "
                "group's rate and hardly train; give a larger lr_span, or freeze them"
            )
        if self.savings:
            parts = [f"{share:.0%} with freeze_below={threshold:g}" for threshold, share in self.savings.items()]
            lines.append(
                f"stage {self.stage.name!r}: a step takes less time if GradualUnfreeze freezes the layer groups of the "
                f"lowest rates: {', '.join(parts)}"
            )
        return lines


def plan_costs(
    trainer: pl.Trainer, pl_module: pl.LightningModule, datamodule: pl.LightningDataModule | None
) -> list[PlannedStage]:
    """What each stage of the `GradualUnfreeze` of `trainer` costs; a few steps are timed, nothing is trained.

    Args:
        trainer: Gives the callbacks and the accelerator; it is not run itself.
        pl_module: The module; it is left as it was.
        datamodule: Gives the training batches.

    Raises:
        MisconfigurationException: Where the trainer has no `GradualUnfreeze`, or `fit` would refuse the plan.
    """
    probe = _PlanProbe(trainer, pl_module)
    probe.fit(datamodule, enable_progress_bar=False)
    return probe.planned


class Probe(GradualUnfreeze):
    """Sets up a fit as the user's `GradualUnfreeze` would, measures, and stops before the first batch is trained.

    A subclass measures in `on_train_start`, and sets `trainer.should_stop` after that.

    Raises:
        MisconfigurationException: Where the trainer has no `GradualUnfreeze`, or `fit` would refuse the plan.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        conductors = [each for each in trainer.callbacks if isinstance(each, GradualUnfreeze)]  # type: ignore[attr-defined]
        if not conductors:
            raise MisconfigurationException("there is no plan: add GradualUnfreeze(stages) to trainer.callbacks")
        conductors[0].setup(trainer, pl_module, "fit")
        options = signature(GradualUnfreeze).parameters  # so that none that is added there can be forgotten here
        super().__init__(**{name: getattr(conductors[0], name) for name in options})
        self.user_trainer, self.user_module = trainer, pl_module

    def fit(self, datamodule: pl.LightningDataModule | None, **options: Any) -> None:
        """Runs in a Trainer of its own, on the device and in the precision of the user's, that leaves nothing behind.

        The user's callbacks and loggers would act on, and write about, a run that is none.
        """
        user = self.user_trainer
        trainer = pl.Trainer(
            accelerator=user.strategy.root_device.type,
            devices=1,
            precision=user.precision,
            max_epochs=-1,
            callbacks=[self],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_train_batches=_given(user.limit_train_batches),
            # as the user validates, for the checks of `until`; it ends before it would
            limit_val_batches=_given(user.limit_val_batches),
            val_check_interval=_given(user.val_check_interval),
            check_val_every_n_epoch=user.check_val_every_n_epoch,
            **options,
        )
        trainer.fit(self.user_module, datamodule=datamodule)

    def enter(self, trainer: pl.Trainer, stage: Stage) -> StageRun:
        """Freezes and unfreezes as at the start of `stage`, whichever came before."""
        self.progress = Progress(self.stages.index(stage), seed=self.progress.seed)
        return self.enter_stage(trainer)

    def preflight(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Asks the user's players, with the trainer that the module is attached to, beside the user's callbacks."""
        users: list[Any] = self.user_trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [self, *(each for each in users if not isinstance(each, Conductor))]  # type: ignore[attr-defined]
        try:
            super().preflight(trainer, pl_module)
        finally:
            trainer.callbacks = [self]  # type: ignore[attr-defined]

    def _check_needs(self, trainer: pl.Trainer) -> None:
        """The players are the original trainer's, and were checked there."""

    def _sets_rates(self, trainer: pl.Trainer) -> bool:
        return True


def _given(share: float) -> float | None:
    """As `Trainer` takes it: 1 would be a single batch, None is all."""
    return None if isinstance(share, float) and share == 1 else share


class _PlanProbe(Probe):
    planned: list[PlannedStage]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures every stage."""
        if math.isinf(trainer.num_training_batches):
            raise MisconfigurationException(
                "the training data has no length, so an epoch has no cost; set Trainer(limit_train_batches=...) to the "
                "number of batches of an epoch"
            )
        self.planned = [self._plan(trainer, pl_module, stage) for stage in self.stages]
        trainer.should_stop = True

    def _plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> PlannedStage:
        loader: Any = trainer.train_dataloader
        if stage.image_size_px is not None:
            self._set_image_size(trainer, stage)
            loader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        batch = batch_on_device(trainer, pl_module, next(iter(CombinedLoader(loader)))[0])
        batches = int(trainer.num_training_batches)
        images = sized_len(getattr(loader, "dataset", None)) or 0
        self.enter(trainer, stage)
        trained = self.what_trains.trained(stage)
        parameters = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        step_flops, frozen_flops, step_seconds = self._measure(trainer, pl_module, batch)
        # a stored stage runs the frozen part once for every image, and only the rest on every epoch
        share = frozen_flops / step_flops if stage.precompute and step_flops else 0.0
        flops, duration = float(step_flops * batches), step_seconds * batches
        given = {layer_group_of(group): given_lr(group) for group in trainer.optimizers[0].param_groups}
        peaks = {name: 1.0 if stage.lr == "find" else given[name] if stage.lr is None else stage.lr for name in trained}
        ratios = self.what_trains.ratios(stage)
        return PlannedStage(
            stage,
            tuple(trained),
            parameters,
            rates={name: peaks[name] * ratios[name] for name in trained},
            images=images * stage.num_epochs,
            once_flops=share * flops,
            epoch_flops=(1 - share) * flops,
            once_seconds=share * duration,
            epoch_seconds=(1 - share) * duration,
            savings={} if stage.precompute else self._savings(trainer, pl_module, stage, batch, step_seconds),
            range_test_seconds=step_seconds * self._range_test_steps(stage),
        )

    def _range_test_steps(self, stage: Stage) -> int:
        if stage.lr != "find" or stage.solve:
            return 0
        users: list[Any] = self.user_trainer.callbacks  # type: ignore[attr-defined]
        return next((each.num_steps for each in users if isinstance(each, LRFinderPerStage)), 0)

    def _savings(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage, batch: Any, step_seconds: float
    ) -> dict[float, float]:
        ratios, trained = self.what_trains.ratios(stage), self.what_trains.trained(stage)
        savings: dict[float, float] = {}
        before = trained
        for threshold in _THRESHOLDS:
            kept = [name for name in trained if ratios[name] >= threshold]
            if kept and kept != before and stage.train != "adapters":
                before = kept
                self.make_ready(trainer, replace(stage, train=kept))
                savings[threshold] = max(0.0, 1 - self._measure(trainer, pl_module, batch)[2] / step_seconds)
        return savings

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> tuple[int, int, float]:
        """FLOPs of a step, FLOPs of its frozen modules' forward, and the seconds of the fastest of a few steps."""
        self._modes.keep()
        counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
        # by calls, not by the counter's names: it has none for a module that is called before the one that holds it
        entered: list[int] = []
        frozen = 0

        def enter(*_: Any) -> None:
            entered.append(counter.get_total_flops())

        def leave(*_: Any) -> None:
            nonlocal frozen
            before = entered.pop()
            if not entered:
                frozen += counter.get_total_flops() - before

        parts = {part for module in self._modes.roots for part in module.modules()}
        hooks = [part.register_forward_pre_hook(enter) for part in parts]
        hooks += [part.register_forward_hook(leave) for part in parts]

        def step() -> None:
            loss = training_loss(trainer, pl_module, batch)
            if loss is not None:
                loss.backward()  # type: ignore[no-untyped-call]

        with sandbox(trainer, pl_module):
            try:
                with counter:
                    step()
            finally:
                for hook in hooks:
                    hook.remove()
            return counter.get_total_flops(), frozen, seconds(step, trainer.strategy.root_device)


def _schedule(stage: Stage) -> str:
    if stage.solve is True:
        return "none"
    if stage.cycle_len is None:
        return f"constant{' until ' + stage.until if stage.until else ''}"
    cycles = " + ".join(f"{float(length):g}" for length in stage.cycle_epochs[:4])
    more = " + ..." if stage.num_cycles > 4 else ""
    return f"cosine {cycles}{more}{' until ' + stage.until if stage.until else ''}"
