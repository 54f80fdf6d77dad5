"""The true offset is inside the stated uncertainty, whatever the network does."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openhelix.runtime.core.clock import FakeClock
from openhelix.runtime.transport.offset import ClockSync, Exchange, OffsetEstimator
from openhelix.runtime.transport.rpc import RpcClient, RpcServer, RpcTimeout

US, MS, S = 1_000, 1_000_000, 1_000_000_000


class Remote:
    """A clock that is off and drifts, at the far end of two unequal ways."""

    def __init__(self, clock: FakeClock, offset_ns: int, drift_ppm: float) -> None:
        self.clock = clock
        self.start_ns = clock.now_ns()
        self.offset_ns = offset_ns
        self.drift_ppm = drift_ppm

    def offset_at(self, t_ns: int) -> int:
        return self.offset_ns + round((t_ns - self.start_ns) * self.drift_ppm * 1e-6)

    def now_ns(self) -> int:
        return self.clock.now_ns() + self.offset_at(self.clock.now_ns())

    def exchange(self, there_ns: int, work_ns: int, back_ns: int) -> Exchange:
        asked = self.clock.now_ns()
        self.clock.advance(there_ns)
        received = self.now_ns()
        self.clock.advance(work_ns)
        answered = self.now_ns()
        self.clock.advance(back_ns)
        return Exchange(asked, received, answered, self.clock.now_ns())


DELAY = st.integers(0, 50 * MS)


@settings(deadline=None, max_examples=300)
@example(0, 162.0, [(0, 3087, 0, 0)], 0)  # no delay, and a remote clock that runs fast
@given(
    st.integers(-(10**15), 10**15),
    st.floats(-200, 200),
    st.lists(
        st.tuples(DELAY, st.integers(0, 5 * MS), DELAY, st.integers(0, 30 * S)),
        min_size=1,
        max_size=40,
    ),
    st.integers(0, 300 * S),
)
def test_the_truth_is_within_the_uncertainty(
    offset_ns: int, drift_ppm: float, trips: list[tuple[int, int, int, int]], later_ns: int
) -> None:
    clock = FakeClock()
    remote = Remote(clock, offset_ns, drift_ppm)
    estimator = OffsetEstimator(drift_ppm=200.0, window=16)
    for there, work, back, pause in trips:
        assert estimator.add(remote.exchange(there, work, back))
        now = clock.now_ns()
        found = estimator.estimate(now)
        assert found is not None
        assert abs(found.offset_ns - remote.offset_at(now)) <= found.uncertainty_ns + 1
        clock.advance(pause)
    clock.advance(later_ns)
    found = estimator.estimate(clock.now_ns())
    assert found is not None
    assert abs(found.offset_ns - remote.offset_at(clock.now_ns())) <= found.uncertainty_ns + 1
    assert estimator.jumps == 0


def test_the_quickest_exchanges_decide() -> None:
    clock = FakeClock()
    remote = Remote(clock, 123_456_789, 0.0)
    estimator = OffsetEstimator()
    rng = random.Random(0)
    for _ in range(50):
        estimator.add(remote.exchange(20 * MS + rng.randrange(9 * MS), 0, rng.randrange(9 * MS)))
    slow = estimator.estimate(clock.now_ns())
    estimator.add(remote.exchange(80 * US, 10 * US, 90 * US))
    quick = estimator.estimate(clock.now_ns())
    assert slow is not None
    assert quick is not None
    assert quick.uncertainty_ns < 100 * US < slow.uncertainty_ns
    assert abs(quick.offset_ns - 123_456_789) <= quick.uncertainty_ns
    assert quick.rtt_ns == 170 * US


def test_one_sided_delays_intersect() -> None:
    clock = FakeClock()
    remote = Remote(clock, -(10**12), 0.0)
    estimator = OffsetEstimator(drift_ppm=0.0)
    estimator.add(remote.exchange(0, 0, 40 * MS))
    estimator.add(remote.exchange(40 * MS, 0, 0))
    found = estimator.estimate(clock.now_ns())
    assert found is not None
    assert found.offset_ns == -(10**12)
    assert found.uncertainty_ns <= 1  # a reading's rounding


def test_uncertainty_grows_with_age() -> None:
    clock = FakeClock()
    estimator = OffsetEstimator(drift_ppm=100.0)
    estimator.add(Remote(clock, 0, 0.0).exchange(US, 0, US))
    fresh = estimator.estimate(clock.now_ns())
    old = estimator.estimate(clock.now_ns() + 10 * S)
    assert fresh is not None
    assert old is not None
    assert old.uncertainty_ns - fresh.uncertainty_ns == pytest.approx(10 * S * 100e-6, abs=2)


def test_a_jump_is_noticed_and_begins_anew() -> None:
    clock = FakeClock()
    remote = Remote(clock, 0, 0.0)
    estimator = OffsetEstimator()
    for _ in range(5):
        estimator.add(remote.exchange(MS, 0, MS))
    remote.offset_ns = 7 * S
    estimator.add(remote.exchange(MS, 0, MS))
    found = estimator.estimate(clock.now_ns())
    assert found is not None
    assert estimator.jumps == 1
    assert abs(found.offset_ns - 7 * S) <= found.uncertainty_ns


@pytest.mark.parametrize(
    "exchange",
    [Exchange(10, 0, 0, 5), Exchange(0, 10, 5, 20), Exchange(0, 0, 100, 50)],
)
def test_impossible_exchanges_are_refused(exchange: Exchange) -> None:
    estimator = OffsetEstimator()
    assert not estimator.add(exchange)
    assert estimator.estimate(0) is None


class FakeClient:
    """Answers `time` from a `Remote` after fixed delays."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.source = "one"
        self.answer: Any = None
        self.dead = False

    def call(self, method: str, args: Any = None, timeout_s: float = 2.0) -> dict[str, Any]:
        assert method == "time"
        if self.dead:
            raise RpcTimeout("nobody there")
        exchange = self.remote.exchange(3 * MS, US, MS)
        if self.answer is not None:
            return dict(self.answer)
        times = {"t_received_ns": exchange.t_received_ns, "t_sent_ns": exchange.t_answered_ns}
        return times | {"source": self.source}


