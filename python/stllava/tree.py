"""Prefix trees: token sequences that begin alike are computed once.

A DPO pair is one prefix with two branches, an image with twelve questions one prefix with twelve branches, a batch under one
template one system text with many images below it. All of these are the same thing: a radix tree over the tokens of the
sequences. Two tokens are the same when id, label and (for an image position) image agree, so a branch never inherits a target
it does not have. The result is what :class:`stllava_c.Batch` takes (design: "prefix trees").
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

__all__ = ["Sequence", "TreeBatch", "build_trees"]


@dataclass(slots=True)
class Sequence:
    """One training, scoring or prompt sequence.

    Args:
        ids: (n,) token ids; ``-200`` stands for one image.
        labels: (n,) token ids or ``-100``; None: no targets.
        images: one key per ``-200`` in order; equal keys mean the same picture.
        sample: dropout key; a shared row takes the key of the first sequence through it.
    """

    ids: Seq[int] | np.ndarray
    labels: Seq[int] | np.ndarray | None = None
    images: tuple[Hashable, ...] = ()
    sample: int = 0


@dataclass(slots=True)
class TreeBatch:
    """Arrays of one packed batch, as :class:`stllava_c.Batch` takes them.

    ``order[i]`` is the sequence (leaf) number of input sequence ``i``; ``image_keys[j]`` is the picture the core knows as image ``j``.
    """

    parent: NDArray[np.int32]
    begin: NDArray[np.int64]
    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    sample: NDArray[np.uint64]
    image: NDArray[np.int32]
    image_keys: list[Hashable]
    order: NDArray[np.int32]

    @property
    def n_tokens(self) -> int:
        """Tokens after sharing, before images are expanded."""
        return int(self.begin[-1])

    def core_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``stllava_c.Batch`` besides the model."""
        return dict(parent=self.parent, begin=self.begin, ids=self.ids, labels=self.labels, sample=self.sample, image=self.image,
                    n_images=len(self.image_keys))


@dataclass(slots=True)
class _Node:
    """A run of tokens [begin, end) of input sequence `source`, and what follows it."""

    source: int
    begin: int
    end: int
    children: dict[int, _Node] = field(default_factory=dict)
    leaves: list[_Node] = field(default_factory=list)
    sequence: int = -1


def build_trees(sequences: Iterable[Sequence], *, share: bool = True, groups: Seq[Hashable] | None = None) -> TreeBatch:
    """Packs sequences into trees.

    Args:
        sequences: at least one; none empty.
        share: merge common prefixes; False makes every sequence a tree of its own.
        groups: with sharing, one key per sequence: only sequences of one group share.

    Raises:
        ValueError: an empty sequence, labels of another length, or image markers that do not match the images (the sequence is named).
    """
    items = list(sequences)
    if not items:
        raise ValueError("build_trees: no sequences given")
    image_number: dict[Hashable, int] = {}
    ids, labels, images, keys = zip(*(_read(i, item, image_number) for i, item in enumerate(items)), strict=True)

    roots: dict[Hashable, _Node] = {}
    for i, key in enumerate(keys):
        group = (i if not share else None if groups is None else groups[i])
        _insert(roots.setdefault(group, _Node(i, 0, 0)), i, key, keys)

    parent: list[int] = []
    pieces: list[tuple[int, int, int]] = []
    order = np.zeros(len(items), np.int32)
    n_leaves = 0
    for root in roots.values():
        stack = [(child, -1) for child in reversed(_below(root))]
        while stack:
            node, above = stack.pop()
            number = len(parent)
            parent.append(above)
            pieces.append((node.source, node.begin, node.end))
            below = _below(node)
            if not below:
                order[node.sequence] = n_leaves
                n_leaves += 1
            stack.extend((child, number) for child in reversed(below))
    return TreeBatch(
        parent=np.array(parent, np.int32),
        begin=np.concatenate(([0], np.cumsum([end - begin for _, begin, end in pieces]))).astype(np.int64),
        ids=np.concatenate([ids[s][b:e] for s, b, e in pieces]),
        labels=np.concatenate([labels[s][b:e] for s, b, e in pieces]),
        sample=np.array([items[s].sample for s, _, _ in pieces], np.uint64),
        image=np.concatenate([images[s][b:e][ids[s][b:e] == IMAGE_TOKEN_INDEX] for s, b, e in pieces]).astype(np.int32),
        image_keys=list(image_number),
        order=order,
    )


def _below(node: _Node) -> list[_Node]:
    return [*node.children.values(), *node.leaves]


def _read(i: int, item: Sequence, image_number: dict[Hashable, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """ids, labels, image per token, and one 64-bit key per token that is equal exactly when all three are."""
    ids = np.asarray(item.ids, np.int32)
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError(f"sequence {i}: ids must be a non-empty list of token ids, got shape {ids.shape}")
    labels = np.full(ids.size, IGNORE_INDEX, np.int32) if item.labels is None else np.asarray(item.labels, np.int32)
    if labels.shape != ids.shape:
        raise ValueError(f"sequence {i}: {labels.size} labels for {ids.size} ids; there must be one label per id")
    marks = np.flatnonzero(ids == IMAGE_TOKEN_INDEX)
    if marks.size != len(item.images):
        raise ValueError(f"sequence {i}: {marks.size} image markers (-200) but {len(item.images)} images; give one image per marker")
    image = np.full(ids.size, -1, np.int32)
    image[marks] = [image_number.setdefault(key, len(image_number)) for key in item.images]
    # ids and labels lie in [-200, 2**24); images below 2**15: three fields of one integer
    key = (ids.astype(np.int64) + 256) | (labels.astype(np.int64) + 256) << 24 | (image.astype(np.int64) + 1) << 48
    return ids, labels, image, key


def _insert(node: _Node, i: int, key: np.ndarray, keys: Seq[np.ndarray]) -> None:
    """Walks down as far as sequence i agrees. Its last token is never shared, so that every sequence ends in a leaf of its own."""
    at, last = 0, key.size - 1
    while True:
        child = node.children.get(int(key[at])) if at < last else None
        if child is None:
            leaf = _Node(i, at, key.size, sequence=i)
            if at < last and int(key[at]) not in node.children:
                node.children[int(key[at])] = leaf
            else:
                node.leaves.append(leaf)
            return
        # a leaf keeps its own last token too
        end = child.end - 1 if child.sequence >= 0 else child.end
        n = min(end - child.begin, last - at)
        differs = np.flatnonzero(keys[child.source][child.begin:child.begin + n] != key[at:at + n])
        common = int(differs[0]) if differs.size else n
        if common == 0:
            node.leaves.append(_Node(i, at, key.size, sequence=i))
            return
        if common < child.end - child.begin:
            _split(node, child, common, keys)
            child = node.children[int(key[at])]
        node, at = child, at + common


def _split(node: _Node, child: _Node, common: int, keys: Seq[np.ndarray]) -> None:
    """Puts a node holding the first `common` tokens of child between node and child."""
    middle = _Node(child.source, child.begin, child.begin + common)
    node.children[int(keys[child.source][child.begin])] = middle
    child.begin += common
    if child.sequence >= 0 and child.end - child.begin == 1:
        middle.leaves.append(child)
    else:
        middle.children[int(keys[child.source][child.begin])] = child
