"""Which pool runs an evaluation: this process, Ray workers, or the processes of a real-time run."""

from __future__ import annotations

from openhelix.benchmarks.evaluation.oracle import TARGET
from openhelix.benchmarks.evaluation.pool import LocalPool, Pool, on_gpu
from openhelix.benchmarks.evaluation.realtime_pool import RealtimePool
from openhelix.runtime.core.config import Part, RunConfig


def shares_engine(config: RunConfig) -> bool:
    """Whether workers are to share one System 2 instead of loading one each.

    vLLM takes half a minute to start, and a big model fits a GPU once; a small one on CPU is
    quicker beside its worker, where it has a core of its own.
    """
    engine = config.system2.engine
    if engine.target == TARGET:
        return False  # it looks into the world, which is the worker's
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
        return RealtimePool(config, workers)
    if workers == 1:
        return LocalPool(config, threads)
    # Ray takes a second to import and may be left out.
    from openhelix.benchmarks.evaluation.ray_pool import RayPool

    return RayPool(config, workers, threads, shares_engine(config) if shared is None else shared)
