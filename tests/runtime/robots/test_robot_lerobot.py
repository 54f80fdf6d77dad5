"""openhelix.runtime.robots.lerobot: units, frames, what was really sent, and mappings that do not fit."""

from __future__ import annotations

import copy
import itertools
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from openhelix.runtime.core.clock import FakeClock
from openhelix.runtime.core.config import ConfigError, RunConfig, SafetyLimits
from openhelix.runtime.core.interfaces import Action
from openhelix.runtime.core.quaternion import from_rotation_vector
from openhelix.runtime.core.safety import Watchdog
from openhelix.runtime.robots import lerobot
from openhelix.runtime.robots.base import RobotError, make_robot
from openhelix.runtime.robots.lerobot import GripperMapping, LeRobotAdapter, rigid
from tests.fakes import PERIOD_NS
from tests.runtime.docs_code import blocks
from tests.runtime.robot_cases import (
    END_EFFECTOR_MAPPING,
    GANTRY_MAPPING,
    FakeEndEffectorLeRobot,
    FakeLeRobot,
)


def changed(mapping, **changes):
    return copy.deepcopy(mapping) | changes


def test_joint_units_and_gripper_scale():
    arm = FakeLeRobot()
    with LeRobotAdapter(GANTRY_MAPPING, arm) as robot:
        observation = robot.get_observation()
        np.testing.assert_allclose(observation.joints, [0.0, -0.2, 0.55])
        np.testing.assert_allclose(observation.tcp_pose[:3], [0.0, -0.2, 0.55])
        assert observation.gripper_width == pytest.approx(0.08)
        robot.send_action(Action(np.array([0.01, -0.2, 0.55, 0, 0, 0, 1.0]), 0.8))
    assert arm.now["j1.pos"] == pytest.approx(10.0)
    assert arm.now["gripper.pos"] == pytest.approx(80.0)


def test_the_returned_action_is_what_the_arm_made_of_it():
    with LeRobotAdapter(GANTRY_MAPPING, FakeLeRobot(max_step=30.0)) as robot:
        sent = robot.send_action(Action(np.array([1.0, -0.2, 0.55, 0, 0, 0, 1.0]), 1.0))
    assert sent.pose[0] == pytest.approx(0.03)


def test_base_frame_to_world_and_back():
    arm = FakeEndEffectorLeRobot()
    with LeRobotAdapter(END_EFFECTOR_MAPPING, arm) as robot:
        observation = robot.get_observation()
        # The base is half a turn about z at (0.1, -0.2, 0.25).
        np.testing.assert_allclose(observation.tcp_pose[:3], [-0.1, -0.2, 0.55], atol=1e-12)
        expected = from_rotation_vector((0, 0, np.pi + 0.5))
        assert abs(observation.tcp_pose[3:] @ expected) == pytest.approx(1)
        np.testing.assert_allclose(
            observation.frames["hand"].T_world_cam[:3, 3], observation.tcp_pose[:3]
        )
        before = dict(arm.now)
        robot.send_action(Action(observation.tcp_pose, 1.0))
    assert arm.now == pytest.approx(before)


def test_camera_latency_is_taken_off_the_stamp():
    mapping = copy.deepcopy(GANTRY_MAPPING)
    mapping["cameras"]["front"]["latency_s"] = 0.05
    with LeRobotAdapter(mapping, FakeLeRobot(), clock=FakeClock(10**9)) as robot:
        observation = robot.get_observation()
    assert observation.t_ns - observation.frames["front"].t_ns == 50_000_000


class Slow(FakeLeRobot):
    """Its camera takes a picture now and then, and gives the last one until the next."""

    def __init__(self, stamps: bool) -> None:
        super().__init__()
        self.front = SimpleNamespace(latest_timestamp=None)
        self.cameras = {"front": self.front}
        self.stamps = stamps
        self.take(0)

    def take(self, shade, age_s=0.0):
        self.picture = np.full((48, 64, 3), shade, np.uint8)
        self.front.latest_timestamp = time.perf_counter() - age_s if self.stamps else None

    def get_observation(self):
        return dict(self.now) | {"front": self.picture}


