"""Pools that run episodes: their interface, and the pool that is this process alone.

A pool takes jobs and gives outcomes back as they finish, in any order. Every episode stands
for itself, so a pool's size changes how long an evaluation takes and nothing else. The others
are `ray_pool.RayPool` and `realtime_pool.RealtimePool`; `evaluation.open_pool` chooses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from openhelix.benchmarks.evaluation.measurement import Outcome
from openhelix.benchmarks.evaluation.runner import Conditions, Film, Runner
from openhelix.benchmarks.evaluation.suites import Episode
from openhelix.runtime.core.config import Part, RunConfig
from openhelix.runtime.core.interfaces import Engine, Policy


@dataclass(frozen=True, slots=True)
class Job:
    """One episode and how to run it."""

    episode: Episode
    conditions: Conditions
    film: Film = "no"


class Pool(Protocol):
    """Runs jobs."""

    workers: int

    def start(self) -> dict[str, Any]:
        """Load everything; return what `Runner.about` says.

        Raises:
            ValueError: something is refused; the message is one line.
        """

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Run jobs; yields each as it finishes."""

    def close(self) -> None:
        """Release everything; safe to call twice."""


class LocalPool:
    """Runs jobs in this process, one after the other.

    Args:
        config: of the run.
        threads: of torch.
        policy, engine: loaded already; None loads the configured one. They stay their owner's.
    """

    workers = 1

    def __init__(
        self,
        config: RunConfig,
        threads: int = 1,
        policy: Policy | None = None,
        engine: Engine | None = None,
    ) -> None:
        self._config, self._threads = config, threads
        self._policy, self._engine = policy, engine
        self._runner: Runner | None = None

    def start(self) -> dict[str, Any]:
        if self._runner is None:
            self._runner = Runner(self._config, self._engine, self._threads, self._policy)
        return self._runner.about()

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Outcome]]:
        self.start()
        assert self._runner is not None
        for job in jobs:
            yield job, self._runner.run(job.episode, job.conditions, job.film)

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()
            self._runner = None


def on_gpu(part: Part) -> bool:
    """Whether a part asks for CUDA."""
    return str(part.options.get("device", "")).startswith("cuda")
