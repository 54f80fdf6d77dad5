"""The scripted experts: one class for each kind of thing that CALVIN's tasks move.

`FixtureSkill` for the furniture (sliding door, drawer, bulb switch, LED button),
`BlockSkill` for blocks on the table (rotate, push, lift, stack, unstack, push into the drawer),
`StorageSkill` for blocks in the cabinet and in the drawer (take out, put in).
"""

from __future__ import annotations

from collections.abc import Generator
from math import atan2, pi, sin

import numpy as np

from openhelix.benchmarks.calvin.expert_control import (
    CLOSE,
    LEASH_M,
    OPEN,
    UP,
    WIDEST_GRASP_M,
    Goal,
    GraspSkill,
    Skill,
    Steps,
    hand,
    limit,
    nearest_yaw,
    reach_tilt,
    sign,
    wrap,
)
from openhelix.benchmarks.calvin.geometry import CABINET_HALF_X, DOOR_SIZE_X
from openhelix.benchmarks.calvin.scene import DRAWER_TRAVEL_M, SLOPE_UP
from openhelix.runtime.core.interfaces import F64
from openhelix.runtime.core.quaternion import Quat, from_rotation_vector, matrix, multiply

# -- Fixtures: sliding door, drawer, bulb switch, LED button ---------------------------

HANDLE_X_M = 0.14  # of the door's handle in the door's own frame
UPSLOPE = np.array(SLOPE_UP)
SWITCH_YZ = (0.060928, 0.49489)
# Where the tool touches the switch's bar, from the joint: below it and above.
UNDER_BAR, OVER_BAR = np.array([0.0, -0.0429, -0.0149]), np.array([0.0, -0.043, 0.064])


