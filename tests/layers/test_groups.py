from __future__ import annotations

import itertools

import pytest
import timm
import torch
import torchvision
from lightning.fabric.utilities.exceptions import MisconfigurationException
from packaging.version import Version
from torch import nn

from lightning_unfreeze.layers.freezing import frozen_modules, select
from lightning_unfreeze.layers.groups import LayerGroup, layer_groups
from lightning_unfreeze.layers.param_groups import rate_ratios, split_param_groups

RESNET = {"stem": "conv1 bn1", "layer1": "layer1", "layer2": "layer2", "layer3": "layer3", "layer4": "layer4"}
STAGES = {"stages.0": "stages.0", "stages.1": "stages.1", "stages.2": "stages.2", "stages.3": "stages.3"}


def stages(word: str, *ends: int) -> dict[str, str]:
    """Runs of numbered children: `stages("features", 1, 3, 6)` is features 1-2 and 3-5."""
    return {
        f"{word}.{start}": " ".join(f"{word}.{i}" for i in range(start, end)) for start, end in itertools.pairwise(ends)
    }


# group -> prefixes of the parameter names in it: written from the models' own structure, counted in the test by name
TIMM = {
    "resnet18": {**RESNET, "head": "fc"},
    "test_convnext": {"stem": "stem", **STAGES, "head": "head"},
    "test_vit": {
        "stem": "cls_token reg_token pos_embed patch_embed norm_pre",
        **stages("blocks", 0, 1, 2, 3, 4, 5),
        "blocks.5": "blocks.5 norm",
        "head": "head",
    },
    "vit_tiny_patch16_224": {
        "stem": "cls_token pos_embed patch_embed",
        **stages("blocks", *range(12)),
        "blocks.11": "blocks.11 norm",
        "head": "head",
    },
    "test_efficientnet": {
        "stem": "conv_stem bn1",
        **stages("blocks", 0, 1, 2, 3, 4),
        "blocks.4": "blocks.4 conv_head bn2",
        "head": "classifier",
    },
    "mobilenetv3_small_050": {
        "stem": "conv_stem bn1",
        **stages("blocks", *range(7)),
        "head": "conv_head classifier",  # this 1x1 convolution comes after the pooling
    },
    "regnety_002": {"stem": "stem", "s1": "s1", "s2": "s2", "s3": "s3", "s4": "s4", "head": "head"},
    "densenet121": {
        "stem": "features.conv0 features.norm0",
        "features.denseblock1": "features.denseblock1 features.transition1",
        "features.denseblock2": "features.denseblock2 features.transition2",
        "features.denseblock3": "features.denseblock3 features.transition3",
        "features.denseblock4": "features.denseblock4 features.norm5",
        "head": "classifier",
    },
    "swin_tiny_patch4_window7_224": {
        "stem": "patch_embed",
        **stages("layers", 0, 1, 2, 3),
        "layers.3": "layers.3 norm",
        "head": "head",
    },
    "levit_128s": {"stem": "stem", **stages("stages", 0, 1, 2, 3), "head": "head head_dist"},  # two classifiers
    "eva02_tiny_patch14_336": {
        "stem": "cls_token pos_embed patch_embed",
        **stages("blocks", *range(13)),
        "head": "fc_norm head",
    },
    "caformer_s18": {"stem": "stem", **STAGES, "head": "head"},  # has no group_matcher
    "pit_xs_224": {  # nor has this one, and parameters of its own
        "stem": "cls_token pos_embed patch_embed",
        **stages("transformers", 0, 1, 2),
        "transformers.2": "transformers.2 norm",
        "head": "head",
    },
    "rdnet_tiny": {"stem": "stem", **stages("dense_stages", *range(8)), "head": "head"},  # coarse is refused
}
TORCHVISION = {
    "resnet18": {**RESNET, "head": "fc"},
    "alexnet": {
        "stem": "features.0",
        "features.3": "features.3",
        "features.6": "features.6 features.8 features.10",
        "head": "classifier",
    },
    "vgg11_bn": {
        "stem": "features.0 features.1",
        "features.4": "features.4 features.5",
        "features.8": "features.8 features.9 features.11 features.12",
        "features.15": "features.15 features.16 features.18 features.19",
        "features.22": "features.22 features.23 features.25 features.26",
        "head": "classifier",
    },
    "squeezenet1_1": {
        "stem": "features.0",
        "features.3": "features.3 features.4",
        "features.6": "features.6 features.7",
        "features.9": "features.9 features.10 features.11 features.12",
        "head": "classifier",
    },
    "densenet121": TIMM["densenet121"],
    "convnext_tiny": {
        "stem": "features.0",
        "features.1": "features.1",
        "features.3": "features.2 features.3",
        "features.5": "features.4 features.5",
        "features.7": "features.6 features.7",
        "head": "classifier",
    },
    "swin_t": {
        "stem": "features.0",
        "features.1": "features.1",
        "features.3": "features.2 features.3",
        "features.5": "features.4 features.5",
        "features.7": "features.6 features.7 norm",
        "head": "head",
    },
    "efficientnet_b0": {
        "stem": "features.0",
        **stages("features", *range(1, 8)),
        "features.7": "features.7 features.8",
        "head": "classifier",
    },
    "efficientnet_v2_s": {
        "stem": "features.0",
        **stages("features", *range(1, 7)),
        "features.6": "features.6 features.7",
        "head": "classifier",
    },
    "mobilenet_v2": {  # Sandler et al. 2018, table 2: 1, 2, 3, 4, 3, 3, 1 blocks
        "stem": "features.0",
        **stages("features", 1, 2, 4, 7, 11, 14, 17),
        "features.17": "features.17 features.18",
        "head": "classifier",
    },
    "mobilenet_v3_small": {
        "stem": "features.0",
        **stages("features", 1, 2, 4, 7, 9, 13),
        "head": "classifier",
    },
    "regnet_y_400mf": {
        "stem": "stem",
        **{f"trunk_output.block{i}": f"trunk_output.block{i}" for i in (1, 2, 3, 4)},
        "head": "fc",
    },
    "shufflenet_v2_x0_5": {
        "stem": "conv1",
        "stage2": "stage2",
        "stage3": "stage3",
        "stage4": "stage4 conv5",
        "head": "fc",
    },
    "mnasnet0_5": {
        "stem": " ".join(f"layers.{i}" for i in range(8)),
        **stages("layers", *range(8, 14)),
        "layers.13": "layers.13 layers.14 layers.15",
        "head": "classifier",
    },
    "maxvit_t": {"stem": "stem", **stages("blocks", *range(5)), "head": "classifier"},
    "vit_b_32": {
        "stem": "class_token conv_proj encoder.pos_embedding",
        **{f"encoder.layers.encoder_layer_{i}": f"encoder.layers.encoder_layer_{i}" for i in range(11)},
        "encoder.layers.encoder_layer_11": "encoder.layers.encoder_layer_11 encoder.ln",
        "head": "heads",
    },
    "googlenet": {
        "stem": "conv1 conv2 conv3",
        "inception3a": "inception3a inception3b",
        "inception4a": " ".join(f"inception4{c}" for c in "abcde"),
        "inception5a": "inception5a inception5b",
        "head": "aux1 aux2 fc",
    },
    "inception_v3": {
        "stem": "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 Conv2d_3b_1x1 Conv2d_4a_3x3",
        "Mixed_5b": "Mixed_5b Mixed_5c Mixed_5d",
        "Mixed_6b": " ".join(f"Mixed_6{c}" for c in "abcde"),
        "Mixed_7b": "Mixed_7a Mixed_7b Mixed_7c",
        "head": "AuxLogits fc",
    },
}
# `num_params` as torchvision publishes it with the weights
TORCHVISION_TOTALS = {
    "resnet18": 11_689_512,
    "mobilenet_v2": 3_504_872,
    "vit_b_32": 88_224_232,
    "vgg11_bn": 132_868_840,
}


