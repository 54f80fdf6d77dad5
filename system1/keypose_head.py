"""Where the hand goes next: a vote of the scene's tokens, and what the denoiser is told of it.

A chunk lasts half a second, far less than a reach, and says only in which direction to go;
what decides it, the next keypose (3D Diffuser Actor's keyposes: the gripper changes, the
motion turns, the demonstration ends), is a place among the things seen. So every scene token
votes for it, from where it is, and is weighed against the others, as in point-cloud keypose
predictors. The vote is supervised directly and its result stands among the scene's tokens,
placed where the hand should go. On two CPU cores the trajectory itself teaches the encoder
to find things many times more slowly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, layer_norm

from openhelix.system1.scene import KeyposeVote

VOTE_UNIT_M = 0.1  # of the offsets that tokens learn, and of the loss
WAVES_M = (0.8, 0.2, 0.05)  # wavelengths in which the voted place is told
FEATURES = 3 + 6 * len(WAVES_M) + 7
IDENTITY_6D = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
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
        self.tell = nn.Sequential(nn.Linear(FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.slot = nn.Parameter(0.02 * torch.randn(count, dim))
        self.register_buffer("identity", torch.tensor(IDENTITY_6D), persistent=False)
        waves = 2 * torch.pi / torch.tensor(WAVES_M)
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
        """Return what is told of a vote, (B, K, FEATURES)."""
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
