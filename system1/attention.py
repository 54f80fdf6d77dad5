"""The parts that all networks of System 1 are made of: packed products, attention, blocks."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    batch_norm,
    conv2d,
    layer_norm,
    linear,
    relu,
    scaled_dot_product_attention,
    silu,
)

# ------------------------------------------------------------------------------------------------
# Weights laid out once for oneDNN's kernels, which a CPU otherwise rearranges at every call.
#
# At batch one a policy runs thousands of small products with the same weights. Handing oneDNN
# a weight in its own blocked layout saves the rearranging (most of the time of a deep
# convolution on a 5 x 5 map), and lets bias, residual, ReLU and batch norm ride along in the
# same pass. The numbers stay those of the plain operators up to rounding.
#
# A `Pack` belongs to the module whose weights it holds and compares their address and version
# at every use, so that a weight that was trained, loaded, cast or moved since is packed again.
# Packs are used on a CPU without gradients; everywhere else, and where this build of torch has
# no such kernels, the plain operators run.


# Below so many rows the plain product is quicker than oneDNN's entry.
FEW_ROWS = {torch.float32: 64, torch.bfloat16: 8}


def _kernels() -> Any:
    """Return oneDNN's fused operators, or None where this build has none."""
    ops = torch.ops.mkldnn
    try:
        for name in ("_linear_pointwise", "_convolution_pointwise"):
            _ = getattr(ops, name).default, getattr(ops, name).binary
        _ = ops._reorder_linear_weight.default, ops._reorder_convolution_weight.default
    except (AttributeError, RuntimeError):
        return None
    return ops if torch.backends.mkldnn.is_available() else None


KERNELS = _kernels()
DTYPES: tuple[torch.dtype, ...] = (torch.float32,)
if KERNELS is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    DTYPES = (torch.float32, torch.bfloat16)


def packable(x: Tensor, weight: Tensor) -> bool:
    """Whether packed weights may be used on x now."""
    return (
        KERNELS is not None
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype in DTYPES
        and x.dtype == weight.dtype
        and not weight.is_inference()  # its version is not tracked
    )


