"""The offset between two hosts' monotonic clocks, with bounds instead of a hope.

An exchange (local send, remote receive, remote send, local receive) proves that the offset
lies in `[t2 - t3, t1 - t0]`, however unequal the two ways were. Bounds of several exchanges
intersect, so the quickest ones decide; with age each bound widens by the greatest drift
between the clocks that is allowed for. The estimate is the middle, its uncertainty half the
width: as long as the drift stays within `drift_ppm`, the truth is inside. Bounds that
contradict each other mean that a clock jumped; then the newest exchange begins anew.
(Exchange and filter as in NTP, RFC 5905 Sec. 8 and 10; the intersection as in Marzullo.)
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from openhelix.runtime.core.clock import Clock, MonotonicClock

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and answer: two local times around two remote ones."""

    t_asked_ns: int  # local
    t_received_ns: int  # remote
    t_answered_ns: int  # remote
    t_heard_ns: int  # local

    @property
    def rtt_ns(self) -> int:
        """Time on the way, both ways together."""
        return (self.t_heard_ns - self.t_asked_ns) - (self.t_answered_ns - self.t_received_ns)

    @property
    def low_ns(self) -> int:
        """The offset (remote minus local) is at least this."""
        return self.t_answered_ns - self.t_heard_ns

    @property
    def high_ns(self) -> int:
        """The offset (remote minus local) is at most this."""
        return self.t_received_ns - self.t_asked_ns


@dataclass(frozen=True, slots=True)
class Offset:
    """Remote minus local time, true within `uncertainty_ns` at the local time `at_ns`."""

    offset_ns: int
    uncertainty_ns: int
    at_ns: int
    rtt_ns: int  # the shortest that counted


