"""Scenes generated beside A to D: `R0`, `R1`, ..., each from its number alone.

What A to C have in common is kept (the furniture's parts, their heights and depths, which
side of the cabinet the switch is on); where they differ, a generated scene differs within the
same limits, and as their mirror images do: cabinet left or right of the middle, button and
switch on either side (the drawer only as far left as the arm's foot allows). Nothing is drawn
from scene D, which is held out: a layout is drawn again while it is as near to D's, as a whole,
as the nearest of A to C is.

Each number is a scene with its own look, camera, friction and rest of the arm, so that
whatever is trained on many of them can rely on none of these.
"""

from __future__ import annotations

import re
import zlib
from functools import lru_cache

import numpy as np

from openhelix.benchmarks.calvin.scene import (
    BIG,
    BLOCK_COLOURS,
    MIDDLE,
    SCENES,
    SMALL,
    Scene,
    Surface,
    Variant,
)
from openhelix.runtime.core.types import F64

NUMBERED = re.compile(r"R(0|[1-9]\d{0,4})")
MOST_SCENES = 100_000
KEPT_FROM = 90_000  # from this number on scenes are for choices; nothing is trained on them
TRAINING = ("A", "B", "C")

CABINET_HALF_X, DOOR_X = 0.26, 0.28  # as in `geometry`; the door's origin is its left edge
TABLE_X = (-0.35, 0.35)  # where blocks are put: A's, B's and C's areas together
SWITCH_HALF_X, LED_HALF_X, BULB_RADIUS = 0.0605, 0.08, 0.028
BUTTON_ROOM_M = 0.09  # from the button's middle to the nearest block's, at the start
# (low, high) of what is drawn evenly; |x| of A to C: cabinet .08-.10, drawer .10-.18, button
# .12-.28, switch .30-.32; travel .24-.304; the door overhangs the cabinet by 0-.036
CABINET_X, DRAWER_X, BUTTON_X, SWITCH_X = (0.06, 0.12), (-0.02, 0.18), (0.08, 0.30), (0.28, 0.34)
TRAVEL, OVERHANG = (0.24, 0.304), (0.0, 0.036)
SUPPORTS = ("box", "hull", "mesh")
SIZES = {SMALL: (0.037, 0.046), MIDDLE: (0.050, 0.058), BIG: (0.070, 0.088)}


def is_held_out(scene: Scene) -> bool:
    """Whether nothing is to be learned in a scene: D, and the numbers kept for choices."""
    if scene.variant is None:
        return scene.name not in TRAINING
    return int(scene.name[1:]) >= KEPT_FROM


def layout_vector(scene: Scene) -> F64:
    """(9,) m: where door, drawer, button, switch and cabinet are, how far the door moves, and
    the lengths of the red, the blue and the pink block."""
    lengths = dict(scene.block_lengths)
    fixtures = (scene.slide_x, scene.slide_travel, scene.drawer_x, scene.button_x)
    rest = (scene.switch_x, scene.plank_x, *(lengths[name] for name in BLOCK_COLOURS))
    return np.array([*fixtures, *rest])


def layout_distance(one: Scene, other: Scene) -> float:
    """How far apart two layouts are as a whole, m: the length of their vectors' difference."""
    return float(np.linalg.norm(layout_vector(one) - layout_vector(other)))


def nearest_allowed() -> float:
    """What a generated scene's distance from D must exceed: that of the nearest of A to C."""
    return min(layout_distance(SCENES[name], SCENES["D"]) for name in TRAINING)


@lru_cache(maxsize=4096)
def random_scene(number: int) -> Scene:
    """The generated scene of that number."""
    rng = np.random.default_rng([zlib.crc32(b"scene"), number])
    while True:
        scene = _draw(f"R{number}", rng)
        if scene is not None and layout_distance(scene, SCENES["D"]) > nearest_allowed():
            return scene


