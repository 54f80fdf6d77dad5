"""3D Diffuser Actor's encoder: images, points, latent and gripper history to scene tokens.

Sources: Ke et al. 2024, "3D Diffuser Actor", Sec. 3.2, and the shapes of the published
checkpoints. The order of work: CLIP features and pyramid, one token for 8 x 8 pixels placed
at its bilinear point; two layers of attention to language; the gripper history attends to
the scene; farthest point sampling in feature space picks a third of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from system1.attention import official_frequencies, rotary_code
from system1.backbone import MEAN, STD, ClipResNet50, FeaturePyramid
from system1.layers import CrossStack, LanguageStack, words_of
from system1.points import farthest_point_sample

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
