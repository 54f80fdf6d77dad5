"""Running an expert and keeping what it did: one demonstration as plain arrays."""

from __future__ import annotations

import io
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.expert_control import Variation, View
from openhelix.benchmarks.calvin.experts import MAX_STEPS, Disturbance, Expert, Move
from openhelix.benchmarks.calvin.phrases import choose, training
from openhelix.benchmarks.calvin.starts import StartError, begin, feasible
from openhelix.benchmarks.calvin.tasks import is_completed
from openhelix.runtime.core.types import F32, F64

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


# ------------------------------------------------------------------------------------------------
# One unit of a collection: one demonstration of every task in one scene.
#
# A unit depends on (seed, scene, number) alone, so units can be collected in any order, by any
# number of processes, again after a kill, and the data is the same. Inside a unit tasks follow
# one another without a reset wherever the end of one allows the next, as they do when five
# instructions are given in a row. What fails is counted and left out.


ARRAYS = ("states", "proprio", "targets", "relative", "clean")
DTYPES = {"states": np.float32, "clean": np.bool_}


@dataclass(slots=True)
class Unit:
    """Demonstrations with where they came from, and what was tried in vain."""

    scene: str
    number: int
    demonstrations: list[Demonstration] = field(default_factory=list)
    origin: list[dict[str, Any]] = field(default_factory=list)
    tried: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    no_start: Counter[str] = field(default_factory=Counter)


def collect_unit(
    scene: str,
    number: int,
    tasks: Sequence[str],
    seed: int,
    disturbed: float = 0.4,
    chain: int = 5,
) -> Unit:
    """Collect one unit: one demonstration of each task, as far as starts can be found."""
    rng = np.random.default_rng([zlib.crc32(scene.encode()), seed, number])
    unit, wanted = Unit(scene, number), list(tasks)
    given_up = Counter[str]()
    with PlayTableEnv(scene, cameras=()) as env:
        while wanted:
            task = str(rng.choice(wanted))
            try:
                begin(env, task, rng)
            except StartError:
                unit.no_start[task] += 1
                wanted.remove(task)
                continue
            before = len(unit.demonstrations)
            _chain(env, unit, task, wanted, rng, disturbed, chain)
            if len(unit.demonstrations) == before:
                given_up[task] += 1
                if given_up[task] == 8:
                    wanted.remove(task)
    return unit


def _chain(
    env: PlayTableEnv,
    unit: Unit,
    task: str,
    wanted: list[str],
    rng: np.random.Generator,
    disturbed: float,
    chain: int,
) -> None:
    """Do `task`, then whatever is still wanted and possible, without a reset."""
    for place in range(chain):
        push = Disturbance.random(rng) if rng.uniform() < disturbed else None
        expert = random_expert(env, task, rng)
        # Half of the time the next task begins at once, as it does in an evaluation.
        tail = int(rng.integers(1, 6)) if rng.uniform() < 0.5 else 0
        done = perform(env, expert, disturbance=push, record=True, tail=tail)
        unit.tried[task] += 1
        if not done.success:
            unit.failed[task] += 1
            return
        unit.demonstrations.append(done)
        unit.origin.append(
            {
                "instruction": choose(training(), task, rng),
                "chain": place,
                "disturbed": push is not None,
            }
        )
        wanted.remove(task)
        possible = [t for t in feasible(View(env.scene, env.get_info())) if t in wanted]
        if not possible:
            return
        task = str(rng.choice(possible))


def unit_bytes(unit: Unit) -> bytes:
    """A unit as the content of a `.npz`: arrays end to end, the rest as JSON."""
    rows = [
        {
            "task": d.task,
            "success_step": d.steps,
            "steps": len(d.targets),
            **origin,
        }
        for d, origin in zip(unit.demonstrations, unit.origin, strict=True)
    ]
    about = {
        "scene": unit.scene,
        "number": unit.number,
        "demonstrations": rows,
        "tried": dict(unit.tried),
        "failed": dict(unit.failed),
        "no_start": dict(unit.no_start),
    }
    arrays = {
        name: np.concatenate([getattr(d, name) for d in unit.demonstrations]).astype(
            DTYPES.get(name, np.float32)
        )
        for name in ARRAYS
        if unit.demonstrations
    }
    stream = io.BytesIO()
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez_compressed(stream, about=text, **arrays)
    return stream.getvalue()


def read_unit(path: Path) -> tuple[dict[str, Any], list[Demonstration]]:
    """Read what `unit_bytes` wrote.

    Returns:
        What the unit says of itself, and its demonstrations.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            about = json.loads(stored["about"].tobytes())
            arrays = {name: stored[name] for name in ARRAYS if name in stored.files}
    except (OSError, EOFError, KeyError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    found, at, seen = [], 0, 0
    for row in about["demonstrations"]:
        n = row["steps"]
        found.append(
            Demonstration(
                task=row["task"],
                scene=about["scene"],
                success=True,
                steps=row["success_step"],
                states=arrays["states"][seen : seen + n + 1],
                proprio=arrays["proprio"][seen : seen + n + 1],
                targets=arrays["targets"][at : at + n],
                relative=arrays["relative"][at : at + n],
                clean=arrays["clean"][at : at + n],
                instruction=row["instruction"],
            )
        )
        at, seen = at + n, seen + n + 1
    return about, found
