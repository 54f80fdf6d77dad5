"""openhelix.runtime.robots.fake and the registry: what breaks on request, and geometry that agrees."""

from __future__ import annotations

import numpy as np
import pytest

from openhelix.runtime.core.clock import FakeClock
from openhelix.runtime.core.interfaces import Action
from openhelix.runtime.core.plugins import ROBOTS, ResolveError, entries
from openhelix.runtime.robots.base import (
    NotConnected,
    Robot,
    RobotError,
    World,
    make_robot,
)
from openhelix.runtime.robots.fake import TABLE_Z_M, FakeRobot

PERIOD = 1_000_000_000 // 30


def fake(**options):
    clock = FakeClock()
    robot = FakeRobot(clock=clock, **options)
    robot.connect()
    return robot, clock


def drive(robot, clock, xyz, ticks):
    pose = np.array([*xyz, 1.0, 0, 0, 0])
    seen = []
    for _ in range(ticks):
        robot.send_action(Action(pose, 1.0))
        clock.advance(PERIOD)
        seen.append(robot.get_observation())
    return seen


def test_the_arm_follows_its_target_as_a_lag_and_the_same_every_time():
    def run():
        robot, clock = fake(lag_s=0.1)
        return np.array([o.tcp_pose for o in drive(robot, clock, (0.1, -0.2, 0.55), 30)])

    first, second = run(), run()
    np.testing.assert_array_equal(first, second)
    assert first[0, 0] == pytest.approx(0.1 * (1 - np.exp(-1 / 3)), rel=1e-6)
    assert first[-1, 0] == pytest.approx(0.1, abs=1e-3)


def test_stop_ends_the_motion_where_it_is():
    robot, clock = fake()
    moving = drive(robot, clock, (0.3, -0.2, 0.55), 2)[-1]
    robot.stop("test")
    clock.advance(10 * PERIOD)
    np.testing.assert_allclose(robot.get_observation().tcp_pose, moving.tcp_pose)
    assert robot.stops == ["test"]


def test_a_camera_frozen_by_stamp_repeats_its_last_frame():
    robot, clock = fake()
    last = drive(robot, clock, (0.1, -0.2, 0.55), 3)[-1].frames["static"]
    robot.freeze_camera("static")
    seen = drive(robot, clock, (-0.1, -0.2, 0.55), 5)
    assert all(o.frames["static"].t_ns == last.t_ns for o in seen)
    assert seen[-1].frames["gripper"].t_ns > last.t_ns
    robot.thaw_camera("static")
    assert drive(robot, clock, (0, -0.2, 0.55), 1)[0].frames["static"].t_ns > last.t_ns


def test_a_camera_frozen_by_pixels_goes_on_stamping():
    robot, clock = fake()
    drive(robot, clock, (0.1, -0.2, 0.55), 3)
    robot.freeze_camera("static", "pixels")
    a, b = drive(robot, clock, (-0.1, -0.2, 0.55), 2)
    assert b.frames["static"].t_ns > a.frames["static"].t_ns
    np.testing.assert_array_equal(a.frames["static"].rgb, b.frames["static"].rgb)
    assert not np.array_equal(a.frames["gripper"].rgb, b.frames["gripper"].rgb)


def test_a_delayed_camera_shows_and_states_the_past():
    robot, clock = fake(camera_delay_s=0.1)
    observation = drive(robot, clock, (0.1, -0.2, 0.55), 10)[-1]
    age_s = (observation.t_ns - observation.frames["static"].t_ns) * 1e-9
    assert 0.1 <= age_s < 0.14


def test_a_slow_camera_keeps_its_frame():
    robot, clock = fake(camera_hz=10)
    stamps = {o.frames["static"].t_ns for o in drive(robot, clock, (0.1, -0.2, 0.55), 30)}
    assert 10 <= len(stamps) <= 11


