"""openhelix.runtime.robots.env: the wrapper's own behaviour; the rest is in the conformance suite."""

from __future__ import annotations

import numpy as np
import pytest

from openhelix.runtime.control.assembly import build_stack
from openhelix.runtime.control.plans import SyncPlanner
from openhelix.runtime.core.clock import FakeClock
from openhelix.runtime.core.config import (
    ConfigError,
    RunConfig,
    StaticCamera,
    WorldConfig,
    validate,
)
from openhelix.runtime.core.interfaces import Action, ActionChunk, PolicySpec
from openhelix.runtime.robots.base import RobotError, make_robot, world_options
from openhelix.runtime.robots.env import EnvRobot
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


class Counting(TinyEnv):
    """Counts how often its cameras are drawn."""

    drawn = 0

    def camera_frames(self, t_ns):
        self.drawn += 1
        return super().camera_frames(t_ns)


def test_frames_on_demand_are_drawn_once_and_only_when_looked_at():
    env = Counting()
    robot = connected(env, frames_on_demand=True)
    observation = robot.get_observation()
    assert set(observation.frames) == {"static", "gripper"} and env.drawn == 0
    assert observation.frames["static"].t_ns == 7
    assert observation.frames["gripper"].rgb.shape == (84, 84, 3)
    assert env.drawn == robot.renders == 1
    assert observation.frames.get("wrist") is None


def test_a_frame_that_nobody_looked_at_in_time_is_gone():
    robot = connected(Counting(), frames_on_demand=True)
    seen, unseen = robot.get_observation(), robot.get_observation()
    rgb = seen.frames["static"].rgb
    send(robot, 0.2)
    assert seen.frames["static"].rgb is rgb
    with pytest.raises(RobotError, match="moved on"):
        unseen.frames["static"]


def test_playtable_shows_an_instant_at_any_later_time():
    robot = make_robot("openhelix.runtime.robots.env:PlayTableRobot")
    robot.connect()
    early, late = robot.get_observation(), robot.get_observation()
    want = early.frames["static"]
    for _ in range(5):
        send(robot, 0.2)
    got = late.frames["static"]
    assert np.array_equal(got.rgb, want.rgb) and np.array_equal(got.depth, want.depth)
    assert not np.array_equal(robot.get_observation().frames["static"].rgb, want.rgb)
    robot.disconnect()


def test_a_loop_does_not_watch_frames_that_are_drawn_on_demand():
    env = Counting()
    robot = connected(env, frames_on_demand=True)
    spec = PolicySpec(robot.spec.cameras, None, robot.spec.action, 16)
    stack = build_stack(
        RunConfig(), robot, spec, SyncPlanner(Still(spec), 10**9), None, FakeClock(7)
    )
    stack.loop.begin("stay")
    stack.loop.tick()
    assert env.drawn == 0 and stack.loop.watchdog.cameras == ()
    robot.frames_on_demand = False
    stack = build_stack(
        RunConfig(), robot, spec, SyncPlanner(Still(spec), 10**9), None, FakeClock(7)
    )
    assert stack.loop.watchdog.cameras == ("static", "gripper")


@pytest.mark.parametrize("name", ["calvin", "playtable"])
def test_a_world_gets_the_scene_and_the_cameras_of_the_run(name):
    world = WorldConfig(scene="A", cameras=("static",), seed=5)
    options = world_options(name, {"clock": FakeClock(7)}, world)
    robot = make_robot(name, **options)
    assert [camera.name for camera in robot.spec.cameras] == ["static"]
    assert options["scene"] == "A"
    assert options.get("seed") == (5 if name == "playtable" else None)
    assert world_options(name, {"scene": "A", "cameras": ["static"]}, world)
    for field, value in (("scene", "B"), ("cameras", ["gripper"])):
        with pytest.raises(ConfigError, match=rf"robot\.options\.{field}: .*world\.{field}"):
            world_options(name, {field: value}, world)


def test_a_robot_without_scenes_keeps_its_own_cameras():
    options = {"cameras": {"wrist": (10, 20)}}
    world = WorldConfig(scene="A", cameras=("static",))
    assert world_options("fake", options, world) == options


class Still:
    """A policy that never looks."""

    def __init__(self, spec):
        self.spec = spec

    def reset(self, seed=None): ...

    def act(self, observation, latents):
        poses = np.tile(observation.tcp_pose, (16, 1))
        return ActionChunk(
            observation.t_ns + 1, 33_333_333, poses, np.ones(16), observation.instruction_id
        )


def test_the_static_camera_stands_where_the_run_says():
    eye, target = (1.0, -1.0, 1.5), (0.0, 0.0, 0.4)
    world = WorldConfig(static_camera=StaticCamera(eye=eye, target=target, fov=30))
    with make_robot("playtable", **world_options("playtable", {}, world)) as robot:
        frame = robot.get_observation().frames["static"]
        np.testing.assert_allclose(frame.T_world_cam[:3, 3], eye)
        ahead = frame.T_world_cam[:3, 2]
        np.testing.assert_allclose(np.cross(ahead, np.subtract(target, eye)), 0, atol=1e-9)
        assert frame.K[0, 0] == pytest.approx(100 / np.tan(np.radians(15)))
        # What it sees is where it says: the middle of its image is the point it looks at.
        middle = frame.depth[100, 100]
        seen = np.add(eye, ahead * middle)
        assert np.linalg.norm(seen - target) < 0.15
    with pytest.raises(ConfigError, match=r"world\.static_camera: 'calvin' has its own"):
        world_options("calvin", {}, world)
    assert world_options("fake", {}, world) == {}


@pytest.mark.parametrize(
    ("camera", "why"),
    [
        ({"eye": (0, 0, 1), "target": (0, 0, 1)}, "where the target is"),
        ({"up": (0, 0, 0)}, "is no direction"),
        ({"fov": 180}, "less than 120"),
        ({"eyes": (0, 0, 1)}, "unknown key; did you mean 'eye'"),
    ],
)
def test_a_camera_that_cannot_be_is_refused_in_one_line(camera, why):
    with pytest.raises(ConfigError, match=why) as caught:
        validate(WorldConfig, {"static_camera": camera})
    assert str(caught.value).startswith("static_camera") and "\n" not in str(caught.value)
