"""Worlds to start in: where blocks, doors and lights are, drawn at random for a task.

Half of them follow CALVIN's layouts (its slots, its yaws), since that is what evaluation
starts from; the others put things anywhere that the scene allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import pi

import numpy as np

from benchmarks.dsvlabench.sequences import LAYOUTS, SWITCH_ON_M
from benchmarks.playtable.expert_control import ROBOT_XY_M
from benchmarks.playtable.expert_grasp import WIDEST_GRASP_M
from benchmarks.playtable.scene import BLOCK_SIDE_M, DRAWER_TRAVEL_M, Scene
from benchmarks.playtable.tasks import get_task
from runtime.types import F64

REACH_M = 0.83  # from the arm's base to a block, horizontally
DRAWER_Z_M, SHELF_Z_M, TABLE_Z_M = 0.362, 0.461, 0.46
APART_M = 0.105
ASKEW_RAD = 1.0  # of the long block in the cabinet, at most, for the hand to fit
PLACES = ("table", "slider_left", "slider_right")


@dataclass(slots=True)
class Layout:
    """A world in words and numbers: what `scene_obs` is made from.

    Attributes:
        slide, drawer, switch: joint positions, m.
        bulb, led: 0 or 1.
        place: where each block is: "table", "slider_left", "slider_right", "drawer" or
            "on <block>".
        exact: use CALVIN's slots instead of random places.
    """

    slide: float = 0.0
    drawer: float = 0.0
    switch: float = 0.0
    bulb: int = 0
    led: int = 0
    place: dict[str, str] = field(default_factory=dict)
    exact: bool = False


def random_layout(scene: Scene, rng: np.random.Generator) -> Layout:
    """A world of CALVIN's kind: one or two blocks on the table, the others in the cabinet."""
    layout = Layout(exact=bool(rng.uniform() < 0.5))
    layout.slide = scene.slide_travel if rng.uniform() < 0.5 else 0.0
    layout.drawer = DRAWER_TRAVEL_M if rng.uniform() < 0.5 else 0.0
    layout.bulb, layout.led = int(rng.integers(2)), int(rng.integers(2))
    layout.switch = SWITCH_ON_M if layout.bulb else 0.0
    if not layout.exact:
        layout.slide = _loosen(rng, layout.slide, scene.slide_travel)
        layout.drawer = _loosen(rng, layout.drawer, DRAWER_TRAVEL_M)
    names = list(rng.permutation(scene.blocks))
    in_cabinet = int(rng.integers(1, 3))
    sides = list(rng.permutation(PLACES[1:]))
    for i, name in enumerate(names):
        layout.place[name] = sides[i] if i < in_cabinet else "table"
    return layout


def _loosen(rng: np.random.Generator, value: float, travel: float) -> float:
    """A door is not always quite at its stop."""
    return float(np.clip(value + rng.uniform(-0.04, 0.04), 0.0, travel))


def layout_for(task: str, scene: Scene, rng: np.random.Generator) -> Layout:
    """A random world in which `task` (not one that needs a block in the hand) can be done."""
    layout = random_layout(scene, rng)
    words = task.split("_")
    family = get_task(task).family
    if family in ("rotate", "push") or task.endswith("_table"):
        _claim(layout, f"block_{words[1]}", "table")
    elif task.endswith("block_slider"):
        side = "left" if rng.uniform() < 0.5 else "right"
        _claim(layout, f"block_{words[1]}", f"slider_{side}")
        layout.slide = scene.slide_travel if side == "right" else 0.0
    elif task.endswith("block_drawer"):
        layout.drawer = DRAWER_TRAVEL_M
        layout.place[f"block_{words[1]}"] = "drawer"
    elif words[1] == "slider":
        layout.slide = 0.0 if words[2] == "left" else scene.slide_travel
        if not layout.exact:
            layout.slide = _loosen(rng, layout.slide, scene.slide_travel)
    elif words[1] == "drawer":
        layout.drawer = 0.0 if words[0] == "open" else DRAWER_TRAVEL_M
        if not layout.exact:
            layout.drawer = _loosen(rng, layout.drawer, DRAWER_TRAVEL_M)
    elif family == "light":
        before = int(words[1] == "off")
        if words[2] == "led":
            layout.led = before
        else:
            layout.bulb, layout.switch = before, SWITCH_ON_M * before
    elif family == "unstack":
        bottom, top = list(rng.permutation(scene.blocks))[:2]
        _claim(layout, bottom, "table")
        layout.place[top] = f"on {bottom}"
    elif family == "push_into":
        layout.drawer = DRAWER_TRAVEL_M
        names = list(rng.permutation(scene.blocks))
        layout.place = dict(zip(names, PLACES, strict=True))
    return layout


