"""The papers' results that are small enough for a test; sizes and thresholds as in the docs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "reproductions"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reproduction_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_yosinski__runs_on_digits(capsys: pytest.CaptureFixture[str]) -> None:
    """A smoke test: on digits with two epochs it says nothing about the science."""
    yosinski = script("yosinski")
    rows = yosinski.main(["--data", "digits", "--epochs", "1", "2", "--depths", "5", "--per_class", "60", "20"])
    assert [row["split"] for row in rows] == ["random 0", "random 1"]
    assert set(rows[0]) == {"split", "seed", "baseB", "AnB 5", "AnB+ 5", "BnB 5", "BnB+ 5", "RnB 5"}


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_yosinski__frozen_blocks_stay_and_the_donors_go_in() -> None:
    import torch

    yosinski = script("yosinski")
    data = yosinski.load("digits")
    images = yosinski.of_classes(data, "train", [0, 1], 10)
    module = yosinski.TinyCNN(2, 1, flip=False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    yosinski.train(module, images, epochs=1, frozen=2, seed=0, batch_size=10)
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("blocks.0", "blocks.1")) for name in moved)
    assert {"blocks.2.0.weight", "head.weight"} <= moved
