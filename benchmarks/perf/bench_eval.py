"""Evaluation benchmark: sequences per hour, the cost of rendering, the speed-up of workers.

Many CALVIN sequences with few steps per task are run by one and by two Ray workers, round by round,
then a few with all steps by two; loading is left out. Then, with few steps per task, one process
runs sequences with frames drawn on demand (as `openhelix eval` does), drawn at every step, and not
drawn at all (one picture for all steps: the price of the rest). Sequences per hour of the three
ways are at the environment steps that a sequence takes with all steps, since a policy that sees
one picture for ever does something else.

    python -m openhelix.benchmarks.perf.bench_eval [--sequences 8] [--steps 360] [--many 24]
        [--few-steps 60] [--rounds 2] [--out FILE] [section.field=value ...]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openhelix.benchmarks.evaluation.eval import load_config
from openhelix.benchmarks.evaluation.measurement import Outcome
from openhelix.benchmarks.evaluation.pool import Job
from openhelix.benchmarks.evaluation.ray_pool import RayPool
from openhelix.benchmarks.evaluation.runner import Conditions, Runner
from openhelix.benchmarks.evaluation.suites import Episode, Suite
from openhelix.benchmarks.perf.places import results_file
from openhelix.runtime.control.assembly import ControlStack
from openhelix.runtime.control.loop import Tick
from openhelix.runtime.core.config import RunConfig
from openhelix.runtime.core.interfaces import CameraFrame
from openhelix.runtime.robots.env import EnvRobot

OUT = results_file("eval.json")


class EveryStep(Runner):
    """Draws both cameras at every step."""

    def _stack(self, robot: EnvRobot, episode: Episode, conditions: Conditions) -> ControlStack:
        stack = super()._stack(robot, episode, conditions)
        stack.loop.subscribers.append(_look)
        return stack


def _look(tick: Tick) -> None:
    list(tick.observation.frames.values())


class OnePicture(Runner):
    """Draws once and shows that picture for ever."""

    def _robot(self, scene: str) -> EnvRobot:
        robot = super()._robot(scene)
        if "_drawing" not in vars(robot):
            frames = dict(robot.get_observation().frames)

            def drawing(t_ns: int) -> Callable[[], Mapping[str, CameraFrame]]:
                stamped = {
                    name: CameraFrame(t_ns, f.rgb, f.depth, f.K, f.T_world_cam)
                    for name, f in frames.items()
                }
                return lambda: stamped

            robot._drawing = drawing  # type: ignore[method-assign]
        return robot


def one_worker(
    config: RunConfig,
    episodes: Sequence[Episode],
    how: Conditions,
    rounds: int,
    each: float,
) -> Any:
    """Time the three ways of drawing, one after the other in every round.

    Args:
        config: of the run.
        episodes: the sequences.
        how: they are run.
        rounds: how often.
        each: environment steps of a sequence, for sequences per hour.
    """
    kinds = {"on_demand": Runner, "every_step": EveryStep, "one_picture": OnePicture}
    runners = {name: kind(config) for name, kind in kinds.items()}
    step_s: dict[str, list[float]] = {name: [] for name in kinds}
    for runner in runners.values():
        runner.run(episodes[0], Conditions(8, how.interval))
    for _ in range(rounds):
        for name, runner in runners.items():
            started_s = time.perf_counter()
            results = [runner.run(episode, how).result for episode in episodes]
            wall_s = time.perf_counter() - started_s
            done = sum(r["env_steps"] + r["hold_steps"] for e in results for r in e["tasks"])
            step_s[name].append(wall_s / done)
    for runner in runners.values():
        runner.close()
    found: dict[str, Any] = {"env_steps_per_sequence": each, "steps_limit": how.steps_limit}
    for name, values in step_s.items():
        best, middle = min(values), statistics.median(values)
        found[name] = {
            "ms_per_step_best": 1e3 * best,
            "ms_per_step_median": 1e3 * middle,
            "sequences_per_hour": 3600 / (each * middle),
        }
    ratio = [a / b for a, b in zip(step_s["every_step"], step_s["on_demand"], strict=True)]
    found["every_step_over_on_demand"] = statistics.median(ratio)
    return found


def workers(
    config: RunConfig,
    many: Sequence[Episode],
    few: Conditions,
    episodes: Sequence[Episode],
    how: Conditions,
    rounds: int,
) -> Any:
    """Time one and two Ray workers on many short sequences, then two on whole ones.

    Scaling is of many short sequences, in which it hardly counts that one worker is without work
    while the other finishes the last one; of whole ones, there would have to be a hundred.

    Args:
        config: of the run.
        many, few: sequences, and how they are run to see what a second worker brings.
        episodes, how: those that say how long a hundred take.
        rounds: how often one and two workers run `many`.
    """
    pools = {n: RayPool(config, n) for n in (1, 2)}
    wall_s: dict[int, list[float]] = {n: [] for n in pools}
    pools[2].start()  # it makes the Ray that both use, with a core for each
    pools[1].start()
    same: list[list[dict[str, Any]]] = []
    for pool in pools.values():
        timed(pool, many[: 2 * pool.workers], Conditions(8, few.interval))
    for _ in range(rounds):
        for n, pool in pools.items():
            seconds, results = timed(pool, many, few)
            wall_s[n].append(seconds)
            same.append(results)
    whole_s, whole = timed(pools[2], episodes, how)
    pools[1].close()
    pools[2].close()
    rows = [row for result in whole for row in result["tasks"]]
    steps = sum(row["env_steps"] + row["hold_steps"] for row in rows)
    ratio = statistics.median([a / b for a, b in zip(wall_s[1], wall_s[2], strict=True)])
    return {
        "env_steps_per_sequence": steps / len(episodes),
        "tasks_attempted_per_sequence": len(rows) / len(episodes),
        "wall_s_short_sequences": {str(n): values for n, values in wall_s.items()},
        "speedup_2_workers": ratio,
        "sequences_per_hour_2_workers": 3600 * len(episodes) / whole_s,
        "minutes_for_100_sequences_2_workers": 100 * whole_s / len(episodes) / 60,
        "results_identical": all(results == same[0] for results in same),
    }


def timed(
    pool: RayPool, episodes: Sequence[Episode], how: Conditions
) -> tuple[float, list[dict[str, Any]]]:
    """Return the seconds of some episodes and their results without times."""
    started_s = time.perf_counter()
    outcomes = [o for _, o in pool.run([Job(e, how) for e in episodes])]
    return time.perf_counter() - started_s, _untimed(outcomes)


def _untimed(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    found = sorted((o.result for o in outcomes), key=lambda r: int(r["index"]))
    return [{k: v for k, v in r.items() if k != "timing"} for r in found]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write JSON."""
    parser = argparse.ArgumentParser(prog="bench_eval", description=__doc__)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--many", type=int, default=24)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--few-steps", type=int, default=60)
    parser.add_argument("--interval", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    options, overrides = parser.parse_known_args(argv)
    config = load_config(overrides)
    episodes = Suite("calvin", count=options.sequences).episodes()
    begun_s, load = time.monotonic(), os.getloadavg()[0]
    few = Conditions(options.few_steps, options.interval)
    how = Conditions(options.steps, options.interval)
    many = Suite("calvin", count=options.many).episodes()
    pair = workers(config, many, few, episodes, how, options.rounds)
    one = one_worker(config, episodes, few, options.rounds, pair["env_steps_per_sequence"])
    report = {
        "what": "CALVIN sequences in PlayTable, lockstep clock",
        "sequences": options.sequences,
        "steps_limit": options.steps,
        "interval": options.interval,
        "policy": config.system1.policy.model_dump(mode="json"),
        "system2": config.system2.engine.model_dump(mode="json"),
        "cores": os.cpu_count(),
        "load_before": load,
        "machine": platform.machine(),
        "one_process": one,
        "ray_workers": pair,
        "took_s": round(time.monotonic() - begun_s, 1),
    }
    text = json.dumps(report, indent=1) + "\n"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
