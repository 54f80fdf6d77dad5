"""Diffusion and flow matching: noise schedules and samplers as tables, and the space they work in.

Every sampler here is linear in the current state, the predicted clean sample, the one
predicted a step earlier, and fresh noise. So a sampler is a table with one row per step and
one column per trajectory number (position and rotation have schedules of their own), and one
loop runs them all: nothing is computed in the loop that the table can hold, and a CUDA graph
can capture it.

Sources: DDPM (Ho et al. 2020, eq. 6-7, variance "fixed small"), DDIM (Song et al. 2021,
eq. 12, eta = 0), DPM-Solver++ 2M (Lu et al. 2022, algorithm 2). Tests hold them against the
diffusers schedulers.

Flow matching (Lipman et al. 2023; rectified flow, Liu et al. 2023) is the schedule whose levels of
trajectory and noise add up to one: a straight line between the two, walked by Euler's steps.

A trajectory row is nine numbers: position relative to the gripper (3) and the 6D form of the
relative rotation (6). A `Normalizer` maps metres and rotations to what the diffusion works on.
Our own policies fit an offset and a scale for every row of the chunk, because the first rows move
millimetres and the last ones decimetres: with one scale for all rows the first would drown in the
noise. The official checkpoints use one box for positions and leave rotations as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openhelix.system1.config import OFFICIAL_BOUNDS_M, PolicyConfig, Prediction, SamplerName
from openhelix.system1.geometry import IDENTITY_6D

# ------------------------------------------------------------------------------------------------
# Schedules and samplers


POSITION, ROTATION = 3, 6  # numbers a row
ROW = POSITION + ROTATION

Noise = Callable[[tuple[int, ...]], Tensor]


def alphas_cumprod(schedule: str, steps: int) -> Tensor:
    """Return the products of (1 - beta), (steps,) float64 computed from float32 betas.

    Raises:
        ValueError: the schedule has no such name.
    """
    if schedule == "scaled_linear":
        betas = torch.linspace(1e-4**0.5, 0.02**0.5, steps, dtype=torch.float32) ** 2
    elif schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float32)
    elif schedule == "squaredcos_cap_v2":
        bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = torch.tensor([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(steps)])
    else:
        raise ValueError(
            f"schedule: {schedule!r} is not scaled_linear, linear or squaredcos_cap_v2"
        )
    return torch.cumprod(1.0 - betas.float(), 0).double()


def row_alphas(config: PolicyConfig) -> Tensor:
    """Return the cumulative alphas of each trajectory number, (train_steps, 9) float64."""
    position = alphas_cumprod(config.position_schedule, config.train_steps)
    rotation = alphas_cumprod(config.rotation_schedule, config.train_steps)
    columns = (position[:, None].expand(-1, POSITION), rotation[:, None].expand(-1, ROTATION))
    return torch.cat(columns, 1)


def row_levels(config: PolicyConfig) -> Tensor:
    """Return how much of the trajectory and of noise each timestep's state holds.

    Returns:
        (2, train_steps, 9) float64: the factors of the clean trajectory and of the noise.
    """
    if config.flow:
        noise = torch.arange(1, config.train_steps + 1, dtype=torch.float64) / config.train_steps
        noise = noise[:, None].expand(-1, ROW)
        return torch.stack((1 - noise, noise))
    bars = row_alphas(config)
    return torch.stack((bars.sqrt(), (1 - bars).sqrt()))


@dataclass(frozen=True, slots=True)
class SamplerTable:
    """One sampler, tabulated: step i turns x into the state of the next timestep.

    clean = state_in * x + out_in * output, clamped to `clip` when that is positive;
    x' = clean_out * clean + state_out * x + before_out * clean_before + noise_out * noise.
    """

    timesteps: tuple[int, ...]
    times: Tensor  # (S,) int64, the same on the device
    state_in: Tensor  # (S, 9), like all below
    out_in: Tensor
    clean_out: Tensor
    state_out: Tensor
    before_out: Tensor
    noise_out: Tensor
    clip: float
    stochastic: bool  # whether steps draw noise
    multistep: bool  # whether `clean_before` is read

    def to(self, device: torch.device | str) -> SamplerTable:
        """Return a copy on a device."""
        return replace(
            self,
            times=self.times.to(device),
            state_in=self.state_in.to(device),
            out_in=self.out_in.to(device),
            clean_out=self.clean_out.to(device),
            state_out=self.state_out.to(device),
            before_out=self.before_out.to(device),
            noise_out=self.noise_out.to(device),
        )


def spread_timesteps(train_steps: int, steps: int) -> tuple[int, ...]:
    """Return `steps` timesteps from train_steps - 1 downwards, evenly ("trailing") spaced."""
    return tuple(round(train_steps * (1 - i / steps)) - 1 for i in range(steps))


def clean_from_output(
    prediction: Prediction, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the factors of state and model output that give the clean sample."""
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "v":
        return alpha, -sigma
    if prediction == "flow":  # alpha + sigma = 1
        return torch.ones_like(alpha), -sigma
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def make_table(
    config: PolicyConfig, sampler: SamplerName | None = None, steps: int | None = None
) -> SamplerTable:
    """Tabulate a sampler.

    Args:
        config: gives schedules, prediction type, clipping and the defaults of the rest.
        sampler: "ddpm", "ddim" or "dpmpp"; "euler" for flow matching.
        steps: how many model evaluations.

    Raises:
        ValueError: `steps` is out of range, or the sampler is none of those that fit the schedules.
    """
    sampler = sampler or config.sampler
    steps = steps or config.sample_steps
    if not 1 <= steps <= config.train_steps:
        raise ValueError(f"steps: {steps} is not in 1..{config.train_steps}")
    if sampler not in config.samplers:
        raise ValueError(f"sampler: {sampler!r} is not {' or '.join(config.samplers)}")
    times = spread_timesteps(config.train_steps, steps)
    alpha, sigma = row_levels(config)[:, list(times)]
    alpha_to = torch.cat((alpha[1:], torch.ones_like(alpha[:1])))
    sigma_to = torch.cat((sigma[1:], torch.zeros_like(sigma[:1])))
    state_in, out_in = clean_from_output(config.prediction, alpha, sigma)
    before = torch.zeros_like(alpha)
    noise = torch.zeros_like(alpha)
    if sampler == "ddpm":
        # In float32 on purpose: 1 - now / following cancels, checkpoints were trained and
        # published with what float32 makes of it, and the difference reaches the output.
        now = row_alphas(config)[list(times)].float()
        following = torch.cat((now[1:], torch.ones_like(now[:1])))
        alpha, sigma, alpha_to = now.sqrt(), (1 - now).sqrt(), following.sqrt()
        state_in, out_in = clean_from_output(config.prediction, alpha, sigma)
        kept = now / following  # alpha_t between the two timesteps
        clean = alpha_to * (1 - kept) / (1 - now)
        state = kept.sqrt() * (1 - following) / (1 - now)
        noise = ((1 - following) / (1 - now) * (1 - kept)).clamp_min(1e-20).sqrt()
        noise[-1] = 0  # the step to the clean sample adds none, and draws none
    elif sampler == "dpmpp":
        state = sigma_to / sigma
        log_snr = (alpha / sigma).log()
        step = torch.cat((log_snr[1:] - log_snr[:-1], torch.full_like(log_snr[:1], torch.inf)))
        clean = -alpha_to * torch.expm1(-step)
        for i in range(1, steps - 1):  # the last step is of first order: it ends at sigma = 0
            ahead = step[i] / (2 * step[i - 1])
            before[i] = -clean[i] * ahead
            clean[i] = clean[i] * (1 + ahead)
    else:  # DDIM; on a straight line the same step is Euler's
        state = sigma_to / sigma
        clean = alpha_to - state * alpha
    return SamplerTable(
        timesteps=times,
        times=torch.tensor(times),
        state_in=state_in.float(),
        out_in=out_in.float(),
        clean_out=clean.float(),
        state_out=state.float(),
        before_out=before.float(),
        noise_out=noise.float(),
        clip=config.clip_sample,
        stochastic=sampler == "ddpm",
        multistep=sampler == "dpmpp",
    )


