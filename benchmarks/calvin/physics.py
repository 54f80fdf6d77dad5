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

import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin import urdf
from openhelix.benchmarks.calvin.scene import (
    BUTTON_FORCE_N,
    BUTTON_THRESHOLD_M,
    DOOR_FRICTION_N,
    GRAVITY,
    PHYSICS_HZ,
    ROBOT_BASE_M,
    ROBOT_Q0_RAD,
    SWITCH_THRESHOLD_M,
    TABLE_LINKS,
    Scene,
    Variant,
)
from openhelix.benchmarks.calvin.spaces import Command
from openhelix.runtime.core.interfaces import F64

# -- pybullet, imported without the line that it prints --------------------------------
#
# At its import pybullet says when it was built, on standard error, from C: before the one-line
# error, or into the progress, of whichever command needed it. So the descriptor itself is pointed
# at a file for that moment; what others wrote to it meanwhile is passed on after it.

_BANNER = b"pybullet build time:"
_STDERR = 2


def _import_quietly() -> Any:
    """Import pybullet; Python's own lock of this module lets one thread in, once."""
    if "pybullet" in sys.modules:
        return sys.modules["pybullet"]
    try:
        kept = os.dup(_STDERR)
    except OSError:  # closed: nobody reads it
        return importlib.import_module("pybullet")
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), _STDERR)
            try:
                module = importlib.import_module("pybullet")
            finally:
                os.dup2(kept, _STDERR)
            file.seek(0)
            others = [line for line in file if not line.startswith(_BANNER)]
        if others:
            os.write(_STDERR, b"".join(others))
    finally:
        os.close(kept)
    return module


p: Any = _import_quietly()

Contact = tuple[Any, ...]
SubstepHook = Callable[["World"], None]
Entry = tuple[Any, ...]


# -- The world -------------------------------------------------------------------------

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
        own = self.scene.variant
        self.robot: int = p.loadURDF(
            str(urdf.panda_urdf(own.tip_bulge_m if own else 0.0)),
            ROBOT_BASE_M,
            useFixedBase=True,
            physicsClientId=c,
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
        if own is not None:
            self._set_friction(own)

    def _set_friction(self, own: Variant) -> None:
        tips = [i for name, i in self.links.items() if name.endswith("_tip")]
        bodies = [(self.robot, tip, own.finger_friction) for tip in tips]
        bodies += [(block, -1, own.block_friction) for block in self.blocks.values()]
        bodies += [(self.table, link, own.table_friction) for link in TABLE_LINKS.values()]
        bodies.append((self.frame, -1, own.table_friction))
        for body, link, friction in bodies:
            p.changeDynamics(body, link, lateralFriction=friction, physicsClientId=self.client)

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


# -- Drawer, door, button, switch: joints from an observation, lights from joints ------

Logic = tuple[bool, bool, bool, bool, bool]


class Mechanisms:
    """The logic on top of one world's table.

    Attributes:
        bulb, led: whether each light is on.
        button_on, switch_on: logical states.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.clear()

    def clear(self) -> None:
        """Everything off, as in a world just built."""
        self.bulb = self.led = self.button_on = self.switch_on = False
        self._button_was_down = False

    def put(self, joints: F64, lights: F64) -> None:
        """Put slide, drawer, button and switch (4) m and bulb and LED (2) somewhere.

        In calvin_env's order: doors, lights, button (its state is the LED's), switch (off).
        """
        slide, drawer, button, switch = joints
        self._world.set_table_joint(SLIDE, slide)
        self._world.set_table_joint(DRAWER, drawer)
        self.bulb, self.led = bool(lights[0]), bool(lights[1])
        self._world.set_table_joint(BUTTON, button)
        self.button_on = self.led
        self._button_was_down = bool(button > BUTTON_THRESHOLD_M)
        self._world.set_table_joint(SWITCH, switch)
        self.switch_on = False

    def step(self) -> None:
        """Button: each press toggles the LED. Switch: the bulb follows its position."""
        down = self._world.table_joint(BUTTON) > BUTTON_THRESHOLD_M
        if down and not self._button_was_down:
            self.button_on = not self.button_on
            self.led = self.button_on
        self._button_was_down = down
        up = self._world.table_joint(SWITCH) > SWITCH_THRESHOLD_M
        if up and not self.switch_on:
            self.bulb = True
        elif self.switch_on and not up:
            self.bulb = False
        self.switch_on = up

    def values(self) -> list[float]:
        """Slide, drawer, button, switch (m), bulb, LED (0 or 1)."""
        joints = [self._world.table_joint(j) for j in (SLIDE, DRAWER, BUTTON, SWITCH)]
        return [*joints, float(self.bulb), float(self.led)]

    def logic(self) -> Logic:
        """What joints alone do not tell; `set_logic` takes it back."""
        return self.bulb, self.led, self.button_on, self.switch_on, self._button_was_down

    def set_logic(self, logic: Logic) -> None:
        """Return to what `logic` returned."""
        self.bulb, self.led, self.button_on, self.switch_on, self._button_was_down = logic

    def info(self) -> dict[str, Any]:
        """The doors, buttons, switches and lights of calvin_env's scene info."""
        slide, drawer, button, switch, bulb, led = self.values()
        return {
            "doors": {
                "base__slide": {"current_state": slide},
                "base__drawer": {"current_state": drawer},
            },
            "buttons": {
                "base__button": {"joint_state": button, "logical_state": int(self.button_on)}
            },
            "switches": {
                "base__switch": {"joint_state": switch, "logical_state": int(self.switch_on)}
            },
            "lights": {
                "lightbulb": {"logical_state": int(bulb)},
                "led": {"logical_state": int(led)},
            },
        }


# -- Blocks: put at given poses, or placed at random until none touch ------------------

PLACEMENT_TRIES = 1000


def put_blocks(world: World, poses: F64) -> None:
    """Put the blocks at poses (3, 6 with euler or 7 with quaternion xyzw), in scene order."""
    for name, pose in zip(world.scene.blocks, poses, strict=True):
        rotation = pose[3:]
        quaternion = quaternion_from_euler(rotation) if len(rotation) == 3 else rotation
        world.set_block_pose(name, pose[:3], quaternion)


def place_blocks(world: World, rng: np.random.Generator) -> None:
    """Draw a surface, a position on it and a yaw for each block until none touch.

    Raises:
        RuntimeError: they still touch after 1000 draws.
    """
    surfaces = [surface for _, surface in world.scene.surfaces]
    for _ in range(PLACEMENT_TRIES):
        for name in world.scene.blocks:
            surface = surfaces[rng.integers(len(surfaces))]
            x, y = rng.uniform(*surface.x), rng.uniform(*surface.y)
            yaw = rng.uniform(-np.pi, np.pi)
            world.set_block_pose(name, (x, y, surface.z), quaternion_from_euler((0.0, 0.0, yaw)))
        world.substep()
        if not any(world.touching(a, b) for a, b in combinations(world.blocks.values(), 2)):
            return
    raise RuntimeError(f"blocks still touch after {PLACEMENT_TRIES} placements")


# -- The arm: state, inverse kinematics, motors ----------------------------------------
#
# Control as CALVIN's: one Bullet null-space IK call per control step with the initial joints as
# rest pose, joint position motors with bounded force and speed, fingers driven to open with a
# weak and to close with a strong motor. Relative actions move a stored target that only
# `reset` synchronises with the arm; absolute actions leave that target alone.

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
