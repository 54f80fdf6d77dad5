"""`openhelix gate`: fit the gate of `system2.trigger=learned` to a pair.

    openhelix gate
    openhelix gate scenes=ABC changing=40 system2.engine.options.model=FOLDER out=mine

The pair acts in training scenes at its usual cadence: in CALVIN-R's starts in which what is meant
changes on the way, at single tasks, and at tasks in whose midst another sentence comes. Ten times
per second System 2 is asked what it would say now (not heard by the policy), and what the gate
would take in is kept (`openhelix.runtime.control.gate.Look`). A pair of two looks, at the first of
which System 2 was asked, is an example: whether by then its latent names another task.

The gate is fitted once for each group of scenes that is left out, and what it makes of the group
left out gives the scores, and the threshold: the highest at which the share `recall` of the
changes of meaning, made by somebody in those scenes, is asked about within half a second. Then it
is fitted to all of them. `OUT/trigger.json` is the gate: name it in `system2.trigger_weights`.
The same command goes on where it was interrupted.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch.nn.functional import binary_cross_entropy_with_logits

from openhelix.benchmarks.calvin.scene import get_scene, is_held_out, scene_names
from openhelix.benchmarks.evaluation.changing import Change
from openhelix.benchmarks.evaluation.eval import load_config
from openhelix.benchmarks.evaluation.naming import BATCH, named
from openhelix.benchmarks.evaluation.runner import Conditions, Runner
from openhelix.benchmarks.evaluation.staging import Starts
from openhelix.benchmarks.evaluation.suites import Episode, Suite
from openhelix.runtime.cli import arguments
from openhelix.runtime.cli.arguments import Options
from openhelix.runtime.control.assembly import ControlStack
from openhelix.runtime.control.gate import (
    FEATURES,
    MOST,
    Gate,
    LearnedTrigger,
    Look,
    Memory,
    look_at,
)
from openhelix.runtime.control.goals import LockstepGoals
from openhelix.runtime.control.trigger import LOOK_S, Trigger
from openhelix.runtime.core.config import (
    ConfigError,
    RunConfig,
    System1Config,
    System2Config,
    read_settings,
)
from openhelix.runtime.core.files import replace_file
from openhelix.runtime.core.interfaces import F64, U8, LatentSpec, Observation, judged
from openhelix.runtime.core.output import answer
from openhelix.runtime.core.paths import cache_folder
from openhelix.runtime.robots.env import EnvRobot

FILE: Final = "trigger.json"
WITHIN_S: Final = 0.5  # of a change, System 2 is to be asked about it
EVERY: Final = 4  # looks between two at which System 2 counts as asked
AHEAD_S: Final = 4.0  # how old a latent gets in the examples
SOONER: Final = 3  # times sooner, in three of four starts, comes a change than in the evaluation
STAYS: Final = 3  # looks for which System 2 has to stay with another answer
STEPS, RATE, DECAY = 200, 0.02, 0.1
THRESHOLDS: Final = tuple(np.round(np.arange(0.1, 0.96, 0.05), 2).tolist())
Count = Annotated[int, Field(ge=1)]


class GateConfig(BaseModel):
    """How a gate is fitted.

    Attributes:
        out: folder; None for `gate` in the cache.
        scenes: where the pair acts; none that is held out.
        changing: CALVIN-R's starts in which what is meant changes, of all scenes together.
        plain: single tasks, and as many tasks in whose midst another sentence comes.
        steps: environment steps of an attempt.
        interval: System 2 refreshes every so many steps while the pair acts.
        seed: of starts, wording, the policy's noise and the fit.
        hidden: units of the gate.
        recall: share of the changes of meaning that are to be asked about in time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: Path | None = None
    scenes: str = "ABC,R700-R702"
    changing: Count = 48
    plain: Annotated[int, Field(ge=0)] = 6
    steps: Annotated[int, Field(ge=40)] = 90
    interval: Count = 30
    seed: Annotated[int, Field(ge=0)] = 0
    hidden: Count = 1
    recall: Annotated[float, Field(gt=0, le=1)] = 0.85

    @field_validator("scenes")
    @classmethod
    def _no_held_out_scene(cls, value: str) -> str:
        names = scene_names(value)
        for name in names:
            if is_held_out(get_scene(name)):
                raise ValueError(f"{name} is held out; nothing is learned from it")
        if len({group_of(name) for name in names}) < 2:
            raise ValueError(f"{value!r} has one group; the gate is scored on scenes left out")
        return value

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return self.out.expanduser() if self.out is not None else cache_folder() / "gate"

    def identity(self) -> dict[str, Any]:
        """What must agree for what was recorded to be used again."""
        names = ("scenes", "steps", "interval", "seed")
        return {name: getattr(self, name) for name in names}


