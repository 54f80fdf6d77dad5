"""The latent adapter of a policy that was trained without System 2, or on another latent.

`Condition` projects a latent into the policy's width; that projection is the adapter. A policy
pretrained on its task table has it untrained, and a policy trained on one latent has it for
that latent's shape. `adapt_to_latent` keeps every other weight; `task_anchors` says which latents
the adapter would turn into the table's rows, so that System 2's projector can start by saying
what the policy already understands.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from openhelix.runtime.core.files import CheckpointError
from openhelix.runtime.core.interfaces import LatentSpec
from openhelix.system1.checkpoint import Network, rebuilt
from openhelix.system1.config import PolicyConfig
from openhelix.system1.model import VisuomotorPolicy

ADAPTER = ("encoder.condition.project.", "encoder.condition.slot")


def with_latent(config: PolicyConfig, spec: LatentSpec) -> PolicyConfig:
    """Return the configuration of the same policy for these latents."""
    return replace(
        config,
        use_latent=True,
        latent_kind=spec.kind,
        latent_tokens=spec.n_tokens,
        latent_dim=spec.dim,
        latent_model_id=spec.model_id,
    )


def adapt_to_latent(model: Network, spec: LatentSpec, seed: int = 0) -> Network:
    """Return the policy for these latents; weights that depend on their shape are fresh.

    Raises:
        CheckpointError: a weight behind the adapter would have another shape.
    """
    config = with_latent(model.config, spec)
    if (config.latent_tokens, config.latent_dim) == (
        model.config.latent_tokens,
        model.config.latent_dim,
    ):
        model.config = config
        return model
    made, unfit = rebuilt(model, config, seed)
    for name in unfit:
        if not name.startswith(ADAPTER):
            old, new = (tuple(m.state_dict()[name].shape) for m in (model, made))
            raise CheckpointError(
                f"{name}: shape {old}, a latent of {spec.n_tokens} tokens of "
                f"width {spec.dim} needs {new}"
            )
    return made


def adapter_tokens(model: VisuomotorPolicy, latent: Tensor) -> Tensor:
    """Return what the policy makes of fresh latents (B, n, dim): tokens (B, n, width).

    Gradients reach the latents, never the policy's weights.
    """
    condition = model.encoder.condition
    weight, bias, slot = (p.detach() for p in (*condition.project.parameters(), condition.slot))
    return linear(layer_norm(latent.to(slot), latent.shape[-1:]), weight, bias) + slot


@torch.no_grad()
def name_by_sentences(model: Network, latent: Tensor, task: Tensor) -> bool:
    """Make each row of the task table what the adapter makes of the task's sentences, on average.

    A policy that is told its tasks by sentences hardly learns the rows of its table, so they say
    little about how it takes a sentence.

    Args:
        model: whose table is written; False for a policy without.
        latent: (S, n, dim), the sentences as they are told.
        task: (S,) from 0; every task has one.
    """
    if not isinstance(model, VisuomotorPolicy):
        return False
    table = model.encoder.condition.table.weight
    tokens = adapter_tokens(model, latent.to(table.device)).mean(1).to(table)
    number = task.to(table.device).long()
    sums = torch.zeros_like(table[1:]).index_add_(0, number, tokens)
    table[1:].copy_(sums / torch.bincount(number, minlength=len(sums)).unsqueeze(1))
    return True


@torch.no_grad()
def task_anchors(model: Network) -> Tensor | None:
    """Return latents (n_tasks, n_tokens, dim) that the adapter turns into the task table's rows.

    The shortest such latent, filled up with one direction that the adapter does not see,
    since the norm before it fixes a latent's length. A row too long to be reached is met in
    direction. None for a policy without a table.
    """
    if not isinstance(model, VisuomotorPolicy):
        return None
    condition = model.encoder.condition
    weight = condition.project.weight.double()  # (width, dim)
    dim = weight.shape[1]
    flat = weight - weight.mean(1, keepdim=True)  # a normed latent has no mean
    wanted = (condition.table.weight[1:].unsqueeze(1) - condition.slot).double()
    wanted = wanted - condition.project.bias.double()
    inverse = torch.linalg.pinv(flat)
    short = wanted @ inverse.T
    length = dim**0.5
    norm = short.norm(dim=-1, keepdim=True)
    short = torch.where(norm > length, short * (length / norm.clamp_min(1e-9)), short)
    unseen = torch.eye(dim, 1, dtype=torch.float64, device=weight.device)[:, 0]
    unseen = unseen - unseen.mean()
    unseen = unseen - inverse @ (flat @ unseen)
    unseen = unseen / unseen.norm().clamp_min(1e-9)
    rest = (length**2 - short.square().sum(-1, keepdim=True)).clamp_min(0).sqrt()
    return (short + rest * unseen).float()


@torch.no_grad()
def start_adapter(model: Network, latent: Tensor, task: Tensor, penalty: float) -> bool:
    """Make the adapter turn latents into their tasks' rows of the table; False for a policy without.

    The penalised linear map, in closed form: a policy that was pretrained on its table
    understands sentences from then on, before it has seen a frame with one. A penalty draws
    all that is said towards the mean row, so the map is then stretched until sentences reach
    their rows on average: of 340 sentences in words of their own, 78 % are then nearest to
    their own row, 64 % without.

    Args:
        model: whose adapter has the shape of these latents; see `adapt_to_latent`.
        latent: (S, n, dim).
        task: (S,).
        penalty: in units of the mean variance of the latents' entries; high ones carry on to
            words that no sentence has.
    """
    if not isinstance(model, VisuomotorPolicy):
        return False
    condition = model.encoder.condition
    x = layer_norm(latent.double(), latent.shape[-1:]).flatten(0, 1)
    rows = condition.table.weight[1:].double()[task]
    y = rows.unsqueeze(1).expand(-1, latent.shape[1], -1).flatten(0, 1)
    mean, middle = x.mean(0), y.mean(0)
    gram = (x - mean).T @ (x - mean)
    gram += penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, (x - mean).T @ (y - middle)).T
    reached = ((x - mean) @ weight.T * (y - middle)).sum()
    weight *= (y - middle).square().sum() / reached.clamp_min(1e-9)
    condition.project.weight.copy_(weight)
    condition.project.bias.copy_(middle - weight @ mean)
    condition.slot.zero_()
    return True


@torch.no_grad()
def task_confidence(model: Network, latent: Tensor) -> Tensor | None:
    """Return how probable each task is (B, n_tasks) by latents (B, n, dim): one in all.

    By the distance to each task's row of the table, in units of that between neighbouring rows,
    as the projector's start is fitted. None for a policy without a table.
    """
    if not isinstance(model, VisuomotorPolicy):
        return None
    table = model.encoder.condition.table.weight[1:].float()
    apart = torch.cdist(table, table) + torch.eye(len(table), device=table.device) * 1e9
    tokens = adapter_tokens(model, latent).mean(1).float()
    squared = torch.cdist(tokens, table).square() / apart.amin(1).square().mean()
    return (-2.0 * squared).softmax(-1)


@torch.no_grad()
def nearest_task(model: Network, latent: Tensor) -> Tensor | None:
    """Return the task (B,) whose table row the latents (B, n, dim) come nearest to."""
    if not isinstance(model, VisuomotorPolicy):
        return None
    tokens = adapter_tokens(model, latent).mean(1)
    return torch.cdist(tokens.float(), model.encoder.condition.table.weight[1:].float()).argmin(1)
