"""Runs one episode on the deterministic clock, on the control loop that robots run on.

System 1, System 2 and the world are loaded once; every episode gets a loop, a clock and a
random stream of its own, so its result does not depend on what ran before it or elsewhere.
torch gets one thread: sums are split by the number of threads, so more of them would change
the last bits, and processes use several cores better than threads do.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.motions import MovingBlock
from openhelix.benchmarks.calvin.sequences import get_sequences, initial_state
from openhelix.benchmarks.calvin.starts import StartError, begin
from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.benchmarks.evaluation.measurement import (
    Attempt,
    DemandGoals,
    DemandPolicy,
    Drift,
    EngineMeter,
    Outcome,
)
from openhelix.benchmarks.evaluation.referring import begin as begin_referring
from openhelix.benchmarks.evaluation.suites import Episode
from openhelix.runtime.control.assembly import ControlStack, build_stack, make, replan_ns
from openhelix.runtime.control.episode_runner import Assignment, EpisodeRunner
from openhelix.runtime.control.planner import SyncPlanner
from openhelix.runtime.core.clock import FakeClock
from openhelix.runtime.core.config import RunConfig
from openhelix.runtime.core.interfaces import (
    Engine,
    Policy,
    PolicySpec,
    SpecMismatch,
    check_latent,
    check_robot,
)
from openhelix.runtime.core.quaternion import from_euler_xyz
from openhelix.runtime.core.types import F64, ActionChunk, LatentGoal, Observation
from openhelix.runtime.observe.video import Caption, VideoRecorder
from openhelix.runtime.robots.base import make_robot
from openhelix.runtime.robots.env import EnvRobot, PlayTableRobot

# ------------------------------------------------------------------------------------------------
# Puts a world into the state in which an episode begins.
#
# In PlayTable a drawn start is reached by simulation: an expert may have done another task
# before, and a block that is to be placed lies in the hand because an expert has grasped it. For
# calvin_env such a start is simulated in PlayTable and carried over as CALVIN's own state
# vectors; those say nothing of the gripper's command, so a closed hand is closed again there.


DRAWS = 5  # of a start, each with another seed, before an episode is given up
CLOSE_STEPS = 4  # a closing hand travels its whole way in four steps


def sequence_start(episode: Episode) -> tuple[F64, F64]:
    """Return robot_obs (15,) and scene_obs (24,) of an episode of CALVIN's chains."""
    assert episode.sequence is not None
    state, _ = get_sequences(episode.sequence + 1)[episode.sequence]
    return initial_state(state, episode.scene)


def draw_start(env: Any, episode: Episode) -> None:
    """Bring a PlayTable into a drawn start.

    Raises:
        StartError: none was found.
    """
    failed = StartError("no draw")
    for attempt in range(DRAWS):
        rng = np.random.default_rng([*episode.draw, attempt])
        try:
            if "reference" in episode.groups:
                begin_referring(env, episode.groups["reference"], episode.tasks[0], rng)
            else:
                begin(env, episode.tasks[0], rng)
        except StartError as error:
            failed = error
        else:
            return
    raise failed


def stage(env: Any, episode: Episode) -> MovingBlock | None:
    """Bring a PlayTable into an episode's start; returns what moves in it, if anything does."""
    if episode.sequence is not None:
        env.reset(*sequence_start(episode))
    else:
        draw_start(env, episode)
    motion = episode.motion
    if motion is None:
        return None
    return MovingBlock(env, motion.block, motion.pattern, motion.speed_m_s)


def stage_json(env: Any, episode: Mapping[str, Any]) -> MovingBlock | None:
    """`stage` for an episode that came as plain data from another process."""
    return stage(env, Episode.from_json(episode))


def stage_calvin(env: Any, episode: Episode) -> None:
    """Bring calvin_env into an episode's start."""
    if episode.sequence is not None:
        env.reset(*sequence_start(episode))
        return
    with PlayTableEnv(episode.scene, cameras=()) as model:
        draw_start(model, episode)
        obs, info = model.get_state_obs(), model.get_info()["robot_info"]
    env.reset(obs["robot_obs"], obs["scene_obs"])
    if info["gripper_action"] < 0:
        rotation = from_euler_xyz(info["tcp_orn"])
        for _ in range(CLOSE_STEPS):
            env.advance((info["tcp_pos"], rotation, -1))