def draw_noise(
    table: SamplerTable, batch: int, rows: int, noise: Noise
) -> tuple[Tensor, Tensor | None]:
    """Draw every Gaussian number of one sample, in the fixed order that makes runs comparable.

    The initial state (B, T, 9) first; then, for each step that adds noise, position (B, T, 3)
    and rotation (B, T, 6). DDPM's last step adds none and draws none, and deterministic
    samplers draw only the initial state. Drawn where `noise` draws, then moved to the table's
    device in one piece: fifty copies of a few numbers would each wait for a GPU.

    Returns:
        The initial state, and the step noise (S, B, T, 9) or None, on the table's device.
    """
    device = table.times.device
    first = noise((batch, rows, ROW))
    if not table.stochastic:
        return first.to(device), None
    drawn = torch.zeros(
        len(table.timesteps), batch, rows, ROW, dtype=first.dtype, device=first.device
    )
    for i in range(len(table.timesteps) - 1):
        drawn[i, ..., :POSITION] = noise((batch, rows, POSITION))
        drawn[i, ..., POSITION:] = noise((batch, rows, ROTATION))
    return first.to(device), drawn.to(device)


def leading(count: Tensor, rows: int) -> Tensor:
    """Return (B, rows) bool, True for the first `count` (B,) rows of each."""
    return torch.arange(rows, device=count.device) < count.unsqueeze(1)


