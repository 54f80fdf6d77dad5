"""The log of a dataset being written: one JSON line per committed episode.

What CALVIN keeps in several index files is derived from these lines, so there is one place
that says what exists, and appending to it is the commit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.playtable.annotations import DatasetError

F64 = npt.NDArray[np.float64]
NORMALIZE = "calvin_agent.utils.transforms.NormalizeVector"  # what CALVIN's loader expects


def moments(frames: Sequence[F64]) -> list[list[float]]:
    """Sum and sum of squares of vectors, by column."""
    rows = np.asarray(frames)
    return [rows.sum(0).tolist(), np.square(rows).sum(0).tolist()]


def log_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in rows)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The committed episodes; a torn last line is one that was never committed."""
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    try:
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        starts = [row["start"] for row in rows]
        if starts != [0, *(row["end"] + 1 for row in rows)][: len(rows)]:
            raise DatasetError(f"{path.name}: episodes do not follow one another")
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path.name}: damaged ({error})") from error
    return rows


def scene_spans(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """First and last frame of each scene, under CALVIN's names."""
    spans: dict[str, list[int]] = {}
    for row in rows:
        span = spans.setdefault(f"calvin_scene_{row['scene']}", [row["start"], row["end"]])
        span[1] = row["end"]
    return spans


def statistics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and deviations of the observations and bounds of the actions, as CALVIN's."""
    count = sum(row["end"] - row["start"] + 1 for row in rows)
    result: dict[str, Any] = {}
    for key in ("robot_obs", "scene_obs"):
        total, squares = (np.sum([row[key][i] for row in rows], axis=0) for i in (0, 1))
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
        result[key] = [{"_target_": NORMALIZE, "mean": mean.tolist(), "std": std.tolist()}]
    result["act_min_bound"] = np.min([row["actions"][0] for row in rows], axis=0).tolist()
    result["act_max_bound"] = np.max([row["actions"][1] for row in rows], axis=0).tolist()
    return result
