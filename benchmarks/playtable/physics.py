"""The physics world: one Bullet client with table, blocks, floor and arm.

Every call names its client, so any number of worlds live in one process. What a fresh
process would compute, a reset world computes too: `rebuild` empties the client and loads
everything in the same order (10 ms), because Bullet otherwise keeps contact caches,
broadphase trees and solver state from earlier episodes, and those change the last bits.

For the same reason a copy of positions and velocities does not continue to the same bits
(neither does Bullet's own saveState once the arm touches something). So whatever changes
the world goes through a method that notes it in `journal`, and `replay` of a journal into a
rebuilt world is the exact state again, at about the cost of simulating it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.playtable import urdf
from benchmarks.playtable.bullet import pybullet as p
from benchmarks.playtable.scene import (
    BUTTON_FORCE_N,
    DOOR_FRICTION_N,
    GRAVITY,
    PHYSICS_HZ,
    ROBOT_BASE_M,
    TABLE_LINKS,
    Scene,
)

Contact = tuple[Any, ...]
SubstepHook = Callable[["World"], None]
Entry = tuple[Any, ...]

ARM_JOINTS = tuple(range(7))
ARM_FORCE_N, ARM_SPEED_RAD_S, FINGER_SPEED_M_S = 200.0, 2.0, 1.0
GEAR_ERP, GEAR_FORCE_N = 0.1, 50.0
BUTTON, SWITCH, SLIDE, DRAWER = TABLE_JOINTS = (0, 1, 2, 3)  # of the table


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
        self.journal: list[Entry] = []
        self._memo: dict[str, Any] = {}  # what was read since the world last changed
        self.rebuild()

    def rebuild(self) -> None:
        """Empty the client and load everything anew, as in a fresh process."""
        c = self.client
        self.journal = []
        self._memo = {}
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
                str(urdf.block_urdf(length)),
                (0.1 * i - 0.1, -0.1, 0.6),
                useMaximalCoordinates=1,  # a plain rigid body: the same motion, 20 % cheaper
                physicsClientId=c,
            )
        self.table: int = p.loadURDF(
            str(urdf.table_urdf(self.scene)), useFixedBase=True, physicsClientId=c
        )
        self._start_mechanisms()
        self.floor: int = p.loadURDF(str(urdf.floor_urdf()), useFixedBase=True, physicsClientId=c)
        self._load_frame()

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

    def _load_frame(self) -> None:
        """The table's fixed part; `contacts` reports it as the table's base link."""
        self.frame: int = p.loadURDF(
            str(urdf.table_urdf(self.scene).with_name("frame.urdf")),
            useFixedBase=True,
            useMaximalCoordinates=1,
            physicsClientId=self.client,
        )
        for link in TABLE_LINKS.values():
            p.setCollisionFilterPair(
                self.table, self.frame, link, -1, 0, physicsClientId=self.client
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

    def _note(self, entry: Entry) -> None:
        self.journal.append(entry)
        if self._memo:
            self._memo = {}

    def _read(self, key: str, read: Callable[[], Any]) -> Any:
        """What `read` returns, asked of Bullet once for each state of the world."""
        if key not in self._memo:
            self._memo[key] = read()
        return self._memo[key]

    def substep(self) -> None:
        """Advance one physics step (1/240 s), hooks first."""
        for hook in tuple(self.hooks):
            hook(self)
        p.stepSimulation(physicsClientId=self.client)
        self._note(("substep",))

    def drive_arm(self, joints_rad: Any, fingers_m: float, finger_force_n: float) -> None:
        """Set the position motors of the seven arm joints and of both fingers."""
        targets = tuple(float(angle) for angle in joints_rad)
        for joint, angle in zip(ARM_JOINTS, targets, strict=True):
            p.setJointMotorControl2(
                self.robot,
                joint,
                p.POSITION_CONTROL,
                targetPosition=angle,
                force=ARM_FORCE_N,
                maxVelocity=ARM_SPEED_RAD_S,
                physicsClientId=self.client,
            )
        for finger in self.fingers:
            p.setJointMotorControl2(
                self.robot,
                finger,
                p.POSITION_CONTROL,
                targetPosition=fingers_m,
                force=finger_force_n,
                maxVelocity=FINGER_SPEED_M_S,
                physicsClientId=self.client,
            )
        self._note(("drive_arm", targets, fingers_m, finger_force_n))

    def put_arm(self, joints_rad: Any, finger_m: float) -> None:
        """Put the arm somewhere, at rest."""
        targets = tuple(float(angle) for angle in joints_rad)
        for joint, angle in zip(ARM_JOINTS, targets, strict=True):
            p.resetJointState(self.robot, joint, angle, physicsClientId=self.client)
        for finger in self.fingers:
            p.resetJointState(self.robot, finger, finger_m, physicsClientId=self.client)
        self._note(("put_arm", targets, finger_m))

    def replay(self, journal: Sequence[Entry]) -> None:
        """Bring a world to the state that another one (of this scene) had with `journal`."""
        done = len(self.journal)
        if list(journal[:done]) != self.journal:
            self.rebuild()
            done = 0
        hooks, self.hooks = self.hooks, []
        for name, *arguments in journal[done:]:
            getattr(self, name)(*arguments)
        self.hooks = hooks

    def contacts(self, body: int) -> tuple[Contact, ...]:
        """Contact tuples of one body, seen from it: `c[2]` the other body, `c[4]` its link."""
        c, table, frame = self.client, self.table, self.frame
        found = p.getContactPoints(bodyA=body, physicsClientId=c) or ()
        if body == table:
            fixed = p.getContactPoints(bodyA=frame, physicsClientId=c) or ()
            return (*found, *((k[0], table, *k[2:]) for k in fixed))
        return tuple((*k[:2], table, *k[3:]) if k[2] == frame else k for k in found)

    def touching(self, body_a: int, body_b: int) -> bool:
        """Whether two bodies are in contact."""
        c, pairs = self.client, [(body_a, body_b)]
        if body_a == self.table:
            pairs.append((self.frame, body_b))
        elif body_b == self.table:
            pairs.append((body_a, self.frame))
        return any(p.getContactPoints(bodyA=a, bodyB=b, physicsClientId=c) for a, b in pairs)

    def table_joint(self, joint: int) -> float:
        """Position of one of the table's joints, m."""
        states = self._read(
            "table",
            lambda: p.getJointStates(self.table, TABLE_JOINTS, physicsClientId=self.client),
        )
        return float(states[joint][0])

    def arm_joints(self) -> tuple[float, ...]:
        """The seven arm joints, rad, then the two fingers, m."""
        states = self._read(
            "arm",
            lambda: p.getJointStates(
                self.robot, (*ARM_JOINTS, *self.fingers), physicsClientId=self.client
            ),
        )
        return tuple(state[0] for state in states)

    def tcp_pose(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Position (3) m and quaternion xyzw (4) of the tool centre point in W."""
        state = self._read(
            "tcp", lambda: p.getLinkState(self.robot, self.tcp, physicsClientId=self.client)
        )
        return state[0], state[1]

    def set_table_joint(self, joint: int, position_m: float) -> None:
        """Put a joint of the table somewhere, at rest."""
        p.resetJointState(self.table, joint, position_m, physicsClientId=self.client)
        self._note(("set_table_joint", joint, float(position_m)))

    def block_pose(self, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Position (3) m and quaternion xyzw (4) of a block."""
        uid, client = self.blocks[name], self.client
        position, quaternion = self._read(
            name, lambda: p.getBasePositionAndOrientation(uid, physicsClientId=client)
        )
        return position, quaternion

    def set_block_pose(self, name: str, position_m: Any, quaternion: Any) -> None:
        """Put a block somewhere, at rest."""
        position, rotation = _floats(position_m), _floats(quaternion)
        p.resetBasePositionAndOrientation(
            self.blocks[name], position, rotation, physicsClientId=self.client
        )
        self._note(("set_block_pose", name, position, rotation))

    def block_velocity(self, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Linear (3) m/s and angular (3) rad/s velocity of a block."""
        linear, angular = p.getBaseVelocity(self.blocks[name], physicsClientId=self.client)
        return linear, angular

    def set_block_velocity(self, name: str, linear: Any, angular: Any = (0.0, 0.0, 0.0)) -> None:
        """Give a block a velocity."""
        v, w = _floats(linear), _floats(angular)
        p.resetBaseVelocity(self.blocks[name], v, w, physicsClientId=self.client)
        self._note(("set_block_velocity", name, v, w))

    def robot_touches(self, name: str) -> bool:
        """Whether any part of the arm touches the block."""
        return self.touching(self.robot, self.blocks[name])

    def close(self) -> None:
        """Give the client back; safe to call again."""
        if self.client >= 0:
            client, self.client = self.client, -1
            if p.isConnected(client):
                p.disconnect(physicsClientId=client)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def euler_from_quaternion(quaternion: Any) -> tuple[float, float, float]:
    """Bullet's own xyz Euler angles, so that observations agree to the bit."""
    x, y, z = p.getEulerFromQuaternion(quaternion)
    return x, y, z


def quaternion_from_euler(euler: Any) -> tuple[float, float, float, float]:
    """Bullet's own quaternion xyzw from xyz Euler angles."""
    x, y, z, w = p.getQuaternionFromEuler(euler)
    return x, y, z, w
