"""Which parameters adapters have, what their owner froze for good, and what a stage then trains."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from lightning_unfreeze.layers.adapters import adapter_parameters
from lightning_unfreeze.layers.freezing import fixed_parameters, frozen_modules, select, trained_parameters
from lightning_unfreeze.layers.groups import layer_groups
from tests.hugging_face import build

peft = pytest.importorskip("peft")
# peft 0.21 beside transformers 5
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def names_of(module: nn.Module, parameters: set[nn.Parameter]) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter in parameters}


def vit(head: list[str] | None = None, targets: Any = r".*\.qkv", **options: Any) -> Any:
    """timm's ViT of six blocks with LoRA, stem without an adapter."""
    network = timm.create_model("test_vit", num_classes=3)
    config = peft.LoraConfig(target_modules=targets, modules_to_save=head, r=2, **options)
    return peft.get_peft_model(network, config)


@pytest.mark.filterwarnings("ignore:Unsupported layer type .*LayerNorm:UserWarning")
@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"]),
        peft.LoraConfig(target_modules=["q_proj", "fc1"], use_dora=True),
        peft.IA3Config(target_modules=["q_proj", "fc1"], feedforward_modules=["fc1"], modules_to_save=["classifier"]),
        peft.LoHaConfig(target_modules=["q_proj"]),
        peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, modules_to_save=["classifier"]),
        peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        peft.VeraConfig(target_modules=["q_proj"], r=4),
        peft.LNTuningConfig(target_modules=["layernorm_before"], modules_to_save=["classifier"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_adapter_parameters__are_those_that_peft_lets_train(config: Any) -> None:
    network = peft.get_peft_model(build("ViT"), config)
    trainable = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    found = names_of(network, adapter_parameters(network))
    # AdaLoRA and others hold state beside what trains, which is of no base model either
    assert trainable <= found
    assert not any(name.replace("base_model.model.", "") in dict(build("ViT").named_parameters()) for name in found)


def test_adapter_parameters__by_hand_are_known_by_their_names() -> None:
    layer: Any = nn.Linear(4, 4)
    layer.lora_A = nn.Parameter(torch.zeros(2, 4))
    network = nn.ModuleDict({"adapter": nn.Linear(4, 4), "body": layer, "adapted": nn.Linear(4, 4)})
    assert names_of(network, adapter_parameters(network)) == {"adapter.weight", "adapter.bias", "body.lora_A"}


def test_fixed_parameters__beside_adapters_are_all_that_peft_froze() -> None:
    network = vit(head=["head"])
    groups = layer_groups(network)
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert any("patch_embed" in name for name in frozen)  # a layer group without an adapter, frozen whole
    assert names_of(network, fixed_parameters(groups)) == frozen
    for train in ("all", 7, ["stem", "blocks.0", "head"]):
        assert not names_of(network, trained_parameters(groups, train, fixed_parameters(groups))) & frozen


def test_fixed_parameters__forget_a_freezing_by_stages_but_not_peft() -> None:
    """A stage that trained the head alone froze the adapters; the next plan may train them, and nothing else."""
    network = vit(head=["head"])
    groups = layer_groups(network)
    before = fixed_parameters(groups)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("modules_to_save" in name)
    assert fixed_parameters(groups) == before


@pytest.mark.parametrize("head", [["head"], None])
def test_select__of_adapters_are_the_groups_that_have_one_and_the_head(head: list[str] | None) -> None:
    groups = layer_groups(vit(head=head, targets=r".*blocks\.[35]\.attn\.qkv"))
    assert select(groups, "adapters") == ["blocks.3", "blocks.5", "head"]


def test_trained_parameters__of_adapters_are_no_base_weights_even_where_nobody_froze_those() -> None:
    network = vit(head=["head"])
    network.requires_grad_(True)
    groups = layer_groups(network)
    trained = names_of(network, trained_parameters(groups, "adapters", fixed_parameters(groups)))
    heads = set(groups["head"].parameter_names)
    assert heads <= trained
    assert all("lora_" in name for name in trained - heads) and len(trained - heads) == 12  # A and B of six blocks


def test_trained_parameters__that_leave_nothing_to_train_are_an_error() -> None:
    groups = layer_groups(vit(head=None))  # PEFT froze the head too
    with pytest.raises(ValueError, match=r"train='head' trains nothing.*head.*modules_to_save"):
        trained_parameters(groups, "head", fixed_parameters(groups))
    with pytest.raises(ValueError, match=r"train='adapters', and the module has no adapters"):
        select(layer_groups(timm.create_model("test_vit")), "adapters")


def test_frozen_modules__hold_a_batchnorm_whose_owner_froze_it_in_a_group_that_trains() -> None:
    network = peft.get_peft_model(
        build("ResNet"), peft.LoraConfig(target_modules=r".*stages.*convolution", modules_to_save=["classifier"])
    )
    groups = layer_groups(network)
    fixed = fixed_parameters(groups)
    frozen = {part for root in frozen_modules(network, groups, list(groups), fixed) for part in root.modules()}
    norms = {part for part in network.modules() if isinstance(part, nn.BatchNorm2d)}
    assert norms and norms <= frozen
    adapters = {
        part for name, part in network.named_modules() if name.rpartition(".")[0].endswith(("lora_A", "lora_B"))
    }
    assert adapters and not adapters & frozen
