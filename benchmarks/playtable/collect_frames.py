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
from benchmarks.playtable.frames import FramesConfig, draw_unit
from runtime.config import ConfigError

FRAMES, FRAMES_SETTINGS = "frames", "settings.json"
FRAMES_EACH = 13  # moments of a demonstration with every=3, for the estimate of disk


def draw(config: CollectConfig, report: Report | None = None) -> dict[str, Any]:
    """Draw the training frames that are missing; returns what the card says of them.

    Raises:
        ConfigError: it would take more disk than allowed or free, or the folder's frames
            were drawn with other settings.
    """
    folder, settings = config.folder / FRAMES, config.frames
    begun = time.monotonic()
    units = [
        unit_path(config.folder, scene, n)
        for n in range(config.per_task)
        for scene in config.scenes
    ]
    todo = [u for u in units if u.exists() and not frames_path(u).exists()]
    check_frames_folder(folder, settings, len(todo) * len(config.tasks))
    work = [(str(unit), settings.model_dump_json()) for unit in todo]
    counts: list[int] = []
    for done, count in enumerate(pooled(write_frames, work, config.jobs), 1):
        counts.append(count)
        if report is not None:
            report(done, len(todo), f"{count} frames")
    files = sorted(folder.glob("*.safetensors"))
    return {
        "frames": sum(frames_in(f) for f in files),
        "frames_bytes": sum(f.stat().st_size for f in files),
        "frames_files": len(files),
        "frames_settings": settings.model_dump(mode="json"),
        "frames_wall_s": round(time.monotonic() - begun, 1),
    }


def frames_path(unit: Path) -> Path:
    """Where the frames of a unit are kept."""
    return unit.parent.parent / FRAMES / f"{unit.stem}.safetensors"


def frames_in(path: Path) -> int:
    """How many moments a frames file holds."""
    with safe_open(path, "np") as stored:
        return int(stored.get_slice("task").get_shape()[0])


def check_frames_folder(folder: Path, settings: FramesConfig, demonstrations: int) -> None:
    """Make the frames folder, or refuse before anything is written."""
    about = folder / FRAMES_SETTINGS
    mine = settings.model_dump(mode="json", exclude={"max_gb"})
    if about.exists() and json.loads(about.read_text(encoding="utf-8")) != mine:
        raise ConfigError(
            f"frames: {folder} was drawn with other settings; remove it or use other ones"
        )
    there = sum(f.stat().st_size for f in folder.glob("*.safetensors")) if folder.exists() else 0
    more = demonstrations * FRAMES_EACH * 3 // settings.every * settings.bytes_per_frame()
    if there + more > settings.max_gb * 1e9:
        raise ConfigError(
            f"frames.max_gb: {(there + more) / 1e9:.1f} GB are needed, {settings.max_gb} allowed"
        )
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if more > free:
        raise ConfigError(f"out: {more / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    replace_file(about, json.dumps(mine, indent=1).encode())
    for torn in folder.glob(".*.tmp"):
        torn.unlink()


def write_frames(unit: str, settings: str) -> int:
    """Draw one unit's frames into their file; returns how many."""
    torch.set_num_threads(1)
    path = frames_path(Path(unit))
    replace_file(path, draw_unit(Path(unit), FramesConfig.model_validate_json(settings)))
    return frames_in(path)
