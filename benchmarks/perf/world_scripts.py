"""Open-loop motions and pairs of states by which two play tables are compared.

Open loop, because the same commands must go to both worlds: a script is a list of absolute
poses, at most one control step apart, that never looks at what it does. Scene D only; the
geometry is CALVIN's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi, sin
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation, Slerp

F64 = npt.NDArray[np.float64]
AbsoluteAction = tuple[F64, F64, int]

STEP_M, STEP_RAD = 0.02, 0.05
OPEN, CLOSED = 1, -1
ARM = (
    *(0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963),
    *(-1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928),
    1.0,
)
# Block centres at rest, 0.01 mm into what they lie on, as CALVIN's own initial states are.
TABLE_Z, PLANK_Z, DRAWER_Z, STACK_Z = 0.45999, 0.46099, 0.36199, 0.49998
ON_TABLE = {  # block poses (x, y, z, yaw) where no script passes
    "red": (0.05, -0.10, TABLE_Z, pi / 2),
    "blue": (0.23, -0.10, TABLE_Z, pi / 2),
    "pink": (-0.24, 0.0924, PLANK_Z, pi / 2),
}


@dataclass(frozen=True)
class Script:
    """One motion.

    Attributes:
        task: What it should complete, or "" for none.
        scene_obs: (24,) where it starts; the arm starts at rest.
        waypoints: (x, y, z, yaw, tilt) TCP targets, m and rad, one after the other.
        dwell: Steps to hold the last one.
    """

    name: str
    task: str
    scene_obs: F64
    waypoints: tuple[tuple[float, float, float, float, float], ...]
    dwell: int = 15


def scene_obs(
    blocks: dict[str, tuple[float, float, float, float]] | None = None,
    **joints: float,
) -> F64:
    """(24,) for scene D: joints by name (slide, drawer, button, switch, bulb, led), blocks."""
    names = ("slide", "drawer", "button", "switch", "bulb", "led")
    values = [joints.get(name, 0.0) for name in names]
    for color in ("red", "blue", "pink"):
        x, y, z, yaw = {**ON_TABLE, **(blocks or {})}[color]
        values += [x, y, z, 0.0, 0.0, yaw]
    return np.array(values)


def hand(yaw: float, tilt: float) -> Rotation:
    """Tool pointing down, turned by `yaw`, its tip then leaning by `tilt` towards +y."""
    return Rotation.from_rotvec([tilt, 0, 0]) * Rotation.from_euler("xyz", [pi, 0, yaw])


def actions(script: Script, gripper: int = CLOSED) -> list[AbsoluteAction]:
    """The script as absolute actions, each within one control step of the one before."""
    position = np.array(ARM[:3])
    rotation = Rotation.from_euler("xyz", ARM[3:6])
    commands: list[AbsoluteAction] = []
    for x, y, z, yaw, tilt in script.waypoints:
        goal, turn = np.array([x, y, z]), hand(yaw, tilt)
        angle = (turn * rotation.inv()).magnitude()
        count = max(1, int(np.ceil(max(np.abs(goal - position).max() / STEP_M, angle / STEP_RAD))))
        path = Slerp([0, 1], Rotation.concatenate([rotation, turn]))
        for i in range(1, count + 1):
            w = i / count
            commands.append(((1 - w) * position + w * goal, path(w).as_quat(), gripper))
        position, rotation = goal, turn
    return commands + [commands[-1]] * script.dwell


def mechanism_scripts() -> list[Script]:
    """Drawer, slider, switch and button, each way."""
    up = np.array([0.0, cos(pi / 3), sin(pi / 3)])
    low = np.array([0.30, 0.018, 0.47])
    top = np.array([0.30, -0.005, 0.53]) + (0.088 + 0.07) * up  # 5 cm above the raised bar
    a = pi / 2

    def at(point: Sequence[float] | F64, tilt: float) -> tuple[float, float, float, float, float]:
        return (float(point[0]), float(point[1]), float(point[2]), a, tilt)

    return [
        Script(
            "drawer opens",
            "open_drawer",
            scene_obs(),
            (at((0.18, -0.207, 0.5), 0), at((0.18, -0.207, 0.368), 0), at((0.18, -0.40, 0.368), 0)),
        ),
        Script(
            "drawer shuts",
            "close_drawer",
            scene_obs(drawer=0.22),
            (at((0.18, -0.53, 0.5), 0), at((0.18, -0.53, 0.365), 0), at((0.18, -0.28, 0.365), 0)),
        ),
        Script(
            "door goes left",
            "move_slider_left",
            scene_obs(),
            (
                at((0.10, -0.04, 0.56), 0),
                at((0.10, -0.018, 0.518), 0),
                at((-0.18, -0.018, 0.518), 0),
            ),
        ),
        Script(
            "door goes right",
            "move_slider_right",
            scene_obs(slide=0.28),
            (
                at((-0.30, -0.04, 0.56), 0),
                at((-0.30, -0.018, 0.518), 0),
                at((-0.02, -0.018, 0.518), 0),
            ),
        ),
        Script(
            "switch goes up",
            "turn_on_lightbulb",
            scene_obs(),
            (at(low - (0, 0.06, 0), 0.65), at(low, 0.65), at(low + 0.11 * up, 0.65)),
        ),
        Script(
            "switch goes down",
            "turn_off_lightbulb",
            scene_obs(switch=0.088, bulb=1.0),
            (at(top - (0, 0.06, 0), 0.8), at(top, 0.8), at(top - 0.15 * up, 0.8)),
        ),
        Script(
            "button lights the LED",
            "turn_on_led",
            scene_obs(),
            (
                at((-0.12, -0.12, 0.53), 0),
                at((-0.12, -0.12, 0.475), 0),
                at((-0.12, -0.12, 0.53), 0),
            ),
        ),
        Script(
            "button puts the LED out",
            "turn_off_led",
            scene_obs(led=1.0),
            (
                at((-0.12, -0.12, 0.53), 0),
                at((-0.12, -0.12, 0.475), 0),
                at((-0.12, -0.12, 0.53), 0),
            ),
        ),
    ]


Placed = tuple[str, F64, F64]  # name, robot_obs, scene_obs


def held_robot_obs(env: Any) -> F64:
    """robot_obs of an arm that holds a block 0.1 m above the table at (0.10, -0.12)."""
    script = Script("", "", scene_obs(), ((0.10, -0.12, 0.60, pi / 2, 0.0),), dwell=20)
    env.reset(np.array(ARM), script.scene_obs)
    for action in actions(script, OPEN):
        observation = env.step(action)[0]
    robot_obs = np.asarray(observation["robot_obs"], dtype=np.float64).copy()
    robot_obs[6] = 0.04
    return robot_obs


def states(held: F64) -> list[Placed]:
    """States whose ordered pairs contain every one of the 34 tasks (a test counts them).

    Args:
        held: From `held_robot_obs`.
    """
    rest = np.array(ARM)
    tcp = held[:3]
    found: list[Placed] = [("start", rest, scene_obs())]
    away = {"red": (-0.22, 0.09, PLANK_Z), "blue": (0.07, 0.09, PLANK_Z)}
    away["pink"] = (-0.25, -0.1, TABLE_Z)
    for color in ON_TABLE:
        others = {c: (*away[c], pi / 2) for c in ON_TABLE if c != color}
        for name, x, yaw in (
            ("middle", 0.14, pi / 2),
            ("right", 0.26, pi / 2),
            ("left", 0.02, pi / 2),
            ("turned left", 0.14, pi / 2 + 1.4),
            ("turned right", 0.14, pi / 2 - 1.4),
        ):
            rows = {**others, color: (x, -0.1, TABLE_Z, yaw)}
            found.append((f"{color} {name}", rest, scene_obs(rows)))
        for name, pose in (
            ("on plank", (0.05, 0.09, PLANK_Z, pi / 2)),
            ("in drawer", (0.18, -0.32, DRAWER_Z, pi / 2)),
        ):
            rows = {color: pose}
            joints = {"slide": 0.28, "drawer": 0.22}
            found.append((f"{color} {name}", rest, scene_obs(rows, **joints)))
        in_hand = {color: (float(tcp[0]), float(tcp[1]), float(tcp[2]) + 0.004, pi / 2)}
        found.append((f"{color} held", held, scene_obs(in_hand, slide=0.28, drawer=0.22)))
        base = {"red": "blue", "blue": "red", "pink": "red"}[color]
        x, y, _, yaw = ON_TABLE[base]
        found.append((f"{color} stacked", rest, scene_obs({color: (x, y, STACK_Z, yaw)})))
    found.append(("bulb on", rest, scene_obs(switch=0.088, bulb=1.0)))
    found.append(("led on", rest, scene_obs(led=1.0)))
    found.append(("all open", rest, scene_obs(slide=0.28, drawer=0.22)))
    return found
