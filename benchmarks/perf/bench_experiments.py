"""Cost of the paper's experiments: a step of evaluation, a sample of each kind of training.

`openhelix experiment` estimates its duration from these figures. All are CPU times of one thread,
so other load on the machine does not affect them. Trainings begin with the
shipped policy, at a small batch, for a few steps; the evaluation is of chains with the shipped
pair, whose every plan has a fresh latent. What a second worker brings is `bench_eval`'s; what a
second thread brings a training is measured here, on the wall clock: leave the machine alone.

    python -m openhelix.benchmarks.perf.bench_experiments [--data COLLECTION] [--out FILE] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from openhelix.benchmarks.evaluation.eval import load_config
from openhelix.benchmarks.evaluation.evaluation import Console, Evaluation, evaluate
from openhelix.benchmarks.evaluation.pool import LocalPool
from openhelix.benchmarks.evaluation.runner import Conditions
from openhelix.benchmarks.evaluation.suites import Suite
from openhelix.benchmarks.paper.costs import COSTS
from openhelix.benchmarks.paper.trainings import SHIPPED_POLICY
from openhelix.benchmarks.perf.places import results_file
from openhelix.benchmarks.training.config import TrainingConfig
from openhelix.benchmarks.training.feeds import encode_prefix, encode_read_outs
from openhelix.benchmarks.training.stages import JointRun, policy_settings
from openhelix.runtime.core.config import validate
from openhelix.runtime.core.paths import CHECKOUT
from openhelix.system1.train import Trainer

EVAL = COSTS.with_name("eval.json")
SHARDS, FRAMES = 4, 16
COMMON: Mapping[str, Any] = {
    "eval_frames": 8,
    "bf16": "auto",  # as all scales have it
    "stage1": {"steps": 0},
    "policy": {"checkpoint": str(SHIPPED_POLICY), "batch": 16},
}
LATENT: Mapping[str, Any] = {"frames": 32, "stride": 1000, "phrasings": 1}
# Batch and steps: the language model forward and back costs ten times the rest.
SIZE: Mapping[str, tuple[int, int]] = {"prefix": (16, 4), "states": (16, 4), "live": (4, 2)}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "prefix": {"feed": "prefix"},
    "states": {"feed": "states", "regime": "frozen"},
    "live": {"regime": "lora"},
}
PARTS = ("evaluation", "policy", *KINDS)


def evaluation(sequences: int, steps: int) -> dict[str, Any]:
    """Return the processor seconds of an environment step, of a latent, and of loading."""
    config = load_config(())
    plan = Evaluation(Suite("calvin", count=sequences), Conditions(steps, interval=1), config)
    begun_s = time.process_time()
    pool = LocalPool(config)
    try:
        pool.start()
        load_s = time.process_time() - begun_s
        with tempfile.TemporaryDirectory() as folder:
            report = evaluate(plan, pool, Path(folder) / "run", Console("bench"))
    finally:
        pool.close()
    timing, work = report["timing"], report["work"]
    latents_a_step = work["latents_encoded"] / (work["env_steps"] + work["hold_steps"])
    latent_s = timing["s2_cpu_s_per_latent"]
    return {
        "sequences": sequences,
        "env_steps": work["env_steps"],
        "tasks_a_chain": work["tasks_attempted"] / sequences,
        "env_step_s": timing["cpu_s_per_step"]
        - latents_a_step * latent_s,  # with its share of a plan
        "latent_s": latent_s,
        "start_s": load_s,
    }


def some_of(frames: Path, folder: Path) -> Path:
    """Make a collection of the first shards of another one, by links; return it.

    Every episode gets a state at least, whatever the stride: all of them would take an hour.
    """
    index = json.loads((frames / "cache.json").read_text())
    index["shards"] = index["shards"][:SHARDS]
    made = folder / "data" / "frames"
    (made / "system2").mkdir(parents=True)
    (made / "cache.json").write_text(json.dumps(index))
    for shard in index["shards"]:
        for place in ("", "system2"):
            there = frames / place / shard["file"]
            if there.exists():
                (made / place / shard["file"]).symlink_to(there.resolve())
    return made


def timed(what: Callable[[], Any], times: int = 1) -> float:
    """Return the processor seconds of one of several calls."""
    begun_s = time.process_time()
    for _ in range(times):
        what()
    return (time.process_time() - begun_s) / times


def joint(kind: str, data: Path, out: Path) -> dict[str, float]:
    """Return what a sample of a joint training costs, and what its feed costs per frame."""
    batch, steps = SIZE[kind]
    latent, stage2 = {**LATENT, **KINDS[kind]}, {"steps": 1000, "batch": batch, "start": "random"}
    given = {**COMMON, "data": str(data), "out": str(out), "latent": latent, "stage2": stage2}
    config = validate(TrainingConfig, given)
    found: dict[str, float] = {}
    runs: list[JointRun] = []
    open_s = timed(lambda: runs.append(JointRun(config, "stage2")))
    run = runs[0]
    if kind in ("prefix", "states"):
        found[f"{kind}_frame_s"] = frame_s(run, kind)
        open_s -= len(run.joint.feed.frames) * found[f"{kind}_frame_s"]
    run.train_step()  # builds what later ones reuse
    found[f"{kind}_sample_s"] = timed(run.train_step, steps) / batch
    if kind == "prefix":
        found["open_s"] = max(0.0, open_s) + timed(run.evaluate)
        found["thread_gain"] = thread_gain(run)
    return found


def frame_s(run: JointRun, kind: str) -> float:
    """Return what the frozen language model costs per frame."""
    encode = encode_prefix if kind == "prefix" else encode_read_outs
    frames = run.joint.feed.frames[:FRAMES]
    said = run.source.sentences.of_frames(frames, 1)
    return timed(lambda: encode(run.learner, run.source, 8, frames, said)) / len(frames)


def thread_gain(run: JointRun) -> float:
    """Return how much faster all cores take a step than one thread does, on the wall clock."""
    ratios = []
    for _ in range(3):
        wall_s = []
        for count in (1, os.cpu_count() or 1):
            torch.set_num_threads(count)
            begun_s = time.perf_counter()
            run.train_step()
            wall_s.append(time.perf_counter() - begun_s)
        ratios.append(wall_s[0] / wall_s[1])
    torch.set_num_threads(1)
    return max(1.0, statistics.median(ratios))


def policy(data: Path, out: Path) -> dict[str, float]:
    """Return what a sample of the policy's own training costs."""
    given = {
        "data": str(data),
        "out": str(out),
        "bf16": "auto",
        "policy": {"batch": 16, "steps": 1000},
    }
    config = validate(TrainingConfig, given)
    trainer = Trainer(policy_settings(config))
    trainer.train_step()
    return {"policy_sample_s": timed(trainer.train_step, 4) / config.policy.batch}


def training(kind: str, frames: Path) -> dict[str, float]:
    """Return the processor seconds of a sample of a kind, and of a prepared frame."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        data = some_of(frames, root)
        return policy(data, root / kind) if kind == "policy" else joint(kind, data, root / kind)


def worker_gain() -> float:
    """Return how much a second worker adds to the first's work, by `bench_eval`; else 0."""
    if not EVAL.exists():
        return 0.0
    speedup = json.loads(EVAL.read_text())["ray_workers"]["speedup_2_workers"]
    return max(0.0, float(speedup) - 1.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--data", type=Path, default=TrainingConfig().data)
    arguments.add_argument("--sequences", type=int, default=12)
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    default = COSTS if CHECKOUT is not None else results_file("experiments.json")
    arguments.add_argument("--out", type=Path, default=default)
    options = arguments.parse_args(argv)
    before: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    report = before | {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_before": os.getloadavg()[0],
        "worker_gain": worker_gain(),
    }
    for part in options.only:  # written part by part: it may be cut short
        if part == "evaluation":
            report[part] = evaluation(options.sequences, options.steps)
        else:
            frames = TrainingConfig(data=options.data).frames_folder()
            report["training"] = report.get("training", {}) | training(part, frames)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
