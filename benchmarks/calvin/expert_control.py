"""Building blocks of the scripted experts: what they see, how they move, how they vary.

An expert is a generator that yields one `Goal` a control step and looks at the newest
`View` when it is resumed. `Servo` turns goals into commanded poses within CALVIN's limits
(0.02 m an axis and 0.05 rad a step). The command is drawn from where the arm *is*, never
further ahead than a leash: an arm that lags behind (two of its joints saturate on a diagonal
sweep) would otherwise be dragged through the table, and a policy that sees only the present
could not imitate a command that depends on the past.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from math import atan2, copysign, cos, hypot, pi, sin
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin.scene import SLOPE_OUT, TABLE_TOP_Z_M, Scene
from openhelix.runtime.core.interfaces import F64
from openhelix.runtime.core.quaternion import (
    Quat,
    from_euler_xyz,
    from_rotation_vector,
    multiply,
    normalise,
    rotation_vector,
)

# -- What an expert sees: calvin_env's info, unpacked once per step --------------------

SLOPE_FOOT = np.array([0.0, 0.02, TABLE_TOP_Z_M])
OUT = np.array(SLOPE_OUT)


@dataclass(frozen=True, slots=True)
class BlockView:
    """One block now: pose in W, length along its own x, what it touches (body, link)."""

    name: str
    position: F64
    quaternion: Quat
    length: float
    touches: frozenset[tuple[int, int]]

    @property
    def yaw(self) -> float:
        """Yaw of the long side; where that stands upright, of another side."""
        x, y, z, w = self.quaternion
        ax, ay = 1 - 2 * (y * y + z * z), 2 * (x * y + z * w)
        if hypot(ax, ay) < 0.5:
            ax, ay = 2 * (x * y - z * w), 1 - 2 * (x * x + z * z)
        return atan2(ay, ax)

    def half_extent(self, direction: tuple[float, float]) -> float:
        """Half of the block's extent along a horizontal direction, m."""
        along = abs(cos(self.yaw) * direction[0] + sin(self.yaw) * direction[1])
        across = abs(-sin(self.yaw) * direction[0] + cos(self.yaw) * direction[1])
        return along * self.length / 2 + across * 0.02


class View:
    """The state an expert may look at: `info`, unpacked."""

    def __init__(self, scene: Scene, info: Mapping[str, Any]) -> None:
        self.scene = scene
        self._lengths = dict(scene.block_lengths)
        self.update(info)

    def update(self, info: Mapping[str, Any]) -> None:
        """Look again."""
        robot, world = info["robot_info"], info["scene_info"]
        self.position: F64 = np.array(robot["tcp_pos"])
        self.quaternion: Quat = from_euler_xyz(robot["tcp_orn"])
        self.width = float(robot["gripper_opening_width"])
        self.gripper = int(robot["gripper_action"])
        self.robot_uid = int(robot["uid"])
        self.table_uid = int(world["fixed_objects"]["table"]["uid"])
        self.links: Mapping[str, int] = world["fixed_objects"]["table"]["links"]
        self.slide = _scalar(world["doors"]["base__slide"]["current_state"])
        self.drawer = _scalar(world["doors"]["base__drawer"]["current_state"])
        self.switch = _scalar(world["switches"]["base__switch"]["joint_state"])
        lights = world["lights"]
        self.bulb = int(lights["lightbulb"]["logical_state"])
        self.led = int(lights["led"]["logical_state"])
        self.blocks = {
            name: BlockView(
                name,
                np.array(block["current_pos"]),
                normalise(block["current_orn"]),
                self._lengths[name],
                frozenset((int(c[2]), int(c[4])) for c in block["contacts"]),
            )
            for name, block in world["movable_objects"].items()
        }
        self._uids = {int(b["uid"]): name for name, b in world["movable_objects"].items()}

    @property
    def tool_axis(self) -> F64:
        """(3,) from the hand to the fingertips."""
        x, y, z, w = self.quaternion
        return np.array([2 * (x * z + y * w), 2 * (y * z - x * w), 1 - 2 * (x * x + y * y)])

    @property
    def yaw(self) -> float:
        """Yaw of the tool, in the branch on which the arm can turn."""
        x, y, z, w = self.quaternion
        yaw = atan2(2 * (x * y + z * w), 1 - 2 * (y * y + z * z))
        return yaw if yaw > -1.6 else yaw + 2 * pi

    @property
    def out_m(self) -> float:
        """Distance of the TCP from the leaning panel, m."""
        return float((self.position - SLOPE_FOOT) @ OUT)

    def on(self, name: str, link: str) -> bool:
        """Whether a block touches a link of the table."""
        return (self.table_uid, self.links[link]) in self.blocks[name].touches

    def held(self, name: str) -> bool:
        """Whether the robot touches the block."""
        return any(body == self.robot_uid for body, _ in self.blocks[name].touches)

    def gripped(self, name: str) -> bool:
        """Whether both fingers touch the block."""
        touches = self.blocks[name].touches
        return len({link for body, link in touches if body == self.robot_uid}) >= 2

    def in_hand(self) -> str | None:
        """The block that the robot holds clear of everything else."""
        for name, block in self.blocks.items():
            if {body for body, _ in block.touches} == {self.robot_uid}:
                return name
        return None

    def neighbours(self, name: str) -> list[str]:
        """The blocks that a block touches."""
        bodies = {body for body, _ in self.blocks[name].touches}
        return [other for uid, other in self._uids.items() if uid in bodies]


