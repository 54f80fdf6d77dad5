"""Real time: does the loop keep its rate, and how old is the goal it acts on?"""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders.dashboard import Dashboard

from openhelix.deploy.grafana.panels import board, figure, heat, lines, rows, states
from openhelix.deploy.grafana.promql import (
    HERE,
    buckets,
    events,
    per_second,
    quantile,
    quantiles,
    rate,
)

LATE, AGE = "loop_tick_lateness_seconds", "latent_age_seconds"
MODES = {"run": "green", "hold": "orange", "stop": "red"}
HZ, PER_S, NAME = "hertz", "suffix: /s", "{{instance}}"


def dashboard() -> Dashboard:
    """Return the dashboard."""
    return board(
        "openhelix-realtime",
        "OpenHelix: real time",
        "Rates, lateness, latent age, where the time goes, and what stopped the robot.",
        ("Robot", "openhelix_loop_ticks_total"),
        {
            "Now": _now(),
            "Rates": _rates(),
            "Lateness": _lateness(),
            "Latents": _latents(),
            "The two systems": _systems(),
            "Safety": _safety(),
            "Around the loop": _beside(),
        },
    )


def _now() -> list[Any]:
    missed = f"round({events('loop_deadlines_missed_total', 'instance')})"
    stops = f"round({events('safety_stops_total', 'instance')})"
    ticks = rate("loop_ticks_total", "instance")
    hold, stop = (
        f'openhelix_safety_mode{{instance=~"$instance",mode="{m}"}}' for m in ("hold", "stop")
    )
    mode = f"sum by (instance) ({hold} + ignoring (mode) 2 * {stop})"
    late = quantile(LATE, 0.99)
    left = f"openhelix_chunk_remaining_seconds{HERE}"
    return [
        figure("Control rate", "Ticks per second.", HZ, (ticks, NAME)),
        figure(
            "Latents",
            "Latents for the current instruction received per second.",
            HZ,
            (rate("latents_received_total"), NAME),
        ),
        figure(
            "Latent age, median",
            "Age of the image behind the latent in use.",
            "s",
            (quantile(AGE, 0.5), NAME),
        ),
        figure(
            "Lateness, p99",
            "99th percentile of tick lateness.",
            "s",
            (late, NAME),
            bad=[(0.005, "orange"), (0.015, "red")],
        ),
        figure(
            "Deadlines missed",
            "Control periods skipped in the selected time range.",
            "none",
            (missed, NAME),
            bad=[(1, "orange"), (30, "red")],
        ),
        figure(
            "Safe stops", "In the selected time range.", "none", (stops, NAME), bad=[(1, "red")]
        ),
        states("Mode", "What the loop commands.", (mode, NAME), list(MODES.items())),
        lines(
            "Plan left",
            "Trajectory left to execute; at 0 the robot holds.",
            "s",
            (left, NAME),
            height=4,
        ),
    ]


def _rates() -> list[Any]:
    return [
        lines(
            "Ticks per second, by state",
            "wait: no plan yet for this instruction; run; hold; stop.",
            HZ,
            (rate("loop_ticks_total", "state"), "{{state}}"),
            stack=True,
        ),
        lines(
            "Latents and trajectories per second",
            "Received, promised, and delivered by System 1.",
            HZ,
            (rate("latents_received_total"), f"latents {NAME}"),
            (f"1 / openhelix_latent_period_seconds{HERE}", f"promised {NAME}"),
            (rate("chunks_total", more='outcome="accepted"'), f"trajectories {NAME}"),
        ),
    ]


def _lateness() -> list[Any]:
    missed = rate("loop_deadlines_missed_total")
    return [
        heat("Tick lateness", "How long after its deadline each tick wakes.", "s", buckets(LATE)),
        heat("Tick duration", "Work per tick.", "s", buckets("loop_tick_duration_seconds")),
        lines("Tick lateness", "Median and 99th percentile.", "s", *quantiles(LATE), log=True),
        lines("Deadlines missed", "Control periods skipped per second.", PER_S, (missed, NAME)),
    ]


