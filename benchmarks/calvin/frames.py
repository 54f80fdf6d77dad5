"""Training frames: the moments of demonstrations that System 1 learns from, drawn and stored.

Only moments that training reads are drawn, at the size on which the policy's encoder works,
each chain of demonstrations in a look of its own (woods, light, tiles, sensor noise, small
errors of the cameras' poses). The result is a training cache as `openhelix.system1.cache` describes
it, one shard a unit of the collection, whole or not at all, and an index of those that are
complete, written anew as they come.

What the cache leaves open is decided here: a pushed arm's moments keep the targets up to the
one sent when the push began (later ones answer to something that the picture does not show)
and are left out when fewer than four remain.

System 2's images are drawn apart, from the same moments in the same looks: `rgb` (N, P, P, 3)
uint8 of the static camera, in `system2/` under the same file names. So is what the fingertips feel,
in `tactile/`.
"""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save
from scipy.spatial.transform import Rotation
from torch import Tensor

from openhelix.benchmarks.calvin.appearance import Appearance
from openhelix.benchmarks.calvin.cameras import PAD_PIXELS, TACTILE, SceneRenderer
from openhelix.benchmarks.calvin.demonstrations import Demonstration
from openhelix.benchmarks.calvin.phrases import training
from openhelix.benchmarks.calvin.scene import SCENES
from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.benchmarks.calvin.units import read_unit
from openhelix.system1.cache import Columns, chunk_targets, index_bytes, pictures, shard_bytes
from openhelix.system1.config import CameraConfig, PolicyConfig, small

# -- Keyposes: the few frames of a demonstration between which a path is mere travel ---
#
# As 3D Diffuser Actor cuts CALVIN's play into trajectories: where the motion changes most
# abruptly, around every change of the gripper, and at the end.

F64 = npt.NDArray[np.float64]
TOP_FRACTION = 0.2
MIN_GAP = 5
MIN_CHANGE = 0.01  # control steps per step; below is rounding, not motion
# A full control step of translation and one of rotation weigh the same.
STEP_M, STEP_RAD = 0.02, 0.05


def accelerations(poses: F64) -> F64:
    """How abruptly the motion changes at each frame, in control steps.

    Args:
        poses: (T, 7) TCP poses, position m and quaternion xyzw.

    Returns:
        (T,) norm of the change of velocity; 0 at both ends.
    """
    result = np.zeros(len(poses))
    if len(poses) < 3:
        return result
    turns = Rotation.from_quat(poses[:, 3:])
    linear = np.diff(poses[:, :3], axis=0) / STEP_M
    angular = (turns[1:] * turns[:-1].inv()).as_rotvec() / STEP_RAD
    velocity = np.concatenate([linear, angular], axis=1)
    result[1:-1] = np.linalg.norm(np.diff(velocity, axis=0), axis=1)
    return result


def _peaks(abrupt: F64) -> list[int]:
    """Local maxima in the top fifth, the strongest first served, `MIN_GAP` frames apart."""
    inner = abrupt[1:-1]
    peaks = 1 + np.flatnonzero((inner > abrupt[:-2]) & (inner >= abrupt[2:]))
    top = np.sort(abrupt)[::-1][max(int(len(abrupt) * TOP_FRACTION), 1) - 1]
    floor = max(float(top), MIN_CHANGE)
    kept: list[int] = []
    for peak in peaks[np.argsort(-abrupt[peaks], kind="stable")]:
        if abrupt[peak] >= floor and all(abs(int(peak) - other) >= MIN_GAP for other in kept):
            kept.append(int(peak))
    return kept


