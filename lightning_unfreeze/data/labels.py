"""Labels as numbers: targets, counts, weights; and targets from which nothing can be learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_unfreeze.data.folders import Photo, some


def targets_of(photos: Sequence[Photo], class_names: Sequence[str], multi_label: bool) -> list[int] | Tensor:
    """Class indices, or for multi-label data zeros and ones as floats, shape `(N, L)`."""
    index = {name: i for i, name in enumerate(class_names)}
    if not multi_label:
        return [index[photo.labels[0]] for photo in photos]
    targets = torch.zeros(len(photos), len(index))
    for i, photo in enumerate(photos):
        targets[i, [index[name] for name in photo.labels]] = 1.0
    return targets


def counts_of(targets: Sequence[int] | Tensor, num_classes: int) -> Tensor:
    """Photos of each class, shape `(num_classes,)`.

    >>> counts_of([0, 2, 2], 3)
    tensor([1, 0, 2])
    """
    if isinstance(targets, Tensor) and targets.ndim == 2:
        return targets.sum(0).long()
    return torch.bincount(torch.as_tensor(targets, dtype=torch.int64), minlength=num_classes)


def class_weights(counts: Tensor, num_photos: int, multi_label: bool) -> Tensor:
    """Weights for a loss that make classes count alike.

    For classes: N / (K n_k), as scikit-learn's `class_weight="balanced"`; one photo weighs 1 on average. For several
    labels: (N - n_k) / n_k, the `pos_weight` of binary cross entropy. Without a photo the weight is 1.

    Args:
        counts: Photos of each class, shape `(K,)`.
        num_photos: N.
        multi_label: Whether a photo may have several.

    >>> class_weights(torch.tensor([30, 10]), 40, multi_label=False)
    tensor([0.6667, 2.0000])
    """
    seen = counts.clamp(min=1).double()
    weights = (num_photos - counts) / seen if multi_label else num_photos / (seen * len(counts))
    return torch.where(counts > 0, weights, 1.0).float()


def balanced_weights(targets: Sequence[int] | Tensor, counts: Tensor) -> Tensor:
    """Weight of each photo with which every class is drawn as often, shape `(N,)`; of several labels the rarest counts.

    >>> balanced_weights([0, 0, 1], torch.tensor([2, 1]))
    tensor([0.5000, 0.5000, 1.0000], dtype=torch.float64)
    """
    rarity = 1.0 / counts.clamp(min=1).double()
    if isinstance(targets, Tensor) and targets.ndim == 2:
        none = rarity.min()  # a photo without any label
        return torch.maximum((targets.double() * rarity).amax(1), none)
    return rarity[torch.as_tensor(targets, dtype=torch.int64)]


def check_targets(targets: Any, num_classes: int, multi_label: bool = False) -> None:
    """Refuses targets of a batch that a classifier cannot learn from, in one line.

    Args:
        targets: What the batch has for targets: class indices `(N,)`, or zeros and ones `(N, num_classes)` as floats.
        num_classes: Classes, or labels, of the network.
        multi_label: Whether a photo may have several labels.

    Raises:
        MisconfigurationException: For anything else, saying what to do.

    >>> check_targets(torch.tensor([0, 2]), num_classes=3)
    >>> check_targets(["cat", "dog"], num_classes=2)
    Traceback (most recent call last):
    ...
    lightning.fabric.utilities.exceptions.MisconfigurationException: the targets are names (cat, dog): ...
    """
    if not isinstance(targets, Tensor):
        wanted = "a float tensor of zeros and ones" if multi_label else "class indices, integers from 0"
        kind = f"of type {type(targets).__name__}"
        if isinstance(targets, list | tuple):
            kind = f"names ({some([str(each) for each in targets])})"
        raise MisconfigurationException(f"the targets are {kind}: let the data set return {wanted}.")
    shape, values = tuple(targets.shape), targets.detach()
    if multi_label:
        if values.ndim != 2 or shape[1] != num_classes:
            raise MisconfigurationException(
                f"the targets have the shape {shape}: with several labels per photo, zeros and ones (N, {num_classes}) "
                "are needed."
            )
        if not bool(((values == 0) | (values == 1)).all()):
            raise MisconfigurationException("the targets of several labels per photo have to be zeros and ones.")
        return
    if values.ndim == 2 and shape[1] == num_classes:
        raise MisconfigurationException(
            f"the targets have the shape {shape}, several labels per photo: set multi_label, or give indices (N,)."
        )
    if values.ndim != 1:
        raise MisconfigurationException(f"the targets have the shape {shape}: class indices (N,) are needed.")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise MisconfigurationException(
            f"the targets are {values.dtype} ({some([str(each) for each in values.tolist()], 3)}): give class indices "
            "as integers; for regression use a module of your own, the callbacks work with any."
        )
    wrong = sorted(set(values[(values < 0) | (values >= num_classes)].tolist()))
    if wrong:
        raise MisconfigurationException(
            f"the targets hold {some([str(each) for each in wrong], 3)}: with num_classes={num_classes} they go from 0 "
            f"to {num_classes - 1}."
        )