def _scalar(value: Any) -> float:
    return float(np.ravel(value)[0])


# -- How it moves ----------------------------------------------------------------------

STEP_M, STEP_RAD = 0.02, 0.05  # CALVIN's largest relative action, per axis
LEASH_M, LEASH_RAD = 0.045, 0.20
LAG_STEPS = 2.0  # the arm makes half of its way to the command in a step
SETTLED_M = 0.0015  # fingers that move less in a step have closed on something
STILL_M = 0.0012  # a tool that moves less in a step has stopped
GAIN = 1.25  # of what is left to go, so that little remains of the IK's own error
OPEN, CLOSE = 1, -1
TIP_BELOW_TCP_M = 0.0148
YAW_RANGE_RAD = (-1.1, 4.9)  # beyond it a joint runs into its limit
ROBOT_XY_M = (-0.34, -0.46)
UP = np.array([0.0, 0.0, 1.0])


@dataclass(frozen=True, slots=True)
class Goal:
    """Where the tool should go next.

    Attributes:
        position: (3,) TCP in W, m.
        quaternion: xyzw.
        gripper: 1 open, -1 closed.
        pace: fraction of the full step that the command may move.
    """

    position: F64
    quaternion: Quat
    gripper: int
    pace: float = 1.0


Steps = Generator[Goal, None, None]


@dataclass(frozen=True, slots=True)
class Variation:
    """What differs from one demonstration to the next; the default is the plain way.

    Attributes:
        speed: fraction of CALVIN's step limits.
        height_m: extra height of travel and of hovering.
        offset_m: (3,) where a grasp or a contact is, about its ideal place.
        yaw_rad: how far the tool is turned from its ideal yaw.
        other_yaw: take the second best of the possible grasps.
        tilt_rad: added to the tilt of the tool where it is tilted.
    """

    speed: float = 1.0
    height_m: float = 0.0
    offset_m: tuple[float, float, float] = (0.0, 0.0, 0.0)
    yaw_rad: float = 0.0
    other_yaw: bool = False
    tilt_rad: float = 0.0

    @staticmethod
    def random(rng: np.random.Generator) -> Variation:
        """Draw a variation within what the tasks allow."""
        x, y, z = np.clip(rng.normal(0.0, (0.004, 0.004, 0.0015)), -0.008, 0.008)
        return Variation(
            speed=float(rng.uniform(0.9, 1.0)),
            height_m=float(rng.uniform(-0.01, 0.03)),
            offset_m=(float(x), float(y), float(z)),
            yaw_rad=float(np.clip(rng.normal(0.0, 0.05), -0.12, 0.12)),
            other_yaw=bool(rng.uniform() < 0.15),
            tilt_rad=float(rng.uniform(-0.05, 0.05)),
        )


def hand(yaw: float, tilt: float = 0.0, towards: tuple[float, float] = (0.0, 1.0)) -> Quat:
    """A tool that points down, turned by `yaw`, its tip then leaned `towards` by `tilt` rad."""
    down = from_euler_xyz((pi, 0.0, yaw))
    if not tilt:
        return down
    size = hypot(*towards)
    axis = (towards[1] / size * tilt, -towards[0] / size * tilt, 0.0)
    return multiply(from_rotation_vector(axis), down)


