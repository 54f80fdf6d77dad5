"""Our own policy network: light encoder, condition, one of the heads, one normaliser.

`sample` and `loss` are the whole interface, the same for every head, so a study that
compares heads changes one word of the configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from openhelix.system1.config import PolicyConfig
from openhelix.system1.diffusion import (
    Known,
    Noise,
    Normalizer,
    SamplerTable,
    draw_noise,
    make_table,
    row_levels,
    run_table,
)
from openhelix.system1.encoder_light import KeyposeTargets, LightEncoder, keypose_loss
from openhelix.system1.geometry import Inputs, Scene, clean_points, matrix_from_6d, matrix_to_quat
from openhelix.system1.heads.base import DirectHead
from openhelix.system1.heads.registry import build_head
from openhelix.system1.heads.trajectory import TrajectoryHead
from openhelix.system1.losses import LossParts, diffusion_loss, real_rows, trajectory_loss

# ------------------------------------------------------------------------------------------------
# What our network and the published one have in common: schedule, normaliser, sampler in use.
#
# Buffers, none of them in a checkpoint: the schedule and the sampler follow from the
# configuration, the normaliser is a file of its own.


class DiffusionNetwork(nn.Module):
    """A network that denoises trajectories; its parts are the subclass's."""

    levels: Tensor
    offset: Tensor
    scale: Tensor

    def __init__(self, config: PolicyConfig, normalizer: Normalizer) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("levels", row_levels(config), persistent=False)
        self.register_buffer("offset", normalizer.offset.clone(), persistent=False)
        self.register_buffer("scale", normalizer.scale.clone(), persistent=False)
        self._sampler = make_table(config)

    @property
    def normalizer(self) -> Normalizer:
        """The normaliser, on the model's device."""
        return Normalizer(self.offset, self.scale)

    def set_normalizer(self, normalizer: Normalizer) -> None:
        """Take over a normaliser fitted to data."""
        self.offset.copy_(normalizer.offset.expand_as(self.offset))
        self.scale.copy_(normalizer.scale.expand_as(self.scale))

    def use_sampler(self, sampler: str | None = None, steps: int | None = None) -> None:
        """Choose another sampler or number of steps for `sample`."""
        self._sampler = make_table(self.config, sampler, steps)  # type: ignore[arg-type]

    @property
    def sampler(self) -> SamplerTable:
        """The sampler in use, on the model's device."""
        if self._sampler.clean_out.device != self.offset.device:
            self._sampler = self._sampler.to(self.offset.device)
        return self._sampler


def gaussian(generator: torch.Generator | None, device: torch.device | None = None) -> Noise:
    """Return a noise source; it draws on the CPU, so a seed means the same on every device.

    Args:
        generator: the CPU's generator; the global one when None.
        device: where the numbers go; None leaves that to whoever draws.
    """

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    return draw


def rows_to_poses(rows: Tensor, logits: Tensor) -> Tensor:
    """Return (B, T, 8): xyz, quaternion wxyz, openness, of rows (B, T, 9) in metres and 6D."""
    quat = matrix_to_quat(matrix_from_6d(rows[..., 3:9]))
    return torch.cat((rows[..., :3], quat, logits.sigmoid()), -1)


