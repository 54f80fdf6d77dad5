"""`openhelix collect`: run the scripted experts and keep the demonstrations that succeed.

    openhelix collect scenes=ABC per_task=20 out=demonstrations
    openhelix collect format=calvin scenes=D per_task=2

A collection is a folder of unit files. Unit files are written atomically, so the same command
resumes an interrupted collection; a folder begun with other settings, or with other contents, is
refused before anything is written. `card.json` describes it: counts, failures, step numbers,
settings, and a SHA-256 of every file. Then the frames that training reads are rendered
(`openhelix.benchmarks.calvin.frames`), also file by file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from safetensors import safe_open
from safetensors.torch import save

from openhelix.benchmarks.calvin.cameras import TACTILE, SceneRenderer, camera_matrices
from openhelix.benchmarks.calvin.dataset import CAMERAS_FILE, DatasetWriter, cameras_bytes
from openhelix.benchmarks.calvin.demonstrations import Demonstration
from openhelix.benchmarks.calvin.frames import (
    MOST_RANDOM_UNITS,
    FramesConfig,
    cache_index,
    draw_for_system2,
    draw_touch,
    draw_unit,
    keyposes,
)
from openhelix.benchmarks.calvin.physics import euler_from_quaternion
from openhelix.benchmarks.calvin.scene import SCENES, get_scene, scene_names, written
from openhelix.benchmarks.calvin.tasks import TASK_NAMES, get_task
from openhelix.benchmarks.calvin.units import collect_unit, read_unit, unit_bytes
from openhelix.runtime.cli.arguments import Options, parse
from openhelix.runtime.core.config import ConfigError, read_settings
from openhelix.runtime.core.files import BadFile, read_json, replace_file
from openhelix.runtime.core.interfaces import F64
from openhelix.runtime.core.output import answer
from openhelix.runtime.core.paths import cache_folder
from openhelix.runtime.launch.processes import pool_of
from openhelix.system1.cache import frames_digest

# -- What a collection is: one frozen record, from YAML, overrides or the command line -

VERSION = 1  # of what the experts do and of what is stored; data of another is not mixed
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class CollectConfig(BaseModel):
    """One collection.

    Attributes:
        out: folder; None for `data/demonstrations_<scenes>` in the cache.
        scenes: letters out of ABCD, or `R17`, `random:0-199`, or several with commas.
        tasks: names; all 34 by default.
        per_task: demonstrations per task and scene.
        seed: decides everything else.
        disturbed: share of demonstrations in which the arm is pushed once.
        chain: at most so many tasks without a reset.
        jobs: processes.
        format: "states" keeps states and actions, from which `system1`'s training data is
            drawn; "calvin" writes CALVIN's layout, with rendered frames.
        compress: CALVIN's layout only: smaller files, slower.
        frames: what is drawn for training (format "states"); `frames.every=0` draws nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    out: Path | None = None
    scenes: str = "ABC"
    tasks: tuple[str, ...] = TASK_NAMES
    per_task: Count = 100
    seed: Annotated[int, Field(ge=0)] = 0
    disturbed: Share = 0.4
    chain: Count = 5
    jobs: Count = 2
    format: Literal["states", "calvin"] = "states"
    compress: bool = True
    frames: FramesConfig = FramesConfig()

    @field_validator("scenes")
    @classmethod
    def _known_scenes(cls, value: str) -> str:
        return written(scene_names(value))

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("names no task")
        return tuple(get_task(task).name for task in value)

    @model_validator(mode="after")
    def _room_for_units(self) -> CollectConfig:
        generated = any(name not in SCENES for name in self.scene_list)
        if generated and self.per_task > MOST_RANDOM_UNITS:
            raise ValueError(
                f"per_task: {self.per_task} of a generated scene; at most {MOST_RANDOM_UNITS}, "
                "more data comes from more scenes"
            )
        return self

    @property
    def scene_list(self) -> tuple[str, ...]:
        """The scenes by name."""
        return scene_names(self.scenes)

    @property
    def folder(self) -> Path:
        """Where the collection goes."""
        return self.out or cache_folder() / "data" / f"demonstrations_{self.scenes}"

    def identity(self) -> dict[str, Any]:
        """What must agree for a folder to be continued."""
        keep = ("scenes", "tasks", "seed", "disturbed", "chain", "format")
        dumped = self.model_dump(mode="json")
        found = {"version": VERSION, **{key: dumped[key] for key in keep}}
        generated = [repr(get_scene(name)) for name in self.scene_list if name not in SCENES]
        if generated:  # what their numbers stand for may change with the project
            found["generated"] = hashlib.sha256("".join(generated).encode()).hexdigest()[:16]
        return found


