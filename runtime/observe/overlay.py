"""What is drawn over pictures: the plan as a camera sees it, lines without jagged edges, captions.

The film, the viewer and the status page show the same plan: where the arm is about to go, with the
part that will be executed before the next plan is due in another colour.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from openhelix.runtime.control.assembly import freshness
from openhelix.runtime.control.episodes import told
from openhelix.runtime.core import plugins
from openhelix.runtime.core.config import RunConfig
from openhelix.runtime.core.interfaces import F64, U8, ActionChunk, CameraFrame
from openhelix.runtime.robots.base import Scenery

Colour = tuple[int, int, int]
# Blue and orange are told apart by everybody.
INK, DIM, GROUND = (240, 243, 246), (164, 174, 184), (16, 20, 26)
COMMITTED, AHEAD, TRAIL = (255, 150, 40), (90, 170, 255), (235, 235, 235)
GOOD, BAD, WAIT = (64, 156, 255), (230, 96, 60), (226, 180, 64)
FINE = 3  # what is drawn smoothly is drawn this much larger


@dataclass(frozen=True, slots=True)
class About:
    """What a film and a viewer should know of a run before its first tick.

    Attributes:
        robot: its name.
        lines: what a title card says of the run; () for no card.
        cameras: names; a film shows the first large and the second as an inset.
        committed: rows of a trajectory that are executed before the next one is due.
        latent_max_age_s: age at which the newest latent stops the robot.
        scenery: what a simulated world looks like; None: show what the cameras saw.
        urdf: file with the arm, whose root is W; its revolute joints are the robot's, in order.
    """

    robot: str = "robot0"
    lines: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ("static", "gripper")
    committed: int = 4
    latent_max_age_s: float = 3.0
    scenery: Scenery | None = None
    urdf: Path | None = None

    @classmethod
    def of(cls, config: RunConfig, cameras: Sequence[str]) -> About:
        """Return what a configuration says; loads the scenery of a world that has one."""
        scenery, world = None, world_of(config)
        if world is not None:
            stands = config.world.static_camera
            scenery = plugins.find(plugins.WORLDS, world).scenery(
                config.world.scene, None if stands is None else stands.model_dump()
            )
        where = config.robot.name if world is None else f"{world}, scene {config.world.scene}"
        clock = "wall clock" if config.control.clock == "realtime" else "lockstep clock"
        return cls(
            robot=config.robot.id,
            lines=(f"{where}, {config.control.hz:g} Hz, {clock}", *_systems(config)),
            cameras=tuple(cameras),
            committed=config.system1.replan_steps,
            latent_max_age_s=freshness(config).latent_max_age_s,
            scenery=scenery,
            urdf=config.output.urdf,
        )


def _systems(config: RunConfig) -> Iterator[str]:
    """Yield which systems they are, without their classes."""
    for line in told(config):
        yield line.partition(" (")[0].partition(", ")[0]
    if config.system2.trigger == "change":
        yield "a latent when the scene changes"
    elif config.system2.trigger == "learned":
        yield "a latent when a gate expects another"
    elif config.control.clock == "lockstep":
        every = "step" if config.interval_steps == 1 else f"{config.interval_steps} steps"
        yield f"a latent every {every}"
    else:
        several = "" if config.system2.hz == 1 else "s"
        yield f"{config.system2.hz:g} latent{several} per second"


def world_of(config: RunConfig) -> str | None:
    """Return the name of the world that the run's driver moves in; None for a physical arm."""
    name = config.robot.name
    if name == "sim":
        return config.world.name
    return name if name in plugins.entries(plugins.WORLDS) else None


def project(frame: CameraFrame, points: npt.ArrayLike) -> tuple[F64, npt.NDArray[np.bool_]]:
    """Return where world points (n, 3) are in a frame's image, and which are before the camera.

    Args:
        frame: whose camera.
        points: (n, 3), m, in W.

    Returns:
        Pixels (n, 2), u right and v down from the upper left corner, and (n,) bool.
    """
    rotation, place = frame.T_world_cam[:3, :3], frame.T_world_cam[:3, 3]
    seen = (np.asarray(points, np.float64) - place) @ rotation
    ahead = seen[:, 2] > 1e-3
    depth = np.where(ahead, seen[:, 2], 1.0)
    pixels = seen[:, :2] / depth[:, None] * (frame.K[0, 0], frame.K[1, 1])
    return pixels + frame.K[:2, 2], ahead


