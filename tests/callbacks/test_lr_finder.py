"""The range test against a plain PyTorch loop, and runs with it against runs without it, bit by bit."""

from __future__ import annotations

import copy
import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import CombinedLoader
from matplotlib.image import imread
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage, RangeTest
from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.data.loaders import EpochSampler, KeyedDataset, ResumableLoader
from lightning_unfreeze.seeding import rng_state
from lightning_unfreeze.stages.plan import Stage
from tests.processes import needs_fork
from tests.zoo import (
    Does,
    SmallNet,
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

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


class Everything(UserModule):
    """A step with all that a range test could disturb: random numbers of three kinds, a metric, a growing list."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.metric = MulticlassAccuracy(3)
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        scale = 1 + 0.1 * np.random.rand()  # noqa: NPY002
        images = images * scale + 0.1 * random.random() + 0.1 * torch.randn_like(images)
        logits = self.net(images)
        loss = nn.functional.cross_entropy(logits.float(), targets)
        self.metric(logits.float(), targets)
        self.seen.append(float(loss.detach()))
        self.log("train_loss", loss)
        self.log("train_acc", self.metric)
        return loss


class Learnable(pl.LightningModule):
    """A smooth problem in one batch: its curve has a signal, and no step depends on a random number."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.head(torch.tanh(self.backbone(x))), y)

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def blobs() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(30) % 3
    x = torch.randn(30, 8, generator=generator) + 2 * nn.functional.one_hot(targets, 8)
    return DataLoader(TensorDataset(x, targets), batch_size=30)


class Scripted(pl.LightningModule):
    """Gives the losses of a script."""

    def __init__(self, script: list[float | None]) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(1, 1), nn.Linear(1, 1)
        self.script, self.step = script, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        value = self.script[self.step % len(self.script)]
        self.step += 1
        return None if value is None else self.head(self.backbone(batch[0])).sum() * 0 + value

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def numbers(num: int = 6) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(float(num))[:, None]), batch_size=2)


