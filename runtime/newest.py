"""The receiving half of `runtime.wire`: drain a socket, keep the newest, count the rest.

Here is the rule for what "newest" means when messages are lost, repeated, forged or too old,
and when a publisher restarts; `runtime.wire` has the classes to use.
"""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, NamedTuple, TypeVar

import zmq

from runtime.clock import Clock
from runtime.codec import MAX_FRAMES, Buffer, WireError, decode
from runtime.curve import CurveServer, Keys
from runtime.sockets import Port

T = TypeVar("T")
ENVELOPE: Final = struct.Struct("<QQq")
NOBLOCK: Final = int(zmq.NOBLOCK)
_POLLIN: Final = int(zmq.POLLIN)
_CANDIDATES: Final = 8  # of one drain; the others are older than what is worth decoding
_MAX_JUMP: Final = 1 << 32  # more messages than a publisher sends in years were not lost
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


class AgeLimit:
    """Refuses messages that are too old, or too far in the future to be believed."""

    def __init__(
        self, max_age_ns: int | None, clock: Clock, to_local: Callable[[int], int | None] | None
    ) -> None:
        if max_age_ns is not None and max_age_ns <= 0:
            raise ValueError(f"max_age_ns: {max_age_ns}, must be above 0 or None")
        self._max_age_ns, self._clock, self._to_local = max_age_ns, clock, to_local

    def refusal(self, sent_ns: int) -> str | None:
        """Return why a message sent then is refused; None when it is not."""
        if self._max_age_ns is None:
            return None
        if self._to_local is not None:
            local_ns = self._to_local(sent_ns)
            if local_ns is None:
                return "unsynced"
            sent_ns = local_ns
        age_ns = self._clock.now_ns() - sent_ns
        if age_ns > self._max_age_ns:
            return "expired"
        return "future" if age_ns < -self._max_age_ns else None


# (source, seq, t_pub_ns), the frames, where the header begins in the first of them, and the key
# it came with. A plain tuple: this is made for every message, and only the newest is ever
# looked at closely.
Candidate = tuple[tuple[int, int, int], list[Buffer], int, str]


