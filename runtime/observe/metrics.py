"""Every Prometheus name of the project, and what is needed to fill them cheaply.

Names, units, labels and help texts are data in this one file: dashboards, alerts and the
documentation read `catalogue()`, and a collector with a name that is not listed here fails its
first test. Base units throughout (seconds, metres, bytes); labels have few values (a task may be
one, an episode never).

Counters that the runtime keeps anyway are read on scrape, so they cost a tick nothing. Only
distributions are updated as events happen, through `Histogram`, which is a bisection and two
additions: prometheus_client's own takes a lock and several times as long.

The endpoint is read-only, and on loopback unless an address is configured.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from wsgiref.simple_server import WSGIServer

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"

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


# The catalogue -----------------------------------------------------------------------------------


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
    served_by: str  # of `openhelix.runtime.core.config.METRICS_PARTS`
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
        "Control ticks by state: wait, run, hold, stop.",
        "state",
    ),
    _counter(
        "loop_running_seconds",
        "Time from the first tick to the newest one. Dashboards divide by it: a rate over a window "
        "in which the loop began or ended is too low.",
    ),
    _counter("loop_deadlines_missed", "Control periods skipped because a tick overran."),
    _histogram("loop_tick_lateness_seconds", "How late a tick woke after its deadline.", LATENESS),
    _histogram("loop_tick_duration_seconds", "A tick's own work, without waiting.", LATENESS),
    _gauge("loop_period_seconds", "Time between two deadlines."),
    _gauge("loop_instruction_id", "Instructions begun since the start of the run."),
    _gauge("realtime_granted", "1 if the system granted what was asked for, else 0.", "what"),
)
_CHUNKS = (
    _counter("chunks", "Trajectories accepted, or refused: void, late, stale, bad.", "outcome"),
    _counter("chunks_used", "Accepted trajectories with at least one target executed."),
    _counter("chunk_rows", "Rows of trajectories: consumed, expired, replaced or voided.", "fate"),
    _counter("chunk_rows_blended", "Rows blended with the previous trajectory."),
    _counter("chunk_run_outs", "Times the plan ran out before a new trajectory arrived."),
    _gauge("chunk_remaining_seconds", "Plan left to execute."),
    _gauge("chunk_slowdown", "Times as long as planned that plans take, because they come late."),
)
_LATENTS = (
    _counter("latents_received", "Latents of the current instruction that arrived."),
    _counter("latents_void", "Latents of an earlier instruction that arrived and were dropped."),
    _counter("latents_missed", "Latents published that never arrived."),
    _counter("latents_mismatched", "Latents dropped because their model differs from the run's."),
    _counter("latents_refused", "Latents whose instruction System 2 does not understand."),
    _gauge("instruction_understood", "How probably the current instruction names a task; 0 to 1."),
    _counter(
        "latents_mistimed",
        "Latents dropped for the time of their image: future, old, or before_stop.",
        "reason",
    ),
    _counter(
        "latents_late",
        "Latents that arrived more than one System 2 period after their image.",
    ),
    _gauge("latent_period_seconds", "Configured time between two latents."),
    _histogram(
        "latent_age_seconds",
        "Age of the image behind the latent in use, at every tick.",
        AGES,
    ),
    _histogram(
        "latent_latency_seconds",
        "From the capture of an image to the arrival of its latent.",
        AGES,
    ),
)
_SYSTEM1 = (
    _histogram("system1_latency_seconds", "One call of System 1, warm-up excluded."),
    _counter("system1_failures", "Calls of System 1 that raised an error."),
)
_SYSTEM2 = (
    _histogram("system2_latency_seconds", "One call of System 2's engine."),
    _histogram("system2_wait_seconds", "How long a request waited before its batch."),
    _counter("system2_published", "Latents published."),
    _counter("system2_batches", "Engine calls."),
    _counter("system2_skipped", "Deadlines that passed while the engine was busy."),
    _counter("system2_refused", "Requests with invalid input."),
    _counter("system2_failed", "Requests on which the engine failed."),
    _counter("system2_shed", "Requests dropped to bound the load.", "reason"),
    _gauge("system2_queue", "Robots with a request waiting."),
    _gauge("system2_robots", "Robots that System 2 serves."),
    _gauge("system2_rate_hertz", "Latents per second promised to each robot."),
    _counter("system2_robot_latents", "Latents published for a robot.", "robot"),
    _counter("system2_robot_skipped", "Deadlines of a robot that passed unserved.", "robot"),
    _gauge("system2_robot_silence_seconds", "Time since a robot's last request.", "robot"),
)
_GPUS = (
    _gauge("gpu_memory_total_bytes", "Memory of the GPU.", "gpu"),
    _gauge("gpu_memory_used_bytes", "Memory of the GPU in use by all processes.", "gpu"),
    _gauge("gpu_memory_reserved_bytes", "Memory of the GPU that this process holds.", "gpu"),
)
_SAFETY = (
    _gauge("safety_mode", "1 for the current mode: run, hold or stop.", "mode"),
    _counter("safety_stops", "Safe stops by reason.", "reason"),
    _counter("safety_holds", "Holds by reason.", "reason"),
    _counter("safety_limited", "Ticks in which a limit changed the target.", "limit"),
    _gauge("source_age_seconds", "Age of a source's newest data.", "source"),
    _gauge("source_limit_seconds", "Age at which a source stops the robot.", "source"),
    _counter("future_stamps", "Data refused because of a time stamp in the future."),
)
_TASKS = (
    _counter("tasks", "Instructions by outcome: success, failure, unjudged.", "task", "outcome"),
    _histogram("task_env_steps", "Environment steps of a successful attempt.", STEPS),
    _histogram(
        "chain_successes",
        "Successes in a row, per finished list of instructions.",
        IN_A_ROW,
    ),
)
_CELL = ("suite", "clock", "interval", "latency")  # of an asynchrony sweep, in steps
_EVALUATIONS = (
    _gauge("eval_episodes_planned", "Episodes planned in the running evaluation.", "suite"),
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
        "Instructions attempted, by interval and latency of the latents in steps.",
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
        "Successes in a row, per chain.",
        IN_A_ROW,
        "suite",
    ),
)
_WIRE = (
    _counter("wire_received", "Messages taken from a channel's queue.", "channel"),
    _counter("wire_delivered", "Messages delivered to the reader.", "channel"),
    _counter("wire_gaps", "Messages numbered by their sender that never arrived.", "channel"),
    _counter("wire_restarts", "Times another sender took over.", "channel"),
    _counter("wire_dropped", "Messages refused, by reason.", "channel", "reason"),
    _counter("wire_sent", "Messages sent.", "channel"),
    _counter("wire_send_dropped", "Messages dropped at a reader's full queue.", "channel"),
    _counter(
        *("wire_refused", "Connections refused by reason: key, protocol, unfinished."),
        *("channel", "reason"),
    ),
    _counter(
        "wire_ended",
        "Connections ended: the peer left, or was disconnected for an oversized frame.",
        "channel",
    ),
)
_EVERY = (
    _counter("up_seconds", "Time since this endpoint opened; what rates of other parts are over."),
)
_SINKS = (
    _counter("sink_written", "Items written.", "sink"),
    _counter("sink_dropped", "Items dropped rather than delay the loop.", "sink"),
    _gauge("sink_queue", "Items waiting to be written.", "sink"),
)
_SECTIONS = (
    Section("The control loop", "control", _LOOP),
    Section("Trajectories", "control", _CHUNKS),
    Section("Latents, as received by the loop", "control", _LATENTS),
    Section("System 1, as called by the loop", "control", _SYSTEM1),
    Section("System 2", "system2", _SYSTEM2),
    Section("GPUs", "system1, system2", _GPUS),
    Section("Safety", "control", _SAFETY),
    Section("Tasks", "control", _TASKS),
    Section("Evaluations", "eval", _EVALUATIONS),
    Section("Transport", "control, system1, system2, observer", _WIRE),
    Section("Recording, film and viewer", "observer", _SINKS),
    Section("Every endpoint", "control, system1, system2, eval, observer", _EVERY),
)
_BY_NAME: Mapping[str, Entry] = {e.name: e for section in _SECTIONS for e in section.entries}


def catalogue() -> tuple[Entry, ...]:
    """Return every metric of the project, for documentation and dashboards."""
    return tuple(_BY_NAME.values())


def sections() -> tuple[Section, ...]:
    """Return the catalogue by what it is about and who serves it."""
    return _SECTIONS


# Values for a scrape -----------------------------------------------------------------------------


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


# The endpoint that Prometheus scrapes ------------------------------------------------------------


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


class Library:
    """What a library inside this process registers with prometheus_client by itself.

    Args:
        prefixes: of the names that are wanted, for example `vllm:`.
    """

    def __init__(self, *prefixes: str) -> None:
        self._prefixes = prefixes

    def collect(self) -> Iterable[Metric]:
        """Return the library's families."""
        return [f for f in REGISTRY.collect() if f.name.startswith(self._prefixes)]


