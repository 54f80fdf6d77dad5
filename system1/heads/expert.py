"""An action expert on System 2's own keys and values: π0's shape (Black et al. 2024).

One block for each layer of System 2 that the latent holds (read-out `kv`): the trajectory's tokens
attend to that layer's keys and values as they are, and to their own, in one softmax. No projector
lies between the systems, and with `sensors: [proprio]` no live image reaches it; with cameras the
scene's tokens stand among its own.

Keys come before their rotary code, so the order of words and pixels is what System 2 has put into
them; a learned code of the token's place is added.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention, silu

from openhelix.runtime.core.config import ConfigError
from openhelix.system1.attention import sinusoid
from openhelix.system1.config import PolicyConfig
from openhelix.system1.geometry import Scene, merge_masks
from openhelix.system1.heads.base import DiffusionHead, Step

Layers = list[tuple[Tensor, Tensor]]  # keys and values (B, heads, N, width) of each


class ExpertBlock(nn.Module):
    """Attention to System 2's keys and values and to the tokens' own, then a perceptron.

    Args:
        dim: of the tokens.
        heads: of System 2's keys.
        width: of one of them.
        mult: how much wider the perceptron is.
    """

    def __init__(self, dim: int, heads: int, width: int, mult: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.qkv = nn.Linear(dim, 3 * heads * width, bias=False)
        self.out = nn.Linear(heads * width, dim, bias=False)
        self.up = nn.Linear(dim, 2 * mult * dim, bias=False)
        self.down = nn.Linear(mult * dim, dim, bias=False)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Return tokens (B, T, dim); mask (B, N + T) says which are there, System 2's first."""
        normed = layer_norm(x, x.shape[-1:])
        split = self.qkv(normed).unflatten(-1, (3, self.heads, self.width)).permute(2, 0, 3, 1, 4)
        query, own_key, own_value = split
        keys, values = torch.cat((key, own_key), 2), torch.cat((value, own_value), 2)
        found = scaled_dot_product_attention(query, keys, values, attn_mask=mask[:, None, None])
        x = x + self.out(found.transpose(1, 2).flatten(2))
        gate, up = self.up(layer_norm(x, x.shape[-1:])).chunk(2, -1)
        return x + self.down(silu(gate) * up)


class ExpertHead(DiffusionHead):
    """Blocks over the token of the robot's state and those of the noisy trajectory."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        dim, layers, heads = config.dim, config.layers, config.heads
        if not config.latent_kind.startswith("kv") or config.latent_dim % (2 * layers * heads):
            raise ConfigError(
                f"head: 'expert' of {layers} layers and {heads} heads needs as many layers' keys and "
                f"values (latent.kind=kv), not {config.latent_kind} of {config.latent_dim} numbers"
            )
        self.dim, self.layers, self.heads = dim, layers, heads
        self.width = config.latent_dim // (2 * layers * heads)
        self.embed = nn.Linear(9, dim)
        self.row = nn.Parameter(0.02 * torch.randn(config.horizon, dim))
        self.where = nn.Linear(3, dim) if config.sees else None
        self.timed = nn.Sequential(nn.Linear(2 * dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.place = nn.Parameter(
            torch.zeros(config.latent_memory * config.latent_tokens, heads * self.width)
        )
        self.blocks = nn.ModuleList(
            ExpertBlock(dim, heads, self.width, config.ffn_mult) for _ in range(layers)
        )
        self.out = nn.Linear(dim, 9)
        self.openness = nn.Linear(dim, 1)

    def kept(self, scene: Scene) -> tuple[Layers, Tensor]:
        """Return each layer's keys and values, and which tokens are there (B, N).

        A row of zeros is one that the sentence does not fill.
        """
        if scene.latent is None:
            count = len(scene.signal)
            none = scene.signal.new_zeros(count, self.heads, 0, self.width)
            empty = torch.zeros(count, 0, dtype=torch.bool, device=none.device)
            return [(none, none)] * self.layers, empty
        latent, mask = scene.latent.to(self.row.dtype), (scene.latent != 0).any(-1)
        parts = latent.unflatten(-1, (self.layers, 2, self.heads * self.width))
        key, value = parts[..., 0, :] + self.place[: latent.shape[1], None], parts[..., 1, :]
        wide = (-1, self.heads, self.width)
        split = [
            (key[:, :, i].unflatten(2, wide[1:]), value[:, :, i].unflatten(2, wide[1:]))
            for i in range(self.layers)
        ]
        return [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in split], mask

    def own(self, scene: Scene, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, M, dim) before the trajectory's, and the mask (B, N + M + T)."""
        state = scene.signal.unsqueeze(1)
        tokens = state
        if self.where is not None:
            tokens = torch.cat((scene.tokens + self.where(scene.xyz.to(state.dtype)), state), 1)
        rows = state.expand(-1, len(self.row), -1)
        there = merge_masks([(mask, mask), (scene.mask, scene.tokens), (None, state), (None, rows)])
        assert there is not None
        return tokens, there

    def denoise(
        self, x: Tensor, time: Tensor, own: Tensor, layers: Layers, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the blocks; time is (B, dim), `own` and mask as of `own`."""
        rows = self.embed(x.to(self.row.dtype)) + self.row
        timed = self.timed(torch.cat((rows, time.unsqueeze(1).expand_as(rows)), -1))
        h = torch.cat((own, timed), 1)
        for block, (key, value) in zip(self.blocks, layers, strict=True):
            h = block(h, key, value, mask)
        h = layer_norm(h[:, own.shape[1] :], (self.dim,))
        return self.out(h), self.openness(h)

    def forward(self, x: Tensor, t: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
        """See `DiffusionHead.forward`."""
        draws = len(x) // len(scene.signal)
        layers, mask = self.kept(scene)
        own, mask = (part.repeat_interleave(draws, 0) for part in self.own(scene, mask))
        many = [
            (key.repeat_interleave(draws, 0), value.repeat_interleave(draws, 0))
            for key, value in layers
        ]
        return self.denoise(x, sinusoid(t, self.dim).to(self.row.dtype), own, many, mask)

    def prepare(self, scene: Scene, timesteps: Tensor) -> Step:
        """See `DiffusionHead.prepare`."""
        layers, mask = self.kept(scene)
        own, mask = self.own(scene, mask)
        times = sinusoid(timesteps, self.dim).to(self.row.dtype)

        def step(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.denoise(x, times[i].expand(len(x), -1), own, layers, mask)

        return step
