"""What several PlayTable tests start from."""

from __future__ import annotations

import numpy as np

from openhelix.benchmarks.calvin.captions import COLOURS
from openhelix.runtime.core.interfaces import F64

_TCP = (0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963)
_Q = (-1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928)
ROBOT_OBS = np.array([*_TCP, *_Q, 1.0])


def scene_obs(**changes: float) -> F64:
    """Scene D with red and blue on the table and pink in the cabinet.

    Args:
        changes: slide, drawer, button, switch, bulb, led.
    """
    names = ("slide", "drawer", "button", "switch", "bulb", "led")
    obs = np.zeros(24)
    obs[:6] = [changes.get(name, 0.0) for name in names]
    obs[6:12] = (0.05, -0.12, 0.46, 0.0, 0.0, np.pi / 2)
    obs[12:18] = (0.23, -0.12, 0.46, 0.0, 0.0, 0.3)
    obs[18:24] = (-0.24, 0.0924, 0.461, 0.0, 0.0, 0.0)
    return obs


def waypoints(
    start: F64,
    points: list[tuple[float, float, float, int, int]],
    euler: tuple[float, float, float],
) -> list[tuple[F64, tuple[float, float, float], int]]:
    """Absolute actions through (x, y, z, gripper, dwell) at 0.02 m a step and axis."""
    actions, at = [], start.copy()
    for x, y, z, gripper, dwell in points:
        goal = np.array([x, y, z])
        count = int(np.ceil(np.abs(goal - at).max() / 0.02))
        actions += [(at + (goal - at) * (i + 1) / count, euler, gripper) for i in range(count)]
        actions += [(goal, euler, gripper)] * dwell
        at = goal
    return actions


SEEN = dict.fromkeys(COLOURS, 100)


def truth(**changes):
    """What `StateMaker.draw` says of a state with blue in the hand, up on the right."""
    base = {
        "places": {"red": "table", "blue": "hand", "pink": "cabinet"},
        "tcp": (0.25, -0.1, 0.7),
        "slide": 1.0,
        "drawer": 0.0,
        "bulb": True,
        "led": False,
        "held": "blue",
        "xyz": {"red": (-0.1, -0.1, 0.46), "blue": (0.25, -0.1, 0.7), "pink": (0.1, 0.1, 0.46)},
    }
    return base | changes
