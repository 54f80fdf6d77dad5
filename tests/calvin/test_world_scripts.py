"""The scripts and states by which worlds are compared do what they claim, in PlayTable."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, permutations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from openhelix.benchmarks.calvin import calvin_env as calvin
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.tasks import TASKS, completed
from openhelix.benchmarks.perf import compare_worlds, world_scripts

SCRIPTS = {script.name: script for script in world_scripts.mechanism_scripts()}


@pytest.fixture(scope="module")
def env() -> Iterator[PlayTableEnv]:
    with PlayTableEnv("D", cameras=()) as made:
        yield made


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_motion_completes_its_task_and_nothing_else(env: PlayTableEnv, name: str) -> None:
    result = compare_worlds.run_script(env, SCRIPTS[name])
    assert result["completed"] == [SCRIPTS[name].task]
    assert result["first_step"] <= 40


@pytest.mark.parametrize("name", SCRIPTS)
def test_commands_are_at_most_one_control_step_apart(name: str) -> None:
    commands = world_scripts.actions(SCRIPTS[name])
    for (p0, q0, _), (p1, q1, gripper) in pairwise(commands):
        assert np.abs(p1 - p0).max() <= world_scripts.STEP_M + 1e-9
        turn = (Rotation.from_quat(q1) * Rotation.from_quat(q0).inv()).magnitude()
        assert turn <= world_scripts.STEP_RAD + 1e-9
        assert gripper == world_scripts.CLOSED


def test_the_states_contain_every_task(env: PlayTableEnv) -> None:
    infos = []
    for _, robot_obs, scene_obs in world_scripts.states(world_scripts.held_robot_obs(env)):
        env.reset(robot_obs, scene_obs)
        infos.append(env.get_info())
    fired: set[str] = set()
    for start, end in permutations(infos, 2):
        fired |= completed(start, end)
    assert fired == set(TASKS)


def test_free_space_actions_stay_in_the_air() -> None:
    start = np.array(world_scripts.ARM[:3])
    for seed in range(5):
        actions = compare_worlds.free_space_actions(seed, start)
        assert actions.shape == (60, 7)
        assert np.abs(actions[:, :6]).max() <= 1.0
        path = start + np.cumsum(0.02 * actions[:, :3], axis=0)
        assert path[:, 2].min() >= 0.55
        assert np.abs(np.diff(path, axis=0)).max() > 0.005


@pytest.mark.slow
@pytest.mark.skipif(not calvin.is_installed(), reason="calvin_env is not installed")
def test_both_worlds_agree() -> None:
    with (
        PlayTableEnv("D", cameras=()) as ours,
        calvin.CalvinEnv("D", cameras=()) as theirs,
    ):
        worlds = (ours, theirs)
        assert compare_worlds.free_space(worlds, 3)["tcp_error_mm"]["max"] < 5.0
        assert compare_worlds.mechanisms(worlds)["equal"] == 8
        oracles = compare_worlds.oracles(worlds)
        assert oracles["pairs_that_differ"] == []
        assert oracles["tasks_that_fired_in_both"] == 34
