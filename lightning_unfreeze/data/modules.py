"""Images in folders and the embedded digits as Lightning data modules, resumable at any batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from timm.data import resolve_data_config, resolve_model_data_config
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from lightning_unfreeze.data.loaders import EpochSampler, KeyedDataset, ResumableLoader
from lightning_unfreeze.seeding import key_to_seed

Augmentation = Literal["none", "shift", "side_on", "top_down", "randaugment"]
Split = Literal["train", "val", "test"]


def make_transform(data_config: dict[str, Any], augmentation: Augmentation = "none") -> v2.Compose:
    """From a PIL image to a normalised tensor `(C, H, W)`, as the backbone's data config says.

    Args:
        data_config: `input_size` (C, H, W), `mean`, `std`, `interpolation` and `crop_pct`, in timm's words.
        augmentation: `none`: resize and centre crop. `shift`: that, moved by up to an eighth of the side.
            `side_on`: random resized crop (60 % of the area and more) and mirroring. `top_down`: the crop and the
            eight turns and mirrorings of a square (satellite, microscope). `randaugment`: `side_on` and RandAugment.
    """
    size = data_config["input_size"][-2:]
    mode = v2.InterpolationMode(data_config["interpolation"])
    resized = [math.floor(side / data_config["crop_pct"]) for side in size]
    whole = [v2.Resize(min(resized) if size[0] == size[1] else resized, mode), v2.CenterCrop(size)]
    crop = [v2.RandomResizedCrop(size, scale=(0.6, 1.0), interpolation=mode)]
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


class ImageDataset(Dataset[tuple[torch.Tensor, Any]]):
    """Images, from files or from memory, with a label (or the file's path) each.

    Args:
        images: Paths or PIL images.
        targets: What comes with each image: class indices, or paths in prediction.
        transform: From a PIL image to a tensor.
        num_channels: 3 for RGB, 1 for grey.
    """

    def __init__(
        self, images: Sequence[Path | Image.Image], targets: Sequence[Any], transform: Any, num_channels: int = 3
    ) -> None:
        self.images, self.targets, self.transform, self.num_channels = images, targets, transform, num_channels

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        image, mode = self.images[index], "L" if self.num_channels == 1 else "RGB"
        pixels = _decode(image, mode) if isinstance(image, Path) else image.convert(mode)
        return self.transform(pixels), self.targets[index]

    def __len__(self) -> int:
        return len(self.images)


def _decode(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            pixels: Image.Image = image.convert(mode)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken files
        raise OSError(f"{path} is not readable ({error}): repair or remove it, or set corrupt='skip'.") from error
    return pixels


class _ClassificationData(pl.LightningDataModule):
    """What both data modules share: the backbone's data config, the transforms and the loaders."""

    def __init__(
        self,
        batch_size: int,
        image_size_px: int | None,
        data_config: dict[str, Any] | None,
        augmentation: Augmentation,
        seed: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("image_size_px", 1 if image_size_px is None else image_size_px, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value}: give {least} or more.")
        _check_choice("augmentation", augmentation, Augmentation)
        self.batch_size, self.image_size_px, self.augmentation = batch_size, image_size_px, augmentation
        self.seed, self.num_workers = seed, num_workers
        self._given_config = data_config
        self._class_names: list[str] | None = None
        self._samples: dict[str, tuple[Sequence[Path | Image.Image], Sequence[Any]]] = {}

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the labels.

        Raises:
            RuntimeError: Before `setup`.
        """
        if self._class_names is None:
            raise RuntimeError("The classes are known after setup('fit'): call it first.")
        return list(self._class_names)

    @property
    def num_classes(self) -> int:
        """Number of classes, after `setup`."""
        return len(self.class_names)

    def order_classes(self, names: Sequence[str]) -> None:
        """Number the classes as `names` does, e.g. in the order of a trained model's outputs; after `setup`.

        Args:
            names: All classes of the data, and others if need be.
        """
        places = [list(names).index(name) for name in self.class_names]
        for split in self._samples.keys() - {"predict"}:
            images, labels = self._samples[split]
            self._samples[split] = (images, [places[label] for label in labels])
        self._class_names = list(names)

    @property
    def data_config(self) -> dict[str, Any]:
        """Size and normalisation of the input: as given, else the module's, else its timm model's, else ImageNet's."""
        config: dict[str, Any] = resolve_data_config({}, pretrained_cfg={"interpolation": "bilinear"})
        module = self.trainer.lightning_module if self.trainer is not None else None
        if module is not None:
            networks = [part for part in module.modules() if hasattr(part, "pretrained_cfg")]
            own = resolve_model_data_config(networks[0]) if networks else {}
            config |= getattr(module, "data_config", own)
        config |= self._given_config or {}
        if self.image_size_px is not None:
            config["input_size"] = (config["input_size"][0], self.image_size_px, self.image_size_px)
        return config

    def dataset(self, split: Split | Literal["predict"], augmentation: Augmentation = "none") -> ImageDataset:
        """The images of a split, after `setup`, under the transform of `augmentation`.

        Args:
            split: `train`, `val`, `test`, or `predict`.
            augmentation: As for `make_transform`.

        Raises:
            MisconfigurationException: Where there is no such split.
        """
        if split not in self._samples:
            raise MisconfigurationException(f"There is no {split} data: {self._how_to_get(split)}")
        config = self.data_config
        return ImageDataset(*self._samples[split], make_transform(config, augmentation), config["input_size"][0])

    def _how_to_get(self, split: str) -> str:
        return "call setup('fit') first."

    def train_dataloader(self) -> ResumableLoader:
        """Augmented images in an order that follows from (seed, epoch), resumable at any batch."""
        data = KeyedDataset(self.dataset("train", self.augmentation), seed=self.seed)
        sampler = EpochSampler(data, seed=self.seed)
        # BatchNorm cannot train on a last batch of one image
        alone = len(sampler) > 1 and len(sampler) % self.batch_size == 1
        return ResumableLoader(data, sampler=sampler, drop_last=alone, **self._loader_arguments())

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation images in order."""
        return DataLoader(self.dataset("val"), **self._loader_arguments())

    def test_dataloader(self) -> DataLoader[Any]:
        """The test images in order."""
        return DataLoader(self.dataset("test"), **self._loader_arguments())

    def predict_dataloader(self) -> DataLoader[Any]:
        """The images to predict in order, as `(image, path)`."""
        return DataLoader(self.dataset("predict"), **self._loader_arguments())

    def _loader_arguments(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


class ImageFolderData(_ClassificationData):
    """Photos in one folder per class.

    `root` holds `train/` and `val/` (and `test/`), or `train/` alone, or the class folders themselves; what has no
    `val/` is split by seed, class by class. Images are prepared as the backbone's own data config says.

    Args:
        root: The folder.
        batch_size: Images per batch and device.
        image_size_px: Side of the square input; None takes the backbone's.
        data_config: `mean`, `std`, `interpolation`, `crop_pct`, `input_size` in place of those that are found: the
            module's `data_config`, else its timm model's, else ImageNet's mean and std at 224 px.
        augmentation: Of the training images, see `make_transform`.
        val_fraction: Share of each class for validation where there is no `val/`, in (0, 1).
        seed: Of the split, the order and the augmentation.
        num_workers: Processes that load images.
        corrupt: `error` stops at a file that is no image and names it; `skip` reads all files once before training,
            leaves the broken ones out and says how many.
        predict_dir: Folder of images without labels, for `predict`; sub-folders are searched too.

    Raises:
        ValueError: For an impossible argument.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 32,
        image_size_px: int | None = None,
        data_config: dict[str, Any] | None = None,
        augmentation: Augmentation = "side_on",
        val_fraction: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
        corrupt: Literal["error", "skip"] = "error",
        predict_dir: str | None = None,
    ) -> None:
        super().__init__(batch_size, image_size_px, data_config, augmentation, seed, num_workers)
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(f"val_fraction={val_fraction}: give a share between 0 and 1, both excluded.")
        _check_choice("corrupt", corrupt, Literal["error", "skip"])
        self.root, self.val_fraction, self.corrupt, self.predict_dir = root, val_fraction, corrupt, predict_dir

    def setup(self, stage: str) -> None:
        """List the files, check them and split them.

        Raises:
            MisconfigurationException: For folders from which nothing can be learned.
        """
        if stage == "predict":
            if self.predict_dir is None:
                raise MisconfigurationException(f"There is no predict data: {self._how_to_get('predict')}")
            files = self._readable(_image_files(_folder(self.predict_dir, "predict_dir")))
            if not files:
                raise MisconfigurationException(f"predict_dir={self.predict_dir!r} holds no images; {_WHAT_COUNTS}")
            self._samples["predict"] = (files, [str(file) for file in files])
        elif "train" not in self._samples:
            self._find_splits(_folder(self.root, "root"))

    def _find_splits(self, root: Path) -> None:
        train = self._class_files(root / "train" if (root / "train").is_dir() else root)
        if len(train) < 2:
            raise MisconfigurationException(
                f"root={self.root!r} holds {len(train)} class ({', '.join(train) or 'no sub-folders'}): put the images "
                "of each class in a folder of its own, two classes or more."
            )
        splits = {"train": train}
        for name in ("val", "test"):
            if (root / "train").is_dir() and (root / name).is_dir():
                splits[name] = self._class_files(root / name)
                unknown = sorted(splits[name].keys() - train.keys())
                if unknown:
                    raise MisconfigurationException(
                        f"{name}/ of root={self.root!r} has classes that train/ lacks ({', '.join(unknown)}): add "
                        f"training images of them, or remove them from {name}/."
                    )
        if "val" not in splits:
            splits["train"], splits["val"] = self._split(train)
        self._class_names = list(train)
        for name, files in splits.items():
            pairs = [(file, self._class_names.index(label)) for label in files for file in files[label]]
            self._samples[name] = ([file for file, _ in pairs], [index for _, index in pairs])

    def _class_files(self, folder: Path) -> dict[str, list[Path]]:
        files = {sub.name: _image_files(sub) for sub in sorted(folder.iterdir()) if sub.is_dir()}
        readable = self._readable([file for group in files.values() for file in group])
        kept = set(readable)
        files = {name: [file for file in group if file in kept] for name, group in files.items()}
        empty = [name for name, group in files.items() if not group]
        if empty:
            raise MisconfigurationException(
                f"{folder} has class folders without images ({', '.join(empty)}): fill or remove them; {_WHAT_COUNTS}"
            )
        return files

    def _split(self, files: dict[str, list[Path]]) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
        train, val = {}, {}
        for name, group in files.items():
            if len(group) < 2:
                raise MisconfigurationException(
                    f"Class {name!r} of root={self.root!r} has a single image, which cannot be split into train and "
                    "val: add images, or give train/ and val/ folders."
                )
            order = np.random.default_rng(key_to_seed("split", self.seed, name)).permutation(len(group))
            num_val = min(max(round(len(group) * self.val_fraction), 1), len(group) - 1)
            val[name] = [group[i] for i in sorted(order[:num_val])]
            train[name] = [group[i] for i in sorted(order[num_val:])]
        return train, val

    def _readable(self, files: list[Path]) -> list[Path]:
        if self.corrupt == "error":
            return files
        with ThreadPoolExecutor() as pool:
            broken = list(pool.map(_is_broken, files))
        if any(broken):
            first = files[broken.index(True)]
            rank_zero_warn(f"Skipped {sum(broken)} of {len(files)} files that are no images, the first is {first}.")
        return [file for file, is_broken in zip(files, broken, strict=True) if not is_broken]

    def _how_to_get(self, split: str) -> str:
        if split == "predict":
            return "set predict_dir to a folder of images (--data.predict_dir DIR)."
        if split == "test":
            return f"put class folders in {Path(self.root) / 'test'} beside train/, or use validate."
        return super()._how_to_get(split)


class DigitsData(_ClassificationData):
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


_WHAT_COUNTS = f"files that end in {', '.join(IMG_EXTENSIONS)} count."


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS and file.is_file())


def _folder(path: str, argument: str) -> Path:
    if not Path(path).is_dir():
        raise MisconfigurationException(f"{argument}={path!r}: no such folder; give the path of an existing one.")
    return Path(path)


def _is_broken(path: Path) -> bool:
    try:
        _decode(path, "RGB")
    except OSError:
        return True
    return False


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in choices.__args__:
        raise ValueError(f"{name}={value!r}: give one of {', '.join(choices.__args__)}.")
