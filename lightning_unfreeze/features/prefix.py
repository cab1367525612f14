"""The frozen prefix of a network: images to features once, features to the output as often as one likes.

The network is never cut. Its own ``forward`` runs unmodified in both directions:

* *Extract*: the outputs of the boundary modules are kept, then the forward is stopped.
* *Replay*: the outermost modules that finish before anything trainable is used get a ``forward`` that does no work.
  Those whose output is read behind the boundary return the stored features, the others a NaN placeholder that takes no
  memory. Whatever reads an activation from before the boundary turns the output into NaN: a leak is never silent.

In the batch, the features themselves stand in for the images (`stand_in`), so that they travel with it. Where the
step changes images on their way to the network (bytes to floats, a normalisation), a placeholder of the images' shape
stands in, and the features wait at the boundary; the change was seen to be the same for each image, and is checked.

What is found is compared with the plain forward on real images before it is handed out (`search.verify`).

>>> from lightning_unfreeze.features.search import find_prefix
>>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
>>> _ = network[0].requires_grad_(False).eval()
>>> images = torch.rand(5, 3, 8, 8)
>>> prefix, reason = find_prefix(network, images)
>>> prefix.boundary, prefix.shapes
('1', {'1': (4, 1, 1)})
>>> features = prefix.extract(images)
>>> with prefix.replay(features) as x:
...     logits = network(x)
>>> torch.equal(logits, network(images))
True
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_unfreeze.features.calls import Call, Leaf, name_of_leaf, nothing, numbered
from lightning_unfreeze.features.patches import Patches, Stop
from lightning_unfreeze.layers.modes import mode_problem

Run = Callable[[Tensor], Any]


_MARK = "_lightning_unfreeze_served"
_CHANGED = (
    "{} changes the stored features on their way to the network, as it would change images; augment in the dataset's "
    "transform, or train without stored features"
)


class FrozenPrefix:
    """The part of a network before the freeze boundary. Made by `find_prefix`.

    Features are a dict of tensors, one row per image: ``{key: (B, *shapes[key])}``, contiguous, in the memory order of
    the network's own tensor (NHWC under channels_last). `pack` turns them into the one tensor that stands where the
    images stood: the features themselves when one tensor crosses the boundary, ``(B, n)`` when several do.

    Attributes:
        boundary: Name of the module behind which the features are taken (the last one, when several tensors cross).
        shapes: Shape of one image's features, per key. Keys are fit for file names.
        dtypes: Precision the forward ran in, per key. Features stored in another one are cast back in replay.
        found: Entries, calls and positions of the stored leaves, of which another one can be made.
        image_shape: ``(C, H, W)`` of the images the prefix was found with.
        module_names: The modules of the prefix, in the order they are called.
        suspects: Who may have changed features that are not as they were served, for the error.
    """

    def __init__(
        self,
        network: nn.Module,
        run: Run,
        image: Tensor,
        entries: Sequence[tuple[str, str]],
        calls: Sequence[Call],
        stored: Sequence[tuple[int, int]],
        changed: Tensor | None = None,
    ) -> None:
        self.network = network
        self.image_shape = tuple(image.shape[1:])
        self._image_dtype = image.dtype
        self._run = run
        self._calls = tuple(calls[: max(call for call, _ in stored) + 1])
        self._stored = {name_of_leaf(calls, *position): position for position in stored}
        self.boundary = self._calls[-1].name or "network"
        self.module_names = tuple(dict.fromkeys(call.name for call in self._calls))
        leaves = {key: calls[call].leaves[leaf] for key, (call, leaf) in self._stored.items()}
        self._leaves = leaves
        self.shapes = {key: leaf.shape for key, leaf in leaves.items()}
        self.dtypes = {key: leaf.dtype for key, leaf in leaves.items()}
        entered = [(network.get_submodule(name), method, self._enter) for name, method in entries]
        self._patches = Patches([*self._stubs(self._answer), *entered])
        # what becomes of placeholders 0 and 1 on their way, where images are changed: (2, ...)
        self._changed = changed
        self.found = (tuple(entries), self._calls, tuple(stored))
        self._writes_in_place = True  # whether modules behind the boundary do, into the features; `verify` looks
        self.suspects = "the step"
        self.only_served = False  # whether features that were not marked by `stand_in` are refused
        self.precision = ""  # of what `extract` ran in last: autocast, matrix products
        self._expected: tuple[Tensor, int] | None = None
        self._forget()

    def __repr__(self) -> str:
        return f"FrozenPrefix(boundary={self.boundary!r}, shapes={self.shapes}, bytes_per_image={self.bytes_per_image})"

    @property
    def depends_on_code_alone(self) -> bool:
        """Whether the same code with other weights would be found the same: `found` holds no numbers of a forward."""
        constants = [leaf.constant for call in self._calls for leaf in call.leaves]
        return self._changed is None and not any(isinstance(constant, Tensor) for constant in constants)

    @property
    def bytes_per_image(self) -> int:
        """Size of one image's features in the precision of the forward."""
        return sum(self.dtypes[key].itemsize * torch.Size(shape).numel() for key, shape in self.shapes.items())

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """Shape of one image's packed features."""
        shapes = list(self.shapes.values())
        return shapes[0] if len(shapes) == 1 else (sum(torch.Size(shape).numel() for shape in shapes),)

    def pack(self, features: Mapping[str, Tensor]) -> Tensor:
        """The features as the one tensor ``(B, *packed_shape)`` that takes the images' place in the batch."""
        if set(features) != set(self.shapes):
            raise ValueError(f"features of {sorted(features)} were passed; this prefix has {sorted(self.shapes)}")
        rows = [features[key] for key in self.shapes]
        if len(rows) == 1:
            return rows[0]
        dtype = rows[0].dtype
        for row in rows[1:]:
            dtype = torch.promote_types(dtype, row.dtype)
        return torch.cat([row.flatten(1).to(dtype) for row in rows], dim=1)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Inverse of `pack`."""
        if len(self.shapes) == 1:
            return dict.fromkeys(self.shapes, packed)
        parts = torch.split(packed, [torch.Size(shape).numel() for shape in self.shapes.values()], dim=1)
        return {
            key: part.reshape(len(packed), *shape)
            for (key, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """Run the images through the prefix and stop.

        Args:
            images: ``(B, C, H, W)``, on the network's device.

        Returns:
            Detached features ``{key: (B, *shapes[key])}``.

        Raises:
            ValueError: When the features have other shapes than when the prefix was found (images of another size).
            RuntimeError: When a module of the prefix is not in eval mode, or the forward took another way than when the
                prefix was found.
        """
        problem = next(filter(None, (mode_problem(n, self.network.get_submodule(n)) for n in self.module_names)), "")
        if problem:
            raise RuntimeError(problem)
        outputs: list[list[Any]] = []
        wanted = {call for call, _ in self._stored.values()}
        busy = False

        def keep(name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal busy
            if busy:  # a module of the prefix that is also called inside another one
                return original(*args, **kwargs)
            if name != self._calls[len(outputs)].name:
                raise RuntimeError(f"{name!r} was called where {self._calls[len(outputs)].name!r} was expected")
            busy = True
            device = self._device_type()
            autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            self.precision = f"{autocast} {torch.get_float32_matmul_precision() if device == 'cuda' else ''}"
            try:
                result = original(*args, **kwargs)
            finally:
                busy = False
            outputs.append(tree_leaves(result) if len(outputs) in wanted else [])
            if len(outputs) == len(self._calls):
                raise Stop
            return result

        with torch.no_grad(), Patches(self._stubs(keep)), contextlib.suppress(Stop):
            self._run(images)
        if len(outputs) < len(self._calls):
            raise RuntimeError(f"the network never called {self.boundary!r}; find the prefix again")
        features = {}
        for key, (call, leaf) in self._stored.items():
            tensor: Tensor = outputs[call][leaf]
            batch_dim = self._leaves[key].batch_dim
            sizes = zip(tensor.shape, self._leaves[key].dims, strict=True)
            if any(size != fixed for dim, (size, (fixed, _)) in enumerate(sizes) if dim != batch_dim):
                shape = tuple(tensor.shape)
                raise ValueError(
                    f"{key!r} gave {shape}; the prefix was found with images of {self.image_shape}, pass that size"
                )
            features[key] = self._leaves[key].to_rows(tensor)
        return features

    def stand_in(self, packed: Tensor) -> Tensor:
        """What takes the images' place in the batch; marked, so that one that was changed is told from it.

        Args:
            packed: ``(B, *packed_shape)``, of `pack`, on the network's device.
        """
        if self._changed is None:
            vars(packed)[_MARK] = (None, version_of(packed))
            return packed
        images = numbered(len(packed), self.image_shape, self._image_dtype, packed.device)
        vars(images)[_MARK] = (packed, 0)
        if self._patches.is_open:
            self._arm(packed)
        return images

    @staticmethod
    def is_served(images: Tensor) -> bool:
        """Whether it is what `stand_in` gave, and nobody wrote into it since."""
        mark = vars(images).get(_MARK)
        return mark is not None and mark[1] == version_of(images)

    def _device_type(self) -> str:
        return next((p.device.type for p in self.network.parameters()), "cpu")

    @contextlib.contextmanager
    def replay(self, features: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Within the context the network takes the yielded tensor where it took images. Span the backward too.

        Raises:
            RuntimeError: When nothing read the features.
        """
        with self.installed():
            yield self.stand_in(self.pack(features))
            if not self._consumed or not self._entered_once:
                raise RuntimeError(f"the features of {self.boundary!r} were never read by the network")

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within the context the network takes what `stand_in` gives, or images as before."""
        self.install()
        try:
            yield
        finally:
            self.remove()

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within the context nothing is on the network; what is installed comes back after it."""
        was_installed = self._patches.is_open
        self.remove()
        try:
            yield
        finally:
            if was_installed:
                self.install()

    def install(self, images: Tensor | None = None) -> None:
        """Arrange that the network takes packed features, or images as before; for callbacks, which have no ``with``.

        Args:
            images: Where given, what stands in for the images, and all that will be taken: a step that changes it on
                its way to the network, say by an augmentation that leaves out some batches, raises a RuntimeError.

        Raises:
            RuntimeError: When installed already, or the tensor is not as `stand_in` gave it.
        """
        if self._patches.is_open:
            raise RuntimeError("this frozen prefix is installed already; call remove() first")
        self._forget()
        if images is not None:
            if not self.is_served(images):
                raise RuntimeError(_CHANGED.format(self.suspects))
            packed, version = vars(images)[_MARK]
            if packed is None:
                self._expected = (images, version)
            else:
                self._arm(packed)
        self._patches.__enter__()

    def remove(self) -> None:
        """Undo `install`, also after an error; nothing stays behind on the network. Harmless when not installed."""
        self._patches.__exit__()
        self._forget()

    def _forget(self) -> None:
        self._features: dict[tuple[int, int], Tensor] = {}
        self._handed_on: list[tuple[Tensor, int]] = []
        self._expected = None
        self._batch, self._device = 0, torch.device("cpu")
        self._next = len(self._calls)  # the call that comes next; len(calls): modules run their own forward
        self._inside = self._entered_once = False

    @property
    def _consumed(self) -> bool:
        return self._next == len(self._calls)

    def _stubs(self, answer: Callable[..., Any]) -> Iterable[tuple[nn.Module, str, Callable[..., Any]]]:
        return [
            (self.network.get_submodule(name), "forward", partial(partial, answer, name)) for name in self.module_names
        ]

    def _enter(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Where images enter: take the features out of the packed tensor and hand on an image that is not there."""

        def entry(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return method(*args, **kwargs)
            if not self._consumed:
                raise RuntimeError(
                    f"the network was entered again before the features of {self.boundary!r} were read: "
                    "call it in the same way in training, validation and when the prefix is found"
                )
            leaves, tree = tree_flatten((args, kwargs))
            for i, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor) and leaf.shape[1:] == self.packed_shape:
                    leaves[i] = self._arm(leaf)
                    break
            args, kwargs = tree_unflatten(leaves, tree)
            self._inside = True
            try:
                return method(*args, **kwargs)
            except BaseException:
                self._next = len(self._calls)  # the next batch may come
                raise
            finally:
                self._inside = False

        return entry

    def _arm(self, packed: Tensor) -> Tensor:
        changed = self._expected is not None and not _is_unchanged(packed, *self._expected)
        if changed or (self.only_served and not self.is_served(packed)):
            raise RuntimeError(_CHANGED.format(self.suspects))
        self._features = {self._stored[key]: rows for key, rows in self.unpack(packed).items()}
        self._batch, self._device, self._next, self._entered_once = len(packed), packed.device, 0, True
        return nothing([len(packed), *self.image_shape], self._image_dtype, packed.device)

    def _answer(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a module of the prefix returns in replay."""
        if self._consumed:
            return original(*args, **kwargs)
        call = self._calls[self._next]
        if name != call.name:
            raise RuntimeError(f"{name!r} was called where {call.name!r} was expected; find the prefix again")
        if self._changed is not None and self._next == 0:
            self._check_way([leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)], self._changed)
        leaves = []
        for i, leaf in enumerate(call.leaves):
            rows = self._features.pop((self._next, i), None)
            leaves.append(leaf.placeholder(self._batch, self._device) if rows is None else self._hand_on(leaf, rows))
        self._next += 1
        return tree_unflatten(leaves, call.tree)

    def _check_way(self, given: Sequence[Tensor], as_seen: Tensor) -> None:
        """The placeholders have to arrive as they did when the prefix was found; mixed or drawn, they do not."""
        images = next((tensor for tensor in given if tensor.ndim and len(tensor) == self._batch), None)
        if images is None or any(
            not torch.equal(images[i::2], one.expand_as(images[i::2]))
            for i, one in enumerate(as_seen.to(self._device)[: self._batch])
        ):
            raise RuntimeError(_CHANGED.format(self.suspects))

    def _hand_on(self, leaf: Leaf, rows: Tensor) -> Tensor:
        tensor = leaf.from_rows(rows)
        # The batch has to survive a module behind the boundary that writes in place (ReLU). One that did not when the
        # prefix was checked and does now cannot go unseen where `_is_unchanged` watches the batch.
        watched = self._expected is not None and not self._expected[0].is_inference()
        if tensor.data_ptr() == rows.data_ptr() and (self._writes_in_place or not watched):
            tensor = tensor.clone()
        self._handed_on.append((tensor, version_of(tensor)))
        return tensor


@torch.no_grad()
def advance(features: Mapping[str, Tensor], from_prefix: FrozenPrefix, to_prefix: FrozenPrefix) -> dict[str, Tensor]:
    """Features at one boundary of a network from those at an earlier one, without the images."""
    with from_prefix.replay(features) as packed:
        return to_prefix.extract(packed)


def version_of(tensor: Tensor) -> int:
    """How often the tensor was written into; not known of inference tensors."""
    return 0 if tensor.is_inference() else tensor._version


def _is_unchanged(tensor: Tensor, original: Tensor, version: int) -> bool:
    """Whether ``tensor`` is the original, or a copy of it, and nobody wrote into the original since."""
    same = tensor.data_ptr() == original.data_ptr() and tensor.stride() == original.stride()
    return version_of(original) == version and (same or torch.equal(tensor, original.to(tensor.dtype)))
