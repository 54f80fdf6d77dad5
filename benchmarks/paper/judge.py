"""Tests whether a finding of the paper holds here: two rows, the same episodes, a paired test.

"b is better" holds if b scores higher and the paired test is significant (p below 0.05), and is
contradicted if a does. "the same" holds if the whole 95 % interval of the
difference lies within the margin, and is contradicted if the interval lies outside of it; two
rows that both score below the margin cannot show it. Everything else is undecided: too few
episodes, not no effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openhelix.benchmarks.evaluation.compare import paired
from openhelix.benchmarks.evaluation.stats import Paired, mcnemar, paired_permutation
from openhelix.benchmarks.paper.catalogue import LENGTH, Contrast, Experiment

ALPHA = 0.05
HOLDS, NOT, OPEN, MISSING = "holds", "contradicted", "undecided", "not run"
Result = Mapping[str, Any]


def judge(
    contrast: Contrast, first: Sequence[Result], second: Sequence[Result], chain: bool
) -> dict[str, Any]:
    """Return the verdict on a contrast and what it rests on.

    Args:
        contrast: which rows, what is expected.
        first, second: the episodes' results of rows a and b.
        chain: whether the score is tasks in a row.
    """
    pairs = paired(first, second)
    if contrast.patterns:
        pairs = [p for p in pairs if p[0]["groups"].get("pattern") in contrast.patterns]
    if not pairs:
        return missing(contrast)
    what = "in_a_row" if chain else "success"
    scores = [a[what] for a, _ in pairs], [b[what] for _, b in pairs]
    test: Paired = (paired_permutation if chain else mcnemar)(*scores)
    means = [float(np.mean(values)) for values in scores]
    return {
        **_stated(contrast),
        "verdict": verdict(contrast, test, means, LENGTH if chain else 1),
        "score_a": means[0],
        "score_b": means[1],
        "n_pairs": test.n,
        "difference": test.difference,
        "ci95": list(test.ci95),
        "p": test.p,
        "test": test.test,
        "b_better": test.better,
        "a_better": test.worse,
        "unit": "tasks in a row" if chain else "success rate",
    }


def verdict(contrast: Contrast, test: Paired, means: Sequence[float], most: int) -> str:
    """Return one of `HOLDS`, `NOT`, `OPEN`.

    Args:
        contrast: what is expected.
        test: of b against a.
        means: scores of a and b.
        most: the highest score there is.
    """
    low, high = test.ci95
    if contrast.expect == "same":
        if max(means) < contrast.margin:
            return OPEN
        if low == high:
            # Pairs that never differ give an interval of no width, however few they are: what
            # would have shown itself in them with a probability of 95 % is excluded, no more.
            unseen = most * (1 - 0.05 ** (1 / test.n))
            low, high = low - unseen, high + unseen
        if -contrast.margin < low and high < contrast.margin:
            return HOLDS
        return NOT if low > contrast.margin or high < -contrast.margin else OPEN
    if test.p >= ALPHA or test.difference == 0:
        return OPEN
    return HOLDS if test.difference > 0 else NOT


def missing(contrast: Contrast) -> dict[str, Any]:
    """Return the verdict on rows that have not been run."""
    return {**_stated(contrast), "verdict": MISSING, "n_pairs": 0}


def _stated(contrast: Contrast) -> dict[str, Any]:
    return {
        "a": contrast.a,
        "b": contrast.b,
        "says": contrast.says,
        "finding": contrast.finding,
        "expect": contrast.expect,
        "margin": contrast.margin if contrast.expect == "same" else None,
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


def finding_verdict(verdicts: Sequence[str]) -> str:
    """Return the verdict on a finding from those on its contrasts."""
    known = [v for v in verdicts if v != MISSING]
    if not known:
        return MISSING
    if all(v == HOLDS for v in verdicts):
        return HOLDS
    if all(v == NOT for v in known):
        return NOT
    counts = ", ".join(
        f"{verdicts.count(v)} {v}" for v in (HOLDS, NOT, OPEN, MISSING) if v in verdicts
    )
    return f"mixed: {counts}" if {HOLDS, NOT} <= set(known) else f"{OPEN}: {counts}"
