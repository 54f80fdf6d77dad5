"""What every driver must do, run against every driver that can run here."""

from __future__ import annotations

import numpy as np
import pytest

from openhelix.runtime.core.interfaces import Action, check_frame
from openhelix.runtime.robots.base import NotConnected, Robot, World
from tests.runtime.robot_cases import CASES

SLOW = {"calvin"}  # starts a process and draws 12 frames a second


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)
def case(request):
    with CASES[request.param]() as case:
        yield case


@pytest.fixture
def robot(case):
    case.robot.connect()
    return case.robot


def target(observation, dx=0.0, gripper=1.0, instruction_id=0, t_ns=0):
    pose = np.array(observation.tcp_pose)
    pose[0] += dx
    return Action(pose, gripper, instruction_id=instruction_id, t_ns=t_ns)


def drive(case, action, ticks):
    for _ in range(ticks):
        case.robot.send_action(action)
        case.tick()
    return case.robot.get_observation()


def test_the_contract_can_be_read_while_disconnected(case):
    robot = case.robot
    assert isinstance(robot, Robot)
    assert not robot.is_connected
    assert robot.spec.action.hz > 0
    assert robot.action_features == {"pose": (7,), "gripper": float}
    for camera in robot.spec.cameras:
        shape = robot.observation_features[f"{camera.name}.rgb"]
        assert shape == (camera.height, camera.width, 3)


def test_without_a_connection_calls_are_refused_but_stop_never_raises(case):
    with pytest.raises(NotConnected):
        case.robot.get_observation()
    with pytest.raises(NotConnected):
        case.robot.send_action(Action(np.array([0, 0, 0.5, 0, 0, 0, 1.0]), 1.0))
    case.robot.stop("test")


def test_connecting_twice_and_disconnecting_twice_is_fine(case):
    robot = case.robot
    for _ in range(2):
        robot.connect()
        assert robot.is_connected
    for _ in range(2):
        robot.disconnect()
        assert not robot.is_connected
    robot.connect()
    assert np.isfinite(robot.get_observation().tcp_pose).all()


def test_an_observation_is_what_the_features_promise(case, robot):
    observation = robot.get_observation()
    assert set(observation.frames) == {camera.name for camera in robot.spec.cameras}
    for camera in robot.spec.cameras:
        frame = observation.frames[camera.name]
        check_frame(frame, camera)
        # State and frames of a real-time robot are read one after the other.
        assert frame.t_ns <= observation.t_ns + 100_000_000
        assert frame.K.shape == (3, 3)
        assert frame.T_world_cam.shape == (4, 4)
    assert observation.tcp_pose.shape == (7,)
    assert observation.tcp_pose.dtype == np.float64
    assert np.linalg.norm(observation.tcp_pose[3:]) == pytest.approx(1)
    assert observation.joints.shape == robot.observation_features["joints"]
    assert 0.0 <= observation.gripper_width <= 0.1
    assert isinstance(observation.gripper_open, bool)


def test_time_stamps_advance(case, robot):
    first = robot.get_observation()
    later = drive(case, target(first), 3)
    assert later.t_ns > first.t_ns
    for name, frame in later.frames.items():
        assert frame.t_ns > first.frames[name].t_ns


def test_send_action_returns_what_was_sent_and_leaves_its_argument_alone(case, robot):
    now = robot.get_observation()
    due_ns = now.t_ns + 33_000_000
    wanted = target(now, dx=0.01, instruction_id=4, t_ns=due_ns)
    before = wanted.pose.copy()
    sent = robot.send_action(wanted)
    np.testing.assert_array_equal(wanted.pose, before)
    assert sent.pose.shape == (7,)
    assert np.linalg.norm(sent.pose[3:]) == pytest.approx(1)
    assert 0.0 <= sent.gripper <= 1.0
    assert (sent.instruction_id, sent.t_ns) == (4, due_ns)


def test_the_arm_goes_to_its_target(case, robot):
    start = robot.get_observation()
    wanted = target(start, dx=0.06)
    end = drive(case, wanted, 15)
    assert np.linalg.norm(end.tcp_pose[:3] - wanted.pose[:3]) < 0.01
    assert abs(float(end.tcp_pose[3:] @ wanted.pose[3:])) > 0.999


def test_the_gripper_closes_and_opens(case, robot):
    start = robot.get_observation()
    closed = drive(case, target(start, gripper=0.0), 15)
    assert not closed.gripper_open
    opened = drive(case, target(start, gripper=1.0), 15)
    assert opened.gripper_open
    assert opened.gripper_width > closed.gripper_width + 0.02


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a.pose.__setitem__(0, np.nan),
        lambda a: a.pose.__setitem__(slice(3, 7), 0.0),
        lambda a: object.__setattr__(a, "pose", a.pose[:6]),
        lambda a: object.__setattr__(a, "gripper", 2.0),
        lambda a: object.__setattr__(a, "gripper", np.nan),
    ],
)
def test_a_bad_action_is_refused_in_one_line_and_moves_nothing(case, robot, spoil):
    start = robot.get_observation()
    bad = target(start, dx=0.05)
    spoil(bad)
    with pytest.raises(ValueError, match=r"action\.") as caught:
        robot.send_action(bad)
    assert "\n" not in str(caught.value)
    case.tick()
    np.testing.assert_allclose(robot.get_observation().tcp_pose, start.tcp_pose, atol=1e-3)


def test_holding_keeps_the_arm_where_it_is(case, robot):
    start = robot.get_observation()
    hold = robot.hold_action(None)
    np.testing.assert_allclose(hold.pose[:3], start.tcp_pose[:3], atol=1e-6)
    end = drive(case, hold, 20)
    np.testing.assert_allclose(end.tcp_pose[:3], start.tcp_pose[:3], atol=5e-3)


def test_holding_after_an_action_keeps_its_target_and_gripper(case, robot):
    last = robot.send_action(target(robot.get_observation(), dx=0.02, gripper=0.0))
    hold = robot.hold_action(last)
    np.testing.assert_allclose(hold.pose, last.pose)
    assert hold.gripper == last.gripper


def test_hold_has_no_default():
    assert "hold_action" in Robot.__abstractmethods__
    assert "stop" in Robot.__abstractmethods__


def test_after_stop_the_arm_comes_to_rest(case, robot):
    drive(case, target(robot.get_observation(), dx=0.2), 2)
    robot.stop("test")
    for _ in range(8):
        case.tick()
    first = robot.get_observation()
    for _ in range(10):
        case.tick()
    np.testing.assert_allclose(robot.get_observation().tcp_pose, first.tcp_pose, atol=1e-3)
    assert np.isfinite(drive(case, target(first), 1).tcp_pose).all()  # and it can go on


def test_a_world_resets_counts_steps_and_judges(case, robot):
    if not isinstance(robot, World):
        pytest.skip("not a simulator")
    robot.reset_world(None, None)
    assert robot.env_steps() == 0
    start = robot.get_observation()
    robot.begin_task("turn_on_led", "press the button")
    drive(case, target(start), 3)
    assert robot.env_steps() >= 3  # a real-time world may step on its own
    assert robot.completed() == frozenset()
    robot.reset_world(None, None)
    assert robot.env_steps() == 0
    np.testing.assert_allclose(robot.get_observation().tcp_pose, start.tcp_pose, atol=1e-4)
