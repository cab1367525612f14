"""One pass over a set: which samples come, the network's answers to each view of them, what all ranks have found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from lightning_unfreeze.inside_lightning.distributed import gather_objects
from lightning_unfreeze.seeding import kept_rng
from lightning_unfreeze.tta.random_views import DrawingLoader
from lightning_unfreeze.tta.result import SHEET_IMAGES, decisions, flipped_rows, thumbnail
from lightning_unfreeze.tta.views import Activation
from lightning_unfreeze.tta.watch import NetworkCall


@dataclass
class LoaderPass:
    """One loader during one pass: which samples come, and what was found of them on this rank.

    Attributes:
        loader: The user's, or a `DrawingLoader` around it.
        batches: Indices of this rank's batches; None where the order is not known.
        rows: What was found of each batch, by name.
        sheet: Pictures of the first samples that the views fixed, and of those that they broke, by index.
    """

    loader: Any
    batches: list[list[int]] | None
    activation: Activation = "softmax"
    rows: list[dict[str, Tensor]] = field(default_factory=list)
    sheet: dict[Literal["fixed", "broken"], dict[int, Tensor]] = field(
        default_factory=lambda: {"fixed": {}, "broken": {}}
    )
    seen_batches: int = 0
    seen_samples: int = 0

    @property
    def dataset(self) -> Any:
        """The user's dataset, where the loader has one."""
        return getattr(self.loader, "dataset", None)

    def next_index(self, num_samples: int) -> Tensor:
        """Places in the dataset of the batch that has just run; running numbers where the order is not known."""
        first, self.seen_samples = self.seen_samples, self.seen_samples + num_samples
        batch, self.seen_batches = self.seen_batches, self.seen_batches + 1
        return torch.arange(first, first + num_samples) if self.batches is None else torch.tensor(self.batches[batch])

    def add(self, rows: dict[str, Tensor], images: Tensor | None) -> None:
        """Keeps what was found of a batch; with `images` also the pictures of predictions that flipped."""
        self.rows.append({name: value.cpu() for name, value in rows.items()})
        if images is None:
            return
        before, after = (decisions(rows[part], self.activation) == rows["target"] for part in ("plain", "merged"))
        for kind, flipped in (("fixed", after & ~before), ("broken", before & ~after)):
            kept = self.sheet[kind]  # type: ignore[index]
            for row in flipped_rows(flipped)[: SHEET_IMAGES - len(kept)]:
                kept[int(rows["index"][row])] = thumbnail(images[row])

    def whole_set(self, trainer: pl.Trainer) -> dict[str, Tensor] | None:
        """The rows of all ranks in the order of their index, each sample once. A collective call."""
        own = {name: torch.cat([rows[name] for rows in self.rows]) for name in (self.rows[0] if self.rows else ())}
        shards = [shard for shard in gather_objects(trainer, own) if shard]
        if not shards:
            return None
        rows = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
        order = rows["index"].argsort(stable=True)
        if trainer.world_size > 1 and self.batches is not None:
            index = rows["index"][order]
            order = order[torch.cat([index.new_ones(1, dtype=torch.bool), index[1:] != index[:-1]])]
        return {name: value[order] for name, value in rows.items()}

    def whole_sheet(self, trainer: pl.Trainer) -> Mapping[int, Tensor]:
        """The pictures of all ranks, by index. A collective call."""
        return {
            index: picture
            for sheet in gather_objects(trainer, self.sheet)
            for kept in sheet.values()
            for index, picture in kept.items()
        }


def sampled_batches(loader: Any) -> list[list[int]] | None:
    """The indices of this rank's batches, in order; None where the order is random or there are no indices."""
    loader = loader.loader if isinstance(loader, DrawingLoader) else loader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    # Lightning 2.6 puts `_IndexBatchSamplerWrapper` around it for predict, and iterating that one clears its record
    batch_sampler: Any = getattr(loader.batch_sampler, "_batch_sampler", loader.batch_sampler)
    if batch_sampler is None or isinstance(getattr(batch_sampler, "sampler", None), RandomSampler):
        return None
    with kept_rng():
        first, second = (list(map(list, batch_sampler)) for _ in range(2))
    return first if first == second else None


def view_answers(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    views: Iterable[Callable[[Tensor], Tensor]],
    chunk_size: int,
) -> list[Tensor]:
    """Logits of each view; views of one size are joined into one forward, `chunk_size` of them at most."""
    answers: list[Tensor] = []
    chunk: list[Tensor] = []

    def run_chunk() -> None:
        if not chunk:
            return
        try:
            joined = network(torch.cat(chunk) if len(chunk) > 1 else chunk[0])
        except (RuntimeError, AssertionError, ValueError) as error:
            if chunk[0].shape == images.shape:
                raise
            raise MisconfigurationException(
                f"the network refuses a view of {chunk[0].shape[-2]}x{chunk[0].shape[-1]} px where the batch holds "
                f"{images.shape[-2]}x{images.shape[-1]} px: {error}; use views of one size (views='flip', or crops "
                "with crop_px=None), or a network without a fixed input size"
            ) from error
        answers.extend(joined.chunk(len(chunk)))
        chunk.clear()

    for view in views:
        try:
            drawn = view(images)
        except ValueError as error:
            raise MisconfigurationException(f"TTAEval: {error}") from error
        if chunk and (drawn.shape != chunk[0].shape or len(chunk) == chunk_size):
            run_chunk()
        chunk.append(drawn)
    run_chunk()
    return answers


def call_with(call: NetworkCall, state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The network of `call` under other weights."""
    answer: Tensor = torch.func.functional_call(call.network, state, (images,), call.kwargs)
    return answer


def snapshot_states(paths: Iterable[Path], call: NetworkCall) -> list[dict[str, Tensor]]:
    """Weights of the network of `call` in each checkpoint, less those that are in force now.

    Raises:
        MisconfigurationException: For a checkpoint of something else.
    """
    prefix = f"{call.name}." if call.name else ""
    current = call.network.state_dict()
    states = []
    for path in paths:
        loaded = torch.load(path, map_location=call.images.device, weights_only=True)
        loaded = loaded.get("state_dict", loaded)
        state = {name.removeprefix(prefix): value for name, value in loaded.items() if name.startswith(prefix)}
        if state.keys() != current.keys():
            differing = sorted(state.keys() ^ current.keys())[:3]
            raise MisconfigurationException(
                f"snapshot {path} does not hold the network {call.name!r}: {differing} are in one only; take it "
                "out of the snapshots, or train anew"
            )
        if not all(torch.equal(state[name], current[name]) for name in current):
            states.append(state)
    return states
