"""The pass over the data that fills a feature store, shared out among the processes of a node."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lightning_unfreeze.features.batch_form import NoStoreError
from lightning_unfreeze.features.host import Host
from lightning_unfreeze.features.key import fingerprint_of, function_fingerprint, prefix_checksum, prefix_fingerprint
from lightning_unfreeze.features.layout import StoreDtype, StoreError, StoreLayout, TensorSpec
from lightning_unfreeze.features.prefix import FrozenPrefix, advance
from lightning_unfreeze.features.serve import view_batches
from lightning_unfreeze.features.shortcut import seconds
from lightning_unfreeze.features.store import FeatureStore, store_lock
from lightning_unfreeze.features.viewed import ViewedData, pass_size
from lightning_unfreeze.features.writer import FeatureWriter
from lightning_unfreeze.seeding import key_to_seed, keyed_rng

_CHECKED_ROWS = 4
_Value = TypeVar("_Value")


def together(host: Host, action: Callable[[], _Value]) -> _Value:
    """Every rank acts, then all learn whether one failed: a barrier at which no rank is left waiting.

    Raises:
        NoStoreError: On every rank, with what went wrong on the first one that failed, be it in this package, in the
            user's dataset or in the module: training goes on without a store, and meets the error again if it is real.
    """
    failure: Exception | None = None
    message = ""
    try:
        value = action()
    except (NoStoreError, StoreError) as error:
        failure, message = error, str(error)
    except Exception as error:
        failure, message = error, f"{type(error).__name__}: {error}"
    messages = [one for one in host.gather(message) if one]
    if messages:
        raise NoStoreError(messages[0]) from failure
    return value


class NotFilledError(NoStoreError):
    """There is a shortcut, and no place or no time for its features."""


@dataclass(frozen=True)
class StoredData:
    """A finished store with what it was made from."""

    data: ViewedData
    data_key: str
    prefix: FrozenPrefix
    prefix_checksum: str
    store: FeatureStore

    def is_current(self) -> bool:
        """Whether the frozen part is what it was when the features were computed."""
        return prefix_checksum(self.prefix) == self.prefix_checksum


class FeaturePass:
    """Opens the store of (data, prefix), or fills it: from an earlier store where there is one, else from the images.

    All methods are collective: every rank calls them. Where one fails to fill, all raise and no half store stays.
    """

    def __init__(
        self,
        host: Host,
        data: ViewedData,
        prefix: FrozenPrefix,
        root: Path,
        dtype: StoreDtype,
        verify: Literal["sampled", "full"],
    ) -> None:
        self.host, self.data, self.prefix, self.verify = host, data, prefix, verify
        self.data_key, self.prefix_checksum = data.key(), prefix_checksum(prefix)
        weights, function = prefix_fingerprint(prefix), function_fingerprint(prefix)
        key = fingerprint_of(data=self.data_key, prefix=weights, function=function, dtype=dtype)
        tensors = {name: TensorSpec.like(value) for name, value in data.form.split(data.fed)[1].items()}
        for name, shape in prefix.shapes.items():
            tensors[name] = TensorSpec.like(torch.empty(1, *shape, dtype=prefix.dtypes[name]), dtype)
        self.layout = StoreLayout(key, len(data.views[0]), tensors, len(data.views))
        self.directory = root / f"{key[:24]}-{data.name}"
        self._began = time.monotonic()

    def open(self) -> tuple[StoredData | None, str]:
        """The finished store if it is there and true, else None; and why one that is there is not used.

        Raises:
            NoStoreError: If the processes found different boundaries.
        """
        if len(set(self.host.gather((self.prefix.boundary, tuple(self.prefix.shapes))))) > 1:
            raise NoStoreError("the ranks found different boundaries")
        store, problem = None, ""
        try:
            store = FeatureStore.open(self.directory, fingerprint=self.layout.fingerprint, verify=self.verify)
        except Exception as error:  # the other ranks wait to hear of it
            problem = f"{error}" if (self.directory / "manifest.json").exists() else "there is none"
        # `aside` is a collective call under DDP, so all ranks enter it or none
        if all(self.host.gather(store is not None)) and store is not None:
            with self.host.aside():
                try:
                    if not self._still_true(store):
                        problem = f"the features in {self.directory} are not what the network gives now"
                except Exception as error:  # of the user's dataset
                    problem = f"{error}"
        problems = [one for one in self.host.gather(problem) if one]
        if store is None or problems:
            return None, next((one for one in problems if one != "there is none"), "")
        return self._stored(store), ""

    def _still_true(self, store: FeatureStore) -> bool:
        """Computes a few rows of view 0 anew; another batch size may round differently, never by a hundredth."""
        some = torch.linspace(0, store.layout.num_rows - 1, _CHECKED_ROWS).long().unique()  # type: ignore[no-untyped-call]
        for rows, now in self._from_images(0, some):
            kept = store.read(rows)
            for name, value in now.items():
                there, here = kept[name].float(), value.cpu().to(kept[name].dtype).float()
                tolerance = 1e-2 * here.abs().max() if name in self.prefix.shapes else 0.0
                if not bool((there - here).abs().max() <= tolerance):
                    return False
        return True

    def fill(self, earlier: StoredData | None = None) -> StoredData:
        """Fills the store and opens it; where another run is filling it, waits for that one.

        Raises:
            NotFilledError: What went wrong on the first rank that failed.
        """
        self._began = time.monotonic()
        writers: list[FeatureWriter] = []

        def new_writer() -> None:
            writers.append(FeatureWriter(self.directory, self.layout, rank=self.host.rank))

        first = self.host.rank == 0
        try:
            with ExitStack() as stack:
                together(self.host, lambda: stack.enter_context(store_lock(self.directory)) if first else None)
                stored, _ = self.open()  # another run may have finished it while this one waited for the lock
                if stored is not None:
                    return stored
                together(self.host, lambda: new_writer() if first else None)
                together(self.host, lambda: None if first else new_writer())
                together(self.host, lambda: self._fill_rows(writers[0], earlier))
                together(self.host, lambda: writers[0].finalize() if first else None)
            fingerprint = self.layout.fingerprint
            store = together(self.host, lambda: FeatureStore.open(self.directory, fingerprint=fingerprint))
        except NoStoreError as error:
            for writer in writers:
                writer.discard()
            raise NotFilledError(str(error)) from error
        return self._stored(store)

    def said(self, earlier: StoredData | None) -> str:
        """What the filling that has just ended took, in words."""
        images, duration = self.layout.num_rows * self.layout.num_views, max(time.monotonic() - self._began, 1e-9)
        return (
            f"features of {images} {self.data.name} images {'from the store before' if earlier else 'computed'} behind "
            f"{self.prefix.boundary!r}: {duration:.1f} s, {images / duration:.0f} images/s, "
            f"{self.layout.num_bytes / 2**20:.1f} MiB in {self.directory}"
        )

    def follows(self, earlier: StoredData) -> bool:
        """Whether the features can be had from an earlier store, without the images and without a loss."""
        stored = earlier.store.layout.tensors
        exact = all(stored[name].dtype == dtype for name, dtype in earlier.prefix.dtypes.items())
        holds = exact and earlier.data_key == self.data_key and earlier.is_current()
        with self.host.aside():
            try:
                images = self.data.form.images(self.data.fed)
                reached = advance(earlier.prefix.extract(images), earlier.prefix, self.prefix)
                holds = holds and all(
                    torch.equal(reached[name], value) for name, value in self.prefix.extract(images).items()
                )
            except Exception:  # another boundary: nothing reads those features, or not in that order
                holds = False
        return all(self.host.gather(holds))

    def seconds_per_image(self, earlier: StoredData | None = None) -> float:
        """Of the pass, measured on the first few images without writing them."""
        rows = torch.arange(len(self.data.form.images(self.data.fed)))
        with self.host.aside():
            return seconds(lambda: list(self._batches(0, rows, earlier)), self.host.device) / len(rows)

    def _stored(self, store: FeatureStore) -> StoredData:
        return StoredData(self.data, self.data_key, self.prefix, self.prefix_checksum, store)

    def _fill_rows(self, writer: FeatureWriter, earlier: StoredData | None) -> None:
        missing = [writer.missing_rows(view) for view in range(len(self.data.views))]
        mine = [rows[rows % self.host.num_ranks == self.host.rank] for rows in missing]
        text = f"features of the {self.data.name} data ({self.layout.num_bytes / 2**20:.0f} MiB)"
        # features are taken from the user's own step: what it does before the network has to leave no trace
        with (
            self.host.progress(text, sum(map(len, mine))) as advanced,
            self.host.aside(),
            writer,
        ):
            for view, rows in enumerate(mine):
                for part, tensors in self._batches(view, rows, earlier):
                    writer.write(part, tensors, view)
                    advanced(len(part))

    def _batches(
        self, view: int, rows: Tensor, earlier: StoredData | None
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        return self._from_images(view, rows) if earlier is None else self._from_store(earlier, view, rows)

    def _from_images(self, view: int, rows: Tensor) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for part, batch in view_batches(self.data, view, rows):
            images, beside = self._fed(view, part, batch)
            yield part, {**self.prefix.extract(images), **beside}

    def _fed(self, view: int, rows: Tensor, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """What the step gets; where images are augmented on the way, each by its own draw of (seed, view, row)."""
        data, device = self.data, self.host.device
        if view == 0 or not data.augmented:
            return data.form.split(self.host.feed(batch, view > 0))
        images, beside = data.raw_form.split(batch)
        parts = []
        for i, row in enumerate(rows.tolist()):
            one = data.raw_form.join(images[i : i + 1], {name: value[i : i + 1] for name, value in beside.items()})
            key = ("on the way", data.seed, view, row)
            with keyed_rng(*key), torch.random.fork_rng([device] if device.type == "cuda" else []):
                if device.type == "cuda":
                    torch.cuda.manual_seed(key_to_seed(*key))
                parts.append(data.form.split(self.host.feed(one, True)))
        joined = {name: torch.cat([others[name] for _, others in parts]) for name in parts[0][1]}
        return torch.cat([image for image, _ in parts]), joined

    def _from_store(self, earlier: StoredData, view: int, rows: Tensor) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for part in torch.split(rows, pass_size(self.data.loader)):
            beside = earlier.store.read(part, view)
            features = {name: beside.pop(name).to(self.host.device) for name in earlier.prefix.shapes}
            yield part, {**advance(features, earlier.prefix, self.prefix), **beside}
