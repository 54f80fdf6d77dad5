"""Kinematics of an arm from its URDF: joints to the tool's pose, and back.

For arms that take joint targets (`openhelix.runtime.robots.lerobot`). The inverse is damped least
squares from the joints that the arm has, so it follows a target smoothly and stays within the
joints' limits; an arm of fewer than six joints reaches the place and comes as near to the turn as
its joints let it.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.interfaces import F64
from openhelix.runtime.core.quaternion import (
    from_euler_xyz,
    from_rotation_vector,
    matrix,
    normalise,
    rotation_vector,
)
from openhelix.runtime.robots.lerobot import rigid

MOVING = ("revolute", "continuous")
STEPS = 40  # of the inverse, at most
DAMPING = 0.02
TURN_M = 0.05  # what a radian of turn weighs, in metres
DONE_M = 1e-5  # a step of the joints that changes nothing more, in radians


@dataclass(frozen=True, slots=True)
class Joint:
    """A joint between two links: its place in the one before, and its axis where it turns."""

    name: str
    before: str
    place: F64  # (4, 4)
    axis: F64 | None  # (3,); None: fixed
    low: float
    high: float


def _vector(text: str | None, default: str) -> list[float]:
    return [float(word) for word in (text or default).split()]


def read_urdf(file: Path) -> dict[str, Joint]:
    """Return a URDF's joints by the link behind each.

    Raises:
        ConfigError: it cannot be read, or has a joint that slides or floats on the way.
    """
    try:
        root = ET.parse(file).getroot()
        found = {}
        for node in root.iter("joint"):
            if node.find("child") is None:  # of a transmission
                continue
            origin, limit, axis = node.find("origin"), node.find("limit"), node.find("axis")
            given = {} if origin is None else origin.attrib
            T: F64 = np.eye(4)
            T[:3, :3] = matrix(from_euler_xyz(_vector(given.get("rpy"), "0 0 0")))
            T[:3, 3] = _vector(given.get("xyz"), "0 0 0")
            kind = node.get("type")
            if kind not in (*MOVING, "fixed"):
                raise ConfigError(f"{file}: joint {node.get('name')}: a {kind} one is not known")
            along = np.array(_vector(None if axis is None else axis.get("xyz"), "1 0 0"))
            bounded = kind == "revolute" and limit is not None
            found[_link(node, "child")] = Joint(
                name=str(node.get("name")),
                before=_link(node, "parent"),
                place=T,
                axis=along / np.linalg.norm(along) if kind in MOVING else None,
                low=float(limit.get("lower", 0)) if bounded and limit is not None else -np.inf,
                high=float(limit.get("upper", 0)) if bounded and limit is not None else np.inf,
            )
    except (OSError, ET.ParseError, ValueError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"kinematics: urdf: {file}: {' '.join(str(error).split())}") from error
    return found


def _link(node: ET.Element, which: str) -> str:
    return str(node.find(which).attrib["link"])  # type: ignore[union-attr]  # KeyError otherwise


class UrdfKinematics:
    """A chain of a URDF, from its root to a link.

    Args:
        urdf: the file.
        tip: the link whose frame is the TCP.
        joints: names of the chain's turning joints in the order of the mapping's keys; None takes
            them from root to tip.

    Raises:
        ConfigError: the file, the link or a joint is not there.
    """

    def __init__(self, urdf: str, tip: str, joints: Sequence[str] | None = None) -> None:
        links = read_urdf(Path(urdf).expanduser())
        chain: list[Joint] = []
        link = tip
        while link in links:
            chain.insert(0, links[link])
            link = links[link].before
        if not chain:
            raise ConfigError(f"kinematics: tip: {tip!r} is none of {', '.join(links)}")
        turning = [joint.name for joint in chain if joint.axis is not None]
        if joints is not None and sorted(joints) != sorted(turning):
            raise ConfigError(f"kinematics: joints: want {', '.join(turning)} in your order")
        names = list(joints or turning)
        self._chain = [
            (joint, names.index(joint.name) if joint.axis is not None else -1) for joint in chain
        ]
        by_name = {joint.name: joint for joint in chain}
        ordered = [by_name[name] for name in names]
        self._low = np.array([joint.low for joint in ordered])
        self._high = np.array([joint.high for joint in ordered])

    def forward(self, joints: F64) -> F64:
        """Return the TCP pose (7,) in the root's frame, of joints (n,) in radians."""
        return _pose(self._run(np.asarray(joints, np.float64))[0])

    def inverse(self, pose: F64, joints: F64) -> F64:
        """Return joints (n,) that bring the TCP to `pose` (7,), or as near as limits let it."""
        q = np.clip(np.asarray(joints, np.float64), self._low, self._high)
        turn = normalise(np.asarray(pose[3:]).tolist())
        for _ in range(STEPS):
            T, jacobian = self._run(q)
            here = _pose(T)
            error = np.concatenate(
                [
                    np.asarray(pose[:3]) - here[:3],
                    TURN_M * np.array(rotation_vector(normalise(here[3:].tolist()), turn)),
                ]
            )
            # Damped, so that a target out of reach stretches the arm and does not shake it.
            square = jacobian @ jacobian.T + DAMPING**2 * np.linalg.norm(error) * np.eye(6)
            step = jacobian.T @ np.linalg.solve(square + 1e-12 * np.eye(6), error)
            new = np.clip(q + np.clip(step, -0.3, 0.3), self._low, self._high)
            if np.abs(new - q).max() < DONE_M:
                return new
            q = new
        return q

    def _run(self, q: F64) -> tuple[F64, F64]:
        """Return the tip's pose (4, 4) and the Jacobian (6, n), its turns weighed in metres."""
        T: F64 = np.eye(4)
        axes, places = np.zeros((3, len(q))), np.zeros((3, len(q)))
        for joint, at in self._chain:
            T = T @ joint.place
            if joint.axis is not None:
                axes[:, at], places[:, at] = T[:3, :3] @ joint.axis, T[:3, 3]
                moved: F64 = np.eye(4)
                moved[:3, :3] = matrix(from_rotation_vector((q[at] * joint.axis).tolist()))
                T = T @ moved
        arms = np.cross(axes.T, (T[:3, 3:] - places).T).T
        return T, np.concatenate([arms, TURN_M * axes])


def _pose(T: F64) -> F64:
    return np.array([*T[:3, 3], *rigid(T.tolist())[1]])
