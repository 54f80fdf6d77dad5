"""Newest wins, losses are counted, and nothing that arrives reaches the loop as an error."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openhelix.runtime.core.clock import FakeClock
from openhelix.runtime.core.interfaces import Action, LatentGoal
from openhelix.runtime.transport.codec import HEAD, MAGIC, MAX_FRAMES, VERSION, encode
from openhelix.runtime.transport.wire import ENVELOPE, NewestReader, Publisher
from tests.runtime.wire_ports import Raw, join, latent, settle, until


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(10**12)


@pytest.fixture
def pair(tmp_path: Path, clock: FakeClock) -> Iterator[tuple[Raw, NewestReader[LatentGoal]]]:
    """A raw publisher and a reader that are connected."""
    endpoint = f"ipc://{tmp_path}/raw"
    raw = Raw(endpoint)
    reader = NewestReader(endpoint, "t", LatentGoal, clock=clock)
    join(raw, reader)
    yield raw, reader
    reader.close()
    raw.close()


def test_poll_returns_the_newest_once(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/w"
    with contextlib.closing(Publisher(endpoint, "z")) as publisher:
        reader = NewestReader(endpoint, "z", LatentGoal)
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
    assert reader.stats.dropped["stale"] == 3
    raw.message(2**64 - 1)  # no publisher gets there; accepting it would deafen the reader
    raw.message(9, value=9)
    assert [m.seq for m in settle(raw, reader)] == [9]
    assert reader.stats.gaps == 0


def test_one_number_far_ahead_silences_nobody(
    pair: tuple[Raw, NewestReader[LatentGoal]],
) -> None:
    raw, reader = pair
    raw.message(1, value=1)
    settle(raw, reader)
    for jump in (5000, 2**31, 2**63):
        raw.message(1 + jump)
    assert settle(raw, reader) == []
    assert reader.stats.dropped["jump"] == 3
    raw.message(2, value=2)
    assert [m.seq for m in settle(raw, reader)] == [2]
    assert reader.stats.gaps == 0


@pytest.mark.parametrize("wrong", [4000, 2**31])
def test_a_source_that_was_silent_is_believed_whatever_its_number(
    pair: tuple[Raw, NewestReader[LatentGoal]], clock: FakeClock, wrong: int
) -> None:
    raw, reader = pair
    raw.message(1, value=1)
    settle(raw, reader)
    clock.advance(3 * 10**9)
    raw.message(wrong, value=2)  # after a long loss; or a forged one
    assert [m.seq for m in settle(raw, reader)] == [2]
    raw.message(2)
    assert settle(raw, reader) == [] and reader.stats.dropped["stale"] == 1
    clock.advance(3 * 10**9)  # and the genuine ones follow
    raw.message(3, value=3)
    raw.message(4, value=4)
    assert settle(raw, reader)[-1].seq == 4  # one poll may find both, or each its own
    raw.message(4)  # the very same again is never new
    clock.advance(3 * 10**9)
    assert settle(raw, reader) == []


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
    assert [message.seq for message in settle(raw, reader, truncated=2)] == [4]
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
            ENVELOPE.pack(1, 0, 0) + HEAD.pack(MAGIC, VERSION, 0, 3) + b"\x93lat"
            if stamped
            else b""
        )
        raw.socket.send_multipart([head, *frames] if frames else [head])
    assert settle(raw, reader) == []


def test_a_flood_is_read_in_bounded_steps(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/flood"
    raw = Raw(endpoint)
    reader = NewestReader(endpoint, "t", LatentGoal, max_drain=10, hwm=0)
    join(raw, reader)
    sent = itertools.count()

    def flooded() -> bool:
        """Send more than one poll may read, until a poll finds that much in the queue."""
        for seq in itertools.islice(sent, 95):
            raw.message(seq, value=seq)
        before = reader.stats.received
        reader.poll()
        assert reader.stats.received - before <= 10
        return reader.stats.backlogs > 0

    until(flooded)
    raw.message(last := next(sent), value=last)
    assert settle(raw, reader)[-1].seq == last
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
