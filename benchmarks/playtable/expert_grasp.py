"""Grasping a block from above: which way round, where, and with what room for the fingers."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi, sin

import numpy as np

from benchmarks.playtable.expert_control import (
    OPEN,
    UP,
    Skill,
    Steps,
    hand,
    nearest_yaw,
    outwards,
    reach_tilt,
)
from benchmarks.playtable.expert_view import BlockView
from runtime.quaternion import Quat
from runtime.types import F64

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
