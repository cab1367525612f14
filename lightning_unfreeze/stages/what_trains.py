"""What trains in a stage, and at which rates: the plan laid over the layer groups of a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_unfreeze.layers.freezing import fixed_parameters, frozen_modules, select, trained_parameters
from lightning_unfreeze.layers.groups import LayerGroup
from lightning_unfreeze.layers.modes import has_statistics, pretrained_batch_norm
from lightning_unfreeze.layers.param_groups import (
    given_lr,
    layer_group_of,
    own_ratios,
    peak_lr,
    rate_ratios,
    set_peak_lr,
)
from lightning_unfreeze.stages.plan import Stage


@dataclass
class WhatTrains:
    """A plan's stages in terms of one module.

    Attributes:
        groups: All layer groups, input first.
        freeze_below: Groups whose ratio to the head's rate lies below are frozen, whatever a stage names.
        fixed: Parameters that no stage trains: their owner froze them.
    """

    groups: dict[str, LayerGroup] = field(default_factory=dict)
    freeze_below: float | None = None
    fixed: set[nn.Parameter] = field(default_factory=set)

    def ratios(self, stage: Stage) -> dict[str, float]:
        """The factor of each layer group on the rate of `stage`."""
        return rate_ratios(list(self.groups), stage.lr_mult, stage.lr_span)

    def trained(self, stage: Stage) -> list[str]:
        """The layer groups that train in `stage`, input first."""
        ratios = self.ratios(stage)
        return [name for name in select(self.groups, stage.train) if ratios[name] >= (self.freeze_below or 0)]

    def find_fixed(self, module: nn.Module) -> None:
        """Looks for what its owner froze; what an earlier fit found stays: a group that it left frozen hides them."""
        self.fixed = (self.fixed & set(module.parameters())) | fixed_parameters(self.groups)

    def parameters(self, stage: Stage) -> set[nn.Parameter]:
        """The parameters that train in `stage`.

        Raises:
            MisconfigurationException: Where there are none.
        """
        try:
            frozen = {p for name in set(self.groups).difference(self.trained(stage)) for p in self.groups[name]}
            return trained_parameters(self.groups, stage.train, self.fixed | frozen)
        except ValueError as error:
            raise MisconfigurationException(f"stage {stage.name!r}: {error}") from None

    def check(self, stages: Sequence[Stage]) -> None:
        """Holds the stages against the layer groups that there are.

        Raises:
            MisconfigurationException: For a name that no group has, a stage that trains nothing, or one that stores
                features and freezes nothing.
        """
        for stage in stages:
            try:
                chosen = self.trained(stage)
            except ValueError as error:
                raise MisconfigurationException(f"stage {stage.name!r}: {error}") from None
            if not chosen:
                raise MisconfigurationException(
                    f"stage {stage.name!r} trains nothing: the rates of all its layer groups lie below "
                    f"freeze_below={self.freeze_below}; lower it, or raise the stage's ratios"
                )
            first = next(iter(self.groups))
            if stage.precompute and first in chosen:
                raise MisconfigurationException(
                    f"stage {stage.name!r}: precompute=True stores what the frozen part gives, but the first layer "
                    f"group {first!r} trains; set precompute=False or train fewer groups"
                )

    def check_same_groups(self, before: Mapping[str, Sequence[str]]) -> None:
        """Holds the layer groups against those of a checkpoint, as `parameter_names` gave them.

        Raises:
            MisconfigurationException: Naming those that differ.
        """
        ours = self.parameter_names()
        changed = sorted(name for name in {*ours, *before} if ours.get(name) != before.get(name))
        if changed:
            raise MisconfigurationException(
                f"the checkpoint's layer groups differ from the module's in {changed}; resume with the same module"
            )

    def freeze(self, module: nn.Module, stage: Stage, *, train_bn: bool) -> list[nn.Module]:
        """Sets `requires_grad`, and drops gradients of what is frozen; returns the modules to keep in eval mode."""
        trained = self.parameters(stage)
        everything = {parameter for group in self.groups.values() for parameter in group}
        for parameter in everything:
            parameter.requires_grad_(parameter in trained)
            if not parameter.requires_grad:
                parameter.grad = None
        frozen = frozen_modules(module, self.groups, self.trained(stage), everything - trained)
        return frozen if train_bn else [*frozen, *pretrained_batch_norm(module, self.groups)]

    def set_rates(self, param_groups: Sequence[dict[str, Any]], stage: Stage) -> None:
        """Gives each param group its peak: the stage's rate, times its layer group's ratio, times the user's own one.

        The user's own ratio is the rate that `configure_optimizers` gave the param group over that of the last layer
        group; so `lr=None` keeps the given rates, and a number or a range test keeps what lies between them.
        """
        for group, peak in zip(param_groups, self.peaks(param_groups, stage), strict=True):
            set_peak_lr(group, peak)

    def peaks(self, param_groups: Sequence[Mapping[str, Any]], stage: Stage) -> list[float]:
        """The peak of each param group in `stage`, see `set_rates`."""
        chosen, ratios = self.trained(stage), self.ratios(stage)
        peaks = []
        for group, own in zip(param_groups, own_ratios(param_groups, list(self.groups)[-1]), strict=True):
            name = layer_group_of(group)
            peak = stage.lr * own if isinstance(stage.lr, float | int) else given_lr(group)
            # a solved head is scored by an epoch in which nothing moves
            peaks.append(peak * ratios[name] if name in chosen and stage.solve is not True else 0.0)
        return peaks

    def lowest_norm_rate(self, module: nn.Module, param_groups: Sequence[dict[str, Any]], stage: Stage) -> float:
        """The lowest given peak of pretrained BatchNorm's scales; 0 without any, or where a range test will tell."""
        norms = [norm for norm in pretrained_batch_norm(module, self.groups) if has_statistics(norm)]
        scales = {parameter for norm in norms for parameter in norm.parameters()}
        peaks = zip(param_groups, self.peaks(param_groups, stage), strict=True)
        rates = [peak for group, peak in peaks if scales.intersection(group["params"])]
        return 0.0 if stage.lr == "find" else min(rates, default=0.0)

    def said(self, stage: Stage, param_groups: Sequence[Mapping[str, Any]]) -> str:
        """What trains, in words; and at which peak rates, of the `param_groups` that have theirs."""
        trained = self.trained(stage)
        count = sum(p.numel() for name in trained for p in self.groups[name].parameters() if p.requires_grad)
        epochs = f"{stage.num_epochs} epoch{'s' if stage.num_epochs > 1 else ''}"
        below = [name for name in select(self.groups, stage.train) if name not in trained]
        kept = f", keeps {', '.join(below)} frozen (their rates lie below {self.freeze_below:g})" if below else ""
        length = f"{'at most ' if stage.until else ''}{epochs}"
        rates = self._rates_said(stage, param_groups)
        return f"{stage.name!r}: trains {', '.join(trained)} ({count:,} parameters) for {length}{rates}{kept}"

    def _rates_said(self, stage: Stage, param_groups: Sequence[Mapping[str, Any]]) -> str:
        """The highest peak of the first and the last layer group that train; a solved head has none."""
        rates: dict[str, float] = {}
        for group in param_groups:
            name = layer_group_of(group)
            rates[name] = max(peak_lr(group), rates.get(name, 0.0))
        trained = [name for name in self.trained(stage) if name in rates]
        if not trained or stage.solve is True:
            return ""
        first, last = trained[0], trained[-1]
        if rates[first] == rates[last]:
            return f" at lr {rates[last]:.3g}"
        return f" at lr {rates[first]:.3g} ({first}) to {rates[last]:.3g} ({last})"

    def parameter_names(self) -> dict[str, list[str]]:
        """Layer group -> names of its parameters: what a checkpoint of the same module has, too."""
        return {name: [each for each, _ in group.named_parameters()] for name, group in self.groups.items()}
