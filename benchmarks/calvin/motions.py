"""CALVIN-D: a block that moves while the robot tries to grasp it.

Five patterns (paper Fig. 2): static, left, forward, diagonal, circular. The block is driven
inside the physics: before every substep (1/240 s) it gets the velocity that brings it to its
place on the path, so it slides over its surface, keeps its contacts, and can be blocked. It
stops being driven for good when the robot touches it.

The paper's public code instead moves the block between calls of the policy, by teleport, and
only one block from one state. Its paths: to x = 0 (left) or y = 0.09 (forward) within 60
calls of 19 environment steps, that is 38 s, or a circle of 0.03 m in the same time. The
"paper" speeds below are those; here a linear path ends where the block's surface ends and
then goes back, and the circle starts where the block lies instead of 0.03 m beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from openhelix.benchmarks.calvin.scene import BLOCK_SIDE_M, PHYSICS_HZ, Scene, get_scene
from openhelix.runtime.core.plugins import none_of

Point = tuple[float, float]
Range = tuple[float, float]

PATTERNS = ("static", "left", "forward", "diagonal", "circular")
RADIUS_M = 0.03
_PAPER_S = 60 * 19 / 30.0  # 60 calls of 19 steps at 30 Hz
# From CALVIN's right table slot (0.23, -0.12), where the paper's block starts.
PAPER_SPEEDS_M_S: Mapping[str, float] = {
    "static": 0.0,
    "left": 0.23 / _PAPER_S,
    "forward": 0.21 / _PAPER_S,
    "diagonal": math.hypot(0.23, 0.21) / _PAPER_S,
    "circular": 2 * math.pi * RADIUS_M / _PAPER_S,
}
PRESETS: Mapping[str, float] = {"paper": 1.0, "x2": 2.0, "x5": 5.0, "x10": 10.0, "x20": 20.0}
MAX_SPEED_M_S = 0.5
MAX_LAG_M = 0.005  # farther behind its target the block is blocked, and turns back
MAX_RISE_M = 0.01  # farther from its surface it has fallen or was lifted
CATCH_UP_M_S = 0.05

DRAWER_X_HALF_M, DRAWER_Y = 0.176, (-0.155, 0.02)  # inside of the drawer, y with it shut
DRAWER_BLOCK_Z_M = 0.362
DRAWER_JOINT = 3


class MotionError(ValueError):
    """An unknown pattern, preset or block, or a speed that cannot be driven."""


def speed_m_s(pattern: str, preset: str = "paper") -> float:
    """Speed along the path of a preset.

    Raises:
        MotionError: Unknown pattern or preset.
    """
    if pattern not in PATTERNS:
        raise MotionError(f"pattern: {none_of(pattern, PATTERNS)}")
    if preset not in PRESETS:
        raise MotionError(f"speed: {none_of(preset, PRESETS)}")
    return PAPER_SPEEDS_M_S[pattern] * PRESETS[preset]


@dataclass(frozen=True, slots=True)
class Path:
    """Where the block is to be, by distance travelled.

    Attributes:
        start: (x, y) m.
        end: Far end of a linear path.
        center: Of a circular one, else None.
        length: m, after which a linear path turns back; a circle has no end.
    """

    start: Point
    end: Point
    center: Point | None
    length: float

    def point(self, s: float) -> Point:
        """(x, y) at distance `s` from the start, 0 <= s <= length where it is linear."""
        if self.center is None:
            w = s / self.length if self.length > 0 else 0.0
            return (
                self.start[0] + w * (self.end[0] - self.start[0]),
                self.start[1] + w * (self.end[1] - self.start[1]),
            )
        x, y = self.start[0] - self.center[0], self.start[1] - self.center[1]
        radius = math.hypot(x, y)
        turn = s / radius if radius > 0 else 0.0
        c, n = math.cos(turn), math.sin(turn)
        return self.center[0] + c * x - n * y, self.center[1] + n * x + c * y


def make_path(pattern: str, start: Point, x: Range, y: Range) -> Path:
    """The path of a pattern from `start` within an area.

    Args:
        pattern: One of `PATTERNS`.
        start: (x, y) of the block's centre, m.
        x, y: Where its centre may go; a start outside widens them.

    Raises:
        MotionError: Unknown pattern.
    """
    if pattern not in PATTERNS:
        raise MotionError(f"pattern: {none_of(pattern, PATTERNS)}")
    x, y = (min(x[0], start[0]), max(x[1], start[0])), (min(y[0], start[1]), max(y[1], start[1]))
    if pattern == "circular":
        radius = min(RADIUS_M, (x[1] - x[0]) / 2, (y[1] - y[0]) / 2)
        center = _circle_center(start, x, y, radius)
        return Path(start, start, center, math.inf if radius > 0 else 0.0)
    goal_x = x[0] if pattern in ("left", "diagonal") else start[0]
    goal_y = y[1] if pattern in ("forward", "diagonal") else start[1]
    end = (goal_x, goal_y)
    return Path(start, end, None, math.dist(start, end))


def _circle_center(start: Point, x: Range, y: Range, radius: float) -> Point:
    """A centre `radius` from the start, towards the middle, whose circle stays inside.

    From a corner none does; the best then leaves the area by 0.3 of its radius (9 mm).
    """
    inner_x, inner_y = (x[0] + radius, x[1] - radius), (y[0] + radius, y[1] - radius)
    best, best_gap = start, math.inf
    for k in range(72):
        angle = k * math.pi / 36
        c = (start[0] + radius * math.cos(angle), start[1] + radius * math.sin(angle))
        gap = sum(max(r[0] - v, v - r[1], 0.0) for v, r in zip(c, (inner_x, inner_y), strict=True))
        middle = math.dist(c, (sum(x) / 2, sum(y) / 2))
        # inside first, then near the middle
        if gap * 1e3 + middle < best_gap:
            best, best_gap = c, gap * 1e3 + middle
    return best


class _World(Protocol):
    """The part of `openhelix.benchmarks.calvin.physics.World` that a motion needs."""

    def block_pose(self, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]: ...
    def block_velocity(self, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]: ...
    def set_block_velocity(self, name: str, linear: Any, angular: Any = ...) -> None: ...
    def robot_touches(self, name: str) -> bool: ...
    def table_joint(self, joint: int) -> float: ...


def area(scene: Scene, world: _World, block: str) -> tuple[Range, Range]:
    """Where the block's centre may go on the surface it lies on: x and y ranges, m."""
    (x, y, z), _ = world.block_pose(block)
    half = max(dict(scene.block_lengths)[block], BLOCK_SIDE_M) / 2
    surfaces = dict(scene.surfaces)
    if z < (DRAWER_BLOCK_Z_M + surfaces["table"].z) / 2:
        shift = world.table_joint(DRAWER_JOINT)
        room = max(DRAWER_X_HALF_M - half, 0.0)
        return (scene.drawer_x - room, scene.drawer_x + room), (
            DRAWER_Y[0] - shift + half,
            min(DRAWER_Y[1], -0.18) - half,  # in front of the table, where the hand can go
        )
    if y < surfaces["slider_left"].y[0] - half:
        return surfaces["table"].x, surfaces["table"].y
    near = min(("slider_left", "slider_right"), key=lambda n: abs(x - sum(surfaces[n].x) / 2))
    return surfaces[near].x, surfaces[near].y


