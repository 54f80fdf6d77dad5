"""PlayTable beside the real calvin_env, scene D: same states, same actions, both worlds.

Five comparisons: TCP error over 60 free-space steps, the step response and gripper curve,
eight scripted motions on the mechanisms, the 34 oracles on all ordered pairs of some thirty
states, and what both cameras see; then steps per second, side by side in one run (calvin_env's
measured inside its own process). Needs calvin_env, and says how to install it if it is missing.

    python -m openhelix.benchmarks.perf.compare_worlds [--steps 200] [--images DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin.calvin_env import CalvinEnv, CalvinUnusableError
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.sequences import get_sequences, initial_state
from openhelix.benchmarks.calvin.tasks import TASKS, completed
from openhelix.benchmarks.perf import world_scripts as scripts
from openhelix.benchmarks.perf.places import results_file

WORLDS = ("playtable", "calvin_env")
OUT = results_file("compare_worlds.json")
FREE_STEPS = 60
WORK_BOX = (np.array([-0.15, -0.30, 0.56]), np.array([0.25, -0.10, 0.70]))
Worlds = tuple[PlayTableEnv, CalvinEnv]


def free_space_actions(seed: int, start: np.ndarray) -> np.ndarray:
    """(60, 7) random relative actions whose target stays in a box above everything."""
    rng = np.random.default_rng(seed)
    target, rows = start.astype(np.float64).copy(), []
    action = np.zeros(7)
    for index in range(FREE_STEPS):
        if index % 6 == 0:
            action = np.append(rng.uniform(-1, 1, 6), rng.choice([-1.0, 1.0]))
            action[3:6] *= 0.4
        row = action.copy()
        inside = np.clip(target + 0.02 * row[:3], *WORK_BOX)
        row[:3] = np.clip((inside - target) / 0.02, -1, 1)
        target += 0.02 * row[:3]
        rows.append(row)
    return np.array(rows)


def free_space(worlds: Worlds, trials: int) -> dict[str, Any]:
    """TCP, joint and gripper differences over 60 steps of the same relative actions."""
    tcp, joints, width = [], [], []
    for trial in range(trials):
        state = initial_state(get_sequences(trial + 1)[trial][0])
        first = [env.reset(*state)["robot_obs"] for env in worlds]
        for action in free_space_actions(trial, first[0][:3]):
            a, b = (env.step(action)[0]["robot_obs"] for env in worlds)
            tcp.append(float(np.linalg.norm(a[:3] - b[:3])))
            joints.append(float(np.abs(a[7:14] - b[7:14]).max()))
            width.append(float(abs(a[6] - b[6])))
    return {
        "trials": trials,
        "steps": FREE_STEPS,
        "tcp_error_mm": {"mean": np.mean(tcp) * 1e3, "max": np.max(tcp) * 1e3},
        "joint_error_rad_max": np.max(joints),
        "gripper_width_error_mm_max": np.max(width) * 1e3,
    }


def responses(env: Any) -> dict[str, list[float]]:
    """Share of one full step reached after 1 to 8 control steps, and gripper widths."""
    found: dict[str, list[float]] = {}
    for name, axis, unit in (("x", 0, 0.02), ("z", 2, 0.02), ("yaw", 5, 0.05)):
        start = env.reset(np.array(scripts.ARM), scripts.scene_obs())["robot_obs"]
        action, shares = np.append(np.eye(6)[axis], 1.0), []
        for _ in range(8):
            now = env.step(action)[0]["robot_obs"]
            shares.append(round(float((now - start)[axis]) / unit, 4))
            action = np.append(np.zeros(6), 1.0)
        found[f"step_{name}"] = shares
    env.reset(np.array(scripts.ARM), scripts.scene_obs())
    for name, command in (("close_width_m", -1.0), ("open_width_m", 1.0)):
        hold = np.append(np.zeros(6), command)
        found[name] = [round(float(env.step(hold)[0]["robot_obs"][6]), 5) for _ in range(10)]
    return found


def run_script(env: Any, script: scripts.Script) -> dict[str, Any]:
    """Replay one motion and say what it did."""
    env.reset(np.array(scripts.ARM), script.scene_obs)
    start, first = env.get_info(), None
    observation, info = {}, start
    for index, action in enumerate(scripts.actions(script), start=1):
        observation, _, _, info = env.step(action)
        if first is None and script.task in completed(start, info):
            first = index
    joints = [round(float(v), 4) for v in observation["scene_obs"][:6]]
    return {
        "completed": sorted(completed(start, info)),
        "first_step": first,
        "slide_drawer_button_switch_bulb_led": joints,
    }


def mechanisms(worlds: Worlds) -> dict[str, Any]:
    """The eight scripted motions in both worlds."""
    rows = []
    for script in scripts.mechanism_scripts():
        results = {name: run_script(env, script) for name, env in zip(WORLDS, worlds, strict=True)}
        ours, theirs = results.values()
        equal = ours["completed"] == theirs["completed"] == [script.task]
        rows.append({"motion": script.name, "task": script.task, "equal": equal, **results})
    return {"equal": sum(row["equal"] for row in rows), "of": len(rows), "motions": rows}


def oracles(worlds: Worlds) -> dict[str, Any]:
    """The 34 oracles on every ordered pair of states, in both worlds."""
    placed = scripts.states(scripts.held_robot_obs(worlds[0]))
    infos: list[list[Any]] = []
    for env in worlds:
        infos.append([])
        for _, robot_obs, scene_obs in placed:
            env.reset(robot_obs, scene_obs)
            infos[-1].append(env.get_info())
    fired: set[str] = set()
    differing = []
    for i, j in permutations(range(len(placed)), 2):
        ours, theirs = (completed(world[i], world[j]) for world in infos)
        fired |= ours & theirs
        if ours != theirs:
            differing.append([placed[i][0], placed[j][0], sorted(ours ^ theirs)])
    return {
        "states": len(placed),
        "pairs": len(placed) * (len(placed) - 1),
        "tasks_that_fired_in_both": len(fired),
        "tasks_that_never_fired": sorted(set(TASKS) - fired),
        "pairs_that_differ": differing,
    }


def cameras(images: Path | None) -> dict[str, Any]:
    """Depth and colour differences, and pictures of both worlds one above the other."""
    report: dict[str, Any] = {}
    for scene in "ABCD":
        state = initial_state(get_sequences(1)[0][0], scene)
        with PlayTableEnv(scene) as ours, CalvinEnv(scene) as theirs:
            a, b = ours.reset(*state), theirs.reset(*state)
        for name in ("static", "gripper"):
            rgb = [o["rgb_obs"][f"rgb_{name}"] for o in (a, b)]
            depth = [o["depth_obs"][f"depth_{name}"] for o in (a, b)]
            gap = np.abs(depth[0] - depth[1])
            report[f"{scene}_{name}"] = {
                "depth_difference_mm_median": float(np.median(gap)) * 1e3,
                "pixels_beyond_10_mm": float((gap > 0.01).mean()),
                "mean_rgb": [np.round(image.mean((0, 1)), 1).tolist() for image in rgb],
            }
            if images is not None:
                save_pictures(images / f"worlds_{scene}_{name}.png", rgb, gap)
    return report


def save_pictures(path: Path, rgb: list[np.ndarray], gap: np.ndarray) -> None:
    """Ours, calvin_env's, and where their depths differ (white: 5 cm or more), left to right."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    grey = (np.clip(gap / 0.05, 0, 1) * 255).astype(np.uint8)
    sheet = np.concatenate([*rgb, np.repeat(grey[..., None], 3, axis=2)], axis=1)
    scale = 400 // sheet.shape[0]
    Image.fromarray(sheet.repeat(scale, 0).repeat(scale, 1)).save(path)


