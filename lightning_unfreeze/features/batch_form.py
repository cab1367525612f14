"""How a user's batch is built: where the images are, and what lies beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# torch 2.6 has no public pytree; guarded by `test_batch_form__keeps_the_form_of_the_users_batch`
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

_LEAST_TEXT_BYTES = 256


class NoStoreError(Exception):
    """The data cannot be served from a store; the message says why."""


class BatchForm:
    """Takes a collated batch apart into images and named tensors beside them, and puts it together again.

    Args:
        batch: A batch as the step gets it. Its first floating point tensor `(B, C, H, W)` is the images, or its first
            one of `uint8`; all else has to come one per image: tensors, or lists of strings, which are kept as UTF-8
            bytes. None stays None.

    Raises:
        NoStoreError: If something in it does not come one per image.

    >>> form = BatchForm({"image": torch.zeros(2, 3, 8, 8), "path": ["a", "b"]})
    >>> images, beside = form.split({"image": torch.ones(2, 3, 8, 8), "path": ["c", "d"]})
    >>> form.join(torch.zeros(2, 5), beside)["path"]
    ['c', 'd']
    """

    def __init__(self, batch: Any) -> None:
        leaves, self._tree = _flatten(batch)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim == 4]
        floating = [i for i in places if leaves[i].is_floating_point()]
        images = floating or [i for i in places if leaves[i].dtype == torch.uint8]
        if not images:
            raise NoStoreError("the batch has no floating point or uint8 tensor (B, C, H, W) that would be the images")
        self._image = images[0]
        self._nones = {i for i, leaf in enumerate(leaves) if leaf is None}
        self._texts: dict[int, tuple[int, type]] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, _Texts) and len(leaf) == len(leaves[self._image]):
                longest = max(len(text.encode()) for text in leaf)
                self._texts[i] = (max(_LEAST_TEXT_BYTES, 4 * longest), leaf.kind)
            elif i in self._nones:
                continue
            elif not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != len(leaves[self._image]):
                what = f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)[:60]
                raise NoStoreError(f"the batch holds {what}, which does not come one per image")

    @property
    def text_names(self) -> frozenset[str]:
        """Names under which `split` gives texts: bytes, which Python reads."""
        return frozenset(f"beside_{i}" for i in self._texts)

    def split(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The images `(B, C, H, W)`, and everything else as named tensors `(B, *)`."""
        leaves, tree = _flatten(batch)
        if tree != self._tree or {i for i, leaf in enumerate(leaves) if leaf is None} != self._nones:
            raise NoStoreError("the batches differ in their form")
        beside = {}
        for i, leaf in enumerate(leaves):
            if i in self._texts:
                beside[f"beside_{i}"] = _encode(leaf, self._texts[i][0])
            elif i != self._image and i not in self._nones:
                beside[f"beside_{i}"] = leaf
        return leaves[self._image], beside

    def images(self, batch: Any) -> Tensor:
        """The images, or what took their place."""
        image: Tensor = tree_leaves(_mark_texts(batch))[self._image]
        return image

    def join(self, images: Tensor, beside: Mapping[str, Tensor]) -> Any:
        """A batch of the user's form with `images` (or features) where the images are."""
        leaves: list[Any] = []
        for i in range(self._tree.num_leaves):
            if i == self._image:
                leaves.append(images)
            elif i in self._nones:
                leaves.append(None)
            elif i in self._texts:
                leaves.append(self._texts[i][1](_decode(beside[f"beside_{i}"])))
            else:
                leaves.append(beside[f"beside_{i}"])
        return tree_unflatten(leaves, self._tree)


class _Texts(list[str]):
    """Strings that were collated to a list or a tuple: one leaf, not one per string."""

    kind: type = list


def _flatten(batch: Any) -> tuple[list[Any], TreeSpec]:
    return tree_flatten(_mark_texts(batch))


def _mark_texts(value: Any) -> Any:
    if type(value) in (list, tuple) and value and all(isinstance(part, str) for part in value):
        texts = _Texts(value)
        texts.kind = type(value)
        return texts
    if type(value) in (list, tuple):
        return type(value)(_mark_texts(part) for part in value)
    if type(value) is dict:
        return {key: _mark_texts(part) for key, part in value.items()}
    return value


def _encode(texts: list[str], num_bytes: int) -> Tensor:
    rows = torch.zeros(len(texts), num_bytes, dtype=torch.uint8)
    for row, text in zip(rows, texts, strict=True):
        data = text.encode()
        if len(data) > num_bytes:
            raise NoStoreError(f"a text of {len(data)} bytes in the batch is much longer than the first ones")
        if data:
            row[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return rows


def _decode(rows: Tensor) -> list[str]:
    return [bytes(row.tolist()).rstrip(b"\0").decode() for row in rows]