class FixtureSkill(Skill):
    """Movements at the furniture; the gripper stays closed."""

    def along(self, waypoints: list[F64], tool: tuple[float, float, float, float]) -> Steps:
        """Pass near each waypoint in turn."""
        for i, point in enumerate(waypoints):
            last = i == len(waypoints) - 1
            yield from self.move(point, tool, CLOSE, 0.012 if last else 0.03, 0.25, steps=35)

    def over(self, above: F64, tool: tuple[float, float, float, float]) -> Steps:
        """Travel high to a point near the furniture."""
        for _ in range(45):
            p = self.view.position
            gap = above - p
            aside = float(np.hypot(gap[0], gap[1]))
            if aside < 0.03 and abs(gap[2]) < 0.03:
                return
            goal = above.copy()
            if abs(gap[0]) > 0.07:  # pass in front of the other handles
                goal[1] = min(goal[1], -0.10)
            if aside > 0.06:  # stay over blocks until near
                goal[2] = max(goal[2], 0.53 + self.v.height_m)
                if p[2] < 0.50:
                    goal[:2] = p[:2] + 0.1 * gap[:2]
            yield Goal(goal, tool, CLOSE)

    # -- sliding door ------------------------------------------------------------------

    def move_slider(self, way: float) -> Steps:
        """Push the door, `way` +1 to the right, -1 to the left."""
        tool = hand(1.5708 + self.v.yaw_rad)
        if not self._beside_handle(way):
            yield from self.leave(CLOSE)
        begin = self.begun.slide
        for _ in range(2):
            x = self._handle() - way * 0.05
            ox, oy, oz = self.v.offset_m
            above = np.array([x, -0.04, 0.56 + max(self.v.height_m, 0.0)])
            side = np.array([x, -0.018 + oy * 0.7, 0.518 + oz])
            if not self._beside_handle(way):
                yield from self.over(above, tool)
                yield from self.move(side, tool, CLOSE, 0.015, 0.25, steps=20)
            for _ in range(30):
                moved = -way * (self.view.slide - begin)
                if moved > 0.19 + abs(ox) * 5 or self._at_end(way):
                    break
                goal = self.view.position.copy()
                goal[0] += way * LEASH_M
                goal[1:] = side[1:]
                if way * (self._handle() - self.view.position[0]) < 0.0:
                    break  # slipped past the handle
                yield Goal(goal, tool, CLOSE)
            if -way * (self.view.slide - begin) > 0.152:
                break
            yield from self.leave(CLOSE)
        yield from self.hold(CLOSE, 2)

    def _beside_handle(self, way: float) -> bool:
        """Whether somebody else has brought the tool to where it pushes the door."""
        spot = np.array([self._handle() - way * 0.04, -0.018, 0.518])
        return self.stands(spot, (0.025, 0.02, 0.025))

    def _handle(self) -> float:
        return self.scene.slide_x - self.view.slide + HANDLE_X_M

    def _at_end(self, way: float) -> bool:
        end = 0.0 if way > 0 else self.scene.slide_travel
        return abs(self.view.slide - end) < 0.002

    # -- drawer ------------------------------------------------------------------------

    def open_drawer(self) -> Steps:
        """Hook a finger behind the handle and pull."""
        tool = hand(1.5708 + self.v.yaw_rad)
        if not self._at_handle(-0.215, 0.08):
            yield from self.leave(CLOSE)
        ox = float(np.clip(self.v.offset_m[0] * 10, -0.06, 0.06))
        for _ in range(2):
            x, front = self.scene.drawer_x + ox, -self.view.drawer
            target = np.array([x, front - 0.207 + self.v.offset_m[1] * 0.5, 0.366])
            high = target.copy()
            high[2] = 0.46
            if not self._at_handle(-0.215, 0.02):
                yield from self._down(target, high, tool)
            for _ in range(24):
                if self.view.drawer > min(0.19, DRAWER_TRAVEL_M - 0.012):
                    break
                goal = self.view.position - np.array([0.0, LEASH_M, 0.0])
                goal[0], goal[2] = x, target[2]
                yield Goal(goal, tool, CLOSE)
            if self.view.drawer > 0.13:
                break
        yield from self.hold(CLOSE, 2)

    def close_drawer(self) -> Steps:
        """Push the handle from the front."""
        tool = hand(1.5708 + self.v.yaw_rad)
        if not self._at_handle(-0.283, 0.08):
            yield from self.leave(CLOSE)
        x = self.scene.drawer_x + float(np.clip(self.v.offset_m[0] * 10, -0.06, 0.06))
        for _ in range(2):
            target = np.array([x, -self.view.drawer - 0.292, 0.365 + self.v.offset_m[2]])
            high = target.copy()
            high[2] = 0.45
            if not self._at_handle(-0.283, 0.02):
                yield from self._down(target, high, tool)
            for _ in range(28):
                if self.view.drawer < 0.004:
                    break
                goal = self.view.position + np.array([0.0, LEASH_M, 0.0])
                goal[0], goal[2] = x, target[2]
                yield Goal(goal, tool, CLOSE)
            if self.view.drawer < 0.05:
                break
        yield from self.hold(CLOSE, 2)

    def _at_handle(self, beside_m: float, above_m: float) -> bool:
        """Whether somebody else has brought the tool beside the drawer's handle, or above."""
        spot = np.array([self.scene.drawer_x, beside_m - self.view.drawer, 0.366 + above_m / 2])
        return self.stands(spot, (0.09, 0.02, above_m / 2 + 0.01))

    def _down(self, target: F64, high: F64, tool: tuple[float, float, float, float]) -> Steps:
        """Over the place, then straight down beside the handle."""
        for _ in range(60):
            goal = self.approach(
                target,
                tool,
                CLOSE,
                height_m=float(high[2] - target[2]),
                tolerance_m=0.012,
                tolerance_rad=0.25,
                steepness=5.0,
            )
            if goal is None:
                return
            yield goal

    # -- light bulb --------------------------------------------------------------------

    def bar(self) -> F64:
        """Where the switch's joint is now, m in W."""
        base = np.array([self.scene.switch_x, *SWITCH_YZ])
        return base + UPSLOPE * self.view.switch

    def _at_bar(self, beside: F64) -> bool:
        """Whether somebody else has brought the tool to the side of the bar that it pushes."""
        gap = self.view.position - self.bar() - beside
        along = float(gap @ UPSLOPE)
        across = gap - UPSLOPE * along
        near = abs(across[0]) < 0.035 and np.hypot(across[1], across[2]) < 0.015
        ready = self.start is not None and self.view.gripper == CLOSE
        return bool(ready and near and -0.025 < along < 0.03)

    def bulb_on(self) -> Steps:
        """Push the switch's bar up the slope from below."""
        tool = hand(1.5708 + self.v.yaw_rad, 0.65 + self.v.tilt_rad)
        if not self._at_bar(UNDER_BAR):
            yield from self.leave(CLOSE)
        ox = self.v.offset_m[0] * 2
        for _ in range(2):
            under = np.array([self.scene.switch_x + ox, 0.018, 0.48]) + UPSLOPE * self.view.switch
            before = under + np.array([0.0, -0.055, 0.03])
            if self._at_bar(UNDER_BAR):
                under = self.bar() + UNDER_BAR
            else:
                yield from self.over(before, tool)
                yield from self.move(under, tool, CLOSE, 0.013, 0.2, steps=25)
            for _ in range(24):
                if self.view.bulb and self.view.switch > 0.062:
                    break
                goal = self.view.position + UPSLOPE * LEASH_M
                goal[0] = under[0]
                # stay on the line through `under` up the slope
                along = float((self.view.position - under) @ UPSLOPE) + LEASH_M
                goal[1:] = (under + UPSLOPE * along)[1:]
                if along > 0.14:
                    break
                yield Goal(goal, tool, CLOSE)
            if self.view.bulb:
                break
            yield from self.leave(CLOSE)
        yield from self.hold(CLOSE, 2)

    def bulb_off(self) -> Steps:
        """Push the switch's bar down the slope from above."""
        tool = hand(1.5708 + self.v.yaw_rad, 0.8 + self.v.tilt_rad)
        if not self._at_bar(OVER_BAR):
            yield from self.leave(CLOSE)
        ox = self.v.offset_m[0] * 2
        for _ in range(2):
            contact = self.bar() + np.array([ox, -0.043, 0.064])
            above = contact + UPSLOPE * 0.05
            if not self._at_bar(OVER_BAR):
                yield from self.over(above - np.array([0.0, 0.02, -0.02]), tool)
                yield from self.move(above, tool, CLOSE, 0.015, 0.2, steps=25)
            for _ in range(24):
                if not self.view.bulb and self.view.switch < 0.03:
                    break
                along = float((self.view.position - above) @ UPSLOPE) - LEASH_M
                if along < -0.20:
                    break
                goal = above + UPSLOPE * along
                yield Goal(goal, tool, CLOSE)
            if not self.view.bulb:
                break
            yield from self.leave(CLOSE)
        yield from self.hold(CLOSE, 2)

    # -- LED ---------------------------------------------------------------------------

    def press_button(self, wanted: int) -> Steps:
        """Press the button once."""
        tool = hand(1.5708 + self.v.yaw_rad * 2)
        yield from self.leave(CLOSE)
        ox, oy, _ = self.v.offset_m
        for _ in range(3):
            target = np.array([self.scene.button_x + ox * 1.5, -0.12 + oy * 1.5, 0.478])
            for _ in range(50):
                goal = self.approach(
                    target,
                    tool,
                    CLOSE,
                    height_m=0.052,
                    tolerance_m=0.012,
                    tolerance_rad=0.5,
                    steepness=2.5,
                )
                if goal is None or self.view.led == wanted:
                    break
                yield goal
            high = self.view.position.copy()
            high[2] = 0.54
            yield from self.move(high, tool, CLOSE, 0.02, 0.5, steps=4)
            if self.view.led == wanted:
                break


