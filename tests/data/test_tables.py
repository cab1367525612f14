from __future__ import annotations

import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from lightning_unfreeze.data.folders import Found, Rules
from lightning_unfreeze.data.labels import targets_of
from lightning_unfreeze.data.modules import ImageFolderData
from lightning_unfreeze.data.tables import find_in_tables, tables_in

FILES = ("1.jpg", "2.jpg", "3.jpg", "4.jpg")


def made(
    root: Path, table: str, name: str = "labels.csv", files: tuple[str, ...] = FILES, folder: str = "images"
) -> Path:
    for file in files:
        (root / folder / file).parent.mkdir(parents=True, exist_ok=True)
        (root / folder / file).touch()
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(table, encoding="utf-8")
    return root


def found(root: Path, **options: Any) -> Found:
    result = find_in_tables(root, tables_in(root), Rules(), **options)
    assert result is not None
    return result


def labels(result: Found) -> dict[str, list[tuple[str, ...]]]:
    return {split: [photo.labels for photo in photos] for split, photos in result.splits.items()}


CAT_DOG = [("cat",), ("dog",), ("cat",), ("dog",)]
ROWS = "{0}1{1},cat\n{0}2{1},dog\n{0}3{1},cat\n{0}4{1},dog\n"


@pytest.mark.parametrize("columns", ["file,label", "file_name,label", "Filename,Class", "image,category", "id,breed"])
@pytest.mark.parametrize("prefix", ["", "images/", "./images/", "images\\", "elsewhere/on/my/disk/"])
@pytest.mark.parametrize("ending", [".jpg", ""])
def test_table__columns_and_paths_as_people_write_them(columns: str, prefix: str, ending: str, tmp_path: Path) -> None:
    result = found(made(tmp_path, f"{columns}\n{ROWS.format(prefix, ending)}"))
    assert labels(result) == {"train": CAT_DOG}
    assert [photo.file for photo in result.splits["train"]] == [tmp_path / "images" / file for file in FILES]
    assert (result.class_names, result.multi_label) == (["cat", "dog"], False)


@pytest.mark.parametrize("name", ["labels.csv", "labels.tsv", "metadata.csv", "metadata.jsonl"])
def test_table__forms(name: str, tmp_path: Path) -> None:
    rows = [{"file_name": f"images/{file}", "label": label} for file, (label,) in zip(FILES, CAT_DOG, strict=True)]
    text = "\n".join(json.dumps(row) for row in rows)
    if not name.endswith("jsonl"):
        sign = "\t" if name.endswith("tsv") else ";"
        text = "\ufeff" + sign.join(rows[0]) + "\r\n" + "\r\n".join(sign.join(row.values()) for row in rows)
    assert labels(found(made(tmp_path, text, name))) == {"train": CAT_DOG}


def test_table__parquet_by_pyarrow_or_a_word_on_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, "", "labels.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MisconfigurationException, match=r"labels\.parquet needs pyarrow: .* or save the table as CSV"):
        found(tmp_path)
    rows = [{"image": {"bytes": None, "path": file}, "labels": ["a", "b"] if file < "3" else ["b"]} for file in FILES]
    pyarrow, parquet = types.ModuleType("pyarrow"), types.ModuleType("pyarrow.parquet")
    parquet.read_table = lambda path: types.SimpleNamespace(to_pylist=lambda: rows)  # type: ignore[attr-defined]
    pyarrow.parquet = parquet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    result = found(tmp_path)
    assert result.multi_label
    assert labels(result) == {"train": [("a", "b"), ("a", "b"), ("b",), ("b",)]}


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("split", ["train", "Valid", "train", "test"]),
        ("Set", ["", "dev", "training", "TEST"]),
        ("subset", ["train", "validation", "", "testing"]),
    ],
)
def test_table__a_column_of_splits(column: str, values: list[str], tmp_path: Path) -> None:
    rows = "".join(f"{file},{label},{value}\n" for file, (label,), value in zip(FILES, CAT_DOG, values, strict=True))
    rows += "5.jpg,dog,train\n"
    result = found(made(tmp_path, f"file,label,{column}\n{rows}", files=(*FILES, "5.jpg")))
    assert {split: [photo.file.name for photo in photos] for split, photos in result.splits.items()} == {
        "train": ["1.jpg", "3.jpg", "5.jpg"],
        "val": ["2.jpg"],
        "test": ["4.jpg"],
    }


