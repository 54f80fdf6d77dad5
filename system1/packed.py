"""Weights laid out once for oneDNN's kernels, which a CPU otherwise rearranges at every call.

At batch one a policy runs thousands of small products with the same weights. Handing oneDNN
a weight in its own blocked layout saves the rearranging (most of the time of a deep
convolution on a 5 x 5 map), and lets bias, residual, ReLU and batch norm ride along in the
same pass. The numbers stay those of the plain operators up to rounding.

A `Pack` belongs to the module whose weights it holds and compares their address and version
at every use, so that a weight that was trained, loaded, cast or moved since is packed again.
Packs are used on a CPU without gradients; everywhere else, and where this build of torch has
no such kernels, the plain operators run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, linear, relu

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
