"""Teaching `<ACT>` and projector the policy's task table, before the policy is asked at all.

The least-squares start (`start.py`) leaves `<ACT>` as it was, and its error is in metres of
latent, not in tasks told apart. Here both learn by gradients that a latent, once through the
policy's door, should lie at its task's row of the table and nearer to it than to the others.
No trajectory is predicted, so a step costs a tenth of one of stage 1, and there is one right
answer a sample where a trajectory has many.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, layer_norm

from benchmarks.training.joint import Joint
from system1.model import VisuomotorPolicy
from system1.train_state import cosine_rate

log = logging.getLogger(__name__)

WARMUP = 10
LOG_EVERY = 50


def align(joint: Joint, steps: int) -> list[float]:
    """Train `<ACT>` (where it learns) and projector on the table; return the losses.

    Nothing is done where the policy has no table.
    """
    policy, learner, section = joint.policy, joint.learner, joint.section
    if not isinstance(policy, VisuomotorPolicy):
        return []
    groups = [
        {"params": list(learner.head.projector.parameters()), "top": section.lr_head},
        {"params": learner.learned().act, "top": section.lr_act},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-3, betas=(0.9, 0.95))
    table = policy.encoder.condition.table.weight[1:].detach().float()
    losses = []
    for number in range(steps):
        generator = joint.generator(number, 1)
        picks = torch.randint(len(joint.train_rows), (section.batch,), generator=generator)
        with joint.language_precision():
            drawn = joint.feed.draw(joint.train_rows[picks], generator)
        loss = table_loss(policy, drawn.sample.z, table, joint.task(drawn.frames))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["top"] * cosine_rate(number, WARMUP, steps)
        optimizer.step()
        losses.append(float(loss.detach()))
        if len(losses) % LOG_EVERY == 0:
            log.info("aligning: step %d of %d, loss %.3f", len(losses), steps, losses[-1])
    return losses


def table_loss(policy: VisuomotorPolicy, latent: Tensor, table: Tensor, task: Tensor) -> Tensor:
    """Return how far latents are from their tasks' rows, and how near to others.

    Both in units of the distance between neighbouring rows.

    Args:
        policy: whose door it is.
        latent: (B, n, dim).
        table: (n_tasks, width), the rows.
        task: (B,).
    """
    condition = policy.encoder.condition
    width = latent.shape[-1]
    tokens = condition.project(layer_norm(latent.to(condition.slot), (width,))) + condition.slot
    said = tokens.mean(1).float()
    apart = torch.cdist(table, table) + torch.eye(len(table), device=table.device) * 1e9
    unit = apart.amin(1).square().mean()
    squared = torch.cdist(said, table).square() / unit
    far = squared.gather(1, task.unsqueeze(1)).mean()
    return cross_entropy(-2.0 * squared, task) + 0.5 * far
