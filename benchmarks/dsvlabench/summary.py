"""Episodes' results summed up, every rate with its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.dsvlabench.sequences import LENGTH
from benchmarks.dsvlabench.stats import chain_interval, wilson
from benchmarks.dsvlabench.suites import Suite
from benchmarks.playtable.tasks import TASK_NAMES

Result = Mapping[str, Any]
ERRORS_SHOWN = 20


def rate(successes: Sequence[bool]) -> dict[str, Any]:
    """Return a success rate with its 95 % Wilson interval; null without trials."""
    n, good = len(successes), sum(successes)
    return {
        "success_rate": good / n if n else None,
        "n_episodes": n,
        "n_success": good,
        "ci95": list(wilson(good, n)),
    }


def summarise(suite: Suite, results: Sequence[Result]) -> dict[str, Any]:
    """Return the scores of a suite.

    `success_rate` and `n_episodes`, or `avg_len`, `success_in_a_row` and `n_sequences`, each
    with `ci95`; `per_task` (of chains: of the attempts at it), `per_scene` and the groups.
    """
    found = _chains(results) if suite.is_chain else rate([r["success"] for r in results])
    found["per_task"] = _per_task(results)
    score = _chains if suite.is_chain else _rates
    found["per_scene"] = _grouped(results, lambda r: r["scene"], score)
    for group in sorted({name for r in results for name in r["groups"]}):
        found[f"per_{group}"] = _grouped(results, _place_in(group), score)
    broken = [{"key": r["key"], "error": r["error"]} for r in results if r["error"]]
    return found | {
        "n_errors": len(broken),
        "errors": broken[:ERRORS_SHOWN],
        "work": work(results),
        "timing": timing(results),
    }


def _place_in(group: str) -> Callable[[Result], str]:
    return lambda result: str(result["groups"][group])


def _rates(results: Sequence[Result]) -> dict[str, Any]:
    return rate([r["success"] for r in results])


def _chains(results: Sequence[Result]) -> dict[str, Any]:
    lengths = [int(r["in_a_row"]) for r in results]
    reached = [rate([n > k for n in lengths]) for k in range(LENGTH)]
    interval = list(chain_interval(lengths, LENGTH)) if lengths else None
    return {
        "avg_len": float(np.mean(lengths)) if lengths else None,
        "ci95": interval,
        "success_in_a_row": [row["success_rate"] for row in reached],
        "success_in_a_row_ci95": [row["ci95"] for row in reached],
        "n_sequences": len(lengths),
    }


def _per_task(results: Sequence[Result]) -> dict[str, Any]:
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        for row in result["tasks"]:
            rows.setdefault(row["task"], []).append(row)
    order = [name for name in TASK_NAMES if name in rows]
    return {name: _task(rows[name]) for name in order}


def _task(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    steps = [row["env_steps"] for row in rows if row["success"]]
    return rate([row["success"] for row in rows]) | {
        "median_steps": float(np.median(steps)) if steps else None
    }


def _grouped(
    results: Sequence[Result],
    key: Callable[[Result], str],
    score: Callable[[Sequence[Result]], dict[str, Any]],
) -> dict[str, Any]:
    names = list(dict.fromkeys(key(r) for r in results))
    return {name: score([r for r in results if key(r) == name]) for name in names}


def work(results: Sequence[Result]) -> dict[str, Any]:
    """What was computed, counted: the same on every machine."""
    rows = [row for r in results for row in r["tasks"]]
    ages = [row["latent_age_steps"]["mean"] for row in rows if row["latent_age_steps"]]
    oldest = [row["latent_age_steps"]["max"] for row in rows if row["latent_age_steps"]]
    samples = [sample for r in results for sample in r["drift"]]
    return {
        "tasks_attempted": len(rows),
        "env_steps": sum(row["env_steps"] for row in rows),
        "hold_steps": sum(row["hold_steps"] for row in rows),
        "plans": sum(row["plans"] for row in rows),
        "latents": sum(row["latents"] for row in rows),
        "latents_encoded": sum(row["encoded"] for row in rows),
        "latents_per_task": _mean([row["latents"] for row in rows]),
        "renders": sum(r["renders"] for r in results),
        "latent_age_steps": {"mean": _mean(ages), "max": max(oldest, default=None)},
        "drift": {
            "n": len(samples),
            "cosine_mean": _mean([cosine for _, cosine in samples]),
            "cosine_p05": float(np.quantile([c for _, c in samples], 0.05)) if samples else None,
            "age_steps_mean": _mean([age for age, _ in samples]),
        },
    }


def timing(results: Sequence[Result]) -> dict[str, Any]:
    """What it took on this machine.

    System 2's time for a task is that of all the latents which the schedule asked for, at what
    those that were computed took on average. `cpu_s_per_step` and `s2_cpu_s_per_latent` are
    the processor time of the process that ran the episodes: what another program on the machine
    does not change. They are null on the wall clock and where a GPU or a server does the work.
    """
    done = work(results)
    tasks, steps = done["tasks_attempted"], done["env_steps"] + done["hold_steps"]
    totals = {k: sum(r["timing"][k] for r in results) for k in ("wall_s", "s1_s", "s2_s")}
    cpu = {k: sum(r["timing"].get(k, 0.0) for r in results) for k in ("cpu_s", "s2_cpu_s")}
    call_s = totals["s2_s"] / done["latents_encoded"] if done["latents_encoded"] else None
    call_cpu_s = cpu["s2_cpu_s"] / done["latents_encoded"] if cpu["s2_cpu_s"] else None
    return {
        "episode_s_mean": _mean([r["timing"]["wall_s"] for r in results]),
        "s1_s_per_task": totals["s1_s"] / tasks if tasks else None,
        "s2_s_per_latent": call_s,
        "s2_s_per_task": call_s * done["latents_per_task"] if call_s else 0.0,
        "s2_cpu_s_per_latent": call_cpu_s,
        "s2_cpu_s_per_task": call_cpu_s * done["latents_per_task"] if call_cpu_s else None,
        "cpu_s_per_step": cpu["cpu_s"] / steps if steps and cpu["cpu_s"] else None,
        "steps_per_s": steps / totals["wall_s"] if totals["wall_s"] > 0 else None,
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
