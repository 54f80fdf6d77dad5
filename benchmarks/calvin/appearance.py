"""How a scene looks: wood, light and camera noise, as one small record.

The default of each scene is CALVIN's look; `Appearance.random` draws another one from a
seed, so that training sees many worlds whose shapes and physics are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from openhelix.benchmarks.calvin.scene import Scene, get_scene
from openhelix.runtime.core.interfaces import F64, U8

Colour = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Wood:
    """A wood: mean colour in [0, 1], contrast of its grain, streaks a metre across it."""

    colour: Colour
    contrast: float
    streaks_per_m: float


WOODS = {
    "red_brown": Wood((0.477, 0.278, 0.184), 0.15, 60.0),
    "pale": Wood((0.957, 0.767, 0.547), 0.042, 48.0),
    "mid_brown": Wood((0.632, 0.43, 0.255), 0.12, 40.0),
    "olive_brown": Wood((0.62, 0.465, 0.308), 0.17, 26.0),
}
LIGHT_DIRECTION = (-50.0, 30.0, 100.0)  # from the scene towards the light, W, any length


@dataclass(frozen=True, slots=True)
class Appearance:
    """Everything about the look that is not geometry.

    Attributes:
        wood, panel_wood: table; door and drawer.
        texture_seed: seed of the grain.
        floor: the two tile colours.
        handle, robot: colour of handles; tint of the arm.
        light_direction: towards the light, W.
        ambient, diffuse, specular: strengths; 0.6, 0.35, 0.05 is CALVIN's CPU renderer.
        light_colour: multiplies everything.
        rgb_noise, depth_noise_m: standard deviations, of colour in [0, 1] and of depth.
        camera_shift_m, camera_turn_rad: standard deviation of a fixed error of each camera's
            pose, drawn from `noise_seed`; frames carry the true pose.
        noise_seed: seed of noise and pose errors.
        crosswise: whether the grain runs across, of the table; of door and drawer.
    """

    wood: Wood
    panel_wood: Wood
    texture_seed: int = 0
    floor: tuple[Colour, Colour] = ((0.87, 0.87, 0.87), (1.0, 1.0, 1.0))
    handle: Colour = (0.4, 0.4, 0.4)
    robot: Colour = (1.0, 1.0, 1.0)
    light_direction: tuple[float, float, float] = LIGHT_DIRECTION
    ambient: float = 0.6
    diffuse: float = 0.35
    specular: float = 0.05
    light_colour: Colour = (1.0, 1.0, 1.0)
    rgb_noise: float = 0.0
    depth_noise_m: float = 0.0
    camera_shift_m: float = 0.0
    camera_turn_rad: float = 0.0
    noise_seed: int = 0
    crosswise: tuple[bool, bool] = (False, False)

    @staticmethod
    def of(scene: str | Scene) -> Appearance:
        """The look of CALVIN's scene of that name; of a generated one its own, free of noise."""
        found = get_scene(scene)
        if found.variant is not None:
            plain = Appearance(WOODS["pale"], WOODS["pale"], crosswise=found.variant.crosswise)
            return replace(
                plain._drawn(found.variant.look),
                rgb_noise=0.0,
                depth_noise_m=0.0,
                camera_shift_m=0.0,
                camera_turn_rad=0.0,
            )
        return Appearance(
            wood=WOODS[found.wood],
            panel_wood=WOODS[found.panel_wood],
            texture_seed=ord(found.name[0]),
        )

    @staticmethod
    def random(seed: int, scene: str | Scene = "D") -> Appearance:
        """A look drawn from `seed`: other woods, grain, tiles, light and sensor noise."""
        return Appearance.of(scene)._drawn(seed)

    def _drawn(self, seed: int) -> Appearance:
        rng = np.random.default_rng(seed)
        wood = _random_wood(rng)
        same = rng.uniform() < 0.6
        grey = rng.uniform(0.15, 0.6)
        angle, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 3.0)
        warmth = rng.normal(0.0, 0.04)
        tile = rng.uniform(0.6, 1.0)
        tint = rng.uniform(0.85, 1.0)
        return replace(
            self,
            wood=wood,
            panel_wood=wood if same else _random_wood(rng),
            texture_seed=int(rng.integers(1 << 30)),
            floor=(
                (tile, tile, tile),
                _three(tile * rng.uniform(0.7, 1.0, 3).clip(0, 1)),
            ),
            handle=(grey, grey, grey),
            robot=(tint, tint, tint),
            light_direction=(float(np.cos(angle)), float(np.sin(angle)), height),
            ambient=float(rng.uniform(0.45, 0.7)),
            diffuse=float(rng.uniform(0.2, 0.45)),
            light_colour=_three(np.clip([1 + warmth, 1.0, 1 - warmth], 0, 1)),
            rgb_noise=float(rng.uniform(0.0, 0.02)),
            depth_noise_m=float(rng.uniform(0.0, 0.003)),
            camera_shift_m=0.003,
            camera_turn_rad=0.002,
            noise_seed=int(rng.integers(1 << 30)),
        )


