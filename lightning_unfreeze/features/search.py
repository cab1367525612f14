"""Where the freeze boundary of a network lies: found by watching a forward, checked against the plain one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_unfreeze.features.calls import Call, Leaf, numbered
from lightning_unfreeze.features.patches import Patches, Stop, untouched
from lightning_unfreeze.features.prefix import FrozenPrefix, Run, version_of
from lightning_unfreeze.layers.modes import mode_problem
from lightning_unfreeze.seeding import keyed_rng

_PLAIN_TYPES = (int, float, str, type(None), torch.Size, torch.dtype, torch.device)
_ENTRY_METHODS = ("forward_", "extract_features", "encode_image", "get_image_features")


class RefusedError(Exception):
    """There is no frozen prefix; the message says why."""


class PrefixSearch(NamedTuple):
    """What `find_prefix` found; ``reason`` says why the deepest boundary does not hold, and is empty when it does."""

    prefix: FrozenPrefix | None
    reason: str


def find_prefix(
    network: nn.Module, images: Tensor, run: Run | None = None, *, as_they_are: bool = True
) -> PrefixSearch:
    """Find the deepest freeze boundary at which extract and replay equal the plain forward.

    Frozen is what has ``requires_grad=False``; modules before the boundary have to be in eval mode. Nothing of the
    network changes: modes, buffers and the random state are put back.

    Args:
        network: Any module; a `LightningModule` as well.
        images: ``(B, C, H, W)``, real ones, on the network's device. The search runs on three, the check on all.
        run: How the network is called, ``network`` itself by default, e.g. ``lambda x: model.forward_head(...)`` or a
            training step without its logging. It has to take any batch size.
        as_they_are: Features may stand where the images stood, for a module that is handed the images as they are.

    Returns:
        ``(prefix, reason)``: prefix None, with the module and the reason, when no boundary holds.
    """
    run = run or network
    three = images[torch.arange(3) % len(images)]
    if len(images) < 3:
        images = three
    try:
        with untouched(network):
            entries, calls = _learn_calls(network, run, three)
        entries = entries if as_they_are else []
        ends, reason = _ends(network, calls)
        changed = None if entries else _changed_on_the_way(network, run, three, calls[0].name)
    except RefusedError as refused:
        return PrefixSearch(None, str(refused))
    raised = False
    for end in ends:
        try:
            given = (network, run, three, entries, calls[: end + 1])
            prefix = FrozenPrefix(*given, _leaves_read(*given, changed), changed)
            problem = _rows_problem(prefix, three) or verify(prefix, images)
        except Exception as error:  # whatever the user's forward raises on placeholders is a reason not to replay it
            problem, raised = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", True
        if not problem:
            return PrefixSearch(prefix, reason)
        reason = reason or f"{calls[end].name!r} is no freeze boundary: {problem}"
    if entries and raised and as_they_are:  # the step does something with images that features do not bear
        return find_prefix(network, images, run, as_they_are=False)
    return PrefixSearch(None, reason)


def verify(
    prefix: FrozenPrefix, images: Tensor, modes: Sequence[Literal["training", "eval mode"]] = ("training", "eval mode")
) -> str:
    """Compare prefix and rest with the plain forward: outputs, gradients of all that trains, outputs in eval mode.

    The first in the network's present modes from the same random state. Equal means bitwise equal; where two plain runs
    differ among themselves (atomic additions of some GPU kernels), equal up to that.

    Returns:
        The reason why it does not hold; empty when it does.
    """
    writes_in_place, run, network = False, prefix._run, prefix.network
    features = prefix.extract(images)  # once: the modes of the prefix are its own in both
    for mode in modes:
        evaluate = mode == "eval mode"
        plain = _probe(network, run, images, evaluate)
        with prefix.replay(features) as packed:
            replayed = _probe(network, run, packed, evaluate)
            writes_in_place |= any(version_of(tensor) != version for tensor, version in prefix._handed_on)
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
            return f"the {differing[0]} in {mode} is not that of the plain forward ({why})"
    prefix._writes_in_place = writes_in_place
    return ""


def _learn_calls(network: nn.Module, run: Run, three: Tensor) -> tuple[list[tuple[str, str]], list[Call]]:
    """The methods that take the images and the calls before the first trainable use, from batches of two and three."""
    (entries, seen_two), (_, seen_three) = (_trace(network, run, batch) for batch in (three[:2], three))
    if [name for name, _ in seen_two] != [name for name, _ in seen_three]:
        raise RefusedError("the network calls other modules for three images than for two")
    calls: list[Call] = []
    for (name, two), (_, three_output) in zip(seen_two, seen_three, strict=True):
        (leaves_two, tree), (leaves_three, _) = tree_flatten(two), tree_flatten(three_output)
        try:
            leaves = tuple(_learn_leaf(a, b) for a, b in zip(leaves_two, leaves_three, strict=True))
        except RefusedError as refused:
            if not calls:
                raise RefusedError(f"{name!r} {refused}") from None
            break
        calls.append(Call(name, tree, leaves))
    return entries, calls


def _learn_leaf(two: Any, three: Any) -> Leaf:
    if isinstance(two, Tensor) and isinstance(three, Tensor) and two.ndim == three.ndim:
        if two.shape == three.shape and torch.equal(two, three):
            return Leaf(two.detach())
        per_image = [c - b for b, c in zip(two.shape, three.shape, strict=True)]
        dims = tuple((size - 2 * k, k) for size, k in zip(two.shape, per_image, strict=True))
        strides = two.stride()
        return Leaf(dims=dims, dtype=two.dtype, order=tuple(sorted(range(two.ndim), key=lambda i: -strides[i])))
    if isinstance(two, _PLAIN_TYPES) and two == three:
        return Leaf(two)
    raise RefusedError(f"returns {type(two).__name__} objects, or values that change with the batch size")


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
            raise Stop
        if any(tensor.shape == images.shape and torch.equal(tensor, images) for tensor in tensors):
            entries[name, method] = None
        outermost = method == "forward" and name in frozen
        inside = outermost
        try:
            output = original(*args, **kwargs)
        finally:
            inside = inside and not outermost
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output)):
            raise Stop
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
    with torch.enable_grad(), Patches(watched):
        try:
            run(images)
        except Stop:
            return list(entries), calls
    if run is network and not any(p.requires_grad for p in network.parameters()):
        return list(entries), calls  # a tower that is frozen as a whole, with what trains outside of it
    raise RefusedError("nothing that the network computes depends on a trainable parameter")


def _entry_methods(kind: type[nn.Module]) -> list[str]:
    return [name for name in dir(kind) if name.startswith(_ENTRY_METHODS) and callable(getattr(kind, name))]


def _changed_on_the_way(network: nn.Module, run: Run, three: Tensor, first: str) -> Tensor:
    """What the step makes of placeholder images 0 and 1 before the first call: ``(2, ...)``.

    Raises:
        RefusedError: When that depends on the other images of the batch, or on a draw.
    """
    probe = numbered(3, three.shape[1:], three.dtype, three.device)
    seen: list[Tensor] = []

    def take(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seen.extend(t.detach().clone() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        raise Stop

    patch = [(network.get_submodule(first), "forward", partial(partial, take))]
    made = []
    for draw, size in enumerate((3, 2, 3, 3, 3)):
        with untouched(network), torch.no_grad(), keyed_rng("on the way", draw), Patches(patch), suppress(Stop):
            run(probe[:size])
        made += [tensor for tensor in seen if tensor.ndim and len(tensor) == size][:1]
        seen.clear()
    one = made[0] if made else None
    rows = [(0, 1, 0)[:size] for size in (3, 2, 3, 3, 3)]
    if (
        one is None
        or len(made) < len(rows)
        or not all(torch.equal(m, one[list(r)]) for m, r in zip(made, rows, strict=True))
    ):
        raise RefusedError("no module is handed the images as they are: something changes them on their way")
    return made[0][:2]


def _ends(network: nn.Module, calls: Sequence[Call]) -> tuple[list[int], str]:
    """Indices of the calls at which the prefix may end, deepest first; and why there is none that lies deeper.

    The deepest is the last one with weights, or one behind it that makes the features smaller (a global pool). A module
    that is not in eval mode ends the prefix before it: it is run as it is.

    Raises:
        RefusedError: When there is none.
    """
    modules = [network.get_submodule(call.name) for call in calls]
    weighted = [i for i, module in enumerate(modules) if any(True for _ in module.parameters())]
    if not weighted:
        raise RefusedError("no module with frozen parameters finishes before the first trainable one is used")
    reason = ""
    for i, (call, module) in enumerate(zip(calls[: weighted[-1] + 1], modules, strict=False)):
        reason = mode_problem(call.name, module)
        if reason:
            weighted = [index for index in weighted if index < i]
            break
    if not weighted:
        raise RefusedError(reason)
    last, smallest = weighted[-1], _size(calls[weighted[-1]])
    for i in range(last + 1, len(calls)):
        if reason or mode_problem(calls[i].name, modules[i]):
            break
        if 0 < _size(calls[i]) < smallest:
            last, smallest = i, _size(calls[i])
    return [*([last] if last > weighted[-1] else []), *range(weighted[-1], weighted[0] - 1, -1)], reason


def _size(call: Call) -> int:
    return sum(torch.Size(leaf.shape).numel() for leaf in call.leaves if leaf.batch_dim is not None)


def _leaves_read(
    network: nn.Module,
    run: Run,
    three: Tensor,
    entries: Sequence[tuple[str, str]],
    calls: Sequence[Call],
    changed: Tensor | None,
) -> list[tuple[int, int]]:
    """Which leaves of the calls are read behind the last of them: those that get a gradient if each asks for one."""
    candidates = [
        (i, j) for i, call in enumerate(calls) for j, leaf in enumerate(call.leaves) if leaf.batch_dim is not None
    ]
    if not candidates:
        raise RefusedError("no output has a batch dimension")

    class Reader(FrozenPrefix):
        def unpack(self, packed: Tensor) -> dict[str, Tensor]:
            return {key: clones[key].clone() if torch.is_grad_enabled() else clones[key] for key in clones}

    reader = Reader(network, run, three, entries, calls, candidates, changed)
    leaves = {
        key: torch.ones(3, *shape, dtype=reader.dtypes[key], device=three.device, requires_grad=True)
        for key, shape in reader.shapes.items()
    }
    # Forwards may write in place, which leaves of a graph do not allow; the user may run the backbone without a graph.
    clones = {key: leaf.clone() for key, leaf in leaves.items()}
    reader.install()
    try:
        with untouched(network), torch.enable_grad():
            loss = _loss(run(reader.stand_in(torch.zeros(3, *reader.packed_shape, device=three.device))))
            gradients = _gradients(loss, list(leaves.values()))
    finally:
        reader.remove()
    read = [place for place, gradient in zip(candidates, gradients, strict=True) if gradient is not None]
    # None is read by way of the graph: detached features. Then those of the last call, as a guess that is verified.
    return read or [place for place in candidates if place[0] == candidates[-1][0]]


def _rows_problem(prefix: FrozenPrefix, three: Tensor) -> str:
    """Features must not depend on the other images of the batch, nor on the modes and the random state."""
    rows = prefix.extract(three)
    fewer = prefix.extract(three[:2])
    with untouched(prefix.network):
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
    with untouched(network), torch.set_grad_enabled(not evaluate):
        if evaluate:
            network.eval()
        output = run(x)
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        found: dict[str, Tensor | None] = {f"output {i}": tensor.detach().clone() for i, tensor in enumerate(tensors)}
        if not evaluate:
            trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
            gradients = _gradients(_loss(output), list(trainable.values())) if trainable else []
            found |= {f"gradient of {name}": g for name, g in zip(trainable, gradients, strict=True)}
        return found


def _gradients(loss: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Of a loss; by a backward pass where a reentrant checkpoint refuses `autograd.grad`."""
    try:
        return torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
    kept = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return [leaf.grad for leaf in leaves]
    finally:
        for leaf, grad in zip(leaves, kept, strict=True):
            leaf.grad = grad


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
