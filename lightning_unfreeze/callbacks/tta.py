"""`TTAEval`: test-time augmentation with metrics that are right (step 9)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_unfreeze.callbacks.base import StageCallback, players
from lightning_unfreeze.data.datasets import innermost_dataset
from lightning_unfreeze.reporting import save_figure
from lightning_unfreeze.stages.plan import Stage
from lightning_unfreeze.tta.collect import LoaderPass, call_with, sampled_batches, snapshot_states, view_answers
from lightning_unfreeze.tta.random_views import DrawingLoader, training_augmentation
from lightning_unfreeze.tta.result import TTAResult, plot_flips, scores_of
from lightning_unfreeze.tta.views import (
    VIEW_SETS,
    Activation,
    Merge,
    check_view,
    draw_view,
    fit_view_weights,
    merge_views,
    uncertainty,
)
from lightning_unfreeze.tta.watch import LogitsSpy, NetworkCall, as_logits, find_target, shape_target

__all__ = ["TTAEval", "TTAResult", "merge_views"]

View = str | Callable[[Tensor], Tensor]
Kind = Literal["validate", "test", "predict"]

_MERGES = (*get_args(Merge), "learnt", "learnt_per_class")


class TTAEval(StageCallback):
    """Plain and test-time-augmented metrics from one pass over the data, with the user's own module and steps.

    The module's `validation_step`, `test_step` and `predict_step` run as they are. The call that turns the images into
    logits is caught on the way, its result is the plain view, and the other views of the same images go through the
    same network right after the step, joined into one forward. The plain view always takes part and is the first: it
    is what the network was called with, so what the step itself does to the images is done in every view.

    Random draws come from the dataset, in the loader's own worker processes and beside the plain view, so that each
    image is decoded once. They would miss what the step or a batch-transfer hook does to the images: that is refused.

    Logged beside the module's own names, computed once over the whole set: `val_acc_tta`, `val_nll_tta`, `val_ece_tta`
    and each classification metric of torchmetrics that the module holds; the same for the plain view under
    `val_acc_plain` and so on; `val_tta_gain`, `val_tta_fixed` and `val_tta_broken` (predictions corrected and
    corrupted), `val_tta_agreement`, `val_tta_entropy`, `val_tta_mutual_information`. For a sigmoid a prediction is one
    label of one sample. Under DDP samples that the distributed sampler repeats are counted once. `Trainer.predict`
    returns per batch a dict of `"probs"` (N, C), `"spread"` (N, C), the standard deviation over the views, `"index"`
    (N,), and `"output"`, what the module's own `predict_step` gave.

    During `fit` only some validations are augmented (`every`), and none of a stage with `precompute=True`, whose
    batches hold features. Where another callback lists checkpoints in `snapshots` (cosine restarts can keep one per
    cycle), each of them answers all views, and the merge is over snapshots times views; plain is the module as it is.
    With `CosineRestarts(ensemble=True)` in `test` the module's own answer is that of the snapshots: plain is then the
    ensemble, and its answers to the views are merged.

    Sole writer of TTA metrics and merged predictions.

    Args:
        views: `"flip"` (horizontal), `"five_crop"`, `"ten_crop"`, `"d4"`, `"multiscale"`, `"random"` (draws by the
            training augmentation), or a list of view names (`"hflip+rot90"`, `"scale:1.25"`, see `views.draw_view`)
            and functions from `(N, channels, H, W)` to the same.
        merge: Of the probabilities: `"mean"`, `"gmean"` (also called `"log_mean"`), `"max"`, `"vote"`, see
            `merge_views`; or `"learnt"`, one weight per view, and `"learnt_per_class"`, per view and class: validation
            is the split that they are fitted on, there the unweighted mean is reported; test and predict use them.
        beta: Weight of the plain view, the others share the rest; `"v2"` is fastai 2's 0.25, `"v07"` fastai 0.7's
            rule, one plain vote for every four others. None: all views alike.
        num_random: Draws per image for `"random"`.
        chunk_size: Views of one size joined into one forward. None joins all of them on an accelerator and none on the
            CPU, where larger batches are slower (twice, for 7 x 32 images of 128 px). Lower it when memory is short.
        on: Where to augment.
        every: During `fit`, `"stage_end"` augments the validation of a stage's last epoch (of each cycle's last, where
            the stage may end there; without stages, of the fit's last epoch), a number n that of every n-th epoch.
        forward: Name of the submodule whose call gives the logits, `""` for the module itself; None finds it.
        activation: Of the logits; `"auto"` takes a sigmoid for a single logit, for targets of the logits' shape and
            for a module that holds `BCEWithLogitsLoss`, else the softmax.
        target: Key or position of the target in the batch; None takes the second item, or the usual dict keys.
        crop_px: Side of the crops. None: 7/8 of each side, scaled back to the batch's size.
        augmentation: For `"random"`; None takes the `transform` of the training dataset.
        seed: For `"random"`; a draw is a function of seed, view and index alone.
        figure: Write `tta.png` beside the checkpoints and hand it to the logger; during `fit` at the end of a stage,
            of its last augmented validation.

    Raises:
        ValueError: For an impossible argument.
    """

    order: ClassVar[int] = 40

    def __init__(
        self,
        views: Literal["flip", "five_crop", "ten_crop", "d4", "multiscale", "random"] | list[View] = "flip",
        merge: Merge | Literal["learnt", "learnt_per_class"] = "mean",
        beta: float | Literal["v2", "v07"] | None = None,
        num_random: int = 4,
        chunk_size: int | None = None,
        on: Sequence[Kind] = ("validate", "test", "predict"),
        every: Literal["stage_end"] | int = "stage_end",
        forward: str | None = None,
        activation: Literal["auto"] | Activation = "auto",
        target: str | int | None = None,
        crop_px: int | None = None,
        augmentation: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
        figure: bool = True,
    ) -> None:
        self.views = _extra_views(views)
        self.random = views == "random"
        self.num_views = 1 + (num_random if self.random else len(self.views))
        if merge not in _MERGES:
            raise ValueError(f"merge={merge!r} is none of {', '.join(map(repr, _MERGES))}")
        for option, value in {"num_random": num_random, "chunk_size": chunk_size, "crop_px": crop_px}.items():
            if value is not None and value < 1:
                raise ValueError(f"{option}={value} has to be at least 1")
        if every != "stage_end" and (isinstance(every, str) or every < 1):
            raise ValueError(f"every={every!r} is not 'stage_end' or a number of epochs of at least 1")
        if not on or set(on) - set(get_args(Kind)):
            raise ValueError(f"on={on!r} has to name at least one of {get_args(Kind)} and nothing else")
        if activation not in ("auto", "softmax", "sigmoid"):
            raise ValueError(f"activation={activation!r} is none of 'auto', 'softmax', 'sigmoid'")
        if beta is not None and merge in ("max", "learnt", "learnt_per_class"):
            raise ValueError(f"beta={beta!r} weighs the plain view, but merge={merge!r} has no such weight")
        if augmentation is not None and not self.random:
            raise ValueError("augmentation draws the views of views='random'; for other views pass them as a list")
        self._beta_weights = _beta_weights(beta, self.num_views)
        self.merge, self.chunk_size, self.on, self.every = merge, chunk_size, tuple(on), every
        self.forward, self.activation, self.target, self.crop_px = forward, activation, target, crop_px
        self.augmentation, self.seed, self.figure = augmentation, seed, figure
        self.results: dict[str, TTAResult] = {}
        self.weights: Tensor | None = None
        self.temperature = 1.0
        self._fitted_on: object = None
        self._spy: LogitsSpy | None = None
        self._loaders: list[LoaderPass] = []
        self._members: list[dict[str, Tensor]] | None = None
        self._predict_step: Callable[..., Any] | None = None
        self._pictures: dict[str, Callable[[], Figure]] = {}

    # --- the three kinds of run ------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """For random views, puts a `DrawingLoader` around each evaluation loader as Lightning gets it ready."""
        super().setup(trainer, pl_module, stage)
        self._pictures = {}
        if not self.random:
            return
        process = trainer.strategy.process_dataloader

        def process_and_draw(loader: object) -> object:
            processed = process(loader)
            draws = isinstance(processed, DataLoader) and not trainer.training
            return DrawingLoader(processed) if draws else processed  # type: ignore[arg-type]

        # Lightning (2.6) hands each loader to the strategy last, with the distributed sampler in place
        vars(trainer.strategy)["process_dataloader"] = process_and_draw

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts watching the network, where this validation is augmented."""
        self._start(trainer, pl_module, "validate")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts watching the network."""
        self._start(trainer, pl_module, "test")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Runs the other views of the batch."""
        if self._spy is None:
            return
        self._collect(trainer, pl_module, batch, dataloader_idx)
        bar = trainer.progress_bar_callback
        if batch_idx == 0 and isinstance(bar, TQDMProgressBar) and bar.is_enabled:
            bar.val_progress_bar.set_description(f"{bar.validation_description} + TTA ({self.num_views} views)")

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Runs the other views of the batch."""
        if self._spy is not None:
            self._collect(trainer, pl_module, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Computes and logs the metrics."""
        self._finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Computes and logs the metrics."""
        self._finish(trainer, pl_module, "test")

    def on_stage_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Draws the stage's last augmented validation."""
        self._draw(trainer)

    def on_predict_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts a step around the module's `predict_step`: a callback cannot change what `Trainer.predict` returns."""
        self._start(trainer, pl_module, "predict")
        if self._spy is None:
            return
        predict_step = pl_module.predict_step

        @functools.wraps(predict_step)
        def merged_predict_step(*args: Any, **kwargs: Any) -> dict[str, Any]:
            output = predict_step(*args, **kwargs)
            # Lightning passes (batch, batch_idx, dataloader_idx), and the last only where there are several loaders
            return {"output": output, **self._predict(trainer, pl_module, args[2] if len(args) > 2 else 0)}

        self._predict_step = predict_step
        pl_module.predict_step = merged_predict_step  # type: ignore[method-assign]

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the step around `predict_step` off again."""
        self._stop(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves nothing behind on the module and the strategy."""
        self._stop(pl_module)
        vars(trainer.strategy).pop("process_dataloader", None)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves nothing behind on the module and the strategy."""
        super().teardown(trainer, pl_module, stage)
        self._stop(pl_module)
        vars(trainer.strategy).pop("process_dataloader", None)

    def state_dict(self) -> dict[str, Any]:
        """Learnt weights travel with the checkpoint."""
        return {"weights": self.weights, "temperature": self.temperature}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes learnt weights back."""
        self.weights, self.temperature = state_dict["weights"], state_dict["temperature"]

    # --- one pass --------------------------------------------------------------------------------------------------

    def _is_due(self, trainer: pl.Trainer, kind: Kind) -> bool:
        if trainer.sanity_checking or kind not in self.on:
            return False
        if trainer.state.fn != TrainerFn.FITTING:
            return True
        if self.run is None or self.run.stage.precompute:
            return False
        if isinstance(self.every, int):
            return (trainer.current_epoch + 1) % self.every == 0
        stage = self.run.stage
        ends = {stage.num_epochs}
        if stage.until is not None:
            ends |= {math.ceil(end) for end in accumulate(stage.cycle_epochs)}
        return trainer.current_epoch + 1 - self.run.start_epoch in ends

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, kind: Kind) -> None:
        self._stop(pl_module)
        if not self._is_due(trainer, kind):
            return
        loaders: Any = {
            "validate": trainer.val_dataloaders,
            "test": trainer.test_dataloaders,
            "predict": trainer.predict_dataloaders,
        }[kind]
        flat = CombinedLoader(loaders, "sequential").flattened
        if self.merge.startswith("learnt") and kind != "validate":
            self._check_learnt(flat)
        self._loaders = [LoaderPass(loader, sampled_batches(loader)) for loader in flat]
        if trainer.world_size > 1 and any(loader.batches is None for loader in self._loaders):
            rank_zero_warn(
                "TTAEval: the order of a loader's samples is not known: samples that the distributed sampler repeats "
                "are counted as often as they come; use a map-style dataset without shuffling"
            )
        if self.random:
            self._start_random(trainer)
        self._spy = LogitsSpy(pl_module, self.forward)

    def _stop(self, pl_module: pl.LightningModule) -> None:
        if self._spy is not None:
            self._spy.close()
        if self._predict_step is not None:
            del pl_module.predict_step  # the class's own comes back
        for loader in self._loaders:
            if isinstance(loader.loader, DrawingLoader):
                loader.loader.stop()
        self._spy, self._predict_step, self._members, self._loaders = None, None, None, []

    def _check_learnt(self, loaders: Sequence[Any]) -> None:
        if self.weights is None:
            raise MisconfigurationException(
                f"merge={self.merge!r} has no weights yet: they are fitted in validation, on data that nothing is "
                "reported from; call trainer.validate(module, calibration_loader) first, or load a checkpoint of a fit "
                "whose validation was augmented"
            )
        if any(getattr(loader, "dataset", None) is self._fitted_on for loader in loaders):
            raise MisconfigurationException(
                f"merge={self.merge!r}: the weights were fitted on this very dataset, its numbers would flatter; "
                "validate on one split and test on another"
            )

    def _view_logits(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, dataloader_idx: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of all views `(V, N, C)` of the batch that the step has just seen, its images, its indices."""
        if self._spy is None:
            raise RuntimeError("TTAEval watches no network; this is called inside an augmented run only")
        call = self._spy.take()
        loader = self._loaders[dataloader_idx]
        views = self._random_views(loader, call) if self.random else self._named_views()
        if self._members is None:
            self._members = snapshot_states(_snapshots(trainer), call)
        networks: list[Callable[[Tensor], Tensor]] = [functools.partial(call.network, **call.kwargs)]
        networks += [functools.partial(call_with, call, state) for state in self._members]
        chunk_size = self.chunk_size or (1 if call.images.device.type == "cpu" else self.num_views)
        answers = [call.logits]
        with self._spy.paused(), torch.no_grad(), trainer.precision_plugin.forward_context():
            for member, network in enumerate(networks):
                # the step itself has answered the plain view with the current weights
                todo = views if member == 0 else [_plain, *views]
                answers += view_answers(network, call.images, todo, chunk_size)
        logits = torch.stack([answer.reshape(len(call.images), -1) for answer in answers])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, call.images, loader.next_index(len(call.images))

    def _named_views(self) -> list[Callable[[Tensor], Tensor]]:
        return [
            functools.partial(draw_view, name=view, crop_px=self.crop_px) if isinstance(view, str) else view
            for view in self.views
        ]

    def _merge(self, logits: Tensor, activation: Activation, kind: str) -> Tensor:
        copies = len(logits) // self.num_views
        if self.merge.startswith("learnt"):
            if kind == "val" or self.weights is None:
                return merge_views(logits, "mean", activation=activation)
            if len(self.weights) != len(logits):
                raise MisconfigurationException(
                    f"merge={self.merge!r}: weights were fitted to {len(self.weights)} answers per image (views times "
                    f"snapshots), here are {len(logits)}; validate again with these views and snapshots"
                )
            return merge_views(logits / self.temperature, "mean", self.weights, activation)
        weights = None if self._beta_weights is None else torch.tensor(self._beta_weights * copies)
        return merge_views(logits, self.merge, weights, activation)  # type: ignore[arg-type]

    def _resolve_activation(self, pl_module: pl.LightningModule, logits: Tensor, target: Tensor | None) -> Activation:
        if self.activation != "auto":
            return self.activation
        has_labels = target is not None and target.ndim == 2 and target.shape == logits.shape[1:]
        has_bce = any(isinstance(module, nn.BCEWithLogitsLoss) for module in pl_module.modules())
        return "sigmoid" if logits.shape[-1] == 1 or has_labels or has_bce else "softmax"

    def _collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, dataloader_idx: int) -> None:
        logits, images, index = self._view_logits(trainer, pl_module, dataloader_idx)
        target = find_target(batch, len(images), self.target)
        activation = self._resolve_activation(pl_module, logits, target)
        logits = as_logits(logits, activation)
        target = shape_target(target, logits.shape[-1], activation)
        loader = self._loaders[dataloader_idx]
        loader.activation = activation
        prefix = "test" if trainer.testing else "val"
        plain, merged = merge_views(logits[:1], activation=activation), self._merge(logits, activation, prefix)
        rows = {"index": index, "target": target, "plain": plain, "merged": merged}
        rows |= uncertainty(logits, activation)
        if self.merge.startswith("learnt") and prefix == "val":
            rows["logits"] = logits.transpose(0, 1)
        loader.add(rows, images if self.figure else None)

    def _predict(self, trainer: pl.Trainer, pl_module: pl.LightningModule, dataloader_idx: int) -> dict[str, Tensor]:
        logits, _, index = self._view_logits(trainer, pl_module, dataloader_idx)
        activation = self._resolve_activation(pl_module, logits, None)
        logits = as_logits(logits, activation)
        per_view = logits.softmax(-1) if activation == "softmax" else logits.sigmoid()
        return {
            "probs": self._merge(logits, activation, "predict").exp(),
            "spread": per_view.std(0, correction=0),
            "index": index,
        }

    # --- the whole set ---------------------------------------------------------------------------------------------

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, prefix: str) -> None:
        if self._spy is None:
            return
        for position, loader in enumerate(self._loaders):
            rows = loader.whole_set(trainer)
            if rows is None:
                continue
            suffix = f"/dataloader_idx_{position}" if len(self._loaders) > 1 else ""
            if "logits" in rows:
                self.weights, self.temperature = fit_view_weights(
                    rows.pop("logits").transpose(0, 1),
                    rows["target"],
                    per_class=self.merge == "learnt_per_class",
                    activation=loader.activation,
                )
                self._fitted_on = loader.dataset
            result = TTAResult(activation=loader.activation, metrics={}, **rows)
            result.metrics.update(scores_of(result, pl_module, prefix))
            self.results[prefix + suffix] = result
            plain, merged = (float(right.double().mean()) for right in (result.correct_plain, result.correct))
            rank_zero_info(
                f"TTAEval, {prefix}{suffix}: accuracy {plain:.1%} without, {merged:.1%} with {self.num_views} views"
            )
            for name, value in result.metrics.items():
                # every rank holds the same number: their largest is that number, where a mean would round
                pl_module.log(name + suffix, value, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max")
            sheet = loader.whole_sheet(trainer) if self.figure else None
            if sheet is not None and trainer.is_global_zero:
                datamodule = getattr(trainer, "datamodule", None)
                classes = getattr(innermost_dataset(loader.dataset), "classes", None)
                classes = getattr(datamodule, "class_names", classes)
                self._pictures["tta" + suffix.replace("/", "_")] = functools.partial(
                    plot_flips, result, sheet, classes, f"{prefix}{suffix}, {self.num_views} views"
                )
        if trainer.state.fn != TrainerFn.FITTING:
            self._draw(trainer)
        self._stop(pl_module)

    def _draw(self, trainer: pl.Trainer) -> None:
        """Draws what was found last: a picture takes longer than a small validation."""
        for name, picture in self._pictures.items():
            save_figure(trainer, picture(), name)
        self._pictures = {}

    # --- random views ----------------------------------------------------------------------------------------------

    def _start_random(self, trainer: pl.Trainer) -> None:
        augmentation = self.augmentation or training_augmentation(trainer)
        for loader in self._loaders:
            if loader.batches is None or not isinstance(loader.loader, DrawingLoader):
                raise MisconfigurationException(
                    "views='random' draws each sample by its index, and the order of this loader is not known; use a "
                    "map-style dataset in a DataLoader without shuffling, or deterministic views"
                )
            loader.loader.start(augmentation, self.num_views - 1, self.seed)

    @staticmethod
    def _random_views(loader: LoaderPass, call: NetworkCall) -> list[Callable[[Tensor], Tensor]]:
        if loader.loader.current is None:
            raise RuntimeError("the batch was read before the random draws were started")
        batch, draws = loader.loader.current
        if loader.seen_batches == 0:
            given = [leaf.to(call.images) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
            if not any(torch.equal(leaf, call.images) for leaf in given):
                raise MisconfigurationException(
                    "views='random' draws in the dataset, and between the loader and the network the images are "
                    "changed (in the step, or in a batch-transfer hook), which the draws would miss; move that into "
                    "the dataset's transform or into the network's forward, or use deterministic views"
                )
        drawn = draws.to(call.images.device, call.images.dtype, non_blocking=True)
        return [functools.partial(_take, drawn[:, view]) for view in range(drawn.shape[1])]


# --- which views, which weights --------------------------------------------------------------------------------------


def _extra_views(views: str | list[View]) -> list[View]:
    """The views beside the plain one."""
    if views == "random":
        return []
    if isinstance(views, str):
        if views not in VIEW_SETS:
            raise ValueError(f"views={views!r} is none of {', '.join(map(repr, VIEW_SETS))}, 'random', and no list")
        return list(VIEW_SETS[views][1:])
    for view in views:
        if isinstance(view, str):
            check_view(view)
        elif not callable(view):
            raise ValueError(f"a view is a name or a function of a batch of images, got {view!r}")
    return [view for view in views if view != "identity"]


def _beta_weights(beta: float | str | None, num_views: int) -> list[float] | None:
    """Weights of fastai's two rules: 2.x gives the plain view `beta`; 0.7 repeats it once for every four others."""
    others = num_views - 1
    if beta is None or others == 0:
        return None
    if beta == "v07":
        beta = math.ceil(others / 4) / (math.ceil(others / 4) + others)
    elif beta == "v2":
        beta = 0.25
    if isinstance(beta, str) or not 0 <= beta <= 1:
        raise ValueError(f"beta={beta!r} is not a share in [0, 1], 'v2' or 'v07'")
    return [beta] + [(1 - beta) / others] * others


def _snapshots(trainer: pl.Trainer) -> list[Path]:
    """The checkpoints that callbacks list in `snapshots`."""
    paths: list[Path] = []
    for player in players(trainer):
        if trainer.testing and getattr(player, "ensemble", False):
            continue  # it puts its snapshots into the module's own forward, which gives all views
        paths += getattr(player, "snapshots", [])
    return paths


def _plain(images: Tensor) -> Tensor:
    return images


def _take(drawn: Tensor, images: Tensor) -> Tensor:
    return drawn
