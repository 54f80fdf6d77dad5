"""Every Prometheus name of the project, and what is needed to fill them cheaply.

Names, units, labels and help texts are data in this one file: dashboards, alerts and the
documentation read `catalogue()`, and a collector that gives a name that is not here fails its
first test. Base units throughout (seconds, metres, bytes); labels have few values (a task may
be one, an episode never).

Counters that the runtime keeps anyway are read when somebody scrapes, so they cost a tick
nothing. Only distributions are fed as things happen, through `Histogram`, which is a bisect
and two additions: prometheus_client's own takes a lock and several times as long.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

# 0.1 ms to 10 s in steps of about 1, 2.5, 5.
SECONDS = (
    *(1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
# Lateness of a spinning SCHED_FIFO loop is microseconds.
LATENESS = (1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, *SECONDS)
# What matters in the age of a latent lies between a frame and a few periods of System 2.
AGES = (
    *(0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0),
)
STEPS = (15.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 240.0, 300.0, 360.0)
LATENT_STEPS = (0.0, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 90.0)
IN_A_ROW = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)  # CALVIN's chains have five instructions

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One metric; a counter's name ends in `_total`."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """Metrics that belong together."""

    title: str
    served_by: str  # of `runtime.config.METRICS_PARTS`
    entries: tuple[Entry, ...]


def _counter(name: str, text: str, *labels: str) -> Entry:
    return Entry(f"openhelix_{name}_total", "counter", text, labels)


def _gauge(name: str, text: str, *labels: str) -> Entry:
    return Entry(f"openhelix_{name}", "gauge", text, labels)


def _histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS, *labels: str) -> Entry:
    return Entry(f"openhelix_{name}", "histogram", text, labels, buckets)


_LOOP = (
    _counter(
        "loop_ticks",
        "Control ticks by what the robot was told: wait, run, hold, stop.",
        "state",
    ),
    _counter("loop_deadlines_missed", "Control periods skipped because a tick overran."),
    _histogram("loop_tick_lateness_seconds", "How late a tick woke after its deadline.", LATENESS),
    _histogram("loop_tick_duration_seconds", "A tick's own work, without the wait.", LATENESS),
    _gauge("loop_period_seconds", "Time between two deadlines."),
    _gauge("loop_epoch", "Instructions begun since the start."),
    _gauge("realtime_granted", "1 if the system granted what was asked for, else 0.", "what"),
)
_CHUNKS = (
    _counter("chunks", "Trajectories accepted, or refused: void, late, stale, bad.", "outcome"),
    _counter("chunks_used", "Accepted trajectories of which at least one target was executed."),
    _counter("chunk_rows", "Rows of trajectories: consumed, expired, replaced or voided.", "fate"),
    _counter("chunk_rows_blended", "Rows mixed with the trajectory before them."),
    _counter("chunk_run_outs", "Times that the plan ran out before a new trajectory came."),
    _gauge("chunk_remaining_seconds", "Plan left to execute."),
)
_LATENTS = (
    _counter("latents_received", "Latents of the current instruction that arrived."),
    _counter("latents_void", "Latents of an earlier instruction that arrived and were dropped."),
    _counter("latents_missed", "Latents published that never arrived."),
    _counter(
        "latents_late",
        "Latents that arrived more than a period of System 2 after their image.",
    ),
    _gauge("latent_period_seconds", "Time between two latents, as the robot was configured."),
    _histogram(
        "latent_age_seconds",
        "Age of the image behind the latent in use, at every tick.",
        AGES,
    ),
    _histogram(
        "latent_delay_seconds",
        "From the capture of an image to the arrival of its latent.",
        AGES,
    ),
)
_SYSTEM1 = (
    _histogram("system1_latency_seconds", "One call of System 1, warm-up excluded."),
    _counter("system1_failures", "Calls of System 1 that raised."),
)
_SYSTEM2 = (
    _histogram("system2_latency_seconds", "One call of System 2's engine."),
    _histogram("system2_wait_seconds", "How long a request waited for its turn."),
    _counter("system2_published", "Latents published."),
    _counter("system2_batches", "Engine calls."),
    _counter("system2_skipped", "Deadlines that passed while the engine was busy."),
    _counter("system2_refused", "Requests with unusable input."),
    _counter("system2_failed", "Requests on which the engine failed."),
    _counter("system2_shed", "Requests dropped to bound the load.", "reason"),
    _gauge("system2_queue", "Robots whose request waits for its turn."),
    _gauge("system2_robots", "Robots that System 2 serves."),
    _gauge("system2_rate_hertz", "Latents a second promised to each robot."),
    _counter("system2_robot_latents", "Latents published for a robot.", "robot"),
    _counter("system2_robot_skipped", "Deadlines of a robot that passed unserved.", "robot"),
    _gauge("system2_robot_silence_seconds", "Time since a robot's last request.", "robot"),
)
_GPUS = (
    _gauge("gpu_memory_total_bytes", "Memory of the GPU.", "gpu"),
    _gauge("gpu_memory_used_bytes", "Memory of the GPU in use, by whomever.", "gpu"),
    _gauge("gpu_memory_reserved_bytes", "Memory of the GPU that this process holds.", "gpu"),
)
_SAFETY = (
    _gauge("safety_mode", "1 for what holds now: run, hold or stop.", "mode"),
    _counter("safety_stops", "Safe stops by reason.", "reason"),
    _counter("safety_holds", "Holds by reason.", "reason"),
    _counter("safety_limited", "Ticks in which a limit bent the target.", "limit"),
    _gauge("source_age_seconds", "Age of the newest datum of a source.", "source"),
    _gauge("source_limit_seconds", "Age at which a source stops the robot.", "source"),
    _counter("future_stamps", "Data refused because their stamp lies in the future."),
)
_TASKS = (
    _counter("tasks", "Instructions by outcome: success, failure, unjudged.", "task", "outcome"),
    _histogram("task_env_steps", "Environment steps of a successful attempt.", STEPS),
    _histogram(
        "chain_successes",
        "Instructions in a row that succeeded, of each finished list.",
        IN_A_ROW,
    ),
)
_CELL = ("suite", "clock", "interval", "latency")  # of an asynchrony sweep, in steps
_EVALUATIONS = (
    _gauge("eval_episodes_planned", "Episodes of the evaluation that is running.", "suite"),
    _counter("eval_episodes", "Episodes by outcome: success, failure, error.", "suite", "outcome"),
    _counter(
        "eval_tasks",
        "Instructions attempted, by task and outcome.",
        "suite",
        "task",
        "outcome",
    ),
    _counter(
        "eval_attempts",
        "Instructions attempted, by steps from latent to latent and until it arrives.",
        *_CELL,
        "outcome",
    ),
    _histogram(
        "eval_latent_age_steps",
        "Mean age of the latents behind an instruction's plans, in environment steps.",
        LATENT_STEPS,
        *_CELL,
    ),
    _histogram(
        "eval_chain_successes",
        "Instructions in a row that succeeded, of each chain.",
        IN_A_ROW,
        "suite",
    ),
)
_WIRE = (
    _counter("wire_received", "Messages taken from a channel's queue.", "channel"),
    _counter("wire_delivered", "Messages handed on.", "channel"),
    _counter("wire_gaps", "Messages numbered by their sender that never arrived.", "channel"),
    _counter("wire_restarts", "Times that another sender took over.", "channel"),
    _counter("wire_dropped", "Messages refused, by reason.", "channel", "reason"),
    _counter("wire_sent", "Messages sent.", "channel"),
    _counter("wire_send_dropped", "Messages that a reader's full queue refused.", "channel"),
    _counter(
        *("wire_refused", "Connections refused by reason: key, protocol, unfinished."),
        *("channel", "reason"),
    ),
    _counter(
        "wire_ended",
        "Connections that ended: the peer left, or was cut off for a frame too large.",
        "channel",
    ),
)
_SINKS = (
    _counter("sink_written", "Items written.", "sink"),
    _counter("sink_dropped", "Items dropped rather than delay the loop.", "sink"),
    _gauge("sink_queue", "Items waiting to be written.", "sink"),
)
_SECTIONS = (
    Section("The control loop", "control", _LOOP),
    Section("Trajectories", "control", _CHUNKS),
    Section("Latents as the loop sees them", "control", _LATENTS),
    Section("System 1 as the loop sees it", "control", _SYSTEM1),
    Section("System 2", "system2", _SYSTEM2),
    Section("GPUs", "system1, system2", _GPUS),
    Section("Safety", "control", _SAFETY),
    Section("Tasks", "control", _TASKS),
    Section("Evaluations", "eval", _EVALUATIONS),
    Section("The wire", "control, system1, system2, observer", _WIRE),
    Section("What is written beside the loop: recording, video, viewer", "observer", _SINKS),
)
_BY_NAME: Mapping[str, Entry] = {e.name: e for section in _SECTIONS for e in section.entries}


def catalogue() -> tuple[Entry, ...]:
    """Return every metric of the project, for documentation and dashboards."""
    return tuple(_BY_NAME.values())


def sections() -> tuple[Section, ...]:
    """Return the catalogue by what it is about and who serves it."""
    return _SECTIONS


class Histogram:
    """A distribution with fixed buckets; one thread observes, any thread reads."""

    def __init__(self, name: str) -> None:
        entry = _BY_NAME[f"openhelix_{name}"]
        self._entry, self._bounds = entry, entry.buckets
        self._counts = [0] * (len(entry.buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def tap(self, values: deque[float]) -> deque[float]:
        """Return a deque with the same contents that observes whatever is appended to it."""
        return _Tap(self, values)

    def family(self) -> Metric:
        """Return the state for a scrape."""
        return histograms(self._entry.name.removeprefix("openhelix_"), {(): self})

    def state(self) -> tuple[list[tuple[str, float]], float]:
        """Return the cumulative buckets by upper bound, and the sum."""
        counts, running = list(self._counts), 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, float("inf")), counts, strict=True):
            running += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), running))
        return buckets, self._sum


class _Tap(deque[float]):
    def __init__(self, histogram: Histogram, values: deque[float]) -> None:
        super().__init__(values, values.maxlen)
        self._histogram = histogram

    def append(self, value: float) -> None:
        super().append(value)
        self._histogram.observe(value)


def counter(
    name: str, values: float | Mapping[str, float] | Mapping[tuple[str, ...], float]
) -> Metric:
    """Return a counter for a scrape: a number, or numbers by label value (or values)."""
    entry = _BY_NAME[f"openhelix_{name}_total"]
    family = CounterMetricFamily(entry.name.removesuffix("_total"), entry.help, labels=entry.labels)
    return _filled(family, values)


def gauge(
    name: str, values: float | Mapping[str, float] | Mapping[tuple[str, ...], float]
) -> Metric:
    """Return a gauge for a scrape; see `counter`."""
    entry = _BY_NAME[f"openhelix_{name}"]
    return _filled(GaugeMetricFamily(entry.name, entry.help, labels=entry.labels), values)


def histograms(name: str, parts: Mapping[tuple[str, ...], Histogram]) -> Metric:
    """Return distributions of one name for a scrape, by their label values."""
    entry = _BY_NAME[f"openhelix_{name}"]
    family = HistogramMetricFamily(entry.name, entry.help, labels=entry.labels)
    for labels, part in parts.items():
        family.add_metric(labels, *part.state())
    return family


def _filled(family: Any, values: Any) -> Metric:
    rows = values.items() if isinstance(values, Mapping) else [((), values)]
    for labels, value in rows:
        family.add_metric((labels,) if isinstance(labels, str) else labels, value)
    metric: Metric = family
    return metric
