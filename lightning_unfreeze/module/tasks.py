"""One class per image, or several labels: loss, probabilities, metrics, and which targets fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MultilabelAccuracy,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)

TaskName = Literal["multiclass", "multilabel"]


@dataclass(frozen=True)
class SingleLabel:
    """Exactly one of `size` classes per image: softmax and cross entropy; targets are class indices `(N,)`.

    Args:
        size: Number of classes, 2 or more.
        label_smoothing: Of the training loss, in [0, 1).
        top_k: Top-k accuracy too, where there are more classes than this.
    """

    size: int
    label_smoothing: float = 0.0
    top_k: int = 5
    name: ClassVar[TaskName] = "multiclass"

    def probs(self, logits: Tensor) -> Tensor:
        """Probabilities `(N, C)` that sum to 1 per image."""
        return logits.float().softmax(-1)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(logits, targets)

    def training_loss(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Cross entropy with label smoothing and a weight per class; targets also as shares `(N, C)`, of MixUp."""
        return F.cross_entropy(logits, targets, weight=weights, label_smoothing=self.label_smoothing)

    def metrics(self) -> dict[str, Metric | MetricCollection]:
        """Accuracy, macro F1, and top-k accuracy where it is not always 1."""
        metrics: dict[str, Metric | MetricCollection] = {
            "acc": MulticlassAccuracy(self.size, average="micro"),
            "f1": MulticlassF1Score(self.size, average="macro"),
        }
        if self.size > self.top_k:
            metrics[f"acc_top{self.top_k}"] = MulticlassAccuracy(self.size, average="micro", top_k=self.top_k)
        return metrics

    def balanced_weights(self, counts: Sequence[int], num_images: int) -> Tensor:
        """Weights in inverse proportion to how often each class comes, with mean 1 over the images."""
        return num_images / (self.size * torch.tensor(counts, dtype=torch.float32).clamp_min(1))

    def check_targets(self, targets: Any, num_images: int) -> None:
        """Refuses what are no class indices.

        Raises:
            MisconfigurationException: With what came, what is accepted, and what to do.
        """
        wanted = f"class indices (N,) from 0 to {self.size - 1}, for {num_images} images ({num_images},)"
        _check_kind(targets, wanted)
        if targets.shape == (num_images, self.size) and targets.ndim == 2:
            raise MisconfigurationException(
                f"The targets are {tuple(targets.shape)} {_dtype(targets)}, {wanted} are expected: for several labels "
                f"per image give TransferClassifier(num_labels={self.size}) instead of num_classes (its loss is a "
                "sigmoid's); for one-hot rows give labels.argmax(1)."
            )
        if targets.shape != (num_images,):
            raise MisconfigurationException(f"The targets are {tuple(targets.shape)}, {wanted} are expected.")
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise MisconfigurationException(
                f"The targets are {_dtype(targets)} (the first is {targets[0].item():.4g}), {wanted} are expected: "
                "convert them with .long(); for a quantity instead of a class (regression) write a LightningModule "
                "with one output and an MSE loss, all callbacks but TTAEval serve it."
            )
        _check_range(targets, self.size - 1, wanted, f"set num_classes to {int(targets.max()) + 1} or more")


@dataclass(frozen=True)
class MultiLabel:
    """Any number of `size` labels per image: a sigmoid and binary cross entropy each; targets are 0 and 1, `(N, C)`.

    Args:
        size: Number of labels.
        label_smoothing: Of the training loss: 0 and 1 become s/2 and 1 - s/2.
        threshold: A label is predicted from this probability on.
    """

    size: int
    label_smoothing: float = 0.0
    threshold: float = 0.5
    name: ClassVar[TaskName] = "multilabel"

    def probs(self, logits: Tensor) -> Tensor:
        """Probabilities `(N, C)`, each label by itself."""
        return logits.float().sigmoid()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Binary cross entropy, the mean over images and labels."""
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))

    def training_loss(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Binary cross entropy with label smoothing and a weight per label on what has it."""
        smooth = targets.to(logits.dtype) * (1 - self.label_smoothing) + self.label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, smooth, pos_weight=weights)

    def metrics(self) -> dict[str, Metric | MetricCollection]:
        """Share of right decisions, macro F1, and mean average precision over the labels (mAP)."""
        return {
            "acc": MultilabelAccuracy(self.size, threshold=self.threshold, average="micro"),
            "f1": MultilabelF1Score(self.size, threshold=self.threshold, average="macro"),
            "map": MultilabelAveragePrecision(self.size, average="macro"),
        }

    def balanced_weights(self, counts: Sequence[int], num_images: int) -> Tensor:
        """How often each label is missing for each time that it is there."""
        there = torch.tensor(counts, dtype=torch.float32).clamp_min(1)
        return (num_images - there).clamp_min(1) / there

    def check_targets(self, targets: Any, num_images: int) -> None:
        """Refuses what are no rows of 0 and 1.

        Raises:
            MisconfigurationException: With what came, what is accepted, and what to do.
        """
        wanted = f"rows of 0 and 1, one column per label, ({num_images}, {self.size})"
        _check_kind(targets, wanted)
        if targets.shape != (num_images, self.size):
            hint = ""
            if targets.shape == (num_images,):
                hint = ": for one class per image give num_classes instead of num_labels"
            elif targets.ndim == 2:
                hint = f": set num_labels to {targets.shape[1]}"
            raise MisconfigurationException(f"The targets are {tuple(targets.shape)}, {wanted} are expected{hint}.")
        if not bool(((targets == 0) | (targets == 1)).all()):
            odd = targets[(targets != 0) & (targets != 1)][0].item()
            raise MisconfigurationException(f"The targets hold {odd:.4g}, {wanted} are expected.")


Task = SingleLabel | MultiLabel


def batch_of(batch: Any) -> tuple[Tensor, Any]:
    """Images and targets of a batch.

    Raises:
        MisconfigurationException: For a dict, or anything else that is no pair.
    """
    if isinstance(batch, Mapping):
        raise MisconfigurationException(
            f"TransferClassifier takes batches (images, targets), this one is a dict of {', '.join(map(repr, batch))}: "
            "let the dataset return a tuple, or override training_step, validation_step and test_step to unpack it."
        )
    if not isinstance(batch, Sequence) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        parts = [type(part).__name__ for part in batch] if isinstance(batch, Sequence) else type(batch).__name__
        raise MisconfigurationException(
            f"TransferClassifier takes batches (images, targets), this one is {parts}: let the dataset return "
            "(image, target), or override training_step, validation_step and test_step."
        )
    return batch[0], batch[1]


def _check_kind(targets: Any, wanted: str) -> None:
    if isinstance(targets, Tensor):
        return
    kind = type(targets).__name__
    if isinstance(targets, Mapping):
        kind = f"a dict of {', '.join(map(repr, targets))}"
    elif isinstance(targets, Sequence) and targets and isinstance(targets[0], str):
        kind = f"names ({', '.join(map(repr, targets[:3]))})"
    raise MisconfigurationException(
        f"The targets are {kind}, {wanted} are expected: let the dataset return a number per image, for names their "
        "place in the sorted list of all names."
    )


def _check_range(targets: Tensor, largest: int, wanted: str, advice: str) -> None:
    low, high = int(targets.min()), int(targets.max())
    if low < 0:
        raise MisconfigurationException(f"The targets hold {low}, {wanted} are expected: leave such images out.")
    if high > largest:
        raise MisconfigurationException(f"The targets hold {high}, {wanted} are expected: {advice}.")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
