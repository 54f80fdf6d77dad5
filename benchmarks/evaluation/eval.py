"""`openhelix eval`: how often a policy does what it is told."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openhelix.benchmarks.calvin.motions import PATTERNS
from openhelix.benchmarks.evaluation.evaluation import ROOT, Console, Plan, code_hash, evaluate
from openhelix.benchmarks.evaluation.metrics import served
from openhelix.benchmarks.evaluation.pool import open_pool
from openhelix.benchmarks.evaluation.report import write_reports
from openhelix.benchmarks.evaluation.results import REPORT, RUN, ResultsError, read_run
from openhelix.benchmarks.evaluation.runner import Conditions
from openhelix.benchmarks.evaluation.suites import CHAINS, SUITES, WORLDS, Suite
from openhelix.runtime.cli.arguments import Parser, parse, parser
from openhelix.runtime.core.config import (
    ConfigError,
    RunConfig,
    apply_overrides,
    read_yaml,
    validate,
)
from openhelix.system1.config import SHIPPED

DEFAULT_CONFIG = ROOT / "configs" / "run.yaml"
ENGINE = "openhelix.system2.engines.transformers:TransformersEngine"
TEXT_ENGINE, TEXT_CODE = "openhelix.system2.engines.text:TextEngine", "text.safetensors"
ENGINE_BASE = "openhelix.system2.engines.base:EngineBase"
FOLDER = Path("outputs") / "eval"


def arguments(command: str, description: str) -> Parser:
    """Return the options that `eval` and `sweep` share."""
    result = parser(command, description)
    add = result.add_argument
    add("--world", default="playtable", metavar="|".join(WORLDS))
    add("--scene", default="D", metavar="A..D", help="one or more: D, or ABC")
    add("--sequences", type=int, metavar="N", help="chains: the first N of CALVIN's 1000 (10)")
    add("--episodes-per-task", type=int, metavar="N", help="tasks, calvin-d: N a task (10)")
    add("--steps", type=int, default=360, metavar="LIMIT", help="environment steps a task (360)")
    add("--seed", type=int, default=0)
    add("--tasks", type=_words, default=(), metavar="TASK,...", help="only these tasks")
    add("--patterns", type=_words, default=PATTERNS, metavar="PATTERN,...", help="of calvin-d")
    add("--speeds", type=_words, default=("paper",), metavar="SPEED,...", help="paper, x2, m/s")
    add("--phrases", default="unseen", metavar="seen|unseen|all|FILE", help="of calvin-e")
    add("--workers", type=int, default=1, metavar="N", help="processes (1: this one)")
    add("--threads", type=int, default=1, metavar="N", help="torch threads of each (1)")
    add("--out", type=Path, metavar="DIR", help="results; an unfinished evaluation is continued")
    return result


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def main(argv: Sequence[str]) -> int:
    """Evaluate; 0 when all episodes have been run, whatever their success."""
    options, overrides = parse(_arguments(), argv)
    logging.basicConfig(level=logging.ERROR)
    plan = make_plan(options, overrides)
    folder = options.out or default_folder(plan, options.base)
    console = Console("eval")
    console.say(f"results in {folder}")
    pool = open_pool(plan.config, options.workers, plan.threads)
    try:
        with served(plan.config, console.say) as metrics:
            report = evaluate(plan, pool, folder, metrics.watch(plan, console))
    finally:
        pool.close()
    write_reports(report, folder)
    sys.stdout.write(json.dumps(report) + "\n" if options.json else brief(report))
    return 0


def _arguments() -> Parser:
    result = arguments("eval", __doc__ or "")
    result.add_argument("--suite", required=True, metavar="|".join(SUITES))
    result.add_argument("--clock", default="lockstep", metavar="lockstep|realtime")
    result.add_argument("--interval", type=int, metavar="N", help="System 2 every N steps (30)")
    result.add_argument("--latency", type=int, default=0, metavar="N", help="its delay in steps")
    result.add_argument("--drift", action="store_true", help="compare latents with fresh ones")
    result.add_argument(
        "--videos", type=_words, default=(), metavar="N|KEY,...", help="film N, or these, as D/7"
    )
    result.add_argument("--base", type=Path, default=FOLDER, help="where new folders are made")
    return result


def make_plan(options: Namespace, overrides: Sequence[str]) -> Plan:
    """Return the evaluation that the command line describes.

    Raises:
        ConfigError: in one line, the option and what is valid.
    """
    suite = make_suite(options, options.suite)
    for name in ("workers", "threads", "steps"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name}: {getattr(options, name)} is below 1")
    if options.clock not in ("lockstep", "realtime"):
        raise ConfigError(f"--clock: {options.clock!r} is none of lockstep, realtime")
    config = load_config(options.config, overrides, options)
    interval = config.interval_steps if options.interval is None else options.interval
    if interval < 1 or options.latency < 0:
        raise ConfigError("--interval must be at least 1, --latency at least 0")
    if options.clock == "realtime" and (options.interval or options.latency or options.drift):
        raise ConfigError(
            "--interval, --latency, --drift: belong to the lockstep clock; "
            "on the wall clock say system2.hz=HZ"
        )
    conditions = Conditions(options.steps, interval, options.latency, options.drift)
    return Plan(suite, conditions, config, options.threads, *_films(options.videos, suite))


def _films(words: Sequence[str], suite: Suite) -> tuple[int, tuple[str, ...]]:
    """Return how many episodes to film, and which ones besides."""
    if len(words) == 1 and words[0].isdecimal():
        return int(words[0]), ()
    keys = {episode.key for episode in suite.episodes()} if words else set()
    for word in words:
        if word not in keys:
            raise ConfigError(
                f"--videos: {word!r} is no number and no episode; {min(keys)!r} would be one"
            )
    return 0, tuple(words)


def make_suite(options: Namespace, name: str) -> Suite:
    """Return the suite that the options describe.

    Raises:
        ValueError: in one line, the option and what is valid.
    """
    chain = name in CHAINS
    count = options.sequences if chain else options.episodes_per_task
    unused = options.episodes_per_task if chain else options.sequences
    if name in SUITES and unused is not None and count is None:
        have, want = ("--episodes-per-task", "--sequences")[:: 1 if chain else -1]
        raise ConfigError(f"{have}: {name} takes {want}")
    return Suite(
        name=name,
        world=options.world,
        scenes=tuple(options.scene.replace(",", "")),
        count=10 if count is None else count,
        seed=options.seed,
        tasks=tuple(options.tasks),
        patterns=tuple(options.patterns),
        speeds=tuple(options.speeds),
        phrases=options.phrases,
    )


def load_config(path: Path | None, overrides: Sequence[str], options: Namespace) -> RunConfig:
    """Return the configuration of the run, with System 2 on transformers unless it is named.

    One request at a time is all that an episode asks for; transformers loads in a sixth of the
    time that vLLM takes and needs less of it for a batch of one.
    """
    data = read_yaml(path if path is not None else DEFAULT_CONFIG)
    data = apply_overrides(data, overrides)
    clock = getattr(options, "clock", "lockstep")
    if path is None and clock == "lockstep" and not any(map(_names_engine, overrides)):
        engine = data.get("system2", {}).get("engine", {})
        taken = _engine_options()
        kept = {k: v for k, v in engine.get("options", {}).items() if k in taken}
        data.setdefault("system2", {})["engine"] = {"target": ENGINE, "options": kept}
    if not any(map(_names_engine, overrides)):
        data = told_in_words(data)
    data = apply_overrides(
        data,
        [
            f"control.clock={clock}",
            f"robot.name={'sim' if options.world == 'playtable' else 'calvin'}",
            f"world.scene={options.scene[:1]}",
        ],
    )
    return validate(RunConfig, data)


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
    from openhelix.runtime.core.plugins import resolve

    return set(inspect.signature(resolve(ENGINE_BASE)).parameters) | {"device"}


def default_folder(plan: Plan, base: Path) -> Path:
    """Return the folder of this very evaluation if one was begun and not finished, or a new one."""
    identity = json.loads(json.dumps(plan.identity()))
    name = f"{plan.suite.name}-{''.join(plan.suite.scenes)}"
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
        trials = f"{report['n_sequences']} sequences"
    else:
        score = f"success {100 * report['success_rate']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        trials = f"{report['n_episodes']} episodes"
    errors = f", {report['n_errors']} broke off" if report["n_errors"] else ""
    return (
        f"{report['suite']} in {report['world']} {report['scene']}: {score}\n"
        f"{trials}{errors}; {report['clock']} clock, {report['steps_limit']} environment steps a "
        f"task, seed {report['seed']}\n{report['folder']}/report.html\n"
    )