# -- What the parts share: where units are, and the pool of processes ------------------

UNITS = "units"
Report = Callable[[int, int, str], None]  # done, to do, what the last one was


def unit_path(folder: Path, scene: str, number: int) -> Path:
    """Where a unit is kept."""
    return folder / UNITS / f"{scene}_{number:05d}.npz"


def pooled(
    function: Callable[..., int], work: Sequence[tuple[Any, ...]], jobs: int
) -> Iterator[int]:
    """Run `function` over `work` in processes of its own; yields results as they come."""
    if jobs == 1:
        for item in work:
            yield function(*item)
        return
    with pool_of(min(jobs, max(len(work), 1))) as pool:
        futures = [pool.submit(function, *item) for item in work]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# -- Frames: the second half of a collection, drawn unit by unit -----------------------

FRAMES, SYSTEM2, ABOUT = "frames", "system2", "moments.json"
INDEX_EVERY = 10  # units between two writings of the index while frames are drawn
FRAMES_EACH = 10  # moments of a demonstration with every=4, for the estimate of disk


def draw(config: CollectConfig, report: Report | None = None) -> dict[str, Any]:
    """Draw the training frames that are missing; returns what the card says of them.

    Raises:
        ConfigError: it would take more disk than allowed or free, or the folder's frames
            were drawn with other settings.
    """
    root, settings = config.folder, config.frames
    folder, begun = root / FRAMES, time.monotonic()
    units = [unit_path(root, s, n) for n in range(config.per_task) for s in config.scene_list]
    units = [unit for unit in units if unit.exists()]
    todo = [u for u in units if not shard_path(u).exists()]
    more = len(todo) * len(config.tasks) * FRAMES_EACH * 4 // settings.every
    check_frames_folder(folder, settings, more * settings.bytes_per_frame())
    if settings.system2_px:
        _check_system2_folder(config)
    todo = [u for u in units if not drawn(u, settings)]
    notes = {"collection": root.name, "moments": settings.moments()}
    text = settings.model_dump_json()
    work: list[tuple[Any, ...]] = [(str(unit), text) for unit in todo]
    for done, count in enumerate(pooled(write_unit_frames, work, config.jobs), 1):
        if done % INDEX_EVERY == 0:  # what is there can be trained on meanwhile
            index = cache_index(_shards(units, settings), notes, settings.tactile)
            replace_file(folder / "cache.json", index)
        if report is not None:
            report(done, len(todo), f"{count} frames")
    shards = _shards(units, settings)
    replace_file(folder / "cache.json", cache_index(shards, notes, settings.tactile))
    return {
        "frames": sum(int(str(shard["frames"])) for shard in shards),
        "frames_bytes": sum(f.stat().st_size for f in folder.rglob("*.safetensors")),
        "frames_files": len(shards),
        "frames_sha256": frames_digest(folder, shards),
        "frames_settings": settings.model_dump(mode="json"),
        "frames_wall_s": round(time.monotonic() - begun, 1),
    }


def _check_system2_folder(config: CollectConfig) -> None:
    """Make the folder of System 2's images, or refuse one of another size."""
    folder = config.folder / FRAMES / SYSTEM2
    sizes = folder / "size.json"
    if sizes.exists() and sizes.read_text().strip() != str(config.frames.system2_px):
        raise ConfigError(f"frames.system2_px: {folder} was drawn with another size")
    replace_file(sizes, json.dumps(config.frames.system2_px).encode())


def _shards(units: list[Path], settings: FramesConfig) -> list[dict[str, Any]]:
    """The shards that are complete, for the index."""
    paths = [shard_path(unit) for unit in sorted(units) if drawn(unit, settings)]
    return [{"file": path.name, "frames": frames_in(path)} for path in paths]


