"""Replicas stay equal, and equal to one process; the same check sees Lightning's own callback drift.

The processes are forked from the test, so they import nothing again; results come back through files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_unfreeze.callbacks.base import StageCallback
from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage
from lightning_unfreeze.callbacks.precompute import PrecomputeFeatures
from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.snapshots import BestWeights
from lightning_unfreeze.callbacks.tta import TTAEval
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.inside_lightning.distributed import gather_objects, rebuild_ddp, refuse_untested_strategy
from lightning_unfreeze.inside_lightning.weights import average_of
from lightning_unfreeze.stages.plan import Stage
from tests.processes import needs_fork
from tests.zoo import (
    UserModule,
    keyed_loader,
    loader,
    quiet_trainer,
    random_images,
    same_weights,
    steady_module,
    weights_of,
)

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
    if not torch.distributed.is_initialized():
        return 0.0
    everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, mine)
    return max(float((other - everyone[0]).abs().max()) for other in everyone)


# by the number of ranks
DDP_OPTIONS: dict[int, dict[str, bool]] = {2: {}, 3: {"gradient_as_bucket_view": True, "static_graph": True}}


class WritesDown(StageCallback):
    """Differences between ranks after each stage (each epoch without stages), the final weights, what each rank saw."""

    order = 95

    def __init__(self, folder: Path) -> None:
        self.folder, self.differences, self.reduced = folder, {}, {}  # type: ignore[var-annotated]
        self.rates: dict[str, list[list[float]]] = {}
        self.metrics: dict[str, dict[str, float]] = {}

    def on_stage_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        if self.run is not None and self.run.planned:
            self.differences[stage.name] = ranks_differ_by(pl_module)
            self.metrics[stage.name] = tta_metrics(trainer.callback_metrics)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.run is not None and not self.run.planned:
            self.differences[str(trainer.current_epoch)] = ranks_differ_by(pl_module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if self.run is None:
            return
        self.rates.setdefault(self.run.stage.name, []).append([group["lr"] for group in optimizer.param_groups])
        counts = getattr(trainer.strategy, "reduced", None)
        if counts is not None:
            self.reduced.setdefault(self.run.stage.name, set()).add(sum(counts))
            counts.clear()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.differences["end"] = ranks_differ_by(pl_module)
        reduced = {name: sorted(sizes) for name, sizes in self.reduced.items()}
        seen = {"differences": self.differences, "reduced": reduced, "rates": self.rates, "metrics": self.metrics}
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))
        if trainer.is_global_zero:
            torch.save(weights_of(pl_module), self.folder / "weights.pt")


def tta_metrics(logged: Any) -> dict[str, float]:
    return {name: float(value) for name, value in logged.items() if "_tta" in name or "_plain" in name}


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


class Module(UserModule):
    test_step = UserModule.validation_step


def fit(
    folder: Path,
    num_ranks: int,
    *callbacks: Callback,
    strategy: Any = None,
    train_bn: bool = False,
    dataset: Any = None,
    val: Any = None,
    max_epochs: int = -1,
) -> SimpleNamespace:
    torch.manual_seed(0)
    module = steady_module(train_bn, Module)
    options: dict[str, Any] = {}
    if num_ranks > 1:
        ddp = DDPStrategy(start_method="fork", process_group_backend="gloo", **DDP_OPTIONS[num_ranks])
        options = {"strategy": strategy or ddp, "devices": num_ranks}
    trainer = quiet_trainer([*callbacks, WritesDown(folder)], max_epochs=max_epochs, **options)
    trainer.fit(module, keyed_loader(dataset, 12 // num_ranks), val)
    first, *others = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_ranks))
    for other in others:  # the same rates and the same metrics on every rank, to the last digit
        assert other == first
    return SimpleNamespace(**first, weights=torch.load(folder / "weights.pt"), trainer=trainer, module=module)


def assert_same_weights(many: SimpleNamespace, one: SimpleNamespace) -> None:
    for name, value in one.weights.items():
        torch.testing.assert_close(many.weights[name], value, rtol=0, atol=1e-6, msg=name)


def no_differences(plan: list[Stage]) -> dict[str, float]:
    return {**{stage.name: 0.0 for stage in plan}, "end": 0.0}


@needs_fork
@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:Found .* module")  # Lightning, about BatchNorm that the module keeps in eval mode
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ddp__replicas_stay_equal_and_equal_one_process(num_ranks: int, tmp_path: Path) -> None:
    strategy = CountingDDP(start_method="fork", **DDP_OPTIONS[num_ranks])
    many = fit(tmp_path / "many", num_ranks, GradualUnfreeze(PLAN), strategy=strategy)
    assert many.differences == no_differences(PLAN)
    # the user's hook saw, in every step, exactly what trains
    assert many.reduced == {name: [size] for name, size in SIZES.items()}
    assert_same_weights(many, fit(tmp_path / "one", 1, GradualUnfreeze(PLAN)))


@needs_fork
@pytest.mark.ddp
def test_ddp__buffers_are_equal_after_every_stage_where_batch_norm_trains(tmp_path: Path) -> None:
    many = fit(tmp_path, 2, GradualUnfreeze(PLAN), train_bn=True)
    assert many.differences == no_differences(PLAN)


# --- a sampler of the user's -----------------------------------------------------------------------------------------


class Shuffles(Sampler[int]):
    """Draws from the global generator, as most samplers that people write."""

    def __init__(self, num: int, share: bool) -> None:
        self.num, self.share = num, share

    def __len__(self) -> int:
        return self.num // (2 if self.share else 1)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.num).tolist()
        return iter(order[torch.distributed.get_rank() :: 2] if self.share else order)


class Batches(Shuffles):
    """A sampler of whole batches, which shares them out itself."""

    def __iter__(self) -> Any:
        mine = list(super().__iter__())
        return iter([mine[at : at + 4] for at in range(0, len(mine), 4)])

    def __len__(self) -> int:
        return super().__len__() // 4


class SeesRows(Callback):
    """Rows of each epoch, over all ranks; and whether the ranks drew the same noise."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows, self.found, self.noise = folder, [], [], []  # type: ignore[var-annotated]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rows += batch[0][:, 0, 0, 0].int().tolist()
        self.noise.append(float(torch.rand(1)))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        everyone = gather_objects(trainer, (self.rows, self.noise))
        self.found.append(sorted(row for rows, _ in everyone for row in rows))
        assert everyone[0][1] != everyone[1][1]
        self.rows = []

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(exist_ok=True)
            (self.folder / "rows.json").write_text(json.dumps(self.found))


