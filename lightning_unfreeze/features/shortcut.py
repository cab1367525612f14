"""The shortcut past the frozen part, found and checked with the user's own steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

# torch 2.6 has no public pytree; guarded by `test_batch_form__keeps_the_form_of_the_users_batch`
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from lightning_unfreeze.features.batch_form import NoStoreError
from lightning_unfreeze.features.fill import ViewedData, seconds
from lightning_unfreeze.features.prefix import FrozenPrefix, find_prefix
from lightning_unfreeze.inside_lightning.steps import StepName, batch_on_device, step_output, training_loss
from lightning_unfreeze.seeding import keyed_rng


@dataclass(frozen=True)
class Shortcut:
    """A frozen prefix, and what a training step takes without and with it.

    Attributes:
        prefix: Holds for the module's training step.
        reason: Why it does not lie deeper; empty where it does.
        plain_seconds: Per image, of forward and backward on images.
        stored_seconds: Per image, of forward and backward on features.
    """

    prefix: FrozenPrefix
    reason: str
    plain_seconds: float
    stored_seconds: float


def find_shortcut(trainer: pl.Trainer, pl_module: pl.LightningModule, data: ViewedData) -> Shortcut:
    """The shortcut for the module's training step, checked on a batch. To be called in a `sandbox`.

    Args:
        trainer: Gives device and precision.
        pl_module: The module, its frozen part in eval mode.
        data: Gives a batch and its form.

    Raises:
        NoStoreError: If there is none, with the reason.
    """
    images, beside = data.step_form.split(batch_on_device(trainer, pl_module, data.raw))

    def step(x: Tensor) -> Tensor:
        rows = torch.arange(len(x)) % len(images)
        own = {name: value[rows.to(value.device)] for name, value in beside.items()}
        return _loss(trainer, pl_module, data.step_form.join(x, own))

    prefix, reason = find_prefix(pl_module, images, step)
    if prefix is None:
        raise NoStoreError(reason)
    check_step(trainer, pl_module, prefix, data, "training_step")
    with prefix.replay(prefix.extract(images)) as packed:
        stored_seconds = seconds(lambda: step(packed).backward(), images.device)  # type: ignore[no-untyped-call]
    plain_seconds = seconds(lambda: step(images).backward(), images.device)  # type: ignore[no-untyped-call]
    return Shortcut(prefix, reason, plain_seconds / len(images), stored_seconds / len(images))


def check_step(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    prefix: FrozenPrefix,
    data: ViewedData,
    name: StepName,
) -> None:
    """A batch through all that lies between loader and loss, both ways: transfer hooks act on features, too.

    Compares what the step returns and logs and the states of its metrics. To be called in a `sandbox`.

    Raises:
        NoStoreError: If they differ.
    """
    hint = (
        "something between the loader and the network changes the images, or the step uses them in another way; do "
        "what changes images (a batch-transfer hook?) in the dataset's transform"
    )
    batch = batch_on_device(trainer, pl_module, data.raw)
    packed = prefix.pack(prefix.extract(data.step_form.images(batch))).cpu()
    features = data.form.join(packed, data.form.split(data.raw)[1])
    plain = _outcome(trainer, pl_module, batch, name)
    try:
        with installed(prefix):
            stored = _outcome(trainer, pl_module, batch_on_device(trainer, pl_module, features), name)
    except Exception as error:
        raise NoStoreError(f"{name} fails on stored features ({error}): {hint}") from error
    differing = [(key, value, stored.get(key)) for key, value in plain.items() if not _close(value, stored.get(key))]
    if differing:
        key, with_images, with_features = differing[0]
        raise NoStoreError(
            f"{name} gives the {key} {_short(with_features)} on stored features, {_short(with_images)} on images: "
            f"{hint}"
        )


@contextmanager
def installed(prefix: FrozenPrefix) -> Iterator[None]:
    """The network takes features, within the context."""
    prefix.install()
    try:
        yield
    finally:
        prefix.remove()


def _loss(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Tensor:
    # without the wrapper of the strategy, so that ranks need not go together
    loss = training_loss(trainer, pl_module, batch, together=False)
    if loss is None:
        raise NoStoreError("training_step returned no loss, so the shortcut cannot be checked")
    return loss


@torch.no_grad()
def _outcome(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, name: StepName) -> dict[str, Any]:
    """What a step returns and logs, and the states of the metrics that it updates."""
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


def _close(plain: Any, stored: Any) -> bool:
    pairs = list(zip(_numbers(plain), _numbers(stored), strict=False))
    return len(_numbers(plain)) == len(_numbers(stored)) and all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True)
        for one, other in pairs
    )


def _numbers(value: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor | float | int)]
    return [torch.as_tensor(leaf).detach().double().cpu() for leaf in leaves]


def _short(value: Any) -> str:
    numbers = _numbers(value)
    return f"{float(numbers[0]):.5g}" if len(numbers) == 1 and numbers[0].numel() == 1 else "other values"
