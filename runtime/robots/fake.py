"""A scripted arm and System 2 for tests and dry runs: deterministic, with faults on request.

The arm follows its target as a first-order lag. Two cameras look straight down on a textured
plane: `static` from above, `gripper` from the hand; their pixels, depths and matrices agree
with each other and with the arm, so code that lifts pixels to points can be tested on them.
Cameras can be frozen (by stamp or by pixels), delayed and slowed, and calls made to fail.

`PointEngine` is a System 2 without a model, for trying out a policy of one's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import exp, hypot
from typing import Any, Final

import numpy as np

from openhelix.runtime.core.clock import Clock, MonotonicClock
from openhelix.runtime.core.interfaces import (
    F32,
    F64,
    U8,
    Action,
    ActionSpec,
    CameraFrame,
    CameraSpec,
    LatentSpec,
    Observation,
    RobotSpec,
    check_action,
)
from openhelix.runtime.core.quaternion import Quat, Vec3, from_euler_xyz, normalise, slerp
from openhelix.runtime.robots.base import NotConnected, Robot, RobotError

TABLE_Z_M = 0.44
OPEN_WIDTH_M = 0.08
HOME: tuple[Vec3, Quat] = ((0.0, -0.2, 0.55), (1.0, 0.0, 0.0, 0.0))  # hand pointing down
LATENT: Final = LatentSpec("act_last", n_tokens=1, dim=8)
EARLY_NS: Final = 500_000  # a tick that comes this early still sees the frame that is due
_State = tuple[int, Vec3, Quat, float]  # time (ns), position, rotation, finger width (m)


class FakeRobot(Robot):
    """A simulated arm without physics; also a `World` whose tasks are places to reach.

    Args:
        hz: control rate that it states in its spec.
        lag_s: time constant with which it follows a target.
        cameras: (height, width) in pixels by name; "gripper" rides on the hand, any other
            looks down from above.
        camera_hz: frames a second of each camera.
        camera_delay_s: age of the state that the newest frame shows.
        goals: places (x, y, z) in metres that count as completed tasks within 3 cm.
        clock: whose time the arm lives in; the host's monotonic clock by default.
        fail_observe_at: the call of `get_observation` (from 0) that raises `RobotError`.
        fail_send_at: the same for `send_action`.
    """

    def __init__(
        self,
        hz: float = 30.0,
        lag_s: float = 0.05,
        cameras: Mapping[str, tuple[int, int]] | None = None,
        camera_hz: float = 30.0,
        camera_delay_s: float = 0.0,
        goals: Mapping[str, tuple[float, float, float]] | None = None,
        clock: Clock | None = None,
        fail_observe_at: int | None = None,
        fail_send_at: int | None = None,
    ) -> None:
        for name, value in (("hz", hz), ("lag_s", lag_s), ("camera_hz", camera_hz)):
            if not value > 0:
                raise ValueError(f"robot.options.{name}: {value} is not positive")
        sizes = cameras if cameras is not None else {"static": (200, 200), "gripper": (84, 84)}
        self._spec = RobotSpec(
            cameras=tuple(CameraSpec(name, int(h), int(w)) for name, (h, w) in sizes.items()),
            action=ActionSpec(hz=hz),
        )
        self._camera_period_ns = round(1e9 / camera_hz)
        self._delay_ns = round(camera_delay_s * 1e9)
        self._lag_s = lag_s
        self._goals = dict(goals or {})
        self._now_ns = (clock or MonotonicClock()).now_ns
        self._fail_observe_at, self._fail_send_at = fail_observe_at, fail_send_at
        self._connected = False
        self._frozen: dict[str, str] = {}
        self._newest: dict[str, CameraFrame] = {}
        self.stops: list[str] = []  # the reasons it was stopped for
        self.sent: list[Action] = []  # every action, for a test to look at
        self.observed = 0
        self.reset_world(None, None)

    # -- Robot --------------------------------------------------------------------------

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
        if not self._connected:
            self._connected = True
            self._put(self._state[1], self._state[2], self._state[3])

    def disconnect(self) -> None:
        if self._connected:
            self.stop("disconnect")
        self._connected = False

    def get_observation(self) -> Observation:
        self._require_connection()
        self.observed += 1
        if self.observed - 1 == self._fail_observe_at:
            raise RobotError("fake: get_observation fails as configured")
        t_ns, position, rotation, width = self._advance()
        return Observation(
            t_ns=t_ns,
            frames={camera.name: self._frame(camera, t_ns) for camera in self._spec.cameras},
            tcp_pose=np.array((*position, *rotation)),
            gripper_width=width,
            gripper_open=self._target[2] >= 0.5,
            joints=np.array((*position, *rotation[:3], width)),
        )

    def send_action(self, action: Action) -> Action:
        self._require_connection()
        check_action(action)
        if len(self.sent) == self._fail_send_at:
            raise RobotError("fake: send_action fails as configured")
        self._advance()
        x, y, z, *q = np.asarray(action.pose).tolist()
        self._target = ((x, y, z), normalise(q), float(action.gripper))
        sent = Action(
            pose=np.array((x, y, z, *self._target[1])),
            gripper=self._target[2],
            instruction_id=action.instruction_id,
            t_ns=action.t_ns,
            info=action.info,
        )
        self.sent.append(sent)
        self._steps += 1
        return sent

    def stop(self, reason: str) -> None:
        self.stops.append(reason)
        _, position, rotation, _ = self._advance()
        self._target = (position, rotation, self._target[2])

    def hold_action(self, last: Action | None) -> Action:
        if last is not None:
            return Action(np.array(last.pose), last.gripper, last.instruction_id)
        _, position, rotation, _ = self._state
        return Action(np.array((*position, *rotation)), self._target[2])

    # -- World --------------------------------------------------------------------------

    def reset_world(
        self, robot_obs: Sequence[float] | None, scene_obs: Sequence[float] | None
    ) -> None:
        """Move the hand home, or to the pose in `robot_obs`; there is no scene to set."""
        position, rotation, openness = (*HOME, 1.0)
        if robot_obs is not None:
            values = [float(v) for v in robot_obs]
            if len(values) != 15:
                raise ValueError(f"robot_obs: {len(values)} numbers, expected 15")
            position = (values[0], values[1], values[2])
            rotation = from_euler_xyz(values[3:6])
            openness = 1.0 if values[14] > 0 else 0.0
        self._steps = 0
        self._target = (position, rotation, openness)
        self._put(position, rotation, openness * OPEN_WIDTH_M)
        self.begin_task("", "")

    def begin_task(self, task: str, instruction: str) -> None:
        self.task, self.instruction = task, instruction
        self._begun_at = self._state[1]

    def completed(self) -> frozenset[str]:
        here = self._advance()[1]
        return frozenset(
            name
            for name, place in self._goals.items()
            if _distance(here, place) < 0.03 <= _distance(self._begun_at, place)
        )

    def env_steps(self) -> int:
        return self._steps

    # -- what a test may do to it ---------------------------------------------------------

    def freeze_camera(self, name: str, how: str = "stamps") -> None:
        """Freeze a camera: "stamps", no new frames; "pixels", new stamps on the old image."""
        if how not in ("stamps", "pixels"):
            raise ValueError(f"how: {how!r} is neither 'stamps' nor 'pixels'")
        self._frozen[name] = how

    def thaw_camera(self, name: str) -> None:
        """Let a frozen camera live again."""
        self._frozen.pop(name, None)

    # -- inside ---------------------------------------------------------------------------

    def _require_connection(self) -> None:
        if not self._connected:
            raise NotConnected("fake: connect() first")

    def _put(self, position: Vec3, rotation: Quat, width: float) -> None:
        self._state: _State = (self._now_ns(), position, rotation, width)
        self._history: deque[_State] = deque([self._state], maxlen=256)
        self._newest.clear()
        self._shot: dict[str, int] = {}  # number of each camera's newest frame, from 0
        self._first_ns = self._state[0]

    def _advance(self) -> _State:
        """Let the arm follow its target up to now."""
        t_ns, position, rotation, width = self._state
        now_ns = self._now_ns()
        if now_ns <= t_ns:
            return self._state
        gain = 1.0 - exp(-(now_ns - t_ns) * 1e-9 / self._lag_s)
        goal, turn, openness = self._target
        self._state = (
            now_ns,
            (
                position[0] + gain * (goal[0] - position[0]),
                position[1] + gain * (goal[1] - position[1]),
                position[2] + gain * (goal[2] - position[2]),
            ),
            slerp(rotation, turn, gain),
            width + gain * (openness * OPEN_WIDTH_M - width),
        )
        self._history.append(self._state)
        return self._state

    def _shown(self, t_ns: int) -> _State:
        """Return the newest state not younger than the camera's delay allows."""
        for state in reversed(self._history):
            if state[0] <= t_ns - self._delay_ns:
                return state
        return self._history[0]

    def _frame(self, camera: CameraSpec, t_ns: int) -> CameraFrame:
        newest = self._newest.get(camera.name)
        how = self._frozen.get(camera.name)
        if newest is not None and how == "stamps":
            return newest
        state = self._shown(t_ns)
        number = (state[0] - self._first_ns + EARLY_NS) // self._camera_period_ns
        if newest is not None and number == self._shot[camera.name]:
            return newest
        self._shot[camera.name] = number
        if newest is not None and how == "pixels":
            frame = CameraFrame(state[0], newest.rgb, newest.depth, newest.K, newest.T_world_cam)
        else:
            frame = _render(camera, state)
        self._newest[camera.name] = frame
        return frame