def speeds(steps: int, rounds: int = 3) -> dict[str, Any]:
    """Steps per second with both cameras and with none; the best of alternating rounds."""
    report: dict[str, Any] = {}
    for label, names in (("no_cameras", ()), ("both_cameras", ("static", "gripper"))):
        count = steps if names else 5 * steps
        with PlayTableEnv("D", cameras=names) as ours, CalvinEnv("D", cameras=names) as theirs:
            state = initial_state(get_sequences(1)[0][0])
            best = dict.fromkeys(WORLDS, 0.0)
            for _ in range(rounds):
                ours.reset(*state)
                theirs.reset(*state)
                begin = time.perf_counter()
                for _ in range(count):
                    ours.step([0, 0, 0, 0, 0, 0, 1])
                best["playtable"] = max(best["playtable"], count / (time.perf_counter() - begin))
                few = max(20, count // 5)
                best["calvin_env"] = max(best["calvin_env"], few / theirs.time_steps(few))
        report[label] = {
            **{f"{name}_steps_per_s": rate for name, rate in best.items()},
            "ratio": best["playtable"] / best["calvin_env"],
        }
    return report


def compare(steps: int, trials: int, images: Path | None) -> dict[str, Any]:
    """All comparisons."""
    with PlayTableEnv("D", cameras=()) as ours, CalvinEnv("D", cameras=()) as theirs:
        worlds = (ours, theirs)
        report = {
            "free_space": free_space(worlds, trials),
            "responses": {name: responses(env) for name, env in zip(WORLDS, worlds, strict=True)},
            "mechanisms": mechanisms(worlds),
            "oracles": oracles(worlds),
        }
    return {
        **report,
        "cameras": cameras(images),
        "speed": speeds(steps),
        "machine": {"cpu": platform.processor() or platform.machine()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="steps a timing round")
    parser.add_argument("--trials", type=int, default=10, help="free-space trials")
    parser.add_argument("--images", type=Path, help="folder for pictures of both worlds")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    try:
        report = compare(arguments.steps, arguments.trials, arguments.images)
    except CalvinUnusableError as error:
        raise SystemExit(str(error)) from None
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1, default=float) + "\n")
    print(json.dumps({k: report[k] for k in ("free_space", "speed")}, indent=1, default=float))


if __name__ == "__main__":
    main()
