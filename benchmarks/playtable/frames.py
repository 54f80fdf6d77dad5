"""Training frames: the moments of demonstrations that System 1 learns from, drawn and stored.

Only moments that training reads are drawn, at the size on which the policy's encoder works,
each chain of demonstrations in a look of its own (woods, light, tiles, sensor noise, small
errors of the cameras' poses). One file a unit of the collection, whole or not at all:
`frames/<scene>_<number>.safetensors` with N samples.

Tensors (W is the world frame; t the moment shown):
    rgb_static (N, 100, 100, 3) u8, rgb_gripper (N, 84, 84, 3) u8
    depth_static, depth_gripper (N, H, W) u16: tenths of a millimetre along the optical axis,
        0 where there is none
    K_static, K_gripper (3, 3) f32: intrinsics at the stored size, pixel centres at +0.5
    T_static, T_gripper (N, 4, 4) f32: camera to W, OpenCV axes
    proprio (N, 9) f32: TCP position m, quaternion xyzw, gripper width m, openness commanded
    targets (N, 16, 8) f32: row i is the target sent at t + i/30 s, to be reached at
        t + (i+1)/30 s: position m, quaternion xyzw, openness 0 or 1
    mask (N, 16) bool: False past the end, and from the row after a push on the arm began
    task (N,) i64: index into `tasks.TASK_NAMES`
    demonstration, step (N,) i64: where in the unit the moment is; `steps_left` (N,) i64 to
        the first success
    rgb_system2 (N, P, P, 3) u8: the static camera as System 2 sees it (only with
        `system2_px`)
Metadata: `scene`, `number`, `instructions` (JSON list by demonstration), `settings` (JSON).
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save
from torch import Tensor

from benchmarks.playtable.appearance import Appearance
from benchmarks.playtable.cameras import RenderedFrame, SceneRenderer
from benchmarks.playtable.collect_unit import read_unit
from benchmarks.playtable.demonstrations import Demonstration
from benchmarks.playtable.tasks import TASK_NAMES
from system1.points import shrink

HORIZON = 16
DEPTH_UNIT_M = 1e-4
FARTHEST_M = 6.5
MIN_ROWS = 4  # a moment with fewer usable targets teaches too little for its picture
FORMAT = 1


class FramesConfig(BaseModel):
    """What is drawn.

    Attributes:
        every: draw every so many-th step; 0 draws nothing.
        near_grip: also draw steps this near to a change of the gripper (0 for none).
        plain: share of looks that are the scene's own.
        static_px, gripper_px: stored image sizes.
        system2_px: size of System 2's image; 0 stores none.
        max_gb: refuse to start what would take more disk than this.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    every: Annotated[int, Field(ge=0)] = 3
    near_grip: Annotated[int, Field(ge=0)] = 2
    plain: Annotated[float, Field(ge=0, le=1)] = 0.25
    static_px: Annotated[int, Field(ge=16, le=200)] = 100
    gripper_px: Annotated[int, Field(ge=16, le=84)] = 84
    system2_px: Annotated[int, Field(ge=0, le=200)] = 0
    seed: Annotated[int, Field(ge=0)] = 0
    max_gb: Annotated[float, Field(gt=0)] = 16.0

    def bytes_per_frame(self) -> int:
        """Disk that one moment takes."""
        pixels = self.static_px**2 + self.gripper_px**2
        return 5 * pixels + 3 * self.system2_px**2 + 900


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


def usable_rows(demonstration: Demonstration, step: int) -> int:
    """How many targets from `step` on were meant for what came of the ones before."""
    clean = demonstration.clean[step : step + HORIZON]
    pushed = np.flatnonzero(~clean)
    return int(pushed[0]) + 1 if len(pushed) else len(clean)


def look_of(scene: str, config: FramesConfig, rng: np.random.Generator) -> Appearance:
    """A look for one chain."""
    if rng.uniform() < config.plain:
        return Appearance.of(scene)
    return Appearance.random(int(rng.integers(1 << 31)), scene)


