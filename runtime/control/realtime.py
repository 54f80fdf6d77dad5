"""Real-time settings that a control thread requests from the operating system and the interpreter.

`enter` never raises: whatever is refused is left out, and the status says so in a line meant for
a metric. Scheduling and affinity are set for the calling thread alone, with
RESET_ON_FORK, because threads inherit both: a thread pool that a real-time thread starts
would otherwise run in real time too, and starve ZeroMQ's input and output thread of a core.
(`inherit` is for a process that wants just that: all its threads at one low priority.)
For the same reason a SCHED_FIFO thread may spin only briefly (`MonotonicClock.spin_ns`); the
kernel stops real-time threads for 50 ms once they have used 95 % of a second.

Without SCHED_FIFO, `step_back` and `short_slice` set priorities. Linux puts the
processes of each session into a group of their own and shares the cores between the groups
(autogroup); niceness counts only inside one. So a process that leads a session of its own, as
those of a run do (`openhelix.runtime.launch.processes`), sets its niceness for its group too.
A computing thread keeps its core until its slice of several milliseconds is over, unless the
waking thread has a shorter slice (Linux 6.12 and later), which needs no privilege. Anything the
system does not support is left out here too.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import logging
import os
import platform
import random
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

log = logging.getLogger(__name__)
AUTOGROUP: Final = Path("/proc/self/autogroup")
GROUP_TURNS: Final = 20  # two to three seconds
SHORT_SLICE_NS: Final = 100_000  # the shortest that Linux takes
_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}
# struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period.
_ATTR: Final = struct.Struct("=IIQiIQQQ")
_PR_SET_TIMERSLACK: Final = 29
_PR_GET_TIMERSLACK: Final = 30
_MCL_CURRENT_AND_FUTURE: Final = 3
_M_ARENA_MAX: Final = -8  # options of glibc's mallopt
_M_MMAP_THRESHOLD: Final = -3
GcMode = Literal["freeze", "disable", "leave"]

# ------------------------------------------------------------------------------------------------
# Niceness and slices


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


def one_heap(apart_bytes: int = 0) -> None:
    """Let all threads of this process share one heap; call it before the first other one begins.

    glibc gives each thread a heap of its own. What one thread reads off the wire and another one
    writes to disk leaves holes in each, so that a process which only passes pictures on grows
    for hours. Where there is no glibc, nothing is done.

    Args:
        apart_bytes: what is at least so large goes back to the system as soon as it is freed,
            at the price of a few page faults, and leaves no holes; 0 leaves that to glibc.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = _libc().mallopt
        mallopt(_M_ARENA_MAX, 1)
        if apart_bytes:
            mallopt(_M_MMAP_THRESHOLD, apart_bytes)


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


# ------------------------------------------------------------------------------------------------
# The control thread


@dataclass(frozen=True, slots=True)
class Before:
    """What `leave` puts back."""

    policy: int | None = None
    priority: int = 0
    cpus: frozenset[int] | None = None
    timer_slack_ns: int | None = None
    switch_interval_s: float | None = None
    gc_enabled: bool | None = None
    gc_frozen: bool = False
    memory_locked: bool = False


@dataclass(frozen=True, slots=True)
class RealtimeStatus:
    """What was granted. `reason` is empty when all that was asked for is in force."""

    fifo: bool
    reason: str
    cpus: tuple[int, ...]  # that the thread may run on
    timer_slack_ns: int | None  # None: unknown
    gc_frozen: bool
    memory_locked: bool = False
    before: Before = field(default_factory=Before, repr=False)


def enter(
    *,
    priority: int | None = 50,
    inherit: bool = False,
    cpus: Sequence[int] | None = None,
    timer_slack_ns: int | None = 1,
    gc_mode: GcMode = "freeze",
    switch_interval_s: float | None = 0.0005,
    lock_memory: bool = False,
) -> RealtimeStatus:
    """Prepare the calling thread for control; call it in that thread, after warm-up.

    Args:
        priority: of SCHED_FIFO, 1 to 99; None leaves the scheduler alone.
        inherit: threads that this one starts from now on get the same priority.
        cpus: cores for this thread; None leaves the affinity alone.
        timer_slack_ns: how late the kernel may wake this thread on purpose (50,000 by default).
        gc_mode: "freeze" moves all living objects out of the collector's sight and stops
            automatic collections (then use `SlackCollector`), "disable" only stops them.
            The collector belongs to the whole process.
        switch_interval_s: how long another Python thread may keep the interpreter when this
            one wants it (5 ms by default); for the whole process.
        lock_memory: keep all pages of the process in memory; costs their full size.

    Returns:
        What was granted and why the rest was not; hand it to `leave`.
    """
    refusals: list[str] = []
    policy, old_priority, fifo = _enter_fifo(priority, inherit, refusals)
    old_cpus = _enter_cpus(cpus, refusals)
    old_slack = _enter_slack(timer_slack_ns, refusals)
    locked = lock_memory and _lock_memory(refusals)
    old_interval = sys.getswitchinterval()
    if switch_interval_s is not None:
        sys.setswitchinterval(switch_interval_s)
    gc_enabled = gc.isenabled()
    if gc_mode != "leave":
        gc.disable()
    if gc_mode == "freeze":
        gc.collect()
        gc.freeze()
    before = Before(
        policy=policy,
        priority=old_priority,
        cpus=old_cpus,
        timer_slack_ns=old_slack,
        switch_interval_s=None if switch_interval_s is None else old_interval,
        gc_enabled=None if gc_mode == "leave" else gc_enabled,
        gc_frozen=gc_mode == "freeze",
        memory_locked=locked,
    )
    return RealtimeStatus(
        fifo=fifo,
        reason="; ".join(refusals),
        cpus=_affinity(),
        timer_slack_ns=_timer_slack(),
        gc_frozen=gc_mode == "freeze",
        memory_locked=locked,
        before=before,
    )


