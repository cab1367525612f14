"""Users' modules that write what a plan writes: refused with their name, replaced, or left alone."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim import lr_scheduler

from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.inside_lightning.writers import FREEZING, RATES, writers_of
from lightning_unfreeze.stages.plan import Stage
from tests.zoo import Does, SmallNet, UserModule, loader, quiet_trainer, same_weights, weights_of

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
PLAN = [Stage("head", train="head", epochs=2), Stage("full", epochs=2)]


def user_module(kind: type[UserModule] = UserModule, **options: Any) -> UserModule:
    torch.manual_seed(0)
    module = kind(SmallNet(), **options)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module


# --- modes -----------------------------------------------------------------------------------------------------------


class TrainsAllInAStep(UserModule):
    """As many do who evaluate a teacher in between."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.backbone.train()
        return super().training_step(batch, batch_idx)


class TrainsALayerInAStep(UserModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.backbone[0].train()
        for layer in self.backbone[0].children():
            layer.train()
        return super().training_step(batch, batch_idx)


def test_own_train_mode__does_not_move_what_is_frozen() -> None:
    module, plain = user_module(TrainsAllInAStep), user_module()
    for each in (module, plain):
        quiet_trainer([GradualUnfreeze(PLAN[:1])]).fit(each, loader())
    assert same_weights(weights_of(plain), weights_of(module)) == []  # buffers, too
    assert not any(part._forward_pre_hooks for part in module.modules())
    assert module.backbone.training


def test_own_train_mode__of_a_part_is_named() -> None:
    with pytest.warns(
        UserWarning, match=r"'head': frozen modules are in training mode.*TrainsALayerInAStep.training_step"
    ):
        quiet_trainer([GradualUnfreeze(PLAN[:1])]).fit(user_module(TrainsALayerInAStep), loader())


class Interrupted(UserModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        raise ZeroDivisionError


def test_modes__are_given_back_after_an_error() -> None:
    module = user_module(Interrupted)
    with pytest.raises(ZeroDivisionError):
        quiet_trainer([GradualUnfreeze(PLAN[:1])]).fit(module, loader())
    assert all(part.training for part in module.modules())
    assert not any(part._forward_pre_hooks for part in module.modules())


# --- freezing --------------------------------------------------------------------------------------------------------


class FreezesByEpoch(UserModule):
    from_epoch = 0

    def on_train_epoch_start(self) -> None:
        self.backbone.requires_grad_(self.current_epoch >= self.from_epoch)


class FreezesInAStep(UserModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 4:
            for parameter in self.backbone[0].parameters():
                parameter.requires_grad = True
        return super().training_step(batch, batch_idx)


class UnfreezingCallback(Callback):
    """A user's own `BackboneFinetuning`."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.unfreeze()


@pytest.mark.parametrize(
    ("kind", "others", "from_epoch", "epoch", "parts"),
    [
        (FreezesByEpoch, [], 1, 1, ["stage 'head'", "parameters of 0, 1 train", "FreezesByEpoch.on_train_epoch_start"]),
        (FreezesByEpoch, [], 3, 2, ["stage 'full'", "parameters of 0, 1 are frozen"]),
        (FreezesInAStep, [], 0, 1, ["stage 'head'", "parameters of 0 train", "FreezesInAStep.training_step"]),
        (UserModule, [UnfreezingCallback()], 0, 1, ["UnfreezingCallback.on_train_epoch_start", "express it as stages"]),
    ],
)
def test_own_freezing__is_refused_at_its_first_step_and_named(
    kind: Any, others: list[Callback], from_epoch: int, epoch: int, parts: list[str]
) -> None:
    module = user_module(kind)
    module.from_epoch = from_epoch
    trainer = quiet_trainer([GradualUnfreeze(PLAN), *others])
    with pytest.raises(MisconfigurationException) as error:
        trainer.fit(module, loader())
    for part in parts:
        assert part in str(error.value)
    assert trainer.current_epoch == epoch


def test_own_freezing__that_agrees_with_the_plan_is_no_clash() -> None:
    module = user_module(FreezesByEpoch)
    module.from_epoch = 2
    trainer = quiet_trainer([GradualUnfreeze(PLAN)])
    trainer.fit(module, loader())
    assert trainer.current_epoch == 4


def test_no_gradient__where_the_plan_trains_is_said() -> None:
    class Detached(UserModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            with torch.no_grad():
                features = self.backbone(batch[0])
            return nn.functional.cross_entropy(self.head(features), batch[1])

    with pytest.warns(UserWarning, match=r"stage 'full' trains 0, 1 by plan.*torch\.no_grad"):
        quiet_trainer([GradualUnfreeze(PLAN)]).fit(user_module(Detached), loader())


def test_writers__are_found_in_nested_functions_and_not_among_lightnings() -> None:
    class Nested(pl.LightningModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)

        def on_train_start(self) -> None:
            def ramp() -> None:
                self.optimizers().param_groups[0]["lr"] = 0.1

            ramp()

    trainer = quiet_trainer([])
    assert writers_of(RATES, trainer, Nested()) == "Nested.on_train_start"
    assert writers_of(FREEZING, trainer, Nested()) == "a hook of Nested or a callback"


# --- rates -----------------------------------------------------------------------------------------------------------


class WarmsUp(UserModule):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.001 * (self.trainer.global_step + 1)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class WarmUpCallback(Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        optimizer.param_groups[-1]["lr"] *= 0.5


@pytest.mark.parametrize("cycles", [{"epochs": 1}, {"cycle_len": 1}])
@pytest.mark.parametrize(
    ("kind", "others", "name"),
    [
        (WarmsUp, [], "WarmsUp.optimizer_step"),
        (UserModule, [WarmUpCallback()], "WarmUpCallback.on_before_optimizer_step"),
    ],
)
def test_own_warm_up__is_refused_at_its_first_step_and_named(
    kind: Any, others: list[Callback], name: str, cycles: dict[str, Any]
) -> None:
    trainer = quiet_trainer([*others, GradualUnfreeze([Stage("full", lr=0.02, **cycles)]), CosineRestarts()])
    with pytest.raises(MisconfigurationException, match=rf"learning rate of .* the stage set .*{name}"):
        trainer.fit(user_module(kind), loader())
    assert trainer.global_step == 0


class WarmsUpAfterTheStep(UserModule):
    """The warm-up of Lightning's own documentation: the rate of the next step."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * self.global_step


class WritesInALateHook(UserModule):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.123


class DecaysByEpoch(Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] *= 0.1


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("kind", "callbacks", "named", "steps"),
    [
        (WarmsUpAfterTheStep, [], "WarmsUpAfterTheStep.optimizer_step", 1),
        (WritesInALateHook, [], "WritesInALateHook.on_before_optimizer_step", 1),
        (UserModule, [DecaysByEpoch()], "DecaysByEpoch.on_train_epoch_end", 3),
    ],
)
def test_own_rates__written_after_our_last_look_are_named_before_they_are_overwritten(
    kind: type[UserModule], callbacks: list[Callback], named: str, steps: int, order: int
) -> None:
    players: list[Callback] = [GradualUnfreeze([Stage("all", epochs=2, lr=0.1)]), CosineRestarts()]
    trainer = quiet_trainer([*players[::order], *callbacks])
    with pytest.raises(MisconfigurationException, match=rf"learning rate of .*written by {named}"):
        trainer.fit(user_module(kind), loader())
    assert trainer.global_step == steps


class AddsAParamGroup(UserModule):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.late = nn.Parameter(torch.zeros(2))
            self.trainer.optimizers[0].add_param_group({"params": [self.late], "lr": 0.3})


def test_own_param_group__that_is_added_late_is_named() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"a param group was added.*AddsAParamGroup.on_train_epoch_start"
    ):
        quiet_trainer([GradualUnfreeze(PLAN)]).fit(user_module(AddsAParamGroup), loader())


def test_own_warm_up__is_left_alone_where_stages_set_no_rates() -> None:
    trainer = quiet_trainer([GradualUnfreeze([Stage("full", epochs=1)])])
    trainer.fit(user_module(WarmsUp), loader())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.001 * 3


# one rule: the ratios of the user's own param groups are kept, whatever a stage's rate is
@pytest.mark.parametrize(
    ("lr", "expected"),
    [(None, {"0": 0.02 / 4, "1": 0.02 / 2, "head": 0.1}), (0.5, {"0": 0.1 / 4, "1": 0.1 / 2, "head": 0.5})],
)
def test_rates__keep_the_ratios_that_the_optimizer_was_given(lr: float | None, expected: dict[str, float]) -> None:
    class Ratios(UserModule):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.backbone.parameters(), "lr": 0.02}, {"params": self.head.parameters()}]
            return torch.optim.SGD(groups, lr=0.1)

    trainer = quiet_trainer([GradualUnfreeze([Stage("full", epochs=1, lr=lr, lr_mult=0.5)])])
    trainer.fit(user_module(Ratios), loader())
    rates = {group["layer_group"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates == pytest.approx(expected)


# --- schedulers of the module ----------------------------------------------------------------------------------------


class Scheduled(UserModule):
    """A scheduler, and its monitor as an attribute of the module."""

    monitor, mode = "val_loss", "min"

    def __init__(self, net: nn.Module, scheduler: str = "plateau") -> None:
        super().__init__(net)
        self.scheduler = scheduler

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        made = {
            "none": lambda: None,
            "plateau": lambda: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1),
            "one cycle": lambda: lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=6, cycle_momentum=False),
            "warm-up": lambda: lr_scheduler.SequentialLR(
                optimizer, [lr_scheduler.LinearLR(optimizer, 0.01), lr_scheduler.ConstantLR(optimizer)], [3]
            ),
        }[self.scheduler]()
        interval = "step" if self.scheduler == "one cycle" else "epoch"
        if made is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": made, "monitor": self.monitor, "interval": interval},
        }


