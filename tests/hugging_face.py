"""Hugging Face's image classifiers, built tiny from their configs, and a module and data as their users write them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
_DINO = {**{name: value for name, value in _VIT.items() if name != "intermediate_size"}, "mlp_ratio": 2}
_FOUR_STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 2, 1, 1]}
_PYRAMID = {
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
}
_SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 2],
    "num_heads": [2, 2],
    "window_size": 4,
    "mlp_ratio": 2.0,
}

# prefix of the class -> what makes it tiny, the side of its images, and its layer groups but for "head"
FAMILIES: dict[str, tuple[dict[str, Any], int, str]] = {
    "ViT": (_VIT, 32, "stem layers.0 layers.1 layers.2"),
    "DeiT": (_VIT, 32, "stem layers.0 layers.1 layers.2"),
    "Beit": (_VIT, 32, "stem layers.0 layers.1 layers.2"),
    "Dinov2": (_DINO, 32, "stem layer.0 layer.1 layer.2"),
    "Dinov2WithRegisters": (_DINO, 32, "stem layer.0 layer.1 layer.2"),
    "Swin": (_SWIN, 32, "stem layers.0 layers.1"),
    "Swinv2": (_SWIN, 32, "stem layers.0 layers.1"),
    "ConvNext": (_FOUR_STAGES, 32, "stem stages.0 stages.1 stages.2 stages.3"),
    "ConvNextV2": (_FOUR_STAGES, 32, "stem stages.0 stages.1 stages.2 stages.3"),
    "ResNet": (
        {"embedding_size": 8, "layer_type": "basic", **_FOUR_STAGES},
        32,
        "stem stages.0 stages.1 stages.2 stages.3",
    ),
    "RegNet": (
        {"embedding_size": 8, "groups_width": 4, **_FOUR_STAGES},
        32,
        "stem stages.0 stages.1 stages.2 stages.3",
    ),
    "Bit": ({"embedding_size": 8, "num_groups": 2, **_FOUR_STAGES}, 64, "stem stages.0 stages.1 stages.2 stages.3"),
    # runs of equal width: 8; 16 16; 32 x 4; 64 x 4; 128 x 12; 256 x 3 channels at a quarter of the width
    "MobileNetV1": (
        {"depth_multiplier": 0.25, "image_size": 32},
        32,
        "stem layer.0 layer.1 layer.3 layer.7 layer.11 layer.23",
    ),
    # at a half of the width 16 x 5, 32 x 4, 48 x 3, 80 x 3, 160: Sandler et al. 2018, table 2
    "MobileNetV2": ({"depth_multiplier": 0.5, "image_size": 32}, 32, "stem layer.0 layer.5 layer.9 layer.12 layer.15"),
    "MobileViT": (
        {
            "image_size": 64,
            "hidden_sizes": [16, 16, 16],
            "neck_hidden_sizes": [4, 8, 8, 8, 8, 8, 16],
            "num_attention_heads": 2,
            "expand_ratio": 1.0,
        },
        64,
        "stem layer.0 layer.1 layer.2 layer.3 layer.4",
    ),
    "EfficientNet": (
        {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320},
        32,
        "stem blocks.0 blocks.3 blocks.5 blocks.8 blocks.11 blocks.15",
    ),
    "Levit": (
        {
            "image_size": 32,
            "hidden_sizes": [16, 16, 16],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [4, 4, 4],
            "down_ops": [["Subsample", 4, 2, 4, 2, 2]] * 2,
        },
        32,
        "stem stages.0 stages.1 stages.2",
    ),
    "Pvt": ({"image_size": 32, **_PYRAMID}, 32, "block.0 block.1 block.2 block.3"),
    "PvtV2": ({"image_size": 32, **_PYRAMID}, 32, "layers.0 layers.1 layers.2 layers.3"),
    "PoolFormer": ({"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}, 64, "block.0 block.1 block.2 block.3"),
    "FocalNet": (
        {"image_size": 32, "embed_dim": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]},
        32,
        "stem stages.0 stages.1 stages.2 stages.3",
    ),
    "Cvt": ({"embed_dim": [8, 8, 16], "num_heads": [1, 1, 2], "depth": [1, 2, 3]}, 64, "stages.0 stages.1 stages.2"),
    "Segformer": (_PYRAMID, 32, "stages.0 stages.1 stages.2 stages.3"),
    "CLIP": ({"vision_config": _VIT}, 32, "stem layers.0 layers.1 layers.2"),  # has no base model of its own
    "Siglip": ({"vision_config": _VIT}, 32, "stem layers.0 layers.1 layers.2"),
}
_OTHER_CLASSES = {
    "DeiT": "DeiTForImageClassificationWithTeacher",
    "Levit": "LevitForImageClassificationWithTeacher",
}


def build(family: str, num_labels: int = 3) -> nn.Module:
    """A tiny classifier with random weights, the same on each call, without dropout."""
    import transformers

    options, _, _ = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(num_labels=num_labels, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family in _OTHER_CLASSES:
            network = getattr(transformers, _OTHER_CLASSES[family])(config)
        else:
            network = transformers.AutoModelForImageClassification.from_config(config)
    for part in network.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return network


class Photos(Dataset[dict[str, torch.Tensor]]):
    """Noise in the form that Hugging Face's models take."""

    def __init__(self, size_px: int = 32, num: int = 12, num_labels: int = 3) -> None:
        self.images = torch.randn(num, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))
        self.labels = torch.arange(num) % num_labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def photo_loader(size_px: int = 32, batch_size: int = 4) -> DataLoader[dict[str, torch.Tensor]]:
    return DataLoader(Photos(size_px), batch_size=batch_size)


class HuggingFaceModule(pl.LightningModule):
    """A LightningModule around such a network, as their tutorials write it."""

    def __init__(self, network: nn.Module, lr: float = 1e-2) -> None:
        super().__init__()
        self.model = network
        self.lr = lr
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.model(pixel_values=batch["pixel_values"]).logits, batch["labels"])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        outputs = self.model(pixel_values=batch["pixel_values"])
        self.log("val_loss", nn.functional.cross_entropy(outputs.logits, batch["labels"]))
        self.log("val_acc", (outputs.logits.argmax(-1) == batch["labels"]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)
