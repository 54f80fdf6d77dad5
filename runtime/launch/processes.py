"""Nodes as plain processes: all of them with `--no-ray`, else those that stay beside the command.

`python -m openhelix.runtime.launch.processes '<NodeSpec as JSON>' <parent's pid> first|again` is
one process. The parent restarts a node that died; when the parent dies, the kernel tells the
children, which stop the robot and end.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from openhelix.runtime.launch.node import NodeRunner, NodeSpec, in_a_thread

log = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1
MARK = "OPENHELIX_RUN"  # in the environment of all that belongs to one run
ALONE_S = 3.0  # how long a child whose parent died may take to stop the robot and end
STUCK_S = 1.0  # for Python to hear a signal; a library that connects or loads may never let it


def reap(process: subprocess.Popen[Any], patience_s: float) -> None:
    """Wait for a process that was told to end; kill it when the patience is over."""
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_strays(sessions: Collection[int], mark: str | None = None) -> None:
    """Kill what children that have ended left behind: their own children.

    Args:
        sessions: of those children, each of which began one. Some programs overwrite their
            environment with a title; the session they are in stays.
        mark: of the whole run, for children of which nothing is known, and for programs that
            began a session of their own.
    """
    ours = f"{MARK}={mark}".encode() if mark is not None else None
    for number in psutil.pids():
        with suppress(OSError):
            # As it stands: where a process has changed its title, psutil reads nothing here.
            if os.getsid(number) in sessions or (
                ours is not None and ours in Path(f"/proc/{number}/environ").read_bytes()
            ):
                os.kill(number, signal.SIGKILL)


def wake(mark: str) -> None:
    """Let processes of a run go on that somebody has halted: they hear no other signal.

    Args:
        mark: of the run.
    """
    ours = f"{MARK}={mark}".encode()
    for number in psutil.pids():
        with suppress(OSError):
            if ours in Path(f"/proc/{number}/environ").read_bytes().split(b"\0"):
                os.kill(number, signal.SIGCONT)


class ProcessHost:
    """Starts nodes as child processes and restarts those that die."""

    def __init__(self, log_folder: Path) -> None:
        self._log_folder = log_folder
        self._specs: dict[str, NodeSpec] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._mark = uuid.uuid4().hex
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self.restarts: dict[str, int] = {}
        self._not_before_s: dict[str, float] = {}

    def start(self, specs: Sequence[NodeSpec]) -> None:
        self._log_folder.mkdir(parents=True, exist_ok=True)
        for spec in specs:
            self._specs[spec.name] = spec
            self._children[spec.name] = self._spawn(spec, again=False)
        self._watch.start()

    def ended(self) -> dict[str, str]:
        """Return which nodes died that are not started again, and how."""
        codes = {name: child.poll() for name, child in list(self._children.items())}
        return {
            name: f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            for name, code in codes.items()
            if code and not self._specs[name].restart
        }

    def close(self, timeout_s: float = 5.0) -> None:
        """End every child: politely, then for certain."""
        self._closing.set()
        if self._watch.ident is not None:  # a signal may come while the first are being started
            self._watch.join(timeout=2.0)  # or it might start one again behind our back
        for child in self._children.values():
            child.terminate()
        give_up_s = time.monotonic() + timeout_s
        for child in self._children.values():
            reap(child, max(0.0, give_up_s - time.monotonic()))
        # Whatever their exit codes: one that was deaf to the signal ends with 0 and leaves its own.
        end_strays([child.pid for child in self._children.values()], self._mark)

    def _spawn(self, spec: NodeSpec, again: bool) -> subprocess.Popen[bytes]:
        with (self._log_folder / f"{spec.name}.log").open("ab") as output:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "openhelix.runtime.launch.processes"),
                    *(spec.to_json(), str(os.getpid()), "again" if again else "first"),
                ],
                env=os.environ | spec.environment | {MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which stops in order
            )

    def _supervise(self) -> None:
        while not self._closing.wait(0.2):
            for name, child in list(self._children.items()):
                if child.poll() in (None, 0) or not self._specs[name].restart:
                    continue
                now_s = time.monotonic()
                if now_s < self._not_before_s.get(name, 0.0):
                    continue
                count = self.restarts[name] = self.restarts.get(name, 0) + 1
                # What fails at once would fail again at once: wait longer each time.
                self._not_before_s[name] = now_s + min(0.5 * 2**count, 30.0)
                log.warning("%s ended with code %s; starting it again", name, child.returncode)
                end_strays([child.pid])  # they hold what the new one needs: memory, a GPU, ports
                self._children[name] = self._spawn(self._specs[name], again=True)


def tied(parent: int, number: signal.Signals) -> bool:
    """Have the kernel send us a signal when our parent ends; False where it has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    return os.getppid() == parent


def pool_of(count: int) -> ProcessPoolExecutor:
    """Return a pool of fresh processes, which end with this one however it ends.

    Give it its work from the main thread: the kernel takes the thread for the parent.
    """
    spawned = get_context("spawn")
    return ProcessPoolExecutor(count, spawned, initializer=end_with, initargs=(os.getpid(),))


def end_with(parent: int) -> None:
    """Be killed when our parent ends: what only works for it hears of nothing else."""
    if not tied(parent, signal.SIGKILL):
        os._exit(1)


def wait_for_end(pid: int) -> None:
    """Block until our parent `pid` has ended; costs nothing meanwhile where the kernel tells it."""
    with suppress(AttributeError, OSError):  # no pidfd on this system: look often
        handle = os.pidfd_open(pid)
        try:
            if os.getppid() == pid:  # else it is over already, and the number may be another's
                select.select([handle], [], [])
        finally:
            os.close(handle)
    while os.getppid() == pid:
        time.sleep(0.1)


def main(argv: Sequence[str]) -> int:
    """Be one node until told to stop; 0 when done, 1 after a crash."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    parent = int(argv[1])
    if not tied(parent, signal.SIGTERM):
        return 1
    runner = NodeRunner(NodeSpec.from_json(argv[0]), again=argv[2] == "again")

    def alone() -> None:
        """Stop in order; then, as nobody else would, the kernel ends us for certain.

        Neither needs the main thread, which a signal's handler waits for: that may be in a
        library for minutes.
        """
        wait_for_end(parent)
        signal.setitimer(signal.ITIMER_REAL, ALONE_S)
        runner.stop()
        if MARK in os.environ:
            wake(os.environ[MARK])

    heard, hear = socket.socketpair()
    hear.setblocking(False)

    def stuck() -> None:
        """End what is told to end but is in a library that does not return to Python."""
        while heard.recv(1)[0] != signal.SIGTERM:
            pass
        time.sleep(STUCK_S)
        if runner.state == "starting" and not runner.told:
            os._exit(0)

    signal.signal(signal.SIGTERM, lambda *_: runner.interrupt())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever Python does
    signal.set_wakeup_fd(hear.fileno(), warn_on_full_buffer=False)
    in_a_thread(stuck)
    in_a_thread(alone)
    state = runner.run()
    gc.freeze()  # what is left is not worth a last search, which takes seconds on a busy machine
    return 0 if state == "done" else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
