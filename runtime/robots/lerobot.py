"""Any LeRobot robot as a robot of this runtime.

LeRobot uses flat dictionaries whose keys, units and frames differ from arm to arm, so their
meaning is stated once, as a mapping in the configuration, and checked against the robot's own
feature lists before anything moves. An arm that takes joint targets needs a
kinematics class besides.

LeRobot needs Python 3.12, so its arm runs in a process under an interpreter of its own
(`lerobot_child.py`): the one that `python` names, or else OPENHELIX_LEROBOT_PYTHON, or else the
environment `lerobot-venv` in the project's cache folder. Where none of them is and `import lerobot`
works here, the arm is made in this process.

LeRobot does not stamp its state: that is done on return. Frames have the stamp of the camera that
took them (`latest_timestamp`); where it keeps none, a picture counts from when it was first
returned, less the camera's stated latency. A camera slower than the loop gives each picture several
times (`read_latest`), which is no new picture.

    robot:
      name: lerobot
      options:
        config:                         # as LeRobot's own --robot.type, --robot.port …
          type: so101_follower
          port: /dev/ttyACM0
          id: left
          use_degrees: true
          cameras:
            front: {type: opencv, index_or_path: 0, width: 640, height: 480, fps: 30}
        mapping:
          joints: [shoulder_pan.pos, shoulder_lift.pos, elbow_flex.pos, wrist_flex.pos, wrist_roll.pos]
          joint_unit_rad: 0.017453292519943295
          kinematics: my_package.so101:Kinematics
          gripper: {key: gripper.pos, closed: 0, open: 100, width_open_m: 0.08}
          cameras:
            static: {key: front, height: 480, width: 640, K: [...], T_world_cam: [...]}
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import time
import weakref
from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from openhelix.runtime.core.clock import Clock, MonotonicClock
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.interfaces import (
    F64,
    U8,
    Action,
    ActionSpec,
    CameraFrame,
    CameraSpec,
    Observation,
    RobotSpec,
    check_action,
)
from openhelix.runtime.core.paths import cache_folder
from openhelix.runtime.core.plugins import resolve
from openhelix.runtime.core.quaternion import (
    IDENTITY,
    Quat,
    conjugate,
    from_rotation_vector,
    matrix,
    multiply,
    normalise,
    rotation_vector,
)
from openhelix.runtime.robots import lerobot_child
from openhelix.runtime.robots.base import NotConnected, Robot, RobotError
from openhelix.runtime.robots.pipe import end, pack, receive, start
from openhelix.runtime.robots.rgbd import Device, RgbdCamera

log = logging.getLogger(__name__)
Matrix3 = Annotated[list[list[FiniteFloat]], Field(min_length=3, max_length=3)]
Matrix4 = Annotated[list[list[FiniteFloat]], Field(min_length=4, max_length=4)]
REPEAT_NS = (
    500_000_000  # a picture that returns for longer is a new one of a scene that stands still
)


# ------------------------------------------------------------------------------------------------
# The mapping: pure data, checked on the way in


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GripperMapping(_Section):
    """The gripper's number, in the robot's own unit."""

    key: str
    closed: FiniteFloat
    open: FiniteFloat
    width_open_m: FiniteFloat = 0.08

    @model_validator(mode="after")
    def _two_ends(self) -> GripperMapping:
        if self.open == self.closed:
            raise ValueError("open and closed are the same number")
        return self

    def openness(self, value: float) -> float:
        """Return the robot's number as openness, 0 closed to 1 open.

        Raises:
            RobotError: the number is none; a gripper that cannot be read is not a closed one.
        """
        if not isfinite(value):
            raise RobotError(f"lerobot: {self.key} is {value}")
        return min(1.0, max(0.0, (value - self.closed) / (self.open - self.closed)))

    def value(self, openness: float) -> float:
        """Return openness as the robot's number."""
        return self.closed + openness * (self.open - self.closed)


