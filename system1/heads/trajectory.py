"""The default head of our own policies: a small transformer over trajectory tokens.

What it keeps of 3D Diffuser Actor: trajectory tokens placed in 3D by the rotary code of
where the noisy trajectory is, attending to scene tokens placed in 3D. What it drops: scene
tokens are not updated inside the denoising loop, so a step costs T rows instead of T + 266,
their keys and values are computed once, and several noise draws of one observation cost
little more than one in training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from openhelix.system1.attention import Block, blocks_of, metric_frequencies, rotary_code, sinusoid
from openhelix.system1.config import PolicyConfig
from openhelix.system1.diffusion import leading
from openhelix.system1.geometry import Scene, merge_masks
from openhelix.system1.heads.base import DiffusionHead, Step

Tables = list[tuple[Tensor, ...]]


class TrajectoryHead(DiffusionHead):
    """Denoise a chunk while looking at the scene's tokens."""

    frequencies: Tensor
    metres: Tensor

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        dim = config.dim
        self.dim, self.heads = dim, config.heads
        self.embed = nn.Linear(9, dim)
        self.row = nn.Parameter(0.02 * torch.randn(config.horizon, dim))
        # Marks rows that are given, not noisy; zero at first, so that a policy that knew of none
        # is what it was.
        self.given = nn.Parameter(torch.zeros(dim)) if config.given_rows else None
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.heads, config.ffn_mult) for _ in range(config.layers)
        )
        self.final = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, 9)
        self.openness = nn.Linear(dim, 1)
        nn.init.zeros_(self.final.weight)
        nn.init.zeros_(self.final.bias)
        self.register_buffer(
            "frequencies", metric_frequencies(dim // config.heads), persistent=False
        )
        # Metres from normalised positions, set by the policy from its normaliser.
        self.register_buffer("metres", torch.ones(config.horizon, 3), persistent=False)

    def context(self, scene: Scene) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        """Return each block's keys and values of scene and condition, and their mask."""
        tokens = torch.cat((scene.tokens, scene.condition), 1)
        home = scene.xyz.new_zeros(*scene.condition.shape[:2], 3)
        code = rotary_code(torch.cat((scene.xyz, home), 1), self.frequencies, self.heads)
        full = None if scene.condition.shape[1] == 1 else scene.condition_mask
        mask = merge_masks([(scene.mask, scene.tokens), (full, scene.condition)])
        normed = layer_norm(tokens, (self.dim,))
        return [b.key_value(normed, code) for b in blocks_of(self.blocks)], mask

    def tables(self, signal: Tensor) -> tuple[Tables, tuple[Tensor, Tensor]]:
        """Return the modulation of every block and of the output, for signals (..., dim)."""
        scale, shift = self.final(signal).unsqueeze(-2).chunk(2, -1)
        return [block.tables(signal) for block in blocks_of(self.blocks)], (1 + scale, shift)

    def denoise(
        self,
        x: Tensor,
        tables: Tables,
        final: tuple[Tensor, Tensor],
        context: list[tuple[Tensor, Tensor]],
        mask: Tensor | None,
        given: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the blocks on one noisy trajectory a row, of which the first `given` are not."""
        code = rotary_code(x[..., :3] * self.metres, self.frequencies, self.heads)
        h = self.embed(x.to(self.row.dtype)) + self.row
        if given is not None and self.given is not None:
            h = h + leading(given, x.shape[1]).unsqueeze(-1) * self.given
        for block, table, kv in zip(self.blocks, tables, context, strict=True):
            h = block(h, table, code, kv, mask)
        h = torch.addcmul(final[1], layer_norm(h, (self.dim,)), final[0])
        return self.out(h), self.openness(h)

    def forward(
        self, x: Tensor, t: Tensor, scene: Scene, given: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `DiffusionHead.forward`; `given` (B * k,) are the rows of each that are clean."""
        draws = len(x) // len(scene.signal)
        signal = self.time(
            sinusoid(t, self.dim).to(self.row.dtype)
        ) + scene.signal.repeat_interleave(draws, 0)
        tables, final = self.tables(signal)
        context, mask = self.context(scene)
        return self.denoise(x, tables, final, context, mask, given)

    def prepare(self, scene: Scene, timesteps: Tensor, given: Tensor | None = None) -> Step:
        """See `DiffusionHead.prepare`; `given` (B,) are the rows of each that are clean."""
        signal = (
            self.time(sinusoid(timesteps, self.dim).to(self.row.dtype)).unsqueeze(1) + scene.signal
        )
        tables, (scale, shift) = self.tables(signal)
        context, mask = self.context(scene)
        steps = [[tuple(part[i] for part in table) for table in tables] for i in range(len(signal))]

        def step(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.denoise(x, steps[i], (scale[i], shift[i]), context, mask, given)

        return step