def leave(status: RealtimeStatus) -> None:
    """Undo `enter`, in the same thread; never raises."""
    before = status.before
    ignored: list[str] = []
    if before.policy is not None:
        _try(
            "scheduler",
            ignored,
            lambda: os.sched_setscheduler(
                0, before.policy or os.SCHED_OTHER, os.sched_param(before.priority)
            ),
        )
    if before.cpus is not None:
        _try("affinity", ignored, lambda: os.sched_setaffinity(0, before.cpus or ()))
    if before.timer_slack_ns is not None:
        _try("timer slack", ignored, lambda: _prctl(_PR_SET_TIMERSLACK, before.timer_slack_ns or 0))
    if before.memory_locked:
        _try("memory", ignored, lambda: _libc().munlockall())
    if before.switch_interval_s is not None:
        sys.setswitchinterval(before.switch_interval_s)
    if before.gc_frozen:
        gc.unfreeze()
    if before.gc_enabled:
        gc.enable()


def _enter_fifo(
    priority: int | None, inherit: bool, refusals: list[str]
) -> tuple[int | None, int, bool]:
    """Return the old policy (None where unchanged), the old priority, and whether it is FIFO."""
    if priority is None:
        return None, 0, False
    if not hasattr(os, "sched_setscheduler"):
        refusals.append("SCHED_FIFO: this system has no real-time scheduling")
        return None, 0, False
    policy, old = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    wanted = os.SCHED_FIFO if inherit else os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
    hint = "allow it with `ulimit -r 99` or CAP_SYS_NICE"
    fifo = _try(
        "SCHED_FIFO",
        refusals,
        lambda: os.sched_setscheduler(0, wanted, os.sched_param(priority)),
        hint,
    )
    return (policy, old, True) if fifo else (None, 0, False)


def _enter_cpus(cpus: Sequence[int] | None, refusals: list[str]) -> frozenset[int] | None:
    if cpus is None:
        return None
    if not hasattr(os, "sched_setaffinity"):
        refusals.append("affinity: this system has none")
        return None
    old = frozenset(os.sched_getaffinity(0))
    done = _try(f"affinity {sorted(cpus)}", refusals, lambda: os.sched_setaffinity(0, cpus))
    return old if done else None


def _enter_slack(timer_slack_ns: int | None, refusals: list[str]) -> int | None:
    if timer_slack_ns is None:
        return None
    old = _timer_slack()
    done = _try("timer slack", refusals, lambda: _prctl(_PR_SET_TIMERSLACK, timer_slack_ns))
    return old if done else None


def _lock_memory(refusals: list[str]) -> bool:
    def lock() -> None:
        if _libc().mlockall(_MCL_CURRENT_AND_FUTURE) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    return _try("mlockall", refusals, lock, "allow it with `ulimit -l unlimited`")


def _try(what: str, refusals: list[str], action: Any, hint: str = "") -> bool:
    try:
        action()
    except (OSError, ValueError, TypeError, OverflowError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        denied = isinstance(error, PermissionError)
        refusals.append(f"{what}: {why}" + (f" ({hint})" if hint and denied else ""))
        return False
    return True


def _affinity() -> tuple[int, ...]:
    if not hasattr(os, "sched_getaffinity"):
        return tuple(range(os.cpu_count() or 1))
    return tuple(sorted(os.sched_getaffinity(0)))


def _timer_slack() -> int | None:
    try:
        return _prctl(_PR_GET_TIMERSLACK, 0)
    except (OSError, AttributeError):
        return None


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> int:
    """Call prctl; it applies to the calling thread."""
    number = ctypes.c_ulong
    result = int(_libc().prctl(option, number(value), number(0), number(0), number(0)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
