"""What a network's answer means: logits or probabilities, of one class or of labels of their own; and its target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from lightning_unfreeze.tta.views import Activation
from lightning_unfreeze.tta.watch import NetworkCall

_TARGET_KEYS = ("target", "targets", "label", "labels", "y")
_LABEL_LOSSES = (nn.BCEWithLogitsLoss, nn.BCELoss, nn.MultiLabelSoftMarginLoss)
_CLASS_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss)

_HANDING_ON = {"_to_copy", "to", "clone", "contiguous", "clamp", "clamp_min", "clamp_max", "cat", "stack"}

End = Literal["sigmoid", "softmax", "logits"]


def end_of(call: NetworkCall) -> End:
    """What the network ends in, where its answers could be probabilities: all of them in [0, 1].

    One image is run again, and the operations are watched: a `torch.sigmoid` in a forward is found like an `nn.Sigmoid`
    at the end, and small logits are not taken for probabilities.
    """
    logits = call.logits.detach()
    if not bool(((logits >= 0) & (logits <= 1)).all()):
        return "logits"
    if logits.ndim == 2 and logits.shape[1] > 1:
        sums = logits.sum(-1)
        if bool(torch.isclose(sums, torch.ones_like(sums), atol=1e-3).all()):
            return "softmax"  # also a mean of softmaxes, whose last operation is another
    try:
        with _LastOperation() as last, torch.no_grad():
            answer = call.answer(call.images[:1])
    except RuntimeError:  # a compiled or scripted network that cannot be watched
        return "logits"
    made_by = last.operations.get(answer.untyped_storage().data_ptr(), "")
    return "sigmoid" if made_by.strip("_") == "sigmoid" else "logits"


class _LastOperation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operation that made the values of each storage; casts and copies hand on what made their input."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        for leaf in tree_leaves(output):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage().data_ptr()
            is_view = storage in given and not name.endswith("_")
            if name in _HANDING_ON and given:
                self.operations[storage] = self.operations.get(given[0], name)
            elif not is_view:
                self.operations[storage] = name
        return output


def activation_of(pl_module: nn.Module, end: End, num_outputs: int, target: Tensor | None) -> Activation:
    """Softmax over classes, or a sigmoid per label, by what is certain first.

    In this order: a single output; a target of class numbers beside several outputs; what the network ends in; rows of
    targets with several labels or none; the losses and metrics that the module holds. Else it is the softmax, also for
    rows that each sum to one (one class, or shares of classes).
    """
    if num_outputs == 1:
        return "sigmoid"
    if target is not None and target.reshape(len(target), -1).shape[1] == 1:
        return "softmax"
    if end != "logits":
        return end
    if target is not None and not _are_shares(target):
        return "sigmoid"
    parts = list(pl_module.modules())
    names = [type(part).__name__ for part in parts if isinstance(part, Metric)]
    for losses, start, found in ((_LABEL_LOSSES, "Multilabel", "sigmoid"), (_CLASS_LOSSES, "Multiclass", "softmax")):
        if any(isinstance(part, losses) for part in parts) or any(name.startswith(start) for name in names):
            return found  # type: ignore[return-value]
    return "softmax"


def find_target(batch: Any, num_samples: int, key: str | int | None) -> Tensor:
    """The target of a batch: `batch[key]`, else its second item, else one of the usual dict keys.

    Raises:
        MisconfigurationException: Where there is none with a row per sample.
    """
    found: Any = None
    if key is not None:
        try:
            found = batch[key]
        except (KeyError, IndexError, TypeError):
            found = None
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


def shape_target(target: Tensor, num_outputs: int, activation: Activation) -> Tensor:
    """The target as integers: `(N,)` classes, or `(N, C)` of 0 and 1 for the sigmoid.

    Raises:
        MisconfigurationException: For rows that are neither.
    """
    columns = target.reshape(len(target), -1)
    if activation == "sigmoid":
        if columns.shape[1] == 1 and num_outputs > 1:
            return nn.functional.one_hot(columns[:, 0].long(), num_outputs)
        if columns.shape[1] == num_outputs:
            return columns.float().round().long()
    elif columns.shape[1] == 1:
        return columns[:, 0].long()
    elif columns.shape[1] == num_outputs:
        if _are_shares(columns):
            return columns.argmax(1)  # shares of the classes: the metrics count the largest
        raise MisconfigurationException(
            "TTAEval took the targets for one class each, and here are rows with several labels or none; set "
            "TTAEval(activation='sigmoid')"
        )
    raise MisconfigurationException(
        f"TTAEval: targets of shape {tuple(target.shape)} do not fit {num_outputs} outputs; a target is a class per "
        "sample, or a row of 0 and 1 per sample"
    )


def as_logits(outputs: Tensor, end: End) -> Tensor:
    """Logits; of probabilities their logs or log odds, which an activation turns into the same probabilities."""
    if end == "logits":
        return outputs
    probs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if end == "softmax":
        return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
    return probs.logit(eps=torch.finfo(probs.dtype).eps)


def _are_shares(target: Tensor) -> bool:
    rows = target.float()
    return bool((rows >= 0).all()) and bool(torch.isclose(rows.sum(1), torch.ones_like(rows[:, 0]), atol=1e-3).all())
