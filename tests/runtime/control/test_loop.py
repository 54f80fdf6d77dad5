"""The control loop in lockstep on a fake arm: it gets there, it waits, it holds, it stops."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from openhelix.runtime.control import episodes
from openhelix.runtime.control.assembly import (
    ControlStack,
    build_stack,
    lockstep_goals,
    sync_planner,
)
from openhelix.runtime.control.episodes import Assignment
from openhelix.runtime.control.goals import WireGoals
from openhelix.runtime.control.plans import SyncPlanner
from openhelix.runtime.core.clock import FakeClock
from openhelix.runtime.core.config import ConfigError, RunConfig, load
from openhelix.runtime.core.interfaces import (
    CameraSpec,
    LatentGoal,
    LatentSpec,
    Observation,
    PartFailed,
    PolicyFault,
    SpecMismatch,
)
from openhelix.runtime.robots.fake import FakeRobot, PointEngine
from tests.fakes import LATENT, DoubtingEngine, ReachPolicy
from tests.runtime.ticks import ticks

GOAL = {"near": (0.15, -0.1, 0.6), "far": (0.1, 0.2, 0.8)}
TASKS = [Assignment(name, f"reach {x} {y} {z}") for name, (x, y, z) in GOAL.items()]


def make(
    *overrides: str,
    policy: ReachPolicy | None = None,
    engine: PointEngine | None = None,
    planner: SyncPlanner | None = None,
    **robot: Any,
) -> ControlStack:
    config: RunConfig = load(None, ["control.clock=lockstep", "tasks.steps_limit=80", *overrides])
    clock = FakeClock()
    policy = policy or ReachPolicy(cameras=[CameraSpec("static", 200, 200)])
    arm = FakeRobot(clock=clock, goals=GOAL, lag_s=0.02, **robot)
    arm.connect()
    goals = lockstep_goals(config, engine or PointEngine(), LATENT)
    planner = planner or sync_planner(config, policy)
    stack = build_stack(config, arm, policy.spec, planner, goals, clock)
    stack.loop.arm()
    return stack


def run(stack: ControlStack, stop: threading.Event | None = None) -> list[Any]:
    return stack.episode_runner.run(TASKS, (stop or threading.Event()).is_set)


def test_a_chain_of_instructions_is_carried_out() -> None:
    stack = make()
    results = run(stack)
    assert [r.success for r in results] == [True, True]
    assert [r.reason for r in results] == ["success", "success"]
    # 19 cm less 3 at 1 cm a step, then 36 less 3: the arm can be no quicker than the plan.
    assert 15 <= results[0].env_steps <= 25
    assert 30 <= results[1].env_steps <= 45
    assert all(r.hold_steps == 0 for r in results)


def test_two_runs_are_identical() -> None:
    first, second = make(), make()
    assert run(first) != []
    run(second)

    def sent(stack: ControlStack) -> np.ndarray:
        return np.array([a.pose for a in stack.loop.robot.sent])  # type: ignore[attr-defined]

    np.testing.assert_array_equal(sent(first), sent(second))
    strip = [{**vars_of(r), "duration_s": 0} for r in first.episode_runner.results]
    assert strip == [{**vars_of(r), "duration_s": 0} for r in second.episode_runner.results]


def vars_of(result: Any) -> dict[str, Any]:
    return {name: getattr(result, name) for name in result.__dataclass_fields__}


@pytest.mark.parametrize(("interval", "latency"), [(1, 0), (5, 0), (30, 0), (10, 7)])
def test_refresh_interval_and_latency_count_environment_steps(interval: int, latency: int) -> None:
    stack = make(f"lockstep.interval_steps={interval}", f"lockstep.latency_steps={latency}")
    ages: list[float] = []
    stack.loop.subscribers.append(lambda t: ages.append(t.latent_age_s) if t.latent_age_s else None)
    results = run(stack)
    assert all(r.success for r in results)
    # Until the first latent of an instruction has come the robot holds, for `latency` steps.
    assert [r.hold_steps for r in results] == [latency, latency]
    oldest = (interval + latency - 1) / 30 if interval > 1 or latency else 0.0
    assert max(ages, default=0.0) == pytest.approx(oldest, abs=1e-6)


@pytest.mark.parametrize(("counts", "steps"), [("true", 3), ("false", 10)])
def test_steps_held_still_count_to_the_limit_where_that_is_asked_for(
    counts: str, steps: int
) -> None:
    limits = ("tasks.steps_limit=10", f"tasks.count_holds={counts}")
    for result in run(make(*limits, "lockstep.latency_steps=7")):
        assert (result.env_steps, result.hold_steps, result.reason) == (steps, 7, "step limit")


def test_step_limit_ends_an_attempt() -> None:
    stack = make("tasks.steps_limit=5")
    results = run(stack)
    assert [(r.success, r.env_steps, r.reason) for r in results] == [(False, 5, "step limit")] * 2


def test_stop_at_failure_is_calvins_protocol() -> None:
    stack = make("tasks.steps_limit=5", "tasks.stop_at_failure=true")
    assert len(run(stack)) == 1


def test_a_camera_that_freezes_stops_the_robot_for_good() -> None:
    stack = make()
    arm = stack.loop.robot
    assert isinstance(arm, FakeRobot)

    def freeze(tick: Any) -> None:
        if tick.index == 5:
            arm.freeze_camera("static")

    stack.loop.subscribers.append(freeze)
    results = stack.episode_runner.run([Assignment("", "reach 0.5 0.3 0.9")], lambda: False)
    assert "camera" in results[0].reason and "static" in results[0].reason
    assert stack.loop.stopped
    assert any("camera" in reason for reason in arm.stops)


@pytest.mark.parametrize("option", [{"fail_observe_at": 6}, {"fail_send_at": 6}])
def test_a_robot_that_does_not_answer_is_stopped(option: dict[str, int]) -> None:
    stack = make(**option)
    results = run(stack)
    assert len(results) == 1 and results[0].reason.startswith("safe stop: robot error")
    assert stack.loop.stopped and stack.loop.robot.stops  # type: ignore[attr-defined]


def test_a_robot_whose_pose_is_not_a_number_is_stopped_at_once(monkeypatch: Any) -> None:
    stack = make()
    arm, seen = stack.loop.robot, stack.loop.robot.get_observation

    def lost() -> Any:
        pose = np.full(7, np.nan) if stack.loop.ticks >= 5 else seen().tcp_pose
        return replace(seen(), tcp_pose=pose)

    monkeypatch.setattr(arm, "get_observation", lost)
    results = run(stack)
    assert len(results) == 1 and "not finite" in results[0].reason
    assert stack.loop.ticks == 5 and len(arm.sent) == 5  # type: ignore[attr-defined]


class Faulty(ReachPolicy):
    """Gives nothing finite in the calls of `bad`."""

    def __init__(self, bad: range, error: type[Exception] = PolicyFault) -> None:
        super().__init__(horizon=6, cameras=[CameraSpec("static", 200, 200)])
        self.bad, self.error = bad, error

    def act(self, observation: Any, latents: Any) -> Any:
        chunk = super().act(observation, latents)
        if self.calls in self.bad:
            raise self.error("the policy's output is not finite")
        return chunk


def test_outputs_that_are_not_finite_make_the_arm_hold_until_one_is() -> None:
    stack = make(policy=Faulty(range(3, 7)))
    held: list[str] = []
    stack.loop.subscribers.append(lambda t: held.append(t.reason) if t.state == "hold" else None)
    results = run(stack)
    assert all(r.success for r in results)
    assert stack.loop.planner.failures == 4
    assert held and set(held) == {"chunk ran out"}
    assert all(np.isfinite(a.pose).all() for a in stack.loop.robot.sent)  # type: ignore[attr-defined]


def test_a_policy_that_is_never_finite_moves_nothing_and_ends_at_the_limit() -> None:
    stack = make("tasks.steps_limit=20", policy=Faulty(range(1000)))
    start = stack.loop.robot.get_observation().tcp_pose.copy()
    results = run(stack)
    assert [r.success for r in results] == [False, False]
    assert stack.loop.planner.failures == stack.loop.planner._policy.calls > 1  # type: ignore[attr-defined]
    assert not stack.loop.planner.latencies_s
    np.testing.assert_allclose(stack.loop.robot.get_observation().tcp_pose, start, atol=1e-9)


def test_a_defect_of_the_policy_ends_a_study_instead_of_lowering_its_score() -> None:
    with pytest.raises(PartFailed, match="system1: ZeroDivisionError"):
        run(make(policy=Faulty(range(3, 4), ZeroDivisionError)))


def test_an_operators_stop_ends_the_run_and_says_who() -> None:
    stack = make()
    stack.loop.subscribers.append(
        lambda tick: stack.loop.watchdog.order_stop("me") if tick.index == 7 else None
    )
    results = run(stack)
    assert [r.reason for r in results] == ["safe stop: operator (me)"]
    assert stack.loop.stopped and stack.loop.ticks == 8
    assert stack.episode_runner.succeeded == 0


def test_latents_of_swapped_weights_stop_the_arm_and_end_the_run() -> None:
    stack = make("lockstep.interval_steps=5", "lockstep.latency_steps=2")
    other = LatentSpec("act_last", 1, 8, model_id="other weights")
    engine = stack.loop.goals._engine  # type: ignore[union-attr]

    def swap(tick: Any) -> None:
        engine.spec = other if tick.index >= 4 else engine.spec

    stack.loop.subscribers.append(swap)
    results = run(stack)
    (reason,) = [r.reason for r in results]
    assert reason.startswith("safe stop: latent mismatch") and other.spec_id in reason
    assert stack.loop.stopped and stack.loop.ticks == 8  # asked for at the sixth, 2 ticks away
    assert stack.loop.safety.stops == {"latent_mismatch": 1}
    assert stack.loop.goals is not None and stack.loop.goals.mismatched == 1


class Mailbox:
    """Both ends of System 2's channels, filled by the test."""

    def __init__(self) -> None:
        self.latents: list[LatentGoal] = []
        self.gaps = self.sent = self.dropped = 0
        self.stats = None

    def send(self, request: Any) -> None:
        self.sent += 1

    def poll(self) -> LatentGoal | None:
        return self.latents.pop(0) if self.latents else None

    def close(self) -> None: ...


