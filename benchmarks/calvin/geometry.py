"""The furniture as convex pieces, from which both collision shapes and visual meshes come.

One list of pieces a scene: each knows its link, its material and whether it can be touched
or seen, so that what the cameras show and what the fingers meet cannot drift apart. Where
the two differ on purpose (a rounded handle that collides as a box, a surface that rests a
block 1 mm higher) there is one piece for each.

Link frames: `base_link` W; `slide_link` and `switch_link` lean with the back panel (y up
the slope, z out of it); all others are W moved to the joint's origin.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin

import numpy as np

from openhelix.benchmarks.calvin.scene import (
    BUTTON_TRAVEL_M,
    DRAWER_TRAVEL_M,
    SLIDE_ANGLE_RAD,
    SWITCH_TRAVEL_M,
    TABLE_TOP_Z_M,
    Scene,
)
from openhelix.runtime.core.interfaces import F64

HALF_X, HALF_Y = 0.44, 0.18  # table outline
SLOPE_Y, SLOPE_TOP_Y, BACK_Z = 0.02, 0.14, 0.6478  # foot and top of the leaning panel
CABINET_HALF_X, CABINET_FLOOR_Z, CABINET_TOP_Z, CABINET_BACK_Y = 0.26, 0.42, 0.6278, 0.16
APRON_Z = (0.30, 0.40)
DOOR_SIZE_X, DOOR_HALF_Y = 0.28, 0.12
# Boxes touch only where they overlap: surfaces collide this much higher than blocks are
# placed, so that a block put down by a reset is in contact after the first substep.
REST_M = 5e-5

Vec3 = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Piece:
    """One convex solid of a link.

    Attributes:
        link: name of the table link it belongs to.
        vertices: (n, 3) corners in the link's frame, m; their hull is the solid.
        box: (centre, size) when it is an axis-aligned box, else None.
        material: what it looks like; empty when it is not seen.
        solid: whether it collides.
        grain: axis of the wood grain, 0 to 2.
        smooth: shade as a curved surface.
    """

    link: str
    vertices: F64
    box: tuple[Vec3, Vec3] | None
    material: str
    solid: bool
    grain: int = 0
    smooth: bool = False


@dataclass(frozen=True, slots=True)
class Joint:
    """How a link hangs on `base_link`: origin in W, roll about x, axis in the link's frame."""

    name: str
    link: str
    origin: Vec3
    roll_rad: float
    axis: Vec3 | None  # None: fixed
    travel_m: float
    mass_kg: float


def joints(scene: Scene) -> tuple[Joint, ...]:
    """The seven joints of the table, in the order of pybullet's link indices."""
    lean, own = SLIDE_ANGLE_RAD, scene.variant
    led_x = scene.button_x + (own.led_dx if own else 0.0)
    bulb_x = scene.switch_x + (own.bulb_dx if own else 0.0)
    return (
        Joint("base__button", "button_link", (scene.button_x, -0.12, 0.46), 0.0, (0, 0, -1), BUTTON_TRAVEL_M, 0.1538),
        Joint("base__switch", "switch_link", (scene.switch_x, 0.060928, 0.49489), lean, (0, 1, 0), SWITCH_TRAVEL_M, 0.2388),
        Joint("base__slide", "slide_link", (scene.slide_x, 0.075, 0.535264), lean, (-1, 0, 0), scene.slide_travel, 1.5435),
        Joint("base__drawer", "drawer_link", (scene.drawer_x, 0.0, 0.32), 0.0, (0, -1, 0), DRAWER_TRAVEL_M, 4.2313),
        Joint("base__led", "led_link", (led_x, 0.16, BACK_Z), 0.0, None, 0.0, 0.204),
        Joint("base__light", "light_link", (bulb_x, 0.16, BACK_Z), 0.0, None, 0.0, 0.174),
        Joint("base__plank", "plank_link", (scene.plank_x, 0.09, CABINET_FLOOR_Z), 0.0, None, 0.0, 2.844),
    )  # fmt: skip


def box(
    link: str,
    lo: Vec3,
    hi: Vec3,
    material: str = "wood",
    solid: bool = True,
    grain: int = 0,
) -> Piece:
    """An axis-aligned box from its two extreme corners."""
    low, high = np.array(lo, float), np.array(hi, float)
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    centre, size = (low + high) / 2, high - low
    return Piece(
        link,
        low + corners * size,
        ((centre[0], centre[1], centre[2]), (size[0], size[1], size[2])),
        material,
        solid,
        grain,
    )


def prism(
    link: str,
    x: tuple[float, float],
    profile_yz: list[tuple[float, float]],
    material: str = "wood",
    grain: int = 0,
) -> Piece:
    """A convex polygon in y, z, swept along x."""
    corners = np.array([[xi, y, z] for xi in x for y, z in profile_yz], float)
    return Piece(link, corners, None, material, True, grain)


