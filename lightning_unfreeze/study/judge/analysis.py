"""From the runs of a study to its comparisons: pairs by seed, the cost target, each arm against the reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lightning_unfreeze.study.design.arms import ALL, REFERENCE
from lightning_unfreeze.study.judge import statistics as st
from lightning_unfreeze.study.judge import time_to_target as tt
from lightning_unfreeze.study.runs.records import CurvePoint, RunRecord

Axis = Literal["flops", "images", "epochs"]
CostAxis = Literal["flops", "images", "epochs", "seconds"]

AXIS_LABEL: dict[CostAxis, str] = {
    "flops": "FLOPs",
    "images": "images",
    "epochs": "unfrozen epochs",
    "seconds": "seconds",
}
BUDGETS: tuple[Axis, ...] = ("flops", "images", "epochs")
COSTS: tuple[CostAxis, ...] = ("epochs", "images", "flops", "seconds")
MAX_PROBE_CV = 0.10

FAR_OFF_POINTS = 5.0
"""A run this far below its arm's median, and an outlier among its runs, is said to have collapsed."""


@dataclass(frozen=True)
class StudyInfo:
    """What a reader must know of a study beside its runs. `margin` and `match` were fixed before the first run.

    Attributes:
        dataset: Name of the data set.
        n_train: Training images.
        n_test: Test images.
        architecture: Name of the backbone.
        pretrained_on: What the backbone was trained on.
        margin: Accuracy difference (points) that the user called negligible.
        match: Budget on which the primary comparison is matched.
        target_below_best: The cost target lies this many points below the reference's best mean validation accuracy.
        reference: Arm that every other one is compared with.
        arms: Arms that were planned; what is missing of them is said.
        planned_seeds: Seeds that were planned before the first run; nothing is judged before all of them are there.
        looks: Numbers of seeds at which a verdict was planned, the last one among them; empty for one look at the end.
        overlap: Share of the training images of one seed that another one has too, None where it is not known.
        charge_tuning: Whether what tuning an arm took counts among its costs.
        condition: What sets it apart from other studies of these images and this network, for `study merge`.
        facts: What else a reader must know, by name: recipe, BatchNorm policy, sizes, versions.
    """

    dataset: str
    n_train: int
    n_test: int
    architecture: str
    pretrained_on: str
    margin: float = 1.0
    match: Axis = "flops"
    target_below_best: float = 1.0
    reference: str = REFERENCE
    arms: tuple[str, ...] = ()
    planned_seeds: tuple[int, ...] = ()
    looks: tuple[int, ...] = ()
    overlap: float | None = None
    charge_tuning: bool = False
    condition: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> StudyInfo:
        """Return what `dataclasses.asdict` and JSON made of one."""
        listed = {name: tuple(found.get(name, ())) for name in ("arms", "planned_seeds", "looks")}
        return cls(**{**found, **listed})

    @property
    def primary(self) -> str:
        """Name of the arm of the one primary comparison."""
        return skip_arm(self.match)


@dataclass(frozen=True)
class Comparison:
    """One arm against the reference, on the seeds that both have.

    Attributes:
        arm: Name of the arm.
        seeds: Paired seeds.
        differences: Accuracy difference (points) per seed.
        verdict: Outcome of the accuracy rules with the interval that they are applied to: for other seeds and new
            test images, at the level that is left after the correction for the number of comparisons.
        new_images: False where the test sets differ, so that the verdict is about other seeds alone.
        these_images: Interval of the same level over seeds alone, on these test images.
        robust: Hodges and Lehmann's estimate with its interval, likewise over seeds alone.
        outliers: Seeds whose difference lies far off the others.
        disagreement: Share of test images on which the two arms differ, mean over seeds, None where test sets differ.
        p: Sign-flip p-value over seeds.
        p_holm: Holm's over the secondary comparisons, None for the primary one.
        better: P(arm > reference) over seeds, with Wilson's interval.
        shifted: Verdict on the shifted test images, corrected for the number of arms, None where there are none.
        costs: Ratio of costs to the target, per axis.
    """

    arm: str
    seeds: tuple[int, ...]
    differences: st.Array
    verdict: st.AccuracyVerdict
    new_images: bool
    these_images: st.Interval
    robust: st.Interval
    outliers: tuple[int, ...]
    disagreement: float | None
    p: float
    p_holm: float | None
    better: st.Interval
    shifted: st.AccuracyVerdict | None
    costs: Mapping[CostAxis, tt.CostRatio]

    @property
    def total(self) -> st.Interval | None:
        """The 95 % interval over seeds and test images, whatever the number of comparisons."""
        return self.verdict.effect.interval() if self.new_images else None


