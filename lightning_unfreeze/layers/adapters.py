"""Adapters (LoRA and its kin) inside a network: which parameters are theirs."""

from __future__ import annotations

import re

from torch import nn

_ADAPTER_NAME = re.compile(r"lora_\w+|adapters?")


def adapter_parameters(module: nn.Module) -> set[nn.Parameter]:
    """The parameters that parameter-efficient fine-tuning trains, wherever they stand in `module`.

    PEFT's adapters of any kind, the layers that PEFT trains whole as a copy (`modules_to_save`), and what hand-written
    adapters keep under the names `lora_...`, `adapter` or `adapters`. PEFT itself need not be installed.

    Example:
        >>> layer = nn.Linear(8, 8)
        >>> layer.lora_A, layer.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        >>> sorted(tuple(parameter.shape) for parameter in adapter_parameters(layer))
        [(2, 8), (8, 2)]
    """
    found = {p for name, p in module.named_parameters() if any(map(_ADAPTER_NAME.fullmatch, name.split(".")))}
    for part in module.modules():
        children = dict(part.named_children())
        for name in getattr(type(part), "adapter_layer_names", ()):  # PEFT's own list of what its layers train
            if name in children:
                found |= set(children[name].parameters())
    return found
