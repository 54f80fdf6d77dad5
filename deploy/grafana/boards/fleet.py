"""Fleet: how many robots hang on one System 2, and is it full?"""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders.dashboard import Dashboard

from openhelix.deploy.grafana.panels import board, figure, heat, lines, rows
from openhelix.deploy.grafana.promql import HERE, buckets, events, rate

NAME = "{{instance}}"
BUSY = f"instance:openhelix_system2_busy:ratio1m{HERE}"
SKIPPED = f"instance:openhelix_system2_skipped:ratio1m{HERE}"
ROBOTS, QUEUE = f"openhelix_system2_robots{HERE}", f"openhelix_system2_queue{HERE}"
PUBLISHED = rate("system2_published_total")


def dashboard() -> Dashboard:
    """Return the dashboard."""
    return board(
        "openhelix-fleet",
        "OpenHelix: fleet",
        "Robots per System 2, its queue, what it sheds, and who is not served.",
        ("System 2", "openhelix_system2_robots"),
        {
            "Now": _now(),
            "Load": _load(),
            "Robots": _robots(),
            "Turned away": _turned_away(),
            "Engine": _engine(),
        },
    )


def _now() -> list[Any]:
    shed = f"round({events('system2_shed_total', 'instance')})"
    return [
        figure("Robots", "That System 2 serves.", "none", (ROBOTS, NAME)),
        figure("Latents", "Published, a second.", "hertz", (PUBLISHED, NAME)),
        figure(
            "Busy",
            "Share of the time in which the engine works.",
            "percentunit",
            (BUSY, NAME),
            bad=[(0.8, "orange"), (0.95, "red")],
        ),
        figure("Queue", "Robots whose request waits.", "none", (QUEUE, NAME)),
        figure(
            "Skipped",
            "Share of the deadlines that passed while the engine was busy.",
            "percentunit",
            (SKIPPED, NAME),
            bad=[(0.01, "orange"), (0.05, "red")],
        ),
        figure(
            "Shed",
            "Requests turned away in the time shown.",
            "none",
            (shed, NAME),
            bad=[(1, "orange")],
        ),
    ]


def _load() -> list[Any]:
    promised = f"openhelix_system2_rate_hertz{HERE} * {ROBOTS}"
    together = f"{PUBLISHED} / ({rate('system2_batches_total')} > 0)"
    return [
        lines(
            "Robots and queue",
            "Served, and waiting.",
            "none",
            (ROBOTS, f"robots {NAME}"),
            (QUEUE, f"queue {NAME}"),
        ),
        lines(
            "Latents a second",
            "Published, and promised to all robots together.",
            "hertz",
            (PUBLISHED, f"published {NAME}"),
            (promised, f"promised {NAME}"),
        ),
        lines(
            "Busy, and deadlines skipped",
            "Shares. At a busy share of 1 robots are skipped.",
            "percentunit",
            (BUSY, f"busy {NAME}"),
            (SKIPPED, f"skipped {NAME}"),
            top=1,
        ),
        lines("Requests in one call", "Computed together.", "none", (together, NAME)),
        heat("Latency", "One call of the engine.", "s", buckets("system2_latency_seconds")),
        heat("Wait", "Of a request for its turn.", "s", buckets("system2_wait_seconds")),
    ]


def _robots() -> list[Any]:
    return [
        lines(
            "Latents a second, by robot",
            "What each is served.",
            "hertz",
            (rate("system2_robot_latents_total"), "{{robot}}"),
        ),
        lines(
            "Silence, by robot",
            "Since a robot's last request; after half a minute its place is free.",
            "s",
            (f"openhelix_system2_robot_silence_seconds{HERE}", "{{robot}}"),
        ),
        lines(
            "Deadlines skipped a second, by robot",
            "Nobody should be skipped more than the others.",
            "hertz",
            (rate("system2_robot_skipped_total"), "{{robot}}"),
        ),
        lines(
            "Latent age, by robot",
            "Median, as each robot's loop sees it.",
            "s",
            ("instance:openhelix_latent_age_seconds:p50_1m", f"{{{{robot}}}} {NAME}"),
        ),
    ]


def _turned_away() -> list[Any]:
    return [
        rows(
            "Shed",
            "In the time shown, by reason.",
            ["instance", "reason"],
            ("requests", f"round({events('system2_shed_total', 'instance, reason')})", "none"),
            height=8,
        ),
        lines(
            "Failed, refused, lost",
            "Requests a second that got no latent.",
            "hertz",
            (rate("system2_failed_total"), f"failed {NAME}"),
            (rate("system2_refused_total"), f"refused {NAME}"),
            (rate("wire_gaps_total", more='channel="requests"'), f"lost {NAME}"),
            height=8,
        ),
        lines(
            "Connections refused and ended a second",
            "key: none or a wrong one; protocol: no CURVE; unfinished: broke off. "
            "ended: a robot left, or was cut off for a frame beyond all limits.",
            "hertz",
            (rate("wire_refused_total", "channel, reason", here=False), "{{channel}} {{reason}}"),
            (rate("wire_ended_total", "channel", here=False), "{{channel}} ended"),
            width=24,
        ),
    ]


def _engine() -> list[Any]:
    memory = "openhelix_gpu_memory"
    return [
        lines(
            "vLLM: requests",
            "Running and waiting inside vLLM.",
            "none",
            (f"vllm:num_requests_running{HERE}", f"running {NAME}"),
            (f"vllm:num_requests_waiting{HERE}", f"waiting {NAME}"),
        ),
        lines(
            "vLLM: prompt tokens a second",
            "What the engine prefills.",
            "none",
            (f"rate(vllm:prompt_tokens_total{HERE}[$__rate_interval])", NAME),
        ),
        lines(
            "GPU memory",
            "Used by whomever, and held by each part itself.",
            "bytes",
            (f"{memory}_used_bytes", f"used {{{{gpu}}}} {NAME}"),
            (f"{memory}_reserved_bytes", f"{{{{part}}}} {{{{gpu}}}} {NAME}"),
            (f"{memory}_total_bytes", f"all of {{{{gpu}}}} {NAME}"),
            width=24,
        ),
    ]
