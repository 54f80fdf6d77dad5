"""runtime.robots.env: the wrapper's own behaviour; the rest is in the conformance suite."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.clock import FakeClock
from runtime.robots.base import RobotError, make_robot
from runtime.robots.env import EnvRobot
from runtime.types import Action
from tests.runtime.robot_cases import TinyEnv

ORACLE = "tests.runtime.robot_cases:tiny_oracle"


def connected(env, **options):
    robot = EnvRobot(lambda: env, clock=FakeClock(7), oracle=ORACLE, **options)
    robot.connect()
    return robot


def send(robot, x, gripper=1.0):
    return robot.send_action(Action(np.array([x, -0.2, 0.55, 1, 0, 0, 0.0]), gripper))


def test_tasks_are_judged_since_begin_task():
    robot = connected(TinyEnv())
    robot.begin_task("turn_on_led", "")
    send(robot, 0.2)
    assert robot.completed() == {"turn_on_led"}
    robot.begin_task("turn_on_led", "")
    assert robot.completed() == frozenset()


def test_the_gripper_is_sent_as_one_of_two_states():
    robot = connected(TinyEnv())
    assert send(robot, 0.0, gripper=0.7).gripper == 1.0
    assert send(robot, 0.0, gripper=0.49).gripper == 0.0
    assert not robot.get_observation().gripper_open


def test_an_env_with_advance_is_stepped_without_drawing():
    class Lazy(TinyEnv):
        def step(self, action):
            raise AssertionError("drew an image that nobody asked for")

        def advance(self, action):
            TinyEnv.step(self, action)

    robot = connected(Lazy())
    send(robot, 0.2)
    assert robot.get_observation().tcp_pose[0] == pytest.approx(0.1)


def test_without_cameras_nothing_is_drawn():
    class Blind(TinyEnv):
        def camera_frames(self, t_ns):
            raise AssertionError("drew an image that nobody asked for")

    assert connected(Blind(), cameras=()).get_observation().frames == {}


def test_a_world_that_fails_is_a_robot_error_and_one_that_refuses_a_value_error():
    class Dying(TinyEnv):
        def step(self, action):
            raise RuntimeError("calvin_env: its process ended with status 1")

    robot = connected(Dying())
    with pytest.raises(RobotError, match="status 1"):
        send(robot, 0.0)
    with pytest.raises(ValueError, match="robot_obs"):
        robot.reset_world([0.0], None)


def test_disconnecting_closes_the_env():
    env = TinyEnv()
    robot = connected(env)
    robot.disconnect()
    assert env.closed


def test_unknown_camera():
    with pytest.raises(ValueError, match=r"'wrist'.*static"):
        EnvRobot(TinyEnv, cameras=("wrist",), oracle=ORACLE)


def test_stamps_come_from_the_clock():
    robot = connected(TinyEnv())
    observation = robot.get_observation()
    assert observation.t_ns == observation.frames["static"].t_ns == 7


def test_calvin_says_how_to_get_it_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENHELIX_CALVIN_ENV", str(tmp_path))
    robot = make_robot("calvin", scene="D")
    with pytest.raises(ValueError, match="calvin_env is not installed"):
        robot.connect()
