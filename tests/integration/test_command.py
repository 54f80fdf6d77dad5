"""`openhelix run` as a user has it: from the shell, with mistakes, Ctrl-C and kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.session import SMALL, session

RUN = [sys.executable, "-m", "runtime.cli", "run", *SMALL, "tasks.instruction=reach 0.3 0.1 0.7"]
MEASURED = (
    *(
        "ready_s",
        "tick_duration_s",
        "prefetch_duration_s",
        "s1_latency_s",
        "s2_latency_s",
        "sinks",
        "versions",
    ),
    *("tasks",),
)


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*RUN, "ray=false", f"output.folder={folder}", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(what: str, test: Any, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not test():
        assert time.monotonic() < deadline_s, f"{what} did not come about"
        time.sleep(0.05)


def control_log(folder: Path) -> str:
    log = folder / "run-0001" / "logs" / "control.log"
    return log.read_text() if log.exists() else ""


def nodes_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def started(folder: Path) -> bool:
    """Whether the loop has begun, as its log says."""
    return "the loop starts" in control_log(folder)


def test_ctrl_c_stops_the_robot_and_leaves_a_report(tmp_path: Path) -> None:
    process = start(tmp_path, "tasks.steps_limit=100000")
    wait_for("the loop", lambda: started(tmp_path) or process.poll() is not None)
    nodes = nodes_of(process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    report = json.loads((tmp_path / "latest" / "report.json").read_text())
    assert report["interrupted"] is True
    assert report["tasks"][0]["reason"] == "interrupted"
    assert len(nodes) >= 5 and not any(node.is_running() for node in nodes)


def test_ctrl_c_while_starting_ends_everything(tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for("the processes", lambda: len(nodes_of(process)) >= 5)
    nodes = nodes_of(process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "openhelix run: interrupted"
    assert "Traceback" not in errors
    assert not any(node.is_running() for node in nodes)


def test_a_closed_terminal_stops_the_robot_and_leaves_a_report(tmp_path: Path) -> None:
    process = start(tmp_path, "tasks.steps_limit=100000")
    wait_for("the loop", lambda: started(tmp_path) or process.poll() is not None)
    nodes = nodes_of(process)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert json.loads((tmp_path / "latest" / "report.json").read_text())["interrupted"] is True
    assert not any(node.is_running() for node in nodes)


def test_kill_9_of_the_head_takes_its_processes_along(tmp_path: Path) -> None:
    process = start(tmp_path, "tasks.steps_limit=100000")
    wait_for("the processes", lambda: len(nodes_of(process)) >= 5)
    nodes = nodes_of(process)
    process.kill()
    process.communicate(timeout=120)
    gone, alive = psutil.wait_procs(nodes, timeout=60)
    assert not alive and len(gone) >= 5


def test_when_the_head_is_killed_the_robot_is_stopped(tmp_path: Path) -> None:
    process = start(tmp_path, "tasks.steps_limit=100000")
    wait_for("the loop", lambda: started(tmp_path) or process.poll() is not None)
    nodes = nodes_of(process)
    process.kill()
    process.communicate(timeout=120)
    _, alive = psutil.wait_procs(nodes, timeout=60)
    assert not alive
    assert "the robot is stopped" in control_log(tmp_path)


def test_a_crash_of_the_control_process_is_told_in_one_line(tmp_path: Path) -> None:
    process = start(tmp_path, "tasks.steps_limit=100000")
    wait_for("the loop", lambda: started(tmp_path) or process.poll() is not None)
    for node in nodes_of(process):
        if '"name": "control"' in " ".join(node.cmdline()):
            node.kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "control" in errors.splitlines()[-1] and "Traceback" not in errors


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sytem2.hz=1"], "did you mean 'system2'"),
        (["tasks.instruction=' '"], "tasks.instruction"),
        (["tasks.instruction="], "tasks.instruction: nothing follows"),
        (["world.scene=Q"], "'A', 'B', 'C' or 'D'"),
        (["--frobnicate"], "unknown option"),
        (["robot.name=panda"], "no driver 'panda'; there are: "),
        (["world.cameras=[static, front]"], "'static' or 'gripper'"),
        (["--config", "no/such.yaml"], "no file no/such.yaml"),
    ],
)
def test_a_mistake_gets_one_line_and_code_2(
    tmp_path: Path, words: list[str], expected: str
) -> None:
    process = start(tmp_path / "out", *words)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and output == ""
    assert len(errors.strip().splitlines()) == 1 and expected in errors
    assert not (tmp_path / "out").exists()


def test_lockstep_twice_gives_the_same_report(tmp_path: Path) -> None:
    reports = []
    for folder in ("a", "b"):
        words = ["control.clock=lockstep", "tasks.steps_limit=25", "--json", "output.record=true"]
        process = start(tmp_path / folder, *words)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        reports.append(json.loads(output))
    for report in reports:
        assert [row.pop("duration_s") > 0 for row in report["tasks"]] == [True]
    first, second = reports
    assert first["tasks"] == second["tasks"] and first["tasks"][0]["env_steps"] == 25
    same = [{k: v for k, v in r.items() if k not in MEASURED} for r in reports]
    assert same[0] == same[1]
    assert first["clock"] == "lockstep" and first["latents_published"] == 5


def test_ray_restarts_a_killed_system2_and_the_run_goes_on(tmp_path: Path) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with session(tmp_path, "ray=true", "tasks.steps_limit=100000") as run:
        run.begin()
        run.until("work", lambda h: h["steps"] > 10)
        old = run.pid("system2")
        run.signal("system2", signal.SIGKILL)
        run.until("an old latent", lambda h: (h["latent_age_s"] or 0) > 0.8)
        run.until("a fresh latent", lambda h: (h["latent_age_s"] or 9) < 0.5, timeout_s=60.0)
        assert run.pid("system2") != old
        run.graph.ask("control", "halt")
        assert run.finished()["tasks"][0]["reason"] == "interrupted"