class CameraMapping(_Section):
    """One camera: where its pixels are in the observation, and its geometry.

    Or a camera of its own beside LeRobot's, which `rgbd.py` reads with its maker's library: the one
    way to a depth image that lies on the colour image.
    """

    key: str = ""
    device: Device | None = None  # instead of `key`
    serial: str = ""  # of `device`; empty takes the only one
    fps: Annotated[int, Field(ge=1)] = 30  # of `device`
    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    K: Matrix3 | None = None  # None: as `device` says
    T_world_cam: Matrix4 | None = None  # a camera that stands still
    T_tcp_cam: Matrix4 | None = None  # a camera on the hand
    depth_key: str | None = None
    depth_unit_m: float = 0.001  # metres in one unit of the depth image
    latency_s: Annotated[float, Field(ge=0)] = 0.0  # age of a frame when it is returned

    @model_validator(mode="after")
    def _one_place(self) -> CameraMapping:
        if (self.T_world_cam is None) == (self.T_tcp_cam is None):
            raise ValueError(
                "give one of T_world_cam (it stands still) and T_tcp_cam (on the hand)"
            )
        if bool(self.key) == (self.device is not None):
            raise ValueError("give one of key (LeRobot reads it) and device (its maker's library)")
        if self.K is None and self.device is None:
            raise ValueError("K: the intrinsics of a camera that LeRobot reads must be given")
        if self.device is not None and self.depth_key is not None:
            raise ValueError("depth_key: of a camera that LeRobot reads; device has its own depth")
        return self


class LeRobotMapping(_Section):
    """Which feature is what."""

    joints: tuple[str, ...] = ()  # joint positions, in observation and action
    joint_unit_rad: float = 1.0  # radians in one unit of the robot's; pi/180 for degrees
    tcp: tuple[str, ...] = ()  # x, y, z (m) and a rotation vector (3, rad) or quaternion xyzw (4)
    kinematics: str | None = None  # "module:Class", for an arm that takes joint targets
    kinematics_options: dict[str, Any] = {}
    gripper: GripperMapping
    cameras: dict[str, CameraMapping] = {}
    T_world_base: Matrix4 | None = None  # where the arm's base stands in W; None: at its origin

    @model_validator(mode="after")
    def _a_pose(self) -> LeRobotMapping:
        if len(self.tcp) not in (0, 6, 7):
            raise ValueError("tcp: six keys (with a rotation vector) or seven (with a quaternion)")
        if not self.tcp and not (self.joints and self.kinematics):
            raise ValueError("give tcp, or joints together with kinematics")
        return self


def validated(mapping: LeRobotMapping | Mapping[str, Any]) -> LeRobotMapping:
    """Return the mapping; ValueError in one line names what is wrong."""
    if isinstance(mapping, LeRobotMapping):
        return mapping
    try:
        return LeRobotMapping.model_validate(dict(mapping))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(("robot", "options", "mapping", *(str(part) for part in first["loc"])))
        raise ValueError(f"{where}: {first['msg']}") from None


def rigid(rows: list[list[float]] | None) -> tuple[F64, Quat]:
    """Return a transform as a matrix (4, 4) and its rotation as a quaternion."""
    T: F64 = np.eye(4) if rows is None else np.array(rows, np.float64)
    R = T[:3, :3]
    if T.shape != (4, 4) or not np.allclose(R @ R.T, np.eye(3), atol=1e-4):
        raise ValueError("robot.options.mapping.T_world_base: not a rigid transform (4, 4)")
    # Four times the outer product of (x, y, z, w) with itself, of which the largest row is
    # the quaternion without any cancellation.
    x, y, z = R[0], R[1], R[2]
    K = np.array(
        [
            [1 + x[0] - y[1] - z[2], x[1] + y[0], x[2] + z[0], z[1] - y[2]],
            [x[1] + y[0], 1 - x[0] + y[1] - z[2], y[2] + z[1], x[2] - z[0]],
            [x[2] + z[0], y[2] + z[1], 1 - x[0] - y[1] + z[2], y[0] - x[1]],
            [z[1] - y[2], x[2] - z[0], y[0] - x[1], 1 + x[0] + y[1] + z[2]],
        ]
    )
    return T, normalise(K[int(np.argmax(np.diag(K)))].tolist())


# ------------------------------------------------------------------------------------------------
# The driver


class Kinematics(Protocol):
    """Joints (rad) to the TCP in the arm's base frame, and back."""

    def forward(self, joints: F64) -> F64:
        """Return the TCP pose (7,): xyz in metres, quaternion xyzw."""

    def inverse(self, pose: F64, joints: F64) -> F64:
        """Return joints (n,) that reach `pose`, near `joints`; ValueError if there are none."""