def build(library: str, name: str) -> nn.Module:
    if library == "timm":
        try:
            with torch.device("meta"):
                return timm.create_model(name, pretrained=False)
        except RuntimeError:  # older versions of timm compute with values in their constructors
            return timm.create_model(name, pretrained=False)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    # regnet and the transformers of torchvision compute with values in their constructors
    device = "cpu" if name in ("regnet_y_400mf", "maxvit_t") else "meta"
    with torch.device(device):
        return getattr(torchvision.models, name)(weights=None, **options)


def within(name: str, prefixes: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes.split())


def sizes(groups: dict[str, LayerGroup]) -> dict[str, int]:
    return {name: sum(p.numel() for p in group) for name, group in groups.items()}


def check_partition(module: nn.Module, groups: dict[str, LayerGroup]) -> None:
    ids = [id(parameter) for group in groups.values() for parameter in group]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in module.parameters()}


def names_of(module: nn.Module, modules: list[nn.Module]) -> list[str]:
    names = {child: name for name, child in module.named_modules()}
    return [names[child] for child in modules]


def linear(n: int = 2) -> nn.Linear:
    return nn.Linear(n, n)


class Net(nn.Module):
    """A module with the given children and, if given, its own layer groups."""

    def __init__(self, own=None, **children: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        if own is not None:
            self.layer_groups = lambda: own(self)


# --- golden tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "name"), [*(("timm", n) for n in TIMM), *(("torchvision", n) for n in TORCHVISION)]
)
def test_layer_groups__of_a_known_model_are_its_stages(library: str, name: str) -> None:
    expected = (TIMM if library == "timm" else TORCHVISION)[name]
    module = build(library, name)
    groups = layer_groups(module)
    counts = {
        group: sum(p.numel() for n, p in module.named_parameters() if within(n, prefixes))
        for group, prefixes in expected.items()
    }
    if name == "levit_128s" and Version(timm.__version__) < Version("1.0.31"):
        pytest.skip("timm's own matcher of LeViT matches nothing in older versions")
    assert list(groups) == list(expected)
    assert sizes(groups) == counts
    for group, prefixes in expected.items():
        assert all(within(n, prefixes) for n, _ in groups[group].named_parameters())
    check_partition(module, groups)
    if library == "torchvision" and name in TORCHVISION_TOTALS:
        assert sum(counts.values()) == TORCHVISION_TOTALS[name]


