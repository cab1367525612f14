from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.formula.api import mixedlm, ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from lightning_unfreeze.study.judge import across
from lightning_unfreeze.study.judge import statistics as s
from lightning_unfreeze.study.judge import time_to_target as tt

POINTS = st.lists(st.floats(-5, 5).map(lambda x: round(x, 3)), min_size=2, max_size=12)


# --- intervals and tests ----------------------------------------------------------------------------------------------


def test_paired_t_interval__by_hand() -> None:
    # mean 2, sd sqrt(2.5), n 5, t(0.975, 4) = 2.776445
    interval = s.paired_t_interval([0.0, 1.0, 2.0, 3.0, 4.0])
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((2.0, 2 - half, 2 + half), abs=1e-5)


@pytest.mark.parametrize("level", [0.90, 0.95])
def test_paired_t_interval__equals_scipy(level: float) -> None:
    d = np.random.default_rng(1).normal(0.3, 1.0, 9)
    expected = scipy_stats.ttest_rel(d, np.zeros(9)).confidence_interval(level)
    interval = s.paired_t_interval(d, level)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_paired_t_interval__one_pair_says_nothing() -> None:
    assert s.paired_t_interval([1.5]) == s.Interval(1.5, -math.inf, math.inf)


def test_paired_t_interval__constant_differences_have_no_width() -> None:
    interval = s.paired_t_interval([-0.5] * 4)
    assert (interval.low, interval.high) == (-0.5, -0.5)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_differences__must_be_finite_and_not_empty(bad: list[float]) -> None:
    for function in (s.paired_t_interval, s.sign_flip_p, s.probability_better):
        with pytest.raises(ValueError, match="one finite number per pair"):
            function(bad)


@pytest.mark.parametrize("n", [3, 5, 10, 20])
def test_paired_t_interval__covers_93_to_97_percent(n: int) -> None:
    draws = np.random.default_rng(n).normal(0.4, 1.0, (3000, n))
    intervals = [s.paired_t_interval(row) for row in draws]
    assert 0.93 <= np.mean([i.low < 0.4 < i.high for i in intervals]) <= 0.97


@pytest.mark.parametrize("n", [4, 7])
def test_sign_flip_p__equals_enumeration(n: int) -> None:
    d = np.random.default_rng(n).normal(0.5, 1.0, n)
    means = [abs(np.mean(np.array(signs) * d)) for signs in itertools.product([1, -1], repeat=n)]
    assert s.sign_flip_p(d) == pytest.approx(np.mean(np.array(means) >= abs(d.mean()) - 1e-12))


@pytest.mark.parametrize("n", [1, 3, 5, 6])
def test_sign_flip_p__cannot_be_below_its_floor(n: int) -> None:
    p = s.sign_flip_p(np.arange(1, n + 1))
    assert p == pytest.approx(2 / 2**n)
    assert (p < 0.05) == (n >= s.MIN_SEEDS_SIGN_FLIP)


def test_sign_flip_p__many_seeds_agree_with_the_t_test() -> None:
    d = np.random.default_rng(0).normal(0.25, 1.0, 60)
    assert s.sign_flip_p(d) == pytest.approx(scipy_stats.ttest_1samp(d, 0).pvalue, abs=0.01)


def test_holm__by_hand() -> None:
    # sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, running maximum .04 .06 .06 .06
    assert s.holm([0.04, 0.01, 0.03, 0.02]).tolist() == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert s.holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert s.holm([]).tolist() == []


def test_holm__equals_statsmodels() -> None:
    p = np.random.default_rng(0).random(9) ** 3
    assert s.holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_tost_p__equals_statsmodels() -> None:
    d = np.random.default_rng(3).normal(0.2, 0.8, 10)
    assert s.seed_effect(d).p_equal(1.0) == pytest.approx(DescrStatsW(d).ttost_mean(-1.0, 1.0)[0])


@given(POINTS, st.sampled_from([0.5, 1.0, 2.0]))
def test_tost__is_the_90_percent_interval_inside_the_margin(d: list[float], margin: float) -> None:
    interval = s.paired_t_interval(d, 0.90)
    if min(abs(margin - abs(interval.low)), abs(margin - abs(interval.high))) > 1e-6:
        assert (s.seed_effect(d).p_equal(margin) < 0.05) == interval.within(margin)


