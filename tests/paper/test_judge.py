"""Verdicts: what holds, what does not, what cannot be said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openhelix.benchmarks.paper.catalogue import Contrast, catalogue
from openhelix.benchmarks.paper.episodes import recomputed
from openhelix.benchmarks.paper.judge import (
    HOLDS,
    MISSING,
    NOT,
    OPEN,
    UNTESTABLE,
    WITHDRAWN,
    decide,
    finding_verdict,
    judge,
    missing,
    of_two_trainings,
    published_difference,
    rules_out,
)
from openhelix.benchmarks.paper.session import Kept


def contrast(expect="b_better", margin=0.3, **changes):
    return Contrast(
        a="a", b="b", axis="clip", finding=2, expect=expect, margin=margin, says="x", **changes
    )


def decided(*args, **more):
    found = judge(*args, **more)
    decide([found])
    return found


def chains(lengths):
    return [
        {"key": str(k), "start": str(k), "in_a_row": int(n), "success": n == 5, "groups": {}}
        for k, n in enumerate(lengths)
    ]


def singles(good, pattern="left", first=0, each=1):
    return [
        {
            "key": f"{pattern} {k}",
            "start": str((first + k) // each),
            "in_a_row": int(g),
            "success": bool(g),
            "groups": {"pattern": pattern},
        }
        for k, g in enumerate(good)
    ]


RNG = np.random.default_rng(0)
LOW, HIGH = RNG.integers(0, 3, 50), RNG.integers(2, 6, 50)


def test_better_holds_or_is_contradicted():
    found = decided(contrast(), chains(LOW), chains(HIGH), chain=True)
    assert found["verdict"] == HOLDS and found["difference"] > 1 and found["p"] < 0.05
    assert decided(contrast(), chains(HIGH), chains(LOW), chain=True)["verdict"] == NOT
    assert found["n_pairs"] == found["n_starts"] == 50 and found["unit"] == "tasks in a row"
    assert 0 < found["shows"] < found["difference"]


def test_better_is_contradicted_where_both_are_shown_to_be_the_same():
    assert decided(contrast(), chains(HIGH), chains(HIGH), chain=True)["verdict"] == NOT
    few = chains(HIGH[:8])
    assert decided(contrast(), few, few, chain=True)["verdict"] == OPEN


def test_too_few_episodes_decide_nothing():
    assert decided(contrast(), chains([1, 2, 1]), chains([2, 2, 2]), chain=True)["verdict"] == OPEN
    found = decided(contrast(), singles([0, 0, 0, 0]), singles([1, 1, 1, 1]), chain=False)
    assert found["verdict"] == OPEN and found["p"] == 1 / 8


def test_many_episodes_of_few_starts_are_few_starts():
    a, b = singles([0] * 45, each=15), singles([1] * 45, each=15)
    found = decided(contrast(), a, b, chain=False)
    assert (found["n_pairs"], found["n_starts"]) == (45, 3)
    assert found["p"] == 1 / 4 and found["verdict"] == OPEN
    alone = decided(contrast(), singles([0] * 45), singles([1] * 45), chain=False)
    assert alone["p"] < 1e-12 and alone["verdict"] == HOLDS


def test_the_same_holds_only_within_the_margin():
    same = contrast("same", margin=0.5)
    assert decided(same, chains(HIGH), chains(HIGH), chain=True)["verdict"] == HOLDS
    assert decided(same, chains(LOW), chains(HIGH), chain=True)["verdict"] == NOT
    noisy = RNG.permutation(HIGH)[:8]
    assert decided(same, chains(HIGH[:8]), chains(noisy), chain=True)["verdict"] == OPEN


def test_equal_failures_and_few_equal_pairs_show_nothing():
    same = contrast("same", margin=0.3)
    zeros = chains(np.zeros(50))
    found = decided(same, zeros, zeros, chain=True)
    assert found["verdict"] == UNTESTABLE and "both rows fail" in found["not_testable"]
    few = chains(np.full(5, 4))
    assert decided(same, few, few, chain=True)["verdict"] == OPEN


@pytest.mark.parametrize("expect", ["same", "b_better"])
def test_what_lies_between_two_rows_that_fail_says_nothing(expect):
    a, b = chains(np.zeros(100)), chains([1] * 40 + [0] * 60)
    found = decided(contrast(expect), a, b, chain=True)
    assert (
        found["verdict"] == UNTESTABLE and "both rows fail (0.00 and 0.40)" in found["not_testable"]
    )
    low = singles([1] * 10 + [0] * 90)
    assert decided(contrast(expect, 0.1), low, low, chain=False)["verdict"] == UNTESTABLE


def test_a_contradiction_is_corrected_as_much_as_a_claim():
    differs = [judge(contrast("same", 0.1), singles([0] * 6), singles([1] * 6), chain=False)]
    decide(differs)
    assert differs[0]["p"] == 2 / 64 and differs[0]["verdict"] == NOT
    decide([*differs, missing(contrast())])
    assert differs[0]["verdict"] == OPEN  # 4 / 64 is not below 0.05


def test_what_holds_and_what_is_contradicted_are_families_of_their_own():
    """Five sure claims leave the sixth all of the level, and so does a contradiction."""
    sure = [judge(contrast(), singles([0] * 30), singles([1] * 30), chain=False) for _ in range(5)]
    found = judge(contrast(), singles([0] * 6), singles([1] * 6), chain=False)
    against = judge(contrast(), singles([1] * 30), singles([0] * 30), chain=False)
    decide([*sure, found, against])
    assert [c["verdict"] for c in sure] == [HOLDS] * 5 and against["verdict"] == NOT
    assert found["p"] == 2 / 64 and found["verdict"] == HOLDS
    decide([found, missing(contrast())], "paper")
    assert found["p_paper"] == 4 / 64 and found["verdict_paper"] == OPEN


def test_the_same_is_contradicted_only_beyond_the_margin():
    """A difference that is sure and not surely larger than the margin leaves it open."""
    small, large = contrast("same", margin=0.4), contrast("same", margin=0.05)
    a, b = singles([0] * 60), singles([1] * 30 + [0] * 30)
    found = judge(small, a, b, chain=False)
    decide([found])
    assert found["p_difference"] < 1e-6 and found["verdict"] == OPEN
    assert 0.05 < found["p_larger"] < 0.2
    assert decided(large, a, b, chain=False)["verdict"] == NOT


def test_rows_of_two_trainings_of_one_arm_are_not_compared():
    one = {"training": "pair-1", "score": {"policy_sha256": "a", "latents": "x"}}
    for name in ("policy_sha256", "latents"):
        other = {**one, "score": {**one["score"], name: "b"}}
        assert of_two_trainings(one, other)
        assert not of_two_trainings(one, {**other, "training": "pair-2"})
    assert not of_two_trainings(one, dict(one))
    found = decided(contrast(), chains(LOW), chains(HIGH), chain=True, retrained=True)
    assert found["verdict"] == UNTESTABLE and "two trainings" in found["not_testable"]


def test_a_page_in_parts_is_recomputed_with_all_of_its_claims():
    table = catalogue().experiment("table5").model_copy(update={"base": None})
    a, b = table.contrasts[0].a, table.contrasts[0].b
    outcome = {"rows": [{"id": n, "evaluation": n, "training": n, "score": {}} for n in (a, b)]}
    arms = ((a, LOW), (b, HIGH))
    kept = {n: Kept({"suite": "calvin"}, [r | {"error": None} for r in chains(x)]) for n, x in arms}
    first, *others = recomputed(table, outcome, kept)["contrasts"]
    assert first["p"] == pytest.approx(len(table.contrasts) * first["p_difference"])
    assert [c["verdict"] for c in others] == [MISSING] * (len(table.contrasts) - 1)


def test_only_the_patterns_asked_for_count():
    a = singles([1] * 20, "static") + singles([0] * 20)
    b = singles([1] * 20, "static") + singles([1] * 20)
    moving = contrast(patterns=("left",))
    found = decided(moving, a, b, chain=False)
    assert found["verdict"] == HOLDS and found["n_pairs"] == 20
    assert judge(contrast(patterns=("circular",)), a, b, chain=False)["verdict"] == MISSING


def test_an_arm_that_cannot_grasp_what_stands_still_is_not_testable():
    a = singles([0] * 20, "static") + singles([0] * 20)
    b = singles([1] * 20, "static") + singles([1] * 20)
    for first, second, name in ((a, b, "a grasps 0 %"), (b, a, "b grasps 0 %")):
        found = decided(contrast(patterns=("left",)), first, second, chain=False)
        assert found["verdict"] == UNTESTABLE and name in found["not_testable"]
    both = decided(contrast(patterns=("left",)), a, a, chain=False)["not_testable"]
    assert both.startswith("a grasps 0 % and b grasps 0 % of the blocks that stand still")
    enough = singles([1] * 14 + [0] * 6, "static") + singles([0] * 20)
    assert decided(contrast(patterns=("left",)), enough, b, chain=False)["verdict"] == HOLDS


def test_arms_of_a_base_that_fails_are_not_testable():
    found = decided(contrast(), chains(LOW), chains(HIGH), chain=True, base=0.4)
    assert found["verdict"] == UNTESTABLE and "base itself scores 0.40" in found["not_testable"]
    assert decided(contrast(), chains(LOW), chains(HIGH), chain=True, base=1.2)["verdict"] == HOLDS


def test_p_is_corrected_for_the_number_of_claims_and_untestable_ones_are_none():
    small = [judge(contrast(), singles([0] * 6), singles([1] * 6), chain=False)]
    decide(small)
    assert small[0]["p"] == 2 / 64 and small[0]["verdict"] == HOLDS
    nothing = judge(contrast(), singles([0, 1] * 3), singles([1, 0] * 3), chain=False)
    both = [*small, nothing]
    decide(both)
    assert both[0]["p"] == 4 / 64 and both[0]["verdict"] == OPEN
    zeros = chains(np.zeros(50))
    fails = judge(contrast("same"), zeros, zeros, chain=True)
    decide([*small, fails])
    assert small[0]["p"] == 2 / 64 and fails["verdict"] == UNTESTABLE
    decide([*both, missing(contrast())], "paper")
    assert (
        both[0]["p_paper"] == 6 / 64 and both[0]["verdict_paper"] == OPEN
    )  # what is to come counts
    assert both[0]["verdict"] == HOLDS  # the table's own stays


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_exchanging_the_rows_exchanges_the_verdict(pairs):
    a, b = chains([x for x, _ in pairs]), chains([y for _, y in pairs])
    one, other = decided(contrast(), a, b, True), decided(contrast(), b, a, True)
    assert other["difference"] == pytest.approx(-one["difference"])
    assert other.get("p") == pytest.approx(one.get("p"))  # none where both fail
    if one["p_same"] >= 0.05:  # shown to be the same, neither is better
        assert other["verdict"] == {HOLDS: NOT, NOT: HOLDS}.get(one["verdict"], one["verdict"])


def claim(verdict):
    return {
        "verdict_paper": verdict,
        "says": "it is so",
        "difference": -0.5,
        "not_testable": "it cannot stand" if verdict == UNTESTABLE else "",
    }


@pytest.mark.parametrize(
    ("verdicts", "verdict", "reason"),
    [
        ([HOLDS, HOLDS], "holds", "All 2 comparisons show it."),
        ([HOLDS, NOT, OPEN], "does not hold", '"it is so" came out at -0.50'),
        ([MISSING], "not run", "None of its comparisons has been run."),
        ([WITHDRAWN, MISSING], "not run", "withdrawn"),
        ([HOLDS, UNTESTABLE], "not testable", "1 cannot be tested (it cannot stand)"),
        ([HOLDS, OPEN], "not testable", "1 had too few starts"),
        ([HOLDS, MISSING], "not testable", "1 of 2 comparisons show it; 1 have not been run."),
    ],
)
def test_findings_are_as_sure_as_their_claims(verdicts, verdict, reason):
    found, why = finding_verdict([claim(v) for v in verdicts])
    assert found == verdict and reason in why


def test_a_difference_as_large_as_the_papers_may_be_ruled_out_where_none_is_shown():
    found = judge(contrast(), chains(LOW), chains([*LOW[1:], LOW[0]]), chain=True)
    low, high = found["ci95"]
    for theirs, outside in ((high + 0.1, True), (low, False), (None, False)):
        assert rules_out({**found, "paper_difference": theirs}) == outside
    assert not rules_out({**missing(contrast()), "paper_difference": 3.0})
    open_ = claim(OPEN) | {"paper_difference": 3.0, "ci95": [-0.2, 0.4]}
    _, why = finding_verdict([open_, claim(OPEN)])
    assert why.endswith("chance (in 1 one as large as the paper's is outside our interval).")


def test_the_papers_own_difference_stands_beside():
    table = catalogue().experiment("table4")
    assert published_difference(table, table.contrasts[0]) == pytest.approx(3.53 - 2.85)
    figure = catalogue().experiment("figure4")
    assert published_difference(figure, figure.contrasts[0]) is None
    assert missing(table.contrasts[0])["verdict"] == MISSING
