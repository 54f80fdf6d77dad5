"""Kinematics of a URDF, against Bullet's of the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.quaternion import angle_between, normalise
from openhelix.runtime.robots.kinematics import UrdfKinematics

ARM = (  # place of each joint, its axis
    ("0 0 0.1", "0 0 0.2", "0 0 1"),
    ("0.02 0 0.06", "0 0 0", "0 1 0"),
    ("0 0 0.25", "0.1 0 0", "0 1 0"),
    ("0.22 0 0.02", "0 0.3 0", "1 0 0"),
    ("0.05 0 0", "0 0 -0.1", "0 1 0"),
    ("0.06 0.01 0", "0 0 0", "1 0 0"),
)


def write(file: Path, n: int = 6, kind: str = "revolute") -> str:
    """An arm of the first n joints, with a tool on a fixed one."""
    links = "".join(
        f'<link name="l{i}"><inertial><mass value="1"/><inertia ixx="1" ixy="0" ixz="0" iyy="1" '
        'iyz="0" izz="1"/></inertial></link>'
        for i in range(n + 1)
    )
    joints = "".join(
        f'<joint name="j{i}" type="{kind}"><parent link="l{i}"/><child link="l{i + 1}"/>'
        f'<origin xyz="{xyz}" rpy="{rpy}"/><axis xyz="{axis}"/>'
        '<limit lower="-2" upper="2" effort="1" velocity="1"/></joint>'
        for i, (xyz, rpy, axis) in enumerate(ARM[:n])
    )
    tool = (
        f'<link name="tool"/><joint name="jt" type="fixed"><parent link="l{n}"/>'
        '<child link="tool"/><origin xyz="0.08 0 0.01" rpy="0 1.57 0"/></joint>'
    )
    file.write_text(f'<robot name="arm">{links}{joints}{tool}</robot>')
    return str(file)


def test_forward_is_bullets(tmp_path: Path) -> None:
    bullet = pytest.importorskip("pybullet")
    file = write(tmp_path / "arm.urdf")
    arm = UrdfKinematics(file, "tool")
    client = bullet.connect(bullet.DIRECT)
    try:
        body = bullet.loadURDF(file, useFixedBase=True, physicsClientId=client)
        rng = np.random.default_rng(0)
        for _ in range(20):
            q = rng.uniform(-2, 2, 6)
            for i, value in enumerate(q):
                bullet.resetJointState(body, i, value, physicsClientId=client)
            state = bullet.getLinkState(body, 6, computeForwardKinematics=1, physicsClientId=client)
            pose = arm.forward(q)
            assert np.allclose(pose[:3], state[4], atol=1e-5)
            assert angle_between(normalise(pose[3:]), normalise(state[5])) < 1e-4
    finally:
        bullet.disconnect(client)


def test_inverse_comes_back_and_stays_within_the_limits(tmp_path: Path) -> None:
    arm = UrdfKinematics(write(tmp_path / "arm.urdf"), "tool")
    rng = np.random.default_rng(1)
    for _ in range(30):
        q = rng.uniform(-1.2, 1.2, 6)
        target = arm.forward(q)
        found = arm.inverse(target, q + rng.uniform(-0.1, 0.1, 6))
        there = arm.forward(found)
        assert np.abs(there[:3] - target[:3]).max() < 5e-4
        assert angle_between(normalise(there[3:]), normalise(target[3:])) < 5e-3
    far = arm.forward(np.zeros(6)).copy()
    far[:3] = [3.0, 0, 0]
    stretched = arm.inverse(far, np.zeros(6))
    assert np.abs(stretched).max() <= 2 and np.isfinite(stretched).all()


def test_an_arm_of_five_joints_reaches_the_place(tmp_path: Path) -> None:
    arm = UrdfKinematics(write(tmp_path / "arm.urdf", n=5), "tool")
    q = np.array([0.3, -0.4, 0.5, 0.2, 0.4])
    target = arm.forward(q)
    target[:3] += [0.01, -0.01, 0.01]
    there = arm.forward(arm.inverse(target, q))
    assert np.linalg.norm(there[:3] - target[:3]) < 0.003


def test_joints_in_the_users_order(tmp_path: Path) -> None:
    file = write(tmp_path / "arm.urdf", n=3)
    plain, turned = UrdfKinematics(file, "tool"), UrdfKinematics(file, "tool", ["j2", "j0", "j1"])
    q = np.array([0.1, 0.2, 0.3])
    assert np.allclose(plain.forward(q), turned.forward(q[[2, 0, 1]]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"urdf": "/no.urdf"}, "kinematics: urdf: /no.urdf"),
        ({"tip": "hand"}, "tip: 'hand' is none of l1, l2"),
        ({"joints": ["j0", "j9"]}, "joints: want j0, j1, j2"),
    ],
)
def test_what_is_not_there_is_named(options, said, tmp_path: Path) -> None:
    given = {"urdf": write(tmp_path / "arm.urdf", n=3), "tip": "tool"} | options
    with pytest.raises(ConfigError, match=said):
        UrdfKinematics(**given)


def test_a_joint_that_slides_and_a_file_that_is_none(tmp_path: Path) -> None:
    file = write(tmp_path / "arm.urdf", n=3, kind="prismatic")
    with pytest.raises(ConfigError, match="joint j0: a prismatic one is not known"):
        UrdfKinematics(file, "tool")
    Path(file).write_text("<robot>")
    with pytest.raises(ConfigError, match="kinematics: urdf: "):
        UrdfKinematics(file, "tool")
