"""The head solved: logistic regression on stored features, along a path of ridges. Torch only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kind = Literal["softmax", "sigmoid"]

RIDGES = tuple(10.0 ** (exponent / 2) for exponent in range(2, -11, -1))
"""From 10 to 1e-5, strongest first: each solution is a good start for the next one."""

_HELD_OUT = 5  # without validation data every fifth row of a class chooses the ridge
_PATH_TOLERANCE, _FINAL_TOLERANCE = 1e-4, 1e-6
_MAX_STEPS = 500


@dataclass(frozen=True)
class HeadRows:
    """Rows for a logistic regression.

    Attributes:
        features: `(N, D)`, floating point; several views of an image are more rows.
        targets: Classes `(N,)`; or `(N, C)`: shares of classes for `"softmax"`, 0 or 1 for `"sigmoid"`.
        kind: One class of C (`"softmax"`), or any of C labels (`"sigmoid"`).
        class_weights: `(C,)`, see `logistic_regression`.
    """

    features: Tensor
    targets: Tensor
    kind: Kind = "softmax"
    class_weights: Tensor | None = None


@dataclass(frozen=True)
class Solution:
    """A linear head and how it was chosen.

    Attributes:
        weight: `(C, D)`, of the features as they were given.
        bias: `(C,)`.
        ridge: In units of the features' mean variance.
        train_loss: Mean cross entropy on the training rows, without the penalty.
        val_loss: On the rows that chose the ridge.
        val_acc: Share of these rows whose highest logit is the target's; for `"sigmoid"` the share of labels on the
            right side of 0.
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    train_loss: float
    val_loss: float
    val_acc: float

    @torch.no_grad()
    def write_to(self, head: nn.Linear) -> None:
        """Gives the head these weights, in place."""
        head.weight.copy_(self.weight)
        head.bias.copy_(self.bias)


def logistic_regression(
    features: Tensor,
    targets: Tensor,
    ridge: float,
    *,
    num_classes: int,
    kind: Kind = "softmax",
    class_weights: Tensor | None = None,
    start: tuple[Tensor, Tensor] | None = None,
    tolerance: float = _FINAL_TOLERANCE,
) -> tuple[Tensor, Tensor]:
    """The linear head of the lowest mean cross entropy plus `ridge / 2` times the squared weights, by L-BFGS.

    The bias is not penalised. With `C = 1 / (ridge * N)` this is scikit-learn's `LogisticRegression`; for `"sigmoid"`
    each class is one of its own. Deterministic, on the device of the features, in their precision.

    Args:
        features: `(N, D)`, floating point.
        targets: Classes `(N,)`; or `(N, C)`: shares of classes for `"softmax"`, 0 or 1 for `"sigmoid"`.
        ridge: At least 0.
        num_classes: C; 1 for a single logit with `"sigmoid"`.
        kind: One class of C (`"softmax"`), or any of C labels (`"sigmoid"`).
        class_weights: `(C,)`, weights of the rows of each class, the mean is weighted; for `"sigmoid"` of the rows
            that have the label (torch's `pos_weight`).
        start: Weight and bias to begin with; zero without.
        tolerance: Largest entry of the gradient, relative to that at zero, at which it stops.

    Returns:
        Weight `(C, D)` and bias `(C,)`.

    Raises:
        ValueError: For shapes that do not fit, or a ridge below 0.

    Example:
        >>> x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> weight, bias = logistic_regression(x, y, ridge=0.1, num_classes=2)
        >>> (x @ weight.T + bias).argmax(1).tolist()
        [0, 1]
    """
    _check(features, targets, ridge, num_classes, kind)
    # the bias takes the mean up, so this is the same problem, and a better conditioned one
    mean = features.mean(0)
    scale = _scale(features - mean)
    centred = (features - mean) / scale
    weight = features.new_zeros(num_classes, features.shape[1])
    bias = features.new_zeros(num_classes)
    if start is not None:
        weight, bias = start[0].to(features) * scale, start[1].to(features) + start[0].to(features) @ mean
    weight, bias = _solve(centred, targets, ridge / scale**2, kind, class_weights, weight, bias, tolerance)
    weight = weight / scale
    return weight, bias - weight @ mean


def solve_head(
    train: HeadRows,
    val: HeadRows | None = None,
    *,
    num_classes: int,
    ridges: Sequence[float] = RIDGES,
    stop_at_loss: float | None = None,
    device: torch.device | None = None,
) -> Solution:
    """The head whose ridge is best on validation rows, of a path from strong to weak ridges, warm started.

    A ridge is given in units of the features' mean variance, so that it means the same on every network. The path ends
    early where three ridges in a row were worse than the best. Best is the lowest validation loss.

    Args:
        train: The rows to fit.
        val: Those that choose the ridge; without, a fifth of the training rows does, and then all are fitted.
        num_classes: C.
        ridges: The path.
        stop_at_loss: Take the first head of the path whose training loss is at most this, whatever validation says: a
            head to begin fine-tuning with that has not yet converged (Ren et al. 2023, how to prepare your task head).
        device: Where to compute; None for where the training rows are.

    Returns:
        The head, in float32 on the CPU.

    Raises:
        ValueError: For shapes that do not fit, or an empty path.
    """
    kind, class_weights = train.kind, train.class_weights
    features, targets = _on_device(train, device)
    path = sorted(set(ridges), reverse=True)
    if not path:
        raise ValueError("ridges is empty; give at least one number")
    _check(features, targets, path[-1], num_classes, kind)
    if val is None:
        held_out = _held_out(targets)
        judged = features[held_out], targets[held_out]
        fitted = features[~held_out], targets[~held_out]
    else:
        judged, fitted = _on_device(val, features.device), (features, targets)
    mean, scale = features.mean(0), _scale(features - features.mean(0))
    rows, aims = (fitted[0] - mean) / scale, fitted[1]
    weight, bias = rows.new_zeros(num_classes, rows.shape[1]), rows.new_zeros(num_classes)
    best: tuple[float, float, float, Tensor, Tensor] | None = None
    worse = 0
    for ridge in path:
        weight, bias = _solve(rows, aims, ridge, kind, class_weights, weight, bias, _PATH_TOLERANCE)
        loss, accuracy = _scores((judged[0] - mean) / scale, judged[1], weight, bias, kind)
        if stop_at_loss is not None:
            best = (loss, accuracy, ridge, weight, bias)
            if _scores(rows, aims, weight, bias, kind)[0] <= stop_at_loss:
                break
        elif best is None or loss < best[0]:
            best, worse = (loss, accuracy, ridge, weight, bias), 0
        else:
            worse += 1
            if worse == 3:
                break
    loss, accuracy, ridge, weight, bias = best  # type: ignore[misc]
    everything = (features - mean) / scale
    if val is None:
        weight, bias = _solve(everything, targets, ridge, kind, class_weights, weight, bias, _PATH_TOLERANCE)
    train_loss = _scores(everything, targets, weight, bias, kind)[0]
    weight = weight / scale
    return Solution(weight.float().cpu(), (bias - weight @ mean).float().cpu(), ridge, train_loss, loss, accuracy)


