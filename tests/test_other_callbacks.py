"""Stages beside the callbacks and options that a user brings along."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
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
from torch import nn

from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage
from lightning_unfreeze.callbacks.precompute import PrecomputeFeatures
from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.stages.plan import Stage
from tests.conftest import (
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


def test_weight_averaging__is_refused_where_the_stage_goes_back_to_its_best_weights() -> None:
    stages = [Stage("full", cycle_len=1, num_cycles=2, until="overfit")]
    trainer = quiet_trainer([GradualUnfreeze(stages), CosineRestarts(), EMAWeightAveraging(decay=0.75)])
    with pytest.raises(MisconfigurationException, match=r"EMAWeightAveraging.*until='overfit'.*num_cycles"):
        trainer.fit(UserModule(SmallNet()), loader(), loader())


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
