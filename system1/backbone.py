"""CLIP's ResNet-50 and the feature pyramid above it, under the checkpoints' parameter names.

The backbone (Radford et al. 2021, Sec. 2.4) has a stem of three convolutions, average
pooling in place of strides, and an attention pool that nothing here reads but whose weights
a checkpoint carries. It is frozen: always in evaluation mode.

Of the pyramid (Lin et al. 2017) the policy reads one level, 8 pixels a token. Its other
output convolutions are 11 of the 12 GFLOP of the pyramid and are not computed.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from system1.packed import Pack

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images
STD = (0.26862954, 0.26130258, 0.27577711)
CHANNELS = (64, 256, 512, 1024, 2048)
READ_LEVEL = 2  # index of the pyramid level the policy reads


class Bottleneck(nn.Module):
    """1x1, 3x3, pool, 1x1 with a residual."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.stride = stride
        self._packs = [Pack() for _ in range(4)]
        self.downsample: nn.Sequential | None = None
        if stride > 1 or inputs != 4 * width:
            parts = OrderedDict[str, nn.Module]()
            parts["-1"] = nn.AvgPool2d(stride)
            parts["0"] = nn.Conv2d(inputs, 4 * width, 1, bias=False)
            parts["1"] = nn.BatchNorm2d(4 * width)
            self.downsample = nn.Sequential(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 4 width, H / stride, W / stride)."""
        one, two, three, down = self._packs
        y = one.convolution(x, self.conv1, self.bn1, "relu")
        y = two.convolution(y, self.conv2, self.bn2, "relu")
        if self.stride > 1:
            x, y = avg_pool2d(x, self.stride), avg_pool2d(y, self.stride)
        if self.downsample is not None:
            conv, norm = self.downsample[1], self.downsample[2]
            x = down.convolution(x, cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, norm))
        return three.convolution(y, self.conv3, self.bn3, "relu", residual=x)


class AttentionPool(nn.Module):
    """The weights of CLIP's attention pool; carried, never run.

    Zero until a checkpoint is loaded, and NumPy's zeros: these take no memory before somebody
    writes to them, where random numbers or torch's own zeros take 57 MiB.
    """

    def __init__(self) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(50, 2048))
        for name, outputs in (("k", 2048), ("q", 2048), ("v", 2048), ("c", 1024)):
            layer = nn.Linear(2048, outputs, device="meta")
            layer.weight = nn.Parameter(torch.from_numpy(np.zeros((outputs, 2048), np.float32)))
            layer.bias = nn.Parameter(torch.zeros(outputs))
            setattr(self, f"{name}_proj", layer)


class ClipResNet50(nn.Module):
    """The backbone; five feature maps, 2 to 32 pixels a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        inputs = 64
        for index, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
            stride = 1 if index == 1 else 2
            layers = [Bottleneck(inputs, width, stride)]
            layers += [Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{index}", nn.Sequential(*layers))
            inputs = 4 * width
        self.attnpool = AttentionPool()
        self._packs = [Pack() for _ in range(3)]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the five maps of images (B, 3, H, W) that are already normalised."""
        if x.device.type == "cpu" and not torch.is_grad_enabled():
            x = x.contiguous(memory_format=torch.channels_last)
        stem = ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3))
        for pack, (conv, norm) in zip(self._packs, stem, strict=True):
            x = pack.convolution(x, conv, norm, "relu")
        maps = [x]
        x = avg_pool2d(x, 2)
        for index in range(1, 5):
            x = cast(nn.Sequential, getattr(self, f"layer{index}"))(x)
            maps.append(x)
        return maps

    def train(self, mode: bool = True) -> ClipResNet50:
        """Stay in evaluation mode: the backbone is frozen, statistics included."""
        return super().train(False)


class FeaturePyramid(nn.Module):
    """Top-down pyramid; only the level that is read is computed."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, dim, 1)) for c in CHANNELS)
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1)) for _ in CHANNELS
        )
        self._packs = [Pack() for _ in CHANNELS]  # the first for the output, see `forward`

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return (B, dim, H / 8, W / 8) from the backbone's maps."""

        def inner(level: int, merged: Tensor | None) -> Tensor:
            conv = cast(nn.Sequential, self.inner_blocks[level])[0]
            x = maps[level]
            if merged is not None:
                merged = interpolate(merged, x.shape[-2:], mode="nearest")
            return self._packs[level].convolution(x, cast(nn.Conv2d, conv), residual=merged)

        merged = inner(len(maps) - 1, None)
        for level in range(len(maps) - 2, READ_LEVEL - 1, -1):
            merged = inner(level, merged)
        last = cast(nn.Sequential, self.layer_blocks[READ_LEVEL])[0]
        return self._packs[0].convolution(merged, cast(nn.Conv2d, last))