class MovingBlock:
    """Drives one block along a pattern from where it lies now, until the robot touches it.

    Make it after `env.reset`; it removes itself with `close` (or as a context manager).

    Args:
        env: A `PlayTableEnv`.
        block: "red", "blue", "pink", or "block_red" ...
        pattern: One of `PATTERNS`.
        speed: m/s along the path, or a name of `PRESETS`.

    Attributes:
        released: Whether the robot has touched the block (or it has left its surface).
        travelled_m: Distance driven so far.

    Raises:
        MotionError: A bad argument, or an env without substep hooks.
    """

    def __init__(self, env: Any, block: str, pattern: str, speed: float | str = "paper") -> None:
        name = block if str(block).startswith("block_") else f"block_{block}"
        self.speed_m_s = speed_m_s(pattern, speed) if isinstance(speed, str) else float(speed)
        if not 0 <= self.speed_m_s <= MAX_SPEED_M_S:
            raise MotionError(f"speed: {self.speed_m_s} m/s, must be 0 to {MAX_SPEED_M_S}")
        if not hasattr(env, "add_substep_hook"):
            raise MotionError(
                "world: moving blocks need PlayTable; this world has no substep hooks"
            )
        scene = get_scene(env.scene)
        if name not in scene.blocks:
            raise MotionError(f"block: {none_of(block, scene.blocks)}")
        position, _ = env.world.block_pose(name)
        self.path = make_path(pattern, (position[0], position[1]), *area(scene, env.world, name))
        self.block, self.pattern = name, pattern
        self.released, self.travelled_m = False, 0.0
        self._s, self._direction, self._z = 0.0, 1.0, position[2]
        self._env = env
        if pattern != "static" and self.speed_m_s > 0 and self.path.length > 0:
            env.add_substep_hook(self._before_substep)

    def close(self) -> None:
        """Stop driving; safe to call again."""
        self._env.remove_substep_hook(self._before_substep)

    def __enter__(self) -> MovingBlock:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _before_substep(self, world: _World) -> None:
        position, _ = world.block_pose(self.block)
        fell = abs(position[2] - self._z) > MAX_RISE_M
        if self.released or fell or world.robot_touches(self.block):
            self.released = True  # removed by `close`: a hook must not edit the list it is in
            return
        if math.dist(position[:2], self.path.point(self._s)) > MAX_LAG_M:
            self._direction = -self._direction
        self._advance()
        goal = self.path.point(self._s)
        velocity = [(g - p) * PHYSICS_HZ for g, p in zip(goal, position[:2], strict=True)]
        limit = self.speed_m_s + CATCH_UP_M_S
        scale = min(1.0, limit / max(math.hypot(*velocity), 1e-12))
        linear, _ = world.block_velocity(self.block)
        world.set_block_velocity(self.block, (velocity[0] * scale, velocity[1] * scale, linear[2]))

    def _advance(self) -> None:
        """One substep along the path, turning back at the ends of a linear one."""
        step = self.speed_m_s / PHYSICS_HZ
        self.travelled_m += step
        self._s += self._direction * step
        if self.path.center is None and not 0.0 <= self._s <= self.path.length:
            self._direction = -self._direction
            self._s = min(max(self._s, 0.0), self.path.length)
