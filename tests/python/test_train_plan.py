"""Step counts, order and leftovers: against transformers' formulas, and as pure functions of (settings, step)."""

import math

import pytest

from stllava.errors import ConfigError
from stllava.train.plan import Plan


def plan(n=10, batch=2, accumulation=2, epochs=3.0, max_steps=-1, seed=0, **kw):
    return Plan(n, batch, accumulation, epochs, max_steps, seed, **kw)


@pytest.mark.parametrize("n, batch, accumulation, epochs", [(10, 2, 2, 3), (10, 3, 2, 1), (7, 2, 4, 2), (3, 2, 8, 2.5), (1, 1, 1, 1), (100, 8, 4, 1.5)])
def test_step_counts(n, batch, accumulation, epochs):
    micro = math.ceil(n / batch)
    old, new = plan(n, batch, accumulation, epochs, hf_compat="4.31"), plan(n, batch, accumulation, epochs)
    assert old.total_steps == math.ceil(epochs * max(micro // accumulation, 1))
    assert new.total_steps == math.ceil(epochs * math.ceil(micro / accumulation))


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
