"""Rates of every optimizer step against hand arithmetic, snapshots, and the rule of "until over-fitting"."""

from __future__ import annotations

import csv
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.data.loaders import EpochSampler, ResumableLoader
from lightning_unfreeze.stages.plan import Stage
from tests.processes import needs_fork
from tests.zoo import Does, Saves, Stream, checkpoint_at, quiet_trainer, same_weights, weights_of

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


OWN_RATIO = 0.01 / 0.03  # of the backbone, in the rates that `Line` gives its optimizer; a stage keeps it


class Line(pl.LightningModule):
    """The smallest module with a backbone and a head; notes what is in force at every optimizer step."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, **options: Any) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.optimizer, self.options = optimizer, options
        self.rates: list[list[float]] = []
        self.momenta: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.backbone(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_nll", nn.functional.nll_loss(torch.log_softmax(self(batch[0]), -1), batch[1]))

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.backbone.parameters(), "lr": 0.01}, {"params": self.head.parameters(), "lr": 0.03}]
        return self.optimizer(groups, **self.options)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        group = optimizer.param_groups[0]
        self.momenta.append(group["betas"][0] if "betas" in group else group["momentum"])


def points(batches: int, seed: int = 0, batch_size: int = 2) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    num = batches * batch_size
    x, y = torch.randn(num, 4, generator=generator), torch.randint(3, (num,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def by_hand(lengths: list[Fraction], total: int) -> list[float]:
    """Half a cosine per cycle; the last one ends with the stage. Lengths and total in optimizer steps."""
    starts = [sum(lengths[:index], Fraction(0)) for index in range(len(lengths))]
    ends = [*starts[1:], Fraction(total)]
    factors = []
    for step in range(total):
        ((start, end),) = [(start, end) for start, end in zip(starts, ends, strict=True) if start <= step < end]
        factors.append(0.5 * (1 + math.cos(math.pi * float((step - start) / (end - start)))))
    return factors


# --- the rates


@pytest.mark.parametrize(
    ("cycle_len", "mult", "num_cycles", "batches", "options", "epoch_steps"),
    [
        pytest.param(0.025, 3, 6, 40, {}, 40, id="mult_3_at_cycle_5"),
        pytest.param(0.025, 10, 4, 40, {"max_steps": 130}, 40, id="mult_10_at_cycle_3"),
        pytest.param(0.5, 1, 5, 3, {}, 3, id="halves"),
        pytest.param(1 / 3, 2, 3, 10, {}, 10, id="thirds"),
        pytest.param(1, 2, 3, 1, {}, 1, id="one_batch_epochs"),
        pytest.param(1, 2, 2, 10, {"accumulate_grad_batches": 3}, 4, id="accumulate_3_of_10"),
        pytest.param(0.5, 1, 4, 10, {"accumulate_grad_batches": 3}, 4, id="accumulate_halves"),
        pytest.param(1, 1, 3, 10, {"limit_train_batches": 0.5}, 5, id="limited"),
        pytest.param(1, 2, 2, 8, {"val_check_interval": 0.25}, 8, id="validating_within"),
        pytest.param(1, 0.5, 2, 8, {}, 8, id="shrinking_cycles"),
    ],
)
def test_restarts__every_step_has_the_rate_of_the_hand_arithmetic(
    cycle_len: float, mult: float, num_cycles: int, batches: int, options: dict[str, Any], epoch_steps: int
) -> None:
    stage = Stage("s", lr=0.1, lr_mult=0.1, cycle_len=cycle_len, cycle_mult=mult, num_cycles=num_cycles)
    module = Line()
    trainer = quiet_trainer([GradualUnfreeze([stage]), CosineRestarts()], **options)
    trainer.fit(module, points(batches), points(1))
    length = Fraction(cycle_len).limit_denominator(1000) * epoch_steps
    lengths = [length * Fraction(mult) ** index for index in range(num_cycles)]
    expected = by_hand(lengths, math.ceil(sum(lengths) / epoch_steps) * epoch_steps)[: options.get("max_steps")]
    for group, peak in enumerate((0.01 * OWN_RATIO, 0.1)):
        rates = [rates[group] for rates in module.rates]
        assert rates == pytest.approx([peak * factor for factor in expected], rel=1e-9, abs=1e-12)
    if cycle_len == 0.025:
        restart = {3: 121, 10: 111}[int(mult)]
        assert module.rates[restart][1] == pytest.approx(0.1, rel=1e-12)


def test_restarts__equal_torchs_scheduler_where_that_is_right() -> None:
    module = Line()
    quiet_trainer([CosineRestarts(cycle_len=1, cycle_mult=2)], max_epochs=7).fit(module, points(4), points(1))
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.03)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=4, T_mult=2)
    expected = []
    for _ in range(28):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [rate for _, rate in module.rates] == pytest.approx(expected, rel=1e-9)
    assert [rate for rate, _ in module.rates] == pytest.approx([rate / 3 for rate in expected], rel=1e-9)


@pytest.mark.parametrize("options", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 12}])
def test_restarts__alone_without_a_length_make_the_fit_one_cycle(options: dict[str, Any]) -> None:
    module = Line()
    trainer = quiet_trainer([CosineRestarts()], **options)
    trainer.fit(module, points(4))
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.0, 0.0]  # the end is no restart
    assert [rate for _, rate in module.rates] == pytest.approx(
        [0.03 * factor for factor in by_hand([Fraction(12)], 12)], rel=1e-9
    )


def test_restarts__each_stage_starts_anew_at_its_peak() -> None:
    plan = [
        Stage("head", train="head", lr=0.2, cycle_len=2),
        Stage("constant", lr=0.05, epochs=1),
        Stage("full", lr=0.1, lr_mult=0.5, cycle_len=1, num_cycles=2),
    ]
    module = Line()
    quiet_trainer([CosineRestarts(), GradualUnfreeze(plan)]).fit(module, points(3))
    head = [0.2 * factor for factor in by_hand([Fraction(6)], 6)] + [0.05] * 3
    head += [0.1 * factor for factor in by_hand([Fraction(3)] * 2, 6)]
    assert [rate for _, rate in module.rates] == pytest.approx(head)
    assert [rate for rate, _ in module.rates] == pytest.approx(
        [0.0] * 6 + [0.05 * OWN_RATIO] * 3 + [rate / 2 * OWN_RATIO for rate in head[9:]]
    )


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"floor": 0.2}, lambda t, i: 0.2 + 0.8 * (1 + math.cos(math.pi * t / 8)) / 2),
        ({"decay": 0.5}, lambda t, i: 0.5**i * (1 + math.cos(math.pi * t / 8)) / 2),
        ({"warmup": 0.25}, lambda t, i: t / 2 if t < 2 else (1 + math.cos(math.pi * (t - 2) / 6)) / 2),
        (
            {"first_steps_warmup": True},
            lambda t, i: 0.01 if i == 0 and t * 20 < 8 else (1 + math.cos(math.pi * t / 8)) / 2,
        ),
        # ULMFiT, eq. 3 with T=8, cut=int(8 * 0.1)=0: a fall from the peak to 1/32
        ({"shape": "slanted_triangle"}, lambda t, i: (1 + (1 - t / 8) * 31) / 32),
        (
            {"shape": "one_cycle"},
            lambda t, i: (
                1 / 25 + (24 / 25) * (1 - math.cos(math.pi * t / 2)) / 2
                if t < 2
                else 1e-5 + (1 - 1e-5) * (1 + math.cos(math.pi * (t - 2) / 6)) / 2
            ),
        ),
    ],
)
def test_restarts__shapes_follow_their_formulas_in_every_cycle(options: dict[str, Any], factor: Any) -> None:
    module = Line()
    plan = [Stage("s", lr=0.1, lr_mult=0.5, cycle_len=2, num_cycles=2)]
    quiet_trainer([GradualUnfreeze(plan), CosineRestarts(**options)]).fit(module, points(4))
    expected = [0.1 * factor(step % 8, step // 8) for step in range(16)]
    assert [rate for _, rate in module.rates] == pytest.approx(expected)
    assert [rate for rate, _ in module.rates] == pytest.approx([rate / 2 * OWN_RATIO for rate in expected])


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.1), (4, 0.1), (4, 0.25)])
def test_restarts__a_warmup_within_one_step_takes_none_from_the_cycle(steps: int, warmup: float) -> None:
    module = Line()
    plan = [Stage("s", lr=0.1, cycle_len=1, num_cycles=2)]
    quiet_trainer([GradualUnfreeze(plan), CosineRestarts(warmup=warmup)]).fit(module, points(steps))
    assert [rate for _, rate in module.rates] == pytest.approx(
        [0.1 * f for f in by_hand([Fraction(steps)] * 2, 2 * steps)]
    )


@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("steps", [4, 5, 6, 7, 8, 10])
def test_restarts__without_validation_a_resumed_run_has_the_rates_of_the_unbroken_one(
    steps: int, tmp_path: Path
) -> None:
    def save(trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == steps:
            trainer.save_checkpoint(tmp_path / "some.ckpt")

    def rates(*callbacks: Callback, ckpt: Path | None = None) -> list[float]:
        module = Line()
        plan = [Stage("a", lr=0.2, epochs=1), Stage("b", lr=0.1, cycle_len=1.5, num_cycles=2)]
        trainer = quiet_trainer([GradualUnfreeze(plan), CosineRestarts(warmup=0.4), *callbacks])
        trainer.fit(module, points(4), ckpt_path=ckpt)
        return [rate for _, rate in module.rates]

    whole = rates(Does(on_train_batch_end=save))
    assert rates(ckpt=tmp_path / "some.ckpt") == whole[steps:]


def test_restarts__a_group_added_late_is_scheduled_from_its_own_rate() -> None:
    def grow(trainer: pl.Trainer, _: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.optimizers[0].add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5})

    module = Line()
    quiet_trainer([CosineRestarts(), Does(on_train_epoch_start=grow)], max_epochs=2).fit(module, points(4))
    expected = by_hand([Fraction(8)], 8)
    assert [len(rates) for rates in module.rates] == [2] * 4 + [3] * 4
    assert [rates[2] for rates in module.rates[4:]] == pytest.approx([0.5 * factor for factor in expected[4:]])


@pytest.mark.parametrize(("optimizer", "given"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})])
def test_restarts__momentum_is_low_where_the_rate_is_high(optimizer: Any, given: dict[str, Any]) -> None:
    module = Line(optimizer, **given)
    trainer = quiet_trainer([CosineRestarts(momentum=(0.85, 0.95))], max_epochs=2)
    trainer.fit(module, points(4))
    assert module.momenta == pytest.approx([0.95 - 0.1 * factor for factor in by_hand([Fraction(8)], 8)])
    if optimizer is torch.optim.AdamW:
        assert trainer.optimizers[0].param_groups[0]["betas"][1] == 0.999


@pytest.mark.parametrize("before", [True, False])
def test_restarts__learning_rate_monitor_logs_the_rates_in_force(tmp_path: Path, before: bool) -> None:
    module, monitor = Line(), LearningRateMonitor("step")
    plan = [Stage("a", lr=0.1, cycle_len=1), Stage("b", lr=0.2, lr_mult=0.1, cycle_len=1)]
    ours = [GradualUnfreeze(plan), CosineRestarts()]
    callbacks = [monitor, *ours] if before else [*ours, monitor]
    trainer = quiet_trainer(callbacks, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(module, points(4))
    (table,) = tmp_path.rglob("metrics.csv")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    (column,) = [name for name in rows[0] if name.startswith("lr-SGD") and "head" in name]
    logged = [float(row[column]) for row in rows if row[column]]
    assert logged == pytest.approx([rate for _, rate in module.rates])
    progress = [(float(row["cycle"]), float(row["cycle_progress"])) for row in rows if row["cycle"]]
    assert progress == [(0, 0.25), (0, 0.5), (0, 0.75), (0, 1)] * 2


def test_restarts__a_logger_that_is_never_due_is_no_error(tmp_path: Path) -> None:
    module = Line(lr=0.1)
    quiet_trainer([CosineRestarts()], max_epochs=1, logger=CSVLogger(tmp_path), log_every_n_steps=0).fit(
        module, points(4)
    )
    assert not [row for file in tmp_path.rglob("metrics.csv") for row in csv.DictReader(file.read_text().splitlines())]


# --- snapshots


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_snapshots__are_the_weights_after_the_last_step_of_each_cycle_and_test_averages_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Line()
    weights: list[dict[str, Tensor]] = []

    def keep(trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step > len(weights):
            weights.append(weights_of(module))

    plan = [
        Stage("a", lr=0.5, cycle_len=0.5, num_cycles=2),
        Stage("b", lr=0.5, cycle_len=2 / 3, cycle_mult=2, num_cycles=2),
    ]
    restarts = CosineRestarts(snapshots=True, ensemble=True)
    trainer = quiet_trainer(
        [Does(on_train_batch_end=keep), GradualUnfreeze(plan), restarts],
        enable_checkpointing=True,
        default_root_dir=tmp_path,
        accumulate_grad_batches=2,
    )
    trainer.fit(module, points(20))  # 10 steps an epoch
    names = ["a-cycle1", "a-cycle2", "b-cycle1", "b-cycle2"]
    assert [path.stem for path in restarts.snapshots] == names
    # cycles of 5 and 5 steps; of 6.67 and 13.33 steps, so the first ends with its 7th
    for path, step in zip(restarts.snapshots, (5, 10, 17, 30), strict=True):
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert same_weights(saved, weights[step - 1]) == []

    test_data = points(3, seed=7)
    (result,) = trainer.test(module, test_data, verbose=False)
    x, y = test_data.dataset.tensors  # type: ignore[attr-defined]
    probs = []
    with torch.no_grad():
        for path in restarts.snapshots:
            twin = Line()
            twin.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
            probs.append(torch.softmax(twin(x), -1))
        mean = torch.stack(probs).mean(0)
    assert result["test_nll"] == pytest.approx(float(-mean[range(len(y)), y].log().mean()), rel=1e-5)
    assert "forward" not in vars(module)
    alone = nn.functional.cross_entropy(module(x), y).item()
    assert abs(alone - result["test_nll"]) > 1e-6

    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    later = quiet_trainer([GradualUnfreeze(plan), CosineRestarts(snapshots=True, ensemble=True)])
    assert later.test(Line(), test_data, ckpt_path=path, verbose=False) == [result]
    restarts.snapshots[1].unlink()
    with pytest.raises(MisconfigurationException, match=r"missing: .*a-cycle2\.ckpt"):
        trainer.test(module, test_data, verbose=False)


def test_ensemble__says_where_it_cannot_average(tmp_path: Path) -> None:
    class Around(Line):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.head(torch.tanh(self.backbone(batch[0])))

    trainer = quiet_trainer(
        [CosineRestarts(snapshots=True, ensemble=True)],
        max_epochs=1,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
    )
    module = Around()
    with pytest.raises(MisconfigurationException, match="there are none"):
        trainer.test(module, points(1), verbose=False)
    trainer.fit(module.train(), points(2))
    with pytest.raises(MisconfigurationException, match="never called self"):
        trainer.test(module, points(1), verbose=False)
    assert "forward" not in vars(module)


# --- until over-fitting


class Script(Line):
    """Logs a scripted validation value per epoch; trains as ever."""

    def __init__(self, values: list[float], name: str = "val_loss") -> None:
        super().__init__()
        self.values, self.name = values, name

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log(self.name, self.values[min(self.current_epoch, len(self.values) - 1)])


class EveryEpoch(Callback):
    """Weights and the validation value at the end of every epoch, before a stage callback acts."""

    def __init__(self, name: str = "val_loss") -> None:
        self.name = name
        self.weights: list[dict[str, Tensor]] = []
        self.values: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights.append(weights_of(pl_module))
        self.values.append(float(trainer.callback_metrics[self.name]))


def the_rule(values: list[float], cycle_epochs: list[int], min_delta: float = 0.0) -> tuple[int, int]:
    """Epochs that are trained, and the epoch (from 1) whose weights stay; `values` are per epoch, less is better."""
    ends = [sum(cycle_epochs[: index + 1]) for index in range(len(cycle_epochs))]
    kept = ends[0]
    for end in ends[1:]:
        if end > len(values):
            break
        improved = values[kept - 1] - values[end - 1]
        if improved > 0:
            kept = end
        if improved <= min_delta:
            return end, kept
    return ends[-1], kept


@pytest.mark.parametrize(
    ("values", "mult", "num_cycles", "options", "epochs", "kept"),
    [
        ([3, 2, 1, 4], 1, 6, {}, 4, 3),
        ([1, 2], 1, 6, {}, 2, 1),  # two cycles at least
        ([3, 9, 2, 9, 9, 9, 2.5], 2, 4, {}, 7, 3),  # what lies inside a cycle is not looked at
        ([3, 9, 2, 9, 9, 9, 1], 2, 3, {}, 7, 7),  # the cap
        ([3, 3], 1, 6, {}, 2, 1),
        ([3, 2.5, 2.4], 1, 6, {"min_delta": 0.2}, 3, 3),  # too small a gain ends it, but is a gain
        ([3, math.nan], 1, 6, {}, 2, 1),
        ([0.3, 0.5, 0.4], 1, 6, {"monitor": "val_acc"}, 3, 2),
        ([0.3, 0.5, 0.6], 1, 6, {"monitor": "nll", "mode": "min"}, 2, 1),
    ],
)
def test_until__stops_by_the_rule_and_keeps_the_best_cycle_end(
    values: list[float], mult: int, num_cycles: int, options: dict[str, Any], epochs: int, kept: int
) -> None:
    name = options.get("monitor", "val_loss")
    module, every = Script(values, name), EveryEpoch(name)
    plan = [
        Stage("full", lr=0.1, cycle_len=1, cycle_mult=mult, num_cycles=num_cycles, until="overfit"),
        Stage("after", lr=1e-30, epochs=1),
    ]
    restarts = CosineRestarts(**options)
    quiet_trainer([every, GradualUnfreeze(plan), restarts]).fit(module, points(3), points(1))
    assert len(every.weights) == epochs + 1
    ends = [epoch for epoch in (1, 2, 3, 4, 5, 6, 7) if mult == 1 or epoch in (1, 3, 7)]
    logged = [float(torch.tensor(values[end - 1])) for end in ends if end <= epochs]
    assert restarts.cycle_values["full"] == pytest.approx(logged, nan_ok=True)
    # the next stage goes on from the best cycle end, and hardly moves it
    for key, value in every.weights[-1].items():
        assert torch.equal(value, every.weights[kept - 1][key]), key


def test_until__and_the_rates_go_on_in_the_next_fit_of_a_trainer() -> None:
    """Stopped after an epoch, then `fit` again: as one fit, but that its judge begins anew."""

    def fitted(stop_after: int) -> tuple[Script, int]:
        def stop(trainer: pl.Trainer, module: pl.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch + 1 == stop_after

        module = Script([3, 2, 1, 1, 9])
        plan = [Stage("full", lr=0.1, cycle_len=1, num_cycles=6, until="overfit")]
        trainer = quiet_trainer([GradualUnfreeze(plan), CosineRestarts(), Does(on_train_epoch_end=stop)])
        trainer.fit(module, points(3), points(1))
        if stop_after:
            assert trainer.current_epoch == stop_after
            trainer.fit(module, points(3), points(1))
        return module, trainer.current_epoch

    whole, parts = fitted(0), fitted(1)
    assert whole[1] == parts[1] == 4
    assert parts[0].rates == whole[0].rates


@pytest.mark.parametrize("overfits", [True, False])
def test_until__on_data_that_overfits_and_on_data_that_does_not(overfits: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 4, generator=generator) * 2

    def draw(num: int, noise: float) -> TensorDataset:
        targets = torch.randint(3, (num,), generator=generator)
        x = centres[targets] + torch.randn(num, 4, generator=generator)
        flip = torch.rand(num, generator=generator) < noise
        return TensorDataset(x, torch.where(flip, torch.randint(3, (num,), generator=generator), targets))

    class Wide(Line):
        def __init__(self) -> None:
            super().__init__(torch.optim.AdamW)
            self.backbone, self.head = nn.Linear(4, 64), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.backbone(x)))

    torch.manual_seed(0)
    train = draw(50, 0.4) if overfits else draw(600, 0.0)
    module, every, restarts = Wide(), EveryEpoch(), CosineRestarts()
    lr, cycles = (0.03, [1, 2, 4, 8, 16]) if overfits else (0.001, [1, 2, 4])
    plan = [Stage("full", lr=lr, cycle_len=1, cycle_mult=2, num_cycles=len(cycles), until="overfit")]
    trainer = quiet_trainer([every, GradualUnfreeze(plan), restarts])
    trainer.fit(module, DataLoader(train, 10, shuffle=True), DataLoader(draw(300, 0.0), 300))
    epochs, kept = the_rule(every.values, cycles)
    assert len(every.values) == epochs
    assert (epochs < sum(cycles)) == overfits
    assert (kept < epochs) == overfits
    assert same_weights(weights_of(module), every.weights[kept - 1]) == []


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize(
    "at", [("validation_end", 2, None), ("epoch_end", 1, None), ("epoch_end", 2, None), ("batch_end", 4, 1)]
)
def test_until__a_run_resumed_inside_such_a_stage_is_bitwise_the_same(tmp_path: Path, at: tuple[str, int, Any]) -> None:
    values = [3.0, 9.0, 2.0, 9.0, 9.0, 9.0, 2.5]  # cycles 1, 2, 4: ends after the third, the second's weights stay

    def run(ckpt_path: Path | None) -> tuple[Any, Any]:
        torch.manual_seed(0 if ckpt_path is None else 9)
        module, restarts = Script(values), CosineRestarts()
        plan = [
            Stage("full", lr=0.1, cycle_len=1, cycle_mult=2, num_cycles=5, until="overfit"),
            Stage("after", lr=0.01, epochs=1),
        ]
        callbacks = [GradualUnfreeze(plan), restarts, *([Saves(tmp_path, at)] if ckpt_path is None else [])]
        data = points(3).dataset
        train = ResumableLoader(data, batch_size=2, sampler=EpochSampler(data))
        quiet_trainer(callbacks).fit(module, train, points(1), ckpt_path=ckpt_path)
        return weights_of(module), restarts.cycle_values

    whole, told = run(None)
    resumed, told_again = run(checkpoint_at(tmp_path, *at))
    assert told == told_again == {"full": [3.0, 2.0, 2.5]}
    assert same_weights(whole, resumed) == []


class KeepsAll(Callback):
    """What was in force at each validation: weights, moments, and the value of each."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.moments: list[dict[str, dict[str, Tensor]]] = []
        self.at_start: list[dict[str, dict[str, Tensor]]] = []

    def moments_of(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, dict[str, Tensor]]:
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        states = trainer.optimizers[0].state.items()
        return {names[key]: {k: v.clone() for k, v in state.items()} for key, state in states}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights.append(weights_of(pl_module))
        self.moments.append(self.moments_of(trainer, pl_module))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.at_start.append(self.moments_of(trainer, pl_module))


