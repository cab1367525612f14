"""What would change a verdict, and what a report cannot show."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from lightning_unfreeze.study.judge import statistics as st
from lightning_unfreeze.study.judge.across import MIN_DATASETS_RANKING
from lightning_unfreeze.study.judge.analysis import BUDGETS, MAX_PROBE_CV, Analysis, Comparison, skip_arm
from lightning_unfreeze.study.judge.words import COST_LABEL, interval_words, outcome_words, ratio_words, seeds_sentence

BUDGET_TOLERANCE = 0.05
UNTUNED_BY_DESIGN = ("no_lr_find",)
FEW_IMAGES = 10


def changes_of(analysis: Analysis) -> list[str]:
    """Return what would change the verdict, of what these runs show."""
    info = analysis.info
    primary = analysis.comparisons.get(info.primary)
    if primary is None:
        return [f"Running {info.reference} and {info.primary} with the same seeds: the primary comparison has no pair."]
    found = [*_about_seeds(primary), *_about_images(analysis, primary), *_about_time(analysis, primary)]
    found += _about_rates(analysis, primary)
    for arm in (info.reference, info.primary):
        late, runs = analysis.not_converged(arm), len(analysis.runs[arm])
        if late:
            found.append(f"Length: {late} of {runs} runs of {arm} still improved at their last cycle end.")
    return found + _budget_mismatches(analysis)


def _about_seeds(primary: Comparison) -> list[str]:
    verdict, found = primary.verdict, []
    if verdict.outcome == "undecided":
        found.append(f"Seeds: {seeds_sentence(verdict)} (fix the number before running; do not add until it fits).")
    if verdict.sd == 0:
        found.append("Seeds: every pair gave the same difference, so the interval has no width; that is no certainty.")
    robust, these = primary.robust, primary.these_images
    if primary.outliers:
        # so few pairs give no signed-rank interval of an early look's level
        interval = f" {interval_words(robust)}" if math.isfinite(robust.low) else ""
        found.append(
            f"Outliers: the pairs of seeds {', '.join(map(str, primary.outliers))} lie far off the others. Hodges and "
            f"Lehmann's estimate, which a few hardly move, is {robust.mean:+.2f} pt{interval} on "
            f"these images, where the mean is {these.mean:+.2f} pt {interval_words(these)}."
        )
    return found


def _about_images(analysis: Analysis, primary: Comparison) -> list[str]:
    verdict, info = primary.verdict, analysis.info
    if not primary.new_images or primary.disagreement is None:
        return ["Test images: they differ between runs, so the interval is about other seeds alone."]
    found, images = [], verdict.effect.image_variance
    if verdict.seeds > 1 and images > verdict.effect.seed_variance / verdict.seeds:
        error = st.image_standard_error(primary.disagreement, info.n_test)
        found.append(
            f"Test images: they carry more of the uncertainty ({math.sqrt(images):.2f} pt of standard error) than the "
            f"seeds. Two runs disagree on {primary.disagreement:.0%} of {info.n_test} images, which leaves up to "
            f"{error:.2f} pt; more seeds do not remove it, more test images do."
        )
    if round(primary.disagreement * info.n_test) < FEW_IMAGES:
        found.append(
            f"Test images: two runs disagree on about {primary.disagreement * info.n_test:.0f} of them; an interval "
            "that rests on so few is a rough one."
        )
    return found


def _about_time(analysis: Analysis, primary: Comparison) -> list[str]:
    axis = analysis.info.match
    cost = primary.costs[axis]
    if cost.bracket[0] <= 1 <= cost.bracket[1] and cost.testable:
        return [
            "Cost: the target may have been met between two cycle ends, which allows as mean ratio of "
            f"{COST_LABEL[axis]} {ratio_words(cost.bracket)}; shorter cycles would narrow that."
        ]
    return []


def _about_rates(analysis: Analysis, primary: Comparison) -> list[str]:
    info, found = analysis.info, []
    edges = [arm for arm in analysis.arms if any(run.lr_at_grid_edge for run in analysis.runs[arm].values())]
    named = [arm for arm in edges if arm in (info.reference, *map(skip_arm, BUDGETS))]
    if named:
        found.append(
            f"Learning rates: the best one lay at the edge of the grid for {', '.join(named)}; widen the grid."
        )
    steps = {arm: analysis.beside_best_rate(arm) for arm in (info.reference, info.primary)}
    if all(steps.values()):
        lost = {arm: max(0.0, *values) for arm, values in steps.items()}
        effect = primary.verdict.effect
        ends = effect.mean - lost[info.primary], effect.mean + lost[info.reference]
        said = [_outcome_at(primary, mean) for mean in ends]
        found.append(
            f"Learning rates: one step of the grid costs {info.reference} up to {lost[info.reference]:.1f} pt and "
            f"{info.primary} up to {lost[info.primary]:.1f} pt of validation accuracy. With one arm a step off its "
            f"best rate the difference would lie between {ends[0]:+.1f} ({said[0]}) and {ends[1]:+.1f} pt ({said[1]})."
        )
    return found


def _outcome_at(primary: Comparison, mean: float) -> str:
    verdict = primary.verdict
    level = 1 - verdict.interval.level
    moved = st.accuracy_verdict(replace(verdict.effect, mean=mean), verdict.margin, alpha=level)
    return outcome_words(moved)


def _budget_mismatches(analysis: Analysis) -> list[str]:
    """Return the arms whose budget is not what their name says."""
    found = []
    for axis in ("flops", "images"):
        comparison = analysis.comparisons.get(f"skip34@{axis}")
        if comparison is None:
            continue
        spent = [
            np.mean([getattr(analysis.runs[arm][seed], axis) for seed in comparison.seeds])
            for arm in (comparison.arm, analysis.info.reference)
        ]
        if abs(spent[0] / spent[1] - 1) > BUDGET_TOLERANCE:
            found.append(
                f"Budget: {comparison.arm} spent x{spent[0] / spent[1]:.2f} the {axis} of {analysis.info.reference}, "
                f"more than {BUDGET_TOLERANCE:.0%} off; that comparison is not matched."
            )
    return found


def limits_of(analysis: Analysis) -> list[str]:
    """Return what the report cannot show."""
    info, arms = analysis.info, analysis.arms
    found = [
        "One data set, one backbone, one recipe: a different one may give another verdict.",
        "The verdict is for other seeds and new images of the same kind; the interval named 'these images' is for "
        "other seeds alone, and gets narrower with every seed however few test images there are. Neither "
        "speaks for other data.",
        f"One comparison is primary. The {analysis.num_secondary} others share its level (Bonferroni): their intervals "
        "are wider, and their outcomes follow them, in text, tables and pictures alike.",
        "The intervals assume about normal differences between seeds; with skewed ones they cover about 90 % instead "
        "of 95 % at 6 to 20 seeds. Hodges and Lehmann's interval beside them assumes symmetry alone.",
        f"The cost target is read off {info.reference}'s own validation curves, and a cost is known no finer than from "
        "one cycle end to the next: no direction is named where the ratios that this allows hold 1.",
        _overlap_sentence(analysis),
        "Images and FLOPs of tuning are part of each arm's cost."
        if info.charge_tuning
        else "Images and FLOPs of tuning are listed, but are in no arm's cost (charge_tuning=true puts them there).",
        "Displacement and CKA say how far features moved, not whether they got worse.",
        f"Arms are not ranked with a critical difference: that takes {MIN_DATASETS_RANKING} data sets or "
        "more (`study merge`).",
    ]
    if not analysis.seconds_comparable:
        cv = analysis.probe_cv
        why = (
            "runs carry no throughput probe" if cv is None else f"the throughput probe varied by {cv:.0%} between runs"
        )
        found.append(f"No verdict on seconds: {why} (at most {MAX_PROBE_CV:.0%} is allowed).")
    for arm, seeds in analysis.collapsed.items():
        found.append(
            f"Collapsed runs: {arm}, seeds {', '.join(map(str, seeds))} ended far below the others of that arm; they "
            "are in all means, and one such run can carry a difference."
        )
    rates = {arm: {run.tuned_lr for run in analysis.runs[arm].values()} for arm in arms}
    several = [arm for arm, found_rates in rates.items() if len(found_rates) > 1]
    if several:
        found.append(f"Runs of {', '.join(several)} were made at more than one tuned rate: parts were tuned apart.")
    missing = [arm for arm in (*info.arms, info.reference, *map(skip_arm, BUDGETS)) if arm not in arms]
    if missing:
        found.append(f"Not run, and so not in the tables: {', '.join(dict.fromkeys(missing))}.")
    alone = {arm: sorted(analysis.runs[arm].keys() ^ analysis.runs.get(info.reference, {}).keys()) for arm in arms}
    unpaired = [f"{arm} ({len(seeds)})" for arm, seeds in alone.items() if seeds]
    if unpaired:
        found.append(
            f"Seeds without a partner in {info.reference} were left out of comparisons: {', '.join(unpaired)}."
        )
    untuned = [arm for arm in arms if arm not in UNTUNED_BY_DESIGN and not _tuned(analysis, arm)]
    if untuned:
        found.append(f"Rates were not tuned per arm for {', '.join(untuned)}: a comparison may be one of rates.")
    versions = sorted({run.code_version for arm in arms for run in analysis.runs[arm].values()})
    if len(versions) > 1:
        found.append(f"Runs come from {len(versions)} versions of the code: {', '.join(versions)}.")
    return found


def _overlap_sentence(analysis: Analysis) -> str:
    share = analysis.info.overlap
    if share is None:
        return "How many training images the seeds share is not known; where they share many, they are no new samples."
    primary = analysis.comparisons.get(analysis.info.primary)
    if share >= 1:
        return (
            "All seeds train on the same images: the intervals are for other heads, orders and augmentations, not for "
            "another collection of training images."
        )
    said = f"Two seeds share {share:.0%} of their training images. "
    if primary is None or len(primary.seeds) < 2:
        return said + "For another collection of training images the intervals would be wider."
    factor = st.overlap_factor(len(primary.seeds), share)
    return said + (
        f"For another collection of training images the interval over seeds could be up to {factor:.1f} times as wide "
        "(Nadeau and Bengio 2003, if all spread came from which images train)."
    )


def _tuned(analysis: Analysis, arm: str) -> bool:
    return all(run.tuned_lr is not None and len(run.tuning_curve) > 1 for run in analysis.runs[arm].values())
