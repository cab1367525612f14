"""Several data sets together: the mean effect of each arm, how much it varies, and a ranking where there are enough."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lightning_unfreeze.study.judge import statistics as st
from lightning_unfreeze.study.judge.analysis import Analysis, in_order
from lightning_unfreeze.study.show.result import load_study


@dataclass(frozen=True)
class MergedStudy:
    """What several studies say together.

    Attributes:
        effects: Difference to the reference per arm and data set (points).
        merged: Random-effects mean per arm, for the arms that two or more data sets have.
        ranking: Arms by mean rank with their critical difference, None with too few data sets or arms.
        ranked: Arms of the ranking.
        text: The report in Markdown.
    """

    effects: pd.DataFrame
    merged: Mapping[str, st.MergedEffect]
    ranking: st.Ranking | None
    ranked: tuple[str, ...]
    text: str


def merge_studies(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> MergedStudy:
    """Merge studies of different data sets and write `merged.md`, `effects.csv` and pictures.

    The data sets are the sample: the interval of a mean effect is for another data set of their kind. Seeds of one
    data set are never counted as data sets.

    Args:
        folders: What `study run` wrote to, one per data set.
        out: Where to write.

    Raises:
        ValueError: Fewer than two data sets, one twice, or studies of different references.
    """
    analyses = [Analysis(study.records, study.info) for study in map(load_study, folders)]
    names = [analysis.info.dataset for analysis in analyses]
    twice = sorted({name for name in names if names.count(name) > 1})
    if len(names) < 2 or twice:
        raise ValueError(
            f"got studies of {names}{', ' + ', '.join(twice) + ' more than once' if twice else ''}: merging is about "
            "two or more data sets; give each study its name (dataset=...)."
        )
    references = sorted({analysis.info.reference for analysis in analyses})
    if len(references) > 1:
        raise ValueError(f"got studies with the references {references}: their differences mean different things.")
    effects = _effects(analyses)
    merged = {}
    for arm in in_order(effects["arm"].unique()):
        usable = effects[(effects["arm"] == arm) & (effects["standard_error"] > 0)]
        if len(usable) >= 2:
            merged[arm] = st.merge_effects(usable["difference"].to_numpy(), usable["standard_error"].to_numpy())
    ranked, ranking = _rank(analyses)
    text = _text(analyses, effects, merged, ranked, ranking)
    root = Path(out)
    root.mkdir(parents=True, exist_ok=True)
    effects.to_csv(root / "effects.csv", index=False)
    (root / "merged.md").write_text(text, encoding="utf-8")
    _forest(effects, merged, references[0]).savefig(root / "effects.png", dpi=110)
    if ranking is not None:
        _critical_difference(ranked, ranking).savefig(root / "critical_difference.png", dpi=110)
    return MergedStudy(effects, merged, ranking, ranked, text)


def _effects(analyses: Sequence[Analysis]) -> pd.DataFrame:
    rows = [
        {
            "arm": comparison.arm,
            "dataset": analysis.info.dataset,
            "pairs": len(comparison.seeds),
            "difference": comparison.verdict.interval.mean,
            "standard_error": comparison.verdict.sd / math.sqrt(len(comparison.seeds)),
            "ci95_low": comparison.verdict.interval.low,
            "ci95_high": comparison.verdict.interval.high,
            "outcome": comparison.verdict.outcome,
        }
        for analysis in analyses
        for comparison in analysis.comparisons.values()
    ]
    if not rows:
        raise ValueError("no study has an arm that shares a seed with its reference: there is nothing to merge.")
    return pd.DataFrame(rows)


def _rank(analyses: Sequence[Analysis]) -> tuple[tuple[str, ...], st.Ranking | None]:
    """Rank the arms that all data sets have, where there are enough of both."""
    common = in_order(set.intersection(*(set(analysis.arms) for analysis in analyses)))
    if len(analyses) < st.MIN_DATASETS_RANKING or len(common) < 3:
        return (), None
    means = [
        [float(np.mean([run.acc for run in analysis.runs[arm].values()])) for arm in common] for analysis in analyses
    ]
    return common, st.rank_arms(means)


def _text(
    analyses: Sequence[Analysis],
    effects: pd.DataFrame,
    merged: Mapping[str, st.MergedEffect],
    ranked: Sequence[str],
    ranking: st.Ranking | None,
) -> str:
    names, reference = [analysis.info.dataset for analysis in analyses], analyses[0].info.reference
    primaries = sorted({analysis.info.primary for analysis in analyses})
    lines = [f"# {len(names)} data sets together: {', '.join(names)}", ""]
    for primary in primaries:
        lines.append(_sentence(primary, merged, reference) if primary in merged else f"{primary}: too few data sets.")
    lines += [
        "",
        f"Accuracy minus that of {reference} (points), random-effects mean over data sets (Paule-Mandel, t interval). "
        "tau: spread of the true effect between data sets. I²: share of the variation that is more than sampling "
        "error. The interval is for the mean effect over data sets like these; tau says how far one of them may lie "
        "from it. Intervals are not adjusted for the number of arms.",
        "",
        "| arm | data sets | mean Δ pt | 95 % | tau | I² | p (homogeneous) |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, found in merged.items():
        interval = f"[{found.effect.low:+.2f}, {found.effect.high:+.2f}]"
        lines.append(
            f"| {arm} | {found.datasets} | {found.effect.mean:+.2f} | {interval} | {found.tau:.2f} | {found.i2:.0%} | "
            f"{found.q_p:.3f} |"
        )
    lines += ["", "![Effects per data set and merged](effects.png)", "", f"| arm | {' | '.join(names)} |"]
    lines.append("|---|" + "---|" * len(names))
    for arm in in_order(effects["arm"].unique()):
        cells = [_cell(effects[(effects["arm"] == arm) & (effects["dataset"] == name)]) for name in names]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    left_out = effects[~(effects["standard_error"] > 0)]
    if len(left_out):
        pairs = ", ".join(f"{row.arm} on {row.dataset}" for row in left_out.itertuples())
        lines += ["", f"Not merged, because its pairs have no spread (one pair, or all alike): {pairs}."]
    lines.append("")
    if ranking is None:
        lines.append(
            f"No ranking: a critical-difference diagram needs {st.MIN_DATASETS_RANKING} data sets with 3 arms in "
            f"common, these are {len(names)}. Seeds are not data sets."
        )
    else:
        lines += [
            f"Friedman p = {ranking.p:.3f}; mean ranks nearer than {ranking.critical_difference:.2f} do not differ at "
            "5 % (Nemenyi).",
            "",
            "![Critical difference](critical_difference.png)",
            "",
            ", ".join(
                f"{arm} {rank:.2f}" for rank, arm in sorted(zip(ranking.mean_ranks.tolist(), ranked, strict=True))
            ),
        ]
    return "\n".join(lines) + "\n"


def _sentence(arm: str, merged: Mapping[str, st.MergedEffect], reference: str) -> str:
    found = merged[arm]
    said = "differs from zero" if found.effect.excludes_zero() else "is not told apart from zero"
    return (
        f"{arm} against {reference}: {found.effect.mean:+.2f} pt [{found.effect.low:+.2f}, {found.effect.high:+.2f}] "
        f"over {found.datasets} data sets; it {said}, and varies by tau = {found.tau:.2f} pt between them."
    )


def _cell(rows: pd.DataFrame) -> str:
    if rows.empty:
        return "-"
    row = rows.iloc[0]
    return f"{row.difference:+.2f} [{row.ci95_low:+.2f}, {row.ci95_high:+.2f}]"


def _forest(effects: pd.DataFrame, merged: Mapping[str, st.MergedEffect], reference: str) -> Figure:
    """Draw each arm's effect per data set, and the merged one as a diamond."""
    arms, names = in_order(effects["arm"].unique()), list(effects["dataset"].unique())
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(arms) * (len(names) + 1)), layout="constrained")
    axes = figure.subplots()
    ticks = []
    for block, arm in enumerate(arms):
        top = block * (len(names) + 1.6)
        for index, name in enumerate(names):
            rows = effects[(effects["arm"] == arm) & (effects["dataset"] == name)]
            if rows.empty:
                continue
            row = rows.iloc[0]
            if math.isfinite(row.ci95_low):
                axes.plot([row.ci95_low, row.ci95_high], [top + index] * 2, color=f"C{index}", lw=1.5)
            label = name if block == 0 else None
            axes.plot(row.difference, top + index, "os^Dv"[index % 5], color=f"C{index}", ms=4.5, label=label)
        if arm in merged:
            effect = merged[arm].effect
            axes.plot([effect.low, effect.high], [top + len(names)] * 2, color="black", lw=2.2)
            label = "merged" if not any(text == "merged" for text in axes.get_legend_handles_labels()[1]) else None
            axes.plot(effect.mean, top + len(names), "D", color="black", ms=6, label=label)
        ticks.append(top + len(names) / 2)
    axes.axvline(0, color="0.4", lw=0.8)
    axes.set_yticks(ticks, arms)
    axes.invert_yaxis()
    axes.set_xlabel(f"accuracy minus {reference} (points), 95 %")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _critical_difference(arms: Sequence[str], ranking: st.Ranking) -> Figure:
    """Draw arms by mean rank, with a bar over those that do not differ (Demsar 2006)."""
    order = np.argsort(ranking.mean_ranks)
    ranks = ranking.mean_ranks[order]
    figure = Figure(figsize=(8, 1.5 + 0.32 * len(arms)), layout="constrained")
    axes = figure.subplots()
    for row, (index, rank) in enumerate(zip(order, ranks, strict=True)):
        axes.plot(rank, row, "o", color="black", ms=5)
        axes.annotate(arms[index], (rank, row), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9)
        # from each arm to the last one that it does not differ from
        last = int(np.flatnonzero(ranks - rank < ranking.critical_difference)[-1])
        if last > row:
            axes.plot([rank, ranks[last]], [row, row], color="0.6", lw=2.5, zorder=0)
    axes.set_xlim(0.8, len(arms) + 1.2)
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_xlabel("mean rank over data sets (1 is best)")
    axes.set_title(f"grey: not different at 5 %, critical difference {ranking.critical_difference:.2f}", fontsize=9)
    return figure
