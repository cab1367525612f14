"""What happens to a batch between the loader and the step: the batch-transfer hooks, as in one mode, or passed by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage

_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class ReadyBatch(Protocol):
    """A batch that is what the step gets, but for the device."""

    def to(self, device: torch.device) -> ReadyBatch:
        """On the device."""

    def opened(self) -> Any:
        """In the form that the step gets."""


def pass_transfer_hooks(module: pl.LightningModule, kind: type[ReadyBatch]) -> None:
    """Batches of this kind pass by the transfer hooks of the module and its data module; others go through them.

    Lightning calls the hooks by way of one private method, and there is no public way around them; guarded by
    `test_pass_transfer_hooks__others_go_through` (Lightning 2.6). On the instance, until `use_transfer_hooks`.
    """
    vars(module)["_call_batch_hook"] = partial(_call_batch_hook, module, kind)


def use_transfer_hooks(module: pl.LightningModule) -> None:
    """Undoes `pass_transfer_hooks`; harmless without it."""
    vars(module).pop("_call_batch_hook", None)


def _call_batch_hook(module: pl.LightningModule, kind: type[ReadyBatch], name: str, batch: Any, *rest: Any) -> Any:
    if not isinstance(batch, kind):
        return type(module)._call_batch_hook(module, name, batch, *rest)
    if name == "transfer_batch_to_device":
        return batch.to(rest[0])
    return batch.opened() if name == "on_after_batch_transfer" else batch


def transfer_hooks(trainer: pl.Trainer) -> list[Callable[..., Any]]:
    """The batch-transfer hooks that the user has written, in the module or the data module."""
    owners = ((trainer.datamodule, pl.LightningDataModule), (trainer.lightning_module, pl.LightningModule))  # type: ignore[attr-defined]
    return [
        getattr(type(owner), name)
        for name in _HOOKS
        for owner, kind in owners
        if owner is not None and getattr(type(owner), name) is not getattr(kind, name)
    ]


@contextmanager
def mode_of(trainer: pl.Trainer, module: pl.LightningModule, *, training: bool) -> Iterator[None]:
    """`trainer.training` and the module's mode are those of training, or of validation."""
    before, modes = trainer.state.stage, [(part, part.training) for part in module.modules()]
    trainer.state.stage = RunningStage.TRAINING if training else RunningStage.VALIDATING
    module.train(training)
    try:
        yield
    finally:
        trainer.state.stage = before
        for part, mode in modes:
            part.training = mode
