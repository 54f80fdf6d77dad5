"""A small System 1 and System 2 that evaluate in milliseconds, for tests."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin.tasks import TASKS
from openhelix.benchmarks.evaluation.evaluation import Evaluation
from openhelix.benchmarks.evaluation.runner import Conditions
from openhelix.benchmarks.evaluation.suites import Suite
from openhelix.runtime.core.config import RunConfig, load
from openhelix.runtime.core.interfaces import Judgement
from openhelix.runtime.robots.fake import PointEngine
from tests.fakes import LATENT, ReachPolicy

BUTTON = (-0.12, -0.12, 0.46)  # in scene D; a tool that goes there presses the LED's button
CAMERAS = "[[static, 200, 200], [gripper, 84, 84]]"


class WordEngine(PointEngine):
    """A sentence of the LED leads to its button, any other to a point made from its letters.

    The point moves by up to a millimetre with the image, so that a wrong image is noticed.

    Args:
        deadly: the process ends at this sentence.
        broken: an error is raised at this one.
        hang_once: never answers, unless this path exists; makes it first.
        hang_at: does so at this sentence only, and whatever exists.
    """

    def __init__(
        self, deadly: str = "", broken: str = "", hang_once: str = "", hang_at: str = ""
    ) -> None:
        super().__init__()
        self._deadly, self._broken = deadly, broken
        self._hang_once, self._hang_at = hang_once, hang_at

    def encode(self, images: Sequence[Any], instructions: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(instructions), 1, LATENT.dim), np.float32)
        for row, image, text in zip(rows, images, instructions, strict=True):
            if text == self._deadly:
                os._exit(9)
            if self._hang_at and text == self._hang_at:
                time.sleep(3600)
            if self._hang_once and not self._hang_at and not Path(self._hang_once).exists():
                Path(self._hang_once).touch()
                time.sleep(3600)
            if text == self._broken:
                raise ValueError("instruction: broken as configured")
            if text == TASKS["turn_on_led"].sentence:
                row[0, :3] = BUTTON
            else:
                rng = np.random.default_rng(zlib.crc32(text.encode()))
                row[0, :3] = rng.uniform((-0.2, -0.3, 0.5), (0.3, -0.1, 0.6))
            row[0, :3] += 1e-3 * float(np.mean(image)) / 255
        return rows


class DoubtingEngine(WordEngine):
    """Judges by latents: one that it gave for that sentence is refused."""

    judges_latents = True

    def judge(self, instructions: Sequence[str], latents: np.ndarray) -> list[Judgement]:
        words = self.encode([np.zeros((8, 8, 3), np.uint8)] * len(instructions), instructions)
        return [
            Judgement(0.1, True) if np.allclose(z, word, atol=2e-3) else Judgement()
            for z, word in zip(latents, words, strict=True)
        ]


class TaskReach(ReachPolicy):
    """Without System 2: told the number of its task, it goes to the LED's button for one."""

    def __init__(self) -> None:
        super().__init__(cameras=[("static", 200, 200), ("gripper", 84, 84)])
        self.spec = type(self.spec)(self.spec.cameras, None, self.spec.action, self.spec.horizon)
        self.told: list[int] = []
        self._task = -1

    def set_task(self, task: int) -> None:
        self.told.append(task)
        self._task = task

    def act(self, observation, latents):
        from openhelix.runtime.core.interfaces import LatentGoal

        assert not latents
        goal = BUTTON if list(TASKS)[self._task] == "turn_on_led" else (0.1, -0.2, 0.55)
        z = np.array([[*goal]], np.float32)
        return super().act(observation, [LatentGoal(z, 0, observation.instruction_id, 0, 0, "")])


def small_config(*overrides: str) -> RunConfig:
    """Return a configuration with the small parts."""
    return load(
        None,
        [
            "control.clock=lockstep",
            f"system1.policy={{target: 'tests.fakes:ReachPolicy', options: {{cameras: {CAMERAS}}}}}",
            "system2.engine={target: 'tests.evaluation.small:WordEngine', options: {}}",
            *overrides,
        ],
    )


def small_plan(
    suite: Suite, steps: int = 12, interval: int = 10, latency: int = 0, drift: bool = False
) -> Evaluation:
    """Return an evaluation of the small parts."""
    return Evaluation(suite, Conditions(steps, interval, latency, drift), small_config())


def untimed(results):
    """Return results without what depends on the machine."""
    return [{k: v for k, v in r.items() if k != "timing"} for r in results]
