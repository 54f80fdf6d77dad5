"""Publishers and who hears them: topics, slow and late readers, restarts, where one may bind."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from openhelix.runtime.core.clock import MonotonicClock
from openhelix.runtime.core.interfaces import LatentGoal
from openhelix.runtime.transport.codec import WireError
from openhelix.runtime.transport.sockets import BindRefused
from openhelix.runtime.transport.wire import NewestReader, Publisher
from tests.runtime.wire_ports import latent, until


def test_a_topic_is_exact(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/topics"
    other = Publisher(endpoint, "arm10")
    right = Publisher(f"ipc://{tmp_path}/right", "arm1")
    reader = NewestReader([endpoint, f"ipc://{tmp_path}/right"], "arm1", LatentGoal)
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
    endpoint = f"ipc://{tmp_path}/slow"
    publisher = Publisher(endpoint, "z", hwm=64)
    slow = NewestReader(endpoint, "z", LatentGoal, hwm=4)
    quick = NewestReader(endpoint, "z", LatentGoal, hwm=0)
    for reader in (slow, quick):
        until(lambda reader=reader: publisher.send(latent(0)) and reader.poll())
    missed = publisher.sent - quick.stats.received  # it had not joined yet
    big = dataclasses.replace(latent(1), z=np.ones((1, 65536), np.float32))
    while publisher.send(big):  # until the slow one's queues are full
        until(quick.poll)  # the quick one's never are
        assert publisher.sent < 10_000
    assert publisher.dropped == 1
    until(lambda: quick.poll() is None and quick.stats.received >= publisher.sent - missed)
    publisher.send(dataclasses.replace(big, seq=77))

    def reached(reader: NewestReader[LatentGoal]) -> bool:
        message = reader.poll()
        return message is not None and message.seq == 77

    until(lambda: reached(quick))  # without any help
    until(lambda: publisher.send(dataclasses.replace(big, seq=77)) and reached(slow))
    assert slow.gaps >= 1
    assert quick.gaps == 0
    for port in (publisher, slow, quick):
        port.close()


def test_sending_what_breaks_the_schema_says_so(tmp_path: Path) -> None:
    with contextlib.closing(Publisher(f"ipc://{tmp_path}/bad", "z")) as publisher:
        with pytest.raises(WireError, match=r"LatentGoal\.z"):
            publisher.send(dataclasses.replace(latent(), z=np.zeros((1, 3))))
        with pytest.raises(WireError):
            publisher.send({"not": "a record"})


def test_a_publisher_that_comes_back_is_heard_again(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/again"
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
        lambda e: NewestReader(e, "z", LatentGoal, max_drain=0),
    ],
)
def test_wrong_arguments_are_refused(make: Callable[[str], object], tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        make(f"ipc://{tmp_path}/wrong")


def test_tcp_on_loopback(tmp_path: Path) -> None:
    publisher = Publisher("tcp://127.0.0.1:*", "z", clock=MonotonicClock())
    reader = NewestReader(publisher.bound, "z", LatentGoal)
    until(lambda: publisher.send(latent(1)) and reader.poll())
    publisher.close()
    reader.close()