class LeRobotAdapter(Robot):
    """A LeRobot `Robot` object, driven by end-effector targets.

    Args:
        mapping: which feature is what; see `LeRobotMapping`.
        robot: the LeRobot object; or, from a configuration,
        config: the fields of LeRobot's configuration of the arm, its `type` among them;
        target: `"module:Class"` of an arm that LeRobot does not know by a type,
        config_target: `"module:Class"` of its config; without one, `config` is given to
            `target` itself.
        python: interpreter that has LeRobot; None looks for one, see above.
        hz: control rate.
        clock: stamps the observations; the host's monotonic clock by default.

    Raises:
        ConfigError: LeRobot is not installed, or cannot make the arm.
        ValueError: the mapping does not fit the robot's features.
    """

    def __init__(
        self,
        mapping: LeRobotMapping | Mapping[str, Any],
        robot: Any = None,
        target: str | None = None,
        config_target: str | None = None,
        config: Mapping[str, Any] | None = None,
        hz: float = 30.0,
        clock: Clock | None = None,
        python: str | None = None,
    ) -> None:
        self._map = validated(mapping)
        self._robot = (
            robot if robot is not None else _make(target, config_target, config or {}, python)
        )
        self._kinematics: Kinematics | None = None
        if not self._map.tcp and self._map.kinematics:
            self._kinematics = resolve(self._map.kinematics)(**self._map.kinematics_options)
        self._T_world_base = rigid(self._map.T_world_base)
        self._now_ns = (clock or MonotonicClock()).now_ns
        self._opens = True
        self._shown: dict[str, CameraFrame] = {}  # the newest picture of each camera
        self._own: dict[str, RgbdCamera] = {}  # those that LeRobot does not read
        self._tcp: F64 | None = None
        self._near: F64 | None = None
        self._spec = RobotSpec(
            cameras=tuple(
                CameraSpec(
                    name,
                    camera.height,
                    camera.width,
                    depth=camera.depth_key is not None or camera.device is not None,
                )
                for name, camera in self._map.cameras.items()
            ),
            action=ActionSpec(hz=hz),
        )
        self._check_features()

    @property
    def spec(self) -> RobotSpec:
        return self._spec

    @property
    def n_joints(self) -> int:
        return len(self._map.joints)

    @property
    def is_connected(self) -> bool:
        return bool(self._robot.is_connected)

    def connect(self) -> None:
        """Connect; an uncalibrated arm is refused, since calibrating moves it by hand."""
        if self.is_connected:
            return
        try:
            self._robot.connect(calibrate=False)
        except (OSError, RuntimeError) as error:
            raise RobotError(f"lerobot: {error}") from error
        if not self._robot.is_calibrated:
            self._robot.disconnect()
            raise RobotError("lerobot: the arm is not calibrated; run lerobot-calibrate first")
        try:
            for name, camera in self._map.cameras.items():
                if camera.device is not None:
                    self._own[name] = RgbdCamera(
                        camera.device, camera.serial, camera.width, camera.height, camera.fps
                    )
        except RobotError:
            self.disconnect()
            raise

    def disconnect(self) -> None:
        while self._own:
            self._own.popitem()[1].close()
        if self.is_connected:
            self.stop("disconnect")
            self._robot.disconnect()

    def get_observation(self) -> Observation:
        data, taken = self._read()
        t_ns = self._now_ns()
        taken_ns = {name: self._taken_ns(c, taken) for name, c in self._map.cameras.items()}
        joints = self._near = self._joints(data)
        self._tcp = self._to_world(self._pose(data, joints))
        openness = self._map.gripper.openness(float(data[self._map.gripper.key]))
        return Observation(
            t_ns=t_ns,
            frames={
                name: self._own_frame(name, camera)
                if camera.device is not None
                else self._frame(name, camera, data, t_ns, taken_ns[name])
                for name, camera in self._map.cameras.items()
            },
            tcp_pose=self._tcp,
            gripper_width=openness * self._map.gripper.width_open_m,
            gripper_open=self._opens,
            joints=joints,
        )

    def send_action(self, action: Action) -> Action:
        if not self.is_connected:
            raise NotConnected("lerobot: connect() first")
        check_action(action)
        pose = np.asarray(action.pose, np.float64)
        command = self._command(self._to_base(pose))
        command[self._map.gripper.key] = self._map.gripper.value(action.gripper)
        try:
            sent = self._robot.send_action(command)
        except (OSError, RuntimeError) as error:
            raise RobotError(f"lerobot: {error}") from error
        self._opens = action.gripper >= 0.5
        sent = command | dict(sent or {})
        return Action(
            pose=self._to_world(self._pose(sent, self._joints(sent))),
            gripper=self._map.gripper.openness(float(sent[self._map.gripper.key])),
            instruction_id=action.instruction_id,
            t_ns=action.t_ns,
            info=action.info,
        )

    def stop(self, reason: str) -> None:
        """Command the positions that the arm has now; LeRobot has no stop of its own."""
        log.warning("lerobot: stopping: %s", reason)
        with contextlib.suppress(Exception):
            data, _ = self._read()
            keys = self._map.tcp or self._map.joints
            self._robot.send_action({key: data[key] for key in (*keys, self._map.gripper.key)})

    def hold_action(self, last: Action | None) -> Action:
        """Repeat the last target, which a position-controlled arm holds without sagging."""
        if last is not None:
            return Action(np.array(last.pose), last.gripper, last.instruction_id)
        pose = self._tcp if self._tcp is not None else self.get_observation().tcp_pose
        return Action(np.array(pose), 1.0 if self._opens else 0.0)

    # -- inside ---------------------------------------------------------------------------

    def _check_features(self) -> None:
        """Refuse a mapping that names what the robot does not have."""
        has, takes = self._robot.observation_features, self._robot.action_features
        driven = (*(self._map.tcp or self._map.joints), self._map.gripper.key)
        read = {*driven, *self._map.joints}
        for camera in self._map.cameras.values():
            if camera.device is not None:
                continue
            read |= {camera.key} | ({camera.depth_key} if camera.depth_key else set())
        for features, keys, verb in ((has, sorted(read), "has"), (takes, driven, "takes")):
            for key in keys:
                if key not in features:
                    valid = ", ".join(features)
                    raise ValueError(f"robot.options.mapping: no {key!r}; the robot {verb} {valid}")
        left = set(takes) - set(driven)
        if left:
            raise ValueError(
                f"robot.options.mapping: the robot also takes {', '.join(sorted(left))}, which "
                "nothing drives"
            )

    def _read(self) -> tuple[dict[str, Any], dict[str, float]]:
        """Return the arm's numbers and pictures, and when its cameras took their newest."""
        if not self.is_connected:
            raise NotConnected("lerobot: connect() first")
        try:
            if isinstance(self._robot, OutsideArm):
                return self._robot.observe()
            taken = lerobot_child.stamps(self._robot)
            return dict(self._robot.get_observation()), taken
        except (OSError, RuntimeError) as error:
            raise RobotError(f"lerobot: {error}") from error

    def _joints(self, data: Mapping[str, Any]) -> F64:
        values = [_number(data, key) for key in self._map.joints if key in data]
        return np.array(values, np.float64) * self._map.joint_unit_rad

    def _pose(self, data: Mapping[str, Any], joints: F64) -> F64:
        """Return the TCP (7,) in the base frame."""
        if self._kinematics is not None:
            return np.asarray(self._kinematics.forward(joints), np.float64)
        values = [_number(data, key) for key in self._map.tcp]
        rotation = values[3:]
        q = normalise(rotation) if len(rotation) == 4 else from_rotation_vector(rotation)
        return np.array((*values[:3], *q))

    def _command(self, pose: F64) -> dict[str, float]:
        """Return the robot's own action for a TCP target (7,) in the base frame."""
        if self._kinematics is not None:
            # The last observation's joints: asking the arm again would cost a bus round trip.
            near = self._near if self._near is not None else self._joints(self._read()[0])
            joints = np.asarray(self._kinematics.inverse(pose, near)) / self._map.joint_unit_rad
            return dict(zip(self._map.joints, joints.tolist(), strict=True))
        q = normalise(pose[3:].tolist())
        rotation = q if len(self._map.tcp) == 7 else rotation_vector(IDENTITY, q)
        return dict(zip(self._map.tcp, (*pose[:3].tolist(), *rotation), strict=True))

    def _to_world(self, pose: F64) -> F64:
        T, q = self._T_world_base
        turned = multiply(q, normalise(pose[3:].tolist()))
        return np.array((*(T[:3, :3] @ pose[:3] + T[:3, 3]), *turned))

    def _to_base(self, pose: F64) -> F64:
        T, q = self._T_world_base
        turned = multiply(conjugate(q), normalise(pose[3:].tolist()))
        return np.array((*(T[:3, :3].T @ (pose[:3] - T[:3, 3])), *turned))

    def _taken_ns(self, camera: CameraMapping, taken: Mapping[str, float]) -> int | None:
        """Return when a camera took its newest picture, on our clock, if it says so."""
        stamp = taken.get(camera.key)
        if stamp is None:
            return None
        age_s = time.perf_counter() - stamp  # LeRobot's cameras count by this clock
        return self._now_ns() - round(age_s * 1e9)

    def _frame(
        self,
        name: str,
        camera: CameraMapping,
        data: Mapping[str, Any],
        t_ns: int,
        taken_ns: int | None,
    ) -> CameraFrame:
        rgb = np.asarray(data[camera.key], np.uint8)
        seen_ns = t_ns - round(camera.latency_s * 1e9)
        before = self._shown.get(name)
        if taken_ns is not None:
            # The two clocks are read one after the other: what is a microsecond apart is one time.
            if before is not None and abs(taken_ns - before.t_ns) < 1_000_000:
                return before
            seen_ns = taken_ns
        elif (
            before is not None
            and seen_ns - before.t_ns < REPEAT_NS
            and np.array_equal(before.rgb, rgb)
        ):
            return before
        self._shown[name] = frame = self._picture(camera, data, rgb, seen_ns)
        return frame

    def _own_frame(self, name: str, camera: CameraMapping) -> CameraFrame:
        """Return the newest picture of a camera that LeRobot does not read."""
        seen, before = self._own[name].latest(), self._shown.get(name)
        if before is not None and before.t_ns == seen.t_ns:
            return before
        K = seen.K if camera.K is None else np.array(camera.K, np.float64)
        frame = CameraFrame(seen.t_ns, seen.rgb, seen.depth, K, self._placed(camera))
        self._shown[name] = frame
        return frame

    def _picture(
        self, camera: CameraMapping, data: Mapping[str, Any], rgb: U8, t_ns: int
    ) -> CameraFrame:
        depth = None
        if camera.depth_key is not None:
            raw = np.squeeze(np.asarray(data[camera.depth_key]))
            depth = raw.astype(np.float32) * np.float32(camera.depth_unit_m)
        return CameraFrame(
            t_ns=t_ns,
            rgb=np.array(rgb),  # the driver may fill its own again
            depth=depth,
            K=np.array(camera.K, np.float64),
            T_world_cam=self._placed(camera),
        )

    def _placed(self, camera: CameraMapping) -> F64:
        """Return T_world_cam (4, 4) at the last observation's TCP."""
        if camera.T_world_cam is not None:
            return np.array(camera.T_world_cam, np.float64)
        assert self._tcp is not None  # set by get_observation just before
        T_world_tcp: F64 = np.eye(4)
        T_world_tcp[:3, :3] = matrix(normalise(self._tcp[3:].tolist()))
        T_world_tcp[:3, 3] = self._tcp[:3]
        return T_world_tcp @ np.array(camera.T_tcp_cam, np.float64)


