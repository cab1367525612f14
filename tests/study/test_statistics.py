from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from lightning_unfreeze.study.judge import statistics as s

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
    assert s.tost_p(d, 1.0) == pytest.approx(DescrStatsW(d).ttost_mean(-1.0, 1.0)[0])


@given(POINTS, st.sampled_from([0.5, 1.0, 2.0]))
def test_tost__is_the_90_percent_interval_inside_the_margin(d: list[float], margin: float) -> None:
    interval = s.paired_t_interval(d, 0.90)
    if min(abs(margin - abs(interval.low)), abs(margin - abs(interval.high))) > 1e-6:
        assert (s.tost_p(d, margin) < 0.05) == interval.within(margin)


def test_probability_better__wilson_by_hand() -> None:
    # 8 of 10, z = 1.959964: centre (p + z2/2n) / (1 + z2/n), half z sqrt(p q/n + z2/4n2) / (1 + z2/n)
    z2 = 1.959964**2
    centre = (0.8 + z2 / 20) / (1 + z2 / 10)
    half = math.sqrt(z2) * math.sqrt(0.016 + z2 / 400) / (1 + z2 / 10)
    got = s.probability_better([1] * 7 + [0, 0, -1])
    assert (got.mean, got.low, got.high) == pytest.approx((0.8, centre - half, centre + half), abs=1e-6)


# --- two levels: seeds and test images --------------------------------------------------------------------------------


def test_total_interval__is_the_crossed_bootstrap() -> None:
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.2, 0.9, 250)
    a, b = rng.random((12, 250)) < hard + 0.05, rng.random((12, 250)) < hard
    d = a.astype(float) - b
    draws = [d[np.ix_(rng.integers(0, 12, 12), rng.integers(0, 250, 250))].mean() for _ in range(6000)]
    got = s.total_interval(a, b)
    assert got.mean == pytest.approx(100 * d.mean())
    assert (got.high - got.mean) / 1.959964 == pytest.approx(100 * np.std(draws), rel=0.04)


def test_total_interval__covers_and_the_seed_interval_does_not() -> None:
    # Two arms that differ by chance alone on each image: on new images their true difference is 0.
    rng = np.random.default_rng(5)
    total = seed = 0
    for _ in range(400):
        image_effect = rng.normal(0, 0.25, 300)
        p_a, p_b = np.clip(0.6 + image_effect, 0, 1), np.clip(0.6 - image_effect, 0, 1)
        a, b = rng.random((10, 300)) < p_a, rng.random((10, 300)) < p_b
        total += not s.total_interval(a, b).excludes_zero()
        seed += not s.paired_t_interval(100 * (a.mean(1) - b.mean(1))).excludes_zero()
    assert total / 400 >= 0.93
    assert seed / 400 < 0.80


def test_total_interval__never_narrower_than_over_seeds() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random((3, 4000)) < np.array([[0.6], [0.7], [0.8]]), rng.random((3, 4000)) < 0.6
    seeds = s.paired_t_interval(100 * (a.mean(1) - b.mean(1)))
    total = s.total_interval(a, b)
    assert (total.low, total.high) == pytest.approx((seeds.low, seeds.high))


def test_total_interval__refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 5\) and \(2, 6\)"):
        s.total_interval(np.ones((2, 5)), np.ones((2, 6)))


@pytest.mark.parametrize(
    ("n_test", "row"), [(360, (1.18, 1.67, 2.36)), (2000, (0.50, 0.71, 1.00)), (10000, (0.22, 0.32, 0.45))]
)
def test_image_standard_error__table(n_test: int, row: tuple[float, ...]) -> None:
    got = [s.image_standard_error(q, n_test) for q in (0.05, 0.10, 0.20)]
    assert got == pytest.approx(row, abs=0.0051)


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


@pytest.mark.parametrize(
    ("effect", "n", "alpha"), [(0.3, 20, 0.05), (1.0, 5, 0.05), (0.8, 12, 0.05 / 8), (0.0, 3, 0.05)]
)
def test_paired_t_power__equals_statsmodels(effect: float, n: int, alpha: float) -> None:
    assert s.paired_t_power(effect, n, alpha) == pytest.approx(TTestPower().power(effect, n, alpha), abs=2e-4)
    assert s.paired_t_power(-effect, n, alpha) == s.paired_t_power(effect, n, alpha)


