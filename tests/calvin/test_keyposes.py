"""Keyposes of motions whose corners are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from openhelix.benchmarks.calvin.frames import MIN_GAP, accelerations, keyposes


def path(corners: list[tuple[int, float]], length: int) -> np.ndarray:
    """(T, 7): along x at speeds that change at the given frames."""
    speed = np.zeros(length)
    for frame, value in corners:
        speed[frame:] = value
    poses = np.zeros((length, 7))
    poses[1:, 0] = np.cumsum(speed[:-1])
    poses[:, 6] = 1.0
    return poses


def test_corners_gripper_changes_and_the_end() -> None:
    poses = path([(0, 0.01), (12, -0.01), (30, 0.0)], 45)
    gripper = np.ones(45)
    gripper[20:] = -1
    assert keyposes(poses, gripper).tolist() == [12, 19, 20, 30, 44]


def test_turning_counts_as_motion() -> None:
    poses = path([], 30)
    yaw = np.concatenate([np.zeros(10), np.linspace(0, 0.8, 20)])  # starts at frame 10
    poses[:, 3:] = Rotation.from_rotvec(np.outer(yaw, [0, 0, 1])).as_quat()
    poses[15:, 3:] *= -1  # the same rotations, written the other way
    assert keyposes(poses, np.ones(30)).tolist() == [10, 29]
    assert accelerations(poses)[14] == pytest.approx(0, abs=1e-6)


def test_of_close_corners_the_sharper_one_is_kept() -> None:
    poses = path([(0, 0.01), (10, 0.0), (12, -0.02)], 40)
    assert keyposes(poses, np.ones(40)).tolist() == [12, 39]


@given(
    st.integers(1, 60).flatmap(
        lambda n: st.tuples(
            st.lists(st.floats(-1, 1), min_size=n, max_size=n),
            st.lists(st.booleans(), min_size=n, max_size=n),
        )
    )
)
def test_always_ascending_and_ending_with_the_end(rows: tuple[list[float], list[bool]]) -> None:
    x, gripper = rows
    poses = np.zeros((len(x), 7))
    poses[:, 0], poses[:, 6] = x, 1.0
    found = keyposes(poses, gripper)
    assert found[-1] == len(x) - 1
    assert (np.diff(found) > 0).all()
    assert len(x) == 1 or found[0] > 0
    changed = {t for t in range(1, len(x)) if gripper[t] != gripper[t - 1]}
    assert changed <= set(found.tolist())
    if not changed:
        assert (np.diff(found[:-1]) >= MIN_GAP).all()


@pytest.mark.parametrize(
    ("poses", "gripper"),
    [
        (np.zeros((4, 6)), np.zeros(4)),
        (np.zeros((4, 7)), np.zeros(3)),
        (np.zeros((0, 7)), np.zeros(0)),
        (np.full((4, 7), np.nan), np.zeros(4)),
    ],
)
def test_bad_input(poses: np.ndarray, gripper: np.ndarray) -> None:
    with pytest.raises(ValueError, match="poses: "):
        keyposes(poses, gripper)
