from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_unfreeze.stages.cycles import cycle_at
from lightning_unfreeze.stages.schedules import (
    cosine_restarts,
    cycling_momentum,
    first_steps_warmup,
    one_cycle,
    slanted_triangle,
)

GOLDEN = Path(__file__).parents[2] / "../shared/golden"
TIMM_NOT_OURS = {"k_decay_.5", "warmup_no_prefix"}  # a skewed cosine; a warm-up that eats the cosine


def golden(name: str) -> dict:
    path = GOLDEN / name
    if not path.exists():
        pytest.skip(f"the golden vectors are not here: {path}")
    return json.loads(path.read_text())


# --- cycles


@pytest.mark.parametrize(
    ("cycle_len", "cycle_mult", "t", "expected"),
    [
        (1, 3, 120, (4, 40.0, 81.0)),
        (1, 3, 121, (5, 121.0, 243.0)),  # 1 + 3 + 9 + 27 + 81
        (2, 3, 242, (5, 242.0, 486.0)),
        (7, 3, 847, (5, 847.0, 1701.0)),
        (1, 10, 111, (3, 111.0, 1000.0)),
        (1, 10, 111111, (6, 111111.0, 1000000.0)),
        (5, 1, 14, (2, 10.0, 5.0)),
        (5, 1, 15, (3, 15.0, 5.0)),
        (0.1, 1, 0.3, (3, 0.3, 0.1)),
        (0.1, 1, 0.7, (7, 0.7, 0.1)),
        (0.1, 1, 0.9, (9, 0.9, 0.1)),  # just before it t / 0.1 is rounded up to 9
        (5 / 7, 1, 115 / 7, (23, 115 / 7, 5 / 7)),  # t / (5 / 7) is rounded below 23
        (1 / 3, 1, 100, (300, 100.0, 1 / 3)),
        (Fraction(1, 3), 1, 2 / 3, (2, 2 / 3, 1 / 3)),
        (0.1, 3, 12.1, (5, 12.1, 24.3)),
        (4, 1.5, 19, (3, 19.0, 13.5)),  # 4 + 6 + 9
        (8, 0.5, 12, (2, 12.0, 2.0)),
        (8, 0.5, 15.5, (5, 15.5, 0.25)),  # 8 + 4 + 2 + 1 + 0.5
    ],
)
def test_cycle_at__is_exact_at_restarts(cycle_len, cycle_mult, t, expected) -> None:
    assert cycle_at(t, cycle_len, cycle_mult) == expected
    if t == expected[1]:
        assert cosine_restarts(t, cycle_len, cycle_mult, floor=0.3) == 1.0
        assert cycle_at(math.nextafter(t, 0), cycle_len, cycle_mult)[0] == expected[0] - 1


@given(
    cycle_len=st.one_of(st.integers(1, 50), st.fractions(Fraction(1, 20), 20, max_denominator=40)),
    cycle_mult=st.sampled_from([1, 2, 3, 10, 1.1, 1.5, 0.9, 0.5, Fraction(4, 3)]),
    index=st.integers(0, 8),
)
def test_cycle_at__finds_any_restart_summed_as_fractions(cycle_len, cycle_mult, index) -> None:
    mult = Fraction(str(cycle_mult))
    start = sum((Fraction(cycle_len) * mult**i for i in range(index)), Fraction())
    expected = (index, float(start), float(cycle_len * mult**index))
    assert cycle_at(float(start), float(cycle_len), cycle_mult) == expected


def test_cycle_at__accepts_a_length_that_is_no_simple_fraction() -> None:
    index, start, length = cycle_at(1000.0, math.pi)
    assert (index, length) == (318, math.pi)
    assert start == pytest.approx(318 * math.pi, rel=1e-15)


def test_cosine_restarts__equals_a_loop_over_steps() -> None:
    got = cosine_restarts(np.arange(5 + 10 + 20), 5, 2, floor=0.1, decay=0.5)
    loop = [
        0.5**i * (0.1 + 0.9 * (1 + math.cos(math.pi * k / length)) / 2)
        for i, length in enumerate([5, 10, 20])
        for k in range(length)
    ]
    np.testing.assert_allclose(got, loop, rtol=1e-14)


