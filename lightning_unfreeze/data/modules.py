"""Photos, in folders or in a table, as a Lightning data module that is resumable at any batch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import ImageColor

from lightning_unfreeze.data.base import ClassificationData, check_choice, check_least
from lightning_unfreeze.data.broken import broken_among
from lightning_unfreeze.data.cache import DecodedImages
from lightning_unfreeze.data.folders import Found, Photo, Rules, find_in_folders, photos_below, readable_endings, some
from lightning_unfreeze.data.images import MAX_PIXELS, Reading
from lightning_unfreeze.data.labels import targets_of
from lightning_unfreeze.data.splits import (
    copies_across,
    copies_among,
    draw_validation,
    line_of,
    refuse_torn_groups,
    take_listed,
)
from lightning_unfreeze.data.tables import find_in_tables, tables_in
from lightning_unfreeze.data.transforms import Augmentation, needed_side

_SHOWN = 50  # broken files named in one message


class ImageFolderData(ClassificationData):
    """Photos in one folder per class, or in a table.

    `root` holds `train/` and `val/` (and `test/`; other usual names in any case), or `train/` alone, or the class
    folders themselves. Without `val/` the validation is drawn from `train/`, each photo by its name. Or `root` holds
    photos and a table of them: `labels.csv` (file, label, split), or `metadata.csv` as Hugging Face's `imagefolder`
    has it. What was found is said in one line; all files of all splits are checked before anything is trained.
    Images are prepared as the backbone's own data config says. See `docs/your_photos.md`.

    Args:
        root: The folder.
        batch_size: Images per batch and device.
        image_size_px: Side of the square input; None takes the backbone's.
        data_config: `mean`, `std`, `interpolation`, `crop_pct`, `input_size` in place of those that are found: the
            module's `data_config`, else its timm model's, else ImageNet's mean and std at 224 px.
        augmentation: Of the training images, see `make_transform`.
        val_fraction: Expected share of the photos for validation where it is drawn from `train/`, in (0, 1).
        seed: Of the split, the order and the augmentation.
        num_workers: Processes that load images.
        corrupt: `error` stops before training if a file is no image, and names all such files; `skip` decodes all files
            once before training, leaves the broken ones out and names them.
        predict_dir: Folder of images without labels, for `predict`; sub-folders are searched too.
        labels: A table (CSV, TSV, JSON lines, Parquet) of the photos, by its path or below `root`; None looks for
            `labels` and `metadata` in `root`.
        columns: Names of the table's columns, for `file`, `label` (several for one column per label) and `split`; the
            usual names are found.
        label_separator: Between several labels in one cell; None finds `;` and `|`, and spaces and commas where the
            parts are labels of other photos too, or the column is called `labels` or `tags`.
        multi_label: Whether a photo may have several labels; None sees it from the table.
        classes: Those that are wanted, in the order of their labels; None takes all.
        groups: What no split may tear apart: a column of the table, or a regular expression that finds the group (its
            first pair of brackets, else the whole) in a photo's path below `root`.
        val_files: A text file that names the validation photos, one a line.
        endings: Of the files that count, e.g. `[".jpg"]`; None takes all that Pillow reads.
        ignore: Patterns of names of files and folders that do not count, e.g. `["thumbnails", "*_mask.png"]`.
        background: Colour behind transparent pixels; None drops the transparency.
        value_range: Values of black and white for greys of more than 8 bits, e.g. `[0, 4095]`; None takes 0 and 65535
            for 16 bits, see `Reading`.
        max_pixels: Larger photos count as broken.
        sampler: `shuffle` shows each photo once an epoch; `balanced` draws as many photos, each class as often.
        cache: Decode each photo once, and keep it at the size that the transform needs, in `ram` or on `disk`.
        cache_dir: Folder for `cache="disk"`; None for `image_cache` under the Trainer's `default_root_dir`.

    Attributes:
        found: The line that says what was found; after `setup`.
        broken: Files that are no images, with the reason; after `setup`.
        draws_validation: Whether validation photos were drawn by `val_fraction` and `seed`; after `setup`.

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
        labels: str | None = None,
        columns: dict[str, str | list[str]] | None = None,
        label_separator: str | None = None,
        multi_label: bool | None = None,
        classes: list[str] | None = None,
        groups: str | None = None,
        val_files: str | None = None,
        endings: list[str] | None = None,
        ignore: list[str] | None = None,
        background: str | None = "white",
        value_range: tuple[float, float] | None = None,
        max_pixels: int = MAX_PIXELS,
        sampler: Literal["shuffle", "balanced"] = "shuffle",
        cache: Literal["ram", "disk"] | None = None,
        cache_dir: str | None = None,
    ) -> None:
        reading = Reading(background=background, value_range=value_range, max_pixels=max_pixels)
        super().__init__(batch_size, image_size_px, data_config, augmentation, seed, num_workers, sampler, reading)
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(f"val_fraction={val_fraction}: give a share between 0 and 1, both excluded.")
        check_choice("corrupt", corrupt, Literal["error", "skip"])
        if cache is not None:
            check_choice("cache", cache, Literal["ram", "disk"])
        if background is not None:
            ImageColor.getrgb(background)  # a ValueError that names the colour
        if value_range is not None and not value_range[0] < value_range[1]:
            raise ValueError(f"value_range={value_range}: give the value of black and a larger one of white.")
        check_least(max_pixels=(max_pixels, 1))
        if classes is not None and (len(set(classes)) != len(classes) or len(classes) < 2):
            raise ValueError(f"classes={classes}: give two or more different names, or none for all.")
        self.root, self.val_fraction, self.corrupt, self.predict_dir = root, val_fraction, corrupt, predict_dir
        self.labels, self.columns, self.label_separator, self.classes = labels, columns, label_separator, classes
        self.groups, self.val_files, self.cache, self.cache_dir = groups, val_files, cache, cache_dir
        self.endings, self.ignore, self._several = endings, ignore, multi_label
        self.found: str | None = None
        self.broken: dict[Path, str] = {}
        self.draws_validation = False
        self._missing: dict[str, str] = {}
        self._decoded: dict[str, tuple[str, DecodedImages | None]] = {}

    def setup(self, stage: str) -> None:
        """Find the photos, check their files and split them; the first time.

        Raises:
            MisconfigurationException: For folders or tables from which nothing can be learned, and for broken files.
        """
        if stage == "predict":
            if "predict" not in self._samples:
                self._find_to_predict()
        elif "train" not in self._samples:
            self._find_splits()

    def _find_to_predict(self) -> None:
        if self.predict_dir is None:
            raise MisconfigurationException(f"There is no predict data: {self._how_to_get('predict')}")
        files, left_out = photos_below(_folder(self.predict_dir, "predict_dir"), self._rules(None))
        if not files:
            others = f", but {sum(left_out.values())} other files" if left_out else ""
            raise MisconfigurationException(
                f"predict_dir={self.predict_dir!r} holds no images{others}; endings that count: "
                f"{' '.join(sorted(self._rules(None).endings))}"
            )
        # in full: a file that turned out to be broken half-way would take all the predictions with it
        broken = broken_among(files, self.reading, True, self._bar)
        if len(broken) == len(files):
            raise self._refusal(broken, len(files))
        self._leave_out(broken, len(files))
        files = [file for file in files if file not in broken]
        self._samples["predict"] = (files, [str(file) for file in files])

    def _find_splits(self) -> None:
        root = _folder(self.root, "root")
        found = self._find(root, self._rules(root))
        photos = [photo for split in found.splits.values() for photo in split]
        # in the mode "error" the first pass over the photos decodes them; until then header and end of each file do
        broken = broken_among([photo.file for photo in photos], self.reading, self.corrupt == "skip", self._bar)
        if broken and self.corrupt == "error":
            raise self._refusal(broken, len(photos))
        self._leave_out(broken, len(photos))
        found.splits = {name: [p for p in split if p.file not in broken] for name, split in found.splits.items()}
        _refuse_lost_classes(found)
        val_from = self._take_validation(found)
        refuse_torn_groups(found.splits)
        copies = copies_across(found.splits, self._bar)
        self.found = line_of(found, f"root={self.root!r}", val_from, copies)
        self.multi_label, self._class_names, self._missing = found.multi_label, found.class_names, found.missing
        for name, split in found.splits.items():
            targets = targets_of(split, found.class_names, found.multi_label)
            self._samples[name] = ([photo.file for photo in split], targets)
        rank_zero_info(self.found)

    def _rules(self, root: Path | None) -> Rules:
        without = set()
        if root is not None:
            own = [self.predict_dir, None if self.trainer is None else self.trainer.default_root_dir]
            without = {Path(folder).resolve() for folder in own if folder is not None}
            # results may lie in the folder of the photos, not the photos in that of the results
            without = {folder for folder in without if folder not in {root.resolve(), *root.resolve().parents}}
        endings = None if self.endings is None else frozenset(f".{each.lower().lstrip('.')}" for each in self.endings)
        return Rules(readable_endings() if endings is None else endings, tuple(self.ignore or ()), frozenset(without))

    def _find(self, root: Path, rules: Rules) -> Found:
        tables = tables_in(root)
        if self.labels is not None:
            given = [path for path in (root / self.labels, Path(self.labels)) if path.is_file()]
            if not given:
                raise MisconfigurationException(f"labels={self.labels!r}: no such file, nor below {root}.")
            tables = {"": given[0]}
        remarks = []
        if tables:
            # a table that was named is meant to be one of photos
            columns = self.columns if self.labels is None else self.columns or {}
            found = find_in_tables(
                root, tables, rules, columns, self.label_separator, self._several, self.classes, self.groups
            )
            if found is not None:
                return found
            table = next(iter(tables.values()))
            remarks.append(f"{table.name} has no columns of files and labels and is not used")
        if self._several or self.columns:
            raise MisconfigurationException(
                f"multi_label and columns are for a table, and {root} has none: give labels."
            )
        found = find_in_folders(root, rules, self.classes)
        found.remarks += remarks
        if self.groups is not None:
            found.splits = {name: self._grouped(root, photos) for name, photos in found.splits.items()}
        return found

    def _grouped(self, root: Path, photos: Sequence[Photo]) -> list[Photo]:
        grouped: list[Photo] = []
        without: list[Photo] = []
        for photo in photos:
            match = re.search(self.groups or "", photo.file.relative_to(root).as_posix())
            group = "" if match is None else (match.group(1) if match.groups() else match.group(0))
            (grouped if group else without).append(photo._replace(group=group or ""))
        if without:
            raise MisconfigurationException(
                f"groups={self.groups!r} finds no group in the path of {len(without)} photos "
                f"({some([photo.name for photo in without])})."
            )
        return grouped

    def _take_validation(self, found: Found) -> str:
        """Splits the training photos where need be; says where the validation comes from."""
        if self.val_files is not None:
            if "val" in found.splits:
                raise MisconfigurationException(f"val_files={self.val_files!r}: {self.root} has a validation already.")
            path = next(
                (each for each in (Path(self.root) / self.val_files, Path(self.val_files)) if each.is_file()), None
            )
            if path is None:
                raise MisconfigurationException(f"val_files={self.val_files!r}: no such file, nor below {self.root}.")
            listed = path.read_text(encoding="utf-8-sig").splitlines()
            train, val = take_listed(found.splits["train"], listed, str(path))
            text = str(path)
        elif "val" in found.splits:
            return "its own folder" if not found.from_table else "the table"
        else:
            photos = found.splits["train"]
            copies = copies_among(photos, self._bar)
            train, val = draw_validation(photos, self.val_fraction, self.seed, copies)
            self.draws_validation = True
            found.remarks += [_told_of_copies([[photos[i] for i in alike] for alike in copies])] * bool(copies)
            by = "group" if self.groups else "name"
            text = f"train, drawn by {by} (val_fraction={self.val_fraction:g}, seed {self.seed})"
        found.splits = {"train": train, "val": val} | {k: v for k, v in found.splits.items() if k == "test"}
        _refuse_lost_classes(found)
        return text

    def _leave_out(self, broken: dict[Path, str], num_files: int) -> None:
        self.broken |= broken
        if broken:
            rank_zero_warn(f"Skipped {len(broken)} of {num_files} files that are no images: {_listed(broken)}.")

    def _refusal(self, broken: dict[Path, str], num_files: int) -> MisconfigurationException:
        return MisconfigurationException(
            f"{len(broken)} of {num_files} files cannot be read: {_listed(broken)}. Repair or remove them, or leave "
            "them out with corrupt='skip' (--data.corrupt skip)."
        )

    def _decoded_images(self, split: str) -> DecodedImages | None:
        if self.cache is None or split == "predict":
            return None
        config, reading = self.data_config, self.reading
        if reading.num_channels not in (1, 3):
            raise MisconfigurationException(
                f"cache={self.cache!r} holds 1 or 3 channels, the network takes {self.in_chans}."
            )
        side = needed_side(config, self.augmentation if split == "train" else "none")
        key = f"{side} {config['interpolation']} {reading}"
        if self._decoded.get(split, ("",))[0] != key:
            self._decoded.pop(split, None)  # of another size: its memory first
            self._decoded[split] = (key, self._decode(split, reading, side, config["interpolation"]))
        return self._decoded[split][1]

    def _decode(self, split: str, reading: Reading, side: int, interpolation: str) -> DecodedImages | None:
        folder = None
        if self.cache == "disk":
            base = self.cache_dir or Path(self.trainer.default_root_dir if self.trainer else ".") / "image_cache"
            folder = Path(base)
        files = self._samples[split][0]
        try:
            decoded = DecodedImages(files, reading, side, interpolation, folder, self._bar)
        except MemoryError as error:
            rank_zero_warn(f"cache={self.cache!r}: {split} photos are read anew in each epoch, as {error}.")
            return None
        except OSError:
            broken = broken_among(files, reading, True, self._bar)
            if broken:
                raise self._refusal(broken, len(files)) from None
            raise
        rank_zero_info(
            f"cache={self.cache!r}: {len(files)} {split} photos decoded, {decoded.num_bytes / 2**20:.1f} MiB"
        )
        return decoded

    def _how_to_get(self, split: str) -> str:
        if split in self._missing:
            return self._missing[split]
        if split == "predict":
            return "set predict_dir to a folder of images (--data.predict_dir DIR)."
        if split == "test" and self._class_names is not None:
            return f"put class folders in {Path(self.root) / 'test'} beside train/, or use validate."
        return super()._how_to_get(split)


