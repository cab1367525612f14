"""The conductor against a plain PyTorch loop, against users' modules and trainers, and against what it must refuse."""

from __future__ import annotations

import copy
import csv
import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchvision
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import lr_scheduler

from lightning_unfreeze.callbacks.base import StageCallback
from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage
from lightning_unfreeze.callbacks.precompute import PrecomputeFeatures
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.stages.plan import Stage
from tests.zoo import (
    Does,
    Evaluated,
    LogsByEpoch,
    Raises,
    SmallNet,
    StopsAfter,
    Stream,
    TwoOptimizers,
    UserModule,
    UsesLBFGS,
    loader,
    quiet_trainer,
    random_images,
    same_weights,
    weights_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

HEAD_THEN_ALL = (Stage("head", train="head", epochs=1), Stage("full", epochs=1))


def net_without_dropout() -> SmallNet:
    net = SmallNet()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


def user_module(**options: Any) -> UserModule:
    torch.manual_seed(0)
    return UserModule(net_without_dropout(), **options)


class Witness(StageCallback):
    """Writes down what it is told, and looks at the module inside every training step."""

    order = 90

    def __init__(self, look: Callable[[pl.Trainer, Any], Any] = lambda trainer, module: None) -> None:
        self.events: list[tuple[str, str, int, int]] = []
        self.seen: list[tuple[str, Any]] = []
        self.look = look

    def on_stage_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        self.events.append(("start", stage.name, trainer.current_epoch, trainer.global_step))

    def on_stage_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        self.events.append(("end", stage.name, trainer.current_epoch, trainer.global_step))

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        assert self.run is not None
        self.seen.append((self.run.stage.name, self.look(trainer, pl_module)))


def modes(trainer: pl.Trainer, module: nn.Module) -> dict[str, bool]:
    return {name: part.training for name, part in module.named_modules()}


# --- the oracle ------------------------------------------------------------------------------------------------------

PLAN = [
    Stage("head", train="head", epochs=2, lr=0.05),
    Stage("top", train=2, epochs=1, lr=0.03, lr_mult=0.5),
    Stage("full", train="all", epochs=2, lr=0.02, lr_mult=[0.1, 0.2, 1.0]),
    Stage("stem", train=["0"], epochs=2, lr=0.04, lr_mult=0.5),  # freezes again what has momentum by now
    Stage("again", train=["head", "0"], epochs=1),
]
# (epochs, rate of the first block, of the second, of the head; None where it is frozen), by hand from PLAN
ROWS: list[tuple[int, float | None, float | None, float | None]] = [
    (2, None, None, 0.05),
    (1, None, 0.03 * 0.5, 0.03),
    (2, 0.02 * 0.1, 0.02 * 0.2, 0.02),
    (2, 0.04 * 0.25, None, None),
    (1, None, None, None),  # the rates that the optimizer was given, filled in below
]


def plain_loop(module: UserModule, batches: Any, accumulate: int) -> None:
    """The same run as PLAN, with torch alone."""
    given = 0.05 if module.optimizer == "sgd" else 0.01
    parts = [module.net.backbone[0], module.net.backbone[1], module.net.head]
    optimizer = module.configure_optimizers()
    old = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    part_of_group = []
    for group in old:
        for part in parts:
            mine = [p for p in group["params"] if any(p is q for q in part.parameters())]
            optimizer.param_groups.append({**group, "params": mine})
            part_of_group.append(part)
    for epochs, *rates in [*ROWS[:-1], (1, given, None, given)]:
        for part, rate in zip(parts, rates, strict=True):
            part.train(rate is not None)
            for parameter in part.parameters():
                parameter.requires_grad_(rate is not None)
                if rate is None:
                    parameter.grad = None
        for group, part in zip(optimizer.param_groups, part_of_group, strict=True):
            group["lr"] = rates[parts.index(part)] or 0.0
        for _ in range(epochs):
            for index, (x, y) in enumerate(batches):
                loss = nn.functional.cross_entropy(module.net(x), y) / accumulate
                loss.backward()
                if (index + 1) % accumulate == 0 or index + 1 == len(batches):
                    optimizer.step()
                    optimizer.zero_grad()


@pytest.mark.parametrize(("optimizer", "accumulate"), [("sgd", 1), ("adamw", 1), ("adamw", 2)])
def test_unfreeze__equals_a_plain_loop_bitwise(optimizer: str, accumulate: int) -> None:
    ours, plain = user_module(optimizer=optimizer), user_module(optimizer=optimizer)
    start = weights_of(plain)
    trainer = quiet_trainer([GradualUnfreeze(PLAN)], accumulate_grad_batches=accumulate)
    trainer.fit(ours, loader(), loader())
    plain_loop(plain, loader(), accumulate)
    assert same_weights(weights_of(ours), weights_of(plain)) == []
    assert len(same_weights(start, weights_of(plain))) >= 14  # it did train
    assert trainer.current_epoch == 8
    assert trainer.global_step == 8 * math.ceil(3 / accumulate)


# --- a user's module -------------------------------------------------------------------------------------------------


class Fights(UserModule):
    """Calls `train()` where it can."""

    def on_train_epoch_start(self) -> None:
        self.train()

    def on_validation_model_train(self) -> None:
        self.train()


def test_unfreeze__a_resnet_of_the_user_stays_frozen_below_the_boundary() -> None:
    torch.manual_seed(0)
    module = Fights(torchvision.models.resnet18(num_classes=3))
    start = weights_of(module)
    witness = Witness(lambda trainer, module: weights_of(module))
    plan = [Stage("head", train="head", epochs=1), Stage("top", train=3, epochs=1)]
    data = loader(random_images(8, size_px=32), batch_size=4)
    quiet_trainer([GradualUnfreeze(plan), witness], val_check_interval=1).fit(module, data, data)
    moved = {name: set(same_weights(start, weights)) for name, weights in witness.seen}
    assert moved["head"] == {"net.fc.weight", "net.fc.bias"}
    tops = ("net.layer3.", "net.layer4.", "net.fc.")
    assert {name for name in moved["top"] if not name.startswith(tops)} == set()
    # everything above the boundary moves, running statistics included
    assert {name for name in start if name.startswith(tops)} == moved["top"]


def test_unfreeze__frozen_modules_are_in_eval_mode_in_every_step() -> None:
    witness = Witness(modes)
    plan = [Stage("head", train="head", epochs=2), Stage("full", epochs=1), Stage("stem", train=["0"], epochs=1)]
    quiet_trainer([witness, GradualUnfreeze(plan)], val_check_interval=1).fit(Fights(SmallNet()), loader(), loader())
    assert [name for name, _ in witness.seen] == ["head"] * 6 + ["full"] * 3 + ["stem"] * 3
    on = {name: {key for key, training in seen.items() if training} for name, seen in witness.seen}
    bn_and_dropout = {"net.backbone.0.1", "net.backbone.1.1", "net.backbone.1.3", "net.head.1"}
    assert on["head"] & bn_and_dropout == {"net.head.1"}
    assert on["full"] & bn_and_dropout == bn_and_dropout
    assert on["stem"] & bn_and_dropout == {"net.backbone.0.1"}


@pytest.mark.filterwarnings("ignore:Found 1 module")  # Lightning, about the user's choice
def test_unfreeze__modes_that_the_user_chose_come_back_with_the_unfreezing() -> None:
    module = UserModule(SmallNet())
    module.net.backbone[0][1].eval()  # the user's own frozen BatchNorm
    witness = Witness(modes)
    quiet_trainer([GradualUnfreeze(HEAD_THEN_ALL), witness]).fit(module, loader())
    assert not witness.seen[-1][1]["net.backbone.0.1"]
    assert witness.seen[-1][1]["net.backbone.1.1"]
    assert not module.net.backbone[0][1].training
    assert module.net.backbone[1][1].training


def test_unfreeze__optimizer_state_of_what_goes_on_training_is_kept() -> None:
    class Border(Callback):
        def __init__(self) -> None:
            self.states: list[dict[str, Any]] = []

        def keep(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            state = trainer.optimizers[0].state
            self.states.append({n: copy.deepcopy(state[p]) for n, p in module.named_parameters() if p in state})

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.keep(trainer, pl_module)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 2 and batch_idx == 0:
                self.keep(trainer, pl_module)

    plan = [Stage("head", train="head", epochs=2), Stage("full", epochs=1)]
    border = Border()
    quiet_trainer([GradualUnfreeze(plan), border]).fit(user_module(), loader())
    _, before, after, last = border.states
    head = {"net.head.2.weight", "net.head.2.bias"}
    assert set(before) == set(after) == head
    for name in head:
        assert before[name]["step"] == after[name]["step"] == 6
        assert last[name]["step"] == 9
        assert torch.equal(before[name]["exp_avg"], after[name]["exp_avg"])
        assert torch.equal(before[name]["exp_avg_sq"], after[name]["exp_avg_sq"])
        assert before[name]["exp_avg"].abs().max() > 0
    assert all(state["step"] == 3 for name, state in last.items() if name not in head)


def test_unfreeze__left_out_parameters_follow_and_fixed_ones_stay_fixed() -> None:
    class Partial(UserModule):
        def __init__(self) -> None:
            super().__init__(net_without_dropout())
            self.net.backbone[1][0].bias.requires_grad_(False)  # fixed by the module itself

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)

    callback = GradualUnfreeze([*HEAD_THEN_ALL, Stage("stem", train=["0"], epochs=1)])
    for _ in range(2):  # the second fit finds the fixed parameter in a group that the first one left frozen
        module = Partial() if not callback.groups else module  # noqa: F821
        start = weights_of(module)
        witness = Witness(lambda trainer, module: weights_of(module))
        trainer = quiet_trainer([callback, witness])
        trainer.fit(module, loader())
        full = next(weights for name, weights in reversed(witness.seen) if name == "full")
        moved = set(same_weights(start, full))
        assert moved == set(start) - {"net.backbone.1.0.bias", "backbone.1.0.bias"}
        groups = trainer.optimizers[0].param_groups
        assert [group["layer_group"] for group in groups] == ["head", "0", "1"]
        # torch's defaults of SGD as this optimizer was made: lr and momentum are its own
        assert all((group["momentum"], group["weight_decay"]) == (0.9, 0.01) for group in groups)


def test_unfreeze__frozen_again_is_frozen_where_gradients_are_zeroed_and_kept() -> None:
    class KeepsGradients(UserModule):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=False)  # then weight decay and momentum would go on

    witness = Witness(lambda trainer, module: weights_of(module))
    plan = [Stage("full", epochs=1), Stage("head", train="head", epochs=1)]
    module = KeepsGradients(net_without_dropout())
    quiet_trainer([GradualUnfreeze(plan), witness]).fit(module, loader())
    at_border = next(weights for name, weights in witness.seen if name == "head")
    assert {name for name in same_weights(at_border, weights_of(module)) if "backbone" in name} == set()


