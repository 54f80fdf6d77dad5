"""Episodes on Ray workers, each with its own System 1, world and (or) System 2.

A shared System 2 answers one request at a time, as a batch of one: batching across workers
would let a latent depend on what others happen to ask for. A worker that dies takes its
episode with it; the episode is tried once more on a new worker and then counts as failed. A
System 2 that dies is started again.

Nothing here waits for ever: a process that neither answers nor dies (it swaps, or Ray has lost a
message) is killed after a timeout and then treated as dead.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import ray

from openhelix.benchmarks.evaluation.measurement import Attempt, Outcome
from openhelix.benchmarks.evaluation.pool import Job, on_gpu
from openhelix.benchmarks.evaluation.runner import Runner
from openhelix.runtime.control.assembly import make
from openhelix.runtime.core.config import CommandFailed, ConfigError, RunConfig
from openhelix.runtime.core.interfaces import F32, Engine, Judgement, LatentSpec, judged
from openhelix.runtime.launch.actors import join
from openhelix.runtime.launch.graph import cluster_address, probe_cluster

log = logging.getLogger(__name__)
TRIES = 2
STARTS = 3
START_TIMEOUT_S = 900.0  # a big System 2 takes minutes to load
ANSWER_TIMEOUT_S = 300.0  # of a System 2 that is loaded, others' requests before this one included
EPISODE_TIMEOUT_S = 3600.0
LOOK_EVERY_S = 10.0


class EngineActor:
    """One System 2 for all workers."""

    def __init__(self, config_json: str) -> None:
        self._config = RunConfig.model_validate_json(config_json)
        self._engine: Engine | None = None

    def start(self) -> dict[str, Any]:
        """Load; return the spec, or why it is refused."""
        if self._engine is None:
            try:
                self._engine = make(self._config.system2.engine)
            except ValueError as error:
                return {"refused": _line(error)}
        latents = bool(getattr(self._engine, "judges_latents", False))
        return {"spec": self._engine.spec, "judges_latents": latents}

    def encode(self, image: np.ndarray, instruction: str, *proprio: Any) -> F32:
        """Return the latent of one image and instruction; loads after a restart."""
        return self._loaded().encode([image], [instruction], *([own] for own in proprio))

    def judge(self, instructions: list[str], latents: F32 | None) -> list[Judgement]:
        """Return what System 2 understands; loads after a restart."""
        return judged(self._loaded(), instructions, latents)

    def _loaded(self) -> Engine:
        answer = self.start()
        if self._engine is None:
            raise RuntimeError(answer["refused"])
        return self._engine


class RemoteEngine:
    """A worker's side of a shared System 2.

    Args:
        actor: handle of the `EngineActor`.
        spec: what it promises.
        timeout_s: it is started anew, once a request, when it has not answered by then.
    """

    def __init__(self, actor: Any, spec: LatentSpec, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self._actor, self.spec, self._timeout_s = actor, spec, timeout_s
        self._judged: dict[str, Judgement] = {}
        self._by_latents: bool | None = None

    @property
    def judges_latents(self) -> bool:
        """Whether it judges an instruction by its latent."""
        if self._by_latents is None:
            self._by_latents = bool(self._ask("start").get("judges_latents"))
        return self._by_latents

    def warm_up(self) -> None: ...

    def encode(self, images: Sequence[Any], instructions: Sequence[str], *proprio: Any) -> F32:
        rows = [
            self._ask("encode", np.asarray(image), text, *own)
            for image, text, *own in zip(images, instructions, *proprio, strict=True)
        ]
        return cast(F32, np.concatenate(rows))

    def judge(self, instructions: Sequence[str], latents: F32 | None) -> list[Judgement]:
        if self.judges_latents:
            return cast(list[Judgement], self._ask("judge", list(instructions), latents))
        new = [text for text in instructions if text not in self._judged]
        if new:
            self._judged |= zip(new, self._ask("judge", new, None), strict=True)
        return [self._judged[text] for text in instructions]

    def _ask(self, verb: str, *given: Any) -> Any:
        limit_s = self._timeout_s
        for _ in range(TRIES):
            try:
                request = getattr(self._actor, verb).remote(*given)
                return ray.get(request, timeout=limit_s)
            except ray.exceptions.GetTimeoutError:
                ray.kill(self._actor, no_restart=False)
                limit_s = self._timeout_s + START_TIMEOUT_S  # it loads first
        raise TimeoutError(f"System 2 did not answer within {self._timeout_s:g} s")

    def close(self) -> None:
        """The pool owns the engine."""


class EpisodeWorker:
    """One `Runner` in a process of its own."""

    def __init__(
        self,
        config_json: str,
        threads: int,
        engine: Any = None,
        spec: LatentSpec | None = None,
        answer_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        self._config = RunConfig.model_validate_json(config_json)
        self._threads = threads
        self._engine = None if spec is None else RemoteEngine(engine, spec, answer_s)
        self._runner: Runner | None = None

    def start(self) -> dict[str, Any]:
        """Load; return what is evaluated, or why it is refused."""
        if self._runner is None:
            try:
                self._runner = Runner(self._config, self._engine, self._threads)
            except ValueError as error:
                return {"refused": _line(error)}
        return self._runner.about()

    def run(self, job: Job) -> Outcome:
        """Run one episode."""
        about = self.start()
        if self._runner is None:
            raise RuntimeError(about["refused"])
        return self._runner.run(job.episode, job.conditions, job.film)

    def close(self) -> None:
        """Release worlds and System 2."""
        if self._runner is not None:
            self._runner.close()


class RayPool:
    """Ray workers, on a cluster that runs (`ray_address`) or on one made here.

    Args:
        config: of the run.
        workers: how many.
        threads: of torch, for each.
        shared: one System 2 for all of them.
        answer_s: a shared System 2 that takes longer is started anew.
        episode_s: a worker whose episode takes longer is killed.
        start_s: it has this much more for its first, before which it loads.
    """

    def __init__(
        self,
        config: RunConfig,
        workers: int,
        threads: int = 1,
        shared: bool = False,
        answer_s: float = ANSWER_TIMEOUT_S,
        episode_s: float = EPISODE_TIMEOUT_S,
        start_s: float = START_TIMEOUT_S,
    ) -> None:
        self.workers = workers
        self._config, self._threads, self._shared = config, threads, shared
        self._answer_s, self._episode_s, self._start_s = answer_s, episode_s, start_s
        self._json = config.model_dump_json()
        self._idle: list[Any] = []
        self._alive: list[Any] = []  # idle or not
        self._loaded: list[Any] = []  # of them, those that have answered
        self._engine: Any = None
        self._spec: LatentSpec | None = None
        self._about: dict[str, Any] | None = None
        self._owns_ray = False

    def start(self) -> dict[str, Any]:
        if self._about is None:
            self._connect()
            if self._shared:
                self._start_engine()
            self._idle = [self._new_worker() for _ in range(self.workers)]
            answers = [self._start_worker(worker) for worker in self._idle]
            self._loaded = list(self._idle)
            self._about = dict(answers[0])
        return dict(self._about)

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Outcome]]:
        self.start()
        waiting = iter(jobs)
        again: list[Job] = []
        tries: dict[str, int] = {}
        running: dict[Any, tuple[Any, Job, float]] = {}
        while True:
            while self._idle and (job := again.pop() if again else next(waiting, None)):
                worker = self._idle.pop()
                running[worker.run.remote(job)] = worker, job, time.monotonic()
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1, timeout=self._patience_s())
            if not done:
                ray.nodes()  # raises where Ray itself is gone, whose answer would never come
                self._end_overdue(running.values())
            for reference in done:
                worker, job, _ = running.pop(reference)
                try:
                    outcome = ray.get(reference)
                except ray.exceptions.RayActorError:
                    self._forget(worker)
                    self._idle.append(self._new_worker())
                    tries[job.episode.key] = tries.get(job.episode.key, 0) + 1
                    if tries[job.episode.key] < TRIES:
                        again.append(job)
                        continue
                    outcome = _lost(job)
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, ConfigError):
                        raise error.cause from None  # one line, without the worker's traceback
                    raise
                else:
                    self._idle.append(worker)
                    if worker not in self._loaded:
                        self._loaded.append(worker)
                yield job, outcome

    def _forget(self, worker: Any) -> None:
        for known in (self._alive, self._loaded):
            if worker in known:
                known.remove(worker)

    def _patience_s(self) -> float:
        return min(LOOK_EVERY_S, self._episode_s)

    def _end_overdue(self, running: Iterable[tuple[Any, Job, float]]) -> None:
        """Kill workers that are long past any episode's time: their answers are then errors."""
        now_s = time.monotonic()
        for worker, job, begun_s in running:
            limit_s = self._episode_s + (0 if worker in self._loaded else self._start_s)
            if now_s - begun_s > limit_s:
                log.warning("%s: no answer after %.0f s", job.episode.key, now_s - begun_s)
                ray.kill(worker)

    def close(self) -> None:
        for worker in self._idle:
            try:
                ray.get(worker.close.remote(), timeout=10)
            except Exception:
                log.warning("a worker did not close", exc_info=True)
        for worker in self._alive:  # also those in the middle of an episode
            ray.kill(worker)
        self._idle, self._alive, self._loaded = [], [], []
        if self._engine is not None:
            ray.kill(self._engine)
            self._engine = None
        if self._owns_ray:
            ray.shutdown()
            self._owns_ray = False

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._config.ray_address is not None:
            address = cluster_address(self._config.ray_address)
            probe_cluster(address)
            join(address, **options)
            self._owns_ray = True
            return
        cpus = self.workers * self._threads + 1
        # "local": the cluster that somebody else runs on this machine is not ours.
        options |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        for attempt in range(STARTS):
            try:
                ray.init(**options)
                break
            except Exception as error:
                # Ray gives its own processes half a minute, which a busy machine may exceed.
                ray.shutdown()
                if attempt == STARTS - 1:
                    raise CommandFailed(f"Ray does not start: {_line(error)}") from error
        self._owns_ray = True

    def _environment(self) -> dict[str, Any]:
        count = str(self._threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
        # Workers on this machine find what the driver finds; elsewhere the project is installed.
        path = os.pathsep.join(dict.fromkeys(p or os.getcwd() for p in sys.path))
        extra = {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
        return {"env_vars": dict.fromkeys(names, count) | extra}

    def _start_engine(self) -> None:
        gpus = 0.5 if ray.cluster_resources().get("GPU") else 0
        options = {"num_cpus": 1, "num_gpus": gpus, "runtime_env": self._environment()}
        options |= {"max_restarts": STARTS - 1, "max_task_retries": 1}
        self._engine = ray.remote(EngineActor).options(**options).remote(self._json)
        answer = self._answer(self._engine.start.remote(), "System 2")
        self._spec = answer["spec"]

    def _new_worker(self) -> Any:
        gpus = 0.0
        if on_gpu(self._config.system1.policy) and ray.cluster_resources().get("GPU"):
            gpus = 0.5 / self.workers
        options = {"num_cpus": self._threads, "num_gpus": gpus, "runtime_env": self._environment()}
        actor = ray.remote(EpisodeWorker).options(**options)
        worker = actor.remote(self._json, self._threads, self._engine, self._spec, self._answer_s)
        self._alive.append(worker)
        return worker

    def _start_worker(self, worker: Any) -> dict[str, Any]:
        # One after the other: the first may have to build files that all of them use.
        return self._answer(worker.start.remote(), "a worker")

    def _answer(self, reference: Any, who: str) -> dict[str, Any]:
        try:
            answer = ray.get(reference, timeout=START_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            self.close()
            last = str(error).strip().splitlines()[-1]
            raise CommandFailed(f"{who} did not start: {last}") from error
        if "refused" in answer:
            self.close()
            raise ConfigError(answer["refused"])
        return cast(dict[str, Any], answer)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _lost(job: Job) -> Outcome:
    attempt = Attempt(job.episode)
    attempt.error = f"the worker's process died {TRIES} times"
    return attempt.outcome(0.0)
