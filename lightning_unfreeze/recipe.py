"""fast.ai's nine steps as one list of callbacks."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback

from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage
from lightning_unfreeze.callbacks.precompute import PrecomputeFeatures
from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.tta import TTAEval
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.stages.plan import Stage


def nine_steps(network: str | None = None, lr_mult: float = 1 / 3, max_cycles: int = 3) -> list[Callback]:
    """The callbacks of the whole recipe, for `Trainer(callbacks=nine_steps())`.

    Args:
        network: Attribute of the module that holds the network; None finds it.
        lr_mult: Factor of the rate from one layer group to the next one towards the input: 1/3 for data that is unlike
            the pretraining data, 1/10 for data that is like it.
        max_cycles: Most cycles of the last stage, each twice as long as the one before; it ends when it over-fits.

    >>> [stage.name for stage in nine_steps()[0].stages]
    ['head_on_features', 'head_augmented', 'full']
    """
    stages = [
        Stage("head_on_features", train="head", epochs=2, precompute=True, lr="find"),
        Stage("head_augmented", train="head", cycle_len=1, cycle_mult=1, num_cycles=3),
        Stage(
            "full",
            lr="find",
            lr_mult=lr_mult,
            cycle_len=1,
            cycle_mult=2,
            num_cycles=max_cycles,
            until="overfit" if max_cycles > 1 else None,
        ),
    ]
    return [GradualUnfreeze(stages, network), PrecomputeFeatures(), LRFinderPerStage(), CosineRestarts(), TTAEval()]