def group_of(scene: str) -> str:
    """Return with which scenes one is left out: generated ones go together."""
    return "generated" if scene.startswith("R") else scene


@dataclass(frozen=True, slots=True)
class Taped:
    """An attempt: its looks, and what System 2 would have said at each.

    Attributes:
        scene: its name.
        kind: "changing", "tasks" or "switch".
        looks: in order.
        told: (n,) of which instruction each is, by number.
        says: (n,) the task that System 2's latent names; "" where it refuses.
        meant: (n,) the task that is right.
        success: of the attempt.
    """

    scene: str
    kind: str
    looks: Sequence[Look]
    told: Sequence[int]
    says: Sequence[str]
    meant: Sequence[str]
    success: bool

    def changed_ns(self) -> int | None:
        """Return when what is meant changed under one instruction; None if it did not."""
        for i, (was, told) in enumerate(pairwise(self.told), 1):
            if was == told and self.meant[i] != self.meant[i - 1]:
                return self.looks[i].t_ns
        return None


# -- Recording -------------------------------------------------------------------------


class Tape:
    """A trigger that does as another says, and keeps what a gate would take in."""

    def __init__(self, inner: Trigger, stack: ControlStack, config: RunConfig) -> None:
        self._inner, self._stack = inner, stack
        self._camera, self._base = config.system2.camera, config.system2.trigger_base_m
        self.looks: list[Look] = []
        self.told: list[int] = []
        self.meant: list[str] = []
        self.shown: list[tuple[U8, str]] = []  # what System 2 would be asked

    def begin(self) -> None:
        self._inner.begin()

    def due(self, observation: Observation) -> bool:
        last_ns = self.looks[-1].t_ns if self.looks else -(10**12)
        if observation.t_ns - last_ns >= LOOK_S * 1e9:
            self._keep(observation)
        return self._inner.due(observation)

    def _keep(self, observation: Observation) -> None:
        look = look_at(observation, self._camera, self._base, self._stack.loop.chunks)
        current = self._stack.episode_runner.current
        if look is None or current is None:
            return
        referee = getattr(self._stack.loop.robot, "referee", None)
        self.looks.append(look)
        self.told.append(observation.instruction_id)
        self.meant.append(str(referee.right) if referee is not None else current.task)
        image = np.array(observation.frames[self._camera].rgb)
        self.shown.append((image, current.instruction))


