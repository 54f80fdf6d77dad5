"""`openhelix run`: the whole system, on the wall clock or in lockstep.

    openhelix run                                 CALVIN's first chain
    openhelix run --task open_drawer --scene D    one task, judged by the world
    openhelix run --interactive --no-ray          type what the robot is to do
    openhelix run tasks.instruction="open the drawer" system2.hz=2
    openhelix run control.clock=lockstep tasks.steps_limit=60 tasks.sequence=7

The pair that comes with the project is what acts unless `--config FILE` or
`system1.policy...=` and `system2.engine...=` name another one; the first lines and report.json
say which. `--no-ray` starts plain processes instead of Ray actors. `openhelix config` explains every
setting.
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
from openhelix.runtime.control.episodes import Assignment, told
from openhelix.runtime.core import plugins
from openhelix.runtime.core.config import CommandFailed, ConfigError, RunConfig, load
from openhelix.runtime.core.files import NO_ROOM, replace_file
from openhelix.runtime.core.output import answer
from openhelix.runtime.launch.graph import require_parts, with_free_ports
from openhelix.runtime.launch.node import Interrupts, interruptible
from openhelix.runtime.observe.display import Display
from openhelix.runtime.observe.observer import drawn_later
from openhelix.runtime.observe.overlay import world_of
from openhelix.runtime.observe.prompt import Prompt
from openhelix.runtime.observe.viewer import require
from openhelix.runtime.robots.base import WorldPlugin, robot_class
from openhelix.runtime.transport.sockets import check_keys

EXIT_INTERRUPTED = 130  # by Ctrl-C; the robot was stopped and the report written
REFUSALS = (*NO_ROOM, errno.EROFS)  # of a disk
EXIT_STOPPED = 3  # the robot was stopped for safety before the run was complete
FILM_LIMIT_S = 180.0  # of film; drawing takes about as long as the run, on one core


RECORD = """`openhelix record`: run the whole system, and keep all that it saw and did.

    openhelix record --task open_drawer
    openhelix record --config configs/run.yaml tasks.sequence=7

As `openhelix run`, with `recording.mcap` in the run's folder: observations, latents, trajectories
and actions, which `openhelix replay` puts to a policy again and Foxglove shows.
"""


class RunOptions(Options):
    """Options of `run` and `record`; all else is `RunConfig`."""

    interactive: bool = option(False, "type what the robot is to do while it runs")
    task: str | None = option(None, "one task by its name, from a state to begin it in", "NAME")
    scene: str | None = option(None, "the same as world.scene=SCENE", "SCENE")
    no_ray: bool = option(False, "plain processes instead of Ray actors")
    viewer: bool = option(False, "write run.rrd for Rerun")


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
    for name, value in (("world.scene", options.scene), ("tasks.task", options.task)):
        if value is not None:
            overrides.append(f"{name}={value}")
    if record:
        overrides.append("output.record=true")
    config = load(options.config, overrides)
    lockstep = config.control.clock == "lockstep"
    logging.basicConfig(level=logging.WARNING)
    if config.ray and not lockstep and find_spec("ray") is None:
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
    config, ported = (config, "") if lockstep else with_free_ports(config)
    assignments, initial = plan(config, options.interactive)
    folder = make_output_folder(config.output.folder)
    display = Display(live=config.output.live and not options.as_json)
    display.say(f"settings: {options.config or 'the defaults'}, {config.sha256}")
    for line in told(config):
        display.say(line)
    if ported:
        display.warn(ported)
    if lockstep:
        from openhelix.runtime.launch.run import run_lockstep as run
    else:
        from openhelix.runtime.launch.run import run_realtime as run
    prompt = Prompt(display.say) if options.interactive else None
    # What a signal ends in order, a second one does not end otherwise.
    with interruptible() as interrupted:
        try:
            report = run(config, assignments, initial, folder, display, prompt)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            raise _cannot_write(Path(error.filename or folder), error) from None
        report["config"] = str(options.config) if options.config is not None else None
        report["config_sha256"] = config.sha256
        try:
            place = write_report(report, folder)
            if place.parent == folder:
                publish_latest(folder, config.output.folder)
        finally:  # what was measured is worth more than the disk that has no room for it
            if options.as_json:
                answer(json.dumps(report))
            _film(config, report, folder, display, interrupted)
            if not options.as_json:
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


def _film(
    config: RunConfig,
    report: dict[str, Any],
    folder: Path,
    display: Display,
    interrupted: Interrupts,
) -> None:
    """Make the film of a world that can be drawn anew; one that fails costs the run nothing."""
    if not config.output.video or not drawn_later(config) or not report["tasks"]:
        return
    later = f"`openhelix film {folder}` makes it"
    if report["ticks"] / config.control.hz > FILM_LIMIT_S:
        display.say(f"no film of more than {FILM_LIMIT_S / 60:.0f} minutes by itself; {later}")
        return
    # What reads recordings and encodes films takes a while to import.
    from openhelix.runtime.cli.film import film

    try:
        with interrupted.patience(interrupted.heard):
            film(folder, folder / "video.mp4", display)
    except KeyboardInterrupt:
        display.warn(f"the film was left out; {later}")
    except (ValueError, OSError) as error:
        display.warn(f"no film: {error}")


def plan(
    config: RunConfig, interactive: bool = False
) -> tuple[list[Assignment], dict[str, Any] | None]:
    """Return what to do, and the first state of a world that can be set; see `set_world`.

    A run in which a person will talk begins with nothing to do, in the state that the sequence
    begins with, unless the configuration says more.
    """
    tasks = config.tasks
    own = [Assignment("", sentence) for sentence in tasks.sentences]
    name, scene, seed = world_of(config), config.world.scene, config.world.seed
    if name is None and (own or interactive):
        return own, None
    world: WorldPlugin = plugins.find(plugins.WORLDS, name or config.world.name)
    laid = None
    if config.world.layout is not None:
        laid = world.layout(config.world.layout, scene, seed)
    if tasks.task is not None:
        try:
            found, start = world.task(tasks.task, scene, seed)
        except ValueError as error:  # it says "task: ..."
            raise ConfigError(
                f"tasks.{error}" if str(error).startswith("task:") else str(error)
            ) from None
        return [Assignment(*task) for task in found], laid or start
    if own or (interactive and laid):
        return own, laid
    if laid is not None:
        raise ConfigError(
            "world.layout: a sequence has a start of its own; say --interactive, --task NAME or "
            "tasks.instruction=SENTENCE"
        )
    listed, state = world.sequence(tasks.sequence, config.world.scene)
    return [] if interactive else [Assignment(*task) for task in listed], dict(state)


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
