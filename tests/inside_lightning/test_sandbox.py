"""Steps in the sandbox leave no trace: the run with them equals the run without, bitwise."""

from __future__ import annotations

import copy
import random
from collections import Counter, deque
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.inside_lightning.sandbox import sandbox
from lightning_unfreeze.inside_lightning.steps import batch_on_device, training_loss
from lightning_unfreeze.seeding import rng_state
from lightning_unfreeze.stages.plan import Stage
from tests.zoo import Does, SmallNet, UserModule, loader, quiet_trainer, random_images, same_weights, weights_of


class Meter:
    """A plain object that counts, and knows its owner."""

    def __init__(self, owner: Any) -> None:
        self.owner, self.total, self.best = [owner], 0.0, {"loss": torch.tensor(9.0)}

    def update(self, loss: torch.Tensor) -> None:
        self.total += loss.item()
        self.best["loss"] = torch.minimum(self.best["loss"], loss.detach())


class Rich(UserModule):
    """Keeps state in every way that users do."""

    def __init__(self) -> None:
        super().__init__(SmallNet())
        self.train_acc = torchmetrics.classification.MulticlassAccuracy(3)
        self.auroc = torchmetrics.classification.MulticlassAUROC(3)  # keeps lists of tensors
        self.val_acc = torchmetrics.MetricCollection([torchmetrics.classification.MulticlassAccuracy(3)])
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.outputs: list[Any] = []
        self.nested: dict[str, Any] = {"counts": Counter(), "recent": deque(maxlen=3), "pairs": [(torch.zeros(2), [1])]}
        self.array = np.zeros(3)
        self.seen_ids: set[int] = set()
        self.plain_tensor = torch.zeros(2)
        self.num_calls = 0
        self.meters = {"train": Meter(self)}
        self.taxonomy: dict[str, Any] = {"name": "animal", "children": [], "calls": 0}
        self.taxonomy["children"].append({"name": "cat", "parent": self.taxonomy, "calls": 0})
        self.averaged = [copy.deepcopy(self.net)]  # in a list: not a sub-module
        self.rng = np.random.default_rng(0)
        self.register_buffer("center", torch.zeros(3))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.register_buffer("late", None)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        logits = self.net(x + 0.01 * torch.randn_like(x) + float(np.random.rand()) + random.random())  # noqa: NPY002
        loss = nn.functional.cross_entropy(logits, y)
        self.train_acc(logits, y)
        self.auroc.update(logits.detach(), y)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        self.log_dict({"train_loss": loss})
        self.outputs.append(loss)  # with its graph
        self.nested["counts"]["steps"] += 1
        self.nested["recent"].append(float(loss.detach()))
        self.nested["pairs"][0][0].add_(1)
        self.nested["pairs"][0][1].append(2)
        self.array += 1
        self.seen_ids.add(batch_idx + 10 * self.num_calls)
        self.plain_tensor += 1
        self.num_calls += 1
        self.meters["train"].update(loss)
        self.taxonomy["children"][0]["parent"]["calls"] += 1
        self.averaged[0].head[2].weight.data += self.rng.random()
        self.center = 0.9 * self.center + logits.detach().mean(0)  # a new tensor
        self.hidden.mul_(0.5).add_(1)
        self.late = torch.ones(2) if self.late is None else self.late + 1
        self.new_attribute = self.num_calls
        with torch.no_grad():
            for mine, teacher in zip(self.net.parameters(), self.teacher.parameters(), strict=True):
                teacher.data.lerp_(mine.data, 0.5)
        return loss

    def on_train_epoch_end(self) -> None:
        self.outputs.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.val_acc(logits, batch[1])  # its states become inference tensors
        self.auroc.update(logits, batch[1])
        self.log_dict(self.val_acc)
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))


