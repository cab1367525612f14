"""The rules of the range test against fastai's own numbers, counts by hand, and curves made for a purpose."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lightning_unfreeze.stages.range_test_rules import (
    below_rise,
    debiased_ema,
    diverged,
    exponential_ramp,
    read_curve,
    rise_start,
    suggest_lr,
)

GOLDEN = Path(__file__).parents[2] / "../shared/golden"
METHODS = ("valley", "slide", "minimum/10", "steep", "still_improving")
FASTAI = {"valley": "valley", "slide": "slide", "minimum/10": "minimum", "steep": "steep"}


def golden(name: str) -> dict:
    path = GOLDEN / name
    if not path.exists():
        pytest.skip(f"the golden vectors are not here: {path}")
    return json.loads(path.read_text())


def test_ramps__equal_peers() -> None:
    for row in golden("lr_finder.json")["ramps"]:
        if row["mode"] == "linear":
            continue
        ours = exponential_ramp(row["min_lr"], row["max_lr"], row["n"])
        np.testing.assert_allclose(ours, row["torch_lr_finder"], rtol=1e-6)
        # Lightning skips the second of n + 1 rates
        longer = exponential_ramp(row["min_lr"], row["max_lr"], row["n"] + 1)
        np.testing.assert_allclose(np.delete(longer, 1), row["lightning"], rtol=1e-6)
    for curve in golden("fastai_lr_find.json")["v2_curves"].values():
        # fastai stops short of the end
        ours = exponential_ramp(curve["start_lr"], curve["end_lr"], curve["num_it"] + 1)[: curve["n_recorded"]]
        np.testing.assert_allclose(ours, curve["recorded_lrs"], rtol=1e-5)


def test_ramps__equal_plain_arithmetic() -> None:
    np.testing.assert_allclose(exponential_ramp(1e-4, 1, 9), [10 ** (i / 2 - 4) for i in range(9)], rtol=1e-13)


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
        if name == "monotone_increasing":  # fastai reads a fall where there is none
            assert ours == read_curve(curve["sliced_lrs"], curve["sliced_losses"]).rise / 20
            assert theirs["lr"] > 0
        elif "error" in theirs:  # fewer than 16 points
            assert (name, method, ours) == ("short_num_it_20", "slide", None)
        else:
            assert ours == pytest.approx(theirs["lr"], rel=1e-5), name


@pytest.mark.parametrize("method", FASTAI)
def test_suggest_lr__equals_fastai_on_walks_that_fall(method) -> None:
    for row in golden("fastai_lr_find.json")["v2_direct"]:
        ours = suggest_lr(row["lrs"], row["losses"], method)
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
        np.full(50, math.nan),
        np.array([2.3, 1.9, 1.2, math.nan] + [1.0] * 46),
        np.array([]),
        np.array([2.0, 1.0]),
        np.array([4.0, 3.0, 2.0, 1.0]),
    ],
    ids=["flat", "float32", "flat-smoothed", "nan", "nan-early", "none", "two", "four"],
)
def test_suggest_lr__is_none_without_a_signal(losses, method) -> None:
    assert suggest_lr(10.0 ** np.linspace(-6, 0, len(losses)), losses, method) is None


def ends(losses_of, smooth, measured: bool = False) -> dict[str, float]:
    """Share of 200 noisy curves that are read off each end, first tenth and last five cut as fastai does."""
    rng, lrs, told = np.random.default_rng(0), bowl()[0][10:-5], []
    for _ in range(200):
        losses = losses_of(rng.normal(size=100))
        raw = losses[10:-5] if measured else None
        told.append(read_curve(lrs, smooth(losses)[10:-5], "minimum/10", raw).end)
    return {end: told.count(end) / 200 for end in ("fall", "rise", "none")}


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.9, 0.98], ids=["raw", "ema0.9", "ema0.98"])
def test_read_curve__tells_noise_from_a_fall_and_from_a_rise(beta, measured) -> None:
    base = bowl()[1]
    rising = 2.3 + np.exp(8 * (np.linspace(0, 1, 100) - 0.8))

    def smooth(losses):
        return debiased_ema(losses, beta)

    flat = ends(lambda noise: 2.3 + 0.1 * noise, smooth, measured)
    assert flat["fall"] < 0.08 and flat["rise"] < 0.12
    assert ends(lambda noise: rising + 0.1 * noise, smooth, measured)["fall"] < 0.08
    assert ends(lambda noise: rising + 0.1 * noise, smooth, measured)["rise"] > 0.9
    assert ends(lambda noise: base + 0.02 * noise, smooth, measured)["fall"] > 0.95
    assert ends(lambda noise: base + 0.1 * noise, smooth, measured)["fall"] > 0.85


def converged_head(noise: float, knee: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses as after a head has converged: low, noisy, no way down, and a steep rise from `knee` on."""
    lrs = np.geomspace(1e-6, 1e-1, 90)
    losses = 0.4 + noise * np.random.default_rng(seed).standard_normal(90)
    return lrs, losses + 2 * np.clip(np.log10(lrs / knee), 0, None) ** 2


