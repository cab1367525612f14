"""What a linear head reads and what it is to answer, caught inside the step that trains it. Torch only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_unfreeze.features.batch_form import NoStoreError
from lightning_unfreeze.features.fill import StoredData, together
from lightning_unfreeze.features.host import Host
from lightning_unfreeze.features.serve import FeatureDataset
from lightning_unfreeze.features.solve import HeadRows, Kind, solve_head

_ROWS_AT_ONCE = 512
_ROWS_TO_LOOK_AT = 8


class NotLinearError(ValueError):
    """The head cannot be solved: it is no linear layer under a cross entropy."""


def linear_head(network: nn.Module, trainable: Iterable[nn.Parameter]) -> nn.Linear:
    """The one linear layer among what trains; norms beside it (behind a transformer's last block) stay as they are.

    Raises:
        NotLinearError: If other weights train too, or the layer has no bias.
    """
    trains = set(trainable)
    owners = {name: part for name, part in network.named_modules() if trains & set(part.parameters(recurse=False))}
    linear = {part for part in owners.values() if isinstance(part, nn.Linear)}
    tables = {p for part in set(owners.values()) - linear for p in part.parameters(recurse=False) if p.ndim > 1}
    if len(linear) != 1 or tables & trains:
        told = ", ".join(f"{name} ({type(part).__name__})" for name, part in owners.items())
        raise NotLinearError(f"a head that can be solved is one linear layer, and what trains is {told or 'nothing'}")
    (head,) = linear
    if head.bias is None:
        raise NotLinearError("a head that can be solved has a bias, and this one has none")
    return head


def head_rows(run: Callable[[Any], Any], head: nn.Linear, batches: Iterable[Any]) -> HeadRows:
    """What the head reads on each batch, and the targets of the cross entropy that its answers go to.

    `run` is the step on one of the batches, called without gradients, the network in eval mode.

    Raises:
        NotLinearError: If the head is called more than once, on something else than rows, or its answers go to no
            cross entropy.
    """
    features: list[Tensor] = []
    targets: list[Tensor] = []
    calls: list[tuple[Tensor, Tensor]] = []
    spy = _LossSpy()
    handle = head.register_forward_hook(lambda _, given, output: calls.append((given[0], output)))
    try:
        for batch in batches:
            calls.clear()
            spy.losses.clear()
            with torch.no_grad(), spy:
                run(batch)
            rows, target = _rows_of(calls, spy.losses)
            features.append(rows.detach().float().cpu())
            targets.append(target.detach().cpu())
    finally:
        handle.remove()
    if not features:
        raise NotLinearError("there is no batch")
    weights = spy.losses[0].class_weights
    return HeadRows(
        torch.cat(features), torch.cat(targets), spy.losses[0].kind, None if weights is None else weights.detach().cpu()
    )


def solve_on_stores(host: Host, trainable: Iterable[nn.Parameter], stores: Mapping[str, StoredData]) -> str:
    """Solves the head on the features of all views, the ridge chosen on `"val"` where there is one; what came out.

    Rows and targets are caught in the step of the host on the stores, by `"train"` and `"val"`. A collective call.

    Raises:
        NoStoreError: As `head_rows`, on all ranks alike.
        NotLinearError: As `linear_head`.
    """
    start, head = time.monotonic(), linear_head(host.network, trainable)
    rows: dict[str, HeadRows] = {}
    with host.aside():
        host.network.eval()
        for split, stored in stores.items():
            rows[split] = together(host, partial(_stored_rows, host, head, stored))
    solution = solve_head(rows["train"], rows.get("val"), num_classes=head.out_features, device=host.device)
    solution = host.gather(solution)[0]  # equal to the last bit, whatever device a rank has
    solution.write_to(head)
    judged = "val" if "val" in rows else "held-out"
    return (
        f"solved, ridge {solution.ridge:.0e}, {judged}_acc {solution.val_acc:.3f}, "
        f"{time.monotonic() - start:.1f} s ({len(rows['train'].features)} rows)"
    )


def why_not_solved(host: Host, trainable: Iterable[nn.Parameter], stored: StoredData | None = None) -> str:
    """What `solve_on_stores` would refuse, by the layers and a few rows of `stored`; empty where it would solve.

    A collective call.
    """
    try:
        head = linear_head(host.network, trainable)
        if stored is not None:
            with host.aside():
                host.network.eval()
                together(host, partial(_stored_rows, host, head, stored, num_rows=_ROWS_TO_LOOK_AT))
    except (NoStoreError, NotLinearError) as reason:
        return str(reason)
    return ""


def _stored_rows(host: Host, head: nn.Linear, stored: StoredData, num_rows: int | None = None) -> HeadRows:
    """Of all views and rows, or of the first rows of one view."""
    dataset = FeatureDataset(stored.store, stored.data.form, stored.prefix)

    def batches() -> Iterator[Any]:
        for view in range(dataset.num_views if num_rows is None else 1):
            dataset.view = view
            end = min(num_rows or len(dataset), len(dataset))
            for first in range(0, end, _ROWS_AT_ONCE):
                rows = list(range(first, min(first + _ROWS_AT_ONCE, end)))
                yield dataset[rows].to(host.device).opened()

    try:
        with stored.prefix.installed():
            return head_rows(host.run, head, batches())
    except NotLinearError as error:
        raise NoStoreError(str(error)) from error


@dataclass(frozen=True)
class _Loss:
    kind: Kind
    logits: Tensor
    target: Tensor
    class_weights: Tensor | None


def _rows_of(calls: list[tuple[Tensor, Tensor]], losses: list[_Loss]) -> tuple[Tensor, Tensor]:
    if len(calls) != 1 or calls[0][1].ndim != 2:
        gave = [tuple(output.shape) for _, output in calls]
        raise NotLinearError(f"the head has to be called once a step and give (N, C) logits; it gave {gave}")
    if len(losses) != 1:
        raise NotLinearError(f"the step has to take one cross entropy (softmax or sigmoid), it took {len(losses)}")
    (rows, answers), (loss,) = calls[0], losses
    if loss.logits.numel() != answers.numel() or not torch.equal(loss.logits.flatten(), answers.flatten()):
        raise NotLinearError("the step's cross entropy is not of the head's own logits (scaled, cut or mixed?)")
    if loss.kind == "softmax" and not loss.target.is_floating_point():
        known = loss.target >= 0  # `ignore_index` is below 0
        return rows[known], loss.target[known]
    return rows, loss.target


class _LossSpy(TorchFunctionMode):
    """Writes down the calls of torch's cross entropies."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[_Loss] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            given = dict(zip(("input", "target", "weight"), args, strict=False)) | kwargs
            target, smoothing = given["target"], given.get("label_smoothing", 0.0)
            if smoothing:
                num_classes = given["input"].shape[1]
                target = target if target.is_floating_point() else F.one_hot(target, num_classes)
                target = (1 - smoothing) * target + smoothing / num_classes
            self.losses.append(_Loss("softmax", given["input"], target, given.get("weight")))
        elif func is F.binary_cross_entropy_with_logits:
            given = dict(zip(("input", "target", "weight"), args, strict=False)) | kwargs
            if given.get("weight") is not None:
                raise NotLinearError("the step's sigmoid cross entropy weighs single elements")
            self.losses.append(_Loss("sigmoid", given["input"], given["target"], given.get("pos_weight")))
        return func(*args, **kwargs)
