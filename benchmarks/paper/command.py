"""`openhelix experiment NAME...`: reproduce the paper's tables and figures.

    openhelix experiment --list
    openhelix experiment table2 --scale quick --estimate
    openhelix experiment figure4 figure5 --workers 2

NAME is table1 to table9, figure4, figure5, axis_model to axis_async (the seven axes of the paper's
Appendix A.2), or `all`. Existing trainings and results are
reused, missing ones are made; the same command resumes after an interruption at any point.
Overrides are those of a run (`system1.replan_steps=4`) or, prefixed with `train.`, of `openhelix
train` (`train.stage2.steps=500`).
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from openhelix.benchmarks.evaluation.eval import SETTINGS, load_config
from openhelix.benchmarks.evaluation.evaluation import Console
from openhelix.benchmarks.paper import overview, tables
from openhelix.benchmarks.paper.catalogue import Catalogue, Experiment, catalogue
from openhelix.benchmarks.paper.costs import by_experiment, left, told
from openhelix.benchmarks.paper.episodes import check, kept_in, write_episodes
from openhelix.benchmarks.paper.judge import missing
from openhelix.benchmarks.paper.leaderboard import (
    copy_films,
    named_folders,
    own_entries,
    write_leaderboard,
)
from openhelix.benchmarks.paper.other_kinds import Probes, probed_in, zoo_outcome
from openhelix.benchmarks.paper.session import EVALUATIONS, Request, Session
from openhelix.benchmarks.paper.train_command import TrainCommand, changed, check_options, data_id
from openhelix.benchmarks.paper.trainings import OutOfTime, Trainer, Trainings
from openhelix.benchmarks.training.config import TrainingConfig
from openhelix.runtime.cli.arguments import Options, Positional, Words, option, parse
from openhelix.runtime.core.config import CommandFailed, ConfigError, Count, RunConfig
from openhelix.runtime.core.output import answer
from openhelix.runtime.core.paths import ROOT, cache_folder
from openhelix.runtime.core.plugins import none_of, resolve
from openhelix.system1.config import TACTILE
from openhelix.system1.data import read_index

RESULTS = ROOT / "benchmarks" / "results"  # of a checkout


def main(argv: Sequence[str]) -> int:
    """Reproduce the paper's tables and figures.

    0 when all that was asked for is there, or the time given is over.

    Raises:
        ConfigError: bad input, in one line.
        CommandFailed: a training failed; all else was done.
    """
    options, overrides = read(argv)
    logging.basicConfig(level=logging.ERROR)
    known = catalogue()
    if options.list_:
        answer(listing(known))
        return 0
    if options.recompute:
        answer("\n".join(recompute(options, known)))
        return 0
    session = make_session(options, overrides, known)
    console = Console("experiment")
    own = own_entries(named_folders(options.systems))
    folder = options.out or default_out(session.request)
    _refuse_mixture(session, folder)
    console.say(f"work in {session.request.root}, results in {folder}")
    if not options.report:
        parts = left(session)
        console.say(told([item for part in parts for item in part.items]))
        if options.estimate:
            answer(by_experiment(parts) + "\n")
            return 0
        if options.idle:
            _give_way()
        _run(session, folder, console, options.no_training)
    outcomes = write_all(session, folder)
    scored = known_outcomes(known, folder)
    if own and folder.resolve() != RESULTS:  # one's own systems beside those measured here
        scored += known_outcomes(known, RESULTS)
        copy_films(RESULTS, folder)
    board = write_leaderboard(folder, scored, own, session.request.root / EVALUATIONS)
    console.say("no leaderboard: nothing is scored" if board is None else f"leaderboard in {board}")
    overview.write_overview(folder, planned(session))  # which links to it
    if options.as_json:
        found = {"findings": overview.findings(outcomes, planned(session)), "experiments": outcomes}
        answer(json.dumps(found, default=str))
    else:
        answer("\n".join(f"{o['name']}: {o['state']}" for o in outcomes))
    if session.failed:
        raise CommandFailed(f"{len(session.failed)} trainings failed: {'; '.join(session.failed)}")
    return 0


def _give_way() -> None:
    """Take no processor time, nor do any children, that another process asks for."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError):  # not Linux, or not allowed
        os.nice(19)


def _run(session: Session, folder: Path, console: Console, no_training: bool) -> None:
    try:
        session.run(
            lambda: _quietly(session, folder), not no_training, lambda: _probe(session, folder)
        )
        _probe(session, folder)
    except OutOfTime:
        console.say("the time given is over; the same command goes on")


def _probe(session: Session, folder: Path) -> None:
    """Probe every System 2 that is there and was not."""
    with session.claims.of("probes") as mine:
        for experiment in session.request.experiments if mine else ():
            if experiment.kind == "probe" and Probes(session, experiment).run():
                _quietly(session, folder)


def _quietly(session: Session, folder: Path) -> None:
    write_all(session, folder)


