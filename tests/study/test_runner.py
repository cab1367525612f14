"""The study on the digits, as small as it gets: fairness, resume, budgets, backends, the command line."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_unfreeze import CosineRestarts, DigitsData, GradualUnfreeze, ImageFolderData, Stage, TransferClassifier
from lightning_unfreeze.cli import main
from lightning_unfreeze.recipe.costs import FLOP_FORMULAS
from lightning_unfreeze.study import runner
from lightning_unfreeze.study.design.arms import Arm, Recipe
from lightning_unfreeze.study.design.data import StudyData
from lightning_unfreeze.study.design.identity import code_version
from lightning_unfreeze.study.design.shifts import SHIFTS, ShiftImages
from lightning_unfreeze.study.judge.planning import fit_budget, parse_duration
from lightning_unfreeze.study.judge.statistics import seeds_for_equivalence, seeds_to_detect
from lightning_unfreeze.study.runner import FIRST_TUNING_SEED, PILOT_SEEDS, Study
from lightning_unfreeze.study.runs import workers
from lightning_unfreeze.study.runs.costs import Costs, StageCost
from lightning_unfreeze.study.runs.distortion import linear_cka
from lightning_unfreeze.study.runs.recorder import RunRecorder
from lightning_unfreeze.study.runs.records import CurvePoint, RunLog, RunRecord, pack_correct
from lightning_unfreeze.study.runs.run import execute, trains_batch_norm
from lightning_unfreeze.study.show.merge import _merge, merge_studies
from lightning_unfreeze.study.show.result import load_study

ROOT = Path(__file__).parents[2]
CLASSES = (5, 6)
RECIPE = Recipe(cached_epochs=1, augmented_epochs=1, num_cycles=2)
ARMS = ["full9", "skip34@flops"]


def model(pretrained: bool = True) -> TransferClassifier:
    return TransferClassifier("digits_resnet", len(CLASSES), pretrained=pretrained)


def digits() -> DigitsData:
    return DigitsData(CLASSES, train_per_class=None, batch_size=10)


def study(out: Path, **options: Any) -> Study:
    """Two arms and two seeds of a recipe of five epochs of twenty images."""
    defaults: dict[str, Any] = {
        "arms": ARMS,
        "seeds": 2,
        "recipe": RECIPE,
        "lr_grid": [1e-3, 1e-2],
        "head_lr_grid": [1e-2, 3e-2],
        "tuning_seeds": 1,
        "train_size": 20,
        "val_fraction": 0.08,
        "distortion_images": 10,
        "dataset": "digits",
        "progress": False,
        "trainer": {"accelerator": "cpu"},
    }
    return Study(model, digits, out=out, **(defaults | options))


def results(log: Path) -> dict[str, Any]:
    """What a log says, but for the seconds, by arm and seed."""
    timed = (
        "seconds",
        "tuning_seconds",
        "train_seconds",
        "eval_seconds",
        "lr_find_seconds",
        "probe_images_per_second",
        "curve",
    )
    found = {}
    for record in RunLog(log).read():
        row = {name: value for name, value in vars(record).items() if name not in timed}
        row["points"] = [dataclasses.replace(point, seconds=0.0) for point in record.curve]
        found[record.arm, record.seed] = row
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study that ran through."""
    made = study(tmp_path_factory.mktemp("study") / "one")
    made.run()
    return made


# --- what ran --------------------------------------------------------------------------------------------------------


def test_study__runs_each_arm_with_each_seed_and_tunes_every_arm_alike(finished: Study) -> None:
    assert set(results(finished.out / "runs.jsonl")) == {(arm, seed) for arm in ARMS for seed in (0, 1)}
    tuning = results(finished.out / "tuning.jsonl")
    assert {arm for arm, _ in tuning} == {
        *("full9 @ 0.001", "full9 @ 0.01", "skip34@flops @ 0.001", "skip34@flops @ 0.01"),
    }
    assert {seed for _, seed in tuning} == {FIRST_TUNING_SEED}


def test_records__count_what_their_stages_spend(finished: Study) -> None:
    runs = {(r.arm, r.seed): r for r in RunLog(finished.out / "runs.jsonl").read()}
    full, skip = runs["full9", 0], runs["skip34@flops", 0]
    # full9: one stored, one augmented epoch of the head, cycles of 1 and 2 epochs; 20 images each
    assert (full.images, len(full.curve)) == (100, 5)
    assert [p.cycle_end for p in full.curve] == [True, True, True, False, True]
    assert [p.stage for p in full.curve] == ["head_cached", "head_augmented", "full", "full", "full"]
    assert [p.images for p in full.curve] == [20, 40, 60, 80, 100]
    assert full.flops == full.curve[-1].flops == pytest.approx(finished.costs.flops(finished.arms[0].stages))
    assert skip.images == 20 * finished.arms[1].num_epochs
    assert list(full.lr_trace)[-1] != "head" and "head" in full.lr_trace
    assert full.distortion["displacement"] > 0 and full.distortion["weights/head"] > 0
    assert full.train_seconds is not None and full.train_seconds < full.seconds
    assert full.probe_images_per_second is not None and full.probe_images_per_second > 0
    assert full.acc_tta == pytest.approx(full.acc + (full.tta_fixed - full.tta_broken) / full.n_test)  # type: ignore[operator]


def test_solved_arm__is_charged_one_pass_and_its_head_is_solved_before_all_trains(tmp_path: Path) -> None:
    made = study(tmp_path, arms=["solved_ft"])
    arms = {arm.name: arm for arm in made.arms}
    task = made._task(arms["solved_ft"], 0, {"solved_ft": {"tuned_lr": 1e-2}})
    record = execute(task, made.bench, made.costs)
    # the pass over 20 images, then cycles of 1 and 2 epochs
    assert [(p.stage, p.images, p.cycle_end) for p in record.curve] == [
        ("head_solved", 20, True), ("full", 40, True), ("full", 60, False), ("full", 80, True)
    ]  # fmt: skip
    solved, full = made.costs.kinds["head, solved"], made.costs.kinds["all"]
    assert solved.once_flops == pytest.approx(made.costs.kinds["head, stored"].once_flops)
    assert record.curve[0].flops == pytest.approx(solved.once_flops + solved.epoch_flops)
    assert record.flops == pytest.approx(record.curve[0].flops + 3 * full.epoch_flops)
    assert record.curve[0].val_acc > 0.4  # of 5 classes, with a head that no step has trained
    row = next(row for row in made.plan().rows if row["arm"] == "solved_ft")
    assert (row["stages"], row["images"], row["tuning runs"]) == ("S · U1+2", 80, 2)


