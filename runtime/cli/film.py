"""`openhelix film [RUN]`: the film of a run, or a moving picture for a page, from its track.

    openhelix film    # the newest run, to outputs/latest/video.mp4
    openhelix film outputs/run-0007 --speed 2 --out demo.mp4
    openhelix film --seconds 10 --height 360 --out docs/images/run.webp

RUN is a run's folder, a `recording.mcap` or a `track.mcap`; the newest run by default. A simulated world
is drawn anew at any size; of a physical arm there is a film as soon as the run was recorded
(`openhelix record`). The kind of file follows from its name: .mp4, or .webp or .gif, which a README
shows as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from openhelix.runtime.cli.arguments import Options, Positional, option, parse
from openhelix.runtime.core.config import Positive, RunConfig, load
from openhelix.runtime.core.output import answer
from openhelix.runtime.observe.display import Display
from openhelix.runtime.observe.film import FILE_NAME, FPS, TITLE_S, make_film
from openhelix.runtime.observe.overlay import About
from openhelix.runtime.observe.recorder import FILE_NAME as RECORDING_NAME
from openhelix.runtime.observe.recorder import TRACK_NAME, Reader, RecordingError, playback

PICTURE_FPS = 12.5  # of a moving picture in a page: every frame is paid for in bytes


class FilmOptions(Options):
    """Options of `film`."""

    run: Annotated[Path | None, Positional()] = option(
        None, "a run's folder, or a recording (the newest run)", "RUN"
    )
    out: Path | None = option(None, "the file (RUN/video.mp4)", "FILE")
    start: Annotated[float, Field(ge=0)] = option(0.0, "seconds of the run to leave out", "S")
    seconds: Positive | None = option(None, "length of the film, without its title", "S")
    speed: Positive = option(1.0, "times as fast as the run", "X")
    height: Annotated[int, Field(ge=120, le=2160, multiple_of=2)] = option(720, "pixels", "N")
    no_title: bool = option(False, "without the title card")


def main(argv: Sequence[str]) -> int:
    """Make a film of a run, or a moving picture for a page."""
    options, overrides = parse(
        "film", FilmOptions, argv, __doc__ or "", RunConfig, ("output.folder",)
    )
    source = options.run or load(options.config, overrides).output.folder / "latest"
    if source.is_dir():
        out = options.out or source / FILE_NAME
    else:
        out = options.out or source.with_name(FILE_NAME)
    with Display(live=not options.as_json) as display:
        made = film(source, out, display, **_part(options, out))
    if options.as_json:
        answer(json.dumps(made))
    else:
        answer(f"{made['path']}  ({made['seconds']:.1f} s, {made['bytes'] / 1e6:.1f} MB)")
    return 0


def _part(options: FilmOptions, out: Path) -> dict[str, Any]:
    end_s = None
    if options.seconds is not None:
        end_s = options.start + options.seconds * options.speed
    width = round(options.height * 16 / 9 / 2) * 2
    return {
        "size": (width, options.height),
        "title": not options.no_title,
        "begin_s": options.start,
        "end_s": end_s,
        "speed": options.speed,
        "fps": FPS if out.suffix == ".mp4" else PICTURE_FPS,
    }


def film(
    source: Path, out: Path, display: Display, title: bool = True, **part: Any
) -> dict[str, Any]:
    """Make a film of a run; return {"path", "frames", "seconds", "bytes"}.

    Args:
        source: a run's folder, a recording or a track.
        out: the file.
        display: shows how far it is.
        title: with the title card.
        part: see `make_film`.

    Raises:
        ValueError: there is no recording, or nothing in it to show.
    """
    recorded = reader(source)
    config = recorded.config()
    about = About.of(config, recorded.meta.get("cameras", ()))
    if about.scenery is None and recorded.path.name == TRACK_NAME:
        raise RecordingError(
            f"{recorded.path}: has no images, and this world cannot be drawn anew; "
            "`openhelix record` keeps images"
        )
    if not title:
        about = About(**{n: getattr(about, n) for n in about.__slots__} | {"lines": ()})
    fps = part.get("fps", FPS)
    total = _expected(recorded, about, **part)
    with display.working("making the film, Ctrl-C leaves it out", total) as tell:
        frames = make_film(playback(recorded.path), out, about, tell=tell, **part)
    return {
        "path": str(out),
        "frames": frames,
        "seconds": frames / fps,
        "bytes": out.stat().st_size,
    }


def _expected(
    recorded: Reader,
    about: About,
    begin_s: float = 0.0,
    end_s: float | None = None,
    speed: float = 1.0,
    fps: float = FPS,
    **_: Any,
) -> int | None:
    """About how many frames the film will have; None where the run was cut off."""
    ticks = recorded.meta.get("written")
    if not isinstance(ticks, int):
        return None
    length_s = ticks / recorded.config().control.hz
    shown_s = max(0.0, min(length_s, end_s if end_s is not None else length_s) - begin_s)
    return round(fps * (shown_s / speed + (TITLE_S if about.lines else 0.0)))


def reader(source: Path) -> Reader:
    """Return a run's recording, or else its track.

    Raises:
        RecordingError: there is neither.
    """
    if not source.is_dir():
        return Reader(source)
    for name in (RECORDING_NAME, TRACK_NAME):
        if (source / name).exists():
            return Reader(source / name)
    raise RecordingError(f"{source}: no track there (output.track=true keeps one) and no recording")
