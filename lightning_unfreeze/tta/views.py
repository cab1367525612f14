"""Views of an image, and what becomes of a model's answers to them: merge, uncertainty.

Everything here is a pure function of tensors. Images are `(N, channels, H, W)`, logits of V views `(V, N, C)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

Merge = Literal["mean", "log_mean", "gmean", "max", "vote"]
Activation = Literal["softmax", "sigmoid"]
View = str | Callable[[Tensor], Tensor]

_CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right", "centre")
CROP_SHARE = 7 / 8
"""Side of a crop over the side of the image where no size is given."""

VIEW_SETS: dict[str, tuple[str, ...]] = {
    "flip": ("identity", "hflip"),
    "five_crop": ("identity", *_CORNERS),
    "ten_crop": ("identity", *_CORNERS, *(f"hflip+{corner}" for corner in _CORNERS)),
    "d4": ("identity", "rot90", "rot180", "rot270", "hflip", "hflip+rot90", "hflip+rot180", "hflip+rot270"),
    "multiscale": ("identity", "scale:0.8", "scale:1.25"),
}
"""Named sets in a fixed order, the plain image first."""


def check_view(name: str) -> None:
    """Refuses a view that `draw_view` does not know.

    Raises:
        ValueError: With the names that there are.
    """
    for step in name.split("+"):
        if step in ("identity", "hflip", "vflip", "rot90", "rot180", "rot270", *_CORNERS):
            continue
        kind, _, factor = step.partition(":")
        try:
            known = kind == "scale" and 0 < float(factor) < math.inf
        except ValueError:
            known = False
        if not known:
            raise ValueError(
                f"view {name!r} is not known: {step!r} is none of identity, hflip, vflip, rot90, rot180, rot270, "
                f"{', '.join(_CORNERS)}, scale:FACTOR; steps are joined with '+', as in 'hflip+rot90'"
            )


def extra_views(views: str | Sequence[View]) -> list[View]:
    """The views beside the plain one, of a named set or a list.

    Raises:
        ValueError: For a view that there is not.

    >>> extra_views("flip"), extra_views(["identity", "rot90"])
    (['hflip'], ['rot90'])
    """
    if views == "random":
        return []
    if isinstance(views, str):
        if views not in VIEW_SETS:
            raise ValueError(f"views={views!r} is none of {', '.join(map(repr, VIEW_SETS))}, 'random', and no list")
        return list(VIEW_SETS[views][1:])
    for view in views:
        if isinstance(view, str):
            check_view(view)
        elif not callable(view):
            raise ValueError(f"a view is a name or a function of a batch of images, got {view!r}")
    return [view for view in views if view != "identity"]


def beta_weights(beta: float | str | None, num_views: int) -> list[float] | None:
    """Weights of fastai's two rules: 2.x gives the plain view `beta`; 0.7 repeats it once for every four others.

    Raises:
        ValueError: For anything but a share, `"v2"`, `"v07"` or None.

    >>> beta_weights("v2", 4)
    [0.25, 0.25, 0.25, 0.25]
    """
    others = num_views - 1
    if beta is None or others == 0:
        return None
    if beta == "v07":
        beta = math.ceil(others / 4) / (math.ceil(others / 4) + others)
    elif beta == "v2":
        beta = 0.25
    if isinstance(beta, str) or not 0 <= beta <= 1:
        raise ValueError(f"beta={beta!r} is not a share in [0, 1], 'v2' or 'v07'")
    return [beta] + [(1 - beta) / others] * others


def view_functions(views: Sequence[View], crop_px: int | None) -> list[Callable[[Tensor], Tensor]]:
    """Each view as a function of the images: those by name, and functions of the user's as they are."""
    return [partial(draw_view, name=view, crop_px=crop_px) if isinstance(view, str) else view for view in views]