# -- Blocks on the table ---------------------------------------------------------------

PUSH_PACE = 0.7  # at full speed a block would slide on for 6 cm after the last touch
TURN_RAD = 1.75  # at most; a block slips in the grip, so its own yaw decides when to stop


class BlockSkill(GraspSkill):
    """What is done with blocks on the table."""

    # -- rotate ------------------------------------------------------------------------

    def rotate(self, name: str, way: float) -> Steps:
        """Turn a block by more than 60 degrees, `way` +1 to the left, -1 to the right.

        It goes on turning until well past that: a memoryless policy cannot know where the
        turn began, and whoever stops at once learns to let go too early. A little pressure
        keeps the block on the table: one that is lifted by a hair does not count as turned.
        """
        self.target, last = name, self.block(name).yaw
        turned = wrap(last - self.begun.blocks[name].yaw, 2 * pi)
        yield from self.leave(OPEN)
        for _ in range(3):
            before = turned if self.gripping(name) else 0.0  # in this very grasp
            if self.start is not None and not before and way * turned > 1.08:
                return
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
                if way * turned > 1.32 or done > TURN_RAD - way * before - 0.03 or hangs:
                    break
                if not self.view.held(name):
                    break
                yield Goal(centre - UP * 0.005, hand(start + way * TURN_RAD - before), CLOSE)
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
        start = self.begun.blocks[name].position.copy()
        yield from self._to_push(name, way)
        for _ in range(3):
            if not self._pushes(name, way):
                yield from self._beside(name, way)
            yield from self._shove(name, way, start)
            if way * (self.block(name).position[0] - start[0]) > 0.106:
                break
        yield from self.hold(CLOSE, 2)

    def _to_push(self, name: str, way: float) -> Steps:
        if not self._pushes(name, way):
            yield from self.leave(CLOSE)

    def _pushes(self, name: str, way: float) -> bool:
        """Whether somebody else has brought the closed hand beside the block already."""
        block = self.block(name)
        gap = block.half_extent((1.0, 0.0)) + 0.018
        side = np.array([block.position[0] - way * gap, block.position[1], 0.466])
        return self.stands(side, (0.02, block.half_extent((0.0, 1.0)), 0.015))

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
        self.target = name
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

    def in_hand(self, goal: str = "") -> Generator[Goal, None, str | None]:
        """The block in the hand; `StorageSkill` fetches it again if it was dropped."""
        yield from ()
        return self.view.in_hand()

    def stack(self) -> Steps:
        """Put the held block onto one that lies on the table."""
        held = yield from self.in_hand()
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
        carried = [n for n in self.view.blocks if self.gripping(n)]
        name = carried[0] if carried else self.block_to_drop()
        if name is None:
            return
        self.target = name
        if not self._drives(name):
            yield from self.leave(CLOSE)
        if self._room_behind(name) and not carried:
            for _ in range(2):
                if not self._drives(name):
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

    def _drives(self, name: str) -> bool:
        """Whether somebody else has brought the closed hand behind the block already."""
        block = self.block(name)
        gap = block.half_extent((0.0, 1.0)) + 0.018
        back = np.array([block.position[0], block.position[1] + gap, 0.457])
        return self.stands(back, (block.half_extent((1.0, 0.0)), 0.02, 0.015))

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


