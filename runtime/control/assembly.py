"""Builds a control loop from a configuration; the one place where its parts are put together.

Both clocks use the same classes and differ only in four of them: the clock, the planner and
the goals (other processes, or inside the tick), and the robot.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openhelix.runtime.control.episodes import EpisodeRunner
from openhelix.runtime.control.gate import SHIPPED, Gate, LearnedTrigger
from openhelix.runtime.control.goals import Goals, LockstepGoals, WireGoals
from openhelix.runtime.control.loop import ControlLoop
from openhelix.runtime.control.plans import (
    ChunkBuffer,
    Following,
    Planner,
    PlanReply,
    RemotePlanner,
    SyncPlanner,
)
from openhelix.runtime.control.trigger import ChangeTrigger, Trigger
from openhelix.runtime.core.clock import Clock, FakeClock, MonotonicClock, Pacer, using_the_slack
from openhelix.runtime.core.config import ConfigError, Part, RunConfig, SafetyLimits
from openhelix.runtime.core.interfaces import (
    Engine,
    LatentGoal,
    LatentSpec,
    Policy,
    PolicySpec,
    RobotSpec,
    SpecMismatch,
    check_latent,
    check_policy,
    check_robot,
)
from openhelix.runtime.core.plugins import resolve
from openhelix.runtime.core.safety import SafetyFilter, SafetyState, Watchdog
from openhelix.runtime.robots.base import Robot, World
from openhelix.runtime.transport.wire import NewestReader, Publisher

# System 2 takes the newest image when its deadline comes. How old that already is adds to the
# age of every latent, so more are offered than are used (bench_fleet measures what it brings).
IMAGES_A_LATENT = 5


@dataclass(frozen=True, slots=True)
class ControlStack:
    """A loop with all that belongs to it."""

    loop: ControlLoop
    pacer: Pacer
    episode_runner: EpisodeRunner

    def close(self) -> None:
        self.loop.planner.close()
        if self.loop.goals is not None:
            self.loop.goals.close()


def make(part: Part) -> Any:
    """Return `target(**options)`.

    Raises:
        ConfigError: the target does not take these options, or has random weights that nobody
            asked for.
        ResolveError: there is no such target.
    """
    target = resolve(part.target)
    try:
        inspect.signature(target).bind(**part.options)
    except TypeError as error:
        raise ConfigError(f"options of {part.target}: {error}") from None
    made = target(**part.options)
    if getattr(made, "untrained", False) and not part.options.get("untrained"):
        made.close()
        raise ConfigError(
            f"{part.target}: its weights are random; name trained ones "
            "(system2.engine.options.latent_projector=FILE, which `openhelix train` writes), or "
            "say system2.engine.options.untrained=true"
        )
    return made


def make_policy(part: Part) -> Policy:
    """Return the System 1 that a configuration names.

    Raises:
        SpecMismatch: what was made has not the verbs of a policy.
        ConfigError, ResolveError: see `make`.
    """
    made = make(part)
    check_policy(made, f"system1.policy.target: {part.target}")
    policy: Policy = made
    return policy


def period_ns(config: RunConfig) -> int:
    """One control period."""
    return round(1e9 / config.control.hz)


def replan_ns(config: RunConfig) -> int:
    """Time from one chunk's observation to the next one's."""
    return config.system1.replan_steps * period_ns(config)


def freshness(config: RunConfig) -> SafetyLimits:
    """Return the limits with a maximum latent age that System 2's own cadence can keep.

    At a slow cadence a latent is a period old before the next is even due.
    """
    slowest_s = 2.5 * config.system2.longest_s
    if config.control.clock == "lockstep" and config.system2.trigger == "cadence":
        steps = 2.5 * config.interval_steps + config.lockstep.latency_steps
        slowest_s = steps / config.control.hz
    limits = config.safety
    return replace(limits, latent_max_age_s=max(limits.latent_max_age_s, slowest_s))


def check_parts(config: RunConfig, robot: RobotSpec, policy: PolicySpec) -> None:
    """Raise SpecMismatch unless the robot gives what System 1 and System 2 look at."""
    if robot.action.hz == config.control.hz < policy.action.hz:
        raise SpecMismatch(
            f"control.hz: {config.control.hz:g}, must be at least {policy.action.hz:g}, the rate of "
            "this policy's plans"
        )
    check_robot(robot, policy)
    if config.control.clock == "lockstep" and robot.action.hz != config.control.hz:
        raise SpecMismatch(
            f"control.hz: {config.control.hz:g}; on the lockstep clock this robot takes "
            f"{robot.action.hz:g}"
        )
    names = [camera.name for camera in robot.cameras]
    if policy.latent is not None and config.system2.camera not in names:
        raise SpecMismatch(
            f"system2.camera: {config.system2.camera!r}, the robot has "
            f"{', '.join(sorted(names)) or 'none'}"
        )
    trigger = config.system2.trigger
    if trigger != "cadence":
        seen = next((c for c in robot.cameras if c.name == config.system2.camera), None)
        if seen is not None and not seen.depth:
            raise SpecMismatch(
                f"system2.trigger: {trigger} needs depth, which camera {seen.name!r} does not give"
            )


def check_join(config: RunConfig, policy: PolicySpec) -> None:
    """Raise SpecMismatch unless the policy's chunks can be joined as the configuration says."""
    if policy.joins and config.system1.join not in policy.joins:
        raise SpecMismatch(
            f"system1.join: {config.system1.join!r}; this policy can {', '.join(policy.joins)}"
        )


