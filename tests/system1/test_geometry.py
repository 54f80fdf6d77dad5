"""Deprojection, masks and farthest point sampling; rotations, every way there and back."""

from __future__ import annotations

import math

import fpsample
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from openhelix.system1.geometry import (
    clean_points,
    deproject,
    euler_to_matrix,
    farthest_point_sample,
    intrinsic_xyz_to_matrix,
    masked_pool,
    matrix_from_6d,
    matrix_to_6d,
    matrix_to_euler,
    matrix_to_intrinsic_xyz,
    matrix_to_quat,
    quat_to_matrix,
    shrink,
    wxyz_to_xyzw,
    xyzw_to_wxyz,
)

# ------------------------------------------------------------------------------------------------
# Points


def camera(width: int, height: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    k = torch.tensor([[0.9 * width, 0, width / 2 + 1], [0, 1.1 * width, height / 2 - 2], [0, 0, 1]])
    pose = torch.eye(4)
    pose[:3, :3] = euler_to_matrix(torch.randn(3, generator=g))
    pose[:3, 3] = torch.randn(3, generator=g)
    return k, pose


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_lifted_point_projects_back_to_its_pixel(seed):
    k, pose = camera(12, 9, seed)
    depth = 0.2 + torch.rand(9, 12, generator=torch.Generator().manual_seed(seed))
    xyz, valid = deproject(depth, k, pose)
    assert valid.all()
    cam = torch.linalg.inv(pose) @ torch.cat((xyz.flatten(1), torch.ones(1, 108)))
    pixel = k @ cam[:3]
    torch.testing.assert_close(pixel[2].view(9, 12), depth, atol=1e-4, rtol=1e-4)
    u = (pixel[0] / pixel[2]).view(9, 12)
    v = (pixel[1] / pixel[2]).view(9, 12)
    torch.testing.assert_close(u, (torch.arange(12) + 0.5).expand(9, 12), atol=2e-3, rtol=0)
    torch.testing.assert_close(v, (torch.arange(9)[:, None] + 0.5).expand(9, 12), atol=2e-3, rtol=0)


def test_a_plane_keeps_its_place_when_the_image_shrinks():
    k, pose = camera(40, 40, 3)
    # A slanted plane in camera coordinates: depth is linear in the ray, so nearest-pixel depth
    # must still lie on it when the intrinsics follow.
    normal, offset = torch.tensor([0.2, -0.1, 1.0]), 1.5
    u, v = torch.meshgrid(torch.arange(40) + 0.5, torch.arange(40) + 0.5, indexing="xy")
    ray = torch.stack(((u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], torch.ones_like(u)), -1)
    depth = offset / (ray @ normal)
    _, small_depth, small_k = shrink(torch.rand(3, 40, 40), depth, k, 20, 20)
    xyz, _ = deproject(small_depth, small_k, torch.eye(4))
    torch.testing.assert_close(
        torch.einsum("c,chw->hw", normal, xyz), torch.full((20, 20), offset), atol=1e-4, rtol=0
    )
    assert pose.shape == (4, 4)


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan, torch.inf])
def test_bad_depth_is_invalid_and_zero(bad):
    k, pose = camera(6, 5, 0)
    depth = torch.ones(5, 6)
    depth[2, 3] = bad
    xyz, valid = deproject(depth, k, pose)
    assert valid.sum() == 29
    assert not valid[2, 3]
    assert (xyz[:, 2, 3] == 0).all()
    assert torch.isfinite(xyz).all()


def test_pooling_averages_valid_points_only():
    xyz = torch.arange(2 * 3 * 4 * 4).float().view(2, 3, 4, 4)
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[0, :2, :2] = False
    valid[1, 0, 0] = False
    mean, seen = masked_pool(xyz, valid, 2, 2)
    assert seen.tolist() == [[[False, True], [True, True]], [[True, True], [True, True]]]
    assert (mean[0, :, 0, 0] == 0).all()
    want = xyz[1, :, :2, :2].flatten(1)[:, 1:].mean(1)
    torch.testing.assert_close(mean[1, :, 0, 0], want)


def test_points_that_are_not_finite_are_masked():
    xyz = torch.zeros(1, 3, 2, 2)
    xyz[0, 1, 0, 1] = torch.nan
    xyz[0, 2, 1, 1] = -torch.inf
    clean, valid = clean_points(xyz)
    assert valid.tolist() == [[[True, False], [True, False]]]
    assert (clean == 0).all()


@settings(max_examples=20, deadline=None)
@given(
    total=st.integers(2, 120),
    width=st.integers(1, 24),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_sampling_is_fpsamples(total, width, share, seed):
    x = np.random.default_rng(seed).normal(size=(2, total, width))
    count = max(1, int(share * total))
    ours = farthest_point_sample(torch.from_numpy(x), count)
    for b in range(2):
        theirs = fpsample.fps_sampling(x[b], count, start_idx=0)
        assert ours[b].tolist() == theirs.astype(int).tolist()


def test_sampling_prefers_valid_rows_and_takes_each_once():
    x = torch.randn(3, 30, 4, generator=torch.Generator().manual_seed(0))
    x[2, 5:] = x[2, 4]  # duplicates
    valid = torch.ones(3, 30, dtype=torch.bool)
    valid[0, ::2] = False
    chosen = farthest_point_sample(x, 15, valid)
    assert set(chosen[0].tolist()) == set(range(1, 30, 2))
    for row in chosen:
        assert len(set(row.tolist())) == 15


def test_sampling_refuses_more_than_there_are():
    with pytest.raises(ValueError, match=r"count: 5 is not in 1\.\.4"):
        farthest_point_sample(torch.zeros(1, 4, 3), 5)


# ------------------------------------------------------------------------------------------------
# Rotations


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
