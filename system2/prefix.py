"""Prompt tuning through a cached prefix: exact gradients at the price of a few tokens.

`<ACT>` stands last and attention is causal, so the keys and values of image and instruction
do not depend on it. With everything but `<ACT>` frozen (the paper's prompt tuning) they are
constants of a sample: computed once, without gradient, and kept. Every later step runs
forward and backward over the `<ACT>` tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from system2.prompt import Prompt


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values of a batch of prompts without their `<ACT>` tokens.

    Attributes:
        keys, values: (layers, B, kv_heads, T, head_dim); rows of shorter prompts are filled
            up on the right with zeros.
        lengths: (B,) real tokens of each prompt.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return int(self.lengths.shape[0])

    def rows(self, index: Tensor) -> Prefix:
        """Return some of the samples, cut to the longest among them."""
        lengths = self.lengths[index]
        longest = int(lengths.max())
        return Prefix(self.keys[:, index, :, :longest], self.values[:, index, :, :longest], lengths)

    def to(self, dtype: torch.dtype) -> Prefix:
        """Return it in another precision; bfloat16 halves the memory."""
        return Prefix(self.keys.to(dtype), self.values.to(dtype), self.lengths)

    def at(self, device: torch.device | str) -> Prefix:
        """Return it on a device."""
        moved = (x.to(device) for x in (self.keys, self.values, self.lengths))
        return Prefix(*moved)

    @staticmethod
    def join(parts: Sequence[Prefix]) -> Prefix:
        """Return several batches as one."""
        longest = max(part.keys.shape[3] for part in parts)

        def wide(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, 0, 0, longest - tensor.shape[3]))

        return Prefix(
            torch.cat([wide(part.keys) for part in parts], dim=1),
            torch.cat([wide(part.values) for part in parts], dim=1),
            torch.cat([part.lengths for part in parts]),
        )


def embed(
    model: Any, prompts: Sequence[Prompt], image_token_id: int, features: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the input embeddings (B, T, hidden), padded on the right, and the lengths (B,).

    Args:
        model: transformers' `LlavaModel`.
        prompts: of one checkpoint; all with vision or none.
        features: projected image tokens (B, n_image, hidden), or None without vision.
    """
    table = model.get_input_embeddings()
    device = table.weight.device
    lengths = torch.tensor([prompt.layout.length for prompt in prompts], device=device)
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : prompt.layout.length] = torch.tensor(prompt.expanded(image_token_id))
    embeddings = table(ids.to(device))
    if features is not None:
        start, stop = prompts[0].layout.image
        head, tail = embeddings[:, :start], embeddings[:, stop:]
        embeddings = torch.cat([head, features.to(embeddings.dtype), tail], dim=1)
    return embeddings, lengths


@torch.no_grad()
def compute_prefix(language_model: Any, embeddings: Tensor, lengths: Tensor) -> Prefix:
    """Run the frozen language model over the prompts' embeddings (B, T, hidden)."""
    from transformers import DynamicCache

    cache = DynamicCache(config=language_model.config)
    language_model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
    keys = torch.stack([layer.keys for layer in cache.layers])
    values = torch.stack([layer.values for layer in cache.layers])
    real = torch.arange(keys.shape[3], device=keys.device) < lengths[:, None]  # (B, T)
    real = real[None, :, None, :, None]
    return Prefix(keys * real, values * real, lengths)


def states_after(language_model: Any, prefix: Prefix, act: Tensor) -> Tensor:
    """Return the final states (B, n_act, hidden) of `<ACT>` after each prefix.

    Args:
        language_model: the frozen `LlamaModel`.
        prefix: of B samples.
        act: (n_act, hidden) embeddings shared by the batch, or (B, n_act, hidden); gradients
            flow to it and, where they are trainable, to the model's weights at these tokens.
    """
    from transformers import DynamicCache

    batch, n_act = len(prefix), act.shape[-2]
    act = act.expand(batch, n_act, act.shape[-1])
    dtype, device = act.dtype, act.device
    cache = DynamicCache(config=language_model.config)
    for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(keys.to(device, dtype), values.to(device, dtype), layer)
    longest = prefix.keys.shape[3]
    real = torch.arange(longest, device=device) < prefix.lengths.to(device)[:, None]
    past = real[:, None, :].expand(batch, n_act, longest)
    causal = torch.ones(n_act, n_act, dtype=torch.bool, device=device).tril()
    mask = torch.cat([past, causal.expand(batch, n_act, n_act)], dim=2)[:, None]
    positions = prefix.lengths.to(device)[:, None] + torch.arange(n_act, device=device)
    output = language_model(
        inputs_embeds=act,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return output.last_hidden_state
