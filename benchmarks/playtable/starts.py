"""Start states: a world in which a given task can be done, and an arm somewhere in it.

A task that begins with a block in the hand begins with an expert's grasp, and any task may
begin where another one has just ended.
"""

from __future__ import annotations

from math import pi
from typing import Any

import numpy as np

from benchmarks.dsvlabench.sequences import ROBOT_OBS
from benchmarks.playtable.env import PlayTableEnv
from benchmarks.playtable.expert_control import hand, wrap
from benchmarks.playtable.expert_grasp import WIDEST_GRASP_M
from benchmarks.playtable.expert_view import View
from benchmarks.playtable.geometry import CABINET_HALF_X, DOOR_SIZE_X
from benchmarks.playtable.layouts import ASKEW_RAD, Layout, in_reach, layout_for, scene_obs
from benchmarks.playtable.scene import (
    DRAWER_TRAVEL_M,
    SWITCH_THRESHOLD_M,
    Scene,
)
from benchmarks.playtable.tasks import TASK_NAMES, get_task
from runtime.types import F64


class StartError(RuntimeError):
    """No start state for a task was found."""


def random_arm(env: PlayTableEnv, rng: np.random.Generator) -> F64:
    """A `robot_obs` (15,) with the tool anywhere over the table; disturbs the arm of `env`."""
    for _ in range(20):
        spot = np.array([rng.uniform(-0.2, 0.32), rng.uniform(-0.32, -0.06), 0.0])
        spot[2] = rng.uniform(0.50, 0.66)
        tilt = max(rng.normal(0.0, 0.25), 0.0) if rng.uniform() < 0.4 else 0.0
        quaternion = hand(1.5 + float(np.clip(rng.normal(0, 0.5), -1.2, 1.2)), tilt)
        finger = 0.04 if rng.uniform() < 0.6 else 0.0
        env.robot.reset(ROBOT_OBS[7:14], finger)
        for _ in range(8):
            env.robot.reset(env.robot.solve_ik(spot, quaternion), finger)
        reached = np.array(env.robot.tcp()[0])
        if np.linalg.norm(reached - spot) < 0.004:
            width, grip = 2 * finger, 1.0 if finger else -1.0
            return np.array([*reached, 0.0, 0.0, 0.0, width, *env.robot.joints(), grip])
    return np.array(ROBOT_OBS)


def reset_to(env: PlayTableEnv, layout: Layout, rng: np.random.Generator) -> bool:
    """Reset `env` to a layout with an arm pose; False where the blocks did not fit."""
    world = scene_obs(layout, env.scene, rng)
    if world is None:
        return False
    robot = np.array(ROBOT_OBS) if rng.uniform() < 0.4 else random_arm(env, rng)
    env.reset(robot, world)
    return True


def feasible(view: View) -> list[str]:
    """The tasks that can be done from a state, by what is where (not by symbols)."""
    held = view.in_hand()
    if held is not None:
        return _with_block_in_hand(view, held)
    if any(view.gripped(name) for name in view.blocks):
        return []
    return [task for task in TASK_NAMES if _can(task, view)]


def _with_block_in_hand(view: View, held: str) -> list[str]:
    found = ["place_in_slider"]
    if view.drawer > 0.17:
        found.append("place_in_drawer")
    free = [n for n in view.blocks if n != held and _lies_free(view, n)]
    if free:
        found.append("stack_block")
    return found


def _opening(view: View) -> tuple[float, float]:
    scene = view.scene
    left, right = scene.plank_x - CABINET_HALF_X, scene.plank_x + CABINET_HALF_X
    door = scene.slide_x - view.slide
    gaps = [(left, max(door, left)), (min(door + DOOR_SIZE_X, right), right)]
    return max(gaps, key=lambda gap: gap[1] - gap[0])


def _lies_free(view: View, name: str) -> bool:
    """Alone on the table top, and within reach."""
    block = view.blocks[name]
    alone = block.touches == {(view.table_uid, view.links["base_link"])}
    x, y, z = block.position
    on_top = 0.45 < z < 0.47 and -0.16 < y < 0.0 and -0.40 < x < 0.40
    return bool(alone and on_top and in_reach(block.position))


