"""An evaluation as Prometheus sees it while it runs: episodes, tasks, chains, cells of a sweep.

The counters count what this process ran; what an interrupted evaluation had finished before
is in its report, not here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client.core import Metric

from openhelix.benchmarks.evaluation.evaluation import Evaluation, Progress
from openhelix.runtime.core.config import RunConfig
from openhelix.runtime.observe.collectors import OUTCOMES
from openhelix.runtime.observe.metrics import Histogram, counter, gauge, histograms, serve

Labels = tuple[str, ...]


class EvalMetrics:
    """Counts finished episodes; a collector."""

    def __init__(self) -> None:
        self._planned: dict[str, float] = {}
        self._episodes: Counter[Labels] = Counter()
        self._tasks: Counter[Labels] = Counter()
        self._attempts: Counter[Labels] = Counter()
        self._ages: dict[Labels, Histogram] = {}
        self._chains: dict[Labels, Histogram] = {}

    def watch(self, plan: Evaluation, progress: Progress) -> Progress:
        """Return a `progress` for `evaluate` that counts an episode, then tells the given one."""
        cell = cell_of(plan)
        self._begin(plan, cell)

        def told(done: int, total: int, result: Mapping[str, Any]) -> None:
            self._count(plan, cell, result)
            progress(done, total, result)

        return told

    def collect(self) -> Iterable[Metric]:
        """Return all families of the evaluation."""
        yield gauge("eval_episodes_planned", dict(self._planned))
        yield counter("eval_episodes", dict(self._episodes))
        yield counter("eval_tasks", dict(self._tasks))
        yield counter("eval_attempts", dict(self._attempts))
        yield histograms("eval_latent_age_steps", dict(self._ages))
        yield histograms("eval_chain_successes", dict(self._chains))

    def _begin(self, plan: Evaluation, cell: Labels) -> None:
        """Have every series there at 0: the first event of a new series cannot be seen."""
        suite, episodes = plan.suite.name, plan.suite.episodes()
        self._planned[suite] = len(episodes)
        self._episodes.update({(suite, o): 0 for o in (*OUTCOMES, "error")})
        self._attempts.update({(*cell, o): 0 for o in OUTCOMES})
        tasks = {task for episode in episodes for task in episode.tasks}
        self._tasks.update({(suite, task, o): 0 for task in tasks for o in OUTCOMES})
        self._ages.setdefault(cell, Histogram("eval_latent_age_steps"))
        if plan.suite.is_chain:
            self._chains.setdefault((suite,), Histogram("eval_chain_successes"))

    def _count(self, plan: Evaluation, cell: Labels, result: Mapping[str, Any]) -> None:
        suite = plan.suite.name
        outcome = "error" if result["error"] else OUTCOMES[not result["success"]]
        self._episodes[suite, outcome] += 1
        for row in result["tasks"]:
            done = OUTCOMES[not row["success"]]
            self._tasks[suite, row["task"], done] += 1
            self._attempts[*cell, done] += 1
            age = row["latent_age_steps"]
            if age is not None:
                self._ages[cell].observe(age["mean"])
        if plan.suite.is_chain:
            self._chains[suite,].observe(result["in_a_row"])


def cell_of(plan: Evaluation) -> Labels:
    """Return suite, clock, interval and latency; the wall clock's latency is not chosen: ""."""
    clock, conditions = plan.config.control.clock, plan.conditions
    latency = str(conditions.latency) if clock == "lockstep" else ""
    return plan.suite.name, clock, str(conditions.interval), latency


@contextmanager
def served(config: RunConfig, say: Callable[[str], None]) -> Iterator[EvalMetrics]:
    """Serve an evaluation's metrics while it runs, and until its last counts were scraped.

    A port that another evaluation has is no reason not to run: it is said.
    """
    metrics, endpoint = EvalMetrics(), None
    port = config.output.metrics_port_of("eval")
    if port is not None:
        try:
            endpoint = serve(port, metrics, host=config.output.metrics_host)
        except ValueError as error:
            say(f"no metrics: {error}")
    try:
        yield metrics
        if endpoint is not None:
            endpoint.await_scrape()
    finally:
        if endpoint is not None:
            endpoint.close()
