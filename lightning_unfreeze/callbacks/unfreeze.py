"""`GradualUnfreeze`: the conductor with a plan. It checks the plan, freezes and unfreezes, and announces the stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_unfreeze.callbacks.base import Conductor, StageRun, players
from lightning_unfreeze.inside_lightning.distributed import (
    broadcast_buffers,
    gather_objects,
    rebuild_ddp,
    refuse_sync_batchnorm,
    refuse_untested_strategy,
)
from lightning_unfreeze.inside_lightning.image_size import check_image_sizes, refuse_fixed_image_size, set_image_size
from lightning_unfreeze.inside_lightning.resume import ResumePoint, resume_point
from lightning_unfreeze.layers.freezing import fixed_parameters, frozen_modules, select, trained_parameters
from lightning_unfreeze.layers.groups import LayerGroup, layer_groups
from lightning_unfreeze.layers.param_groups import (
    given_lr,
    layer_group_of,
    own_ratios,
    rate_ratios,
    set_peak_lr,
    split_optimizer,
)
from lightning_unfreeze.seeding import kept_rng, rng_state, seed_all, set_rng_state
from lightning_unfreeze.stages.journal import StageJournal
from lightning_unfreeze.stages.plan import Stage, check_plan, image_sizes, plan_epochs
from lightning_unfreeze.stages.progress import Progress

_LIGHTNING_DEFAULT_EPOCHS = 1000


class GradualUnfreeze(Conductor):
    """Runs a plan of stages in one `Trainer.fit`: freezes, unfreezes, and gives each layer group its rate.

    Sole writer of `requires_grad`, of the train/eval mode of frozen modules, of the optimizer's param groups, and of
    the random state at the start of an epoch (a function of seed, epoch and rank, so that a resumed run goes on as
    the uninterrupted one).

    Frozen means frozen: `requires_grad=False`, no gradient (so no momentum and no decay moves it), and eval mode of
    every module of the group: BatchNorm keeps its statistics, dropout and stochastic depth are off. The optimizer's
    param groups are split by layer group once, before training, and stay the same for the whole fit, so the state of
    groups that go on training is kept, and a checkpoint always fits. What `configure_optimizers` set (weight decay and
    other options per group) is kept; parameters it left out follow with the optimizer's defaults.

    Args:
        stages: The plan; `Trainer(max_epochs=...)` need not be given.
        network: Attribute of the module that holds the network, e.g. `"model"`; None finds it (see `layer_groups`).
        on_plan_change: What to do when a checkpoint was written by another plan: `"error"`, or `"restage"` to go on
            with the new plan in the stage of the same name.
        train_bn: Whether BatchNorm of layer groups that train updates its statistics. False keeps those of the
            pretraining (eval mode; scale and shift train), often better for few images; new layers in the last layer
            group are left alone.

    Raises:
        ValueError: For an empty plan or one that uses a name twice.
    """

    def __init__(
        self,
        stages: list[Stage],
        network: str | None = None,
        on_plan_change: Literal["error", "restage"] = "error",
        train_bn: bool = True,
    ) -> None:
        super().__init__()
        check_plan(stages)
        if on_plan_change not in ("error", "restage"):
            raise ValueError(f"on_plan_change={on_plan_change!r} is not 'error' or 'restage'")
        self.stages = list(stages)
        self.network = network
        self.train_bn = train_bn
        self.on_plan_change = on_plan_change
        self.groups: dict[str, LayerGroup] = {}
        self.journal = StageJournal()
        self._loaded: dict[str, Any] | None = None  # state of a checkpoint, until its first batch
        self._resume: ResumePoint | None = None
        self._frozen: list[nn.Module] = []
        self._modes_before: dict[nn.Module, bool] = {}
        self._fixed: set[nn.Parameter] = set()
        self._seeded_epoch: int | None = None

    # --- before training -------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks the plan against the trainer, the other callbacks and the module; sets `max_epochs` from the plan.

        Raises:
            MisconfigurationException: For a clash, with what to do.
            NotImplementedError: For a strategy under which unfreezing is not known to be right.
        """
        if not isinstance(trainer, pl.Trainer):
            raise MisconfigurationException(
                f"GradualUnfreeze needs lightning.pytorch.Trainer, got {type(trainer).__module__}.Trainer; "
                "import both from `lightning.pytorch`"
            )
        if stage != "fit":
            return
        super().setup(trainer, pl_module, stage)
        self._put_modes_back()
        self._loaded, self._resume = None, None
        if trainer.current_epoch == 0 and trainer.global_step == 0:  # else the Trainer goes on where it was stopped
            self.progress, self.journal = Progress(), StageJournal()
        refuse_untested_strategy(trainer)
        refuse_sync_batchnorm(trainer, pl_module)
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "stages need automatic optimization; the module sets automatic_optimization=False"
            )
        self._refuse_other_callbacks(trainer)
        self._check_needs(trainer)
        refuse_fixed_image_size(trainer, image_sizes(self.stages))
        self._set_max_epochs(trainer)
        # a module that builds its network in `configure_model` is looked at in `on_fit_start`, when it is there
        if not is_overridden("configure_model", pl_module):
            self._find_groups(pl_module)

    def _refuse_other_callbacks(self, trainer: pl.Trainer) -> None:
        until = any(stage.until is not None for stage in self.stages)
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            reason = None
            if isinstance(other, GradualUnfreeze) and other is not self:
                reason = "a Trainer takes one plan; put all stages into one GradualUnfreeze"
            elif isinstance(other, BaseFinetuning) or type(other).__name__ == "FinetuningScheduler":
                reason = "it freezes and unfreezes too; express it as stages"
            elif isinstance(other, LearningRateFinder):
                reason = "it gives every param group one rate; use LRFinderPerStage and lr='find'"
            elif isinstance(other, StochasticWeightAveraging):
                reason = "it takes over the learning rates; use CosineRestarts(snapshots=True), or WeightAveraging"
            elif until and isinstance(other, WeightAveraging):
                reason = "it validates averages, and until='overfit' goes back to weights; give num_cycles alone"
            if reason:
                raise MisconfigurationException(f"GradualUnfreeze cannot run beside {type(other).__name__}: {reason}")

    def _check_needs(self, trainer: pl.Trainer) -> None:
        present = {base.__name__ for player in players(trainer) for base in type(player).__mro__}
        for stage in self.stages:
            for option, callback in stage.needs.items():
                if callback not in present:
                    raise MisconfigurationException(
                        f"stage {stage.name!r} has {option}, which {callback} serves, and the Trainer has none; "
                        f"add {callback}() to its callbacks or take the option out"
                    )

    def _set_max_epochs(self, trainer: pl.Trainer) -> None:
        planned = plan_epochs(self.stages)
        given = trainer.max_epochs
        if trainer.fast_dev_run or trainer.current_epoch > 0:  # type: ignore[attr-defined]
            return
        if given not in (None, -1, _LIGHTNING_DEFAULT_EPOCHS, planned):
            raise MisconfigurationException(
                f"Trainer(max_epochs={given}), but the {len(self.stages)} stages last {planned} epochs; leave "
                f"max_epochs out, or set it to {planned}"
            )
        trainer.fit_loop.max_epochs = planned

    def _find_groups(self, pl_module: pl.LightningModule) -> None:
        self.groups = layer_groups(pl_module, self.network)
        for stage in self.stages:
            try:
                chosen = select(self.groups, stage.train)
                self.ratios(stage)
            except ValueError as error:
                raise MisconfigurationException(f"stage {stage.name!r}: {error}") from None
            first = next(iter(self.groups))
            if stage.precompute and first in chosen:
                raise MisconfigurationException(
                    f"stage {stage.name!r}: precompute=True stores what the frozen part gives, but the first layer "
                    f"group {first!r} trains; set precompute=False or train fewer groups"
                )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freezes, splits the optimizer's param groups, and wraps what trains; the weights are loaded by now."""
        if not self.groups or is_overridden("configure_model", pl_module):
            self._find_groups(pl_module)
        # what an earlier fit found: a layer group that it left frozen whole hides which of its parameters are fixed
        known = self._fixed & set(pl_module.parameters())
        self._fixed = known | fixed_parameters(self.groups)
        for stage in self.stages:
            self._trained_parameters(stage)
        if self._loaded is not None:
            self._take_over(trainer, self._loaded)
        if self.progress.seed is None:
            seed = trainer.strategy.broadcast(torch.initial_seed() & (2**63 - 1))
            self.progress = replace(self.progress, seed=seed)
        schedulers = self._check_optimizer(trainer)
        split_optimizer(trainer.optimizers[0], self.groups, schedulers)
        self._log_plan(trainer)
        self._show_stage_on_bar(trainer)
        self.enter_stage(trainer)
        check_image_sizes(trainer, pl_module, image_sizes(self.stages))
        self._set_image_size(trainer, self.stages[self.progress.index])
        self._seeded_epoch = self.progress.start_epoch if self._resume is None else self._resume.next_epoch
        self._seed("epoch", self._seeded_epoch, trainer)
        self.journal.start_clock()
        self.preflight(trainer, pl_module)

    def _check_optimizer(self, trainer: pl.Trainer) -> list[Any]:
        """Refuses an optimizer that stages cannot drive; the schedulers that go on beside them."""
        optimizer = trainer.optimizers[0]  # Lightning refuses several with automatic optimization
        if not optimizer.param_groups or not all("lr" in group for group in optimizer.param_groups):
            raise MisconfigurationException(
                f"stages set learning rates, and {type(optimizer).__name__} has none; `configure_optimizers` has to "
                "return one torch optimizer"
            )
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        if schedulers and self._sets_rates(trainer):
            raise MisconfigurationException(
                f"`configure_optimizers` returned the scheduler {type(schedulers[0]).__name__}, and the stages set the "
                "learning rates: two writers of one quantity; return the optimizer alone"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                "LBFGS takes one param group, and stages need one per layer group; use another optimizer, e.g. AdamW"
            )
        return schedulers

    def _sets_rates(self, trainer: pl.Trainer) -> bool:
        writers = [player for player in players(trainer) if player.writes_rates]
        return bool(writers) or any(
            stage.lr is not None or stage.lr_mult != 1 or stage.lr_span is not None or stage.solve
            for stage in self.stages
        )

    # --- what a stage is ---------------------------------------------------------------------------------------------

    def plan(self, trainer: pl.Trainer) -> list[Stage]:
        """All stages."""
        return self.stages

    def current_run(self, trainer: pl.Trainer) -> StageRun:
        """The stage of the coming epoch, and where it started."""
        at = self.progress
        return StageRun(
            at.index,
            self.stages[at.index],
            at.start_epoch,
            at.start_step,
            resumed=at.resumed(trainer.current_epoch, trainer.global_step),
            restaged=at.restaged,
            later=tuple(self.stages[at.index + 1 :]),
        )

    def trained(self, stage: Stage) -> list[str]:
        """The layer groups that train in `stage`, input first."""
        return select(self.groups, stage.train)

    def ratios(self, stage: Stage) -> dict[str, float]:
        """The factor of each layer group on the rate of `stage`."""
        return rate_ratios(list(self.groups), stage.lr_mult, stage.lr_span)

    def _trained_parameters(self, stage: Stage) -> set[nn.Parameter]:
        try:
            return trained_parameters(self.groups, stage.train, self._fixed)
        except ValueError as error:
            raise MisconfigurationException(f"stage {stage.name!r}: {error}") from None

    def make_ready(self, trainer: pl.Trainer, stage: Stage) -> None:
        """Freezes and unfreezes, and wraps what trains."""
        trained = self._trained_parameters(stage)
        everything = {parameter for group in self.groups.values() for parameter in group}
        for parameter in everything:
            parameter.requires_grad_(parameter in trained)
            if not parameter.requires_grad:
                parameter.grad = None
        self._set_modes(trainer.lightning_module, self.trained(stage), everything - trained)
        rebuild_ddp(trainer)

    def _set_image_size(self, trainer: pl.Trainer, stage: Stage | None) -> None:
        """Tells the data module, in a plan of several sizes; None is the end of the fit."""
        if image_sizes(self.stages):
            set_image_size(trainer, None if stage is None else stage.image_size_px)

    def _set_modes(self, pl_module: pl.LightningModule, trained: list[str], frozen: set[nn.Parameter]) -> None:
        self._put_modes_back()
        self._frozen = frozen_modules(pl_module, self.groups, trained, frozen)
        if not self.train_bn:
            pretrained = {parameter for group in list(self.groups.values())[:-1] for parameter in group}
            self._frozen += [
                module
                for module in pl_module.modules()
                if isinstance(module, _BatchNorm) and pretrained.issuperset(module.parameters())
            ]
        self._modes_before = {module: module.training for root in self._frozen for module in root.modules()}

    def _put_modes_back(self) -> None:
        for module, training in self._modes_before.items():
            module.training = training
        self._frozen, self._modes_before = [], {}

    def frozen_roots(self) -> list[nn.Module]:
        """The outermost modules that are frozen in the current stage."""
        return self._frozen

    def _put_frozen_in_eval_mode(self) -> None:
        for root in self._frozen:
            if root.training:
                root.eval()

    def set_rates(self, trainer: pl.Trainer, stage: Stage) -> None:
        """Gives each param group its peak: the stage's rate, times its layer group's ratio, times the user's own one.

        The user's own ratio is the rate that `configure_optimizers` gave the param group over that of the last layer
        group; so `lr=None` keeps the given rates, and a number or a range test keeps what lies between them.
        """
        param_groups, chosen, ratios = trainer.optimizers[0].param_groups, self.trained(stage), self.ratios(stage)
        for group, own in zip(param_groups, own_ratios(param_groups, list(self.groups)[-1]), strict=True):
            name = layer_group_of(group)
            peak = stage.lr * own if isinstance(stage.lr, float | int) else given_lr(group)
            # a solved head is scored by an epoch in which nothing moves
            set_peak_lr(group, peak * ratios[name] if name in chosen and not stage.solve else 0.0)

    @contextmanager
    def around_stage_start(self, trainer: pl.Trainer, run: StageRun) -> Iterator[None]:
        """A random state that depends on the stage alone, for a range test; the epoch's own is put back after it."""
        with kept_rng():
            self._seed("stage", run.index, trainer)
            self._put_frozen_in_eval_mode()
            yield

    def _seed(self, purpose: str, number: int, trainer: pl.Trainer) -> None:
        seed_all(purpose, self.progress.seed or 0, number, trainer.global_rank)

    # --- while it runs -----------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes on inside an epoch, where Lightning calls no `on_train_epoch_start`; ends a stage that is behind."""
        lost = self._resume is not None and self._resume.epoch_end_lost
        behind = lost or trainer.current_epoch >= self.current_run(trainer).end_epoch
        if behind or (self._resume is not None and self._resume.inside_epoch):
            self.announce(trainer, pl_module)
        if behind:
            self.end_epoch(trainer, pl_module, next_epoch=trainer.current_epoch)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts a stage, and sets the random state of the epoch."""
        # the first epoch's order was drawn when its loader was made: seeding again would repeat those draws
        if self._seeded_epoch != trainer.current_epoch:
            self._seed("epoch", trainer.current_epoch, trainer)
        self._seeded_epoch = None
        super().on_train_epoch_start(trainer, pl_module)
        self._put_frozen_in_eval_mode()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps frozen modules in eval mode, whatever `train()` was called since; starts a resumed stage."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._put_frozen_in_eval_mode()
        if batch_idx == 0:
            # again: on some ways to resume Lightning draws from the validation loader between epoch and batch start
            self._seed("batches", trainer.current_epoch, trainer)
        elif self._loaded is not None and len(self._loaded["rng"]) == trainer.world_size:
            set_rng_state(self._loaded["rng"][trainer.global_rank])
        self._loaded, self._resume = None, None

    def start_stage(self, trainer: pl.Trainer, pl_module: pl.LightningModule, run: StageRun) -> None:
        """Sets the rates of the stage, and says what trains in it."""
        # not in `make_ready`: on resume the optimizer's param groups, rates included, are loaded after that
        if self._sets_rates(trainer) and not (run.resumed and self._loaded is not None):
            self.set_rates(trainer, run.stage)
        stage, trained = run.stage, self.trained(run.stage)
        count = sum(p.numel() for name in trained for p in self.groups[name].parameters() if p.requires_grad)
        epochs = f"{stage.num_epochs} epoch{'s' if stage.num_epochs > 1 else ''}"
        rank_zero_info(
            f"stage {run.index + 1}/{len(self.stages)} {stage.name!r}: trains {', '.join(trained)} "
            f"({count:,} parameters) for {'at most ' if stage.until else ''}{epochs}"
        )

    def finish_stage(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, asked_to: bool, next_epoch: int
    ) -> None:
        """Ends the stage; the next one follows, or the fit is over."""
        broadcast_buffers(trainer)
        self._tell_end(trainer, pl_module)
        self._close_row(trainer, next_epoch)
        if self.progress.index + 1 < len(self.stages):
            self.progress = self.progress.next(next_epoch, trainer.global_step)
            self._set_image_size(trainer, self.stages[self.progress.index])
            trainer.fit_loop.max_epochs = next_epoch + plan_epochs(self.stages[self.progress.index :])
        elif asked_to:
            self.progress = self.progress.finish()
            trainer.fit_loop.max_epochs = next_epoch

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the table of the stages and writes `stages.csv` and `stages.png` beside the checkpoints."""
        stopped = self.progress.phase == "announced"
        super().on_train_end(trainer, pl_module)
        if stopped:
            self._close_row(trainer, trainer.current_epoch)
        self.journal.write(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves `requires_grad` as the last stage had it; train/eval modes and the progress bar as they were."""
        super().teardown(trainer, pl_module, stage)
        if trainer.progress_bar_callback is not None:
            vars(trainer.progress_bar_callback).pop("get_metrics", None)
        if stage == "fit":
            self._set_image_size(trainer, None)
        self._put_modes_back()
        self._loaded, self._resume = None, None

    # --- what there is to look at ------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the rates."""
        self.journal.note_rates(trainer, self.progress.index, batch_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the validation metric."""
        self.journal.note_metric(trainer)

    def _close_row(self, trainer: pl.Trainer, next_epoch: int) -> None:
        at = self.progress
        self.journal.close_stage(trainer, self.stages[at.index].name, next_epoch - at.start_epoch, at.start_step)

    def _log_plan(self, trainer: pl.Trainer) -> None:
        for logger in trainer.loggers:
            logger.log_hyperparams({f"stage_{index}": stage.name for index, stage in enumerate(self.stages)})

    def _show_stage_on_bar(self, trainer: pl.Trainer) -> None:
        bar = trainer.progress_bar_callback
        if bar is None or "get_metrics" in vars(bar):
            return
        metrics_of = bar.get_metrics

        def with_stage(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
            index = self.progress.index
            stage = {"stage": f"{index + 1}/{len(self.stages)} {self.stages[index].name}"}
            return {**stage, **metrics_of(trainer, pl_module)}

        bar.get_metrics = with_stage  # type: ignore[method-assign]

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The plan, where it stands, and the random state of every rank: primitives and tensors only."""
        if self.progress.seed is None:
            return {}
        return {
            "plan": [asdict(stage) for stage in self.stages],
            "groups": self._parameter_names(),
            **self.progress.to_dict(),
            "journal": self.journal.state_dict(),
        }

    def _parameter_names(self) -> dict[str, list[str]]:
        return {name: [n for n, _ in group.named_parameters()] for name, group in self.groups.items()}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the random state of every rank, which only the Trainer can gather."""
        checkpoint["callbacks"].get(self.state_key, {})["rng"] = gather_objects(trainer, rng_state())

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes the state of the run from `checkpoint`, when fitting.

        Raises:
            MisconfigurationException: For a checkpoint that was not written by a staged run.
        """
        if trainer.state.fn != "fit":
            return
        self._loaded = checkpoint.get("callbacks", {}).get(self.state_key)
        if not self._loaded:
            raise MisconfigurationException(
                "the checkpoint was not written by a run with GradualUnfreeze, so its optimizer does not fit the "
                "stages; load its weights (`load_from_checkpoint`) and fit without ckpt_path"
            )
        self._resume = resume_point(trainer, checkpoint["loops"]["fit_loop"])

    def _take_over(self, trainer: pl.Trainer, state: dict[str, Any]) -> None:
        ours = self._parameter_names()
        if state["groups"] != ours:
            changed = sorted(name for name in {*ours, *state["groups"]} if ours.get(name) != state["groups"].get(name))
            raise MisconfigurationException(
                f"the checkpoint's layer groups differ from the module's in {changed}; resume with the same module"
            )
        self.progress = Progress.from_dict(state)
        self.journal.load_state_dict(state["journal"])
        difference = _difference(state["plan"], self.stages)
        if difference:
            self.progress = self._restaged(state["plan"], difference)
        trainer.fit_loop.max_epochs = self.progress.start_epoch + plan_epochs(self.stages[self.progress.index :])
        if self.progress.over and self._resume is not None:  # the last stage ended before its time
            trainer.fit_loop.max_epochs = self._resume.next_epoch

    def _restaged(self, before: Sequence[dict[str, Any]], difference: str) -> Progress:
        """Where the run stands in the new plan."""
        if self.on_plan_change == "error":
            raise MisconfigurationException(
                f"the checkpoint was written by another plan: {difference}; resume with the same plan, or allow "
                "the change by GradualUnfreeze(on_plan_change='restage')"
            )
        at, names = before[self.progress.index], [stage.name for stage in self.stages]
        if at["name"] not in names:
            raise MisconfigurationException(
                f"cannot restage: the checkpoint stands in stage {at['name']!r}, the new plan has {names}"
            )
        index = names.index(at["name"])
        rank_zero_info(f"the plan has changed ({difference}); going on in stage {at['name']!r}")
        # a stage that was itself changed starts anew where it stands: other rates, another range test
        changed = bool(_difference([at], [self.stages[index]]))
        return replace(self.progress, index=index, restaged=changed, over=False)


def _difference(old: Sequence[dict[str, Any]], new: Sequence[Stage]) -> str:
    """How a plan differs from that of a checkpoint, `""` where it does not."""
    if [row["name"] for row in old] != [stage.name for stage in new]:
        return f"stages {[row['name'] for row in old]} -> {[stage.name for stage in new]}"
    # an option that the writer's version did not have was at its default
    defaults = {field.name: field.default for field in fields(Stage) if field.default is not MISSING}
    changes = [
        f"{stage.name}.{key}: {before!r} -> {after!r}"
        for row, stage in zip(old, new, strict=True)
        for key, after in asdict(stage).items()
        if (before := row.get(key, defaults.get(key))) != after
    ]
    return ", ".join(changes)
