"""`Study`: which runs there are, in which order, what is on disk already, and what the runs say together."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from tqdm.auto import tqdm

from lightning_unfreeze.callbacks.tta import TTAEval
from lightning_unfreeze.layers.groups import layer_groups
from lightning_unfreeze.stages.plan import Stage
from lightning_unfreeze.study.design.arms import (
    CORE,
    REFERENCE,
    Arm,
    BatchNormPolicy,
    Rate,
    Recipe,
    arm_names,
    make_arms,
)
from lightning_unfreeze.study.design.data import StudyData
from lightning_unfreeze.study.design.identity import code_version, describe
from lightning_unfreeze.study.design.request import (
    FIRST_TUNING_SEED,
    PILOT_SEEDS,
    parse_looks,
    parse_seeds,
    parse_shard,
    stage_words,
)
from lightning_unfreeze.study.design.shifts import SHIFTS
from lightning_unfreeze.study.design.tuning import Grids, best_rate, tuned_rate
from lightning_unfreeze.study.judge.analysis import Analysis, Axis, StudyInfo, skip_arm
from lightning_unfreeze.study.judge.planning import StudyPlan, after_pilot, fit_budget, parse_duration
from lightning_unfreeze.study.judge.verdict import judge
from lightning_unfreeze.study.runs.bench import Bench, DataModuleFn, ModelFn, Task
from lightning_unfreeze.study.runs.claims import take_gpu
from lightning_unfreeze.study.runs.costs import Costs, kind_of, measure_costs
from lightning_unfreeze.study.runs.folder import Stored, claim_folder, refuse_other_settings, stored_study
from lightning_unfreeze.study.runs.making import missing_runs
from lightning_unfreeze.study.runs.records import RunLog, RunRecord, run_key
from lightning_unfreeze.study.runs.run import versions
from lightning_unfreeze.study.runs.workers import Backend, Workers
from lightning_unfreeze.study.show.result import StudyResult, load_study


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
            the number that the upper limit of its spread asks for to decide about the margin; the pilot itself is in
            no comparison. The number is fixed by the first start: with more seeds later the report says so.
        looks: Numbers of seeds at which the verdict may be read before all seeds are in, such as `[6, 12]`; the study
            ends at the first one that decides. Each look has a level of its own (alpha spending). None looks once.
        margin: Accuracy difference (points) that does not matter to you; fixed before the first run.
        match: Budget of the primary comparison.
        out: Folder of the study.
        recipe: Lengths of the whole recipe.
        rates: `tune` tries `lr_grid` for every arm; `find` lets range tests set all rates, and charges them.
        lr_grid: Peak rates that are tried for every arm that trains more than the head.
        head_lr_grid: Rates of the head's stages in the same trials, as many: an arm's one knob is its place on both.
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
        charge_tuning: Count what tuning an arm took among its costs.
        dataset: Name of the data set, for the report.
        pretrained_on: What the backbone was trained on, for the report.
        condition: What sets this study apart from others of the same images and network; `study merge` keeps it apart.
        trainer: Further arguments of every Trainer, such as `accelerator` or `precision`.
        budget: Time to be done in (`2h`, `30min`, `90s` or seconds): lowers the seeds, then drops arms, until the
            prediction fits; None runs what was asked for.
        n_jobs: Runs at a time on this machine.
        backend: `loky` makes them in processes of this machine, `dask` on a cluster; `ray` needs its package.
        scheduler: For `dask`: the scheduler's address (`tcp://...`) or its scheduler file; None takes the client that
            is there.
        runs_per_gpu: Runs at a time on one GPU, where runs are made in several processes; each gets its GPU in turn.
        shard: `3/16` makes the third sixteenth of the runs, in this folder or in one of its own (`study merge` joins
            them). Tuning is shared by the processes that have the folder in common.
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
        tuning_seeds: int = 3,
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
        condition: str = "",
        trainer: dict[str, Any] | None = None,
        budget: str | float | None = None,
        looks: Sequence[int] | None = None,
        charge_tuning: bool = False,
        n_jobs: int = 1,
        backend: Backend = "loky",
        scheduler: str | None = None,
        runs_per_gpu: int = 1,
        shard: str | None = None,
        threads: int = 1,
        progress: bool = True,
    ) -> None:
        self.auto_seeds = seeds == "auto"
        self.seeds = PILOT_SEEDS if self.auto_seeds else parse_seeds(seeds)
        if not margin > 0:
            raise ValueError(
                f"margin={margin}: give the accuracy difference (points) that does not matter to you, > 0."
            )
        least = {"tuning_seeds": (tuning_seeds, 1), "threads": (threads, 1), "find_steps": (find_steps, 20)}
        for name, (value, lowest) in (least | {"distortion_images": (distortion_images, 2)}).items():
            if value < lowest:
                raise ValueError(f"{name}={value}: give {lowest} or more.")
        if match not in ("flops", "images", "epochs"):
            raise ValueError(f"match={match!r} is none of 'flops', 'images', 'epochs'.")
        self.looks = parse_looks(looks, len(self.seeds), self.auto_seeds)
        self.margin, self.match, self.out = margin, match, Path(out)
        self.recipe = recipe or Recipe()
        self.grids = Grids(tuple(lr_grid), tuple(head_lr_grid), rates)
        self.tuning_seeds = [FIRST_TUNING_SEED + index for index in range(tuning_seeds)]
        self.pretrained_on, self.charge_tuning, self.condition = pretrained_on, charge_tuning, condition
        self.budget_seconds = None if budget is None else parse_duration(budget)
        self.workers = Workers(n_jobs, backend, scheduler, runs_per_gpu)
        self.shard = None if shard is None else parse_shard(shard)
        self.progress = progress
        listed = [arms] if isinstance(arms, str) else list(arms)
        names = [arm for arm in listed if isinstance(arm, str)]
        self.own_arms = {arm.name: arm for arm in listed if isinstance(arm, Arm)}
        self.arm_names = arm_names(",".join(names)) if names else ()
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
        names = dict.fromkeys([REFERENCE, skip_arm(self.match), *self.arm_names])
        built = [name for name in names if name not in self.own_arms]
        # the programs do not depend on FLOPs, but for the length of cycles: one look at the kinds, then the fit
        shapes = make_arms(built, self.recipe, groups, lambda stages: 1.0)
        stages = [*self.recipe.stages, *(stage for arm in [*shapes, *self.own_arms.values()] for stage in arm.stages)]
        stages += [
            dataclasses.replace(stage, precompute=False, solve=False) for stage in stages if stage.solve is not True
        ]
        looks = TTAEval(views=self.bench.views, augmentation=None).num_views
        costs = measure_costs(
            {kind_of(stage): stage for stage in stages}.values(),
            module,
            data,
            {**self.bench.trainer_options, "enable_progress_bar": False},
            self.bench.network,
            self.bench.find_steps,
            looks + (len(SHIFTS) if self.bench.shifts else 0),
        )

        def flops(stages: Sequence[Stage]) -> float:
            rate: Rate | None = "find" if self.grids.rates == "find" else None
            return costs.flops([dataclasses.replace(stage, lr=rate) for stage in stages])

        arms = {arm.name: arm for arm in make_arms(built, self.recipe, groups, flops)} | self.own_arms
        architecture = str(getattr(module, "hparams", {}).get("backbone", type(module).__name__))
        info = StudyInfo(
            dataset=self.bench.dataset,
            n_train=len(data.train_indices),
            n_test=data.num_test,
            architecture=architecture,
            pretrained_on=self.pretrained_on,
            margin=self.margin,
            match=self.match,
            arms=tuple(arms),
            planned_seeds=self.seeds,
            looks=self.looks,
            overlap=data.overlap,
            charge_tuning=self.charge_tuning,
            condition=self.condition,
            facts=self._facts(data),
        )
        return arms, costs, info

    def _facts(self, data: StudyData) -> dict[str, str]:
        """Return what else a reader must know, by name."""
        recipe, shape = self.recipe, data.image_shape
        grid = ", ".join(f"{head:g}/{full:g}" for head, full in zip(self.grids.head, self.grids.full, strict=True))
        return {
            "recipe": " · ".join(map(stage_words, recipe.stages)) + f", rates span 1 to {1 / recipe.lr_span:g}",
            "rates": f"tuned per arm, tuning seeds: {len(self.tuning_seeds)}, head/other {grid}"
            if self.grids.rates == "tune"
            else "from range tests",
            "BatchNorm": f"statistics {'move' if self.bench.batch_norm == 'train' else 'stay frozen'} where unfrozen",
            "images": f"{' x '.join(map(str, shape))}, {data.num_val} validate"
            if shape
            else f"{data.num_val} validate",
            "training images": f"{len(data.train_indices)}, of which two seeds share {data.overlap:.0%}",
            "trainer": ", ".join(f"{name}={value}" for name, value in self.bench.trainer.items()) or "defaults",
        }

    @property
    def arms(self) -> list[Arm]:
        """The arms that are asked for, with the two of the primary comparison."""
        return list(self._looked_at[0].values())

    @property
    def costs(self) -> Costs:
        """What the kinds of stages cost."""
        return self._looked_at[1]

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """All that decides a run's result, of plain JSON types; what is run, and where, is not part of it."""
        bench = {field.name: getattr(self.bench, field.name) for field in dataclasses.fields(self.bench)}
        bench |= {"model_fn": describe(self.bench.model_fn), "datamodule_fn": describe(self.bench.datamodule_fn)}
        own: dict[str, Any] = {"margin": self.margin, "match": self.match, "rates": self.grids.rates}
        own |= {"lr_grid": self.grids.full, "head_lr_grid": self.grids.head, "tuning_seeds": self.tuning_seeds}
        settings = {**bench, **own, "versions": versions(), "recipe": asdict(self.recipe)}
        plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        return plain

    # --- plan ------------------------------------------------------------------------------------------------------

    def plan(self) -> StudyPlan:
        """Return what will be run, about how long it takes, and what it can find; trains nothing.

        With `seeds="auto"` it is the pilot's plan until the pilot has run.
        """
        arms, costs, info = self._looked_at
        known = {name: self.grids.stages(arm, None) for name, arm in arms.items()}
        seconds = {name: costs.seconds(stages) for name, stages in known.items()}
        tuned = {name: len(self.grids.trials(arm)) * len(self.tuning_seeds) for name, arm in arms.items()}
        tuning = {name: count * seconds[name] for name, count in tuned.items()}
        keep = [REFERENCE, skip_arm(self.match)]
        jobs = self.workers.count
        order = {name: seconds[name] for name in sorted(arms, key=lambda name: name not in keep)}
        budget, num_seeds = math.inf if self.budget_seconds is None else jobs * self.budget_seconds, len(self.seeds)
        before = None if self.budget_seconds is None else stored_study(self.out)
        if before is not None and before.info.planned_seeds:  # the first start chose, by the time that it measured
            order = {name: order[name] for name in order if name in before.info.arms}
            budget, num_seeds = math.inf, len(before.info.planned_seeds)
        fit = fit_budget(order, tuning, budget, num_seeds, keep)
        names = [name for name in arms if name in fit.arms]
        rows = [
            {
                "arm": name + (" (primary)" if name == info.primary else ""),
                "stages": " · ".join(stage_words(stage) for stage in known[name]),
                "epochs": arms[name].num_epochs,
                "images": costs.images(known[name]),
                "GFLOPs": costs.flops(known[name]) / 1e9,
                "of full": round(costs.flops(known[name]) / costs.flops(known[REFERENCE]), 3),
                "tuning runs": tuned[name],
                "s per run": seconds[name],
            }
            for name in names
        ]
        return StudyPlan(
            arms=tuple(names),
            seeds=tuple(self.seeds[: fit.seeds]),
            tuning_runs=sum(tuned[name] for name in names),
            seconds=fit.seconds / jobs,
            tuning_seconds=sum(tuning[name] for name in names) / jobs,
            rows=tuple(rows),
            info=info,
            pilot=self.seeds == PILOT_SEEDS,
        )

    # --- run -------------------------------------------------------------------------------------------------------

    def run(self, until_look: int | None = None) -> StudyResult:
        """Make the runs that are not on disk yet, and return what all of them say.

        Args:
            until_look: One of the planned `looks`, to leave the rest to a later call.

        Raises:
            ValueError: If the folder holds a study with other settings, no run is finished, or there is no such look.
            RuntimeError: When no worker is left to make the rest; what is finished is on disk.
        """
        if until_look is not None and until_look not in self.looks:
            raise ValueError(f"until_look={until_look} is none of the planned looks {list(self.looks)}.")
        if self.shard is not None:
            take_gpu(self.workers.runs_per_gpu)
        before = stored_study(self.out)
        if before is not None:
            refuse_other_settings(self.out, before, self._asked())
        if self.auto_seeds:
            self.seeds = self._pilot()
        plan = self.plan()
        # another timing would give another number of seeds: a number that is chosen after looking
        claimed = claim_folder(self.out, self._asked(plan), keep_plan=self.budget_seconds is not None)
        seeds = claimed.info.planned_seeds if self.budget_seconds is not None else plan.seeds
        arms = [self._looked_at[0][name] for name in claimed.info.arms]
        for look in self.looks or (len(seeds),):
            self._compare(arms, seeds[:look], "runs")
            if look == until_look:
                break
            if self.shard is None and look < len(seeds) and self._decides():
                rank_zero_info(f"the planned look at {look} seeds decides: the study ends here.")
                break
        return self.report()

    def report(self) -> StudyResult:
        """Write the report of the runs on disk to `report/`, and return them."""
        result = load_study(self.out)
        result.write(self.out / "report")
        return result

    def _decides(self) -> bool:
        return judge(load_study(self.out).analysis).outcome != "undecided"

    def _pilot(self) -> tuple[int, ...]:
        """Run the core arms with the pilot's seeds, say how far pairs differ, and return the seeds of the study."""
        arms, _, info = self._looked_at
        names = [name for name in info.arms if name in (*CORE, info.primary)]
        records = self._compare([arms[name] for name in names], PILOT_SEEDS, "pilot", whole=True)
        number, sentences = after_pilot(Analysis(records, dataclasses.replace(info, arms=tuple(names))))
        for sentence in sentences:
            rank_zero_info(sentence)
        return tuple(range(number))

    def _compare(self, arms: Sequence[Arm], seeds: Sequence[int], what: str, whole: bool = False) -> list[RunRecord]:
        """Tune the arms, run each with each seed, and return the records that there are by now.

        Args:
            arms: The arms.
            seeds: The seeds.
            what: Name of the log.
            whole: Make all runs, also where this is one of several shards.
        """
        chosen = self._tune(arms)
        # seed-major, arms in an order of the seed's own: a slow hour or a kill must not fall on one arm
        tasks = [
            self._task(arms[index], seed, chosen)
            for seed in seeds
            for index in np.random.default_rng([7, seed]).permutation(len(arms))
        ]
        if self.shard is not None and not whole:
            tasks = tasks[self.shard[0] - 1 :: self.shard[1]]
        return list(self._make(tasks, RunLog(self.out / f"{what}.jsonl"), what).values())

    def _asked(self, plan: StudyPlan | None = None) -> Stored:
        """Return what is asked for, as the folder keeps it."""
        info = self._looked_at[2]
        if plan is not None:
            info = dataclasses.replace(info, arms=plan.arms, planned_seeds=plan.seeds)
        return Stored(self.settings, info)

    def _tune(self, arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
        """Return the fields of each arm's record that say which rate was best."""
        tasks = {
            arm.name: [
                self._tuning_task(arm, seed, rate) for rate in self.grids.trials(arm) for seed in self.tuning_seeds
            ]
            for arm in arms
        }
        # seed-major here too: a slow hour must not fall on one arm
        order = sorted((task for each in tasks.values() for task in each), key=lambda task: task.seed)
        if not order:
            return {}
        records = self._make(order, RunLog(self.out / "tuning.jsonl"), "tuning")
        return {name: best_rate([records[task.key] for task in each]) for name, each in tasks.items() if each}

    def _tuning_task(self, arm: Arm, seed: int, rate: float) -> Task:
        label = f"{arm.name} @ {rate:g}"
        return Task(self._key(arm, label, seed), arm, seed, tuple(self.grids.stages(arm, rate)), "val", label, rate)

    def _task(self, arm: Arm, seed: int, chosen: Mapping[str, Mapping[str, Any]]) -> Task:
        rate = tuned_rate(chosen, arm)
        stages = tuple(self.grids.stages(arm, rate))
        return Task(
            self._key(arm, arm.name, seed), arm, seed, stages, "test", arm.name, rate, dict(chosen.get(arm.name, {}))
        )

    def _key(self, arm: Arm, label: str, seed: int) -> str:
        return run_key({**self.settings, "arm": asdict(arm)}, label, seed, self.bench.code_version)

    def _make(self, tasks: Sequence[Task], log: RunLog, what: str) -> dict[str, RunRecord]:
        """Make the runs that the log lacks, and return those of all tasks by key."""
        before = log.by_key()
        done = sum(task.key in before for task in tasks)
        with tqdm(total=len(tasks), initial=done, desc=what, unit="run", disable=not self.progress) as bar:
            for record in missing_runs(tasks, log, self.workers, self.bench, self.costs):
                bar.update()
                bar.set_postfix_str(f"{record.arm}, seed {record.seed}: {record.acc:.1%}")
        records = log.by_key()
        return {task.key: records[task.key] for task in tasks}
