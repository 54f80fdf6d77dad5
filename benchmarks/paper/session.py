"""Runs experiments: trains and measures what is missing, reuses what is finished.

Every folder records whether it is finished, so an experiment interrupted at any point resumes
when it is started again, and tables share common trainings and evaluations. Each table runs its
trainings first, then its evaluations; reports are rewritten after every evaluation, so that an
interrupted run leaves complete reports of what it measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openhelix.benchmarks.evaluation.evaluation import (
    Console,
    Evaluation,
    Progress,
    evaluate,
    open_pool,
)
from openhelix.benchmarks.evaluation.metrics import served
from openhelix.benchmarks.evaluation.pool import Pool
from openhelix.benchmarks.evaluation.report import write_reports
from openhelix.benchmarks.evaluation.results import REPORT, RUN, read_results
from openhelix.benchmarks.paper.catalogue import Catalogue, Contrast, Experiment, Row, Scale
from openhelix.benchmarks.paper.judge import (
    STATISTICS,
    decide,
    judge,
    missing,
    published_difference,
)
from openhelix.benchmarks.paper.measures import Measure, measure_of, score_of
from openhelix.benchmarks.paper.trainings import (
    OutOfTime,
    Training,
    Trainings,
    check_samples,
    in_order,
    trainings_of,
)
from openhelix.runtime.core.config import CommandFailed

EVALUATIONS = "evaluations"
PoolFor = Callable[[Evaluation], Pool]


@dataclass(frozen=True)
class Request:
    """What a session is asked for.

    Attributes:
        catalogue: of experiments, variants and scales.
        names: the experiments, in order.
        scale_name: of them.
        root: holds trainings and evaluations.
        data: what identifies the training data.
        seed: of all episodes.
        train: options of the training that the user changed.
        run: overrides of the run's configuration.
        workers: of an evaluation.
        until_s: on `time.monotonic`; what runs then is left where it is, to be gone on with.
        data_name: the collection as the user named it; None is the default one.
    """

    catalogue: Catalogue
    names: Sequence[str]
    scale_name: str
    root: Path
    data: str
    seed: int = 0
    train: Mapping[str, Any] = field(default_factory=dict)
    run: Sequence[str] = ()
    workers: int = 1
    until_s: float | None = None
    data_name: str | None = None

    @property
    def scale(self) -> Scale:
        """How much is trained and measured."""
        return self.catalogue.scale(self.scale_name)

    def command(self, name: str) -> str:
        """Return what to call to have an experiment's figures again."""
        seed = [f"--seed {self.seed}"] if self.seed else []
        data = [f"--data {self.data_name}"] if self.data_name else []
        train = [f"train.{key}={value}" for key, value in self.train.items()]
        run = [word for word in self.run if not word.startswith("output.")]
        scale = f"--scale {self.scale_name}"
        return " ".join(["openhelix experiment", name, scale, *data, *seed, *train, *run])

    @property
    def experiments(self) -> list[Experiment]:
        """What is asked for."""
        return [self.catalogue.experiment(name) for name in self.names]


