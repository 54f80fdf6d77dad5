"""Measured times of a step: of an evaluation, of a training of each kind.

An environment step costs its physics; every plan a picture of each camera and System 1; every
latent that a plan is made from a call of System 2. These and the steps of the trainings were
measured by `benchmarks.perf.bench_experiments`.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from benchmarks.dsvlabench.evaluation import ROOT
from benchmarks.experiments.measures import Measure
from benchmarks.experiments.trainings import Training
from benchmarks.training.config import TrainingConfig

COSTS = ROOT / "benchmarks" / "perf" / "results" / "experiments.json"
REPLAN_STEPS = 8


@cache
def costs() -> dict[str, Any]:
    """Return the measured costs; empty where nothing has been measured."""
    return dict(json.loads(COSTS.read_text())) if COSTS.exists() else {}


def step_s(measure: Measure, workers: int) -> float | None:
    """Return the expected wall seconds of one environment step, or None if nothing is known."""
    found = costs().get("evaluation")
    if found is None:
        return None
    latents = measure.training.stage == "pair"
    refresh = max(REPLAN_STEPS, measure.conditions.interval)
    one = float(found["env_step_s"]) + float(found["plan_s"]) / REPLAN_STEPS
    one += float(found["latent_s"]) / refresh if latents else 0.0
    return one / (1.0 + (workers - 1) * float(costs()["worker_gain"]))


def training_s(training: Training) -> float | None:
    """Return how long `openhelix train` takes for a training, or None if nothing is known."""
    found, options = costs().get("training"), training.options
    if found is None or options.get("device", "cpu") != "cpu":
        return None
    default = TrainingConfig()
    if training.stage == "policy":
        if "policy.checkpoint" in options:
            return 0.0
        steps = options.get("policy.steps", default.policy.steps)
        return float(found["policy_step_s"]) * float(steps)
    live = options["latent.regime"] in ("lora", "full")
    stages = {"stage1.steps": default.stage1.steps, "stage2.steps": default.stage2.steps}
    steps = sum(float(options.get(key, value)) for key, value in stages.items())
    seconds = steps * float(found["live_step_s" if live else "cached_step_s"])
    if live:
        return seconds
    frames = options.get("latent.frames", default.latent.frames)
    return seconds + float(frames) * float(found["prepare_frame_s"])
