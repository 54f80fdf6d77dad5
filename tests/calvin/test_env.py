"""The env behaves as calvin_env does: keys, shapes, response, mechanisms, contacts."""

from __future__ import annotations

import numpy as np
import pytest

from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.scene import SCENES
from tests.calvin.helpers import ROBOT_OBS, scene_obs, waypoints

DOWN = (np.pi, 0.0, np.pi / 2)
STILL = np.array([0, 0, 0, 0, 0, 0, 1.0])


@pytest.fixture
def env():
    with PlayTableEnv("D", cameras=()) as made:
        yield made


def run(env, actions):
    """Step through `actions`; return robot_obs (n, 15), scene_obs (n, 24) and the last info."""
    robot, scene, info = [], [], {}
    for action in actions:
        obs, reward, done, info = env.step(action)
        assert (reward, done) == (0, False)
        robot.append(obs["robot_obs"])
        scene.append(obs["scene_obs"])
    return np.array(robot), np.array(scene), info


def test_observation_keys_shapes_and_types():
    with PlayTableEnv("D") as env:
        obs = env.reset(ROBOT_OBS, scene_obs(drawer=0.1, led=1))
    assert set(obs) == {"rgb_obs", "depth_obs", "robot_obs", "scene_obs"}
    assert obs["rgb_obs"]["rgb_static"].shape == (200, 200, 3)
    assert obs["rgb_obs"]["rgb_gripper"].shape == (84, 84, 3)
    assert obs["depth_obs"]["depth_static"].shape == (200, 200)
    assert obs["depth_obs"]["depth_gripper"].shape == (84, 84)
    assert {image.dtype for image in obs["rgb_obs"].values()} == {np.dtype(np.uint8)}
    assert {image.dtype for image in obs["depth_obs"].values()} == {np.dtype(np.float32)}
    assert (obs["robot_obs"].shape, obs["scene_obs"].shape) == ((15,), (24,))
    assert obs["robot_obs"].dtype == obs["scene_obs"].dtype == np.float64
    np.testing.assert_allclose(obs["robot_obs"], ROBOT_OBS, atol=1e-4)
    np.testing.assert_allclose(obs["scene_obs"], scene_obs(drawer=0.1, led=1), atol=3e-3)


def test_without_cameras_nothing_is_drawn(env):
    obs = env.reset()
    assert obs["rgb_obs"] == {}
    assert obs["depth_obs"] == {}
    assert env.renderer is None


def test_info_is_calvins(env):
    env.reset(ROBOT_OBS, scene_obs(switch=0.088, bulb=1))
    _, _, _, info = env.step(STILL)
    assert set(info["robot_info"]) == {
        "tcp_pos",
        "tcp_orn",
        "gripper_opening_width",
        "arm_joint_states",
        "gripper_action",
        "uid",
        "contacts",
    }
    scene = info["scene_info"]
    links = scene["fixed_objects"]["table"]["links"]
    assert (links["base_link"], links["drawer_link"], links["plank_link"]) == (-1, 3, 6)
    assert set(scene["doors"]) == {"base__slide", "base__drawer"}
    assert scene["switches"]["base__switch"]["logical_state"] == 1
    assert scene["buttons"]["base__button"]["logical_state"] == 0
    assert scene["lights"] == {"lightbulb": {"logical_state": 1}, "led": {"logical_state": 0}}
    table = scene["fixed_objects"]["table"]["uid"]
    red, pink = (scene["movable_objects"][f"block_{name}"] for name in ("red", "pink"))
    assert {(c[2], c[4]) for c in red["contacts"]} == {(table, links["base_link"])}
    assert {(c[2], c[4]) for c in pink["contacts"]} == {(table, links["plank_link"])}
    assert len(red["current_orn"]) == 4
    assert len(red["current_lin_vel"]) == len(red["current_ang_vel"]) == 3


def test_surface_contacts_are_there_right_after_reset(env):
    start = scene_obs(drawer=0.2)
    start[6:9] = (0.18, -0.25, 0.362)
    env.reset(ROBOT_OBS, start)
    info = env.get_info()["scene_info"]
    table = info["fixed_objects"]["table"]
    touched = {
        name: {(c[2], c[4]) for c in block["contacts"]}
        for name, block in info["movable_objects"].items()
    }
    links = table["links"]
    assert touched["block_red"] == {(table["uid"], links["drawer_link"])}
    assert touched["block_blue"] == {(table["uid"], links["base_link"])}
    assert touched["block_pink"] == {(table["uid"], links["plank_link"])}


