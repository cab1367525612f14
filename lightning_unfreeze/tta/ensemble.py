"""A module's `forward` as that of several weights: the mean of their class probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class AveragedForward:
    """Between `install` and `remove`, `module(...)` gives the log of the mean probability over the weights.

    Args:
        states: State dicts of the module, on its device.
    """

    def __init__(self, module: nn.Module, states: Sequence[Mapping[str, Tensor]]) -> None:
        self._module, self._states = module, [dict(state) for state in states]
        self.calls = 0

    def install(self) -> None:
        """Puts the averaging forward on the instance."""
        vars(self._module)["forward"] = self._forward

    def remove(self) -> None:
        """Takes it off again."""
        vars(self._module).pop("forward", None)

    def _forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        self.remove()  # what is called below is the module's own
        try:
            logits = [torch.func.functional_call(self._module, state, args, kwargs) for state in self._states]
        finally:
            self.install()
        log_probs = torch.stack([torch.log_softmax(each.float(), dim=-1) for each in logits])
        return torch.logsumexp(log_probs, dim=0) - math.log(len(self._states))
