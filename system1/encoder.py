"""3D Diffuser Actor's encoder: images, points, latent and gripper history to scene tokens.

Sources: Ke et al. 2024, "3D Diffuser Actor", Sec. 3.2, and the shapes of the published
checkpoints. The order of work: CLIP features and pyramid, one token for 8 x 8 pixels placed
at its bilinear point; two layers of attention to language; the gripper history attends to
the scene; farthest point sampling in feature space picks a third of the tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, pad

from openhelix.system1.attention import Pack, official_frequencies, rotary_code
from openhelix.system1.geometry import farthest_point_sample
from openhelix.system1.layers import CrossStack, LanguageStack, words_of

# ------------------------------------------------------------------------------------------------
# CLIP's ResNet-50 and the feature pyramid above it, under the checkpoints' parameter names.
#
# The backbone (Radford et al. 2021, Sec. 2.4) has a stem of three convolutions, average
# pooling in place of strides, and an attention pool that nothing here reads but whose weights
# a checkpoint carries. It is frozen: always in evaluation mode.
#
# Of the pyramid (Lin et al. 2017) the policy reads one level, 8 pixels a token. Its other
# output convolutions are 11 of the 12 GFLOP of the pyramid and are not computed.


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


PAD_TO = 16
FPS_FACTOR = 3  # one scene token in three is kept for self-attention


@dataclass(frozen=True, slots=True)
class OfficialScene:
    """What the denoiser reads; everything here depends on the observation alone."""

    context: Tensor  # (B, N, dim)
    code: Tensor  # (B, N, dim), rotary
    mask: Tensor | None  # (B, N) bool; None when every token is valid
    language: Tensor  # (B, n, dim)
    gripper: Tensor  # (B, nhist, dim)
    sampled: Tensor  # (B, K, dim)
    sampled_code: Tensor  # (B, K, dim)
    sampled_mask: Tensor | None  # (B, K)
    padding: int = 0  # of the K, how many at the end are there only to make a round number


def pad_sampled(scene: OfficialScene, count: int) -> OfficialScene:
    """Return the scene with `count` tokens more that nobody sees.

    bfloat16 kernels on a CPU lose a third of their speed when the number of tokens in
    self-attention, 285 in the published shape, is not a multiple of 16.
    """
    if count == 0:
        return scene
    mask = scene.sampled_mask
    return replace(
        scene,
        sampled=pad(scene.sampled, (0, 0, 0, count)),
        sampled_code=torch.cat((scene.sampled_code, scene.sampled_code[:, :count]), 1),
        sampled_mask=None if mask is None else pad(mask, (0, count), value=False),
        padding=scene.padding + count,
    )


class OfficialEncoder(nn.Module):
    """Parameter names as in the published checkpoints."""

    frequencies: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, heads: int, nhist: int, latent_dim: int, rows: int) -> None:
        super().__init__()
        self.rows = rows  # of a trajectory, which join the sampled tokens in self-attention
        self.backbone = ClipResNet50().requires_grad_(False)
        self.feature_pyramid = FeaturePyramid(dim)
        self.curr_gripper_embed = nn.Embedding(nhist, dim)
        self.gripper_context_head = CrossStack(dim, heads, 3, adaln=False)
        self.goal_gripper_embed = nn.Embedding(1, dim)  # carried by checkpoints, not read
        self.instruction_encoder = nn.Linear(latent_dim, dim)
        self.vl_attention = nn.ModuleList([LanguageStack(dim, heads, 2)])
        self.fps_factor = FPS_FACTOR
        self.register_buffer("frequencies", official_frequencies(dim), persistent=False)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(
        self, rgb: Tensor, pcd: Tensor, gripper: Tensor, latent: Tensor, valid: Tensor | None
    ) -> OfficialScene:
        """Encode.

        Args:
            rgb: (B, ncam, 3, H, W) in [0, 1].
            pcd: (B, ncam, 3, H, W), normalised, finite.
            gripper: (B, nhist, 3), normalised positions.
            latent: (B, n, latent_dim).
            valid: (B, ncam, H, W) bool, or None when every point is valid.
        """
        tokens, xyz, mask = self.images(rgb, pcd, valid)
        language = self.instruction_encoder(latent.to(self.instruction_encoder.weight.dtype))
        context = self.see_language(tokens, language)
        code = rotary_code(xyz, self.frequencies)
        hands = self.see_context(gripper, context, code, mask)
        count = max(context.shape[1] // self.fps_factor, 1)
        keep = farthest_point_sample(context.detach(), count, mask).unsqueeze(-1)
        sampled = context.gather(1, keep.expand(-1, -1, context.shape[-1]))
        sampled_code = code.gather(1, keep.expand(-1, -1, code.shape[-1]))
        sampled_mask = None if mask is None else mask.gather(1, keep.squeeze(-1))
        scene = OfficialScene(
            context, code, mask, language, hands, sampled, sampled_code, sampled_mask
        )
        if context.dtype == torch.bfloat16 and context.device.type == "cpu":
            scene = pad_sampled(scene, -(count + self.rows) % PAD_TO)
        return scene

    def images(
        self, rgb: Tensor, pcd: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return tokens (B, N, dim), their points (B, N, 3) and mask (B, N)."""
        cameras = rgb.shape[1]
        pixels = (rgb.flatten(0, 1) - self.mean) / self.std
        pixels = pixels.to(self.instruction_encoder.weight.dtype)
        with torch.no_grad():
            maps = self.backbone(pixels)
        features = self.feature_pyramid(maps)
        grid = features.shape[-2:]
        points = interpolate(pcd.flatten(0, 1), grid, mode="bilinear")

        def merged(x: Tensor) -> Tensor:
            return x.flatten(2).transpose(1, 2).unflatten(0, (-1, cameras)).flatten(1, 2)

        mask = None
        if valid is not None:
            # A token is as good as the worst of the pixels that its point is a mean of.
            share = interpolate(valid.flatten(0, 1).unsqueeze(1).float(), grid, mode="bilinear")
            mask = merged(share).squeeze(-1) > 0.999
        return merged(features), merged(points), mask

    def see_language(self, tokens: Tensor, language: Tensor) -> Tensor:
        """Attend from scene tokens to language."""
        stack: LanguageStack = self.vl_attention[0]  # type: ignore[assignment]
        for layer in stack.typed():
            tokens = layer.feed(layer.attend(tokens, words_of(layer.cross_12, language)))
        return tokens

    def see_context(
        self, gripper: Tensor, context: Tensor, code: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attend from the gripper history to the scene; return (B, nhist, dim)."""
        place = rotary_code(gripper, self.frequencies)
        hands = self.curr_gripper_embed.weight.unsqueeze(0).expand(len(gripper), -1, -1)
        for attention, feed in self.gripper_context_head.pairs():
            kv = attention.multihead_attn.key_value(context, code)
            hands = feed(attention(hands, kv, code=place, mask=mask))
        return hands
