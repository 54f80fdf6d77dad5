"""The calvin driver: against a made-up calvin_env always, against the real one where it is."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from openhelix.benchmarks.calvin import calvin_env as calvin
from openhelix.benchmarks.calvin.calvin_env import CalvinEnv, CalvinError, CalvinUnusableError
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.tasks import TASK_NAMES, completed
from openhelix.benchmarks.evaluation.staging import stage, stage_calvin
from openhelix.benchmarks.evaluation.suites import Suite
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.robots import pipe
from openhelix.runtime.robots.env import CalvinRobot, PlayTableRobot

# A package that stands in for hydra and, through it, for calvin_env: it counts steps, says
# back what it was given, and fails on request.
FAKE_HYDRA = """
import contextlib, os, time
import numpy as np

print("noise on standard output")

@contextlib.contextmanager
def initialize_config_dir(path, version_base):
    assert path.endswith("conf")
    yield

def compose(name, overrides):
    if os.environ.get("FAKE_FAILS"):
        raise RuntimeError("no such thing as a play table")
    class Config:
        env = overrides
    return Config

class Camera:
    name, fov, height, width = "static", 90, 4, 6
    viewMatrix = (1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, -1, -2, -3, 1)

class Env:
    def __init__(self, overrides):
        self.overrides, self.count, self.last = overrides, 0, None
        self.cameras = [Camera] if "~cameras.static" not in overrides else []
    def get_obs(self):
        rgb = {f"rgb_{c.name}": np.full((4, 6, 3), self.count, np.uint8) for c in self.cameras}
        depth = {f"depth_{c.name}": np.full((4, 6), 0.5, np.float32) for c in self.cameras}
        return {"rgb_obs": rgb, "depth_obs": depth,
                "robot_obs": np.arange(15.0) / 3, "scene_obs": np.arange(24.0) / 7}
    def get_info(self):
        contact = (0, 1, 2, -1, 3, (0.1, 0.2, 0.3), 1e-17)
        return {"robot_info": {"uid": 0, "arm_joint_states": [0.1] * 7, "contacts": (contact,),
                               "tcp_pos": (1.0, 2.0, 3.0), "gripper_action": np.int64(1)},
                "scene_info": {"said": repr(self.last), "doors": {"d": {"current_state": 0.25}},
                               "movable_objects": self.blocks(contact)}}
    def blocks(self, contact):  # one of them hangs free right after a reset from its state
        hangs = self.count == 0 and self.last == (False, False)
        return {"red": {"contacts": (contact,)}, "pink": {"contacts": () if hangs else (contact,)}}
    def reset(self, robot_obs=None, scene_obs=None):
        self.count, self.last = 0, (robot_obs is None, scene_obs is None)
        return self.get_obs()
    def step(self, action):
        self.count, self.last = self.count + 1, action
        if not isinstance(action, (np.ndarray, dict)) and action[0][0] == 99.0:
            raise KeyError("unreachable")
        if not isinstance(action, (np.ndarray, dict)) and action[0][0] == 98.0:
            os._exit(7)
        if not isinstance(action, (np.ndarray, dict)) and action[0][0] == 97.0:
            time.sleep(60)
        return self.get_obs(), 0, False, self.get_info()

class utils:
    @staticmethod
    def instantiate(overrides, **settings):
        assert settings["use_egl"] is False
        return Env(overrides)
