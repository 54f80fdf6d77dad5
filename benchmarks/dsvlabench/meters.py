"""What is measured while an episode runs: System 2's work, the latents' age and their drift."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks.dsvlabench.demand import DemandGoals
from runtime.assembly import Rig
from runtime.interfaces import Engine
from runtime.loop import Tick
from runtime.spec import LatentSpec
from runtime.types import F32


class EngineMeter:
    """An engine that counts its calls and their time.

    Attributes:
        engine: the engine itself; calls to it are not counted.
        calls: so far.
        seconds, cpu_s: by the clock, and of this process's processor time, which others that
            are busy on the machine do not change.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.calls = 0
        self.seconds = 0.0
        self.cpu_s = 0.0

    @property
    def spec(self) -> LatentSpec:
        """What the latents are."""
        return self.engine.spec

    def warm_up(self) -> None:
        self.engine.warm_up()

    def encode(self, images: Sequence[Any], instructions: Sequence[str]) -> F32:
        start_s, cpu_s = time.perf_counter(), time.process_time()
        try:
            return self.engine.encode(images, instructions)
        finally:
            self.seconds += time.perf_counter() - start_s
            self.cpu_s += time.process_time() - cpu_s
            self.calls += 1

    def close(self) -> None:
        self.engine.close()


class Watch:
    """A subscriber that keeps, for each task, System 2's work and the age of the latents in use.

    `latents` are those that the schedule asked for, `encoded` those that were computed because
    a plan was made from them; see `benchmarks.dsvlabench.demand`.
    """

    EMPTY: Mapping[str, Any] = MappingProxyType(
        {"latents": 0, "encoded": 0, "latent_age_steps": None, "plans": 0}
    )

    def __init__(self, rig: Rig, engine: EngineMeter | None) -> None:
        self._engine, self._goals = engine, rig.loop.goals
        self._period_s = rig.loop.period_ns * 1e-9
        self._begin_s = engine.seconds if engine else 0.0
        self._begin_cpu_s = engine.cpu_s if engine else 0.0
        self._begin_calls = engine.calls if engine else 0
        self._tasks: list[dict[str, int]] = []
        self._ages: list[list[int]] = []  # of the latent behind each plan, in steps

    def __call__(self, tick: Tick) -> None:
        while len(self._tasks) < tick.observation.epoch:
            self._tasks.append({"latents": 0, "encoded": 0, "plans": 0})
            self._ages.append([])
        task = self._tasks[-1]
        if isinstance(self._goals, DemandGoals) and self._engine is not None:
            before = self._tasks[:-1]
            calls = self._engine.calls - self._begin_calls
            task["latents"] = self._goals.scheduled - sum(t["latents"] for t in before)
            task["encoded"] = calls - sum(t["encoded"] for t in before)
        if tick.new_chunk is not None:
            task["plans"] += 1
            if tick.latent_age_s is not None:
                self._ages[-1].append(round(tick.latent_age_s / self._period_s))

    @property
    def seconds(self) -> float:
        """What System 2 has computed so far took."""
        return self._engine.seconds - self._begin_s if self._engine else 0.0

    @property
    def cpu_s(self) -> float:
        """The processor time that it took in this process."""
        return self._engine.cpu_s - self._begin_cpu_s if self._engine else 0.0

    def row(self, number: int) -> dict[str, Any]:
        """What to report of a task, by its place in the chain."""
        if number >= len(self._tasks):
            return dict(self.EMPTY)
        ages = self._ages[number]
        age = {"mean": round(float(np.mean(ages)), 3), "max": max(ages)} if ages else None
        return self._tasks[number] | {"latent_age_steps": age}


class Drift:
    """A subscriber that compares the latent behind each plan with a fresh one.

    What the plan *would* have been conditioned on costs one more call of System 2 a plan; the
    run itself goes on unchanged.

    Attributes:
        samples: [age in steps, cosine] of every plan that used a latent older than its image.
    """

    def __init__(self, rig: Rig, engine: Engine, camera: str) -> None:
        self._rig, self._engine, self._camera = rig, engine, camera
        self.samples: list[list[float]] = []

    def __call__(self, tick: Tick) -> None:
        loop, current = self._rig.loop, self._rig.director.current
        if tick.new_chunk is None or loop.goals is None or current is None:
            return
        used = loop.goals.recent[-1]
        if isinstance(loop.goals, DemandGoals):
            used = loop.goals.filled(used)
        age_ns = tick.observation.t_ns - used.t_obs_ns
        if age_ns <= 0:
            return
        frame = tick.observation.frames[self._camera]
        fresh = self._engine.encode([frame.rgb], [current.instruction])[0]
        age = round(age_ns / loop.period_ns)
        self.samples.append([age, round(cosine(used.z, fresh), 6)])


def cosine(a: F32, b: F32) -> float:
    """Return the cosine of two latents (n_tokens, d), taken as one vector each."""
    x, y = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    length = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / length if length > 0 else 0.0
