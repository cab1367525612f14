"""A step as the Trainer makes it, outside of its loop: a batch on its device, the loss, an optimizer step; how many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from lightning_unfreeze.seeding import keyed_rng

StepName = Literal["training_step", "validation_step"]


def batch_on_device(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    """`batch` as the training step gets it: converted to the precision, through the transfer hooks, on the device."""
    batch = trainer.precision_plugin.convert_input(batch)
    # Lightning's loop makes these two calls in this order; the first has no public name (guarded by
    # `test_batch_on_device__goes_through_the_transfer_hooks`, Lightning 2.6)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def step_output(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batch: Any,
    batch_idx: int = 0,
    name: StepName = "training_step",
    *,
    together: bool = True,
) -> Any:
    """What the module's own step returns for a batch that lies on the device, in the Trainer's precision.

    `together` goes through the wrapper of the strategy (DDP), a collective call.
    """
    step = getattr(pl_module, name)
    arguments = (batch, batch_idx) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else (batch,)
    if together:
        return getattr(trainer.strategy, name)(*arguments)
    plugin = trainer.precision_plugin
    with plugin.train_step_context() if name == "training_step" else plugin.val_step_context():
        return step(*arguments)


@torch.no_grad()
def step_outcome(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, name: StepName) -> dict[str, Any]:
    """What a step returns and logs, and the states of the metrics that it updates, by name; inside of `sandbox`."""
    found: dict[str, Any] = {}
    metrics = {key: part for key, part in pl_module.named_modules() if isinstance(part, Metric)}
    for metric in metrics.values():
        metric.reset()
    before = {key: vars(pl_module)[key] for key in ("log", "log_dict")}
    vars(pl_module)["log"] = lambda key, value, *_, **__: found.update({key: value})
    vars(pl_module)["log_dict"] = lambda values, *_, **__: found.update(values)
    try:
        with keyed_rng("check"):
            found["output"] = step_output(trainer, pl_module, batch, name=name, together=False)
    finally:
        vars(pl_module).update(before)
    for key, metric in metrics.items():
        found[f"state of {key}"] = metric.metric_state
    return found


def training_loss(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int = 0, *, together: bool = True
) -> Tensor | None:
    """Loss of the module's own `training_step`, see `step_output`; None where the step skips the batch."""
    output = step_output(trainer, pl_module, batch, batch_idx, together=together)
    loss = output["loss"] if isinstance(output, Mapping) else output
    return loss if loss is None or isinstance(loss, Tensor) else torch.as_tensor(loss)


def optimizer_step(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    batches: Iterator[tuple[Any, int]],
    around: Callable[[Any], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> Tensor | None:
    """One optimizer step as the Trainer makes it: precision, clipping, accumulation. A collective call.

    One of the batches, as a loader gives them with their index, is drawn for each micro-batch.

    Returns:
        The mean loss of the micro-batches, None where all were skipped.
    """
    strategy, optimizer, num_micro = trainer.strategy, trainer.optimizers[0], trainer.accumulate_grad_batches
    losses: list[Tensor] = []

    def forward_backward() -> Tensor | None:
        batch, batch_idx = next(batches)
        with around(batch):
            loss = training_loss(trainer, pl_module, batch_on_device(trainer, pl_module, batch), batch_idx)
            if loss is not None:
                losses.append(loss.detach().float())
                strategy.backward(loss / num_micro, optimizer)
        return loss

    optimizer.zero_grad()
    for _ in range(num_micro - 1):
        # as Lightning's own loop: ranks are reduced at the last micro-batch only
        with strategy.block_backward_sync() if hasattr(strategy, "block_backward_sync") else nullcontext():
            forward_backward()
    strategy.optimizer_step(optimizer, forward_backward, pl_module)
    return torch.stack(losses).mean() if losses else None


def steps_of_epoch(trainer: pl.Trainer) -> int | None:
    """Optimizer steps of an epoch; None where the training data has no length."""
    if math.isinf(trainer.num_training_batches):
        return None
    # Lightning also steps at the last batch of an epoch, where the accumulation window is not full
    return -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)


def epochs_of_fit(trainer: pl.Trainer, steps: int) -> Fraction | float:
    """Length of the whole fit in epochs of so many steps; infinite where it has no end."""
    total = trainer.estimated_stepping_batches
    return total if math.isinf(total) else Fraction(int(total), steps)