def _can(task: str, view: View) -> bool:
    words, scene = task.split("_"), view.scene
    family = get_task(task).family
    name = f"block_{words[1]}"
    if family in ("rotate", "push") or task.endswith("_table"):
        if not _lies_free(view, name):
            return False
        return family != "push" or _room_to_push(view, name, 1 if words[3] == "right" else -1)
    if task.endswith("block_slider"):
        low, high = _opening(view)
        x = view.blocks[name].position[0]
        clear = low + 0.035 < x < high - 0.035 and not view.neighbours(name)
        block = view.blocks[name]
        askew = abs(wrap(block.yaw - pi / 2, pi))
        graspable = block.length < WIDEST_GRASP_M or askew < ASKEW_RAD
        return bool(view.on(name, "plank_link") and clear and graspable)
    if task.endswith("block_drawer"):
        alone = view.on(name, "drawer_link") and not view.neighbours(name)
        y = view.blocks[name].position[1]
        return bool(alone and view.drawer > 0.17 and y < -0.195)
    if words[1] == "slider":
        return view.slide < 0.06 if words[2] == "left" else view.slide > scene.slide_travel - 0.06
    if words[1] == "drawer":
        return view.drawer < 0.05 if words[0] == "open" else view.drawer > 0.16
    if family == "light":
        now = view.led if words[2] == "led" else view.bulb
        settled = words[2] == "led" or (view.switch > SWITCH_THRESHOLD_M) == bool(view.bulb)
        return settled and now == int(words[1] == "off")
    if family == "unstack":
        return _a_stack(view)
    lone = [n for n in view.blocks if _lies_free(view, n)]
    inside = [n for n in lone if abs(view.blocks[n].position[0] - scene.drawer_x) < 0.16]
    return family == "push_into" and view.drawer > 0.19 and len(lone) == 1 and bool(inside)


def _a_stack(view: View) -> bool:
    pairs = [n for n in view.blocks if view.neighbours(n)]
    tops = [n for n in pairs if view.blocks[n].position[2] > 0.485]
    return bool(len(pairs) == 2 and tops and in_reach(view.blocks[tops[0]].position))


def _room_to_push(view: View, name: str, way: int) -> bool:
    """Whether nothing stands in the block's way or in the hand's."""
    x, y, _ = view.blocks[name].position
    if not -0.42 < x + way * 0.11 < 0.47:
        return False
    for other, block in view.blocks.items():
        ahead = way * (block.position[0] - x)
        near = abs(block.position[1] - y) < 0.07 and block.position[2] < 0.55
        if other != name and near and -0.12 < ahead < 0.19:
            return False
    button = view.scene.button_x
    return not (abs(y + 0.12) < 0.065 and -0.06 < way * (button - x) < 0.17)


def begin(
    env: PlayTableEnv, task: str, rng: np.random.Generator, tries: int = 40
) -> dict[str, Any]:
    """Put `env` into a random state in which `task` can be done; return its info.

    About a third of the starts are the end of another task, and those with a block in the
    hand always are.

    Raises:
        UnknownTaskError: there is no such task.
        StartError: none was found in `tries` draws.
    """
    from benchmarks.playtable.demonstrations import perform, random_expert

    family = get_task(task).family
    for _ in range(tries):
        if family in ("place", "stack"):
            before = _task_before(env.scene, rng, task)
        else:
            before = None
        layout = layout_for(before or task, env.scene, rng)
        if task == "place_in_drawer":
            layout.drawer = DRAWER_TRAVEL_M
        if not reset_to(env, layout, rng):
            continue
        info = env.get_info()
        if before is None and rng.uniform() < 0.35:
            options = [t for t in feasible(View(env.scene, info)) if get_task(t).family != "lift"]
            options = [t for t in options if t != task]
            before = str(rng.choice(options)) if options else None
        if before is not None:
            tail = int(rng.integers(0, 4))
            if not perform(env, random_expert(env, before, rng), tail=tail).success:
                continue
            info = env.get_info()
        if task in feasible(View(env.scene, info)):
            return info
    raise StartError(f"task: no start state for {task} in scene {env.scene.name} in {tries} tries")


def _task_before(scene: Scene, rng: np.random.Generator, task: str) -> str:
    """A lift, after which a block is in the hand."""
    where = ["table", "table", "slider", "drawer"]
    place = where[int(rng.integers(len(where)))]
    return f"lift_{str(rng.choice(scene.blocks)).removeprefix('block_')}_block_{place}"
