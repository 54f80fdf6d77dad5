"""Keyposes: the few frames of a demonstration between which a path is mere travel.

As 3D Diffuser Actor cuts CALVIN's play into trajectories: where the motion changes most
abruptly, around every change of the gripper, and at the end.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

F64 = npt.NDArray[np.float64]
TOP_FRACTION = 0.2
MIN_GAP = 5
MIN_CHANGE = 0.01  # control steps per step; below is rounding, not motion
# A full control step of translation and one of rotation weigh the same.
STEP_M, STEP_RAD = 0.02, 0.05


def accelerations(poses: F64) -> F64:
    """How abruptly the motion changes at each frame, in control steps.

    Args:
        poses: (T, 7) TCP poses, position m and quaternion xyzw.

    Returns:
        (T,) norm of the change of velocity; 0 at both ends.
    """
    result = np.zeros(len(poses))
    if len(poses) < 3:
        return result
    turns = Rotation.from_quat(poses[:, 3:])
    linear = np.diff(poses[:, :3], axis=0) / STEP_M
    angular = (turns[1:] * turns[:-1].inv()).as_rotvec() / STEP_RAD
    velocity = np.concatenate([linear, angular], axis=1)
    result[1:-1] = np.linalg.norm(np.diff(velocity, axis=0), axis=1)
    return result


def _peaks(abrupt: F64) -> list[int]:
    """Local maxima in the top fifth, the strongest first served, `MIN_GAP` frames apart."""
    inner = abrupt[1:-1]
    peaks = 1 + np.flatnonzero((inner > abrupt[:-2]) & (inner >= abrupt[2:]))
    top = np.sort(abrupt)[::-1][max(int(len(abrupt) * TOP_FRACTION), 1) - 1]
    floor = max(float(top), MIN_CHANGE)
    kept: list[int] = []
    for peak in peaks[np.argsort(-abrupt[peaks], kind="stable")]:
        if abrupt[peak] >= floor and all(abs(int(peak) - other) >= MIN_GAP for other in kept):
            kept.append(int(peak))
    return kept


def keyposes(poses: npt.ArrayLike, gripper: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Indices of the keyposes of one demonstration, ascending.

    Args:
        poses: (T, 7) TCP poses, position m and quaternion xyzw.
        gripper: (T,) commanded gripper state; only its changes matter.

    Returns:
        Local maxima of acceleration among the top 20 %, at least 5 frames apart; every frame
        in which the gripper changed and the one before; the last frame. Never frame 0, from
        which a demonstration starts, unless it is the only one.

    Raises:
        ValueError: Shapes do not fit, or a value is not finite.
    """
    rows, states = np.asarray(poses, dtype=np.float64), np.asarray(gripper)
    if rows.ndim != 2 or rows.shape[1] != 7 or states.shape != (len(rows),) or not len(rows):
        raise ValueError(f"poses: shapes {rows.shape}, {states.shape}; want (T, 7), (T,), T >= 1")
    if not np.isfinite(rows).all():
        raise ValueError("poses: contain NaN or infinity")
    last = len(rows) - 1
    changes = 1 + np.flatnonzero(states[1:] != states[:-1])
    found = {*_peaks(accelerations(rows)), *changes.tolist(), *(changes - 1).tolist()}
    return np.array([*sorted(found - {0, last}), last], dtype=np.int64)
