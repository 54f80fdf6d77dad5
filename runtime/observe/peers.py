"""Counts and logs the peers that a bound socket refused or disconnected.

ZeroMQ refuses a wrong key, a foreign protocol or an oversized frame by silently dropping the
connection. Its monitor reports this; `PeerWatch` reads the monitor from the owner's loop, without
a thread of its own, so that every refusal shows in a log and a metric.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

import zmq
from prometheus_client.core import Metric
from zmq.utils.monitor import parse_monitor_message

from openhelix.runtime.observe.metrics import counter
from openhelix.runtime.transport.codec import MAX_FRAME_BYTES
from openhelix.runtime.transport.sockets import Port

log = logging.getLogger(__name__)
MAX_PER_POLL: Final = 4096
_REFUSALS: Final = {
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH): "key",
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): "protocol",
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): "unfinished",
}
_EXPLAINED: Final = {
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
        for _ in range(MAX_PER_POLL):
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
                    *(self._channel, _EXPLAINED[reason], told),
                )

    def close(self) -> None:
        """Stop watching; safe to call twice."""
        if not self._events.closed:
            self._socket.disable_monitor()
            self._events.close(linger=0)


def _worth_telling(count: int) -> bool:
    """Whether to log it: whoever is refused tries again and again."""
    return count & (count - 1) == 0


class PeerMetrics:
    """What Prometheus is told of watched sockets.

    Args:
        watches: by channel name.
    """

    def __init__(self, watches: Mapping[str, PeerWatch]) -> None:
        self._watches = dict(watches)

    def collect(self) -> Iterable[Metric]:
        """Return both families."""
        refused: dict[tuple[str, ...], float] = {
            (name, reason): watch.refused[reason]
            for name, watch in self._watches.items()
            for reason in _EXPLAINED
        }
        yield counter("wire_refused", refused)
        yield counter("wire_ended", {name: watch.ended for name, watch in self._watches.items()})