def test_probability_better__wilson_by_hand() -> None:
    # 8 of 10, z = 1.959964: centre (p + z2/2n) / (1 + z2/n), half z sqrt(p q/n + z2/4n2) / (1 + z2/n)
    z2 = 1.959964**2
    centre = (0.8 + z2 / 20) / (1 + z2 / 10)
    half = math.sqrt(z2) * math.sqrt(0.016 + z2 / 400) / (1 + z2 / 10)
    got = s.probability_better([1] * 7 + [0, 0, -1])
    assert (got.mean, got.low, got.high) == pytest.approx((0.8, centre - half, centre + half), abs=1e-6)


# --- two levels: seeds and test images --------------------------------------------------------------------------------


def test_crossed_effect__equals_the_two_way_analysis_of_variance() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((4, 30)) < 0.7, rng.random((4, 30)) < 0.6
    d = 100 * (a.astype(float) - b)
    frame = pd.DataFrame(
        {
            "d": d.ravel(),
            "seed": np.repeat(np.arange(4), 30).astype(str),
            "image": np.tile(np.arange(30), 4).astype(str),
        }
    )
    table = anova_lm(ols("d ~ seed + image", frame).fit())
    ms = table["mean_sq"]
    got = s.crossed_effect(a, b)
    assert got.seed_variance == pytest.approx(ms["seed"] / 30)
    assert got.image_variance == pytest.approx(max(ms["image"] - ms["Residual"], 0) / 120)
    assert got.mean == pytest.approx(d.mean())


def test_crossed_effect__its_variance_is_unbiased() -> None:
    """Mean of the estimated variances against the variance of the estimates, seeds and images both at random."""
    rng = np.random.default_rng(1)
    means, variances = [], []
    for _ in range(1500):
        d = rng.normal(0, 1, (6, 1)) + rng.normal(0, 8, (1, 80)) + rng.normal(0, 5, (6, 80))
        found = s.crossed_effect(d / 100, np.zeros_like(d))
        means.append(found.mean)
        variances.append(found.variance(6))
    assert np.mean(variances) == pytest.approx(np.var(means), rel=0.08)
    assert np.mean(variances) == pytest.approx(1 / 6 + 64 / 80 + 25 / 480, rel=0.05)


@pytest.mark.parametrize(("seeds", "images"), [(6, 268), (20, 268), (12, 1000)])
def test_crossed_effect__covers_93_to_97_percent_on_new_images(seeds: int, images: int) -> None:
    """Correctness from a latent score with easy and hard images: the arms agree on most, and the truth is known."""
    rng = np.random.default_rng(seeds + images)
    spread = {"image": 3.0, "arm x image": 0.5, "seed": 0.2, "arm x seed": 0.1, "rest": 0.8}
    scale = math.sqrt(sum(value**2 for value in spread.values()))
    truth = 100 * (scipy_stats.norm.cdf(1.05) - scipy_stats.norm.cdf(1.0))
    held = []
    for _ in range(700):
        shared = spread["image"] * rng.standard_normal((1, images)) + spread["seed"] * rng.standard_normal((seeds, 1))
        right = [
            level * scale
            + shared
            + spread["arm x image"] * rng.standard_normal((1, images))
            + spread["arm x seed"] * rng.standard_normal((seeds, 1))
            + spread["rest"] * rng.standard_normal((seeds, images))
            > 0
            for level in (1.05, 1.0)
        ]
        interval = s.crossed_effect(*right).interval()
        held.append(interval.low < truth < interval.high)
    assert 0.93 <= np.mean(held) <= 0.97


def test_crossed_effect__covers_and_the_seed_interval_does_not() -> None:
    # Two arms that differ by chance alone on each image: on new images their true difference is 0.
    rng = np.random.default_rng(5)
    total = seed = 0
    for _ in range(400):
        image_effect = rng.normal(0, 0.25, 300)
        p_a, p_b = np.clip(0.6 + image_effect, 0, 1), np.clip(0.6 - image_effect, 0, 1)
        a, b = rng.random((10, 300)) < p_a, rng.random((10, 300)) < p_b
        total += not s.crossed_effect(a, b).interval().excludes_zero()
        seed += not s.paired_t_interval(100 * (a.mean(1) - b.mean(1))).excludes_zero()
    assert total / 400 >= 0.93
    assert seed / 400 < 0.80


