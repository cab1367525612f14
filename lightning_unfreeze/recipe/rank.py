"""Backbones in order of what a linear head on their features is worth: one pass each, nothing is fine-tuned."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F

from lightning_unfreeze.features.head_rows import head_rows, linear_head
from lightning_unfreeze.features.shortcut import seconds
from lightning_unfreeze.features.solve import solve_head
from lightning_unfreeze.layers.groups import layer_groups
from lightning_unfreeze.reporting.judged import wilson

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Ranked:
    """A backbone, and how its features did.

    Attributes:
        backbone: As it was asked for.
        accuracy: Of the solved head on the held-out images.
        low: Lower end of the 95 % interval (Wilson 1927) for other images of the same kind.
        high: Its upper end.
        images_per_second: Of the network alone, forward, on this device.
        parameters: Of the whole network.
        seconds: That reading the images, the pass and the solution took.
        held_out: Number of images that the accuracy is of.
        ridge: Of the solution.
    """

    backbone: str
    accuracy: float
    low: float
    high: float
    images_per_second: float
    parameters: int
    seconds: float
    held_out: int
    ridge: float


def rank_backbone(name: str, module: pl.LightningModule, data: pl.LightningDataModule, device: torch.device) -> Ranked:
    """One pass over the images, a solved head, and its accuracy on the test images, or on those of validation.

    Args:
        name: What to call it.
        module: Its network takes `module(images)` and ends in one linear layer.
        data: Set up for `fit` and, where there are test images, for `test`; its training images are read in order and
            as in evaluation.
        device: Where to compute.

    Raises:
        ValueError: Where the head is not one linear layer, or its input is no row per image.
    """
    start = time.monotonic()
    module.to(device).eval()
    head = linear_head(module, list(layer_groups(module).values())[-1].parameters())

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(module(images.to(device)), labels.to(device))

    rows = {split: head_rows(loss, head, loader) for split, loader in _loaders(data).items()}
    solution = solve_head(rows["train"], rows["val"], num_classes=head.out_features, device=device)
    judged = rows.get("test", rows["val"])
    right = int(((judged.features @ solution.weight.T + solution.bias).argmax(1) == judged.targets).sum())
    took = time.monotonic() - start
    images = next(iter(data.val_dataloader()))[0].to(device)
    with torch.no_grad():
        forward = seconds(lambda: module(images), device)
    low, high = wilson(right, len(judged.targets))
    return Ranked(
        name,
        right / len(judged.targets),
        low,
        high,
        len(images) / forward,
        sum(parameter.numel() for parameter in module.parameters()),
        took,
        len(judged.targets),
        solution.ridge,
    )


def plot_ranking(ranked: Sequence[Ranked]) -> Figure:
    """Accuracy with its interval over the milliseconds of an image (log x)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for index, row in enumerate(ranked):
        cost = 1000 / row.images_per_second
        reach = [[row.accuracy - row.low], [row.high - row.accuracy]]
        axis.errorbar(cost, row.accuracy, yerr=reach, fmt="o", color=f"C{index % 10}", capsize=3)
        axis.annotate(f" {row.backbone}", (cost, row.accuracy), fontsize=8, xytext=(4, 4), textcoords="offset points")
    axis.set_xscale("log")
    axis.margins(x=0.25)
    axis.set_xlabel("milliseconds per image, forward")
    axis.set_ylabel("accuracy of a solved head, 95 % interval")
    axis.grid(alpha=0.25)
    return figure


def _loaders(data: Any) -> dict[str, Any]:
    """The images of each split in order, as in evaluation."""
    val = data.val_dataloader()
    train = torch.utils.data.DataLoader(
        data.dataset("train"), batch_size=val.batch_size, collate_fn=val.collate_fn, num_workers=val.num_workers
    )
    loaders = {"train": train, "val": val}
    with contextlib.suppress(MisconfigurationException):  # there are no test images
        loaders["test"] = data.test_dataloader()
    return loaders
