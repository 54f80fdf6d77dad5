"""Which of a LeRobot robot's features is what: pure data, checked on the way in.

LeRobot speaks in flat dictionaries whose keys, units and frames differ from arm to arm; here
they are stated once, in configuration, instead of guessed in code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from runtime.quaternion import Quat, normalise
from runtime.types import F64

Matrix3 = Annotated[list[list[float]], Field(min_length=3, max_length=3)]
Matrix4 = Annotated[list[list[float]], Field(min_length=4, max_length=4)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GripperMapping(_Section):
    """The gripper's number, in the robot's own unit."""

    key: str
    closed: float
    open: float
    width_open_m: float = 0.08

    @model_validator(mode="after")
    def _two_ends(self) -> GripperMapping:
        if self.open == self.closed:
            raise ValueError("open and closed are the same number")
        return self

    def openness(self, value: float) -> float:
        """Return the robot's number as openness, 0 closed to 1 open."""
        return min(1.0, max(0.0, (value - self.closed) / (self.open - self.closed)))

    def value(self, openness: float) -> float:
        """Return openness as the robot's number."""
        return self.closed + openness * (self.open - self.closed)


class CameraMapping(_Section):
    """One camera: where its pixels are in the observation, and its geometry."""

    key: str
    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    K: Matrix3
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