class Session:
    """Experiments over one folder of trainings and evaluations.

    Args:
        request: what is asked for.
        trainings: those of `request.root`.
        console: told of the progress.
        pool_for: returns a pool that has not started, for an evaluation.

    Attributes:
        failed: why, of the trainings that failed in this session, by key.
    """

    def __init__(
        self,
        request: Request,
        trainings: Trainings,
        console: Console,
        pool_for: PoolFor | None = None,
    ) -> None:
        self.request, self.trainings = request, trainings
        self._console = console
        self.failed: dict[str, str] = {}
        self._pool_for = pool_for or self._open

    def _open(self, plan: Evaluation) -> Pool:
        return open_pool(plan.config, self.request.workers, plan.threads)

    def training(self, variant: str) -> Training:
        """Return the training of a variant."""
        r = self.request
        return trainings_of(r.catalogue.variants[variant], r.scale, r.data, r.train)

    def measure(self, row: Row) -> Measure:
        """Return what a row with a variant measures."""
        assert row.variant is not None
        r = self.request
        smoke = not r.scale.official
        run = (*r.scale.run, *r.run)
        return measure_of(row, self.training(row.variant), r.scale, r.seed, run, smoke)

    def rows(self) -> list[Row]:
        """Return all rows that are measured, in order; several may share a measure."""
        return [row for e in self.request.experiments for row in e.rows if row.variant]

    def wanted(self) -> list[Training]:
        """Return all trainings that are needed, each once, parents first."""
        return in_order(t for e in self.request.experiments for t in self.needs(e))

    def needs(self, experiment: Experiment) -> list[Training]:
        """Return the trainings of one experiment, parents first."""
        names = [row.variant for row in experiment.rows if row.variant]
        names += experiment.options.get("variants", ())
        return in_order(map(self.training, names))

    def check_fair(self) -> None:
        """Refuse contrasts whose arms learn from different numbers of samples.

        Raises:
            ConfigError: one line names contrast and samples.
        """
        for experiment in self.request.experiments:
            names = {row.variant for row in experiment.rows if row.variant}
            check_samples(experiment, {name: self.training(name) for name in names})

    def place(self, measure: Measure) -> Path:
        """Return the folder of an evaluation's results."""
        return self.request.root / EVALUATIONS / measure.key

    def say(self, text: str) -> None:
        """Tell a person."""
        self._console.say(text)

    def run(self, after: Callable[[], None], train: bool = True) -> None:
        """Train and measure what is missing.

        Args:
            after: called when an evaluation is finished.
            train: False trains nothing: what is not trained is left out.

        Raises:
            OutOfTime: before all was done.
            ValueError, CommandFailed: an evaluation was refused or failed. A training that
                failed is in `failed`, and its rows are left out.
        """
        for experiment in self.request.experiments:
            self._train(experiment, train)
            self._measure(experiment, after)

    def _train(self, experiment: Experiment, train: bool) -> None:
        """Train what an experiment needs; one that fails leaves its rows out and no others.

        Weights that are given need no training, so they are there even if nothing is trained.
        """
        wanted = [t for t in self.needs(experiment) if train or not t.reads_data]
        for number, training in enumerate(wanted, 1):
            if self.trainings.done(training) is not None:
                continue
            self._in_time()
            place = f"{experiment.name}: training {number} of {len(wanted)}"
            self.say(f"{place}: {training.key}")
            try:
                self.trainings.ensure(training, self.say)
            except CommandFailed as error:
                self.failed[training.key] = str(error)
                self.say(f"{place} failed: {error}")

    def _measure(self, experiment: Experiment, after: Callable[[], None]) -> None:
        rows = [row for row in experiment.rows if row.variant]
        measures = list({m.key: m for m in map(self.measure, rows)}.values())
        for number, measure in enumerate(measures, 1):
            trained = self.trainings.done(measure.training) is not None
            if trained and self.report(measure) is None:
                self._in_time()
                place = f"{experiment.name}: evaluation {number} of {len(measures)}"
                self.say(f"{place}: {measure.key}")
                self._evaluate(measure)
                after()

    def _in_time(self) -> None:
        until_s = self.request.until_s
        if until_s is not None and time.monotonic() >= until_s:
            raise OutOfTime

    def _while_in_time(self, progress: Progress) -> Progress:
        """Return a progress that ends an evaluation, after an episode that is kept."""

        def told(done: int, total: int, result: Mapping[str, Any]) -> None:
            progress(done, total, result)
            if done < total:
                self._in_time()

        return told

    def _evaluate(self, measure: Measure) -> None:
        done = self.trainings.done(measure.training)
        assert done is not None
        plan, folder = (
            measure.plan(done["overrides"], self.request.scale.videos),
            self.place(measure),
        )
        pool = self._pool_for(plan)
        try:
            with served(plan.config, self.say) as metrics:
                progress = metrics.watch(plan, Console("experiment"))
                report = evaluate(plan, pool, folder, self._while_in_time(progress))
        finally:
            pool.close()
        write_reports(report, folder)

    def report(self, measure: Measure) -> dict[str, Any] | None:
        """Return a finished evaluation's score, or None."""
        path = self.place(measure) / REPORT
        if not path.exists():
            return None
        return score_of(json.loads(path.read_text(encoding="utf-8")))

    def results(self, measure: Measure) -> list[dict[str, Any]]:
        """Return the episodes that an evaluation has finished so far."""
        folder = self.place(measure)
        return read_results(folder) if (folder / RUN).exists() else []

    def outcome(self, experiment: Experiment) -> dict[str, Any]:
        """Return an experiment as plain data: our figures, the paper's, the verdicts."""
        rows = [self._row(row) for row in experiment.rows]
        contrasts = [self._contrast(experiment, c) for c in experiment.contrasts]
        decide(contrasts)
        measured = [r for r in rows if r["variant"] is not None]
        finished = [r for r in measured if r["score"] is not None]
        state = "not run" if not finished else "complete"
        if finished and len(finished) < len(measured):
            state = f"partial: {len(finished)} of {len(measured)} rows"
        return {
            "name": experiment.name,
            "title": experiment.title,
            "kind": experiment.kind,
            "state": state,
            "scale": {"name": self.request.scale_name, **self.request.scale.model_dump()},
            "seed": self.request.seed,
            "command": self.request.command(experiment.name),
            "rows": rows,
            "statistics": STATISTICS,
            "contrasts": contrasts,
            "notes": [*experiment.notes, *self.request.scale.notes],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        published = None if row.paper is None else row.paper.model_dump(mode="json")
        found: dict[str, Any] = {
            "id": row.id,
            "name": row.name,
            "variant": row.variant,
            "suite": row.suite,
            "paper": published,
            "paper_disagrees": row.paper is not None and row.paper.disagrees,
            "paper_length": None if row.paper is None else row.paper.length,
            "score": None,
        }
        if row.variant is None:
            return found
        measure = self.measure(row)
        done = self.trainings.done(measure.training)
        found |= {
            "says": self.request.catalogue.variants[row.variant].says,
            "steps_limit": measure.conditions.steps_limit,
            "interval": row.interval,
            "latency": row.latency,
            "speeds": list(row.speeds) if row.suite == "calvin-d" else None,
            "n_wanted": len(measure.suite.episodes()),
            "evaluation": measure.key,
            "training": measure.training.key,
            "training_options": measure.training.shown_options,
            "training_failed": self.trainings.failure(measure.training),
            "training_s": None if done is None else done["seconds"],
            "score": self.report(measure),
        }
        if found["score"] is None:
            found["n_so_far"] = len(self.results(measure))
        return found

    def _contrast(self, experiment: Experiment, contrast: Contrast) -> dict[str, Any]:
        measures = [self.measure(experiment.row(name)) for name in (contrast.a, contrast.b)]
        based = [] if experiment.base is None else [self.measure(experiment.row(experiment.base))]
        if any(self.report(m) is None for m in (*measures, *based)):
            found = missing(contrast)
        else:
            first, second = (self.results(m) for m in measures)
            base = None
            for measure in based:
                score = self.report(measure) or {}
                base = float(score["avg_len"] if measure.suite.is_chain else score["success_rate"])
            found = judge(contrast, first, second, measures[0].suite.is_chain, base)
        return found | {"paper_difference": published_difference(experiment, contrast)}
