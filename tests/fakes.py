"""Small stand-ins for System 1 and System 2, honest about the same contracts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from openhelix.runtime.core.interfaces import (
    ActionChunk,
    ActionSpec,
    CameraSpec,
    Judgement,
    LatentGoal,
    LatentSpec,
    Observation,
    PolicySpec,
)
from openhelix.runtime.robots.fake import LATENT, PointEngine

PERIOD_NS = round(1e9 / 30)


class ReachPolicy:
    """Moves in a straight line to the point in the first three numbers of the newest latent."""

    def __init__(
        self,
        horizon: int = 16,
        speed_m: float = 0.01,
        cameras: Sequence[CameraSpec | Sequence[Any]] = (),
        fail_at: int | None = None,
    ) -> None:
        specs = (c if isinstance(c, CameraSpec) else CameraSpec(*c) for c in cameras)
        self.spec = PolicySpec(tuple(specs), LATENT, ActionSpec(), horizon)
        self.speed_m, self.fail_at = speed_m, fail_at
        self.calls = 0
        self.seeds: list[int | None] = []

    def warm_up(self) -> None: ...

    def reset(self, seed: int | None = None) -> None:
        self.seeds.append(seed)

    def act(self, observation: Observation, latents: Sequence[LatentGoal]) -> ActionChunk:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("the policy fails as configured")
        goal = np.asarray(latents[-1].z[0, :3], np.float64)
        here = observation.tcp_pose[:3]
        way = goal - here
        length = float(np.linalg.norm(way))
        steps = np.minimum(np.arange(1, self.spec.horizon + 1) * self.speed_m, length)
        positions = here + np.outer(steps, way / max(length, 1e-9))
        return ActionChunk(
            t_start_ns=observation.t_ns + PERIOD_NS,
            dt_ns=PERIOD_NS,
            poses=np.hstack((positions, np.tile(observation.tcp_pose[3:], (len(steps), 1)))),
            gripper=np.ones(len(steps)),
            instruction_id=observation.instruction_id,
            latent_seq=latents[-1].seq,
            t_obs_ns=observation.t_ns,
        )


class DoubtingEngine(PointEngine):
    """A `PointEngine` that does not understand places above `ceiling_m`, however often it is asked.

    Attributes:
        ceiling_m: may be changed, as a System 2 may get other weights.
    """

    def __init__(self, ceiling_m: float = 0.7, spec: LatentSpec = LATENT) -> None:
        super().__init__(spec)
        self.ceiling_m = ceiling_m

    def judge(self, instructions: Sequence[str], latents: Any) -> list[Judgement]:
        high = [float(text.split()[-1]) > self.ceiling_m for text in instructions]
        return [Judgement(0.02, refused=True) if up else Judgement(0.97) for up in high]
