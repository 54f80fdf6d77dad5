"""Losses: L1 on the position and the rotation target, cross-entropy on the gripper.

Weights 30, 10 and 1 (paper Sec. 4.2: omega_3 = 30, omega_4 = 10), over real rows only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from openhelix.system1.config import Prediction
from openhelix.system1.diffusion import POSITION, add_noise, leading, target_of
from openhelix.system1.draws import numbers, rand, randint, randn
from openhelix.system1.geometry import matrix_from_6d, quat_to_matrix

GIVEN_ONE_IN = 4  # of the noise draws
ROW = 9  # numbers of a trajectory's row: position, rotation in 6D
POSITION_WEIGHT, ROTATION_WEIGHT, GRIPPER_WEIGHT = 30.0, 10.0, 1.0


@dataclass(frozen=True, slots=True)
class LossParts:
    """The parts, the first three unweighted, and their weighted sum; scalars."""

    position: Tensor
    rotation: Tensor
    gripper: Tensor
    keypose: Tensor | float = 0.0  # weighted already; see `encoder_light.keypose_loss`
    rows: Tensor | float = 1.0  # how many real rows the first three are the means of

    @property
    def total(self) -> Tensor:
        """30 position + 10 rotation + gripper, and the keyposes' own."""
        return (
            POSITION_WEIGHT * self.position
            + ROTATION_WEIGHT * self.rotation
            + GRIPPER_WEIGHT * self.gripper
            + self.keypose
        )

    def within(self, rows: float, parts: int) -> LossParts:
        """Return the parts scaled so that their mean over a batch's parts is the batch's loss.

        Args:
            rows: real rows of the whole batch; its parts have different numbers of them.
            parts: equally many observations each.
        """
        share = self.rows * parts / max(1.0, rows)
        return replace(
            self,
            position=self.position * share,
            rotation=self.rotation * share,
            gripper=self.gripper * share,
        )


def trajectory_loss(
    predicted: Tensor, target: Tensor, logits: Tensor, openness: Tensor, mask: Tensor
) -> LossParts:
    """Compare predictions with targets.

    Args:
        predicted: (B, T, 9).
        target: (B, T, 9).
        logits: (B, T, 1).
        openness: (B, T), 0 to 1.
        mask: (B, T) bool, rows that count.
    """
    weight = mask.to(torch.float32)
    rows = weight.sum().clamp_min(1.0)
    gap = (predicted.float() - target.float()).abs()
    gripper = binary_cross_entropy_with_logits(
        logits[..., 0].float(), openness.float(), reduction="none"
    )
    return LossParts(
        (gap[..., :3].mean(-1) * weight).sum() / rows,
        (gap[..., 3:].mean(-1) * weight).sum() / rows,
        (gripper * weight).sum() / rows,
        rows=weight.sum(),
    )


def real_rows(
    mask: Tensor, draws: int, generator: torch.Generator | None, given_rows: int = 0
) -> float:
    """Return how many rows `diffusion_loss` will count; arguments as there, nothing is used up.

    Args:
        mask: (B, T) of a whole batch.
        draws: noise draws an observation.
        generator: as it will be given to `diffusion_loss`.
        given_rows: see there.
    """
    if not given_rows or generator is None:
        return float(mask.sum()) * draws
    again = torch.Generator()
    again.set_state(generator.get_state())
    mask = mask.repeat_interleave(draws, 0)
    torch.rand(len(mask), generator=again)
    torch.randn((*mask.shape, ROW), generator=again)
    first = leading(given_of(len(mask), given_rows, again), mask.shape[1])
    return float((mask & ~first).sum())


def given_of(count: int, given_rows: int, generator: torch.Generator | None) -> Tensor:
    """Return how many first rows of each of `count` draws stay clean, (count,)."""
    drawn = randint(1, given_rows + 1, count, generator=generator)
    return torch.where(numbers(count, generator) % GIVEN_ONE_IN == 0, drawn, 0)


def diffusion_loss(
    model: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]],
    clean: Tensor,
    openness: Tensor,
    mask: Tensor,
    levels: Tensor,
    prediction: Prediction,
    draws: int,
    generator: torch.Generator | None,
    given_rows: int = 0,
) -> LossParts:
    """Noise the clean trajectories, predict, compare.

    Args:
        model: (x (B * draws, T, 9), t (B * draws,), given (B * draws,) or None) to (prediction,
            logits).
        clean: (B, T, 9) in the diffusion's space.
        openness: (B, T).
        mask: (B, T) bool; masked rows are noised from zero and never counted.
        levels: (2, train_steps, 9) of trajectory and noise; see `diffusion.row_levels`.
        prediction: what the model predicts.
        draws: noise draws an observation; timesteps are spread over them evenly.
        generator: source of randomness, on the CPU; the global one when None.
        given_rows: of one draw in four, 1 to so many first rows stay clean and do not count, as
            when a chunk is to go on from one that is being executed; 0 for none.
    """
    clean = torch.where(mask.unsqueeze(-1), clean, 0.0)
    clean, openness, mask = (x.repeat_interleave(draws, 0) for x in (clean, openness, mask))
    count, total = len(clean), levels.shape[1]
    # Stratified over the draws of one observation: less variance for the same work.
    start = rand(count, generator=generator)
    stratum = torch.arange(count) % draws
    t = ((stratum + start) * (total / draws)).long().clamp_max(total - 1).to(clean.device)
    noise = randn(*clean.shape, generator=generator).to(clean.device)
    noisy, given = add_noise(levels, clean, noise, t), None
    if given_rows:
        given = given_of(count, given_rows, generator).to(clean.device)
        first = leading(given, clean.shape[1])
        noisy = torch.where(first.unsqueeze(-1), clean, noisy)
        mask = mask & ~first
    predicted, logits = model(noisy, t, given)
    target = target_of(prediction, levels, clean, noise, t)
    return trajectory_loss(predicted, target, logits, openness, mask)


def trajectory_errors(
    out: Tensor, rows: Tensor, openness: Tensor, mask: Tensor
) -> tuple[float, float, float]:
    """Return summed position (m), rotation (rad) and gripper (0 or 1) errors of real rows.

    Args:
        out: (B, T, 8) sampled: xyz, quaternion wxyz, openness.
        rows: (B, T, 9) wanted: xyz and 6D.
        openness: (B, T) wanted.
        mask: (B, T) bool.
    """
    position = (out[..., :POSITION] - rows[..., :POSITION]).norm(dim=-1)
    gap = quat_to_matrix(out[..., 3:7]).mT @ matrix_from_6d(rows[..., POSITION:])
    # From the chord, not the trace: acos near one loses half the digits.
    chord = (gap - torch.eye(3, device=gap.device)).flatten(-2).norm(dim=-1)
    angle = 2 * torch.asin((chord / 8**0.5).clamp(max=1))
    wrong = (out[..., 7] > 0.5) != (openness > 0.5)
    return float(position[mask].sum()), float(angle[mask].sum()), float(wrong[mask].sum())
