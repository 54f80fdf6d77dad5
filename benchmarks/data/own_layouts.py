"""Our own data as sources: collections of demonstrations, recordings of runs, and plain arrays.

- **A collection** (`openhelix collect`): states, which are rendered when a frame is asked for.
- **Recordings** (`recording.mcap` of a run, or a folder of `.mcap` files): what was seen and sent at
  every tick, camera frames as the loop had them. Stretches of one instruction are segments; those
  that the world judged to have failed are none.
- **Plain arrays**, for data of any other origin: `dataset.json` and one `.npz` an episode.

      dataset.json   {"hz": 30, "cameras": {"static": {"K": [[...]], "T_world_cam": [[...]]}},
                      "episodes": [{"file": "one.npz", "instruction": "open it", "task": "open"}]}
      one.npz        position (L, 3) m, quaternion (L, 4) xyzw, gripper_open (L,) 0 or 1,
                     optional: gripper_width (L,) m; target_position, target_quaternion and
                     target_open, what was commanded (otherwise where the hand was one frame later);
                     rgb_<camera> (L, H, W, 3) uint8, depth_<camera> (L, H, W) float32 m,
                     T_<camera> (L, 4, 4) of a camera that moves

"task" may be left out; the sentence is then the task.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict
from scipy.spatial.transform import Rotation

from openhelix.benchmarks.calvin.cameras import CAMERAS, SceneRenderer, camera_of
from openhelix.benchmarks.calvin.collect import SETTINGS, UNITS, robot_obs, scene_obs
from openhelix.benchmarks.calvin.demonstrations import Demonstration
from openhelix.benchmarks.calvin.scene import get_scene
from openhelix.benchmarks.calvin.units import read_unit
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
from openhelix.runtime.core.files import BadFile, as_record, read_arrays, read_json
from openhelix.runtime.core.interfaces import F64, Action, CameraFrame, Observation
from openhelix.runtime.observe.recorder import FILE_NAME, Reader, RecordingError

Told = tuple[Segment, Path, int]  # a segment, its file, and which of the file's it is


def _spans(lengths: Sequence[int]) -> I64:
    ends = np.cumsum(np.asarray(lengths, np.int64))
    return np.stack([ends - lengths, ends - 1], 1).reshape(-1, 2)


def _euler(pose: npt.NDArray[Any]) -> F64:
    """Return positions and xyz Euler angles (L, 6) of poses (L, 7)."""
    turned = Rotation.from_quat(pose[:, 3:7]).as_euler("xyz")
    return np.concatenate([pose[:, :3], turned], axis=1)


def _motion(proprio: npt.NDArray[Any], targets: npt.NDArray[Any]) -> Motion:
    relative = relative_of(_euler(proprio[:, :7]), _euler(targets[:, :7]), targets[:, 7])
    return Motion(proprio.astype(np.float32), targets.astype(np.float32), relative)


class _Episodes(Source):
    """A source whose episodes are items of files."""

    def _at(self, frame: int) -> tuple[int, int]:
        """Return a frame's episode, and its place in it."""
        number = int(np.searchsorted(self.spans[:, 0], frame, side="right")) - 1
        return number, frame - int(self.spans[number, 0])


# -- Collections -----------------------------------------------------------------------


@lru_cache(maxsize=4)
def _unit(path: Path) -> list[Demonstration]:
    try:
        return read_unit(path)[1]
    except BadFile as error:
        raise DataError(str(error)) from None


@lru_cache(maxsize=2)
def _renderer(scene: str) -> SceneRenderer:
    return SceneRenderer(scene)


