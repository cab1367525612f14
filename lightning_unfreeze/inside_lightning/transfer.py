"""What happens to a batch between the loader and the step: the batch-transfer hooks, as in one mode, or passed by."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage

from lightning_unfreeze.features.key import fingerprint_of, transform_fingerprint
from lightning_unfreeze.layers.kept import kept
from lightning_unfreeze.layers.modes import kept_modes
from lightning_unfreeze.seeding import keyed_rng

_DRAWS = 4  # of a hook that changes some batches only
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


def hooks_fingerprint(trainer: pl.Trainer) -> str:
    """Fingerprint of the user's batch-transfer hooks."""
    return fingerprint_of(hooks=[transform_fingerprint(hook) for hook in transfer_hooks(trainer)])


@contextmanager
def mode_of(trainer: pl.Trainer, module: pl.LightningModule, *, training: bool) -> Iterator[None]:
    """`trainer.training` and the module's mode are those of training, or of validation."""
    before = trainer.state.stage
    trainer.state.stage = RunningStage.TRAINING if training else RunningStage.VALIDATING
    try:
        with kept_modes(module):
            module.train(training)
            yield
    finally:
        trainer.state.stage = before


def handed_batches(owners: Iterable[Any], hook: str) -> list[Any]:
    """Those of the callbacks and the module that are the user's and are handed the batch before the step."""
    ours = ("lightning.", "pytorch_lightning.", "lightning_unfreeze.")
    return [
        owner for owner in owners if hasattr(owner, hook) and not getattr(type(owner), hook).__module__.startswith(ours)
    ]


def who_may_change_batches(owners: Iterable[Any]) -> str:
    """The step, and the hooks of the user's that are handed a batch before it, as one phrase."""
    hooks = ("on_train_batch_start", "on_validation_batch_start")
    handed = [(hook, owner) for hook in hooks for owner in handed_batches(owners, hook)]
    return " or ".join(["the step", *(f"{hook} of {type(owner).__name__}" for hook, owner in handed)])


def who_changes_batches(trainer: pl.Trainer, owners: Iterable[Any], batch: Any, is_same: Callable[[Any], bool]) -> str:
    """The first callback, or the module, whose `on_train_batch_start` changes a batch; `""` if none.

    In a `sandbox`, where the Trainer has no callbacks: hence `owners`. They are handed copies.
    """
    for owner in handed_batches(owners, "on_train_batch_start"):
        arguments = (trainer, trainer.lightning_module) if isinstance(owner, pl.Callback) else ()
        for draw in range(_DRAWS):
            handed = copy.deepcopy(batch)
            # what a callback writes down of a batch is not its business here: it is put back, errors included
            with kept(owner, skip=(pl.Trainer, pl.LightningModule)), keyed_rng("hook", draw), suppress(Exception):
                owner.on_train_batch_start(*arguments, handed, 0)
            if not is_same(handed):
                return f"{type(owner).__name__}.on_train_batch_start"
    return ""
