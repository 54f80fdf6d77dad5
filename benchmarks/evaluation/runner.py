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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.benchmarks.evaluation.measurement import (
    AroundPolicy,
    Attempt,
    DemandGoals,
    DemandPolicy,
    Drift,
    EngineMeter,
    Outcome,
)
from openhelix.benchmarks.evaluation.oracle import OracleEngine, ToldGoals
from openhelix.benchmarks.evaluation.staging import Starts, stage, stage_calvin
from openhelix.benchmarks.evaluation.suites import Episode
from openhelix.runtime.control.assembly import (
    ControlStack,
    build_stack,
    check_join,
    check_trigger,
    make,
    make_policy,
    make_trigger,
    sync_planner,
)
from openhelix.runtime.control.loop import Tick
from openhelix.runtime.core.clock import FakeClock
from openhelix.runtime.core.config import ConfigError, RunConfig
from openhelix.runtime.core.files import NO_ROOM, refusal_of
from openhelix.runtime.core.interfaces import (
    Engine,
    LatentGoal,
    PartFailed,
    Policy,
    SpecMismatch,
    check_engine,
    check_latent,
    check_policy,
    check_robot,
)
from openhelix.runtime.observe.film import LiveFilm, make_film
from openhelix.runtime.observe.overlay import About
from openhelix.runtime.observe.ticks import Teller, TickMessage
from openhelix.runtime.robots.base import RobotError, make_robot
from openhelix.runtime.robots.env import EnvRobot, PlayTableRobot, stepped

log = logging.getLogger(__name__)
REASON_CHARS = 300
Film = Literal["no", "yes", "failed"]  # whether an episode is filmed, or only if it fails
FILM_SIZE = (640, 360)  # of an episode: a page shows many of them


@dataclass(frozen=True, slots=True)
class Conditions:
    """How an episode is run.

    Attributes:
        steps_limit: environment steps per task, those held still included.
        interval: System 2 refreshes every so many steps.
        latency: steps until its latent arrives.
        delay: steps from an observation to the arrival of System 1's chunk.
        drift: compare the latents in use with fresh ones (costs System 2 calls).
    """

    steps_limit: int
    interval: int
    latency: int = 0
    drift: bool = False
    delay: int = 0


class EpisodeClock(FakeClock):
    """A fake clock that can go back to its start: times in an episode depend on it alone."""

    def restart(self) -> None:
        """Be as new."""
        self._now_ns = 1_000_000_000


