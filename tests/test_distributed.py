"""Replicas stay equal, and equal to one process; the same check sees Lightning's own callback drift.

The processes are forked from the test, so they import nothing again; results come back through files.
"""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import nn

from lightning_unfreeze.callbacks.base import StageCallback
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.distributed import gather_objects, rebuild_ddp, refuse_untested_strategy
from lightning_unfreeze.loaders import EpochSampler, ResumableLoader
from lightning_unfreeze.stages import Stage
from tests.conftest import SmallNet, UserModule, quiet_trainer, random_images, weights_of

needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="forks its processes")
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")

PLAN = [
    Stage("head", train="head", epochs=1, lr=0.1),
    Stage("top", train=2, epochs=2, lr=0.1, lr_mult=0.5),
    Stage("full", epochs=2, lr=0.05, lr_mult=0.5),
    Stage("stem", train=["0"], epochs=1, lr=0.05),
]
# weights and biases by hand: 3*4*9+4 and 2*4 of the first block, 4*6*9+6 and 2*6 of the second, 6*3+3 of the head
SIZES = {"head": 21, "top": 21 + 234, "full": 21 + 234 + 120, "stem": 120}


def ranks_differ_by(module: nn.Module) -> float:
    """Largest difference of any parameter or buffer between any rank and the first."""
    mine = torch.cat([value.detach().double().flatten() for value in module.state_dict().values()])
    everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, mine)
    return max(float((other - everyone[0]).abs().max()) for other in everyone)


