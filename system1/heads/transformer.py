"""Heads that clone behaviour: one pass, no diffusion.

`TransformerHead` is a decoder whose learned queries, one a row, attend to scene and condition
(DP-VLA's and Helix's shape). `MapHead` pools the scene with one learned query (multi-head attention
pooling, Lee et al. 2019) and reads the whole chunk off it (HiRT's shape).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openhelix.system1.config import PolicyConfig
from openhelix.system1.geometry import Scene, merge_masks
from openhelix.system1.heads.base import DirectHead, decoder

NUMBERS = 10  # a row: position, rotation, openness


class _Looking(DirectHead):
    """A head that attends to the scene, its places, the condition and the signal."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.horizon = config.horizon
        self.place = nn.Linear(3, config.dim)

    def memory(self, scene: Scene) -> tuple[Tensor, Tensor | None]:
        """Return what is attended to (B, N, dim), and its mask, True where hidden."""
        tokens = scene.tokens + self.place(scene.xyz.to(scene.tokens.dtype))
        signal = scene.signal.unsqueeze(1)
        mask = merge_masks(
            [(scene.mask, tokens), (scene.condition_mask, scene.condition), (None, signal)]
        )
        return torch.cat((tokens, scene.condition, signal), 1), None if mask is None else ~mask

    def check(self, rows: int) -> None:
        """Refuse another number of rows than the head was built for."""
        if rows != self.horizon:
            raise ValueError(f"rows: {rows}, this head was built for {self.horizon}")


class TransformerHead(_Looking):
    """A transformer decoder over one learned query a row."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        dim = config.dim
        self.row = nn.Parameter(0.02 * torch.randn(config.horizon, dim))
        self.decoder = decoder(config)
        self.out = nn.Linear(dim, NUMBERS)

    def forward(self, scene: Scene, rows: int) -> tuple[Tensor, Tensor]:
        """See `DirectHead.forward`."""
        self.check(rows)
        memory, hidden = self.memory(scene)
        queries = self.row.expand(len(memory), -1, -1)
        out = self.out(self.decoder(queries, memory, memory_key_padding_mask=hidden))
        return out[..., :9], out[..., 9:]


class MapHead(_Looking):
    """Attention pooling with one learned query, then a perceptron to the whole chunk."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        dim = config.dim
        self.query = nn.Parameter(0.02 * torch.randn(1, dim))
        self.norm = nn.LayerNorm(dim)
        self.pool = nn.MultiheadAttention(dim, config.heads, batch_first=True)
        self.feed = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )
        self.out = nn.Sequential(
            nn.Linear(2 * dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, config.horizon * NUMBERS)
        )

    def forward(self, scene: Scene, rows: int) -> tuple[Tensor, Tensor]:
        """See `DirectHead.forward`."""
        self.check(rows)
        memory, hidden = self.memory(scene)
        seen = self.norm(memory)
        query = self.query.expand(len(memory), -1, -1)
        pooled, _ = self.pool(query, seen, seen, key_padding_mask=hidden, need_weights=False)
        pooled = (pooled + self.feed(pooled))[:, 0]
        out = self.out(torch.cat((pooled, scene.signal), -1)).unflatten(-1, (rows, NUMBERS))
        return out[..., :9], out[..., 9:]
