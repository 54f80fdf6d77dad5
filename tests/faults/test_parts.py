"""One part of a running system fails: it is survived, or the robot stops with a reason."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.integration.session import session

# A restart takes as long as it takes: nobody shall stop the arm for that.
PATIENT = ("tasks.steps_limit=100000", "safety.latent_max_age_s=120")


def test_killing_system2_is_survived_and_work_resumes(tmp_path: Path) -> None:
    with session(tmp_path, *PATIENT) as run:
        run.begin()
        run.until("work", lambda h: h["steps"] > 10)
        run.signal("system2", signal.SIGKILL)
        steps = run.until("the loop", lambda _: True)["steps"]
        run.until("work with the last latent", lambda h: h["steps"] > steps + 5)
        run.until_restarted("system2")
        run.until_served()
        run.graph.ask("control", "halt")
        report = run.finished()
    assert report["safe_stops"] == {} and report["latents_mismatched"] == 0
    assert report["tasks"][0]["reason"] == "interrupted"


def test_silence_of_system2_beyond_its_grace_stops_until_it_returns(tmp_path: Path) -> None:
    limits = ("safety.latent_max_age_s=0.6", "safety.latent_grace_s=0.4")
    with session(tmp_path, "tasks.steps_limit=100000", *limits) as run:
        run.begin()
        run.until("work", lambda h: h["steps"] > 10)
        run.signal("system2", signal.SIGSTOP)
        health = run.until("a stop", lambda h: h["loop_state"] == "stop")
        assert "latent silent" in health["loop_reason"]
        run.signal_again("system2", signal.SIGCONT)
        run.until("work again", lambda h: h["loop_state"] == "run")


def test_a_frozen_camera_stops_the_robot_for_good(tmp_path: Path) -> None:
    with session(tmp_path, "tasks.steps_limit=100000", "safety.camera_max_age_s=3") as run:
        run.begin()
        run.until("work", lambda h: h["steps"] > 10)
        run.signal("camera", signal.SIGSTOP)
        report = run.finished()
        run.signal_again("camera", signal.SIGCONT)
    assert "camera stale" in report["stopped"]
    assert report["safe_stops"] == {"camera_stale": 1}
    assert report["tasks"][0]["reason"].startswith("safe stop")


def test_a_dead_world_stops_the_run(tmp_path: Path) -> None:
    with session(tmp_path, "tasks.steps_limit=100000") as run:
        run.begin()
        run.until("work", lambda h: h["steps"] > 10)
        run.signal("world", signal.SIGKILL)
        report = run.finished()
    assert "proprioception stale" in report["stopped"]


def test_a_failing_policy_makes_the_robot_hold_not_fall(tmp_path: Path) -> None:
    policy = (
        "system1.policy.options={cameras: [[static, 200, 200]], speed_m: 0.002, fail_at: 3}",
        "tasks.steps_limit=60",
    )
    with session(tmp_path, *policy) as run:
        run.begin()
        report = run.finished()
    assert report["s1_failures"] == 1
    assert report["tasks"][0]["env_steps"] == 60 and report["stopped"] is None


def test_ray_restarts_a_killed_system2_and_the_run_goes_on(tmp_path: Path) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with session(tmp_path, "ray=true", *PATIENT) as run:
        run.begin()
        run.until("work", lambda h: h["steps"] > 10)
        run.signal("system2", signal.SIGKILL)
        run.until_restarted("system2")
        run.until_served()
        run.graph.ask("control", "halt")
        report = run.finished()
    assert report["safe_stops"] == {}
    assert report["tasks"][0]["reason"] == "interrupted"


def test_a_part_that_starts_again_has_a_whole_health_record_all_the_while(tmp_path: Path) -> None:
    with session(tmp_path, *PATIENT) as run:
        run.begin()
        nodes = [spec.name for spec in run.graph.specs]
        whole = {name: set(run.until(name, lambda _: True, node=name)) for name in nodes}
        for name in ("system2", "system1", "camera"):
            run.signal(name, signal.SIGKILL)
        states: dict[str, set[str]] = {name: set() for name in nodes}

        def back(_: object) -> bool:
            for name in nodes:
                health = run.graph.health(name, 0.1)
                assert set(health) == whole[name], health
                states[name].add(health["state"])
            return all(
                run.graph.health(name, 0.1)["pid"] not in (None, run.old_pid(name))
                for name in ("system2", "system1", "camera")
            )

        run.until("all of them again", back)
        assert states["control"] == {"ready"}