@dataclass(frozen=True, slots=True)
class Known:
    """What is known beforehand of a trajectory that is to be sampled.

    Attributes:
        rows: (B, T, 9) in the diffusion's space.
        weight: (B, T), 1 where a row is to be as it is known, 0 where nothing is; between them
            the predicted clean row is drawn towards it.
        given: (B,) of the first rows, so many go into the network clean and marked as such; for
            one trained so (`PolicyConfig.given_rows`). None: all rows go in noisy.
    """

    rows: Tensor
    weight: Tensor
    given: Tensor | None = None

    def impose(self, clean: Tensor) -> Tensor:
        """Return a predicted clean trajectory drawn towards what is known."""
        return torch.lerp(clean, self.rows, self.weight.unsqueeze(-1))

    def enter(self, x: Tensor) -> Tensor:
        """Return the state as it enters the network."""
        if self.given is None:
            return x
        return torch.where(leading(self.given, x.shape[1]).unsqueeze(-1), self.rows, x)


def run_table(
    table: SamplerTable,
    model: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    first: Tensor,
    step_noise: Tensor | None,
    known: Known | None = None,
) -> tuple[Tensor, Tensor]:
    """Denoise.

    Args:
        table: on the device of `first`.
        model: (step index, state (B, T, 9)) to (output (B, T, 9), openness logit (B, T, 1)).
        first: the initial state (B, T, 9).
        step_noise: (S, B, T, 9) or None, from `draw_noise`.
        known: what is known of the result; None for nothing.

    Returns:
        The clean trajectory (B, T, 9) in the diffusion's space and the last openness logits
        (B, T, 1).
    """
    x, logits, before = first, first[..., :1], None
    for i in range(len(table.timesteps)):
        x = x if known is None else known.enter(x)
        output, logits = model(i, x)
        clean = output * table.out_in[i] + x * table.state_in[i]
        if table.clip > 0:
            clean = clean.clamp(-table.clip, table.clip)
        if known is not None:
            clean = known.impose(clean)
        following = clean * table.clean_out[i] + x * table.state_out[i]
        if table.multistep and before is not None:
            following = following + before * table.before_out[i]
        if step_noise is not None:
            following = following + step_noise[i] * table.noise_out[i]
        x, before = following, clean
    return x, logits