def test_solved_arm__of_a_head_that_is_not_linear_is_refused_before_the_first_run(tmp_path: Path) -> None:
    def bent() -> pl.LightningModule:
        module, classes = model(), len(CLASSES)
        module.model.fc = torch.nn.Sequential(module.model.fc, torch.nn.ReLU(), torch.nn.Linear(classes, classes))
        return module

    with pytest.raises(MisconfigurationException, match="solve=True"):
        Study(bent, digits, out=tmp_path, arms=["solved_ft"], seeds=2, train_size=20).plan()


def test_rates__are_the_best_of_the_grid_on_validation(finished: Study) -> None:
    tuning = RunLog(finished.out / "tuning.jsonl").read()
    for record in RunLog(finished.out / "runs.jsonl").read():
        tried = {float(t.tuned_lr or 0): t.acc for t in tuning if t.arm.startswith(f"{record.arm} @")}
        best = max(tried.values())
        assert record.tuned_lr == min(rate for rate, acc in tried.items() if acc == best)
        assert dict(record.tuning_curve) == tried
        assert record.lr_at_grid_edge  # two rates are nothing but edges
        if record.arm == "skip34@flops":
            assert max(rate for _, rate in record.lr_trace["head"]) == pytest.approx(record.tuned_lr)


def test_arms__share_the_draws_of_a_seed(tmp_path: Path) -> None:
    """The head's two stages are the same in two arms: so is what they reach, to the last bit."""
    made = study(tmp_path, arms=["full9", "uniform"], match="epochs")
    tasks = [made._task(made._looked_at[0][name], 0, {name: {"tuned_lr": 1e-2}}) for name in ("full9", "uniform")]
    full, uniform = made.workers.results(tasks, made.bench, made.costs)
    assert [p.val_acc for p in full.curve[:2]] == [p.val_acc for p in uniform.curve[:2]]
    assert full.lr_trace["head"][:2] == uniform.lr_trace["head"][:2]


def test_tuning__gives_every_arm_one_knob_and_a_head_rate_of_its_own(finished: Study) -> None:
    full, skip = finished.arms
    assert [len(finished.grids.trials(arm)) for arm in (full, skip)] == [2, 2]
    lows, highs = (finished.grids.stages(full, rate) for rate in (1e-3, 1e-2))
    assert [stage.lr for stage in lows] == [1e-2, 1e-2, 1e-3] and [stage.lr for stage in highs] == [3e-2, 3e-2, 1e-2]
    head = Arm("lp_only", full.stages[:1], rate="head")
    assert finished.grids.trials(head) == (1e-2, 3e-2) and finished.grids.stages(head, 3e-2)[0].lr == 3e-2


@pytest.mark.pictures
def test_report__is_written_and_read_back(finished: Study) -> None:
    result = finished.report()
    assert (finished.out / "report" / "report.html").stat().st_size > 10_000
    table = result.table()
    assert list(table["arm"]) == ["skip34@flops"] and table["pairs"].tolist() == [2]
    assert result.verdict().text.startswith("Verdict: UNDECIDED: 2 seeds decide nothing")
    assert result.plot("forest").axes
    with pytest.raises(ValueError, match=r"forest2.*forest"):
        result.plot("forest2")


# --- killed and resumed ----------------------------------------------------------------------------------------------


