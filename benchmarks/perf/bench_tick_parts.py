"""What the parts of a control tick cost, one by one, without inference.

A tick has 300 µs. Each part is called many times on made-up but full-size input (two RGB-D
cameras, 16-row chunks), after 10 ms of sleep, as in a run; the parts take turns in one run, so
that they can be compared on a busy machine. `before_action` is what lies between a deadline and
the action, `after_action` what the subscribers in the control process take then.

    python -m openhelix.benchmarks.perf.bench_tick_parts [--rounds 600] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from openhelix.benchmarks.perf.places import results_file
from openhelix.runtime.control.loop import Tick
from openhelix.runtime.control.plans import ChunkBuffer
from openhelix.runtime.control.realtime import enter, leave
from openhelix.runtime.control.talk import Journal
from openhelix.runtime.core.clock import FakeClock, Pacer
from openhelix.runtime.core.config import SafetyLimits
from openhelix.runtime.core.interfaces import Action, ActionChunk, CameraFrame, Observation
from openhelix.runtime.core.safety import SafetyFilter, SafetyState, Watchdog
from openhelix.runtime.observe.collectors import LoopMetrics
from openhelix.runtime.observe.ticks import TickMessage, TickPublisher
from openhelix.runtime.transport.wire import NewestReader, Publisher

PERIOD_NS = 33_333_333
REPLAN_TICKS = 8


def observation(t_ns: int, shade: int) -> Observation:
    """CALVIN's two RGB-D cameras (329 KB) and an arm that moves."""
    frames = {}
    for name, size in (("static", 200), ("gripper", 84)):
        rgb = np.full((size, size, 3), shade % 256, np.uint8)
        depth = np.ones((size, size), np.float32)
        frames[name] = CameraFrame(t_ns, rgb, depth, np.eye(3), np.eye(4))
    s = np.sin(shade / 30)
    pose = np.array([0.1 * s, -0.2 + 0.05 * s, 0.5, np.cos(s / 2), np.sin(s / 2), 0.0, 0.0])
    return Observation(t_ns, frames, pose, 0.05, True, np.zeros(7))


class Parts:
    """The parts of one control loop, fed by hand."""

    def __init__(self, folder: Path) -> None:
        self.clock = FakeClock()
        self.chunks, self.limits = ChunkBuffer(), SafetyFilter()
        self.watchdog = Watchdog(SafetyLimits(), ("static", "gripper"))
        self.safety, self.pacer = SafetyState(), Pacer(self.clock, PERIOD_NS)
        self.watchdog.arm(self.clock.now_ns())
        loop: Any = SimpleNamespace(planner=SimpleNamespace(latencies_s=deque(maxlen=64)))
        self.metrics = LoopMetrics(loop, self.pacer)
        episode_runner: Any = SimpleNamespace(
            current=None, results=[], steps=0, succeeded=0, journal=Journal()
        )
        self.actions = Publisher(f"ipc://{folder}/actions", "actions")
        self.ticks = Publisher(f"ipc://{folder}/ticks", "ticks")
        self.stream = TickPublisher(self.ticks, episode_runner)
        # Somebody has to listen, or nothing is sent at all.
        self.readers: list[NewestReader[Any]] = [
            NewestReader(f"ipc://{folder}/actions", "actions", Action),
            NewestReader(f"ipc://{folder}/ticks", "ticks", TickMessage),
        ]
        self.sent: Action | None = None
        self.took: dict[str, list[int]] = {}

    def timed(self, name: str, call: Callable[[], Any]) -> Any:
        """Call, and keep how long it took."""
        start = time.perf_counter_ns()
        result = call()
        self.took.setdefault(name, []).append(time.perf_counter_ns() - start)
        return result

    def tick(self, index: int) -> None:
        """One tick's worth of every part."""
        self.clock.advance(PERIOD_NS)
        now, timed = self.clock.now_ns(), self.timed
        seen = observation(now, index)
        timed("watchdog", lambda: self._watch(seen, now))
        if index % REPLAN_TICKS == 0:
            rows = np.tile(seen.tcp_pose, (16, 1))
            rows[:, 0] += np.linspace(0, 0.1, 16)
            start = now - 4 * PERIOD_NS  # as late as a slow System 1
            chunk = ActionChunk(start, PERIOD_NS, rows, np.ones(16), 0, t_obs_ns=start)
            timed("chunk_put", lambda: self.chunks.put(chunk, now))
        target = timed("chunk_sample", lambda: self.chunks.sample(now + PERIOD_NS // 2))
        timed("stop_machine", lambda: self.safety.update(None, ""))
        reference = self.sent if self.sent is not None else seen.tcp_pose
        assert target is not None
        self.sent = timed("limits", lambda: self.limits.limit(target, reference, 1 / 30))
        sent = self.sent
        timed("send", lambda: self.actions.send(sent))
        tick = Tick(index, now, seen, "run", "", sent, None, None, 0.3, 1e-4)
        timed("metrics", lambda: self.metrics(tick))
        timed("stream", lambda: self.stream(tick))
        for reader in self.readers:
            reader.poll()
        time.sleep(0.01)

    def _watch(self, seen: Observation, now: int) -> None:
        self.watchdog.saw("proprioception", seen.t_ns, now)
        self.watchdog.saw("latent", now, now)
        for name, frame in seen.frames.items():
            self.watchdog.saw_frame(name, frame, seen.tcp_pose, now)
        self.watchdog.check(now)

    def close(self) -> None:
        self.actions.close()
        self.ticks.close()
        for reader in self.readers:
            reader.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=600)
    default = results_file("tick_parts.json")
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(Path(folder))
        status = enter()
        try:
            for index in range(arguments.rounds):
                parts.tick(index)
        finally:
            leave(status)
            parts.close()
    rows: dict[str, dict[str, float]] = {
        name: {
            "p50_us": float(np.percentile(t, 50)) / 1e3,
            "p99_us": float(np.percentile(t, 99)) / 1e3,
        }
        for name, t in parts.took.items()
    }
    rows["chunk_put"] |= {"every_ticks": REPLAN_TICKS}
    after = ("metrics", "stream")
    spent_us = {name: row["p50_us"] / row.get("every_ticks", 1) for name, row in rows.items()}
    result = {
        "rounds": arguments.rounds,
        "parts": rows,
        "before_action_p50_us": sum(us for name, us in spent_us.items() if name not in after),
        "after_action_p50_us": sum(spent_us[name] for name in after),
        "sched_fifo": status.fifo,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