def test_step_response_of_position_rotation_and_gripper(env):
    env.reset(ROBOT_OBS, scene_obs())
    robot, _, _ = run(env, [[1, 0, 0, 0, 0, 0, 1]] + [STILL] * 4)
    np.testing.assert_allclose(
        (robot[:, 0] - ROBOT_OBS[0]) / 0.02, [0.49, 0.76, 0.88, 0.94, 0.97], atol=0.015
    )
    env.reset(ROBOT_OBS, scene_obs())
    robot, _, _ = run(env, [[0, 0, 0, 0, 0, 1, 1]] + [STILL] * 3)
    np.testing.assert_allclose(
        (robot[:, 5] - ROBOT_OBS[5]) / 0.05, [0.42, 0.74, 0.89, 0.95], atol=0.02
    )
    env.reset(ROBOT_OBS, scene_obs())
    robot, _, _ = run(env, [[0, 0, 0, 0, 0, 0, -1]] * 8 + [STILL] * 4)
    np.testing.assert_allclose(robot[:4, 6], [0.034, 0.015, 0.006, 0.003], atol=1e-3)
    np.testing.assert_allclose(robot[8:, 6], [0.025, 0.056, 0.070, 0.076], atol=1e-3)
    env.reset(ROBOT_OBS, scene_obs())
    robot, _, _ = run(env, [[1, 0, 0, 0, 0, 0, 1]] * 10)
    assert robot[-1, 0] - ROBOT_OBS[0] == pytest.approx(0.174, abs=0.002)


def test_absolute_actions_leave_the_relative_target_alone(env):
    env.reset(ROBOT_OBS, scene_obs())
    run(env, [(ROBOT_OBS[:3] + np.array([0.05, 0, 0]), ROBOT_OBS[3:6], 1)] * 10)
    robot, _, _ = run(env, [STILL] * 15)
    np.testing.assert_allclose(robot[-1, :3], ROBOT_OBS[:3], atol=1e-3)


def test_quaternion_and_euler_targets_mean_the_same(env):
    quaternion = np.array([0.7315795186, 0.6811215427, 0.0280629456, 0.0087933573])
    ends = []
    for rotation in (ROBOT_OBS[3:6], quaternion):
        env.reset(ROBOT_OBS, scene_obs())
        robot, _, _ = run(env, [(ROBOT_OBS[:3] + np.array([0, 0, 0.04]), rotation, -1)] * 12)
        ends.append(robot[-1, :6])
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-4)


def test_joint_actions_reach_their_joints(env):
    env.reset(ROBOT_OBS, scene_obs())
    goal = ROBOT_OBS[7:14] + 0.05
    robot, _, _ = run(env, [{"type": "joint_abs", "action": [*goal, 1]}] * 25)
    np.testing.assert_allclose(robot[-1, 7:14], goal, atol=2e-3)
    env.step({"type": "joint_rel", "action": [0.02] * 7 + [-1]})
    assert env.get_obs()["robot_obs"][14] == -1


def test_grasp_and_lift_leaves_only_the_robot_touching(env):
    env.reset(ROBOT_OBS, scene_obs())
    points = [(0.05, -0.12, 0.56, 1, 6), (0.05, -0.12, 0.461, 1, 4), (0.05, -0.12, 0.461, -1, 8)]
    robot, scene, info = run(
        env, waypoints(ROBOT_OBS[:3], [*points, (0.05, -0.12, 0.58, -1, 6)], DOWN)
    )
    assert scene[-1, 8] - 0.46 > 0.1
    assert robot[-1, 6] == pytest.approx(0.040, abs=1e-3)
    red = info["scene_info"]["movable_objects"]["block_red"]
    assert {c[2] for c in red["contacts"]} == {info["robot_info"]["uid"]}


def test_drawer_opens_by_its_handle_and_shuts_when_pushed(env):
    env.reset(ROBOT_OBS, scene_obs())
    pull = [(0.18, -0.207, 0.52, -1, 8), (0.18, -0.207, 0.368, -1, 6), (0.18, -0.40, 0.368, -1, 6)]
    _, scene, _ = run(env, waypoints(ROBOT_OBS[:3], pull, DOWN))
    assert scene[-1, 1] > 0.19
    env.reset(ROBOT_OBS, scene_obs(drawer=0.22))
    push = [(0.18, -0.52, 0.50, -1, 8), (0.18, -0.52, 0.365, -1, 6), (0.18, -0.27, 0.365, -1, 8)]
    _, scene, _ = run(env, waypoints(ROBOT_OBS[:3], push, DOWN))
    assert scene[-1, 1] < 0.02


def test_door_slides_by_its_handle(env):
    env.reset(ROBOT_OBS, scene_obs())
    points = [(0.09, -0.10, 0.60, -1, 8), (0.09, -0.018, 0.518, -1, 6)]
    _, scene, _ = run(env, waypoints(ROBOT_OBS[:3], [*points, (-0.16, -0.018, 0.518, -1, 6)], DOWN))
    assert scene[-1, 0] > 0.25


def test_each_press_of_the_button_toggles_the_led(env):
    env.reset(ROBOT_OBS, scene_obs())
    over, down = (-0.12, -0.12, 0.56, -1, 8), (-0.12, -0.12, 0.475, -1, 6)
    _, scene, info = run(
        env, waypoints(ROBOT_OBS[:3], [over, down, over, down, over, down, over], DOWN)
    )
    changes = np.nonzero(np.diff(scene[:, 5]))[0]
    assert len(changes) == 3
    assert scene[-1, 5] == info["scene_info"]["lights"]["led"]["logical_state"] == 1
    pressed = scene[:, 2] > 0.010
    assert all(pressed[i + 1] and not pressed[i] for i in changes)