def test_crossed_effect__refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(2, 6\)"):
        s.crossed_effect(np.ones((2, 5)), np.ones((2, 6)))


@pytest.mark.parametrize(
    ("n_test", "row"), [(360, (1.18, 1.67, 2.36)), (2000, (0.50, 0.71, 1.00)), (10000, (0.22, 0.32, 0.45))]
)
def test_image_standard_error__table(n_test: int, row: tuple[float, ...]) -> None:
    got = [s.image_standard_error(q, n_test) for q in (0.05, 0.10, 0.20)]
    assert got == pytest.approx(row, abs=0.0051)


@pytest.mark.parametrize(("n_test", "margin"), [(26, 18.15), (1000, 2.93), (8600, 0.998)])
def test_smallest_margin__is_where_many_seeds_reach_the_power(n_test: int, margin: float) -> None:
    error = s.image_standard_error(0.1, n_test)
    assert s.smallest_margin(error) == pytest.approx(margin, abs=0.006)
    images_alone = s.Effect(0.0, 2, 1e-9, error**2)
    assert s.power_to_equate(images_alone, s.smallest_margin(error), 1000) == pytest.approx(0.8, abs=1e-3)


# --- power ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sd", "half_point", "half_holm", "point", "point_holm"),
    [
        (0.3, 6, 9, 3, 5),
        (0.5, 10, 17, 5, 7),
        (0.7, 18, 29, 7, 11),
        (1.0, 34, 55, 10, 17),
        (1.2, 48, 78, 14, 23),
        (1.5, 73, 119, 20, 33),
        (2.0, 128, 209, 34, 55),
    ],
)
def test_seeds_to_detect__table(sd: float, half_point: int, half_holm: int, point: int, point_holm: int) -> None:
    assert s.seeds_to_detect(sd, 0.5) == half_point
    assert s.seeds_to_detect(sd, 0.5, alpha=0.05 / 8) == half_holm
    assert s.seeds_to_detect(sd, 1.0) == point
    assert s.seeds_to_detect(sd, 1.0, alpha=0.05 / 8) == point_holm


def _equivalence_power(n: int, sd: float, margin: float) -> float:
    d = np.random.default_rng(n).normal(0, sd, (200_000, n))
    half = scipy_stats.t.ppf(0.95, n - 1) * d.std(axis=1, ddof=1) / math.sqrt(n)
    return float((np.abs(d.mean(axis=1)) + half < margin).mean())


@pytest.mark.parametrize(("sd", "margin", "expected"), [(0.3, 0.5, 5), (0.3, 1.0, 3), (0.5, 0.5, 11), (1.5, 1.0, 21)])
def test_seeds_for_equivalence__reaches_80_percent_and_one_fewer_does_not(
    sd: float, margin: float, expected: int
) -> None:
    assert s.seeds_for_equivalence(sd, margin) == expected
    assert _equivalence_power(expected, sd, margin) >= 0.8 > _equivalence_power(expected - 1, sd, margin)


def test_seeds__without_spread_two_are_enough() -> None:
    assert (s.seeds_to_detect(0.0, 1.0), s.seeds_for_equivalence(0.0, 1.0)) == (2, 2)


def _power(effect: float, n: int, alpha: float) -> float:
    return s.power_to_detect(s.Effect(0.0, 2, 1.0), effect, n, alpha)


@pytest.mark.parametrize(
    ("effect", "n", "alpha"), [(0.3, 20, 0.05), (1.0, 5, 0.05), (0.8, 12, 0.05 / 8), (0.0, 3, 0.05)]
)
def test_power_to_detect__equals_statsmodels(effect: float, n: int, alpha: float) -> None:
    assert _power(effect, n, alpha) == pytest.approx(TTestPower().power(effect, n, alpha), abs=2e-4)
    assert _power(-effect, n, alpha) == _power(effect, n, alpha)