def add_noise(levels: Tensor, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the noisy trajectory at timesteps `t`.

    Args:
        levels: `row_levels`, (2, train_steps, 9).
        clean: (B, T, 9).
        noise: (B, T, 9).
        t: (B,) int64.
    """
    alpha, sigma = levels[:, t].unsqueeze(2)
    return (alpha * clean + sigma * noise).to(clean.dtype)


def target_of(
    prediction: Prediction, levels: Tensor, clean: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """Return what the model is to predict, (B, T, 9)."""
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return clean
    if prediction == "flow":
        return noise - clean
    alpha, sigma = levels[:, t].unsqueeze(2)
    return (alpha * noise - sigma * clean).to(clean.dtype)


# ------------------------------------------------------------------------------------------------
# The space that the diffusion works in


@dataclass(frozen=True, slots=True)
class Normalizer:
    """`normalised = (row - offset) / scale`, each (T or 1, 9)."""

    offset: Tensor
    scale: Tensor

    def normalize(self, rows: Tensor) -> Tensor:
        """Map (..., T, 9) from metres and 6D to the diffusion's space."""
        return (rows - self.offset) / self.scale

    def denormalize(self, rows: Tensor) -> Tensor:
        """Map (..., T, 9) back."""
        return rows * self.scale + self.offset

    def to(self, device: torch.device | str) -> Normalizer:
        """Return a copy on a device."""
        return Normalizer(self.offset.to(device), self.scale.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {"offset": self.offset, "scale": self.scale}

    @staticmethod
    def official() -> Normalizer:
        """Return the box of the published CALVIN checkpoints, rotations untouched."""
        low, high = (torch.tensor(b, dtype=torch.float32) for b in OFFICIAL_BOUNDS_M)
        offset = torch.cat(((low + high) / 2, torch.zeros(6)))[None]
        scale = torch.cat(((high - low) / 2, torch.ones(6)))[None]
        return Normalizer(offset, scale)

    @staticmethod
    def default(config: PolicyConfig) -> Normalizer:
        """Return a guess for an untrained policy: 0.4 m/s and 1.5 rad/s reach one unit."""
        if config.head == "diffuser_actor":
            return Normalizer.official()
        seconds = (torch.arange(config.horizon) + 1)[:, None] / config.hz
        scale = torch.cat(
            ((0.4 * seconds).expand(-1, 3), (1.5 * seconds).clamp(0.02, 1.0).expand(-1, 6)), -1
        )
        offset = torch.cat((torch.zeros(3), torch.tensor(IDENTITY_6D)))
        return Normalizer(offset.expand(config.horizon, -1).clone(), scale.clone())

    @staticmethod
    def fit(rows: Tensor, mask: Tensor, quantile: float = 0.98) -> Normalizer:
        """Fit to relative trajectories.

        The three axes share one scale a row, and so do the six rotation numbers, so that no
        direction that happened to be still in the data is blown up.

        Args:
            rows: (N, T, 9) relative trajectories in metres and 6D.
            mask: (N, T) bool, True where a row is real.
            quantile: share of the data that ends up within one unit.
        """
        identity = torch.tensor(IDENTITY_6D)
        offsets, scales = [], []
        for i in range(rows.shape[1]):
            real = rows[mask[:, i], i]
            if len(real) == 0:
                raise ValueError(f"rows: row {i} of the chunk is masked out in all of the data")
            position = real[:, :3].abs().amax(-1)
            rotation = (real[:, 3:] - identity).abs().amax(-1)
            p = torch.quantile(position[:100_000], quantile).clamp_min(2e-3)
            r = torch.quantile(rotation[:100_000], quantile).clamp_min(1e-2)
            offsets.append(torch.cat((torch.zeros(3), identity)))
            scales.append(torch.cat((p.expand(3), r.expand(6))))
        return Normalizer(torch.stack(offsets), torch.stack(scales))
