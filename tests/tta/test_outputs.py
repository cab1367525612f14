"""What an answer means: ends and activations by hand-made networks, targets by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchmetrics
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_unfreeze.tta.outputs import activation_of, as_logits, end_of, find_target, shape_target
from lightning_unfreeze.tta.watch import LogitsSpy

IMAGES = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Ends(nn.Module):
    def __init__(self, end: str, num_outputs: int) -> None:
        super().__init__()
        self.net, self.end = nn.Sequential(nn.Flatten(), nn.Linear(48, num_outputs)), end

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        if self.end == "sigmoid":
            return torch.sigmoid(z)
        if self.end == "sigmoid reshaped":
            return z.sigmoid().clamp(1e-6, 1 - 1e-6).double().squeeze(1)
        if self.end == "in place":
            return z.sigmoid_()
        if self.end == "heads":
            return torch.cat([column.sigmoid() for column in z.split(1, 1)], 1)
        if self.end == "softmax":
            return z.softmax(-1)
        if self.end == "mean of softmaxes":
            return (z.softmax(-1) + (2 * z).softmax(-1)) / 2
        if self.end == "small logits":  # between 0 and 1, and no probabilities
            return 0.5 + 0.01 * z
        return z


@pytest.mark.parametrize(
    ("end", "num_outputs", "expected"),
    [
        ("sigmoid", 1, "sigmoid"),
        ("sigmoid", 4, "sigmoid"),
        ("sigmoid reshaped", 1, "sigmoid"),
        ("in place", 3, "sigmoid"),
        ("heads", 3, "sigmoid"),
        ("softmax", 3, "softmax"),
        ("mean of softmaxes", 3, "softmax"),
        ("small logits", 1, "logits"),
        ("small logits", 4, "logits"),
        ("logits", 4, "logits"),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_end__is_found_by_what_the_network_does(end: str, num_outputs: int, expected: str, mode: Any) -> None:
    torch.manual_seed(0)
    net = Ends(end, num_outputs).eval()
    spy = LogitsSpy(net, None)
    with mode():
        answer = net(IMAGES)
        call = spy.take()
        with spy.paused():
            found = end_of(call)
    spy.close()
    assert found == expected
    logits = as_logits(answer.float(), found)
    if found == "sigmoid":
        torch.testing.assert_close(logits.sigmoid(), answer.float())
    if found == "softmax":
        torch.testing.assert_close(logits.softmax(-1), answer)


def test_logits__of_certain_probabilities_are_finite() -> None:
    for end in ("sigmoid", "softmax"):
        assert torch.isfinite(as_logits(torch.tensor([[0.0, 1.0]]), end)).all()  # type: ignore[arg-type]
        assert torch.isfinite(as_logits(torch.tensor([[0.0, 1.0]]).half(), end)).all()  # type: ignore[arg-type]


CLASSES, ONE_HOT = torch.tensor([0, 2, 1]), torch.eye(3)[[0, 2, 1]]
SHARES, MULTI_HOT = torch.tensor([[0.5, 0.5, 0.0]] * 3), torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0]])


@pytest.mark.parametrize(
    ("parts", "end", "num_outputs", "target", "expected"),
    [
        ([], "logits", 1, CLASSES.clamp(max=1), "sigmoid"),
        ([], "logits", 3, CLASSES, "softmax"),
        ([], "logits", 3, CLASSES[:, None], "softmax"),
        ([], "logits", 3, ONE_HOT, "softmax"),
        ([], "logits", 3, SHARES, "softmax"),
        ([], "logits", 3, MULTI_HOT, "sigmoid"),
        ([], "logits", 3, None, "softmax"),
        ([], "sigmoid", 3, ONE_HOT, "sigmoid"),
        ([], "softmax", 3, ONE_HOT, "softmax"),
        ([nn.BCEWithLogitsLoss()], "logits", 3, ONE_HOT, "sigmoid"),
        ([nn.BCEWithLogitsLoss()], "logits", 3, CLASSES, "softmax"),  # labels one against the rest, one class asked for
        ([nn.BCEWithLogitsLoss()], "logits", 3, None, "sigmoid"),
        ([nn.CrossEntropyLoss()], "logits", 3, None, "softmax"),
        ([torchmetrics.classification.MultilabelAccuracy(3)], "logits", 3, ONE_HOT, "sigmoid"),
        ([torchmetrics.classification.MulticlassAccuracy(3)], "logits", 3, ONE_HOT, "softmax"),
    ],
)
def test_activation__goes_by_what_is_certain_first(
    parts: list[nn.Module], end: Any, num_outputs: int, target: Tensor | None, expected: str
) -> None:
    assert activation_of(nn.ModuleList(parts), end, num_outputs, target) == expected


@pytest.mark.parametrize(
    ("target", "num_outputs", "activation", "expected"),
    [
        (CLASSES, 3, "softmax", [0, 2, 1]),
        (CLASSES[:, None], 3, "softmax", [0, 2, 1]),
        (ONE_HOT, 3, "softmax", [0, 2, 1]),
        (MULTI_HOT, 3, "sigmoid", MULTI_HOT.tolist()),
        (MULTI_HOT.bool(), 3, "sigmoid", MULTI_HOT.tolist()),
        (torch.tensor([0.0, 1.0]), 1, "sigmoid", [[0], [1]]),
        (CLASSES, 3, "sigmoid", ONE_HOT.tolist()),
    ],
)
def test_target__becomes_integers(target: Tensor, num_outputs: int, activation: Any, expected: list[Any]) -> None:
    shaped = shape_target(target, num_outputs, activation)
    assert shaped.tolist() == expected
    assert shaped.dtype == torch.long


def test_target__is_refused_where_it_fits_nothing() -> None:
    with pytest.raises(MisconfigurationException, match=r"activation='sigmoid'"):
        shape_target(MULTI_HOT, 3, "softmax")
    for activation in ("softmax", "sigmoid"):
        with pytest.raises(MisconfigurationException, match=r"\(3, 3\) do not fit 5 outputs"):
            shape_target(MULTI_HOT, 5, activation)  # type: ignore[arg-type]
    for batch in ({"image": 0, "class_id": CLASSES}, [torch.zeros(3)], torch.zeros(3), (0, torch.zeros(2))):
        with pytest.raises(MisconfigurationException, match="no target of 3 rows"):
            find_target(batch, 3, None)
    with pytest.raises(MisconfigurationException, match="no target of 3 rows"):
        find_target({"y": CLASSES}, 3, "species")
    assert find_target({"image": 0, "labels": CLASSES}, 3, None) is CLASSES
    assert find_target((0, 0, CLASSES), 3, 2) is CLASSES
