"""Prefix trees: every sequence is recovered from its path, nothing is shared that differs, everything else is shared."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from stllava.tree import Sequence, build_trees


def paths(batch):
    """(ids, labels, images) of each leaf, in leaf order."""
    parent, begin = batch.parent, batch.begin
    leaves = [s for s in range(len(parent)) if s not in set(parent.tolist())]
    mark = np.cumsum(batch.ids == -200) - 1
    found = []
    for leaf in leaves:
        chain = []
        while leaf >= 0:
            chain.append(leaf)
            leaf = parent[leaf]
        rows = np.concatenate([np.arange(begin[s], begin[s + 1]) for s in reversed(chain)])
        images = tuple(batch.image_keys[batch.image[mark[r]]] for r in rows if batch.ids[r] == -200)
        found.append((batch.ids[rows].tolist(), batch.labels[rows].tolist(), images))
    return found


token = st.integers(0, 2)
sequence = st.lists(st.tuples(token, st.sampled_from([-100, 1]), st.sampled_from([None, None, None, "a", "b"])), min_size=1, max_size=7)


@settings(max_examples=300, deadline=None)
@given(st.lists(sequence, min_size=1, max_size=8), st.booleans())
def test_paths_are_the_sequences(rows, share):
    items = [Sequence([-200 if im else t for t, _, im in row], [la for _, la, _ in row], tuple(im for *_, im in row if im), sample=i)
             for i, row in enumerate(rows)]
    batch = build_trees(items, share=share)
    found = paths(batch)
    assert sorted(batch.order.tolist()) == list(range(len(items)))
    for i, item in enumerate(items):
        assert found[batch.order[i]] == (list(item.ids), list(item.labels), item.images)
    # parents come first, trees lie one after another
    for s, p in enumerate(batch.parent):
        assert p < s
    if not share:
        assert batch.n_tokens == sum(len(r) for r in rows) and (batch.parent == -1).all()


def test_everything_common_is_shared_at_any_depth():
    system, image = [1, 2, 3], [-200, 4]
    items = [Sequence(system + image + q + a, [-100] * (5 + len(q)) + a, ("x",)) for q in ([5, 6], [5, 7]) for a in ([8, 9], [8, 10])]
    batch = build_trees(items)
    # system+image+5 | 6, 7 | 8 | 9, 10 under each
    assert batch.n_tokens == 6 + 2 + 2 + 4
    assert batch.image_keys == ["x"] and batch.image.tolist() == [0]


def test_different_labels_or_images_are_not_shared():
    assert build_trees([Sequence([1, 2, 3], [-100, 2, 3]), Sequence([1, 2, 4], [-100, -100, 4])]).n_tokens == 5
    assert build_trees([Sequence([1, -200, 3], images=("a",)), Sequence([1, -200, 3], images=("b",))]).n_tokens == 5


def test_equal_sequences_and_prefixes_keep_leaves_of_their_own():
    batch = build_trees([Sequence([1, 2, 3]), Sequence([1, 2, 3]), Sequence([1, 2]), Sequence([1])])
    assert batch.n_tokens == 2 + 1 + 1 + 1 + 1
    assert sorted(batch.order.tolist()) == [0, 1, 2, 3]


def test_groups_limit_sharing():
    items = [Sequence([1, 2, 3]), Sequence([1, 2, 4]), Sequence([1, 2, 5])]
    assert build_trees(items, groups=["a", "a", "b"]).n_tokens == 4 + 3


@pytest.mark.parametrize("items, message", [
    ([], "no sequences"),
    ([Sequence([1]), Sequence([])], "sequence 1: ids"),
    ([Sequence([1, 2], [1])], "sequence 0: 1 labels for 2 ids"),
    ([Sequence([1, -200])], "1 image markers .* but 0 images"),
])
def test_bad_input(items, message):
    with pytest.raises(ValueError, match=message):
        build_trees(items)
