"""One process of the graph: builds its part, reports when it is ready, answers requests.

`NodeRunner` is the same whether a Ray actor or a plain process hosts it; both reach it
over the node's own ZeroMQ control endpoint, so Ray carries no message of the run at all.

States: `starting` -> `ready` -> `done`, or `refused` (invalid input: restarting would not
help, so it stays up and reports why) or `failed` (a crash: the host lets it be restarted).
The health record of a node has the same fields in every state.

`interruptible` turns Ctrl-C, SIGTERM and a closed terminal into an event, so that a run ends
in order: the tick is finished, the robot stopped, the report written, the processes ended.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any, Final, Protocol

import psutil

from openhelix.runtime.control.realtime import enter, short_slice, step_back
from openhelix.runtime.core.config import CommandFailed
from openhelix.runtime.core.plugins import FOLDER, resolve
from openhelix.runtime.transport.rpc import RpcServer

log = logging.getLogger(__name__)
TELL_S = 2.0  # how long a node that could not start goes on answering, so that its error is heard
Handler = Callable[[dict[str, Any]], dict[str, Any]]
NUMBERS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# ------------------------------------------------------------------------------------------------
# Signals


def in_a_thread(act: Callable[[], object]) -> None:
    """Let a signal handler take locks: it may have interrupted whoever holds them.

    `threading.Event.set` in a handler waits for ever when the same thread was just inside
    the event, which happens when signals come in quick succession.
    """
    threading.Thread(target=act, daemon=True).start()


class Interrupts(threading.Event):
    """Set by the signals that ask a program to end."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = 0  # signals so far
        self._patience: int | None = None

    @contextmanager
    def patience(self, signals: int) -> Iterator[None]:
        """Within, a signal after so many is too much and raises KeyboardInterrupt.

        Elsewhere none does: what is being brought to an end in order is not disturbed by the
        second Ctrl-C of somebody who does not see that.
        """
        before, self._patience = self._patience, signals
        try:
            if self.heard > signals:
                raise KeyboardInterrupt
            yield
        finally:
            self._patience = before
        if before is not None and self.heard > before:
            raise KeyboardInterrupt  # it came within, and was too much for those around it

    def listen(self) -> None:
        """Take the signals, also back from a library that took them meanwhile.

        A closed terminal that was to be ignored (`nohup`) stays ignored.
        """
        for number in NUMBERS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def is_set(self) -> bool:
        """Whether a signal has come."""
        return bool(self.heard) or super().is_set()

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.heard += 1
        if self._patience is not None and self.heard > self._patience:
            raise KeyboardInterrupt
        if self.heard == 1:
            in_a_thread(self.set)


@contextmanager
def interruptible() -> Iterator[Interrupts]:
    """Turn the signals into an event while the block runs; within another, into the same one."""
    outer = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    if isinstance(outer, Interrupts):
        yield outer
        return
    interrupts = Interrupts()
    before = {number: signal.getsignal(number) for number in NUMBERS}
    interrupts.listen()
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------
# Where the time of a start goes


def born_ns() -> int:
    """Return when this process began, on its host's monotonic clock; right to about 10 ms."""
    age_s = time.time() - psutil.Process().create_time()
    return time.monotonic_ns() - round(age_s * 1e9)


class Stages:
    """When a process reached which stage of its start.

    Attributes:
        begun_ns: when it began, on its host's monotonic clock.
        reached: by the stage's name, seconds since then, and of processor time used until then.
    """

    def __init__(self) -> None:
        self.begun_ns = born_ns()
        self.reached: dict[str, dict[str, float]] = {}

    def reach(self, name: str) -> None:
        """The stage `name` is complete now."""
        since_s = (time.monotonic_ns() - self.begun_ns) * 1e-9
        self.reached[name] = {"s": round(since_s, 3), "cpu_s": round(time.process_time(), 3)}


# ------------------------------------------------------------------------------------------------
# Nodes


