"""How the networks of Hugging Face's `transformers` are split into layer groups: at the blocks of their base model.

One rule for all families; `transformers` itself need not be installed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from lightning_unfreeze.layers.families import HEAD, has_parameters, matcher_of

_HEADS = {"classifier", "cls_classifier", "fc", "head", "score"}


def _base_model(network: nn.Module) -> tuple[str, nn.Module] | None:
    """Path and module of a Hugging Face model without its task's head; None for any other network.

    By the class's name, so that `transformers` need not be there. `base_model_prefix` names the attribute; a few
    classifiers (CLIP, HGNetV2) and base models themselves have none of that name and are taken whole.
    """
    classes = {(cls.__module__, cls.__name__) for cls in type(network).__mro__}
    if ("transformers.modeling_utils", "PreTrainedModel") not in classes:
        return None
    prefix: Any = network.base_model_prefix
    child = dict(network.named_children()).get(prefix)
    return ("", network) if child is None else (prefix, child)


def block_lists(network: nn.Module) -> dict[str, list[nn.Module]]:
    """Path -> blocks of the outermost lists in the base model, in their order of registration."""
    found: dict[str, list[nn.Module]] = {}
    base = _base_model(network)
    if base is None or any(matcher_of(part) is not None for part in (base[1], *base[1].children())):
        return found  # what wraps a timm model is split as that one
    for path, child in base[1].named_modules(prefix=base[0]):
        within = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(child, nn.ModuleList) and not within and all(map(has_parameters, child)):
            found[path] = list(child)
    if base[0]:
        return found
    # of a classifier taken whole: not the layers of its head
    body = next(iter(found), "").split(".")[0]
    return {path: blocks for path, blocks in found.items() if path.split(".")[0] == body}


def group_by_block_lists(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Stem, a group per block, head: what is outside the base model.

    Lists of one length in one module (a patch embedding and a stage) run in turn, so they are taken in turn. In a flat
    list of convolutional blocks a group is a run of equal width, as in timm's twins. What follows the last block in the
    base model (a norm, a last convolution, a pooler) goes with that block.
    """
    lists = block_lists(network)
    group_of: dict[str, str] = {}  # path of a block -> group
    for path, blocks in lists.items():
        parent = path.rpartition(".")[0]
        twins = [p for p, b in lists.items() if p.rpartition(".")[0] == parent and len(b) == len(blocks)]
        home = ""
        for index, block in enumerate(blocks):
            if not (home and len(twins) == 1 and _same_run(blocks[index - 1], block)):
                home = f"{twins[-1]}.{index}"
            group_of[f"{path}.{index}"] = home

    head_children = _head_children(network, next(iter(lists)))
    groups: dict[str, list[nn.Parameter]] = {"stem": [], **{home: [] for home in group_of.values()}, HEAD: []}
    following = "stem"
    for name, parameter in network.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        if parts[0] in head_children:
            groups[HEAD].append(parameter)
            continue
        inside = (group_of.get(".".join(parts[:depth])) for depth in range(1, len(parts)))
        following = next((home for home in inside if home is not None), following)
        groups[following].append(parameter)
    return _with_short_names({name: members for name, members in groups.items() if members})


def _head_children(network: nn.Module, first_list: str) -> set[str]:
    """Names of the children outside the base model; those after its blocks, where it has no attribute of its own."""
    children = [name for name, _ in network.named_children()]
    base = _base_model(network)
    if base is not None and base[0]:
        return set(children) - {base[0]}
    return set(children[children.index(first_list.split(".")[0]) + 1 :]) if _HEADS.intersection(children) else set()


def _same_run(previous: nn.Module, block: nn.Module) -> bool:
    widths = [_output_width(part) for part in (previous, block)]
    return widths[0] == widths[1] is not None


def _output_width(block: nn.Module) -> int | None:
    """Output channels of a convolutional block without blocks inside; None for any other."""
    if any(isinstance(part, nn.ModuleList | nn.Sequential) for part in block.modules()):
        return None
    convolutions = [part for part in block.modules() if isinstance(part, nn.Conv2d)]
    return convolutions[-1].out_channels if convolutions else None


def _with_short_names(groups: dict[str, list[nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
    """`layers.0` for `vit.layers.0`, where that is unique."""
    short = {name: ".".join(name.split(".")[-2:]) for name in groups}
    count = Counter(short.values())
    return {short[name] if count[short[name]] == 1 else name: members for name, members in groups.items()}
