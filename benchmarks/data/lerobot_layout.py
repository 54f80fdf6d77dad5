"""LeRobot's datasets as sources: versions 2.0, 2.1 and 3.0, parquet files and videos.

    meta/info.json                     version, frames a second, features
    meta/tasks.*, meta/episodes*       sentences; where each episode is
    data/…parquet, videos/…mp4         read by index, and decoded from the key frame before

LeRobot does not say what the numbers of a state or an action are, which way a gripper counts, or
where a camera stands. Names say the first (`x y z qx qy qz qw`, `roll pitch yaw`, `gripper_width`,
`gripper_open`); for anything else, and for cameras, `meta/openhelix.json` says it:

    {"state":  {"position": [0, 1, 2], "rotation": {"as": "euler_xyz", "at": [3, 4, 5]},
                "width": 6, "open": {"at": 7, "closed": -1, "opened": 1}},
     "action": {"is": "absolute", "position": [0, 1, 2], "rotation": {"as": "quaternion_xyzw",
                "at": [3, 4, 5, 6]}, "open": {"at": 7, "closed": 0, "opened": 1}},
     "cameras": {"static": {"key": "observation.images.top", "K": [[...]], "T_world_cam": [[...]],
                 "depth": {"key": "observation.images.top_depth", "unit_m": 0.001}}},
     "tasks": {"open the drawer": "open_drawer"}}

"as": "euler_xyz", "quaternion_xyzw", "quaternion_wxyz" or "rotation_vector". "is": "absolute" (the
TCP's target), "relative" (added to the TCP's pose along world axes, with "position_m" and
"rotation_rad" for what 1 is), or "next_state" (there is no action to learn; where the TCP was one
frame later is). A camera that moves has "pose_key", a feature of 16 numbers, in place of
"T_world_cam", or "T_tcp_cam" where it sits on the hand. A sentence is its own task unless "tasks"
names one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, Literal

import av
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import ConfigDict
from scipy.spatial.transform import Rotation

from openhelix.benchmarks.data.source import (
    I64,
    Camera,
    DataError,
    Motion,
    Segment,
    Source,
    check_finite,
    relative_of,
    task_order,
)
from openhelix.runtime.core.files import BadFile, as_record, read_bytes, read_json
from openhelix.runtime.core.interfaces import F64, CameraFrame

INFO, SAID = Path("meta") / "info.json", Path("meta") / "openhelix.json"
KNOWN = ("v2.0", "v2.1", "v3.0")
MAX_LINES_BYTES = 256 * 1024 * 1024
IMAGES = "observation.images."
As = Literal["euler_xyz", "quaternion_xyzw", "quaternion_wxyz", "rotation_vector"]
Matrix = tuple[tuple[float, ...], ...]


# -- What the numbers are, in words of `meta/openhelix.json` ---------------------------


@dataclass(frozen=True, slots=True)
class Turn:
    """Where a rotation is, and how it is written."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    # `as` is a word of Python's, so that the file's own name for it is read apart.
    kind: As
    at: tuple[int, ...]

    def read(self, rows: F64) -> Rotation:
        """Return the rotations of rows (L, n)."""
        found = rows[:, list(self.at)]
        if self.kind == "euler_xyz":
            return Rotation.from_euler("xyz", found)
        if self.kind == "rotation_vector":
            return Rotation.from_rotvec(found)
        return Rotation.from_quat(
            found if self.kind == "quaternion_xyzw" else np.roll(found, -1, 1)
        )


@dataclass(frozen=True, slots=True)
class Grip:
    """Where a gripper's command is, and which values mean closed and open."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    at: int
    closed: float
    opened: float

    def read(self, rows: F64) -> F64:
        """Return openness (L,), 0 or 1."""
        share = (rows[:, self.at] - self.closed) / (self.opened - self.closed)
        return (share > 0.5).astype(np.float64)


@dataclass(frozen=True, slots=True)
class State:
    """What `observation.state` holds."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    position: tuple[int, int, int]
    rotation: Turn
    width: int | None = None
    open: Grip | None = None


