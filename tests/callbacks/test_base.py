"""The conductor is found by its type, and players need to call nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from lightning_unfreeze.callbacks.base import Conductor, StageCallback, conductor
from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage
from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.stages.plan import Stage
from tests.zoo import Raises, SmallNet, UserModule, loader, quiet_trainer, same_weights, weights_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:.*no signal in the range test"),
]
PLAN = [Stage("head", train="head", epochs=1, lr=0.1), Stage("full", epochs=2, lr=0.02, cycle_len=2)]
# every hook of Lightning's that a callback may have, and ours
HOOKS = sorted(name for name in vars(Callback) if name.startswith(("on_", "setup", "teardown")))


class Told(StageCallback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def preflight(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stages: Sequence[Stage]) -> None:
        self.told.append(f"plan {[stage.name for stage in stages]} at step {trainer.global_step}")

    def on_stage_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        assert self.run is not None
        self.told.append(f"start {stage.name} of {self.run.index} at epoch {trainer.current_epoch}")

    def on_stage_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        self.told.append(f"end {stage.name} at epoch {trainer.current_epoch}")

    def wants_to_end_stage(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> bool:
        return False


# overrides every hook there is, and calls `super()` in none of them
Silent: Any = type("Silent", (Told,), {name: lambda self, *arguments, **options: None for name in HOOKS})


class Mixin(Callback):
    """A callback of the user's own, put before ours by inheritance."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing."""


class Mixed(Mixin, StageCallback):
    """Its `setup` is another class's."""

    started = 0

    def on_stage_start(self, *_: Any) -> None:
        self.started += 1


class Inherits(Silent):  # type: ignore[misc]
    """A grandchild, which overrides `setup` once more."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing."""


def fit(*callbacks: Callback, **options: Any) -> tuple[pl.Trainer, UserModule]:
    torch.manual_seed(0)
    module = UserModule(SmallNet())
    trainer = quiet_trainer(list(callbacks), **options)
    trainer.fit(module, loader(), loader())
    return trainer, module


@pytest.mark.parametrize("order", [50, 0, -5])
@pytest.mark.parametrize("kind", [Silent, Inherits])
@pytest.mark.parametrize("first", [True, False])
def test_players__of_any_order_and_without_super_leave_the_plan_as_it_is(order: int, kind: Any, first: bool) -> None:
    ours = [GradualUnfreeze(PLAN), CosineRestarts()]
    _, expected = fit(*ours)
    player = type("Mine", (kind,), {"order": order})()
    ours = [GradualUnfreeze(PLAN), CosineRestarts()]
    _, module = fit(*([player, *ours] if first else [*ours, player]))
    assert same_weights(weights_of(expected), weights_of(module)) == []
    assert player.told == [
        "plan ['head', 'full'] at step 0",
        "start head of 0 at epoch 0",
        "end head at epoch 0",
        "start full of 1 at epoch 1",
        "end full at epoch 2",
    ]
    assert player.run is None


@pytest.mark.parametrize("kind", [Silent, Inherits])
def test_players__without_a_plan_hear_of_one_stage(kind: Any) -> None:
    player = kind()
    trainer, _ = fit(player, max_epochs=3)
    assert player.told == ["plan ['fit'] at step 0", "start fit of 0 at epoch 0", "end fit at epoch 2"]
    assert trainer.callbacks[0] is player  # the conductor came with the fit and went with it
    assert not any(isinstance(callback, Conductor) for callback in trainer.callbacks)
    player.told.clear()
    trainer.fit_loop.max_epochs = 4
    trainer.fit(trainer.lightning_module, loader())
    assert player.told == ["plan ['fit'] at step 9", "start fit of 0 at epoch 3", "end fit at epoch 3"]


def test_players__whose_setup_is_another_classs_are_told_too() -> None:
    player = Mixed()
    fit(player, max_epochs=1)
    assert player.started == 1


def test_players__work_alone_beside_one_that_overrides_everything() -> None:
    """The finder is told, and the rates of the cycles are written, whoever stands before them."""
    finder = LRFinderPerStage(num_steps=20)
    fit(Silent(), finder, CosineRestarts(), max_epochs=1)
    assert list(finder.results) == ["fit"]


def test_conductor__leaves_after_an_error_too() -> None:
    player = Silent()
    trainer = quiet_trainer([player, Raises(1, RuntimeError("on purpose"))], max_epochs=1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="on purpose"):
            trainer.fit(UserModule(SmallNet()), loader(), loader())
        assert [type(callback) for callback in trainer.callbacks[:2]] == [Silent, Raises]
    assert player.told.count("start fit of 0 at epoch 0") == 2


def test_conductor__is_there_in_a_fit_only() -> None:
    trainer = quiet_trainer([Silent()])
    with pytest.raises(RuntimeError, match=r"Trainer\.fit"):
        conductor(trainer)


@pytest.mark.parametrize("options", [{}, {"fast_dev_run": True}, {"num_sanity_val_steps": 2}])
def test_preflight__ends_a_fit_before_anything_ran(options: dict[str, Any]) -> None:
    class Refuses(StageCallback):
        def preflight(self, trainer: pl.Trainer, pl_module: Any, stages: Sequence[Stage]) -> None:
            assert pl_module.trainer is trainer
            assert [group["name"] for group in trainer.optimizers[0].param_groups]  # split by now
            raise MisconfigurationException(f"no such plan: {[stage.name for stage in stages]}")

    class Counts(UserModule):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            raise AssertionError

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise AssertionError

    trainer = quiet_trainer([Refuses(), GradualUnfreeze(PLAN), CosineRestarts()], **options)
    with pytest.raises(MisconfigurationException, match=r"no such plan: \['head', 'full'\]"):
        trainer.fit(Counts(SmallNet()), loader(), loader())