@pytest.mark.parametrize("knee", [3e-4, 3e-3, 3e-2])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.15])
def test_read_curve__without_a_fall_it_answers_from_below_the_rise(noise, knee) -> None:
    for seed in range(20):
        lrs, losses = converged_head(noise, knee, seed)
        answer = read_curve(lrs, debiased_ema(losses, 0.9), "valley", losses)
        assert answer.end == "rise"
        # the loss is 4 standard deviations up a factor of 3 behind the knee, for the most noise
        assert knee * 0.8 < answer.rise < knee * 5
        assert answer.rate == pytest.approx(answer.rise / 20)


def test_rise_start__is_the_last_time_that_the_loss_is_low() -> None:
    lrs = np.geomspace(1e-6, 1, 61)
    step = np.where(np.arange(61) < 40, 1.0, 2.0)
    assert rise_start(lrs, step) == pytest.approx(lrs[40])
    bump = step.copy()
    bump[20:26] = 5  # it comes down again
    bump[50] = 0.9  # a single lucky batch
    assert rise_start(lrs, bump) == pytest.approx(lrs[40])
    assert rise_start(lrs, step[::-1].copy()) is None
    assert rise_start(lrs, np.ones(61)) is None
    assert rise_start(lrs[:4], [1, 2, 3, 4]) is None


def test_rise_start__a_small_rise_is_not_clear_where_a_large_one_follows() -> None:
    lrs = np.geomspace(1e-6, 1, 61)
    step = np.select([np.arange(61) < 30, np.arange(61) < 50], [1.0, 1.2], 3.0)
    assert rise_start(lrs, step) == pytest.approx(lrs[30])
    assert rise_start(lrs, step, clear=0.5) == pytest.approx(lrs[50])
    assert rise_start(lrs[:45], step[:45], clear=0.5) == pytest.approx(lrs[30])  # nothing larger is there


@pytest.mark.parametrize(
    ("steps", "part"),
    [(None, 20), (1, 105), (8, 105 / 4), (64, 105 / 16), (125, 105 / 25), (216, 3), (10**6, 3)],
)
def test_below_rise__the_more_steps_are_left_the_nearer(steps, part) -> None:
    assert below_rise(0.6, steps) == pytest.approx(0.6 / part)
    assert below_rise(0.6, steps, warmup_steps=2.9) == pytest.approx(0.6 / part)  # too short to keep anything
    assert below_rise(0.6, steps, warmup_steps=3) == pytest.approx(0.6 / part * 3)


def test_read_curve__below_the_rise_whatever_it_did_before() -> None:
    lrs, losses = bowl()
    fall, rise = read_curve(lrs, losses), read_curve(lrs, losses, "below_rise", steps=64)
    assert fall.end == "fall" and rise.end == "rise" and rise.rise == fall.rise
    assert rise.rate == pytest.approx(rise.rise * 16 / 105)  # type: ignore[operator]
    warmed = read_curve(lrs, losses, "below_rise", steps=64, warmup_steps=6.4)
    assert warmed.rate == pytest.approx(rise.rise * 16 / 35)  # type: ignore[operator]
    falling = losses[: int(losses.argmin())]
    never = read_curve(lrs[: len(falling)], falling, "below_rise")
    assert never.end == "fall" and never.rate == read_curve(lrs[: len(falling)], falling, "valley").rate


@pytest.mark.parametrize("method", METHODS)
def test_suggest_lr__of_a_rising_curve_is_below_the_rise_by_any_method(method) -> None:
    x = np.linspace(-6, 0, 50)
    for losses in (1 + np.clip(x + 2, 0, None) ** 2, -5 + np.exp(3 * (x + 1))):
        rise = rise_start(10**x, losses)
        assert 10**-2.5 < rise < 0.5
        assert suggest_lr(10**x, losses, method) == pytest.approx(rise / 20)


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


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: exponential_ramp(0, 1, 10), "start"),
        (lambda: exponential_ramp(1, 1, 10), "start"),
        (lambda: debiased_ema([1.0], beta=1), "beta"),
        (lambda: diverged([1.0], factor=1), "factor"),
    ],
)
def test_rules__refuse_the_impossible(call, name) -> None:
    with pytest.raises(ValueError, match=name):
        call()