def test_a_camera_slower_than_the_loop_is_not_frozen():
    clock, arm = FakeClock(10**9), Slow(stamps=False)
    dog = Watchdog(SafetyLimits(), cameras=("front",))
    dog.arm(clock.now_ns())
    with LeRobotAdapter(GANTRY_MAPPING, arm, clock=clock) as robot:
        for i in range(150):  # 5 pictures per second, read at 30 Hz, by an arm at 0.5 m/s
            if i % 6 == 0:
                arm.take(i)
            now = clock.now_ns()
            frame = robot.get_observation().frames["front"]
            assert now - frame.t_ns == (i % 6) * PERIOD_NS
            dog.saw("proprioception", now, now)
            dog.saw_frame("front", frame, np.array([i / 60, 0, 0, 0, 0, 0, 1.0]), now)
            assert dog.check(now) is None
            clock.advance(PERIOD_NS)
        stops = []
        for i in range(150, 210):  # and then the camera hangs
            now = clock.now_ns()
            dog.saw("proprioception", now, now)
            frame = robot.get_observation().frames["front"]
            dog.saw_frame("front", frame, np.array([i / 60, 0, 0, 0, 0, 0, 1.0]), now)
            stops.append(dog.check(now))
            clock.advance(PERIOD_NS)
    assert stops[10] is None and stops[-1].reason == "camera_frozen"


def test_a_scene_that_stands_still_is_no_dead_camera():
    clock, arm = FakeClock(10**9), Slow(stamps=False)
    with LeRobotAdapter(GANTRY_MAPPING, arm, clock=clock) as robot:
        for _ in range(300):
            assert clock.now_ns() - robot.get_observation().frames["front"].t_ns < 0.51e9
            clock.advance(PERIOD_NS)


def test_a_cameras_own_stamp_counts_where_it_keeps_one():
    arm = Slow(stamps=True)
    with LeRobotAdapter(GANTRY_MAPPING, arm) as robot:
        arm.take(1, age_s=0.2)
        first = robot.get_observation()
        assert 0.2 <= (first.t_ns - first.frames["front"].t_ns) * 1e-9 < 60
        time.sleep(0.01)
        again = robot.get_observation()
        assert again.frames["front"] is first.frames["front"] and again.t_ns > first.t_ns
        arm.take(1)  # the same pixels, and a new picture
        assert robot.get_observation().frames["front"].t_ns >= first.frames["front"].t_ns + 0.2e9


def test_a_picture_is_ours_to_keep():
    arm = Slow(stamps=False)
    with LeRobotAdapter(GANTRY_MAPPING, arm, clock=FakeClock(10**9)) as robot:
        before = robot.get_observation().frames["front"]
        arm.picture[:] = 9  # the driver fills its buffer again
        after = robot.get_observation().frames["front"]
    assert before.rgb.max() == 0 and after.rgb.min() == 9


def test_an_uncalibrated_arm_is_refused():
    arm = FakeLeRobot(calibrated=False)
    with pytest.raises(RobotError, match="not calibrated"):
        LeRobotAdapter(GANTRY_MAPPING, arm).connect()
    assert not arm.is_connected


