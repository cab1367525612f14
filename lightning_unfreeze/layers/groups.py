"""Ordered layer groups of a network, input first, head last.

A layer group keeps names, not modules: `sync_batchnorm` and `convert_sync_batchnorm` replace modules in the middle of
a set-up, parameters stay. Membership is decided by the identity of a parameter, never by its value.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_unfreeze.layers.adapters import adapter_parameters
from lightning_unfreeze.layers.families import HEAD, group_by_matcher, has_parameters, matcher_of
from lightning_unfreeze.layers.hugging_face import block_lists, group_by_block_lists

_HEAD_ATTRIBUTES = ("head", "classifier", "fc")


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """A slice of a network; iterating it yields its parameters.

    Args:
        name: Unique among the groups of a module.
        root: The module that was passed to `layer_groups`; all names are relative to it.
        parameter_names: Names as `root.named_parameters()` gives them; a tied parameter has the first of its names.
        free_module_names: Modules without parameters (dropout, activations, normalisation without affine) that stand
            between those of this group and share its train or eval mode.
    """

    name: str
    root: nn.Module = field(repr=False)
    parameter_names: tuple[str, ...] = field(repr=False)
    free_module_names: tuple[str, ...] = field(default=(), repr=False)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Pairs of name and parameter, looked up anew in the module."""
        return ((name, self.root.get_parameter(name)) for name in self.parameter_names)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the group, each one once."""
        return (parameter for _, parameter in self.named_parameters())

    def __iter__(self) -> Iterator[nn.Parameter]:
        return self.parameters()

    def adapters(self) -> set[nn.Parameter]:
        """Those of its parameters that belong to adapters (see `adapter_parameters`)."""
        return adapter_parameters(self.root) & set(self)

    def modules(self) -> list[nn.Module]:
        """The outermost modules that belong to this group alone, looked up anew in the module."""
        return list(outermost(self.root, set(self.parameters()), set(self.free_module_names)))


def layer_groups(module: nn.Module, network: str | None = None) -> dict[str, LayerGroup]:
    """Splits a module into ordered layer groups, input first, head last.

    Where the network is, first match: the module's own `layer_groups()` method; `network`; a `backbone` beside a
    `head`, `classifier` or `fc`; the one timm or torchvision model in the module or the module itself; the one child
    that has a `backbone` and a head; an `nn.Sequential`. timm models are split by their own `group_matcher`.

    The head is the classifier and what else comes after the pooled features. The last group is named `"head"` (but
    for names from the module's own method), and takes the parameters outside the network: a projection, a learnt
    loss weight. A tied parameter belongs to the earliest of its groups and is frozen and unfrozen with that one.

    The module's own method returns a dict from group name to a module, a parameter, the name (prefix) of one, a
    `LayerGroup`, or a list of those; every parameter has to be in it.

    Args:
        module: A LightningModule or any other module.
        network: Attribute path of the network inside the module, e.g. `"model"` or `"model.encoder"`.

    Returns:
        Group name -> group. Every parameter of `module` is in exactly one, by identity.

    Raises:
        MisconfigurationException: If the module cannot be grouped, or its own groups overlap or are incomplete.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
        >>> list(layer_groups(net))
        ['0', '2', 'head']
    """
    if not any(True for _ in module.parameters()):
        raise MisconfigurationException(f"{type(module).__name__} has no parameters, so there are no layer groups")
    if _has_own_method(module):
        groups, free = _own_groups(module)
        scopes = [name for name, child in module.named_children() if has_parameters(child)]
        return _build(module, groups, free, scopes)
    path = _find_network(module, network)
    net = module.get_submodule(path)
    outside = _has_head_outside(module, path)
    partition = _partition(net, has_head=not outside)
    if partition is None and outside:
        partition = {path: list(net.parameters())}
    if partition is None:
        raise _cannot_group(module, f"{path or 'the module'} ({type(net).__name__}) is not of a kind that is known")
    inside = set(net.parameters())
    rest = [parameter for parameter in module.parameters() if parameter not in inside]
    if rest:
        partition[HEAD] = partition.pop(HEAD, []) + rest
    elif HEAD not in partition:
        partition[HEAD] = partition.pop(list(partition)[-1])
    return _build(module, partition, {}, [path])


# --- where the network is --------------------------------------------------------------------------------------------


def _find_network(module: nn.Module, network: str | None) -> str:
    """The path of the network inside the module, `""` for the module itself."""
    if network is not None:
        paths = [name for name, _ in module.named_modules(remove_duplicate=False)]
        if network not in paths:
            raise MisconfigurationException(
                f"network={network!r}: {type(module).__name__} has no module of this name.{near(network, paths)} "
                f"It has {_list_children(module)}"
            )
        if not has_parameters(module.get_submodule(network)):
            raise MisconfigurationException(
                f"network={network!r} of {type(module).__name__} has no parameters; it has {_list_children(module)}"
            )
        return network
    if _has_backbone(module):
        return "backbone"
    known = _known_models(module)
    if not known:  # a network of the user's own, as one attribute of the module
        known = [name for name, child in module.named_children() if _has_backbone(child)]
    if len(known) > 1:
        raise _cannot_group(module, f"it holds {len(known)} networks, {', '.join(known)}", known)
    return next(iter(known), "")


def _has_backbone(module: nn.Module) -> bool:
    return has_parameters(_child(module, "backbone")) and _has_head_outside(module, "backbone")


# PEFT's wrappers answer `getattr` with what the network inside them has, so these two look at the module itself


def _has_own_method(module: nn.Module) -> bool:
    return "layer_groups" in vars(module) or callable(getattr(type(module), "layer_groups", None))


def _child(module: nn.Module, name: str) -> nn.Module | None:
    return module._modules.get(name)  # `named_children` leaves out a second name of one module


def _known_models(module: nn.Module) -> list[str]:
    """Paths of the outermost models inside that can be grouped by their class."""
    found: list[str] = []
    for path, child in module.named_modules():
        within_found = any(not outer or path.startswith(f"{outer}.") for outer in found)
        own_method = path and _has_own_method(child)
        if not within_found and has_parameters(child) and (own_method or matcher_of(child) or block_lists(child)):
            found.append(path)
    return found


def _has_head_outside(module: nn.Module, path: str) -> bool:
    """Whether a head stands beside the network, which then is a backbone."""
    first = path.split(".")[0]
    return bool(first) and any(has_parameters(_child(module, name)) for name in _HEAD_ATTRIBUTES if name != first)


def near(name: str, names: Iterable[str]) -> str:
    """A hint at names that are close to one that is not there; empty where none is."""
    close = difflib.get_close_matches(name, [other for other in names if other], n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _list_children(module: nn.Module) -> str:
    children = [f"{name} ({type(child).__name__})" for name, child in module.named_children() if has_parameters(child)]
    return ", ".join(children) or "no child modules with parameters"


def _cannot_group(module: nn.Module, reason: str, candidates: Sequence[str] = ()) -> MisconfigurationException:
    children = [name for name, child in module.named_children() if has_parameters(child)]
    names = candidates or children
    choices = " or ".join(f'network="{name}"' for name in names if name) or 'network="..."'
    first, last = _first_and_last_part(module)
    return MisconfigurationException(
        f"{type(module).__name__} cannot be split into layer groups: {reason}. It has {_list_children(module)}. "
        f"Say which part is a timm, torchvision or Hugging Face model or an nn.Sequential, {choices}; or give the "
        "module a method, input first, head last, e.g. "
        f'`def layer_groups(self): return {{"stem": self.{first}, "head": self.{last}}}`, '
        "with modules, parameters, name prefixes or lists of those as values"
    )


def _first_and_last_part(module: nn.Module) -> tuple[str, str]:
    """Two different parts for an example, from as deep inside as there is more than one."""
    path = ""
    while children := [name for name, child in module.named_children() if has_parameters(child)]:
        if len(children) > 1:
            return path + children[0], path + children[-1]
        path, module = f"{path}{children[0]}.", module.get_submodule(children[0])
    return "stem", "fc"


# --- how a network is split ------------------------------------------------------------------------------------------


def _partition(network: nn.Module, *, has_head: bool) -> dict[str, list[nn.Parameter]] | None:
    """Group name -> parameters, `"head"` last if the network holds its head; None if its kind is not known."""
    if _has_own_method(network):
        own, _ = _own_groups(network)
        if has_head and HEAD not in own:
            own[HEAD] = own.pop(list(own)[-1])
        return own
    matcher = matcher_of(network)
    if matcher is not None:
        return group_by_matcher(network, matcher)
    if block_lists(network):
        return group_by_block_lists(network)
    inner = ["backbone"] if _has_backbone(network) else _known_models(network)
    if len(inner) == 1:
        model = network.get_submodule(inner[0])
        partition = _partition(model, has_head=False) or {inner[0]: list(model.parameters())}
        within = set(model.parameters())
        rest = [parameter for parameter in network.parameters() if parameter not in within]
        if rest:
            partition[HEAD] = partition.pop(HEAD, []) + rest
        return partition
    if isinstance(network, nn.Sequential):
        groups = {name: list(child.parameters()) for name, child in network.named_children() if has_parameters(child)}
        if has_head and groups:
            groups[HEAD] = groups.pop(list(groups)[-1])
        return groups
    return None


def _own_groups(module: nn.Module) -> tuple[dict[str, list[nn.Parameter]], dict[str, list[str]]]:
    """What a module's own `layer_groups()` says: the parameters, and the names of modules without any, per group."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    names_of = {child: name for name, child in module.named_modules()}
    given = module.layer_groups()  # type: ignore[operator]
    if not isinstance(given, Mapping) or not given:
        raise MisconfigurationException(
            f"{type(module).__name__}.layer_groups() returned {given!r}; it has to return a dict from group name to "
            'modules, parameters, name prefixes or lists of those, e.g. {"stem": self.conv1, "head": [self.fc]}'
        )
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in given}
    free: dict[str, list[str]] = {name: [] for name in given}

    def add(group: str, item: Any) -> None:
        if isinstance(item, nn.Parameter):
            groups[group].append(item)
        elif isinstance(item, nn.Module):
            groups[group] += item.parameters()
            if not has_parameters(item) and item in names_of:
                free[group].append(names_of[item])
        elif isinstance(item, str):
            found = [p for name, p in parameters.items() if name == item or name.startswith(f"{item}.")]
            if not found:
                raise MisconfigurationException(
                    f"{type(module).__name__}.layer_groups(), group {group!r}: nothing with parameters is called "
                    f"{item!r}.{near(item, [*parameters, *names_of.values()])}"
                )
            groups[group] += found
        elif isinstance(item, Iterable):
            for part in item:
                add(group, part)
        else:
            raise MisconfigurationException(
                f"{type(module).__name__}.layer_groups(), group {group!r}: {item!r} is not a module, a parameter, a "
                "name prefix or a list of those"
            )

    for name, item in given.items():
        add(name, item)
    return groups, free


