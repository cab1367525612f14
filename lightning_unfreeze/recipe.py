"""fast.ai's nine steps as one list of callbacks: the whole recipe, and a short one."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch.callbacks import Callback

from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage
from lightning_unfreeze.callbacks.precompute import PrecomputeFeatures
from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.tta import TTAEval
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.stages.plan import Stage


def nine_steps(
    network: str | None = None, lr_span: float = 1 / 9, max_cycles: int = 3, train_bn: bool = False
) -> list[Callback]:
    """The callbacks of the whole recipe, for `Trainer(callbacks=nine_steps())`.

    `configs/nine_steps.yaml` is the same recipe for the command line.

    Args:
        network: Attribute of the module that holds the network; None finds it.
        lr_span: Rate of the first layer group over that of the last in the last stage: 1/9 for data that is unlike the
            pretraining data, 1/100 for data that is like it.
        max_cycles: Most cycles of the last stage, each twice as long as the one before; it ends when it over-fits.
        train_bn: Whether pretrained BatchNorm updates its statistics in layer groups that train.

    >>> [stage.name for stage in nine_steps()[0].stages]
    ['head_on_features', 'head_augmented', 'full']
    """
    stages = [
        Stage("head_on_features", train="head", epochs=2, precompute=True, lr="find"),
        Stage("head_augmented", train="head", cycle_len=1, num_cycles=3),
        Stage(
            "full",
            lr="find",
            lr_span=lr_span,
            cycle_len=1,
            cycle_mult=2,
            num_cycles=max_cycles,
            until="overfit" if max_cycles > 1 else None,
        ),
    ]
    return _callbacks(stages, network, train_bn)


def fine_tune(
    epochs: int,
    network: str | None = None,
    lr_span: float = 1 / 9,
    head_epochs: int | None = None,
    lr: float | None = None,
    train_bn: bool = False,
) -> list[Callback]:
    """The callbacks of the short recipe, for `Trainer(callbacks=fine_tune(5))`: the head, then one cycle of everything.

    The nine steps in their order, without those that cost most: the head is solved on stored features instead of
    trained on them and on augmented images, and there is one cosine cycle instead of several until over-fitting.
    `configs/fine_tune.yaml` is the same recipe for the command line.

    Args:
        epochs: Epochs in which everything trains.
        network: Attribute of the module that holds the network; None finds it.
        lr_span: Rate of the first layer group over that of the last.
        head_epochs: None solves the head, which has to be linear; a number trains any head on stored features for that
            long.
        lr: Peak rate of the last layer group in the cycle; None finds it.
        train_bn: Whether pretrained BatchNorm updates its statistics in layer groups that train.

    >>> head, full = fine_tune(5)[0].stages
    >>> head.solve, full.cycle_epochs
    (True, [Fraction(5, 1)])
    """
    rate: float | Literal["find"] = "find" if lr is None else lr
    if head_epochs is None:
        head = Stage("head", train="head", precompute=True, solve=True)
    else:
        head = Stage("head", train="head", epochs=head_epochs, precompute=True, lr="find")
    return _callbacks([head, Stage("full", lr=rate, lr_span=lr_span, cycle_len=epochs)], network, train_bn)


def _callbacks(stages: list[Stage], network: str | None, train_bn: bool) -> list[Callback]:
    return [
        GradualUnfreeze(stages, network, train_bn=train_bn),
        PrecomputeFeatures(),
        LRFinderPerStage(),
        CosineRestarts(),
        TTAEval(),
    ]
