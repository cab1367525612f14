"""How far a run moved a network from where it started: its weights, and its features on a few images.

Displacement is not damage: the arm that moves most may be the most accurate one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_unfreeze.inside_lightning.sandbox import sandbox
from lightning_unfreeze.inside_lightning.steps import batch_on_device, step_output
from lightning_unfreeze.layers.groups import layer_groups
from lightning_unfreeze.layers.modes import in_eval_mode

_PLACES: dict[int, tuple[int, ...]] = {2: (), 3: (1,), 4: (2, 3)}
"""Dimensions of places by number of dimensions: `(N, C)`, tokens `(N, T, C)`, maps `(N, C, H, W)`."""


@dataclass(frozen=True)
class Snapshot:
    """A network at one moment.

    Attributes:
        weights: Parameters of each layer group, flat.
        features: Pooled output of each layer group of the backbone on the images, `(N, C)`.
    """

    weights: Mapping[str, Tensor]
    features: Mapping[str, Tensor]


def snapshot(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    loader: Iterable[Any],
    num_images: int,
    network: str | None = None,
) -> Snapshot:
    """Return the weights, and the features of the first images of a loader, seen by the module's own validation step.

    Args:
        trainer: Of the fit.
        module: On any device; it is left as it was.
        loader: Batches as the module's validation step takes them.
        num_images: How many to look at.
        network: As for `layer_groups`.
    """
    groups = layer_groups(module, network)
    weights = {name: torch.cat([p.detach().flatten().cpu() for p in group]) for name, group in groups.items()}
    rows: dict[str, list[Tensor]] = {}
    seen = 0
    with (
        sandbox(trainer, module),
        in_eval_mode(module),
        _last_outputs(module, network) as outputs,
        torch.no_grad(),
    ):
        for batch_idx, batch in enumerate(loader):
            there = batch_on_device(trainer, module, batch)
            step_output(trainer, module, there, batch_idx, "validation_step", together=False)
            for name, output in outputs.items():
                rows.setdefault(name, []).append(output)
            seen += max((len(output) for output in outputs.values()), default=num_images)
            if seen >= num_images:
                break
    return Snapshot(weights, {name: torch.cat(rows[name])[:num_images] for name in groups if name in rows})


def distortion(before: Snapshot, after: Snapshot) -> dict[str, float]:
    """Return displacement of the last features, linear CKA and weight distance per layer group.

    ``displacement`` is the mean of ``|f1(x) - f0(x)| / |f0(x)|`` over images (Kumar et al. 2022), ``cka`` and
    ``cka/GROUP`` are linear CKA of the last and of each group's features with those before, ``weights/GROUP`` is
    ``|w1 - w0| / |w0|``.
    """
    found: dict[str, float] = {}
    for name, old in before.weights.items():
        if old.norm() > 0:  # a head may start at zero
            found[f"weights/{name}"] = float((after.weights[name] - old).norm() / old.norm())
    for name, old in before.features.items():
        found[f"cka/{name}"] = linear_cka(old, after.features[name])
    if before.features:
        last = list(before.features)[-1]
        old, new = before.features[last], after.features[last]
        found["displacement"] = float(((new - old).norm(dim=1) / old.norm(dim=1).clamp_min(1e-12)).mean())
        found["cka"] = found[f"cka/{last}"]
    return found


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Return linear centred kernel alignment of features `(N, C)` and `(N, D)` of the same images (Kornblith 2019).

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]])
    >>> round(linear_cka(x, 5 * x[:, [1, 0]]), 6)  # blind to rotation and scale
    1.0
    """
    a, b = a.double() - a.double().mean(0), b.double() - b.double().mean(0)
    scale = (a.T @ a).norm() * (b.T @ b).norm()
    return float((b.T @ a).norm() ** 2 / scale) if scale > 0 else 1.0


@contextmanager
def _last_outputs(module: nn.Module, network: str | None) -> Iterator[dict[str, Tensor]]:
    """Keep, per layer group but the head, the pooled output of whichever of its modules ran last."""
    outputs: dict[str, Tensor] = {}
    handles = []
    for group in list(layer_groups(module, network).values())[:-1]:

        def keep(_: nn.Module, __: Any, output: Any, name: str = group.name) -> None:
            if isinstance(output, Tensor) and output.ndim in _PLACES:
                places = _PLACES[output.ndim]
                outputs[name] = (output.mean(places) if places else output).detach().float().cpu()

        handles += [part.register_forward_hook(keep) for part in group.modules()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
