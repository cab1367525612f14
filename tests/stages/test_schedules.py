from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_unfreeze.stages import range_test_rules
from lightning_unfreeze.stages.range_test_rules import debiased_ema, diverged, exponential_ramp, linear_ramp, suggest_lr
from lightning_unfreeze.stages.schedules import (
    cosine_restarts,
    cycle_at,
    cycling_momentum,
    first_steps_warmup,
    one_cycle,
    slanted_triangle,
)

GOLDEN = Path(__file__).parents[2] / "../shared/golden"
METHODS = ("valley", "slide", "minimum/10", "steep", "still_improving")
FASTAI = {"valley": "valley", "slide": "slide", "minimum/10": "minimum", "steep": "steep"}
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
    assert [part.tolist() for part in cycle_at(np.array([t]), cycle_len, cycle_mult)] == [[part] for part in expected]
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
        t = np.arange(len(row["lrs"]))
        ours = first_steps_warmup(t, cosine_restarts(t, cycle_len, row["cycle_mult"]), cycle_len)
        np.testing.assert_allclose(0.01 * ours, np.array(row["lrs"])[:, 0], rtol=1e-12, atol=1e-15)
        assert (ours == 0.01).sum() == row["n_warmup_batches_at_lr_div_100"]


@pytest.mark.parametrize(("cycle_len", "held"), [(4, 1), (20, 1), (21, 2), (25, 2), (40, 2), (41, 3)])
def test_first_steps_warmup__holds_a_twentieth_rounded_up(cycle_len, held) -> None:
    assert [first_steps_warmup(t, 0.5, cycle_len) for t in range(4)] == [0.01] * held + [0.5] * (4 - held)


def test_slanted_triangle__equals_fastai_use_clr() -> None:
    for row in golden("fastai_schedules.json")["v07"]["CircularLR_use_clr"]:
        t, shape = np.arange(row["nb"]), {"total": row["nb"], "cut_frac": 1 / row["cut_div"]}
        np.testing.assert_allclose(0.01 * slanted_triangle(t, **shape, ratio=row["div"]), row["lrs"], rtol=1e-12)
        if row["moms"]:  # theirs is already that of the next batch
            high, low = row["moms"]
            momentum = cycling_momentum(slanted_triangle(t + 1, **shape, ratio=math.inf), low, high)
            np.testing.assert_allclose(momentum, row["mom"], rtol=1e-12)


def test_slanted_triangle__equals_the_papers_equation_where_the_cut_is_whole() -> None:
    total, cut_frac, ratio = 200, 0.1, 32
    cut = math.floor(total * cut_frac)
    p = [t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1)) for t in range(total)]
    expected = [(1 + x * (ratio - 1)) / ratio for x in p]
    np.testing.assert_allclose(slanted_triangle(np.arange(total), total), expected, rtol=1e-12)


@pytest.mark.parametrize(("total", "cut_frac", "peak"), [(105, 0.1, 10), (100, 0.29, 29), (100, 0.57, 57), (5, 0.1, 0)])
def test_slanted_triangle__peaks_at_the_whole_cut_and_never_goes_below_the_end(total, cut_frac, peak) -> None:
    values = slanted_triangle(np.arange(total + 5), total, cut_frac)
    assert values.argmax() == peak
    assert values[peak] == 1.0
    assert values.min() == 1 / 32
    assert values[total:].tolist() == [1 / 32] * 5


def test_one_cycle__equals_fastai_2() -> None:
    v2 = golden("fastai_schedules.json")["v2"]
    for row in v2["fit_one_cycle"]:
        t, total = np.arange(len(row["lrs"])), len(row["lrs"])
        for group, peak in enumerate([1e-4, 1e-3, 1e-2]):
            ours = peak * one_cycle(t, total)
            np.testing.assert_allclose(ours, np.array(row["lrs"])[:, group], rtol=1e-4, atol=1e-6 * peak)
        momentum = cycling_momentum(one_cycle(t, total, div=math.inf, div_final=math.inf))
        np.testing.assert_allclose(momentum, row["moms"], rtol=1e-5)
    (row,) = v2["fine_tune"]
    frozen = 0.002 * one_cycle(np.arange(10), 10, pct_start=0.99)
    full = 0.001 * one_cycle(np.arange(30), 30, pct_start=0.3, div=5)
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
        (lambda: exponential_ramp(0, 1, 10), "start"),
        (lambda: exponential_ramp(1, 1, 10), "start"),
        (lambda: linear_ramp(1, math.inf, 10), "end"),
        (lambda: linear_ramp(1, 2, 1), "num_steps"),
        (lambda: debiased_ema([1.0], beta=1), "beta"),
        (lambda: diverged([1.0], factor=1), "factor"),
    ],
)
def test_schedules__refuse_the_impossible(call, name) -> None:
    with pytest.raises(ValueError, match=name):
        call()