def _solve(
    rows: Tensor,
    targets: Tensor,
    ridge: float,
    kind: Kind,
    class_weights: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    weights = None if class_weights is None else class_weights.to(rows)
    aims = targets if kind == "softmax" and not targets.is_floating_point() else targets.to(rows.dtype)
    # all classes at once; each of several labels is a problem of its own, and the sum has the same gradients
    share = 1.0 if kind == "softmax" else float(weight.shape[0])

    def loss_of() -> Tensor:
        logits = F.linear(rows, weight, bias)
        return _loss(logits, aims, kind, weights) * share + ridge / 2 * weight.square().sum()

    with torch.enable_grad():
        zero = F.linear(rows, torch.zeros_like(weight), torch.zeros_like(bias)).requires_grad_()
        (slope,) = torch.autograd.grad(_loss(zero, aims, kind, weights) * share, zero)
        largest = float(torch.maximum((slope.T @ rows).abs().max(), slope.sum(0).abs().max()))
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=_MAX_STEPS,
            tolerance_grad=tolerance * max(largest, torch.finfo(rows.dtype).tiny),
            tolerance_change=0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _loss(logits: Tensor, targets: Tensor, kind: Kind, class_weights: Tensor | None) -> Tensor:
    if kind == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits, targets.reshape(logits.shape), pos_weight=class_weights)
    return F.cross_entropy(logits, targets, weight=class_weights)


@torch.no_grad()
def _scores(rows: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, kind: Kind) -> tuple[float, float]:
    """Mean cross entropy and accuracy, without weights of classes."""
    logits = F.linear(rows, weight, bias)
    if kind == "sigmoid":
        aims = targets.to(logits.dtype).reshape(logits.shape)
        return float(_loss(logits, aims, kind, None)), float(((logits > 0) == (aims > 0.5)).float().mean())
    classes = targets.argmax(1) if targets.ndim == 2 else targets
    aims = targets.to(logits.dtype) if targets.is_floating_point() else targets
    return float(_loss(logits, aims, kind, None)), float((logits.argmax(1) == classes).float().mean())


def _scale(centred: Tensor) -> float:
    """Root of the features' mean variance; 1 where nothing varies."""
    variance = float(centred.square().mean())
    return math.sqrt(variance) if variance > 0 else 1.0


def _held_out(targets: Tensor) -> Tensor:
    """Every fifth row of each class; of all rows, where there are no classes."""
    classes = targets if targets.ndim == 1 and not targets.is_floating_point() else targets.new_zeros(len(targets))
    place = torch.zeros(len(targets), dtype=torch.int64, device=targets.device)
    for value in torch.unique(classes):
        where = classes == value
        place[where] = torch.arange(int(where.sum()), device=targets.device)
    return place % _HELD_OUT == _HELD_OUT - 1


def _on_device(rows: HeadRows, device: torch.device | None) -> tuple[Tensor, Tensor]:
    features = rows.features if device is None else rows.features.to(device)
    return features if features.dtype == torch.float64 else features.float(), rows.targets.to(features.device)


def _check(features: Tensor, targets: Tensor, ridge: float, num_classes: int, kind: Kind) -> None:
    if kind not in ("softmax", "sigmoid"):
        raise ValueError(f"kind={kind!r} is not 'softmax' or 'sigmoid'")
    if features.ndim != 2 or not features.is_floating_point() or not len(features):
        raise ValueError(f"features have to be numbers of shape (N, D), got {features.dtype} {tuple(features.shape)}")
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features have to be finite, and some are NaN or infinite")
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge={ridge!r} has to be at least 0 and finite")
    single = kind == "sigmoid" and num_classes == 1 and targets.ndim == 1
    if targets.ndim == 2 or single:
        if targets.shape not in ((len(features), num_classes), (len(features),)):
            raise ValueError(f"targets {tuple(targets.shape)} do not fit {len(features)} rows of {num_classes} classes")
    elif kind == "sigmoid" or targets.shape != (len(features),):
        raise ValueError(f"targets {tuple(targets.shape)} do not fit {len(features)} rows of {num_classes} classes")
    elif targets.is_floating_point() or int(targets.min()) < 0 or int(targets.max()) >= num_classes:
        raise ValueError(f"targets have to be whole numbers from 0 to {num_classes - 1}")
