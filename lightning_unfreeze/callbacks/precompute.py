"""`PrecomputeFeatures`: the frozen part of the network runs once, the rest trains on what it gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_unfreeze.callbacks.base import StageCallback, StageRun, conductor
from lightning_unfreeze.features.batch_form import NoStoreError
from lightning_unfreeze.features.estimate import estimate
from lightning_unfreeze.features.fill import FeaturePass, NotFilledError, StoredData, together
from lightning_unfreeze.features.head_rows import NotLinearError, solve_on_stores, why_not_solved
from lightning_unfreeze.features.host import Host
from lightning_unfreeze.features.layout import StoreDtype
from lightning_unfreeze.features.opened import OpenStores
from lightning_unfreeze.features.prefix import FrozenPrefix
from lightning_unfreeze.features.resident import PLACES, resident
from lightning_unfreeze.features.serve import FeatureDataset, StoredBatch, ViewBatches, feature_loader
from lightning_unfreeze.features.shortcut import check_step, find_shortcut
from lightning_unfreeze.features.store import prune
from lightning_unfreeze.features.viewed import ViewedData, view_data
from lightning_unfreeze.inside_lightning.clashes import refuse_scheduler_by_step
from lightning_unfreeze.inside_lightning.host import host_of, views_of
from lightning_unfreeze.inside_lightning.loaders import answer_for_loaders, ask_for_loaders_again, load_validation
from lightning_unfreeze.inside_lightning.transfer import (
    hooks_fingerprint,
    pass_transfer_hooks,
    use_transfer_hooks,
    who_changes_batches,
    who_may_change_batches,
)
from lightning_unfreeze.layers.modes import in_eval_mode
from lightning_unfreeze.seeding import kept_rng
from lightning_unfreeze.stages.plan import Stage

_PRECISION = {"bfloat16": "about 3 significant digits", "float16": "3 to 4 significant digits, at most 65504"}


class PrecomputeFeatures(StageCallback):
    """Serves stages with `precompute=True` from stored activations of the frozen part of the network.

    The network is never cut: its own `forward` and the user's `training_step` run unmodified, with the features where
    the images were (see `features.prefix`). The shortcut is checked against the plain step on a real batch when a stage
    starts, bitwise for output and gradients; where it does not hold, the stage trains as usual and a warning names the
    module and the reason. Stores are keyed by what the features depend on: weights and buffers of the frozen part,
    the files or samples of the dataset, transforms, views, precision and version; see `features.store`. When a later
    stage's boundary lies behind a stored one, its features are made from that store, not from the images.

    Sole writer of the train and validation loaders of such a stage, and of the shortcut past the frozen part. Without
    `GradualUnfreeze` the whole fit is one stage, and whatever has `requires_grad=False` and is in eval mode at its
    start is the frozen part. Evaluation outside of `fit` never reads a store.

    Args:
        store_dir: Folder of the stores; None for `feature_store` under the Trainer's `default_root_dir`.
        num_views: Views per training image. View 0 has the evaluation transform, the others are random draws of the
            training transform; epoch e of a stage reads view e modulo `num_views`. With 1 augmentation has no effect.
        dtype: Precision on disk; `"auto"` keeps that of the forward. bfloat16 halves the size and keeps 3 digits.
        policy: `"auto"` stores only if that is estimated to be quicker than computing anew in each epoch.
        cached_batch_size: Training batch size of stored stages, None for the loader's own.
        eval_transform: Transform of view 0; None takes that of the validation data.
        data_fingerprint: Your own word for what the data is, in place of a look at files and samples.
        max_bytes: Stores that were not used for longest are removed when all of them hold more.
        verify: On re-use, check `"sampled"` or `"full"` checksums. A few rows are computed anew in any case.
        seed: Seed of the views, and of the order where the user's loader has none.
        place: Where rows are read from: `"device"`, `"pinned"` (memory of the host, copied ahead of the step), `"disk"`
            or `"auto"`, the first of these with room (on a CPU memory up to 256 MiB, then the disk).
        memory_share: Share of the free memory that they may take, in (0, 1].

    Raises:
        ValueError: For an impossible value.
    """

    order: ClassVar[int] = 10

    def __init__(
        self,
        store_dir: str | Path | None = None,
        num_views: int = 1,
        dtype: StoreDtype = "auto",
        policy: Literal["auto", "always"] = "auto",
        cached_batch_size: int | None = None,
        eval_transform: Callable[[Any], Any] | None = None,
        data_fingerprint: str | None = None,
        max_bytes: int = 50 * 2**30,
        verify: Literal["sampled", "full"] = "sampled",
        seed: int = 0,
        place: Literal["auto", "device", "pinned", "disk"] = "auto",
        memory_share: float = 0.5,
    ) -> None:
        for name, value, known in (
            ("dtype", dtype, get_args(StoreDtype)),
            ("policy", policy, ("auto", "always")),
            ("verify", verify, ("sampled", "full")),
            ("place", place, ("auto", *PLACES)),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {list(known)}")
        sizes = {"num_views": num_views, "cached_batch_size": cached_batch_size or 1, "max_bytes": max_bytes}
        for name, number in sizes.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name}={number!r} has to be a whole number of at least 1")
        if not 0 < memory_share <= 1:
            raise ValueError(f"memory_share={memory_share!r} has to lie in (0, 1]")
        self.place, self.memory_share = place, memory_share
        self.store_dir = None if store_dir is None else Path(store_dir)
        self.num_views, self.dtype, self.policy = num_views, dtype, policy
        self.cached_batch_size, self.eval_transform = cached_batch_size, eval_transform
        self.data_fingerprint, self.max_bytes, self.verify, self.seed = data_fingerprint, max_bytes, verify, seed
        self._stores = OpenStores()
        self._source: FeatureDataset | ViewBatches | None = None
        self._stage_index: int | None = None
        self._looked_ahead = False
        self._decided: dict[str, Literal["features", "views", "images"]] = {}
        self._give_back: Callable[[], None] | None = None  # the requests for loaders

    # --- the request for a loader ----------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Asks to be asked for the loaders; says what a lower precision costs."""
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._decided, self._looked_ahead = {}, False
        if self.dtype in _PRECISION:
            rank_zero_info(f"features are stored as {self.dtype}: {_PRECISION[self.dtype]}, half the size of float32")
        self._give_back = answer_for_loaders(
            trainer, partial(self.loader_for, trainer, "train"), partial(self.loader_for, trainer, "val")
        )

    def loader_for(self, trainer: pl.Trainer, split: Literal["train", "val"], make: Callable[[], Any]) -> Any:
        """The loader of the coming stage: of stored batches if the stage asks for it and it can be done."""
        # `configure_optimizers` may ask before anything is set up; so may a tool that tries steps without callbacks
        if trainer.sanity_checking or self not in trainer.callbacks or not conductor(trainer).ready:  # type: ignore[attr-defined]
            return make()
        run = conductor(trainer).enter_stage(trainer)
        if self._stage_index != run.index:
            self._leave_stage()
            self._stage_index = run.index
        loader, name, host = make(), run.stage.name, host_of(trainer)
        if split == "train":
            self._look_ahead(trainer, run, loader)
            if run.stage.solve == "auto" and (reason := why_not_solved(host, _head(trainer, run.stage))):
                run = self._settle(trainer, run, reason)
        if self._is_left_alone(trainer, run, split):
            return loader
        data: ViewedData | None = None
        stored: StoredData | None = None
        try:
            # the loaders are asked for before the frozen modules are put in eval mode for training
            with self._stores.set_aside(), in_eval_mode(*conductor(trainer).frozen_roots()):
                data = together(host, lambda: self._viewed_data(trainer, host, run.stage, split, loader))
                if self._decided.get(name) != "views":
                    stored = self._stored_data(trainer, host, run, data)
        except NoStoreError as reason:
            if run.stage.solve is True and split == "train":
                raise _cannot_solve(run.stage, reason) from None
            data = data if isinstance(reason, NotFilledError) and split == "train" else None
            rank_zero_warn(f"stage {name!r} reads its {split} images as usual, without stored features: {reason}")
        if split == "train":
            self._decided[name] = "features" if stored is not None else "images" if data is None else "views"
            if run.stage.solve == "auto":
                head, no_store = _head(trainer, run.stage), "its features are not stored"
                run = self._settle(trainer, run, why_not_solved(host, head, stored) if stored else no_store)
        if stored is None and (data is None or split == "val"):
            return loader
        source: FeatureDataset | ViewBatches
        if stored is not None:
            self._stores[split] = stored
            stored.prefix.suspects = who_may_change_batches(_owners(trainer))
            # each rank for itself, since they read the same
            held, said = resident(stored.store, host.device, self.place, stored.data.form.text_names, self.memory_share)
            if said:
                rank_zero_info(said)
            source = FeatureDataset(held, stored.data.form, stored.prefix)
            pass_transfer_hooks(trainer.lightning_module, StoredBatch)
        else:  # the same views in the same order: a store is a matter of speed alone
            source = ViewBatches(loader, data.views, self.seed)  # type: ignore[union-attr]
        if split == "train":
            self._source = source
            self._choose_view(trainer, run)
        return feature_loader(loader, source, self.cached_batch_size if split == "train" else None, self.seed)

    def _is_left_alone(self, trainer: pl.Trainer, run: StageRun, split: Literal["train", "val"]) -> bool:
        """Whether a stage reads the user's own loader, whatever could be stored."""
        if run.planned and not run.stage.precompute:
            return True
        if split == "train":  # a resumed run goes on as it began, whatever a disk says today
            return self._decided.get(run.stage.name) == "images"
        # else the pass would read images that are never looked at
        whole = isinstance(trainer.limit_val_batches, float) and trainer.limit_val_batches >= 1
        return "train" not in self._stores or not whole

    def _settle(self, trainer: pl.Trainer, run: StageRun, reason: str) -> StageRun:
        """Decides whether a stage with `solve="auto"` solves its head, or trains it for a reason, which is said."""
        if reason:
            rank_zero_info(f"stage {run.stage.name!r}: the head is trained, not solved: {reason}")
        return conductor(trainer).settle(trainer, solved=not reason)

    def _stored_data(self, trainer: pl.Trainer, host: Host, run: StageRun, data: ViewedData) -> StoredData | None:
        """The store of the data, filled if need be; None if it would not pay.

        Raises:
            NoStoreError: If there can be none, on all ranks alike.
        """
        reason, owners, root = "", _owners(trainer), self._root(trainer)
        with host.aside(), torch.enable_grad():
            if data.name == "train":
                prefix, reason = _shortcut(trainer, host, data, owners, root / "searches.pt")
            else:
                prefix = self._stores["train"].prefix
                host.network.eval()
                together(host, lambda: check_step(host, prefix, data, training=False))
        work = together(host, lambda: FeaturePass(host, data, prefix, root, self.dtype, self.verify))
        stored, problem = work.open()
        if problem:
            rank_zero_warn(f"stored features are computed anew: {problem}")
        if stored is None:
            earlier = self._stores.before(work)
            if data.name == "train" and not self._pays(trainer, run, work, earlier):
                return None
            stored = work.fill(earlier)
            rank_zero_info(work.said(earlier))
            if trainer.local_rank == 0:
                prune(root, self.max_bytes, keep=[stored.store.directory, *self._stores.directories()])
        if reason:
            rank_zero_info(f"features are taken behind {prefix.boundary!r}, since {reason}")
        return stored

    def _look_ahead(self, trainer: pl.Trainer, run: StageRun, loader: Any) -> None:
        """Says, once and before anything trains, which later stages can have no store: what the loaders alone tell."""
        later = [] if self._looked_ahead else [stage for stage in run.later if stage.precompute]
        self._looked_ahead = True
        for stage in later:
            with _said_if_it_reads_images(stage):
                together(host_of(trainer), partial(self._views, trainer, stage, "train", loader))

    def _views(self, trainer: pl.Trainer, stage: Stage, split: Literal["train", "val"], loader: Any) -> list[Any]:
        """The dataset of each view, if they can be stored; no sample is read."""
        # views beyond the number of epochs would never be read
        num_views = self.num_views if stage.solve else min(self.num_views, stage.num_epochs)
        return views_of(trainer, split, loader, num_views, self.eval_transform)

    def _viewed_data(
        self, trainer: pl.Trainer, host: Host, stage: Stage, split: Literal["train", "val"], loader: Any
    ) -> ViewedData:
        views, feeding = self._views(trainer, stage, split, loader), hooks_fingerprint(trainer)
        return view_data(host, split, loader, views, self.seed, self.data_fingerprint, feeding)

    def _root(self, trainer: pl.Trainer) -> Path:
        root = self.store_dir or Path(trainer.default_root_dir) / "feature_store"
        # nodes may share the folder or not: each keeps stores of its own, so that none waits for another's lock
        return root / f"node_{trainer.node_rank}" if trainer.num_nodes > 1 else root

    def _pays(self, trainer: pl.Trainer, run: StageRun, work: FeaturePass, earlier: StoredData | None) -> bool:
        """Whether the pass and the epochs on features take less than the epochs on images."""
        # what the clock says must not change the training: images cannot be read in these ways without a store
        asked = self.policy == "always" or run.stage.solve or self.cached_batch_size is not None or work.data.augmented
        if asked or self._decided.get(run.stage.name) == "features":
            return True
        found = estimate(work, earlier, run.stage.num_epochs, trainer.limit_train_batches or 1.0)
        pays = bool(trainer.strategy.broadcast(found.stored_seconds < found.plain_seconds))
        rank_zero_info(f"stage {run.stage.name!r}: {found}: {'stored' if pays else 'not stored'}")
        return pays

    # --- while the stage runs --------------------------------------------------------------------------------------

    def _choose_view(self, trainer: pl.Trainer, run: StageRun) -> None:
        if self._source is not None:
            self._source.view = (trainer.current_epoch - run.start_epoch) % self._source.num_views

    def preflight(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stages: Sequence[Stage]) -> None:
        """Refuses to solve a head that is not linear; says what will read images where no fit would say it."""
        for stage in stages:
            if stage.solve is True and (reason := why_not_solved(host_of(trainer), _head(trainer, stage))):
                raise MisconfigurationException(f"stage {stage.name!r}, solve=True: {reason}")
        stored = [stage for stage in stages if stage.precompute]
        if stored and self._give_back is None:  # `plan` and `fast_dev_run`, which store nothing
            self._try_shortcuts(trainer, stored)

    def _try_shortcuts(self, trainer: pl.Trainer, stages: Sequence[Stage]) -> None:
        """Says of each stage what a fit would, where it can have no store; a batch is read, and nothing is written."""
        leading, host = conductor(trainer), host_of(trainer)
        run, owners = leading.current_run(trainer), _owners(trainer)
        with kept_rng():
            trainer.fit_loop.setup_data()
            for stage in stages:
                leading.make_ready(trainer, stage)
                look = partial(self._viewed_data, trainer, host, stage, "train", trainer.train_dataloader)
                with _said_if_it_reads_images(stage), in_eval_mode(*leading.frozen_roots()):
                    data = together(host, look)
                    with host.aside(), torch.enable_grad():
                        _shortcut(trainer, host, data, owners)
            leading.make_ready(trainer, run.stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Has the loaders asked for again, if `configure_optimizers` asked for them before there was a stage.

        Raises:
            MisconfigurationException: For a scheduler that counts steps, beside other steps than it was made for.
        """
        if self.cached_batch_size is not None:
            refuse_scheduler_by_step(trainer, f"cached_batch_size={self.cached_batch_size}")
        if self._give_back is not None:
            ask_for_loaders_again(trainer)

    def on_stage_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Solves the head of a stage that asks for it, if hooks left the frozen part as its features were stored."""
        self._check_frozen_part(stage)
        if stage.solve is True and self.run is not None and not self.run.resumed and "train" in self._stores:
            load_validation(trainer)  # its store, where it has one, chooses the ridge
            try:
                said = solve_on_stores(host_of(trainer), _head(trainer, stage), self._stores)
            except (NoStoreError, NotLinearError) as reason:
                raise MisconfigurationException(f"stage {stage.name!r}, solve=True: {reason}") from None
            rank_zero_info(f"stage {stage.name!r}: {said}")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Chooses the view of the epoch."""
        self._choose_view(trainer, conductor(trainer).current_run(trainer))

    def around_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any
    ) -> AbstractContextManager[Any]:
        """The shortcut, for a step outside of the Trainer's loop."""
        return self._stores["train"].prefix.installed() if "train" in self._stores else nullcontext()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Opens the shortcut, for the step and its backward."""
        self._stores.open_for("train", batch)

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Closes the shortcut."""
        self._stores.close("train")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Opens the shortcut, for stored validation batches."""
        if not trainer.sanity_checking:
            self._stores.open_for("val", batch)

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Closes the shortcut."""
        self._stores.close("val")

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Has the validation loader asked for again: the sanity check ran on images."""
        run = conductor(trainer).current_run(trainer)
        if self._give_back is not None and (run.stage.precompute or not run.planned):
            ask_for_loaders_again(trainer)

    def on_stage_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Gives the loaders back, and has those of the next stage asked for."""
        follows = self.run is not None and any(following.precompute for following in self.run.later[:1])
        if self._give_back is not None and (self._source is not None or follows):
            ask_for_loaders_again(trainer)
        self._check_frozen_part(stage)
        if stage.solve is True:  # its rates are 0, and the moments that its steps left are of no later use
            for parameter in _head(trainer, stage):
                trainer.optimizers[0].state.pop(parameter, None)
        self._leave_stage()

    def state_dict(self) -> dict[str, Any]:
        """Which stages trained on stored features so far: an estimate that another machine may not repeat."""
        return {"decided": dict(self._decided)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what was decided."""
        self._decided = dict(state_dict["decided"])

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves nothing on the network."""
        self._detach(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves nothing on the network and on the Trainer."""
        self._detach(pl_module)

    def _check_frozen_part(self, stage: Stage) -> None:
        if reason := self._stores.stale():
            raise MisconfigurationException(f"stage {stage.name!r}: {reason}")

    def _leave_stage(self) -> None:
        self._stores.end_stage()
        self._source, self._stage_index = None, None

    def _detach(self, pl_module: pl.LightningModule) -> None:
        self._leave_stage()
        self._stores.earlier = []
        use_transfer_hooks(pl_module)
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()


def _owners(trainer: pl.Trainer) -> list[Any]:
    """Whose hooks are called; not known `aside`, where there are no callbacks."""
    return [*trainer.callbacks, trainer.lightning_module]  # type: ignore[attr-defined]


def _shortcut(
    trainer: pl.Trainer, host: Host, data: ViewedData, owners: list[Any], searches: Path | None = None
) -> tuple[FrozenPrefix, str]:
    """That of the training step, and why it does not lie deeper; called `aside`.

    Raises:
        NoStoreError: If there is none, on all ranks alike.
    """

    def find() -> tuple[FrozenPrefix, str]:
        if writer := who_changes_batches(trainer, owners, data.fed, data.holds_same_images):
            raise NoStoreError(f"{writer} changes the batch, which is to be done to images, not to features")
        return find_shortcut(host, data, searches)

    return together(host, find)


def _head(trainer: pl.Trainer, stage: Stage) -> set[nn.Parameter]:
    """What a stage that may solve its head would train instead."""
    leading: Any = conductor(trainer)  # a plan's: without one no stage asks for that
    parameters: set[nn.Parameter] = leading.what_trains.parameters(stage)
    return parameters


def _cannot_solve(stage: Stage, reason: NoStoreError) -> MisconfigurationException:
    return MisconfigurationException(
        f"stage {stage.name!r}: solve=True needs stored features, and there can be none: {reason}"
    )


@contextmanager
def _said_if_it_reads_images(stage: Stage) -> Iterator[None]:
    """What looks at a stage before it starts; the random state is put back, and a reason against a store is said."""
    try:
        with kept_rng():  # a data module may draw from it when it is asked for its validation data
            yield
    except NoStoreError as reason:
        if stage.solve is True:
            raise _cannot_solve(stage, reason) from None
        rank_zero_warn(f"stage {stage.name!r} will read its images as usual, without stored features: {reason}")