def watched(config: RunConfig, policy: PolicySpec) -> tuple[str, ...]:
    """Return the cameras that System 1 or System 2 looks through: each must be alive."""
    names = [camera.name for camera in policy.cameras]
    if policy.latent is not None:
        names.append(config.system2.camera)
    return tuple(dict.fromkeys(names))


def build_stack(
    config: RunConfig,
    robot: Robot,
    spec: PolicySpec,
    planner: Planner,
    goals: Goals | None,
    clock: Clock,
) -> ControlStack:
    """Join the parts; `robot` is connected. Raises SpecMismatch when they do not fit."""
    check_parts(config, robot.spec, spec)
    check_join(config, spec)
    period = period_ns(config)
    chunks = ChunkBuffer(config.system1.blend_s, slow_after=config.system1.slow_after)
    if config.system1.join != "blend":
        planner.follow(Following(chunks, config.system1.join, spec.horizon, spec.action.hz))
    # A frame that is drawn when it is looked at is never stale, and looking would draw it.
    lively = not getattr(robot, "frames_on_demand", False)
    names = watched(config, spec) if lively else ()
    trigger = getattr(goals, "trigger", None)
    if isinstance(trigger, LearnedTrigger):
        trigger.follow(chunks)
    loop = ControlLoop(
        robot=robot,
        goals=goals,
        planner=planner,
        chunks=chunks,
        limits=SafetyFilter(config.safety),
        watchdog=Watchdog(freshness(config), names, use_latent=goals is not None),
        safety=SafetyState(),
        clock=clock,
        period_ns=period,
        seed=config.seed,
    )
    pacer = Pacer(clock, period)
    episode_runner = EpisodeRunner(
        loop=loop,
        world=robot if isinstance(robot, World) else None,
        steps_limit=config.tasks.steps_limit,
        stop_at_failure=config.tasks.stop_at_failure,
        count_holds=config.tasks.count_holds,
        wait=pacer.wait if isinstance(clock, FakeClock) else using_the_slack(pacer, loop.prefetch),
        hold_limit=round(config.control.hold_limit_s * config.control.hz),
    )
    return ControlStack(loop, pacer, episode_runner)


def request_interval_ns(hz: float, images: int = IMAGES_A_LATENT) -> int:
    """Return the time between two images that a robot offers to a System 2 of that rate."""
    return round(1e9 / (images * max(hz, 1.0)))


