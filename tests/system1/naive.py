"""The published network written as plainly as possible, to hold the fast one against.

Everything is recomputed at every denoising step, every row and every pyramid level is
computed, attention is an explicit softmax, the scheduler is written out a step at a time.
It works on a state dict, shares no code with `system1`, and is slow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import (
    avg_pool2d,
    batch_norm,
    conv2d,
    interpolate,
    layer_norm,
    linear,
    relu,
    silu,
)

LOW = torch.tensor([-0.30205888509750366, -0.25688798189163208, -0.21557966828346252])
HIGH = torch.tensor([0.36127854347229004, 0.3377084231376648, 0.18373555898666382])
HEADS = 8


class Naive:
    """`sample` of the published model from its state dict."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.w = weights

    def lin(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def bn(self, name: str, x: Tensor) -> Tensor:
        w = self.w
        return batch_norm(
            x,
            w[f"{name}.running_mean"],
            w[f"{name}.running_var"],
            w[f"{name}.weight"],
            w[f"{name}.bias"],
        )

    def mlp(self, name: str, x: Tensor, first: int = 0) -> Tensor:
        return self.lin(f"{name}.{first + 2}", relu(self.lin(f"{name}.{first}", x)))

    def attention(self, name: str, q: Tensor, kv: Tensor, q_at=None, kv_at=None) -> Tensor:
        weight, bias = self.w[f"{name}.in_proj_weight"], self.w[f"{name}.in_proj_bias"]
        dim = q.shape[-1]
        query = linear(q, weight[:dim], bias[:dim]) * (dim // HEADS) ** -0.5
        key = linear(kv, weight[dim : 2 * dim], bias[dim : 2 * dim])
        value = linear(kv, weight[2 * dim :], bias[2 * dim :])
        if q_at is not None:
            query, key = turn(query, q_at), turn(key, kv_at)

        def split(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], HEADS, -1).permute(0, 2, 1, 3)

        scores = split(query) @ split(key).transpose(-1, -2)
        out = scores.softmax(-1) @ split(value)
        return self.lin(f"{name}.out_proj", out.permute(0, 2, 1, 3).flatten(2))

    def adaln(self, name: str, x: Tensor, signal: Tensor | None) -> Tensor:
        if signal is None:
            return x
        scale, shift = self.lin(f"{name}.adaln.modulation.1", silu(signal)).chunk(2, -1)
        return x * (1 + scale[:, None]) + shift[:, None]

    def relative(self, name, x, kv, signal=None, x_at=None, kv_at=None) -> Tensor:
        seen = self.attention(
            f"{name}.multihead_attn", self.adaln(name, x, signal), kv, x_at, kv_at
        )
        return self.norm(f"{name}.norm", x + seen)

    def feed(self, name: str, x: Tensor, signal: Tensor | None = None) -> Tensor:
        x = self.adaln(name, x, signal)
        return self.norm(
            f"{name}.norm", x + self.lin(f"{name}.linear2", relu(self.lin(f"{name}.linear1", x)))
        )

    def stack(self, name, layers, language_layers, x, at, words, signal) -> Tensor:
        for i in range(layers):
            if i < language_layers:
                x = self.relative(f"{name}.cross_attn_layers.{i}", x, words, signal)
            x = self.relative(f"{name}.self_attn_layers.{i}", x, x, signal, at, at)
            x = self.feed(f"{name}.ffw_layers.{i}", x, signal)
        return x

    def bottleneck(self, name: str, x: Tensor, stride: int) -> Tensor:
        w = self.w
        y = relu(self.bn(f"{name}.bn1", conv2d(x, w[f"{name}.conv1.weight"])))
        y = relu(self.bn(f"{name}.bn2", conv2d(y, w[f"{name}.conv2.weight"], padding=1)))
        y = avg_pool2d(y, stride) if stride > 1 else y
        y = self.bn(f"{name}.bn3", conv2d(y, w[f"{name}.conv3.weight"]))
        if f"{name}.downsample.0.weight" in w:
            x = avg_pool2d(x, stride) if stride > 1 else x
            x = self.bn(f"{name}.downsample.1", conv2d(x, w[f"{name}.downsample.0.weight"]))
        return relu(x + y)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        name = "encoder.backbone"
        for i, stride in ((1, 2), (2, 1), (3, 1)):
            x = conv2d(x, self.w[f"{name}.conv{i}.weight"], stride=stride, padding=1)
            x = relu(self.bn(f"{name}.bn{i}", x))
        maps = [x]
        x = avg_pool2d(x, 2)
        for layer, blocks in ((1, 3), (2, 4), (3, 6), (4, 3)):
            for b in range(blocks):
                stride = 2 if b == 0 and layer > 1 else 1
                x = self.bottleneck(f"{name}.layer{layer}.{b}", x, stride)
            maps.append(x)
        merged, out = None, []
        for level in (4, 3, 2, 1, 0):
            inner = f"encoder.feature_pyramid.inner_blocks.{level}.0"
            lateral = conv2d(maps[level], self.w[f"{inner}.weight"], self.w[f"{inner}.bias"])
            if merged is not None:
                lateral = lateral + interpolate(merged, lateral.shape[-2:], mode="nearest")
            merged = lateral
            last = f"encoder.feature_pyramid.layer_blocks.{level}.0"
            out.append(conv2d(merged, self.w[f"{last}.weight"], self.w[f"{last}.bias"], padding=1))
        return out

    def encode(self, rgb, pcd, hands, latent):
        cameras = rgb.shape[1]
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        level = self.pyramid((rgb.flatten(0, 1) - mean) / std)[2]
        points = interpolate(pcd.flatten(0, 1), level.shape[-2:], mode="bilinear")

        def tokens(x: Tensor) -> Tensor:
            x = x.reshape(-1, cameras, *x.shape[1:]).permute(0, 1, 3, 4, 2)
            return x.reshape(len(x), -1, x.shape[-1])

        context, xyz = tokens(level), tokens(points)
        words = self.lin("encoder.instruction_encoder", latent)
        for i in range(2):
            name = f"encoder.vl_attention.0.layers.{i}"
            seen = self.attention(f"{name}.cross_12", context, words)
            context = self.norm(f"{name}.norm_12", context + seen)
            wide = self.lin(f"{name}.ffn_12.3", relu(self.lin(f"{name}.ffn_12.0", context)))
            context = self.norm(f"{name}.norm_122", context + wide)
        gripper = self.w["encoder.curr_gripper_embed.weight"][None].repeat(len(rgb), 1, 1)
        name = "encoder.gripper_context_head"
        for i in range(3):
            gripper = self.relative(
                f"{name}.attn_layers.{i}", gripper, context, None, where(hands), where(xyz)
            )
            gripper = self.feed(f"{name}.ffw_layers.{i}", gripper)
        return context, xyz, words, gripper, [farthest(c, len(c) // 3) for c in context]

    def step(self, x: Tensor, t: int, encoded) -> Tensor:
        context, xyz, words, gripper, picks = encoded
        head = "prediction_head"
        signal = self.mlp(f"{head}.time_emb", wave(torch.full((len(x),), float(t))), 1)
        signal = signal + self.mlp(f"{head}.curr_gripper_emb", gripper.flatten(1))
        rows = wave(torch.arange(x.shape[1]).float())[None]
        h = self.lin(f"{head}.traj_encoder", x)
        name = f"{head}.traj_lang_attention.0.layers.0"
        h = self.norm(f"{name}.norm_12", h + self.attention(f"{name}.cross_12", h + rows, words))
        h = h + rows
        for i in range(2):
            name = f"{head}.cross_attn"
            h = self.relative(
                f"{name}.attn_layers.{i}", h, context, signal, where(x[..., :3]), where(xyz)
            )
            h = self.feed(f"{name}.ffw_layers.{i}", h, signal)
        chosen = torch.stack([c[p] for c, p in zip(context, picks, strict=True)])
        places = torch.stack([c[p] for c, p in zip(xyz, picks, strict=True)])
        at = where(torch.cat((x[..., :3], places), 1))
        h = self.stack(f"{head}.self_attn", 4, 3, torch.cat((h, chosen), 1), at, words, signal)
        branches = {}
        for kind in ("rotation", "position"):
            y = self.stack(f"{head}.{kind}_self_attn", 2, 1, h, at, words, signal)
            branches[kind] = self.lin(f"{head}.{kind}_proj", y[:, : x.shape[1]])
        out = [self.mlp(f"{head}.{k}_predictor", branches[k]) for k in ("position", "rotation")]
        return torch.cat((*out, self.mlp(f"{head}.openess_predictor", branches["position"])), -1)

    def sample(self, rgb, pcd, gripper, latent, noise, rows=19, steps=25) -> Tensor:
        home = gripper[:, -1, :3]
        pcd = box((pcd - home[:, None, :, None, None]).movedim(2, -1)).movedim(-1, 2)
        encoded = self.encode(rgb, pcd, box(gripper[..., :3] - home[:, None]), latent)
        x = noise((len(rgb), rows, 9))
        linear_betas = torch.linspace(1e-4**0.5, 0.02**0.5, steps) ** 2
        curve = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        cosine = torch.tensor([min(1 - curve[i + 1] / curve[i], 0.999) for i in range(steps)])
        bars = [torch.cumprod(1 - b, 0) for b in (linear_betas, cosine)]
        for t in reversed(range(steps)):
            out = self.step(x, t, encoded)
            parts = []
            for bar, part in zip(bars, (slice(0, 3), slice(3, 9)), strict=True):
                now, before = bar[t], bar[t - 1] if t else torch.tensor(1.0)
                clean = ((x[..., part] - (1 - now) ** 0.5 * out[..., part]) / now**0.5).clamp(-1, 1)
                beta = 1 - now / before
                y = before**0.5 * beta / (1 - now) * clean
                y = y + (now / before) ** 0.5 * (1 - before) / (1 - now) * x[..., part]
                if t:
                    sigma = ((1 - before) / (1 - now) * beta).clamp(min=1e-20) ** 0.5
                    y = y + sigma * noise(y.shape)
                parts.append(y)
            x = torch.cat(parts, -1)
        position = (x[..., :3] + 1) / 2 * (HIGH - LOW) + LOW
        return torch.cat((position, x[..., 3:9], out[..., 9:].sigmoid()), -1)


def box(x: Tensor) -> Tensor:
    return (x - LOW) / (HIGH - LOW) * 2 - 1


def wave(x: Tensor, dim: int = 192) -> Tensor:
    rate = torch.exp(torch.arange(dim // 2) * -(math.log(10000) / (dim // 2 - 1)))
    return torch.cat(((x[:, None] * rate).sin(), (x[:, None] * rate).cos()), -1)


def where(xyz: Tensor, dim: int = 192) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary code, each channel's angle twice in a row."""
    third = dim // 3
    rate = torch.exp(torch.arange(0, third, 2).float() * (-math.log(10000.0) / third))
    angle = (xyz[..., None] * rate).repeat_interleave(2, -1).flatten(-2)
    return angle.cos(), angle.sin()


def turn(x: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
    other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * at[0] + other * at[1]


def farthest(x: Tensor, count: int) -> list[int]:
    x = x.double()
    apart = torch.full((len(x),), torch.inf, dtype=torch.float64)
    chosen, at = [], 0
    for _ in range(count):
        chosen.append(at)
        apart = torch.minimum(apart, (x - x[at]).square().sum(-1))
        at = int(apart.argmax())
    return chosen
