"""The gate that has learned when to ask: what it is told, its file, and when it asks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from openhelix.runtime.control.gate import FEATURES, Gate, LearnedTrigger, Memory, look_at
from openhelix.runtime.control.goals import LockstepGoals, WireGoals
from openhelix.runtime.control.plans import ChunkBuffer
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.interfaces import ActionChunk, Observation, SpecMismatch
from openhelix.runtime.robots.fake import PointEngine
from tests.fakes import LATENT, PERIOD_NS
from tests.runtime.control.test_goals import Channel
from tests.runtime.control.test_trigger import BASE_M, seen

THERE = {name: place for place, name in enumerate(FEATURES)}
HERE, AWAY, SMALL = ((0.5, 0.5),), ((-0.5, 0.5),), ((0.14, 0.0),)


def gate_of(weights: dict[str, float], bias: float, system2: str = "") -> Gate:
    """A gate of one unit: tanh of a weighted sum of features, times ten."""
    hidden = np.zeros((len(FEATURES), 1))
    for name, weight in weights.items():
        hidden[THERE[name]] = weight
    flat, one = np.zeros(len(FEATURES)), np.ones(len(FEATURES))
    made = Gate(system2, flat, one, hidden, np.array([bias]), np.array([10.0]), 0.0, 0.5, {})
    return replace(made, system2=system2 or PointEngine().spec.spec_id)


ELSEWHERE = {"elsewhere_streak": 1.0}  # asks from the second look on at which something stands


def trigger(gate: Gate, floor_s: float = 0.2, ceiling_s: float = 100.0) -> LearnedTrigger:
    made = LearnedTrigger("static", floor_s, ceiling_s, BASE_M, gate)
    made.begin()
    return made


def asked(made: LearnedTrigger, see: Callable[[int], Observation], ticks: int) -> list[int]:
    return [tick for tick in range(ticks) if made.due(see(tick))]


def told(see: Callable[[int], Observation], looks: int, plan: ChunkBuffer | None = None) -> dict:
    """Features after so many looks, one each third tick."""
    views = [look_at(see(3 * i), "static", BASE_M, plan) for i in range(looks)]
    assert all(views)
    memory = Memory(views[0])  # type: ignore[arg-type]
    for view in views[1:]:
        features = memory.take(view)  # type: ignore[arg-type]
    return dict(zip(FEATURES, features.tolist(), strict=True))


def test_what_stays_as_it_is_is_asked_about_once_and_at_the_ceiling() -> None:
    made = trigger(gate_of(ELSEWHERE, -1.5), ceiling_s=0.999)
    assert asked(made, lambda tick: seen(tick, blocks=HERE), 70) == [0, 30, 60]
    assert made.changes == 0
    made.begin()
    assert made.due(seen(70)) and not made.due(seen(71))


def test_what_the_gate_expects_is_asked_about_and_never_below_the_floor() -> None:
    made = trigger(gate_of(ELSEWHERE, -1.5))
    found = asked(made, lambda t: seen(t, blocks=HERE if t < 20 else AWAY), 60)
    assert found[0] == 0 and len(found) == 2 and 20 < found[1] <= 30 and made.changes == 1
    restless = trigger(gate_of({}, 5.0), floor_s=0.499)
    assert min(np.diff(asked(restless, seen, 100))) >= 15


def test_what_somebody_moves_is_elsewhere_and_what_the_hand_moves_is_not() -> None:
    moved = told(lambda t: seen(t, blocks=HERE if t < 6 else AWAY), 5)
    assert moved["elsewhere"] > 2 and moved["elsewhere_streak"] >= 1 and moved["elsewhere_far"] > 0
    assert moved["most_jump"] > 2 and moved["beside"] == moved["left_behind"] == 0
    assert moved["way_m"] == moved["gripper_differs"] == 0

    def pushed(tick: int) -> Observation:
        at = min(0.01 * tick, 0.3)
        return seen(tick, hand=(at, 0.0), blocks=((at + 0.14, 0.0),))

    own = told(pushed, 12)
    assert own["elsewhere"] == 0 and own["way_m"] == pytest.approx(0.3)
    assert own["age_s"] == pytest.approx(33 * PERIOD_NS * 1e-9)


def test_a_jump_beside_the_hand_is_told_apart_from_one_far_away() -> None:
    near = told(lambda t: seen(t, blocks=SMALL if t < 6 else HERE), 4)
    assert near["most_jump_beside"] > 0 and near["most_jump"] > 0


def test_how_far_the_robot_is_from_its_plan_is_told() -> None:
    plan = ChunkBuffer()
    poses = np.tile((0.1, 0.0, 0.05, 0.0, 0.0, 0.0, 1.0), (20, 1))
    chunk = ActionChunk(0, PERIOD_NS, poses, np.zeros(20), 0)
    assert plan.put(chunk, 0)
    features = told(lambda t: seen(t), 3, plan)
    assert features["off_plan_m"] == pytest.approx(0.1)
    assert features["off_plan_gripper"] == 1.0 and features["off_plan_rad"] == pytest.approx(0)
    assert features["plan_left_s"] == pytest.approx(13 * PERIOD_NS * 1e-9)
    assert told(lambda t: seen(t), 3)["plan_left_s"] == 0


def test_no_camera_is_nothing_to_look_at() -> None:
    made = trigger(gate_of({}, 5.0))
    blank = Observation(0, {}, seen(0).tcp_pose, 0.08, True, np.zeros(7))
    assert made.due(blank) and not made.due(blank)
    assert not made.due(seen(10)) and made.due(seen(20))


def test_both_clocks_ask_when_the_gate_says_so() -> None:
    channel, engine, counts = Channel(), PointEngine(), []
    made = [trigger(gate_of(ELSEWHERE, -1.5)) for _ in range(2)]
    wire = WireGoals(channel, channel, "a", "static", 1, max_age_s=1.0, trigger=made[0])
    wire.expect(engine.spec)
    for goals in (wire, LockstepGoals(engine, "static", 1, 0, trigger=made[1])):
        goals.begin(1, "reach 0 0 0")
        for tick in range(60):
            goals.update(seen(tick, blocks=HERE if tick < 20 else AWAY), tick * PERIOD_NS)
        counts.append(goals.received)
    assert len(channel.sent) == 2 and counts[1] == 2


def test_the_gate_of_another_system_2_is_refused() -> None:
    engine = PointEngine()
    made = trigger(gate_of({}, 0.0, "another"))
    with pytest.raises(SpecMismatch, match=r"system2\.trigger: .* was fitted to System 2 another"):
        LockstepGoals(engine, "static", 1, 0, trigger=made)
    wire = WireGoals(Channel(), Channel(), "a", "static", 1, max_age_s=1.0, trigger=made)
    with pytest.raises(SpecMismatch, match="openhelix gate"):
        wire.expect(LATENT)


def test_a_gate_comes_back_from_its_file(tmp_path: Path) -> None:
    made = replace(gate_of(ELSEWHERE, -1.5), about={"tapes": 3}, threshold=0.3)
    made.save(tmp_path / "gate.json")
    back = Gate.load(tmp_path / "gate.json")
    features = np.arange(len(FEATURES)) * 0.1
    assert back.probability(features) == pytest.approx(made.probability(features), abs=1e-4)
    assert (back.system2, back.threshold, back.about) == (made.system2, 0.3, {"tapes": 3})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"features": ["age_s"]}, "no gate of this program"),
        ({"format": 0}, "no gate of this program"),
        ({"mean": [0.0]}, "do not fit together"),
        ({"scale": [0.0] * len(FEATURES)}, "do not fit together"),
        ({"out_bias": None}, "do not fit together"),
        (None, "not JSON"),
    ],
)
def test_a_file_that_is_no_gate_is_refused(change: dict | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "gate.json"
    gate_of(ELSEWHERE, -1.5).save(file)
    data = json.loads(file.read_text())
    file.write_text("nothing" if change is None else json.dumps(data | change))
    with pytest.raises(ConfigError, match=rf"^system2\.trigger_weights: {file}: .*{said}"):
        Gate.load(file)


def test_no_file_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*openhelix gate.*system2.trigger=change"):
        Gate.load(tmp_path / "none.json")
