"""The arms as data: what each one trains, for how long, at which ratios, and how budgets are matched."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_unfreeze.layers.freezing import select
from lightning_unfreeze.recipe import fine_tune
from lightning_unfreeze.stages.plan import Stage, check_plan
from lightning_unfreeze.study.design.arms import (
    ALL,
    CORE,
    Arm,
    Recipe,
    arm_names,
    cycle_stages,
    make_arms,
    matched_epochs,
)

GROUPS = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
FORWARD = {"head": 1.0, "all": 2.94}  # FLOPs of an epoch over one forward pass, of a ResNet-18


def flops(stages: Sequence[Stage]) -> float:
    """Forward passes that stages cost: a stored stage is one, however long it is."""
    return sum(
        1.0 if s.precompute else s.num_epochs * FORWARD[s.train if s.train in ("head", "all") else "all"]  # type: ignore[index]
        for s in stages
    )


def arms(*names: str, recipe: Recipe | None = None, groups: list[str] = GROUPS) -> list[Arm]:
    return make_arms(names, recipe or Recipe(), groups, flops)


# what trains and for how many epochs: C stored head, S solved head, F head, U everything, or the groups by name
PROGRAMS = {
    "full9": "C2 F1+1+1 U1+2+4",
    "skip3": "F1+1+1 U1+2+4",
    "skip4": "C2 U1+2+4",
    "skip34@epochs": "U1+2+4",
    "skip34@images": "U1+2+4 U5",
    "skip34@flops": "U1+2 U5",  # 1 + 3 + 7 x 2.94 = 24.6 forward passes are 8.4 unfrozen epochs
    "uniform": "C2 F1+1+1 U1+2+4",
    "skip34+uniform@flops": "U1+2 U5",
    "layer_decay@flops": "U8",
    "gradual": "1:1 2:1 3:1 4:1 5:1 U1+2+4",
    "no_lr_find": "C2 F1+1+1 U1+2+4",
    "lp_only": "C2 F1+1+1+1+1+1+1+1+1+1",
    "lp_ft": "C30 U1+2+4",
    "solved_ft": "S1 U1+2+4",
    "surgical_first": "C5 stem:1+2+4",
    "surgical_middle": "C5 layer2:1+2+4",
    "surgical_last": "C5 layer4:1+2+4",
    "scratch@images": "U1+2+4 U5",
    "scratch@5x": "U1+2+4+8+16 U29",
    "no_aug": "C2 F1+1+1 U1+2+4",
    "full9+other_bn": "C2 F1+1+1 U1+2+4",
    "skip34@flops+other_bn": "U1+2 U5",
}


def program(arm: Arm) -> str:
    words = []
    for stage in arm.stages:
        known = {"head": "S" if stage.solve else "C" if stage.precompute else "F", "all": "U"}
        letter = known.get(stage.train) if isinstance(stage.train, str) else None  # type: ignore[arg-type]
        letter = letter or f"{stage.train if isinstance(stage.train, int) else '+'.join(stage.train)}:"
        lengths = [str(int(length)) for length in stage.cycle_epochs] or [str(stage.num_epochs)]
        words.append(letter + "+".join(lengths))
    return " ".join(words)


@pytest.mark.parametrize("name", ALL)
def test_arm__trains_what_its_row_says(name: str) -> None:
    (arm,) = arms(name)
    assert program(arm) == PROGRAMS[name]
    check_plan(list(arm.stages))
    for stage in arm.stages:
        assert select(GROUPS, stage.train)


def test_arms__differ_from_the_reference_in_one_thing() -> None:
    found = {arm.name: arm for arm in arms(*ALL)}
    full = found["full9"]
    for name, change in {
        "no_aug": {"augmentation": False},
        "full9+other_bn": {"other_batch_norm": True},
        "no_lr_find": {"rate": "fixed"},
    }.items():
        assert found[name].stages == full.stages
        assert {key: getattr(found[name], key) for key in change} == change
        assert all(getattr(full, key) != value for key, value in change.items())
    assert [arm.name for arm in found.values() if not arm.pretrained] == ["scratch@images", "scratch@5x"]


def test_rates__go_to_the_stages_they_are_for() -> None:
    full, fixed, probe, solved = arms("full9", "no_lr_find", "lp_only", "solved_ft")
    assert [stage.lr for stage in full.with_rates(0.5, 0.2)] == [0.5, 0.5, 0.2]
    assert [stage.lr for stage in fixed.with_rates(0.5, 0.2)] == [1e-2, 1e-2, 3e-3]
    assert [stage.lr for stage in full.with_rates("find", "find")] == ["find"] * 3
    assert [stage.lr for stage in probe.with_rates(0.5, 0.2)] == [0.5, 0.5]
    assert [stage.lr for stage in solved.with_rates(0.5, 0.2)] == [None, 0.2]
    assert [stage.lr for stage in solved.with_rates("find", "find")] == [None, "find"]


def test_arm__of_ones_own_says_whether_its_head_is_solved() -> None:
    stages = fine_tune(5)[0].stages
    with pytest.raises(ValueError, match=r"arm 'mine', stage 'head': solve='auto'.*solve=True \(then without lr"):
        Arm("mine", tuple(stages))
    for solved in (True, False):
        assert Arm("mine", (stages[0].settled(solved=solved), stages[1])).num_epochs == (6 if solved else 7)


@pytest.mark.parametrize("num_groups", [2, 3, 6, 9, 30])
def test_gradual__adds_a_slice_each_epoch_and_falls_by_2_6(num_groups: int) -> None:
    groups = [f"g{i}" for i in range(num_groups - 1)] + ["head"]
    (arm,) = arms("gradual", groups=groups)
    trained = [len(select(groups, stage.train)) for stage in arm.stages]
    assert trained[0] == 1 and trained[-1] == num_groups
    assert all(after > before for before, after in itertools.pairwise(trained) if before < num_groups)
    assert arm.num_epochs == 12
    ratios = arm.stages[-1].lr_mult
    assert isinstance(ratios, list) and len(ratios) == num_groups and ratios[-1] == 1
    steps = {round(after / before, 9) for before, after in itertools.pairwise(ratios)}
    assert steps <= {1.0, 2.6}
    # each epoch unfreezes exactly the groups of the next rate
    assert [ratios.count(rate) for rate in sorted(set(ratios), reverse=True)] == [
        after - before for before, after in zip([0, *trained], trained, strict=False) if after > before
    ]


@given(st.integers(1, 200), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_fitted_cycles__last_exactly_as_long_as_asked(epochs: int, cycle_len: int, mult: int, num: int) -> None:
    cycles = Recipe(cycle_len=cycle_len, cycle_mult=mult, num_cycles=num).fitted_cycles(epochs)
    assert sum(cycles) == epochs and min(cycles) > 0
    stages = cycle_stages(cycles, "full")
    assert [int(length) for stage in stages for length in stage.cycle_epochs] == list(cycles)
    check_plan(stages)


@pytest.mark.parametrize(
    "recipe",
    [Recipe(), Recipe(cached_epochs=4, augmented_epochs=4, num_cycles=4), Recipe(2, 6, cycle_len=2), Recipe(5, 10, 3)],
)
def test_flops_arm__costs_what_the_reference_costs_within_5_percent(recipe: Recipe) -> None:
    full, skip, uniform = arms("full9", "skip34@flops", "skip34+uniform@flops", recipe=recipe)
    reference = 1 + recipe.augmented_epochs + 2.94 * sum(recipe.cycles)
    assert flops(full.stages) == pytest.approx(reference)
    assert 2.94 * skip.num_epochs == pytest.approx(reference, rel=0.05)
    assert uniform.num_epochs == skip.num_epochs


def test_images_and_epochs_arms__have_the_budget_of_their_name() -> None:
    full, images, epochs, long = arms("full9", "skip34@images", "skip34@epochs", "scratch@5x")
    unfrozen = sum(stage.num_epochs for stage in full.stages if stage.train == "all")
    assert (images.num_epochs, epochs.num_epochs, long.num_epochs) == (full.num_epochs, unfrozen, 5 * full.num_epochs)


def test_matched_epochs__are_at_least_one() -> None:
    assert [matched_epochs(cost, 1.0) for cost in (0.1, 1.4, 8.6)] == [1, 1, 9]


def test_rates__span_what_the_recipe_says_and_are_uniform_or_decay_in_their_arms() -> None:
    full, uniform, decay = arms("full9", "uniform", "layer_decay@flops", recipe=Recipe(lr_span=1 / 4))
    assert [stage.lr_span for stage in full.stages] == [None, None, 1 / 4]
    assert [(stage.lr_span, stage.lr_mult) for stage in uniform.stages] == [(None, 1.0)] * 3
    assert [(stage.lr_span, stage.lr_mult) for stage in decay.stages] == [(None, 0.75)]


def test_names__core_all_and_lists() -> None:
    assert len(CORE) == 6 and set(CORE) < set(ALL)
    assert arm_names("core") == CORE and arm_names("all") == ALL
    assert arm_names(["core", "gradual", "full9"]) == (*CORE, "gradual")
    with pytest.raises(ValueError, match=r"skip5.*full9"):
        arm_names("full9,skip5")


@pytest.mark.parametrize(("change", "says"), [({"cached_epochs": 0}, "cached_epochs=0"), ({"lr_span": 2.0}, "lr_span")])
def test_recipe__refuses_the_impossible(change: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Recipe(**change)  # type: ignore[arg-type]
