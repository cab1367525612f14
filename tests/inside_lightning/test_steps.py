"""A step outside of the Trainer's loop is the step inside of it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_unfreeze.inside_lightning.sandbox import sandbox
from lightning_unfreeze.inside_lightning.steps import batch_on_device, training_loss
from tests.zoo import SmallNet, UserModule, loader, quiet_trainer


def test_batch_on_device__goes_through_the_transfer_hooks() -> None:
    class Hooks(UserModule):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + 1, batch[1]]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * 2, batch[1]]

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            by_lightning, by_us = batch, batch_on_device(trainer, pl_module, next(iter(loader())))
            if batch_idx == 0:
                self.equal = torch.equal(by_lightning[0], by_us[0]) and by_us[0].dtype == torch.float64
                raw = next(iter(loader()))[0].double()
                self.expected = torch.equal(by_us[0], (raw + 1) * 2)

    looks = Looks()
    quiet_trainer([looks], precision="64-true", max_epochs=1).fit(Hooks(SmallNet()), loader(), loader())
    assert looks.equal
    assert looks.expected


@pytest.mark.parametrize("kind", ["no batch_idx", "dict", "None", "float"])
def test_training_loss__takes_every_form_of_a_training_step(kind: str) -> None:
    class Module(UserModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
            loss = super().training_step(batch, batch_idx)
            return {"no batch_idx": loss, "dict": {"loss": loss, "extra": 1}, "None": None, "float": 0.5}[kind]

    class NoIndex(UserModule):
        def training_step(self, batch: Any) -> torch.Tensor:  # type: ignore[override]
            return super().training_step(batch, 0)

    class Looks(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            batch = next(iter(loader()))
            with sandbox(trainer, pl_module):
                self.loss = training_loss(trainer, pl_module, batch, 0)
                torch.manual_seed(1)
                self.loss = training_loss(trainer, pl_module, batch, 0)
                torch.manual_seed(1)
                self.expected = nn.functional.cross_entropy(pl_module.net(batch[0]), batch[1])
            raise InterruptedError

    looks = Looks()
    module = NoIndex(SmallNet()) if kind == "no batch_idx" else Module(SmallNet())
    # stops before Lightning's own loop sees a float, which it does not take
    with pytest.raises(InterruptedError):
        quiet_trainer([looks], max_epochs=1, limit_val_batches=1).fit(module, loader(), loader())
    if kind == "None":
        assert looks.loss is None
    else:
        assert looks.loss is not None
        assert torch.equal(looks.loss, torch.tensor(0.5) if kind == "float" else looks.expected)
