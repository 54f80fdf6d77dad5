"""Ctrl-C, SIGTERM and a closed terminal as an event, so that a run ends in order.

The tick is finished, the robot stopped, the report written, the processes ended.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

NUMBERS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts(threading.Event):
    """Set by the signals that ask a program to end; a second Ctrl-C ends it at once."""

    def listen(self) -> None:
        """Take the signals, also back from a library that took them meanwhile (Ray does)."""
        for number in NUMBERS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.set()


@contextmanager
def interruptible() -> Iterator[Interrupts]:
    """Turn the signals into an event while the block runs."""
    interrupts = Interrupts()
    before = {number: signal.getsignal(number) for number in NUMBERS}
    interrupts.listen()
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
