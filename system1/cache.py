"""The training cache: what an expert saw and did, small enough to train from memory.

A folder holds `cache.json` and the shards that it lists, safetensors of any names. A shard's
tensors have one row a frame; the frames of an episode follow each other in time and an episode
never spans two shards.

    rgb.<camera>     (N, h, w, 3) uint8, at the policy's working size
    depth.<camera>   (N, h, w) uint16, units of 0.1 mm along the optical axis; 0 where there is
                     none, or it is beyond `FARTHEST_M` (float16 would round the static camera's
                     distance to 4 mm)
    K.<camera>       (N, 3, 3) float32, pixels of the stored image, centres at +0.5
    T.<camera>       (N, 4, 4) float32, camera to world
    proprio          (N, nhist, 9) float32: xyz (m), quaternion xyzw, gripper width (m),
                     gripper open (0 or 1); newest last
    target_pose      (N, H, 7) float32: row i is the TCP *target* in the world frame at
                     t_obs + (i + 1) / hz, xyz and quaternion xyzw
    target_open      (N, H) float32: openness commanded, 0 closed to 1 open
    target_mask      (N, H) bool: False past the end of the episode
    keypose_pose     (N, 2, 7) float32: where the TCP was at the next keypose, and when next the
                     gripper changed or, where it no more did, when the task was done
    keypose_open     (N, 2) float32: openness commanded from there on
    task             (N,) int32: index into `cache.json`'s tasks
    instruction      (N,) int32: index into its instructions
    episode, step    (N,) int32: which episode, and its environment step at 1 / hz
    group            (N,) int32, where it is there: frames of one group are held out together,
                     those of an episode where it is not
    steps_left       (N,) int32: steps to the first success, 0 and below once it is done

`cache.json`: {"format": 2, "hz", "horizon", "nhist", "cameras": [{name, height, width,
work_height, work_width}], "tasks": [...], "instructions": [...], "shards": [{"file",
"frames"}], "notes": {...}}.

Whoever makes a cache, from rendered demonstrations or from a dataset, writes it with what is
here: `pictures` and `chunk_targets` make columns, `shard_bytes` a file of them, `index_bytes` the
index. Shards may be made in any order, by any number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from torch import Tensor

from openhelix.runtime.core.files import BadFile
from openhelix.runtime.core.interfaces import F32, F64, U8
from openhelix.system1.config import KEYPOSES, CameraConfig, PolicyConfig
from openhelix.system1.geometry import shrink

FORMAT = 2
DEPTH_UNIT_M = 1e-4
FARTHEST_M = 6.5  # as far as 16 bits of that unit reach

Columns = dict[str, Tensor]


class CacheError(BadFile):
    """A cache that cannot be read or written as asked; the message names what is wrong."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of frames."""

    file: str
    frames: int


@dataclass(frozen=True, slots=True)
class Index:
    """What `cache.json` holds."""

    format: int
    hz: float
    horizon: int
    nhist: int
    cameras: tuple[CameraConfig, ...]
    tasks: tuple[str, ...]
    instructions: tuple[str, ...]
    shards: tuple[Shard, ...]
    notes: dict[str, Any] = field(default_factory=dict)


Shapes = dict[str, tuple[tuple[int, ...], str]]
_ALSO = ("episode", "steps_left")
_MAYBE = ("group",)


def row_shapes(cameras: Sequence[CameraConfig], horizon: int, nhist: int) -> Shapes:
    """Return the shape of a row and the dtype of what a policy learns from."""
    out: Shapes = {
        "proprio": ((nhist, 9), "float32"),
        "target_pose": ((horizon, 7), "float32"),
        "target_open": ((horizon,), "float32"),
        "target_mask": ((horizon,), "bool"),
        "keypose_pose": ((KEYPOSES, 7), "float32"),
        "keypose_open": ((KEYPOSES,), "float32"),
        "task": ((), "int32"),
        "instruction": ((), "int32"),
        "step": ((), "int32"),
    }
    for camera in cameras:
        size = (camera.work_height, camera.work_width)
        out[f"rgb.{camera.name}"] = ((*size, 3), "uint8")
        out[f"depth.{camera.name}"] = (size, "uint16")
        out[f"K.{camera.name}"] = ((3, 3), "float32")
        out[f"T.{camera.name}"] = ((4, 4), "float32")
    return out


class View(Protocol):
    """One camera's image with its geometry: a `CameraFrame`, or what a renderer returns."""

    @property
    def rgb(self) -> U8: ...  # (H, W, 3)

    @property
    def depth(self) -> F32 | None: ...  # (H, W) m along the optical axis

    @property
    def K(self) -> F64: ...  # (3, 3) pixels, centres at +0.5

    @property
    def T_world_cam(self) -> F64: ...  # (4, 4), OpenCV axes


