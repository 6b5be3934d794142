"""Step counts, order and leftovers: against transformers' formulas and what it counted, and as pure functions of (settings, step)."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from stllava.errors import ConfigError
from stllava.train.plan import Plan

RECORDED = json.loads((Path(__file__).parents[1] / "recorded" / "schedules.json").read_text())["plans"]


def plan(n=10, batch=2, accumulation=2, epochs=3.0, max_steps=-1, seed=0, **kw):
    return Plan(n, batch, accumulation, epochs, max_steps, seed, **kw)


@pytest.mark.parametrize("n, batch, accumulation, epochs", [(10, 2, 2, 3), (10, 3, 2, 1), (7, 2, 4, 2), (3, 2, 8, 2.5), (1, 1, 1, 1), (100, 8, 4, 1.5)])
def test_step_counts(n, batch, accumulation, epochs):
    micro = math.ceil(n / batch)
    old, new = plan(n, batch, accumulation, epochs, hf_compat="4.31"), plan(n, batch, accumulation, epochs)
    assert old.total_steps == math.ceil(epochs * max(micro // accumulation, 1))
    assert new.total_steps == math.ceil(epochs * math.ceil(micro / accumulation))


def test_step_counts_of_transformers():
    assert len(RECORDED) >= 10
    for case in RECORDED:
        p = plan(case["n"], case["batch"], case["accumulation"], case["epochs"], drop_last=case["drop_last"])
        assert [p.steps_per_epoch, p.total_steps] == case["steps"], case


@pytest.mark.parametrize("hf_compat", ["4.31", "latest"])
def test_drop_last_leaves_out_what_fills_no_batch(hf_compat):
    p = plan(n=11, batch=3, accumulation=2, drop_last=True, hf_compat=hf_compat)
    assert all(len(micro) == 3 for step in range(p.total_steps) for micro in p.update(step))
    with pytest.raises(ConfigError, match="fill no batch"):
        plan(n=2, batch=3, drop_last=True)


def items(p, epoch):
    per_epoch = p.steps_per_epoch
    return [[[i for i, _ in micro] for micro in p.update(step)] for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)]


def test_modalities_are_not_mixed_in_an_update():
    """LLaVA's sampler: whole updates of one kind, in random order; what fills none comes last."""
    rng = np.random.default_rng(0)
    lengths = [int(n) * (1 if i % 3 else -1) for i, n in enumerate(rng.integers(5, 300, 100))]
    p = plan(100, 4, 3, grouping="modality_length", lengths=lengths)
    updates = items(p, 0)
    kinds = [{lengths[i] > 0 for micro in update for i in micro} for update in updates]
    n_whole = 66 // 12 + 34 // 12
    assert all(len(kind) == 1 for kind in kinds[:n_whole]) and {True} in kinds[:n_whole] and {False} in kinds[:n_whole]
    assert sorted(i for update in updates for micro in update for i in micro) == list(range(100))
    rest = [i for update in updates[n_whole:] for micro in update for i in micro]
    assert rest == sorted(rest) and len(rest) == 100 - 12 * n_whole
    assert items(p, 1) != updates == items(plan(100, 4, 3, grouping="modality_length", lengths=lengths), 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_data_of_one_modality_is_grouped_by_length(sign):
    """The original crashes on data in which every sample has a picture (notes 1a)."""
    lengths = [sign * n for n in (40, 10, 30, 20, 25, 15, 35, 5)]
    [update] = items(plan(8, 2, 4, 1.0, grouping="modality_length", lengths=lengths), 0)
    assert sorted(sum(abs(lengths[i]) for i in micro) for micro in update) == [45, 45, 45, 45]
    assert sorted(i for micro in update for i in micro) == list(range(8))


def test_group_by_length_makes_even_batches_and_starts_with_the_longest():
    lengths = np.random.default_rng(1).integers(1, 1000, 400).tolist()

    def spread(p):
        batches = [[lengths[i] for i in micro] for update in items(p, 0) for micro in update]
        return np.mean([max(batch) - min(batch) for batch in batches]), batches[0]

    grouped, first = spread(plan(400, 4, 1, grouping="length", lengths=lengths))
    assert max(lengths) in first and grouped < spread(plan(400, 4, 1))[0] / 5
    assert sorted(i for update in items(plan(9, 2, 3, grouping="length", lengths=lengths[:9]), 2) for micro in update for i in micro) == list(range(9))


def test_grouping_needs_lengths():
    with pytest.raises(ConfigError, match="how long its 10 samples are"):
        plan(grouping="length")


def test_latest_makes_a_smaller_update_of_what_is_left():
    p = plan(n=10, batch=2, accumulation=2)  # five micro-batches: 2 + 2 + 1
    assert [len(p.update(s)) for s in range(6)] == [2, 2, 1, 2, 2, 1]
    for epoch in range(2):
        seen = [item for s in range(3 * epoch, 3 * epoch + 3) for micro in p.update(s) for item, e in micro if e == epoch]
        assert sorted(seen) == list(range(10))


def test_431_carries_what_is_left_into_the_next_epoch():
    p = plan(n=10, batch=2, accumulation=2, hf_compat="4.31")
    assert [len(p.update(s)) for s in range(p.total_steps)] == [2] * 6
    epochs = [e for s in range(3) for micro in p.update(s) for _, e in micro]
    assert epochs == [0] * 10 + [1] * 2


def test_order_depends_on_seed_and_epoch_only():
    a, b, other = plan(n=50), plan(n=50), plan(n=50, seed=1)
    assert a.update(7) == b.update(7) and a.update(0) != other.update(0)
    assert [i for m in a.update(0) for i, _ in m] != [i for m in a.update(a.steps_per_epoch) for i, _ in m]
    assert plan(n=4, shuffle=False).update(0) == [[(0, 0), (1, 0)], [(2, 0), (3, 0)]]


def test_max_steps_wins_and_epochs_go_on():
    p = plan(max_steps=100)
    assert p.total_steps == 100 and p.update(99)


def test_empty_set_is_an_error():
    with pytest.raises(ConfigError, match="empty"):
        plan(n=0)
