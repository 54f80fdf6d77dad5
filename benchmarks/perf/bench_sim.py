"""Simulator benchmark: steps per second, render, reset and restore times, memory.

Each round runs the same moves in every variant, one after the other, so that ratios hold on
a busy machine; reported are the best and the median round. `state` is `step` without
cameras (observation and info are gathered), `advance` is physics and logic alone, `cameras`
is `step` with both cameras, all three with the hand at the table and the blocks, where contacts
cost Bullet as much as everything else; `free_*` moves above them. The real calvin_env is measured beside them where it is
installed (it runs in its own process; each step pays one round trip).

    python -m openhelix.benchmarks.perf.bench_sim [--rounds 8] [--steps 120] [--calvin auto|no] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from openhelix.benchmarks.calvin.appearance import Appearance
from openhelix.benchmarks.calvin.cameras import SceneRenderer
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.perf.places import results_file
from openhelix.runtime.core.interfaces import F64
from openhelix.runtime.core.plugins import ResolveError, resolve

CALVIN = "openhelix.benchmarks.calvin.calvin_env:CalvinEnv"
MEMORY_ENVS = 4


def start() -> F64:
    """A scene_obs with all three blocks at rest: table, table, cabinet."""
    obs = np.zeros(24)
    obs[6:12] = (0.05, -0.12, 0.46, 0, 0, 1.5)
    obs[12:18] = (0.23, -0.12, 0.46, 0, 0, 0.3)
    obs[18:24] = (-0.24, 0.0924, 0.461, 0, 0, 0)
    return obs


def moves(steps: int) -> list[F64]:
    """Relative actions that sweep over the table, down to the blocks, with the gripper."""
    rng = np.random.default_rng(0)
    made: list[F64] = []
    for i in range(steps):
        if i % 15 == 0:
            velocity, gripper = rng.uniform(-1, 1, 6), rng.choice([-1.0, 1.0])
            velocity[2] = -1.0 if i < 15 else velocity[2] * 0.5
            velocity[3:5] *= 0.3
        made.append(np.array([*velocity, gripper]))
    return made


def free_moves(steps: int) -> list[F64]:
    """Relative actions in loops above the table: the arm touches nothing, the blocks rest."""
    phase = np.arange(steps) * (2 * np.pi / 40)
    made = np.zeros((steps, 7))
    made[:, 0], made[:, 1], made[:, 5] = np.cos(phase), np.sin(phase), 0.5 * np.cos(phase)
    made[:, 2] = 0.5 * np.sin(phase)
    made[:, 6] = np.where(np.arange(steps) // 30 % 2, 1.0, -1.0)
    return list(made)


def timed(work: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def episode(env: Any, actions: list[F64], step: str = "step") -> float:
    """Seconds for all `actions` after a reset that is not counted."""
    env.reset(None, start())
    do = getattr(env, step)

    def run() -> None:
        for action in actions:
            do(action)

    return timed(run)


def summary(values: list[float], digits: int = 2) -> dict[str, float]:
    """Median and best of some times."""
    return {
        "median": round(statistics.median(values), digits),
        "best": round(min(values), digits),
    }


def rates(steps: int, seconds: list[float]) -> dict[str, float]:
    """Steps per second, median and best of some rounds."""
    return {
        "median": round(steps / statistics.median(seconds), 1),
        "best": round(steps / min(seconds), 1),
    }


def calvin_or_none(choice: str) -> Callable[..., Any] | None:
    """CalvinEnv's class if it is wanted and installed."""
    if choice == "no":
        return None
    try:
        module, kind = (
            resolve("openhelix.benchmarks.calvin.calvin_env:is_installed"),
            resolve(CALVIN),
        )
    except ResolveError:
        return None
    return kind if module() else None