def same_moments(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name][key], right[name][key]) for name in left for key in left[name]
    )


def test_until__the_optimizer_goes_back_with_the_weights() -> None:
    class Adam(Script):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    module, keeps = Adam([0.5, 0.4, 0.6, 0.6]), KeepsAll()
    plan = [Stage("a", lr=0.1, cycle_len=1, num_cycles=5, until="overfit"), Stage("b", lr=0.01, epochs=1)]
    quiet_trainer([GradualUnfreeze(plan), CosineRestarts(), keeps]).fit(module, points(3), points(1))
    assert same_moments(keeps.at_start[3], keeps.moments[1])
    assert not same_moments(keeps.at_start[3], keeps.moments[2])
    steps = {float(state["step"]) for state in keeps.at_start[3].values()}
    assert steps == {6.0}


def test_until__the_last_checkpoint_of_every_few_steps_holds_what_the_fit_leaves(tmp_path: Path) -> None:
    """It is written at the last step, before the validation that sends the weights back."""
    module, keeps = Script([0.5, 0.4, 0.6, 0.7]), KeepsAll()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, save_last=True)
    plan = [Stage("full", lr=0.1, cycle_len=1, num_cycles=4, until="overfit")]
    trainer = quiet_trainer([GradualUnfreeze(plan), CosineRestarts(), keeps, saver], enable_checkpointing=True)
    trainer.fit(module, points(3), points(1))
    assert trainer.global_step == 9
    last = torch.load(saver.last_model_path, weights_only=True)["state_dict"]
    assert same_weights(last, keeps.weights[1]) == same_weights(weights_of(module), keeps.weights[1]) == []


