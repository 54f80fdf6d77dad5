"""The training cache of a dataset: built in parallel, resumed, and never trusted blindly.

A dataset's annotated segments are what is learnt from. Of each, every so many-th frame is read, in
place, shrunk to the size on which the policy's encoder works, and written with its labels as
`openhelix.system1.cache` says, a few dozen segments a shard. How much it will be is said before
anything is written. The same command goes on where it was killed.

Beside the shards lie `build.json` (of what, and how), `source/` (size and time of every file that
was read) and `skipped.json` (what was left out, and why). A cache whose dataset has changed since
is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save

from openhelix.benchmarks.calvin.frames import FramesConfig, chosen_steps, labels, resized
from openhelix.benchmarks.data.source import Camera, DataError, Source, open_source
from openhelix.runtime.core.config import CommandFailed, ConfigError
from openhelix.runtime.core.files import BadFile, parse_object, read_arrays, read_json, replace_file
from openhelix.runtime.core.paths import cache_folder
from openhelix.system1.cache import Columns, index_bytes, pictures, shard_bytes
from openhelix.system1.config import CameraConfig, PolicyConfig, small
from openhelix.system1.data import read_index

ABOUT, INDEX, STAMPS, SKIPPED, SYSTEM2 = (
    "build.json", "cache.json", "source", "skipped.json", "system2"
)  # fmt: skip
VERSION = 1  # of how a dataset becomes a cache
SHARD_FRAMES = 600  # about 50 MB
WORK_PX = 100  # the shorter side that an unknown camera's images are shrunk to
OTHERS = 0.15  # frames beside every n-th: those around a change of the gripper, roughly
Say = Callable[[str], None]


class CacheSettings(BaseModel):
    """How a dataset becomes a training cache.

    Attributes:
        every: every so many-th frame of a segment.
        near_grip: also frames this near to a change of the gripper.
        cameras: by name; () for all whose pixels can become points.
        system2_px: also keep System 2's images, of this size; 0: it gets the policy's.
        seed: decides with which frame of a segment to begin.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    every: Annotated[int, Field(ge=1)] = 4
    near_grip: Annotated[int, Field(ge=0)] = 1
    cameras: tuple[str, ...] = ()
    system2_px: Annotated[int, Field(ge=0, le=1024)] = 0
    seed: Annotated[int, Field(ge=0)] = 0

    def moments(self) -> FramesConfig:
        """The rule by which demonstrations' frames are chosen, too."""
        return FramesConfig(every=self.every, near_grip=self.near_grip, seed=self.seed)


@dataclass(frozen=True, slots=True)
class Order:
    """What one process is asked for: one shard."""

    path: str
    reader: str
    settings: CacheSettings
    segments: tuple[int, ...]
    groups: tuple[int, ...]
    shard: Path
    skip_bad: bool


def default_folder(path: Path) -> Path:
    """Return where a dataset's cache goes unless another place is named."""
    place = path.expanduser().resolve()
    name = "-".join(part for part in place.parts[-2:] if part not in ("/", "training"))
    digest = hashlib.sha256(str(place).encode()).hexdigest()[:8]
    return cache_folder() / "data" / f"{name}-{digest}" / "frames"


def camera_configs(source: Source, names: Sequence[str] = ()) -> tuple[CameraConfig, ...]:
    """Return the cameras that a policy is to see, as it is to see them.

    Raises:
        DataError: one is not there, or its pixels cannot become points.
    """
    wanted: list[Camera] = []
    for name in names:
        camera = source.camera(name)
        if camera is None:
            have = ", ".join(c.name for c in source.cameras)
            raise DataError(f"cameras: {name!r} is none of {have} in {source.path}")
        wanted.append(camera)
    wanted = wanted or [camera for camera in source.cameras if camera.usable]
    lacking = [c for c in wanted if not c.usable] if names else source.cameras if not wanted else []
    if not wanted or lacking:
        said = "; ".join(f"{c.name} lacks {c.lacks}" for c in lacking) or "it has no cameras"
        raise DataError(
            f"{source.path}: cameras: {said}. System 1 acts on points in the world, so a camera "
            "needs depth, intrinsics and a pose"
        )
    known = {c.name: c for c in small().cameras}
    order = [*known, *(camera.name for camera in wanted)]
    wanted.sort(key=lambda camera: order.index(camera.name))  # as in collections, to be mixed with
    out = []
    for camera in wanted:
        ours = known.get(camera.name)
        if ours is not None and (ours.height, ours.width) == (camera.height, camera.width):
            out.append(ours)
            continue
        share = min(1.0, WORK_PX / min(camera.height, camera.width))
        work = [max(8, round(n * share / 4) * 4) for n in (camera.height, camera.width)]
        out.append(CameraConfig(camera.name, camera.height, camera.width, *work))
    return tuple(out)