def test_cosine_restarts__cycles_of_one_step_stay_at_the_peak() -> None:
    assert cosine_restarts(np.arange(4), 1).tolist() == [1.0] * 4


def test_cosine_restarts__gives_a_number_for_a_number_and_an_array_for_an_array() -> None:
    assert type(cosine_restarts(1, 2)) is float
    assert cosine_restarts(1, 2) == pytest.approx(0.5)
    assert cosine_restarts(np.zeros((2, 3)), 2).shape == (2, 3)
    assert cosine_restarts(np.array([]), 2, 2).shape == (0,)


def test_cosine_restarts__warmup_rises_from_the_floor_in_every_cycle() -> None:
    got = cosine_restarts(np.array([0, 1, 2, 6, 10, 12, 14, 22]), 10, 2, floor=0.2, decay=0.5, warmup=0.2)
    np.testing.assert_allclose(got, [0.2, 0.6, 1.0, 0.6, 0.1, 0.3, 0.5, 0.3], rtol=1e-14)


def test_cosine_restarts__shrinking_cycles_end() -> None:
    assert cosine_restarts(15.5, 8, 0.5) == 1.0
    for t in (16, np.array([0, 20])):
        with pytest.raises(ValueError, match=r"end before 16\.0"):
            cosine_restarts(t, 8, 0.5)
    with pytest.raises(ValueError, match="end before 3"):  # the limit 10/3 is no float: its neighbour must not loop
        cosine_restarts(10 / 3, 1, 0.7)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"t": -1},
        {"t": math.nan},
        {"t": math.inf},
        {"cycle_len": 0},
        {"cycle_len": math.nan},
        {"cycle_mult": 0},
        {"cycle_mult": -1},
        {"cycle_mult": math.inf},
        {"floor": -0.1},
        {"floor": 1.1},
        {"decay": 0},
        {"decay": 1.1},
        {"warmup": 1},
        {"warmup": -0.1},
    ],
)
def test_cosine_restarts__refuses_the_impossible(kwargs) -> None:
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        cosine_restarts(**{"t": 0, "cycle_len": 5, **kwargs})


@pytest.mark.parametrize("peer", ["timm_cosine", "torch_warm_restarts"])
def test_cosine_restarts__equals_timm_and_torch(peer) -> None:
    seen = 0
    for row in golden("schedules.json")[peer]:
        if row.get("known_bad") or row["name"] in TIMM_NOT_OURS:
            continue
        kwargs, base_lrs = row["kwargs"], row["base_lrs"]
        cycle_len, cycle_mult = (
            kwargs.get("t_initial", kwargs.get("T_0")),
            kwargs.get("cycle_mul", kwargs.get("T_mult")),
        )
        decay, lowest = kwargs.get("cycle_decay", 1.0), kwargs.get("lr_min", kwargs.get("eta_min", 0.0))
        warmup = 3 if "warmup" in row["name"] else 0  # a linear prefix: the cosine begins after it
        pairs = [*zip(row["t"], row["lr"], strict=True)]
        pairs += zip(row.get("t_fractional", []), row.get("lr_fractional", []), strict=True)
        for t, lrs in pairs:
            if not warmup <= t < row.get("cycle_length", math.inf):
                continue
            for base, lr in zip(base_lrs, lrs, strict=True):
                index = cycle_at(t - warmup, cycle_len, cycle_mult or 1)[0]
                floor = lowest / (base * decay**index)  # theirs is absolute
                ours = base * cosine_restarts(t - warmup, cycle_len, cycle_mult or 1, floor=floor, decay=decay)
                assert ours == pytest.approx(lr, rel=1e-12, abs=1e-15 * base), (row["name"], t)
                seen += 1
    assert seen > 700


