"""Stored features for a plain PyTorch loop, or for another trainer: no Lightning."""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map  # torch 2.6 has no public one; guarded as in `batch_form`
from torch.utils.data import DataLoader

from lightning_unfreeze.data.datasets import transform_of, with_transform
from lightning_unfreeze.features.batch_form import NoStoreError
from lightning_unfreeze.features.fill import FeaturePass, StoredData, together
from lightning_unfreeze.features.host import Host
from lightning_unfreeze.features.layout import StoreDtype
from lightning_unfreeze.features.patches import untouched
from lightning_unfreeze.features.prefix import FrozenPrefix
from lightning_unfreeze.features.search import find_prefix, verify
from lightning_unfreeze.features.serve import FeatureDataset, as_it_is
from lightning_unfreeze.features.viewed import ViewedData, check_loader, plain_dataset, view_data
from lightning_unfreeze.layers.modes import kept_modes

Trains = str | nn.Module | nn.Parameter


@contextmanager
def cached(
    model: nn.Module,
    loader: DataLoader[Any],
    train: Trains | Iterable[Trains] | None = None,
    *,
    views: int = 1,
    eval_transform: Callable[[Any], Any] | None = None,
    directory: str | Path | None = None,
    dtype: StoreDtype = "auto",
    data_fingerprint: str | None = None,
    seed: int = 0,
) -> Iterator[CachedBatches]:
    """Runs the frozen part of a network once; the loop stays as it is, with features where the images stood.

    Within the context the network takes the batches that are yielded, and images as before. Batches come in the order
    in which `loader` would give them, from the same random numbers, so that the loop ends with the weights that it has
    without the store, bitwise where the kernels are. What is found is compared with the plain forward on real images,
    and whoever changes the features on their way gets an error. Afterwards nothing is left on the network.

    Args:
        model: Any module whose forward takes a batch of images.
        loader: A `DataLoader` over a map-style dataset.
        train: What trains: names or globs of modules or parameters, modules, parameters; `()` for a tower that is
            frozen as a whole. The rest is frozen and in eval mode inside. None: what has `requires_grad` now.
        views: Random draws of the dataset's own transform that are stored; epoch e reads view e modulo `views`.
        eval_transform: Transform of view 0, where the dataset's own one is random.
        directory: Where stores are kept for the next time; None for a temporary folder.
        dtype: Precision on disk; `"auto"` keeps that of the forward.
        data_fingerprint: Your own word for what the data is, in place of a look at files and samples.
        seed: Seed of random views.

    Yields:
        The batches: one pass per `for` loop, in the form of the loader's own.

    Raises:
        ValueError: If `train` names nothing, or `views` is no number of views.
        RuntimeError: If there can be no store, with the reason.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 2)
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> with cached(model, DataLoader(data, 4), train=model[3]) as batches:
        ...     for x, y in batches:
        ...         print(tuple(x.shape), tuple(model(x).shape))
        (4, 4, 1, 1) (4, 2)
        (4, 4, 1, 1) (4, 2)
    """
    if isinstance(views, bool) or not isinstance(views, int) or views < 1:
        raise ValueError(f"views={views!r} has to be a whole number of at least 1")
    with ExitStack() as stack:
        stack.enter_context(_frozen_but(model, train))
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()) if directory is None else directory)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        host = Host(
            model,
            device,
            feed=lambda batch, _: _on(batch, device),
            run=model,
            outcome=lambda batch, _: {},
            aside=lambda: untouched(model),
        )
        source = _Source(host, root, views, eval_transform, dtype, data_fingerprint, seed)
        try:
            data = source.data(loader, "train")
            prefix, reason = find_prefix(model, data.form.images(data.fed))
            if prefix is None:
                raise NoStoreError(reason)
            stored = source.stored(data, prefix)
        except NoStoreError as error:
            raise RuntimeError(f"no features can be stored: {error}") from error
        prefix.only_served = True
        with prefix.installed():
            yield CachedBatches(source, stored)


