"""The receiving half of `runtime.wire`: drain a socket, keep the newest, count the rest.

Here is the rule for what "newest" means when messages are lost, repeated, forged or too old,
and when a publisher restarts; `runtime.wire` has the classes to use.
"""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, TypeVar

import zmq

from runtime.clock import Clock
from runtime.codec import MAX_FRAMES, PREFIX, Buffer, WireError, decode
from runtime.curve import Keys
from runtime.sockets import Port

T = TypeVar("T")
ENVELOPE: Final = struct.Struct("<QQq")
NOBLOCK: Final = int(zmq.NOBLOCK)
_POLLIN: Final = int(zmq.POLLIN)
_CANDIDATES: Final = 8  # of one drain; the others are older than what is worth decoding
TAKEOVER_NS: Final = 2_000_000_000  # silence after which an earlier publisher may return
MAX_TOPIC_BYTES: Final = 128


class Envelope(NamedTuple):
    """What the publisher stamps on each message."""

    source: int  # drawn at random at every start of a publisher
    seq: int  # counts that publisher's messages, from 0
    t_pub_ns: int  # time of sending, by the publisher's clock


def topic_bytes(topic: str) -> bytes:
    raw = topic.encode()
    if not raw or b"\0" in raw or len(raw) > MAX_TOPIC_BYTES:
        raise ValueError(f"topic: {topic!r} must have 1 to {MAX_TOPIC_BYTES} bytes and no NUL")
    return raw


@dataclass(slots=True)
class ReaderStats:
    """What happened to the messages of a reader."""

    received: int = 0  # messages taken from the queue
    delivered: int = 0  # messages that `poll` returned
    gaps: int = 0  # messages that a publisher numbered and that never arrived
    restarts: int = 0  # changes of publisher
    backlogs: int = 0  # polls that left messages in the queue
    dropped: Counter[str] = field(default_factory=Counter)  # by reason, see `NewestReader`


class Candidate(NamedTuple):
    envelope: Envelope
    frames: list[Buffer]  # [header, buffers...]


class Track(Generic[T]):
    """The newest-wins rule for one topic."""

    def __init__(self, expect: type[T], stats: ReaderStats, clock: Clock) -> None:
        self._expect, self._stats, self._clock = expect, stats, clock
        self._source: int | None = None
        self._seq = -1
        self._retired: deque[int] = deque(maxlen=64)
        self._new: deque[Candidate] = deque(maxlen=_CANDIDATES)
        self._arrived: list[tuple[int, int]] = []  # (source, seq) of this drain
        self.heard_ns = 0
        self.envelope: Envelope | None = None

    def offer(self, candidate: Candidate) -> None:
        """Take note of a message; `settle` chooses."""
        self._new.append(candidate)
        self._arrived.append(candidate.envelope[:2])

    def settle(self, limit: Callable[[Envelope], str | None]) -> T | None:
        """Return the newest acceptable message since the last call, if there is one."""
        if not self._new:
            return None
        message = None
        dropped = self._stats.dropped
        while self._new and message is None:
            candidate = self._new.pop()
            refusal = self._refusal(candidate.envelope) or limit(candidate.envelope)
            if refusal is None:
                try:
                    message = decode(candidate.frames, self._expect)
                    self._accept(candidate.envelope)
                except WireError as error:
                    refusal = error.reason
            if refusal is not None:
                dropped[refusal] += 1
        self._new.clear()
        self._arrived.clear()
        return message

    def _refusal(self, envelope: Envelope) -> str | None:
        if envelope.source == self._source:
            return None if envelope.seq > self._seq else "stale"
        if envelope.source in self._retired and self._clock.now_ns() - self.heard_ns < TAKEOVER_NS:
            return "stale_source"
        return None

    def _accept(self, envelope: Envelope) -> None:
        source, seq, _ = envelope
        self.heard_ns = self._clock.now_ns()
        self.envelope = envelope
        numbers = {n for s, n in self._arrived if s == source and n > self._seq}
        if source == self._source:
            newest = max(numbers)
            self._stats.gaps += newest - self._seq - len(numbers)
            self._seq = newest
            return
        if self._source is not None:
            self._retired.append(self._source)
            self._stats.restarts += 1
        # What a publisher sent before we joined is not a loss.
        self._source, self._seq = source, seq