def test_cosine_restarts__restarts_where_timm_and_torch_are_a_step_late() -> None:
    rows = golden("schedules.json")
    bad = [row for row in rows["timm_cosine"] + rows["torch_warm_restarts"] if row.get("known_bad")]
    assert len(bad) == 2
    for row in bad:
        cycle_len = row["kwargs"].get("t_initial", row["kwargs"].get("T_0"))
        for t, (lr,) in zip(row["t"], row["lr"], strict=True):
            ours = 0.1 * cosine_restarts(t, cycle_len, 3)
            if t == 121 * cycle_len:
                assert lr == 0.0
                assert ours == 0.1
            else:
                assert ours == pytest.approx(lr, rel=1e-12, abs=1e-16)


@pytest.mark.parametrize(
    ("cycle_len", "cycle_mult", "t", "lr"),  # rows of timm 1.0.31 and torch 2.15, peak 0.1
    [
        (10, 1, 3, 0.07938926261462366),
        (10, 1, 0.125, 0.09996145181203615),
        (3, 2, 1, 0.075),
        (3, 2, 4, 0.09330127018922195),
        (4, 1.5, 3, 0.014644660940672627),
        (391, 2, 111, 0.08139832657659557),
        (2, 3, 241, 9.401477574932927e-06),
        (2, 3, 242, 0.1),  # timm: 0
        (2, 3, 243, 0.0999989553622803),
    ],
)
def test_cosine_restarts__equals_peers_rows(cycle_len, cycle_mult, t, lr) -> None:
    assert 0.1 * cosine_restarts(t, cycle_len, cycle_mult) == pytest.approx(lr, rel=1e-12)


def test_cosine_restarts__equals_fastai_fit_sgdr_up_to_its_late_restart() -> None:
    good = late = crashed = 0
    for row in golden("fastai_schedules.json")["v2"]["fit_sgdr"]:
        first = row["n_batches"] * row["cycle_len"]
        if "error" in row:
            assert "ZeroDivision" in row["error"]
            assert [cosine_restarts(i * first, first, row["cycle_mult"]) for i in range(row["n_cycles"])] == [1.0] * 3
            crashed += 1
            continue
        theirs = np.array(row["lrs"])[:, -1] / 0.01
        ours = cosine_restarts(np.arange(len(theirs)), first, row["cycle_mult"])
        assert all(ours[t] == 1.0 for t in row["restart_batches_ideal"])
        wrong = sorted(set(row["restart_batches_ideal"]) - set(row["restart_batches_observed"]))
        assert all(theirs[t] < 1e-6 for t in wrong)
        upto = wrong[0] if wrong else len(theirs)
        np.testing.assert_allclose(ours[:upto], theirs[:upto], rtol=1e-4, atol=1e-6)
        late += bool(wrong)
        good += not wrong
    assert (good, late, crashed) == (10, 8, 2)


# --- warm-up, triangle, one cycle, momentum


def test_first_steps_warmup__equals_fastai_0_7() -> None:
    for row in golden("fastai_schedules.json")["v07"]["CosAnneal"]:
        cycle_len = row["n_batches"] * row["cycle_len"]
        ours = np.array(
            [
                first_steps_warmup(t, cosine_restarts(t, cycle_len, row["cycle_mult"]), cycle_len)
                for t in range(len(row["lrs"]))
            ]
        )
        np.testing.assert_allclose(0.01 * ours, np.array(row["lrs"])[:, 0], rtol=1e-12, atol=1e-15)
        assert (ours == 0.01).sum() == row["n_warmup_batches_at_lr_div_100"]


@pytest.mark.parametrize(("cycle_len", "held"), [(4, 1), (20, 1), (21, 2), (25, 2), (40, 2), (41, 3)])
def test_first_steps_warmup__holds_a_twentieth_rounded_up(cycle_len, held) -> None:
    assert [first_steps_warmup(t, 0.5, cycle_len) for t in range(4)] == [0.01] * held + [0.5] * (4 - held)


def test_slanted_triangle__equals_fastai_use_clr() -> None:
    for row in golden("fastai_schedules.json")["v07"]["CircularLR_use_clr"]:
        shape = {"total": row["nb"], "cut_frac": 1 / row["cut_div"]}
        rates = [0.01 * slanted_triangle(t, **shape, ratio=row["div"]) for t in range(row["nb"])]
        np.testing.assert_allclose(rates, row["lrs"], rtol=1e-12)
        if row["moms"]:  # theirs is already that of the next batch
            high, low = row["moms"]
            heights = [slanted_triangle(t + 1, **shape, ratio=math.inf) for t in range(row["nb"])]
            momentum = [cycling_momentum(height, low, high) for height in heights]
            np.testing.assert_allclose(momentum, row["mom"], rtol=1e-12)


