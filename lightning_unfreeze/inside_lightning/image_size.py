"""Another image size per stage: networks take it, the data module is told, the loaders are asked for again."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from timm.layers import Format, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import IterableDataset

from lightning_unfreeze.inside_lightning.loaders import ask_for_loaders_again
from lightning_unfreeze.inside_lightning.sandbox import sandbox
from lightning_unfreeze.inside_lightning.steps import batch_on_device, training_loss
from lightning_unfreeze.seeding import kept_rng

_PROBE_IMAGES = 2  # BatchNorm behind the pooling needs more than one


def refuse_fixed_image_size(trainer: pl.Trainer, sizes: dict[str, int]) -> None:
    """Refuses sizes (stage name -> side in pixels) that nobody can set.

    Raises:
        MisconfigurationException: With the stage.
    """
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    if sizes and not callable(getattr(datamodule, "set_image_size", None)):
        name, px = next(iter(sizes.items()))
        got = "plain loaders" if datamodule is None else type(datamodule).__name__
        raise MisconfigurationException(
            f"stage {name!r} has image_size_px={px}, and {got} cannot change the size; give the fit a data module with "
            "a method `set_image_size(px)` (None for its own size), or take image_size_px out"
        )


def check_image_sizes(trainer: pl.Trainer, pl_module: pl.LightningModule, sizes: dict[str, int]) -> None:
    """Makes the network ready for several sizes, and has it take a step on two images of each, without a trace.

    Raises:
        MisconfigurationException: For a size that the network or the module's step refuses.
    """
    if sizes:
        accept_any_image_size(pl_module)
    for px in sorted(set(sizes.values())):
        name = next(stage for stage, size in sizes.items() if size == px)
        trainer.datamodule.set_image_size(px)  # type: ignore[attr-defined]
        with sandbox(trainer, pl_module), kept_rng():
            batch = batch_on_device(trainer, pl_module, _few_images(trainer.datamodule.train_dataloader()))  # type: ignore[attr-defined]
            try:
                training_loss(trainer, pl_module, batch, 0)
            except (RuntimeError, AssertionError, ValueError) as error:
                reason = " ".join(str(error).split())[:200]
                raise MisconfigurationException(
                    f"stage {name!r}: image_size_px={px} is a size that the network refuses ({reason}); give another, "
                    "or a network that takes any size (of timm's: model_kwargs with dynamic_img_size or "
                    "strict_img_size=False)"
                ) from error


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


def set_image_size(trainer: pl.Trainer, px: int | None) -> None:
    """Tells the data module, and has the loaders of the coming epochs asked for again; None is the data's own size."""
    trainer.datamodule.set_image_size(px)  # type: ignore[attr-defined]
    ask_for_loaders_again(trainer)


def _few_images(loaders: Any) -> Any:
    loader = loaders if hasattr(loaders, "dataset") else None
    if loader is None or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return next(iter(loaders))
    # without worker processes
    return loader.collate_fn([loader.dataset[index] for index in range(min(_PROBE_IMAGES, len(loader.dataset)))])
