"""An LSTM head: RoboFlamingo's shape (Li et al. 2023).

Latents and proprioception in, trajectory out in one pass. With `sensors: [proprio]` what the robot
sees reaches it only through System 2, so an old latent is all it knows: the "pseudo dual system" that
the paper compares with. With cameras it is told the mean of the scene's tokens as well.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openhelix.system1.config import PolicyConfig
from openhelix.system1.geometry import PROPRIO_FEATURES, Scene
from openhelix.system1.heads.base import DirectHead


class LstmHead(DirectHead):
    """An LSTM over the proprioceptive history, each reading beside the condition."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        dim = config.dim
        self.horizon = config.horizon
        self.reading = nn.Linear(PROPRIO_FEATURES, dim)
        self.look = nn.Linear(dim, dim) if config.sees else None
        self.lstm = nn.LSTM(2 * dim, dim, num_layers=2, batch_first=True)
        self.out = nn.Sequential(
            nn.Linear(2 * dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, config.horizon * 10)
        )

    def forward(self, scene: Scene, rows: int) -> tuple[Tensor, Tensor]:
        """See `DirectHead.forward`."""
        if rows != self.horizon:
            raise ValueError(f"rows: {rows}, this head was built for {self.horizon}")
        weight = scene.condition_mask.unsqueeze(-1).to(scene.condition.dtype)
        goal = (scene.condition * weight).sum(1) / weight.sum(1)
        if self.look is not None:
            goal = goal + self.look(_mean(scene))
        readings = self.reading(scene.proprio)
        h, _ = self.lstm(
            torch.cat((readings, goal.unsqueeze(1).expand(-1, readings.shape[1], -1)), -1)
        )
        out = self.out(torch.cat((h[:, -1], scene.signal), -1)).unflatten(-1, (rows, 10))
        return out[..., :9], out[..., 9:]


def _mean(scene: Scene) -> Tensor:
    """Return the mean of a scene's valid tokens, (B, dim)."""
    if scene.mask is None:
        return scene.tokens.mean(1)
    weight = scene.mask.unsqueeze(-1).to(scene.tokens.dtype)
    return (scene.tokens * weight).sum(1) / weight.sum(1).clamp_min(1)
