"""Scripted experts for the 34 tasks, closed loop on privileged state.

`Expert` is what others use: give it `info` each step and it returns the absolute target
pose to send, with CALVIN's relative action beside it. Now and then it is pushed: a
`Disturbance` shifts what is executed for some steps, while `act` keeps returning what the
expert means, so that demonstrations contain the way back as well as the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin.expert_control import (
    SETTLED_M,
    STEP_M,
    STEP_RAD,
    Goal,
    Servo,
    Steps,
    Variation,
    View,
    limit,
    wrap,
)
from openhelix.benchmarks.calvin.expert_skills import FixtureSkill, StorageSkill
from openhelix.benchmarks.calvin.scene import Scene, get_scene
from openhelix.benchmarks.calvin.tasks import get_task
from openhelix.runtime.core.interfaces import F64
from openhelix.runtime.core.quaternion import Quat, from_rotation_vector, multiply, to_euler_xyz

MAX_STEPS = 64  # CALVIN's labelled windows are no longer


@dataclass(frozen=True, slots=True)
class Move:
    """One step of a demonstration.

    Attributes:
        position: (3,) TCP target in W, m.
        quaternion: target, xyzw.
        gripper: 1 open, -1 closed.
        relative: (7,) the same as CALVIN's relative action, clipped to [-1, 1].
    """

    position: F64
    quaternion: Quat
    gripper: int
    relative: F64

    def action(self) -> tuple[F64, Quat, int]:
        """What `env.step` takes."""
        return self.position, self.quaternion, self.gripper


@dataclass(frozen=True, slots=True)
class Disturbance:
    """A push on the arm: what is executed is off by `shift_m` and `turn_rad` for some steps."""

    first: int
    steps: int
    shift_m: tuple[float, float, float]
    turn_rad: tuple[float, float, float]

    @staticmethod
    def random(rng: np.random.Generator) -> Disturbance:
        """Draw one of a few centimetres, somewhere in the first half of a task."""
        direction = rng.normal(size=3) * (1.0, 1.0, 0.6)
        direction /= np.linalg.norm(direction)
        x, y, z = direction * rng.uniform(0.015, 0.05)
        a, b, c = rng.normal(0.0, (0.08, 0.08, 0.2))
        return Disturbance(
            int(rng.integers(2, 28)),
            int(rng.integers(3, 8)),
            (float(x), float(y), max(float(z), -0.015)),
            (float(a), float(b), float(c)),
        )

    def apply(self, step: int, move: Move, view: View) -> Move:
        """What is executed at `step` instead of `move`."""
        if not self.active(step):
            return move
        shifted = view.position + limit(move.position - view.position, 0.02) + self.shift_m
        turned = multiply(from_rotation_vector(self.turn_rad), move.quaternion)
        return Move(shifted, turned, move.gripper, move.relative)

    def active(self, step: int) -> bool:
        """Whether it acts at that step of the demonstration."""
        return self.first <= step < self.first + self.steps


class Expert:
    """Does one task in one scene.

    Args:
        task: one of the 34 names.
        scene: "A" to "D" or a `Scene`.
        info: the state in which the task is given.
        variation: how this demonstration differs from the plain one.
        start: the state in which the task was given, where somebody else has worked on it
            since; `info` is then the state in which the expert takes over, whatever it is.
        before: the state one control step before `info`, if the arm is on its way: the first
            command then lies as far ahead of it as that of an expert who moves so.

    Raises:
        UnknownTaskError, SceneError: there is no such task or scene.
    """

    def __init__(
        self,
        task: str,
        scene: str | Scene,
        info: Mapping[str, Any],
        variation: Variation | None = None,
        start: Mapping[str, Any] | None = None,
        before: Mapping[str, Any] | None = None,
    ) -> None:
        self.task = get_task(task)
        self.scene = get_scene(scene)
        self.variation = variation or Variation()
        self.view = View(self.scene, info)
        # A turn of a block has no time to lose.
        speed = 1.0 if self.task.family == "rotate" else self.variation.speed
        self._servo = Servo(self.view, speed)
        if before is not None:
            self._servo.lead(View(self.scene, before), self.view)
        begun = None if start is None else View(self.scene, start)
        moved = 0.0 if before is None else View(self.scene, before).width - self.view.width
        fingers_move = abs(moved) > SETTLED_M
        self._goals = recipe(
            task, self.scene, self.view, self.variation, begun, fingers_move=fingers_move
        )
        self._last: Goal | None = None
        self.finished = False

    def act(self, info: Mapping[str, Any]) -> Move:
        """The next target; once the recipe is over it holds the last one."""
        self.view.update(info)
        goal = None if self.finished else next(self._goals, None)
        if goal is None:
            self.finished = True
            gripper = self._last.gripper if self._last else self.view.gripper
            position = self._last.position if self._last else self.view.position
            goal = Goal(self.view.position * 0.5 + position * 0.5, self._servo.quaternion, gripper)
        self._last = goal if not self.finished else self._last
        before = self._servo.position, self._servo.quaternion
        self._servo.step(self.view, goal)
        after = self._servo.position, self._servo.quaternion
        relative = relative_action(before, after, goal.gripper)
        return Move(after[0], after[1], goal.gripper, relative)


def relative_action(before: tuple[F64, Quat], after: tuple[F64, Quat], gripper: int) -> F64:
    """CALVIN's (7,) relative action from one commanded pose to the next, clipped to [-1, 1]."""
    shift = (after[0] - before[0]) / STEP_M
    angles = zip(to_euler_xyz(after[1]), to_euler_xyz(before[1]), strict=True)
    turn = [wrap(a - b) / STEP_RAD for a, b in angles]
    return np.array([*np.clip([*shift, *turn], -1.0, 1.0), gripper])


def recipe(
    task: str,
    scene: Scene,
    view: View,
    variation: Variation,
    start: View | None = None,
    fingers_move: bool = False,
) -> Steps:
    """The generator of goals for a task; `start` as for `Skill`."""
    words = task.split("_")
    family = get_task(task).family
    storage = StorageSkill(scene, view, variation, start)
    fixture = FixtureSkill(scene, view, variation, start)
    storage.fingers_move = fingers_move
    block = f"block_{words[1]}"
    if family == "rotate":
        return storage.rotate(block, 1.0 if words[3] == "left" else -1.0)
    if family == "push":
        return storage.push(block, 1.0 if words[3] == "right" else -1.0)
    if family == "lift":
        lifts = {
            "table": storage.lift,
            "slider": storage.lift_slider,
            "drawer": storage.lift_drawer,
        }
        return lifts[words[3]](block)
    if words[:2] == ["move", "slider"]:
        return fixture.move_slider(1.0 if words[2] == "right" else -1.0)
    plain = {
        "open_drawer": fixture.open_drawer,
        "close_drawer": fixture.close_drawer,
        "place_in_slider": storage.place_slider,
        "place_in_drawer": storage.place_drawer,
        "stack_block": storage.stack,
        "unstack_block": storage.unstack,
        "turn_on_lightbulb": fixture.bulb_on,
        "turn_off_lightbulb": fixture.bulb_off,
        "push_into_drawer": storage.push_into,
    }
    if task in plain:
        return plain[task]()
    return fixture.press_button(int(words[1] == "on"))
