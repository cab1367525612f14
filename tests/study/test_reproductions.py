"""The papers' results that are small enough for a test; sizes and thresholds as in the docs."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import auto_cli

FOLDER = Path(__file__).parents[2] / "benchmarks" / "reproductions"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]


@pytest.fixture(autouse=True, scope="module")
def _scripts() -> Iterator[None]:
    """The scripts find one another as they do when one of them is run."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def run_script(name: str, out: Path, *arguments: str) -> Any:
    """What the script does when it is called with its smoke config."""
    config = str(FOLDER / f"{name}_digits.yaml")
    return auto_cli(
        script(name).reproduce, as_positional=False, args=["--config", config, "--out", str(out), *arguments]
    )


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    return script("lp_ft_theory")


@pytest.mark.parametrize("eps", [0.3, 1.0])
def test_lp_ft__distorts_good_features_less_than_fine_tuning(toy: ModuleType, eps: float) -> None:
    found = toy.medians(eps, seeds=10)
    assert found["LP-FT"].ood < found["LP"].ood < found["FT"].ood
    assert found["LP-FT"].moved < 0.6 * found["FT"].moved


def test_fine_tuning__beats_a_probe_of_bad_features(toy: ModuleType) -> None:
    found = toy.medians(2.0, seeds=10)
    assert found["FT"].ood < found["LP"].ood


def test_fine_tuning__is_never_worse_in_distribution(toy: ModuleType) -> None:
    for eps in (0.3, 1.0, 2.0):
        found = toy.medians(eps, seeds=5)
        assert max(found["FT"].id, found["LP-FT"].id) < 0.02 < found["LP"].id


def test_perfect_features__are_left_alone_by_a_fitted_head(toy: ModuleType) -> None:
    found = toy.toy(0.0, seed=0)
    assert found["LP"].ood == pytest.approx(0, abs=1e-12)
    assert found["LP-FT"].moved == 0


# --- the scripts, on digits: a smoke test, which says nothing about the science ---------------------------------------


def test_skip_to_unfreezing__runs_on_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_script("skip_to_unfreezing", tmp_path)
    rows = table(tmp_path / "arms.csv")
    assert [row["arm"] for row in rows] == ["full9", "skip34@flops"]
    runs = {arm: [r for r in result.records if r.arm == arm] for arm in ("full9", "skip34@flops")}
    difference = 100 * (np.mean([r.acc for r in runs["skip34@flops"]]) - np.mean([r.acc for r in runs["full9"]]))
    assert rows[1]["vs full9"].startswith(f"{difference:+.2f} [")
    assert {run.seed for run in result.records} == {1000, 1001}  # none of the pilot's
    # multiply-adds of an image of 8 px: forward, and forward and backward of all but the first block's images
    forward = 8 * 8 * 1 * 16 * 9 + 4 * 4 * 16 * 32 * 9 + 2 * 2 * 32 * 64 * 9 + 64 * 64 * 9 + 64 * 64 * 9 + 64 * 5
    whole = 3 * forward - 8 * 8 * 1 * 16 * 9
    # two stored epochs of the head are one pass, so is the augmented one; then one epoch of all against two
    expected = (2 * forward + whole) / (2 * whole)
    assert runs["full9"][0].flops / runs["skip34@flops"][0].flops == pytest.approx(expected, rel=0.02)
    printed = capsys.readouterr().out
    assert "it says nothing about the science" in printed and "Prediction under test" in printed
    assert (tmp_path / "arms.md").read_text().count("|") > 30


def test_yosinski__runs_on_digits_and_makes_no_row_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run_script("yosinski", tmp_path)
    assert [(row["split"], row["seed"]) for row in rows] == [("random 0", "1000"), ("random 1", "1000")]
    assert set(rows[0]) == {"split", "seed", "baseB", "AnB 5", "AnB+ 5", "BnB 5", "BnB+ 5", "RnB 5"}
    assert "it says nothing about the science" in capsys.readouterr().out
    (mean,) = [row for row in table(tmp_path / "means.csv") if row["treatment"] == "AnB"]
    expected = np.mean([float(row["AnB 5"]) for row in rows])
    assert mean["n=5"].startswith(f"{expected:+.1f} ±")
    monkeypatch.setattr(script("yosinski"), "transfer", lambda *_: pytest.fail("a row is made twice"))
    assert run_script("yosinski", tmp_path) == rows


