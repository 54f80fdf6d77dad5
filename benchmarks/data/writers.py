"""Datasets written in other people's layouts: LeRobot's version 3.0, CALVIN's, and MCAP.

`convert` takes whatever a reader gives. In LeRobot's layout and in MCAP every segment becomes an
episode; CALVIN's keeps the episodes, with segments as annotations. What a layout has no place for
lies beside it: `meta/openhelix.json` (what the numbers are, camera matrices), `cameras.json`.
A writer finishes its index last, so that a folder without one was never finished.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.spatial.transform import Rotation

from openhelix.benchmarks.calvin.dataset import (
    CAMERAS_FILE,
    MAX_WINDOW,
    DatasetWriter,
    cameras_bytes,
)
from openhelix.benchmarks.calvin.tasks import TASKS
from openhelix.benchmarks.data.lerobot_layout import IMAGES, INFO, SAID
from openhelix.benchmarks.data.source import Camera, DataError, Motion, Segment, Source
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import replace_file
from openhelix.runtime.core.interfaces import F32, Action, CameraFrame, Observation
from openhelix.runtime.observe.recorder import InstructionRecord, RecordingWriter

Say = Callable[[str], None]
STATE_NAMES = ["x", "y", "z", "qx", "qy", "qz", "qw", "gripper_width", "gripper_open"]
ACTION_NAMES = [*STATE_NAMES[:7], "gripper_open"]
POSE = "observation.camera_pose."
# Of 15-bit depth images, up to 6.55 m; LeRobot reads 16-bit ones as signed numbers.
DEPTH_UNIT_M = 2e-4
DATA_MB, VIDEO_MB, CHUNK_FILES = 100, 200, 1000  # LeRobot's own defaults


def stretches(source: Source) -> list[Segment]:
    """Return what becomes an episode: the segments, or the episodes where there are none."""
    if source.segments:
        return list(source.segments)
    return [Segment(int(a), int(b), "", "") for a, b in source.spans]


def frames_of(source: Source, stretch: Segment) -> Iterator[dict[str, CameraFrame]]:
    """Yield all frames of a stretch, all cameras."""
    names = [camera.name for camera in source.cameras]
    return source.views(range(stretch.first, stretch.last + 1), names)


# -- LeRobot ---------------------------------------------------------------------------


class _Film:
    """One camera's videos, a file until it is full."""

    def __init__(self, root: Path, key: str, camera: Camera, fps: float) -> None:
        self._root, self._key, self._camera, self._fps = root, key, camera, fps
        self._file = -1
        self._container: Any = None
        self._frames = 0

    def begin(self) -> tuple[int, float]:
        """Return in which file the next episode is, and at which second of it."""
        if self._container is None or self._place().stat().st_size > VIDEO_MB << 20:
            self.close()
            self._file += 1
            self._frames = 0
            place = self._place()
            place.parent.mkdir(parents=True, exist_ok=True)
            self._container = av.open(str(place), "w")
            # A key frame every other one, as LeRobot's own videos: they are read at random.
            self._stream = self._container.add_stream(
                "libx264", rate=round(self._fps), options={"g": "2", "crf": "18"}
            )
            self._stream.width, self._stream.height = self._camera.width, self._camera.height
            self._stream.pix_fmt = "yuv420p"
        return self._file, self._frames / self._fps

    def add(self, rgb: npt.NDArray[np.uint8]) -> None:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
        frame.pts = self._frames
        self._frames += 1
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        if self._container is not None:
            self._container.mux(self._stream.encode())
            self._container.close()
            self._container = None

    def _place(self) -> Path:
        chunk, file = divmod(self._file, CHUNK_FILES)
        name = f"chunk-{chunk:03d}/file-{file:03d}.mp4"
        return self._root / "videos" / self._key / name


class _Moments:
    """Smallest, largest, mean and deviation of a feature, as `meta/stats.json` has them."""

    def __init__(self) -> None:
        self._low: Any = None
        self._count = 0

    def add(self, rows: npt.NDArray[Any]) -> None:
        """Take in rows (N, n)."""
        rows = rows.astype(np.float64)
        if self._low is None:
            self._low, self._high = rows.min(0), rows.max(0)
            self._sum, self._squares = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
        self._low, self._high = (
            np.minimum(self._low, rows.min(0)),
            np.maximum(self._high, rows.max(0)),
        )
        self._sum += rows.sum(0)
        self._squares += np.square(rows).sum(0)
        self._count += len(rows)

    def told(self, image: bool = False) -> dict[str, Any]:
        mean = self._sum / self._count
        std = np.sqrt(np.maximum(self._squares / self._count - mean**2, 0))
        found = {"min": self._low, "max": self._high, "mean": mean, "std": std}
        shaped = {k: v.reshape(-1, 1, 1) if image else v for k, v in found.items()}
        return {k: v.tolist() for k, v in shaped.items()} | {"count": [self._count]}