def policy_of(source: Source, settings: CacheSettings) -> PolicyConfig:
    """Return the interface that a policy for this dataset has."""
    return small(cameras=camera_configs(source, settings.cameras), hz=source.hz)


def frame_bytes(policy: PolicyConfig, settings: CacheSettings) -> int:
    """Return the disk that one frame takes."""
    pixels = sum(c.work_height * c.work_width for c in policy.cameras)
    return 5 * pixels + 3 * settings.system2_px**2 + 1000


def overlapping(source: Source) -> list[int]:
    """Return for each segment a number that it shares with those that show the same frames.

    CALVIN labels windows that overlap: held-out ones must not be training ones under another name.
    """
    order = sorted(range(len(source.segments)), key=lambda n: source.segments[n].first)
    out, end, group = [0] * len(order), -1, -1
    for number in order:
        segment = source.segments[number]
        if segment.first > end:
            group = number
        out[number] = group
        end = max(end, segment.last)
    return out


# -- One shard, in a process of its own ------------------------------------------------


@lru_cache(maxsize=2)
def _source(path: str, reader: str) -> Source:
    torch.set_num_threads(1)
    return open_source(path, reader)


@lru_cache(maxsize=2)
def _texts(path: str, reader: str) -> dict[str, int]:
    return {text: number for number, text in enumerate(sentences(_source(path, reader)))}


def sentences(source: Source) -> list[str]:
    """Return the instructions of a dataset, each once."""
    return sorted({segment.text for segment in source.segments})


def build_shard(order: Order) -> tuple[int, list[dict[str, Any]]]:
    """Read some segments and write their shard; return its frames and what was left out.

    Raises:
        DataError: a segment cannot be read, unless it is to be left out.
    """
    source, settings = _source(order.path, order.reader), order.settings
    policy, parts = policy_of(source, settings), list[Columns]()
    images: list[torch.Tensor] = []
    skipped: list[dict[str, Any]] = []
    stamps: dict[Path, tuple[int, int]] = {}
    for number, group in zip(order.segments, order.groups, strict=True):
        segment = source.segments[number]
        try:
            source.check(number)
            own = {path: stamp(path) for path in source.files(segment.first, segment.last)}
            columns = segment_columns(source, order, policy, number, group, images)
        except BadFile as error:
            if not order.skip_bad:
                raise DataError(f"{error} (--skip-bad leaves such out)") from None
            skipped.append({"segment": number, "text": segment.text, "why": str(error)})
            continue
        stamps |= own
        if columns is not None:
            parts.append(columns)
    frames = sum(len(part["task"]) for part in parts)
    if parts:
        notes = {"segments": f"{order.segments[0]} to {order.segments[-1]}"}
        content = shard_bytes(parts, policy, len(source.tasks), len(sentences(source)), notes)
        if images:
            drawn = save({"rgb": torch.stack(images)})
            replace_file(order.shard.parent / SYSTEM2 / order.shard.name, drawn)
        replace_file(order.shard, content)
    about = json.dumps({"frames": frames, "skipped": skipped}).encode()
    replace_file(stamps_path(order.shard), stamps_bytes(source.path, stamps, about))
    return frames, skipped


