"""openhelix.benchmarks.evaluation.realtime_pool: episodes on the wall clock, on real processes."""

from __future__ import annotations

import os
import signal

import pytest

from openhelix.benchmarks.evaluation import realtime_pool
from openhelix.benchmarks.evaluation.evaluation import open_pool
from openhelix.benchmarks.evaluation.pool import Job
from openhelix.benchmarks.evaluation.runner import Conditions
from openhelix.benchmarks.evaluation.suites import Suite
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.launch.node import interruptible
from tests.evaluation.small import small_config


@pytest.mark.slow
def test_drawn_starts_and_moving_blocks_run_on_the_wall_clock():
    pool = open_pool(small_config("control.clock=realtime", "system2.hz=5"), workers=1)
    held, press = Suite(
        "tasks", count=1, tasks=("place_in_slider", "turn_on_led"), seed=0
    ).episodes()
    (moving,) = Suite(
        "calvin-d", count=1, tasks=("lift_red_block_table",), patterns=("circular",)
    ).episodes()
    conditions = Conditions(steps_limit=90, interval=6)
    jobs = [
        Job(episode, conditions, film="yes" if episode is press else "no")
        for episode in (held, press, moving)
    ]
    found = dict(zip(("held", "press", "moving"), pool.run(jobs), strict=True))
    for _, outcome in found.values():
        assert outcome.result["error"] is None
        assert outcome.result["tasks"][0]["env_steps"] > 0
    _, pressed = found["press"]
    assert pressed.result["success"] and pressed.result["tasks"][0]["reason"] == "success"
    assert pressed.video is not None and b"ftyp" in pressed.video[:16]
    assert found["held"][1].result["tasks"][0]["reason"] == "step limit"
    pool.close()


def test_a_signal_while_the_processes_of_an_episode_end_is_not_forgotten(monkeypatch):
    def run(*_):
        with interruptible():  # as the run's own, whose report was made before the signal
            os.kill(os.getpid(), signal.SIGTERM)
        return {"interrupted": False, "tasks": []}

    monkeypatch.setattr(realtime_pool, "run_realtime", run)
    pool = open_pool(small_config("control.clock=realtime"), workers=1)
    (episode,) = Suite("tasks", count=1, tasks=("turn_on_led",), seed=0).episodes()
    with pytest.raises(KeyboardInterrupt):
        next(iter(pool.run([Job(episode, Conditions(steps_limit=9, interval=6), film="no")])))
    pool.close()


def test_the_wall_clock_has_one_robot_and_one_world():
    with pytest.raises(ConfigError, match="--workers: 2"):
        open_pool(small_config("control.clock=realtime"), workers=2)
    with pytest.raises(ConfigError, match="--clock lockstep"):
        open_pool(small_config("control.clock=realtime", "robot.name=calvin"), workers=1)
