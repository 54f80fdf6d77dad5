"""What a run refuses before anything is started, and what it knows of parts that do not answer."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from openhelix.runtime.core.config import CommandFailed, ConfigError, load
from openhelix.runtime.core.plugins import resolve
from openhelix.runtime.launch import graph as graph_module
from openhelix.runtime.launch.graph import Graph, GraphError, cluster_address, probe_cluster
from openhelix.runtime.launch.node import Interrupts

JOB: dict[str, Any] = {"assignments": [], "initial": None}
ENGINE = "system2.engine={target: 'openhelix.runtime.robots.fake:PointEngine'}"


def graph(folder: Path, *words: str) -> Graph:
    return Graph(load(None, ["ray=false", ENGINE, *words]), JOB, folder)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "system1.policy={target: 'no_such_package.policy:Mine'}",
            r"^system1\.policy\.target: 'no_such_package\.policy:Mine': No module named 'no_such_package'$",
        ),
        (
            "system1.policy={target: 'openhelix.system1.polcy:DiffusionPolicy.load'}",
            r"^system1\.policy\.target: .*: no module named 'openhelix\.system1\.polcy'$",
        ),
        (
            "system2.engine={target: 'tests.fakse:PointEngine'}",
            r"^system2\.engine\.target: .*: no module named 'tests\.fakse'$",
        ),
    ],
)
def test_a_part_that_is_not_there_is_refused_before_any_process_starts(
    tmp_path: Path, words: str, expected: str
) -> None:
    run = graph(tmp_path, words)
    try:
        with pytest.raises(ConfigError, match=expected):
            run.start()
        assert run.ended() == {} and not (tmp_path / "logs").exists()
    finally:
        run.close()


def test_every_part_has_a_whole_health_record_before_it_is_set_up(tmp_path: Path) -> None:
    run = graph(tmp_path, "system1.policy={target: 'tests.fakes:ReachPolicy'}")
    try:
        found = {spec.name: resolve(spec.target)(**spec.options).health() for spec in run.specs}
    finally:
        run.close()
    assert set(found) == {"system1", "control", "system2", "observer", "world", "camera"}
    assert found["system1"]["policy_spec"] is None and found["system2"]["latent_spec"] is None
    assert found["control"]["steps"] == 0 and found["control"]["loop_state"] == "wait"
    assert found["control"]["latent_age_s"] is None and not found["control"]["finished"]
    assert found["world"]["starved_steps"] == found["camera"]["frames"] == 0
    assert found["observer"]["ticks"] == 0


def test_a_part_that_does_not_answer_has_the_fields_that_all_have(tmp_path: Path) -> None:
    run = graph(tmp_path, "system1.policy={target: 'tests.fakes:ReachPolicy'}")
    try:
        health = run.health("system2", 0.05)
    finally:
        run.close()
    assert health == {"name": "system2", "state": "unreachable", "error": "", "pid": None}


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("auto", "auto"),
        ("localhost", "127.0.0.1:6379"),
        ("localhost:7000", "127.0.0.1:7000"),
        ("10.0.0.2", "10.0.0.2:6379"),
        ("head.local:6380", "head.local:6380"),
    ],
)
def test_a_clusters_address_may_be_written_shortly(text: str, address: str) -> None:
    assert cluster_address(text) == address


@pytest.mark.parametrize("text", ["ray://head:10001", ":6379", "head:", "head:0", "head:70000"])
def test_what_is_no_clusters_address_is_refused_before_anything_starts(
    tmp_path: Path, text: str
) -> None:
    with pytest.raises(ConfigError, match=r"^ray_address: .*; write auto, HOST or HOST:PORT"):
        graph(tmp_path, "ray=true", f"ray_address={text}")


def test_a_cluster_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    reach = "system1.policy={target: 'tests.fakes:ReachPolicy'}"
    run = graph(tmp_path, reach, "ray=true", f"ray_address=localhost:{port}")
    try:
        with pytest.raises(CommandFailed, match=rf"^ray_address: no Ray .* '127\.0\.0\.1:{port}'"):
            run.start()
        assert not (tmp_path / "logs").exists()
    finally:
        run.close()


def answering(listener: socket.socket, words: bytes) -> None:
    """Be a server that greets everybody with the same words."""
    while True:
        try:
            peer, _ = listener.accept()
        except OSError:
            return
        with peer:
            peer.recv(4096)
            peer.sendall(words)


@pytest.mark.parametrize(
    ("words", "is_one"),
    [
        (bytes((0, 0, 6, 4, 0, 0, 0, 0, 0)) + bytes(6), True),  # settings, as gRPC sends them
        (b"HTTP/1.0 400 Bad Request\r\n\r\n", False),
        (bytes((0, 0, 8, 7, 0, 0, 0, 0, 0)) + bytes(8), False),  # go away
        (b"\0\0", False),
        (b"", False),
    ],
)
def test_who_listens_at_a_clusters_address_and_is_none_is_told_at_once(
    words: bytes, is_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_module, "PROBE_S", 20.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        server = threading.Thread(target=answering, args=(listener, words), daemon=True)
        server.start()
        if is_one:
            probe_cluster(address)
        else:
            with pytest.raises(CommandFailed, match=r"^ray_address: no Ray cluster answers at"):
                probe_cluster(address)
        listener.shutdown(socket.SHUT_RDWR)
    server.join(20)


def test_a_listener_that_says_nothing_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "PROBE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(CommandFailed, match=r"^ray_address: no Ray cluster answers at"):
            probe_cluster(address)
        # Nothing can be read from one that wants TLS.
        monkeypatch.setenv("RAY_USE_TLS", "1")
        probe_cluster(address)


def test_no_cluster_on_this_host_is_told_without_asking_ray(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(graph_module, "RAY_DAEMON", "no-such-daemon")
    with pytest.raises(CommandFailed, match=r"^ray_address: no Ray cluster answers at 'auto'"):
        probe_cluster("auto")
    monkeypatch.setattr(graph_module, "RAY_DAEMON", psutil.Process().name())
    probe_cluster("auto")  # it is for Ray to say whether that is a cluster


def test_a_shared_system2_is_waited_for_as_long_as_is_said(tmp_path: Path) -> None:
    nobody = f"ipc://{tmp_path}/nobody"
    words = (f"system2.connect={nobody}", "system2.connect_timeout_s=0.5")
    run, told, said = graph(tmp_path, *words), [], []
    try:
        with pytest.raises(GraphError, match=r"unreachable after system2\.connect_timeout_s=0\.5"):
            run.await_system2(told.append, said.append, threading.Event())
        assert len(said) == 1 and nobody in said[0] and "connect_timeout_s=0.5" in said[0]
        assert told and all(nobody in text for text in told)
    finally:
        run.close()


def test_the_wait_for_a_shared_system2_ends_with_a_signal(tmp_path: Path) -> None:
    run = graph(tmp_path, f"system2.connect=ipc://{tmp_path}/nobody")
    interrupts, begun_s = Interrupts(), time.monotonic()

    def interrupt(_: str) -> None:
        interrupts.set()

    try:
        run.await_system2(interrupt, lambda _: None, interrupts)
        assert time.monotonic() - begun_s < 30  # of 60
    finally:
        run.close()