def test_layer_groups__of_resnet18_have_the_counts_of_the_paper() -> None:
    def block(width_in: int, width: int, stride: int) -> int:
        shortcut = width_in * width + 2 * width if stride > 1 else 0
        return 9 * width_in * width + 9 * width * width + 4 * width + shortcut

    widths = [64, 64, 128, 256, 512]
    expected = {"stem": 3 * 64 * 49 + 2 * 64}
    for i in range(1, 5):
        first = block(widths[i - 1], widths[i], 2 if i > 1 else 1)
        expected[f"layer{i}"] = first + block(widths[i], widths[i], 1)
    expected["head"] = 512 * 1000 + 1000
    assert sizes(layer_groups(build("torchvision", "resnet18"))) == expected
    assert sizes(layer_groups(build("timm", "resnet18"))) == expected


@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_layer_groups__of_every_small_timm_model_are_a_partition(name: str) -> None:
    module = build("timm", name)
    groups = layer_groups(module)
    check_partition(module, groups)
    classifier = module.pretrained_cfg["classifier"]
    assert next(iter(groups)) == "stem"
    assert list(groups)[-1] == "head"
    assert {n for n, _ in module.named_parameters() if within(n, classifier)} <= set(groups["head"].parameter_names)
    assert sizes(groups)["head"] < sum(p.numel() for p in module.parameters())


# --- where the network is --------------------------------------------------------------------------------------------


def test_layer_groups__of_a_sequential_are_its_children_with_parameters() -> None:
    module = nn.Sequential(linear(), nn.ReLU(), linear(3), nn.Sequential(linear(4), linear(5)), nn.Dropout())
    assert sizes(layer_groups(module)) == {"0": 6, "2": 12, "head": 20 + 30}


def test_layer_groups__find_backbone_and_head() -> None:
    backbone = timm.create_model("test_resnet", pretrained=False, num_classes=0)
    module = Net(head=linear(), backbone=backbone, loss_weight=nn.Parameter(torch.ones(3)))
    groups = layer_groups(module)
    assert list(groups) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert sizes(groups)["head"] == 6 + 3
    assert groups["stem"].parameter_names[0] == "backbone.conv1.0.weight"
    check_partition(module, groups)