def test_lp_ft__runs_on_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = run_script("lp_ft", tmp_path)
    assert "it says nothing about the science" in capsys.readouterr().out
    rows = {row["arm"]: row for row in table(tmp_path / "arms.csv")}
    assert list(rows)[2:] == [
        "LP",
        *(f"{name} 0.1 BN {policy}" for policy in ("train", "frozen") for name in ("FT", "LP-FT")),
    ]
    assert float(rows["LP"]["displacement"]) == 0 < float(rows["FT 0.1 BN train"]["displacement"])
    by_arm = {(record.arm, record.seed): record for record in records}
    differences = [
        100 * (by_arm["LP-FT 0.1 BN frozen", s].acc_ood - by_arm["FT 0.1 BN frozen", s].acc_ood) for s in (1000, 1001)
    ]
    (row,) = [row for row in table(tmp_path / "differences.csv") if row["BN"] == "frozen"]
    assert row["OOD: LP-FT minus FT"].startswith(f"{np.mean(differences):+.2f} [")


def test_frozen_blocks__stay_and_their_statistics_too() -> None:
    cifar = script("cifar")
    data = cifar.load("digits")
    images = data.of_classes("train", [0, 1], 10)
    module = cifar.TinyCNN(2, 1, data.augment)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    cifar.train(module, images, epochs=1, seed=0, batch_size=10, frozen=2)
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("blocks.0", "blocks.1")) for name in moved)
    assert {"blocks.2.0.weight", "blocks.2.1.running_mean", "head.weight"} <= moved


def test_donor_blocks__go_in_and_the_rest_is_the_seeds_own(monkeypatch: pytest.MonkeyPatch) -> None:
    yosinski, started = script("yosinski"), []
    data = script("cifar").load("digits")

    def train(module: Any, images: Any, epochs: int, *_: Any, frozen: int = 0) -> None:
        started.append((len(images), frozen, {k: v.clone() for k, v in module.state_dict().items()}))
        with torch.no_grad():  # another network for A than for B
            for parameter in module.parameters():
                parameter.add_(len(images))

    monkeypatch.setattr(yosinski, "train", train)
    monkeypatch.setattr(yosinski, "accuracy", lambda *_: 50.0)
    classes = ([0, 1, 2], [3, 4])
    names = [n for n, _ in yosinski.transfer(data, classes, 0, [2], yosinski.TREATMENTS, (1, 1), (10, 20))]
    assert names == ["baseB", "AnB 2", "AnB+ 2", "BnB 2", "BnB+ 2", "RnB 2"]
    (_, _, fresh), (_, _, of_a), *networks = started
    assert [frozen for _, frozen, _ in networks] == [2, 0, 2, 0, 2]
    key = "blocks.1.0.weight"
    donors = {"A": of_a[key] + 30, "B": fresh[key] + 40, "R": fresh[key]}  # `train` added the number of images
    for name, (_, _, state) in zip(names[1:], networks, strict=True):
        assert torch.equal(state[key], donors[name[0]])
        for rest in ("blocks.2.0.weight", "head.weight"):
            assert torch.equal(state[rest], fresh[rest])
    assert of_a["head.weight"].shape == (3, 64)


# --- the data --------------------------------------------------------------------------------------------------------


def test_target__has_other_classes_than_the_source_and_no_image_twice() -> None:
    cifar = script("cifar")
    source, target = cifar.halves()
    assert sorted(source + target) == list(range(10))
    data = cifar.load("digits")
    module = cifar.TargetData(data, val_per_class=5, test_per_class=None, batch_size=8)
    parts = [module.train_dataloader().dataset, module.val_dataloader().dataset, module.test_dataloader().dataset]
    assert len(parts[1]) == 25 and np.bincount(parts[1].labels).tolist() == [5] * 5
    seen = [{image.numpy().tobytes() for image in part.images} for part in parts]
    assert not seen[1] & (seen[0] | seen[2]) and sum(map(len, parts[:2])) == np.isin(data.labels["train"], target).sum()
    for part in parts:
        assert set(part.labels) == {0, 1, 2, 3, 4}


