"""A robot of one's own: a driver of nine members, driven by the same control loop as every other.

    python examples/own_robot.py [STEPS]

The arm here is a point in a box that follows its target; a vendor's library would stand in its
place. Its policy needs neither a camera nor System 2: it draws a circle. docs/add-a-robot.md says
what each member must and must never do, and how to check a driver.
"""

import sys

import numpy as np

from openhelix.runtime.core.clock import Clock, MonotonicClock
from openhelix.runtime.core.interfaces import (
    Action,
    ActionChunk,
    ActionSpec,
    Observation,
    PolicySpec,
    RobotSpec,
    check_action,
)
from openhelix.runtime.robots.base import NotConnected, Robot

HZ = 30.0


class PointArm(Robot):
    """A tool centre point that moves a fifth of the way to its target at every step."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or MonotonicClock()
        self._pose = np.array([0.0, -0.2, 0.5, 1.0, 0.0, 0.0, 0.0])
        self._connected = False

    @property
    def spec(self) -> RobotSpec:
        return RobotSpec(cameras=(), action=ActionSpec(hz=HZ))

    @property
    def n_joints(self) -> int:
        return 0

    @property
    def is_connected(self) -> bool:
        return self._connected

    def connect(self) -> None:
        self._connected = True

    def disconnect(self) -> None:
        self._connected = False

    def get_observation(self) -> Observation:
        if not self._connected:
            raise NotConnected("point arm: connect() first")
        return Observation(self._clock.now_ns(), {}, self._pose.copy(), 0.08, True, np.zeros(0))

    def send_action(self, action: Action) -> Action:
        check_action(action)
        self._pose[:3] += 0.2 * (action.pose[:3] - self._pose[:3])
        return action

    def hold_action(self, last: Action | None) -> Action:
        return last or Action(self._pose.copy(), 1.0)

    def stop(self, reason: str) -> None: ...


class Circle:
    """A policy that draws a circle of 10 cm, without System 2."""

    spec = PolicySpec(cameras=(), latent=None, action=ActionSpec(hz=HZ), horizon=16)

    def warm_up(self) -> None: ...

    def reset(self, seed: int | None = None) -> None: ...

    def act(self, observation, latents):
        dt_ns = round(1e9 / HZ)
        times_s = (observation.t_ns + dt_ns * np.arange(1, 17)) * 1e-9
        poses = np.tile([0.0, -0.2, 0.5, 1.0, 0.0, 0.0, 0.0], (16, 1))
        poses[:, 0] += 0.1 * np.cos(times_s)
        poses[:, 1] += 0.1 * np.sin(times_s)
        return ActionChunk(
            t_start_ns=observation.t_ns + dt_ns,
            dt_ns=dt_ns,
            poses=poses,
            gripper=np.ones(16),
            instruction_id=observation.instruction_id,
            t_obs_ns=observation.t_ns,
        )


def main(steps: int = 60) -> int:
    from openhelix.runtime.cli.main import main as command

    # The same as on the command line: openhelix run robot.name=own_robot:PointArm ...
    return command(
        [
            *("run", "control.clock=lockstep", f"tasks.steps_limit={steps}"),
            *("robot.name=own_robot:PointArm", "system1.policy.target=own_robot:Circle"),
            *("tasks.instruction=draw a circle", "output.video=false"),
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main(*map(int, sys.argv[1:2])))
