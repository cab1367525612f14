"""Data order as a pure function of (seed, epoch), resumable at any batch, for any number of ranks and workers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, SequentialSampler

from lightning_unfreeze.seeding import key_to_seed, keyed_rng


class KeyedDataset(Dataset[Any]):
    """A map-style dataset whose random augmentation depends on (seed, epoch, index) alone.

    Its indices are keys, `epoch * len(dataset) + index`, as `EpochSampler` yields them: that is how the epoch reaches
    persistent workers. A plain index is a key of epoch 0.

    Args:
        dataset: The dataset to read under seeded random numbers (Python's, numpy's global and torch's).
        seed: Seed of the augmentation.

    >>> from torch.utils.data import TensorDataset
    >>> data = KeyedDataset(TensorDataset(torch.arange(3)), seed=0)
    >>> data[1 * 3 + 2]  # epoch 1, index 2
    (tensor(2),)
    """

    def __init__(self, dataset: Dataset[Any], seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: int) -> Any:
        epoch, index = divmod(key, len(self))
        with keyed_rng("sample", self.seed, epoch, index):
            return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


_FAR_EPOCHS = 1 << 20


def _draws_before(indices: torch.Tensor) -> torch.Tensor:
    """How often each entry occurs before its place.

    >>> _draws_before(torch.tensor([3, 1, 3, 3]))
    tensor([0, 0, 1, 2])
    """
    sorted_indices, places = indices.sort(stable=True)
    starts = torch.searchsorted(sorted_indices, sorted_indices)
    before = torch.empty_like(indices)
    before[places] = torch.arange(len(indices)) - starts
    return before


class EpochSampler(DistributedSampler[Any]):
    """Order of the samples as a function of (seed, epoch), each rank taking every n-th one.

    Batch `b` of all ranks together holds the samples that one process with the batch size of all ranks would see in
    its batch `b`. Lightning calls `set_epoch`, and adds no sampler of its own to a `DistributedSampler`. The number of
    ranks is asked for at each use, so the sampler may be made before the process group.

    Args:
        dataset: What is sampled, for its length. For a `KeyedDataset` keys are yielded, else plain indices.
        shuffle: Permute by (seed, epoch), else in order.
        seed: Seed of the order.
        drop_last: Drop the tail that does not fill all ranks, instead of repeating samples from the start.
        weights: Draw as many samples as there are with replacement, in proportion to these, shape (len(dataset),);
            the order is shuffled then. Of a `KeyedDataset` each draw of a sample is augmented in a way of its own.

    Raises:
        ValueError: For another number of weights than samples, or weights that are no shares.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        weights: torch.Tensor | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=shuffle, seed=seed, drop_last=drop_last)
        if weights is not None and (
            weights.shape != (len(dataset),)  # type: ignore[arg-type]
            or not bool(weights.isfinite().all() and (weights >= 0).all() and weights.sum() > 0)
        ):
            raise ValueError(
                f"weights of shape {tuple(weights.shape)}: give {len(dataset)} numbers, "  # type: ignore[arg-type]
                "one per sample, 0 or more and not all 0."
            )
        self.weights = weights
        self.first_sample = 0
        self._find_ranks()

    def _find_ranks(self) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.num_replicas, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        num_samples = len(self.dataset) / self.num_replicas  # type: ignore[arg-type]
        self.num_samples = math.floor(num_samples) if self.drop_last else math.ceil(num_samples)
        self.total_size = self.num_samples * self.num_replicas

    def order(self) -> torch.Tensor:
        """Indices of this rank in the present epoch, shape (num_samples,)."""
        return self._of_this_rank(self._of_all_ranks())

    def _of_all_ranks(self) -> torch.Tensor:
        self._find_ranks()
        num_all = len(self.dataset)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(key_to_seed("order", self.seed, self.epoch))
        if self.weights is not None:
            # not `multinomial`, which takes at most 2**24 weights
            places = torch.rand(num_all, dtype=torch.float64, generator=generator)
            borders = self.weights.double().cumsum(0)
            return torch.searchsorted(borders, places * borders[-1], right=True).clamp(max=num_all - 1)
        return torch.randperm(num_all, generator=generator) if self.shuffle else torch.arange(num_all)

    def _of_this_rank(self, indices: torch.Tensor) -> torch.Tensor:
        num_all = len(indices)
        # the modulo repeats samples from the start until all ranks have the same number
        positions = torch.arange(self.rank, self.total_size, self.num_replicas) % num_all
        return indices[positions]

    def __iter__(self) -> Iterator[Any]:
        first, self.first_sample = self.first_sample, 0
        indices = self._of_all_ranks()
        keys = indices
        if isinstance(self.dataset, KeyedDataset):
            # the second draw of a sample in an epoch has the key of an epoch far away
            epochs = self.epoch + _FAR_EPOCHS * (0 if self.weights is None else _draws_before(indices))
            keys = indices + epochs * len(self.dataset)
        yield from self._of_this_rank(keys)[first:].tolist()

    def __len__(self) -> int:
        self._find_ranks()
        return self.num_samples


