"""The light encoder of our own policies: RGB, points and a latent in, a few hundred 3D tokens out.

Each camera has a small convolution stack on seven geometric channels (colour, point relative
to the gripper, validity) and a few sine waves of the point, which let the first layer see
millimetres; the condition modulates its residual blocks (FiLM), so that the features are
about the object that matters. One token per cell of 8 x 8 pixels, placed at the mean of its
valid points. A cell without a valid point is masked out. At the end the tokens vote for the
next keyposes, and what they say joins them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, layer_norm, silu

from openhelix.system1.attention import Block, blocks_of, metric_frequencies, rotary_code, sinusoid
from openhelix.system1.config import TACTILE, PolicyConfig
from openhelix.system1.geometry import (
    IDENTITY_6D,
    PROPRIO_FEATURES,
    Inputs,
    KeyposeVote,
    Scene,
    farthest_point_sample,
    masked_pool,
    matrix_to_6d,
    merge_masks,
    quat_to_matrix,
    xyzw_to_wxyz,
)
from openhelix.system1.vision import EfficientNetStack, VitStack

# ------------------------------------------------------------------------------------------------
# The condition: the one way in which System 2's latent enters a policy.
#
# A latent of one token, of several, or a short memory of recent ones with their ages: all
# become tokens of the policy's width. Beside them stands one token from a learned table, its
# row 0 for "no task named" and one row per task, which is all that a policy without System 2
# has. A latent stands in the place of that table's row, not beside it: a policy pretrained on
# the table alone then meets one token where it learned to expect one, and System 2 can be
# taught to speak for the table before the policy is touched (the paper's first stage). The age
# of a latent goes in as a sinusoid code, so that the policy can learn how far to trust an old
# one (paper Sec. 3, asynchronous operation).


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


# ------------------------------------------------------------------------------------------------
# Keyposes: where the hand goes next, by a vote of the scene's tokens.
#
# A chunk lasts half a second, far less than a reach, and says only in which direction to go;
# what decides it, the next keypose (3D Diffuser Actor's keyposes: the gripper changes, the
# motion turns, the demonstration ends), is a place among the things seen. So every scene token
# votes for it, from where it is, and is weighed against the others, as in point-cloud keypose
# predictors. The vote is supervised directly and its result stands among the scene's tokens,
# placed where the hand should go. On two CPU cores the trajectory itself teaches the encoder
# to find things many times more slowly.


VOTE_UNIT_M = 0.1  # of the offsets that tokens learn, and of the loss
KEYPOSE_WAVES_M = (0.8, 0.2, 0.05)  # wavelengths in which the voted place is told
KEYPOSE_FEATURES = 3 + 6 * len(KEYPOSE_WAVES_M) + 7
POSITION_WEIGHT, SPREAD_WEIGHT, ROTATION_WEIGHT, GRIPPER_WEIGHT = 4.0, 2.0, 2.0, 0.5


@dataclass(frozen=True, slots=True)
class KeyposeTargets:
    """The keyposes that the expert went to."""

    rows: Tensor  # (B, K, 9) relative to the gripper: metres and 6D
    openness: Tensor  # (B, K), 0 closed to 1 open, from there on


class KeyposeHead(nn.Module):
    """Scene tokens to keyposes, and keyposes to tokens for the denoiser."""

    identity: Tensor
    waves: Tensor

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.dim, self.count = dim, count
        self.vote = nn.Linear(dim, 4 * count)  # a weight and an offset
        self.turn = nn.ModuleList(nn.Linear(dim, 7) for _ in range(count))
        self.tell = nn.Sequential(nn.Linear(KEYPOSE_FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.slot = nn.Parameter(0.02 * torch.randn(count, dim))
        self.register_buffer("identity", torch.tensor(IDENTITY_6D), persistent=False)
        waves = 2 * torch.pi / torch.tensor(KEYPOSE_WAVES_M)
        self.register_buffer("waves", waves, persistent=False)

    def forward(
        self, tokens: Tensor, xyz: Tensor, mask: Tensor | None
    ) -> tuple[KeyposeVote, Tensor, Tensor]:
        """Vote.

        Args:
            tokens: (B, N, dim).
            xyz: (B, N, 3) metres, relative to the gripper.
            mask: (B, N) bool, or None when every token is valid.

        Returns:
            The vote; tokens (B, K, dim) that tell of it; a vector (B, dim) for the signal.
        """
        normed = layer_norm(tokens, (self.dim,))
        raw = self.vote(normed).float().unflatten(-1, (self.count, 4))
        score = raw[..., 0]
        if mask is not None:
            score = score.masked_fill(~mask.unsqueeze(-1), -torch.inf)
        weight = score.softmax(1)  # over tokens
        votes = xyz.float().unsqueeze(2) + VOTE_UNIT_M * raw[..., 1:]
        position = (weight.unsqueeze(-1) * votes).sum(1)
        seen = weight.transpose(1, 2).to(normed.dtype) @ normed  # (B, K, dim)
        turned = torch.stack([f(seen[:, i]) for i, f in enumerate(self.turn)], 1).float()
        rotation, opened = turned[..., :6] + self.identity, turned[..., 6]
        vote = KeyposeVote(position, rotation, opened, weight, votes)
        told = self.tell(self.features(vote).to(tokens.dtype))
        return vote, seen + told + self.slot, told.mean(1)

    def features(self, vote: KeyposeVote) -> Tensor:
        """Return what is told of a vote, (B, K, KEYPOSE_FEATURES)."""
        phase = (vote.position.unsqueeze(-1) * self.waves).flatten(-2)
        turn = torch.cat((vote.rotation - self.identity, vote.opened.sigmoid().unsqueeze(-1)), -1)
        near = (vote.position / (3 * VOTE_UNIT_M)).clamp(-4, 4)
        return torch.cat((near, phase.sin(), phase.cos(), turn), -1)


def keypose_loss(vote: KeyposeVote, targets: KeyposeTargets) -> Tensor:
    """Return how far a vote is from the keyposes, a weighted scalar.

    The weighted mean of the votes counts, and the votes that make it count by their weights:
    two wrong votes on either side of the truth are no good vote.
    """
    wanted = targets.rows[..., :3].float()
    gap = (vote.position - wanted).abs().mean() / VOTE_UNIT_M
    each = (vote.votes - wanted.unsqueeze(1)).abs().mean(-1)
    spread = (vote.weight * each).sum(1).mean() / VOTE_UNIT_M
    turn = (vote.rotation - targets.rows[..., 3:].float()).abs().mean()
    opened = binary_cross_entropy_with_logits(vote.opened, targets.openness.float())
    return (
        POSITION_WEIGHT * gap
        + SPREAD_WEIGHT * spread
        + ROTATION_WEIGHT * turn
        + GRIPPER_WEIGHT * opened
    )


# ------------------------------------------------------------------------------------------------
# The encoder


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
        self.sensors = frozenset(config.sensors)
        seen = len(config.cameras) if config.sees else 0
        self.cameras = nn.ModuleList(_stack(config) for _ in range(seen))
        names = [camera.name for camera in config.cameras]
        self.touching = names.index(TACTILE) if TACTILE in names else -1
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
        center = inputs.proprio[:, -1, :3]
        if "proprio" not in self.sensors:
            features, center = torch.zeros_like(features), torch.zeros_like(center)
        signal = pooled + self.proprio(features.flatten(1))
        latent = as_given(inputs)
        if not len(self.cameras):
            none = condition[:, :0]
            return Scene(
                none,
                none[..., :3],
                None,
                condition,
                condition_mask,
                signal,
                features,
                latent=latent,
            )
        tokens, places, masks = [], [], []
        for i, stack in enumerate(self.cameras):
            rgb, points, known = self._masked(i, inputs)
            pixels = pixel_channels(rgb, points, known, center)
            pixels = pixels.to(pooled.dtype, memory_format=torch.channels_last)
            found, grid = stack(pixels, pooled)
            tokens.append(found + self.camera_code[i])
            if "depth" not in self.sensors or i == self.touching:
                # A picture has no place of its own: it stands at the hand.
                places.append(torch.zeros_like(found[..., :3], dtype=center.dtype))
                masks.append(torch.ones_like(found[..., 0], dtype=torch.bool))
                continue
            mean, valid = masked_pool(points, known, *grid)
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
        scene = Scene(joined, xyz, seen, condition, condition_mask, signal, features, latent=latent)
        return scene if self.keyposes is None else with_keyposes(scene, self.keyposes)

    def _masked(self, camera: int, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Return a camera's colours and points as far as they are among the sensors."""
        rgb, xyz, valid = inputs.rgb[camera], inputs.xyz[camera], inputs.valid[camera]
        touching = camera == self.touching
        if "rgb" not in self.sensors and not touching:
            rgb = torch.full_like(rgb, 0.5)
        if "depth" not in self.sensors or touching:
            xyz, valid = torch.zeros_like(xyz), torch.zeros_like(valid)
        return rgb, xyz, valid


