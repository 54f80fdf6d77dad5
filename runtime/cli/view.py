"""`openhelix view [RUN]`: a run in Rerun, while it is alive or afterwards.

    openhelix view                        the newest run: live, or from its track
    openhelix view outputs/run-0007       that one
    openhelix view --web                  in the browser instead of a window
    openhelix view --out run.rrd          only write the file

RUN is a run's folder, a `recording.mcap`, a `track.mcap` or an `.rrd`. A run that is alive starts to
show itself when it is first asked to, and costs nothing before. Needs Rerun:
`pip install 'openhelix[viewer]'`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from openhelix.runtime.cli.arguments import Options, Positional, option, parse
from openhelix.runtime.cli.film import reader
from openhelix.runtime.core.config import CommandFailed, ConfigError, RunConfig, load
from openhelix.runtime.core.output import answer
from openhelix.runtime.launch.node import interruptible
from openhelix.runtime.observe.display import Display
from openhelix.runtime.observe.overlay import About
from openhelix.runtime.observe.recorder import playback
from openhelix.runtime.observe.status_source import RECORD, NoRun, RunSource, newest_run
from openhelix.runtime.observe.viewer import (
    FILE_NAME,
    RerunProcess,
    RerunViewer,
    ViewerFailed,
    require,
)


class ViewOptions(Options):
    """Options of `view`."""

    run: Annotated[Path | None, Positional()] = option(
        None, "a run's folder, or a recording (the newest run)", "RUN"
    )
    web: bool = option(False, "in the browser")
    out: Path | None = option(None, "write the .rrd there and open nothing", "FILE")


def main(argv: Sequence[str]) -> int:
    """Look at a run in 3D and over time; needs Rerun."""
    options, overrides = parse(
        "view", ViewOptions, argv, __doc__ or "", RunConfig, ("output.folder",)
    )
    require()
    base = load(options.config, overrides).output.folder
    source = options.run or _newest(base)
    alive = source.is_dir() and (source / RECORD).exists()
    if alive and options.out is None:
        return _open(_live(base, source), options)
    with Display(live=not options.as_json) as display:
        path = written(source, options.out, display)
    if options.out is not None or options.as_json:
        size = path.stat().st_size
        answer(json.dumps({"path": str(path), "bytes": size}) if options.as_json else str(path))
        return 0
    return _open(str(path), options)


def _newest(base: Path) -> Path:
    try:
        return newest_run(base)
    except NoRun:
        return base / "latest"


def _live(base: Path, folder: Path) -> str:
    """Return where a run that is alive can be seen."""
    source = RunSource(base, folder)
    try:
        with Display() as display:
            display.waiting("Rerun")
            return source.view()
    finally:
        source.close()


def _open(what: str, options: ViewOptions) -> int:
    """Open Rerun's viewer and wait until it is closed."""
    with interruptible() as interrupted:
        viewer = RerunProcess(what, *(["--web-viewer"] if options.web else []))
        try:
            if options.web:
                viewer.answers()
                answer(f"{viewer.page}\nCtrl-C ends it")
            while viewer.process.poll() is None:
                if interrupted.wait(0.2):
                    return 0
        except ViewerFailed as error:
            raise CommandFailed(str(error)) from None
        finally:
            viewer.end()
    if viewer.process.returncode:
        raise CommandFailed(
            f"Rerun's viewer ended with {viewer.process.returncode}; without a screen use --web, or "
            "--out FILE.rrd"
        )
    return 0


def written(source: Path, out: Path | None, display: Display) -> Path:
    """Return an .rrd of a run; one that is there already is not made again.

    Args:
        source: a run's folder, a recording, a track or an .rrd.
        out: where to write it; None: beside the recording.
        display: shows how far it is.

    Raises:
        RecordingError: there is no recording.
    """
    if source.suffix == ".rrd":
        if not source.is_file():
            raise ConfigError(f"RUN: no file {source}")
        return source
    ready = source / FILE_NAME
    if out is None and source.is_dir() and ready.exists():
        return ready
    recorded = reader(source)
    path = out or recorded.path.with_name(FILE_NAME)
    about = About.of(recorded.config(), recorded.meta.get("cameras", ()))
    part = path.with_name(f".{path.name}")
    viewer = RerunViewer(part, about, lossless=True)
    with display.working("reading the run", recorded.meta.get("written")) as tell:
        for number, message in enumerate(playback(recorded.path), 1):
            viewer(message)
            tell(number)
        viewer.close(600.0)
    if viewer.error:
        part.unlink(missing_ok=True)
        raise CommandFailed(f"{path.name}: could not be written: {viewer.error}")
    part.rename(path)
    return path
