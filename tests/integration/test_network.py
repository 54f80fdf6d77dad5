"""The graph over TCP with keys, and one System 2 for several robots."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.launch.graph import GraphError
from openhelix.runtime.transport.sockets import BindRefused, generate
from tests.integration.session import SMALL, session
from tests.keys import key_folders


def free_port(count: int) -> int:
    """The first of `count` ports in a row that nobody uses now."""
    for port in range(21_000, 29_000, 37):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for i, s in enumerate(sockets):
                s.bind(("127.0.0.1", port + i))
            return port
        except OSError:
            continue
        finally:
            for s in sockets:
                s.close()
    raise AssertionError("no free ports")


def test_every_channel_over_tcp_with_curve_keys(tmp_path: Path) -> None:
    for name in ("server", "client"):
        generate(tmp_path / "keys", name)
    words = (
        *("transport.host=127.0.0.1", f"transport.base_port={free_port(14)}"),
        *(f"transport.keys={tmp_path / 'keys'}", "tasks.steps_limit=45"),
    )
    with session(tmp_path, *words) as run:
        run.begin()
        report = run.finished()
    assert report["tasks"][0]["env_steps"] == 45 and report["stopped"] is None
    assert report["latents_received"] >= 1


def test_beyond_this_host_keys_are_required(tmp_path: Path) -> None:
    words = ("transport.host=0.0.0.0", f"transport.base_port={free_port(14)}")
    with pytest.raises(BindRefused, match="openhelix keys"), session(tmp_path, *words):
        pass


@contextmanager
def served(address: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "openhelix.runtime.cli.main",
            "serve",
            address,
            *SMALL,
            *words,
            "--json",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_two_robots_share_one_system2_and_survive_its_restart(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/s2"
    share = (f"system2.connect={address}", "tasks.steps_limit=100000")
    one, two = tmp_path / "one", tmp_path / "two"
    with (
        served(address) as first,
        session(one, *share, "robot.id=arm1") as arm1,
        session(two, *share, "robot.id=arm2") as arm2,
    ):
        for arm in (arm1, arm2):
            arm.begin()
        for arm in (arm1, arm2):
            arm.until("work", lambda h: h["steps"] > 15)
        robots = arm1.graph.health("system2")["robots"]
        assert set(robots) == {"arm1", "arm2"}
        assert all(robot["published"] >= 1 for robot in robots.values())
        first.kill()
        first.wait()
        with served(address):
            for arm in (arm1, arm2):
                arm.until("another System 2", lambda h: h["pid"] != first.pid, node="system2")
                arm.until_served()


def test_a_system2_that_returns_with_other_weights_stops_the_robots(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/s2"
    share = (f"system2.connect={address}", "tasks.steps_limit=100000", "robot.id=arm1")
    # Another seed: latents of the same shape, of which System 1 knows nothing.
    engine = "system2.engine={{target: 'openhelix.runtime.robots.fake:PointEngine', options: {{seed: {}}}}}"
    with served(address, engine.format(1)) as first, session(tmp_path / "one", *share) as arm:
        arm.begin()
        arm.until_served()
        first.kill()
        first.wait()
        with served(address, engine.format(2)):
            report = arm.finished()
    assert report["stopped"].startswith("latent mismatch (System 2 sends ")
    assert report["safe_stops"].pop("latent_mismatch") == 1
    assert set(report["safe_stops"]) <= {"latent_silent"}  # while there was no System 2
    assert report["latents_mismatched"] >= 1
    assert report["tasks"][0]["reason"].startswith("safe stop: latent mismatch")


def test_strangers_are_refused_and_the_running_robot_does_not_notice(tmp_path: Path) -> None:
    keys = key_folders(tmp_path)
    address = f"tcp://127.0.0.1:{free_port(3)}"
    share = (f"system2.connect={address}", "tasks.steps_limit=100000")
    with (
        served(address, f"transport.keys={keys['server']}"),
        session(tmp_path / "one", *share, f"transport.keys={keys['known']}") as arm,
    ):
        arm.begin()
        arm.until("work", lambda h: h["steps"] > 15)
        for who, robot, expected in (
            ("unknown", "arm2", "refuses this host's CURVE key"),
            ("misled", "arm2", r"not the server of server\.public"),
            ("known", "robot0", "'robot0' is in use"),
        ):
            words = (*share, f"transport.keys={keys[who]}", f"robot.id={robot}")
            with (
                pytest.raises(ConfigError, match=expected),
                session(tmp_path / f"{who}-{robot}", *words) as other,
            ):
                other.begin()
            arm.until_served()
        health = arm.graph.health("system2")
        assert set(health["robots"]) == {"robot0"} and health["shed"].get("name_taken", 0) >= 1
        arm.graph.ask("control", "halt")
        report = arm.finished()
    assert report["safe_stops"] == {} and report["latents_missed"] == 0


def test_a_shared_system2_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (
        session(tmp_path, f"system2.connect=ipc://{tmp_path}/nobody") as run,
        pytest.raises(GraphError, match="openhelix serve"),
    ):
        run.begin()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tcp://0.0.0.0:7000"], "openhelix keys"),
        (["smoke://signal"], "expected ipc://PATH"),
        ([], "ADDRESS"),
        (["ipc:///tmp/x", "system2.hz=0"], "system2.hz"),
    ],
)
def test_serve_refuses_in_one_line(words: list[str], expected: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "openhelix.runtime.cli.main", "serve", *words],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and expected in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
