"""Labels as numbers: targets, counts, weights of the samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_unfreeze.data.folders import Photo


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