def test_unfreeze__decay_split_is_kept_and_names_are_unique() -> None:
    module = user_module()
    trainer = quiet_trainer([GradualUnfreeze(HEAD_THEN_ALL)])
    trainer.fit(module, loader())
    groups = trainer.optimizers[0].param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {id(p): 0.05 if p.ndim > 1 else 0.0 for p in module.parameters()} == decay
    names = [group["name"] for group in groups]
    assert len(groups) == 6
    assert len(set(names)) == 6
    assert {group["layer_group"] for group in groups} == {"0", "1", "head"}


def test_unfreeze__logs_stage_and_rates_beside_a_rate_monitor(tmp_path: Any) -> None:
    logger = CSVLogger(tmp_path)
    plan = [Stage("head", train="head", epochs=2, lr=0.5), Stage("full", epochs=2, lr=0.25, lr_mult=0.1)]
    trainer = quiet_trainer([LearningRateMonitor(), GradualUnfreeze(plan)], logger=logger, log_every_n_steps=1)
    trainer.fit(user_module(), loader())
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    ours = {int(row["step"]): row for row in rows if row["stage"]}
    assert sorted(ours) == list(range(1, 13))
    for step, row in ours.items():
        full = step > 6
        assert float(row["stage"]) == float(full)
        assert float(row["lr/head"]) == (0.25 if full else 0.5)
        assert [row["lr/1"], row["lr/0"]] == ([str(0.25 * 0.1), str(0.25 * 0.1**2)] if full else ["", ""])
    # Lightning's monitor reads at batch start: step 0 to 11
    monitored = {int(row["step"]): float(row["lr-AdamW/head"]) for row in rows if row["lr-AdamW/head"]}
    assert monitored == {step: 0.25 if step >= 6 else 0.5 for step in range(12)}
    with open(f"{logger.log_dir}/hparams.yaml") as file:
        assert "stage_0: head" in file.read()


