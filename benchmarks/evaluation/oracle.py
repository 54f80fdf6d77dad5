"""What System 2 is shown, and in its place: who knows. The bounds of what looking can bring.

`--sees image` shows System 2 what the camera sees; `black` a black picture, `none` none at all,
`shuffled` one of other states: then the sentence alone decides. `oracle` is the upper bound:
System 2 is told, in CALVIN's own plain words, which task is right, read from the world itself. It is asked when it
would be anyway, so it knows no more of what has changed since than a System 2 at that interval that
is never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin.tasks import get_task
from openhelix.benchmarks.evaluation.measurement import DemandGoals
from openhelix.runtime.control.assembly import make
from openhelix.runtime.core.config import EnginePart
from openhelix.runtime.core.interfaces import F32, LatentGoal, LatentSpec, Observation
from openhelix.runtime.core.paths import cache_folder

TARGET = f"{__name__}:OracleEngine"
FILE = "pictures.npy"
SEES = ("image", "black", "none", "shuffled", "oracle")
OTHERS, OTHERS_FORMAT = 24, 1  # pictures a scene; raise the other when they come out different


def other_pictures(scenes: Sequence[str]) -> Path:
    """Return a file of pictures of random states of the scenes (N, H, W, 3), drawn the first time."""
    name = f"others-{OTHERS_FORMAT}-{'-'.join(scenes)}-{OTHERS}"
    from openhelix.system2.model import build_once  # torch, which a refusal is not to wait for

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
    """System 2 as it is, beside somebody who knows which task is right; see `ToldGoals`.

    Args:
        engine: the target and options of System 2's own.

    Attributes:
        task: returns the task that is right now; set for each episode.
    """

    def __init__(self, engine: Mapping[str, Any]) -> None:
        self.task: Callable[[], str] = lambda: ""
        self._engine = make(EnginePart(**engine))

    @property
    def spec(self) -> LatentSpec:
        """System 2's own."""
        spec: LatentSpec = self._engine.spec
        return spec

    def warm_up(self) -> None:
        self._engine.warm_up()

    def encode(self, images: Sequence[Any], instructions: Sequence[str], *proprio: Any) -> F32:
        """Return the latents of what is said."""
        found: F32 = self._engine.encode(images, instructions, *proprio)
        return found

    def close(self) -> None:
        self._engine.close()

    def __getattr__(self, name: str) -> Any:
        """What else it can do: judge, be untrained."""
        return getattr(self.__dict__["_engine"], name)


class ToldGoals(DemandGoals):
    """`DemandGoals` of an `OracleEngine`: what is right is read when a latent is scheduled.

    Args:
        teller: the oracle.
        args, options: of `DemandGoals`.
    """

    def __init__(self, teller: OracleEngine, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._teller = teller

    def _compute(self, observation: Observation) -> LatentGoal:
        said, self.instruction = self.instruction, get_task(self._teller.task()).sentence
        try:
            return super()._compute(observation)
        finally:
            self.instruction = said
