"""CALVIN's dataset layout: one `.npz` per frame, with index files beside them.

A split's folder can be read by code written for CALVIN, and CALVIN's own folders by ours.
Writing survives a kill at any moment: frames are written first, then one line is appended
to `episodes.jsonl`, and that line is the commit. Whatever is not in a complete line does
not count; a reopened folder continues after the last one. CALVIN's index files are derived from
those lines by `close`.

`auto_lang_ann.npy` and `scene_info.npy` are dictionaries inside an object array, which
NumPy stores as a pickle, and a pickle may run any code that its author likes. CALVIN's own
code reads nothing else, so ours writes them, but beside each goes the same content as JSON
(embeddings as a plain array), which is what we read unless the other was written later. The pickle
is read by an unpickler that admits plain containers, numbers, strings and arrays, and
refuses every other global by name.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from openhelix.benchmarks.calvin.tasks import get_task
from openhelix.runtime.core.files import (
    MAX_JSON_BYTES,
    BadFile,
    read_array,
    read_arrays,
    read_bytes,
    read_json,
    replace_file,
)

# -- Object arrays, read without trusting them -----------------------------------------

LANG_FILE = Path("lang_annotations") / "auto_lang_ann.npy"
LANG_TWIN = Path("lang_annotations") / "auto_lang_ann.json"
EMB_TWIN = Path("lang_annotations") / "auto_lang_emb.npy"
# What array pickles are made of, under the names of NumPy 1 and NumPy 2.
MAX_OBJECT_BYTES = 256 * 1024 * 1024  # of CALVIN's annotations, which have 40 MB
_ADMITTED = {
    *(("numpy", name) for name in ("ndarray", "dtype")),
    *(
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    ),
    ("_codecs", "encode"),
}


class DatasetError(BadFile):
    """A dataset file is missing, damaged, or holds what it must not."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """One labelled stretch of play.

    Attributes:
        start: First frame.
        end: Last frame, inclusive.
        task: One of the 34 names.
        text: The instruction.
    """

    start: int
    end: int
    task: str
    text: str


class _ArrayType:
    """What stands for `numpy.ndarray` in a pickle: the kind of an array, which makes none."""


def _new_array(kind: type, shape: tuple[int, ...], dtype: bytes) -> npt.NDArray[Any]:
    """Begin an array as every pickle of one does: empty. What fills it has its own size."""
    if kind is not _ArrayType or shape != (0,):
        raise DatasetError("holds an array that only claims its size")
    return np.ndarray((0,), np.dtype(dtype.decode()))


class _ArrayUnpickler(pickle.Unpickler):
    """Admits containers, numbers, strings and arrays only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise DatasetError(f"holds {module}.{name}, which is not data")
        if name in _INSTEAD:
            return _INSTEAD[name]
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


_INSTEAD: Mapping[str, Any] = {"ndarray": _ArrayType, "_reconstruct": _new_array}