# --- the groups of the module ----------------------------------------------------------------------------------------


def _build(
    module: nn.Module,
    partition: Mapping[str, Iterable[nn.Parameter]],
    free: Mapping[str, Sequence[str]],
    scopes: Sequence[str],
) -> dict[str, LayerGroup]:
    names = list(partition)
    group_of = _assign(module, partition)
    free_of: dict[str, str] = {}
    for scope in scopes:
        free_of.update(_assign_free_modules(module, scope, group_of, names[-1]))
    free_of.update({path: name for name, paths in free.items() for path in paths})
    groups = {
        name: LayerGroup(
            name,
            module,
            tuple(n for n, parameter in module.named_parameters() if group_of[parameter] == name),
            tuple(path for path, owner in free_of.items() if owner == name),
        )
        for name in names
    }
    empty = [name for name, group in groups.items() if not group.parameter_names]
    if empty:
        raise MisconfigurationException(
            f"the layer group{'s' * (len(empty) > 1)} {', '.join(empty)} of {type(module).__name__} would be empty: no "
            "parameters, or none that is not tied to one of an earlier group; join it with another in a "
            "`layer_groups()` method"
        )
    return groups


def _assign(module: nn.Module, partition: Mapping[str, Iterable[nn.Parameter]]) -> dict[nn.Parameter, str]:
    """Parameter -> the one group it is in, for every parameter of the module; tied ones in the earliest."""
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    claims: dict[nn.Parameter, list[str]] = defaultdict(list)
    for group, parameters in partition.items():
        for parameter in dict.fromkeys(parameters):
            claims[parameter].append(group)
    kind = type(module).__name__
    foreign = sorted({group for parameter, by in claims.items() if parameter not in names for group in by})
    if foreign:
        raise MisconfigurationException(f"layer group {foreign[0]!r} of {kind} has parameters that the module has not")
    twice = [f"{names[p][0]} ({' and '.join(by)})" for p, by in claims.items() if len(by) > 1 and len(names[p]) == 1]
    nowhere = [own[0] for parameter, own in names.items() if parameter not in claims]
    for problem, where in (("two layer groups", twice), ("no layer group", nowhere)):
        if where:
            more = f" and {len(where) - 5} more" if len(where) > 5 else ""
            raise MisconfigurationException(
                f"{len(where)} parameters of {kind} are in {problem}: {', '.join(where[:5])}{more}; every parameter "
                "has to be in exactly one group of `layer_groups()`"
            )
    return {parameter: claims[parameter][0] for parameter in names}


