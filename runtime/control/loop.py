"""The control loop: observe, condition, act, apply, notify.

A tick never waits: it reads the robot's newest state, takes the newest latent and chunk if they
have arrived, and samples, limits and sends one target. System 1 and System 2 run beside it.
Logging, recording and viewing are subscribers, never `if`s in here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from openhelix.runtime.control.goals import Goals, refused
from openhelix.runtime.control.plans import ChunkBuffer, Planner
from openhelix.runtime.core.clock import Clock
from openhelix.runtime.core.interfaces import Action, ActionChunk, LatentGoal, Observation
from openhelix.runtime.core.safety import Mode, SafetyFilter, SafetyState, Watchdog
from openhelix.runtime.robots.base import Robot, RobotError

State = Literal["wait", "run", "hold", "stop"]
Order = Literal["", "told_to_wait", "told_to_stop", "nothing_to_do"]
_STATES: dict[Mode, State] = {Mode.RUN: "run", Mode.HOLD: "hold", Mode.STOP: "stop"}


@dataclass(frozen=True, slots=True)
class Tick:
    """What happened in one tick, as subscribers are told."""

    index: int
    t_ns: int
    observation: Observation
    state: State  # wait: no plan yet for this instruction; run: a planned target was sent
    reason: str  # why it is not running
    sent: Action
    new_latent: LatentGoal | None
    new_chunk: ActionChunk | None
    latent_age_s: float | None  # of the newest latent of this instruction
    duration_s: float  # the tick's own work
    refused_chunk: ActionChunk | None = None  # has arrived and is not followed: late, stale, void
    understood: float | None = None  # how probably the instruction names a task; None: not judged


Subscriber = Callable[[Tick], None]


class ControlLoop:
    """Joins one robot, System 1 and System 2.

    Args:
        robot: connected; gives observations, takes targets.
        goals: where latents come from; None for a policy without System 2.
        planner: System 1, beside the loop or inside the tick.
        chunks: the plan on its time line.
        limits: bounds every target before it is sent.
        watchdog: knows the age of every source and what is too old.
        safety: turns its findings into run, hold or stop.
        clock: whose time this is.
        period_ns: one control period.
        seed: of the policy's randomness; every instruction draws from a stream of its own.
        subscribers: told of every tick, after the action is sent.
    """

    def __init__(
        self,
        robot: Robot,
        goals: Goals | None,
        planner: Planner,
        chunks: ChunkBuffer,
        limits: SafetyFilter,
        watchdog: Watchdog,
        safety: SafetyState,
        clock: Clock,
        period_ns: int,
        seed: int = 0,
        subscribers: Sequence[Subscriber] = (),
    ) -> None:
        self.robot, self.goals, self.planner = robot, goals, planner
        self.chunks, self.limits = chunks, limits
        self.watchdog, self.safety = watchdog, safety
        self.clock, self.period_ns, self.seed = clock, period_ns, seed
        self.subscribers = list(subscribers)
        self.instruction_id = 0
        self.ticks = 0
        self.prefetch_s = 0.0  # what the last prefetch took
        self._last: Action | None = None
        self._planned = False  # this instruction has had a plan
        self.order: Order = ""  # keeps the robot still, whatever is planned
        self._resting = False  # it follows no instruction
        self._standing = False  # the robot was told to stop
        self._believed = True  # what the robot showed last is of the time that it says

    @property
    def stopped(self) -> bool:
        """Whether the robot stands stopped for good."""
        return self.safety.stop is not None and self.safety.stop.latched

    @property
    def understood(self) -> float | None:
        """How probably the current instruction names a task; None where nobody judges, or yet has."""
        newest = None if self.goals is None else self.goals.newest
        return None if newest is None or newest.understood >= 1.0 else newest.understood

    @property
    def reason(self) -> str:
        """Why the robot does not move, with what a person can do about it; empty if it does."""
        reason, late_s = self.safety.reason, self.chunks.late_s
        if late_s is None or reason != "plan too late":
            return reason
        return (
            f"{reason}: the newest plan came {late_s:.2f} s after its own end; the policy needs a "
            "longer horizon, or less time for a plan"
        )

    def arm(self) -> None:
        """Call once before the first tick: every source counts as seen now."""
        self.watchdog.arm(self.clock.now_ns())
        self.limits.rest()
        self._last = None

    def begin(self, instruction: str) -> int:
        """Follow a new instruction: what belonged to the old one is void. Returns its number."""
        self.instruction_id += 1
        self._planned, self._resting, self.order = False, False, ""
        self.watchdog.expect_latent(self.clock.now_ns())
        if self.goals is not None:
            self.goals.begin(self.instruction_id, instruction)
        self.planner.reset(self.seed + self.instruction_id)
        self.chunks.void(self.instruction_id)
        return self.instruction_id

    def rest(self) -> None:
        """Follow nothing: the robot holds still and neither system is asked."""
        self.instruction_id += 1
        self._planned, self._resting = False, True
        self.order = self.order if self.order == "told_to_stop" else "nothing_to_do"
        self.chunks.void(self.instruction_id)

    def tick(self) -> Tick:
        """Do one control period's work and tell the subscribers."""
        start_s = time.perf_counter()
        now_ns = self.clock.now_ns()
        observation = self.observe()
        latent = self.condition(observation, now_ns)
        chunk, refused = self.plan(observation, now_ns)
        state, target = self.decide(now_ns)
        sent = self.apply(state, target, observation, now_ns)
        self.ticks += 1
        tick = Tick(
            index=self.ticks,
            t_ns=now_ns,
            observation=observation,
            state=state,
            reason=self.reason,
            sent=sent,
            new_latent=latent,
            new_chunk=chunk,
            latent_age_s=self._latent_age_s(now_ns),
            duration_s=time.perf_counter() - start_s,
            refused_chunk=refused,
            understood=self.understood,
        )
        for subscriber in self.subscribers:
            subscriber(tick)
        return tick

    def prefetch(self) -> None:
        """Take in what has arrived, in the time before a tick, and rehearse the tick's arithmetic.

        While the loop slept, others' work has thrown its code and data out of this core's
        caches; done once for nothing, the same steps take half as long a moment later.
        """
        start_s = time.perf_counter()
        self.robot.prefetch()
        if self._last is not None:
            self.chunks.rehearse(self._last.t_ns)
            self.limits.rehearse(self._last, self.period_ns * 1e-9)
        self.prefetch_s = time.perf_counter() - start_s

    def fail(self, why: str) -> str:
        """The robot does not answer: stop it for good. Returns the reason."""
        self.safety.trip("robot_error", why)
        self.robot.stop(self.safety.reason)
        return self.safety.reason

    def observe(self) -> Observation:
        """Read the robot's newest state, stamped with the instruction it is seen under.

        What is stamped in the future, or is no picture of its camera, is shown to neither system:
        the next one would not be due before that time.

        Raises:
            RobotError: the robot does not answer, or not with a pose.
        """
        seen = self.robot.get_observation()
        if not isfinite(seen.tcp_pose.sum()):
            raise RobotError("where the robot is, it says in numbers that are not finite")
        # Spelt out: `dataclasses.replace` takes five times as long.
        observation = Observation(
            seen.t_ns,
            seen.frames,
            seen.tcp_pose,
            seen.gripper_width,
            seen.gripper_open,
            seen.joints,
            self.instruction_id,
        )
        now_ns = self.clock.now_ns()
        believed = self.watchdog.saw("proprioception", observation.t_ns, now_ns)
        for name in self.watchdog.cameras:
            frame = observation.frames.get(name)
            if frame is not None:
                believed &= self.watchdog.saw_frame(name, frame, observation.tcp_pose, now_ns)
        self._believed = believed
        return observation

    def condition(self, observation: Observation, now_ns: int) -> LatentGoal | None:
        """Offer the newest image to System 2; return a latent that has just arrived.

        When it says that the instruction is not understood, the plan is void, and so is what
        System 1 is still making of an earlier latent.
        """
        if self.goals is None:
            return None
        if self._resting:
            self.watchdog.expect_latent(now_ns)  # none is due
            return None
        if not self._believed:
            return None
        acted = not refused(self.goals)
        latent = self.goals.update(observation, now_ns)
        if acted and refused(self.goals):
            self.chunks.void(self.instruction_id, from_ns=now_ns)
            self.planner.reset(self.seed + self.instruction_id)
        if self.goals.mismatch:
            self.watchdog.saw_mismatch(self.goals.mismatch)
        if latent is not None:
            self.watchdog.saw("latent", latent.t_obs_ns, now_ns)
        return latent

    def plan(
        self, observation: Observation, now_ns: int
    ) -> tuple[ActionChunk | None, ActionChunk | None]:
        """Offer System 1 its input once there is a latent; join a finished chunk.

        Returns:
            The chunk if it was joined, and the chunk if it was refused; see `ChunkBuffer.put`.
        """
        if self._resting:
            return None, None
        # First what has come, or a System 1 that is free again would wait a tick for its next
        # input; then again, for one that answers at once.
        chunk = self.planner.poll(now_ns)
        if self._believed and (self.goals is None or self.goals.recent):
            self.planner.offer(observation, tuple(self.goals.recent) if self.goals else ())
        chunk = chunk or self.planner.poll(now_ns)
        if chunk is None:
            return None, None
        held = observation.tcp_pose if self._last is None else self._last.pose
        if not self.chunks.put(chunk, now_ns, held):
            return None, chunk
        self._planned = True
        return chunk, None

    def decide(self, now_ns: int) -> tuple[State, Action | None]:
        """Return what to do, and the planned target for the end of this period."""
        target = self.chunks.sample(now_ns + self.period_ns)
        hold = ""
        unclear = refused(self.goals)
        if unclear:
            hold = "not_understood"
        elif target is None:
            hold = "chunk_ran_out" if self._planned else "first_plan_due"
            if self.chunks.late_s is not None:
                hold = "plan_too_late"
        mode = self.safety.update(self.watchdog.check(now_ns), self.order or hold)
        if mode is Mode.HOLD and self.order == "told_to_stop":
            return "stop", None
        if mode is Mode.HOLD and not self._planned and not unclear:
            return "wait", None
        return _STATES[mode], target if mode is Mode.RUN else None

    def apply(
        self, state: State, target: Action | None, observation: Observation, now_ns: int
    ) -> Action:
        """Limit and send the target, or hold; a stopped robot is left to its own standstill."""
        if state == "stop":
            return self._stand(observation, now_ns)
        self._standing = False
        if target is None:
            target = self.robot.hold_action(self._last)
        reference = self._last if self._last is not None else observation.tcp_pose
        safe = self.limits.limit(target, reference, self.period_ns * 1e-9)
        due_ns = now_ns + self.period_ns
        if (
            safe.t_ns != due_ns or safe.instruction_id != self.instruction_id
        ):  # a hold, and not of this tick
            safe = Action(safe.pose, safe.gripper, self.instruction_id, safe.info, due_ns)
        self._last = self.robot.send_action(safe)
        return self._last

    def _stand(self, observation: Observation, now_ns: int) -> Action:
        """Stop the robot, once; if work resumes, it does so from where the arm then is.

        What was seen before the stop counts no more: work resumes with a latent of later.
        """
        if not self._standing:
            self.robot.stop(self.safety.reason)
            self.limits.rest()
            self._standing, self._last = True, None
            self.chunks.void(self.instruction_id, from_ns=now_ns)
            self.planner.reset(self.seed + self.instruction_id)
            if self.goals is not None:
                self.goals.forget(now_ns)
            self._planned = False
        return Action(observation.tcp_pose, float(observation.gripper_open), self.instruction_id)

    def _latent_age_s(self, now_ns: int) -> float | None:
        if self.goals is None or self._resting or not self.goals.recent:
            return None
        return self.goals.recent[-1].age_s(now_ns)
