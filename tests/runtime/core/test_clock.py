"""Deadlines are absolute, overruns are skipped and counted, percentiles are exact."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openhelix.runtime.core.clock import (
    FakeClock,
    LatenessStats,
    MonotonicClock,
    Pacer,
    SlackCollector,
    using_the_slack,
)

MS = 1_000_000


def test_ticks_fall_on_absolute_deadlines() -> None:
    clock = FakeClock(5 * MS)
    pacer = Pacer(clock, 10 * MS)
    start = pacer.start()
    for index in range(5):
        clock.advance(3 * MS)  # work
        tick = pacer.wait()
        assert (tick.index, tick.deadline_ns) == (index, start + (index + 1) * 10 * MS)
        assert (tick.lateness_ns, tick.missed) == (0, 0)


def test_a_partial_overrun_is_late_but_skips_nothing() -> None:
    clock = FakeClock()
    pacer = Pacer(clock, 10 * MS)
    start = pacer.start()
    clock.advance(14 * MS)
    tick = pacer.wait()
    assert (tick.index, tick.missed, tick.lateness_ns) == (0, 0, 4 * MS)
    assert pacer.wait().deadline_ns == start + 20 * MS  # back on the grid


def test_whole_periods_overrun_are_skipped_and_counted_without_a_burst() -> None:
    clock = FakeClock()
    pacer = Pacer(clock, 10 * MS)
    start = pacer.start()
    clock.advance(47 * MS)  # past the deadlines at 10, 20, 30 and 40
    tick = pacer.wait()
    assert (tick.index, tick.missed, tick.lateness_ns) == (3, 3, 7 * MS)
    following = pacer.wait()
    assert (following.index, following.missed, following.lateness_ns) == (4, 0, 0)
    assert following.deadline_ns == start + 50 * MS
    assert pacer.summary().missed == 3


@given(st.lists(st.integers(0, 60 * MS), min_size=1, max_size=60))
def test_no_history_of_work_breaks_the_grid(work: list[int]) -> None:
    clock = FakeClock()
    pacer = Pacer(clock, 10 * MS)
    start = pacer.start()
    last = -1
    skipped = 0
    for took in work:
        clock.advance(took)
        tick = pacer.wait()
        skipped += tick.missed
        assert tick.index == last + 1 + tick.missed
        assert tick.deadline_ns == start + (tick.index + 1) * 10 * MS
        assert 0 <= tick.lateness_ns < 10 * MS
        assert tick.woke_ns == clock.now_ns()
        last = tick.index
    summary = pacer.summary()
    assert (summary.ticks, summary.missed) == (len(work), skipped)
    assert last + 1 == len(work) + skipped


def test_wait_starts_by_itself_and_slack_shrinks() -> None:
    clock = FakeClock()
    pacer = Pacer(clock, 10 * MS)
    assert pacer.slack_ns() == 10 * MS
    assert pacer.wait().index == 0
    clock.advance(4 * MS)
    assert pacer.slack_ns() == 6 * MS


@given(st.lists(st.integers(-5, 10**9), min_size=1, max_size=200), st.integers(1, 50))
def test_percentiles_are_exact_over_the_window(values: list[int], capacity: int) -> None:
    stats = LatenessStats(capacity)
    for value in values:
        stats.add(value)
    window = values[-capacity:]
    summary = stats.summary()
    assert summary.ticks == len(values)
    assert summary.p50_ns == int(np.percentile(window, 50, method="higher"))
    assert summary.p99_ns == int(np.percentile(window, 99, method="higher"))
    assert summary.max_ns == max(values)  # of all, also of those that left the window


def test_no_ticks_no_figures() -> None:
    summary = LatenessStats().summary()
    assert (summary.ticks, summary.p50_ns, summary.max_ns) == (0, 0, 0)
    assert summary.as_seconds() == {"p50": 0.0, "p99": 0.0, "max": 0.0}


@pytest.mark.parametrize("spin_ns", [0, 300_000])
def test_the_real_clock_never_wakes_early(spin_ns: int) -> None:
    clock = MonotonicClock(spin_ns)
    for ahead_ns in (-MS, 0, 50_000, 2 * MS):
        t_ns = clock.now_ns() + ahead_ns
        clock.sleep_until_ns(t_ns)
        assert time.monotonic_ns() >= t_ns


def test_the_fake_clock_only_moves_forward() -> None:
    clock = FakeClock(100)
    clock.sleep_until_ns(50)
    assert clock.now_ns() == 100
    clock.sleep_until_ns(150)
    assert clock.now_ns() == 150
    with pytest.raises(ValueError, match="by_ns"):
        clock.advance(-1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MonotonicClock(-1),
        lambda: Pacer(FakeClock(), 0),
        lambda: LatenessStats(0),
    ],
)
def test_wrong_values_are_named(make: object) -> None:
    with pytest.raises(ValueError, match=r"ns: |capacity: "):
        make()  # type: ignore[operator]


def test_garbage_is_collected_only_when_it_fits() -> None:
    collector = SlackCollector()
    assert collector.collect(0) is None
    assert collector.collect(100_000) is None
    assert collector.runs == [0, 0, 0]
    generations = [collector.collect(10**12) for _ in range(250)]
    assert set(generations) == {0, 1, 2}
    assert generations.count(2) == 2
    assert generations.count(1) > 15
    assert collector.longest_ns > 0


def test_the_newest_state_is_fetched_before_the_deadline() -> None:
    clock = FakeClock()
    pacer = Pacer(clock, 10 * MS)
    deadline = pacer.start() + 10 * MS
    fetched: list[int] = []
    using_the_slack(pacer, lambda: fetched.append(clock.now_ns()))()
    assert len(fetched) == 1 and fetched[0] < deadline <= clock.now_ns()


def test_without_slack_nothing_is_fetched() -> None:
    clock = FakeClock()
    pacer = Pacer(clock, 10 * MS)
    pacer.start()
    clock.advance(25 * MS)
    fetched: list[int] = []
    using_the_slack(pacer, lambda: fetched.append(1))()
    assert not fetched and pacer.stats.missed == 1
