"""Where latents come from: what is not wanted is counted, and no image is wasted."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openhelix.runtime.control.goals import LockstepGoals, WireGoals, refused
from openhelix.runtime.core.interfaces import (
    SENSES,
    CameraFrame,
    GoalRequest,
    LatentGoal,
    LatentSpec,
    Observation,
)
from openhelix.runtime.robots.fake import PointEngine
from openhelix.runtime.transport.wire import NewestPerTopic, NewestReader, Publisher
from openhelix.system2.publisher import LatentOutlet
from tests.fakes import LATENT, PERIOD_NS
from tests.runtime.wire_ports import until


def observation(tick: int) -> Observation:
    frame = CameraFrame(tick * PERIOD_NS, np.zeros((4, 4, 3), np.uint8), None, np.eye(3), np.eye(4))
    pose = np.array([0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0])
    return Observation(tick * PERIOD_NS, {"static": frame}, pose, 0.08, True, np.zeros(7))


def tick_of(goals: Any, tick: int) -> LatentGoal | None:
    return goals.update(observation(tick), tick * PERIOD_NS)


class Channel:
    """Both halves of a channel, without a socket."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.waiting: deque[LatentGoal] = deque()
        self.gaps = 0
        self.closed = 0

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def poll(self) -> LatentGoal | None:
        return self.waiting.popleft() if self.waiting else None

    def close(self) -> None:
        self.closed += 1


def latent(
    instruction_id: int, seq: int = 0, spec: LatentSpec = LATENT, t_obs_ns: int = 0
) -> LatentGoal:
    z = np.zeros((1, 8), np.float32)
    return LatentGoal(z, seq, instruction_id, t_obs_ns, 0, spec.spec_id, compute_s=0.1)


def wire_goals(channel: Channel, min_interval_ns: int = 1, memory: int = 1) -> WireGoals:
    goals = WireGoals(channel, channel, "arm1", "static", min_interval_ns, memory, max_age_s=1.0)
    goals.expect(LATENT)
    return goals


