"""A real graph of processes with a small System 1 and System 2, for tests to break."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from openhelix.runtime.control.episode_runner import Assignment
from openhelix.runtime.core.config import RunConfig, load
from openhelix.runtime.launch.graph import Graph

SMALL = (
    "system2.engine={target: 'tests.fakes:PointEngine', options: {}}",
    "system2.hz=5",
    "system1.policy={target: 'tests.fakes:ReachPolicy', "
    "options: {cameras: [[static, 200, 200], [gripper, 84, 84]], speed_m: 0.002}}",
    "output.metrics_port=0",
    "output.video=false",
    "output.status=false",
    # A busy machine starves a simulated camera or world for longer than real ones may be silent.
    *("safety.camera_max_age_s=20", "safety.proprioception_max_age_s=5"),
)
FAR = Assignment("", "reach 0.3 0.1 0.7")  # out of reach within the steps of a test


class Session:
    """One run, from outside."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._pids: dict[str, int] = {}

    def begin(self) -> None:
        """Wait until all is ready and give the word."""
        self.graph.wait_ready(200.0, lambda _: None, threading.Event())
        spec = self.graph.health("system2")["latent_spec"]
        self.graph.ask("control", "start", timeout_s=60.0, latent_spec=spec)

    def until(
        self, what: str, test: Callable[[dict[str, Any]], bool], timeout_s: float = 30.0
    ) -> Any:
        """Poll control's health until `test` holds; return that health."""
        deadline_s = time.monotonic() + timeout_s
        health: dict[str, Any] = {}
        while time.monotonic() < deadline_s:
            health = self.graph.health("control")
            if health["state"] == "ready" and test(health):
                return health
            time.sleep(0.05)
        raise AssertionError(f"{what} did not come about within {timeout_s} s: {health}")

    def finished(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """Wait for the end; return the report."""
        self.until("the end", lambda h: h["finished"], timeout_s)
        return self.graph.ask("control", "report", timeout_s=60.0)

    def pid(self, node: str) -> int:
        return int(self.graph.health(node)["pid"])

    def signal(self, node: str, number: signal.Signals) -> None:
        """Send a signal to the process that hosts a node."""
        self._pids[node] = self.pid(node)
        os.kill(self._pids[node], number)

    def signal_again(self, node: str, number: signal.Signals) -> None:
        """Send a signal to the process that got the last one, which may not answer now."""
        os.kill(self._pids[node], number)


@contextmanager
def session(
    tmp_path: Path, *overrides: str, assignments: tuple[Assignment, ...] = (FAR,)
) -> Iterator[Session]:
    """Start a graph, not yet given the word; ends it and checks that nothing is left behind."""
    config: RunConfig = load(None, [*SMALL, "ray=false", *overrides])
    job = {"assignments": [asdict(a) for a in assignments], "initial": None}
    graph = Graph(config, job, tmp_path)
    me = psutil.Process()
    try:
        graph.start()
        yield Session(graph)
    finally:
        graph.close()
        mine = graph.endpoints.control["control"]
        left = [p for p in me.children(recursive=True) if mine in _command(p)]
        for process in left:
            process.kill()
        assert not left, f"processes left behind: {left}"


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
