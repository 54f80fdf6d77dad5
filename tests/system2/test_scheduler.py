"""Who is served when, with an engine that takes time on a clock that only it moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openhelix.runtime.core.clock import FakeClock
from openhelix.runtime.core.interfaces import (
    SENSES,
    GoalRequest,
    Judgement,
    LatentGoal,
    LatentSpec,
)
from openhelix.runtime.transport.codec import WireError
from openhelix.system2.prompt import BadInstruction
from openhelix.system2.scheduler import EngineBroken, GoalScheduler, Limits

S = 1_000_000_000
RGB = np.zeros((4, 4, 3), dtype=np.uint8)


class FakeEngine:
    """Takes `cost_s` a call plus `each_s` a request; refuses "bad", breaks on "broken"."""

    spec = LatentSpec("act_last", 1, 4, "fake")
    value = 1.0

    def __init__(self, clock: FakeClock, cost_s: float = 0.1, each_s: float = 0.0) -> None:
        self.clock, self.cost_s, self.each_s = clock, cost_s, each_s
        self.batches: list[list[str]] = []
        self.running = self.lost = False

    def warm_up(self) -> None:
        if self.lost:
            raise RuntimeError("device lost")

    def close(self) -> None: ...

    def encode(self, images: Sequence[Any], instructions: Sequence[str]) -> Any:
        assert not self.running, "two requests at once"
        self.running = True
        try:
            if "bad" in instructions:
                raise BadInstruction("instruction: bad")
            if "broken" in instructions:
                raise RuntimeError("device lost")
            self.batches.append(list(instructions))
            self.clock.advance(round((self.cost_s + self.each_s * len(instructions)) * S))
            return np.full((len(images), 1, 4), self.value, dtype=np.float32)
        finally:
            self.running = False


class Out:
    def __init__(self) -> None:
        self.sent: list[tuple[str, LatentGoal]] = []
        self.refuses = False

    def send(self, robot: str, goal: LatentGoal) -> None:
        if self.refuses:
            raise WireError("nonfinite", "LatentGoal.z")
        self.sent.append((robot, goal))


class ControlStack:
    def __init__(
        self, hz: float = 1.0, cost_s: float = 0.1, each_s: float = 0.0, **limits: Any
    ) -> None:
        self.clock = FakeClock(0)
        self.engine = FakeEngine(self.clock, cost_s, each_s)
        self.out = Out()
        self.scheduler = GoalScheduler(
            self.engine, self.out, self.clock, hz, Limits(**limits), source="me"
        )
        self.seq: Counter[str] = Counter()

    def offer(self, robot: str = "a", instruction_id: int = 0, text: str = "move") -> bool:
        request = GoalRequest(
            RGB, text, robot, self.seq[robot], instruction_id, self.clock.now_ns(), "r"
        )
        self.seq[robot] += 1
        return self.scheduler.offer(request)

    def run(self, seconds: float, robots: Sequence[str] = ("a",), every_s: float = 0.1) -> None:
        """Let robots send every `every_s` and serve whenever somebody is due."""
        end, step = self.clock.now_ns() + round(seconds * S), round(every_s * S)
        while self.clock.now_ns() < end:
            for robot in robots:
                self.offer(robot)
            due = self.scheduler.next_due_ns()
            if due is not None and due <= self.clock.now_ns():
                self.scheduler.serve()
            else:
                self.clock.advance(step)


def test_publishes_at_hz_and_echoes() -> None:
    stack = ControlStack(hz=2.0)
    stack.run(10.0)
    goals = [goal for _, goal in stack.out.sent]
    assert 19 <= len(goals) <= 21
    assert [goal.seq for goal in goals] == list(range(len(goals)))
    assert all(goal.t_pub_ns >= goal.t_obs_ns for goal in goals)
    assert {goal.spec_id for goal in goals} == {stack.engine.spec.spec_id}
    starts = np.array([goal.t_pub_ns for goal in goals[1:]]) - round(0.1 * S)
    # On the grid of half seconds, however long the work took: no drift.
    assert (np.abs(starts - np.round(starts / (S / 2)) * (S / 2)) <= 0.1 * S).all()
    assert stack.scheduler.totals.skipped == 0


def test_the_same_words_of_two_robots_are_judged_each_by_its_own_latent() -> None:
    class Sees(FakeEngine):
        judges_latents = True

        def encode(self, images: Sequence[Any], instructions: Sequence[str]) -> Any:
            found = super().encode(images, instructions)
            found[1:] = 7.0  # what the second robot looks at is another table
            return found

        def judge(self, instructions: Sequence[str], latents: Any) -> list[Judgement]:
            return [Judgement(0.1, True) if z[0, 0] == 7 else Judgement(0.9) for z in latents]

    stack = ControlStack()
    stack.scheduler._engine = Sees(stack.clock)
    for robot in ("a", "b"):
        stack.offer(robot)
    stack.scheduler.serve()
    assert [(robot, goal.refused) for robot, goal in stack.out.sent] == [("a", False), ("b", True)]
    assert stack.scheduler.totals.not_understood == 1


def test_the_newest_request_wins_and_the_older_are_counted() -> None:
    stack = ControlStack()
    stack.offer()
    stack.scheduler.serve()
    for _ in range(5):
        stack.clock.advance(S // 20)
        stack.offer()
    newest_ns = stack.clock.now_ns()
    stack.clock.advance(S)
    stack.scheduler.serve()
    assert stack.out.sent[-1][1].t_obs_ns == newest_ns
    assert stack.scheduler.robots["a"].superseded == 4


def test_deadlines_missed_by_a_slow_engine_are_skipped_and_counted() -> None:
    stack = ControlStack(hz=10.0, cost_s=0.35)
    stack.run(7.0, every_s=0.01)
    totals = stack.scheduler.totals
    assert 18 <= totals.published <= 21  # one at a time, none caught up
    assert totals.skipped >= 2 * totals.published
    assert totals.skipped + totals.published <= 72


def test_a_silent_robot_is_no_missed_deadline() -> None:
    stack = ControlStack(hz=10.0)
    stack.offer()
    stack.scheduler.serve()
    stack.clock.advance(5 * S)
    stack.offer()
    assert stack.scheduler.serve() == 1
    assert stack.scheduler.totals.skipped == 0


def test_a_new_epoch_is_served_at_once() -> None:
    stack = ControlStack(hz=0.5)
    stack.offer(instruction_id=1)
    stack.scheduler.serve()
    stack.clock.advance(S // 10)
    stack.offer(instruction_id=1)
    assert stack.scheduler.serve() == 0
    stack.offer(instruction_id=2)
    assert stack.scheduler.serve() == 1
    assert stack.out.sent[-1][1].instruction_id == 2


def test_robots_due_together_share_a_batch() -> None:
    stack = ControlStack(max_batch=3)
    for name in "abcd":
        stack.offer(name, text=name)
    stack.scheduler.serve()
    stack.scheduler.serve()
    assert [sorted(batch) for batch in stack.engine.batches] == [["a", "b", "c"], ["d"]]
    assert [robot for robot, _ in stack.out.sent] == ["a", "b", "c", "d"]


def test_overload_is_shared_evenly() -> None:
    stack = ControlStack(hz=10.0, cost_s=0.2, max_batch=2)
    stack.run(30.0, robots="abcdefg", every_s=0.01)
    served = Counter(robot for robot, _ in stack.out.sent)
    assert max(served.values()) - min(served.values()) <= 1


def test_many_names_bring_their_owner_no_more_than_one_does_another() -> None:
    """Thirty robots of one key ask for four times what there is; another key's two are served."""
    stack = ControlStack(cost_s=0.1, each_s=0.1, max_batch=8)
    mine, many = ("a", "b"), [f"flood{i}" for i in range(30)]
    end = 60 * S
    while stack.clock.now_ns() < end:
        for name in (*mine, *many):
            request = GoalRequest(RGB, "move", name, stack.seq[name], 0, stack.clock.now_ns())
            stack.seq[name] += 1
            stack.scheduler.offer(request, name, "mine" if name in mine else "many")
        if stack.scheduler.serve() == 0:
            stack.clock.advance(S // 100)
    sent = Counter(robot for robot, _ in stack.out.sent)
    for name in mine:
        assert sent[name] >= 0.9 * 60, sent  # a second is what one batch of eight takes
    assert max(sent[name] for name in many) <= 0.3 * 60


def test_a_bad_request_is_refused_and_the_others_are_served() -> None:
    stack = ControlStack()
    for name, text in (("a", "move"), ("b", "bad"), ("c", "push")):
        stack.offer(name, text=text)
    assert stack.scheduler.serve() == 2
    assert [robot for robot, _ in stack.out.sent] == ["a", "c"]
    health = stack.scheduler.health()
    assert health["refused"] == 1
    assert "bad" in health["robots"]["b"]["error"]
    stack.clock.advance(S)
    stack.offer("b", text="good")
    stack.scheduler.serve()
    assert stack.scheduler.health()["robots"]["b"]["error"] == ""


def test_who_has_a_latent_finds_it_counted() -> None:
    stack, seen = ControlStack(), list[int]()
    send = stack.out.send

    def sent(robot: str, goal: LatentGoal) -> None:
        seen.append(stack.scheduler.health()["published"])
        send(robot, goal)

    stack.out.send = sent  # type: ignore[method-assign]
    stack.offer("a")
    stack.offer("b")
    assert stack.scheduler.serve() == 2 and seen == [1, 2]


def test_a_latent_that_cannot_travel_is_counted_and_the_next_goes_out() -> None:
    stack = ControlStack()
    stack.out.refuses = True
    stack.offer("a")
    stack.offer("b")
    assert stack.scheduler.serve() == 0
    health = stack.scheduler.health()
    assert health["published"] == 0
    assert health["failures"] == {"nonfinite": 2}
    assert "LatentGoal.z" in health["robots"]["a"]["error"]
    stack.out.refuses = False
    stack.clock.advance(S)
    stack.offer("a")
    assert stack.scheduler.serve() == 1
    assert [goal.seq for _, goal in stack.out.sent] == [0]


def test_latents_that_are_not_finite_are_counted_and_nothing_goes_out() -> None:
    stack = ControlStack(max_failures=2)
    stack.engine.value = float("nan")
    for _ in range(5):  # more than may fail in a row: the engine itself works
        stack.offer()
        assert stack.scheduler.serve() == 0
        stack.clock.advance(S)
    stack.engine.value = 1.0
    stack.offer()
    assert stack.scheduler.serve() == 1
    assert stack.scheduler.health()["failures"] == {"latents": 5}


def test_a_failing_engine_is_tried_again_then_given_up() -> None:
    stack = ControlStack(max_failures=3)
    stack.engine.lost = True
    for _ in range(2):
        stack.offer(text="broken")
        assert stack.scheduler.serve() == 0
        stack.clock.advance(S)
    stack.offer(text="move")
    assert stack.scheduler.serve() == 1  # one success forgives
    for _ in range(2):
        stack.clock.advance(S)
        stack.offer(text="broken")
        stack.scheduler.serve()
    stack.clock.advance(S)
    stack.offer(text="broken")
    with pytest.raises(EngineBroken, match="3 engine calls"):
        stack.scheduler.serve()


def test_one_robots_requests_cannot_make_an_engine_start_anew_that_works_for_the_others() -> None:
    stack = ControlStack(max_failures=2)
    for _ in range(6):
        stack.offer("a", text="broken")
        assert stack.scheduler.serve() == 0
        stack.clock.advance(S)
    stack.offer("b")
    assert stack.scheduler.serve() == 1
    assert stack.scheduler.health()["failures"] == {"RuntimeError": 6}


def test_load_is_shed_with_a_counted_reason() -> None:
    stack = ControlStack(max_robots=2, max_wait_s=1.0, forget_s=30.0)
    assert stack.offer("a")
    assert stack.offer("b")
    assert not stack.offer("c")
    stack.clock.advance(2 * S)
    assert stack.scheduler.serve() == 0
    assert stack.scheduler.totals.shed == {"too_many_robots": 1, "too_old": 2}
    stack.clock.advance(31 * S)
    assert stack.offer("c")  # the silent ones gave their places back
    assert set(stack.scheduler.robots) == {"c"}


def test_a_name_stays_with_its_robot_until_that_falls_silent() -> None:
    stack = ControlStack()
    scheduler = stack.scheduler
    request = GoalRequest(RGB, "move", "a", 0, 0, 0)
    other = GoalRequest(RGB, "stop", "a", 7, 3, 0)
    assert scheduler.offer(request, "first")
    assert not scheduler.offer(other, "second")
    assert scheduler.robots["a"].pending is request and scheduler.robots["a"].instruction_id == 0
    assert scheduler.totals.shed == {"name_taken": 1}
    stack.clock.advance(3 * S)
    assert scheduler.offer(other, "second")
    assert scheduler.robots["a"].instruction_id == 3


@pytest.mark.parametrize("name", ["", "x" * 65, "a\0b", "a b", "\u00e4rm"])
def test_a_name_that_cannot_be_a_topic_is_refused(name: str) -> None:
    stack = ControlStack()
    assert not stack.offer(name)
    with pytest.raises(ValueError, match=r"robot\.id"):
        stack.scheduler.claim(name, "run")
    assert stack.scheduler.totals.shed == {"bad_name": 2} and not stack.scheduler.robots


def test_a_claimed_name_is_refused_to_others_while_it_is_used() -> None:
    stack = ControlStack(max_robots=2)
    claim = stack.scheduler.claim
    claim("a", "run1")
    claim("a", "run1")  # again is fine
    with pytest.raises(ValueError, match="'a' is in use"):
        claim("a", "run2")
    for _ in range(15):  # beyond the life of a claim, the robot's own requests keep it
        stack.clock.advance(S)
        stack.offer("a")
    with pytest.raises(ValueError, match="'a' is in use"):
        claim("a", "run2")
    claim("b", "run2")
    with pytest.raises(ValueError, match="2 robots at most"):
        claim("c", "run3")
    assert stack.scheduler.totals.shed == {"name_taken": 2, "too_many_robots": 1}
    stack.clock.advance(11 * S)
    claim("a", "run4")  # that robot has ended


def test_a_robot_that_never_claimed_its_name_keeps_it_too() -> None:
    stack = ControlStack()
    stack.offer("a")
    with pytest.raises(ValueError, match="'a' is in use"):
        stack.scheduler.claim("a", "run")
    stack.clock.advance(3 * S)
    stack.scheduler.claim("a", "run")


def test_nonsense_limits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"limits\.max_batch"):
        Limits(max_batch=0)
    with pytest.raises(ValueError, match="hz"):
        ControlStack(hz=0.0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.floats(0, 0.7), st.booleans()),
        max_size=40,
    ),
    st.floats(0.01, 1.5),
)
def test_whatever_comes_every_latent_is_of_the_robots_epoch_and_newer(
    events: list[tuple[str, int, float, bool]], cost_s: float
) -> None:
    stack = ControlStack(hz=3.0, cost_s=cost_s, max_batch=2)
    for robot, instruction_id, wait_s, serve in events:
        stack.clock.advance(round(wait_s * S))
        stack.offer(robot, instruction_id=instruction_id, text=f"{robot} {instruction_id}")
        if serve:
            stack.scheduler.serve()
    last: dict[str, LatentGoal] = {}
    for robot, goal in stack.out.sent:
        if robot in last:
            assert goal.t_obs_ns > last[robot].t_obs_ns
            assert goal.seq == last[robot].seq + 1
        last[robot] = goal
    offered = sum(stack.seq.values())
    pending = sum(r.pending is not None for r in stack.scheduler.robots.values())
    superseded = sum(r.superseded for r in stack.scheduler.robots.values())
    shed = sum(stack.scheduler.totals.shed.values())
    assert offered == len(stack.out.sent) + pending + superseded + shed


def test_robots_states_go_to_an_engine_that_senses(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, told = ControlStack(), []
    plain = stack.engine.encode

    def encode(images: Any, instructions: Any, *proprio: Any) -> Any:
        told.append(proprio)
        return plain(images, instructions)

    monkeypatch.setattr(stack.engine, "encode", encode)
    stack.offer()
    stack.scheduler.serve()
    monkeypatch.setattr(stack.engine, "spec", LatentSpec("act_last" + SENSES, 1, 4))
    state = np.arange(9, dtype=np.float32)
    request = GoalRequest(RGB, "move", "b", 0, 0, stack.clock.now_ns(), "r", state)
    assert stack.scheduler.offer(request)
    stack.scheduler.serve()
    assert told == [(), ([state],)]
