"""Intervals and tests: a success rate without them is an anecdote.

The unit is the *start*. Episodes that begin in the same state (one block under several motions,
chains from one layout) stand or fall together, and counting them one by one makes intervals too
narrow and p too small. So variances, resampling and exchanges are by start; where every episode
has a start of its own, that is the ordinary thing.

Rates get Wilson intervals on as many trials as the starts are worth, means of chains a bootstrap.
Two runs on the same episodes are compared in pairs, which takes the luck of the starts out of the
difference: an exact permutation by start for p, a t interval over starts for the difference, two
one-sided score tests for "the same", one for "further apart than the margin", and the smallest difference that so many starts would show.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Interval = tuple[float, float]
RESAMPLES = 10_000
EXACT_STARTS = 14  # that differ, by amounts that are no whole numbers; all exchanges are tried
LEVEL, POWER = 0.95, 0.8
WHOLE = 1e-9  # as near as this, a sum is a whole number


def wilson(successes: int, trials: int) -> Interval:
    """Return the 95 % Wilson interval of a rate; (0, 1) without trials.

    Raises:
        ValueError: not 0 <= successes <= trials.
    """
    if trials == 0 and successes == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest

    found = binomtest(successes, trials).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def clustered_rate(successes: Sequence[bool], starts: Sequence[Hashable]) -> Interval:
    """Return the 95 % interval of a rate whose episodes share starts; (0, 1) without any.

    Wilson's, on as many trials as the starts are worth (Korn and Graubard 1998): their number
    divided by the design effect, never more than there are episodes, and corrected for how few
    starts the effect was estimated from. Episodes that all came out alike are worth one trial a
    start.

    Raises:
        ValueError: not as many starts as episodes.
    """
    data, group = np.asarray(successes, np.float64), _numbered(starts, len(successes))
    n, count = len(data), int(group.max(initial=-1)) + 1
    if count == n:
        return wilson(int(data.sum()), n)
    share = float(data.mean())
    if count == 1 or share in (0.0, 1.0):
        worth = float(count)
    else:
        variance = _error(data - share, group) ** 2
        worth = n if variance == 0 else min(n, share * (1 - share) / variance)
        worth *= (_student().ppf(0.975, n - 1) / _student().ppf(0.975, count - 1)) ** 2
    z = float(_student().ppf((1 + LEVEL) / 2, np.inf))
    worth = max(worth, 1.0)
    middle = (share + z * z / (2 * worth)) / (1 + z * z / worth)
    half = z / (1 + z * z / worth) * math.sqrt(share * (1 - share) / worth + (z / (2 * worth)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(
    values: Sequence[float], starts: Sequence[Hashable] | None = None, seed: int = 0
) -> Interval:
    """Return the 95 % percentile-bootstrap interval of a mean; whole starts are resampled.

    Values that are all equal would give an interval of no width, so a chain length's then
    comes from Wilson: a mean over n trials cannot be known better than a rate can.
    """
    data = np.asarray(values, np.float64)
    if len(data) == 0:
        raise ValueError("values: there are none")
    if np.ptp(data) == 0:
        return float(data[0]), float(data[0])
    group = _numbered(range(len(data)) if starts is None else starts, len(data))
    return _percentiles(_resampled_means(np.bincount(group, data), np.bincount(group), seed))


def chain_interval(
    in_a_row: Sequence[int],
    length: int,
    starts: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Interval:
    """Return the 95 % interval of the mean number of tasks in a row, 0 to `length`.

    Where all chains are equally long, it is the sum of the limits of the `length` rates of which
    the mean is the sum, each on one trial a start.
    """
    if len(set(in_a_row)) > 1:
        return mean_interval(in_a_row, starts, seed)
    names = range(len(in_a_row)) if starts is None else starts
    limits = [clustered_rate([n > k for n in in_a_row], names) for k in range(length)]
    return sum(low for low, _ in limits), sum(high for _, high in limits)


@dataclass(frozen=True, slots=True)
class Paired:
    """Two runs on the same episodes; positive when the second is better.

    Attributes:
        n: pairs.
        starts: that they began from; the unit.
        difference: of the means.
        ci95: of the difference.
        p: two-sided; how likely a difference this large is by chance.
        error: standard error of the difference, by start.
        most: the largest difference there can be; 0 where there is no bound.
        better, worse: pairs in which the second run did better, worse.
        test: which one gave p.
    """

    n: int
    starts: int
    difference: float
    ci95: Interval
    p: float
    error: float
    most: float
    better: int
    worse: int
    test: str = "permutation by start"

    @property
    def alike(self) -> bool:
        """Whether no start differs from any other, so that the error says nothing."""
        return self.starts < 2 or self.error < WHOLE

    def shows(self, alpha: float = 1 - LEVEL) -> float | None:
        """Return the smallest true difference that four of five such comparisons find at `alpha`.

        None with a single start, which shows nothing. Where the pairs never differ, it is how
        large a difference could still have gone unseen, with that probability.
        """
        if self.starts < 2:
            return None
        if self.alike and self.most:
            return float(self.most * (1 - alpha ** (1 / self.starts)))
        freedom = self.starts - 1
        quantiles = _student().ppf(1 - alpha / 2, freedom) + _student().ppf(POWER, freedom)
        return float(self.error * quantiles)

    def same(self, margin: float) -> float:
        """Return the p of two one-sided tests (TOST): small if |difference| is below `margin`.

        Each is a score test: its error is the one there would be if the margin were the truth,
        with what the difference lacks of it carried by as few starts as can (the largest
        difference in each). The error of the starts seen is too small where few of them differ.
        Where the pairs never differ, p is how probably a difference of `margin` would have stayed
        unseen. 1 with a single start.
        """
        if self.starts < 2 or abs(self.difference) >= margin:
            return 1.0
        if self.alike:
            if not self.most:
                return 0.0
            share = min(1.0, (margin - abs(self.difference)) / self.most)
            return float((1 - share) ** self.starts)
        found = []
        for difference in (self.difference, -self.difference):
            variance, lacks = self.error**2 * self.starts, margin - difference
            if self.most > margin:
                share = lacks / (self.most - difference)
                variance = (1 - share) * (variance + lacks**2) + share * (self.most - margin) ** 2
            found.append(_student().sf(lacks / math.sqrt(variance / self.starts), self.starts - 1))
        return float(max(found))

    def larger(self, margin: float) -> float:
        """Return the p of |difference| being at most `margin`: small if it is beyond.

        One-sided, by the error of the starts seen, and never below `p`, which is exact where few of
        them differ.
        """
        if self.starts < 2 or abs(self.difference) <= margin:
            return 1.0
        if self.alike:
            return self.p
        beyond = (abs(self.difference) - margin) / self.error
        return max(self.p, float(_student().sf(beyond, self.starts - 1)))


def paired_by_start(
    first: Sequence[float],
    second: Sequence[float],
    starts: Sequence[Hashable] | None = None,
    most: float = 0.0,
    seed: int = 0,
) -> Paired:
    """Compare two means over the same episodes.

    If the runs are alike, all differences of a start could as well have the other sign. For
    whole numbers (successes, tasks in a row) that distribution is computed exactly, however many
    starts there are; with one episode a start, of successes it is McNemar's exact test.

    Args:
        first, second: a value for each episode.
        starts: from which each began; None: every one from its own.
        most: the largest difference there can be (1 of successes, 5 of chains); 0: unbounded.
        seed: of the exchanges that are drawn where there are too many to try.

    Raises:
        ValueError: no pairs, or not as many values on both sides.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"pairs: {a.shape} and {b.shape} values cannot be paired")
    delta = b - a
    group = _numbered(range(len(a)) if starts is None else starts, len(a))
    count, mean = int(group.max()) + 1, float(delta.mean())
    error = _error(delta - mean, group) if count > 1 else math.inf
    sums = np.bincount(group, delta)
    if count == 1:
        limits = (-most, most) if most else (-math.inf, math.inf)
    else:
        # Pairs that never differ give an error of 0, however few they are.
        unseen = most * (1 - (1 - LEVEL) ** (1 / count)) if error < WHOLE else 0.0
        half = error * float(_student().ppf((1 + LEVEL) / 2, count - 1)) + unseen
        limits = (mean - half, mean + half)
    return Paired(
        n=len(a),
        starts=count,
        difference=mean,
        ci95=limits,
        p=_exchanged(sums, seed),
        error=error,
        most=most,
        better=int((delta > 0).sum()),
        worse=int((delta < 0).sum()),
    )


