"""The whole system for a minute: deadlines, lateness, cost of a tick, start, memory.

Runs `openhelix run` as a user does (all processes, both systems, the simulator and its
cameras), one long instruction, once with SCHED_FIFO and once without, and reads the figures
from its own report and from the processes' proportional set sizes.

    python -m openhelix.benchmarks.perf.bench_run [--seconds 60] [--config configs/run.yaml] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from openhelix.benchmarks.perf.places import CONFIG, results_file

# No SCHED_FIFO anywhere, as on a machine that does not grant it.
NO_FIFO = (
    "control.fifo_priority=0",
    "control.placement={cpus: 0.5, threads: 1, fifo: 0}",
    "world.placement={cpus: 0.3, fifo: 0}",
)
FIGURES = (
    *(
        "control_hz",
        "ticks",
        "deadline_missed",
        "tick_lateness_s",
        "tick_duration_s",
        "prefetch_duration_s",
    ),
    *("latent_age_s", "latents_published", "latents_missed", "s1_latency_s", "s2_latency_s"),
    *("ready_s", "first_action_s", "realtime", "ticks_by_state", "sinks", "device", "versions"),
)


def pss_bytes(root: psutil.Process) -> dict[str, int]:
    """Proportional set size of a process tree: shared pages are counted once in all."""
    total: dict[str, int] = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            name = _name(process)
            total[name] = total.get(name, 0) + process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def _name(process: psutil.Process) -> str:
    words = process.cmdline()
    for word in words:
        if word.startswith('{"name"'):
            return str(json.loads(word)["name"])
    return Path(words[0]).name if words else process.name()


class MemoryWatch(threading.Thread):
    """Samples the tree's memory every two seconds; keeps the largest."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self.peak: dict[str, int] = {}

    def run(self) -> None:
        while self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE:
            try:
                now = pss_bytes(self._root)
            except psutil.Error:
                return
            if sum(now.values()) > sum(self.peak.values()):
                self.peak = now
            time.sleep(2.0)


def run(seconds: float, config: Path, words: tuple[str, ...]) -> dict[str, Any]:
    """One run; its figures."""
    steps = round(seconds * 30)
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-m",
                    "openhelix.runtime.cli.main",
                    "run",
                    "--config",
                    str(config),
                    "--json",
                ),
                *("tasks.instruction=push the sliding door to the left side",),
                *(f"tasks.steps_limit={steps}", f"output.folder={folder}"),
                # Its film would be drawn afterwards, for as long again.
                *("output.metrics_port=0", "output.video=false", "system2.hz=1", *words),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        memory = MemoryWatch(process.pid)
        memory.start()
        output, _ = process.communicate(timeout=seconds + 400)
    if process.returncode != 0:
        raise SystemExit(f"bench_run: the run ended with code {process.returncode}")
    report = json.loads(output)
    figures = {name: report.get(name) for name in FIGURES}
    figures["memory_bytes"] = sum(memory.peak.values())
    figures["memory_by_process"] = memory.peak
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--out", type=Path, default=results_file("run.json"))
    options = parser.parse_args()
    ways = {
        "ray_fifo": (),
        "processes_fifo": ("ray=false",),
        "processes_no_fifo": ("ray=false", *NO_FIFO),
    }
    result: dict[str, Any] = {
        "seconds": options.seconds,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
    }
    for name, words in ways.items():
        result[name] = run(options.seconds, options.config, words)
        print(name, json.dumps(result[name]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
