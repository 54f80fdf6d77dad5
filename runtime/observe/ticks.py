"""What observers are told: one `TickMessage` per tick, in this process or over a stream.

`Teller` makes the message from a loop's tick. On the wall clock `TickPublisher` sends it,
unprocessed and with the new frames alone, and `EveryReader` takes it in another process: unlike
on the control path, where only the newest message counts, here every message does, and lost ones
are counted. On the lockstep clock the sinks are called with it directly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from openhelix.runtime.control.episodes import EpisodeRunner
from openhelix.runtime.control.loop import Tick
from openhelix.runtime.control.talk import Entry
from openhelix.runtime.core.clock import MonotonicClock
from openhelix.runtime.core.interfaces import F64, CameraFrame
from openhelix.runtime.robots.base import Robot
from openhelix.runtime.transport.codec import WireError, decode, kind_of, register
from openhelix.runtime.transport.wire import Inlet, Publisher, Track, topic_bytes

TOPIC = "ticks"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TickMessage:
    """A tick and what it was part of."""

    tick: Tick  # on the wire its observation holds only frames that were not sent before
    task: str
    instruction: str
    number: int  # of the instruction, from 1
    steps: int  # environment steps of this instruction so far
    judged: int  # tasks before this one that the world judged: none of one's own sentences
    succeeded: int  # of these
    visual: F64 | None = None  # what a simulated world looks like; see `Robot.visual_state`
    entries: tuple[Entry, ...] = ()  # of the journal, since the message before


register("tick", TickMessage)
Sink = Callable[[TickMessage], None]


class Teller:
    """Puts a tick into what it was part of.

    Args:
        episode_runner: who gives the loop its instructions.
        robot: asked what its world looks like; None for none.
    """

    def __init__(self, episode_runner: EpisodeRunner, robot: Robot | None = None) -> None:
        self._episode_runner, self._robot = episode_runner, robot
        self._told = 0
        self._last: TickMessage | None = None

    def __call__(self, tick: Tick) -> TickMessage:
        """Return the message of a tick; call it once for each, right after the tick."""
        runner = self._episode_runner
        current = runner.current
        entries = runner.journal.since(self._told)
        if entries:
            self._told = entries[-1].number
        self._last = TickMessage(
            tick=tick,
            task=current.task if current else "",
            instruction=current.instruction if current else "",
            number=len(runner.results) + 1,
            steps=runner.steps,
            judged=runner.judged,
            succeeded=runner.succeeded,
            visual=self._robot.visual_state() if self._robot is not None else None,
            entries=entries,
        )
        return self._last

    def rest(self) -> TickMessage | None:
        """Return the last tick once more with what happened after it; None for nothing."""
        entries = self._episode_runner.journal.since(self._told)
        if not entries or self._last is None:
            return None
        self._told = entries[-1].number
        tick = replace(self._last.tick, new_latent=None, new_chunk=None, refused_chunk=None)
        return replace(self._last, tick=tick, entries=entries)


class TickPublisher:
    """A subscriber of the loop that sends each tick."""

    def __init__(
        self, publisher: Publisher, episode_runner: EpisodeRunner, robot: Robot | None = None
    ) -> None:
        self._publisher = publisher
        self._teller = Teller(episode_runner, robot)
        self._sent_ns: dict[str, int] = {}

    def __call__(self, tick: Tick) -> None:
        fresh = self._fresh(tick.observation.frames)
        self._publisher.send(
            self._teller(replace(tick, observation=replace(tick.observation, frames=fresh)))
        )

    def finish(self) -> None:
        """Send what happened after the last tick."""
        rest = self._teller.rest()
        if rest is not None:
            self._publisher.send(rest)

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
        self._track = Track(expect, self.stats, MonotonicClock())
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
            # A publisher counts from 0: what it sent before we heard it is lost as well.
            before = self._last[1] if self._last is not None and self._last[0] == source else -1
            self.stats.gaps += max(0, seq - before - 1)
            self._last = (source, seq)
        self._track.new.clear()
        self.stats.delivered += len(messages)
        return messages

    @property
    def heard(self) -> int:
        """How many messages there were up to the newest, lost ones included."""
        return 0 if self._last is None else self._last[1] + 1

    def wait(self, timeout_s: float) -> bool:
        """Sleep until something arrives, at most `timeout_s`."""
        return bool(self._inlet.port.socket.poll(max(0, round(timeout_s * 1e3))))

    def close(self) -> None:
        """Close the socket."""
        self._inlet.port.close()
