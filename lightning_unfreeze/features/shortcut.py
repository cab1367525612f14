"""The shortcut past the frozen part, found and checked with the steps of whoever trains the network."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# torch 2.6 has no public pytree; guarded by `test_batch_form__keeps_the_form_of_the_users_batch`
from torch.utils._pytree import tree_leaves

from lightning_unfreeze.features.batch_form import NoStoreError
from lightning_unfreeze.features.host import Host
from lightning_unfreeze.features.prefix import FrozenPrefix
from lightning_unfreeze.features.recall import recall_prefix
from lightning_unfreeze.features.viewed import ViewedData


def find_shortcut(host: Host, data: ViewedData, searches: Path | None = None) -> tuple[FrozenPrefix, str]:
    """The frozen prefix for the training step, checked on a batch; and why it does not lie deeper. Called `aside`.

    Args:
        host: Whose step it is.
        data: The training data.
        searches: File of what was found before; None to look and leave nothing anywhere.

    Raises:
        NoStoreError: If there is none, with the reason.
    """
    images, step = data.form.images(data.fed), _step_on(host, data)
    prefix, reason = recall_prefix(host.network, images, step, data.fed, host.conditions, searches)
    if prefix is None:
        raise NoStoreError(reason)
    check_step(host, prefix, data, training=True)
    return prefix, reason


def _step_on(host: Host, data: ViewedData) -> Callable[[Tensor], Any]:
    """The training step as a function of the images, or of what stands in their place; any number of them."""
    images, beside = data.form.split(data.fed)

    def step(x: Tensor) -> Any:
        rows = torch.arange(len(x)) % len(images)
        own = {name: value[rows.to(value.device)] for name, value in beside.items()}
        return host.run(data.form.join(x, own))

    return step


def check_step(host: Host, prefix: FrozenPrefix, data: ViewedData, training: bool) -> None:
    """A batch through the whole step, both ways.

    Compares what the step returns and logs and the states of its metrics. Called `aside`.

    Raises:
        NoStoreError: If they differ.
    """
    name = "training_step" if training else "validation_step"
    hint = (
        "the step changes the images on their way to the network, or uses them in another way; do what changes images "
        "in the dataset's transform"
    )
    images, beside = data.form.split(data.fed)
    plain = host.outcome(data.fed, training)
    try:
        with prefix.replay(prefix.extract(images)) as stand_in:
            stored = host.outcome(data.form.join(stand_in, beside), training)
    except Exception as error:
        raise NoStoreError(f"{name} fails on stored features ({error}): {hint}") from error
    differing = [(key, value, stored.get(key)) for key, value in plain.items() if not _close(value, stored.get(key))]
    if differing:
        key, with_images, with_features = differing[0]
        raise NoStoreError(
            f"{name} gives the {key} {_short(with_features)} on stored features, {_short(with_images)} on images: "
            f"{hint}"
        )


def step_seconds(host: Host, prefix: FrozenPrefix, data: ViewedData) -> tuple[float, float]:
    """Seconds per image of forward and backward of the training step: on images, on features. Called `aside`."""
    step, images = _step_on(host, data), data.form.images(data.fed)
    features = prefix.extract(images)

    def on_features() -> None:
        with prefix.replay(features) as stand_in:
            step(stand_in).backward()

    plain, stored = (seconds(action, host.device) for action in (lambda: step(images).backward(), on_features))
    return plain / len(images), stored / len(images)


def seconds(action: Callable[[], Any], device: torch.device) -> float:
    """Of the quicker of two runs after one that warms up: caches, lazy set-up and a busy machine only ever add time."""
    return min([_seconds_once(action, device) for _ in range(3)][1:])


def _seconds_once(action: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


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
