"""Runs experiments: trains and measures what is missing, reuses what is finished.

Every folder records whether it is finished, so an experiment interrupted at any point resumes
when it is started again, and tables share common trainings and evaluations. Each training is
followed by all evaluations of it; reports are rewritten after every evaluation, so that an
interrupted run leaves complete reports of what it measured. An evaluation whose episodes are kept
beside its page of results is finished, too, wherever it was made: then its weights are not needed.
Several processes share one folder's work: each takes what none of the others is at.
"""

from __future__ import annotations

import fcntl
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    of_two_trainings,
    published_difference,
)
from openhelix.benchmarks.paper.measures import Measure, measure_of, score_of
from openhelix.benchmarks.paper.trainings import (
    SHIPPED_POLICY,
    OutOfTime,
    Training,
    Trainings,
    check_samples,
    in_order,
    trainings_of,
)
from openhelix.runtime.core.config import CommandFailed
from openhelix.runtime.core.files import tensor_header
from openhelix.system1.checkpoint import WEIGHTS

EVALUATIONS, CLAIMS = "evaluations", "claims"
WAIT_S = 5.0  # between looks at what other processes are at
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
        alone: variants whose rows are trained and measured; empty for all.
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
    alone: frozenset[str] = frozenset()

    def asks(self, variant: str | None) -> bool:
        """Whether rows of a variant are asked for."""
        return variant is not None and (not self.alone or variant in self.alone)

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


@dataclass(frozen=True)
class Kept:
    """A finished evaluation, as a folder of results keeps it.

    Attributes:
        about: the suite, its conditions and hashes of the weights and the program.
        results: its episodes, with the fields that scores and tests are made of.
        row: of the page that shows it; empty where none does.
    """

    about: Mapping[str, Any]
    results: tuple[Mapping[str, Any], ...]
    row: Mapping[str, Any] = field(default_factory=dict)


class Claims:
    """Which trainings and evaluations a process is at, so that others leave them to it.

    A claim ends with its process, however that ends.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def of(self, key: str) -> Iterator[bool]:
        """Claim what has this key; gives False where another process is at it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"{key}.lock").open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            try:
                yield True
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # a worker that was forked has the file, too


