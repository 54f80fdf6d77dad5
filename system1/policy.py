"""`DiffusionPolicy`: what the runtime calls, around a network of any of our kinds.

It turns an `Observation` into tensors on its device, hands them to the network, and turns
the relative trajectory into absolute world poses. It is the last place where something wrong
can be stopped: frames that break the promised spec are refused, invalid points and unusable
latents are masked and counted, and a result that is not finite is never returned.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openhelix.runtime.core.files import CheckpointError
from openhelix.runtime.core.interfaces import (
    ActionChunk,
    CameraFrame,
    LatentGoal,
    Observation,
    PolicyFault,
    PolicySpec,
    SpecMismatch,
    check_frame,
)
from openhelix.system1.checkpoint import Network, load_policy, seeded_model
from openhelix.system1.config import SHIPPED, CameraConfig, PolicyConfig, small
from openhelix.system1.data import relative_rows
from openhelix.system1.diffusion import ROW, Known
from openhelix.system1.fast_modes import GraphedSampler, to_bf16
from openhelix.system1.geometry import (
    Inputs,
    deproject,
    euler_to_matrix,
    matrix_to_euler,
    matrix_to_intrinsic_xyz,
    matrix_to_quat,
    quat_to_matrix,
    shrink,
    wxyz_to_xyzw,
    xyzw_to_wxyz,
)
from openhelix.system1.model import VisuomotorPolicy, gaussian


@dataclass(slots=True)
class Counters:
    """What went wrong without stopping the policy."""

    invalid_points: int = 0  # pixels without a finite depth, over all calls
    bad_latents: int = 0  # latents that were not finite
    faults: int = 0  # outputs that were not finite
    calls: int = 0


def to_absolute(rows: Tensor, tcp: Tensor, rotation: str) -> tuple[Tensor, Tensor]:
    """Return absolute positions (T, 3) and quaternions (T, 4) xyzw.

    Args:
        rows: (T, 8) relative xyz, quaternion wxyz, openness.
        tcp: (7,) current pose, xyz and quaternion xyzw.
        rotation: "so3": R = R_relative R_now; "euler": CALVIN's angles add, as the published
            checkpoints were trained; their code writes the difference of two angle triples
            as the rotation Rx Ry Rz, although CALVIN's own order is Rz Ry Rx.
    """
    now = quat_to_matrix(xyzw_to_wxyz(tcp[3:7]))
    relative = quat_to_matrix(rows[:, 3:7])
    if rotation == "euler":
        absolute = euler_to_matrix(matrix_to_euler(now) + matrix_to_intrinsic_xyz(relative))
    else:
        absolute = relative @ now
    return rows[:, :3] + tcp[:3], wxyz_to_xyzw(matrix_to_quat(absolute))


class DiffusionPolicy:
    """A System 1 policy; implements `openhelix.runtime.core.interfaces.Policy`.

    Attributes:
        untrained: whether its weights are random, as was asked for.
    """

    def __init__(self, model: Network, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.untrained = False
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.config = model.config
        self._sampler = GraphedSampler(self.model) if self.device.type == "cuda" else self.model
        self._counters = Counters()
        # On the device: reading a sum from a GPU at every call would wait for it.
        self._invalid = torch.zeros((), dtype=torch.int64, device=self.device)
        self._spec = self.config.spec()
        self._published = self.config.head == "diffuser_actor"
        self._generator = torch.Generator()
        self._history: deque[np.ndarray] = deque(maxlen=self.config.nhist)
        self._instruction_id = 0
        self._task = -1
        self.reset(0)

    @staticmethod
    def load(
        path: str | Path = "shipped",
        device: str = "cpu",
        sampler: str | None = None,
        steps: int | None = None,
        bf16: bool = False,
        untrained: bool = False,
    ) -> DiffusionPolicy:
        """Read a checkpoint folder.

        Args:
            path: a folder that `openhelix.system1.checkpoint.save_policy` wrote, or "shipped": the
                one that comes with the project.
            device: "cpu", "cuda" or "cuda:N".
            sampler: "ddpm", "ddim" or "dpmpp" ("euler" for flow matching) instead of the configuration's.
            steps: denoising steps instead of the configuration's.
            bf16: run in bfloat16; see `openhelix.system1.fast_modes`.
            untrained: take the `small` policy with random weights (seed 0) instead.

        Raises:
            CheckpointError: there is no checkpoint there, or it does not fit.
        """
        if path is None:
            raise CheckpointError(
                "system1.policy.options.path: null; name a folder, or say "
                "system1.policy.options.untrained=true for random weights"
            )
        if untrained:
            policy = DiffusionPolicy.build(small(), 0, device)
            policy.untrained = True
        else:
            policy = DiffusionPolicy(load_policy(SHIPPED if path == "shipped" else path), device)
        if sampler is not None or steps is not None:
            policy.model.use_sampler(sampler, steps)
        if bf16:
            to_bf16(policy.model)
        return policy

    @staticmethod
    def build(config: PolicyConfig, seed: int, device: str = "cpu") -> DiffusionPolicy:
        """Return a policy with random weights; the same seed gives the same weights."""
        return DiffusionPolicy(seeded_model(config, seed), device)

    @property
    def counters(self) -> Counters:
        """What went wrong without stopping the policy, so far."""
        self._counters.invalid_points = int(self._invalid)
        return self._counters

    @property
    def eager_reason(self) -> str:
        """Why the chunk does not run as a CUDA graph; "" while it does."""
        if isinstance(self._sampler, GraphedSampler):
            return self._sampler.reason
        return f"the policy is on {self.device.type}, graphs need cuda"

    @property
    def spec(self) -> PolicySpec:
        """What the policy expects and promises."""
        return self._spec

    def set_task(self, task: int) -> None:
        """Name the task for a policy without System 2: a row of its table, -1 for none.

        Raises:
            ValueError: the table has no such row.
        """
        if not -1 <= task < self.config.n_tasks:
            raise ValueError(f"task: {task} is not in -1..{self.config.n_tasks - 1}")
        self._task = task

    def warm_up(self) -> None:
        """Run a few times on made-up input: allocators, kernels and caches are then warm."""
        task, counters, state = self._task, self._counters, self._generator.get_state()
        counters.invalid_points = int(self._invalid)
        self._counters = Counters()
        latents: list[LatentGoal] = []
        if self._spec.latent is not None:
            z = np.zeros((self._spec.latent.n_tokens, self._spec.latent.dim), np.float32)
            latents = [LatentGoal(z, 0, 0, 0, 0, self._spec.latent.spec_id)]
        for given in (latents, latents, []):  # without a latent is another CUDA graph
            self.act(self._made_up(), given)
        self.reset()
        self._task, self._counters = task, counters
        self._invalid.fill_(counters.invalid_points)
        self._generator.set_state(state)

    def reset(self, seed: int | None = None) -> None:
        """Forget the past; with a seed, what follows is deterministic."""
        self._history.clear()
        if seed is not None:
            self._generator.manual_seed(seed)

    def act(self, observation: Observation, latents: Sequence[LatentGoal]) -> ActionChunk:
        """Return a trajectory of `horizon` rows; row i is for `t_ns + (i + 1) * dt`.

        Raises:
            SpecMismatch: a frame or a latent is not what the spec promised.
            PolicyFault: the network's output was not finite.
        """
        return self._plan(observation, latents)

    def go_on(
        self,
        observation: Observation,
        latents: Sequence[LatentGoal],
        plan: ActionChunk,
        given: int,
        join: str,
    ) -> ActionChunk:
        """Return a trajectory that goes on from a plan; see `GoesOn`.

        Sources: "inpaint" is real-time chunking's soft mask (Black et al. 2025, eq. 5), imposed
        on the predicted clean trajectory; "prefix" its form that is learned in training.

        Raises:
            SpecMismatch: this policy cannot be joined so.
            PolicyFault: the network's output was not finite.
        """
        if join not in self._spec.joins or join == "blend":
            raise SpecMismatch(f"join: {join!r}; this policy can {', '.join(self._spec.joins)}")
        tcp = torch.as_tensor(observation.tcp_pose, dtype=torch.float64)
        poses = torch.as_tensor(plan.poses[: self.config.horizon], dtype=torch.float64)
        count, rows = len(poses), self.config.horizon
        relative = torch.zeros(rows, ROW)
        relative[:count] = relative_rows(poses[None], tcp[None], self.config.rotation)[0].float()
        clean = self.model.normalizer.normalize(relative.to(self.device))[None]
        at = torch.arange(rows, device=self.device)
        if join == "prefix":
            given = min(given, self.config.given_rows)
            weight, first = (at < given).float(), torch.tensor([given], device=self.device)
            known = Known(clean, weight[None], first)
        else:
            left = ((count - at) / max(1, count - given + 1)).clamp(0.0, 1.0)
            soft = left * torch.expm1(left) / math.expm1(1.0)
            known = Known(clean, torch.where(at < given, 1.0, soft)[None])
        chunk = self._plan(observation, latents, known)
        chunk.gripper[:given] = plan.gripper[:given]
        return chunk

    def _plan(
        self, observation: Observation, latents: Sequence[LatentGoal], known: Known | None = None
    ) -> ActionChunk:
        if observation.instruction_id != self._instruction_id:
            self._history.clear()
            self._instruction_id = observation.instruction_id
        usable = self._usable(latents, observation.instruction_id)
        inputs = self.prepare(observation, usable)
        noise = gaussian(self._generator)
        if known is None:
            sampled = self._sampler.sample_inputs(inputs, noise)
        else:
            assert isinstance(self.model, VisuomotorPolicy)  # others' specs know no such join
            sampled = self.model.sample_inputs(inputs, noise, known)
        rows = sampled[0].cpu().double()
        self._counters.calls += 1
        tcp = torch.as_tensor(observation.tcp_pose, dtype=torch.float64)
        position, quat = to_absolute(rows, tcp, self.config.rotation)
        poses = torch.cat((position, quat), -1).numpy()
        gripper = rows[:, 7].numpy()
        if not (np.isfinite(poses).all() and np.isfinite(gripper).all()):
            self._counters.faults += 1
            raise PolicyFault("the policy's output is not finite: the chunk was discarded")
        dt_ns = self.config.dt_ns
        return ActionChunk(
            t_start_ns=observation.t_ns + dt_ns,
            dt_ns=dt_ns,
            poses=poses,
            gripper=gripper,
            instruction_id=observation.instruction_id,
            latent_seq=usable[-1].seq if usable else -1,
            t_obs_ns=observation.t_ns,
        )

    def prepare(self, observation: Observation, latents: Sequence[LatentGoal]) -> Inputs:
        """Return the network's inputs on the policy's device, remembering the reading."""
        reading = np.concatenate(
            (observation.tcp_pose, [observation.gripper_width, float(observation.gripper_open)])
        )
        if not np.isfinite(reading).all():
            raise SpecMismatch("tcp_pose: the robot reports a pose that is not finite")
        self._history.append(reading)
        past = list(self._history)
        past = [past[0]] * (self.config.nhist - len(past)) + past
        proprio = torch.as_tensor(np.stack(past)[None], dtype=torch.float32)
        images = [self._camera(observation, camera) for camera in self.config.cameras]
        rgb, xyz, valid = zip(*images, strict=True)
        latent, age, mask = self._latents(observation, latents)
        return Inputs(
            rgb=rgb,
            xyz=xyz,
            valid=valid,
            proprio=proprio.to(self.device),
            latent=latent,
            latent_age_s=age,
            latent_mask=mask,
            task=torch.tensor([self._task], device=self.device),
        )

    def _camera(self, observation: Observation, camera: CameraConfig) -> tuple[Tensor, ...]:
        frame = observation.frames.get(camera.name)
        if frame is None:
            have = ", ".join(sorted(observation.frames)) or "none"
            raise SpecMismatch(f"camera {camera.name!r}: the observation has {have}")
        want = next(c for c in self._spec.cameras if c.name == camera.name)
        check_frame(frame, want)
        # Copies: what came over the wire is read-only, which torch cannot express.
        rgb = torch.tensor(frame.rgb, device=self.device)
        depth = torch.tensor(frame.depth, device=self.device)
        k = torch.as_tensor(frame.K, dtype=torch.float32).to(self.device)
        t_world_cam = torch.as_tensor(frame.T_world_cam, dtype=torch.float32).to(self.device)
        image = rgb.permute(2, 0, 1)[None].float() / 255
        if self._published:
            # The published code works on the full image and puts rays on pixel corners.
            xyz, valid = deproject(depth[None], k[None], t_world_cam[None], center=0.0)
            self._invalid += (~valid).sum()
            return image, xyz, valid
        image, depth, k = shrink(image, depth[None], k[None], camera.work_height, camera.work_width)
        xyz, valid = deproject(depth, k, t_world_cam[None])
        self._invalid += (~valid).sum()
        return image, xyz, valid

    def _usable(self, latents: Sequence[LatentGoal], instruction_id: int) -> list[LatentGoal]:
        if self._spec.latent is None:
            return []
        usable = []
        for latent in latents:
            want = (self._spec.latent.n_tokens, self._spec.latent.dim)
            if latent.z.shape != want:
                raise SpecMismatch(f"latent.z: shape {latent.z.shape}, the policy needs {want}")
            if not np.isfinite(latent.z).all():
                self._counters.bad_latents += 1
            elif latent.instruction_id == instruction_id:
                usable.append(latent)
        return usable[-self.config.latent_memory :]

    def _latents(
        self, observation: Observation, latents: Sequence[LatentGoal]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not latents:
            return None, None, None
        memory = self.config.latent_memory
        z = np.zeros((1, memory, *latents[0].z.shape), np.float32)
        age = np.zeros((1, memory), np.float32)
        mask = np.zeros((1, memory), bool)
        for slot, latent in zip(range(memory - len(latents), memory), latents, strict=True):
            z[0, slot] = latent.z
            age[0, slot] = max(0.0, latent.age_s(observation.t_ns))
            mask[0, slot] = True
        tensors = (torch.from_numpy(a).to(self.device) for a in (z, age, mask))
        first, second, third = tensors
        return first, second, third

    def _made_up(self) -> Observation:
        frames = {
            c.name: CameraFrame(
                0,
                np.zeros((c.height, c.width, 3), np.uint8),
                np.ones((c.height, c.width), np.float32),
                np.array([[c.width, 0, c.width / 2], [0, c.width, c.height / 2], [0, 0, 1.0]]),
                np.eye(4),
            )
            for c in self.config.cameras
        }
        pose = np.array([0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0])
        return Observation(0, frames, pose, 0.08, True, np.zeros(7), self._instruction_id)
