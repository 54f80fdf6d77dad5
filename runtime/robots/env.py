"""Any world with calvin_env's contract as a robot: each action sent is one environment step.

Time advances only with actions, so this is the driver for the lockstep clock, and for a wall
clock that may wait for its world. The real-time simulator, whose physics and cameras run
in processes of their own, is `openhelix.runtime.robots.sim`.

Frames can be rendered on demand: a world that does not move between two actions has nothing to
miss, and a policy that plans every eighth step leaves seven in eight images unseen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from openhelix.runtime.core import plugins
from openhelix.runtime.core.clock import Clock, MonotonicClock
from openhelix.runtime.core.interfaces import (
    F64,
    Action,
    ActionSpec,
    CameraFrame,
    CameraSpec,
    Observation,
    RobotSpec,
    check_action,
)
from openhelix.runtime.core.quaternion import from_euler_xyz, normalise
from openhelix.runtime.robots.base import NotConnected, Robot, RobotError, WorldPlugin

log = logging.getLogger(__name__)

CONTROL_HZ = 30.0  # calvin_env's; its step has no other length
CAMERA_SIZES: Mapping[str, tuple[int, int]] = {
    "static": (200, 200),
    "gripper": (84, 84),
    "tactile": (24, 48),
}
Oracle = Callable[[Any, Any], set[str]]


class FramesOnDemand(Mapping[str, CameraFrame]):
    """One instant's frames by camera name, drawn when the first of them is looked at.

    Args:
        names: of the cameras.
        draw: draws all of them; called at most once.
    """

    def __init__(self, names: Sequence[str], draw: Callable[[], Mapping[str, CameraFrame]]) -> None:
        self._names, self._draw = tuple(names), draw
        self._frames: Mapping[str, CameraFrame] | None = None

    @property
    def drawn(self) -> bool:
        """Whether anybody has looked."""
        return self._frames is not None

    def __getitem__(self, name: str) -> CameraFrame:
        if name not in self._names:
            raise KeyError(name)
        if self._frames is None:
            self._frames = self._draw()
        return self._frames[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class EnvRobot(Robot):
    """Wraps an env; also a `World`.

    Args:
        make_env: builds the env; called by `connect`. The env has calvin_env's `reset`,
            `step`, `get_info` and `close`, and `camera_frames(t_ns)`, which returns a
            `CameraFrame` by camera name. One that has `advance(action)` (a step that draws
            nothing) is stepped with that; one that has `settle()` is asked to come to rest
            before its state is taken as an episode's start.
        cameras: names, of "static" and "gripper".
        clock: stamps the observations; the host's monotonic clock by default.
        frames_on_demand: draw only when a frame is looked at, which is then possible until
            the next action is sent (afterwards it is a RobotError: what was to be seen is
            gone).
        oracle: start info and end info to completed tasks; a function or its `"module:name"`.

    Attributes:
        frames_on_demand: as above; may be changed at any time.
        renders: how often the cameras were drawn.
    """

    def __init__(
        self,
        make_env: Callable[[], Any],
        cameras: Sequence[str] = ("static", "gripper"),
        clock: Clock | None = None,
        frames_on_demand: bool = False,
        *,
        oracle: str | Oracle,
    ) -> None:
        for name in cameras:
            if name not in CAMERA_SIZES:
                valid = ", ".join(CAMERA_SIZES)
                raise ValueError(f"robot.options.cameras: no camera {name!r}; there are: {valid}")
        self._spec = RobotSpec(
            cameras=tuple(CameraSpec(name, *CAMERA_SIZES[name]) for name in cameras),
            action=ActionSpec(hz=CONTROL_HZ),
        )
        self._make_env = make_env
        self._now_ns = (clock or MonotonicClock()).now_ns
        self._oracle: Oracle = plugins.resolve(oracle) if isinstance(oracle, str) else oracle
        self.frames_on_demand = frames_on_demand
        self.renders = 0
        self._version = 0  # of the world's state
        self._env: Any = None
        self._info: Mapping[str, Any] = {}
        self._start_info: Mapping[str, Any] = {}
        self._steps = 0

    # -- Robot --------------------------------------------------------------------------

    @property
    def spec(self) -> RobotSpec:
        return self._spec

    @property
    def n_joints(self) -> int:
        return 7

    @property
    def is_connected(self) -> bool:
        return self._env is not None

    def connect(self) -> None:
        """Build the env.

        Raises:
            ValueError: the env refuses its options, or is not installed.
            RobotError: it does not start.
        """
        if self._env is not None:
            return
        try:
            self._env = self._make_env()
        except RuntimeError as error:
            raise RobotError(str(error)) from error
        self._begin()

    def disconnect(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            env.close()

    def get_observation(self) -> Observation:
        """Return the world's state, and its cameras' view of just this state."""
        self._connected()
        t_ns = self._now_ns()
        robot = self._info["robot_info"]
        names = [camera.name for camera in self._spec.cameras]
        frames: Mapping[str, CameraFrame] = FramesOnDemand(names, self._drawing(t_ns))
        if not self.frames_on_demand and names:
            frames = {name: frames[name] for name in names}
        return Observation(
            t_ns=t_ns,
            frames=frames,
            tcp_pose=_tcp_pose(robot),
            gripper_width=float(robot["gripper_opening_width"]),
            gripper_open=float(robot["gripper_action"]) > 0,
            joints=np.array(robot["arm_joint_states"], np.float64),
        )

    def send_action(self, action: Action) -> Action:
        """Make one environment step towards the target; the gripper opens from 0.5 on."""
        env = self._connected()
        check_action(action)
        x, y, z, *q = np.asarray(action.pose, np.float64).tolist()
        rotation = normalise(q)
        opens = action.gripper >= 0.5
        command = ((x, y, z), rotation, 1 if opens else -1)
        self._version += 1
        if hasattr(env, "advance"):
            self._ask(lambda: env.advance(command))
            self._info = self._ask(env.get_info)
        else:
            self._info = self._ask(lambda: env.step(command))[3]
        self._steps += 1
        return Action(
            pose=np.array((x, y, z, *rotation)),
            gripper=1.0 if opens else 0.0,
            instruction_id=action.instruction_id,
            t_ns=action.t_ns,
            info=action.info,
        )

    def stop(self, reason: str) -> None:
        """The world stands still until the next action, so there is nothing to send."""
        log.info("world stands still: %s", reason)

    def hold_action(self, last: Action | None) -> Action:
        """Repeat the last target: commanding the measured pose would sag with the arm."""
        if last is not None:
            return Action(np.array(last.pose), last.gripper, last.instruction_id)
        self._connected()
        robot = self._info["robot_info"]
        return Action(_tcp_pose(robot), 1.0 if float(robot["gripper_action"]) > 0 else 0.0)

    # -- World --------------------------------------------------------------------------

    def reset_world(
        self, robot_obs: Sequence[float] | None, scene_obs: Sequence[float] | None
    ) -> None:
        """Reset the env; ValueError when it cannot take the state."""
        env = self._connected()
        self._ask(lambda: env.reset(robot_obs=robot_obs, scene_obs=scene_obs))
        self._begin()

    def prepare_world(self, prepare: Callable[[Any], object]) -> None:
        """Let `prepare(env)` put the world into a state, and take that as the start."""
        env = self._connected()
        self._ask(lambda: prepare(env))
        self._begin()

    def stage(self, target: str, options: Mapping[str, Any]) -> None:
        """Let `target(env, **options)` put the world into a state, and take that as the start."""
        put = plugins.resolve(target)
        self.prepare_world(lambda env: put(env, **options))

    def begin_task(self, task: str, instruction: str) -> None:
        self._connected()
        self._start_info = self._info
        if self.referee is not None:
            self.referee.begin(self._info)

    def completed(self) -> frozenset[str]:
        self._connected()
        if self.referee is not None:
            return frozenset(self.referee.completed(self._info))
        return frozenset(self._oracle(self._start_info, self._info))

    def env_steps(self) -> int:
        return self._steps

    @property
    def referee(self) -> Any:
        """Who judges in the oracle's place, in a world where what is right changes; else None."""
        return getattr(self._env, "referee", None)

    # -- inside ---------------------------------------------------------------------------

    def _drawing(self, t_ns: int) -> Callable[[], Mapping[str, CameraFrame]]:
        """Return what draws the world as it is now, for as long as it stays so."""
        env, version = self._env, self._version

        def draw() -> Mapping[str, CameraFrame]:
            if self._env is not env or self._version != version:
                raise RobotError("the world has moved on; its cameras no longer show that instant")
            self.renders += 1
            return self._ask(lambda: env.camera_frames(t_ns=t_ns))

        return draw

    def _begin(self) -> None:
        if hasattr(self._env, "settle"):
            self._ask(self._env.settle)
        self._steps = 0
        self._version += 1
        self._info = self._start_info = self._ask(self._env.get_info)

    def _connected(self) -> Any:
        if self._env is None:
            raise NotConnected(f"{type(self).__name__}: connect() first")
        return self._env

    def _ask(self, call: Callable[[], Any]) -> Any:
        """Run `call`; a world that failed (not one that refused its input) is a RobotError."""
        try:
            return call()
        except RuntimeError as error:
            raise RobotError(str(error)) from error