@dataclass(frozen=True)
class Look:
    """Where a study stands in its own plan, and what may be concluded there.

    Attributes:
        alpha: Level of this look; zero where none was planned.
        note: What a reader must know first, empty where the study ended as planned.
    """

    alpha: float
    note: str = ""


class Analysis:
    """The runs of one study on one data set, paired by seed.

    Args:
        records: Finished runs; arms or seeds may be missing.
        info: What the study was.

    Raises:
        ValueError: There is no run, the runs are of several data sets, or an arm holds a seed twice.
    """

    def __init__(self, records: Sequence[RunRecord], info: StudyInfo) -> None:
        self.info = info
        datasets = sorted({record.dataset for record in records})
        if len(datasets) != 1:
            raise ValueError(
                f"got runs of {len(datasets)} data sets {datasets}; a report is about one, `study merge` about several."
            )
        runs: dict[str, dict[int, RunRecord]] = {}
        for record in records:
            if record.seed in runs.setdefault(record.arm, {}):
                raise ValueError(
                    f"got two runs of {record.arm}, seed {record.seed} (keys {runs[record.arm][record.seed].key}, "
                    f"{record.key}): the settings changed in between. Report them apart."
                )
            runs[record.arm][record.seed] = record
        self.arms = in_order(runs)
        self.runs = {arm: dict(sorted(runs[arm].items())) for arm in self.arms}

    @cached_property
    def target(self) -> float | None:
        """Validation accuracy in [0, 1] that costs are read at: the reference's best mean cycle end less a stated gap.

        Only epochs at which every run of the reference ended a cycle count, so that early stopping cannot leave the
        lucky runs in the mean.
        """
        ends = [{point.epoch: point.val_acc for point in cycle_ends(run)} for run in self._reference.values()]
        shared = set.intersection(*(set(run) for run in ends)) if ends else set()
        if not shared:
            return None
        return max(float(np.mean([run[epoch] for run in ends])) for epoch in shared) - self.info.target_below_best / 100

    @cached_property
    def probe_cv(self) -> float | None:
        """Coefficient of variation of the throughput probe over runs, None where a run has none."""
        probes = [run.probe_images_per_second for arm in self.arms for run in self.runs[arm].values()]
        known = [probe for probe in probes if probe is not None]
        if len(known) < 2 or len(known) < len(probes):
            return None
        return float(np.std(known, ddof=1) / np.mean(known))

    @property
    def seconds_comparable(self) -> bool:
        """Whether the machine was steady enough for wall-clock time to mean anything."""
        return self.probe_cv is not None and self.probe_cv <= MAX_PROBE_CV

    @cached_property
    def look(self) -> Look:
        """Where the study stands in its plan: the level of the verdict, and what stands above it."""
        planned, primary = self.info.planned_seeds, self.info.primary
        paired = self._reference.keys() & self.runs.get(primary, {}).keys()
        if not planned:
            return Look(st.ALPHA)
        extra, done = sorted(paired - set(planned)), len(paired & set(planned))
        looks = self.info.looks or (len(planned),)
        if extra:
            return Look(
                st.ALPHA,
                f"EXTENDED AFTER A LOOK: {len(planned)} seeds were planned, {len(extra)} more were run. Whoever goes "
                "on until a verdict comes errs in 8 to 17 % of studies, not in 5 %: read this one as exploratory.",
            )
        if done not in looks:
            wanted = " or ".join(str(look) for look in looks if look > done)
            return Look(0.0, f"NOT FINISHED: {done} of {len(planned)} planned seeds; the verdict comes with {wanted}.")
        alpha = st.spent_alpha(looks)[looks.index(done)]
        if done == len(planned) and len(looks) == 1:
            return Look(alpha)
        return Look(alpha, f"Planned look at {done} seeds, of {', '.join(map(str, looks))}: level {alpha:.4f} here.")

    @cached_property
    def num_secondary(self) -> int:
        """Comparisons beside the primary one, those that were planned but have no runs yet among them."""
        return len({*self.arms, *self.info.arms} - {self.info.reference, self.info.primary})

    def cost(self, run: RunRecord, axis: CostAxis) -> tuple[float, bool]:
        """Return the cost to the target and True, or the whole cost of the run and False where it was not reached."""
        low, high = self.bracket(run, axis)
        return (high, True) if math.isfinite(high) else (low, False)

    def bracket(self, run: RunRecord, axis: CostAxis) -> tt.Bracket:
        """Return the costs between which a run reached the target, the upper one infinite where it did not.

        A run is seen to have reached the target at a cycle end, and not to have reached it at the one before.
        """
        charged, before = self._tuning_cost(run, axis) if self.info.charge_tuning else 0.0, 0.0
        for point in cycle_ends(run):
            if self.target is not None and point.val_acc >= self.target:
                return charged + before, charged + _on_axis(point, axis)
            before = _on_axis(point, axis)
        return charged + (_on_axis(run.curve[-1], axis) if run.curve else 0.0), math.inf

    def _tuning_cost(self, run: RunRecord, axis: CostAxis) -> float:
        images = run.tuning_images
        return {
            "images": float(images),
            "flops": run.tuning_flops,
            "epochs": images / max(self.info.n_train, 1),
            "seconds": run.tuning_seconds,
        }[axis]

    def time_outcome(self, arm: str, axis: CostAxis) -> tt.TimeOutcome:
        """Return the outcome of the rules for the time half."""
        outcome = tt.time_verdict(self.comparisons[arm].costs[axis])
        return "undecided" if not self.look.alpha and outcome in ("upheld", "refuted") else outcome

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """Every arm that shares a seed with the reference, compared with it."""
        pairs = {arm: tuple(sorted(self.runs[arm].keys() & self._reference.keys())) for arm in self.arms}
        pairs = {arm: seeds for arm, seeds in pairs.items() if seeds and arm != self.info.reference}
        differences = {arm: self.differences(arm, self.info.reference, seeds) for arm, seeds in pairs.items()}
        p = {arm: st.sign_flip_p(d) for arm, d in differences.items()}
        secondary = [arm for arm in pairs if arm != self.info.primary]
        p_holm = dict(zip(secondary, st.holm([p[arm] for arm in secondary]).tolist(), strict=True))
        found = {}
        for arm, seeds in pairs.items():
            bits = self._bits(arm, seeds) if self._same_images(arm, seeds) else None
            effect = st.crossed_effect(*bits) if bits else st.seed_effect(differences[arm])
            verdict = self._judged(effect, self.num_secondary if arm != self.info.primary else 1)
            level = verdict.interval.level
            shifted = self._shifted(arm, seeds)
            found[arm] = Comparison(
                arm=arm,
                seeds=seeds,
                differences=differences[arm],
                verdict=verdict,
                new_images=bits is not None,
                these_images=st.paired_t_interval(differences[arm], level),
                robust=st.hodges_lehmann(differences[arm], level),
                outliers=tuple(seeds[index] for index in st.outliers(differences[arm])),
                disagreement=float((bits[0] != bits[1]).mean()) if bits else None,
                p=p[arm],
                p_holm=p_holm.get(arm),
                better=st.probability_better(differences[arm]),
                shifted=None if shifted is None else self._judged(shifted, self.num_secondary + 1),
                costs={axis: self._cost_ratio(arm, seeds, axis) for axis in COSTS},
            )
        return found

    def _judged(self, effect: st.Effect, comparisons: int) -> st.AccuracyVerdict:
        """Apply the rules at the level of this look; where none was planned, nothing is decided."""
        look = self.look.alpha
        verdict = st.accuracy_verdict(effect, self.info.margin, alpha=look or st.ALPHA, comparisons=comparisons)
        return verdict if look else replace(verdict, outcome="undecided")

    @cached_property
    def collapsed(self) -> dict[str, tuple[int, ...]]:
        """Seeds of runs that ended far below all others of their arm, by arm."""
        found = {}
        for arm, runs in self.runs.items():
            accuracy = np.array([100 * run.acc for run in runs.values()])
            far = [index for index in st.outliers(accuracy) if accuracy[index] < np.median(accuracy) - FAR_OFF_POINTS]
            if far:
                found[arm] = tuple(list(runs)[index] for index in far)
        return found

    def beside_best_rate(self, arm: str) -> list[float]:
        """Return what validation accuracy (points) the neighbours of the arm's best rate lose, on the tuning seeds."""
        run = next(iter(self.runs.get(arm, {}).values()), None)
        if run is None or run.tuned_lr is None:
            return []
        rates = [rate for rate, _ in run.tuning_curve]
        scores = [100 * score for _, score in run.tuning_curve]
        best = rates.index(run.tuned_lr) if run.tuned_lr in rates else -1
        return [scores[best] - scores[i] for i in (best - 1, best + 1) if best >= 0 and 0 <= i < len(rates)]

    def differences(self, arm: str, other: str, seeds: Sequence[int]) -> st.Array:
        """Return accuracy(arm) - accuracy(other) in points, one per seed."""
        return np.array([100 * (self.runs[arm][seed].acc - self.runs[other][seed].acc) for seed in seeds])

    def not_converged(self, arm: str) -> int:
        """Return how many runs of the arm were still getting better at their last cycle end."""
        return sum(converged_at(run) is None for run in self.runs[arm].values())

    @property
    def _reference(self) -> dict[int, RunRecord]:
        return self.runs.get(self.info.reference, {})

    def _cost_ratio(self, arm: str, seeds: Sequence[int], axis: CostAxis) -> tt.CostRatio:
        def costs(name: str) -> list[tt.Bracket]:
            return [self.bracket(self.runs[name][seed], axis) for seed in seeds]

        return tt.cost_ratio(costs(arm), costs(self.info.reference))

    def _shifted(self, arm: str, seeds: Sequence[int]) -> st.Effect | None:
        """Return the effect on the shifted test images, None where they were not scored image by image."""
        sides = [[self.runs[name][seed] for seed in seeds] for name in (arm, self.info.reference)]
        if not self._same_images(arm, seeds) or not all(run.correct_shifted for side in sides for run in side):
            return None
        return st.crossed_effect(*(np.array([run.shifted_shares() for run in side]) for side in sides))

    def _same_images(self, arm: str, seeds: Sequence[int]) -> bool:
        return len({self.runs[name][seed].n_test for name in (arm, self.info.reference) for seed in seeds}) == 1

    def _bits(self, arm: str, seeds: Sequence[int]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Return correctness of arm and reference, each `(S, N)`."""
        a, b = (
            np.array([self.runs[name][seed].correct_bits() for seed in seeds]) for name in (arm, self.info.reference)
        )
        return a, b


def in_order(arms: Iterable[str]) -> tuple[str, ...]:
    """Return the arms in the order of the package's own, others behind them by name."""
    known = {arm: rank for rank, arm in enumerate(ALL)}
    return tuple(sorted(arms, key=lambda arm: (known.get(arm, len(known)), arm)))


def skip_arm(axis: Axis) -> str:
    """Return the name of the arm that skips steps 3 and 4 at the same budget on that axis."""
    return f"skip34@{axis}"


def cycle_ends(run: RunRecord) -> list[CurvePoint]:
    """Return the points at which a cycle ended: right after a restart accuracy drops by 5 to 15 points."""
    return [point for point in run.curve if point.cycle_end]


def converged_at(run: RunRecord) -> float | None:
    """Return the epoch at which the run had converged, None where it had not."""
    ends = cycle_ends(run)
    return tt.epochs_to_converge([p.epoch for p in ends], [100 * p.val_acc for p in ends])


def _on_axis(point: CurvePoint, axis: CostAxis) -> float:
    return {"epochs": point.epoch, "images": point.images, "flops": point.flops, "seconds": point.seconds}[axis]
