"""openhelix.runtime.observe.background: drops are counted, errors end the work and not the caller."""

from __future__ import annotations

import threading

import pytest

from openhelix.runtime.observe.background import Background


def test_everything_is_handled_in_order_and_finished_once():
    seen, finished = [], []
    work = Background("t", seen.append, lambda: finished.append(threading.current_thread().name))
    for i in range(100):
        assert work.offer(i)
    assert work.close()
    assert work.close()
    assert seen == list(range(100))
    assert finished == ["t"]
    assert (work.written, work.dropped, work.queued) == (100, 0, 0)


def test_a_full_queue_drops_and_counts_without_waiting():
    gate, seen = threading.Event(), []

    def slow(item):
        gate.wait(10)
        seen.append(item)

    work = Background("t", slow, size=2)
    results = [work.offer(i) for i in range(50)]
    gate.set()
    work.close()
    assert work.dropped == results.count(False) >= 47
    assert work.written == len(seen) == results.count(True)


def test_lossless_waits_for_room():
    seen = []
    work = Background("t", seen.append, size=1, lossless=True)
    for i in range(200):
        assert work.offer(i)
    work.close()
    assert seen == list(range(200))


def test_an_error_ends_the_work_counts_the_rest_and_still_finishes():
    finished = []

    def broken(item):
        raise OSError("no space left")

    work = Background("t", broken, lambda: finished.append(1), size=64)
    for i in range(5):
        work.offer(i)
    work.close()
    assert not work.offer(9)
    assert isinstance(work.error, OSError)
    assert (work.written, work.dropped) == (0, 6)
    assert finished == [1]


def test_closing_a_stuck_worker_returns():
    gate = threading.Event()
    work = Background("t", lambda _: gate.wait(30))
    work.offer(1)
    assert not work.close(timeout_s=0.05)
    gate.set()
    assert work.close()


def test_bad_size():
    with pytest.raises(ValueError, match="size"):
        Background("t", print, size=0)