@dataclass(frozen=True, slots=True)
class ActionColumns:
    """What `action` holds."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    kind: Literal["absolute", "relative", "next_state"]
    position: tuple[int, int, int] = (0, 1, 2)
    rotation: Turn | None = None
    open: Grip | None = None
    position_m: float = 1.0
    rotation_rad: float = 1.0


@dataclass(frozen=True, slots=True)
class DepthColumn:
    """Where a camera's depth is, and what its unit is."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    key: str
    unit_m: float


@dataclass(frozen=True, slots=True)
class CameraColumns:
    """Where a camera's images are, and how it sees."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    key: str
    K: Matrix | None = None
    T_world_cam: Matrix | None = None
    T_tcp_cam: Matrix | None = None
    pose_key: str = ""
    depth: DepthColumn | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """`meta/openhelix.json`."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    state: State | None = None
    action: ActionColumns | None = None
    cameras: Mapping[str, CameraColumns] | None = None
    tasks: Mapping[str, str] | None = None


def read_said(path: Path) -> Said:
    """Return what a file says of a dataset's numbers.

    Raises:
        BadFile: it says it otherwise than it should; names the field.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {{"as": "kind", "is": "kind"}.get(k, k): plain(v) for k, v in value.items()}
        return value

    return as_record(Said, plain(read_json(path)), str(path))


NAMES: Mapping[As, tuple[str, ...]] = {
    "quaternion_xyzw": ("qx", "qy", "qz", "qw"),
    "euler_xyz": ("roll", "pitch", "yaw"),
}


def named(feature: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of a feature by the ends of their names; {} where one occurs twice."""
    found: Any = feature.get("names")
    while isinstance(found, dict) and found:
        found = next(iter(found.values()))
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        return {}
    ends = [name.lower().replace("-", "_").split(".")[-1] for name in found]
    return {name: i for i, name in enumerate(ends)} if len(set(ends)) == len(ends) else {}


def _turn_of(names: Mapping[str, int]) -> Turn | None:
    for kind, parts in NAMES.items():
        if all(part in names for part in parts):
            return Turn(kind, tuple(names[part] for part in parts))
    return None


def _xyz_of(names: Mapping[str, int]) -> tuple[int, int, int] | None:
    if not all(axis in names for axis in "xyz"):
        return None
    return names["x"], names["y"], names["z"]


