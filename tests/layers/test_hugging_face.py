"""Hugging Face's classifiers are split at their blocks; the order of the groups is the order of execution."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from lightning_unfreeze.layers.groups import layer_groups
from tests.hugging_face import FAMILIES, HuggingFaceModule, build

pytest.importorskip("transformers")


def execution_order(network: nn.Module, size_px: int) -> dict[nn.Parameter, int]:
    """Parameter -> place of its module among those that a forward pass enters; those it does not enter are left out."""
    order: dict[nn.Parameter, int] = {}

    def note(part: nn.Module, _: Any) -> None:
        for parameter in part.parameters(recurse=False):
            order.setdefault(parameter, len(order))

    hooks = [part.register_forward_pre_hook(note) for part in network.modules()]
    network.eval()(pixel_values=torch.zeros(2, 3, size_px, size_px))
    for hook in hooks:
        hook.remove()
    return order


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_groups__of_hugging_face_run_one_after_the_other(family: str) -> None:
    _, size_px, names = FAMILIES[family]
    network = build(family)
    groups = layer_groups(network)
    assert list(groups) == [*names.split(), "head"]
    members = [parameter for group in groups.values() for parameter in group]
    assert len(members) == len(set(members)) and set(members) == set(network.parameters())
    order = execution_order(network, size_px)
    places = [[order[parameter] for parameter in group if parameter in order] for group in groups.values()]
    for before, after in itertools.pairwise(places):
        assert max(before) < min(after)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("CLIP", "Siglip")])
def test_layer_groups__heads_of_hugging_face_are_what_is_not_in_the_base_model(family: str) -> None:
    network: Any = build(family)
    base = set(network.base_model.parameters())
    assert base and set(layer_groups(network)["head"]) == set(network.parameters()) - base


@pytest.mark.parametrize("family", ["ViT", "ResNet", "Swin", "PoolFormer", "CLIP"])
def test_layer_groups__find_hugging_face_inside_a_module_and_with_a_head_of_ones_own(family: str) -> None:
    network: Any = build(family)
    alone = {name: group.parameter_names for name, group in layer_groups(network).items()}
    inside = layer_groups(HuggingFaceModule(network))
    assert {name: group.parameter_names for name, group in inside.items()} == {
        name: tuple(f"model.{parameter}" for parameter in names) for name, names in alone.items()
    }

    class OwnHead(nn.Module):
        def __init__(self, tower: nn.Module) -> None:
            super().__init__()
            self.tower, self.classifier = tower, nn.Linear(16, 3)

    if family in ("ViT", "ResNet", "Swin"):
        groups = layer_groups(OwnHead(network.base_model))
        assert list(groups) == list(alone)
        assert groups["head"].parameter_names == ("classifier.weight", "classifier.bias")


def test_layer_groups__of_a_wrapped_timm_model_are_those_of_timm() -> None:
    import timm
    from transformers import AutoModelForImageClassification, TimmWrapperConfig

    config = TimmWrapperConfig(architecture="resnet18", num_labels=3, do_pooling=True)
    network = AutoModelForImageClassification.from_config(config)
    assert list(layer_groups(network)) == list(layer_groups(timm.create_model("resnet18")))


def test_layer_groups__of_another_task_keep_its_head_together() -> None:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    options, _, names = FAMILIES["Segformer"]
    network = SegformerForSemanticSegmentation(SegformerConfig(num_labels=3, decoder_hidden_size=8, **options))
    groups = layer_groups(network)
    assert list(groups) == [*names.split(), "head"]
    assert {name.split(".")[0] for name in groups["head"].parameter_names} == {"decode_head"}
