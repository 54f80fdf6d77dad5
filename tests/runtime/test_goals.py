"""Where latents come from: epochs void the old, losses are counted, images are not wasted."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest

from runtime.goals import LockstepGoals, WireGoals
from runtime.types import CameraFrame, LatentGoal, Observation
from tests.fakes import PERIOD_NS, PointEngine


def observation(tick: int) -> Observation:
    frame = CameraFrame(tick * PERIOD_NS, np.zeros((4, 4, 3), np.uint8), None, np.eye(3), np.eye(4))
    pose = np.array([0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0])
    return Observation(tick * PERIOD_NS, {"static": frame}, pose, 0.08, True, np.zeros(7))


class Channel:
    """Both halves of a channel, without a socket."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.waiting: deque[LatentGoal] = deque()
        self.gaps = 0

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def poll(self) -> LatentGoal | None:
        return self.waiting.popleft() if self.waiting else None

    def close(self) -> None: ...


def latent(epoch: int, seq: int = 0) -> LatentGoal:
    return LatentGoal(np.zeros((1, 8), np.float32), seq, epoch, 0, 0, "x", compute_s=0.1)


def test_images_go_out_at_most_as_often_as_wanted_and_at_once_for_a_new_instruction() -> None:
    channel = Channel()
    goals = WireGoals(channel, channel, "arm1", "static", min_interval_ns=10 * PERIOD_NS)
    goals.begin(1, "first")
    for tick in range(25):
        goals.update(observation(tick))
    assert [m.t_obs_ns // PERIOD_NS for m in channel.sent] == [0, 10, 20]
    goals.begin(2, "second")
    goals.update(observation(25))
    last = channel.sent[-1]
    assert (last.instruction, last.epoch, last.robot, last.seq) == ("second", 2, "arm1", 3)


def test_latents_of_another_epoch_are_void() -> None:
    channel = Channel()
    goals = WireGoals(channel, channel, "arm1", "static", 1, memory=2)
    goals.begin(2, "now")
    channel.waiting.extend([latent(1), latent(2, seq=5), latent(2, seq=6), latent(2, seq=7)])
    arrived = [goals.update(observation(t)) for t in range(4)]
    assert [a.seq if a else None for a in arrived] == [None, 5, 6, 7]
    assert [g.seq for g in goals.recent] == [6, 7]  # the newest two, newest last
    assert (goals.received, goals.void) == (3, 1)
    goals.begin(3, "next")
    assert not goals.recent


@pytest.mark.parametrize(("interval", "latency"), [(1, 0), (3, 0), (4, 2), (2, 5)])
def test_lockstep_arrivals_are_on_schedule(interval: int, latency: int) -> None:
    engine = PointEngine()
    goals = LockstepGoals(engine, "static", interval, latency)
    goals.begin(1, "reach 0 0 0.5")
    ages = []
    for tick in range(12):
        goals.update(observation(tick))
        if goals.recent:
            ages.append(tick - goals.recent[-1].t_obs_ns // PERIOD_NS)
    assert len(ages) == 12 - latency
    assert min(ages) == latency and max(ages) == min(11, latency + interval - 1)
    assert engine.calls == -(-12 // interval)