def test_study__killed_twice_goes_on_to_the_same_results(
    finished: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, left = RunLog.append, [0]

    def killed(log: RunLog, record: RunRecord) -> None:
        if left[0] == 0:
            with log.path.open("ab") as file:  # a kill in the middle of the write
                file.write(record.to_line().encode()[:50])
            raise KeyboardInterrupt
        left[0] -= 1
        append(log, record)

    monkeypatch.setattr(RunLog, "append", killed)
    done = []
    for runs in (2, 4):  # in tuning, and between two runs of a seed
        left[0] = runs
        with pytest.raises(KeyboardInterrupt):
            study(tmp_path).run()
        done.append(sum(len(RunLog(tmp_path / name).read()) for name in ("tuning.jsonl", "runs.jsonl")))
    assert done == [2, 6]
    monkeypatch.setattr(RunLog, "append", append)
    study(tmp_path).run()
    for name in ("tuning.jsonl", "runs.jsonl"):
        assert results(tmp_path / name) == results(finished.out / name)


def test_study__with_other_settings_refuses_the_folder(finished: Study) -> None:
    with pytest.raises(ValueError, match=r"another lr_grid, margin"):
        study(finished.out, margin=0.5, lr_grid=[1e-3, 3e-3]).run()


def test_study__of_other_code_refuses_the_folder(finished: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "code_version", lambda: "0.1.0+another")
    with pytest.raises(ValueError, match=r"another code_version"):
        study(finished.out).run()


def test_code_version__changes_with_what_trains_and_not_with_what_reads(tmp_path: Path) -> None:
    for name in ("callbacks/unfreeze.py", "study/runs/run.py", "study/show/plots.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a = 1")
    before = code_version(tmp_path)
    (tmp_path / "study/show/plots.py").write_text("a = 2")
    assert code_version(tmp_path) == before
    for name in ("callbacks/unfreeze.py", "study/runs/run.py"):
        (tmp_path / name).write_text("a = 2")
        changed = code_version(tmp_path)
        assert changed != before
        before = changed


def test_study__with_more_seeds_adds_to_what_is_there(
    finished: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[tuple[str, int]] = []

    def execute(task: Any, *_: Any) -> RunRecord:
        made.append((task.label, task.seed))
        one = RunLog(finished.out / "runs.jsonl").read()[0]
        return dataclasses.replace(one, key=task.key, arm=task.label, seed=task.seed)

    for name in ("study.json", "runs.jsonl", "tuning.jsonl"):
        (tmp_path / name).write_bytes((finished.out / name).read_bytes())
    monkeypatch.setattr(workers, "execute", execute)
    monkeypatch.setattr(Study, "report", lambda self: None)
    with pytest.warns(UserWarning, match="planned with 2 seeds, and is asked for 1 more"):
        study(tmp_path, seeds=3).run()
    assert sorted(made) == [("full9", 2), ("skip34@flops", 2)]
    verdict = load_study(tmp_path).verdict()
    assert verdict.note.startswith("EXTENDED AFTER A LOOK: 2 seeds were planned, 1 more")
    assert verdict.text.startswith("EXTENDED AFTER A LOOK")


# --- fairness --------------------------------------------------------------------------------------------------------


def drawn(seed: int, **options: Any) -> StudyData:
    data = StudyData(digits(), seed, **options)
    data.setup("fit")
    return data


def test_data__test_images_are_the_same_for_all_seeds_and_in_nothing_else() -> None:
    first, second = drawn(0, train_size=40), drawn(1, train_size=40)
    assert [np.asarray(a).tobytes() for a in first._test.images] == [
        np.asarray(b).tobytes() for b in second._test.images
    ]
    for data in (first, second):
        assert not set(data.train_indices) & set(data.val_indices)
        pool = [id(image) for image in (*data._train.images, *data._val.images)]
        assert not set(pool) & {id(image) for image in data._test.images}
        labels = np.bincount(data._train.targets)
        assert len(data.train_indices) == 40 and abs(labels[0] - labels[1]) <= 1
        assert len(data.val_indices) == math.ceil(
            0.2 * (len(data.base.dataset("train")) + len(data.base.dataset("val")))
        )  # type: ignore[operator]
    assert first.train_indices != second.train_indices and first.val_indices != second.val_indices


def test_data__draws_are_keyed_by_seed_epoch_and_index() -> None:
    def epoch(data: StudyData, number: int) -> torch.Tensor:
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)  # type: ignore[union-attr]
        return torch.cat([images for images, _ in loader])

    one, other = drawn(0, train_size=20), drawn(0, train_size=20)
    epoch(one, 0)  # an arm that trained an epoch more before
    torch.rand(7)
    assert torch.equal(epoch(one, 3), epoch(other, 3))
    assert not torch.equal(epoch(one, 3), epoch(one, 4))
    assert not torch.equal(epoch(one, 3), epoch(drawn(1, train_size=20), 3))
    # the same images under another seed: neither the order nor the augmentation alone is what differs
    other = drawn(1, train_size=20)
    other._train = one._train
    mine, theirs = one.train_dataloader(), other.train_dataloader()
    assert list(mine.sampler) != list(theirs.sampler)
    assert any(not torch.equal(mine.dataset[index][0], theirs.dataset[index][0]) for index in range(5))


def test_data__without_augmentation_reads_the_same_images_plain() -> None:
    data = drawn(0, train_size=20, augment=False)
    dataset = data.train_dataloader().dataset
    assert torch.equal(dataset[3][0], dataset[len(data.train_indices) + 3][0])  # epochs 0 and 1
    augmented = drawn(0, train_size=20).train_dataloader().dataset
    assert any(not torch.equal(augmented[i][0], augmented[20 + i][0]) for i in range(5))


def test_data__without_a_test_folder_the_validation_folder_is_only_looked_at_once(tmp_path: Path) -> None:
    from PIL import Image

    for split, count in (("train", 10), ("val", 3)):
        for name in ("ants", "bees"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / split / name / f"{i}.png")
    data = StudyData(ImageFolderData(str(tmp_path), batch_size=4, image_size_px=32), seed=0)
    data.setup("fit")
    assert (len(data.train_indices), data.num_val, data.num_test) == (16, 4, 6)
    assert {path.parts[-3] for path in data._test.images} == {"val"}
    assert {path.parts[-3] for path in (*data._train.images, *data._val.images)} == {"train"}


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_data__reads_what_the_data_module_keeps_decoded(cache: str, tmp_path: Path) -> None:
    from PIL import Image

    colours = np.random.default_rng(0).integers(0, 256, (2, 12, 3))
    for number, name in enumerate(("ants", "bees")):
        for i, colour in enumerate(colours[number].tolist()):
            folder = tmp_path / ("test", "val", "train")[(i > 1) + (i > 6)] / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), tuple(colour)).save(folder / f"{i}.png")

    def data(kept: Any, augmentation: str) -> StudyData:
        base = ImageFolderData(
            str(tmp_path),
            batch_size=4,
            image_size_px=32,
            augmentation=augmentation,
            cache=kept,
            cache_dir=str(tmp_path),
        )
        made = StudyData(base, seed=0, val_fraction=0.4)
        made.setup("fit")
        return made

    for augmentation in ("none", "side_on"):
        plain, kept = data(None, augmentation), data(cache, augmentation)
        assert {path.parts[-3] for path in kept._val.images} == {"train", "val"}
        for split in ("train", "val", "test"):
            sides = [getattr(each, f"{split}_dataloader")().dataset for each in (plain, kept)]
            assert all(torch.equal(sides[0][i][0], sides[1][i][0]) for i in range(len(sides[0])))
        for photo in (tmp_path / "train").rglob("*.png"):
            photo.rename(photo.with_suffix(".gone"))  # what is read now is what was kept
        assert len([kept._train[i] for i, path in enumerate(kept._train.images) if "train" in path.parts]) > 2
        assert len([kept._val[i] for i in range(kept.num_val)]) == kept.num_val
        for photo in (tmp_path / "train").rglob("*.gone"):
            photo.rename(photo.with_suffix(".png"))


class OwnData(pl.LightningDataModule):
    """A data module of the user's own."""

    def __init__(self, with_test: bool = True) -> None:
        super().__init__()
        images = torch.randn(30, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        self.parts = [TensorDataset(images[i : i + 10], torch.arange(10) % 2) for i in (0, 10, 20)]
        if with_test:
            self.test_dataloader = lambda: DataLoader(self.parts[2], 4)  # type: ignore[method-assign]

    def train_dataloader(self) -> Any:
        return DataLoader(self.parts[0], 4, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.parts[1], 4)

    def test_dataloader(self) -> Any:
        return []


def test_data__of_the_users_own_keeps_its_splits_and_draws_from_train() -> None:
    data = StudyData(OwnData(), seed=0, train_size=6)
    data.setup("fit")
    assert len(data.train_indices) == 6 and (data.num_val, data.num_test) == (10, 10)
    seen = torch.cat([images for images, _ in data.train_dataloader()])
    own = OwnData().parts[0].tensors[0]
    assert all(any(torch.equal(image, other) for other in own) for image in seen)
    with pytest.raises(MisconfigurationException, match=r"OwnData lacks test"):
        StudyData(OwnData(with_test=False), seed=0).setup("fit")
    with pytest.raises(MisconfigurationException, match=r"no_aug.*OwnData"):
        StudyData(OwnData(), seed=0, augment=False).setup("fit")


def test_tuning__never_sees_test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: StudyData) -> Any:
        raise AssertionError("tuning asked for the test images")

    monkeypatch.setattr(StudyData, "test_dataloader", refuse)
    tuned = study(tmp_path, lr_grid=[1e-2], head_lr_grid=[1e-2], arms=["full9"], match="epochs")
    tuned._tune([tuned.arms[0]])
    assert len(RunLog(tmp_path / "tuning.jsonl").read()) == 1
    with pytest.raises(AssertionError, match="asked for the test images"):
        tuned.run()