def _claim(layout: Layout, name: str, place: str) -> None:
    """Put a block at a place; in the cabinet, whoever was there takes its place."""
    before = layout.place[name]
    for other, where in layout.place.items():
        if where == place != "table":
            layout.place[other] = before
    layout.place[name] = place


def scene_obs(layout: Layout, scene: Scene, rng: np.random.Generator) -> F64 | None:
    """The (24,) vector of a layout; None where the blocks did not fit."""
    values = np.zeros(24)
    values[:2] = layout.slide, layout.drawer
    values[3:6] = layout.switch, layout.bulb, layout.led
    poses: dict[str, F64] = {}
    slots = [np.array(slot) for slot in rng.permutation(np.array(LAYOUTS[scene.name].table))]
    order = sorted(scene.blocks, key=lambda name: layout.place[name].startswith("on "))
    for name in order:
        pose = _block_pose(name, layout, scene, rng, poses, slots)
        if pose is None:
            return None
        poses[name] = pose
    for i, name in enumerate(scene.blocks):
        values[6 + 6 * i : 12 + 6 * i] = poses[name]
    return values


def _block_pose(
    name: str,
    layout: Layout,
    scene: Scene,
    rng: np.random.Generator,
    taken: Mapping[str, F64],
    slots: list[F64],
) -> F64 | None:
    place = layout.place[name]
    if place.startswith("on "):
        base = taken[place[3:]]
        shift = rng.uniform(-0.004, 0.004, 2)
        yaw = base[5] + rng.uniform(-0.25, 0.25) + rng.integers(2) * pi / 2
        spot = np.array([base[0] + shift[0], base[1] + shift[1], base[2] + BLOCK_SIDE_M])
        return np.array([*spot, 0.0, 0.0, yaw])
    if layout.exact and place in PLACES and (slots or place != "table"):
        fixed = slots.pop() if place == "table" else getattr(LAYOUTS[scene.name], place)
        return np.array([*fixed, 0.0, 0.0, rng.uniform(3 * pi / 8, 5 * pi / 8)])
    for _ in range(60):
        spot = _anywhere(place, layout, scene, rng)
        gaps = [np.linalg.norm(spot[:2] - other[:2]) for other in taken.values()]
        if all(gap > APART_M for gap in gaps) and in_reach(spot):
            return np.array([*spot, 0.0, 0.0, _any_yaw(name, place, scene, rng)])
    return None


def _any_yaw(name: str, place: str, scene: Scene, rng: np.random.Generator) -> float:
    """Any yaw; but the long block has no room to be grasped lengthwise in the cabinet."""
    if place.startswith("slider") and dict(scene.block_lengths)[name] > WIDEST_GRASP_M:
        return float(pi / 2 + rng.uniform(-ASKEW_RAD, ASKEW_RAD) + rng.integers(2) * pi)
    return float(rng.uniform(-pi, pi))


def _anywhere(place: str, layout: Layout, scene: Scene, rng: np.random.Generator) -> F64:
    if place == "drawer":
        x = scene.drawer_x + rng.uniform(-0.12, 0.12)
        return np.array([x, -layout.drawer - rng.uniform(0.02, 0.11), DRAWER_Z_M])
    surface = dict(scene.surfaces)[place]
    z = TABLE_Z_M if place == "table" else SHELF_Z_M
    return np.array([rng.uniform(*surface.x), rng.uniform(*surface.y), z])


def in_reach(spot: F64) -> bool:
    return bool(np.hypot(spot[0] - ROBOT_XY_M[0], spot[1] - ROBOT_XY_M[1]) < REACH_M)