# --- range test


def test_ramps__equal_peers() -> None:
    for row in golden("lr_finder.json")["ramps"]:
        ramp = {"exponential": exponential_ramp, "linear": linear_ramp}[row["mode"]]
        np.testing.assert_allclose(ramp(row["min_lr"], row["max_lr"], row["n"]), row["torch_lr_finder"], rtol=1e-6)
        # Lightning skips the second of n + 1 rates
        longer = ramp(row["min_lr"], row["max_lr"], row["n"] + 1)
        np.testing.assert_allclose(np.delete(longer, 1), row["lightning"], rtol=1e-6)
    for curve in golden("fastai_lr_find.json")["v2_curves"].values():
        # fastai stops short of the end
        ours = exponential_ramp(curve["start_lr"], curve["end_lr"], curve["num_it"] + 1)[: curve["n_recorded"]]
        np.testing.assert_allclose(ours, curve["recorded_lrs"], rtol=1e-5)


def test_ramps__equal_plain_arithmetic() -> None:
    np.testing.assert_allclose(exponential_ramp(1e-4, 1, 9), [10 ** (i / 2 - 4) for i in range(9)], rtol=1e-13)
    np.testing.assert_allclose(linear_ramp(1, 3, 5), [1, 1.5, 2, 2.5, 3], rtol=1e-15)


def test_debiased_ema__equals_fastai() -> None:
    data = golden("fastai_lr_find.json")
    for name, curve in data["v2_curves"].items():
        ours = debiased_ema(curve["raw_losses"][: curve["n_recorded"]])
        np.testing.assert_allclose(ours, curve["recorded_smooth_losses"], rtol=1e-4, err_msg=name)
    for curve in data["v07"].values():
        n = len(curve["recorded_losses"])
        np.testing.assert_allclose(debiased_ema(curve["raw_losses"])[:n], curve["recorded_losses"], rtol=1e-12)


def test_debiased_ema__starts_at_the_first_loss_where_lightning_starts_at_half() -> None:
    for curve in golden("lr_finder.json")["curves"]:
        raw = np.array(curve["raw_loss"], dtype=float)  # a null is a NaN
        first = raw[0]
        assert debiased_ema(raw)[0] == pytest.approx(first, rel=1e-12)
        assert curve["lightning"]["smoothed"][0] == pytest.approx(first / 1.98, rel=1e-6)


def test_debiased_ema__is_the_weighted_mean_of_the_past() -> None:
    losses = [3.0, -1.0, 4.0, 1.0]
    expected = [np.average(losses[: i + 1], weights=[0.9 ** (i - j) for j in range(i + 1)]) for i in range(4)]
    np.testing.assert_allclose(debiased_ema(losses, 0.9), expected, rtol=1e-13)
    assert np.isnan(debiased_ema([1.0, math.nan, 1.0])).tolist() == [False, True, True]


def stops_after(losses: list[float]) -> int:
    return next((i for i in range(1, len(losses) + 1) if diverged(losses[:i])), len(losses))


def test_diverged__stops_where_fastai_does() -> None:
    for name, curve in golden("fastai_lr_find.json")["v2_curves"].items():
        losses = debiased_ema(curve["raw_losses"])
        if name == "nan_tail":  # fastai runs on through the NaN
            assert stops_after(losses) == int(np.flatnonzero(np.isnan(losses))[0]) + 1 < curve["n_recorded"]
        else:
            assert stops_after(losses) == curve["n_recorded"], name