@pytest.mark.parametrize("head", ["head", "classifier", "fc"])
def test_layer_groups__take_an_unknown_backbone_whole(head: str) -> None:
    module = Net(backbone=Net(a=linear(), b=linear(3)), **{head: linear(4)})
    assert sizes(layer_groups(module)) == {"backbone": 18, "head": 20}


def test_layer_groups__find_the_one_known_network_inside_a_backbone() -> None:
    known = Net(lambda m: {"a": m.a, "b": m.b}, a=linear(), b=linear(3))
    module = Net(backbone=Net(inner=known), head=linear(4))
    assert sizes(layer_groups(module)) == {"a": 6, "b": 12, "head": 20}


def test_layer_groups__split_a_sequential_backbone_without_taking_its_last_child_for_the_head() -> None:
    module = Net(backbone=nn.Sequential(linear(), nn.ReLU(), linear(3)), classifier=linear(4))
    assert sizes(layer_groups(module)) == {"0": 6, "2": 12, "head": 20}


def test_layer_groups__keep_a_backbones_own_classifier_with_the_head() -> None:
    module = Net(backbone=build("torchvision", "resnet18"), fc=nn.Linear(1000, 2))
    assert sizes(layer_groups(module))["head"] == 513_000 + 2002


@pytest.mark.parametrize("wrap", [lambda net: Net(net=net), lambda net: Net(outer=Net(inner=net)), nn.Sequential])
def test_layer_groups__find_the_one_known_model(wrap) -> None:
    module = wrap(build("torchvision", "resnet18"))
    groups = layer_groups(module)
    assert list(groups) == [*RESNET, "head"]
    assert sizes(groups)["head"] == 513_000
    check_partition(module, groups)


def test_layer_groups__take_a_known_model_inside_another_for_a_part_of_it() -> None:
    net = build("torchvision", "resnet18")
    net.layer4.adapter = build("timm", "test_resnet")
    groups = layer_groups(Net(net=net))
    extra = sum(p.numel() for p in net.layer4.adapter.parameters())
    assert sizes(groups)["layer4"] == 8_393_728 + extra


def test_layer_groups__put_what_is_outside_the_network_into_the_head() -> None:
    module = Net(scale=nn.Parameter(torch.ones(7)), net=build("torchvision", "resnet18"), projection=linear(3))
    groups = layer_groups(module)
    assert sizes(groups)["head"] == 7 + 513_000 + 12
    assert sizes(groups)["stem"] == 9536


def test_layer_groups__of_a_headless_network_take_the_head_from_outside() -> None:
    net = timm.create_model("test_resnet", pretrained=False, num_classes=0)
    assert sizes(layer_groups(Net(net=net, linear=linear(3))))["head"] == 12
    alone = layer_groups(net)
    assert list(alone) == ["stem", "layer1", "layer2", "layer3", "head"]
    check_partition(net, alone)


def test_layer_groups__take_the_network_by_name() -> None:
    module = Net(teacher=build("torchvision", "alexnet"), nets=nn.ModuleDict({"student": build("timm", "test_resnet")}))
    groups = layer_groups(module, network="nets.student")
    assert list(groups) == [*RESNET, "head"]
    assert groups["layer1"].parameter_names[0].startswith("nets.student.layer1.")
    check_partition(module, groups)
    assert sizes(layer_groups(Net(net=nn.Sequential(linear(), linear(3))), network="net")) == {"0": 6, "head": 12}


def test_layer_groups__honour_the_modules_own_method_over_all_else() -> None:
    def own(m: Net) -> dict:
        return {"early": [m.backbone.a, "backbone.b"], "late": [m.scale, m.head.parameters()]}

    backbone = Net(a=linear(), b=linear(3))
    module = Net(own, backbone=backbone, head=linear(4), scale=nn.Parameter(torch.ones(5)))
    for groups in (layer_groups(module), layer_groups(module, network="backbone")):
        assert sizes(groups) == {"early": 18, "late": 25}
    assert layer_groups(module)["early"].parameter_names[-1] == "backbone.b.bias"


def test_layer_groups__of_an_own_method_may_build_on_the_function() -> None:
    module = Net(
        lambda m: {**layer_groups(m.net), "head": [m.net.fc, m.extra]}, net=build("timm", "resnet18"), extra=linear()
    )
    assert list(layer_groups(module)) == [*RESNET, "head"]
    assert sizes(layer_groups(module))["head"] == 513_000 + 6


