"""DistributedDataParallel around exactly what trains, and the strategies that are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from lightning_unfreeze.inside_lightning.loaders import process_loaders, process_no_loaders
from lightning_unfreeze.seeding import keyed_rng

_WORKING = "single device (cpu, cuda, mps), 'ddp', 'ddp_spawn', 'ddp_fork', 'ddp_notebook'"


def refuse_untested_strategy(trainer: pl.Trainer) -> None:
    """Refuses a strategy under which unfreezing is not known to be right.

    Sharded strategies fix what trains when they wrap the module, and load callbacks after the optimizer is built.

    Raises:
        NotImplementedError: Naming the strategies that do work.
    """
    strategy = trainer.strategy
    works = isinstance(strategy, DDPStrategy | SingleDeviceStrategy)
    if not works or isinstance(strategy, DeepSpeedStrategy | XLAStrategy | SingleDeviceXLAStrategy):
        raise NotImplementedError(
            f"stages are not supported under {type(strategy).__name__}: it fixes what trains when it wraps the module; "
            f"strategies that work: {_WORKING}"
        )


def refuse_sync_batchnorm(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuses `Trainer(sync_batchnorm=True)` for BatchNorm layers that do more than normalise.

    torch's converter replaces every subclass by a plain `SyncBatchNorm`: the activation and dropout inside timm's
    `BatchNormAct2d` would be gone without a word.

    Raises:
        MisconfigurationException: Naming a layer, and what to do.
    """
    # the strategy keeps the option under a private name alone; guarded by
    # `test_sync_batchnorm__is_refused_where_torch_drops_an_activation` (Lightning 2.6)
    if getattr(trainer.strategy, "_layer_sync", None) is None:
        return
    plain = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
    for name, module in pl_module.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module).forward not in plain:
            raise MisconfigurationException(
                f"Trainer(sync_batchnorm=True) would replace {name} ({type(module).__name__}) by a SyncBatchNorm, "
                "which normalises and no more: its activation would be lost; set sync_batchnorm=False and convert the "
                "network yourself, for timm models by timm.layers.convert_sync_batchnorm(network)"
            )


def rebuild_ddp(trainer: pl.Trainer) -> None:
    """Wraps the module anew, so that the reducer covers exactly the parameters that train now.

    DDP registers its hooks for the parameters with `requires_grad` when it wraps; what is unfrozen later would never
    be reduced, and the replicas would drift apart without a word (Lightning issue #20340). A collective call: every
    rank has to make it. The strategy's own DDP options and communication hooks are used again. Does nothing without
    DDP.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy):
        return
    # dropping the last reference frees the old wrapper with its reducer and its hooks (it holds no reference cycle)
    strategy.model = strategy.lightning_module
    strategy.configure_ddp()


def broadcast_buffers(trainer: pl.Trainer) -> None:
    """Gives every rank the buffers of rank 0, those that a checkpoint holds. A collective call under DDP.

    DDP does so before each forward pass, so after the last one of a stage BatchNorm's statistics differ.
    """
    if isinstance(trainer.strategy, DDPStrategy):
        for buffer in trainer.lightning_module.buffers():
            torch.distributed.broadcast(buffer.detach(), src=0)


def gather_objects(trainer: pl.Trainer, value: Any) -> list[Any]:
    """`value` of every rank, in the order of ranks, on every rank. A collective call under several processes."""
    if trainer.world_size == 1 or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


class OneOrder:
    """A sampler whose random draws depend on the epoch and not on the rank, whatever it draws from.

    Each rank takes its share of one order, so all ranks have to draw the same one; everything else that is drawn in a
    run (augmentations, dropout) has to differ between ranks.

    Args:
        sampler: Of samples or of batches; everything but iterating is its own.
        key: Gives the key of the pass that begins.
    """

    _BLOCK = 4096  # setting the random state once per sample would take longer than reading it

    def __init__(self, sampler: Any, key: Callable[[], tuple[int | str, ...]]) -> None:
        self.sampler, self.key = sampler, key

    def __iter__(self) -> Iterator[Any]:
        key, drawn, block = self.key(), None, 0
        while True:
            with keyed_rng(*key, block):
                drawn = iter(self.sampler) if drawn is None else drawn
                some = list(islice(drawn, self._BLOCK))
            yield from some
            if len(some) < self._BLOCK:
                return
            block += 1

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        if name in ("sampler", "key"):  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.sampler, name)


def one_order_on_all_ranks(trainer: pl.Trainer, key: Callable[[int], tuple[int | str, ...]]) -> None:
    """Loaders that are made from here on draw their order with `key(epoch)`; does nothing in one process.

    Guarded by `test_ddp__a_sampler_of_the_users_is_drawn_once`.
    """
    if trainer.world_size == 1:
        return
    progress: Any = trainer.fit_loop.epoch_progress

    def in_one_order(loader: object) -> object:
        if isinstance(loader, DataLoader):
            _give_one_order(loader, lambda: key(progress.current.processed))
        return loader

    process_loaders(trainer, OneOrder, in_one_order)


def own_order_on_each_rank(trainer: pl.Trainer) -> None:
    """Loaders are made as before `one_order_on_all_ranks`."""
    process_no_loaders(trainer, OneOrder)


def _give_one_order(loader: DataLoader[Any], key: Callable[[], tuple[int | str, ...]]) -> None:
    sampler = loader.sampler
    if isinstance(sampler, DistributedSamplerWrapper):
        inner: Any = sampler.dataset
        if not isinstance(inner._sampler, OneOrder):
            inner._sampler = OneOrder(inner._sampler, key)
        return
    drawn: Any = loader.batch_sampler if loader.batch_sampler is not None else sampler
    if hasattr(loader, "state_dict") or isinstance(drawn, OneOrder) or sampler is None:
        return  # a loader that counts its position draws by that
    if type(drawn) is BatchSampler and isinstance(sampler, SequentialSampler | DistributedSampler):
        return  # draws nothing, or by the epoch
    name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
    vars(loader)[name] = OneOrder(drawn, key)  # the attribute itself is refused
