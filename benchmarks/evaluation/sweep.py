"""`openhelix sweep`: success against the age of the latent (paper Sec. 5.6).

    openhelix sweep --intervals 2,10,30,60 --latencies 0,10 --sequences 20 --workers 2
    openhelix sweep --clock realtime --intervals 10,30 --sequences 4
    openhelix sweep --delays 0,4,8,15 --intervals 30 --latencies 0 --suites calvin,calvin-d

Every cell of the sweep is an evaluation of its own, on the same episodes: System 2 refreshes
every `interval` environment steps and its latent arrives `latency` steps later. Beside the
score it reports the age of the latents behind the plans, their drift (cosine similarity to the
latent System 2 would give at that moment, measured on the first episodes of a cell) and System
2's cost per task, and how smoothly the arm was led. Finished cells are not run again. `--delays`
makes System 1 late as well: so many steps pass from an observation to the arrival of its chunk.

`--clock realtime` (or `both`) runs the same intervals on the wall clock, with System 2 in its own
process at `control.hz / interval` hertz. The latency is then that of this machine, and a rate
System 2 cannot sustain shows in the number of latents per task.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from openhelix.benchmarks.calvin.sequences import LENGTH
from openhelix.benchmarks.evaluation import plots
from openhelix.benchmarks.evaluation.eval import (
    SETTINGS,
    SuiteOptions,
    alike,
    check_options,
    load_config,
    make_suite,
    refuse_ignored,
)
from openhelix.benchmarks.evaluation.evaluation import Console, Evaluation, evaluate, open_pool
from openhelix.benchmarks.evaluation.metrics import EvalMetrics, served
from openhelix.benchmarks.evaluation.oracle import SEES
from openhelix.benchmarks.evaluation.pool import Pool
from openhelix.benchmarks.evaluation.report import (
    counted,
    html_table,
    image,
    interval,
    markdown_table,
    page,
)
from openhelix.benchmarks.evaluation.results import read_results, start_of
from openhelix.benchmarks.evaluation.runner import Conditions
from openhelix.benchmarks.evaluation.stats import paired_by_start
from openhelix.benchmarks.evaluation.suites import CHAINS, SUITES
from openhelix.runtime.cli.arguments import Numbers, Words, option, parse
from openhelix.runtime.control.assembly import check_delays
from openhelix.runtime.core.config import ConfigError, RunConfig
from openhelix.runtime.core.files import replace_file
from openhelix.runtime.core.output import answer
from openhelix.runtime.core.plugins import none_of
from openhelix.runtime.core.targets import written_spec
from openhelix.runtime.launch.graph import require_parts

# -- The report: tables, and for each suite a plot of success against the latent's age -

Cell = dict[str, Any]


def table_of(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return the cells of one suite as a table."""
    chain = "avg_len" in cells[0]
    header = [
        "sees",
        "join",
        "interval",
        "latency",
        "plan delay",
        "average length" if chain else "success %",
        "95 % interval",
        "against the first: difference",
        "p",
        "latent age, steps",
        "drift: cosine",
        "latents per task",
        "System 2, s per task",
        "of processor time",
    ]
    scale, digits = (1.0, 2) if chain else (100.0, 1)
    rows = []
    for c in cells:
        drift = c["drift"] or {}
        cosine, age = drift.get("cosine_mean"), c["latent_age_steps"]["mean"]
        rows.append(
            [
                c["sees"],
                c["join"],
                str(c["interval"]),
                *("its own" if c[k] is None else str(c[k]) for k in ("latency", "delay")),
                f"{scale * _score(c):.{digits}f}",
                interval(c["ci95"], scale, digits),
                f"{scale * c['against']['difference']:+.{digits}f}",
                f"{c['against']['p']:.3g}",
                "" if age is None else f"{age:.1f}",
                "" if cosine is None else f"{cosine:.3f}",
                f"{c['latents_per_task'] or 0:.1f}",
                f"{c['s2_s_per_task']:.2f}",
                "" if c.get("s2_cpu_s_per_task") is None else f"{c['s2_cpu_s_per_task']:.2f}",
            ]
        )
    return header, rows


