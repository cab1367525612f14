"""How often is a study's verdict wrong, and how often does it come at all? Simulated studies whose truth is known.

    python benchmarks/study_calibration.py

Writes `benchmarks/results/study_calibration.md`; about two minutes of a core. The short form stands in
`tests/study/test_statistics.py`.

* New images: correctness from a latent score per arm, seed and image, with easy and hard images that both arms share,
  so that most of what they get right is the same. The true difference on new images and with other seeds is known from
  the normal distribution.
* Four outcomes, looks and pilots: normal differences between seeds.
* Time: both arms' cost to the target is lognormal within a pair; each arm shows it at its own cycle ends alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from scipy import stats

from lightning_unfreeze.study.judge import statistics as st
from lightning_unfreeze.study.judge.across import merge_effects
from lightning_unfreeze.study.judge.time_to_target import cost_ratio, time_verdict

SEEDS, IMAGES = (6, 12, 20), (268, 1000, 5000)
SPREADS = {
    "arms agree on most images": (3.0, 0.5, 0.2, 0.1, 0.8),
    "little agreement": (1.0, 0.7, 0.2, 0.2, 1.0),
    "images alone differ": (3.0, 0.5, 0.0, 0.0, 0.8),
    "seeds alone differ": (3.0, 0.0, 0.2, 0.2, 0.8),
}
"""SD of image, arm x image, seed, arm x seed and rest of the latent score; unit of the last is arbitrary."""
ENDS = {
    "full": (0.04, 0.08, 0.12, 0.16, 0.28, 0.52, 1.0),  # C2 F1+1+1 U1+2+4 in shares of its FLOPs
    "skip": (0.125, 0.375, 1.0),  # U1+2 U5
}


def correctness(rng: np.random.Generator, seeds: int, images: int, spread: Sequence[float], level: float) -> np.ndarray:
    """Return one arm's latent scores without what both arms share: arm x image, arm x seed and rest."""
    _, arm_image, _, arm_seed, rest = spread
    return (
        level
        + arm_image * rng.standard_normal((1, images), np.float32)
        + arm_seed * rng.standard_normal((seeds, 1), np.float32)
        + rest * rng.standard_normal((seeds, images), np.float32)
    )


def pair(rng: np.random.Generator, seeds: int, images: int, spread: Sequence[float], true: float) -> list[np.ndarray]:
    """Return two arms' correctness `(S, N)`; one is right on 84.1 % of new images, the other on `true` points more."""
    scale = math.sqrt(sum(sd**2 for sd in spread))
    levels = (stats.norm.ppf(stats.norm.cdf(1.0) + true / 100), 1.0)
    shared = spread[0] * rng.standard_normal((1, images), np.float32)
    shared = shared + spread[2] * rng.standard_normal((seeds, 1), np.float32)
    return [shared + correctness(rng, seeds, images, spread, scale * level) > 0 for level in levels]


def coverage(repeats: int, true: float = 1.0) -> Iterable[list[str]]:
    """Yield how often nominal 95 % intervals hold the true difference on new images: both intervals of a study."""
    yield ["images", "seeds", *(f"{name}: new / these" for name in SPREADS)]
    for images in IMAGES:
        for seeds in SEEDS:
            row = [str(images), str(seeds)]
            for number, spread in enumerate(SPREADS.values()):
                rng, held = np.random.default_rng([images, seeds, number]), [0, 0]
                for _ in range(repeats):
                    one, two = pair(rng, seeds, images, spread, true)
                    effect = st.crossed_effect(one, two)
                    alone = st.paired_t_interval(100 * (one.mean(1) - two.mean(1)))
                    for place, interval in enumerate((effect.interval(), alone)):
                        held[place] += interval.low <= true <= interval.high
                row.append(f"{held[0] / repeats:.1%} / {held[1] / repeats:.1%}")
            yield row


def outcomes(repeats: int) -> Iterable[list[str]]:
    """Yield the shares of the outcomes for a margin of one point, on new images with 1000 of them."""
    names = ("equal", "better", "worse", "not zero", "undecided")
    yield ["true difference", "seeds", *names]
    for true in (0.0, 0.5, 1.0, 2.0):
        for seeds in SEEDS:
            rng = np.random.default_rng([9, seeds, round(10 * true)])
            spread = SPREADS["arms agree on most images"]
            found = [
                st.accuracy_verdict(st.crossed_effect(*pair(rng, seeds, 1000, spread, true)), 1.0).outcome
                for _ in range(repeats)
            ]
            yield [f"{true:g} pt", str(seeds), *(f"{found.count(name) / repeats:.1%}" for name in names)]


