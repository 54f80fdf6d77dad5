"""One attempt at an episode: what is known of it, whenever and however it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.dsvlabench.meters import Drift, EngineMeter, Watch
from benchmarks.dsvlabench.suites import Episode
from runtime.assembly import Rig
from runtime.director import TaskResult
from runtime.robots.env import EnvRobot


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an episode: plain data, and the film of it, if it was filmed."""

    result: dict[str, Any]
    video: bytes | None = None


class Attempt:
    """What is known of an episode so far; complete enough to report whenever it breaks off."""

    def __init__(self, episode: Episode) -> None:
        self.episode = episode
        self.error: str | None = None
        self.video: bytes | None = None
        self.drift: Drift | None = None
        self._watch: Watch | None = None
        self._rig: Rig | None = None
        self._robot: EnvRobot | None = None
        self._renders = 0

    def begin(self, rig: Rig, engine: EngineMeter | None, robot: EnvRobot) -> None:
        """Watch this rig from now on."""
        self._rig, self._robot, self._renders = rig, robot, robot.renders
        self._watch = Watch(rig, engine)
        rig.loop.subscribers.append(self._watch)

    def outcome(self, wall_s: float, cpu_s: float = 0.0) -> Outcome:
        """Return the result as plain data; `cpu_s` is the process's own time."""
        results: Sequence[TaskResult] = self._rig.director.results if self._rig else ()
        rows = [self._row(number, result) for number, result in enumerate(results)]
        in_a_row = next((i for i, row in enumerate(rows) if not row["success"]), len(rows))
        planner = self._rig.loop.planner if self._rig else None
        result = {
            "index": self.episode.index,
            "key": self.episode.key,
            "scene": self.episode.scene,
            "groups": dict(self.episode.groups),
            "in_a_row": in_a_row,
            "success": in_a_row == len(self.episode.tasks),
            "error": self.error,
            "tasks": rows + self._broken(len(rows)),
            "renders": self._robot.renders - self._renders if self._robot else 0,
            "drift": self.drift.samples if self.drift else [],
            "timing": {
                "wall_s": round(wall_s, 3),
                "task_s": [round(r.duration_s, 3) for r in results],
                "s1_s": round(sum(planner.latencies_s), 3) if planner else 0.0,
                "s2_s": round(self._watch.seconds, 3) if self._watch else 0.0,
                "cpu_s": round(cpu_s, 3),
                "s2_cpu_s": round(self._watch.cpu_s, 3) if self._watch else 0.0,
            },
        }
        return Outcome(result, self.video)

    def _row(self, number: int, result: TaskResult) -> dict[str, Any]:
        assert self._watch is not None
        return {
            "task": result.task,
            "instruction": result.instruction,
            "success": result.success,
            "env_steps": result.env_steps,
            "hold_steps": result.hold_steps,
            "reason": result.reason,
            **self._watch.row(number),
        }

    def _broken(self, done: int) -> list[dict[str, Any]]:
        """The row of the task during which the episode broke off, if it did."""
        if self.error is None or done == len(self.episode.tasks):
            return []
        steps = self._rig.director.steps if self._rig else 0
        row = {
            "task": self.episode.tasks[done],
            "instruction": self.episode.instructions[done],
            "success": False,
            "env_steps": steps,
            "hold_steps": 0,
            "reason": self.error,
        }
        return [row | (self._watch.row(done) if self._watch else dict(Watch.EMPTY))]