@pytest.mark.parametrize("monitor", [None, "val_loss", "val_acc", "train_loss"])
@pytest.mark.parametrize("on_train_epoch_end", [None, True, False])
@pytest.mark.parametrize("val_check_interval", [1.0, 0.5])
@pytest.mark.filterwarnings("ignore:.*will be ignored", "ignore:Checkpoint directory")
def test_until__a_checkpoint_holds_the_weights_that_its_score_belongs_to(
    tmp_path: Path, monitor: str | None, on_train_epoch_end: bool | None, val_check_interval: float
) -> None:
    """Accuracy and training loss get better where the validation loss over-fits."""
    if monitor == "train_loss" and (on_train_epoch_end is False or val_check_interval < 1):
        pytest.skip("at a validation there is no training loss of the epoch yet: Lightning refuses it itself")
    per_epoch = int(1 / val_check_interval)
    losses, accuracies = [0.5, 0.4, 0.6, 0.7], [0.7, 0.8, 0.9, 0.95]

    class Both(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("train_loss", 1.0 - 0.1 * self.current_epoch, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            worse = 0.0 if self.trainer.is_last_batch else 0.05  # inside an epoch
            epoch = self.current_epoch
            self.log_dict({"val_loss": losses[epoch] + worse, "val_acc": accuracies[epoch] - worse})

    module, keeps = Both(), KeepsAll()
    saver = ModelCheckpoint(
        tmp_path,
        monitor=monitor,
        mode="max" if monitor == "val_acc" else "min",
        save_last=True,
        save_on_train_epoch_end=on_train_epoch_end,
    )
    plan = [Stage("full", lr=0.1, cycle_len=1, num_cycles=4, until="overfit")]
    trainer = quiet_trainer(
        [GradualUnfreeze(plan), CosineRestarts(), keeps, saver],
        enable_checkpointing=True,
        val_check_interval=val_check_interval,
    )
    trainer.fit(module, points(4), points(1))
    ends = keeps.weights[per_epoch - 1 :: per_epoch]  # of the three epochs
    assert len(ends) == 3
    assert same_weights(weights_of(module), ends[1]) == []
    last = torch.load(saver.last_model_path, weights_only=True)["state_dict"]
    assert same_weights(last, ends[1]) == [], "the last checkpoint holds the network that the fit leaves behind"
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(0.4)
    assert float(trainer.callback_metrics["val_acc"]) == pytest.approx(0.8)
    best = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    belongs, score = ends[1], {"val_loss": 0.4, "val_acc": 0.8, "train_loss": 0.9, None: None}[monitor]
    if monitor == "val_acc":  # its best is what the fit goes back from
        belongs, score = ends[2], 0.9
    assert same_weights(best, belongs) == []
    if score is not None:
        assert float(saver.best_model_score) == pytest.approx(score)  # type: ignore[arg-type]


@pytest.mark.parametrize("on_train_epoch_end", [None, False])
@pytest.mark.parametrize("until", ["overfit", "plateau"])
@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")
def test_until__a_run_goes_on_from_the_checkpoint_of_weights_that_it_left(
    tmp_path: Path, until: Any, on_train_epoch_end: bool | None
) -> None:
    """The accuracy of the third epoch is the best, and its loss is not: its weights are saved, then left."""

    class Both(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            epoch = self.current_epoch
            self.log_dict({"val_loss": [0.5, 0.4, 0.6, 0.7][epoch], "val_acc": [0.7, 0.8, 0.9, 0.1][epoch]})

    options: dict[str, Any] = (
        {"cycle_len": 1, "num_cycles": 4} if until == "overfit" else {"epochs": 4, "patience_epochs": 1}
    )
    plan = [Stage("a", lr=0.1, until=until, **options), Stage("b", lr=0.01, epochs=1)]

    def run(folder: str, ckpt: str | None = None) -> tuple[Both, ModelCheckpoint, KeepsAll]:
        module, keeps = Both(), KeepsAll()
        saver = ModelCheckpoint(
            tmp_path / folder, monitor="val_acc", mode="max", save_on_train_epoch_end=on_train_epoch_end
        )
        trainer = quiet_trainer([GradualUnfreeze(plan), CosineRestarts(), keeps, saver], enable_checkpointing=True)
        trainer.fit(module, points(4), points(1), ckpt_path=ckpt)
        return module, saver, keeps

    whole, saver, keeps = run("whole")
    assert float(saver.best_model_score) == pytest.approx(0.9)  # type: ignore[arg-type]
    saved = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    assert same_weights(saved, keeps.weights[2]) == []
    again, _, _ = run("again", saver.best_model_path)
    assert same_weights(weights_of(whole), weights_of(again)) == []
    assert same_weights(weights_of(again), keeps.weights[2]) != []


def test_until__a_stage_that_made_nothing_better_gives_back_what_it_started_from(caplog: Any) -> None:
    module, keeps = Script([0.5, 0.9, 0.8, 0.85]), KeepsAll()
    plan = [
        Stage("head", train="head", lr=0.1, epochs=1),
        Stage("full", lr=0.1, cycle_len=1, num_cycles=4, until="overfit"),
    ]
    restarts = CosineRestarts()
    trainer = quiet_trainer([GradualUnfreeze(plan), restarts, keeps])
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        trainer.fit(module, points(3), points(1))
    assert restarts.cycle_values == {"full": pytest.approx([0.9, 0.8, 0.85])}
    assert trainer.current_epoch == 4, "what it started from is no cycle end: it does not end the stage"
    assert same_weights(weights_of(module), keeps.weights[0]) == []
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(0.5)
    assert "the model that it started from" in caplog.text


@pytest.mark.parametrize(
    ("values", "patience_epochs", "min_delta", "epochs", "kept"),
    [
        ([3, 2, 2.5, 2.5, 2.5, 2.5], 2, 0.0, 4, 2),
        ([3, 2, 2.5, 1, 2.5, 2.5, 2.5, 2.5], 2, 0.0, 6, 4),
        ([3, 2.95, 2.9, 2.85, 2.8], 2, 0.2, 3, 3),  # gains too small to count, and the best is the last all the same
        ([3, 2.9, 2.75, 2.7, 2.69], 2, 0.2, 5, 5),  # small ones that add up
        ([5, 4, 3, 2, 1, 0.5, 0.4, 0.3], 3, 0.0, 8, 8),
        ([math.nan, math.nan, math.nan, 1], 3, 0.0, 3, 1),
    ],
)
def test_until_plateau__is_patience_and_goes_back(
    values: list[float], patience_epochs: int, min_delta: float, epochs: int, kept: int
) -> None:
    module, keeps = Script(values), KeepsAll()
    plan = [Stage("full", lr=0.1, epochs=8, until="plateau", patience_epochs=patience_epochs)]
    trainer = quiet_trainer([GradualUnfreeze(plan), CosineRestarts(min_delta=min_delta), keeps])
    trainer.fit(module, points(3), points(1))
    assert trainer.current_epoch == epochs
    assert same_weights(weights_of(module), keeps.weights[kept - 1]) == []


def test_until_plateau__judges_every_validation_and_needs_none_at_the_epochs_end() -> None:
    class ByStep(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            # three of four batches: the last quarter of an epoch is not validated
            self.log("val/loss", {3: 1.0, 7: 0.5}.get(self.global_step, 2.0))

    module, keeps = ByStep(), KeepsAll()
    plan = [Stage("full", lr=0.1, epochs=9, until="plateau", patience_epochs=2)]
    trainer = quiet_trainer([GradualUnfreeze(plan), CosineRestarts(), keeps], val_check_interval=3)
    trainer.fit(module, points(4), points(1))
    assert trainer.current_epoch == 4
    assert same_weights(weights_of(module), keeps.weights[1]) == []


def test_until__parts_that_the_state_dict_leaves_out_go_back_too() -> None:
    class Partial(Script):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "head" in name}

    module = Partial([0.5, 0.9])
    seen: list[dict[str, Tensor]] = []

    def look(_: pl.Trainer, module: pl.LightningModule) -> None:
        seen.append({name: value.detach().clone() for name, value in module.named_parameters()})

    plan = [Stage("full", lr=0.1, cycle_len=1, num_cycles=3, until="overfit")]
    quiet_trainer([GradualUnfreeze(plan), CosineRestarts(), Does(on_validation_end=look)]).fit(
        module, points(3), points(1)
    )
    assert not torch.equal(seen[0]["backbone.weight"], seen[1]["backbone.weight"])
    for name, value in module.named_parameters():
        assert torch.equal(value, seen[0][name]), name


# --- epochs that are not all alike


class SkipsBatch(Script):
    def __init__(self, values: list[float], skipped: int) -> None:
        super().__init__(values)
        self.skipped = skipped

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if self.current_epoch == 0 and batch_idx == self.skipped else None


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["none", "minus one"])
def test_restarts__a_skipped_step_moves_no_later_cycle(accumulate: int, kind: str) -> None:
    values = [1.0, 0.5, 0.9, 0.9]
    data = points(6).dataset

    def some(rows: list[Any]) -> Any:
        x, y = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
        return None if torch.equal(x[0], data[4][0]) else (x, y)

    module = SkipsBatch(values, skipped=2) if kind == "minus one" else Script(values)
    train = DataLoader(data, 2, collate_fn=some if kind == "none" else None)
    plan = [Stage("full", lr=0.1, cycle_len=1, num_cycles=4, until="overfit")]
    trainer = quiet_trainer([GradualUnfreeze(plan), CosineRestarts()], accumulate_grad_batches=accumulate)
    if kind == "minus one":
        # Lightning does not validate an epoch that is cut short, so its cycle end cannot be judged
        with pytest.warns(UserWarning, match="cycle end after 1 epochs was not validated"):
            trainer.fit(module, train, points(1))
    else:
        with pytest.warns(UserWarning, match="yielded None"):
            trainer.fit(module, train, points(1))
    assert trainer.current_epoch == 3
    per_epoch = 6 // accumulate
    whole = by_hand([Fraction(per_epoch)], per_epoch)
    last = [rate for _, rate in module.rates][-whole.__len__() :] if kind == "minus one" else None
    if last is not None:
        assert last == pytest.approx([0.1 * factor for factor in whole])


def test_restarts__a_loader_that_grows_begins_each_cycle_at_its_peak() -> None:
    class Grows(Script):
        def train_dataloader(self) -> Any:
            return points(2 + self.trainer.current_epoch)

        def val_dataloader(self) -> Any:
            return points(1)

    module = Grows([1.0, 0.5, 0.9])
    plan = [Stage("full", lr=0.1, cycle_len=1, num_cycles=5, until="overfit")]
    trainer = quiet_trainer([GradualUnfreeze(plan), CosineRestarts()], reload_dataloaders_every_n_epochs=1)
    trainer.fit(module)
    assert trainer.current_epoch == 3
    expected = [0.1 * factor for batches in (2, 3, 4) for factor in by_hand([Fraction(batches)], batches)]
    assert [rate for _, rate in module.rates] == pytest.approx(expected)


# --- what `until` is judged by


@pytest.mark.parametrize(
    ("logged", "attributes", "epochs"),
    [
        ("val/loss", {}, 2),
        ("validation_loss", {}, 2),
        ("eval_loss", {}, 2),
        ("dev.loss", {}, 2),
        ("val_score", {"monitor": "val_score", "mode": "min"}, 2),
        ("val_acc", {"monitor": "val_acc"}, 3),
        ("valid/acc", {}, 3),
    ],
)
def test_until__finds_the_value_under_the_name_that_the_module_logs(
    logged: str, attributes: dict[str, str], epochs: int
) -> None:
    module = Script([0.5, 0.6, 0.6], logged)
    for name, value in attributes.items():
        setattr(module, name, value)
    plan = [Stage("full", lr=0.1, cycle_len=1, num_cycles=4, until="overfit")]
    trainer = quiet_trainer([GradualUnfreeze(plan), CosineRestarts()], num_sanity_val_steps=1)
    trainer.fit(module, points(3), points(1))
    assert trainer.current_epoch == epochs


@pytest.mark.parametrize(
    ("logged", "options", "trainer_options", "message"),
    [
        (
            "val/loss",
            {"monitor": "val_loss"},
            {},
            r"'val_loss', which validation did not log; logged are \['val/loss'\]",
        ),
        ("score", {}, {}, r"the validation loss.*logged are \['score'\]"),
        ("val_loss", {}, {"barebones": True}, "barebones"),
        ("val_loss", {}, {"limit_val_batches": 0}, "there is none"),
        ("val_loss", {}, {"check_val_every_n_epoch": 2}, "check_val_every_n_epoch=2"),
        ("val_loss", {}, {"val_check_interval": 2}, "every 2 of 3 batches"),
    ],
)
def test_until__what_is_missing_is_said_before_training(
    logged: str, options: dict[str, Any], trainer_options: dict[str, Any], message: str
) -> None:
    module = Script([0.5] * 9, logged)
    plan = [Stage("head", train="head", epochs=2), Stage("full", cycle_len=1, num_cycles=3, until="overfit")]
    callbacks = [GradualUnfreeze(plan), CosineRestarts(**options)]
    if trainer_options.get("barebones"):
        trainer = pl.Trainer(barebones=True, accelerator="cpu", callbacks=callbacks, max_epochs=-1)
    else:
        trainer = quiet_trainer(callbacks, num_sanity_val_steps=1, **trainer_options)
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(module, points(3), points(1))
    assert trainer.global_step == 0


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "square"}, "shape='square'"),
        ({"shape": "one_cycle", "floor": 0.1}, "has its own"),
        ({"mode": "up"}, "mode='up'"),
        ({"monitor": "val_score"}, "set mode='min' or 'max'"),
        ({"min_delta": -1.0}, "min_delta=-1.0"),
        ({"momentum": (0.9, 0.8)}, "low <= high"),
        ({"ensemble": True}, "set snapshots=True"),
        ({"cycle_len": 0.0}, "cycle_len=0.0"),
        ({"cycle_mult": 0}, "cycle_mult=0"),
        ({"floor": 2.0}, "floor=2.0"),
        ({"decay": 0.0}, "decay=0.0"),
        ({"warmup": 1.0}, "warmup=1.0"),
    ],
)
def test_restarts__refuses_impossible_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CosineRestarts(**options)


