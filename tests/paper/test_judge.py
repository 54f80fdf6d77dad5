"""Verdicts: what holds, what does not, what cannot be said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openhelix.benchmarks.paper.catalogue import Contrast, catalogue
from openhelix.benchmarks.paper.judge import (
    HOLDS,
    MISSING,
    NOT,
    OPEN,
    finding_verdict,
    judge,
    missing,
    published_difference,
)


def contrast(expect="b_better", **changes):
    return Contrast(a="a", b="b", finding=2, expect=expect, says="x", **changes)


def chains(lengths):
    return [
        {"key": str(k), "in_a_row": int(n), "success": n == 5, "groups": {}, "tasks": []}
        for k, n in enumerate(lengths)
    ]


def singles(good, pattern="left"):
    return [
        {"key": str(k), "in_a_row": int(g), "success": bool(g), "groups": {"pattern": pattern}}
        for k, g in enumerate(good)
    ]


RNG = np.random.default_rng(0)
LOW, HIGH = RNG.integers(0, 3, 50), RNG.integers(2, 6, 50)


def test_better_holds_or_is_contradicted():
    found = judge(contrast(), chains(LOW), chains(HIGH), chain=True)
    assert found["verdict"] == HOLDS and found["difference"] > 1 and found["p"] < 0.05
    assert judge(contrast(), chains(HIGH), chains(LOW), chain=True)["verdict"] == NOT
    assert found["n_pairs"] == 50 and found["unit"] == "tasks in a row"


def test_too_few_episodes_decide_nothing():
    assert judge(contrast(), chains([1, 2, 1]), chains([2, 2, 2]), chain=True)["verdict"] == OPEN
    found = judge(contrast(), singles([0, 0, 0, 0]), singles([1, 1, 1, 1]), chain=False)
    assert found["verdict"] == OPEN and found["test"].startswith("McNemar")


def test_the_same_holds_only_within_the_margin():
    same = contrast("same", margin=0.5)
    assert judge(same, chains(HIGH), chains(HIGH), chain=True)["verdict"] == HOLDS
    assert judge(same, chains(LOW), chains(HIGH), chain=True)["verdict"] == NOT
    noisy = RNG.permutation(HIGH)[:8]
    assert judge(same, chains(HIGH[:8]), chains(noisy), chain=True)["verdict"] == OPEN


def test_equal_failures_and_few_equal_pairs_show_nothing():
    same = contrast("same", margin=0.3)
    zeros = chains(np.zeros(50))
    assert judge(same, zeros, zeros, chain=True)["verdict"] == OPEN
    few = chains(np.full(5, 4))
    assert judge(same, few, few, chain=True)["verdict"] == OPEN


def test_only_the_patterns_asked_for_count():
    a = singles([1] * 20, "static") + singles([0] * 20)
    b = singles([0] * 20, "static") + singles([1] * 20)
    for rows in (a, b):
        for number, row in enumerate(rows):
            row["key"] = str(number)
    moving = contrast(patterns=("left",))
    found = judge(moving, a, b, chain=False)
    assert found["verdict"] == HOLDS and found["n_pairs"] == 20
    assert judge(contrast(patterns=("circular",)), a, b, chain=False)["verdict"] == MISSING


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_exchanging_the_rows_exchanges_the_verdict(pairs):
    a, b = chains([x for x, _ in pairs]), chains([y for _, y in pairs])
    one, other = judge(contrast(), a, b, True), judge(contrast(), b, a, True)
    turned = {HOLDS: NOT, NOT: HOLDS, OPEN: OPEN}
    assert other["difference"] == pytest.approx(-one["difference"])
    # The bootstrap's p of a difference and of its negative differ by resampling at most.
    if min(abs(one["p"] - 0.05), abs(other["p"] - 0.05)) > 0.02:
        assert other["verdict"] == turned[one["verdict"]]


def test_findings_are_as_sure_as_their_claims():
    assert finding_verdict([]) == MISSING == finding_verdict([MISSING])
    assert finding_verdict([HOLDS, HOLDS]) == HOLDS
    assert finding_verdict([NOT, MISSING]) == NOT
    assert finding_verdict([HOLDS, MISSING]) == "undecided: 1 holds, 1 not run"
    assert finding_verdict([HOLDS, NOT, OPEN]).startswith("mixed: 1 holds, 1 contradicted")


def test_the_papers_own_difference_stands_beside():
    table = catalogue().experiment("table4")
    assert published_difference(table, table.contrasts[0]) == pytest.approx(3.53 - 2.85)
    dynamic = catalogue().experiment("table1")
    want = (84 + 46 + 67 + 80) / 400
    assert published_difference(dynamic, dynamic.contrasts[0]) == pytest.approx(want)
    assert published_difference(dynamic, dynamic.contrasts[1]) is None
    assert missing(table.contrasts[0])["verdict"] == MISSING
