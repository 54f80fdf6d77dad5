"""What a dataset is, whatever its layout: episodes of frames, cameras, sentences, actions.

A *reader* opens one layout and gives a `Source`. Nothing is copied to memory: a source knows where
its frames are and reads those that are asked for, so that 500 GB are read in place. Readers are
entry points of the group `openhelix.readers` (name -> class); `openhelix data`, `openhelix train`
and the training cache know datasets by this interface alone.

Whatever a layout has on disk, a source speaks of metres, radians, seconds, the world frame (z up),
quaternions xyzw, and openness from 0 (closed) to 1 (open).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from openhelix.benchmarks.calvin.dataset import MAX_REL_ORN_RAD, MAX_REL_POS_M
from openhelix.benchmarks.calvin.demonstrations import Demonstration
from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.runtime.core import plugins
from openhelix.runtime.core.files import BadFile
from openhelix.runtime.core.interfaces import F32, F64, CameraFrame

READERS = "openhelix.readers"
I64 = npt.NDArray[np.int64]


class DataError(BadFile):
    """A dataset that cannot be read as asked; one line names the file and the field."""


@dataclass(frozen=True, slots=True)
class Camera:
    """One camera of a dataset.

    Attributes:
        name: "static", "gripper", ...
        height, width: pixels.
        depth: whether frames have depth; System 1 needs it.
        K: (3, 3) intrinsics, pixels, centres at +0.5; None where the dataset does not say.
        posed: whether frames come with the camera's pose in the world.
        mount: "world" for a camera that stands still, "hand" for one that moves with the hand.
    """

    name: str
    height: int
    width: int
    depth: bool
    K: F64 | None
    posed: bool
    mount: str = "world"

    @property
    def usable(self) -> bool:
        """Whether its pixels can become points."""
        return self.depth and self.K is not None and self.posed

    @property
    def lacks(self) -> str:
        """What is missing for that, in words; empty if nothing is."""
        missing = [
            *(() if self.depth else ("depth",)),
            *(() if self.K is not None else ("intrinsics",)),
            *(() if self.posed else ("a pose",)),
        ]
        return ", ".join(missing)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of an episode in which one instruction was carried out.

    Attributes:
        first, last: frames, both included.
        task: what is counted as one task; the sentence itself where a dataset has no names.
        text: the instruction.
        scene: where, "" if the dataset does not say.
    """

    first: int
    last: int
    task: str
    text: str
    scene: str = ""


@dataclass(frozen=True, slots=True)
class Motion:
    """Consecutive frames without their images.

    Attributes:
        proprio: (L, 9) TCP position m, quaternion xyzw, gripper width m, commanded openness
            (0 or 1).
        targets: (L, 8) absolute actions: where the TCP was to be one frame later, and the
            openness commanded.
        relative: (L, 7) CALVIN's relative actions: shares of 0.02 m and 0.05 rad along world
            axes, and the gripper, -1 closed and 1 open.
    """

    proprio: F32
    targets: F32
    relative: F32

    def __len__(self) -> int:
        return len(self.targets)


class Source(ABC):
    """A dataset that is open. A reader inherits this and gives what is abstract here.

    Attributes:
        layout: name of the layout, for people.
        path: the folder or file.
        hz: frames a second.
        cameras: what there is to see.
        spans: (N, 2) first and last frame of each episode, both included, ascending.
        segments: what was instructed when.
        tasks: names of the tasks, in the order of a policy's table.
        facts: conventions as the dataset has them, by name, for `openhelix data inspect`.
    """

    layout: ClassVar[str]

    @abstractmethod
    def __init__(self, path: Path) -> None: ...

    path: Path
    hz: float
    cameras: tuple[Camera, ...]
    spans: I64
    segments: tuple[Segment, ...]
    tasks: tuple[str, ...]
    facts: Mapping[str, str]

    @classmethod
    @abstractmethod
    def matches(cls, path: Path) -> bool:
        """Whether a path looks like this layout; looks, does not read."""

    @classmethod
    def parts(cls, path: Path) -> list[Path]:
        """Return the datasets in a folder that are opened one by one, such as its splits."""
        return [path]

    def check(self, number: int) -> None:  # noqa: B027 - of most layouts nothing can be cut short
        """Raise `DataError` unless a segment lies within the frames that are there."""

    @abstractmethod
    def motion(self, first: int, last: int) -> Motion:
        """Return frames `first` to `last`, both included, of one episode.

        Raises:
            DataError: a file is missing or damaged, or a value not finite; names both.
        """

    @abstractmethod
    def views(
        self, frames: Sequence[int], names: Sequence[str]
    ) -> Iterator[dict[str, CameraFrame]]:
        """Yield what some cameras saw in some frames, ascending, of one episode.

        K is NaN where it is unknown, and so is the pose.

        Raises:
            DataError: a file is missing or damaged, or an image not as it should be.
        """

    def calvin_states(self, first: int, last: int) -> tuple[F64, F64] | None:
        """Return CALVIN's robot_obs (L, 15) and scene_obs (L, 24); None where they are unknown."""
        return None

    @abstractmethod
    def files(self, first: int, last: int) -> Iterable[Path]:
        """Return the files that hold frames `first` to `last`."""

    @abstractmethod
    def index_files(self) -> Iterable[Path]:
        """Return the files that say what is where."""

    def problems(self) -> list[str]:
        """Return what is wrong or odd with the dataset as a whole, a line each."""
        return []

    def camera(self, name: str) -> Camera | None:
        """Return a camera by its name."""
        return next((camera for camera in self.cameras if camera.name == name), None)

    @cached_property
    def n_frames(self) -> int:
        """Frames of all episodes."""
        return int((self.spans[:, 1] - self.spans[:, 0] + 1).sum()) if len(self.spans) else 0

    def demonstration(self, segment: Segment) -> Demonstration:
        """Return a segment as a demonstration; its states are unknown."""
        motion = self.motion(segment.first, segment.last)
        return Demonstration(
            segment.task,
            segment.scene,
            True,
            len(motion) - 1,
            np.empty((0, 36)),
            motion.proprio,
            motion.targets,
            motion.relative,
            np.ones(len(motion), bool),
            segment.text,
        )


