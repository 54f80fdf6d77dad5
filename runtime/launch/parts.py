"""The two processes on a robot's side: the control loop's and System 1's.

`ControlProcess` has one robot's driver and the control loop, run in real time, and nothing else:
System 1, System 2 and the observer have their own processes. `setup` connects; `run` waits for the
command to start, then paces the loop and collects the run's figures. The robot is stopped on every
exit path: normal end, Ctrl-C, error.

`System1Process` serves the policy over ZeroMQ, always on the newest request. If the policy raises,
the reply has no chunk (`PlanReply.chunk` is None) and the policy is called again at the next
request: the loop runs out of actions and holds, but does not die.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from openhelix.runtime.control.assembly import (
    ControlStack,
    build_stack,
    check_parts,
    make_clock,
    make_policy,
    remote_planner,
    wire_goals,
)
from openhelix.runtime.control.episodes import Assignment, live, task_rows
from openhelix.runtime.control.goals import WireGoals
from openhelix.runtime.control.plans import PlanReply, PlanRequest, planned
from openhelix.runtime.control.realtime import RealtimeStatus, enter, leave, one_heap
from openhelix.runtime.core.clock import percentiles
from openhelix.runtime.core.config import Part, RunConfig, validate
from openhelix.runtime.core.interfaces import (
    ActionChunk,
    LatentSpec,
    Policy,
    PolicySpec,
    check_latent,
)
from openhelix.runtime.core.targets import written_spec
from openhelix.runtime.observe.collectors import WireMetrics
from openhelix.runtime.observe.metrics import LOOPBACK, Endpoint, GpuMetrics, serve
from openhelix.runtime.observe.observer import ObserverProcess, Subscribers
from openhelix.runtime.robots.base import (
    Robot,
    RobotError,
    make_robot,
    set_world,
    world_options,
)
from openhelix.runtime.transport.rpc import RpcClient, RpcError
from openhelix.runtime.transport.sockets import is_local
from openhelix.runtime.transport.wire import NewestReader, Publisher

# ------------------------------------------------------------------------------------------------
# The control process


log = logging.getLogger(__name__)
SYSTEM1_TIMEOUT_S = 240.0
JOIN_S = 5.0  # how long the first tick waits for each process that is to hear it
OFFSET_ROUNDS = 8  # questions to System 2's clock; the quickest answer counts


class ControlProcess:
    """The control loop with the driver of one robot.

    Args:
        config: `RunConfig` as JSON data.
        channels: endpoints by channel name; see `openhelix.runtime.launch.graph`.
        assignments: [{"task": ..., "instruction": ...}, ...].
        initial: first state of the robot's world; see `set_world`.
        stay: when nothing is left to do, hold still and wait for words, until told not to.
    """

    def __init__(
        self,
        config: dict[str, Any],
        channels: dict[str, str],
        assignments: Sequence[dict[str, Any]],
        initial: dict[str, Any] | None = None,
        stay: bool = False,
    ) -> None:
        one_heap()
        self._stay = stay
        self._config = validate(RunConfig, config)
        self._channels = channels
        self._assignments = [Assignment(**row) for row in assignments]
        self._initial = initial
        self._start = threading.Event()
        self._halt = threading.Event()
        self._finished = threading.Event()
        self._clock_offset_s: dict[str, float] | None = None
        self._report: dict[str, Any] = {}
        self._robot: Robot | None = None
        self._goals: WireGoals | None = None
        self._stack: ControlStack | None = None
        self._realtime: RealtimeStatus | None = None
        self._subscribers: Subscribers | None = None
        self._metrics_url: str | None = None

    @property
    def stack(self) -> ControlStack | None:
        """The loop and what belongs to it, once it is set up."""
        return self._stack

    def setup(self) -> None:
        config, channels = self._config, self._channels
        # Wrong options of the driver are told before anybody waits for System 1.
        self._robot = robot = self._make_robot()
        written = written_spec(config.system1.policy)
        if written is not None:  # and a camera that is missing, before anything has been loaded
            check_parts(config, robot.spec, written)
        spec = self._policy_spec()
        check_parts(config, robot.spec, spec)
        robot.connect()
        set_world(robot, self._initial)
        if spec.latent is not None:
            self._goals = wire_goals(config, channels["requests"], channels["latents"])
        planner = remote_planner(config, channels["plans"], channels["chunks"])
        stack = build_stack(config, robot, spec, planner, self._goals, make_clock(config))
        self._stack, self._spec = stack, spec
        ticks = channels["ticks"] if ObserverProcess.wanted(config) else None
        tasks = [assignment.task for assignment in self._assignments]
        self._subscribers = Subscribers(config, Path(), stack, ticks, lambda: self._realtime, tasks)
        self._metrics_url = self._subscribers.metrics_url

    def run(self, stop: threading.Event) -> None:
        assert self._stack is not None and self._robot is not None
        while not self._start.wait(0.05):
            if stop.is_set():
                return
            self._robot.get_observation()  # keeps its queues empty while System 2 starts
        self._await_hearers(self._robot, stop)
        control = self._config.control
        self._realtime = enter(
            priority=control.fifo_priority or None,
            cpus=None if control.cpu is None else (control.cpu,),
        )
        try:
            log.info("the loop starts: %s", self._realtime.reason or "SCHED_FIFO")
            self._stack.loop.arm()
            self._stack.pacer.start()
            self._stack.episode_runner.run(
                self._assignments, lambda: self._halt.is_set() or stop.is_set(), self._stay
            )
        finally:
            self._robot.stop("the run has ended")
            log.info("the robot is stopped")
            self._stack.episode_runner.talk.end()
            if self._subscribers is not None:
                self._subscribers.finish()
            leave(self._realtime)
            self._report = self._make_report()
            self._finished.set()
        stop.wait()  # stay until the report has been fetched

    def _await_hearers(self, robot: Robot, stop: threading.Event) -> None:
        """Let the process that looks on, and System 2, hear us before the first tick; not for ever."""
        assert self._subscribers is not None
        hearers = [
            (self._subscribers.heard, "nobody hears the ticks yet; what is missed is counted")
        ]
        if self._goals is not None:
            self._goals.reconnect()
            hearers.append((self._goals.heard, "System 2 does not hear us yet; it is asked again"))
        for heard, otherwise in hearers:
            give_up_s = time.monotonic() + JOIN_S
            while not heard(0.05):
                robot.get_observation()
                if time.monotonic() > give_up_s or stop.is_set():
                    log.warning(otherwise)
                    break

    def health(self) -> dict[str, Any]:
        runner = self._stack.episode_runner if self._stack else None
        current, goals = runner.current if runner else None, self._goals
        return {
            "finished": self._finished.is_set(),
            "task": current.task if current else "",
            "instruction": current.instruction if current else "",
            "steps": runner.steps if runner else 0,
            **task_rows(
                runner.results if runner else [], runner is not None and runner.interrupted
            ),
            **live(self._subscribers.statistics if self._subscribers else None),
            "entries": runner.journal.rows(30) if runner else [],
            "latents_received": goals.received if goals else 0,
            "latents_mismatched": goals.mismatched if goals else 0,
            "metrics_url": self._metrics_url,
        }

    def handlers(self) -> Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        return {
            "start": self._on_start,
            "halt": self._on_halt,
            "safe_stop": self._on_safe_stop,
            "say": self._on_say,
            "leave": self._on_leave,
            "report": lambda _: self._report,
            "await_scrape": self._on_await_scrape,
        }

    def close(self) -> None:
        if self._stack is not None:
            self._stack.close()
        if self._subscribers is not None:
            self._subscribers.close()
        if self._robot is not None:
            self._robot.disconnect()

    def _policy_spec(self) -> PolicySpec:
        """Ask System 1 what it needs, once it is ready."""
        client = RpcClient(self._channels["system1_control"], keys=self._keys())
        try:
            deadline_s = time.monotonic() + SYSTEM1_TIMEOUT_S
            while time.monotonic() < deadline_s:
                try:
                    health = client.call("health", {}, 1.0)
                except RpcError:
                    health = {}
                if health.get("policy_spec") is not None:
                    return PolicySpec.from_dict(health["policy_spec"])
                time.sleep(0.1)
        finally:
            client.close()
        raise RobotError(f"system1: not ready after {SYSTEM1_TIMEOUT_S:.0f} s")

    def _measure_offset(self) -> dict[str, float] | None:
        """Return System 2's clock minus ours, if it is another host's and answers."""
        endpoint = self._channels["system2_control"]
        if is_local(endpoint):
            return None
        client = RpcClient(endpoint, keys=self._keys())
        try:
            return clock_offset_s(client.call)
        except (RpcError, KeyError, TypeError) as error:  # the report does without
            log.warning("System 2's clock could not be read: %s", error)
            return None
        finally:
            client.close()

    def _keys(self) -> str | None:
        keys = self._config.transport.keys
        return str(keys) if keys else None

    def _make_robot(self) -> Robot:
        robot, world = self._config.robot, self._config.world
        options = world_options(robot.name, robot.options, world)
        if robot.name == "sim":
            names = ("actions", "states", "frames", "world_control")
            options |= {name: self._channels[name] for name in names}
            options["cameras"] = world.cameras
            options["hz"] = self._config.control.hz
            options["keys"] = self._keys()
        return make_robot(robot.name, **options)

    def _on_start(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Compare what System 2 gives with what System 1 needs, then go."""
        if self._goals is not None and self._spec.latent is not None:
            given = LatentSpec(**arguments["latent_spec"])
            check_latent(given, self._spec.latent)
            self._goals.expect(given)
            self._clock_offset_s = self._measure_offset()
        self._start.set()
        return {}

    def _on_await_scrape(self, _: dict[str, Any]) -> dict[str, Any]:
        """Answer when Prometheus has fetched the final counts; at once if nobody scrapes."""
        return {"scraped": self._subscribers is not None and self._subscribers.await_scrape()}

    def _on_safe_stop(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Stop the robot for good, as the watchdog would; `who` is told in the reason."""
        if self._stack is None:
            raise ValueError("control: the robot is not connected yet")
        who = " ".join(str(arguments["who"]).split())[:80]
        log.warning("a stop was ordered by %s", who)
        self._stack.loop.watchdog.order_stop(who)
        return {}

    def _on_say(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Take what a person says; see `Talk.say`."""
        if self._stack is None:
            raise ValueError("control: the robot is not connected yet")
        return self._stack.episode_runner.talk.say(arguments["text"], str(arguments["who"]))

    def _on_leave(self, _: dict[str, Any]) -> dict[str, Any]:
        """Whom the robot waited for has left: it finishes what it does, and the run ends."""
        if self._stack is not None:
            self._stack.episode_runner.leave()
        return {}

    def _on_halt(self, _: dict[str, Any]) -> dict[str, Any]:
        """Stop the robot at the end of this tick and finish the report."""
        self._halt.set()
        return {}

    def _make_report(self) -> dict[str, Any]:
        assert self._stack is not None and self._realtime is not None
        assert self._subscribers is not None
        stack = self._stack
        lateness = stack.pacer.summary()
        goals = stack.loop.goals
        return {
            "clock": "realtime",
            "hz2": self._config.system2.hz,
            "steps_limit": self._config.tasks.steps_limit,
            "journal": stack.episode_runner.journal.rows(),
            **task_rows(stack.episode_runner.results, stack.episode_runner.interrupted),
            **self._subscribers.statistics.report(),
            "first_action_ns": self._subscribers.statistics.first_action_ns,
            "ticks_told": self._subscribers.told,
            "deadline_missed": lateness.missed,
            "tick_lateness_s": lateness.as_seconds() if lateness.ticks else None,
            "latents_received": goals.received if goals else 0,
            "latents_void": goals.void if goals else 0,
            "latents_mismatched": goals.mismatched if goals else 0,
            "latents_mistimed": dict(goals.mistimed) if goals else {},
            "latents_overtaken": self._goals.reader.stats.overtaken if self._goals else 0,
            "latents_dropped": dict(self._goals.reader.stats.dropped) if self._goals else {},
            "latents_refused": goals.refusals if goals else 0,
            "latents_missed": goals.missed if goals else 0,
            "s1_latency_s": percentiles(stack.loop.planner.latencies_s, ("p50", "p99")),
            "s2_latency_s": percentiles(goals.latencies_s if goals else (), ("p50", "p99")),
            "stopped": str(stack.loop.safety.stop) if stack.loop.stopped else None,
            "safe_stops": dict(stack.loop.safety.stops),
            "clock_offset_s": self._clock_offset_s,
            "realtime": {
                "fifo": self._realtime.fifo,
                "reason": self._realtime.reason,
                "cpus": list(self._realtime.cpus),
            },
        }


def clock_offset_s(call: Callable[..., dict[str, Any]]) -> dict[str, float]:
    """Ask a remote clock; return remote minus local time and how far off that may be, in seconds.

    The answer was given somewhere within the round trip, so the offset is taken at its middle
    and is wrong by at most half the time on the way. Clocks that drift apart later (tens of
    microseconds per second) are not followed.

    Args:
        call: `RpcClient.call` of a server on that host.
    """
    found = []
    for _ in range(OFFSET_ROUNDS):
        asked_ns = time.monotonic_ns()
        answer = call("time", timeout_s=0.5)
        heard_ns = time.monotonic_ns()
        received_ns, sent_ns = answer["t_received_ns"], answer["t_sent_ns"]
        away_ns = (heard_ns - asked_ns) - (sent_ns - received_ns)
        found.append((away_ns / 2, (received_ns + sent_ns - asked_ns - heard_ns) / 2))
    uncertainty_ns, offset_ns = min(found)
    return {"offset": offset_ns * 1e-9, "uncertainty": uncertainty_ns * 1e-9}


# ------------------------------------------------------------------------------------------------
# System 1's process


class System1Process:
    """The node "system1" of a run's graph; see `openhelix.runtime.launch.node.Node`.

    Args:
        policy: {"target": "module:Class", "options": {...}}.
        plans: endpoint on which requests arrive (bound here).
        chunks: endpoint on which replies go out (bound here).
        keys: folder of CURVE keys, off loopback.
        metrics_port: where Prometheus finds this process's metrics; 0 for a free port, None
            for no endpoint.
        metrics_host: the address that it binds.
    """

    def __init__(
        self,
        policy: dict[str, Any],
        plans: str,
        chunks: str,
        keys: str | None = None,
        metrics_port: int | None = None,
        metrics_host: str = LOOPBACK,
    ) -> None:
        self._metrics_at = (metrics_port, metrics_host)
        self._metrics: Endpoint | None = None
        self._part = Part(**policy)
        self._endpoints, self._keys = (plans, chunks), keys
        self._policy: Policy | None = None
        self._reader: NewestReader[PlanRequest] | None = None
        self._replies: Publisher | None = None
        self._reset_for: tuple[int, int] | None = None  # instruction and seed
        self._planned = 0
        self._failed = 0
        self._compute_s = 0.0

    def setup(self) -> None:
        policy = make_policy(self._part)
        self._policy = policy  # known from here on: what it needs is compared while it warms up
        policy.warm_up()
        plans, chunks = self._endpoints
        self._reader = NewestReader(plans, "plans", PlanRequest, bind=True, keys=self._keys)
        self._replies = Publisher(chunks, "chunks", keys=self._keys)
        port, host = self._metrics_at
        if port is not None:
            wire = WireMetrics({"plans": self._reader.stats}, {"chunks": self._replies})
            self._metrics = serve(port, wire, GpuMetrics(), host=host)

    def run(self, stop: threading.Event) -> None:
        assert self._reader is not None
        while not stop.is_set():
            self._reader.wait(0.05)
            request = self._reader.poll()
            if request is not None:
                self._answer(request)

    def health(self) -> dict[str, Any]:
        policy, reader = self._policy, self._reader
        return {
            "planned": self._planned,
            "failed": self._failed,
            "compute_s": self._compute_s,
            "policy_spec": asdict(policy.spec) if policy else None,
            "device": str(getattr(policy, "device", "cpu")) if policy else None,
            "untrained": bool(getattr(policy, "untrained", False)),
            "dropped": dict(reader.stats.dropped) if reader else {},
            "metrics_url": self._metrics.url if self._metrics else None,
        }

    def handlers(self) -> Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        return {}

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        for part in (self._reader, self._replies):
            if part is not None:
                part.close()

    def _answer(self, request: PlanRequest) -> None:
        assert self._policy is not None and self._replies is not None
        observation = request.observation
        start_s = time.perf_counter()
        chunk: ActionChunk | None = None
        try:
            # A restarted control process counts instructions from 1 again, with another seed.
            if self._reset_for != (observation.instruction_id, request.seed):
                self._reset_for = (observation.instruction_id, request.seed)
                self._policy.reset(request.seed)
            chunk = planned(self._policy, request)
            self._planned += 1
        except Exception:
            self._failed += 1
            log.exception("System 1 failed; the loop goes on without this chunk")
        self._compute_s = time.perf_counter() - start_s
        self._replies.send(
            PlanReply(observation.instruction_id, observation.t_ns, chunk, self._compute_s)
        )
