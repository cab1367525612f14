"""The pass over the data that fills a feature store, shared out among the ranks of a node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unfreeze.distributed import gather_objects
from lightning_unfreeze.feature_data import BatchForm, NoStoreError, innermost_dataset, view_batches
from lightning_unfreeze.feature_store import (
    FeatureStore,
    FeatureWriter,
    StoreDtype,
    StoreError,
    StoreLayout,
    TensorSpec,
    store_lock,
)
from lightning_unfreeze.fingerprints import dataset_fingerprint, fingerprint_of, transform_fingerprint
from lightning_unfreeze.frozen_prefix import FrozenPrefix, advance, fingerprint
from lightning_unfreeze.reporting import progress_bar
from lightning_unfreeze.sandbox import batch_on_device

_CHECKED_ROWS = 4


@dataclass(frozen=True)
class ViewedData:
    """What is stored: the views of a dataset, and how its samples are read and batched.

    Attributes:
        name: `"train"` or `"val"`.
        loader: Gives collate function, batch size and workers.
        views: The dataset with the transform of each view, view 0 first.
        form: How a batch is built.
        seed: Seed of random views.
        fingerprint: The user's own word for what the data is.
    """

    name: str
    loader: DataLoader[Any]
    views: Sequence[Any]
    form: BatchForm
    seed: int
    fingerprint: str | None = None

    def key(self) -> str:
        """Fingerprint of samples, transforms and views."""
        return fingerprint_of(
            data=dataset_fingerprint(self.views[0], fingerprint=self.fingerprint),
            transforms=[transform_fingerprint(getattr(innermost_dataset(v), "transform", None)) for v in self.views],
            collate=transform_fingerprint(self.loader.collate_fn),
            views=len(self.views),
            seed=self.seed if len(self.views) > 1 else None,
        )


@dataclass(frozen=True)
class StoredData:
    """A finished store with what it was made from."""

    data: ViewedData
    data_key: str
    prefix: FrozenPrefix
    prefix_key: str
    store: FeatureStore

    def leads_to(self, data_key: str, prefix: FrozenPrefix) -> bool:
        """Whether the features behind `prefix` can be had from these, without the images."""
        here, there = self.prefix.module_names, prefix.module_names
        before = len(here) < len(there) and there[: len(here)] == here
        return before and self.data_key == data_key and fingerprint(self.prefix) == self.prefix_key


class FeaturePass:
    """Opens the store of (data, prefix), or fills it: from an earlier store where there is one, else from the images.

    All methods are collective: every rank calls them, and where one fails, all raise and no half store stays.

    Args:
        trainer: Gives device, ranks and the progress bar.
        pl_module: Whose transfer hooks the batches go through.
        data: What is stored.
        prefix: What runs on it.
        root: Folder of the stores.
        dtype: Precision on disk.
        verify: How much of an existing store is checked.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        data: ViewedData,
        prefix: FrozenPrefix,
        root: Path,
        dtype: StoreDtype,
        verify: Literal["sampled", "full"],
    ) -> None:
        self.trainer, self.pl_module, self.data, self.prefix, self.verify = trainer, pl_module, data, prefix, verify
        self.rank, self.num_ranks = trainer.local_rank, max(1, trainer.world_size // trainer.num_nodes)
        self.data_key, self.prefix_key = data.key(), fingerprint(prefix)
        key = fingerprint_of(data=self.data_key, prefix=self.prefix_key, dtype=dtype)
        _, first = next(view_batches(data.loader, data.views[0], data.seed, 0, torch.arange(1)))
        tensors = {name: TensorSpec.like(value) for name, value in data.form.split(first)[1].items()}
        for name, shape in prefix.shapes.items():
            tensors[name] = TensorSpec.like(torch.empty(1, *shape, dtype=prefix.dtypes[name]), dtype)
        self.layout = StoreLayout(key, len(data.views[0]), tensors, len(data.views))
        self.directory = root / f"{key[:24]}-{data.name}"

    def open(self) -> tuple[StoredData | None, str]:
        """The finished store if it is there and true, else None; and why one that is there is not used."""
        store, problem = None, ""
        try:
            store = FeatureStore.open(self.directory, fingerprint=self.layout.fingerprint, verify=self.verify)
            if not self._still_true(store):
                problem = f"the features in {self.directory} are not what the network gives now"
        except StoreError as error:
            problem = str(error) if (self.directory / "manifest.json").exists() else "there is none"
        problems = [one for one in gather_objects(self.trainer, problem) if one]
        if store is None or problems:
            told = [one for one in problems if one != "there is none"]
            return None, told[0] if told else ""
        return self._stored(store), ""

    def _still_true(self, store: FeatureStore) -> bool:
        """Computes a few rows of view 0 anew; another batch size may round differently, never by a hundredth."""
        some = torch.linspace(0, store.layout.num_rows - 1, _CHECKED_ROWS).long().unique()
        rows, batch = next(view_batches(self.data.loader, self.data.views[0], self.data.seed, 0, some))
        kept, now = store.read(rows), self._extract(batch)
        for name, value in now.items():
            there, here = kept[name].float(), value.cpu().to(kept[name].dtype).float()
            tolerance = 1e-2 * here.abs().max() if name in self.prefix.shapes else 0.0
            if not bool((there - here).abs().max() <= tolerance):
                return False
        return True

    def fill(self, earlier: StoredData | None = None) -> StoredData:
        """Fills the store and opens it.

        Raises:
            NoStoreError: What went wrong on the first rank that failed.
        """
        writers: list[FeatureWriter] = []
        with ExitStack() as stack:
            if self.rank == 0:
                self._together(lambda: stack.enter_context(store_lock(self.directory)), writers)
                self._together(lambda: writers.append(FeatureWriter(self.directory, self.layout)), writers)
                self._together(lambda: None, writers)
            else:
                self._together(lambda: None, writers)
                self._together(lambda: None, writers)
                self._together(
                    lambda: writers.append(FeatureWriter(self.directory, self.layout, rank=self.rank)), writers
                )
            self._together(lambda: self._fill_rows(writers[0], earlier), writers)
            self._together(lambda: writers[0].finalize() if self.rank == 0 else None, writers)
        opened: list[FeatureStore] = []
        self._together(
            lambda: opened.append(FeatureStore.open(self.directory, fingerprint=self.layout.fingerprint)), []
        )
        return self._stored(opened[0])

    def _stored(self, store: FeatureStore) -> StoredData:
        return StoredData(self.data, self.data_key, self.prefix, self.prefix_key, store)

    def _together(self, action: Callable[[], Any], writers: list[FeatureWriter]) -> None:
        """Every rank acts, then all learn whether one failed: a barrier at which no rank is left waiting."""
        message = ""
        try:
            action()
        except (StoreError, NoStoreError, OSError, RuntimeError, ValueError) as error:
            message = str(error) or type(error).__name__
        messages = [one for one in gather_objects(self.trainer, message) if one]
        if messages:
            for writer in writers:
                writer.discard()
            raise NoStoreError(messages[0])

    def _fill_rows(self, writer: FeatureWriter, earlier: StoredData | None) -> None:
        missing = [writer.missing_rows(view) for view in range(len(self.data.views))]
        mine = [rows[rows % self.num_ranks == self.rank] for rows in missing]
        total = sum(len(rows) for rows in mine)
        with writer, progress_bar(self.trainer, f"features of the {self.data.name} data", total, "image") as advanced:
            for view, rows in enumerate(mine):
                batches = self._from_images(view, rows) if earlier is None else self._from_store(earlier, view, rows)
                for part, tensors in batches:
                    writer.write(part, tensors, view)
                    advanced(len(part))

    def _from_images(self, view: int, rows: Tensor) -> Any:
        batches = view_batches(self.data.loader, self.data.views[view], self.data.seed, view, rows)
        return ((part, self._extract(batch)) for part, batch in batches)

    def _extract(self, batch: Any) -> dict[str, Tensor]:
        _, rest = self.data.form.split(batch)
        images, _ = self.data.form.split(batch_on_device(self.trainer, self.pl_module, batch))
        return {**self.prefix.extract(images), **rest}

    def _from_store(self, earlier: StoredData, view: int, rows: Tensor) -> Any:
        device = self.trainer.strategy.root_device
        for part in rows.split(self.data.loader.batch_size or 1):
            tensors = earlier.store.read(part, view)
            features = {name: tensors[name].to(device) for name in earlier.prefix.shapes}
            rest = {name: value for name, value in tensors.items() if name not in features}
            yield part, {**advance(features, earlier.prefix, self.prefix), **rest}
