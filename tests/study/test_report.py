from __future__ import annotations

import dataclasses
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from lightning_unfreeze.study.judge.analysis import Analysis, StudyInfo
from lightning_unfreeze.study.judge.statistics import accuracy_verdict
from lightning_unfreeze.study.judge.verdict import exit_code, judge
from lightning_unfreeze.study.judge.words import outcome_words
from lightning_unfreeze.study.runs.records import CurvePoint, RunRecord, pack_correct
from lightning_unfreeze.study.show.accuracy_plots import forest
from lightning_unfreeze.study.show.plots import PLOTS
from lightning_unfreeze.study.show.report import write_report
from lightning_unfreeze.study.show.tables import comparison_table, cost_table, pairwise_table

N_TEST = 1000
INFO = StudyInfo("pets", 500, N_TEST, "resnet18", "ImageNet")
CORE = ("full9", "skip34@epochs", "skip34@images", "skip34@flops", "lp_only")
# Per arm: epochs of its cycles, and GFLOP of one epoch. `full9` has five cheap epochs before the seven unfrozen ones.
CYCLES = {"full9": (5, 1, 2, 4), "skip34@epochs": (1, 2, 4), "skip34@images": (1, 2, 4, 5), "skip34@flops": (1, 2, 5)}
TARGET_CURVE = {"full9": (50.0, 57.0, 59.5, 60.0)}


def run(arm: str, seed: int, acc: float, **changes: object) -> RunRecord:
    """Return a run with the given accuracy (points); its curve climbs to that accuracy over the arm's cycles."""
    correct = np.zeros(N_TEST, dtype=bool)
    correct[np.random.default_rng(seed).permutation(N_TEST)[: round(acc * N_TEST / 100)]] = True
    cycles = CYCLES.get(arm, (1, 2, 4))
    points, epoch, flops = [], 0, 0.0
    for i, cycle in enumerate(cycles):
        for step in range(cycle):
            epoch += 1
            flops += 1e9 * (0.3 if arm == "full9" and i == 0 else 1.5)
            end = step == cycle - 1
            value = acc - 4 * (len(cycles) - 1 - i) - (0 if end else 8)
            points.append(CurvePoint(epoch, 500 * epoch, flops, 0.1 * epoch, value / 100, f"stage{i}", end))
    values: dict[str, object] = {
        "key": f"{arm}-{seed}",
        "arm": arm,
        "seed": seed,
        "dataset": "pets",
        "acc": float(correct.mean()),
        "n_test": N_TEST,
        "correct": pack_correct(correct),
        "images": 500 * epoch,
        "flops": flops,
        "seconds": 0.1 * epoch,
        "curve": tuple(points),
        "lr_trace": {"stem": ((0.0, 0.01), (1.0, 0.0)), "head": ((0.0, 0.1), (1.0, 0.0))},
        "distortion": {"displacement": 0.3},
        "probe_images_per_second": 1000.0,
        "tuned_lr": 0.1,
        "tuning_curve": ((0.03, 0.5), (0.1, 0.52), (0.3, 0.51)),
        "code_version": "1",
    }
    return RunRecord(**{**values, **changes})  # type: ignore[arg-type]


def study(effects: dict[str, float], seeds: int = 8, sd: float = 0.4, arms: tuple[str, ...] = CORE) -> list[RunRecord]:
    """Return runs around 60 points with the arms' true effects, a shared seed deviation of 1 point and `sd` per run."""
    rng = np.random.default_rng(3)
    shared = rng.normal(0, 1, seeds)
    return [
        run(arm, seed, 60 + effects.get(arm, 0.0) + shared[seed] + sd * rng.normal())
        for arm in arms
        for seed in range(seeds)
    ]


def exact(differences: dict[str, list[float]]) -> list[RunRecord]:
    """Return runs whose accuracy differs from the reference's 60 points by exactly these points, one per seed."""
    seeds = len(next(iter(differences.values())))
    runs = [run("full9", seed, 60.0) for seed in range(seeds)]
    return runs + [run(arm, seed, 60.0 + d) for arm, values in differences.items() for seed, d in enumerate(values)]


