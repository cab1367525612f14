"""`GradualUnfreeze`: the conductor. It owns the plan, freezes and unfreezes, and announces the stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, ClassVar, Literal

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

from lightning_unfreeze.callbacks.base import StageCallback, StageRun, players, set_lr
from lightning_unfreeze.inside_lightning.distributed import (
    broadcast_buffers,
    gather_objects,
    rebuild_ddp,
    refuse_sync_batchnorm,
    refuse_untested_strategy,
)
from lightning_unfreeze.layers.freezing import fixed_parameters, frozen_modules, select, trained_parameters
from lightning_unfreeze.layers.groups import LayerGroup, layer_groups
from lightning_unfreeze.layers.param_groups import rate_ratios, split_param_groups
from lightning_unfreeze.seeding import kept_rng, rng_state, seed_all, set_rng_state
from lightning_unfreeze.stages.journal import StageJournal
from lightning_unfreeze.stages.plan import Stage, check_plan, plan_epochs

_LIGHTNING_DEFAULT_EPOCHS = 1000
_SCHEDULERS_LISTS_PER_GROUP = frozenset(
    {"base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums", "base_values"}
)


class GradualUnfreeze(StageCallback):
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

    order: ClassVar[int] = 0

    def __init__(
        self,
        stages: list[Stage],
        network: str | None = None,
        on_plan_change: Literal["error", "restage"] = "error",
        train_bn: bool = True,
    ) -> None:
        check_plan(stages)
        if on_plan_change not in ("error", "restage"):
            raise ValueError(f"on_plan_change={on_plan_change!r} is not 'error' or 'restage'")
        self.stages = list(stages)
        self.network = network
        self.train_bn = train_bn
        self.on_plan_change = on_plan_change
        self.groups: dict[str, LayerGroup] = {}
        self._index, self._start_epoch, self._start_step = 0, 0, 0
        self._over = False
        self._restaged = False
        self._seed: int | None = None
        self._loaded: dict[str, Any] | None = None
        self._entered: int | None = None
        self._frozen: list[nn.Module] = []
        self._modes_before: dict[nn.Module, bool] = {}
        self._fixed: set[nn.Parameter] = set()
        self._seeded_epoch: int | None = None
        self.journal = StageJournal()

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
        self._start_afresh(trainer)
        refuse_untested_strategy(trainer)
        refuse_sync_batchnorm(trainer, pl_module)
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "stages need automatic optimization; the module sets automatic_optimization=False"
            )
        self._refuse_other_callbacks(trainer)
        self._check_needs(trainer)
        self._set_max_epochs(trainer)
        # a module that builds its network in `configure_model` is looked at in `on_fit_start`, when it is there
        if not is_overridden("configure_model", pl_module):
            self._find_groups(pl_module)

    def _start_afresh(self, trainer: pl.Trainer) -> None:
        """Forgets another fit, unless the Trainer goes on where it was interrupted."""
        self._put_modes_back()
        self._entered, self._loaded = None, None
        if trainer.current_epoch == 0 and trainer.global_step == 0:
            self._index, self._start_epoch, self._start_step, self._seed = 0, 0, 0, None
            self._over, self._restaged = False, False
            self.journal = StageJournal()

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
                rate_ratios(list(self.groups), stage.lr_mult, stage.lr_span)
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
            self._trained(stage)
        if self._loaded is not None:
            self._take_over(trainer, self._loaded)
        if self._seed is None:
            self._seed = trainer.strategy.broadcast(torch.initial_seed() & (2**63 - 1))
        self._split_optimizer(trainer, pl_module)
        self._log_plan(trainer)
        self._show_stage_on_bar(trainer)
        self.enter_stage(trainer)
        self._seeded_epoch = self._start_epoch if self._loaded is None else self._loaded["next_epoch"]
        self._seed_epoch(trainer, self._seeded_epoch)
        self.journal.start_clock()

    def _split_optimizer(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
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
        if "layer_group" in optimizer.param_groups[0]:  # a second fit with the same optimizer
            return
        before = list(optimizer.param_groups)
        after, parents = split_param_groups(before, self.groups, optimizer.defaults)
        for group in after:
            group["given_lr"] = float(group["lr"])
        if schedulers:
            _follow_first(after, before[0], len(before), parents)
        # in place: Lightning's wrapper and the schedulers hold the same list
        optimizer.param_groups[:] = after
        for scheduler in schedulers:
            _expand_scheduler(scheduler, len(before), parents)

    def _sets_rates(self, trainer: pl.Trainer) -> bool:
        writers = [player for player in players(trainer) if player.writes_rates]
        return bool(writers) or any(
            stage.lr is not None or stage.lr_mult != 1 or stage.lr_span is not None for stage in self.stages
        )

    # --- stages ----------------------------------------------------------------------------------------------------

    def current_run(self, trainer: pl.Trainer) -> StageRun:
        """The stage of the coming epoch, and where it started."""
        resumed = trainer.global_step > self._start_step or trainer.current_epoch > self._start_epoch
        stage, later = self.stages[self._index], tuple(self.stages[self._index + 1 :])
        return StageRun(
            self._index,
            stage,
            self._start_epoch,
            self._start_step,
            resumed=resumed and not self._restaged,
            restaged=self._restaged,
            later=later,
        )

    def enter_stage(self, trainer: pl.Trainer) -> StageRun:
        """Freezes and unfreezes for the current stage, and wraps what trains, if that is not done yet."""
        run = self.current_run(trainer)
        if self._entered == run.index:
            return run
        trained = self._trained(run.stage)
        self._require_gradients(trained)
        self._set_modes(trainer.lightning_module, run.stage, trained)
        rebuild_ddp(trainer)
        self._entered = run.index
        return run

    def _trained(self, stage: Stage) -> set[nn.Parameter]:
        try:
            return trained_parameters(self.groups, stage.train, self._fixed)
        except ValueError as error:
            raise MisconfigurationException(f"stage {stage.name!r}: {error}") from None

    def _require_gradients(self, trained: set[nn.Parameter]) -> None:
        for group in self.groups.values():
            for parameter in group.parameters():
                parameter.requires_grad_(parameter in trained)
                if not parameter.requires_grad:
                    parameter.grad = None

    @contextmanager
    def as_if_in(self, stage: Stage) -> Iterator[None]:
        """The parameters require gradients as in `stage`; modes stay as they are."""
        before = [(p, p.requires_grad) for group in self.groups.values() for p in group.parameters()]
        self._require_gradients(self._trained(stage))
        try:
            yield
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)

    def _set_modes(self, pl_module: pl.LightningModule, stage: Stage, trained: set[nn.Parameter]) -> None:
        self._put_modes_back()
        fixed = {parameter for group in self.groups.values() for parameter in group} - trained
        self._frozen = frozen_modules(pl_module, self.groups, select(self.groups, stage.train), fixed)
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

    def _set_rates(self, trainer: pl.Trainer, run: StageRun) -> None:
        if not self._sets_rates(trainer):
            return
        chosen = select(self.groups, run.stage.train)
        ratios = rate_ratios(list(self.groups), run.stage.lr_mult, run.stage.lr_span)
        for group in trainer.optimizers[0].param_groups:
            peak = run.stage.lr if isinstance(run.stage.lr, float | int) else group["given_lr"]
            trains = group["layer_group"] in chosen
            group["peak_lr"] = float(peak) * ratios[group["layer_group"]] if trains else 0.0
            set_lr(group, group["peak_lr"])

    @contextmanager
    def around_stage_start(self, trainer: pl.Trainer, run: StageRun) -> Iterator[None]:
        """A random state that depends on the stage alone, for a range test; the epoch's own is put back after it."""
        with kept_rng():
            seed_all("stage", self._seed or 0, run.index, trainer.global_rank)
            self._put_frozen_in_eval_mode()
            yield

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes up for what came after the last batch of an epoch, where the checkpoint has that and no more.

        Lightning goes on in the next epoch, without the validation by which a stage with `until` is judged.
        """
        if self._loaded is not None and self._loaded["epoch_end_lost"]:
            with _back_in_the_epoch(trainer):
                self._announce(trainer, pl_module)
                _validate_at_epoch_end(trainer)
                self._end_epoch(trainer, pl_module, next_epoch=trainer.current_epoch + 1)
        elif trainer.current_epoch >= self.current_run(trainer).end_epoch:
            self._announce(trainer, pl_module)
            self._end_epoch(trainer, pl_module, next_epoch=trainer.current_epoch)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts a stage, and sets the random state of the epoch."""
        # the first epoch's order was drawn when its loader was made: seeding again would repeat those draws
        if self._seeded_epoch != trainer.current_epoch:
            self._seed_epoch(trainer, trainer.current_epoch)
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
            seed_all("batches", self._seed or 0, trainer.current_epoch, trainer.global_rank)
        elif self._loaded is not None and len(self._loaded["rng"]) == trainer.world_size:
            set_rng_state(self._loaded["rng"][trainer.global_rank])
        self._loaded = None

    def frozen_roots(self) -> list[nn.Module]:
        """The outermost modules that are frozen in the current stage."""
        return self._frozen

    def _put_frozen_in_eval_mode(self) -> None:
        for root in self._frozen:
            if root.training:
                root.eval()

    def _seed_epoch(self, trainer: pl.Trainer, epoch: int) -> None:
        seed_all("epoch", self._seed or 0, epoch, trainer.global_rank)

    def _finish_stage(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, asked_to: bool, next_epoch: int
    ) -> None:
        run = self.run
        if run is None:
            return
        broadcast_buffers(trainer)
        self._end(trainer, pl_module, run)
        self.journal.close_stage(trainer, run.stage.name, next_epoch - run.start_epoch, run.start_step)
        if run.index + 1 < len(self.stages):
            self._index, self._start_epoch, self._start_step = run.index + 1, next_epoch, trainer.global_step
            self._restaged = False
            trainer.fit_loop.max_epochs = next_epoch + plan_epochs(self.stages[self._index :])
        elif asked_to:
            self._over = True
            trainer.fit_loop.max_epochs = next_epoch

    # --- what there is to look at ----------------------------------------------------------------------------------

    def on_stage_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Sets the rates of the stage, and says what trains in it."""
        # not in `enter_stage`: on resume the optimizer's param groups, rates included, are loaded after that
        if self.run is not None and not (self.run.resumed and self._loaded is not None):
            self._set_rates(trainer, self.run)
        trained = select(self.groups, stage.train)
        count = sum(p.numel() for name in trained for p in self.groups[name].parameters() if p.requires_grad)
        epochs = f"{stage.num_epochs} epoch{'s' if stage.num_epochs > 1 else ''}"
        rank_zero_info(
            f"stage {self._index + 1}/{len(self.stages)} {stage.name!r}: trains {', '.join(trained)} "
            f"({count:,} parameters) for {'at most ' if stage.until else ''}{epochs}"
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the rates."""
        self.journal.note_rates(trainer, self._index, batch_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the validation metric."""
        self.journal.note_metric(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the table of the stages and writes `stages.csv` and `stages.png` beside the checkpoints."""
        run, stopped = self.run, not self._ended
        super().on_train_end(trainer, pl_module)
        if run is not None and stopped:
            self.journal.close_stage(trainer, run.stage.name, trainer.current_epoch - run.start_epoch, run.start_step)
        self.journal.write(trainer)

    def _log_plan(self, trainer: pl.Trainer) -> None:
        for logger in trainer.loggers:
            logger.log_hyperparams({f"stage_{index}": stage.name for index, stage in enumerate(self.stages)})

    def _show_stage_on_bar(self, trainer: pl.Trainer) -> None:
        bar = trainer.progress_bar_callback
        if bar is None or "get_metrics" in vars(bar):
            return
        metrics_of = bar.get_metrics

        def with_stage(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
            stage = {"stage": f"{self._index + 1}/{len(self.stages)} {self.stages[self._index].name}"}
            return {**stage, **metrics_of(trainer, pl_module)}

        bar.get_metrics = with_stage  # type: ignore[method-assign]

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The plan, where it stands, and the random state of every rank: primitives and tensors only."""
        if self._seed is None:
            return {}
        return {
            "plan": [asdict(stage) for stage in self.stages],
            "groups": {name: [n for n, _ in group.named_parameters()] for name, group in self.groups.items()},
            "index": self._index,
            "start_epoch": self._start_epoch,
            "start_step": self._start_step,
            "over": self._over,
            "seed": self._seed,
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
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if not state:
            raise MisconfigurationException(
                "the checkpoint was not written by a run with GradualUnfreeze, so its optimizer does not fit the "
                "stages; load its weights (`load_from_checkpoint`) and fit without ckpt_path"
            )
        fit_loop = checkpoint["loops"]["fit_loop"]
        _validate_from_the_start(fit_loop)
        lost = _epoch_end_lost(fit_loop)
        epochs = int(fit_loop["epoch_progress"]["current"]["processed"])
        self._loaded = {**state, "next_epoch": epochs + lost, "epoch_end_lost": lost}

    def _take_over(self, trainer: pl.Trainer, state: dict[str, Any]) -> None:
        ours = {name: [n for n, _ in group.named_parameters()] for name, group in self.groups.items()}
        if state["groups"] != ours:
            changed = sorted(name for name in {*ours, *state["groups"]} if ours.get(name) != state["groups"].get(name))
            raise MisconfigurationException(
                f"the checkpoint's layer groups differ from the module's in {changed}; resume with the same module"
            )
        plan = [asdict(stage) for stage in self.stages]
        index = state["index"]
        if plan != state["plan"]:
            difference = _difference(state["plan"], plan)
            if self.on_plan_change == "error":
                raise MisconfigurationException(
                    f"the checkpoint was written by another plan: {difference}; resume with the same plan, or allow "
                    "the change by GradualUnfreeze(on_plan_change='restage')"
                )
            current = state["plan"][index]["name"]
            names = [stage.name for stage in self.stages]
            if current not in names:
                raise MisconfigurationException(
                    f"cannot restage: the checkpoint stands in stage {current!r}, the new plan has {names}"
                )
            # a stage that was itself changed starts anew where it stands: other rates, another range test
            self._restaged = plan[names.index(current)] != state["plan"][index]
            index = names.index(current)
            rank_zero_info(f"the plan has changed ({difference}); going on in stage {current!r}")
        self._index, self._start_epoch, self._start_step = index, state["start_epoch"], state["start_step"]
        self._seed = state["seed"]
        self.journal.load_state_dict(state["journal"])
        trainer.fit_loop.max_epochs = self._start_epoch + plan_epochs(self.stages[index:])
        self._over = state["over"] and plan == state["plan"]
        if self._over:  # the last stage ended before its time
            trainer.fit_loop.max_epochs = state["next_epoch"]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves `requires_grad` as the last stage had it; train/eval modes and the progress bar as they were."""
        super().teardown(trainer, pl_module, stage)
        if trainer.progress_bar_callback is not None:
            vars(trainer.progress_bar_callback).pop("get_metrics", None)
        self._put_modes_back()
        self._entered, self._loaded = None, None


def _epoch_end_lost(fit_loop: dict[str, Any]) -> bool:
    """Whether a checkpoint was saved in `on_train_batch_end` of an epoch's last batch.

    Lightning takes such an epoch for finished. Read from the loop's state in the checkpoint, which has no public form;
    guarded by `test_resume__goes_on_as_if_never_stopped` (Lightning 2.6).
    """
    batches = fit_loop["epoch_loop.batch_progress"]
    saved_at_batch_end = batches["total"]["completed"] == batches["total"]["processed"] - 1
    return bool(saved_at_batch_end and batches["is_last_batch"])


def _validate_from_the_start(fit_loop: dict[str, Any]) -> None:
    """Has a validation done again that was interrupted between two batches (by SIGTERM), in the state of the loops.

    Lightning would take it for finished; one that was interrupted inside a batch it goes on with. No public form
    either; guarded by `test_sigterm__lightning_ends_the_run_and_it_goes_on_where_it_was` (Lightning 2.6).
    """
    epochs, validation = fit_loop["epoch_progress"]["total"], fit_loop["epoch_loop.val_loop.batch_progress"]
    done = validation["total"]
    interrupted = 0 < done["processed"] == done["started"] and not validation["is_last_batch"]
    if epochs["processed"] < epochs["started"] and interrupted:
        for counters in (done, validation["current"]):
            counters.update(ready=1, started=1, processed=0, completed=0)


@contextmanager
def _back_in_the_epoch(trainer: pl.Trainer) -> Iterator[None]:
    """The Trainer's counters as they were after the last batch of the epoch that it takes for finished.

    So `current_epoch` is right, and a checkpoint that is saved inside is resumed in the same way.
    """
    counters: Any = trainer.fit_loop.epoch_progress
    for counter in (counters.total, counters.current):
        counter.processed, counter.completed = counter.processed - 1, counter.completed - 1
    yield
    counters.increment_processed()
    counters.increment_completed()


def _validate_at_epoch_end(trainer: pl.Trainer) -> None:
    """Validates where the Trainer does so after an epoch's last batch.

    There is no public way to do that inside a fit; guarded, with the counters above, by
    `test_resume__makes_up_for_the_end_of_an_epoch_that_a_checkpoint_lacks` (Lightning 2.6).
    """
    every_epochs, every_batches = trainer.check_val_every_n_epoch or 0, trainer.val_check_batch or 0
    at_epoch_end = every_batches > 0 and trainer.num_training_batches % every_batches == 0
    due = at_epoch_end and every_epochs > 0 and (trainer.current_epoch + 1) % every_epochs == 0
    if not (trainer.enable_validation and due):
        return
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    with kept_rng():
        loop.run()
    trainer.training = True


def _expand_scheduler(scheduler: Any, num_before: int, parents: Sequence[int]) -> None:
    """Repeats a scheduler's per-group lists after param groups were split.

    torch's and timm's schedulers keep one entry per param group and have no public way to add one; guarded by
    `test_unfreeze__a_scheduler_that_does_not_fight_gives_the_same_rates` (torch 2.6 to 2.15).
    """
    for part in getattr(scheduler, "_schedulers", ()):  # of SequentialLR and ChainedScheduler
        _expand_scheduler(part, num_before, parents)
    for name in _SCHEDULERS_LISTS_PER_GROUP & vars(scheduler).keys():
        value = getattr(scheduler, name)
        if isinstance(value, list) and len(value) == num_before:
            setattr(scheduler, name, [value[parent] if parent < num_before else value[0] for parent in parents])


def _follow_first(
    after: Sequence[dict[str, Any]], first: dict[str, Any], num_before: int, parents: Sequence[int]
) -> None:
    """Gives param groups that were added the rates of the first one, and what a scheduler keeps in it."""
    for group, parent in zip(after, parents, strict=True):
        if parent == num_before:
            rates = {k: v for k, v in first.items() if k in ("lr", "momentum", "betas") or k not in group}
            group.update(rates)


def _difference(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> str:
    if [row["name"] for row in old] != [row["name"] for row in new]:
        return f"stages {[row['name'] for row in old]} -> {[row['name'] for row in new]}"
    changes = [
        f"{before['name']}.{key}: {before[key]!r} -> {after[key]!r}"
        for before, after in zip(old, new, strict=True)
        for key in after
        if before.get(key) != after[key]
    ]
    return ", ".join(changes)
