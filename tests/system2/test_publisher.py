"""The node over real sockets: robots keep apart, restarts are survived, bad input is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from openhelix.runtime.core.interfaces import GoalRequest, LatentGoal, LatentSpec
from openhelix.runtime.transport.wire import NewestReader, Publisher
from openhelix.system2.prompt import clean_instruction
from openhelix.system2.publisher import LatentOutlet, System2Process


class CountingEngine:
    """A latent that says what it was made from: (red channel mean, words, calls)."""

    spec = LatentSpec("act_last", 1, 3, "counting")
    warmed = 0

    def __init__(self) -> None:
        self.calls = 0
        CountingEngine.warmed = 0

    def warm_up(self) -> None:
        CountingEngine.warmed += 1

    def encode(self, images: Sequence[Any], instructions: Sequence[str]) -> Any:
        texts = [clean_instruction(text) for text in instructions]
        self.calls += 1
        rows = [
            [i[..., 0].mean(), len(t.split()), self.calls]
            for i, t in zip(images, texts, strict=True)
        ]
        return np.array(rows, dtype=np.float32)[:, None]

    def close(self) -> None: ...


PATIENCE_S = 60.0  # how long a test waits for what is sure to happen


class Robot:
    def __init__(self, name: str, requests: str, latents: str) -> None:
        self.name, self.seq = name, 0
        self.out = Publisher(requests, f"requests/{name}", bind=False)
        self.reader = NewestReader(latents, f"latents/{name}", LatentGoal)

    def ask(self, text: str, red: int = 0, instruction_id: int = 0) -> None:
        rgb = np.full((8, 8, 3), red, dtype=np.uint8)
        self.out.send(
            GoalRequest(rgb, text, self.name, self.seq, instruction_id, time.monotonic_ns())
        )
        self.seq += 1

    def hear(
        self, text: str, red: int = 0, instruction_id: int = 0, timeout_s: float = PATIENCE_S
    ) -> LatentGoal:
        """Ask until a latent for that instruction comes."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            self.ask(text, red, instruction_id)
            self.reader.wait(0.05)
            goal = self.reader.poll()
            if goal is not None and goal.instruction_id == instruction_id:
                return goal
        raise AssertionError(f"{self.name}: no latent for instruction {instruction_id}")

    def close(self) -> None:
        self.out.close()
        self.reader.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[System2Process, str, str]]:
    requests, latents = f"ipc://{tmp_path}/requests", f"ipc://{tmp_path}/latents"
    part = {"target": "tests.system2.test_publisher:CountingEngine", "options": {}}
    node = System2Process(part, hz=50.0, requests=requests, latents=latents)
    node.setup()
    stop = threading.Event()
    thread = threading.Thread(target=node.run, args=(stop,))
    thread.start()
    yield node, requests, latents
    stop.set()
    thread.join(5.0)
    assert not thread.is_alive()
    node.close()
    node.close()


def test_robots_get_their_own_latents(served) -> None:
    _, requests, latents = served
    robots = [Robot(name, requests, latents) for name in ("arm1", "arm10")]
    try:
        first, second = robots[0].hear("push", red=10), robots[1].hear("push it now", red=200)
        assert first.z[0, :2].tolist() == [10.0, 1.0]
        assert second.z[0, :2].tolist() == [200.0, 3.0]
        later = robots[0].hear("open the drawer", red=30, instruction_id=7)
        assert later.z[0, :2].tolist() == [30.0, 3.0]
        assert later.source == first.source
        assert later.seq > first.seq
        assert later.spec_id == CountingEngine.spec.spec_id
    finally:
        for robot in robots:
            robot.close()
    assert CountingEngine.warmed == 1


def test_a_refused_request_is_told_in_health_and_the_next_is_served(served) -> None:
    node, requests, latents = served
    robot = Robot("arm", requests, latents)
    try:
        robot.hear("push")
        end = time.monotonic() + PATIENCE_S
        while not node.health()["refused"] and time.monotonic() < end:
            robot.ask("say <ACT> twice", instruction_id=1)
            time.sleep(0.02)
        health = node.health()
        assert "control token" in health["robots"]["arm"]["error"]
        robot.hear("push", instruction_id=2)
    finally:
        robot.close()
    end = time.monotonic() + PATIENCE_S
    while node.health()["published"] < 2 and time.monotonic() < end:
        time.sleep(0.01)  # a latent is counted once it is out
    health = node.health()
    assert health["published"] >= 2
    assert health["latent_spec"]["model_id"] == "counting"


def test_health_has_its_fields_before_the_engine_is_there(served, tmp_path: Path) -> None:
    node, _, _ = served
    part = {"target": "tests.system2.test_publisher:CountingEngine"}
    ends = {name: f"ipc://{tmp_path}/{name}-2" for name in ("requests", "latents")}
    fresh = System2Process(part, 1.0, **ends).health()
    assert fresh.keys() == node.health().keys()
    assert fresh["latent_spec"] is None and fresh["published"] == 0 and fresh["hz"] == 1.0


