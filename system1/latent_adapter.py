"""Giving a policy that was trained without System 2 the door for a latent.

`Condition` projects a latent into the policy's width. A policy pretrained on its task table
has that projection untrained, and a policy trained on one latent has it for that latent's
shape. `adapt_to_latent` keeps every other weight; `task_anchors` says which latents the door would
turn into the table's rows, so that System 2's projector can start by saying what the policy
already understands.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from openhelix.runtime.core.interfaces import LatentSpec
from openhelix.system1.checkpoint import CheckpointError, Network, rebuilt
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
        CheckpointError: a weight behind the door would have another shape.
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
def task_anchors(model: Network) -> Tensor | None:
    """Return latents (n_tasks, n_tokens, dim) that the door turns into the task table's rows.

    The shortest such latent, filled up with one direction that the door does not see, since
    the norm before the door fixes a latent's length. A row too long to be reached is met in
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
def task_margin(model: Network, latent: Tensor) -> Tensor | None:
    """Return by how much (B,) latents (B, n, dim) are nearer to a task than to no task.

    The distance to the table's row for "no task named", less that to the nearest task's row.
    None for a policy without a table.
    """
    if not isinstance(model, VisuomotorPolicy):
        return None
    tokens = adapter_tokens(model, latent).mean(1)
    apart = torch.cdist(tokens.float(), model.encoder.condition.table.weight.float())
    return apart[:, 0] - apart[:, 1:].amin(1)


@torch.no_grad()
def nearest_task(model: Network, latent: Tensor) -> Tensor | None:
    """Return the task (B,) whose table row the latents (B, n, dim) come nearest to."""
    if not isinstance(model, VisuomotorPolicy):
        return None
    tokens = adapter_tokens(model, latent).mean(1)
    return torch.cdist(tokens.float(), model.encoder.condition.table.weight[1:].float()).argmin(1)
