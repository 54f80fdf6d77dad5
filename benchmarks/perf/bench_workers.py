"""How many samples per second a policy trains on with one process and with several.

    python -m openhelix.benchmarks.perf.bench_workers --data demonstrations_ABC --out FOLDER

Each process is held to a core of its own, the thread that makes its batches included, and has `--batch`
samples of every step, so several train on as many times more. One and several take turns, `--rounds`
times, and medians count. `speedup` compares samples per second of wall time, and needs as many free
cores as processes; `speedup_by_cpu_time` compares the CPU time that a sample costs, exchanging gradients
included, which other load on the machine hardly changes: it is what free cores would give, but for
waiting. `exchanging` is the share of a step's wall time in which gradients and sums are exchanged or
waited for.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from openhelix.benchmarks.training.config import TrainingConfig
from openhelix.benchmarks.training.workers import joined, started_as
from openhelix.system1.config import KEYPOSES
from openhelix.system1.train import TrainConfig, Trainer

SKIPPED = 2  # the first steps make what all others find ready


def worked(options: argparse.Namespace) -> dict[str, float]:
    """Be one of the processes; return the seconds of its measured steps."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[started_as()[0] % len(cores)]})
    with joined("cpu") as workers, tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            TrainConfig(
                cache=TrainingConfig(data=options.data).frames_folders(),
                out=Path(folder),
                changes={"keyposes": KEYPOSES},
                batch=options.batch * workers.count,
                draws=options.draws,
                steps=options.steps + SKIPPED,
                bf16=options.bf16,
            ),
            workers,
        )
        for _ in range(SKIPPED):
            trainer.train_step()
        exchanged = [0.0]
        for name in ("summed", "firsts", "add_gradients"):
            setattr(workers, name, timed(getattr(workers, name), exchanged))
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        for _ in range(options.steps):
            trainer.train_step()
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        for name in ("summed", "firsts", "add_gradients"):
            delattr(workers, name)
        return {"wall": wall_s, "cpu": cpu_s, "exchanging": exchanged[0] / wall_s}


def timed(work: Callable[..., Any], total: list[float]) -> Callable[..., Any]:
    """Return `work`, whose wall time is added to the list's one number."""

    def timed_work(*given: Any) -> Any:
        begun = time.perf_counter()
        found = work(*given)
        total[0] += time.perf_counter() - begun
        return found

    return timed_work


def measured(options: argparse.Namespace, count: int) -> dict[str, Any]:
    """Return samples per second of `count` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    known = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    known |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "openhelix.benchmarks.perf.bench_workers", "--worker"]
    running = [
        subprocess.Popen(
            [*command, *sys.argv[1:]],
            env={**os.environ, **known, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"a process of {count} failed")
    spent = [json.loads(text.splitlines()[-1]) for text in said]
    samples = options.steps * options.batch * count
    cpu = sum(one["cpu"] for one in spent)
    return {
        "processes": count,
        "samples_per_s": round(samples / max(one["wall"] for one in spent), 1),
        "samples_per_cpu_s": round(samples / cpu, 1),
        "exchanging": round(max(one["exchanging"] for one in spent), 3),
    }


def middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of every figure."""
    return {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}


def main() -> int:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("demonstrations_ABC"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32, help="samples of each process")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for workers.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worked(options)))
        return 0
    rounds = [[measured(options, n) for n in (1, options.processes)] for _ in range(options.rounds)]
    one, several = (middle(list(found)) for found in zip(*rounds, strict=True))
    found = {
        "batch_of_each": options.batch,
        "draws": options.draws,
        "bf16": options.bf16,
        "rounds": options.rounds,
        "one": one,
        "several": several,
        "speedup": round(several["samples_per_s"] / one["samples_per_s"], 3),
        "speedup_by_cpu_time": round(
            options.processes * several["samples_per_cpu_s"] / one["samples_per_cpu_s"], 3
        ),
    }
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "workers.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