class ExperimentOptions(Options):
    """Options of `experiment`."""

    names: Annotated[tuple[str, ...], Positional(many=True)] = option(
        (), "as --list names them, or all", "NAME"
    )
    list_: bool = Field(False, alias="list", description="list the experiments")
    scale: str = option(
        "laptop", "how much is trained and measured (laptop)", "smoke|quick|laptop|gpu|full"
    )
    data: Path | None = option(
        None, "a collection, or its name in the cache (train's default)", "DIR"
    )
    root: Path | None = option(None, "trainings and evaluations (in the cache)", "DIR")
    out: Path | None = option(None, "results (benchmarks/results; of smoke, outputs)", "DIR")
    workers: Count = option(1, "processes of an evaluation (1)", "N")
    seed: Annotated[int, Field(ge=0)] = option(0, "of everything (0)", "N")
    hours: Annotated[float, Field(gt=0)] | None = option(
        None, "stop after H hours; the same command goes on", "H"
    )
    idle: bool = option(False, "use only processor time that nothing else asks for")
    estimate: bool = option(False, "only estimate what is left, by experiment")
    report: bool = option(False, "only write the reports")
    recompute: bool = option(False, "recompute the pages' figures from the episodes beside them")
    no_training: bool = option(False, "measure what is trained, train nothing")
    variants: Words = option((), "these variants' rows alone (all)", "NAME,...")
    systems: Words = option((), "evaluations of one's own for the leaderboard", "NAME=DIR,...")
    trainer: str | None = option(None, "used instead of `openhelix train`", "MODULE:CLASS")


class Changes(RunConfig):
    """What overrides of `experiment` are for: a run, and under `train` its trainings."""

    train: TrainingConfig = TrainingConfig()


def read(argv: Sequence[str]) -> tuple[ExperimentOptions, list[str]]:
    """Return the options and overrides of a command line."""
    options, overrides = parse("experiment", ExperimentOptions, argv, __doc__ or "", Changes)
    if options.config is not None:
        raise ConfigError("--config: an experiment takes no file; say system1.FIELD=VALUE")
    return options, overrides


def make_session(options: ExperimentOptions, overrides: Sequence[str], known: Catalogue) -> Session:
    """Return the session that the command line describes.

    Raises:
        ConfigError: in one line, the option and what is valid.
    """
    names = asked(options, known)
    alone = alone_of(options, known, names)
    known.scale(options.scale)
    train, run = changed(overrides)
    try:
        check_options(train)
    except ConfigError as error:
        raise ConfigError(f"train.{error}") from None
    check_run(run)
    root = (options.root or cache_folder() / "experiments" / options.scale).resolve()
    data, frames, refusal = _data(options)
    until_s = None if options.hours is None else time.monotonic() + 3600 * options.hours
    trainer: Trainer = (
        resolve(options.trainer)() if options.trainer else TrainCommand(data, root, until_s=until_s)
    )
    request = Request(
        known,
        names,
        options.scale,
        root,
        "none" if frames is None else data_id(frames),
        options.seed,
        train,
        tuple(run),
        options.workers,
        until_s,
        None if options.data is None else str(options.data),
        alone,
    )
    folder = options.out or default_out(request)
    experiments = list(known.experiments)
    session = Session(
        request,
        Trainings(root / "trainings", trainer),
        Console("experiment"),
        kept=kept_in(folder, experiments),
        probed=probed_in(folder, experiments),
    )
    session.check_fair()
    if not (options.no_training or options.report or options.trainer):
        check_buildable(session)
        if frames is not None:
            check_sensors(session, frames)
        # An estimate of the default collection can be had before there is one.
        elif refusal and (options.data or not options.estimate) and needs_data(session):
            raise refusal
    return session


def needs_data(session: Session) -> bool:
    """Whether something that is not there is trained on a collection."""
    return any(training.reads_data for training in session.missing())


def alone_of(options: ExperimentOptions, known: Catalogue, names: Sequence[str]) -> frozenset[str]:
    """Return the variants whose rows alone are asked for; none means all.

    Raises:
        ConfigError: an experiment that is asked for has no row of one.
    """
    rows = [row for name in names for row in known.experiment(name).rows]
    there = dict.fromkeys(row.variant for row in rows if row.variant)
    for name in options.variants:
        if name not in there:
            raise ConfigError(f"--variants: {none_of(name, there)}")
    return frozenset(options.variants)


def check_run(run: Sequence[str]) -> None:
    """Refuse overrides that a run does not have, and of what every row says itself.

    Those are suite, scene, steps, clock and interval.

    Raises:
        ConfigError: one line names the first.
    """
    taken = [name for name in SETTINGS if not name.startswith("lockstep")]
    for word in run:
        key = word.removeprefix("--").partition("=")[0]
        if not any(key == name or key.startswith(f"{name}.") for name in taken):
            raise ConfigError(
                f"{key}: the rows of an experiment say it themselves; overrides are of "
                f"{', '.join(taken)}, and, for trainings, train.KEY"
            )
    load_config(run)


