"""A stage's length is arithmetic done by hand here; every refusal says the numbers that were passed."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from lightning_unfreeze.stages.cycles import MAX_STAGE_EPOCHS, as_fraction, cycles_sum
from lightning_unfreeze.stages.plan import Stage, check_plan, plan_epochs

SOLVED: dict[str, Any] = {"train": "head", "precompute": True, "solve": True, "epochs": None}


@pytest.mark.parametrize(
    ("options", "cycles", "epochs"),
    [
        ({"epochs": 5}, [], 5),
        ({"cycle_len": 1}, [1], 1),
        ({"cycle_len": 1, "num_cycles": 3}, [1, 1, 1], 3),
        ({"cycle_len": 1, "cycle_mult": 2, "num_cycles": 3}, [1, 2, 4], 7),
        ({"cycle_len": 2, "cycle_mult": 3, "num_cycles": 4}, [2, 6, 18, 54], 80),
        ({"cycle_len": 4, "cycle_mult": 0.5, "num_cycles": 3}, [4, 2, 1], 7),
        ({"cycle_len": 4, "cycle_mult": 0.5, "num_cycles": 4}, [4, 2, 1, Fraction(1, 2)], 8),
        ({"cycle_len": 0.5, "num_cycles": 4}, [Fraction(1, 2)] * 4, 2),
        ({"cycle_len": 0.1, "num_cycles": 10}, [Fraction(1, 10)] * 10, 1),
        ({"cycle_len": 1 / 3, "num_cycles": 9}, [Fraction(1, 3)] * 9, 3),
        ({"cycle_len": 1, "cycle_mult": 1.5, "num_cycles": 3}, [1, Fraction(3, 2), Fraction(9, 4)], 5),
        ({"cycle_len": 1, "cycle_mult": 2, "num_cycles": 3, "epochs": 7}, [1, 2, 4], 7),
        ({"cycle_len": 1.5, "epochs": 2}, [Fraction(3, 2)], 2),
        ({"cycle_len": 1, "cycle_mult": 2, "num_cycles": 5, "until": "overfit"}, [1, 2, 4, 8, 16], 31),
        # the most there can be
        ({"epochs": 20, "until": "plateau"}, [], 20),
        ({"epochs": 3, "until": "plateau", "patience_epochs": 2}, [], 3),
        ({"cycle_len": 1.5, "num_cycles": 3, "until": "plateau"}, [Fraction(3, 2)] * 3, 5),
        # scored, saved and reported as after any epoch
        ({"train": "head", "precompute": True, "solve": True}, [], 1),
    ],
)
def test_stage__cycles_and_epochs_are_those_counted_by_hand(options: Any, cycles: list[Any], epochs: int) -> None:
    stage = Stage("s", **options)
    assert stage.cycle_epochs == cycles
    assert stage.num_epochs == epochs
    if cycles:
        lengths = cycles_sum(options["cycle_len"], options.get("cycle_mult", 1), options.get("num_cycles", 1))
        assert lengths == sum(cycles)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"name": ""}, ["name=''"]),
        ({"name": "  "}, ["name='  '"]),
        ({"name": "a/b"}, ["name='a/b'"]),
        ({"name": 3}, ["name=3"]),
        ({"train": "backbone"}, ["'backbone'", "['backbone']"]),
        ({"train": 0}, ["train=0", "at least 1"]),
        ({"train": -2}, ["train=-2", "train=2"]),
        ({"train": True}, ["train=True"]),
        ({"train": 1.5}, ["train=1.5"]),
        ({"train": None}, ["train=None"]),
        ({"train": []}, ["train=[]"]),
        ({"train": ["stem", 1]}, ["['stem', 1]"]),
        ({"precompute": True}, ["precompute=True", "train='all'"]),
        ({"train": "head", "precompute": "no"}, ["precompute='no'", "True or False"]),
        ({"lr": 0}, ["lr=0", "above 0"]),
        ({"lr": -1e-3}, ["lr=-0.001"]),
        ({"lr": math.nan}, ["lr=nan"]),
        ({"lr": math.inf}, ["lr=inf"]),
        ({"lr": "fnd"}, ["'fnd'", "'find'"]),
        ({"lr": [0.1]}, ["lr=[0.1]"]),
        ({"lr": [1e-5, 1e-4, 1e-3]}, ["lr=0.001", "lr_span=1e-05 / 0.001"]),
        ({"lr": slice(1e-5, 1e-3)}, ["lr=0.001", "lr_span=1e-05 / 0.001"]),
        ({"lr": slice(1e-3)}, ["lr=LAST", "lr_span=FIRST / LAST"]),
        ({"lr": []}, ["lr=[]"]),
        ({"lr": np.float32(0.5)}, ["one Python number", f"lr=float({np.float32(0.5)!r})"]),
        ({"lr": torch.tensor(0.5)}, ["one Python number", "lr=float(tensor(0.5000))"]),
        ({"lr": np.array([0.1, 0.5])}, ["one Python number"]),
        ({"lr": True}, ["lr=True"]),
        ({"lr_mult": True}, ["lr_mult=True"]),
        ({"lr_mult": 0}, ["lr_mult=0", "(0, 1]"]),
        ({"lr_mult": 1.5}, ["lr_mult=1.5", "(0, 1]"]),
        ({"lr_mult": -0.5}, ["lr_mult=-0.5"]),
        ({"lr_mult": 100}, ["lr_mult=100", "lr_span=1 / 100"]),
        ({"lr_mult": math.nan}, ["lr_mult=nan"]),
        ({"lr_mult": []}, ["lr_mult=[]"]),
        ({"lr_mult": [0.1, 2]}, ["[0.1, 2]"]),
        ({"lr_mult": "1/3"}, ["lr_mult='1/3'"]),
        ({"lr_span": 0}, ["lr_span=0", "(0, 1]"]),
        ({"lr_span": 9}, ["lr_span=9", "(0, 1]"]),
        ({"lr_span": math.nan}, ["lr_span=nan"]),
        ({"lr_span": True}, ["lr_span=True"]),
        ({"lr_span": [0.1, 1]}, ["lr_span=[0.1, 1]"]),
        ({"lr_span": 1 / 9, "lr_mult": 1 / 3}, ["lr_span=0.1", "lr_mult=0.3", "one"]),
        ({"lr_span": 1, "lr_mult": [0.1, 1]}, ["lr_span=1", "lr_mult=[0.1, 1]"]),
        ({"until": "plateu", "epochs": 9}, ["until='plateu'", "'plateau'"]),
        ({"until": "plateau", "epochs": 3}, ["patience_epochs=3", "at most 3 epochs"]),
        ({"until": "plateau", "epochs": 9, "patience_epochs": 0}, ["patience_epochs=0"]),
        ({"until": "plateau", "epochs": 9, "patience_epochs": 1.5}, ["patience_epochs=1.5"]),
        ({"until": "plateau", "epochs": None}, ["no length"]),
        ({"patience_epochs": 2}, ["patience_epochs=2", "until='plateau'"]),
        ({"cycle_len": 1, "epochs": 2, "num_cycles": 2, "until": "overfit", "patience_epochs": 2}, ["until='plateau'"]),
        ({"image_size_px": 0}, ["image_size_px=0"]),
        ({"image_size_px": 96.0}, ["image_size_px=96.0"]),
        ({"image_size_px": True}, ["image_size_px=True"]),
        ({**SOLVED, "train": "all"}, ["precompute=True", "train='all'"]),
        ({**SOLVED, "train": 1}, ["solve=True", "train=1"]),
        ({**SOLVED, "precompute": False}, ["solve=True", "precompute=False"]),
        ({**SOLVED, "epochs": 5}, ["solve=True", "epochs=5", "leave it out"]),
        ({**SOLVED, "cycle_len": 1}, ["solve=True", "cycle_len=1"]),
        ({**SOLVED, "lr": "find"}, ["solve=True", "lr='find'"]),
        ({**SOLVED, "lr_mult": 0.5}, ["solve=True", "lr_mult=0.5"]),
        ({**SOLVED, "lr_span": 0.5}, ["solve=True", "lr_span=0.5"]),
        ({**SOLVED, "until": "plateau"}, ["solve=True", "until='plateau'"]),
        ({"lr_mult": ["a"]}, ["['a']"]),
        ({"epochs": 0}, ["epochs=0"]),
        ({"epochs": -1}, ["epochs=-1"]),
        ({"epochs": 1.5}, ["epochs=1.5", "whole"]),
        ({"epochs": True}, ["epochs=True"]),
        ({"epochs": "2"}, ["epochs='2'"]),
        ({"epochs": None}, ["no length", "epochs=", "cycle_len="]),
        ({"num_cycles": 3}, ["num_cycles=3", "cycle_len"]),
        ({"cycle_mult": 2}, ["cycle_mult=2", "cycle_len"]),
        ({"until": "overfit"}, ["until='overfit'", "cycle_len"]),
        ({"epochs": None, "cycle_len": 0}, ["cycle_len=0"]),
        ({"epochs": None, "cycle_len": -1}, ["cycle_len=-1"]),
        ({"epochs": None, "cycle_len": math.inf}, ["cycle_len=inf"]),
        ({"epochs": None, "cycle_len": "1"}, ["cycle_len='1'"]),
        ({"epochs": None, "cycle_len": 1, "num_cycles": 0}, ["num_cycles=0"]),
        ({"epochs": None, "cycle_len": 1, "num_cycles": 2.0}, ["num_cycles=2.0"]),
        ({"epochs": None, "cycle_len": 1, "cycle_mult": 0}, ["cycle_mult=0"]),
        ({"epochs": None, "cycle_len": 1, "cycle_mult": math.nan}, ["cycle_mult=nan"]),
        ({"epochs": None, "cycle_len": 1, "cycle_mult": "2"}, ["cycle_mult='2'"]),
        # 1 + 2 + 4 = 7 epochs
        ({"epochs": 6, "cycle_len": 1, "cycle_mult": 2, "num_cycles": 3}, ["epochs=6", "3 cycles", "last 7 epochs"]),
        ({"epochs": 1, "cycle_len": 0.4}, []),  # rounds up to 1: not refused
        ({"epochs": 1, "cycle_len": 0.4, "num_cycles": 3}, ["epochs=1", "1.2 epochs"]),
        # 2^0 + ... + 2^16 = 131071 epochs
        ({"epochs": None, "cycle_len": 1, "cycle_mult": 2, "num_cycles": 17}, ["17 cycles", str(MAX_STAGE_EPOCHS)]),
        ({"epochs": None, "cycle_len": 1, "cycle_mult": 10, "num_cycles": 10**5}, ["100000 cycles"]),
        ({"epochs": None, "cycle_len": 1, "num_cycles": 10**9}, ["num_cycles=1000000000"]),
        ({"epochs": None, "cycle_len": 1, "until": "overfit"}, ["num_cycles of at least 2"]),
        ({"epochs": None, "cycle_len": 0.5, "num_cycles": 2, "until": "overfit"}, ["whole epochs", "cycle_len=0.5"]),
    ],
)
def test_stage__refuses_the_impossible_with_its_numbers(options: dict[str, Any], parts: list[str]) -> None:
    arguments = {"name": "warm up", "epochs": 1, **options}
    if not parts:
        assert Stage(**arguments).num_epochs == 1
        return
    with pytest.raises(ValueError) as error:
        Stage(**arguments)
    for part in parts + ([] if "name" in options else ["stage 'warm up'"]):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_stage__accepts_the_ends_of_its_ranges() -> None:
    assert Stage("s", lr_mult=1, lr=1e-30, epochs=1, train=1).lr_mult == 1
    assert Stage("s", epochs=1, lr_mult=[1e-9, 1.0], train=["stem", "layer*"], precompute=True).precompute
    # 2^0 + ... + 2^15 = 65535 epochs, still below the limit
    assert Stage("s", cycle_len=1, cycle_mult=2, num_cycles=16).num_epochs == 65535
    assert Stage("s", cycle_len=MAX_STAGE_EPOCHS).num_epochs == MAX_STAGE_EPOCHS


def test_stage__options_added_later_come_after_the_first_ten() -> None:
    """Written by position, as 0.1 allowed: name, train, epochs, lr, lr_mult, precompute, cycles (3), until."""
    stage = Stage("s", 2, None, 0.1, 0.5, True, 1, 2, 3, "overfit")
    assert stage == Stage(
        "s", train=2, lr=0.1, lr_mult=0.5, precompute=True, cycle_len=1, cycle_mult=2, num_cycles=3, until="overfit"
    )


def test_stage__with_new_options_names_what_serves_them() -> None:
    assert {"precompute=True"} <= set(Stage("s", **SOLVED).needs)
    assert Stage("s", epochs=9, until="plateau").needs == {"until='plateau'": "CosineRestarts"}


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 3, "lr_span": 0.1111},
        {"train": "head", "precompute": True, "solve": True},
        {"epochs": 9, "until": "plateau", "patience_epochs": 2},
        {"cycle_len": 1, "num_cycles": 9, "until": "plateau"},
        {"epochs": 3, "image_size_px": 96},
        {"epochs": 3, "train": "adapters"},
    ],
    ids=str,
)
def test_stage__is_read_from_yaml(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"stages": [{"name": "s", **options}]}))
    parser = ArgumentParser()
    parser.add_argument("--stages", type=list[Stage])
    parser.add_argument("--config", action="config")
    (stage,) = parser.instantiate_classes(parser.parse_args(["--config", str(path)])).stages
    assert stage == Stage("s", **options)


def test_stage__is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Stage("s", epochs=1).epochs = 2  # type: ignore[misc]


def test_stage__names_the_callbacks_it_needs() -> None:
    assert Stage("s", epochs=1).needs == {}
    stage = Stage("s", train="head", precompute=True, lr="find", cycle_len=2)
    assert stage.needs == {
        "precompute=True": "PrecomputeFeatures",
        "lr='find'": "LRFinderPerStage",
        "cycle_len=2": "CosineRestarts",
    }


@pytest.mark.parametrize(
    ("stages", "part"),
    [
        ([], "[]"),
        (Stage("alone", epochs=1), "alone"),
        ([Stage("a", epochs=1), {"name": "b"}], "{'name': 'b'}"),
        ([Stage("a", epochs=1), Stage("b", epochs=1), Stage("a", epochs=2)], "['a', 'b', 'a']"),
    ],
)
def test_plan__refuses_what_is_no_plan(stages: Any, part: str) -> None:
    with pytest.raises(ValueError) as error:
        check_plan(stages)
    assert part in str(error.value)


def test_plan__lasts_the_sum_of_its_stages() -> None:
    stages = [Stage("a", epochs=2), Stage("b", cycle_len=0.5, num_cycles=3), Stage("c", cycle_len=1, num_cycles=4)]
    check_plan(stages)
    assert plan_epochs(stages) == 2 + 2 + 4


@given(st.integers(1, 999), st.integers(1, 999), st.sampled_from([1, 2, 3, 0.5, 1.5, 0.1]), st.integers(1, 5))
def test_cycles_sum__equals_adding_up(numerator: int, denominator: int, mult: float, num_cycles: int) -> None:
    exact, total, factor = Fraction(numerator, denominator), Fraction(0), Fraction(str(mult))
    assert as_fraction(numerator / denominator) == exact
    for index in range(num_cycles):
        total += exact * factor**index
    assert cycles_sum(numerator / denominator, mult, num_cycles) == total


def test_as_fraction__keeps_what_is_no_simple_fraction() -> None:
    assert as_fraction(math.pi) == Fraction(math.pi)
    assert as_fraction(2) == 2