class PointEngine:
    """A System 2 that reads the place out of the instruction: "reach x y z", in metres in W.

    The place is the first three numbers of the latent; the others are zero. Implements
    `openhelix.runtime.core.interfaces.Engine`.

    Args:
        spec: of the latents, at least three numbers wide.
        seed: makes it another model, whose latents have the same shape.
    """

    def __init__(self, spec: LatentSpec = LATENT, seed: int | None = None) -> None:
        self.spec = spec if seed is None else replace(spec, model_id=f"seed {seed}")
        self.calls = 0

    def warm_up(self) -> None:
        """Nothing to warm up."""

    def encode(self, images: Sequence[Any], instructions: Sequence[str]) -> F32:
        """Return latents (B, n_tokens, dim); the images are not looked at.

        Raises:
            ValueError: an instruction is not "reach x y z".
        """
        self.calls += 1
        z = np.zeros((len(instructions), self.spec.n_tokens, self.spec.dim), np.float32)
        for row, text in zip(z, instructions, strict=True):
            word, *numbers = text.split()
            try:
                row[0, :3] = [float(number) for number in numbers]
            except ValueError:
                word = ""
            if word != "reach" or len(numbers) != 3:
                raise ValueError(f"instruction: {text!r} is not 'reach x y z'")
        return z

    def close(self) -> None:
        """Nothing to let go of."""


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return hypot(a[0] - b[0], a[1] - b[1], a[2] - b[2])


