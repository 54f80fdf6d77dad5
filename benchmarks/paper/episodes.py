"""The episodes behind a page of results, kept beside it, and the page's figures recomputed of them.

`NAME.episodes.jsonl.gz` holds, for each evaluation of a table, a line that says what it is of, and
a line for each episode: its key, scene, start, groups, tasks in a row, success, whether it ended by
an error, and for each task its name, success, environment steps and steps held still. That is all
that scores, intervals and p stand on; times, films and paths of the machine are not among it. The
same episodes give the same bytes.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from openhelix.benchmarks.evaluation.results import chains, rates
from openhelix.benchmarks.evaluation.suites import CHAINS
from openhelix.benchmarks.paper import tables
from openhelix.benchmarks.paper.catalogue import Experiment
from openhelix.benchmarks.paper.judge import decide, judge, missing, of_two_trainings
from openhelix.benchmarks.paper.session import Kept, Session
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import replace_file

SUFFIX = ".episodes.jsonl.gz"
TASK = ("task", "success", "env_steps", "hold_steps")
EPISODE = ("key", "scene", "start", "groups", "in_a_row", "success")
ABOUT = ("suite", "steps_limit", "interval", "latency", "policy_sha256", "latents", "code")
RECOMPUTED = ("avg_len", "success_rate", "ci95", "success_in_a_row", "success_in_a_row_ci95")
COUNTED = ("n_sequences", "n_episodes", "n_starts", "n_errors")
TESTED = (
    *("score_a", "score_b", "n_pairs", "n_starts", "difference", "ci95", "p_difference"),
    *("p_same", "p_larger", "p", "shows", "verdict", "not_testable"),
)
Result = Mapping[str, Any]


def write_episodes(session: Session, experiment: Experiment, folder: Path) -> Path | None:
    """Keep the episodes of an experiment's finished evaluations; None where there is none."""
    lines: list[str] = []
    measures = {m.key: m for m in map(session.measure, (r for r in experiment.rows if r.variant))}
    for key, measure in measures.items():
        score = session.report(measure)
        if score is None:
            continue
        results = session.results(measure)
        about = {"evaluation": key, "episodes": len(results)} | {k: score[k] for k in ABOUT}
        lines += [_line(about), *(_line(_short(result)) for result in results)]
    if not lines:
        return None
    path = folder / f"{experiment.name}{SUFFIX}"
    replace_file(path, gzip.compress("".join(lines).encode(), mtime=0))
    return path


def _line(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False) + "\n"


def _short(result: Result) -> list[Any]:
    tasks = [[row[name] for name in TASK] for row in result["tasks"]]
    return [*(result[name] for name in EPISODE), result["error"] is not None, tasks]


def read_episodes(path: Path) -> dict[str, Kept]:
    """Return the evaluations that a file holds, by their key.

    Raises:
        ConfigError: it cannot be read, or is cut short; one line.
    """
    found: dict[str, Kept] = {}
    try:
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        while rows:
            about, rows = rows[0], rows[1:]
            n = int(about["episodes"])
            if len(rows) < n:
                raise ValueError("it is cut short")
            found[about["evaluation"]] = Kept(about, tuple(map(_long, rows[:n])))
            rows = rows[n:]
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise ConfigError(f"{path}: no episodes can be read: {error}") from None
    return found


def kept_in(folder: Path, names: Sequence[str]) -> dict[str, Kept]:
    """Return the evaluations that pages of a folder show and whose episodes it holds, by key.

    What was measured by older rules is not among them.

    Raises:
        ConfigError: episodes cannot be read; one line.
    """
    found: dict[str, Kept] = {}
    for name in names:
        page, path = tables.read(folder, name), folder / f"{name}{SUFFIX}"
        if page is None or tables.outdated(page) or not path.is_file():
            continue
        kept = read_episodes(path)
        for row in page["rows"]:
            if row["score"] is not None and row["evaluation"] in kept:
                found[row["evaluation"]] = replace(kept[row["evaluation"]], row=row)
    return found


def _long(row: Sequence[Any]) -> Result:
    *head, error, tasks = row
    return {
        **dict(zip(EPISODE, head, strict=True)),
        "error": "an error" if error else None,
        "tasks": [dict(zip(TASK, task, strict=True)) for task in tasks],
    }


