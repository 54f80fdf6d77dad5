"""The `sim` driver: PlayTable in its own processes, like a physical robot.

Actions go out and states and frames come in over ZeroMQ; nothing here steps a world, waits
for one or knows its physics. Only the rare simulator calls (reset, begin a task) are
requests with replies.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
from openhelix.runtime.core.quaternion import from_euler_xyz
from openhelix.runtime.robots.base import NotConnected, Robot, RobotError
from openhelix.runtime.transport.codec import encode, register
from openhelix.runtime.transport.rpc import RpcClient, RpcError
from openhelix.runtime.transport.wire import NewestReader, Publisher

# CALVIN's cameras, pixels (height, width).
CAMERA_SIZES = {"static": (200, 200), "gripper": (84, 84), "tactile": (24, 48)}


@dataclass(frozen=True, slots=True)
class WorldState:
    """The world after one step, as its process publishes it."""

    t_ns: int  # the time that this state is the state of
    robot_obs: F64  # (15,) as calvin_env gives it
    visual: F64  # everything visible; see openhelix.benchmarks.calvin.cameras
    task_seq: int  # counts calls of begin_task
    env_steps: int  # since the last reset
    completed: tuple[str, ...]  # tasks done since begin_task


@dataclass(frozen=True, slots=True)
class FrameSet:
    """All cameras' images of one state."""

    frames: Mapping[str, CameraFrame]


register("world_state", WorldState)
register("frame_set", FrameSet)


ASK_TIMEOUT_S = 10.0
STAGE_TIMEOUT_S = 90.0  # an expert may have to do a task first


