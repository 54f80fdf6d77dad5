"""Asynchrony: what does an older goal cost?"""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders.dashboard import Dashboard

from openhelix.deploy.grafana.panels import board, curve, heat, lines, rows
from openhelix.deploy.grafana.promql import HERE, buckets, mean, quantile, rate, success

CELL = ["suite", "clock", "interval", "latency"]
AGES = "eval_latent_age_steps"
NAME = "{{instance}}"


def dashboard() -> Dashboard:
    """Return the dashboard."""
    return board(
        "openhelix-asynchrony",
        "OpenHelix: asynchrony",
        "Success and latent age by refresh interval, from sweeps and from running robots.",
        ("Robot", "openhelix_latent_period_seconds"),
        {"Sweeps: environment steps between latents": _sweeps(), "Running robots": _live()},
        since="now-6h",
    )


def _sweeps() -> list[Any]:
    age, steps = "mean age", "suffix: steps"
    none = "no sweep in this time range; `openhelix sweep` runs one"
    return [
        curve(
            "Success by interval",
            "All suites and latencies in the selected time range, with 95 % Wilson intervals.",
            "interval",
            *success("eval_attempts_total", "interval", here=False)[:3],
            empty=none,
        ),
        curve(
            "Latent age by interval",
            "Mean age of the latents used for planning, in environment steps.",
            "interval",
            (age, mean(AGES, "interval", here=False), steps),
            empty=none,
        ),
        rows(
            "Every combination",
            "On the wall clock, the latency is System 2's own.",
            CELL,
            *success("eval_attempts_total", ", ".join(CELL), here=False),
            (age, mean(AGES, ", ".join(CELL), here=False), steps),
            empty=none,
            width=24,
            height=12,
        ),
    ]


def _live() -> list[Any]:
    came = f"1 / ({rate('latents_received_total')} > 0)"
    return [
        lines(
            "Latent age and interval",
            "Median age of the latent in use, and the time between two latents.",
            "s",
            (quantile("latent_age_seconds", 0.5), f"age {NAME}"),
            (f"openhelix_latent_period_seconds{HERE}", f"requested interval {NAME}"),
            (came, f"actual interval {NAME}"),
        ),
        lines(
            "Success",
            "Over the last hour; the dashboard about success shows its interval.",
            "percentunit",
            (f"instance:openhelix_success:ratio1h{HERE}", NAME),
            top=1,
        ),
        lines(
            "Late latents",
            "Share of latents that arrive more than one period after their image.",
            "percentunit",
            (f"instance:openhelix_latents_late:ratio1m{HERE}", NAME),
            top=1,
            height=8,
        ),
        heat("Latent age", "Sampled at every tick.", "s", buckets("latent_age_seconds")),
    ]