class Session:
    """Experiments over one folder of trainings and evaluations.

    Args:
        request: what is asked for.
        trainings: those of `request.root`.
        console: told of the progress.
        pool_for: returns a pool that has not started, for an evaluation.
        kept: evaluations that need not be made, by key.
        probed: probes of latents that need not be made, by the training's key.

    Attributes:
        claims: on what this process does.
        failed: why, of the trainings that failed in this session, by key.
    """

    def __init__(
        self,
        request: Request,
        trainings: Trainings,
        console: Console,
        pool_for: PoolFor | None = None,
        kept: Mapping[str, Kept] | None = None,
        probed: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.request, self.trainings = request, trainings
        self._kept, self.probed = kept or {}, probed or {}
        self._console = console
        self.claims = Claims(request.root / CLAIMS)
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
        asks = self.request.asks
        return [row for e in self.request.experiments for row in e.rows if asks(row.variant)]

    def variants(self) -> list[str]:
        """Return the variants that are trained and measured, or probed, each once."""
        rows = [row.variant for row in self.rows() if row.variant is not None]
        return list(
            dict.fromkeys([*rows, *(n for e in self.request.experiments for n in self._probed(e))])
        )

    def _probed(self, experiment: Experiment) -> list[str]:
        return [n for n in experiment.options.get("variants", ()) if self.request.asks(n)]

    def wanted(self) -> list[Training]:
        """Return all trainings that the experiments are of, each once, parents first."""
        return in_order(t for e in self.request.experiments for t in self.needs(e))

    def unmeasured(self, training: Training) -> list[Measure]:
        """Return the evaluations of a training that are still to be made."""
        found = {m.key: m for m in map(self.measure, self.rows())}
        same = (m for m in found.values() if m.training.key == training.key)
        return [m for m in same if self.report(m) is None]

    def missing(self) -> list[Training]:
        """Return the trainings that are not there and are still needed, parents first."""
        probed = [self.training(n) for e in self.request.experiments for n in self._probed(e)]
        probed = [t for t in probed if t.key not in self.probed]
        measures = {m.key: m for m in map(self.measure, self.rows())}.values()
        needed = [m.training for m in measures if self.report(m) is None]
        return [t for t in in_order([*needed, *probed]) if self.trainings.done(t) is None]

    def needs(self, experiment: Experiment) -> list[Training]:
        """Return the trainings of one experiment, parents first."""
        names = [r.variant for r in experiment.rows if r.variant and self.request.asks(r.variant)]
        return in_order(map(self.training, [*names, *self._probed(experiment)]))

    def called(self, training: Training) -> str:
        """Return the variants that a training is of, or that begin with it."""
        names = []
        for name in self.variants():
            of = self.training(name)
            if training.key in (of.key, *(one.key for one in of.ancestors)):
                names.append(name)
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

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

    def run(
        self,
        after: Callable[[], None],
        train: bool = True,
        trained: Callable[[], None] = lambda: None,
    ) -> None:
        """Train and measure what is missing.

        Args:
            after: called when an evaluation is finished.
            trained: called after each training.
            train: False trains nothing: what is not trained is left out.

        Raises:
            OutOfTime: before all was done.
            ValueError, CommandFailed: an evaluation was refused or failed. A training that
                failed is in `failed`, and its rows are left out.
        """
        # Weights that are given need no training, so they are there even if nothing is trained.
        keys = [t.key for t in self.missing() if train or not t.reads_data]
        others: set[str] = set()
        while busy := self._pass(keys, after, trained):
            for key in sorted(busy - others):
                self.say(f"another process is at {key}")
            others |= busy
            self._in_time()
            time.sleep(WAIT_S)

    def _pass(
        self, keys: Sequence[str], after: Callable[[], None], trained: Callable[[], None]
    ) -> set[str]:
        """Do all that no other process is at; return what others are at."""
        busy: set[str] = set()
        for training in self.wanted():
            if training.key in keys and not self._trained(training, keys, trained):
                busy.add(training.key)
            if self.trainings.done(training) is None:
                continue
            measures = self.unmeasured(training)
            for number, measure in enumerate(measures, 1):
                self._in_time()
                with self.claims.of(measure.key) as mine:
                    if not mine:
                        busy.add(measure.key)
                    elif self.report(measure) is None:
                        self.say(
                            f"evaluation {number} of {len(measures)} of "
                            f"{self.called(training)}: {measure.key}"
                        )
                        self._evaluate(measure)
                        after()
        return busy

    def _trained(
        self, training: Training, keys: Sequence[str], trained: Callable[[], None]
    ) -> bool:
        """Train, unless that is done or failed; return False where another process is at it."""
        parent = training.parent
        if self.trainings.done(training) is not None or training.key in self.failed:
            return True
        if parent is not None and self.trainings.done(parent) is None:
            return any(one.key in self.failed for one in training.ancestors)
        with self.claims.of(training.key) as mine:
            if mine and self.trainings.done(training) is None:
                self._train(training, f"training {keys.index(training.key) + 1} of {len(keys)}")
                trained()
        return mine

    def _train(self, training: Training, place: str) -> None:
        """Train; one that fails leaves its rows out and no others."""
        self._in_time()
        self.say(f"{place}, of {self.called(training)}: {training.key}")
        try:
            self.trainings.ensure(training, self.say)
        except CommandFailed as error:
            self.failed[training.key] = str(error)
            self.say(f"{place} failed: {error}")

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
        if path.exists():
            return score_of(json.loads(path.read_text(encoding="utf-8")))
        kept = self._kept.get(measure.key)
        return None if kept is None else dict(kept.row["score"])

    def results(self, measure: Measure) -> list[dict[str, Any]]:
        """Return the episodes that an evaluation has finished so far."""
        folder = self.place(measure)
        if measure.key in self._kept and not (folder / REPORT).exists():
            return [dict(result) for result in self._kept[measure.key].results]
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
        kept = self._kept.get(measure.key)
        trained = {} if kept is None else kept.row
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
            "training_s": trained.get("training_s") if done is None else done["seconds"],
            "system1_weights": trained.get("system1_weights") if done is None else weights(done),
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
            rows = [{"training": m.training.key, "score": self.report(m)} for m in measures]
            chain, twice = measures[0].suite.is_chain, of_two_trainings(*rows)
            found = judge(contrast, first, second, chain, base, twice)
        return found | {"paper_difference": published_difference(experiment, contrast)}


def weights(done: Mapping[str, Any]) -> int | None:
    """Return how many weights the policy of a finished training has, or None if it names none."""
    prefix = "system1.policy.options.path="
    paths = [w.removeprefix(prefix) for w in done["overrides"] if prefix in w]
    place = Path(paths[0]) if paths else SHIPPED_POLICY
    if not (place / WEIGHTS).is_file():
        return None
    return sum(math.prod(shape) for _, shape in tensor_header(place / WEIGHTS)[0].values())
