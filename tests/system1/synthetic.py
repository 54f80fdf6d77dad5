"""A tiny world whose expert can be learnt: a coloured square says where to go.

The static camera looks straight down at a plane 0.5 m away. A bright square lies in it; the
expert moves towards it at constant speed, and the task says with which gripper state.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from openhelix.runtime.core.interfaces import CameraFrame, LatentSpec
from openhelix.system1.cache import CacheWriter, chunk_targets, shrunk, write_latents
from openhelix.system1.config import KEYPOSES, PolicyConfig

SPEED_M = 0.01  # a step


def make_cache(folder: Path, config: PolicyConfig, episodes: int = 12, frames: int = 8) -> None:
    rng = np.random.default_rng(0)
    writer = CacheWriter(folder, config, ["open it", "close it"], ["open", "close"])
    flip = np.diag([1.0, -1.0, -1.0, 1.0])  # camera looks down
    flip[:3, 3] = (0.0, 0.0, 0.5)
    counts = []
    for episode in range(episodes):
        goal = rng.uniform(-0.15, 0.15, 2)
        start = rng.uniform(-0.1, 0.1, 2)
        way = goal - start
        steps = np.minimum(1, SPEED_M * np.arange(frames + 1) / np.linalg.norm(way))
        path = np.zeros((frames + 1, 7))
        path[:, :2] = start + steps[:, None] * way
        path[:, 6] = 1.0
        task = episode % 2
        columns: dict[str, list] = {}
        for step in range(frames):
            for camera in config.cameras:
                side = camera.width
                k = np.array([[side, 0, side / 2], [0, side, side / 2], [0, 0, 1.0]])
                rgb = np.full((side, side, 3), 20, np.uint8)
                u, v = (side * (goal[0] / 0.5) + side / 2), (side * (-goal[1] / 0.5) + side / 2)
                lo = side // 10
                rgb[max(0, int(v) - lo) : int(v) + lo, max(0, int(u) - lo) : int(u) + lo] = 250
                depth = np.full((side, side), 0.5, np.float32)
                depth[:4, :4] = np.nan
                kept = shrunk(CameraFrame(0, rgb, depth, k, flip), camera)
                for name, value in kept.items():
                    columns.setdefault(f"{name}.{camera.name}", []).append(value)
            reading = np.concatenate((path[step], [0.04, float(task == 0)])).astype(np.float32)
            columns.setdefault("proprio", []).append(np.repeat(reading[None], config.nhist, 0))
        arrays = {name: np.stack(values) for name, values in columns.items()}
        arrays |= chunk_targets(
            path[1:], np.full(frames, float(task == 0)), range(frames), config.horizon
        )
        end = np.concatenate(([*goal, 0.0], [0, 0, 0, 1])).astype(np.float32)
        arrays["keypose_pose"] = np.tile(end, (frames, KEYPOSES, 1))
        arrays["keypose_open"] = np.full((frames, KEYPOSES), float(task == 0), np.float32)
        arrays["task"] = np.full(frames, task, np.int32)
        arrays["instruction"] = np.full(frames, task, np.int32)
        arrays["step"] = np.arange(frames, dtype=np.int32)
        writer.add_episode(arrays)
        counts.append(task)
    writer.close()
    codes = rng.normal(size=(2, 1, config.latent_dim))
    rows = np.repeat(np.array(counts), frames)
    write_latents(
        folder,
        "fake",
        "shard-00000.safetensors",
        codes[rows][:, None],
        rows[:, None],
        LatentSpec("act_last", 1, config.latent_dim, "fake0"),
    )