def test_null_study__of_two_equal_arms_finds_nothing(tmp_path: Path) -> None:
    """Equal arms draw alike: not one image differs, so nothing but the name can be told apart."""
    stages = (Stage("head", "head", epochs=1), Stage("full", cycle_len=1))
    null = study(
        tmp_path,
        seeds=6,
        arms=[Arm("full9", stages, rate="fixed"), Arm("skip34@flops", stages, rate="fixed")],
        lr_grid=[1e-2],
        head_lr_grid=[1e-2],
    )
    verdict = null.run().verdict()
    runs = results(tmp_path / "runs.jsonl")
    for seed in range(6):
        a, b = (runs[arm, seed] for arm in ARMS)
        assert {**a, "key": "", "arm": ""} == {**b, "key": "", "arm": ""}
    assert runs["full9", 0]["nll"] != runs["full9", 1]["nll"]
    assert verdict.outcome == "equal" and "no certainty" in " ".join(verdict.changes)


def test_order__is_seed_major_with_the_arms_shuffled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []
    shell = study(tmp_path, arms="core", seeds=12, lr_grid=[1e-2], head_lr_grid=[1e-2])
    monkeypatch.setattr(
        Study,
        "_make",
        lambda self, tasks, log, what: made.extend((t.label, t.seed) for t in tasks) or {},
    )
    monkeypatch.setattr(Study, "_tune", lambda self, arms: {})
    monkeypatch.setattr(Study, "report", lambda self: None)
    shell.run()
    assert [seed for _, seed in made] == [seed for seed in range(12) for _ in range(6)]
    orders = {tuple(arm for arm, s in made if s == seed) for seed in range(12)}
    assert len(orders) > 6 and all(sorted(order) == sorted(shell.plan().arms) for order in orders)


@pytest.mark.parametrize(
    ("policy", "other", "trains"),
    [("train", False, True), ("train", True, False), ("frozen", False, False), ("frozen", True, True)],
)
def test_batch_norm__policy_and_the_other_one(policy: Any, other: bool, trains: bool) -> None:
    assert trains_batch_norm(policy, other) is trains


# --- costs -----------------------------------------------------------------------------------------------------------


def test_costs__are_those_that_a_counter_finds(finished: Study) -> None:
    module = model()
    images, labels = torch.randn(10, 1, 32, 32), torch.zeros(10, dtype=torch.long)
    with FlopCounterMode(display=False) as step:
        torch.nn.functional.cross_entropy(module(images), labels).backward()
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        module(images)
    everything, stored = finished.costs.kinds["all"], finished.costs.kinds["head, stored"]
    assert everything.once_flops == 0
    assert everything.epoch_flops == pytest.approx(2 * step.get_total_flops(), abs=2e6)  # two batches; shown to 1e6
    assert stored.once_flops == pytest.approx(2 * forward.get_total_flops(), abs=3e6)
    assert stored.epoch_flops < 0.01 * everything.epoch_flops


