"""From the runs of a study to its comparisons: pairs by seed, the cost target, each arm against the reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_unfreeze.study.design.arms import ALL, REFERENCE
from lightning_unfreeze.study.judge import statistics as st
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

OUTCOME_WORDS: dict[st.Outcome, str] = {
    "upheld": "within margin",
    "small": "within margin, but real",
    "refuted-": "worse",
    "refuted+": "better",
    "undecided": "undecided",
}


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
        verdict: Outcome of the accuracy rules.
        total: 95 % interval over seeds and test images, None where the test sets differ.
        disagreement: Share of test images on which the two arms differ, mean over seeds, None likewise.
        p: Sign-flip p-value.
        p_holm: Holm's over the secondary comparisons, None for the primary one.
        better: P(arm > reference) over seeds, with Wilson's interval.
        costs: Ratio of costs to the target, per axis.
    """

    arm: str
    seeds: tuple[int, ...]
    differences: st.Array
    verdict: st.AccuracyVerdict
    total: st.Interval | None
    disagreement: float | None
    p: float
    p_holm: float | None
    better: st.Interval
    costs: Mapping[CostAxis, st.CostRatio]


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

    def cost(self, run: RunRecord, axis: CostAxis) -> tuple[float, bool]:
        """Return the cost to the target and True, or the whole cost of the run and False where it was not reached."""
        reached = [p for p in cycle_ends(run) if self.target is not None and p.val_acc >= self.target]
        if reached:
            return _on_axis(reached[0], axis), True
        return (_on_axis(run.curve[-1], axis) if run.curve else 0.0), False

    def cost_bracket(self, arm: str, axis: CostAxis) -> tuple[float, float] | None:
        """Return the range of the cost ratio if the target was met between two cycle ends.

        A run is seen to have reached the target at a cycle end, and not to have reached it at the one before: its
        true cost lies in between. The range is the geometric mean ratio with one arm at its earliest and the other
        at its latest. None where no pair reached the target.
        """
        low, high = [], []
        for seed in self.comparisons[arm].seeds:
            run, reference = self.runs[arm][seed], self.runs[self.info.reference][seed]
            (latest, reached), (reference_latest, reference_reached) = self.cost(run, axis), self.cost(reference, axis)
            if reached and reference_reached:
                low.append(_cost_before(run, latest, axis) / reference_latest)
                before = _cost_before(reference, reference_latest, axis)
                high.append(latest / before if before else math.inf)
        return (_geometric_mean(low), _geometric_mean(high)) if low else None

    def time_outcome(self, arm: str, axis: CostAxis) -> st.TimeOutcome:
        """Return the outcome of the rules; undecided where all pairs have one ratio that cycle ends could reverse."""
        cost, bracket = self.comparisons[arm].costs[axis], self.cost_bracket(arm, axis)
        outcome = st.time_verdict(cost)
        if outcome in ("upheld", "refuted") and cost.same_in_all_pairs and bracket and bracket[0] <= 1 <= bracket[1]:
            return "undecided"
        return outcome

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """Every arm that shares a seed with the reference, compared with it."""
        pairs = {arm: tuple(sorted(self.runs[arm].keys() & self._reference.keys())) for arm in self.arms}
        pairs = {arm: seeds for arm, seeds in pairs.items() if seeds and arm != self.info.reference}
        differences = {arm: self.differences(arm, self.info.reference, seeds) for arm, seeds in pairs.items()}
        p = {arm: st.sign_flip_p(d) for arm, d in differences.items()}
        secondary = [arm for arm in pairs if arm != self.info.primary]
        p_holm = dict(zip(secondary, st.holm([p[arm] for arm in secondary]).tolist(), strict=True))
        bits = {arm: self._bits(arm, seeds) for arm, seeds in pairs.items() if self._same_images(arm, seeds)}
        return {
            arm: Comparison(
                arm=arm,
                seeds=seeds,
                differences=differences[arm],
                verdict=st.accuracy_verdict(differences[arm], self.info.margin),
                total=st.total_interval(*bits[arm]) if arm in bits else None,
                disagreement=float((bits[arm][0] != bits[arm][1]).mean()) if arm in bits else None,
                p=p[arm],
                p_holm=p_holm.get(arm),
                better=st.probability_better(differences[arm]),
                costs={axis: self._cost_ratio(arm, seeds, axis) for axis in COSTS},
            )
            for arm, seeds in pairs.items()
        }

    def differences(self, arm: str, other: str, seeds: Sequence[int]) -> st.Array:
        """Return accuracy(arm) - accuracy(other) in points, one per seed."""
        return np.array([100 * (self.runs[arm][seed].acc - self.runs[other][seed].acc) for seed in seeds])

    def not_converged(self, arm: str) -> int:
        """Return how many runs of the arm were still getting better at their last cycle end."""
        return sum(converged_at(run) is None for run in self.runs[arm].values())

    @property
    def _reference(self) -> dict[int, RunRecord]:
        return self.runs.get(self.info.reference, {})

    def _cost_ratio(self, arm: str, seeds: Sequence[int], axis: CostAxis) -> st.CostRatio:
        def costs(name: str) -> list[float]:
            found = [self.cost(self.runs[name][seed], axis) for seed in seeds]
            return [value if reached else math.nan for value, reached in found]

        return st.cost_ratio(costs(arm), costs(self.info.reference))

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
    return st.epochs_to_converge([p.epoch for p in ends], [100 * p.val_acc for p in ends])


def _cost_before(run: RunRecord, cost: float, axis: CostAxis) -> float:
    """Return the cost at the last cycle end before `cost`, zero where there is none."""
    return max((_on_axis(point, axis) for point in cycle_ends(run) if _on_axis(point, axis) < cost), default=0.0)


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values)) if min(values) > 0 else 0.0


def _on_axis(point: CurvePoint, axis: CostAxis) -> float:
    return {"epochs": point.epoch, "images": point.images, "flops": point.flops, "seconds": point.seconds}[axis]
