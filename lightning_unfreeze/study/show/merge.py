"""Several folders together: parts of one study joined by their seeds, and studies of several data sets merged."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from lightning_unfreeze.study.judge import across
from lightning_unfreeze.study.judge import statistics as st
from lightning_unfreeze.study.judge.analysis import Analysis, StudyInfo, in_order
from lightning_unfreeze.study.judge.words import interval_words, outcome_words, percent
from lightning_unfreeze.study.runs.folder import Stored, differences, refuse_other_settings, stored_study
from lightning_unfreeze.study.runs.records import RunLog, RunRecord
from lightning_unfreeze.study.show.merge_plots import critical_difference, merged_forest
from lightning_unfreeze.study.show.result import StudyResult, load_study


@dataclass(frozen=True)
class MergedStudy:
    """What several studies say together.

    Attributes:
        effects: Difference to the reference per arm and study (points), for other seeds and new images.
        merged: Random-effects mean per arm, for the arms that two or more data sets have.
        by_condition: The same within each condition, where there are several.
        ranking: Arms by mean rank with their critical difference, None with too few data sets or arms.
        ranked: Arms of the ranking.
        text: The report in Markdown.
        joined: The one study that the folders were parts of, None where there are several studies.
    """

    effects: pd.DataFrame
    merged: Mapping[str, across.MergedEffect]
    by_condition: Mapping[str, Mapping[str, across.MergedEffect]]
    ranking: across.Ranking | None
    ranked: tuple[str, ...]
    text: str
    joined: StudyResult | None = None


def merge_studies(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> MergedStudy:
    """Join the parts of each study, and merge studies of several data sets.

    Folders with the same settings are parts of one study, such as the shards of a cluster's job array or two halves of
    its seeds: their runs are joined. If all are parts of one study, it is written to `out` with its report. Otherwise
    `merged.md`, `effects.csv` and pictures are: the data sets are the sample, with several backbones within one set
    and the error of the test images included, and the interval of a mean effect is for another data set of their
    kind. Neither seeds nor backbones are counted as data sets.

    Args:
        folders: What `study run` wrote to.
        out: Where to write.

    Raises:
        ValueError: A folder twice, parts that overlap or have other settings, fewer than two data sets, other
            references, or an `out` that holds something else.
    """
    studies = _joined([Path(folder) for folder in folders], Path(out))
    if len(studies) == 1 and len(folders) > 1:
        (study,) = studies
        text = study.write(Path(out) / "report").text
        return MergedStudy(pd.DataFrame(), {}, {}, None, (), text, study)
    analyses = [Analysis(study.records, study.info) for study in studies]
    sets = {analysis.info.dataset for analysis in analyses}
    if len(sets) < 2:
        raise ValueError(
            f"got studies of {list(map(_label, (study.info for study in studies)))}: merging is about two or more data "
            "sets, or parts of one study; give each study its name (dataset=..., condition=...)."
        )
    references = sorted({analysis.info.reference for analysis in analyses})
    if len(references) > 1:
        raise ValueError(f"got studies with the references {references}: their differences mean different things.")
    effects = _effects(analyses)
    conditions = list(dict.fromkeys(effects["condition"]))
    merged = _merge(effects, analyses)
    by_condition = {
        name: _merge(effects[effects["condition"] == name], analyses) for name in conditions if len(conditions) > 1
    }
    ranked, ranking = _rank(analyses)
    text = _text(analyses, effects, merged, by_condition, ranked, ranking)
    root = Path(out)
    root.mkdir(parents=True, exist_ok=True)
    effects.to_csv(root / "effects.csv", index=False)
    (root / "merged.md").write_text(text, encoding="utf-8")
    shown = by_condition or {"": merged}
    merged_forest(effects, shown, references[0], analyses[0].info.margin).savefig(root / "effects.png", dpi=130)
    if ranking is not None:
        critical_difference(ranked, ranking).savefig(root / "critical_difference.png", dpi=130)
    return MergedStudy(effects, merged, by_condition, ranking, ranked, text)


def _joined(folders: Sequence[Path], out: Path) -> list[StudyResult]:
    """Return the studies that the folders hold, parts of one joined; a single joined one is written to `out`."""
    places: dict[Path, Path] = {}
    for folder in folders:
        if folder.resolve() in places:
            raise ValueError(f"{folder} is given twice (as {places[folder.resolve()]}): give each folder once.")
        places[folder.resolve()] = folder
    if out.resolve() in places:
        raise ValueError(f"out={str(out)!r} is one of the folders to join: give a folder of its own (--out).")
    stored = {folder: stored_study(folder) or Stored({}, load_study(folder).info) for folder in folders}
    groups: dict[str, list[Path]] = {}
    for folder in folders:
        parts = groups.setdefault(_label(stored[folder].info), [])
        changed = differences(stored[parts[0]], stored[folder]) if parts else ""
        if changed:
            raise ValueError(
                f"{folder} and {parts[0]} are both studies of {_label(stored[folder].info)}, but no parts of one, with "
                f"another {changed}, where 'there' is {parts[0]}. Merge one of them, or start the study of one with a "
                "condition=... that says what sets it apart."
            )
        parts.append(folder)
    studies = [_study_of(parts, stored) for parts in groups.values()]
    if len(studies) == 1 and len(folders) > 1:
        _write_joined(studies[0], Stored(stored[folders[0]].settings, studies[0].info), out)
    return studies


def _study_of(parts: Sequence[Path], stored: Mapping[Path, Stored]) -> StudyResult:
    """Return the study that these parts are together."""
    records: dict[tuple[str, int], tuple[Path, RunRecord]] = {}
    for part in parts:
        for record in load_study(part).records:
            other, known = records.setdefault((record.arm, record.seed), (part, record))
            if other != part:
                same = known.to_line() == record.to_line()
                why = "one is a copy of the other, or holds it" if same else "each made it for itself"
                raise ValueError(
                    f"{other} and {part} are parts of one study, {stored[part].info.dataset}, and overlap: both hold "
                    f"{record.arm}, seed {record.seed} ({why}). Give every run once: parts of other seeds or shards."
                )
    infos = [stored[part].info for part in parts]
    seeds = dict.fromkeys(seed for info in infos for seed in info.planned_seeds)
    arms = in_order({arm for info in infos for arm in info.arms})
    info = replace(infos[0], planned_seeds=tuple(seeds), arms=arms)
    return StudyResult(tuple(record for _, record in records.values()), info)


def _write_joined(study: StudyResult, joined: Stored, out: Path) -> None:
    """Write a joined study to a folder of its own, which may hold it from an earlier time, but nothing else."""
    before, log = stored_study(out), RunLog(out / "runs.jsonl")
    if before is not None:
        refuse_other_settings(out, before, joined)
    known, keys = log.by_key(), {record.key for record in study.records}
    if known.keys() - keys:
        extra = next(record for key, record in known.items() if key not in keys)
        raise ValueError(
            f"out={str(out)!r} holds runs that none of the folders holds, such as {extra.arm}, seed {extra.seed}: give "
            "another --out, or the folder among those to join and a new --out."
        )
    joined.write(out)
    for record in study.records:
        if record.key not in known:
            log.append(record)


def _label(info: StudyInfo) -> str:
    return " · ".join(part for part in (info.dataset, info.architecture, info.condition) if part)


def _effects(analyses: Sequence[Analysis]) -> pd.DataFrame:
    rows = [
        {
            "arm": comparison.arm,
            "dataset": analysis.info.dataset,
            "architecture": analysis.info.architecture,
            "condition": analysis.info.condition,
            "shifted": shifted,
            "pairs": len(comparison.seeds),
            "difference": verdict.effect.mean,
            "standard_error": verdict.effect.error,
            "low": verdict.effect.interval().low,
            "high": verdict.effect.interval().high,
            "outcome": verdict.outcome,
        }
        for analysis in analyses
        for comparison in analysis.comparisons.values()
        for shifted, verdict in ((False, comparison.verdict), (True, comparison.shifted))
        if verdict is not None
    ]
    if not rows:
        raise ValueError("no study has an arm that shares a seed with its reference: there is nothing to merge.")
    return pd.DataFrame(rows)


def _merge(
    effects: pd.DataFrame, analyses: Sequence[Analysis], shifted: bool = False
) -> dict[str, across.MergedEffect]:
    """Return the mean effect of each arm that two or more data sets have, at a level that secondary arms share."""
    primaries = {analysis.info.primary for analysis in analyses}
    arms = in_order(effects["arm"].unique())
    secondary = len(arms) if shifted else max(1, len([arm for arm in arms if arm not in primaries]))
    found = {}
    for arm in arms:
        rows = effects[(effects["arm"] == arm) & (effects["shifted"] == shifted)]
        usable = rows[(rows["standard_error"] > 0) & np.isfinite(rows["standard_error"])]
        if usable["dataset"].nunique() >= 2:
            level = 1 - st.ALPHA / (1 if arm in primaries and not shifted else secondary)
            found[arm] = across.merge_effects(
                usable["difference"].to_numpy(), usable["standard_error"].to_numpy(), list(usable["dataset"]), level
            )
    return found


def _rank(analyses: Sequence[Analysis]) -> tuple[tuple[str, ...], across.Ranking | None]:
    """Rank the arms that all studies have by their mean in each data set, where there are enough of both."""
    common = in_order(set.intersection(*(set(analysis.arms) for analysis in analyses)))
    sets: dict[str, list[Analysis]] = {}
    for analysis in analyses:
        sets.setdefault(analysis.info.dataset, []).append(analysis)
    if len(sets) < across.MIN_DATASETS_RANKING or len(common) < 3:
        return (), None
    means = [
        [float(np.mean([run.acc for study in members for run in study.runs[arm].values()])) for arm in common]
        for members in sets.values()
    ]
    return common, across.rank_arms(means)


def _text(
    analyses: Sequence[Analysis],
    effects: pd.DataFrame,
    merged: Mapping[str, across.MergedEffect],
    by_condition: Mapping[str, Mapping[str, across.MergedEffect]],
    ranked: Sequence[str],
    ranking: across.Ranking | None,
) -> str:
    sets, reference = list(dict.fromkeys(a.info.dataset for a in analyses)), analyses[0].info.reference
    margin = analyses[0].info.margin
    lines = [f"# {len(sets)} data sets, {len(analyses)} studies together: {', '.join(sets)}", ""]
    notes = [f"{_label(a.info)}: {a.look.note}" for a in analyses if a.look.note]
    lines += [*(f"> **{note}**" for note in notes), *([""] if notes else [])]
    for primary in sorted({analysis.info.primary for analysis in analyses}):
        if primary in merged:
            lines.append(_sentence(primary, merged[primary], reference, margin))
        else:
            lines.append(f"{primary}: too few data sets.")
    lines += [
        "",
        f"Accuracy minus that of {reference} (points), for other seeds and new images, random-effects mean over data "
        "sets with studies within them (REML, t interval of one degree of freedom less than there are data sets). tau: "
        "spread of the true effect between data sets; within: between the studies of one set. I²: share of the "
        "variation that is more than sampling error. The interval is for the mean effect over data sets like these; "
        "tau says how far one of them may lie from it. Secondary arms share the level (Bonferroni).",
        *_merged_table(merged, margin, "" if not by_condition else "All conditions"),
    ]
    for name, found in by_condition.items():
        lines += _merged_table(found, margin, name or "no condition")
    shifted = _merge(effects, analyses, shifted=True)
    if shifted:
        lines += _merged_table(shifted, margin, "On shifted images (secondary)")
    lines += ["", "![Effects per study and merged](effects.png)", ""]
    plain = effects[~effects["shifted"]]
    labels = list(dict.fromkeys(_label(analysis.info) for analysis in analyses))
    arms = in_order(plain["arm"].unique())
    lines += [f"| study | {reference}, % | {' | '.join(arms)} |", "|---|---|" + "---|" * len(arms)]
    for label, analysis in zip(labels, analyses, strict=True):
        accuracy = np.mean([100 * run.acc for run in analysis.runs.get(reference, {}).values()] or [math.nan])
        cells = [f"{accuracy:.1f}", *(_cell(analysis, arm) for arm in arms)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    left_out = plain[~((plain["standard_error"] > 0) & np.isfinite(plain["standard_error"]))]
    if len(left_out):
        pairs = ", ".join(f"{row.arm} on {row.dataset}" for row in left_out.itertuples())
        lines += ["", f"Not merged, because its pairs have no spread (one pair, or all alike): {pairs}."]
    lines.append("")
    if ranking is None:
        lines.append(
            f"No ranking: a critical-difference diagram needs {across.MIN_DATASETS_RANKING} data sets with 3 arms in "
            f"common, these are {len(sets)}. Seeds and backbones are not data sets."
        )
    else:
        order = sorted(zip(ranking.mean_ranks.tolist(), ranked, strict=True))
        lines += [
            f"Friedman p = {ranking.p:.3f}; mean ranks nearer than {ranking.critical_difference:.2f} do not differ at "
            "5 % (Nemenyi).",
            "",
            "![Critical difference](critical_difference.png)",
            "",
            ", ".join(f"{arm} {rank:.2f}" for rank, arm in order),
        ]
    return "\n".join(lines) + "\n"


def _merged_table(merged: Mapping[str, across.MergedEffect], margin: float, title: str) -> list[str]:
    lines = ["", *([f"**{title}**", ""] if title else [])]
    lines.append("| arm | sets | studies | mean Δ pt | interval | outcome | tau | within | I² |")
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for arm, found in merged.items():
        effect = found.effect
        interval = f"{interval_words(effect)} {percent(effect.level)}"
        lines.append(
            f"| {arm} | {found.datasets} | {found.studies} | {effect.mean:+.2f} | {interval} | "
            f"{_outcome(effect, margin)} | {found.tau:.2f} | {found.tau_within:.2f} | {found.i2:.0%} |"
        )
    return lines


def _outcome(effect: st.Interval, margin: float) -> str:
    """Return the outcome of a merged effect; its whole interval, not the narrower one, must lie inside the margin."""
    side = "better" if effect.mean > 0 else "worse"
    if effect.within(margin):
        return "equal"
    if effect.beyond(margin):
        return f"{side} by more than {margin:g} pt"
    return f"{side}, size open" if effect.excludes_zero() else "undecided"


def _sentence(arm: str, found: across.MergedEffect, reference: str, margin: float) -> str:
    effect = found.effect
    return (
        f"**{arm} against {reference}: {effect.mean:+.2f} pt {interval_words(effect)} over {found.datasets} data "
        f"sets ({found.studies} studies): {_outcome(effect, margin)}**, against a margin of ±{margin:g} pt; it varies "
        f"by tau = {found.tau:.2f} pt between them."
    )


def _cell(analysis: Analysis, arm: str) -> str:
    comparison = analysis.comparisons.get(arm)
    if comparison is None:
        return "-"
    verdict = comparison.verdict
    interval = f"{interval_words(verdict.interval)} {percent(verdict.interval.level)}"
    return f"{verdict.interval.mean:+.2f} {interval} {outcome_words(verdict)}"