class TaskPolicy(AroundPolicy):
    """A policy without System 2 is told the task's number instead of an instruction."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.task: Callable[[], str] = lambda: ""

    def conditioned(self, latents: Sequence[LatentGoal]) -> Sequence[LatentGoal]:
        task = self.task()
        self.inner.set_task(TASK_NAMES.index(task) if task else -1)
        return latents


class Runner:
    """System 1, System 2 and worlds, ready to run episodes one after the other.

    Args:
        config: of the run; its clock must be "lockstep".
        engine: System 2 that is shared with others; None loads the configured one.
        threads: of torch.
        policy: System 1; None loads the configured one.

    Raises:
        ValueError: something is refused; the message is one line.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine | None = None,
        threads: int = 1,
        policy: Policy | None = None,
    ) -> None:
        self._config = config
        self._policy: Policy = make_policy(config.system1.policy) if policy is None else policy
        self._owns_engine = engine is None
        self._untrained = ["system1"] if getattr(self._policy, "untrained", False) else []
        self._clock = EpisodeClock()
        self._robots: dict[str, EnvRobot] = {}
        self._starts = Starts()
        self._engine: EngineMeter | None = None
        try:
            check_policy(self._policy)
            self._load(engine)
        except BaseException:
            self.close()
            raise
        import torch  # three seconds, which a refusal is not to wait for

        torch.set_num_threads(threads)

    def _load(self, engine: Engine | None) -> None:
        spec, scene = self._policy.spec, self._config.world.scene
        check_join(self._config, spec)
        # Before System 2 is loaded, which takes longest. The world is opened too: one that is
        # not usable is refused here, and would make every episode a failed one.
        check_robot(self._make_robot(scene).spec, spec)
        self._open_world()
        if spec.latent is None:
            if not hasattr(self._policy, "set_task"):
                target = self._config.system1.policy.target
                raise SpecMismatch(
                    f"system1.policy.target: {target} takes no latent (spec.latent is None), and "
                    "cannot be told its task either: it has no set_task(number)"
                )
            self._policy = TaskPolicy(self._policy)
        else:
            engine = engine or make(self._config.system2.engine)
            check_engine(engine)
            if getattr(engine, "untrained", False):
                self._untrained.append("system2")
            self._engine = EngineMeter(engine)
            check_latent(self._engine.spec, spec.latent)
            check_trigger(self._config, self._engine.spec)

    def about(self) -> dict[str, Any]:
        """What is being evaluated, as plain data."""
        latent = None if self._engine is None else asdict(self._engine.spec)
        spec_id = None if self._engine is None else self._engine.spec.spec_id
        about = {
            "policy_spec": asdict(self._policy.spec),
            "latent_spec": latent,
            "spec_id": spec_id,
        }
        return about | ({"untrained": self._untrained} if self._untrained else {})

    def run(self, episode: Episode, conditions: Conditions, film: Film = "no") -> Outcome:
        """Run one episode; what goes wrong in it is told in its outcome: a failed episode.

        Raises:
            ConfigError: its world cannot be used at all.
        """
        started_s, cpu_s = time.perf_counter(), time.process_time()
        attempt = Attempt(episode)
        try:
            with _place(film) as path:
                try:
                    self._attempt(attempt, conditions, path, film == "failed")
                finally:
                    if path is not None and path.exists():
                        attempt.video = path.read_bytes()
        except ConfigError:
            self._discard(episode.scene)
            raise
        except Exception as error:
            if refusal_of(error) in NO_ROOM:  # no failure of the policy
                self._discard(episode.scene)
                raise
            said = " ".join(str(error).split())
            named = isinstance(error, PartFailed)  # it says itself whose error it is
            attempt.error = (said if named else f"{type(error).__name__}: {said}")[:REASON_CHARS]
            log.warning("%s: %s", episode.key, attempt.error)
            self._discard(episode.scene)
        return attempt.outcome(time.perf_counter() - started_s, time.process_time() - cpu_s)

    def close(self) -> None:
        """Release worlds and System 2."""
        for scene in list(self._robots):
            self._discard(scene)
        if self._engine is not None and self._owns_engine:
            self._engine.close()

    def _attempt(
        self,
        attempt: Attempt,
        conditions: Conditions,
        film: Path | None,
        only_failed: bool = False,
    ) -> None:
        episode = attempt.episode
        self._clock.restart()
        robot = self._robot(episode.scene)
        if not isinstance(robot, PlayTableRobot):
            robot.frames_on_demand = film is None  # a film looks after the world has moved on
        moving = None

        def prepare(env: Any) -> None:
            nonlocal moving
            if isinstance(robot, PlayTableRobot):
                moving = stage(env, episode, self._starts)
            else:
                stage_calvin(env, episode)

        robot.prepare_world(prepare)
        stack = self._stack(robot, episode, conditions)
        attempt.begin(stack, self._engine, robot)
        if conditions.drift and self._engine is not None:
            attempt.drift = Drift(stack, self._engine.engine, self._config.system2.camera)
            stack.loop.subscribers.append(attempt.drift)
        recorder = _Camera(film, stack, robot, self._config) if film is not None else None
        try:
            stack.loop.arm()
            stack.episode_runner.run(
                episode.assignments,
                lambda: False,
            )
        finally:
            if moving is not None:
                moving.close()
            if recorder is not None:
                done = [result.success for result in stack.episode_runner.results]
                succeeded = len(done) == len(episode.tasks) and all(done[episode.uncounted :])
                recorder.close(keep=not (only_failed and succeeded))

    def _stack(self, robot: EnvRobot, episode: Episode, conditions: Conditions) -> ControlStack:
        config = self._config.model_copy(
            update={
                "seed": episode.seed,
                "tasks": self._config.tasks.model_copy(
                    update={
                        "steps_limit": conditions.steps_limit,
                        "stop_at_failure": True,
                        "count_holds": True,
                    }
                ),
                "lockstep": self._config.lockstep.model_copy(
                    update={
                        "interval_steps": conditions.interval,
                        "latency_steps": conditions.latency,
                        "plan_delay_steps": conditions.delay,
                    }
                ),
            }
        )
        policy, spec = self._policy, self._policy.spec
        goals: DemandGoals | ToldGoals | None = None
        if self._engine is not None:
            camera, memory = config.system2.camera, config.system1.latent_memory
            when = (conditions.interval, conditions.latency, memory)
            teller, trigger = self._engine.engine, make_trigger(config)
            draw_now = not isinstance(robot, PlayTableRobot)
            if isinstance(teller, OracleEngine):
                goals = ToldGoals(
                    teller, self._engine, camera, *when, draw_now=draw_now, trigger=trigger
                )
            else:
                goals = DemandGoals(self._engine, camera, *when, draw_now=draw_now, trigger=trigger)
            policy = DemandPolicy(policy, goals)
        planner = sync_planner(config, policy)
        stack = build_stack(config, robot, spec, planner, goals, self._clock)
        runner = stack.episode_runner

        def right() -> str:
            """The task that is to be done as things are."""
            if robot.referee is not None:
                return str(robot.referee.right)
            return runner.current.task if runner.current else ""

        if isinstance(policy, TaskPolicy):
            policy.task = right
        elif self._engine is not None and isinstance(self._engine.engine, OracleEngine):
            self._engine.engine.task = right
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
        name = config.robot.name
        if name == "sim":
            name, more = stepped(config.world.name)
            options |= more
        if config.world.static_camera is not None:
            options["static_camera"] = config.world.static_camera.model_dump()
        robot = make_robot(name, **options)
        if not isinstance(robot, EnvRobot):
            raise ValueError(f"robot.name: {config.robot.name!r} is no world that can be evaluated")
        return robot

    def _open_world(self) -> None:
        """Start the first world now: one that cannot start has no episodes to fail.

        Raises:
            ConfigError: it does not start; one line says why.
        """
        try:
            self._robot(self._config.world.scene)
        except RobotError as error:
            raise ConfigError(f"--world: {error}") from error

    def _discard(self, scene: str) -> None:
        robot = self._robots.pop(scene, None)
        if robot is not None:
            try:
                robot.disconnect()
            except Exception:
                log.warning("scene %s: the world did not close", scene, exc_info=True)


