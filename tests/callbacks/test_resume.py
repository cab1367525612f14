"""A run that was stopped at any moment and resumed ends bitwise where the uninterrupted one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer

from lightning_unfreeze.callbacks.base import StageCallback
from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage
from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.data.loaders import EpochSampler, KeyedDataset, ResumableLoader
from lightning_unfreeze.stages.plan import Stage
from tests.zoo import (
    Saves,
    SmallNet,
    UserModule,
    checkpoint_at,
    loader,
    quiet_trainer,
    random_images,
    same_weights,
    weights_of,
)

pytestmark = [
    # Lightning, about a plain loader and about modules that it finds frozen
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Found .* module:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def plan() -> list[Stage]:
    return [
        Stage("head", train="head", epochs=2, lr=1e-2),
        Stage("top", train=2, epochs=1),
        Stage("full", epochs=2, lr=1e-3, lr_mult=1 / 3),
    ]


class States(Callback):
    """The optimizer's state after the last step, by name."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state = trainer.optimizers[0].state
        names = {p: name for name, p in pl_module.named_parameters()}
        self.state = {f"{names[p]}.{key}": value.clone() for p, kept in state.items() for key, value in kept.items()}
        self.rates = [(group["name"], group["lr"]) for group in trainer.optimizers[0].param_groups]


def data(kind: str) -> Any:
    if kind == "plain":
        return loader(random_images(), shuffle=True)
    keyed = KeyedDataset(random_images(), 0)
    return ResumableLoader(keyed, batch_size=8, sampler=EpochSampler(keyed, seed=3))


def run(kind: str, *callbacks: Callback, ckpt: Path | None = None, stages: Any = None, **options: Any) -> Any:
    torch.manual_seed(0 if ckpt is None else 99)  # another process has another random state
    module, states = UserModule(SmallNet()), States()
    conductor = GradualUnfreeze(stages or plan(), **options)
    trainer = quiet_trainer(
        [*callbacks, conductor, states],
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )
    trainer.fit(module, data(kind), loader(), ckpt_path=ckpt)
    return {**weights_of(module), **states.state}, states.rates, trainer


