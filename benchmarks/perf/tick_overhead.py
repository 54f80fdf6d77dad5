"""What metrics and recording cost a control tick, measured in turns within one run.

The control node of a real graph runs in this process, its neighbours (PlayTable's world and
cameras, a small System 1 and System 2, an observer that records) in theirs. Turns of a second
with nothing, with metrics, with the tick stream that recordings are made of, and with both
follow one another in blocks of four, shuffled anew in each, so that all ways see the same
machine. What a way costs is the difference to "nothing" of the same block, with the 95 %
95 % interval over the blocks. Two times are kept of every tick: until the action is sent,
which subscribers must not lengthen, and until the last subscriber has been notified.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openhelix.benchmarks.evaluation.stats import paired_by_start
from openhelix.runtime.control.loop import Tick
from openhelix.runtime.core.config import load
from openhelix.runtime.launch.graph import Graph
from openhelix.runtime.launch.parts import ControlProcess
from openhelix.runtime.launch.processes import ProcessHost
from openhelix.runtime.observe.collectors import LoopMetrics
from openhelix.runtime.observe.ticks import TickPublisher
from openhelix.runtime.transport.rpc import RpcClient

TURN_TICKS = 30
WAYS: dict[str, tuple[type, ...]] = {
    "nothing": (),
    "metrics": (LoopMetrics,),
    "recording": (TickPublisher,),
    "both": (LoopMetrics, TickPublisher),
}
SMALL = (
    "system2.engine={target: 'openhelix.runtime.robots.fake:PointEngine', options: {}}",
    "system1.policy={target: 'tests.fakes:ReachPolicy', "
    "options: {cameras: [[static, 200, 200], [gripper, 84, 84]], speed_m: 0.0005}}",
    *("ray=false", "output.metrics_port=0", "output.video=false", "output.record=true"),
    "tasks.steps_limit=1000000",
)
Row = tuple[float, float, float]  # of a tick, us: all of it, its CPU time, until the action
Block = dict[str, list[Row]]  # by way
SCRAPER = """
import sys, urllib.request
for line in sys.stdin:
    urllib.request.urlopen(line.strip(), timeout=5).read()
"""


class Switched:
    """A subscriber that is told only in the turns that have it."""

    def __init__(self, part: Callable[[Tick], None]) -> None:
        self.part, self.on = part, True

    def __call__(self, tick: Tick) -> None:
        if self.on:
            self.part(tick)


class Turns:
    """Takes the place of the loop's `tick` and keeps what each one took, by way."""

    def __init__(self, node: ControlProcess) -> None:
        assert node.stack is not None
        self._loop = node.stack.loop
        self._tick = self._loop.tick
        self._url = str(node.health()["metrics_url"])
        self._switched = [Switched(part) for part in self._loop.subscribers]
        self._loop.subscribers[:] = self._switched
        setattr(self._loop, "tick", self)  # noqa: B010  the instance's, not the class's
        self._scraper = subprocess.Popen(
            [sys.executable, "-c", SCRAPER], stdin=subprocess.PIPE, text=True
        )
        self.blocks: list[Block] = []
        self._order, self._random = list(WAYS), random.Random(0)
        self._count = 0

    def __call__(self) -> Tick:
        turn, place = divmod(self._count, TURN_TICKS)
        number = turn % len(WAYS)
        self._count += 1
        if place == 0:
            if number == 0:
                self._random.shuffle(self._order)
                self.blocks.append({way: [] for way in WAYS})
            self._switch(WAYS[self._order[number]])
        cpu_ns, wall_ns = time.thread_time_ns(), time.perf_counter_ns()
        tick = self._tick()
        wall_ns = time.perf_counter_ns() - wall_ns
        cpu_ns = time.thread_time_ns() - cpu_ns
        if place > 0 and tick.state == "run":  # the first tick of a turn finds cold caches
            row = (wall_ns * 1e-3, cpu_ns * 1e-3, tick.duration_s * 1e6)
            self.blocks[-1][self._order[number]].append(row)
        return tick

    def _switch(self, kinds: tuple[type, ...]) -> None:
        for switched in self._switched:
            kind = type(switched.part)
            switched.on = kind in kinds or kind not in (LoopMetrics, TickPublisher)
        if LoopMetrics in kinds and self._scraper.stdin is not None:
            self._scraper.stdin.write(self._url + "\n")
            self._scraper.stdin.flush()

    def close(self) -> None:
        self._scraper.terminate()
        self._scraper.wait()


