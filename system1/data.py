"""Batches from a training cache: random access, augmentation.

Everything random in a batch comes from one generator that the trainer seeds with the step
number, so a run that was stopped and resumed sees the same batches as one that was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from openhelix.runtime.core.files import as_record, read_json, tensor_header
from openhelix.system1.cache import (
    DEPTH_UNIT_M,
    FORMAT,
    CacheError,
    Index,
    Shapes,
    row_shapes,
)
from openhelix.system1.config import TACTILE
from openhelix.system1.draws import rand, randint
from openhelix.system1.encoder_light import KeyposeTargets
from openhelix.system1.geometry import (
    Inputs,
    deproject,
    intrinsic_xyz_to_matrix,
    matrix_to_6d,
    matrix_to_euler,
    quat_to_matrix,
    xyzw_to_wxyz,
)


@dataclass(frozen=True, slots=True)
class Batch:
    """Observations and what the expert did next."""

    inputs: Inputs
    rows: Tensor  # (B, H, 9) relative, metres and 6D
    openness: Tensor  # (B, H)
    mask: Tensor  # (B, H) bool
    keyposes: KeyposeTargets


@dataclass(frozen=True, slots=True)
class Augment:
    """How a batch is varied."""

    shift: int = 4  # pixels; image, points and mask move together, so geometry stays true
    brightness: float = 0.2  # relative
    channel: float = 0.1  # relative, a channel
    null_latent: float = 0.1  # share of samples told the number of their task, not a sentence


def relative_rows(poses: Tensor, now: Tensor, rotation: str = "so3") -> Tensor:
    """Return trajectories relative to the current pose.

    Args:
        poses: (B, H, 7) world, quaternion xyzw.
        now: (B, 7) current pose.
        rotation: "so3": R R_now^T; "euler": the difference of CALVIN's angles, wrapped, as
            the published checkpoints have it.

    Returns:
        (B, H, 9): xyz difference in metres along world axes, and 6D.
    """
    target = quat_to_matrix(xyzw_to_wxyz(poses[..., 3:7]))
    base = quat_to_matrix(xyzw_to_wxyz(now[:, 3:7])).unsqueeze(1)
    if rotation == "euler":
        gap = matrix_to_euler(target) - matrix_to_euler(base)
        gap = torch.remainder(gap + torch.pi, 2 * torch.pi) - torch.pi
        turned = intrinsic_xyz_to_matrix(gap)
    else:
        turned = target @ base.transpose(-1, -2)
    return torch.cat((poses[..., :3] - now[:, None, :3], matrix_to_6d(turned)), -1)


def read_index(folder: Path) -> dict[str, Any]:
    """Return the `cache.json` of a folder.

    Raises:
        BadFile: there is none, it is damaged, of another format, or without frames.
    """
    index = folder / "cache.json"
    if not index.is_file():
        raise CacheError(f"{folder}: no cache.json")
    meta = read_json(index)
    if meta.get("format") != FORMAT:
        raise CacheError(f"{index}: format {meta.get('format')!r}, this code reads {FORMAT}")
    about = as_record(Index, meta, str(index))
    if not about.shards:
        raise CacheError(f"{folder}: has no frames")
    for shard in about.shards:
        if Path(shard.file).name != shard.file or shard.frames < 1:
            raise CacheError(f"{index}: shards: {shard.file!r} is no file beside it with frames")
    return meta


def joined_index(folders: Sequence[Path | str], metas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one index for several folders, of the cameras that all have; of one folder its own.

    Raises:
        CacheError: they were made for different policies, or show no camera alike.
    """
    first = metas[0]
    if len(metas) == 1:
        return first
    known = {camera["name"]: camera for camera in first["cameras"]}
    for folder, meta in zip(folders, metas, strict=True):
        for name in ("horizon", "hz", "nhist", "tasks"):
            if meta[name] != first[name]:
                raise CacheError(f"{folder}: its {name} are not those of {folders[0]}")
        theirs = {camera["name"]: camera for camera in meta["cameras"]}
        if any(camera != theirs.get(name, camera) for name, camera in known.items()):
            raise CacheError(f"{folder}: its cameras are not those of {folders[0]}")
        known = {name: camera for name, camera in known.items() if name in theirs}
        if not known:
            raise CacheError(f"{folder}: has none of the cameras of {folders[0]}")
    return first | {
        "cameras": [*known.values()],
        "instructions": [text for meta in metas for text in meta["instructions"]],
        "shards": [shard for meta in metas for shard in meta["shards"]],
        "notes": {"folders": [meta.get("notes", {}) for meta in metas]},
    }


