"""What test-time augmentation changed on one set: predictions and metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from lightning_unfreeze.tta.views import Activation, negative_log_likelihood

_METRIC_WORDS = {"val": {"val", "valid", "validation"}, "test": {"test"}, "train": {"train", "training"}}


@dataclass
class TTAResult:
    """What one pass over a set found, samples in the order of their index.

    Attributes:
        activation: `"softmax"`, or `"sigmoid"` for labels of their own.
        metrics: As logged.
        index: `(N,)` place in the dataset.
        target: `(N,)` classes, or `(N, C)` of 0 and 1.
        plain: `(N, C)` log-probabilities without augmentation.
        merged: `(N, C)` log-probabilities of the merge.
        entropy: `(N,)` predictive entropy in nats.
        mutual_information: `(N,)` in nats.
        agreement: `(N,)` share of the views that predict what the mean predicts.
    """

    activation: Activation
    metrics: dict[str, float]
    index: Tensor
    target: Tensor
    plain: Tensor
    merged: Tensor
    entropy: Tensor
    mutual_information: Tensor
    agreement: Tensor

    @property
    def correct_plain(self) -> Tensor:
        """Which plain predictions are right: `(N,)`, or `(N, C)` for the sigmoid."""
        return decisions(self.plain, self.activation) == self.target

    @property
    def correct(self) -> Tensor:
        """Which merged predictions are right: `(N,)`, or `(N, C)` for the sigmoid."""
        return decisions(self.merged, self.activation) == self.target


def decisions(log_probs: Tensor, activation: Activation) -> Tensor:
    """What `(N, C)` log-probabilities predict: `(N,)` classes, or `(N, C)` of 0 and 1 for the sigmoid."""
    return log_probs.argmax(-1) if activation == "softmax" else (log_probs > math.log(0.5)).long()


def flipped_rows(flipped: Tensor) -> list[int]:
    """The samples with a flip: of `(N,)`, or in any label of `(N, C)`."""
    return flipped.reshape(len(flipped), -1).any(1).nonzero().flatten().tolist()


def scores_of(
    result: TTAResult, pl_module: pl.LightningModule, prefix: str, word: str = "tta", *, with_plain: bool = True
) -> dict[str, float]:
    """All numbers of one set, the module's own classification metrics among them, by the name they are logged under."""
    scores: dict[str, float] = {}
    target, activation = result.target, result.activation
    before, after = result.correct_plain, result.correct
    for name, log_probs, correct in (("plain", result.plain, before), (word, result.merged, after)):
        if name == "plain" and not with_plain:
            continue
        probs = log_probs.exp().float()
        if activation == "sigmoid":
            ece = binary_calibration_error(probs.flatten(), target.flatten())
        else:
            ece = multiclass_calibration_error(probs, target, num_classes=probs.shape[1])
        scores[f"{prefix}_acc_{name}"] = correct.double().mean().item()
        scores[f"{prefix}_nll_{name}"] = negative_log_likelihood(log_probs.double(), target, activation).item()
        scores[f"{prefix}_ece_{name}"] = ece.item()
        scores |= _module_scores(pl_module, prefix, name, probs, target)
    # from the counts: a module may call another average than theirs "acc"
    fixed, broken = int((after & ~before).sum()), int((before & ~after).sum())
    scores[f"{prefix}_{word}_gain"] = (fixed - broken) / before.numel()
    scores[f"{prefix}_{word}_fixed"], scores[f"{prefix}_{word}_broken"] = float(fixed), float(broken)
    for name in ("agreement", "entropy", "mutual_information"):
        scores[f"{prefix}_{word}_{name}"] = getattr(result, name).double().mean().item()
    return scores


def disagreements(results: Mapping[str, TTAResult], prefix: str, logged: Mapping[str, Tensor]) -> Iterator[str]:
    """What to say where the module's own accuracy is not that of the plain view: then outputs or targets are misread.

    Batches of unequal size may be averaged without their sizes, and precisions differ, so a sample or two, or two
    points, are no disagreement.
    """
    for own, value in logged.items():
        bare, slash, loader = own.partition("/dataloader_idx_")
        words = bare.replace("/", "_").split("_")
        result = results.get(prefix + slash + loader)
        if result is None or words[0] not in _METRIC_WORDS[prefix] or words[1:] not in (["acc"], ["accuracy"]):
            continue
        plain = result.metrics.get(f"{prefix}_{words[1]}_plain", result.correct_plain.double().mean().item())
        if value.numel() == 1 and abs(float(value) - plain) > max(0.02, 2 / len(result.index)):
            reading = "one class of several" if result.activation == "softmax" else "labels of their own"
            yield (
                f"TTAEval finds an accuracy of {plain:.3f} without augmentation, and the module logs "
                f"{own}={float(value):.3f}: the outputs were taken for {reading}; say what they are with "
                "TTAEval(activation=...) or forward=..., and where the target is with target=..."
            )


def _module_scores(
    pl_module: pl.LightningModule, prefix: str, name: str, probs: Tensor, target: Tensor
) -> dict[str, float]:
    """The module's own classification metrics over the whole set, on a copy that does not talk to other ranks."""
    if probs.shape[1] == 1:
        probs, target = probs[:, 0], target[:, 0]
    scores: dict[str, float] = {}
    for attribute, child in pl_module.named_children():
        metrics = list(child.values()) if isinstance(child, MetricCollection) else [child]
        words = set(f"{attribute}_{getattr(child, 'prefix', None) or ''}".replace("/", "_").split("_"))
        other_stages = set().union(*(names for stage, names in _METRIC_WORDS.items() if stage != prefix))
        if words & other_stages or not all(_is_classification(metric) for metric in metrics):
            continue
        clone: Any = child.clone().cpu()  # type: ignore[operator]
        clone.reset()
        for metric in clone.values() if isinstance(clone, MetricCollection) else [clone]:
            metric.distributed_available_fn = bool  # `bool()` is False: every rank holds the whole set already
        try:
            clone.update(probs, target)
            computed = clone.compute()
        except (ValueError, RuntimeError) as error:
            rank_zero_warn(
                f"TTAEval leaves the metric {attribute!r} out, it does not take merged probabilities: {error}"
            )
            continue
        for key, value in (computed if isinstance(computed, dict) else {attribute: computed}).items():
            if value.numel() == 1:
                known = any(key.startswith(word) for word in _METRIC_WORDS[prefix])
                scores[f"{key if known else f'{prefix}_{key}'}_{name}"] = value.item()
    return scores


def _is_classification(metric: nn.Module) -> bool:
    return isinstance(metric, Metric) and type(metric).__module__.startswith("torchmetrics.classification")
