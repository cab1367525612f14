"""What is changed on a network for a while and comes back: methods of its modules, modes, buffers, the random state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_unfreeze.features.calls import MISSING
from lightning_unfreeze.layers.modes import kept_modes


class Stop(BaseException):
    """Ends a forward that has given all it was asked for. No ``except Exception`` of the user's code can catch it."""


class Patches:
    """Methods replaced on the instances, ``(module, method, original -> replacement)``; what was there comes back.

    A context that is opened and closed with every batch: hence no generator, and the modules are looked up once.
    """

    def __init__(
        self, patches: Iterable[tuple[nn.Module, str, Callable[[Callable[..., Any]], Callable[..., Any]]]]
    ) -> None:
        self._patches = tuple(patches)
        self._before: list[tuple[dict[str, Any], str, Any]] = []

    @property
    def is_open(self) -> bool:
        """Whether the replacements are in place."""
        return bool(self._before)

    def __enter__(self) -> None:
        for module, method, wrap in self._patches:
            replacement = wrap(getattr(module, method))
            self._before.append((module.__dict__, method, module.__dict__.get(method, MISSING)))
            module.__dict__[method] = replacement

    def __exit__(self, *_: object) -> None:
        while self._before:
            own, method, previous = self._before.pop()
            if previous is MISSING:
                del own[method]
            else:
                own[method] = previous


@contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Put modes, buffers and the random state back. Attention biases cached in eval mode are dropped, graph and all.

    Less than `layers.kept.kept`, which copies weights too: a search runs some ten forwards, and none of them steps.
    """
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in network.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = {p.device.index or 0 for p in network.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        _drop_caches(network)
        try:
            with kept_modes(network):
                yield
        finally:
            _drop_caches(network)
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer.copy_(value)


def _drop_caches(network: nn.Module) -> None:
    with kept_modes(network):
        torch.clear_autocast_cache()  # older torch (not 2.15) would re-use weights cast without a graph
        network.train()  # the caches of such models are emptied by their train()
