"""Intervals and tests of evaluations: exact values, known ones, and what must not change them."""

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from stllava.evaluate import is_attainable, mcnemar_exact, paired_bootstrap
from stllava.evaluate.statistics import all_or_none_interval, bootstrap_intervals, paired_test


def by_enumeration(only_a, only_b):
    """Every one of the 2^n equally likely outcomes that is no more even than the one found."""
    n = only_a + only_b
    extreme = sum(min(sum(signs), n - sum(signs)) <= min(only_a, only_b) for signs in product((0, 1), repeat=n))
    return float(Fraction(extreme, 2**n))


@pytest.mark.parametrize("only_a", range(7))
@pytest.mark.parametrize("only_b", range(7))
def test_mcnemar_by_enumeration(only_a, only_b):
    assert mcnemar_exact(only_a, only_b) == by_enumeration(only_a, only_b)


@pytest.mark.parametrize(("only_a", "only_b", "p"), [
    (0, 0, 1.0), (0, 5, 0.0625), (1, 5, 14 / 64), (5, 5, 1.0), (10, 2, 2 * (1 + 12 + 66) / 4096),
    (1, 7, 0.0703125)])  # airway hyper-responsiveness before and after, the example of Fagerland et al. 2013: 0.070
def test_mcnemar_known_values(only_a, only_b, p):
    assert mcnemar_exact(only_a, only_b) == mcnemar_exact(only_b, only_a) == p


@pytest.mark.parametrize(("only_a", "only_b"), [(25, 10), (101, 121), (59, 4), (300, 260)])
def test_mcnemar_is_the_sign_test(only_a, only_b):
    """All outcomes that are no likelier than the one found, as a two-sided binomial test adds them."""
    n = only_a + only_b
    no_likelier = sum(math.comb(n, k) for k in range(n + 1) if math.comb(n, k) <= math.comb(n, only_a))
    assert mcnemar_exact(only_a, only_b) == float(Fraction(no_likelier, 2**n))


def test_mcnemar_of_a_whole_test_set_is_exact_and_fast():
    n = 3391
    tail = sum(math.comb(n, k) for k in range(1601))
    assert mcnemar_exact(1600, n - 1600) == float(Fraction(2 * tail, 2**n))
    with pytest.raises(ValueError, match="below 0"):
        mcnemar_exact(-1, 3)


def test_interval_of_a_share_is_that_of_the_binomial():
    # 270 of 300: standard error 0.01732, so 86.6 to 93.4 by the normal approximation; two thousand draws give the ends to about 0.2 points
    [[low, high]] = bootstrap_intervals([1.0] * 270 + [0.0] * 30)
    assert low == pytest.approx(0.866, abs=0.006) and high == pytest.approx(0.934, abs=0.006)


@pytest.mark.parametrize("n", [1, 2, 20, 272])
def test_interval_of_none_right(n):
    """The share at which n misses in a row have a probability of 2.5 %."""
    assert (1 - all_or_none_interval(n)) ** n == pytest.approx(0.025)


def test_three_items_by_enumeration():
    """All 27 equally likely samples of three items: the quantiles of many draws are theirs."""
    values = [0.0, 1.0, 5.0]
    means = sorted(sum(sample) / 3 for sample in product(values, repeat=3))
    [[low, high]] = bootstrap_intervals(values, n=20000)
    assert (low, high) == (means[0], means[-1])  # each has probability 1/27, more than the 2.5 % of a tail
    [[low, high]] = bootstrap_intervals([0.0] * 3 + [1.0], n=20000)
    assert (low, high) == (0.0, 0.75)  # P(0) = .75^4 = .316; P(mean <= .5) = .949, P(mean <= .75) = .996


def test_columns_with_gaps_and_groups():
    nan = float("nan")
    table = [[1.0, nan], [0.0, 1.0], [1.0, 1.0], [nan, nan]]
    intervals = bootstrap_intervals(table)
    assert intervals.shape == (2, 2) and tuple(intervals[1]) == (1.0, 1.0)
    assert np.isnan(bootstrap_intervals([nan, nan])).all() and np.isnan(bootstrap_intervals(np.zeros((0, 3)))).all()
    # questions of one image that are all right or all wrong: as much is known as from one question each, and no more
    values, images = np.repeat([1.0, 0.0], 50), np.repeat(np.arange(10), 10)
    [[wide_low, wide_high]] = bootstrap_intervals(values, groups=images.tolist())
    [[low, high]] = bootstrap_intervals(values)
    [[single_low, single_high]] = bootstrap_intervals([1.0] * 5 + [0.0] * 5)
    assert wide_low == single_low < low and wide_high == single_high > high


@settings(max_examples=20)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=30), st.integers(0, 3))
def test_intervals_hold_the_mean_and_come_from_the_seed(values, seed):
    [[low, high]] = bootstrap_intervals(values, n=400, seed=seed)
    assert min(values) <= low <= high <= max(values)
    assert low <= np.mean(values) + 1e-9 and high >= np.mean(values) - 1e-9
    assert bootstrap_intervals(values, n=400, seed=seed).tolist() == [[low, high]]


def test_paired_test():
    better, worse = [1.0] * 60 + [0.0] * 40, [1.0] * 30 + [0.0] * 70
    found = paired_test(better, worse)
    assert found[:3] == paired_bootstrap(better, worse)
    assert found.p == 1 / 2001  # six standard errors from zero: no resampling comes that far
    assert paired_test(better, better) == (0.0, 0.0, 0.0, 1.0)
    mirrored = paired_test(worse, better)
    assert mirrored.p == found.p and mirrored.difference == -found.difference
    # one item in four differs, by chance to either side: p-values of no difference are spread evenly
    rng = np.random.default_rng(0)
    ps = np.array([paired_test(rng.choice([-1.0, 0.0, 0.0, 1.0], 200).tolist(), [0.0] * 200, n=400).p for _ in range(150)])
    assert 0.02 <= (ps <= 0.1).mean() <= 0.2  # 0.1 expected, standard error 0.025
    assert 0.35 <= (ps <= 0.5).mean() <= 0.65


@given(st.integers(1, 7000), st.data())
def test_every_share_is_attainable_and_no_other_rounds_to_one(n, data):
    k = data.draw(st.integers(0, n))
    assert is_attainable(round(100 * k / n, 2), n)
    if n <= 1000:
        assert not is_attainable(100 * (k + 0.5) / n, n)
    assert not is_attainable(100.5, n) and not is_attainable(float("nan"), n) and not is_attainable(50.0, 0)


def test_no_items_and_no_columns():
    for groups in (None, []):
        assert np.isnan(bootstrap_intervals(np.zeros((0, 2)), groups=groups)).all()
        assert bootstrap_intervals(np.zeros((0, 0)), groups=groups).shape == (0, 2)
