"""`openhelix run`: the whole system, on the wall clock or in lockstep.

The pair that comes with the project is what acts unless `--config FILE` or
`system1.policy...=` and `system2.engine...=` name another one; the first lines and report.json
say which. `--no-ray` starts plain processes instead of Ray actors.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from openhelix.runtime.cli.arguments import Options, option, parse
from openhelix.runtime.cli.output import answer
from openhelix.runtime.control.episodes import Assignment, told
from openhelix.runtime.core import plugins
from openhelix.runtime.core.config import CommandFailed, ConfigError, RunConfig, load
from openhelix.runtime.core.files import NO_ROOM, replace_file
from openhelix.runtime.launch.graph import require_parts
from openhelix.runtime.observe.display import Display
from openhelix.runtime.observe.viewer import require
from openhelix.runtime.robots.base import WorldPlugin, robot_class
from openhelix.runtime.transport.sockets import check_keys

EXIT_INTERRUPTED = 130  # by Ctrl-C; the robot was stopped and the report written
REFUSALS = (*NO_ROOM, errno.EROFS)  # of a disk
EXIT_STOPPED = 3  # the robot was stopped for safety before the run was complete


RECORD = """`openhelix record`: run the whole system, and keep all that it saw and did.

As `openhelix run`, with `recording.mcap` in the run's folder: observations, latents, trajectories
and actions, which `openhelix replay` puts to a policy again and Foxglove shows.
"""


class RunOptions(Options):
    """Options of `run` and `record`; all else is `RunConfig`."""

    no_ray: bool = option(False, "plain processes instead of Ray actors")
    viewer: bool = option(False, "log to Rerun")


def main(argv: Sequence[str]) -> int:
    """Run the whole system on a robot or in a simulator.

    0 when the run completed, whatever the success rate.
    """
    return _run(argv, record=False)


def record(argv: Sequence[str]) -> int:
    """Run, and record everything to disk."""
    return _run(argv, record=True)


def _run(argv: Sequence[str], record: bool) -> int:
    command = "record" if record else "run"
    options, overrides = parse(
        command, RunOptions, argv, RECORD if record else __doc__ or "", RunConfig
    )
    if options.no_ray:
        overrides.append("ray=false")
    if options.viewer:
        overrides.append("output.viewer=true")
    if record:
        overrides.append("output.record=true")
    config = load(options.config, overrides)
    logging.basicConfig(level=logging.WARNING)
    if config.ray and config.control.clock == "realtime" and find_spec("ray") is None:
        raise ConfigError(
            "ray: not installed: pip install 'openhelix[cluster]', or say --no-ray for plain "
            "processes on this host"
        )
    if config.output.viewer:
        require()
    # All that can be told now is told before anything is started or written.
    robot_class(config.robot.name)
    check_keys(config.transport.keys)
    require_parts(config)
    assignments, initial = plan(config)
    folder = make_output_folder(config.output.folder)
    display = Display(live=config.output.live and not options.as_json)
    display.say(f"settings: {options.config or 'the defaults'}")
    for line in told(config):
        display.say(line)
    if config.control.clock == "lockstep":
        from openhelix.runtime.launch.run import run_lockstep as run
    else:
        from openhelix.runtime.launch.run import run_realtime as run
    try:
        report = run(config, assignments, initial, folder, display)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise _cannot_write(Path(error.filename or folder), error) from None
    report["config"] = str(options.config) if options.config is not None else None
    try:
        place = write_report(report, folder)
        if place.parent == folder:
            publish_latest(folder, config.output.folder)
    finally:  # what was measured is worth more than the disk that has no room for it
        if options.as_json:
            answer(json.dumps(report))
        else:
            display.summary(report, folder)
    if place.parent != folder:
        raise CommandFailed(f"output.folder: no room in {folder}; the report is in {place}")
    if report["error"]:
        raise CommandFailed(report["error"])
    if record and (lost := ((report["sinks"] or {}).get("recording") or {}).get("error")):
        raise CommandFailed(f"recording: is incomplete: {lost}")
    if report["interrupted"]:
        return EXIT_INTERRUPTED
    return EXIT_STOPPED if report["stopped"] else 0


def plan(config: RunConfig) -> tuple[list[Assignment], dict[str, Any] | None]:
    """Return what to do and the initial state of a world that can be set."""
    if config.tasks.instruction is not None:
        text = config.tasks.instruction.strip()
        if not text:
            raise ConfigError("tasks.instruction: is empty; write what the robot is to do")
        return [Assignment("", text)], None
    world: WorldPlugin = plugins.find(plugins.WORLDS, config.world.name)
    tasks, initial = world.sequence(config.tasks.sequence, config.world.scene)
    return [Assignment(*task) for task in tasks], dict(initial)


def make_output_folder(base: Path) -> Path:
    """Return a new folder for this run; an earlier run's is never touched."""
    try:
        base.mkdir(parents=True, exist_ok=True)
        for number in range(1, 100_000):
            folder = base / f"run-{number:04d}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise ConfigError(f"output.folder: cannot write to {base}: {error.strerror}") from None
    raise ConfigError(f"output.folder: {base} holds too many runs")


def write_report(report: dict[str, Any], folder: Path) -> Path:
    """Write `report.json` whole or not at all; return where it is.

    Where the disk refuses it goes to the system's folder for temporary files.

    Raises:
        CommandFailed: that refuses too; one line says why.
    """
    text = (json.dumps(report, indent=2) + "\n").encode()
    place = folder / "report.json"
    try:
        replace_file(place, text)
    except OSError as error:
        try:
            # Others may write to that folder as well: a new file, of a name that nobody can guess.
            name = f"openhelix-{folder.name}-"
            with tempfile.NamedTemporaryFile(prefix=name, suffix=".json", delete=False) as file:
                file.write(text)
        except OSError:
            raise _cannot_write(place, error) from None
        return Path(file.name)
    return place


def publish_latest(folder: Path, base: Path) -> None:
    """Point `latest` at this run."""
    link = base / "latest"
    part = base / f".latest-{os.getpid()}"
    try:
        part.symlink_to(folder.name)
    except OSError as error:
        raise _cannot_write(link, error) from None
    if link.exists() and not link.is_symlink():
        part.unlink()
        raise ConfigError(f"{link}: is in the way; it should be a link that runs replace")
    part.rename(link)


def _cannot_write(path: Path, error: OSError) -> CommandFailed:
    return CommandFailed(f"output.folder: cannot write {path}: {error.strerror or error}")