class SimRobot(Robot):
    """Driver of the simulated Panda.

    Args:
        actions, states, frames: endpoints that the world and its cameras have bound.
        world_control: control endpoint of the world's process.
        cameras: names of the cameras that are drawn.
        timeout_s: how long `connect` and a reset wait for the first state and frames.
    """

    def __init__(
        self,
        actions: str,
        states: str,
        frames: str,
        world_control: str,
        cameras: Sequence[str] = ("static", "gripper"),
        keys: str | None = None,
        hz: float = 30.0,
        timeout_s: float = 60.0,
    ) -> None:
        unknown = [name for name in cameras if name not in CAMERA_SIZES]
        if unknown:
            valid = ", ".join(CAMERA_SIZES)
            raise ValueError(f"cameras: {unknown[0]!r} is unknown; valid: {valid}")
        self._endpoints = (actions, states, frames, world_control)
        self._spec = RobotSpec(
            tuple(CameraSpec(name, *CAMERA_SIZES[name]) for name in cameras), ActionSpec(hz=hz)
        )
        self._keys, self._timeout_s = keys, timeout_s
        self._connected = False
        self._state: WorldState | None = None
        self._seen: Observation | None = None  # of that state, with the newest frames
        self._frames: Mapping[str, CameraFrame] = {}
        self._task_seq = 0
        self._sent: Action | None = None

    @property
    def spec(self) -> RobotSpec:
        return self._spec

    @property
    def n_joints(self) -> int:
        return 7

    @property
    def is_connected(self) -> bool:
        return self._connected

    def connect(self) -> None:
        if self._connected:
            return
        actions, states, frames, control = self._endpoints
        self._actions = Publisher(actions, "actions", bind=False, keys=self._keys)
        self._states = NewestReader(states, "states", WorldState, keys=self._keys)
        self._sets = NewestReader(frames, "frames", FrameSet, keys=self._keys)
        self._rpc = RpcClient(control, keys=self._keys)
        self._connected = True
        try:
            self._await_fresh(0)
        except RobotError:
            self.disconnect()
            raise

    def disconnect(self) -> None:
        if not self._connected:
            return
        self.stop("disconnected")
        self._connected = False
        for part in (self._actions, self._states, self._sets, self._rpc):
            part.close()

    def get_observation(self) -> Observation:
        self._newest()
        assert self._seen is not None
        return self._seen

    def prefetch(self) -> None:
        if self._connected:
            self._take_in()
            if self._sent is not None:
                # Encoded for nothing but to have the encoder in the caches when it is needed.
                check_action(self._sent)
                encode(self._sent)

    def visual_state(self) -> F64 | None:
        return self._state.visual if self._state is not None else None

    def send_action(self, action: Action) -> Action:
        if not self._connected:
            raise NotConnected("sim: call connect() first")
        check_action(action)
        self._actions.send(action)
        self._sent = action
        return action

    def stop(self, reason: str) -> None:
        """Command the pose the arm is at; the world keeps the last command for ever."""
        if self._connected and self._state is not None:
            self._actions.send(self.hold_action(None))

    def hold_action(self, last: Action | None) -> Action:
        """The last target; this arm is held by position motors and does not sag."""
        if last is not None:
            return last
        robot = self._newest().robot_obs
        return Action(_tcp_pose(robot), 1.0 if robot[14] > 0 else 0.0)

    def reset_world(
        self, robot_obs: Sequence[float] | None, scene_obs: Sequence[float] | None
    ) -> None:
        answer = self._ask("reset", robot_obs=robot_obs, scene_obs=scene_obs)
        self._await_fresh(int(answer["t_ns"]))

    def stage(self, target: str, options: Mapping[str, Any]) -> None:
        """Let `target(env, **options)` set the world up, in the world's own process."""
        answer = self._ask("stage", STAGE_TIMEOUT_S, target=target, options=dict(options))
        self._await_fresh(int(answer["t_ns"]))

    def begin_task(self, task: str, instruction: str) -> None:
        self._task_seq = int(self._ask("begin_task", task=task)["task_seq"])

    def completed(self) -> frozenset[str]:
        state = self._newest()
        # A state from before begin_task arrived was judged against the task before.
        return frozenset(state.completed) if state.task_seq == self._task_seq else frozenset()

    def env_steps(self) -> int:
        return self._newest().env_steps

    def _newest(self) -> WorldState:
        if not self._connected:
            raise NotConnected("sim: call connect() first")
        self._take_in()
        if self._state is None:
            raise RobotError("sim: the world has not sent a state yet")
        return self._state

    def _take_in(self) -> None:
        # Frames first: a frame must not be of a later step than the state beside it.
        frames = self._sets.poll()
        if frames is not None:
            self._frames = frames.frames
        state = self._states.poll()
        if state is not None:
            self._state = state
        if self._state is not None and (frames is not None or state is not None):
            self._seen = _observation(self._state, self._frames)

    def _await_fresh(self, t_ns: int) -> None:
        """Wait for a state and frames of `t_ns` or later."""
        deadline_s = time.monotonic() + self._timeout_s
        names = {camera.name for camera in self._spec.cameras}
        while time.monotonic() < deadline_s:
            self._take_in()
            fresh = {name for name, frame in self._frames.items() if frame.t_ns >= t_ns}
            if self._state is not None and self._state.t_ns >= t_ns and names <= fresh:
                return
            self._states.wait(0.02)
        missing = "a state" if self._state is None else "camera frames"
        raise RobotError(f"sim: {missing} did not arrive within {self._timeout_s:.0f} s")

    def _ask(
        self, question: str, timeout_s: float = ASK_TIMEOUT_S, **arguments: Any
    ) -> dict[str, Any]:
        if not self._connected:
            raise NotConnected("sim: call connect() first")
        try:
            return self._rpc.call("ask", {"question": question, **arguments}, timeout_s=timeout_s)
        except RpcError as error:
            raise RobotError(f"sim: {error}") from error


def _observation(state: WorldState, frames: Mapping[str, CameraFrame]) -> Observation:
    """The state as every driver gives it; made when it arrives, which is before the tick."""
    robot = state.robot_obs
    return Observation(
        t_ns=state.t_ns,
        frames=frames,
        tcp_pose=_tcp_pose(robot),
        gripper_width=float(robot[6]),
        gripper_open=bool(robot[14] > 0),
        joints=robot[7:14],
    )


def _tcp_pose(robot_obs: F64) -> F64:
    """CALVIN's TCP position and Euler angles as a pose (7,)."""
    x, y, z, *euler = robot_obs[:6].tolist()
    return np.array((x, y, z, *from_euler_xyz(euler)), np.float64)