def test_times_are_translated_both_ways() -> None:
    clock = FakeClock()
    remote = Remote(clock, 5 * S, 0.0)
    sync = ClockSync(FakeClient(remote), clock)
    assert sync.to_local(0) is None
    assert sync.to_remote(0) is None
    assert sync.uncertainty_ns() is None
    sync.update()
    now_local = sync.to_local(remote.now_ns())
    bound = sync.uncertainty_ns()
    assert now_local is not None
    assert bound is not None
    assert abs(now_local - clock.now_ns()) <= bound
    assert sync.to_remote(now_local) == remote.now_ns()
    clock.advance(100 * S)
    later = sync.uncertainty_ns()
    assert later is not None
    assert later > bound


def test_a_dead_or_lying_server_leaves_the_offset_alone() -> None:
    clock = FakeClock()
    client = FakeClient(Remote(clock, S, 0.0))
    sync = ClockSync(client, clock)
    client.dead = True
    assert sync.update() is None
    client.dead = False
    good = sync.update()
    assert good is not None
    for answer in ({}, {"t_received_ns": "x", "t_sent_ns": 1}, {"t_received_ns": None}):
        client.answer = answer
        kept = sync.update()
        assert kept is not None
        assert abs(kept.offset_ns - S) <= kept.uncertainty_ns


def test_another_server_process_begins_anew() -> None:
    clock = FakeClock()
    client = FakeClient(Remote(clock, S, 0.0))
    sync = ClockSync(client, clock)
    sync.update()
    client.remote = Remote(clock, 9 * S, 0.0)
    client.source = "two"
    found = sync.update()
    assert found is not None
    assert abs(found.offset_ns - 9 * S) <= found.uncertainty_ns


def test_over_a_real_server_on_one_host_the_offset_is_zero() -> None:
    server = RpcServer("tcp://127.0.0.1:*", {})
    server.start()
    client = RpcClient(server.bound)
    sync = ClockSync(client)
    heard: list[int] = []
    try:
        sync.start(period_s=0.01, on_update=lambda offset: heard.append(offset.offset_ns))
        while len(heard) < 3:
            sync._stop.wait(0.005)
    finally:
        sync.close()
        client.close()
        server.close()
    offset = sync.offset
    assert offset is not None
    assert abs(offset.offset_ns) <= offset.uncertainty_ns