@needs_fork
@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:Found .* module")
@pytest.mark.parametrize("kind", ["wrapped by Lightning", "shares itself", "shares batches"])
def test_ddp__a_sampler_of_the_users_is_drawn_once(kind: str, tmp_path: Path) -> None:
    """Every sample is seen once an epoch, while everything else that is drawn differs between the ranks."""
    images, labels = random_images(32).tensors
    images[:, 0, 0, 0] = torch.arange(32.0)
    data = TensorDataset(images, labels)
    if kind == "shares batches":
        train = DataLoader(data, batch_sampler=Batches(32, share=True))  # type: ignore[arg-type]
    else:
        train = DataLoader(data, 4, sampler=Shuffles(32, share=kind == "shares itself"))
    ddp = DDPStrategy(start_method="fork", process_group_backend="gloo")
    plan = GradualUnfreeze([Stage("head", train="head", epochs=2), Stage("full", epochs=1)])
    trainer = quiet_trainer(
        [plan, SeesRows(tmp_path / "seen")],
        strategy=ddp,
        devices=2,
        use_distributed_sampler=kind == "wrapped by Lightning",
    )
    trainer.fit(steady_module(kind=Module), train)
    assert json.loads((tmp_path / "seen" / "rows.json").read_text()) == [list(range(32))] * 3


# --- which weights are the best --------------------------------------------------------------------------------------


