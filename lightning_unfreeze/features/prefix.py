"""The frozen prefix of a network: images to features once, features to the output as often as one likes.

The network is never cut. Its own ``forward`` runs unmodified in both directions:

* *Extract*: the outputs of the boundary modules are kept, then the forward is stopped.
* *Replay*: the outermost modules that finish before anything trainable is used get a ``forward`` that does no work.
  Those whose output is read behind the boundary return the stored features, the others a NaN placeholder that takes no
  memory. Whatever reads an activation from before the boundary turns the output into NaN: a leak is never silent.

What is found is compared with the plain forward on real images before it is handed out (`verify`).

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
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# torch 2.6 has no public pytree. Last seen to work: torch 2.15; guarded by `test_outputs__containers_keep_their_form`.
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

Run = Callable[[Tensor], Any]
_PLAIN_TYPES = (int, float, str, type(None), torch.Size, torch.dtype, torch.device)
_ENTRY_METHODS = ("forward_", "extract_features", "encode_image", "get_image_features")
_MISSING = object()


class _Stop(BaseException):
    """Ends a forward that has given all it was asked for. No ``except Exception`` of the user's code can catch it."""


class _RefusedError(Exception):
    """There is no frozen prefix; the message says why."""


class PrefixSearch(NamedTuple):
    """What `find_prefix` found; ``reason`` says why the deepest boundary does not hold, and is empty when it does."""

    prefix: FrozenPrefix | None
    reason: str


