"""When System 2 is asked for a new latent: at its cadence, or when what it sees has changed.

A latent says what to do, not how: as long as the scene is as the robot knows it, another one says
the same. `ChangeTrigger` looks at System 2's own picture a few times per second and asks only when
somebody *else* has changed something; never more often than its floor, never later than its
ceiling. It keeps a coarse picture of the scene from the last time System 2 was asked. Cells that
hold the robot (found from depth, as points around the hand and the arm behind it) are left out,
and forgotten: what has changed where the robot is, and what hangs together with that (the drawer
that it pulls), is the robot's own work.
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np

from openhelix.runtime.core.interfaces import F32, CameraFrame, Observation

Mask = np.ndarray[tuple[int, int], np.dtype[np.bool_]]

LOOK_S: Final = 0.09  # between two looks: every third tick at 30 Hz
CELL_PX: Final = 4  # side of a cell of a picture 200 pixels high; others in proportion
LEVEL: Final = 0.10  # of full scale, by which some colour of a cell must differ
STILL: Final = 0.04  # a cell that differs less between two looks stands still
HAND_M: Final = 0.10  # around the tool centre point: fingers and what they hold and push
ARM_M: Final = 0.12  # from the upright plane through hand and base
ABOVE_M: Final = 0.06  # the hand's points lie so far above its tool centre point
BASE_M: Final = 0.25  # so near the base the arm is at any height


class Trigger(Protocol):
    """Decides at every observation whether System 2 is asked."""

    def begin(self) -> None:
        """A new instruction, or a fresh start after a stop: the next observation is asked about."""

    def due(self, observation: Observation) -> bool:
        """Whether to ask about this observation; True counts as asked."""


class Cadence:
    """Every `interval`-th observation after an instruction began, from the first one on."""

    def __init__(self, interval: int) -> None:
        self._interval, self._tick = interval, 0

    def begin(self) -> None:
        self._tick = 0

    def due(self, observation: Observation) -> bool:
        self._tick += 1
        return (self._tick - 1) % self._interval == 0


class ChangeTrigger:
    """Ask when the scene changes where the robot is not.

    Args:
        camera: System 2's; it needs depth.
        floor_s: least time between two requests, s.
        ceiling_s: longest time between two requests, s.
        base_m: where the arm stands, in W: the arm is taken to lie between there and the hand.

    Attributes:
        changes: how often a change was the reason for asking.
    """

    def __init__(
        self,
        camera: str,
        floor_s: float,
        ceiling_s: float,
        base_m: tuple[float, float, float],
    ) -> None:
        self._camera = camera
        self._floor_ns, self._ceiling_ns = round(floor_s * 1e9), round(ceiling_s * 1e9)
        self._base = base_m
        self._asked_ns: int | None = None
        self._looked_ns = 0
        self._known: F32 | None = None  # (h, w, 3); NaN where nothing is known
        self._before: F32 | None = None  # of the last look
        self._robot_before = np.zeros((0, 0), np.bool_)
        self._streak = 0
        self.changes = 0

    def begin(self) -> None:
        self._asked_ns = None

    def due(self, observation: Observation) -> bool:
        now_ns = observation.t_ns
        if self._asked_ns is None or now_ns - self._asked_ns >= self._ceiling_ns:
            return self._ask(observation)
        if now_ns - self._looked_ns < LOOK_S * 1e9:
            return False
        changed = self._look(observation)
        if changed and now_ns - self._asked_ns >= self._floor_ns:
            self.changes += 1
            return self._ask(observation)
        return False

    def _ask(self, observation: Observation) -> bool:
        self._asked_ns = observation.t_ns
        self._known, self._before, self._streak = None, None, 0
        self._look(observation)
        return True

    def _look(self, observation: Observation) -> bool:
        """Take in what is seen; whether something changed, at two looks in a row."""
        frame = observation.frames.get(self._camera)
        if frame is None:
            return False
        self._looked_ns = observation.t_ns
        seen, robot = sight(frame, observation, self._base)
        if self._known is None or self._before is None or self._known.shape != seen.shape:
            self._known = np.where(robot[..., None], np.nan, seen)
            self._before, self._robot_before = seen, robot
            return False
        still = np.abs(seen - self._before).max(-1) < STILL
        self._before = seen
        self._known[robot] = np.nan
        gap = np.abs(seen - self._known).max(-1)  # NaN where nothing is known
        unknown = np.isnan(gap)
        changed = ~unknown & (gap > LEVEL)
        own = spread(robot | self._robot_before, changed)
        self._robot_before = robot
        self._known[own & changed] = np.nan
        fresh = unknown & still & ~robot
        self._known[fresh] = seen[fresh]
        self._streak = self._streak + 1 if squares(changed & ~own & still).any() else 0
        return self._streak >= 2


def sight(
    frame: CameraFrame, observation: Observation, base_m: tuple[float, float, float]
) -> tuple[F32, Mask]:
    """Return a picture's `cells` (h, w, 3), and which of them (h, w) may show the robot.

    Args:
        frame: System 2's picture, with depth.
        observation: where the hand is.
        base_m: where the arm stands, in W.

    Raises:
        ValueError: the frame has no depth.
    """
    if frame.depth is None:
        raise ValueError("system2.trigger: System 2's camera has no depth, which it needs")
    step = max(1, round(CELL_PX * frame.rgb.shape[0] / 200))
    height, width = (side // step * step for side in frame.depth.shape)
    points = frame.points(slice(step // 2, height, step), slice(step // 2, width, step))
    hand = observation.tcp_pose[:3]
    near = np.linalg.norm(points - hand, axis=-1) < HAND_M
    along = np.asarray(base_m)[:2] - hand[:2]
    length = float(np.linalg.norm(along)) or 1.0
    along = along / length
    flat = points[..., :2] - hand[:2]
    ahead = flat @ along
    aside = np.abs(flat @ np.array((-along[1], along[0])))
    behind = (ahead > -ABOVE_M) & (ahead < length + ARM_M) & (aside < ARM_M)
    high = (points[..., 2] > hand[2] + ABOVE_M) | (ahead > length - BASE_M)
    # A cell at its edge shows some of the robot, wherever the middle of the cell lies.
    robot = wider(near | (behind & high) | ~np.isfinite(points[..., 0]))
    return cells(frame.rgb, step), robot


def cells(rgb: np.ndarray, step: int) -> F32:
    """Return the mean colour (h, w, 3), 0 to 1, of cells of `step` pixels; a rest is left out."""
    height, width = rgb.shape[0] // step, rgb.shape[1] // step
    whole = rgb[: height * step, : width * step].astype(np.float32)
    out: F32 = whole.reshape(height, step, width, step, 3).mean((1, 3)) / 255
    return out


def wider(mask: Mask) -> Mask:
    """Return a mask (h, w) and the cells beside it, corners included."""
    padded = np.pad(mask, 1)
    tall = padded[:-2] | padded[1:-1] | padded[2:]
    out: Mask = tall[:, :-2] | tall[:, 1:-1] | tall[:, 2:]
    return out


def spread(start: Mask, over: Mask) -> Mask:
    """Return `start` and all of `over` (both (h, w)) that hangs together with it."""
    reached, size = start, -1
    while int(reached.sum()) != size:
        size = int(reached.sum())
        reached = reached | (wider(reached) & over)
    return reached


def squares(mask: Mask) -> Mask:
    """Return where a mask (h, w) holds squares of two by two cells: by their upper left ones."""
    out: Mask = mask[:-1, :-1] & mask[1:, :-1] & mask[:-1, 1:] & mask[1:, 1:]
    return out