def reach_tilt(position: F64) -> float:
    """Tilt (rad, tip outwards) that a place needs: an upright tool reaches 0.77 m."""
    distance = hypot(position[0] - ROBOT_XY_M[0], position[1] - ROBOT_XY_M[1])
    return min(max((distance - 0.73) * 6.0, 0.0), 0.5)


def outwards(position: F64) -> tuple[float, float]:
    """Horizontal direction from the robot's base to a place."""
    return float(position[0] - ROBOT_XY_M[0]), float(position[1] - ROBOT_XY_M[1])


def limit(vector: F64, length: float) -> F64:
    """The vector, shortened to at most `length`."""
    size = float(np.linalg.norm(vector))
    return vector if size <= length else vector * (length / size)


def wrap(angle: float, period: float = 2 * pi) -> float:
    """The angle, moved into (-period/2, period/2]."""
    return angle - period * round(angle / period)


def turn_error(view: View, quaternion: Quat) -> float:
    """Angle (rad) between the tool and an orientation."""
    return hypot(*rotation_vector(view.quaternion, quaternion))


class Servo:
    """Turns goals into commanded poses.

    Attributes:
        position, quaternion: the pose commanded last.
    """

    def __init__(self, view: View, speed: float = 1.0) -> None:
        self.speed = speed
        self.position = view.position.copy()
        self.quaternion = view.quaternion

    def lead(self, before: View, now: View) -> None:
        """Put the command ahead of an arm that moved so in the last step."""
        moved = now.position - before.position
        self.position = now.position + limit(moved * LAG_STEPS, LEASH_M)
        turn = [a * LAG_STEPS for a in rotation_vector(before.quaternion, now.quaternion)]
        scale = min(LEASH_RAD / max(hypot(*turn), 1e-9), 1.0)
        ahead = from_rotation_vector([a * scale for a in turn])
        self.quaternion = normalise(multiply(ahead, now.quaternion))

    def step(self, view: View, goal: Goal) -> None:
        """Move the command towards the goal by one step."""
        pace = min(self.speed * goal.pace, 1.0)
        here = view.position + limit(self.position - view.position, LEASH_M)
        wanted = view.position + limit(GAIN * (goal.position - view.position), LEASH_M)
        self.position = here + np.clip(wanted - here, -STEP_M * pace, STEP_M * pace)
        self.quaternion = self._turn(view.quaternion, goal.quaternion, STEP_RAD * pace)

    def _turn(self, now: Quat, goal: Quat, step: float) -> Quat:
        ahead = rotation_vector(now, self.quaternion)
        lead = hypot(*ahead)
        command = self.quaternion
        if lead > LEASH_RAD:
            scale = LEASH_RAD / lead
            command = multiply(from_rotation_vector([a * scale for a in ahead]), now)
        error = rotation_vector(command, goal)
        size = hypot(*error)
        if size > step:
            error = (error[0] * step / size, error[1] * step / size, error[2] * step / size)
        return normalise(multiply(from_rotation_vector(error), command))