class OffsetEstimator:
    """Joins exchanges with one remote clock.

    Args:
        drift_ppm: how fast the two clocks may drift apart, at most. Crystals differ by some
            tens; 200 leaves room for a host that is being steered.
        window: exchanges to remember.
    """

    def __init__(self, drift_ppm: float = 200.0, window: int = 64) -> None:
        if drift_ppm < 0 or window < 1:
            raise ValueError(
                f"drift_ppm: {drift_ppm}, window: {window}; must be at least 0 and at least 1"
            )
        self._drift_ppb = round(drift_ppm * 1e3)
        self._exchanges: deque[Exchange] = deque(maxlen=window)
        self.jumps = 0  # contradictions: a clock was set, or drifted more than allowed

    def __len__(self) -> int:
        return len(self._exchanges)

    def clear(self) -> None:
        """Forget all, for example because another process answers now."""
        self._exchanges.clear()

    def add(self, exchange: Exchange) -> bool:
        """Take an exchange into account; return False for an impossible one."""
        ordered = (
            exchange.t_heard_ns >= exchange.t_asked_ns
            and exchange.t_answered_ns >= exchange.t_received_ns
        )
        # A remote clock that runs fast can make the way seem shorter than nothing.
        slip_ns = self.slip_ns(exchange.t_heard_ns - exchange.t_asked_ns)
        if not ordered or exchange.rtt_ns < -slip_ns:
            return False
        kept = [old for old in self._exchanges if not _within(exchange, old)]
        self._exchanges.clear()
        self._exchanges.extend(kept)
        self._exchanges.append(exchange)
        low, high = self._bounds(exchange.t_heard_ns)
        if low > high:
            self.jumps += 1
            self._exchanges.clear()
            self._exchanges.append(exchange)
        return True

    def estimate(self, at_ns: int) -> Offset | None:
        """Return the offset at local time `at_ns`, or None before the first exchange."""
        if not self._exchanges:
            return None
        low, high = self._bounds(at_ns)
        offset = (low + high) // 2
        rtt = max(0, min(exchange.rtt_ns for exchange in self._exchanges))
        return Offset(offset, high - offset, at_ns, rtt)

    def _bounds(self, at_ns: int) -> tuple[int, int]:
        lows, highs = [], []
        for exchange in self._exchanges:
            # The bound held at some moment between asking and hearing.
            away_ns = max(abs(at_ns - exchange.t_asked_ns), abs(at_ns - exchange.t_heard_ns))
            slip_ns = self.slip_ns(away_ns)
            lows.append(exchange.low_ns - slip_ns)
            highs.append(exchange.high_ns + slip_ns)
        return max(lows), min(highs)

    def slip_ns(self, elapsed_ns: int) -> int:
        """Return by how much the clocks may drift apart in that time, rounded up and one more.

        The one is for the rounding of the clocks' own readings.
        """
        return 1 - (-elapsed_ns * self._drift_ppb // 1_000_000_000)


def _within(new: Exchange, old: Exchange) -> bool:
    """Whether `new` says all that `old` said, more tightly and more recently."""
    return new.low_ns >= old.low_ns and new.high_ns <= old.high_ns


class _Client(Protocol):
    def call(
        self, method: str, args: dict[str, Any] | None = None, timeout_s: float = 2.0
    ) -> dict[str, Any]: ...


class ClockSync:
    """Keeps the offset to one remote host up to date, over its RPC endpoint.

    Args:
        client: an `RpcClient` of a server on that host.
        clock: this host's.
        estimator: how to join exchanges.
    """

    def __init__(
        self,
        client: _Client,
        clock: Clock | None = None,
        estimator: OffsetEstimator | None = None,
    ) -> None:
        self._client = client
        self._clock = clock or MonotonicClock()
        self._estimator = estimator or OffsetEstimator()
        self._source = ""
        self._offset: Offset | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def offset(self) -> Offset | None:
        """The offset when it was last updated; None before that succeeded."""
        return self._offset

    def update(self, exchanges: int = 8, timeout_s: float = 0.5) -> Offset | None:
        """Ask the remote clock; return the new offset, or the old one if nobody answers."""
        for _ in range(exchanges):
            asked_ns = self._clock.now_ns()
            try:
                answer = self._client.call("time", timeout_s=timeout_s)
                received, answered = answer["t_received_ns"], answer["t_sent_ns"]
                source = str(answer.get("source", ""))
            except (RuntimeError, KeyError) as error:  # RpcError is a RuntimeError
                log.debug("clock offset: %s", error)
                break
            heard_ns = self._clock.now_ns()
            if type(received) is not int or type(answered) is not int:
                break
            if source != self._source:  # perhaps another host, or the same after a reboot
                self._estimator.clear()
                self._source = source
            self._estimator.add(Exchange(asked_ns, received, answered, heard_ns))
        if len(self._estimator):
            self._offset = self._estimator.estimate(self._clock.now_ns())
        return self._offset

    def uncertainty_ns(self) -> int | None:
        """Return how far off the offset may be by now; None when it is unknown."""
        offset = self._offset
        if offset is None:
            return None
        elapsed_ns = abs(self._clock.now_ns() - offset.at_ns)
        return offset.uncertainty_ns + self._estimator.slip_ns(elapsed_ns)

    def to_local(self, t_remote_ns: int) -> int | None:
        """Translate a remote time; None while the offset is unknown. Cheap enough for a loop."""
        offset = self._offset
        return None if offset is None else t_remote_ns - offset.offset_ns

    def to_remote(self, t_local_ns: int) -> int | None:
        """Translate a local time; None while the offset is unknown."""
        offset = self._offset
        return None if offset is None else t_local_ns + offset.offset_ns

    def start(
        self, period_s: float = 1.0, on_update: Callable[[Offset], None] | None = None
    ) -> None:
        """Update from a daemon thread until `close`."""
        if self._thread is not None:
            raise RuntimeError("the clock synchronisation has started already")

        def work() -> None:
            while True:
                offset = self.update()
                if offset is not None and on_update is not None:
                    on_update(offset)
                if self._stop.wait(period_s):
                    return

        self._thread = threading.Thread(target=work, name="clock-offset", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop updating; safe to call twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
