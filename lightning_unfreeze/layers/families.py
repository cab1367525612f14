"""How the networks of timm and torchvision are split into layer groups, input first.

timm's models bring a `group_matcher`; torchvision's get one here, in the same form.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from timm.models import group_parameters
from torch import nn

HEAD = "head"
Matcher = Mapping[str, Any] | Callable[[str], float]

_BACKBONE_END = 99999  # timm's mark for "with the group before", as in its own matchers
_FOUR_GROUPS_WITH_DOWNSAMPLING = {
    "stem": r"^features\.0\.",
    "blocks": [
        (r"^features\.1\.", (1,)),
        (r"^features\.[23]\.", (2,)),
        (r"^features\.[45]\.", (3,)),
        (r"^features\.[67]\.", (4,)),
    ],
}
# torchvision has no `group_matcher`: the same patterns for its classifiers, in the form that timm reads
_TORCHVISION_MATCHERS: dict[str, Mapping[str, Any]] = {
    "ConvNeXt": _FOUR_GROUPS_WITH_DOWNSAMPLING,
    "DenseNet": {
        "stem": r"^features\.(?:conv|norm)0",
        "blocks": r"^features\.(?:denseblock|transition)(\d+)",
    },
    "EfficientNet": {
        "stem": r"^features\.0\.",
        # parameters two levels down are those of the last 1x1 convolution
        "blocks": [(r"^features\.\d+\.\d+\.\w+$", (_BACKBONE_END,)), (r"^features\.(\d+)\.", None)],
    },
    "GoogLeNet": {"stem": r"^conv\d", "blocks": r"^inception(\d)"},
    "Inception3": {"stem": r"^Conv2d_", "blocks": r"^Mixed_(\d)"},
    "MaxVit": {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"},
    "MNASNet": {"stem": r"^layers\.[0-7]\.", "blocks": r"^layers\.(8|9|10|11|12|13)\."},
    "RegNet": {"stem": r"^stem", "blocks": r"^trunk_output\.block(\d+)"},
    "ResNet": {"stem": r"^(?:conv1|bn1)\.", "blocks": r"^layer(\d+)"},
    "ShuffleNetV2": {"stem": r"^conv1\.", "blocks": r"^stage(\d+)"},
    "SwinTransformer": _FOUR_GROUPS_WITH_DOWNSAMPLING,
    "VisionTransformer": {
        "stem": r"^class_token|^conv_proj|^encoder\.pos_embedding",
        "blocks": r"^encoder\.layers\.encoder_layer_(\d+)",
    },
}
_TORCHVISION_SPLIT_AT_POOLING = ("AlexNet", "SqueezeNet", "VGG")
_TORCHVISION_SPLIT_AT_WIDTH = ("MobileNetV2", "MobileNetV3")
_TORCHVISION_HEADS = {"classifier", "fc", "head", "heads", "aux1", "aux2", "AuxLogits"}


def has_parameters(module: Any) -> bool:
    """Whether this is a module with parameters in it."""
    return isinstance(module, nn.Module) and any(True for _ in module.parameters())


def matcher_of(network: nn.Module) -> Matcher | None:
    """What timm's `group_parameters` splits this model by, or None if it is no timm or torchvision classifier."""
    for cls in type(network).__mro__:
        if cls.__module__.startswith("timm.models.") and hasattr(network, "pretrained_cfg"):
            return _timm_matcher(network)
        if cls.__module__.startswith("torchvision.models."):
            if cls.__name__ in _TORCHVISION_MATCHERS:
                return _TORCHVISION_MATCHERS[cls.__name__]
            if cls.__name__ in _TORCHVISION_SPLIT_AT_POOLING:
                return _split_features(network, _starts_group_after_pooling)
            if cls.__name__ in _TORCHVISION_SPLIT_AT_WIDTH:
                return _split_features(network, _starts_group_at_new_width)
    return None


def _timm_matcher(network: nn.Module) -> Matcher:
    for coarse in (True, False):
        # rdnet refuses `coarse=True` by an assertion; a few families have no matcher
        try:
            matcher: Matcher = network.group_matcher(coarse=coarse)  # type: ignore[operator]
        except (AttributeError, NotImplementedError, AssertionError):
            continue
        return matcher
    return _match_child_order(network)