# -- Episodes --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where an episode is.

    Attributes:
        data: its parquet file.
        videos: by feature, the file and where in it the episode begins, s.
    """

    data: Path
    videos: Mapping[str, tuple[Path, float]]


class LeRobotSource(Source):
    """One dataset of LeRobot's.

    Args:
        path: its folder, around `meta/`.

    Raises:
        DataError: a file of `meta/` is missing or damaged, or the version is unknown.
    """

    layout: ClassVar[str] = "LeRobot"

    def __init__(self, path: Path) -> None:
        self.path = path
        for kept in (_data, _image_column):  # whoever opens it anew sees what is there now
            kept.cache_clear()
        self._info = _json(path / INFO)
        version = str(self._info.get("codebase_version"))
        if version not in KNOWN:
            raise DataError(
                f"{path / INFO}: codebase_version: {version!r}, known are {', '.join(KNOWN)}"
            )
        self._v3 = version == "v3.0"
        features: Any = self._info.get("features")
        try:
            self.hz = float(self._info["fps"])
            self._features: dict[str, dict[str, Any]] = {k: dict(v) for k, v in features.items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{path / INFO}: fps, features: missing or no object") from None
        if not self.hz > 0:
            raise DataError(f"{path / INFO}: fps: {self.hz}, must be above 0")
        try:
            self._said = read_said(path / SAID) if (path / SAID).exists() else Said()
        except BadFile as error:
            raise DataError(str(error)) from None
        self._sentences = self._read_tasks()
        self.spans, self._places, self._told = self._read_episodes()
        self._task_of = {t: t for t in self._sentences.values()} | dict(self._said.tasks or {})
        self.tasks = task_order(self._task_of[text] for text in self._sentences.values())
        self.cameras = tuple(self._camera(n, c) for n, c in self._columns.items())
        self.facts = {
            "frames": f"LeRobot {version}, parquet"
            + (" and video" if any(p.videos for p in self._places) else ""),
            "state": self._fact("observation.state"),
            "action": self._fact("action"),
            "numbers told by": str(path / SAID) if (path / SAID).exists() else "names alone",
        }

    @classmethod
    def matches(cls, path: Path) -> bool:
        """See `Source.matches`."""
        return (path / INFO).is_file()

    def problems(self) -> list[str]:
        """See `Source.problems`."""
        found = []
        for place in dict.fromkeys(p.data for p in self._places):
            if not place.exists():
                found.append(f"{place}: no such file")
        for place in dict.fromkeys(v for p in self._places for v, _ in p.videos.values()):
            if not place.exists():
                found.append(f"{place}: no such file")
        try:
            _ = self._state, self._action
        except DataError as error:
            found.append(str(error))
        if not any(camera.usable for camera in self.cameras):
            found.append(
                f"{self.path / INFO}: no camera with depth, intrinsics and a pose, which System 1 "
                f"needs; {SAID} tells what is there"
            )
        return found

    def index_files(self) -> Iterable[Path]:
        """See `Source.index_files`."""
        episodes = sorted((self.path / "meta" / "episodes").glob("*/*.parquet"))
        names = ("tasks.parquet", "tasks.jsonl", "episodes.jsonl", INFO.name, SAID.name)
        places = [self.path / "meta" / name for name in names]
        return [place for place in [*places, *episodes] if place.exists()]

    def files(self, first: int, last: int) -> Iterable[Path]:
        """See `Source.files`."""
        place = self._places[self._episode(first)]
        return [place.data, *(video for video, _ in place.videos.values())]

    def check(self, number: int) -> None:
        """See `Source.check`."""
        segment = self.segments[number]
        if not segment.text.strip():
            raise DataError(f"{self.path}: episode {self._episode(segment.first)}: has no task")

    @cached_property
    def segments(self) -> tuple[Segment, ...]:  # type: ignore[override]
        """An episode is one, or one for each run of a task where it has several."""
        out = []
        for number, (first, last) in enumerate(self.spans):
            if len(self._told[number]) == 1:
                text = self._told[number][0]
                out.append(self._segment(int(first), int(last), text))
                continue
            said = self._rows(int(first), int(last), "task_index")[:, 0].astype(int)
            starts = [0, *(np.flatnonzero(np.diff(said)) + 1).tolist()]
            for a, b in zip(starts, [*starts[1:], len(said)], strict=True):
                text = self._sentences.get(int(said[a]), "")
                out.append(self._segment(int(first) + a, int(first) + b - 1, text))
        return tuple(out)

    def _segment(self, first: int, last: int, text: str) -> Segment:
        return Segment(first, last, self._task_of.get(text, text), text)

    def _episode(self, frame: int) -> int:
        return int(np.searchsorted(self.spans[:, 0], frame, side="right")) - 1

    def _read_tasks(self) -> dict[int, str]:
        place = self.path / "meta" / ("tasks.parquet" if self._v3 else "tasks.jsonl")
        try:
            if not self._v3:
                return {int(row["task_index"]): str(row["task"]) for row in _lines(place)}
            table = _parquet(place)
            (text,) = [name for name in table.column_names if name != "task_index"]
            pairs = zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True)
            return {int(number): str(said) for number, said in pairs}
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{place}: task_index, task: cannot be read ({error})") from None

    def _read_episodes(self) -> tuple[I64, list[Place], list[list[str]]]:
        rows, where = self._episode_rows()
        videos = [n for n, f in self._features.items() if f.get("dtype") == "video"]
        places, told, spans, at = [], [], [], 0
        try:
            for row in rows:
                number, length = int(row["episode_index"]), int(row["length"])
                if length < 1:
                    raise DataError(f"{where}: episode {number}: length: {length}")
                told.append([str(text) for text in row.get("tasks") or [""]])
                spans.append((at, at + length - 1))
                at += length
                places.append(self._place(row, number, videos))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{where}: {type(error).__name__}: {error}") from None
        if not spans:
            raise DataError(f"{where}: lists no episode")
        return np.array(spans, np.int64), places, told

    def _episode_rows(self) -> tuple[list[dict[str, Any]], Path]:
        if not self._v3:
            where = self.path / "meta" / "episodes.jsonl"
            rows = list(_lines(where))
        else:
            where = self.path / "meta" / "episodes"
            files = sorted(where.glob("*/*.parquet"))
            if not files:
                raise DataError(f"{where}: has no parquet file")
            rows = [
                row
                for file in files
                for row in _parquet(
                    file, [n for n in _columns(file) if not n.startswith("stats/")]
                ).to_pylist()
            ]
        return sorted(rows, key=lambda row: int(row.get("episode_index", 0))), where

    def _place(self, row: Mapping[str, Any], number: int, videos: Sequence[str]) -> Place:
        data, film = str(self._info["data_path"]), str(self._info.get("video_path") or "")
        if not self._v3:
            chunk = number // int(self._info.get("chunks_size", 1000))
            told = {"episode_chunk": chunk, "episode_index": number}
            return Place(
                self._inside(data.format(**told)),
                {v: (self._inside(film.format(video_key=v, **told)), 0.0) for v in videos},
            )
        own = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        found = {}
        for key in videos:
            at = {n: int(row[f"videos/{key}/{n}"]) for n in ("chunk_index", "file_index")}
            place = self._inside(film.format(video_key=key, **at))
            found[key] = place, float(row[f"videos/{key}/from_timestamp"])
        return Place(self._inside(data.format(**own)), found)

    def _inside(self, name: str) -> Path:
        place = Path(name)
        if place.is_absolute() or ".." in place.parts:
            raise DataError(f"{self.path / INFO}: data_path, video_path: {name!r} leads outside")
        return self.path / place

    # -- What the numbers are ------------------------------------------------------------

    def _fact(self, key: str) -> str:
        feature = self._features.get(key)
        if feature is None:
            return "none"
        names = ", ".join(named(feature)) or "without names"
        return f"{feature.get('shape')}: {names}"

    @cached_property
    def _state(self) -> State:
        if self._said.state is not None:
            return self._said.state
        names = named(self._features.get("observation.state", {}))
        xyz, turn = _xyz_of(names), _turn_of(names)
        if xyz is None or turn is None:
            raise DataError(self._unknown("observation.state", "state"))
        opened = Grip(names["gripper_open"], 0.0, 1.0) if "gripper_open" in names else None
        return State(xyz, turn, names.get("gripper_width"), opened)

    @cached_property
    def _action(self) -> ActionColumns:
        if self._said.action is not None:
            return self._said.action
        names = named(self._features.get("action", {}))
        xyz, turn = _xyz_of(names), _turn_of(names)
        if xyz is None or turn is None or "gripper_open" not in names:
            raise DataError(self._unknown("action", "action"))
        return ActionColumns("absolute", xyz, turn, Grip(names["gripper_open"], 0.0, 1.0))

    def _unknown(self, key: str, field: str) -> str:
        return (
            f"{self.path / INFO}: features.{key}: {self._fact(key)}, which do not say where the "
            f"hand is; System 1 acts on the hand's pose. {self.path / SAID} can tell, in {field!r}"
        )

    def motion(self, first: int, last: int) -> Motion:
        """See `Source.motion`."""
        state, action = self._state, self._action
        until = int(self.spans[self._episode(first), 1])
        rows = self._rows(first, min(last + 1, until), "observation.state")
        count = last - first + 1
        if len(rows) == count:  # the last frame of the episode has no next
            rows = np.concatenate([rows, rows[-1:]])
        position, turns = rows[:, list(state.position)], state.rotation.read(rows)
        if action.kind == "next_state":
            command = None
            wanted, to = position[1:], turns[1:]
        else:
            command = self._rows(first, last, "action")
            if action.rotation is None:
                raise DataError(f"{self.path / SAID}: action.rotation: missing")
            wanted, to = command[:, list(action.position)], action.rotation.read(command)
            if action.kind == "relative":
                wanted = position[:-1] + action.position_m * wanted
                to = Rotation.from_rotvec(action.rotation_rad * to.as_rotvec()) * turns[:-1]
        sent = None if command is None or action.open is None else action.open.read(command)
        seen = None if state.open is None else state.open.read(rows)
        if sent is None and seen is None:
            raise DataError(f"{self.path / SAID}: action.open: missing, and state.open too")
        if sent is None:
            sent = np.asarray(seen)[1:]
        if seen is None:  # what was commanded one frame before is what the gripper does
            seen = np.concatenate([sent[:1], sent])
        width = rows[:, state.width] if state.width is not None else 0.08 * seen
        proprio = np.column_stack([position, turns.as_quat(), width, seen])[:-1]
        targets = np.column_stack([wanted, to.as_quat(), sent])
        euler = [
            np.concatenate([p, r.as_euler("xyz")], 1)
            for p, r in ((position[:-1], turns[:-1]), (wanted, to))
        ]
        return Motion(
            proprio.astype(np.float32),
            targets.astype(np.float32),
            relative_of(euler[0], euler[1], sent),
        )

    def _rows(self, first: int, last: int, key: str) -> F64:
        """Return a feature's rows (L, n) of frames `first` to `last` of one episode."""
        number = self._episode(first)
        place = self._places[number].data
        table = _data(place, (key, "episode_index"))
        own = np.flatnonzero(table["episode_index"] == self._number(number))
        have = int(self.spans[number, 1] - self.spans[number, 0]) + 1
        if len(own) != have:
            raise DataError(
                f"{place}: episode_index: {len(own)} frames of episode {self._number(number)}, "
                f"meta/ says {have}"
            )
        low = first - int(self.spans[number, 0])
        found = table[key][own[low : low + last - first + 1]]
        found = found[:, None] if found.ndim == 1 else found
        check_finite(found, f"{place}: {key}")
        return found

    def _number(self, number: int) -> int:
        """Return an episode's own number; they are in order and may leave some out."""
        return self._own_numbers[number]

    @cached_property
    def _own_numbers(self) -> list[int]:
        return [int(row["episode_index"]) for row in self._episode_rows()[0]]

    # -- Images --------------------------------------------------------------------------

    @cached_property
    def _columns(self) -> dict[str, CameraColumns]:
        """The cameras: as they are told, else every feature of images that is no depth."""
        if self._said.cameras:
            for name, told in self._said.cameras.items():
                keys = [told.key, *([told.depth.key] if told.depth else [])]
                for key in [*keys, *([told.pose_key] if told.pose_key else [])]:
                    if key not in self._features:
                        raise DataError(f"{self.path / SAID}: cameras.{name}: no feature {key!r}")
            return dict(self._said.cameras)
        return {
            key.removeprefix(IMAGES).removeprefix("observation."): CameraColumns(key)
            for key, feature in self._features.items()
            if feature.get("dtype") in ("video", "image") and "depth" not in key
        }

    def _camera(self, name: str, told: CameraColumns) -> Camera:
        shape = [int(n) for n in self._features[told.key].get("shape", ())]
        if len(shape) != 3 or min(shape) < 1:
            raise DataError(f"{self.path / INFO}: features.{told.key}.shape: {shape}")
        height, width = shape[1:] if shape[0] in (1, 3) and shape[2] > 4 else shape[:2]
        K = None if told.K is None else np.array(told.K, float)
        if K is not None and K.shape != (3, 3):
            raise DataError(
                f"{self.path / SAID}: cameras.{name}.K: shape {K.shape}, must be (3, 3)"
            )
        moves = told.pose_key or told.T_tcp_cam is not None
        posed = bool(moves) or told.T_world_cam is not None
        mount = "hand" if moves else "world"
        return Camera(name, height, width, told.depth is not None, K, posed, mount)

    def views(
        self, frames: Sequence[int], names: Sequence[str]
    ) -> Iterator[dict[str, CameraFrame]]:
        """See `Source.views`."""
        number = self._episode(frames[0])
        start = int(self.spans[number, 0])
        steps = [frame - start for frame in frames]
        told = {n: self._columns[n] for n in self._columns if n in names}
        colour = {n: self._images(number, c.key, steps) for n, c in told.items()}
        depth = {n: self._images(number, c.depth.key, steps) for n, c in told.items() if c.depth}
        poses = {n: self._poses(n, c, frames) for n, c in told.items()}
        for row in range(len(frames)):
            out = {}
            for name, columns in told.items():
                camera = self.camera(name)
                assert camera is not None
                size = (camera.height, camera.width)
                rgb = next(colour[name])
                if rgb.shape != (*size, 3):
                    raise DataError(
                        f"{self._places[number].data}: {columns.key}: shape {rgb.shape}, meta/ says "
                        f"{(*size, 3)}"
                    )
                far = None
                if columns.depth is not None:
                    raw = next(depth[name])
                    raw = raw[..., 0] if raw.ndim == 3 else raw
                    if raw.shape != size:
                        raise DataError(
                            f"{self._places[number].data}: {columns.depth.key}: shape {raw.shape}, "
                            f"must be {size}"
                        )
                    far = raw.astype(np.float32) * np.float32(columns.depth.unit_m)
                K = camera.K if camera.K is not None else np.full((3, 3), np.nan)
                out[name] = CameraFrame(0, rgb, far, K, poses[name][row])
            yield out

    def _poses(self, name: str, told: CameraColumns, frames: Sequence[int]) -> list[F64]:
        if told.pose_key:
            rows = [self._rows(f, f, told.pose_key)[0].reshape(-1) for f in frames]
            if any(row.shape != (16,) for row in rows):
                raise DataError(f"{self.path / INFO}: features.{told.pose_key}: must be 16 numbers")
            return [row.reshape(4, 4) for row in rows]
        fixed = told.T_world_cam if told.T_tcp_cam is None else told.T_tcp_cam
        T = np.full((4, 4), np.nan) if fixed is None else np.array(fixed, float)
        if T.shape != (4, 4):
            raise DataError(f"{self.path / SAID}: cameras.{name}: pose {T.shape}, must be (4, 4)")
        if told.T_tcp_cam is None:
            return [T] * len(frames)
        out = []
        for frame in frames:
            row = self._rows(frame, frame, "observation.state")
            hand = np.eye(4)
            hand[:3, :3] = self._state.rotation.read(row)[0].as_matrix()
            hand[:3, 3] = row[0, list(self._state.position)]
            out.append(hand @ T)
        return out

    def _images(self, number: int, key: str, steps: Sequence[int]) -> Iterator[npt.NDArray[Any]]:
        place = self._places[number]
        if key in place.videos:
            film, begins_s = place.videos[key]
            yield from _decoded(film, key, [begins_s + step / self.hz for step in steps], self.hz)
            return
        column = _image_column(place.data, key, self._number(number))
        for step in steps:
            if step >= len(column):
                raise DataError(f"{place.data}: {key}: {len(column)} images, frame {step} is asked")
            yield _picture(column[step], self.path, place.data, key)


