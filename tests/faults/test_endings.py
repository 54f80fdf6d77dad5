"""However `openhelix run` is ended, the robot is stopped and no process is left."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil

from tests.integration.command import control_log, nodes_of, start, started, wait_for


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
    assert process.returncode == 130, errors
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
