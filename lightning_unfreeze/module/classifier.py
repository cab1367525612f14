"""A classifier on a pretrained backbone: the module of the quickstart, and of anyone who has none of their own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchvision.transforms import v2

from lightning_unfreeze.data.folders import some
from lightning_unfreeze.data.images import Reading
from lightning_unfreeze.data.transforms import make_transform
from lightning_unfreeze.layers.families import HEAD
from lightning_unfreeze.layers.groups import layer_groups
from lightning_unfreeze.layers.param_groups import decay_groups
from lightning_unfreeze.module.backbones import build_network
from lightning_unfreeze.module.knowledge import (
    check_known,
    input_differences,
    normalisation_of_file,
    plain_config,
    versions,
)
from lightning_unfreeze.module.tasks import MultiLabel, SingleLabel, Task, TaskName, batch_of

if TYPE_CHECKING:
    from PIL.Image import Image


class TransferClassifier(pl.LightningModule):
    """An image classifier: a backbone with a new head, for one class per image or for several labels.

    One class per image (`num_classes`): softmax and cross entropy; logs `val_acc`, `val_f1` (macro), and `val_acc_top5`
    where there are more than `top_k` = 5 classes. Several labels (`num_labels`): a sigmoid and binary cross entropy per
    label; logs `val_map` (mean average precision over the labels), `val_f1` (macro) and `val_acc` (share of right
    decisions). Both log `train_loss` and `val_loss` (without label smoothing and weights), and the same for `test`.
    Batches are `(images, targets)`, images `(N, C, H, W)`, targets `(N,)` or, for several labels, 0 and 1 `(N, C)`.
    The network is the attribute `model`.

    A checkpoint keeps the names of the classes and how images were prepared. Data whose classes stand in another order
    are put into this one for `validate` and `test`, classes that the model does not know are refused, another input is
    warned of. Without options of its own our data module prepares images as in training.

    Args:
        backbone: A model name of timm (`resnet18`, `resnet18.a1_in1k`), or `torchvision/NAME`.
        num_classes: Classes of the new head; the same as the data's.
        pretrained: True for the weights that timm or torchvision publish, False for none, or the path of a local
            safetensors or pth file, with or without a head.
        optimizer: Called with the parameters; in a config a `class_path` and its `init_args` but for `params`.
        label_smoothing: Of the training loss, in [0, 1).
        top_k: Log top-k accuracy too, where there are more classes than this.
        model_kwargs: Further arguments of the model, such as `pad_type`, `bn_eps` or `drop_path_rate`.
        data_config: Entries that replace those of the backbone's own data config, for weights trained on other input:
            `input_size`, `mean`, `std`, `interpolation`, `crop_pct`.
        num_labels: In place of `num_classes`: labels, of which an image may have any number.
        task: `"multiclass"` or `"multilabel"`; None for what `num_classes` or `num_labels` say.
        threshold: Probability from which on a label counts as predicted; for several labels.
        class_weights: Of the training loss, one per class (on what has the label, for several), or `"balanced"`: in
            inverse proportion to how often each comes in the training data.
        mixup_alpha: MixUp of training batches (Zhang et al. 2018), its Beta distribution's parameter; 0 for none.
        cutmix_alpha: CutMix (Yun et al. 2019), likewise; where both are given each batch gets one of them. Stages on
            stored features go without either, as their batches hold no images.

    Attributes:
        class_names: Names in the order of the outputs, from the data module or the checkpoint.

    Raises:
        ValueError: For an unknown backbone, weights that are missing or of another network, or an impossible number.

    >>> classifier = TransferClassifier("digits_resnet", num_classes=5)
    >>> classifier(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int | None = None,
        pretrained: bool | str = True,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        label_smoothing: float = 0.0,
        top_k: int = 5,
        model_kwargs: dict[str, Any] | None = None,
        data_config: dict[str, Any] | None = None,
        num_labels: int | None = None,
        task: TaskName | None = None,
        threshold: float = 0.5,
        class_weights: list[float] | Literal["balanced"] | None = None,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing={label_smoothing}: give a number in [0, 1).")
        if top_k < 2:
            raise ValueError(f"top_k={top_k}: give 2 or more; top-1 accuracy is always logged.")
        if not 0.0 < threshold < 1.0:
            raise ValueError(f"threshold={threshold}: give a probability between 0 and 1, both excluded.")
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if alpha < 0:
                raise ValueError(f"{name}={alpha}: give 0 for none, or a positive number (0.2 is mild, 1 strong).")
        size = _num_outputs(num_classes, num_labels, task)
        multilabel = num_labels is not None or task == "multilabel"
        self.task: Task = (
            MultiLabel(size, label_smoothing, threshold) if multilabel else SingleLabel(size, label_smoothing, top_k)
        )
        if class_weights is not None and class_weights != "balanced" and len(class_weights) != size:
            raise ValueError(f"class_weights has {len(class_weights)} numbers: give {size}, one per class.")
        self.save_hyperparameters(ignore=["optimizer"])
        self.optimizer = optimizer
        self.class_names: list[str] | None = None
        self.model, own_config = build_network(backbone, size, pretrained, model_kwargs or {})
        self._data_config = {**own_config, **(data_config or {})}
        head = {id(parameter) for parameter in layer_groups(self.model)[HEAD].parameters()}
        self._drawn = {key: _size_of(value) for key, value in self.model.named_parameters() if id(value) in head}
        self._knows_its_input = False
        self._mixers: list[nn.Module] = [
            mixer(alpha=alpha, num_classes=size)
            for mixer, alpha in ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha))
            if alpha
        ]
        given = torch.tensor(class_weights) if isinstance(class_weights, list) else None
        self.register_buffer("loss_weights", given, persistent=False)
        self.val_metrics = MetricCollection(self.task.metrics(), prefix="val_")
        self.test_metrics = self.val_metrics.clone(prefix="test_")

    @property
    def data_config(self) -> dict[str, Any]:
        """How images are prepared, in timm's words: as in training, before any as the backbone expects."""
        return dict(self._data_config)

    @property
    def has_drawn_head(self) -> bool:
        """Whether the head is as it was drawn: neither trained nor loaded."""
        now = dict(self.model.named_parameters())
        return all(key in now and _size_of(now[key]) == size for key, size in self._drawn.items())

    # --- what it knows, and the data -------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Compare the classes with the data's, take over their names, and weigh them."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if stage == "predict" or datamodule is None or not hasattr(datamodule, "num_classes"):
            return
        several = getattr(datamodule, "multi_label", None)
        if several is not None and several != isinstance(self.task, MultiLabel):
            wanted, given = ("num_labels", "several labels") if several else ("num_classes", "one class")
            raise MisconfigurationException(
                f"The data has {given} per image: build the model with {wanted}={datamodule.num_classes}."
            )
        names: Sequence[str] | None = getattr(datamodule, "class_names", None)
        if names is not None and self.class_names is not None:
            self._meet(self.class_names, datamodule, is_loaded=False)
        else:
            if not self.trainer.ckpt_path:  # which may know the names of the classes
                self._check_count(datamodule.num_classes)
            self.class_names = None if names is None else list(names)
        if stage == "fit" and self.hparams["class_weights"] == "balanced":
            self.loss_weights = self._balanced_weights(datamodule)
        file, own = self.hparams["pretrained"], self.hparams["data_config"] or {}
        starts = stage == "fit" and not self.trainer.ckpt_path  # which knows its input
        if starts and isinstance(file, str) and hasattr(datamodule, "data_config") and not {"mean", "std"} & set(own):
            backbone = self.hparams["backbone"]
            rank_zero_info(normalisation_of_file(file, backbone, self._data_config, datamodule.data_config))

    def _check_count(self, in_data: int) -> None:
        if in_data != self.task.size:
            option = "num_labels" if isinstance(self.task, MultiLabel) else "num_classes"
            raise MisconfigurationException(
                f"The model has {option}={self.task.size}, the data has {in_data}: set the model's {option} to "
                f"{in_data}."
            )

    def _meet(self, known: list[str], datamodule: Any, is_loaded: bool) -> None:
        """Holds the data's classes against those that the weights were trained on."""
        names = list(datamodule.class_names)
        if names == known:
            return
        fits = self.trainer.state.fn == TrainerFn.FITTING
        if fits and not is_loaded and len(names) == len(known):
            rank_zero_warn(
                f"The model was trained on the classes {some(known)}; from here on its outputs mean those of the "
                f"data: {some(names)}."
            )
            self.class_names = names
            return
        check_known(names, known)
        missing = [name for name in known if name not in names]
        if fits and missing:
            raise MisconfigurationException(
                f"The data lacks classes that the model was trained on ({some(missing)}): go on with all of them, or "
                f"train a model with num_classes={len(names)}."
            )
        if not hasattr(datamodule, "order_classes"):
            raise MisconfigurationException(
                f"The data has the classes {some(names)}, in this order, the model {some(known)}: give "
                f"{type(datamodule).__name__} labels in the model's order (and its class_names), or a method "
                "order_classes(names) that does so."
            )
        datamodule.order_classes(known)
        lacks = f"; it has none of {some(missing)}" if missing else ""
        rank_zero_info(f"The classes of the data ({some(names)}) are put in the model's order ({some(known)}){lacks}.")

    def _balanced_weights(self, datamodule: Any) -> Tensor:
        counts = getattr(datamodule, "class_counts", None)
        if counts is None:
            raise MisconfigurationException(
                f"class_weights='balanced' needs {type(datamodule).__name__}.class_counts, the training images of each "
                f"class in their order: give it that, or class_weights as {self.task.size} numbers."
            )
        num_images = getattr(datamodule, "num_train_images", None) or sum(counts)
        return self.task.balanced_weights(list(counts), num_images).to(self.device)

    def _attached_to(self) -> pl.Trainer | None:
        with suppress(RuntimeError):  # Lightning's, outside of a run
            return self.trainer
        return None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the class names and the input; the weights are in the checkpoint, so nothing is loaded again."""
        checkpoint["class_names"] = self.class_names
        checkpoint["versions"] = versions()
        trainer = self._attached_to()
        datamodule: Any = getattr(trainer, "datamodule", None)
        fits = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        if fits and hasattr(datamodule, "data_config"):
            self._data_config |= plain_config(datamodule.data_config)
            self._knows_its_input = True
        hyper_parameters = checkpoint["hyper_parameters"]
        changed: dict[str, Any] = {"pretrained": False}
        if self._knows_its_input:
            changed["data_config"] = {**(hyper_parameters["data_config"] or {}), **plain_config(self._data_config)}
        checkpoint["hyper_parameters"] = {**hyper_parameters, **changed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the class names and the input from the checkpoint, and hold them against the data."""
        known = checkpoint.get("class_names")
        if "versions" in checkpoint:  # 0.1.0 kept no input
            self._data_config |= checkpoint["hyper_parameters"]["data_config"] or {}
            self._knows_its_input = True
        trainer = self._attached_to()
        datamodule: Any = getattr(trainer, "datamodule", None)
        if trainer is not None and trainer.state.fn != TrainerFn.PREDICTING:
            if known is not None and getattr(datamodule, "class_names", None) is not None:
                self._meet(known, datamodule, is_loaded=True)
            elif hasattr(datamodule, "num_classes"):
                self._check_count(datamodule.num_classes)
        self.class_names = known

    def on_validation_start(self) -> None:
        """Warn of a head that was never trained, and of another input than in training."""
        run = self.trainer.state.fn
        if run is None or run == TrainerFn.FITTING:
            return
        if self.has_drawn_head:
            rank_zero_warn(
                "The head of this model is as it was drawn, at random: its answers mean nothing. Give a checkpoint: "
                f"--ckpt_path FILE, or trainer.{run.value}(..., ckpt_path=FILE)."
            )
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if not self._knows_its_input or not hasattr(datamodule, "data_config"):
            return
        different = input_differences(self._data_config, datamodule.data_config)
        if different:
            rank_zero_warn(
                f"The images are prepared otherwise than in training: {'; '.join(different)}. Leave image_size_px and "
                "data_config of the data module out to get the training's."
            )

    on_test_start = on_predict_start = on_validation_start

    # --- steps -----------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, C)` of images `(N, channels, H, W)`."""
        return cast(Tensor, self.model(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch, with label smoothing, weights, MixUp and CutMix."""
        images, targets = self._checked(batch, batch_idx)
        if self._mixers:
            images, targets = self._mix(images, targets)
        loss = self.task.training_loss(self(images), targets, self.loss_weights)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(targets))
        return loss

    def _checked(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor]:
        images, targets = batch_of(batch)
        if batch_idx == 0 or not isinstance(targets, Tensor):
            self.task.check_targets(targets, len(images))
        return images, targets

    def _mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        channels = self._data_config["input_size"][0]
        if images.ndim != 4 or images.shape[1] != channels:
            if not self._said_unmixed:
                rank_zero_info("MixUp and CutMix are off in this stage: its batches hold stored features, no images.")
            self._said_unmixed = True
            return images, targets
        self._said_unmixed = False
        mixer = self._mixers[int(torch.randint(len(self._mixers), ()))]
        float_targets = targets if targets.ndim == 1 else targets.float()
        return cast("tuple[Tensor, Tensor]", mixer(images, float_targets))

    _said_unmixed = False

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and the metrics of the validation data."""
        self._evaluate(batch, batch_idx, self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and the metrics of the test data."""
        self._evaluate(batch, batch_idx, self.test_metrics)

    def _evaluate(self, batch: tuple[Tensor, Tensor], batch_idx: int, metrics: MetricCollection) -> None:
        images, targets = self._checked(batch, batch_idx)
        logits = self(images)
        metrics.update(logits, targets.long())
        loss = self.task.loss(logits, targets)
        self.log(f"{metrics.prefix}loss", loss, on_epoch=True, sync_dist=True, batch_size=len(targets))
        self.log_dict(metrics, on_epoch=True, prog_bar=True, batch_size=len(targets))

    def predict_step(self, batch: Tensor | Sequence[Any], batch_idx: int) -> Tensor:
        """Probabilities `(N, C)` of a batch of images, or of tuples that start with one."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self.task.probs(self(images))

    def predict_image(self, image: str | Path | Image) -> dict[str, float]:
        """Class names and probabilities of one photo, the most likely first; prepared as in training.

        Args:
            image: A file, or a picture of Pillow's.

        Raises:
            OSError: For a file that is no image.
        """
        config = self.data_config
        photo = Path(image) if isinstance(image, str) else image
        pixels = make_transform(config)(Reading(config["input_size"][0])(photo))
        was_training = self.training
        self.eval()
        with torch.inference_mode():
            probs = self.task.probs(self(pixels[None].to(self.device)))[0].tolist()
        self.train(was_training)
        names = self.class_names or [str(index) for index in range(self.task.size)]
        return dict(sorted(zip(names, probs, strict=True), key=lambda pair: -pair[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer over all parameters, for callbacks to divide by layer group.

        Its weight decay leaves out biases, norms, tokens and all else of one dimension.
        """
        return self.optimizer(decay_groups(self))


def _size_of(parameter: Tensor) -> float:
    return float(parameter.detach().double().cpu().abs().sum())


def _num_outputs(num_classes: int | None, num_labels: int | None, task: TaskName | None) -> int:
    if task not in (None, "multiclass", "multilabel"):
        raise ValueError(f"task={task!r}: give 'multiclass' or 'multilabel'.")
    if (num_classes is None) == (num_labels is None):
        raise ValueError(
            f"num_classes={num_classes}, num_labels={num_labels}: give one of them, num_classes for one class per "
            "image, num_labels for any number of labels per image."
        )
    if num_labels is not None:
        if task == "multiclass":
            raise ValueError(
                f"num_labels={num_labels} and task='multiclass': give num_classes for one class per image."
            )
        if num_labels < 1:
            raise ValueError(f"num_labels={num_labels}: give 1 or more.")
        return num_labels
    least = 1 if task == "multilabel" else 2
    if num_classes is None or num_classes < least:
        raise ValueError(f"num_classes={num_classes}: give {least} or more.")
    return num_classes
