"""Evaluation suites as lists of episodes.

An episode is plain data, made from the suite's settings and one seed alone, so any process
can run any episode, in any order, and get the same result. Suites differ only in how the list
is made:

    tasks     single tasks from random starts in which they can be done
    calvin    CALVIN's five-task chains, from CALVIN's own layouts
    calvin-e  the same chains with paraphrased instructions (CALVIN-E)
    calvin-d  grasping blocks that move (CALVIN-D), every lift task and pattern
    calvin-r  sentences that need the image (CALVIN-R), every reference and what it can mean,
              at the start or, `changing`, after what is meant has changed on the way
    switch    a task whose sentence is replaced by another one on the way; the second counts

The static pattern of calvin-d is its control: the same starts, nothing moves.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin import phrases
from openhelix.benchmarks.calvin.motions import PATTERNS, PRESETS, speed_m_s
from openhelix.benchmarks.calvin.scene import get_scene
from openhelix.benchmarks.calvin.sequences import N_SEQUENCES, get_sequences, layout_seed
from openhelix.benchmarks.calvin.tasks import TASK_NAMES, TASKS, get_task
from openhelix.benchmarks.evaluation.referring import referred
from openhelix.runtime.control.episodes import Assignment
from openhelix.runtime.core import plugins
from openhelix.runtime.core.plugins import none_of

SUITES = ("tasks", "calvin", "calvin-e", "calvin-d", "calvin-r", "switch")
CHAINS = ("calvin", "calvin-e")  # scored by tasks in a row, not by success
GRASP_TASKS = tuple(name for name, task in TASKS.items() if task.family == "lift")
# Of "switch": what can be interrupted, and what can be done instead, whatever the hand holds.
BEGUN = tuple(name for name in TASK_NAMES if not name.startswith(("place_in", "stack", "unstack")))
FIXTURES: Mapping[str, tuple[str, ...]] = {
    "slider": ("move_slider_left", "move_slider_right"),
    "drawer": ("open_drawer", "close_drawer"),
    "lightbulb": ("turn_on_lightbulb", "turn_off_lightbulb"),
    "led": ("turn_on_led", "turn_off_led"),
}
SWITCH_STEPS = (8, 30)  # environment steps after which the second sentence comes


class SuiteError(ValueError):
    """A suite that cannot be made; the message names the option and what is valid."""


@dataclass(frozen=True, slots=True)
class Motion:
    """A block that moves until it is touched; see `openhelix.benchmarks.calvin.motions`."""

    block: str  # "block_red", ...
    pattern: str
    speed_m_s: float


@dataclass(frozen=True, slots=True)
class Episode:
    """One attempt at a task, or at a chain of tasks.

    Attributes:
        index: place in the suite's list.
        key: says what it is; two evaluations are paired by it.
        scene: "A" to "D", "R0", ...
        tasks: in order; the attempt ends at the first failure.
        instructions: one per task.
        seed: of the policy's randomness.
        sequence: CALVIN's sequence that it starts from; None for a drawn start.
        draw: seed of a drawn start.
        motion: of the block to grasp.
        changing: whether what the sentence means comes to be the task on the way.
        switch_steps: environment steps after which the last sentence takes the place of the one
            before, whatever has become of that; the last task alone counts. 0: there is no such.
        groups: what results are grouped by, besides task and scene.
    """

    index: int
    key: str
    scene: str
    tasks: tuple[str, ...]
    instructions: tuple[str, ...]
    seed: int
    sequence: int | None = None
    draw: tuple[int, ...] = ()
    motion: Motion | None = None
    changing: bool = False
    switch_steps: int = 0
    groups: Mapping[str, str] = field(default_factory=dict)

    @property
    def start(self) -> str:
        """The state that it begins in, by a name: episodes of one start are no two trials.

        The motions of calvin-d share their starts; so do chains that CALVIN begins alike.
        """
        if self.sequence is None:
            return f"{self.scene}/{'-'.join(map(str, self.draw))}"
        state, _ = get_sequences(self.sequence + 1)[self.sequence]
        return f"{self.scene}/{layout_seed(state):08x}"

    @property
    def uncounted(self) -> int:
        """How many of the tasks, from the first on, are not what it is scored on."""
        return len(self.tasks) - 1 if self.switch_steps else 0

    @property
    def assignments(self) -> tuple[Assignment, ...]:
        """What the robot is told, in order."""
        steps = [self.switch_steps] * self.uncounted + [0] * len(self.tasks)
        return tuple(
            Assignment(task, said, replaced_after=after)
            for task, said, after in zip(self.tasks, self.instructions, steps, strict=False)
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Episode:
        """Read `to_json`'s output."""
        values = dict(data)
        for name in ("tasks", "instructions", "draw"):
            values[name] = tuple(values[name])
        if values["motion"] is not None:
            values["motion"] = Motion(**values["motion"])
        return Episode(**values)


