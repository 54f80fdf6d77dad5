"""Experts for blocks in the cabinet and in the drawer: take out, put in."""

from __future__ import annotations

from math import pi, sin

import numpy as np

from benchmarks.playtable.expert_blocks import BlockSkill
from benchmarks.playtable.expert_control import (
    CLOSE,
    OPEN,
    UP,
    Steps,
    hand,
    nearest_yaw,
    sign,
    wrap,
)
from benchmarks.playtable.expert_grasp import WIDEST_GRASP_M
from benchmarks.playtable.geometry import CABINET_HALF_X, DOOR_SIZE_X
from runtime.quaternion import Quat, from_rotation_vector, multiply
from runtime.types import F64

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
        yield from self.leave(OPEN)
        for _ in range(3):
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

    def place_slider(self) -> Steps:
        """Put the held block into the open side of the cabinet."""
        held = self.view.in_hand()
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
