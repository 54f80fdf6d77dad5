"""The second half of a collection: draw the training frames of every unit, file by file."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.playtable.annotations import replace_file
from benchmarks.playtable.collect_config import CollectConfig
from benchmarks.playtable.collect_pool import Report, pooled, unit_path
from benchmarks.playtable.frames import (
    FramesConfig,
    cache_index,
    draw_for_system2,
    draw_unit,
)
from runtime.config import ConfigError
from system1.cache import frames_digest

FRAMES, SYSTEM2, ABOUT = "frames", "system2", "moments.json"
FRAMES_EACH = 10  # moments of a demonstration with every=4, for the estimate of disk


def draw(config: CollectConfig, report: Report | None = None) -> dict[str, Any]:
    """Draw the training frames that are missing; returns what the card says of them.

    Raises:
        ConfigError: it would take more disk than allowed or free, or the folder's frames
            were drawn with other settings.
    """
    root, settings = config.folder, config.frames
    folder, begun = root / FRAMES, time.monotonic()
    units = [unit_path(root, s, n) for n in range(config.per_task) for s in config.scenes]
    units = [unit for unit in units if unit.exists()]
    todo = [u for u in units if not shard_path(u).exists()]
    more = len(todo) * len(config.tasks) * FRAMES_EACH * 4 // settings.every
    check_frames_folder(folder, settings, more * settings.bytes_per_frame())
    text = settings.model_dump_json()
    work: list[tuple[Any, ...]] = [(str(unit), text) for unit in todo]
    for done, count in enumerate(pooled(write_shard, work, config.jobs), 1):
        if report is not None:
            report(done, len(todo), f"{count} frames")
    if settings.system2_px:
        _draw_for_system2(config, units, report)
    shards = [
        {"file": shard_path(u).name, "frames": frames_in(shard_path(u))} for u in sorted(units)
    ]
    notes = {"collection": root.name, "moments": settings.moments()}
    replace_file(folder / "cache.json", cache_index(shards, notes))
    return {
        "frames": sum(int(str(shard["frames"])) for shard in shards),
        "frames_bytes": sum(f.stat().st_size for f in folder.rglob("*.safetensors")),
        "frames_files": len(shards),
        "frames_sha256": frames_digest(folder, shards),
        "frames_settings": settings.model_dump(mode="json"),
        "frames_wall_s": round(time.monotonic() - begun, 1),
    }


def _draw_for_system2(config: CollectConfig, units: list[Path], report: Report | None) -> None:
    """System 2's images of every shard that has none yet."""
    folder = config.folder / FRAMES / SYSTEM2
    sizes = folder / "size.json"
    if sizes.exists() and json.loads(sizes.read_text()) != config.frames.system2_px:
        raise ConfigError(f"frames.system2_px: {folder} was drawn with another size")
    replace_file(sizes, json.dumps(config.frames.system2_px).encode())
    missing = [u for u in units if not (folder / shard_path(u).name).exists()]
    text = config.frames.model_dump_json()
    work: list[tuple[Any, ...]] = [(str(unit), text) for unit in missing]
    for done, count in enumerate(pooled(write_system2, work, config.jobs), 1):
        if report is not None:
            report(done, len(missing), f"{count} images for System 2")


def shard_path(unit: Path) -> Path:
    """Where the frames of a unit are kept."""
    return unit.parent.parent / FRAMES / f"{unit.stem}.safetensors"


def frames_in(path: Path, name: str = "task") -> int:
    """How many rows a file holds."""
    with safe_open(path, "np") as stored:
        return int(stored.get_slice(name).get_shape()[0])


def check_frames_folder(folder: Path, settings: FramesConfig, more: int) -> None:
    """Make the frames folder, or refuse before anything is written.

    Args:
        folder: of the frames.
        settings: of the frames.
        more: bytes that are to come, estimated.
    """
    about = folder / ABOUT
    if about.exists() and json.loads(about.read_text(encoding="utf-8")) != settings.moments():
        raise ConfigError(
            f"frames: {folder} was drawn with other settings; remove it or use the same"
        )
    there = sum(f.stat().st_size for f in folder.rglob("*.safetensors")) if folder.exists() else 0
    if there + more > settings.max_gb * 1e9:
        raise ConfigError(
            f"frames.max_gb: {(there + more) / 1e9:.1f} GB are needed, {settings.max_gb} allowed"
        )
    free = shutil.disk_usage(folder.parent).free
    if more > free:
        raise ConfigError(f"out: {more / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    replace_file(about, json.dumps(settings.moments(), indent=1).encode())
    for torn in folder.rglob(".*.tmp"):
        torn.unlink()


def write_shard(unit: str, settings: str) -> int:
    """Draw one unit's frames into their shard; returns how many."""
    torch.set_num_threads(1)
    path = shard_path(Path(unit))
    replace_file(path, draw_unit(Path(unit), FramesConfig.model_validate_json(settings)))
    return frames_in(path)


def write_system2(unit: str, settings: str) -> int:
    """Draw one unit's images for System 2; returns how many."""
    torch.set_num_threads(1)
    shard = shard_path(Path(unit))
    path = shard.parent / SYSTEM2 / shard.name
    replace_file(path, draw_for_system2(Path(unit), FramesConfig.model_validate_json(settings)))
    return frames_in(path, "rgb")