@dataclass(frozen=True, slots=True)
class Suite:
    """What to make episodes of.

    Attributes:
        name: one of `SUITES`.
        world: a name of the group `openhelix.worlds`.
        scenes: one or more of A to D, R0, R1, ...
        count: sequences of a chain suite (the first of CALVIN's 1000); else episodes for each
            task, and for each pattern and speed of calvin-d.
        seed: of starts, wording and the policy's noise.
        tasks: which tasks of "tasks" or "calvin-d", or which to begin with of "switch"; () for all.
        patterns, speeds: of calvin-d; speeds are names of `motions.PRESETS` or m/s.
        phrases: of calvin-e: "seen", "unseen", "all", or a file `{task: [sentence]}`.
        changing: of calvin-r: what a sentence means changes on the way; see `changing.py`.
        plain: of calvin-r: each start's task is told by its own plain sentence, which leaves
            nothing to be looked for. The same keys, starts and noise, so the two are paired.
    """

    name: str
    world: str = "playtable"
    scenes: tuple[str, ...] = ("D",)
    count: int = 10
    seed: int = 0
    tasks: tuple[str, ...] = ()
    patterns: tuple[str, ...] = PATTERNS
    speeds: tuple[str, ...] = ("paper",)
    phrases: str = "unseen"
    changing: bool = False
    plain: bool = False

    def __post_init__(self) -> None:
        if self.name not in SUITES:
            raise SuiteError(f"--suite: {none_of(self.name, SUITES)}")
        worlds = plugins.entries(plugins.WORLDS)
        if self.world not in worlds:
            raise SuiteError(
                f"--world: no world {self.world!r}; {plugins.nearest(self.world, worlds)}"
            )
        if self.name == "calvin-d" and self.world != "playtable":
            raise SuiteError("--world: calvin-d needs playtable; calvin_env's blocks cannot move")
        if self.changing and self.world != "playtable":
            raise SuiteError("--world: --changing needs playtable; nobody can meddle in calvin_env")
        if self.changing and self.plain:
            raise SuiteError("--plain: not with --changing, which soon makes plain words wrong")
        if not self.scenes or len(set(self.scenes)) < len(self.scenes):
            raise SuiteError(
                f"--scene: {''.join(self.scenes)!r} is not one or more scenes, each once"
            )
        for scene in self.scenes:
            if get_scene(scene).variant is not None and self.world != "playtable":
                raise SuiteError(f"--scene: {scene} needs playtable; {self.world} has A to D")
        limit = N_SEQUENCES if self.is_chain else 100_000
        what = "--sequences" if self.is_chain else "--episodes-per-task"
        if not 1 <= self.count <= limit:
            raise SuiteError(f"{what}: {self.count} is not between 1 and {limit}")
        if self.seed < 0:
            raise SuiteError(f"--seed: {self.seed} is negative")
        self._check_choices()

    def _check_choices(self) -> None:
        valid = {"calvin-d": GRASP_TASKS, "switch": BEGUN}.get(self.name, TASK_NAMES)
        for task in self.tasks:
            if self.is_chain:
                raise SuiteError(f"--tasks: {self.name} is made of CALVIN's chains; leave it out")
            if task not in valid:
                raise SuiteError(f"--tasks: {none_of(task, valid)}")
        for pattern in self.patterns:
            if pattern not in PATTERNS:
                raise SuiteError(f"--patterns: {none_of(pattern, PATTERNS)}")
        for speed in self.speeds:
            _speed("left", speed)
        if self.name == "calvin-e":
            self.sentences()

    @property
    def is_chain(self) -> bool:
        """Whether it is scored by tasks in a row."""
        return self.name in CHAINS

    def identity(self) -> dict[str, Any]:
        """Return what shapes the list of episodes, as plain data."""
        data = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        for name, suite in (
            ("patterns", "calvin-d"),
            ("speeds", "calvin-d"),
            ("phrases", "calvin-e"),
            ("changing", "calvin-r"),
            ("plain", "calvin-r"),
        ):
            if self.name != suite:
                del data[name]
        if self.name == "calvin-e":
            # A file of the same name may say something else tomorrow.
            text = json.dumps({k: list(v) for k, v in self.sentences().items()}, sort_keys=True)
            data["phrases_sha256"] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return data

    def sentences(self) -> Mapping[str, tuple[str, ...]]:
        """Return the wordings that this suite draws from, by task.

        Raises:
            SuiteError: a file that cannot be used, or that lacks a task.
        """
        if self.name != "calvin-e":
            return phrases.validation()
        if self.phrases in phrases.SPLITS:
            found = phrases.calvin_e(self.phrases)
        else:
            try:
                found = phrases.load(self.phrases)
            except phrases.PhraseError as error:
                raise SuiteError(f"--phrases: {error}") from None
        missing = [name for name in TASK_NAMES if name not in found]
        if missing:
            raise SuiteError(f"--phrases: {self.phrases} has no sentence for {missing[0]}")
        return found

    def episodes(self) -> list[Episode]:
        """Return the list; the same settings give the same list."""
        make = {
            "tasks": self._single,
            "calvin-d": self._moving,
            "calvin-r": self._referred,
            "switch": self._switched,
        }
        return make.get(self.name, self._chains)()

    def _referred(self) -> list[Episode]:
        found = referred(self.scenes, self.count, self.seed)
        chosen = [r for r in found if not self.tasks or r.task in self.tasks]
        return [
            Episode(
                index=index,
                key=r.key,
                scene=r.scene,
                tasks=(r.task,),
                instructions=(get_task(r.task).sentence if self.plain else r.sentence,),
                seed=_seed(self.seed, r.key),
                draw=r.draw,
                changing=self.changing,
                groups={"reference": r.reference},
            )
            for index, r in enumerate(chosen)
        ]

    def _single(self) -> list[Episode]:
        episodes: list[Episode] = []
        for scene in self.scenes:
            for n in range(self.count):
                for task in self.tasks or TASK_NAMES:
                    episodes.append(self._drawn(len(episodes), scene, task, n))
        return episodes

    def _switched(self) -> list[Episode]:
        episodes: list[Episode] = []
        for scene in self.scenes:
            for n in range(self.count):
                for first in self.tasks or BEGUN:
                    key = f"{scene}/{first}/{n}"
                    draw = (zlib.crc32(f"switch {key}".encode()), self.seed)
                    rng = np.random.default_rng(draw)
                    others = [name for name in FIXTURES if name not in first]
                    second = str(rng.choice(FIXTURES[str(rng.choice(others))]))
                    episodes.append(
                        Episode(
                            index=len(episodes),
                            key=key,
                            scene=scene,
                            tasks=(first, second),
                            instructions=(get_task(first).sentence, get_task(second).sentence),
                            seed=_seed(self.seed, f"switch {key}"),
                            draw=draw,
                            switch_steps=int(rng.integers(SWITCH_STEPS[0], SWITCH_STEPS[1] + 1)),
                            groups={"begun": TASKS[first].family},
                        )
                    )
        return episodes

    def _moving(self) -> list[Episode]:
        episodes: list[Episode] = []
        for scene in self.scenes:
            for n in range(self.count):
                for task in self.tasks or GRASP_TASKS:
                    for pattern in self.patterns:
                        # Nothing moves at any speed of the static pattern: once is enough.
                        for speed in self.speeds[:1] if pattern == "static" else self.speeds:
                            episodes.append(
                                self._drawn(len(episodes), scene, task, n, pattern, speed)
                            )
        return episodes

    def _drawn(
        self, index: int, scene: str, task: str, n: int, pattern: str = "", speed: str = ""
    ) -> Episode:
        key, motion, groups = f"{scene}/{task}/{n}", None, {}
        # All patterns of one number share a start, so that they can be compared in pairs.
        draw = (zlib.crc32(key.encode()), self.seed)
        if pattern:
            still = pattern == "static"
            key += f"/{pattern}" + ("" if still else f"/{speed}")
            motion = Motion(TASKS[task].target, pattern, _speed(pattern, speed))
            groups = {"pattern": pattern, "speed": "0" if still else speed}
            groups["motion"] = pattern if still else f"{pattern} {speed}"
        return Episode(
            index=index,
            key=key,
            scene=scene,
            tasks=(task,),
            instructions=(get_task(task).sentence,),
            seed=_seed(self.seed, key),
            draw=draw,
            motion=motion,
            groups=groups,
        )

    def _chains(self) -> list[Episode]:
        sentences = self.sentences()
        episodes: list[Episode] = []
        for scene in self.scenes:
            for number, (_, tasks) in enumerate(get_sequences(self.count)):
                key = f"{scene}/{number}"
                rng = np.random.default_rng([zlib.crc32(key.encode()), self.seed])
                said = tuple(phrases.choose(sentences, task, rng) for task in tasks)
                seed = _seed(self.seed, key)
                episodes.append(
                    Episode(len(episodes), key, scene, tasks, said, seed, sequence=number)
                )
        return episodes


def _seed(seed: int, key: str) -> int:
    return zlib.crc32(f"{seed} {key}".encode())


def _speed(pattern: str, speed: str) -> float:
    """Return m/s of a preset's name or of a number."""
    if speed in PRESETS:
        return speed_m_s(pattern, speed)
    try:
        value = float(speed)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 0.5:
        raise SuiteError(f"--speeds: {speed!r} is none of {', '.join(PRESETS)}, nor 0 to 0.5 m/s")
    return value


def spread(episodes: Sequence[Episode], count: int) -> set[int]:
    """Return the indices of `count` episodes, evenly spread over the list."""
    if count <= 0 or not episodes:
        return set()
    picked = np.linspace(0, len(episodes) - 1, min(count, len(episodes)))
    return {episodes[round(float(i))].index for i in picked}