EPOCH_POINTS = [(hook, epoch, None) for hook in ("epoch_end", "validation_end") for epoch in range(4)]
# in the middle and after the last batch, in every stage, also in its first epoch and its last one
BATCH_POINTS = [("batch_end", epoch, batch) for epoch in range(5) for batch in range(3) if (epoch, batch) != (4, 2)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    runs: dict[str, Any] = {"folder": tmp_path_factory.mktemp("checkpoints")}
    for kind in ("plain", "resumable"):
        (runs["folder"] / kind).mkdir()
        runs[kind] = run(kind, Saves(runs["folder"] / kind, *EPOCH_POINTS, *BATCH_POINTS))
        unsaved = run(kind)
        assert same_weights(runs[kind][0], unsaved[0]) == [], "saving changes the run"
    return runs


@pytest.mark.parametrize(
    ("kind", "point"),
    [("plain", point) for point in EPOCH_POINTS] + [("resumable", point) for point in EPOCH_POINTS + BATCH_POINTS],
    ids=str,
)
def test_resume__goes_on_as_if_never_stopped(whole: dict[str, Any], kind: str, point: tuple[str, int, Any]) -> None:
    weights, rates, trainer = run(kind, ckpt=checkpoint_at(whole["folder"] / kind, *point))
    assert same_weights(whole[kind][0], weights) == []
    assert rates == whole[kind][1]
    assert (trainer.current_epoch, trainer.global_step) == (5, 15)


def test_resume__the_check_can_fail(whole: dict[str, Any]) -> None:
    checkpoint = checkpoint_at(whole["folder"] / "plain", "batch_end", 1, 1)  # Lightning draws the order anew
    assert same_weights(whole["plain"][0], run("plain", ckpt=checkpoint)[0]) != []


def test_resume__a_run_that_a_timer_stopped_goes_on_in_its_stage(whole: dict[str, Any], tmp_path: Path) -> None:
    class StopsAt(Timer):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 0

    _, _, trainer = run(
        "plain", StopsAt(), ModelCheckpoint(tmp_path, save_last=True, filename="x", save_on_train_epoch_end=True)
    )
    assert trainer.current_epoch == 1
    assert same_weights(whole["plain"][0], run("plain", ckpt=tmp_path / "last.ckpt")[0]) == []


class EndsEarly(StageCallback):
    def wants_to_end_stage(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> bool:
        return stage.name != "top"


def test_resume__a_run_whose_last_stage_ended_early_is_over(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    weights, _, trainer = run("plain", EndsEarly(), saved)
    assert trainer.current_epoch == 3
    for epoch in (0, 1):
        after, _, resumed = run("plain", EndsEarly(), ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert resumed.current_epoch == 3
        assert same_weights(weights, after) == []
    module = UserModule(SmallNet())
    resumed = quiet_trainer([EndsEarly(), GradualUnfreeze(plan())])
    resumed.fit(module, data("plain"), loader(), ckpt_path=tmp_path / "epoch=2.ckpt")  # nothing is left to do
    assert (resumed.current_epoch, resumed.global_step) == (3, 9)
    final = weights_of(module)
    assert same_weights({name: weights[name] for name in final}, final) == []


# --- another plan ----------------------------------------------------------------------------------------------------


def changed(index: int, **options: Any) -> list[Stage]:
    stages = plan()
    kept = {"train": stages[index].train, "epochs": stages[index].epochs, "lr": stages[index].lr}
    stages[index] = Stage(stages[index].name, **{**kept, "lr_mult": stages[index].lr_mult, **options})
    return stages


@pytest.mark.parametrize(
    ("stages", "parts"),
    [
        (changed(2, lr=0.5), ["full.lr: 0.001 -> 0.5"]),
        (changed(0, epochs=3), ["head.epochs: 2 -> 3"]),
        (changed(1, train=1, lr_mult=0.5), ["top.train: 2 -> 1", "top.lr_mult: 1.0 -> 0.5"]),
        (plan()[:2], ["['head', 'top', 'full'] -> ['head', 'top']"]),
    ],
)
def test_resume__refuses_another_plan_and_shows_the_difference(
    whole: dict[str, Any], stages: list[Stage], parts: list[str]
) -> None:
    with pytest.raises(MisconfigurationException) as error:
        run("plain", ckpt=checkpoint_at(whole["folder"] / "plain", "epoch_end", 0), stages=stages)
    for part in [*parts, "on_plan_change='restage'"]:
        assert part in str(error.value)


def restaged(whole: dict[str, Any], stages: list[Stage]) -> Any:
    ckpt = checkpoint_at(whole["folder"] / "plain", "epoch_end", 0)
    return run("plain", ckpt=ckpt, stages=stages, on_plan_change="restage")


def test_resume__restage_takes_the_new_rates_lengths_and_groups(whole: dict[str, Any]) -> None:
    # a later stage
    _, rates, trainer = restaged(whole, changed(2, lr=0.5, epochs=1))
    assert trainer.current_epoch == 4
    assert dict(rates)["head"] == 0.5
    # the stage that the checkpoint stands in: after one of its two epochs all groups train, at another rate
    everything = changed(0, train="all", lr=0.25, epochs=3)[:1]
    weights, rates, trainer = restaged(whole, everything)
    assert trainer.current_epoch == 3
    assert {rate for _, rate in rates} == {0.25}
    assert weights["net.backbone.0.0.weight.step"] == 2 * 3  # two epochs of three batches were left
    assert weights["net.head.2.weight.step"] == 3 * 3


def test_resume__restage_keeps_going_where_nothing_of_the_stage_changed(whole: dict[str, Any]) -> None:
    weights, _, trainer = restaged(whole, [*plan(), Stage("extra", train="head", epochs=1)])
    assert trainer.current_epoch == 6
    assert weights["net.backbone.0.0.weight.step"] == 2 * 3
    backbone = [name for name in whole["plain"][0] if name.startswith("net.backbone")]
    kept = {name: weights[name] for name in backbone}
    assert same_weights(kept, {name: whole["plain"][0][name] for name in backbone}) == []


@pytest.mark.filterwarnings("ignore:.*no signal:UserWarning")
def test_resume__restage_forgets_what_was_found_in_the_stage_before_it_changed(tmp_path: Path) -> None:
    """The range test is made anew, with the new ratios; cycle ends under other rates judge nothing."""

    def fitted(lr_mult: float, ckpt: Path | None = None, seed: int = 0) -> tuple[LRFinderPerStage, CosineRestarts]:
        torch.manual_seed(seed)
        stages = [Stage("full", lr="find", lr_mult=lr_mult, cycle_len=1, num_cycles=4, until="overfit")]
        finder = LRFinderPerStage(num_steps=20)
        restarts = CosineRestarts()
        trainer = quiet_trainer(
            [
                Saves(tmp_path, ("epoch_end", 0, None)),
                GradualUnfreeze(stages, on_plan_change="restage"),
                finder,
                restarts,
            ]
        )
        trainer.fit(UserModule(SmallNet()), data("resumable"), loader(), ckpt_path=ckpt)
        return finder, restarts

    fitted(1.0)
    saved = torch.load(checkpoint_at(tmp_path, "epoch_end", 0), weights_only=True)
    (state,) = [state for name, state in saved["callbacks"].items() if name.startswith("CosineRestarts")]
    state["cycle_values"]["full"] = [-1e9]  # a cycle end that nothing beats
    torch.save(saved, tmp_path / "changed.ckpt")
    (before,) = [state for name, state in saved["callbacks"].items() if name.startswith("LRFinder")]
    finder, restarts = fitted(0.1, tmp_path / "changed.ckpt", seed=1)
    assert finder.results["full"].losses != before["results"]["full"]["losses"]
    assert -1e9 not in restarts.cycle_values["full"]
    # where nothing changed, both are kept
    finder, restarts = fitted(1.0, tmp_path / "changed.ckpt", seed=1)
    assert finder.results["full"].losses == before["results"]["full"]["losses"]
    assert restarts.cycle_values["full"][0] == -1e9


def test_resume__restage_refuses_a_stage_that_is_gone(whole: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=r"stands in stage 'head'.*\['top', 'full'\]"):
        restaged(whole, plan()[1:])


# --- other checkpoints -----------------------------------------------------------------------------------------------


def test_resume__refuses_a_checkpoint_of_a_plain_run(tmp_path: Path) -> None:
    trainer = quiet_trainer([], max_epochs=1)
    trainer.fit(UserModule(SmallNet()), loader(), loader())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(
        MisconfigurationException, match=r"not written by a run with GradualUnfreeze.*without ckpt_path"
    ):
        run("plain", ckpt=tmp_path / "plain.ckpt")


def test_resume__refuses_another_module(whole: dict[str, Any]) -> None:
    class Extra(UserModule):
        def __init__(self) -> None:
            super().__init__(SmallNet())
            self.scale = torch.nn.Parameter(torch.ones(1))

    trainer = quiet_trainer([GradualUnfreeze(plan())])
    module = Extra()
    module.strict_loading = False
    with pytest.raises(MisconfigurationException, match=r"layer groups differ .*\['head'\]"):
        trainer.fit(module, loader(), loader(), ckpt_path=checkpoint_at(whole["folder"] / "plain", "epoch_end", 0))


def test_resume__checkpoint_loads_without_this_package(whole: dict[str, Any]) -> None:
    path = whole["folder"] / "resumable" / "batch_end-1-1.ckpt"
    content = torch.load(path, weights_only=True)  # tensors and primitives only
    module = UserModule.load_from_checkpoint(path)
    assert same_weights(weights_of(module), content["state_dict"]) == []
    trainer = quiet_trainer([])
    trainer.validate(module, loader(), ckpt_path=path, verbose=False)


def test_resume__evaluation_from_a_checkpoint_leaves_the_module_alone(whole: dict[str, Any]) -> None:
    module = UserModule(SmallNet())
    trainer = quiet_trainer([GradualUnfreeze(plan())])
    path = checkpoint_at(whole["folder"] / "plain", "epoch_end", 0)
    trainer.validate(module, loader(), ckpt_path=path, verbose=False)
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(part.training for part in module.modules())
