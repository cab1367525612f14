from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from lightning_unfreeze.data.folders import Found, Photo
from lightning_unfreeze.data.modules import ImageFolderData
from lightning_unfreeze.data.splits import (
    copies_across,
    copies_among,
    draw_validation,
    line_of,
    refuse_torn_groups,
    take_listed,
)


def photos(counts: dict[str, int], group: Any = lambda label, i: "") -> list[Photo]:
    return [
        Photo(Path("root", label, f"{i}.jpg"), f"{label}/{i}.jpg", (label,), group(label, i))
        for label, count in counts.items()
        for i in range(count)
    ]


def names(some: list[Photo]) -> set[str]:
    return {photo.name for photo in some}


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_draw__one_more_photo_moves_no_other(fraction: float) -> None:
    every = photos({"a": 150, "b": 150, "c": 150})
    _, val = draw_validation(every, fraction, seed=0)
    for i in range(1000, 1100):
        _, with_one_more = draw_validation([*every, Photo(Path("x"), f"b/{i}.jpg", ("b",))], fraction, seed=0)
        assert names(val) == names(with_one_more) - {f"b/{i}.jpg"}


def test_draw__the_share_is_met_within_chance_and_hangs_on_the_seed() -> None:
    every = photos({"a": 5000, "b": 5000})
    shares = []
    for seed in range(5):
        train, val = draw_validation(every, 0.2, seed)
        assert [*train, *val] != every
        assert sorted([*train, *val]) == sorted(every)
        shares.append(len(val) / len(every))
    assert np.abs(np.array(shares) - 0.2).max() < 4 * np.sqrt(0.2 * 0.8 / len(every))  # four standard errors
    assert len(set(shares)) > 1


@pytest.mark.parametrize("fraction", [0.001, 0.2, 0.999])
def test_draw__every_class_has_photos_on_both_sides(fraction: float) -> None:
    every = photos({f"class {i}": 2 + i % 3 for i in range(200)})
    train, val = draw_validation(every, fraction, seed=0)
    assert {photo.labels for photo in train} == {photo.labels for photo in val} == {photo.labels for photo in every}


def test_draw__groups_stay_together_and_a_class_of_one_group_stays_in_training() -> None:
    every = photos({"a": 100, "b": 100}, lambda label, i: f"scene {i // 5}")
    every += photos({"rare": 4}, lambda label, i: "scene of its own")
    train, val = draw_validation(every, 0.2, seed=0)
    groups = [{photo.group for photo in side} for side in (train, val)]
    assert groups[0] & groups[1] == set()
    assert len(groups[1]) > 1
    assert "scene of its own" in groups[0]
    refuse_torn_groups({"train": train, "val": val})


def test_draw__several_labels_count_each() -> None:
    every = [Photo(Path(str(i)), str(i), ("common", "rare") if i < 2 else ("common",)) for i in range(50)]
    train, val = draw_validation(every, 0.1, seed=0)
    for side in (train, val):
        assert Counter(label for photo in side for label in photo.labels).keys() == {"common", "rare"}


def test_draw__a_class_of_one_photo_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"Class 'b' has a single image.*\(1 such classes\)"):
        draw_validation(photos({"a": 3, "b": 1}), 0.2, 0)


@pytest.mark.parametrize("listed", [["b/1.jpg"], ["./b\\1.jpg", ""], ["root/b/1.jpg"]])
def test_list__names_the_validation_photos(listed: list[str]) -> None:
    train, val = take_listed(photos({"a": 2, "b": 2}), listed, "val.txt")
    assert (names(train), names(val)) == ({"a/0.jpg", "a/1.jpg", "b/0.jpg"}, {"b/1.jpg"})


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (["1.jpg"], r"1.jpg \(2 photos\)"),
        (["b/9.jpg", "a/1.jpg"], r"not found once: b/9.jpg \(0 photos\)"),
        ([], "empty"),
    ],
)
def test_list__names_that_fit_no_photo_or_several_are_refused(listed: list[str], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        take_listed(photos({"a": 2, "b": 2}), listed, "val.txt")


def test_groups__torn_apart_by_given_folders_are_refused() -> None:
    first, second = photos({"a": 1}, lambda *_: "p1"), photos({"a": 1, "b": 1}, lambda *_: "p1")
    with pytest.raises(MisconfigurationException, match=r"1 groups are torn apart .*p1 in train and val"):
        refuse_torn_groups({"train": first, "val": second})


def test_copies__only_files_of_equal_size_are_read(tmp_path: Path) -> None:
    contents = {"train": [b"one", b"two", b"unique"], "val": [b"two", b"red"], "test": [b"one", b"red"]}
    splits: dict[str, list[Photo]] = {}
    for split, parts in contents.items():
        for i, content in enumerate(parts):
            path = tmp_path / f"{split}{i}.jpg"
            path.write_bytes(content)
            splits.setdefault(split, []).append(Photo(path, f"{split}{i}", ("a",)))
    read = []

    def bar(found: Any, total: int, text: str) -> Any:
        read.extend(found)
        return found

    pairs = copies_across(splits, bar)
    assert sorted(pairs) == [
        ("train: train0", "test: test0"),
        ("train: train1", "val: val0"),
        ("val: val1", "test: test1"),
    ]
    assert tmp_path / "train2.jpg" not in read
    assert len(read) == 6


def test_line__says_all_that_was_found() -> None:
    found = Found(
        {"train": photos({"a": 30, "b": 10}), "val": photos({"a": 4})}, ["a", "b"], remarks=["left out: 2 .txt"]
    )
    line = line_of(found, "root='x'", "its own folder", [("train: a/1.jpg", "val: a/2.jpg")])
    assert line == (
        "root='x': 2 classes (a, b); photos: 40 train, 4 val, no test; val from its own folder; largest class 3x the "
        "smallest (a 30, b 10); not in val: b; 1 exact copies across splits (train: a/1.jpg = val: a/2.jpg); left out: "
        "2 .txt"
    )


def folder(root: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, 0, 0)).save(root / name)
    return root


