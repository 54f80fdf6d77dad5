"""Data between processes: a publisher, and readers that keep only the newest message.

A message begins with `topic NUL envelope`, then come `runtime.codec`'s frames. The envelope
(`Envelope`) says who sent it since which start, the how-manieth it is, and when, so that
losses are counted for every kind of message alike. The NUL makes a subscription exact:
ZeroMQ matches prefixes, and `arm1` must not receive `arm10`.

Readers drain their queue without blocking and keep the newest. ZMQ_CONFLATE is not used: it
now and then loses the very newest message, and it cuts multipart messages up. Queues are
long for the same reason: when one is full, ZeroMQ drops what is *newest*. All of a message's
times are the sender's clock; `runtime.offset` translates between hosts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

import zmq

from runtime.clock import Clock, MonotonicClock
from runtime.codec import Buffer, WireError, decode, encode, kind_of, register
from runtime.curve import Keys
from runtime.endpoints import BindRefused, check_bind, ipc_endpoint
from runtime.newest import (
    ENVELOPE,
    NOBLOCK,
    TAKEOVER_NS,
    AgeLimit,
    Envelope,
    Inlet,
    ReaderStats,
    Track,
    topic_bytes,
)
from runtime.sockets import Port

__all__ = [
    "BindRefused",
    "Envelope",
    "NewestPerTopic",
    "NewestReader",
    "Publisher",
    "ReaderStats",
    "WireError",
    "check_bind",
    "decode",
    "encode",
    "ipc_endpoint",
    "register",
]

T = TypeVar("T")
_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)


class Publisher:
    """Sends records on one topic; never blocks, and says when somebody could not keep up.

    Args:
        endpoint: where; `ipc://`, or `tcp://` (beyond this host only with keys).
        topic: what readers subscribe to, exactly.
        bind: False where the readers bind, for example at one System 2 for many robots.
        keys: CURVE keys; a folder, or an object that several sockets share.
        hwm: messages to hold for each reader that does not keep up. Keep it above any
            burst, because a full queue loses the newest message (see `repeat`); for images
            remember that all of them are held in memory.
        clock: stamps the messages.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str],
        topic: str,
        *,
        bind: bool = True,
        keys: Keys | None = None,
        hwm: int = 1000,
        clock: Clock | None = None,
    ) -> None:
        self._prefix = topic_bytes(topic) + b"\0"
        self._clock = clock or MonotonicClock()
        self._source = int.from_bytes(os.urandom(8), "little")
        self._seq = 0
        self._last: list[Buffer] = []
        self.sent = 0
        self.dropped = 0  # sends that found a reader's queue just filled; see `send`
        # With NODROP a queue that fills up is an error that can be counted, not silence.
        options: dict[int, int | bytes] = {zmq.SNDHWM: hwm, zmq.XPUB_NODROP: 1}
        self._port = Port(zmq.PUB, endpoint, bind=bind, keys=keys, options=options)
        self._send = self._port.socket.send

    @property
    def source(self) -> str:
        """Identity of this publisher since its start, as 16 hexadecimal digits."""
        return f"{self._source:016x}"

    @property
    def bound(self) -> str:
        """The endpoint really bound, for example after asking for port `*`."""
        return self._port.bound

    def send(self, message: object) -> bool:
        """Send a record; return False where a reader's queue has just filled up.

        That reader then misses messages, which it counts as gaps, until it has read on; the
        others miss nothing.

        Raises:
            WireError: the message breaks its own schema.
        """
        envelope = ENVELOPE.pack(self._source, self._seq, self._clock.now_ns())
        frames = encode(message, self._prefix + envelope)
        self._seq += 1
        self._last = frames
        self.sent += 1
        return self._put(frames)

    def repeat(self) -> bool:
        """Send the last message again as it was; return False before there is one.

        For readers that joined since, and for those whose queue was full, because a full
        queue loses what is newest. Who has it already drops the copy by its number.
        """
        if self._last:
            self._put(self._last)
        return bool(self._last)

    def _put(self, frames: list[Buffer]) -> bool:
        if self._try(frames):
            return True
        self.dropped += 1
        self._port.socket.set(zmq.XPUB_NODROP, 0)  # one slow reader must not hold up the others
        self._try(frames)
        self._port.socket.set(zmq.XPUB_NODROP, 1)
        return False

    def _try(self, frames: list[Buffer]) -> bool:
        """Send without waiting. Copies: up to megabytes zero-copy sends cost more than that."""
        try:
            for frame in frames[:-1]:
                self._send(frame, _MORE)
            self._send(frames[-1], NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        """Close the socket; what is still queued is discarded."""
        self._port.close()


class NewestReader(Generic[T]):
    """Receives records of one class on one topic; `poll` returns the newest, or None.

    Within one publisher an earlier number never follows a later one. Another publisher (a
    restart) takes over at once; the one it replaced is not heard again until the new one has
    been silent for `TAKEOVER_NS`. Everything that is not delivered is counted in
    `stats.dropped` by reason: those of `WireError`, "repeat" (of the last one, harmless), "stale" (an earlier number), "stale_source"
    (a replaced publisher), "expired" and "future" (see `max_age_ns`), "unsynced" (`to_local`
    cannot say yet).

    Args:
        endpoint: one, or a list of which each may have a publisher.
        topic: exactly the publisher's.
        expect: the record's class; anything else is dropped.
        bind: True where the publishers connect to this side.
        keys: CURVE keys; a folder, or an object that several sockets share.
        max_age_ns: refuse messages sent longer ago than this; None takes any.
        clock: for ages.
        to_local: translates the publisher's times to this host's; see `runtime.offset`.
        hwm: messages the queue holds while nobody polls.
        max_drain: messages one `poll` takes from the queue at most, so that a flood cannot
            stall a control loop.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str],
        topic: str,
        expect: type[T],
        *,
        bind: bool = False,
        keys: Keys | None = None,
        max_age_ns: int | None = None,
        clock: Clock | None = None,
        to_local: Callable[[int], int | None] | None = None,
        hwm: int = 1000,
        max_drain: int = 256,
    ) -> None:
        kind_of(expect)
        clock = clock or MonotonicClock()
        self._topic = topic_bytes(topic)
        self._inlet = Inlet(
            endpoint, self._topic + b"\0", bind=bind, keys=keys, hwm=hwm, max_drain=max_drain
        )
        self.stats = self._inlet.stats
        limit = AgeLimit(max_age_ns, clock, to_local)
        self._track = Track(expect, self.stats, limit, clock)

    @property
    def gaps(self) -> int:
        """Messages lost on the way so far."""
        return self.stats.gaps

    @property
    def envelope(self) -> Envelope | None:
        """The envelope of the message that `poll` returned last."""
        return self._track.envelope

    @property
    def bound(self) -> str:
        """The endpoint really bound, where this side binds."""
        return self._inlet.port.bound

    def poll(self) -> T | None:
        """Return the newest message since the last call, or None; never blocks or raises."""
        self._inlet.drain(self._find)
        message = self._track.settle()
        if message is not None:
            self.stats.delivered += 1
        return message

    def wait(self, timeout_s: float) -> bool:
        """Sleep until something arrives, at most `timeout_s`; for threads without deadlines."""
        return bool(self._inlet.port.socket.poll(max(0, round(timeout_s * 1e3))))

    def _find(self, topic: bytes) -> Track[T] | None:
        return self._track

    def close(self) -> None:
        """Close the socket."""
        self._inlet.port.close()


class NewestPerTopic(Generic[T]):
    """A `NewestReader` for every topic at once: one System 2 hears many robots.

    Topics beyond `max_topics` are dropped ("topics") unless another has been silent for ten
    times `TAKEOVER_NS`, which then makes room.

    Args:
        first_stays: a topic belongs to its first publisher until that falls silent; another
            is refused ("taken"). Otherwise the newest takes over, as after a restart.
        max_bytes: larger messages are refused ("oversize"); None for what ZeroMQ lets in.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str],
        expect: type[T],
        *,
        bind: bool = True,
        keys: Keys | None = None,
        max_age_ns: int | None = None,
        clock: Clock | None = None,
        hwm: int = 1000,
        max_drain: int = 256,
        max_topics: int = 64,
        first_stays: bool = False,
        max_bytes: int | None = None,
    ) -> None:
        kind_of(expect)
        self._expect, self._first_stays = expect, first_stays
        self._clock = clock or MonotonicClock()
        self._limit = AgeLimit(max_age_ns, self._clock, None)
        self._inlet = Inlet(
            *(endpoint, b""),
            bind=bind,
            keys=keys,
            hwm=hwm,
            max_drain=max_drain,
            max_bytes=max_bytes,
        )
        self.stats = self._inlet.stats
        self.port = self._inlet.port
        self._max_topics = max_topics
        self._tracks: dict[bytes, Track[T]] = {}

    @property
    def bound(self) -> str:
        """The endpoint really bound, where this side binds."""
        return self._inlet.port.bound

    @property
    def taken(self) -> dict[str, int]:
        """Messages refused because their topic was taken, by topic."""
        tracks = list(self._tracks.items())
        return {topic.decode(): track.taken for topic, track in tracks if track.taken}

    def sender(self, topic: str) -> int | None:
        """Return the source of the message that `poll` returned last for a topic."""
        track = self._tracks.get(topic.encode())
        envelope = track.envelope if track is not None else None
        return None if envelope is None else envelope.source

    def key(self, topic: str) -> str:
        """Return the public CURVE key of who sent a topic's last message; "" without keys."""
        track = self._tracks.get(topic.encode())
        return "" if track is None else track.key

    def poll(self) -> dict[str, T]:
        """Return the newest message of each topic that has one; never blocks or raises."""
        self._inlet.drain(self._find)
        found: dict[str, T] = {}
        for topic, track in self._tracks.items():
            message = track.settle()
            if message is not None:
                found[topic.decode()] = message
        self.stats.delivered += len(found)
        return found

    def wait(self, timeout_s: float) -> bool:
        """Sleep until something arrives, at most `timeout_s`."""
        return bool(self._inlet.port.socket.poll(max(0, round(timeout_s * 1e3))))

    def _find(self, topic: bytes) -> Track[T] | None:
        return self._tracks.get(topic) or self._admit(topic)

    def _admit(self, topic: bytes) -> Track[T] | None:
        try:
            topic.decode()
        except UnicodeDecodeError:
            return None
        if len(self._tracks) >= self._max_topics:
            quietest = min(self._tracks, key=lambda name: self._tracks[name].heard_ns)
            quiet_ns = self._clock.now_ns() - self._tracks[quietest].heard_ns
            if quiet_ns < 10 * TAKEOVER_NS:
                return None
            del self._tracks[quietest]
        track = self._tracks[topic] = Track(
            self._expect, self.stats, self._limit, self._clock, self._first_stays
        )
        return track

    def close(self) -> None:
        """Close the socket."""
        self._inlet.port.close()
