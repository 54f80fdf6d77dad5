"""System 1 benchmark: speed, cost, and each fast mode's deviation from the exact one.

    python -m openhelix.benchmarks.perf.bench_s1 --threads 2

runs every case in a process of its own (so that peak memory is that case's alone) and writes
one JSON file: device, threads, versions, and a record a case with the median and 90th
percentile of a chunk, its parts, GFLOP (counted by torch with attention written out),
peak resident memory, and the deviation from the exact float32 result under the same noise.
Cases that are compared are alternated within one process, so their ratio does not depend on
what else the machine was doing. Weights are random unless `--checkpoint` names a folder for
the small policy: speed does not depend on weights, deviation does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from openhelix.benchmarks.perf.places import results_file
from openhelix.benchmarks.perf.s1_cases import CASES

RESULTS = results_file("bench_s1.json")


def spawn(case: str, argv: list[str], threads: int) -> dict[str, Any]:
    """Run one case in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "openhelix.benchmarks.perf.bench_s1", *argv, "--case", case]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr else "no output"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--nhist", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--checkpoint", default=None, help="folder of a small policy")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--case", choices=list(CASES), default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        torch.set_num_threads(args.threads)
        print(json.dumps(CASES[args.case](args)))
        return
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    report: dict[str, Any] = {
        "device": args.device,
        "device_name": name or platform.machine(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "load_before": os.getloadavg()[0],
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "weights": args.checkpoint or "random",
        "cases": {},
    }
    for case in args.only:
        report["cases"][case] = spawn(case, sys.argv[1:], args.threads)
        print(case, json.dumps(report["cases"][case])[:300], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
