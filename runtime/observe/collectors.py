"""Turns the state of the runtime's parts into metrics on each scrape.

Each class here is given living objects and has `collect()`; pass them to
`openhelix.runtime.observe.metrics.serve`. What is read is read from another thread than the one that counts:
single integers and copies of small dictionaries, which the interpreter gives whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from prometheus_client.core import Metric

from openhelix.runtime.control.goals import MISTIMED, WireGoals
from openhelix.runtime.control.plans import RemotePlanner
from openhelix.runtime.observe.metrics import Histogram, counter, gauge
from openhelix.runtime.transport.wire import REFUSALS_EXPLAINED, PeerWatch

if TYPE_CHECKING:  # these are only looked at, never built
    from openhelix.runtime.control.episodes import EpisodeRunner
    from openhelix.runtime.control.loop import ControlLoop, Tick
    from openhelix.runtime.control.realtime import RealtimeStatus
    from openhelix.runtime.core.clock import Clock, Pacer
    from openhelix.runtime.transport.wire import ReaderStats

# What `SafetyFilter` writes to `Action.info`; other keys there are not metrics.
LIMITS = (
    *("box", "speed", "angular_speed", "acceleration", "angular_acceleration"),
    *("gripper", "not_finite"),
)
# Every reason that can be counted is there from the start, at 0: the first event of a series
# that begins with it is invisible to `rate` and `increase`.
STOP_REASONS = (
    *("camera_stale", "camera_frozen", "proprioception_stale", "latent_silent"),
    *("latent_mismatch", "robot_error", "operator"),
)
HOLD_REASONS = (
    *("chunk_ran_out", "first_plan_due", "plan_too_late", "not_understood"),
    *("told_to_wait", "told_to_stop", "nothing_to_do"),
)
SHED_REASONS = ("too_many_robots", "name_taken", "bad_name", "too_old", "out_of_order")
OUTCOMES = ("success", "failure")
UNJUDGED = ("free", "unjudged")  # task and outcome of an instruction without an oracle
DROP_REASONS = (  # of openhelix.runtime.transport.wire, then openhelix.runtime.transport.codec
    *("stale", "jump", "stale_source", "topics", "taken"),
    *("truncated", "oversize", "version", "header", "kind", "field", "dtype", "shape"),
    "nonfinite",
)
CHUNK_OUTCOMES = ("accepted", "void", "late", "stale", "bad")
ROW_FATES = ("consumed", "expired", "replaced", "voided")


class LoopMetrics:
    """A subscriber of the control loop that is also a collector.

    Args:
        loop: the loop.
        pacer: what paces it.
        episode_runner: who gives it its instructions, if anybody does.
        realtime: what the system granted, when it is known.
        tasks: names of those that will be attempted.
        latent_period_s: time between two latents, as the robot expects it.
    """

    def __init__(
        self,
        loop: ControlLoop,
        pacer: Pacer | None = None,
        episode_runner: EpisodeRunner | None = None,
        realtime: Callable[[], RealtimeStatus | None] = lambda: None,
        tasks: Sequence[str] = (),
        latent_period_s: float | None = None,
    ) -> None:
        self._loop, self._pacer, self._episode_runner = loop, pacer, episode_runner
        self._realtime = realtime
        self._states: dict[str, int] = dict.fromkeys(("wait", "run", "hold", "stop"), 0)
        self._first_ns: int | None = None
        self._last_ns = 0
        self._limited = dict.fromkeys(LIMITS, 0)
        self._lateness = Histogram("loop_tick_lateness_seconds")
        self._duration = Histogram("loop_tick_duration_seconds")
        self._age = Histogram("latent_age_seconds")
        self._latency = Histogram("latent_latency_seconds")
        self._system1 = Histogram("system1_latency_seconds")
        self._steps = Histogram("task_env_steps")
        self._chains = Histogram("chain_successes")
        self._latent_period_s, self._late = latent_period_s, 0
        self._tasks: dict[tuple[str, ...], float] = {
            key: 0
            for task in tasks
            for key in ([(task, outcome) for outcome in OUTCOMES] if task else [UNJUDGED])
        }
        self._judged = self._chained = 0
        loop.planner.latencies_s = self._system1.tap(loop.planner.latencies_s)

    def __call__(self, tick: Tick) -> None:
        """Take one tick; a few microseconds."""
        self._states[tick.state] += 1
        self._last_ns = tick.t_ns
        if self._first_ns is None:
            self._first_ns = tick.t_ns
        self._duration.observe(tick.duration_s)
        if self._pacer is not None:
            self._lateness.observe(self._pacer.stats.last_ns * 1e-9)
        if tick.latent_age_s is not None and tick.state == "run":
            self._age.observe(tick.latent_age_s)
        if tick.new_latent is not None:
            latency_ns = tick.t_ns - tick.new_latent.t_obs_ns
            self._latency.observe(latency_ns * 1e-9)
            if self._latent_period_s is not None:
                self._late += latency_ns * 1e-9 > self._latent_period_s
        for name in tick.sent.info:
            if name in self._limited:
                self._limited[name] += 1

    def collect(self) -> Iterable[Metric]:
        """Return all families of the loop."""
        loop = self._loop
        yield counter("loop_ticks", dict(self._states))
        ran_ns = 0 if self._first_ns is None else self._last_ns - self._first_ns
        yield counter("loop_running_seconds", ran_ns * 1e-9)
        yield gauge("loop_period_seconds", loop.period_ns * 1e-9)
        yield gauge("loop_instruction_id", loop.instruction_id)
        if self._pacer is not None:
            yield counter("loop_deadlines_missed", self._pacer.stats.missed)
            yield self._lateness.family()
        yield self._duration.family()
        yield from self._chunks()
        yield from self._latents()
        yield self._system1.family()
        yield counter("system1_failures", loop.planner.failures)
        yield from self._safety()
        yield from self._attempts()
        status = self._realtime()
        if status is not None:
            granted = {
                "fifo": status.fifo,
                "memory_lock": status.memory_locked,
                "gc_freeze": status.gc_frozen,
            }
            yield gauge("realtime_granted", {name: float(v) for name, v in granted.items()})

    def _chunks(self) -> Iterable[Metric]:
        chunks = self._loop.chunks
        count = asdict(chunks.counters)
        yield counter("chunks", {name: count[f"chunks_{name}"] for name in CHUNK_OUTCOMES})
        yield counter("chunks_used", count["chunks_used"])
        yield counter("chunk_rows", {name: count[f"rows_{name}"] for name in ROW_FATES})
        yield counter("chunk_rows_blended", count["rows_blended"])
        yield counter("chunk_run_outs", count["runs_out"])
        yield gauge("chunk_remaining_seconds", chunks.remaining_s(self._loop.clock.now_ns()))
        yield gauge("chunk_slowdown", chunks.slowed)

    def _latents(self) -> Iterable[Metric]:
        goals = self._loop.goals
        if goals is None:
            return
        yield counter("latents_received", goals.received)
        yield counter("latents_void", goals.void)
        yield counter("latents_missed", goals.missed)
        yield counter("latents_mismatched", goals.mismatched)
        yield counter("latents_mistimed", dict.fromkeys(MISTIMED, 0) | goals.mistimed)
        yield counter("latents_refused", goals.refusals)
        if self._loop.understood is not None:
            yield gauge("instruction_understood", self._loop.understood)
        if self._latent_period_s is not None:
            yield counter("latents_late", self._late)
            yield gauge("latent_period_seconds", self._latent_period_s)
        yield self._age.family()
        yield self._latency.family()

    def _safety(self) -> Iterable[Metric]:
        safety, watchdog = self._loop.safety, self._loop.watchdog
        yield gauge(
            "safety_mode",
            {mode: float(safety.mode.value == mode) for mode in ("run", "hold", "stop")},
        )
        yield counter("safety_stops", dict.fromkeys(STOP_REASONS, 0) | safety.stops)
        yield counter("safety_holds", dict.fromkeys(HOLD_REASONS, 0) | safety.holds)
        yield counter("safety_limited", dict(self._limited))
        yield gauge("source_age_seconds", watchdog.ages_s(self._loop.clock.now_ns()))
        yield gauge("source_limit_seconds", watchdog.stop_after_s())
        yield counter("future_stamps", watchdog.future_refused)

    def _attempts(self) -> Iterable[Metric]:
        if self._episode_runner is None:
            return
        results = list(self._episode_runner.results)
        for result in results[self._judged :]:
            judged = "success" if result.success else "failure"
            key = UNJUDGED if result.success is None else (result.task, judged)
            self._tasks[key] = self._tasks.get(key, 0) + 1
            if result.success:
                self._steps.observe(result.env_steps)
        self._judged = len(results)
        chains = list(self._episode_runner.chains)
        for in_a_row in chains[self._chained :]:
            self._chains.observe(in_a_row)
        self._chained = len(chains)
        yield counter("tasks", dict(self._tasks))
        yield self._steps.family()
        yield self._chains.family()


class _Totals(Protocol):
    published: int
    batches: int
    refused: int
    failed: int
    skipped: int
    shed: Any
    compute_s: Any
    wait_s: Any


class _Scheduler(Protocol):
    totals: Any
    robots: Any


class System2Metrics:
    """System 2's scheduler: `openhelix.system2.scheduler.GoalScheduler`, or anything that counts alike.

    Args:
        scheduler: has `robots` (by name, each with `pending`) and `totals`.
        hz: latents per second promised to each robot.
        clock: the scheduler's.
    """

    def __init__(self, scheduler: _Scheduler, hz: float, clock: Clock) -> None:
        self._scheduler, self._hz, self._clock = scheduler, hz, clock
        self._latency = Histogram("system2_latency_seconds")
        self._wait = Histogram("system2_wait_seconds")
        totals = scheduler.totals
        totals.compute_s = self._latency.tap(totals.compute_s)
        totals.wait_s = self._wait.tap(totals.wait_s)

    def collect(self) -> Iterable[Metric]:
        """Return all families of System 2."""
        totals: _Totals = self._scheduler.totals
        robots = dict(self._scheduler.robots)
        yield self._latency.family()
        yield self._wait.family()
        yield counter("system2_published", totals.published)
        yield counter("system2_batches", totals.batches)
        yield counter("system2_skipped", totals.skipped)
        yield counter("system2_refused", totals.refused)
        yield counter("system2_failed", totals.failed)
        yield counter("system2_shed", dict.fromkeys(SHED_REASONS, 0) | totals.shed)
        yield gauge("system2_queue", sum(r.pending is not None for r in robots.values()))
        yield gauge("system2_robots", len(robots))
        yield gauge("system2_rate_hertz", self._hz)
        yield counter("system2_robot_latents", {n: r.seq for n, r in robots.items()})
        yield counter("system2_robot_skipped", {n: r.skipped for n, r in robots.items()})
        now_ns = self._clock.now_ns()
        silence_s = {n: max(0.0, (now_ns - r.heard_ns) * 1e-9) for n, r in robots.items()}
        yield gauge("system2_robot_silence_seconds", silence_s)


class Sender(Protocol):
    """The sending half of a channel."""

    @property
    def sent(self) -> int: ...
    @property
    def dropped(self) -> int: ...


def loop_wire(loop: ControlLoop, ticks: Sender | None = None) -> WireMetrics:
    """Return the channels of a loop whose System 1 and System 2 are other processes."""
    readers: dict[str, ReaderStats] = {}
    senders: dict[str, Sender] = {} if ticks is None else {"ticks": ticks}
    if isinstance(loop.goals, WireGoals):
        senders["requests"], readers["latents"] = loop.goals.sender, loop.goals.reader.stats
    if isinstance(loop.planner, RemotePlanner):
        senders["plans"], readers["chunks"] = loop.planner.sender, loop.planner.reader.stats
    return WireMetrics(readers, senders)


class WireMetrics:
    """Channels of `openhelix.runtime.transport.wire`.

    Args:
        readers: statistics by channel name.
        publishers: what sends, by channel name.
    """

    def __init__(
        self,
        readers: Mapping[str, ReaderStats] | None = None,
        publishers: Mapping[str, Sender] | None = None,
    ) -> None:
        self._readers, self._publishers = dict(readers or {}), dict(publishers or {})

    def collect(self) -> Iterable[Metric]:
        """Return all families of the wire."""
        readers = self._readers
        if readers:
            yield counter("wire_received", {n: s.received for n, s in readers.items()})
            yield counter("wire_delivered", {n: s.delivered for n, s in readers.items()})
            yield counter("wire_gaps", {n: s.gaps for n, s in readers.items()})
            yield counter("wire_restarts", {n: s.restarts for n, s in readers.items()})
            dropped: dict[tuple[str, ...], float] = {
                (name, reason): count
                for name, stats in readers.items()
                for reason, count in (dict.fromkeys(DROP_REASONS, 0) | stats.dropped).items()
            }
            yield counter("wire_dropped", dropped)
        if self._publishers:
            yield counter("wire_sent", {n: p.sent for n, p in self._publishers.items()})
            yield counter("wire_send_dropped", {n: p.dropped for n, p in self._publishers.items()})


class Sink(Protocol):
    """What is written beside the loop: a recorder, a video, a viewer."""

    @property
    def written(self) -> int: ...
    @property
    def dropped(self) -> int: ...
    @property
    def queued(self) -> int: ...


class SinkMetrics:
    """Recording, video and viewer by name."""

    def __init__(self, sinks: Mapping[str, Sink]) -> None:
        self._sinks = dict(sinks)

    def collect(self) -> Iterable[Metric]:
        """Return all families of the sinks."""
        yield counter("sink_written", {n: s.written for n, s in self._sinks.items()})
        yield counter("sink_dropped", {n: s.dropped for n, s in self._sinks.items()})
        yield gauge("sink_queue", {n: s.queued for n, s in self._sinks.items()})


class PeerMetrics:
    """What Prometheus is told of watched sockets.

    Args:
        watches: by channel name.
    """

    def __init__(self, watches: Mapping[str, PeerWatch]) -> None:
        self._watches = dict(watches)

    def collect(self) -> Iterable[Metric]:
        """Return both families."""
        refused: dict[tuple[str, ...], float] = {
            (name, reason): watch.refused[reason]
            for name, watch in self._watches.items()
            for reason in REFUSALS_EXPLAINED
        }
        yield counter("wire_refused", refused)
        yield counter("wire_ended", {name: watch.ended for name, watch in self._watches.items()})
