"""Networks that take images of another size than they were made for."""

from __future__ import annotations

from timm.layers import Format, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def accept_any_image_size(module: nn.Module) -> None:
    """Has timm's vision transformers inside resample their position table in each forward pass.

    As `timm.create_model(..., dynamic_img_size=True)` makes them: at the size that the network was made for nothing
    changes. The table itself keeps its shape, unlike after timm's `set_input_size`, so checkpoints of all sizes fit,
    and the optimizer keeps its state. The side has to be a multiple of the patch size. Convolutional networks take any
    size as they are.
    """
    for part in module.modules():
        if isinstance(part, VisionTransformer) and type(part.patch_embed) is PatchEmbed and not part.dynamic_img_size:
            part.dynamic_img_size = True
            part.patch_embed.strict_img_size, part.patch_embed.flatten = False, False
            part.patch_embed.output_fmt = Format.NHWC