"""
OPEN = [0.0] * 6 + [1.0]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    checkout = tmp_path / "checkout"
    (checkout / "calvin_env").mkdir(parents=True)
    (checkout / "calvin_env" / "__init__.py").touch()
    (checkout / ".git").mkdir()
    (checkout / "hydra.py").write_text(FAKE_HYDRA)
    monkeypatch.setenv("OPENHELIX_CALVIN_ENV", str(checkout))
    monkeypatch.setenv("OPENHELIX_CALVIN_PYTHON", sys.executable)
    return checkout


@pytest.fixture
def env(fake: Path) -> Iterator[CalvinEnv]:
    with CalvinEnv(cameras=("static",)) as made:
        yield made


def is_gone(pid: int) -> bool:
    """Whether the process was reaped; a zombie still answers."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_everything_survives_the_wire(env: CalvinEnv) -> None:
    obs = env.reset()
    np.testing.assert_array_equal(obs["robot_obs"], np.arange(15.0) / 3)
    np.testing.assert_array_equal(obs["scene_obs"], np.arange(24.0) / 7)
    assert obs["rgb_obs"]["rgb_static"].shape == (4, 6, 3)
    assert obs["rgb_obs"]["rgb_static"].dtype == np.uint8
    assert obs["depth_obs"]["depth_static"].dtype == np.float32
    obs, reward, done, info = env.step(OPEN)
    assert (reward, done) == (0, False)
    assert (obs["rgb_obs"]["rgb_static"] == 1).all()
    robot = info["robot_info"]
    assert robot["contacts"] == ((0, 1, 2, -1, 3, (0.1, 0.2, 0.3), 1e-17),)
    assert robot["tcp_pos"] == (1.0, 2.0, 3.0)
    assert robot["arm_joint_states"] == [0.1] * 7
    assert info["scene_info"]["doors"]["d"]["current_state"] == 0.25
    assert env.get_info() == info


def test_actions_arrive_in_calvins_own_forms(env: CalvinEnv) -> None:
    said = []
    for action in (
        [0.5, 0, 0, 0, 0, -1, -1],
        ((0.1, 0.2, 0.3), (3.0, 0.0, 1.5), 1),
        ((0.1, 0.2, 0.3), (1.0, 0.0, 0.0, 0.0), -1),
        {"type": "joint_abs", "action": [0.1] * 7 + [1]},
    ):
        said.append(env.step(action)[3]["scene_info"]["said"])
    assert said[0] == "array([ 0.5,  0. ,  0. ,  0. ,  0. , -1. , -1. ])"
    assert said[1] == "((0.1, 0.2, 0.3), (3.0, 0.0, 1.5), 1)"
    assert said[2] == "((0.1, 0.2, 0.3), (1.0, 0.0, 0.0, 0.0), -1)"
    assert said[3] == "{'type': 'joint_abs', 'action': [" + "0.1, " * 7 + "1]}"


def test_advance_steps_without_drawing(env: CalvinEnv) -> None:
    env.advance(OPEN)
    assert env.get_info()["scene_info"]["said"].startswith("array")
    assert (env.get_obs()["rgb_obs"]["rgb_static"] == 1).all()  # the cameras are back
    with pytest.raises(CalvinError, match="unreachable"):
        env.advance(((99.0, 0, 0), (0, 0, 0), 1))
    assert (env.get_obs()["rgb_obs"]["rgb_static"] == 2).all()


def test_a_block_that_hangs_free_lands_before_an_episode_begins(fake: Path) -> None:
    robot = CalvinRobot(cameras=())
    robot.connect()
    try:
        env = robot._env
        robot.reset_world(np.zeros(15), np.zeros(24))
        robot.begin_task("push_red_block_left", "")
        start = robot._start_info["scene_info"]
        assert start["movable_objects"]["pink"]["contacts"]
        assert start["said"] == "array([0., 0., 0., 0., 0., 0., 1.])"  # one step that holds
        assert robot.env_steps() == 0
        robot.prepare_world(lambda env: env.reset())  # nothing hangs: calvin_env's own start
        assert env.get_info()["scene_info"]["said"] == "(True, True)"
    finally:
        robot.disconnect()


def test_frames_carry_their_geometry(env: CalvinEnv) -> None:
    frame = env.camera_frames(5)["static"]
    assert frame.t_ns == 5
    np.testing.assert_allclose(frame.K, [[2, 0, 3.5], [0, 2, 1.5], [0, 0, 1]])
    # an unrotated OpenGL camera at (1, 2, 3) looks down -z
    np.testing.assert_allclose(frame.T_world_cam[:3, 3], [1, 2, 3])
    np.testing.assert_allclose(frame.T_world_cam[:3, :3], np.diag([1, -1, -1]), atol=1e-12)


def test_no_cameras_draws_nothing(fake: Path) -> None:
    with CalvinEnv(cameras=()) as env:
        assert env.reset()["rgb_obs"] == {}


def test_close_is_safe_and_leaves_no_process(env: CalvinEnv) -> None:
    pid = env._process.pid
    env.close()
    env.close()
    assert is_gone(pid)
    with pytest.raises(CalvinError, match="closed"):
        env.step(OPEN)


