"""The robot interface of the runtime: LeRobot's methods, plus stop and hold.

`send_action` returns the action actually sent, `spec` and the feature lists can be read while
disconnected, and `hold_action` has no default, because what keeps an arm still is for its
driver to know (the last target sags on one arm and is right on another). Drivers register in
the entry-point group `openhelix.robots`; the loop never names one.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

from openhelix.runtime.core import plugins
from openhelix.runtime.core.config import ConfigError, WorldConfig
from openhelix.runtime.core.interfaces import (
    F32,
    F64,
    U8,
    Action,
    CameraFrame,
    Observation,
    RobotSpec,
)

Features = Mapping[str, type | tuple[int, ...]]
INSTEAD = "instead: "  # before the name of a task that was done and must not be


class RobotError(RuntimeError):
    """The robot cannot do what was asked; the message says what and why."""


class NotConnected(RobotError):
    """A call that needs a connection came before `connect` or after `disconnect`."""


class Robot(ABC):
    """One arm with its cameras. A driver implements the verbs below and nothing else.

    All calls come from one thread, the control loop's. `get_observation` and `send_action`
    must return well within a control period: what is slow (a camera) belongs in a thread or
    process of the driver's, which stamps what it delivers.
    """

    @property
    @abstractmethod
    def spec(self) -> RobotSpec:
        """Cameras and action conventions; readable while disconnected."""

    @property
    @abstractmethod
    def n_joints(self) -> int:
        """Length of `Observation.joints`; readable while disconnected."""

    @property
    @abstractmethod
    def is_connected(self) -> bool: ...

    @abstractmethod
    def connect(self) -> None:
        """Open the connection; a second call does nothing.

        Raises:
            RobotError: it cannot be reached; the message says what to do.
        """

    @abstractmethod
    def disconnect(self) -> None:
        """Stop the arm and close the connection; safe to call at any time, also twice."""

    @abstractmethod
    def get_observation(self) -> Observation:
        """Return the newest state and the newest frame of each camera, without waiting for one.

        Raises:
            NotConnected: there is no connection.
            RobotError: the robot does not answer.
        """

    def prefetch(self) -> None:  # noqa: B027  a driver need not
        """Take in what has arrived, in the time before a tick, so that the tick finds it ready.

        What arrives later is still read by `get_observation`. Never raises.
        """

    def visual_state(self) -> F64 | None:
        """Return what a simulated world looked like at the last observation; see `Scenery`.

        None for a physical arm, of which only its cameras know what it looks like.
        """
        return None

    @abstractmethod
    def send_action(self, action: Action) -> Action:
        """Send one target; return the action actually sent, after the driver's own limits.

        Raises:
            NotConnected: there is no connection.
            ValueError: the action is malformed or not finite; nothing was sent.
            RobotError: the robot does not answer.
        """

    @abstractmethod
    def stop(self, reason: str) -> None:
        """Bring the arm to a standstill now and keep it there until the next `send_action`.

        Never raises: it is called when things are already wrong.
        """

    @abstractmethod
    def hold_action(self, last: Action | None) -> Action:
        """Return the action that keeps the arm where it is.

        Args:
            last: the action sent last; None if none was sent since `connect`.
        """

    @property
    def observation_features(self) -> Features:
        """Names and shapes of what `get_observation` delivers, as LeRobot lists them."""
        features: dict[str, type | tuple[int, ...]] = {
            "tcp_pose": (7,),
            "gripper_width": float,
            "gripper_open": bool,
            "joints": (self.n_joints,),
        }
        for camera in self.spec.cameras:
            features[f"{camera.name}.rgb"] = (camera.height, camera.width, 3)
            if camera.depth:
                features[f"{camera.name}.depth"] = (camera.height, camera.width)
        return features

    @property
    def action_features(self) -> Features:
        """Names and shapes of what `send_action` takes."""
        return {"pose": (7,), "gripper": float}

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *error: object) -> None:
        self.disconnect()


@runtime_checkable
class World(Protocol):
    """What a robot in a simulator can do besides: set the scene and judge tasks."""

    def reset_world(
        self, robot_obs: Sequence[float] | None, scene_obs: Sequence[float] | None
    ) -> None:
        """Put arm and scene into a state (CALVIN's 15 and 24 numbers); None: the default."""

    def begin_task(self, task: str, instruction: str) -> None:
        """Remember the state of the world as the one that `task` starts from.

        With "" for the task, `completed` tells of whichever is done.
        """

    def completed(self) -> frozenset[str]:
        """Return the tasks that the world's change since `begin_task` amounts to.

        A name behind `INSTEAD` is of a task that must not be done, and ends the attempt.
        """

    def env_steps(self) -> int:
        """Return the environment steps made since `reset_world`."""


@dataclass(frozen=True, slots=True)
class ScenePart:
    """One rigid part of a simulated world, as a viewer draws it."""

    name: str
    link: int  # row of `Scenery.transforms`
    triangles: F32  # (n, 3, 3) corners in the link's frame, m
    colours: U8  # (n, 3), of each triangle


class Scenery(Protocol):
    """What a simulated world looks like, from the plain vector that `Robot.visual_state` gives.

    A film or a viewer that has it can draw any instant at any size, also after the run.
    """

    def parts(self) -> Sequence[ScenePart]:
        """Return everything that a viewer draws."""

    def transforms(self, visual: F64) -> F64:
        """Return where every link is, (L, 4, 4) link to W."""

    def picture(self, visual: F64, view: str, width: int, height: int) -> CameraFrame:
        """Draw without jagged edges, for people to look at; without depth, stamped 0.

        Called from several threads at once.

        Args:
            visual: of the instant.
            view: "room" (from where the static camera stands) or a camera's name.
            width, height: pixels.
        """


class WorldPlugin(Protocol):
    """An entry of the group `openhelix.worlds`: a world by its name.

    Attributes:
        processes: the classes of the processes "world" and "camera" that run it in real time;
            empty for a world that only steps.
        drawable: whether it has a scenery.
    """

    processes: Mapping[str, str]
    drawable: bool

    def make_env(
        self,
        scene: str,
        cameras: Sequence[str],
        seed: int = 0,
        static_camera: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return an env with calvin_env's verbs and `camera_frames`; see `env.EnvRobot`.

        Raises:
            ValueError: its static camera cannot be put elsewhere.
        """

    def completed(self, start_info: Mapping[str, Any], end_info: Mapping[str, Any]) -> set[str]:
        """Return the names of the tasks done between two infos."""

    def sequence(
        self, number: int, scene: str
    ) -> tuple[list[tuple[str, str]], dict[str, list[float]]]:
        """Return a run's tasks with their sentences, and the `reset_world` state to start from."""

    def task(
        self, name: str, scene: str, seed: int
    ) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Return a task with its sentence, and a start from which it can be done; see `set_world`.

        Raises:
            ValueError: there is no such task; the line names the nearest.
        """

    def layout(self, layout: Mapping[str, Any], scene: str, seed: int) -> dict[str, Any]:
        """Return the start that `world.layout` describes; see `set_world`.

        Raises:
            ValueError: in one line, what is wrong with it and what is valid.
        """

    def scenery(self, scene: str, static_camera: Mapping[str, Any] | None = None) -> Scenery | None:
        """Return what a scene looks like; None where only a camera can tell."""

    def require(self) -> str:
        """Return in words what was found; ValueError, in one line, where something is missing."""


def robot_class(name: str) -> Any:
    """Return the driver class called `name`, or named as `"package.module:Class"`.

    Raises:
        openhelix.runtime.core.plugins.ResolveError: there is no such driver; the message lists
            those there are.
    """
    return plugins.find(plugins.ROBOTS, name)


def world_options(name: str, options: Mapping[str, Any], world: WorldConfig) -> dict[str, Any]:
    """Return a driver's options with what the run says of its world, if it drives one.

    A driver that takes a `scene` is one.

    Raises:
        ConfigError: the options name another scene or other cameras than the run.
    """
    takes = inspect.signature(robot_class(name)).parameters
    if "scene" not in takes:
        return dict(options)
    of_run: dict[str, Any] = {"scene": world.scene, "cameras": tuple(world.cameras)}
    if "seed" in takes and "seed" not in options:
        options = {**options, "seed": world.seed}
    if world.static_camera is not None:
        if "static_camera" not in takes:
            raise ConfigError(f"world.static_camera: {name!r} has its own and takes no other")
        of_run["static_camera"] = world.static_camera.model_dump()
    for field, value in of_run.items():
        if field in options and options[field] not in (value, list(value)):
            raise ConfigError(
                f"robot.options.{field}: {options[field]!r} contradicts world.{field}; "
                f"say world.{field} alone"
            )
    return {**options, **of_run}


def set_world(robot: Robot, initial: Mapping[str, Any] | None) -> None:
    """Put the world that a robot is in into its first state; None leaves it as it is.

    Args:
        robot: connected.
        initial: {"robot_obs": [...], "scene_obs": [...]}, or what puts it up: {"stage":
            {"target": "module:function", "options": {...}}}, called with the world's env.

    Raises:
        ConfigError: this robot's world cannot be put up so.
        RobotError: the world does not answer.
    """
    if initial is None:
        return
    if "stage" in initial:
        stage = getattr(robot, "stage", None)
        if stage is None:
            raise ConfigError(
                f"robot.name: a {type(robot).__name__} is in no world that can be set"
            )
        stage(**initial["stage"])
    elif isinstance(robot, World):
        robot.reset_world(initial["robot_obs"], initial["scene_obs"])


def make_robot(name: str, **options: Any) -> Robot:
    """Build a driver; it is not connected yet.

    Args:
        name: an entry point of the group `openhelix.robots`, or `"package.module:Class"`.
        options: the driver's own constructor arguments.

    Raises:
        openhelix.runtime.core.plugins.ResolveError: no such driver.
        ValueError: an option that the driver does not have, or one of a bad value.
    """
    cls = robot_class(name)
    parameters = inspect.signature(cls).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for option in options:
            if option not in parameters:
                valid = ", ".join(parameters) or "none"
                raise ValueError(f"robot.options.{option}: {name!r} has no such option; {valid}")
    missing = [
        key
        for key, p in parameters.items()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and key not in options
    ]
    if missing:
        raise ValueError(f"robot.options.{missing[0]}: {name!r} needs it")
    robot = cls(**options)
    if not isinstance(robot, Robot):
        raise ValueError(f"robot: {name!r} is a {cls.__name__}, which is not a Robot")
    return robot
