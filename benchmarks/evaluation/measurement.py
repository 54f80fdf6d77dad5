"""Measurements during an episode, and its outcome, however it ends.

`DemandGoals` schedules System 2 and computes only what a plan is made from; `EngineMeter`,
`Watch` and `Drift` measure System 2's work and the age and drift of its latents; `Attempt`
collects what is known of an episode, whenever it ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, cast

import numpy as np

from openhelix.benchmarks.evaluation.suites import Episode
from openhelix.runtime.control.assembly import ControlStack
from openhelix.runtime.control.episodes import TaskResult
from openhelix.runtime.control.goals import LockstepGoals
from openhelix.runtime.control.loop import Tick
from openhelix.runtime.control.trigger import Trigger
from openhelix.runtime.core.interfaces import (
    F32,
    F64,
    Action,
    ActionChunk,
    Engine,
    Judgement,
    LatentGoal,
    LatentSpec,
    Observation,
    Policy,
    PolicySpec,
    encode_one,
    judged,
    proprio_of,
)
from openhelix.runtime.core.quaternion import Quat, angle_between, conjugate, multiply
from openhelix.runtime.observe.collectors import LIMITS
from openhelix.runtime.robots.env import EnvRobot

CUT = frozenset(LIMITS)  # what an action's `info` says that the safety limits did to it

# -- System 2 on a schedule, computed on demand ----------------------------------------
#
# A policy that plans every eighth step reads one in eight of the latents of a System 2 that
# refreshes every step. The others change nothing, so they are scheduled and counted but never
# computed: the same results, at an eighth of the cost.

NOT_YET: F32 = np.zeros((0, 0), np.float32)


class DemandGoals(LockstepGoals):
    """`LockstepGoals` whose latents have no content until `filled` is asked for them.

    Args:
        engine, camera, interval, latency, memory, trigger: see `LockstepGoals`.
        draw_now: look at the image when the latent is scheduled, for worlds that cannot show
            an instant later.

    Attributes:
        scheduled: latents so far, computed or not.
        filled_s: what it took to compute those that were, all of it while a policy was to plan.
    """

    def __init__(
        self,
        engine: Engine,
        camera: str,
        interval: int,
        latency: int,
        memory: int = 1,
        draw_now: bool = False,
        trigger: Trigger | None = None,
    ) -> None:
        super().__init__(engine, camera, interval, latency, memory, trigger=trigger)
        self._draw_now = draw_now
        self.filled_s = 0.0
        self._ask: dict[int, Callable[[], F32]] = {}  # by seq, of this instruction
        self._z: dict[int, F32] = {}

    @property
    def scheduled(self) -> int:
        """Latents so far, computed or not."""
        return self._seq

    def begin(self, instruction_id: int, instruction: str) -> None:
        super().begin(instruction_id, instruction)
        self._ask.clear()
        self._z.clear()

    def filled(self, latent: LatentGoal) -> LatentGoal:
        """Return the latent with its content."""
        if latent.z is not NOT_YET:
            return latent
        if latent.seq not in self._z:
            start_s = time.perf_counter()
            self._z[latent.seq] = self._ask.pop(latent.seq)()
            self.filled_s += time.perf_counter() - start_s
        return replace(latent, z=self._z[latent.seq])

    def _compute(self, observation: Observation) -> LatentGoal:
        if getattr(self._engine, "judges_latents", False):
            return super()._compute(observation)  # whether it is refused cannot wait
        frames, text, judgement = observation.frames, self.instruction, self._judge(None)
        if self._draw_now:
            frames = {self._camera: frames[self._camera]}
        seq = self._seq
        own = proprio_of(observation)
        self._ask[seq] = lambda: self._encode(frames[self._camera].rgb, text, own)
        self._forget()
        self._seq += 1
        return LatentGoal(
            z=NOT_YET,
            seq=seq,
            instruction_id=self.instruction_id,
            t_obs_ns=observation.t_ns,
            t_pub_ns=observation.t_ns,
            spec_id=self._engine.spec.spec_id,
            source="lockstep",
            understood=judgement.understood,
            refused=judgement.refused,
        )

    def _forget(self) -> None:
        """Drop what was replaced before anybody asked."""
        live = {latent.seq for latent in self.recent} | {goal.seq for _, goal in self._on_the_way}
        for kept in (self._ask, self._z):
            for seq in [seq for seq in kept if seq not in live and seq < self._seq]:
                del kept[seq]


class AroundPolicy:
    """A policy that passes everything on to another one, `inner`; for subclasses to step in."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    @property
    def spec(self) -> PolicySpec:
        return cast(PolicySpec, self.inner.spec)

    def warm_up(self) -> None:
        self.inner.warm_up()

    def reset(self, seed: int | None = None) -> None:
        self.inner.reset(seed)

    def conditioned(self, latents: Sequence[LatentGoal]) -> Sequence[LatentGoal]:
        """Return what the inner policy is given; called before every plan."""
        return latents

    def passed(self, chunk: ActionChunk) -> ActionChunk:
        """Return what becomes of a plan of the inner policy; called after every one."""
        return chunk

    def act(self, observation: Observation, latents: Sequence[LatentGoal]) -> ActionChunk:
        return self.passed(self.inner.act(observation, self.conditioned(latents)))

    def go_on(
        self,
        observation: Observation,
        latents: Sequence[LatentGoal],
        plan: ActionChunk,
        given: int,
        join: str,
    ) -> ActionChunk:
        latents = self.conditioned(latents)
        return self.passed(self.inner.go_on(observation, latents, plan, given, join))