def _folder(path: str, argument: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        kind = "is a file, unpack it" if folder.is_file() else "no such folder"
        raise MisconfigurationException(f"{argument}={str(path)!r}: {kind}; give the path of an existing one.")
    return folder


def _listed(broken: dict[Path, str]) -> str:
    return some([f"{file} ({reason})" for file, reason in broken.items()], _SHOWN)


def _told_of_copies(copies: list[list[Photo]]) -> str:
    """What was found among the photos that a validation is drawn from; one photo under two labels is a mistake."""
    differ = [alike for alike in copies if len({tuple(photo.labels) for photo in alike}) > 1]
    others = [alike for alike in copies if alike not in differ]
    shown = some((" = ".join(photo.name for photo in alike) for alike in [*differ, *others]), 3)
    labels = f", {len(differ)} of them under different labels" if differ else ""
    have = "photo has" if len(copies) == 1 else "photos have"
    return f"{len(copies)} {have} exact copies, kept on one side{labels} ({shown})"


def _refuse_lost_classes(found: Found) -> None:
    there = {label for photo in found.splits["train"] for label in photo.labels}
    lost = [name for name in found.class_names if name not in there]
    if lost and not found.multi_label:
        raise MisconfigurationException(f"No training photo is left of {some(lost)}: add some, or leave the class out.")
