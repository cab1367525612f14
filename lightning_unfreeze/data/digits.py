"""The handwritten digits that the demo learns, as a data module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from lightning_unfreeze.data.base import ClassificationData
from lightning_unfreeze.data.transforms import Augmentation
from lightning_unfreeze.seeding import key_to_seed


class DigitsData(ClassificationData):
    """Scikit-learn's handwritten digits (1,797 real scans of 8 x 8 px), to learn some classes with few labels.

    The embedded backbone `digits_resnet` was pretrained on digits 0-4; the default classes are the others. Per class a
    quarter is test data and a quarter validation data, drawn by seed; training images are drawn from the rest.
    `predict` reads the test images.

    Args:
        classes: The digits to tell apart, two or more of 0-9.
        train_per_class: Training images per class; None takes all that are left, about 90.
        batch_size: Images per batch and device.
        image_size_px: Side of the square input; None takes the backbone's.
        data_config: As for `ImageFolderData`.
        augmentation: Of the training images, see `make_transform`.
        seed: Of the split, the order and the augmentation.
        num_workers: Processes that load images.

    Raises:
        ValueError: For an impossible argument.
    """

    def __init__(
        self,
        classes: Sequence[int] = (5, 6, 7, 8, 9),
        train_per_class: int | None = 10,
        batch_size: int = 16,
        image_size_px: int | None = None,
        data_config: dict[str, Any] | None = None,
        augmentation: Augmentation = "shift",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, image_size_px, data_config, augmentation, seed, num_workers)
        if len(set(classes)) < 2 or len(set(classes)) != len(classes) or not set(classes) <= set(range(10)):
            raise ValueError(f"classes={list(classes)}: give two or more different digits of 0-9.")
        if train_per_class is not None and not 1 <= train_per_class <= 80:
            raise ValueError(f"train_per_class={train_per_class}: give 1 to 80, or null for all.")
        self.classes, self.train_per_class = tuple(classes), train_per_class

    def setup(self, stage: str) -> None:
        """Draw train, val and test images of each class.

        Raises:
            MisconfigurationException: Without scikit-learn, which holds the scans.
        """
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise MisconfigurationException(
                "the digits are scikit-learn's: python -m pip install 'lightning-unfreeze[demo]'"
            ) from None
        digits = load_digits()
        chosen: dict[str, list[tuple[int, int]]] = {"train": [], "val": [], "test": []}
        for label, digit in enumerate(self.classes):
            where = np.flatnonzero(digits.target == digit)
            order = np.random.default_rng(key_to_seed("split", self.seed, digit)).permutation(where).tolist()
            quarter = len(order) // 4
            rest = order[2 * quarter :][: self.train_per_class]
            for name, indices in (("test", order[:quarter]), ("val", order[quarter : 2 * quarter]), ("train", rest)):
                chosen[name] += [(index, label) for index in indices]
        # the scans count the dark pixels of a 4 x 4 square: 0 to 16
        images = [Image.fromarray((scan * 255 / 16).astype(np.uint8)) for scan in digits.images]
        self._samples = {
            name: ([images[index] for index, _ in pairs], [label for _, label in pairs])
            for name, pairs in chosen.items()
        }
        test_images, test_labels = self._samples["test"]
        names = [f"digit {self.classes[label]}, test image {number}" for number, label in enumerate(test_labels)]
        self._samples["predict"] = (test_images, names)
        self._class_names = [str(digit) for digit in self.classes]
