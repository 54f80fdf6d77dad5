"""Brings a world into an episode's start state.

In PlayTable a drawn start is reached by simulation: an expert may have done another task
before, and a block that is to be placed lies in the hand because an expert has grasped it. For
calvin_env such a start is simulated in PlayTable and carried over.

Also loaded by the world's process of a real-time run, so nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.expert_control import View
from openhelix.benchmarks.calvin.motions import MovingBlock
from openhelix.benchmarks.calvin.sequences import get_sequences, initial_state
from openhelix.benchmarks.calvin.spaces import State
from openhelix.benchmarks.calvin.starts import StartError, begin, carry_over, feasible
from openhelix.benchmarks.evaluation.changing import Change, begin_changing
from openhelix.benchmarks.evaluation.referring import begin as begin_referring
from openhelix.benchmarks.evaluation.suites import Episode
from openhelix.runtime.core.interfaces import F64

DRAWS = 5  # of a start, each with another seed, before an episode is given up
SWITCH_DRAWS = 40  # of one in which either of two tasks can be done


def sequence_start(episode: Episode) -> tuple[F64, F64]:
    """Return robot_obs (15,) and scene_obs (24,) of an episode of CALVIN's chains."""
    assert episode.sequence is not None
    state, _ = get_sequences(episode.sequence + 1)[episode.sequence]
    return initial_state(state, episode.scene)


def draw_start(env: Any, episode: Episode) -> Change | None:
    """Bring a PlayTable into a drawn start; returns the change that is to come, if one is.

    Raises:
        StartError: none was found.
    """
    failed = StartError("no draw")
    for attempt in range(SWITCH_DRAWS if episode.switch_steps else DRAWS):
        rng = np.random.default_rng([*episode.draw, attempt])
        try:
            if episode.changing:
                return begin_changing(env, episode.groups["reference"], episode.tasks[0], rng)
            if "reference" in episode.groups:
                begin_referring(env, episode.groups["reference"], episode.tasks[0], rng)
            else:
                begin(env, episode.tasks[0], rng)
                _both(env, episode)
        except StartError as error:
            failed = error
        else:
            return None
    raise failed


def _both(env: Any, episode: Episode) -> None:
    """Raise StartError if a task that is to be done instead cannot be done from here."""
    possible = feasible(View(env.scene, env.get_info()))
    for task in episode.tasks[1:]:
        if task not in possible:
            raise StartError(f"{task}: not possible where {episode.tasks[0]} is")


class Starts:
    """Remembers drawn starts, so that the search for one is made once for all cells of a sweep.

    Args:
        most: starts that are kept; a kept one takes about as long as the way to it took.
    """

    def __init__(self, most: int = 512) -> None:
        self._most = most
        self._kept: dict[tuple[Any, ...], tuple[State, tuple[Any, ...] | None]] = {}

    def keep(self, episode: Episode, state: State) -> None:
        """Have `episode` begin in a state that somebody else has found."""
        self._kept[self._key(episode)] = (state, None)

    @staticmethod
    def _key(episode: Episode) -> tuple[Any, ...]:
        reference = episode.groups.get("reference")
        return (episode.scene, episode.draw, episode.tasks[0], reference, episode.changing)

    def __call__(self, env: Any, episode: Episode) -> Change | None:
        """As `draw_start`; the world goes on to the same bits."""
        key = self._key(episode)
        if key in self._kept:
            state, about = self._kept[key]
            env.restore(state)
            return None if about is None else Change(env, *about)
        change = draw_start(env, episode)
        if len(self._kept) < self._most:
            self._kept[key] = (env.state(), None if change is None else change.about)
        return change


def stage(
    env: Any, episode: Episode, draw: Callable[[Any, Episode], Change | None] = draw_start
) -> MovingBlock | Change | None:
    """Bring a PlayTable into an episode's start; returns what moves in it, if anything does.

    Args:
        env: the PlayTable.
        episode: what is to begin.
        draw: brings it into a drawn start, see `Starts`.
    """
    env.referee = None
    if episode.sequence is not None:
        env.reset(*sequence_start(episode))
    elif (change := draw(env, episode)) is not None:
        return change
    motion = episode.motion
    if motion is None:
        return None
    return MovingBlock(env, motion.block, motion.pattern, motion.speed_m_s)


def stage_json(env: Any, episode: Mapping[str, Any]) -> MovingBlock | Change | None:
    """`stage` for an episode that came as plain data from another process."""
    return stage(env, Episode.from_json(episode))


def stage_calvin(env: Any, episode: Episode) -> None:
    """Bring calvin_env into an episode's start."""
    if episode.sequence is not None:
        env.reset(*sequence_start(episode))
        return
    with PlayTableEnv(episode.scene, cameras=()) as model:
        draw_start(model, episode)
        carry_over(model, env)
