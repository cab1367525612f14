from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from lightning_unfreeze.data.folders import Found, Rules, find_in_folders, photos_below
from lightning_unfreeze.data.modules import ImageFolderData


def tree(root: Path, *names: str) -> Path:
    """Files without content, and folders where a name ends in a slash."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    return root


def found(root: Path, *names: str, classes: Sequence[str] | None = None, **rules: Any) -> Found:
    return find_in_folders(tree(root, *names), Rules(**rules), classes)


def files(result: Found) -> dict[str, list[str]]:
    return {split: [photo.name for photo in photos] for split, photos in result.splits.items()}


PAIR = ("a/1.jpg", "b/1.jpg")


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("val", ["val", "valid", "Validation", "DEV"])
@pytest.mark.parametrize("test", ["test", "Testing"])
def test_splits__usual_names_in_any_case(train: str, val: str, test: str, tmp_path: Path) -> None:
    result = found(tmp_path, *(f"{split}/{name}" for split in (train, val, test) for name in PAIR))
    assert result.class_names == ["a", "b"]
    assert files(result) == {split: list(PAIR) for split in ("train", "val", "test")}
    assert {split: photos[0].file for split, photos in result.splits.items()} == {
        split: tmp_path / folder / "a/1.jpg" for split, folder in (("train", train), ("val", val), ("test", test))
    }


IN_TRAIN = ("train/a/1.jpg", "train/b/1.jpg")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("val/a/1.jpg", "test/a/1.jpg"), r"has test/, val/ but no train/"),
        (("val/1.jpg", "a/1.jpg", "b/1.jpg"), r"has val/ but no train/"),
        ((*IN_TRAIN, "extra/a/1.jpg", "more/1.jpg"), r"has extra/, more/ with photos beside train/"),
        ((*IN_TRAIN, "val/a/1.jpg", "valid/a/1.jpg"), r"has val and valid for one split"),
        ((*IN_TRAIN, "val/"), r"val has no class folders, it holds nothing"),
        ((*IN_TRAIN, "val/1.jpg", "val/2.jpg"), r"val has no class folders, it holds 2 photos \(1.jpg, 2.jpg\)"),
        ((*IN_TRAIN, "val/notes.txt", "val/x.heic"), r"holds 1 .txt, 1 .heic"),
        ((*IN_TRAIN, "train/c/"), r"class folders without images \(c: nothing\)"),
        ((*IN_TRAIN, "train/c/1.heic"), r"class folders without images \(c: 1 .heic, for HEIC: pip install"),
        ((*IN_TRAIN, "val/A/1.jpg"), r"val/ .* classes that train/ lacks \(A\) \(train/ has a, in other capitals\)"),
        ((*IN_TRAIN, "val/a/1.jpg", "val/x/1.jpg"), r"classes that train/ lacks \(x\)"),
        (("a/train/1.jpg", "a/val/1.jpg", "b/train/1.jpg"), r"a holds train/, val/: the splits have to lie above"),
        (
            ("photos/a/1.jpg", "photos/b/1.jpg"),
            r"holds 1 class \(photos\).*Should root be '.*/photos', which holds a, b",
        ),
        (("1.jpg", "2.jpg"), r"holds 0 class .* lies 2 photos"),
        (("photos.zip",), r"holds 0 class .* lies 1 .zip"),
        ((), r"holds 0 class .* lies nothing"),
        (("train/a/1.jpg",), r"holds 1 class \(a\)"),
    ],
)
def test_folders__what_is_not_clear_is_refused_by_name(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message) as error:
        found(tmp_path, *names)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "odd",
    [
        *(".ipynb_checkpoints/1.jpg", ".Trash-1000/files/1.jpg", "__MACOSX/._1.jpg", "@eaDir/1.jpg", "lost+found/"),
        *("a/._1.jpg", "a/.DS_Store", "a/Thumbs.db", "b/desktop.ini", "a/@eaDir/1.jpg/SYNOPHOTO_THUMB_B.jpg"),
        *("b/sub/__MACOSX/._2.jpg", "$RECYCLE.BIN/1.jpg", "System Volume Information/"),
    ],
)
def test_folders__what_systems_leave_behind_does_not_count(odd: str, tmp_path: Path) -> None:
    for place in ("train/", "val/"):
        tree(tmp_path, place + odd)
    result = found(tmp_path, *IN_TRAIN, "val/a/1.jpg", "val/b/1.jpg", odd)
    assert files(result) == {"train": list(PAIR), "val": list(PAIR)}
    assert result.remarks == []


def test_folders__results_beside_train_do_not_matter(tmp_path: Path) -> None:
    names = ("lightning_logs/version_0/checkpoints/stages.png", "notes/readme.txt", "empty/", "list.csv")
    assert files(found(tmp_path, *IN_TRAIN, *names)) == {"train": list(PAIR)}


def test_folders__hidden_parents_of_the_root_do_not_matter(tmp_path: Path) -> None:
    assert files(found(tmp_path / ".cache" / "__MACOSX", *PAIR)) == {"train": list(PAIR)}


def test_folders__endings_in_any_case_and_what_is_left_out_by_ending(tmp_path: Path) -> None:
    good = ("1.JPG", "2.Jpeg", "3.webp", "4.TIFF", "5.bmp", "6.gif", "7.jfif", "8.jp2", "9.ppm")
    others = ("x.txt", "y.txt", "z.HEIC", "README")
    result = found(tmp_path, "b/1.jpg", *(f"a/{name}" for name in (*good, *others)))
    assert files(result) == {"train": [*(f"a/{name}" for name in good), "b/1.jpg"]}
    (remark,) = result.remarks
    assert remark.startswith("left out: 2 .txt, 1 ")
    assert "1 .heic" in remark
    assert "1 without ending" in remark


def test_folders__own_endings_and_patterns(tmp_path: Path) -> None:
    names = ("a/1.jpg", "a/1_mask.png", "a/thumbs/2.jpg", "b/1.jpg", "b/2.x")
    result = found(tmp_path, *names, ignore=("*_mask.png", "Thumbs"))
    assert files(result) == {"train": list(PAIR)}
    assert files(found(tmp_path, *names, "a/2.x", endings=frozenset({".x"}))) == {"train": ["a/2.x", "b/2.x"]}


def test_folders__links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    elsewhere = tree(tmp_path / "elsewhere", "2.jpg", "deep/3.jpg")
    root = tree(tmp_path / "root", *IN_TRAIN, "other/")
    (root / "train/a/linked").symlink_to(elsewhere)
    (root / "train/c").symlink_to(elsewhere)
    (elsewhere / "deep/up").symlink_to(elsewhere)
    (root / "train/b/top").symlink_to(root)
    (root / "train/again").symlink_to(root / "train")
    (root / "train/b/gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "train/b/2.jpg").symlink_to(elsewhere / "2.jpg")
    assert files(found(root)) == {
        "train": [
            *("a/1.jpg", "a/linked/2.jpg", "a/linked/deep/3.jpg"),
            *("b/1.jpg", "b/2.jpg", "b/gone.jpg"),  # which the check of the files reports
            *("c/2.jpg", "c/deep/3.jpg"),
        ]
    }


def test_folders__a_name_in_two_forms_of_unicode_is_one_class(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != apart
    result = found(tmp_path, f"train/{composed}/1.jpg", "train/b/1.jpg", f"train/{apart}/2.jpg", f"val/{apart}/1.jpg")
    assert result.class_names == ["b", composed]
    assert [photo.labels for photo in result.splits["val"]] == [(composed,)]
    assert len(result.splits["train"]) == 3


def test_folders__classes_that_differ_in_capitals_alone_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="differ in capitals alone: Cat and cat"):
        assert found(tmp_path, "Cat/1.jpg", "cat/1.jpg").class_names == ["Cat", "cat"]


def test_folders__photos_inside_class_folders_count_for_the_upper_one_and_that_is_said(tmp_path: Path) -> None:
    result = found(tmp_path, "a/x/1.jpg", "a/y/1.jpg", "b/x/1.jpg", "1.jpg")
    assert files(result) == {"train": ["a/x/1.jpg", "a/y/1.jpg", "b/x/1.jpg"]}
    assert result.remarks == [
        f"1 photos beside the class folders of {tmp_path.name}/ do not count",
        "photos in folders inside a, b count for the class above them",
    ]


def test_folders__a_subset_of_classes_in_the_order_given(tmp_path: Path) -> None:
    names = [f"{split}/{name}/1.jpg" for split in ("train", "val") for name in "abc"]
    result = found(tmp_path, *names, classes=["c", "a"])
    assert result.class_names == ["c", "a"]
    assert files(result) == {"train": ["c/1.jpg", "a/1.jpg"], "val": ["c/1.jpg", "a/1.jpg"]}
    with pytest.raises(MisconfigurationException, match=r"has no x, it has folders a, b, c"):
        found(tmp_path, classes=["a", "x"])
    vehicles = found(tmp_path / "vehicles", "bus/1.jpg", "train/1.jpg", classes=["bus", "train"])
    assert vehicles.class_names == ["bus", "train"]


def test_folders__a_test_folder_without_classes_is_not_scored_but_does_not_stop_training(tmp_path: Path) -> None:
    result = found(tmp_path, *IN_TRAIN, "test/1.jpg", "test/2.jpg")
    assert list(result.splits) == ["train"]
    assert result.remarks == ["test/ has no class folders and cannot be scored"]
    assert "holds 2 photos (1.jpg, 2.jpg)" in result.missing["test"]


def test_module__folders_of_photos_to_predict_and_of_results_are_no_classes(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png", "new/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), name[0] + "qua" if name[0] == "a" else "red").save(tmp_path / name)
    data = ImageFolderData(str(tmp_path), predict_dir=str(tmp_path / "new"))
    data.setup("fit")
    assert data.class_names == ["a", "b"]
    data.setup("predict")
    assert data.paths("predict") == [str(tmp_path / "new/1.png")]


def test_listing__names_that_are_no_text_are_listed_and_shown(tmp_path: Path) -> None:
    name = b"\xff\xfe.jpg".decode("utf-8", "surrogateescape")
    (listed,), _ = photos_below(tree(tmp_path, name), Rules())
    assert listed.exists()
    with pytest.raises(MisconfigurationException, match=r"\\udcff\\udcfe\.jpg") as error:
        found(tmp_path)
    str(error.value).encode()
