"""Which call of a step gives the logits, on networks as people call them; answers against the call made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_unfreeze.tta.watch import LogitsSpy


class Output(dict[str, Any]):
    """As transformers' `ModelOutput`: a mapping with attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Net(nn.Module):
    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.form = form
        self.backbone, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2)), nn.Linear(16, 5)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        features = self.backbone(pixel_values).flatten(1)
        logits = self.head(features)
        if labels is not None and self.form == "output":
            assert len(labels) == len(logits)
        forms: dict[str, Callable[[], Any]] = {
            "tensor": lambda: logits,
            "tuple": lambda: (logits, features),
            "dict": lambda: {"logits": logits, "features": features},
            "output": lambda: Output(loss=logits.sum(), logits=logits, hidden=features),
        }
        return forms[self.form]()


class Steps(nn.Module):
    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.model = Net(form)
        self.embed, self.top = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(4, 5)


IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 5
BY_HAND: dict[str, Callable[[Steps, Tensor], Tensor]] = {
    "tensor": lambda steps, x: steps.model(x),
    "tuple": lambda steps, x: steps.model(x)[0],
    "dict": lambda steps, x: steps.model(x)["logits"],
    "output": lambda steps, x: steps.model(x).logits,
    "keyword": lambda steps, x: steps.model(pixel_values=x),
    "head on backbone": lambda steps, x: steps.top(steps.embed(x)),
    "twice": lambda steps, x: (steps.model(x), steps.model(x))[1],
    "labels beside": lambda steps, x: steps.model(x, labels=(LABELS.repeat(4))[: len(x)]).logits,
}


@pytest.mark.parametrize("how", list(BY_HAND))
def test_watch__finds_the_call_and_makes_it_again(how: str) -> None:
    torch.manual_seed(0)
    form = {"labels beside": "output", "keyword": "tensor", "head on backbone": "tensor", "twice": "tensor"}.get(
        how, how
    )
    steps = Steps(form).eval()
    spy = LogitsSpy(steps, None)
    with torch.no_grad():
        for _ in range(2):  # the second time only what was found is watched
            plain = BY_HAND[how](steps, IMAGES)
            call = spy.take()
            torch.testing.assert_close(call.logits, plain, rtol=0, atol=0)
        views = torch.cat([IMAGES.flip(-1), IMAGES.flip(-2)])
        with spy.paused():
            expected = BY_HAND[how](steps, views)
            torch.testing.assert_close(call.answer(views), expected)
            torch.testing.assert_close(call.answer(views[:1]), expected[:1])
    spy.close()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in steps.modules())


@pytest.mark.parametrize(
    ("step", "message"),
    [
        # the pooled maps of a network are no images, though they have four dimensions
        (lambda steps, x: steps.model.head(nn.Flatten()(steps.model.backbone(x))), "saw none"),
        (lambda steps, x: steps.top(steps.embed[2](steps.embed[1](steps.embed[0](x)))), "saw none"),
        (lambda steps, x: steps.top(steps.embed(x).relu()), "embed.*gives features"),
        (lambda steps, x: (steps.model(x), steps.embed(x)), "saw 2"),
        (lambda steps, x: (steps.model(x), steps.model(x.flip(-1))), "saw 2"),
        (lambda steps, x: (steps.top(steps.embed(x)), steps.model(x)), "saw 2"),
    ],
)
def test_watch__refuses_what_it_could_not_make_again(step: Callable[[Steps, Tensor], Any], message: str) -> None:
    steps = Steps().eval()
    spy = LogitsSpy(steps, None)
    with torch.no_grad():
        step(steps, IMAGES)
    with pytest.raises(MisconfigurationException, match=message):
        spy.take()
    spy.close()