def drawn(unit: Path, settings: FramesConfig) -> bool:
    """Whether all that is wanted of a unit has been drawn."""
    shard = shard_path(unit)
    wanted = {SYSTEM2: settings.system2_px > 0, TACTILE: settings.tactile}
    beside = [shard.parent / name / shard.name for name, asked in wanted.items() if asked]
    return all(path.exists() for path in (shard, *beside))


def shard_path(unit: Path) -> Path:
    """Where the frames of a unit are kept."""
    return unit.parent.parent / FRAMES / f"{unit.stem}.safetensors"


def frames_in(path: Path, name: str = "task") -> int:
    """How many rows a file holds."""
    with safe_open(path, "np") as stored:
        return int(stored.get_slice(name).get_shape()[0])


def check_frames_folder(folder: Path, settings: FramesConfig, more: int) -> None:
    """Make the frames folder, or refuse before anything is written.

    Args:
        folder: of the frames.
        settings: of the frames.
        more: bytes that are to come, estimated.
    """
    about = folder / ABOUT
    if about.exists() and read_json(about) != settings.moments():
        raise ConfigError(
            f"frames: {folder} was drawn with other settings; remove it or use the same"
        )
    there = sum(f.stat().st_size for f in folder.rglob("*.safetensors")) if folder.exists() else 0
    if there + more > settings.max_gb * 1e9:
        raise ConfigError(
            f"frames.max_gb: {(there + more) / 1e9:.1f} GB are needed, {settings.max_gb} allowed"
        )
    free = shutil.disk_usage(folder.parent).free
    if more > free:
        raise ConfigError(f"out: {more / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free")
    replace_file(about, json.dumps(settings.moments(), indent=1).encode())
    for torn in folder.rglob(".*.part"):
        torn.unlink()


def write_unit_frames(unit: str, settings: str) -> int:
    """Draw what is missing of one unit's frames and of what lies beside; returns how many."""
    torch.set_num_threads(1)
    path, config = Path(unit), FramesConfig.model_validate_json(settings)
    shard = shard_path(path)
    images = shard.parent / SYSTEM2 / shard.name
    wants_images = config.system2_px > 0 and not images.exists()
    if not shard.exists():
        seen: list[torch.Tensor] | None = [] if wants_images else None
        replace_file(shard, draw_unit(path, config, seen))
        if seen is not None:
            replace_file(images, save({"rgb": torch.stack(seen)}))
    elif wants_images:
        replace_file(images, draw_for_system2(path, config))
    felt = shard.parent / TACTILE / shard.name
    if config.tactile and not felt.exists():
        replace_file(felt, draw_touch(path, config))
    return frames_in(shard)


SETTINGS, CARD = "collection.json", "card.json"


def open_folder(config: CollectConfig) -> Path:
    """Make the collection's folder, or check that it is one that may be continued.

    Raises:
        ConfigError: the folder holds other data, or was begun with other settings.
    """
    folder, settings = config.folder, config.folder / SETTINGS
    if settings.exists():
        try:
            before = read_json(settings)
        except BadFile:
            before = {}
        for key, value in json.loads(json.dumps(config.identity())).items():
            if before.get(key) != value:
                was = "others" if isinstance(value, list) else repr(before.get(key))
                raise ConfigError(
                    f"{key}: {folder} was begun with {was}; choose another folder with out=DIR"
                )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"out: {folder} holds other data; choose an empty folder")
    else:
        replace_file(settings, json.dumps(config.identity(), indent=1).encode())
    for torn in folder.glob(f"{UNITS}/.*.part"):
        torn.unlink()
    return folder


def missing_units(config: CollectConfig, folder: Path) -> list[tuple[str, int]]:
    """The units still to do, scenes in turn, so that an unfinished collection is balanced."""
    wanted = [(scene, n) for n in range(config.per_task) for scene in config.scene_list]
    return [(s, n) for s, n in wanted if not unit_path(folder, s, n).exists()]


def write_unit(folder: str, scene: str, number: int, identity: dict[str, Any]) -> int:
    """Collect one unit into its file; returns how many demonstrations it has."""
    unit = collect_unit(
        scene, number, identity["tasks"], identity["seed"], identity["disturbed"], identity["chain"]
    )
    replace_file(unit_path(Path(folder), scene, number), unit_bytes(unit))
    return len(unit.demonstrations)


