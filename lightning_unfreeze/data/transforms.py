"""From a picture to the normalised tensor that a backbone expects, with augmentation or without."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from PIL import Image
from torchvision.transforms import v2

Augmentation = Literal["none", "shift", "side_on", "top_down", "randaugment"]

_MAX_RATIO = 4.0  # of the sides, above which a picture is cropped before it is resized
_LEAST_AREA = 0.6  # of a random crop


class CropStrip(v2.Transform):  # type: ignore[misc]
    """Cuts the middle out of a strip, so that resizing its short side does not make a giant of its long side.

    Only pictures whose sides differ by more than a factor of 4 are touched, and only where the centre crop that follows
    would cut anyway.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """The picture, its long side at most 4 times the short one."""
        height, width = v2.functional.get_size(inpt)
        longest = math.ceil(min(height, width) * _MAX_RATIO)
        if max(height, width) <= longest:
            return inpt
        return v2.functional.center_crop(inpt, [min(height, longest), min(width, longest)])


def resized_sides(data_config: dict[str, Any]) -> list[int]:
    """Height and width to which a picture is resized before the centre crop of the evaluation."""
    return [math.floor(side / data_config["crop_pct"]) for side in data_config["input_size"][-2:]]


def needed_side(data_config: dict[str, Any], augmentation: Augmentation) -> int:
    """Short side of a picture from which the transform never has to magnify more than it would the original.

    The smallest random crop has 60 % of the area at a ratio of 3:4, so 67 % of the side of a square.
    """
    evaluation = min(resized_sides(data_config))
    crop = math.sqrt(_LEAST_AREA * 3 / 4)
    augmented = 0 if augmentation in ("none", "shift") else math.ceil(max(data_config["input_size"][-2:]) / crop)
    return max(evaluation, augmented)


def make_transform(data_config: dict[str, Any], augmentation: Augmentation = "none") -> v2.Compose:
    """From a picture to a normalised tensor `(C, H, W)`, as the backbone's data config says.

    Args:
        data_config: `input_size` (C, H, W), `mean`, `std`, `interpolation` and `crop_pct`, in timm's words.
        augmentation: `none`: resize and centre crop. `shift`: that, moved by up to an eighth of the side.
            `side_on`: random resized crop (60 % of the area and more) and mirroring. `top_down`: the crop and the
            eight turns and mirrorings of a square (satellite, microscope). `randaugment`: `side_on` and RandAugment.
    """
    size = data_config["input_size"][-2:]
    mode = v2.InterpolationMode(data_config["interpolation"])
    resized = resized_sides(data_config)
    square = size[0] == size[1]
    first = [CropStrip()] if square else []
    whole = [*first, v2.Resize(min(resized) if square else resized, mode), v2.CenterCrop(size)]
    crop = [v2.RandomResizedCrop(size, scale=(_LEAST_AREA, 1.0), interpolation=mode)]
    mirror = v2.RandomHorizontalFlip()
    quarter_turn = v2.RandomApply([v2.RandomRotation((90, 90))], p=0.5)
    geometry: dict[str, list[Any]] = {
        "none": whole,
        "shift": [*whole, v2.RandomCrop(size, padding=[size[1] // 8, size[0] // 8])],
        "side_on": [*crop, mirror],
        "top_down": [*crop, mirror, v2.RandomVerticalFlip(), quarter_turn],
        "randaugment": [*crop, mirror, v2.RandAugment(interpolation=mode)],
    }
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    normalise = v2.Normalize(list(data_config["mean"]), list(data_config["std"]))
    return v2.Compose([*geometry[augmentation], *to_tensor, normalise, v2.ToPureTensor()])


def shrunk(picture: Image.Image, short_side: int, interpolation: str) -> Image.Image:
    """The picture with a short side of at most `short_side`, as `v2.Resize` makes it; never magnified."""
    if min(picture.size) <= short_side:
        return picture
    small: Image.Image = v2.functional.resize(picture, [short_side], v2.InterpolationMode(interpolation))
    return small