def test_module__a_list_of_files_and_groups_by_a_pattern(tmp_path: Path) -> None:
    files = [f"{label}/p{i // 2}_{i}.png" for label in "ab" for i in range(10)]
    root = folder(tmp_path, files)
    (root / "val.txt").write_text("a/p0_0.png\nb/p0_1.png\n")
    data = ImageFolderData(str(root), val_files="val.txt")
    data.setup("fit")
    assert data.paths("val") == [str(root / "a/p0_0.png"), str(root / "b/p0_1.png")]
    with pytest.raises(MisconfigurationException, match=r"1 groups are torn apart"):
        ImageFolderData(str(root), val_files="val.txt", groups=r"/(p\d+)_").setup("fit")
    data = ImageFolderData(str(root), groups=r"/(p\d+)_", val_fraction=0.4)
    data.setup("fit")
    sides = [{Path(path).name.split("_")[0] for path in data.paths(split)} for split in ("train", "val")]  # type: ignore[arg-type]
    assert sides[0] & sides[1] == set()
    with pytest.raises(MisconfigurationException, match=r"finds no group in the path of 20 photos"):
        ImageFolderData(str(root), groups="patient").setup("fit")


def written(tmp_path: Path, contents: dict[str, bytes]) -> list[Photo]:
    found = []
    for name, content in contents.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        found.append(Photo(path, name, (path.parent.name,)))
    return found


def test_draw__exact_copies_are_never_torn_apart(tmp_path: Path) -> None:
    every = written(tmp_path, {f"{label}/{i}.jpg": f"{label}{i // 2}".encode() for label in "ab" for i in range(60)})
    copies = copies_among(every)
    assert sorted(copies) == [[i, i + 1] for i in range(0, 120, 2)]
    torn = 0
    for seed in range(3):
        train, val = draw_validation(every, 0.3, seed, copies)
        assert sorted([*train, *val]) == sorted(every) and len(train) > len(val) > 0
        assert not copies_across({"train": train, "val": val})
        plain_train, plain_val = draw_validation(every, 0.3, seed)
        torn += len(copies_across({"train": plain_train, "val": plain_val}))
    assert torn > 10, "by name alone they are"


def test_draw__copies_in_two_groups_join_the_groups() -> None:
    every = photos({"a": 40, "b": 40}, lambda label, i: f"{label}{i // 4}")
    copies = [[0, 79], [77, 4]]  # a0 and b9, b9 and a1
    for seed in range(20):
        train, val = draw_validation(every, 0.3, seed, copies)
        refuse_torn_groups({"train": train, "val": val})
        joined = {photo.name for photo in every if photo.group in ("a0", "b9", "a1")}
        assert len(joined) == 12 and (joined <= names(train) or joined <= names(val))


def test_copies_among__reads_only_what_shares_its_size(tmp_path: Path) -> None:
    every = written(tmp_path, {"a/1": b"one", "a/2": b"two", "b/3": b"one", "b/4": b"longer", "b/5": b"", "b/6": b""})
    read: list[Path] = []

    def bar(found: Any, total: int, text: str) -> Any:
        read.extend(found)
        return found

    assert copies_among(every, bar) == [[0, 2]]
    assert sorted(read) == [every[i].file for i in range(3)]


def test_copies_among__all_photos_of_a_class_can_be_split(tmp_path: Path) -> None:
    every = written(tmp_path, {f"a/{i}": b"drawn" for i in range(5)} | {f"b/{i}": b"12"[i % 2 :] for i in range(6)})
    copies = copies_among(every)
    assert copies == [[5, 7, 9], [6, 8, 10]]
    train, val = draw_validation(every, 0.2, 0, copies)
    assert {photo.labels for photo in train} == {photo.labels for photo in val} == {("a",), ("b",)}


def test_found__a_photo_under_two_labels_is_said_and_stays_on_one_side(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for label in ("daisy", "rose"):
        (tmp_path / label).mkdir()
        for i in range(12):
            Image.fromarray(generator.integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / label / f"{i}.png")
    for copy in ("daisy/copy.png", "rose/copy.png"):
        (tmp_path / copy).write_bytes((tmp_path / "daisy" / "0.png").read_bytes())
    data = ImageFolderData(str(tmp_path))
    data.setup("fit")
    assert data.found is not None
    assert "no exact copies across splits" in data.found
    assert (
        "1 photo has exact copies, kept on one side, 1 of them under different labels "
        "(daisy/0.png = daisy/copy.png = rose/copy.png)" in data.found
    )
