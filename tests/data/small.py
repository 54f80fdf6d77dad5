"""Small datasets in CALVIN's layout, made as CALVIN's are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin import dataset as layout
from openhelix.benchmarks.calvin.dataset import Annotation, DatasetWriter, object_bytes

STATIC_PX, GRIPPER_PX = 40, 20
Words = tuple[tuple[int, int, str, str], ...]  # first and last step, task, sentence
OPEN = (0, 19, "open_drawer", "open the drawer")
LED = (10, 28, "turn_on_led", "press the button")


def observation(t: int, speed: float = 0.004) -> dict[str, Any]:
    """What an env returns at step t; the hand moves along x and turns about z, then grips."""
    robot = np.zeros(15)
    robot[:7] = 0.1 + speed * t, -0.2, 0.5, np.pi - 0.01, 0.02, 1.5 - 0.01 * t, 0.08
    robot[7:14] = 0.1 * np.arange(7)
    robot[14] = 1.0 if t < 12 else -1.0
    rng = np.random.default_rng(t)
    images = {  # squares of four pixels, which a video keeps
        f"rgb_{name}": rng.integers(0, 255, (px // 4, px // 4, 3), np.uint8)
        .repeat(4, 0)
        .repeat(4, 1)
        for name, px in (("static", STATIC_PX), ("gripper", GRIPPER_PX))
    }
    return {
        "robot_obs": robot,
        "scene_obs": np.zeros(24),
        "rgb_obs": images,
        "depth_obs": {
            "depth_static": np.full((STATIC_PX, STATIC_PX), 3.9, np.float32),
            "depth_gripper": np.full((GRIPPER_PX, GRIPPER_PX), 0.3 + t / 1000, np.float32),
        },
    }


def write_split(folder: Path, episodes: tuple[Words, ...] = ((OPEN, LED), (OPEN,))) -> Path:
    """Write a split of 30-frame episodes, as our own writer does."""
    with DatasetWriter(folder) as writer:
        for notes in episodes:
            with writer.episode("A") as episode:
                for t in range(30):
                    episode.add(observation(t))
                for first, last, task, text in notes:
                    episode.annotate(first, last, task, text)
    return folder


def as_published(folder: Path, **language: Any) -> Path:
    """Take away what only our writer leaves, so that the folder is as CALVIN's are.

    Args:
        folder: of a split that `write_split` made.
        language: fields of the annotations to change; None takes one away.
    """
    for name in (layout.LANG_TWIN, layout.EMB_TWIN, Path("scene_info.json"), Path(layout.LOG)):
        (folder / name).unlink()
    annotate(folder, **language)
    return folder


def annotate(folder: Path, notes: list[Annotation] | None = None, **language: Any) -> Path:
    """Write `auto_lang_ann.npy` anew; returns its place."""
    place = folder / layout.LANG_FILE
    content = layout.load_object_array(place)
    if notes is not None:
        content["language"]["ann"] = [n.text for n in notes]
        content["language"]["task"] = [n.task for n in notes]
        content["info"]["indx"] = [(n.start, n.end) for n in notes]
        content["language"].pop("emb", None)
    for name, value in language.items():
        if value is None:
            content["language"].pop(name, None)
        else:
            content["language"][name] = value
    place.write_bytes(object_bytes(content))
    return place


def change_frame(folder: Path, index: int, **arrays: Any) -> Path:
    """Write one frame anew with other arrays; None takes one away."""
    place = folder / layout.frame_name(index)
    with np.load(place) as stored:
        content = dict(stored)
    for name, value in arrays.items():
        content.pop(name, None) if value is None else content.update({name: value})
    np.savez(place, **content)
    return place
