"""How long will it take? Told before anything starts, from measured times.

What a step costs is in `costs`, in processor time; evaluations that are finished correct it for
this machine and its weights, in processor time too, so that an hour in which the machine was
busy with something else does not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.experiments.costs import costs, step_s, tasks_expected
from benchmarks.experiments.measures import Measure
from benchmarks.experiments.session import Session


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


def todo(session: Session) -> list[Item]:
    """Return what is still to be done, in order."""
    items = [
        Item(t.key, session.trainings.seconds(t))
        for t in session.wanted()
        if session.trainings.done(t) is None
    ]
    measures = list({m.key: m for m in map(session.measure, session.rows())}.values())
    factor = correction(session, measures)
    for measure in measures:
        if session.report(measure) is None:
            step = step_s(measure, session.request.workers)
            if step is None:
                items.append(Item(measure.key, None, 0.0))
                continue
            each, load = factor * step, float(costs()["evaluation"]["start_s"])
            most = measure.steps_at_most() * each
            tasks = 5 if measure.suite.is_chain else 1
            expected = most * tasks_expected(measure) / tasks
            items.append(Item(measure.key, load + expected, load + most))
    return items


def told(items: Sequence[Item]) -> str:
    """Return the estimate in words."""
    trainings = [i for i in items if i.at_most is None]
    rest = [i for i in items if i.at_most is not None]
    most = sum(i.at_most or 0.0 for i in rest)
    total = sum(i.seconds or 0.0 for i in items)
    return (
        f"{len(trainings)} trainings {_sum(trainings)}; {len(rest)} evaluations {_sum(rest)}, "
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