def holm(p: Sequence[float]) -> list[float]:
    """Return p values corrected for how many there are (Holm 1979), in their own order."""
    found = [0.0] * len(p)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        found[place] = largest
    return found


def _student() -> Any:
    """Return Student's t; the library takes a second that whoever mistypes is not to wait for."""
    from scipy.stats import t

    return t


def _numbered(starts: Sequence[Hashable], n: int) -> np.ndarray:
    """Return each episode's start as a number from 0, in order of their appearance."""
    if len(starts) != n:
        raise ValueError(f"starts: {len(starts)} for {n} episodes")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(start, len(numbers)) for start in starts], np.int64)


def _error(centred: np.ndarray, group: np.ndarray) -> float:
    """Return the standard error of a mean whose residuals are alike within groups."""
    sums = np.bincount(group, centred)
    count = len(sums)
    return float(np.sqrt(count / (count - 1) * (sums**2).sum()) / len(centred))


def _exchanged(sums: np.ndarray, seed: int) -> float:
    """Return how probable a total as far from 0 as that of `sums` is if each has a random sign."""
    sums = sums[np.abs(sums) > WHOLE]
    if len(sums) == 0:
        return 1.0
    whole = np.rint(sums)
    if np.abs(sums - whole).max() < WHOLE:
        return _exactly(np.abs(whole).astype(np.int64), abs(int(whole.sum())))
    exact = len(sums) <= EXACT_STARTS
    if exact:
        signs = 1 - 2 * (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1)
    else:
        signs = np.random.default_rng(seed).choice((-1, 1), (RESAMPLES, len(sums)))
    extreme = int((np.abs(signs @ sums) >= abs(sums.sum()) - WHOLE).sum())
    return extreme / len(signs) if exact else (extreme + 1) / (len(signs) + 1)


def _exactly(sizes: np.ndarray, total: int) -> float:
    """Return the share of all signs of whole numbers that give `total` or more either way."""
    chances = np.ones(1)  # of the sum of those taken so far, from its lowest on
    for size in sizes.tolist():
        wider = np.zeros(len(chances) + 2 * size)
        wider[: len(chances)] += chances / 2
        wider[2 * size :] += chances / 2
        chances = wider
    values = np.arange(len(chances)) - (len(chances) - 1) // 2
    return min(1.0, float(chances[np.abs(values) >= total].sum()))


def _resampled_means(sums: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Return `RESAMPLES` means of resampled starts, in pieces that need little memory."""
    rng = np.random.default_rng(seed)
    piece = max(1, min(RESAMPLES, 2_000_000 // len(sums)))
    means = []
    for done in range(0, RESAMPLES, piece):
        picks = rng.integers(0, len(sums), (min(piece, RESAMPLES - done), len(sums)))
        means.append(sums[picks].sum(axis=1) / counts[picks].sum(axis=1))
    return np.concatenate(means)


def _percentiles(means: np.ndarray) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)
