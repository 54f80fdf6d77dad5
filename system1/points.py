"""From RGB-D images to world-frame points on the policy's device, and sampling among them.

A pixel without depth (0, negative, NaN, infinite) becomes an *invalid point*: its
coordinates are set to zero so that no NaN can spread, and the mask that travels with it
keeps it out of every average and every attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d


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