class Leaves(Callback):
    """What the fit leaves on each rank, when all callbacks are done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        average, each = average_of(trainer), [c for c in trainer.callbacks if isinstance(c, BestWeights)]  # type: ignore[attr-defined]
        left = {
            "weights": weights_of(pl_module),
            "average": {} if average is None else weights_of(average),
            "epochs": trainer.current_epoch,
            "scores": each[0].scores if each else {},
            "best": str(each[0].best_path) if each else "",
        }
        torch.save(left, self.folder / f"left{trainer.global_rank}.pt")


def left_by(folder: Path, kind: type[UserModule], *callbacks: Callback, val: Any) -> list[dict[str, Any]]:
    """Of a fit on two ranks, by rank."""
    torch.manual_seed(0)
    trainer = quiet_trainer(
        [*callbacks, Leaves(folder)],
        strategy=DDPStrategy(start_method="fork", process_group_backend="gloo"),
        devices=2,
        enable_checkpointing=True,
        default_root_dir=folder,
    )
    trainer.fit(steady_module(kind=kind), keyed_loader(batch_size=6), val)
    return [torch.load(folder / f"left{rank}.pt") for rank in range(2)]


@needs_fork
@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:Found .* module")
@pytest.mark.filterwarnings("ignore:.*recommended to use .*sync_dist=True")
def test_ddp__ranks_choose_the_same_best_weights(tmp_path: Path) -> None:
    """Each rank logs the loss of its own half, which is another one; what is compared is that of all."""
    images = random_images(16, seed=1)
    plan = [Stage("head", train="head", epochs=1, lr=0.05), Stage("full", lr=0.3, cycle_len=1, num_cycles=3)]
    saves, best = ModelCheckpoint(tmp_path / "files"), BestWeights()
    first, second = left_by(
        tmp_path, UserModule, GradualUnfreeze(plan), CosineRestarts(), best, saves, val=loader(images)
    )
    assert len(first["scores"]) >= 9
    assert second["scores"] == first["scores"] and second["best"] == first["best"]
    assert same_weights(first["weights"], second["weights"]) == []

    def loss_of(weights: dict[str, torch.Tensor]) -> float:
        module = steady_module()
        module.load_state_dict(weights)
        with torch.no_grad():
            return float(nn.functional.cross_entropy(module.eval().net(images.tensors[0]), images.tensors[1]))

    assert first["scores"]["as the fit left them"] == pytest.approx(loss_of(first["weights"]), rel=1e-5)
    kept = torch.load(first["best"], weights_only=True)["state_dict"]
    assert min(first["scores"].values()) == pytest.approx(loss_of(kept), rel=1e-5)
    halves = [loss_of_half(kept, images, rank) for rank in range(2)]
    assert abs(halves[0] - halves[1]) > 0.01  # one rank's alone would be another number


def loss_of_half(weights: dict[str, torch.Tensor], images: TensorDataset, rank: int) -> float:
    """Of the rows that Lightning's sampler gives a rank."""
    module = steady_module()
    module.load_state_dict(weights)
    x, y = (tensor[rank::2] for tensor in images.tensors)
    with torch.no_grad():
        return float(nn.functional.cross_entropy(module.eval().net(x), y))


