"""The picture of what test-time augmentation fixed and broke, per class and as a sheet of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_unfreeze.tta.result import TTAResult, flipped_rows
from lightning_unfreeze.tta.views import draw_view

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHEET_IMAGES = 6
_SHEET_PX = 128
_FIXED, _BROKEN = "#1b7f79", "#c8553d"  # told apart in every common colour blindness, and in grey
_PLOTTED_CLASSES = 20


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

    Images are pictures `(H, W, 3)` in [0, 1] of flipped samples, by index.
    """
    from matplotlib.figure import Figure

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


def _flip_caption(result: TTAResult, row: int, names: Sequence[str], kind: str) -> str:
    if result.activation == "sigmoid":
        changed = result.correct[row] if kind == "fixed" else result.correct_plain[row]
        other = result.correct_plain[row] if kind == "fixed" else result.correct[row]
        labels: list[int] = (changed & ~other).nonzero().flatten().tolist()
        return "\n".join(f"{'has' if result.target[row, label] else 'no'} {names[label]}" for label in labels[:2])
    was, now = (names[int(part[row].argmax())] for part in (result.plain, result.merged))
    return f"{was}\n→ {now}"