def test_diverged__does_not_stop_a_negative_loss_where_peers_do() -> None:
    curve = next(c for c in golden("lr_finder.json")["curves"] if c["name"] == "negative_loss")
    assert curve["lightning"]["stopped"] and curve["torch_lr_finder"]["stopped"]
    assert len(curve["lightning"]["lr"]) == 2
    assert stops_after(curve["raw_loss"]) > 60


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], False),
        ([2.0], False),
        ([math.nan], True),
        ([2.0, math.inf], True),
        ([2.0, -math.inf], True),
        ([2.0, math.nan, 2.0], True),
        ([2.0, 7.9], False),  # 4 times the best
        ([2.0, 8.1], True),
        ([-2.0, 3.9], False),  # 3 times 2 above -2
        ([-2.0, 4.1], True),
        ([2.0, 0.01, 5.9], False),  # best near 0: 3 times the fall of 1.99, not 3 times 0.01
        ([2.0, 0.01, 6.1], True),
        ([0.5, -0.1, 1.6], False),  # the fall across 0 is 0.6
        ([0.5, -0.1, 1.8], True),
        ([0.0, 0.1], False),
        ([2.0, 9.0, 2.1], False),  # only the last loss is judged
    ],
)
def test_diverged__measures_the_rise_in_units_of_the_loss(losses, expected) -> None:
    assert diverged(losses) is expected


