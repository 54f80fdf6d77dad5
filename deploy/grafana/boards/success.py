"""Success: how often is each task done, and how sure is that?"""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders.dashboard import Dashboard

from openhelix.deploy.grafana.panels import bars, board, figure, heat, lines, rows
from openhelix.deploy.grafana.promql import HERE, buckets, events, longer, mean, rate, success

CHAINS, EVAL_CHAINS = "chain_successes", "eval_chain_successes"
NO_EVAL = "no evaluation in this time range"
HOUR = "instance:openhelix_success"


def dashboard() -> Dashboard:
    """Return the dashboard."""
    return board(
        "openhelix-success",
        "OpenHelix: success",
        "Success by task with 95 % Wilson intervals, chains and episodes, for runs and evaluations.",
        ("Robot", "openhelix_tasks_total"),
        {"Overview": _now(), "Robots": _robots(), "Evaluations": _evaluations()},
        since="now-6h",
    )


def _now() -> list[Any]:
    rates, low, high, n = success("tasks_total")
    episodes = f"round({events('eval_episodes_total', here=False)})"
    return [
        figure(
            "Success",
            "Over all instructions in the selected time range.",
            "percentunit",
            (rates[1], "success"),
        ),
        figure(
            "95 % interval",
            "Wilson interval of the success rate.",
            "percentunit",
            (low[1], "from"),
            (high[1], "to"),
        ),
        figure("Attempts", "Instructions in the selected time range.", "none", (n[1], "attempts")),
        figure(
            "Tasks in a row",
            "Mean over finished sequences; CALVIN's have five instructions.",
            "none",
            (mean(CHAINS), "mean"),
        ),
        figure("Episodes", "Evaluated in the selected time range.", "none", (episodes, "episodes")),
        figure(
            "Episodes planned",
            "Of the running evaluation.",
            "none",
            ("openhelix_eval_episodes_planned", "{{suite}}"),
        ),
    ]


def _robots() -> list[Any]:
    rules = (
        ("ratio1h", "last hour"),
        ("wilson_low1h", "95 % from"),
        ("wilson_high1h", "to"),
        ("ratio1d", "last day"),
    )
    none = "no sequence ended in this time range"

    return [
        rows(
            "By task",
            "With 95 % Wilson intervals; unjudged instructions are left out.",
            ["task"],
            *success("tasks_total", "task"),
            height=12,
        ),
        lines(
            "Success over the last hour",
            "With its 95 % Wilson interval, and the last day's success; a panel for each robot.",
            "percentunit",
            *((f"{HOUR}:{rule}{HERE}", name) for rule, name in rules),
            height=12,
            top=1,
            band=("95 % from", "to"),
        ).repeat("instance"),
        bars(
            "Chains",
            "Share of sequences with at least this many tasks in a row.",
            "tasks",
            ("share", longer(CHAINS), "percentunit"),
            empty=none,
        ),
        heat(
            "Environment steps per success",
            "Steps under the policy's control.",
            "suffix: steps",
            buckets("task_env_steps"),
        ),
    ]


def _evaluations() -> list[Any]:
    chains = f"round({events(f'{EVAL_CHAINS}_count', 'suite', here=False)})"
    minute = f"60 * {rate('eval_episodes_total', 'suite, outcome', here=False)}"
    return [
        rows(
            "Evaluations by task",
            "All evaluations in the selected time range, with 95 % Wilson intervals.",
            ["suite", "task"],
            *success("eval_tasks_total", "suite, task", here=False),
            height=12,
            empty=NO_EVAL,
        ),
        lines(
            "Episodes per minute, by outcome",
            "error: aborted; counts as a failure.",
            "suffix: /min",
            (minute, "{{suite}} {{outcome}}"),
            empty=NO_EVAL,
            height=12,
        ),
        rows(
            "Average chain length",
            "CALVIN's measure.",
            ["suite"],
            ("tasks in a row", mean(EVAL_CHAINS, "suite", here=False), "none"),
            ("chains", chains, "none"),
            height=9,
            empty=NO_EVAL,
        ),
        bars(
            "Evaluation chains",
            "Share with at least this many tasks in a row; CALVIN's five rates.",
            "tasks",
            ("share", longer(EVAL_CHAINS, here=False), "percentunit"),
            empty=NO_EVAL,
        ),
    ]
