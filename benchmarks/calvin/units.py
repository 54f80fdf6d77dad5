"""One unit of a collection: one demonstration of every task in one scene.

A unit depends on (seed, scene, number) alone, so units can be collected in any order, by any
number of processes, again after a kill, and the data is the same. Inside a unit tasks follow
one another without a reset wherever the end of one allows the next, as they do when five
instructions are given in a row. What fails is counted and left out.
"""

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

from openhelix.benchmarks.calvin.demonstrations import Demonstration, perform, random_expert
from openhelix.benchmarks.calvin.env import PlayTableEnv
from openhelix.benchmarks.calvin.expert_control import View
from openhelix.benchmarks.calvin.experts import Disturbance
from openhelix.benchmarks.calvin.phrases import choose, training
from openhelix.benchmarks.calvin.starts import StartError, begin, feasible
from openhelix.benchmarks.calvin.tasks import TASK_NAMES
from openhelix.runtime.core.files import BadFile, as_record, parse_object, read_arrays

ARRAYS = ("states", "proprio", "targets", "relative", "clean")
DTYPES = {"states": np.float32, "clean": np.bool_}
WIDTHS = {"states": (36,), "proprio": (9,), "targets": (8,), "relative": (7,), "clean": ()}


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
        BadFile: the file is damaged, or holds other data; the line names it.
    """
    arrays = read_arrays(path)
    text = arrays.pop("about", np.empty(0, np.uint8)).tobytes()
    about = parse_object(text, f"{path}: about")
    stored = as_record(_Unit, about, f"{path}: about")
    _check(path, stored, arrays)
    found, at, seen = [], 0, 0
    for row in stored.demonstrations:
        n = row.steps
        found.append(
            Demonstration(
                task=row.task,
                scene=stored.scene,
                success=True,
                steps=row.success_step,
                states=arrays["states"][seen : seen + n + 1],
                proprio=arrays["proprio"][seen : seen + n + 1],
                targets=arrays["targets"][at : at + n],
                relative=arrays["relative"][at : at + n],
                clean=arrays["clean"][at : at + n],
                instruction=row.instruction,
            )
        )
        at, seen = at + n, seen + n + 1
    return about, found


@dataclass(frozen=True, slots=True)
class _Row:
    """What a unit says of one demonstration."""

    task: str
    steps: int
    success_step: int
    instruction: str


@dataclass(frozen=True, slots=True)
class _Unit:
    """What a unit says of itself."""

    scene: str
    number: int
    demonstrations: tuple[_Row, ...]
    tried: dict[str, int]
    failed: dict[str, int]
    no_start: dict[str, int]


def _check(path: Path, unit: _Unit, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise `BadFile` unless the arrays are those of the demonstrations that a unit lists."""
    for row in unit.demonstrations:
        if row.task not in TASK_NAMES:
            raise BadFile(f"{path}: about: task: {row.task!r} is none")
        if row.steps < 1 or row.success_step > row.steps:
            raise BadFile(f"{path}: about: {row.task}: {row.success_step} of {row.steps} steps")
    steps = sum(row.steps for row in unit.demonstrations)
    states = steps + len(unit.demonstrations)
    for name in ARRAYS if unit.demonstrations else ():
        shape = (states if name in ("states", "proprio") else steps, *WIDTHS[name])
        array = arrays.get(name)
        if array is None:
            raise BadFile(f"{path}: no {name}")
        if array.shape != shape or array.dtype.kind != np.dtype(DTYPES.get(name, "f4")).kind:
            raise BadFile(f"{path}: {name}: {array.dtype}{array.shape}, needs {shape}")
        if not np.isfinite(array).all():
            raise BadFile(f"{path}: {name} has values that are not finite")
