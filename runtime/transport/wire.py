"""Data between processes: a publisher, and readers that keep only the newest message.

A message begins with `topic NUL envelope`, then come the frames of the codec. The `Envelope`
says which publisher sent it, its number and when, so that losses are counted for every kind of
message alike. The NUL makes a subscription exact: ZeroMQ matches prefixes, and `arm1` must not
receive `arm10`.

Readers drain their queue without blocking and keep the newest. ZMQ_CONFLATE is not used: it
now and then loses the very newest message, and it cuts multipart messages up. Queues are
long for the same reason: when one is full, ZeroMQ drops what is *newest*. All times in a
message are of the sender's clock.
"""

from __future__ import annotations

import itertools
import logging
import os
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, NamedTuple, TypeVar

import zmq
from zmq.utils.monitor import parse_monitor_message

from openhelix.runtime.core.clock import Clock, MonotonicClock
from openhelix.runtime.transport.codec import (
    MAX_FRAME_BYTES,
    MAX_FRAMES,
    Buffer,
    WireError,
    decode,
    encode,
    kind_of,
)
from openhelix.runtime.transport.sockets import CurveServer, Keys, Port

T = TypeVar("T")
ENVELOPE: Final = struct.Struct("<QQq")
NOBLOCK: Final = int(zmq.NOBLOCK)
_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
_POLLIN: Final = int(zmq.POLLIN)
_CANDIDATES: Final = 8  # of one drain; the others are older than what is worth decoding
_MAX_JUMP: Final = 4096  # more are not lost between two messages without a silence
TAKEOVER_NS: Final = 2_000_000_000  # silence after which another number or publisher is believed
MAX_TOPIC_BYTES: Final = 128
log = logging.getLogger(__name__)


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


# Sending -----------------------------------------------------------------------------------------


class Publisher:
    """Sends records on one topic; never blocks, and says when somebody could not keep up.

    Args:
        endpoint: where; `ipc://`, or `tcp://` (beyond this host only with keys).
        topic: what readers subscribe to, exactly.
        bind: False where the readers bind, for example at one System 2 for many robots.
        keys: CURVE keys; a folder, or an object that several sockets share.
        hwm: messages to hold for each reader that does not keep up. Keep it above any
            burst, because a full queue loses the newest message; for images remember that
            all of them are held in memory.
        clock: stamps the messages.
        awaited: whether `await_reader` will be used.
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
        awaited: bool = False,
    ) -> None:
        self._prefix = topic_bytes(topic) + b"\0"
        self._clock = clock or MonotonicClock()
        self._source = int.from_bytes(os.urandom(8), "little")
        self._seq = 0
        self.sent = 0
        self.dropped = 0  # sends that found a reader's queue just filled; see `send`
        # With NODROP a queue that fills up is an error that can be counted, not silence.
        options: dict[int, int | bytes] = {zmq.SNDHWM: hwm, zmq.XPUB_NODROP: 1}
        # XPUB is a PUB that keeps what it hears of subscriptions until it is asked for.
        kind = zmq.XPUB if awaited else zmq.PUB
        self._port = Port(kind, endpoint, bind=bind, keys=keys, options=options)
        self._send = self._port.socket.send
        self._heard = False

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
        self.sent += 1
        return self._put(frames)

    def await_reader(self, timeout_s: float) -> bool:
        """Wait until a reader has subscribed to the topic; what is sent before that it misses.

        Returns:
            False when none had within `timeout_s`.
        """
        give_up_s = time.monotonic() + timeout_s
        while not self._heard:
            left_ms = round((give_up_s - time.monotonic()) * 1e3)
            if left_ms < 0 or not self._port.socket.poll(left_ms):
                return False
            wanted = self._port.socket.recv()
            self._heard = wanted[:1] == b"\1" and self._prefix.startswith(wanted[1:])
        return True

    def reconnect(self) -> None:
        """Connect anew, at once, to readers that bind; see `Port.reconnect`."""
        self._port.reconnect()

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


# Receiving: drain a socket, keep the newest, count the rest --------------------------------------


@dataclass(slots=True)
class ReaderStats:
    """What happened to the messages of a reader."""

    received: int = 0  # messages taken from the queue
    delivered: int = 0  # messages that `poll` returned
    gaps: int = 0  # messages that a publisher numbered and that never arrived
    restarts: int = 0  # changes of publisher, or of its numbering
    backlogs: int = 0  # polls that left messages in the queue
    dropped: Counter[str] = field(default_factory=Counter)  # by reason, see `NewestReader`

    @property
    def overtaken(self) -> int:
        """Messages of which a newer one was there when they were looked for."""
        return max(0, self.received - self.delivered - sum(self.dropped.values()))


# (source, seq, t_pub_ns), the frames, where the header begins in the first of them, and the key
# it came with. A plain tuple: this is made for every message, and only the newest is ever
# looked at closely.
Candidate = tuple[tuple[int, int, int], list[Buffer], int, str]


class Track(Generic[T]):
    """The newest-wins rule for one topic.

    Args:
        expect: the record's class.
        stats: where everything is counted.
        clock: for silences.
        first_stays: a topic belongs to its first publisher until that has been silent for
            `TAKEOVER_NS`; others are refused ("taken") instead of taking over.
    """

    def __init__(
        self,
        expect: type[T],
        stats: ReaderStats,
        clock: Clock,
        first_stays: bool = False,
    ) -> None:
        self._expect, self._stats, self._clock = expect, stats, clock
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
        source, seq, _ = stamp
        ahead = seq - self._seq
        if source == self._source:
            if 0 < ahead <= _MAX_JUMP:
                return None
            # One wrong number must not silence a source for good, nor a replay be believed.
            if ahead and self._clock.now_ns() - self.heard_ns >= TAKEOVER_NS:
                return None
            return "stale" if ahead <= 0 else "jump"
        if source in self._retired and self._clock.now_ns() - self.heard_ns < TAKEOVER_NS:
            return "stale_source"
        return None

    def _accept(self, stamp: tuple[int, int, int]) -> None:
        self.heard_ns = self._clock.now_ns()
        self.envelope = Envelope._make(stamp)
        source, seq, _ = stamp
        numbers = {n for (s, n, _), *_ in self.new if s == source and n <= seq}
        if source == self._source and seq > self._seq:
            before = self._seq
            numbers = {n for n in numbers if n > before}
        else:
            before = min(numbers) - 1  # what it sent before we first heard it is not a loss
            if self._source is not None:
                if source != self._source:
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


class NewestReader(Generic[T]):
    """Receives records of one class on one topic; `poll` returns the newest, or None.

    Within one publisher an earlier number never follows a later one. Another publisher (a
    restart) takes over at once; the one it replaced is not heard again until the new one has
    been silent for `TAKEOVER_NS`. A number far ahead is not believed either until then: one
    wrong message would make all later genuine ones look late. Everything that is not delivered
    is counted in `stats.dropped` by reason: those of `WireError`, "stale" (the same or an
    earlier number), "jump" (far ahead), "stale_source" (a replaced publisher).

    Args:
        endpoint: one, or a list of which each may have a publisher.
        topic: exactly the publisher's.
        expect: the record's class; anything else is dropped.
        bind: True where the publishers connect to this side.
        keys: CURVE keys; a folder, or an object that several sockets share.
        clock: for silences.
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
        clock: Clock | None = None,
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
        self._track = Track(expect, self.stats, clock)

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

    def reconnect(self) -> None:
        """Connect anew, at once, to publishers that bind; see `Port.reconnect`."""
        self._inlet.port.reconnect()

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
            self._expect, self.stats, self._clock, self._first_stays
        )
        return track

    def close(self) -> None:
        """Close the socket."""
        self._inlet.port.close()


