"""`openhelix dagger`: a trained pair acts, and experts label the states it visits.

    openhelix dagger scenes=ABC per_task=5 system1.policy.options.path=checkpoints/mine

Imitation covers only the states experts visit; a policy visits others, and its errors compound.
So the pair is run in training scenes, on the same loop as in evaluation, conditioned on System
2's latents of training sentences. Every few steps an expert takes over in a copy of the world
and completes the task. If it succeeds, its actions label the visited state: the chunk of targets
from there, the next keyposes, the steps left. The pair itself continues from where it was (or,
for a share `beta` of the stretches, the expert does, as DAgger mixes its rounds), so that an
attempt of 60 steps gives about eight labels.

With `led=0.5`, half of the attempts begin where the pair itself has ended another task that leads
there, as they do in a chain: a block held just above the table, or pushed past the drawer.

The result is a collection like `openhelix collect`'s, in the same files and the same training
frames: each attempt is one episode, its frames are the visited states. The same command resumes
it, unit by unit. Overrides of a run's sections (`system1.policy...=`) choose the pair; `openhelix
dagger --help` lists the settings.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
from pydantic import Field, field_validator

from openhelix.benchmarks.calvin.collect import (
    CARD,
    CollectConfig,
    Count,
    Report,
    Share,
    draw,
    make_card,
    missing_units,
    open_folder,
    unit_path,
)
from openhelix.benchmarks.calvin.demonstrations import Demonstration, perform
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.experts import Expert
from openhelix.benchmarks.calvin.phrases import choose, training
from openhelix.benchmarks.calvin.scene import get_scene, is_held_out, scene_names
from openhelix.benchmarks.calvin.spaces import State
from openhelix.benchmarks.calvin.starts import StartError, lead_to
from openhelix.benchmarks.calvin.units import Unit, unit_bytes
from openhelix.benchmarks.evaluation.eval import load_config
from openhelix.benchmarks.evaluation.measurement import AroundPolicy
from openhelix.benchmarks.evaluation.runner import Conditions, Runner, TaskPolicy
from openhelix.benchmarks.evaluation.suites import Episode
from openhelix.runtime.cli import arguments
from openhelix.runtime.cli.arguments import Options
from openhelix.runtime.control.assembly import ControlStack
from openhelix.runtime.core.config import (
    ConfigError,
    RunConfig,
    System1Config,
    System2Config,
    read_settings,
)
from openhelix.runtime.core.files import replace_file
from openhelix.runtime.core.interfaces import (
    ActionChunk,
    Policy,
)
from openhelix.runtime.core.output import answer
from openhelix.runtime.core.paths import cache_folder
from openhelix.runtime.robots.env import EnvRobot

EXPERT_STEPS = 96  # of an expert that takes over; some states are far from any good one
TAIL_STEPS = 3


class DaggerConfig(CollectConfig):
    """One round of DAgger; what `CollectConfig` says of collections holds here too.

    Attributes:
        out: folder; None for `data/dagger_<scenes>` in the cache.
        per_task: attempts per task and scene.
        beta: share of the stretches between two labels in which the expert drives.
        every: environment steps between two labels.
        steps: environment steps an attempt.
        interval: System 2 refreshes every so many steps.
        led: share of the attempts that begin where the student has ended a task before; those
            for which it fails have no labels.
    """

    per_task: Count = 1
    beta: Share = 0.3
    every: Annotated[int, Field(ge=4)] = 8
    steps: Count = 60
    interval: Count = 30
    led: Share = 0.0
    student: dict[str, Any] = Field(default_factory=dict)

    @field_validator("scenes")
    @classmethod
    def _no_held_out_scene(cls, value: str) -> str:
        for name in scene_names(value):
            if is_held_out(get_scene(name)):
                raise ValueError(f"{name} is held out; nothing is learned from it")
        return value

    @property
    def folder(self) -> Path:
        """Where the collection goes."""
        return self.out or cache_folder() / "data" / f"dagger_{self.scenes}"

    def identity(self) -> dict[str, Any]:
        """What must agree for a folder to be continued."""
        own = {key: getattr(self, key) for key in ("beta", "every", "steps", "interval", "student")}
        led = {"led": self.led} if self.led else {}
        return {**super().identity(), "format": "dagger", **own, **led}


class Labeller:
    """Labels the states of one attempt.

    Args:
        config: of the round.
        scene: its name.

    Attributes:
        tried, failed: labels asked for, and those for which the expert did not succeed.
    """

    def __init__(self, config: DaggerConfig, scene: str) -> None:
        self.config, self.scene = config, scene
        self._copy = PlayTableEnv(scene, cameras=())
        self.tried: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.found: list[tuple[Demonstration, int]] = []

    def begin(
        self,
        env: PlayTableEnv,
        task: str,
        rng: np.random.Generator,
        told: Callable[[], str],
    ) -> None:
        """A new attempt at `task`, from the state of `env`.

        Args:
            env: the student's world.
            task: what is labelled.
            rng: decides who drives.
            told: what the student is doing; the attempt begins when it comes to this task.
        """
        self._env, self._task, self._rng = env, task, rng
        self._told, self.found = told, []
        self._begun = False

    def _set_out(self) -> None:
        self._begun = True
        self._start = self._now = self._env.get_info()
        self._before: Mapping[str, Any] | None = None
        self._steps = self._due = 0
        self._driven: tuple[int, Demonstration] | None = None

    def step(self, _: object) -> None:
        """After every control tick."""
        if self._begun:
            self._steps += 1
            self._before, self._now = self._now, self._env.get_info()

    def lead(self, task: str, rng: np.random.Generator) -> tuple[str, State]:
        """Return another task, after which `task` can be done, and a state to begin it in.

        Raises:
            StartError: none was found.
        """
        return lead_to(self._copy, task, rng), self._copy.state()

    def close(self) -> None:
        """Release the copy of the world."""
        self._copy.close()

    def visit(self, chunk: ActionChunk) -> ActionChunk:
        """The student plans `chunk` here: label the state if due; return what is to be done."""
        if not self._begun:
            if self._told() != self._task:
                return chunk
            self._set_out()
        if self._steps >= self._due:
            self._due = self._steps + self.config.every
            drives = self._rng.uniform() < self.config.beta
            label = self._label()
            self._driven = (self._steps, label) if drives and label is not None else None
        if self._driven is None:
            return chunk
        since, label = self._driven
        return chunk_of(label, self._steps - since, chunk)

    def _label(self) -> Demonstration | None:
        """What an expert does from here; None if it does not succeed."""
        copy = self._copy
        copy.restore(self._env.state())
        info = copy.get_info()
        expert = Expert(self._task, self.scene, info, start=self._start, before=self._before)
        done = perform(copy, expert, EXPERT_STEPS, record=True, tail=TAIL_STEPS, start=self._start)
        self.tried[self._task] += 1
        if not done.success:
            self.failed[self._task] += 1
            return None
        self.found.append((done, self._steps))
        return done


def chunk_of(label: Demonstration, offset: int, like: ActionChunk) -> ActionChunk:
    """A label's targets from step `offset` on, as a chunk that replaces `like`."""
    rows = np.minimum(offset + np.arange(len(like.poses)), len(label.targets) - 1)
    targets = label.targets[rows].astype(np.float64)
    return replace(like, poses=targets[:, :7], gripper=targets[:, 7])


