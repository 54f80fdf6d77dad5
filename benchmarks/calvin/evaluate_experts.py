"""How often the experts succeed: `python -m openhelix.benchmarks.calvin.evaluate_experts`.

Every start has its own seed, so that a single failure can be reproduced and results do not
depend on how starts are distributed over processes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin.demonstrations import perform, random_expert
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.experts import Disturbance
from openhelix.benchmarks.calvin.scene import scene_names
from openhelix.benchmarks.calvin.starts import StartError, begin
from openhelix.benchmarks.calvin.tasks import TASK_NAMES, get_task
from openhelix.runtime.launch.processes import pool_of

CHUNK = 10


def start_rng(scene: str, task: str, seed: int, index: int) -> np.random.Generator:
    """The generator of one start."""
    return np.random.default_rng([zlib.crc32(f"{scene} {task}".encode()), seed, index])


def evaluate_starts(
    scene: str, task: str, seed: int, first: int, count: int, disturb: bool
) -> list[int]:
    """Steps to success of each start, -1 for a failure, -2 where no start was found."""
    results = []
    with PlayTableEnv(scene, cameras=()) as env:
        for index in range(first, first + count):
            rng = start_rng(scene, task, seed, index)
            try:
                begin(env, task, rng)
            except StartError:
                results.append(-2)
                continue
            push = Disturbance.random(rng) if disturb else None
            done = perform(env, random_expert(env, task, rng), disturbance=push)
            results.append(done.steps if done.success else -1)
    return results


def evaluate(
    scenes: Sequence[str], tasks: Sequence[str], starts: int, seed: int, jobs: int, disturb: bool
) -> dict[str, Any]:
    """Success of every task in every scene."""
    work = [
        (scene, task, seed, first, min(CHUNK, starts - first), disturb)
        for scene in scenes
        for task in tasks
        for first in range(0, starts, CHUNK)
    ]
    found: dict[tuple[str, str], list[int]] = {}
    begun = time.monotonic()
    with pool_of(jobs) as pool:
        for item, steps in zip(work, pool.map(_star, work), strict=True):
            found.setdefault((item[0], item[1]), []).extend(steps)
    report: dict[str, Any] = {"starts": starts, "seed": seed, "disturbed": disturb, "scenes": {}}
    for scene in scenes:
        rows = {task: _row(found[scene, task]) for task in tasks}
        rates = [row["success"] for row in rows.values()]
        report["scenes"][scene] = {
            "mean": float(np.mean(rates)),
            "worst": float(np.min(rates)),
            "tasks": rows,
        }
    report["wall_s"] = round(time.monotonic() - begun, 1)
    return report


def _star(item: tuple[str, str, int, int, int, bool]) -> list[int]:
    return evaluate_starts(*item)


def _row(steps: list[int]) -> dict[str, Any]:
    tried = [s for s in steps if s != -2]
    good = [s for s in tried if s >= 0]
    return {
        "success": len(good) / max(len(tried), 1),
        "starts": len(tried),
        "no_start": len(steps) - len(tried),
        "median_steps": float(np.median(good)) if good else None,
        "p90_steps": float(np.quantile(good, 0.9)) if good else None,
        "failed": [i for i, s in enumerate(steps) if s == -1][:20],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, print a table or JSON."""
    parser = argparse.ArgumentParser(prog="evaluate_experts", description=__doc__)
    parser.add_argument("--scene", default="D", help="ABCD, R17, random:0-59")
    parser.add_argument("--starts", type=int, default=200)
    parser.add_argument("--tasks", nargs="*", default=list(TASK_NAMES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--disturb", action="store_true", help="push the arm once a start")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        scenes = scene_names(args.scene)
        tasks = [get_task(t).name for t in args.tasks]
        if args.starts < 1 or args.jobs < 1:
            raise ValueError("starts, jobs: must be at least 1")
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    report = evaluate(scenes, tasks, args.starts, args.seed, args.jobs, args.disturb)
    sys.stdout.write(json.dumps(report, indent=1) + "\n" if args.json else table(report))
    return 0


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = []
    for scene, rows in report["scenes"].items():
        lines.append(f"scene {scene}: mean {rows['mean']:.3f}, worst {rows['worst']:.3f}")
        for task, r in rows["tasks"].items():
            lines.append(
                f"  {task:28s} {r['success']:.3f} of {r['starts']:3d}  steps "
                f"{r['median_steps'] or 0:4.0f} / {r['p90_steps'] or 0:4.0f}  failed {r['failed'][:8]}"
            )
    return "\n".join([*lines, f"{report['wall_s']} s", ""])


if __name__ == "__main__":
    raise SystemExit(main())