def test_after_a_stop_the_old_goal_is_dead() -> None:
    limits = ("safety.latent_max_age_s=2.5", "safety.latent_grace_s=0.5", "control.hz=30")
    config = load(None, ["control.clock=lockstep", "tasks.steps_limit=10000", *limits])
    clock, mail = FakeClock(), Mailbox()
    arm = FakeRobot(clock=clock, lag_s=0.02)
    arm.connect()
    policy = ReachPolicy(cameras=[CameraSpec("static", 200, 200)], speed_m=0.001)
    goals = WireGoals(mail, mail, "r", "static", 1, max_age_s=2.5)
    goals.expect(LATENT)
    stack = build_stack(config, arm, policy.spec, SyncPlanner(policy, 1), goals, clock)
    left, right = (-0.3, -0.2, 0.6), (0.3, -0.2, 0.6)
    said: list[tuple[str, float]] = []  # of every tick: the state, and the way the target goes

    def latent(place: tuple[float, float, float], age_s: float) -> LatentGoal:
        z = np.zeros((1, 8), np.float32)
        z[0, :3] = place
        return LatentGoal(z, 0, 1, clock.now_ns() - round(age_s * 1e9), 0, LATENT.spec_id)

    def look(tick: Any) -> None:
        said.append((tick.state, float(tick.sent.pose[0])))
        states = [state for state, _ in said]
        if tick.index < 30:
            mail.latents.append(latent(left, 0.1))
        elif states[-1] == "stop" and states.count("stop") == 5:
            mail.latents.append(latent(left, 1.0))  # System 2 hung with an image of before
        elif states[-1] == "stop" and states.count("stop") == 10:
            mail.latents.append(latent(right, 0.0))

    stack.loop.subscribers.append(look)
    stack.loop.arm()
    stop_at = 30 * 6
    stack.episode_runner.run([Assignment("", "reach 0 0 0.5")], lambda: stack.loop.ticks > stop_at)
    states = [state for state, _ in said]
    first, last = states.index("stop"), len(states) - 1 - states[::-1].index("stop")
    assert last - first == 9 and states[first : last + 1] == ["stop"] * 10
    assert dict(goals.mistimed) == {"before_stop": 1}
    assert states[last + 1 :] and set(states[last + 1 :]) <= {"wait", "run"}
    before, after = (np.array([x for _, x in rows]) for rows in (said[:first], said[last + 1 :]))
    assert (np.diff(before[2:]) <= 0).all() and before[-1] < before[0] - 0.02
    assert (np.diff(after) >= 0).all() and after[-1] > after[0] + 0.02