def _latents() -> list[Any]:
    limit = 'openhelix_source_limit_seconds{instance=~"$instance",source="latent"}'
    about = "Age of the image behind the latent in use, sampled at every tick."
    return [
        heat("Latent age", about, "s", buckets(AGE)),
        heat(
            "Latent latency",
            "From image capture to arrival of its latent.",
            "s",
            buckets("latent_latency_seconds"),
        ),
        lines(
            "Latent age",
            "The line is the age at which the robot is stopped.",
            "s",
            *quantiles(AGE),
            (limit, f"stop {NAME}"),
        ),
        lines(
            "Unused latents per second",
            "Late: more than one period after their image. Void: for an earlier instruction. "
            "Missed: never arrived. Mismatched: from another model; the robot stops. "
            "Refused: the instruction is not understood; the robot holds. "
            "Future, old, before_stop: dropped for the time of their image.",
            PER_S,
            (rate("latents_late_total"), f"late {NAME}"),
            (rate("latents_void_total"), f"void {NAME}"),
            (rate("latents_missed_total"), f"missed {NAME}"),
            (rate("latents_mismatched_total"), f"mismatched {NAME}"),
            (rate("latents_refused_total"), f"refused {NAME}"),
            (rate("latents_mistimed_total"), f"{{{{reason}}}} {NAME}"),
        ),
        lines(
            "Instruction understood",
            "Calibrated probability that the instruction names a task.",
            "percentunit",
            (f"openhelix_instruction_understood{HERE}", NAME),
            top=1,
            empty="this System 2 does not judge instructions",
        ),
    ]


def _systems() -> list[Any]:
    served = buckets("system2_latency_seconds", here=False)
    return [
        heat("System 1 latency", "Per call.", "s", buckets("system1_latency_seconds")),
        heat("System 2 latency", "Per engine call, all servers.", "s", served),
        lines(
            "Trajectories per second, by outcome",
            "Accepted, or refused: void, late, stale, bad; and calls in which System 1 failed.",
            HZ,
            (rate("chunks_total", "outcome"), "{{outcome}}"),
            (rate("system1_failures_total"), f"failed {NAME}"),
        ),
        lines(
            "Trajectory rows per second, by outcome",
            "Executed, expired, replaced by a newer trajectory, or voided.",
            PER_S,
            (rate("chunk_rows_total", "fate"), "{{fate}}"),
            stack=True,
        ),
        lines(
            "Slowdown of plans",
            "Times as long as planned; above 1, trajectories arrive later than system1.slow_after says.",
            "none",
            (f"openhelix_chunk_slowdown{HERE}", NAME),
        ),
    ]


def _safety() -> list[Any]:
    by = ["instance", "reason"]
    return [
        lines(
            "Age of every source",
            "The robot stops if a source gets too old.",
            "s",
            (f"openhelix_source_age_seconds{HERE}", f"{{{{source}}}} {NAME}"),
        ),
        lines(
            "Ticks per second limited, by limit",
            "Workspace, speed, acceleration, gripper, not finite.",
            PER_S,
            (rate("safety_limited_total", "limit"), "{{limit}}"),
        ),
        rows(
            "Safe stops",
            "In the selected time range, by reason.",
            by,
            ("stops", f"round({events('safety_stops_total', 'instance, reason')}) > 0", "none"),
            height=8,
            empty="no safe stop in this time range",
        ),
        rows(
            "Holds",
            "In the selected time range, by reason.",
            by,
            ("holds", f"round({events('safety_holds_total', 'instance, reason')}) > 0", "none"),
            height=8,
            empty="no hold in this time range",
        ),
    ]


def _beside() -> list[Any]:
    job = '{job="openhelix"}'
    return [
        lines(
            "Messages lost or rejected per second, by channel",
            "Across all processes and runs; lost: sent, but never received.",
            PER_S,
            (rate("wire_gaps_total", "channel", here=False), "lost {{channel}}"),
            (rate("wire_dropped_total", "channel", here=False), "rejected {{channel}}"),
            (rate("wire_send_dropped_total", "channel", here=False), "not sent {{channel}}"),
        ),
        lines(
            "Recording, film, viewer",
            "Items per second written, and dropped to avoid delaying the loop.",
            PER_S,
            (rate("sink_written_total", "sink", here=False), "written {{sink}}"),
            (rate("sink_dropped_total", "sink", here=False), "dropped {{sink}}"),
        ),
        lines(
            "CPU by process",
            "Cores in use.",
            "suffix: cores",
            (per_second(f"process_cpu_seconds_total{job}"), f"{{{{part}}}} {NAME}"),
            stack=True,
        ),
        lines(
            "Memory by process",
            "Resident set size.",
            "bytes",
            (f"process_resident_memory_bytes{job}", f"{{{{part}}}} {NAME}"),
            stack=True,
        ),
    ]
