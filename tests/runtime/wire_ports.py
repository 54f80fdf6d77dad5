"""A publisher that sends whatever a test makes up, and ways to wait for what arrives."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import zmq

from openhelix.runtime.core.interfaces import GoalRequest, LatentGoal
from openhelix.runtime.transport.codec import encode
from openhelix.runtime.transport.wire import ENVELOPE, NewestReader

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


def settle(raw: Raw, reader: NewestReader[LatentGoal], truncated: int = 0) -> list[LatentGoal]:
    """Poll until all that was sent, `truncated` cut messages among it, has been read.

    Returns what was delivered. A last cut message of its own marks the end.
    """
    got: list[LatentGoal] = []
    mark = reader.stats.dropped["truncated"] + truncated
    raw.socket.send(b"t\0")

    def done() -> bool:
        while (message := reader.poll()) is not None:
            got.append(message)
        return reader.stats.dropped["truncated"] > mark and not reader.wait(0.0)

    until(done)
    return got


def request(robot: str, seq: int) -> GoalRequest:
    return GoalRequest(np.zeros((8, 8, 3), np.uint8), "open the drawer", robot, seq, 0, 0)
