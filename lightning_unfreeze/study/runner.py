"""`Study`: which runs there are, in which order, what is on disk already, and what the runs say together."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import joblib
import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from tqdm.auto import tqdm

import lightning_unfreeze
from lightning_unfreeze.callbacks.tta import TTAEval
from lightning_unfreeze.layers.groups import layer_groups
from lightning_unfreeze.stages.plan import Stage
from lightning_unfreeze.study.design.arms import (
    CORE,
    HEAD_ARM,
    REFERENCE,
    Arm,
    BatchNormPolicy,
    Rate,
    Recipe,
    arm_names,
    make_arms,
)
from lightning_unfreeze.study.judge.analysis import Analysis, Axis, StudyInfo, skip_arm
from lightning_unfreeze.study.judge.planning import StudyPlan, after_pilot, fit_budget, parse_duration
from lightning_unfreeze.study.runs.costs import Costs, kind_of, measure_costs
from lightning_unfreeze.study.runs.records import RunLog, RunRecord, run_key
from lightning_unfreeze.study.runs.run import Bench, DataModuleFn, ModelFn, Task, execute
from lightning_unfreeze.study.show.result import StudyResult, load_study

FIRST_TUNING_SEED = 1_000_000
"""Tuning seeds count from here, so that no study seed is one of them."""
PILOT_SEEDS = tuple(range(2_000_000, 2_000_005))
"""Seeds of the pilot that `seeds="auto"` runs; they are in no comparison."""
_READERS = frozenset(
    f"study/{name}.py" for name in ("analysis", "cli", "merge", "plots", "report", "result", "statistics", "verdict")
)


class Study:
    """Drops steps of the recipe, one arm each, and compares the arms with the whole recipe on the user's own data.

    Every run is one `Trainer.fit` with the package's own callbacks. Runs of a seed share training images, head, order
    and augmentation; each arm gets the same effort of tuning on validation images; the test images are looked at once
    per run. Finished runs are lines of `runs.jsonl` and `tuning.jsonl` in `out`: started again, a study goes on.

    Args:
        model_fn: Makes the LightningModule; called with `pretrained=False` for arms from random weights.
        datamodule_fn: Makes the LightningDataModule, with a fixed set of test images (see `StudyData`).
        arms: `core`, `all`, names (also separated by commas), or in Python `Arm`s.
        seeds: Number of paired seeds, or the seeds. `auto` runs a pilot of 5 seeds of the core arms first, and takes
            the number that its spread asks for to decide about the margin; the pilot itself is in no comparison.
        margin: Accuracy difference (points) that does not matter to you; fixed before the first run.
        match: Budget of the primary comparison.
        out: Folder of the study.
        recipe: Lengths of the whole recipe.
        rates: `tune` tries `lr_grid` for every arm; `find` lets range tests set all rates, and charges them.
        lr_grid: Peak rates that are tried for every arm that trains more than the head.
        head_lr_grid: Rates that are tried for the head alone; the best one is that of every arm's head stages.
        tuning_seeds: Seeds that tuning uses, none of them a study seed.
        train_size: Training images of a seed; None takes all.
        val_fraction: Share of the images that validate.
        batch_norm: Policy of unfrozen BatchNorm in all arms but those that take the other one.
        network: Attribute of the module that holds the network; None finds it.
        tta_views: As `views` of `TTAEval`; no run of its own.
        monitor: Accuracy that the module logs in validation.
        find_steps: Steps of a range test.
        distortion_images: Validation images on which features are compared.
        shifts: Score the test images also under noise, low contrast, blur and brightness, once per run.
        dataset: Name of the data set, for the report.
        pretrained_on: What the backbone was trained on, for the report.
        trainer: Further arguments of every Trainer, such as `accelerator` or `precision`.
        budget: Time to be done in (`2h`, `30min`, `90s` or seconds): lowers the seeds, then drops arms, until the
            prediction fits; None runs what was asked for.
        n_jobs: Runs at a time.
        backend: Joblib's backend; `dask` and `ray` need their package and a client.
        threads: Threads of torch in a run.
        progress: Show a bar.

    Raises:
        ValueError: For an impossible value.
    """

    def __init__(
        self,
        model_fn: ModelFn,
        datamodule_fn: DataModuleFn,
        arms: str | Sequence[str | Arm] = "core",
        seeds: int | Literal["auto"] | Sequence[int] = 10,
        margin: float = 1.0,
        match: Axis = "flops",
        out: str | os.PathLike[str] = "runs/study",
        recipe: Recipe | None = None,
        rates: Literal["tune", "find"] = "tune",
        lr_grid: Sequence[float] = (3e-4, 1e-3, 3e-3, 1e-2),
        head_lr_grid: Sequence[float] = (1e-3, 3e-3, 1e-2, 3e-2),
        tuning_seeds: int = 2,
        train_size: int | None = None,
        val_fraction: float = 0.2,
        batch_norm: BatchNormPolicy = "train",
        network: str | None = None,
        tta_views: str | list[str] = "flip",
        monitor: str = "val_acc",
        find_steps: int = 100,
        distortion_images: int = 128,
        shifts: bool = False,
        dataset: str = "data",
        pretrained_on: str = "what its weights say",
        trainer: dict[str, Any] | None = None,
        budget: str | float | None = None,
        n_jobs: int = 1,
        backend: str = "loky",
        threads: int = 1,
        progress: bool = True,
    ) -> None:
        self.auto_seeds = seeds == "auto"
        if isinstance(seeds, str) and not self.auto_seeds:
            raise ValueError(f"seeds={seeds!r}: give a number, a list of seeds, or auto.")
        given = [0, 1] if self.auto_seeds else list(range(seeds)) if isinstance(seeds, int) else [int(s) for s in seeds]
        if len(given) < 2 or len(set(given)) < len(given) or max(given) >= FIRST_TUNING_SEED or min(given) < 0:
            raise ValueError(f"seeds={seeds!r}: give 2 or more different ones from 0 to {FIRST_TUNING_SEED - 1}.")
        if not margin > 0:
            raise ValueError(
                f"margin={margin}: give the accuracy difference (points) that does not matter to you, > 0."
            )
        for name, grid in (("lr_grid", lr_grid), ("head_lr_grid", head_lr_grid)):
            if len(grid) < 1 or min(grid) <= 0 or list(grid) != sorted(set(grid)):
                raise ValueError(f"{name}={list(grid)}: give different rates above 0, the lowest first.")
        if len(lr_grid) != len(head_lr_grid):
            raise ValueError(
                f"lr_grid has {len(lr_grid)} rates, head_lr_grid {len(head_lr_grid)}: every arm gets the same effort."
            )
        for name, value in (("tuning_seeds", tuning_seeds), ("n_jobs", n_jobs), ("threads", threads)):
            if value < 1 and not (name == "n_jobs" and value == -1):
                raise ValueError(f"{name}={value}: give 1 or more.")
        if match not in ("flops", "images", "epochs"):
            raise ValueError(f"match={match!r} is none of 'flops', 'images', 'epochs'.")
        self.seeds: list[int] = list(PILOT_SEEDS) if self.auto_seeds else given
        self.margin, self.match, self.out = margin, match, Path(out)
        self.recipe, self.rates = recipe or Recipe(), rates
        self.lr_grid, self.head_lr_grid = tuple(lr_grid), tuple(head_lr_grid)
        self.tuning_seeds = [FIRST_TUNING_SEED + index for index in range(tuning_seeds)]
        self.pretrained_on = pretrained_on
        self.budget_seconds = None if budget is None else parse_duration(budget)
        self.n_jobs, self.backend, self.progress = n_jobs, backend, progress
        self.arm_specs = (
            [
                *[arm for arm in arms if isinstance(arm, Arm)],
                *arm_names([arm for arm in arms if not isinstance(arm, Arm)] or REFERENCE),
            ]
            if not isinstance(arms, str)
            else list(arm_names(arms))
        )
        self.bench = Bench(
            model_fn=model_fn,
            datamodule_fn=datamodule_fn,
            dataset=dataset,
            train_size=train_size,
            val_fraction=val_fraction,
            batch_norm=batch_norm,
            network=network,
            views=tta_views,
            monitor=monitor,
            find_steps=find_steps,
            distortion_images=distortion_images,
            shifts=shifts,
            threads=threads,
            trainer=dict(trainer or {}),
            code_version=code_version(),
        )

    # --- what there is to run --------------------------------------------------------------------------------------

    @functools.cached_property
    def _looked_at(self) -> tuple[dict[str, Arm], Costs, StudyInfo]:
        """Arms, costs, and what the report says of the study; from the module and data of the first seed."""
        module, data = self.bench.module(self.seeds[0]), self.bench.data(self.seeds[0])
        groups = list(layer_groups(module, self.bench.network))
        own = [arm for arm in self.arm_specs if isinstance(arm, Arm)]
        wanted = [arm for arm in self.arm_specs if isinstance(arm, str)]
        names = dict.fromkeys([REFERENCE, skip_arm(self.match), *wanted])
        # the programs do not depend on FLOPs, but for the length of cycles: one look at the kinds, then the fit
        shapes = make_arms([*names, HEAD_ARM], self.recipe, groups, lambda stages: 1.0)
        stages = [stage for arm in [*shapes, *own] for stage in arm.stages]
        stages += [dataclasses.replace(stage, precompute=False) for stage in stages]
        views = TTAEval(views=self.bench.views, augmentation=None).num_views
        options = {**self.bench.trainer_options, "enable_progress_bar": False}
        costs = measure_costs(
            {kind_of(stage): stage for stage in stages}.values(),
            module,
            data,
            options,
            self.bench.network,
            self.bench.find_steps,
            views,
        )

        def flops(stages: Sequence[Stage]) -> float:
            rate: Rate | None = "find" if self.rates == "find" else None
            return costs.flops([dataclasses.replace(stage, lr=rate) for stage in stages])

        replaced = {arm.name for arm in own}
        built = make_arms(
            [name for name in dict.fromkeys([*names, HEAD_ARM]) if name not in replaced], self.recipe, groups, flops
        )
        arms = {arm.name: arm for arm in [*built, *own]}
        info = StudyInfo(
            dataset=self.bench.dataset,
            n_train=len(data.train_indices),
            n_test=data.num_test,
            architecture=str(getattr(module, "hparams", {}).get("backbone", type(module).__name__)),
            pretrained_on=self.pretrained_on,
            margin=self.margin,
            match=self.match,
            arms=tuple(name for name in arms if name in {*names, *replaced}),
        )
        return arms, costs, info

    @property
    def arms(self) -> list[Arm]:
        """The arms that are asked for, with the two of the primary comparison."""
        arms, _, info = self._looked_at
        return [arms[name] for name in info.arms]

    @property
    def costs(self) -> Costs:
        """What the kinds of stages cost."""
        return self._looked_at[1]

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """All that decides a run's result, of plain JSON types; what is run, and where, is not part of it."""
        bench = {field.name: getattr(self.bench, field.name) for field in dataclasses.fields(self.bench)}
        bench |= {"model_fn": describe(self.bench.model_fn), "datamodule_fn": describe(self.bench.datamodule_fn)}
        own = {name: getattr(self, name) for name in ("margin", "match", "rates", "lr_grid", "head_lr_grid")}
        settings = {**bench, **own, "recipe": asdict(self.recipe), "tuning_seeds": self.tuning_seeds}
        plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        return plain

    # --- plan ------------------------------------------------------------------------------------------------------

    def plan(self) -> StudyPlan:
        """Return what will be run, about how long it takes, and what it can find; trains nothing.

        With `seeds="auto"` it is the pilot's plan until the pilot has run.
        """
        arms, costs, info = self._looked_at
        known = {name: self._stages(arm, None, None) for name, arm in arms.items()}
        seconds = {name: costs.seconds(stages) for name, stages in known.items()}
        tuned = {name: self._tuned_runs(arms[name]) for name in dict.fromkeys([*info.arms, HEAD_ARM])}
        # the head's rate is part of every arm: what it takes to tune is never saved
        tuning = {name: count * seconds[name] for name, count in tuned.items() if name != HEAD_ARM}
        tuning[REFERENCE] += tuned[HEAD_ARM] * seconds[HEAD_ARM]
        names, keep = list(info.arms), [REFERENCE, skip_arm(self.match)]
        jobs = max(1, joblib.effective_n_jobs(self.n_jobs)) if self.backend == "loky" else 1
        order = {name: seconds[name] for name in sorted(names, key=lambda name: name not in keep)}
        budget = math.inf if self.budget_seconds is None else jobs * self.budget_seconds
        fit = fit_budget(order, tuning, budget, len(self.seeds), keep)
        names = [name for name in names if name in fit.arms]
        rows = []
        for name in names:
            stages = known[name]
            rows.append(
                {
                    "arm": name + (" (primary)" if name == info.primary else ""),
                    "stages": " · ".join(_stage_words(stage) for stage in stages),
                    "epochs": arms[name].num_epochs,
                    "images": costs.images(stages),
                    "GFLOPs": costs.flops(stages) / 1e9,
                    "of full": round(costs.flops(stages) / costs.flops(known[REFERENCE]), 3),
                    "tuning runs": tuned[name],
                    "s per run": seconds[name],
                }
            )
        runs = sum(tuned[name] for name in dict.fromkeys([*names, HEAD_ARM]))
        seeds, pilot = tuple(self.seeds[: fit.seeds]), self.seeds == list(PILOT_SEEDS)
        return StudyPlan(tuple(names), seeds, runs, fit.seconds / jobs, tuple(rows), info, pilot)

    def _tuned_runs(self, arm: Arm) -> int:
        return 0 if self.rates == "find" or arm.rate == "fixed" else len(self._grid(arm)) * len(self.tuning_seeds)

    def _grid(self, arm: Arm) -> tuple[float, ...]:
        return self.head_lr_grid if arm.rate == "head" else self.lr_grid

    # --- run -------------------------------------------------------------------------------------------------------

    def run(self) -> StudyResult:
        """Make the runs that are not on disk yet, and return what all of them say.

        Raises:
            ValueError: If the folder holds a study with other settings.
        """
        self._refuse_other_settings()
        if self.auto_seeds:
            self.seeds = self._pilot()
        plan = self._claim_folder(self.plan())
        arms = self._looked_at[0]
        self._compare([arms[name] for name in plan.arms], plan.seeds, "runs")
        return self.report()

    def report(self) -> StudyResult:
        """Write the report of the runs on disk to `report/`, and return them."""
        result = load_study(self.out)
        result.write(self.out / "report")
        return result

    def _pilot(self) -> list[int]:
        """Run the core arms with the pilot's seeds, say how far pairs differ, and return the seeds of the study."""
        arms, _, info = self._looked_at
        self.out.mkdir(parents=True, exist_ok=True)
        names = [name for name in info.arms if name in (*CORE, info.primary)]
        records = self._compare([arms[name] for name in names], PILOT_SEEDS, "pilot")
        pilot = Analysis(list(records.values()), dataclasses.replace(info, arms=tuple(names)))
        number, sentences = after_pilot(pilot)
        for sentence in sentences:
            rank_zero_info(sentence)
        return list(range(number))

    def _compare(self, arms: Sequence[Arm], seeds: Sequence[int], what: str) -> dict[str, RunRecord]:
        """Tune the arms, run each with each seed, and return the records by key."""
        rates = self._tune(arms)
        # seed-major, arms in an order of the seed's own: a slow hour or a kill must not fall on one arm
        tasks = [
            self._task(arms[index], seed, rates)
            for seed in seeds
            for index in np.random.default_rng([7, seed]).permutation(len(arms))
        ]
        return self._make(tasks, RunLog(self.out / f"{what}.jsonl"), what)

    def _refuse_other_settings(self) -> dict[str, Any] | None:
        """Return what `out` says of a study that was started there with these settings, None where there is none."""
        path = self.out / "study.json"
        if not path.exists():
            return None
        before: dict[str, Any] = json.loads(path.read_text())
        names = sorted({*before["settings"], *self.settings})
        changed = [name for name in names if before["settings"].get(name) != self.settings.get(name)]
        if changed:
            raise ValueError(
                f"out={str(self.out)!r} holds a study with another {', '.join(changed)}: give another folder, or "
                "the settings that it was started with."
            )
        return before

    def _claim_folder(self, plan: StudyPlan) -> StudyPlan:
        """Write down what the study is, and return what to run: under a budget that of the first start."""
        before = self._refuse_other_settings()
        if before is not None and self.budget_seconds is not None:
            # another timing would give another number of seeds: a number that is chosen after looking
            plan = dataclasses.replace(plan, arms=tuple(before["info"]["arms"]), seeds=tuple(before["seeds"]))
        path = self.out / "study.json"
        self.out.mkdir(parents=True, exist_ok=True)
        info = dataclasses.replace(plan.info, arms=plan.arms)
        what = {"settings": self.settings, "seeds": plan.seeds, "info": asdict(info)}
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(what, indent=1))
        partial.replace(path)
        return plan

    def _tune(self, arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
        """Return the tuned rate of each arm with the fields of its record, the head's first."""
        if self.rates == "find":
            return {}
        log = RunLog(self.out / "tuning.jsonl")
        head = self._looked_at[0][HEAD_ARM]
        chosen: dict[str, dict[str, Any]] = {}
        # the head's rate is part of the other arms, so it is there first
        for group in ([head], [arm for arm in arms if arm.rate == "full"]):
            tasks = {
                arm.name: [
                    self._tuning_task(arm, seed, rate, chosen) for rate in self._grid(arm) for seed in self.tuning_seeds
                ]
                for arm in group
            }
            # seed-major here too: a slow hour must not fall on one arm
            order = sorted((task for each in tasks.values() for task in each), key=lambda task: task.seed)
            records = self._make(order, log, "tuning")
            for arm in group:
                chosen[arm.name] = _best_rate([records[task.key] for task in tasks[arm.name]])
        return chosen

    def _stages(self, arm: Arm, head: float | None, full: float | None) -> list[Stage]:
        """Return the arm's stages with their rates; `None` stands for a rate that is not known yet."""
        if self.rates == "find" and arm.rate != "fixed":
            return arm.with_rates("find", "find")
        rates: tuple[Rate, Rate] = (head or self.head_lr_grid[0], full or self.lr_grid[0])
        return arm.with_rates(*rates)

    def _tuning_task(self, arm: Arm, seed: int, rate: float, chosen: Mapping[str, Mapping[str, Any]]) -> Task:
        head = rate if arm.rate == "head" else chosen[HEAD_ARM]["rate"]
        label = f"{arm.name} @ {rate:g}"
        return Task(self._key(arm, label, seed), arm, seed, tuple(self._stages(arm, head, rate)), "val", label, rate)

    def _task(self, arm: Arm, seed: int, rates: Mapping[str, Mapping[str, Any]]) -> Task:
        own = HEAD_ARM if arm.rate == "head" else arm.name
        tuned = rates.get(own) if arm.rate != "fixed" else None
        head = rates[HEAD_ARM]["rate"] if rates else None
        full = tuned["rate"] if tuned and arm.rate == "full" else None
        fields = {name: value for name, value in (tuned or {}).items() if name != "rate"}
        return Task(
            self._key(arm, arm.name, seed),
            arm,
            seed,
            tuple(self._stages(arm, head, full)),
            "test",
            arm.name,
            rate=tuned["rate"] if tuned else None,
            tuning=fields,
        )

    def _key(self, arm: Arm, label: str, seed: int) -> str:
        return run_key({**self.settings, "arm": asdict(arm)}, label, seed, self.bench.code_version)

    def _make(self, tasks: Sequence[Task], log: RunLog, what: str) -> dict[str, RunRecord]:
        """Make the runs that the log lacks; this process is the only one that writes."""
        records = {record.key: record for record in log.read()}
        missing = [task for task in tasks if task.key not in records]
        with tqdm(
            total=len(tasks), initial=len(tasks) - len(missing), desc=what, unit="run", disable=not self.progress
        ) as bar:
            for record in self._results(missing):
                log.append(record)
                records[record.key] = record
                bar.update()
                bar.set_postfix_str(f"{record.arm}, seed {record.seed}: {record.acc:.1%}")
        return {task.key: records[task.key] for task in tasks}

    def _results(self, tasks: Sequence[Task]) -> Iterator[RunRecord]:
        """Yield records as they come, from as many workers as there are."""
        if self.n_jobs == 1 and self.backend == "loky":
            yield from (execute(task, self.bench, self.costs) for task in tasks)
            return
        if self.backend == "ray":
            from ray.util.joblib import register_ray

            register_ray()
        with joblib.parallel_config(backend=self.backend, n_jobs=self.n_jobs):
            streams = joblib.parallel.get_active_backend()[0].supports_return_generator
            # a backend that returns all at once gets a few at a time, so that a kill loses but a few
            size = max(1, len(tasks) if streams else joblib.effective_n_jobs(self.n_jobs))
            returned = "generator_unordered" if streams else "list"
            with joblib.Parallel(return_as=returned, batch_size=1, pre_dispatch="n_jobs") as parallel:
                for first in range(0, len(tasks), size):
                    chunk = tasks[first : first + size]
                    yield from parallel(joblib.delayed(execute)(task, self.bench, self.costs) for task in chunk)


def code_version(package: Path = Path(lightning_unfreeze.__file__).parent) -> str:
    """Return the version with a digest of all source that a run's result may depend on.

    A version number alone stays the same while a checkout changes, and a study that goes on after an edit would pair
    runs of two programs. What only reads finished runs does not count.

    Args:
        package: Folder of the package.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name not in _READERS:
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{lightning_unfreeze.__version__}+{digest.hexdigest()[:12]}"


def describe(function: Any) -> Any:
    """Return what makes two functions the same ones for a study: their own word, or name and source text.

    >>> describe(functools.partial(int, base=2))[1:]
    [[], {'base': '2'}]
    """
    if hasattr(function, "spec"):
        return function.spec
    if isinstance(function, functools.partial):
        given = {name: repr(value) for name, value in function.keywords.items()}
        return [describe(function.func), [repr(value) for value in function.args], given]
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = ""
    return [getattr(function, "__module__", ""), getattr(function, "__qualname__", type(function).__name__), source]


def _best_rate(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the rate with the best mean validation accuracy, the lower one of equals, and the record's fields."""
    by_rate: dict[float, list[float]] = {}
    for record in records:
        by_rate.setdefault(float(record.tuned_lr or 0.0), []).append(record.acc)
    curve = tuple((rate, float(np.mean(by_rate[rate]))) for rate in sorted(by_rate))
    best = max(curve, key=lambda point: (point[1], -point[0]))[0]
    return {
        "rate": best,
        "lr_at_grid_edge": len(curve) > 1 and best in (curve[0][0], curve[-1][0]),
        "tuning_curve": curve,
        "tuning_images": sum(record.images for record in records),
        "tuning_flops": sum(record.flops for record in records),
    }


def _stage_words(stage: Stage) -> str:
    """Return a stage in a few characters: C2, F1+1+1, U1+2+4."""
    letter = "C" if stage.precompute else "F" if stage.train == "head" else "U" if stage.train == "all" else "G"
    if stage.cycle_len is None:
        return f"{letter}{stage.num_epochs}"
    lengths = [f"{float(length):g}" for length in stage.cycle_epochs]
    return letter + ("+".join(lengths) if len(lengths) <= 4 else f"{len(lengths)}x{lengths[0]}")
