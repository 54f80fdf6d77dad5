"""A collection in CALVIN's layout: the same demonstrations, drawn frame by frame.

States are collected first (that part is small and is kept beside the frames), then rendered
in a fixed order, so that a killed export goes on where the last whole episode ended. Scene D
beside other scenes becomes the `validation` split, as in CALVIN's ABC->D.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.playtable.annotations import replace_file
from benchmarks.playtable.cameras import SceneRenderer
from benchmarks.playtable.collect import (
    CARD,
    collect,
    demonstrations,
    open_folder,
)
from benchmarks.playtable.collect_config import CollectConfig
from benchmarks.playtable.collect_pool import Report
from benchmarks.playtable.dataset import DatasetWriter
from benchmarks.playtable.demonstrations import Demonstration
from benchmarks.playtable.keyposes import keyposes
from benchmarks.playtable.physics import euler_from_quaternion
from runtime.types import F64


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


def split_of(scene: str, scenes: str) -> str:
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
    found = [d for scene in config.scenes for d in _of_scene(states, scene)]
    written: dict[str, int] = {}
    for split in sorted({split_of(s, config.scenes) for s in config.scenes}):
        part = [d for d in found if split_of(d.scene, config.scenes) == split]
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
        return writer.n_frames


def _observation(
    demonstration: Demonstration, step: int, renderer: SceneRenderer
) -> dict[str, Any]:
    frames = renderer.render(demonstration.states[step].astype(np.float64))
    return {
        "rgb_obs": {f"rgb_{name}": frame.rgb for name, frame in frames.items()},
        "depth_obs": {f"depth_{name}": frame.depth for name, frame in frames.items()},
        "robot_obs": robot_obs(demonstration, step),
        "scene_obs": scene_obs(demonstration, step),
    }


def _write_keyposes(folder: Path, found: list[Demonstration]) -> None:
    """`keyposes.json`: per episode, the frames (from the episode's first) of its keyposes."""
    rows = [keyposes(d.proprio[:, :7], d.proprio[:, 8] > 0.5).tolist() for d in found]
    replace_file(folder / "keyposes.json", json.dumps(rows).encode())