class Track(Generic[T]):
    """The newest-wins rule for one topic.

    Args:
        expect: the record's class.
        stats: where everything is counted.
        limit: what is too old.
        clock: for silences.
        first_stays: a topic belongs to its first publisher until that has been silent for
            `TAKEOVER_NS`; others are refused ("taken") instead of taking over.
    """

    def __init__(
        self,
        expect: type[T],
        stats: ReaderStats,
        limit: AgeLimit,
        clock: Clock,
        first_stays: bool = False,
    ) -> None:
        self._expect, self._stats, self._limit, self._clock = expect, stats, limit, clock
        self._first_stays = first_stays
        self.taken = 0  # messages of others while the topic was taken
        self._source: int | None = None
        self._seq = -1
        self._retired: deque[int] = deque(maxlen=64)
        self.new: list[Candidate] = []  # of this drain, in order of arrival
        self.heard_ns = clock.now_ns()
        self.envelope: Envelope | None = None
        self.key = ""  # the sender's public CURVE key, where there are keys

    def settle(self) -> T | None:
        """Return the newest acceptable message since the last call, if there is one."""
        if self._first_stays and self._source is not None:
            self._turn_away()
        new = self.new
        if not new:
            return None
        message = None
        for stamp, frames, start, key in reversed(new[-_CANDIDATES:]):
            refusal = self._refusal(stamp)
            if refusal is None:
                try:
                    message = decode(frames, self._expect, start)
                    self.key = key
                    break
                except WireError as error:
                    refusal = error.reason
            self._stats.dropped[refusal] += 1
        if message is not None:
            self._accept(stamp)
        new.clear()
        return message

    def _turn_away(self) -> None:
        """Drop what others sent on a taken topic, so that not even a flood hides the owner's."""
        if self._clock.now_ns() - self.heard_ns >= TAKEOVER_NS:
            return
        own = [candidate for candidate in self.new if candidate[0][0] == self._source]
        others = len(self.new) - len(own)
        if others:
            self.taken += others
            self._stats.dropped["taken"] += others
            self.new[:] = own

    def _refusal(self, stamp: tuple[int, int, int]) -> str | None:
        source, seq, t_pub_ns = stamp
        if source == self._source:
            if seq == self._seq:
                return "repeat"
            if not 0 < seq - self._seq <= _MAX_JUMP:
                return "stale"
        elif source in self._retired and self._clock.now_ns() - self.heard_ns < TAKEOVER_NS:
            return "stale_source"
        return self._limit.refusal(t_pub_ns)

    def _accept(self, stamp: tuple[int, int, int]) -> None:
        self.heard_ns = self._clock.now_ns()
        self.envelope = Envelope._make(stamp)
        source, seq, _ = stamp
        numbers = {n for (s, n, _), *_ in self.new if s == source and n <= seq}
        if source == self._source:
            before = self._seq
            numbers = {n for n in numbers if n > before}
        else:
            before = min(numbers) - 1  # what it sent before we first heard it is not a loss
            if self._source is not None:
                self._retired.append(self._source)
                self._stats.restarts += 1
        self._stats.gaps += seq - before - len(numbers)
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
        max_bytes: int | None = None,
    ) -> None:
        if max_drain < 1:
            raise ValueError(f"max_drain: {max_drain}, must be at least 1")
        self.stats = ReaderStats()
        self._max_bytes = max_bytes
        self._max_drain = max_drain
        self._skipping = False  # inside a message with too many frames
        self._key = ""  # the public key that the message taken last came with
        options: dict[int, int | bytes] = {zmq.RCVHWM: hwm, zmq.SUBSCRIBE: prefix}
        self.port = Port(zmq.SUB, endpoint, bind=bind, keys=keys, options=options)
        self._recv = self.port.socket.recv
        self._get = self.port.socket.get
        self._keyed = isinstance(self.port.security, CurveServer)

    def drain(self, find: Callable[[bytes], Track[Any] | None]) -> None:
        """Hand what is queued to the tracks that `find` names by topic.

        Takes at most `max_drain` messages, fewer if they have many frames.
        """
        budget = self._max_drain
        # Asking is several times cheaper than catching zmq.Again.
        while self._get(zmq.EVENTS) & _POLLIN:  # type: ignore[operator]
            if budget <= 0:
                self.stats.backlogs += 1
                return
            frames = self._take()
            if frames is None:
                budget -= MAX_FRAMES // 8
                continue
            budget -= 1 + len(frames) // 8
            self.stats.received += 1
            if self._max_bytes is not None and sum(map(len, frames)) > self._max_bytes:
                self.stats.dropped["oversize"] += 1
                continue
            head = frames[0]
            topic = bytes(head[: MAX_TOPIC_BYTES + 1])
            cut = topic.find(b"\0")
            start = cut + 1 + ENVELOPE.size
            if cut < 1 or len(head) < start:
                self.stats.dropped["truncated"] += 1
                continue
            track = find(topic[:cut])
            if track is None:
                self.stats.dropped["topics"] += 1
            else:
                stamp = ENVELOPE.unpack_from(head, cut + 1)
                track.new.append((stamp, frames, start, self._key))

    def _take(self) -> list[Any] | None:
        """Receive one message; None for one (or a stretch of one) with too many frames."""
        try:
            frame = self._recv(NOBLOCK, False)
            if self._keyed:
                self._key = str(frame.get("User-Id"))
            frames: list[Any] = [frame.buffer]
            while frame.more:
                if len(frames) >= MAX_FRAMES:
                    # Endless messages are thrown away piece by piece, within the same bound.
                    self.stats.dropped["oversize"] += not self._skipping
                    self._skipping = True
                    return None
                frame = self._recv(NOBLOCK, False)
                frames.append(frame.buffer)
        except zmq.Again:  # the queue was taken away between asking and receiving
            return None
        if self._skipping:
            self._skipping = False
            return None
        return frames
