"""The arm inside a world: state, inverse kinematics, motors.

Control as CALVIN's: one Bullet null-space IK call a control step with the initial joints as
rest pose, joint position motors with bounded force and speed, fingers driven to open with a
weak and to close with a strong motor. Relative actions move a stored target that only
`reset` synchronises with the arm; absolute actions leave that target alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.playtable.actions import Command
from benchmarks.playtable.bullet import pybullet as p
from benchmarks.playtable.physics import World, euler_from_quaternion, quaternion_from_euler
from benchmarks.playtable.scene import ROBOT_Q0_RAD
from runtime.types import F64

LOWER_RAD = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
UPPER_RAD = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])
FINGER_OPEN_M = 0.04
OPEN_FORCE_N, CLOSE_FORCE_N = 2.0, 200.0
MAX_STEP_M, MAX_STEP_RAD = 0.02, 0.05

_DOF = 9
_IK_LOWER, _IK_UPPER, _IK_RANGE = [-7.0] * _DOF, [7.0] * _DOF, [7.0] * _DOF
_IK_REST = [*ROBOT_Q0_RAD, FINGER_OPEN_M, FINGER_OPEN_M]


class Arm:
    """The Panda of one world.

    Attributes:
        gripper_action: the last commanded gripper state, 1 open or -1 closed.
        target_pos, target_euler: what relative actions add to; m and rad in W.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.gripper_action = 1
        self.target_pos: F64 = np.zeros(3)
        self.target_euler: F64 = np.zeros(3)

    def reset(self, joints: Any, finger_m: float) -> None:
        """Put the arm at `joints` (7) rad and each finger at `finger_m`, and hold it there."""
        self.world.put_arm(joints, finger_m)
        self.world.drive_arm(joints, finger_m, CLOSE_FORCE_N)
        self.gripper_action = 1
        position, quaternion = self.tcp()
        self.target_pos = np.array(position)
        self.target_euler = np.array(euler_from_quaternion(quaternion))

    def apply(self, command: Command) -> None:
        """Set the motors for one control step."""
        values = command.values
        if command.kind == "joint_abs":
            joints: Any = values
        elif command.kind == "joint_rel":
            joints = np.array(self.joints()) + values
        elif command.kind == "cartesian_rel":
            self.target_pos = self.target_pos + MAX_STEP_M * values[:3]
            self.target_euler = self.target_euler + MAX_STEP_RAD * values[3:6]
            joints = self.solve_ik(self.target_pos, quaternion_from_euler(self.target_euler))
        else:
            rotation = values[3:]
            quaternion = quaternion_from_euler(rotation) if len(rotation) == 3 else rotation
            joints = self.solve_ik(values[:3], quaternion)
        self.gripper_action = command.gripper
        if command.gripper == 1:
            self.world.drive_arm(joints, FINGER_OPEN_M, OPEN_FORCE_N)
        else:
            self.world.drive_arm(joints, 0.0, CLOSE_FORCE_N)

    def solve_ik(self, position_m: Any, quaternion: Any) -> F64:
        """Joints (7) rad that bring the TCP towards a pose in W, within the joint limits."""
        w = self.world
        joints = p.calculateInverseKinematics(
            w.robot,
            w.tcp,
            position_m,
            quaternion,
            _IK_LOWER,
            _IK_UPPER,
            _IK_RANGE,
            _IK_REST,
            physicsClientId=w.client,
        )
        return np.minimum(np.maximum(joints[:7], LOWER_RAD), UPPER_RAD)

    def tcp(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Position (3) m and quaternion xyzw (4) of the tool centre point in W."""
        return self.world.tcp_pose()

    def joints(self) -> list[float]:
        """The seven arm joints, rad."""
        return list(self.world.arm_joints()[:7])

    def fingers(self) -> tuple[float, float]:
        """Positions of the two fingers, m."""
        left, right = self.world.arm_joints()[7:]
        return left, right
