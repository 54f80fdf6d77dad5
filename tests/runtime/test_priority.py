"""Niceness reaches the group of a session's leader; slices are taken and given back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from runtime.priority import short_slice, step_back

AUTOGROUP = Path("/proc/self/autogroup")
TELL = """
import os
from pathlib import Path
from runtime.priority import step_back
import threading
threads = []
wait, go = threading.Event(), threading.Event()
def other():
    threads.append(threading.get_native_id())
    go.set()
    wait.wait()
threading.Thread(target=other).start()
go.wait()
step_back({nice})
assert os.getpriority(os.PRIO_PROCESS, threads[0]) == os.getpriority(os.PRIO_PROCESS, 0)
wait.set()
group = Path("/proc/self/autogroup")
print(os.getpriority(os.PRIO_PROCESS, 0), group.read_text().split()[-1] if group.exists() else "")
"""


def told(nice: int, own_session: bool) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", TELL.format(nice=nice)],
        start_new_session=own_session,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def group_nice() -> str:
    return AUTOGROUP.read_text().split()[-1]


def test_a_process_steps_back_and_leaves_the_session_of_others_alone() -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    nice = min(19, own + 4)
    assert told(4, own_session=False)[0] == str(nice)
    assert told(0, own_session=False)[0] == str(own)
    if AUTOGROUP.exists():
        assert told(4, own_session=False)[1] == group_nice()


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this kernel groups no sessions")
def test_a_sessions_leader_steps_back_with_its_group() -> None:
    nice, group = told(4, own_session=True)
    assert group == nice == str(min(19, os.getpriority(os.PRIO_PROCESS, 0) + 4))


@pytest.mark.skipif(sys.platform != "linux", reason="slices are Linux's")
def test_slices_are_taken_by_normal_threads_only_and_keep_the_niceness() -> None:
    found: list[object] = []

    def work() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 7)
        found.append(short_slice())
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        found.append(os.sched_getscheduler(0))
        found.append(short_slice(0))
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        found.append(short_slice())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    took = os.uname().machine in ("x86_64", "aarch64")
    assert found == [took, 7, os.SCHED_OTHER, took, False]


def test_no_niceness_is_no_step() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    step_back(0)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
