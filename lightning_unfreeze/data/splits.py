"""Validation photos drawn by name, groups that stay together, exact copies, and the one line on what was found."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_unfreeze.data.folders import Found, Photo, some
from lightning_unfreeze.data.images import Bar, no_bar
from lightning_unfreeze.seeding import key_to_seed


def draw_validation(
    photos: Sequence[Photo], fraction: float, seed: int, copies: Sequence[Sequence[int]] = ()
) -> tuple[list[Photo], list[Photo]]:
    """Splits photos into training and validation, each by its own name, and exact copies together.

    A photo (or its group) validates if a hash of (seed, name), spread evenly over [0, 1), lies below `fraction`. So one
    more photo moves no other, and the share is met on average. A class that would have none on one side gets the photo
    (or group) that lies nearest to the border, if it has another for the other side. Copies go where the first of them
    by name goes, with their groups.

    Args:
        photos: All of them.
        fraction: Expected share for validation.
        seed: Of the draw.
        copies: Places in `photos` of those that are copies of each other, see `copies_among`.

    Returns:
        Photos for training, photos for validation, in the order given.

    Raises:
        MisconfigurationException: For a class of a single photo.
    """
    unit_of = [f"group {photo.group}" if photo.group else photo.name for photo in photos]
    for alike in copies:
        torn = {unit_of[i] for i in alike}
        unit_of = [min(torn) if unit in torn else unit for unit in unit_of]
    units: dict[str, list[int]] = defaultdict(list)
    for i, unit in enumerate(unit_of):
        units[unit].append(i)
    places = {name: key_to_seed("split", seed, name) / 2**63 for name in units}
    names = sorted(units, key=lambda name: (places[name], name))
    counts = {name: Counter(label for i in units[name] for label in photos[i].labels) for name in units}
    total: Counter[str] = Counter()
    with_class: dict[str, list[str]] = defaultdict(list)
    for name in names:
        total.update(counts[name])  # `+=` would look at all classes each time
        for label in counts[name]:
            with_class[label].append(name)
    single = [label for label, number in total.items() if number < 2]
    if single and all(len(photo.labels) == 1 for photo in photos):
        raise MisconfigurationException(
            f"Class {single[0]!r} has a single image, which cannot be split into train and val ({len(single)} such "
            "classes): add images, give a val/ folder, or leave the class out with classes=[...]."
        )
    chosen = {name for name in names if places[name] < fraction}
    on_side = {True: Counter[str](), False: Counter[str]()}
    for name in names:
        on_side[name in chosen].update(counts[name])
    # first a training photo for each class, then a validation photo where that leaves one for training
    for to_val in (False, True):
        here, there = on_side[to_val], on_side[not to_val]
        for label in sorted(total):
            if here[label]:
                continue
            for name in with_class[label] if to_val else reversed(with_class[label]):
                if not to_val or all(there[other] > counts[name][other] for other in counts[name]):
                    chosen ^= {name}
                    here.update(counts[name])
                    there.subtract(counts[name])
                    break
    validates = {i for name in chosen for i in units[name]}
    if not validates:
        raise MisconfigurationException(
            "No photo or group can be spared for validation: give a val/ folder, or val_files=FILE."
        )
    train = [photo for i, photo in enumerate(photos) if i not in validates]
    return train, [photo for i, photo in enumerate(photos) if i in validates]


def take_listed(photos: Sequence[Photo], listed: Sequence[str], source: str) -> tuple[list[Photo], list[Photo]]:
    """Splits photos into those that a list does not name (training) and those that it names (validation).

    It names them by their path below the root or below the split's folder, or by their file name.

    Raises:
        MisconfigurationException: For a name that fits no photo, or several.
    """
    ways: dict[str, set[int]] = defaultdict(set)
    for i, photo in enumerate(photos):
        parts = photo.file.parts
        for start in range(len(parts)):
            ways["/".join(parts[start:])].add(i)
        ways[photo.name].add(i)
        ways[str(photo.file)].add(i)
    wanted = [name.strip().replace("\\", "/").removeprefix("./") for name in listed if name.strip()]
    odd = [f"{name} ({len(ways.get(name, ()))} photos)" for name in wanted if len(ways.get(name, ())) != 1]
    if odd or not wanted:
        raise MisconfigurationException(
            f"{source} should name each validation photo by its path below the root, one a line; not found once: "
            f"{some(odd) or 'it is empty'}."
        )
    validates = {i for name in wanted for i in ways[name]}
    train = [photo for i, photo in enumerate(photos) if i not in validates]
    return train, [photo for i, photo in enumerate(photos) if i in validates]


def refuse_torn_groups(splits: dict[str, list[Photo]]) -> None:
    """Raises a MisconfigurationException that names the groups with photos in more than one split."""
    where: dict[str, set[str]] = defaultdict(set)
    for split, photos in splits.items():
        for photo in photos:
            where[photo.group].add(split)
    torn = [f"{group} in {' and '.join(sorted(names))}" for group, names in where.items() if group and len(names) > 1]
    if torn:
        raise MisconfigurationException(
            f"{len(torn)} groups are torn apart by the splits ({some(torn)}): move each group into one split, or leave "
            "groups out."
        )


def copies_across(splits: dict[str, list[Photo]], bar: Bar = no_bar) -> list[tuple[str, str]]:
    """Exact copies of training photos in other splits, and of validation photos in the test: pairs of names.

    Only files whose size occurs in more than one split are read.
    """
    by_size: dict[int, list[tuple[str, Photo]]] = defaultdict(list)
    for split, photos in splits.items():
        for photo in photos:
            if photo.file.exists():
                by_size[os.path.getsize(photo.file)].append((split, photo))
    alike = [group for size, group in by_size.items() if size and len({split for split, _ in group}) > 1]
    digests = _digests([photo.file for group in alike for _, photo in group], bar)
    first: dict[bytes, tuple[str, str]] = {}
    pairs = []
    order = {split: i for i, split in enumerate(("train", "val", "test"))}
    for group in alike:
        for split, photo in sorted(group, key=lambda each: order[each[0]]):
            seen_in, seen = first.setdefault(digests[photo.file], (split, photo.name))
            if seen_in != split:
                pairs.append((f"{seen_in}: {seen}", f"{split}: {photo.name}"))
    return pairs


def copies_among(photos: Sequence[Photo], bar: Bar = no_bar) -> list[list[int]]:
    """Places of the photos that are exact copies of each other; only files that share their size are read.

    Without those that are all photos of a class, which could not validate and be trained on if they stayed together.
    """
    by_size: dict[int, list[int]] = defaultdict(list)
    for i, photo in enumerate(photos):
        by_size[os.path.getsize(photo.file) if photo.file.exists() else 0].append(i)
    alike = [i for size, places in by_size.items() if size and len(places) > 1 for i in places]
    digests = _digests([photos[i].file for i in alike], bar)
    found: dict[bytes, list[int]] = defaultdict(list)
    for i in alike:
        found[digests[photos[i].file]].append(i)
    total = Counter(label for photo in photos for label in photo.labels)
    return [places for places in found.values() if len(places) > 1 and not _holds_a_class(photos, places, total)]


def _holds_a_class(photos: Sequence[Photo], places: Sequence[int], total: Counter[str]) -> bool:
    return any(
        number == total[label] for label, number in Counter(label for i in places for label in photos[i].labels).items()
    )


def _digests(files: Sequence[Path], bar: Bar) -> dict[Path, bytes]:
    return {file: _digest(file) for file in bar(files, len(files), "looking for copies")}


def _digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        digest = hashlib.blake2b(digest_size=16)
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.digest()


def line_of(found: Found, source: str, val_from: str, copies: Sequence[tuple[str, str]]) -> str:
    """The one line on what was found."""
    kind = "labels (several per photo)" if found.multi_label else "classes"
    numbers = [f"{len(photos)} {split}" for split, photos in found.splits.items()]
    parts = [
        f"{source}: {len(found.class_names)} {kind} ({some(found.class_names)})",
        f"photos: {', '.join(numbers)}{'' if 'test' in found.splits else ', no test'}",
        f"val from {val_from}",
    ]
    counts = Counter(label for photo in found.splits["train"] for label in photo.labels)
    (most, largest), (least, smallest) = counts.most_common(1)[0], min(counts.items(), key=lambda item: item[1])
    ratio = f"largest class {largest / smallest:.3g}x the smallest ({most} {largest}, {least} {smallest})"
    parts.append(ratio if largest > smallest else f"{largest} training photos of each class")
    in_val = {label for photo in found.splits["val"] for label in photo.labels}
    alone = [name for name in found.class_names if name not in in_val]
    if alone:
        parts.append(f"not in val: {some(alone)}")
    pairs = some((f"{one} = {other}" for one, other in copies), 3)
    parts.append(f"{len(copies)} exact copies across splits ({pairs})" if copies else "no exact copies across splits")
    return "; ".join([*parts, *found.remarks])