@needs_fork
@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:Found .* module")
@pytest.mark.filterwarnings("ignore:.*recommended to use .*sync_dist=True")
@pytest.mark.parametrize("averaged", [False, True], ids=["weights", "moving average"])
def test_ddp__ranks_go_back_to_the_same_cycle_end_with_the_average_beside_it(averaged: bool, tmp_path: Path) -> None:
    """Rank 0 alone would stop after the second cycle, rank 1 never; the mean of both is the least after the second."""

    class Differs(UserModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            mine = [3.0, 3.5, 4.0, 5.0] if self.global_rank == 0 else [3.0, 2.0, 1.9, 1.8]
            self.log("val_loss", mine[self.current_epoch], sync_dist=False)

    def run(folder: Path, num_cycles: int, until: Any) -> list[dict[str, Any]]:
        plan = [Stage("full", lr=0.1, cycle_len=1, num_cycles=num_cycles, until=until)]
        beside = [EMAWeightAveraging(decay=0.5)] if averaged else []
        folder.mkdir()
        players = [GradualUnfreeze(plan, train_bn=False), CosineRestarts(), *beside]
        return left_by(folder, Differs, *players, val=loader(random_images(8)))

    first, second = run(tmp_path / "until", 4, "overfit")
    assert first["epochs"] == second["epochs"] == 3
    for name in ("weights", "average"):
        assert same_weights(first[name], second[name]) == []
    # the plan cut after the second cycle ends with these very weights
    short, _ = run(tmp_path / "short", 2, None)
    assert same_weights(first["weights"], short["weights"]) == []
    assert bool(first["average"]) == averaged


# --- all pieces together ---------------------------------------------------------------------------------------------

RECIPE = [
    Stage("head_on_features", train="head", epochs=2, precompute=True, lr="find"),
    Stage("top", train=2, lr=0.1, lr_mult=0.5, cycle_len=1, num_cycles=2),
    Stage("full", lr="find", lr_mult=0.5, cycle_len=1, cycle_mult=2, num_cycles=3, until="overfit"),
]


def telling_images(num: int, seed: int) -> TensorDataset:
    """Images whose class can be seen, so that a range test has a signal."""
    images, labels = random_images(num, seed=seed).tensors
    images[torch.arange(num), labels] += 1.5
    return TensorDataset(images, labels)


def fit_recipe(folder: Path, num_ranks: int) -> SimpleNamespace:
    """The fit, then validation and test, which start processes of their own."""
    val = loader(telling_images(96, seed=1), batch_size=16)
    pieces = [
        GradualUnfreeze(RECIPE, train_bn=False),
        PrecomputeFeatures(folder / "feature_store", policy="always"),
        LRFinderPerStage(1e-4, 10.0, num_steps=40),
        CosineRestarts(min_delta=10.0),  # more than any gain: the last stage ends after its second cycle
        TTAEval("d4"),
    ]
    run = fit(folder, num_ranks, *pieces, dataset=telling_images(48, seed=0), val=val)
    for kind in ("validate", "test"):
        (logged,) = getattr(run.trainer, kind)(run.module, val, verbose=False)
        run.metrics[kind] = tta_metrics(logged)
    return run


@needs_fork
@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found .* module")
@pytest.mark.filterwarnings("ignore:.*recommended to use .*sync_dist=True")
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ddp__all_pieces_together_equal_one_process(num_ranks: int, tmp_path: Path) -> None:
    many, one = fit_recipe(tmp_path / "many", num_ranks), fit_recipe(tmp_path / "one", 1)
    assert many.differences == no_differences(RECIPE)
    assert_same_weights(many, one)
    # in each of the four steps of an epoch; a range test gives one of its 40 rates, the next is 1.3 times as high
    assert {name: len(rates) for name, rates in one.rates.items()} == {"head_on_features": 8, "top": 8, "full": 12}
    for name, rates in one.rates.items():
        torch.testing.assert_close(torch.tensor(many.rates[name]), torch.tensor(rates), rtol=1e-6, atol=0)
    assert many.metrics.keys() == one.metrics.keys()
    for name, metrics in one.metrics.items():
        assert many.metrics[name] == pytest.approx(metrics, rel=1e-5, abs=1e-6), name
    # nothing was left out: features were stored, both range tests had a signal, the views changed predictions
    for folder in ("many", "one"):
        for split in ("train", "val"):
            assert len(list((tmp_path / folder / "feature_store").glob(f"*-{split}"))) == 1
    assert 0.05 not in (one.rates["head_on_features"][0][-1], one.rates["full"][0][-1])
    assert one.metrics["head_on_features"] == {}
    for name, prefix in {"full": "val", "validate": "val", "test": "test"}.items():
        assert one.metrics[name][f"{prefix}_tta_fixed"] + one.metrics[name][f"{prefix}_tta_broken"] > 0


@needs_fork
@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:Found .* module")
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_ddp__the_check_sees_backbone_finetuning_drift(tmp_path: Path) -> None:
    """Lightning issue #20340: what is unfrozen after the wrapping is never reduced."""
    unfreezes = BackboneFinetuning(unfreeze_backbone_at_epoch=2, train_bn=False, backbone_initial_lr=0.05)
    differences = fit(tmp_path, 2, SimpleHead(), unfreezes, max_epochs=6).differences
    assert [differences[epoch] for epoch in ("0", "1")] == [0.0, 0.0]
    assert all(differences[epoch] > 1e-4 for epoch in ("2", "3", "4", "5", "end"))


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