def _three(values: np.ndarray) -> Colour:
    r, g, b = (float(v) for v in values)
    return r, g, b


def _random_wood(rng: np.random.Generator) -> Wood:
    value, warmth, yellow = rng.uniform(0.35, 1.0), rng.uniform(0.15, 0.45), rng.uniform(0.4, 0.75)
    blue = 1 - warmth
    colour = np.array([1.0, blue + (1 - blue) * yellow * 0.6, blue - 0.1]) * value
    return Wood(
        _three(colour.clip(0.05, 1)), float(rng.uniform(0.03, 0.2)), float(rng.uniform(25, 80))
    )


# -- Textures: wood grain and floor tiles, tileable, from a seed -----------------------
#
# Wood is a sum of tileable noise stretched along the grain (u): wide bands and thin dark
# lines bent by slow noise, fine streaks and pores. A texture is 1 m by 1 m.

TEXELS_PER_M = 512
TILE_M = 0.5


def _noise(rng: np.random.Generator, rows: int, columns: int, size: int) -> F64:
    """Smooth tileable noise (size, size) in about [-1, 1] with that many cells each way."""
    grid = rng.uniform(-1, 1, (rows, columns))
    out = grid
    for axis, cells in ((0, rows), (1, columns)):
        position = (np.arange(size) + 0.5) * cells / size
        low = np.floor(position).astype(int)
        t = position - low
        t = t * t * (3 - 2 * t)
        shape = (-1, 1) if axis == 0 else (1, -1)
        t = t.reshape(shape)
        first = np.take(out, low % cells, axis=axis)
        second = np.take(out, (low + 1) % cells, axis=axis)
        out = first * (1 - t) + second * t
    return out


@lru_cache(maxsize=16)
def wood_texture(wood: Wood, seed: int) -> U8:
    """Wood grain (512, 512, 3) u8, grain along the second axis."""
    rng = np.random.default_rng(seed)
    size = TEXELS_PER_M
    streaks = round(wood.streaks_per_m)
    across = np.arange(size)[:, None] / size
    bend = 0.035 * _noise(rng, 4, 2, size) + 0.012 * _noise(rng, 12, 4, size)
    bands = np.sin(2 * np.pi * round(streaks / 4) * (across + bend))
    lines = -np.clip(np.sin(2 * np.pi * streaks * (across + bend)) - 0.6, 0.0, None)
    fine = _noise(rng, 3 * streaks, 12, size) + _noise(rng, size // 2, 40, size)
    medium = _noise(rng, streaks, 6, size)
    cloud = _noise(rng, 5, 3, size)
    pores = np.minimum(_noise(rng, size // 2, 64, size) + 0.3, 0.0)
    value = 0.4 * bands + 1.6 * lines + 0.4 * medium + 0.5 * fine + 0.35 * cloud + 1.6 * pores
    value = (value - value.mean()) / value.std()
    colour = np.array(wood.colour)
    # Darker grain is also redder: green and blue vary more than red.
    spread = wood.contrast * np.array([0.65, 0.8, 1.0]) * 0.8
    image = colour * (1 + value[..., None] * spread)
    return np.asarray(np.clip(image * 255 + 0.5, 0, 255), dtype=np.uint8)


def floor_texture(colours: tuple[Colour, Colour]) -> U8:
    """Two by two square tiles (64, 64, 3) u8."""
    first, second = (np.array(c) * 255 for c in colours)
    image = np.empty((64, 64, 3))
    image[:] = second
    image[:32, :32] = image[32:, 32:] = first
    return image.astype(np.uint8)