def fits(scene: Scene) -> bool:
    """Whether nothing that is built in stands in the way of anything else."""
    own = scene.variant
    led_x = scene.button_x + (own.led_dx if own else 0.0)
    bulb_x = scene.switch_x + (own.bulb_dx if own else 0.0)
    door = (scene.slide_x - scene.slide_travel, scene.slide_x + DOOR_X)
    cabinet = (scene.plank_x - CABINET_HALF_X, scene.plank_x + CABINET_HALF_X)
    low, high = min(door[0], cabinet[0]), max(door[1], cabinet[1])
    beside = max(low - scene.switch_x, scene.switch_x - high) - SWITCH_HALF_X
    return (
        beside > 0.03  # the hand comes in beside the door
        and abs(scene.switch_x) + SWITCH_HALF_X < 0.42
        and abs(led_x) + LED_HALF_X < 0.42
        and abs(led_x - bulb_x) > LED_HALF_X + BULB_RADIUS + 0.03
        and low > -0.42
        and high < 0.42
    )


def _between(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    return round(float(rng.uniform(*limits)), 4)


def _draw(name: str, rng: np.random.Generator) -> Scene | None:
    """One draw; None where its parts do not fit beside each other."""
    side = 1.0 if rng.uniform() < 0.5 else -1.0
    plank_x, travel = side * _between(rng, CABINET_X), _between(rng, TRAVEL)
    beyond = travel + DOOR_X - 2 * CABINET_HALF_X  # of the door's two ends together
    right = _between(rng, (max(beyond - OVERHANG[1], 0.0), min(beyond, OVERHANG[1])))
    slide_x = plank_x + CABINET_HALF_X + right - DOOR_X
    button_x = (1.0 if rng.uniform() < 0.5 else -1.0) * _between(rng, BUTTON_X)
    left = (plank_x - CABINET_HALF_X, slide_x)
    right_of = (slide_x - travel + DOOR_X, plank_x + CABINET_HALF_X)
    table = max(
        (TABLE_X[0], button_x - BUTTON_ROOM_M),
        (button_x + BUTTON_ROOM_M, TABLE_X[1]),
        key=lambda x: x[1] - x[0],
    )
    first = _between(rng, (table[0] + 0.02, table[1] - 0.20))
    scene = Scene(
        name=name,
        slide_x=round(slide_x, 4),
        slide_travel=travel,
        drawer_x=_between(rng, DRAWER_X),
        button_x=button_x,
        switch_x=-side * _between(rng, SWITCH_X),
        plank_x=plank_x,
        block_lengths=_blocks(rng),
        surfaces=(
            ("table", Surface(table, (-0.15, -0.03), 0.46)),
            ("slider_left", Surface((left[0] + 0.05, left[1] - 0.04), (0.05, 0.12), 0.46)),
            ("slider_right", Surface((right_of[0] + 0.06, right_of[1] - 0.03), (0.05, 0.12), 0.46)),
        ),
        wood="",
        panel_wood="",
        variant=Variant(
            led_dx=_between(rng, (-0.02, 0.02)),
            bulb_dx=_between(rng, (-0.02, 0.02)),
            slider_left_x=sum(left) / 2 + _between(rng, (-0.015, 0.015)),
            slider_right_x=sum(right_of) / 2 + _between(rng, (0.0, 0.03)),
            table_x=(first, first + 0.18),
            block_friction=_between(rng, (0.6, 0.8)),
            finger_friction=_between(rng, (0.85, 1.15)),
            table_friction=_between(rng, (0.4, 0.6)),
            support=str(rng.choice(SUPPORTS)),
            tip_bulge_m=_between(rng, (0.0, 0.0018)),
            home_rad=tuple(np.clip(rng.normal(0.0, 0.04, 7), -0.1, 0.1).round(4).tolist()),
            orbit_rad=(_between(rng, (-0.09, 0.09)), _between(rng, (-0.07, 0.07))),
            distance=_between(rng, (0.96, 1.08)),
            target_m=tuple(rng.uniform(-0.02, 0.02, 3).round(4).tolist()),
            fov=(_between(rng, (0.98, 1.06)), _between(rng, (0.97, 1.03))),
            crosswise=(bool(rng.uniform() < 0.5), bool(rng.uniform() < 0.5)),
            look=int(rng.integers(1 << 30)),
        ),
    )
    return scene if fits(scene) else None


def _blocks(rng: np.random.Generator) -> tuple[tuple[str, float], ...]:
    """Colours, sizes and order at random."""
    sizes = rng.permutation(list(SIZES))
    names = rng.permutation(list(BLOCK_COLOURS))
    return tuple(
        (str(name), _between(rng, SIZES[float(size)]))
        for name, size in zip(names, sizes, strict=True)
    )
