"""Whether `openhelix train --estimate` is right: its figures beside those of a training that runs.

    python -m openhelix.benchmarks.perf.bench_estimate --out FOLDER -- \
        data=demonstrations_ABC policy.checkpoint=checkpoints/system1-laptop

For each regime stage 2 is estimated in a process of its own and trained for a few steps in another
(CPU, one thread, the laptop model run in every step). Memory is the largest resident set seen; time
is CPU time of the steps after the first, so that other load on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from openhelix.benchmarks.training.config import TrainingConfig
from openhelix.benchmarks.training.estimate import estimate
from openhelix.benchmarks.training.stages import JointRun
from openhelix.runtime.core.config import apply_overrides, validate

REGIMES = ("frozen", "prompt_tuning", "lora", "full")
STEPS = 3


def config_of(regime: str, words: list[str], out: Path) -> TrainingConfig:
    """Return a short stage 2 of a regime."""
    base: dict[str, Any] = {
        "out": out,
        "threads": 1,
        "eval_frames": 4,
        "stage1": {"steps": 0},
        "stage2": {"steps": STEPS, "batch": 8, "draws": 4},
        "latent": {"regime": regime, "feed": "live", "dtype": "float32"},
    }
    config: TrainingConfig = validate(TrainingConfig, apply_overrides(base, words))
    return config


class Peak:
    """The largest resident set of this process while it is watched, in bytes."""

    def __init__(self) -> None:
        self.largest = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._end.wait(0.01):
            self.largest = max(self.largest, process.memory_info().rss)


def trained(config: TrainingConfig) -> dict[str, float]:
    """Return what a few steps and a saving took."""
    torch.set_num_threads(config.threads)
    with Peak() as peak:
        run = JointRun(config, "stage2")
        run.train_step()
        begun = time.process_time()
        for _ in range(STEPS - 1):
            run.train_step()
        spent = (time.process_time() - begun) / (STEPS - 1)
        run.save()
    return {"peak_gb": round(peak.largest / 1e9, 3), "step_s": round(spent, 3)}


def child(what: str, regime: str, words: list[str]) -> dict[str, Any]:
    """Estimate or train in a process of its own."""
    command = [sys.executable, "-m", "openhelix.benchmarks.perf.bench_estimate"]
    made = subprocess.run(
        [*command, "--be", what, "--regimes", regime, "--", *words],
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=REGIMES)
    parser.add_argument("--out", type=Path, help="folder for estimate.json")
    parser.add_argument("--be", choices=("estimate", "train"), help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help="settings of `openhelix train`")
    options = parser.parse_args()
    words = options.words
    if options.be:
        with tempfile.TemporaryDirectory() as folder:
            config = config_of(options.regimes[0], words, Path(folder))
            found = trained(config) if options.be == "train" else estimate(config, "stage2")
        print(json.dumps(found))
        return 0
    rows: dict[str, Any] = {}
    for regime in options.regimes:
        said, measured = child("estimate", regime, words), child("train", regime, words)
        peak, step = said["memory_gb"]["peak"], said["seconds"]["a step"]
        rows[regime] = {
            "estimated": {"peak_gb": peak, "step_s": step, "memory_gb": said["memory_gb"]},
            "measured": measured,
            "memory_ratio": round(peak / measured["peak_gb"], 3),
            "time_ratio": round(step / measured["step_s"], 3),
        }
        print(json.dumps({regime: rows[regime]}), file=sys.stderr)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "estimate.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
