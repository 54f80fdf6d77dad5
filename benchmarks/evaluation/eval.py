"""`openhelix eval`: how often a policy does what it is told.

    openhelix eval --suite tasks --episodes-per-task 3 --steps 60 --workers 2
    openhelix eval --suite tasks --tasks open_drawer,turn_on_led --videos 4
    openhelix eval --suite calvin --sequences 50
    openhelix eval --suite calvin-e --clock realtime system2.hz=2

Results, films and report.html go to a new folder below outputs/eval; an unfinished evaluation is
continued where it ended. `openhelix compare A B` compares two of them.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from openhelix.benchmarks.calvin.motions import PATTERNS
from openhelix.benchmarks.calvin.scene import SceneError, scene_names, written
from openhelix.benchmarks.evaluation.evaluation import (
    Console,
    Evaluation,
    code_hash,
    evaluate,
    open_pool,
)
from openhelix.benchmarks.evaluation.metrics import served
from openhelix.benchmarks.evaluation.oracle import SEES, other_pictures
from openhelix.benchmarks.evaluation.oracle import TARGET as TELLER
from openhelix.benchmarks.evaluation.report import counted, write_reports
from openhelix.benchmarks.evaluation.results import (
    REPORT,
    RUN,
    ResultsError,
    read_results,
    read_run,
)
from openhelix.benchmarks.evaluation.runner import Conditions
from openhelix.benchmarks.evaluation.suites import CHAINS, SUITES, SWITCH_STEPS, Suite
from openhelix.runtime.cli.arguments import Options, Words, option, parse
from openhelix.runtime.control.assembly import check_delays
from openhelix.runtime.core import plugins
from openhelix.runtime.core.config import (
    CommandFailed,
    ConfigError,
    Count,
    RunConfig,
    apply_overrides,
    read_yaml,
    validate,
)
from openhelix.runtime.core.files import NO_ROOM
from openhelix.runtime.core.output import answer
from openhelix.runtime.core.paths import CONFIGS
from openhelix.runtime.core.targets import written_spec
from openhelix.runtime.launch.graph import require_parts
from openhelix.system1.config import SHIPPED

DEFAULT_CONFIG = CONFIGS / "run.yaml"
ENGINE = "openhelix.system2.engines.transformers:TransformersEngine"
TEXT_ENGINE, TEXT_CODE = "openhelix.system2.engines.text:TextEngine", "text.safetensors"
ENGINE_BASE = "openhelix.system2.engines.base:EngineBase"
FOLDER = Path("outputs") / "eval"
S = TypeVar("S", bound="SuiteOptions")


# The settings of a run that an evaluation takes; the others are options of its own.
SETTINGS = (
    *(
        "system1",
        "system2",
        "world.cameras",
        "world.static_camera",
        "lockstep.interval_steps",
        "safety",
        "transport",
    ),
    *("control.hz", "control.fifo_priority", "control.spin_us", "control.cpu"),
    *("control.hold_limit_s", "control.placement", "ray_address"),
    *("output.metrics_port", "output.metrics_host"),
)


class SuiteOptions(Options):
    """The options that `eval` and `sweep` share."""

    world: str = option("playtable", "an installed world (playtable)", "playtable|calvin|...")
    scene: str = option("D", "one or more: D, ABC, R17, random:0-9", "SCENES")
    sequences: int | None = option(None, "chains: the first N of CALVIN's 1000 (10)", "N")
    episodes_per_task: int | None = option(None, "tasks, calvin-d: N per task (10)", "N")
    steps: Count = option(360, "environment steps per task (360)", "LIMIT")
    seed: int = option(0, "of starts, wording and the policy's noise (0)", "N")
    tasks: Words = option((), "only these tasks", "TASK,...")
    patterns: Words = option(PATTERNS, "of calvin-d", "PATTERN,...")
    speeds: Words = option(("paper",), "of calvin-d: paper, x2, m/s", "SPEED,...")
    phrases: str = option("unseen", "of calvin-e", "seen|unseen|all|FILE")
    changing: bool = option(False, "of calvin-r: what is meant changes on the way")
    plain: bool = option(False, "of calvin-r: its tasks in plain words instead")
    workers: Count = option(1, "processes (1: this one)", "N")
    threads: Count = option(1, "torch threads of each (1)", "N")
    out: Path | None = option(None, "results; an unfinished evaluation is continued", "DIR")


class EvalOptions(SuiteOptions):
    """Options of `eval`; what is evaluated is `RunConfig`."""

    suite: str = option(..., "what is asked of the policy", "|".join(SUITES))
    sees: str = option("image", "what System 2 is shown (image)", "|".join(SEES))
    clock: str = option("lockstep", "lockstep or realtime (lockstep)", "lockstep|realtime")
    interval: int | None = option(None, "System 2 every N steps (30)", "N")
    latency: int = option(0, "latency of its latents in steps (0)", "N")
    delay: int = option(0, "System 1's own delay in steps (0)", "N")
    drift: bool = option(False, "compare latents with fresh ones")
    videos: Words = option(
        (), "film N episodes, these (as D/7), or those that fail", "N|KEY|failures,..."
    )
    base: Path = option(FOLDER, "where new folders are made (outputs/eval)", "DIR")


def read(argv: Sequence[str]) -> tuple[EvalOptions, list[str]]:
    """Return the options and overrides of a command line."""
    options, overrides = parse("eval", EvalOptions, argv, __doc__ or "", RunConfig, SETTINGS)
    return alike(options, overrides)


def alike(options: S, overrides: Sequence[str]) -> tuple[S, list[str]]:
    """Let `world.scene=D` be `--scene D`, as in every other command.

    Raises:
        ConfigError: both are given, and they differ.
    """
    kept, given = [], None
    for word in overrides:
        name, _, value = word.removeprefix("--").partition("=")
        if name == "world.scene":
            given = value
        else:
            kept.append(word)
    if given is None:
        return options, kept
    if "scene" in options.model_fields_set and options.scene != given:
        raise ConfigError(f"world.scene: {given}, and --scene {options.scene}; say it once")
    return options.model_copy(update={"scene": given}), kept


def main(argv: Sequence[str]) -> int:
    """Measure how often a policy does what it is told.

    0 when all episodes have been run, whatever their success.
    """
    options, overrides = read(argv)
    logging.basicConfig(level=logging.ERROR)
    plan = make_plan(options, overrides)
    folder = options.out or default_folder(plan, options.base)
    console = Console("eval")
    pool = open_pool(plan.config, options.workers, plan.threads)
    try:
        console.say(f"results in {folder}")
        with served(plan.config, console.say) as metrics:
            report = evaluate(plan, pool, folder, metrics.watch(plan, console))
    finally:
        pool.close()
    try:
        write_reports(report, folder, read_results(folder))
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        report.setdefault("unwritten", f"{error.filename}: {error.strerror}")
    answer(json.dumps(report) if options.as_json else brief(report))
    if "unwritten" in report:
        raise CommandFailed(
            f"{report['unwritten']}; every episode is kept, and the same command writes the report"
        )
    return 0


def make_plan(options: EvalOptions, overrides: Sequence[str]) -> Evaluation:
    """Return the evaluation that the command line describes.

    Raises:
        ConfigError: in one line, the option and what is valid.
    """
    check_options(options, (options.suite,))
    suite = make_suite(options, options.suite)
    if options.clock not in ("lockstep", "realtime"):
        raise ConfigError(f"--clock: {options.clock!r} is none of lockstep, realtime")
    refuse_ignored(overrides, options, options.clock)
    config = load_config(
        overrides,
        options.config,
        world=suite.world,
        scene=options.scene,
        clock=options.clock,
        sees=options.sees,
    )
    require_parts(config)
    interval = config.interval_steps if options.interval is None else options.interval
    if interval < 1 or min(options.latency, options.delay) < 0:
        raise ConfigError("--interval must be at least 1, --latency and --delay at least 0")
    if suite.name == "switch" and options.steps <= SWITCH_STEPS[1]:
        raise ConfigError(
            f"--steps: {options.steps}; switch needs more than {SWITCH_STEPS[1]}: so late the "
            "second sentence may come"
        )
    chosen = options.interval or options.latency or options.delay or options.drift
    if options.clock == "realtime" and chosen:
        raise ConfigError(
            "--interval, --latency, --delay, --drift: belong to the lockstep clock; "
            "on the wall clock say system2.hz=HZ"
        )
    if options.interval is not None and config.system2.trigger != "cadence":
        raise ConfigError(
            f"--interval: belongs to system2.trigger=cadence, not to {config.system2.trigger}"
        )
    check_delays("--delay", (options.delay,), config, written_spec(config.system1.policy))
    conditions = Conditions(options.steps, interval, options.latency, options.drift, options.delay)
    films = _films(options.videos, suite)
    return Evaluation(suite, conditions, config, options.threads, options.sees, *films)


USED_BY: Mapping[str, tuple[str, ...]] = {
    "sequences": CHAINS,
    "episodes_per_task": tuple(name for name in SUITES if name not in CHAINS),
    "tasks": tuple(name for name in SUITES if name not in CHAINS),
    "patterns": ("calvin-d",),
    "speeds": ("calvin-d",),
    "phrases": ("calvin-e",),
    "changing": ("calvin-r",),
    "plain": ("calvin-r",),
}


def check_options(options: SuiteOptions, suites: Sequence[str]) -> None:
    """Refuse options that were given and that none of the suites uses.

    Raises:
        ConfigError: in one line, the option and what it belongs to.
    """
    for name, users in USED_BY.items():
        given = name in options.model_fields_set and getattr(options, name) is not None
        if given and set(suites) <= set(SUITES) and not set(suites) & set(users):
            flag, asked = f"--{name.replace('_', '-')}", " and ".join(suites)
            instead = {"sequences": "--episodes-per-task", "episodes_per_task": "--sequences"}
            if name in instead:
                raise ConfigError(f"{flag}: {asked} takes {instead[name]}")
            raise ConfigError(f"{flag}: {asked} does not use it; it is of {', '.join(users)}")


def refuse_ignored(overrides: Sequence[str], options: SuiteOptions, clock: str) -> None:
    """Refuse settings of a run that an evaluation does not take from there.

    One that says the same as the option is let through. What a settings file holds is a run's,
    and options say otherwise without complaint.

    Raises:
        ConfigError: in one line, the setting and the option to use instead.
    """
    robot = "calvin" if options.world == "calvin" else "sim"
    instead: dict[str, tuple[str, Any]] = {
        "seed": ("--seed", options.seed),
        "tasks.steps_limit": ("--steps", options.steps),
        "tasks.sequence": ("--sequences", None),
        "tasks.instruction": ("--suite", None),
        "tasks.stop_at_failure": ("--suite", None),
        "world.name": ("--world", options.world),
        "robot.name": ("--world", robot),
        "control.clock": ("--clock", clock),
    }
    if isinstance(options, EvalOptions):
        instead["lockstep.latency_steps"] = ("--latency", options.latency)
        instead["lockstep.plan_delay_steps"] = ("--delay", options.delay)
    else:  # of a sweep
        instead["lockstep.latency_steps"] = ("--latencies", None)
        instead["lockstep.plan_delay_steps"] = ("--delays", None)
        instead["lockstep.interval_steps"] = ("--intervals", None)
    given = apply_overrides({}, overrides, RunConfig)
    for field, (flag, value) in instead.items():
        section, _, name = field.rpartition(".")
        there = given.get(section) if section else given
        if isinstance(there, dict) and name in there and there[name] != value:
            raise ConfigError(f"{field}: an evaluation does not take it from there; say {flag}")


def _films(words: Sequence[str], suite: Suite) -> tuple[int, tuple[str, ...], bool]:
    """Return how many episodes to film, which ones besides, and whether all that fail."""
    count = sum(int(word) for word in words if word.isdecimal())
    named = tuple(w for w in words if not w.isdecimal() and w != "failures")
    keys = {episode.key for episode in suite.episodes()} if named else set()
    for word in named:
        if word not in keys:
            raise ConfigError(
                f"--videos: {word!r} is no number and no episode; {min(keys)!r} would be one"
            )
    return count, named, "failures" in words


def make_suite(options: SuiteOptions, name: str) -> Suite:
    """Return the suite that the options describe.

    Raises:
        ValueError: in one line, the option and what is valid.
    """
    count = options.sequences if name in CHAINS else options.episodes_per_task
    try:
        scenes = scene_names(options.scene)
    except SceneError as error:
        raise SceneError(f"--scene: {error}") from None
    return Suite(
        name=name,
        world=options.world,
        scenes=scenes,
        count=10 if count is None else count,
        seed=options.seed,
        tasks=options.tasks,
        patterns=options.patterns,
        speeds=options.speeds,
        phrases=options.phrases,
        changing=options.changing and name == "calvin-r",
        plain=options.plain and name == "calvin-r",
    )


def load_config(
    overrides: Sequence[str],
    path: Path | None = None,
    *,
    world: str = "playtable",
    scene: str = "D",
    clock: str = "lockstep",
    sees: str = "image",
) -> RunConfig:
    """Return the configuration of the run, with System 2 on transformers unless it is named.

    One request at a time is all that an episode asks for; transformers loads in a sixth of the
    time that vLLM takes and needs less of it for a batch of one.

    Raises:
        ConfigError: in one line, the field and what is valid.
    """
    data = read_yaml(path if path is not None else DEFAULT_CONFIG)
    data = apply_overrides(data, overrides, RunConfig)
    # What is looked into below has the form of its section, or is refused by its name.
    validate(RunConfig, {name: data[name] for name in ("system1", "system2") if name in data})
    if path is None and clock == "lockstep" and not any(map(_names_engine, overrides)):
        data = on_transformers(data, overrides)
    if not any(map(_names_engine, overrides)):
        data = told_in_words(data)
    data = shown(in_one_precision(data), sees, scene_names(scene), clock)
    fixed = [f"control.clock={clock}", f"world.scene={scene_names(scene)[0]}"]
    fixed += [f"world.name={world}", f"robot.name={'calvin' if world == 'calvin' else 'sim'}"]
    return validate(RunConfig, apply_overrides(data, fixed, RunConfig))


def on_transformers(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the configuration with System 2 on transformers.

    What a file says to vLLM is left out; what is said in words is not, to be refused.
    """
    words = apply_overrides({}, overrides, RunConfig).get("system2", {}).get("engine", {})
    taken = _engine_options() | set(words.get("options", {}))
    system2 = data.get("system2", {})
    options = system2.get("engine", {}).get("options", {})
    kept = {k: v for k, v in options.items() if k in taken}
    return data | {"system2": system2 | {"engine": {"target": ENGINE, "options": kept}}}