def test_unfreeze__says_the_rates_of_each_stage(caplog: pytest.LogCaptureFixture) -> None:
    plan = [
        Stage("head", train="head", epochs=1, lr=1e-2),
        Stage("top", train=2, epochs=1, lr=1e-2, lr_span=1 / 4),  # of the groups 0, 1, head the first stays frozen
        Stage("full", epochs=1, lr=1e-3, lr_span=1e-5 / 1e-3),  # fastai's slice(1e-5, 1e-3)
        Stage("found", epochs=1, lr="find"),
    ]
    trainer = quiet_trainer([GradualUnfreeze(plan), LRFinderPerStage()])
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        trainer.fit(user_module(), loader())
    said = [line for line in caplog.messages if line.startswith("stage ") and " trains " in line]
    assert [line.partition("for 1 epoch")[2] for line in said] == [
        " at lr 0.01",
        " at lr 0.005 (1) to 0.01 (head)",
        " at lr 1e-05 (0) to 0.001 (head)",
        "",
    ]


def test_unfreeze__says_no_rates_that_the_plan_does_not_set(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        quiet_trainer([GradualUnfreeze(list(HEAD_THEN_ALL))]).fit(user_module(), loader())
    assert "trains 0, 1, head" in caplog.text and "at lr" not in caplog.text


@pytest.mark.parametrize("log_every", [0, 50])
def test_unfreeze__a_logger_that_is_never_due_is_no_error(tmp_path: Any, log_every: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of training batches")
        quiet_trainer([GradualUnfreeze(HEAD_THEN_ALL)], logger=CSVLogger(tmp_path), log_every_n_steps=log_every).fit(
            user_module(), loader()
        )


def test_unfreeze__a_rate_that_is_a_tensor_stays_one() -> None:
    class TensorRate(UserModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=torch.tensor(0.1))

    trainer = quiet_trainer([GradualUnfreeze([Stage("full", epochs=1, lr=0.25, lr_mult=0.5)])])
    trainer.fit(TensorRate(SmallNet()), loader(), loader())
    rates = {group["layer_group"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert all(isinstance(rate, torch.Tensor) for rate in rates.values())
    assert [float(rate) for rate in rates.values()] == [0.0625, 0.125, 0.25]


# --- schedulers of the user ------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 2], 0.5),
    "Cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "Lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda e: 0.9**e, lambda e: 0.8**e]),
    "OneCycle": lambda o: {"scheduler": lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=12), "interval": "step"},
    "Cyclic": lambda o: {"scheduler": lr_scheduler.CyclicLR(o, [0.01, 0.02], [0.1, 0.2], 2), "interval": "step"},
    "Sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.StepLR(o, 1), lr_scheduler.ExponentialLR(o, 0.5)], [1, 3]
    ),
    "Chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "Plateau": lambda o: {
        "scheduler": lr_scheduler.ReduceLROnPlateau(o, "max", patience=0, min_lr=[1e-3, 2e-3]),
        "monitor": "val_loss",
    },
    "WarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
}


