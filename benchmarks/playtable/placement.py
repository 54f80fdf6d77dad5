"""Where the blocks start: given poses, or drawn until none touch."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from benchmarks.playtable.physics import World, quaternion_from_euler
from runtime.types import F64

PLACEMENT_TRIES = 1000


def put_blocks(world: World, poses: F64) -> None:
    """Put the blocks at poses (3, 6 with euler or 7 with quaternion xyzw), in scene order."""
    for name, pose in zip(world.scene.blocks, poses, strict=True):
        rotation = pose[3:]
        quaternion = quaternion_from_euler(rotation) if len(rotation) == 3 else rotation
        world.set_block_pose(name, pose[:3], quaternion)


def place_blocks(world: World, rng: np.random.Generator) -> None:
    """Draw a surface, a position on it and a yaw for each block until none touch.

    Raises:
        RuntimeError: they still touch after 1000 draws.
    """
    surfaces = [surface for _, surface in world.scene.surfaces]
    for _ in range(PLACEMENT_TRIES):
        for name in world.scene.blocks:
            surface = surfaces[rng.integers(len(surfaces))]
            x, y = rng.uniform(*surface.x), rng.uniform(*surface.y)
            yaw = rng.uniform(-np.pi, np.pi)
            world.set_block_pose(name, (x, y, surface.z), quaternion_from_euler((0.0, 0.0, yaw)))
        world.substep()
        if not any(world.touching(a, b) for a, b in combinations(world.blocks.values(), 2)):
            return
    raise RuntimeError(f"blocks still touch after {PLACEMENT_TRIES} placements")
