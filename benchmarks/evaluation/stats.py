"""Intervals and tests: a success rate without them is an anecdote.

Rates get Wilson intervals, means of chains a bootstrap over sequences; two runs on the same
episodes are compared in pairs, which takes the luck of the starts out of the difference:
McNemar's exact test for successes, a paired bootstrap or permutation for means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import binomtest

Interval = tuple[float, float]
RESAMPLES = 10_000
EXACT_PAIRS = 14  # that differ; their 16384 exchanges are all tried
LEVEL = 0.95


def wilson(successes: int, trials: int) -> Interval:
    """Return the 95 % Wilson interval of a rate; (0, 1) without trials.

    Raises:
        ValueError: not 0 <= successes <= trials.
    """
    if trials == 0 and successes == 0:
        return 0.0, 1.0
    found = binomtest(successes, trials).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Return the 95 % percentile-bootstrap interval of a mean.

    Values that are all equal would give an interval of no width, so a chain length's then
    comes from Wilson: a mean over n trials cannot be known better than a rate can.
    """
    data = np.asarray(values, np.float64)
    if len(data) == 0:
        raise ValueError("values: there are none")
    if np.ptp(data) == 0:
        return float(data[0]), float(data[0])
    return _percentiles(_resampled_means(data, seed))


def chain_interval(in_a_row: Sequence[int], length: int, seed: int = 0) -> Interval:
    """Return the 95 % interval of the mean number of tasks in a row, 0 to `length`.

    Where all chains are equally long, it is the sum of the Wilson limits of the `length`
    rates of which the mean is the sum.
    """
    if len(set(in_a_row)) > 1:
        return mean_interval(in_a_row, seed)
    rates = [sum(n > k for n in in_a_row) for k in range(length)]
    limits = [wilson(count, len(in_a_row)) for count in rates]
    return sum(low for low, _ in limits), sum(high for _, high in limits)


@dataclass(frozen=True, slots=True)
class Paired:
    """Two runs on the same episodes; positive when the second is better.

    Attributes:
        n: pairs.
        difference: of the means.
        ci95: of the difference.
        p: two-sided; how likely a difference this large is by chance.
        test: which one gave p.
        better, worse: pairs in which the second run did better, worse.
    """

    n: int
    difference: float
    ci95: Interval
    p: float
    test: str
    better: int
    worse: int


def paired_bootstrap(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Paired:
    """Compare two means over the same episodes.

    p comes from the bootstrap of the centred differences.

    Raises:
        ValueError: no pairs, or not as many values on both sides.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"pairs: {a.shape} and {b.shape} values cannot be paired")
    delta = b - a
    better, worse = int((delta > 0).sum()), int((delta < 0).sum())
    mean = float(delta.mean())
    if np.ptp(delta) == 0:
        p = 1.0 if mean == 0 else 1.0 / (RESAMPLES + 1)
        return Paired(len(a), mean, (mean, mean), p, "paired bootstrap", better, worse)
    means = _resampled_means(delta, seed)
    extreme = int((np.abs(means - mean) >= abs(mean) - 1e-12).sum())
    p = (extreme + 1) / (RESAMPLES + 1)
    return Paired(len(a), mean, _percentiles(means), p, "paired bootstrap", better, worse)


def paired_permutation(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Paired:
    """Compare two means over the same episodes by exchanging the two values of pairs.

    If the runs are alike, each pair's difference could as well have the other sign. Its p is
    exact for any number of pairs, where the bootstrap's is too small for a handful; the
    interval is the bootstrap's.

    Raises:
        ValueError: no pairs, or not as many values on both sides.
    """
    paired = paired_bootstrap(first, second, seed)
    delta = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    delta = delta[delta != 0]
    if len(delta) <= EXACT_PAIRS:
        signs = 1 - 2 * (np.arange(2 ** len(delta))[:, None] >> np.arange(len(delta)) & 1)
    else:
        rng = np.random.default_rng(seed)
        signs = rng.choice((-1, 1), (RESAMPLES, len(delta)))
    extreme = int((np.abs(signs @ delta) >= abs(delta.sum()) - 1e-9).sum())
    exact = len(delta) <= EXACT_PAIRS
    p = extreme / len(signs) if exact else (extreme + 1) / (len(signs) + 1)
    return replace(paired, p=float(p), test="paired permutation")


def mcnemar(first: Sequence[bool], second: Sequence[bool], seed: int = 0) -> Paired:
    """Compare two success rates over the same episodes by McNemar's exact test.

    Raises:
        ValueError: no pairs, or not as many values on both sides.
    """
    paired = paired_bootstrap([float(x) for x in first], [float(x) for x in second], seed)
    discordant = paired.better + paired.worse
    p = float(binomtest(paired.better, discordant).pvalue) if discordant else 1.0
    return Paired(
        paired.n,
        paired.difference,
        paired.ci95,
        p,
        "McNemar, exact",
        paired.better,
        paired.worse,
    )


def _resampled_means(data: np.ndarray, seed: int) -> np.ndarray:
    """Return `RESAMPLES` means of resamples, in pieces that need little memory."""
    rng = np.random.default_rng(seed)
    piece = max(1, min(RESAMPLES, 2_000_000 // len(data)))
    means = [
        data[rng.integers(0, len(data), (min(piece, RESAMPLES - done), len(data)))].mean(axis=1)
        for done in range(0, RESAMPLES, piece)
    ]
    return np.concatenate(means)


def _percentiles(means: np.ndarray) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)