class CollectionSource(_Episodes):
    """The demonstrations of a collection, rendered in their scenes' own looks.

    Args:
        path: its folder.

    Raises:
        DataError: a unit is damaged, or there is none.
    """

    layout: ClassVar[str] = "OpenHelix's demonstrations"
    hz = 30.0

    def __init__(self, path: Path) -> None:
        self.path = path
        _unit.cache_clear()  # whoever opens it anew sees what is there now
        self._items: list[tuple[Path, int]] = []
        lengths, segments = list[int](), list[Segment]()
        for unit in sorted((path / UNITS).glob("*.npz")):
            for number, done in enumerate(_unit(unit)):
                first, count = sum(lengths), len(done.targets)
                self._items.append((unit, number))
                lengths.append(count)
                last = first + min(done.steps, count - 1)
                segments.append(Segment(first, last, done.task, done.instruction, done.scene))
        if not lengths:
            raise DataError(f"{path / UNITS}: holds no demonstration")
        self.spans, self.segments = _spans(lengths), tuple(segments)
        self.tasks = task_order(segment.task for segment in segments)
        scene = get_scene(segments[0].scene)
        self.cameras = tuple(
            Camera(n, c.size, c.size, True, c.K, True, "world" if n == "static" else "hand")
            for n, c in ((n, camera_of(scene, n)) for n in CAMERAS)
        )
        self.facts = {
            "frames": "states, rendered when they are asked for",
            "actions": "the targets that the expert commanded, absolute",
        }

    @classmethod
    def matches(cls, path: Path) -> bool:
        """See `Source.matches`."""
        return (path / SETTINGS).is_file() and (path / UNITS).is_dir()

    def _done(self, frame: int) -> tuple[Demonstration, int]:
        number, step = self._at(frame)
        unit, place = self._items[number]
        return _unit(unit)[place], step

    def demonstration(self, segment: Segment) -> Demonstration:
        """See `Source.demonstration`; what a pushed arm was not to do stays marked."""
        return self._done(segment.first)[0]

    def motion(self, first: int, last: int) -> Motion:
        """See `Source.motion`."""
        done, low = self._done(first)
        part = slice(low, low + last - first + 1)
        return Motion(done.proprio[part], done.targets[part], done.relative[part])

    def views(
        self, frames: Sequence[int], names: Sequence[str]
    ) -> Iterator[dict[str, CameraFrame]]:
        """See `Source.views`."""
        for frame in frames:
            done, step = self._done(frame)
            seen = _renderer(done.scene).render(done.states[step].astype(np.float64))
            yield {name: seen[name].camera_frame(0) for name in names}

    def calvin_states(self, first: int, last: int) -> tuple[F64, F64]:
        """See `Source.calvin_states`."""
        done, low = self._done(first)
        steps = range(low, low + last - first + 1)
        return (
            np.stack([robot_obs(done, step) for step in steps]),
            np.stack([scene_obs(done, step) for step in steps]),
        )

    def files(self, first: int, last: int) -> Iterable[Path]:
        """See `Source.files`."""
        return [self._items[self._at(first)[0]][0]]

    def index_files(self) -> Iterable[Path]:
        """See `Source.index_files`."""
        return [self.path / SETTINGS]


# -- Recordings ------------------------------------------------------------------------


@dataclass(slots=True)
class _Stretch:
    """Consecutive ticks under one instruction."""

    task: str
    text: str
    first: int
    count: int = 0
    success: bool | None = None


LOW = ("/instruction", "/entry", "/observation", "/action")
LOOKED_AT = 120  # ticks that tell which cameras there are, and which of them move


