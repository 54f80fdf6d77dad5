"""Episodes on the wall clock: the whole graph of processes, as `openhelix run` starts it.

System 2 is truly asynchronous there and time does not wait, so episodes run one at a time and
their results depend on the machine. Every episode gets fresh processes: what one
leaves behind cannot help or harm the next.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from openhelix.benchmarks.evaluation.measurement import Outcome, Watch, switched
from openhelix.benchmarks.evaluation.pool import Job
from openhelix.benchmarks.evaluation.runner import FILM_SIZE
from openhelix.benchmarks.evaluation.suites import Episode
from openhelix.runtime.cli.film import film
from openhelix.runtime.control.assembly import make
from openhelix.runtime.core.config import CommandFailed, ConfigError, RunConfig
from openhelix.runtime.core.files import NO_ROOM, refusal_of
from openhelix.runtime.core.interfaces import PolicySpec
from openhelix.runtime.launch.graph import ScratchFolder
from openhelix.runtime.launch.node import interruptible
from openhelix.runtime.launch.run import run_realtime
from openhelix.runtime.observe.display import Display

log = logging.getLogger(__name__)


class RealtimePool:
    """Runs episodes on the wall clock, one after the other."""

    def __init__(self, config: RunConfig, workers: int) -> None:
        if workers != 1:
            raise ConfigError(f"--workers: {workers}; the wall clock runs one episode at a time")
        if config.robot.name != "sim":
            raise ConfigError("--world: calvin_env is no real-time world; use --clock lockstep")
        self.workers = workers
        self._config = config
        self._spec: PolicySpec | None = None
        self._untrained = False

    def start(self) -> dict[str, Any]:
        if self._spec is None:
            policy = make(self._config.system1.policy)
            self._spec, self._untrained = policy.spec, getattr(policy, "untrained", False)
        latent = None if self._spec.latent is None else asdict(self._spec.latent)
        about = {"policy_spec": asdict(self._spec), "latent_spec": latent, "spec_id": None}
        return about | ({"untrained": ["system1"]} if self._untrained else {})

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Outcome]]:
        for job in jobs:
            yield job, self._run(job)

    def close(self) -> None:
        """Every episode has ended its own processes."""

    def _run(self, job: Job) -> Outcome:
        episode, started_s = job.episode, time.perf_counter()
        report: dict[str, Any] = {}
        error, video = None, None
        # A signal that comes while the processes end is none that may be forgotten.
        with interruptible() as interrupted, ScratchFolder() as folder:
            try:
                report = run_realtime(
                    self._config_of(job),
                    episode.assignments,
                    start_of(episode),
                    folder,
                    Display(live=False),
                )
                if report["interrupted"] or interrupted.is_set():
                    raise KeyboardInterrupt
            except (CommandFailed, RuntimeError) as failure:
                if refusal_of(failure) in NO_ROOM:  # no failure of the policy
                    raise
                error = f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:300]
            done = [row["success"] for row in report.get("tasks", [])]
            failed = len(done) < len(episode.tasks) or not all(done[episode.uncounted :])
            if job.film == "yes" or (job.film == "failed" and failed):
                video = _film(folder)
        wall_s = time.perf_counter() - started_s
        return Outcome(_result(episode, report, error, wall_s, self._config.control.hz), video)

    def _config_of(self, job: Job) -> RunConfig:
        config = self._config
        return config.model_copy(
            update={
                "seed": job.episode.seed,
                "ray": False,
                "world": config.world.model_copy(update={"scene": job.episode.scene}),
                "tasks": config.tasks.model_copy(
                    update={
                        "steps_limit": job.conditions.steps_limit,
                        "stop_at_failure": True,
                        "count_holds": True,
                    }
                ),
                "output": config.output.model_copy(
                    update={"video": job.film != "no", "track": job.film != "no"}
                    | {"record": False, "viewer": False, "status": False}
                    | {"metrics_port": None, "live": False}
                ),
            }
        )


def _film(folder: Path) -> bytes | None:
    """Return the film of a run: the one that it made itself, or one of its track."""
    path = folder / "video.mp4"
    if not path.exists():
        try:
            film(folder, path, Display(live=False), title=False, size=FILM_SIZE)
        except (ValueError, OSError) as error:  # it ended before its first tick
            log.warning("no film: %s", error)
            return None
    return path.read_bytes()


def start_of(episode: Episode) -> dict[str, Any]:
    """Return how the world's process is to set the episode up."""
    target = "openhelix.benchmarks.evaluation.staging:stage_json"
    return {"stage": {"target": target, "options": {"episode": episode.to_json()}}}


def _result(
    episode: Episode,
    report: Mapping[str, Any],
    error: str | None,
    wall_s: float,
    control_hz: float,
) -> dict[str, Any]:
    rows = [
        {key: row[key] for key in ("task", "instruction", "success", "env_steps", "hold_steps")}
        | {key: row[key] for key in ("reason", "understood", "refused")}
        | dict(Watch.EMPTY)
        for row in report.get("tasks", ())
    ]
    first, rows = rows[: episode.uncounted], rows[episode.uncounted :]
    in_a_row = next((i for i, row in enumerate(rows) if not row["success"]), len(rows))
    s2 = (report.get("s2_latency_s") or {}).get("p50")
    age = report.get("latent_age_s") or {}
    if rows:  # the run's figures, which are of all tasks, stand in the first one's row
        rows[0]["latents"] = rows[0]["encoded"] = report.get("latents_received", 0)
        if age.get("p50") is not None:
            # A run reports quantiles over its ticks: the median stands for the mean here.
            steps = {"mean": age["p50"] * control_hz, "max": age["max"] * control_hz}
            rows[0]["latent_age_steps"] = {k: round(v, 2) for k, v in steps.items()}
    return {
        "index": episode.index,
        "key": episode.key,
        "scene": episode.scene,
        "start": episode.start,
        "groups": dict(episode.groups),
        "in_a_row": in_a_row,
        "success": in_a_row == len(episode.tasks) - episode.uncounted,
        "error": error,
        "tasks": switched(first, rows),
        "renders": 0,
        "drift": [],
        "timing": {
            "wall_s": round(wall_s, 3),
            "task_s": [round(row["duration_s"], 3) for row in report.get("tasks", ())],
            "s1_s": 0.0,
            "s2_s": round((s2 or 0.0) * report.get("latents_received", 0), 3),
            "latent_age_s_p50": age.get("p50"),
            "deadline_missed": report.get("deadline_missed"),
        },
    }
