"""Success: how often is each task done, and how sure is that?"""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders.dashboard import Dashboard

from openhelix.deploy.grafana.panels import bars, board, figure, heat, lines, rows
from openhelix.deploy.grafana.promql import HERE, buckets, events, longer, mean, rate, success

CHAINS, EVAL_CHAINS = "chain_successes", "eval_chain_successes"
HOUR = "instance:openhelix_success"


def dashboard() -> Dashboard:
    """Return the dashboard."""
    return board(
        "openhelix-success",
        "OpenHelix: success",
        "Success by task with its 95 % Wilson interval, chains, episodes; runs and evaluations.",
        ("Robot", "openhelix_tasks_total"),
        {"All in all": _now(), "Robots": _robots(), "Evaluations": _evaluations()},
        since="now-6h",
    )


def _now() -> list[Any]:
    rates, low, high, n = success("tasks_total")
    episodes = f"round({events('eval_episodes_total', here=False)})"
    return [
        figure(
            "Success",
            "Of all instructions in the time shown.",
            "percentunit",
            (rates[1], "success"),
        ),
        figure(
            "95 % interval",
            "Wilson's, of the attempts beside it.",
            "percentunit",
            (low[1], "from"),
            (high[1], "to"),
        ),
        figure("Attempts", "Instructions in the time shown.", "none", (n[1], "attempts")),
        figure(
            "Tasks in a row",
            "Mean of the lists that were finished; CALVIN's have five instructions.",
            "none",
            (mean(CHAINS), "mean"),
        ),
        figure("Episodes", "Evaluated in the time shown.", "none", (episodes, "episodes")),
        figure(
            "Episodes planned",
            "Of the evaluation that runs.",
            "none",
            ("openhelix_eval_episodes_planned", "{{suite}}"),
        ),
    ]


def _robots() -> list[Any]:
    rules = (
        ("ratio1h", "last hour"),
        ("wilson_low1h", "from"),
        ("wilson_high1h", "to"),
        ("ratio1d", "last day"),
    )
    return [
        rows(
            "By task",
            "95 % Wilson interval; instructions that nobody judges are left out.",
            ["task"],
            *success("tasks_total", "task"),
            height=12,
        ),
        lines(
            "Success of the last hour",
            "With its 95 % Wilson interval, beside the last day's.",
            "percentunit",
            *((f"{HOUR}:{rule}{HERE}", f"{name} {{{{instance}}}}") for rule, name in rules),
            height=12,
            top=1,
        ),
        bars(
            "Chains",
            "Share of the lists of instructions with more than so many successes in a row.",
            "le",
            ("share", longer(CHAINS), "percentunit"),
        ),
        heat(
            "Environment steps of a success",
            "Under the policy's control.",
            "none",
            buckets("task_env_steps"),
        ),
    ]


def _evaluations() -> list[Any]:
    chains = f"round({events(f'{EVAL_CHAINS}_count', 'suite', here=False)})"
    minute = f"60 * {rate('eval_episodes_total', 'suite, outcome', here=False)}"
    return [
        rows(
            "By task, evaluations",
            "Of all evaluations in the time shown; 95 % Wilson interval.",
            ["suite", "task"],
            *success("eval_tasks_total", "suite, task", here=False),
            height=12,
        ),
        lines(
            "Episodes a minute, by outcome",
            "error: broke off; it counts as a failure.",
            "none",
            (minute, "{{suite}} {{outcome}}"),
            height=12,
        ),
        rows(
            "Average length of chains",
            "CALVIN's measure.",
            ["suite"],
            ("tasks in a row", mean(EVAL_CHAINS, "suite", here=False), "none"),
            ("chains", chains, "none"),
            height=9,
        ),
        bars(
            "Chains of evaluations",
            "Share with more than so many successes in a row; CALVIN's five rates.",
            "le",
            ("share", longer(EVAL_CHAINS, here=False), "percentunit"),
        ),
    ]
