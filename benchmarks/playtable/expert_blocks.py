"""Experts for blocks on the table: rotate, push, lift, stack, unstack, push into the drawer."""

from __future__ import annotations

from math import atan2, pi

import numpy as np

from benchmarks.playtable.expert_control import (
    CLOSE,
    OPEN,
    UP,
    Goal,
    Steps,
    hand,
    limit,
    reach_tilt,
    sign,
    wrap,
)
from benchmarks.playtable.expert_grasp import GraspSkill
from runtime.quaternion import Quat, from_rotation_vector, matrix, multiply
from runtime.types import F64

PUSH_PACE = 0.7  # at full speed a block would slide on for 6 cm after the last touch
TURN_RAD = 1.75  # at most; a block slips in the grip, so its own yaw decides when to stop


class BlockSkill(GraspSkill):
    """What is done with blocks on the table."""

    # -- rotate ------------------------------------------------------------------------

    def rotate(self, name: str, way: float) -> Steps:
        """Turn a block by more than 60 degrees, `way` +1 to the left, -1 to the right.

        It goes on turning until well past that: a memoryless policy cannot know where the
        turn began, and whoever stops at once learns to let go too early. Not pressing the
        block down (the grasp's height is kept) saves most of its slip in the grip.
        """
        last = self.block(name).yaw
        turned = 0.0
        yield from self.leave(OPEN)
        for _ in range(3):
            yield from self.take(
                name,
                lambda: self._rotation_yaw(name, way),
                0.004,
                height_m=0.045,
                tolerance_rad=0.25,
            )
            if not self.view.held(name):
                yield from self._let_go()
                continue
            start, centre = self.view.yaw, self.view.position.copy()
            for _ in range(45):
                now = self.block(name).yaw
                turned, last = turned + wrap(now - last, pi), now
                done = way * (self.view.yaw - start)
                hangs = way * turned > 1.12 and not self.view.on(name, "base_link")
                if way * turned > 1.32 or done > TURN_RAD - 0.03 or hangs:
                    break
                if not self.view.held(name):
                    break
                yield Goal(centre - UP * 0.001, hand(start + way * TURN_RAD), CLOSE)
            yield from self.hold(OPEN, 4)
            now = self.block(name).yaw
            turned, last = turned + wrap(now - last, pi), now
            if way * turned > 1.08:
                return

    def _rotation_yaw(self, name: str, way: float) -> float:
        """The grasp from which the arm can still turn far enough, soonest reached."""
        now = self.view.yaw

        def cost(yaw: float) -> float:
            end = yaw + way * 1.5
            beyond = max(-1.1 - end, end - 4.9, 0.0)
            return max(abs(yaw - now) - 0.4, 0.0) + 4.0 * beyond + self.crowding(name, yaw)

        yaws = sorted(self.grasp_yaws(name), key=cost)
        return yaws[0] + self.v.yaw_rad

    # -- push --------------------------------------------------------------------------

    def push(self, name: str, way: float) -> Steps:
        """Push a block along x, `way` +1 to the right, -1 to the left."""
        start = self.block(name).position.copy()
        yield from self.leave(CLOSE)
        for _ in range(3):
            yield from self._beside(name, way)
            yield from self._shove(name, way, start)
            if way * (self.block(name).position[0] - start[0]) > 0.106:
                break
        yield from self.hold(CLOSE, 2)

    def _push_tool(self, place: F64) -> Quat:
        yaw = 1.5 + self.v.yaw_rad
        tilt = reach_tilt(place + np.array([0.06, 0.0, 0.0]))
        return hand(yaw, tilt, (1.0, 0.0)) if tilt > 0.05 else hand(yaw)

    def _beside(self, name: str, way: float) -> Steps:
        for _ in range(50):
            block = self.block(name)
            gap = block.half_extent((1.0, 0.0)) + 0.031
            target = np.array([block.position[0] - way * gap, block.position[1], 0.462])
            target[1] += self.v.offset_m[1]
            goal = self.approach(
                target,
                self._push_tool(block.position),
                CLOSE,
                height_m=0.06,
                tolerance_m=0.010,
                tolerance_rad=0.25,
            )
            if goal is None:
                return
            yield goal

    def _shove(self, name: str, way: float, start: F64) -> Steps:
        line = start[1]
        for _ in range(30):
            block = self.block(name)
            tcp = self.view.position
            behind = way * (block.position[0] - tcp[0])
            astray = abs(block.position[1] - tcp[1])
            if way * (block.position[0] - start[0]) > 0.109:
                return
            if behind < 0.0 or astray > block.half_extent((0.0, 1.0)) + 0.015:
                return  # lost it: come again
            across = float(np.clip(block.position[1] - line, -0.015, 0.015))
            goal = np.array([tcp[0] + way * 0.045, block.position[1] + across, 0.466])
            yield Goal(goal, self._push_tool(block.position), CLOSE, PUSH_PACE)

    # -- lift, stack, unstack ----------------------------------------------------------

    def lift(self, name: str) -> Steps:
        """Grasp a block on the table (or on another block) and raise it."""
        yield from self.leave(OPEN)
        for _ in range(3):
            yield from self.take(name, lambda: self._lift_yaw(name))
            if not self.view.held(name):
                yield from self._let_go()
                continue
            top = self.view.position + UP * 0.12
            tool = self.view.quaternion
            yield from self.move(top, tool, CLOSE, tolerance_m=0.02)
            if self.view.held(name):
                return

    def _lift_yaw(self, name: str) -> float:
        yaws = self.grasp_yaws(name)
        second = self.v.other_yaw and len(yaws) > 1 and abs(yaws[1] - self.view.yaw) < 1.2
        second = second and self.crowding(name, yaws[1]) < 0.1
        return yaws[1 if second else 0] + self.v.yaw_rad

    def unstack(self) -> Steps:
        """Lift the upper of two stacked blocks."""
        yield from self.lift(self.upper_block())

    def upper_block(self) -> str:
        """The block that rests on another one."""
        on_top = [n for n in self.view.blocks if self.view.neighbours(n)]
        return max(on_top or self.view.blocks, key=lambda n: self.block(n).position[2])

    def stack(self) -> Steps:
        """Put the held block onto one that lies on the table."""
        held = self.view.in_hand()
        if held is None:
            return
        base = self.stack_base(held)
        if base is None:
            return
        yield from self.leave(CLOSE, keep=True)
        ox, oy, _ = self.v.offset_m
        for _ in range(60):
            if not self.view.held(held):
                break
            tool, shift = self._level(held, self.block(base).yaw)
            spot = self.block(base).position + UP * 0.046 - shift + np.array([ox, oy, 0.0])
            goal = self.approach(
                spot, tool, CLOSE, height_m=0.05, tolerance_m=0.007, tolerance_rad=0.12
            )
            if goal is None:
                break
            yield goal
        yield from self.hold(OPEN, 4)
        yield from self.move(self.view.position + UP * 0.06, self.view.quaternion, OPEN, steps=6)

    def _level(self, held: str, yaw: float) -> tuple[Quat, F64]:
        """The tool at which the held block lies level and squarely to `yaw`.

        Returns:
            The tool's orientation, and where the block's centre then is from the TCP.
        """
        block, view = self.block(held), self.view
        rows = np.array(matrix(block.quaternion))
        column = int(np.argmax(np.abs(rows[2])))
        up = rows[:, column] * sign(rows[2, column])
        axis = np.cross(up, UP)
        size = float(np.linalg.norm(axis))
        upright = (axis * (atan2(size, float(up[2])) / max(size, 1e-9))).tolist()
        turned = wrap(yaw - block.yaw, pi / 2)
        whole = multiply(from_rotation_vector((0.0, 0.0, turned)), from_rotation_vector(upright))
        shift = np.array(matrix(whole)) @ (block.position - view.position)
        return multiply(whole, view.quaternion), shift

    def stack_base(self, held: str) -> str | None:
        """The block to stack on: a free one on the table top, the nearest."""
        free = [
            n
            for n in self.view.blocks
            if n != held
            and self.view.on(n, "base_link")
            and not self.view.neighbours(n)
            and self.block(n).position[2] > 0.44
        ]
        here = self.view.position
        return min(free, key=lambda n: np.linalg.norm(self.block(n).position - here), default=None)

    # -- push into the drawer ----------------------------------------------------------

    def push_into(self) -> Steps:
        """Make a block on the table fall into the open drawer."""
        name = self.block_to_drop()
        if name is None:
            return
        yield from self.leave(CLOSE)
        if self._room_behind(name):
            for _ in range(2):
                yield from self._behind(name)
                yield from self._off_the_edge(name)
                if self.view.on(name, "drawer_link"):
                    return
        yield from self._drag_off(name)

    def block_to_drop(self) -> str | None:
        """A block that lies on the table top alone, the nearest to the drawer's middle."""
        lone = [
            n
            for n, b in self.view.blocks.items()
            if {t for t in b.touches if t[0] != self.view.robot_uid}
            == {(self.view.table_uid, self.view.links["base_link"])}
            and b.position[2] < 0.48
        ]
        middle = self.scene.drawer_x
        return min(lone, key=lambda n: abs(self.block(n).position[0] - middle), default=None)

    def _room_behind(self, name: str) -> bool:
        """Whether the hand fits between the block and what stands behind it."""
        block = self.block(name)
        gap = block.position[1] + block.half_extent((0.0, 1.0)) + 0.031
        inside = abs(block.position[0] - self.scene.drawer_x) < 0.17
        return bool(gap < -0.035 and inside)

    def _behind(self, name: str) -> Steps:
        for _ in range(50):
            block = self.block(name)
            gap = block.half_extent((0.0, 1.0)) + 0.031
            target = np.array([block.position[0], block.position[1] + gap, 0.457])
            goal = self.approach(
                target,
                self.reaching(target, 1.5 + self.v.yaw_rad),
                CLOSE,
                tolerance_m=0.012,
                tolerance_rad=0.25,
            )
            if goal is None:
                return
            yield goal

    def _off_the_edge(self, name: str) -> Steps:
        line = self.block(name).position[0]
        for _ in range(40):
            block, tcp = self.block(name), self.view.position
            if block.position[2] < 0.42 or tcp[1] < -0.27:
                return
            if tcp[1] < block.position[1]:
                return
            across = float(np.clip(block.position[0] - line, -0.015, 0.015))
            goal = np.array([block.position[0] + across, tcp[1] - 0.045, 0.455])
            yield Goal(goal, hand(1.5 + self.v.yaw_rad), CLOSE)

    def _drag_off(self, name: str) -> Steps:
        """Where there is no room: grasp the block, carry it over the drawer, let go."""
        for _ in range(2):
            yield from self.take(name, lambda: self.grasp_yaws(name)[0])
            if not self.view.held(name):
                yield from self._let_go()
                continue
            low, high = self.scene.drawer_x - 0.12, self.scene.drawer_x + 0.12
            x = float(np.clip(self.view.position[0], low, high))
            over = np.array([x, -0.25, 0.475])
            tool = hand(self.view.yaw)
            for _ in range(30):
                if np.linalg.norm(self.view.position - over) < 0.02:
                    break
                away = limit(over - self.view.position, 0.1)
                lift = UP * max(0.475 - self.view.position[2], 0.0)
                yield Goal(self.view.position + away + lift, tool, CLOSE)
            yield from self.hold(OPEN, 8)
            return
