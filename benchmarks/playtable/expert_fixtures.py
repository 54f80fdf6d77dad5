"""Experts for what is built in: sliding door, drawer, bulb switch, LED button."""

from __future__ import annotations

import numpy as np

from benchmarks.playtable.expert_control import (
    CLOSE,
    LEASH_M,
    Goal,
    Skill,
    Steps,
    hand,
)
from benchmarks.playtable.scene import DRAWER_TRAVEL_M, SLOPE_UP
from runtime.types import F64

HANDLE_X_M = 0.14  # of the door's handle in the door's own frame
UPSLOPE = np.array(SLOPE_UP)
SWITCH_YZ = (0.060928, 0.49489)


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
        yield from self.leave(CLOSE)
        begin = self.view.slide
        for _ in range(2):
            x = self._handle() - way * 0.05
            ox, oy, oz = self.v.offset_m
            above = np.array([x, -0.04, 0.56 + max(self.v.height_m, 0.0)])
            yield from self.over(above, tool)
            side = np.array([x, -0.018 + oy * 0.7, 0.518 + oz])
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

    def _handle(self) -> float:
        return self.scene.slide_x - self.view.slide + HANDLE_X_M

    def _at_end(self, way: float) -> bool:
        end = 0.0 if way > 0 else self.scene.slide_travel
        return abs(self.view.slide - end) < 0.002

    # -- drawer ------------------------------------------------------------------------

    def open_drawer(self) -> Steps:
        """Hook a finger behind the handle and pull."""
        tool = hand(1.5708 + self.v.yaw_rad)
        yield from self.leave(CLOSE)
        ox = float(np.clip(self.v.offset_m[0] * 10, -0.06, 0.06))
        for _ in range(2):
            x, front = self.scene.drawer_x + ox, -self.view.drawer
            target = np.array([x, front - 0.207 + self.v.offset_m[1] * 0.5, 0.366])
            high = target.copy()
            high[2] = 0.46
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
        yield from self.leave(CLOSE)
        x = self.scene.drawer_x + float(np.clip(self.v.offset_m[0] * 10, -0.06, 0.06))
        for _ in range(2):
            target = np.array([x, -self.view.drawer - 0.292, 0.365 + self.v.offset_m[2]])
            high = target.copy()
            high[2] = 0.45
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

    def bulb_on(self) -> Steps:
        """Push the switch's bar up the slope from below."""
        tool = hand(1.5708 + self.v.yaw_rad, 0.65 + self.v.tilt_rad)
        yield from self.leave(CLOSE)
        ox = self.v.offset_m[0] * 2
        for _ in range(2):
            under = np.array([self.scene.switch_x + ox, 0.018, 0.48]) + UPSLOPE * self.view.switch
            before = under + np.array([0.0, -0.055, 0.03])
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
        yield from self.leave(CLOSE)
        ox = self.v.offset_m[0] * 2
        for _ in range(2):
            contact = self.bar() + np.array([ox, -0.043, 0.064])
            above = contact + UPSLOPE * 0.05
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
