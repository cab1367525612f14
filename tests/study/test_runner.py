"""The study on the digits, as small as it gets: fairness, resume, budgets, backends, the command line."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_unfreeze import DigitsData, ImageFolderData, Stage, TransferClassifier
from lightning_unfreeze.cli import main
from lightning_unfreeze.preview.costs import FLOP_FORMULAS
from lightning_unfreeze.study import runner
from lightning_unfreeze.study.design.arms import Arm, Recipe
from lightning_unfreeze.study.design.data import StudyData
from lightning_unfreeze.study.design.shifts import SHIFTS, shifted_accuracy
from lightning_unfreeze.study.judge.planning import fit_budget, parse_duration
from lightning_unfreeze.study.judge.statistics import seeds_for_equivalence, seeds_to_detect
from lightning_unfreeze.study.runner import FIRST_TUNING_SEED, PILOT_SEEDS, Study
from lightning_unfreeze.study.runs.costs import Costs, StageCost
from lightning_unfreeze.study.runs.distortion import linear_cka
from lightning_unfreeze.study.runs.records import CurvePoint, RunLog, RunRecord, pack_correct
from lightning_unfreeze.study.runs.run import trains_batch_norm
from lightning_unfreeze.study.show.merge import merge_studies
from lightning_unfreeze.study.show.result import load_study

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
    timed = ("seconds", "train_seconds", "eval_seconds", "lr_find_seconds", "probe_images_per_second", "curve")
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
        *("lp_only @ 0.01", "lp_only @ 0.03"),
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


def test_arms__share_the_draws_of_a_seed(finished: Study) -> None:
    """The head's two stages are the same as those of lp_only: so is what they reach, to the last bit."""
    full = next(r for r in RunLog(finished.out / "tuning.jsonl").read() if r.arm == "full9 @ 0.01")
    best = max(
        (r for r in RunLog(finished.out / "tuning.jsonl").read() if r.arm.startswith("lp_only")),
        key=lambda r: (r.acc, -(r.tuned_lr or 0)),
    )
    assert [p.val_acc for p in full.curve[:2]] == [p.val_acc for p in best.curve[:2]]


def test_report__is_written_and_read_back(finished: Study) -> None:
    result = finished.report()
    assert (finished.out / "report" / "report.html").stat().st_size > 10_000
    table = result.table()
    assert list(table["arm"]) == ["skip34@flops"] and table["pairs"].tolist() == [2]
    assert result.verdict().text.startswith("Prediction under test")
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
    for runs in (2, 6):  # in tuning, and between two runs of a seed
        left[0] = runs
        with pytest.raises(KeyboardInterrupt):
            study(tmp_path).run()
        done.append(sum(len(RunLog(tmp_path / name).read()) for name in ("tuning.jsonl", "runs.jsonl")))
    assert done == [2, 8]
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
    for name in ("callbacks/unfreeze.py", "study/run.py", "study/plots.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a = 1")
    before = runner.code_version(tmp_path)
    (tmp_path / "study/plots.py").write_text("a = 2")
    assert runner.code_version(tmp_path) == before
    for name in ("callbacks/unfreeze.py", "study/run.py"):
        (tmp_path / name).write_text("a = 2")
        changed = runner.code_version(tmp_path)
        assert changed != before
        before = changed


