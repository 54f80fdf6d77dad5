"""CALVIN's sequences, regenerated in part, and the layouts they start in."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
import pytest

from openhelix.benchmarks.calvin import sequences
from openhelix.benchmarks.calvin.sequences import LAYOUTS, get_sequences, initial_state
from openhelix.benchmarks.calvin.tasks import TASK_NAMES

SHA256 = "961386371b028e8dc35df74eac85e797083c0f2345382a1120ddc8ced4db9e6c"
LENGTHS = {  # block length by colour, metres
    "A": {"red": 0.056, "blue": 0.08, "pink": 0.04},
    "B": {"red": 0.04, "blue": 0.08, "pink": 0.056},
    "C": {"red": 0.08, "blue": 0.04, "pink": 0.056},
    "D": {"red": 0.056, "blue": 0.04, "pink": 0.08},
}
TABLE_X = {"A": (-0.2, 0.35), "B": (-0.35, 0.15), "C": (0.0, 0.35), "D": (0.0, 0.35)}
SHELF_X = {
    "A": ((-0.32, -0.16), (-0.05, 0.13)),
    "B": ((-0.12, 0.06), (0.15, 0.33)),
    "C": ((-0.12, 0.06), (0.15, 0.3)),
    "D": ((-0.32, -0.16), (-0.05, 0.13)),
}


def test_the_list_is_calvins() -> None:
    everything = get_sequences()
    assert len(everything) == 1000
    assert hashlib.sha256(sequences.to_json(everything).encode()).hexdigest() == SHA256
    assert hashlib.sha256(sequences.LIST_PATH.read_bytes()).hexdigest() == SHA256
    assert get_sequences(7) == everything[:7]
    assert {t for _, tasks in everything for t in tasks} == set(TASK_NAMES)


def test_generating_a_part_gives_the_shipped_part() -> None:
    part = sequences.generate(only_states=range(40, 46))
    shipped = get_sequences()
    states = {tuple(state.values()) for state, _ in part}
    assert len(states) == 6
    assert len(part) in range(30, 37)
    for made in part:
        assert made in shipped
    assert sorted(map(repr, part)) == sorted(
        repr(s) for s in shipped if tuple(s[0].values()) in states
    )


@pytest.mark.slow
def test_generating_all_gives_the_shipped_list() -> None:
    assert hashlib.sha256(sequences.to_json(sequences.generate()).encode()).hexdigest() == SHA256


def test_every_sequence_can_be_done_and_is_varied() -> None:
    for state, tasks in get_sequences():
        assert sequences.is_possible(state, tasks)
        assert len(set(tasks)) == 5


def test_symbolic_rules() -> None:
    state = get_sequences(1)[0][0]  # drawer open, slider left, red left, blue table, pink right
    assert len(sequences.initial_states()) == 192
    assert not sequences.successors(state, "open_drawer")
    assert not sequences.successors(state, "lift_red_block_slider")  # behind the door
    assert not sequences.successors(state, "stack_block")  # nothing held
    (held,) = sequences.successors(state, "lift_pink_block_slider")
    assert (held["pink_block"], held["grasped"]) == ("grasped", 1)
    assert not sequences.successors(held, "close_drawer")  # the hand is full
    (placed,) = sequences.successors(held, "place_in_slider")
    assert (placed["pink_block"], placed["grasped"]) == ("slider_left", 0)
    (stacked,) = sequences.successors(held, "stack_block")
    assert (stacked["pink_block"], stacked["blue_block"]) == ("stacked_top", "stacked_bottom")
    (flat,) = sequences.successors(stacked, "unstack_block")
    assert (flat["pink_block"], flat["blue_block"]) == ("table", "table")
    (fallen,) = sequences.successors(state, "push_into_drawer")
    assert fallen["blue_block"] == "drawer"
    two = {**state, "red_block": "table"}
    assert not sequences.successors(two, "push_into_drawer")
    (held_two,) = sequences.successors(two, "lift_pink_block_slider")
    assert len(sequences.successors(held_two, "stack_block")) == 2  # ambiguous, so not allowed
    assert not sequences.is_possible(two, ("lift_pink_block_slider", "stack_block"))


def test_first_layout_is_calvins() -> None:
    state, _ = get_sequences(1)[0]
    assert sequences.layout_seed(state) == 2138410836
    robot_obs, scene_obs = initial_state(state)
    assert robot_obs.shape == (15,)
    assert scene_obs.shape == (24,)
    assert robot_obs.dtype == scene_obs.dtype == np.float64
    np.testing.assert_array_equal(scene_obs[:6], [0.28, 0.22, 0, 0.088, 1, 1])
    np.testing.assert_allclose(scene_obs[6:9], [-0.240851662, 0.0924044687, 0.460990009])
    np.testing.assert_allclose(scene_obs[18:21], [0.070341633, 0.0924044687, 0.460990009])
    assert scene_obs[12] in (0.0500000896, 0.229995412)


@pytest.mark.parametrize("scene", "ABCD")
def test_blocks_lie_in_their_regions_and_never_meet(scene: str) -> None:
    order = LAYOUTS[scene].order
    radius = {c: float(np.hypot(LENGTHS[scene][c], 0.04)) / 2 for c in order}
    seen: set[bytes] = set()
    for state in sequences.initial_states():
        _, scene_obs = initial_state(state, scene)
        seen.add(scene_obs.tobytes())
        poses = scene_obs[6:].reshape(3, 6)
        for color, pose in zip(order, poses, strict=True):
            at = state[f"{color}_block"]
            low, high = TABLE_X[scene] if at == "table" else SHELF_X[scene][at == "slider_right"]
            assert low <= pose[0] <= high
            low, high = (-0.15, -0.03) if at == "table" else (0.05, 0.12)
            assert low <= pose[1] <= high
            assert pose[2] == pytest.approx(0.46, abs=2e-3)
            assert 3 * np.pi / 8 <= pose[5] <= 5 * np.pi / 8
            assert not pose[3:5].any()
        for (c1, p1), (c2, p2) in itertools.combinations(zip(order, poses, strict=True), 2):
            gap = float(np.linalg.norm(p1[:2] - p2[:2])) - radius[c1] - radius[c2]
            assert gap > 0.02
    assert len(seen) == 192


@pytest.mark.parametrize(("scene", "open_m"), [("A", 0.28), ("B", 0.304), ("C", 0.24)])
def test_other_scenes_have_their_own_door_and_order(scene: str, open_m: float) -> None:
    state = {**get_sequences(1)[0][0], "slider": "left"}
    here, in_d = initial_state(state, scene)[1], initial_state(state)[1]
    assert here[0] == open_m
    yaw = dict(zip(("red", "blue", "pink"), in_d[[11, 17, 23]], strict=True))
    for color, value in zip(LAYOUTS[scene].order, here[[11, 17, 23]], strict=True):
        assert value == yaw[color]  # the same draw, whatever the scene


def test_the_order_of_keys_does_not_matter() -> None:
    state = get_sequences(3)[2][0]
    shuffled = dict(reversed(state.items()))
    np.testing.assert_array_equal(initial_state(state)[1], initial_state(shuffled)[1])


@pytest.mark.parametrize("n", [-1, 1001, 2.5, True, "10"])
def test_bad_count(n: Any) -> None:
    with pytest.raises(ValueError, match="n: "):
        get_sequences(n)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"slider": "up"}, "slider"),
        ({"red_block": "drawer"}, "red_block"),
        ({"grasped": 1}, "grasped"),
        ({"colour": 1}, "colour"),
        ({"red_block": "table", "blue_block": "table", "pink_block": "table"}, "table"),
        ({"red_block": "slider_left", "blue_block": "slider_left"}, "slider_left"),
    ],
)
def test_bad_state(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"state: .*{field}"):
        initial_state({**get_sequences(1)[0][0], **change})


@pytest.mark.parametrize("scene", ["E", "", None, 4, ["D"]])
def test_bad_scene(scene: Any) -> None:
    with pytest.raises(ValueError, match=r"scene: .*A, B, C, D"):
        initial_state(get_sequences(1)[0][0], scene)
