"""Runs a list of instructions on a control loop in sequence; the world judges success.

The step limit counts environment steps under the policy's control. Steps on which the robot
held still because the first latent of an instruction had not arrived are counted separately
(`hold_steps`), so that both can be reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from openhelix.runtime.control.journal import Journal
from openhelix.runtime.control.loop import ControlLoop, Tick
from openhelix.runtime.robots.base import RobotError, World


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
        self.journal = Journal()
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
        number = self._loop.begin(assignment.instruction)
        self.journal.add(
            self._loop.clock.now_ns(),
            "begun",
            assignment.instruction,
            task=assignment.task,
            instruction_id=number,
        )
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
        self.journal.add(
            self._loop.clock.now_ns(),
            "ended",
            reason,
            task=assignment.task,
            steps=self.steps,
            instruction_id=number,
            success=success if assignment.task else None,
        )
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