class LeRobotWriter:
    """Writes a dataset of version 3.0.

    Args:
        out: its folder, which must not hold anything.
        source: what is written.
        video: False keeps images as they are (PNG, in the parquet files) instead of as video.
    """

    def __init__(self, out: Path, source: Source, video: bool = True) -> None:
        self._out, self._source = out, source
        even = all(c.height % 2 == 0 and c.width % 2 == 0 for c in source.cameras)
        self._video = video and even
        self._films = {
            c.name: _Film(out, f"{IMAGES}{c.name}", c, source.hz)
            for c in source.cameras
            if self._video
        }
        self._moving = [c.name for c in source.cameras if c.posed and c.mount != "world"]
        self._fixed: dict[str, Any] = {}
        self._texts: dict[str, int] = {}
        self._tasks: dict[str, str] = {}
        self._episodes: list[dict[str, Any]] = []
        self._frames = 0
        self._file = -1
        self._data: pq.ParquetWriter | None = None
        self._stats: dict[str, _Moments] = {}
        self._schema = pa.schema(list(self._fields()))

    def _fields(self) -> Iterator[pa.Field]:
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        yield pa.field("observation.state", pa.list_(pa.float32(), len(STATE_NAMES)))
        yield pa.field("action", pa.list_(pa.float32(), len(ACTION_NAMES)))
        for camera in self._source.cameras:
            if not self._video:
                yield pa.field(f"{IMAGES}{camera.name}", image)
            if camera.depth:
                yield pa.field(f"{IMAGES}{camera.name}_depth", image)
        for name in self._moving:
            yield pa.field(f"{POSE}{name}", pa.list_(pa.float32(), 16))
        yield pa.field("timestamp", pa.float32())
        for name in ("frame_index", "episode_index", "index", "task_index"):
            yield pa.field(name, pa.int64())

    def add(self, segment: Segment) -> None:
        """Write one segment as an episode.

        Raises:
            DataError: it cannot be read.
        """
        motion = self._source.motion(segment.first, segment.last)
        columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        begun = {name: film.begin() for name, film in self._films.items()}
        for views in frames_of(self._source, segment):
            self._add_images(views, columns)
        count, text = len(motion), segment.text or "unlabelled"
        task = self._texts.setdefault(text, len(self._texts))
        if self._tasks.setdefault(text, segment.task) != segment.task:
            raise DataError(
                f"{self._source.path}: {text!r} stands for {self._tasks[text]} and {segment.task}; "
                "LeRobot's layout has one task for a sentence"
            )
        columns["observation.state"] = motion.proprio.tolist()
        columns["action"] = motion.targets.tolist()
        columns["timestamp"] = (np.arange(count) / self._source.hz).tolist()
        columns["frame_index"] = list(range(count))
        columns["episode_index"] = [len(self._episodes)] * count
        columns["index"] = list(range(self._frames, self._frames + count))
        columns["task_index"] = [task] * count
        for name, rows in (("observation.state", motion.proprio), ("action", motion.targets)):
            self._stats.setdefault(name, _Moments()).add(rows)
        chunk, file = divmod(self._write(columns), CHUNK_FILES)
        row = {
            "episode_index": len(self._episodes),
            "tasks": [text],
            "length": count,
            "data/chunk_index": chunk,
            "data/file_index": file,
            "dataset_from_index": self._frames,
            "dataset_to_index": self._frames + count,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        for name, (number, at_s) in begun.items():
            key = f"videos/{IMAGES}{name}"
            row[f"{key}/chunk_index"], row[f"{key}/file_index"] = divmod(number, CHUNK_FILES)
            row[f"{key}/from_timestamp"] = at_s
            row[f"{key}/to_timestamp"] = at_s + count / self._source.hz
        self._episodes.append(row)
        self._frames += count

    def _add_images(self, views: Mapping[str, CameraFrame], columns: dict[str, list[Any]]) -> None:
        for camera in self._source.cameras:
            view, key = views[camera.name], f"{IMAGES}{camera.name}"
            self._stats.setdefault(key, _Moments()).add(view.rgb[::8, ::8].reshape(-1, 3) / 255)
            if self._video:
                self._films[camera.name].add(view.rgb)
            else:
                columns[key].append({"bytes": _png(view.rgb), "path": None})
            if view.depth is not None:
                columns[f"{key}_depth"].append({"bytes": _png(_units(view.depth)), "path": None})
            if camera.name in self._moving:
                columns[f"{POSE}{camera.name}"].append(view.T_world_cam.reshape(16).tolist())
            elif camera.posed:
                pose = self._fixed.setdefault(camera.name, view.T_world_cam)
                if not np.allclose(pose, view.T_world_cam, atol=1e-6):
                    raise DataError(
                        f"{self._source.path}: {camera.name}: stands elsewhere in another scene; "
                        "LeRobot's layout has one place for it, so convert each scene apart"
                    )

    def _write(self, columns: dict[str, list[Any]]) -> int:
        """Append an episode's rows; return the number of their file."""
        if self._data is None or self._place().stat().st_size > DATA_MB << 20:
            if self._data is not None:
                self._data.close()
            self._file += 1
            self._place().parent.mkdir(parents=True, exist_ok=True)
            self._data = pq.ParquetWriter(self._place(), self._schema)
        self._data.write_table(pa.table(columns, schema=self._schema))
        return self._file

    def _place(self) -> Path:
        chunk, file = divmod(self._file, CHUNK_FILES)
        return self._out / "data" / f"chunk-{chunk:03d}" / f"file-{file:03d}.parquet"

    def close(self) -> None:
        """Finish the files and write `meta/`, its `info.json` last."""
        for film in self._films.values():
            film.close()
        if self._data is not None:
            self._data.close()
        meta = self._out / "meta"
        replace_file(meta / "tasks.parquet", _tasks_bytes(list(self._texts)))
        table = pa.Table.from_pylist(self._episodes)
        episodes = meta / "episodes" / "chunk-000" / "file-000.parquet"
        replace_file(episodes, _parquet_bytes(table))
        stats = {
            name: moments.told(name.startswith(IMAGES)) for name, moments in self._stats.items()
        }
        replace_file(meta / "stats.json", json.dumps(stats, indent=1).encode())
        replace_file(self._out / SAID, json.dumps(self._said(), indent=1).encode())
        replace_file(self._out / INFO, json.dumps(self._info(), indent=1).encode())

    def _said(self) -> dict[str, Any]:
        cameras = {}
        for camera in self._source.cameras:
            key = f"{IMAGES}{camera.name}"
            told: dict[str, Any] = {"key": key}
            if camera.K is not None:
                told["K"] = camera.K.tolist()
            if camera.name in self._moving:
                told["pose_key"] = f"{POSE}{camera.name}"
            elif camera.name in self._fixed:
                told["T_world_cam"] = self._fixed[camera.name].tolist()
            if camera.depth:
                told["depth"] = {"key": f"{key}_depth", "unit_m": DEPTH_UNIT_M}
            cameras[camera.name] = told
        turn = {"as": "quaternion_xyzw", "at": [3, 4, 5, 6]}
        grip = {"closed": 0.0, "opened": 1.0}
        return {
            "state": {
                "position": [0, 1, 2], "rotation": turn, "width": 7, "open": {"at": 8, **grip}
            },
            "action": {
                "is": "absolute", "position": [0, 1, 2], "rotation": turn,
                "open": {"at": 7, **grip},
            },
            "cameras": cameras,
            "tasks": {text: task for text, task in self._tasks.items() if task},
        }  # fmt: skip

    def _info(self) -> dict[str, Any]:
        fps = round(self._source.hz)
        features: dict[str, Any] = {
            "observation.state": _feature("float32", [len(STATE_NAMES)], STATE_NAMES),
            "action": _feature("float32", [len(ACTION_NAMES)], ACTION_NAMES),
        }
        axes = ["height", "width", "channels"]
        for camera in self._source.cameras:
            size, key = [camera.height, camera.width], f"{IMAGES}{camera.name}"
            features[key] = _feature("video" if self._video else "image", [*size, 3], axes)
            if self._video:
                features[key]["info"] = {
                    "video.height": camera.height,
                    "video.width": camera.width,
                    "video.codec": "h264",
                    "video.pix_fmt": "yuv420p",
                    "video.is_depth_map": False,
                    "video.fps": fps,
                    "video.channels": 3,
                    "has_audio": False,
                }
            if camera.depth:
                features[f"{key}_depth"] = _feature("image", [*size, 1], axes)
        for name in self._moving:
            features[f"{POSE}{name}"] = _feature("float32", [16], None)
        features["timestamp"] = _feature("float32", [1], None)
        for name in ("frame_index", "episode_index", "index", "task_index"):
            features[name] = _feature("int64", [1], None)
        files = "chunk-{chunk_index:03d}/file-{file_index:03d}"
        return {
            "codebase_version": "v3.0",
            "robot_type": "openhelix",
            "total_episodes": len(self._episodes),
            "total_frames": self._frames,
            "total_tasks": len(self._texts),
            "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": DATA_MB,
            "video_files_size_in_mb": VIDEO_MB,
            "fps": fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": f"data/{files}.parquet",
            "video_path": f"videos/{{video_key}}/{files}.mp4" if self._video else None,
            "features": features,
        }


def _feature(dtype: str, shape: list[int], names: list[str] | None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "names": names}


def _png(pixels: npt.NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _units(depth: F32) -> npt.NDArray[np.uint16]:
    """Return depth as 15-bit numbers; 0 where there is none, or more than they hold."""
    units = np.round(np.nan_to_num(depth / DEPTH_UNIT_M, nan=0.0, posinf=0.0, neginf=0.0))
    return np.where((units > 0) & (units < 32768), units, 0).astype(np.uint16)


def _parquet_bytes(table: pa.Table) -> bytes:
    stream = pa.BufferOutputStream()
    pq.write_table(table, stream)
    return bytes(stream.getvalue())


def _tasks_bytes(texts: list[str]) -> bytes:
    """Return `tasks.parquet`: a table that pandas reads with the sentences as its index."""
    index = "__index_level_0__"
    table = pa.table({"task_index": pa.array(range(len(texts)), pa.int64()), index: texts})

    def column(name: str | None, field: str, kind: str, numpy_type: str) -> dict[str, Any]:
        return {
            "name": name, "field_name": field, "pandas_type": kind, "numpy_type": numpy_type,
            "metadata": None,
        }  # fmt: skip

    told = {
        "index_columns": [index],
        "column_indexes": [],
        "columns": [
            column("task_index", "task_index", "int64", "int64"),
            column(None, index, "unicode", "object"),
        ],
        "pandas_version": "2.0.0",
    }
    return _parquet_bytes(table.replace_schema_metadata({"pandas": json.dumps(told)}))


def _lerobot(source: Source, out: Path, say: Say, video: bool) -> int:
    writer = LeRobotWriter(out, source, video)
    todo = stretches(source)
    for done, segment in enumerate(todo, 1):
        writer.add(segment)
        say(f"{done} of {len(todo)} episodes")
    writer.close()
    return len(todo)


# -- CALVIN ----------------------------------------------------------------------------


def _calvin(source: Source, out: Path, say: Say, video: bool) -> int:
    """Write the episodes as one split, annotated with the segments in them."""
    unknown = sorted({s.task for s in source.segments} - set(TASKS))
    if unknown:
        raise DataError(
            f"{source.path}: task {unknown[0]!r} is none of CALVIN's 34, by which its layout names "
            "what was done"
        )
    matrices: dict[str, dict[str, Any]] = {}
    left_open = False
    with DatasetWriter(out) as writer:
        for number, (first, last) in enumerate(source.spans.tolist(), 1):
            own = [s for s in source.segments if first <= s.first and s.last <= last]
            scene = own[0].scene if own and own[0].scene else "unknown"
            motion, states = source.motion(first, last), source.calvin_states(first, last)
            left_open |= states is None
            whole = Segment(first, last, "", "")
            with writer.episode(scene) as episode:
                for row, views in enumerate(frames_of(source, whole)):
                    episode.add(_observation(source, motion, states, row, views))
                    if scene not in matrices:
                        matrices[scene] = _matrices(source, views)
                for segment in own:
                    begin = max(segment.first, segment.last - MAX_WINDOW + 1)
                    span = begin - first, segment.last - first
                    episode.annotate(*span, segment.task, segment.text)
            say(f"{number} of {len(source.spans)} episodes")
    replace_file(out / CAMERAS_FILE, cameras_bytes(matrices))
    if left_open:
        say("robot_obs[7:14] (joints) and scene_obs are unknown to the source: written as 0")
    return len(source.spans)


def _observation(
    source: Source,
    motion: Motion,
    states: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None,
    row: int,
    views: Mapping[str, CameraFrame],
) -> dict[str, Any]:
    """Return a frame as an env of CALVIN's returns it."""
    if states is not None:
        robot, scene = states[0][row], states[1][row]
    else:
        robot, scene = np.zeros(15), np.zeros(24)
        own = motion.proprio[row].astype(np.float64)
        robot[:3], robot[3:6] = own[:3], Rotation.from_quat(own[3:7]).as_euler("xyz")
        robot[6], robot[14] = own[7], 1.0 if own[8] > 0.5 else -1.0
    return {
        "robot_obs": robot,
        "scene_obs": scene,
        "rgb_obs": {f"rgb_{n}": v.rgb for n, v in views.items()},
        "depth_obs": {f"depth_{n}": v.depth for n, v in views.items() if v.depth is not None},
        "pose_obs": {
            f"pose_{c.name}": views[c.name].T_world_cam
            for c in source.cameras
            if c.posed and c.mount != "world"
        },
    }


def _matrices(source: Source, views: Mapping[str, CameraFrame]) -> dict[str, Any]:
    out = {}
    for camera in source.cameras:
        if camera.K is None or not camera.posed:
            continue
        view = views[camera.name]
        out[camera.name] = {
            "height": camera.height,
            "width": camera.width,
            "K": view.K.tolist(),
            "T_world_cam": view.T_world_cam.tolist(),
        }
    return out


# -- MCAP ------------------------------------------------------------------------------


def _mcap(source: Source, out: Path, say: Say, video: bool) -> int:
    """Write a recording for each segment; Foxglove, Rerun and our own commands open it."""
    todo = stretches(source)
    for number, segment in enumerate(todo):
        motion = source.motion(segment.first, segment.last)
        meta = {"dataset": str(source.path), "layout": source.layout, "hz": source.hz}
        writer = RecordingWriter(out / f"episode-{number:06d}.mcap", meta)
        said = InstructionRecord(number, segment.task, segment.text)
        writer.put("/instruction", 0, said)
        for row, views in enumerate(frames_of(source, segment)):
            t_ns = round(row * 1e9 / source.hz)
            for name, view in views.items():
                frame = CameraFrame(t_ns, view.rgb, view.depth, view.K, view.T_world_cam)
                writer.put_frame(name, frame)
            own, sent = (part[row].astype(np.float64) for part in (motion.proprio, motion.targets))
            pose, target = (_unit(part[:7]) for part in (own, sent))
            seen = Observation(
                t_ns, {}, pose, float(own[7]), bool(own[8] > 0.5), np.empty(0), number
            )
            writer.put("/observation", t_ns, seen)
            later = round((row + 1) * 1e9 / source.hz)
            writer.put("/action", t_ns, Action(target, float(sent[7]), number, {}, later))
        writer.finish({"complete": True, "records": writer.records, "bytes": writer.bytes})
        say(f"{number + 1} of {len(todo)} episodes")
    return len(todo)


def _unit(pose: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a pose whose quaternion has length 1 to the last bit that float64 has."""
    return np.concatenate([pose[:3], pose[3:] / np.linalg.norm(pose[3:])])


WRITERS: Mapping[str, Callable[[Source, Path, Say, bool], int]] = {
    "lerobot": _lerobot,
    "calvin": _calvin,
    "mcap": _mcap,
}


def convert(source: Source, out: Path, layout: str, say: Say, video: bool = True) -> dict[str, Any]:
    """Write a dataset in another layout.

    Args:
        source: the dataset.
        out: the folder to write, which must not hold anything.
        layout: of `WRITERS`.
        say: is told of the size before, and of progress.
        video: LeRobot's layout: False keeps images as they are.

    Raises:
        DataError: something cannot be read, or has no place in the layout.
        ConfigError: `out` holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out: {out} is there already; name a new folder")
    todo = stretches(source)
    frames = sum(s.last - s.first + 1 for s in todo)
    raw = frames * sum(c.height * c.width * (7 if c.depth else 3) for c in source.cameras)
    say(f"{source.path}: {len(todo):,} episodes, {frames:,} frames, {raw / 1e9:.2f} GB unpacked")
    episodes = WRITERS[layout](source, out, say, video)
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    return {"folder": str(out), "layout": layout, "episodes": episodes, "bytes": size}
