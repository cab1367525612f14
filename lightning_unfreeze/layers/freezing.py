"""What a stage trains and what it freezes: layer groups, parameters, and modules in eval mode."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_unfreeze.layers.families import HEAD
from lightning_unfreeze.layers.groups import LayerGroup, near, outermost


def select(groups: Mapping[str, LayerGroup] | Iterable[str], train: str | int | Sequence[str]) -> list[str]:
    """The names of the layer groups that a stage's `train` asks for, input first.

    Args:
        groups: All layer groups, or (but for `"adapters"`) their names, input first.
        train: `"head"`, `"all"`, the number of groups from the top (head included), `"adapters"` (the groups that have
            an adapter, and the head), or a list of names or globs; `"head"` in it is the last group, whatever its name.

    Raises:
        ValueError: For a name or glob that no group has, more groups than there are, or adapters where there are none.

    Example:
        >>> select(["stem", "layer1", "layer2", "head"], ["stem", "layer*"])
        ['stem', 'layer1', 'layer2']
    """
    names = list(groups)
    if train == "all":
        return names
    if train == "adapters":
        return _with_adapters(groups if isinstance(groups, Mapping) else {})
    if isinstance(train, int):
        if not 1 <= train <= len(names):
            raise ValueError(f"train={train} layer groups, there are {len(names)}: {', '.join(names)}; give 1 to all")
        return names[-train:]
    patterns = [train] if isinstance(train, str) else train
    chosen: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if name == pattern or fnmatchcase(name, pattern)}
        if not hits and pattern == HEAD:
            hits = {names[-1]}
        if not hits:
            raise ValueError(
                f"train names {pattern!r}, and no layer group is called so.{near(pattern, names)} "
                f"The layer groups: {', '.join(names)}"
            )
        chosen |= hits
    return [name for name in names if name in chosen]


def _with_adapters(groups: Mapping[str, LayerGroup]) -> list[str]:
    adapters = {name: adapters for name, group in groups.items() if (adapters := group.adapters())}
    if not adapters:
        raise ValueError(
            "train='adapters', and the module has no adapters; put them in before the fit, e.g. by PEFT's "
            "get_peft_model or inject_adapter_in_model"
        )
    return [name for name in groups if name in adapters or name == list(groups)[-1]]


def trained_parameters(
    groups: Mapping[str, LayerGroup], train: str | int | Sequence[str], fixed: Collection[nn.Parameter] = ()
) -> set[nn.Parameter]:
    """The parameters that train in a stage: those of the layer groups that it asks for, but for what is fixed.

    With `train="adapters"` the adapters alone, and the whole head.

    Raises:
        ValueError: As in `select`; or where nothing is left to train.
    """
    names = select(groups, train)
    chosen = {parameter for name in names for parameter in groups[name]}
    if train == "adapters":
        head = groups[names[-1]]
        chosen = {*head, *(adapter for name in names for adapter in groups[name].adapters())}
    trained = chosen.difference(fixed)
    if not trained:
        raise ValueError(
            f"train={train!r} trains nothing: the module itself froze every parameter of {', '.join(names)}; let them "
            "require gradients before the fit (a new head goes into PEFT's modules_to_save), or train other groups"
        )
    return trained


def fixed_parameters(groups: Mapping[str, LayerGroup]) -> set[nn.Parameter]:
    """Parameters that train in no stage: those that cannot, and those that the module's owner froze one by one.

    A fixed position table in a layer group of which the rest trains stays fixed. A group that is frozen whole is taken
    for freezing by stages or by hand, which a stage may undo. Beside adapters the owner has chosen for the whole
    network: what is frozen and no adapter stays frozen, or the adapters that are saved would not fit their network.
    """
    adapters = {adapter for group in groups.values() for adapter in group.adapters()}
    fixed = set()
    for group in groups.values():
        some_train = any(parameter.requires_grad for parameter in group)
        for parameter in group:
            by_owner = not parameter.requires_grad and (some_train or (adapters and parameter not in adapters))
            if by_owner or not parameter.is_floating_point():
                fixed.add(parameter)
    return fixed


def frozen_modules(
    module: nn.Module, groups: Mapping[str, LayerGroup], trained: Collection[str], fixed: Collection[nn.Parameter] = ()
) -> list[nn.Module]:
    """The outermost modules to keep in eval mode while the groups `trained` train and all others are frozen.

    That is every module all of whose parameters are frozen, with everything inside it, and the modules without
    parameters that follow a frozen one. What stands right before the head (its dropout) goes with the head, unless it
    has buffers. Modules without parameters outside the network (augmentations, metrics, losses) are left alone.
    `fixed` are frozen although their group trains.
    """
    frozen = [group for name, group in groups.items() if name not in trained]
    parameters = {parameter for group in frozen for parameter in group}.union(fixed)
    return list(outermost(module, parameters, {name for group in frozen for name in group.free_module_names}))
