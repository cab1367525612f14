"""Weights kept aside, and files of weights alone: what comes back is bitwise what was there."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import nn

from lightning_unfreeze.inside_lightning.metrics import pin_callback_metrics, unpin_callback_metrics, validate_aside
from lightning_unfreeze.inside_lightning.weights import (
    KeptWeights,
    average_of,
    keep_weights,
    load_weights,
    put_weights_back,
    save_weights,
)
from tests.zoo import Does, SmallNet, UserModule, loader, quiet_trainer, same_weights, weights_of


class At(Callback):
    """Calls a function at the end of an epoch's training."""

    def __init__(self, act: dict[int, Any]) -> None:
        self.act = act

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch in self.act:
            self.act[trainer.current_epoch](trainer, pl_module)


def test_weights__go_back_with_the_average_beside_them(tmp_path: Path) -> None:
    """Also through a file: what is kept is part of a checkpoint that loads with `weights_only=True`."""
    found: dict[str, Any] = {}

    def keep(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        found["kept"] = keep_weights(trainer, module)
        found["weights"], found["average"] = weights_of(module), weights_of(average_of(trainer))  # type: ignore[arg-type]
        found["moments"] = [value.clone() for state in trainer.optimizers[0].state.values() for value in state.values()]
        torch.save(vars(found["kept"]), tmp_path / "kept.pt")

    def back(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert same_weights(weights_of(module), found["weights"])
        kept = KeptWeights(**torch.load(tmp_path / "kept.pt", weights_only=True))
        put_weights_back(trainer, module, kept)
        assert same_weights(weights_of(module), found["weights"]) == []
        assert same_weights(weights_of(average_of(trainer)), found["average"]) == []  # type: ignore[arg-type]
        moments = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        assert all(torch.equal(*pair) for pair in zip(moments, found["moments"], strict=True))
        found["done"] = True

    callbacks = [At({0: keep, 2: back}), EMAWeightAveraging(decay=0.5)]
    quiet_trainer(callbacks, max_epochs=4).fit(UserModule(SmallNet()), loader(), loader())
    assert found["done"]


class Task(enum.Enum):
    CATS = 1


@pytest.mark.parametrize("given", [1.5, Path("x"), Task.CATS, nn.GELU, {"depth": [Path("x")]}])
def test_weights__files_load_whatever_the_hyperparameters_are(tmp_path: Path, given: Any) -> None:
    class Configured(UserModule):
        def __init__(self, given: Any) -> None:
            super().__init__(SmallNet())
            self.save_hyperparameters()

    module, trainer = Configured(given), quiet_trainer([], max_epochs=1)
    trainer.fit(module, loader(), loader())
    save_weights(trainer, tmp_path / "shot.ckpt")
    assert same_weights(load_weights(tmp_path / "shot.ckpt"), weights_of(module)) == []
    hyperparameters = torch.load(tmp_path / "shot.ckpt", weights_only=True).get("hyper_parameters")
    assert hyperparameters == ({"given": given} if given == 1.5 else None)


def test_weights__a_file_of_more_than_weights_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "task": Task.CATS}, tmp_path / "other.ckpt")
    with pytest.raises(MisconfigurationException, match=r"other\.ckpt holds more than tensors"):
        load_weights(tmp_path / "other.ckpt")


def test_metrics__stay_pinned_through_the_end_of_an_epoch() -> None:
    seen: list[float] = []

    class Module(UserModule):
        def on_train_epoch_end(self) -> None:
            self.log("val_loss", 9.0)  # after the callbacks, before those that monitor

    class Reads(pl.callbacks.EarlyStopping):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append(float(trainer.callback_metrics["val_loss"]))

    def pin(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        pin_callback_metrics(trainer, {"val_loss": 0.25})

    trainer = quiet_trainer([At({1: pin}), Reads("val_loss")], max_epochs=2)
    trainer.fit(Module(SmallNet()), loader(), loader())
    assert seen == [9.0, 0.25]
    unpin_callback_metrics(trainer)
    assert {name: float(value) for name, value in trainer.callback_metrics.items()} == {"val_loss": 0.25}


def test_metrics__a_validation_aside_is_that_of_the_trainer() -> None:
    found: dict[str, Any] = {}

    def hear(*_: Any) -> None:
        found["heard"] = found.get("heard", 0) + 1

    def validate(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        before, random = dict(trainer.callback_metrics), torch.get_rng_state()
        found["aside"] = validate_aside(trainer)
        assert dict(trainer.callback_metrics) == before
        assert torch.equal(torch.get_rng_state(), random)
        assert module.training

    module = UserModule(SmallNet())
    trainer = quiet_trainer([Does(on_validation_end=hear, on_train_end=validate)], max_epochs=2)
    trainer.fit(module, loader(), loader())
    assert found["heard"] == 2
    (logged,) = quiet_trainer([]).validate(module, loader(), verbose=False)
    assert found["aside"] == pytest.approx(logged)
