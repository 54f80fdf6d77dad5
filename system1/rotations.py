"""Rotations on torch tensors: quaternions, matrices, the 6D form and CALVIN's Euler angles.

The 6D form is the first two columns of the matrix, one after the other (Zhou et al. 2019,
"On the Continuity of Rotation Representations in Neural Networks"): it has no jump, which
quaternions and Euler angles have, and CALVIN's roll sits beside its jump at pi.
Quaternions are named by their order: `wxyz` inside the official model, `xyzw` everywhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def xyzw_to_wxyz(q: Tensor) -> Tensor:
    """Reorder (..., 4) quaternions."""
    return torch.roll(q, 1, -1)


def wxyz_to_xyzw(q: Tensor) -> Tensor:
    """Reorder (..., 4) quaternions."""
    return torch.roll(q, -1, -1)


def quat_to_matrix(q: Tensor) -> Tensor:
    """Return (..., 3, 3) for quaternions (..., 4) wxyz of any non-zero length."""
    w, x, y, z = normalize(q, dim=-1).unbind(-1)
    rows = (
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def matrix_to_quat(m: Tensor) -> Tensor:
    """Return unit quaternions (..., 4) wxyz of rotation matrices (..., 3, 3).

    Of the four ways to divide, each element takes the one with the largest divisor, so that
    no angle loses precision; that also fixes the sign: the component divided by is positive.
    """
    a, b, c = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    four_sq = 1 + torch.stack((a + b + c, a - b - c, b - a - c, c - a - b), -1)  # 4 * (w,x,y,z)^2
    wx, wy, wz = (
        m[..., 2, 1] - m[..., 1, 2],
        m[..., 0, 2] - m[..., 2, 0],
        m[..., 1, 0] - m[..., 0, 1],
    )
    xy, xz, yz = (
        m[..., 1, 0] + m[..., 0, 1],
        m[..., 0, 2] + m[..., 2, 0],
        m[..., 2, 1] + m[..., 1, 2],
    )
    w2, x2, y2, z2 = four_sq.unbind(-1)
    rows = (w2, wx, wy, wz, wx, x2, xy, xz, wy, xy, y2, yz, wz, xz, yz, z2)
    table = torch.stack(rows, -1).unflatten(-1, (4, 4))
    best = four_sq.argmax(-1, keepdim=True)
    row = table.gather(-2, best.unsqueeze(-1).expand(*best.shape, 4)).squeeze(-2)
    return row / (2 * four_sq.gather(-1, best).clamp_min(1e-12).sqrt())


def matrix_to_6d(m: Tensor) -> Tensor:
    """Return (..., 6): the first column, then the second."""
    return m[..., :2].transpose(-1, -2).flatten(-2)


def matrix_from_6d(v: Tensor) -> Tensor:
    """Return the rotation matrices (..., 3, 3) that Gram-Schmidt makes of (..., 6)."""
    first, second = v[..., :3], v[..., 3:6]
    x = normalize(first, dim=-1, eps=1e-8)
    z = normalize(torch.cross(x, second, dim=-1), dim=-1, eps=1e-8)
    return torch.stack((x, torch.cross(z, x, dim=-1), z), -1)


def euler_to_matrix(e: Tensor) -> Tensor:
    """Return (..., 3, 3) of CALVIN's Euler angles (..., 3), radians: Rz(c) Ry(b) Rx(a)."""
    (ca, cb, cc), (sa, sb, sc) = e.cos().unbind(-1), e.sin().unbind(-1)
    rows = (
        *(cc * cb, cc * sb * sa - sc * ca, cc * sb * ca + sc * sa),
        *(sc * cb, sc * sb * sa + cc * ca, sc * sb * ca - cc * sa),
        *(-sb, cb * sa, cb * ca),
    )
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def matrix_to_euler(m: Tensor) -> Tensor:
    """Return CALVIN's Euler angles (..., 3), radians, with the middle one in [-pi/2, pi/2]."""
    a = torch.atan2(m[..., 2, 1], m[..., 2, 2])
    b = torch.atan2(-m[..., 2, 0], torch.hypot(m[..., 0, 0], m[..., 1, 0]))
    c = torch.atan2(m[..., 1, 0], m[..., 0, 0])
    return torch.stack((a, b, c), -1)


def matrix_to_intrinsic_xyz(m: Tensor) -> Tensor:
    """Return angles (..., 3) with m = Rx(a) Ry(b) Rz(c), the middle one in [-pi/2, pi/2].

    The published checkpoints' relative rotations are differences of CALVIN angles written in
    this order; see `system1.policy.to_absolute`.
    """
    a = torch.atan2(-m[..., 1, 2], m[..., 2, 2])
    b = torch.asin(m[..., 0, 2].clamp(-1, 1))
    c = torch.atan2(-m[..., 0, 1], m[..., 0, 0])
    return torch.stack((a, b, c), -1)


def intrinsic_xyz_to_matrix(e: Tensor) -> Tensor:
    """Return Rx(a) Ry(b) Rz(c), (..., 3, 3), of angles (..., 3); see the inverse above."""
    return euler_to_matrix(-e).transpose(-1, -2)
