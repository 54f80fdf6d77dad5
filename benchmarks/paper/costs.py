"""Estimates how long experiments will take, from measured costs, before anything starts.

An environment step costs its physics and its share of a plan; every latent that a plan is made
from costs a call of System 2. These and what a sample costs in each kind of training are
processor times of one thread, measured by `openhelix.benchmarks.perf.bench_experiments` and kept
in `costs.json`: they are the same while something else keeps the machine busy, and on a machine
with a core to spare they are the wall time too. Evaluations that are finished correct them for
this machine and its weights, also in processor time.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from openhelix.benchmarks.evaluation.eval import load_config
from openhelix.benchmarks.evaluation.report import counted
from openhelix.benchmarks.evaluation.suites import CHAINS
from openhelix.benchmarks.paper.measures import Measure
from openhelix.benchmarks.paper.session import Session
from openhelix.benchmarks.paper.trainings import Training
from openhelix.benchmarks.training.config import TrainingConfig
from openhelix.system2.train import CACHEABLE, CHANGES

COSTS = Path(__file__).with_name("costs.json")
MEASURED = {
    *(f"{kind}_sample_s" for kind in ("policy", "prefix", "states", "live")),
    *("prefix_frame_s", "states_frame_s", "open_s", "thread_gain"),
}
AGAIN = " again"
FRAMES_AN_EPISODE = 8.0  # of those that are drawn


@cache
def costs() -> dict[str, Any]:
    """Return the measured costs; empty where nothing has been measured."""
    return dict(json.loads(COSTS.read_text())) if COSTS.exists() else {}


def step_s(measure: Measure, workers: int) -> float | None:
    """Return the expected wall seconds of one environment step, or None if nothing is known."""
    found = costs().get("evaluation")
    if found is None:
        return None
    refresh = max(_replan_steps(measure.run), measure.conditions.interval)
    one = float(found["env_step_s"])
    one += float(found["latent_s"]) / refresh if measure.training.stage != "policy" else 0.0
    return one / (1.0 + (workers - 1) * float(costs()["worker_gain"]))


@cache
def _replan_steps(run: tuple[str, ...]) -> int:
    return load_config(list(run)).system1.replan_steps


def tasks_expected(measure: Measure) -> float:
    """Return how many tasks an episode attempts: of a chain's five, as many as were measured."""
    if measure.suite.name not in CHAINS:
        return 1.0
    return float(costs().get("evaluation", {}).get("tasks_a_chain", 2.5))


def training_s(training: Training, n_frames: int) -> float | None:
    """Return how long `openhelix train` takes for a training, or None if nothing is known.

    Args:
        training: what.
        n_frames: of the data, about one in `latent.stride` of which gets states.
    """
    found = costs().get("training", {})
    if not training.reads_data:
        return 0.0
    if not MEASURED.issubset(found) or training.options.get("device", "cpu") != "cpu":
        return None
    work = Work(training.options, found)
    one = (
        work.samples_s("policy", "policy") if training.stage == "policy" else work.pair_s(n_frames)
    )
    return one / float(found["thread_gain"])


class Work:
    """The processor time of a training.

    Args:
        options: of `openhelix train`.
        found: measured costs.
    """

    def __init__(self, options: Mapping[str, Any], found: Mapping[str, float]) -> None:
        self._options, self._found, self._default = options, found, TrainingConfig()

    def of(self, key: str) -> Any:
        """Return an option, or what it is where nothing is said."""
        section, name = key.split(".")
        return self._options.get(key, getattr(getattr(self._default, section), name))

    def samples_s(self, section: str, kind: str) -> float:
        """Return what the steps of a stage cost."""
        samples = float(self.of(f"{section}.steps")) * float(self.of(f"{section}.batch"))
        return samples * self.sample_s(kind)

    def sample_s(self, kind: str) -> float:
        """Return what a sample of a kind costs.

        "states again" and "prefix again" make what a frozen model says of it each time.
        """
        if kind.endswith(AGAIN):
            kept = kind.removesuffix(AGAIN)
            return self._found[f"{kept}_sample_s"] + self._found[f"{kept}_frame_s"]
        return self._found[f"{kind}_sample_s"]

    def kinds(self) -> dict[str, str]:
        """Return where the latents of each stage that has steps come from."""
        feed, regime = self.of("latent.feed"), self.of("latent.regime")
        learns_act = regime != "frozen" and self.of("latent.kind") == "act_last"
        first = "prefix" if learns_act and feed != "states" else "states"
        second = "prefix" if feed == "prefix" else "states"
        if feed == "live":
            cached = self.of("latent.kind") in CACHEABLE and not self.of("latent.proprio")
            first = "prefix" + AGAIN if cached else "live"
            first = second = "states" + AGAIN if regime == "frozen" else first
        if regime in CHANGES:
            second = "live"
        stages = {"stage1": first, "stage2": second}
        return {stage: kind for stage, kind in stages.items() if self.of(f"{stage}.steps")}

    def pair_s(self, n_frames: int) -> float:
        """Return what both stages cost, and what they read of the frozen language model."""
        kinds = self.kinds()
        seconds = self._found["open_s"] * len(kinds)
        if "prefix" in kinds.values():  # too much where another variant has made them
            frames = float(self.of("latent.frames"))
            seconds += frames * self._found["prefix_frame_s"]
        if "states" in kinds.values():
            # Every episode has one, whatever the stride.
            frames = n_frames / min(float(self.of("latent.stride")), FRAMES_AN_EPISODE)
            each = float(self.of("latent.phrasings")) * self._found["states_frame_s"]
            seconds += frames * each
        return seconds + sum(self.samples_s(stage, kind) for stage, kind in kinds.items())


