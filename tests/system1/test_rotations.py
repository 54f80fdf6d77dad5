"""Rotations: every way there and back, against roma and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from openhelix.system1.rotations import (
    euler_to_matrix,
    intrinsic_xyz_to_matrix,
    matrix_from_6d,
    matrix_to_6d,
    matrix_to_euler,
    matrix_to_intrinsic_xyz,
    matrix_to_quat,
    quat_to_matrix,
    wxyz_to_xyzw,
    xyzw_to_wxyz,
)

seeds = st.integers(0, 100_000)


def some(seed: int, n: int = 16) -> tuple[torch.Tensor, Rotation]:
    rotation = Rotation.random(n, random_state=seed)
    return torch.from_numpy(rotation.as_matrix()), rotation


@given(seeds)
def test_quaternions(seed):
    m, rotation = some(seed)
    q = matrix_to_quat(m)
    torch.testing.assert_close(quat_to_matrix(q), m)
    theirs = torch.from_numpy(rotation.as_quat())
    torch.testing.assert_close((wxyz_to_xyzw(q) * theirs).sum(-1).abs(), torch.ones(16).double())
    torch.testing.assert_close(xyzw_to_wxyz(wxyz_to_xyzw(q)), q)
    torch.testing.assert_close(quat_to_matrix(3 * q), m)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("angle", [math.pi, math.pi - 1e-4, math.pi + 1e-4, 0.0, 1e-6])
def test_quaternions_near_half_turns(axis, angle):
    vector = np.zeros(3)
    vector[axis] = angle
    m = torch.from_numpy(Rotation.from_rotvec(vector).as_matrix()).float()
    torch.testing.assert_close(quat_to_matrix(matrix_to_quat(m)), m, atol=1e-6, rtol=0)


@given(seeds)
def test_six_numbers(seed):
    m, _ = some(seed)
    v = matrix_to_6d(m)
    torch.testing.assert_close(v[:, :3], m[:, :, 0])
    torch.testing.assert_close(v[:, 3:], m[:, :, 1])
    torch.testing.assert_close(matrix_from_6d(v), m)
    scaled = torch.cat((2 * v[:, :3], v[:, 3:] + 0.3 * v[:, :3]), -1)
    torch.testing.assert_close(matrix_from_6d(scaled), m)


@given(seeds)
def test_six_arbitrary_numbers_give_a_rotation(seed):
    v = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    m = matrix_from_6d(v)
    torch.testing.assert_close(m @ m.mT, torch.eye(3).double().expand(8, 3, 3))
    torch.testing.assert_close(torch.linalg.det(m), torch.ones(8).double())


@given(seeds)
def test_euler_angles(seed):
    m, rotation = some(seed)
    torch.testing.assert_close(matrix_to_euler(m), torch.from_numpy(rotation.as_euler("xyz")))
    torch.testing.assert_close(euler_to_matrix(matrix_to_euler(m)), m)
    torch.testing.assert_close(intrinsic_xyz_to_matrix(matrix_to_intrinsic_xyz(m)), m)
    torch.testing.assert_close(
        matrix_to_intrinsic_xyz(m), torch.from_numpy(rotation.as_euler("XYZ"))
    )
