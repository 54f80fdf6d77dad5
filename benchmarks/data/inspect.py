"""What is in a dataset: counts, tasks, sentences, cameras, ranges, conventions, what is wrong.

Nothing is trusted: a sample of the segments is read as training reads them, and whatever that
refuses is told. A strip of pictures shows the first frames to the last of a few segments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from openhelix.benchmarks.data.source import DataError, Segment, Source, open_source, readers
from openhelix.runtime.core.clock import duration_text
from openhelix.runtime.core.files import BadFile, written
from openhelix.runtime.core.interfaces import F32

MOST_PROBLEMS = 20  # are listed; all are counted
ROWS, COLUMNS, TILE_PX, TITLE_PX = 4, 6, 150, 16  # of the strip
AXES = ("x", "y", "z")
RELATIVE = ("dx", "dy", "dz", "droll", "dpitch", "dyaw")


def sources(path: Path, reader: str = "") -> list[Source]:
    """Open a dataset, or each of those that a folder holds.

    Raises:
        DataError: there is none.
    """
    if not reader:
        for kind in readers().values():
            if path.exists() and kind.matches(path) and len(parts := kind.parts(path)) > 1:
                return [kind(part) for part in parts]
    return [open_source(path, reader)]


def report(source: Source, sample: int, picture: Path | None = None) -> dict[str, Any]:
    """Return what is in a dataset, as plain data.

    Args:
        source: the dataset.
        sample: about how many frames' actions are read; 0 for all.
        picture: where the strip goes; None for none.
    """
    lengths = source.spans[:, 1] - source.spans[:, 0] + 1
    problems = list(source.problems())
    looked, actions = _read(source, sample, problems)
    tasks = Counter(segment.task for segment in source.segments)
    example = {segment.task: segment.text for segment in reversed(source.segments)}
    scenes = Counter(segment.scene for segment in source.segments)
    out: dict[str, Any] = {
        "path": str(source.path),
        "layout": source.layout,
        "hz": source.hz,
        "episodes": len(source.spans),
        "frames": source.n_frames,
        "hours": round(source.n_frames / source.hz / 3600, 3),
        "episode_frames": {
            "min": int(lengths.min()), "median": float(np.median(lengths)), "max": int(lengths.max())
        },
        "segments": len(source.segments),
        "segment_frames": int(sum(s.last - s.first + 1 for s in source.segments)),
        "scenes": {name: n for name, n in sorted(scenes.items()) if name},
        "sentences": len({segment.text for segment in source.segments}),
        "tasks": {name: {"segments": n, "for_example": example[name]} for name, n in tasks.items()},
        "cameras": [
            {
                "name": c.name,
                "height": c.height,
                "width": c.width,
                "depth": c.depth,
                "mount": c.mount,
                "focal_px": None if c.K is None else round(float(c.K[0, 0]), 2),
                "lacks": c.lacks,
            }
            for c in source.cameras
        ],
        "conventions": dict(source.facts),
        "looked_at": looked,
        **actions,
    }  # fmt: skip
    if picture is not None:
        out["picture"] = _strip(source, picture, problems)
    out["n_problems"], out["problems"] = len(problems), problems[:MOST_PROBLEMS]
    return out


def _stretches(source: Source) -> Sequence[Segment]:
    """Return what is read: the segments, or where there are none the episodes."""
    if source.segments:
        return source.segments
    return [Segment(int(a), int(b), "", "") for a, b in source.spans]


def _read(source: Source, sample: int, problems: list[str]) -> tuple[int, dict[str, Any]]:
    """Return how many frames were looked at, and the ranges of their actions."""
    stretches = _stretches(source)
    total = sum(s.last - s.first + 1 for s in stretches)
    every = max(1, round(total / sample)) if sample else 1
    looked, rows = 0, list[tuple[F32, F32, F32]]()
    for number in range(0, len(stretches), every):
        stretch = stretches[number]
        try:
            if source.segments:
                source.check(number)
            motion = source.motion(stretch.first, stretch.last)
        except BadFile as error:
            problems.append(str(error))
            continue
        looked += len(motion)
        rows.append((motion.proprio, motion.targets, motion.relative))
    if source.segments and every > 1:  # all are cheap to compare with what there is
        for number in range(len(stretches)):
            try:
                source.check(number)
            except DataError as error:
                if str(error) not in problems:
                    problems.append(str(error))
    if not rows:
        return 0, {}
    proprio, targets, relative = (np.concatenate(part) for part in zip(*rows, strict=True))
    return looked, {
        "positions_m": _ranges(targets[:, :3], AXES),
        "relative_actions": _ranges(relative[:, :6], RELATIVE),
        "gripper": {
            "open_share": round(float(targets[:, 7].mean()), 3),
            "width_m": [round(float(f(proprio[:, 7])), 4) + 0.0 for f in (np.min, np.max)],
        },
    }


def _ranges(values: F32, names: Sequence[str]) -> dict[str, list[float]]:
    low, high = values.min(0), values.max(0)
    return {
        name: [round(float(a), 4), round(float(b), 4)]
        for name, a, b in zip(names, low, high, strict=True)
    }


def _strip(source: Source, path: Path, problems: list[str]) -> str | None:
    """Draw a few segments, first frame to last, a row each and camera; return where it is."""
    names = [camera.name for camera in source.cameras]
    stretches = _stretches(source)
    chosen = [stretches[i] for i in np.linspace(0, len(stretches) - 1, ROWS).round().astype(int)]
    rows = list[tuple[str, list[np.ndarray]]]()
    for stretch in dict.fromkeys(chosen):
        at = np.linspace(stretch.first, stretch.last, COLUMNS).round().astype(int)
        try:
            seen = list(source.views(at.tolist(), names))
        except BadFile as error:
            problems.append(str(error))
            continue
        for name in names:
            title = f"{name}: {stretch.text or f'frames {stretch.first} to {stretch.last}'}"
            rows.append((title, [view[name].rgb for view in seen]))
    if not rows:
        return None
    height = TILE_PX + TITLE_PX
    sheet = Image.new("RGB", (COLUMNS * TILE_PX, height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (title, images) in enumerate(rows):
        pen.text((3, row * height + 2), title[:120], fill="black")
        for column, rgb in enumerate(images):
            tile = Image.fromarray(np.ascontiguousarray(rgb)).convert("RGB")
            tile.thumbnail((TILE_PX, TILE_PX))
            if max(tile.size) < TILE_PX:
                share = TILE_PX / max(tile.size)
                tile = tile.resize((round(tile.width * share), round(tile.height * share)))
            sheet.paste(tile, (column * TILE_PX, row * height + TITLE_PX))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as part:
        sheet.save(part, format="PNG")
    return str(path)


# -- The same for people ---------------------------------------------------------------


def as_text(found: Mapping[str, Any]) -> str:
    """Return a report as lines."""
    many, lengths = found["frames"], found["episode_frames"]
    hours = duration_text(many / found["hz"])
    lines = [
        f"{found['path']}: {found['layout']}",
        _row(
            "episodes",
            f"{found['episodes']:,} of {lengths['min']} to {lengths['max']} frames; {many:,} frames "
            f"at {found['hz']:g} Hz, {hours}",
        ),
        _row(
            "annotations",
            f"{found['segments']:,} of {len(found['tasks'])} tasks, {found['sentences']:,} "
            f"sentences, {found['segment_frames']:,} frames"
            + ("; scenes " + ", ".join(found["scenes"]) if found["scenes"] else ""),
        ),
    ]
    for camera in found["cameras"]:
        said = f"{camera['width']} x {camera['height']}, {'RGB-D' if camera['depth'] else 'RGB'}"
        if camera["focal_px"] is not None:
            said += f", f = {camera['focal_px']:g} px"
        said += ", on the hand" if camera["mount"] == "hand" else ", stands still"
        if camera["lacks"]:
            said += f"; lacks {camera['lacks']}: not for System 1"
        lines.append(_row(f"camera {camera['name']}", said))
    if found["looked_at"]:
        lines.append(_row("looked at", f"{found['looked_at']:,} frames' actions"))
        for key in ("positions_m", "relative_actions"):
            told = ", ".join(f"{n} {a:g} to {b:g}" for n, (a, b) in found[key].items())
            lines.append(_row(key.replace("_", " "), told))
        grip = found["gripper"]
        low, high = grip["width_m"]
        lines.append(
            _row("gripper", f"open in {grip['open_share']:.0%}, {low:g} to {high:g} m wide")
        )
    lines += [_row(name, said) for name, said in found["conventions"].items()]
    for task, about in sorted(found["tasks"].items()):
        lines.append(_row(f"  {about['segments']:>5} x", f"{task}: {about['for_example']!r}"))
    if found.get("picture"):
        lines.append(_row("picture", found["picture"]))
    lines.append(
        _row("problems", f"{found['n_problems']}" if found["n_problems"] else "none found")
    )
    lines += [f"  {problem}" for problem in found["problems"]]
    return "\n".join(lines)


def _row(name: str, said: str) -> str:
    return f"  {name:<17} {said}"