def ahead(seen: Observation, what: str) -> Observation:
    """Return what a driver shows whose state or frame is, this once, not to be believed."""
    hour_ns, frame = 3600 * 10**9, seen.frames["static"]
    if what == "state":
        return replace(seen, t_ns=seen.t_ns + hour_ns)
    wrong = replace(frame, t_ns=frame.t_ns + hour_ns)
    if what == "size":
        wrong = replace(frame, rgb=np.zeros((2, 2, 3), np.uint8))
    return replace(seen, frames={**seen.frames, "static": wrong})


@pytest.mark.parametrize("what", ["state", "frame", "size"])
def test_one_reading_that_is_not_believed_silences_neither_system(
    what: str, monkeypatch: Any
) -> None:
    config = load(None, ["control.clock=lockstep", "tasks.steps_limit=10000"])
    clock, mail = FakeClock(), Mailbox()
    arm = FakeRobot(clock=clock, lag_s=0.02)
    arm.connect()
    policy = ReachPolicy(cameras=[CameraSpec("static", 200, 200)], speed_m=0.001)
    goals = WireGoals(mail, mail, "r", "static", 1, max_age_s=2.5)
    goals.expect(LATENT)
    planner = SyncPlanner(policy, 1)
    stack = build_stack(config, arm, policy.spec, planner, goals, clock)
    see, shown = arm.get_observation, []
    monkeypatch.setattr(
        arm, "get_observation", lambda: ahead(see(), what) if stack.loop.ticks == 20 else see()
    )

    def look(tick: Any) -> None:
        shown.append((tick.state, mail.sent, len(planner.latencies_s)))
        now_ns, z = clock.now_ns(), np.full((1, 8), 0.5, np.float32)
        mail.latents.append(LatentGoal(z, 0, 1, now_ns, 0, LATENT.spec_id))

    stack.loop.subscribers.append(look)
    stack.loop.arm()
    stack.episode_runner.run([Assignment("", "reach 0 0 0.5")], lambda: stack.loop.ticks > 180)
    (_, images, plans), (_, one_image, one_plan) = shown[19], shown[20]
    assert (one_image, one_plan) == (images, plans)  # that one is shown to neither
    assert {state for state, *_ in shown[20:]} == {"run"}
    assert shown[-1][1] - images > 30 and shown[-1][2] - plans > 150