@pytest.mark.parametrize(
    ("groups", "make"), [(1, torch.nn.Conv2d), (8, torch.nn.Conv2d), (4, torch.nn.ConvTranspose2d)]
)
def test_flops__of_a_backward_are_two_forwards_also_of_grouped_convolutions(groups: int, make: Any) -> None:
    convolution = make(8, 16, 3, padding=1, groups=groups, bias=False)
    images = torch.randn(2, 8, 5, 5, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        convolution(images).sum().backward()
    forward = 2 * 2 * 25 * 16 * (8 // groups) * 9  # FLOPs, images, places, channels out and in, kernel
    assert counter.get_total_flops() == 3 * forward


def test_costs__of_a_depthwise_network_are_a_step_of_three_forwards(tmp_path: Path) -> None:
    """Through the plan: torch's own formula gives 16 forward passes for a step of this network."""

    def mobilenet(pretrained: bool = True) -> TransferClassifier:
        return TransferClassifier("mobilenetv2_035", len(CLASSES), pretrained=False)

    def small() -> DigitsData:
        return DigitsData(CLASSES, train_per_class=None, batch_size=10, image_size_px=64)

    options: dict[str, Any] = {"recipe": RECIPE, "train_size": 20, "trainer": {"accelerator": "cpu"}}
    kinds = Study(mobilenet, small, arms=["full9"], out=tmp_path, **options).costs.kinds
    assert 2.7 < kinds["all"].epoch_flops / kinds["head"].epoch_flops < 3.0


def test_flops__of_the_matched_arm_lie_within_5_percent_of_the_reference(tmp_path: Path) -> None:
    plan = study(tmp_path, recipe=Recipe()).plan()
    share = {row["arm"].split()[0]: row["of full"] for row in plan.rows}
    assert share["skip34@flops"] == pytest.approx(1, abs=0.05)
    assert not any("5 %" in sentence for sentence in plan.sentences())


def test_costs__charge_a_range_test() -> None:
    cost = Costs({"all": StageCost(0, 100.0, 0, 1.0)}, 5, 50, 20, 0.1, 0.2)
    found, given_rate = Stage("a", epochs=3, lr="find"), Stage("a", epochs=3, lr=0.1)
    assert cost.flops([given_rate]) == 300
    assert cost.flops([found]) == 700  # 20 steps are four epochs of five batches
    assert cost.seconds([given_rate]) == pytest.approx(3 * 1.0 + 3 * 0.1 + 0.2)


@pytest.mark.filterwarnings("ignore:.*no signal in the range test")
def test_find__rates_come_from_range_tests_and_are_charged(tmp_path: Path) -> None:
    found = study(tmp_path, rates="find", find_steps=20, arms=["full9"], match="epochs")
    task = found._task(found.arms[0], 3, found._tune(found.arms))
    (record,) = found.workers.results([task], found.bench, found.costs)
    assert not (tmp_path / "tuning.jsonl").exists()
    assert record.tuned_lr is None and record.lr_find_seconds is not None and record.lr_find_seconds > 0
    # range tests of at most 20 steps, ten images each, before the head's two stages and the unfrozen one
    assert 100 < record.images <= 100 + 3 * 20 * 10
    assert record.curve[0].images > 20
    tested = (record.images - 100) / 20  # in epochs, of which those of the unfrozen stage cost most
    everything = found.costs.kinds["all"].epoch_flops
    assert 0 < record.flops - found.costs.flops(found.arms[0].stages) < tested * everything


# --- plan and budget -------------------------------------------------------------------------------------------------


def test_plan__counts_runs_and_trains_nothing(tmp_path: Path) -> None:
    plan = study(tmp_path / "none", arms="core", seeds=10, tuning_seeds=3).plan()
    assert plan.arms[:2] == ("full9", "skip34@flops") and len(plan.arms) == 6
    assert plan.tuning_runs == 6 * 2 * 3 and plan.runs == 6 * 10 + 36
    assert plan.tuning_seconds == pytest.approx(sum(row["s per run"] * row["tuning runs"] for row in plan.rows))
    assert "Holm" not in " ".join(plan.sentences())
    few = " ".join(study(tmp_path / "none", arms="core", seeds=6).plan().sentences())
    # four secondary arms: 4 x 2 / 2**6 = .125
    assert "Holm's p of the 4 secondary arms cannot be below 0.12" in few and "8 seeds could decide them" in few
    assert plan.seconds == pytest.approx(
        sum(row["s per run"] * (10 + row["tuning runs"]) for row in plan.rows), rel=1e-6
    )
    (row,) = [row for row in plan.power_rows() if row["SD of the difference"] == 1.0]
    assert (row["detectable with 10 seeds"], row["seeds to detect 1 pt"]) == (1.0, 10)  # STUDY's table
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("n_test", "margin", "said"), [(26, 1.0, True), (10_000, 1.0, False), (26, 19.0, False)])
def test_plan__says_where_the_test_images_are_too_few(tmp_path: Path, n_test: int, margin: float, said: bool) -> None:
    plan = study(tmp_path / "none").plan()
    plan = dataclasses.replace(plan, info=dataclasses.replace(plan.info, n_test=n_test, margin=margin))
    # 2.927 x sqrt(.1 / 26) = 18.15 points; 26 x 18.15**2 = 8563 images
    told = "about 8600 test images could, and these ±19 pt"
    assert (told in " ".join(plan.sentences())) == said == ("cannot be counted on" in " ".join(plan.sentences()))


SECONDS = {"full9": 10.0, "skip34@flops": 10.0, "uniform": 10.0, "gradual": 20.0}


@pytest.mark.parametrize(
    ("budget", "arms", "seeds"),
    [
        (500, 4, 10),  # 10 seeds x 50 s
        (300, 4, 6),
        (299, 3, 6),  # never below 6 seeds while there is an arm to drop
        (120, 2, 6),
        (119, 2, 5),
        (40, 2, 2),
    ],
)
def test_budget__takes_seeds_first_then_arms_then_seeds(budget: float, arms: int, seeds: int) -> None:
    context = pytest.warns(UserWarning, match="no sign-flip p") if seeds < 6 else _nothing()
    with context:
        fit = fit_budget(SECONDS, {}, budget, 10, ["full9", "skip34@flops"])
    assert (len(fit.arms), fit.seeds) == (arms, seeds)
    assert fit.arms == tuple(SECONDS)[:arms] and fit.seconds <= budget


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_budget__counts_tuning_and_refuses_what_cannot_be() -> None:
    keep = ["full9", "skip34@flops"]
    assert fit_budget(SECONDS, {"gradual": 100.0}, 500, 10, keep).seeds == 8  # (500 - 100) / 50
    with pytest.raises(ValueError, match=r"budget=39 s: 2 seeds of full9 and skip34@flops take about 40 s"):
        fit_budget(SECONDS, {}, 39, 10, keep)


def test_budget__of_a_resumed_study_is_that_of_its_start(
    finished: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("study.json", "runs.jsonl", "tuning.jsonl"):
        (tmp_path / name).write_bytes((finished.out / name).read_bytes())
    monkeypatch.setattr(workers, "execute", lambda *_: pytest.fail("there is nothing to run"))
    monkeypatch.setattr(Study, "report", lambda self: None)
    again = study(tmp_path, seeds=9, budget="10h")
    assert again.plan().seeds == (0, 1), "the plan says what will be run"
    again.run()
    assert load_study(tmp_path).info.planned_seeds == (0, 1)


@pytest.mark.parametrize(("text", "seconds"), [("2h", 7200), ("30min", 1800), ("90s", 90), (15, 15), ("1.5 h", 5400)])
def test_duration__is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["soon", "", "0h", "2 days", "1.2.3h"])
def test_duration__refuses_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="2h, 30min or 90s"):
        parse_duration(text)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "one seed": ({"seeds": 1}, "2 or more"),
    "a seed twice": ({"seeds": [1, 1]}, "different"),
    "a tuning seed": ({"seeds": [1, FIRST_TUNING_SEED]}, "from 0 to"),
    "seeds by luck": ({"seeds": "some"}, "or auto"),
    "no margin": ({"margin": 0.0}, "margin=0"),
    "falling grid": ({"lr_grid": [0.1, 0.01]}, "lowest first"),
    "unequal effort": ({"lr_grid": [0.1]}, "same effort"),
    "no arm": ({"arms": "full8"}, "full8"),
    "no range test": ({"find_steps": 5}, "find_steps=5: give 20 or more"),
    "nothing to compare features on": ({"distortion_images": 1}, "distortion_images=1: give 2 or more"),
    "no budget": ({"match": "seconds"}, "none of 'flops'"),
}


@pytest.mark.parametrize("mistake", sorted(BAD))
def test_study__refuses_the_impossible(mistake: str, tmp_path: Path) -> None:
    options, says = BAD[mistake]
    with pytest.raises(ValueError, match=says):
        study(tmp_path, **options)


# --- shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "a/b", "1/0"])
def test_shard__refuses_what_is_none(shard: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PLACE/COUNT"):
        study(tmp_path, shard=shard)


def stand_in(task: Any, bench: Any, costs: Any) -> RunRecord:
    """A run that costs nothing; its images are a function of seed and arm."""
    right = np.random.default_rng([len(task.label), task.seed]).random(40) < 0.7
    return RunRecord(task.key, task.label, task.seed, "digits", float(right.mean()), 40, pack_correct(right),
                     images=20, flops=1.0, seconds=1.0, tuned_lr=task.rate)  # fmt: skip


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "execute", stand_in)


@pytest.mark.usefixtures("quick")
def test_shards__in_one_folder_make_every_run_once(tmp_path: Path) -> None:
    study(tmp_path / "whole", seeds=6).run()
    for place in (1, 2, 3):
        study(tmp_path / "shared", seeds=6, shard=f"{place}/3").run()
    for name in ("runs.jsonl", "tuning.jsonl"):
        assert results(tmp_path / "shared" / name) == results(tmp_path / "whole" / name)
        assert len((tmp_path / "shared" / name).read_text().splitlines()) == len(results(tmp_path / "whole" / name))
    first = study(tmp_path / "first", seeds=6, shard="1/3").run()
    assert first.verdict().note.startswith("NOT FINISHED") and first.verdict().outcome == "undecided"


@pytest.mark.usefixtures("quick")
def test_merge__joins_shards_and_halves_by_their_seeds(tmp_path: Path) -> None:
    whole = study(tmp_path / "whole", seeds=6).run()
    shards = [tmp_path / f"shard{place}" for place in (1, 2)]
    halves = [tmp_path / f"half{place}" for place in (1, 2)]
    for place in (0, 1):
        study(shards[place], seeds=6, shard=f"{place + 1}/2").run()
        study(halves[place], seeds=range(3 * place, 3 * place + 3)).run()
    for parts in (shards, halves):
        joined = merge_studies(parts, tmp_path / "joined" / parts[0].name)
        assert joined.joined is not None and joined.joined.verdict().text == whole.verdict().text
        assert results(tmp_path / "joined" / parts[0].name / "runs.jsonl") == results(tmp_path / "whole/runs.jsonl")
        assert load_study(tmp_path / "joined" / parts[0].name).info.planned_seeds == tuple(range(6))
    again = merge_studies(shards, tmp_path / "joined" / "shard1").joined
    assert again is not None and len((tmp_path / "joined/shard1/runs.jsonl").read_text().splitlines()) == 12