def load_object_array(path: Path) -> Any:
    """The one object inside a `.npy` file that CALVIN wrote, read by the guarded loader.

    Raises:
        DatasetError: Not an object array of one element, damaged, or not plain data.
    """
    try:
        stream = io.BytesIO(read_bytes(path, MAX_OBJECT_BYTES))
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(stream)
        if not dtype.hasobject or shape != ():
            raise DatasetError(f"is an array {dtype} {shape}, not one pickled object")
        array = _ArrayUnpickler(stream).load()
        return array.item()
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from None
    except BadFile as error:
        raise DatasetError(str(error)) from None
    except Exception as error:  # a pickle's parser raises whatever it meets
        raise DatasetError(f"{path}: cannot be read ({type(error).__name__})") from None


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    """An array as the content of a `.npy` file; objects pickled only if it holds objects."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=array.dtype.hasobject)
    return stream.getvalue()


def object_bytes(value: Any) -> bytes:
    """One object as CALVIN stores it: a zero-dimensional object array."""
    box = np.empty((), dtype=object)
    box[()] = value
    return npy_bytes(box)


def write_annotations(
    folder: Path, annotations: Sequence[Annotation], embeddings: npt.NDArray[np.float32]
) -> None:
    """Write `lang_annotations/` for CALVIN's code, and the plain twins for ours.

    Args:
        folder: The split's folder, for example `training`.
        annotations: What was done when.
        embeddings: (N, 1, d) sentence embeddings, one per annotation; d may be 0.

    Raises:
        DatasetError: The embeddings do not fit.
    """
    if embeddings.ndim != 3 or embeddings.shape[:2] != (len(annotations), 1):
        raise DatasetError(
            f"embeddings: shape {embeddings.shape}, wants ({len(annotations)}, 1, d)"
        )
    if not np.isfinite(embeddings).all():
        raise DatasetError("embeddings: are not finite")
    language = {
        "ann": [a.text for a in annotations],
        "task": [a.task for a in annotations],
        "emb": embeddings,
    }
    spans = [(a.start, a.end) for a in annotations]
    content = {"language": language, "info": {"episodes": [], "indx": spans}}
    replace_file(folder / LANG_FILE, object_bytes(content))
    replace_file(folder / EMB_TWIN, npy_bytes(embeddings))
    rows = [[a.start, a.end, a.task, a.text] for a in annotations]
    replace_file(folder / LANG_TWIN, json.dumps(rows).encode())


def language_files(folder: Path) -> list[Path]:
    """The annotation files of a split: CALVIN's first, then those of other language models.

    CALVIN's splits have one in `lang_annotations/`, or one in each of several `lang_<model>/`,
    which differ in their embeddings alone.
    """
    others = sorted(folder.glob(f"lang_*/{LANG_FILE.name}"))
    return [
        path for path in (folder / LANG_FILE, folder / LANG_FILE.name, *others) if path.exists()
    ]


def read_annotations(
    folder: Path, place: Path | None = None
) -> tuple[list[Annotation], npt.NDArray[np.float32]]:
    """The annotations of a split, from the plain twins if they are there.

    Args:
        folder: The split's folder.
        place: The file to read; None for the first of `language_files`.

    Returns:
        Annotations and their embeddings (N, 1, d); d is 0 where they come without.

    Raises:
        DatasetError: Neither form is there, or it is damaged.
    """
    place = place or next(iter(language_files(folder)), folder / LANG_FILE)
    twins = place == folder / LANG_FILE and (folder / EMB_TWIN).exists()
    if twins and _stands_for(folder / LANG_TWIN, place):
        place = folder / LANG_TWIN
        try:
            rows = json.loads(read_bytes(place, MAX_JSON_BYTES))
            found = [_annotation(s, e, t, x) for s, e, t, x in rows]
        except BadFile as error:
            raise DatasetError(str(error)) from None
        except (ValueError, TypeError, RecursionError) as error:
            raise DatasetError(f"{place}: cannot be read ({error})") from None
        return found, _embeddings(_array(folder / EMB_TWIN), len(found), folder / EMB_TWIN)
    if not place.exists():
        raise DatasetError(
            f"{folder}: has no annotations: neither {LANG_FILE} nor lang_*/{LANG_FILE.name}"
        )
    content = load_object_array(place)
    try:
        language: Mapping[str, Any] = content["language"]
        spans = content["info"]["indx"]
        found = [
            _annotation(span[0], span[1], task, text)
            for span, task, text in zip(spans, language["task"], language["ann"], strict=True)
        ]
        rows = list(language.get("emb", ()))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DatasetError(f"{place}: not CALVIN's annotations ({error})") from None
    if not rows:
        return found, np.zeros((len(found), 1, 0), np.float32)
    return found, _embeddings(rows, len(found), place)


def _stands_for(twin: Path, original: Path) -> bool:
    """Whether a plain twin is there and no older than what it repeats."""
    try:
        return not original.exists() or twin.stat().st_mtime_ns >= original.stat().st_mtime_ns
    except FileNotFoundError:
        return False


def _annotation(start: Any, end: Any, task: Any, text: Any) -> Annotation:
    if not 0 <= int(start) <= int(end):
        raise ValueError(f"frames {start} to {end}")
    return Annotation(int(start), int(end), str(task), str(text))


def _array(path: Path) -> npt.NDArray[Any]:
    try:
        return read_array(path)
    except BadFile as error:
        raise DatasetError(str(error)) from None


def _embeddings(rows: Any, count: int, path: Path) -> npt.NDArray[np.float32]:
    """Return sentence embeddings (N, 1, d): one of one width for each annotation, all numbers.

    A missing one would become NaN, and two too many would be joined to their neighbours.
    """
    if len(rows) != count:
        raise DatasetError(f"{path}: {len(rows)} embeddings for {count} annotations")
    made: list[npt.NDArray[np.float32]] = []
    for number, row in enumerate(rows):
        vector = np.asarray(row)
        if vector.dtype.kind not in "fiu" or max(vector.ndim, 1) > 2:
            raise DatasetError(f"{path}: embedding {number} is {str(row)[:40]!r}, no vector")
        vector = vector.astype(np.float32).reshape(1, -1)
        if not np.isfinite(vector).all():
            raise DatasetError(f"{path}: embedding {number} is not finite")
        if made and vector.shape != made[0].shape:
            raise DatasetError(
                f"{path}: embedding {number} has {vector.size} numbers, others have {made[0].size}"
            )
        made.append(vector)
    return np.stack(made) if made else np.zeros((0, 1, 0), np.float32)


# -- The log: one JSON line per committed episode --------------------------------------

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


F32 = npt.NDArray[np.float32]
Frame = dict[str, npt.NDArray[Any]]
Embed = Callable[[list[str]], F32]


# -- Frames, and the folder they are in ------------------------------------------------

LOG = "episodes.jsonl"
CAMERAS_FILE = "cameras.json"
MAX_REL_POS_M, MAX_REL_ORN_RAD = 0.02, 0.05
MAX_WINDOW = 64  # frames of an annotation in CALVIN


def frame_name(index: int) -> str:
    """File name of a frame."""
    return f"episode_{index:07d}.npz"


def absolute_action(next_robot_obs: F64) -> F64:
    """(7,) the TCP pose one frame later (xyz m, Euler xyz rad) and the gripper command."""
    return np.append(next_robot_obs[:6], next_robot_obs[14])


def relative_action(robot_obs: F64, action: F64) -> F64:
    """(7,) the action relative to the present TCP pose, in [-1, 1] of CALVIN's largest step.

    Args:
        robot_obs: (15,) now.
        action: (7,) absolute, as `absolute_action` gives it.
    """
    shift = np.clip((action[:3] - robot_obs[:3]) / MAX_REL_POS_M, -1, 1)
    turn = action[3:6] - robot_obs[3:6]
    turn = (turn + np.pi) % (2 * np.pi) - np.pi  # the short way round
    turn = np.clip(turn / MAX_REL_ORN_RAD, -1, 1)
    return np.concatenate([shift, turn, action[6:]])


def make_frame(observation: Mapping[str, Any], next_robot_obs: F64) -> Frame:
    """One frame's arrays from an env's observation and the next `robot_obs`.

    Beside CALVIN's own, `pose_obs` may have `pose_<camera>`, (4, 4) camera to world with OpenCV
    axes, of a camera that moves.
    """
    robot_obs = np.asarray(observation["robot_obs"], dtype=np.float64)
    action = absolute_action(np.asarray(next_robot_obs, dtype=np.float64))
    return {
        "actions": action,
        "rel_actions": relative_action(robot_obs, action),
        "robot_obs": robot_obs,
        "scene_obs": np.asarray(observation["scene_obs"], dtype=np.float64),
        **observation.get("rgb_obs", {}),
        **observation.get("depth_obs", {}),
        **observation.get("pose_obs", {}),
    }


class Episode:
    """An episode being written; made by `DatasetWriter.episode`."""

    def __init__(self, folder: Path, first: int, compress: bool) -> None:
        self._folder, self.first, self._compress = folder, first, compress
        self._pending: Mapping[str, Any] | None = None
        self._vectors: dict[str, list[F64]] = {"robot_obs": [], "scene_obs": [], "actions": []}
        self.annotations: list[Annotation] = []

    def __len__(self) -> int:
        return len(self._vectors["actions"]) + (self._pending is not None)

    def add(self, observation: Mapping[str, Any]) -> None:
        """Append one frame: what `env.reset` or `env.step` returned.

        A frame is written when the next arrives, because its action is where the arm was
        then; the last frame's action is to stay.
        """
        for key, size in (("robot_obs", 15), ("scene_obs", 24)):
            value = np.asarray(observation.get(key, ()), dtype=np.float64)
            if value.shape != (size,) or not np.isfinite(value).all():
                raise DatasetError(f"{key}: shape {value.shape}, wants ({size},), finite")
        if self._pending is not None:
            self._write(self._pending, observation["robot_obs"])
        self._pending = observation

    def annotate(self, start: int, end: int, task: str, text: str) -> None:
        """Label frames `start` to `end` (of this episode, inclusive).

        Raises:
            DatasetError: No such frames, an empty text, or a window longer than CALVIN's 64.
            UnknownTaskError: No such task.
        """
        get_task(task)
        if not 0 <= start <= end < len(self) or end - start >= MAX_WINDOW or not text.strip():
            raise DatasetError(
                f"annotation: frames {start} to {end} of {len(self)} as {text!r}; wants up to "
                f"{MAX_WINDOW} frames of the episode and a text"
            )
        self.annotations.append(Annotation(self.first + start, self.first + end, task, text))

    def finish(self) -> dict[str, Any]:
        """Write the last frame; returns what the log keeps."""
        if self._pending is None:
            raise DatasetError("episode: has no frames")
        self._write(self._pending, self._pending["robot_obs"])
        self._pending = None
        actions = np.array(self._vectors["actions"])
        return {
            "start": self.first,
            "end": self.first + len(actions) - 1,
            "annotations": [[a.start, a.end, a.task, a.text] for a in self.annotations],
            "robot_obs": moments(self._vectors["robot_obs"]),
            "scene_obs": moments(self._vectors["scene_obs"]),
            "actions": [actions.min(0).tolist(), actions.max(0).tolist()],
        }

    def _write(self, observation: Mapping[str, Any], next_robot_obs: F64) -> None:
        frame = make_frame(observation, next_robot_obs)
        stream = io.BytesIO()
        (np.savez_compressed if self._compress else np.savez)(stream, **frame)  # type: ignore[arg-type]
        index = self.first + len(self._vectors["actions"])
        replace_file(self._folder / frame_name(index), stream.getvalue())
        for key, rows in self._vectors.items():
            rows.append(frame[key])


class DatasetWriter:
    """Writes one split (for example `training`), or goes on with one.

    Args:
        folder: The split's folder; made if it is missing.
        compress: Compress frames (about 3x smaller, slower); CALVIN's are not.
        embed: Sentence embeddings (N, 1, d) of texts, which CALVIN's language models want;
            without it they are written with d = 0.

    Raises:
        DatasetError: The folder holds frames but no log: somebody else's data.
    """

    def __init__(self, folder: Path | str, *, compress: bool = False, embed: Embed | None = None):
        self.folder, self._compress, self._embed = Path(folder), compress, embed
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / LOG).exists() and any(self.folder.glob("episode_*.npz")):
            raise DatasetError(f"{self.folder}: has frames and no {LOG}; refusing to write here")
        self._rows = read_log(self.folder / LOG)
        replace_file(self.folder / LOG, log_bytes(self._rows))  # drops a torn last line
        self._clear_uncommitted()
        self._open = False

    @property
    def n_episodes(self) -> int:
        """Committed episodes."""
        return len(self._rows)

    @property
    def n_frames(self) -> int:
        """Committed frames; the next frame's index."""
        return self._rows[-1]["end"] + 1 if self._rows else 0

    @contextmanager
    def episode(self, scene: str) -> Iterator[Episode]:
        """Write one episode; leaving the block commits it, an exception discards it."""
        name = str(scene).removeprefix("calvin_scene_")
        if self._open:
            raise DatasetError("episode: the one before is not finished")
        earlier = {row["scene"] for row in self._rows}
        if name in earlier and name != self._rows[-1]["scene"]:
            raise DatasetError(f"scene: {name} again; CALVIN keeps a scene's frames together")
        self._open = True
        try:
            episode = Episode(self.folder, self.n_frames, self._compress)
            yield episode
            row = {"scene": name, **episode.finish()}
            with (self.folder / LOG).open("ab") as log:
                log.write(log_bytes([row]))
                log.flush()
                os.fsync(log.fileno())
            self._rows.append(row)
        except BaseException:
            self._clear_uncommitted()
            raise
        finally:
            self._open = False

    def _clear_uncommitted(self) -> None:
        """Remove the frames of an episode that was never committed."""
        for temporary in self.folder.glob(".episode_*.part"):
            temporary.unlink()
        index = self.n_frames
        while (path := self.folder / frame_name(index)).exists():
            path.unlink()
            index += 1

    def close(self) -> None:
        """Write CALVIN's index files; may be called at any time, and again."""
        if not self._rows:
            return
        spans = np.array([[row["start"], row["end"]] for row in self._rows], dtype=np.int64)
        replace_file(self.folder / "ep_start_end_ids.npy", npy_bytes(spans))
        lengths = spans[:, 1] - spans[:, 0] + 1
        replace_file(self.folder / "ep_lens.npy", npy_bytes(lengths))
        scenes = scene_spans(self._rows)
        replace_file(self.folder / "scene_info.npy", object_bytes(scenes))
        replace_file(self.folder / "scene_info.json", json.dumps(scenes).encode())
        replace_file(
            self.folder / "statistics.yaml", yaml.safe_dump(statistics(self._rows)).encode()
        )
        notes = [Annotation(*note) for row in self._rows for note in row["annotations"]]
        texts = [note.text for note in notes]
        embedded = self._embed(texts) if self._embed and texts else np.zeros((len(texts), 1, 0))
        write_annotations(self.folder, notes, np.asarray(embedded, dtype=np.float32))

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def cameras_bytes(matrices: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The content of `cameras.json`, which CALVIN's layout has no place for.

    Args:
        matrices: Per scene and camera "height", "width", "K" (3, 3) and "T_world_cam" or, for a
            camera on the hand, "T_tcp_cam" (4, 4), OpenCV axes.

    Returns:
        {"cameras": those of the first scene, "scenes": {"calvin_scene_A": those that differ}}.
    """
    first = next(iter(matrices.values()), {})
    others = {f"calvin_scene_{s}": dict(own) for s, own in matrices.items() if own != first}
    return json.dumps({"cameras": dict(first), "scenes": others}, indent=1).encode()


class Dataset:
    """Reads one split in CALVIN's layout, whoever wrote it.

    Args:
        folder: For example `task_D_D/training`.

    Attributes:
        episodes: (N, 2) first and last frame of each episode, inclusive.

    Raises:
        DatasetError: No `ep_start_end_ids.npy`, or it is damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        path = self.folder / "ep_start_end_ids.npy"
        self.episodes: npt.NDArray[np.int64] = _array(path)
        if self.episodes.ndim != 2 or self.episodes.shape[1] != 2:
            raise DatasetError(f"{path}: shape {self.episodes.shape}, wants (N, 2)")
        if self.episodes.dtype.kind not in "iu" or (np.diff(self.episodes, axis=1) < 0).any():
            raise DatasetError(f"{path}: holds what is no first and last frame")

    def path(self, index: int) -> Path:
        """A frame's file, whether it is there or not."""
        return self.folder / frame_name(index)

    def frame(self, index: int, keys: Sequence[str] | None = None) -> Frame:
        """One frame's arrays, or only those named by `keys`.

        Raises:
            DatasetError: No such frame, key, or a damaged file.
        """
        try:
            return read_arrays(self.path(index), names=keys)
        except BadFile as error:
            raise DatasetError(str(error)) from None

    def window(self, start: int, end: int, keys: Sequence[str]) -> Frame:
        """Frames `start` to `end` inclusive, stacked by key."""
        frames = [self.frame(index, keys) for index in range(start, end + 1)]
        return {key: np.stack([frame[key] for frame in frames]) for key in keys}

    def annotations(self) -> tuple[list[Annotation], F32]:
        """Annotations and their embeddings (N, 1, d); see `read_annotations`."""
        return read_annotations(self.folder)

    def scenes(self) -> dict[str, tuple[int, int]]:
        """First and last frame of each scene."""
        original, twin = self.folder / "scene_info.npy", self.folder / "scene_info.json"
        try:
            if _stands_for(twin, original):
                spans = read_json(twin)
            else:
                spans = load_object_array(original)
            return {str(k): (int(v[0]), int(v[1])) for k, v in spans.items()}
        except (OSError, ValueError, AttributeError, TypeError, IndexError) as error:
            raise DatasetError(f"{original}: cannot be read ({error})") from error

    def statistics(self) -> dict[str, Any]:
        """`statistics.yaml` as it is."""
        try:
            return dict(yaml.safe_load((self.folder / "statistics.yaml").read_text()))
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise DatasetError(f"statistics.yaml: cannot be read ({error})") from error
