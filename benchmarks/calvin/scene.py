"""Scenes A to D as data: what stands where, how large, how heavy, how far it moves.

Everything that distinguishes one scene from another, and every constant that the four
share, is here; geometry, physics, rendering, tasks and experts read it and hold no numbers
of their own. World frame W: metres, radians, z up, table front towards -y.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin

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
        name: "A" to "D", or "R0", "R1", ... (`openhelix.benchmarks.calvin.random_scenes`).
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
    from openhelix.benchmarks.calvin.random_scenes import NUMBERED, random_scene

    if not NUMBERED.fullmatch(key):
        raise SceneError(
            f"scene: {scene!r} is not one of {', '.join(SCENES)}, nor R0, R1, ... (generated)"
        )
    return random_scene(int(key[1:]))