def test_forgetting_the_env_ends_the_process(fake: Path) -> None:
    env = CalvinEnv(cameras=())
    pid = env._process.pid
    del env
    assert is_gone(pid)


def test_an_error_in_calvin_is_told_and_survived(env: CalvinEnv) -> None:
    with pytest.raises(CalvinError, match="KeyError: 'unreachable'"):
        env.step(((99.0, 0, 0), (0, 0, 0), 1))
    assert (env.step(OPEN)[0]["rgb_obs"]["rgb_static"] == 2).all()


def test_a_dying_process_is_one_clear_error(env: CalvinEnv) -> None:
    pid = env._process.pid
    with pytest.raises(CalvinError, match=r"status 7; it last said: .*noise"):
        env.step(((98.0, 0, 0), (0, 0, 0), 1))
    assert is_gone(pid)
    env.close()


def test_a_killed_process_is_one_clear_error(env: CalvinEnv) -> None:
    os.kill(env._process.pid, signal.SIGKILL)
    with pytest.raises(CalvinError, match="status -9"):
        env.get_obs()


def test_a_hanging_process_is_ended(env: CalvinEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calvin, "CALL_TIMEOUT_S", 0.3)
    pid, start = env._process.pid, time.monotonic()
    with pytest.raises(CalvinError, match=r"did not answer within 0\.3 s"):
        env.step(((97.0, 0, 0), (0, 0, 0), 1))
    assert is_gone(pid)
    assert time.monotonic() - start < 30


