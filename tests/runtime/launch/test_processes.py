"""Plain processes: what dies is told or started again, what cannot start says why first."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from openhelix.runtime.launch.node import NodeRunner, NodeSpec
from openhelix.runtime.launch.processes import ProcessHost, reap
from openhelix.runtime.transport.rpc import RpcClient, RpcError, RpcServer


class Idle:
    """A node that does nothing, or cannot start, or not soon."""

    def __init__(self, fails: str = "", waits_s: float = 0.0) -> None:
        self._fails, self._waits_s = fails, waits_s

    def setup(self) -> None:
        time.sleep(self._waits_s)
        if self._fails:
            raise RuntimeError(self._fails)

    def run(self, stop: threading.Event) -> None:
        stop.wait()

    def health(self) -> dict[str, Any]:
        return {"nice": os.getpriority(os.PRIO_PROCESS, 0)}

    def handlers(self) -> Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        return {}

    def close(self) -> None:
        logging.info("closed")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[ProcessHost]:
    host = ProcessHost(tmp_path / "logs")
    yield host
    host.close()


def spec(folder: Path, name: str, **changes: Any) -> NodeSpec:
    target = "tests.runtime.launch.test_processes:Idle"
    return NodeSpec(name, target, f"ipc://{folder}/{name}.rpc", **changes)


def health(node: NodeSpec, state: str, timeout_s: float = 30.0) -> dict[str, Any]:
    client = RpcClient(node.control)
    try:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            try:
                found = client.call("health", {}, 0.2)
            except RpcError:
                continue
            if found["state"] == state:
                return found
    finally:
        client.close()
    raise AssertionError(f"{node.name} did not become {state}")


def test_a_dead_node_is_told_and_one_that_may_is_started_again(
    host: ProcessHost, tmp_path: Path
) -> None:
    stays = spec(tmp_path, "stays", restart=False)
    returns = spec(tmp_path, "returns", nice=3)
    host.start([stays, returns])
    first = health(returns, "ready")
    assert first["nice"] == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 3)
    assert host.ended() == {}
    for node in (stays, returns):
        os.kill(health(node, "ready")["pid"], signal.SIGKILL)
    deadline_s = time.monotonic() + 30.0
    while host.ended() != {"stays": "was ended by signal 9"}:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    second = health(returns, "ready")
    assert second["pid"] != first["pid"]
    assert second["nice"] == first["nice"]
    steps = [second["startup"][name] for name in ("imported", "built", "ready")]
    assert second["startup"]["begun_ns"] > first["startup"]["begun_ns"] > 0
    for which in ("s", "cpu_s"):
        reached = [step[which] for step in steps]
        assert reached[0] > 0 and reached == sorted(reached)


def test_a_node_that_cannot_start_says_why_before_it_ends(
    host: ProcessHost, tmp_path: Path
) -> None:
    node = spec(tmp_path, "broken", options={"fails": "no such camera"}, restart=False)
    host.start([node])
    assert health(node, "failed")["error"] == "RuntimeError: no such camera"
    deadline_s = time.monotonic() + 30.0
    while host.ended() != {"broken": "ended with code 1"}:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_node_that_waits_in_its_setup_ends_when_told(host: ProcessHost, tmp_path: Path) -> None:
    node = spec(tmp_path, "slow", options={"waits_s": 300.0})
    host.start([node])
    health(node, "starting")
    host.close(timeout_s=60.0)  # then it would be killed, and close nothing
    assert "closed" in (tmp_path / "logs" / "slow.log").read_text()


def test_a_signal_between_two_steps_of_a_start_ends_it_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    node = spec(tmp_path, "slow", options={"waits_s": 300.0}, nice=1)
    runner = NodeRunner(node)
    start = RpcServer.start

    def started(server: RpcServer) -> None:
        start(server)
        runner.interrupt()

    monkeypatch.setattr(RpcServer, "start", started)
    with pytest.raises(SystemExit):
        runner.run()
    assert "closed" in caplog.text
    RpcServer(node.control, {}).close()  # the endpoint is free again


def test_who_does_not_end_when_told_is_ended_for_certain() -> None:
    words = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    for line, code in (("import time", -signal.SIGTERM), (words, -signal.SIGKILL)):
        process = subprocess.Popen(
            [sys.executable, "-c", f"{line}; print(flush=True); time.sleep(600)"],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        reap(process, 0.2 if code == -signal.SIGKILL else 60.0)
        process.stdout.close()
        assert process.returncode == code


class Parent(Idle):
    """A node with a process of its own, which it does not end; beside it one with a new session."""

    def setup(self) -> None:
        for apart in (False, True):
            # Without our mark where the session tells: as one that overwrites its environment.
            env = os.environ if apart else {"PATH": os.environ["PATH"]}
            subprocess.Popen(["sleep", "600"], env=env, start_new_session=apart)


def strays_of(node: NodeSpec) -> list[psutil.Process]:
    return psutil.Process(health(node, "ready")["pid"]).children()


def test_what_a_child_leaves_behind_is_ended_though_its_exit_code_is_0(
    host: ProcessHost, tmp_path: Path
) -> None:
    node = replace(spec(tmp_path, "parent"), target="tests.runtime.launch.test_processes:Parent")
    host.start([node])
    strays = strays_of(node)
    assert len(strays) == 2
    host.close(timeout_s=60.0)
    _, alive = psutil.wait_procs(strays, timeout=60)
    assert not alive


def test_what_a_child_that_is_started_again_left_behind_is_ended_before(
    host: ProcessHost, tmp_path: Path
) -> None:
    node = replace(spec(tmp_path, "parent"), target="tests.runtime.launch.test_processes:Parent")
    other = replace(node, name="other", control=f"ipc://{tmp_path}/other.rpc")
    host.start([node, other])
    first, bystanders = strays_of(node), strays_of(other)
    os.kill(health(node, "ready")["pid"], signal.SIGKILL)
    deadline_s = time.monotonic() + 30.0
    while host.restarts.get("parent") != 1:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    _, alive = psutil.wait_procs(first[:1], timeout=60)
    assert not alive
    strays_of(node)
    assert all(stray.is_running() for stray in bystanders)


class Deaf(Idle):
    """A node whose main thread hears no signal, as in a library that does not return."""

    def setup(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        sys.stdout.write("in its setup\n")
        sys.stdout.flush()
        time.sleep(600.0)


def test_a_child_whose_parent_was_killed_ends_though_its_main_thread_hears_nothing(
    tmp_path: Path,
) -> None:
    node = spec(tmp_path, "deaf")
    node = replace(node, target="tests.runtime.launch.test_processes:Deaf")
    command = [sys.executable, "-m", "openhelix.runtime.launch.processes", node.to_json()]
    starts = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen({command!r} + [str(os.getpid()), 'first'])\n"
        "time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", starts], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"in its setup\n"
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([child], timeout=60)
    parent.stdout.close()
    assert not alive


def test_a_child_that_was_halted_ends_with_its_parent_and_in_order(tmp_path: Path) -> None:
    nodes = [spec(tmp_path, "halted"), spec(tmp_path, "other")]
    texts = [node.to_json() for node in nodes]
    starts = (
        "import time\n"
        "from pathlib import Path\n"
        "from openhelix.runtime.launch.node import NodeSpec\n"
        "from openhelix.runtime.launch.processes import ProcessHost\n"
        f"ProcessHost(Path({str(tmp_path)!r})).start([NodeSpec.from_json(t) for t in {texts!r}])\n"
        "time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", starts])
    children = [psutil.Process(health(node, "ready")["pid"]) for node in nodes]
    children[0].suspend()
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    for child in alive:
        child.kill()
    assert not alive
    assert "closed" in (tmp_path / "halted.log").read_text()