def test_switch_turns_the_bulb_on_past_half_way(env):
    env.reset(ROBOT_OBS, scene_obs())
    tilted = (np.pi, -0.65, np.pi / 2)  # the tip leans to +y
    points = [(0.30, -0.08, 0.50, -1, 14), (0.30, 0.018, 0.48, -1, 8)]
    _, scene, _ = run(
        env, waypoints(ROBOT_OBS[:3], [*points, (0.30, 0.0655, 0.5623, -1, 10)], tilted)
    )
    assert scene[-1, 3] > 0.08
    assert ((scene[:, 3] > 0.044) == (scene[:, 4] == 1)).all()


@pytest.mark.parametrize("name", sorted(SCENES))
def test_every_scene_places_its_blocks_without_contact(name):
    with PlayTableEnv(name, cameras=(), seed=7) as env:
        for _ in range(3):
            obs = env.reset()
            blocks = env.get_info()["scene_info"]["movable_objects"]
            assert tuple(blocks) == SCENES[name].blocks
            uids = {block["uid"] for block in blocks.values()}
            for block in blocks.values():
                assert not {c[2] for c in block["contacts"]} & uids
            assert (np.abs(obs["scene_obs"][[8, 14, 20]] - 0.46) < 0.01).all()


@pytest.mark.parametrize(
    ("robot_obs", "start", "field"),
    [
        (None, np.zeros(23), "scene_obs: shape (23,)"),
        (None, np.zeros(25), "scene_obs: shape (25,)"),
        (None, np.full(24, np.nan), "scene_obs: contains NaN"),
        (None, scene_obs(led=0.5), "scene_obs: lights"),
        (np.zeros(14), scene_obs(), "robot_obs: shape (14,)"),
        ("rest", scene_obs(), "robot_obs: not numbers"),
    ],
)
def test_a_bad_reset_names_its_field_and_changes_nothing(env, robot_obs, start, field):
    env.reset(ROBOT_OBS, scene_obs())
    env.step([1, 0, 0, 0, 0, 0, -1])
    before = env.get_state_obs()
    with pytest.raises(ValueError, match=field.split(":")[0]) as error:
        env.reset(robot_obs, start)
    assert field in str(error.value)
    after = env.get_state_obs()
    assert all((before[key] == after[key]).all() for key in before)


def test_a_bad_action_changes_nothing(env):
    moves = [np.array([0.4, -0.2, 0.1, 0, 0, 0.3, -1])] * 5
    env.reset(ROBOT_OBS, scene_obs())
    wanted, _, _ = run(env, moves)
    env.reset(ROBOT_OBS, scene_obs())
    seen = []
    for move in moves:
        for bad in (np.zeros(6), [*np.zeros(6), 0.2], [np.nan] * 7, {"type": "x"}):
            with pytest.raises(ValueError):
                env.step(bad)
        seen.append(env.step(move)[0]["robot_obs"])
    assert (np.array(seen) == wanted).all()


def test_unknown_scene_and_camera():
    with pytest.raises(ValueError, match="scene: 'E' is not one of A, B, C, D"):
        PlayTableEnv("E")
    with pytest.raises(ValueError, match=r"cameras: .*wrist.*static, gripper"):
        PlayTableEnv("D", cameras=("wrist",))


def test_close_is_idempotent_and_leaves_other_envs_alone():
    first, second = PlayTableEnv("D", cameras=()), PlayTableEnv("A", cameras=())
    first.close()
    first.close()
    third = PlayTableEnv("B", cameras=())
    del first
    assert second.step(STILL)[0]["robot_obs"].shape == (15,)
    assert third.step(STILL)[0]["robot_obs"].shape == (15,)
    second.close()
    third.close()
    with pytest.raises(RuntimeError, match="this world is closed"):
        third.step(STILL)


def test_substep_hooks_run_eight_times_a_step_until_removed(env):
    env.reset(ROBOT_OBS, scene_obs())
    heights = []

    def carry(world):
        position, quaternion = world.block_pose("block_blue")
        world.set_block_pose("block_blue", (position[0] + 0.001, position[1], 0.5), quaternion)
        world.set_block_velocity("block_blue", (0, 0, 0))
        heights.append(position[2])
        assert not world.robot_touches("block_blue")

    env.add_substep_hook(carry)
    env.step(STILL)
    assert len(heights) == 8
    x = env.get_obs()["scene_obs"][12]
    assert x == pytest.approx(0.23 + 0.008, abs=1e-4)
    env.remove_substep_hook(carry)
    env.remove_substep_hook(carry)
    env.step(STILL)
    assert len(heights) == 8
