"""A pair of systems in one process: load it, and act with it step by step.

This is the synchronous form, for notebooks and gymnasium loops. The real-time runtime, in which
System 2 never holds up the control loop, is `openhelix run`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openhelix.runtime.control.plans import ChunkBuffer
from openhelix.runtime.core.interfaces import (
    F64,
    CameraFrame,
    Engine,
    LatentGoal,
    Observation,
    Policy,
    check_engine,
    check_latent,
    check_policy,
    encode_one,
    judged,
    proprio_of,
)
from openhelix.runtime.core.paths import CHECKPOINTS
from openhelix.system1.policy import DiffusionPolicy
from openhelix.system2.engines.base import EngineBase
from openhelix.system2.model import SHIPPED, VISION, sha256_file

SYSTEM1, SYSTEM2 = "system1-laptop", "system2-laptop"
BLEND_S = 0.1  # as `system1.blend_s`


def load_pair(
    name: str | Path = "shipped",
    *,
    device: str = "auto",
    engine: str = "transformers",
    **options: Any,
) -> tuple[DiffusionPolicy, EngineBase]:
    """Return System 1 and System 2 that were trained together.

    Args:
        name: "shipped", or a folder that `openhelix train export` wrote.
        device: of both; "auto" is CUDA where there is one, else the CPU.
        engine: "transformers" or "vllm".
        options: of the engine; see `openhelix.system2.engines.base.EngineBase`.

    Raises:
        ValueError: no such pair, or its parts do not belong together; one line says why.

    System 2 is built on the folder's `llava/`, or without one on the shipped tower: a
    `vision.safetensors` beside System 2's latent is not read, and has to be the shipped one.
    """
    import torch

    if not isinstance(name, str | Path):
        raise ValueError(f"name: {name!r}; say 'shipped', or name the folder of a pair")
    folder = CHECKPOINTS if name == "shipped" else Path(name).expanduser()
    if not (folder / SYSTEM1).is_dir():
        raise ValueError(
            f"name: no pair at {str(name)!r}; say 'shipped', or name a folder with {SYSTEM1}/ and "
            f"{SYSTEM2}/, which `openhelix train export` writes"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options.setdefault("latent_projector", folder / SYSTEM2 / "latent.safetensors")
    llava = folder / SYSTEM2 / "llava"
    if llava.is_dir():
        options.setdefault("model", str(llava))
    elif "model" not in options:
        _check_tower(folder / SYSTEM2 / VISION)
    policy = DiffusionPolicy.load(folder / SYSTEM1, device)
    system2: EngineBase
    if engine == "transformers":
        from openhelix.system2.engines.transformers import TransformersEngine

        system2 = TransformersEngine(device=device, **options)
    elif engine == "vllm":
        from openhelix.system2.engines.vllm import VllmEngine

        system2 = VllmEngine(**options)
    else:
        raise ValueError(f"engine: {engine!r} is neither 'transformers' nor 'vllm'")
    if policy.spec.latent is not None:
        check_latent(system2.spec, policy.spec.latent)
    return policy, system2


def _check_tower(file: Path) -> None:
    """Refuse a folder whose tower is another than the one that System 2 would be built on."""
    shipped = SHIPPED / VISION
    if file.is_file() and shipped.is_file() and sha256_file(file) != sha256_file(shipped):
        raise ValueError(
            f"name: {file} is not the shipped tower, and is not read; "
            "name the LLaVA that it belongs to, as model=FOLDER"
        )


class Agent:
    """A pair that follows an instruction, one environment step per call.

    Args:
        policy: System 1.
        system2: System 2, or a `System2Client`; None for a policy that takes no latent.
        replan_steps: steps from one trajectory of System 1 to the next.
        interval_steps: steps from one latent of System 2 to the next.
        camera: which camera System 2 looks through.

    Raises:
        ValueError: the two do not belong together.
    """

    def __init__(
        self,
        policy: Policy,
        system2: Engine | None,
        *,
        replan_steps: int = 4,
        interval_steps: int = 30,
        camera: str = "static",
    ) -> None:
        if replan_steps < 1 or interval_steps < 1:
            raise ValueError("replan_steps, interval_steps: must be at least 1")
        check_policy(policy)
        wanted = policy.spec.latent
        if wanted is not None:
            if system2 is None:
                raise ValueError("system2: this policy needs latents")
            check_engine(system2)
            check_latent(system2.spec, wanted)
        self.policy, self.system2 = policy, system2
        self._replan, self._interval, self._camera = replan_steps, interval_steps, camera
        self._period_ns = round(1e9 / policy.spec.action.hz)
        self._instruction, self._instruction_id, self._step = "", 0, 0
        self._latents: list[LatentGoal] = []
        self._chunks = ChunkBuffer(BLEND_S)

    def reset(self, instruction: str, seed: int = 0) -> None:
        """Begin to follow an instruction; the same seed gives the same actions."""
        self._instruction = instruction
        self._instruction_id += 1
        self._step = 0
        self._latents = []
        self._chunks.void(self._instruction_id)
        self.policy.reset(seed)

    @property
    def refused(self) -> bool:
        """Whether System 2 has said that the instruction names nothing that can be done."""
        return bool(self._latents) and self._latents[-1].refused

    def act(self, obs: Mapping[str, Any]) -> F64:
        """Return the action for an observation of `make_env(actions="absolute")`.

        While System 2 does not understand the instruction (`refused`), the arm stays where it is.

        Returns:
            (8,) float64: the target's position (m) and quaternion xyzw in the world frame, and
            the gripper's openness, 0 to 1.

        Raises:
            RuntimeError: `reset` has not been called, or the policy gave no usable trajectory.
            ValueError: System 2's latent is not finite, or not of its spec.
            TypeError: the policy gave no `ActionChunk`.
        """
        if not self._instruction_id:
            raise RuntimeError("act: call reset(instruction) first")
        now_ns = (self._step + 1) * self._period_ns
        if self._step % self._interval == 0 and self.policy.spec.latent is not None:
            self._latents = [self._ask(obs, now_ns)]
        if self.refused:
            self._chunks.void(self._instruction_id)
            self._step += 1
            return np.array([*obs["tcp_pose"], float(obs["robot_obs"][14] > 0)])
        if self._step % self._replan == 0:
            observation = as_observation(obs, now_ns, self._instruction_id)
            self._chunks.put(self.policy.act(observation, self._latents), now_ns)
        self._step += 1
        target = self._chunks.sample(now_ns + self._period_ns)
        if target is None:
            raise RuntimeError("act: the policy's trajectory does not reach to the next step")
        return np.array([*target.pose, target.gripper])

    def _ask(self, obs: Mapping[str, Any], now_ns: int) -> LatentGoal:
        assert self.system2 is not None
        own = proprio_of(as_observation(obs, now_ns))
        z = encode_one(self.system2, obs[f"rgb_{self._camera}"], self._instruction, own)
        spec_id = self.system2.spec.spec_id
        judgement = judged(self.system2, [self._instruction], z[None])[0]
        return LatentGoal(
            z,
            self._step,
            self._instruction_id,
            now_ns,
            now_ns,
            spec_id,
            understood=judgement.understood,
            refused=judgement.refused,
        )


def as_observation(obs: Mapping[str, Any], t_ns: int, instruction_id: int = 0) -> Observation:
    """Return an observation of `make_env` as the record that policies take.

    Args:
        obs: see `openhelix.CalvinGymEnv`.
        t_ns: its time.
        instruction_id: counts instructions; a policy forgets the past when it changes.
    """
    names = [key.removeprefix("rgb_") for key in obs if key.startswith("rgb_")]
    frames = {
        name: CameraFrame(
            t_ns,
            obs[f"rgb_{name}"],
            obs[f"depth_{name}"],
            obs[f"K_{name}"],
            obs[f"T_world_{name}"],
        )
        for name in names
    }
    robot = obs["robot_obs"]
    return Observation(
        t_ns=t_ns,
        frames=frames,
        tcp_pose=obs["tcp_pose"],
        gripper_width=float(robot[6]),
        gripper_open=float(robot[14]) > 0,
        joints=np.asarray(robot[7:14], np.float64),
        instruction_id=instruction_id,
    )