def test_study__with_more_seeds_adds_to_what_is_there(
    finished: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[tuple[str, int]] = []

    def execute(task: Any, *_: Any) -> RunRecord:
        made.append((task.label, task.seed))
        return dataclasses.replace(RunLog(finished.out / "runs.jsonl").read()[0], key=task.key, seed=task.seed)

    for name in ("study.json", "runs.jsonl", "tuning.jsonl"):
        (tmp_path / name).write_bytes((finished.out / name).read_bytes())
    monkeypatch.setattr(runner, "execute", execute)
    monkeypatch.setattr(Study, "report", lambda self: None)
    study(tmp_path, seeds=3).run()
    assert sorted(made) == [("full9", 2), ("skip34@flops", 2)]


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
    tuned._claim_folder(tuned.plan())
    tuned._tune([tuned.arms[0]])
    assert len(RunLog(tmp_path / "tuning.jsonl").read()) == 2
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
    assert verdict.outcome == "upheld" and "no certainty" in " ".join(verdict.changes)


def test_order__is_seed_major_with_the_arms_shuffled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []
    shell = study(tmp_path, arms="core", seeds=12, lr_grid=[1e-2], head_lr_grid=[1e-2])
    monkeypatch.setattr(
        Study,
        "_make",
        lambda self, tasks, log, what: made.extend((t.label, t.seed) for t in tasks) if what == "runs" else {},
    )
    monkeypatch.setattr(Study, "_tune", lambda self, arms: {"lp_only": {"rate": 1e-2}})
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
    (record,) = found._results([found._task(found.arms[0], 3, found._tune(found.arms))])
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
    assert plan.seconds == pytest.approx(
        sum(row["s per run"] * (10 + row["tuning runs"]) for row in plan.rows), rel=1e-6
    )
    (row,) = [row for row in plan.power_rows() if row["SD of the difference"] == 1.0]
    assert (row["detectable with 10 seeds"], row["seeds to detect 1 pt"]) == (1.0, 10)  # STUDY's table
    assert not (tmp_path / "none").exists()


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


def test_budget__of_a_resumed_study_is_that_of_its_start(finished: Study, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_bytes((finished.out / "study.json").read_bytes())
    again = study(tmp_path, seeds=9, budget="10h")
    assert again._claim_folder(again.plan()).seeds == (0, 1)


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
    "no budget": ({"match": "seconds"}, "none of 'flops'"),
}


@pytest.mark.parametrize("mistake", sorted(BAD))
def test_study__refuses_the_impossible(mistake: str, tmp_path: Path) -> None:
    options, says = BAD[mistake]
    with pytest.raises(ValueError, match=says):
        study(tmp_path, **options)


# --- elsewhere -------------------------------------------------------------------------------------------------------


def test_dask__runs_on_a_cluster_and_finds_the_same(finished: Study, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster),
    ):
        there = study(tmp_path, backend="dask")
        there.out = finished.out
        rates = there._tune([arm for arm in there.arms if arm.name == "full9"])  # on disk already
        tasks = [there._task(there.arms[0], seed, rates) for seed in (0, 1)]
        made = {record.key: record for record in there._results(tasks)}
    for record in RunLog(finished.out / "runs.jsonl").read():
        if record.arm == "full9":
            twin = made[record.key]
            assert (twin.correct, twin.flops, twin.lr_trace) == (record.correct, record.flops, record.lr_trace)
            assert [p.val_acc for p in twin.curve] == [p.val_acc for p in record.curve]


# --- measures --------------------------------------------------------------------------------------------------------


def test_cka__is_blind_to_rotation_and_scale_and_zero_for_unrelated_directions() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-6)
    a, b = torch.tensor([[1.0], [-1.0], [0.0], [0.0]]), torch.tensor([[0.0], [0.0], [1.0], [-1.0]])
    assert linear_cka(a, b) == pytest.approx(0, abs=1e-12)
    # one shared direction of two of equal size: |Y'X|^2 / (|X'X| |Y'Y|) = 4 / (2 sqrt(2) x 2)
    assert linear_cka(torch.cat([a, b], 1), a) == pytest.approx(4 / (2 * math.sqrt(2) * 2), abs=1e-6)


