"""The latent adapter: the one way in which System 2's latent enters a policy.

A latent of one token, of several, or a short memory of recent ones with their ages: all
become tokens of the policy's width. Beside them stands one token from a learned table, its
row 0 for "no task named" and one row a task, which is all that a policy without System 2
has. A latent stands in the place of that table's row, not beside it: a policy pretrained on
the table alone then meets one token where it learned to expect one, and System 2 can be
taught to speak for the table before the policy is touched (the paper's first stage). The age
of a latent goes in as a sinusoid code, so that the policy can learn how far to trust an old
one (paper Sec. 3, asynchronous operation).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from openhelix.system1.attention import sinusoid
from openhelix.system1.config import PolicyConfig
from openhelix.system1.scene import Inputs

AGE_UNIT_S = 0.01  # the sinusoid code's unit; its longest wave is then minutes


class Condition(nn.Module):
    """Latents and task to condition tokens and one pooled vector."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        dim = config.dim
        self.latent_tokens, self.latent_dim = config.latent_tokens, config.latent_dim
        self.project = nn.Linear(config.latent_dim, dim)
        self.slot = nn.Parameter(torch.zeros(config.latent_tokens, dim))
        self.age = nn.Linear(dim, dim)
        self.table = nn.Embedding(config.n_tasks + 1, dim)
        self.pool = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        nn.init.zeros_(self.age.weight)
        nn.init.normal_(self.table.weight, std=0.5)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens (B, M, dim), their mask (B, M) and the pooled vector (B, dim)."""
        named = self.table(inputs.task + 1).unsqueeze(1)
        joined = named
        mask = torch.ones(inputs.batch, 1, dtype=torch.bool, device=named.device)
        if inputs.latent is not None:
            latent, seen = self.embed(inputs.latent, inputs.latent_age_s, inputs.latent_mask)
            spoken = (inputs.task >= 0).unsqueeze(1) | ~seen.any(1, keepdim=True)
            joined, mask = torch.cat((named, latent), 1), torch.cat((spoken, seen), 1)
        weight = mask.unsqueeze(-1).to(joined.dtype)
        pooled = self.pool((joined * weight).sum(1) / weight.sum(1))
        return joined, mask, pooled

    def embed(
        self, latent: Tensor, age_s: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the latents' tokens (B, memory * n, dim) and mask.

        Raises:
            ValueError: the latent has another number of tokens or width.
        """
        batch, memory, count, width = latent.shape
        if (count, width) != (self.latent_tokens, self.latent_dim):
            raise ValueError(
                f"latent: {count} tokens of width {width}, the policy was trained on "
                f"{self.latent_tokens} of width {self.latent_dim}"
            )
        # A language model's final states have a few huge channels: without the norm they
        # would drown the rest.
        tokens = self.project(layer_norm(latent.to(self.slot.dtype), (width,))) + self.slot
        if age_s is not None:
            code = sinusoid(age_s.flatten() / AGE_UNIT_S, self.slot.shape[-1])
            tokens = tokens + self.age(code.to(tokens.dtype)).view(batch, memory, 1, -1)
        if mask is None:
            mask = torch.ones(batch, memory, dtype=torch.bool, device=latent.device)
        tokens = torch.where(mask[..., None, None], tokens, 0.0)
        return tokens.flatten(1, 2), mask.repeat_interleave(count, 1)