class DemandPolicy(AroundPolicy):
    """A policy whose latents are filled when it plans.

    Args:
        inner: the policy.
        goals: what its latents come from.
    """

    def __init__(self, inner: Policy, goals: DemandGoals) -> None:
        super().__init__(inner)
        self._goals = goals

    def conditioned(self, latents: Sequence[LatentGoal]) -> Sequence[LatentGoal]:
        return [self._goals.filled(goal) for goal in latents]


# -- Meters: System 2's work, the latents' age and their drift -------------------------


class EngineMeter:
    """An engine that counts its calls and their time.

    Attributes:
        engine: the engine itself; calls to it are not counted.
        calls: so far.
        seconds, cpu_s: by the clock, and of this process's processor time, which others that
            are busy on the machine do not change.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.calls = 0
        self.seconds = 0.0
        self.cpu_s = 0.0

    @property
    def spec(self) -> LatentSpec:
        """What the latents are."""
        return self.engine.spec

    @property
    def judges_latents(self) -> bool:
        """Whether it judges an instruction by its latent."""
        return bool(getattr(self.engine, "judges_latents", False))

    def warm_up(self) -> None:
        self.engine.warm_up()

    def encode(self, images: Sequence[Any], instructions: Sequence[str], *proprio: Any) -> F32:
        start_s, cpu_s = time.perf_counter(), time.process_time()
        try:
            return self.engine.encode(images, instructions, *proprio)
        finally:
            self.seconds += time.perf_counter() - start_s
            self.cpu_s += time.process_time() - cpu_s
            self.calls += 1

    def judge(self, instructions: Sequence[str], latents: F32 | None) -> list[Judgement]:
        """Return what the engine understands; not counted among the calls."""
        return judged(self.engine, instructions, latents)

    def close(self) -> None:
        self.engine.close()


class Watch:
    """A subscriber that keeps, for each task, System 2's work and the age of the latents in use.

    `latents` are those that the schedule asked for, `encoded` those that were computed because
    a plan was made from them; see `openhelix.benchmarks.evaluation.measurement`. `reaction_steps`
    says, where somebody changed what is meant (`changing.Change`), how many steps later the first
    plan came from a latent that had seen it, and `looked_steps` how many steps later System 2 was
    asked to look again; None where that never happened. `change` is the kind of change. `alarms`
    counts how often a change that nobody had made, or that changed no meaning, made a
    `ChangeTrigger` ask.
    """

    EMPTY: Mapping[str, Any] = MappingProxyType(
        {"latents": 0, "encoded": 0, "latent_age_steps": None, "plans": 0}
    )

    def __init__(self, stack: ControlStack, engine: EngineMeter | None) -> None:
        self._engine, self._goals = engine, stack.loop.goals
        self._period_s = stack.loop.period_ns * 1e-9
        self._begin_s = engine.seconds if engine else 0.0
        self._begin_cpu_s = engine.cpu_s if engine else 0.0
        self._begin_calls = engine.calls if engine else 0
        self._tasks: list[dict[str, int]] = []
        self._ages: list[list[int]] = []  # of the latent behind each plan, in steps
        self._robot = stack.loop.robot
        self._changed_ns: int | None = None  # when somebody changed what is meant
        self._change = ""  # its kind
        self._reaction: int | None = None
        self._looked: int | None = None
        self._asked = self._goals.scheduled if isinstance(self._goals, DemandGoals) else 0
        self._alarms = self._alarmed() or 0

    def __call__(self, tick: Tick) -> None:
        while len(self._tasks) < tick.observation.instruction_id:
            self._tasks.append({"latents": 0, "encoded": 0, "plans": 0})
            self._ages.append([])
        task = self._tasks[-1]
        referee = getattr(self._robot, "referee", None)
        if self._changed_ns is None and referee is not None and referee.right != referee.before:
            self._changed_ns = tick.observation.t_ns
            self._change = referee.what.split()[0]
        self._ask(task, tick.observation.t_ns)
        if isinstance(self._goals, DemandGoals) and self._engine is not None:
            before = self._tasks[:-1]
            calls = self._engine.calls - self._begin_calls
            task["latents"] = self._goals.scheduled - sum(t["latents"] for t in before)
            task["encoded"] = calls - sum(t["encoded"] for t in before)
        if tick.new_chunk is not None:
            task["plans"] += 1
            if tick.latent_age_s is not None:
                self._ages[-1].append(round(tick.latent_age_s / self._period_s))
                self._see(tick.observation.t_ns, self._ages[-1][-1])

    def _alarmed(self) -> int | None:
        """How often a change was the reason for asking so far; None where none can be."""
        return getattr(getattr(self._goals, "trigger", None), "changes", None)

    def _ask(self, task: dict[str, int], now_ns: int) -> None:
        """Take in whether System 2 was asked at this tick, and why."""
        if not isinstance(self._goals, DemandGoals):
            return
        asked, self._asked = self._goals.scheduled > self._asked, self._goals.scheduled
        if self._changed_ns is not None:
            if asked and self._looked is None:
                self._looked = self._steps_since(self._changed_ns, now_ns)
        elif (alarms := self._alarmed()) is not None:
            task["alarms"] = task.get("alarms", 0) + alarms - self._alarms
            self._alarms = alarms

    def _see(self, now_ns: int, age: int) -> None:
        """Take in a plan and the age of its latent in steps."""
        if self._changed_ns is None or self._reaction is not None:
            return
        since = self._steps_since(self._changed_ns, now_ns)
        if age <= since:
            self._reaction = since

    def _steps_since(self, then_ns: int, now_ns: int) -> int:
        return round((now_ns - then_ns) * 1e-9 / self._period_s)

    @property
    def seconds(self) -> float:
        """What System 2 has computed so far took."""
        return self._engine.seconds - self._begin_s if self._engine else 0.0

    @property
    def cpu_s(self) -> float:
        """The processor time that it took in this process."""
        return self._engine.cpu_s - self._begin_cpu_s if self._engine else 0.0

    def row(self, number: int) -> dict[str, Any]:
        """What to report of a task, by its place in the chain."""
        if number >= len(self._tasks):
            return dict(self.EMPTY)
        ages = self._ages[number]
        age = {"mean": round(float(np.mean(ages)), 3), "max": max(ages)} if ages else None
        row: dict[str, Any] = self._tasks[number] | {"latent_age_steps": age}
        if self._changed_ns is not None:
            row |= {"change": self._change, "reaction_steps": self._reaction}
            if isinstance(self._goals, DemandGoals):
                row["looked_steps"] = self._looked
        return row


class Motion:
    """A subscriber that measures, task by task, how smoothly the arm is led.

    All of it is of the targets that were sent, position in m and rotation in rad, at the control
    rate. A *border* is where a newer chunk takes over from one that is being followed: the tick
    of its arrival and the two after it, about the time of a blend.
    """

    BORDER_TICKS = 3

    def __init__(self, stack: ControlStack) -> None:
        self._rate_hz = 1e9 / stack.loop.period_ns
        self._tasks: list[dict[str, list[float]]] = []
        self._sent: list[Action] = []  # the newest four at most, without a pause between them
        self._border = 0  # ticks of it that are left
        self._peak = (0.0, 0.0)
        self._limited = False

    def __call__(self, tick: Tick) -> None:
        while len(self._tasks) < tick.observation.instruction_id:
            self._tasks.append({"jerk": [], "jump_m": [], "jump_rad": [], "limited": []})
            self._sent, self._border = [], 0
        if tick.state != "run":
            self._sent, self._border = [], 0
            return
        if tick.new_chunk is not None and self._sent:
            self._border, self._peak, self._limited = self.BORDER_TICKS, (0.0, 0.0), False
        self._sent = [*self._sent[-3:], tick.sent]
        at = [action.pose[:3] for action in self._sent]
        if len(at) == 4:
            third = at[3] - 3 * at[2] + 3 * at[1] - at[0]
            self._tasks[-1]["jerk"].append(float(third @ third) * self._rate_hz**6)
        if self._border and len(at) >= 3:
            self._at_border(at, bool(CUT & set(tick.sent.info)))

    def _at_border(self, at: Sequence[F64], limited: bool) -> None:
        a, b, c = (quat(action.pose[3:]) for action in self._sent[-3:])
        bend = float(np.linalg.norm(at[-1] - 2 * at[-2] + at[-3]))
        turn = angle_between(multiply(c, conjugate(b)), multiply(b, conjugate(a)))
        self._peak = (max(self._peak[0], bend), max(self._peak[1], turn))
        self._limited |= limited
        self._border -= 1
        if not self._border:
            task = self._tasks[-1]
            task["jump_m"].append(self._peak[0])
            task["jump_rad"].append(self._peak[1])
            task["limited"].append(float(self._limited))

    def row(self, number: int) -> dict[str, Any]:
        """What to report of a task, by its place in the chain.

        `jerk_m_s3` is the root of the mean square; `jump_m` and `jump_rad` are the means over
        borders of the greatest change of the step from one tick to the next; `limited` counts the
        borders at which the safety limits cut a target.
        """
        if number >= len(self._tasks):
            return {"motion": None}
        task = self._tasks[number]
        borders = len(task["jump_m"])
        return {
            "motion": {
                "jerk_m_s3": round(float(np.mean(task["jerk"])) ** 0.5, 4)
                if task["jerk"]
                else None,
                "borders": borders,
                "jump_m": round(float(np.mean(task["jump_m"])), 6) if borders else None,
                "jump_rad": round(float(np.mean(task["jump_rad"])), 6) if borders else None,
                "limited": int(sum(task["limited"])),
            }
        }


def quat(values: F64) -> Quat:
    """Return four numbers as a rotation."""
    x, y, z, w = values.tolist()
    return x, y, z, w


class Drift:
    """A subscriber that compares the latent behind each plan with a fresh one.

    What the plan *would* have been conditioned on costs one more call of System 2 per plan; the
    run itself goes on unchanged.

    Attributes:
        samples: [age in steps, cosine] of every plan that used a latent older than its image.
    """

    def __init__(self, stack: ControlStack, engine: Engine, camera: str) -> None:
        self._stack, self._engine, self._camera = stack, engine, camera
        self.samples: list[list[float]] = []

    def __call__(self, tick: Tick) -> None:
        loop, current = self._stack.loop, self._stack.episode_runner.current
        if tick.new_chunk is None or loop.goals is None or current is None:
            return
        used = loop.goals.recent[-1]
        if isinstance(loop.goals, DemandGoals):
            used = loop.goals.filled(used)
        age_ns = tick.observation.t_ns - used.t_obs_ns
        if age_ns <= 0:
            return
        frame = tick.observation.frames[self._camera]
        own = proprio_of(tick.observation)
        fresh = encode_one(self._engine, frame.rgb, current.instruction, own)
        age = round(age_ns / loop.period_ns)
        self.samples.append([age, round(cosine(used.z, fresh), 6)])


def cosine(a: F32, b: F32) -> float:
    """Return the cosine of two latents (n_tokens, d), taken as one vector each."""
    x, y = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    length = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / length if length > 0 else 0.0


# -- An attempt at an episode ----------------------------------------------------------


def switched(
    first: Sequence[Mapping[str, Any]], rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the rows that count, which say what they replaced, and how soon it was left.

    Args:
        first: rows of tasks that do not count: another sentence came.
        rows: of those that do. Until it first acts on the new sentence the robot holds still:
            those steps are the first one's `reaction_steps`, None if it never did.
    """
    if first and rows:
        known = ("task", "success", "env_steps", "reason")
        rows[0]["replaced"] = {name: first[-1][name] for name in known}
        rows[0]["reaction_steps"] = rows[0]["hold_steps"] if rows[0]["env_steps"] else None
    return rows


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an episode: plain data, and the film of it, if it was filmed."""

    result: dict[str, Any]
    video: bytes | None = None


class Attempt:
    """What is known of an episode so far; complete enough to report whenever it ends."""

    def __init__(self, episode: Episode) -> None:
        self.episode = episode
        self.error: str | None = None
        self.video: bytes | None = None
        self.drift: Drift | None = None
        self._watch: Watch | None = None
        self._motion: Motion | None = None
        self._stack: ControlStack | None = None
        self._robot: EnvRobot | None = None
        self._renders = 0

    def begin(self, stack: ControlStack, engine: EngineMeter | None, robot: EnvRobot) -> None:
        """Watch this stack from now on."""
        self._stack, self._robot, self._renders = stack, robot, robot.renders
        self._watch = Watch(stack, engine)
        self._motion = Motion(stack)
        stack.loop.subscribers += [self._watch, self._motion]

    def outcome(self, wall_s: float, cpu_s: float = 0.0) -> Outcome:
        """Return the result as plain data; `cpu_s` is the process's own time."""
        results: Sequence[TaskResult] = self._stack.episode_runner.results if self._stack else ()
        every = [self._row(number, result) for number, result in enumerate(results)]
        skip = self.episode.uncounted
        first, rows = every[:skip], every[skip:]
        in_a_row = next((i for i, row in enumerate(rows) if not row["success"]), len(rows))
        planner = self._stack.loop.planner if self._stack else None
        goals = self._stack.loop.goals if self._stack else None
        # Latents that a plan waited for are System 2's time.
        filled_s = goals.filled_s if isinstance(goals, DemandGoals) else 0.0
        result = {
            "index": self.episode.index,
            "key": self.episode.key,
            "scene": self.episode.scene,
            "start": self.episode.start,
            "groups": dict(self.episode.groups),
            "in_a_row": in_a_row,
            "success": in_a_row == len(self.episode.tasks) - skip,
            "error": self.error,
            "tasks": switched(first, rows + self._broken(max(len(every), skip))),
            "renders": self._robot.renders - self._renders if self._robot else 0,
            "drift": self.drift.samples if self.drift else [],
            "timing": {
                "wall_s": round(wall_s, 3),
                "task_s": [round(r.duration_s, 3) for r in results],
                "s1_s": round(max(0.0, sum(planner.latencies_s) - filled_s), 6) if planner else 0.0,
                "s2_s": round(self._watch.seconds, 6) if self._watch else 0.0,
                "cpu_s": round(cpu_s, 3),
                "s2_cpu_s": round(self._watch.cpu_s, 3) if self._watch else 0.0,
            },
        }
        return Outcome(result, self.video)

    def _row(self, number: int, result: TaskResult) -> dict[str, Any]:
        assert self._watch is not None and self._motion is not None
        return {
            "task": result.task,
            "instruction": result.instruction,
            "success": result.success,
            "env_steps": result.env_steps,
            "hold_steps": result.hold_steps,
            "reason": result.reason,
            "understood": result.understood,
            "refused": result.refused,
            **self._watch.row(number),
            **self._motion.row(number),
        }

    def _broken(self, done: int) -> list[dict[str, Any]]:
        """The row of the task during which an error ended the episode, if one did.

        Of a task that the robot was never told, since the one before it ended the run, too.
        """
        if done == len(self.episode.tasks):
            return []
        results = self._stack.episode_runner.results if self._stack else []
        reason = self.error
        if reason is None and results and self.episode.uncounted == done == len(results):
            reason = f"never told: {results[-1].reason}"
        if reason is None:
            return []
        steps = self._stack.episode_runner.steps if self._stack else 0
        row = {
            "task": self.episode.tasks[done],
            "instruction": self.episode.instructions[done],
            "success": False,
            "env_steps": steps,
            "hold_steps": 0,
            "reason": reason,
        }
        return [row | (self._watch.row(done) if self._watch else dict(Watch.EMPTY))]
