"""Staged transfer learning for vision in PyTorch Lightning: fast.ai's nine steps as callbacks.

| step | what happens | where |
|---|---|---|
| 1 | run the frozen backbone once, keep its activations, also of augmented views | `PrecomputeFeatures` |
| 2 | find the highest learning rate at which the loss still clearly falls | `LRFinderPerStage` |
| 3 | train the head on the stored activations | a `Stage` with `precompute=True` |
| 4 | train the head on augmented images, cosine, `cycle_len=1` | `CosineRestarts` |
| 5 | unfreeze, all at once or layer group by layer group | `GradualUnfreeze` |
| 6 | give earlier layer groups 3x-10x lower rates | `lr_span` of a `Stage` |
| 7 | find the learning rate again, with those ratios | `LRFinderPerStage` |
| 8 | cosine restarts, `cycle_mult=2`, until over-fitting | `CosineRestarts`, `until="overfit"` |
| 9 | test-time augmentation | `TTAEval` |

`nine_steps()` gives the callbacks of the whole recipe, `fine_tune(epochs)` those of a short one. Names are imported
when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_unfreeze.callbacks.base import StageCallback as StageCallback
    from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage as LRFinderPerStage
    from lightning_unfreeze.callbacks.precompute import PrecomputeFeatures as PrecomputeFeatures
    from lightning_unfreeze.callbacks.restarts import CosineRestarts as CosineRestarts
    from lightning_unfreeze.callbacks.snapshots import BestWeights as BestWeights
    from lightning_unfreeze.callbacks.tta import TTAEval as TTAEval
    from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze as GradualUnfreeze
    from lightning_unfreeze.data.digits import DigitsData as DigitsData
    from lightning_unfreeze.data.modules import ImageFolderData as ImageFolderData
    from lightning_unfreeze.layers.groups import layer_groups as layer_groups
    from lightning_unfreeze.module import TransferClassifier as TransferClassifier
    from lightning_unfreeze.recipe import fine_tune as fine_tune
    from lightning_unfreeze.recipe import nine_steps as nine_steps
    from lightning_unfreeze.stages.plan import Stage as Stage

__version__ = "0.2.0"

_ROOM_OF = {
    "BestWeights": "callbacks.snapshots",
    "CosineRestarts": "callbacks.restarts",
    "DigitsData": "data.digits",
    "GradualUnfreeze": "callbacks.unfreeze",
    "ImageFolderData": "data.modules",
    "LRFinderPerStage": "callbacks.lr_finder",
    "PrecomputeFeatures": "callbacks.precompute",
    "Stage": "stages.plan",
    "StageCallback": "callbacks.base",
    "TTAEval": "callbacks.tta",
    "TransferClassifier": "module",
    "fine_tune": "recipe",
    "layer_groups": "layers.groups",
    "nine_steps": "recipe",
}

__all__ = list(_ROOM_OF)


def __getattr__(name: str) -> Any:
    """Imports a public name from its room on first use (PEP 562): the package alone loads no Lightning."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
