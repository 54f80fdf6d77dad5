"""CALVIN-R, changing: what a sentence means changes while the robot is on its way.

"Push the leftmost block to the right": the hand sets out for the red block, and somebody swaps it
for the blue one. "Toggle the lamp": somebody else does. From then on another task is the right
one, and only who looks again knows it. The change belongs to the start: what it is (two blocks
swapped, the lamp or the LED toggled, the door or the drawer at its other end), and how many
environment steps after the hand has set out it comes. It waits while the hand is in the way.

An episode succeeds when the task that is right at that time has been done, counted from the start
until the change, and from the change on afterwards. Doing after the change what was meant before
it ends the episode: a block in the hand that nobody means any more is no success later.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import dist
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin.expert_control import View
from openhelix.benchmarks.calvin.physics import DRAWER, SLIDE, SWITCH
from openhelix.benchmarks.calvin.scene import (
    DRAWER_TRAVEL_M,
    SUBSTEPS,
    SWITCH_THRESHOLD_M,
    SWITCH_TRAVEL_M,
)
from openhelix.benchmarks.calvin.starts import StartError, feasible
from openhelix.benchmarks.calvin.tasks import is_completed
from openhelix.benchmarks.evaluation.referring import begin, get_reference, whole_view
from openhelix.runtime.robots.base import INSTEAD

SET_OUT_M = 0.005  # the hand has set out when it is so far from where it was
AFTER_STEPS = (8, 30)  # of a change, after the hand has set out
CLEAR_M = 0.12  # between the hand and a block or handle that somebody else moves
SETTLE_STEPS = 10  # of a change that is tried
REST_STEPS = 3  # after one, before what counts begins to count
TRIES = 12  # starts that are looked at
Info = Mapping[str, Any]


class Change:
    """Somebody who changes what is meant, and who judges what has been done.

    Make it after the start is set up; it then sits in the env as its `referee`.

    Args:
        env: a PlayTable in its start state.
        what: "swap block_red block_blue", "bulb", "led", "door" or "drawer".
        before, after: the task that is meant until the change, and from then on.
        after_steps: environment steps between the hand's setting out and the change.

    Attributes:
        done: whether the change has come.
        right: the task that is meant now.
        about: the arguments, for another one alike.
    """

    def __init__(self, env: Any, what: str, before: str, after: str, after_steps: int) -> None:
        self.about = (what, before, after, after_steps)
        self.what, self.before, self.after = what, before, after
        self.right, self.done = before, False
        self._env, self._left, self._settling = env, after_steps * SUBSTEPS, 0
        self._start: Info = env.get_info()
        self._home = self._start["robot_info"]["tcp_pos"]
        self._verdict: frozenset[str] = frozenset()
        self._out = False
        env.add_substep_hook(self._before_substep)
        env.referee = self

    def begin(self, info: Info) -> None:
        """The robot is told: what counts is what changes from here on."""
        self._start, self._home, self._verdict = info, info["robot_info"]["tcp_pos"], frozenset()

    def completed(self, info: Info) -> frozenset[str]:
        """Return {`after`} once what was right at its time is done, or what was done instead."""
        if not self._verdict and not self._settling:
            if self.done and is_completed(self.before, self._start, info):
                self._verdict = frozenset({INSTEAD + self.before})
            elif is_completed(self.right, self._start, info):
                self._verdict = frozenset({self.after})
        return self._verdict

    def close(self) -> None:
        """Change nothing more; safe to call again."""
        self._env.remove_substep_hook(self._before_substep)
        if self._env.referee is self:
            self._env.referee = None

    def _before_substep(self, world: Any) -> None:
        if self._settling:
            self._settling -= 1
            if not self._settling:  # contacts are those of what now lies where it is
                self._start = self._env.get_info()
        if self.done:
            return
        position, _ = world.tcp_pose()
        self._out = self._out or dist(position, self._home) > SET_OUT_M
        if not self._out:
            return
        self._left -= 1
        if self._left > 0 or not self._clear(position):
            return
        if self.completed(self._env.get_info()):  # what was meant has been done already
            self.done = True
            return
        apply(self._env, self.what)
        self.done, self.right, self._settling = True, self.after, REST_STEPS * SUBSTEPS

    def _clear(self, hand: tuple[float, ...]) -> bool:
        """Whether the hand is away from what somebody else is about to move."""
        world, scene = self._env.world, self._env.scene
        kind, *blocks = self.what.split()
        if kind == "swap":
            places = [world.block_pose(name)[0] for name in blocks]
            touched = any(world.robot_touches(name) for name in blocks)
            return not touched and all(dist(hand, place) > CLEAR_M for place in places)
        if kind == "door":
            x = scene.slide_x - world.table_joint(SLIDE) + 0.14
            return dist(hand, (x, -0.02, 0.52)) > CLEAR_M
        if kind == "drawer":
            y = -0.25 - world.table_joint(DRAWER)
            return dist(hand, (scene.drawer_x, y, 0.38)) > CLEAR_M
        if kind == "bulb":
            return dist(hand, (scene.switch_x, 0.04, 0.53)) > CLEAR_M
        return True


def apply(env: Any, what: str) -> None:
    """Change a PlayTable at once: see `Change`."""
    world, kind, *blocks = env.world, *what.split()
    if kind == "swap":
        (one, turn), (other, other_turn) = (world.block_pose(name) for name in blocks)
        world.set_block_pose(blocks[0], other, other_turn)
        world.set_block_pose(blocks[1], one, turn)
    elif kind == "door":
        half = env.scene.slide_travel / 2
        world.set_table_joint(SLIDE, 0.0 if world.table_joint(SLIDE) > half else 2 * half)
    elif kind == "drawer":
        half = DRAWER_TRAVEL_M / 2
        world.set_table_joint(DRAWER, 0.0 if world.table_joint(DRAWER) > half else 2 * half)
    elif kind == "bulb":  # the lamp follows its switch
        up = world.table_joint(SWITCH) > SWITCH_THRESHOLD_M
        world.set_table_joint(SWITCH, 0.0 if up else SWITCH_TRAVEL_M)
    else:
        env.led = not env.led
        env.mechanisms.button_on = env.led


KINDS = {
    "toggle_bulb": "bulb",
    "toggle_led": "led",
    "other_side": "door",
    "drawer_other_way": "drawer",
}


def begin_changing(
    env: Any, name: str, after: str, rng: np.random.Generator, tries: int = TRIES
) -> Change:
    """Put an environment into a start in which a reference means another task than `after`.

    Args:
        env: a PlayTable.
        name: of the reference.
        after: the task that it will mean, after a change that is found by trying.
        rng: where every draw comes from.
        tries: starts that are looked at.

    Raises:
        StartError: none was found.
    """
    reference = get_reference(name)
    others = [task for task in reference.tasks if task != after]
    for _ in range(tries):
        before = str(rng.choice(others))
        steps = int(rng.integers(AFTER_STEPS[0], AFTER_STEPS[1] + 1))
        try:
            info = begin(env, name, before, rng, tries=3)
        except StartError:
            continue
        ways = [KINDS[name]] if name in KINDS else swaps(env, info)
        for what in rng.permutation(ways):
            if would_mean(env, name, str(what)) == after:
                return Change(env, str(what), before, after, steps)
    raise StartError(f"reference: no start in which {name} comes to mean {after} in {tries} tries")


def swaps(env: Any, info: Info) -> list[str]:
    """Return all swaps of two blocks, of those that nothing holds and that stand on no other."""
    view = View(env.scene, info)
    free = [n for n in view.blocks if not view.held(n) and not view.neighbours(n)]
    return [f"swap {a} {b}" for i, a in enumerate(free) for b in free[i + 1 :]]


def would_mean(env: Any, name: str, what: str) -> str | None:
    """Return the task that a reference would mean after a change, if that can then be done.

    The change is tried, and undone.
    """
    if what == "drawer":
        view = View(env.scene, env.get_info())
        if any(view.on(block, "drawer_link") for block in view.blocks):
            return None  # somebody's push would throw them about
    before = env.state()
    try:
        apply(env, what)
        for _ in range(SETTLE_STEPS * SUBSTEPS):
            env.world.substep()
        env.mechanisms.step()
        info = env.get_info()
        task = get_reference(name).resolve(whole_view(info, env.scene))
        return task if task in feasible(View(env.scene, info)) else None
    finally:
        env.restore(before)