def bowl(n: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Flat, a fall of 0.9 around 10**-3.5, a blow-up from 10**-0.5 on."""
    x = np.linspace(-7, 1, n)
    return 10**x, 2.3 - 0.9 / (1 + np.exp(-2.5 * (x + 3.5))) + np.exp(3 * (x - 0.3))


@pytest.mark.parametrize("method", FASTAI)
def test_suggest_lr__equals_fastai_on_recorded_curves(method) -> None:
    for name, curve in golden("fastai_lr_find.json")["v2_curves"].items():
        ours = suggest_lr(curve["sliced_lrs"], curve["sliced_losses"], method)
        theirs = curve["suggestions"][FASTAI[method]]
        if name == "monotone_increasing":
            assert ours is None
            assert theirs["lr"] > 0
        elif "error" in theirs:  # fewer than 16 points
            assert (name, method, ours) == ("short_num_it_20", "slide", None)
        else:
            assert ours == pytest.approx(theirs["lr"], rel=1e-5), name


@pytest.mark.parametrize("method", FASTAI)
def test_suggest_lr__rules_equal_fastai_on_random_walks(method) -> None:
    # walks, most of them without a signal: the rules alone
    for row in golden("fastai_lr_find.json")["v2_direct"]:
        ours = range_test_rules._RULES[method](np.array(row["lrs"]), np.array(row["losses"]))
        assert ours == pytest.approx(row["out"][FASTAI[method]]["lr"], rel=1e-5), row["seed"]


def test_suggest_lr__equals_the_rules_counted_by_hand() -> None:
    # short curves whose indices can be counted by hand
    losses = [9, 8, 7, 6, 5, 4, 3, 2, 1, 2, 3, 4]
    lrs = [10.0 ** (i - 8) for i in range(12)]
    assert suggest_lr(lrs, losses, "valley") == 1e-8 * 10**3  # nine in the run: 8 - 9 + 3 + 1
    assert suggest_lr(lrs, losses, "minimum/10") == pytest.approx(0.1)
    assert suggest_lr(lrs, [9, 8.9, 8.7, 8, 5, 4, 3.5, 3.2, 3, 3.2, 4, 6], "steep") == 1e-5
    # slopes: 0 for ten points, then -0.5; from the right the pairs 15 apart differ down to the lowest point
    slide = [5.0] * 10 + [5 - 0.5 * i for i in range(1, 11)]
    assert suggest_lr(np.arange(1, 21), slide, "slide") == 1
    # the whole right end has one slope: the lowest pair that was looked at is the first
    assert suggest_lr(np.arange(1, 21), np.linspace(5, 1, 20), "slide") == 5


def test_suggest_lr__still_improving_is_the_last_half_of_the_steepest_slope() -> None:
    x = np.linspace(-8, 0, 81)  # decades; four points to each side
    # A line through a parabola has the parabola's slope at the mean of its points. Steepest: the first five points,
    # mean -7.8, slope 2 * (-7.8 + 0.95). Half of it is reached at -0.95 - 6.85 / 2 = -4.375: the last
    # point before is -4.4.
    assert suggest_lr(10**x, (x + 0.95) ** 2, "still_improving") == pytest.approx(10**-4.4)
    # falls to the end: the highest rate tested
    assert suggest_lr(10**x, -x, "still_improving") == pytest.approx(1)


@pytest.mark.parametrize("method", METHODS)
def test_suggest_lr__does_not_depend_on_the_losses_sign_or_what_follows_a_nan(method) -> None:
    lrs, losses = bowl()
    rate = suggest_lr(lrs, losses, method)
    assert 1e-6 < rate < 1
    assert suggest_lr(lrs, losses - 50, method) == pytest.approx(rate)
    for bad in (math.nan, math.inf):
        cut = suggest_lr(lrs[:80], losses[:80], method)
        assert suggest_lr(lrs, np.where(np.arange(100) < 80, losses, bad), method) == cut is not None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "losses",
    [
        np.full(50, 2.3),
        2.3 - 2e-8 * np.arange(50),  # falls by float32's last digits
        debiased_ema(np.full(50, 2.3)),
        np.linspace(1, 3, 50),
        1 + np.linspace(0, 1, 50) ** 4,
        np.full(50, math.nan),
        np.array([2.3, 1.9, 1.2, math.nan] + [1.0] * 46),
        np.array([]),
        np.array([2.0, 1.0]),
        np.array([4.0, 3.0, 2.0, 1.0]),
    ],
    ids=["flat", "float32", "flat-smoothed", "rising", "curved-up", "nan", "nan-early", "none", "two", "four"],
)
def test_suggest_lr__is_none_without_a_signal(losses, method) -> None:
    assert suggest_lr(10.0 ** np.linspace(-6, 0, len(losses)), losses, method) is None


def share_with_signal(losses_of, smooth) -> float:
    """Share of 200 noisy curves on which a rate is suggested, first tenth and last five cut as fastai does."""
    rng, lrs = np.random.default_rng(0), bowl()[0]
    curves = [smooth(losses_of(rng.normal(size=100))) for _ in range(200)]
    return float(np.mean([suggest_lr(lrs[10:-5], c[10:-5], "minimum/10") is not None for c in curves]))


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.98], ids=["raw", "ema0.9", "ema0.98"])
def test_suggest_lr__tells_noise_from_a_fall(beta) -> None:
    base = bowl()[1]
    rising = 2.3 + np.linspace(0, 1, 100) ** 2

    def smooth(losses):
        return debiased_ema(losses, beta)

    assert share_with_signal(lambda noise: 2.3 + 0.1 * noise, smooth) < 0.08
    assert share_with_signal(lambda noise: rising + 0.1 * noise, smooth) < 0.08
    assert share_with_signal(lambda noise: base + 0.02 * noise, smooth) > 0.95
    assert share_with_signal(lambda noise: base + 0.1 * noise, smooth) > 0.85


def test_suggest_lr__recorded_flat_curves_have_none_and_real_ones_a_rate() -> None:
    curves = {c["name"]: c["raw_loss"] for c in golden("lr_finder.json")["curves"]}
    lrs = exponential_ramp(1e-6, 100, 100)
    for name, has_rate in [("flat", False), ("real_run_sgd_m.9", True), ("noisy_u_.05", True), ("early_spike", True)]:
        losses = np.array(curves[name])
        for curve in (losses, debiased_ema(losses), debiased_ema(losses)[10:-5]):
            for method in METHODS:
                assert (suggest_lr(lrs[: len(curve)], curve, method) is not None) is has_rate, (name, method)


@pytest.mark.parametrize(
    ("lrs", "losses", "method", "message"),
    [
        ([1, 2, 3], [1, 2], "valley", "one length"),
        ([[1, 2]], [[1, 2]], "valley", "one-dimensional"),
        ([2, 1, 3], [1, 2, 3], "valley", "increasing"),
        ([0, 1, 2], [1, 2, 3], "valley", "above 0"),
        ([1, 2, math.nan], [1, 2, 3], "valley", "finite"),
        ([1, 2, 3], [1, 2, 3], "best", "still_improving"),
    ],
)
def test_suggest_lr__refuses_the_impossible(lrs, losses, method, message) -> None:
    with pytest.raises(ValueError, match=message):
        suggest_lr(lrs, losses, method)