def readers(lacking: list[str] | None = None) -> dict[str, type[Source]]:
    """Return the readers by name, those alone that have all they need.

    Args:
        lacking: is told why others are left out.
    """
    found = {}
    for name, path in plugins.entries(READERS).items():
        try:
            found[name] = plugins.resolve(path)
        except plugins.ResolveError as error:
            if lacking is not None:
                lacking.append(f"{name}: {error}")
    return found


def recognised(path: Path) -> bool:
    """Whether some reader knows the layout of a path."""
    return any(reader.matches(path) for reader in readers().values())


def open_source(path: Path | str, reader: str = "") -> Source:
    """Open a dataset.

    Args:
        path: of its folder or file.
        reader: which layout, by the name of its reader, or "module:Class"; "" looks.

    Raises:
        DataError: there is nothing, or nothing that a reader knows.
    """
    place = Path(path).expanduser()
    if reader:
        try:
            found = plugins.find(READERS, reader)
        except plugins.ResolveError as error:
            raise DataError(f"reader: {error}") from None
        lacks = sorted(getattr(found, "__abstractmethods__", ()))
        if lacks:
            raise DataError(f"reader: {reader} lacks {', '.join(lacks)}")
        return _opened(found, place)
    if not place.exists():
        raise DataError(f"{place}: no such folder or file")
    lacking: list[str] = []
    known = readers(lacking)
    for candidate in known.values():
        if candidate.matches(place):
            return candidate(place)
    raise DataError(
        f"{place}: no layout that is known ({', '.join(known)}); reader=module:Class names one of "
        "your own" + "".join(f"; {why}" for why in lacking)
    )


def _opened(reader: type[Source], place: Path) -> Source:
    if not place.exists():
        raise DataError(f"{place}: no such folder or file")
    return reader(place)


def task_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return tasks in the order of a policy's table.

    CALVIN's 34 come first, all of them, wherever one occurs, so that datasets of them agree.
    """
    found = set(names)
    known = TASK_NAMES if found & set(TASK_NAMES) or not found else ()
    return (*known, *sorted(found - set(known)))


def check_finite(array: npt.NDArray[Any], where: str) -> None:
    """Raise `DataError` for the first value that is not finite; `where` is file and field."""
    if not np.isfinite(array).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise DataError(f"{where}{list(at)}: {array[at]}, must be finite")


def relative_of(poses: F64, targets: F64, openness: F64) -> F32:
    """Return CALVIN's relative actions (L, 7), as its dataset computes them.

    Args:
        poses: (L, 6) where the TCP is, m and xyz Euler angles.
        targets: (L, 6) where it is to be.
        openness: (L,) commanded, 0 to 1.
    """
    shift = np.clip((targets[:, :3] - poses[:, :3]) / MAX_REL_POS_M, -1, 1)
    turn = targets[:, 3:] - poses[:, 3:]
    turn = (turn + np.pi) % (2 * np.pi) - np.pi  # the short way round
    turn = np.clip(turn / MAX_REL_ORN_RAD, -1, 1)
    grip = np.where(openness[:, None] > 0.5, 1.0, -1.0)
    return np.concatenate([shift, turn, grip], axis=1).astype(np.float32)
