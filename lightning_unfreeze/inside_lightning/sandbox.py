"""Training steps that leave no trace: for the range test, for checking a shortcut, for timing a plan."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_unfreeze.inside_lightning.distributed import rebuild_ddp
from lightning_unfreeze.seeding import rng_state, set_rng_state

_MODULE_INTERNALS = frozenset(vars(nn.Module()))
_PutBack = Callable[[], None]


@contextmanager
def sandbox(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Whatever training steps do inside, afterwards everything is bitwise as before.

    Kept and put back, in memory: parameters, gradients, buffers (persistent or not), train/eval modes, plain and tensor
    attributes of every sub-module (metric states, lists that a user's step appends to), optimizer state and param
    groups, the gradient scaler, the random state (Python, numpy, torch, CUDA). `self.log` does nothing inside and no
    callback is called; loops, counters, loggers and checkpoints are never touched. Under DDP the wrapper is built
    anew at the end, a collective call.

    Not covered: what a step does to the world outside (files, its own logger calls) and to a dataset.
    """
    optimizers = list(trainer.optimizers)
    random_state = rng_state()
    put_back = [_keep(parameter) for parameter in pl_module.parameters()]
    gradients = [(parameter, parameter.grad) for parameter in pl_module.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None  # a fresh gradient buffer inside; the old one is put back by identity
    modules = [(module, module.training, _keep_attributes(module)) for module in pl_module.modules()]
    states = [_optimizer_state(optimizer) for optimizer in optimizers]
    scaler = copy.deepcopy(trainer.precision_plugin.state_dict())
    callbacks, trainer.callbacks = trainer.callbacks, []  # type: ignore[attr-defined]
    silenced = {name: vars(pl_module).get(name) for name in ("log", "log_dict")}
    for name in silenced:
        vars(pl_module)[name] = _log_nothing
    try:
        yield
    finally:
        for name, before in silenced.items():
            if before is None:
                vars(pl_module).pop(name, None)
            else:
                vars(pl_module)[name] = before
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
        if scaler:
            trainer.precision_plugin.load_state_dict(scaler)
        for optimizer, state in zip(optimizers, states, strict=True):
            _restore_optimizer(optimizer, state)
        for module, training, attributes_back in modules:
            module.training = training
            attributes_back()
        for parameter_back in put_back:
            parameter_back()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        set_rng_state(random_state)
    rebuild_ddp(trainer)  # a collective call: not after an error, which may be that of one rank alone


@contextmanager
def in_eval_mode(*roots: nn.Module) -> Iterator[None]:
    """Puts modules in eval mode with all that is inside them, and every part back in its own mode after it."""
    modes = [(part, part.training) for root in roots for part in root.modules()]
    for root in roots:
        root.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def step_arguments(step: Callable[..., Any], batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """What Lightning calls a module's step with: the index only where the step takes it."""
    return (batch, batch_idx) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else (batch,)


def training_loss(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor | None:
    """Loss of the module's own `training_step` on a batch that lies on the device; None where the step skips it."""
    output = trainer.strategy.training_step(*step_arguments(pl_module.training_step, batch, batch_idx))
    loss = output["loss"] if isinstance(output, Mapping) else output
    return loss if loss is None or isinstance(loss, Tensor) else torch.as_tensor(loss)


def batch_on_device(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    """`batch` as the training step gets it: converted to the precision, through the transfer hooks, on the device."""
    batch = trainer.precision_plugin.convert_input(batch)
    # Lightning's loop makes these two calls in this order; the first has no public name (guarded by
    # `test_sandbox__a_batch_goes_through_the_transfer_hooks`, Lightning 2.6)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _log_nothing(*_: Any, **__: Any) -> None:
    return None


def _keep_attributes(module: nn.Module) -> _PutBack:
    """Keeps a module's buffers and its own attributes (metric states, lists that a step appends to)."""
    attributes = {name: value for name, value in vars(module).items() if name not in _MODULE_INTERNALS}
    back = [_keep(module._buffers), *map(_keep, attributes.values())]

    def put_back() -> None:
        for name in vars(module).keys() - attributes.keys() - _MODULE_INTERNALS:
            del vars(module)[name]
        vars(module).update(attributes)
        for each in back:
            each()

    return put_back


def _keep(value: Any) -> _PutBack:
    """Keeps the value of tensors, arrays and containers; the call puts it back in place, since others may hold them.

    Objects of other kinds are kept by identity alone: their containers hold the same ones afterwards.
    """
    if isinstance(value, Tensor):
        return _keep_tensor(value)
    if isinstance(value, np.ndarray):
        array = value.copy()
        return lambda: np.copyto(value, array)
    if not isinstance(value, list | tuple | dict | set | deque):
        return _nothing
    members = copy.copy(value)
    back = [_keep(member) for member in (value.values() if isinstance(value, dict) else value)]

    def put_back() -> None:
        if isinstance(value, list):
            value[:] = members
        elif isinstance(value, deque):
            value.clear()
            value.extend(members)
        elif isinstance(value, dict | set):
            value.clear()
            value.update(members)
        for each in back:
            each()

    return put_back


def _keep_tensor(tensor: Tensor) -> _PutBack:
    before = tensor.detach().clone()
    # a loss that a list keeps may wait for its backward pass, which a write would break; nobody writes into it
    version = tensor._version if tensor.grad_fn is not None else None

    def put_back() -> None:
        if version is not None and tensor._version == version:
            return
        # through `detach`: a metric's state is an inference tensor where validation made it, and refuses a direct write
        with torch.no_grad():
            tensor.detach().copy_(before)

    return put_back


def _nothing() -> None:
    return None


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    state = {key: copy.deepcopy(value) for key, value in optimizer.state.items()}
    groups = [
        {k: v if k == "params" else copy.deepcopy(v) for k, v in group.items()} for group in optimizer.param_groups
    ]
    return state, groups


def _restore_optimizer(optimizer: torch.optim.Optimizer, kept: tuple[dict[Any, Any], list[dict[str, Any]]]) -> None:
    state, groups = kept
    optimizer.state.clear()
    optimizer.state.update(state)
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group.clear()
        group.update(before)