class Skill:
    """Movements that the recipes share; each is a generator of goals.

    Attributes:
        scene: where.
        view: what is seen now; whoever runs the generator updates it before resuming.
        v: how this demonstration varies.
        start: what was seen when the task was given, if somebody else has worked on it since.
            What is done already is then not undone: a block in the grip stays there, a tool
            that stands where the recipe would bring it goes on from there.
    """

    def __init__(
        self, scene: Scene, view: View, variation: Variation, start: View | None = None
    ) -> None:
        self.scene, self.view, self.v, self.start = scene, view, variation, start
        self.target = ""  # the block that the task is about
        self.fingers_move = False  # where somebody else's hand is taken over
        self._before, self._still = view.position.copy(), 0

    def move(
        self,
        position: F64,
        quaternion: Quat,
        gripper: int,
        tolerance_m: float = 0.012,
        tolerance_rad: float = 0.2,
        steps: int = 40,
        pace: float = 1.0,
    ) -> Steps:
        """Go straight to a pose; stop when near it or after `steps`."""
        for _ in range(steps):
            near = np.linalg.norm(self.view.position - position) < tolerance_m
            if near and turn_error(self.view, quaternion) < tolerance_rad:
                return
            yield Goal(position, quaternion, gripper, pace)

    def hold(self, gripper: int, steps: int) -> Steps:
        """Stay for some steps."""
        position, quaternion = self.view.position.copy(), self.view.quaternion
        for _ in range(steps):
            yield Goal(position, quaternion, gripper)

    def close(self, position: F64, quaternion: Quat) -> Steps:
        """Close the gripper until its width settles."""
        last = 1.0
        for i in range(7):
            yield Goal(position, quaternion, CLOSE)
            if i >= 1 and abs(self.view.width - last) < SETTLED_M:
                return
            last = self.view.width

    @property
    def begun(self) -> View:
        """What was seen when the task was given."""
        return self.start or self.view

    def gripping(self, name: str) -> bool:
        """Whether somebody else has brought a block into the grip already."""
        if self.start is None or self.view.gripper != CLOSE or not name:
            return False
        return self.view.gripped(name)

    def stands(self, spot: F64, box: tuple[float, float, float]) -> bool:
        """Whether somebody else has brought the tool to a spot, give or take `box` (m)."""
        if self.start is None or self.view.gripper != CLOSE:
            return False
        return bool((np.abs(self.view.position - spot) < box).all())

    def closing(self, name: str) -> bool:
        """Whether somebody else's fingers are closing on a block."""
        if self.start is None or not name or self.view.gripper != CLOSE:
            return False
        gap = self.view.position - self.view.blocks[name].position
        near = np.linalg.norm(gap) < 0.03 and self.view.width > 0.02
        return bool(near and (self.fingers_move or not self.gripping(name)))

    def _at_target(self) -> bool:
        """Whether the hand is about to grasp the task's block, or has it."""
        if self.start is None or not self.target:
            return False
        gap = self.view.position - self.view.blocks[self.target].position
        coming = self.view.gripper == OPEN and np.linalg.norm(gap) < 0.15
        return bool(coming or self.closing(self.target) or self.gripping(self.target))

    def leave(self, gripper: int, keep: bool = False) -> Steps:
        """Come out of wherever the last task ended, without dragging anything along.

        Args:
            gripper: how the tool travels.
            keep: a block in the hand is to stay there.
        """
        view = self.view
        if self._at_target():
            return
        turned = view.quaternion
        upright = view.tool_axis[2] < -0.93
        switch = abs(view.position[0] - self.scene.switch_x) < 0.10
        # Where a task goes on, the hand may be near the panel on purpose.
        near_panel_m = 0.12 if self.start is None else 0.05
        for _ in range(14):
            p = view.position
            between = [n for n, b in view.blocks.items() if np.linalg.norm(b.position - p) < 0.045]
            if between and not keep:
                stuck = any(view.gripped(n) for n in between)
                yield Goal(p - view.tool_axis * (0.0 if stuck else LEASH_M), turned, OPEN)
                continue
            if p[2] < 0.455 and not self._over_table(p):
                direction = UP
            elif view.out_m < near_panel_m and p[2] < 0.66 and p[2] > 0.47:
                direction = OUT if switch or upright else -view.tool_axis
            else:
                return
            yield Goal(p + direction * LEASH_M, turned, gripper)

    def _over_table(self, position: F64) -> bool:
        return bool(position[2] - TIP_BELOW_TCP_M > TABLE_TOP_Z_M - 0.004 and position[1] > -0.18)

    def approach(
        self,
        target: F64,
        quaternion: Quat,
        gripper: int,
        axis: F64 = UP,
        height_m: float = 0.06,
        tolerance_m: float = 0.006,
        tolerance_rad: float = 0.12,
        steepness: float = 3.0,
        pace: float = 1.0,
    ) -> Goal | None:
        """One step of coming down to `target` along `-axis` as into a funnel.

        Far away the goal is `height_m` above the target; the nearer the tool is to the axis
        (and to the orientation), the lower. Whoever is pushed aside therefore rises and comes
        again. Returns None once the tool is there, or near and stuck (out of reach, blocked).
        """
        view = self.view
        error = view.position - target
        along = float(error @ axis)
        aside = float(np.linalg.norm(error - along * axis))
        turn = turn_error(view, quaternion)
        if aside < tolerance_m and abs(along) < tolerance_m and turn < tolerance_rad:
            return None
        moved = float(np.linalg.norm(view.position - self._before))
        self._still = self._still + 1 if moved < STILL_M else 0
        self._before = view.position.copy()
        if self._still >= 3 and aside < 0.02 and abs(along) < 0.02 and turn < 0.3:
            return None
        height_m = height_m + self.v.height_m
        need = steepness * max(aside - tolerance_m * 0.7, 0.0)
        need = max(need, height_m * min((turn - tolerance_rad) / 0.15, 1.0))
        need = min(max(need, 0.0), height_m)
        goal = target + axis * need
        if abs(error[0]) > 0.10:  # pass in front of the handles
            goal[1] = min(float(goal[1]), -0.06)
            if view.out_m < 0.10 and 0.47 < view.position[2] < 0.64:
                return Goal(view.position + OUT * LEASH_M, quaternion, gripper, pace)
        if along < need - 0.03 and aside > 0.02:
            sideways = (goal - view.position) - axis * float((goal - view.position) @ axis)
            goal = view.position + axis * (need - along) + limit(sideways, 0.004)
        return Goal(goal, quaternion, gripper, pace)


