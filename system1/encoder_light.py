"""The light encoder of our own policies: RGB and points in, a few hundred 3D tokens out.

Each camera has a small convolution stack on seven geometric channels (colour, point relative
to the gripper, validity) and a few sine waves of the point, which let the first layer see
millimetres; the condition modulates its residual blocks (FiLM), so that the features are
about the object that matters. One token a cell of 8 x 8 pixels, placed at the mean of its
valid points. A cell without a valid point is masked out.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from openhelix.system1.attention import Block, blocks_of, metric_frequencies, rotary_code
from openhelix.system1.condition import Condition
from openhelix.system1.config import PolicyConfig
from openhelix.system1.keypose_head import KeyposeHead
from openhelix.system1.points import farthest_point_sample, masked_pool
from openhelix.system1.rotations import matrix_to_6d, quat_to_matrix, xyzw_to_wxyz
from openhelix.system1.scene import PROPRIO_FEATURES, Inputs, Scene, merge_masks

POINT_UNIT_M = 0.3  # points relative to the gripper are divided by this
WAVES_M = (0.4, 0.1)  # wavelengths of the sine channels
CHANNELS = 3 + 3 + 1 + 6 * len(WAVES_M)


def groups(channels: int) -> int:
    """Return the number of GroupNorm groups: eight channels each."""
    return max(1, channels // 8)


def normed(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Return the norm of x; in float32 while weights are, whatever autocast made of x.

    On a CPU the norm of bfloat16 maps takes four times as long as that of float32 ones.
    """
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 != norm.weight.dtype:
        x = x.float()
    return norm(x)


class FilmBlock(nn.Module):
    """A residual block whose second norm is scaled and shifted by the condition."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups(channels), channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups(channels), channels)
        self.film = nn.Linear(dim, 2 * channels)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return x (B, C, H, W) after the block; condition is (B, dim)."""
        scale, shift = self.film(condition)[..., None, None].chunk(2, 1)
        y = silu(normed(self.norm1, self.conv1(x)))
        return silu(x + torch.addcmul(shift, normed(self.norm2, self.conv2(y)), 1 + scale))


class CameraStack(nn.Module):
    """One camera's convolutions, 8 pixels a token."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(CHANNELS, width, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.GroupNorm(groups(width), width)
        self.down1 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.block1 = FilmBlock(2 * width, dim)
        self.down2 = nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1)
        self.block2 = FilmBlock(4 * width, dim)
        self.out = nn.Linear(4 * width, dim)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return tokens (B, h * w, dim) and the grid (h, w)."""
        x = silu(normed(self.stem_norm, self.stem(x)))
        x = self.block1(self.down1(x), condition)
        x = self.block2(self.down2(x), condition)
        grid = (x.shape[-2], x.shape[-1])
        return self.out(x.flatten(2).transpose(1, 2)), grid


def pixel_channels(rgb: Tensor, xyz: Tensor, valid: Tensor, center: Tensor) -> Tensor:
    """Return the encoder's input (B, CHANNELS, H, W).

    Args:
        rgb: (B, 3, H, W), 0 to 1; xyz: (B, 3, H, W) metres; valid: (B, H, W).
        xyz: world points.
        valid: mask of valid points.
        center: (B, 3) gripper position in metres.
    """
    seen = valid.unsqueeze(1)
    near = torch.where(seen, xyz - center[..., None, None], 0.0)
    waves = [near * (2 * torch.pi / wave) for wave in WAVES_M]
    sines = [f(w) * seen for w in waves for f in (torch.sin, torch.cos)]
    clipped = (near / POINT_UNIT_M).clamp(-4, 4)
    return torch.cat((rgb * 2 - 1, clipped, seen.to(rgb.dtype), *sines), 1)


