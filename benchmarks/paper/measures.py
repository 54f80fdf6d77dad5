"""Turns a row of a table into an evaluation: its episodes, conditions and weights.

An evaluation is identified by a hash of its training, its episodes and its conditions, so rows of
different tables that measure the same thing (and there are many) share one folder of results.
All rows of a suite have the same seed, hence the same episodes, and can be compared in pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from openhelix.benchmarks.evaluation.eval import load_config
from openhelix.benchmarks.evaluation.evaluation import Evaluation
from openhelix.benchmarks.evaluation.runner import Conditions
from openhelix.benchmarks.evaluation.suites import CHAINS, Suite
from openhelix.benchmarks.paper.catalogue import Row, Scale
from openhelix.benchmarks.paper.trainings import Training

SCENE = "D"  # training is on A, B and C


@dataclass(frozen=True)
class Measure:
    """One evaluation, before its weights are there.

    Attributes:
        suite, conditions: the episodes and how they are run.
        training: of the weights.
        run: overrides of the run's configuration that the user gave.
        threads: of torch.
    """

    suite: Suite
    conditions: Conditions
    training: Training
    run: tuple[str, ...] = ()
    threads: int = 1

    @property
    def key(self) -> str:
        """The hash of all that shapes it."""
        data = {
            "suite": self.suite.identity(),
            "conditions": asdict(self.conditions),
            "training": self.training.key,
            "run": [word for word in self.run if not word.startswith("output.")],
            "threads": self.threads,
        }
        text = json.dumps(data, sort_keys=True)
        return f"{self.suite.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def plan(self, overrides: Sequence[str], videos: int = 0) -> Evaluation:
        """Return the evaluation of these weights, of which some episodes are filmed.

        Raises:
            ConfigError: the overrides do not make a configuration.
        """
        config = load_config([*overrides, *self.run], scene=SCENE)
        return Evaluation(self.suite, self.conditions, config, self.threads, videos=videos)

    def steps_at_most(self) -> int:
        """Return how many environment steps it can take."""
        tasks = 5 if self.suite.name in CHAINS else 1
        return len(self.suite.episodes()) * tasks * self.conditions.steps_limit


def measure_of(
    row: Row, training: Training, scale: Scale, seed: int, run: Sequence[str], smoke_tasks: bool
) -> Measure:
    """Return what a row measures.

    Args:
        row: of the table; it has a variant.
        training: of its variant.
        scale: how much is measured.
        seed: of all episodes.
        run: overrides of the run's configuration.
        smoke_tasks: of suites of single tasks, one task alone.
    """
    steps = row.steps if scale.max_steps is None else min(row.steps, scale.max_steps)
    if row.suite in CHAINS:
        count = scale.final_sequences if row.final else scale.sequences
        suite = Suite(row.suite, scenes=(SCENE,), count=count, seed=seed)
    elif row.suite == "calvin-r":
        suite = Suite(row.suite, scenes=(SCENE,), count=1, seed=seed)
    else:
        suite = Suite(
            row.suite,
            scenes=(SCENE,),
            count=scale.episodes_per_task,
            seed=seed,
            patterns=row.patterns,
            speeds=row.speeds,
        )
    if smoke_tasks and row.suite not in CHAINS:
        suite = replace(suite, tasks=("lift_blue_block_table",))
    conditions = Conditions(steps, row.interval, row.latency)
    return Measure(suite, conditions, training, tuple(run), scale.threads)


def score_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an evaluation's report that a table shows."""
    kept = [
        "suite",
        "world",
        "scene",
        "seed",
        "clock",
        "steps_limit",
        "interval",
        "latency",
        "n_errors",
    ]
    kept += ["replan_steps", "code"]
    if "avg_len" in report:
        kept += [
            "avg_len",
            "ci95",
            "success_in_a_row",
            "success_in_a_row_ci95",
            "n_sequences",
            "n_starts",
        ]
    else:
        kept += ["success_rate", "ci95", "n_episodes", "n_starts", "per_pattern"]
        kept += ["per_motion"]
    found = {key: report[key] for key in kept if key in report}
    found["policy_sha256"] = report["policy"]["sha256"]
    found["latents"] = report["system2"]["spec_id"] if report["system2"] else None
    work, timing = report["work"], report["timing"]
    return found | {
        "env_steps": work["env_steps"],
        "hold_steps": work["hold_steps"],
        "latent_age_steps": work["latent_age_steps"],
        "latents_per_task": work["latents_per_task"],
        "steps_per_s": timing["steps_per_s"],
        "s1_s_per_plan": _each(timing["s1_s_per_task"], work["tasks_attempted"], work["plans"]),
        "s2_s_per_latent": timing["s2_s_per_latent"],
        "s2_s_per_task": timing["s2_s_per_task"],
        "cpu_s": (timing.get("cpu_s_per_step") or 0.0) * (work["env_steps"] + work["hold_steps"]),
        "wall_s": report["wall_s"],
        "workers": report["workers"],
    }


def _each(mean: float | None, count: int, among: int) -> float | None:
    """Return what a mean over `count` comes to for each of `among`."""
    return mean * count / among if mean is not None and among else None
