"""Staged transfer learning for vision in PyTorch Lightning: fast.ai's nine steps as callbacks.

| step | what happens | where |
|---|---|---|
| 1 | run the frozen backbone once, keep its activations, also of augmented views | `PrecomputeFeatures` |
| 2 | find the highest learning rate at which the loss still clearly falls | `LRFinderPerStage` |
| 3 | train the head on the stored activations | a `Stage` with `precompute=True` |
| 4 | train the head on augmented images, cosine, `cycle_len=1` | `CosineRestarts` |
| 5 | unfreeze, all at once or layer group by layer group | `GradualUnfreeze` |
| 6 | give earlier layer groups 3x-10x lower rates | `lr_mult` of a `Stage` |
| 7 | find the learning rate again, with those ratios | `LRFinderPerStage` |
| 8 | cosine restarts, `cycle_mult=2`, until over-fitting | `CosineRestarts`, `until="overfit"` |
| 9 | test-time augmentation | `TTAEval` |

`nine_steps()` gives the callbacks of the whole recipe.
"""

from lightning_unfreeze.callbacks.base import StageCallback
from lightning_unfreeze.callbacks.lr_finder import LRFinderPerStage
from lightning_unfreeze.callbacks.precompute import PrecomputeFeatures
from lightning_unfreeze.callbacks.restarts import CosineRestarts
from lightning_unfreeze.callbacks.tta import TTAEval
from lightning_unfreeze.callbacks.unfreeze import GradualUnfreeze
from lightning_unfreeze.data.modules import DigitsData, ImageFolderData
from lightning_unfreeze.layers.groups import layer_groups
from lightning_unfreeze.module import TransferClassifier
from lightning_unfreeze.recipe import nine_steps
from lightning_unfreeze.stages.plan import Stage

__version__ = "0.1.0"

__all__ = [
    "CosineRestarts",
    "DigitsData",
    "GradualUnfreeze",
    "ImageFolderData",
    "LRFinderPerStage",
    "PrecomputeFeatures",
    "Stage",
    "StageCallback",
    "TTAEval",
    "TransferClassifier",
    "layer_groups",
    "nine_steps",
]
