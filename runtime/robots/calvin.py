"""The real calvin_env as a robot, in a process of its own.

calvin_env renders about 12 steps a second, so it belongs to the lockstep clock; on the wall
clock every tick waits for it. Where it is not installed, `connect` says how to get it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.clock import Clock
from runtime.resolve import resolve
from runtime.robots.env import EnvRobot


class CalvinRobot(EnvRobot):
    """One calvin_env.

    Args:
        scene: "A" to "D".
        cameras: names, of "static" and "gripper".
        clock: see `EnvRobot`.
        frames_on_demand: see `EnvRobot`; it draws 38 + 20 ms for a step of 2 ms.
    """

    def __init__(
        self,
        scene: str = "D",
        cameras: Sequence[str] = ("static", "gripper"),
        clock: Clock | None = None,
        frames_on_demand: bool = False,
    ) -> None:
        def make_env() -> Any:
            env = resolve("benchmarks.playtable.calvin:CalvinEnv")
            return env(scene=scene, cameras=tuple(cameras))

        super().__init__(make_env, cameras, clock, frames_on_demand=frames_on_demand)
