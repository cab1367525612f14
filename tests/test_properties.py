"""Random plans: what trains, at which rate, for how many steps, against a simulation of 40 lines."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.stages.plan import Stage
from tests.zoo import loader, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")

GROUPS = ["a", "b", "c", "head"]
GIVEN = {"a": 0.5, "b": 0.25, "c": 0.125, "head": 1.0}


class FourLayers(pl.LightningModule):
    """Four numbers, each a layer group; the optimizer knows them in two groups of the user's, and not in order."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in GROUPS})

    def layer_groups(self) -> dict[str, nn.Module]:
        return dict(self.layers.items())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return sum(layer(batch[0]).sum() for layer in self.layers.values())  # type: ignore[return-value]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [{"params": self.layers[name].parameters(), "lr": GIVEN[name]} for name in ("head", "a", "c", "b")]
        return torch.optim.SGD(groups, lr=1.0)


class Seen(Callback):
    """(epoch, group -> rate of what trains) of every optimizer step, looked at inside the step itself."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, dict[str, float]]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        name_of = {id(layer.weight): name for name, layer in pl_module.layers.items()}
        rates = {
            name_of[id(parameter)]: float(group["lr"])
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and parameter.requires_grad
        }
        self.steps.append((trainer.current_epoch, rates))


# --- the simulation, from the documentation of `Stage` alone ---------------------------------------------------------


def trained(train: Any) -> list[str]:
    if train == "all":
        return GROUPS
    if train == "head":
        return GROUPS[-1:]
    return GROUPS[len(GROUPS) - train :] if isinstance(train, int) else [name for name in GROUPS if name in train]


def simulate(plan: list[dict[str, Any]], num_batches: int, accumulate: int) -> list[tuple[int, dict[str, float]]]:
    steps: list[tuple[int, dict[str, float]]] = []
    steps_of_epoch = math.ceil(num_batches / accumulate)
    epoch = 0
    for row in plan:
        ends: list[Fraction] = []  # of the cycles, in epochs
        if "cycle_len" in row:
            length = Fraction(row["cycle_len"])
            for _ in range(row.get("num_cycles", 1)):
                ends.append((ends[-1] if ends else Fraction(0)) + length)
                length *= Fraction(row.get("cycle_mult", 1))
        epochs = row["epochs"] if "epochs" in row else math.ceil(ends[-1])
        if ends:
            ends[-1] = Fraction(epochs)  # the last cycle goes on to the end of its epoch
        for step in range(epochs * steps_of_epoch):
            share = 1.0
            start = Fraction(0)
            for end in ends:
                if Fraction(step, steps_of_epoch) < end:
                    share = (1 + math.cos(math.pi * (Fraction(step, steps_of_epoch) - start) / (end - start))) / 2
                    break
                start = end
            rates = {}
            for place, name in enumerate(GROUPS):
                mult = row.get("lr_mult", 1.0)
                factor = mult[place] if isinstance(mult, list) else mult ** (len(GROUPS) - 1 - place)
                if name in trained(row["train"]):
                    rates[name] = (row.get("lr", GIVEN["head"]) * GIVEN[name] / GIVEN["head"]) * factor * share
            steps.append((epoch + step // steps_of_epoch, rates))
        epoch += epochs
    return steps


# --- random plans ----------------------------------------------------------------------------------------------------

# cycles that end inside an epoch, on its end, and inside an accumulation window
LENGTHS = st.one_of(
    st.fixed_dictionaries({"epochs": st.integers(1, 3)}),
    st.fixed_dictionaries(
        {
            "cycle_len": st.sampled_from([1, 2, 0.5, 1.5, 0.75]),
            "cycle_mult": st.sampled_from([1, 2, 0.5, 1.5]),
            "num_cycles": st.integers(1, 3),
        }
    ),
)
ROWS = st.builds(
    lambda options, length, rates: {**options, **length, **rates},
    st.fixed_dictionaries(
        {
            "train": st.one_of(
                st.sampled_from(["head", "all"]),
                st.integers(1, len(GROUPS)),
                st.lists(st.sampled_from(GROUPS), min_size=1, unique=True),
            )
        }
    ),
    LENGTHS,
    st.fixed_dictionaries(
        {},
        optional={
            "lr": st.sampled_from([0.1, 3e-3, 1]),
            "lr_mult": st.one_of(
                st.sampled_from([1.0, 1 / 3, 0.1, 0.5]),
                st.lists(st.sampled_from([0.01, 0.3, 1.0]), min_size=len(GROUPS), max_size=len(GROUPS)),
            ),
        },
    ),
)


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(ROWS, min_size=1, max_size=5), num_batches=st.integers(1, 4), accumulate=st.integers(1, 3))
def test_plan__trains_what_and_as_fast_and_as_long_as_the_simulation(
    rows: list[dict[str, Any]], num_batches: int, accumulate: int
) -> None:
    stages = [Stage(f"stage {index}", **row) for index, row in enumerate(rows)]
    seen = Seen()
    trainer = quiet_trainer(
        [seen, CosineRestarts(), GradualUnfreeze(stages)], accumulate_grad_batches=accumulate, enable_progress_bar=False
    )
    trainer.fit(FourLayers(), loader(TensorDataset(torch.ones(num_batches, 1)), batch_size=1))
    expected = simulate(rows, num_batches, accumulate)
    assert [epoch for epoch, _ in seen.steps] == [epoch for epoch, _ in expected]
    for (_, rates), (_, simulated) in zip(seen.steps, expected, strict=True):
        assert rates == pytest.approx(simulated, rel=1e-9, abs=1e-12)
    assert trainer.max_epochs == trainer.current_epoch == expected[-1][0] + 1
    assert [stage.num_epochs for stage in stages] == [len(simulate([row], 1, 1)) for row in rows]