def wire_goals(config: RunConfig, requests: str, latents: str) -> WireGoals:
    """Return System 2 in another process, reached over two endpoints."""
    keys = str(config.transport.keys) if config.transport.keys else None
    robot = config.robot.id
    return WireGoals(
        sender=Publisher(requests, robot, bind=False, keys=keys, awaited=True),
        reader=NewestReader(latents, f"latents/{robot}", LatentGoal, keys=keys),
        robot=robot,
        camera=config.system2.camera,
        min_interval_ns=request_interval_ns(config.system2.hz),
        memory=config.system1.latent_memory,
        max_age_s=freshness(config).latent_max_age_s,
        trigger=make_trigger(config),
    )


def make_trigger(config: RunConfig) -> Trigger | None:
    """Return what decides when System 2 is asked; None for its cadence.

    Raises:
        ConfigError: the gate that it names cannot be used.
    """
    system2 = config.system2
    if system2.trigger == "cadence":
        return None
    when = (
        system2.camera,
        system2.trigger_floor_s,
        system2.trigger_ceiling_s,
        system2.trigger_base_m,
    )
    if system2.trigger == "change":
        return ChangeTrigger(*when)
    file = gate_file(config)
    return LearnedTrigger(*when, Gate.load(file), file)


def check_trigger(config: RunConfig, given: LatentSpec) -> None:
    """Raise SpecMismatch where what decides when to ask was fitted to another System 2."""
    trigger = make_trigger(config)
    if isinstance(trigger, LearnedTrigger):
        trigger.expect(given)


def gate_file(config: RunConfig) -> Path:
    """Return where the gate of `system2.trigger=learned` is."""
    named = config.system2.trigger_weights
    return SHIPPED if named is None else named.expanduser()


def remote_planner(config: RunConfig, plans: str, chunks: str) -> RemotePlanner:
    """Return System 1 in another process, reached over two endpoints."""
    keys = str(config.transport.keys) if config.transport.keys else None
    return RemotePlanner(
        Publisher(plans, "plans", bind=False, keys=keys),
        NewestReader(chunks, "chunks", PlanReply, keys=keys),
        replan_ns(config),
    )


def sync_planner(config: RunConfig, policy: Policy) -> SyncPlanner:
    """Return System 1 inside the tick, with the delay that the lockstep clock gives it.

    Raises:
        ConfigError: no chunk of this policy lasts as long as the delay.
    """
    delay = config.lockstep.plan_delay_steps
    check_delays("lockstep.plan_delay_steps", (delay,), config, policy.spec)
    return SyncPlanner(policy, replan_ns(config), delay * period_ns(config))


def check_delays(
    name: str, delays: Sequence[int], config: RunConfig, spec: PolicySpec | None
) -> None:
    """Refuse delays of plans, in control ticks, that no plan of a policy lasts for.

    Args:
        name: of the setting or option that says them.
        delays: of plans.
        config: its control rate counts.
        spec: the policy's; None, where no file says it, refuses none.

    Raises:
        ConfigError: one is as long as a plan, or longer.
    """
    if spec is None:
        return
    lasts = int(spec.horizon * 1e9 / (spec.action.hz * period_ns(config)))
    for delay in delays:
        if delay >= lasts:
            raise ConfigError(
                f"{name}: {delay}, must be 0 to {lasts - 1}; a plan of this policy lasts {lasts} steps"
            )


def lockstep_goals(config: RunConfig, engine: Engine, expected: LatentSpec) -> LockstepGoals:
    """Return System 2 on a schedule of environment steps."""
    check_latent(engine.spec, expected)
    return LockstepGoals(
        engine=engine,
        camera=config.system2.camera,
        interval=config.interval_steps,
        latency=config.lockstep.latency_steps,
        memory=config.system1.latent_memory,
        trigger=make_trigger(config),
    )


def make_clock(config: RunConfig) -> Clock:
    """Return the clock that the configuration names."""
    if config.control.clock == "lockstep":
        return FakeClock()
    return MonotonicClock(spin_ns=round(config.control.spin_us * 1000))
