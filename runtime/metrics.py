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

import logging
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

# 0.1 ms to 10 s in steps of about 1, 2.5, 5.
SECONDS = (
    *(1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
# Lateness of a spinning SCHED_FIFO loop is microseconds.
LATENESS = (1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, *SECONDS)
STEPS = (15.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 240.0, 300.0, 360.0)

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One metric; a counter's name ends in `_total`."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _counter(name: str, text: str, *labels: str) -> Entry:
    return Entry(f"openhelix_{name}_total", "counter", text, labels)


def _gauge(name: str, text: str, *labels: str) -> Entry:
    return Entry(f"openhelix_{name}", "gauge", text, labels)


def _histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Entry:
    return Entry(f"openhelix_{name}", "histogram", text, (), buckets)


_ENTRIES = (
    # -- the control loop
    _counter(
        "loop_ticks", "Control ticks by what the robot was told: wait, run, hold, stop.", "state"
    ),
    _counter("loop_deadlines_missed", "Control periods skipped because a tick overran."),
    _histogram("loop_tick_lateness_seconds", "How late a tick woke after its deadline.", LATENESS),
    _histogram("loop_tick_duration_seconds", "A tick's own work, without the wait.", LATENESS),
    _gauge("loop_period_seconds", "Time between two deadlines."),
    _gauge("loop_epoch", "Instructions begun since the start."),
    _gauge("realtime_granted", "1 if the system granted what was asked for, else 0.", "what"),
    # -- chunks
    _counter("chunks", "Trajectories accepted, or refused: void, late, stale, bad.", "outcome"),
    _counter("chunks_used", "Accepted trajectories of which at least one target was executed."),
    _counter("chunk_rows", "Rows of trajectories: consumed, expired, replaced or voided.", "fate"),
    _counter("chunk_rows_blended", "Rows mixed with the trajectory before them."),
    _counter("chunk_run_outs", "Times that the plan ran out before a new trajectory came."),
    _gauge("chunk_remaining_seconds", "Plan left to execute."),
    # -- latents as the loop sees them
    _counter("latents_received", "Latents of the current instruction that arrived."),
    _counter("latents_void", "Latents of an earlier instruction that arrived and were dropped."),
    _counter("latents_missed", "Latents published that never arrived."),
    _histogram("latent_age_seconds", "Age of the image behind the latent in use, at every tick."),
    _histogram(
        "latent_delay_seconds", "From the capture of an image to the arrival of its latent."
    ),
    # -- the two systems
    _histogram("system1_latency_seconds", "One call of System 1, warm-up excluded."),
    _counter("system1_failures", "Calls of System 1 that raised."),
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
    # -- safety
    _gauge("safety_mode", "1 for what holds now: run, hold or stop.", "mode"),
    _counter("safety_stops", "Safe stops by reason.", "reason"),
    _counter("safety_holds", "Holds by reason.", "reason"),
    _counter("safety_limited", "Ticks in which a limit bent the target.", "limit"),
    _gauge("source_age_seconds", "Age of the newest datum of a source.", "source"),
    _counter("future_stamps", "Data refused because their stamp lies in the future."),
    # -- tasks
    _counter("tasks", "Instructions attempted, by task and outcome.", "task", "outcome"),
    _histogram("task_env_steps", "Environment steps of a successful attempt.", STEPS),
    # -- the wire
    _counter("wire_received", "Messages taken from a channel's queue.", "channel"),
    _counter("wire_delivered", "Messages handed on.", "channel"),
    _counter("wire_gaps", "Messages numbered by their sender that never arrived.", "channel"),
    _counter("wire_restarts", "Times that another sender took over.", "channel"),
    _counter("wire_dropped", "Messages refused, by reason.", "channel", "reason"),
    _counter("wire_sent", "Messages sent.", "channel"),
    _counter("wire_send_dropped", "Messages that a reader's full queue refused.", "channel"),
    # -- what is written beside the loop: recording, video, viewer
    _counter("sink_written", "Items written.", "sink"),
    _counter("sink_dropped", "Items dropped rather than delay the loop.", "sink"),
    _gauge("sink_queue", "Items waiting to be written.", "sink"),
)
_BY_NAME: Mapping[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def catalogue() -> tuple[Entry, ...]:
    """Return every metric of the project, for documentation and dashboards."""
    return _ENTRIES


def catalogue_table() -> str:
    """Return the catalogue as a Markdown table."""
    rows = ["| name | type | labels | what |", "|---|---|---|---|"]
    rows += [f"| `{e.name}` | {e.kind} | {', '.join(e.labels)} | {e.help} |" for e in _ENTRIES]
    return "\n".join(rows)


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
        counts, running = list(self._counts), 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, float("inf")), counts, strict=True):
            running += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), running))
        entry = self._entry
        family = HistogramMetricFamily(entry.name, entry.help, labels=())
        family.add_metric((), buckets, self._sum)
        return family


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


def _filled(family: Any, values: Any) -> Metric:
    rows = values.items() if isinstance(values, Mapping) else [((), values)]
    for labels, value in rows:
        family.add_metric((labels,) if isinstance(labels, str) else labels, value)
    metric: Metric = family
    return metric


class Group(Collector):
    """Collectors that belong together; register it once."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = parts

    def collect(self) -> Iterable[Metric]:
        """Return one family a name, though several parts may give it (two readers do)."""
        merged: dict[str, Metric] = {}
        for part in self._parts:
            for family in part.collect():
                if family.name in merged:
                    merged[family.name].samples.extend(family.samples)
                else:
                    merged[family.name] = family
        return list(merged.values())


class Endpoint:
    """`http://127.0.0.1:<port>/metrics`."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server, self._thread = server, thread
        self.port: int = server.server_port

    @property
    def url(self) -> str:
        """Where to scrape."""
        return f"http://127.0.0.1:{self.port}/metrics"

    def close(self) -> None:
        """Stop serving; safe to call twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=2.0)


def serve(port: int, *parts: Any) -> Endpoint:
    """Serve `parts` and this process's own figures, on loopback.

    Args:
        port: TCP port; 0 for a free one.
        parts: objects with `collect()`; see `runtime.collectors`.

    Raises:
        ValueError: the port is taken.
    """
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(Group(parts))
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise ValueError(
            f"output.metrics_port: {port} cannot be used ({error.strerror}); 0 takes a free one"
        ) from None
    endpoint = Endpoint(server, thread)
    log.info("metrics at %s", endpoint.url)
    return endpoint