def _number(data: Mapping[str, Any], key: str) -> float:
    value = float(data[key])
    if not isfinite(value):
        raise RobotError(f"lerobot: {key} is {value}")
    return value


# ------------------------------------------------------------------------------------------------
# The arm under an interpreter of its own

PYTHON = "OPENHELIX_LEROBOT_PYTHON"
START_TIMEOUT_S = 120.0  # torch is imported on the way
CONNECT_TIMEOUT_S = 60.0  # cameras warm up
CALL_TIMEOUT_S = 1.0
CLOSE_TIMEOUT_S = 5.0
LAST_LINES = 4


def install() -> str:
    """How to install LeRobot, as commands."""
    folder = cache_folder() / "lerobot-venv"
    return (
        f"python3.12 -m venv {folder}, then {folder}/bin/pip install lerobot with your arm's extra, "
        f"or name an interpreter that has it in {PYTHON}"
    )


class OutsideArm:
    """A LeRobot `Robot` in a process under another interpreter; attributes and calls as there.

    Args:
        python: the interpreter.
        target, config_target, config: as of `LeRobotAdapter`.

    Raises:
        ConfigError: it does not start, or LeRobot cannot make the arm.
    """

    def __init__(
        self,
        python: str,
        target: str | None,
        config_target: str | None,
        config: Mapping[str, Any],
    ) -> None:
        self.is_connected, self.is_calibrated = False, False
        about = {"target": target, "config_target": config_target, "config": dict(config)}
        try:
            child = start(python, lerobot_child.__file__, json.dumps(about))
        except OSError as error:
            raise ConfigError(f"robot.options.python: {python!r}: {error.strerror}") from error
        self._process, self._pipe, self._log = child
        # Which disconnects the arm first.
        self.close = weakref.finalize(self, end, *child, CLOSE_TIMEOUT_S)
        try:
            found = self._receive(START_TIMEOUT_S)
        except RuntimeError as error:
            self.close()
            raise ConfigError(f"robot.options: {error}; it is run by {python}") from error
        self.observation_features = {k: tuple(v) or float for k, v in found["observation"].items()}
        self.action_features = dict.fromkeys(found["action"], float)
        self.is_calibrated = bool(found["calibrated"])

    def connect(self, calibrate: bool = False) -> None:
        """Connect to the arm and its cameras; never calibrates."""
        self.is_calibrated = self._call("connect", timeout_s=CONNECT_TIMEOUT_S)["calibrated"]
        self.is_connected = True

    def disconnect(self) -> None:
        """Let go of the arm; its process stays for the next `connect`. Never raises."""
        self.is_connected = False
        if self.close.alive:  # a process that has ended holds nothing
            try:
                self._call("disconnect", timeout_s=CONNECT_TIMEOUT_S)
            except RuntimeError as error:
                log.warning("lerobot: disconnect: %s", error)

    def observe(self) -> tuple[dict[str, Any], dict[str, float]]:
        """Return numbers and pictures by key, and the cameras' stamps in `time.perf_counter`'s s."""
        reply = self._call("observe")
        return reply["data"], reply["taken"]

    def send_action(self, action: Mapping[str, float]) -> dict[str, float]:
        """Send targets by key; return what LeRobot sent."""
        sent: dict[str, float] = self._call("send", action=dict(action))["sent"]
        return sent

    def _call(self, name: str, timeout_s: float = CALL_TIMEOUT_S, **more: Any) -> dict[str, Any]:
        if not self.close.alive:
            raise RuntimeError("its process has ended")
        self._pipe.settimeout(timeout_s)
        try:
            self._pipe.sendall(pack({"call": name, **more}))
        except OSError as error:
            raise self._died() from error
        return self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        self._pipe.settimeout(timeout_s)
        try:
            reply: dict[str, Any] = receive(self._pipe)
        except TimeoutError as error:
            # An answer that comes later would be taken for the next one's.
            self._process.kill()
            raise self._died(f"did not answer within {timeout_s:g} s") from error
        except (EOFError, OSError) as error:
            raise self._died() from error
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply

    def _died(self, what: str = "") -> RuntimeError:
        """Reap the process and say what it last said."""
        self.is_connected = False
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_TIMEOUT_S)
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        code = self._process.poll()
        self.close()
        last = " | ".join(lines[-LAST_LINES:])
        return RuntimeError(
            f"its process {what or f'ended with status {code}'}; it last said: {last}"
        )


