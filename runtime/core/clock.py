"""Time: a clock to read and sleep on, and a pacer with absolute deadlines.

Deadlines are counted from the start (`t_start + (i + 1) * period`), so lateness never
accumulates. A tick that overran by whole periods makes the pacer skip those and count them:
a burst of catch-up ticks would command a robot faster than anyone planned. Sleeping wakes
late by tens of microseconds and now and then by milliseconds; sleeping short and spinning
for the rest fixes the median, SCHED_FIFO (`openhelix.runtime.control.realtime`) the tail.
The time that is left before a deadline collects garbage and takes in the newest state.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

PREFETCH_NS = 1_000_000  # before a deadline: what a prefetch takes on cold caches, twice


class Clock(Protocol):
    """A monotonic clock in nanoseconds; the zero is arbitrary."""

    def now_ns(self) -> int: ...

    def sleep_until_ns(self, t_ns: int) -> None:
        """Return at `t_ns` or as soon after it as possible; at once if it has passed."""


class MonotonicClock:
    """The host's `CLOCK_MONOTONIC`.

    Args:
        spin_ns: how long before a deadline to stop sleeping and to poll the clock instead;
            0 sleeps all the way. The spin holds the interpreter lock and a core, so keep it
            to a few hundred microseconds; with SCHED_FIFO it also keeps every normal thread
            off that core, ZeroMQ's among them.
    """

    def __init__(self, spin_ns: int = 0) -> None:
        if spin_ns < 0:
            raise ValueError(f"spin_ns: {spin_ns} is negative; 0 sleeps without spinning")
        self.spin_ns = spin_ns

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def sleep_until_ns(self, t_ns: int) -> None:
        now_ns = time.monotonic_ns
        left = t_ns - now_ns()
        if left > self.spin_ns:
            # An absolute sleep underneath, so a signal or a preemption adds no drift.
            time.sleep((left - self.spin_ns) * 1e-9)
        if self.spin_ns:
            while now_ns() < t_ns:
                pass


class FakeClock:
    """A clock that moves only when told to, or slept on; for tests and for lockstep."""

    def __init__(self, start_ns: int = 1_000_000_000) -> None:
        self._now_ns = start_ns

    def now_ns(self) -> int:
        return self._now_ns

    def sleep_until_ns(self, t_ns: int) -> None:
        self._now_ns = max(self._now_ns, t_ns)

    def advance(self, by_ns: int) -> None:
        """Move `by_ns` forward."""
        if by_ns < 0:
            raise ValueError(f"by_ns: {by_ns} is negative; time only moves forward")
        self._now_ns += by_ns


@dataclass(frozen=True, slots=True)
class Tick:
    """One turn of a paced loop."""

    index: int  # counts periods since `start`, skipped ones included
    deadline_ns: int
    woke_ns: int
    lateness_ns: int  # woke_ns - deadline_ns
    missed: int  # whole periods skipped just before this tick


@dataclass(frozen=True, slots=True)
class LatenessSummary:
    """Lateness of the ticks so far, in nanoseconds."""

    ticks: int
    missed: int
    p50_ns: int
    p99_ns: int
    max_ns: int  # over all ticks, also those that left the window

    def as_seconds(self) -> dict[str, float]:
        """Return {p50, p99, max} in seconds, as `report.json` has them."""
        return {
            "p50": self.p50_ns * 1e-9,
            "p99": self.p99_ns * 1e-9,
            "max": self.max_ns * 1e-9,
        }


def percentiles(
    values: Sequence[float] | npt.NDArray[np.float64],
    names: Sequence[str] = ("p50", "p99", "max"),
) -> dict[str, float | None]:
    """Return the percentiles asked for, each a value that occurred; null without values."""
    if len(values) == 0:
        return dict.fromkeys(names)
    data = np.asarray(values, np.float64)
    at = [100.0 if name == "max" else float(name[1:]) for name in names]
    return dict(zip(names, np.percentile(data, at, method="higher").tolist(), strict=True))


class LatenessStats:
    """Exact percentiles over the last `capacity` values, in memory allocated once."""

    def __init__(self, capacity: int = 65_536) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: {capacity}, must be at least 1")
        self._ring = array("q", bytes(8 * capacity))
        self._count = 0
        self._max = 0
        self.missed = 0

    def add(self, lateness_ns: int, missed: int = 0) -> None:
        """Record one tick."""
        self._ring[self._count % len(self._ring)] = lateness_ns
        if self._count == 0 or lateness_ns > self._max:
            self._max = lateness_ns
        self._count += 1
        self.missed += missed

    @property
    def last_ns(self) -> int:
        """The lateness recorded last; 0 before the first tick."""
        return self._ring[(self._count - 1) % len(self._ring)] if self._count else 0

    def summary(self) -> LatenessSummary:
        """Return the figures; all zero before the first tick."""
        kept = min(self._count, len(self._ring))
        if kept == 0:
            return LatenessSummary(0, self.missed, 0, 0, 0)
        window = np.frombuffer(self._ring, dtype=np.int64)[:kept]
        p50, p99 = np.percentile(window, (50, 99), method="higher")
        return LatenessSummary(self._count, self.missed, int(p50), int(p99), self._max)


class Pacer:
    """Wakes a loop at `t_start + (i + 1) * period_ns`.

    Args:
        clock: what to sleep on.
        period_ns: time between ticks.
        capacity: how many latenesses the percentiles cover (65,536: 36 minutes at 30 Hz).
    """

    def __init__(self, clock: Clock, period_ns: int, capacity: int = 65_536) -> None:
        if period_ns <= 0:
            raise ValueError(f"period_ns: {period_ns}, must be above 0")
        self.clock = clock
        self.period_ns = period_ns
        self.stats = LatenessStats(capacity)
        self._start_ns: int | None = None
        self._next = 0

    def start(self) -> int:
        """Begin now and return that time; starting again begins anew, statistics kept."""
        self._start_ns = self.clock.now_ns()
        self._next = 0
        return self._start_ns

    def wait(self) -> Tick:
        """Sleep to the next deadline; skip and count those that passed by a whole period."""
        if self._start_ns is None:
            self.start()
        assert self._start_ns is not None
        deadline = self._start_ns + (self._next + 1) * self.period_ns
        missed = max(0, (self.clock.now_ns() - deadline) // self.period_ns)
        self._next += missed
        deadline += missed * self.period_ns
        self.clock.sleep_until_ns(deadline)
        woke = self.clock.now_ns()
        tick = Tick(self._next, deadline, woke, woke - deadline, missed)
        self._next += 1
        self.stats.add(tick.lateness_ns, missed)
        return tick

    def slack_ns(self) -> int:
        """Return the time left until the next deadline; negative when it has passed."""
        start = self.clock.now_ns() if self._start_ns is None else self._start_ns
        return start + (self._next + 1) * self.period_ns - self.clock.now_ns()

    def summary(self) -> LatenessSummary:
        """Return the figures so far."""
        return self.stats.summary()


# ------------------------------------------------------------------------------------------------
# The time that is left


class SlackCollector:
    """Collects garbage in the time a loop has left, since automatic collections are off.

    Each generation is run only when its longest run so far fits the slack twice. Generation 0
    is due every time; generation 1 every 10th and generation 2 every 100th time, as CPython
    would have it.
    """

    def __init__(self) -> None:
        self._cost_ns = [200_000, 1_000_000, 5_000_000]  # guesses until measured
        self._due = [0, 0, 0]
        self.runs = [0, 0, 0]
        self.longest_ns = 0

    def collect(self, slack_ns: int) -> int | None:
        """Collect what is due and fits; return the generation, or None when nothing did."""
        self._due = [count + 1 for count in self._due]
        for generation, every in ((2, 100), (1, 10), (0, 1)):
            fits = 2 * self._cost_ns[generation] <= slack_ns
            if self._due[generation] >= every and fits:
                self._run(generation)
                return generation
        return None

    def _run(self, generation: int) -> None:
        begin = time.perf_counter_ns()
        gc.collect(generation)
        took = time.perf_counter_ns() - begin
        self.longest_ns = max(self.longest_ns, took)
        # The longest run counts, forgotten slowly, so that one outlier is not for ever.
        self._cost_ns[generation] = max(took, self._cost_ns[generation] * 7 // 8)
        for lower in range(generation + 1):
            self._due[lower] = 0
        self.runs[generation] += 1


def using_the_slack(pacer: Pacer, prefetch: Callable[[], object]) -> Callable[[], object]:
    """Return what waits for the next tick, and uses the time until then.

    Garbage is collected first: on the control thread the automatic collector is off
    (`openhelix.runtime.control.realtime.enter`), because it would run whenever an allocation
    happens to trip it.
    Then, just before the deadline, `prefetch` takes in the robot's newest state. After 30 ms of
    other processes' work on this core everything is out of its caches, and decoding a state takes
    twenty times as long as right after another: better before the deadline than after.
    """
    collector = SlackCollector()

    def wait() -> object:
        collector.collect(pacer.slack_ns() - PREFETCH_NS)
        spare_ns = pacer.slack_ns() - PREFETCH_NS
        if spare_ns > 0:
            time.sleep(spare_ns * 1e-9)
            prefetch()
        return pacer.wait()

    return wait


def duration_text(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds: "1:02:03"."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
