"""Stages beside the callbacks and options that a user brings along."""

from __future__ import annotations

import csv
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import nn

from lightning_unfreeze.callbacks.base import StageCallback
from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage
from lightning_unfreeze.callbacks.precompute import PrecomputeFeatures
from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.cli.parser import SavesWhenItRuns
from lightning_unfreeze.reporting import row
from lightning_unfreeze.stages.plan import Stage
from tests.zoo import (
    KeepsWeights,
    LogsByEpoch,
    Raises,
    SmallNet,
    UserModule,
    keyed_loader,
    loader,
    quiet_trainer,
    random_images,
    same_weights,
    steady_module,
    weights_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Found .* module:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:.*no signal in the range test"),
]

PLAN = [
    Stage("features", train="head", epochs=2, precompute=True, lr="find"),
    Stage("full", lr=0.01, lr_mult=0.5, cycle_len=1, num_cycles=2),
]


def fit(
    folder: Path, *others: Callback, ckpt: Any = None, first: bool = False, **options: Any
) -> tuple[Any, pl.Trainer]:
    """The recipe with other callbacks behind ours, or before them; one store for all fits of a test."""
    torch.manual_seed(0)
    module = UserModule(SmallNet())
    ours = [
        GradualUnfreeze(PLAN),
        PrecomputeFeatures(folder / "feature_store", policy="always"),
        LRFinderPerStage(num_steps=20),
        CosineRestarts(),
    ]
    trainer = quiet_trainer(
        [*others, *ours] if first else [*ours, *others],
        enable_checkpointing=any(isinstance(other, ModelCheckpoint) for other in others),
        **options,
    )
    trainer.fit(module, keyed_loader(), loader(random_images(8, seed=1)), ckpt_path=ckpt)
    return module, trainer


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
def test_callbacks__that_only_look_change_nothing_and_see_what_is(first: bool, tmp_path: Path) -> None:
    alone, _ = fit(tmp_path)
    others = [
        ModelCheckpoint(tmp_path / "best", "{epoch}", monitor="val_acc", mode="max"),
        ModelCheckpoint(tmp_path / "each", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
        ModelCheckpoint(tmp_path / "steps", "{step}", save_top_k=-1, every_n_train_steps=5),
        LearningRateMonitor("step"),
        EarlyStopping("val_loss", patience=100),
        Timer("00:01:00:00"),
    ]
    logger = CSVLogger(tmp_path, name=None, version="log")
    module, trainer = fit(tmp_path, *others, first=first, logger=logger, log_every_n_steps=1)
    assert same_weights(weights_of(alone), weights_of(module)) == []
    assert trainer.global_step == 12
    assert sorted(path.name for path in (tmp_path / "each").glob("*.ckpt")) == [f"epoch={i}.ckpt" for i in range(4)]
    assert sorted(path.name for path in (tmp_path / "steps").glob("*.ckpt")) == ["step=10.ckpt", "step=5.ckpt"]
    assert len(list((tmp_path / "best").glob("*.ckpt"))) == 1
    last = torch.load(tmp_path / "each" / "epoch=3.ckpt", weights_only=True)
    assert same_weights(last["state_dict"], weights_of(module)) == []
    # the rates of the last stage, step by step: two cosine cycles of three steps from 0.01
    rows = csv.DictReader((tmp_path / "log" / "metrics.csv").read_text().splitlines())
    seen = {int(row["step"]): float(row["lr-AdamW/head"]) for row in rows if row.get("lr-AdamW/head")}
    assert [seen[step] for step in range(6, 12)] == pytest.approx([0.01, 0.0075, 0.0025] * 2)


def test_early_stopping__ends_the_run_and_the_best_checkpoint_goes_on(tmp_path: Path) -> None:
    stopping = EarlyStopping("val_loss", patience=1, min_delta=100.0, mode="min")  # nothing is good enough
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_last=True)
    _, trainer = fit(tmp_path, stopping, best)
    assert trainer.current_epoch == 2
    patient = EarlyStopping("val_loss", patience=100)
    module, trainer = fit(tmp_path, best, patient, ckpt=tmp_path / "best" / "last.ckpt")
    assert trainer.current_epoch == 4
    uninterrupted, _ = fit(tmp_path)
    assert same_weights(weights_of(uninterrupted), weights_of(module)) == []