def collect(config: CollectConfig, report: Report | None = None) -> dict[str, Any]:
    """Collect what is missing; return the card.

    Args:
        config: what to collect.
        report: told of the progress.

    Raises:
        ConfigError: the folder cannot be used.
    """
    folder = open_folder(config)
    todo = missing_units(config, folder)
    identity, begun = config.identity(), time.monotonic()
    work = [(str(folder), scene, number, identity) for scene, number in todo]
    for done, count in enumerate(pooled(write_unit, work, config.jobs), 1):
        if report is not None:
            report(done, len(todo), f"{count} demonstrations")
    card = make_card(folder, identity)
    card["wall_s"] = round(time.monotonic() - begun, 1)
    card["new_units"] = len(todo)
    replace_file(folder / CARD, json.dumps(card, indent=1).encode())
    return card


def make_card(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What a collection holds, from its files."""
    counts, tried, failed, no_start = (Counter[str]() for _ in range(4))
    steps: dict[str, list[int]] = {}
    digests: dict[str, str] = {}
    frames = size = 0
    for path in sorted((folder / UNITS).glob("*.npz")):
        about, _ = read_unit(path)
        data = path.read_bytes()
        digests[path.name], size = hashlib.sha256(data).hexdigest(), size + len(data)
        for row in about["demonstrations"]:
            counts[f"{about['scene']}/{row['task']}"] += 1
            steps.setdefault(row["task"], []).append(row["success_step"])
            frames += row["steps"]
        for total, part in ((tried, "tried"), (failed, "failed"), (no_start, "no_start")):
            total.update(about[part])
    whole = hashlib.sha256("".join(digests[n] for n in sorted(digests)).encode()).hexdigest()
    return {
        "what": "demonstrations of CALVIN's 34 tasks by scripted experts in PlayTable",
        "settings": identity,
        "demonstrations": sum(counts.values()),
        "steps": frames,
        "hours_of_play": round(frames / 30 / 3600, 2),
        "bytes": size,
        "expert_success": round(1 - sum(failed.values()) / max(sum(tried.values()), 1), 4),
        "by_scene_and_task": dict(sorted(counts.items())),
        "tried": dict(sorted(tried.items())),
        "failed": dict(sorted(failed.items())),
        "no_start": dict(sorted(no_start.items())),
        "median_steps": {t: float(np.median(s)) for t, s in sorted(steps.items())},
        "sha256": whole,
        "files": digests,
    }


def demonstrations(folder: Path | str) -> Iterator[Demonstration]:
    """All demonstrations of a collection, in the order of its files.

    Raises:
        ValueError: the folder is no collection, or a file is damaged.
    """
    root = Path(folder)
    if not (root / SETTINGS).exists():
        raise ValueError(f"{root}: no {SETTINGS} here, so no collection of demonstrations")
    for path in sorted((root / UNITS).glob("*.npz")):
        yield from read_unit(path)[1]


def main(argv: Sequence[str]) -> int:
    """Collect demonstrations and frames for training.

    Raises:
        ConfigError: bad input, in one line; nothing was written.
    """
    options, overrides = parse("collect", Options, argv, __doc__ or "", CollectConfig)
    config = read_settings(CollectConfig, options.config, overrides)
    begun = time.monotonic()

    def report(done: int, total: int, what: str) -> None:
        left = (time.monotonic() - begun) / done * (total - done)
        sys.stderr.write(f"{done} of {total}: {what}, {left:.0f} s to go\n")

    if config.format == "calvin":
        card = export_calvin(config, report)
    else:
        card = collect(config, report)
        if config.frames.every:
            begun = time.monotonic()
            card |= draw(config, report)
            replace_file(config.folder / CARD, json.dumps(card, indent=1).encode())
    brief = {k: v for k, v in card.items() if k != "files"} | {"folder": str(config.folder)}
    answer(json.dumps(brief, indent=None if options.as_json else 1))
    return 0


# -- A collection in CALVIN's layout: the same demonstrations, drawn frame by frame ----
#
# States are collected first (that part is small and is kept beside the frames), then rendered
# in a fixed order, so that a killed export goes on where the last whole episode ended. Scene D
# beside other scenes becomes the `validation` split, as in CALVIN's ABC->D.


def robot_obs(demonstration: Demonstration, step: int) -> F64:
    """calvin_env's (15,) at a step of a demonstration."""
    p, state = demonstration.proprio[step].astype(np.float64), demonstration.states[step]
    gripper = 1.0 if p[8] > 0.5 else -1.0
    euler = euler_from_quaternion(p[3:7])
    return np.array([*p[:3], *euler, p[7], *state[:7].astype(np.float64), gripper])


def scene_obs(demonstration: Demonstration, step: int) -> F64:
    """calvin_env's (24,) at a step of a demonstration."""
    state = demonstration.states[step].astype(np.float64)
    values = [*state[9:15]]
    for block in state[15:].reshape(3, 7):
        values += [*block[:3], *euler_from_quaternion(block[3:])]
    return np.array(values)


def split_of(scene: str, scenes: Sequence[str]) -> str:
    """CALVIN's split for a scene: D is for validation where others are trained on."""
    return "validation" if scene == "D" and len(scenes) > 1 else "training"


def export_calvin(config: CollectConfig, report: Report | None = None) -> dict[str, Any]:
    """Collect and render; return the card.

    Raises:
        ConfigError: the folder cannot be used.
    """
    folder = open_folder(config)
    states = folder / "states"
    card = collect(config.model_copy(update={"out": states, "format": "states"}), report)
    found = [d for scene in config.scene_list for d in _of_scene(states, scene)]
    written: dict[str, int] = {}
    for split in sorted({split_of(s, config.scene_list) for s in config.scene_list}):
        part = [d for d in found if split_of(d.scene, config.scene_list) == split]
        written[split] = _write_split(folder / split, part, config.compress, report)
    card |= {"frames": written, "format": "calvin"}
    replace_file(folder / CARD, json.dumps(card, indent=1).encode())
    return card


def _of_scene(states: Path, scene: str) -> Iterator[Demonstration]:
    return (d for d in demonstrations(states) if d.scene == scene)


def _write_split(
    folder: Path, found: list[Demonstration], compress: bool, report: Report | None
) -> int:
    """Write what is not there yet; returns the number of frames of the split."""
    renderer: SceneRenderer | None = None
    with DatasetWriter(folder, compress=compress) as writer:
        for i, demonstration in enumerate(found):
            if i < writer.n_episodes:
                continue
            if renderer is None or renderer.scene.name != demonstration.scene:
                renderer = SceneRenderer(demonstration.scene)
            with writer.episode(demonstration.scene) as episode:
                for step in range(len(demonstration.states)):
                    episode.add(_observation(demonstration, step, renderer))
                last = min(demonstration.steps, 63)
                episode.annotate(0, last, demonstration.task, demonstration.instruction)
            if report is not None:
                report(i + 1, len(found), "episodes")
        _write_keyposes(folder, found)
        matrices = {d.scene: camera_matrices(get_scene(d.scene)) for d in found}
        replace_file(folder / CAMERAS_FILE, cameras_bytes(matrices))
        return writer.n_frames


def _observation(
    demonstration: Demonstration, step: int, renderer: SceneRenderer
) -> dict[str, Any]:
    frames = renderer.render(demonstration.states[step].astype(np.float64))
    return {
        "rgb_obs": {f"rgb_{name}": frame.rgb for name, frame in frames.items()},
        "depth_obs": {f"depth_{name}": frame.depth for name, frame in frames.items()},
        "pose_obs": {"pose_gripper": frames["gripper"].T_world_cam},
        "robot_obs": robot_obs(demonstration, step),
        "scene_obs": scene_obs(demonstration, step),
    }


def _write_keyposes(folder: Path, found: list[Demonstration]) -> None:
    """`keyposes.json`: per episode, the frames (from the episode's first) of its keyposes."""
    rows = [keyposes(d.proprio[:, :7], d.proprio[:, 8] > 0.5).tolist() for d in found]
    replace_file(folder / "keyposes.json", json.dumps(rows).encode())