def halves(chunk: ActionChunk, committed: int) -> list[tuple[F64, Colour]]:
    """Return the points of a plan that are executed before the next is due, and the rest."""
    at = max(0, min(committed, len(chunk.poses) - 1))
    return [(chunk.poses[: at + 1, :3], COMMITTED), (chunk.poses[at:, :3], AHEAD)]


def strokes(frame: CameraFrame, chunk: ActionChunk, committed: int) -> list[tuple[F64, Colour]]:
    """Return a plan's `halves` in a frame's pixels, (n, 2) each; none where it cannot be seen."""
    drawn = []
    for points, colour in halves(chunk, committed):
        pixels, ahead = project(frame, points)
        if ahead.sum() > 1:
            drawn.append((pixels[ahead], colour))
    return drawn


def stroke(
    image: Image.Image, points: F64, colour: Colour, width: float, ends: bool = True
) -> None:
    """Draw a line through points (n, 2) in pixels, smoothly, into an image.

    Args:
        image: RGB, drawn into.
        points: (n, 2); what lies outside is not drawn.
        colour: of the line.
        width: pixels.
        ends: with a dot at the last point.
    """
    margin = width + 3
    low = np.maximum(np.floor(points.min(axis=0) - margin), 0).astype(int)
    high = np.minimum(np.ceil(points.max(axis=0) + margin), image.size).astype(int)
    if (high <= low).any():
        return
    size = high - low
    mask = Image.new("L", (int(size[0]) * FINE, int(size[1]) * FINE))
    pen = ImageDraw.Draw(mask)
    path = [tuple(p) for p in (points - low) * FINE]
    pen.line(path, fill=255, width=max(1, round(width * FINE)), joint="curve")
    if ends:
        (x, y), r = path[-1], width * FINE
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    mask = mask.resize((int(size[0]), int(size[1])), Image.Resampling.BOX)
    image.paste(colour, (int(low[0]), int(low[1])), mask)


@lru_cache(maxsize=16)
def font(size: int) -> Any:
    """Return the type face of all captions."""
    return ImageFont.load_default(size=size)


def shade(image: Image.Image, box: tuple[int, int, int, int], strength: float = 0.72) -> None:
    """Darken a rectangle (left, top, right, bottom), so that what is written there can be read."""
    part = image.crop(box)
    ground = Image.new("RGB", part.size, GROUND)
    image.paste(Image.blend(part, ground, strength), box)


def fitted(text: str, size: int, width: int, lines: int = 2) -> list[str]:
    """Break a text into lines of at most `width` pixels; what does not fit ends in an ellipsis."""
    type_, rows = font(size), [""]
    for word in text.split() or [""]:
        longer = f"{rows[-1]} {word}".strip()
        if type_.getlength(longer) <= width or not rows[-1]:
            rows[-1] = longer
        else:
            rows.append(word)
    kept = rows[:lines]
    if len(rows) > lines:
        kept[-1] += " …"
    for i, row in enumerate(kept):
        while type_.getlength(row) > width and len(row) > 2:
            row = row[:-2].rstrip() + "…"
        kept[i] = row
    return kept


def tick_mark(image: Image.Image, at: tuple[int, int], size: int, good: bool) -> None:
    """Draw a check mark or a cross, `size` pixels wide, with its upper left corner at `at`."""
    unit = size / 10.0
    shapes: Sequence[Sequence[tuple[float, float]]]
    if good:
        shapes = [[(1.2, 5.4), (4.0, 8.4), (8.8, 1.8)]]
    else:
        shapes = [[(1.6, 1.6), (8.4, 8.4)], [(8.4, 1.6), (1.6, 8.4)]]
    for shape in shapes:
        points = np.array(shape) * unit + at
        stroke(image, points, GOOD if good else BAD, 1.5 * unit, ends=False)


def encode_jpeg(rgb: U8, quality: int = 85) -> bytes:
    """Return an RGB image (h, w, 3) u8 as JPEG."""
    with io.BytesIO() as file:
        Image.fromarray(np.ascontiguousarray(rgb)).save(file, "JPEG", quality=quality)
        return file.getvalue()