def test_shifts__are_drawn_alike_and_counted_over_all_of_them() -> None:
    class Bright(torch.nn.Module):
        """Says 1 where the mean is above a half."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            mean = images.mean((1, 2, 3)) - 0.5
            return torch.stack([-mean, mean], 1)

    batches = [(torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.long))]
    # black images stay below a half but where brightness adds one
    assert shifted_accuracy(Bright(), batches) == pytest.approx((len(SHIFTS) - 1) / len(SHIFTS))


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


def test_merge__gives_the_mean_effect_and_how_it_varies(tmp_path: Path) -> None:
    one = fake_study(tmp_path / "a", "a", {"skip34@flops": [1.0, 2.0, 3.0, 2.0], "lp_only": [-5.0, -6.0, -5.0, -6.0]})
    two = fake_study(tmp_path / "b", "b", {"skip34@flops": [-2.0, -1.0, -3.0, -2.0], "gradual": [0.0, 0.0, 0.0, 0.0]})
    merged = merge_studies([one, two], tmp_path / "out")
    found = merged.merged["skip34@flops"]
    # equal spread, so the mean of +2 and -2; they differ by 4, of which sampling explains next to nothing
    assert found.effect.mean == pytest.approx(0, abs=1e-6)
    assert found.i2 > 0.9 and found.q_p < 0.001 and found.tau == pytest.approx(math.sqrt(8), rel=0.1)
    assert set(merged.merged) == {"skip34@flops"} and merged.ranking is None
    text = (tmp_path / "out" / "merged.md").read_text()
    assert "No ranking" in text and "gradual on b" in text and "| lp_only | -5.50" in text
    assert (tmp_path / "out" / "effects.png").stat().st_size > 5000


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
    with pytest.raises(ValueError, match=r"pets more than once"):
        merge_studies(folders, tmp_path / "out")
    with pytest.raises(ValueError, match="two or more"):
        merge_studies(folders[:1], tmp_path / "out")


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
    monkeypatch.setattr("lightning_unfreeze.study.show.report._png", lambda figure: b"")
    folder = fake_study(tmp_path / "s", "pets", {"skip34@flops": effects})
    if code:
        with pytest.raises(SystemExit) as stop:
            main(["study", "report", str(folder)])
        assert stop.value.code == code
    else:
        main(["study", "report", str(folder)])
    assert "Prediction under test" in capsys.readouterr().out
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
    # three rates of one seed for two arms and the head, two arms with two seeds
    assert "13 runs: 2 arms x 2 seeds, 9 to tune" in said
    monkeypatch.setattr(runner, "execute", execute)
    with pytest.raises(SystemExit) as stop:
        main(["study", "run", "--config", str(CONFIG), *shorter])
    assert stop.value.code in (3, 4)  # two seeds of noise cannot show equality
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
        return RunRecord(
            key=task.key, arm=task.label, seed=task.seed, dataset="digits", acc=float(right.mean()), n_test=1000,
            correct=pack_correct(right), images=20, flops=1.0, seconds=1.0, tuned_lr=task.rate, code_version="x",
            curve=(CurvePoint(epoch=1, images=20, flops=1.0, seconds=1.0, val_acc=0.8, stage="full", cycle_end=True),),
        )  # fmt: skip

    monkeypatch.setattr(runner, "execute", made_up)
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    auto = study(tmp_path, seeds="auto")
    assert auto.plan().pilot and "This is the pilot" in " ".join(auto.plan().sentences())
    auto.run()
    # the pilot's differences are those of seeds 0 to 4 of the noise
    sd = float(np.std([round(1000 * x) / 10 for x in noise[:5]], ddof=1))
    wanted = max(seeds_to_detect(sd, 1.0), seeds_for_equivalence(sd, 1.0), 6)
    runs = RunLog(tmp_path / "runs.jsonl").read()
    assert sorted({run.seed for run in runs}) == list(range(wanted)) and len(runs) == 2 * wanted
    assert {run.seed for run in RunLog(tmp_path / "pilot.jsonl").read()} == set(PILOT_SEEDS)
    assert "(SD, 95 % interval" in caplog.text and f"The study takes {wanted} seeds" in caplog.text
    assert f"differ by {sd:.2f} pt" in caplog.text
    # started again, it asks for nothing
    asked.clear()
    study(tmp_path, seeds="auto").run()
    assert not asked