def nearest_yaw(options: list[float], now: float, period: float) -> list[float]:
    """All turns of the given yaws within reach of the arm, the nearest to `now` first."""
    low, high = YAW_RANGE_RAD
    found = {
        round(option + k * period, 6)
        for option in options
        for k in range(-4, 5)
        if low <= option + k * period <= high
    }
    return sorted((yaw for yaw in found if abs(yaw - now) < 2.8), key=lambda yaw: abs(yaw - now))


def sign(value: float) -> float:
    """1.0 or -1.0."""
    return copysign(1.0, value)


# -- Grasping a block from above: which way round, where, with what room for the fingers

WIDEST_GRASP_M = 0.06
BUTTON_Y_M = -0.12
FINGER_INSIDE_M, FINGER_AT_M = 0.039, 0.048  # of an open finger: inner face, middle


class GraspSkill(Skill):
    """Movements around one block."""

    def block(self, name: str) -> BlockView:
        """The block now."""
        return self.view.blocks[name]

    def grasp_yaws(self, name: str) -> list[float]:
        """Yaws at which the fingers fit around the block, the soonest reached first."""
        block, now = self.block(name), self.view.yaw
        options = [block.yaw]
        if block.length < WIDEST_GRASP_M:
            options.append(block.yaw + pi / 2)
        yaws = nearest_yaw(options, now, pi) or [block.yaw]
        return sorted(yaws, key=lambda yaw: abs(yaw - now) + self.crowding(name, yaw))

    def crowding(self, name: str, yaw: float) -> float:
        """How much is in the way of the fingers of a grasp; 0 where there is room (rad)."""
        return self.shift(name, yaw)[0]

    def shift(self, name: str, yaw: float) -> tuple[float, F64]:
        """Where beside the block's centre the open fingers find most room.

        Returns:
            What is still in the way (0 for nothing, in rad of turning that it is worth), and
            the shift (3,) in m: along the block, or towards the freer side of it.
        """
        block = self.block(name)
        closing = np.array([sin(yaw), -cos(yaw)])
        across = np.array([-closing[1], closing[0]])
        length = block.half_extent((across[0], across[1]))
        slack = max(FINGER_INSIDE_M - block.half_extent((closing[0], closing[1])), 0.0) * 0.8
        best, found = 9.0, np.zeros(3)
        for along in (0.0, 0.018, -0.018, 0.031, -0.031):
            if abs(along) > length - 0.008:
                continue
            for aside in (0.0, slack, -slack):
                centre = block.position[:2] + across * along + closing * aside
                cost = self._in_the_way(name, centre, closing, across)
                cost += 6.0 * abs(along) + 3.0 * abs(aside)
                if cost < best - 1e-6:
                    best, found = cost, np.array([*(centre - block.position[:2]), 0.0])
        return best, found

    def _in_the_way(self, name: str, centre: F64, closing: F64, across: F64) -> float:
        room = min(
            self._room(name, centre + side * closing * FINGER_AT_M + edge * across)
            for side in (1.0, -1.0)
            for edge in (0.006, -0.006)
        )
        return 2.5 * min(max(0.012 - room, 0.0) / 0.012, 1.5)

    def _room(self, name: str, spot: F64) -> float:
        """Distance (m) of a spot beside a block from the nearest thing that stands there."""
        block = self.block(name)
        found = [0.1]
        for other in self.view.blocks.values():
            if other.name == name or abs(other.position[2] - block.position[2]) > 0.035:
                continue
            gap = spot - other.position[:2]
            along = np.array([cos(other.yaw), sin(other.yaw)])
            inside = np.abs([gap @ along, gap[1] * along[0] - gap[0] * along[1]])
            beyond = np.maximum(inside - [other.length / 2, 0.02], 0.0)
            found.append(float(np.linalg.norm(beyond)))
        if 0.44 < block.position[2] < 0.50:
            button = np.array([self.scene.button_x, BUTTON_Y_M])
            found.append(float(np.linalg.norm(spot - button)) - 0.04)
        if block.position[2] < 0.40:  # the drawer's walls
            front, back = -self.view.drawer - 0.16, -self.view.drawer + 0.04
            sides = 0.18 - abs(spot[0] - self.scene.drawer_x)
            found.append(float(min(sides, spot[1] - front, back - spot[1])))
        return min(found)

    def top_grasp(self, name: str, yaw: float) -> Quat:
        """A tool over the block: upright, or leaned outwards where the arm is too short."""
        return self.reaching(self.block(name).position, yaw)

    def reaching(self, place: F64, yaw: float) -> Quat:
        """A tool at a place, leaned outwards across the line of the fingers if need be."""
        tilt = reach_tilt(place)
        if tilt < 0.02:
            return hand(yaw)
        across = (-sin(yaw - pi / 2), cos(yaw - pi / 2))
        out = outwards(place)
        if across[0] * out[0] + across[1] * out[1] < 0:
            across = (-across[0], -across[1])
        return hand(yaw, tilt, across)

    def take(
        self,
        name: str,
        choose: Callable[[], float],
        above_m: float = 0.0,
        height_m: float = 0.06,
        tolerance_rad: float = 0.15,
    ) -> Steps:
        """Grasp a block from above: come down around it, close.

        Args:
            name: of the block.
            choose: gives the yaw of the grasp; asked again when the block has moved.
            above_m: height of the TCP over the block's centre.
            height_m: of the approach.
            tolerance_rad: how far from its yaw the tool may be when it closes.
        """
        if self.closing(name):
            yield from self.close(self.view.position.copy(), self.view.quaternion)
        if self.gripping(name):
            return
        yaw, offset, seen = self._grasp(name, choose, above_m)
        for _ in range(60):
            block = self.block(name)
            if np.linalg.norm(block.position - seen) > 0.008:
                yaw, offset, seen = self._grasp(name, choose, above_m)
            goal = self.approach(
                block.position + offset,
                self.top_grasp(name, yaw),
                OPEN,
                height_m=height_m,
                tolerance_rad=tolerance_rad,
            )
            if goal is None:
                break
            yield goal
        target = self.block(name).position + offset
        yield from self.close(target, self.top_grasp(name, yaw))

    def _grasp(
        self, name: str, choose: Callable[[], float], above_m: float
    ) -> tuple[float, F64, F64]:
        """A grasp: its yaw, the TCP's offset from the block, and where the block is now."""
        yaw = choose()
        ox, oy, oz = self.v.offset_m
        crowd, shift = self.shift(name, yaw)
        free = 1.0 if crowd < 0.02 else 0.3
        # along the pads a grasp may be off; across them the fingers centre the block
        along = np.array([sin(yaw - pi / 2), -cos(yaw - pi / 2), 0.0]) * -ox
        across = np.array([cos(yaw - pi / 2), sin(yaw - pi / 2), 0.0]) * oy * 0.7
        offset = (along + across) * free + shift + UP * (oz + above_m)
        return yaw, offset, self.block(name).position.copy()

    def _let_go(self) -> Steps:
        yield from self.hold(OPEN, 2)
        yield from self.move(self.view.position + UP * 0.05, self.view.quaternion, OPEN)