def test_detectable_difference__has_the_stated_power() -> None:
    shift = s.detectable_difference(sd=1.2, seeds=10)
    d = np.random.default_rng(0).normal(shift, 1.2, (20_000, 10))
    assert np.mean(scipy_stats.ttest_1samp(d, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.01)


# --- cost to target ---------------------------------------------------------------------------------------------------


def exact_costs(values: list[float]) -> list[tuple[float, float]]:
    return [(value, value) for value in values]


def test_cost_ratio__of_known_costs_is_the_signed_rank_interval_of_log_ratios() -> None:
    a, b = [3.0, 5.0, 4.0, 9.0, 2.0, 7.0, 6.0], [2.0, 6.0, 3.0, 3.0, 2.5, 5.0, 4.0]
    cost = tt.cost_ratio(exact_costs(a), exact_costs(b))
    logs = np.log(np.array(a) / np.array(b))
    for end in np.log(cost.interval):
        refused = [scipy_stats.wilcoxon(logs - end - eps).pvalue < 0.05 for eps in (-1e-9, 1e-9)]
        assert sorted(refused) == [False, True]
    assert cost.bracket == pytest.approx((math.exp(logs.mean()),) * 2)
    back = tt.cost_ratio(exact_costs(b), exact_costs(a))
    assert back.interval == pytest.approx((1 / cost.interval[1], 1 / cost.interval[0]))


@pytest.mark.parametrize(
    ("a", "b", "outcome"),
    [
        ((4.0, 8.0), (1.0, 2.0), "upheld"),  # at least twice as long
        ((1.0, 2.0), (4.0, 8.0), "refuted"),
        ((2.0, 4.0), (1.0, 3.0), "undecided"),  # 2/3 to 4
        ((2.0, 4.0), (1.0, 2.0), "undecided"),  # 1 is possible
        ((8.0, math.inf), (1.0, 2.0), "upheld"),  # never there, and spent four times as much
        ((1.0, 2.0), (1.0, math.inf), "not testable"),
        ((0.0, 2.0), (4.0, 8.0), "refuted"),
    ],
)
def test_time_verdict__names_a_direction_only_where_no_possible_ratio_is_one(
    a: tuple[float, float], b: tuple[float, float], outcome: str
) -> None:
    assert tt.time_verdict(tt.cost_ratio([a] * 6, [b] * 6)) == outcome
    assert tt.time_verdict(tt.cost_ratio([a] * 5, [b] * 5)) in ("undecided", "not testable")


ENDS = {"full": [0.04, 0.08, 0.12, 0.16, 0.28, 0.52, 1.0], "skip": [0.125, 0.375, 1.0]}
"""Cycle ends of the two arms, in shares of the budget."""


def bracket(cost: float, ends: list[float]) -> tuple[float, float]:
    place = int(np.searchsorted(ends, cost))
    return (ends[place - 1] if place else 0.0), (ends[place] if place < len(ends) else math.inf)


@pytest.mark.parametrize("median", [0.2, 0.4, 0.5, 0.7])
@pytest.mark.parametrize("seeds", [6, 20])
def test_time_verdict__of_equal_costs_names_a_direction_in_at_most_5_percent(median: float, seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    named = 0
    for _ in range(200):
        shared = math.log(median) + rng.normal(0, 0.3, seeds)
        a, b = np.exp(shared + rng.normal(0, 0.2, (2, seeds)))
        cost = tt.cost_ratio([bracket(x, ENDS["skip"]) for x in a], [bracket(x, ENDS["full"]) for x in b])
        named += tt.time_verdict(cost) in ("upheld", "refuted")
    assert named / 200 <= 0.05


def test_time_verdict__of_a_fourfold_cost_is_longer() -> None:
    rng = np.random.default_rng(3)
    named = []
    for _ in range(100):
        b = np.exp(math.log(0.1) + rng.normal(0, 0.3, 12))
        cost = tt.cost_ratio([bracket(5 * x, ENDS["skip"]) for x in b], [bracket(x, ENDS["full"]) for x in b])
        named.append(tt.time_verdict(cost))
    assert named.count("upheld") > 80 and "refuted" not in named


@pytest.mark.parametrize("n", [5, 6, 9, 15])
def test_hodges_lehmann__is_what_wilcoxon_does_not_refuse(n: int) -> None:
    d = np.random.default_rng(n).normal(0.3, 1.0, n)
    got = s.hodges_lehmann(d)
    walsh = [(a + b) / 2 for i, a in enumerate(d) for b in d[i:]]
    assert got.mean == pytest.approx(np.median(walsh))
    if n < 6:
        assert (got.low, got.high) == (-math.inf, math.inf)
        return
    for end in (got.low, got.high):
        refused = [scipy_stats.wilcoxon(d - end - eps).pvalue < 0.05 for eps in (-1e-9, 1e-9)]
        assert sorted(refused) == [False, True]


def test_hodges_lehmann__is_not_moved_by_a_collapse() -> None:
    d = [0.1, -0.2, 0.3, 0.0, 0.2, -0.1, 0.15, -0.05]
    wild = [*d, -40.0]
    assert abs(s.hodges_lehmann(wild).mean) < 0.2 < abs(np.mean(wild))
    assert s.outliers(wild) == [8] and s.outliers(d) == []


def test_kaplan_meier__by_hand() -> None:
    # at risk 5, 4, 2: 4/5, 4/5 * 3/4, 3/5 * 1/2; the runs censored at 5 and 9 leave without an event
    times, pending = tt.kaplan_meier([3, 5, 5, 7, 9], [True, True, False, True, False])
    assert times.tolist() == [3, 5, 7]
    assert pending.tolist() == pytest.approx([0.8, 0.6, 0.3])


def test_kaplan_meier_median__half_and_beyond() -> None:
    assert tt.kaplan_meier_median([1, 2, 3, 4], [True] * 4) == 2
    assert tt.kaplan_meier_median([1, 2, 2, 2], [True, False, False, False]) is None
    assert tt.kaplan_meier_median([2, 2], [False, False]) is None


def test_restricted_mean__by_hand() -> None:
    # pending 1 to 3, .8 to 5, .6 to 7, .3 to 8
    area = 3 * 1 + 2 * 0.8 + 2 * 0.6 + 1 * 0.3
    assert tt.restricted_mean([3, 5, 5, 7, 9], [True, True, False, True, False], 8.0) == pytest.approx(area)
    assert tt.restricted_mean([6, 6], [False, False], 6.0) == 6.0
    assert tt.restricted_mean([1, 3], [True, True], 9.0) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        ([60.0, 64.0, 64.1, 64.2], 3),  # no later one more than 0.2 better
        ([60.0, 64.0, 64.1, 64.3], 7),  # 0.3 better at the end
        ([60.0, 64.0, 64.1, 64.4], None),  # only the last cycle end qualifies
        ([66.0, 64.0, 64.1, 64.4], 1),
        ([60.0], None),
        ([], None),
    ],
)
def test_epochs_to_converge__first_cycle_end_that_stays_best(accuracy: list[float], expected: float | None) -> None:
    assert tt.epochs_to_converge([1, 3, 7, 15][: len(accuracy)], accuracy) == expected


