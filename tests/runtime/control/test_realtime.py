"""What is refused is said, what is granted is in force, and all of it can be undone."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from openhelix.runtime.control import realtime
from openhelix.runtime.control.realtime import enter, leave
from openhelix.runtime.core.clock import SlackCollector


@pytest.fixture(autouse=True)
def same_as_before() -> Iterator[None]:
    """Leave no trace in the test process."""
    before = state()
    yield
    assert state() == before


def state() -> tuple[Any, ...]:
    return (
        os.sched_getscheduler(0),
        os.sched_getparam(0).sched_priority,
        os.sched_getaffinity(0),
        gc.isenabled(),
        gc.get_freeze_count(),
        sys.getswitchinterval(),
    )


def in_thread(action: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(action()))
    thread.start()
    thread.join()
    return results[0]


def may_fifo() -> bool:
    def attempt() -> bool:
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        except PermissionError:
            return False
        return True

    return bool(in_thread(attempt))


def test_status_tells_what_is_in_force() -> None:
    def work() -> None:
        cpu = min(os.sched_getaffinity(0))
        status = enter(priority=10, cpus=[cpu], timer_slack_ns=1)
        try:
            assert status.fifo == may_fifo()
            assert status.fifo == (status.reason == "")
            policy = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK
            assert (policy == os.SCHED_FIFO) == status.fifo
            assert status.cpus == (cpu,)
            assert status.timer_slack_ns in (0, 1)  # 0 is what the kernel says of a FIFO thread
            assert status.gc_frozen
            assert not gc.isenabled()
        finally:
            leave(status)
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
        assert len(os.sched_getaffinity(0)) >= 1

    in_thread(work)


def test_threads_that_a_control_thread_starts_are_normal() -> None:
    def work() -> int:
        status = enter(priority=10, gc_mode="leave", switch_interval_s=None)
        inner = in_thread(lambda: os.sched_getscheduler(0))
        leave(status)
        return int(inner)

    assert in_thread(work) == os.SCHED_OTHER


def test_other_threads_keep_their_scheduler() -> None:
    def work() -> None:
        leave(enter(priority=10, cpus=[min(os.sched_getaffinity(0))]))

    before = state()
    in_thread(work)
    assert state() == before


def test_a_refusal_is_one_visible_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(realtime.os, "sched_setscheduler", refuse)
    monkeypatch.setattr(realtime.os, "sched_setaffinity", refuse)
    status = enter(priority=50, cpus=[0])
    leave(status)
    assert not status.fifo
    assert "SCHED_FIFO: Operation not permitted (allow it with `ulimit -r 99`" in status.reason
    assert "affinity [0]: Operation not permitted" in status.reason
    assert "\n" not in status.reason


@pytest.mark.parametrize(
    "wrong", [{"priority": 1000}, {"priority": -1}, {"cpus": [100_000]}, {"cpus": []}]
)
def test_wrong_values_are_reported_not_raised(wrong: dict[str, Any]) -> None:
    def work() -> str:
        status = enter(**({"priority": None} | wrong))
        leave(status)
        return status.reason

    assert in_thread(work)


def test_nothing_asked_nothing_changed() -> None:
    before = state()
    status = enter(priority=None, timer_slack_ns=None, gc_mode="leave", switch_interval_s=None)
    assert state() == before
    assert (status.fifo, status.reason, status.gc_frozen) == (False, "", False)
    leave(status)


def test_memory_can_be_locked_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def __init__(self, answer: int) -> None:
            self.answer = answer
            self.unlocked = 0

        def mlockall(self, flags: int) -> int:
            return self.answer

        def munlockall(self) -> int:
            self.unlocked += 1
            return 0

    for answer in (0, -1):
        libc = Libc(answer)
        monkeypatch.setattr(realtime, "_libc", lambda libc=libc: libc)
        status = enter(
            priority=None,
            timer_slack_ns=None,
            gc_mode="leave",
            switch_interval_s=None,
            lock_memory=True,
        )
        leave(status)
        assert status.memory_locked == (answer == 0)
        assert libc.unlocked == (answer == 0)
        assert ("mlockall" in status.reason) == (answer != 0)


def test_a_cycle_is_really_freed() -> None:
    freed: list[int] = []

    class Node:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            freed.append(1)

    status = enter(priority=None, timer_slack_ns=None)
    Node()
    SlackCollector().collect(10**12)
    leave(status)
    assert freed == [1]


def test_threads_inherit_only_when_asked() -> None:
    def policies(inherit: bool) -> tuple[int, int]:
        found: list[int] = []

        def look() -> None:
            found.append(os.sched_getscheduler(0))

        def work() -> None:
            status = enter(priority=5, inherit=inherit, gc_mode="leave", switch_interval_s=None)
            if not status.fifo:
                found.extend((-1, -1))
                return
            look()
            child = threading.Thread(target=look)
            child.start()
            child.join()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return found[0], found[1]

    mine, child = policies(inherit=True)
    if mine == -1:
        pytest.skip("SCHED_FIFO is not granted on this machine")
    assert child == os.SCHED_FIFO
    assert policies(inherit=False)[1] == os.SCHED_OTHER


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_stats"), reason="not glibc")
def test_threads_share_one_heap() -> None:
    code = """
import ctypes, sys, threading
from openhelix.runtime.control.realtime import one_heap
if sys.argv[1] == "one":
    one_heap(64 * 1024)
ready, go = threading.Barrier(5), threading.Event()
def hold():
    kept = [bytearray(20_000) for _ in range(50)]
    ready.wait()
    go.wait()
for _ in range(4):
    threading.Thread(target=hold).start()
ready.wait()
ctypes.CDLL(None).malloc_stats()
go.set()
"""
    heaps = {}
    for which in ("one", "many"):
        words = [sys.executable, "-c", code, which]
        done = subprocess.run(words, check=True, timeout=60, capture_output=True, text=True)
        heaps[which] = done.stderr.count("Arena ")
    assert heaps["one"] == 1 < heaps["many"]
