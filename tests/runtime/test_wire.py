"""Newest wins, losses are counted, and nothing that arrives reaches the loop as an error."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.clock import FakeClock, MonotonicClock
from runtime.codec import HEAD, MAX_FRAMES, encode
from runtime.newest import ENVELOPE, TAKEOVER_NS
from runtime.types import Action, GoalRequest, LatentGoal
from runtime.wire import (
    BindRefused,
    NewestPerTopic,
    NewestReader,
    Publisher,
    WireError,
    ipc_endpoint,
)

PATIENCE_S = 20.0  # how long a test waits for what is sure to happen


def latent(seq: int = 0) -> LatentGoal:
    return LatentGoal(np.full((1, 512), seq, np.float32), seq, 0, 0, 0, "spec")


def until(condition: Callable[[], Any]) -> Any:
    """Poll a condition until it holds; fail after `PATIENCE_S`."""
    give_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up:
        value = condition()
        if value:
            return value
        time.sleep(0.002)
    raise AssertionError("it never happened")


class Raw:
    """A publisher that sends whatever frames a test makes up."""

    def __init__(self, endpoint: str) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUB)
        self.socket.linger = 0
        self.socket.sndhwm = 0
        self.socket.bind(endpoint)

    def message(self, seq: int, source: int = 1, sent_ns: int = 0, value: int = 0) -> None:
        prefix = b"t\0" + ENVELOPE.pack(source, seq, sent_ns)
        self.socket.send_multipart(encode(latent(value), prefix))

    def close(self) -> None:
        self.socket.close(linger=0)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(10**12)


@pytest.fixture
def pair(tmp_path: Path, clock: FakeClock) -> Iterator[tuple[Raw, NewestReader[LatentGoal]]]:
    """A raw publisher and a reader that are connected."""
    endpoint = ipc_endpoint(tmp_path, "raw")
    raw = Raw(endpoint)
    reader = NewestReader(endpoint, "t", LatentGoal, clock=clock)
    join(raw, reader)
    yield raw, reader
    reader.close()
    raw.close()


def join(raw: Raw, reader: NewestReader[LatentGoal]) -> None:
    """Send until the subscription has arrived, then forget that."""

    def reached() -> bool:
        raw.socket.send(b"t\0")
        reader.poll()
        return reader.stats.dropped["truncated"] > 0

    until(reached)
    settle(raw, reader)
    reader.stats.dropped.clear()
    reader.stats.received = 0


def settle(raw: Raw, reader: NewestReader[LatentGoal]) -> list[LatentGoal]:
    """Poll until all that was sent has been read; return what was delivered."""
    got: list[LatentGoal] = []
    mark = reader.stats.dropped["truncated"]
    raw.socket.send(b"t\0")

    def done() -> bool:
        while (message := reader.poll()) is not None:
            got.append(message)
        return reader.stats.dropped["truncated"] > mark and not reader.wait(0.0)

    until(done)
    return got


def take_one(raw: Raw, reader: NewestReader[LatentGoal]) -> LatentGoal | None:
    """Let everything queue up, then poll once."""
    until(lambda: reader.wait(0.1))
    time.sleep(0.5)
    return reader.poll()


def test_poll_returns_the_newest_once(tmp_path: Path) -> None:
    endpoint = ipc_endpoint(tmp_path, "w")
    with contextlib.closing(Publisher(endpoint, "z")) as publisher:
        reader = NewestReader(endpoint, "z", LatentGoal, max_age_ns=10**11)
        seq = 0

        def sent_and_got() -> LatentGoal | None:
            nonlocal seq
            seq += 1
            publisher.send(latent(seq))
            return reader.poll()

        until(sent_and_got)
        for value in range(100, 120):
            publisher.send(latent(value))
        last = None

        def finished() -> bool:
            nonlocal last
            last = reader.poll() or last
            return last is not None and last.seq == 119

        until(finished)
        assert last is not None
        assert (last.z == 119).all()
        assert reader.poll() is None
        assert reader.gaps == 0
        assert reader.envelope is not None
        assert f"{reader.envelope.source:016x}" == publisher.source
        reader.close()


def test_gaps_are_counted(pair: tuple[Raw, NewestReader[LatentGoal]]) -> None:
    raw, reader = pair
    for seq in (5, 6, 9, 10, 20):
        raw.message(seq)
    settle(raw, reader)
    assert reader.stats.gaps == 2 + 9  # those before the first are not ours to miss
    assert reader.stats.received == 5 + 1
    raw.message(22)
    settle(raw, reader)
    assert reader.stats.gaps == 12


def test_numbers_never_go_back(pair: tuple[Raw, NewestReader[LatentGoal]]) -> None:
    raw, reader = pair
    raw.message(8, value=8)
    assert [m.seq for m in settle(raw, reader)] == [8]
    for seq in (3, 8, 7):
        raw.message(seq)
    assert settle(raw, reader) == []
    assert (reader.stats.dropped["stale"], reader.stats.dropped["repeat"]) == (2, 1)
    raw.message(2**64 - 1)  # no publisher gets there; accepting it would deafen the reader
    raw.message(9, value=9)
    assert [m.seq for m in settle(raw, reader)] == [9]
    assert reader.stats.gaps == 0


def test_a_restart_takes_over_and_the_old_publisher_stays_out(
    pair: tuple[Raw, NewestReader[LatentGoal]], clock: FakeClock
) -> None:
    raw, reader = pair
    raw.message(50, source=1, value=1)
    settle(raw, reader)
    raw.message(0, source=2, value=2)  # a new start counts from 0
    assert [m.seq for m in settle(raw, reader)] == [2]
    assert reader.stats.restarts == 1
    raw.message(51, source=1)
    assert settle(raw, reader) == []
    assert reader.stats.dropped["stale_source"] == 1
    clock.advance(3 * 10**9)  # the new one has fallen silent, so the old one is better
    raw.message(52, source=1, value=3)
    assert [m.seq for m in settle(raw, reader)] == [3]
    assert reader.stats.restarts == 2


def test_old_and_unbelievable_times_are_refused(tmp_path: Path, clock: FakeClock) -> None:
    endpoint = ipc_endpoint(tmp_path, "age")
    raw = Raw(endpoint)
    reader = NewestReader(endpoint, "t", LatentGoal, clock=clock, max_age_ns=1000)
    join(raw, reader)
    now = clock.now_ns()
    raw.message(1, sent_ns=now - 1001)
    raw.message(2, sent_ns=now + 1001)
    assert settle(raw, reader) == []
    raw.message(3, sent_ns=now - 1000, value=3)
    assert [m.seq for m in settle(raw, reader)] == [3]
    assert reader.stats.dropped["expired"] == 1
    assert reader.stats.dropped["future"] == 1
    reader.close()
    raw.close()


def test_remote_times_are_translated_and_distrusted_until_then(
    tmp_path: Path, clock: FakeClock
) -> None:
    endpoint = ipc_endpoint(tmp_path, "remote")
    offset: list[int | None] = [None]

    def to_local(t_ns: int) -> int | None:
        return None if offset[0] is None else t_ns - offset[0]

    raw = Raw(endpoint)
    reader = NewestReader(
        endpoint, "t", LatentGoal, clock=clock, max_age_ns=1000, to_local=to_local
    )
    join(raw, reader)
    remote_now = clock.now_ns() + 7 * 10**9
    raw.message(1, sent_ns=remote_now)
    assert settle(raw, reader) == []
    assert reader.stats.dropped["unsynced"] == 1
    offset[0] = 7 * 10**9
    raw.message(2, sent_ns=remote_now, value=2)
    assert [m.seq for m in settle(raw, reader)] == [2]
    reader.close()
    raw.close()


def test_bad_messages_are_counted_and_the_last_good_one_wins(
    pair: tuple[Raw, NewestReader[LatentGoal]],
) -> None:
    raw, reader = pair
    stamp = b"t\0" + ENVELOPE.pack(1, 99, 0)
    raw.message(4, value=4)
    raw.socket.send(stamp + b"OH\x09\0\0\0\0\0")
    raw.socket.send_multipart(encode(Action(np.zeros(7), 0.0), stamp))
    raw.socket.send(b"t\0short")
    raw.socket.send(bytes(encode(latent(), stamp)[0])[:-8])
    message = take_one(raw, reader)
    assert message is not None
    assert message.seq == 4
    settle(raw, reader)
    dropped = reader.stats.dropped
    assert (dropped["version"], dropped["kind"]) == (1, 1)
    assert dropped["truncated"] == 1 + 1 + 1  # the short one, the cut one, and `settle`'s


def test_a_forger_does_not_displace_the_publisher(
    pair: tuple[Raw, NewestReader[LatentGoal]],
) -> None:
    raw, reader = pair
    raw.message(1, source=1)
    settle(raw, reader)
    raw.socket.send(b"t\0" + ENVELOPE.pack(666, 0, 0) + b"nonsense")
    raw.message(2, source=1, value=2)
    assert [m.seq for m in settle(raw, reader)] == [2]
    assert reader.stats.restarts == 0


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.lists(st.binary(max_size=120), max_size=4), max_size=6), st.booleans())
def test_arbitrary_frames_never_raise(
    pair: tuple[Raw, NewestReader[LatentGoal]], messages: list[list[bytes]], stamped: bool
) -> None:
    raw, reader = pair
    for frames in messages:
        head = b"t\0" + (
            ENVELOPE.pack(1, 0, 0) + HEAD.pack(b"OH", 1, 0, 3) + b"\x93lat" if stamped else b""
        )
        raw.socket.send_multipart([head, *frames] if frames else [head])
    assert settle(raw, reader) == []


def test_a_flood_is_read_in_bounded_steps(tmp_path: Path) -> None:
    endpoint = ipc_endpoint(tmp_path, "flood")
    raw = Raw(endpoint)
    reader = NewestReader(endpoint, "t", LatentGoal, max_drain=10, hwm=0)
    join(raw, reader)
    for seq in range(95):
        raw.message(seq, value=seq)
    time.sleep(0.5)
    before = reader.stats.received
    first = reader.poll()
    assert reader.stats.received - before <= 10
    assert first is not None
    assert first.seq <= 9
    assert reader.stats.backlogs == 1
    assert settle(raw, reader)[-1].seq == 94
    assert reader.gaps == 0
    reader.close()
    raw.close()


def test_endless_messages_are_thrown_away_piece_by_piece(
    pair: tuple[Raw, NewestReader[LatentGoal]],
) -> None:
    raw, reader = pair
    raw.socket.send_multipart([b"t\0" + ENVELOPE.pack(1, 1, 0)] + [b"x"] * (20 * MAX_FRAMES))
    raw.message(2, value=2)
    assert [m.seq for m in settle(raw, reader)] == [2]
    assert reader.stats.dropped["oversize"] == 1
    assert reader.stats.backlogs > 0  # one poll did not swallow it all


def test_a_topic_is_exact(tmp_path: Path) -> None:
    endpoint = ipc_endpoint(tmp_path, "topics")
    other = Publisher(endpoint, "arm10")
    right = Publisher(ipc_endpoint(tmp_path, "right"), "arm1")
    reader = NewestReader([endpoint, ipc_endpoint(tmp_path, "right")], "arm1", LatentGoal)
    control = NewestReader(endpoint, "arm10", LatentGoal)

    def both() -> bool:
        other.send(latent(10))
        right.send(latent(1))
        got = reader.poll()
        assert got is None or got.seq == 1
        return got is not None and control.poll() is not None

    until(both)
    for port in (other, right, reader, control):
        port.close()


def test_a_slow_reader_is_counted_costs_the_others_nothing_and_gets_the_newest(
    tmp_path: Path,
) -> None:
    endpoint = ipc_endpoint(tmp_path, "slow")
    publisher = Publisher(endpoint, "z", hwm=64)
    slow = NewestReader(endpoint, "z", LatentGoal, hwm=4)
    quick = NewestReader(endpoint, "z", LatentGoal, hwm=0)
    for reader in (slow, quick):
        until(lambda reader=reader: publisher.send(latent(0)) and reader.poll())
    big = dataclasses.replace(latent(1), z=np.ones((1, 65536), np.float32))
    while publisher.send(big):  # until the slow one's queues are full
        until(quick.poll)  # the quick one's never are
        assert publisher.sent < 10_000
    assert publisher.dropped == 1
    until(lambda: quick.poll() is None and quick.stats.received > 64)
    publisher.send(dataclasses.replace(big, seq=77))

    def reached(reader: NewestReader[LatentGoal]) -> bool:
        message = reader.poll()
        return message is not None and message.seq == 77

    until(lambda: reached(quick))  # without any help
    until(lambda: publisher.repeat() and reached(slow))
    assert slow.gaps >= 1
    assert quick.gaps == 0
    for port in (publisher, slow, quick):
        port.close()


def test_who_joins_late_gets_the_last_message_from_a_repeat(tmp_path: Path) -> None:
    endpoint = ipc_endpoint(tmp_path, "late")
    publisher = Publisher(endpoint, "z")
    assert not publisher.repeat()
    publisher.send(latent(5))
    reader = NewestReader(endpoint, "z", LatentGoal)
    got: list[LatentGoal] = []

    def heard() -> bool:
        assert publisher.repeat()
        message = reader.poll()
        if message is not None:
            got.append(message)
        return reader.stats.dropped["repeat"] > 3

    until(heard)
    assert [message.seq for message in got] == [5]
    assert reader.gaps == 0
    publisher.close()
    reader.close()


def test_sending_what_breaks_the_schema_says_so(tmp_path: Path) -> None:
    with contextlib.closing(Publisher(ipc_endpoint(tmp_path, "bad"), "z")) as publisher:
        with pytest.raises(WireError, match=r"LatentGoal\.z"):
            publisher.send(dataclasses.replace(latent(), z=np.zeros((1, 3))))
        with pytest.raises(WireError):
            publisher.send({"not": "a record"})


def test_a_publisher_that_comes_back_is_heard_again(tmp_path: Path) -> None:
    endpoint = ipc_endpoint(tmp_path, "again")
    reader = NewestReader(endpoint, "z", LatentGoal)  # before anybody is there
    for start in range(3):
        publisher = Publisher(endpoint, "z")

        def heard(publisher: Publisher = publisher, start: int = start) -> bool:
            publisher.send(latent(start))
            message = reader.poll()
            return message is not None and message.seq == start

        until(heard)
        publisher.close()
    assert reader.stats.restarts == 2
    reader.close()


def request(robot: str, seq: int) -> GoalRequest:
    return GoalRequest(np.zeros((8, 8, 3), np.uint8), "open the drawer", robot, seq, 0, 0)


def test_one_reader_hears_many_robots(tmp_path: Path) -> None:
    endpoint = ipc_endpoint(tmp_path, "serve")
    reader = NewestPerTopic(endpoint, GoalRequest)
    robots = {name: Publisher(endpoint, name, bind=False) for name in ("arm1", "arm10", "b")}
    newest: dict[str, int] = {}
    seq = 0

    def all_heard() -> bool:
        nonlocal seq
        seq += 1
        for name, publisher in robots.items():
            publisher.send(request(name, seq))
        for name, message in reader.poll().items():
            assert message.robot == name
            assert message.seq > newest.get(name, 0)
            newest[name] = message.seq
        return len(newest) == 3

    until(all_heard)
    assert reader.stats.gaps == 0
    for publisher in robots.values():
        publisher.close()
    reader.close()


def test_topics_are_limited_and_silent_ones_make_room(tmp_path: Path) -> None:
    clock = FakeClock(10**12)
    endpoint = ipc_endpoint(tmp_path, "many")
    reader = NewestPerTopic(endpoint, GoalRequest, max_topics=2, clock=clock)
    robots = [Publisher(endpoint, f"r{index}", bind=False) for index in range(3)]

    def heard(index: int) -> bool:
        robots[index].send(request(f"r{index}", 0))
        return f"r{index}" in reader.poll()

    until(lambda: heard(0))
    until(lambda: heard(1))
    until(lambda: heard(2) or reader.stats.dropped["topics"] > 3)
    assert not heard(2)
    clock.advance(10**11)
    until(lambda: heard(2))
    for publisher in robots:
        publisher.close()
    reader.close()


def test_a_taken_topic_stays_with_its_first_publisher_until_that_falls_silent(
    tmp_path: Path,
) -> None:
    clock = FakeClock(10**12)
    endpoint = ipc_endpoint(tmp_path, "names")
    reader = NewestPerTopic(endpoint, GoalRequest, clock=clock, first_stays=True)
    first = Publisher(endpoint, "arm", bind=False)
    seq = 0

    def heard() -> bool:
        nonlocal seq
        seq += 1
        first.send(request("arm", seq))
        message = reader.poll().get("arm")
        assert message is None or message.instruction == "open the drawer"
        return message is not None

    until(heard)
    owner = reader.sender("arm")
    second = Publisher(endpoint, "arm", bind=False)
    other = dataclasses.replace(request("arm", 10**6), instruction="something else")

    def flooded() -> bool:
        for _ in range(40):  # more than a reader looks at closely
            second.send(other)
        return heard() and reader.taken.get("arm", 0) > 100

    until(flooded)
    assert reader.stats.dropped["taken"] == reader.taken["arm"]
    assert reader.stats.restarts == 0 and reader.sender("arm") == owner
    clock.advance(TAKEOVER_NS)

    def taken_over() -> bool:
        second.send(other)
        message = reader.poll().get("arm")
        return message is not None and message.instruction == "something else"

    until(taken_over)
    assert reader.sender("arm") != owner
    for port in (first, second, reader):
        port.close()


def test_a_message_beyond_the_readers_own_limit_is_counted_and_the_next_is_read(
    tmp_path: Path,
) -> None:
    endpoint = ipc_endpoint(tmp_path, "large")
    reader = NewestPerTopic(endpoint, GoalRequest, max_bytes=100_000)
    publisher = Publisher(endpoint, "arm", bind=False)
    large = dataclasses.replace(request("arm", 0), rgb=np.zeros((200, 200, 3), np.uint8))

    def refused() -> bool:
        publisher.send(large)
        assert reader.poll() == {}
        return reader.stats.dropped["oversize"] > 0

    until(refused)

    def heard() -> bool:
        publisher.send(request("arm", 1))
        return "arm" in reader.poll()

    until(heard)
    publisher.close()
    reader.close()


def test_network_endpoints_need_keys() -> None:
    with pytest.raises(BindRefused, match="openhelix keys"):
        Publisher("tcp://0.0.0.0:5999", "z")
    with pytest.raises(ValueError, match="openhelix keys"):
        NewestReader("tcp://10.0.0.1:5999", "z", LatentGoal)


@pytest.mark.parametrize(
    "make",
    [
        lambda e: Publisher(e, ""),
        lambda e: Publisher(e, "a\0b"),
        lambda e: Publisher(e, "x" * 200),
        lambda e: NewestReader(e, "z", dict),
        lambda e: NewestReader(e, "z", LatentGoal, max_age_ns=0),
        lambda e: NewestReader(e, "z", LatentGoal, max_drain=0),
    ],
)
def test_wrong_arguments_are_refused(make: Callable[[str], object], tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        make(ipc_endpoint(tmp_path, "wrong"))


def test_tcp_on_loopback(tmp_path: Path) -> None:
    publisher = Publisher("tcp://127.0.0.1:*", "z", clock=MonotonicClock())
    reader = NewestReader(publisher.bound, "z", LatentGoal, max_age_ns=10**11)
    until(lambda: publisher.send(latent(1)) and reader.poll())
    publisher.close()
    reader.close()
