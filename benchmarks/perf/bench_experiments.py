"""What the paper's experiments cost here: a step of each kind of training, a step of evaluation.

`openhelix experiment` tells from these figures how long it will take. Trainings run as
`openhelix train` does, at the batches of the laptop scale, for a few steps; the evaluation is
of chains with the laptop System 2, whose every plan has a fresh latent. What a second worker
brings is `bench_eval`'s.

    python -m benchmarks.perf.bench_experiments --data COLLECTION [--out FILE] [--skip-training]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.dsvlabench.eval import load_config
from benchmarks.dsvlabench.evaluation import Console, Plan, evaluate
from benchmarks.dsvlabench.pool import LocalPool
from benchmarks.dsvlabench.runner import Conditions
from benchmarks.dsvlabench.suites import Suite
from benchmarks.experiments.costs import COSTS
from benchmarks.training.config import TrainingConfig

EVAL = COSTS.with_name("eval.json")
COMMON: Mapping[str, Any] = {
    "eval_frames": 8,
    "log_every": 1,
    "latent.frames": 64,  # with a prefix
    "latent.stride": 256,  # one in so many frames with a state
    "latent.phrasings": 1,
    "latent.lag_steps": 0,
}
SHARDS = 4
STAGES = {"policy": "policy", "prefix": "stage1", "states": "stage2", "live": "stage2"}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "policy": {"policy.steps": 10},
    "prefix": {"stage1.steps": 10, "stage1.start": "random"},
    "states": {"stage1.steps": 0, "stage2.steps": 10, "latent.feed": "states"},
    "live": {"stage1.steps": 0, "stage2.steps": 4, "stage2.batch": 8, "latent.regime": "lora"},
}


def evaluation(sequences: int, steps: int) -> dict[str, Any]:
    """Return the seconds of an environment step, a plan and a latent, and of loading."""
    options = Namespace(world="playtable", scene="D", clock="lockstep")
    config = load_config(None, (), options)
    plan = Plan(Suite("calvin", count=sequences), Conditions(steps, interval=1), config)
    begun_s = time.monotonic()
    pool = LocalPool(config)
    try:
        pool.start()
        load_s = time.monotonic() - begun_s
        with tempfile.TemporaryDirectory() as folder:
            report = evaluate(plan, pool, Path(folder) / "run", Console("bench"))
            lines = (Path(folder) / "run" / "shards" / "0000.jsonl").read_text().splitlines()
    finally:
        pool.close()
    timing = [json.loads(line)["episode"]["timing"] for line in lines]
    total = {k: sum(t[k] for t in timing) for k in ("wall_s", "s1_s", "s2_s")}
    work = report["work"]
    env_steps = work["env_steps"] + work["hold_steps"]
    return {
        "sequences": sequences,
        "env_steps": env_steps,
        "env_step_s": (total["wall_s"] - total["s1_s"]) / env_steps,
        "plan_s": (total["s1_s"] - total["s2_s"]) / work["plans"],  # a plan waits for its latent
        "latent_s": total["s2_s"] / work["latents_encoded"],
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


def training(data: Path, root: Path) -> dict[str, Any]:
    """Return the seconds of a training step of each kind, and of a prepared frame."""
    found: dict[str, Any] = {}
    for kind, options in KINDS.items():
        out, stage = root / kind, STAGES[kind]
        words = dict(COMMON) | dict(options) | {"data": data, "out": out}
        if kind != "policy":
            words["policy.checkpoint"] = root / "policy" / "policy"
            words[f"{stage}.start"] = "random"
        command = [sys.executable, "-m", "runtime.cli", "train", stage, "--json"]
        command += [f"{key}={value}" for key, value in words.items()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{kind}: {done.stderr.strip().splitlines()[-1]}")
        history = json.loads((out / stage / "train.json").read_text())["history"]
        rows = [row for row in history if "grad_norm" in row]
        # The first step builds what later ones reuse, the last one also evaluates.
        first, last = rows[0], rows[-2]
        steps = last["step"] - first["step"]
        found[f"{kind}_step_s"] = (last["seconds"] - first["seconds"]) / steps
        sys.stderr.write(f"{kind}: {found[f'{kind}_step_s']:.3f} s a step\n")
        frames = re.findall(r"([\d.]+) s a frame", done.stderr)
        if frames:
            found[f"{kind}_frame_s"] = float(frames[-1])
    return found


def threads() -> int:
    """Return how many threads a training takes here."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def worker_gain() -> float:
    """Return how much a second worker adds to the first's work, by `bench_eval`; else 0."""
    if not EVAL.exists():
        return 0.0
    speedup = json.loads(EVAL.read_text())["ray_workers"]["speedup_2_workers"]
    return max(0.0, float(speedup) - 1.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--sequences", type=int, default=4)
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("--skip-training", action="store_true")
    arguments.add_argument("--out", type=Path, default=COSTS)
    options = arguments.parse_args(argv)
    report: dict[str, Any] = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_before": os.getloadavg()[0],
        "evaluation": evaluation(options.sequences, options.steps),
        "worker_gain": worker_gain(),
    }
    if not options.skip_training:
        with tempfile.TemporaryDirectory() as root:
            frames = TrainingConfig(data=options.data).frames_folder()
            data = some_of(frames, Path(root))
            report["training"] = training(data, Path(root)) | {"threads": threads()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
