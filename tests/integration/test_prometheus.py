"""A real Prometheus scrapes a real run and a real evaluation: every rule and panel has an answer."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from openhelix.benchmarks.calvin.tasks import TASKS
from openhelix.benchmarks.evaluation.evaluation import evaluate
from openhelix.benchmarks.evaluation.metrics import served
from openhelix.benchmarks.evaluation.pool import LocalPool
from openhelix.benchmarks.evaluation.suites import Suite
from openhelix.runtime.control.episodes import Assignment
from openhelix.runtime.core.config import METRICS_PARTS
from openhelix.runtime.observe.metrics import GpuMetrics, serve
from tests.deploy.dashboards import PanelQuery, queries
from tests.evaluation.small import CAMERAS, small_config, small_plan
from tests.integration.observed import BINARY, MISSING, Prometheus, Sample, prometheus
from tests.integration.session import session

pytestmark = pytest.mark.skipif(BINARY is None, reason=MISSING)
RANGE_S, RATE_S = 300, 20
# Goes to the LED's button at that sentence, to some other point at any other.
PARTS = (
    "system2.engine={target: 'tests.evaluation.small:WordEngine', options: {}}",
    "system1.policy={target: 'tests.fakes:ReachPolicy', "
    f"options: {{cameras: {CAMERAS}, speed_m: 0.01}}}}",
)
LED, DRAWER = (Assignment(t, TASKS[t].sentence) for t in ("turn_on_led", "open_drawer"))
# Series that neither a laptop nor a run on one host can have.
ELSEWHERE = {
    "vllm:": "needs vLLM: tests/integration/test_prometheus_vllm.py asks these",
    "openhelix_gpu_memory": "needs a GPU; a test below makes one up",
    "openhelix_instruction_understood": "only of a System 2 that judges; the panel says so",
}


@dataclass
class Seen:
    """What Prometheus knew at the end of the run."""

    rules: list[dict]
    recorded: dict[str, list[Sample]]
    answers: list[tuple[PanelQuery, list[Sample]]]
    task_counts: dict[str, float]
    report: dict


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """An evaluation, then a run of two instructions, both scraped."""
    folder = tmp_path_factory.mktemp("observed")
    with prometheus(folder) as server:
        port = f"output.metrics_port={server.parts_port}"
        options = (*PARTS, port, "output.video=true", "tasks.steps_limit=90")
        with (
            served(small_config(port), pytest.fail) as metrics,
            session(folder, *options, assignments=(LED, DRAWER)) as run,
        ):
            _evaluate(folder, server, metrics)
            run.begin()
            report = run.finished(60.0)
            tasks = "sum(openhelix_tasks_total)"
            server.until("the last outcome", lambda: server.value(tasks) == 2)
            rate = "instance:openhelix_success:wilson_low1d"
            server.until("a success rate", lambda: server.value(rate) is not None)
            yield _look(server, report)


def _evaluate(folder: Path, server: Prometheus, metrics) -> None:
    """Two tasks, and chains at two intervals."""
    pool = LocalPool(small_config())
    plans = [
        small_plan(Suite("tasks", count=2, tasks=("turn_on_led", "open_drawer")), steps=60),
        small_plan(Suite("calvin", count=1), steps=3, interval=5, latency=2),
    ]
    try:
        for number, plan in enumerate(plans):
            told = metrics.watch(plan, lambda *_: None)
            # Counted from 0 only if 0 was scraped.
            zero = f'openhelix_eval_episodes_planned{{suite="{plan.suite.name}"}}'
            server.until(zero, lambda zero=zero: server.value(zero) is not None)
            evaluate(plan, pool, folder / f"eval-{number}", told)
    finally:
        pool.close()


def _look(server: Prometheus, report: dict) -> Seen:
    rules = server.rules()
    names = [rule["name"] for rule in rules if rule["type"] == "recording"]
    outcomes = server.ask("sum by (outcome) (openhelix_tasks_total)")
    return Seen(
        rules,
        {name: server.ask(name) for name in names},
        [(query, server.ask(query.filled(RANGE_S, RATE_S))) for query in queries()],
        {s["metric"]["outcome"]: float(s["value"][1]) for s in outcomes},
        report,
    )


def test_the_run_is_counted_as_its_report_says(seen: Seen) -> None:
    good = seen.report["n_success"]
    assert seen.task_counts == {"success": good, "failure": 2 - good}
    assert good == 1  # the LED; nothing opens the drawer


def test_every_rule_is_evaluated_without_error(seen: Seen) -> None:
    assert len(seen.rules) > 40
    for rule in seen.rules:
        assert rule["health"] == "ok", f"{rule['name']}: {rule.get('lastError')}"


def test_every_recorded_series_is_there(seen: Seen) -> None:
    assert [name for name, samples in seen.recorded.items() if not samples] == []


def test_every_query_of_every_panel_returns_something(seen: Seen) -> None:
    assert len(seen.answers) > 100
    empty = [
        f"{query.board} / {query.panel}: {query.expr}"
        for query, samples in seen.answers
        if not samples
        and not any(name in query.expr for name in ELSEWHERE)
        # What never happened has no row in a table of events; the panel says so.
        and not query.expr.endswith("> 0")
    ]
    assert not empty, "\n".join(empty)


def test_what_is_excused_is_really_not_there(seen: Seen) -> None:
    """An excuse that has become needless is taken off the table."""
    for name in ELSEWHERE:
        excused = [samples for query, samples in seen.answers if name in query.expr]
        assert excused and not any(excused), name


def test_legends_name_labels_that_the_series_have(seen: Seen) -> None:
    for query, samples in seen.answers:
        for label in query.legend.replace("{{", "\0").split("\0")[1:]:
            wanted = label.partition("}}")[0]
            if samples and wanted != "robot":  # a label of targets on other hosts
                assert any(wanted in s["metric"] for s in samples), f"{query.panel}: {wanted}"


def test_the_panel_about_gpus_has_an_answer_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        memory_reserved=lambda _: 30 << 30,
        mem_get_info=lambda _: (50 << 30, 80 << 30),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    asked = [query for query in queries() if "openhelix_gpu_memory" in query.expr]
    assert len(asked) == 3
    with prometheus(tmp_path) as server:
        endpoint = serve(server.parts_port + METRICS_PARTS.index("system2"), GpuMetrics())
        try:
            for query in asked:
                expr = query.filled(RANGE_S, RATE_S)
                server.until(query.legend, lambda expr=expr: server.ask(expr))
            used = "openhelix_gpu_memory_used_bytes / openhelix_gpu_memory_total_bytes"
            assert server.value(used) == 0.375
        finally:
            endpoint.close()


def test_a_system2_that_hangs_raises_the_alarm(tmp_path: Path) -> None:
    limits = ("safety.latent_max_age_s=1.5", "safety.latent_grace_s=0.5")
    with prometheus(tmp_path) as server:
        options = (f"output.metrics_port={server.parts_port}", *limits)
        with session(tmp_path, *options, "tasks.steps_limit=100000") as run:
            run.begin()
            rate = "instance:openhelix_loop_ticks:rate30s"
            server.until("ticks", lambda: (server.value(rate) or 0) > 20)
            assert "OpenHelixSafeStop" not in server.firing()
            run.signal("system2", signal.SIGSTOP)
            expected = {"OpenHelixLatentStale", "OpenHelixSafeStop"}
            server.until(f"{expected}", lambda: expected <= server.firing())
            stops = 'openhelix_safety_stops_total{reason="latent_silent"}'
            assert (server.value(stops) or 0) >= 1
            run.signal_again("system2", signal.SIGCONT)
