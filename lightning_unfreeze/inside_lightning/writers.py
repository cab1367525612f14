"""Who else writes what the conductor writes: seen before each step, found by what users' code mentions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_unfreeze.layers.groups import LayerGroup
from lightning_unfreeze.layers.modes import FrozenModes

FREEZING = frozenset({"requires_grad", "requires_grad_", "freeze", "unfreeze"})
ADDING = frozenset({"add_param_group"})
MODES = frozenset({"train", "training"})
RATES = frozenset({"param_groups", "lr_schedulers"})
# these only make what the plan then sets, or are called on purpose
_BEFORE_THE_FIT = frozenset({"__init__", "configure_optimizers", "configure_model", "layer_groups", "setup"})
_NOT_THE_USERS = ("lightning.", "pytorch_lightning.", "lightning_unfreeze.", "torch.", "timm.", "transformers.")


def writers_of(words: Collection[str], trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
    """The methods of the module and of the user's callbacks whose code mentions one of `words`, as one phrase."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    found = [name for owner in (pl_module, *callbacks) for name in _mentioning(type(owner), words)]
    return " or ".join(dict.fromkeys(found)) or f"a hook of {type(pl_module).__name__} or a callback"


def _mentioning(kind: type, words: Collection[str]) -> Iterator[str]:
    for base in kind.__mro__:
        if f"{base.__module__}.".startswith(_NOT_THE_USERS):
            continue
        for name, value in vars(base).items():
            is_function = isinstance(value, FunctionType) and name not in _BEFORE_THE_FIT
            if is_function and not _names_in(value.__code__).isdisjoint(words):
                yield f"{kind.__name__}.{name}"


def _names_in(code: CodeType) -> set[str]:
    """Attributes and global names that a function uses, those of the functions inside it too."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def check_rates(trainer: pl.Trainer, pl_module: pl.LightningModule, stage_name: str) -> None:
    """Whether the rates in force are those that were written last.

    Raises:
        MisconfigurationException: Where something else wrote one; it names the writer.
    """
    for group in trainer.optimizers[0].param_groups:
        rate, planned = group["lr"], group.get("planned_lr")
        if planned is not None and rate != planned and not isinstance(rate, Tensor):
            raise MisconfigurationException(
                f"stage {stage_name!r}: the learning rate of {group.get('name', 'the optimizer')!r} is {rate:.4g}, and "
                f"the stage set {planned:.4g}; written by {writers_of(RATES, trainer, pl_module)}: two writers of one "
                "quantity; take it out there, or leave lr, lr_mult and cycles out of the stages"
            )


class PlanWatch:
    """Compares, before each optimizer step, what is in force with what the plan set: cheap enough for every step."""

    def __init__(
        self, groups: Mapping[str, LayerGroup], stage_name: str, trained: Collection[str], modes: FrozenModes
    ) -> None:
        self.groups, self.stage_name, self.trained, self.modes = groups, stage_name, trained, modes
        self.parameters = [parameter for group in groups.values() for parameter in group]
        self.planned = [parameter.requires_grad for parameter in self.parameters]
        self._before_first_backward = True

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a backward pass and before its step.

        Raises:
            MisconfigurationException: Where something else set what trains, or a rate; it names the writer.
        """
        if [parameter.requires_grad for parameter in self.parameters] != self.planned:
            raise MisconfigurationException(
                f"stage {self.stage_name!r}: {self._changed()}, against the plan; written by "
                f"{writers_of(FREEZING, trainer, pl_module)}: two writers of one quantity; express it as stages, and "
                "take it out there"
            )
        if any("layer_group" not in group for group in trainer.optimizers[0].param_groups):
            raise MisconfigurationException(
                f"stage {self.stage_name!r}: a param group was added to the optimizer while it trains, by "
                f"{writers_of(ADDING, trainer, pl_module)}; give all parameters to the optimizer in "
                "`configure_optimizers`, the stages choose what trains"
            )
        check_rates(trainer, pl_module, self.stage_name)
        # a step without a loss (None) has no backward pass to judge by
        if self._before_first_backward and any(parameter.grad is not None for parameter in self.parameters):
            self._before_first_backward = False
            if self.modes.slipped():
                rank_zero_warn(
                    f"stage {self.stage_name!r}: frozen modules are in training mode after a step; set by "
                    f"{writers_of(MODES, trainer, pl_module)}: their BatchNorm and dropout may have been at work; take "
                    "`train()` out there"
                )
            self._say_what_got_no_gradient()

    def _changed(self) -> str:
        on = {p for p, planned in zip(self.parameters, self.planned, strict=True) if p.requires_grad and not planned}
        off = {p for p, planned in zip(self.parameters, self.planned, strict=True) if planned and not p.requires_grad}
        parts = []
        for what, changed in (("train", on), ("are frozen", off)):
            names = [name for name, group in self.groups.items() if not changed.isdisjoint(group)]
            parts += [f"{len(changed)} parameters of {', '.join(names)} {what}"] if changed else []
        return " and ".join(parts)

    def _say_what_got_no_gradient(self) -> None:
        silent = []
        for name in self.trained:
            parameters = [parameter for parameter in self.groups[name] if parameter.requires_grad]
            if parameters and all(parameter.grad is None for parameter in parameters):
                silent.append(name)
        if silent:
            rank_zero_warn(
                f"stage {self.stage_name!r} trains {', '.join(silent)} by plan, and its first backward pass gave no "
                "gradient there: does the module's forward use torch.no_grad() or detach(), or leave these layers out?"
            )