class Node(Protocol):
    """A part that fills a process: built with its options, then driven by `NodeRunner`."""

    def setup(self) -> None:
        """Load, connect, bind, warm up. Ready when it returns."""

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set."""

    def health(self) -> dict[str, Any]:
        """Return what the part is and does; the same fields from construction to the end.

        Small and quick: called from another thread while `setup` or `run` works. What is not
        known yet is None.
        """

    def handlers(self) -> Mapping[str, Handler]:
        """More questions that this part answers."""

    def close(self) -> None:
        """Release everything; safe to call twice."""


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """All that a host needs to start a node; plain data, so that it travels as JSON."""

    name: str
    target: str  # "module:Class"
    control: str  # endpoint of the node's control channel
    options: dict[str, Any] = field(default_factory=dict)
    cpus: float = 0.5
    gpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    threads: int = 1
    nice: int = 0
    fifo: int = 0  # SCHED_FIFO priority, inherited by every thread the node starts; 0: normal
    restart: bool = True
    here: bool = False  # on the host where the run is started, whatever the cluster has
    keys: str | None = None  # folder of CURVE keys, off loopback

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> NodeSpec:
        return cls(**json.loads(text))

    @property
    def environment(self) -> dict[str, str]:
        """Thread counts, set before any library reads them, so that processes do not fight.

        With them goes the folder in which the run was started: a user's own parts are there.
        """
        count = str(self.threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
        return {name: count for name in names} | {
            "TOKENIZERS_PARALLELISM": "false",
            FOLDER: os.environ.get(FOLDER) or os.getcwd(),
        }


class NodeRunner:
    """Drives one node through its states."""

    def __init__(
        self,
        spec: NodeSpec,
        stay_refused: bool = True,
        stoppable: bool = True,
        again: bool = False,
    ) -> None:
        """Prepare; `run` does the work.

        Args:
            spec: which node.
            stay_refused: keep answering after a refusal, so that its reason can be read.
            stoppable: whether whoever reaches the control channel may end the node.
            again: whether it takes the place of one that died while the robot moves.
        """
        self._spec, self._stay_refused, self._stoppable = spec, stay_refused, stoppable
        self._again = again
        self._stages = Stages()
        self._stages.reach("imported")
        self.last_health: dict[str, Any] = {}
        self._stop = threading.Event()
        self.told = False  # by a signal
        self._may_leave = False  # at any line: what may take minutes is running
        self._node: Node | None = None
        self.state = "starting"
        self._was_ready = False
        self.error = ""
        self._server: RpcServer | None = None

    def run(self) -> str:
        """Block until the node is done; return its last state."""
        if self._again:
            step_back(self._spec.nice)
        try:
            with self._leaving_at_once():
                self._build()
            # After the imports, which would keep a core for seconds, and before the first thread.
            self._step_forward()
            self._serve()
            self._drive()
        finally:
            if self._node is not None:
                self._node.close()
            if self.state == "refused" and self._stay_refused:
                self._stop.wait()
            elif self.state == "failed" and not self._was_ready:
                self._stop.wait(TELL_S)
            if self._server is not None:
                self._server.close()
        return self.state

    def stop(self) -> None:
        self._stop.set()

    def interrupt(self) -> None:
        """Stop, from a signal's handler in the thread that runs this.

        Raises:
            SystemExit: out of a setup, which may wait for others for minutes. What has been
                opened is closed on the way.
        """
        if self.told:  # the signal may come several times, one within the other
            return
        self.told = True
        in_a_thread(self.stop)
        if self._may_leave:
            raise SystemExit(0)

    @contextmanager
    def _leaving_at_once(self) -> Iterator[None]:
        """Let a signal end the block at any line; one that came before ends it here."""
        self._may_leave = True
        try:
            if self.told:
                raise SystemExit(0)
            yield
        finally:
            self._may_leave = False

    def _serve(self) -> None:
        handlers = {"health": self._health, "ask": self._ask}
        if self._stoppable:
            handlers["stop"] = self._on_stop
        self._server = RpcServer(self._spec.control, handlers, keys=self._spec.keys)
        self._server.start()

    def _step_forward(self) -> None:
        """Ask for SCHED_FIFO, or, where a node is nice to nobody, to be woken at once."""
        fifo = False
        if self._spec.fifo:
            status = enter(priority=self._spec.fifo, inherit=True, gc_mode="leave")
            fifo = status.fifo
            if not fifo:
                log.warning("%s: %s", self._spec.name, status.reason)
        if not fifo and not self._spec.nice:
            short_slice()

    def _build(self) -> None:
        try:
            self._node = resolve(self._spec.target)(**self._spec.options)
            self._stages.reach("built")
        except Exception as error:
            self._note(error)

    def _drive(self) -> None:
        if self._node is None:
            return
        try:
            with self._leaving_at_once():
                self._node.setup()
            if not self._again:
                step_back(self._spec.nice)  # not before: nothing moves yet, and a person waits
            self._stages.reach("ready")
            self.state, self._was_ready = "ready", True
            log.info("%s: ready at %s", self._spec.name, self._spec.control)
            self._node.run(self._stop)
            self.last_health = self._node.health()
            self.state = "done"
        except Exception as error:
            self._note(error)

    def _note(self, error: Exception) -> None:
        """Wrong input (any ValueError: SpecMismatch, ConfigError, ...) or a crash."""
        if isinstance(error, CommandFailed):  # it says in one line what is wrong
            self.state, self.error = "failed", str(error)
            log.error("%s failed: %s", self._spec.name, error)
        elif isinstance(error, ValueError):
            self.state, self.error = "refused", " ".join(str(error).split())
            log.error("%s refuses to start: %s", self._spec.name, self.error)
        else:
            self.state, self.error = "failed", f"{type(error).__name__}: {error}"
            log.error("%s failed", self._spec.name, exc_info=error)

    def _health(self, _: dict[str, Any]) -> dict[str, Any]:
        part = self._node.health() if self._node is not None else {}
        return part | {
            "name": self._spec.name,
            "state": self.state,
            "error": self.error,
            "pid": os.getpid(),
            "startup": {"begun_ns": self._stages.begun_ns} | self._stages.reached,
        }

    def _on_stop(self, _: dict[str, Any]) -> dict[str, Any]:
        self._stop.set()
        return {}

    def _ask(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Pass a question on to the node, once it is there."""
        question = str(arguments.get("question"))
        handlers = self._node.handlers() if self._node is not None else {}
        if question not in handlers:
            raise ValueError(f"{self._spec.name} does not answer {question!r} ({self.state})")
        return handlers[question](arguments)
