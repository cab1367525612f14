"""What a plan will cost before anything is trained: per stage what trains, at which rates, FLOPs and minutes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import signature
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from lightning_unfreeze.callbacks.base import StageRun, players
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.features.shortcut import seconds
from lightning_unfreeze.inside_lightning.sandbox import sandbox
from lightning_unfreeze.inside_lightning.steps import batch_on_device, training_loss
from lightning_unfreeze.layers.param_groups import given_lr, layer_group_of
from lightning_unfreeze.stages.plan import Stage
from lightning_unfreeze.stages.progress import Progress


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


def plan_rows(
    trainer: pl.Trainer, pl_module: pl.LightningModule, datamodule: pl.LightningDataModule | None
) -> list[dict[str, Any]]:
    """One row per stage of the `GradualUnfreeze` of `trainer`; a few batches are run for the timing, none is trained.

    Args:
        trainer: Gives the callbacks and the accelerator; it is not run itself.
        pl_module: The module; it is left as it was.
        datamodule: Gives the training batches.

    Returns:
        Rows with what trains, the number of parameters, the rates of the first and the last trained layer group,
        epochs, schedule, images, GFLOPs and minutes. A stage with `precompute` counts one pass over the data and the
        rest of the network on every epoch.

    Raises:
        MisconfigurationException: Where the trainer has no `GradualUnfreeze`, or `fit` would refuse the plan.
    """
    probe = _PlanProbe(trainer, pl_module)
    probe.fit(datamodule, enable_progress_bar=False)
    return probe.rows


class Probe(GradualUnfreeze):
    """Sets up a fit as the user's `GradualUnfreeze` would, measures, and stops before the first batch is trained.

    A subclass measures in `on_train_start`, and sets `trainer.should_stop` after that.

    Args:
        trainer: The user's, with the plan among its callbacks.
        pl_module: Its module.

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
        limit = user.limit_train_batches
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
            limit_val_batches=0,
            limit_train_batches=None if isinstance(limit, float) and limit == 1 else limit,  # 1 is a single batch
            **options,
        )
        trainer.fit(self.user_module, datamodule=datamodule)

    def enter(self, trainer: pl.Trainer, stage: Stage) -> StageRun:
        """Freezes and unfreezes as at the start of `stage`, whichever came before."""
        self.progress = Progress(self.stages.index(stage), seed=self.progress.seed)
        return self.enter_stage(trainer)

    def preflight(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Asks the user's players, with the trainer that the module is attached to."""
        for player in players(self.user_trainer):
            player.preflight(trainer, pl_module, self.stages)

    def _check_needs(self, trainer: pl.Trainer) -> None:
        """The players are the original trainer's, and were checked there."""

    def _sets_rates(self, trainer: pl.Trainer) -> bool:
        return True


class _PlanProbe(Probe):
    rows: list[dict[str, Any]]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures every stage."""
        loader: Any = trainer.train_dataloader
        if math.isinf(trainer.num_training_batches):
            raise MisconfigurationException(
                "the training data has no length, so an epoch has no cost; set Trainer(limit_train_batches=...) to the "
                "number of batches of an epoch"
            )
        batch = batch_on_device(trainer, pl_module, next(iter(loader)))
        batches = int(trainer.num_training_batches)
        images = len(loader.dataset) if hasattr(loader, "dataset") else 0
        self.rows = [self._row(trainer, pl_module, stage, batch, batches, images) for stage in self.stages]
        trainer.should_stop = True

    def _row(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage, batch: Any, batches: int, images: int
    ) -> dict[str, Any]:
        self.enter(trainer, stage)
        self._modes.keep()
        trained = self.trained(stage)
        with sandbox(trainer, pl_module):
            step_flops, frozen_flops, step_seconds = self._measure(trainer, pl_module, batch)
        share = frozen_flops / step_flops if stage.precompute and step_flops else 0.0
        # a stored stage runs the frozen part once for every image, and only the rest on every epoch
        passes = stage.num_epochs * (1 - share) + share
        ratios = self.ratios(stage)
        given = {layer_group_of(group): given_lr(group) for group in trainer.optimizers[0].param_groups}
        rates = [_rate(stage, given[name], ratios[name]) for name in (trained[0], trained[-1])]
        return {
            "stage": stage.name,
            "trains": trained[0] if len(trained) == 1 else f"{trained[0]} ... {trained[-1]} ({len(trained)})",
            "parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "rates": rates[0] if rates[0] == rates[1] else f"{rates[0]} ... {rates[1]}",
            "epochs": stage.num_epochs,
            "schedule": _schedule(stage),
            "images": images * stage.num_epochs,
            "GFLOPs": step_flops * batches * passes / 1e9,
            "minutes": step_seconds * batches * passes / 60,
        }

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> tuple[int, int, float]:
        """FLOPs of a step, FLOPs of its frozen modules' forward, and the seconds of the fastest of a few steps."""
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
        try:
            with counter:
                self._step(trainer, pl_module, batch)
        finally:
            for hook in hooks:
                hook.remove()
        step_seconds = seconds(lambda: self._step(trainer, pl_module, batch), trainer.strategy.root_device)
        return counter.get_total_flops(), frozen, step_seconds

    def _step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        loss = training_loss(trainer, pl_module, batch)
        if loss is not None:
            loss.backward()  # type: ignore[no-untyped-call]


def _rate(stage: Stage, given: float, ratio: float) -> str:
    if stage.lr == "find":
        return "found" if ratio == 1 else f"found x {ratio:.3g}"
    return f"{(given if stage.lr is None else stage.lr) * ratio:.3g}"


def _schedule(stage: Stage) -> str:
    if stage.cycle_len is None:
        return "constant"
    cycles = " + ".join(f"{float(length):g}" for length in stage.cycle_epochs[:4])
    more = " + ..." if stage.num_cycles > 4 else ""
    return f"cosine {cycles}{more}{' until overfit' if stage.until else ''}"
