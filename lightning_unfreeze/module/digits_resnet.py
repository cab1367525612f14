"""The demo's backbone: a small ResNet, pretrained on digits 0-4, registered with timm as `digits_resnet`.

Its weights were made by `benchmarks/pretrain_digits.py` and travel with the package, so that
`timm.create_model("digits_resnet", pretrained=True, num_classes=5)` needs no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

WEIGHTS = Path(__file__).parent / "assets" / "digits04.safetensors"

# num_classes 0: the file holds no head, and timm asks for none
default_cfgs = generate_default_cfgs(
    {
        "digits_resnet.digits04": {
            "file": str(WEIGHTS),
            "num_classes": 0,
            "input_size": (1, 32, 32),
            "pool_size": (1, 1),
            "mean": (0.3,),
            "std": (0.35,),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "first_conv": "conv1.0",
            "classifier": "fc",
        }
    }
)


@register_model  # type: ignore[untyped-decorator]
def digits_resnet(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """A ResNet with one block per layer and about 0.13 M parameters, for images of 1 x 32 x 32 px.

    Args:
        pretrained: Load the weights pretrained on digits 0-4.
        **kwargs: Arguments of `timm.models.resnet.ResNet` that take the place of those here.
    """
    arguments = {
        "block": BasicBlock,
        "layers": (1, 1, 1, 1),
        "channels": (16, 32, 48, 64),
        "stem_width": 8,
        "stem_type": "deep",
    } | kwargs
    return build_model_with_cfg(ResNet, "digits_resnet", pretrained, **arguments)