class Scheduled(Line):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class NoMomentum(Line):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adagrad(self.parameters())


@pytest.mark.parametrize(
    ("callbacks", "module", "options", "message"),
    [
        ([CosineRestarts()], Scheduled(), {}, "scheduler StepLR"),
        ([CosineRestarts(), StochasticWeightAveraging(1e-2)], Line(), {}, "StochasticWeightAveraging and"),
        ([CosineRestarts(), LearningRateFinder()], Line(), {}, "LearningRateFinder and"),
        ([CosineRestarts(), GradientAccumulationScheduler({0: 2})], Line(), {}, "GradientAccumulationScheduler"),
        ([CosineRestarts(momentum=(0.8, 0.9))], NoMomentum(), {}, "Adagrad has neither"),
        ([CosineRestarts(snapshots=True)], Line(), {}, "neither checkpoints nor a logger"),
        ([CosineRestarts()], Line(), {"max_epochs": -1}, "has no end"),
    ],
)
def test_restarts__refuses_what_clashes_with_it(
    callbacks: list[Callback], module: Line, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(callbacks, **{"max_epochs": 2, **options}).fit(module, points(2), points(1))


def test_restarts__refuses_cycles_over_data_without_a_length() -> None:
    data = DataLoader(Stream([(torch.zeros(4), torch.tensor(0))] * 4), batch_size=2)
    with pytest.raises(MisconfigurationException, match="limit_train_batches"):
        quiet_trainer([CosineRestarts(cycle_len=1)], max_epochs=2).fit(Line(), data)
    with pytest.raises(ValueError, match="end before 2"):
        quiet_trainer([CosineRestarts(cycle_len=1, cycle_mult=0.5)], max_epochs=2).fit(Line(), points(4))
    constant = Line()
    quiet_trainer([GradualUnfreeze([Stage("s", lr=0.1, epochs=1)]), CosineRestarts()]).fit(constant, data)
    assert constant.rates == [pytest.approx([0.1 * OWN_RATIO, 0.1])] * 2


@pytest.mark.parametrize(
    ("monitor", "options", "message"),
    [
        ("val_acc", {}, r"'val_acc', which validation did not log; logged are \['val_loss'\]"),
        ("val_loss", {"limit_val_batches": 0}, "there is none: give validation data"),
        ("val_loss", {"check_val_every_n_epoch": 2}, "check_val_every_n_epoch=2"),
        ("val_loss", {"val_check_interval": 0.4}, "validates every 4 of 10 batches"),
    ],
)
def test_until__needs_its_value_at_every_cycle_end(monitor: str, options: dict[str, Any], message: str) -> None:
    plan = [Stage("full", cycle_len=1, num_cycles=3, until="overfit")]
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer([GradualUnfreeze(plan), CosineRestarts(monitor=monitor)], **options).fit(
            Line(), points(10), points(1)
        )


# --- several processes


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")  # Lightning, about processes and loaders
@needs_fork
def test_until__ranks_decide_as_one_though_they_log_different_values(tmp_path: Path) -> None:
    class Differ(Line):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            # rank 0 alone would stop after the second cycle, rank 1 never; their mean after the third
            mine = [3.0, 3.5, 4.0, 5.0] if self.global_rank == 0 else [3.0, 2.0, 1.9, 1.8]
            self.log("val_loss", mine[self.current_epoch], sync_dist=False)

    def report(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        torch.save(weights_of(module), tmp_path / f"{trainer.global_rank}.pt")
        (restarts,) = [callback for callback in trainer.callbacks if isinstance(callback, CosineRestarts)]
        said = {"epochs": trainer.current_epoch, "values": restarts.cycle_values}
        said["shots"] = [str(path) for path in restarts.snapshots]
        (tmp_path / f"{trainer.global_rank}.json").write_text(json.dumps(said))

    torch.manual_seed(0)
    plan = [Stage("full", lr=0.1, cycle_len=1, num_cycles=4, until="overfit")]
    callbacks = [GradualUnfreeze(plan), CosineRestarts(snapshots=True), Does(on_train_end=report)]
    trainer = quiet_trainer(callbacks, devices=2, strategy="ddp_fork", logger=CSVLogger(tmp_path))
    trainer.fit(Differ(), points(6), points(2))
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    assert told[0]["values"] == {"full": pytest.approx([3.0, 2.75, 2.95])}
    assert told[0]["epochs"] == 3
    assert [Path(path).is_file() for path in told[0]["shots"]] == [True] * 3
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert same_weights(*ranks) == []
    best = torch.load(told[0]["shots"][1], weights_only=True)["state_dict"]
    assert same_weights(ranks[0], best) == []


def test_restarts__leave_nothing_in_the_list_of_callbacks_after_an_error() -> None:
    class Breaks(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("on purpose")

    callbacks = [CosineRestarts(), Breaks()]
    trainer = quiet_trainer(callbacks, max_epochs=1)
    for _ in range(2):  # Lightning calls no `teardown` after an error
        with pytest.raises(RuntimeError, match="on purpose"):
            trainer.fit(Line(), DataLoader(TensorDataset(torch.zeros(4, 4), torch.zeros(4).long())))
        assert [type(each).__name__ for each in trainer.callbacks if type(each).__name__.startswith("_Goes")] == []