class LabelledPolicy(AroundPolicy):
    """The student, whose every plan passes by the labeller."""

    labeller: Labeller | None = None

    def set_task(self, task: int) -> None:
        """For a student without System 2."""
        self.inner.set_task(task)

    def passed(self, chunk: ActionChunk) -> ActionChunk:
        return chunk if self.labeller is None else self.labeller.visit(chunk)


class DaggerRunner(Runner):
    """Runs attempts as the evaluation does, and has them labelled."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        if isinstance(self._policy, TaskPolicy):
            self._student = LabelledPolicy(self._policy.inner)
            self._policy.inner = self._student
        else:
            self._student = LabelledPolicy(self._policy)
            self._policy = cast(Policy, self._student)

    def attempt(
        self,
        episode: Episode,
        conditions: Conditions,
        labeller: Labeller,
        state: State | None = None,
    ) -> str | None:
        """Run one attempt; its labels are the labeller's. Returns what went wrong, if it did.

        Args:
            episode: one task, or two, of which the last is labelled.
            conditions: how it is run.
            labeller: labels it.
            state: to begin in; None draws one for the first task.
        """
        self._student.labeller = labeller
        if state is not None:
            self._starts.keep(episode, state)
        result = self.run(episode, conditions).result
        return str(result["error"]) if result["error"] else None

    def leave(self, scene: str) -> None:
        """Close the world of a scene that is done with."""
        self._discard(scene)

    def _stack(self, robot: EnvRobot, episode: Episode, conditions: Conditions) -> ControlStack:
        stack = super()._stack(robot, episode, conditions)
        labeller = self._student.labeller
        assert labeller is not None
        rng = np.random.default_rng([episode.seed, 1])
        runner = stack.episode_runner

        def told() -> str:
            return runner.current.task if runner.current else ""

        robot.prepare_world(lambda env: labeller.begin(env, episode.tasks[-1], rng, told))
        stack.loop.subscribers.append(labeller.step)
        return stack


def label_unit(config: DaggerConfig, scene: str, number: int, runner: DaggerRunner) -> Unit:
    """One attempt at every task in one scene, labelled."""
    unit, labeller = Unit(scene, number), Labeller(config, scene)
    conditions = Conditions(config.steps, config.interval)
    rng = np.random.default_rng([zlib.crc32(f"dagger {scene}".encode()), config.seed, number])
    try:
        for rollout, task in enumerate(config.tasks):
            key = f"{scene}/{task}/{number}"
            said = choose(training(), task, rng)
            seed = zlib.crc32(f"{config.seed} {key}".encode())
            draw_seed = (zlib.crc32(f"dagger {key}".encode()), config.seed)
            tasks: tuple[str, ...] = (task,)
            words: tuple[str, ...] = (said,)
            state: State | None = None
            ahead = np.random.default_rng([*draw_seed, 1])
            if ahead.uniform() < config.led:
                try:
                    before, state = labeller.lead(task, ahead)
                except StartError:
                    unit.no_start[task] += 1
                    continue
                tasks = (before, task)
                words = (choose(training(), before, ahead), said)
            episode = Episode(rollout, key, scene, tasks, words, seed, draw=draw_seed)
            error = runner.attempt(episode, conditions, labeller, state)
            if error is not None and error.startswith("StartError"):
                unit.no_start[task] += 1
                continue
            if error is not None:
                raise RuntimeError(f"{key}: {error}")
            for place, (label, step) in enumerate(labeller.found):
                unit.demonstrations.append(label)
                unit.origin.append(
                    {
                        "instruction": said,
                        "chain": place,
                        "disturbed": False,
                        "rollout": rollout,
                        "at": step,
                        "draw": config.every,
                    }
                )
    finally:
        labeller.close()
        runner.leave(scene)
    unit.tried, unit.failed = labeller.tried, labeller.failed
    return unit


def dagger(config: DaggerConfig, run: RunConfig, report: Report | None = None) -> dict[str, Any]:
    """Label what is missing, draw the frames; return the card.

    Raises:
        ConfigError: the folder cannot be used.
        RuntimeError: an attempt broke off.
    """
    folder, begun = open_folder(config), time.monotonic()
    todo = missing_units(config, folder)
    if todo:
        runner = DaggerRunner(run)
        try:
            for done, (scene, number) in enumerate(todo, 1):
                unit = label_unit(config, scene, number, runner)
                replace_file(unit_path(folder, scene, number), unit_bytes(unit))
                if report is not None:
                    report(done, len(todo), f"{len(unit.demonstrations)} labels")
        finally:
            runner.close()
    card = make_card(folder, config.identity())
    card["what"] = "states that a trained pair visited, each with what an expert does from there"
    card["labels"] = card.pop("demonstrations")
    card["wall_s"], card["new_units"] = round(time.monotonic() - begun, 1), len(todo)
    if config.frames.every:
        card |= draw(config, report)
    replace_file(folder / CARD, json.dumps(card, indent=1).encode())
    return card


def student_of(run: RunConfig) -> dict[str, Any]:
    """What the student is: its parts, and a digest of the weights that they name."""
    parts = {"policy": run.system1.policy, "engine": run.system2.engine}
    found: dict[str, Any] = {}
    for name, part in parts.items():
        described = part.model_dump(mode="json")
        for value in list(described["options"].values()):
            path = Path(str(value)) / "model.safetensors"
            path = path if path.is_file() else Path(str(value))
            if path.is_file():
                described["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        found[name] = described
    return found


class _Settings(DaggerConfig):
    """What may be written on the command line: the round, and the two systems that act in it."""

    system1: System1Config = System1Config()
    system2: System2Config = System2Config()


def parse(argv: Sequence[str]) -> tuple[DaggerConfig, RunConfig, bool]:
    """The round, the run that the student acts in, and whether to print JSON.

    Raises:
        ConfigError: in one line, the field and what is valid.
    """
    options, words = arguments.parse("dagger", Options, argv, __doc__ or "", _Settings)
    of_run = [word for word in words if word.partition(".")[0] in ("system1", "system2")]
    own = [word for word in words if word not in of_run]
    if any(word.partition("=")[0].partition(".")[0] == "student" for word in own):
        raise ConfigError("student: is described by system1.policy...= and system2.engine...=")
    config = read_settings(DaggerConfig, options.config, own)
    if config.format != "states":
        raise ConfigError(f"format: {config.format!r}; labels are kept as states")
    run = load_config(of_run, scene=config.scene_list[0])
    return config.model_copy(update={"student": student_of(run)}), run, options.as_json


def main(argv: Sequence[str]) -> int:
    """Have experts label the states that a trained pair visits.

    Raises:
        ConfigError: bad input, in one line; nothing was written.
    """
    config, run, as_json = parse(argv)
    begun = time.monotonic()

    def report(done: int, total: int, what: str) -> None:
        left = (time.monotonic() - begun) / done * (total - done)
        sys.stderr.write(f"{done} of {total}: {what}, {left:.0f} s to go\n")

    card = dagger(config, run, report)
    brief = {k: v for k, v in card.items() if k != "files"} | {"folder": str(config.folder)}
    answer(json.dumps(brief, indent=None if as_json else 1))
    return 0
