"""A bounded queue and a thread that keep recording, video and viewing off the control thread.

A full queue drops the new item and counts it, so that a slow disk or a stuck viewer degrades
itself before it degrades control. On the lockstep clock nothing is late, so there a full
queue may make the caller wait instead (`lossless`).
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
POLL_S = 0.001  # how often a lossless caller looks for room


class Background(Generic[T]):
    """Calls `handle(item)` in a thread of its own, in order.

    The first error of `handle` ends the work: it is kept in `error`, what is queued and what
    still comes is counted as dropped, and whoever offers goes on undisturbed.

    Args:
        name: of the thread.
        handle: does the work.
        finish: called in the same thread after the last item, also after an error.
        size: items that may wait.
        lossless: wait for room instead of dropping.
    """

    def __init__(
        self,
        name: str,
        handle: Callable[[T], None],
        finish: Callable[[], None] = lambda: None,
        size: int = 128,
        lossless: bool = False,
    ) -> None:
        if size < 1:
            raise ValueError(f"size: {size}, must be at least 1")
        self.written = 0
        self._refused = 0  # counted by the caller's thread,
        self._lost = 0  # and by the worker's: one counter for both would lose counts
        self.error: BaseException | None = None
        self._handle, self._finish, self._lossless = handle, finish, lossless
        self._queue: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        self._size = size
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Items lost: the queue was full, or the work had failed."""
        return self._refused + self._lost

    @property
    def queued(self) -> int:
        """Items waiting."""
        return self._queue.qsize()

    def offer(self, item: T) -> bool:
        """Queue an item; False when it was dropped. Never raises, never waits (but lossless)."""
        while self._lossless and self._queue.qsize() >= self._size and self.error is None:
            time.sleep(POLL_S)
        if self._closed or self.error is not None or self._queue.qsize() >= self._size:
            self._refused += 1
            return False
        self._queue.put(item)
        return True

    def close(self, timeout_s: float = 30.0) -> bool:
        """Work off the queue and end the thread; False if that took too long. Twice is fine."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self.error is not None:
                self._lost += 1
                continue
            try:
                self._handle(item)
                self.written += 1
            except Exception as error:
                self._lost += 1
                self.error = error
                self._log("failed; nothing more is written", error)
        try:
            self._finish()
        except Exception as error:
            if self.error is None:  # else it has been told what goes wrong
                self.error = error
                self._log("could not be finished", error)

    def _log(self, what: str, error: Exception) -> None:
        """A defect with its traceback; a disk that refuses in one line."""
        defect = None if isinstance(error, OSError) else error
        log.error("%s %s: %s", self._thread.name, what, error, exc_info=defect)


class Counted:
    """The counters of what leaves its work to a `Background`, as metrics and reports read them."""

    _work: Background[Any]

    @property
    def written(self) -> int:
        """Items worked off, and kept."""
        return self._work.written - self._unkept

    @property
    def dropped(self) -> int:
        """Items lost: the queue was full, the work had failed, or the disk refused them later."""
        return self._work.dropped + self._unkept

    @property
    def queued(self) -> int:
        """Items waiting."""
        return self._work.queued

    @property
    def error(self) -> str:
        """What ended the work; empty while nothing has."""
        error = self._work.error
        if isinstance(error, OSError) and error.errno is not None:
            return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        return "" if error is None else " ".join(f"{type(error).__name__}: {error}".split())

    @property
    def _unkept(self) -> int:
        """Items worked off that the disk refused afterwards, for it is written to in pieces."""
        return 0
