"""Niceness reaches the group of a session's leader; slices are taken and given back."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from openhelix.runtime.control import realtime as priority
from openhelix.runtime.control.realtime import group_nice, short_slice, step_back

TELL = """
import os
from openhelix.runtime.control.realtime import group_nice, step_back
import threading
threads = []
wait, go = threading.Event(), threading.Event()
def other():
    threads.append(threading.get_native_id())
    go.set()
    wait.wait()
threading.Thread(target=other, daemon=True).start()
go.wait()
before = group_nice()
step_back({nice})
assert os.getpriority(os.PRIO_PROCESS, threads[0]) == os.getpriority(os.PRIO_PROCESS, 0)
wait.set()
print(os.getpriority(os.PRIO_PROCESS, 0), before, group_nice())
"""


def told(nice: int, own_session: bool, before: str = "") -> list[str]:
    """What a process says after its step: its niceness, its group's before it and after."""
    done = subprocess.run(
        [sys.executable, "-c", before + TELL.format(nice=nice)],
        start_new_session=own_session,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_process_steps_back_and_leaves_the_session_of_others_alone() -> None:
    own, group = os.getpriority(os.PRIO_PROCESS, 0), str(group_nice())
    assert told(4, own_session=False) == [str(min(19, own + 4)), group, group]
    assert told(0, own_session=False) == [str(own), group, group]


def test_a_sessions_leader_steps_back_with_its_group() -> None:
    nice, before, group = told(4, own_session=True)
    assert nice == str(min(19, os.getpriority(os.PRIO_PROCESS, 0) + 4))
    if before == "None":
        pytest.skip("this kernel groups no sessions")
    assert (before, group) == ("0", nice)


def group_file(path: Path) -> str:
    return f"import openhelix.runtime.control.realtime, pathlib; openhelix.runtime.control.realtime.AUTOGROUP = pathlib.Path({str(path)!r})\n"


def test_a_system_without_groups_or_a_session_in_none_is_no_error(tmp_path: Path) -> None:
    nice = str(min(19, os.getpriority(os.PRIO_PROCESS, 0) + 4))
    missing, empty = tmp_path / "no" / "autogroup", tmp_path / "empty"
    empty.touch()
    assert told(4, own_session=True, before=group_file(missing)) == [nice, "None", "None"]
    assert told(4, own_session=False, before=group_file(empty)) == [nice, "None", "None"]
    assert not empty.read_text()


class Refusing:
    """The group's file when the kernel says no so many times."""

    def __init__(self, number: int, times: int) -> None:
        self.number, self.left = number, times
        self.asked, self.text = 0, ""

    def write_text(self, text: str) -> None:
        self.asked += 1
        if self.left:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number))
        self.text = text


@pytest.mark.parametrize(
    ("number", "times", "asked", "text"),
    [
        (errno.EAGAIN, 3, 4, "7"),  # it was others' turn
        (errno.EAGAIN, 10**9, priority.GROUP_TURNS, ""),
        (errno.EPERM, 1, 1, ""),
        (errno.EINVAL, 1, 1, ""),
    ],
)
def test_who_is_refused_its_turn_asks_again_and_nobody_else(
    monkeypatch: pytest.MonkeyPatch, number: int, times: int, asked: int, text: str
) -> None:
    file = Refusing(number, times)
    monkeypatch.setattr(priority, "AUTOGROUP", file)
    monkeypatch.setattr(priority.time, "sleep", lambda seconds: None)
    priority._group_steps_back(7)
    assert (file.asked, file.text) == (asked, text)


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