def worsens() -> UserModule:
    """Nothing gets better after the first epoch of a stage."""
    return LogsByEpoch([3.0, 4.0, 4.0, 2.0, 5.0], "val/loss")


STOPPED_PLAN = [Stage("head", train="head", epochs=5, lr=0.1), Stage("top", train=2, epochs=2), Stage("full", epochs=4)]


def stopped_fit(
    *others: Callback, early_stopping: Any = "stage", at_epoch_end: bool = True, ckpt: Any = None
) -> tuple[pl.Trainer, GradualUnfreeze, UserModule]:
    torch.manual_seed(0)
    module = worsens()
    plan = GradualUnfreeze(STOPPED_PLAN, early_stopping=early_stopping)
    stopping = EarlyStopping("val/loss", patience=2, check_on_train_epoch_end=at_epoch_end)
    saves = any(isinstance(other, ModelCheckpoint) for other in others)
    trainer = quiet_trainer([stopping, plan, *others], enable_checkpointing=saves)
    trainer.fit(module, keyed_loader(), loader(random_images(8, seed=1)), ckpt_path=ckpt)
    return trainer, plan, module


@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_early_stopping__ends_its_stage_and_judges_the_next_one_afresh(at_epoch_end: bool, tmp_path: Path) -> None:
    """Stage 1 ends after 3 epochs (3, 4, 4), stage 2 by plan after 2 (2, 5), stage 3 after 3 (5, 5, 5)."""
    saves = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer, plan, module = stopped_fit(saves, at_epoch_end=at_epoch_end)
    rows = plan.journal.state_dict()["rows"]
    assert [(row["stage"], row["epochs"]) for row in rows] == [("head", 3), ("top", 2), ("full", 3)]
    assert trainer.current_epoch == 8
    assert all("on_train_epoch_end" not in vars(callback) for callback in trainer.callbacks)
    for epoch in (1, 2, 4):  # inside the stage that is stopped, at its end, at the end of the second one
        again, resumed, other = stopped_fit(at_epoch_end=at_epoch_end, ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert again.current_epoch == 8
        assert [row["epochs"] for row in resumed.journal.state_dict()["rows"]] == [3, 2, 3]
        assert same_weights(weights_of(module), weights_of(other)) == []


def test_early_stopping__that_ends_the_fit_names_the_stages_that_did_not_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer, _, _ = stopped_fit(early_stopping="fit")
    assert trainer.current_epoch == 3
    (line,) = [record.getMessage() for record in caplog.records if "did not run" in record.getMessage()]
    assert "EarlyStopping on 'val/loss'" in line
    assert "top, full" in line
    assert "early_stopping='stage'" in line
    assert "stage 'head' had 3 of 5 epochs" in line
    (start,) = [record.getMessage() for record in caplog.records if "counts through" in record.getMessage()]
    assert "EarlyStopping on 'val/loss', patience 2, counts through all 3 stages" in start


def test_early_stopping__in_the_last_stage_says_what_it_ended(caplog: pytest.LogCaptureFixture) -> None:
    """The last stage is cut short too: nothing is left that did not run, and the plan was longer."""
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer, _, _ = stopped_fit(early_stopping="stage")  # (5, 5, 5) of the last stage's four epochs
    assert trainer.current_epoch == 8
    (line,) = [record.getMessage() for record in caplog.records if "the fit ended" in record.getMessage()]
    assert "after 8 epochs by EarlyStopping on 'val/loss'" in line
    assert line.endswith("stage 'full' had 3 of 4 epochs")
    assert "counts through" not in caplog.text


# --- tools that try steps before the fit -----------------------------------------------------------------------------


class Sized(UserModule):
    def __init__(self) -> None:
        super().__init__(SmallNet())
        self.batch_size = 4

    def train_dataloader(self) -> Any:
        return loader(random_images(32), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(random_images(8, seed=1))


@pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("how", ["callback", "tuner"])
def test_batch_size_finder__is_followed_by_the_whole_plan(how: str, tmp_path: Path) -> None:
    def run(size: int | None = None, found: bool = True, ckpt: Any = None) -> tuple[pl.Trainer, Sized]:
        torch.manual_seed(0)
        module = Sized()
        module.batch_size = size or 4
        callbacks = [
            GradualUnfreeze(PLAN),
            PrecomputeFeatures(tmp_path / f"store {found}", policy="always"),
            LRFinderPerStage(num_steps=20),
            CosineRestarts(),
            ModelCheckpoint(tmp_path / f"found {found}", "{epoch}", save_top_k=-1, enable_version_counter=False),
        ]
        options = {"max_trials": 2, "steps_per_trial": 1, "init_val": 4}
        if found and how.startswith("callback"):
            callbacks.append(BatchSizeFinder(**options))
        trainer = quiet_trainer(callbacks, default_root_dir=tmp_path, enable_checkpointing=True)
        if found and how == "tuner":
            Tuner(trainer).scale_batch_size(module, **options)
        trainer.fit(module, ckpt_path=ckpt)
        return trainer, module

    trainer, module = run()
    assert module.batch_size == 8
    assert (trainer.current_epoch, trainer.global_step) == (4, 4 * 4)
    _, plain = run(size=8, found=False)
    assert same_weights(weights_of(plain), weights_of(module)) == []
    if how == "callback":
        with pytest.raises(MisconfigurationException, match=r"BatchSizeFinder.*resumed.*first fit"):
            run(ckpt=tmp_path / "found True" / "epoch=1.ckpt")
    assert list(tmp_path.glob(".scale_batch_size*")) == []


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_the_command_line", [False, True])
def test_interrupt__writes_the_table_and_says_how_to_go_on(
    from_the_command_line: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)  # Lightning ignores it from then on
    last = ModelCheckpoint(tmp_path, save_last=True)
    others = [SavesWhenItRuns(None, None)] if from_the_command_line else []  # type: ignore[arg-type]
    monkeypatch.setattr(SavesWhenItRuns, "on_train_start", Callback.on_train_start)
    monkeypatch.setattr(sys, "argv", ["/bin/lightning-unfreeze", "fit", "-c", "my plan.yaml", "--ckpt_path=old.ckpt"])
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"), pytest.raises(SystemExit):
        fit(tmp_path, last, Raises(8, KeyboardInterrupt()), *others)
    signal.signal(signal.SIGINT, before)
    (line,) = [record.getMessage() for record in caplog.records if "interrupted in stage" in record.getMessage()]
    file = tmp_path / "last.ckpt"
    assert "stage 'full'" in line
    command = f"lightning-unfreeze fit -c 'my plan.yaml' --ckpt_path {file}"
    assert (command if from_the_command_line else f"ckpt_path={str(file)!r}") in line
    assert re.search(r"\(written \d+ s ago; ModelCheckpoint\(save_on_exception=True\)", line)
    rows = list(csv.DictReader((tmp_path / "stages.csv").read_text().splitlines()))
    assert [row["stage"] for row in rows] == ["features", "full"]


def test_interrupt__says_how_old_the_checkpoint_is_that_a_monitor_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing was better after the first epoch, so `last.ckpt` is of that one: what came since is done again."""

    class Ages(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 2:
                at = time.time() - 1000
                os.utime(tmp_path / "last.ckpt", (at, at))
                os.utime(saver.best_model_path, (at, at))

    before = signal.getsignal(signal.SIGINT)
    saver = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max", save_last=True)
    plan = GradualUnfreeze([Stage("full", epochs=5)])
    trainer = quiet_trainer([plan, saver, Ages(), Raises(8, KeyboardInterrupt())], enable_checkpointing=True)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"), pytest.raises(SystemExit):
        trainer.fit(LogsByEpoch([0.9, 0.5], "val_acc"), keyed_loader(), loader(random_images(8, seed=1)))
    signal.signal(signal.SIGINT, before)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 0
    (age,) = re.findall(r"last.ckpt'\) \(written (\d+) s ago", caplog.text)
    assert 1000 <= int(age) < 1200


def test_interrupt__without_a_checkpoint_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(signal.SIGINT)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"), pytest.raises(SystemExit):
        fit(tmp_path, Raises(8, KeyboardInterrupt()))
    signal.signal(signal.SIGINT, before)
    assert "no checkpoint was written to go on from" in caplog.text


# --- what a run says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "monitor", "module_monitor", "expected"),
    [
        (["val/acc", "val/loss"], None, None, "val/acc"),
        (["valid_loss", "train_acc"], None, None, "valid_loss"),
        (["eval.F1Score", "eval.error"], None, None, "eval.F1Score"),
        (["val/error", "val/acc"], "val/error", None, "val/error"),
        (["train loss", "validation loss"], None, None, "validation loss"),
        (["validation_loss", "interval_acc"], None, None, "validation_loss"),
        (["iou/dev", "val_loss"], None, "iou/dev", "iou/dev"),
        (["score"], None, None, "val_acc"),  # nothing tells that it was validated
    ],
)
def test_table__follows_a_metric_of_any_name(
    names: list[str], monitor: str | None, module_monitor: str | None, expected: str, tmp_path: Path
) -> None:
    module = LogsByEpoch([0.5, 0.4], *names)
    if module_monitor:
        module.monitor, module.mode = module_monitor, "min"
    saves = ModelCheckpoint(tmp_path, monitor=monitor, mode="min", save_on_train_epoch_end=False)
    trainer = quiet_trainer([GradualUnfreeze([Stage("a", epochs=2)]), saves], enable_checkpointing=True)
    trainer.fit(module, loader(), loader(random_images(8)))
    (row,) = csv.DictReader((tmp_path / "stages.csv").read_text().splitlines())
    less_is_better = "loss" in expected or "error" in expected or module_monitor is not None
    best = math.nan if expected == "val_acc" else 0.4 if less_is_better else 0.5
    assert float(row[f"best_{expected}"]) == pytest.approx(best, nan_ok=True)


class RefusesTheSecond(CSVLogger):
    """As a tracking server does with a second value of a step or of a hyperparameter."""

    def log_hyperparams(self, params: Any = None) -> None:
        raise ValueError("changing a param is not allowed")

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if "stage" in metrics:
            raise ValueError(f"step {step} was logged before")
        super().log_metrics(metrics, step)


def test_logger__that_refuses_a_second_write_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        _, trainer = fit(tmp_path, logger=RefusesTheSecond(tmp_path, name=None, version="log"), log_every_n_steps=1)
    assert trainer.global_step == 12
    assert caplog.text.count("RefusesTheSecond refused stage") <= 3  # said once for each set of names, not each step


def test_summary__says_which_file_holds_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Adds(StageCallback):
        def closing_rows(self, trainer: pl.Trainer, pl_module: Any) -> list[dict[str, Any]]:
            return [row("before over-fitting", "kept.ckpt", "val_loss = 0.1")]

    best = ModelCheckpoint(tmp_path, "best", monitor="val_loss", save_last=True)
    fit(tmp_path, best, Adds(), enable_progress_bar=True)
    said = " ".join(capsys.readouterr().out.split())
    for part in ("as trained, 12 steps", "best val_loss", f"val_loss = {float(best.best_model_score):.4g}"):
        assert part in said
    for part in ("last checkpoint", "before over-fitting", "kept.ckpt"):
        assert part in said


def test_summary__after_going_back_the_score_is_that_of_the_weights_in_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """0.4 is the best; the fit ends after the epoch that scored 0.7, and leaves the weights of the one before."""
    plan = GradualUnfreeze([Stage("full", lr=0.1, cycle_len=1, num_cycles=4, until="overfit")])
    trainer = quiet_trainer([plan, CosineRestarts()], enable_progress_bar=True)
    trainer.fit(LogsByEpoch([0.5, 0.4, 0.7]), keyed_loader(), loader(random_images(8, seed=1)))
    assert trainer.current_epoch == 3
    lines = [line for line in capsys.readouterr().out.splitlines() if "as trained" in line]
    assert len(lines) == 1
    assert "val_loss = 0.4" in lines[0]


# --- averages of weights ---------------------------------------------------------------------------------------------


class StepsDown(Callback):
    """The same moving average, by hand."""

    def __init__(self, decay: float) -> None:
        self.decay, self.average = decay, {}  # type: ignore[var-annotated]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for name, value in pl_module.named_parameters():
            before = self.average.get(name, value.detach().clone())
            self.average[name] = torch.lerp(before, value.detach(), 1 - self.decay)


@pytest.mark.parametrize("precompute", [False, True])
def test_weight_averaging__averages_over_the_stages_and_leaves_the_training_alone(
    precompute: bool, tmp_path: Path
) -> None:
    stages = [Stage("head", train="head", epochs=2, precompute=precompute), Stage("full", epochs=1)]

    def run(*others: Callback) -> UserModule:
        torch.manual_seed(0)
        module = UserModule(SmallNet())
        store = PrecomputeFeatures(tmp_path / "feature_store", policy="always")
        quiet_trainer([GradualUnfreeze(stages), store, *others]).fit(module, loader(), loader())
        return module

    by_hand = StepsDown(0.75)
    run(by_hand)
    module = run(EMAWeightAveraging(decay=0.75))
    for name, value in module.named_parameters():
        torch.testing.assert_close(value.detach(), by_hand.average[name], rtol=1e-5, atol=1e-7)


def test_weight_averaging__goes_back_with_the_weights_that_were_judged() -> None:
    """The values belong to the averages, so they come back, and the fit leaves the average of the best cycle end."""

    # before the averaging callback, which swaps the weights out again in the same hook
    averages = KeepsWeights("on_validation_epoch_end")
    stages = [Stage("full", cycle_len=1, num_cycles=4, until="overfit")]
    callbacks = [averages, GradualUnfreeze(stages), CosineRestarts(), EMAWeightAveraging(decay=0.75)]
    module = LogsByEpoch([0.5, 0.4, 0.6])
    trainer = quiet_trainer(callbacks)
    trainer.fit(module, loader(), loader())
    assert trainer.current_epoch == 3
    for name, value in module.named_parameters():
        assert torch.equal(value, averages.weights[1][name]), name
        assert not torch.equal(value, averages.weights[2][name]), name


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        (StochasticWeightAveraging(0.1), ["StochasticWeightAveraging", "CosineRestarts", "WeightAveraging"]),
        (GradientAccumulationScheduler({0: 1, 1: 2}), ["GradientAccumulationScheduler", "accumulate_grad_batches"]),
    ],
    ids=["swa", "accumulation"],
)
def test_callbacks__that_would_write_the_same_are_refused(other: Callback, parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException) as error:
        fit(tmp_path, other)
    for part in parts:
        assert part in str(error.value)


# --- options of the Trainer ------------------------------------------------------------------------------------------


def clipped_by_hand(value: float, accumulate: int) -> nn.Module:
    """One stage of two epochs with torch alone."""
    torch.manual_seed(0)
    module = steady_module(train_bn=True)
    optimizer = module.configure_optimizers()
    batches = list(loader())
    for _ in range(2):
        for index, (x, y) in enumerate(batches):
            (nn.functional.cross_entropy(module.net(x), y) / accumulate).backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(batches):
                nn.utils.clip_grad_norm_(module.parameters(), value)
                optimizer.step()
                optimizer.zero_grad()
    return module


@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping__and_accumulation_equal_the_plain_loop(accumulate: int) -> None:
    torch.manual_seed(0)
    module = steady_module(train_bn=True)
    trainer = quiet_trainer(
        [GradualUnfreeze([Stage("a", epochs=1), Stage("b", epochs=1)])],
        gradient_clip_val=0.05,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, loader())
    by_hand = clipped_by_hand(0.05, accumulate)
    for (name, value), other in zip(module.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-7, msg=name)
    assert same_weights(weights_of(by_hand), weights_of(clipped_by_hand(1e9, accumulate))) != []  # it does clip


def test_reloaded_loaders__give_the_weights_of_the_kept_ones(tmp_path: Path) -> None:
    kept, _ = fit(tmp_path)
    reloaded, _ = fit(tmp_path, reload_dataloaders_every_n_epochs=1)
    assert same_weights(weights_of(kept), weights_of(reloaded)) == []


# --- without this package --------------------------------------------------------------------------------------------


def test_checkpoint__of_the_whole_recipe_loads_without_this_package(tmp_path: Path) -> None:
    """In a process that cannot import it; from inside the first stage, where the store is open, and from the end."""
    saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=4)
    fit(tmp_path, saves)
    script = f"""
import sys
sys.modules["lightning_unfreeze"] = None  # any import of it fails from here on
import torch
for step in (4, 8, 12):
    content = torch.load(f"{tmp_path}/step={{step}}.ckpt", weights_only=True)
    net = torch.nn.Module()
    net.backbone = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)),
        torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.BatchNorm2d(6)),
    )
    net.head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(6, 3))
    state = {{name[4:]: value for name, value in content["state_dict"].items() if name.startswith("net.")}}
    net.load_state_dict(state, strict=True)
    assert len(state) == len(net.state_dict())
print("loaded")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout.strip() == "loaded", done.stderr[-2000:]
