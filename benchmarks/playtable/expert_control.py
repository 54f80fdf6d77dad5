"""What every scripted expert is made of: what it sees, how it moves, how it varies.

An expert is a generator that yields one `Goal` a control step and looks at the newest
`View` when it is resumed. `Servo` turns goals into commanded poses within CALVIN's limits
(0.02 m an axis and 0.05 rad a step). The command is drawn from where the arm *is*, never
further ahead than a leash: an arm that lags behind (two of its joints saturate on a diagonal
sweep) would otherwise be dragged through the table, and a policy that sees only the present
could not imitate a command that depends on the past.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from math import copysign, hypot, pi
from typing import Any

import numpy as np

from benchmarks.playtable.expert_view import OUT, View
from benchmarks.playtable.scene import TABLE_TOP_Z_M, Scene
from runtime.quaternion import (
    Quat,
    from_euler_xyz,
    from_rotation_vector,
    multiply,
    normalise,
    rotation_vector,
)
from runtime.types import F64

STEP_M, STEP_RAD = 0.02, 0.05  # CALVIN's largest relative action, per axis
LEASH_M, LEASH_RAD = 0.045, 0.20
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
    """

    def __init__(self, scene: Scene, view: View, variation: Variation) -> None:
        self.scene, self.view, self.v = scene, view, variation
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
            if i >= 1 and abs(self.view.width - last) < 0.0015:
                return
            last = self.view.width

    def leave(self, gripper: int, keep: bool = False) -> Steps:
        """Come out of wherever the last task ended, without dragging anything along.

        Args:
            gripper: how the tool travels.
            keep: a block in the hand is to stay there.
        """
        view = self.view
        turned = view.quaternion
        upright = view.tool_axis[2] < -0.93
        switch = abs(view.position[0] - self.scene.switch_x) < 0.10
        for _ in range(14):
            p = view.position
            between = [n for n, b in view.blocks.items() if np.linalg.norm(b.position - p) < 0.045]
            if between and not keep:
                stuck = any(view.gripped(n) for n in between)
                yield Goal(p - view.tool_axis * (0.0 if stuck else LEASH_M), turned, OPEN)
                continue
            if p[2] < 0.455 and not self._over_table(p):
                direction = UP
            elif view.out_m < 0.12 and p[2] < 0.66 and p[2] > 0.47:
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

    def descend(self, target: F64, quaternion: Quat, gripper: int, **options: Any) -> Steps:
        """Run `approach` for a target that does not move."""
        for _ in range(60):
            goal = self.approach(target, quaternion, gripper, **options)
            if goal is None:
                return
            yield goal


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