def test_layer_groups__of_an_own_method_may_name_a_parameter_twice_in_a_group() -> None:
    module = Net(lambda m: {"a": [m.a, "a.weight"], "b": m.b}, a=linear(), b=linear(3))
    assert sizes(layer_groups(module)) == {"a": 6, "b": 12}


def test_layer_groups__honour_the_networks_own_method() -> None:
    net = Net(lambda m: {"a": m.a, "b": m.b}, a=linear(), b=linear(3))
    assert sizes(layer_groups(Net(net=net, weight=nn.Parameter(torch.ones(2))))) == {"a": 6, "head": 14}


# --- identity --------------------------------------------------------------------------------------------------------


def test_layer_groups__hold_a_tied_parameter_once_in_the_earliest_group() -> None:
    module = nn.Sequential(linear(), linear(), linear())
    module[2].weight = module[0].weight
    groups = layer_groups(module)
    assert {n: list(g.parameter_names) for n, g in groups.items()} == {
        "0": ["0.weight", "0.bias"],
        "1": ["1.weight", "1.bias"],
        "head": ["2.bias"],
    }
    check_partition(module, groups)


def test_layer_groups__hold_a_tied_parameter_in_the_earliest_group_when_it_is_registered_later() -> None:
    backbone = nn.Sequential(linear(), linear())
    head = linear()
    head.weight = backbone[0].weight
    groups = layer_groups(Net(head=head, backbone=backbone))
    assert list(groups) == ["0", "1", "head"]
    assert groups["0"].parameter_names == ("head.weight", "backbone.0.bias")
    assert groups["head"].parameter_names == ("head.bias",)


def test_layer_groups__allow_tied_parameters_in_two_groups_of_an_own_method() -> None:
    module = Net(lambda m: {"a": m.a, "b": m.b}, a=linear(), b=linear())
    module.b.weight = module.a.weight
    assert sizes(layer_groups(module)) == {"a": 6, "b": 2}


def test_layer_groups__tell_equal_values_apart() -> None:
    module = nn.Sequential(linear(), linear(), linear())
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    check_partition(module, layer_groups(module))
    assert sizes(layer_groups(module)) == {"0": 6, "1": 6, "head": 6}


def test_layer_group__looks_its_modules_up_anew() -> None:
    module = Net(net=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)))
    groups = layer_groups(module, network="net")
    weight, old = module.net[1].weight, module.net[1]
    nn.SyncBatchNorm.convert_sync_batchnorm(module)  # as Lightning's sync_batchnorm=True does during the set-up
    assert module.net[1] is not old
    assert groups["1"].modules() == [module.net[1]]
    assert frozen_modules(module, groups, ["head"]) == [module.net[0], module.net[1]]
    assert dict(groups["1"].named_parameters())["net.1.weight"] is weight
    module.net[2] = nn.Conv2d(4, 5, 3)
    assert next(groups["head"].parameters()) is module.net[2].weight


# --- errors ----------------------------------------------------------------------------------------------------------


def two_models() -> nn.Module:
    return Net(left=build("timm", "test_resnet"), right=build("timm", "test_vit"))


@pytest.mark.parametrize(
    ("module", "network", "words"),
    [
        (two_models(), None, ["left, right", 'network="left" or network="right"']),
        (two_models(), "rigth", ["network='rigth'", "Did you mean 'right'"]),
        (two_models(), "left.act1", ["'left.act1'", "no parameters"]),
        (
            Net(a=linear(), b=linear()),
            None,
            ["Net cannot", "a (Linear), b (Linear)", 'network="a"', "def layer_groups"],
        ),
        (Net(a=Net(x=linear())), "a", ["a (Net)", "def layer_groups"]),
        (Net(a=Net(b=Net(x=linear(), y=linear()))), None, ['{"stem": self.a.b.x, "head": self.a.b.y}']),
        (Net(a=nn.ReLU()), None, ["no parameters"]),
        (linear(), None, ["Linear cannot", "def layer_groups(self)"]),
        (Net(lambda m: {"a": m.a}, a=linear(), b=linear()), None, ["2 parameters", "no layer group: b.weight, b.bias"]),
        (Net(lambda m: {"a": m.a, "b": m}, a=linear()), None, ["two layer groups: a.weight (a and b)"]),
        (Net(lambda m: {"a": "sten"}, stem=linear()), None, ["'sten'", "Did you mean 'stem'"]),
        (Net(lambda m: {"a": 3}, stem=linear()), None, ["'a'", "3 is not a module"]),
        (Net(lambda m: [m.stem], stem=linear()), None, ["has to return a dict"]),
        (Net(lambda m: {"a": m.stem, "b": linear()}, stem=linear()), None, ["'b'", "the module has not"]),
        (Net(lambda m: {"a": m.stem, "b": []}, stem=linear()), None, ["group b", "empty"]),
    ],
)
def test_layer_groups__of_a_module_that_cannot_be_grouped_say_what_to_write(module, network, words) -> None:
    with pytest.raises(MisconfigurationException) as error:
        layer_groups(module, network)
    for word in words:
        assert word in str(error.value)