def as_given(inputs: Inputs) -> Tensor | None:
    """Return the latents' tokens (B, memory * n, dim) as they came; zero where one is left out."""
    if inputs.latent is None:
        return None
    latent = inputs.latent
    if inputs.latent_mask is not None:
        latent = torch.where(inputs.latent_mask[..., None, None], latent, 0.0)
    return latent.flatten(1, 2)


def _stack(config: PolicyConfig) -> nn.Module:
    """Return the encoder of one camera."""
    if config.encoder == "vit":
        return VitStack(CHANNELS, config.dim, config.heads)
    if config.encoder == "efficientnet":
        return EfficientNetStack(config.dim)
    return CameraStack(config.encoder_width, config.dim)


def with_keyposes(scene: Scene, head: KeyposeHead) -> Scene:
    """Return the scene with what its tokens vote for among its tokens and in its signal."""
    vote, tokens, told = head(scene.tokens, scene.xyz, scene.mask)
    joined = torch.cat((scene.tokens, tokens), 1)
    xyz = torch.cat((scene.xyz, vote.position.to(scene.xyz.dtype)), 1)
    mask = merge_masks([(scene.mask, scene.tokens), (None, tokens)])
    signal = scene.signal + told
    return replace(scene, tokens=joined, xyz=xyz, mask=mask, signal=signal, vote=vote)