def plain(value: Any) -> Any:
    """Comparable by `==`."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return [type(value).__name__, value.tolist()]
    if isinstance(value, dict):
        return {str(key): plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple | deque):
        return [type(value).__name__, *map(plain, value)]
    return value if isinstance(value, int | float | str | set | None.__class__) else id(value)


def of_objects(module: Any) -> list[Any]:
    meter, head = module.meters["train"], module.averaged[0].head[2]
    counts = [meter.total, meter.best["loss"].item(), module.taxonomy["calls"], head.weight.tolist()]
    return [*counts, module.rng.bit_generator.state]


def everything(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    skipped = {"_trainer", "_parameters", "_modules", "_compiler_ctx", "meters", "taxonomy", "averaged"}
    kept: dict[str, Any] = {
        "rng": plain(rng_state()),
        "objects": of_objects(module),
        "metrics": plain(dict(trainer.callback_metrics)),
    }
    kept |= {f"grad {n}": (id(p), id(p.grad), plain(p.grad), plain(p)) for n, p in module.named_parameters()}
    for name, part in module.named_modules():
        kept |= {f"{name}.{k}": plain(v) for k, v in vars(part).items() if k not in skipped}
    state = trainer.optimizers[0].state_dict()
    return {**kept, "optimizer": plain(state), "groups": plain(state["param_groups"])}


class StepsInTheSandbox(Callback):
    def __init__(self, *, fails: bool = False, at: tuple[str, ...] = ("epoch", "batch")) -> None:
        self.fails, self.at, self.num_steps = fails, at, 0

    def steps(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        before, identities = everything(trainer, module), {n: id(v) for n, v in vars(module).items()}
        try:
            with sandbox(trainer, module):
                for group in optimizer.param_groups:
                    group["lr"] *= 10
                module.net.head.eval()
                for index, batch in enumerate(loader(random_images(8, seed=5), batch_size=4)):
                    optimizer.zero_grad()
                    loss = training_loss(trainer, module, batch_on_device(trainer, module, batch), index)
                    assert loss is not None
                    loss.backward()
                    optimizer.step()
                    self.num_steps += 1
                assert everything(trainer, module) != before
                if self.fails:
                    raise KeyError("inside")
        except KeyError:
            assert self.fails
        after = everything(trainer, module)
        assert [key for key in before if before[key] != after.get(key)] == []
        assert after.keys() == before.keys()
        assert {n: id(v) for n, v in vars(module).items()} == identities

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if "epoch" in self.at:
            self.steps(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if "batch" in self.at and batch_idx == 1:
            self.steps(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if "gradients" in self.at and trainer.global_step == 3:
            self.steps(trainer, pl_module)  # with gradients that wait for their step


def fit(*callbacks: Callback) -> tuple[dict[str, torch.Tensor], dict[str, Any], pl.Trainer]:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    module = Rich()
    plan = [Stage("head", train="head", epochs=1), Stage("full", epochs=2)]
    trainer = quiet_trainer([GradualUnfreeze(plan), *callbacks])
    trainer.fit(module, loader(shuffle=True), loader())
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    seen = {"metrics": metrics, "calls": module.num_calls, "ids": module.seen_ids, "objects": of_objects(module)}
    return weights_of(module), seen, trainer


@pytest.mark.parametrize(("fails", "at"), [(False, ("epoch", "batch")), (True, ("epoch",)), (False, ("gradients",))])
def test_sandbox__leaves_no_trace_in_a_run(fails: bool, at: tuple[str, ...]) -> None:
    without, kept, _ = fit()
    steps = StepsInTheSandbox(fails=fails, at=at)
    with_steps, kept_with, trainer = fit(steps)
    assert steps.num_steps >= 2
    assert same_weights(without, with_steps) == []
    assert kept == kept_with
    assert trainer.global_step == 9


def test_sandbox__a_kept_loss_can_still_go_backward() -> None:
    class Keeps(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            weight = torch.zeros(2, requires_grad=True)
            loss = weight.exp()  # its backward pass reads the value itself; at 0 the derivative is 1
            pl_module.outputs.append(loss)
            with sandbox(trainer, pl_module):
                pl_module.outputs.clear()
            assert pl_module.outputs[0] is loss
            loss.sum().backward()
            assert weight.grad is not None
            self.gradient = weight.grad.tolist()

    keeps = Keeps()
    fit(keeps)
    assert keeps.gradient == [1.0, 1.0]


def test_sandbox__puts_back_tensors_that_inference_made() -> None:
    def change(trainer: pl.Trainer, module: Any) -> None:
        with torch.inference_mode():
            module.plain_tensor = torch.ones(2)
        with sandbox(trainer, module), torch.inference_mode():
            module.plain_tensor.add_(1)
        assert module.plain_tensor.tolist() == [1.0, 1.0]
        module.plain_tensor = torch.zeros(2)

    fit(Does(on_train_epoch_start=change))


def test_sandbox__silences_log_and_callbacks_and_gives_them_back() -> None:
    class Looks(Callback):
        num_batches = 0

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            callbacks, own_log = list(trainer.callbacks), lambda *_, **__: None
            with sandbox(trainer, pl_module):
                assert not trainer.callbacks
                pl_module.log("inside", 1.0)
            assert list(trainer.callbacks) == callbacks
            assert "log" not in vars(pl_module)
            pl_module.log_dict = own_log
            with sandbox(trainer, pl_module):
                assert pl_module.log_dict is not own_log
            assert vars(pl_module).pop("log_dict") is own_log

    _, kept, trainer = fit(Looks())
    assert "inside" not in trainer.logged_metrics
    assert {"train_loss", "val_loss"} <= set(kept["metrics"])