class Scheduled(UserModule):
    def __init__(self, scheduler: str, leave_out: bool = False) -> None:
        super().__init__(net_without_dropout())
        self.scheduler, self.leave_out = scheduler, leave_out

    def configure_optimizers(self) -> Any:
        # two param groups on purpose: as many as OneCycleLR has phases and SequentialLR milestones
        weights = [p for p in self.parameters() if p.ndim > 1][self.leave_out :]
        groups = [{"params": weights, "lr": 0.05}, {"params": [p for p in self.parameters() if p.ndim == 1]}]
        optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": SCHEDULERS[self.scheduler](optimizer)}


class Rates(Callback):
    def __init__(self) -> None:
        self.rates: list[dict[str, tuple[float, float]]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        names = {p: name for name, p in pl_module.named_parameters()}
        groups = trainer.optimizers[0].param_groups
        self.rates.append({names[p]: (float(g["lr"]), g["momentum"]) for g in groups for p in g["params"]})


def run_scheduled(name: str, callbacks: list[Callback], **options: Any) -> tuple[Rates, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    module, rates = Scheduled(name, **options), Rates()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step")  # torch, in SequentialLR
        trainer = quiet_trainer([*callbacks, rates], max_epochs=4, enable_model_summary=False)
        trainer.fit(module, loader(), loader())
    return rates, weights_of(module)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_unfreeze__a_scheduler_that_does_not_fight_gives_the_same_rates(name: str) -> None:
    plan = [Stage("first", epochs=1), Stage("second", epochs=3)]
    without, plain_weights = run_scheduled(name, [])
    with_stages, weights = run_scheduled(name, [GradualUnfreeze(plan)])
    assert with_stages.rates == without.rates
    assert len({tuple(sorted(rates.items())) for rates in without.rates}) > 1  # the scheduler did something
    assert same_weights(weights, plain_weights) == []
    left_out, _ = run_scheduled(name, [GradualUnfreeze(plan)], leave_out=True)
    first = [rates["net.backbone.1.0.weight"] for rates in left_out.rates]
    assert [rates["net.backbone.0.0.weight"] for rates in left_out.rates] == first
    assert first == [rates["net.backbone.1.0.weight"] for rates in without.rates]


# --- refusals --------------------------------------------------------------------------------------------------------


class NoFinder(LRFinderPerStage):
    """Stands in by its base's name."""

    def on_stage_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Searches nothing."""


class NoOptimizer(UserModule):
    def configure_optimizers(self) -> Any:
        return None


class Manual(UserModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize(
    ("module", "plan", "others", "options", "parts"),
    [
        (None, HEAD_THEN_ALL, [], {"max_epochs": 7}, ["max_epochs=7", "2 stages last 2 epochs", "set it to 2"]),
        (Scheduled("StepLR"), [Stage("a", epochs=1, lr=0.1)], [], {}, ["StepLR", "two writers"]),
        (Scheduled("Cosine"), [Stage("a", epochs=1, lr_mult=0.5)], [], {}, ["CosineAnnealingLR"]),
        (NoOptimizer(), HEAD_THEN_ALL, [], {}, ["_MockOptimizer has none", "one torch optimizer"]),
        (UsesLBFGS(), HEAD_THEN_ALL, [], {}, ["LBFGS", "AdamW"]),
        (Manual(), HEAD_THEN_ALL, [], {}, ["automatic_optimization=False"]),
        (
            None,
            [Stage("a", "head", 1, precompute=True)],
            [],
            {},
            ["'a'", "precompute=True", "add PrecomputeFeatures()"],
        ),
        (None, [Stage("a", epochs=1, lr="find")], [], {}, ["lr='find'", "add LRFinderPerStage()"]),
        (None, [Stage("a", cycle_len=1)], [], {}, ["cycle_len=1", "add CosineRestarts()"]),
        (None, [Stage("a", cycle_len=1, lr="find")], [NoFinder()], {}, ["add CosineRestarts()"]),
        (None, HEAD_THEN_ALL, [BackboneFinetuning()], {}, ["BackboneFinetuning", "as stages"]),
        (None, HEAD_THEN_ALL, [LearningRateFinder()], {}, ["LearningRateFinder", "LRFinderPerStage"]),
        (None, HEAD_THEN_ALL, [StochasticWeightAveraging(0.1)], {}, ["StochasticWeightAveraging", "WeightAveraging"]),
        (None, [Stage("a", ["haed"], 1)], [], {}, ["stage 'a'", "'haed'", "Did you mean 'head'", "0, 1, head"]),
        (None, [Stage("a", train=4, epochs=1)], [], {}, ["stage 'a'", "train=4", "there are 3"]),
        (None, [Stage("a", epochs=1, lr_mult=[0.1, 1])], [], {}, ["lr_mult has 2 factors", "3 layer groups"]),
        (UserModule(nn.Linear(2, 2)), HEAD_THEN_ALL, [], {}, ["layer_groups", "network="]),
    ],
)
def test_unfreeze__refuses_a_clash_before_training(
    module: Any, plan: Any, others: list[Callback], options: dict[str, Any], parts: list[str]
) -> None:
    module = user_module() if module is None else module
    start = weights_of(module)
    trainer = quiet_trainer([GradualUnfreeze(plan), *others], **options)
    with pytest.raises(MisconfigurationException) as error:
        trainer.fit(module, loader(random_images(4)), loader(random_images(4)))
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert same_weights(start, weights_of(module)) == []


def test_unfreeze__two_optimizers_are_refused_by_lightning_itself() -> None:
    with pytest.raises(RuntimeError, match="multiple optimizers"):
        quiet_trainer([GradualUnfreeze(HEAD_THEN_ALL)]).fit(TwoOptimizers(), loader(), loader())


def test_unfreeze__refuses_precompute_where_the_first_group_trains() -> None:
    trainer = quiet_trainer([GradualUnfreeze([Stage("a", ["0", "head"], 1, precompute=True)]), PrecomputeFeatures()])
    with pytest.raises(MisconfigurationException, match="first layer group '0' trains"):
        trainer.fit(user_module(), loader())


def test_unfreeze__refuses_two_plans_in_one_trainer() -> None:
    class Second(GradualUnfreeze):
        @property
        def state_key(self) -> str:
            return "second"

    trainer = quiet_trainer([GradualUnfreeze(HEAD_THEN_ALL), Second(HEAD_THEN_ALL)])
    with pytest.raises(MisconfigurationException, match="one plan"):
        trainer.fit(user_module(), loader())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(([],), "[]"), (([Stage("a", epochs=1)] * 2,), "'a'"), ((HEAD_THEN_ALL, None, "ignore"), "'ignore'")],
)
def test_unfreeze__refuses_impossible_arguments(arguments: Any, part: str) -> None:
    with pytest.raises(ValueError) as error:
        GradualUnfreeze(*arguments)
    assert part in str(error.value)


def test_unfreeze__refuses_a_trainer_of_the_other_package() -> None:
    foreign = type("Trainer", (), {"__module__": "pytorch_lightning.trainer.trainer"})()
    with pytest.raises(MisconfigurationException, match=r"pytorch_lightning.*lightning\.pytorch"):
        GradualUnfreeze(HEAD_THEN_ALL).setup(foreign, user_module(), "fit")


# --- trainers --------------------------------------------------------------------------------------------------------


def state_of(module: nn.Module) -> Any:
    return {n: p.requires_grad for n, p in module.named_parameters()}, {
        n: m.training for n, m in module.named_modules()
    }


def test_unfreeze__evaluation_after_fit_leaves_the_module_alone() -> None:
    module = Evaluated()
    callback = GradualUnfreeze([Stage("full", epochs=1), Stage("head", train="head", epochs=1)])
    trainer = quiet_trainer([callback])
    trainer.fit(module, loader(), loader())
    before, weights, kept = state_of(module), weights_of(module), copy.deepcopy(callback.state_dict())
    for run in (trainer.validate, trainer.test):
        run(module, loader(), verbose=False)
    trainer.predict(module, loader())
    assert state_of(module) == before
    assert same_weights(weights, weights_of(module)) == []
    assert callback.state_dict() == kept


def fit_from_start(callback: GradualUnfreeze, **options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module = UserModule(SmallNet())
    quiet_trainer([callback], **options).fit(module, loader(shuffle=True), loader())
    return weights_of(module)


def test_unfreeze__a_second_fit_starts_at_the_first_stage() -> None:
    callback = GradualUnfreeze(HEAD_THEN_ALL)
    first = fit_from_start(callback)
    assert same_weights(first, fit_from_start(callback)) == []


def test_unfreeze__a_fit_after_an_error_starts_at_the_first_stage() -> None:
    plan = [Stage("head", train="head", epochs=1, lr=0.3), Stage("full", epochs=1)]
    for step in (1, 4):  # in the first stage, in the second
        callback = GradualUnfreeze(plan)
        torch.manual_seed(0)
        module = UserModule(SmallNet())
        with pytest.raises(RuntimeError, match="on purpose"):
            quiet_trainer([callback, Raises(step, RuntimeError("on purpose"))]).fit(module, loader())
        assert same_weights(fit_from_start(callback), fit_from_start(GradualUnfreeze(plan))) == []
        # the same module again: what was frozen when it broke trains in its stage
        witness = Witness(modes)
        quiet_trainer([callback, witness]).fit(module, loader())
        assert witness.seen[-1][1]["net.backbone.0.1"]


def test_unfreeze__a_trainer_that_was_stopped_goes_on_inside_its_stage() -> None:
    plan = [Stage("head", train="head", epochs=2, lr=0.3), Stage("full", epochs=1)]
    witness = Witness(lambda trainer, module: trainer.optimizers[0].param_groups[-1]["lr"])
    callback = GradualUnfreeze(plan)
    trainer = quiet_trainer([callback, witness, StopsAfter(0)])
    module = user_module()
    trainer.fit(module, loader())
    assert [event[:3] for event in witness.events] == [("start", "head", 0), ("end", "head", 1)]
    trainer.should_stop = False
    trainer.fit(module, loader())
    assert [name for name, _ in witness.seen] == ["head"] * 6 + ["full"] * 3
    assert {rate for name, rate in witness.seen if name == "head"} == {0.3}
    assert trainer.current_epoch == 3


def test_unfreeze__announces_each_stage_once_at_its_epoch_and_step() -> None:
    witness = Witness()
    plan = [Stage("a", train="head", epochs=2), Stage("b", epochs=1), Stage("c", train=2, epochs=3)]
    trainer = quiet_trainer([witness, GradualUnfreeze(plan)], limit_train_batches=2)
    trainer.fit(user_module(), loader(), loader())
    assert witness.events == [
        ("start", "a", 0, 0),
        ("end", "a", 1, 4),
        ("start", "b", 2, 4),
        ("end", "b", 2, 6),
        ("start", "c", 3, 6),
        ("end", "c", 5, 12),
    ]
    assert trainer.max_epochs == 6


@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_unfreeze__early_stopping_ends_the_run_and_the_stage(at_epoch_end: bool) -> None:
    witness = Witness()
    stopping = EarlyStopping("val_loss", patience=0, min_delta=1e9, check_on_train_epoch_end=at_epoch_end)
    callback = GradualUnfreeze([Stage("a", train="head", epochs=5), Stage("b", epochs=5)])
    trainer = quiet_trainer([stopping, callback, witness])
    trainer.fit(user_module(), loader(), loader())
    assert trainer.current_epoch == 2
    assert [event[:2] for event in witness.events] == [("start", "a"), ("end", "a")]
    # a checkpoint that was written in that epoch goes on inside the stage
    assert callback.state_dict()["index"] == 0


def test_unfreeze__a_stop_that_min_epochs_overrules_ends_no_stage() -> None:
    witness = Witness()
    stopping = EarlyStopping("val_loss", patience=0, min_delta=1e9)
    plan = [Stage("a", train="head", epochs=3), Stage("b", epochs=2)]
    trainer = quiet_trainer([stopping, GradualUnfreeze(plan), witness], min_epochs=5)
    trainer.fit(user_module(), loader(), loader())
    expected = [("start", "a", 0), ("end", "a", 2), ("start", "b", 3), ("end", "b", 4)]
    assert [event[:3] for event in witness.events] == expected


def test_unfreeze__a_player_can_end_a_stage_early() -> None:
    class Impatient(Witness):
        def wants_to_end_stage(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> bool:
            return stage.name != "b"

    witness = Impatient()
    plan = [Stage("a", train="head", epochs=3), Stage("b", epochs=2), Stage("c", epochs=4)]
    trainer = quiet_trainer([GradualUnfreeze(plan), witness])
    trainer.fit(user_module(), loader())
    assert [event[:3] for event in witness.events if event[0] == "start"] == [
        ("start", "a", 0),
        ("start", "b", 1),
        ("start", "c", 3),
    ]
    assert trainer.current_epoch == 4


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"fast_dev_run": True}, 1),
        ({"fast_dev_run": 2}, 2),
        ({"limit_train_batches": 1}, 2),
        ({"limit_train_batches": 0.67}, 4),
        ({"overfit_batches": 1}, 2),
        ({"max_steps": 4}, 4),
        ({"max_epochs": 2}, 6),
        ({"check_val_every_n_epoch": 2}, 6),
        ({"reload_dataloaders_every_n_epochs": 1}, 6),
    ],
)
def test_unfreeze__runs_under_the_trainer_options(options: dict[str, Any], steps: int) -> None:
    witness = Witness()
    trainer = quiet_trainer([GradualUnfreeze(HEAD_THEN_ALL), witness], **options)
    trainer.fit(user_module(), loader(), loader())
    assert trainer.global_step == steps
    starts = [name for event, name, _, _ in witness.events if event == "start"]
    assert starts == [name for event, name, _, _ in witness.events if event == "end"]
    assert starts == (["head"] if "fast_dev_run" in options else ["head", "full"])


def test_unfreeze__takes_an_iterable_dataset() -> None:
    witness = Witness()
    quiet_trainer([GradualUnfreeze(HEAD_THEN_ALL), witness]).fit(user_module(), loader(Stream(random_images(16))))
    assert witness.events[-1] == ("end", "full", 1, 4)


def test_unfreeze__a_compiled_network_trains_as_the_plain_one() -> None:
    torch.manual_seed(0)
    plain = UserModule(torchvision.models.resnet18(num_classes=3))
    compiled = copy.deepcopy(plain)
    compiled.net = torch.compile(compiled.net, backend="eager")
    data = loader(random_images(8, size_px=32), batch_size=4)
    for module in (plain, compiled):
        torch.manual_seed(0)
        quiet_trainer([GradualUnfreeze(HEAD_THEN_ALL)]).fit(module, data)
    inner = {name.replace("._orig_mod", ""): value for name, value in weights_of(compiled).items()}
    assert same_weights(weights_of(plain), inner) == []


# --- what there is to look at ----------------------------------------------------------------------------------------


@pytest.mark.pictures
def test_unfreeze__summary_has_the_best_value_of_the_monitored_metric(tmp_path: Any) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_error", mode="min", save_on_train_epoch_end=False)
    plan = [Stage("head", train="head", epochs=2), Stage("full", epochs=2)]
    trainer = quiet_trainer(
        [GradualUnfreeze(plan), checkpoint], enable_checkpointing=True, limit_val_batches=1, check_val_every_n_epoch=1
    )
    trainer.fit(LogsByEpoch([0.8, 0.5, 0.9, 0.7], "val_error"), loader(), loader())
    with open(tmp_path / "stages.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["stage"], row["epochs"], float(row["best_val_error"])) for row in rows] == [
        ("head", "2", 0.5),
        ("full", "2", pytest.approx(0.7)),
    ]
    assert list(rows[0]) == ["stage", "epochs", "seconds", "best_val_error"]
    assert (tmp_path / "stages.png").stat().st_size > 5_000


def test_unfreeze__summary_survives_a_metric_that_appears_late(tmp_path: Any) -> None:
    trainer = quiet_trainer(
        [GradualUnfreeze(HEAD_THEN_ALL), ModelCheckpoint(tmp_path)],
        enable_checkpointing=True,
        check_val_every_n_epoch=2,
    )
    trainer.fit(LogsByEpoch([0.25]), loader(), loader())
    with open(tmp_path / "stages.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["stage"], row["best_val_loss"]) for row in rows] == [("head", "nan"), ("full", "0.25")]


def test_unfreeze__the_bar_shows_the_stage_and_is_put_back(capsys: Any) -> None:
    seen = []

    def read(trainer: Any, module: pl.LightningModule, *_: Any) -> None:
        seen.append(trainer.progress_bar_callback.get_metrics(trainer, module)["stage"])

    trainer = quiet_trainer([GradualUnfreeze(HEAD_THEN_ALL), Does(on_train_batch_end=read)], enable_progress_bar=True)
    trainer.fit(user_module(), loader())
    assert seen == ["1/2 head"] * 3 + ["2/2 full"] * 3
    assert "get_metrics" not in vars(trainer.progress_bar_callback)


def test_unfreeze__a_strategy_that_shards_is_refused_in_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = quiet_trainer([GradualUnfreeze(HEAD_THEN_ALL)])
    sharded = SimpleNamespace(lightning_module=None)
    monkeypatch.setattr(type(trainer), "strategy", sharded)
    with pytest.raises(NotImplementedError, match=r"SimpleNamespace.*'ddp'"):
        trainer.callbacks[0].setup(trainer, user_module(), "fit")


def test_unfreeze__train_bn_false_keeps_pretrained_statistics_and_trains_their_scale() -> None:
    class WithNormInHead(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 3))

    results = {}
    for train_bn in (True, False):
        torch.manual_seed(0)
        module = UserModule(WithNormInHead())
        start = weights_of(module)
        stages = [Stage("head", train="head", epochs=1), Stage("full", epochs=1)]
        quiet_trainer([GradualUnfreeze(stages, train_bn=train_bn)]).fit(module, loader())
        moved = {name for name, value in weights_of(module).items() if not torch.equal(value, start[name])}
        results[train_bn] = {name.removeprefix("net.") for name in moved if name.startswith("net.")}
    statistics = {f"backbone.{i}.1.{name}" for i in (0, 1) for name in ("running_mean", "running_var")}
    statistics |= {f"backbone.{i}.1.num_batches_tracked" for i in (0, 1)}
    assert results[True] - results[False] == statistics
    assert {"head.1.running_mean", "backbone.0.1.weight", "backbone.0.1.bias"} <= results[False]


@pytest.mark.parametrize(
    ("plan", "options", "optimizer", "trained_before"),
    [
        (Stage("full", lr=1e-3, epochs=1), {}, "adamw", True),
        (Stage("full", lr=9e-3, lr_span=1 / 9, epochs=1), {}, "adamw", True),
        (Stage("full", lr=9e-4, epochs=1), {}, "adamw", True),
        (Stage("full", lr=8e-3, lr_span=1 / 9, epochs=1), {}, "adamw", True),
        (Stage("top", train=1, lr=1e-3, epochs=1), {}, "adamw", True),
        (Stage("full", lr=1e-3, epochs=1), {"train_bn": True}, "adamw", True),
        (Stage("full", lr=1e-3, epochs=1), {}, "sgd", True),
        (Stage("full", lr=1e-3, epochs=1), {}, "adamw", False),
    ],
    ids=["as high", "as high below a span", "lower", "span", "head alone", "statistics train", "SGD", "no statistics"],
)
def test_unfreeze__rates_that_destroy_a_network_beside_frozen_statistics_are_refused(
    request: pytest.FixtureRequest, plan: Stage, options: Any, optimizer: str, trained_before: bool
) -> None:
    torch.manual_seed(0)
    module = UserModule(SmallNet(), optimizer=optimizer)
    if trained_before:
        module.net.backbone(torch.randn(8, 3, 12, 12))  # in train mode: the statistics are of these
    trainer = quiet_trainer([GradualUnfreeze([plan], **{"train_bn": False, **options})])
    if "as high" in request.node.callspec.id:
        with pytest.raises(MisconfigurationException, match=r"AdamW at a rate of 0\.001.*lr_span=1/9 or train_bn=True"):
            trainer.fit(module, loader())
    else:
        trainer.fit(module, loader())