def test_system2s_camera_is_watched_though_the_policy_looks_through_another() -> None:
    policy = ReachPolicy(cameras=[CameraSpec("gripper", 84, 84)])
    stack = make(policy=policy)
    assert stack.loop.watchdog.cameras == ("gripper", "static")
    arm = stack.loop.robot
    assert isinstance(arm, FakeRobot)
    arm.freeze_camera("static", "pixels")
    results = stack.episode_runner.run([Assignment("", "reach 0.5 0.3 0.9")], lambda: False)
    assert results[0].reason == "safe stop: camera frozen (static)"


def test_an_instruction_that_is_not_understood_moves_nothing_and_the_next_one_does() -> None:
    stack = make("control.hold_limit_s=1", engine=DoubtingEngine(ceiling_m=0.7))
    arm, states = stack.loop.robot, []
    stack.loop.subscribers.append(lambda tick: states.append((tick.state, tick.reason)))
    far, near = stack.episode_runner.run([TASKS[1], TASKS[0]], lambda: False)
    assert (far.success, far.env_steps, far.hold_steps) == (False, 0, 30)
    assert far.reason == "held still too long: not understood"
    assert (far.refused, far.understood) == (True, 0.02)
    assert set(states[:30]) == {("hold", "not understood")}
    held = np.array([action.pose for action in arm.sent[:30]])  # type: ignore[attr-defined]
    np.testing.assert_allclose(held, np.tile(held[0], (30, 1)), atol=1e-9)
    assert (near.success, near.refused, near.understood) == (True, False, 0.97)
    assert stack.loop.safety.holds["not_understood"] == 1
    goals = stack.loop.goals
    assert goals is not None and goals.refusals == 1


