"""`TTAEval`: test-time augmentation with metrics that are right (step 9)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unfreeze.callbacks.base import StageCallback, players
from lightning_unfreeze.data.datasets import innermost_dataset
from lightning_unfreeze.data.sample_names import class_names_of
from lightning_unfreeze.inside_lightning.distributed import gather_objects
from lightning_unfreeze.inside_lightning.loaders import process_loaders, process_no_loaders
from lightning_unfreeze.inside_lightning.metrics import pin_callback_metrics, validate_aside
from lightning_unfreeze.reporting import save_figure
from lightning_unfreeze.stages.plan import Stage
from lightning_unfreeze.tta.collect import Answers, Pass, snapshot_files
from lightning_unfreeze.tta.figure import plot_flips
from lightning_unfreeze.tta.outputs import activation_of, find_target, shape_target
from lightning_unfreeze.tta.random_views import DrawingLoader, drawn_views, start_drawing, training_augmentation
from lightning_unfreeze.tta.result import TTAResult, disagreements, scores_of
from lightning_unfreeze.tta.views import (
    Activation,
    Merge,
    View,
    beta_weights,
    extra_views,
    merge_snapshots,
    merge_views,
    spread,
    uncertainty,
    view_functions,
)
from lightning_unfreeze.tta.watch import LogitsSpy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TTAEval", "TTAResult", "merge_views"]

Kind = Literal["validate", "test", "predict"]


class TTAEval(StageCallback):
    """Plain and test-time-augmented metrics from one pass over the data, with the user's own module and steps.

    The module's `validation_step`, `test_step` and `predict_step` run as they are. The call that turns the images into
    logits is caught on the way, its result is the plain view, and the other views of the same images go through the
    same network right after the step, joined into one forward. The plain view always takes part and is the first: it
    is what the network was called with, so what the step itself does to the images is done in every view. A network
    that ends in a softmax or a sigmoid is found out, and its probabilities are not activated again.

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
    batches hold features. The sanity validation tries all views on one batch, so that what cannot work is an error
    before training; a failure later in the fit is a warning, and the fit goes on. Where a stage goes back to earlier
    weights (`until`), `results` and the picture are those of these weights.

    Where another callback lists checkpoints in `snapshots` (cosine restarts can keep one per cycle), each of them
    answers all views, and the merge is over snapshots times views; plain is the module as it is. With
    `CosineRestarts(ensemble=True)` in `test` the module's own answer is that of the snapshots: plain is then the
    ensemble, and its answers to the views are merged.

    Several of them in one Trainer have names of their own: `val_acc_tta`, then `val_acc_tta_2`, and `tta_2.png`.

    Sole writer of TTA metrics and merged predictions.

    Args:
        views: `"flip"` (horizontal), `"five_crop"`, `"ten_crop"`, `"d4"`, `"multiscale"`, `"random"` (draws by the
            training augmentation), or a list of view names (`"hflip+rot90"`, `"scale:1.25"`, see `views.draw_view`)
            and functions from `(N, channels, H, W)` to the same.
        merge: Of the probabilities: `"mean"`, `"gmean"` (also called `"log_mean"`), `"max"`, `"vote"`, see
            `merge_views`.
        beta: Weight of the plain view, the others share the rest; `"v2"` is fastai 2's 0.25, `"v07"` fastai 0.7's
            rule, one plain vote for every four others. None: all views alike.
        num_random: Draws per image for `"random"`.
        chunk_size: Views of one size joined into one forward. None joins all of them on an accelerator and none on the
            CPU, where larger batches are slower (twice, for 7 x 32 images of 128 px). Lower it when memory is short.
        on: Where to augment.
        every: During `fit`, `"stage_end"` augments a stage's last validation (the last of each cycle, where the stage
            may end there; all of them with `until="plateau"`; without stages, the fit's last one), a number n that of
            every n-th epoch.
        forward: Name of the submodule whose call gives the logits, `""` for the module itself; None finds it. Of an
            output that is more than a tensor, `.logits`, `["logits"]` or the first of a tuple is taken.
        activation: `"softmax"` over classes or `"sigmoid"` per label; `"auto"` tells by the network's end, the losses
            and metrics that the module holds, and the targets (see `tta.outputs.activation_of`).
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
        merge: Merge = "mean",
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
        self.views = extra_views(views)
        self.random = views == "random"
        self.num_views = 1 + (num_random if self.random else len(self.views))
        if merge not in get_args(Merge):
            raise ValueError(f"merge={merge!r} is none of {', '.join(map(repr, get_args(Merge)))}")
        for option, value in {"num_random": num_random, "chunk_size": chunk_size, "crop_px": crop_px}.items():
            if value is not None and value < 1:
                raise ValueError(f"{option}={value} has to be at least 1")
        if every != "stage_end" and (isinstance(every, str) or every < 1):
            raise ValueError(f"every={every!r} is not 'stage_end' or a number of epochs of at least 1")
        if not on or set(on) - set(get_args(Kind)):
            raise ValueError(f"on={on!r} has to name at least one of {get_args(Kind)} and nothing else")
        if activation not in ("auto", "softmax", "sigmoid"):
            raise ValueError(f"activation={activation!r} is none of 'auto', 'softmax', 'sigmoid'")
        if beta is not None and merge == "max":
            raise ValueError(f"beta={beta!r} weighs the plain view, but merge={merge!r} has no such weight")
        if augmentation is not None and not self.random:
            raise ValueError("augmentation draws the views of views='random'; for other views pass them as a list")
        self._merge = functools.partial(merge_snapshots, method=merge, weights=beta_weights(beta, self.num_views))
        self.merge, self.chunk_size, self.on, self.every = merge, chunk_size, tuple(on), every
        self.forward, self.activation, self.target, self.crop_px = forward, activation, target, crop_px
        self.augmentation, self.seed, self.figure = augmentation, seed, figure
        self.results: dict[str, TTAResult] = {}
        self._word = "tta"
        self._is_first = True
        self._pass: Pass | None = None
        self._predict_step: Callable[..., Any] | None = None
        self._pictures: dict[str, Callable[[], Figure]] = {}
        self._found_at = -1  # the optimizer step of the last augmented validation
        self._kept: tuple[dict[str, TTAResult], dict[str, Callable[[], Figure]]] | None = None
        self._trying = self._tried = self._chosen = False
        self._failure: str | None = None
        self._activation: Activation | None = None

    # --- the three kinds of run ------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """For random views, puts a `DrawingLoader` around each evaluation loader as Lightning gets it ready."""
        place = [other for other in trainer.callbacks if isinstance(other, TTAEval)].index(self)  # type: ignore[attr-defined]
        self._word, self._is_first = f"tta_{place + 1}" if place else "tta", place == 0
        self._pictures, self._kept, self._failure, self._tried, self._found_at = {}, None, None, False, -1
        if not self.random:
            return

        def draw(loader: object) -> object:
            draws = isinstance(loader, DataLoader) and not trainer.training
            return DrawingLoader(loader) if draws else loader  # type: ignore[arg-type]

        process_loaders(trainer, self, draw)

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
        if self._pass is None:
            return
        self._collect(trainer, pl_module, batch, dataloader_idx)
        bar = trainer.progress_bar_callback
        first = batch_idx == 0 and trainer.validating and not self._trying
        if first and isinstance(bar, TQDMProgressBar) and bar.is_enabled:
            bar.val_progress_bar.set_description(f"{bar.validation_description} + TTA ({self.num_views} views)")

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Computes and logs the metrics."""
        with self._surviving(trainer, pl_module):
            self._finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Computes and logs the metrics."""
        self._finish(trainer, pl_module, "test")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compares the plain view with what the module logged itself."""
        self._compare(trainer, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compares the plain view with what the module logged itself."""
        self._compare(trainer, "test")

    def on_stage_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Forgets what an earlier stage could go back to."""
        self._kept = None

    def on_weights_kept(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Keeps the results of this validation beside its weights."""
        is_of_these = self._found_at == trainer.global_step
        self._kept = (dict(self.results), dict(self._pictures)) if is_of_these else None

    def on_weights_restored(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Goes back to the results of the weights that came back; without any there is nothing to say of them."""
        of_test = {name: result for name, result in self.results.items() if not name.startswith("val")}
        self.results, self._pictures = self._kept or (of_test, {})

    def on_weights_chosen(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, are_new: bool) -> None:
        """Validates the final weights with all views, where that was not done; `results` and the picture are theirs."""
        known = not are_new and any(name.startswith("val") for name in self.results)
        if "validate" not in self.on or self._failure or known:
            return
        self.results = {name: result for name, result in self.results.items() if not name.startswith("val")}
        self._chosen = True
        try:
            pin_callback_metrics(trainer, validate_aside(trainer, [self]))
        finally:
            self._chosen = False
        self._draw(trainer)

    def on_stage_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Draws the stage's last augmented validation."""
        self._draw(trainer)

    def on_predict_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts a step around the module's `predict_step`: a callback cannot change what `Trainer.predict` returns."""
        self._start(trainer, pl_module, "predict")
        if self._pass is None:
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
        process_no_loaders(trainer, self)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves nothing behind on the module and the strategy."""
        self._stop(pl_module)
        self._kept = None
        process_no_loaders(trainer, self)

    # --- one pass --------------------------------------------------------------------------------------------------

    def _is_due(self, trainer: pl.Trainer, kind: Kind) -> bool:
        if kind not in self.on or trainer.state.fn != TrainerFn.FITTING or self._chosen:
            return kind in self.on
        if trainer.sanity_checking or self.run is None or self.run.stage.precompute or self._failure:
            return False
        if isinstance(self.every, int):
            return (trainer.current_epoch + 1) % self.every == 0
        stage, done = self.run.stage, trainer.current_epoch + 1 - self.run.start_epoch
        if stage.until == "plateau":
            return True
        ends = {stage.num_epochs, *(map(math.ceil, stage.cycle_ends) if stage.until is not None else ())}
        # with `check_val_every_n_epoch` the last validation may come some epochs before the end
        return any(0 <= end - done < (trainer.check_val_every_n_epoch or 1) for end in ends)

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, kind: Kind) -> None:
        self._stop(pl_module)
        due = self._is_due(trainer, kind)
        holds_features = self.run is not None and self.run.stage.precompute
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._trying = fitting and not due and kind in self.on and not self._tried and not holds_features
        if not (due or self._trying):
            return
        loaders: Any = getattr(trainer, f"{'val' if kind == 'validate' else kind}_dataloaders")
        flat = CombinedLoader(loaders, "sequential").flattened
        with self._surviving(trainer, pl_module):
            snapshots = snapshot_files(players(trainer), testing=trainer.testing)
            self._pass = passing = Pass(LogitsSpy(pl_module, self.forward), flat, snapshots)
            if trainer.world_size > 1 and any(loader.batches is None for loader in passing.loaders) and due:
                rank_zero_warn(
                    "TTAEval: the order of a loader's samples is not known: samples that the distributed sampler "
                    "repeats are counted as often as they come; use a map-style dataset without shuffling"
                )
            if self.random and due:
                augmentation = self.augmentation or training_augmentation(trainer)
                known = [loader.loader if loader.batches is not None else None for loader in passing.loaders]
                start_drawing(known, augmentation, self.num_views - 1, self.seed)

    def _stop(self, pl_module: pl.LightningModule) -> None:
        if self._pass is not None:
            self._pass.close()
        if self._predict_step is not None:
            vars(pl_module).pop("predict_step", None)  # the class's own comes back; another TTAEval may have been here
        self._pass, self._predict_step = None, None

    @contextmanager
    def _surviving(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
        """Inside a fit that has begun to train, what fails here is a warning: the fit is worth more."""
        try:
            yield
        except Exception as error:
            if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
                raise
            self._failure = f"{type(error).__name__}: {error}"
            if trainer.world_size == 1:  # else all ranks give up together, at the end of the pass
                self._give_up(trainer, pl_module, self._failure)

    def _give_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule, failure: str) -> None:
        self._failure = failure
        self._stop(pl_module)
        rank_zero_warn(f"TTAEval augments no more in this fit, which goes on: {failure}")

    def _answers(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, target: Tensor | None, dataloader_idx: int
    ) -> Answers:
        if self._pass is None:
            raise RuntimeError("TTAEval watches no network; this is called inside an augmented run only")
        call, loader = self._pass.spy.take(), self._pass.loaders[dataloader_idx]
        if not self.random:
            views = view_functions(self.views, self.crop_px)
        else:
            views = [] if self._trying else drawn_views(loader.loader, call.images, check=loader.seen_batches == 0)
        chunk_size = self.chunk_size or (1 if call.images.device.type == "cpu" else self.num_views)
        with trainer.precision_plugin.forward_context():
            answers = self._pass.answers(call, loader, views, chunk_size)
        if loader.activation is None:
            found = activation_of(pl_module, answers.end, answers.outputs.shape[-1], target)
            known = self._activation if target is None and answers.end == "logits" else None
            loader.activation = self.activation if self.activation != "auto" else known or found
            self._activation = loader.activation if target is not None else self._activation
        return answers

    def _collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, dataloader_idx: int) -> None:
        if self._pass is None or self._failure or (self._trying and self._pass.loaders[dataloader_idx].rows):
            return
        with self._surviving(trainer, pl_module):
            target = find_target(batch, self._pass.spy.batch_size(), self.target)
            answers = self._answers(trainer, pl_module, target, dataloader_idx)
            loader = self._pass.loaders[dataloader_idx]
            activation, logits = loader.activation or "softmax", answers.logits
            target = shape_target(target, logits.shape[-1], activation)
            plain, merged = merge_views(logits[:1], activation=activation), self._merge(logits, activation=activation)
            rows = {"index": answers.index, "target": target, "plain": plain, "merged": merged}
            rows |= uncertainty(logits, activation)
            loader.add(rows, answers.images if self.figure and not self._trying else None)

    def _predict(self, trainer: pl.Trainer, pl_module: pl.LightningModule, dataloader_idx: int) -> dict[str, Tensor]:
        answers = self._answers(trainer, pl_module, None, dataloader_idx)
        activation = (self._pass and self._pass.loaders[dataloader_idx].activation) or "softmax"
        probs = self._merge(answers.logits, activation=activation).exp()
        return {"probs": probs, "spread": spread(answers.logits, activation), "index": answers.index}

    # --- the whole set ---------------------------------------------------------------------------------------------

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, prefix: str) -> None:
        if self._pass is None:
            return
        failures = [failure for failure in gather_objects(trainer, self._failure) if failure]
        if failures:
            self._give_up(trainer, pl_module, failures[0])
            return
        if self._trying:
            self._tried = True
            self._stop(pl_module)
            return
        self._found_at, loaders = trainer.global_step, self._pass.loaders
        for position, loader in enumerate(loaders):
            result = loader.whole_result(trainer)
            if result is None:
                continue
            suffix = f"/dataloader_idx_{position}" if len(loaders) > 1 else ""
            result.metrics.update(scores_of(result, pl_module, prefix, self._word, with_plain=self._is_first))
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
                data = innermost_dataset(loader.dataset)
                classes = class_names_of(pl_module, getattr(trainer, "datamodule", None), data)
                self._pictures[self._word + suffix.replace("/", "_")] = functools.partial(
                    plot_flips, result, sheet, classes, f"{prefix}{suffix}, {self.num_views} views"
                )
        if trainer.state.fn != TrainerFn.FITTING:
            self._draw(trainer)
        self._stop(pl_module)

    def _compare(self, trainer: pl.Trainer, prefix: str) -> None:
        """Warns where the module's own accuracy is another one: then TTAEval reads its outputs or targets wrongly."""
        now = trainer.state.fn != TrainerFn.FITTING or self._found_at == trainer.global_step
        if not now or trainer.sanity_checking or trainer.world_size > 1:
            return
        for text in disagreements(self.results, prefix, trainer.callback_metrics):
            rank_zero_warn(text)

    def _draw(self, trainer: pl.Trainer) -> None:
        """Draws what was found last: a picture takes longer than a small validation."""
        for name, picture in self._pictures.items():
            save_figure(trainer, picture(), name)
        self._pictures = {}