def keyposes(poses: npt.ArrayLike, gripper: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Indices of the keyposes of one demonstration, ascending.

    Args:
        poses: (T, 7) TCP poses, position m and quaternion xyzw.
        gripper: (T,) commanded gripper state; only its changes matter.

    Returns:
        Local maxima of acceleration among the top 20 %, at least 5 frames apart; every frame
        in which the gripper changed and the one before; the last frame. Never frame 0, from
        which a demonstration starts, unless it is the only one.

    Raises:
        ValueError: Shapes do not fit, or a value is not finite.
    """
    rows, states = np.asarray(poses, dtype=np.float64), np.asarray(gripper)
    if rows.ndim != 2 or rows.shape[1] != 7 or states.shape != (len(rows),) or not len(rows):
        raise ValueError(f"poses: shapes {rows.shape}, {states.shape}; want (T, 7), (T,), T >= 1")
    if not np.isfinite(rows).all():
        raise ValueError("poses: contain NaN or infinity")
    last = len(rows) - 1
    changes = 1 + np.flatnonzero(states[1:] != states[:-1])
    found = {*_peaks(accelerations(rows)), *changes.tolist(), *(changes - 1).tolist()}
    return np.array([*sorted(found - {0, last}), last], dtype=np.int64)


F32 = npt.NDArray[np.float32]

KEYPOSE_AHEAD = 4
MIN_ROWS = 4  # a moment with fewer usable targets teaches too little for its picture
TOUCH = CameraConfig(TACTILE, PAD_PIXELS, 2 * PAD_PIXELS, PAD_PIXELS, 2 * PAD_PIXELS)
MOST_UNITS, MOST_DEMONSTRATIONS = 100_000, 100  # room in an episode's number
MOST_RANDOM_UNITS = 100  # of each generated scene


class FramesConfig(BaseModel):
    """What is drawn.

    Attributes:
        every: draw every so many-th step; 0 draws nothing.
        near_grip: also draw steps this near to a change of the gripper (0 for none).
        plain: share of looks that are the scene's own.
        system2_px: size of System 2's images; 0 draws none.
        tactile: also draw what the fingertips feel, in `tactile/` under the same file names; can be
            drawn later for frames that are there.
        seed: decides moments and looks.
        max_gb: refuse to start what would take more disk than this.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    every: Annotated[int, Field(ge=0)] = 4
    near_grip: Annotated[int, Field(ge=0)] = 1
    plain: Annotated[float, Field(ge=0, le=1)] = 0.25
    system2_px: Annotated[int, Field(ge=0, le=200)] = 0
    tactile: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    max_gb: Annotated[float, Field(gt=0)] = 16.0

    def moments(self) -> dict[str, Any]:
        """What must agree for two drawings to show the same moments in the same looks."""
        return self.model_dump(include={"every", "near_grip", "plain", "seed"})

    def bytes_per_frame(self) -> int:
        """Disk that one moment takes."""
        pixels = sum(c.work_height * c.work_width for c in small().cameras)
        felt = 5 * TOUCH.work_height * TOUCH.work_width if self.tactile else 0
        return 5 * pixels + 3 * self.system2_px**2 + felt + 1000


@cache
def instructions() -> tuple[str, ...]:
    """All training sentences; a frame's `instruction` is an index into this."""
    return tuple(sentence for task in TASK_NAMES for sentence in training()[task])


def chosen_steps(
    demonstration: Demonstration, config: FramesConfig, rng: np.random.Generator
) -> list[int]:
    """The moments of a demonstration to draw, ascending."""
    count = len(demonstration.targets)
    wanted = set(range(int(rng.integers(config.every)), count, config.every))
    openness = demonstration.targets[:, 7]
    for change in np.flatnonzero(openness[1:] != openness[:-1]) + 1:
        near = range(change - config.near_grip, change + config.near_grip)
        wanted |= {int(step) for step in near if 0 <= step < count}
    return [s for s in sorted(wanted) if usable_rows(demonstration, s) >= MIN_ROWS]


def usable_rows(demonstration: Demonstration, step: int, horizon: int = 16) -> int:
    """How many targets from `step` on were meant for what came of the ones before."""
    clean = demonstration.clean[step : step + horizon]
    pushed = np.flatnonzero(~clean)
    return int(pushed[0]) + 1 if len(pushed) else len(clean)


def look_of(scene: str, config: FramesConfig, rng: np.random.Generator) -> Appearance:
    """A look for one chain."""
    if rng.uniform() < config.plain:
        return Appearance.of(scene)
    return Appearance.random(int(rng.integers(1 << 31)), scene)


def first_episode(scene: str, number: int) -> int:
    """The number of the first episode of a unit; 31 bits hold every scene's."""
    if scene in SCENES:
        unit = sorted(SCENES).index(scene) * MOST_UNITS + number
    else:
        unit = len(SCENES) * MOST_UNITS + int(scene[1:]) * MOST_RANDOM_UNITS + number
    return unit * MOST_DEMONSTRATIONS


def moments_of(path: Path, config: FramesConfig) -> list[tuple[Appearance, int, int, list[int]]]:
    """Per demonstration of a unit: its look, its episode, its first step, the steps to draw.

    A demonstration that begins in the middle of somebody else's attempt says so: `rollout` is
    the attempt, which is one episode, `at` the step of it, `draw` how many of its own steps
    belong to that.
    """
    about, found = read_unit(path)
    scene, number = about["scene"], about["number"]
    rng = np.random.default_rng([zlib.crc32(f"frames {scene}".encode()), config.seed, number])
    first = first_episode(scene, number)
    look, out = Appearance.of(scene), []
    for index, (row, demonstration) in enumerate(zip(about["demonstrations"], found, strict=True)):
        if row["chain"] == 0:
            look = look_of(scene, config, rng)
        steps = chosen_steps(demonstration, config, rng)
        if "rollout" in row:
            steps = [
                s for s in range(0, row["draw"], config.every) if s < len(demonstration.targets)
            ]
        out.append((look, first + row.get("rollout", index), row.get("at", 0), steps))
    return out


def draw_unit(path: Path, config: FramesConfig, images: list[Tensor] | None = None) -> bytes:
    """Draw the moments of one unit file; returns the content of its shard.

    Args:
        path: of the unit.
        config: what to draw.
        images: is given System 2's images of the same moments, row by row.
    """
    policy = small()
    parts: list[Columns] = []
    about, found = read_unit(path)
    renderer = SceneRenderer(about["scene"], [c.name for c in policy.cameras])
    moments = moments_of(path, config)
    for demonstration, (look, episode, at, steps) in zip(found, moments, strict=True):
        if not steps:
            continue
        if look is not renderer.appearance:
            renderer.set_appearance(look)
        frames = [renderer.render(demonstration.states[s].astype(np.float64)) for s in steps]
        if images is not None:
            images += [resized(f["static"].rgb, config.system2_px) for f in frames]
        task = TASK_NAMES.index(demonstration.task)
        said = instructions().index(demonstration.instruction)
        columns = labels(demonstration, episode, steps, policy, task, said, at)
        for camera in policy.cameras:
            columns |= pictures([f[camera.name] for f in frames], camera)
        parts.append(columns)
    notes = {"scene": about["scene"], "settings": config.model_dump_json()}
    return shard_bytes(parts, policy, len(TASK_NAMES), len(instructions()), notes)


def draw_for_system2(path: Path, config: FramesConfig) -> bytes:
    """System 2's images of the same moments, row by row."""
    about, found = read_unit(path)
    renderer = SceneRenderer(about["scene"], ["static"])
    images = []
    for demonstration, (look, _, _, steps) in zip(found, moments_of(path, config), strict=True):
        if look is not renderer.appearance:
            renderer.set_appearance(look)
        for step in steps:
            frame = renderer.render(demonstration.states[step].astype(np.float64))["static"]
            images.append(resized(frame.rgb, config.system2_px))
    return save({"rgb": torch.stack(images)})


def draw_touch(path: Path, config: FramesConfig) -> bytes:
    """What the fingertips feel in the same moments, row by row."""
    about, found = read_unit(path)
    renderer = SceneRenderer(about["scene"], [TACTILE])
    felt = [
        renderer.render(demonstration.states[step].astype(np.float64))[TACTILE]
        for demonstration, (_, _, _, steps) in zip(found, moments_of(path, config), strict=True)
        for step in steps
    ]
    return save({name: part.contiguous() for name, part in pictures(felt, TOUCH).items()})


def cache_index(
    shards: list[dict[str, Any]], notes: dict[str, Any], tactile: bool = False
) -> bytes:
    """The content of `cache.json` for shards [{"file", "frames"}] of a collection."""
    policy = small()
    if tactile:
        felt = ("rgb", "depth", "tactile", "proprio")
        policy = small(cameras=(*policy.cameras, TOUCH), sensors=felt)
    return index_bytes(policy, TASK_NAMES, instructions(), shards, notes)


def resized(rgb: Any, size: int) -> Tensor:
    """An image (H, W, 3) u8 as System 2's cache keeps it, (size, size, 3)."""
    image = torch.from_numpy(rgb).permute(2, 0, 1)[None].float()
    small_ = torch.nn.functional.interpolate(
        image, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return small_[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()


def next_keyposes(demonstration: Demonstration, steps: list[int]) -> tuple[F32, F32]:
    """Where the hand goes from some steps of a demonstration; see `openhelix.system1.cache`.

    The next keypose is at least `KEYPOSE_AHEAD` steps away: one that is all but reached tells
    nothing of what comes then.

    Returns:
        (N, 2, 7) TCP poses and (N, 2) openness commanded from there on.
    """
    openness, done = demonstration.targets[:, 7], max(demonstration.steps, 0)
    ends = min(done + 1, len(openness) - 1)
    changes = [int(s) for s in np.flatnonzero(openness[1:] != openness[:-1]) + 1 if s <= ends]
    turns = [int(s) for s in keyposes(demonstration.proprio[: ends + 1, :7], openness[: ends + 1])]
    at = np.array(
        [
            (
                next((t for t in turns if t >= step + KEYPOSE_AHEAD), ends),
                next((c for c in changes if c >= step), ends),
            )
            for step in steps
        ]
    )
    return demonstration.proprio[at, :7], openness[at]


def labels(
    demonstration: Demonstration,
    episode: int,
    steps: list[int],
    policy: PolicyConfig,
    task: int,
    said: int,
    first: int = 0,
) -> Columns:
    """What belongs to the pictures of some steps of a demonstration.

    Args:
        demonstration: whose states need not be known.
        episode: its number.
        steps: of the pictures, ascending.
        policy: which horizon and history.
        task, said: its task's and its instruction's place in the index.
        first: the environment step at which it began.
    """
    count = len(steps)
    usable = [usable_rows(demonstration, step, policy.horizon) for step in steps]
    past = np.array(steps)[:, None] + np.arange(1 - policy.nhist, 1)
    poses, opened = next_keyposes(demonstration, steps)
    at = torch.tensor(steps, dtype=torch.int32)
    return {
        "proprio": torch.from_numpy(demonstration.proprio[np.maximum(past, 0)]),
        **chunk_targets(demonstration.targets, steps, policy.horizon, usable),
        "keypose_pose": torch.from_numpy(poses),
        "keypose_open": torch.from_numpy(opened),
        "task": torch.full((count,), task, dtype=torch.int32),
        "instruction": torch.full((count,), said, dtype=torch.int32),
        "episode": torch.full((count,), episode, dtype=torch.int32),
        "step": at + first,
        "steps_left": demonstration.steps - at,
    }