def test_table__fastais_is_valid_and_splits_by_folder(tmp_path: Path) -> None:
    rows = "1.jpg,cat,False\n2.jpg,dog,False\n3.jpg,cat,True\n4.jpg,dog,True\n"
    assert labels(found(made(tmp_path / "a", f"name,label,is_valid\n{rows}"))) == {
        "train": CAT_DOG[:2],
        "val": CAT_DOG[2:],
    }
    files = ("train/1.jpg", "train/2.jpg", "Valid/3.jpg", "Valid/4.jpg")
    table = "file,label\n" + "".join(f"{f},{label}\n" for f, (label,) in zip(files, CAT_DOG, strict=True))
    assert labels(found(made(tmp_path / "b", table, files=files, folder=""))) == {
        "train": CAT_DOG[:2],
        "val": CAT_DOG[2:],
    }


def test_table__hugging_faces_metadata_in_each_split(tmp_path: Path) -> None:
    for split, numbers in (("train", "12"), ("validation", "34")):
        rows = "".join(f"{number}.jpg,{'cat' if number in '13' else 'dog'}\n" for number in numbers)
        made(tmp_path / split, f"file_name,label\n{rows}", "metadata.csv", ("1.jpg", "2.jpg", "3.jpg", "4.jpg"), "")
    result = found(tmp_path)
    assert [photo.name for photo in result.splits["val"]] == ["validation/3.jpg", "validation/4.jpg"]
    assert labels(result) == {"train": CAT_DOG[:2], "val": CAT_DOG[2:]}


@pytest.mark.parametrize(
    ("header", "cells"),
    [
        ("file,label", ["cat;dog", "dog", "cat", ""]),
        ("file,label", ["cat | dog", "dog", "cat", ""]),
        ("file,label", ["cat dog", "dog", "cat", ""]),
        ("file,tags", ["cat dog", "dog", "cat", ""]),
        ("file,label", ['"cat, dog"', "dog", "cat", ""]),
        ("file,cat,dog", ["1,1", "0,1", "1,0", "0,0"]),
        ("file,dog,cat", ["True,True", "True,False", "False,True", "False,False"]),
    ],
)
def test_table__several_labels_per_photo(header: str, cells: list[str], tmp_path: Path) -> None:
    rows = "".join(f"{file},{cell}\n" for file, cell in zip(FILES, cells, strict=True))
    result = found(made(tmp_path, f"{header}\n{rows}"))
    assert result.multi_label
    assert result.class_names == ["cat", "dog"]
    targets = targets_of(result.splits["train"], result.class_names, True)
    assert isinstance(targets, torch.Tensor)
    assert targets.dtype == torch.float32
    assert targets.tolist() == [[1, 1], [0, 1], [1, 0], [0, 0]]


def test_table__several_columns_and_several_rows_are_several_labels(tmp_path: Path) -> None:
    two = made(tmp_path / "a", "file,main,other\n1.jpg,cat,dog\n2.jpg,dog,\n3.jpg,cat,\n4.jpg,cat,dog\n")
    expected = {"train": [("cat", "dog"), ("dog",), ("cat",), ("cat", "dog")]}
    assert labels(found(two, columns={"label": ["main", "other"]})) == expected
    long = made(tmp_path / "b", "file,label\n1.jpg,cat\n1.jpg,dog\n2.jpg,dog\n3.jpg,cat\n4.jpg,cat\n4.jpg,dog\n")
    assert labels(found(long)) == expected


def test_table__one_hot_columns_are_one_class_and_names_may_have_spaces(tmp_path: Path) -> None:
    one_hot = found(made(tmp_path / "a", "file,cat,dog\n1.jpg,1,0\n2.jpg,0,1\n3.jpg,1.0,0.0\n4.jpg,0,1\n"))
    assert (one_hot.multi_label, labels(one_hot)) == (False, {"train": CAT_DOG})
    spaces = "file,label\n1.jpg,golden retriever\n2.jpg,tabby cat\n3.jpg,golden retriever\n4.jpg,tabby cat\n"
    names = found(made(tmp_path / "b", spaces))
    assert (names.multi_label, names.class_names) == (False, ["golden retriever", "tabby cat"])
    told = found(tmp_path / "b", label_separator=" ")
    assert (told.multi_label, told.class_names) == (True, ["cat", "golden", "retriever", "tabby"])


