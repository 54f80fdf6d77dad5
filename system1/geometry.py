"""What a policy sees, as tensors: the inputs, points from RGB-D images, and rotations.

A pixel without depth (0, negative, NaN, infinite) becomes an *invalid point*: its
coordinates are set to zero so that no NaN can spread, and the mask that travels with it
keeps it out of every average and every attention.

Rotations are quaternions, matrices, the 6D form and CALVIN's Euler angles. The 6D form is the
first two columns of the matrix, one after the other (Zhou et al. 2019, "On the Continuity of
Rotation Representations in Neural Networks"): it has no jump, which quaternions and Euler angles
have, and CALVIN's roll sits beside its jump at pi. Quaternions are named by their order: `wxyz`
inside the official model, `xyzw` everywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

# ------------------------------------------------------------------------------------------------
# Records


PROPRIO_FEATURES = 14  # what the encoder makes of one reading


@dataclass(frozen=True, slots=True)
class Inputs:
    """One batch of observations, on the policy's device, in the world frame.

    Cameras may differ in size, so images are tuples, one entry a camera in the
    configuration's order.
    """

    rgb: tuple[Tensor, ...]  # (B, 3, h, w), 0 to 1
    xyz: tuple[Tensor, ...]  # (B, 3, h, w), metres, zero where invalid
    valid: tuple[Tensor, ...]  # (B, h, w) bool
    # (B, nhist, 9), newest last: xyz (m, world), quaternion xyzw, gripper width (m), open (0 or 1)
    proprio: Tensor
    latent: Tensor | None  # (B, memory, n_tokens, d), newest last; None for policy only
    latent_age_s: Tensor | None  # (B, memory)
    latent_mask: Tensor | None  # (B, memory) bool, False where there is none
    task: Tensor  # (B,) int64, -1 for none

    @property
    def batch(self) -> int:
        """How many observations."""
        return len(self.proprio)

    def without_latent(self) -> Inputs:
        """Return the same with the null latent ("policy only")."""
        return replace(self, latent=None, latent_age_s=None, latent_mask=None)


@dataclass(frozen=True, slots=True)
class KeyposeVote:
    """Where the hand should go next, in the opinion of every scene token; see `KeyposeHead`."""

    position: Tensor  # (B, K, 3) metres, relative to the gripper: the weighted mean of votes
    rotation: Tensor  # (B, K, 6) 6D, relative to the gripper
    opened: Tensor  # (B, K) logits of the gripper's state from there on
    weight: Tensor  # (B, N, K), one over each keypose's tokens
    votes: Tensor  # (B, N, K, 3) metres, relative to the gripper


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything about the observation that a head may look at; made once a call."""

    tokens: Tensor  # (B, N, dim)
    xyz: Tensor  # (B, N, 3) metres, relative to the gripper
    mask: Tensor | None  # (B, N) bool; None when every token is valid
    condition: Tensor  # (B, M, dim)
    condition_mask: Tensor  # (B, M) bool
    signal: Tensor  # (B, dim): condition and proprioception, for AdaLN
    proprio: Tensor  # (B, nhist, 14) features
    vote: KeyposeVote | None = None  # its tokens are the last of `tokens`
    latent: Tensor | None = None  # (B, M - 1, width) as System 2 gave it; zero where left out


def merge_masks(parts: list[tuple[Tensor | None, Tensor]]) -> Tensor | None:
    """Concatenate masks of token groups along tokens; None stands for "all valid".

    Args:
        parts: pairs of a mask (B, N) or None and the tokens (B, N, dim) it belongs to.
    """
    if all(mask is None for mask, _ in parts):
        return None
    whole = [
        torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if mask is None
        else mask
        for mask, tokens in parts
    ]
    return torch.cat(whole, 1)


# ------------------------------------------------------------------------------------------------
# Points


