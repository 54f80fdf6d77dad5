"""The training cache: what an expert saw and did, small enough to train from memory.

A folder holds `cache.json` and shards `shard-00000.safetensors`, ... of at most 60 MiB. A
shard's tensors have one row a frame; the frames of an episode follow each other in time and
an episode never spans two shards.

    rgb.<camera>     (N, h, w, 3) uint8, at the policy's working size
    depth.<camera>   (N, h, w) uint16, units of 0.1 mm along the optical axis, 0 for none
                     (float16 would round the static camera's distance to 4 mm)
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

`cache.json`: {"format": 2, "hz", "horizon", "nhist", "cameras": [{name, height, width,
work_height, work_width}], "tasks": [...], "instructions": [...], "shards": [{"file",
"frames"}], "notes": {...}}.

Latents of one System 2 lie beside, in `latents-<name>/` with the same shard names and rows,
so another System 2 needs no new images: `latent` (N, P, n, d) float16, for P instructions a
frame, `instruction` (N, P) int32 which ones, and `latents.json` {"kind", "n_tokens", "dim",
"model_id"}.

`CacheWriter` makes all this; `shrunk` and `chunk_targets` make its arguments.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file

from openhelix.runtime.core.files import BadFile, replace_file, written
from openhelix.runtime.core.interfaces import CameraFrame, LatentSpec
from openhelix.system1.config import KEYPOSES, CameraConfig, PolicyConfig
from openhelix.system1.geometry import shrink

FORMAT = 2
SHARD_BYTES = 56 * 2**20  # an upper bound of what is gathered before a shard is written
DEPTH_UNIT_M = 1e-4

Arrays = dict[str, npt.NDArray[Any]]


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


def row_shapes(cameras: Sequence[CameraConfig], horizon: int, nhist: int) -> Shapes:
    """Return the shape of a row and the dtype of every tensor of a shard, `episode` excepted."""
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


def shrunk(frame: CameraFrame, camera: CameraConfig) -> Arrays:
    """Return one frame as the cache keeps it: rgb, depth, K, T without the camera's name.

    The same shrinking as at run time, so that training and acting see the same pixels.
    """
    if frame.depth is None:
        raise CacheError(f"camera {camera.name!r}: the frame has no depth")
    rgb = torch.from_numpy(np.ascontiguousarray(frame.rgb)).permute(2, 0, 1)[None].float()
    depth = torch.from_numpy(np.ascontiguousarray(frame.depth))[None]
    k = torch.as_tensor(frame.K, dtype=torch.float32)[None]
    rgb, depth, k = shrink(rgb, depth, k, camera.work_height, camera.work_width)
    units = torch.nan_to_num(depth[0] / DEPTH_UNIT_M, nan=0.0, posinf=0.0, neginf=0.0)
    return {
        "rgb": rgb[0].permute(1, 2, 0).round().to(torch.uint8).numpy(),
        "depth": units.round().clamp(0, 65535).numpy().astype(np.uint16),
        "K": k[0].numpy(),
        "T": np.asarray(frame.T_world_cam, np.float32),
    }


def chunk_targets(
    poses: npt.NDArray[Any], openness: npt.NDArray[Any], at: Sequence[int], horizon: int
) -> Arrays:
    """Cut an episode's commands into targets for some of its frames.

    Args:
        poses: (L, 7); entry s is the TCP target commanded *at* step s, to be reached by s + 1.
        openness: (L,), commanded likewise.
        at: the steps of the frames.
        horizon: rows of a chunk.

    Returns:
        target_pose, target_open and target_mask. Past the end the last command is repeated
        and masked out.
    """
    index = np.asarray(at)[:, None] + np.arange(horizon)[None]
    inside = index < len(poses)
    index = np.minimum(index, len(poses) - 1)
    return {
        "target_pose": np.asarray(poses, np.float32)[index],
        "target_open": np.asarray(openness, np.float32)[index],
        "target_mask": inside,
    }


def frames_digest(folder: Path, shards: Sequence[Mapping[str, Any]]) -> str:
    """Return one SHA-256 of all shards: of their names, sizes and contents, in order."""
    digest = hashlib.sha256()
    for shard in shards:
        path = folder / shard["file"]
        digest.update(f"{shard['file']}:{path.stat().st_size}:".encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


class CacheWriter:
    """Gathers episodes and writes shards."""

    def __init__(
        self,
        folder: Path | str,
        config: PolicyConfig,
        tasks: Sequence[str],
        instructions: Sequence[str],
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "cache.json").exists():
            raise CacheError(f"{self.folder}: holds a cache already")
        self.config = config
        self._meta: dict[str, Any] = {
            "format": FORMAT,
            "hz": config.hz,
            "horizon": config.horizon,
            "nhist": config.nhist,
            "cameras": [asdict(c) for c in config.cameras],
            "tasks": list(tasks),
            "instructions": list(instructions),
            "shards": [],
            "notes": dict(notes or {}),
        }
        self._parts: list[Arrays] = []
        self._bytes = 0
        self._episodes = 0

    def add_episode(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Add one episode's frames, in time order.

        Args:
            arrays: every tensor of the module's list but `episode`, with one row a frame.

        Raises:
            CacheError: a tensor is missing, misshapen, of another dtype, or not finite.
        """
        rows = {len(a) for a in arrays.values()}
        if len(rows) != 1:
            raise CacheError(f"rows: the tensors have {sorted(rows)} frames")
        part: Arrays = {}
        c = self.config
        for name, (shape, dtype) in row_shapes(c.cameras, c.horizon, c.nhist).items():
            if name not in arrays:
                raise CacheError(f"{name}: missing")
            array = np.ascontiguousarray(arrays[name])
            if array.shape[1:] != shape or array.dtype != dtype:
                raise CacheError(
                    f"{name}: {array.dtype}{array.shape[1:]} a frame, needs {dtype}{shape}"
                )
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise CacheError(f"{name}: not finite")
            part[name] = array
        for name, table in (("task", "tasks"), ("instruction", "instructions")):
            top = len(self._meta[table])
            if len(part[name]) and not (0 <= part[name].min() <= part[name].max() < top):
                raise CacheError(f"{name}: outside 0..{top - 1}")
        count = rows.pop()
        part["episode"] = np.full(count, self._episodes, np.int32)
        size = sum(a.nbytes for a in part.values())
        if self._parts and self._bytes + size > SHARD_BYTES:
            self._flush()
        self._parts.append(part)
        self._bytes += size
        self._episodes += 1

    def close(self) -> None:
        """Write what is left and the index."""
        self._flush()
        text = json.dumps(self._meta, indent=1) + "\n"
        replace_file(self.folder / "cache.json", text.encode())

    def _flush(self) -> None:
        if not self._parts:
            return
        name = f"shard-{len(self._meta['shards']):05d}.safetensors"
        whole = {k: np.concatenate([p[k] for p in self._parts]) for k in self._parts[0]}
        with written(self.folder / name) as part:
            save_file(whole, part)
        self._meta["shards"].append({"file": name, "frames": len(whole["task"])})
        self._parts, self._bytes = [], 0


def write_latents(
    folder: Path | str,
    name: str,
    shard: str,
    latent: npt.NDArray[Any],
    instruction: npt.NDArray[Any],
    spec: LatentSpec,
) -> None:
    """Write the latents of one shard.

    Args:
        folder: the cache.
        name: of this System 2.
        shard: the shard's file name.
        latent: (N, P, n, d).
        instruction: (N, P) which instruction each is for.
        spec: of the latents; the same for all shards.
    """
    if latent.shape[2:] != (spec.n_tokens, spec.dim) or latent.shape[:2] != instruction.shape:
        raise CacheError(
            f"latent: shape {latent.shape} does not fit {spec.n_tokens} tokens of {spec.dim} "
            f"and instructions {instruction.shape}"
        )
    place = Path(folder) / f"latents-{name}"
    place.mkdir(parents=True, exist_ok=True)
    tensors: Arrays = {
        "latent": latent.astype(np.float16),
        "instruction": instruction.astype(np.int32),
    }
    with written(place / shard) as part:
        save_file(tensors, part)
    replace_file(place / "latents.json", (json.dumps(asdict(spec), indent=1) + "\n").encode())
