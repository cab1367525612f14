"""Test images that are not like the training images: four simple corruptions of what the network sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_unfreeze.seeding import keyed_rng

SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda images: images + 0.6 * torch.randn_like(images),
    "contrast": lambda images: 0.35 * images,
    "blur": lambda images: nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False),
    "brightness": lambda images: images + 1.0,
}
"""By name; they act on normalised images `(N, C, H, W)`, so their strength is in standard deviations."""


class ShiftImages(Callback):
    """Puts the images of every validation batch under a shift; the noise is the same for every module.

    Args:
        name: Of the shift.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Shifts the batch in place: it is this step's own.

        Raises:
            MisconfigurationException: Where the batch holds no images.
        """
        images = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim == 4]
        if not images or not images[0].is_floating_point():
            raise MisconfigurationException("shifts=true needs batches with floating point images (N, C, H, W).")
        # on the CPU: the draws of a device are its own
        with keyed_rng("shift", self.name, batch_idx):
            images[0].copy_(SHIFTS[self.name](images[0].cpu()))