@dataclass(frozen=True)
class _Leaf:
    """One leaf of what a call returns, learned from a batch of two images and one of three.

    ``constant`` is the value when it does not depend on the images; else it is a tensor whose dimension ``i`` has the
    size ``dims[i][0] + dims[i][1] * batch``, with its dimensions laid out in memory in ``order``.
    """

    constant: Any = _MISSING
    dims: tuple[tuple[int, int], ...] = ()
    dtype: torch.dtype = torch.float32
    order: tuple[int, ...] = ()

    @classmethod
    def learn(cls, two: Any, three: Any) -> _Leaf:
        if isinstance(two, Tensor) and isinstance(three, Tensor) and two.ndim == three.ndim:
            if two.shape == three.shape and torch.equal(two, three):
                return cls(two.detach())
            per_image = [c - b for b, c in zip(two.shape, three.shape, strict=True)]
            dims = tuple((size - 2 * k, k) for size, k in zip(two.shape, per_image, strict=True))
            strides = two.stride()
            return cls(dims=dims, dtype=two.dtype, order=tuple(sorted(range(two.ndim), key=lambda i: -strides[i])))
        if isinstance(two, _PLAIN_TYPES) and two == three:
            return cls(two)
        raise _RefusedError(f"returns {type(two).__name__} objects, or values that change with the batch size")

    @cached_property
    def batch_dim(self) -> int | None:
        """The one dimension that is a multiple of the batch size; None where there is none: no features of an image."""
        growing = [i for i, (_, per_image) in enumerate(self.dims) if per_image]
        storable = len(growing) == 1 and self.dims[growing[0]][0] == 0 and self.dtype.is_floating_point
        return growing[0] if storable else None

    @cached_property
    def _rows_order(self) -> list[int]:
        return [dim for dim in self.order if dim == self.batch_dim] + [d for d in self.order if d != self.batch_dim]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image's features, in memory order; leads with the number of windows, where there are any."""
        first, *others = self._rows_order
        windows = self.dims[first][1]
        return ((windows,) if windows > 1 else ()) + tuple(self.dims[dim][0] for dim in others)

    def to_rows(self, tensor: Tensor) -> Tensor:
        """The call's tensor as contiguous rows, one per image: ``(B, *shape)``."""
        rows = tensor.detach().permute(self._rows_order).contiguous()
        return rows.reshape(-1, *self.shape)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Inverse of `to_rows`, with the memory layout (channels_last or not) that the network's own tensor has.

        Shares memory with the rows where their layouts agree.
        """
        order = self._rows_order
        windows = self.dims[order[0]][1]
        physical = rows.to(self.dtype).reshape(len(rows) * windows, *(self.dims[dim][0] for dim in order[1:]))
        tensor = physical.permute(_inverse(order))
        return tensor.permute(self.order).contiguous().permute(_inverse(self.order))

    def placeholder(self, batch: int, device: torch.device) -> Any:
        if self.constant is not _MISSING:
            return self.constant.to(device, copy=True) if isinstance(self.constant, Tensor) else self.constant
        return _nothing([fixed + batch * per_image for fixed, per_image in self.dims], self.dtype, device)


@dataclass(frozen=True)
class _Call:
    """One outermost call that finishes before anything trainable is used."""

    name: str
    tree: TreeSpec
    leaves: tuple[_Leaf, ...]


class FrozenPrefix:
    """The part of a network before the freeze boundary. Made by `find_prefix`.

    Features are a dict of tensors, one row per image: ``{key: (B, *shapes[key])}``, contiguous, in the memory order of
    the network's own tensor (NHWC under channels_last). `pack` turns them into the one tensor that stands where the
    images stood: the features themselves when one tensor crosses the boundary, ``(B, n)`` when several do.

    Attributes:
        boundary: Name of the module behind which the features are taken (the last one, when several tensors cross).
        shapes: Shape of one image's features, per key. Keys are fit for file names.
        dtypes: Precision the forward ran in, per key. Features stored in another one are cast back in replay.
        image_shape: ``(C, H, W)`` of the images the prefix was found with.
        module_names: The modules of the prefix, in the order they are called.
    """

    def __init__(
        self,
        network: nn.Module,
        run: Run,
        image: Tensor,
        entries: Sequence[tuple[str, str]],
        calls: Sequence[_Call],
        stored: Sequence[tuple[int, int]],
    ) -> None:
        self.network = network
        self.image_shape = tuple(image.shape[1:])
        self._image_dtype = image.dtype
        self._run = run
        self._calls = tuple(calls[: max(call for call, _ in stored) + 1])
        self._stored = {_key(calls, *position): position for position in stored}
        self.boundary = self._calls[-1].name or "network"
        self.module_names = tuple(dict.fromkeys(call.name for call in self._calls))
        leaves = {key: calls[call].leaves[leaf] for key, (call, leaf) in self._stored.items()}
        self._leaves = leaves
        self.shapes = {key: leaf.shape for key, leaf in leaves.items()}
        self.dtypes = {key: leaf.dtype for key, leaf in leaves.items()}
        entered = [(network.get_submodule(name), method, self._enter) for name, method in entries]
        self._patches = _Patches([*self._stubs(self._answer), *entered])
        self._writes_in_place = True  # whether modules behind the boundary do, into the features; `verify` looks
        self._expected: tuple[Tensor, int] | None = None
        self._forget()

    def __repr__(self) -> str:
        return f"FrozenPrefix(boundary={self.boundary!r}, shapes={self.shapes}, bytes_per_image={self.bytes_per_image})"

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
        problem = next(filter(None, (_mode_problem(n, self.network.get_submodule(n)) for n in self.module_names)), "")
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
            try:
                result = original(*args, **kwargs)
            finally:
                busy = False
            outputs.append(tree_leaves(result) if len(outputs) in wanted else [])
            if len(outputs) == len(self._calls):
                raise _Stop
            return result

        with torch.no_grad(), _Patches(self._stubs(keep)), contextlib.suppress(_Stop):
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

    @contextlib.contextmanager
    def replay(self, features: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Within the context the network takes the yielded tensor where it took images. Span the backward too.

        Raises:
            RuntimeError: When nothing read the features.
        """
        packed = self.pack(features)
        self.install()
        try:
            yield packed
            if not self._consumed or not self._entered_once:
                raise RuntimeError(f"the features of {self.boundary!r} were never read by the network")
        finally:
            self.remove()

    def install(self, packed: Tensor | None = None) -> None:
        """Arrange that the network takes packed features, or images as before; for callbacks, which have no ``with``.

        Args:
            packed: Where given, the only features that will be taken: a step that changes them on their way to the
                network, say by an augmentation that leaves out some batches, raises a RuntimeError.

        Raises:
            RuntimeError: When installed already.
        """
        if self._patches.is_open:
            raise RuntimeError("this frozen prefix is installed already; call remove() first")
        self._forget()
        self._expected = None if packed is None else (packed, _version(packed))
        self._patches.__enter__()

    @property
    def is_installed(self) -> bool:
        """Whether the network takes packed features now."""
        return self._patches.is_open

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
        if self._expected is not None and not _is_unchanged(packed, *self._expected):
            raise RuntimeError(
                "the step changes the stored features on their way to the network, as it would change images; augment "
                "in the dataset's transform, or train this stage without stored features"
            )
        self._features = {self._stored[key]: rows for key, rows in self.unpack(packed).items()}
        self._batch, self._device, self._next, self._entered_once = len(packed), packed.device, 0, True
        return _nothing([len(packed), *self.image_shape], self._image_dtype, packed.device)

    def _answer(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a module of the prefix returns in replay."""
        if self._consumed:
            return original(*args, **kwargs)
        call = self._calls[self._next]
        if name != call.name:
            raise RuntimeError(f"{name!r} was called where {call.name!r} was expected; find the prefix again")
        leaves = []
        for i, leaf in enumerate(call.leaves):
            rows = self._features.pop((self._next, i), None)
            leaves.append(leaf.placeholder(self._batch, self._device) if rows is None else self._hand_on(leaf, rows))
        self._next += 1
        return tree_unflatten(leaves, call.tree)

    def _hand_on(self, leaf: _Leaf, rows: Tensor) -> Tensor:
        tensor = leaf.from_rows(rows)
        # The batch has to survive a module behind the boundary that writes in place (ReLU). One that did not when the
        # prefix was checked and does now cannot go unseen where `_is_unchanged` watches the batch.
        watched = self._expected is not None and not self._expected[0].is_inference()
        if tensor.data_ptr() == rows.data_ptr() and (self._writes_in_place or not watched):
            tensor = tensor.clone()
        self._handed_on.append((tensor, _version(tensor)))
        return tensor


def find_prefix(network: nn.Module, images: Tensor, run: Run | None = None) -> PrefixSearch:
    """Find the deepest freeze boundary at which extract and replay equal the plain forward.

    Frozen is what has ``requires_grad=False``; modules before the boundary have to be in eval mode. Nothing of the
    network changes: modes, buffers and the random state are put back.

    Args:
        network: Any module; a `LightningModule` as well.
        images: ``(B, C, H, W)``, real ones, on the network's device. The search runs on three, the check on all.
        run: How the network is called, ``network`` itself by default, e.g. ``lambda x: model.forward_head(...)`` or a
            training step without its logging. It has to take any batch size.

    Returns:
        ``(prefix, reason)``: prefix None, with the module and the reason, when no boundary holds.
    """
    run = run or network
    three = images[torch.arange(3) % len(images)]
    if len(images) < 3:
        images = three
    try:
        with _sandbox(network):
            entries, calls = _learn_calls(network, run, three)
        ends = _ends(network, calls)
    except _RefusedError as refused:
        return PrefixSearch(None, str(refused))
    reason = ""
    for end in ends:
        try:
            stored = _leaves_read(network, run, three, entries, calls[: end + 1])
            prefix = FrozenPrefix(network, run, three, entries, calls[: end + 1], stored)
            problem = _rows_problem(prefix, three) or verify(prefix, images)
        except Exception as error:  # whatever the user's forward raises on placeholders is a reason not to replay it
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if not problem:
            return PrefixSearch(prefix, reason)
        reason = reason or f"{calls[end].name!r} is no freeze boundary: {problem}"
    return PrefixSearch(None, reason)


def verify(prefix: FrozenPrefix, images: Tensor) -> str:
    """Compare prefix and rest with the plain forward: outputs, gradients of all that trains, outputs in eval mode.

    The first in the network's present modes from the same random state. Equal means bitwise equal; where two plain runs
    differ among themselves (atomic additions of some GPU kernels), equal up to that.

    Args:
        prefix: What to check.
        images: ``(B, C, H, W)``, on the network's device.

    Returns:
        The reason why it does not hold; empty when it does.
    """
    writes_in_place = False
    for evaluate in (False, True):
        run, network = prefix._run, prefix.network
        plain = _probe(network, run, images, evaluate)
        with prefix.replay(prefix.extract(images)) as packed:
            replayed = _probe(network, run, packed, evaluate)
            writes_in_place |= any(_version(tensor) != version for tensor, version in prefix._handed_on)
        differing = [name for name in plain if not _same(plain[name], replayed.get(name))]
        if differing:
            again = _probe(network, run, images, evaluate)
            differing = [name for name in differing if not _within(plain[name], again[name], replayed.get(name))]
        if differing:
            is_nan = [
                isinstance(v := run_.get(differing[0]), Tensor) and bool(v.isnan().any()) for run_ in (plain, replayed)
            ]
            why = "it is NaN, so it reads an activation from before the boundary" if is_nan[1] else "it is another one"
            why = "it is NaN in the plain forward, too" if is_nan[0] else why
            mode = "in eval mode" if evaluate else "in training"
            return f"the {differing[0]} {mode} is not that of the plain forward ({why})"
    prefix._writes_in_place = writes_in_place
    return ""


@torch.no_grad()
def advance(features: Mapping[str, Tensor], from_prefix: FrozenPrefix, to_prefix: FrozenPrefix) -> dict[str, Tensor]:
    """Features at one boundary from those at an earlier one, without the images.

    Args:
        features: ``{key: (B, ...)}`` of ``from_prefix``.
        from_prefix: The earlier boundary.
        to_prefix: The later boundary of the same network, in its present modes.
    """
    with from_prefix.replay(features) as packed:
        return to_prefix.extract(packed)


def fingerprint(prefix: FrozenPrefix) -> str:
    """SHA-256 over what features depend on: names, shapes, dtypes, bytes of all parameters and buffers of the prefix.

    Parameters and buffers that the containers around the prefix own themselves (position embeddings, class tokens)
    count too, as far as they are frozen.
    """
    tensors: dict[str, Tensor] = {}
    for name in prefix.module_names:
        module = prefix.network.get_submodule(name)
        dot = f"{name}." if name else ""
        tensors |= {f"{dot}{key}": tensor for key, tensor in [*module.named_parameters(), *module.named_buffers()]}
        parts = name.split(".") if name else []
        for i in range(len(parts)):
            dot = "".join(f"{part}." for part in parts[:i])
            owner = prefix.network.get_submodule(dot[:-1])
            own = [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
            tensors |= {f"{dot}{key}": tensor for key, tensor in own if not tensor.requires_grad}
    digest = hashlib.sha256(repr((prefix.module_names, prefix.shapes, prefix.dtypes)).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _learn_calls(network: nn.Module, run: Run, three: Tensor) -> tuple[list[tuple[str, str]], list[_Call]]:
    """The methods that take the images and the calls before the first trainable use, from batches of two and three."""
    (entries, seen_two), (_, seen_three) = (_trace(network, run, batch) for batch in (three[:2], three))
    if not entries:
        raise _RefusedError("no module is handed the images as they are: something changes them on their way")
    if [name for name, _ in seen_two] != [name for name, _ in seen_three]:
        raise _RefusedError("the network calls other modules for three images than for two")
    calls: list[_Call] = []
    for (name, two), (_, three_output) in zip(seen_two, seen_three, strict=True):
        (leaves_two, tree), (leaves_three, _) = tree_flatten(two), tree_flatten(three_output)
        try:
            leaves = tuple(_Leaf.learn(a, b) for a, b in zip(leaves_two, leaves_three, strict=True))
        except _RefusedError as refused:
            if not calls:
                raise _RefusedError(f"{name!r} {refused}") from None
            break
        calls.append(_Call(name, tree, leaves))
    return entries, calls


def _trace(network: nn.Module, run: Run, images: Tensor) -> tuple[list[tuple[str, str]], list[tuple[str, Any]]]:
    """Entries ``(module, method)`` and outermost calls ``(module, output)`` before a trainable parameter is used."""
    frozen = {name for name, m in network.named_modules() if not any(p.requires_grad for p in m.parameters())}
    trains_itself = {
        name
        for name, m in network.named_modules()
        if not any(True for _ in m.children()) and any(p.requires_grad for p in m.parameters())
    }
    entries: dict[tuple[str, str], None] = {}
    calls: list[tuple[str, Any]] = []
    inside = False

    def watch(name: str, method: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            return original(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in trains_itself or any(tensor.requires_grad for tensor in tensors):
            raise _Stop
        if any(tensor.shape == images.shape and torch.equal(tensor, images) for tensor in tensors):
            entries[name, method] = None
        outermost = method == "forward" and name in frozen
        inside = outermost
        try:
            output = original(*args, **kwargs)
        finally:
            inside = inside and not outermost
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output)):
            raise _Stop
        if outermost:
            leaves, tree = tree_flatten(output)  # copies: what follows may write in place
            leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            calls.append((name, tree_unflatten(leaves, tree)))
        return output

    watched = [
        (module, method, partial(partial, watch, name, method))
        for name, module in network.named_modules()
        for method in ("forward", *_entry_methods(type(module)))
    ]
    with torch.enable_grad(), _Patches(watched):
        try:
            run(images)
        except _Stop:
            return list(entries), calls
    raise _RefusedError("nothing that the network computes depends on a trainable parameter")


def _entry_methods(kind: type[nn.Module]) -> list[str]:
    return [name for name in dir(kind) if name.startswith(_ENTRY_METHODS) and callable(getattr(kind, name))]


def _ends(network: nn.Module, calls: Sequence[_Call]) -> list[int]:
    """Indices of the calls at which the prefix may end, deepest first.

    The deepest is the last one with weights, or one behind it that makes the features smaller (a global pool).

    Raises:
        _RefusedError: When there is none, or a module before it is not in eval mode.
    """
    modules = [network.get_submodule(call.name) for call in calls]
    weighted = [i for i, module in enumerate(modules) if any(True for _ in module.parameters())]
    if not weighted:
        raise _RefusedError("no module with frozen parameters finishes before the first trainable one is used")
    for call, module in zip(calls[: weighted[-1] + 1], modules, strict=False):
        problem = _mode_problem(call.name, module)
        if problem:
            raise _RefusedError(problem)
    last, smallest = weighted[-1], _size(calls[weighted[-1]])
    for i in range(last + 1, len(calls)):
        if _mode_problem(calls[i].name, modules[i]):
            break
        if 0 < _size(calls[i]) < smallest:
            last, smallest = i, _size(calls[i])
    return [*([last] if last > weighted[-1] else []), *range(weighted[-1], weighted[0] - 1, -1)]


def _size(call: _Call) -> int:
    return sum(torch.Size(leaf.shape).numel() for leaf in call.leaves if leaf.batch_dim is not None)


def _mode_problem(name: str, module: nn.Module) -> str:
    """Why the module's output would not be the same each time; empty when it is."""
    for child_name, child in module.named_modules(prefix=name):
        kind = type(child).__name__
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and (child.training or child.running_mean is None):
            return f"{child_name!r} ({kind}) is frozen but normalises with batch statistics; put it in eval mode"
        if not child.training:
            continue
        owns = any(True for _ in child.parameters(recurse=False)) or any(True for _ in child.buffers(recurse=False))
        drops = "drop" in kind.lower() and any(getattr(child, p, None) for p in ("p", "prob", "drop_prob"))
        if owns or drops:
            return f"{child_name!r} ({kind}) is frozen but in train mode; put it in eval mode"
    return ""


def _leaves_read(
    network: nn.Module, run: Run, three: Tensor, entries: Sequence[tuple[str, str]], calls: Sequence[_Call]
) -> list[tuple[int, int]]:
    """Which leaves of the calls are read behind the last of them: those that get a gradient if each asks for one."""
    candidates = [
        (i, j) for i, call in enumerate(calls) for j, leaf in enumerate(call.leaves) if leaf.batch_dim is not None
    ]
    if not candidates:
        raise _RefusedError("no output has a batch dimension")

    class Reader(FrozenPrefix):
        def unpack(self, packed: Tensor) -> dict[str, Tensor]:
            return {key: clones[key].clone() if torch.is_grad_enabled() else clones[key] for key in clones}

    reader = Reader(network, run, three, entries, calls, candidates)
    leaves = {
        key: torch.ones(3, *shape, dtype=reader.dtypes[key], device=three.device, requires_grad=True)
        for key, shape in reader.shapes.items()
    }
    # Forwards may write in place, which leaves of a graph do not allow; the user may run the backbone without a graph.
    clones = {key: leaf.clone() for key, leaf in leaves.items()}
    reader.install()
    try:
        with _sandbox(network), torch.enable_grad():
            loss = _loss(run(torch.zeros(3, *reader.packed_shape, device=three.device)))
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    finally:
        reader.remove()
    read = [place for place, gradient in zip(candidates, gradients, strict=True) if gradient is not None]
    # None is read by way of the graph: detached features. Then those of the last call, as a guess that is verified.
    return read or [place for place in candidates if place[0] == candidates[-1][0]]


def _rows_problem(prefix: FrozenPrefix, three: Tensor) -> str:
    """Features must not depend on the other images of the batch, nor on the modes and the random state."""
    rows = prefix.extract(three)
    fewer = prefix.extract(three[:2])
    with _sandbox(prefix.network):
        prefix.network.eval()
        again = prefix.extract(three)
    for key, row in rows.items():
        scale = row.abs().max() * 1e-2  # kernels may round differently for another batch size, never by a hundredth
        if not bool((row - again[key]).abs().max() <= scale):
            return f"the features {key!r} are not the same in train and in eval mode"
        if not bool((row[:2] - fewer[key]).abs().max() <= scale):
            return f"the features {key!r} of an image depend on the other images of the batch"
    return ""


def _probe(network: nn.Module, run: Run, x: Tensor, evaluate: bool) -> dict[str, Tensor | None]:
    """Outputs and gradients of one forward and backward that leaves no trace."""
    with _sandbox(network), torch.set_grad_enabled(not evaluate):
        if evaluate:
            network.eval()
        output = run(x)
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        found: dict[str, Tensor | None] = {f"output {i}": tensor.detach().clone() for i, tensor in enumerate(tensors)}
        if not evaluate:
            trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
            gradients = torch.autograd.grad(_loss(output), list(trainable.values()), allow_unused=True)
            found |= {f"gradient of {name}": g for name, g in zip(trainable, gradients, strict=True)}
        return found


def _loss(output: Any) -> Tensor:
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    # Unequal weights: with equal ones the gradient vanishes behind a softmax or a normalisation.
    weighted = [leaf.float().flatten() @ torch.linspace(-1, 2, leaf.numel(), device=leaf.device) for leaf in leaves]
    return torch.stack(weighted).sum()


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _within(plain: Tensor | None, again: Tensor | None, replayed: Tensor | None) -> bool:
    """Whether replay differs no more from a plain run than a few times what two plain runs differ."""
    if plain is None or again is None or replayed is None or plain.shape != replayed.shape:
        return False
    noise = (plain - again).abs().max()
    return bool(noise > 0) and bool((plain - replayed).abs().max() <= 4 * noise)


@contextlib.contextmanager
def _sandbox(network: nn.Module) -> Iterator[None]:
    """Put modes, buffers and the random state back. Attention biases cached in eval mode are dropped, graph and all."""
    modes = [(module, module.training) for module in network.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in network.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]

    def restore_modes() -> None:
        torch.clear_autocast_cache()  # older torch (not 2.15) would re-use weights cast without a graph
        network.train()  # the caches of such models are emptied by their train()
        for module, mode in modes:
            module.training = mode

    devices = {p.device.index or 0 for p in network.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        restore_modes()
        try:
            yield
        finally:
            restore_modes()
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer.copy_(value)


class _Patches:
    """Methods replaced on the instances, ``(module, method, original -> replacement)``; what was there comes back.

    A context that is opened and closed with every batch: hence no generator, and the modules are looked up once.
    """

    def __init__(
        self, patches: Iterable[tuple[nn.Module, str, Callable[[Callable[..., Any]], Callable[..., Any]]]]
    ) -> None:
        self._patches = tuple(patches)
        self._before: list[tuple[dict[str, Any], str, Any]] = []

    @property
    def is_open(self) -> bool:
        return bool(self._before)

    def __enter__(self) -> None:
        for module, method, wrap in self._patches:
            replacement = wrap(getattr(module, method))
            self._before.append((module.__dict__, method, module.__dict__.get(method, _MISSING)))
            module.__dict__[method] = replacement

    def __exit__(self, *_: object) -> None:
        while self._before:
            own, method, previous = self._before.pop()
            if previous is _MISSING:
                del own[method]
            else:
                own[method] = previous


def _nothing(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this shape that takes the memory of one number: NaN, or zero where there is no NaN."""
    empty = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full((), empty, dtype=dtype, device=device).expand(*shape)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_unchanged(tensor: Tensor, original: Tensor, version: int) -> bool:
    """Whether ``tensor`` is the original, or a copy of it, and nobody wrote into the original since."""
    same = tensor.data_ptr() == original.data_ptr() and tensor.stride() == original.stride()
    return _version(original) == version and (same or torch.equal(tensor, original.to(tensor.dtype)))


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _key(calls: Sequence[_Call], call: int, leaf: int) -> str:
    """Name of a stored tensor: the module, then which call and which output where there is more than one."""
    name = calls[call].name
    repeat = sum(earlier.name == name for earlier in calls[:call])
    tensors = len(calls[call].leaves)
    return (name or "network") + (f"-call{repeat}" if repeat else "") + (f"-output{leaf}" if tensors > 1 else "")