# -- What is still to be done ----------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One training or evaluation that is still to be done.

    Attributes:
        what: its folder's name.
        seconds: expected; None where nothing is known.
        at_most: of an evaluation in which every task takes all its steps.
    """

    what: str
    seconds: float | None
    at_most: float | None = None


def correction(session: Session, measures: Sequence[Measure]) -> float:
    """Return how much slower than expected the finished evaluations were; 1 without any."""
    ratios = []
    for measure in measures:
        score = session.report(measure)
        if score is not None and score["cpu_s"] and score["env_steps"] >= 500:
            expected = step_s(measure, 1)
            if expected is not None:
                ratios.append(score["cpu_s"] / score["env_steps"] / expected)
    return statistics.median(ratios) if ratios else 1.0


@dataclass(frozen=True)
class Left:
    """What an experiment needs that no earlier one of the session does.

    Attributes:
        name: the experiment's.
        trainings, evaluations: finished, and in all; shared ones too.
        items: still to be done, in order; what an earlier experiment does is not among them.
    """

    name: str
    trainings: tuple[int, int]
    evaluations: tuple[int, int]
    items: tuple[Item, ...]


def left(session: Session) -> list[Left]:
    """Return what is still to be done, by experiment, in order; shared work counts once."""
    every = list({m.key: m for m in map(session.measure, session.rows())}.values())
    factor = correction(session, every)
    missing = {t.key for t in session.missing()}
    seen: set[str] = set()
    found = []
    for experiment in session.request.experiments:
        trainings = session.needs(experiment)
        rows = [row for row in experiment.rows if session.request.asks(row.variant)]
        measures = list({m.key: m for m in map(session.measure, rows)}.values())
        untrained = [t for t in trainings if t.key in missing]
        unmeasured = [m for m in measures if session.report(m) is None]
        items = [Item(t.key, session.trainings.seconds(t)) for t in untrained if t.key not in seen]
        items += [_evaluation(session, m, factor) for m in unmeasured if m.key not in seen]
        seen |= {item.what for item in items}
        found.append(
            Left(
                experiment.name,
                (len(trainings) - len(untrained), len(trainings)),
                (len(measures) - len(unmeasured), len(measures)),
                tuple(items),
            )
        )
    return found


def todo(session: Session) -> list[Item]:
    """Return what is still to be done, in order, each once."""
    return [item for part in left(session) for item in part.items]


def _evaluation(session: Session, measure: Measure, factor: float) -> Item:
    """Return an evaluation's episodes that are still to be done, at `factor` times the costs."""
    step = step_s(measure, session.request.workers)
    if step is None:
        return Item(measure.key, None, 0.0)
    share = 1.0 - len(session.results(measure)) / len(measure.suite.episodes())
    load = float(costs()["evaluation"]["start_s"])
    most = measure.steps_at_most() * factor * step * share
    tasks = 5 if measure.suite.is_chain else 1
    return Item(measure.key, load + most * tasks_expected(measure) / tasks, load + most)


def by_experiment(parts: Sequence[Left]) -> str:
    """Return the estimate in words, a line an experiment."""
    lines = []
    for part in parts:
        done = [f"{d} of {n} {what}" for (d, n), what in _counts(part)]
        lines.append(f"{part.name}: {' and '.join(done)} done, {_sum(part.items)} left")
    return "\n".join(lines)


def _counts(part: Left) -> list[tuple[tuple[int, int], str]]:
    return [(part.trainings, "trainings"), (part.evaluations, "evaluations")]


def told(items: Sequence[Item]) -> str:
    """Return the estimate in words."""
    trainings = [i for i in items if i.at_most is None]
    rest = [i for i in items if i.at_most is not None]
    most = sum(i.at_most or 0.0 for i in rest)
    total = sum(i.seconds or 0.0 for i in items)
    return (
        f"{counted(len(trainings), 'training')} {_sum(trainings)}; "
        f"{counted(len(rest), 'evaluation')} {_sum(rest)}, "
        f"at most {hours(most)}; together about {hours(total)}"
    )


def _sum(items: Sequence[Item]) -> str:
    unknown = sum(i.seconds is None for i in items)
    known = hours(sum(i.seconds or 0.0 for i in items))
    return known + (f" and {unknown} of unknown length" if unknown else "")


def hours(seconds: float) -> str:
    """Return a duration for people."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