class WritesDown(StageCallback):
    """Differences between ranks after each stage (each epoch without stages), and the final weights of rank 0."""

    order = 95

    def __init__(self, folder: Path) -> None:
        self.folder, self.differences, self.reduced = folder, {}, {}  # type: ignore[var-annotated]

    def on_stage_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        if self.run is not None and self.run.planned:
            self.differences[stage.name] = ranks_differ_by(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self.run is not None and not self.run.planned:
            self.differences[str(trainer.current_epoch)] = ranks_differ_by(pl_module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        counts = getattr(trainer.strategy, "reduced", None)
        if counts is not None and self.run is not None:
            self.reduced.setdefault(self.run.stage.name, set()).add(sum(counts))
            counts.clear()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if trainer.is_global_zero:
            torch.save(weights_of(pl_module), self.folder / "weights.pt")
            reduced = {name: sorted(sizes) for name, sizes in self.reduced.items()}
            (self.folder / "seen.json").write_text(json.dumps([self.differences, reduced]))


class CountingDDP(DDPStrategy):
    """Lightning (2.6) registers communication hooks on CUDA devices only; here on any, counting what is reduced."""

    def __init__(self, **options: Any) -> None:
        super().__init__(ddp_comm_hook=self.count_and_average, process_group_backend="gloo", **options)
        self.reduced: list[int] = []

    def count_and_average(self, state, bucket):  # type: ignore[no-untyped-def]  # torch reads the annotations
        self.reduced.append(bucket.buffer().numel())
        work = torch.distributed.all_reduce(bucket.buffer().div_(self.world_size), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    def _register_ddp_hooks(self) -> None:
        self.model.register_comm_hook(None, self._ddp_comm_hook)


def fit(
    folder: Path, num_ranks: int, *callbacks: Callback, strategy: Any = None, train_bn: bool = False
) -> tuple[dict[str, float], dict[str, list[int]], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    net = SmallNet()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.train(train_bn)  # in train mode each rank sees its own batch statistics
    options: dict[str, Any] = {}
    if num_ranks > 1:
        ddp = DDPStrategy(start_method="fork", process_group_backend="gloo")
        options = {"strategy": strategy or ddp, "devices": num_ranks}
    dataset = random_images(24)
    data = ResumableLoader(dataset, batch_size=12 // num_ranks, sampler=EpochSampler(dataset, seed=1))
    writes = [WritesDown(folder)] if num_ranks > 1 else []
    trainer = quiet_trainer([*callbacks, *writes], max_epochs=6, **options)
    module = UserModule(net, optimizer="sgd")
    trainer.fit(module, data)
    if num_ranks == 1:
        return {}, {}, weights_of(module)
    differences, reduced = json.loads((folder / "seen.json").read_text())
    return differences, reduced, torch.load(folder / "weights.pt")


@needs_fork
@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:Found .* module")  # Lightning, about BatchNorm that the module keeps in eval mode
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ddp__replicas_stay_equal_and_equal_one_process(num_ranks: int, tmp_path: Path) -> None:
    options = {} if num_ranks == 2 else {"gradient_as_bucket_view": True, "static_graph": True}
    strategy = CountingDDP(start_method="fork", **options)
    differences, reduced, weights = fit(tmp_path, num_ranks, GradualUnfreeze(PLAN), strategy=strategy)
    assert differences == {stage.name: 0.0 for stage in PLAN}
    # the user's hook saw, in every step, exactly what trains
    assert reduced == {name: [size] for name, size in SIZES.items()}
    _, _, alone = fit(tmp_path, 1, GradualUnfreeze(PLAN))
    for name, value in alone.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)


@needs_fork
@pytest.mark.ddp
def test_ddp__buffers_are_equal_after_every_stage_where_batch_norm_trains(tmp_path: Path) -> None:
    differences, _, _ = fit(tmp_path, 2, GradualUnfreeze(PLAN), train_bn=True)
    assert differences == {stage.name: 0.0 for stage in PLAN}


@needs_fork
@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:Found .* module")
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_ddp__the_check_sees_backbone_finetuning_drift(tmp_path: Path) -> None:
    """Lightning issue #20340: what is unfrozen after the wrapping is never reduced."""
    unfreezes = BackboneFinetuning(unfreeze_backbone_at_epoch=2, train_bn=False, backbone_initial_lr=0.05)
    differences, _, _ = fit(tmp_path, 2, SimpleHead(), unfreezes)
    assert [differences[epoch] for epoch in ("0", "1")] == [0.0, 0.0]
    assert all(differences[epoch] > 1e-4 for epoch in ("2", "3", "4", "5"))


class SimpleHead(Callback):
    """`BackboneFinetuning` adds the backbone's parameters later, and wants them out of the optimizer before."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.configure_optimizers = lambda: torch.optim.SGD(pl_module.head.parameters(), lr=0.1)  # type: ignore[method-assign]


# --- without processes -----------------------------------------------------------------------------------------------


def with_strategy(strategy: Strategy) -> Any:
    return SimpleNamespace(strategy=strategy, world_size=1)


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: object.__new__(DeepSpeedStrategy),  # its constructor wants DeepSpeed to be installed
        FSDPStrategy,
        ModelParallelStrategy,
    ],
    ids=["deepspeed", "fsdp", "model_parallel"],
)
def test_refuse_untested_strategy__names_it_and_those_that_work(strategy: Any) -> None:
    sharded = strategy()
    with pytest.raises(NotImplementedError) as error:
        refuse_untested_strategy(with_strategy(sharded))
    for part in (type(sharded).__name__, "'ddp'", "'ddp_spawn'", "single device"):
        assert part in str(error.value)


def test_refuse_untested_strategy__takes_those_that_work() -> None:
    refuse_untested_strategy(with_strategy(DDPStrategy()))
    refuse_untested_strategy(with_strategy(SingleDeviceStrategy()))


def test_rebuild_ddp__and_gathering_do_nothing_in_one_process() -> None:
    trainer = with_strategy(SingleDeviceStrategy())
    trainer.strategy.model = model = nn.Linear(1, 1)
    rebuild_ddp(trainer)
    assert trainer.strategy.model is model
    assert gather_objects(trainer, {"a": 1}) == [{"a": 1}]
