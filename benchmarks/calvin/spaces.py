"""CALVIN's actions and observations, checked before anything moves; and what a state is.

A bad action or observation raises one line that names the field, and the world keeps its
state: parsing touches neither the stored target nor a motor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin.scene import ROBOT_Q0_RAD
from openhelix.runtime.core.interfaces import F64

# -- Actions ---------------------------------------------------------------------------

FORMS = "7 relative numbers, a (position, euler | quaternion, gripper) tuple, or a dict"
DICT_TYPES = ("cartesian_rel", "cartesian_abs", "joint_rel", "joint_abs")


class ActionError(ValueError):
    """An action that is not one of CALVIN's forms."""


@dataclass(frozen=True, slots=True)
class Command:
    """A checked action.

    Attributes:
        kind: "cartesian_rel", "cartesian_abs", "joint_rel" or "joint_abs".
        values: (6,) relative pose in units of the maximum step, (6,) or (7,) absolute pose
            (m; euler xyz rad or quaternion xyzw), or (7,) joints, rad.
        gripper: 1 open, -1 close.
    """

    kind: str
    values: F64
    gripper: int


def _numbers(value: Any, name: str, sizes: tuple[int, ...]) -> F64:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ActionError(f"{name}: not numbers") from error
    if array.ndim != 1 or array.shape[0] not in sizes:
        wanted = " or ".join(str(n) for n in sizes)
        raise ActionError(f"{name}: shape {array.shape}, must be ({wanted},)")
    if not np.isfinite(array).all():
        raise ActionError(f"{name}: contains NaN or infinity")
    return array


def _gripper(value: Any, name: str = "gripper") -> int:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ActionError(f"{name}: {value!r} is not 1 (open) or -1 (close)") from error
    if array.size != 1 or float(array.reshape(-1)[0]) not in (1.0, -1.0):
        raise ActionError(f"{name}: {array.tolist()} is not 1 (open) or -1 (close)")
    return int(array.reshape(-1)[0])


def _absolute(action: Any, name: str) -> Command:
    if len(action) == 3:
        position = _numbers(action[0], f"{name}.position", (3,))
        rotation = _numbers(action[1], f"{name}.orientation", (3, 4))
        gripper = _gripper(action[2])
    else:
        array = _numbers(action, name, (7, 8))
        position, rotation, gripper = array[:3], array[3:-1], _gripper(array[-1])
    if len(rotation) == 4:
        norm = float(np.linalg.norm(rotation))
        if norm < 1e-6:
            raise ActionError(f"{name}.orientation: a quaternion of length 0")
    return Command("cartesian_abs", np.concatenate([position, rotation]), gripper)


def _relative(action: Any, name: str) -> Command:
    array = _numbers(action, name, (7,))
    return Command("cartesian_rel", array[:6].copy(), _gripper(array[6]))


def parse_action(action: Any) -> Command:
    """Check an action and bring it into one form.

    Raises:
        ActionError: it has another shape, holds NaN, or its gripper value is not 1 or -1.
    """
    if isinstance(action, dict):
        kind = action.get("type")
        if kind not in DICT_TYPES:
            raise ActionError(f"action.type: {kind!r} is not one of {', '.join(DICT_TYPES)}")
        if "action" not in action:
            raise ActionError("action.action: missing")
        value = action["action"]
        if kind == "cartesian_rel":
            return _relative(value, "action.action")
        if kind == "cartesian_abs":
            if not hasattr(value, "__len__"):
                raise ActionError("action.action: not a pose")
            return _absolute(value, "action.action")
        joints = _numbers(value, "action.action", (8,))
        return Command(kind, joints[:7].copy(), _gripper(joints[7]))
    if not hasattr(action, "__len__"):
        raise ActionError(f"action: {type(action).__name__}; give {FORMS}")
    if len(action) == 7:
        return _relative(action, "action")
    if len(action) == 3 and not (isinstance(action, np.ndarray) and action.dtype != object):
        return _absolute(action, "action")
    shape = np.shape(action) if isinstance(action, np.ndarray) else (len(action),)
    raise ActionError(f"action: shape {shape}; give {FORMS}")


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