@pytest.mark.parametrize("scheduler", ["plateau", "one cycle", "warm-up"])
@pytest.mark.parametrize("first", [True, False])
def test_scheduler_replace__trains_as_the_module_without_one(
    scheduler: str, first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    plan = [Stage("head", "head", epochs=1), Stage("full", lr_mult=0.5, cycle_len=1)]
    weights = {}
    for kind in ("none", scheduler):
        ours = [GradualUnfreeze(plan, scheduler="replace"), CosineRestarts()]
        trainer = quiet_trainer(ours if first else ours[::-1])
        with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
            trainer.fit(module := user_module(Scheduled, scheduler=kind), loader(), loader())
        weights[kind] = weights_of(module)
        assert ("is replaced" in caplog.text) == (kind != "none")
    assert same_weights(weights["none"], weights[scheduler]) == []


def test_scheduler_error__names_the_option() -> None:
    with pytest.raises(MisconfigurationException, match=r"ReduceLROnPlateau.*GradualUnfreeze\(scheduler='replace'\)"):
        quiet_trainer([CosineRestarts(), GradualUnfreeze([Stage("a", cycle_len=1)])]).fit(
            user_module(Scheduled), loader(), loader()
        )


# --- groups that would hardly train ----------------------------------------------------------------------------------


def test_freeze_below__freezes_what_would_hardly_train_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    plan = [Stage("full", epochs=1, lr_mult=0.1), Stage("again", epochs=1, lr_mult=0.2)]
    seen: dict[str, set[str]] = {}

    def look(trainer: pl.Trainer, module: Any, _: Any) -> None:
        name = plan[trainer.current_epoch].name
        seen[name] = {n for n, p in module.backbone.named_parameters() if p.requires_grad}

    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        callbacks = [GradualUnfreeze(plan, freeze_below=0.02), Does(on_before_zero_grad=look)]
        quiet_trainer(callbacks).fit(user_module(), loader())
    # 0.1 squared lies below 0.02, 0.2 squared does not
    assert {name[0] for name in seen["full"]} == {"1"}
    assert {name[0] for name in seen["again"]} == {"0", "1"}
    assert "trains 1, head" in caplog.text
    assert "keeps 0 frozen (their rates lie below 0.02)" in caplog.text


def test_freeze_below__refuses_a_stage_of_which_nothing_is_left() -> None:
    plan = [Stage("stem", train=["0"], epochs=1, lr_mult=0.1)]
    with pytest.raises(MisconfigurationException, match=r"stage 'stem'.*freeze_below=0\.02"):
        quiet_trainer([GradualUnfreeze(plan, freeze_below=0.02)]).fit(user_module(), loader())


@pytest.mark.parametrize(
    "options", [{"freeze_below": 0.0}, {"freeze_below": 2.0}, {"scheduler": "keep"}, {"early_stopping": "run"}]
)
def test_options__that_are_impossible_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        GradualUnfreeze(PLAN, **options)
