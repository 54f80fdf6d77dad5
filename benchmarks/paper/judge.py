"""Tests whether a finding of the paper holds here: two rows, the same episodes, a paired test.

The unit is the start (`openhelix.benchmarks.evaluation.stats`). "b is better" holds if b scores
higher and the difference is significant, and is contradicted if a does or if the two are shown to
be the same. "The same" holds if two one-sided tests place the difference within the margin that
the experiment's file states, and is contradicted if it is shown to be larger than the margin.
Everything else is undecided: too few starts, not no effect; the smallest difference that so many
starts show stands beside it.

p is corrected after Holm, over the contrasts of a table for the table's page and over those of all
tables and figures for the five findings; contrasts that have not been run yet count among them. What
holds and what is contradicted are two families: each has at most one chance in twenty of a single
verdict that is wrong.

A contrast is *not testable* where what it presupposes is missing: an arm of CALVIN-D that
cannot grasp a block at rest says nothing about moving ones, nothing can be learned from arms whose
common base cannot do the tasks, what lies between two rows that both fail says nothing, and rows that
are to differ in how one pair is run must be of that very pair, not of two trainings of its arm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openhelix.benchmarks.evaluation.compare import paired
from openhelix.benchmarks.evaluation.results import start_of
from openhelix.benchmarks.evaluation.stats import Paired, holm, paired_by_start
from openhelix.benchmarks.paper.catalogue import LENGTH, Contrast, Experiment

ALPHA = 0.05
HOLDS, NOT, OPEN, MISSING = "holds", "contradicted", "undecided", "not run"
UNTESTABLE, WITHDRAWN = "not testable", "withdrawn"
STATISTICS = 3  # of this page's rules; verdicts by older ones do not stand
WEIGHTS = ("policy_sha256", "latents")  # of a score: what the pair was
RETRAINED = "its rows are of two trainings of the same arm; one of them is to be measured again"
STANDING = 0.7  # of blocks at rest that an arm must grasp before moving ones say anything
FLOOR_CHAIN, FLOOR_RATE = 1.0, 0.2  # below these both rows fail, whatever lies between them
Result = Mapping[str, Any]


def judge(
    contrast: Contrast,
    first: Sequence[Result],
    second: Sequence[Result],
    chain: bool,
    base: float | None = None,
    retrained: bool = False,
) -> dict[str, Any]:
    """Return what a contrast rests on; `decide` gives the verdict.

    Args:
        contrast: which rows, what is expected.
        first, second: the episodes' results of rows a and b.
        chain: whether the score is tasks in a row.
        base: the score of the row that both arms begin from; None: they have none, or it has
            not been measured.
        retrained: whether the rows are of one arm that was trained twice (`of_two_trainings`).
    """
    every = paired(first, second)
    pairs = every
    if contrast.patterns:
        pairs = [p for p in pairs if p[0]["groups"].get("pattern") in contrast.patterns]
    if not pairs:
        return missing(contrast)
    what, most = ("in_a_row", LENGTH) if chain else ("success", 1)
    scores = [a[what] for a, _ in pairs], [b[what] for _, b in pairs]
    test = paired_by_start(*scores, [start_of(a) for a, _ in pairs], most)
    means = [float(np.mean(values)) for values in scores]
    return {
        **_stated(contrast),
        "not_testable": RETRAINED if retrained else untestable(contrast, every, means, base, chain),
        "score_a": means[0],
        "score_b": means[1],
        **measured(test, contrast.margin),
        "unit": "tasks in a row" if chain else "success rate",
    }


def measured(test: Paired, margin: float) -> dict[str, Any]:
    """Return a paired test as plain data, with each p that a verdict can rest on."""
    return {
        "n_pairs": test.n,
        "n_starts": test.starts,
        "difference": test.difference,
        "ci95": list(test.ci95),
        "p_difference": test.p,
        "p_same": test.same(margin) if margin else 1.0,
        "p_larger": test.larger(margin) if margin else test.p,
        "shows": test.shows(),
        "test": test.test,
        "b_better": test.better,
        "a_better": test.worse,
    }


def untestable(
    contrast: Contrast,
    pairs: Sequence[tuple[Result, Result]],
    means: Sequence[float],
    base: float | None,
    chain: bool,
) -> str:
    """Return why a contrast cannot be tested by these episodes; "" if it can.

    Args:
        contrast: which rows, what is expected.
        pairs: all episodes of both rows, of every motion.
        means: scores of the episodes that count.
        base: the score of the row that both arms begin from.
        chain: whether the score is tasks in a row.
    """
    if base is not None and base < contrast.base_needs:
        return f"the base itself scores {base:.2f}, less than {contrast.base_needs:g}"
    standing = [p for p in pairs if p[0]["groups"].get("pattern") == "static"]
    fails = []
    for name, side in ((contrast.a, 0), (contrast.b, 1)):
        rate = float(np.mean([p[side]["success"] for p in standing])) if standing else 1.0
        if rate < STANDING:
            fails.append(f"{name} grasps {100 * rate:.0f} %")
    if fails:
        return f"{' and '.join(fails)} of the blocks that stand still, less than {100 * STANDING:.0f} %"
    if max(means) < (FLOOR_CHAIN if chain else FLOOR_RATE):
        return f"both rows fail ({means[0]:.2f} and {means[1]:.2f})"
    return ""


def of_two_trainings(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two rows as data are of one arm that was trained anew between their evaluations.

    A training that is repeated on another kind of CPU gives other weights.
    """
    if first["training"] != second["training"]:
        return False
    scores = [row["score"] or {} for row in (first, second)]
    return any(scores[0].get(name) != scores[1].get(name) for name in WEIGHTS)