def motion_table(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return how the arm was led in the cells of one suite, as a table."""
    header = [
        *("join", "interval", "latency", "plan delay", "steps to success", "held steps per task"),
        *("borders", "jump at a border, mm", "rad", "cut by limits", "jerk, m/s3"),
    ]
    rows = []
    for c in cells:
        moved = c["motion"]
        jump_m, turn, jerk = (moved[k] for k in ("jump_m", "jump_rad", "jerk_m_s3"))
        rows.append(
            [
                c["join"],
                str(c["interval"]),
                *("its own" if c[k] is None else str(c[k]) for k in ("latency", "delay")),
                "" if c["steps_to_success"] is None else f"{c['steps_to_success']:.0f}",
                f"{c['hold_steps_per_task']:.1f}",
                str(moved["borders"]),
                "" if jump_m is None else f"{1000 * jump_m:.2f}",
                "" if turn is None else f"{turn:.4f}",
                str(moved["limited"]),
                "" if jerk is None else f"{jerk:.2f}",
            ]
        )
    return header, rows


def _tables(cells: Sequence[Cell]) -> list[tuple[list[str], list[list[str]]]]:
    changed = change_table(cells)
    return [table_of(cells), motion_table(cells), *([changed] if changed else [])]


def change_table(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]] | None:
    """Return what became of changes of what is meant, as a table; None where none came."""
    header = [
        *("sees", "interval", "latency", "changes", "done after them", "%"),
        *("plan that knew: steps later, p50", "p90", "never"),
    ]
    rows = []
    for c in cells:
        if (came := c.get("changes")) is None:
            continue
        knew = c["reaction_steps"]
        steps = ["" if knew[k] is None else str(knew[k]) for k in ("p50", "p90")]
        latency = "its own" if c["latency"] is None else str(c["latency"])
        share = 100.0 * came["succeeded"] / came["n"]
        done = [str(came["n"]), str(came["succeeded"]), f"{share:.0f}"]
        rows.append([c["sees"], str(c["interval"]), latency, *done, *steps, str(knew["never"])])
    return (header, rows) if rows else None


def _score(c: Cell) -> float:
    return float(c["avg_len"] if "avg_len" in c else c["success_rate"])


def suites_of(report: Mapping[str, Any]) -> dict[str, list[Cell]]:
    """Return the cells by suite and clock."""
    found: dict[str, list[Cell]] = {}
    for c in report["cells"]:
        name = c["suite"] + ("" if c["clock"] == "lockstep" else " on the wall clock")
        found.setdefault(name, []).append(c)
    return found


def note(report: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    """Return what a table's scores depend on, in one sentence."""
    trials = int(cells[0].get("n_sequences") or cells[0].get("n_episodes") or 0)
    kind = "sequence" if "avg_len" in cells[0] else "episode"
    return (
        f"{counted(trials, kind)} a cell, {cells[0]['clock']} clock, at most {report['steps_limit']} "
        f"environment steps per task, {report['world']} scene {report['scene']}, seed "
        f"{report['seed']}; interval and latency in environment steps of 1/30 s."
    )


def weights(report: Mapping[str, Any]) -> str:
    """Return in one sentence what was measured."""
    policy, system2 = report["policy"], report["system2"]
    text = f"Policy `{policy['checkpoint'] or 'untrained'}` (hash {policy['sha256']})"
    if not system2:
        return f"{text}, without System 2."
    # On the wall clock System 2 is in another process, which does not say.
    return text + (f", latents {system2['spec_id']}." if system2["spec_id"] else ".")


def to_markdown(report: Mapping[str, Any], pictures: bool = False) -> str:
    """Return the sweep as Markdown, with the pictures that lie beside it or without."""
    parts = ["# Asynchrony sweep\n", weights(report) + "\n"]
    parts += [f"Again: `{report['command']}`\n"] if "command" in report else []
    for name, cells in suites_of(report).items():
        parts += [f"## {name}\n", note(report, cells) + "\n"]
        stems = _stems(name, cells) if pictures else []
        parts += [f"![{stem}]({stem}.png)\n" for stem in stems]
        parts += map(markdown_table, _tables(cells))
    return "\n".join(parts)


def _delayed(cells: Sequence[Cell]) -> bool:
    """Whether the cells of one suite differ in System 1's own delay."""
    return len({c["delay"] for c in cells} - {None}) > 1


def _stems(name: str, cells: Sequence[Cell]) -> list[str]:
    """Return the files of a suite's plots without their endings."""
    stem = name.replace(" ", "-")
    return [stem, f"{stem}-motion"] if _delayed(cells) else [stem]


def drawings(name: str, cells: Sequence[Cell]) -> dict[str, plots.Drawing]:
    """Return the plots of a suite by their files, without endings."""
    made = [plot(name, cells), *([motion_plot(name, cells)] if _delayed(cells) else [])]
    return dict(zip(_stems(name, cells), made, strict=True))


def command_again(argv: Sequence[str]) -> str:
    """Return what to call to have a sweep's figures again, without places and workers."""
    left = [word for word in argv if not word.startswith("output.")]
    for name in ("--out", "--results", "--workers"):
        while name in left:
            at = left.index(name)
            del left[at : at + 2]
    return shlex.join(["openhelix", "sweep", *left])


def to_keep(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report without the places that only this machine knows."""
    cells = [{k: v for k, v in cell.items() if k != "folder"} for cell in report["cells"]]
    return {**report, "cells": cells}


def plot(name: str, cells: Sequence[Cell]) -> plots.Drawing:
    """Return score against the time between two latents, one line a latency.

    With several delays of System 1's own it is score against that delay.
    """
    chain = "avg_len" in cells[0]
    scale = 1.0 if chain else 100.0
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    along = "delay" if _delayed(cells) else "interval"
    for c in cells:
        low, high = c["ci95"]
        point = (c[along] * STEP_S, scale * _score(c), scale * low, scale * high)
        series.setdefault(_line(c, cells), []).append(point)
    counts = [int(c.get("n_sequences") or c.get("n_episodes") or 0) for c in cells]
    what, bars = ("chains", plots.BOOTSTRAP) if chain else ("episodes", plots.WILSON)
    return plots.lines(
        series,
        "time from one latent to the next (s)"
        if along == "interval"
        else "time from an observation to its plan (s)",
        "tasks in a row" if chain else "success (%)",
        f"{name}: success against asynchrony",
        f"{plots.trials(counts, what)}; bars: {bars}",
        sorted({c[along] * STEP_S for c in cells}),
        5.0 if chain else 100.0,
        even=along == "delay",
    )


def _line(c: Cell, cells: Sequence[Cell]) -> str:
    """Return the name of the line that a cell is on: what tells it from those of other lines."""
    late = "its own latency"
    if c["latency"] is not None:
        late = f"arrives {c['latency'] * STEP_S:.2g} s later"
    line = late if {other["sees"] for other in cells} == {"image"} else f"{c['sees']}, {late}"
    joins = len({other["join"] for other in cells}) > 1
    if _delayed(cells):
        if joins and len({(o["sees"], o["interval"], o["latency"]) for o in cells}) == 1:
            return str(c["join"])
        line = f"a latent every {c['interval'] * STEP_S:.2g} s, {line}"
    elif c["delay"]:
        line = f"{line}, plans {c['delay'] * STEP_S:.2g} s late"
    return f"{c['join']}: {line}" if joins else line


def motion_plot(name: str, cells: Sequence[Cell]) -> plots.Drawing:
    """Return how the arm was led against System 1's own delay; see `motion_table`."""
    parts: dict[str, Callable[[Cell], float | None]] = {
        "steps to success": lambda c: c["steps_to_success"],
        "held steps per task": lambda c: c["hold_steps_per_task"],
        "jerk (m/s3)": lambda c: c["motion"]["jerk_m_s3"],
        "jump at a border (mm)": lambda c: _times(1000, c["motion"]["jump_m"]),
        "turn at a border (mrad)": lambda c: _times(1000, c["motion"]["jump_rad"]),
        "borders cut by limits (%)": lambda c: _times(
            100, c["motion"]["limited"] / c["motion"]["borders"] if c["motion"]["borders"] else None
        ),
    }
    drawn: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for what, value in parts.items():
        for c in cells:
            if (y := value(c)) is not None:
                line = drawn.setdefault(what, {}).setdefault(_line(c, cells), [])
                line.append((c["delay"] * STEP_S, y))
    counts = [int(c.get("n_sequences") or c.get("n_episodes") or 0) for c in cells]
    return plots.panels(
        drawn,
        "from an observation to its plan (s)",
        f"{name}: how the arm was led",
        plots.trials(counts, "chains" if "avg_len" in cells[0] else "episodes"),
        sorted({c["delay"] * STEP_S for c in cells}),
    )


def _times(scale: float, value: float | None) -> float | None:
    return None if value is None else scale * value


def write(report: Mapping[str, Any], folder: Path, kept: bool = False) -> None:
    """Write the sweep as JSON, Markdown and a plot a suite; with HTML if it is not to be kept."""
    body: list[str] = []
    for name, cells in suites_of(report).items():
        body.append(f"<h2>{name}</h2><p>{note(report, cells)}</p>")
        for stem, picture in drawings(name, cells).items():
            for file, data in picture.files(stem).items():
                replace_file(folder / file, data)
            body.append(image(picture.svg, "svg+xml"))
        body += map(html_table, _tables(cells))
    replace_file(folder / "sweep.json", json.dumps(report, indent=1).encode() + b"\n")
    replace_file(folder / "sweep.md", to_markdown(report, pictures=True).encode())
    if not kept:
        replace_file(folder / "sweep.html", page("Asynchrony sweep", body).encode())


# -- The sweep -------------------------------------------------------------------------

STEP_S = 1 / 30  # CALVIN's environment step
INTERVALS = (1, 2, 5, 10, 20, 30, 60)
LATENCIES = (0, 6, 15)  # 0, 0.2 and 0.5 s at 30 Hz
SUITES_SWEPT = ("calvin", "calvin-d")
FOLDER = Path("outputs") / "sweep"
CLOCKS = ("lockstep", "realtime", "both")
JOINS = ("blend", "inpaint", "prefix")
DRIFT_COUNT = 1  # of the count, the part on which drift is measured
SHARED = ("world", "scene", "seed", "steps_limit", "policy", "system2")  # by all cells
PoolFor = Callable[[RunConfig], Pool]


class SweepOptions(SuiteOptions):
    """Options of `sweep`; what is evaluated is `RunConfig`."""

    suites: Words = option(SUITES_SWEPT, "suites to evaluate", "SUITE,...")
    intervals: Numbers = option(INTERVALS, "System 2 every N steps", "N,...")
    latencies: Numbers = option(LATENCIES, "latency of its latents in steps", "N,...")
    delays: Numbers = option((0,), "System 1's own delay in steps (0)", "N,...")
    joins: Words = option((), "rows: how plans are joined", "|".join(JOINS))
    sees: Words = option(("image",), "rows: what System 2 is shown", "|".join(SEES))
    clock: str = option("lockstep", "which clock (lockstep)", "|".join(CLOCKS))
    results: Path | None = option(None, "write the finished sweep here too, to keep", "DIR")
    drift_sequences: int = option(3, "chains to measure drift on (3)", "N")


def read(argv: Sequence[str]) -> tuple[SweepOptions, list[str]]:
    """Return the options and overrides of a command line."""
    return alike(*parse("sweep", SweepOptions, argv, __doc__ or "", RunConfig, SETTINGS))


def main(argv: Sequence[str]) -> int:
    """Measure success against the age of the latent.

    0 when all cells have been run.
    """
    options, overrides = read(argv)
    logging.basicConfig(level=logging.ERROR)
    plans = make_plans(options, overrides)
    folder = options.out or FOLDER
    console, pools = Console("sweep"), Pools(options.workers, options.threads)
    try:
        with served(plans[0].config, console.say) as metrics:
            drift = options.drift_sequences
            report = sweep(plans, pools, folder, drift, console, metrics)
            report["command"] = command_again(argv)
    finally:
        pools.close()
    write(report, folder)
    if options.results is not None:
        options.results.mkdir(parents=True, exist_ok=True)
        write(to_keep(report), options.results, kept=True)
    answer(json.dumps(report) if options.as_json else to_markdown(report))
    return 0


class Pools:
    """The pool that a cell needs; one stays open while the next cell can use it too.

    Lockstep cells share one. On the wall clock the cadence is part of the configuration, and
    episodes run one after the other whatever the number of workers.
    """

    def __init__(self, workers: int, threads: int = 1) -> None:
        self._workers, self._threads = workers, threads
        self._config: RunConfig | None = None
        self._pool: Pool | None = None

    def __call__(self, config: RunConfig) -> Pool:
        """Return a pool for cells of this configuration."""
        if self._pool is None or config != self._config:
            self.close()
            workers = 1 if config.control.clock == "realtime" else self._workers
            self._config, self._pool = config, open_pool(config, workers, self._threads)
        return self._pool

    def close(self) -> None:
        """Release everything."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def make_plans(options: SweepOptions, overrides: Sequence[str]) -> list[Evaluation]:
    """Return one evaluation a cell.

    Raises:
        ConfigError: in one line, the option and what is valid.
    """
    least = min((*options.latencies, *options.delays), default=-1)
    if min(options.intervals, default=0) < 1 or least < 0 or not options.delays:
        raise ConfigError("--intervals must be at least 1, --latencies and --delays at least 0")
    for name in options.suites:
        if name not in SUITES:
            raise ConfigError(f"--suites: {none_of(name, SUITES)}")
    if options.clock not in CLOCKS:
        raise ConfigError(f"--clock: {none_of(options.clock, CLOCKS)}")
    check_options(options, options.suites)
    for name in {"latencies", "delays"} & options.model_fields_set:
        if options.clock == "realtime" and any(getattr(options, name)):
            raise ConfigError(
                f"--{name}: belong to the lockstep clock; on the wall clock they are the systems' own"
            )
    clocks = CLOCKS[:2] if options.clock == "both" else (options.clock,)
    refuse_ignored(overrides, options, options.clock)
    plans: list[Evaluation] = []
    for name in options.joins:
        if name not in JOINS:
            raise ConfigError(f"--joins: {none_of(name, JOINS)}")
    for clock, sees, join in product(clocks, options.sees, options.joins or (None,)):
        config = load_config(
            overrides,
            options.config,
            world=options.world,
            scene=options.scene,
            clock=clock,
            sees=sees,
        )
        if join is not None:
            system1 = config.system1.model_copy(update={"join": join})
            config = config.model_copy(update={"system1": system1})
        require_parts(config)
        check_delays("--delays", options.delays, config, written_spec(config.system1.policy))
        for name in options.suites:
            # Chains are CALVIN's own: a choice of tasks is for the other suites swept.
            chosen = {"tasks": ()} if name in CHAINS and len(options.suites) > 1 else {}
            suite = make_suite(options.model_copy(update=chosen), name)
            # On the wall clock latency and delay are the systems' own.
            late = product(options.delays, options.latencies) if clock == "lockstep" else ((0, 0),)
            for (delay, latency), steps in product(late, options.intervals):
                conditions = Conditions(options.steps, steps, latency, delay=delay)
                here = _at(config, steps)
                plans.append(Evaluation(suite, conditions, here, options.threads, sees))
    return plans


def _at(config: RunConfig, interval: int) -> RunConfig:
    """Return the configuration in which System 2 has this cadence; lockstep's is a condition."""
    if config.control.clock == "lockstep":
        return config
    system2 = config.system2.model_copy(update={"hz": config.control.hz / interval})
    return config.model_copy(update={"system2": system2})


def sweep(
    plans: Sequence[Evaluation],
    pools: PoolFor,
    folder: Path,
    drift_count: int,
    console: Console,
    metrics: EvalMetrics | None = None,
) -> dict[str, Any]:
    """Run every cell; return the table of cells with what they are compared to.

    Args:
        plans: the cells.
        pools: returns what runs the episodes of a configuration.
        folder: holds one folder a cell.
        drift_count: sequences, or a hundredth of it episodes per task, on which drift is measured.
        console: told of the progress.
        metrics: counts the episodes.
    """
    metrics = metrics or EvalMetrics()
    cells: list[Cell] = []
    for number, plan in enumerate(plans, 1):
        place = folder / "cells" / name_of(plan)
        console.say(f"cell {number} of {len(plans)}: {place.name}")
        pool = pools(plan.config)
        report = evaluate(plan, pool, place, metrics.watch(plan, Console("sweep")))
        measured = drift_count > 0 and plan.config.control.clock == "lockstep"
        drift = _drift(plan, pool, folder, drift_count) if measured else None
        cells.append(cell(report, plan.conditions.interval) | {"drift": drift})
        _compare(cells)
    first = dict(cells[0])
    return {key: first[key] for key in SHARED} | {
        "cells": [{k: v for k, v in c.items() if k not in SHARED} for c in cells]
    }


def _drift(plan: Evaluation, pool: Pool, folder: Path, count: int) -> dict[str, Any]:
    """Measure drift on a few episodes of a cell, apart from its score and its timing."""
    few = min(plan.suite.count, count if plan.suite.is_chain else DRIFT_COUNT)
    small = replace(
        plan,
        suite=replace(plan.suite, count=few),
        conditions=replace(plan.conditions, drift=True),
    )
    return dict(evaluate(small, pool, folder / "drift" / name_of(plan))["work"]["drift"])


def name_of(plan: Evaluation) -> str:
    """Return a cell's name: suite, row, interval, latency, delay; on the wall clock "wall"."""
    interval, latency = plan.conditions.interval, f"d{plan.conditions.latency:02d}"
    latency += f"-p{plan.conditions.delay:02d}" if plan.conditions.delay else ""
    wall = plan.config.control.clock == "realtime"
    name = plan.suite.name + ("-changing" if plan.suite.changing else "")
    name += "-plain" if plan.suite.plain else ""
    row = "" if plan.sees == "image" else f"-{plan.sees}"
    join = plan.config.system1.join
    row += "" if join == "blend" else f"-{join}"
    return f"{name}{row}-i{interval:02d}-{'wall' if wall else latency}"


def cell(report: Mapping[str, Any], interval: int) -> Cell:
    """Return the line of the table that an evaluation at this cadence gives."""
    if "avg_len" in report:
        score = {k: report[k] for k in ("avg_len", "ci95", "success_in_a_row", "n_sequences")}
    else:
        score = {k: report[k] for k in ("success_rate", "ci95", "n_episodes")}
        score |= {k: report[k] for k in ("per_pattern", "per_speed") if k in report}
    return {
        **{
            key: report[key]
            for key in ("suite", "sees", "clock", "latency", "delay", "join", "hz2", *SHARED)
        },
        "interval": interval,
        **score,
        "n_errors": report["n_errors"],
        "latent_age_steps": report["work"]["latent_age_steps"],
        "latents_per_task": report["work"]["latents_per_task"],
        "hold_steps_per_task": report["work"]["hold_steps"] / report["work"]["tasks_attempted"],
        "steps_to_success": report["work"]["steps_to_success"],
        "motion": report["work"]["motion"],
        **{k: report["work"][k] for k in ("changes", "reaction_steps") if k in report["work"]},
        "s2_s_per_task": report["timing"]["s2_s_per_task"],
        "s2_cpu_s_per_task": report["timing"].get("s2_cpu_s_per_task"),
        "folder": report["folder"],
    }


def _compare(cells: Sequence[Cell]) -> None:
    """Compare the newest cell with the first one of its suite and clock, episode by episode."""
    now = cells[-1]
    base = next(c for c in cells if (c["suite"], c["clock"]) == (now["suite"], now["clock"]))
    a, b = (read_results(Path(c["folder"])) for c in (base, now))
    what, most = ("in_a_row", float(LENGTH)) if "avg_len" in now else ("success", 1.0)
    starts = [start_of(r) for r in a]
    test = paired_by_start([r[what] for r in a], [r[what] for r in b], starts, most)
    now["against"] = {
        "interval": base["interval"],
        "latency": base["latency"],
        "delay": base["delay"],
        "join": base["join"],
        "difference": test.difference,
        "ci95": list(test.ci95),
        "p": test.p,
        "test": test.test,
        "starts": test.starts,
        "shows": test.shows(),
    }
