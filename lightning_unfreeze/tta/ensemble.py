"""A module's `forward` as that of several weights: the mean of their class probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_unfreeze.inside_lightning.weights import load_weights


class AveragedForward:
    """Between `install` and `remove`, `module(...)` gives the log of the mean probability over the weights.

    Args:
        states: State dicts of the module, on its device.
    """

    def __init__(self, module: nn.Module, states: Sequence[Mapping[str, Tensor]]) -> None:
        self._module, self._states = module, [dict(state) for state in states]
        self.calls = 0

    @classmethod
    def of_files(cls, module: nn.Module, paths: Sequence[Path], device: torch.device) -> AveragedForward:
        """Over the weights in these files.

        Raises:
            MisconfigurationException: Where there are none, or some are missing.
        """
        missing = [str(path) for path in paths if not path.is_file()]
        if missing or not paths:
            raise MisconfigurationException(
                f"ensemble=True averages over snapshots, {'there are none' if not missing else f'missing: {missing}'}; "
                "fit with snapshots=True first, or test from a checkpoint of that run"
            )
        return cls(module, [load_weights(path, device) for path in paths])

    def install(self) -> None:
        """Puts the averaging forward on the instance."""
        vars(self._module)["forward"] = self._forward

    def remove(self) -> None:
        """Takes it off again."""
        vars(self._module).pop("forward", None)

    def end(self) -> None:
        """Takes it off at the end of a test.

        Raises:
            MisconfigurationException: Where the test never called the module.
        """
        self.remove()
        if not self.calls:
            raise MisconfigurationException(
                "ensemble=True averages what the module's `forward` returns, and test_step never called self(x)"
            )

    def _forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        self.remove()  # what is called below is the module's own
        try:
            logits = [torch.func.functional_call(self._module, state, args, kwargs) for state in self._states]
        finally:
            self.install()
        log_probs = torch.stack([torch.log_softmax(each.float(), dim=-1) for each in logits])
        return torch.logsumexp(log_probs, dim=0) - math.log(len(self._states))