# --- verdict ----------------------------------------------------------------------------------------------------------


def _with_interval(mean: float, half_95: float, n: int = 10) -> np.ndarray:
    """Return n differences of the given mean whose 95 % paired t interval has the given half width."""
    shape = np.arange(n) - (n - 1) / 2
    sd = half_95 * math.sqrt(n) / scipy_stats.t.ppf(0.975, n - 1)
    return mean + shape / shape.std(ddof=1) * sd


@pytest.mark.parametrize(
    ("mean", "half", "outcome"),
    [
        (0.09, 0.49, "equal"),  # the pilot's four rows: same FLOPs,
        (0.99, 0.32, "not zero"),  # same images,
        (-2.47, 0.50, "worse"),  # same unfrozen epochs,
        (-0.24, 0.54, "equal"),  # long schedule
        (0.40, 0.20, "equal"),
        (-0.70, 0.20, "equal"),  # though not zero
        (0.0, 1.3, "undecided"),
        (-0.9, 0.8, "not zero"),
        (0.45, 0.60, "equal"),  # 90 % half width .60 * 1.833 / 2.262 = .486
        (0.55, 0.60, "undecided"),
        (2.0, 2.5, "undecided"),
        (2.0, 0.9, "better"),
    ],
)
def test_accuracy_verdict__rules(mean: float, half: float, outcome: str) -> None:
    verdict = s.accuracy_verdict(_with_interval(mean, half), margin=1.0)
    assert verdict.outcome == outcome
    assert (verdict.interval.low, verdict.interval.high) == pytest.approx((mean - half, mean + half))