def recomputed(
    experiment: Experiment, outcome: Mapping[str, Any], kept: Mapping[str, Kept]
) -> dict[str, Any]:
    """Return a page's `rows` (scores by id) and `contrasts`, made of the episodes alone.

    Args:
        experiment: whose claims are tested.
        outcome: the page as data, which says what evaluation each row shows.
        kept: from `read_episodes`.
    """
    rows = {r["id"]: r for r in outcome["rows"] if r["score"] is not None}
    place = {name: row["evaluation"] for name, row in rows.items()}
    scores = {}
    for name, key in place.items():
        results, chain = kept[key].results, kept[key].about["suite"] in CHAINS
        errors = sum(r["error"] is not None for r in results)
        scores[name] = (chains if chain else rates)(results) | {"n_errors": errors}
    base = None
    if experiment.base in scores:
        score = scores[experiment.base]
        base = float(score["avg_len"] if "avg_len" in score else score["success_rate"])
    contrasts = []
    for contrast in experiment.contrasts:
        if {contrast.a, contrast.b, experiment.base or contrast.a} <= set(place):
            a, b = (kept[place[name]] for name in (contrast.a, contrast.b))
            chain = a.about["suite"] in CHAINS
            twice = of_two_trainings(*(rows[name] for name in (contrast.a, contrast.b)))
            contrasts.append(judge(contrast, a.results, b.results, chain, base, twice))
        else:
            contrasts.append(missing(contrast))
    decide(contrasts)
    return {"rows": scores, "contrasts": contrasts}


def differences(
    experiment: Experiment, outcome: Mapping[str, Any], kept: Mapping[str, Kept]
) -> list[str]:
    """Return where a page says something else than its episodes, one line each."""
    made, found = recomputed(experiment, outcome, kept), []
    for row in outcome["rows"]:
        if row["score"] is not None:
            names = [n for n in (*RECOMPUTED, *COUNTED) if n in row["score"]]
            where = f"{experiment.name}: {row['id']}"
            found += _unlike(where, names, row["score"], made["rows"][row["id"]])
    printed = {(c["a"], c["b"], c["says"]): c for c in outcome["contrasts"]}
    for contrast in made["contrasts"]:
        where = f"{experiment.name}: {contrast['a']} and {contrast['b']}"
        page = printed.get((contrast["a"], contrast["b"], contrast["says"]), {})
        found += _unlike(where, [n for n in TESTED if n in contrast], page, contrast)
    return found


def _unlike(where: str, names: Sequence[str], page: Result, made: Result) -> list[str]:
    return [
        f"{where}: {name} is {page.get(name)} on the page, {made[name]} by the episodes"
        for name in names
        if not _alike(page.get(name), made[name])
    ]


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return bool(a == b)


def check(experiment: Experiment, outcome: Mapping[str, Any] | None, folder: Path) -> str:
    """Recompute a page of a folder of results; return what was done in a line.

    Raises:
        ConfigError: it differs from its episodes, or they cannot be read.
    """
    path = folder / f"{experiment.name}{SUFFIX}"
    if outcome is None or not path.is_file():
        return f"{experiment.name}: no episodes in {folder}"
    kept = read_episodes(path)
    lacks = {r["evaluation"] for r in outcome["rows"] if r["score"] is not None} - set(kept)
    if lacks:
        raise ConfigError(f"{path}: lacks the evaluation {min(lacks)}, which the page shows")
    tested = tuple(c for c in experiment.contrasts if _on(outcome, c.a, c.b))
    unlike = differences(experiment.model_copy(update={"contrasts": tested}), outcome, kept)
    if unlike:
        raise ConfigError(f"{len(unlike)} figures differ; {unlike[0]}")
    n = sum(len(k.results) for k in kept.values())
    rows = sum(r["score"] is not None for r in outcome["rows"])
    claims = sum("p_difference" in c for c in outcome["contrasts"])
    return f"{experiment.name}: {rows} rows and {claims} claims as {n} episodes give them"


def _on(outcome: Mapping[str, Any], a: str, b: str) -> bool:
    return any((c["a"], c["b"]) == (a, b) for c in outcome["contrasts"])