def draw_view(images: Tensor, name: str, crop_px: int | None = None) -> Tensor:
    """One view of a batch, by name; steps joined with `+` run from left to right.

    Crops stand where torchvision's `five_crop` and `ten_crop` put them.

    Args:
        images: `(N, channels, H, W)`.
        name: E.g. `"hflip"`, `"rot90"`, `"hflip+top_left"`, `"scale:1.25"`.
        crop_px: Side of a square crop, which stays that size. None: 7/8 of each side, scaled back to `(H, W)`, so that
            a network of fixed input size takes it.

    Raises:
        ValueError: For a view that these images do not have: a quarter turn of a rectangle (a network with a flatten
            would read scrambled pixels), a crop larger than the image.

    >>> draw_view(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), "hflip+rot90").tolist()
    [[[[1.0, 3.0], [2.0, 4.0]]]]
    """
    for step in name.split("+"):
        images = _draw_step(images, step, crop_px)
    return images


def _draw_step(images: Tensor, step: str, crop_px: int | None) -> Tensor:
    height, width = images.shape[-2:]
    if step == "identity":
        return images
    if step == "hflip":
        return images.flip(-1)
    if step == "vflip":
        return images.flip(-2)
    if step.startswith("rot"):
        quarter_turns = int(step.removeprefix("rot")) // 90
        if quarter_turns % 2 and height != width:
            raise ValueError(f"view {step!r} (of 'd4') needs square images, the batch holds {height}x{width} px")
        return torch.rot90(images, quarter_turns, (-2, -1))
    if step.startswith("scale:"):
        factor = float(step.removeprefix("scale:"))
        return _resize(images, max(1, round(factor * height)), max(1, round(factor * width)))
    size = [crop_px, crop_px] if crop_px is not None else [round(CROP_SHARE * height), round(CROP_SHARE * width)]
    if size[0] > height or size[1] > width:
        raise ValueError(f"a crop of {crop_px} px is larger than the images of {height}x{width} px")
    crop = TF.five_crop(images, size)[_CORNERS.index(step)]
    return crop if crop_px is not None else _resize(crop, height, width)


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    # not every device has a half-precision kernel for this, and rounding there would blur the view
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    return F.interpolate(wide, (height, width), mode="bilinear", antialias=True).to(images.dtype)