def _render(camera: CameraSpec, state: _State) -> CameraFrame:
    """Draw the plane, and the hand as a square at its height, as seen straight down."""
    t_ns, hand, _, _ = state
    rides = camera.name == "gripper"
    eye = (hand[0], hand[1], max(hand[2], TABLE_Z_M) + 0.2) if rides else (0.0, -0.1, 1.6)
    h, w = camera.height, camera.width
    focal = 0.8 * min(h, w)
    K: F64 = np.array([[focal, 0, w / 2], [0, focal, h / 2], [0, 0, 1.0]])
    T: F64 = np.array([[1, 0, 0, eye[0]], [0, -1, 0, eye[1]], [0, 0, -1, eye[2]], [0, 0, 0, 1.0]])
    rgb: U8 = np.empty((h, w, 3), np.uint8)
    metres = (eye[2] - TABLE_Z_M) / focal
    xs = eye[0] + (np.arange(w) + 0.5 - w / 2) * metres
    ys = eye[1] - (np.arange(h) + 0.5 - h / 2) * metres
    # Fine enough stripes that a millimetre under the hand changes pixels.
    rgb[..., 0] = (np.rint(xs * 4000).astype(np.int64) % 256).astype(np.uint8)[None, :]
    rgb[..., 1] = (np.rint(ys * 4000).astype(np.int64) % 256).astype(np.uint8)[:, None]
    rgb[..., 2] = 96
    depth = np.full((h, w), eye[2] - TABLE_Z_M, np.float32)
    if not rides:
        away = eye[2] - hand[2]
        u = int(w / 2 + focal * (hand[0] - eye[0]) / away)
        v = int(h / 2 - focal * (hand[1] - eye[1]) / away)
        size = max(1, int(0.03 * focal / away))
        box = (slice(max(0, v - size), max(0, v + size)), slice(max(0, u - size), max(0, u + size)))
        # Its shade tells the height, so that motion along the optical axis shows as well.
        rgb[box] = (255, 255, int(hand[2] * 4000) % 256)
        depth[box] = away
    return CameraFrame(t_ns, rgb, depth, K, T)
