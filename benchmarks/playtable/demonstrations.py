"""Running an expert and keeping what it did: one demonstration as plain arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.playtable.env import PlayTableEnv
from benchmarks.playtable.expert_control import Variation
from benchmarks.playtable.experts import MAX_STEPS, Disturbance, Expert, Move
from benchmarks.playtable.tasks import is_completed
from runtime.types import F32, F64

TAIL_STEPS = 3  # recorded after success, so that the last targets have a future


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What an expert did; row t is seen before, and row t of the targets sent at, step t.

    Attributes:
        task, scene: names.
        success: whether the oracle said so.
        steps: first step after which the oracle was true; -1 if never.
        states: (T + 1, 36) f64 visual states.
        proprio: (T + 1, 9) f32 TCP position m, quaternion xyzw, width m, gripper +-1.
        targets: (T, 8) f32 intended target position m, quaternion xyzw, gripper +-1.
        relative: (T, 7) f32 CALVIN's relative actions.
        clean: (T,) bool, whether what was executed is what was intended.
        robot_obs, scene_obs: (T + 1, 15), (T + 1, 24) f64 as calvin_env's.
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
    robot_obs: F64
    scene_obs: F64


def random_expert(env: PlayTableEnv, task: str, rng: np.random.Generator) -> Expert:
    """An expert for `task` from the state of `env`, with a variation drawn from `rng`."""
    return Expert(task, env.scene, env.get_info(), Variation.random(rng))


class _Log:
    """Rows of a demonstration as they come."""

    def __init__(self) -> None:
        self.states: list[F64] = []
        self.robot_obs: list[F64] = []
        self.scene_obs: list[F64] = []
        self.proprio: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.relative: list[F64] = []
        self.clean: list[bool] = []

    def see(self, env: PlayTableEnv) -> None:
        self.states.append(env.visual_state())
        obs = env.get_state_obs()
        self.robot_obs.append(obs["robot_obs"])
        self.scene_obs.append(obs["scene_obs"])
        position, quaternion = env.robot.tcp()
        width, gripper = obs["robot_obs"][6], obs["robot_obs"][14]
        self.proprio.append(np.array([*position, *quaternion, width, gripper]))

    def did(self, move: Move, clean: bool) -> None:
        self.targets.append(np.array([*move.position, *move.quaternion, move.gripper]))
        self.relative.append(move.relative)
        self.clean.append(clean)


def perform(
    env: PlayTableEnv,
    expert: Expert,
    max_steps: int = MAX_STEPS,
    disturbance: Disturbance | None = None,
    record: bool = False,
) -> Demonstration:
    """Let an expert do its task; stop a few steps after success.

    Args:
        env: in the state that the expert was made for.
        expert: the expert.
        max_steps: give up after so many steps.
        disturbance: a push on the arm, if any.
        record: keep states and observations (otherwise only the outcome).
    """
    name = expert.task.name
    start: dict[str, Any] = env.get_info()
    info, log, reached = start, _Log(), -1
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
        if reached >= 0 and (step + 1 >= reached + TAIL_STEPS or expert.finished):
            break
    ok = reached >= 0 and is_completed(name, start, info)
    return Demonstration(
        name,
        env.scene.name,
        ok,
        reached,
        np.array(log.states),
        np.array(log.proprio, np.float32),
        np.array(log.targets, np.float32),
        np.array(log.relative, np.float32),
        np.array(log.clean, bool),
        np.array(log.robot_obs),
        np.array(log.scene_obs),
    )
