"""`evaluate`: a policy's scores as an object, from the same code as `openhelix eval`."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openhelix.benchmarks.evaluation.eval import FOLDER, EvalOptions, brief, default_folder
from openhelix.benchmarks.evaluation.eval import make_plan as plan_of
from openhelix.benchmarks.evaluation.evaluation import Console, Evaluation, open_pool
from openhelix.benchmarks.evaluation.evaluation import evaluate as run_plan
from openhelix.benchmarks.evaluation.pool import LocalPool
from openhelix.benchmarks.evaluation.report import write_reports
from openhelix.benchmarks.evaluation.results import read_results
from openhelix.runtime.core.config import ConfigError, EnginePart, PolicyPart, validate
from openhelix.runtime.core.interfaces import Engine, Policy, check_engine, check_policy

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, slots=True)
class Score:
    """A rate, or an average length, with its 95 % interval (Wilson's; bootstrap for a length)."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n = {self.n}"


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The result of an evaluation.

    Attributes:
        folder: where it is kept, with report.html.
        report: all that `openhelix eval --json` prints.
        episodes: one row per episode, in the suite's order.
    """

    folder: Path
    report: Mapping[str, Any]
    episodes: Sequence[Mapping[str, Any]]

    @property
    def score(self) -> Score:
        """Success rate; of chains the average number of tasks in a row."""
        low, high = self.report["ci95"]
        if "avg_len" in self.report:
            return Score(self.report["avg_len"], low, high, self.report["n_sequences"])
        return Score(self.report["success_rate"], low, high, self.report["n_episodes"])

    @property
    def per_task(self) -> dict[str, Score]:
        """Success rate by task; in chains of the attempts at it."""
        return {name: _score(row) for name, row in self.report["per_task"].items()}

    @property
    def in_a_row(self) -> list[Score]:
        """Of chains: the share that did at least 1, 2, … 5 tasks; empty for single tasks."""
        if "avg_len" not in self.report:
            return []
        rates, limits = self.report["success_in_a_row"], self.report["success_in_a_row_ci95"]
        n = self.report["n_sequences"]
        return [Score(x, low, high, n) for x, (low, high) in zip(rates, limits, strict=True)]

    def to_pandas(self) -> pandas.DataFrame:
        """Return one row per attempt at a task: episode, scene, task, instruction, success, ….

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError:
            raise ImportError("to_pandas: pandas is not installed: pip install pandas") from None
        rows = [
            {"episode": e["key"], "scene": e["scene"], **e["groups"], **_plain(row)}
            for e in self.episodes
            for row in e["tasks"]
        ]
        return pandas.DataFrame(rows)

    def __str__(self) -> str:
        return brief(dict(self.report)).rstrip()


def evaluate(
    policy: Policy | str | Path = "shipped",
    system2: Engine | str | Path | None = None,
    *,
    suite: str = "tasks",
    settings: Sequence[str] = (),
    out: Path | str | None = None,
    quiet: bool = True,
    **options: Any,
) -> EvalResult:
    """Evaluate a policy with its System 2; `openhelix eval` from Python.

    Args:
        policy: an object (`openhelix.Policy`), "shipped", a checkpoint folder, or the
            `"module:Class"` of a policy without arguments.
        system2: an object (`openhelix.Engine`), a file with `<ACT>` and projector, or
            `"module:Class"`; None takes the shipped one. Not used by a policy without latents.
        suite: what is asked: tasks, calvin, calvin-e, calvin-d.
        settings: `section.field=value` of the run, as on the command line.
        out: folder of the results; None makes one below `outputs/eval`. An evaluation that was
            interrupted goes on there, unless an object was evaluated, which nothing identifies.
        quiet: whether to say nothing of the progress.
        options: the command's options: scene, tasks, episodes_per_task, sequences, steps, seed,
            workers, interval, latency, ….

    Raises:
        ValueError: in one line, the option or setting and what is valid.
    """
    made = validate(EvalOptions, {"suite": suite, "out": out, **_listed(options)})
    try:
        plan = plan_of(made, settings)
    except ValueError as error:
        raise ConfigError(_without_dashes(str(error))) from None
    if not isinstance(policy, str | Path):
        check_policy(policy)
    if not isinstance(system2, str | Path | None):
        check_engine(system2)
    objects = {"policy": None, "engine": None}
    if isinstance(policy, str | Path):
        if policy != "shipped":
            plan = _with_policy(plan, str(policy))
    else:
        plan, objects["policy"] = _stamped(plan, "system1", policy), policy  # type: ignore[assignment]
    if isinstance(system2, str | Path):
        plan = _with_system2(plan, str(system2))
    elif system2 is not None:
        plan, objects["engine"] = _stamped(plan, "system2", system2), system2  # type: ignore[assignment]
    held = any(part is not None for part in objects.values())
    if held and (made.workers != 1 or made.clock != "lockstep"):
        raise ConfigError(
            "workers, clock: an object is evaluated in this process, on the lockstep clock; "
            "for others name a folder or 'module:Class'"
        )
    folder = Path(out) if out is not None else default_folder(plan, FOLDER)
    pool = (
        LocalPool(plan.config, plan.threads, **objects)
        if held
        else open_pool(plan.config, made.workers, plan.threads)
    )
    try:
        report = run_plan(plan, pool, folder, None if quiet else Console("evaluate"))
    finally:
        pool.close()
    results = read_results(folder)
    write_reports(report, folder, results)
    return EvalResult(folder, report, results)


def _with_policy(plan: Evaluation, name: str) -> Evaluation:
    if ":" in name:
        part = PolicyPart(target=name)
    else:
        part = PolicyPart(options={**plan.config.system1.policy.options, "path": name})
    return _changed(plan, "system1", policy=part)


def _with_system2(plan: Evaluation, name: str) -> Evaluation:
    engine = plan.config.system2.engine
    if ":" in name:
        return _changed(plan, "system2", engine=EnginePart(target=name))
    options = {**engine.options, "latent_projector": name}
    return _changed(plan, "system2", engine=EnginePart(target=engine.target, options=options))


def _stamped(plan: Evaluation, section: str, part: object) -> Evaluation:
    """Note an object in the identity of the results: no two are taken for the same."""
    kind = type(part)
    target = f"{kind.__module__}:{kind.__name__}"
    options = {"object": uuid.uuid4().hex}
    if section == "system1":
        return _changed(plan, section, policy=PolicyPart(target=target, options=options))
    return _changed(plan, section, engine=EnginePart(target=target, options=options))


def _changed(plan: Evaluation, section: str, **update: Any) -> Evaluation:
    part = getattr(plan.config, section).model_copy(update=update)
    return replace(plan, config=plan.config.model_copy(update={section: part}))


def _listed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Take a list, a tuple or one word where several words may stand."""
    many = ("tasks", "patterns", "speeds", "videos")
    return {
        name: tuple(value) if name in many and not isinstance(value, str) else value
        for name, value in options.items()
    }


def _without_dashes(text: str) -> str:
    """Return a complaint about `--episodes-per-task` as one about `episodes_per_task`."""
    return re.sub(r"--([a-z][a-z-]*)", lambda found: found[1].replace("-", "_"), text)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not isinstance(value, dict | list)}


def _score(row: Mapping[str, Any]) -> Score:
    low, high = row["ci95"]
    return Score(row["success_rate"], low, high, row["n_episodes"])
