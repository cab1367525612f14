"""`ErrorReport`: where a model is wrong, after `test` or `validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from lightning_unfreeze.data.images import decode
from lightning_unfreeze.data.sample_names import class_names_of, sample_names
from lightning_unfreeze.reporting import report_dir
from lightning_unfreeze.reporting.explain import worst_rows, write_report
from lightning_unfreeze.reporting.judged import Judged
from lightning_unfreeze.reporting.model_card import model_card
from lightning_unfreeze.tta.figure import thumbnail

_PICTURE_PX = 192


class ErrorReport(Callback):
    """Shows what a model gets wrong, after `Trainer.test` and `Trainer.validate`, for any module that `TTAEval` reads.

    Beside the checkpoint (else in the logger's folder) comes a folder `explain_test` or `explain_val`, in it the page
    `index.html` that needs nothing else: accuracy per class with its interval, the confusion matrix, the worst photos
    with loss, guess, truth and path, the calibration, and what test-time augmentation changed. The numbers are in CSV
    files beside it. Of a checkpoint of `TransferClassifier` comes `model_card.md` too. The predictions are those that
    `TTAEval` has collected, so it has to stand beside this callback.

    Args:
        num_photos: Worst photos on the page.
    """

    def __init__(self, num_photos: int = 24) -> None:
        if num_photos < 0:
            raise ValueError(f"num_photos={num_photos}: give 0 or more.")
        self.num_photos = num_photos
        self.pages: list[Path] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Looks for the callback whose predictions are shown.

        Raises:
            MisconfigurationException: Where there is none.
        """
        if stage in ("test", "validate"):
            self.pages = []
            _results(trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the report on the test data."""
        self._write(trainer, pl_module, "test", trainer.test_dataloaders)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the report on the validation data, outside `fit`."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, pl_module, "val", trainer.val_dataloaders)

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str, loaders: Any) -> None:
        if not trainer.is_global_zero:
            return
        base = Path(trainer.ckpt_path).parent if trainer.ckpt_path else report_dir(trainer)
        if base is None:
            return
        loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
        for number, loader in enumerate(loaders):
            name = split if len(loaders) == 1 else f"{split}/dataloader_idx_{number}"
            result = _results(trainer).get(name)
            if result is None:
                continue
            dataset = getattr(loader, "dataset", None)
            judged = _judged(result, dataset, trainer, pl_module)
            indices = result.index.tolist()
            pictures = {
                row: picture
                for row in worst_rows(judged, self.num_photos)
                if (picture := _picture(dataset, indices[row], judged.names[row])) is not None
            }
            folder = base / f"explain_{name.replace('/', '_')}"
            title = f"{type(pl_module).__name__} on {len(indices)} {name} images"
            page = write_report(judged, pictures, folder, title)
            self.pages.append(page)
            rank_zero_info(f"where the model is wrong: {page}")
            if trainer.ckpt_path and number == 0:
                checkpoint = torch.load(trainer.ckpt_path, map_location="cpu", weights_only=True)
                card = base / "model_card.md"
                card.write_text(model_card(checkpoint, judged, split, Path(trainer.ckpt_path).name), encoding="utf-8")
                rank_zero_info(f"model card: {card}")


def _results(trainer: pl.Trainer) -> dict[str, Any]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        results = getattr(callback, "results", None)
        if isinstance(results, dict) and hasattr(callback, "num_views"):
            return results
    raise MisconfigurationException("ErrorReport shows what TTAEval found: add TTAEval() to the callbacks too.")


def _judged(result: Any, dataset: Any, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Judged:
    num_classes, datamodule = result.plain.shape[1], getattr(trainer, "datamodule", None)
    names = class_names_of(pl_module, datamodule, dataset, num_classes=num_classes)
    files, indices = sample_names(dataset), result.index.tolist()
    known = files is not None and max(indices, default=0) < len(files)
    return Judged(
        names=[files[index] if known and files is not None else str(index) for index in indices],
        class_names=names or [str(number) for number in range(num_classes)],
        target=result.target.numpy(),
        probs=result.plain.exp().numpy(),
        probs_tta=result.merged.exp().numpy(),
        threshold=getattr(getattr(pl_module, "task", None), "threshold", 0.5),
    )


def _picture(dataset: Any, index: int, name: str) -> Image.Image | None:
    """A small picture of a sample: of its file, else of what the dataset gives; None where neither shows one."""
    if Path(name).is_file():
        try:
            picture = decode(Path(name)).copy()
        except OSError:
            return None
        picture.thumbnail((_PICTURE_PX, _PICTURE_PX))
        return picture
    try:
        sample = dataset[index]
    except (TypeError, KeyError, IndexError):
        return None
    values = sample.values() if isinstance(sample, dict) else sample if isinstance(sample, tuple | list) else [sample]
    image = next((each for each in values if isinstance(each, torch.Tensor) and each.ndim == 3), None)
    if image is None:
        return None
    return Image.fromarray((thumbnail(image) * 255).byte().numpy())