class Pack:
    """Packed copies of some weights, remade when these have changed."""

    __slots__ = ("_key", "_packed")

    def __init__(self) -> None:
        self._key: tuple[int, ...] = ()
        self._packed: tuple[Tensor, Tensor | None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Pack:
        """A copied module packs its own weights: packed tensors cannot be copied."""
        return Pack()

    def __reduce__(self) -> tuple[type[Pack], tuple[()]]:
        return (Pack, ())

    def _current(self, *sources: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """Return what was packed, or None when one of the sources is another by now."""
        key = tuple(n for t in sources if t is not None for n in (t.data_ptr(), t._version))
        if key != self._key:
            self._key, self._packed = key, None
        return self._packed

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        rows: slice = slice(None),
        activation: str = "none",
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return activation(x W^T + b) + residual for a slice of the weight's rows."""
        if not packable(x, weight) or x.shape[-2] < FEW_ROWS[x.dtype]:
            y = linear(x, weight[rows], bias[rows])
            y = relu(y) if activation == "relu" else y
            return y if residual is None else y + residual
        packed = self._current(weight, bias)
        if packed is None:
            packed = KERNELS._reorder_linear_weight(weight[rows].detach(), None), bias[rows]
            self._packed = packed
        if residual is not None:
            return KERNELS._linear_pointwise.binary(x, residual, *packed, "add")
        return KERNELS._linear_pointwise(x, *packed, activation, [], "")

    def convolution(
        self,
        x: Tensor,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d | None = None,
        activation: str = "none",
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return activation(norm(conv(x)) + residual), the norm with its running statistics."""
        weight, bias = conv.weight, conv.bias
        if not packable(x, weight):
            return plain_convolution(x, conv, norm, activation, residual)
        norms = () if norm is None else (norm.running_mean, norm.running_var)
        scales = () if norm is None else (norm.weight, norm.bias)
        packed = self._current(weight, bias, *norms, *scales)
        place = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        if packed is None:
            folded, shift = fold(conv, norm)
            # The layout is chosen for this size of map; another size runs with it as well.
            packed = KERNELS._reorder_convolution_weight(folded, *place, list(x.shape)), shift
            self._packed = packed
        if residual is not None:
            after = "relu" if activation == "relu" else None
            return KERNELS._convolution_pointwise.binary(
                x, residual, *packed, *place, "add", 1.0, after, [], None
            )
        return KERNELS._convolution_pointwise(x, *packed, *place, activation, [], "")


def plain_convolution(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d | None,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    """`Pack.convolution` by torch's own operators."""
    y = conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if norm is not None:
        y = batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    if residual is not None:
        y = y + residual
    return relu(y, inplace=not y.requires_grad) if activation == "relu" else y


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias of a convolution that does the norm's work as well."""
    weight, bias = conv.weight.detach(), conv.bias
    if norm is None:
        return weight, bias
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError("norm: it has no running statistics to fold")
    scale = norm.weight.detach().double() / (var.double() + norm.eps).sqrt()
    shift = norm.bias.detach().double() - mean.double() * scale
    if bias is not None:
        shift = shift + bias.detach().double() * scale
    wide = weight.double() * scale.view(-1, 1, 1, 1)
    return wide.to(weight.dtype), shift.to(weight.dtype)


class Linear(nn.Linear):
    """`nn.Linear` whose weight is packed, with what usually follows it in the same pass."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self._pack = Pack()

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        return self._pack.linear(x, self.weight, self.bias)

    def relu(self, x: Tensor) -> Tensor:
        """Return max(x W^T + b, 0)."""
        return self._pack.linear(x, self.weight, self.bias, activation="relu")

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return x W^T + b + residual."""
        return self._pack.linear(x, self.weight, self.bias, residual=residual)


# ------------------------------------------------------------------------------------------------
# Rotary codes, attention, AdaLN and the block made of them.
#
# `Attention` keeps the parameter names of the published checkpoints (`in_proj_weight`,
# `out_proj`) and splits its work into `query`, `key_value` and `attend`, because during a
# denoising loop the keys and values of the scene never change: they are made once a call and
# handed back in.
#
# A rotary code holds the cosine and the sine of each pair of channels, in fp32: rotating a
# vector is then one multiplication of complex numbers. 3D Diffuser Actor rotates before the
# heads are split, a third of all channels for each axis, so a head sees one axis or two; with
# `repeat` the code is laid out so that every head sees all three.


WRITTEN_OUT_ROWS = 128  # from here on `written_out` may be the faster one; see there
ALIGNED = 16  # ... when the number of keys is a multiple of this


def official_frequencies(dim: int) -> Tensor:
    """Return 10000^(-2i/c) for the c = dim/3 channels of an axis, (c/2,)."""
    channels = dim // 3
    return torch.exp(torch.arange(0, channels, 2).float() * (-math.log(10000.0) / channels))


def metric_frequencies(head_dim: int, longest_m: float = 2.0, shortest_m: float = 0.05) -> Tensor:
    """Return geometric frequencies for positions in metres, (head_dim/6,) radians a metre."""
    count = head_dim // 6
    if count == 1:
        return torch.tensor([2 * math.pi / longest_m])
    waves = torch.logspace(math.log10(longest_m), math.log10(shortest_m), count)
    return 2 * math.pi / waves


def rotary_code(xyz: Tensor, frequencies: Tensor, repeat: int = 1) -> Tensor:
    """Return the code (B, N, dim) of positions: cosine and sine of each pair of channels.

    Args:
        xyz: (B, N, 3).
        frequencies: (F,) radians a unit; an axis gets F pairs.
        repeat: how many times the 3F pairs are laid side by side, once for every head
            where heads are to see all axes.
    """
    angle = (xyz.float().unsqueeze(-1) * frequencies).flatten(-2)
    code = torch.stack((angle.cos(), angle.sin()), -1).flatten(-2)
    return code.repeat(1, 1, repeat) if repeat > 1 else code


def rotate(x: Tensor, code: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels of x (B, N, dim) by a code (B, N, dim)."""
    pairs, turns = x.float().unflatten(-1, (-1, 2)), code.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler has no complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
    return turned.flatten(-2).to(x.dtype)


def sinusoid(position: Tensor, dim: int) -> Tensor:
    """Return the sine and cosine code (N, dim) of positions (N,), as in 3D Diffuser Actor."""
    half = dim // 2
    rate = torch.exp(
        torch.arange(half, device=position.device, dtype=torch.float32)
        * -(math.log(10000.0) / (half - 1))
    )
    angle = position.float()[:, None] * rate[None]
    return torch.cat((angle.sin(), angle.cos()), -1)


def written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, padding: int = 0
) -> Tensor:
    """Return attention as two batched products and a softmax, (B, N, dim).

    On CPUs with bfloat16 products this takes 0.6 of the fused kernel's time for some hundred
    rows of 24 channels a head, given rows of scores that are whole vectors; in float32 and
    for few rows the fused kernel wins.

    Args:
        q: (B, N, dim); k, v: (B, M, dim).
        k: keys.
        v: values.
        mask: (B, M) bool, True where a key may be seen; None for all.
        heads: number of heads.
        padding: how many of the last keys are there only to make M a round number.
    """
    batch, rows, dim = q.shape
    keys = k.shape[1]

    def split(x: Tensor) -> Tensor:
        parted = x.view(batch, -1, heads, dim // heads).transpose(1, 2)
        return parted.reshape(batch * heads, -1, dim // heads).contiguous()

    scores = torch.empty(batch * heads, rows, keys, dtype=q.dtype, device=q.device)
    scores.baddbmm_(split(q), split(k).mT, beta=0, alpha=(dim // heads) ** -0.5)
    if mask is not None:
        scores.masked_fill_(~mask.repeat_interleave(heads, 0).unsqueeze(1), -torch.inf)
    if padding:
        scores[..., keys - padding :].fill_(-torch.inf)
    # In place: a second array of this size would push everything else out of the cache.
    out = torch.bmm(torch.softmax(scores, -1, out=scores), split(v))
    return out.view(batch, heads, rows, -1).transpose(1, 2).reshape(batch, rows, dim)


def learned_slowly(q: Tensor) -> bool:
    """Whether the fused kernel's backward pass would take most of a training step.

    In bfloat16 on a CPU it takes two to eight times as long as `written_to_learn`.
    """
    return q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled()


def written_to_learn(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, padding: int = 0
) -> Tensor:
    """Return attention as two batched products and a softmax, with gradients, (B, N, dim).

    Arguments as in `written_out`.
    """
    batch, rows, dim = q.shape
    width = dim // heads
    if padding:
        k, v = k[:, :-padding], v[:, :-padding]
        mask = None if mask is None else mask[:, :-padding]

    def split(x: Tensor) -> Tensor:
        parted = x.unflatten(-1, (heads, width)).transpose(1, 2)
        return parted.reshape(batch * heads, -1, width)

    left, right = split(q * width**-0.5), split(k).mT
    if mask is None:
        scores = torch.bmm(left, right)
    else:
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
        bias = bias.masked_fill(~mask, -torch.inf).repeat_interleave(heads, 0).unsqueeze(1)
        scores = torch.baddbmm(bias, left, right)
    out = torch.bmm(torch.softmax(scores, -1), split(v))
    return out.view(batch, heads, rows, width).transpose(1, 2).reshape(batch, rows, dim)


class Attention(nn.Module):
    """Multi-head attention with separable parts; batch first, (B, N, dim)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)
        self._query_pack, self._key_value_pack = Pack(), Pack()

    def query(self, x: Tensor, code: Tensor | None = None) -> Tensor:
        """Return queries (B, N, dim), rotated when a code is given."""
        part = slice(self.dim)
        q = self._query_pack.linear(x, self.in_proj_weight, self.in_proj_bias, part)
        return q if code is None else rotate(q, code)

    def key_value(self, x: Tensor, code: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return keys (rotated when a code is given) and values, each (B, N, dim)."""
        part = slice(self.dim, None)
        both = self._key_value_pack.linear(x, self.in_proj_weight, self.in_proj_bias, part)
        k, v = both.chunk(2, -1)
        return (k if code is None else rotate(k, code)), v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, padding: int = 0
    ) -> Tensor:
        """Return the attention's output (B, N, dim), not yet through `out_proj`.

        Args:
            q: (B, N, dim); k, v: (B, M, dim).
            k: keys.
            v: values.
            mask: (B, M) bool, True where a key may be seen; None for all.
            padding: how many of the last keys are there only to make M a round number.
        """
        if self._big(q, k):
            return written_out(q, k, v, mask, self.heads, padding)
        if learned_slowly(q):
            return written_to_learn(q, k, v, mask, self.heads, padding)
        if padding:
            k, v = k[:, :-padding], v[:, :-padding]
            mask = None if mask is None else mask[:, :-padding]
        split = (self.heads, self.dim // self.heads)
        qh, kh, vh = (t.unflatten(-1, split).transpose(1, 2) for t in (q, k, v))
        bias = None if mask is None else mask[:, None, None, :]
        out = scaled_dot_product_attention(qh, kh, vh, attn_mask=bias)
        return out.transpose(1, 2).flatten(-2)

    def _big(self, q: Tensor, k: Tensor) -> bool:
        """Whether `written_out` is the faster one."""
        return (
            q.dtype == torch.bfloat16
            and q.device.type == "cpu"
            and not torch.is_grad_enabled()
            and q.shape[1] >= WRITTEN_OUT_ROWS
            and k.shape[1] >= WRITTEN_OUT_ROWS
            and k.shape[1] % ALIGNED == 0
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        x_code: Tensor | None = None,
        context_code: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from x to `context` (x itself when None)."""
        if context is None:
            context, context_code = x, x_code
        k, v = self.key_value(context, context_code)
        return self.out_proj(self.attend(self.query(x, x_code), k, v, mask))


class AdaLN(nn.Module):
    """Scale and shift from a condition: x (1 + s) + b, both zero at the start."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        nn.init.zeros_(self.modulation[1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.modulation[1].bias)  # type: ignore[arg-type]

    def table(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 + scale and shift (..., 1, dim) for signals (..., dim)."""
        scale, shift = self.modulation(signal).unsqueeze(-2).chunk(2, -1)
        return 1 + scale, shift


def modulate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Apply `AdaLN.table` to x (B, N, dim)."""
    return torch.addcmul(table[1], x, table[0])


class Block(nn.Module):
    """A pre-norm transformer block with modulated parts: self, cross, feed-forward.

    The shape of DiT blocks (Peebles and Xie 2023, Sec. 3.2) with a cross-attention between;
    gates start at one instead of zero, which trains faster in the few hours a CPU has.
    `cross=False` leaves the cross-attention out. The modulation vectors of a step come from
    `tables`, made for all steps at once. Several noise draws of one observation share its
    keys and values: x may have k times the batch of `context`, draws of one observation
    side by side.
    """

    def __init__(self, dim: int, heads: int, ffn_mult: int, cross: bool = True) -> None:
        super().__init__()
        self.parts = 3 if cross else 2
        self.self_attn = Attention(dim, heads)
        self.cross_attn = Attention(dim, heads) if cross else None
        self.up = nn.Linear(dim, ffn_mult * dim)
        self.down = nn.Linear(ffn_mult * dim, dim)
        self.modulation = nn.Linear(dim, 3 * self.parts * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def key_value(self, context: Tensor, code: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the cross-attention's keys and values of context tokens (B, M, dim)."""
        if self.cross_attn is None:
            raise ValueError("context: this block has no cross-attention")
        return self.cross_attn.key_value(context, code)

    def tables(self, signal: Tensor) -> tuple[Tensor, ...]:
        """Return 3 x parts tensors (..., 1, dim): scale, shift and gate of each part."""
        return self.modulation(silu(signal)).unsqueeze(-2).chunk(3 * self.parts, -1)

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, ...],
        code: Tensor | None,
        context: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Return x (B, T, dim) after the block.

        Args:
            x: tokens.
            tables: from `tables`, for this step.
            code: rotary code of the tokens.
            context: keys and values of the scene, from `cross_attn.key_value`.
            mask: (B, M) valid scene tokens.
        """

        def normed(part: int) -> Tensor:
            scale, shift = tables[3 * part], tables[3 * part + 1]
            return torch.addcmul(shift, layer_norm(x, x.shape[-1:]), 1 + scale)

        y = normed(0)
        own = mask if context is None else None  # without a context the mask is of x itself
        x = x + (1 + tables[2]) * self.self_attn(y, x_code=code, mask=own)
        part = 1
        if self.cross_attn is not None and context is not None:
            q = self.cross_attn.query(normed(1), code)
            folded = q.reshape(len(context[0]), -1, q.shape[-1])
            seen = self.cross_attn.out_proj(self.cross_attn.attend(folded, *context, mask))
            seen = seen.view_as(x)
            x = x + (1 + tables[5]) * seen
            part = 2
        y = normed(part)
        return x + (1 + tables[3 * part + 2]) * self.down(relu(self.up(y)))


def blocks_of(modules: nn.ModuleList) -> list[Block]:
    """Return a module list's blocks with their type."""
    return cast(list[Block], list(modules))
