"""A plain transformer head: what remains when the 3D ideas are taken away.

Trajectory tokens attend to scene and condition tokens through torch's own decoder layers.
Positions enter as a linear embedding of the token's point, time as one more token; no rotary
code, no modulation. The baseline that the others have to beat.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openhelix.system1.attention import sinusoid
from openhelix.system1.config import PolicyConfig
from openhelix.system1.geometry import Scene, merge_masks
from openhelix.system1.heads.base import DiffusionHead, Step, decoder


class PlainHead(DiffusionHead):
    """`nn.TransformerDecoder` over trajectory tokens."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        dim = config.dim
        self.dim = dim
        self.embed = nn.Linear(9, dim)
        self.row = nn.Parameter(0.02 * torch.randn(config.horizon, dim))
        self.place = nn.Linear(3, dim)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.decoder = decoder(config)
        self.out = nn.Linear(dim, 9)
        self.openness = nn.Linear(dim, 1)

    def memory(self, scene: Scene) -> tuple[Tensor, Tensor | None]:
        """Return what the decoder attends to and its mask, True where hidden."""
        tokens = scene.tokens + self.place(scene.xyz.to(self.row.dtype))
        whole = torch.cat((tokens, scene.condition, scene.signal.unsqueeze(1)), 1)
        mask = merge_masks(
            [
                (scene.mask, scene.tokens),
                (scene.condition_mask, scene.condition),
                (None, scene.signal.unsqueeze(1)),
            ]
        )
        return whole, None if mask is None else ~mask

    def decode(
        self, x: Tensor, time: Tensor, memory: Tensor, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the decoder; time is (B, dim)."""
        h = self.embed(x.to(self.row.dtype)) + self.row
        h = self.decoder(
            torch.cat((h, time.unsqueeze(1)), 1), memory, memory_key_padding_mask=hidden
        )[:, :-1]
        return self.out(h), self.openness(h)

    def forward(self, x: Tensor, t: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
        """See `DiffusionHead.forward`."""
        draws = len(x) // len(scene.signal)
        memory, hidden = self.memory(scene)
        if draws > 1:
            memory = memory.repeat_interleave(draws, 0)
            hidden = None if hidden is None else hidden.repeat_interleave(draws, 0)
        return self.decode(x, self.time(sinusoid(t, self.dim).to(self.row.dtype)), memory, hidden)

    def prepare(self, scene: Scene, timesteps: Tensor) -> Step:
        """See `DiffusionHead.prepare`."""
        memory, hidden = self.memory(scene)
        times = self.time(sinusoid(timesteps, self.dim).to(self.row.dtype))

        def step(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.decode(x, times[i].expand(len(x), -1), memory, hidden)

        return step
