"""The whole system for a minute: deadlines, lateness, cost of a tick, start, memory, processor time.

Runs `openhelix run` as a user does (all processes, both systems, the simulator and its
cameras), one long instruction, and reads the figures from its own report and from the processes'
proportional set sizes and processor time. The ways: with Ray and SCHED_FIFO, without Ray, without
SCHED_FIFO, at 200 Hz, and at 30 Hz beside a load on every core (`stress-ng --cpu 2 --vm 1`; where it
is not installed, Python processes that do the same).

    python -m openhelix.benchmarks.perf.bench_run [--seconds 60] [--only WAY,...]
        [--config configs/run.yaml] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

import psutil

from openhelix.benchmarks.perf.places import CONFIG, results_file

# No SCHED_FIFO anywhere, as on a machine that does not grant it.
NO_FIFO = (
    "control.fifo_priority=0",
    "control.placement={cpus: 0.5, threads: 1, fifo: 0}",
    "world.placement={cpus: 0.3, fifo: 0}",
)
STRESS = ("stress-ng", "--cpu", "2", "--vm", "1", "--quiet")
BUSY = "while True: pass"
TOUCHING = "b = bytearray(1 << 28)\nwhile True:\n    b[::4096] = bytes(len(b) // 4096)"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the system.

    Attributes:
        words: of the configuration.
        hz: of the control loop; System 1 plans as often as at 30 Hz.
        stress: whether every core has other work.
        cluster: whether Ray runs already.
    """

    words: tuple[str, ...] = ()
    hz: float = 30.0
    stress: bool = False
    cluster: bool = False


WAYS = {
    "ray_fifo": Way(),
    "ray_running": Way(cluster=True),
    "processes_fifo": Way(("ray=false",)),
    "processes_no_fifo": Way(("ray=false", *NO_FIFO)),
    "processes_200_hz": Way(("ray=false", "system1.replan_steps=27"), hz=200.0),
    "processes_loaded": Way(("ray=false",), stress=True),
}
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
    "startup",
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


class Usage(threading.Thread):
    """Samples the tree's memory and processor time every two seconds.

    Attributes:
        peak: memory by process when it was most in all.
        cpu_s: processor time by process, as last seen.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self.peak: dict[str, int] = {}
        self.cpu_s: dict[str, float] = {}

    def run(self) -> None:
        while self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE:
            try:
                now, cpu_s = pss_bytes(self._root), cpu_seconds(self._root)
            except psutil.Error:
                return
            if sum(now.values()) > sum(self.peak.values()):
                self.peak = now
            # A process that has ended is not in the tree any more; what it used was used.
            self.cpu_s = {
                name: max(self.cpu_s.get(name, 0.0), cpu_s.get(name, 0.0))
                for name in self.cpu_s | cpu_s
            }
            time.sleep(2.0)


def cpu_seconds(root: psutil.Process) -> dict[str, float]:
    """Processor time of a process tree, by process."""
    total: dict[str, float] = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            times, name = process.cpu_times(), _name(process)
        except psutil.Error:
            continue
        total[name] = total.get(name, 0.0) + times.user + times.system
    return {name: round(value, 2) for name, value in total.items()}


@contextmanager
def loaded() -> Iterator[str]:
    """Keep two cores and the memory busy while the block runs; gives what does."""
    there = which(STRESS[0]) is not None
    python = [[sys.executable, "-c", code] for code in (BUSY, BUSY, TOUCHING)]
    commands = [list(STRESS)] if there else python
    running = [subprocess.Popen(command) for command in commands]
    try:
        yield (
            " ".join(STRESS) if there else "two Python processes that count, one that fills memory"
        )
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(10.0)


@contextmanager
def cluster(token: Mapping[str, str]) -> Iterator[str]:
    """Have a Ray of one host run while the block does; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = f"start --head --port={address.split(':')[1]} --num-cpus=8 --include-dashboard=false"
    ray = [str(Path(sys.executable).with_name("ray")), *words.split(), "--disable-usage-stats"]
    running = subprocess.Popen(
        [*ray, "--node-ip-address=127.0.0.1", "--block"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **token},
    )
    try:
        assert running.stdout is not None
        for line in running.stdout:
            if "--block" in line:  # it is up
                break
        else:
            raise SystemExit("bench_run: `ray start` ended before Ray was up")
        yield address
    finally:
        running.terminate()
        running.wait(30.0)


def await_loop(folder: Path, process: subprocess.Popen[str]) -> None:
    """Return when the control loop of a run in `folder` has started, or its process has ended."""
    while process.poll() is None:
        if any("the loop starts" in log.read_text() for log in folder.glob("*/logs/control.log")):
            return
        time.sleep(0.2)


def run(seconds: float, config: Path, way: Way) -> dict[str, Any]:
    """One run; its figures."""
    steps = round(seconds * way.hz)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        beside, words, token = None, list(way.words), dict[str, str]()
        if way.cluster:
            token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            words.append(f"ray_address={stack.enter_context(cluster(token))}")
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
                *("output.metrics_port=0", "output.video=false", "system2.hz=1"),
                *(f"control.hz={way.hz:g}", *words),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **token},
        )
        usage = Usage(process.pid)
        usage.start()
        if way.stress:
            await_loop(Path(folder), process)
            beside = stack.enter_context(loaded())
        output, _ = process.communicate(timeout=seconds + 600)
    if process.returncode != 0:
        raise SystemExit(f"bench_run: the run ended with code {process.returncode}")
    report = json.loads(output)
    figures = {name: report.get(name) for name in FIGURES}
    figures["beside"] = beside
    figures["memory_bytes"] = sum(usage.peak.values())
    figures["memory_by_process"] = usage.peak
    figures["cpu_s_by_process"] = usage.cpu_s
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--only", default=",".join(WAYS), help="some of the ways")
    parser.add_argument("--out", type=Path, default=results_file("run.json"))
    options = parser.parse_args()
    names = options.only.split(",")
    for name in names:
        if name not in WAYS:
            parser.error(f"--only: {name!r} is none of {', '.join(WAYS)}")
    result: dict[str, Any] = {
        "seconds": options.seconds,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
    }
    for name in names:
        result[name] = run(options.seconds, options.config, WAYS[name])
        print(name, json.dumps(result[name]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
