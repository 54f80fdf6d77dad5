"""Whether `openhelix train --estimate` is right: its figures beside those of a training that runs.

    python -m openhelix.benchmarks.perf.bench_estimate --out FOLDER -- \
        data=demonstrations_ABC policy.checkpoint=checkpoints/system1-laptop vlm.data=table

For each regime stage 2, and for "vlm" every stage of the base model, is trained for a few steps in a process of its own (CPU, one thread, the laptop
model run in every step) and estimated in two others, before and after, whose mean counts. Memory is
the largest resident set seen; time is CPU time of the steps after the first: other load on the machine
counts only as far as it slows down a core.
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
from openhelix.benchmarks.training.estimate_vlm import estimate_vlm
from openhelix.benchmarks.training.stages import JointRun
from openhelix.benchmarks.training.vlm import data_folder
from openhelix.runtime.core.config import apply_overrides, validate
from openhelix.system2.vlm_train import STAGES, VlmRun

VLM = "vlm"
REGIMES = ("frozen", "prompt_tuning", "lora", "full", VLM)
STEPS = 3


def config_of(regime: str, words: list[str], out: Path) -> TrainingConfig:
    """Return a short stage 2 of a regime, or a short training of a base model."""
    base: dict[str, Any] = {
        "out": out,
        "threads": 1,
        "eval_frames": 4,
        "stage1": {"steps": 0},
        "stage2": {"steps": STEPS, "batch": 8, "draws": 4, "start": "random"},  # it takes minutes
        "latent": {"feed": "live", "dtype": "float32"},
        "vlm": {"pictures": 300, "bf16": False} | {stage: {"batch": 2} for stage in STAGES},
    }
    if regime != VLM:
        base["latent"]["regime"] = regime
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


def trained(config: TrainingConfig) -> dict[str, Any]:
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
    return {"peak_gb": round(peak.largest / 1e9, 3), "step_s": {"stage2": round(spent, 3)}}


def trained_vlm(config: TrainingConfig, folder: Path) -> dict[str, Any]:
    """Return what a few steps of every stage of a base model, and writing it, took."""
    torch.set_num_threads(config.threads)
    section = config.vlm.model_copy(update={"data": data_folder(config.vlm)})
    spent: dict[str, float] = {}
    with Peak() as peak:
        run = VlmRun(section, folder, device="cpu")
        for stage in STAGES:
            run._enter(stage)
            run.train_step()
            begun = time.process_time()
            for _ in range(STEPS - 1):
                run.train_step()
            spent[stage] = round((time.process_time() - begun) / (STEPS - 1), 3)
        run.save()
        run.export()
    return {"peak_gb": round(peak.largest / 1e9, 3), "step_s": spent}


def compared(regime: str, words: list[str]) -> dict[str, Any]:
    """Return what was estimated of a training, what it took, and the ratios of both."""
    said, measured, again = (
        child(what, regime, words) for what in ("estimate", "train", "estimate")
    )

    def a_step(found: dict[str, Any]) -> dict[str, float]:
        if regime == VLM:
            return {stage: found["stages"][stage]["a step"] for stage in STAGES}
        return {"stage2": found["seconds"]["a step"]}

    first, last = a_step(said), a_step(again)
    step = {name: round((first[name] + last[name]) / 2, 3) for name in first}
    peak = said["memory_gb"]["peak"]
    ratio = {name: round(step[name] / measured["step_s"][name], 3) for name in step}
    return {
        "estimated": {"peak_gb": peak, "step_s": step, "memory_gb": said["memory_gb"]},
        "measured": measured,
        "memory_ratio": round(peak / measured["peak_gb"], 3),
        "time_ratio": ratio,
    }


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
            vlm = options.regimes[0] == VLM
            if options.be == "estimate":
                found = estimate_vlm(config) if vlm else estimate(config, "stage2")
            else:
                found = trained_vlm(config, Path(folder)) if vlm else trained(config)
        print(json.dumps(found))
        return 0
    file = None if options.out is None else options.out / "estimate.json"
    rows: dict[str, Any] = {}
    if file is not None and file.is_file():  # figures of other regimes are kept
        rows = json.loads(file.read_text())
    for regime in options.regimes:
        rows[regime] = compared(regime, words)
        print(json.dumps({regime: rows[regime]}), file=sys.stderr)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