def _log_probs(logits: Tensor, activation: Activation) -> Tensor:
    """`(V, N, C)` logits -> `(V, N, C)` log-probabilities, or `(V, N, C, 2)` of no and yes for the sigmoid."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if activation == "sigmoid":
        return torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=-1)
    return logits.log_softmax(-1)


def _normalised_weights(weights: Tensor | None, log_probs: Tensor, method: str) -> Tensor:
    """Weights as `(V, 1, 1 or C[, 1])` that sum to one over the views."""
    num_views, num_classes = log_probs.shape[0], log_probs.shape[2]
    if weights is None:
        weights = log_probs.new_ones(num_views)
    elif method == "max":
        raise ValueError("merge 'max' takes no weights; use 'mean', 'gmean' or 'vote'")
    weights = torch.as_tensor(weights, dtype=log_probs.dtype, device=log_probs.device)
    if tuple(weights.shape) not in ((num_views,), (num_views, num_classes)):
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}, for these logits they are ({num_views},), one per view, "
            f"or ({num_views}, {num_classes}), one per view and class"
        )
    total = weights.sum(0)
    if not (bool((weights >= 0).all()) and bool((total > 0).all()) and bool(torch.isfinite(total).all())):
        raise ValueError(f"weights have to be finite, not negative and not all zero, got {weights.tolist()}")
    weights = (weights / total).reshape(num_views, 1, -1)
    return weights.unsqueeze(-1) if log_probs.ndim == 4 else weights


def _log_weighted_mean(log_probs: Tensor, weights: Tensor) -> Tensor:
    # shifted by the largest view instead of adding log(weight): a weight of zero keeps a finite gradient
    largest = log_probs.amax(0).clamp_min(torch.finfo(log_probs.dtype).min)
    return largest + (weights * (log_probs - largest).exp()).sum(0).log()


def merge_views(
    logits: Tensor, method: Merge = "mean", weights: Tensor | None = None, activation: Activation = "softmax"
) -> Tensor:
    """Merge the answers to V views into one, in log space.

    Each view is activated first; the merge is of probabilities and is normalised again:

    * `"mean"`: mean of the probabilities (fastai's rule).
    * `"log_mean"`, `"gmean"`: two names of one merge, the mean of the log-probabilities, which is the geometric mean
      of the probabilities.
    * `"max"`: largest probability of each class.
    * `"vote"`: share of the views that chose the class; a millionth of the mean breaks ties and keeps the log finite.

    Args:
        logits: `(V, N, C)`; half precision is merged in float32, float64 stays.
        method: How to merge.
        weights: `(V,)` or `(V, C)`, not negative, of any sum. None: all views alike.
        activation: `"softmax"` over C classes, or `"sigmoid"` for C labels of their own.

    Returns:
        `(N, C)` log-probabilities: of the classes, or of each label being there.

    Raises:
        ValueError: For an unknown method, shapes that do not fit, or impossible weights.

    >>> two_views = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]).log()
    >>> merge_views(two_views).exp()
    tensor([[0.7000, 0.3000]])
    """
    if logits.ndim != 3:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, they have to be (V, N, C): views, samples, classes")
    log_probs = _log_probs(logits, activation)
    share = _normalised_weights(weights, log_probs, method)
    if method == "mean":
        merged = _log_weighted_mean(log_probs, share)
    elif method in ("log_mean", "gmean"):
        # a view of weight zero has no say, not even with a probability of zero
        merged = torch.where(share > 0, share * log_probs, 0.0).sum(0)
    elif method == "max":
        merged = log_probs.amax(0)
    elif method == "vote":
        ballots = F.one_hot(log_probs.argmax(-1), log_probs.shape[-1])
        tie_break = 1e-6
        votes = (share * ballots).sum(0) * (1 - tie_break)
        merged = (votes + tie_break * _log_weighted_mean(log_probs, share).exp()).log()
    else:
        raise ValueError(f"merge {method!r} is none of 'mean', 'log_mean', 'gmean', 'max', 'vote'")
    merged = merged.log_softmax(-1)
    return merged[..., 1] if activation == "sigmoid" else merged


def merge_snapshots(
    logits: Tensor, method: Merge, weights: Sequence[float] | None, activation: Activation = "softmax"
) -> Tensor:
    """`merge_views` of the views of one or several snapshots, `(S * V, N, C)`; weights are of the V views of each.

    >>> two_snapshots = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]] * 2).log()
    >>> merge_snapshots(two_snapshots, "mean", [0.75, 0.25]).exp()
    tensor([[0.8000, 0.2000]])
    """
    # there is but the plain view while random ones are tried
    of_all = None if weights is None else [*weights] * (len(logits) // len(weights))
    return merge_views(logits, method, torch.tensor(of_all) if of_all else None, activation)


def spread(logits: Tensor, activation: Activation = "softmax") -> Tensor:
    """Standard deviation `(N, C)` of the probabilities over the views, of logits `(V, N, C)`."""
    probs = logits.softmax(-1) if activation == "softmax" else logits.sigmoid()
    return probs.std(0, correction=0)


def uncertainty(logits: Tensor, activation: Activation = "softmax") -> dict[str, Tensor]:
    """How far the views agree, per sample; entropies in nats, for the sigmoid summed over the labels.

    Args:
        logits: `(V, N, C)`.
        activation: As in `merge_views`.

    Returns:
        Each `(N,)`: `"entropy"` of the mean prediction, `"mutual_information"` (that entropy less the views' mean
        entropy: what the views disagree about), `"agreement"` (share of views that predict what the mean predicts).
    """
    log_probs = _log_probs(logits, activation)
    mean = log_probs.logsumexp(0) - math.log(len(log_probs))
    entropy = torch.special.entr(mean.exp()).sum(-1)
    information = entropy - torch.special.entr(log_probs.exp()).sum(-1).mean(0)
    agreement = (log_probs.argmax(-1) == mean.argmax(-1)).to(mean.dtype).mean(0)
    if activation == "sigmoid":
        entropy, information, agreement = entropy.sum(-1), information.sum(-1), agreement.mean(-1)
    return {"entropy": entropy, "mutual_information": information.clamp_min(0), "agreement": agreement}


def negative_log_likelihood(log_probs: Tensor, target: Tensor, activation: Activation = "softmax") -> Tensor:
    """Mean over samples (and labels), in nats: `(N, C)` log-probabilities, target `(N,)` or `(N, C)` of 0 and 1."""
    if activation == "sigmoid":
        return F.binary_cross_entropy(log_probs.exp().clamp(0, 1), target.to(log_probs.dtype))
    return F.nll_loss(log_probs, target.long())