def test_slanted_triangle__equals_the_papers_equation_where_the_cut_is_whole() -> None:
    total, cut_frac, ratio = 200, 0.1, 32
    cut = math.floor(total * cut_frac)
    p = [t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1)) for t in range(total)]
    expected = [(1 + x * (ratio - 1)) / ratio for x in p]
    np.testing.assert_allclose([slanted_triangle(t, total) for t in range(total)], expected, rtol=1e-12)


@pytest.mark.parametrize(("total", "cut_frac", "peak"), [(105, 0.1, 10), (100, 0.29, 29), (100, 0.57, 57), (5, 0.1, 0)])
def test_slanted_triangle__peaks_at_the_whole_cut_and_never_goes_below_the_end(total, cut_frac, peak) -> None:
    values = np.array([slanted_triangle(t, total, cut_frac) for t in range(total + 5)])
    assert values.argmax() == peak
    assert values[peak] == 1.0
    assert values.min() == 1 / 32
    assert values[total:].tolist() == [1 / 32] * 5


def test_one_cycle__equals_fastai_2() -> None:
    v2 = golden("fastai_schedules.json")["v2"]
    for row in v2["fit_one_cycle"]:
        total = len(row["lrs"])
        for group, peak in enumerate([1e-4, 1e-3, 1e-2]):
            ours = [peak * one_cycle(t, total) for t in range(total)]
            np.testing.assert_allclose(ours, np.array(row["lrs"])[:, group], rtol=1e-4, atol=1e-6 * peak)
        heights = [one_cycle(t, total, div=math.inf, div_final=math.inf) for t in range(total)]
        momentum = [cycling_momentum(height) for height in heights]
        np.testing.assert_allclose(momentum, row["moms"], rtol=1e-5)
    (row,) = v2["fine_tune"]
    frozen = [0.002 * one_cycle(t, 10, pct_start=0.99) for t in range(10)]
    full = [0.001 * one_cycle(t, 30, pct_start=0.3, div=5) for t in range(30)]
    np.testing.assert_allclose([*frozen, *full], np.array(row["lrs"])[:, -1], rtol=1e-4, atol=2e-9)


@pytest.mark.parametrize(
    ("t", "multiplier", "momentum"),  # fastai 2.8.12, 12 batches
    [
        (0, 0.04, 0.95),
        (1, 0.28, 0.925),
        (2, 0.76, 0.875),
        (3, 1.0, 0.85),
        (4, 0.9698466, 0.85301537),
        (12, 1e-5, 0.95),
        (13, 1e-5, 0.95),
    ],
)
def test_one_cycle__equals_fastai_rows(t, multiplier, momentum) -> None:
    assert one_cycle(t, 12) == pytest.approx(multiplier, rel=1e-6)
    assert cycling_momentum(one_cycle(t, 12, div=math.inf, div_final=math.inf)) == pytest.approx(momentum, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: one_cycle(0, 10, pct_start=0), "pct_start"),
        (lambda: one_cycle(0, 10, pct_start=1), "pct_start"),
        (lambda: one_cycle(0, 10, div=0.5), "div"),
        (lambda: one_cycle(0, 10, div_final=0), "div_final"),
        (lambda: one_cycle(0, 0), "total"),
        (lambda: one_cycle(-1, 10), "t="),
        (lambda: slanted_triangle(0, 10, cut_frac=1), "cut_frac"),
        (lambda: slanted_triangle(0, 10, ratio=0.5), "ratio"),
        (lambda: slanted_triangle(0, -1), "total"),
        (lambda: cycling_momentum(0.5, low=0.9, high=0.8), "low"),
    ],
)
def test_schedules__refuse_the_impossible(call, name) -> None:
    with pytest.raises(ValueError, match=name):
        call()