class Early(Starts):
    """Draws starts, in which the change comes earlier than in the evaluation if that is asked for.

    The pair has done most tasks before the evaluation's changes come.
    """

    asked = False

    def __call__(self, env: Any, episode: Episode) -> Change | None:
        change = super().__call__(env, episode)
        if change is None or not self.asked:
            return change
        change.close()
        what, before, after, steps = change.about
        return Change(env, what, before, after, max(2, steps // SOONER))


class TapingRunner(Runner):
    """Runs attempts as the evaluation does, with a tape beside them."""

    tape: Tape | None = None

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._starts = self._early = Early()

    def _stack(self, robot: EnvRobot, episode: Episode, conditions: Conditions) -> ControlStack:
        stack = super()._stack(robot, episode, conditions)
        goals = stack.loop.goals
        assert isinstance(goals, LockstepGoals)
        self.tape = Tape(goals.trigger, stack, self._config)
        goals.trigger = self.tape
        return stack

    def record(
        self, kind: str, episode: Episode, conditions: Conditions, early: bool
    ) -> Taped | None:
        """Run an attempt; None where it has no start."""
        self.tape, self._early.asked = None, early
        result = self.run(episode, conditions).result
        if result["error"] or self.tape is None or len(self.tape.looks) < 2:
            return None
        tape, says = self.tape, self._says(self.tape)
        done = bool(result["success"])
        return Taped(episode.scene, kind, tape.looks, tape.told, says, tape.meant, done)

    def _says(self, tape: Tape) -> list[str]:
        assert self._engine is not None
        found: list[str] = []
        for start in range(0, len(tape.shown), BATCH):
            part = tape.shown[start : start + BATCH]
            images, texts = [image for image, _ in part], [text for _, text in part]
            latents = self._engine.engine.encode(images, texts)
            judgements = judged(self._engine.engine, texts, latents)
            names = named(getattr(self._policy, "inner", self._policy), latents)
            found += ["" if j.refused else n for n, j in zip(names, judgements, strict=True)]
        return found

    @property
    def spec(self) -> LatentSpec:
        """System 2's latents."""
        assert self._engine is not None
        return self._engine.spec


def attempts(config: GateConfig) -> list[tuple[int, str, Episode]]:
    """Return what is recorded, by turn and kind: one attempt in each scene, then another in each.

    With smaller counts they are the first of these.
    """
    scenes, rng = scene_names(config.scenes), np.random.default_rng([config.seed, 6])
    chosen: list[tuple[int, str, Episode]] = []
    for kind, suite, count in (
        ("changing", "calvin-r", config.changing),
        ("tasks", "tasks", config.plain),
        ("switch", "switch", config.plain),
    ):
        changing = kind == "changing"
        per_scene = -(-count // len(scenes))
        for scene in scenes:
            made = Suite(
                suite, scenes=(scene,), count=1, seed=config.seed, changing=changing
            ).episodes()
            picks = rng.permutation(len(made))[:per_scene]
            chosen += [(turn, kind, made[i]) for turn, i in enumerate(picks)]
    return sorted(chosen, key=lambda item: item[0])


def save(file: Path, taped: Taped | None) -> None:
    """Write an attempt; None as an empty one."""
    data: dict[str, Any] = {"scene": "", "kind": ""}
    if taped is not None:
        data = {
            "scene": taped.scene,
            "kind": taped.kind,
            "t_ns": [look.t_ns for look in taped.looks],
            "seen": np.stack([look.seen for look in taped.looks]).astype(np.float16),
            "robot": np.stack([look.robot for look in taped.looks]),
            "numbers": np.stack([look.numbers for look in taped.looks]),
            "told": taped.told,
            "says": taped.says,
            "meant": taped.meant,
            "success": taped.success,
        }
    with file.with_suffix(".part").open("wb") as out:
        np.savez_compressed(out, **data)
    file.with_suffix(".part").replace(file)


def read(file: Path) -> Taped | None:
    """Read what `save` wrote."""
    with np.load(file) as data:
        if "seen" not in data:
            return None
        looks = [
            Look(int(t), seen.astype(np.float32), robot, numbers)
            for t, seen, robot, numbers in zip(
                data["t_ns"], data["seen"], data["robot"], data["numbers"], strict=True
            )
        ]
        told, says, meant = (data[name].tolist() for name in ("told", "says", "meant"))
        scene, kind, success = str(data["scene"]), str(data["kind"]), bool(data["success"])
        return Taped(scene, kind, looks, told, says, meant, success)


def record(
    config: GateConfig, run: RunConfig, report: Callable[[str], None]
) -> tuple[list[Taped], str]:
    """Record what is missing; return all attempts that had a start, and System 2's identity.

    Raises:
        ConfigError: the folder holds another recording.
    """
    folder = config.folder / "tapes"
    folder.mkdir(parents=True, exist_ok=True)
    runner = TapingRunner(run)
    try:
        about = config.identity() | {"system2": runner.spec.spec_id}
        card = folder / "tapes.json"
        if card.is_file() and json.loads(card.read_text()) != about:
            raise ConfigError(f"out: {folder} holds another recording; name another folder")
        replace_file(card, json.dumps(about).encode())
        wanted, tapes = attempts(config), []
        for number, (turn, kind, episode) in enumerate(wanted, 1):
            file = folder / f"{zlib.crc32(f'{kind} {episode.key}'.encode()):08x}.npz"
            if not file.is_file():
                conditions, early = Conditions(config.steps, config.interval), turn % 4 > 0
                save(file, runner.record(kind, episode, conditions, early))
                report(f"{number} of {len(wanted)}: {kind} {episode.key}")
            tapes.append(read(file))
        return [taped for taped in tapes if taped is not None], runner.spec.spec_id
    finally:
        runner.close()


# -- Fitting ---------------------------------------------------------------------------


def examples(taped: Taped) -> tuple[F64, F64]:
    """Return features (m, n) of pairs of looks, and whether System 2 says something else (m,).

    What it takes back within `STAYS` looks does not count.
    """
    rows, labels = [], []
    count = len(taped.looks)
    for start in range(0, count - 1, EVERY):
        memory = Memory(taped.looks[start])
        for i in range(start + 1, count):
            age_s = (taped.looks[i].t_ns - taped.looks[start].t_ns) * 1e-9
            if taped.told[i] != taped.told[start] or age_s > AHEAD_S:
                break
            rows.append(memory.take(taped.looks[i]))
            said = taped.says[i : i + STAYS]
            labels.append(float(all(one != taped.says[start] for one in said)))
    return np.array(rows).reshape(-1, len(FEATURES)), np.array(labels)


def fit(features: F64, labels: F64, hidden: int, seed: int, system2: str) -> Gate:
    """Return a gate fitted to examples; its threshold is 0.5 until one is chosen."""
    mean, scale = features.mean(0), features.std(0) + 1e-3
    given = torch.from_numpy(np.clip((features - mean) / scale, -MOST, MOST)).float()
    wanted = torch.from_numpy(labels).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(
            torch.nn.Linear(given.shape[1], hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 1)
        )
        optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=DECAY)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        weight = (1 - wanted).sum() / wanted.sum().clamp_min(1.0)
        for _ in range(STEPS):
            odds = net(given)[:, 0]
            loss = binary_cross_entropy_with_logits(odds, wanted, pos_weight=weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    first, last = cast(torch.nn.Linear, net[0]), cast(torch.nn.Linear, net[2])
    return Gate(
        system2=system2,
        mean=mean,
        scale=scale,
        hidden=first.weight.detach().double().numpy().T,
        hidden_bias=first.bias.detach().double().numpy(),
        out=last.weight.detach().double().numpy()[0],
        out_bias=float(last.bias.detach()),
        threshold=0.5,
        about={},
    )


def replayed(taped: Taped, gate: Gate, run: RunConfig) -> list[int]:
    """Return at which looks (their numbers) a run with this gate would have asked.

    As far as can be told: the pair acts as it did on the tape.
    """
    system2 = run.system2
    trigger = LearnedTrigger(
        system2.camera,
        system2.trigger_floor_s,
        system2.trigger_ceiling_s,
        system2.trigger_base_m,
        gate,
    )
    asked = []
    for i, look in enumerate(taped.looks):
        if i == 0 or taped.told[i] != taped.told[i - 1]:
            trigger.begin()
        if trigger.decide(look.t_ns, look):
            asked.append(i)
    return asked


def score(
    tapes: Sequence[Taped], gates: Sequence[Gate], run: RunConfig, interval: int
) -> dict[str, Any]:
    """Return how gates do, each on its own tape.

    Returns:
        `changes` of meaning that came, those `seen` (asked about within `WITHIN_S`) and `recall`;
        `latents_per_task`, beside `latents_per_task_at_cadence`; `asked` by the gate's own
        decision, of those `right` ones, after which System 2 said something else, `precision`.
    """
    changes = seen = latents = cadence = tasks = asked_more = right = 0
    period_s = run.control.hz**-1
    for taped, gate in zip(tapes, gates, strict=True):
        asked = replayed(taped, gate, run)
        begins = [i for i in range(len(taped.told)) if i == 0 or taped.told[i] != taped.told[i - 1]]
        tasks += len(begins)
        latents += len(asked)
        for begin, end in zip(begins, [*begins[1:], len(taped.looks)], strict=True):
            lasted_s = (taped.looks[end - 1].t_ns - taped.looks[begin].t_ns) * 1e-9
            cadence += 1 + int(lasted_s / (interval * period_s))
        changed_ns = taped.changed_ns()
        if changed_ns is not None:
            changes += 1
            after = [(taped.looks[i].t_ns - changed_ns) * 1e-9 for i in asked]
            seen += any(0 <= s <= WITHIN_S for s in after)
        for before, i in pairwise(asked):
            if i not in begins:
                asked_more += 1
                right += taped.says[i] != taped.says[before]
    return {
        "changes": changes,
        "seen": seen,
        "recall": round(seen / max(1, changes), 4),
        "tasks": tasks,
        "latents_per_task": round(latents / tasks, 3),
        "latents_per_task_at_cadence": round(cadence / tasks, 3),
        "asked": asked_more,
        "right": right,
        "precision": round(right / max(1, asked_more), 4),
    }


def choose(scores: Sequence[dict[str, Any]], recall: float) -> int:
    """Return which of the scores, by rising threshold, is the last with enough recall.

    Where none has, the one with the most, of those with no more latents than the cadence.
    """
    enough = [i for i, one in enumerate(scores) if one["recall"] >= recall]
    if enough:
        return enough[-1]
    few = [
        i
        for i, one in enumerate(scores)
        if one["latents_per_task"] <= one["latents_per_task_at_cadence"]
    ]
    return max(few or range(len(scores)), key=lambda i: (scores[i]["recall"], i))


def learned(config: GateConfig, tapes: Sequence[Taped], run: RunConfig, system2: str) -> Gate:
    """Return the gate, with its threshold and its scores on scenes that it was not fitted to."""
    groups = [group_of(taped.scene) for taped in tapes]
    made = [examples(taped) for taped in tapes]

    def fitted(to: Sequence[int]) -> Gate:
        parts = [made[i] for i in to]
        features, labels = (np.concatenate([part[k] for part in parts]) for k in (0, 1))
        return fit(features, labels, config.hidden, config.seed, system2)

    left_out = {
        group: fitted([i for i, of in enumerate(groups) if of != group])
        for group in dict.fromkeys(groups)
    }
    scores = [
        score(tapes, [replace(left_out[of], threshold=t) for of in groups], run, config.interval)
        for t in THRESHOLDS
    ]
    chosen = choose(scores, config.recall)
    whole = fitted(range(len(tapes)))
    per_group = {
        group: score(
            [taped for taped, of in zip(tapes, groups, strict=True) if of == group],
            [replace(left_out[group], threshold=THRESHOLDS[chosen])] * groups.count(group),
            run,
            config.interval,
        )
        for group in left_out
    }
    about = {
        "settings": config.model_dump(mode="json", exclude={"out"}),
        "tapes": len(tapes),
        "looks": sum(len(taped.looks) for taped in tapes),
        "examples": int(sum(len(labels) for _, labels in made)),
        "share_that_differs": round(float(np.concatenate([y for _, y in made]).mean()), 4),
        "scenes_left_out": scores[chosen],
        "per_scene_left_out": per_group,
    }
    return replace(whole, threshold=THRESHOLDS[chosen], about=about)


class _Settings(GateConfig):
    """What may be written on the command line: the fit, and the two systems that act."""

    system1: System1Config = System1Config()
    system2: System2Config = System2Config()


def main(argv: Sequence[str]) -> int:
    """Fit the gate that says when a new latent is worth asking for.

    Raises:
        ConfigError: bad input, in one line.
    """
    options, words = arguments.parse("gate", Options, argv, __doc__ or "", _Settings)
    of_run = [word for word in words if word.partition(".")[0] in ("system1", "system2")]
    own = [word for word in words if word not in of_run]
    config = read_settings(GateConfig, options.config, own)
    run = load_config(of_run, scene=scene_names(config.scenes)[0])
    if run.system2.trigger != "cadence":
        raise ConfigError(
            f"system2.trigger: {run.system2.trigger}; while it is recorded the pair is asked at "
            "its cadence, leave it out"
        )

    def report(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    tapes, system2 = record(config, run, report)
    gate = learned(config, tapes, run, system2)
    file = config.folder / FILE
    gate.save(file)
    found = {"file": str(file), "system2": system2, "threshold": gate.threshold, **gate.about}
    answer(json.dumps(found, indent=None if options.as_json else 1))
    return 0
