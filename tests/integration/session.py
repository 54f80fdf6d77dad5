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

from openhelix.runtime.control.episodes import Assignment
from openhelix.runtime.core.config import RunConfig, load
from openhelix.runtime.launch.graph import Graph

SMALL = (
    "system2.engine={target: 'openhelix.runtime.robots.fake:PointEngine', options: {}}",
    "system2.hz=5",
    "system1.policy={target: 'tests.fakes:ReachPolicy', "
    "options: {cameras: [[static, 200, 200], [gripper, 84, 84]], speed_m: 0.002}}",
    "output.metrics_port=0",
    "output.video=false",
    "output.status=false",
    # A busy machine starves a simulated camera or world for longer than real ones may be silent.
    *("safety.camera_max_age_s=20", "safety.proprioception_max_age_s=5"),
)
PATIENCE_S = 60.0  # how long a test waits for what is sure to happen, on a busy machine
FAR = Assignment("", "reach 0.3 0.1 0.7")  # out of reach within the steps of a test


class Session:
    """One run, from outside."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._pids: dict[str, int] = {}

    def begin(self) -> None:
        """Wait until all is ready and start the loop."""
        self.graph.wait_ready(200.0, lambda _: None, threading.Event())
        spec = self.graph.latent_spec()
        self.graph.ask("control", "start", timeout_s=60.0, latent_spec=spec)

    def until(
        self,
        what: str,
        test: Callable[[dict[str, Any]], bool],
        timeout_s: float = PATIENCE_S,
        node: str = "control",
    ) -> Any:
        """Poll a node's health until it is ready and `test` holds; return that health."""
        deadline_s = time.monotonic() + timeout_s
        health: dict[str, Any] = {}
        while time.monotonic() < deadline_s:
            health = self.graph.health(node)
            if health["state"] == "ready" and test(health):
                return health
            time.sleep(0.05)
        raise AssertionError(f"{what} did not come about within {timeout_s} s: {health}")

    def old_pid(self, node: str) -> int:
        """The process that got the last signal."""
        return self._pids[node]

    def until_restarted(self, node: str) -> None:
        """Wait for another process in the place of the one that got the last signal."""
        old = self._pids[node]
        self.until(f"another {node}", lambda health: health["pid"] != old, node=node)

    def until_served(self, latents: int = 2) -> None:
        """Wait until more latents have arrived and the loop works."""
        wanted = self.until("the loop", lambda _: True)["latents_received"] + latents
        self.until(
            "work with fresh latents",
            lambda health: health["latents_received"] >= wanted and health["loop_state"] == "run",
        )

    def finished(self, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """Wait for the end; return the report."""
        self.until("the end", lambda h: h["finished"], timeout_s)
        return self.graph.ask("control", "report", timeout_s=60.0)

    def signal(self, node: str, number: signal.Signals) -> None:
        """Send a signal to the process that hosts a node."""
        self._pids[node] = int(self.until(node, lambda _: True, node=node)["pid"])
        os.kill(self._pids[node], number)

    def signal_again(self, node: str, number: signal.Signals) -> None:
        """Send a signal to the process that got the last one, which may not answer now."""
        os.kill(self._pids[node], number)


@contextmanager
def session(
    tmp_path: Path, *overrides: str, assignments: tuple[Assignment, ...] = (FAR,)
) -> Iterator[Session]:
    """Start a graph whose loop waits; ends it and checks that nothing is left behind."""
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