def test_accuracy_verdict__seeds_needed_covers_both_questions() -> None:
    d = _with_interval(0.0, 3.0)
    sd = 3.0 * math.sqrt(10) / scipy_stats.t.ppf(0.975, 9)
    verdict = s.accuracy_verdict(d, margin=1.0)
    assert verdict.sd == pytest.approx(sd)
    n = verdict.seeds_needed
    assert n is not None
    assert _equivalence_power(n, sd, 1.0) >= 0.79
    rng = np.random.default_rng(0).normal(1.0, sd, (5000, n))
    assert np.mean(scipy_stats.ttest_1samp(rng, 0, axis=1).pvalue < 0.05) >= 0.79
    assert s.accuracy_verdict([0.1], margin=1.0).seeds_needed is None


@pytest.mark.parametrize("margin", [0.0, -1.0, math.nan])
def test_accuracy_verdict__needs_a_margin(margin: float) -> None:
    with pytest.raises(ValueError, match="does not matter to you"):
        s.accuracy_verdict([0.1, 0.2], margin)


def outcomes(true: float, sd: float, n: int, **options: int) -> dict[str, float]:
    """Shares of the outcomes of 3000 studies with a margin of one point."""
    draws = np.random.default_rng([n, round(100 * abs(true))]).normal(true, sd, (3000, n))
    found = [s.accuracy_verdict(row, margin=1.0, **options).outcome for row in draws]
    return {outcome: found.count(outcome) / 3000 for outcome in ("equal", "better", "worse", "not zero", "undecided")}


@pytest.mark.parametrize(("n", "sd"), [(6, 0.3), (6, 1.0), (12, 1.0), (20, 1.2)])
def test_accuracy_verdict__of_no_difference_is_wrong_in_at_most_5_percent(n: int, sd: float) -> None:
    found = outcomes(0.0, sd, n)
    assert found["better"] + found["worse"] <= 0.001 and found["not zero"] <= 0.06


@pytest.mark.parametrize(("n", "sd"), [(6, 0.5), (12, 1.0), (20, 0.7)])
def test_accuracy_verdict__of_half_the_margin_is_beyond_in_at_most_2_5_percent(n: int, sd: float) -> None:
    assert outcomes(0.5, sd, n)["better"] <= 0.025 and outcomes(0.5, sd, n)["worse"] <= 0.001
    assert outcomes(1.0, sd, n)["better"] <= 0.033  # at the margin itself: 2.5 % and the error of 3000 draws


@pytest.mark.parametrize("true", [-1.0, 1.0])
def test_accuracy_verdict__a_difference_of_the_margin_is_equal_in_at_most_5_percent(true: float) -> None:
    assert outcomes(true, 0.8, 8)["equal"] <= 0.06


def test_accuracy_verdict__comparisons_share_the_level() -> None:
    d = _with_interval(1.0, 0.9, 12)  # 95 %: from 0.1 on
    assert s.accuracy_verdict(d, 1.0).outcome == "not zero"
    shared = s.accuracy_verdict(d, 1.0, comparisons=4)
    assert shared.outcome == "undecided" and shared.interval.level == pytest.approx(0.9875)
    assert shared.interval.low < 0
    # any of four null arms is called something in at most 5 % (and 3 standard errors of 4000 studies)
    rng = np.random.default_rng(2)
    wrong = [
        any(s.accuracy_verdict(rng.normal(0, 3, 10), 1.0, comparisons=4).outcome != "undecided" for _ in range(4))
        for _ in range(4000)
    ]
    assert 0.03 <= np.mean(wrong) <= 0.06


@pytest.mark.parametrize(("comparisons", "least"), [(1, 6), (2, 7), (4, 8), (5, 8), (18, 10)])
def test_accuracy_verdict__fewer_seeds_than_holm_needs_decide_nothing(comparisons: int, least: int) -> None:
    assert s.fewest_seeds(comparisons) == least
    assert s.holm([2 / 2**least] * comparisons).max() <= 0.05 < s.holm([2 / 2 ** (least - 1)] * comparisons).max()
    far = [5.0 + 0.01 * i for i in range(least)]
    assert s.accuracy_verdict(far, 1.0, comparisons=comparisons).outcome == "better"
    assert s.accuracy_verdict(far[1:], 1.0, comparisons=comparisons).outcome == "undecided"


# --- looking more than once -------------------------------------------------------------------------------------------


def test_spent_alpha__is_the_spending_function_and_adds_up() -> None:
    levels = s.spent_alpha([6, 12, 18])
    # 2 (1 - Phi(1.959964 / sqrt(share))) at 1/3, 2/3 and 1: .00069, .01638, .05
    assert np.cumsum(levels) == pytest.approx([0.00069, 0.01638, 0.05], abs=1e-5)


