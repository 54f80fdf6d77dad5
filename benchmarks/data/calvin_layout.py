"""CALVIN's layout as a source: the published splits, the debug split, and what we write ourselves.

    task_ABC_D/{training,validation}/
        episode_0000000.npz ...           one file a frame
        ep_start_end_ids.npy              first and last frame of each episode
        ep_lens.npy, scene_info.npy       used where they are there
        lang_annotations/auto_lang_ann.npy, or lang_<model>/auto_lang_ann.npy
        .hydra/merged_config.yaml         used for the cameras, where it is there

Actions are `actions`: where the TCP was one frame later, m and xyz Euler angles, and the gripper
(-1 closed, 1 open). Depth is in metres along the optical axis. Camera matrices are not in the data:
they come from `cameras.json` beside it (ours), from the recorded configuration, or are those of
CALVIN's own configuration, which all published splits were rendered with. The gripper's camera
moves with the hand; where it was is worked out from `robot_obs`, or told by a frame's own
`pose_gripper` (ours).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import radians, tan
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import yaml
from scipy.spatial.transform import Rotation

from openhelix.benchmarks.calvin.cameras import (
    CAMERAS,
    HAND_CAMERA,
    STATIC_EYE,
    STATIC_TARGET,
    STATIC_UP,
    look,
)
from openhelix.benchmarks.calvin.dataset import (
    CAMERAS_FILE,
    Dataset,
    DatasetError,
    frame_name,
    language_files,
)
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
from openhelix.runtime.core.files import BadFile, read_arrays, read_json
from openhelix.runtime.core.interfaces import F64, CameraFrame

SPLITS = ("training", "validation")
INDEX = "ep_start_end_ids.npy"
RECORDED = Path(".hydra") / "merged_config.yaml"
HZ = 30.0
FARTHEST_PLAUSIBLE_M = 50.0  # millimetres taken for metres are beyond it
LOOKED_AT = 200  # names of a folder that tell whether it holds frames


@dataclass(frozen=True, slots=True)
class Lens:
    """How a camera sees, wherever the numbers come from.

    Attributes:
        K: (3, 3) for an image of `size`; None for a square image of any size by `fov_deg`.
        size: height and width.
        fov_deg: vertical field of view.
        T: (4, 4) camera to world, or to the TCP for a camera on the hand.
        on_hand: which of the two.
    """

    K: F64 | None
    size: tuple[int, int] | None
    fov_deg: float
    T: F64
    on_hand: bool

    def intrinsics(self, height: int, width: int) -> F64:
        """Return K (3, 3) for an image of this size."""
        if self.K is not None:
            return self.K
        f = height / 2 / tan(radians(self.fov_deg) / 2)
        return np.array([[f, 0, width / 2], [0, f, height / 2], [0, 0, 1.0]])


class CalvinSource(Source):
    """One split in CALVIN's layout.

    Args:
        path: of the split, or of the folder around `training` and `validation`, which stands for
            its first.

    Raises:
        DataError: an index file is missing or damaged.
    """

    layout: ClassVar[str] = "CALVIN"
    hz = HZ

    def __init__(self, path: Path) -> None:
        found = self.parts(path)
        if not found:
            raise DataError(f"{path / INDEX}: no such file")
        self.path = found[0]
        try:
            self._data = Dataset(self.path)
            self._scenes = self._data.scenes() if self._has_scenes else {}
        except DatasetError as error:
            raise DataError(str(error)) from None
        self.spans, self._cut = self._trimmed()
        self._keys = self._look()
        self.cameras = tuple(self._camera(name) for name in CAMERAS if f"rgb_{name}" in self._keys)
        self.facts = {
            "frames": "one .npz a frame, 30 a second",
            "actions": "`actions`: TCP one frame later, world frame, m and xyz Euler rad",
            "relative": "`rel_actions`: shares of 0.02 m and 0.05 rad, clipped to [-1, 1]"
            + ("" if "rel_actions" in self._keys else " (missing; worked out from `actions`)"),
            "gripper": "actions[6] and robot_obs[14]: -1 closed, 1 open; robot_obs[6] width, m",
            "depth": "metres along the optical axis",
            "camera matrices": self._lenses_from,
        }

    @classmethod
    def parts(cls, path: Path) -> list[Path]:
        """See `Source.parts`."""
        if (path / INDEX).exists() or not path.is_dir():
            return [path] if (path / INDEX).exists() else []
        inside = [path / split for split in SPLITS if (path / split / INDEX).exists()]
        return inside or ([path] if _holds_frames(path) else [])

    @classmethod
    def matches(cls, path: Path) -> bool:
        """See `Source.matches`."""
        return bool(cls.parts(path)) or any(_holds_frames(path / split) for split in SPLITS)

    # -- What is where -------------------------------------------------------------------

    @property
    def _has_scenes(self) -> bool:
        return any((self.path / f"scene_info.{kind}").exists() for kind in ("npy", "json"))

    @cached_property
    def language(self) -> Path:
        """The file of annotations that is read; the place where one belongs if there is none."""
        found = language_files(self.path)
        return found[0] if found else self.path / "lang_annotations" / "auto_lang_ann.npy"

    @cached_property
    def segments(self) -> tuple[Segment, ...]:  # type: ignore[override]
        """The annotations; empty where the split has none."""
        if not language_files(self.path):
            return ()
        try:
            notes, _ = self._data.annotations()
        except DatasetError as error:
            raise DataError(str(error)) from None
        return tuple(
            Segment(n.start, n.end, n.task, n.text, self._scene_of(n.start)) for n in notes
        )

    @cached_property
    def tasks(self) -> tuple[str, ...]:  # type: ignore[override]
        """CALVIN's 34, and after them what else is annotated."""
        return task_order(segment.task for segment in self.segments)

    def check(self, number: int) -> None:
        """See `Source.check`."""
        segment = self.segments[number]
        at = int(np.searchsorted(self.spans[:, 0], segment.first, side="right")) - 1
        where = f"{self.language}: info.indx[{number}]: frames {segment.first} to {segment.last}"
        if at < 0 or segment.first > self.spans[at, 1]:
            last = int(self.spans[-1, 1])
            raise DataError(f"{where} are in no episode; the data has {self.spans[0, 0]} to {last}")
        if segment.last > self.spans[at, 1]:
            raise DataError(f"{where}; the episode's frames end with {self.spans[at, 1]}")
        if not segment.text.strip():
            raise DataError(f"{self.language}: language.ann[{number}]: is empty")

    def files(self, first: int, last: int) -> Iterable[Path]:
        """See `Source.files`."""
        return (self._data.path(index) for index in range(first, last + 1))

    def index_files(self) -> Iterable[Path]:
        """See `Source.index_files`."""
        places = [self.path / INDEX, self.language, self.path / "scene_info.npy"]
        places += [folder / name for folder in self._around for name in (CAMERAS_FILE, RECORDED)]
        return [place for place in places if place.exists()]

    def problems(self) -> list[str]:
        """See `Source.problems`."""
        found = [
            f"{self.path / frame_name(at + 1)}: missing at the end of an episode, "
            f"{count} frames in all"
            for at, count in self._cut
        ]
        present, covered = self._present, 0
        for first, last in self.spans:
            low, high = np.searchsorted(present, [first, last + 1])
            covered += high - low
            if high - low != last + 1 - first:
                own = set(present[low:high].tolist())
                gap = next(i for i in range(first, last + 1) if i not in own)
                found.append(f"{self.path / frame_name(gap)}: missing inside an episode")
        if len(present) > covered:
            found.append(f"{self.path}: {len(present) - covered} frames are in no episode")
        lens = self.path / "ep_lens.npy"
        if lens.exists():
            try:
                told = np.load(lens, allow_pickle=False)
            except (OSError, ValueError) as error:
                return [*found, f"{lens}: cannot be read ({error})"]
            real = self._data.episodes[:, 1] - self._data.episodes[:, 0] + 1
            if told.shape != real.shape or (told != real).any():
                found.append(f"{lens}: are not the lengths in {INDEX}")
        if not self.segments:
            found.append(f"{self.language}: no annotations, so nothing to train on")
        return found

    @cached_property
    def _present(self) -> I64:
        """Numbers of the frames that are there, ascending."""
        with os.scandir(self.path) as entries:
            found = [
                int(e.name[8:-4])
                for e in entries
                if e.name.startswith("episode_")
                and e.name.endswith(".npz")
                and e.name[8:-4].isdecimal()
            ]
        return np.sort(np.array(found, np.int64))

    def _trimmed(self) -> tuple[I64, list[tuple[int, int]]]:
        """Return the episodes without frames that are missing at their ends, and those cuts."""
        spans, cuts = self._data.episodes.astype(np.int64), []
        if not len(spans):
            raise DataError(f"{self.path / INDEX}: lists no episode")
        spans = spans[np.argsort(spans[:, 0], kind="stable")]
        for row, (first, last) in enumerate(spans):
            end = int(last)
            if not self._data.path(end).exists():
                have = self._present[
                    np.searchsorted(self._present, first) : np.searchsorted(self._present, last)
                ]
                if not len(have):
                    raise DataError(
                        f"{self.path / INDEX}: row {row}: frames {first} to {last}, none of which "
                        "is there"
                    )
                end = int(have[-1])
                cuts.append((end, int(last) - end))
            spans[row, 1] = end
        if (spans[1:, 0] <= spans[:-1, 1]).any():
            raise DataError(f"{self.path / INDEX}: episodes overlap")
        return spans, cuts

    def _scene_of(self, frame: int) -> str:
        for name, (first, last) in self._scenes.items():
            if first <= frame <= last:
                return name.removeprefix("calvin_scene_")
        return ""

    # -- Cameras -------------------------------------------------------------------------

    @property
    def _around(self) -> tuple[Path, Path]:
        return self.path, self.path.parent

    def _look(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays of the first frame."""
        place = self._data.path(int(self.spans[0, 0]))
        try:
            found = read_arrays(place)
        except BadFile as error:
            raise DataError(str(error)) from None
        for name in ("actions", "robot_obs", "rgb_static"):
            if name not in found:
                raise DataError(f"{place}: no {name}")
        for name in CAMERAS:
            rgb, depth = found.get(f"rgb_{name}"), found.get(f"depth_{name}")
            if rgb is not None and (rgb.ndim != 3 or rgb.shape[2] != 3):
                raise DataError(f"{place}: rgb_{name}: shape {rgb.shape}, must be (H, W, 3)")
            seen = depth[np.isfinite(depth) & (depth > 0)] if depth is not None else np.ones(1)
            if len(seen) and np.median(seen) > FARTHEST_PLAUSIBLE_M:
                raise DataError(
                    f"{place}: depth_{name}: median {np.median(seen):.0f}, CALVIN's is in metres"
                )
        return found

    def _camera(self, name: str) -> Camera:
        height, width = self._keys[f"rgb_{name}"].shape[:2]
        lens = self._lens(name, "")
        if lens.size not in (None, (height, width)):
            raise DataError(
                f"{self._data.path(int(self.spans[0, 0]))}: rgb_{name}: {height} x {width}, "
                f"{self._lenses_from} says {lens.size[0]} x {lens.size[1]}"
            )
        mount = "hand" if lens.on_hand or f"pose_{name}" in self._keys else "world"
        has_depth = f"depth_{name}" in self._keys
        return Camera(name, height, width, has_depth, lens.intrinsics(height, width), True, mount)

    @cached_property
    def _lenses_from(self) -> str:
        found = [f / n for n in (CAMERAS_FILE, RECORDED) for f in self._around if (f / n).exists()]
        return str(found[0]) if found else "CALVIN's own configuration"

    @cached_property
    def _told(self) -> Mapping[str, Any]:
        """What a file says of the cameras."""
        place = Path(self._lenses_from)
        if place.name == CAMERAS_FILE:
            return read_json(place)
        if place.name != RECORDED.name:
            return {}
        try:
            found = yaml.safe_load(place.read_text())["cameras"]
            return dict(found)
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            said = " ".join(str(error).split())
            raise DataError(f"{place}: cameras: cannot be read ({said})") from None

    def _lens(self, name: str, scene: str) -> Lens:
        """Return how a camera sees in a scene."""
        told = self._told
        try:
            if Path(self._lenses_from).name == CAMERAS_FILE:
                own = told.get("scenes", {}).get(f"calvin_scene_{scene}", {})
                return _lens_of(own.get(name) or told["cameras"][name])
            about = dict(told.get(name, {}))
            fov = float(about.get("fov", CAMERAS[name].fov_deg))
            size = (int(about["height"]), int(about["width"])) if "height" in about else None
            if name == "gripper":
                return Lens(None, size, fov, HAND_CAMERA, True)
            eye, target, up = (
                np.array(about.get(key, own), float)
                for key, own in (
                    ("look_from", STATIC_EYE),
                    ("look_at", STATIC_TARGET),
                    ("up_vector", STATIC_UP),
                )
            )
            return Lens(None, size, fov, look(eye, target - eye, up), False)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{self._lenses_from}: {name}: cannot be read ({type(error).__name__}: {error})"
            ) from None

    # -- Frames --------------------------------------------------------------------------

    def motion(self, first: int, last: int) -> Motion:
        """See `Source.motion`."""
        rel = "rel_actions" in self._keys
        wanted = {"robot_obs": 15, "actions": 7, **({"rel_actions": 7} if rel else {})}
        rows: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in wanted}
        for index in range(first, last + 1):
            arrays = self._arrays(index, list(wanted))
            for name, size in wanted.items():
                where = f"{self._data.path(index)}: {name}"
                if arrays[name].shape != (size,) or arrays[name].dtype.kind not in "fiu":
                    raise DataError(
                        f"{where}: {arrays[name].dtype}{arrays[name].shape}, must be "
                        f"({size},) numbers"
                    )
                check_finite(arrays[name], where)
                rows[name].append(arrays[name])
            for name, at in (("actions", 6), ("robot_obs", 14)):
                if abs(arrays[name][at]) != 1:
                    raise DataError(
                        f"{self._data.path(index)}: {name}[{at}]: {arrays[name][at]:g}, must be -1 "
                        "(closed) or 1 (open)"
                    )
        robot, action = (
            np.stack(rows[name]).astype(np.float64) for name in ("robot_obs", "actions")
        )
        opened, width = (robot[:, 14:] > 0).astype(np.float64), robot[:, 6:7]
        grip = (action[:, 6:] > 0).astype(np.float64)
        proprio = np.concatenate([robot[:, :3], _quaternions(robot[:, 3:6]), width, opened], axis=1)
        targets = np.concatenate([action[:, :3], _quaternions(action[:, 3:6]), grip], axis=1)
        relative = (
            np.stack(rows["rel_actions"]).astype(np.float32)
            if rel
            else relative_of(robot[:, :6], action[:, :6], grip[:, 0])
        )
        return Motion(proprio.astype(np.float32), targets.astype(np.float32), relative)

    def calvin_states(self, first: int, last: int) -> tuple[F64, F64]:
        """See `Source.calvin_states`."""
        names = ["robot_obs", "scene_obs"]
        rows = [self._arrays(index, names) for index in range(first, last + 1)]
        robot, scene = (np.stack([row[n] for row in rows]).astype(np.float64) for n in names)
        return robot, scene

    def views(
        self, frames: Sequence[int], names: Sequence[str]
    ) -> Iterator[dict[str, CameraFrame]]:
        """See `Source.views`."""
        cameras = [camera for camera in self.cameras if camera.name in names]
        keys = [f"rgb_{c.name}" for c in cameras]
        keys += [f"depth_{c.name}" for c in cameras if c.depth]
        keys += [f"pose_{c.name}" for c in cameras if f"pose_{c.name}" in self._keys]
        lenses = {c.name: self._lens(c.name, self._scene_of(frames[0])) for c in cameras}
        for index in frames:
            arrays = self._arrays(index, [*keys, "robot_obs"])
            out = {}
            for camera in cameras:
                lens, size = lenses[camera.name], (camera.height, camera.width)
                rgb = self._pixels(index, arrays, f"rgb_{camera.name}", (*size, 3))
                depth = None
                if camera.depth:
                    depth = self._pixels(index, arrays, f"depth_{camera.name}", size)
                pose = self._pose(index, arrays, camera.name, lens)
                out[camera.name] = CameraFrame(0, rgb, depth, lens.intrinsics(*size), pose)
            yield out

    def _pose(
        self, index: int, arrays: Mapping[str, npt.NDArray[Any]], name: str, lens: Lens
    ) -> F64:
        own = arrays.get(f"pose_{name}")
        if own is None and not lens.on_hand:
            return lens.T
        key, found = (
            (f"pose_{name}", own) if own is not None else ("robot_obs", arrays["robot_obs"])
        )
        shape = (4, 4) if own is not None else (15,)
        if found.shape != shape:
            raise DataError(
                f"{self._data.path(index)}: {key}: shape {found.shape}, must be {shape}"
            )
        check_finite(found, f"{self._data.path(index)}: {key}")
        return found if own is not None else _tcp_matrix(found) @ lens.T

    def _arrays(self, index: int, names: list[str]) -> dict[str, npt.NDArray[Any]]:
        try:
            return read_arrays(self._data.path(index), names=names)
        except BadFile as error:
            raise DataError(str(error)) from None

    def _pixels(
        self, index: int, arrays: Mapping[str, npt.NDArray[Any]], name: str, shape: tuple[int, ...]
    ) -> npt.NDArray[Any]:
        found, colour = arrays[name], len(shape) == 3
        if found.shape != shape or (found.dtype != np.uint8 if colour else found.dtype.kind != "f"):
            raise DataError(
                f"{self._data.path(index)}: {name}: {found.dtype}{found.shape}, must be "
                f"{'uint8' if colour else 'float'}{shape} as in the first frame"
            )
        return found if colour else found.astype(np.float32, copy=False)


def _holds_frames(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(
            e.name.startswith("episode_") and e.name.endswith(".npz")
            for e in islice(entries, LOOKED_AT)
        )


def _lens_of(told: Mapping[str, Any]) -> Lens:
    """Return what our own `cameras.json` says of one camera."""
    on_hand = "T_tcp_cam" in told
    K, T = np.array(told["K"], float), np.array(told["T_tcp_cam" if on_hand else "T_world_cam"])
    if (
        K.shape != (3, 3)
        or T.shape != (4, 4)
        or not (np.isfinite(K).all() and np.isfinite(T).all())
    ):
        raise ValueError(f"K {K.shape} and pose {T.shape}, must be (3, 3) and (4, 4), finite")
    return Lens(K, (int(told["height"]), int(told["width"])), 0.0, T, on_hand)


def _quaternions(euler: F64) -> F64:
    """Return quaternions (N, 4) xyzw of xyz Euler angles (N, 3)."""
    return np.asarray(Rotation.from_euler("xyz", euler).as_quat())


def _tcp_matrix(robot_obs: npt.NDArray[Any]) -> F64:
    """Return the TCP's pose (4, 4) in the world."""
    out = np.eye(4)
    out[:3, :3] = Rotation.from_euler("xyz", robot_obs[3:6]).as_matrix()
    out[:3, 3] = robot_obs[:3]
    return out