def bracket(cost: float, ends: Sequence[float]) -> tuple[float, float]:
    """Return the cycle ends between which a cost lies."""
    place = int(np.searchsorted(ends, cost))
    return (ends[place - 1] if place else 0.0), (ends[place] if place < len(ends) else math.inf)


def time_half(repeats: int) -> Iterable[list[str]]:
    """Yield how often a direction is named: longer / shorter, by the true ratio and the reference's median."""
    yield ["true ratio", "seeds", *(f"median at {median:.0%} of the budget" for median in (0.1, 0.2, 0.4, 0.5, 0.7))]
    for ratio in (1.0, 1.5, 2.0, 3.0, 5.0, 1 / 3):
        for seeds in SEEDS:
            row = [f"x{ratio:.2g}", str(seeds)]
            for median in (0.1, 0.2, 0.4, 0.5, 0.7):
                rng, found = np.random.default_rng([seeds, round(100 * ratio), round(100 * median)]), []
                for _ in range(repeats):
                    shared = math.log(median) + rng.normal(0, 0.3, seeds)
                    full = np.exp(shared + rng.normal(0, 0.2, seeds))
                    skip = ratio * np.exp(shared + rng.normal(0, 0.2, seeds))
                    cost = cost_ratio(
                        [bracket(c, ENDS["skip"]) for c in skip], [bracket(c, ENDS["full"]) for c in full]
                    )
                    found.append(time_verdict(cost))
                row.append(f"{found.count('upheld') / repeats:.1%} / {found.count('refuted') / repeats:.1%}")
            yield row


def looking(repeats: int) -> Iterable[list[str]]:
    """Yield how often studies of equal arms find a difference: with planned looks, and by looking as one likes."""
    yield ["looks at seeds", "planned (alpha spending)", "each look at 5 %"]
    for looks in ([6, 12], [6, 9, 12], list(range(6, 21))):
        levels, rng = st.spent_alpha(looks), np.random.default_rng(len(looks))
        hits = [0, 0]
        for row in rng.normal(0, 2.0, (repeats, looks[-1])):
            effects = [st.seed_effect(row[:n]) for n in looks]
            hits[0] += any(e.interval(1 - a).excludes_zero() for e, a in zip(effects, levels, strict=True))
            hits[1] += any(e.interval().excludes_zero() for e in effects)
        shown = ", ".join(map(str, looks)) if len(looks) < 5 else f"{looks[0]} to {looks[-1]}, each"
        yield [shown, *(f"{hit / repeats:.1%}" for hit in hits)]


def pilots(repeats: int) -> Iterable[list[str]]:
    """Yield the power of studies whose number of seeds a pilot of five gave: to detect the margin / show equality."""
    yield ["true SD", "images leave", "by the pilot's SD", "by its upper 80 % limit", "mean seeds of the latter"]
    for sd in (0.7, 1.0, 1.5):
        for image_error in (0.0, 0.2):
            rng = np.random.default_rng([round(10 * sd), round(10 * image_error)])
            truth = st.Effect(0.0, 2, sd**2, image_error**2)
            power: list[list[float]] = [[], [], [], []]
            numbers = []
            for _ in range(repeats):
                pilot = rng.normal(0, sd, 5)
                for place, spread in enumerate((float(pilot.std(ddof=1)), st.sd_limit(pilot))):
                    wanted = [
                        st.seeds_to_detect(spread, 1.0, image_variance=image_error**2),
                        st.seeds_for_equivalence(spread, 1.0, image_variance=image_error**2),
                    ]
                    seeds = max(st.MIN_SEEDS_SIGN_FLIP, *(number for number in wanted if number is not None))
                    power[2 * place].append(st.power_to_detect(truth, 1.0, seeds))
                    power[2 * place + 1].append(st.power_to_equate(truth, 1.0, seeds))
                numbers.append(seeds)
            cells = [f"{np.mean(power[i]):.0%} / {np.mean(power[i + 1]):.0%}" for i in (0, 2)]
            yield [f"{sd:g} pt", f"{image_error:g} pt", *cells, f"{np.mean(numbers):.0f}"]