class CachedBatches:
    """Batches of stored features in the order of a loader, one pass for each iteration.

    Attributes:
        boundary: Name of the module behind which the features are taken.
    """

    def __init__(self, source: _Source, stored: StoredData) -> None:
        self._source, self._stored, self._epoch = source, stored, 0
        self._dataset = FeatureDataset(stored.store, stored.data.form, stored.prefix)
        self.boundary = stored.prefix.boundary

    def __iter__(self) -> Iterator[Any]:
        self._dataset.view = self._epoch % self._dataset.num_views
        self._epoch += 1
        user, prefix = self._stored.data.loader, self._stored.prefix
        rows: Any = user.sampler if user.batch_sampler is None else user.batch_sampler
        # draws what the user's loader would draw, from the same generator
        own = DataLoader(self._dataset, None, sampler=rows, generator=user.generator, collate_fn=as_it_is)
        for batch in own:
            features = batch.packed.to(self._source.host.device)
            yield self._stored.data.form.join(prefix.stand_in(features), batch.beside)

    def __len__(self) -> int:
        return len(self._stored.data.loader)

    def of(self, loader: DataLoader[Any]) -> CachedBatches:
        """The same for another loader, that of the validation data say; to be called inside the context.

        Raises:
            RuntimeError: If there can be no store, with the reason.
        """
        prefix = self._stored.prefix
        try:
            with prefix.set_aside():
                data = self._source.data(loader, "val")
                problem = verify(prefix, data.form.images(data.fed))
                if problem:
                    raise NoStoreError(problem)
                return CachedBatches(self._source, self._source.stored(data, prefix))
        except NoStoreError as error:
            raise RuntimeError(f"no features can be stored: {error}") from error


@dataclass(frozen=True)
class _Source:
    """Makes stores of loaders, all with the same settings."""

    host: Host
    root: Path
    views: int
    eval_transform: Callable[[Any], Any] | None
    dtype: StoreDtype
    fingerprint: str | None
    seed: int

    def data(self, loader: Any, name: str) -> ViewedData:
        loader = check_loader(loader)
        dataset = plain_dataset(loader)
        plain = dataset
        if self.eval_transform is not None and transform_of(dataset) is not None:
            plain = with_transform(dataset, self.eval_transform)
        views = [plain, *[dataset] * (self.views - 1)] if name == "train" else [dataset]
        return view_data(self.host, name, loader, views, self.seed, self.fingerprint, feeding="")

    def stored(self, data: ViewedData, prefix: FrozenPrefix) -> StoredData:
        work = together(self.host, lambda: FeaturePass(self.host, data, prefix, self.root, self.dtype, "sampled"))
        stored, _ = work.open()
        return stored or work.fill()


@contextmanager
def _frozen_but(model: nn.Module, train: Trains | Iterable[Trains] | None) -> Iterator[None]:
    """Only this trains, and modules that do not are in eval mode; everything is put back."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    trains = {p for p, wants in wanted if wants} if train is None else _chosen(model, train)
    try:
        with kept_modes(model):
            for parameter, _ in wanted:
                parameter.requires_grad_(parameter in trains)
            _eval_what_is_frozen(model)
            yield
    finally:
        for parameter, wants in wanted:
            parameter.requires_grad_(wants)


def _eval_what_is_frozen(model: nn.Module) -> None:
    """Frozen modules with weights, and all that is inside them, in eval mode; a model that is frozen whole, too."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        model.eval()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def _chosen(model: nn.Module, train: Trains | Iterable[Trains]) -> set[nn.Parameter]:
    several: Iterable[Any] = [train] if isinstance(train, str | nn.Module | nn.Parameter) else train
    chosen: set[nn.Parameter] = set()
    for one in several:
        if isinstance(one, str):
            names = [name for name, _ in model.named_parameters() if _is_named(name, one)]
            found = [model.get_parameter(name) for name in names]
            if not found and one == "head" and hasattr(model, "get_classifier"):
                classifier: Any = model.get_classifier  # of timm's models
                found = list(classifier().parameters())
            if not found:
                children = ", ".join(name for name, _ in model.named_children())
                raise ValueError(f"train={one!r} names nothing of {type(model).__name__}, which has {children}")
            chosen |= set(found)
        else:
            chosen |= set(one.parameters()) if isinstance(one, nn.Module) else {one}
    return chosen & set(model.parameters())


def _is_named(parameter: str, pattern: str) -> bool:
    parts = parameter.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


def _on(batch: Any, device: torch.device) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)