class VisuomotorPolicy(DiffusionNetwork):
    """Observation and latent to a trajectory relative to the gripper."""

    def __init__(self, config: PolicyConfig, normalizer: Normalizer | None = None) -> None:
        normalizer = normalizer or Normalizer.default(config)
        super().__init__(config, normalizer)
        self.encoder = LightEncoder(config)
        self.head = build_head(config)
        self.set_normalizer(normalizer)

    def set_normalizer(self, normalizer: Normalizer) -> None:
        """Take over a normaliser fitted to data, and tell the head where its rows are."""
        super().set_normalizer(normalizer)
        if isinstance(self.head, TrajectoryHead):
            self.head.metres.copy_(self.scale[:, :3])

    def encode(self, inputs: Inputs) -> Scene:
        """Encode a batch of observations once, for as many draws or steps as wanted."""
        return self.encoder(inputs)

    def loss(
        self,
        inputs: Inputs,
        rows: Tensor,
        openness: Tensor,
        mask: Tensor,
        draws: int = 1,
        generator: torch.Generator | None = None,
        keyposes: KeyposeTargets | None = None,
    ) -> LossParts:
        """Return the training loss of one batch.

        Args:
            inputs: B observations.
            rows: (B, T, 9) relative trajectories in metres and 6D.
            openness: (B, T), 0 closed to 1 open.
            mask: (B, T) bool, True where a row is real.
            draws: noise draws an observation; the observation is encoded once.
            generator: source of timesteps and noise; the global one when None.
            keyposes: what the scene's tokens should vote for; None leaves them untaught.
        """
        scene = self.encode(inputs)
        parts = self._trajectory_loss(scene, rows, openness, mask, draws, generator)
        if keyposes is None or scene.vote is None:
            return parts
        return replace(parts, keypose=keypose_loss(scene.vote, keyposes))

    def real_rows(self, mask: Tensor, draws: int, generator: torch.Generator | None) -> float:
        """Return how many rows `loss` will count, for a mask (B, T) of a whole batch."""
        if isinstance(self.head, DirectHead):
            return float(mask.sum())
        return real_rows(mask, draws, generator, self.config.given_rows)

    def _trajectory_loss(
        self,
        scene: Scene,
        rows: Tensor,
        openness: Tensor,
        mask: Tensor,
        draws: int,
        generator: torch.Generator | None,
    ) -> LossParts:
        clean = self.normalizer.normalize(rows)
        if isinstance(self.head, DirectHead):
            predicted, logits = self.head(scene, rows.shape[1])
            return trajectory_loss(predicted, clean, logits, openness, mask)
        return diffusion_loss(
            lambda x, t, given: self.head(x, t, scene, *(() if given is None else (given,))),
            clean,
            openness,
            mask,
            self.levels,
            self.config.prediction,
            draws,
            generator,
            self.config.given_rows,
        )

    @torch.inference_mode()
    def sample_inputs(
        self, inputs: Inputs, noise: Noise | None = None, known: Known | None = None
    ) -> Tensor:
        """Return trajectories (B, T, 8) relative to the gripper; see `sample`.

        Args:
            inputs: B observations.
            noise: source of every Gaussian draw.
            known: what is known of the trajectories; a head without diffusion takes none.
        """
        source = noise or gaussian(None)
        table = self.sampler
        first, drawn = draw_noise(table, inputs.batch, self.config.horizon, source)
        rows, logits = self.denoise_inputs(inputs, first, drawn, known)
        return rows_to_poses(self.normalizer.denormalize(rows.float()), logits.float())

    def denoise_inputs(
        self, inputs: Inputs, first: Tensor, drawn: Tensor | None, known: Known | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode, then run the sampler from `first`; everything a CUDA graph captures."""
        table = self.sampler
        scene = self.encode(inputs)
        if isinstance(self.head, DirectHead):
            return self.head(scene, first.shape[1])
        given = () if known is None or known.given is None else (known.given,)
        step = self.head.prepare(scene, table.times, *given)
        return run_table(table, step, first, drawn, known)

    def sample(
        self,
        rgb: Tensor | Sequence[Tensor],
        pcd: Tensor | Sequence[Tensor],
        gripper: Tensor,
        latent: Tensor | None,
        noise: Noise | None = None,
        task: Tensor | None = None,
    ) -> Tensor:
        """Sample trajectories from plain tensors.

        Args:
            rgb: (B, ncam, 3, H, W) in [0, 1], or one (B, 3, h, w) a camera.
            pcd: world points in metres, of the same shapes; NaN marks an invalid point.
            gripper: (B, nhist, 7 or 8): xyz, quaternion wxyz, openness; newest last.
            latent: (B, n, d), or None for the null latent.
            noise: source of every Gaussian draw; see `openhelix.system1.diffusion.draw_noise`.
            task: (B,) rows of the task table, -1 for none.

        Returns:
            (B, T, 8): xyz in metres and rotation (quaternion wxyz) relative to the newest
            gripper pose, both along world axes, then openness in [0, 1].

        Raises:
            ValueError: a shape does not fit the configuration.
        """
        return self.sample_inputs(self.inputs_of(rgb, pcd, gripper, latent, task), noise)

    def inputs_of(
        self,
        rgb: Tensor | Sequence[Tensor],
        pcd: Tensor | Sequence[Tensor],
        gripper: Tensor,
        latent: Tensor | None,
        task: Tensor | None = None,
    ) -> Inputs:
        """Return `Inputs` for the plain tensors that `sample` takes."""
        images = list(rgb.unbind(1)) if isinstance(rgb, Tensor) else list(rgb)
        clouds = list(pcd.unbind(1)) if isinstance(pcd, Tensor) else list(pcd)
        cameras = self.config.cameras
        if len(images) != len(cameras) or len(clouds) != len(cameras):
            names = ", ".join(c.name for c in cameras)
            raise ValueError(
                f"rgb: {len(images)} cameras, the policy needs {len(cameras)}: {names}"
            )
        if gripper.shape[1] != self.config.nhist:
            raise ValueError(f"gripper: {gripper.shape[1]} readings, needs {self.config.nhist}")
        points, valid = [], []
        for i, camera in enumerate(cameras):
            size = (camera.work_height, camera.work_width)
            if images[i].shape[-2:] != size:
                images[i] = interpolate(images[i], size, mode="bilinear", antialias=True)
                clouds[i] = interpolate(clouds[i], size, mode="nearest")
            xyz, seen = clean_points(clouds[i])
            points.append(xyz)
            valid.append(seen)
        quat = torch.roll(gripper[..., 3:7], -1, -1)
        opened = gripper[..., 7:8] if gripper.shape[-1] > 7 else torch.ones_like(gripper[..., :1])
        proprio = torch.cat((gripper[..., :3], quat, 0.08 * opened, opened), -1)
        if task is None:
            task = torch.full((len(gripper),), -1, device=gripper.device)
        wide = None if latent is None else latent.unsqueeze(1)
        return Inputs(tuple(images), tuple(points), tuple(valid), proprio, wide, None, None, task)
