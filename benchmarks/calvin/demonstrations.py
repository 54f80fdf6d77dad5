"""Running an expert and keeping what it did: one demonstration as plain arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.expert_control import Variation
from openhelix.benchmarks.calvin.experts import MAX_STEPS, Disturbance, Expert, Move
from openhelix.benchmarks.calvin.tasks import is_completed
from openhelix.runtime.core.interfaces import F32, F64

TAIL_STEPS = 3  # by default; what follows a success gives the last targets a future


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What an expert did; row t is seen before, and row t of the targets sent at, step t.

    Attributes:
        task, scene: names.
        success: whether the oracle said so.
        steps: first step after which the oracle was true; -1 if never.
        states: (T + 1, 36) f64 visual states.
        proprio: (T + 1, 9) f32 TCP position m, quaternion xyzw, width m, commanded openness.
        targets: (T, 8) f32 intended target position m, quaternion xyzw, openness (0 or 1).
        relative: (T, 7) f32 CALVIN's relative actions, gripper +-1.
        clean: (T,) bool, whether what was executed is what was intended.
        instruction: a sentence for the task; empty until one was drawn.
    """

    task: str
    scene: str
    success: bool
    steps: int
    states: F64
    proprio: F32
    targets: F32
    relative: F32
    clean: np.ndarray
    instruction: str = ""


def random_expert(env: PlayTableEnv, task: str, rng: np.random.Generator) -> Expert:
    """An expert for `task` from the state of `env`, with a variation drawn from `rng`."""
    return Expert(task, env.scene, env.get_info(), Variation.random(rng))


class _Log:
    """Rows of a demonstration as they come."""

    def __init__(self) -> None:
        self.states: list[F64] = []
        self.proprio: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.relative: list[F64] = []
        self.clean: list[bool] = []

    def see(self, env: PlayTableEnv) -> None:
        self.states.append(env.visual_state())
        position, quaternion = env.robot.tcp()
        opened = float(env.robot.gripper_action > 0)
        self.proprio.append(np.array([*position, *quaternion, sum(env.robot.fingers()), opened]))

    def did(self, move: Move, clean: bool) -> None:
        self.targets.append(np.array([*move.position, *move.quaternion, float(move.gripper > 0)]))
        self.relative.append(move.relative)
        self.clean.append(clean)


def perform(
    env: PlayTableEnv,
    expert: Expert,
    max_steps: int = MAX_STEPS,
    disturbance: Disturbance | None = None,
    record: bool = False,
    tail: int = TAIL_STEPS,
    start: Mapping[str, Any] | None = None,
) -> Demonstration:
    """Let an expert do its task; stop a few steps after success.

    Args:
        env: in the state that the expert was made for.
        expert: the expert.
        max_steps: give up after so many steps.
        disturbance: a push on the arm, if any.
        record: keep states and observations (otherwise only the outcome).
        tail: steps to go on for after success.
        start: the state in which the task was given, if that was earlier.
    """
    name = expert.task.name
    info, log, reached = env.get_info(), _Log(), -1
    start = info if start is None else start
    if record:
        log.see(env)
    for step in range(max_steps):
        move = expert.act(info)
        executed = disturbance.apply(step, move, expert.view) if disturbance else move
        env.advance(executed.action())
        info = env.get_info()
        if record:
            log.did(move, executed is move)
            log.see(env)
        if reached < 0 and is_completed(name, start, info):
            reached = step + 1
        if reached >= 0 and (step + 1 >= reached + tail or expert.finished):
            break
    return Demonstration(
        name,
        env.scene.name,
        reached >= 0,
        reached,
        np.array(log.states),
        np.array(log.proprio, np.float32),
        np.array(log.targets, np.float32),
        np.array(log.relative, np.float32),
        np.array(log.clean, bool),
    )
