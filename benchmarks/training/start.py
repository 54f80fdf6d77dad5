"""The projector's start: what the policy's task table says, found without gradients through it.

A policy pretrained alone understands the rows of its table and no latent. `task_anchors`
names, for each task, a latent that its adapter turns into that row. The projector begins as what
best sends each sample's state to its task's anchor: seconds of work where finding it by
gradients through the policy takes hours.

A linear projector is a ridge regression. One with a hidden layer does far better: Fisher's
discriminants (few dozen directions in which a state's task shows and its picture does not)
make its first layer, and a small fit within them the rest. With 1,942 samples of
34 tasks (and a tower that was not trained, which makes it harder) the regression named 66 %
of held-out tasks, the discriminants 87 %; with the trained tower they name 99 %.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu

from openhelix.benchmarks.training.joint import Joint, sample_of
from openhelix.system1.latent_adapter import adapter_tokens, nearest_task, task_anchors
from openhelix.system1.model import VisuomotorPolicy

SAMPLES = 8192
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # in units of the states' mean variance
SHRINKAGES = (1e-3, 1e-2)  # of the covariance within tasks towards the identity
NOISE = 0.3  # added to discriminants, in units of the spread within a task
FIT_STEPS, FIT_BATCH, FIT_RATE = 800, 256, 5e-3


def start_from_table(joint: Joint) -> dict[str, float]:
    """Fit the projector; return how often a latent is nearest to its task's row.

    What is to be chosen is chosen by the held-out episodes. Nothing is changed where the
    policy has no table.
    """
    anchors = task_anchors(joint.policy)
    if anchors is None:
        return {}
    states, filled, tasks = gathered(joint, joint.train_rows)
    held = joint.val_rows if len(joint.val_rows) else joint.train_rows
    test = gathered(joint, held)
    head = joint.learner.head
    if head.neck is None:
        candidates = linear(states, filled, anchors.to(states.device)[tasks])
    else:
        candidates = discriminating(joint, states, filled, tasks)
    best, kept = -1.0, head.state_dict()
    for candidate in candidates:
        head.load_state_dict(candidate, strict=False)
        right = accuracy(joint, *test)
        if right > best:
            best, kept = right, candidate
    head.load_state_dict(kept, strict=False)
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


def linear(states: Tensor, filled: Tensor, wanted: Tensor) -> list[dict[str, Tensor]]:
    """Return the weights of linear projectors, one a penalty."""
    found = []
    for penalty in PENALTIES:
        weight, bias = ridge(states[filled], wanted[filled], penalty)
        found.append({"projector.weight": weight, "projector.bias": bias})
    return found


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


def discriminants(x: Tensor, label: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
    """Return weight (r, hidden) and bias (r,) of Fisher's discriminants.

    In their space the spread within a class is one in every direction, and r, at most one
    less than there are classes, directions hold all that the classes' means differ in.

    Args:
        x: (N, hidden).
        label: (N,) class of each.
        shrink: of the covariance towards the identity, 0 to 1.
    """
    x = x.double()
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    z = (x - mean) / spread
    classes, which = label.unique(return_inverse=True)
    means = torch.stack([z[which == k].mean(0) for k in range(len(classes))])
    inner = z - means[which]
    identity = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    within = (1 - shrink) * (inner.T @ inner / len(z)) + shrink * identity
    values, vectors = torch.linalg.eigh(within)
    whiten = vectors @ torch.diag(values.clamp_min(1e-9).rsqrt()) @ vectors.T
    apart = (means - means.mean(0)) @ whiten
    rank = max(1, min(len(classes) - 1, z.shape[1]))
    main = torch.linalg.svd(apart, full_matrices=False).Vh[:rank]
    weight = main @ whiten / spread
    return weight.float(), (-(weight @ mean)).float()


def discriminating(
    joint: Joint, states: Tensor, filled: Tensor, tasks: Tensor
) -> list[dict[str, Tensor]]:
    """Return the weights of projectors with a hidden layer, one a shrinkage."""
    head, policy = joint.learner.head, joint.policy
    if head.neck is None or not isinstance(policy, VisuomotorPolicy):
        return []
    x = states[filled]
    label = tasks.unsqueeze(1).expand(filled.shape)[filled]
    found = []
    for shrink in SHRINKAGES:
        weight, bias = discriminants(x, label, shrink)
        seen = x @ weight.T + bias
        inner, last = fitted(joint, policy, seen, label)
        found.append(
            {
                "neck.weight": inner.weight.detach() @ weight,
                "neck.bias": inner.weight.detach() @ bias + inner.bias.detach(),
                "projector.weight": last.weight.detach(),
                "projector.bias": last.bias.detach(),
            }
        )
    return found


def fitted(
    joint: Joint, policy: VisuomotorPolicy, seen: Tensor, label: Tensor
) -> tuple[torch.nn.Linear, torch.nn.Linear]:
    """Return the two layers that send discriminants (N, r) to their tasks' rows of the table."""
    head, threads = joint.learner.head, torch.get_num_threads()
    generator = joint.generator(0, 2)
    torch.set_num_threads(1)  # matrices so small that threads would wait for each other
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(joint.config.seed)
        inner = torch.nn.Linear(seen.shape[1], head.projector.in_features).to(seen.device)
        last = torch.nn.Linear(head.projector.in_features, head.projector.out_features)
    last = last.to(seen.device)
    table = policy.encoder.condition.table.weight[1:].detach().float()
    optimizer = torch.optim.Adam([*inner.parameters(), *last.parameters()], FIT_RATE)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_STEPS)
    for _ in range(FIT_STEPS):
        picks = torch.randint(len(seen), (FIT_BATCH,), generator=generator).to(seen.device)
        moved = NOISE * torch.randn(FIT_BATCH, seen.shape[1], generator=generator)
        latent = last(gelu(inner(seen[picks] + moved.to(seen.device))))
        loss = table_loss(policy, latent.unsqueeze(1), table, label[picks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    torch.set_num_threads(threads)
    return inner, last


def table_loss(policy: VisuomotorPolicy, latent: Tensor, table: Tensor, task: Tensor) -> Tensor:
    """Return how far latents are from their tasks' rows, and how near to others.

    Both in units of the distance between neighbouring rows.

    Args:
        policy: whose adapter it is; its weights collect no gradients.
        latent: (B, n, dim).
        table: (n_tasks, width), the rows.
        task: (B,).
    """
    said = adapter_tokens(policy, latent).mean(1).float()
    apart = torch.cdist(table, table) + torch.eye(len(table), device=table.device) * 1e9
    unit = apart.amin(1).square().mean()
    squared = torch.cdist(said, table).square() / unit
    far = squared.gather(1, task.unsqueeze(1)).mean()
    return cross_entropy(-2.0 * squared, task) + 0.5 * far
