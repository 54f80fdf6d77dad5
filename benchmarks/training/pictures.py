"""What System 2 sees and is told about a frame of the training cache.

Its pictures are those that `openhelix collect frames.system2_px=200` draws beside the cache,
at the size that the camera delivers; without them the policy's own smaller pictures of the
same camera are taken. Its sentences are all that the cache uses for the frame's task.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from runtime.config import ConfigError
from system1.data import Cache

log = logging.getLogger(__name__)
DRAWN = "system2"


class Pictures:
    """System 2's pictures of the frames of a cache.

    Args:
        cache: the frames.
        wanted: False for a System 2 without vision, which asks for none.

    Raises:
        ConfigError: some of them are missing, or the cache has no static camera.
    """

    def __init__(self, cache: Cache, wanted: bool = True) -> None:
        self._cache = cache
        self._parts: list[Any] = []
        self.source = "none"
        if not wanted:
            return
        files = [shard["file"] for shard in cache.meta["shards"]]
        sizes = [int(shard["frames"]) for shard in cache.meta["shards"]]
        self._starts = np.cumsum([0, *sizes])
        folder = cache.folder / DRAWN
        self.source = "the policy's, enlarged"
        if folder.is_dir():
            missing = [name for name in files if not (folder / name).is_file()]
            if missing:
                raise ConfigError(
                    f"data: {folder} lacks {missing[0]}; run `openhelix collect` again"
                )
            self._parts = [
                safe_open(folder / name, framework="pt").get_slice("rgb") for name in files
            ]
            self.source = "drawn at the camera's size"
        elif "static" not in cache.cameras:
            raise ConfigError(
                f"data: {cache.folder} has no camera 'static' for System 2 to look at"
            )
        else:
            log.info("System 2 sees the policy's small pictures: no %s", folder)

    def __call__(self, frames: Tensor) -> list[Image.Image]:
        """Return the pictures of frames (B,)."""
        if not self._parts:
            rgb = self._cache.gather("rgb.static", frames)
            return [Image.fromarray(image.numpy()) for image in rgb]
        out = []
        for frame in frames.tolist():
            shard = int(np.searchsorted(self._starts, frame, side="right")) - 1
            row = frame - int(self._starts[shard])
            out.append(Image.fromarray(self._parts[shard][row : row + 1][0].numpy()))
        return out


class Sentences:
    """Which of the cache's instructions belong to which task, and a frame's choice of them."""

    def __init__(self, cache: Cache, seed: int) -> None:
        self.texts: list[str] = cache.meta["instructions"]
        self._seed = seed
        self._task = cache.task
        said = cache.gather("instruction", torch.arange(len(cache))).long()
        pairs = torch.stack((cache.task, said), 1).unique(dim=0)
        tasks = range(len(cache.meta["tasks"]))
        self._of = {t: pairs[pairs[:, 0] == t, 1].numpy() for t in tasks}

    def of_frames(self, frames: Tensor, each: int) -> Tensor:
        """Return instructions (B, each) for frames (B,): different ones while there are enough.

        A frame's choice depends on the seed and the frame alone.
        """
        out = np.empty((len(frames), each), np.int64)
        for row, frame in enumerate(frames.tolist()):
            have = self._of[int(self._task[frame])]
            rng = np.random.default_rng([self._seed, frame])
            order = rng.permutation(have)
            out[row] = np.resize(order, each)
        return torch.from_numpy(out)

    def drawn(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """Return one instruction (B,) a frame, drawn anew."""
        shares = torch.rand(len(frames), generator=generator)
        picked = [
            self._of[int(self._task[frame])][int(share * len(self._of[int(self._task[frame])]))]
            for frame, share in zip(frames.tolist(), shares.tolist(), strict=True)
        ]
        return torch.tensor(picked)

    def first(self, task: int) -> str:
        """Return one sentence of a task; its name where the cache has none."""
        have = self._of[task]
        return self.texts[int(have[0])] if len(have) else f"task {task}"

    def __getitem__(self, index: Tensor) -> list[str]:
        """Return the sentences of indices (B,)."""
        return [self.texts[i] for i in index.tolist()]