def test_images__are_normalised_by_the_training_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"x_{part}": rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "x.npz", **arrays, y_train=np.arange(40) % 10, y_test=np.arange(40) % 10)
    data = script("cifar").load(str(tmp_path / "x.npz"))
    assert data.images["train"].mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert data.images["train"].std((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    pixel = (arrays["x_test"][3, 5, 7, 2] - arrays["x_train"][..., 2].mean()) / arrays["x_train"][..., 2].std()
    assert data.images["test"][3, 2, 5, 7].item() == pytest.approx(pixel, abs=1e-5)


def test_augment__crops_of_the_padded_image_half_of_them_mirrored(tmp_path: Path) -> None:
    cifar = script("cifar")
    image = torch.arange(1.0, 17.0).reshape(1, 4, 4)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    crops = {padded[..., i : i + 4, j : j + 4].numpy().tobytes() for i in range(5) for j in range(5)}
    mirrored = {padded[..., i : i + 4, j : j + 4].flip(-1).numpy().tobytes() for i in range(5) for j in range(5)}
    torch.manual_seed(0)
    for flip in (True, False):
        data = cifar.Data({}, {}, flip)
        drawn = [data.augment(image).numpy().tobytes() for _ in range(1500)]
        assert crops <= set(drawn) <= crops | mirrored
        assert sum(each in mirrored - crops for each in drawn) / 1500 == pytest.approx(0.5 * flip, abs=0.05)


# --- the papers' findings, with smaller sources and targets than the pilot study's ------------------------------------


@pytest.fixture
def cifar10(shared_data: Path) -> str:
    """Images of 16 px; absent on most machines."""
    path = shared_data / "cifar10_16px.npz"
    if not path.exists():
        pytest.skip(f"CIFAR-10 at 16 px is not at {path}")
    return str(path)


@pytest.mark.slow
def test_yosinski__the_top_block_is_specific_and_tuning_it_pays(cifar10: str, tmp_path: Path) -> None:
    (row,) = script("yosinski").reproduce(
        data=cifar10,
        out=tmp_path,
        splits=["random 0"],
        seed_base=0,
        depths=[5],
        treatments=["AnB", "AnB+", "RnB"],
        epochs=(6, 20),
        per_class=(1500, 250),
    )
    # seeds 0 and 1 of this size gave 66 and 68, -9.4 and -9.0, +2.6 and +1.2, -18.5 and -20.2
    assert 60 < float(row["baseB"]) < 74
    assert float(row["AnB 5"]) <= -5
    assert float(row["AnB+ 5"]) >= 0.5
    assert float(row["RnB 5"]) <= -12


@pytest.mark.slow
def test_lp_ft__fine_tuning_distorts_and_a_warm_head_helps_at_a_cautious_rate(cifar10: str, tmp_path: Path) -> None:
    script("lp_ft").reproduce(
        data=cifar10,
        out=tmp_path,
        seeds=2,
        first_seed=0,
        lrs=(0.01, 0.1),
        batch_norm=("train",),
        test_per_class=200,
        source_epochs=6,
        source_per_class=1500,
        recipe=script("lp_ft").Recipe(cached_epochs=1, augmented_epochs=1, num_cycles=1),
    )
    found = {
        row["arm"]: {name: float(row[name]) for name in ("ID", "OOD", "displacement")}
        for row in table(tmp_path / "arms.csv")
    }
    lp, cautious, warm, bold = (
        found[arm] for arm in ("LP", *(f"{name} BN train" for name in ("FT 0.01", "LP-FT 0.01", "FT 0.1")))
    )
    # this size gave 53.4 / 49.0 for LP, 61.3 / 46.2 for FT at 0.1, and 56.0 / 47.4 against 60.2 / 48.4 at 0.01
    # out of distribution the loss is clear at the cautious rate alone: -3.0 [-4.9, -1.2] at full size
    assert lp["OOD"] - cautious["OOD"] >= 0.5
    assert bold["ID"] - lp["ID"] >= 4
    assert warm["ID"] - cautious["ID"] >= 2
    assert 0 == lp["displacement"] < warm["displacement"] < cautious["displacement"] < bold["displacement"]
