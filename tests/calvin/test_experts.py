"""The experts do their tasks, within the limits that CALVIN's actions have."""

from __future__ import annotations

from math import hypot, pi

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openhelix.benchmarks.calvin.demonstrations import perform, random_expert
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.evaluate_experts import evaluate_starts, main, start_rng
from openhelix.benchmarks.calvin.expert_control import (
    LEASH_M,
    STEP_M,
    STEP_RAD,
    Goal,
    Servo,
    View,
    hand,
    nearest_yaw,
)
from openhelix.benchmarks.calvin.experts import MAX_STEPS, Disturbance, Expert, relative_action
from openhelix.benchmarks.calvin.scene import SceneError, get_scene
from openhelix.benchmarks.calvin.starts import begin
from openhelix.benchmarks.calvin.tasks import TASK_NAMES, UnknownTaskError, get_task
from openhelix.runtime.core.quaternion import matrix, rotation_vector

ONE_A_FAMILY = {  # task: scenes in turn, so that each scene is visited
    "rotate_blue_block_right": "D",
    "push_red_block_left": "A",
    "move_slider_left": "B",
    "open_drawer": "C",
    "close_drawer": "D",
    "lift_pink_block_table": "A",
    "lift_red_block_slider": "D",
    "lift_blue_block_drawer": "B",
    "place_in_slider": "C",
    "place_in_drawer": "D",
    "stack_block": "A",
    "unstack_block": "D",
    "turn_on_lightbulb": "B",
    "turn_off_lightbulb": "D",
    "turn_on_led": "C",
    "push_into_drawer": "D",
}


@pytest.fixture(scope="module")
def info() -> dict:
    with PlayTableEnv("D", cameras=()) as env:
        return env.get_info()


@pytest.mark.parametrize(("task", "scene"), ONE_A_FAMILY.items())
def test_an_expert_does_its_task(task: str, scene: str) -> None:
    """Of three seeded starts at least two succeed within 64 steps (the rate is above 0.97)."""
    steps = evaluate_starts(scene, task, 7, 0, 3, disturb=False)
    assert sum(0 < s <= MAX_STEPS for s in steps) >= 2, steps


def test_families_are_all_covered() -> None:
    assert {get_task(t).family for t in ONE_A_FAMILY} == {get_task(t).family for t in TASK_NAMES}


def test_commands_stay_within_calvins_steps_and_the_leash() -> None:
    with PlayTableEnv("D", cameras=()) as env:
        info = begin(env, "push_red_block_right", start_rng("D", "push_red_block_right", 3, 0))
        expert = Expert("push_red_block_right", "D", info)
        before = None
        for _ in range(40):
            move = expert.act(info)
            here = np.array(info["robot_info"]["tcp_pos"])
            # the leash, and one step beyond it at most
            assert np.linalg.norm(move.position - here) <= LEASH_M + STEP_M * 3**0.5 + 1e-9
            if before is not None:
                turned = rotation_vector(before.quaternion, move.quaternion)
                assert hypot(*turned) <= 0.2 + STEP_RAD + 1e-9
            assert np.abs(move.relative).max() <= 1.0
            assert move.gripper in (-1, 1)
            before = move
            env.advance(move.action())
            info = env.get_info()


def test_a_pushed_arm_comes_back() -> None:
    """Disturbed demonstrations succeed too, and say which steps were not their own."""
    shifted = 0
    with PlayTableEnv("D", cameras=()) as env:
        for index in range(4):
            rng = start_rng("D", "lift_red_block_table", 11, index)
            begin(env, "lift_red_block_table", rng)
            push = Disturbance(4, 5, (0.03, 0.03, 0.01), (0.0, 0.0, 0.2))
            expert = random_expert(env, "lift_red_block_table", rng)
            done = perform(env, expert, disturbance=push, record=True)
            assert not done.clean[4:9].any()
            assert done.clean[:4].all() and done.clean[9:].all()
            shifted += done.success
    assert shifted >= 3


def test_a_demonstration_holds_what_was_seen_and_sent() -> None:
    with PlayTableEnv("B", cameras=()) as env:
        rng = start_rng("B", "open_drawer", 5, 0)
        begin(env, "open_drawer", rng)
        done = perform(env, random_expert(env, "open_drawer", rng), record=True, tail=2)
    steps = len(done.targets)
    assert done.success and done.steps + 2 >= steps >= done.steps
    assert done.states.shape == (steps + 1, 36) and done.proprio.shape == (steps + 1, 9)
    assert done.relative.shape == (steps, 7) and done.clean.all()
    lead = np.linalg.norm(done.targets[:, :3] - done.proprio[:-1, :3], axis=1)
    assert lead.max() < 0.09  # targets are near the arm: they were meant for where it was
    assert set(np.unique(done.targets[:, 7])) <= {0.0, 1.0}


def test_experts_repeat_themselves() -> None:
    first = evaluate_starts("D", "turn_on_led", 1, 0, 2, disturb=True)
    assert first == evaluate_starts("D", "turn_on_led", 1, 0, 2, disturb=True)


def test_unknown_names_are_refused(info: dict) -> None:
    with pytest.raises(UnknownTaskError, match="fly"):
        Expert("fly", "D", info)
    with pytest.raises(SceneError, match="'E'"):
        Expert("open_drawer", "E", info)


@pytest.mark.parametrize("words", [["--tasks", "fly"], ["--scene", "Q"], ["--starts", "0"]])
def test_evaluation_refuses_bad_input(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-0.5, 0.5), min_size=3, max_size=3),
    st.floats(-1.0, 4.0),
    st.floats(0.3, 1.0),
)
def test_the_servo_keeps_its_limits(
    info: dict, shift: list[float], yaw: float, pace: float
) -> None:
    view = View(get_scene("D"), info)
    servo = Servo(view, 1.0)
    goal = Goal(view.position + np.array(shift), hand(yaw), 1, pace)
    for _ in range(3):
        before = servo.position.copy(), servo.quaternion
        servo.step(view, goal)
        assert np.abs(servo.position - before[0]).max() <= STEP_M * pace + 1e-12
        assert hypot(*rotation_vector(before[1], servo.quaternion)) <= STEP_RAD * pace + 1e-9
        assert np.linalg.norm(servo.position - view.position) <= LEASH_M + 1e-9


@given(st.floats(-1.0, 4.8), st.floats(0.0, 1.1))
def test_a_tilted_hand_leans_its_tip(yaw: float, tilt: float) -> None:
    axis = np.array(matrix(hand(yaw, tilt)))[:, 2]
    assert axis == pytest.approx([0.0, np.sin(tilt), -np.cos(tilt)], abs=1e-9)
    axis = np.array(matrix(hand(yaw, tilt, (1.0, 0.0))))[:, 2]
    assert axis == pytest.approx([np.sin(tilt), 0.0, -np.cos(tilt)], abs=1e-9)


@given(st.floats(-pi, pi), st.floats(-1.0, 4.8))
def test_grasp_yaws_are_the_same_grasp_within_reach(option: float, now: float) -> None:
    for yaw in nearest_yaw([option], now, pi):
        assert -1.1 <= yaw <= 4.9
        assert abs(np.sin(yaw - option)) < 1e-5


def test_relative_actions_are_clipped_differences() -> None:
    before = np.zeros(3), hand(1.5)
    after = np.array([0.01, -0.02, 0.1]), hand(1.525)
    relative = relative_action(before, after, -1)
    assert relative == pytest.approx([0.5, -1.0, 1.0, 0.0, 0.0, 0.5, -1.0], abs=1e-6)
