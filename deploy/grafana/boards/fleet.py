"""Fleet: how many robots does one System 2 serve, and is it at capacity?"""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders.dashboard import Dashboard

from openhelix.deploy.grafana.panels import board, figure, heat, lines, rows
from openhelix.deploy.grafana.promql import HERE, buckets, events, per_second, rate

NAME = "{{instance}}"
BUSY = f"instance:openhelix_system2_busy:ratio1m{HERE}"
SKIPPED = f"instance:openhelix_system2_skipped:ratio1m{HERE}"
ROBOTS, QUEUE = f"openhelix_system2_robots{HERE}", f"openhelix_system2_queue{HERE}"
NO_VLLM = "System 2 runs on another engine than vLLM"
PUBLISHED = rate("system2_published_total")


def dashboard() -> Dashboard:
    """Return the dashboard."""
    return board(
        "openhelix-fleet",
        "OpenHelix: fleet",
        "Robots per System 2, its queue, rejected requests, and robots that are not served.",
        ("System 2", "openhelix_system2_robots"),
        {
            "Now": _now(),
            "Load": _load(),
            "Robots": _robots(),
            "Rejected": _turned_away(),
            "Engine": _engine(),
        },
    )


def _now() -> list[Any]:
    shed = f"round({events('system2_shed_total', 'instance')})"
    return [
        figure("Robots", "Served by System 2.", "none", (ROBOTS, NAME)),
        figure("Latents", "Published per second.", "hertz", (PUBLISHED, NAME)),
        figure(
            "Busy",
            "Share of time the engine is computing.",
            "percentunit",
            (BUSY, NAME),
            bad=[(0.8, "orange"), (0.95, "red")],
        ),
        figure("Queue", "Robots with a request waiting.", "none", (QUEUE, NAME)),
        figure(
            "Skipped",
            "Share of the deadlines that passed while the engine was busy.",
            "percentunit",
            (SKIPPED, NAME),
            bad=[(0.01, "orange"), (0.05, "red")],
        ),
        figure(
            "Shed",
            "Requests rejected in the selected time range.",
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
            "suffix: robots",
            (ROBOTS, f"robots {NAME}"),
            (QUEUE, f"queue {NAME}"),
        ),
        lines(
            "Latents per second",
            "Published, and the total promised to all robots.",
            "hertz",
            (PUBLISHED, f"published {NAME}"),
            (promised, f"promised {NAME}"),
        ),
        lines(
            "Busy, and deadlines skipped",
            "Shares; when busy reaches 1, deadlines are skipped.",
            "percentunit",
            (BUSY, f"busy {NAME}"),
            (SKIPPED, f"skipped {NAME}"),
            top=1,
        ),
        lines("Batch size", "Requests per engine call.", "suffix: requests", (together, NAME)),
        heat("Latency", "Per engine call.", "s", buckets("system2_latency_seconds")),
        heat(
            "Wait",
            "From a request's arrival to its engine call.",
            "s",
            buckets("system2_wait_seconds"),
        ),
    ]


def _robots() -> list[Any]:
    return [
        lines(
            "Latents per second, by robot",
            "Delivered to each robot.",
            "hertz",
            (rate("system2_robot_latents_total"), "{{robot}}"),
        ),
        lines(
            "Silence, by robot",
            "Time since a robot's last request; its slot is freed after 30 s.",
            "s",
            (f"openhelix_system2_robot_silence_seconds{HERE}", "{{robot}}"),
        ),
        lines(
            "Deadlines skipped per second, by robot",
            "Should be even across robots.",
            "suffix: /s",
            (rate("system2_robot_skipped_total"), "{{robot}}"),
        ),
        lines(
            "Latent age, by robot",
            "Median, as measured by each robot's loop.",
            "s",
            ("instance:openhelix_latent_age_seconds:p50_1m", f"{{{{robot}}}} {NAME}"),
        ),
    ]


def _turned_away() -> list[Any]:
    return [
        rows(
            "Shed",
            "In the selected time range, by reason.",
            ["instance", "reason"],
            ("requests", f"round({events('system2_shed_total', 'instance, reason')}) > 0", "none"),
            height=8,
            empty="no request was rejected in this time range",
        ),
        lines(
            "Failed, refused, lost",
            "Requests per second that got no latent.",
            "suffix: /s",
            (rate("system2_failed_total"), f"failed {NAME}"),
            (rate("system2_refused_total"), f"refused {NAME}"),
            (rate("wire_gaps_total", more='channel="requests"'), f"lost {NAME}"),
            height=8,
        ),
        lines(
            "Connections refused and closed per second",
            "key: missing or wrong; protocol: no CURVE; unfinished: dropped during the handshake. "
            "ended: a robot left, or was disconnected for an oversized frame.",
            "suffix: /s",
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
            "Running and waiting in vLLM.",
            "suffix: requests",
            (f"vllm:num_requests_running{HERE}", f"running {NAME}"),
            (f"vllm:num_requests_waiting{HERE}", f"waiting {NAME}"),
            empty=NO_VLLM,
        ),
        lines(
            "vLLM: prompt tokens per second",
            "Tokens prefilled.",
            "suffix: tokens/s",
            (per_second(f"vllm:prompt_tokens_total{HERE}"), NAME),
            empty=NO_VLLM,
        ),
        lines(
            "GPU memory",
            "Total in use on the GPU, and reserved by each process.",
            "bytes",
            (f"{memory}_used_bytes", f"used {{{{gpu}}}} {NAME}"),
            (f"{memory}_reserved_bytes", f"{{{{part}}}} {{{{gpu}}}} {NAME}"),
            (f"{memory}_total_bytes", f"total {{{{gpu}}}} {NAME}"),
            empty="no GPU is in use",
            width=24,
        ),
    ]
