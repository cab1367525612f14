"""The one call inside a module's step that turns images into logits, found by watching; and the target beside it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_unfreeze.tta.views import Activation

_TARGET_KEYS = ("target", "targets", "label", "labels", "y")


@dataclass
class NetworkCall:
    """One call that turned images into logits."""

    name: str
    network: nn.Module
    images: Tensor
    kwargs: dict[str, Any]
    logits: Tensor


class LogitsSpy:
    """Catches the one call inside the module's step that turns a batch of images into a row of logits per image.

    On the first batch all submodules are watched, and of calls inside each other that fit the outermost is taken; from
    then on only that submodule.
    """

    def __init__(self, pl_module: nn.Module, name: str | None) -> None:
        modules = dict(pl_module.named_modules())
        if name is not None and name not in modules:
            top = [child for child, _ in pl_module.named_children()]
            raise MisconfigurationException(f"forward={name!r} is no submodule of the module; at its top are {top}")
        self._paused = False
        self._calls: list[NetworkCall] = []
        self._open: list[int] = []  # of the calls that are running now: how many had been caught before each
        self._features: list[Tensor] = []
        self._handles: list[RemovableHandle] = []
        self._watch(modules if name is None else {name: modules[name]})

    def _watch(self, modules: Mapping[str, nn.Module]) -> None:
        self.close()
        for name, module in modules.items():
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(functools.partial(self._see, name), with_kwargs=True))

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._paused:
            self._open.append(len(self._calls))

    def _see(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._paused:
            return
        first_inside = self._open.pop()
        if not (len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
            return
        given = args[0]
        if given.ndim == 4 and given.is_floating_point() and output.is_floating_point():
            if output.shape[:1] == given.shape[:1] and output.ndim in (1, 2):
                self._calls[first_inside:] = [NetworkCall(name, module, given, kwargs, output)]
        elif given.ndim == 2 and any(True for _ in module.parameters()):
            # a layer with parameters that reads what another gave: those were features, not yet logits
            # (kept alive, so that no later tensor gets its address)
            self._features.append(given)

    def take(self) -> NetworkCall:
        """The call of the step that has just run."""
        calls, self._calls, self._open = self._calls, [], []
        features = {part.untyped_storage().data_ptr() for part in self._features}
        found = [call for call in calls if call.logits.untyped_storage().data_ptr() not in features]
        if len(found) != 1:
            raise MisconfigurationException(_explain_calls(calls, found))
        (call,) = found
        noisy = [name for name, part in call.network.named_modules() if part.training and not any(part.children())]
        if noisy:
            raise MisconfigurationException(
                f"{noisy[:3]} of the network {call.name!r} are in training mode: dropout and BatchNorm would make the "
                "views random; leave the module in eval mode during evaluation"
            )
        if len(self._handles) > 2:
            self._watch({call.name: call.network})
        self._features = []
        return call

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While it is open, calls are not recorded."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _explain_calls(calls: Sequence[NetworkCall], found: Sequence[NetworkCall]) -> str:
    wanted = "TTAEval needs one call `network(images)` inside the step, from (N, channels, H, W) to (N, C) logits"
    if not calls:
        return (
            f"{wanted}, and saw none; call the whole network once with the images alone, e.g. `self(images)` with "
            "`forward` overridden"
        )
    seen = sorted({call.name or "the module itself" for call in found or calls})
    if not found:
        return (
            f"{wanted}; {seen} gives features that another layer reads on; put both into `forward`, call `self(images)`"
        )
    return f"{wanted}, and saw {len(found)} of them, from {seen}; name the right one: TTAEval(forward=...)"


def find_target(batch: Any, num_samples: int, key: str | int | None) -> Tensor:
    """The target of a batch: `batch[key]`, else its second item, else one of the usual dict keys.

    Raises:
        MisconfigurationException: Where there is none with a row per sample.
    """
    found: Any = None
    if key is not None:
        found = batch[key]
    elif isinstance(batch, Mapping):
        found = next((batch[name] for name in _TARGET_KEYS if name in batch), None)
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        found = batch[1]
    if not isinstance(found, Tensor) or found.shape[:1] != (num_samples,):
        kind = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise MisconfigurationException(
            f"TTAEval finds no target of {num_samples} rows in the batch ({kind}); say where it is with "
            "TTAEval(target=KEY), or leave this run out with on=[...]"
        )
    return found


def shape_target(target: Tensor, num_classes: int, activation: Activation) -> Tensor:
    """The target as integers: `(N,)` classes, or `(N, C)` of 0 and 1 for the sigmoid."""
    if activation == "sigmoid":
        return target.reshape(len(target), num_classes).round().long()
    if target.ndim == 2 and target.shape[1] == num_classes:
        return target.argmax(1)  # shares of the classes: the metrics count the largest
    return target.reshape(len(target)).long()


def as_logits(outputs: Tensor, activation: Activation) -> Tensor:
    """Logits; a network that ends in a softmax gives probabilities, whose logs serve as well."""
    if activation == "softmax":
        sums = outputs.sum(-1)
        if bool((outputs >= 0).all()) and bool(torch.isclose(sums, torch.ones_like(sums), atol=1e-3).all()):
            return outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log()
    return outputs
