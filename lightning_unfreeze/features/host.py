"""Who trains the network, as plain callables: nothing in this folder knows a trainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def _alone(value: Any) -> list[Any]:
    return [value]


def _no_bar(text: str, total: int) -> AbstractContextManager[Callable[[int], Any]]:
    return nullcontext(lambda _: None)


@dataclass(frozen=True)
class Host:
    """Who trains the network: how a batch reaches it, what a step makes of it, and which processes take part.

    Attributes:
        network: Whose frozen part is looked for.
        device: Where the step runs.
        feed: Makes of a collated batch what the step gets, on the device: as in evaluation, or with `True` as in
            training, where a module may augment its images there.
        run: The training step on such a batch: what depends on the trainable parameters, the loss say.
        outcome: All that a step gives and writes down on such a batch, by name; `True` for the training step, `False`
            for that of validation.
        aside: A context in which steps leave no trace. Collective: all processes enter it or none.
        gather: A value of every process, on every process. Collective.
        rank: Number of this process among those that fill a store.
        num_ranks: Their number.
        conditions: What the step depends on besides the network and the batch, in JSON; None where that is not known.
        progress: A bar: text and total in, a context that yields `advance(n)` out.
    """

    network: nn.Module
    device: torch.device
    feed: Callable[[Any, bool], Any]
    run: Callable[[Any], Any]
    outcome: Callable[[Any, bool], dict[str, Any]]
    aside: Callable[[], AbstractContextManager[None]]
    gather: Callable[[Any], list[Any]] = _alone
    rank: int = 0
    num_ranks: int = 1
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], Any]]] = _no_bar
    conditions: Any = None