def interpreter(python: str | None = None) -> str | None:
    """Return the interpreter to run LeRobot in; None where it is this one.

    Raises:
        ConfigError: one is named and cannot be run.
    """
    own = cache_folder() / "lerobot-venv" / "bin" / "python"
    named = python or os.environ.get(PYTHON) or (str(own) if own.is_file() else None)
    if named is None:
        return None
    found = shutil.which(os.path.expanduser(named))
    if found is None:
        where = "robot.options.python" if python else PYTHON
        raise ConfigError(f"{where}: {named!r} is no interpreter; {install()}")
    return found


def _make(
    target: str | None, config_target: str | None, config: Mapping[str, Any], python: str | None
) -> Any:
    """Return the LeRobot object that a configuration names, here or in a process of its own."""
    if not target and "type" not in config:
        raise ConfigError(
            "robot.options.config: type names the arm, for example so101_follower (or name its "
            "class in robot.options.target as 'module:Class')"
        )
    found = interpreter(python)
    if found is not None:
        return OutsideArm(found, target, config_target, config)
    try:
        return lerobot_child.make_arm(target, config_target, config)
    except ImportError as error:
        if error.name in ("lerobot", "draccus"):
            raise ConfigError(f"robot: LeRobot is not installed: {install()}") from None
        raise ConfigError(f"robot.options: {' '.join(str(error).split())}") from error
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"robot.options: {' '.join(str(error).split())}") from error
