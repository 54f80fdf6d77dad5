"""The networks and made-up observations that System 1's figures are measured on."""

from __future__ import annotations

import torch
from torch import Tensor

from openhelix.benchmarks.perf.s1_timing import Run
from openhelix.system1.actor import DiffuserActor
from openhelix.system1.checkpoint import Network, build_model, load_policy
from openhelix.system1.config import official_calvin, small
from openhelix.system1.fast_modes import GraphedSampler
from openhelix.system1.sampler import Noise
from openhelix.system1.scene import Inputs

Observation = tuple[Tensor, Tensor, Tensor, Tensor]  # what `DiffuserActor.sample` takes


def seeded(seed: int, device: str) -> Noise:
    """Return a reproducible noise source."""
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator).to(device)


def official(device: str, nhist: int = 1, tokens: int = 1) -> tuple[DiffuserActor, Observation]:
    """Return the official-size network with random weights and one made-up observation."""
    torch.manual_seed(0)
    model = DiffuserActor(official_calvin(nhist, tokens)).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(1)
    rgb = torch.rand(1, 2, 3, 160, 160, generator=g)
    pcd = 0.3 * torch.randn(1, 2, 3, 160, 160, generator=g)
    gripper = 0.2 * torch.randn(1, nhist, 8, generator=g)
    latent = torch.randn(1, tokens, 512, generator=g)
    return model.to(device), (rgb.to(device), pcd.to(device), gripper.to(device), latent.to(device))


def small_policy(device: str, checkpoint: str | None) -> tuple[Network, Inputs]:
    """Return the small policy and one made-up observation."""
    torch.manual_seed(0)
    model = load_policy(checkpoint) if checkpoint else build_model(small())
    model = model.eval().requires_grad_(False).to(device)
    g = torch.Generator().manual_seed(1)
    c = model.config
    sizes = [(camera.work_height, camera.work_width) for camera in c.cameras]
    proprio = torch.zeros(1, c.nhist, 9)
    proprio[..., 6:] = torch.tensor([1.0, 0.08, 1.0])
    latent = torch.randn(1, c.latent_memory, c.latent_tokens, c.latent_dim, generator=g)
    inputs = Inputs(
        rgb=tuple(torch.rand(1, 3, *s, generator=g).to(device) for s in sizes),
        xyz=tuple(0.3 * torch.randn(1, 3, *s, generator=g).to(device) for s in sizes),
        valid=tuple(torch.ones(1, *s, dtype=torch.bool, device=device) for s in sizes),
        proprio=proprio.to(device),
        latent=latent.to(device) if c.use_latent else None,
        latent_age_s=torch.zeros(1, c.latent_memory, device=device),
        latent_mask=torch.ones(1, c.latent_memory, dtype=torch.bool, device=device),
        task=torch.tensor([-1], device=device),
    )
    return model, inputs


def runtime_inputs(given: Observation) -> Inputs:
    """Return an official observation as the runtime hands it over."""
    rgb, pcd, gripper, latent = given
    valid = torch.ones(len(rgb), *rgb.shape[-2:], dtype=torch.bool, device=rgb.device)
    return Inputs(
        rgb=tuple(rgb.unbind(1)),
        xyz=tuple(pcd.unbind(1)),
        valid=(valid,) * rgb.shape[1],
        proprio=torch.cat((gripper[..., :7], gripper[..., 6:8]), -1),
        latent=latent.unsqueeze(1),
        latent_age_s=None,
        latent_mask=None,
        task=torch.tensor([-1], device=rgb.device),
    )


def run_of(model: DiffuserActor, given: Observation, device: str) -> Run:
    """Return a function that samples one chunk, always with the same noise."""
    return lambda: model.sample(*given, seeded(0, device))


def run_inputs(model: Network | GraphedSampler, inputs: Inputs, device: str) -> Run:
    """Return a function that samples one chunk from the runtime's inputs."""
    return lambda: model.sample_inputs(inputs, seeded(0, device))
