"""What Prometheus sees of an evaluation: the same counts as in its results."""

from __future__ import annotations

import urllib.request

import pytest

from openhelix.benchmarks.evaluation.evaluation import evaluate
from openhelix.benchmarks.evaluation.metrics import EvalMetrics, cell_of, served
from openhelix.benchmarks.evaluation.pool import LocalPool
from openhelix.benchmarks.evaluation.suites import Suite
from openhelix.runtime.observe.metrics import serve
from tests.evaluation.small import small_config, small_plan


def values(metrics):
    return {
        (s.name, *(v for k, v in s.labels.items() if k != "le"), s.labels.get("le")): s.value
        for family in metrics.collect()
        for s in family.samples
    }


def test_counts_are_those_of_the_results(tmp_path):
    pool, metrics, told = LocalPool(small_config()), EvalMetrics(), []
    tasks = small_plan(Suite("tasks", count=2, tasks=("turn_on_led", "open_drawer")), steps=60)
    chains = small_plan(Suite("calvin", count=1), steps=3, interval=5, latency=2)
    try:
        # At 0 before the first episode: what appears with its first event is never seen rising.
        metrics.watch(tasks, lambda *_: None)
        before = values(metrics)
        evaluate(tasks, pool, tmp_path / "a", metrics.watch(tasks, lambda *a: told.append(a)))
        report = evaluate(chains, pool, tmp_path / "b", metrics.watch(chains, lambda *_: None))
    finally:
        pool.close()
    name = "openhelix_eval_tasks_total"
    assert before[name, "tasks", "turn_on_led", "success", None] == 0
    after = values(metrics)
    assert [done for done, _, _ in told] == [1, 2, 3, 4]
    good = sum(result["success"] for _, _, result in told)
    assert good > 0
    assert after["openhelix_eval_episodes_total", "tasks", "success", None] == good
    assert after["openhelix_eval_episodes_total", "tasks", "failure", None] == 4 - good
    assert after[name, "tasks", "turn_on_led", "success", None] == good
    assert after[name, "tasks", "open_drawer", "failure", None] == 2
    assert after["openhelix_eval_episodes_planned", "tasks", None] == 4
    cell = cell_of(chains)
    assert cell == ("calvin", "lockstep", "5", "2")
    assert after["openhelix_eval_attempts_total", *cell, "failure", None] == 1
    assert after["openhelix_eval_latent_age_steps_count", *cell, None] == 1
    assert after["openhelix_eval_chain_successes_count", "calvin", None] == 1
    assert after["openhelix_eval_chain_successes_sum", "calvin", None] == report["avg_len"]


def test_an_episode_that_broke_off_is_an_error_and_a_failed_attempt():
    plan, metrics = small_plan(Suite("tasks", count=1, tasks=("turn_on_led",))), EvalMetrics()
    told = metrics.watch(plan, lambda *_: None)
    row = {"task": "turn_on_led", "success": False, "latent_age_steps": None}
    told(1, 1, {"error": "RuntimeError: x", "success": False, "in_a_row": 0, "tasks": [row]})
    after = values(metrics)
    assert after["openhelix_eval_episodes_total", "tasks", "error", None] == 1
    assert after["openhelix_eval_episodes_total", "tasks", "failure", None] == 0
    assert after["openhelix_eval_attempts_total", *cell_of(plan), "failure", None] == 1


def test_a_taken_port_is_said_and_the_evaluation_runs(capsys):
    said: list[str] = []
    taken = serve(0)
    try:
        with served(small_config(f"output.metrics_port={taken.port - 2}"), said.append) as metrics:
            assert list(metrics.collect())
    finally:
        taken.close()
    assert len(said) == 1 and str(taken.port) in said[0]


def test_the_endpoint_ends_with_the_evaluation():
    free = serve(0)
    free.close()
    config = small_config(f"output.metrics_port={free.port - 2}")
    with served(config, pytest.fail), urllib.request.urlopen(free.url, timeout=5) as answer:
        assert "openhelix_eval_episodes" in answer.read().decode()
    with pytest.raises(OSError):
        urllib.request.urlopen(free.url, timeout=5)
