"""Test images that are not like the training images: four simple corruptions of what the network sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unfreeze.seeding import keyed_rng

SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda images: images + 0.6 * torch.randn_like(images),
    "contrast": lambda images: 0.35 * images,
    "blur": lambda images: nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False),
    "brightness": lambda images: images + 1.0,
}
"""By name; they act on normalised images `(N, C, H, W)`, so their strength is in standard deviations."""


@torch.no_grad()
def shifted_accuracy(module: nn.Module, batches: Iterable[Any]) -> float:
    """Return the accuracy under each shift, their mean; noise is the same for every module.

    Args:
        module: Gives logits `(N, classes)`; it is put in eval mode.
        batches: Of images and labels, in a fixed order.
    """
    module.eval()
    device = next(module.parameters()).device
    right = total = 0
    for number, (images, labels) in enumerate(batches):
        for name, shift in SHIFTS.items():
            with keyed_rng("shift", name, number):
                shifted = shift(images)
            right += int((module(shifted.to(device)).argmax(-1).cpu() == labels).sum())
            total += len(labels)
    return right / total