def bar(
    link: str,
    lo: Vec3,
    hi: Vec3,
    chamfer: float,
    axis: int,
    material: str = "handle",
    solid: bool = False,
) -> Piece:
    """A box along `axis` whose four long edges are chamfered: a rod with eight faces."""
    a, b = [i for i in range(3) if i != axis]
    corners = []
    for end in (lo[axis], hi[axis]):
        for pa, qa in ((lo[a], chamfer), (hi[a], -chamfer)):
            for pb, qb in ((lo[b], chamfer), (hi[b], -chamfer)):
                for da, db in ((qa, 0.0), (0.0, qb)):
                    point = np.zeros(3)
                    point[axis], point[a], point[b] = end, pa + da, pb + db
                    corners.append(point)
    return Piece(link, np.array(corners), None, material, solid)


def disc(
    link: str,
    centre: Vec3,
    radius: float,
    height: float,
    material: str,
    solid: bool = True,
    sides: int = 24,
) -> Piece:
    """An upright cylinder standing on `centre`."""
    angles = np.arange(sides) * 2 * pi / sides
    ring = np.stack([np.cos(angles) * radius, np.sin(angles) * radius, np.zeros(sides)], axis=1)
    corners = np.concatenate([ring, ring + np.array([0.0, 0.0, height])]) + np.array(centre)
    return Piece(link, corners, None, material, solid)


def dome(link: str, centre: Vec3, radius: float, bottom: float, material: str) -> Piece:
    """A ball around `centre`, cut off flat `bottom` below it."""
    points = [[0.0, 0.0, radius]]
    for theta in np.linspace(0.15 * pi, pi, 8):
        z = max(radius * cos(theta), -bottom)
        r = (radius**2 - z**2) ** 0.5
        points += [[r * cos(p), r * sin(p), z] for p in np.arange(16) * pi / 8]
        if z <= -bottom:
            break
    return Piece(link, np.array(points) + np.array(centre), None, material, True, 0, True)


def _base(scene: Scene) -> list[Piece]:
    left, right = scene.plank_x - CABINET_HALF_X, scene.plank_x + CABINET_HALF_X
    wedge = [
        (SLOPE_Y, CABINET_FLOOR_Z),
        (HALF_Y, CABINET_FLOOR_Z),
        (HALF_Y, BACK_Z),
        (SLOPE_TOP_Y, BACK_Z),
        (SLOPE_Y, TABLE_TOP_Z_M),
    ]
    lintel = [
        (0.1285, CABINET_TOP_Z),
        (CABINET_BACK_Y, CABINET_TOP_Z),
        (CABINET_BACK_Y, BACK_Z),
        (SLOPE_TOP_Y, BACK_Z),
    ]
    base = "base_link"
    hole = (scene.drawer_x - 0.20, scene.drawer_x + 0.20)
    low, high = APRON_Z
    pieces = [
        box(base, (-HALF_X, -HALF_Y, 0.40), (HALF_X, SLOPE_Y, TABLE_TOP_Z_M + REST_M), ""),
        box(base, (-HALF_X, -HALF_Y, 0.40), (HALF_X, SLOPE_Y, TABLE_TOP_Z_M), solid=False),
        box(base, (-HALF_X, SLOPE_Y, 0.40), (HALF_X, HALF_Y, CABINET_FLOOR_Z)),
        prism(base, (-HALF_X, left), wedge),
        prism(base, (right, HALF_X), wedge),
        box(base, (left, CABINET_BACK_Y, CABINET_FLOOR_Z), (right, HALF_Y, BACK_Z)),
        prism(base, (left, right), lintel),
        disc(base, (scene.button_x, -0.12, TABLE_TOP_Z_M), 0.04, 0.02, "wood", sides=16),
        box(base, (-0.42, -0.16, low), (hole[0], 0.16, high)),
        box(base, (hole[0], 0.06, low), (hole[1], 0.16, high)),
        box(base, (hole[1], -0.16, low), (0.42, 0.16, high)),
        box(base, (hole[0], -0.16, low), (hole[1], 0.06, 0.32)),
    ]
    for x in (-HALF_X, HALF_X - 0.04):
        for y in (-HALF_Y, HALF_Y - 0.032):
            pieces.append(box(base, (x, y, 0.0), (x + 0.04, y + 0.032, 0.40), grain=2))
    for x in (scene.switch_x - 0.05, scene.switch_x + 0.05):  # slots that the switch slides in
        along = np.array(
            [(s * 0.5 + SLOPE_Y, s * 0.866025 + TABLE_TOP_Z_M) for s in (0.062, 0.178)]
        )
        corners = [
            [x + dx, y - 0.866025 * out, z + 0.5 * out]
            for dx in (-0.009, 0.009)
            for y, z in along
            for out in (-0.002, 0.0004)
        ]
        pieces.append(Piece(base, np.array(corners), None, "slot", False))
    return pieces


