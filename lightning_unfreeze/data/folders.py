"""Which photos lie in a folder, and what the folders' names say of them: split and class."""

from __future__ import annotations

import fnmatch
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from lightning_unfreeze.data.images import HEIC, HOW_TO_READ_HEIC

ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""Names of the splits, in any case."""

SPLIT_OF = {alias: split for split, aliases in ALIASES.items() for alias in aliases}

IGNORED = (
    *(".*", "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"),
    *("thumbs.db", "desktop.ini", "__pycache__"),
    *("lightning_logs", "checkpoints", "feature_store", "image_cache", "wandb", "mlruns"),
)
"""Patterns of names that never count, at any level: what systems, viewers and runs leave in folders."""

_NO_PHOTOS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}  # Pillow knows them, but decodes none by itself


def readable_endings() -> frozenset[str]:
    """The endings of files that Pillow decodes, with the plugins that are registered at the moment.

    >>> {".jpg", ".png", ".webp", ".tif"} <= readable_endings()
    True
    """
    known = Image.registered_extensions().items()
    return frozenset(ending for ending, form in known if form in Image.OPEN and form not in _NO_PHOTOS)


class Photo(NamedTuple):
    """A file with what is known of it.

    Attributes:
        file: Where it lies.
        name: Its path below the split's folder, or below the root for a table, with slashes: what a drawn split hangs
            on.
        labels: Names of its classes; one, but for multi-label data.
        group: What may not be torn apart by a split: a patient, a scene. Empty where there are no groups.
    """

    file: Path
    name: str
    labels: tuple[str, ...]
    group: str = ""


@dataclass
class Found:
    """What was found: the photos of each split, the classes, and remarks for the one line that tells of them."""

    splits: dict[str, list[Photo]]
    class_names: list[str]
    multi_label: bool = False
    from_table: bool = False
    remarks: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # why a split that seems to be there is not


@dataclass(frozen=True)
class Rules:
    """Which names count.

    Attributes:
        endings: Lower-case endings of the files that are photos.
        ignore: Patterns of further names that never count.
        without: Folders, resolved, that are no part of the data: the photos to predict, the results of runs.
    """

    endings: frozenset[str] = field(default_factory=readable_endings)
    ignore: tuple[str, ...] = ()
    without: frozenset[Path] = frozenset()

    def entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """What lies in a folder and counts, by name."""
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        patterns = (*IGNORED, *(pattern.casefold() for pattern in self.ignore))
        kept = [entry for entry in entries if not any(fnmatch.fnmatchcase(entry.name.casefold(), p) for p in patterns)]
        if not self.without:
            return kept
        return [entry for entry in kept if not (entry.is_dir() and Path(entry.path).resolve() in self.without)]

    def is_photo(self, entry: os.DirEntry[str]) -> bool:
        """Whether an entry is a file of a known ending; a link to nothing is one too, so that it gets reported."""
        is_file = entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
        return is_file and os.path.splitext(entry.name)[1].lower() in self.endings


class Listing(NamedTuple):
    """Photos below a folder, and the endings of the files that are none."""

    files: list[Path]
    left_out: Counter[str]


def photos_below(folder: Path, rules: Rules) -> Listing:
    """All photos in a folder and its sub-folders, in order of their names; links are followed, loops are not."""
    files: list[Path] = []
    left_out: Counter[str] = Counter()
    stack = [(folder, _above(folder))]
    while stack:
        here, ancestors = stack.pop()
        identity = _identity(here)
        if identity in ancestors:
            continue
        for entry in rules.entries(here):
            if entry.is_dir():
                stack.append((Path(entry.path), ancestors | {identity}))
            elif rules.is_photo(entry):
                files.append(Path(entry.path))
            else:
                left_out[os.path.splitext(entry.name)[1].lower() or "without ending"] += 1
    return Listing(sorted(files), left_out)


def _above(folder: Path) -> frozenset[tuple[int, int]]:
    """The folders above one, by either way if it is a link: a link to one of them is a loop."""
    parents = {*folder.absolute().parents, *folder.resolve().parents}
    return frozenset(_identity(parent) for parent in parents)


def _identity(folder: Path) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def what_lies_in(folder: Path, rules: Rules) -> str:
    """A few words on the content of a folder, for errors.

    >>> import tempfile
    >>> what_lies_in(Path(tempfile.mkdtemp()), Rules())
    'nothing'
    """
    entries = rules.entries(folder)
    photos = [entry.name for entry in entries if rules.is_photo(entry)]
    folders = [entry.name for entry in entries if entry.is_dir()]
    others = Counter(
        os.path.splitext(entry.name)[1].lower() or "file without ending"
        for entry in entries
        if not (entry.is_dir() or rules.is_photo(entry))
    )
    parts = [f"{len(photos)} photos ({some(photos)})"] * bool(photos) + [f"folders {some(folders)}"] * bool(folders)
    return ", ".join([*parts, *counted(others)]) or "nothing"


def some(names: Iterable[str], at_most: int = 5) -> str:
    """The first few names of many; bytes that are no text are shown as such.

    >>> some(["a", "b", "c"], at_most=2)
    'a, b and 1 more'
    """
    shown = [name.encode("utf-8", "backslashreplace").decode() for name in names]
    more = f" and {len(shown) - at_most} more" if len(shown) > at_most else ""
    return ", ".join(shown[:at_most]) + more


def counted(endings: Counter[str]) -> list[str]:
    """Endings with their numbers, the most frequent first."""
    hint = endings.keys() & {*HEIC}
    texts = [f"{number} {ending}" for ending, number in endings.most_common()]
    return [*texts, HOW_TO_READ_HEIC] if hint else texts


def plain(name: str) -> str:
    """A name in the composed form of Unicode: the same on every system, whichever one made the folder."""
    return unicodedata.normalize("NFC", name)


def find_in_folders(root: Path, rules: Rules, classes: Sequence[str] | None = None) -> Found:
    """Photos in one folder per class, below folders of the splits or not; of `classes` alone, in their order.

    Raises:
        MisconfigurationException: For folders whose meaning is not clear, or from which nothing can be learned.
    """
    folders = _split_folders(root, rules, classes)
    found, left_out = Found({}, []), Counter[str]()
    for split, folder in folders.items():
        by_class = _class_folders(folder, rules, root, classes)
        listings = {
            name: [photos_below(sub, rules) for sub in subs]
            for name, subs in by_class.items()
            if classes is None or name in classes
        }
        for listing in (listing for some_listings in listings.values() for listing in some_listings):
            left_out.update(listing.left_out)
        loose = [entry for entry in rules.entries(folder) if rules.is_photo(entry)]
        if not listings and not (split == "train" and classes):
            lying = f"{folder} has no class folders, it holds {what_lies_in(folder, rules)}"
            if split == "test":  # often a folder of photos to predict
                found.missing["test"] = f"{lying}: put its photos in one folder per class, or give it as predict_dir."
                found.remarks.append(f"{folder.name}/ has no class folders and cannot be scored")
                continue
            if split == "val":
                raise MisconfigurationException(f"{lying}: put its photos in one folder per class, or remove it.")
        if loose and listings:
            found.remarks.append(
                f"{len(loose)} photos beside the class folders of {folder.name or folder}/ do not count"
            )
        _refuse_empty(folder, by_class, listings, rules)
        _refuse_splits_in_classes(by_class, listings)
        found.splits[split] = [
            Photo(file, f"{name}/{file.relative_to(sub).as_posix()}", (name,))
            for name, some_listings in listings.items()
            for sub, listing in zip(by_class[name], some_listings, strict=True)
            for file in listing.files
        ]
        if split == "train":
            _check_train(root, folder, list(listings), rules, classes)
            found.class_names = list(classes) if classes else list(listings)
            nested = [name for name, subs in by_class.items() if name in listings and _only_folders(subs, rules)]
            if nested:
                found.remarks.append(f"photos in folders inside {some(nested, 3)} count for the class above them")
    if left_out:
        found.remarks.append(f"left out: {', '.join(counted(left_out))}")
    _refuse_unknown_classes(root, folders, found)
    return found


def _split_folders(root: Path, rules: Rules, classes: Sequence[str] | None) -> dict[str, Path]:
    """The folder of each split; the root itself for `train` where there are none."""
    entries = [entry for entry in rules.entries(root) if entry.is_dir()]
    named: dict[str, list[str]] = {}
    for entry in entries:
        split = SPLIT_OF.get(entry.name.strip().casefold())
        if split and entry.name not in (classes or ()):
            named.setdefault(split, []).append(entry.name)
    if not named:
        return {"train": root}
    double = next((names for names in named.values() if len(names) > 1), None)
    if double:
        raise MisconfigurationException(
            f"root={str(root)!r} has {' and '.join(double)} for one split: keep one of them."
        )
    names = [name for group in named.values() for name in group]
    if "train" not in named:
        raise MisconfigurationException(
            f"root={str(root)!r} has {some(f'{name}/' for name in names)} but no train/: put the class folders of the "
            "training photos in train/ (a class of that name has to be listed in classes=[...])."
        )
    beside = [entry.name for entry in entries if entry.name not in names]
    unknown = [name for name in beside if photos_below(root / name, rules).files]
    if unknown:
        raise MisconfigurationException(
            f"root={str(root)!r} has {some(f'{name}/' for name in unknown)} with photos beside {named['train'][0]}/, "
            f"which is no split ({', '.join(SPLIT_OF)}): rename or move it, or name it in ignore=[...]."
        )
    return {split: root / named[split][0] for split in ALIASES if split in named}


def _class_folders(folder: Path, rules: Rules, root: Path, classes: Sequence[str] | None) -> dict[str, list[Path]]:
    """The folders of each class; names that are one text in two forms of Unicode are one class."""
    found: dict[str, list[Path]] = {}
    loops = _above(folder) | {_identity(folder)}
    for entry in rules.entries(folder):
        if entry.is_dir() and not (entry.is_symlink() and _identity(Path(entry.path)) in loops):
            found.setdefault(plain(entry.name), []).append(Path(entry.path))
    alike: dict[str, list[str]] = {}
    for name in found:
        alike.setdefault(name.casefold(), []).append(name)
    double = [" and ".join(names) for names in alike.values() if len(names) > 1]
    if double:
        rank_zero_warn(f"{folder} has classes that differ in capitals alone: {some(double)}.")
    order = {name: i for i, name in enumerate(classes or ())}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def _refuse_empty(
    folder: Path, by_class: dict[str, list[Path]], listings: dict[str, list[Listing]], rules: Rules
) -> None:
    empty = [name for name, some_listings in listings.items() if not any(each.files for each in some_listings)]
    if empty:
        lying = [f"{name}: {what_lies_in(by_class[name][0], rules)}" for name in empty]
        raise MisconfigurationException(
            f"{folder} has class folders without images ({some(lying)}): fill or remove them. Endings that count: "
            f"{' '.join(sorted(rules.endings))}"
        )


def _refuse_splits_in_classes(by_class: dict[str, list[Path]], listings: dict[str, list[Listing]]) -> None:
    for name, some_listings in listings.items():
        for sub, listing in zip(by_class[name], some_listings, strict=True):
            inner = {file.relative_to(sub).parts[0] for file in listing.files if file.parent != sub}
            splits = sorted(part for part in inner if part.casefold() in SPLIT_OF)
            if len(splits) > 1:
                raise MisconfigurationException(
                    f"{sub} holds {some(f'{part}/' for part in splits)}: the splits have to lie above the classes, "
                    f"as in {splits[0]}/{name}."
                )


def _only_folders(subs: list[Path], rules: Rules) -> bool:
    entries = [entry for sub in subs for entry in rules.entries(sub)]
    return not any(rules.is_photo(entry) for entry in entries)


def _check_train(root: Path, folder: Path, names: list[str], rules: Rules, classes: Sequence[str] | None) -> None:
    there = set(names)
    lacking = [name for name in classes or () if name not in there]
    if lacking:
        raise MisconfigurationException(
            f"classes={list(classes or ())}: {folder} has no {some(lacking)}, it has {what_lies_in(folder, rules)}."
        )
    if len(names) >= 2:
        return
    hint = ""
    if len(names) == 1 and folder == root:
        inner = [entry.name for entry in rules.entries(root / names[0]) if entry.is_dir()]
        hint = f" Should root be {str(root / names[0])!r}, which holds {some(inner)}?" if len(inner) > 1 else ""
    raise MisconfigurationException(
        f"root={str(root)!r} holds {len(names)} class ({', '.join(names) or 'no sub-folders'}); in {folder} lies "
        f"{what_lies_in(folder, rules)}: put the images of each class in a folder of its own, two or more.{hint}"
    )


def _refuse_unknown_classes(root: Path, folders: dict[str, Path], found: Found) -> None:
    known = set(found.class_names)
    for split, photos in found.splits.items():
        unknown = sorted({photo.labels[0] for photo in photos} - known)
        if unknown:
            near = [name for name in found.class_names if name.casefold() in {each.casefold() for each in unknown}]
            hint = f" (train/ has {some(near)}, in other capitals)" if near else ""
            raise MisconfigurationException(
                f"{folders[split].name}/ of root={str(root)!r} has classes that {folders['train'].name}/ lacks "
                f"({some(unknown)}){hint}: add training images of them, or remove them from {folders[split].name}/."
            )