# --- modes -----------------------------------------------------------------------------------------------------------


def test_frozen_modules__leave_the_heads_dropout_alone() -> None:
    module = build("timm", "test_vit")
    groups = layer_groups(module)
    head_only = names_of(module, frozen_modules(module, groups, ["head"]))
    assert {"patch_embed", "pos_drop", "norm_pre", "blocks", "norm"} <= set(head_only)
    assert not {"head_drop", "head", "", "fc_norm"} & set(head_only)
    assert frozen_modules(module, groups, list(groups)) == []


def test_frozen_modules__hold_what_is_frozen_and_nothing_that_trains() -> None:
    module = nn.Sequential(
        nn.Dropout(),
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, affine=False),
        nn.Dropout(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, affine=False),
        nn.Dropout(),
        nn.Linear(4, 2),
    )
    groups = layer_groups(module)
    table = {
        ("head",): "0 1 2 3 4 5",  # 6: dropout before the head; 5 has running statistics of frozen features
        ("4", "head"): "0 1 2 3",
        ("1",): "4 5 6 7",
        ("4",): "0 1 2 3 6 7",
    }
    for trained, expected in table.items():
        assert names_of(module, frozen_modules(module, groups, trained)) == expected.split()


def test_frozen_modules__take_a_frozen_backbone_whole_with_its_functional_dropout() -> None:
    backbone = timm.create_model("test_efficientnet", pretrained=False, num_classes=0, drop_rate=0.5)
    augment, metric = nn.Dropout(), nn.Identity()
    module = Net(augment=augment, backbone=backbone, head=nn.Sequential(nn.Dropout(), linear()), metric=metric)
    groups = layer_groups(module)
    assert frozen_modules(module, groups, ["head"]) == [backbone]
    surgical = frozen_modules(module, groups, ["stem"])
    assert backbone.blocks in surgical and module.head in surgical
    assert not {augment, metric, backbone, backbone.conv_stem, module} & set(surgical)


def test_frozen_modules__leave_a_module_that_shares_a_tied_frozen_weight_in_training() -> None:
    module = nn.Sequential(linear(), linear())
    module[1].weight = module[0].weight
    groups = layer_groups(module)
    assert frozen_modules(module, groups, ["head"]) == [module[0]]


def test_frozen_modules__keep_running_statistics_and_outputs_when_put_in_eval_mode() -> None:
    torch.manual_seed(0)
    module = Net(net=timm.create_model("test_resnet", pretrained=False, drop_path_rate=0.5)).train()
    groups = layer_groups(module)
    for frozen in frozen_modules(module, groups, ["layer4", "head"]):
        frozen.eval()
    statistics = {n: b.clone() for n, b in module.named_buffers()}
    outputs: list[torch.Tensor] = []
    module.net.layer3.register_forward_hook(lambda *args: outputs.append(args[-1]))
    images = torch.randn(4, 3, 32, 32)
    module.net(images), module.net(images)
    assert torch.equal(outputs[0], outputs[1])
    changed = {n.split(".")[1] for n, b in module.named_buffers() if not torch.equal(b, statistics[n])}
    assert changed == {"layer4"}


