"""What test-time augmentation changed on one set: predictions, metrics, and the picture of what it fixed and broke."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from lightning_unfreeze.tta.views import Activation, draw_view, negative_log_likelihood

_METRIC_WORDS = {"val": {"val", "valid", "validation"}, "test": {"test"}, "train": {"train", "training"}}
SHEET_IMAGES = 6
_SHEET_PX = 128
_FIXED, _BROKEN = "#1b7f79", "#c8553d"  # told apart in every common colour blindness, and in grey
_PLOTTED_CLASSES = 20


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


def scores_of(result: TTAResult, pl_module: pl.LightningModule, prefix: str) -> dict[str, float]:
    """All numbers of one set, by the name they are logged under."""
    scores: dict[str, float] = {}
    target, activation = result.target, result.activation
    before, after = result.correct_plain, result.correct
    for name, log_probs, correct in (("plain", result.plain, before), ("tta", result.merged, after)):
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
    scores[f"{prefix}_tta_gain"] = (fixed - broken) / before.numel()
    scores[f"{prefix}_tta_fixed"], scores[f"{prefix}_tta_broken"] = float(fixed), float(broken)
    for name in ("agreement", "entropy", "mutual_information"):
        scores[f"{prefix}_tta_{name}"] = getattr(result, name).double().mean().item()
    return scores


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


def thumbnail(image: Tensor) -> Tensor:
    """`(H, W, 3)` in [0, 1] on the CPU, at most 128 px; the normalisation is not known, so the range is stretched."""
    image = image.detach().float().cpu()[:3]
    scale = min(1.0, _SHEET_PX / max(image.shape[-2:]))
    image = draw_view(image[None], f"scale:{scale}")[0]
    low, high = torch.quantile(image, torch.tensor([0.005, 0.995]))
    stretched = ((image - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
    colours: Tensor = stretched.expand(3, -1, -1)
    return colours.permute(1, 2, 0)


def plot_flips(result: TTAResult, images: Mapping[int, Tensor], classes: Sequence[str] | None, title: str) -> Figure:
    """Predictions that TTA corrected and corrupted, per class, and a sheet of the images they belong to.

    Args:
        result: One set.
        images: Pictures `(H, W, 3)` in [0, 1] of flipped samples, by index.
        classes: Class names; None writes numbers.
        title: What was evaluated.
    """
    before, after = result.correct_plain, result.correct
    fixed, broken = after & ~before, before & ~after
    num_classes = result.plain.shape[1]
    names = list(classes) if classes is not None and len(classes) == num_classes else list(map(str, range(num_classes)))
    members = torch.eye(num_classes, dtype=torch.long)[result.target] if result.activation == "softmax" else None
    per_class = {
        "fixed": (fixed.long() @ members) if members is not None else fixed.sum(0),
        "broken": (broken.long() @ members) if members is not None else broken.sum(0),
        "n": members.sum(0) if members is not None else torch.full((num_classes,), len(fixed)),
    }
    flips = per_class["fixed"] + per_class["broken"]
    shown = flips.argsort(descending=True, stable=True)[:_PLOTTED_CLASSES]

    sheet = {
        "fixed": [row for row in flipped_rows(fixed) if int(result.index[row]) in images][:SHEET_IMAGES],
        "broken": [row for row in flipped_rows(broken) if int(result.index[row]) in images][:SHEET_IMAGES],
    }
    figure = Figure(figsize=(13, max(4.2, 1.4 + 0.34 * len(shown))), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.7))
    left, right = halves
    axes = left.subplots()
    for place, column in enumerate(shown.tolist()):
        up, down, n = (int(per_class[key][column]) for key in ("fixed", "broken", "n"))
        axes.barh(place, up, color=_FIXED, height=0.7)
        axes.barh(place, -down, color=_BROKEN, height=0.7)
        axes.annotate(f" {up}", (up, place), va="center", ha="left", color=_FIXED)
        axes.annotate(f"{down} ", (-down, place), va="center", ha="right", color=_BROKEN)
        points = f"{100 * (up - down) / n:+.1f} pt" if n else "none"
        axes.annotate(
            f"{points}, n = {n}", (1.0, place), xycoords=("axes fraction", "data"), va="center", ha="right", fontsize=8
        )
    span = max(1, int(flips.max()))
    axes.set(xlim=(-1.15 * span, 1.9 * span), ylim=(len(shown) - 0.4, -0.6), xlabel="predictions broken | fixed")
    axes.set_yticks(range(len(shown)), [names[column] for column in shown.tolist()])
    axes.tick_params(left=False)
    axes.set_xticks([])
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)
    more = f", {_PLOTTED_CLASSES} of {num_classes} classes" if num_classes > _PLOTTED_CLASSES else ""
    axes.set_title(f"Gain per class{more}", fontsize=10, loc="left")

    grid = right.subplots(2, SHEET_IMAGES, squeeze=False)
    for line, (kind, colour, total) in enumerate((("fixed", _FIXED, fixed), ("broken", _BROKEN, broken))):
        for cell, panel in enumerate(grid[line]):
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(False)
            if cell == 0:
                panel.set_ylabel(f"{kind}: {int(total.sum())}", color=colour, fontsize=10, weight="bold")
            if cell >= len(sheet[kind]):
                continue
            row = sheet[kind][cell]
            panel.imshow(images[int(result.index[row])].numpy())
            panel.spines[:].set(visible=True, color=colour, linewidth=2.5)
            panel.set_title(_flip_caption(result, row, names, kind), fontsize=8)
    gain = after.double().mean().item() - before.double().mean().item()
    figure.suptitle(
        f"TTA on {title}: accuracy {100 * before.double().mean().item():.2f} % → "
        f"{100 * after.double().mean().item():.2f} % ({100 * gain:+.2f} pt), {int(fixed.sum())} fixed, "
        f"{int(broken.sum())} broken of {before.numel()} predictions"
    )
    return figure


def flipped_rows(flipped: Tensor) -> list[int]:
    """The samples with a flip: of `(N,)`, or in any label of `(N, C)`."""
    return flipped.reshape(len(flipped), -1).any(1).nonzero().flatten().tolist()


def _flip_caption(result: TTAResult, row: int, names: Sequence[str], kind: str) -> str:
    if result.activation == "sigmoid":
        changed = result.correct[row] if kind == "fixed" else result.correct_plain[row]
        other = result.correct_plain[row] if kind == "fixed" else result.correct[row]
        labels: list[int] = (changed & ~other).nonzero().flatten().tolist()
        return "\n".join(f"{'has' if result.target[row, label] else 'no'} {names[label]}" for label in labels[:2])
    was, now = (names[int(part[row].argmax())] for part in (result.plain, result.merged))
    return f"{was}\n→ {now}"