def test_images_go_out_at_most_as_often_as_wanted_and_at_once_for_a_new_instruction() -> None:
    channel = Channel()
    goals = wire_goals(channel, 10 * PERIOD_NS)
    goals.begin(1, "first")
    for tick in range(25):
        tick_of(goals, tick)
    assert [m.t_obs_ns // PERIOD_NS for m in channel.sent] == [0, 10, 20]
    goals.begin(2, "second")
    tick_of(goals, 25)
    last = channel.sent[-1]
    assert (last.instruction, last.instruction_id, last.robot, last.seq) == ("second", 2, "arm1", 3)


def test_a_refused_latent_leaves_nothing_to_plan_from_until_another_is_understood() -> None:
    channel = Channel()
    goals = wire_goals(channel, memory=2)
    goals.begin(1, "sing")
    assert goals.newest is None and not refused(goals)
    channel.waiting.extend(
        [latent(1), replace(latent(1, seq=1), understood=0.1, refused=True), latent(1, seq=2)]
    )
    tick_of(goals, 0)
    assert [g.seq for g in goals.recent] == [0] and not refused(goals)
    tick_of(goals, 1)
    assert not goals.recent and refused(goals) and goals.newest is not None
    assert (goals.newest.understood, goals.refusals, goals.received) == (0.1, 1, 2)
    tick_of(goals, 2)
    assert [g.seq for g in goals.recent] == [2] and not refused(goals)
    channel.waiting.append(replace(latent(1, seq=3), refused=True))
    tick_of(goals, 3)
    goals.begin(2, "lift it")
    assert not refused(goals)  # that was another instruction


def test_latents_for_another_instruction_are_void() -> None:
    channel = Channel()
    goals = wire_goals(channel, memory=2)
    goals.begin(2, "now")
    channel.waiting.extend([latent(1), latent(2, seq=5), latent(2, seq=6), latent(2, seq=7)])
    arrived = [tick_of(goals, t) for t in range(4)]
    assert [a.seq if a else None for a in arrived] == [None, 5, 6, 7]
    assert [g.seq for g in goals.recent] == [6, 7]  # the newest two, newest last
    assert (goals.received, goals.void) == (3, 1)
    assert list(goals.latencies_s) == [0.1] * 3
    goals.begin(3, "next")
    assert not goals.recent


OTHER = LatentSpec("act_last", n_tokens=1, dim=8, model_id="other weights")


def test_latents_of_another_model_are_counted_and_never_used() -> None:
    channel = Channel()
    goals = wire_goals(channel)
    goals.begin(1, "now")
    channel.waiting.extend([latent(1), latent(1, spec=OTHER), latent(2, spec=OTHER), latent(1, 3)])
    arrived = [tick_of(goals, t) for t in range(4)]
    assert [a.seq if a else None for a in arrived] == [0, None, None, 3]
    assert (goals.received, goals.void, goals.mismatched) == (2, 0, 2)
    assert OTHER.spec_id in goals.mismatch and LATENT.spec_id in goals.mismatch


@pytest.mark.parametrize(
    ("t_obs_s", "refusal"),
    [
        (10.0, ""),
        (9.1, ""),
        (10.2, ""),  # a simulated frame is stamped with the time it is meant for
        (10.3, "future"),
        (3610.0, "future"),
        (9.223372036854775807e9, "future"),
        (8.9, "old"),
        (-3590.0, "old"),
    ],
)
def test_a_latent_of_another_time_is_refused_and_counted(t_obs_s: float, refusal: str) -> None:
    channel = Channel()
    goals = wire_goals(channel)
    goals.begin(1, "now")
    t_obs_ns = min(round(t_obs_s * 1e9), 2**63 - 1)
    channel.waiting.append(latent(1, t_obs_ns=t_obs_ns))
    arrived = goals.update(observation(300), 10 * 10**9)
    assert (arrived is None) == bool(refusal) and len(goals.recent) == (not refusal)
    assert dict(goals.mistimed) == ({refusal: 1} if refusal else {})


def test_after_a_stop_only_what_was_seen_later_is_a_goal() -> None:
    channel = Channel()
    goals = wire_goals(channel, memory=2)
    goals.begin(1, "now")
    channel.waiting.append(latent(1, 0))
    assert tick_of(goals, 0) is not None
    goals.forget(2 * PERIOD_NS)
    assert not goals.recent
    channel.waiting.append(latent(1, 1, t_obs_ns=2 * PERIOD_NS))
    channel.waiting.append(latent(1, 2, t_obs_ns=2 * PERIOD_NS + 1))
    assert tick_of(goals, 3) is None and not goals.recent
    assert tick_of(goals, 4) is not None and [g.seq for g in goals.recent] == [2]
    assert dict(goals.mistimed) == {"before_stop": 1}


def test_nothing_is_accepted_before_a_model_has_been_agreed_on() -> None:
    channel = Channel()
    goals = WireGoals(channel, channel, "arm1", "static", 1, max_age_s=1.0)
    goals.begin(1, "now")
    channel.waiting.append(latent(1))
    assert tick_of(goals, 0) is None and goals.mismatched == 1


def test_lockstep_latents_of_swapped_weights_are_refused_when_they_arrive() -> None:
    engine = PointEngine()
    goals = LockstepGoals(engine, "static", 2, 1)
    goals.begin(1, "reach 0 0 0.5")
    arrived = [tick_of(goals, 0), tick_of(goals, 1)]
    engine.spec = OTHER
    arrived += [tick_of(goals, 2), tick_of(goals, 3)]
    assert [a.seq if a else None for a in arrived] == [None, 0, None, None]
    assert (goals.received, goals.mismatched) == (1, 1)


def test_before_the_first_instruction_an_earlier_runs_latents_are_void() -> None:
    channel = Channel()
    goals = wire_goals(channel, PERIOD_NS)
    channel.waiting.append(latent(1))
    assert tick_of(goals, 0) is None
    assert (goals.received, goals.void, len(channel.sent)) == (0, 1, 1)
    assert channel.sent[0].instruction == ""


def test_one_latent_is_kept_unless_more_are_asked_for() -> None:
    channel = Channel()
    goals = wire_goals(channel)
    scheduled = LockstepGoals(PointEngine(), "static", 1, 0)
    goals.begin(1, "now")
    scheduled.begin(1, "reach 0 0 0.5")
    channel.waiting.extend([latent(1, seq=0), latent(1, seq=1)])
    for tick in range(2):
        tick_of(goals, tick)
        tick_of(scheduled, tick)
    assert [[g.seq for g in kept.recent] for kept in (goals, scheduled)] == [[1], [1]]


def test_what_the_wire_lost_is_told_and_closing_closes_both_halves() -> None:
    sender, reader = Channel(), Channel()
    goals = WireGoals(sender, reader, "arm1", "static", 1, max_age_s=1.0)
    reader.gaps = 4
    assert goals.missed == 4
    goals.close()
    assert (sender.closed, reader.closed) == (1, 1)


@pytest.mark.parametrize(("interval", "latency"), [(1, 0), (3, 0), (4, 2), (2, 5)])
def test_lockstep_arrivals_are_on_schedule(interval: int, latency: int) -> None:
    engine = PointEngine()
    goals = LockstepGoals(engine, "static", interval, latency)
    goals.begin(1, "reach 0 0 0.5")
    ages = []
    for tick in range(12):
        tick_of(goals, tick)
        if goals.recent:
            ages.append(tick - goals.recent[-1].t_obs_ns // PERIOD_NS)
    assert len(ages) == 12 - latency
    assert min(ages) == latency and max(ages) == min(11, latency + interval - 1)
    assert engine.calls == -(-12 // interval)


class ClosedEngine(PointEngine):
    """Counts how often it was closed."""

    closed = 0

    def close(self) -> None:
        self.closed += 1


def test_lockstep_says_what_arrived_and_when_and_numbers_go_on() -> None:
    engine, seconds = ClosedEngine(), iter(range(100))
    goals = LockstepGoals(engine, "static", 3, 1, timer=lambda: float(next(seconds)))
    told = []
    for instruction_id, ticks in ((1, 8), (2, 5)):
        goals.begin(instruction_id, "reach 0 0 0.5")
        for tick in range(ticks):
            arrived = tick_of(goals, tick)
            assert arrived is None or arrived is goals.recent[-1]
            if arrived is not None:
                told.append(
                    (arrived.instruction_id, tick, arrived.seq, arrived.t_obs_ns // PERIOD_NS)
                )
                assert (arrived.source, arrived.compute_s) == ("lockstep", 1.0)
    # The latent of tick 6 would come at 7; that of the next instruction's tick 3 at 4.
    assert told == [(1, 1, 0, 0), (1, 4, 1, 3), (1, 7, 2, 6), (2, 1, 3, 0), (2, 4, 4, 3)]
    assert goals.missed == 0
    goals.close()
    assert engine.closed == 1


def test_lockstep_latents_on_the_way_are_void_for_the_next_instruction() -> None:
    goals = LockstepGoals(PointEngine(), "static", 2, 3)
    goals.begin(1, "reach 0 0 0.5")
    for tick in range(3):
        tick_of(goals, tick)  # two are on the way
    goals.begin(2, "reach 0.1 0 0.5")
    arrived = [tick_of(goals, tick) for tick in range(3, 7)]
    assert [a.instruction_id if a else None for a in arrived] == [None, None, None, 2]
    assert goals.void == 0  # never sent: there is nothing to count


SENSING = LatentSpec("act_last" + SENSES, n_tokens=1, dim=8, model_id="m")
STATE = np.array([0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0, 0.08, 1.0], np.float32)


class Sensing:
    """System 2 that wants the robot's own state."""

    spec = SENSING

    def __init__(self) -> None:
        self.told: list[Any] = []

    def encode(self, images: Any, instructions: Any, proprio: Any) -> Any:
        self.told += proprio
        return np.zeros((len(images), 1, 8), np.float32)

    def close(self) -> None: ...


def test_a_system_2_that_senses_is_told_the_robots_state_and_no_other_is() -> None:
    channel = Channel()
    goals = wire_goals(channel)
    goals.begin(1, "lift it")
    tick_of(goals, 0)
    assert channel.sent[0].proprio is None
    goals.expect(SENSING)
    tick_of(goals, 1)
    assert np.array_equal(channel.sent[1].proprio, STATE)
    engine = Sensing()
    lockstep = LockstepGoals(engine, "static", interval=2, latency=0)
    lockstep.begin(1, "lift it")
    for tick in range(3):
        tick_of(lockstep, tick)
    assert np.array_equal(engine.told, [STATE, STATE])
    plain = LockstepGoals(PointEngine(), "static", interval=1, latency=0)
    plain.begin(1, "reach 0 0 0.5")
    assert tick_of(plain, 0) is not None  # which takes no third argument


@pytest.mark.parametrize("again", range(5))
def test_the_first_image_and_its_latent_arrive_where_system2_was_long_in_coming(
    tmp_path: Path, again: int
) -> None:
    requests, latents = (f"ipc://{tmp_path}/{name}" for name in ("requests", "latents"))
    goals = WireGoals(
        Publisher(requests, "arm1", bind=False, awaited=True),
        NewestReader(latents, "latents/arm1", LatentGoal),
        "arm1",
        "static",
        min_interval_ns=10**12,
        max_age_s=1.0,
    )
    goals.expect(LATENT)
    assert not goals.heard(0.05 + again / 40)
    system2 = NewestPerTopic(requests, GoalRequest, bind=True, max_topics=1, first_stays=True)
    outlet = LatentOutlet(latents)
    goals.reconnect()
    until(lambda: system2.poll() or goals.heard(0.01))  # it answers while it listens
    goals.begin(1, "first")
    assert tick_of(goals, 0) is None
    until(lambda: system2.poll())
    outlet.send("arm1", latent(1))
    until(lambda: tick_of(goals, 1))
    for part in (goals, system2, outlet):
        part.close()