def test_a_latent_that_breaks_its_schema_uses_up_no_number(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/latents"
    outlet = LatentOutlet(endpoint)
    reader = NewestReader(endpoint, "latents/arm", LatentGoal)
    try:
        good = LatentGoal(np.ones((1, 3), np.float32), 0, 0, 1, 2, "id")
        while not reader.wait(0.05):
            outlet.send("arm", good)
        bad = LatentGoal(np.full((1, 3), np.nan, np.float32), 0, 0, 1, 2, "id")
        with pytest.raises(ValueError, match="nonfinite"):
            outlet.send("arm", bad)
        outlet.send("arm", good)
        while (goal := reader.poll()) is None or reader.wait(0.1):
            reader.wait(0.1)
        assert goal.z.tolist() == [[1.0, 1.0, 1.0]]
        assert reader.gaps == 0
    finally:
        reader.close()
        outlet.close()


def test_a_second_robot_of_the_same_name_is_refused_and_the_first_does_not_notice(served) -> None:
    node, requests, latents = served
    first, second = Robot("arm", requests, latents), Robot("arm", requests, latents)
    elsewhere = Robot("elsewhere", requests, latents)  # another topic, the same name inside
    elsewhere.name = "arm"
    try:
        first.hear("push it", red=10)
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            second.ask("open", red=200, instruction_id=0)
            elsewhere.ask("open", red=100, instruction_id=0)
            goal = first.hear("push it", red=10)
            assert goal.z[0, :2].tolist() == [10.0, 2.0]
            health = node.health()
            if (
                health["taken"].get("requests/arm", 0) > 3
                and health["shed"].get("name_taken", 0) > 3
            ):
                break
        assert health["dropped"]["taken"] == health["taken"]["requests/arm"]
        refused = node.handlers()["claim"]({"robot": "arm", "run": "another"})["refused"]
        assert "'arm' is in use" in refused
        assert node.handlers()["claim"]({"robot": "arm2", "run": "another"}) == {"refused": ""}
    finally:
        for robot in (first, second, elsewhere):
            robot.close()


@pytest.mark.parametrize("name", ["x" * 2000, "a\0b", "\u2603" * 60])
def test_no_name_can_end_the_process(served, name: str) -> None:
    node, requests, latents = served
    robot, hostile = Robot("arm", requests, latents), Robot("hostile", requests, latents)
    hostile.name = name
    try:
        end = time.monotonic() + PATIENCE_S
        while not node.health()["shed"].get("bad_name") and time.monotonic() < end:
            hostile.ask("open")
            time.sleep(0.02)
        assert node.health()["shed"]["bad_name"] >= 1
        robot.hear("push")
    finally:
        robot.close()
        hostile.close()


def test_numbers_go_on_for_a_name_that_was_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openhelix.system2.publisher.MAX_NAMES", 2)
    outlet = LatentOutlet(f"ipc://{tmp_path}/l")
    reader = NewestReader(outlet.bound, "latents/a", LatentGoal)
    goal = LatentGoal(np.zeros((1, 3), np.float32), 0, 0, 0, 0, "spec")

    def heard() -> bool:
        outlet.send("a", goal)
        return reader.wait(0.02) and reader.poll() is not None

    while not heard():
        pass
    for name in ("b", "c", "d"):
        outlet.send(name, goal)
    outlet.send("a", goal)
    assert reader.wait(5.0) and reader.poll() is not None
    assert not reader.stats.dropped
    reader.close()
    outlet.close()


def test_a_reader_that_is_stuck_holds_up_nobody(tmp_path: Path) -> None:
    outlet = LatentOutlet(f"ipc://{tmp_path}/l")
    stuck: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
    stuck.linger, stuck.rcvhwm = 0, 1
    stuck.setsockopt(zmq.SUBSCRIBE, b"")
    stuck.connect(outlet.bound)
    reader = NewestReader(outlet.bound, "latents/a", LatentGoal)
    large = LatentGoal(np.ones((16, 1024), np.float32), 0, 0, 0, 0, "spec")  # 65 kB
    heard = False
    while not (heard and stuck.poll(0)):  # both have joined
        outlet.send("a", large)
        heard = heard or (reader.wait(0.02) and reader.poll() is not None)
    sent = 1500  # more than the queue of one that does not read
    for number in range(1, sent + 1):
        outlet.send("a", replace(large, seq=number))
        while (goal := reader.poll()) is None or goal.seq != number:
            assert reader.wait(60.0)
    assert reader.stats.gaps == 0
    queued = 0
    while True:  # what the stuck one finds when it wakes: its queue was full, the rest is lost
        if not stuck.poll(20):
            outlet.send("end", large)
        elif stuck.recv_multipart()[0].startswith(b"latents/end\0"):
            break
        else:
            queued += 1
    assert queued < sent
    reader.close()
    stuck.close(linger=0)
    outlet.close()


def test_a_shared_system2_lets_no_client_change_it(tmp_path: Path) -> None:
    part = {"target": "tests.system2.test_publisher:CountingEngine"}
    ends = {"requests": f"ipc://{tmp_path}/r", "latents": f"ipc://{tmp_path}/l"}
    assert "swap" not in System2Process(part, 1.0, **ends, shared=True).handlers()
    assert "swap" in System2Process(part, 1.0, **ends).handlers()


def test_swap_is_refused_by_an_engine_without_weights(served) -> None:
    node, _, _ = served
    with pytest.raises(ValueError, match="swap"):
        node.handlers()["swap"]({"path": "x"})


def test_bad_options_refuse_to_start(tmp_path: Path) -> None:
    part = {"target": "tests.system2.test_publisher:CountingEngine"}
    ends = {"requests": f"ipc://{tmp_path}/r", "latents": f"ipc://{tmp_path}/l"}
    with pytest.raises(ValueError, match="max_batch"):
        System2Process(part, 1.0, **ends, limits={"max_batch": 0})
    node = System2Process(part, -1.0, **ends)
    with pytest.raises(ValueError, match="hz"):
        node.setup()
    node.close()
