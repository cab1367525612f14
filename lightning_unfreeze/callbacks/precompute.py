"""`PrecomputeFeatures`: the frozen part of the network runs once, the rest trains on what it gave."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from torchmetrics import Metric

from lightning_unfreeze.callbacks.base import StageCallback, StageRun, conductor
from lightning_unfreeze.data.datasets import transform_of, with_transform
from lightning_unfreeze.features.batch_form import NoStoreError
from lightning_unfreeze.features.fill import FeaturePass, StoredData, together
from lightning_unfreeze.features.head_rows import NotLinearError, head_rows, linear_head
from lightning_unfreeze.features.key import fingerprint_of, transform_fingerprint
from lightning_unfreeze.features.layout import StoreDtype
from lightning_unfreeze.features.prefix import FrozenPrefix
from lightning_unfreeze.features.resident import PLACES, ResidentStore, choose_place, resident
from lightning_unfreeze.features.serve import (
    FeatureDataset,
    StoredBatch,
    ViewBatches,
    ViewedData,
    check_loader,
    evaluation_transform,
    feature_loader,
    is_own_batching,
    pass_size,
    plain_dataset,
    probe_batch,
    probe_feed,
)
from lightning_unfreeze.features.shortcut import Host, check_step, find_shortcut, seconds, step_seconds
from lightning_unfreeze.features.solve import HeadRows, solve_head
from lightning_unfreeze.features.store import FeatureStore, prune
from lightning_unfreeze.inside_lightning.distributed import gather_objects
from lightning_unfreeze.inside_lightning.loaders import ask_for_loaders_again, load_validation
from lightning_unfreeze.inside_lightning.sandbox import in_eval_mode, sandbox
from lightning_unfreeze.inside_lightning.steps import StepName, batch_on_device, step_output, training_loss
from lightning_unfreeze.inside_lightning.transfer import (
    mode_of,
    pass_transfer_hooks,
    transfer_hooks,
    use_transfer_hooks,
)
from lightning_unfreeze.layers.kept import kept
from lightning_unfreeze.reporting import progress_bar
from lightning_unfreeze.seeding import kept_rng, keyed_rng
from lightning_unfreeze.stages.plan import Stage

_PROBE_IMAGES = 8
_SOLVED_ROWS = 512  # rows of the store that go to the head at once
_DRAWS = 4
_CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "policy": ("auto", "always"),
    "verify": ("sampled", "full"),
    "place": ("auto", *PLACES),
}
_PRECISION = {"bfloat16": "about 3 significant digits", "float16": "3 to 4 significant digits, at most 65504"}


class PrecomputeFeatures(StageCallback):
    """Serves stages with `precompute=True` from stored activations of the frozen part of the network.

    The network is never cut: its own `forward` and the user's `training_step` run unmodified, with the features where
    the images were (see `frozen_prefix`). The shortcut is checked against the plain step on a real batch when a stage
    starts, bitwise for output and gradients; where it does not hold, the stage trains as usual and a warning names the
    module and the reason. Stores are keyed by what the features depend on: weights and buffers of the frozen part,
    the files or samples of the dataset, transforms, views, precision and version; see `feature_store`. When a later
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
        for name, value in (("dtype", dtype), ("policy", policy), ("verify", verify), ("place", place)):
            if value not in _CHOICES[name]:
                raise ValueError(f"{name}={value!r} is not one of {list(_CHOICES[name])}")
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
        self._stored: dict[str, StoredData] = {}
        self._source: FeatureDataset | ViewBatches | None = None
        self._earlier: list[StoredData] = []
        self._stage_index: int | None = None
        self._looked_ahead = False
        self._decided: dict[str, Literal["features", "views", "images"]] = {}
        self._sources: list[tuple[Any, _DataLoaderSource]] = []

    # --- the request for a loader ----------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Asks to be asked for the loaders; says what a lower precision costs."""
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._decided, self._looked_ahead = {}, False
        if self.dtype in _PRECISION:
            rank_zero_info(f"features are stored as {self.dtype}: {_PRECISION[self.dtype]}, half the size of float32")
        # Lightning asks a private source for its loaders, and there is no public way to answer in its place; guarded by
        # `test_precompute__lightning_asks_for_the_loaders_of_each_stage` (Lightning 2.6)
        loops: dict[Literal["train", "val"], Any] = {"train": trainer.fit_loop}
        loops["val"] = trainer.fit_loop.epoch_loop.val_loop
        for split, loop in loops.items():
            self._sources.append((loop, loop._data_source))
            loop._data_source = _StageSource(loop._data_source, self, trainer, split)

    def loader_for(self, trainer: pl.Trainer, split: Literal["train", "val"], make: Callable[[], Any]) -> Any:
        """The loader of the coming stage: of stored batches if the stage asks for it and it can be done."""
        # `configure_optimizers` may ask before anything is set up; so may a tool that tries steps without callbacks
        if trainer.sanity_checking or self not in trainer.callbacks or not conductor(trainer).ready:  # type: ignore[attr-defined]
            return make()
        head = conductor(trainer)
        run = head.enter_stage(trainer)
        if self._stage_index != run.index:
            self._leave_stage()
            self._stage_index = run.index
        loader, name = make(), run.stage.name
        if split == "train":
            self._look_ahead(trainer, run, loader)
        if (run.planned and not run.stage.precompute) or (split == "val" and "train" not in self._stored):
            return loader
        if split == "val" and (isinstance(trainer.limit_val_batches, int) or trainer.limit_val_batches < 1):
            return loader  # the pass would read images that are never looked at
        if split == "train" and self._decided.get(name) == "images":
            return loader  # a resumed run goes on as it began, whatever a disk says today
        host, frozen, data, stored = _host(trainer), head.frozen_roots(), None, None
        try:
            # the loaders are asked for before the frozen modules are put in eval mode for training
            with self._shortcuts_removed(), in_eval_mode(*frozen):
                data = together(host, lambda: self._viewed_data(trainer, host, run, split, loader))
                if self._decided.get(name) != "views":
                    stored = self._stored_data(trainer, host, run, data)
        except NoStoreError as reason:
            if run.stage.solve and split == "train":
                raise _cannot_solve(run.stage, reason) from None
            prefix_found = isinstance(reason, _NotFilledError)
            data = data if prefix_found and split == "train" else None
            rank_zero_warn(f"stage {name!r} reads its {split} images as usual, without stored features: {reason}")
        if split == "train":
            self._decided[name] = "features" if stored is not None else "images" if data is None else "views"
        if stored is None and (data is None or split == "val"):
            return loader
        source: FeatureDataset | ViewBatches
        if stored is not None:
            self._stored[split] = stored
            source = FeatureDataset(self._in_memory(host, stored), stored.data.form, stored.prefix)
            pass_transfer_hooks(trainer.lightning_module, StoredBatch)
        else:  # the same views in the same order: a store is a matter of speed alone
            source = ViewBatches(loader, data.views, self.seed)  # type: ignore[union-attr]
        if split == "train":
            self._source = source
            self._choose_view(trainer, run)
        return feature_loader(loader, source, self.cached_batch_size if split == "train" else None, self.seed)

    def _in_memory(self, host: Host, stored: StoredData) -> FeatureStore | ResidentStore:
        """The store, or its rows in memory where there is room; each rank for itself, since they read the same."""
        place = self.place
        if place == "auto":
            place = choose_place(stored.store.layout.num_bytes, host.device, self.memory_share)
        held, said = resident(stored.store, host.device, place, on_host=stored.data.form.text_names)
        if said:
            rank_zero_info(said)
        return held

    def _stored_data(self, trainer: pl.Trainer, host: Host, run: StageRun, data: ViewedData) -> StoredData | None:
        """The store of the data, filled if need be; None if it would not pay.

        Raises:
            NoStoreError: If there can be none, on all ranks alike.
        """
        reason, owners = "", _owners(trainer)
        with host.aside(), torch.enable_grad():
            if data.name == "train":
                prefix, reason = _shortcut(trainer, host, data, owners)
            else:
                prefix = self._stored["train"].prefix
                host.network.eval()
                together(host, lambda: check_step(host, prefix, data, training=False))
        root = self._root(trainer)
        work = together(host, lambda: FeaturePass(host, data, prefix, root, self.dtype, self.verify))
        _same_everywhere(host, prefix)
        stored, problem = work.open()
        if problem:
            rank_zero_warn(f"stored features are computed anew: {problem}")
        if stored is None:
            earlier = next((one for one in self._earlier if work.follows(one)), None)
            if data.name == "train" and not self._pays(trainer, run, work, earlier):
                return None
            try:
                stored = self._filled(trainer, work, earlier)
            except NoStoreError as error:
                raise _NotFilledError(str(error)) from error
        if reason:
            rank_zero_info(f"features are taken behind {prefix.boundary!r}, since {reason}")
        return stored

    def _look_ahead(self, trainer: pl.Trainer, run: StageRun, loader: Any) -> None:
        """Says, once and before anything trains, which later stages can have no store: what the loaders alone tell."""
        if self._looked_ahead:
            return
        self._looked_ahead, host = True, _host(trainer)
        for coming in (replace(run, stage=stage) for stage in run.later if stage.precompute):
            look = partial(self._checked_views, trainer, coming, "train", loader)
            try:
                with kept_rng():  # a data module may draw from it when it is asked for its validation data
                    together(host, look)
            except NoStoreError as reason:
                _say_it_will_read_images(coming.stage, reason)

    def _checked_views(
        self, trainer: pl.Trainer, run: StageRun, split: Literal["train", "val"], loader: Any
    ) -> tuple[DataLoader[Any], list[Any]]:
        """The loader and the dataset of each view, if they can be stored; no sample is read."""
        loader = check_loader(loader)
        if trainer.overfit_batches:  # type: ignore[attr-defined]
            raise NoStoreError("overfit_batches reads a few images only")
        if split == "val" and (is_own_batching(loader) or not isinstance(loader.sampler, SequentialSampler)):
            own = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
            own = loader.sampler if type(own) is BatchSampler else own
            raise NoStoreError(f"the validation loader has a sampler of its own ({type(own).__name__})")
        return loader, self._views(trainer, run, split, loader)

    def _viewed_data(
        self, trainer: pl.Trainer, host: Host, run: StageRun, split: Literal["train", "val"], loader: Any
    ) -> ViewedData:
        loader, views = self._checked_views(trainer, run, split, loader)
        raw, raw_form = probe_batch(loader, views[0], _PROBE_IMAGES)
        with host.aside():
            fed, form, augmented = probe_feed(loader, views[0], _PROBE_IMAGES, host.feed)
        feeding = fingerprint_of(hooks=[transform_fingerprint(hook) for hook in transfer_hooks(trainer)])
        return ViewedData(
            split, loader, views, raw, fed, form, raw_form, augmented, self.seed, self.data_fingerprint, feeding
        )

    def _views(self, trainer: pl.Trainer, run: StageRun, split: str, loader: DataLoader[Any]) -> list[Any]:
        """The dataset of each view that will be read, view 0 first."""
        dataset = plain_dataset(loader)
        if split == "val":
            return [dataset]
        transform = self.eval_transform
        if transform is None:
            source: Any = trainer.fit_loop.epoch_loop.val_loop._data_source
            source = getattr(source, "inner", source)
            val = source.dataloader() if source.instance is not None and source.is_defined() else None
            transform = evaluation_transform(dataset, getattr(val, "dataset", None))
        elif transform_of(dataset) is None:
            raise NoStoreError(f"{type(dataset).__name__} has no `transform` for eval_transform to replace")
        plain = dataset if transform is None else with_transform(dataset, transform)
        # views beyond the number of epochs would never be read
        num_views = self.num_views if run.stage.solve else min(self.num_views, run.stage.num_epochs)
        return [plain, *[dataset] * (num_views - 1)]

    def _root(self, trainer: pl.Trainer) -> Path:
        root = self.store_dir or Path(trainer.default_root_dir) / "feature_store"
        # nodes may share the folder or not: each keeps stores of its own, so that none waits for another's lock
        return root / f"node_{trainer.node_rank}" if trainer.num_nodes > 1 else root

    def _filled(self, trainer: pl.Trainer, work: FeaturePass, earlier: StoredData | None) -> StoredData:
        start = time.monotonic()
        stored = work.fill(earlier)
        duration = max(time.monotonic() - start, 1e-9)
        images = work.layout.num_rows * work.layout.num_views
        rank_zero_info(
            f"features of {images} {work.data.name} images {'from the store before' if earlier else 'computed'} behind "
            f"{work.prefix.boundary!r}: {duration:.1f} s, {images / duration:.0f} images/s, "
            f"{work.layout.num_bytes / 2**20:.1f} MiB in {work.directory}"
        )
        if trainer.local_rank == 0:
            used = [one.store.directory for one in [stored, *self._stored.values(), *self._earlier]]
            prune(work.directory.parent, self.max_bytes, keep=used)
        return stored

    def _pays(self, trainer: pl.Trainer, run: StageRun, work: FeaturePass, earlier: StoredData | None) -> bool:
        """Whether the pass and the epochs on features take less than the epochs on images."""
        # what the clock says must not change the training: images cannot be read in these ways without a store
        asked = self.policy == "always" or run.stage.solve or self.cached_batch_size is not None or work.data.augmented
        if asked or self._decided.get(run.stage.name) == "features":
            return True
        layout, loader, host = work.layout, work.data.loader, work.host
        images = ViewBatches(loader, work.data.views, self.seed)
        with host.aside(), torch.enable_grad():
            plain_seconds, stored_seconds = together(host, lambda: step_seconds(host, work.prefix, work.data))
        probed = min(_PROBE_IMAGES, layout.num_rows)
        reading = seconds(lambda: images[list(range(probed))], host.device) / probed
        # worker processes read while the device computes; without them one waits for the other
        waiting = max(reading / loader.num_workers - plain_seconds, 0.0) if loader.num_workers else reading
        limit = trainer.limit_train_batches or 1.0
        num_read = limit * layout.num_rows if isinstance(limit, float) else limit * pass_size(loader)
        num_read = run.stage.num_epochs * min(num_read, layout.num_rows)
        passed = together(host, lambda: work.seconds_per_image(earlier)) * layout.num_rows * layout.num_views
        with_store, without = passed + num_read * stored_seconds, num_read * (waiting + plain_seconds)
        pays = bool(trainer.strategy.broadcast(with_store < without))
        rank_zero_info(
            f"stage {run.stage.name!r}: {num_read:.0f} images in {run.stage.num_epochs} epochs are estimated at "
            f"{with_store:.3g} s with stored features (the pass {passed:.3g} s, {layout.num_bytes / 2**20:.1f} MiB) "
            f"and {without:.3g} s without: {'stored' if pays else 'not stored'}"
        )
        return pays

    # --- while the stage runs --------------------------------------------------------------------------------------

    def _choose_view(self, trainer: pl.Trainer, run: StageRun) -> None:
        if isinstance(self._source, FeatureDataset):
            self._source.view = (trainer.current_epoch - run.start_epoch) % self._source.store.layout.num_views
        elif self._source is not None:
            self._source.view = (trainer.current_epoch - run.start_epoch) % len(self._source.views)

    def preflight(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stages: Sequence[Stage]) -> None:
        """Refuses to solve a head that is not linear; says what will read images where no fit would say it."""
        for stage in stages:
            if stage.solve:
                leading: Any = conductor(trainer)  # a plan's, which has layer groups
                *_, head = leading.groups.values()
                try:
                    linear_head(pl_module, head.parameters())
                except NotLinearError as reason:
                    raise MisconfigurationException(f"stage {stage.name!r}, solve=True: {reason}") from None
        stored = [stage for stage in stages if stage.precompute]
        if stored and not self._sources:  # `plan` and `fast_dev_run`, which store nothing
            self._try_shortcuts(trainer, stored)

    def _try_shortcuts(self, trainer: pl.Trainer, stages: Sequence[Stage]) -> None:
        """Says of each stage what a fit would, where it can have no store; a batch is read, and nothing is written."""
        leading, host = conductor(trainer), _host(trainer)
        run, owners = leading.current_run(trainer), _owners(trainer)
        with kept_rng():
            trainer.fit_loop.setup_data()
            for stage in stages:
                leading.make_ready(trainer, stage)
                coming = replace(run, stage=stage)
                look = partial(self._viewed_data, trainer, host, coming, "train", trainer.train_dataloader)
                try:
                    with in_eval_mode(*leading.frozen_roots()):
                        data = together(host, look)
                        with host.aside(), torch.enable_grad():
                            _shortcut(trainer, host, data, owners)
                except NoStoreError as reason:
                    _say_it_will_read_images(stage, reason)
            leading.make_ready(trainer, run.stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Has the loaders asked for again, if `configure_optimizers` asked for them before there was a stage.

        Raises:
            MisconfigurationException: For a scheduler that counts steps, beside other steps than it was made for.
        """
        by_step = [config.scheduler for config in trainer.lr_scheduler_configs if config.interval == "step"]
        if by_step and self.cached_batch_size is not None:
            raise MisconfigurationException(
                f"cached_batch_size={self.cached_batch_size} changes the number of steps of an epoch, and "
                f"`configure_optimizers` returned a {type(by_step[0]).__name__} that counts steps; leave "
                'cached_batch_size out, or give the scheduler {"interval": "epoch"}'
            )
        if self._sources:
            ask_for_loaders_again(trainer)

    def on_stage_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Solves the head of a stage that asks for it.

        Looks before that whether the module's own hooks changed the frozen part since its features were stored.
        """
        self._check_frozen_part(stage)
        if stage.solve and self.run is not None and not self.run.resumed and "train" in self._stored:
            self._solve(trainer, pl_module, stage)

    def _solve(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        start, host = time.monotonic(), _host(trainer)
        load_validation(trainer)  # its store, where it has one, chooses the ridge
        with host.aside():
            pl_module.eval()
            try:
                train = together(host, lambda: self._head_rows(host, "train"))
                val = together(host, lambda: self._head_rows(host, "val")) if "val" in self._stored else None
            except NoStoreError as reason:
                raise MisconfigurationException(f"stage {stage.name!r}, solve=True: {reason}") from None
        head = linear_head(pl_module, _trainable(pl_module))
        solution = solve_head(train, val, num_classes=head.out_features, device=host.device)
        solution = trainer.strategy.broadcast(solution)  # equal to the last bit, whatever device a rank has
        with torch.no_grad():
            head.weight.copy_(solution.weight)
            head.bias.copy_(solution.bias)
        rank_zero_info(
            f"stage {stage.name!r}: solved, ridge {solution.ridge:.0e}, {'val' if val else 'held-out'}_acc "
            f"{solution.val_acc:.3f}, {time.monotonic() - start:.1f} s ({len(train.features)} rows)"
        )

    def _head_rows(self, host: Host, split: str) -> HeadRows:
        stored, module = self._stored[split], host.network
        dataset = FeatureDataset(stored.store, stored.data.form, stored.prefix)

        def batches() -> Iterator[Any]:
            for dataset.view in range(stored.store.layout.num_views):
                for first in range(0, len(dataset), _SOLVED_ROWS):
                    rows = list(range(first, min(first + _SOLVED_ROWS, len(dataset))))
                    yield dataset[rows].to(host.device).opened()

        try:
            with _installed(stored.prefix):
                return head_rows(host.run, linear_head(module, _trainable(module)), batches())
        except NotLinearError as error:
            raise NoStoreError(str(error)) from error

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Chooses the view of the epoch."""
        self._choose_view(trainer, conductor(trainer).current_run(trainer))

    def around_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any
    ) -> AbstractContextManager[Any]:
        """The shortcut, for a step outside of the Trainer's loop."""
        return _installed(self._stored["train"].prefix) if "train" in self._stored else nullcontext()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Opens the shortcut, for the step and its backward."""
        self._open(trainer, "train", batch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Closes the shortcut."""
        self._close("train")

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Opens the shortcut, for stored validation batches."""
        if not trainer.sanity_checking:
            self._open(trainer, "val", batch)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Closes the shortcut."""
        self._close("val")

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Has the validation loader asked for again: the sanity check ran on images."""
        run = conductor(trainer).current_run(trainer)
        if self._sources and (run.stage.precompute or not run.planned):
            ask_for_loaders_again(trainer)

    def on_stage_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Gives the loaders back, and has those of the next stage asked for."""
        following = self.run.later[:1] if self.run is not None else ()
        if self._sources and (self._stored or any(stage.precompute for stage in following)):
            ask_for_loaders_again(trainer)
        self._check_frozen_part(stage)
        if stage.solve:  # its rates are 0, and the moments that its steps left are of no later use
            for parameter in _trainable(pl_module):
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
        if "train" in self._stored and not self._stored["train"].is_current():
            raise MisconfigurationException(
                f"stage {stage.name!r}: weights or buffers of the frozen part were changed (by a hook of the module, "
                "or another callback?) after its features were stored, so the stage trains on features of another "
                "network; change them before `fit`, or set precompute=False"
            )

    def _open(self, trainer: pl.Trainer, split: str, batch: Any) -> None:
        if split in self._stored:
            stored = self._stored[split]
            stored.prefix.remove()  # a batch that another callback skipped had no end
            images = stored.data.form.images(batch)
            hook = "on_train_batch_start" if split == "train" else "on_validation_batch_start"
            owners = _who_may_change_batches(_owners(trainer), hook)
            names = [f"{hook} of {type(owner).__name__}" for owner in owners]
            stored.prefix.suspects = " or ".join(["the step", *names])
            stored.prefix.install(images)

    def _close(self, split: str) -> None:
        if split in self._stored:
            self._stored[split].prefix.remove()

    def _leave_stage(self) -> None:
        for split in ("train", "val"):
            self._close(split)
        self._earlier = [*self._stored.values(), *self._earlier]
        self._stored, self._source, self._stage_index = {}, None, None

    def _detach(self, pl_module: pl.LightningModule) -> None:
        self._leave_stage()
        use_transfer_hooks(pl_module)
        self._earlier = []
        for loop, source in self._sources:
            loop._data_source = source
        self._sources = []

    @contextmanager
    def _shortcuts_removed(self) -> Iterator[None]:
        """A validation loader may be asked for while the shortcut of the training data is open."""
        opened = [stored.prefix for stored in self._stored.values() if stored.prefix.is_installed]
        for prefix in opened:
            prefix.remove()
        try:
            yield
        finally:
            for prefix in opened:
                prefix.install()


class _StageSource(_DataLoaderSource):
    """Lightning's source of a loader, asked through the callback."""

    def __init__(
        self,
        inner: _DataLoaderSource,
        callback: PrecomputeFeatures,
        trainer: pl.Trainer,
        split: Literal["train", "val"],
    ) -> None:
        super().__init__(inner.instance, inner.name)
        self.inner, self.callback, self.trainer, self.split = inner, callback, trainer, split

    def dataloader(self) -> Any:
        return self.callback.loader_for(self.trainer, self.split, self.inner.dataloader)


def _owners(trainer: pl.Trainer) -> list[Any]:
    """Whose hooks are called; not known `aside`, where there are no callbacks."""
    return [*trainer.callbacks, trainer.lightning_module]  # type: ignore[attr-defined]


def _shortcut(trainer: pl.Trainer, host: Host, data: ViewedData, owners: list[Any]) -> tuple[FrozenPrefix, str]:
    """That of the training step, and why it does not lie deeper; called `aside`.

    Raises:
        NoStoreError: If there is none, on all ranks alike.
    """
    writer = together(host, lambda: _who_changes_batches(trainer, owners, data))
    if writer:
        raise NoStoreError(f"{writer} changes the batch, which is to be done to images, not to features")
    return together(host, lambda: find_shortcut(host, data))


def _trainable(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _same_everywhere(host: Host, prefix: FrozenPrefix) -> None:
    if len(set(host.gather((prefix.boundary, tuple(prefix.shapes))))) > 1:
        raise NoStoreError("the ranks found different boundaries")


def _cannot_solve(stage: Stage, reason: NoStoreError) -> MisconfigurationException:
    return MisconfigurationException(
        f"stage {stage.name!r}: solve=True needs stored features, and there can be none: {reason}"
    )


def _say_it_will_read_images(stage: Stage, reason: NoStoreError) -> None:
    if stage.solve:
        raise _cannot_solve(stage, reason) from None
    rank_zero_warn(f"stage {stage.name!r} will read its images as usual, without stored features: {reason}")


class _NotFilledError(NoStoreError):
    """There is a shortcut, and no place or no time for its features."""


@contextmanager
def _installed(prefix: FrozenPrefix) -> Iterator[None]:
    prefix.install()
    try:
        yield
    finally:
        prefix.remove()


def _who_may_change_batches(owners: list[Any], hook: str) -> list[Any]:
    """Those of the callbacks and the module that are the user's and are handed the batch before the step."""
    ours = ("lightning.", "pytorch_lightning.", "lightning_unfreeze.")
    return [
        owner for owner in owners if hasattr(owner, hook) and not getattr(type(owner), hook).__module__.startswith(ours)
    ]


def _who_changes_batches(trainer: pl.Trainer, owners: list[Any], data: ViewedData) -> str:
    """The first callback, or the module, whose `on_train_batch_start` changes the images of a batch; called `aside`."""
    for owner in _who_may_change_batches(owners, "on_train_batch_start"):
        arguments = (trainer, trainer.lightning_module) if isinstance(owner, Callback) else ()
        for draw in range(_DRAWS):
            batch = copy.deepcopy(data.fed)
            # what a callback writes down of a batch is not its business here: it is put back, errors included
            with kept(owner, skip=(pl.Trainer, pl.LightningModule)), keyed_rng("hook", draw), suppress(Exception):
                owner.on_train_batch_start(*arguments, batch, 0)
            same = False
            with suppress(NoStoreError):
                same = torch.equal(data.form.images(batch), data.form.images(data.fed))
            if not same:
                return f"{type(owner).__name__}.on_train_batch_start"
    return ""


def _host(trainer: pl.Trainer) -> Host:
    """The Trainer and its module as what a feature store needs of them."""
    module = trainer.lightning_module

    def feed(batch: Any, training: bool) -> Any:
        with mode_of(trainer, module, training=training):
            return batch_on_device(trainer, module, batch)

    def loss(batch: Any) -> Tensor:
        # without the wrapper of the strategy, so that ranks need not go together
        found = training_loss(trainer, module, batch, together=False)
        if found is None:
            raise NoStoreError("training_step returned no loss, so the shortcut cannot be checked")
        return found

    return Host(
        module,
        trainer.strategy.root_device,
        feed=feed,
        run=loss,
        outcome=lambda batch, training: _outcome(trainer, module, batch, training),
        aside=lambda: sandbox(trainer, module),
        gather=lambda value: gather_objects(trainer, value),
        rank=trainer.local_rank,
        num_ranks=max(1, trainer.world_size // trainer.num_nodes),
        progress=lambda text, total: progress_bar(trainer, text, total, "image"),
    )


@torch.no_grad()
def _outcome(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, training: bool) -> dict[str, Any]:
    """What a step returns and logs, and the states of the metrics that it updates."""
    found: dict[str, Any] = {}
    metrics = {key: part for key, part in module.named_modules() if isinstance(part, Metric)}
    for metric in metrics.values():
        metric.reset()
    before = {key: vars(module)[key] for key in ("log", "log_dict")}
    vars(module)["log"] = lambda key, value, *_, **__: found.update({key: value})
    vars(module)["log_dict"] = lambda values, *_, **__: found.update(values)
    try:
        with keyed_rng("check"):
            name: StepName = "training_step" if training else "validation_step"
            found["output"] = step_output(trainer, module, batch, name=name, together=False)
    finally:
        vars(module).update(before)
    for key, metric in metrics.items():
        found[f"state of {key}"] = metric.metric_state
    return found