def measure_rates(rounds: int, steps: int, calvin: Callable[..., Any] | None) -> dict[str, Any]:
    """Steps per second of every variant, in alternating rounds."""
    low, free = moves(steps), free_moves(steps)
    blind, sighted = PlayTableEnv("D", cameras=()), PlayTableEnv("D")
    variants: dict[str, tuple[Any, str, list[F64]]] = {
        "free_advance": (blind, "advance", free),
        "free_state": (blind, "step", free),
        "advance": (blind, "advance", low),
        "state": (blind, "step", low),
        "cameras": (sighted, "step", low),
    }
    if calvin is not None:
        blind_calvin = calvin("D", cameras=())
        variants["calvin_free_state"] = (blind_calvin, "step", free)
        variants["calvin_state"] = (blind_calvin, "step", low)
        variants["calvin_cameras"] = (calvin("D"), "step", low)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for env, step, actions in variants.values():
        episode(env, actions[:10], step)
    for _ in range(rounds):
        for name, (env, step, actions) in variants.items():
            seconds[name].append(episode(env, actions, step))
    figures: dict[str, Any] = {
        f"{name}_steps_per_s": rates(steps, s) for name, s in seconds.items()
    }
    if calvin is not None:
        for kind in ("free_state", "state", "cameras"):
            pairs = zip(seconds[f"calvin_{kind}"], seconds[kind], strict=True)
            figures[f"{kind}_speedup"] = round(statistics.median(a / b for a, b in pairs), 1)
    figures["restore_ms_per_100_steps"] = summary(restore_times(blind, low, rounds))
    for env, _, _ in variants.values():
        env.close()
    return figures


def restore_times(env: PlayTableEnv, actions: list[F64], rounds: int) -> list[float]:
    """Milliseconds to restore a state, for each 100 steps since its reset."""
    episode(env, actions)
    state = env.state()
    times = []
    for _ in range(rounds):
        env.reset()
        times.append(timed(lambda: env.restore(state)) * 1e5 / len(actions))
    return times


def measure_views(rounds: int) -> dict[str, Any]:
    """Milliseconds a view, a reset and a construction."""
    figures: dict[str, Any] = {}
    repeat = 20
    with PlayTableEnv("D", cameras=()) as env:
        env.reset(None, start())
        for _ in range(20):
            env.step(np.array([0.3, -0.2, -1, 0, 0, 0, 1.0]))
        state = env.visual_state()
        resets = [timed(lambda: env.reset(None, start())) * 1e3 for _ in range(rounds)]
    for name, look in (("", None), ("_randomised", Appearance.random(1))):
        for camera in ("static", "gripper"):
            renderer = SceneRenderer("D", (camera,), look)
            renderer.render(state)

            def draw(renderer: SceneRenderer = renderer) -> None:
                for _ in range(repeat):
                    renderer.render(state)

            times = [timed(draw) * 1e3 / repeat for _ in range(rounds)]
            figures[f"{camera}{name}_render_ms"] = summary(times)
    figures["reset_ms"] = summary(resets)
    figures["construct_ms"] = summary(
        [timed(lambda: PlayTableEnv("D").close()) * 1e3 for _ in range(rounds)]
    )
    return figures


MEMORY_CODE = f"""
import json, os, psutil, time
begin = time.perf_counter()
from openhelix.benchmarks.calvin.env import PlayTableEnv
rss = lambda: psutil.Process(os.getpid()).memory_info().rss / 2**20
envs, sizes = [], []
for _ in range({MEMORY_ENVS}):
    envs.append(PlayTableEnv("D"))
    if len(envs) == 1:
        first_s = time.perf_counter() - begin
    for _ in range(30):
        envs[-1].step([0.2, -0.2, -1, 0, 0, 0, 1])
    sizes.append(rss())
print(json.dumps([sizes, first_s]))
"""


def measure_memory() -> dict[str, float]:
    """Resident memory of a fresh process with one env, and of each further env."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_CODE], capture_output=True, text=True, check=True
    )
    sizes, first_s = json.loads(done.stdout.splitlines()[-1])
    return {
        "process_with_one_env_mib": round(sizes[0], 1),
        "each_further_env_mib": round((sizes[-1] - sizes[0]) / (len(sizes) - 1), 1),
        "import_and_first_env_s": round(first_s, 2),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=120, help="of each round")
    parser.add_argument("--calvin", choices=("auto", "no"), default="auto")
    parser.add_argument("--out", type=Path, default=results_file("sim.json"))
    args = parser.parse_args()
    load_before = os.getloadavg()[0]
    figures: dict[str, Any] = {
        "machine": {
            "cpu": platform.machine(),
            "cores": psutil.cpu_count(),
            "load_before": round(load_before, 2),
        },
        **measure_rates(args.rounds, args.steps, calvin_or_none(args.calvin)),
        **measure_views(args.rounds),
        **measure_memory(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
