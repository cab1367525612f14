"""The one call inside a module's step that turns images into logits, found by watching."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

State = Mapping[str, Tensor]


@dataclass
class NetworkCall:
    """One call that turned images into logits, and how to make it again with other images.

    Attributes:
        name: Of the network within the module, `""` for the module itself.
        network: What was called.
        args: As it was called.
        kwargs: As it was called; a Hugging Face network takes its images from here.
        images: The one batch of images among them, `(N, channels, H, W)`.
        logits: `(N,)` or `(N, C)`, in what the last part gave.
        then: Layers that the step called on the answer, one after the other: the head of a backbone, and their names.
    """

    name: str
    network: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    images: Tensor
    logits: Tensor
    then: list[tuple[str, nn.Module]] = field(default_factory=list)

    @property
    def parts(self) -> list[tuple[str, nn.Module]]:
        """Names and modules, in the order of their calls."""
        return [(self.name, self.network), *self.then]

    def repeats(self, earlier: NetworkCall) -> bool:
        """Whether it was made, and answered, before: a step may ask once for its loss and once for its metric."""
        same = self.network is earlier.network and self.images is earlier.images
        return same and self.then == earlier.then and torch.equal(self.logits, earlier.logits)

    def answer(self, images: Tensor, weights_of: Callable[[str], State] | None = None) -> Tensor:
        """Logits of other images; under other weights where `weights_of` gives those of a part by its name.

        Tensors that were passed beside the images with a row per image (labels, masks) are repeated.
        """
        num = len(self.images)
        rows = torch.arange(len(images), device=images.device) % num

        def replaced(tensor: Tensor) -> Tensor:
            if tensor is self.images:
                return images
            return tensor[rows.to(tensor.device)] if tensor.ndim and len(tensor) == num else tensor

        args, kwargs = tree_map_only(Tensor, replaced, (self.args, self.kwargs))
        for name, part in self.parts:
            call: Callable[..., Any] = part
            if weights_of is not None:
                call = functools.partial(torch.func.functional_call, part, dict(weights_of(name)))
                output = call(args, kwargs)
            else:
                output = call(*args, **kwargs)
            args, kwargs = (_logits_in(output, len(images)),), {}
        return cast(Tensor, args[0])


class LogitsSpy:
    """Catches the one call inside the module's step that turns a batch of images into a row of logits per image.

    On the first batch all submodules are watched, and of calls inside each other that fit the outermost is taken; from
    then on only that submodule, and the layers that the step itself called on its answer.
    """

    _paused: ClassVar[bool] = False  # of all: one's calls are not another's

    def __init__(self, pl_module: nn.Module, name: str | None) -> None:
        modules = dict(pl_module.named_modules())
        if name is not None and name not in modules:
            top = [child for child, _ in pl_module.named_children()]
            raise MisconfigurationException(f"forward={name!r} is no submodule of the module; at its top are {top}")
        self._calls: list[NetworkCall] = []
        # of the calls that are running now: how many had been caught, and how many maps made, before each
        self._open: list[tuple[int, int]] = []
        self._maps = 0  # made by layers outside of the calls that were caught: what reads on from there reads no images
        self._read_on: list[NetworkCall] = []  # calls whose answer a later layer read: those were features
        self._handles: list[RemovableHandle] = []
        self._found = False
        self._watch(modules if name is None else {name: modules[name]})

    def _watch(self, modules: Mapping[str, nn.Module]) -> None:
        self.close()
        for name, module in modules.items():
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(functools.partial(self._see, name), with_kwargs=True))

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._paused:
            self._open.append((len(self._calls), self._maps))

    def _see(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._paused:
            return
        first_inside, maps_before = self._open.pop()
        images = [part for part in (*args, *kwargs.values()) if _is_images(part)]
        if len(images) == 1:
            logits = _logits_in(output, len(images[0]))
            if logits is not None and maps_before == 0:
                self._calls[first_inside:] = [NetworkCall(name, module, args, kwargs, images[0], logits)]
                self._maps = 0
            elif _is_images(output) and any(True for _ in module.parameters()):
                self._maps += 1
            return
        given = args[0] if len(args) == 1 and not kwargs else None
        if self._open or not (isinstance(given, Tensor) and given.ndim == 2):
            return
        # a layer that the step itself called on rows: the head of a call before it, or a reader of something else
        read = [call for call in self._calls if call.logits is given]
        if read and isinstance(output, Tensor) and output.ndim == 2 and len(output) == len(given):
            read[0].logits = output
            read[0].then.append((name, module))
        elif any(True for _ in module.parameters()):
            self._read_on += [call for call in self._calls if len(call.logits) == len(given)]

    def batch_size(self) -> int:
        """Images in the step that has just run."""
        if not self._calls:
            raise MisconfigurationException(_explain_calls([], []))
        return len(self._calls[0].images)

    def take(self) -> NetworkCall:
        """The call of the step that has just run."""
        calls, self._calls, self._open, self._maps = self._calls, [], [], 0
        read_on, self._read_on = self._read_on, []
        found: list[NetworkCall] = []
        for call in calls:
            if all(call is not other for other in read_on) and not any(map(call.repeats, found)):
                found.append(call)
        if len(found) != 1:
            raise MisconfigurationException(_explain_calls(calls, found))
        (call,) = found
        noisy = [
            ".".join(filter(None, (name, inside)))
            for name, part in call.parts
            for inside, layer in part.named_modules()
            if layer.training and not any(layer.children())
        ]
        if noisy:
            raise MisconfigurationException(
                f"{noisy[:3]} of the network {call.name!r} are in training mode: dropout and BatchNorm would make the "
                "views random; leave the module in eval mode during evaluation"
            )
        if not self._found:
            self._found = True
            self._watch(dict(call.parts))
        return call

    @staticmethod
    @contextmanager
    def paused() -> Iterator[None]:
        """While it is open, nobody records calls."""
        LogitsSpy._paused = True
        try:
            yield
        finally:
            LogitsSpy._paused = False

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _is_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()


def _logits_in(output: Any, num_samples: int) -> Tensor | None:
    """The logits in what a network gave: itself, `.logits` or `["logits"]`, or the first of a tuple."""
    if isinstance(output, Mapping):
        output = output.get("logits", next(iter(output.values())) if len(output) == 1 else None)
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    fits = isinstance(output, Tensor) and output.is_floating_point() and output.ndim in (1, 2)
    return output if fits and len(output) == num_samples else None


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
