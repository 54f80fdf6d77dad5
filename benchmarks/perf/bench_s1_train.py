"""Throughput of policy training in samples per second, and whether both precisions learn alike.

Two trainings of one seed on the same frames, step by step in turn: float32, and bfloat16 as
`bf16=true` trains. Reports samples per second of wall time and of CPU time (which other load on
the machine does not affect), and plots both losses.

    python -m openhelix.benchmarks.perf.bench_s1_train --data demonstrations_ABC --steps 40 --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from openhelix.benchmarks.training.config import TrainingConfig
from openhelix.system1.config import KEYPOSES
from openhelix.system1.train import TrainConfig, Trainer

SKIPPED = 2  # the first steps make what all others find ready


def measured(trainers: dict[str, Trainer], steps: int) -> dict[str, dict[str, Any]]:
    """Return each training's losses and samples a second."""
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in trainers}
    for _ in range(steps):
        for name, trainer in trainers.items():
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            loss = trainer.train_step()["loss"]
            spent = time.perf_counter() - wall_s, time.process_time() - cpu_s
            rows[name].append((loss, *spent))
    out = {}
    for name, found in rows.items():
        batch, counted = trainers[name].config.batch, found[SKIPPED:]
        wall, cpu = (sum(row[i] for row in counted) for i in (1, 2))
        out[name] = {
            "samples_per_s": round(batch * len(counted) / wall, 1),
            "samples_per_cpu_s": round(batch * len(counted) / cpu, 1),
            "losses": [round(row[0], 4) for row in found],
        }
    return out


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, result in results.items():
        axes.plot(result["losses"], label=f"{name}, {result['samples_per_cpu_s']} samples/CPU s")
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("demonstrations_ABC"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="for the picture and the numbers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folders = TrainingConfig(data=options.data).frames_folders()
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            name: Trainer(
                TrainConfig(
                    cache=folders,
                    out=Path(folder) / name,
                    changes={"keyposes": KEYPOSES},
                    batch=options.batch,
                    draws=options.draws,
                    steps=options.steps,
                    warmup=min(20, options.steps),
                    device=options.device,
                    bf16=name == "bfloat16",
                )
            )
            for name in ("float32", "bfloat16")
        }
        results = measured(trainers, options.steps)
    said = {"threads": options.threads, "batch": options.batch, "draws": options.draws, **results}
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        draw(results, options.out / "s1_train.png")
        (options.out / "s1_train.json").write_text(json.dumps(said, indent=1) + "\n")
    print(json.dumps(said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