class RecordingSource(_Episodes):
    """Recordings of runs, or what `openhelix data convert format=mcap` wrote.

    Args:
        path: a file, a run's folder, or a folder of `.mcap` files, each an episode.

    Raises:
        DataError: a file is no recording, or nothing was recorded.
    """

    layout: ClassVar[str] = "OpenHelix's recordings"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = self._found(path)
        lengths, segments, rates = list[int](), list[Segment](), set[float]()
        self._failed = 0
        self._rows: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []
        for file in self._files:
            rows, stretches, hz = _ticks(file)
            first = sum(lengths)
            lengths.append(len(rows[0]))
            self._rows.append(rows)
            rates.add(hz)
            segments += [
                Segment(first + s.first, first + s.first + s.count - 1, s.task or s.text, s.text)
                for s in stretches
                if s.text and s.success is not False and s.count > 1
            ]
            self._failed += sum(s.success is False for s in stretches)
        if len(rates) != 1:
            raise DataError(f"{path}: recordings at different rates, {sorted(rates)} Hz")
        self.hz = rates.pop()
        self.spans, self.segments = _spans(lengths), tuple(segments)
        self.tasks = task_order(segment.task for segment in segments)
        self.cameras = self._look()
        self.facts = {
            "frames": "ticks of the control loop; camera frames as the loop had them",
            "actions": "the targets that were sent, absolute",
            "left out": f"{self._failed} stretches that the world judged to have failed",
        }

    @staticmethod
    def _found(path: Path) -> list[Path]:
        if path.is_file():
            return [path]
        if (path / FILE_NAME).exists():
            return [path / FILE_NAME]
        return sorted(path.glob("*.mcap"))

    @classmethod
    def matches(cls, path: Path) -> bool:
        """See `Source.matches`."""
        return path.suffix == ".mcap" or (path.is_dir() and bool(cls._found(path)))

    def _look(self) -> tuple[Camera, ...]:
        """Return the cameras of the first recording."""
        seen: dict[str, CameraFrame] = {}
        moving: set[str] = set()
        ticks = 0
        for message in Reader(self._files[0]):
            if not isinstance(message.message, Observation):
                continue
            for name, frame in message.message.frames.items():
                before = seen.setdefault(name, frame)
                if not np.allclose(before.T_world_cam, frame.T_world_cam, atol=1e-9):
                    moving.add(name)
            ticks += 1
            if ticks == LOOKED_AT:
                break
        return tuple(
            Camera(
                name,
                frame.rgb.shape[0],
                frame.rgb.shape[1],
                frame.depth is not None,
                frame.K,
                True,
                "hand" if name in moving else "world",
            )
            for name, frame in sorted(seen.items())
        )

    def motion(self, first: int, last: int) -> Motion:
        """See `Source.motion`."""
        number, low = self._at(first)
        part = slice(low, low + last - first + 1)
        return _motion(*(rows[part] for rows in self._rows[number]))

    def views(
        self, frames: Sequence[int], names: Sequence[str]
    ) -> Iterator[dict[str, CameraFrame]]:
        """See `Source.views`; the recording is read up to the last of them."""
        number, _ = self._at(frames[0])
        file, start = self._files[number], int(self.spans[number, 0])
        wanted = [frame - start for frame in frames]
        tick, newest = -1, None
        for message in Reader(file):
            if isinstance(message.message, Observation):
                newest = message.message
            elif isinstance(message.message, Action) and newest is not None:
                tick += 1
                while wanted and wanted[0] == tick:
                    missing = [name for name in names if name not in newest.frames]
                    if missing:
                        raise DataError(f"{file}: tick {tick}: no frame of camera {missing[0]!r}")
                    yield {name: newest.frames[name] for name in names}
                    wanted.pop(0)
                newest = None
                if not wanted:
                    return
        raise DataError(f"{file}: ends before tick {wanted[0]}")

    def files(self, first: int, last: int) -> Iterable[Path]:
        """See `Source.files`."""
        return [self._files[self._at(first)[0]]]

    def index_files(self) -> Iterable[Path]:
        """See `Source.index_files`."""
        return self._files

    def problems(self) -> list[str]:
        """See `Source.problems`."""
        found = []
        for file in self._files:
            reader = Reader(file, only=())
            for _ in reader:
                pass
            if not reader.complete:
                found.append(f"{file}: not complete; what is there is read")
        return found


def _ticks(
    file: Path,
) -> tuple[tuple[npt.NDArray[Any], npt.NDArray[Any]], list[_Stretch], float]:
    """Return readings (L, 9) and targets (L, 8) of a recording, its stretches, and its rate."""
    try:
        reader = Reader(file, only=LOW)
    except RecordingError as error:
        raise DataError(str(error)) from None
    hz = reader.meta.get("hz") or reader.meta.get("config", {}).get("control", {}).get("hz")
    if not isinstance(hz, int | float) or not hz > 0:
        raise DataError(f"{file}: does not say its rate: neither hz nor config.control.hz")
    readings, targets, stretches = list[F64](), list[F64](), list[_Stretch]()
    newest: Observation | None = None
    for _, _, message in reader:
        if isinstance(message, Observation):
            newest = message
        elif isinstance(message, Action) and newest is not None:
            grip = [newest.gripper_width, float(newest.gripper_open)]
            readings.append(np.concatenate([newest.tcp_pose, grip]))
            targets.append(np.append(message.pose, float(message.gripper > 0.5)))
            newest = None
            if stretches:
                stretches[-1].count += 1
        elif getattr(message, "kind", "") == "ended" and stretches:
            stretches[-1].success = message.success
        elif hasattr(message, "text") and hasattr(message, "instruction_id"):
            stretches.append(_Stretch(message.task, message.text, len(readings)))
    if not readings:
        raise DataError(f"{file}: holds no tick")
    return (np.array(readings), np.array(targets)), stretches, float(hz)


