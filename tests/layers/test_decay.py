"""What weight decay leaves out: timm's rule, against timm's own function."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.optim import param_groups_weight_decay
from torch import nn

from lightning_unfreeze import TransferClassifier
from lightning_unfreeze.layers.param_groups import decay_groups
from tests.hugging_face import build


def names_without(module: nn.Module, groups: list[dict[str, Any]]) -> set[str]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    held = [parameter for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held)) == len(names)
    return {names[p] for group in groups if group.get("weight_decay") == 0.0 for p in group["params"]}


@pytest.mark.parametrize(
    "name", ["resnet18", "test_vit", "test_convnext", "test_efficientnet", "swin_tiny_patch4_window7_224"]
)
def test_decay_groups__leave_out_what_timm_leaves_out(name: str) -> None:
    network = timm.create_model(name, num_classes=3)
    listed = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    theirs = names_without(network, param_groups_weight_decay(network, 0.05, no_weight_decay_list=listed))
    assert theirs
    assert names_without(network, decay_groups(network)) == theirs


@pytest.mark.parametrize(
    ("network", "tokens"),
    [
        (torchvision.models.vit_b_32(num_classes=2, image_size=64), {"class_token", "encoder.pos_embedding"}),
        (
            build("Dinov2WithRegisters"),
            {
                f"dinov2_with_registers.embeddings.{name}"
                for name in ("cls_token", "mask_token", "register_tokens", "position_embeddings")
            },
        ),
    ],
    ids=["torchvision", "hugging face"],
)
def test_decay_groups__leave_out_tokens_and_positions(network: nn.Module, tokens: set[str]) -> None:
    without = names_without(network, decay_groups(network))
    assert without == tokens | {name for name, parameter in network.named_parameters() if parameter.ndim == 1}


def test_classifier__decays_no_norms_and_biases() -> None:
    classifier = TransferClassifier(
        "test_vit", 3, pretrained=False, optimizer=lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.3)
    )
    rates = {
        p: group["weight_decay"] for group in classifier.configure_optimizers().param_groups for p in group["params"]
    }
    found = {name: rates[parameter] for name, parameter in classifier.named_parameters()}
    assert found["model.blocks.0.attn.qkv.weight"] == found["model.head.weight"] == 0.3
    for name in ("model.blocks.0.norm1.weight", "model.blocks.0.attn.qkv.bias", "model.cls_token", "model.pos_embed"):
        assert found[name] == 0.0