def collapses(repeats: int) -> Iterable[list[str]]:
    """Yield what 95 % intervals hold where one run in twenty collapses by ten SD, and where differences are skewed."""
    held = ("t interval holds the mean", "Hodges-Lehmann holds the centre")
    yield ["seeds", *held, "a collapsed pair is flagged", "skewed, no collapse: t interval holds the mean"]
    for seeds in SEEDS:
        rng, hits, wild, flagged = np.random.default_rng(seeds), [0, 0], 0, 0
        skewed = [st.paired_t_interval(d) for d in np.random.default_rng([5, seeds]).exponential(1, (repeats, seeds))]
        for _ in range(repeats):
            collapsed = rng.random(seeds) < 0.05
            d = rng.normal(0, 1, seeds) - 10 * collapsed
            t, robust = st.paired_t_interval(d), st.hodges_lehmann(d)
            hits[0] += t.low <= -0.5 <= t.high
            hits[1] += robust.low <= 0 <= robust.high
            wild, flagged = wild + int(collapsed.sum()), flagged + int(collapsed[st.outliers(d)].sum())
        yield [
            str(seeds),
            *(f"{hit / repeats:.1%}" for hit in hits),
            f"{flagged / max(wild, 1):.0%}",
            f"{np.mean([t.low <= 1 <= t.high for t in skewed]):.1%}",
        ]


def together(repeats: int) -> Iterable[list[str]]:
    """Yield the coverage of a merged effect over four data sets of two backbones each."""
    yield ["spread between sets", "between backbones", "error of a study", "95 % interval holds the mean", "mean width"]
    for tau, within, error in ((0.0, 0.0, 0.5), (0.5, 0.5, 0.5), (1.0, 0.0, 0.5), (2.0, 0.3, 0.4)):
        rng, held, width = np.random.default_rng([round(10 * tau), round(10 * within)]), 0, 0.0
        for _ in range(repeats):
            y = 0.7 + rng.normal(0, tau, 4).repeat(2) + rng.normal(0, within, 8) + rng.normal(0, error, 8)
            effect = merge_effects(y, [error] * 8, [f"set {i // 2}" for i in range(8)]).effect
            held, width = held + (effect.low <= 0.7 <= effect.high), width + effect.high - effect.low
        yield [f"{tau:g} pt", f"{within:g} pt", f"{error:g} pt", f"{held / repeats:.1%}", f"{width / repeats:.1f} pt"]


def calibrate(repeats: int = 1000, out: Path = Path("benchmarks/results/study_calibration.md")) -> str:
    """Simulate, and write the tables.

    Args:
        repeats: Studies in a cell; the standard error of a share near 95 % is .7 points with 1000.
        out: Where to write.
    """
    known = "Nominal 95 %; true difference 1 point, 84 % right. `new` counts seeds and images, as the verdict does;"
    parts = (
        ("Coverage on new images", coverage, repeats, f"{known} `these` seeds alone."),
        ("Four outcomes", outcomes, repeats // 2, "Margin 1 point, 1000 test images, arms that agree on most of them."),
        (
            "The time half",
            time_half,
            repeats // 5,
            "Directions that are named, longer / shorter. The reference's runs reach the target at the median given; "
            "each arm is looked at at its own cycle ends.",
        ),
        ("Looking more than once", looking, repeats, "Equal arms: share of studies that find a difference."),
        (
            "Seeds from a pilot",
            pilots,
            min(repeats // 10, 60),
            "Power to tell a point from zero / to show equality within a point, mean over pilots of five seeds.",
        ),
        (
            "Collapses and skew",
            collapses,
            repeats,
            "One run in twenty falls by ten SD; beside it, exponential differences.",
        ),
        ("Data sets together", together, min(repeats // 5, 200), "Four data sets, two backbones each."),
    )
    lines = [
        "# Is the study's verdict right?",
        "",
        "By `benchmarks/study_calibration.py`; simulated studies of known truth.",
    ]
    for title, table, count, note in parts:
        rows = list(table(count))
        lines += ["", f"## {title}", "", f"{note} {count} studies a cell.", ""]
        lines += [
            f"| {' | '.join(rows[0])} |",
            f"|{'---|' * len(rows[0])}",
            *(f"| {' | '.join(row)} |" for row in rows[1:]),
        ]
        print("\n".join(lines[-len(rows) - 4 :]), flush=True)
    text = "\n".join(lines) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    return str(out)


if __name__ == "__main__":
    auto_cli(calibrate, as_positional=False)
