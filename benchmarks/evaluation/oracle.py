"""What System 2 is shown, and in its place: who knows. The bounds of what looking can bring.

`--sees image` shows System 2 what the camera sees; `black` a black picture, `none` none at all,
`shuffled` one of other states: then the sentence alone decides. `oracle` is the upper bound:
`OracleEngine` tells a policy the task that is right, read from the world itself, as a latent: the one
that the policy's door turns into that task's row of its table. It is asked when System 2 would
be, so it knows no more of what has changed since than a System 2 at that interval that is
never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.benchmarks.evaluation.measurement import DemandGoals
from openhelix.runtime.control.trigger import Trigger
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.interfaces import F32, Engine, LatentGoal, LatentSpec, Observation
from openhelix.runtime.core.paths import cache_folder
from openhelix.system2.model import build_once

TARGET = f"{__name__}:OracleEngine"
FILE = "pictures.npy"
SEES = ("image", "black", "none", "shuffled", "oracle")
OTHERS, OTHERS_FORMAT = 24, 1  # pictures a scene; raise the other when they come out different


def other_pictures(scenes: Sequence[str]) -> Path:
    """Return a file of pictures of random states of the scenes (N, H, W, 3), drawn the first time."""
    name = f"others-{OTHERS_FORMAT}-{'-'.join(scenes)}-{OTHERS}"
    return build_once(cache_folder() / "evaluation" / name, lambda out: _draw(out, scenes)) / FILE


def _draw(out: Path, scenes: Sequence[str]) -> None:
    from openhelix.benchmarks.calvin.cameras import SceneRenderer
    from openhelix.benchmarks.calvin.captions import StateMaker

    found = []
    for scene in scenes:
        maker = StateMaker(scene, np.random.default_rng(0))
        renderer = SceneRenderer(scene, ("static",))
        try:
            found += [renderer.render(maker.draw()[0])["static"].rgb for _ in range(OTHERS)]
        finally:
            maker.close()
    np.save(out / FILE, np.stack(found))


class OracleEngine:
    """An engine whose latents name a task; see `openhelix.runtime.core.interfaces.Engine`.

    Attributes:
        task: returns the task that is right now; set for each episode.
    """

    def __init__(self) -> None:
        self.task: Callable[[], str] = lambda: ""
        self._spec: LatentSpec | None = None
        self._anchors: F32 = np.zeros((0, 1, 1), np.float32)

    def bind(self, policy: Any) -> None:
        """Speak to this policy.

        Raises:
            ConfigError: it takes no latent, or has no table of tasks.
        """
        from openhelix.system1.latent_adapter import task_anchors

        spec = policy.spec.latent
        anchors = task_anchors(policy.model) if hasattr(policy, "model") else None
        if spec is None or anchors is None:
            raise ConfigError("--sees: oracle: this policy has no table of tasks behind its latent")
        self._spec, self._anchors = spec, anchors.numpy()

    @property
    def spec(self) -> LatentSpec:
        """The policy's own."""
        if self._spec is None:
            raise ConfigError(
                "--sees: oracle belongs to the lockstep clock, where it sees the world"
            )
        return self._spec

    def warm_up(self) -> None:
        """Nothing to warm up."""

    def encode(self, images: Sequence[Any], instructions: Sequence[str]) -> F32:
        """Return the latent of the task that is right now, for each; no image is looked at."""
        return np.stack([self.latent(self.task())] * len(images))

    def latent(self, task: str) -> F32:
        """Return a task's latent (n_tokens, dim)."""
        found: F32 = self._anchors[TASK_NAMES.index(task)]
        return found

    def close(self) -> None:
        """Nothing to let go of."""


class ToldGoals(DemandGoals):
    """`DemandGoals` of a `OracleEngine`: what is right is read when the latent is scheduled.

    Args:
        teller: the oracle.
        engine, camera, interval, latency, memory, trigger: see `LockstepGoals`.
    """

    def __init__(
        self,
        teller: OracleEngine,
        engine: Engine,
        camera: str,
        interval: int,
        latency: int,
        memory: int = 1,
        trigger: Trigger | None = None,
    ) -> None:
        super().__init__(engine, camera, interval, latency, memory, trigger=trigger)
        self._teller = teller

    def _compute(self, observation: Observation) -> LatentGoal:
        task = self._teller.task()
        latent = super()._compute(observation)
        self._ask[latent.seq] = lambda: self._teller.latent(task)
        return latent