@pytest.mark.usefixtures("quick")
def test_merge__refuses_what_is_no_part_and_touches_nothing(tmp_path: Path) -> None:
    halves = [tmp_path / f"half{place}" for place in (1, 2)]
    for place in (0, 1):
        study(halves[place], seeds=range(2 * place, 2 * place + 2)).run()
    study(tmp_path / "whole", seeds=4).run()
    study(
        tmp_path / "other",
        seeds=range(2, 4),
        margin=2.0,
        recipe=dataclasses.replace(RECIPE, cycle_mult=RECIPE.cycle_mult + 1),
    ).run()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}
    one, two, whole, other, out = *halves, tmp_path / "whole", tmp_path / "other", tmp_path / "out"
    for folders, target, says in (
        ([one, two, tmp_path / "out" / ".." / "half1"], out, r"half1 is given twice \(as \S+half1\)"),
        ([one, whole], out, r"overlap: both hold \S+, seed 0 \(one is a copy of the other, or holds it\)"),
        ([one, other], out, r"another margin, recipe.cycle_mult \(margin: 1.0 there, 2.0 here; recipe.cycle_mult: "),
        ([one, two], two, "is one of the folders to join"),
        ([one, two], other, r"holds a study with another margin, recipe.cycle_mult \(margin: 2.0 there, 1.0 here"),
    ):
        with pytest.raises(ValueError, match=says):
            merge_studies(folders, target)
    study(tmp_path / "more", seeds=range(4, 6)).run()
    before |= {path: path.read_bytes() for path in (tmp_path / "more").rglob("*.json*")}
    with pytest.raises(ValueError, match=r"holds runs that none of the folders holds, such as \S+, seed 4"):
        merge_studies([one, two], tmp_path / "more")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json*")} == before


@pytest.mark.usefixtures("quick")
def test_looks__end_the_study_at_the_first_that_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def far_apart(task: Any, bench: Any, costs: Any) -> RunRecord:
        right = np.arange(1000) < (900 if task.arm.name == "full9" else 700) + task.seed
        return dataclasses.replace(
            stand_in(task, bench, costs), acc=float(right.mean()), n_test=1000, correct=pack_correct(right)
        )

    monkeypatch.setattr(workers, "execute", far_apart)
    verdict = study(tmp_path / "far", seeds=12, looks=[6, 12]).run().verdict()
    assert verdict.outcome == "worse" and "Planned look at 6 seeds" in verdict.note
    assert {run.seed for run in RunLog(tmp_path / "far" / "runs.jsonl").read()} == set(range(6))
    assert verdict.accuracy["flops"].interval.level == pytest.approx(1 - 0.0056, abs=1e-4)
    monkeypatch.setattr(workers, "execute", stand_in)
    near = study(tmp_path / "near", seeds=12, looks=[6, 12]).run()
    assert {run.seed for run in near.records} == set(range(12))
    with pytest.raises(ValueError, match="another looks"):
        study(tmp_path / "near", seeds=12, looks=[8, 12]).run()
    first = study(tmp_path / "parts", seeds=12, looks=[6, 12]).run(until_look=6)
    assert {run.seed for run in first.records} == set(range(6)) and "Planned look at 6" in first.verdict().note
    rest = study(tmp_path / "parts", seeds=12, looks=[6, 12]).run()
    assert rest.verdict().text == near.verdict().text
    with pytest.raises(ValueError, match=r"until_look=7 is none of the planned looks \[6, 12\]"):
        study(tmp_path / "parts", seeds=12, looks=[6, 12]).run(until_look=7)
    with pytest.raises(ValueError, match="ascending"):
        study(tmp_path / "none", seeds=12, looks=[6, 9])


# --- measures --------------------------------------------------------------------------------------------------------


def test_cka__is_blind_to_rotation_and_scale_and_zero_for_unrelated_directions() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-6)
    a, b = torch.tensor([[1.0], [-1.0], [0.0], [0.0]]), torch.tensor([[0.0], [0.0], [1.0], [-1.0]])
    assert linear_cka(a, b) == pytest.approx(0, abs=1e-12)
    # one shared direction of two of equal size: |Y'X|^2 / (|X'X| |Y'Y|) = 4 / (2 sqrt(2) x 2)
    assert linear_cka(torch.cat([a, b], 1), a) == pytest.approx(4 / (2 * math.sqrt(2) * 2), abs=1e-6)


