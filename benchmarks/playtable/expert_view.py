"""What an expert may look at: calvin_env's info, unpacked once a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import atan2, cos, hypot, pi, sin
from typing import Any

import numpy as np

from benchmarks.playtable.scene import SLOPE_OUT, TABLE_TOP_Z_M, Scene
from runtime.quaternion import Quat, from_euler_xyz, normalise
from runtime.types import F64

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
