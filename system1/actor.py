"""`DiffuserActor`: the network of published 3D Diffuser Actor and OpenHelix checkpoints.

Its `sample` reproduces the published inference: points and gripper relative to the newest
gripper position, the workspace box to [-1, 1], DDPM with the published schedules, positions
in metres and rotations as quaternions at the end. Relative rotations of these checkpoints
are differences of Euler angles; `system1.policy.to_absolute` undoes that. Weights whose training
read quaternions in another order than they were written in (`PolicyConfig.quaternion`) know
rotations by the matrix of the misread quaternion; `sample` and `loss` speak of true ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from openhelix.system1.config import PolicyConfig, official_calvin
from openhelix.system1.denoiser import DiffuserActorHead
from openhelix.system1.diffusion import Noise, Normalizer, draw_noise, run_table
from openhelix.system1.encoder import OfficialEncoder, OfficialScene
from openhelix.system1.encoder_light import KeyposeTargets
from openhelix.system1.geometry import (
    Inputs,
    clean_points,
    matrix_from_6d,
    matrix_to_6d,
    matrix_to_quat,
    quat_to_matrix,
)
from openhelix.system1.losses import LossParts, diffusion_loss, real_rows
from openhelix.system1.model import DiffusionNetwork, gaussian, rows_to_poses

FULL = 200  # pixels of a CALVIN image before the crop
CROP = slice(20, 180)


class DiffuserActor(DiffusionNetwork):
    """Images, points, gripper history and latent to a trajectory relative to the gripper."""

    def __init__(
        self, config: PolicyConfig | None = None, normalizer: Normalizer | None = None
    ) -> None:
        config = config or official_calvin()
        super().__init__(config, normalizer or Normalizer.official())
        self.encoder = OfficialEncoder(
            config.dim, config.heads, config.nhist, config.latent_dim, config.horizon
        )
        self.prediction_head = DiffuserActorHead(config)

    def encode(
        self, rgb: Tensor, pcd: Tensor, gripper: Tensor, latent: Tensor, mask: bool = False
    ) -> OfficialScene:
        """Encode observations; see `sample` for the arguments.

        Args:
            rgb: colour.
            pcd: points.
            gripper: history.
            latent: language.
            mask: whether some points may be invalid and must be kept out of attention.
        """
        if rgb.shape[-2:] == (FULL, FULL):
            rgb, pcd = rgb[..., CROP, CROP], pcd[..., CROP, CROP]
        center, half = self.offset[0, :3], self.scale[0, :3]
        home = gripper[:, -1, :3]
        valid = None
        if mask:
            pcd, valid = clean_points(pcd)
        points = (pcd - (home[:, None] + center)[..., None, None]) / half[:, None, None]
        hands = (gripper[..., :3] - home[:, None] - center) / half
        return self.encoder(rgb, points, hands, latent, valid)

    def denoise(
        self, scene: OfficialScene, first: Tensor, drawn: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the sampler from the state `first`; see `openhelix.system1.diffusion.run_table`."""
        table = self.sampler
        return run_table(table, self.prediction_head.prepare(scene, table.times), first, drawn)

    def denoise_inputs(
        self, inputs: Inputs, first: Tensor, drawn: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Encode, then run the sampler from `first`; everything a CUDA graph captures."""
        return self.denoise(self.encode(*self.tensors_of(inputs), mask=True), first, drawn)

    @torch.inference_mode()
    def sample(
        self,
        rgb: Tensor,
        pcd: Tensor,
        gripper: Tensor,
        latent: Tensor,
        noise: Noise | None = None,
    ) -> Tensor:
        """Sample trajectories.

        Args:
            rgb: (B, ncam, 3, H, W) in [0, 1]; 200 x 200 is cropped to 20:180, other sizes
                are taken as already cropped.
            pcd: (B, ncam, 3, H, W) world points in metres; a point that is not finite is
                masked out.
            gripper: (B, nhist, 7 or 8): xyz, quaternion wxyz, openness; newest last. Only
                the positions are read, as in the published code.
            latent: (B, n, 512).
            noise: source of every Gaussian draw; see `openhelix.system1.diffusion.draw_noise`.

        Returns:
            (B, T, 8): xyz in metres and quaternion wxyz, relative to the newest gripper
            reading, and openness in [0, 1].

        Raises:
            ValueError: a shape does not fit the configuration.
        """
        self.check(rgb, pcd, gripper, latent)
        source = noise or gaussian(None)
        first, drawn = draw_noise(self.sampler, len(rgb), self.config.horizon, source)
        # On a GPU the masked path always runs: looking would wait for the device.
        mask = pcd.device.type != "cpu" or not bool(torch.isfinite(pcd).all())
        rows, logits = self.denoise(self.encode(rgb, pcd, gripper, latent, mask), first, drawn)
        poses = rows_to_poses(self.normalizer.denormalize(rows.float()), logits.float())
        if self.config.quaternion == "xyzw":
            poses[..., 3:7] = poses[..., (4, 5, 6, 3)]
        return poses

    def check(self, rgb: Tensor, pcd: Tensor, gripper: Tensor, latent: Tensor) -> None:
        """Raise `ValueError`, naming the argument, unless all shapes fit."""
        c = self.config
        if rgb.ndim != 5 or rgb.shape[1:3] != (len(c.cameras), 3) or rgb.shape != pcd.shape:
            raise ValueError(
                f"rgb, pcd: shapes {tuple(rgb.shape)} and {tuple(pcd.shape)}, "
                f"both must be (B, {len(c.cameras)}, 3, H, W)"
            )
        if min(rgb.shape[-2:]) < 32 or rgb.shape[-1] % 8 or rgb.shape[-2] % 8:
            raise ValueError(f"rgb: {tuple(rgb.shape[-2:])} pixels, need multiples of 8 above 31")
        if gripper.shape[:2] != (len(rgb), c.nhist) or gripper.shape[-1] not in (7, 8):
            raise ValueError(
                f"gripper: shape {tuple(gripper.shape)}, must be (B, {c.nhist}, 7 or 8)"
            )
        if latent.ndim != 3 or latent.shape[-1] != c.latent_dim or len(latent) != len(rgb):
            raise ValueError(f"latent: shape {tuple(latent.shape)}, must be (B, n, {c.latent_dim})")

    def sample_inputs(self, inputs: Inputs, noise: Noise | None = None) -> Tensor:
        """Return trajectories (B, T, 8) for the runtime's inputs; see `sample`."""
        return self.sample(*self.tensors_of(inputs), noise)

    def tensors_of(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return `sample`'s tensors for the runtime's inputs.

        Images are brought to 200 x 200 as the published code does for the gripper camera:
        colour bilinear, points nearest; then the crop.
        """
        rgb, pcd = [], []
        for image, xyz, valid in zip(inputs.rgb, inputs.xyz, inputs.valid, strict=True):
            cloud = torch.where(valid.unsqueeze(1), xyz, torch.nan)
            if image.shape[-2:] != (FULL, FULL):
                image = interpolate(image, (FULL, FULL), mode="bilinear", align_corners=False)
                cloud = interpolate(cloud, (FULL, FULL), mode="nearest")
            rgb.append(image[..., CROP, CROP])
            pcd.append(cloud[..., CROP, CROP])
        latent = inputs.latent
        if latent is None:
            shape = (inputs.batch, self.config.latent_tokens, self.config.latent_dim)
            latent = torch.zeros(shape, device=self.offset.device)
        else:
            latent = latent[:, -1]
        return torch.stack(rgb, 1), torch.stack(pcd, 1), inputs.proprio[..., :7], latent

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
        """Return the training loss of one batch; see `openhelix.system1.model.VisuomotorPolicy.loss`.

        The published network says nothing of keyposes; they are not looked at.
        """
        tensors = self.tensors_of(inputs)
        self.check(*tensors)
        scene = self.encode(*tensors, mask=not bool(torch.isfinite(tensors[1]).all()))
        if self.config.quaternion == "xyzw":
            turned = matrix_to_quat(matrix_from_6d(rows[..., 3:9]))[..., (3, 0, 1, 2)]
            rows = torch.cat((rows[..., :3], matrix_to_6d(quat_to_matrix(turned))), -1)
        return diffusion_loss(
            lambda x, t, given: self.prediction_head(x, t, scene),
            self.normalizer.normalize(rows),
            openness,
            mask,
            self.levels,
            self.config.prediction,
            draws,
            generator,
        )

    def real_rows(self, mask: Tensor, draws: int, generator: torch.Generator | None) -> float:
        """Return how many rows `loss` will count, for a mask (B, T) of a whole batch."""
        return real_rows(mask, draws, generator)