def test_detectable_difference__has_the_stated_power() -> None:
    shift = s.detectable_difference(sd=1.2, seeds=10)
    d = np.random.default_rng(0).normal(shift, 1.2, (20_000, 10))
    assert np.mean(scipy_stats.ttest_1samp(d, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.01)


# --- cost to target ---------------------------------------------------------------------------------------------------


def test_cost_ratio__log_scale_by_hand() -> None:
    # log ratios log 2 and log 8: mean log 4, sd of (1, 3) log 2 = sqrt(2) log 2, so the error is log 2
    cost = s.cost_ratio([2.0, 8.0], [1.0, 1.0])
    assert cost.ratio is not None
    assert cost.ratio.mean == pytest.approx(4.0)
    assert math.log(cost.ratio.high / cost.ratio.mean) == pytest.approx(12.7062 * math.log(2), rel=1e-4)  # t(.975, 1)


def test_cost_ratio__swapping_the_arms_inverts_it() -> None:
    a, b = [3.0, 5.0, 4.0, 9.0], [2.0, 6.0, 3.0, 3.0]
    forward, back = s.cost_ratio(a, b).ratio, s.cost_ratio(b, a).ratio
    assert forward is not None and back is not None
    assert (back.mean, back.low, back.high) == pytest.approx((1 / forward.mean, 1 / forward.high, 1 / forward.low))


@pytest.mark.parametrize(("reached", "testable"), [(7, True), (6, False)])
def test_cost_ratio__is_testable_from_70_percent_on(reached: int, testable: bool) -> None:
    a = [2.0 + i for i in range(reached)] + [math.nan] * (10 - reached)
    for cost in (s.cost_ratio(a, [1.0] * 10), s.cost_ratio([1.0] * 10, a)):
        assert cost.testable is testable
        assert (cost.pairs, cost.runs) == (reached, 10)
        assert (s.time_verdict(cost) == "not testable") is not testable


def test_cost_ratio__no_pair_reached() -> None:
    cost = s.cost_ratio([math.nan, 1.0], [1.0, math.nan])
    assert cost.ratio is None and s.time_verdict(cost) == "not testable"


@pytest.mark.parametrize(
    ("a", "outcome"), [([2.0, 2.1, 1.9], "upheld"), ([0.5, 0.52, 0.48], "refuted"), ([0.8, 1.3, 1.0], "undecided")]
)
def test_time_verdict__compares_the_interval_with_one(a: list[float], outcome: str) -> None:
    assert s.time_verdict(s.cost_ratio(a, [1.0, 1.0, 1.0])) == outcome


def test_kaplan_meier__by_hand() -> None:
    # at risk 5, 4, 2: 4/5, 4/5 * 3/4, 3/5 * 1/2; the runs censored at 5 and 9 leave without an event
    times, pending = s.kaplan_meier([3, 5, 5, 7, 9], [True, True, False, True, False])
    assert times.tolist() == [3, 5, 7]
    assert pending.tolist() == pytest.approx([0.8, 0.6, 0.3])


def test_kaplan_meier_median__half_and_beyond() -> None:
    assert s.kaplan_meier_median([1, 2, 3, 4], [True] * 4) == 2
    assert s.kaplan_meier_median([1, 2, 2, 2], [True, False, False, False]) is None
    assert s.kaplan_meier_median([2, 2], [False, False]) is None


def test_restricted_mean__by_hand() -> None:
    # pending 1 to 3, .8 to 5, .6 to 7, .3 to 8
    area = 3 * 1 + 2 * 0.8 + 2 * 0.6 + 1 * 0.3
    assert s.restricted_mean([3, 5, 5, 7, 9], [True, True, False, True, False], 8.0) == pytest.approx(area)
    assert s.restricted_mean([6, 6], [False, False], 6.0) == 6.0
    assert s.restricted_mean([1, 3], [True, True], 9.0) == pytest.approx(2.0)


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
    assert s.epochs_to_converge([1, 3, 7, 15][: len(accuracy)], accuracy) == expected


# --- verdict ----------------------------------------------------------------------------------------------------------


def _with_interval(mean: float, half_95: float, n: int = 10) -> np.ndarray:
    """Return n differences of the given mean whose 95 % paired t interval has the given half width."""
    shape = np.arange(n) - (n - 1) / 2
    sd = half_95 * math.sqrt(n) / scipy_stats.t.ppf(0.975, n - 1)
    return mean + shape / shape.std(ddof=1) * sd


@pytest.mark.parametrize(
    ("mean", "half", "outcome"),
    [
        (0.09, 0.49, "upheld"),  # the pilot's four rows: same FLOPs,
        (0.99, 0.32, "refuted+"),  # same images,
        (-2.47, 0.50, "refuted-"),  # same unfrozen epochs,
        (-0.24, 0.54, "upheld"),  # long schedule
        (0.40, 0.20, "small"),
        (-0.70, 0.20, "small"),  # equivalence comes before "refuted"
        (0.0, 1.3, "undecided"),
        (-0.9, 0.8, "refuted-"),
        (0.45, 0.60, "upheld"),  # 90 % half width .60 * 1.833 / 2.262 = .486
        (0.55, 0.60, "undecided"),
        (2.0, 2.5, "undecided"),
    ],
)
def test_accuracy_verdict__rules(mean: float, half: float, outcome: str) -> None:
    verdict = s.accuracy_verdict(_with_interval(mean, half), margin=1.0)
    assert verdict.outcome == outcome
    assert verdict.upheld == (outcome in ("upheld", "small"))
    assert (verdict.interval.low, verdict.interval.high) == pytest.approx((mean - half, mean + half))


@given(POINTS, st.sampled_from([0.5, 1.0, 2.0]))
def test_accuracy_verdict__a_mean_below_half_the_margin_refutes_nothing(d: list[float], margin: float) -> None:
    if abs(np.mean(d)) < margin / 2:
        assert not s.accuracy_verdict(d, margin).outcome.startswith("refuted")


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


@pytest.mark.parametrize(("n", "sd"), [(3, 0.3), (3, 1.0), (5, 1.0), (10, 1.0), (20, 1.2)])
def test_accuracy_verdict__a_null_study_is_refuted_in_at_most_5_percent(n: int, sd: float) -> None:
    draws = np.random.default_rng(n).normal(0, sd, (2000, n))
    outcomes = [s.accuracy_verdict(row, margin=1.0).outcome for row in draws]
    assert np.mean([o.startswith("refuted") for o in outcomes]) <= 0.05


@pytest.mark.parametrize("true", [-1.0, 1.0])
def test_accuracy_verdict__a_difference_of_the_margin_is_upheld_in_at_most_5_percent(true: float) -> None:
    draws = np.random.default_rng(7).normal(true, 0.8, (3000, 8))
    assert np.mean([s.accuracy_verdict(row, margin=1.0).upheld for row in draws]) <= 0.06


# --- across data sets -------------------------------------------------------------------------------------------------


def test_merge_effects__homogeneous_sets_give_the_inverse_variance_mean() -> None:
    merged = s.merge_effects([0.5, 0.5, 0.5], [0.1, 0.2, 0.4])
    assert merged.effect.mean == pytest.approx(0.5)
    assert (merged.tau, merged.i2, merged.q_p) == (0.0, 0.0, pytest.approx(1.0))
    # weights 100, 25, 6.25; t(.975, 2) = 4.302653
    assert merged.effect.high - 0.5 == pytest.approx(4.302653 / math.sqrt(131.25))


def test_merge_effects__heterogeneity_by_hand() -> None:
    # equal errors .1, effects -1 and 1: Q = 2 / .01 = 200; Paule-Mandel: sum d2 / (tau2 + .01) = 1, so tau2 = 1.99
    merged = s.merge_effects([-1.0, 1.0], [0.1, 0.1])
    assert merged.tau == pytest.approx(math.sqrt(1.99), abs=1e-3)
    assert merged.i2 == pytest.approx(199 / 200)
    assert merged.q_p < 1e-20
    assert merged.effect.low == pytest.approx(-12.7062, rel=1e-3)  # t(.975, 1) * sqrt(2 / 2)


@pytest.mark.parametrize(("effects", "errors"), [([1.0], [0.1]), ([1.0, 2.0], [0.1, 0.0]), ([1.0, 2.0], [0.1])])
def test_merge_effects__refuses_what_cannot_be_merged(effects: list[float], errors: list[float]) -> None:
    with pytest.raises(ValueError, match="two or more data sets"):
        s.merge_effects(effects, errors)


def test_rank_arms__published_critical_values() -> None:
    # Demsar 2006, table 5: q.05 = 2.343 for 3 classifiers, 2.569 for 4
    for arms, q in ((3, 2.343), (4, 2.569)):
        scores = np.random.default_rng(0).random((10, arms))
        expected = q * math.sqrt(arms * (arms + 1) / 60)
        assert s.rank_arms(scores).critical_difference == pytest.approx(expected, rel=1e-3)


def test_rank_arms__ranks_and_p_by_hand() -> None:
    scores = np.tile([0.9, 0.8, 0.7], (6, 1))
    ranking = s.rank_arms(scores)
    assert ranking.mean_ranks.tolist() == [1, 2, 3]
    # chi2 = 12 N / (K (K + 1)) * sum (R - 2)^2 = 12 * 6 / 12 * 2 = 12 with 2 degrees: exp(-6)
    assert ranking.p == pytest.approx(math.exp(-6))


@pytest.mark.parametrize("shape", [(5, 4), (6, 2), (1, 4)])
def test_rank_arms__refuses_few_data_sets_and_says_why(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="Seeds are not data sets"):
        s.rank_arms(np.random.default_rng(0).random(shape))