# ------------------------------------------------------------------------------------------------
# Peers that a bound socket refused or disconnected.
#
# ZeroMQ refuses a wrong key, a foreign protocol or an oversized frame by silently dropping the
# connection. Its monitor reports this; `PeerWatch` reads the monitor from the owner's loop, without
# a thread of its own, so that every refusal shows in a log and a metric.


MAX_EVENTS: Final = 4096
_REFUSALS: Final = {
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH): "key",
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): "protocol",
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): "unfinished",
}
REFUSALS_EXPLAINED: Final = {
    "key": "its CURVE key is not on the list",
    "protocol": "it speaks another protocol, or comes without the key that is asked for",
    "unfinished": "it left, sent rubbish or has no key, and has not said who it is",
}
_EVENTS: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)
_numbers = itertools.count()


class PeerWatch:
    """Counts a socket's peers.

    Args:
        channel: the socket's name in logs.
        port: the socket; close the watch before it.
    """

    def __init__(self, channel: str, port: Port) -> None:
        self._channel, self._socket = channel, port.socket
        self.admitted = 0  # connections that were let in
        self.ended = 0  # connections that ended: the peer left, or was cut off
        self.refused: Counter[str] = Counter()  # by reason: key, protocol, unfinished
        address = f"inproc://peers-{channel}-{next(_numbers)}"
        self._socket.monitor(address, int(_EVENTS))
        self._events: zmq.Socket[bytes] = self._socket.context.socket(zmq.PAIR)
        # Without a limit: a full queue would hold up the thread that carries all messages.
        self._events.set(zmq.RCVHWM, 0)
        self._events.linger = 0
        self._events.connect(address)

    def poll(self) -> None:
        """Take in what has happened; never blocks."""
        for _ in range(MAX_EVENTS):
            try:
                frames = self._events.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._note(int(parse_monitor_message(frames)["event"]))

    def _note(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.admitted += 1
        elif event == zmq.EVENT_DISCONNECTED:
            self.ended += 1
            if _worth_telling(self.ended):
                log.info(
                    "%s: a connection ended (its peer left, or sent a frame beyond %d MiB and was "
                    "cut off); %d so far",
                    *(self._channel, MAX_FRAME_BYTES >> 20, self.ended),
                )
        elif event in _REFUSALS:
            reason = _REFUSALS[event]
            self.refused[reason] += 1
            told = self.refused[reason]
            if _worth_telling(told):
                log.warning(
                    "%s: refused a connection (%s); %d so far",
                    *(self._channel, REFUSALS_EXPLAINED[reason], told),
                )

    def close(self) -> None:
        """Stop watching; safe to call twice."""
        if not self._events.closed:
            self._socket.disable_monitor()
            self._events.close(linger=0)


def _worth_telling(count: int) -> bool:
    """Whether to log it: whoever is refused tries again and again."""
    return count & (count - 1) == 0
