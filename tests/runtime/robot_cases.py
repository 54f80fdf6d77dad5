"""Drivers that can run here, each with a world of its own and a way to let time pass."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from openhelix.runtime.core.clock import FakeClock
from openhelix.runtime.core.interfaces import CameraFrame
from openhelix.runtime.core.plugins import resolve
from openhelix.runtime.core.quaternion import IDENTITY, from_rotation_vector, rotation_vector
from openhelix.runtime.robots.base import Robot, make_robot
from openhelix.runtime.robots.env import CalvinRobot, EnvRobot, PlayTableRobot
from openhelix.runtime.robots.fake import FakeRobot
from openhelix.runtime.robots.lerobot import LeRobotAdapter
from openhelix.runtime.robots.sim import SimRobot
from openhelix.runtime.transport.rpc import RpcServer
from tests.runtime.docs_code import module

PERIOD_NS = 1_000_000_000 // 30


@dataclass
class Case:
    """A disconnected robot; `tick` lets one control period pass."""

    robot: Robot
    tick: Callable[[], None]


class TinyEnv:
    """A world with calvin_env's contract and no physics: the arm lags, one block lies there."""

    def __init__(self):
        self.closed = False
        self.reset()

    def reset(self, robot_obs=None, scene_obs=None):
        if robot_obs is not None and len(robot_obs) != 15:
            raise ValueError(f"robot_obs: {len(robot_obs)} numbers, expected 15")
        start = [0.0, -0.2, 0.55] if robot_obs is None else list(robot_obs[:3])
        self.position, self.euler = np.array(start, float), np.array([np.pi, 0.0, 0.3])
        self.gripper, self.light = 1.0, 0
        return {}

    def step(self, action):
        position, _, gripper = action
        if gripper not in (1, -1):
            raise ValueError(f"gripper: {gripper} is neither 1 nor -1")
        self.position += 0.5 * (np.array(position) - self.position)
        self.gripper = float(gripper)
        self.light = int(self.position[0] > 0.05)
        return {}, 0, False, self.get_info()

    def get_info(self):
        return {
            "robot_info": {
                "tcp_pos": tuple(self.position),
                "tcp_orn": tuple(self.euler),
                "gripper_opening_width": 0.08 if self.gripper > 0 else 0.0,
                "arm_joint_states": [0.0] * 7,
                "gripper_action": self.gripper,
                "uid": 0,
                "contacts": (),
            },
            "light": self.light,
        }

    def camera_frames(self, t_ns):
        shade = int(self.position[0] * 1000) % 256
        return {
            name: CameraFrame(
                t_ns,
                np.full((size, size, 3), shade, np.uint8),
                np.ones((size, size), np.float32),
                np.eye(3),
                np.eye(4),
            )
            for name, size in (("static", 200), ("gripper", 84))
        }

    def close(self):
        self.closed = True


def tiny_oracle(start, end):
    """The light went on."""
    return {"turn_on_led"} if (start["light"], end["light"]) == (0, 1) else set()


_noise = np.random.default_rng(0)


def picture(height, width, shade):
    """What a camera gives: never the same pixels twice."""
    return (shade + _noise.integers(0, 3, (height, width, 3))).astype(np.uint8)


class FakeLeRobot:
    """An arm with LeRobot's interface: flat dictionaries, its own units, a clipped step."""

    observation_features = {  # noqa: RUF012
        "j1.pos": float,
        "j2.pos": float,
        "j3.pos": float,
        "gripper.pos": float,
        "front": (48, 64, 3),
    }
    action_features = {key: float for key in ("j1.pos", "j2.pos", "j3.pos", "gripper.pos")}  # noqa: RUF012

    def __init__(self, calibrated=True, max_step=30.0):
        self.is_connected, self.is_calibrated, self.max_step = False, calibrated, max_step
        self.now = {"j1.pos": 0.0, "j2.pos": -200.0, "j3.pos": 550.0, "gripper.pos": 100.0}
        self.fail = False

    def connect(self, calibrate=True):
        assert not calibrate, "calibration moves the arm by hand"
        self.is_connected = True

    def disconnect(self):
        self.is_connected = False

    def get_observation(self):
        if self.fail:
            raise OSError("bus: no answer")
        return dict(self.now) | {"front": picture(48, 64, int(self.now["j1.pos"]))}

    def send_action(self, action):
        if self.fail:
            raise OSError("bus: no answer")
        for key, value in action.items():
            step = np.clip(value - self.now[key], -self.max_step, self.max_step)
            self.now[key] = float(self.now[key] + step)
        return dict(self.now)


class Gantry:
    """Kinematics of an arm whose three joints are x, y and z ("radians" for metres)."""

    def forward(self, joints):
        return np.array([*joints, 0.0, 0.0, 0.0, 1.0])

    def inverse(self, pose, joints):
        return np.asarray(pose[:3])


GANTRY_MAPPING = {
    "joints": ["j1.pos", "j2.pos", "j3.pos"],
    "joint_unit_rad": 0.001,
    "kinematics": "tests.runtime.robot_cases:Gantry",
    "gripper": {"key": "gripper.pos", "closed": 0, "open": 100},
    "cameras": {
        "front": {
            "key": "front",
            "height": 48,
            "width": 64,
            "K": np.eye(3).tolist(),
            "T_world_cam": np.eye(4).tolist(),
        }
    },
}


