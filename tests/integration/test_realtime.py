"""Real processes on the wall clock: they run, and they survive or stop as they should."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from openhelix.runtime.control.episodes import Assignment
from openhelix.runtime.core.config import ConfigError
from tests.integration.session import FAR, session


def scrape(url: str) -> set[str]:
    """The names of the metrics that an endpoint serves."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        return {family.name for family in text_string_to_metric_families(answer.read().decode())}


def test_a_run_moves_the_arm_and_reports_what_it_measured(tmp_path: Path) -> None:
    tasks = (Assignment("", "reach 0.1 -0.2 0.6"), FAR)
    with session(tmp_path, "tasks.steps_limit=45", "output.video=true", assignments=tasks) as run:
        run.begin()
        families = scrape(run.until("work", lambda h: h["steps"] > 10)["metrics_url"])
        served = scrape(run.graph.health("system2")["metrics_url"])
        report = run.finished()
        sinks = run.graph.ask("observer", "finish", timeout_s=30.0, told=report["ticks_told"])
    assert [row["env_steps"] for row in report["tasks"]] == [45, 45]
    assert [row["reason"] for row in report["tasks"]] == ["step limit", "step limit"]
    assert report["ticks_by_state"]["run"] == 90
    assert report["ticks"] == sum(report["ticks_by_state"].values())
    assert report["latents_received"] >= 2 and report["latents_missed"] == 0  # one each
    age = report["latent_age_s"]
    assert 0.0 < age["p50"] <= age["p99"] <= age["max"]
    assert report["s1_latency_s"]["p50"] > 0 and report["stopped"] is None
    assert {"openhelix_loop_ticks", "openhelix_latent_age_seconds"} <= families
    assert {"openhelix_system2_published", "openhelix_wire_received"} <= served
    # The command draws the film from the track when the run is over.
    assert sinks["ticks_lost"] == 0 and sinks["track"]["written"] > 0


def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path: Path) -> None:
    wrong = "system1.policy.options={cameras: [[static, 100, 100]]}"
    with session(tmp_path, wrong) as run, pytest.raises(ConfigError, match="100x100"):
        run.begin()


def test_the_world_goes_on_when_nobody_commands_it(tmp_path: Path) -> None:
    with session(tmp_path, "tasks.steps_limit=20") as run:
        run.begin()
        run.finished()
        before, since_s = run.graph.health("world")["starved_steps"], time.monotonic()

        def gone_on() -> int:
            return int(run.graph.health("world")["starved_steps"]) - before

        run.until("steps that nobody commanded", lambda _: gone_on() >= 90)
        steps, took_s = gone_on(), time.monotonic() - since_s
    # 30 a second, on its own clock, and up to a second that a busy machine had kept from it.
    assert steps <= 30 * took_s + 30