def test_spent_alpha__holds_the_error_of_all_looks_together() -> None:
    looks = [6, 9, 12]
    levels, rng = s.spent_alpha(looks), np.random.default_rng(4)
    planned = naive = 0
    for row in rng.normal(0, 2.0, (1200, looks[-1])):
        found = [s.accuracy_verdict(row[:n], 1.0, alpha=level).outcome for n, level in zip(looks, levels, strict=True)]
        planned += any(outcome in ("not zero", "better", "worse") for outcome in found)
        naive += any(s.accuracy_verdict(row[:n], 1.0).interval.excludes_zero() for n in looks)
    assert planned / 1200 <= 0.055 < naive / 1200


# --- a pilot's spread ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sd", [1.0])
def test_sd_limit__gives_a_number_of_seeds_with_its_power(sd: float) -> None:
    rng = np.random.default_rng(5)
    powers: dict[str, list[float]] = {"limit": [], "estimate": []}
    for _ in range(40):
        pilot = rng.normal(0, sd, 5)
        for name, spread in (("limit", s.sd_limit(pilot)), ("estimate", float(pilot.std(ddof=1)))):
            n = max(6, s.seeds_to_detect(spread, 1.0) or 0, s.seeds_for_equivalence(spread, 1.0) or 0)
            powers[name].append(_power(1 / sd, n, 0.05))
    assert np.mean(powers["limit"]) >= 0.8
    assert np.mean(np.array(powers["limit"]) >= 0.8) >= 0.7 > np.mean(np.array(powers["estimate"]) >= 0.8)


def test_seeds_needed__counts_the_images_and_says_where_they_forbid_it() -> None:
    assert s.seeds_to_detect(1.0, 1.0, image_variance=0.05) > s.seeds_to_detect(1.0, 1.0)  # type: ignore[operator]
    # 1 / 0.36 = 2.8 standard errors are what 80 % power at 5 % takes with any number of seeds (1.96 + 0.84)
    assert s.seeds_to_detect(1.0, 1.0, image_variance=0.36**2) is None
    assert s.seeds_to_detect(1.0, 1.0, image_variance=0.35**2) is not None
    few = s.Effect(0.0, 10, 1.0, image_variance=0.5)
    assert s.accuracy_verdict(few, 1.0).seeds_needed is None


def test_power__with_images_is_that_of_simulated_studies() -> None:
    effect = s.Effect(0.0, 8, 1.0, image_variance=0.09)
    rng = np.random.default_rng(6)
    found = []
    for _ in range(4000):
        d = 1.0 + rng.normal(0, 1, 8) + rng.normal(0, 0.3)
        got = s.Effect(float(d.mean()), 8, float(d.var(ddof=1)), 0.09)
        found.append(got.interval().excludes_zero())
    assert s.power_to_detect(effect, 1.0, 8) == pytest.approx(np.mean(found), abs=0.02)


def test_overlap_factor__is_the_variance_of_a_mean_of_sums_over_shared_images() -> None:
    """A seed's difference as a sum over the images it drew; another collection is another draw of all."""
    rng = np.random.default_rng(7)
    pool, drawn, seeds = 60, 40, 6
    inside, means = [], []
    for _ in range(3000):
        part = rng.normal(0, 1, pool)
        d = [part[rng.permutation(pool)[:drawn]].mean() for _ in range(seeds)]
        inside.append(np.var(d, ddof=1) / seeds)
        means.append(np.mean(d))
    assert math.sqrt(np.var(means) / np.mean(inside)) == pytest.approx(s.overlap_factor(seeds, drawn / pool), rel=0.05)


# --- across data sets -------------------------------------------------------------------------------------------------


def test_merge_effects__homogeneous_sets_give_the_inverse_variance_mean() -> None:
    merged = across.merge_effects([0.5, 0.5, 0.5], [0.1, 0.2, 0.4])
    assert merged.effect.mean == pytest.approx(0.5)
    assert merged.tau == pytest.approx(0.0, abs=1e-3) and merged.i2 == 0.0
    # weights 100, 25, 6.25; t(.975, 2) = 4.302653
    assert merged.effect.high - 0.5 == pytest.approx(4.302653 / math.sqrt(131.25))