def test_a_calvin_that_does_not_start(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAILS", "1")
    with pytest.raises(CalvinUnusableError, match="no such thing as a play table"):
        CalvinEnv()
    (fake / "hydra.py").write_text("import a_package_that_is_not_there")
    with pytest.raises(CalvinUnusableError, match="a_package_that_is_not_there") as caught:
        CalvinRobot().connect()
    assert isinstance(caught.value, ConfigError)  # refused at once, never a failed episode
    assert str(caught.value).startswith("world: ")


def test_bad_input_is_refused_before_it_is_sent(env: CalvinEnv) -> None:
    env.step(OPEN)
    for action, field in (
        ([0.0] * 6, "action"),
        ([*[0.0] * 6, 0.5], "gripper"),
        ([np.nan, *[0.0] * 5, 1], "NaN"),
        ({"type": "fly", "action": OPEN}, "action.type"),
    ):
        with pytest.raises(ValueError, match=field):
            env.step(action)
    with pytest.raises(ValueError, match="scene_obs: shape"):
        env.reset(scene_obs=np.zeros(5))
    with pytest.raises(ValueError, match=r"robot_obs: .*finite"):
        env.reset(robot_obs=np.full(15, np.nan))
    assert (env.get_obs()["rgb_obs"]["rgb_static"] == 1).all()
    with pytest.raises(ValueError, match="scene: "):
        CalvinEnv("E")
    with pytest.raises(ValueError, match="cameras: 'top'"):
        CalvinEnv(cameras=("top",))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("checkout", "no checkout at"),
        ("git", "not inside a git repository"),
        ("python", "OPENHELIX_CALVIN_PYTHON is"),
    ],
)
def test_what_is_missing_is_named(
    change: str, what: str, fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if change == "checkout":
        monkeypatch.setenv("OPENHELIX_CALVIN_ENV", str(fake / "nowhere"))
    elif change == "git":
        (fake / ".git").rmdir()
    else:
        monkeypatch.setenv("OPENHELIX_CALVIN_PYTHON", str(fake / "nowhere"))
    assert not calvin.is_installed()
    with pytest.raises(CalvinUnusableError, match=what) as caught:
        CalvinEnv()
    assert "git clone" in str(caught.value)
    assert "hydra-core" in str(caught.value)


LEAF = st.one_of(
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.booleans(),
    st.none(),
    hnp.arrays(
        st.sampled_from([np.float64, np.float32, np.uint8, np.int64]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
)


@settings(max_examples=50)
@given(st.recursive(LEAF, lambda kids: st.lists(kids) | st.dictionaries(st.text(), kids)))
def test_pack_and_unpack_are_inverse(tree: object) -> None:
    data = pipe.pack(tree)
    header, body = pipe.PREFIX.unpack(data[: pipe.PREFIX.size])
    rest = data[pipe.PREFIX.size :]
    assert len(rest) == header + body
    np.testing.assert_equal(pipe.unpack(rest[:header], rest[header:]), tree)


@pytest.mark.slow
@pytest.mark.skipif(not calvin.is_installed(), reason="calvin_env is not installed")
def test_the_real_calvin_env() -> None:
    from openhelix.benchmarks.calvin.sequences import get_sequences, initial_state

    with CalvinEnv(cameras=()) as env:
        obs = env.reset(*initial_state(get_sequences(1)[0][0]))
        assert obs["scene_obs"].shape == (24,)
        start = env.get_info()
        assert completed(start, start) == set()
        for _ in range(5):
            obs, _, _, info = env.step([0, 0, 1, 0, 0, 0, 1])
        assert obs["robot_obs"][2] > start["robot_info"]["tcp_pos"][2] + 0.05
        assert completed(start, info) == set()


def touching(info: dict[str, Any]) -> dict[str, set[tuple[str, int | None]]]:
    """What each block touches: the table's links by number, the arm as a whole, other blocks."""
    scene = info["scene_info"]
    table, robot = scene["fixed_objects"]["table"]["uid"], info["robot_info"]["uid"]
    names = {block["uid"]: name for name, block in scene["movable_objects"].items()}
    names |= {table: "table", robot: "robot"}
    return {
        name: {(names[c[2]], c[4] if c[2] == table else None) for c in block["contacts"]}
        for name, block in scene["movable_objects"].items()
    }


@pytest.mark.slow
@pytest.mark.skipif(not calvin.is_installed(), reason="calvin_env is not installed")
def test_blocks_that_had_settled_touch_the_table_at_the_start() -> None:
    with PlayTableEnv("D", cameras=()) as model:
        robot_obs, scene_obs = model.get_state_obs().values()
    # Where pink had come to rest once, a few micrometres above the table.
    scene_obs[18:] = 0.0638717, -0.1061085, 0.4600033, -1.8e-6, 8e-7, -0.4601565
    robot = CalvinRobot("D", cameras=())
    robot.connect()
    try:
        robot.reset_world(robot_obs, scene_obs)
        assert touching(robot._start_info)["block_pink"] == {("table", -1)}
    finally:
        robot.disconnect()


@pytest.mark.slow
@pytest.mark.skipif(not calvin.is_installed(), reason="calvin_env is not installed")
@pytest.mark.parametrize("task", TASK_NAMES)
def test_both_worlds_begin_with_the_same_contacts(task: str) -> None:
    episode = next(e for e in Suite("tasks", count=1, seed=11, tasks=(task,)).episodes())
    ours, theirs = PlayTableRobot("D", cameras=()), CalvinRobot("D", cameras=())
    for robot, prepare in ((ours, stage), (theirs, stage_calvin)):
        robot.connect()
        try:
            robot.prepare_world(partial(prepare, episode=episode))
        finally:
            robot.disconnect()
    start, expected = touching(theirs._start_info), touching(ours._start_info)
    if not task.startswith(("place_", "stack_")):
        # A hand may have stopped at a block's side; state vectors do not carry that touch.
        for found in (start, expected):
            for contacts in found.values():
                contacts.discard(("robot", None))
    assert start == expected


@pytest.mark.slow
@pytest.mark.skipif(not calvin.is_installed(), reason="calvin_env is not installed")
def test_point_clouds_land_on_the_table() -> None:
    with CalvinEnv() as env:
        env.reset()
        for frame in env.camera_frames(0).values():
            assert frame.depth is not None
            height, width = frame.depth.shape
            u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
            rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(frame.K).T
            points = rays * frame.depth[..., None] @ frame.T_world_cam[:3, :3].T
            x, y, z = np.moveaxis(points + frame.T_world_cam[:3, 3], -1, 0)
            top = (abs(z - 0.44) < 0.006) & (abs(x - 0.2) < 0.2) & (abs(y + 0.1) < 0.06)
            assert top.sum() > 300
            assert abs(z[top].mean() - 0.44) < 2e-4