@contextmanager
def _place(film: Film) -> Iterator[Path | None]:
    """Give the path of a film that lives as long as the block; None where there is none.

    An episode for whose film there is no room is run without one.
    """
    with ExitStack() as stack:
        path = None
        if film != "no":
            try:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                path = Path(folder) / "episode.mp4"
            except OSError as error:
                log.warning("no film: %s", error)
        yield path


class _Camera:
    """A subscriber that films an episode.

    An episode that can be drawn anew is drawn when it is over; of another one the film is what its
    cameras see.
    """

    def __init__(self, path: Path, stack: ControlStack, robot: EnvRobot, config: RunConfig) -> None:
        cameras = [camera.name for camera in robot.spec.cameras]
        self._path = path
        self._about = replace(About.of(config, cameras), lines=())
        self._teller = Teller(stack.episode_runner, robot)
        self._messages: list[TickMessage] = []
        self._live: LiveFilm | None = None
        if self._about.scenery is None:
            self._live = LiveFilm(path, self._about, lossless=True)
        stack.loop.subscribers.append(self)

    def __call__(self, tick: Tick) -> None:
        self._tell(self._teller(tick))

    def close(self, keep: bool = True) -> None:
        """Finish the film, or leave it; one that fails is no failure of the episode."""
        self._tell(self._teller.rest())
        if self._live is not None:
            whole = self._live.close()
            if not keep or not whole:
                self._path.unlink(missing_ok=True)
            if not whole:
                log.warning("no film: %s", self._live.error)
        elif self._messages and keep:
            try:
                make_film(self._messages, self._path, self._about, FILM_SIZE)
            except OSError as error:
                log.warning("no film: %s", error)

    def _tell(self, message: TickMessage | None) -> None:
        if message is None:
            return
        if self._live is not None:
            self._live(message)
        else:
            self._messages.append(message)