def test_what_nobody_judges_is_not_called_understood() -> None:
    stack = make("tasks.steps_limit=20")
    ticks: list[Any] = []
    stack.loop.subscribers.append(ticks.append)
    (result,) = stack.episode_runner.run([Assignment("", "reach 0.5 0.3 0.9")], lambda: False)
    assert result.env_steps == 20 and result.understood is None
    assert {tick.understood for tick in ticks} == {None}


def test_what_was_planned_before_a_refusal_is_void() -> None:
    engine = DoubtingEngine(ceiling_m=0.9)
    stack = make("lockstep.interval_steps=5", engine=engine)
    loop, at = stack.loop, {"refused": 8, "again": 20}
    moved: list[tuple[str, float]] = []

    def change(tick: Any) -> None:
        before = moved[-1][1] if moved else float(tick.sent.pose[1])
        moved.append((tick.state, float(tick.sent.pose[1])))
        if tick.index in at.values():  # other weights: the same instruction, judged anew
            engine.ceiling_m = 0.7 if tick.index == at["refused"] else 0.9
        if tick.state == "hold":
            assert float(tick.sent.pose[1]) == pytest.approx(before, abs=1e-6)

    loop.subscribers.append(change)
    result = stack.episode_runner.run([TASKS[1]], lambda: False)[0]
    states = [state for state, _ in moved]
    # Latents come every 5 ticks: the one of tick 11 is refused, the one of tick 21 no more.
    assert states[:10] == ["run"] * 10 and states[10:20] == ["hold"] * 10
    assert set(states[20:]) == {"run"} and result.success
    assert loop.chunks.counters.rows_voided > 0


def slow(horizon: int) -> ReachPolicy:
    """A policy at 0.2 m/s."""
    return ReachPolicy(horizon, 0.2 / 30, [CameraSpec("static", 200, 200)])


@pytest.mark.parametrize("horizon", [20, 40])
@pytest.mark.parametrize("delay", [0, 1, 4, 9, 15, 18])
@pytest.mark.parametrize("replan", [4, 10])
def test_however_late_plans_are_the_arm_never_goes_back(
    horizon: int, delay: int, replan: int
) -> None:
    late, again = f"lockstep.plan_delay_steps={delay}", f"system1.replan_steps={replan}"
    stack = make("tasks.steps_limit=400", late, again, policy=slow(horizon))
    place, away = np.array(GOAL["far"]), []

    def look(tick: Any) -> None:
        sent, arm = tick.sent.pose[:3], tick.observation.tcp_pose[:3]
        away.append([np.linalg.norm(place - arm), np.linalg.norm(place - sent)])

    stack.loop.subscribers.append(look)
    (result,) = stack.episode_runner.run([TASKS[1]], lambda: False)
    assert result.success
    assert np.diff(np.array(away), axis=0).max() < 1e-4  # of m: the arm's own springiness
    steps = np.abs(np.diff([a.pose[:3] for a in stack.loop.robot.sent], axis=0))  # type: ignore[attr-defined]
    assert steps.max() < 2 * 0.2 / 30  # never a leap
    assert stack.loop.chunks.counters.chunks_late == 0
    assert result.hold_steps >= delay  # it stands until the first plan has come


