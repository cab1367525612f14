"""The optimizer's param groups, split by layer group, and the rate that each of them gets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_unfreeze.layers.groups import LayerGroup


def rate_ratios(
    groups: Sequence[str], lr_mult: float | Sequence[float] = 1.0, lr_span: float | None = None
) -> dict[str, float]:
    """The factor of each layer group on the stage's learning rate (Howard & Ruder 2018, section 3.2).

    Args:
        groups: All group names, input first; frozen ones count too, so a group has one ratio in every stage.
        lr_mult: Factor from one group to the next one towards the input, the last group has 1; or one per group.
        lr_span: Instead of `lr_mult`: factor of the first group, those between lie on a geometric ramp up to 1.

    Raises:
        ValueError: If a list does not have one factor per group.

    Example:
        >>> rate_ratios(["stem", "layer1", "head"], 0.1)["layer1"]
        0.1
        >>> rate_ratios(["stem", "layer1", "head"], lr_span=1 / 9)["layer1"]
        0.3333333333333333
    """
    if lr_span is not None:
        steps = max(1, len(groups) - 1)
        return {name: lr_span ** ((len(groups) - 1 - index) / steps) for index, name in enumerate(groups)}
    if isinstance(lr_mult, int | float):
        return {name: lr_mult ** (len(groups) - 1 - index) for index, name in enumerate(groups)}
    if len(lr_mult) != len(groups):
        raise ValueError(
            f"lr_mult has {len(lr_mult)} factors, and there are {len(groups)} layer groups: {', '.join(groups)}; "
            "give one per group, input first, or one number"
        )
    return dict(zip(groups, lr_mult, strict=True))


def split_param_groups(
    param_groups: Sequence[Mapping[str, Any]], groups: Mapping[str, LayerGroup], defaults: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[int]]:
    """Splits an optimizer's param groups by layer group.

    All options of a param group are kept (decay and no decay stay apart). Each new one has `"layer_group"` and a unique
    `"name"`: the layer group's, after that of the user's param group where it had one. Parameters that the optimizer
    does not have yet become param groups with its defaults. Nothing that is passed is changed.

    Args:
        param_groups: `optimizer.param_groups`.
        groups: What `layer_groups` gave; parameters outside the module go with the last group.
        defaults: `optimizer.defaults`.

    Returns:
        The new param groups, and for each the index of the one it came from; `len(param_groups)` for those added.
    """
    group_of = {parameter: group.name for group in groups.values() for parameter in group}
    held = {parameter for param_group in param_groups for parameter in param_group["params"]}
    missing = [(n, p) for group in groups.values() for n, p in group.named_parameters() if p not in held]
    added: dict[str, Any] = {**defaults, "params": [parameter for _, parameter in missing]}
    if any("param_names" in param_group for param_group in param_groups):
        added["param_names"] = [name for name, _ in missing]

    last = list(groups)[-1]
    split: list[dict[str, Any]] = []
    parents: list[int] = []
    names: set[str] = set()
    for parent, param_group in enumerate([*param_groups, added]):
        members: dict[str, list[int]] = defaultdict(list)
        for index, parameter in enumerate(param_group["params"]):
            members[group_of.get(parameter, last)].append(index)
        for layer_group in (name for name in groups if name in members):
            name = f"{param_group['name']}/{layer_group}" if param_group.get("name") else layer_group
            if name in names:
                name = f"{name}/{parent}"
            names.add(name)
            # a tensor learning rate is written in place by its optimizer: no two groups may share one
            options = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in param_group.items()}
            for per_parameter in {"params", "param_names"} & options.keys():
                options[per_parameter] = [param_group[per_parameter][index] for index in members[layer_group]]
            split.append({**options, "name": name, "layer_group": layer_group})
            parents.append(parent)
    return split, parents