def _assign_free_modules(
    module: nn.Module, scope: str, group_of: Mapping[nn.Parameter, str], head: str
) -> dict[str, str]:
    """Path -> group of the outermost modules without parameters, in the order of registration.

    One goes with the group before it. Before the head it goes with the head, as dropout there regularises the head,
    unless it has buffers: then it normalises features.
    """
    visits: list[tuple[str, bool, str | None]] = []  # path, without state, group (None: a free module)

    def visit(path: str, part: nn.Module) -> None:
        groups = {group_of[parameter] for parameter in part.parameters()}
        if not groups:
            visits.append((path, not any(True for _ in part.buffers()), None))
            return
        if len(groups) == 1:  # frozen and unfrozen whole, with all that is inside
            visits.append((path, False, groups.pop()))
            return
        visits.extend((path, False, group_of[parameter]) for parameter in part.parameters(recurse=False))
        for name, child in part.named_children():
            visit(f"{path}.{name}" if path else name, child)

    visit(scope, module.get_submodule(scope))
    found: dict[str, str] = {}
    following: str | None = None
    for index in reversed(range(len(visits))):
        path, stateless, group = visits[index]
        if group is not None:
            following = group
            continue
        preceding = next((g for _, _, g in reversed(visits[:index]) if g is not None), None)
        owner = following if preceding is None or (stateless and following == head) else preceding
        if owner is not None:
            found[path] = owner
    return dict(reversed(found.items()))


def outermost(module: nn.Module, parameters: set[nn.Parameter], free_names: set[str]) -> Iterator[nn.Module]:
    """Modules inside with no other parameters than these, and the named ones without any; none inside another."""

    def walk(path: str, part: nn.Module) -> Iterator[nn.Module]:
        for name, child in part.named_children():
            child_path = f"{path}.{name}" if path else name
            own = set(child.parameters())
            if own <= parameters if own else child_path in free_names:
                yield child
            else:
                yield from walk(child_path, child)

    return walk("", module)