def test_plans_that_come_after_their_end_are_told_with_what_to_do() -> None:
    policy = slow(20)
    planner = SyncPlanner(policy, 4 * 33_333_333, delay_ns=24 * 33_333_333)
    stack = make("control.hold_limit_s=3", policy=policy, planner=planner)
    said: list[str] = []  # what whoever looks on is told, as `openhelix status` shows it
    stack.loop.subscribers.append(lambda tick: said.append(tick.reason))
    (result,) = stack.episode_runner.run([TASKS[1]], lambda: False)
    assert result.env_steps == 0
    assert said[0] == "first plan due"
    assert said[-1] == (
        "plan too late: the newest plan came 0.13 s after its own end; the policy needs a longer "
        "horizon, or less time for a plan"
    )
    assert result.reason == f"held still too long: {said[-1]}"
    assert stack.loop.chunks.counters.chunks_late > 0


def test_a_delay_that_no_chunk_outlasts_is_refused() -> None:
    said = r"lockstep\.plan_delay_steps: 20, must be 0 to 19; a plan of this policy lasts 20 steps"
    with pytest.raises(ConfigError, match=said):
        make("lockstep.plan_delay_steps=20", policy=slow(20))


def test_a_stop_event_ends_the_run_between_ticks() -> None:
    stack, stop = make(), threading.Event()
    stack.loop.subscribers.append(lambda t: stop.set() if t.index == 3 else None)
    results = run(stack, stop)
    assert [r.reason for r in results] == ["interrupted"] and stack.loop.ticks == 3


def test_every_instruction_has_a_seed_of_its_own() -> None:
    policy = ReachPolicy()
    stack = make("seed=7", policy=policy)
    run(stack)
    assert policy.seeds == [8, 9]


def test_parts_that_do_not_fit_refuse_to_start() -> None:
    with pytest.raises(SpecMismatch, match="wrist"):
        make(policy=ReachPolicy(cameras=[CameraSpec("wrist", 84, 84)]))
    with pytest.raises(SpecMismatch, match=r"system2\.camera: 'wrist', the robot has "):
        make("system2.camera=wrist")
    config = load(None, ["control.clock=lockstep"])
    with pytest.raises(SpecMismatch, match=r"latent\.dim"):
        lockstep_goals(config, PointEngine(LatentSpec("act_last", 1, 9)), LATENT)


def test_figures_are_of_the_last_ticks_in_memory_allocated_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass
    class Counters:
        joined: int = 0

    monkeypatch.setattr(episodes, "KEPT", 8)
    loop: Any = SimpleNamespace(
        prefetch_s=0.0,
        chunks=SimpleNamespace(counters=Counters()),
        planner=SimpleNamespace(failures=0),
        safety=SimpleNamespace(holds={}),
    )
    statistics = episodes.LoopStatistics(loop)
    assert statistics.report()["tick_duration_s"]["p50"] is None
    rings = (statistics._durations_s, statistics._ages_s, statistics._prefetches_s)
    sizes = [sys.getsizeof(ring._ring) for ring in rings]
    (seen,) = ticks(1)
    for i in range(20):
        loop.prefetch_s = float(i)
        statistics(replace(seen, t_ns=i, duration_s=float(i), state="run", latent_age_s=float(i)))
    report = statistics.report()
    assert report["ticks"] == 20
    for name in ("tick_duration_s", "prefetch_duration_s", "latent_age_s"):
        assert report[name]["p50"] == 16.0 and report[name]["max"] == 19.0
    assert [sys.getsizeof(ring._ring) for ring in rings] == sizes
