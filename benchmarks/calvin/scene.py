"""Scenes A to D as data: what stands where, how large, how heavy, how far it moves.

Everything that distinguishes one scene from another, and every constant that the four
share, is here; geometry, physics, rendering, tasks and experts read it and hold no numbers
of their own. World frame W: metres, radians, z up, table front towards -y.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, sin

import numpy as np

from openhelix.runtime.core.interfaces import F64

TABLE_TOP_Z_M = 0.44
BLOCK_SIDE_M = 0.04  # y and z extent of every block; x is its length
CONTROL_HZ = 30
SUBSTEPS = 8
PHYSICS_HZ = CONTROL_HZ * SUBSTEPS
GRAVITY = -9.8
DOOR_FRICTION_N = 4.0  # zero-velocity motor on slide, drawer and switch
BUTTON_FORCE_N = 4.0  # position motor that pushes the button up

SLIDE_ANGLE_RAD = pi / 3  # the back panel leans away from the robot
SLOPE_UP = (0.0, cos(SLIDE_ANGLE_RAD), sin(SLIDE_ANGLE_RAD))
SLOPE_OUT = (0.0, -sin(SLIDE_ANGLE_RAD), cos(SLIDE_ANGLE_RAD))

SWITCH_TRAVEL_M = 0.088
BUTTON_TRAVEL_M = 0.02
DRAWER_TRAVEL_M = 0.22
SWITCH_THRESHOLD_M = SWITCH_TRAVEL_M / 2
BUTTON_THRESHOLD_M = BUTTON_TRAVEL_M / 2

ROBOT_BASE_M = (-0.34, -0.46, 0.24)
ROBOT_Q0_RAD = (
    -1.21779206,
    1.03987646,
    2.11978261,
    -2.34205014,
    -0.87015947,
    1.64119353,
    0.55344866,
)

# Link indices of the table body, as pybullet's contact tuples name them.
TABLE_LINKS = {
    "base_link": -1,
    "button_link": 0,
    "switch_link": 1,
    "slide_link": 2,
    "drawer_link": 3,
    "led_link": 4,
    "light_link": 5,
    "plank_link": 6,
}
BLOCK_COLOURS = {
    "block_red": (1.0, 0.0, 0.0),
    "block_blue": (0.0, 0.0, 1.0),
    "block_pink": (1.0, 0.0, 1.0),
}

Range = tuple[float, float]


class SceneError(ValueError):
    """An unknown scene, or a scene state that does not fit it."""


@dataclass(frozen=True, slots=True)
class Surface:
    """A spawn area on one support: x and y intervals and the height of block centres, m."""

    x: Range
    y: Range
    z: float


@dataclass(frozen=True, slots=True)
class Variant:
    """What a generated scene has of its own beyond what distinguishes A to D.

    Attributes:
        led_dx, bulb_dx: x of the LED from the button's, of the bulb from the switch's, m.
        slider_left_x, slider_right_x, table_x: CALVIN's slots for blocks, x in m.
        block_friction, finger_friction, table_friction: Bullet's lateral coefficients.
        support: how Bullet is given the table: "box" (CALVIN's shapes as boxes, each block on
            four corners), "hull" or "mesh" (the same shapes as convex or triangle meshes: other
            contact points, so that a pushed block turns otherwise).
        tip_bulge_m: how far the middle of a finger tip stands out; 0 is flat.
        home_rad: (7) what the arm's rest differs by from CALVIN's.
        orbit_rad, distance, target_m: how the static camera is put up otherwise than CALVIN's:
            turned about its target (to the side, upwards), nearer or farther (a factor), with
            its target (3) elsewhere.
        fov: factors of the static and of the gripper camera's field of view.
        crosswise: whether the grain of the table, and of door and drawer, runs across.
        look: seed of the scene's own look.
    """

    led_dx: float
    bulb_dx: float
    slider_left_x: float
    slider_right_x: float
    table_x: tuple[float, float]
    block_friction: float
    finger_friction: float
    table_friction: float
    support: str
    tip_bulge_m: float
    home_rad: tuple[float, ...]
    orbit_rad: tuple[float, float]
    distance: float
    target_m: tuple[float, float, float]
    fov: tuple[float, float]
    crosswise: tuple[bool, bool]
    look: int


@dataclass(frozen=True, slots=True)
class Scene:
    """One of CALVIN's four scenes, or one generated beside them.

    Attributes:
        name: "A" to "D", or "R0", "R1", ... (`openhelix.benchmarks.calvin.scene`).
        slide_x: x of the sliding door's origin when shut to the right; it moves to -x.
        slide_travel: how far the door moves, m.
        drawer_x, plank_x: x of each mechanism's centre.
        button_x: x of the button, and of the LED behind it.
        switch_x: x of the switch, and of the light bulb above it.
        block_lengths: length along x of each block, in the order of `scene_obs`.
        surfaces: spawn areas by name.
        wood: name of the palette of the table; `panel_wood` that of door and drawer.
        variant: what a generated scene has of its own; None for A to D.
    """

    name: str
    slide_x: float
    slide_travel: float
    drawer_x: float
    button_x: float
    switch_x: float
    plank_x: float
    block_lengths: tuple[tuple[str, float], ...]
    surfaces: tuple[tuple[str, Surface], ...]
    wood: str
    panel_wood: str
    variant: Variant | None = None

    @property
    def blocks(self) -> tuple[str, ...]:
        """Block names in the order of `scene_obs`."""
        return tuple(name for name, _ in self.block_lengths)


SMALL, MIDDLE, BIG = 0.04, 0.056, 0.08


def _surfaces(table: Range, left: Range, right: Range) -> tuple[tuple[str, Surface], ...]:
    return (
        ("table", Surface(table, (-0.15, -0.03), 0.46)),
        ("slider_left", Surface(left, (0.05, 0.12), 0.46)),
        ("slider_right", Surface(right, (0.05, 0.12), 0.46)),
    )


SCENES: dict[str, Scene] = {
    "A": Scene(
        name="A",
        slide_x=-0.10,
        slide_travel=0.28,
        drawer_x=0.10,
        button_x=-0.28,
        switch_x=0.30,
        plank_x=-0.10,
        block_lengths=(("block_pink", SMALL), ("block_blue", BIG), ("block_red", MIDDLE)),
        surfaces=_surfaces((-0.2, 0.35), (-0.32, -0.16), (-0.05, 0.13)),
        wood="red_brown",
        panel_wood="red_brown",
    ),
    "B": Scene(
        name="B",
        slide_x=0.088,
        slide_travel=0.304,
        drawer_x=0.18,
        button_x=0.28,
        switch_x=-0.32,
        plank_x=0.08,
        block_lengths=(("block_red", SMALL), ("block_blue", BIG), ("block_pink", MIDDLE)),
        surfaces=_surfaces((-0.35, 0.15), (-0.12, 0.06), (0.15, 0.33)),
        wood="pale",
        panel_wood="pale",
    ),
    "C": Scene(
        name="C",
        slide_x=0.06,
        slide_travel=0.24,
        drawer_x=0.10,
        button_x=-0.12,
        switch_x=-0.32,
        plank_x=0.08,
        block_lengths=(("block_blue", SMALL), ("block_red", BIG), ("block_pink", MIDDLE)),
        surfaces=_surfaces((0.0, 0.35), (-0.12, 0.06), (0.15, 0.30)),
        wood="mid_brown",
        panel_wood="red_brown",
    ),
    "D": Scene(
        name="D",
        slide_x=-0.10,
        slide_travel=0.28,
        drawer_x=0.18,
        button_x=-0.12,
        switch_x=0.30,
        plank_x=-0.10,
        block_lengths=(("block_red", MIDDLE), ("block_blue", SMALL), ("block_pink", BIG)),
        surfaces=_surfaces((0.0, 0.35), (-0.32, -0.16), (-0.05, 0.13)),
        wood="olive_brown",
        panel_wood="olive_brown",
    ),
}


def get_scene(scene: str | Scene) -> Scene:
    """Return the scene of that name; `calvin_scene_D` and `D` mean the same.

    `R17` is the generated scene number 17, the same at every call.

    Raises:
        SceneError: there is no such scene.
    """
    if isinstance(scene, Scene):
        return scene
    key = str(scene).removeprefix("calvin_scene_")
    if key in SCENES:
        return SCENES[key]
    if not NUMBERED.fullmatch(key):
        raise SceneError(
            f"scene: {scene!r} is not one of {', '.join(SCENES)}, nor R0, R1, ... (generated)"
        )
    return random_scene(int(key[1:]))


# -- Generated scenes ----------------------------------------------------------------
#
# Scenes generated beside A to D: `R0`, `R1`, ..., each from its number alone.
#
# What A to C have in common is kept (the furniture's parts, their heights and depths, which
# side of the cabinet the switch is on); where they differ, a generated scene differs within the
# same limits, and as their mirror images do: cabinet left or right of the middle, button and
# switch on either side (the drawer only as far left as the arm's foot allows). Nothing is drawn
# from scene D, which is held out: a layout is drawn again while it is as near to D's, as a whole,
# as the nearest of A to C is.
#
# Each number is a scene with its own look, camera, friction and rest of the arm, so that
# whatever is trained on many of them can rely on none of these.


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


# -- Lists of scenes -----------------------------------------------------------------
#
# Lists of scenes as people write them: `ABC`, `D`, `R17`, `random:0-199`, `ABC,R0-R199`.


_NUMBERS = re.compile(r"(?:random:R?|R)(\d+)(?:-R?(\d+))?")
WHAT = "letters out of ABCD, R17, random:0-199, or several of these with commas"


def scene_names(text: str) -> tuple[str, ...]:
    """The scenes that a list names, in its order.

    Raises:
        SceneError: it names none, an unknown one, or one twice.
    """
    names: list[str] = []
    for part in text.replace("calvin_scene_", "").split(","):
        numbers = _NUMBERS.fullmatch(part.strip())
        if numbers is None:
            wrong = [letter for letter in part.strip() if letter not in SCENES]
            if wrong or not part.strip():
                raise SceneError(f"{text!r} is no choice of scenes: {WHAT}")
            names += part.strip()
            continue
        first = int(numbers[1])
        last = first if numbers[2] is None else int(numbers[2])
        if not first <= last < MOST_SCENES:
            raise SceneError(
                f"{part.strip()!r} is no range of generated scenes; they are R0 to "
                f"R{MOST_SCENES - 1}"
            )
        names += [f"R{number}" for number in range(first, last + 1)]
    if len(set(names)) != len(names):
        raise SceneError(f"{text!r} names a scene twice")
    return tuple(names)


def written(names: tuple[str, ...]) -> str:
    """The shortest list that `scene_names` reads as these; fit for the name of a folder."""
    parts: list[str] = []
    span: list[int] = []

    def close() -> None:
        if span:
            parts.append(f"R{span[0]}" + (f"-R{span[-1]}" if len(span) > 1 else ""))
            span.clear()

    for name in names:
        if name.startswith("R"):
            if span and int(name[1:]) != span[-1] + 1:
                close()
            span.append(int(name[1:]))
        elif parts and not span and parts[-1].isalpha():
            parts[-1] += name
        else:
            close()
            parts.append(name)
    close()
    return ",".join(parts)