class Cache:
    """A training cache opened for reading, or several as one; shards are mapped, not copied.

    `places` are the shards' files, and `part` (N,) says which of the folders a frame is from.
    An episode's number is made one that no other folder has.

    Raises:
        CacheError: a folder holds no frames, or two were made for different policies.
    """

    def __init__(self, folder: Path | str | Sequence[Path | str]) -> None:
        folders = [folder] if isinstance(folder, Path | str) else list(folder)
        if not folders:
            raise CacheError("cache: no folder is named")
        metas = [read_index(Path(f)) for f in folders]
        self.folder = Path(folders[0])
        self.meta: dict[str, Any] = joined_index(folders, metas)
        self.cameras = [c["name"] for c in self.meta["cameras"]]
        self.hz = float(self.meta["hz"])
        self.places: list[Path] = []
        self._shards: list[dict[str, Tensor]] = []
        parts, episodes, first_said = [], 0, 0
        for part, (root, meta) in enumerate(zip(map(Path, folders), metas, strict=True)):
            shards = self._open(root, meta)
            for shard in shards:
                parts.append(torch.full((len(shard["task"]),), part))
                shard.setdefault("group", shard["episode"])
                if part:
                    for name in ("episode", "group"):
                        shard[name] = shard[name].long() + episodes
                    shard["instruction"] = shard["instruction"].long() + first_said
            episodes = 1 + max(int(s[n].max()) for s in shards for n in ("episode", "group"))
            first_said += len(meta["instructions"])
            self._shards += shards
        sizes = torch.tensor([len(s["task"]) for s in self._shards])
        self._starts = torch.cumsum(sizes, 0) - sizes
        self.part = torch.cat(parts)
        self.episode = torch.cat([s["episode"].long() for s in self._shards])
        self.group = torch.cat([s["group"].long() for s in self._shards])
        self.step = torch.cat([s["step"].long() for s in self._shards])
        self.task = torch.cat([s["task"].long() for s in self._shards])

    def _open(self, root: Path, meta: dict[str, Any]) -> list[dict[str, Tensor]]:
        """Return the shards of one folder."""
        about = as_record(Index, meta, str(root / "cache.json"))
        shapes = row_shapes(about.cameras, about.horizon, about.nhist) | {"episode": ((), "int32")}
        names = [shard.file for shard in about.shards]
        apart = (root / TACTILE).is_dir()  # drawn beside frames that may have been there before
        felt = {name: shape for name, shape in shapes.items() if name.endswith(f".{TACTILE}")}
        own = {name: shape for name, shape in shapes.items() if not apart or name not in felt}
        shards = [read_shard(root / shard.file, own, shard.frames) for shard in about.shards]
        for row, shard in zip(about.shards, shards, strict=True):
            if apart and felt:
                shard.update(read_shard(root / TACTILE / row.file, felt, row.frames))
        tops = {"task": len(about.tasks), "instruction": len(about.instructions)}
        for name, shard in zip(names, shards, strict=True):
            for column, top in tops.items():
                if not 0 <= int(shard[column].min()) <= int(shard[column].max()) < top:
                    raise CacheError(f"{root / name}: {column}: outside 0..{top - 1}")
        self.places += [root / name for name in names]
        return shards

    def __len__(self) -> int:
        return len(self.task)

    def gather(self, name: str, frames: Tensor) -> Tensor:
        """Return one tensor's rows for frames (B,), in order."""
        shard = torch.searchsorted(self._starts, frames, right=True) - 1
        rows = [
            self._shards[int(s)][name][int(f - self._starts[s])]
            for s, f in zip(shard, frames, strict=True)
        ]
        return torch.stack(rows)

    def split(self, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return training and validation frames, split by episode or larger groups of frames."""
        ids = self.group.unique()
        order = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
        held = order[: round(share * len(ids))]
        validation = torch.isin(self.group, held)
        return torch.nonzero(~validation)[:, 0], torch.nonzero(validation)[:, 0]

    def all_rows(self, frames: Tensor, rotation: str) -> tuple[Tensor, Tensor]:
        """Return relative trajectories (N, H, 9) and masks (N, H), to fit a normaliser on."""
        poses, now = self.gather("target_pose", frames), self.gather("proprio", frames)[:, -1, :7]
        return relative_rows(poses, now, rotation), self.gather("target_mask", frames).bool()

    def mask(self, frames: Tensor) -> Tensor:
        """Return which rows of frames' trajectories are real, (B, H) bool."""
        return self.gather("target_mask", frames).bool()

    def batch(
        self,
        frames: Tensor,
        generator: torch.Generator,
        augment: Augment | None = None,
        rotation: str = "so3",
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Assemble one batch, told by the tasks' numbers; without `augment` nothing is varied."""
        images = [self._camera(name, frames, device) for name in self.cameras]
        rgb, xyz, valid = zip(*images, strict=True)
        proprio = self.gather("proprio", frames)
        inputs = Inputs(
            rgb=rgb,
            xyz=xyz,
            valid=valid,
            proprio=proprio.to(device),
            latent=None,
            latent_age_s=None,
            latent_mask=None,
            task=self.task[frames].to(device),
        )
        if augment is not None:
            inputs = vary(inputs, augment, generator)
        rows = relative_rows(self.gather("target_pose", frames), proprio[:, -1, :7], rotation)
        openness, real = self.gather("target_open", frames), self.gather("target_mask", frames)
        return Batch(
            inputs,
            rows.to(device),
            openness.to(device),
            real.bool().to(device),
            self._keyposes(frames, proprio[:, -1, :7], rotation, device),
        )

    def _keyposes(
        self, frames: Tensor, now: Tensor, rotation: str, device: torch.device | str
    ) -> KeyposeTargets:
        rows = relative_rows(self.gather("keypose_pose", frames), now, rotation)
        return KeyposeTargets(rows.to(device), self.gather("keypose_open", frames).to(device))

    def _camera(
        self, name: str, frames: Tensor, device: torch.device | str
    ) -> tuple[Tensor, Tensor, Tensor]:
        rgb = self.gather(f"rgb.{name}", frames).to(device)
        depth = self.gather(f"depth.{name}", frames).to(device).float() * DEPTH_UNIT_M
        k, t_world_cam = (self.gather(f"{x}.{name}", frames).to(device) for x in ("K", "T"))
        xyz, valid = deproject(depth, k, t_world_cam)
        return rgb.permute(0, 3, 1, 2).float() / 255, xyz, valid


_KINDS = {"float32": "F32", "bool": "BOOL", "int32": "I32", "uint8": "U8", "uint16": "U16"}


def read_shard(
    path: Path, shapes: Shapes | None = None, frames: int | None = None
) -> dict[str, Tensor]:
    """Map a safetensors file.

    Args:
        path: of the file.
        shapes: of a row of each tensor that it must have, with its dtype; None takes what is
            there.
        frames: rows that it must have.

    Raises:
        BadFile: it is damaged, or not as it should be.
    """
    header, _ = tensor_header(path)
    for name, (shape, dtype) in (shapes or {}).items():
        if name not in header:
            raise CacheError(f"{path}: no {name}")
        if header[name] != (_KINDS[dtype], (frames, *shape)):
            kind, have = header[name]
            raise CacheError(f"{path}: {name} is {kind}{have}, needs {dtype}{(frames, *shape)}")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in header}


def vary(inputs: Inputs, augment: Augment, generator: torch.Generator) -> Inputs:
    """Return augmented inputs: shifted views and other light."""
    rgb, xyz, valid = [], [], []
    for image, points, seen in zip(inputs.rgb, inputs.xyz, inputs.valid, strict=True):
        batch = len(image)
        gain = 1 + augment.brightness * (2 * rand(batch, 1, generator=generator) - 1)
        tint = 1 + augment.channel * (2 * rand(batch, 3, generator=generator) - 1)
        lit = (image * (gain * tint).to(image.device)[..., None, None]).clamp(0, 1)
        if augment.shift:
            moves = randint(-augment.shift, augment.shift + 1, batch, 2, generator=generator)
            lit, points, seen = shift(lit, points, seen, moves)
        rgb.append(lit)
        xyz.append(points)
        valid.append(seen)
    return replace(inputs, rgb=tuple(rgb), xyz=tuple(xyz), valid=tuple(valid))


def shift(rgb: Tensor, xyz: Tensor, valid: Tensor, moves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move each image by whole pixels; what comes in from outside is black and invalid.

    Args:
        rgb: (B, 3, H, W); xyz: (B, 3, H, W); valid: (B, H, W).
        xyz: points, which keep their world coordinates.
        valid: mask.
        moves: (B, 2) rows and columns.
    """
    height, width = rgb.shape[-2:]
    device = rgb.device
    rows = torch.arange(height, device=device) - moves[:, :1].to(device)
    cols = torch.arange(width, device=device) - moves[:, 1:].to(device)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((cols >= 0) & (cols < width))[:, None]
    flat = rows.clamp(0, height - 1)[:, :, None] * width + cols.clamp(0, width - 1)[:, None]
    index = flat.flatten(1)

    def moved(x: Tensor) -> Tensor:
        taken = x.flatten(-2).gather(-1, index.unsqueeze(1).expand(-1, x.shape[1], -1))
        return taken.view_as(x) * inside.unsqueeze(1)

    return moved(rgb), moved(xyz), valid.flatten(1).gather(1, index).view_as(valid) & inside