def deproject(
    depth: Tensor, k: Tensor, t_world_cam: Tensor, center: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Lift depth images into the world frame.

    Args:
        depth: (..., H, W) metres along the optical axis.
        k: (..., 3, 3) intrinsics in pixels, pixel centres at +0.5.
        t_world_cam: (..., 4, 4) camera to world; x right, y down, z forward.
        center: where in its pixel a ray is; 0 reproduces the published CALVIN code.

    Returns:
        xyz (..., 3, H, W) in metres in the world frame, zero where invalid, and the mask of
        valid pixels (..., H, W).
    """
    height, width = depth.shape[-2:]
    valid = torch.isfinite(depth) & (depth > 0)
    z = torch.where(valid, depth, 0.0)
    u = torch.arange(width, device=depth.device, dtype=z.dtype) + center
    v = torch.arange(height, device=depth.device, dtype=z.dtype) + center
    k, t_world_cam = k.to(z.dtype), t_world_cam.to(z.dtype)

    def entry(m: Tensor, i: int, j: int) -> Tensor:
        return m[..., i, j, None, None]

    x = (u - entry(k, 0, 2)) / entry(k, 0, 0) * z
    y = (v[:, None] - entry(k, 1, 2)) / entry(k, 1, 1) * z
    world = [
        entry(t_world_cam, i, 0) * x
        + entry(t_world_cam, i, 1) * y
        + entry(t_world_cam, i, 2) * z
        + entry(t_world_cam, i, 3)
        for i in range(3)
    ]
    return torch.stack(world, -3) * valid.unsqueeze(-3), valid


def shrink(
    rgb: Tensor, depth: Tensor, k: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring a camera's image to the size that the encoder works on.

    Colour is averaged over areas; depth takes the pixel nearest to each new centre, since an
    average across an edge is a point on no surface.

    Args:
        rgb: (..., 3, H, W); depth: (..., H, W); k: (..., 3, 3).
        height: rows wanted.
        width: columns wanted.

    Returns:
        The three, at the new size.
    """
    old_h, old_w = depth.shape[-2:]
    if (old_h, old_w) == (height, width):
        return rgb, depth, k
    flat = rgb.reshape(-1, 3, old_h, old_w)
    small = adaptive_avg_pool2d(flat, (height, width)).reshape(*rgb.shape[:-2], height, width)
    rows = ((torch.arange(height, device=depth.device) + 0.5) * old_h / height).long()
    cols = ((torch.arange(width, device=depth.device) + 0.5) * old_w / width).long()
    near = depth[..., rows, :][..., cols]
    # The chosen pixel's centre lies up to half a pixel from the new pixel's centre.
    shift_x = ((cols + 0.5) * width / old_w - torch.arange(width, device=cols.device) - 0.5).mean()
    shift_y = (
        (rows + 0.5) * height / old_h - torch.arange(height, device=rows.device) - 0.5
    ).mean()
    scaled = k.clone()
    scaled[..., 0, :] *= width / old_w
    scaled[..., 1, :] *= height / old_h
    scaled[..., 0, 2] -= shift_x.to(k.dtype)
    scaled[..., 1, 2] -= shift_y.to(k.dtype)
    return small, near, scaled


def masked_pool(xyz: Tensor, valid: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Average the valid points of each cell of a grid.

    Args:
        xyz: (B, 3, H, W); valid: (B, H, W) bool.
        height: rows of the grid.
        width: columns of the grid.

    Returns:
        Mean points (B, 3, height, width), zero in empty cells, and the mask of cells with at
        least one valid point (B, height, width).
    """
    weight = valid.unsqueeze(1).to(xyz.dtype)
    share = adaptive_avg_pool2d(weight, (height, width))
    mean = adaptive_avg_pool2d(xyz * weight, (height, width)) / share.clamp_min(1e-6)
    return mean, share[:, 0] > 0


def clean_points(xyz: Tensor) -> tuple[Tensor, Tensor]:
    """Zero the points (..., 3, H, W) that are not finite; return them and the valid mask."""
    valid = torch.isfinite(xyz).all(-3)
    return torch.where(valid.unsqueeze(-3), xyz, 0.0), valid


def farthest_point_sample(x: Tensor, count: int, valid: Tensor | None = None) -> Tensor:
    """Choose `count` rows far from each other, greedily, starting from row 0.

    All distances come from one matrix product in float64, so a step costs a row look-up, a
    minimum and an argmax instead of a pass over all features. Batched; nothing leaves the
    device. 3D Diffuser Actor samples its scene tokens so, in feature space.

    Args:
        x: (B, N, C) points or features.
        count: how many to choose, at most N.
        valid: (B, N) bool; rows that are False are chosen only when nothing else is left,
            and the walk then starts from the first valid row.

    Returns:
        Indices (B, count), in order of choice.
    """
    batch, total, _ = x.shape
    if not 1 <= count <= total:
        raise ValueError(f"count: {count} is not in 1..{total}")
    wide = x.double()
    norm = wide.square().sum(-1)
    apart = torch.baddbmm(
        norm.unsqueeze(1) + norm.unsqueeze(2), wide, wide.transpose(1, 2), alpha=-2.0
    )
    # A row is at a negative distance from itself: once chosen it stays below all others,
    # although rounding may have put it above its duplicates.
    apart.diagonal(dim1=1, dim2=2).fill_(-2.0)
    best = torch.full((batch, total), torch.inf, dtype=torch.float64, device=x.device)
    at = torch.zeros(batch, 1, dtype=torch.long, device=x.device)
    if valid is not None:
        best = torch.where(valid, best, -1.0)
        at = valid.to(torch.uint8).argmax(-1, keepdim=True)
    chosen = [at]
    row = torch.empty(batch, 1, total, dtype=torch.float64, device=x.device)
    for _ in range(count - 1):
        torch.gather(apart, 1, at.unsqueeze(-1).expand(-1, -1, total), out=row)
        torch.minimum(best, row[:, 0], out=best)
        at = best.argmax(-1, keepdim=True)
        chosen.append(at)
    return torch.cat(chosen, 1)


# ------------------------------------------------------------------------------------------------
# Rotations


IDENTITY_6D = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


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
