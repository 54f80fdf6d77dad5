"""What an episode starts from, checked before anything moves, and what a state is.

A bad observation raises one line that names the field; the world keeps its state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.playtable.scene import ROBOT_Q0_RAD
from runtime.types import F64

ROBOT_OBS_SIZE, SCENE_OBS_SIZE = 15, 24
OPEN_FINGER_M = 0.04


class ObservationError(ValueError):
    """A robot_obs, scene_obs or state that cannot be reset to."""


@dataclass(frozen=True, slots=True)
class State:
    """A `PlayTableEnv` at one instant, as what led to it since the last reset.

    Attributes:
        scene: its name.
        journal: everything that was done to the world, `physics.World.journal`.
        target_pos, target_euler, gripper_action: what relative actions add to, and the last
            commanded gripper state.
        logic: bulb, LED, button on, switch on, button down.
    """

    scene: str
    journal: tuple[tuple[Any, ...], ...]
    target_pos: tuple[float, ...]
    target_euler: tuple[float, ...]
    gripper_action: int
    logic: tuple[bool, bool, bool, bool, bool]


def _vector(value: Any, name: str, sizes: tuple[int, ...]) -> F64:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ObservationError(f"{name}: not numbers") from error
    if array.ndim != 1 or array.shape[0] not in sizes:
        wanted = " or ".join(f"({n},)" for n in sizes)
        raise ObservationError(f"{name}: shape {array.shape}, must be {wanted}")
    if not np.isfinite(array).all():
        raise ObservationError(f"{name}: contains NaN or infinity")
    return array


def parse_robot_obs(robot_obs: Any) -> tuple[Any, float]:
    if robot_obs is None:
        return ROBOT_Q0_RAD, OPEN_FINGER_M
    values = _vector(robot_obs, "robot_obs", (ROBOT_OBS_SIZE, ROBOT_OBS_SIZE + 1))
    return values[-8:-1], float(values[-9]) / 2


def parse_scene_obs(scene_obs: Any) -> tuple[F64, F64, F64]:
    values = _vector(scene_obs, "scene_obs", (SCENE_OBS_SIZE, SCENE_OBS_SIZE + 3))
    lights = values[4:6]
    if not np.isin(lights, (0.0, 1.0)).all():
        raise ObservationError(f"scene_obs: lights {lights.tolist()} must be 0 or 1")
    return values[:4], lights, values[6:].reshape(3, -1)