class Page(HTMLParser):
    """Counts what a page holds and collects what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


# --- analysis ---------------------------------------------------------------------------------------------------------


def test_analysis__pairs_by_seed_and_counts_in_points() -> None:
    records = [
        run("full9", 0, 60),
        run("full9", 1, 61),
        run("full9", 2, 62),
        run("skip34@flops", 2, 61),
        run("skip34@flops", 1, 63),
    ]
    comparison = Analysis([*records, run("skip34@flops", 9, 1)], INFO).comparisons["skip34@flops"]
    assert comparison.seeds == (1, 2)
    assert comparison.differences.tolist() == pytest.approx([2.0, -1.0])
    assert comparison.p_holm is None


def test_analysis__disagreement_counts_images_that_only_one_arm_gets_right() -> None:
    a = run("full9", 0, 50.0, correct=pack_correct([1] * 500 + [0] * 500))
    b = run("skip34@flops", 0, 50.0, correct=pack_correct([0] * 100 + [1] * 500 + [0] * 400))
    assert Analysis([a, b], INFO).comparisons["skip34@flops"].disagreement == pytest.approx(0.2)


def test_analysis__target_is_the_best_mean_cycle_end_less_one_point() -> None:
    # curves end at 60 and 62 and fall by 4 points a cycle before; in-cycle points lie 8 lower and must not count
    assert Analysis([run("full9", 0, 60.0), run("full9", 1, 62.0)], INFO).target == pytest.approx(0.60)


def test_analysis__target_ignores_epochs_that_only_some_runs_reached() -> None:
    short = run("full9", 1, 50.0)
    short = dataclasses.replace(short, curve=short.curve[:8])  # stops after the third cycle, at 46
    long = run("full9", 0, 60.0)  # 56 there, 60 at the end
    assert Analysis([short, long], INFO).target == pytest.approx((46 + 56) / 200 - 0.01)


def test_analysis__cost_is_read_at_the_first_cycle_end_that_reaches_the_target() -> None:
    reference, skip = run("full9", 0, 60.0), run("skip34@flops", 0, 63.5)  # cycle ends at 55.5, 59.5, 63.5
    analysis = Analysis([reference, skip], INFO)  # target 59
    assert analysis.cost(skip, "epochs") == (3, True)
    assert analysis.cost(skip, "images") == (1500, True)
    assert analysis.cost(skip, "flops") == (pytest.approx(4.5e9), True)
    assert analysis.cost(reference, "flops") == (pytest.approx(5 * 0.3e9 + 7 * 1.5e9), True)
    assert analysis.cost(run("skip34@flops", 1, 58.9), "epochs") == (8, False)


def test_analysis__a_cost_lies_between_two_cycle_ends() -> None:
    # skip: met by epoch 3, not at 1; reference: met by epoch 12, not at 8
    analysis = Analysis([run("full9", 0, 60.0), run("skip34@flops", 0, 63.5)], INFO)
    assert analysis.bracket(analysis.runs["skip34@flops"][0], "epochs") == (1, 3)
    assert analysis.bracket(analysis.runs["full9"][0], "epochs") == (8, 12)
    assert analysis.bracket(run("skip34@flops", 1, 50.0), "epochs") == (8, math.inf)
    assert analysis.comparisons["skip34@flops"].costs["epochs"].bracket == pytest.approx((1 / 12, 3 / 8))


def test_analysis__tuning_is_charged_where_it_is_asked_for() -> None:
    tuned = run("skip34@flops", 0, 63.5, tuning_images=4000, tuning_flops=2e9, tuning_seconds=7.0)
    records = [run("full9", 0, 60.0), tuned]
    charged = Analysis(records, dataclasses.replace(INFO, charge_tuning=True))
    assert Analysis(records, INFO).bracket(tuned, "images") == (500, 1500)
    assert charged.bracket(tuned, "images") == (4500, 5500) and charged.bracket(tuned, "epochs") == (9, 11)
    assert charged.bracket(tuned, "flops") == (pytest.approx(3.5e9), pytest.approx(6.5e9))
    assert charged.bracket(tuned, "seconds") == (pytest.approx(7.1), pytest.approx(7.3))


def test_analysis__secondary_arms_share_the_level_everywhere() -> None:
    analysis = Analysis(study({"lp_only": -5.0, "skip34@images": 0.9}, seeds=9), INFO)
    comparisons = analysis.comparisons  # three arms beside the primary one
    levels = {arm: c.verdict.interval.level for arm, c in comparisons.items()}
    assert levels.pop("skip34@flops") == pytest.approx(0.95) and set(levels.values()) == {1 - 0.05 / 3}
    rows = comparison_table(analysis).data.set_index("arm")
    drawn = forest(analysis)
    assert drawn is not None
    frame, texts = drawn[1].set_index("arm"), [text.get_text() for text in drawn[0].axes[0].texts]
    for arm, c in comparisons.items():
        want = (c.verdict.interval.low, c.verdict.interval.high, c.verdict.outcome)
        assert (rows.loc[arm].low, rows.loc[arm].high, rows.loc[arm].outcome) == want
        assert (frame.loc[arm].low, frame.loc[arm].high, frame.loc[arm].outcome) == want
        assert f"{c.verdict.interval.mean:+.2f}  {outcome_words(c.verdict)}" in texts
        assert c.these_images.level == c.verdict.interval.level
    few = Analysis(study({"lp_only": -5.0}, seeds=6), INFO).comparisons
    # 3 x 2 / 2**6 = .094: Holm cannot reach .05, so nothing is decided but the primary
    assert few["lp_only"].verdict.outcome == "undecided" and few["lp_only"].p_holm == pytest.approx(3 * 2 / 64)


def test_analysis__headline_counts_the_images_and_everything_follows_it(tmp_path: Path) -> None:
    """Arms that differ on the same few images in every seed: no spread over seeds, much over images."""
    right = np.arange(N_TEST) < 600
    other = right.copy()
    other[:32], other[600:620] = False, True
    records = [run("full9", s, 60, correct=pack_correct(right)) for s in range(8)]
    records += [run("skip34@flops", s, 58.8, correct=pack_correct(other)) for s in range(8)]
    comparison = Analysis(records, INFO).comparisons["skip34@flops"]
    assert comparison.these_images.high < -1  # seeds alone: surely worse by more than a point
    # 52 discordant images: sd of +-1 with mean -.012 over 1000 images
    error = 100 * math.sqrt((0.052 - 0.012**2) / 999)
    assert comparison.verdict.effect.error == pytest.approx(error, rel=1e-3)
    assert comparison.verdict.outcome == "undecided"
    verdict = write_report(Analysis(records, INFO), tmp_path)
    assert verdict.outcome == "undecided" and exit_code(verdict) == 4 and "UNDECIDED" in verdict.headline[0]
    html = (tmp_path / "report.html").read_text()
    assert "color: #555555" in html and ">UNDECIDED" in html


def test_analysis__flags_an_outlying_pair_and_a_collapsed_run() -> None:
    differences = [0.1, -0.1, 0.2, 0.0, -0.2, 0.1, -30.0, 0.0]
    analysis = Analysis(exact({"skip34@flops": differences}), INFO)
    assert analysis.comparisons["skip34@flops"].outliers == (6,) and analysis.collapsed == {"skip34@flops": (6,)}
    verdict = judge(analysis)
    assert abs(analysis.comparisons["skip34@flops"].robust.mean) < 0.2
    assert any("Outliers: the pairs of seeds 6 lie far off" in change for change in verdict.changes)
    assert any("Collapsed runs: skip34@flops, seeds 6" in limit for limit in verdict.limits)
    assert "the primary, Hodges-Lehmann     : " in verdict.text


@pytest.mark.parametrize(
    ("planned", "looks", "seeds", "starts", "alpha"),
    [
        ((), (), 6, "", 0.05),
        (tuple(range(6)), (), 6, "", 0.05),
        (tuple(range(8)), (), 6, "NOT FINISHED: 6 of 8 planned seeds", 0.0),
        (tuple(range(4)), (), 6, "EXTENDED AFTER A LOOK: 4 seeds were planned, 2 more", 0.05),
        (tuple(range(12)), (6, 12), 6, "Planned look at 6 seeds", 0.005574597),
        (tuple(range(12)), (8, 12), 6, "NOT FINISHED", 0.0),
    ],
)
def test_look__only_what_was_planned_decides(
    planned: tuple[int, ...], looks: tuple[int, ...], seeds: int, starts: str, alpha: float
) -> None:
    records = exact({"skip34@flops": [-2.5 + s for s in SPREAD[:seeds]]})
    info = dataclasses.replace(INFO, planned_seeds=planned, looks=looks)
    verdict = judge(Analysis(records, info))
    assert Analysis(records, info).look.alpha == pytest.approx(alpha, abs=1e-8)
    assert verdict.note.startswith(starts) and verdict.text.startswith(starts or "Verdict: ")
    assert verdict.outcome == ("undecided" if alpha == 0 else "worse")


def test_verdict__says_what_a_step_of_the_grid_would_do() -> None:
    records = exact({"skip34@flops": SPREAD})
    # .1 is best in the table of `run`: its neighbours lose 2 and 1 points
    assert Analysis(records, INFO).beside_best_rate("full9") == pytest.approx([2.0, 1.0])
    (said,) = [change for change in judge(Analysis(records, INFO)).changes if "one step of the grid" in change]
    assert "between -2.0 (worse by more than 1 pt) and +2.0 pt (better by more than 1 pt)" in said


def test_verdict__says_how_many_training_images_seeds_share() -> None:
    records = exact({"skip34@flops": SPREAD})
    limits = " ".join(judge(Analysis(records, dataclasses.replace(INFO, overlap=0.5))).limits)
    # sqrt(1 + 6 x .5 / .5) = 2.6
    assert "share 50% of their training images" in limits and "up to 2.6 times as wide" in limits
    all_of_them = " ".join(judge(Analysis(records, dataclasses.replace(INFO, overlap=1.0))).limits)
    assert "All seeds train on the same images" in all_of_them


def test_analysis__shifted_images_are_a_secondary_verdict_of_their_own() -> None:
    def shifted(record: RunRecord, lost: int) -> RunRecord:
        right = record.correct_bits().copy()
        right[np.flatnonzero(right)[:lost]] = False
        same = {name: pack_correct(right) for name in ("noise", "blur")}
        return dataclasses.replace(record, correct_shifted=same, acc_ood=float(right.mean()))

    records = [shifted(r, 100 if r.arm == "skip34@flops" else 50) for r in exact({"skip34@flops": SPREAD})]
    found = Analysis(records, INFO).comparisons["skip34@flops"].shifted
    assert found is not None and found.interval.mean == pytest.approx(-5.0) and found.outcome == "worse"
    verdict = judge(Analysis(records, INFO))
    assert "on shifted images (secondary)   : -5.00 pt" in verdict.text and verdict.outcome == "equal"


def test_analysis__an_early_look_asks_for_the_seeds_of_the_whole_study() -> None:
    records = exact({"skip34@flops": [-3.0, 3.0, -1.5, 1.5, 0.4, -5.0]})
    early = Analysis(records, dataclasses.replace(INFO, planned_seeds=tuple(range(12)), looks=(6, 12)))
    late = Analysis(records, dataclasses.replace(INFO, planned_seeds=tuple(range(6))))
    verdicts = [analysis.comparisons["skip34@flops"].verdict for analysis in (early, late)]
    assert verdicts[0].interval.level > 0.99 and verdicts[1].interval.level == 0.95
    assert verdicts[0].seeds_needed == verdicts[1].seeds_needed is not None
    assert not any("inf" in change for change in judge(early).changes)


def test_analysis__holm_covers_the_secondary_arms_alone() -> None:
    comparisons = Analysis(study({"lp_only": -5.0}), INFO).comparisons
    secondary = {arm: c for arm, c in comparisons.items() if arm != "skip34@flops"}
    assert comparisons["skip34@flops"].p_holm is None
    # 8 seeds all of one sign: 2 / 2**8, the smallest of four minus the primary = three p-values
    assert secondary["lp_only"].p == pytest.approx(2 / 256)
    assert secondary["lp_only"].p_holm == pytest.approx(3 * 2 / 256)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "0 data sets"),
        ([run("full9", 0, 60), run("full9", 1, 60, dataset="ants")], "2 data sets .*study merge"),
        ([run("full9", 0, 60), run("full9", 0, 60, key="other")], "two runs of full9, seed 0"),
    ],
)
def test_analysis__refuses_what_is_not_one_study(records: list[RunRecord], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Analysis(records, INFO)


# --- verdict ----------------------------------------------------------------------------------------------------------

SPREAD = [-0.4, -0.2, 0.0, 0.0, 0.2, 0.4]  # mean 0, SD .283, half width .297


@pytest.mark.parametrize(
    ("shift", "outcome", "code", "said"),
    [
        (0.0, "equal", 0, "UPHELD: equal within ±1 pt"),
        (0.5, "equal", 0, "UPHELD: equal within ±1 pt, though not zero"),
        (-2.5, "worse", 3, "REFUTED: worse by more than 1 pt"),
        (2.0, "better", 3, "REFUTED: better by more than 1 pt"),
        (1.0, "not zero", 5, "NOT ZERO: better; whether by more than 1 pt is open"),
    ],
)
def test_verdict__outcome_sentence_and_exit_code(shift: float, outcome: str, code: int, said: str) -> None:
    # the same images differ in all seeds, but as few as possible: next to the seeds they add little
    analysis = Analysis(exact({"skip34@flops": [shift + s for s in SPREAD]}), INFO)
    analysis.comparisons["skip34@flops"] = dataclasses.replace(
        analysis.comparisons["skip34@flops"],
        verdict=accuracy_verdict([1e-9 + shift + s for s in SPREAD], 1.0),
        new_images=False,
    )
    verdict = judge(analysis)
    assert verdict.outcome == outcome
    assert exit_code(verdict) == code
    low, high = shift - 0.297, shift + 0.297  # SD .283 of six
    assert verdict.text.splitlines()[0] == f"Verdict: {said}"
    assert f"  accuracy, same FLOPs            : {shift:+.2f} pt [{low:+.2f}, {high:+.2f}] -> {said}  (primary)" in (
        verdict.text.splitlines()
    )


def test_verdict__undecided_names_the_seeds_needed() -> None:
    few = judge(Analysis(exact({"skip34@flops": [-2.0, 2.0, -1.0, 1.0]}), INFO))
    assert "UNDECIDED: 4 seeds decide nothing; at least 6 are needed" in few.text
    verdict = judge(Analysis(exact({"skip34@flops": [-2.0, 2.0, -1.0, 1.0, -2.0, 2.0]}), INFO))
    assert (verdict.outcome, exit_code(verdict)) == ("undecided", 4)
    # SD sqrt(18 / 5); table: 1.5 -> 21, 2.0 -> 36, and a little for the images
    needed = re.search(r"UNDECIDED: about (\d+) seeds needed at the paired SD of 1.90 pt", verdict.text)
    assert needed and 30 <= int(needed[1]) <= 60


def test_verdict__prints_all_three_budgets_and_that_they_differ() -> None:
    shifts = {"skip34@flops": 0.1, "skip34@images": 2.0, "skip34@epochs": -2.5}
    spread = [*SPREAD, 0.1, -0.1]  # eight: three arms, of which two share the level
    verdict = judge(Analysis(exact({arm: [x + s for s in spread] for arm, x in shifts.items()}), INFO))
    text = " ".join(verdict.text.split())
    assert set(verdict.accuracy) == {"flops", "images", "epochs"}
    for said in ("same FLOPs : +0.10 pt", "same images : +2.00 pt", "same unfrozen epochs : -2.50 pt"):
        assert said in text
    assert (
        "Outcomes by budget axis: upheld at the same FLOPs, refuted (better) at the same images, refuted (worse) at "
        "the same unfrozen epochs. It depends on the budget axis. Deleting the steps without spending what they cost "
        "is a smaller budget, not a worse recipe."
    ) in text
    assert text.startswith("Verdict: UPHELD") and "Prediction under test (fast.ai forum, 2018)" in text
    assert text.endswith("This is one data set and one architecture; it does not generalise by itself.")


def test_verdict__match_chooses_the_primary_arm() -> None:
    records = exact({"skip34@flops": SPREAD, "skip34@images": [2.0 + s for s in SPREAD]})
    info = dataclasses.replace(INFO, match="images")
    assert judge(Analysis(records, INFO)).outcome == "equal"
    assert judge(Analysis(records, info)).outcome == "better"


def test_verdict__margin_is_the_users() -> None:
    records = exact({"skip34@flops": SPREAD})
    assert judge(Analysis(records, dataclasses.replace(INFO, margin=0.2))).outcome == "undecided"


def test_verdict__time_half_per_axis() -> None:
    # The skipping runs reach 59 at epoch 3 (4.5 GFLOP) of 8, the full ones at epoch 12 (12 GFLOP): x0.25, x0.375.
    records = exact({"skip34@flops": [3.5 + s / 10 for s in SPREAD]})
    verdict = judge(Analysis(records, INFO))
    assert verdict.time == {"epochs": "refuted", "images": "refuted", "flops": "refuted", "seconds": "refuted"}
    # skipping reached it after epoch 1 and by epoch 3, the full runs after 8 and by 12
    assert "images x0.08 to x0.38, " in verdict.text and "seconds x0.08 to x0.38" in verdict.text
    assert "(reached by 6/6 skipping, 6/6 full runs;" in verdict.text


def test_verdict__says_when_the_time_half_rests_on_where_cycles_end() -> None:
    # The reference is flat from its first cycle end on, at 1.5 GFLOP. Skipping reaches 59 at 4.5 GFLOP: x3.0.
    # Had it been there just after its cycle end before, at 1.5 GFLOP, x1.0: as all pairs are alike, undecided.
    flat = [
        dataclasses.replace(r, curve=tuple(dataclasses.replace(p, val_acc=0.6) for p in r.curve))
        for r in exact({"skip34@images": SPREAD})
        if r.arm == "full9"
    ]
    skip = [run("skip34@flops", seed, 63.5) for seed in range(6)]
    verdict = judge(Analysis([*flat, *skip], INFO))
    assert verdict.time["flops"] == "undecided"
    assert any("as mean ratio of FLOPs x1.00 or more" in change for change in verdict.changes)


def test_verdict__censored_runs_make_the_time_half_not_testable() -> None:
    records = exact({"skip34@flops": [-1.5, -1.5, 0.0, 0.0, 0.0, 0.0]})  # two of six stay below 59
    verdict = judge(Analysis(records, INFO))
    assert verdict.time["flops"] == "not testable"
    assert "FLOPs not testable" in verdict.text and "(reached by 4/6 skipping, 6/6 full runs;" in verdict.text


def test_verdict__an_unsteady_machine_omits_seconds() -> None:
    def probed(speeds: list[float]) -> list[RunRecord]:
        runs = exact({"skip34@flops": SPREAD})
        return [dataclasses.replace(r, probe_images_per_second=speeds[i % len(speeds)]) for i, r in enumerate(runs)]

    steady, unsteady = judge(Analysis(probed([95.0, 105.0]), INFO)), judge(Analysis(probed([80.0, 120.0]), INFO))
    assert "seconds" in steady.time and "seconds" not in unsteady.time
    assert "seconds omitted" in unsteady.text
    # SD of six 80s and six 120s, n - 1 = 11: 20 sqrt(12 / 11) = 20.9
    assert any("varied by 21%" in limit for limit in unsteady.limits)
    bare = [dataclasses.replace(r, probe_images_per_second=None) for r in exact({"skip34@flops": SPREAD})]
    assert any("no throughput probe" in limit for limit in judge(Analysis(bare, INFO)).limits)


@pytest.mark.parametrize(
    ("arm", "changes", "message"),
    [
        ("skip34@flops", {"lr_at_grid_edge": True}, "edge of the grid for skip34@flops"),
        ("full9", {"lr_at_grid_edge": True}, "edge of the grid for full9"),
        ("skip34@flops", {"flops": 30e9}, r"skip34@flops spent x2.50 the flops of full9"),
        ("skip34@images", {"images": 3000}, r"skip34@images spent x0.50 the images of full9"),
    ],
)
def test_verdict__says_what_makes_the_comparison_unfair(arm: str, changes: dict[str, object], message: str) -> None:
    records = exact({"skip34@flops": SPREAD, "skip34@images": SPREAD})
    clean = judge(Analysis(records, INFO))
    spoiled = [dataclasses.replace(r, **changes) if r.arm == arm else r for r in records]  # type: ignore[arg-type]
    pattern = re.compile(message)
    assert not any(pattern.search(change) for change in clean.changes)
    assert any(pattern.search(change) for change in judge(Analysis(spoiled, INFO)).changes)


def test_verdict__few_test_images_are_named_where_seeds_cannot_help() -> None:
    # The same images differ in every seed: no spread over seeds, sqrt(.04 / 1000) = .63 pt over images
    right = np.arange(N_TEST) < 600
    other = right.copy()
    other[:20], other[-20:] = False, True
    records = [run("full9", s, 60, correct=pack_correct(right)) for s in range(6)]
    records += [run("skip34@flops", s, 60, correct=pack_correct(other)) for s in range(6)]
    verdict = judge(Analysis(records, INFO))
    assert verdict.outcome == "undecided"  # -+ 1.24 pt on new images, whatever the number of seeds
    assert "no number of seeds would do with so few test images" in verdict.headline[0]
    assert any("disagree on 4% of 1000 images, which leaves up to 0.63 pt" in change for change in verdict.changes)
    assert any("no width" in change for change in verdict.changes)


def test_verdict__limits_name_missing_arms_unpaired_seeds_and_mixed_code() -> None:
    records = [*exact({"skip34@flops": SPREAD}), run("skip3", 77, 60, code_version="2", tuned_lr=None)]
    limits = "\n".join(judge(Analysis(records, dataclasses.replace(INFO, arms=("lp_ft",)))).limits)
    assert "Not run, and so not in the tables: lp_ft, skip34@images, skip34@epochs." in limits
    assert "left out of comparisons: skip3 (7)" in limits
    assert "2 versions of the code: 1, 2" in limits
    assert "not tuned per arm for skip3" in limits


def test_verdict__a_grid_of_one_rate_is_no_tuning() -> None:
    records = [dataclasses.replace(r, tuning_curve=((0.1, 0.52),)) for r in exact({"skip34@flops": SPREAD})]
    limits = " ".join(judge(Analysis(records, INFO)).limits)
    assert "not tuned per arm for full9, skip34@flops" in limits
    assert "not tuned per arm" not in " ".join(judge(Analysis(exact({"skip34@flops": SPREAD}), INFO)).limits)


def test_verdict__three_seeds_say_how_little_they_are() -> None:
    verdict = judge(Analysis(study({}, seeds=3), INFO))
    assert any("Seeds: 3 seeds decide nothing; at least 6 are needed" in change for change in verdict.changes)
    assert verdict.outcome == "undecided"


def test_verdict__a_null_study_refutes_nothing() -> None:
    verdict = judge(Analysis(study({}, seeds=12), INFO))
    assert verdict.outcome == "equal" and exit_code(verdict) == 0
    assert "REFUTED" not in verdict.text and "NOT ZERO" not in verdict.text


# --- tables -----------------------------------------------------------------------------------------------------------


def test_tables__hold_the_numbers_of_the_analysis() -> None:
    analysis = Analysis(exact({"skip34@flops": [0.5, -0.5, 1.0, 1.0], "skip34@images": [-3.0, -2.0, -2.0, -3.0]}), INFO)
    row = comparison_table(analysis).data.set_index("arm").loc["skip34@flops"]
    assert row.difference == pytest.approx(0.5) and row.sd == pytest.approx(math.sqrt(0.5))
    assert row.p_better == pytest.approx(0.75) and row.role == "primary"
    # sign flips of (.5, -.5, 1, 1): |sum| >= 2 in (1,1,1,1) 3, (1,-1,..) 2 and two of (.5 + -.5..): enumerate 8 of 16
    sums = [abs(a * 0.5 + b * -0.5 + c + d) for a in (1, -1) for b in (1, -1) for c in (1, -1) for d in (1, -1)]
    assert row.p_sign_flip == pytest.approx(np.mean(np.array(sums) >= 2 - 1e-9))
    pairs = pairwise_table(analysis).data.set_index(["arm", "minus"])
    assert pairs.loc[("skip34@images", "skip34@flops"), "difference"] == pytest.approx(-3.0)
    costs = cost_table(analysis).data.set_index(["arm", "axis"])
    assert costs.loc[("skip34@images", "flops"), "reached"] == 0
    assert costs.loc[("skip34@images", "flops"), "outcome"] == "not testable"
    assert costs.loc[("skip34@flops", "flops"), "median"] == pytest.approx(12e9)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.pictures
def test_report__is_complete_and_self_contained(tmp_path: Path) -> None:
    records = [
        dataclasses.replace(r, acc_ood=0.5, acc_tta=0.61) for r in study({"skip34@images": 2.0, "lp_only": -6.0})
    ]
    verdict = write_report(Analysis(records, INFO), tmp_path)
    page = Page()
    html = (tmp_path / "report.html").read_text()
    page.feed(html)
    assert page.tags.count("img") == len(PLOTS) == 8
    assert page.tags.count("table") == 6  # what ran, and five of numbers
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", html)
    for name in (spec.name for spec in PLOTS):
        picture = imread(io.BytesIO((tmp_path / "plots" / f"{name}.png").read_bytes()))
        assert picture.std() > 0.01  # something is drawn
        assert len(pd.read_csv(tmp_path / "plots" / f"{name}.csv")) > 0
    for name in ("arms", "budgets", "comparisons", "costs", "pairwise"):
        assert len(pd.read_csv(tmp_path / "tables" / f"{name}.csv")) > 0
    markdown = (tmp_path / "report.md").read_text()
    assert verdict.text in markdown
    assert (tmp_path / "verdict.txt").read_text() == verdict.text + "\n"
    assert all(limit in markdown for limit in verdict.limits)
    assert all((tmp_path / link).exists() for link in re.findall(r"\]\(([^)]+)\)", markdown))


def test_report__tables_of_the_markdown_are_rectangular(tmp_path: Path) -> None:
    write_report(Analysis(study({}, seeds=2, arms=("full9", "skip34@flops")), INFO), tmp_path)
    blocks = re.findall(r"(?:^\|.*\|\n)+", (tmp_path / "report.md").read_text(), flags=re.MULTILINE)
    assert len(blocks) == 6
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_report__escapes_what_the_user_named(tmp_path: Path) -> None:
    records = [
        dataclasses.replace(r, curve=(), lr_trace={}, tuning_curve=(), distortion={}) for r in study({}, seeds=2)
    ]
    write_report(Analysis(records, dataclasses.replace(INFO, dataset="<script>alert(1)</script>")), tmp_path)
    assert "<script>" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "records",
    [
        study({}, seeds=1),
        study({}, seeds=3, arms=("full9",)),
        study({}, seeds=3, arms=("skip34@flops", "lp_only")),
        study({}, seeds=3, arms=("full9", "skip34@images")),
        [dataclasses.replace(r, curve=(), lr_trace={}, tuning_curve=(), distortion={}) for r in study({}, seeds=3)],
        [dataclasses.replace(r, n_test=8, acc=0.5, correct=pack_correct([1, 0] * 4)) for r in study({}, seeds=3)][:8]
        + study({}, seeds=3)[8:],
        [*study({}, seeds=4), *(run(f"mine{i}", 0, 50 + i) for i in range(12))],
    ],
    ids=["one seed", "reference alone", "no reference", "no primary", "bare", "other test sets", "many arms"],
)
def test_report__degrades_with_a_note(records: list[RunRecord], tmp_path: Path) -> None:
    verdict = write_report(Analysis(records, INFO), tmp_path)
    assert exit_code(verdict) in (0, 3, 4, 5)
    assert not re.search(r"\bnan\b", (tmp_path / "report.md").read_text())


def test_report__says_which_pictures_are_absent(tmp_path: Path) -> None:
    records = [
        dataclasses.replace(r, lr_trace={}, tuning_curve=()) for r in study({}, seeds=2, arms=("full9", "lp_only"))
    ]
    write_report(Analysis(records, INFO), tmp_path)
    assert (
        "do not hold what they show: paired_slopes, lr_traces, lr_sensitivity." in (tmp_path / "report.md").read_text()
    )
