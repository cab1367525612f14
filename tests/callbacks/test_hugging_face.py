"""Hugging Face's networks and PEFT's adapters through the callbacks, by a module as their users write it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_unfreeze import CosineRestarts, GradualUnfreeze, LRFinderPerStage, PrecomputeFeatures, Stage
from tests.hugging_face import FAMILIES, HuggingFaceModule, build, photo_loader
from tests.zoo import quiet_trainer, same_weights, weights_of

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
# peft 0.21 beside transformers 5
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def fit(module: HuggingFaceModule, stages: list[Stage], size_px: int = 32, *others: Any) -> HuggingFaceModule:
    torch.manual_seed(0)
    callbacks = [GradualUnfreeze(stages), *others]
    if any(stage.precompute for stage in stages):
        callbacks.append(PrecomputeFeatures(policy="always"))
    quiet_trainer(callbacks).fit(module, photo_loader(size_px), photo_loader(size_px))
    return module


@pytest.mark.parametrize("family", FAMILIES)
def test_precompute__of_hugging_face_gives_the_weights_of_training_on_images(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the head and one block below it; a stage that could not be stored would warn, and so fail."""
    monkeypatch.chdir(tmp_path)
    size_px = FAMILIES[family][1]
    both = []
    for precompute in (False, True):
        stages = [
            Stage("head", train="head", epochs=1, precompute=precompute),
            Stage("top", train=2, epochs=1, precompute=precompute),
        ]
        both.append(fit(HuggingFaceModule(build(family)), stages, size_px))
    assert both[0].losses == both[1].losses and len(both[0].losses) == 6
    assert same_weights(weights_of(both[0]), weights_of(both[1])) == []


@pytest.mark.filterwarnings("ignore:stage 'full'. no signal")  # in noise
def test_range_test__reads_the_loss_of_a_hugging_face_module() -> None:
    finder = LRFinderPerStage(num_steps=20)
    stages = [Stage("full", lr="find", lr_span=1 / 9, cycle_len=1)]
    fit(HuggingFaceModule(build("ViT")), stages, 32, finder, CosineRestarts())
    assert len(finder.results["full"].losses) >= 6


# --- adapters --------------------------------------------------------------------------------------------------------

TARGETS: dict[str, Any] = {
    "ViT": ["q_proj", "v_proj"],
    "Dinov2": ["q_proj", "v_proj"],
    "Swin": ["q_proj", "v_proj"],
    "ConvNext": ["pwconv1", "pwconv2"],
    "ResNet": r".*stages.*convolution",  # BatchNorm beside adapters
}


def with_lora(family: str, targets: Any = None) -> Any:
    config = peft.LoraConfig(target_modules=targets or TARGETS[family], modules_to_save=["classifier"], r=2)
    return peft.get_peft_model(build(family), config)


@pytest.mark.parametrize("train", ["all", "adapters", "head", 2])
@pytest.mark.parametrize("family", TARGETS)
def test_adapters__that_were_saved_reproduce_the_network(family: str, train: Any, tmp_path: Path) -> None:
    network = with_lora(family)
    before = weights_of(network)
    fit(HuggingFaceModule(network), [Stage("s", train=train, epochs=2)])
    changed = same_weights(before, weights_of(network))
    assert changed and all("lora_" in name or "modules_to_save" in name for name in changed)
    if train == "head":
        assert all("modules_to_save" in name for name in changed)

    network.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(build(family), str(tmp_path)).eval()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=images).logits, network.eval()(pixel_values=images).logits)


def test_adapters__follow_their_layer_group_in_rate() -> None:
    module = HuggingFaceModule(with_lora("ViT"))
    trainer = quiet_trainer([GradualUnfreeze([Stage("s", train="adapters", lr=0.1, lr_span=1 / 16, epochs=1)])])
    trainer.fit(module, photo_loader(), photo_loader())
    rate_of = {p: group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    rates = {name: rate_of[p] for name, p in module.named_parameters() if "lora_A" in name and "q_proj" in name}
    # five layer groups: 1/16, 1/8, 1/4, 1/2, 1 of the rate; the stem has no adapter
    assert list(rates.values()) == pytest.approx([0.1 / 8, 0.1 / 4, 0.1 / 2])


@pytest.mark.parametrize("layers", ["2", "12"])
def test_adapters__in_the_top_blocks_train_on_stored_features_of_the_rest(
    layers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network = with_lora("ViT", rf".*layers\.[{layers}]\.attention\.(q|v)_proj")
    both = [
        fit(HuggingFaceModule(copy.deepcopy(network)), [Stage("s", train="adapters", epochs=2, precompute=precompute)])
        for precompute in (False, True)
    ]
    assert both[0].losses == both[1].losses
    assert same_weights(weights_of(both[0]), weights_of(both[1])) == []
    assert len(list(tmp_path.rglob("*-train"))) == 1


def test_adapters__asked_for_where_there_are_none_are_an_error() -> None:
    with pytest.raises(MisconfigurationException, match=r"stage 's': train='adapters', and the module has no adapters"):
        fit(HuggingFaceModule(build("ViT")), [Stage("s", train="adapters", epochs=1)])


def test_adapters__whose_head_peft_froze_cannot_have_it_trained() -> None:
    network = peft.get_peft_model(build("ViT"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(MisconfigurationException, match=r"stage 's': train='head' trains nothing.*modules_to_save"):
        fit(HuggingFaceModule(network), [Stage("s", train="head", epochs=1)])
