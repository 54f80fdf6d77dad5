"""Who goes first where there is no SCHED_FIFO: niceness that counts, and short slices.

Linux puts the processes of each session into a group of their own and shares the cores
between the groups (autogroup); niceness counts only inside one. So a process that leads a
session of its own, as those of a run do (`runtime.processes`), says its niceness for its
group too.

A thread that computes keeps its core until its slice is over, milliseconds, unless the one
that wakes has a shorter slice (Linux 6.12 and later). Anybody may ask for that. Nothing here
raises: what a system does not have is left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import platform
import random
import struct
import time
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

AUTOGROUP: Final = Path("/proc/self/autogroup")
GROUP_TURNS: Final = 20  # two to three seconds
SHORT_SLICE_NS: Final = 100_000  # the shortest that Linux takes
_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}
# struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period.
_ATTR: Final = struct.Struct("=IIQiIQQQ")


def step_back(nice: int) -> None:
    """Make this process, all of its threads, this much nicer to others (0 to 19)."""
    if nice <= 0:
        return
    now = min(19, os.getpriority(os.PRIO_PROCESS, 0) + nice)
    for thread in _threads():  # on Linux each has its own niceness
        with contextlib.suppress(OSError):  # it has just ended
            os.setpriority(os.PRIO_PROCESS, thread, now)
    if os.getsid(0) != os.getpid():
        return  # a group that is shared with others, who did not ask for it
    _group_steps_back(now)


def _group_steps_back(nice: int) -> None:
    """Set the niceness of this session's group.

    Unprivileged processes share one turn in each tenth of a second, all of them together;
    those of a run want theirs at the same time, so who is told EAGAIN asks again.
    """
    for turn in range(GROUP_TURNS):
        try:
            AUTOGROUP.write_text(str(nice))
            return
        except OSError as error:
            if error.errno != errno.EAGAIN or turn == GROUP_TURNS - 1:
                log.debug("autogroup: %s", error)
                return
        # Not of one length: those that were refused together would come back together.
        time.sleep(0.1 + 0.05 * random.random())


def group_nice() -> int | None:
    """Return the niceness of this process's group; None where it is in none.

    In none are those whose session began before the kernel's grouping, as that of its first
    process: their file is there, and empty.
    """
    try:
        words = AUTOGROUP.read_text().split()
    except OSError:
        return None
    return int(words[-1]) if words else None


def _threads() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        return [0]


def short_slice(slice_ns: int = SHORT_SLICE_NS) -> bool:
    """Ask for short slices for the calling thread and those it starts from now on.

    Args:
        slice_ns: 100,000 to 100,000,000; 0 for the system's own.

    Returns:
        whether the kernel took it; one before 6.12 does, and goes on as before.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or not hasattr(os, "sched_getscheduler"):
        return False
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False  # real-time and idle threads have no use for it
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _ATTR.pack(_ATTR.size, os.SCHED_OTHER, 0, nice, 0, slice_ns, 0, 0)
    return int(ctypes.CDLL(None).syscall(number, 0, attributes, 0)) == 0
