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
FRAMES_AN_EPISODE = 8.0  # of those that are drawn


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


def training_s(training: Training, n_frames: int) -> float | None:
    """Return how long `openhelix train` takes for a training, or None if nothing is known.

    Args:
        training: what.
        n_frames: of the data, about one in `latent.stride` of which gets states.
    """
    found, options = costs().get("training"), training.options
    if found is None or options.get("device", "cpu") != "cpu":
        return None
    default = TrainingConfig()

    def of(key: str) -> Any:
        section, name = key.split(".")
        return options.get(key, getattr(getattr(default, section), name))

    if training.stage == "policy":
        if "policy.checkpoint" in options:
            return 0.0
        return float(found["policy_step_s"]) * float(of("policy.steps"))
    one, two = float(of("stage1.steps")), float(of("stage2.steps"))
    # Every episode has one, whatever the stride.
    stride = min(float(of("latent.stride")), FRAMES_AN_EPISODE)
    states = n_frames / stride * float(of("latent.phrasings")) * float(found["states_frame_s"])
    prefixes = float(of("latent.frames")) * float(found["prefix_frame_s"])
    learns_act = of("latent.regime") != "frozen" and of("latent.kind") == "act_last"
    seconds = one * float(found["prefix_step_s" if learns_act else "states_step_s"])
    if one and learns_act:
        seconds += prefixes  # too much where another variant has made them
    if of("latent.regime") in ("lora", "full"):
        return seconds + two * float(found["live_step_s"])
    if of("latent.feed") == "prefix":
        return seconds + prefixes + two * float(found["prefix_step_s"])
    return seconds + states + two * float(found["states_step_s"])
