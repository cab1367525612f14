"""`GradualUnfreeze`: the conductor with a plan. It checks the plan, freezes and unfreezes, and announces the stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_unfreeze.callbacks.base import Conductor, StageRun, goes_on, players
from lightning_unfreeze.inside_lightning import stopping
from lightning_unfreeze.inside_lightning.clashes import (
    refuse_clashing_callbacks,
    refuse_clashing_optimizer,
    refuse_foreign_trainer,
    refuse_frozen_statistics,
    refuse_manual_optimization,
    refuse_or_replace_schedulers,
    refuse_other_max_epochs,
    refuse_search_on_resume,
)
from lightning_unfreeze.inside_lightning.distributed import (
    broadcast_buffers,
    gather_objects,
    one_order_on_all_ranks,
    own_order_on_each_rank,
    rebuild_ddp,
    refuse_sync_batchnorm,
    refuse_untested_strategy,
)
from lightning_unfreeze.inside_lightning.image_size import check_image_sizes, refuse_fixed_image_size, set_image_size
from lightning_unfreeze.inside_lightning.resume import ResumePoint, resume_point, staged_state
from lightning_unfreeze.inside_lightning.writers import PlanWatch
from lightning_unfreeze.layers.groups import LayerGroup, layer_groups
from lightning_unfreeze.layers.modes import FrozenModes
from lightning_unfreeze.layers.param_groups import split_optimizer
from lightning_unfreeze.reporting import clear_bar, how_to_go_on, log_hyperparams, show_on_bar
from lightning_unfreeze.seeding import kept_rng, rng_state, seed_all, set_rng_state
from lightning_unfreeze.stages.journal import StageJournal
from lightning_unfreeze.stages.plan import Stage, check_plan, image_sizes, plan_epochs, sets_rates, unserved
from lightning_unfreeze.stages.progress import Progress, settled_as
from lightning_unfreeze.stages.what_trains import WhatTrains


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
        scheduler: What to do with a scheduler that `configure_optimizers` returns, while stages set the rates: refuse
            it, or `"replace"` it by the plan; then the peaks are the rates that it was built on.
        freeze_below: Freeze layer groups whose rate over the head's lies below, instead of training them hardly at all;
            stored features then reach further. 0.02, say; None trains every group that a stage names.
        early_stopping: What an `EarlyStopping` ends: the `"fit"`, or its `"stage"`, and judges the next one afresh.

    Raises:
        ValueError: For an empty plan or one that uses a name twice.
    """

    def __init__(
        self,
        stages: list[Stage],
        network: str | None = None,
        on_plan_change: Literal["error", "restage"] = "error",
        train_bn: bool = True,
        scheduler: Literal["error", "replace"] = "error",
        freeze_below: float | None = None,
        early_stopping: Literal["fit", "stage"] = "fit",
    ) -> None:
        super().__init__()
        check_plan(stages)
        choices = {
            "on_plan_change": (on_plan_change, ("error", "restage")),
            "scheduler": (scheduler, ("error", "replace")),
            "early_stopping": (early_stopping, ("fit", "stage")),
        }
        for option, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"{option}={value!r} is not {' or '.join(map(repr, known))}")
        if freeze_below is not None and not 0 < freeze_below <= 1:
            raise ValueError(
                f"freeze_below={freeze_below!r} has to lie in (0, 1]: a layer group's rate over the head's"
            )
        self.stages, self.network = list(stages), network
        self._given_stages = tuple(stages)  # `stages` has what became of `solve="auto"`, too
        self.train_bn, self.on_plan_change = train_bn, on_plan_change
        self.scheduler, self.freeze_below, self.early_stopping = scheduler, freeze_below, early_stopping
        self.what_trains = WhatTrains(freeze_below=freeze_below)
        self.journal = StageJournal()
        self._loaded: dict[str, Any] | None = None  # state of a checkpoint, until its first batch
        self._resume: ResumePoint | None = None
        self._modes = FrozenModes()
        self._seeded_epoch: int | None = None
        self._watch: PlanWatch | None = None

    # --- before training -------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks the plan against the trainer, the other callbacks and the module; sets `max_epochs` from the plan.

        Raises:
            MisconfigurationException: For a clash, with what to do.
            NotImplementedError: For a strategy under which unfreezing is not known to be right.
        """
        refuse_foreign_trainer(trainer)
        if stage != "fit":
            return
        super().setup(trainer, pl_module, stage)
        self._modes.end()
        self._loaded, self._resume = None, None
        if not goes_on(trainer):
            self.progress, self.journal, self.stages = Progress(), StageJournal(), list(self._given_stages)
        refuse_untested_strategy(trainer)
        refuse_sync_batchnorm(trainer, pl_module)
        refuse_manual_optimization(pl_module)
        refuse_clashing_callbacks(trainer, self)
        self._check_needs(trainer)
        refuse_fixed_image_size(trainer, image_sizes(self.stages))
        self._set_max_epochs(trainer)
        one_order_on_all_ranks(trainer, lambda epoch: ("order", self.progress.seed or 0, epoch))
        if self.early_stopping == "stage":
            stopping.follow(trainer, lambda stopper: self._end_by_early_stopping(trainer, stopper))
        else:
            stopping.say_what_they_end(trainer, len(self.stages))
        # a module that builds its network in `configure_model` is looked at in `on_fit_start`, when it is there
        if not is_overridden("configure_model", pl_module):
            self._find_groups(pl_module)

    def _check_needs(self, trainer: pl.Trainer) -> None:
        present = {base.__name__ for player in players(trainer) for base in type(player).__mro__}
        if missing := unserved(self.stages, present):
            raise MisconfigurationException(missing)

    def _set_max_epochs(self, trainer: pl.Trainer) -> None:
        if not (trainer.fast_dev_run or trainer.current_epoch > 0):  # type: ignore[attr-defined]
            planned = plan_epochs(self.stages)
            refuse_other_max_epochs(trainer, len(self.stages), planned)
            trainer.fit_loop.max_epochs = planned

    def _find_groups(self, pl_module: pl.LightningModule) -> None:
        self.what_trains.groups = layer_groups(pl_module, self.network)
        self.what_trains.check(self.stages)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freezes, splits the optimizer's param groups, and wraps what trains; the weights are loaded by now."""
        if not self.groups or is_overridden("configure_model", pl_module):
            self._find_groups(pl_module)
        self.what_trains.find_fixed(pl_module)
        for stage in self.stages:
            self.what_trains.parameters(stage)
        if self._loaded is not None:
            self._take_over(trainer, self._loaded)
        if self.progress.seed is None:
            seed = trainer.strategy.broadcast(torch.initial_seed() & (2**63 - 1))
            self.progress = replace(self.progress, seed=seed)
        refuse_clashing_optimizer(trainer.optimizers[0])  # Lightning refuses several with automatic optimization
        if self._sets_rates(trainer):
            refuse_or_replace_schedulers(trainer, self.scheduler)
        split_optimizer(trainer.optimizers[0], self.groups, [each.scheduler for each in trainer.lr_scheduler_configs])
        for stage in self.stages if not self.train_bn else ():
            lowest = self.what_trains.lowest_norm_rate(pl_module, trainer.optimizers[0].param_groups, stage)
            refuse_frozen_statistics(trainer.optimizers[0], stage.name, lowest)
        log_hyperparams(trainer, {f"stage_{index}": stage.name for index, stage in enumerate(self.stages)})
        show_on_bar(trainer, "stage", self._on_bar)
        self.enter_stage(trainer)
        check_image_sizes(trainer, pl_module, image_sizes(self.stages))
        self._set_image_size(trainer, self.stages[self._index])
        self._seeded_epoch = self.progress.start_epoch if self._resume is None else self._resume.next_epoch
        self._seed("epoch", self._seeded_epoch, trainer)
        self.journal.start_clock()
        self.preflight(trainer, pl_module)

    def _sets_rates(self, trainer: pl.Trainer) -> bool:
        return any(player.writes_rates for player in players(trainer)) or sets_rates(self.stages)

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

    def settle(self, trainer: pl.Trainer, *, solved: bool) -> StageRun:
        """Has the current stage, with `solve="auto"`, solve its head or train it from here on."""
        self.stages[self._index] = self.stages[self._index].settled(solved=solved)
        self._expect_end(trainer)
        return self.current_run(trainer)

    def _expect_end(self, trainer: pl.Trainer) -> None:
        trainer.fit_loop.max_epochs = self.progress.start_epoch + plan_epochs(self.stages[self._index :])

    @property
    def groups(self) -> dict[str, LayerGroup]:
        """The layer groups of the module, input first; empty before a fit."""
        return self.what_trains.groups

    def make_ready(self, trainer: pl.Trainer, stage: Stage) -> None:
        """Freezes and unfreezes, and wraps what trains."""
        self._modes.begin(self.what_trains.freeze(trainer.lightning_module, stage, train_bn=self.train_bn))
        rebuild_ddp(trainer)
        self._watch = PlanWatch(self.groups, stage.name, self.what_trains.trained(stage), self._modes)

    def _set_image_size(self, trainer: pl.Trainer, stage: Stage | None) -> None:
        """Tells the data module, in a plan of several sizes; None is the end of the fit."""
        if image_sizes(self.stages):
            set_image_size(trainer, None if stage is None else stage.image_size_px)

    def frozen_roots(self) -> list[nn.Module]:
        """The outermost modules that are frozen in the current stage."""
        return self._modes.roots

    @contextmanager
    def around_stage_start(self, trainer: pl.Trainer, run: StageRun) -> Iterator[None]:
        """A random state that depends on the stage alone, for a range test; the epoch's own is put back after it."""
        with kept_rng():
            self._seed("stage", run.index, trainer)
            self._modes.keep()
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
        self._modes.keep()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps frozen modules in eval mode, whatever `train()` was called since; starts a resumed stage."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._modes.keep()
        if batch_idx == 0:
            # again: on some ways to resume Lightning draws from the validation loader between epoch and batch start
            self._seed("batches", trainer.current_epoch, trainer)
        elif self._loaded is not None and len(self._loaded["rng"]) == trainer.world_size:
            set_rng_state(self._loaded["rng"][trainer.global_rank])
        self._loaded, self._resume = None, None

    def start_stage(self, trainer: pl.Trainer, pl_module: pl.LightningModule, run: StageRun) -> None:
        """Sets the rates of the stage, and says what trains in it."""
        param_groups = trainer.optimizers[0].param_groups if self._sets_rates(trainer) else []
        # not in `make_ready`: on resume the optimizer's param groups, rates included, are loaded after that
        if not (loaded := run.resumed and self._loaded is not None):
            self.what_trains.set_rates(param_groups, run.stage)
        known = param_groups if loaded or run.stage.lr != "find" else []
        rank_zero_info(f"stage {run.index + 1}/{len(self.stages)} {self.what_trains.said(run.stage, known)}")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Looks whether somebody else wrote what the plan sets."""
        if self._watch is not None:
            self._watch.check(trainer, pl_module)

    def _end_by_early_stopping(self, trainer: pl.Trainer, stopper: EarlyStopping) -> None:
        """Ends the stage that an `EarlyStopping` has just stopped; the next one is judged afresh."""
        stopped = stopping.has_stopped(stopper, trainer.current_epoch)
        if stopped and self.progress.phase == "announced" and self._index + 1 < len(self.stages):
            rank_zero_info(
                f"EarlyStopping on {stopper.monitor!r} ends stage {self.stages[self._index].name!r} after "
                f"{self.current_run(trainer).epoch(trainer)} epochs; the fit goes on"
            )
            self.finish_stage(trainer, trainer.lightning_module, asked_to=True, next_epoch=trainer.current_epoch + 1)
        if self.progress.phase == "idle":  # the next stage waits
            stopping.start_afresh(stopper)
            trainer.should_stop = trainer.should_stop and not stopped

    def finish_stage(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, asked_to: bool, next_epoch: int
    ) -> None:
        """Ends the stage; the next one follows, or the fit is over."""
        broadcast_buffers(trainer)
        self._tell_end(trainer, pl_module)
        self._close_row(trainer, next_epoch)
        if self._index + 1 < len(self.stages):
            self.progress = self.progress.next(next_epoch, trainer.global_step)
            self._set_image_size(trainer, self.stages[self._index])
            self._expect_end(trainer)
        elif asked_to:
            self.progress = self.progress.finish()
            trainer.fit_loop.max_epochs = next_epoch

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints and writes the table of the stages, and names those that did not run."""
        stopped = self.progress.phase == "announced"
        super().on_train_end(trainer, pl_module)
        if stopped:
            self._close_row(trainer, trainer.current_epoch)
        self.journal.write(trainer)
        left = [stage.name for stage in self.stages[self._index + (self.progress.phase != "idle") :]]
        if (left or stopped) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            at = self.current_run(trainer)
            had = f"stage {at.stage.name!r} had {at.epoch(trainer) - 1} of {at.stage.num_epochs} epochs"
            rank_zero_info(stopping.how_ended(trainer, had if stopped else "", left, self.early_stopping))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes the fit with one summary: which file holds which weights, and what they score."""
        rows = [row for player in players(trainer) for row in player.closing_rows(trainer, pl_module)]
        self.journal.write_summary(trainer, rows)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves Trainer and modes as they were; on Ctrl-C prints the table so far, and how to go on."""
        if isinstance(exception, KeyboardInterrupt) and self.progress.phase == "announced":
            self._close_row(trainer, trainer.current_epoch)
            self.journal.write(trainer)
            rank_zero_info(f"interrupted in stage {self.stages[self._index].name!r}; {how_to_go_on(trainer)}")
        self._let_go(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves `requires_grad` as the last stage had it; train/eval modes and the progress bar as they were."""
        super().teardown(trainer, pl_module, stage)
        self._let_go(trainer)
        if stage == "fit":
            self._set_image_size(trainer, None)
        self._loaded, self._resume = None, None

    def _let_go(self, trainer: pl.Trainer) -> None:
        clear_bar(trainer)
        stopping.unfollow(trainer)
        own_order_on_each_rank(trainer)
        self._modes.end()
        self._watch = None

    # --- what there is to look at ------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the rates."""
        self.journal.note_rates(trainer, self._index, batch_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the validation metric."""
        self.journal.note_metric(trainer)

    def _close_row(self, trainer: pl.Trainer, next_epoch: int) -> None:
        at = self.progress
        self.journal.close_stage(trainer, self.stages[at.index].name, next_epoch - at.start_epoch, at.start_step)

    @property
    def _index(self) -> int:
        return self.progress.index

    def _on_bar(self) -> str:
        return f"{self._index + 1}/{len(self.stages)} {self.stages[self._index].name}"

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The plan, where it stands, and the random state of every rank: primitives and tensors only."""
        if self.progress.seed is None:
            return {}
        return {
            "plan": [asdict(stage) for stage in self.stages],
            "groups": self.what_trains.parameter_names(),
            **self.progress.to_dict(),
            "journal": self.journal.state_dict(),
        }

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
        self._loaded = staged_state(trainer, checkpoint, self.state_key)
        if self._loaded is None:
            return
        refuse_search_on_resume(trainer)
        self._resume = resume_point(trainer, checkpoint["loops"]["fit_loop"])

    def _take_over(self, trainer: pl.Trainer, state: dict[str, Any]) -> None:
        self.what_trains.check_same_groups(state["groups"])
        self.stages = settled_as(state["plan"], self.stages)
        self.progress = Progress.from_dict(state)
        self.journal.load_state_dict(state["journal"])
        try:
            self.progress, difference = self.progress.kept_or_restaged(
                state["plan"], self.stages, may_restage=self.on_plan_change == "restage"
            )
        except ValueError as error:
            raise MisconfigurationException(f"{error}") from None
        if difference:
            rank_zero_info(f"the plan has changed ({difference}); going on in stage {self.stages[self._index].name!r}")
        self._expect_end(trainer)
        if self.progress.over and self._resume is not None:  # the last stage ended before its time
            trainer.fit_loop.max_epochs = self._resume.next_epoch