class EpochBatchSampler(EpochSampler):
    """`EpochSampler` that yields lists of indices, for datasets that read a whole batch at once.

    To be used as `ResumableLoader(dataset, batch_size=None, sampler=EpochBatchSampler(dataset, batch_size))`; a plain
    `BatchSampler` there would be told of no epoch by Lightning, and be sharded a second time.

    Args:
        dataset: As for `EpochSampler`.
        batch_size: Samples per batch and rank.
        shuffle: As for `EpochSampler`.
        seed: As for `EpochSampler`.
        drop_last: Drop the last batch where it is not full, as `drop_last` of a DataLoader.
        drop_tail: Drop the tail that does not fill all ranks, as `drop_last` of an `EpochSampler`.
        weights: As for `EpochSampler`.

    >>> list(EpochBatchSampler(range(5), batch_size=2, shuffle=False))
    [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        drop_tail: bool = False,
        weights: torch.Tensor | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: give an integer of 1 or more.")
        super().__init__(dataset, shuffle=shuffle, seed=seed, drop_last=drop_tail, weights=weights)
        self.batch_size, self.drop_last_batch = batch_size, drop_last

    def __iter__(self) -> Iterator[list[int]]:
        yield from BatchSampler(super().__iter__(), self.batch_size, self.drop_last_batch)

    def batches(self, device: torch.device | None = None) -> Iterator[torch.Tensor]:
        """The same batches as tensors `(B,)` of plain indices, on a device: no Python number per sample."""
        first, self.first_sample = self.first_sample, 0
        for batch in torch.split(self.order()[first:].to(device or "cpu"), self.batch_size):
            if len(batch) == self.batch_size or (len(batch) and not self.drop_last_batch):
                yield batch

    def __len__(self) -> int:
        num_batches = super().__len__() / self.batch_size
        return math.floor(num_batches) if self.drop_last_batch else math.ceil(num_batches)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that a checkpoint of Lightning resumes at the next batch, without loading those before it.

    The position is (epoch, batches handed out) and counts for the latest iterator: whoever wants to read the data
    beside a running epoch iterates over a `copy.copy` of the loader. Nothing is drawn from the global generators, and
    the worker processes' seeds follow from (seed, epoch) too.

    Args:
        dataset: A map-style dataset.
        batch_size: Samples per batch, or None with an `EpochBatchSampler`.
        sampler: An `EpochSampler` (or `SequentialSampler`, which Lightning puts in for `overfit_batches` and which
            starts its epoch anew on resume).
        **kwargs: Everything else that `DataLoader` takes, but for `shuffle` and `batch_sampler`.

    Raises:
        ValueError: For another sampler, whose order would not be a function of the epoch.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int | None = 1, sampler: Any = None, **kwargs: Any) -> None:
        if not isinstance(sampler, EpochSampler | SequentialSampler):
            raise ValueError(
                f"ResumableLoader(sampler={type(sampler).__name__}): pass EpochSampler(dataset, seed=...), or with "
                "batch_size=None EpochBatchSampler(dataset, batch_size)."
            )
        if kwargs.get("generator") is None:
            kwargs["generator"] = torch.Generator()
        super().__init__(dataset, batch_size=batch_size, sampler=sampler, **kwargs)
        self._epoch: int | None = None
        self._batches = 0
        self._num_batches = 0
        self._resuming = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: it starts at the first `next`, when Lightning (2.6) has told the sampler the epoch; Lightning
        # calls `iter` before that.
        sampler = self.sampler
        epoch = sampler.epoch if isinstance(sampler, EpochSampler) else None
        if not (self._resuming and epoch is not None and epoch == self._epoch):
            self._batches = 0
        elif self._num_batches != len(self):
            # here alone: the room is read without Lightning, too
            from lightning.fabric.utilities.exceptions import MisconfigurationException

            raise MisconfigurationException(
                f"The checkpoint was written inside an epoch of {self._num_batches} batches, the training data now "
                f"gives {len(self)}: resume with the same data, batch size and number of devices, or from a "
                "checkpoint written at the end of an epoch."
            )
        self._resuming, self._epoch, self._num_batches = False, epoch, len(self)
        if isinstance(sampler, EpochSampler):
            size = sampler.batch_size if isinstance(sampler, EpochBatchSampler) else self.batch_size
            sampler.first_sample = self._batches * (size or 1)
            self.generator.manual_seed(key_to_seed("workers", sampler.seed, sampler.epoch, sampler.rank))
        for batch in self.read():
            self._batches += 1
            yield batch

    def read(self) -> Iterator[Any]:
        """The batches of this epoch from the present position; for subclasses that read in a way of their own."""
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Position: the epoch, the batches handed out in it and their number in a whole epoch."""
        return {"epoch": self._epoch, "batches": self._batches, "num_batches": self._num_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict` at the next iteration, if that is of the same epoch; else from the epoch's start."""
        self._epoch, self._batches = state_dict["epoch"], state_dict["batches"]
        self._num_batches, self._resuming = state_dict["num_batches"], True
