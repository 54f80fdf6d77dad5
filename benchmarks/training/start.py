"""The projector's start: what the policy's task table says, by least squares.

A policy pretrained alone understands the rows of its table and no latent. `task_anchors`
names, for each task, a latent that its door turns into that row; the projector that comes
nearest to sending each sample's state to its task's anchor is a ridge regression, seconds of
work where finding it by gradients through the policy takes hours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.training.joint import Joint, sample_of
from system1.door import nearest_task, task_anchors

SAMPLES = 4096
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # in units of the states' mean variance


def start_from_table(joint: Joint) -> dict[str, float]:
    """Fit the projector; return how often a latent is nearest to its task's row.

    The penalty is the one that does best on the held-out episodes. Nothing is changed where
    the policy has no table.
    """
    anchors = task_anchors(joint.policy)
    if anchors is None:
        return {}
    states, filled, tasks = gathered(joint, joint.train_rows)
    held = joint.val_rows if len(joint.val_rows) else joint.train_rows
    test_states, test_filled, test_tasks = gathered(joint, held)
    wanted = anchors.to(states.device)[tasks]  # (N, n_tokens, dim)
    projector = joint.learner.head.projector
    best, kept = -1.0, None
    for penalty in PENALTIES:
        weight, bias = ridge(states[filled], wanted[filled], penalty)
        with torch.no_grad():
            projector.weight.copy_(weight)
            projector.bias.copy_(bias)
        right = accuracy(joint, test_states, test_filled, test_tasks)
        if right > best:
            best, kept = right, (weight, bias)
    if kept is not None:
        with torch.no_grad():
            projector.weight.copy_(kept[0])
            projector.bias.copy_(kept[1])
    return {
        "samples": float(len(states)),
        "train_top1": accuracy(joint, states, filled, tasks),
        "held_out_top1": best,
    }


def accuracy(joint: Joint, states: Tensor, filled: Tensor, tasks: Tensor) -> float:
    """Return the share of states whose latent comes nearest to its task's row."""
    with torch.no_grad():
        latent = joint.learner.head.project(states, filled)
    guess = nearest_task(joint.policy, latent)
    return 0.0 if guess is None else float((guess == tasks).float().mean())


def gathered(joint: Joint, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return states (N, n, hidden), filled rows (N, n) and tasks (N,) of at most `SAMPLES` rows."""
    generator = joint.generator(0, 3)
    order = rows[torch.randperm(len(rows), generator=generator)[:SAMPLES]]
    states, filled, tasks = [], [], []
    for chosen in order.split(joint.section.batch):
        sample, task = sample_of(joint, chosen, generator)
        states.append(sample.state)
        filled.append(sample.filled)
        tasks.append(task)
    return torch.cat(states), torch.cat(filled), torch.cat(tasks)


def ridge(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Return weight (dim, hidden) and bias (dim,) of the penalised linear map from x to y.

    A language model's final states have a few huge channels, so each is scaled to its own
    spread first; the scale then goes into the weight.
    """
    x, y = x.double(), y.double()
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    z, middle = (x - mean) / spread, y.mean(0)
    gram = z.T @ z
    gram += penalty * len(z) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram, z.T @ (y - middle)).T / spread
    return weight.float(), (middle - weight @ mean).float()
