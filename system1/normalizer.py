"""Affine maps between trajectories in metres and rotations and what the diffusion works on.

A trajectory row is nine numbers: position relative to the gripper (3) and the 6D form of the
relative rotation (6). Our own policies fit an offset and a scale for every row of the chunk,
because the first rows move millimetres and the last ones decimetres: with one scale for all
rows the first would drown in the noise. The official checkpoints use one box for positions
and leave rotations as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openhelix.system1.config import OFFICIAL_BOUNDS_M, PolicyConfig

IDENTITY_6D = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True, slots=True)
class Normalizer:
    """`normalised = (row - offset) / scale`, each (T or 1, 9)."""

    offset: Tensor
    scale: Tensor

    def normalize(self, rows: Tensor) -> Tensor:
        """Map (..., T, 9) from metres and 6D to the diffusion's space."""
        return (rows - self.offset) / self.scale

    def denormalize(self, rows: Tensor) -> Tensor:
        """Map (..., T, 9) back."""
        return rows * self.scale + self.offset

    def to(self, device: torch.device | str) -> Normalizer:
        """Return a copy on a device."""
        return Normalizer(self.offset.to(device), self.scale.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {"offset": self.offset, "scale": self.scale}

    @staticmethod
    def official() -> Normalizer:
        """Return the box of the published CALVIN checkpoints, rotations untouched."""
        low, high = (torch.tensor(b, dtype=torch.float32) for b in OFFICIAL_BOUNDS_M)
        offset = torch.cat(((low + high) / 2, torch.zeros(6)))[None]
        scale = torch.cat(((high - low) / 2, torch.ones(6)))[None]
        return Normalizer(offset, scale)

    @staticmethod
    def default(config: PolicyConfig) -> Normalizer:
        """Return a guess for an untrained policy: 0.4 m/s and 1.5 rad/s reach one unit."""
        if config.head == "diffuser_actor":
            return Normalizer.official()
        seconds = (torch.arange(config.horizon) + 1)[:, None] / config.hz
        scale = torch.cat(
            ((0.4 * seconds).expand(-1, 3), (1.5 * seconds).clamp(0.02, 1.0).expand(-1, 6)), -1
        )
        offset = torch.cat((torch.zeros(3), torch.tensor(IDENTITY_6D)))
        return Normalizer(offset.expand(config.horizon, -1).clone(), scale.clone())

    @staticmethod
    def fit(rows: Tensor, mask: Tensor, quantile: float = 0.98) -> Normalizer:
        """Fit to relative trajectories.

        The three axes share one scale a row, and so do the six rotation numbers, so that no
        direction that happened to be still in the data is blown up.

        Args:
            rows: (N, T, 9) relative trajectories in metres and 6D.
            mask: (N, T) bool, True where a row is real.
            quantile: share of the data that ends up within one unit.
        """
        identity = torch.tensor(IDENTITY_6D)
        offsets, scales = [], []
        for i in range(rows.shape[1]):
            real = rows[mask[:, i], i]
            if len(real) == 0:
                raise ValueError(f"rows: row {i} of the chunk is masked out in all of the data")
            position = real[:, :3].abs().amax(-1)
            rotation = (real[:, 3:] - identity).abs().amax(-1)
            p = torch.quantile(position[:100_000], quantile).clamp_min(2e-3)
            r = torch.quantile(rotation[:100_000], quantile).clamp_min(1e-2)
            offsets.append(torch.cat((torch.zeros(3), identity)))
            scales.append(torch.cat((p.expand(3), r.expand(6))))
        return Normalizer(torch.stack(offsets), torch.stack(scales))
