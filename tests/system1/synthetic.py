"""A tiny world whose expert can be learnt: a coloured square says where to go.

The static camera looks straight down at a plane 0.5 m away. A bright square lies in it; the
expert moves towards it at constant speed, and the task says with which gripper state.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from openhelix.runtime.core.files import replace_file
from openhelix.runtime.core.interfaces import CameraFrame, LatentSpec
from openhelix.system1.cache import (
    Columns,
    chunk_targets,
    index_bytes,
    pictures,
    shard_bytes,
)
from openhelix.system1.config import KEYPOSES, PolicyConfig
from openhelix.system1.sentences import Sentences

SPEED_M = 0.01  # a step


TASKS, SAID = ["open it", "close it"], ["open", "close"]
SENTENCES = "said.safetensors"


def make_cache(
    folder: Path, config: PolicyConfig, episodes: int = 12, frames: int = 8, shards: int = 1
) -> None:
    """Write a cache as production does, and beside it (`SENTENCES`) what its tasks are told by."""
    rng = np.random.default_rng(0)
    parts = [make_episode(config, number, frames, rng) for number in range(episodes)]
    folder.mkdir(parents=True, exist_ok=True)
    codes = torch.tensor(rng.normal(size=(2, 1, config.latent_dim)), dtype=torch.float32)
    spec = LatentSpec("act_last", 1, config.latent_dim, "fake0")
    Sentences(codes, torch.tensor([0, 1]), SAID, spec, len(TASKS)).save(folder / SENTENCES)
    listed = []
    for number, some in enumerate(np.array_split(np.arange(episodes), shards)):
        name = f"shard-{number:05d}.safetensors"
        own = [parts[i] for i in some]
        replace_file(folder / name, shard_bytes(own, config, len(TASKS), len(SAID)))
        listed.append({"file": name, "frames": sum(len(part["task"]) for part in own)})
    replace_file(folder / "cache.json", index_bytes(config, TASKS, SAID, listed))


def make_episode(
    config: PolicyConfig, episode: int, frames: int, rng: np.random.Generator
) -> Columns:
    flip = np.diag([1.0, -1.0, -1.0, 1.0])  # camera looks down
    flip[:3, 3] = (0.0, 0.0, 0.5)
    goal, start = rng.uniform(-0.15, 0.15, 2), rng.uniform(-0.1, 0.1, 2)
    way = goal - start
    steps = np.minimum(1, SPEED_M * np.arange(frames + 1) / np.linalg.norm(way))
    task = episode % 2
    opened = float(task == 0)
    path = np.zeros((frames + 1, 8))
    path[:, :2] = start + steps[:, None] * way
    path[:, 6:] = 1.0, opened
    columns: Columns = {}
    for camera in config.cameras:
        side = camera.width
        k = np.array([[side, 0, side / 2], [0, side, side / 2], [0, 0, 1.0]])
        rgb = np.full((side, side, 3), 20, np.uint8)
        u, v = (side * (goal[0] / 0.5) + side / 2), (side * (-goal[1] / 0.5) + side / 2)
        lo = side // 10
        rgb[max(0, int(v) - lo) : int(v) + lo, max(0, int(u) - lo) : int(u) + lo] = 250
        depth = np.full((side, side), 0.5, np.float32)
        depth[:4, :4] = np.nan
        columns |= pictures([CameraFrame(0, rgb, depth, k, flip)] * frames, camera)
    reading = np.concatenate((path[:-1, :7], np.tile([0.04, opened], (frames, 1))), 1)
    end = np.array([*goal, 0.0, 0, 0, 0, 1], np.float32)

    def whole(value: int) -> torch.Tensor:
        return torch.full((frames,), value, dtype=torch.int32)

    return columns | {
        "proprio": torch.from_numpy(
            np.repeat(reading[:, None].astype(np.float32), config.nhist, 1)
        ),
        **chunk_targets(path[1:], range(frames), config.horizon),
        "keypose_pose": torch.from_numpy(np.tile(end, (frames, KEYPOSES, 1))),
        "keypose_open": torch.full((frames, KEYPOSES), opened),
        "task": whole(task),
        "instruction": whole(task),
        "episode": whole(episode),
        "step": torch.arange(frames, dtype=torch.int32),
        "steps_left": frames - torch.arange(frames, dtype=torch.int32),
    }