def proprio_features(proprio: Tensor) -> Tensor:
    """Return (B, nhist, 14): relative and absolute position, 6D rotation, width, open."""
    xyz, quat = proprio[..., :3], proprio[..., 3:7]
    rotation = matrix_to_6d(quat_to_matrix(xyzw_to_wxyz(quat)))
    relative = (xyz - xyz[:, -1:]) / 0.05
    width, opened = proprio[..., 7:8] / 0.04 - 1, proprio[..., 8:9] * 2 - 1
    return torch.cat((relative, xyz / POINT_UNIT_M, rotation, width, opened), -1)


class LightEncoder(nn.Module):
    """Observation and condition to a `Scene`."""

    frequencies: Tensor

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        dim = config.dim
        self.scene_tokens = config.scene_tokens
        self.heads = config.heads
        self.condition = Condition(config)
        seen = 0 if config.head == "lstm" else len(config.cameras)  # see `heads.lstm`
        self.cameras = nn.ModuleList(CameraStack(config.encoder_width, dim) for _ in range(seen))
        self.camera_code = nn.Parameter(0.02 * torch.randn(seen, dim))
        self.proprio = nn.Sequential(
            nn.Linear(config.nhist * PROPRIO_FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.context = nn.ModuleList(
            Block(dim, config.heads, config.ffn_mult, cross=False)
            for _ in range(config.context_layers if seen else 0)
        )
        self.keyposes = KeyposeHead(dim, config.keyposes) if seen and config.keyposes else None
        self.register_buffer(
            "frequencies", metric_frequencies(dim // config.heads), persistent=False
        )

    def forward(self, inputs: Inputs) -> Scene:
        """Encode one batch of observations."""
        condition, condition_mask, pooled = self.condition(inputs)
        features = proprio_features(inputs.proprio).to(pooled.dtype)
        signal = pooled + self.proprio(features.flatten(1))
        center = inputs.proprio[:, -1, :3]
        if not len(self.cameras):
            none = condition[:, :0]
            return Scene(none, none[..., :3], None, condition, condition_mask, signal, features)
        tokens, places, masks = [], [], []
        for i, stack in enumerate(self.cameras):
            pixels = pixel_channels(inputs.rgb[i], inputs.xyz[i], inputs.valid[i], center)
            pixels = pixels.to(pooled.dtype, memory_format=torch.channels_last)
            found, grid = stack(pixels, pooled)
            mean, valid = masked_pool(inputs.xyz[i], inputs.valid[i], *grid)
            tokens.append(found + self.camera_code[i])
            places.append(mean.flatten(2).transpose(1, 2) - center.unsqueeze(1))
            masks.append(valid.flatten(1))
        joined, xyz, mask = torch.cat(tokens, 1), torch.cat(places, 1), torch.cat(masks, 1)
        if 0 < self.scene_tokens < joined.shape[1]:
            keep = farthest_point_sample(joined.detach(), self.scene_tokens, mask)
            joined = joined.gather(1, keep.unsqueeze(-1).expand(-1, -1, joined.shape[-1]))
            xyz = xyz.gather(1, keep.unsqueeze(-1).expand(-1, -1, 3))
            mask = mask.gather(1, keep)
        # On a GPU looking at the mask would wait for the device, and break graph capture.
        seen = mask if mask.device.type != "cpu" or not bool(mask.all()) else None
        code = rotary_code(xyz, self.frequencies, self.heads)
        for layer in blocks_of(self.context):
            joined = layer(joined, layer.tables(signal), code, None, seen)
        scene = Scene(joined, xyz, seen, condition, condition_mask, signal, features)
        return scene if self.keyposes is None else with_keyposes(scene, self.keyposes)


def with_keyposes(scene: Scene, head: KeyposeHead) -> Scene:
    """Return the scene with what its tokens vote for among its tokens and in its signal."""
    vote, tokens, told = head(scene.tokens, scene.xyz, scene.mask)
    joined = torch.cat((scene.tokens, tokens), 1)
    xyz = torch.cat((scene.xyz, vote.position.to(scene.xyz.dtype)), 1)
    mask = merge_masks([(scene.mask, scene.tokens), (None, tokens)])
    signal = scene.signal + told
    return replace(scene, tokens=joined, xyz=xyz, mask=mask, signal=signal, vote=vote)