def _match_child_order(network: nn.Module) -> Matcher:
    """A matcher from the order of the children, where the one list of blocks, if there is just one, is opened.

    A single layer goes with what is before it; the first ones, and parameters of the network itself, are the stem.
    """
    heads = _head_children(network)
    backbone = {n: c for n, c in network.named_children() if has_parameters(c) and n not in heads}
    lists = [name for name, child in backbone.items() if isinstance(child, nn.Sequential | nn.ModuleList)]
    ordinals: dict[str, int] = {}
    ordinal = 0
    for name, child in backbone.items():
        parts = [f"{name}.{inner}" for inner, _ in child.named_children()] if [name] == lists else [name]
        single_layer = not any(has_parameters(grandchild) for grandchild in child.children())
        for part in parts:
            ordinal += bool(ordinals) and not single_layer
            ordinals[part] = ordinal

    def matcher(name: str) -> float:
        first, _, rest = name.partition(".")
        if not rest:
            return 0
        return ordinals.get(first, ordinals.get(f"{first}.{rest.split('.')[0]}", float("inf")))

    return matcher


def _split_features(network: nn.Module, starts_group: Callable[[nn.Module, nn.Module], bool]) -> Matcher:
    """A matcher for `network.features`, split where a layer group starts: `starts_group(previous layer, layer)`."""
    layers = list(network.features)  # type: ignore[arg-type]
    group_of = {"0": 0}
    for index, (previous, layer) in enumerate(pairwise(layers), start=1):
        group_of[str(index)] = group_of[str(index - 1)] + starts_group(previous, layer)

    def matcher(name: str) -> float:
        parts = name.split(".")
        return group_of[parts[1]] if parts[0] == "features" else float("inf")

    return matcher


def _starts_group_after_pooling(previous: nn.Module, layer: nn.Module) -> bool:
    return isinstance(previous, nn.MaxPool2d)


def _starts_group_at_new_width(previous: nn.Module, layer: nn.Module) -> bool:
    """Layer groups of a MobileNet are its runs of equal width; the last convolution goes with the last of them."""
    if not hasattr(layer, "use_res_connect"):
        return False
    return not hasattr(previous, "use_res_connect") or layer.out_channels != previous.out_channels


def _head_children(network: nn.Module) -> set[str]:
    """Names of the children that hold the classifier (several with distillation or auxiliary heads)."""
    config = getattr(network, "pretrained_cfg", None)
    if config is None:
        return _TORCHVISION_HEADS
    classifier = config.get("classifier") or ()
    names = [classifier] if isinstance(classifier, str) else classifier
    return {name.split(".")[0] for name in names}


def group_by_matcher(network: nn.Module, matcher: Matcher) -> dict[str, list[nn.Parameter]]:
    """Group name -> parameters, input first; `"head"`, where the network holds one, last."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    # a name that nothing matches tells which group holds what the matcher leaves over
    with_leftover = SimpleNamespace(named_parameters=lambda: [*parameters.items(), ("?.?", None)])
    ordinals: dict[str, int] = group_parameters(with_leftover, matcher, reverse=True)
    leftover = ordinals.pop("?.?")

    head_children = _head_children(network)
    children = [name for name, _ in network.named_children()]
    after_pool = {"fc_norm", "pre_logits"}
    if "global_pool" in children:
        after_pool.update(children[children.index("global_pool") :])

    grouped: dict[int, list[str]] = defaultdict(list)
    head: list[str] = []
    home: int | None = None
    for name in parameters:
        child = name.split(".")[0]
        if child in head_children or (ordinals[name] == leftover and (child in after_pool or home is None)):
            head.append(name)
            continue
        # a final norm that no pattern names goes with the block registered before it
        home = ordinals[name] if ordinals[name] != leftover else home
        grouped[home if home is not None else leftover].append(name)
    if not grouped:  # a matcher whose patterns match nothing (LeViT's, timm 1.0.22)
        return group_by_matcher(network, _match_child_order(network))
    blocks = [grouped[ordinal] for ordinal in sorted(grouped)]
    groups = {
        name: [parameters[n] for n in members] for name, members in zip(_name_groups(blocks), blocks, strict=True)
    }
    return {**groups, HEAD: [parameters[n] for n in head]} if head else groups


def _name_groups(groups: Sequence[Sequence[str]]) -> list[str]:
    """`stem`, then the path most parameters of a group share, down to its first number, or further if it is not unique.

    Example:
        >>> _name_groups([["conv1.weight"], ["layer1.0.conv1.weight"], ["blocks.0.0.w"], ["blocks.0.1.w"]])
        ['stem', 'layer1', 'blocks.0.0', 'blocks.0.1']
    """

    def prefixes(extra: int) -> list[str]:
        found = []
        for members in groups[1:]:
            paths = [name.split(".") for name in members]
            ends = [next((i for i, part in enumerate(p, 1) if any(map(str.isdigit, part))), 1) for p in paths]
            cut = Counter(".".join(p[: end + extra]) for p, end in zip(paths, ends, strict=True))
            found.append(cut.most_common(1)[0][0])
        return found

    names = prefixes(0)
    for extra in (1, 2):
        count = Counter(["stem", *names, HEAD])
        names = [longer if count[name] > 1 else name for name, longer in zip(names, prefixes(extra), strict=True)]
    return ["stem", *names]