def test_merge_effects__heterogeneity_by_hand() -> None:
    # equal errors .1, effects -1 and 1: Q = 2 / .01 = 200; REML: tau2 = sample variance 2 less .01
    merged = across.merge_effects([-1.0, 1.0], [0.1, 0.1])
    assert merged.tau == pytest.approx(math.sqrt(1.99), abs=1e-3)
    assert merged.i2 == pytest.approx(199 / 200)
    assert merged.effect.low == pytest.approx(-12.7062, rel=1e-3)  # t(.975, 1) * sqrt(2 / 2)


def test_merge_effects__of_studies_within_sets_is_the_mixed_model_of_statsmodels() -> None:
    """With equal sampling errors next to nothing, the model is a random intercept per data set."""
    rng = np.random.default_rng(8)
    sets = np.repeat(np.arange(8), 3)
    y = 0.5 + rng.normal(0, 1, 8)[sets] + rng.normal(0, 0.4, 24)
    fitted = mixedlm("y ~ 1", pd.DataFrame({"y": y}), groups=sets).fit(reml=True)
    got = across.merge_effects(y, [1e-3] * 24, [str(name) for name in sets])
    assert got.effect.mean == pytest.approx(fitted.params["Intercept"], abs=1e-3)
    assert got.tau == pytest.approx(math.sqrt(fitted.cov_re.iloc[0, 0]), rel=0.02)
    assert got.tau_within == pytest.approx(math.sqrt(fitted.scale), rel=0.02)
    assert (got.datasets, got.studies) == (8, 24)
    half = got.effect.high - got.effect.mean
    assert half == pytest.approx(scipy_stats.t.ppf(0.975, 7) * fitted.bse["Intercept"], rel=0.02)


def test_merge_effects__backbones_on_the_same_photos_are_no_more_data_sets() -> None:
    two = across.merge_effects([-1.0, 1.0], [0.1, 0.1])
    four = across.merge_effects([-1.0, -1.0, 1.0, 1.0], [0.1] * 4, ["a", "a", "b", "b"])
    assert four.effect.high == pytest.approx(two.effect.high, rel=0.02)


@pytest.mark.parametrize(("tau", "within"), [(0.5, 0.5)])
def test_merge_effects__covers_at_least_what_it_says(tau: float, within: float) -> None:
    rng = np.random.default_rng(9)
    held = []
    for _ in range(60):
        y = 0.7 + rng.normal(0, tau, 4).repeat(2) + rng.normal(0, within, 8) + rng.normal(0, 0.5, 8)
        effect = across.merge_effects(y, [0.5] * 8, [f"set {i // 2}" for i in range(8)]).effect
        held.append(effect.low < 0.7 < effect.high)
    assert np.mean(held) >= 0.92


@pytest.mark.parametrize(("effects", "errors"), [([1.0], [0.1]), ([1.0, 2.0], [0.1, 0.0]), ([1.0, 2.0], [0.1])])
def test_merge_effects__refuses_what_cannot_be_merged(effects: list[float], errors: list[float]) -> None:
    with pytest.raises(ValueError, match="two or more data sets"):
        across.merge_effects(effects, errors)


def test_rank_arms__published_critical_values() -> None:
    # Demsar 2006, table 5: q.05 = 2.343 for 3 classifiers, 2.569 for 4
    for arms, q in ((3, 2.343), (4, 2.569)):
        scores = np.random.default_rng(0).random((10, arms))
        expected = q * math.sqrt(arms * (arms + 1) / 60)
        assert across.rank_arms(scores).critical_difference == pytest.approx(expected, rel=1e-3)


def test_rank_arms__ranks_and_p_by_hand() -> None:
    scores = np.tile([0.9, 0.8, 0.7], (6, 1))
    ranking = across.rank_arms(scores)
    assert ranking.mean_ranks.tolist() == [1, 2, 3]
    # chi2 = 12 N / (K (K + 1)) * sum (R - 2)^2 = 12 * 6 / 12 * 2 = 12 with 2 degrees: exp(-6)
    assert ranking.p == pytest.approx(math.exp(-6))


@pytest.mark.parametrize("shape", [(5, 4), (6, 2), (1, 4)])
def test_rank_arms__refuses_few_data_sets_and_says_why(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="Seeds are not data sets"):
        across.rank_arms(np.random.default_rng(0).random(shape))
