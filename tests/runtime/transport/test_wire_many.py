"""One reader for many robots: each topic's newest, limits, and names that stay with their owner."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from openhelix.runtime.core.clock import FakeClock
from openhelix.runtime.core.interfaces import GoalRequest
from openhelix.runtime.transport.wire import TAKEOVER_NS, NewestPerTopic, Publisher
from tests.runtime.wire_ports import request, until


def test_one_reader_hears_many_robots(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/serve"
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
    endpoint = f"ipc://{tmp_path}/many"
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
    endpoint = f"ipc://{tmp_path}/names"
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
    endpoint = f"ipc://{tmp_path}/large"
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