log = logging.getLogger(__name__)
REASON_CHARS = 300


@dataclass(frozen=True, slots=True)
class Conditions:
    """How an episode is run.

    Attributes:
        steps_limit: environment steps a task.
        interval: System 2 refreshes every so many steps.
        latency: steps until its latent arrives.
        drift: compare the latents in use with fresh ones (costs System 2 calls).
    """

    steps_limit: int
    interval: int
    latency: int = 0
    drift: bool = False


class EpisodeClock(FakeClock):
    """A fake clock that can go back to its start: times in an episode depend on it alone."""

    def restart(self) -> None:
        """Be as new."""
        self._now_ns = 1_000_000_000


class TaskPolicy:
    """A policy without System 2 is told the task's number instead of an instruction."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self.episode_runner: EpisodeRunner | None = None

    @property
    def spec(self) -> PolicySpec:
        return cast(PolicySpec, self._policy.spec)

    def warm_up(self) -> None:
        self._policy.warm_up()

    def reset(self, seed: int | None = None) -> None:
        self._policy.reset(seed)

    def act(self, observation: Observation, latents: Sequence[LatentGoal]) -> ActionChunk:
        current = self.episode_runner.current if self.episode_runner else None
        self._policy.set_task(TASK_NAMES.index(current.task) if current else -1)
        return cast(ActionChunk, self._policy.act(observation, latents))


class Runner:
    """System 1, System 2 and worlds, ready to run episodes one after the other.

    Args:
        config: of the run; its clock must be "lockstep".
        engine: System 2 that is shared with others; None loads the configured one.
        threads: of torch.

    Raises:
        ValueError: something is refused; the message is one line.
    """

    def __init__(self, config: RunConfig, engine: Engine | None = None, threads: int = 1) -> None:
        self._config = config
        self._policy: Policy = make(config.system1.policy)
        self._clock = EpisodeClock()
        self._robots: dict[str, EnvRobot] = {}
        self._engine: EngineMeter | None = None
        spec = self._policy.spec
        # Before System 2 is loaded, which takes longest.
        check_robot(self._make_robot(config.world.scene).spec, spec)
        if spec.latent is None:
            if not hasattr(self._policy, "set_task"):
                raise SpecMismatch("policy: it takes no latent and cannot be told its task either")
            self._policy = TaskPolicy(self._policy)
        else:
            self._engine = EngineMeter(engine or make(config.system2.engine))
            check_latent(self._engine.spec, spec.latent)
        torch.set_num_threads(threads)

    def about(self) -> dict[str, Any]:
        """What is being evaluated, as plain data."""
        latent = None if self._engine is None else asdict(self._engine.spec)
        spec_id = None if self._engine is None else self._engine.spec.spec_id
        return {"policy_spec": asdict(self._policy.spec), "latent_spec": latent, "spec_id": spec_id}

    def run(self, episode: Episode, conditions: Conditions, film: bool = False) -> Outcome:
        """Run one episode. Never raises for what goes wrong in it: that is a failed episode."""
        started_s, cpu_s = time.perf_counter(), time.process_time()
        attempt = Attempt(episode)
        try:
            if film:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "episode.mp4"
                    try:
                        self._attempt(attempt, conditions, path)
                    finally:
                        attempt.video = path.read_bytes() if path.exists() else None
            else:
                self._attempt(attempt, conditions, None)
        except Exception as error:
            attempt.error = f"{type(error).__name__}: {' '.join(str(error).split())}"[:REASON_CHARS]
            log.warning("%s: %s", episode.key, attempt.error)
            self._discard(episode.scene)
        return attempt.outcome(time.perf_counter() - started_s, time.process_time() - cpu_s)

    def close(self) -> None:
        """Release worlds and System 2."""
        for scene in list(self._robots):
            self._discard(scene)
        if self._engine is not None:
            self._engine.close()

    def _attempt(self, attempt: Attempt, conditions: Conditions, film: Path | None) -> None:
        episode = attempt.episode
        self._clock.restart()
        robot = self._robot(episode.scene)
        if not isinstance(robot, PlayTableRobot):
            robot.frames_on_demand = film is None  # a film looks after the world has moved on
        moving = None

        def prepare(env: Any) -> None:
            nonlocal moving
            if isinstance(robot, PlayTableRobot):
                moving = stage(env, episode)
            else:
                stage_calvin(env, episode)

        robot.prepare_world(prepare)
        stack = self._stack(robot, episode, conditions)
        attempt.begin(stack, self._engine, robot)
        if conditions.drift and self._engine is not None:
            attempt.drift = Drift(stack, self._engine.engine, self._config.system2.camera)
            stack.loop.subscribers.append(attempt.drift)
        recorder = _recorder(film, stack, robot) if film is not None else None
        try:
            stack.loop.arm()
            stack.episode_runner.run(
                [
                    Assignment(task, text)
                    for task, text in zip(episode.tasks, episode.instructions, strict=True)
                ],
                lambda: False,
            )
        finally:
            if moving is not None:
                moving.close()
            if recorder is not None:
                recorder.close()

    def _stack(self, robot: EnvRobot, episode: Episode, conditions: Conditions) -> ControlStack:
        config = self._config.model_copy(
            update={
                "seed": episode.seed,
                "tasks": self._config.tasks.model_copy(
                    update={"steps_limit": conditions.steps_limit, "stop_at_failure": True}
                ),
                "lockstep": self._config.lockstep.model_copy(
                    update={
                        "interval_steps": conditions.interval,
                        "latency_steps": conditions.latency,
                    }
                ),
            }
        )
        policy, spec, goals = self._policy, self._policy.spec, None
        if self._engine is not None:
            goals = DemandGoals(
                self._engine,
                config.system2.camera,
                conditions.interval,
                conditions.latency,
                config.system1.latent_memory,
                draw_now=not isinstance(robot, PlayTableRobot),
            )
            policy = DemandPolicy(policy, goals)
        planner = SyncPlanner(policy, replan_ns(config))
        stack = build_stack(config, robot, spec, planner, goals, self._clock)
        if isinstance(policy, TaskPolicy):
            policy.episode_runner = stack.episode_runner
        return stack

    def _robot(self, scene: str) -> EnvRobot:
        """Return the scene's connected robot."""
        robot = self._robots.get(scene)
        if robot is not None and not isinstance(robot, PlayTableRobot):
            # A calvin_env that has run an episode does not start the next one alike.
            self._discard(scene)
            robot = None
        if robot is None:
            robot = self._robots[scene] = self._make_robot(scene)
            robot.connect()
        return robot

    def _make_robot(self, scene: str) -> EnvRobot:
        config = self._config
        wanted = {camera.name for camera in self._policy.spec.cameras} | {config.system2.camera}
        options = dict(config.robot.options) | {
            "scene": scene,
            "cameras": [name for name in config.world.cameras if name in wanted],
            "clock": self._clock,
        }
        name = "openhelix.runtime.robots.env:PlayTableRobot" if config.robot.name == "sim" else None
        robot = make_robot(name or config.robot.name, **options)
        if not isinstance(robot, EnvRobot):
            raise ValueError(f"robot.name: {config.robot.name!r} is no world that can be evaluated")
        return robot

    def _discard(self, scene: str) -> None:
        robot = self._robots.pop(scene, None)
        if robot is not None:
            try:
                robot.disconnect()
            except Exception:
                log.warning("scene %s: the world did not close", scene, exc_info=True)


def _recorder(path: Path, stack: ControlStack, robot: EnvRobot) -> VideoRecorder:
    def caption() -> Caption:
        current = stack.episode_runner.current
        if current is None:
            return Caption()
        note = f"task {len(stack.episode_runner.results) + 1}, step {stack.episode_runner.steps}"
        return Caption(current.task, current.instruction, note)

    cameras = [camera.name for camera in robot.spec.cameras]
    recorder = VideoRecorder(path, cameras, caption, lossless=True)
    stack.loop.subscribers.append(recorder)
    return recorder
