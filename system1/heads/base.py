"""What every head offers: `loss` for training, `sample` for acting, on a `Scene`.

A diffusion head implements `forward` (training: any timesteps, no caches) and `prepare`
(acting: everything that depends only on the scene or only on the timestep, computed once,
closed over by the step function it returns). The loop between is `openhelix.system1.diffusion`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from openhelix.system1.config import PolicyConfig
from openhelix.system1.geometry import Scene

Step = Callable[[int, Tensor], tuple[Tensor, Tensor]]


def decoder(config: PolicyConfig) -> nn.TransformerDecoder:
    """Return PyTorch's own transformer decoder, of a configuration's width, heads and layers."""
    layer = nn.TransformerDecoderLayer(
        config.dim,
        config.heads,
        config.ffn_mult * config.dim,
        dropout=config.dropout,
        batch_first=True,
        norm_first=True,
    )
    return nn.TransformerDecoder(layer, config.layers, norm=nn.LayerNorm(config.dim))


class DiffusionHead(nn.Module, ABC):
    """A network that denoises trajectories (B, T, 9); built from a configuration."""

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
        """Predict for noisy trajectories at mixed timesteps, the plain way.

        Args:
            x: (B * k, T, 9): k noise draws of each observation, side by side.
            t: (B * k,) int64 timesteps.
            scene: of B observations.

        Returns:
            The prediction (B * k, T, 9) and openness logits (B * k, T, 1).
        """

    @abstractmethod
    def prepare(self, scene: Scene, timesteps: Tensor) -> Step:
        """Return a function (step index, x) to (prediction, logits), with its caches filled.

        Args:
            scene: of B observations.
            timesteps: (S,) int64, the steps that will be taken, in order.
        """


class DirectHead(nn.Module, ABC):
    """A network that predicts the trajectory at once, without diffusion."""

    @abstractmethod
    def forward(self, scene: Scene, rows: int) -> tuple[Tensor, Tensor]:
        """Return the normalised trajectory (B, T, 9) and openness logits (B, T, 1)."""
