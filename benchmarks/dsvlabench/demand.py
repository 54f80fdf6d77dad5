"""System 2 on a schedule, computing only those latents that a plan is made from.

A policy that plans every eighth step reads one in eight of the latents of a System 2 that
refreshes every step. The others change nothing, so they are scheduled and counted but never
computed: the same results, at an eighth of the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from runtime.goals import LockstepGoals
from runtime.interfaces import Engine, Policy
from runtime.spec import PolicySpec
from runtime.types import F32, ActionChunk, LatentGoal, Observation

NOT_YET: F32 = np.zeros((0, 0), np.float32)


class DemandGoals(LockstepGoals):
    """`LockstepGoals` whose latents have no content until `filled` is asked for them.

    Args:
        engine, camera, interval, latency, memory: see `LockstepGoals`.
        draw_now: look at the image when the latent is scheduled, for worlds that cannot show
            an instant later.

    Attributes:
        scheduled: latents so far, computed or not.
    """

    def __init__(
        self,
        engine: Engine,
        camera: str,
        interval: int,
        latency: int,
        memory: int = 1,
        draw_now: bool = False,
    ) -> None:
        super().__init__(engine, camera, interval, latency, memory)
        self._draw_now = draw_now
        self._ask: dict[int, Callable[[], F32]] = {}  # by seq, of this instruction
        self._z: dict[int, F32] = {}

    @property
    def scheduled(self) -> int:
        """Latents so far, computed or not."""
        return self._seq

    def begin(self, epoch: int, instruction: str) -> None:
        super().begin(epoch, instruction)
        self._ask.clear()
        self._z.clear()

    def filled(self, latent: LatentGoal) -> LatentGoal:
        """Return the latent with its content."""
        if latent.seq not in self._z:
            self._z[latent.seq] = self._ask.pop(latent.seq)()
        return replace(latent, z=self._z[latent.seq])

    def _compute(self, observation: Observation) -> LatentGoal:
        frames, text, engine = observation.frames, self.instruction, self._engine
        if self._draw_now:
            frames = {self._camera: frames[self._camera]}
        seq = self._seq
        self._ask[seq] = lambda: engine.encode([frames[self._camera].rgb], [text])[0]
        self._forget()
        self._seq += 1
        return LatentGoal(
            z=NOT_YET,
            seq=seq,
            epoch=self.epoch,
            t_obs_ns=observation.t_ns,
            t_pub_ns=observation.t_ns,
            spec_id=self._spec_id,
            source="lockstep",
        )

    def _forget(self) -> None:
        """Drop what was replaced before anybody asked."""
        live = {latent.seq for latent in self.recent} | {goal.seq for _, goal in self._on_the_way}
        for kept in (self._ask, self._z):
            for seq in [seq for seq in kept if seq not in live and seq < self._seq]:
                del kept[seq]


class DemandPolicy:
    """A policy whose latents are filled when it plans.

    Args:
        policy: the policy.
        goals: what its latents come from.
    """

    def __init__(self, policy: Policy, goals: DemandGoals) -> None:
        self._policy, self._goals = policy, goals

    @property
    def spec(self) -> PolicySpec:
        return self._policy.spec

    def warm_up(self) -> None:
        self._policy.warm_up()

    def reset(self, seed: int | None = None) -> None:
        self._policy.reset(seed)

    def act(self, observation: Observation, latents: Sequence[LatentGoal]) -> ActionChunk:
        return self._policy.act(observation, [self._goals.filled(goal) for goal in latents])