def segment_columns(
    source: Source,
    order: Order,
    policy: PolicyConfig,
    number: int,
    group: int,
    images: list[torch.Tensor],
) -> Columns | None:
    """Return the rows of one segment; None where it is too short to learn from."""
    segment, settings = source.segments[number], order.settings
    demonstration = source.demonstration(segment)
    rng = np.random.default_rng([zlib.crc32(b"dataset"), settings.seed, number])
    steps = chosen_steps(demonstration, settings.moments(), rng)
    if not steps:
        return None
    views = list(
        source.views([segment.first + step for step in steps], [c.name for c in policy.cameras])
    )
    task = source.tasks.index(segment.task)
    said = _texts(order.path, order.reader)[segment.text]
    columns = labels(demonstration, number, steps, policy, task, said)
    columns["group"] = torch.full((len(steps),), group, dtype=torch.int32)
    for camera in policy.cameras:
        columns |= pictures([view[camera.name] for view in views], camera)
    if settings.system2_px:
        seen = policy.cameras[0].name
        images += [resized(view[seen].rgb, settings.system2_px) for view in views]
    return columns


# -- What was read, so that a change of it is noticed ----------------------------------


def stamp(path: Path) -> tuple[int, int]:
    """Return size and time of a file.

    Raises:
        DataError: it is not there.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    return found.st_size, found.st_mtime_ns


def stamps_path(shard: Path) -> Path:
    """Return where a shard's list of files is kept."""
    return shard.parent / STAMPS / f"{shard.stem}.npz"


def stamps_bytes(root: Path, stamps: dict[Path, tuple[int, int]], about: bytes = b"{}") -> bytes:
    """Return a list of files as the content of a `.npz`."""
    names = [os.path.relpath(path, root).encode() for path in stamps]
    numbers = np.array(list(stamps.values()), np.int64).reshape(-1, 2)
    stream = io.BytesIO()
    np.savez_compressed(
        stream,
        names=np.array(names or [b""], dtype=bytes)[: len(names)],
        sizes=numbers[:, 0],
        times_ns=numbers[:, 1],
        about=np.frombuffer(about, np.uint8),
    )
    return stream.getvalue()


def check_unchanged(folder: Path) -> None:
    """Compare the files that a cache was made of with what they are now.

    A cache that was made otherwise, or whose dataset is not on this machine, passes.

    Raises:
        DataError: one changed or is gone; names it, and what it was.
    """
    if not (folder / ABOUT).is_file():
        return
    root = str(read_json(folder / ABOUT).get("path", ""))
    if not os.path.exists(root):
        return
    again = (
        f"since the cache {folder} was built; `openhelix data cache {root} {folder} --fresh` "
        "builds it again"
    )
    for listed in sorted((folder / STAMPS).glob("*.npz")):
        arrays = read_arrays(listed)
        rows = zip(*(arrays[n].tolist() for n in ("names", "sizes", "times_ns")), strict=True)
        for name, size, time_ns in rows:
            path = f"{root}/{os.fsdecode(name)}"
            try:
                now = os.stat(path)
            except FileNotFoundError:
                raise DataError(f"{path}: is gone {again}") from None
            if now.st_size != size:
                raise DataError(f"{path}: size: {now.st_size} bytes, was {size} {again}")
            if now.st_mtime_ns != time_ns:
                raise DataError(f"{path}: time: was written {again}")


def about_cache(folder: Path) -> dict[str, Any]:
    """Return what a training cache holds, and whether its dataset is still what it was.

    Raises:
        BadFile: it is damaged.
    """
    meta = read_index(folder)
    try:
        check_unchanged(folder)
        changed = ""
    except DataError as error:
        changed = str(error)
    return {
        "cache": str(folder),
        "frames": sum(int(shard["frames"]) for shard in meta["shards"]),
        "shards": len(meta["shards"]),
        "hz": meta["hz"],
        "cameras": meta["cameras"],
        "tasks": meta["tasks"],
        "sentences": len(meta["instructions"]),
        "notes": meta.get("notes", {}),
        "problems": [changed] if changed else [],
    }