def test_layer_group__modules_are_the_outermost_of_the_group() -> None:
    module = build("torchvision", "vit_b_32")
    groups = layer_groups(module)
    assert names_of(module, groups["stem"].modules()) == ["conv_proj", "encoder.dropout"]
    assert names_of(module, groups["head"].modules()) == ["heads"]
    layer = "encoder.layers.encoder_layer_11"
    assert names_of(module, groups[layer].modules()) == [layer, "encoder.ln"]


def test_layer_group__modules_hold_the_free_modules_that_an_own_method_lists() -> None:
    module = Net(
        lambda m: {"a": [m.a, m.drop], "b": m.b}, a=linear(), drop=nn.Dropout(), other=nn.Dropout(), b=linear()
    )
    groups = layer_groups(module)
    assert groups["a"].modules() == [module.a, module.drop]
    assert frozen_modules(module, groups, ["a"]) == [module.b]


# --- what a stage asks for -------------------------------------------------------------------------------------------

NAMES = ["stem", "layer1", "layer2", "layer3", "head"]


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("head", ["head"]),
        ("all", NAMES),
        (1, ["head"]),
        (2, ["layer3", "head"]),
        (5, NAMES),
        (["head", "stem"], ["stem", "head"]),
        (["layer[12]", "layer2"], ["layer1", "layer2"]),
        (["*"], NAMES),
    ],
)
def test_select__gives_groups_input_first(train, expected) -> None:
    assert select(NAMES, train) == expected
    assert select(dict.fromkeys(NAMES), train) == expected


def test_select__takes_head_for_the_last_group_whatever_its_name() -> None:
    assert select(["a", "b"], "head") == ["b"]
    assert select(["a", "b"], ["head", "a"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (6, "train=6 layer groups, there are 5: stem, layer1"),
        (0, "train=0"),
        (["layer9*"], "'layer9*'"),
        (["layr1"], "Did you mean 'layer1'"),
        (["stem", "x"], "The layer groups: stem, layer1, layer2, layer3, head"),
    ],
)
def test_select__refuses_what_no_group_has(train, words) -> None:
    with pytest.raises(ValueError) as error:
        select(NAMES, train)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("num_groups", "expected"),
    [
        (1, [1]),
        (2, [1 / 9, 1]),
        (3, [1 / 9, 1 / 3, 1]),  # fast.ai's [lr/9, lr/3, lr]
        (5, [1 / 9, 3**-1.5, 1 / 3, 3**-0.5, 1]),
    ],
)
def test_rate_ratios__of_a_span_are_a_geometric_ramp_of_any_length(num_groups: int, expected: list[float]) -> None:
    ratios = rate_ratios([str(index) for index in range(num_groups)], lr_span=1 / 9)
    assert list(ratios.values()) == pytest.approx(expected, rel=1e-12)
    assert ratios[str(num_groups - 1)] == 1


def test_rate_ratios__fall_towards_the_input() -> None:
    assert rate_ratios(NAMES, 0.5) == {"stem": 1 / 16, "layer1": 1 / 8, "layer2": 1 / 4, "layer3": 1 / 2, "head": 1.0}
    assert rate_ratios(NAMES, 1) == dict.fromkeys(NAMES, 1)
    assert rate_ratios(NAMES, [1, 2, 3, 4, 5]) == dict(zip(NAMES, [1, 2, 3, 4, 5], strict=True))
    with pytest.raises(ValueError, match="2 factors, and there are 5"):
        rate_ratios(NAMES, [1, 2])


# --- param groups ----------------------------------------------------------------------------------------------------


def three_layers() -> tuple[nn.Sequential, dict[str, LayerGroup]]:
    module = nn.Sequential(linear(), linear(), linear())
    return module, layer_groups(module)


def summary(param_groups: list[dict], module: nn.Module) -> dict[str, tuple[str, list[str], float]]:
    names = {id(p): n for n, p in module.named_parameters()}
    return {g["name"]: (g["layer_group"], [names[id(p)] for p in g["params"]], g["weight_decay"]) for g in param_groups}