def decide(found: Sequence[dict[str, Any]], name: str = "") -> None:
    """Give contrasts their verdicts, corrected for how many of them there are.

    Args:
        found: contrasts as `judge` or `missing` return them; `p`, of what the verdict says, and
            `verdict` are added to those that have been tested.
        name: of another family that they are corrected over; its verdicts stand beside, as
            `p_<name>` and `verdict_<name>`.
    """
    p_key, verdict_key = (f"p_{name}", f"verdict_{name}") if name else ("p", "verdict")
    family = [c for c in found if not c["not_testable"]]
    # What has not been run yet has its place in the families from the beginning.
    sides = [_sides(c) for c in family]
    holds, against = (holm([p[side] for p in sides]) for side in (0, 1))
    for contrast, yes, no in zip(family, holds, against, strict=True):
        if "p_difference" in contrast:
            contrast[verdict_key], contrast[p_key] = _verdict(contrast, yes, no)
    for contrast in found:
        if verdict_key not in contrast:
            contrast[verdict_key] = contrast.get("verdict", UNTESTABLE)


def _sides(contrast: Mapping[str, Any]) -> tuple[float, float]:
    """Return p, not corrected, of a contrast that holds and of one that is contradicted."""
    if "p_difference" not in contrast:
        return 1.0, 1.0
    if contrast["expect"] == "same":
        return contrast["p_same"], contrast.get("p_larger", 1.0)  # which older pages lack
    differs = contrast["p_difference"]
    return differs, differs if contrast["difference"] < 0 else contrast["p_same"]


def _verdict(contrast: Mapping[str, Any], holds: float, against: float) -> tuple[str, float]:
    """Return `HOLDS`, `NOT` or `OPEN` by corrected p, and the p that this rests on."""
    as_said = contrast["expect"] == "same" or contrast["difference"] > 0
    if holds < ALPHA and as_said:
        return HOLDS, holds
    return (NOT, against) if against < ALPHA else (OPEN, holds)


def missing(contrast: Contrast) -> dict[str, Any]:
    """Return the verdict on rows that have not been run."""
    return {**_stated(contrast), "verdict": MISSING, "n_pairs": 0, "not_testable": ""}


def _stated(contrast: Contrast) -> dict[str, Any]:
    return {
        "a": contrast.a,
        "b": contrast.b,
        "axis": contrast.axis,
        "says": contrast.says,
        "finding": contrast.finding,
        "expect": contrast.expect,
        "margin": contrast.margin,
        "patterns": list(contrast.patterns),
    }


def published_difference(experiment: Experiment, contrast: Contrast) -> float | None:
    """Return b - a as the paper has it, in the unit of our test, or None where it prints none."""
    values = []
    for name in (contrast.a, contrast.b):
        published = experiment.row(name).paper
        if published is None:
            return None
        if published.patterns is not None:
            chosen = contrast.patterns or tuple(published.patterns)
            values.append(sum(published.patterns[p] for p in chosen) / len(chosen) / 100)
        elif published.length is not None:
            values.append(published.length)
    return values[1] - values[0] if len(values) == 2 else None


def rules_out(contrast: Mapping[str, Any]) -> bool:
    """Whether the paper's difference lies outside the 95 % interval of ours, not corrected."""
    theirs = contrast.get("paper_difference")
    if theirs is None or "ci95" not in contrast:
        return False
    low, high = contrast["ci95"]
    return not low <= theirs <= high


def finding_verdict(contrasts: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the verdict on a finding from its contrasts, and the reason in a sentence.

    Args:
        contrasts: each with `verdict_paper`, `says`, and what `judge` says of it.
    """
    by = {
        v: [c for c in contrasts if c["verdict_paper"] == v]
        for v in (HOLDS, NOT, OPEN, UNTESTABLE, MISSING, WITHDRAWN)
    }
    if by[NOT]:
        return "does not hold", f"Here it is otherwise: {_named(by[NOT])}."
    if by[HOLDS] and len(by[HOLDS]) == len(contrasts):
        return HOLDS, f"All {len(contrasts)} comparisons show it."
    if len(by[MISSING]) + len(by[WITHDRAWN]) == len(contrasts):
        if by[WITHDRAWN]:
            return MISSING, "What had been measured is withdrawn; it has not been run again."
        return MISSING, "None of its comparisons has been run."
    told = [f"{len(by[HOLDS])} of {len(contrasts)} comparisons show it"]
    if by[UNTESTABLE]:
        told.append(f"{len(by[UNTESTABLE])} cannot be tested ({by[UNTESTABLE][0]['not_testable']})")
    if by[OPEN]:
        told.append(f"{len(by[OPEN])} had too few starts to tell a difference from chance")
        if smaller := sum(map(rules_out, by[OPEN])):
            told[-1] += f" (in {smaller} one as large as the paper's is outside our interval)"
    unrun = len(by[MISSING]) + len(by[WITHDRAWN])
    if unrun:
        told.append(f"{unrun} have not been run")
    return UNTESTABLE, "; ".join(told) + "."


def _named(contrasts: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(f'"{c["says"]}" came out at {c["difference"]:+.2f}' for c in contrasts)
