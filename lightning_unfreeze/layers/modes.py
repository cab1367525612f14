"""Train and eval mode: frozen modules in eval mode for as long as they are frozen, and modes that come back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from lightning_unfreeze.layers.groups import LayerGroup  # which loads Lightning; `features` uses this without it


class FrozenModes:
    """Keeps modules in eval mode, and gives each its own mode back afterwards.

    Attributes:
        roots: The outermost modules that are kept in eval mode.
    """

    def __init__(self) -> None:
        self.roots: list[nn.Module] = []
        self._before: dict[nn.Module, bool] = {}
        self._hooks: list[RemovableHandle] = []

    def begin(self, roots: Iterable[nn.Module]) -> None:
        """Takes over `roots` in place of those before, whose modes come back; `keep` puts them in eval mode."""
        self.end()
        self.roots = list(roots)
        self._before = {module: module.training for root in self.roots for module in root.modules()}
        # a step may call `train()` itself, after all hooks of a trainer
        self._hooks = [root.register_forward_pre_hook(_in_eval_mode) for root in self.roots]

    def keep(self) -> None:
        """Puts them in eval mode, whatever `train()` was called since."""
        for root in self.roots:
            _in_eval_mode(root)

    def slipped(self) -> bool:
        """Whether one of their modules is in training mode."""
        return any(module.training for root in self.roots for module in root.modules())

    def end(self) -> None:
        """Gives every module its own mode back."""
        for module, training in self._before.items():
            module.training = training
        for hook in self._hooks:
            hook.remove()
        self.roots, self._before, self._hooks = [], {}, []


def _in_eval_mode(module: nn.Module, *_: Any) -> None:
    """Hook before the forward of what is frozen."""
    if module.training:
        module.eval()


@contextmanager
def kept_modes(*roots: nn.Module) -> Iterator[None]:
    """Whatever `train()` or `eval()` is called inside, each module and all that is inside it has its own mode after."""
    modes = [(module, module.training) for root in roots for module in root.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def in_eval_mode(*roots: nn.Module) -> Iterator[None]:
    """Modules in eval mode with all that is inside them; each part has its own mode after it."""
    with kept_modes(*roots):
        for root in roots:
            root.eval()
        yield


def pretrained_batch_norm(module: nn.Module, groups: Mapping[str, LayerGroup]) -> list[nn.Module]:
    """BatchNorm of all layer groups but the last, whose statistics the pretraining made."""
    pretrained = {parameter for group in list(groups.values())[:-1] for parameter in group}
    return [
        part for part in module.modules() if isinstance(part, _BatchNorm) and pretrained.issuperset(part.parameters())
    ]


def has_statistics(norm: nn.Module) -> bool:
    """Whether a BatchNorm's statistics are of some data, and not as they were made (mean 0, variance 1)."""
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    return mean is not None and variance is not None and bool((mean != 0).any() or (variance != 1).any())


def mode_problem(name: str, module: nn.Module) -> str:
    """Why the module's output would not be the same each time; empty when it is."""
    for child_name, child in module.named_modules(prefix=name):
        kind = type(child).__name__
        if isinstance(child, _BatchNorm) and (child.training or child.running_mean is None):
            return f"{child_name!r} ({kind}) is frozen but normalises with batch statistics; put it in eval mode"
        if not child.training:
            continue
        owns = any(True for _ in child.parameters(recurse=False)) or any(True for _ in child.buffers(recurse=False))
        drops = "drop" in kind.lower() and any(getattr(child, p, None) for p in ("p", "prob", "drop_prob"))
        if owns or drops:
            return f"{child_name!r} ({kind}) is frozen but in train mode; put it in eval mode"
    return ""