class Final(Callback):
    """All that a range test must leave as it was, at the end of the fit."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        self.state = {
            "weights": weights_of(pl_module),
            "optimizer": [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]],
            "rates": [group["lr"] for group in optimizer.param_groups],
            "random": rng_state(),
            "scaler": trainer.precision_plugin.state_dict(),
            "metrics": dict(trainer.callback_metrics),
            "seen": list(getattr(pl_module, "seen", [])),
            "metric": pl_module.metric.metric_state,
            "step": trainer.global_step,
        }


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        return [found for key in left for found in differences(left[key], right[key], f"{path}.{key}")]
    if isinstance(left, list | tuple):
        assert len(left) == len(right), path
        pairs = enumerate(zip(left, right, strict=True))
        return [found for index, (a, b) in pairs for found in differences(a, b, f"{path}.{index}")]
    equal = torch.equal(left, right) if isinstance(left, Tensor) else left == right
    return [] if equal else [path]


def half_precision() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2))


def plain_loader() -> DataLoader[Any]:
    return loader(shuffle=True)


def own_generator_loader() -> DataLoader[Any]:
    return loader(shuffle=True, generator=torch.Generator().manual_seed(5))


def worker_loader() -> DataLoader[Any]:
    return loader(random_images(64), batch_size=4, shuffle=True, num_workers=1, persistent_workers=True)


def resumable_loader() -> DataLoader[Any]:
    data = KeyedDataset(random_images())
    return ResumableLoader(data, batch_size=8, sampler=EpochSampler(data, seed=3))


@pytest.mark.parametrize(
    ("restarts", "stage", "warmup_steps"),
    [
        (CosineRestarts(), Stage("all", lr="find", cycle_len=4), 0),
        (CosineRestarts(warmup=0.5), Stage("all", lr="find", cycle_len=2, cycle_mult=2, num_cycles=2), 3),
        (CosineRestarts(warmup=0.5), Stage("all", lr="find", epochs=2), 0),  # its rate stands still
        (CosineRestarts("one_cycle"), Stage("all", lr="find", cycle_len=4), 3),
        (CosineRestarts("slanted_triangle"), Stage("all", lr="find", cycle_len=10), 3),
    ],
)
def test_finder__a_warm_up_of_three_steps_lets_the_rate_be_three_times_as_high(
    restarts: CosineRestarts, stage: Stage, warmup_steps: float
) -> None:
    script: list[float | None] = [0.4 + 0.05 * (-1) ** step + max(0.0, (step - 60) / 10) ** 2 for step in range(100)]
    finder = LRFinderPerStage(method="below_rise")
    quiet_trainer([GradualUnfreeze([stage]), finder, restarts]).fit(Scripted(script * 2), numbers())  # 3 steps an epoch
    result = finder.results["all"]
    assert result.warmup_steps == warmup_steps
    part = 105 / result.steps ** (2 / 3) / (3 if warmup_steps else 1)  # type: ignore[operator]
    assert result.suggestion == pytest.approx(result.answer().rise / part)  # type: ignore[operator]


def test_finder__a_head_that_goes_on_alone_gets_a_twentieth_of_the_rise_however_long_it_trains() -> None:
    script: list[float | None] = [0.4 + 0.05 * (-1) ** step + max(0.0, (step - 60) / 10) ** 2 for step in range(100)]
    finder, stage = LRFinderPerStage(method="below_rise"), Stage("head", train="head", lr="find", cycle_len=40)
    restarts = CosineRestarts(warmup=0.5)
    quiet_trainer([GradualUnfreeze([stage]), finder, restarts]).fit(Scripted(script * 2), numbers())
    result = finder.results["head"]
    assert result.suggestion == pytest.approx(result.answer().rise / 20)  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:stage .* no signal")
@pytest.mark.parametrize(
    ("make_loader", "optimizer", "options"),
    [
        pytest.param(plain_loader, "adamw", {}, id="plain"),
        pytest.param(own_generator_loader, "sgd", {"gradient_clip_val": 0.1}, id="own_generator-sgd-clipping"),
        pytest.param(resumable_loader, "adamw", {"accumulate_grad_batches": 2}, id="resumable-accumulate"),
        pytest.param(plain_loader, "adamw", {"accumulate_grad_batches": 3}, id="accumulate_3"),
        pytest.param(worker_loader, "adamw", {}, id="workers"),
        pytest.param(plain_loader, "adamw", {"precision": "bf16-mixed"}, id="bf16"),
        pytest.param(plain_loader, "sgd", {"plugins": half_precision}, id="fp16-scaler"),
    ],
)
@pytest.mark.parametrize("planned", [True, False])
def test_finder__a_run_with_it_is_bitwise_the_run_without_it(
    make_loader: Any, optimizer: str, options: dict[str, Any], planned: bool
) -> None:
    states = []
    for find in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        finder, final = LRFinderPerStage(num_steps=20, apply=False), Final()
        lr: Any = "find" if find else None
        plan = [Stage("head", train="head", epochs=1, lr=lr), Stage("full", epochs=2, lr=lr, lr_mult=1 / 3)]
        callbacks: list[Callback] = [*([GradualUnfreeze(plan)] if planned else []), *([finder] if find else []), final]
        given = {key: value() if callable(value) else value for key, value in options.items()}
        # the rates are the stage's in both, also where no callback sets them
        callbacks.append(CosineRestarts(cycle_len=1))
        trainer = quiet_trainer(callbacks, max_epochs=3, **given)
        trainer.fit(Everything(optimizer=optimizer), make_loader(), loader())
        states.append(final.state)
        if find:
            assert {len(result.lrs) for result in finder.results.values()} == {20}
            assert list(finder.results) == (["head", "full"] if planned else ["fit"])
    assert len(states[0]["seen"]) == 3 * len(make_loader())
    assert differences(*states) == []


# --- the curve


def plain_range_test(
    module: UserModule,
    head_only: bool,
    batches: list[Any],
    accumulate: int,
    num_steps: int,
    clip: float | None,
    sgd: bool,
) -> list[float]:
    """A range test as one would write it in a notebook."""
    net = copy.deepcopy(module.net)
    ratios = {"head": 1.0, "backbone.1": 1 / 3, "backbone.0": 1 / 9}
    groups = []
    for name, parameter in net.named_parameters():
        (ratio,) = (ratio for prefix, ratio in ratios.items() if name.startswith(prefix))
        if head_only and not name.startswith("head"):
            parameter.requires_grad_(False)
            continue
        groups.append({"params": [parameter], "ratio": ratio, "weight_decay": 0.05 if parameter.ndim > 1 else 0.0})
    if head_only:
        net.backbone.eval()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=0.0)
    if sgd:
        groups = [{**group, "weight_decay": 1e-3} for group in groups]
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    losses, position = [], 0
    for step in range(num_steps):
        rate = 1e-5 * (0.5 / 1e-5) ** (step / (num_steps - 1))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        optimizer.zero_grad()
        total = 0.0
        for _ in range(accumulate):
            x, y = batches[position % len(batches)]
            position += 1
            loss = nn.functional.cross_entropy(net(x), y)
            (loss / accumulate).backward()
            total += loss.item() / accumulate
        if clip:
            nn.utils.clip_grad_norm_([p for p in net.parameters() if p.grad is not None], clip)
        optimizer.step()
        losses.append(total)
    return losses


@pytest.mark.filterwarnings("ignore:stage .* no signal")
@pytest.mark.parametrize(
    ("train", "accumulate", "limit", "clip", "sgd"),
    [
        ("all", 1, 1.0, None, False),
        ("all", 2, 1.0, None, True),
        ("all", 1, 1.0, 0.01, True),
        ("head", 3, 2, None, False),
    ],
)
def test_finder__its_curve_is_that_of_a_plain_loop(
    train: Any, accumulate: int, limit: float, clip: float | None, sgd: bool
) -> None:
    torch.manual_seed(0)
    net = SmallNet()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    user, finder = UserModule(net, "sgd" if sgd else "adamw"), LRFinderPerStage(1e-5, 0.5, num_steps=20, apply=False)
    given = quiet_trainer(
        [GradualUnfreeze([Stage("s", train=train, epochs=1, lr="find", lr_mult=1 / 3)]), finder],
        accumulate_grad_batches=accumulate,
        limit_train_batches=limit,
        gradient_clip_val=clip,
    )
    batches = list(loader())[: limit if isinstance(limit, int) else None]
    expected = plain_range_test(user, train == "head", batches, accumulate, 20, clip, sgd)
    given.fit(user, loader())
    result = finder.results["s"]
    assert result.losses == pytest.approx(expected, rel=1e-5)
    assert result.lrs == pytest.approx([1e-5 * 50_000 ** (step / 19) for step in range(20)], rel=1e-9)


def test_finder__several_loaders_are_combined_as_in_training() -> None:
    seen: list[Any] = []

    class Two(UserModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append({key: part[1].tolist() for key, part in batch.items()})
            return super().training_step(batch["left"], batch_idx)

    finder = LRFinderPerStage(num_steps=21, apply=False)
    loaders = {"left": loader(), "right": loader(random_images(16, seed=1))}
    with pytest.warns(UserWarning, match="no signal"):
        quiet_trainer([finder], max_epochs=1).fit(Two(), CombinedLoader(loaders, "max_size_cycle"))
    trained = seen[21:]
    assert len(trained) == 3  # the longer loader's
    assert seen[:21] == trained * 7


@pytest.mark.filterwarnings("ignore:stage .* no signal")
@pytest.mark.parametrize(
    ("script", "points"),
    [
        ([2.0] * 20 + [1e6] * 80, 21),
        ([2.0] * 14 + [math.inf] + [2.0] * 85, 15),
        ([2.0] * 3 + [math.nan] + [2.0] * 96, 4),
        ([-0.5 * step for step in range(100)], 100),  # a multiple of the best would stop at the second point
        ([-3.0] * 30 + [-2.9] * 70, 100),
        ([1e-3] + [0.5] * 99, 100),  # one easy batch first is no measure of the others
        ([2.0] * 30 + [5.0] * 70, 100),  # a plateau is no divergence
    ],
)
def test_finder__stops_where_the_loss_diverges_and_not_before(script: list[float | None], points: int) -> None:
    finder = LRFinderPerStage(apply=False)
    module = Scripted(script)
    trainer = quiet_trainer([finder], max_epochs=1, limit_train_batches=1)
    trainer.fit(module, numbers())
    result = finder.results["fit"]
    assert len(result.losses) == len(result.lrs) == points
    assert module.step == 1
    np.testing.assert_allclose(result.losses, script[:points])
    suggested = result.suggestion
    assert suggested is None or math.isfinite(suggested)


@pytest.mark.filterwarnings("ignore:stage .* no signal", "ignore:`training_step` returned `None`")
def test_finder__leaves_out_steps_without_a_loss() -> None:
    finder = LRFinderPerStage(1e-4, 1.0, num_steps=21, apply=False)
    quiet_trainer([finder], max_epochs=1).fit(Scripted([2.0, None]), numbers())
    result = finder.results["fit"]
    assert result.losses == [2.0] * 11
    assert result.lrs == pytest.approx([1e-4 * 10 ** (0.4 * step) for step in range(11)])
    with pytest.raises(MisconfigurationException, match="returned no loss"):
        quiet_trainer([finder], max_epochs=1).fit(Scripted([None]), numbers())


def test_range_test__rules_read_the_smoothed_curve_without_its_ends() -> None:
    lrs = [10 ** (-5 + 0.1 * step) for step in range(40)]
    curve = RangeTest(lrs, [2 - step / 40 for step in range(40)], "minimum/10")
    average, smoothed = 0.0, []
    for step in range(40):
        average = 0.9 * average + 0.1 * (2 - step / 40)
        smoothed.append(average / (1 - 0.9 ** (step + 1)))
    assert curve.smoothed == pytest.approx(smoothed)
    # points 4 to 34 are read, and all of them fall: their lowest is the last, their valley the 15th (31 // 3 + 31 // 6)
    assert curve.suggestion == pytest.approx(lrs[34] / 10)
    assert curve.suggestions()["valley"] == pytest.approx(lrs[4 + 14])
    assert curve.answer().end == "fall"
    rising = RangeTest(lrs, [2 + 2 ** max(0, step - 25) / 8 for step in range(40)], "valley")
    assert rising.answer().end == "rise" and lrs[24] < rising.answer().rise < lrs[32]
    assert set(rising.suggestions().values()) == {rising.answer().rise / 20}
    assert [row["lr"] for row in curve.rows()] == lrs
    assert RangeTest(lrs, [2.0] * 40, "valley").suggestion is None
    assert RangeTest(lrs[:3], [2.0, 1.0, math.nan], "valley").suggestion is None


# --- what is done with the result


def test_finder__sets_the_peak_of_every_group_in_its_ratio() -> None:
    finder = LRFinderPerStage(1e-4, 10.0, num_steps=60, method="minimum/10")
    trainer = quiet_trainer([GradualUnfreeze([Stage("full", epochs=1, lr="find", lr_mult=0.25)]), finder])
    torch.manual_seed(0)
    trainer.fit(Learnable(), blobs())
    found = finder.results["full"].suggestion
    assert found is not None
    rates = {group["layer_group"]: (group["peak_lr"], group["lr"]) for group in trainer.optimizers[0].param_groups}
    assert rates["head"] == pytest.approx((found, found))
    assert rates["backbone"] == pytest.approx((found / 4, found / 4))


def test_finder__works_alone_and_keeps_the_users_ratios() -> None:
    class TwoRates(Learnable):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            groups = [
                {"params": self.backbone.parameters(), "lr": 1e-3},
                {"params": self.head.parameters(), "lr": 5e-3},
            ]
            return torch.optim.SGD(groups)

    torch.manual_seed(0)
    finder = LRFinderPerStage(1e-4, 10.0, num_steps=60)
    trainer = quiet_trainer([finder], max_epochs=1)
    trainer.fit(TwoRates(), blobs())
    found = finder.results["fit"].suggestion
    assert found is not None
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([found / 5, found])


def test_finder__without_a_signal_keeps_the_rates_or_stops() -> None:
    keep = LRFinderPerStage(num_steps=40)
    trainer = quiet_trainer([keep], max_epochs=1)
    with pytest.warns(UserWarning, match=r"stage 'fit': no signal .* from 1e-06 to 1\).*the rates stay as they are"):
        trainer.fit(Scripted([2.0]), numbers())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.01
    with pytest.raises(MisconfigurationException, match="no signal"):
        quiet_trainer([LRFinderPerStage(num_steps=40, on_no_signal="error")], max_epochs=1).fit(
            Scripted([2.0]), numbers()
        )


class TwoStages(Scripted):
    """The head's curve falls and then blows up; that of the full stage is flat, or rises."""

    def __init__(self, full: list[float | None], head: list[float | None] | None = None) -> None:
        falls: list[float | None] = [2.0] * 20 + [2.0 - 0.05 * step for step in range(30)] + [0.5] * 50
        super().__init__(head or falls)
        self.full = full

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.backbone.weight.requires_grad and self.script is not self.full:
            self.script, self.step = self.full, 0
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("lr", "expected"), [("find", None), (0.02, 0.002)])
def test_finder__without_a_signal_a_stage_takes_the_last_ones_rate(lr: Any, expected: float | None) -> None:
    finder = LRFinderPerStage(apply=True)
    plan = [
        Stage("head", train="head", epochs=1, lr=lr),
        Stage("top", train="all", epochs=1, lr="find", lr_mult=0.5),
        Stage("again", train="all", epochs=1, lr="find", lr_mult=0.5),
    ]
    trainer = quiet_trainer([GradualUnfreeze(plan), finder])
    with pytest.warns(
        UserWarning, match=r"stage '(top|again)': no signal .* it takes .* the last stage's rate"
    ) as told:
        trainer.fit(TwoStages([1.0]), numbers())
    assert [("a tenth of" in str(one.message)) for one in told if "no signal" in str(one.message)] == [True, True]
    expected = expected or finder.results["head"].suggestion / 10  # type: ignore[operator]
    rates = {group["layer_group"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates == pytest.approx({"backbone": expected / 2, "head": expected})


def test_finder__a_curve_that_only_rises_sets_a_rate_below_the_rise(caplog: pytest.LogCaptureFixture) -> None:
    noise = random.Random(0)
    script: list[float | None] = [0.4 + noise.gauss(0, 0.05) + max(0.0, (step - 60) / 10) ** 2 for step in range(100)]
    finder = LRFinderPerStage()
    trainer = quiet_trainer([GradualUnfreeze([Stage("full", epochs=1, lr="find", lr_span=0.25)]), finder])
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        trainer.fit(Scripted(script), numbers())
    result = finder.results["full"]
    answer = result.answer()
    assert answer.end == "rise" and 10 ** (-6 + 6 * 60 / 99) < answer.rise < 10 ** (-6 + 6 * 70 / 99)  # type: ignore[operator]
    assert "below the rise from" in caplog.text
    rates = {group["layer_group"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    rate = answer.rise / (105 / 3 ** (2 / 3))  # type: ignore[operator]  # one epoch of three steps
    assert rates == pytest.approx({"backbone": rate / 4, "head": rate})
    names = [text.get_text() for text in result.plot().axes[0].get_legend().get_texts()]
    assert f"below the rise: {answer.rate:.2g} (chosen)" in names
    assert f"rises from {answer.rise:.2g} on" in names


def test_finder__a_stage_that_goes_on_from_trained_weights_reads_the_rise() -> None:
    def loss(step: int) -> float:
        return 1.0 - step / 80 if step <= 60 else min(2.0, 0.25 + ((step - 60) / 10) ** 2)  # never said to diverge

    stages = [Stage("head", train="head", epochs=1, lr="find"), Stage("full", epochs=4, lr="find")]
    finder = LRFinderPerStage()
    # a test leaves no trace, its steps neither: the second one starts where the three steps of the first stage end
    script: list[float | None] = [loss(step) for step in range(110)]
    quiet_trainer([GradualUnfreeze(stages), finder]).fit(Scripted(script), numbers())
    head, full = finder.results["head"], finder.results["full"]
    assert (head.method, head.steps, head.answer().end) == ("valley", 3, "fall")
    assert (full.method, full.steps, full.answer().end) == ("below_rise", 12, "rise")
    # half a unit above the lowest is passed at loss 67 or 68
    assert 10 ** (-6 + 6 * 63 / 99) < full.answer().rise < 10 ** (-6 + 6 * 66 / 99)  # type: ignore[operator]
    assert full.suggestion == pytest.approx(full.answer().rise / (105 / 12 ** (2 / 3)))  # type: ignore[operator]
    assert full.answer("valley").end == "fall"
    asked = LRFinderPerStage(method="minimum/10")
    quiet_trainer([GradualUnfreeze(stages), asked]).fit(Scripted(script), numbers())
    assert asked.results["full"].suggestion == full.suggestions()["minimum/10"]


@pytest.mark.filterwarnings("ignore:stage .* no signal")
def test_finder__batches_that_are_none_are_left_out_as_in_training() -> None:
    def none_for_3(samples: list[Any]) -> Any:
        return None if any(float(sample[0]) == 3 for sample in samples) else torch.utils.data.default_collate(samples)

    finder = LRFinderPerStage(num_steps=20, apply=False)
    data: Any = DataLoader(TensorDataset(torch.arange(6.0)[:, None]), batch_size=2, collate_fn=none_for_3)
    with pytest.warns(UserWarning, match="yielded None"):
        quiet_trainer([finder], max_epochs=1).fit(Scripted([2.0]), data)
    assert finder.results["fit"].losses == [2.0] * 20


def test_finder__only_stages_that_ask_are_searched() -> None:
    finder = LRFinderPerStage(1e-4, 10.0, num_steps=60)
    plan = [Stage("head", train="head", epochs=1, lr=0.1), Stage("full", epochs=1, lr="find")]
    trainer = quiet_trainer([GradualUnfreeze(plan), finder])
    trainer.fit(Learnable(), blobs())
    assert list(finder.results) == ["full"]


def test_finder__a_second_fit_searches_anew() -> None:
    finder = LRFinderPerStage(num_steps=20, apply=False)
    for level in (2.0, 3.0):
        with pytest.warns(UserWarning, match="no signal"):
            quiet_trainer([finder], max_epochs=1).fit(Scripted([level]), numbers())
        assert finder.results["fit"].losses == [level] * 20


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize("save_at", [0, 1])
def test_finder__a_resumed_run_takes_the_result_from_the_checkpoint_and_says_its_rates(
    tmp_path: Path, save_at: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Saved at the end of the first stage, and inside the second."""
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    plan = [Stage("head", train="head", epochs=1, lr="find"), Stage("full", epochs=2, lr="find", lr_mult=1 / 3)]

    def run(ckpt_path: Path | None = None) -> tuple[Any, LRFinderPerStage]:
        torch.manual_seed(0)
        finder, module = LRFinderPerStage(1e-4, 10.0, num_steps=60), Learnable()
        saving = ModelCheckpoint(tmp_path / "checkpoints", filename="{epoch}", save_top_k=-1)
        trainer = quiet_trainer([GradualUnfreeze(plan), finder, saving], enable_checkpointing=True)
        trainer.fit(module, blobs(), ckpt_path=ckpt_path)
        return weights_of(module), finder

    whole, first = run()
    searched: list[str] = []
    search = LRFinderPerStage.range_test
    monkeypatch.setattr(
        LRFinderPerStage,
        "range_test",
        lambda self, trainer, module, name: searched.append(name) or search(self, trainer, module, name),
    )
    caplog.clear()
    resumed, second = run(tmp_path / "checkpoints" / f"epoch={save_at}.ckpt")
    assert searched == (["full"] if save_at == 0 else [])
    (said,) = [line.partition("epochs")[2] for line in caplog.messages if line.startswith("stage 2/2 ")]
    rate = first.results["full"].suggestion or 0.0
    assert said == ("" if save_at == 0 else f" at lr {rate / 3:.3g} (backbone) to {rate:.3g} (head)")
    assert second.results == first.results
    assert same_weights(whole, resumed) == []


@pytest.mark.parametrize("planned", [True, False])
def test_finder__a_fit_that_goes_on_in_its_trainer_keeps_the_rate(planned: bool) -> None:
    """Stopped after an epoch, then `fit` again: Lightning makes the optimizer anew, at the rate that it was given."""
    plan = [GradualUnfreeze([Stage("full", epochs=3, lr="find", lr_mult=1 / 3)])] if planned else []
    rates: list[list[float]] = []

    def stop_after_the_first(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        trainer.should_stop = len(rates) == 1

    finder, module = LRFinderPerStage(1e-4, 10.0, num_steps=60), Learnable()
    options = {} if planned else {"max_epochs": 3}
    trainer = quiet_trainer([*plan, finder, Does(on_train_epoch_end=stop_after_the_first)], **options)
    trainer.fit(module, blobs())
    assert trainer.current_epoch == 1
    trainer.fit(module, blobs())
    assert trainer.current_epoch == 3
    (result,) = finder.results.values()
    assert result.suggestion not in (None, 0.01)
    assert rates == [[result.suggestion * ratio for ratio in ((1 / 3, 1) if planned else (1,))]] * 3


# --- what it leaves


@pytest.mark.pictures
def test_finder__writes_its_curve_and_logs_the_suggestion_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[dict[str, float]] = []
    logger = CSVLogger(tmp_path)
    monkeypatch.setattr(logger, "log_metrics", lambda metrics, step=None: logged.append(metrics))
    finder = LRFinderPerStage(1e-4, 10.0, num_steps=60)
    trainer = quiet_trainer([finder], max_epochs=1, logger=logger, limit_val_batches=0, log_every_n_steps=1)
    trainer.fit(Learnable(), blobs())
    result = finder.results["fit"]
    assert logged == [{"lr_find/fit": result.suggestion}]
    (table,) = tmp_path.rglob("lr_find_fit.csv")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lr"]) for row in rows] == result.lrs
    assert [float(row["loss"]) for row in rows] == result.losses
    assert imread(table.with_suffix(".png")).std() > 0.05
    names = [text.get_text() for text in result.plot().axes[0].get_legend().get_texts()]
    assert f"valley: {result.suggestion:.2g} (chosen)" in names


def test_finder__writes_nothing_where_the_run_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finder = LRFinderPerStage(1e-4, 10.0, num_steps=20, apply=False)
    quiet_trainer([finder], max_epochs=1).fit(Learnable(), blobs())
    assert len(finder.results["fit"].losses) == 20
    assert list(tmp_path.rglob("*")) == []


def test_finder__an_error_in_the_users_step_leaves_no_trace(tmp_path: Path) -> None:
    class Fails(Everything):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if len(self.seen) == 5:
                raise RuntimeError("from the user's step")
            return super().training_step(batch, batch_idx)

    module, finder = Fails(), LRFinderPerStage(num_steps=20)
    before, metric = weights_of(module), copy.deepcopy(module.metric.metric_state)
    trainer = quiet_trainer([finder], max_epochs=1, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    callbacks = list(trainer.callbacks)
    with pytest.raises(RuntimeError, match="from the user's step"):
        trainer.fit(module, loader())
    assert same_weights(before, weights_of(module)) == []
    assert trainer.callbacks == callbacks
    assert module.seen == [] and "log" not in vars(module)
    assert differences(metric, module.metric.metric_state) == []
    assert all(parameter.grad is None for parameter in module.parameters())
    assert trainer.optimizers[0].state == {}
    assert list(tmp_path.rglob("lr_find*")) == []


def test_finder__shows_a_bar_where_the_trainer_shows_one(capsys: pytest.CaptureFixture[str]) -> None:
    finder = LRFinderPerStage(num_steps=20, apply=False, min_lr=1e-4, max_lr=10)
    trainer = quiet_trainer([finder, TQDMProgressBar()], max_epochs=1, enable_progress_bar=True)
    trainer.fit(Learnable(), blobs())
    assert "range test of stage 'fit'" in capsys.readouterr().err
    quiet_trainer([finder], max_epochs=1).fit(Learnable(), blobs())
    assert "range test" not in capsys.readouterr().err


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_lr": 0.0}, "min_lr=0.0"),
        ({"min_lr": 1.0, "max_lr": 0.1}, "0 < min_lr < max_lr"),
        ({"max_lr": math.inf}, "finite"),
        ({"num_steps": 19}, "num_steps=19"),
        ({"method": "best"}, "method='best'"),
        ({"on_no_signal": "stop"}, "on_no_signal='stop'"),
    ],
)
def test_finder__refuses_impossible_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LRFinderPerStage(**options)


def test_finder__refuses_optimizers_that_it_cannot_drive() -> None:
    module = TwoOptimizers()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="this has 2 and automatic_optimization=False"):
        quiet_trainer([LRFinderPerStage()], max_epochs=1).fit(module, loader())
    with pytest.raises(MisconfigurationException, match="LBFGS"):
        quiet_trainer([LRFinderPerStage()], max_epochs=1).fit(UsesLBFGS(), loader())


def test_finder__refuses_data_without_a_batch() -> None:
    with pytest.raises(MisconfigurationException, match="gives no batch"):
        quiet_trainer([LRFinderPerStage()], max_epochs=1).fit(Scripted([1.0]), DataLoader(Stream([])))


# --- several processes


class Ranked(Everything):
    """Keeps the losses of this rank; those of rank 1 break off at a batch."""

    def __init__(self, broken: int) -> None:
        super().__init__()
        self.broken = broken

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        losses.append(loss.item())
        return loss * float("nan") if self.global_rank == 1 and len(losses) == self.broken else loss


losses: list[float] = []  # not of the module, which a range test leaves as it was


def ranked_fit(folder: Path, find: int, broken: int, accumulate: int) -> None:
    def report(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        finder = [callback for callback in trainer.callbacks if isinstance(callback, LRFinderPerStage)]
        curve = finder[0].results["full"].losses if finder else None
        torch.save(weights_of(module), folder / f"{trainer.global_rank}.pt")
        (folder / f"{trainer.global_rank}.json").write_text(json.dumps({"curve": curve, "local": losses}))

    folder.mkdir()
    torch.manual_seed(0)
    plan = [Stage("head", train="head", epochs=1), Stage("full", epochs=1, lr="find" if find else None, lr_mult=1 / 3)]
    finders = [LRFinderPerStage(num_steps=20, apply=False)] if find else []
    trainer = quiet_trainer(
        [GradualUnfreeze(plan), CosineRestarts(), Does(on_train_end=report), *finders],
        devices=2,
        strategy="ddp_fork",
        accumulate_grad_batches=accumulate,
        logger=CSVLogger(folder),
    )
    trainer.fit(Ranked(broken), loader(random_images(32), batch_size=4, shuffle=True))


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")  # Lightning, about processes and loaders
@needs_fork
def test_finder__two_ranks_make_one_curve_and_leave_no_trace(tmp_path: Path) -> None:
    before = 4  # batches of each rank in the first stage, before the range test
    cases = {"without": (0, 0, 1), "with": (1, 0, 1), "broken": (1, before + 10, 1)}
    cases |= {"without-2": (0, 0, 2), "with-2": (1, 0, 2)}
    for name, case in cases.items():
        ranked_fit(tmp_path / name, *case)
    told = {name: [json.loads((tmp_path / name / f"{rank}.json").read_text()) for rank in range(2)] for name in cases}

    for accumulate, suffix in ((1, ""), (2, "-2")):
        for rank in range(2):
            runs = [torch.load(tmp_path / (name + suffix) / f"{rank}.pt") for name in ("without", "with")]
            assert same_weights(*runs) == []
        ranks = told["with" + suffix]
        tested = [rank["local"][before : before + 20 * accumulate] for rank in ranks]
        means = np.array(tested).mean(0).reshape(20, accumulate).mean(1)
        assert ranks[0]["curve"] == ranks[1]["curve"] == pytest.approx(means.tolist(), rel=1e-6)
        assert tested[0] != tested[1]
    assert [len(rank["curve"]) for rank in told["broken"]] == [10, 10]  # though only rank 1 saw the NaN
