"""One pass over a set: which samples come, the network's answers to each view of them, what all ranks have found."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from lightning_unfreeze.inside_lightning.distributed import gather_objects
from lightning_unfreeze.inside_lightning.loaders import own_batch_sampler
from lightning_unfreeze.inside_lightning.weights import load_weights
from lightning_unfreeze.seeding import kept_rng
from lightning_unfreeze.tta.figure import SHEET_IMAGES, thumbnail
from lightning_unfreeze.tta.outputs import End, as_logits, end_of
from lightning_unfreeze.tta.random_views import DrawingLoader
from lightning_unfreeze.tta.result import TTAResult, decisions, flipped_rows
from lightning_unfreeze.tta.views import Activation
from lightning_unfreeze.tta.watch import LogitsSpy, NetworkCall, State


@dataclass
class LoaderPass:
    """One loader during one pass: which samples come, and what was found of them on this rank.

    Attributes:
        loader: The user's, or a `DrawingLoader` around it.
        batches: Indices of this rank's batches; None where the order is not known.
        end: What the network ends in, from the first batch on.
        activation: Of its answers, from the first batch on.
        rows: What was found of each batch, by name.
        sheet: Pictures of the first samples that the views fixed, and of those that they broke, by index.
    """

    loader: Any
    batches: list[list[int]] | None
    end: End | None = None
    activation: Activation | None = None
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
        before, after = (
            decisions(rows[part], self.activation or "softmax") == rows["target"] for part in ("plain", "merged")
        )
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

    def whole_result(self, trainer: pl.Trainer) -> TTAResult | None:
        """What all ranks have found, without metrics; None where there was no batch. A collective call."""
        rows = self.whole_set(trainer)
        told = [each for each in gather_objects(trainer, self.activation) if each is not None]
        return None if rows is None else TTAResult(activation=told[0] if told else "softmax", metrics={}, **rows)

    def whole_sheet(self, trainer: pl.Trainer) -> Mapping[int, Tensor]:
        """The pictures of all ranks, by index. A collective call."""
        return {
            index: picture
            for sheet in gather_objects(trainer, self.sheet)
            for kept in sheet.values()
            for index, picture in kept.items()
        }


@dataclass
class Answers:
    """What all views of a batch were answered.

    Attributes:
        outputs: `(V, N, C)` as the network gave them.
        end: What the network ends in.
        images: `(N, channels, H, W)` as the network was called with.
        index: `(N,)` places in the dataset.
    """

    outputs: Tensor
    end: End
    images: Tensor
    index: Tensor

    @property
    def logits(self) -> Tensor:
        """`(V, N, C)` logits in float32 or better."""
        logits = as_logits(self.outputs, self.end)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Pass:
    """One pass over the loaders of a run: the watch on the network, and what each loader has given so far."""

    def __init__(self, spy: LogitsSpy, loaders: Iterable[Any], snapshots: Sequence[Path]) -> None:
        self.spy, self.snapshots = spy, snapshots
        self.loaders = [LoaderPass(loader, sampled_batches(loader)) for loader in loaders]
        self._members: list[Callable[[str], State]] | None = None

    def answers(
        self, call: NetworkCall, loader: LoaderPass, views: Sequence[Callable[[Tensor], Tensor]], chunk_size: int
    ) -> Answers:
        """The answers to the plain view, which the step has had already, and to the other views of its images."""
        with self.spy.paused(), torch.no_grad():
            if self._members is None:
                self._members = snapshot_states(self.snapshots, call)
            loader.end = loader.end or end_of(call)
            answers = [call.logits, *view_answers(call.answer, call.images, views, chunk_size)]
            for weights_of in self._members:
                network = functools.partial(call.answer, weights_of=weights_of)
                answers += view_answers(network, call.images, [_plain, *views], chunk_size)
        outputs = torch.stack([answer.reshape(len(call.images), -1) for answer in answers])
        return Answers(outputs, loader.end, call.images, loader.next_index(len(call.images)))

    def close(self) -> None:
        """Takes the watch off, and lets loaders draw no more."""
        self.spy.close()
        for loader in self.loaders:
            if isinstance(loader.loader, DrawingLoader):
                loader.loader.stop()


def snapshot_files(callbacks: Iterable[Any], *, testing: bool) -> list[Path]:
    """The checkpoints that callbacks list in `snapshots`.

    One that makes an ensemble of them in `test` puts them into the module's own forward, which then gives all views.
    """
    listing = [each for each in callbacks if not (testing and getattr(each, "ensemble", False))]
    return [path for each in listing for path in getattr(each, "snapshots", [])]


def _plain(images: Tensor) -> Tensor:
    return images


def sampled_batches(loader: Any) -> list[list[int]] | None:
    """The indices of this rank's batches, in order; None where the order is random or there are no indices."""
    loader = loader.loader if isinstance(loader, DrawingLoader) else loader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    batch_sampler = own_batch_sampler(loader)
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


def snapshot_states(paths: Iterable[Path], call: NetworkCall) -> list[Callable[[str], State]]:
    """Weights of the parts of `call` in each checkpoint, by name, less checkpoints of the weights in force now.

    Raises:
        MisconfigurationException: For a checkpoint of something else.
    """
    states: list[Callable[[str], State]] = []
    for path in paths:
        loaded = load_weights(path, call.images.device)
        same = True
        for name, part in call.parts:
            state, current = _weights_of(name, loaded), part.state_dict()
            if state.keys() != current.keys():
                differing = sorted(state.keys() ^ current.keys())[:3]
                raise MisconfigurationException(
                    f"snapshot {path} does not hold the network {name!r}: {differing} are in one only; take it out of "
                    "the snapshots, or train anew"
                )
            same = same and all(torch.equal(state[key], current[key]) for key in current)
        if not same:
            states.append(functools.partial(_weights_of, weights=loaded))
    return states


def _weights_of(name: str, weights: State) -> State:
    prefix = f"{name}." if name else ""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