def test_pixels_depth_and_matrices_agree_with_the_hand():
    robot, clock = fake()
    observation = drive(robot, clock, (0.05, -0.15, 0.6), 60)[-1]
    frame = observation.frames["static"]
    hand = np.linalg.inv(frame.T_world_cam) @ [*observation.tcp_pose[:3], 1]
    u, v, _ = frame.K @ hand[:3] / hand[2]
    assert frame.rgb[int(v), int(u), 0] == 255
    assert frame.depth[int(v), int(u)] == pytest.approx(hand[2], abs=1e-6)
    corner = np.linalg.inv(frame.K) @ [0.5, 0.5, 1] * frame.depth[0, 0]
    assert (frame.T_world_cam @ [*corner, 1])[2] == pytest.approx(TABLE_Z_M)


def test_failures_come_when_asked_for():
    robot, _ = fake(fail_observe_at=1, fail_send_at=0)
    robot.get_observation()
    with pytest.raises(RobotError, match="get_observation"):
        robot.get_observation()
    with pytest.raises(RobotError, match="send_action"):
        robot.send_action(robot.hold_action(None))


def test_as_a_world_places_are_tasks():
    robot, clock = fake(goals={"reach_left": (-0.1, -0.2, 0.55)})
    assert isinstance(robot, World)
    robot.reset_world([0.2, -0.2, 0.55, np.pi, 0, 0, 0.08, *[0] * 7, 1], None)
    robot.begin_task("reach_left", "go left")
    assert robot.completed() == frozenset()
    drive(robot, clock, (-0.1, -0.2, 0.55), 30)
    assert robot.completed() == {"reach_left"}
    assert robot.env_steps() == 30
    robot.begin_task("reach_left", "again")  # it is there already: nothing was done
    assert robot.completed() == frozenset()
    with pytest.raises(ValueError, match="robot_obs"):
        robot.reset_world([0.0] * 3, None)


def test_registry_knows_the_installed_drivers():
    assert {"sim", "calvin", "fake", "lerobot"} <= set(entries(ROBOTS))
    assert isinstance(make_robot("fake", hz=20.0), FakeRobot)
    assert make_robot("openhelix.runtime.robots.fake:FakeRobot").spec.action.hz == 30.0


def test_registry_errors_name_what_is_valid():
    with pytest.raises(ResolveError, match=r"no robot 'sawyer'; valid: .*fake"):
        make_robot("sawyer")
    with pytest.raises(ValueError, match=r"robot\.options\.colour.*lag_s"):
        make_robot("fake", colour="red")
    with pytest.raises(ValueError, match=r"robot\.options\.lag_s"):
        make_robot("fake", lag_s=0.0)
    with pytest.raises(ResolveError, match="nowhere"):
        make_robot("nowhere:Robot")
    with pytest.raises(ValueError, match="not a Robot"):
        make_robot("openhelix.runtime.core.clock:FakeClock")


def test_features_can_be_read_while_disconnected():
    robot = FakeRobot()
    assert robot.observation_features["static.rgb"] == (200, 200, 3)
    assert robot.action_features == {"pose": (7,), "gripper": float}
    with pytest.raises(NotConnected):
        robot.get_observation()


def test_a_with_block_disconnects_and_stops():
    with FakeRobot() as robot:
        assert isinstance(robot, Robot)
        assert robot.is_connected
    assert not robot.is_connected
    assert robot.stops == ["disconnect"]


@pytest.mark.parametrize("camera_hz", [0.5, 2, 5, 7, 10, 15, 29, 30, 60])
def test_a_camera_gives_as_many_frames_as_it_says_and_as_the_loop_can_see(camera_hz):
    robot, clock = fake(camera_hz=camera_hz)
    seconds, stamps = 20, set()
    for tick in range(1, 30 * seconds + 1):
        clock.advance(round(tick * 1e9 / 30) - round((tick - 1) * 1e9 / 30))
        stamps.add(robot.get_observation().frames["static"].t_ns)
    assert len(stamps) == pytest.approx(seconds * min(camera_hz, 30), abs=1)