def test_a_broken_bus_is_a_robot_error_and_stop_still_does_not_raise():
    arm = FakeLeRobot()
    robot = LeRobotAdapter(GANTRY_MAPPING, arm)
    robot.connect()
    arm.fail = True
    with pytest.raises(RobotError, match="no answer"):
        robot.get_observation()
    with pytest.raises(RobotError, match="no answer"):
        robot.send_action(Action(np.array([0, 0, 0.5, 0, 0, 0, 1.0]), 1.0))
    robot.stop("test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"joints": ["j9.pos"]}, r"no 'j9\.pos'; the robot has j1\.pos"),
        ({"joints": ["j1.pos"]}, r"also takes j2\.pos, j3\.pos"),
        ({"joins": []}, r"mapping\.joins: Extra inputs"),
        ({"kinematics": None}, "joints together with kinematics"),
        ({"gripper": {"key": "gripper.pos", "closed": 1, "open": 1}}, "the same number"),
        ({"tcp": ["a"]}, "six keys"),
        ({"T_world_base": (2 * np.eye(4)).tolist()}, "not a rigid transform"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused_before_anything_moves(changes, message):
    with pytest.raises(ValueError, match=message):
        LeRobotAdapter(changed(GANTRY_MAPPING, **changes), FakeLeRobot())


def test_a_camera_stands_in_one_place():
    mapping = copy.deepcopy(GANTRY_MAPPING)
    mapping["cameras"]["front"]["T_tcp_cam"] = np.eye(4).tolist()
    with pytest.raises(ValueError, match="T_world_cam"):
        LeRobotAdapter(mapping, FakeLeRobot())


def test_from_configuration_alone():
    robot = make_robot(
        "lerobot",
        mapping=GANTRY_MAPPING,
        target="tests.runtime.robot_cases:FakeLeRobot",
        config={"max_step": 5.0},
    )
    robot.connect()
    sent = robot.send_action(Action(np.array([1.0, -0.2, 0.55, 0, 0, 0, 1.0]), 1.0))
    assert sent.pose[0] == pytest.approx(0.005)


def test_missing_lerobot_says_what_to_do():
    with pytest.raises(ConfigError, match="pip install lerobot"):
        make_robot("lerobot", mapping=GANTRY_MAPPING, config={"type": "koch_follower"})
    with pytest.raises(ConfigError, match=r"config: type names the arm.*robot\.options\.target"):
        make_robot("lerobot", mapping=GANTRY_MAPPING)


# An arm in a process of its own: here under this interpreter, and without LeRobot.
OUTSIDE = """
import time
import numpy as np

class Camera:
    latest_timestamp = None

class Arm:
    action_features = dict.fromkeys(("j1.pos", "j2.pos", "j3.pos", "gripper.pos"), float)
    observation_features = action_features | {"front": (48, 64, 3)}

    def __init__(self, calibrated=True, fails="", hz=5.0):
        print("noise on standard output")
        if fails == "start":
            raise OSError("no such port")
        self.is_connected, self.is_calibrated, self.fails = False, calibrated, fails
        self.now = {"j1.pos": 0.0, "j2.pos": -200.0, "j3.pos": 550.0, "gripper.pos": 100.0}
        self.cameras, self.period = {"front": Camera()}, 1 / hz
        self.cameras["front"].latest_timestamp = time.perf_counter() // self.period * self.period

    def connect(self, calibrate=True):
        assert not calibrate
        self.is_connected = True

    def disconnect(self):
        self.is_connected = False

    def get_observation(self):
        if self.fails == "read":
            raise OSError("bus: no answer")
        if self.fails == "die":
            import os
            print("segmentation fault", flush=True)
            os._exit(3)
        if self.fails == "hang":
            time.sleep(60)
        taken = time.perf_counter() // self.period * self.period
        self.cameras["front"].latest_timestamp = taken
        shade = int(taken / self.period) % 256
        return self.now | {"front": np.full((48, 64, 3), shade, np.uint8)}

    def send_action(self, action):
        for key, value in action.items():
            self.now[key] += float(np.clip(value - self.now[key], -30.0, 30.0))
        return dict(self.now)
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A way to make an arm of `OUTSIDE` under an interpreter that `python` names."""
    (tmp_path / "outside_arm.py").write_text(OUTSIDE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = []

    def make(target="outside_arm:Arm", **config):
        mapping = copy.deepcopy(GANTRY_MAPPING)
        options = {"target": target, "config": config, "python": sys.executable}
        made.append(make_robot("lerobot", mapping=mapping, **options))
        return made[-1]

    yield make
    for robot in made:
        robot._robot.close()


def test_an_arm_under_another_interpreter_moves_and_lets_go(outside):
    robot = outside()
    process = robot._robot._process
    with robot:
        before = robot.get_observation()
        np.testing.assert_allclose(before.joints, [0.0, -0.2, 0.55])
        assert before.frames["front"].rgb.shape == (48, 64, 3)
        sent = robot.send_action(Action(np.array([1.0, -0.2, 0.55, 0, 0, 0, 1.0]), 0.0))
        assert sent.pose[0] == pytest.approx(0.03) and sent.gripper == pytest.approx(0.7)
        assert robot.get_observation().tcp_pose[0] == pytest.approx(0.03)
    robot.connect()
    assert robot.get_observation().tcp_pose[0] == pytest.approx(0.03)
    robot._robot.close()
    assert process.poll() == 0  # it saw the end of the line and left


def test_a_picture_of_another_process_has_its_cameras_stamp(outside):
    """A camera slower than the loop repeats its frame, which keeps its age and is no new one."""
    with outside(hz=4.0) as robot:
        frames = []
        for _ in range(12):
            observation = robot.get_observation()
            frames.append(observation.frames["front"])
            assert frames[-1].t_ns <= observation.t_ns
            time.sleep(0.05)
    new = [b for a, b in itertools.pairwise(frames) if b is not a]
    assert new
    for a, b in itertools.pairwise(new):  # whole periods of the camera apart
        periods = (b.t_ns - a.t_ns) / 0.25e9
        assert abs(periods - round(periods)) < 0.01 and round(periods) >= 1
    with outside(hz=1e-5) as robot:  # none between two reads
        first, again = (robot.get_observation() for _ in range(2))
        assert again.t_ns > first.t_ns and again.frames["front"] is first.frames["front"]


@pytest.mark.parametrize(
    ("fails", "error", "said"),
    [
        ("read", RobotError, "lerobot: OSError: bus: no answer"),
        ("die", RobotError, r"its process ended with status 3; it last said: .*segmentation fault"),
        ("hang", RobotError, "its process did not answer within 0.5 s"),
    ],
)
def test_an_arm_that_fails_in_its_process_is_one_error(outside, monkeypatch, fails, error, said):
    monkeypatch.setattr(lerobot, "CALL_TIMEOUT_S", 0.5)
    monkeypatch.setattr(lerobot.OutsideArm._call, "__defaults__", (0.5,))
    robot = outside(fails=fails)
    robot.connect()
    with pytest.raises(error, match=said) as caught:
        robot.get_observation()
    assert "\n" not in str(caught.value)
    robot.stop("test")  # never raises
    if fails != "read":
        assert not robot.is_connected and robot._robot._process.poll() is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fails": "start"}, r"robot\.options: OSError: no such port; it is run by "),
        ({"colour": "red"}, r"TypeError: .*unexpected keyword argument 'colour'"),
        ({"target": "nowhere:Arm"}, "No module named 'nowhere'"),
    ],
)
def test_an_arm_that_cannot_be_made_is_refused_in_one_line(outside, options, said):
    with pytest.raises(ConfigError, match=said) as caught:
        outside(**options)
    assert "\n" not in str(caught.value)


def test_an_interpreter_that_is_none(monkeypatch):
    options = {"mapping": GANTRY_MAPPING, "config": {"type": "koch_follower"}}
    with pytest.raises(
        ConfigError, match=r"robot\.options\.python: '/no/python' is no interpreter"
    ):
        make_robot("lerobot", python="/no/python", **options)
    monkeypatch.setenv("OPENHELIX_LEROBOT_PYTHON", "/no/other")
    with pytest.raises(ConfigError, match="OPENHELIX_LEROBOT_PYTHON: '/no/other'"):
        make_robot("lerobot", **options)


def test_an_uncalibrated_arm_of_another_process_is_not_moved(outside):
    robot = outside(calibrated=False)
    with pytest.raises(RobotError, match="not calibrated"):
        robot.connect()
    assert not robot.is_connected


@pytest.mark.skipif(
    not os.environ.get(lerobot.PYTHON), reason=f"{lerobot.PYTHON} names no interpreter with LeRobot"
)
def test_lerobots_own_classes(monkeypatch):
    """Its configuration and its base class, in the newest release's own environment."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    options = {
        "target": "lerobot_mock:Gantry",
        "config_target": "lerobot_mock:GantryConfig",
        "mapping": GANTRY_MAPPING,
    }
    with make_robot("lerobot", config={"id": "mock", "camera_hz": 10}, **options) as robot:
        for _ in range(60):
            seen = robot.get_observation()
            assert 0 <= seen.t_ns - seen.frames["front"].t_ns < 30e9
            robot.send_action(Action(np.array([0.1, -0.2, 0.5, 0, 0, 0, 1.0]), 0.0))
        assert robot.get_observation().tcp_pose[:3] == pytest.approx([0.1, -0.2, 0.5])
        robot._robot.close()
    with pytest.raises(ConfigError, match="camera_hertz"):
        make_robot("lerobot", config={"camera_hertz": 10}, **options)
    with pytest.raises(ConfigError, match=r"'so9000' is none of .*so101_follower"):
        make_robot("lerobot", config={"type": "so9000"}, mapping=GANTRY_MAPPING)


def test_the_documented_settings_are_settings():
    (text,) = blocks("lerobot.md", "yaml")
    config = RunConfig.model_validate(yaml.safe_load(text))
    mapping = lerobot.validated(config.robot.options["mapping"])
    assert mapping.cameras["static"].device == "realsense" and len(mapping.joints) == 5


@pytest.mark.parametrize("v", [(0, 0, 0), (3.1, 0, 0), (0, 3.1, 0), (0, 0, 3.1), (1, 2, -1.5)])
def test_rigid_reads_any_rotation(v):
    from scipy.spatial.transform import Rotation

    T = np.eye(4)
    T[:3, :3] = Rotation.from_rotvec(v).as_matrix()
    _, q = rigid(T.tolist())
    assert abs(np.dot(q, Rotation.from_rotvec(v).as_quat())) == pytest.approx(1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_an_error_and_not_a_closed_gripper(bad):
    arm = FakeLeRobot()
    with LeRobotAdapter(GANTRY_MAPPING, arm) as robot:
        seen = arm.get_observation()
        for key in ("gripper.pos", "j1.pos"):
            arm.get_observation = lambda key=key: seen | {key: bad}
            with pytest.raises(RobotError, match=rf"{key} is "):
                robot.get_observation()
        del arm.get_observation
        assert robot.get_observation().gripper_width == pytest.approx(0.08)
    with pytest.raises(RobotError, match=r"gripper\.pos is "):
        GripperMapping(key="gripper.pos", closed=0, open=100).openness(bad)


@pytest.mark.parametrize("field", ["closed", "open", "width_open_m"])
def test_a_gripper_whose_ends_are_no_numbers_is_refused(field):
    gripper = GANTRY_MAPPING["gripper"] | {field: float("nan")}
    with pytest.raises(ValueError, match=rf"gripper\.{field}"):
        LeRobotAdapter(changed(GANTRY_MAPPING, gripper=gripper), FakeLeRobot())