# -- Plain arrays ----------------------------------------------------------------------

ABOUT = "dataset.json"


@dataclass(frozen=True, slots=True)
class _Eye:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    K: tuple[tuple[float, ...], ...] | None = None
    T_world_cam: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class _Told:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    file: str
    instruction: str
    task: str = ""


@dataclass(frozen=True, slots=True)
class _About:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    hz: float
    episodes: tuple[_Told, ...]
    cameras: Mapping[str, _Eye] | None = None


@lru_cache(maxsize=2)
def _arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        return read_arrays(path)
    except BadFile as error:
        raise DataError(str(error)) from None


class PlainSource(_Episodes):
    """Episodes as plain arrays; the module's docstring says how they are laid out.

    Args:
        path: the folder around `dataset.json`.

    Raises:
        DataError: it is not as it should be; names the file and the field.
    """

    layout: ClassVar[str] = "plain arrays"

    def __init__(self, path: Path) -> None:
        self.path = path
        _arrays.cache_clear()  # whoever opens it anew sees what is there now
        place = path / ABOUT
        try:
            self._about = as_record(_About, read_json(place), str(place))
        except BadFile as error:
            raise DataError(str(error)) from None
        if not self._about.episodes or not self._about.hz > 0:
            raise DataError(f"{place}: episodes, hz: at least one episode, and a rate above 0")
        lengths, segments = list[int](), list[Segment]()
        for number, told in enumerate(self._about.episodes):
            if Path(told.file).name != told.file:
                raise DataError(f"{place}: episodes.{number}.file: {told.file!r} is not beside it")
            count = self._length(told.file)
            first = sum(lengths)
            lengths.append(count)
            if told.instruction.strip():
                task = told.task or told.instruction
                segments.append(Segment(first, first + count - 1, task, told.instruction))
        self.hz = self._about.hz
        self.spans, self.segments = _spans(lengths), tuple(segments)
        self.tasks = task_order(segment.task for segment in segments)
        self.cameras = tuple(self._camera(name) for name in self._named())
        self.facts = {"frames": "arrays, a .npz an episode", "depth": "metres along the axis"}

    @classmethod
    def matches(cls, path: Path) -> bool:
        """See `Source.matches`."""
        return (path / ABOUT).is_file()

    def _length(self, name: str) -> int:
        try:
            found = read_arrays(self.path / name, names=["position"])["position"]
        except BadFile as error:
            raise DataError(str(error)) from None
        if found.ndim != 2 or found.shape[1] != 3 or not len(found):
            raise DataError(f"{self.path / name}: position: shape {found.shape}, must be (L, 3)")
        return len(found)

    @cached_property
    def _first(self) -> dict[str, npt.NDArray[Any]]:
        return _arrays(self.path / self._about.episodes[0].file)

    def _named(self) -> list[str]:
        return [name[4:] for name in self._first if name.startswith("rgb_")]

    def _camera(self, name: str) -> Camera:
        rgb, eye = self._first[f"rgb_{name}"], (self._about.cameras or {}).get(name, _Eye())
        if rgb.ndim != 4 or rgb.shape[3] != 3 or rgb.dtype != np.uint8:
            where = self.path / self._about.episodes[0].file
            raise DataError(
                f"{where}: rgb_{name}: {rgb.dtype}{rgb.shape}, must be uint8(L, H, W, 3)"
            )
        moves = f"T_{name}" in self._first
        for field, value, shape in (("K", eye.K, (3, 3)), ("T_world_cam", eye.T_world_cam, (4, 4))):
            if value is not None and np.shape(value) != shape:
                raise DataError(f"{self.path / ABOUT}: cameras.{name}.{field}: must be {shape}")
        return Camera(
            name,
            rgb.shape[1],
            rgb.shape[2],
            f"depth_{name}" in self._first,
            None if eye.K is None else np.array(eye.K, float),
            moves or eye.T_world_cam is not None,
            "hand" if moves else "world",
        )

    def _column(self, frame: int, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
        """Return an array (L, *shape) of an episode; None where it is not there."""
        number, _ = self._at(frame)
        place = self.path / self._about.episodes[number].file
        found = _arrays(place).get(name)
        if found is None:
            return None
        count = int(self.spans[number, 1] - self.spans[number, 0]) + 1
        if found.shape != (count, *shape) or found.dtype.kind not in "fiub":
            raise DataError(
                f"{place}: {name}: {found.dtype}{found.shape}, must be {(count, *shape)} numbers"
            )
        return found

    def _numbers(self, frame: int, name: str, shape: tuple[int, ...]) -> F64 | None:
        found = self._column(frame, name, shape)
        if found is None:
            return None
        place = self.path / self._about.episodes[self._at(frame)[0]].file
        check_finite(found, f"{place}: {name}")
        return found.astype(np.float64)

    def _needed(self, frame: int, name: str, shape: tuple[int, ...]) -> F64:
        found = self._numbers(frame, name, shape)
        if found is None:
            place = self.path / self._about.episodes[self._at(frame)[0]].file
            raise DataError(f"{place}: no {name}")
        return found

    def motion(self, first: int, last: int) -> Motion:
        """See `Source.motion`."""
        _, low = self._at(first)
        position, quaternion = (
            self._needed(first, "position", (3,)),
            self._needed(first, "quaternion", (4,)),
        )
        opened = self._needed(first, "gripper_open", ())
        width = self._numbers(first, "gripper_width", ())
        later = np.minimum(np.arange(len(position)) + 1, len(position) - 1)
        wanted = [
            self._numbers(first, f"target_{name}", shape)
            for name, shape in (("position", (3,)), ("quaternion", (4,)), ("open", ()))
        ]
        columns = [
            own[later] if told is None else told
            for own, told in zip((position, quaternion, opened), wanted, strict=True)
        ]
        proprio = np.column_stack(
            [position, quaternion, 0.08 * opened if width is None else width, opened]
        )
        part = slice(low, low + last - first + 1)
        return _motion(proprio[part], np.column_stack(columns)[part])

    def views(
        self, frames: Sequence[int], names: Sequence[str]
    ) -> Iterator[dict[str, CameraFrame]]:
        """See `Source.views`."""
        for frame in frames:
            _, step = self._at(frame)
            out = {}
            for name in names:
                camera = self.camera(name)
                assert camera is not None
                size = (camera.height, camera.width)
                rgb = self._column(frame, f"rgb_{name}", (*size, 3))
                depth = self._column(frame, f"depth_{name}", size) if camera.depth else None
                moves = self._numbers(frame, f"T_{name}", (4, 4))
                if rgb is None or (camera.depth and depth is None):
                    place = self.path / self._about.episodes[self._at(frame)[0]].file
                    raise DataError(f"{place}: no {'rgb' if rgb is None else 'depth'}_{name}")
                told = (self._about.cameras or {}).get(name, _Eye()).T_world_cam
                fixed = np.full((4, 4), np.nan) if told is None else np.array(told, float)
                out[name] = CameraFrame(
                    0,
                    rgb[step],
                    None if depth is None else depth[step].astype(np.float32),
                    np.full((3, 3), np.nan) if camera.K is None else camera.K,
                    fixed if moves is None else moves[step],
                )
            yield out

    def files(self, first: int, last: int) -> Iterable[Path]:
        """See `Source.files`."""
        return [self.path / self._about.episodes[self._at(first)[0]].file]

    def index_files(self) -> Iterable[Path]:
        """See `Source.index_files`."""
        return [self.path / ABOUT]