def overhead(seconds: float) -> dict[str, Any]:
    """Run the loop for a while; return what each way costs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = load(None, SMALL)
        job = {"assignments": [{"task": "", "instruction": "reach 0.3 0.1 0.7"}], "initial": None}
        graph = Graph(config, job, folder)
        others = [spec for spec in graph.specs if spec.name != "control"]
        control = next(spec for spec in graph.specs if spec.name == "control")
        host = ProcessHost(folder / "logs")
        node = ControlProcess(**control.options)
        stop = threading.Event()
        try:
            host.start(others)
            node.setup()
            turns = Turns(node)
            node.handlers()["start"]({"latent_spec": _latent_spec(graph)})
            timer = threading.Timer(seconds, stop.set)
            timer.start()
            node.run(stop)
            turns.close()
            granted = node.handlers()["report"]({})["realtime"]["fifo"]
        finally:
            node.close()
            host.close()
            graph.close()
    return summary(turns.blocks, config.control.hz) | {"sched_fifo": granted}


def _latent_spec(graph: Graph) -> dict[str, Any]:
    client = RpcClient(graph.endpoints.control["system2"])
    try:
        while (health := client.call("health", {}, 60.0))["state"] != "ready":
            time.sleep(0.1)
        return dict(health["latent_spec"])
    finally:
        client.close()


def summary(blocks: Sequence[Block], hz: float) -> dict[str, Any]:
    """Return what each way costs a tick; blocks in which a way has few ticks are left out.

    Raises:
        ValueError: fewer than two blocks are whole.
    """
    whole = [b for b in blocks if all(len(rows) >= TURN_TICKS // 2 for rows in b.values())]
    if len(whole) < 2:
        raise ValueError(f"--overhead-seconds: {len(whole)} whole blocks of turns, need 2 or more")
    period_us = 1e6 / hz
    ways: dict[str, Any] = {}
    for way in WAYS:
        wall, cpu, to_action = np.concatenate([b[way] for b in whole]).T
        ways[way] = {
            "ticks": len(wall),
            "tick_us": _figures(wall),
            "tick_cpu_us": _figures(cpu),
            "to_action_us": _figures(to_action),
        }
        if way != "nothing":
            extra = _extra(whole, way, 0, np.mean)
            tick_us = ways["nothing"]["tick_us"]["mean"]
            ways[way] |= {
                "extra_us": extra,
                "extra_median_us": _extra(whole, way, 0, np.median),
                "extra_cpu_us": _extra(whole, way, 1, np.mean),
                "action_later_us": _extra(whole, way, 2, np.mean),
                "percent_of_period": {k: 100 * v / period_us for k, v in extra.items()},
                "percent_of_tick": {k: 100 * v / tick_us for k, v in extra.items()},
            }
    return {"turn_ticks": TURN_TICKS, "blocks": len(whole), "period_us": period_us, "ways": ways}


def _extra(
    blocks: Sequence[Block], way: str, column: int, of: Callable[[Any], Any]
) -> dict[str, float]:
    """Return a way's turns minus "nothing" of the same blocks, with the interval of the mean."""
    first, second = (
        [float(of(np.asarray(block[name])[:, column])) for block in blocks]
        for name in ("nothing", way)
    )
    paired = paired_by_start(first, second)
    return {"mean": paired.difference, "from": paired.ci95[0], "to": paired.ci95[1]}


def _figures(values: Any) -> dict[str, float]:
    return {
        "p50": float(np.percentile(values, 50)),
        "p99": float(np.percentile(values, 99)),
        "mean": float(np.mean(values)),
    }