# -- Files -----------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except BadFile as error:
        raise DataError(str(error)) from None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        data = read_bytes(path, MAX_LINES_BYTES)
    except BadFile as error:
        raise DataError(str(error)) from None
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                yield dict(json.loads(line))
            except (ValueError, TypeError, RecursionError) as error:
                raise DataError(f"{path}: line {number}: not JSON ({error})") from None


def _columns(path: Path) -> list[str]:
    try:
        return list(pq.read_schema(path).names)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: damaged or no parquet: {_said(error)}") from None


def _parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    if not path.exists():
        raise DataError(f"{path}: no such file")
    try:
        return pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: damaged or no parquet: {_said(error)}") from None


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


@lru_cache(maxsize=8)
def _data(path: Path, columns: tuple[str, ...]) -> dict[str, npt.NDArray[Any]]:
    """Return some columns of numbers of a data file."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    have = _columns(path)
    for name in columns:
        if name not in have:
            raise DataError(f"{path}: no {name}")
    table = _parquet(path, list(columns))
    try:
        return {
            name: np.array(table[name].to_pylist(), np.int64 if name == "episode_index" else float)
            for name in columns
        }
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {', '.join(columns)}: not rows of numbers ({error})") from None


@lru_cache(maxsize=4)
def _image_column(path: Path, key: str, episode: int) -> list[Any]:
    """Return the images of one episode as they are stored, read by row groups."""
    if key not in _columns(path):
        raise DataError(f"{path}: no {key}")
    out: list[Any] = []
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                numbers = file.read_row_group(group, ["episode_index"])["episode_index"]
                own = np.asarray(numbers) == episode
                if own.any():
                    column = file.read_row_group(group, [key])[key].to_pylist()
                    out += [column[i] for i in np.flatnonzero(own)]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: {key}: damaged: {_said(error)}") from None
    return out


def _picture(stored: Any, root: Path, path: Path, key: str) -> npt.NDArray[Any]:
    """Return an image as an array, from its bytes or from the file that is named."""
    try:
        data = stored["bytes"]
        if data is None:
            name = Path(stored["path"])
            if name.is_absolute() or ".." in name.parts:
                raise DataError(f"{path}: {key}: {str(name)!r} leads outside")
            data = read_bytes(root / name, MAX_LINES_BYTES)
        with Image.open(BytesIO(data)) as image:
            return np.asarray(image)
    except BadFile as error:
        raise DataError(str(error)) from None
    except Exception as error:  # Pillow lets through what its parsers meet
        raise DataError(f"{path}: {key}: no image ({_said(error)})") from None


def _decoded(
    path: Path, key: str, times_s: Sequence[float], hz: float
) -> Iterator[npt.NDArray[Any]]:
    """Yield a video's frames at ascending times, each the nearest."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    try:
        with av.open(str(path)) as film:
            stream = film.streams.video[0]
            stream.thread_type = "NONE"
            reading, newest, frame = None, -np.inf, None
            for time_s in times_s:
                if frame is not None and abs(newest - time_s) < 0.5 / hz:  # asked for again
                    yield frame.to_ndarray(format="rgb24")
                    continue
                if reading is None or time_s - newest > 2.0:  # farther than decoding pays
                    film.seek(int(max(time_s - 0.5 / hz, 0) / stream.time_base), stream=stream)
                    reading = film.decode(stream)
                for frame in reading:
                    newest = float(frame.pts * stream.time_base)
                    if newest > time_s - 0.5 / hz:
                        break
                else:
                    raise DataError(f"{path}: {key}: ends before {time_s:.3f} s")
                if newest > time_s + 0.5 / hz:
                    raise DataError(f"{path}: {key}: has no frame at {time_s:.3f} s")
                yield frame.to_ndarray(format="rgb24")
    except (OSError, av.FFmpegError, IndexError) as error:
        raise DataError(f"{path}: {key}: cannot be decoded ({_said(error)})") from None