# -- The whole -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Build:
    """A cache to be built: of what, how, and where."""

    source: Source
    reader: str
    settings: CacheSettings
    folder: Path
    jobs: int = 1
    skip_bad: bool = False
    max_gb: float = 40.0

    def run(self, say: Say) -> dict[str, Any]:
        """Build what is missing; return what the cache is.

        Args:
            say: is told of size, progress and time left, a line each.

        Raises:
            DataError: the dataset has nothing to train on, or something that cannot be read.
            ConfigError: the folder holds something else, or there is no room.
        """
        source = self.source
        for kept in (_source, _texts):  # of what may have been another state of the dataset
            kept.cache_clear()
        if not source.segments:
            problem = next(iter(source.problems()), f"{source.path}: no annotations")
            raise DataError(problem)
        policy = policy_of(source, self.settings)
        begun_before = self._compare_folder()
        good, skipped = self._checked()
        orders = self._orders(good)
        todo = [order for order in orders if not stamps_path(order.shard).exists()]
        if not todo and (self.folder / INDEX).is_file():
            return self._finish(policy, orders, skipped)
        self._announce(policy, orders, todo, say)
        if not begun_before:
            self._begin_folder()
        begun = time.monotonic()
        for done, (frames, left_out) in enumerate(pooled(todo, self.jobs), 1):
            for item in left_out:
                say(f"left out: {item['why']}")
            left_s = (time.monotonic() - begun) / done * (len(todo) - done)
            say(f"{done} of {len(todo)}: {frames} frames, {left_s:.0f} s to go")
        return self._finish(policy, orders, skipped)

    def _checked(self) -> tuple[list[int], list[dict[str, Any]]]:
        """Return the segments that lie within the data, and those that do not."""
        good, skipped = [], []
        for number, segment in enumerate(self.source.segments):
            try:
                self.source.check(number)
                good.append(number)
            except DataError as error:
                if not self.skip_bad:
                    raise DataError(f"{error} (--skip-bad leaves such out)") from None
                skipped.append({"segment": number, "text": segment.text, "why": str(error)})
        return good, skipped

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for s in self.source.segments:
            digest.update(f"{s.first} {s.last} {s.task} {s.text}\n".encode())
        return {
            "version": VERSION,
            "path": str(self.source.path.resolve()),
            "layout": self.source.layout,
            "reader": self.reader,
            "settings": self.settings.model_dump(mode="json"),
            "annotations": digest.hexdigest(),
        }

    def _compare_folder(self) -> bool:
        """Return whether the folder is this cache begun earlier; refuse anything else in it."""
        about, identity = self.folder / ABOUT, self._identity()
        if not about.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ConfigError(f"out: {self.folder} holds other data; choose an empty folder")
            return False
        before = read_json(about)
        for key in ("version", "path", "settings"):
            if before.get(key) != identity[key]:
                raise ConfigError(
                    f"{key}: {self.folder} was built with {before.get(key)!r}; choose another "
                    "folder with out=DIR, or --fresh"
                )
        check_unchanged(self.folder)
        if before.get("annotations") != identity["annotations"]:
            where = next(iter(self.source.index_files()), self.source.path)
            raise DataError(
                f"{where}: annotations: other ones than when the cache {self.folder} was built; "
                "--fresh builds it again"
            )
        for torn in self.folder.rglob(".*.part"):
            torn.unlink()
        return True

    def _begin_folder(self) -> None:
        stamps = {path: stamp(path) for path in self.source.index_files()}
        replace_file(self.folder / STAMPS / "index.npz", stamps_bytes(self.source.path, stamps))
        replace_file(self.folder / ABOUT, json.dumps(self._identity(), indent=1).encode())

    def _orders(self, numbers: list[int]) -> list[Order]:
        groups, out, some, size = overlapping(self.source), [], list[int](), 0.0
        for number in numbers:
            some.append(number)
            size += _frames_of(self.source, number, self.settings)
            if size >= SHARD_FRAMES:
                out.append(some)
                some, size = [], 0.0
        out += [some] if some else []
        return [
            Order(
                str(self.source.path),
                self.reader,
                self.settings,
                tuple(own),
                tuple(groups[n] for n in own),
                self.folder / f"shard-{place:05d}.safetensors",
                self.skip_bad,
            )
            for place, own in enumerate(out)
        ]

    def _announce(
        self, policy: PolicyConfig, orders: list[Order], todo: list[Order], say: Say
    ) -> None:
        """Say how much there is to do; refuse what there is no room for."""

        def size(some: list[Order]) -> float:
            numbers = (n for order in some for n in order.segments)
            return sum(_frames_of(self.source, n, self.settings) for n in numbers)

        each = frame_bytes(policy, self.settings)
        frames, more = size(orders), size(todo) * each
        there = next(p for p in (self.folder, *self.folder.resolve().parents) if p.exists())
        free = shutil.disk_usage(there).free
        say(
            f"{self.source.path}: {sum(len(o.segments) for o in orders):,} segments, about "
            f"{frames:,.0f} frames, {frames * each / 1e9:.2f} GB into {self.folder} "
            f"({more / 1e9:.2f} GB to write, {free / 1e9:.1f} GB free; jobs={self.jobs})"
        )
        if frames * each > self.max_gb * 1e9:
            raise ConfigError(
                f"max_gb: {frames * each / 1e9:.1f} GB are needed, {self.max_gb:g} allowed; "
                "every=N takes fewer frames"
            )
        if more > free:
            raise ConfigError(f"out: {more / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")

    def _finish(
        self, policy: PolicyConfig, orders: list[Order], skipped: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Write the index, and the list of what was left out."""
        shards: list[dict[str, Any]] = []
        skipped = list(skipped)
        for order in orders:
            place = stamps_path(order.shard)
            about = parse_object(read_arrays(place, names=["about"])["about"].tobytes(), str(place))
            skipped += about["skipped"]
            if about["frames"]:
                shards.append({"file": order.shard.name, "frames": int(about["frames"])})
        if skipped and not self.skip_bad:
            raise DataError(f"{skipped[0]['why']} (--skip-bad leaves such out)")
        if not shards:
            why = f"; {skipped[0]['why']}" if skipped else ": every segment is too short"
            raise DataError(f"{self.source.path}: nothing is left to train on{why}")
        replace_file(self.folder / SKIPPED, json.dumps(skipped, indent=1).encode())
        if self.settings.system2_px:
            size = json.dumps(self.settings.system2_px).encode()
            replace_file(self.folder / SYSTEM2 / "size.json", size)
        notes = {
            "collection": self.source.path.name,
            "dataset": str(self.source.path),
            "layout": self.source.layout,
            "settings": self.settings.model_dump(mode="json"),
            "skipped": len(skipped),
        }
        content = index_bytes(policy, self.source.tasks, sentences(self.source), shards, notes)
        replace_file(self.folder / INDEX, content)
        return {
            "folder": str(self.folder),
            "frames": sum(shard["frames"] for shard in shards),
            "segments": sum(len(order.segments) for order in orders),
            "shards": len(shards),
            "bytes": sum((self.folder / shard["file"]).stat().st_size for shard in shards),
            "skipped": len(skipped),
            "left_out": skipped,
        }


def _frames_of(source: Source, number: int, settings: CacheSettings) -> float:
    """Return about how many frames of a segment are taken."""
    segment = source.segments[number]
    return (segment.last - segment.first + 1) * (1 / settings.every + OTHERS / settings.every)


def pooled(orders: Sequence[Order], jobs: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Build shards, in processes of their own if more than one; yield what they say."""
    if jobs == 1 or len(orders) < 2:
        for order in orders:
            yield build_shard(order)
        return
    pool = ProcessPoolExecutor(min(jobs, len(orders)), mp_context=get_context("spawn"))
    with pool:
        futures = [pool.submit(build_shard, order) for order in orders]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise CommandFailed(
                "one of the processes was ended from outside, perhaps for want of memory; jobs=N "
                "takes fewer, and the same command goes on"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def remove_cache(folder: Path) -> None:
    """Remove a cache that this module built, and nothing else.

    Raises:
        ConfigError: it is none.
    """
    if not folder.exists():
        return
    if not (folder / ABOUT).is_file():
        raise ConfigError(f"--fresh: {folder} is no cache of a dataset; remove it yourself")
    own: Iterable[Path] = [
        *folder.glob("shard-*.safetensors"),
        *(folder / SYSTEM2).glob("*"),
        *(folder / STAMPS).glob("*.npz"),
        *(folder / name for name in (INDEX, SKIPPED)),
        folder / ABOUT,
    ]
    for path in own:
        path.unlink(missing_ok=True)
    for inside in (folder / SYSTEM2, folder / STAMPS):
        if inside.is_dir() and not any(inside.iterdir()):
            inside.rmdir()
