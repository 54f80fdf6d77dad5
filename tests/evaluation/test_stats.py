"""openhelix.benchmarks.evaluation.stats: intervals and paired tests."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openhelix.benchmarks.evaluation.stats import (
    chain_interval,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    paired_permutation,
    wilson,
)


def test_wilson_is_wilsons_formula():
    k, n, z = 7, 20, 1.959963984540054
    p = k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson(k, n) == pytest.approx((middle - half, middle + half), abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 300), st.data())
@settings(max_examples=40, deadline=None)
def test_a_wilson_interval_holds_the_rate_and_mirrors(n, data):
    k = data.draw(st.integers(0, n))
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1 and high > low
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_a_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    p = np.array([0.15, 0.2, 0.2, 0.15, 0.1, 0.2])
    truth = float(p @ np.arange(6))
    hits = 0
    for _ in range(120):
        low, high = mean_interval(rng.choice(6, 40, p=p).tolist())
        hits += low <= truth <= high
    assert hits >= 0.86 * 120


def test_the_same_values_give_the_same_interval():
    values = [0, 5, 3, 1, 2, 2, 4]
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval([2, 2, 2]) == (2, 2)


def test_chains_that_are_all_alike_are_not_certain():
    low, high = chain_interval([0] * 10, 5)
    assert low == pytest.approx(0, abs=1e-9) and 0.5 < high < 5
    low, high = chain_interval([5] * 10, 5)
    assert 0 < low < 4.5 and high == pytest.approx(5)
    assert chain_interval([1, 2, 3], 5) == mean_interval([1, 2, 3])


def test_mcnemar_counts_only_pairs_that_differ():
    first = [True] * 50 + [False] * 50 + [False] * 9 + [True]
    second = [True] * 50 + [False] * 50 + [True] * 9 + [False]
    test = mcnemar(first, second)
    assert (test.n, test.better, test.worse) == (110, 9, 1)
    assert test.p == pytest.approx(22 / 1024)  # 2 * P(X <= 1), X ~ Binomial(10, 1/2)
    assert test.difference == pytest.approx(8 / 110)
    assert test.ci95[0] < test.difference < test.ci95[1]
    assert mcnemar([True, False], [True, False]).p == 1.0


def test_the_paired_bootstrap_sees_a_difference_that_pairing_shows():
    rng = np.random.default_rng(1)
    starts = rng.integers(0, 5, 60)
    better = starts + (rng.uniform(size=60) < 0.3)
    test = paired_bootstrap(starts.tolist(), better.tolist())
    assert test.p < 0.01 and test.ci95[0] > 0 and test.worse == 0
    assert paired_bootstrap(better.tolist(), starts.tolist()).difference == -test.difference


def test_the_paired_bootstrap_finds_nothing_where_nothing_is():
    rng = np.random.default_rng(2)
    p_values = []
    for _ in range(60):
        a, b = rng.integers(0, 6, (2, 40))
        p_values.append(paired_bootstrap(a.tolist(), b.tolist()).p)
    assert sum(p < 0.05 for p in p_values) <= 9
    assert paired_bootstrap([1, 2], [1, 2]).p == 1.0


def test_unpaired_values_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_bootstrap([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="cannot be paired"):
        mcnemar([], [])
    with pytest.raises(ValueError):
        wilson(3, 2)


def test_a_permutation_is_exact_for_a_handful_of_pairs():
    assert paired_permutation([1, 2, 1], [2, 2, 2]).p == 0.5  # 2 of the 4 exchanges
    assert paired_permutation([0] * 6, [1] * 6).p == 2 / 64
    assert paired_permutation([1, 2], [1, 2]).p == 1.0
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 6, 80), rng.integers(0, 6, 80)
    many, other = paired_permutation(a, b), paired_bootstrap(a, b)
    assert many.p == pytest.approx(other.p, abs=0.05) and many.ci95 == other.ci95
    assert paired_permutation(a, a + 1).p < 0.001
