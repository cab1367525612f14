"""fast.ai's nine steps as one list of callbacks: the whole recipe, and a short one.

Beside them what a recipe would come to before anything is trained: its costs, its range tests, the backbone.
"""

from __future__ import annotations

from typing import Literal

from lightning.pytorch.callbacks import Callback

from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage
from lightning_unfreeze.callbacks.precompute import PrecomputeFeatures
from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.snapshots import BestWeights
from lightning_unfreeze.callbacks.tta import TTAEval
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.stages.plan import Stage


def nine_steps(
    network: str | None = None,
    lr_span: float = 1 / 9,
    max_cycles: int = 2,
    train_bn: bool = False,
    head_epochs: int | None = None,
    scheduler: Literal["error", "replace"] = "error",
    early_stopping: Literal["fit", "stage"] = "fit",
) -> list[Callback]:
    """The callbacks of the whole recipe, for `Trainer(callbacks=nine_steps())`.

    The head is solved on stored features of four views an image (or trained on them, where it or the loss is of a kind
    that cannot be solved, or the images cannot be stored), then trained on augmented images, then everything
    trains; a stage that makes nothing better gives back what it started from. At the end the module has the best of the
    weights along the path, by validation. `configs/nine_steps.yaml` is the same recipe for the command line; what the
    defaults rest on is in `docs/recipes.md`.

    Args:
        network: Attribute of the module that holds the network; None finds it.
        lr_span: Rate of the first layer group over that of the last in the last stage: 1/9 for data that is unlike the
            pretraining data, 1/100 for data that is like it.
        max_cycles: Most cycles of the last stage, which ends when it over-fits. The first is of three epochs, each of
            the others twice as long as the one before.
        train_bn: Whether pretrained BatchNorm updates its statistics in layer groups that train.
        head_epochs: None solves the head where that can be done, else trains it for two epochs; a number always trains
            it, for that long.
        scheduler: `"replace"` takes the scheduler of `configure_optimizers` away, which is refused otherwise.
        early_stopping: What an `EarlyStopping` of your own ends: the `"fit"`, or its `"stage"`.

    Raises:
        ValueError: For a `network` that is no name, and for numbers that make no `Stage`.

    >>> [stage.name for stage in nine_steps()[0].stages]
    ['head_on_features', 'head_augmented', 'full']
    """
    stages = [
        _head("head_on_features", head_epochs),
        Stage("head_augmented", train="head", lr="find", cycle_len=1, num_cycles=2, until="overfit"),
        Stage(
            "full",
            lr="find",
            lr_span=lr_span,
            cycle_len=3,
            cycle_mult=2,
            num_cycles=max_cycles,
            until="overfit" if max_cycles > 1 else None,
        ),
    ]
    return _callbacks(stages, network, train_bn, scheduler, early_stopping)


def fine_tune(
    epochs: int,
    network: str | None = None,
    lr_span: float = 1 / 9,
    head_epochs: int | None = None,
    lr: float | None = None,
    train_bn: bool = False,
    scheduler: Literal["error", "replace"] = "error",
    early_stopping: Literal["fit", "stage"] = "fit",
) -> list[Callback]:
    """The callbacks of the short recipe, for `Trainer(callbacks=fine_tune(5))`: the head, then one cycle of everything.

    The nine steps in their order, without those that cost most: the head is not trained on augmented images, and there
    is one cosine cycle instead of several until over-fitting. At the end the module has the best of the weights along
    the path, by validation, among them those before the cycle. `configs/fine_tune.yaml` is the same recipe for the
    command line.

    Args:
        epochs: Epochs in which everything trains.
        network: Attribute of the module that holds the network; None finds it.
        lr_span: Rate of the first layer group over that of the last.
        head_epochs: None solves the head where that can be done, else trains it for two epochs; a number always trains
            it, for that long.
        lr: Peak rate of the last layer group in the cycle; None finds it.
        train_bn: Whether pretrained BatchNorm updates its statistics in layer groups that train.
        scheduler: `"replace"` takes the scheduler of `configure_optimizers` away, which is refused otherwise.
        early_stopping: What an `EarlyStopping` of your own ends: the `"fit"`, or its `"stage"`.

    Raises:
        ValueError: For a `network` that is no name, and for numbers that make no `Stage`.

    >>> head, full = fine_tune(5)[0].stages
    >>> head.solve, full.cycle_epochs
    ('auto', [Fraction(5, 1)])
    """
    rate: float | Literal["find"] = "find" if lr is None else lr
    full = Stage("full", lr=rate, lr_span=lr_span, cycle_len=epochs)
    return _callbacks([_head("head", head_epochs), full], network, train_bn, scheduler, early_stopping)


def _head(name: str, epochs: int | None) -> Stage:
    if epochs is None:
        return Stage(name, train="head", epochs=2, precompute=True, lr="find", solve="auto")
    return Stage(name, train="head", epochs=epochs, precompute=True, lr="find")


def _callbacks(
    stages: list[Stage],
    network: str | None,
    train_bn: bool,
    scheduler: Literal["error", "replace"],
    early_stopping: Literal["fit", "stage"],
) -> list[Callback]:
    if network is not None and not isinstance(network, str):  # fastai's second is the rate: fine_tune(5, 2e-3)
        raise ValueError(
            f"network={network!r} is to name the attribute that holds the network; give rates and lengths by their "
            "names, as in fine_tune(5, lr=2e-3) and nine_steps(max_cycles=4)"
        )
    return [
        GradualUnfreeze(stages, network, train_bn=train_bn, scheduler=scheduler, early_stopping=early_stopping),
        PrecomputeFeatures(num_views=4),
        LRFinderPerStage(),
        CosineRestarts(warmup=0.1),
        BestWeights(restore=True),
        TTAEval(),
    ]
