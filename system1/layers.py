"""The post-norm layers of 3D Diffuser Actor, under the checkpoints' parameter names.

Each layer takes its modulation from outside (`Table`, made for all denoising steps at once)
and its keys and values too where the caller has them, so that one implementation serves
training, where everything changes, and acting, where almost nothing does.
Three habits of the original matter for parity: in attention the modulation touches the query
only and the residual is the unmodulated query; in the feed-forward the residual is the
modulated input; keys and values are never modulated.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from openhelix.system1.attention import AdaLN, Attention, Linear, modulate

Table = tuple[Tensor, Tensor]
KeyValue = tuple[Tensor, Tensor]


Words = KeyValue | Tensor  # what attention to language needs; see `words_of`


def words_of(attention: Attention, language: Tensor) -> Words:
    """Return what attending to language tokens (B, n, dim) needs.

    Keys and values; or, for a single token, what the attention adds to every row (B, 1, dim):
    the softmax over one token is one, whatever is asked.
    """
    k, v = attention.key_value(language)
    return attention.out_proj(v) if language.shape[1] == 1 else (k, v)


def spread(added: Tensor, x: Tensor) -> Tensor:
    """Return an addition of B observations for x of B * k rows, k draws of each."""
    draws = len(x) // len(added)
    return added.repeat_interleave(draws, 0) if draws > 1 else added


class RelativeAttention(nn.Module):
    """Attention, residual, norm."""

    def __init__(self, dim: int, heads: int, adaln: bool) -> None:
        super().__init__()
        self.multihead_attn = Attention(dim, heads)
        self.norm = nn.LayerNorm(dim)
        if adaln:
            self.adaln = AdaLN(dim)

    def forward(
        self,
        x: Tensor,
        kv: Words,
        table: Table | None = None,
        code: Tensor | None = None,
        mask: Tensor | None = None,
        padding: int = 0,
    ) -> Tensor:
        """Return x (B, N, dim) after attending to `kv` (each (B or B / k, M, dim)).

        When x has k times the batch of `kv`, its rows are k draws of each observation, side
        by side, and are folded into the queries.
        """
        if isinstance(kv, Tensor):
            return self.norm(x + spread(kv, x))
        query = x if table is None else modulate(x, table)
        q = self.multihead_attn.query(query, code)
        folded = q.reshape(len(kv[0]), -1, q.shape[-1])
        seen = self.multihead_attn.attend(folded, *kv, mask, padding).view_as(x)
        return self.norm(self.multihead_attn.out_proj.add(seen, x))


class FeedForward(nn.Module):
    """Two linear layers, residual, norm."""

    def __init__(self, dim: int, hidden: int, adaln: bool) -> None:
        super().__init__()
        self.linear1 = Linear(dim, hidden)
        self.linear2 = Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)
        if adaln:
            self.adaln = AdaLN(dim)

    def forward(self, x: Tensor, table: Table | None = None) -> Tensor:
        """Return x (B, N, dim) after the layer."""
        if table is not None:
            x = modulate(x, table)
        return self.norm(self.linear2.add(self.linear1.relu(x), x))


class CrossStack(nn.Module):
    """Layers of attention to a context and feed-forward."""

    def __init__(self, dim: int, heads: int, layers: int, adaln: bool) -> None:
        super().__init__()
        self.attn_layers = nn.ModuleList(
            RelativeAttention(dim, heads, adaln) for _ in range(layers)
        )
        self.ffw_layers = nn.ModuleList(FeedForward(dim, dim, adaln) for _ in range(layers))

    def pairs(self) -> list[tuple[RelativeAttention, FeedForward]]:
        """Return the layers with their types."""
        attn = cast(list[RelativeAttention], list(self.attn_layers))
        return list(zip(attn, cast(list[FeedForward], list(self.ffw_layers)), strict=True))


class SelfStack(nn.Module):
    """Layers of (attention to language), self-attention and feed-forward."""

    def __init__(self, dim: int, heads: int, layers: int, language: int) -> None:
        super().__init__()
        self.self_attn_layers = nn.ModuleList(
            RelativeAttention(dim, heads, True) for _ in range(layers)
        )
        self.cross_attn_layers = nn.ModuleList(
            RelativeAttention(dim, heads, True) for _ in range(language)
        )
        self.ffw_layers = nn.ModuleList(FeedForward(dim, dim, True) for _ in range(layers))

    def layers(self) -> list[tuple[RelativeAttention | None, RelativeAttention, FeedForward]]:
        """Return (language or None, self, feed-forward) a layer, with their types."""
        selfs = cast(list[RelativeAttention], list(self.self_attn_layers))
        feeds = cast(list[FeedForward], list(self.ffw_layers))
        cross: list[RelativeAttention | None] = [
            cast(RelativeAttention, layer) for layer in self.cross_attn_layers
        ]
        cross += [None] * (len(selfs) - len(cross))
        return list(zip(cross, selfs, feeds, strict=True))


class LanguageLayer(nn.Module):
    """Attention to language, norm, and a feed-forward that not every user applies."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.cross_12 = Attention(dim, heads)
        self.norm_12 = nn.LayerNorm(dim)
        # Index 3, not 2, as in the checkpoints: between them stood a dropout.
        self.ffn_12 = nn.ModuleDict({"0": Linear(dim, 4 * dim), "3": Linear(4 * dim, dim)})
        self.norm_122 = nn.LayerNorm(dim)

    def attend(self, x: Tensor, words: Words, place: Tensor | None = None) -> Tensor:
        """Return norm(x + attention(x + place)) for x (B, N, dim)."""
        if isinstance(words, Tensor):
            return self.norm_12(x + spread(words, x))
        query = x if place is None else x + place
        q = self.cross_12.query(query)
        folded = q.reshape(len(words[0]), -1, q.shape[-1])
        seen = self.cross_12.attend(folded, *words).view_as(x)
        return self.norm_12(self.cross_12.out_proj.add(seen, x))

    def feed(self, x: Tensor) -> Tensor:
        """Return norm(x + feed-forward(x))."""
        up, down = cast(Linear, self.ffn_12["0"]), cast(Linear, self.ffn_12["3"])
        return self.norm_122(down.add(up.relu(x), x))


class LanguageStack(nn.Module):
    """A list of `LanguageLayer`."""

    def __init__(self, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LanguageLayer(dim, heads) for _ in range(layers))

    def typed(self) -> list[LanguageLayer]:
        """Return the layers with their type."""
        return cast(list[LanguageLayer], list(self.layers))


def join(first: Tensor, second: Tensor) -> Tensor:
    """Concatenate tokens, repeating `second` where `first` has several draws of it."""
    draws = len(first) // len(second)
    if draws > 1:
        second = second.repeat_interleave(draws, 0)
    return torch.cat((first, second), 1)
