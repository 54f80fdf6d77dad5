"""Who runs the episodes: this process (`LocalPool`), or Ray workers (`workers.RayPool`).

Both take jobs and give outcomes back as they finish, in any order. Every episode stands for
itself, so a pool's size changes how long an evaluation takes and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from openhelix.benchmarks.evaluation.measurement import Outcome
from openhelix.benchmarks.evaluation.runner import Conditions, Runner
from openhelix.benchmarks.evaluation.suites import Episode
from openhelix.runtime.core.config import Part, RunConfig
from openhelix.runtime.core.interfaces import Engine, Policy


@dataclass(frozen=True, slots=True)
class Job:
    """One episode and how to run it."""

    episode: Episode
    conditions: Conditions
    film: bool = False


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


def shares_engine(config: RunConfig) -> bool:
    """Whether workers are to share one System 2 instead of loading one each.

    vLLM takes half a minute to start, and a big model fits a GPU once; a small one on CPU is
    quicker beside its worker, where it has a core of its own.
    """
    engine = config.system2.engine
    return "vllm" in engine.target.lower() or on_gpu(engine) or _gpu_present(engine)


def _gpu_present(engine: Part) -> bool:
    import torch

    return str(engine.options.get("device", "auto")) == "auto" and torch.cuda.is_available()


def open_pool(
    config: RunConfig, workers: int, threads: int = 1, shared: bool | None = None
) -> Pool:
    """Return a pool that has not started yet.

    Args:
        config: of the run.
        workers: 1 runs in this process; more are Ray actors.
        threads: of torch, for each worker.
        shared: one System 2 for all workers; None decides by `shares_engine`.

    Raises:
        ConfigError: the wall clock has one robot and cannot be shared out.
    """
    if config.control.clock == "realtime":
        from openhelix.benchmarks.evaluation.realtime_pool import RealtimePool

        return RealtimePool(config, workers)
    if workers == 1:
        return LocalPool(config, threads)
    from openhelix.benchmarks.evaluation.ray_pool import RayPool

    return RayPool(config, workers, threads, shares_engine(config) if shared is None else shared)
