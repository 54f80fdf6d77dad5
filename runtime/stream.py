"""Every tick of the loop, for processes that look on: video, recording, viewer.

The control process does one thing for them: it sends a tick as it is, with the frames that
are new. Drawing and encoding happen elsewhere, so that no spectator ever holds the control
thread's interpreter. Unlike the control path, where only the newest counts, here all messages
do; those that were lost are counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from runtime.clock import MonotonicClock
from runtime.codec import WireError, decode, kind_of, register
from runtime.director import Director
from runtime.loop import Tick
from runtime.newest import AgeLimit, Inlet, Track, topic_bytes
from runtime.types import CameraFrame
from runtime.wire import Publisher

TOPIC = "ticks"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TickMessage:
    """A tick and what it was part of."""

    tick: Tick  # its observation holds only frames that were not sent before
    task: str
    instruction: str
    number: int  # of the task, from 1
    steps: int  # environment steps of this task so far
    succeeded: int  # tasks before this one that succeeded


register("tick", TickMessage)


class TickPublisher:
    """A subscriber of the loop that sends each tick."""

    def __init__(self, publisher: Publisher, director: Director) -> None:
        self._publisher, self._director = publisher, director
        self._sent_ns: dict[str, int] = {}

    def __call__(self, tick: Tick) -> None:
        director, current = self._director, self._director.current
        fresh = self._fresh(tick.observation.frames)
        self._publisher.send(
            TickMessage(
                tick=replace(tick, observation=replace(tick.observation, frames=fresh)),
                task=current.task if current else "",
                instruction=current.instruction if current else "",
                number=len(director.results) + 1,
                steps=director.steps,
                succeeded=director.succeeded,
            )
        )

    def _fresh(self, frames: Mapping[str, CameraFrame]) -> dict[str, CameraFrame]:
        fresh = {n: f for n, f in frames.items() if self._sent_ns.get(n) != f.t_ns}
        for name, frame in fresh.items():
            self._sent_ns[name] = frame.t_ns
        return fresh


class EveryReader(Generic[T]):
    """Returns every message of a topic, in order.

    Args:
        endpoint: bound here; publishers connect.
        topic: exactly the publishers'.
        expect: the record's class; anything else is dropped and counted.
        keys: folder of CURVE keys, off loopback.
        hwm: messages that may queue.
    """

    def __init__(
        self,
        endpoint: str,
        topic: str,
        expect: type[T],
        *,
        keys: str | None = None,
        hwm: int = 10_000,
    ) -> None:
        kind_of(expect)
        self._expect = expect
        prefix = topic_bytes(topic) + b"\0"
        self._inlet = Inlet(endpoint, prefix, bind=True, keys=keys, hwm=hwm, max_drain=256)
        self.stats = self._inlet.stats
        clock = MonotonicClock()
        self._track = Track(expect, self.stats, AgeLimit(None, clock, None), clock)
        self._last: tuple[int, int] | None = None  # source and number of the last message

    def poll(self) -> list[T]:
        """Return what has arrived; never blocks or raises."""
        self._inlet.drain(lambda _: self._track)
        messages = []
        for (source, seq, _), frames, start, _ in self._track.new:
            try:
                messages.append(decode(frames, self._expect, start))
            except WireError as error:
                self.stats.dropped[error.reason] += 1
                continue
            if self._last is not None and self._last[0] == source:
                self.stats.gaps += max(0, seq - self._last[1] - 1)
            self._last = (source, seq)
        self._track.new.clear()
        self.stats.delivered += len(messages)
        return messages

    def wait(self, timeout_s: float) -> bool:
        """Sleep until something arrives, at most `timeout_s`."""
        return bool(self._inlet.port.socket.poll(max(0, round(timeout_s * 1e3))))

    def close(self) -> None:
        """Close the socket."""
        self._inlet.port.close()