class Inlet:
    """A SUB socket that is drained in bounded steps and never raises for what arrives."""

    def __init__(
        self,
        endpoint: str | Sequence[str],
        prefix: bytes,
        *,
        bind: bool,
        keys: Keys | None,
        hwm: int,
        max_drain: int,
    ) -> None:
        if max_drain < 1:
            raise ValueError(f"max_drain: {max_drain}, must be at least 1")
        self.stats = ReaderStats()
        self._max_drain = max_drain
        self._skipping = False  # inside a message with too many frames
        options: dict[int, int | bytes] = {zmq.RCVHWM: hwm, zmq.SUBSCRIBE: prefix}
        self.port = Port(zmq.SUB, endpoint, bind=bind, keys=keys, options=options)
        self._recv = self.port.socket.recv
        self._get = self.port.socket.get

    def drain(self, offer: Callable[[bytes, Candidate], None]) -> None:
        """Hand over what is queued, at most `max_drain` messages, fewer of many frames."""
        if not self._get(zmq.EVENTS) & _POLLIN:  # type: ignore[operator]
            return
        budget = self._max_drain
        while budget > 0:
            try:
                frames = self._take()
            except zmq.Again:
                return
            if frames is None:
                budget -= 1 + MAX_FRAMES // 8
                continue
            budget -= 1 + len(frames) // 8
            self.stats.received += 1
            self._open(frames, offer)
        self.stats.backlogs += 1

    def _take(self) -> list[zmq.Frame] | None:
        """Receive one message; None for one (or a stretch of one) with too many frames."""
        frame = self._recv(NOBLOCK, False)
        frames = [frame]
        while frame.more:
            if len(frames) > MAX_FRAMES:
                # Endless messages are thrown away piece by piece, within the same bound.
                self._skip()
                return None
            frame = self._recv(NOBLOCK, False)
            frames.append(frame)
        if self._skipping:
            self._skipping = False
            return None
        return frames

    def _skip(self) -> None:
        if not self._skipping:
            self._skipping = True
            self.stats.dropped["oversize"] += 1

    def _open(self, frames: list[zmq.Frame], offer: Callable[[bytes, Candidate], None]) -> None:
        head = frames[0].bytes
        cut = head.find(b"\0", 0, MAX_TOPIC_BYTES + 1)
        start = cut + 1 + ENVELOPE.size
        if cut < 1 or len(head) < start + len(PREFIX):
            self.stats.dropped["truncated"] += 1
            return
        envelope = Envelope._make(ENVELOPE.unpack_from(head, cut + 1))
        buffers: list[Buffer] = [memoryview(head)[start:]]
        buffers += [frame.buffer for frame in frames[1:]]
        offer(head[:cut], Candidate(envelope, buffers))


class AgeLimit:
    """Refuses messages that are too old, or too far in the future to be believed."""

    def __init__(
        self, max_age_ns: int | None, clock: Clock, to_local: Callable[[int], int | None] | None
    ) -> None:
        if max_age_ns is not None and max_age_ns <= 0:
            raise ValueError(f"max_age_ns: {max_age_ns}, must be above 0 or None")
        self._max_age_ns, self._clock, self._to_local = max_age_ns, clock, to_local

    def __call__(self, envelope: Envelope) -> str | None:
        if self._max_age_ns is None:
            return None
        sent_ns = envelope.t_pub_ns
        if self._to_local is not None:
            local_ns = self._to_local(sent_ns)
            if local_ns is None:
                return "unsynced"
            sent_ns = local_ns
        age_ns = self._clock.now_ns() - sent_ns
        if age_ns > self._max_age_ns:
            return "expired"
        return "future" if age_ns < -self._max_age_ns else None
