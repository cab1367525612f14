"""The numbers of the report, against scikit-learn and arithmetic."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    log_loss,
    precision_recall_curve,
    precision_recall_fscore_support,
)

from lightning_unfreeze.reporting.explain import worst_rows, write_report
from lightning_unfreeze.reporting.judged import Judged, best_threshold, expected_calibration_error, wilson
from lightning_unfreeze.reporting.model_card import model_card

CLASSES = ["ant", "bee, the", "c<at", "dog"]


def judged(several: bool = False, num: int = 60) -> Judged:
    rng = np.random.default_rng(0)
    names = [f"photos/{i}, <b>.jpg" for i in range(num)]
    if several:
        target = rng.integers(0, 2, (num, 4))
        probs = np.clip(target * 0.3 + rng.random((num, 4)) * 0.7, 0.01, 0.99)
        return Judged(names, CLASSES, target, probs, threshold=0.6)
    target = rng.integers(0, 3, num)  # no dog at all
    scores = rng.random((num, 4)) + 0.5 * np.eye(4)[target]
    probs = scores / scores.sum(1, keepdims=True)
    return Judged(names, CLASSES, target, probs, probs_tta=np.roll(probs, 1, axis=0))


def test_judged__one_class_numbers_are_scikit_learns() -> None:
    found = judged()
    guess = found.probs.argmax(1)
    assert np.array_equal(found.confusion(), confusion_matrix(found.target, guess, labels=range(4)))
    assert found.right.mean() == accuracy_score(found.target, guess)
    assert found.losses.mean() == pytest.approx(log_loss(found.target, found.probs, labels=range(4)))
    precision, recall, f1, support = precision_recall_fscore_support(
        found.target, guess, labels=range(4), zero_division=np.nan
    )
    rows = found.class_rows()
    assert [row["images"] for row in rows] == support.tolist()
    for name, expected in (("precision", precision), ("accuracy", recall)):
        assert [row[name] for row in rows] == pytest.approx(expected.tolist(), nan_ok=True)
    assert [row["f1"] for row in rows[:3]] == pytest.approx(f1[:3].tolist())
    wrong = [guess[i] for i in range(60) if found.target[i] == 0 and guess[i] != 0]
    most = max(set(wrong), key=lambda other: (wrong.count(other), -other))
    assert rows[0]["taken_for"] == f"{CLASSES[most]} ({wrong.count(most)})"


def test_judged__several_labels_are_scikit_learns() -> None:
    found = judged(several=True)
    guess = (found.probs >= 0.6).astype(int)
    precision, recall, f1, support = precision_recall_fscore_support(found.target, guess)
    rows = found.class_rows()
    for name, expected in (("precision", precision), ("accuracy", recall), ("f1", f1), ("images", support)):
        assert [row[name] for row in rows] == pytest.approx(expected.tolist())
    assert found.right.mean() == accuracy_score(found.target, guess)
    by_label = [log_loss(found.target[:, k], found.probs[:, k]) for k in range(4)]
    assert found.losses.mean() == pytest.approx(np.mean(by_label))
    for column, row in enumerate(rows):
        points = precision_recall_curve(found.target[:, column], found.probs[:, column])
        best = np.max(2 * points[0] * points[1] / np.maximum(points[0] + points[1], 1e-12))
        assert row["best_f1"] == pytest.approx(best)


def test_report__of_several_labels_calls_recall_by_its_name_and_lists_the_files_that_there_are(tmp_path: Path) -> None:
    found = judged(several=True)
    page = write_report(found, {0: Image.new("RGB", (9, 9))}, tmp_path, "title").read_text()
    card = model_card({}, found, "val", "x.ckpt")
    assert "<th>recall<" in page and "<th>accuracy<" not in page
    assert "| recall |" in card and f"{int(found.right.sum())} of 60 images with all labels right" in card
    assert set(re.findall(r"(\w+\.csv)", page)) == {path.name for path in tmp_path.glob("*.csv")}
    single = write_report(judged(), {}, tmp_path / "single", "title")
    assert "<th>accuracy<" in single.read_text() and "| accuracy |" in model_card({}, judged(), "val", "x.ckpt")
    assert set(re.findall(r"(\w+\.csv)", single.read_text())) == {path.name for path in single.parent.glob("*.csv")}


def test_best_threshold__does_not_part_equal_scores() -> None:
    assert best_threshold(np.array([0.9, 0.5, 0.5, 0.1]), np.array([True, True, False, False])) == (0.5, 0.8)


def test_wilson__is_the_published_interval() -> None:
    # Newcombe 1998, table I: 81 of 263, and 0 of 20, 1 of 29
    for successes, trials, low, high in ((81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_calibration__error_is_that_of_arithmetic() -> None:
    probs = np.array([[0.95, 0.05], [0.92, 0.08], [0.35, 0.65], [0.32, 0.68]])
    found = Judged(list("abcd"), ["x", "y"], np.array([0, 1, 1, 1]), probs)
    # .9 to 1: confidence .935, one of two right; .6 to .7: confidence .665, both right
    assert expected_calibration_error(found.calibration()) == pytest.approx((2 * 0.435 + 2 * 0.335) / 4)


def test_tta_changes__count_what_flipped() -> None:
    one, other = np.eye(2)[[0, 0, 1, 1]], np.eye(2)[[0, 1, 0, 1]]
    found = Judged(list("abcd"), ["x", "y"], np.array([0, 1, 1, 0]), one, other)
    assert found.tta_changes() == {"without": 2, "with": 2, "fixed": 1, "broken": 1}


@pytest.mark.pictures
@pytest.mark.parametrize("several", [False, True])
def test_report__is_one_page_with_nothing_from_outside(several: bool, tmp_path: Path) -> None:
    found = judged(several)
    rows = worst_rows(found, 5)
    assert rows == sorted(range(60), key=lambda row: -found.losses[row])[:5]
    pictures = {row: Image.new("RGB", (20, 10), (row, 0, 0)) for row in rows}
    page = write_report(found, pictures, tmp_path / "explain", "A <title>").read_text()
    assert not re.search(r"(src|href)=(?!'data:)", page) and "http" not in page
    assert page.count("data:image/jpeg;base64,") == 5
    assert "A &lt;title&gt;" in page and "c&lt;at" in page and "<b>.jpg" not in page
    right = int(found.right.sum())
    assert f"{right} of 60 images" in page
    files = {file.name for file in (tmp_path / "explain").iterdir()}
    both = {"index.html", "per_class.csv", "samples.csv", "calibration.csv", "calibration.png", "worst.png"}
    assert files == both | (set() if several else {"confusion.csv", "confusion.png"})
    with (tmp_path / "explain" / "samples.csv").open(newline="") as file:
        samples = list(csv.DictReader(file))
    assert [row["file"] for row in samples[:5]] == [found.names[row] for row in rows]
    assert sum(row["right"] == "True" for row in samples) == right


def test_model_card__says_plan_versions_scores_and_limits() -> None:
    checkpoint = {
        "epoch": 3,
        "global_step": 12,
        "hyper_parameters": {"backbone": "resnet18", "data_config": {"input_size": (3, 64, 64)}},
        "versions": {"torch": "2.6.0"},
        "callbacks": {"GradualUnfreeze": {"plan": [{"name": "head", "train": "head", "lr": 0.01}]}},
    }
    card = model_card(checkpoint, judged(), "test", "last.ckpt")
    for part in ("# resnet18, 4 classes", "(3, 64, 64)", "| head | head | 0.01 |", "| torch | 2.6.0 |", "## Limits"):
        assert part in card
    assert "Fewer than 30 test images have" in card
    weights_alone = {"stages": checkpoint["callbacks"]["GradualUnfreeze"]["plan"]}  # type: ignore[index]
    assert "| head | head | 0.01 |" in model_card(weights_alone, judged(), "test", "best.ckpt")
    assert "Without stages." in model_card({"stages": []}, judged(), "test", "best.ckpt")
    assert "Without stages." in model_card({"callbacks": {}}, judged(), "test", "epoch.ckpt")
    assert "Not known: the file holds weights alone." in model_card({}, judged(), "test", "other.ckpt")
