"""Ctrl-C, SIGTERM and a closed terminal as an event, so that a run ends in order.

The tick is finished, the robot stopped, the report written, the processes ended.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

NUMBERS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def in_a_thread(act: Callable[[], object]) -> None:
    """Let a signal handler take locks: it may have interrupted whoever holds them.

    `threading.Event.set` in a handler waits for ever when the same thread was just inside
    the event, which happens when signals come in quick succession.
    """
    threading.Thread(target=act, daemon=True).start()


class Interrupts(threading.Event):
    """Set by the signals that ask a program to end; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        super().__init__()
        self._heard = False

    def listen(self) -> None:
        """Take the signals, also back from a library that took them meanwhile (Ray does)."""
        for number in NUMBERS:
            signal.signal(number, self._handle)

    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self._heard or super().is_set()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._heard:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._heard = True
        in_a_thread(self.set)


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
