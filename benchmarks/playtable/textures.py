"""Procedural textures: wood grain and floor tiles, tileable, from a seed.

Wood is a sum of tileable noise stretched along the grain (u): wide bands and thin dark
lines bent by slow noise, fine streaks and pores. A texture is 1 m by 1 m.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from benchmarks.playtable.appearance import Colour, Wood
from runtime.types import F64, U8

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