# -- Blocks in the cabinet and in the drawer -------------------------------------------

CABINET_TILT_RAD = 0.6
LEAN_PER_M, MOST_LEAN_RAD = 6.0, 0.7


class StorageSkill(BlockSkill):
    """Movements in the cabinet behind the sliding door, and in the drawer."""

    def opening(self) -> tuple[float, float]:
        """The x interval of the cabinet that the door leaves open, m."""
        left = self.scene.plank_x - CABINET_HALF_X
        right = self.scene.plank_x + CABINET_HALF_X
        door = self.scene.slide_x - self.view.slide
        gaps = [(left, max(door, left)), (min(door + DOOR_SIZE_X, right), right)]
        return max(gaps, key=lambda gap: gap[1] - gap[0])

    def cabinet_tool(self, x: float, yaw: float) -> Quat:
        """A tool that reaches in through the opening, the hand turned to its middle."""
        low, high = self.opening()
        lean = float(np.clip(LEAN_PER_M * (x - (low + high) / 2), -MOST_LEAN_RAD, MOST_LEAN_RAD))
        tilted = hand(yaw, CABINET_TILT_RAD + self.v.tilt_rad)
        return multiply(from_rotation_vector((0.0, -lean, 0.0)), tilted)

    def lift_slider(self, name: str) -> Steps:
        """Take a block out of the cabinet."""
        self.target = name
        yield from self.leave(OPEN)
        for _ in range(3):
            if self.closing(name):
                yield from self.close(self.view.position.copy(), self.view.quaternion)
            if self.gripping(name):
                away = self.view.position - tool_axis(self.view.quaternion) * 0.13 + UP * 0.02
                yield from self.move(away, self.view.quaternion, CLOSE, tolerance_m=0.02)
                if self.view.held(name):
                    return
            yaw = self._cabinet_yaw(name) + self.v.yaw_rad
            ox, oy, oz = self.v.offset_m
            askew = abs(sin(wrap(yaw - pi / 2, pi)))
            oz += 0.004 + 0.012 * askew  # one finger comes lower than the other
            for _ in range(60):
                block = self.block(name)
                tool = self.cabinet_tool(block.position[0], yaw)
                axis = -tool_axis(tool)
                target = block.position + np.array([ox * 0.5, oy * 0.5, 0.003 + oz])
                goal = self.approach(
                    target,
                    tool,
                    OPEN,
                    axis=axis,
                    height_m=0.10,
                    tolerance_m=0.012,
                    tolerance_rad=0.15,
                )
                if goal is None:
                    break
                yield goal
            yield from self.close(target, tool)
            if not self.view.held(name):
                yield from self.hold(OPEN, 2)
                yield from self.move(self.view.position + axis * 0.06, tool, OPEN)
                continue
            away = self.view.position + axis * 0.13 + UP * 0.02
            yield from self.move(away, self.view.quaternion, CLOSE, tolerance_m=0.02)
            if self.view.held(name):
                return

    def _cabinet_yaw(self, name: str) -> float:
        """The grasp whose fingers are most nearly side by side, as the tilted hand needs it."""
        block = self.block(name)
        options = [block.yaw]
        if block.length < WIDEST_GRASP_M:
            options.append(block.yaw + pi / 2)
        best = min(options, key=lambda yaw: abs(wrap(yaw - pi / 2, pi)))
        askew = wrap(best - pi / 2, pi)
        straighter = best - sign(askew) * min(abs(askew), max(abs(askew) - 0.35, 0.0), 0.3)
        turns = nearest_yaw([straighter], self.view.yaw, pi)
        return turns[0] if turns else straighter

    def lift_drawer(self, name: str) -> Steps:
        """Take a block out of the open drawer."""
        self.target = name
        yield from self.leave(OPEN)
        for _ in range(3):
            yield from self.take(
                name, lambda: self.grasp_yaws(name)[0] + self.v.yaw_rad, 0.008, height_m=0.13
            )
            if not self.view.held(name):
                yield from self._let_go()
                continue
            top = self.view.position + UP * 0.13
            yield from self.move(top, self.view.quaternion, CLOSE, tolerance_m=0.02)
            if self.view.held(name):
                return

    def in_hand(self, goal: str = "") -> Generator[Goal, None, str | None]:
        """The block that the task began with in the hand; fetched again if it was dropped.

        Args:
            goal: link of the table on which it is to be; there it is let go of.
        """
        held = self.view.in_hand()
        name = self.begun.in_hand()
        if held is not None or self.start is None or name is None:
            return held
        if goal and self.view.on(name, goal):
            yield from self.hold(OPEN, 7)
            yield from self.move(self.view.position + UP * 0.06, self.view.quaternion, OPEN)
        if self.view.on(name, "plank_link"):
            yield from self.lift_slider(name)
        elif self.view.on(name, "drawer_link"):
            yield from self.lift_drawer(name)
        else:
            yield from self.lift(name)
        self.target = ""
        return self.view.in_hand()

    def place_slider(self) -> Steps:
        """Put the held block into the open side of the cabinet."""
        held = yield from self.in_hand("plank_link")
        if held is None and self.start is not None:
            return
        spot = np.array([self._free_x(held), 0.082 + self.v.offset_m[1], 0.495])
        yaw = self._straight_yaw()
        tool = hand(yaw, CABINET_TILT_RAD + self.v.tilt_rad)
        axis = -tool_axis(tool)
        for _ in range(60):
            goal = self.approach(
                spot,
                tool,
                CLOSE,
                axis=axis,
                height_m=0.12,
                tolerance_m=0.012,
                tolerance_rad=0.2,
            )
            if goal is None:
                break
            yield goal
        yield from self.hold(OPEN, 7)
        yield from self.move(spot + axis * 0.08, tool, OPEN, 0.03, steps=6)

    def _free_x(self, held: str | None) -> float:
        """Where in the opening there is most room, x in m."""
        low, high = self.opening()
        others = [
            b.position[0]
            for n, b in self.view.blocks.items()
            if n != held
            and self.view.on(n, "plank_link")
            and low - 0.03 < b.position[0] < high + 0.03
        ]
        if not others:
            spread = min(max((high - low) / 2 - 0.09, 0.0), 0.04)
            shift = float(np.clip(self.v.offset_m[0] * 8, -spread, spread))
            return (low + high) / 2 + shift
        spots = np.linspace(low + 0.03, high - 0.03, 25)

        def room(x: float) -> float:
            edges = min(x - low, high - x)
            return min(edges, *(abs(x - other) - 0.03 for other in others))

        return float(max(spots, key=room))

    def _straight_yaw(self) -> float:
        """Near the start yaw, where the hand is across the opening."""
        options = nearest_yaw([pi / 2 + self.v.yaw_rad], self.view.yaw, pi)
        return options[0] if options else pi / 2

    def place_drawer(self) -> Steps:
        """Let the held block fall into the open drawer."""
        held = yield from self.in_hand("drawer_link")
        if held is None and self.start is not None:
            return
        x = self.scene.drawer_x + float(np.clip(self.v.offset_m[0] * 12, -0.09, 0.09))
        y = -0.27 + 2 * self.v.offset_m[1] + (0.22 - self.view.drawer) * 0.5
        yield from self.leave(CLOSE, keep=True)
        spot = np.array([x, y, 0.41])
        tool = hand(1.5 + wrap(self.view.yaw - 1.5) * 0.3)
        for _ in range(60):
            goal = self.approach(
                spot,
                tool,
                CLOSE,
                height_m=0.09,
                tolerance_m=0.02,
                tolerance_rad=0.4,
            )
            if goal is None:
                break
            yield goal
        yield from self.hold(OPEN, 7)
        yield from self.move(self.view.position + UP * 0.06, tool, OPEN, 0.03, steps=5)


def tool_axis(quaternion: Quat) -> F64:
    """(3,) from the hand to the fingertips."""
    x, y, z, w = quaternion
    return np.array([2 * (x * z + y * w), 2 * (y * z - x * w), 1 - 2 * (x * x + y * y)])
