"""A classifier on a pretrained backbone: the module of the quickstart, and of anyone who has none of their own."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import timm
import torch
import torchvision
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import OptimizerCallable
from timm.data import resolve_model_data_config
from timm.models import (
    is_model,
    is_model_pretrained,
    list_models,
    list_pretrained,
    load_state_dict,
    split_model_name_tag,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

import lightning_unfreeze.digits_resnet  # noqa: F401  (registers the demo's backbone with timm)
from lightning_unfreeze.layers.families import HEAD
from lightning_unfreeze.layers.groups import layer_groups
from lightning_unfreeze.seeding import kept_rng

TORCHVISION = "torchvision/"


class TransferClassifier(pl.LightningModule):
    """An image classifier: a backbone with a new head, cross entropy, top-1 and top-k accuracy and macro F1.

    Logs `train_loss`, and for `val` and `test`: `val_loss` (without label smoothing), `val_acc`, `val_f1`, and
    `val_acc_top5` where there are more than `top_k` = 5 classes. Batches are `(images, labels)`, images `(N, C, H, W)`,
    labels `(N,)`. The network is the attribute `model`.

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
        num_classes: int,
        pretrained: bool | str = True,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        label_smoothing: float = 0.0,
        top_k: int = 5,
        model_kwargs: dict[str, Any] | None = None,
        data_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: give 2 or more.")
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing={label_smoothing}: give a number in [0, 1).")
        if top_k < 2:
            raise ValueError(f"top_k={top_k}: give 2 or more; top-1 accuracy is always logged.")
        if isinstance(pretrained, str) and not Path(pretrained).is_file():
            raise ValueError(f"pretrained={pretrained!r}: no such file; give a safetensors or pth file, true or false.")
        self.save_hyperparameters(ignore=["optimizer"])
        self.optimizer = optimizer
        self.label_smoothing = label_smoothing
        self.class_names: list[str] | None = None
        build = _build_torchvision if backbone.startswith(TORCHVISION) else _build_timm
        try:
            self.model, own_config = build(backbone, num_classes, pretrained, model_kwargs or {})
        except RuntimeError as error:  # shapes that clash, on many lines
            if not isinstance(pretrained, str):
                raise
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"pretrained={pretrained!r} does not fit backbone={backbone!r}: {reason}") from error
        if pretrained:
            _shrink_head(self.model, num_classes)
        self._data_config = {**own_config, **(data_config or {})}
        metrics: dict[str, Any] = {
            "acc": MulticlassAccuracy(num_classes, average="micro"),
            "f1": MulticlassF1Score(num_classes, average="macro"),
        }
        if num_classes > top_k:
            metrics[f"acc_top{top_k}"] = MulticlassAccuracy(num_classes, average="micro", top_k=top_k)
        self.val_metrics = MetricCollection(metrics, prefix="val_")
        self.test_metrics = self.val_metrics.clone(prefix="test_")

    @property
    def data_config(self) -> dict[str, Any]:
        """What the backbone expects of its input, in timm's words: `input_size`, `mean`, `std`, `crop_pct`..."""
        return dict(self._data_config)

    def setup(self, stage: str) -> None:
        """Compare the number of classes with the data's, and take over its class names."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if stage == "predict" or datamodule is None or not hasattr(datamodule, "num_classes"):
            return
        in_data = datamodule.num_classes
        if in_data != self.hparams["num_classes"]:
            raise MisconfigurationException(
                f"The model has num_classes={self.hparams['num_classes']}, the data has {in_data}: set the model's "
                f"num_classes to {in_data}."
            )
        names: Sequence[str] | None = getattr(datamodule, "class_names", None)
        self.class_names = None if names is None else list(names)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, num_classes)` of images `(N, C, H, W)`."""
        return cast(Tensor, self.model(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of a batch, with label smoothing."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and the metrics of the validation data."""
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and the metrics of the test data."""
        self._evaluate(batch, self.test_metrics)

    def _evaluate(self, batch: tuple[Tensor, Tensor], metrics: MetricCollection) -> None:
        images, labels = batch
        logits = self(images)
        metrics.update(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log(f"{metrics.prefix}loss", loss, on_epoch=True, sync_dist=True, batch_size=len(labels))
        self.log_dict(metrics, on_epoch=True, prog_bar=True, batch_size=len(labels))

    def predict_step(self, batch: Tensor | Sequence[Any], batch_idx: int) -> Tensor:
        """Probabilities `(N, num_classes)` of a batch of images, or of tuples that start with one."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return torch.softmax(self(images).float(), dim=-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer over all parameters; what is frozen is left to the callbacks."""
        return self.optimizer(self.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the class names, and let whoever loads the checkpoint do without the file of pretrained weights."""
        checkpoint["class_names"] = self.class_names
        if self.CHECKPOINT_HYPER_PARAMS_KEY in checkpoint:
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["pretrained"] = False

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the class names from the checkpoint."""
        self.class_names = checkpoint.get("class_names")


def _build_timm(
    name: str, num_classes: int, pretrained: bool | str, kwargs: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    if ":" not in name:  # `hf-hub:` and `local-dir:` names are timm's to resolve
        base, tag = split_model_name_tag(name)
        if not is_model(base):
            raise _unknown(name, list_models())
        if tag and name not in list_pretrained(f"{base}.*"):
            raise _unknown(name, list_pretrained(f"{base}.*"))
        if pretrained is True and not is_model_pretrained(name):
            raise ValueError(f"backbone={name!r}: timm has no weights for it; set pretrained to false or to a file.")
    if not isinstance(pretrained, str):
        model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
        return model, resolve_model_data_config(model)

    # the same draws twice: what equals the network without weights afterwards was not in the file
    with kept_rng():
        reference = timm.create_model(name, num_classes=num_classes, **kwargs)
    # timm drops a head of another number of classes from the file; -1 is always another
    overlay = {"file": pretrained, "num_classes": -1}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes, **kwargs)
    head = model.pretrained_cfg["classifier"] or ()
    head_keys = tuple(f"{part}." for part in ([head] if isinstance(head, str) else head))
    pairs = zip(model.named_parameters(), reference.parameters(), strict=True)
    drawn = [(key, new, old) for (key, new), old in pairs if old.numel() > 1 and old.std() > 0]
    _check_loaded(
        name, pretrained, [key for key, new, old in drawn if torch.equal(new, old) and not key.startswith(head_keys)]
    )
    return model, resolve_model_data_config(model)


def _build_torchvision(
    name: str, num_classes: int, pretrained: bool | str, kwargs: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    short = name.removeprefix(TORCHVISION)
    known = torchvision.models.list_models(module=torchvision.models)
    if short not in known:
        raise _unknown(name, [TORCHVISION + other for other in known])
    model = torchvision.models.get_model(short, weights=None, num_classes=num_classes, **kwargs)
    weights = torchvision.models.get_model_weights(short).DEFAULT
    if pretrained:
        state = load_state_dict(pretrained) if isinstance(pretrained, str) else weights.get_state_dict(check_hash=True)
        # torchvision's classifiers register the head last
        head = [key for key, child in model.named_modules() if list(child.parameters(recurse=False))][-1]
        state = {key: value for key, value in state.items() if not key.startswith(f"{head}.")}
        missing = model.load_state_dict(state, strict=False).missing_keys
        _check_loaded(name, str(pretrained), [key for key in missing if not key.startswith(f"{head}.")])
    preset = weights.transforms()
    return model, {
        "input_size": (3, preset.crop_size[0], preset.crop_size[0]),
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "interpolation": preset.interpolation.value,
        "crop_pct": preset.crop_size[0] / preset.resize_size[0],
        "crop_mode": "center",
    }


def _shrink_head(model: nn.Module, num_classes: int) -> None:
    """Small weights for the new head, as its features are good already.

    Initialisations for training from scratch can be so large (0.3 for timm's MobileNets, on 1280 features) that what
    they leave in directions the data does not span costs several points of accuracy.
    """
    for part in layer_groups(model)[HEAD].modules():
        for layer in part.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.shape[0] == num_classes:
                nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def _unknown(name: str, known: Sequence[str]) -> ValueError:
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"near it are {', '.join(near)}" if near else "timm.list_models() lists what there is"
    return ValueError(f"backbone={name!r} is unknown: {hint}; give a timm model name or '{TORCHVISION}NAME'.")


def _check_loaded(name: str, source: str, missing: list[str]) -> None:
    if missing:
        raise ValueError(
            f"pretrained={source!r} lacks {len(missing)} weights of backbone={name!r} ({', '.join(missing[:3])}...): "
            "give a file of the same network, or set backbone to the network of the file."
        )
