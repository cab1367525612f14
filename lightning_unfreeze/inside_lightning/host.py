"""The Trainer and its module as what the feature store needs of whoever trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor

from lightning_unfreeze.features.batch_form import NoStoreError
from lightning_unfreeze.features.host import Host
from lightning_unfreeze.features.viewed import check_loader, plain_dataset, training_views
from lightning_unfreeze.inside_lightning.distributed import gather_objects
from lightning_unfreeze.inside_lightning.loaders import own_validation_loader
from lightning_unfreeze.inside_lightning.sandbox import sandbox
from lightning_unfreeze.inside_lightning.steps import batch_on_device, step_outcome, training_loss
from lightning_unfreeze.inside_lightning.transfer import mode_of
from lightning_unfreeze.reporting import progress_bar


def views_of(
    trainer: pl.Trainer,
    split: Literal["train", "val"],
    loader: Any,
    num_views: int,
    eval_transform: Callable[[Any], Any] | None,
) -> list[Any]:
    """The dataset of each view of what a fit reads, view 0 first, if they can be stored; no sample is read.

    Validation data has one view, and gives the transform of view 0 where none is passed.

    Raises:
        NoStoreError: With the reason.
    """
    dataset = plain_dataset(check_loader(loader, in_order=split == "val"))
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise NoStoreError("overfit_batches reads a few images only")
    if split == "val":
        return [dataset]
    return training_views(
        dataset, num_views, eval_transform, lambda: getattr(own_validation_loader(trainer), "dataset", None)
    )


def host_of(trainer: pl.Trainer) -> Host:
    """For a fit that has begun. Steps go without the wrapper of the strategy, so that ranks need not go together."""
    module = trainer.lightning_module

    def feed(batch: Any, training: bool) -> Any:
        with mode_of(trainer, module, training=training):
            return batch_on_device(trainer, module, batch)

    def loss(batch: Any) -> Tensor:
        found = training_loss(trainer, module, batch, together=False)
        if found is None:
            raise NoStoreError("training_step returned no loss, so the shortcut cannot be checked")
        return found

    return Host(
        module,
        trainer.strategy.root_device,
        feed=feed,
        run=loss,
        outcome=lambda batch, training: step_outcome(
            trainer, module, batch, "training_step" if training else "validation_step"
        ),
        aside=lambda: sandbox(trainer, module),
        gather=lambda value: gather_objects(trainer, value),
        rank=trainer.local_rank,
        num_ranks=max(1, trainer.world_size // trainer.num_nodes),
        conditions=[
            f"{type(trainer.precision_plugin).__qualname__} {type(trainer.strategy).__qualname__} {trainer.precision}",
            [trainer.current_epoch, trainer.global_step, trainer.world_size],
        ],
        progress=lambda text, total: progress_bar(trainer, text, total, "image"),
    )