def test_split_param_groups__of_one_param_group_are_the_layer_groups() -> None:
    module, groups = three_layers()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.3, weight_decay=0.2)
    split, parents = split_param_groups(optimizer.param_groups, groups, optimizer.defaults)
    assert summary(split, module) == {
        "0": ("0", ["0.weight", "0.bias"], 0.2),
        "1": ("1", ["1.weight", "1.bias"], 0.2),
        "head": ("head", ["2.weight", "2.bias"], 0.2),
    }
    assert parents == [0, 0, 0]
    assert all(g["lr"] == 0.3 and g["betas"] == (0.9, 0.999) for g in split)
    assert len(optimizer.param_groups) == 1 and len(optimizer.param_groups[0]["params"]) == 6
    assert "layer_group" not in optimizer.param_groups[0]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({}, {}, ["0", "1", "head", "0/1", "1/1", "head/1"]),
        ({"name": "decay"}, {}, ["decay/0", "decay/1", "decay/head", "0", "1", "head"]),
        ({"name": "x"}, {"name": "y"}, ["x/0", "x/1", "x/head", "y/0", "y/1", "y/head"]),
    ],
)
def test_split_param_groups__keep_decay_and_no_decay_apart(first, second, expected) -> None:
    module, groups = three_layers()
    weights = {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": 0.1, **first}
    biases = {"params": [p for p in module.parameters() if p.ndim == 1], "weight_decay": 0.0, "mark": "b", **second}
    optimizer = torch.optim.SGD([weights, biases], lr=1.0)
    split, parents = split_param_groups(optimizer.param_groups, groups, optimizer.defaults)
    assert [g["name"] for g in split] == expected
    assert parents == [0, 0, 0, 1, 1, 1]
    assert [g["weight_decay"] for g in split] == [0.1] * 3 + [0.0] * 3
    assert [g.get("mark") for g in split] == [None] * 3 + ["b"] * 3
    assert all(p.ndim == 1 + (g["weight_decay"] > 0) for g in split for p in g["params"])


def test_split_param_groups__add_what_the_optimizer_does_not_have() -> None:
    module, groups = three_layers()
    optimizer = torch.optim.SGD([{"params": [module[2].weight], "weight_decay": 0.5}], lr=0.1, weight_decay=0.01)
    split, parents = split_param_groups(optimizer.param_groups, groups, optimizer.defaults)
    assert summary(split, module) == {
        "head": ("head", ["2.weight"], 0.5),
        "0": ("0", ["0.weight", "0.bias"], 0.01),
        "1": ("1", ["1.weight", "1.bias"], 0.01),
        "head/1": ("head", ["2.bias"], 0.01),
    }
    assert parents == [0, 1, 1, 1]
    optimizer.param_groups[:] = split
    module(torch.ones(1, 2)).sum().backward()
    before = [p.detach().clone() for p in module.parameters()]
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_split_param_groups__keep_parameter_names_and_unshare_tensor_rates() -> None:
    module, groups = three_layers()
    optimizer = torch.optim.AdamW(list(module[1:].named_parameters()), lr=torch.tensor(0.1))
    if "param_names" not in optimizer.param_groups[0]:
        pytest.skip("this torch has no named param groups")
    split, _ = split_param_groups(optimizer.param_groups, groups, optimizer.defaults)
    assert [g["param_names"] for g in split] == [[f"{i}.weight", f"{i}.bias"] for i in (1, 2, 0)]
    assert [g["layer_group"] for g in split] == ["1", "head", "0"]
    split[0]["lr"].fill_(7.0)
    assert split[1]["lr"].item() == pytest.approx(0.1)


def test_split_param_groups__put_parameters_outside_the_module_with_the_last_group() -> None:
    module, groups = three_layers()
    extra = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([*module.parameters(), extra], lr=0.1)
    split, _ = split_param_groups(optimizer.param_groups, groups, optimizer.defaults)
    assert [len(g["params"]) for g in split] == [2, 2, 3]
    assert split[-1]["params"][-1] is extra


@pytest.mark.parametrize("network", [None, "net"])
def test_layer_groups__of_a_network_with_its_own_backbone_and_head(network: str | None) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
            self.head = nn.Linear(5, 2)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Own()
            self.temperature = nn.Parameter(torch.ones(()))

    groups = layer_groups(Whole(), network)
    names = {name: [key for key, _ in group.named_parameters()] for name, group in groups.items()}
    assert names == {
        "0": ["net.backbone.0.weight", "net.backbone.0.bias"],
        "2": ["net.backbone.2.weight", "net.backbone.2.bias"],
        "head": ["temperature", "net.head.weight", "net.head.bias"],
    }