class FakeEndEffectorLeRobot:
    """An arm that takes TCP targets (xyz, rotation vector) in its base frame."""

    keys = ("ee.x", "ee.y", "ee.z", "ee.wx", "ee.wy", "ee.wz", "gripper.pos")

    def __init__(self):
        self.is_connected, self.is_calibrated = False, True
        self.observation_features = dict.fromkeys(self.keys, float) | {"hand": (32, 32, 3)}
        self.action_features = dict.fromkeys(self.keys, float)
        self.now = dict(zip(self.keys, (0.2, 0.0, 0.3, 0.0, 0.0, 0.5, 1.0), strict=True))

    def connect(self, calibrate=True):
        self.is_connected = True

    def disconnect(self):
        self.is_connected = False

    def get_observation(self):
        return dict(self.now) | {"hand": picture(32, 32, 0)}

    def send_action(self, action):
        v = [self.now[k] for k in self.keys[3:6]]
        target = [action.get(k, self.now[k]) for k in self.keys]
        q = from_rotation_vector(target[3:6])
        self.now = dict(zip(self.keys, target, strict=True))
        assert len(v) == len(rotation_vector(IDENTITY, q))


HALF_TURN = [[-1, 0, 0, 0.1], [0, -1, 0, -0.2], [0, 0, 1, 0.25], [0, 0, 0, 1]]
END_EFFECTOR_MAPPING = {
    "tcp": list(FakeEndEffectorLeRobot.keys[:6]),
    "gripper": {"key": "gripper.pos", "closed": 0, "open": 1},
    "T_world_base": HALF_TURN,
    "cameras": {
        "hand": {
            "key": "hand",
            "height": 32,
            "width": 32,
            "K": np.eye(3).tolist(),
            "T_tcp_cam": np.eye(4).tolist(),
        }
    },
}


@contextmanager
def stepped(make: Callable[[FakeClock], Robot]) -> Iterator[Case]:
    """A robot whose time passes only when told to."""
    clock = FakeClock()
    robot = make(clock)
    try:
        yield Case(robot, lambda: clock.advance(PERIOD_NS))
    finally:
        robot.disconnect()


def fake():
    return stepped(lambda clock: FakeRobot(clock=clock))


def env():
    oracle = "tests.runtime.robot_cases:tiny_oracle"
    return stepped(lambda clock: EnvRobot(TinyEnv, clock=clock, oracle=oracle))


def lerobot_joints():
    return stepped(lambda clock: LeRobotAdapter(GANTRY_MAPPING, FakeLeRobot(), clock=clock))


def lerobot_end_effector():
    return stepped(
        lambda clock: LeRobotAdapter(END_EFFECTOR_MAPPING, FakeEndEffectorLeRobot(), clock=clock)
    )


def playtable():
    if find_spec("pybullet") is None:
        pytest.skip("pybullet is not installed")
    return stepped(lambda clock: PlayTableRobot(clock=clock))


def calvin():
    from openhelix.benchmarks.calvin.calvin_env import is_installed

    if not is_installed():
        pytest.skip("calvin_env is not installed; `openhelix doctor` says how to get it")
    return stepped(lambda clock: CalvinRobot(clock=clock))


class SimHost:
    """PlayTable's world and camera nodes, in threads instead of processes."""

    def __init__(self, folder):
        host = "openhelix.benchmarks.calvin.world_process"
        names = ("actions", "states", "frames", "world_control")
        self.ends = {name: f"ipc://{folder}/{name}" for name in names}
        ends = self.ends
        world = resolve(f"{host}:WorldProcess")("D", ends["actions"], ends["states"])
        camera = resolve(f"{host}:CameraProcess")(
            "D", ("static", "gripper"), 30.0, ends["states"], ends["frames"]
        )
        self.stop = threading.Event()
        self.nodes, self.threads = (world, camera), []
        for node in self.nodes:
            node.setup()
            self.threads.append(threading.Thread(target=node.run, args=(self.stop,), daemon=True))
        handlers = world.handlers()
        self.rpc = RpcServer(
            ends["world_control"], {"ask": lambda told: handlers[told["question"]](told)}
        )
        self.rpc.start()
        for thread in self.threads:
            thread.start()

    def close(self):
        self.rpc.close()
        self.stop.set()
        for thread, node in zip(self.threads, self.nodes, strict=True):
            thread.join(5.0)
            node.close()


@contextmanager
def sim():
    if find_spec("pybullet") is None:
        pytest.skip("pybullet is not installed")
    with TemporaryDirectory() as folder:
        host = SimHost(folder)
        robot = SimRobot(**host.ends)

        def tick():
            """Wait until the world has stepped and its cameras have seen it."""
            begun_ns = time.monotonic_ns()
            while time.monotonic_ns() < begun_ns + 60_000_000_000:
                time.sleep(0.005)
                seen = robot.get_observation()
                stamps = [seen.t_ns, *(frame.t_ns for frame in seen.frames.values())]
                if min(stamps) > begun_ns:
                    return
            raise AssertionError("the world stands still")

        try:
            yield Case(robot, tick)
        finally:
            robot.disconnect()
            host.close()


def documented():
    """The driver that docs/add-a-robot.md shows."""
    page = module("add-a-robot.md", "my_arm")
    return stepped(lambda clock: page.TableArm(clock=clock))


@contextmanager
def named():
    """The driver that a person wants to have checked, on its own clock."""
    options = json.loads(os.environ.get("OPENHELIX_ROBOT_OPTIONS", "{}"))
    robot = make_robot(os.environ["OPENHELIX_ROBOT"], **options)
    try:
        yield Case(robot, lambda: time.sleep(PERIOD_NS * 1e-9))
    finally:
        robot.disconnect()


CASES = {
    "fake": fake,
    "env": env,
    "lerobot-joints": lerobot_joints,
    "lerobot-end-effector": lerobot_end_effector,
    "playtable": playtable,
    "sim": sim,
    "calvin": calvin,
    "documented": documented,
}
if "OPENHELIX_ROBOT" in os.environ:
    CASES = {"named": named}
