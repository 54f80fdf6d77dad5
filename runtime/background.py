"""A bounded queue and a thread: how recording, video and viewing stay off the control thread.

A full queue drops the new item and counts it, so that a slow disk or a stuck viewer degrades
itself before it degrades control. On the lockstep clock nothing is late, so there a full
queue may make the caller wait instead (`lossless`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
NICE = 10  # of the worker's thread: below control and both systems


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
        self.dropped = 0
        self.error: BaseException | None = None
        self._handle, self._finish, self._lossless = handle, finish, lossless
        self._queue: queue.Queue[T | None] = queue.Queue(size)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Items waiting."""
        return self._queue.qsize()

    def offer(self, item: T) -> bool:
        """Queue an item; False when it was dropped. Never raises, never waits (but lossless)."""
        if self._closed or self.error is not None:
            self.dropped += 1
            return False
        try:
            self._queue.put(item, block=self._lossless)
        except queue.Full:
            self.dropped += 1
            return False
        return True

    def close(self, timeout_s: float = 30.0) -> bool:
        """Work off the queue and end the thread; False if that took too long. Twice is fine."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # Linux has it for each thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while (item := self._queue.get()) is not None:
            if self.error is not None:
                self.dropped += 1
                continue
            try:
                self._handle(item)
                self.written += 1
            except Exception as error:
                self.dropped += 1
                self.error = error
                log.exception("%s failed; nothing more is written", self._thread.name)
        try:
            self._finish()
        except Exception as error:
            self.error = self.error or error
            log.exception("%s could not be finished", self._thread.name)