def check_buildable(session: Session) -> None:
    """Refuse a variant that `openhelix train` would refuse, before any other is trained.

    Raises:
        ConfigError: one line names variant and option.
    """
    missing = {training.key for training in session.missing()}
    for name in session.variants():
        training = session.training(name)
        if training.key in missing and training.reads_data:
            try:
                check_options(training.options)
            except ConfigError as error:
                raise ConfigError(f"variants.yaml: {name}: {error}") from None


def check_sensors(session: Session, frames: Path) -> None:
    """Refuse a variant that is to be trained on a sensor of which the collection has no pictures.

    Raises:
        ConfigError: one line names variant, sensor, and the cameras that there are.
    """
    cameras = [str(camera["name"]) for camera in read_index(frames)["cameras"]]
    known = session.request.catalogue.variants
    missing = {training.key for training in session.missing()}
    for name in session.variants():
        needs = TACTILE in known[name].sensors and session.training(name).key in missing
        if needs and TACTILE not in cameras:
            raise ConfigError(
                f"variants.yaml: {name}: sensors: the data has no camera {TACTILE!r}, only "
                f"{', '.join(cameras)}; `openhelix collect` with frames.tactile=true draws it"
            )


def _data(options: ExperimentOptions) -> tuple[Path, Path | None, ConfigError | None]:
    """Return the collection and its frames, or why there are none."""
    config = TrainingConfig() if options.data is None else TrainingConfig(data=options.data)
    if options.trainer:
        return config.data, None, None
    try:
        return config.data, config.frames_folder(), None
    except ConfigError as refusal:
        return config.data, None, refusal


def default_out(request: Request) -> Path:
    """Return where results go if nothing else is said."""
    if request.scale.official and RESULTS.is_dir():
        return RESULTS
    return Path("outputs") / f"experiments-{request.scale_name}"


def _refuse_mixture(session: Session, folder: Path) -> None:
    """Keep figures that mean nothing away from the project's results."""
    official = session.request.scale.official
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out: {folder} is a file; name a folder")
    if not official and folder.resolve().is_relative_to(RESULTS):
        raise ConfigError(f"--out: {folder} is for results; a smoke test's go elsewhere")


def outcome_of(session: Session, experiment: Experiment) -> dict[str, Any]:
    """Return an experiment's outcome, whatever its kind."""
    if experiment.kind == "probe":
        return Probes(session, experiment).outcome()
    if experiment.kind == "zoo":
        return zoo_outcome(session, experiment)
    return session.outcome(experiment)


def write_all(session: Session, folder: Path) -> list[dict[str, Any]]:
    """Write the experiments asked for and the overview of all; return the outcomes."""
    outcomes = []
    for experiment in session.request.experiments:
        outcome = outcome_of(session, experiment)
        outcomes.append(outcome)
        drawn = Probes(session, experiment).pictures(folder) if experiment.kind == "probe" else None
        if tables.write(outcome, folder, drawn):
            write_episodes(session, experiment, folder)
    overview.write_overview(folder, planned(session))
    return outcomes


def planned(session: Session) -> dict[str, list[dict[str, Any]]]:
    """Return the claims of every experiment there is, as they stand before anything is run."""
    return {
        name: Probes(session, experiment).planned()
        if experiment.kind == "probe"
        else [missing(contrast) for contrast in experiment.contrasts]
        for name, experiment in session.request.catalogue.experiments.items()
    }


def recompute(options: ExperimentOptions, known: Catalogue) -> list[str]:
    """Recompute pages from the episodes beside them; return a line for each.

    Raises:
        ConfigError: a figure differs, or a file cannot be read.
    """
    folder = options.out or RESULTS
    if not folder.is_dir():
        raise ConfigError(f"--out: no folder {folder}")
    return [
        check(known.experiment(name), tables.read(folder, name), folder)
        for name in asked(options, known)
    ]


def asked(options: ExperimentOptions, known: Catalogue) -> list[str]:
    """Return the experiments that are asked for, in the order in which they are worked through.

    Raises:
        ConfigError: none is, there is none of that name, or `all` is one of several.
    """
    if "all" in options.names and len(options.names) > 1:
        raise ConfigError("NAME: all stands alone; leave the other names out")
    names = known.in_order() if options.names == ("all",) else list(options.names)
    if not names:
        raise ConfigError(f"NAME: say all, or one of {', '.join(known.experiments)}")
    for name in names:
        known.experiment(name)
    return names


def known_outcomes(known: Catalogue, folder: Path) -> list[tables.Outcome]:
    """Return the outcomes of all experiments that a folder of results holds."""
    names = known.experiments
    return [found for name in names if (found := tables.read(folder, name)) is not None]


def listing(known: Catalogue) -> str:
    """Return what there is to run."""
    width = max(map(len, (*known.experiments, *known.scales))) + 1
    rows = [f"{name:<{width}} {e.title}" for name, e in known.experiments.items()]
    scales = [f"{name:<{width}} {s.says}" for name, s in known.scales.items()]
    return "\n".join([*rows, "", "scales:", *scales]) + "\n"