def _door() -> list[Piece]:
    link, w, h = "slide_link", DOOR_SIZE_X, DOOR_HALF_Y
    return [
        box(link, (0, -h - 0.0005, 0), (w, h + 0.0005, 0.0225), material=""),
        box(link, (0, -0.11, 0), (w, 0.11, 0.02), "panel", solid=False, grain=1),
        box(link, (0.1185, -0.081, 0.02), (0.1615, -0.0575, 0.081), ""),
        box(link, (0.1185, 0.0575, 0.02), (0.1615, 0.082, 0.081), ""),
        box(link, (0.1185, -0.0575, 0.0565), (0.1615, 0.0575, 0.081), ""),
        bar(link, (0.12, -0.08, 0.02), (0.16, -0.052, 0.08), 0.008, 2),
        bar(link, (0.12, 0.052, 0.02), (0.16, 0.08, 0.08), 0.008, 2),
        bar(link, (0.12, -0.08, 0.052), (0.16, 0.08, 0.08), 0.008, 1),
    ]


def _drawer() -> list[Piece]:
    """The drawer: in W's axes about (drawer_x, 0, 0.32); the front panel's face is at y -0.18."""
    link = "drawer_link"
    pieces = [
        box(link, (-0.18, -0.16, -0.001), (0.18, 0.04, 0.022 + REST_M), ""),
        box(link, (-0.18, -0.16, 0.0), (0.18, 0.04, 0.0205), "panel", solid=False),
        box(link, (-0.20, -0.16, 0.0), (-0.18, 0.06, 0.08), "panel", grain=1),
        box(link, (0.18, -0.16, 0.0), (0.20, 0.06, 0.08), "panel", grain=1),
        box(link, (-0.18, 0.04, 0.0), (0.18, 0.06, 0.08), "panel"),
        box(link, (-0.22, -0.181, -0.02), (0.22, -0.16, 0.08), ""),
        box(link, (-0.22, -0.18, -0.02), (0.22, -0.16, 0.0799), "panel", solid=False),
        box(link, (-0.1205, -0.261, 0.019), (-0.096, -0.181, 0.061), ""),
        box(link, (0.096, -0.261, 0.019), (0.1205, -0.181, 0.061), ""),
        box(link, (-0.096, -0.261, 0.019), (0.096, -0.2383, 0.061), ""),
    ]
    for x in (-0.12, 0.092):
        pieces.append(bar(link, (x, -0.26, 0.02), (x + 0.028, -0.181, 0.06), 0.008, 1))
    pieces.append(bar(link, (-0.12, -0.26, 0.02), (0.12, -0.232, 0.06), 0.008, 0))
    return pieces


def _small_parts() -> list[Piece]:
    switch = "switch_link"
    return [
        disc("button_link", (0, 0, 0), 0.032, 0.024, "button"),
        box(switch, (-0.0605, -0.0085, 0.0), (-0.0395, 0.0245, 0.065), ""),
        box(switch, (0.0395, -0.0085, 0.0), (0.0605, 0.0245, 0.065), ""),
        bar(switch, (-0.0395, -0.0085, 0.0425), (0.0395, 0.0245, 0.065), 0.004, 0, "", True),
        bar(switch, (-0.06, -0.008, 0.0), (-0.04, 0.024, 0.056), 0.008, 2),
        bar(switch, (0.04, -0.008, 0.0), (0.06, 0.024, 0.056), 0.008, 2),
        bar(switch, (-0.06, -0.008, 0.044), (0.06, 0.024, 0.064), 0.008, 0),
        box("led_link", (-0.08, -0.02, 0.0), (0.08, 0.02, 0.016), "led"),
        dome("light_link", (0, 0, 0.0216), 0.028, 0.0216, "bulb"),
        box("plank_link", (-0.26, -0.07, 0.0), (0.26, 0.07, 0.021 + REST_M), ""),
        box("plank_link", (-0.26, -0.07, 0.0), (0.26, 0.07, 0.02), "wood", solid=False),
    ]


def pieces(scene: Scene) -> list[Piece]:
    """Every piece of the table of `scene`."""
    return [*_base(scene), *_door(), *_drawer(), *_small_parts()]


def roll_matrix(roll_rad: float) -> F64:
    """Rotation about x as (3, 3)."""
    c, s = cos(roll_rad), sin(roll_rad)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])
