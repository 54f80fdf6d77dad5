"""One run, on either clock: start, watch, report, end.

`run_realtime` starts a graph of processes, starts the loop once all are ready, follows it and
fetches its report. `run_lockstep` runs the same loop, policy and System 2 in this process, with a
clock that advances only when slept on, so that the same seed gives the same report on any machine
(except for figures that measure the machine).
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from openhelix.runtime.control.assembly import (
    ControlStack,
    build_stack,
    check_parts,
    check_trigger,
    lockstep_goals,
    make,
    make_clock,
    make_policy,
    sync_planner,
)
from openhelix.runtime.control.episodes import (
    Assignment,
    LoopStatistics,
    live,
    parts_of,
    task_rows,
    versions,
)
from openhelix.runtime.control.loop import Tick
from openhelix.runtime.core.clock import Clock, percentiles
from openhelix.runtime.core.config import CommandFailed, RunConfig
from openhelix.runtime.core.interfaces import (
    Engine,
    LatentSpec,
    PartFailed,
    Policy,
    PolicySpec,
    check_engine,
)
from openhelix.runtime.core.targets import written_spec
from openhelix.runtime.launch.graph import RAY, Graph, GraphError
from openhelix.runtime.launch.node import Interrupts, Stages, interruptible
from openhelix.runtime.observe.display import Display
from openhelix.runtime.observe.observer import Subscribers
from openhelix.runtime.observe.prompt import Prompt, Say
from openhelix.runtime.observe.status_source import StatusRecord
from openhelix.runtime.robots.base import Robot, make_robot, set_world, world_options
from openhelix.runtime.robots.env import stepped
from openhelix.runtime.transport.rpc import RpcError

READY_TIMEOUT_S = 300.0  # the first start builds the laptop model; later ones take seconds
WATCH_S = 0.1  # how often the control process is asked how it is


class RunFailed(CommandFailed):
    """The run could not be completed; one line says why."""


# ------------------------------------------------------------------------------------------------
# The deterministic clock


def run_lockstep(
    config: RunConfig,
    assignments: Sequence[Assignment],
    initial: dict[str, Any] | None,
    folder: Path,
    display: Display,
    prompt: Prompt | None = None,
) -> dict[str, Any]:
    """Run in this process; return the report.

    With a `prompt` the robot waits for words when it has nothing to do.

    A policy or an engine that raises ends the run; `error` in the report then says in one line
    whose error it was, and the rest what ran until then.
    """
    started_s = time.monotonic()
    display.say("loading System 1 and System 2")
    clock = make_clock(config)
    with interruptible() as interrupted, interrupted.patience(0):  # loading takes its time
        robot, policy, engine = _lockstep_parts(config, clock)
    goals = None
    if engine is not None and policy.spec.latent is not None:
        goals = lockstep_goals(config, engine, policy.spec.latent)
    untrained = say_untrained(display, system1=policy, system2=engine)
    spec_id = engine.spec.spec_id if engine is not None else None
    robot.connect()
    planner = sync_planner(config, policy)
    stack = build_stack(config, robot, policy.spec, planner, goals, clock)
    subscribers = Subscribers(config, folder, stack)
    statistics = subscribers.statistics
    failure = None
    try:
        with interruptible() as interrupted, display, interrupted.patience(1):
            progress = _Progress(stack, statistics, config, display, interrupted)
            stack.loop.subscribers.append(progress)
            set_world(robot, initial)
            ready_s = time.monotonic() - started_s
            stack.loop.arm()
            runner = stack.episode_runner
            try:
                with _talking(prompt, display, runner.talk.say, runner.leave, interrupted.set):
                    runner.run(assignments, interrupted.is_set, prompt is not None)
            except PartFailed as error:
                if os.environ.get("OPENHELIX_DEBUG"):
                    raise
                failure = str(error)
                stack.episode_runner.broken(failure)
            except KeyboardInterrupt:  # the second: a part does not come to an end
                stack.episode_runner.broken("interrupted")
            last = {"entries": stack.episode_runner.journal.rows(30)}
            display.progress(last, config.tasks.steps_limit)
    finally:
        robot.stop("the run has ended")
        subscribers.finish()
        sinks = subscribers.close()
        stack.close()
        robot.disconnect()
    say_losses(display, sinks)
    return _report(config, stack, statistics) | {
        "ready_s": ready_s,
        "sinks": sinks,
        "untrained": untrained,
        "error": failure,
        **parts_of(config, policy.spec, spec_id),
    }


def _lockstep_parts(config: RunConfig, clock: Clock) -> tuple[Robot, Policy, Engine | None]:
    """Build the robot, System 1, and System 2 where it needs one; they fit each other."""
    name, options = _embedded(config, clock)
    robot = make_robot(name, **options)  # first: its options are checked before models are loaded
    written = written_spec(config.system1.policy)
    if written is not None:
        check_parts(config, robot.spec, written)
    policy: Policy = _made("system1", lambda: make_policy(config.system1.policy))
    check_parts(config, robot.spec, policy.spec)
    if policy.spec.latent is None:
        return robot, policy, None
    engine: Engine = _made("system2", lambda: make(config.system2.engine))
    check_engine(engine, f"system2.engine.target: {config.system2.engine.target}")
    return robot, policy, engine


def _made(part: str, make_it: Callable[[], Any]) -> Any:
    """Build a part; what its own code raises is told in one line that names the part."""
    try:
        return make_it()
    except (ValueError, ModuleNotFoundError, CommandFailed):
        raise  # these say in one line what is wrong
    except Exception as error:
        if os.environ.get("OPENHELIX_DEBUG"):
            raise
        raise PartFailed(part, error) from error


def say_untrained(display: Display, **systems: Any) -> list[str]:
    """Tell which systems have random weights; return their names."""
    names = [name for name, part in systems.items() if getattr(part, "untrained", False)]
    for name in names:
        display.say(f"{name} is untrained, as asked for: its weights are random")
    return names


def _embedded(config: RunConfig, clock: object) -> tuple[str, dict[str, Any]]:
    """The driver that steps a world inside this process, in place of the real-time one."""
    name, options = config.robot.name, dict(config.robot.options) | {"clock": clock}
    if name == "sim":
        name, more = stepped(config.world.name)
        options |= more
    return name, world_options(name, options, config.world)


class _Progress:
    """A subscriber that tells the display, at most a few times a second."""

    def __init__(
        self,
        stack: ControlStack,
        statistics: LoopStatistics,
        config: RunConfig,
        display: Display,
        interrupted: Interrupts,
    ) -> None:
        self._stack, self._statistics = stack, statistics
        self._limit, self._display = config.tasks.steps_limit, display
        self._interrupted = interrupted
        self._next_s = 0.0

    def __call__(self, tick: Tick) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + 0.2
        if self._display.gone:
            self._interrupted.set()
        runner = self._stack.episode_runner
        current = runner.current
        health = task_rows(runner.results) | live(self._statistics)
        health["entries"] = runner.journal.rows(30)
        health["instruction"] = current.instruction if current else ""
        self._display.progress(health | {"steps": runner.steps}, self._limit)


def _report(config: RunConfig, stack: ControlStack, statistics: LoopStatistics) -> dict[str, Any]:
    goals = stack.loop.goals
    published = goals.received + goals.void + goals.mismatched if goals else 0
    lateness = stack.pacer.summary()
    return {
        "clock": "lockstep",
        "hz2": config.system2.hz,
        "interval_steps": config.interval_steps,
        "latency_steps": config.lockstep.latency_steps,
        "steps_limit": config.tasks.steps_limit,
        "journal": stack.episode_runner.journal.rows(),
        **task_rows(stack.episode_runner.results, stack.episode_runner.interrupted),
        **statistics.report(),
        "deadline_missed": lateness.missed,
        "tick_lateness_s": lateness.as_seconds(),
        "latents_published": published,
        "latents_missed": goals.missed if goals else 0,
        "latents_mismatched": goals.mismatched if goals else 0,
        "latents_refused": goals.refusals if goals else 0,
        "s1_latency_s": percentiles(stack.loop.planner.latencies_s, ("p50", "p99")),
        "s2_latency_s": percentiles(goals.latencies_s if goals else (), ("p50", "p99")),
        "stopped": str(stack.loop.safety.stop) if stack.loop.stopped else None,
        "safe_stops": dict(stack.loop.safety.stops),
        "device": platform.machine(),
        "versions": versions(),
        "seed": config.seed,
    }


# ------------------------------------------------------------------------------------------------
# The wall clock


def run_realtime(
    config: RunConfig,
    assignments: Sequence[Assignment],
    initial: dict[str, Any] | None,
    folder: Path,
    display: Display,
    prompt: Prompt | None = None,
) -> dict[str, Any]:
    """Run on real processes; return the report.

    With a `prompt` the robot waits for words when it has nothing to do.

    Raises:
        ConfigError: a part refused its configuration.
        RunFailed: a part failed and the run could not go on.
    """
    job = {
        "assignments": [asdict(a) for a in assignments],
        "initial": initial,
        "stay": prompt is not None,
    }
    started_s = time.monotonic()
    stages = Stages()  # of the command itself
    stages.reach("imported")
    graph = Graph(config, job, folder)
    record = StatusRecord.of(graph.endpoints.control, graph.has("observer"), config)
    with interruptible() as interrupted, display, record.kept(folder):
        try:
            with interrupted.patience(0):  # nothing moves yet
                _start(graph, config, display, interrupted)
                untrained = say_untrained(
                    display,
                    system1=SimpleNamespace(**graph.health("system1")),
                    system2=SimpleNamespace(**graph.health("system2")),
                )
                spec = graph.latent_spec()
                check_trigger(config, LatentSpec(**spec))
            stages.reach("all_ready")
            graph.ask("control", "start", timeout_s=30.0, latent_spec=spec)
            ready_s = time.monotonic() - started_s

            def say(text: str, who: str) -> dict[str, Any]:
                return graph.ask("control", "say", text=text, who=who)

            def leave() -> None:
                with suppress(RpcError):  # it has ended already
                    graph.ask("control", "leave")

            with _talking(prompt, display, say, leave, interrupted.set):
                report, error = _watch(graph, config, display, interrupted)
            parts = {name: graph.health(name) for name in ("system1", "system2")}
            nodes = startup(graph, stages)
            if graph.has("observer"):
                report["sinks"] = _finish(graph, display, interrupted, report["ticks_told"])
            if not report["interrupted"]:
                # The report is here: nothing may take it away.
                with (
                    suppress(KeyboardInterrupt, RpcError),
                    interrupted.patience(interrupted.heard),
                ):
                    graph.ask("control", "await_scrape", timeout_s=15.0)
        except (GraphError, RpcError) as error:
            raise RunFailed(str(error)) from error
        finally:
            graph.close()
    # Both clocks are this host's: control runs beside the head.
    first_ns = report.pop("first_action_ns")
    del report["ticks_told"]
    system1, system2 = parts["system1"], parts["system2"]
    policy = system1.get("policy_spec")
    return report | {
        **parts_of(
            config, PolicySpec.from_dict(policy) if policy else None, system2.get("spec_id")
        ),
        "first_action_s": None if first_ns is None else first_ns * 1e-9 - started_s,
        "latents_published": system2.get("published"),
        "latents_skipped": system2.get("skipped"),
        "untrained": untrained,
        "error": error,
        "ready_s": ready_s,
        "startup": {
            "command": stages.reached,
            "nodes": nodes,
            "first_action_s": None if first_ns is None else (first_ns - stages.begun_ns) * 1e-9,
        },
        "device": ", ".join(filter(None, (platform.machine(), system2.get("device")))),
        "versions": versions(),
        "seed": config.seed,
    }


def startup(graph: Graph, stages: Stages) -> dict[str, Any]:
    """Return how long each node of a run took to reach which stage of its start.

    `begun_s` is when its process began, counted from the command's own; null on another host,
    whose clock is another one, and for a System 2 that others run. The rest counts from there: its
    runner was `imported`, its part `built` and `ready`, each with the processor time used until
    then.
    """
    found = {}
    for name in graph.node_names:
        told = dict(graph.health(name).get("startup") or {})
        begun_ns = told.pop("begun_ns", None)
        begun_s = None
        if begun_ns is not None and graph.beside(name):
            begun_s = round((begun_ns - stages.begun_ns) * 1e-9, 3)
        found[name] = {"begun_s": begun_s, **told}
    return found


@contextmanager
def _talking(
    prompt: Prompt | None,
    display: Display,
    say: Say,
    leave: Callable[[], None],
    interrupt: Callable[[], None],
) -> Iterator[None]:
    """Let a person talk to the robot while the block runs, if there is one."""
    if prompt is None:
        yield
        return
    display.above(prompt)
    with prompt.listening(say, leave, interrupt):
        yield


def _start(graph: Graph, config: RunConfig, display: Display, interrupted: Interrupts) -> None:
    """Start the processes and wait until all are ready."""
    if graph.has("observer"):
        display.say(
            "from another terminal: openhelix say TEXT, openhelix status --web, openhelix view"
        )
    if config.system2.connect is not None:
        graph.await_system2(display.waiting, display.say, interrupted)
    display.say("starting the processes" + (" as Ray actors" if config.ray else ""))
    with interrupted.patience(interrupted.heard + 1):  # none is left half started
        graph.start()
    graph.wait_ready(READY_TIMEOUT_S, display.states, interrupted)


def _finish(
    graph: Graph, display: Display, interrupted: Interrupts, told: int
) -> dict[str, Any] | None:
    """Let the observer finish its files; None where it is gone, which is no failure of a run.

    Args:
        graph: of the run.
        display: told what went wrong with the files.
        interrupted: once more, and the observer is not waited for.
        told: how many messages it was sent.
    """
    if "observer" in graph.ended() or graph.health("observer", 5.0)["state"] != "ready":
        display.warn("observer: is gone; video and recording are incomplete")
        return None
    try:
        with interrupted.patience(interrupted.heard):
            sinks = graph.ask("observer", "finish", timeout_s=70.0, told=told)
    except (KeyboardInterrupt, RpcError):
        display.warn("observer: was not waited for; video and recording may be incomplete")
        return None
    say_losses(display, sinks)
    return sinks


def say_losses(display: Display, sinks: dict[str, Any]) -> None:
    """Tell which files are incomplete, and why."""
    for name, sink in sinks.items():
        if isinstance(sink, dict) and sink["error"]:
            display.warn(f"{name}: is incomplete ({sink['dropped']} lost): {sink['error']}")


def _watch(
    graph: Graph, config: RunConfig, display: Display, interrupted: Interrupts
) -> tuple[dict[str, Any], str | None]:
    """Follow the control process until it has finished; return its report, and what failed."""
    silent_since_s: float | None = None
    halted, failure = False, None
    while True:
        health = graph.health("control")
        if health["state"] == "unreachable":
            silent_since_s = silent_since_s or time.monotonic()
            if "control" in graph.ended():
                how = graph.ended()["control"]
                raise GraphError(f"control {how}; its log is in logs/")
            if time.monotonic() - silent_since_s > 10.0:
                raise GraphError("control: has not answered for 10 s; its log is in logs/")
        elif health["state"] in ("failed", "refused"):
            raise GraphError(f"control {health['state']}: {health['error']}")
        else:
            silent_since_s = None
            display.progress(health, config.tasks.steps_limit)
            if health["finished"]:
                return graph.ask("control", "report", timeout_s=10.0), failure
        if not halted:
            ray = graph.ended().get(RAY)
            if ray is not None:
                failure = f"Ray {ray}, and the parts that it hosted with it; its log is in logs/"
            # The loop ends its tick, holds, stops the robot and reports what it did.
            if ray is not None or interrupted.is_set() or display.gone:
                graph.ask("control", "halt")
                halted = True
        if halted:
            time.sleep(WATCH_S)
        else:
            interrupted.wait(WATCH_S)
