"""A run on the wall clock: start the graph, give the word, watch, fetch the report, end all."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtime.config import RunConfig
from runtime.director import Assignment
from runtime.display import Display
from runtime.errors import CommandFailed
from runtime.graph import Graph, GraphError
from runtime.interrupts import interruptible
from runtime.report import versions
from runtime.rpc import RpcError
from runtime.status_source import RECORD, StatusRecord

READY_TIMEOUT_S = 300.0  # the first start builds the laptop model; later ones take seconds


class RunFailed(CommandFailed):
    """The run could not be completed; one line says why."""


def run_realtime(
    config: RunConfig,
    assignments: Sequence[Assignment],
    initial: dict[str, Any] | None,
    folder: Path,
    display: Display,
) -> dict[str, Any]:
    """Run on real processes; return the report.

    Raises:
        ConfigError: a part refused its configuration.
        RunFailed: a part failed and the run could not go on.
    """
    job = {"assignments": [asdict(a) for a in assignments], "initial": initial}
    started_s = time.monotonic()
    graph = Graph(config, job, folder)
    with interruptible() as interrupted, display, StatusRecord.of(graph, config).kept(folder):
        try:
            if graph.has("observer"):
                display.say(
                    f"`openhelix status --web` shows this run; {folder}/{RECORD} has the "
                    "token of its stop button"
                )
            display.say("starting the processes" + (" as Ray actors" if config.ray else ""))
            graph.start()
            interrupted.listen()
            graph.wait_ready(READY_TIMEOUT_S, display.states, interrupted)
            if interrupted.is_set():
                raise KeyboardInterrupt
            system2 = graph.health("system2")
            graph.ask("control", "start", timeout_s=30.0, latent_spec=system2["latent_spec"])
            ready_s = time.monotonic() - started_s
            report = _watch(graph, config, display, interrupted)
            if graph.has("observer"):
                report["sinks"] = _finish(graph, display)
            system2 = graph.health("system2")
            if not report["interrupted"]:
                graph.ask("control", "await_scrape", timeout_s=15.0)
        except (GraphError, RpcError) as error:
            raise RunFailed(str(error)) from error
        finally:
            graph.close()
    # Both clocks are this host's: control runs beside the head.
    first_ns = report.pop("first_action_ns")
    return report | {
        "first_action_s": None if first_ns is None else first_ns * 1e-9 - started_s,
        "latents_published": system2.get("published"),
        "latents_skipped": system2.get("skipped"),
        "ready_s": ready_s,
        "device": f"{platform.machine()}, {system2.get('device', 'cpu')}",
        "versions": versions(),
        "seed": config.seed,
    }


def _finish(graph: Graph, display: Display) -> dict[str, Any] | None:
    """Let the observer finish its files; None where it is gone, which is no failure of a run."""
    if "observer" in graph.ended() or graph.health("observer", 5.0)["state"] != "ready":
        display.say("observer: is gone; video and recording are incomplete")
        return None
    return graph.ask("observer", "finish", timeout_s=70.0)


def _watch(
    graph: Graph, config: RunConfig, display: Display, interrupted: threading.Event
) -> dict[str, Any]:
    """Follow the control process until it has finished; return its report."""
    silent_since_s: float | None = None
    while True:
        health = graph.health("control")
        if health["state"] == "unreachable":
            silent_since_s = silent_since_s or time.monotonic()
            if "control" in graph.ended():
                how = graph.ended()["control"]
                raise GraphError(f"control {how}; its log is in logs/")
            if time.monotonic() - silent_since_s > 10.0:
                raise GraphError("control: has not answered for 10 s; its log is in logs/")
        elif health["state"] in ("failed", "refused"):
            raise GraphError(f"control {health['state']}: {health['error']}")
        else:
            silent_since_s = None
            display.progress(health, config.tasks.steps_limit)
            if health.get("finished"):
                return graph.ask("control", "report", timeout_s=10.0)
        if interrupted.is_set():
            # The loop ends its tick, holds, stops the robot and reports what it did.
            graph.ask("control", "halt")
            interrupted.clear()
        time.sleep(0.15)
