"""How the loop asks System 1: when a chunk is due, and what a lost or failed answer does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openhelix.runtime.control.planner import LOST_AFTER_NS, PlanReply, RemotePlanner, SyncPlanner
from openhelix.runtime.core.types import LatentGoal, Observation
from openhelix.runtime.launch.system1_process import System1Process
from openhelix.runtime.transport.wire import NewestReader, Publisher
from tests.fakes import PERIOD_NS, ReachPolicy

REPLAN_NS = 4 * PERIOD_NS


def observation(tick: int, instruction_id: int = 1) -> Observation:
    pose = np.array([0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0])
    return Observation(tick * PERIOD_NS, {}, pose, 0.08, True, np.zeros(7), instruction_id)


def latent(instruction_id: int = 1) -> LatentGoal:
    z = np.zeros((1, 8), np.float32)
    z[0, :3] = (0.2, 0.0, 0.5)
    return LatentGoal(z, seq=0, instruction_id=instruction_id, t_obs_ns=0, t_pub_ns=0, spec_id="x")


def test_a_chunk_is_due_every_replan_interval_and_after_a_reset() -> None:
    policy = ReachPolicy()
    planner = SyncPlanner(policy, REPLAN_NS)
    planned = []
    for tick in range(10):
        planner.offer(observation(tick), [latent()])
        if planner.poll() is not None:
            planned.append(tick)
    assert planned == [0, 4, 8]
    planner.reset(3)
    planner.offer(observation(9), [latent()])
    assert planner.poll() is not None and policy.seeds == [3]


@dataclass
class Remote:
    planner: RemotePlanner
    node: System1Process
    stop: threading.Event
    before: set[str]  # the fields of its health before it was set up

    def join(self) -> None:
        """Ask until both channels are connected: what is sent before that is lost."""
        for number in range(30):
            self.planner.reset(11)
            self.planner.offer(observation(-number), [latent()])
            for _ in range(4 + 2 * number):  # more and more patient, on a busy machine
                chunk = self.planner.poll()
                if chunk is not None and chunk.t_obs_ns == observation(-number).t_ns:
                    return
                threading.Event().wait(0.02)
        raise AssertionError("no reply")

    def reply(self, timeout_s: float = 60.0) -> Any:
        """Poll until the reply to the last request is there; None if it has no chunk."""
        for _ in range(int(timeout_s / 0.005)):
            chunk = self.planner.poll()
            if chunk is not None or self.planner.failures:
                return chunk
            threading.Event().wait(0.005)
        raise AssertionError("no reply")


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    plans, chunks = f"ipc://{tmp_path}/plans", f"ipc://{tmp_path}/chunks"
    options = {"horizon": 6}
    node = System1Process({"target": "tests.fakes:ReachPolicy", "options": options}, plans, chunks)
    before = set(node.health())
    node.setup()
    stop = threading.Event()
    thread = threading.Thread(target=node.run, args=(stop,), daemon=True)
    thread.start()
    planner = RemotePlanner(
        Publisher(plans, "plans", bind=False), NewestReader(chunks, "chunks", PlanReply), REPLAN_NS
    )
    yield Remote(planner, node, stop, before)
    stop.set()
    thread.join(timeout=5.0)
    planner.close()
    node.close()


def test_another_process_plans_and_failures_are_counted(remote: Remote) -> None:
    remote.join()
    planner, policy = remote.planner, remote.node._policy
    assert isinstance(policy, ReachPolicy)
    policy.fail_at = policy.calls + 3
    planner.latencies_s.clear()
    begun = remote.node.health()["planned"]
    planner.reset(11)
    planner.offer(observation(1), [latent()])
    chunk = remote.reply()
    assert chunk.poses.shape == (6, 7) and chunk.instruction_id == 1
    assert chunk.t_obs_ns == observation(1).t_ns and len(planner.latencies_s) == 1
    planner.offer(observation(2), [latent()])  # not due yet
    planner.offer(observation(5), [latent()])
    assert remote.reply().t_obs_ns == observation(5).t_ns
    planner.offer(observation(9), [latent()])  # this call of the policy raises
    assert remote.reply() is None and planner.failures == 1
    health = remote.node.health()
    assert health["planned"] == begun + 2 and health["failed"] == 1
    planner.offer(observation(13), [latent()])  # and it is asked again
    planner.failures = 0
    assert remote.reply() is not None


def test_health_has_its_fields_from_the_start(remote: Remote) -> None:
    now = remote.node.health()
    assert now.keys() == remote.before and now["policy_spec"]["horizon"] == 6


def test_a_lost_request_is_given_up_after_a_while(tmp_path: Path) -> None:
    sent: list[Any] = []

    class Sender:
        def send(self, message: Any) -> None:
            sent.append(message)

        def close(self) -> None: ...

    class Silence:
        def poll(self) -> None: ...
        def close(self) -> None: ...

    planner = RemotePlanner(Sender(), Silence(), REPLAN_NS)  # type: ignore[arg-type]
    late = LOST_AFTER_NS // PERIOD_NS + 1
    for tick in (0, 1, 4, 8, late + 1, late + 2):
        planner.offer(observation(tick), [latent()])
        assert planner.poll() is None
    assert [m.observation.t_ns // PERIOD_NS for m in sent] == [0, late + 1]
    planner.reset(1)  # a new instruction waits for no answer of the old one
    planner.offer(observation(late + 3, instruction_id=2), [latent(2)])
    assert len(sent) == 3 and sent[-1].seed == 1
