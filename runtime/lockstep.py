"""A run on the deterministic clock: one process, time counted in environment steps.

Same loop, same policy, same System 2; only the clock moves when it is slept on. The same
seed gives the same report on any machine (figures that measure this machine aside).
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.assembly import Rig, build_rig, lockstep_goals, make, make_clock, replan_ns
from runtime.config import RunConfig
from runtime.director import Assignment
from runtime.display import Display
from runtime.interfaces import Policy
from runtime.interrupts import interruptible
from runtime.loop import Tick
from runtime.planner import SyncPlanner
from runtime.report import percentiles, task_rows, versions
from runtime.robots.base import World, make_robot
from runtime.statistics import LoopStatistics
from runtime.subscribers import Subscribers


def run_lockstep(
    config: RunConfig,
    assignments: Sequence[Assignment],
    initial: dict[str, Any] | None,
    folder: Path,
    display: Display,
) -> dict[str, Any]:
    """Run in this process; return the report."""
    started_s = time.monotonic()
    display.say("loading System 1 and System 2")
    clock = make_clock(config)
    policy: Policy = make(config.system1.policy)
    name, options = _embedded(config, clock)
    robot = make_robot(name, **options)
    robot.connect()
    goals = None
    if policy.spec.latent is not None:
        goals = lockstep_goals(config, make(config.system2.engine), policy.spec.latent)
    planner = SyncPlanner(policy, replan_ns(config))
    rig = build_rig(config, robot, policy.spec, planner, goals, clock)
    subscribers = Subscribers(config, folder, rig)
    statistics = subscribers.statistics
    rig.loop.subscribers.append(_Progress(rig, statistics, config, display))
    try:
        with interruptible() as interrupted, display:
            if initial is not None and isinstance(robot, World):
                robot.reset_world(initial["robot_obs"], initial["scene_obs"])
            ready_s = time.monotonic() - started_s
            rig.loop.arm()
            rig.director.run(assignments, interrupted.is_set)
            display.progress(task_rows(rig.director.results), config.tasks.steps_limit)
    finally:
        robot.stop("the run has ended")
        subscribers.close()
        rig.close()
        robot.disconnect()
    return _report(config, rig, statistics) | {"ready_s": ready_s, "sinks": subscribers.close()}


def _embedded(config: RunConfig, clock: object) -> tuple[str, dict[str, Any]]:
    """The driver that steps a world inside this process, in place of the real-time one."""
    options = dict(config.robot.options) | {"clock": clock}
    if config.robot.name != "sim":
        return config.robot.name, options
    return "playtable", options | {
        "scene": config.world.scene,
        "cameras": config.world.cameras,
    }


class _Progress:
    """A subscriber that tells the display, at most a few times a second."""

    def __init__(
        self, rig: Rig, statistics: LoopStatistics, config: RunConfig, display: Display
    ) -> None:
        self._rig, self._statistics = rig, statistics
        self._limit, self._display = config.tasks.steps_limit, display
        self._next_s = 0.0

    def __call__(self, tick: Tick) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + 0.2
        director = self._rig.director
        current = director.current
        health = task_rows(director.results) | self._statistics.live()
        health["instruction"] = current.instruction if current else ""
        self._display.progress(health | {"steps": director.steps}, self._limit)


def _report(config: RunConfig, rig: Rig, statistics: LoopStatistics) -> dict[str, Any]:
    goals = rig.loop.goals
    lateness = rig.pacer.summary()
    return {
        "clock": "lockstep",
        "hz2": config.system2.hz,
        "interval_steps": config.interval_steps,
        "latency_steps": config.lockstep.latency_steps,
        "steps_limit": config.tasks.steps_limit,
        **task_rows(rig.director.results),
        **statistics.report(),
        "deadline_missed": lateness.missed,
        "tick_lateness_s": lateness.as_seconds(),
        "latents_published": goals.received + goals.void if goals else 0,
        "latents_missed": goals.missed if goals else 0,
        "s1_latency_s": percentiles(rig.loop.planner.latencies_s, ("p50", "p99")),
        "s2_latency_s": percentiles(goals.latencies_s if goals else (), ("p50", "p99")),
        "stopped": str(rig.loop.machine.stop) if rig.loop.stopped else None,
        "safe_stops": dict(rig.loop.machine.stops),
        "device": platform.machine(),
        "versions": versions(),
        "seed": config.seed,
    }
