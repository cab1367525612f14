"""Weights kept aside: in memory, with the optimizer's moments beside them, and as files of weights alone."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn


@dataclass
class KeptWeights:
    """What a module and its optimizer were at one moment, on the CPU; tensors and primitives, so a checkpoint holds it.

    By the names of parameters and buffers, not by `state_dict()`, which a module may override to leave parts out.

    Attributes:
        tensors: Parameters and buffers by name.
        moments: What the optimizer holds for each parameter (momentum, Adam's averages and counts), by its name.
        average: Of Lightning's `WeightAveraging` beside the module, where there is one.
        scores: What validation and training logged of these weights.
        step: Optimizer steps that the run had done.
    """

    tensors: dict[str, Tensor]
    moments: dict[str, dict[str, Any]] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    step: int = 0


def keep_weights(trainer: pl.Trainer, pl_module: pl.LightningModule) -> KeptWeights:
    """The module as it is now, with its optimizer and the average beside it."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in pl_module.named_parameters()}
    moments = {
        names[parameter]: {key: _copied(value) for key, value in state.items()}
        for optimizer in trainer.optimizers
        for parameter, state in optimizer.state.items()
        if parameter in names
    }
    average = average_of(trainer)
    return KeptWeights(
        tensors_of(pl_module), moments, {} if average is None else tensors_of(average), step=trainer.global_step
    )


def put_weights_back(trainer: pl.Trainer, pl_module: pl.LightningModule, kept: KeptWeights) -> None:
    """Makes the module, its optimizer and the average beside it what they were, in place, since others hold them."""
    set_tensors(pl_module, kept.tensors)
    average = average_of(trainer)
    if average is not None and kept.average:
        set_tensors(average, kept.average)
    parameters = dict(pl_module.named_parameters())
    for optimizer in trainer.optimizers:
        before = {parameter: dict(state) for parameter, state in optimizer.state.items()}
        optimizer.state.clear()
        for name, state in kept.moments.items():
            if name in parameters:
                now = before.get(parameters[name], {})
                optimizer.state[parameters[name]] = {key: _placed(value, now.get(key)) for key, value in state.items()}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers by name, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in _named_tensors(module)}


def set_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Writes parameters and buffers in place; those that are not named stay."""
    with torch.no_grad():
        for name, tensor in _named_tensors(module):
            value = tensors.get(name)
            if value is not None and value.shape == tensor.shape:
                tensor.detach().copy_(value)
            elif value is not None:  # a buffer that grew since
                tensor.data = value.to(tensor.device, tensor.dtype, copy=True)


def average_of(trainer: pl.Trainer) -> nn.Module | None:
    """The averaged module of Lightning's `WeightAveraging` (EMA and others), None without one.

    The callback keeps it under a private name alone; guarded by `test_weights__go_back_with_the_average_beside_them`
    (Lightning 2.6).
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            average: nn.Module | None = callback._average_model
            return average
    return None


def save_what_is_left(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Has each `ModelCheckpoint` look at weights that the fit is about to leave: they may be the best of its monitor.

    For the end of a validation, of what that logged: a training metric is not known yet. Their own turn comes when the
    weights are others. The names have no public form; guarded by
    `test_until__a_checkpoint_holds_the_weights_that_its_score_belongs_to` (Lightning 2.6). A collective call.
    """
    if not trainer.validating:
        return
    logged = trainer._logger_connector.metrics["callback"]
    for saver in trainer.checkpoint_callbacks:
        if isinstance(saver, ModelCheckpoint) and saver.monitor in logged:
            saver.on_validation_end(trainer, pl_module)  # does nothing for one that saves at the end of the epoch,
            saver.on_train_epoch_end(trainer, pl_module)  # and this nothing for one that does not


def renew_last_checkpoints(trainer: pl.Trainer, *, of_step: int) -> None:
    """Has `last.ckpt` written anew where it holds weights between `of_step`, which the fit went back to, and its end.

    A `ModelCheckpoint(save_last=True)` writes it with its best alone, and the weights that came back may be no new best
    of its own monitor. It has no public way to save; guarded by
    `test_until__a_checkpoint_holds_the_weights_that_its_score_belongs_to` (Lightning 2.6). A collective call.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.save_last is not True or trainer.fast_dev_run:  # type: ignore[attr-defined]
            continue
        # at the last step itself, too: `every_n_train_steps` saves before that step's validation sends the weights back
        if of_step < callback._last_global_step_saved <= trainer.global_step:
            callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))


def save_weights(trainer: pl.Trainer, path: Path, **more: Any) -> None:
    """Saves the module as a checkpoint of weights alone, with what else it should tell. A collective call.

    The file loads with `weights_only=True`: hyperparameters that are more than plain values (a `Path`, an `Enum`, a
    class) are left out, and said. `Trainer.save_checkpoint` has no way to leave anything out, so this goes through the
    connector behind it; guarded by `test_weights__files_load_whatever_the_hyperparameters_are` (Lightning 2.6).
    """
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=True) | more
    left_out = sorted(key for key, value in checkpoint.items() if key != "state_dict" and not _loads(value))
    for key in left_out:
        del checkpoint[key]
    if left_out:
        rank_zero_info(
            f"{path.name} is without {', '.join(left_out)}, which hold more than plain values: pass them to "
            "load_from_checkpoint"
        )
    trainer.strategy.save_checkpoint(checkpoint, path)
    trainer.strategy.barrier("save_weights")


def load_weights(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The state dict of a checkpoint, or of a file that is one.

    Raises:
        MisconfigurationException: For a file that holds more than tensors and plain values.
    """
    try:
        loaded = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise MisconfigurationException(
            f"{path} holds more than tensors and plain values ({str(error).splitlines()[0][:120]}); save it again "
            "without them, or take it out of the snapshots"
        ) from error
    state: dict[str, Tensor] = loaded.get("state_dict", loaded)
    return state


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _copied(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _placed(value: Any, like: Any) -> Any:
    """A copy on the device and of the type that the optimizer had it in."""
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, like.dtype, copy=True) if isinstance(like, Tensor) else value.clone()


def _loads(value: Any) -> bool:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError, RuntimeError):
        return False
    return True