class _Visits:
    """Notes when somebody scrapes, and says since when that is possible."""

    def __init__(self) -> None:
        self._begun_s = time.monotonic()
        self._changed = threading.Condition()
        self._times_s: deque[float] = deque(maxlen=2)
        self._count = 0

    def collect(self) -> Iterable[Metric]:
        with self._changed:
            self._times_s.append(time.monotonic())
            self._count += 1
            self._changed.notify_all()
        yield counter("up_seconds", time.monotonic() - self._begun_s)

    def await_next(self, limit_s: float) -> bool:
        with self._changed:
            if len(self._times_s) < 2:
                return False
            before, (first_s, last_s) = self._count, self._times_s
            due_s = last_s + 1.5 * (last_s - first_s) - time.monotonic()
            wait_s = min(limit_s, due_s)
            return wait_s > 0 and self._changed.wait_for(lambda: self._count > before, wait_s)


class Endpoint:
    """`http://<host>:<port>/metrics`."""

    def __init__(
        self, host: str, server: WSGIServer, thread: threading.Thread, visits: _Visits
    ) -> None:
        self._host, self._visits = host, visits
        self._server, self._thread = server, thread
        self.port: int = server.server_port

    def await_scrape(self, limit_s: float = 10.0) -> bool:
        """Wait until what is counted by now has been scraped; False when it was not.

        What a process counted after the last scrape is lost with it: the outcome of a run's
        last task, always. Returns at once where nobody scrapes regularly, or often enough.
        """
        return self._visits.await_next(limit_s)

    @property
    def url(self) -> str:
        """Where to scrape."""
        return f"http://{self._host}:{self.port}/metrics"

    def close(self) -> None:
        """Stop serving; safe to call twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=2.0)


def _as_plain_text(app: Any) -> Any:
    """Answer in Prometheus' own text format, whatever is asked for.

    Prometheus 2 asks for OpenMetrics, and prometheus_client 0.26 writes `vllm:name` there as
    `vllm_name`: no dashboard would find it.
    """

    def plain(environ: dict[str, Any], start_response: Any) -> Any:
        environ.pop("HTTP_ACCEPT", None)
        return app(environ, start_response)

    return plain


def serve(port: int, *parts: Any, host: str = LOOPBACK) -> Endpoint:
    """Serve `parts` and this process's own figures.

    Args:
        port: TCP port; 0 for a free one.
        parts: objects with `collect()`; see `openhelix.runtime.observe.collectors`.
        host: address to bind. Nothing is encrypted and nobody is asked who they are: beyond
            loopback, an address of a network that only those who may read can reach.

    Raises:
        ValueError: the port is taken, or the address is none of this host.
    """
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    visits = _Visits()
    registry.register(Group((visits, *parts)))  # noted before the parts are read
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ValueError(
            f"output.metrics_port: {port} at {host} cannot be used ({error.strerror}); "
            "0 takes a free one"
        ) from None
    server.set_app(_as_plain_text(server.get_app()))
    endpoint = Endpoint(host, server, thread, visits)
    log.info("metrics at %s", endpoint.url)
    return endpoint


# GPUs --------------------------------------------------------------------------------------------


class GpuMetrics:
    """Memory of each GPU: whole, in use by whomever, held by this process.

    torch is looked up among the modules that are loaded already, never imported: a process
    without it has no GPU memory to tell of, and the runtime needs no torch. A process that has
    not touched a GPU is left so, since asking for the figures would make a context of hundreds
    of megabytes on it.
    """

    def collect(self) -> Iterable[Metric]:
        """Return nothing where this process uses no GPU."""
        cuda = _cuda_in_use()
        if cuda is None:
            return
        total: dict[str, float] = {}
        used: dict[str, float] = {}
        reserved: dict[str, float] = {}
        for index in range(cuda.device_count()):
            held = float(cuda.memory_reserved(index))
            if not held:
                continue  # asking for more would make a context on a GPU of somebody else's
            free, whole = cuda.mem_get_info(index)
            name = str(index)
            total[name], used[name] = float(whole), float(whole - free)
            reserved[name] = held
        yield gauge("gpu_memory_total_bytes", total)
        yield gauge("gpu_memory_used_bytes", used)
        yield gauge("gpu_memory_reserved_bytes", reserved)


def _cuda_in_use() -> Any:
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_available() or not cuda.is_initialized():
        return None
    return cuda
