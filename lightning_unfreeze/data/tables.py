"""Photos and their labels from tables: CSV, JSON lines, Parquet."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_unfreeze.data.folders import SPLIT_OF, Found, Photo, Rules, counted, photos_below, plain, some

TABLES = ("labels", "metadata")
"""Names of the tables that are found without being named; `metadata` is that of Hugging Face's `imagefolder`."""

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")

COLUMNS: dict[str, tuple[str, ...]] = {
    "file": (
        *("file_name", "filename", "file", "filepath", "file_path", "path", "image", "image_path", "image_name"),
        *("image_id", "img", "photo", "name", "fname", "id"),
    ),
    "label": ("label", "labels", "class", "classes", "class_name", "category", "categories", "tags", "tag", "target"),
    "split": ("split", "set", "subset", "partition", "is_valid"),
}
"""The names of columns that are found without being named, in any case; the first that is there counts."""

_MANY = {"labels", "classes", "categories", "tags", "targets"}  # of these columns a space separates labels
_SEPARATORS = (";", "|")  # comma and space may be part of a name
_YES_NO = {"0": False, "1": True, "false": False, "true": True, "": False, "0.0": False, "1.0": True}

Row = Mapping[str, Any]


def tables_in(root: Path) -> dict[str, Path]:
    """Tables in a folder (key ``""``), or one in each folder of a split (key: the split), as far as there are any."""
    for name in TABLES:
        for ending in ENDINGS:
            if (root / (name + ending)).is_file():
                return {"": root / (name + ending)}
            below = {
                SPLIT_OF[folder.name.casefold()]: folder / (name + ending)
                for folder in root.iterdir()
                if folder.name.casefold() in SPLIT_OF and (folder / (name + ending)).is_file()
            }
            if "train" in below:
                return below
    return {}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table.

    Raises:
        MisconfigurationException: For a file that is no such table.
    """
    ending = path.suffix.lower()
    try:
        if ending == ".parquet":
            return _read_parquet(path)
        text = path.read_text(encoding="utf-8-sig")
        if ending == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:  # bytes that are no UTF-8, lines that are no JSON
        raise MisconfigurationException(f"{path} is not readable as a table in UTF-8: {error}") from error
    if ending not in (".csv", ".tsv", ".txt"):
        raise MisconfigurationException(f"labels={str(path)!r}: give a table that ends in {', '.join(ENDINGS)}.")
    header = text.partition("\n")[0]
    delimiter = max("\t;,", key=header.count)
    rows = list(csv.DictReader(text.splitlines(), delimiter=delimiter, skipinitialspace=True))
    long = next((i for i, row in enumerate(rows) if None in row), None)
    if long is not None:
        raise MisconfigurationException(
            f"{path}, row {long + 2}, has more cells than there are columns: put cells with {delimiter!r} in quotes."
        )
    return [{(key or "").strip(): (value or "").strip() for key, value in row.items()} for row in rows]


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MisconfigurationException(
            f"{path} needs pyarrow: python -m pip install pyarrow, or save the table as CSV."
        ) from error
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def find_in_tables(
    root: Path,
    tables: Mapping[str, Path],
    rules: Rules,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    label_separator: str | None = None,
    multi_label: bool | None = None,
    classes: Sequence[str] | None = None,
    group_column: str | None = None,
) -> Found | None:
    """Photos that tables name, with their labels: the table of each split, or one under `""` for all.

    Columns, separator and whether a photo may have several labels are found out where they are not given. `columns` is
    role -> column, as far as they are named; None says that the table may be about something else.

    Returns:
        What was found, or None for tables without columns of files and labels that may be about something else.

    Raises:
        MisconfigurationException: For tables that fit no photos, or whose labels are no classes.
    """
    rows = [(split, table, row) for split, table in tables.items() for row in read_rows(table)]
    source = next(iter(tables.values()))
    if not rows:
        raise MisconfigurationException(f"{source} has no rows.")
    there = list(rows[0][2])
    named, known = _columns(source, there, columns or {}, group_column)
    files = _Files(root, rules)
    if not named["file"]:
        holding = [name for name in there if _names_photos([_text(row.get(name)) for *_, row in rows], rules)]
        lying = [name for name in holding if any(files.find(_text(r.get(name)), table.parent) for _, table, r in rows)]
        if len(lying) > 1:
            raise MisconfigurationException(
                f"{source} names photos in {' and '.join(lying)}: name the column of the files, columns: {{file: ...}}"
            )
        # a column of photos that lie elsewhere may tell where these came from
        named["file"] = lying if lying or columns is None else holding[:1]
        named["label"] = [column for column in named["label"] if column not in holding]
    cells = [[_text(row.get(column)) for column in named["label"]] for _, _, row in rows]
    # `metadata` is often about something else: authors, licences, captions
    guessed = bool(named["label"]) and named["label"][0] not in known
    if guessed and (source.stem == "metadata" or not _are_labels(cells)):
        named["label"] = []
    if not named["file"] or not named["label"]:
        if columns is not None or group_column:
            lacking = "file" if not named["file"] else "label"
            raise MisconfigurationException(
                f"{source} has the columns {', '.join(there)}: name that of the {lacking}s, columns: {{{lacking}: ...}}"
            )
        return None
    file_column = named["file"][0]
    labels, many = _labels(source, named["label"], cells, label_separator, multi_label)
    photos: dict[Path, dict[str, Any]] = {}
    missing, without = [], []
    for (split, table, row), names in zip(rows, labels, strict=True):
        given = _text(row.get(file_column))
        file = files.find(given, table.parent)
        if file is None:
            missing.append(given)
            continue
        if not names and not many:
            without.append(given)
        column = named["split"][0] if named["split"] else None
        split = split or _split_of(source, column, row, file, root)
        entry = photos.setdefault(file, {"split": split, "labels": [], "group": _text(row.get(group_column or ""))})
        if entry["split"] != split:
            raise MisconfigurationException(f"{source} puts {given} in {entry['split']} and in {split}: keep one row.")
        entry["labels"] += [name for name in names if name not in entry["labels"]]
    if missing:
        raise MisconfigurationException(
            f"{source} names {len(missing)} of {len(rows)} photos that do not lie in {root} ({some(missing)}): its "
            f"column {file_column!r} should hold paths below the root, or file names."
        )
    if without:
        raise MisconfigurationException(f"{source} has {len(without)} photos without a label ({some(without)}).")
    double = [file.name for file, entry in photos.items() if len(entry["labels"]) > 1]
    if double and not many and multi_label is False:
        raise MisconfigurationException(f"{source} gives {len(double)} photos several classes ({some(double)}).")
    many = many or bool(double)
    return _found(source, root, photos, many, classes, files)


def _found(
    source: Path,
    root: Path,
    photos: dict[Path, dict[str, Any]],
    many: bool,
    classes: Sequence[str] | None,
    files: _Files,
) -> Found:
    wanted = set(classes or ())
    splits: dict[str, list[Photo]] = {}
    for file, entry in photos.items():
        names = tuple(name for name in entry["labels"] if not wanted or name in wanted)
        if names or (many and not wanted):
            name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix()
            splits.setdefault(entry["split"], []).append(Photo(file, name, names, entry["group"]))
    splits = {split: sorted(splits[split]) for split in ("train", "val", "test") if split in splits}
    in_train = {name for photo in splits.get("train", ()) for name in photo.labels}
    every = {name for each in splits.values() for photo in each for name in photo.labels}
    lacking = [name for name in classes or () if name not in every]
    if lacking or len(every) < 2 or not in_train:
        raise MisconfigurationException(
            f"{source} has the classes {some(_in_order(every)) or 'none'}"
            + (
                f", not {some(lacking)}."
                if lacking
                else f" on {len(splits.get('train', ()))} training photos: two or more are needed."
            )
        )
    remarks = [f"labels from {source.name}"]
    unseen = _in_order(every - in_train)
    if unseen and not many:
        raise MisconfigurationException(f"{source} has classes without a training photo: {some(unseen)}.")
    if unseen:
        remarks.append(f"without a training photo: {some(unseen)}")
    others = len(files) - len(photos)
    if others > 0:
        remarks.append(f"{others} photos are in no row")
    endings = Counter({ending: number for ending, number in files.left_out.items() if ending not in ENDINGS})
    if endings:
        remarks.append(f"left out: {', '.join(counted(endings))}")
    return Found(splits, list(classes or _in_order(every)), many, True, remarks)


def _columns(
    source: Path, there: list[str], given: Mapping[str, str | Sequence[str]], group_column: str | None
) -> tuple[dict[str, list[str]], list[str]]:
    """The columns of each role; and all that are named by the user or by custom, the rest being tried for labels."""
    unknown = sorted(given.keys() - COLUMNS.keys())
    if unknown:
        raise MisconfigurationException(f"columns has {some(unknown)}: give file, label or split.")
    normal = {re.sub(r"[ -]", "_", column.strip().casefold()): column for column in reversed(there)}
    named = {}
    for role, usual in COLUMNS.items():
        if role in given:
            value = given[role]
            named[role] = [value] if isinstance(value, str) else list(value)
        else:
            named[role] = [normal[name] for name in usual if name in normal][:1]
    wrong = [name for names in named.values() for name in names if name not in there]
    wrong += [group_column] if group_column and group_column not in there else []
    if wrong:
        raise MisconfigurationException(f"{source} has no column {some(wrong)}; it has {', '.join(there)}.")
    known = [name for names in named.values() for name in names]
    if not named["label"] and "label" not in given:
        taken = {*named["file"], *named["split"], group_column}
        named["label"] = [column for column in there if column not in taken]
    return named, known


def _labels(
    source: Path, columns: list[str], cells: list[list[str]], separator: str | None, many: bool | None
) -> tuple[list[list[str]], bool]:
    """The names in each row, and whether there may be several."""
    if len(columns) > 1 and _are_yes_no(cells):
        names = [[c for c, cell in zip(columns, row, strict=True) if _YES_NO[cell.casefold()]] for row in cells]
        return names, many if many is not None else any(len(row) != 1 for row in names)
    if len(columns) > 1:
        return [[plain(cell) for cell in row if cell] for row in cells], many is not False
    texts = [row[0] for row in cells]
    if separator is None and many is not False:
        separator = next((sign for sign in _SEPARATORS if any(sign in text for text in texts)), None)
        if separator is None:
            separator = next((sign for sign in ", " if _separates(sign, columns[0], texts, many)), None)
    if separator is not None:
        split = [[plain(name.strip()) for name in text.split(separator) if name.strip()] for text in texts]
        return split, many if many is not None else True
    return [[plain(name)] if name else [] for name in _class_names(source, columns[0], texts)], bool(many)


def _names_photos(cells: list[str], rules: Rules) -> bool:
    """Whether all cells are names of photos by their endings."""
    return all("://" not in cell and PurePosixPath(cell).suffix.lower() in rules.endings for cell in cells)


def _are_labels(cells: list[list[str]]) -> bool:
    """Whether columns of unknown names can be labels: zeros and ones, or one column of words that come again."""
    return _are_yes_no(cells) or (len(cells[0]) == 1 and 2 * len({row[0] for row in cells}) <= len(cells))


def _are_yes_no(cells: list[list[str]]) -> bool:
    return all(cell.casefold() in _YES_NO for row in cells for cell in row)


def _separates(sign: str, column: str, texts: list[str], many: bool | None) -> bool:
    """Whether `cat dog` is two labels: in a column named for several, or where each word stands alone elsewhere too."""
    split = [[word.strip() for word in text.split(sign)] for text in texts if sign in text]
    if not split:
        return False
    alone = {text for text in texts if sign not in text}
    return bool(many) or column.casefold() in _MANY or all(word in alone for words in split for word in words)


def _class_names(source: Path, column: str, texts: list[str]) -> list[str]:
    """Names, or whole numbers as text; numbers that are no classes are refused."""
    numbers = [_number(text) for text in texts if text]
    if not numbers or any(number is None for number in numbers):
        return texts
    if any(number != round(number) for number in numbers if number is not None):
        raise MisconfigurationException(
            f"{source}: column {column!r} holds fractions ({some(texts, 3)}), which are no classes. To predict numbers "
            "(regression), use a module and a data module of your own; the callbacks work with any."
        )
    if any(number < 0 for number in numbers if number is not None):
        raise MisconfigurationException(
            f"{source}: column {column!r} holds negative numbers, which are no classes: leave rows without a class out."
        )
    return [str(int(float(text))) if text else "" for text in texts]


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, Mapping):  # Hugging Face's image: {"bytes": ..., "path": ...}
        return _text(value.get("path"))
    if isinstance(value, list | tuple):
        return ";".join(_text(part) for part in value)
    return str(value).strip()


def _split_of(source: Path, column: str | None, row: Row, file: Path, root: Path) -> str:
    if column is None:
        folders = file.relative_to(root).parts[:-1] if file.is_relative_to(root) else ()
        return SPLIT_OF.get(folders[0].casefold(), "train") if folders else "train"
    given = _text(row.get(column)).casefold()
    if re.sub(r"[ -]", "_", column.casefold()) == "is_valid" and given in _YES_NO:
        return "val" if _YES_NO[given] else "train"
    if given and given not in SPLIT_OF:
        raise MisconfigurationException(
            f"{source}: column {column!r} holds {given!r}; give one of {', '.join(SPLIT_OF)}."
        )
    return SPLIT_OF.get(given, "train")


class _Files:
    """Finds the photo that a table means by a path, a file name, or a file name without its ending."""

    def __init__(self, root: Path, rules: Rules) -> None:
        self._rules = rules
        self._ways: dict[str, set[Path]] = defaultdict(set)
        listed, left_out = photos_below(root, rules)
        self._number, self.left_out = len(listed), left_out
        for file in listed:
            path = PurePosixPath(plain(file.relative_to(root).as_posix()))
            for way in (path.name, path.stem, path.as_posix(), path.with_suffix("").as_posix()):
                self._ways[way].add(file)
        self._exact = {plain(file.relative_to(root).as_posix()): file for file in listed}

    def find(self, given: str, beside: Path) -> Path | None:
        given = plain(given.replace("\\", "/").removeprefix("./"))
        if given in self._exact:
            return self._exact[given]
        if given and (beside / given).is_file() and (beside / given).suffix.lower() in self._rules.endings:
            return beside / given
        for way in (given, PurePosixPath(given).name):
            if len(self._ways.get(way, ())) == 1:
                return next(iter(self._ways[way]))
        return None

    def __len__(self) -> int:
        return self._number


def _in_order(names: Iterable[str]) -> list[str]:
    """Numbers by their value, names by name."""
    found = list(names)
    return sorted(found, key=int) if all(name.isdecimal() for name in found) else sorted(found)