class WorldRobot(EnvRobot):
    """Any world of the group `openhelix.worlds`, inside this process.

    Args:
        world: its name.
        scene: one of the world's.
        cameras: names, of "static" and "gripper".
        clock, frames_on_demand: see `EnvRobot`.
        seed: of the placement of blocks in a default reset, where the world has one.
        static_camera: where it stands instead of the scene's own: {"eye", "target", "up", "fov"}.

    Raises:
        openhelix.runtime.core.plugins.ResolveError: no such world.
    """

    def __init__(
        self,
        world: str,
        scene: str = "D",
        cameras: Sequence[str] = ("static", "gripper"),
        clock: Clock | None = None,
        frames_on_demand: bool = False,
        seed: int = 0,
        static_camera: Mapping[str, Any] | None = None,
    ) -> None:
        plugin: WorldPlugin = plugins.find(plugins.WORLDS, world)

        def make_env() -> Any:
            more = {} if static_camera is None else {"static_camera": static_camera}
            return plugin.make_env(scene, tuple(cameras), seed, **more)

        super().__init__(make_env, cameras, clock, frames_on_demand, oracle=plugin.completed)


class PlayTableRobot(WorldRobot):
    """PlayTable inside this process.

    What its cameras see is a plain vector, so an instant can be drawn at any later time: its
    frames are always drawn on demand.

    Args:
        scene: "A" to "D".
        cameras, clock, seed, static_camera: see `WorldRobot`.
    """

    def __init__(
        self,
        scene: str = "D",
        cameras: Sequence[str] = ("static", "gripper"),
        clock: Clock | None = None,
        seed: int = 0,
        static_camera: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__("playtable", scene, cameras, clock, True, seed, static_camera)
        self._visual: F64 | None = None

    def visual_state(self) -> F64 | None:
        return self._visual

    def _drawing(self, t_ns: int) -> Callable[[], Mapping[str, CameraFrame]]:
        env = self._connected()
        state = self._visual = env.visual_state()

        def draw() -> Mapping[str, CameraFrame]:
            self.renders += 1
            views = env.renderer.render(state)
            return {name: view.camera_frame(t_ns) for name, view in views.items()}

        return draw


class CalvinRobot(WorldRobot):
    """One real calvin_env, in a process of its own.

    It renders about 12 steps per second, so it belongs to the lockstep clock; on the wall clock
    every tick waits for it. Where it is not installed, `connect` says how to get it.

    Args:
        scene: "A" to "D".
        cameras, clock: see `WorldRobot`.
        frames_on_demand: see `EnvRobot`; it draws 38 + 20 ms for a step of 2 ms.
    """

    def __init__(
        self,
        scene: str = "D",
        cameras: Sequence[str] = ("static", "gripper"),
        clock: Clock | None = None,
        frames_on_demand: bool = False,
    ) -> None:
        super().__init__("calvin", scene, cameras, clock, frames_on_demand)


def stepped(world: str) -> tuple[str, dict[str, Any]]:
    """Return the driver that steps a world inside this process, and the options that name it."""
    if world in plugins.entries(plugins.ROBOTS):
        return world, {}
    return f"{__name__}:{WorldRobot.__name__}", {"world": world}


def _tcp_pose(robot_info: Mapping[str, Any]) -> Any:
    """Return calvin_env's TCP position and euler angles as a pose (7,)."""
    return np.array((*robot_info["tcp_pos"], *from_euler_xyz(robot_info["tcp_orn"])), np.float64)