def draw_unit(path: Path, config: FramesConfig) -> bytes:
    """Draw the moments of one unit file; returns the content of its frames file."""
    about, found = read_unit(path)
    scene, number = about["scene"], about["number"]
    rng = np.random.default_rng([zlib.crc32(f"frames {scene}".encode()), config.seed, number])
    renderer = SceneRenderer(scene)
    parts: dict[str, list[Tensor]] = {}
    fixed: dict[str, Tensor] = {}
    for index, (row, demonstration) in enumerate(zip(about["demonstrations"], found, strict=True)):
        if row["chain"] == 0:
            renderer.set_appearance(look_of(scene, config, rng))
        steps = chosen_steps(demonstration, config, rng)
        if not steps:
            continue
        frames = [renderer.render(demonstration.states[s].astype(np.float64)) for s in steps]
        for camera, size in (("static", config.static_px), ("gripper", config.gripper_px)):
            images, K = _pictures([f[camera] for f in frames], camera, size)
            fixed[f"K_{camera}"] = K
            _append(parts, images)
        if config.system2_px:
            _append(parts, _for_system2([f["static"] for f in frames], config.system2_px))
        _append(parts, _labels(demonstration, index, steps))
    tensors = {name: torch.cat(rows) for name, rows in parts.items()} | fixed
    instructions = [d.instruction for d in found]
    return save(
        tensors,
        {
            "format": str(FORMAT),
            "scene": scene,
            "number": str(number),
            "instructions": json.dumps(instructions),
            "settings": config.model_dump_json(),
        },
    )


def _append(parts: dict[str, list[Tensor]], rows: dict[str, Tensor]) -> None:
    for name, tensor in rows.items():
        parts.setdefault(name, []).append(tensor)


def _pictures(
    frames: list[RenderedFrame], camera: str, size: int
) -> tuple[dict[str, Tensor], Tensor]:
    """One camera's frames at the stored size, and its intrinsics there."""
    rgb = torch.from_numpy(np.stack([f.rgb for f in frames])).permute(0, 3, 1, 2).float()
    depth = torch.from_numpy(np.stack([f.depth for f in frames]))
    K = torch.as_tensor(np.stack([f.K for f in frames]), dtype=torch.float32)
    rgb, depth, K = shrink(rgb, depth, K, size, size)
    seen = torch.isfinite(depth) & (depth > 0) & (depth < FARTHEST_M)
    tenths = torch.where(seen, depth / DEPTH_UNIT_M, 0.0).round().to(torch.int32)
    poses = np.stack([f.T_world_cam for f in frames])
    images = {
        f"rgb_{camera}": rgb.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous(),
        f"depth_{camera}": tenths.to(torch.uint16),
        f"T_{camera}": torch.as_tensor(poses, dtype=torch.float32),
    }
    return images, K[0].contiguous()


def _for_system2(frames: list[RenderedFrame], size: int) -> dict[str, Tensor]:
    rgb = torch.from_numpy(np.stack([f.rgb for f in frames])).permute(0, 3, 1, 2).float()
    small = torch.nn.functional.interpolate(
        rgb, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
    image = small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return {"rgb_system2": image.contiguous()}


def _labels(demonstration: Demonstration, index: int, steps: list[int]) -> dict[str, Tensor]:
    targets = np.zeros((len(steps), HORIZON, 8), np.float32)
    mask = np.zeros((len(steps), HORIZON), bool)
    for i, step in enumerate(steps):
        rows = demonstration.targets[step : step + HORIZON]
        targets[i, : len(rows)] = rows
        targets[i, len(rows) :] = rows[-1]
        mask[i, : usable_rows(demonstration, step)] = True
    at = torch.tensor(steps)
    return {
        "targets": torch.from_numpy(targets),
        "mask": torch.from_numpy(mask),
        "proprio": torch.from_numpy(demonstration.proprio[steps]),
        "task": torch.full((len(steps),), TASK_NAMES.index(demonstration.task)),
        "demonstration": torch.full((len(steps),), index),
        "step": at,
        "steps_left": demonstration.steps - at,
    }
