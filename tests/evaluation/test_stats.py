"""openhelix.benchmarks.evaluation.stats: intervals and paired tests."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openhelix.benchmarks.evaluation.stats import (
    chain_interval,
    clustered_rate,
    holm,
    mean_interval,
    paired_by_start,
    wilson,
)


def test_wilson_is_wilsons_formula():
    k, n, z = 7, 20, 1.959963984540054
    p = k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson(k, n) == pytest.approx((middle - half, middle + half), abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 150), st.data())
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


def test_one_episode_a_start_is_mcnemars_exact_test():
    first = [True] * 50 + [False] * 50 + [False] * 9 + [True]
    second = [True] * 50 + [False] * 50 + [True] * 9 + [False]
    test = paired_by_start(first, second, most=1)
    assert (test.n, test.starts, test.better, test.worse) == (110, 110, 9, 1)
    assert test.p == pytest.approx(22 / 1024)  # 2 * P(X <= 1), X ~ Binomial(10, 1/2)
    assert test.difference == pytest.approx(8 / 110)
    assert test.ci95[0] < test.difference < test.ci95[1]
    assert paired_by_start([True, False], [True, False]).p == 1.0


def test_pairing_shows_a_difference_that_starts_would_hide():
    rng = np.random.default_rng(1)
    starts = rng.integers(0, 5, 60)
    better = starts + (rng.uniform(size=60) < 0.3)
    test = paired_by_start(starts.tolist(), better.tolist())
    assert test.p < 0.01 and test.ci95[0] > 0 and test.worse == 0
    assert paired_by_start(better.tolist(), starts.tolist()).difference == -test.difference


def test_unpaired_values_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_by_start([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_by_start([], [])
    with pytest.raises(ValueError, match="starts: 1 for 2 episodes"):
        paired_by_start([1.0, 2.0], [1.0, 2.0], ["a"])
    with pytest.raises(ValueError):
        wilson(3, 2)


def test_a_permutation_is_exact():
    assert paired_by_start([1, 2, 1], [2, 2, 2]).p == 0.5  # 2 of the 4 exchanges
    assert paired_by_start([0] * 6, [1] * 6).p == 2 / 64
    assert paired_by_start([1, 2], [1, 2]).p == 1.0
    assert paired_by_start([0] * 40, [1] * 40).p == pytest.approx(2.0**-39)
    # Of the 8 sums of +-1, +-2 and +-3, 6, 4, -4 and -6 are 4 or more from 0.
    assert paired_by_start([0, 0, 0], [-1, 2, 3]).p == pytest.approx(4 / 8)


def test_values_that_are_no_whole_numbers_are_exchanged_one_by_one_or_drawn():
    few = paired_by_start([0.0] * 6, [0.5, 0.25, 0.75, 0.3, 0.6, 0.1])
    assert few.p == 2 / 64
    rng = np.random.default_rng(0)
    many = rng.normal(0.4, 1, 60)
    drawn = paired_by_start(np.zeros(60), many)
    assert (
        drawn.p == pytest.approx(0.003, abs=0.02)
        and drawn.p == paired_by_start(np.zeros(60), many).p
    )


def clustered(rng, starts, each, within):
    """Return successes by start, (starts * each,): alike within a start to a degree."""
    chance = rng.beta(*((0.6 * within, 0.4 * within)), starts)
    return (rng.uniform(size=(starts, each)) < chance[:, None]).ravel()


def test_an_interval_by_start_covers_the_rate_and_one_by_episode_does_not():
    rng = np.random.default_rng(3)
    group = np.repeat(np.arange(40), 9).tolist()
    by_start = by_episode = 0
    for _ in range(150):
        made = clustered(rng, 40, 9, 0.5)
        low, high = clustered_rate(made.tolist(), group)
        by_start += low <= 0.6 <= high
        low, high = wilson(int(made.sum()), len(made))
        by_episode += low <= 0.6 <= high
    assert by_start >= 0.92 * 150
    assert by_episode <= 0.7 * 150


def test_starts_that_are_all_alike_are_worth_one_trial_each():
    assert clustered_rate([True] * 90, [n // 9 for n in range(90)]) == pytest.approx(wilson(10, 10))
    assert clustered_rate([True, False] * 20, range(40)) == wilson(20, 40)
    assert clustered_rate([], []) == (0.0, 1.0)


def test_the_interval_of_a_difference_covers_it_by_start():
    rng = np.random.default_rng(4)
    group = np.repeat(np.arange(30), 6)
    hits, found, plain = 0, 0, 0
    for _ in range(150):
        shift = np.repeat(rng.normal(0, 1, 30), 6)  # how much a start likes b
        a, b = rng.normal(0, 0.3, (2, 180))
        test = paired_by_start(a, b + shift, group)
        hits += test.ci95[0] <= 0 <= test.ci95[1]
        found += test.p < 0.05
        plain += paired_by_start(a, b + shift).p < 0.05
    assert hits >= 0.92 * 150 and found <= 0.09 * 150
    assert plain >= 0.3 * 150  # episodes counted one by one cry wolf


def test_tost_finds_the_same_where_it_is_and_errs_at_most_as_often_as_said():
    rng = np.random.default_rng(5)
    same = wrong = 0
    for _ in range(150):
        near, edge = rng.normal(0.0, 1, 100), rng.normal(0.5, 1, 100)
        same += paired_by_start(np.zeros(100), near).same(0.5) < 0.05
        wrong += paired_by_start(np.zeros(100), edge).same(0.5) < 0.05
    assert same >= 0.98 * 150  # its power: the margin is five standard errors away
    assert wrong <= 0.08 * 150


def test_tost_errs_at_most_as_often_as_said_where_few_starts_differ():
    rng = np.random.default_rng(8)
    for most, margin, share, n in ((1, 0.1, 0.1, 63), (5, 0.3, 0.06, 100)):
        edge = most * (rng.random((600, n)) < share)  # the margin is the truth
        found = np.array([paired_by_start(np.zeros(n), e, most=most).same(margin) for e in edge])
        assert (found < 0.05).mean() <= 0.09 and (found < 0.005).mean() <= 0.012


def test_one_start_that_differs_shows_no_more_than_none():
    none = paired_by_start([1] * 63, [1] * 63, most=1).same(0.1)
    one = paired_by_start([1] * 63, [1] * 62 + [0], most=1).same(0.1)
    more = paired_by_start([1] * 63, [1] * 60 + [0] * 3, most=1).same(0.1)
    assert none < one < more < 0.2


def test_pairs_that_never_differ_show_as_much_as_could_have_gone_unseen():
    few = paired_by_start([1] * 5, [1] * 5, most=1)
    assert few.same(0.1) == pytest.approx(0.9**5) and few.ci95 == (-few.shows(), few.shows())
    many = paired_by_start([1] * 60, [1] * 60, most=1)
    assert many.same(0.1) == pytest.approx(0.9**60) and many.same(0.1) < 0.05
    assert many.shows() == pytest.approx(1 - 0.05 ** (1 / 60))
    assert paired_by_start([0] * 9, [1] * 9, ["x"] * 9, most=1).ci95 == (-1, 1)
    one = paired_by_start([0] * 9, [1] * 9, ["x"] * 9, most=1)
    assert (one.starts, one.p, one.same(0.5), one.shows()) == (1, 1.0, 1.0, None)


def test_the_smallest_difference_shown_is_found_four_times_in_five():
    rng = np.random.default_rng(6)
    shows = paired_by_start(np.zeros(400), rng.normal(0, 1, 400)).shows() * 20 / 50**0.5
    found = sum(
        paired_by_start(np.zeros(50), rng.normal(shows, 1, 50)).p < 0.05 for _ in range(150)
    )
    assert 0.72 * 150 <= found <= 0.88 * 150


def test_larger_than_a_margin():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 3, 80), rng.integers(2, 6, 80)
    test = paired_by_start(first, second, None, 5)
    assert test.larger(test.difference) == 1.0 == test.larger(5.0)
    assert 0.3 < test.larger(test.difference - test.error * 0.2) < 0.5
    assert test.larger(0.5) < 1e-6
    mirrored = paired_by_start(second, first, None, 5)
    assert mirrored.larger(2.0) == pytest.approx(test.larger(2.0))
    few = paired_by_start([0] * 4, [1] * 4, None, 1)
    assert few.larger(0.1) == few.p == 1 / 8  # all differ alike: no better than the exact p


def test_a_difference_of_the_margin_is_seldom_called_larger():
    """Size at the margin: each of 60 starts is better with probability 0.3, none worse."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(2000):
        second = rng.random(60) < 0.3
        wrong += paired_by_start(np.zeros(60), second, None, 1).larger(0.3) < 0.05
    assert wrong / 2000 < 0.07


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.2, 0.001]) == pytest.approx([0.2, 0.002])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_never_lowers(p):
    found = holm(p)
    assert all(b >= a for a, b in zip(p, found, strict=True)) and max(found) <= 1
    order = sorted(range(len(p)), key=lambda i: p[i])
    assert [found[i] for i in order] == sorted(found)
