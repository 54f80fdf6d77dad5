"""What goes into a policy network and what its encoder hands to a head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

PROPRIO_FEATURES = 14  # what the encoder makes of one reading


@dataclass(frozen=True, slots=True)
class Inputs:
    """One batch of observations, on the policy's device, in the world frame.

    Cameras may differ in size, so images are tuples, one entry a camera in the
    configuration's order.
    """

    rgb: tuple[Tensor, ...]  # (B, 3, h, w), 0 to 1
    xyz: tuple[Tensor, ...]  # (B, 3, h, w), metres, zero where invalid
    valid: tuple[Tensor, ...]  # (B, h, w) bool
    # (B, nhist, 9), newest last: xyz (m, world), quaternion xyzw, gripper width (m), open (0 or 1)
    proprio: Tensor
    latent: Tensor | None  # (B, memory, n_tokens, d), newest last; None for policy only
    latent_age_s: Tensor | None  # (B, memory)
    latent_mask: Tensor | None  # (B, memory) bool, False where there is none
    task: Tensor  # (B,) int64, -1 for none

    @property
    def batch(self) -> int:
        """How many observations."""
        return len(self.proprio)

    def without_latent(self) -> Inputs:
        """Return the same with the null latent ("policy only")."""
        return replace(self, latent=None, latent_age_s=None, latent_mask=None)


@dataclass(frozen=True, slots=True)
class KeyposeVote:
    """Where the hand should go next, in the opinion of every scene token; see `keypose_head`."""

    position: Tensor  # (B, K, 3) metres, relative to the gripper: the weighted mean of votes
    rotation: Tensor  # (B, K, 6) 6D, relative to the gripper
    opened: Tensor  # (B, K) logits of the gripper's state from there on
    weight: Tensor  # (B, N, K), one over each keypose's tokens
    votes: Tensor  # (B, N, K, 3) metres, relative to the gripper


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything about the observation that a head may look at; made once a call."""

    tokens: Tensor  # (B, N, dim)
    xyz: Tensor  # (B, N, 3) metres, relative to the gripper
    mask: Tensor | None  # (B, N) bool; None when every token is valid
    condition: Tensor  # (B, M, dim)
    condition_mask: Tensor  # (B, M) bool
    signal: Tensor  # (B, dim): condition and proprioception, for AdaLN
    proprio: Tensor  # (B, nhist, 14) features
    vote: KeyposeVote | None = None  # its tokens are the last of `tokens`


def merge_masks(parts: list[tuple[Tensor | None, Tensor]]) -> Tensor | None:
    """Concatenate masks of token groups along tokens; None stands for "all valid".

    Args:
        parts: pairs of a mask (B, N) or None and the tokens (B, N, dim) it belongs to.
    """
    if all(mask is None for mask, _ in parts):
        return None
    whole = [
        torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if mask is None
        else mask
        for mask, tokens in parts
    ]
    return torch.cat(whole, 1)
