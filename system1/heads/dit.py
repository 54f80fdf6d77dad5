"""A diffusion transformer over a resampled scene: RoboDual's shape (Bu et al. 2024).

A Perceiver resampler (Alayrac et al. 2022, Sec. 3.1) reduces the scene to a few learned
queries; DiT blocks attend to those and to all latent tokens; the modulation carries the
timestep, proprioception and the mean of the resampled scene. Nothing has a place in 3D.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from openhelix.system1.attention import Attention, Block, blocks_of, sinusoid
from openhelix.system1.config import PolicyConfig
from openhelix.system1.geometry import Scene, merge_masks
from openhelix.system1.heads.base import DiffusionHead, Step

QUERIES_A_CAMERA = 8
RESAMPLER_LAYERS = 2


class Resampler(nn.Module):
    """Learned queries that attend to the scene and to themselves."""

    def __init__(self, dim: int, heads: int, queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(queries, dim))
        self.attention = nn.ModuleList(Attention(dim, heads) for _ in range(RESAMPLER_LAYERS))
        self.feed = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim)
            )
            for _ in range(RESAMPLER_LAYERS)
        )

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Return (B, queries, dim) for tokens (B, N, dim) with mask (B, N)."""
        x = self.queries.expand(len(tokens), -1, -1)
        whole_mask = merge_masks([(mask, tokens), (None, x)])
        for attention, feed in zip(self.attention, self.feed, strict=True):
            seen = torch.cat((tokens, x), 1)
            width = seen.shape[-1:]
            x = x + attention(layer_norm(x, width), layer_norm(seen, width), mask=whole_mask)
            x = x + feed(x)
        return x


class DitHead(DiffusionHead):
    """DiT blocks over trajectory tokens."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        dim = config.dim
        self.dim = dim
        self.resample = Resampler(dim, config.heads, QUERIES_A_CAMERA * len(config.cameras))
        self.place = nn.Linear(3, dim)
        self.mean = nn.Linear(dim, dim)
        self.embed = nn.Linear(9, dim)
        self.row = nn.Parameter(0.02 * torch.randn(config.horizon, dim))
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.heads, config.ffn_mult) for _ in range(config.layers)
        )
        self.final = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, 9)
        self.openness = nn.Linear(dim, 1)

    def context(self, scene: Scene) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None, Tensor]:
        """Return each block's keys and values, their mask, and the modulation's scene part."""
        few = self.resample(scene.tokens + self.place(scene.xyz.to(self.row.dtype)), scene.mask)
        tokens = layer_norm(torch.cat((few, scene.condition), 1), (self.dim,))
        mask = merge_masks([(None, few), (scene.condition_mask, scene.condition)])
        pooled = scene.signal + self.mean(few.mean(1))
        return [b.key_value(tokens, None) for b in blocks_of(self.blocks)], mask, pooled

    def denoise(
        self,
        x: Tensor,
        signal: Tensor,
        context: list[tuple[Tensor, Tensor]],
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run the blocks; signal is (B, dim)."""
        h = self.embed(x.to(self.row.dtype)) + self.row
        for block, kv in zip(blocks_of(self.blocks), context, strict=True):
            h = block(h, block.tables(signal), None, kv, mask)
        scale, shift = self.final(silu(signal)).unsqueeze(-2).chunk(2, -1)
        h = torch.addcmul(shift, layer_norm(h, (self.dim,)), 1 + scale)
        return self.out(h), self.openness(h)

    def forward(self, x: Tensor, t: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
        """See `DiffusionHead.forward`."""
        context, mask, pooled = self.context(scene)
        pooled = pooled.repeat_interleave(len(x) // len(pooled), 0)
        return self.denoise(
            x, self.time(sinusoid(t, self.dim).to(self.row.dtype)) + pooled, context, mask
        )

    def prepare(self, scene: Scene, timesteps: Tensor) -> Step:
        """See `DiffusionHead.prepare`."""
        context, mask, pooled = self.context(scene)
        signals = self.time(sinusoid(timesteps, self.dim).to(self.row.dtype)).unsqueeze(1) + pooled

        def step(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.denoise(x, signals[i], context, mask)

        return step
