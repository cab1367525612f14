"""What a search for the freeze boundary found, kept for the next start on the same network: here and beside the store.

A search runs some ten forwards. A second fit, or a fit that opens its store, would run them for the same answer. It is
recalled where everything that could make it another one is known and the same, and checked again before it is used: a
training step on the features has to give the outputs and gradients of the plain one, bitwise.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.utils._pytree import tree_flatten, treespec_dumps, treespec_loads
from torch.utils.data import DataLoader, Dataset

from lightning_unfreeze.features.calls import MISSING, Call, Leaf
from lightning_unfreeze.features.describe import Description, NotUnderstoodError
from lightning_unfreeze.features.key import fingerprint_of, held_by, hooks_of_others
from lightning_unfreeze.features.prefix import FrozenPrefix, Run
from lightning_unfreeze.features.search import PrefixSearch, find_prefix, verify

_MOST = 32
_LARGE_BYTES = 2**20
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF_ALL = tuple(f"_global{name}" for name in _HOOKS)
_NOT_LOOKED_INTO = (Dataset, DataLoader, torch.jit.ScriptModule)


class _Found(NamedTuple):
    entries: Sequence[tuple[str, str]]
    calls: Sequence[Call]
    stored: Sequence[tuple[int, int]]
    writes_in_place: bool
    reason: str


_found: OrderedDict[str, _Found] = OrderedDict()


def recall_prefix(
    network: nn.Module, images: Tensor, run: Run, batch: Any, conditions: Any, file: Path | None = None
) -> PrefixSearch:
    """As `find_prefix`, without a search where one was made before under the same key.

    Args:
        network: See `find_prefix`.
        images: See `find_prefix`.
        run: The training step of `network` as a function of images, made of its own code and `conditions` alone.
        batch: What the step gets, the images among it.
        conditions: What the step depends on besides (the Trainer's precision, its epoch), in JSON; None if that is not
            known: then there is always a search.
        file: Of what other processes found; None to ask and tell none of them.
    """
    key = search_key(network, batch, conditions)
    found = _found.get(key) or (_read(file).get(key) if key and file is not None else None)
    if found is not None:
        with suppress(Exception):  # whatever it is, a search says it better
            prefix = FrozenPrefix(network, run, images, found.entries, found.calls, found.stored)
            if not verify(prefix, images, modes=("training",)):
                prefix._writes_in_place |= found.writes_in_place  # in eval mode, say
                return PrefixSearch(prefix, found.reason)
    search = find_prefix(network, images, run)
    # what the step makes of images, and outputs that are the same for all images, come from weights: not in the key
    if key and search.prefix is not None and search.prefix.depends_on_code_alone:
        _found[key] = _Found(*search.prefix.found, search.prefix._writes_in_place, search.reason)
        if len(_found) > _MOST:
            _found.popitem(last=False)
        if file is not None:
            _write(file, {**_read(file), key: _found[key]})
    return search


def _write(file: Path, all_found: dict[str, _Found]) -> None:
    """For other processes, in place: a file that was half written cannot be read, which costs them a search."""
    held = {}
    for key, found in list(all_found.items())[-_MOST:]:
        with suppress(Exception):  # outputs in a container that has no form in writing
            calls = [(c.name, treespec_dumps(c.tree), [_parts(leaf) for leaf in c.leaves]) for c in found.calls]
            held[key] = {**found._asdict(), "calls": calls}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(held, file)
    except Exception:
        file.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, _Found]:
    with suppress(Exception):  # there is none, or it is of another version
        return {
            key: _Found(**{**found, "calls": [_call(*parts) for parts in found["calls"]]})
            for key, found in torch.load(file, weights_only=True).items()
        }
    return {}


def _parts(leaf: Leaf) -> list[Any]:
    return [() if leaf.constant is MISSING else (leaf.constant,), leaf.dims, leaf.dtype, leaf.order]


def _call(name: str, tree: str, leaves: Sequence[Any]) -> Call:
    return Call(name, treespec_loads(tree), tuple(Leaf(*constant or (MISSING,), *rest) for constant, *rest in leaves))


def search_key(network: nn.Module, batch: Any, conditions: Any) -> str:
    """Key of what the answer of a search depends on; empty where something of that is not known.

    Of every module: its class (with the code, where it is not of an installed package), `extra_repr`, mode and all of
    its attributes. Of every parameter and buffer: shape, strides, dtype, device, whether it trains, which are one and
    the same; of buffers of whole numbers the values. Shapes, strides and dtypes of the batch; settings of torch.
    """
    if conditions is None or any(getattr(hooks_of_all, name, None) for name in _HOOKS_OF_ALL):
        return ""
    try:
        return fingerprint_of(
            modules=_modules(network),
            batch=[_meta(leaf) if isinstance(leaf, Tensor) else _Known().of(leaf) for leaf in tree_flatten(batch)[0]],
            form=str(tree_flatten(batch)[1]),
            conditions=conditions,
            torch=_settings_of_torch(),
        )
    except Exception:  # an attribute that cannot be read is one that is not known
        return ""


class _Known(Description):
    """A description that refuses what it would have to look into for long, or not far enough."""

    def __init__(self) -> None:
        super().__init__(strict=True)

    def known_as(self, part: Any) -> int:
        """Number of a module or tensor that counts elsewhere."""
        return self._seen.setdefault(id(part), (len(self._seen), part))[0]

    def of(self, value: Any) -> Any:
        """In JSON.

        Raises:
            NotUnderstoodError: For data, and for modules and large tensors that are no part of the network.
        """
        if id(value) not in self._seen:
            size = value.nbytes if isinstance(value, Tensor | np.ndarray) else 0
            if size > _LARGE_BYTES or isinstance(value, (*_NOT_LOOKED_INTO, nn.Module)):
                raise NotUnderstoodError(f"a {type(value).__name__}")
        return super().of(value)


def _modules(network: nn.Module) -> list[Any]:
    describe, parts = _Known(), []
    modules = list(network.named_modules(remove_duplicate=False))
    for _, module in modules:
        for part in (module, *module._parameters.values(), *module._buffers.values()):
            if part is not None:
                describe.known_as(part)
    for path, module in modules:
        if isinstance(module, _NOT_LOOKED_INTO) or type(module).__module__.startswith("torch._dynamo"):
            raise NotUnderstoodError(f"a {type(module).__name__}")
        for name in _HOOKS:
            if hooks_of_others(getattr(module, name, {})):
                raise NotUnderstoodError(f"a hook of {path!r}")
        tensors = [
            [name, describe.known_as(tensor), _meta(tensor), tensor.requires_grad]
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]
            if tensor is not None
        ]
        counts = [
            [name, tensor.tolist()]
            for name, tensor in module._buffers.items()
            if tensor is not None and not tensor.is_floating_point() and name != "num_batches_tracked"
        ]
        settings = [[key, describe.of(value)] for key, value in held_by(module)]
        kind = [describe.of(type(module)), module.extra_repr(), module.training]
        parts.append([path, describe.known_as(module), kind, tensors, counts, settings])
    return parts


def _meta(tensor: Tensor) -> list[Any]:
    kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
    return [kind, list(tensor.shape), list(tensor.stride()), str(tensor.dtype), str(tensor.device), str(tensor.layout)]


def _settings_of_torch() -> list[Any]:
    devices = ("cpu", "cuda")
    return [
        torch.__version__,
        str(torch.get_default_dtype()),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        [[torch.is_autocast_enabled(device), str(torch.get_autocast_dtype(device))] for device in devices],
    ]