class Bright(pl.LightningModule):
    """Says 1 where the mean is above a half; its batches are dicts, as Hugging Face's are."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 64, bias=False))
        self.head = torch.nn.Linear(64, 2)
        self.seen: list[torch.Tensor] = []
        with torch.no_grad():
            self.backbone[1].weight.copy_(torch.eye(64))
            self.head.weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 64) / 64)
            self.head.bias.copy_(torch.tensor([0.5, -0.5]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.seen.append(batch["pixel_values"].clone())
        accuracy = (self(batch["pixel_values"]).argmax(-1) == batch["labels"]).float().mean()
        self.log("val_acc", accuracy, batch_size=len(batch["labels"]))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self(batch["pixel_values"]), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


class Dicts(torch.utils.data.Dataset[Any]):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": torch.full((1, 8, 8), 0.1 * (index % 3)), "labels": 0}

    def __len__(self) -> int:
        return 12


class DictData(pl.LightningDataModule):
    """Dict batches, and an attribute called `dataset` that is none of ours."""

    dataset = Dicts()

    def train_dataloader(self) -> Any:
        return DataLoader(Dicts(), batch_sampler=torch.utils.data.BatchSampler(range(12), 4, drop_last=False))

    def val_dataloader(self) -> Any:
        return DataLoader(Dicts(), 4)

    test_dataloader = val_dataloader


def test_shifts__change_the_images_of_any_batch_alike_for_every_module() -> None:
    trainers = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False}
    found: dict[str, list[float]] = {}
    for name in SHIFTS:
        seen = []
        for _ in range(2):
            module = Bright()
            (scores,) = pl.Trainer(callbacks=[ShiftImages(name)], **trainers).validate(  # type: ignore[arg-type]
                module, DictData().val_dataloader(), verbose=False
            )
            found.setdefault(name, []).append(scores["val_acc"])
            seen.append(torch.cat(module.seen))
        assert torch.equal(*seen)
    # images below a half stay there but where brightness adds one
    assert found == {"noise": [1, 1], "contrast": [1, 1], "blur": [1, 1], "brightness": [0, 0]}


def test_study__of_dict_batches_and_a_dataset_attribute_of_the_users_own(tmp_path: Path) -> None:
    made = Study(
        lambda pretrained=True: Bright(), DictData, arms=["full9"], match="epochs", seeds=2, out=tmp_path,
        recipe=RECIPE, lr_grid=[1e-3], head_lr_grid=[1e-3], tuning_seeds=1, shifts=True, progress=False,
        trainer={"accelerator": "cpu"},
    )  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        task = made._task(made.arms[0], 0, {})
        (record,) = made.workers.results([task], made.bench, made.costs)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert record.distortion["displacement"] >= 0 and record.images == 12 * 5
    assert set(record.correct_shifted) == set(SHIFTS) and record.acc_ood == pytest.approx(0.75, abs=0.01)
    assert record.shifted_shares().tolist() == pytest.approx([0.75] * 12)
    assert record.environment["torch"] == torch.__version__.split("+")[0]
    assert record.environment["optimizer"].startswith("SGD(")


@pytest.mark.parametrize(
    ("options", "validations", "ends"),
    [
        ({"val_check_interval": 0.5}, 4, [1.0, 2.0]),
        ({"check_val_every_n_epoch": 2}, 1, [2.0]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, 2, []),
        ({"limit_train_batches": 2}, 2, [1.0, 2.0]),  # epochs of half the images
    ],
)
def test_recorder__counts_what_was_trained_however_often_validation_looks(
    options: dict[str, Any], validations: int, ends: list[float]
) -> None:
    costs = Costs({"all": StageCost(0.0, 100.0, 0.0, 0.0)}, 4, 12, 10, 0.0, 0.0)
    recorder = RunRecorder("val_acc", costs)
    stage = Stage("full", cycle_len=1, num_cycles=2)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=-1, callbacks=[GradualUnfreeze([stage]), CosineRestarts(), recorder],
        logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        **options,
    )  # fmt: skip
    trainer.fit(Bright(), DataLoader(Dicts(), 3), DataLoader(Dicts(), 4))
    share = 0.5 if "limit_train_batches" in options else 1.0
    assert (recorder.images, recorder.flops) == (24 * share, 200.0 * share)
    assert len(recorder.curve) == validations
    assert [point.epoch for point in recorder.curve if point.cycle_end] == ends


# --- several data sets -----------------------------------------------------------------------------------------------


def fake_study(folder: Path, dataset: str, effects: dict[str, Sequence[float]], base: float = 60.0) -> Path:
    """A study on disk whose arms differ from the reference by these points, one per seed."""
    folder.mkdir(parents=True)
    info = {
        "dataset": dataset, "n_train": 10, "n_test": 1000, "architecture": "net", "pretrained_on": "x", "margin": 1.0,
        "match": "flops", "target_below_best": 1.0, "reference": "full9", "arms": ["full9", *effects],
    }  # fmt: skip
    (folder / "study.json").write_text(json.dumps({"settings": {}, "seeds": [], "info": info}))
    log = RunLog(folder / "runs.jsonl")
    count = len(next(iter(effects.values())))
    for arm, values in {"full9": [0.0] * count, **effects}.items():
        for seed, value in enumerate(values):
            right = round(10 * (base + value))
            bits = [True] * right + [False] * (1000 - right)
            log.append(
                RunRecord(
                    f"{arm}{seed}",
                    arm,
                    seed,
                    dataset,
                    right / 1000,
                    1000,
                    pack_correct(bits),
                    images=1,
                    flops=1.0,
                    seconds=1.0,
                )
            )
    return folder


@pytest.mark.pictures
def test_merge__gives_the_mean_effect_and_how_it_varies(tmp_path: Path) -> None:
    one = fake_study(tmp_path / "a", "a", {"skip34@flops": [1.0, 2.0, 3.0, 2.0], "lp_only": [-5.0, -6.0, -5.0, -6.0]})
    two = fake_study(tmp_path / "b", "b", {"skip34@flops": [-2.0, -1.0, -3.0, -2.0], "gradual": [0.0, 0.0, 0.0, 0.0]})
    merged = merge_studies([one, two], tmp_path / "out")
    found = merged.merged["skip34@flops"]
    # equal spread, so the mean of +2 and -2; they differ by 4, of which sampling explains next to nothing
    assert found.effect.mean == pytest.approx(0, abs=1e-6)
    assert found.i2 > 0.9 and found.tau == pytest.approx(math.sqrt(8), rel=0.1)
    assert set(merged.merged) == {"skip34@flops"} and merged.ranking is None
    text = (tmp_path / "out" / "merged.md").read_text()
    assert "No ranking" in text and "gradual on b" in text and "-5.50 [-7.00, -4.00]" in text
    assert (tmp_path / "out" / "effects.png").stat().st_size > 5000


def test_merge__shifted_images_share_one_level_among_all_arms() -> None:
    info = SimpleNamespace(info=SimpleNamespace(primary="skip34@flops"))
    rows = [
        {"arm": arm, "dataset": name, "shifted": shifted, "difference": 1.0, "standard_error": 0.5}
        for arm in ("skip34@flops", "lp_only", "gradual")
        for name in "ab"
        for shifted in (False, True)
    ]
    levels = {
        shifted: {arm: found.effect.level for arm, found in _merge(pd.DataFrame(rows), [info], shifted).items()}
        for shifted in (False, True)
    }
    # beside the one primary comparison two secondary ones share .05; on shifted images three do
    assert levels[False] == {"skip34@flops": 0.95, "gradual": 0.975, "lp_only": 0.975}
    assert levels[True] == pytest.approx(dict.fromkeys(("skip34@flops", "gradual", "lp_only"), 1 - 0.05 / 3))


@pytest.mark.pictures
def test_merge__ranks_arms_only_with_six_data_sets(tmp_path: Path) -> None:
    folders = [
        fake_study(tmp_path / str(i), f"set {i}", {"skip34@flops": [1.0, 1.1 + i / 10], "lp_only": [-5.0, -6.0 - i]})
        for i in range(6)
    ]
    assert merge_studies(folders[:5], tmp_path / "five").ranking is None
    merged = merge_studies(folders, tmp_path / "six")
    assert merged.ranking is not None
    ranks = dict(zip(merged.ranked, merged.ranking.mean_ranks.tolist(), strict=True))
    assert ranks == {"skip34@flops": 1.0, "full9": 2.0, "lp_only": 3.0}
    assert (tmp_path / "six" / "critical_difference.png").stat().st_size > 5000


def test_merge__refuses_one_data_set_however_many_folders(tmp_path: Path) -> None:
    folders = [fake_study(tmp_path / name, "pets", {"lp_only": [1.0, 2.0]}) for name in "ab"]
    with pytest.raises(ValueError, match=r"pets, and overlap: both hold full9, seed 0"):
        merge_studies(folders, tmp_path / "out")
    with pytest.raises(ValueError, match="two or more"):
        merge_studies(folders[:1], tmp_path / "out")


def test_merge__of_several_data_sets_too_wants_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = [fake_study(tmp_path / name, name, {"lp_only": [1.0, 2.0]}) for name in ("pets", "cars")]
    with pytest.raises(ValueError, match="is one of the folders to join"):
        merge_studies(folders, tmp_path / "cars")
    assert not (tmp_path / "cars" / "merged.md").exists()


# --- the command line ------------------------------------------------------------------------------------------------

CONFIG = Path(__file__).parents[2] / "configs" / "study.yaml"


@pytest.mark.parametrize(
    ("effects", "code"),
    [
        ([0.1, -0.1, 0.2, -0.2, 0.0, 0.1], 0),
        ([-3.0, -2.9, -3.1, -3.0, -3.2, -2.8], 3),
        ([3.0, -3.0, 2.0, -2.0, 1.0, 0.0], 4),
    ],
)
def test_cli_report__exits_with_the_verdict(
    effects: list[float], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fake_study(tmp_path / "s", "pets", {"skip34@flops": effects})
    if code:
        with pytest.raises(SystemExit) as stop:
            main(["study", "report", str(folder)])
        assert stop.value.code == code
    else:
        main(["study", "report", str(folder)])
    assert "Verdict: " in capsys.readouterr().out
    assert (folder / "report" / "verdict.txt").is_file()


def test_cli_plan_and_run__of_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def execute(task: Any, bench: Any, costs: Costs) -> RunRecord:
        assert isinstance(bench.module(task.seed, pretrained=False), TransferClassifier)
        bits = np.random.default_rng([len(task.label), task.seed]).random(50) < 0.5
        return RunRecord(task.key, task.label, task.seed, bench.dataset, float(bits.mean()), 50, pack_correct(bits),
                         images=1, flops=1.0, seconds=1.0, tuned_lr=task.rate)  # fmt: skip

    out = tmp_path / "study"
    shorter = [
        *("--arms=[full9]", "--match=epochs", "--seeds=2", "--recipe.cached_epochs=1", "--recipe.augmented_epochs=1"),
        *("--recipe.num_cycles=1", "--train_size=20", f"--out={out}", "--progress=false", "--data.classes=[5, 6]"),
        *("--model.num_classes=2", "--trainer={accelerator: cpu}"),
    ]
    main(["study", "plan", "--config", str(CONFIG), *shorter])
    said = " ".join(capsys.readouterr().out.split())
    assert "C1 · F1 · U1" in said and not out.exists()
    # three rates of one seed for two arms, two arms with two seeds
    assert "10 runs: 2 arms x 2 seeds, 6 to tune" in said
    monkeypatch.setattr(workers, "execute", execute)
    with pytest.raises(SystemExit) as stop:
        main(["study", "run", "--config", str(CONFIG), *shorter])
    assert stop.value.code == 4  # two seeds decide nothing
    assert len(load_study(out).records) == 4
    settings = json.loads((out / "study.json").read_text())["settings"]
    assert settings["model_fn"]["init_args"]["num_classes"] == 2


def test_config__of_lp_ft_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    main(["study", "plan", "--config", str(CONFIG.with_name("study_lp_ft.yaml")), "--trainer={accelerator: cpu}"])
    said = capsys.readouterr().out
    assert "C30 · U7" in said and "full9+other_bn" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["study"], "plan, run, report, merge"),
        (["study", "guess"], "guess.*plan, run, report, merge"),
        (["study", "report", "nowhere"], "nowhere holds no study"),
        (["study", "plan", "--config", str(CONFIG), "--match=seconds"], "match"),
        (["study", "plan", "--config", str(CONFIG), "--arms=[full8]"], "full8"),
        (["study", "plan", "--config", str(CONFIG), "--budget=soon"], "2h, 30min or 90s"),
    ],
)
def test_cli__mistakes_are_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error:") and error.count("\n") == 1
    import re

    assert re.search(says, error), error


# --- a number of seeds that follows from a pilot ---------------------------------------------------------------------


def test_auto_seeds__follow_from_a_pilot_that_is_in_no_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The runs are made up: what is looked at is which ones are asked for."""
    noise = np.random.default_rng(0).normal(0.0, 0.015, 100)
    asked: list[Any] = []

    def made_up(task: Any, bench: Any, costs: Any) -> RunRecord:
        asked.append(task)
        right = np.arange(1000) < 800 + round(1000 * noise[task.seed % 100]) * (task.arm.name != "full9")
        right = right[np.random.default_rng(task.seed).permutation(1000)]  # other images with each seed
        return RunRecord(
            key=task.key, arm=task.label, seed=task.seed, dataset="digits", acc=float(right.mean()), n_test=1000,
            correct=pack_correct(right), images=20, flops=1.0, seconds=1.0, tuned_lr=task.rate, code_version="x",
            curve=(CurvePoint(epoch=1, images=20, flops=1.0, seconds=1.0, val_acc=0.8, stage="full", cycle_end=True),),
        )  # fmt: skip

    monkeypatch.setattr(workers, "execute", made_up)
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    auto = study(tmp_path, seeds="auto")
    assert auto.plan().pilot and "This is the pilot" in " ".join(auto.plan().sentences())
    auto.run()
    # the pilot's differences are those of seeds 0 to 4 of the noise
    sd = float(np.std([round(1000 * x) / 10 for x in noise[:5]], ddof=1))
    limit = sd * math.sqrt(4 / stats.chi2.ppf(0.2, 4))
    assert f"upper 80 % limit {limit:.2f}" in caplog.text
    runs = RunLog(tmp_path / "runs.jsonl").read()
    wanted = len({run.seed for run in runs})
    least = max(seeds_to_detect(limit, 1.0) or 0, seeds_for_equivalence(limit, 1.0) or 0, 6)
    assert least <= wanted <= 1.2 * least  # the images add next to nothing
    assert sorted({run.seed for run in runs}) == list(range(wanted)) and len(runs) == 2 * wanted
    assert {run.seed for run in RunLog(tmp_path / "pilot.jsonl").read()} == set(PILOT_SEEDS)
    assert f"The study takes {wanted} seeds" in caplog.text
    assert f"differ by {sd:.2f} pt" in caplog.text
    # started again, it asks for nothing
    asked.clear()
    study(tmp_path, seeds="auto").run()
    assert not asked