def test_table__numbers_are_classes_in_their_own_order(tmp_path: Path) -> None:
    result = found(made(tmp_path, "file,label\n1.jpg,10\n2.jpg,2\n3.jpg,2.0\n4.jpg,10\n"))
    assert (result.class_names, labels(result)) == (["2", "10"], {"train": [("10",), ("2",), ("2",), ("10",)]})


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ("file,label\n", {}, "has no rows"),
        (
            "file,label\n1.jpg,cat\n9.jpg,dog\n8.jpg,dog\n",
            {},
            r"names 2 of 3 photos that do not lie in .* \(9.jpg, 8.jpg\)",
        ),
        ("file,label\n1.jpg,cat\n2.jpg,\n", {}, r"1 photos without a label \(2.jpg\)"),
        ("file,label\n1.jpg,cat\n2.jpg,cat\n", {}, "has the classes cat on 2 training photos: two or more"),
        ("file,label\n1.jpg,0.37\n2.jpg,1.5\n", {}, r"holds fractions .* \(regression\), use a module"),
        ("file,label\n1.jpg,-1\n2.jpg,1\n", {}, "holds negative numbers"),
        (
            "file,label,split\n1.jpg,cat,train\n2.jpg,dog,fold 1\n",
            {},
            "column 'split' holds 'fold 1'; give one of train",
        ),
        ("file,label,split\n1.jpg,cat,train\n2.jpg,dog,val\n", {}, "classes cat, dog|without a training photo: dog"),
        ("file,label,split\n1.jpg,a,train\n2.jpg,b,train\n1.jpg,a,val\n", {}, "puts 1.jpg in train and in val"),
        (
            "file,label\n1.jpg,a\n2.jpg,b\n1.jpg,b\n",
            {"multi_label": False},
            r"gives 1 photos several classes \(1.jpg\)",
        ),
        ("file,label\n1.jpg,a,b\n2.jpg,b\n", {}, "row 2, has more cells than there are columns"),
        ("file,label\n1.jpg,a\n2.jpg,b\n", {"columns": {"label": "breed"}}, "has no column breed; it has file, label"),
        ("file,label\n1.jpg,a\n2.jpg,b\n", {"columns": {"labels": "label"}}, "columns has labels: give file, label or"),
        ("file,label\n1.jpg,a\n2.jpg,b\n", {"group_column": "patient"}, "has no column patient"),
        ("file,label\n1.jpg,a\n2.jpg,b\n", {"classes": ["a", "x"]}, "has the classes a, not x"),
        (
            "a,b\n1.jpg,a\n",
            {"columns": {"file": "a"}},
            r"has the columns a, b: name that of the labels, columns: \{label",
        ),
        ("a,b\nx,cat\ny,cat\n", {"columns": {}}, r"has the columns a, b: name that of the files, columns: \{file"),
    ],
)
def test_table__what_does_not_fit_is_refused_in_one_line(
    table: str, options: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(MisconfigurationException, match=message) as error:
        found(made(tmp_path, table), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("columns", ["fname,label", "Bild,Klasse", "breed,photo of it"])
def test_table__a_column_of_photos_is_known_by_what_it_holds(columns: str, tmp_path: Path) -> None:
    rows = zip(FILES, CAT_DOG, strict=True)
    lines = [f"{name},{file}" if columns.startswith("breed") else f"{file},{name}" for file, (name,) in rows]
    result = found(made(tmp_path, "\n".join([columns, *lines])))
    assert labels(result) == {"train": CAT_DOG}
    assert [photo.file.name for photo in result.splits["train"]] == list(FILES)


def test_table__a_column_of_addresses_is_none_of_photos(tmp_path: Path) -> None:
    made(tmp_path, "from,label\nhttps://a.org/1.jpg,cat\nhttps://a.org/2.jpg,dog\n")
    assert find_in_tables(tmp_path, tables_in(tmp_path), Rules()) is None


def test_table__of_two_columns_of_photos_those_that_lie_there_count(tmp_path: Path) -> None:
    rows = [f"scan-{file},{file},{name}" for file, (name,) in zip(FILES, CAT_DOG, strict=True)]
    for label in ("label", "breed"):
        assert labels(found(made(tmp_path, "\n".join([f"was,is,{label}", *rows])))) == {"train": CAT_DOG}
    made(tmp_path, "\n".join(["one,other,label", *(row.removeprefix("scan-") for row in rows)]))
    with pytest.raises(MisconfigurationException, match="names photos in one and other: name the column of the files"):
        find_in_tables(tmp_path, tables_in(tmp_path), Rules())


def test_module__a_table_of_where_photos_came_from_leaves_the_folders_to_say_the_labels(tmp_path: Path) -> None:
    for file in ("train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/b/4.jpg"):
        (tmp_path / file).parent.mkdir(parents=True)
        Image.new("RGB", (40, 40), (60 * int(file[-5]), 0, 0)).save(tmp_path / file)
    (tmp_path / "metadata.csv").write_text("original,category\nDSC1.jpg,x\nDSC2.jpg,x\nDSC3.jpg,y\nDSC4.jpg,y\n")
    data = ImageFolderData(str(tmp_path))
    data.setup("fit")
    assert data.class_names == ["a", "b"] and "metadata.csv has no columns of files and labels" in str(data.found)


def test_table__bytes_that_are_no_utf_8_are_refused(tmp_path: Path) -> None:
    made(tmp_path, "")
    (tmp_path / "labels.csv").write_bytes("file,label\n1.jpg,Löwe\n".encode("latin-1"))
    with pytest.raises(MisconfigurationException, match=r"labels\.csv is not readable as a table in UTF-8"):
        found(tmp_path)


def test_table__photos_in_no_row_are_counted(tmp_path: Path) -> None:
    result = found(made(tmp_path, "file,label\n1.jpg,cat\n2.jpg,dog\n"))
    assert result.remarks == ["labels from labels.csv", "2 photos are in no row"]


def photos(root: Path, table: str) -> Path:
    made(root, table)
    for i, file in enumerate(FILES):
        Image.new("RGB", (40, 40), (60 * i, 0, 0)).save(root / "images" / file)
    return root


def test_module__takes_a_table_and_gives_rows_of_zeros_and_ones(tmp_path: Path) -> None:
    rows = "1.jpg,cat;dog,train\n2.jpg,dog,train\n3.jpg,cat,val\n4.jpg,bird,train\n"
    data = ImageFolderData(str(photos(tmp_path, f"file,label,split\n{rows}")), image_size_px=16, batch_size=3)
    data.setup("fit")
    assert (data.multi_label, data.num_labels, data.class_names) == (True, 3, ["bird", "cat", "dog"])
    assert (data.class_counts, data.num_train_images) == ([1, 1, 2], 3)
    ((images, targets),) = list(data.train_dataloader())
    assert images.shape == (3, 3, 16, 16)
    assert targets.dtype == torch.float32
    assert sorted(targets.tolist()) == [[0, 0, 1], [0, 1, 1], [1, 0, 0]]
    assert [target.tolist() for _, targets in data.val_dataloader() for target in targets] == [[0, 1, 0]]
    data.order_classes(["dog", "cat", "bird", "cow"])
    assert data.class_counts == [2, 1, 1, 0]
    assert data.found is not None
    assert "3 labels (several per photo) (bird, cat, dog)" in data.found
    assert "val from the table" in data.found


def test_module__a_table_without_labels_leaves_the_folders_to_say_them(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (len(name), ord(name[0]), ord(name[2]))).save(tmp_path / name)
    (tmp_path / "metadata.csv").write_text(
        "file_name,licence\na/1.png,mine\na/2.png,mine\nb/1.png,free\nb/2.png,free\n"
    )
    data = ImageFolderData(str(tmp_path))
    data.setup("fit")
    assert data.class_names == ["a", "b"]
    assert data.found is not None
    assert "metadata.csv has no columns of files and labels and is not used" in data.found


def test_module__a_table_that_was_named_is_one_of_photos(tmp_path: Path) -> None:
    root = photos(tmp_path, "photo no.,kind\n1,cat\n2,cat\n3,dog\n4,dog\n")
    with pytest.raises(MisconfigurationException, match=r"has the columns photo no., kind: name that of the files"):
        ImageFolderData(str(root), labels="labels.csv").setup("fit")
    data = ImageFolderData(str(root), labels="labels.csv", columns={"file": "photo no."}, val_fraction=0.5)
    data.setup("fit")
    assert data.class_names == ["cat", "dog"]


def test_module__groups_by_a_column_stay_together(tmp_path: Path) -> None:
    files = tuple(f"{i:02d}.jpg" for i in range(40))
    rows = "".join(f"{file},{'ab'[i % 2]},p{i // 4}\n" for i, file in enumerate(files))
    made(tmp_path, f"file,label,patient\n{rows}", files=files)
    for i, file in enumerate(files):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / "images" / file)
    data = ImageFolderData(str(tmp_path), groups="patient", val_fraction=0.3)
    data.setup("fit")
    groups = {split: {int(Path(path).stem) // 4 for path in data.paths(split)} for split in ("train", "val")}  # type: ignore[arg-type]
    assert groups["train"] & groups["val"] == set()
    assert groups["train"] | groups["val"] == set(range(10))
    assert len(data.paths("val")) == 4 * len(groups["val"]) > 0
