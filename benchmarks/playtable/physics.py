"""The physics world: one Bullet client with table, blocks, floor and arm.

Every call names its client, so any number of worlds live in one process. What a fresh
process would compute, a reset world computes too: `rebuild` empties the client and loads
everything in the same order, because Bullet otherwise keeps contact caches, broadphase
trees and solver state from earlier episodes, and those change the last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pybullet as p

from benchmarks.playtable import urdf
from benchmarks.playtable.scene import (
    BUTTON_FORCE_N,
    DOOR_FRICTION_N,
    GRAVITY,
    PHYSICS_HZ,
    ROBOT_BASE_M,
    Scene,
)

Contact = tuple[Any, ...]
SubstepHook = Callable[["World"], None]

ARM_JOINTS = tuple(range(7))
GEAR_ERP, GEAR_FORCE_N = 0.1, 50.0
BUTTON, SWITCH, SLIDE, DRAWER = 0, 1, 2, 3  # table joints


class World:
    """Bodies and their handles in one Bullet client.

    Attributes:
        client: the Bullet client's number, -1 once closed.
        robot, table: body ids; `blocks` maps a block's name to its body id.
        links: link indices of the arm by name.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.client: int = p.connect(p.DIRECT)
        if self.client < 0:
            raise RuntimeError("Bullet gives no further physics client")
        self.hooks: list[SubstepHook] = []
        self.rebuild()

    def rebuild(self) -> None:
        """Empty the client and load everything anew, as in a fresh process."""
        c = self.client
        p.resetSimulation(physicsClientId=c)
        p.setPhysicsEngineParameter(deterministicOverlappingPairs=1, physicsClientId=c)
        p.setTimeStep(1.0 / PHYSICS_HZ, physicsClientId=c)
        p.setGravity(0, 0, GRAVITY, physicsClientId=c)
        self.robot: int = p.loadURDF(
            str(urdf.panda_urdf()), ROBOT_BASE_M, useFixedBase=True, physicsClientId=c
        )
        # An invisible, untouchable body keeps the numbering of CALVIN's bodies.
        self.stand: int = p.createMultiBody(basePosition=(0, 0, -1), physicsClientId=c)
        self.links = {
            p.getJointInfo(self.robot, i, physicsClientId=c)[12].decode(): i
            for i in range(p.getNumJoints(self.robot, physicsClientId=c))
        }
        self.tcp = self.links["tcp"]
        self.fingers = (self.links["panda_leftfinger"], self.links["panda_rightfinger"])
        self._couple_fingers()
        self.blocks: dict[str, int] = {}
        for i, (name, length) in enumerate(self.scene.block_lengths):
            self.blocks[name] = p.loadURDF(
                str(urdf.block_urdf(length)), (0.1 * i - 0.1, -0.1, 0.6), physicsClientId=c
            )
        self.table: int = p.loadURDF(
            str(urdf.table_urdf(self.scene)), useFixedBase=True, physicsClientId=c
        )
        self._start_mechanisms()
        self.floor: int = p.loadURDF(str(urdf.floor_urdf()), useFixedBase=True, physicsClientId=c)

    def _couple_fingers(self) -> None:
        left, right = self.fingers
        gear = p.createConstraint(
            self.robot,
            left,
            self.robot,
            right,
            jointType=p.JOINT_GEAR,
            jointAxis=(1, 0, 0),
            parentFramePosition=(0, 0, 0),
            childFramePosition=(0, 0, 0),
            physicsClientId=self.client,
        )
        p.changeConstraint(
            gear, gearRatio=-1, erp=GEAR_ERP, maxForce=GEAR_FORCE_N, physicsClientId=self.client
        )

    def _start_mechanisms(self) -> None:
        for joint in (SWITCH, SLIDE, DRAWER):
            p.setJointMotorControl2(
                self.table,
                joint,
                p.VELOCITY_CONTROL,
                force=DOOR_FRICTION_N,
                physicsClientId=self.client,
            )
        p.setJointMotorControl2(
            self.table,
            BUTTON,
            p.POSITION_CONTROL,
            targetPosition=0.0,
            force=BUTTON_FORCE_N,
            physicsClientId=self.client,
        )

    def substep(self) -> None:
        """Advance one physics step (1/240 s), hooks first."""
        for hook in self.hooks:
            hook(self)
        p.stepSimulation(physicsClientId=self.client)

    def contacts(self, body: int) -> tuple[Contact, ...]:
        """Contact tuples of one body, seen from it: `c[2]` the other body, `c[4]` its link."""
        return p.getContactPoints(bodyA=body, physicsClientId=self.client) or ()

    def touching(self, body_a: int, body_b: int) -> bool:
        """Whether two bodies are in contact."""
        return bool(p.getContactPoints(bodyA=body_a, bodyB=body_b, physicsClientId=self.client))

    def table_joint(self, joint: int) -> float:
        """Position of one of the table's joints, m."""
        return float(p.getJointState(self.table, joint, physicsClientId=self.client)[0])

    def set_table_joint(self, joint: int, position_m: float) -> None:
        """Put a joint of the table somewhere, at rest."""
        p.resetJointState(self.table, joint, position_m, physicsClientId=self.client)

    def block_pose(self, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Position (3) m and quaternion xyzw (4) of a block."""
        pos, orn = p.getBasePositionAndOrientation(self.blocks[name], physicsClientId=self.client)
        return pos, orn

    def set_block_pose(self, name: str, position_m: Any, quaternion: Any) -> None:
        """Put a block somewhere, at rest."""
        p.resetBasePositionAndOrientation(
            self.blocks[name], position_m, quaternion, physicsClientId=self.client
        )

    def block_velocity(self, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Linear (3) m/s and angular (3) rad/s velocity of a block."""
        linear, angular = p.getBaseVelocity(self.blocks[name], physicsClientId=self.client)
        return linear, angular

    def set_block_velocity(self, name: str, linear: Any, angular: Any = (0.0, 0.0, 0.0)) -> None:
        """Give a block a velocity."""
        p.resetBaseVelocity(self.blocks[name], linear, angular, physicsClientId=self.client)

    def robot_touches(self, name: str) -> bool:
        """Whether any part of the arm touches the block."""
        return self.touching(self.robot, self.blocks[name])

    def close(self) -> None:
        """Give the client back; safe to call again."""
        if self.client >= 0:
            client, self.client = self.client, -1
            if p.isConnected(client):
                p.disconnect(physicsClientId=client)


def euler_from_quaternion(quaternion: Any) -> tuple[float, float, float]:
    """Bullet's own xyz Euler angles, so that observations agree to the bit."""
    x, y, z = p.getEulerFromQuaternion(quaternion)
    return x, y, z


def quaternion_from_euler(euler: Any) -> tuple[float, float, float, float]:
    """Bullet's own quaternion xyzw from xyz Euler angles."""
    x, y, z, w = p.getQuaternionFromEuler(euler)
    return x, y, z, w