def pictures(views: Sequence[View], camera: CameraConfig) -> Columns:
    """Return a camera's frames as the cache keeps them: the same shrinking as at run time.

    Raises:
        CacheError: a frame has no depth.
    """
    depths = [view.depth for view in views]
    if any(d is None for d in depths):
        raise CacheError(f"camera {camera.name!r}: a frame has no depth")
    rgb = torch.from_numpy(np.stack([v.rgb for v in views])).permute(0, 3, 1, 2).float()
    depth = torch.from_numpy(np.stack([d for d in depths if d is not None]))
    k = torch.as_tensor(np.stack([v.K for v in views]), dtype=torch.float32)
    rgb, depth, k = shrink(rgb, depth, k, camera.work_height, camera.work_width)
    seen = torch.isfinite(depth) & (depth > 0) & (depth < FARTHEST_M)
    units = torch.where(seen, depth / DEPTH_UNIT_M, 0.0).round().to(torch.int32)
    poses = np.stack([v.T_world_cam for v in views])
    return {
        f"rgb.{camera.name}": rgb.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1),
        f"depth.{camera.name}": units.to(torch.uint16),
        f"K.{camera.name}": k,
        f"T.{camera.name}": torch.as_tensor(poses, dtype=torch.float32),
    }


def chunk_targets(
    targets: npt.NDArray[Any], at: Sequence[int], horizon: int, usable: Sequence[int] | None = None
) -> Columns:
    """Cut an episode's commands into targets for some of its frames.

    Args:
        targets: (L, 8); row s is the TCP target commanded *at* step s, to be reached by s + 1,
            and the openness commanded with it.
        at: the steps of the frames.
        horizon: rows of a chunk.
        usable: how many targets from each of these steps on may be learnt; None: all there are.

    Returns:
        target_pose, target_open and target_mask. Past the end the last command is repeated
        and masked out.
    """
    last, first = len(targets) - 1, np.asarray(at)
    rows = np.asarray(targets, np.float32)[np.minimum(first[:, None] + np.arange(horizon), last)]
    count = last + 1 - first if usable is None else np.asarray(usable)
    return {
        "target_pose": torch.from_numpy(np.ascontiguousarray(rows[..., :7])),
        "target_open": torch.from_numpy(np.ascontiguousarray(rows[..., 7])),
        "target_mask": torch.from_numpy(np.arange(horizon) < count[:, None]),
    }


def shard_bytes(
    parts: Sequence[Mapping[str, Tensor]],
    config: PolicyConfig,
    tasks: int,
    instructions: int,
    about: Mapping[str, str] | None = None,
) -> bytes:
    """Return the content of a shard.

    Args:
        parts: columns of some frames each, episodes whole and one after the other.
        config: the policy's cameras, horizon and history.
        tasks, instructions: how many the index lists.
        about: written into the file's header.

    Raises:
        CacheError: a column is missing, misshapen, of another dtype, or not finite.
    """
    whole: Columns = {}
    shapes = row_shapes(config.cameras, config.horizon, config.nhist)
    also = (*_ALSO, *(name for name in _MAYBE if parts and name in parts[0]))
    for name, (shape, dtype) in {**shapes, **dict.fromkeys(also, ((), "int32"))}.items():
        if not parts or any(name not in part for part in parts):
            raise CacheError(f"{name}: missing")
        column = torch.cat([part[name] for part in parts])
        kind = str(column.dtype).removeprefix("torch.")
        if tuple(column.shape[1:]) != shape or kind != dtype:
            raise CacheError(
                f"{name}: {kind}{tuple(column.shape[1:])} a frame, needs {dtype}{shape}"
            )
        if column.is_floating_point() and not bool(column.isfinite().all()):
            raise CacheError(f"{name}: not finite")
        whole[name] = column.contiguous()
    rows = {len(column) for column in whole.values()}
    if len(rows) != 1:
        raise CacheError(f"rows: the tensors have {sorted(rows)} frames")
    for name, top in (("task", tasks), ("instruction", instructions)):
        column = whole[name]
        if len(column) and not 0 <= int(column.min()) <= int(column.max()) < top:
            raise CacheError(f"{name}: outside 0..{top - 1}")
    return save(whole, dict(about or {}))


def index_bytes(
    config: PolicyConfig,
    tasks: Sequence[str],
    instructions: Sequence[str],
    shards: Sequence[Mapping[str, Any]],
    notes: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the content of `cache.json` for shards [{"file", "frames"}]."""
    index = {
        "format": FORMAT,
        "hz": config.hz,
        "horizon": config.horizon,
        "nhist": config.nhist,
        "cameras": [asdict(c) for c in config.cameras],
        "tasks": list(tasks),
        "instructions": list(instructions),
        "shards": list(shards),
        "notes": dict(notes or {}),
    }
    return json.dumps(index, indent=1).encode()


def frames_digest(folder: Path, shards: Sequence[Mapping[str, Any]]) -> str:
    """Return one SHA-256 of all shards: of their names, sizes and contents, in order."""
    digest = hashlib.sha256()
    for shard in shards:
        path = folder / shard["file"]
        digest.update(f"{shard['file']}:{path.stat().st_size}:".encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
