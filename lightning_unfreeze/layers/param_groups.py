"""The optimizer's param groups, split by layer group, and the rates of each: the only place that knows their keys.

| key of a param group | what it is |
|---|---|
| `layer_group` | name of the layer group that its parameters are in |
| `given_lr` | rate that `configure_optimizers` gave it |
| `peak_lr` | rate that the stage gives it, before any schedule |
| `planned_lr` | rate that was written last by this package; `lr` differs where somebody else wrote |
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_unfreeze.layers.groups import LayerGroup

_TOKENS = ("token", "pos_embed", "position_embedding", "class_embedding")
_SCHEDULERS_LISTS_PER_GROUP = frozenset(
    {"base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums", "base_values"}
)


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


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Param groups for an optimizer: what its weight decay holds for, and what is not to be decayed.

    timm's rule: no decay of biases, norms and all else of one dimension, of what the network's `no_weight_decay()`
    names, and of class tokens and position tables.

    Returns:
        Parameters without a `weight_decay`, so that the optimizer's own holds, and those with 0.

    Example:
        >>> [[tuple(p.shape) for p in group["params"]] for group in decay_groups(nn.Linear(4, 2))]
        [[(2, 4)], [(2,)]]
    """
    listed = {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if callable(getattr(type(part), "no_weight_decay", None))
        for name in part.no_weight_decay()
    }
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        token = any(word in name.rpartition(".")[2] for word in _TOKENS)
        plain = parameter.ndim <= 1 or name.endswith(".bias") or name in listed or token
        (no_decay if plain else decay).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def layer_group_of(group: Mapping[str, Any]) -> str:
    """The layer group of a param group that was split."""
    return str(group["layer_group"])


def given_lr(group: Mapping[str, Any]) -> float:
    """The rate that `configure_optimizers` gave a param group."""
    return float(group["given_lr"])


def own_ratios(param_groups: Sequence[Mapping[str, Any]], last: str) -> list[float]:
    """The given rate of each param group over the highest of the last layer group: the ratios that the user chose.

    >>> groups = [{"layer_group": "stem", "given_lr": 0.25}, {"layer_group": "head", "given_lr": 0.5}]
    >>> own_ratios(groups, "head")
    [0.5, 1.0]
    """
    reference = max((given_lr(group) for group in param_groups if layer_group_of(group) == last), default=0.0)
    return [given_lr(group) / reference if reference > 0 else 1.0 for group in param_groups]


def peak_lr(group: Mapping[str, Any]) -> float:
    """The rate that the stage gives a param group; its own where no stage gave one."""
    return float(group.get("peak_lr", group["lr"]))


def set_peak_lr(group: dict[str, Any], rate: float) -> None:
    """Gives a param group the peak of a stage, and writes it."""
    group["peak_lr"] = rate
    set_lr(group, rate)


def scale_lr(group: dict[str, Any], multiplier: float) -> None:
    """Writes a multiple of the peak; a param group that was added late has its own rate as its peak."""
    group["peak_lr"] = peak_lr(group)
    set_lr(group, group["peak_lr"] * multiplier)


def set_lr(group: dict[str, Any], rate: float) -> None:
    """Writes the rate of a param group; into a tensor in place, since a compiled optimizer holds it."""
    group["planned_lr"] = rate
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def set_momentum(group: dict[str, Any], momentum: float) -> None:
    """Writes the momentum of a param group, or Adam's beta1."""
    if "betas" in group:
        group["betas"] = (momentum, *group["betas"][1:])
    else:
        group["momentum"] = momentum


def trained_rates(param_groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The rate in force of each layer group that trains."""
    rates: dict[str, float] = {}
    for group in param_groups:
        if any(parameter.requires_grad for parameter in group["params"]):
            rates.setdefault(layer_group_of(group), float(group["lr"]))
    return rates


def undo_scheduled_rates(optimizer: torch.optim.Optimizer) -> None:
    """Gives each param group the rate that a scheduler was built on; many start by lowering it (a warm-up, one cycle).

    torch and timm keep that rate as `initial_lr`; torch's one cycle keeps its peak as `max_lr`.
    """
    for group in optimizer.param_groups:
        rate = group.get("max_lr", group.get("initial_lr"))
        if rate is not None:
            set_lr(group, float(rate))
            del group["planned_lr"]  # no stage has planned one yet


def split_optimizer(
    optimizer: torch.optim.Optimizer, groups: Mapping[str, LayerGroup], schedulers: Sequence[Any] = ()
) -> None:
    """Splits the param groups of an optimizer by layer group, in place, and notes the rates that they were given.

    Schedulers that go on are widened with them: what was added follows the first param group. An optimizer that was
    split before (it served an earlier fit) stays as it is.
    """
    if "layer_group" in optimizer.param_groups[0]:
        return
    before = list(optimizer.param_groups)
    after, parents = split_param_groups(before, groups, optimizer.defaults)
    for group, parent in zip(after, parents, strict=True):
        group["given_lr"] = float(group["lr"])
        if schedulers and parent == len(before):
            scheduled = {k: v for k, v in before[0].items() if k in ("lr", "momentum", "betas") or k not in group}
            group.update(scheduled)
    # in place: Lightning's wrapper and the schedulers hold the same list
    optimizer.param_groups[:] = after
    for scheduler in schedulers:
        _widen(scheduler, len(before), parents)


def _widen(scheduler: Any, num_before: int, parents: Sequence[int]) -> None:
    """Repeats a scheduler's per-group lists after param groups were split.

    torch's and timm's schedulers keep one entry per param group and have no public way to add one; guarded by
    `test_unfreeze__a_scheduler_that_does_not_fight_gives_the_same_rates` (torch 2.6 to 2.15).
    """
    for part in getattr(scheduler, "_schedulers", ()):  # of SequentialLR and ChainedScheduler
        _widen(part, num_before, parents)
    for name in _SCHEDULERS_LISTS_PER_GROUP & vars(scheduler).keys():
        value = getattr(scheduler, name)
        if isinstance(value, list) and len(value) == num_before:
            setattr(scheduler, name, [value[parent] if parent < num_before else value[0] for parent in parents])


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