def in_one_precision(data: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with the precision that "auto" is on this machine.

    So results say in what System 2 computed, and an evaluation goes on in the same.
    """
    options = data.get("system2", {}).get("engine", {}).get("options", {})
    if options.get("dtype") != "auto":
        return data
    from openhelix.runtime.core.precision import pick_dtype

    named = [f"system2.engine.options.dtype={str(pick_dtype('auto')).removeprefix('torch.')}"]
    return apply_overrides(data, named, RunConfig)


def shown(data: dict[str, Any], sees: str, scenes: Sequence[str], clock: str) -> dict[str, Any]:
    """Return the configuration with a System 2 that is shown something else than the image.

    Raises:
        ConfigError: not one of `SEES`, or not on this clock.
    """
    if sees not in SEES:
        raise ConfigError(f"--sees: {sees!r} is none of {', '.join(SEES)}")
    if sees == "image":
        return data
    system2 = dict(data.get("system2", {}))
    engine = dict(system2.get("engine", {}))
    options = dict(engine.get("options", {}))
    if sees == "oracle":
        if clock != "lockstep":
            raise ConfigError("--sees: oracle looks into the world, on the lockstep clock alone")
        told = {"target": TELLER, "options": {"engine": engine}}
        return data | {"system2": system2 | {"engine": told}}
    if sees == "black":
        options["blind"] = True
    else:
        options["shown"] = "none" if sees == "none" else str(other_pictures(scenes))
    return data | {"system2": system2 | {"engine": engine | {"options": options}}}


def told_in_words(data: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with the engine that a policy without System 2 is told by.

    Such a policy has the code of its sentences beside its weights; see `openhelix.system2.text`.
    """
    path = data.get("system1", {}).get("policy", {}).get("options", {}).get("path")
    if not isinstance(path, str) or not path:
        return data
    code = (SHIPPED if path == "shipped" else Path(path).expanduser()) / TEXT_CODE
    if not code.is_file():
        return data
    engine = {"target": TEXT_ENGINE, "options": {"path": str(code)}}
    return data | {"system2": data.get("system2", {}) | {"engine": engine}}


def _names_engine(override: str) -> bool:
    key = override.removeprefix("--").partition("=")[0]
    return key in ("system2", "system2.engine", "system2.engine.target")


def _engine_options() -> set[str]:
    return set(inspect.signature(plugins.resolve(ENGINE_BASE)).parameters) | {"device"}


def default_folder(plan: Evaluation, base: Path) -> Path:
    """Return the folder of this very evaluation if one was begun and not finished, or a new one."""
    identity = json.loads(json.dumps(plan.identity()))
    name = f"{plan.suite.name}-{written(plan.suite.scenes)}"
    used = sorted(base.glob(f"{name}-[0-9]*")) if base.is_dir() else []
    for folder in used:
        if not (folder / RUN).exists() or (folder / REPORT).exists():
            continue
        try:
            run = read_run(folder)
        except ResultsError:
            continue
        if run["identity"] == identity and run["code"] == [code_hash()]:
            return folder
    number = 1 + max(
        (int(f.name.rsplit("-", 1)[1]) for f in used if f.name.rsplit("-", 1)[1].isdigit()),
        default=0,
    )
    return base / f"{name}-{number:04d}"


def brief(report: dict[str, Any]) -> str:
    """Return the few lines that a person wants to see."""
    low, high = report["ci95"]
    if "avg_len" in report:
        rates = " ".join(f"{100 * x:.1f}" for x in report["success_in_a_row"])
        score = (
            f"average length {report['avg_len']:.2f} [{low:.2f}, {high:.2f}], in a row % {rates}"
        )
        trials = counted(report["n_sequences"], "sequence")
    else:
        score = f"success {100 * report['success_rate']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        trials = counted(report["n_episodes"], "episode")
    random = " and ".join(report["untrained"])
    untrained = f"untrained, as asked for: {random} (random weights)\n" if random else ""
    errors = f", {report['n_errors']} ended by an error" if report["n_errors"] else ""
    return (
        f"{report['suite']} in {report['world']} {report['scene']}: {score}\n"
        f"{trials}{errors}; {report['clock']} clock, {report['steps_limit']} environment steps per "
        f"task, seed {report['seed']}\n{report['folder']}/report.html\n{untrained}"
    )
